"""Hopper backends. Nothing here is imported unless a CUDA tensor (or a caller) asks for it; triton is optional."""
