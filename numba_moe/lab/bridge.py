"""Arrays of one library as those of another, over the same memory, for kernels of one's own."""

from typing import Any

import torch

from numba_moe.device import simulator
from numba_moe.runtime import arrays


def as_tensor(array: Any) -> torch.Tensor:
    """Return a torch tensor over the memory of an array of any library.

    Parameters
    ----------
    array : array
        A NumPy, CuPy, JAX or Numba array, another that speaks DLPack, or a tensor, which is returned as it is.

    Returns
    -------
    torch.Tensor
        Of the same shape, dtype and device.

    Raises
    ------
    TypeError
        No array, or one without memory to share.

    Notes
    -----
    Nothing is copied, but for NumPy arrays that a tensor cannot express: read-only ones, ones with negative strides or
    of the other byte order.

    Examples
    --------
    >>> import numpy as np
    >>> counts = np.zeros(2, np.int32)
    >>> as_tensor(counts)[1] = 7
    >>> counts
    array([0, 7], dtype=int32)
    """
    return arrays.to_tensor("array", array)


def as_device_array(array: Any) -> Any:
    """Return a Numba device array over the memory of an array of any library, for a kernel that is launched by hand.

    Parameters
    ----------
    array : array
        As `as_tensor` takes.

    Returns
    -------
    Numba device array
        Of the same shape and strides; bfloat16, which Numba lacks, as its 16 bits, uint16.

    Raises
    ------
    TypeError
        No array, or one without memory to share.
    ValueError
        It is in the memory of the host, and the simulator is off.

    Notes
    -----
    Nothing is copied, but as `as_tensor` says. In the simulator the memory of the host is that of the device.

    Examples
    --------
    >>> import numpy as np
    >>> counts = np.zeros(2, np.int32)
    >>> as_device_array(counts)[1] = 7  # doctest: +SKIP
    """
    tensor = as_tensor(array).detach()
    if not (tensor.is_cuda or simulator.ENABLED):
        raise ValueError("`array` must be on a CUDA device, got one of the host; copy it with `cuda.to_device`")
    return arrays.in_library(tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor, "numba")
