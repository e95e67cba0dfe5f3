"""What kernels are written in: types, primitives, intrinsics, and the simulator that stands in for a GPU."""
