"""Processes that run Lean: one per check, forked from a warm parent, or a shared server worker; and the pool over them."""
