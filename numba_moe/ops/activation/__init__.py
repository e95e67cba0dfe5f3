"""The step between the two matrices of an expert: bias, gate and activation."""
