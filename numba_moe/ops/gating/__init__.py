"""The experts of each token: what gating computes, its kernels, plans and public functions."""
