"""The ops: a file or folder for each family, with its records, kernels, checks, launches and public functions."""
