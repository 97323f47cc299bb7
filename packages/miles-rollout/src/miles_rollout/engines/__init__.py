"""Implementations of `miles_rollout.engine.Engine`, one package each."""
