"""Numba's CUDA simulator, turned on before Numba is imported: it reads its switch then, once."""

import os
import sys

VARIABLE = "NUMBA_ENABLE_CUDASIM"
HOW = (
    "put `from numba_moe import lab; lab.use_simulator()` first in the program, before numba is imported or an op of "
    f"numba_moe is used, or start it as `{VARIABLE}=1 python ...`; a notebook has to be restarted"
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


def turn_on() -> None:
    """Ask for the simulator, if it is not too late."""
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


def turn_on_without_gpu() -> bool:
    """Ask for the simulator where there is no CUDA device, unless somebody has decided; return whether it is on."""
    import torch

    if VARIABLE not in os.environ and not torch.cuda.is_available():
        turn_on()
    return is_on()
