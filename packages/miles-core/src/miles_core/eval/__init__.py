"""Evaluation on held-out prompts: through the same engine, scored by the same reward."""
