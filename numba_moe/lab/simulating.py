"""The simulator, turned on in a line: Numba's, with what the library adds to it."""

from numba_moe.device import switch


def use_simulator() -> None:
    """Run kernels in Numba's CUDA simulator from now on: no GPU is needed, and ``print`` and ``breakpoint()`` work.

    Returns
    -------
    None

    Raises
    ------
    RuntimeError
        Numba, or a part of this library that asked for the switch, was imported before without it.

    Notes
    -----
    Call it first in a program, before ``import numba``. It does what ``NUMBA_ENABLE_CUDASIM=1`` does.

    Examples
    --------
    >>> from numba_moe import lab
    >>> lab.use_simulator()  # doctest: +SKIP
    """
    switch.turn_on()
    from numba_moe.device import simulator as simulator  # which completes Numba's


def use_simulator_without_gpu() -> bool:
    """Run kernels in Numba's CUDA simulator where there is no CUDA device, and on the device where there is one.

    Returns
    -------
    bool
        Whether the simulator is on.

    Raises
    ------
    RuntimeError
        As `use_simulator` does.

    Notes
    -----
    ``NUMBA_ENABLE_CUDASIM`` in the environment, 0 or 1, decides if it is set.

    Examples
    --------
    >>> from numba_moe import lab
    >>> simulated = lab.use_simulator_without_gpu()
    """
    simulated = switch.turn_on_without_gpu()
    if simulated:
        from numba_moe.device import simulator as simulator
    return simulated
