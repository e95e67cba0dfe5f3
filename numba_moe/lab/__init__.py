"""Bring your own kernel: it is checked, timed and broken on purpose as the library's own are."""

from numba_moe import lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "lab.bridge": "as_device_array as_tensor",
        "lab.checking": "check counting",
        "lab.planting": "planted",
        "lab.simulating": "use_simulator use_simulator_without_gpu",
        "lab.timing": "bench roofline",
    },
)
