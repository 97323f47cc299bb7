"""`miles-kernels bench`: ratios to cuBLAS, SDPA and the hardware floor, in one run on one GPU."""
