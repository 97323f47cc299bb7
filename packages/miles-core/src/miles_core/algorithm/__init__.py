"""Advantages, losses and their reduction: pure functions of tensors, composed by configuration.

`config` imports no torch, so a configuration can be read without it.
"""
