"""Numba's CUDA simulator, turned on before Numba is imported: it reads its switch then, once."""

import os
import sys

VARIABLE = "NUMBA_ENABLE_CUDASIM"
HOW = (
    "put `from numba_moe import lab; lab.use_simulator()` first in the program, before numba is imported, "
    f"or start it as `{VARIABLE}=1 python ...`; a notebook has to be restarted"
)
TOO_LATE = f"it is too late to turn on Numba's simulator: {HOW}"


def is_on() -> bool:
    """Whether the environment asks for the simulator."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")


def check_in_time() -> None:
    """Raise an error if Numba was imported before the simulator was asked for."""
    numba = sys.modules.get("numba")
    if is_on() and numba is not None and hasattr(numba, "config") and not numba.config.ENABLE_CUDASIM:
        raise RuntimeError(TOO_LATE)


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
    asked = sys.modules.get("numba_moe.device.simulator")
    if asked is not None and not asked.ENABLED:
        raise RuntimeError(TOO_LATE)
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    try:
        check_in_time()
    except RuntimeError:
        os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})
        raise


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
    Whoever sets ``NUMBA_ENABLE_CUDASIM``, to 0 or 1, has decided already.

    Examples
    --------
    >>> from numba_moe import lab
    >>> simulated = lab.use_simulator_without_gpu()
    """
    import torch

    if VARIABLE not in os.environ and not torch.cuda.is_available():
        use_simulator()
    return is_on()
