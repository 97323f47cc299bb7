"""Recipes that train on Lean: `miles train lean-toy`, `miles sft lean-toy`, and what they are made of.

miles-core finds the .toml files of this folder through the entry point `miles.core.recipes`; nothing here imports it.
"""
