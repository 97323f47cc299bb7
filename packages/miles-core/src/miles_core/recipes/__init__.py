"""Recipes that ship with Miles: TOML files, the tasks they train on, and a small warmed-up model."""
