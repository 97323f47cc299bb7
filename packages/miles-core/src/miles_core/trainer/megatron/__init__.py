"""Trainer backend on megatron-core: TP, PP, CP and EP, its distributed optimizer and its checkpoint format.

Import `miles_core.trainer.megatron.backend` when it is chosen: everything below it needs `miles-core[megatron]`.
"""
