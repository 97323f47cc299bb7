"""Receiving weights: where they come from (memory of another process, a broadcast, files), staged and verified before a swap."""
