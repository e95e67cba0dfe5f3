# %% [markdown]
# # 10. From 73 us to 3 us of launch
#
# You will see where the time goes when kernels are short, and how to spend less of it.
#
# A call has two times. The *host* prepares a launch and puts it into a queue. The *device* takes launches from the
# queue. They work at the same time, so the longer of the two counts. Routing kernels take 2 to 10 us of the device.
# Numba's own launch of a kernel on torch tensors takes 73 us of the host (H200), since it describes every array to
# the driver anew.

# %%
from numba_moe import lab

lab.use_simulator_without_gpu()

import checks
import pictures

pictures.show("queue")

# %% [markdown]
# `Launch` of this library is told once what the kernel takes, and checks it then. A call packs addresses behind the
# numbers it knows, and asks the driver: 3 us. `steps/counting/06_launch.py` does so with a kernel that you know. A
# *record* says what each field may be, so that a kernel can be compiled before anybody calls it.

# %%
step = checks.step("counting/06_launch")
lab.check(step.count_tokens_per_expert, like="count_tokens_per_expert", cases=["one slot", "hot"], library="numba")

# %% [markdown]
# Three more ways to pay less. *One launch instead of three*: `steps/alignment/05_one_launch.py`. *A graph*: CUDA
# records many launches and replays them for the price of one; ops that never ask the device for a number can be
# recorded. *Overlap*: from H100 on a kernel may start while the one ahead of it ends, so that its start is hidden.
#
# **Exercise.** Write `time_of(calls, host_us, device_us)`: the microseconds from the first call until the device is
# done with all of `calls`. The host makes one launch after another; the device runs each as soon as it is launched
# and the one before is done.


# %%
def time_of(calls, host_us, device_us):
    return calls * (host_us + device_us)  # change this: they work at the same time


checks.try_it("time_of", time_of)
