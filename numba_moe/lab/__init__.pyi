from numba_moe.lab.bridge import as_device_array as as_device_array
from numba_moe.lab.bridge import as_tensor as as_tensor
from numba_moe.lab.checking import check as check
from numba_moe.lab.checking import counting as counting
from numba_moe.lab.planting import planted as planted
from numba_moe.lab.simulating import use_simulator as use_simulator
from numba_moe.lab.simulating import use_simulator_without_gpu as use_simulator_without_gpu
from numba_moe.lab.timing import bench as bench
from numba_moe.lab.timing import roofline as roofline

__all__: list[str]
