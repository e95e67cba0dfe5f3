"""A bump allocator: one buffer, many aligned views of it, one clear for all."""

import math
import sys

import torch

from numba_moe.runtime import checks


class BumpAllocator:
    """Hand out aligned views of one zeroed buffer, one after the other.

    Parameters
    ----------
    size : int
        Elements of the buffer, at least 1.
    dtype : torch.dtype or str
        Of the buffer and of every view, for instance ``torch.int32`` or ``"int32"``.
    device : torch.device, str or int
        A CUDA device, an ordinal of one, or the CPU.
    alignment : int
        Alignment of the address of every view, in bytes: a power of two, at least the size of an element.

    Attributes
    ----------
    buffer : tensor of dtype, shape [size]
        The memory; its address is aligned too.
    size : int
        Elements of the buffer.
    used : int
        Elements from the beginning of the buffer to the end of the last view, the gaps between views included.

    Raises
    ------
    TypeError
        An argument of the wrong type.
    ValueError
        size below 1, an unknown dtype or device, an alignment that is no power of two or smaller than an element.

    Notes
    -----
    The buffer starts zeroed (``torch.zeros``, one fill). Views of a second round, after `reset`, hold what the first
    left there, until `zero`.

    Streams: the fill runs on the stream that is current at construction, and to torch's caching allocator the memory
    belongs to that stream. Work on another stream has to wait for the fill (``stream.wait_stream``). When the
    allocator and its last view are gone, the first stream's next allocation may get the memory at once; while another
    stream still works on it, keep a reference or call ``allocator.buffer.record_stream(stream)`` before. After `reset`,
    writers of new views must wait for the readers of the old views. `zero` fills on the stream that is current when it
    is called. Threads that share an allocator need a lock of their own.

    CUDA graphs: a graph records addresses and device work. `allocate` and `reset` take effect at capture, not at
    replay, so two graphs captured with a `reset` between them share memory and must not replay at the same time.

    - Constructed before the capture, the memory comes from the ordinary pool and the graph does not hold it: keep the
      allocator or one of its views as long as the graph may replay, or replays write over the tensors that got the
      memory next. Replays start with what the last one left, unless `zero` was captured.
    - Constructed inside the capture, the memory comes from the graph's private pool, which no eager tensor uses: it
      stays valid for replays while the graph exists, without the allocator. The fill is captured, so every replay
      starts zeroed. Once the allocator and its views are gone, later allocations of this capture, or of one that
      shares the pool, may reuse the memory; to read a view after a replay, keep it, and read before the next replay.

    The interface is that of SGLang's class of this name, which does not align.

    Examples
    --------
    >>> allocator = BumpAllocator(64, "int32", "cpu")
    >>> counts, cursors = allocator.allocate(6), allocator.allocate((2, 4))
    >>> cursors.shape, allocator.used  # cursors begin at element 8, a multiple of 16 bytes
    (torch.Size([2, 4]), 16)
    >>> counts += 3
    >>> allocator.zero()
    >>> counts.tolist()
    [0, 0, 0, 0, 0, 0]
    >>> allocator.allocate(49)
    Traceback (most recent call last):
    ValueError: `n` must be at most the 48 elements left of 64, got 49
    """

    @torch.inference_mode(False)  # memory that is taken inside an inference mode can be written outside
    def __init__(
        self, size: int, dtype: torch.dtype | str, device: torch.device | str | int, *, alignment: int = 16
    ) -> None:
        self.size = checks.integer("size", size, 1, sys.maxsize)
        dtype, device = checks.dtype("dtype", dtype), checks.device("device", device)
        alignment = checks.integer("alignment", alignment, 1)
        if alignment & (alignment - 1):
            raise ValueError(f"`alignment` must be a power of two, got {alignment}")
        if alignment < dtype.itemsize:
            rule = f"at least {dtype.itemsize}, the bytes of an element"
            raise ValueError(f"`alignment` must be {rule}, got {alignment}")
        self._step = alignment // dtype.itemsize
        # torch promises no alignment, so there is room to begin at an aligned address.
        memory = torch.zeros(self.size + self._step - 1, dtype=dtype, device=device)
        begin = -memory.data_ptr() % alignment // dtype.itemsize
        self.buffer = memory[begin : begin + self.size]
        self.used = 0

    def allocate(self, n: int | tuple[int, ...]) -> torch.Tensor:
        """Return a view of the next elements.

        Parameters
        ----------
        n : int or tuple of int
            Number of elements, or the shape. No elements are legal and use none.

        Returns
        -------
        tensor of the allocator's dtype, shape [n] or n
            Contiguous, at an aligned address, disjoint from all other views since the last `reset`. Zeroed only if
            this memory was not handed out before, or `zero` follows.

        Raises
        ------
        TypeError
            n is neither an integer nor a tuple of them.
        ValueError
            n is negative, or larger than the rest of the buffer after alignment. Nothing is handed out then.

        Examples
        --------
        >>> allocator = BumpAllocator(8, torch.int64, "cpu")
        >>> allocator.allocate((2, 3)).tolist()
        [[0, 0, 0], [0, 0, 0]]
        """
        shape = n if isinstance(n, tuple | list) else None
        count = n if shape is None else math.prod([checks.integer("n", length, 0, sys.maxsize) for length in shape])
        begin = min(-(-self.used // self._step) * self._step, self.size)
        left = self.size - begin
        end = begin + checks.integer("n", count, 0, left, f"the {left} elements left of {self.size}")
        view = self.buffer[begin:end]
        if end > begin:
            self.used = end
        return view if shape is None else view.view(shape)

    def zero(self) -> None:
        """Clear all that was handed out since the last `reset`, in one fill on the current stream.

        Examples
        --------
        >>> allocator = BumpAllocator(8, "float32", "cpu")
        >>> weights = allocator.allocate(2).fill_(0.5)
        >>> allocator.zero()
        >>> weights.tolist()
        [0.0, 0.0]
        """
        self.buffer[: self.used].zero_()

    def reset(self) -> None:
        """Forget all views, so that their memory is handed out again; it is not cleared.

        Examples
        --------
        >>> allocator = BumpAllocator(4, "int32", "cpu")
        >>> first = allocator.allocate(4).fill_(7)
        >>> allocator.reset()
        >>> allocator.allocate(2).tolist()
        [7, 7]
        """
        self.used = 0
