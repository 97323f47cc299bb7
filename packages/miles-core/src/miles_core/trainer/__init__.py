"""Training backends behind one protocol (`base.Trainer`): batches, packing, optimizer, parallelism.

`config` imports no torch, so a configuration can be read without it.
"""
