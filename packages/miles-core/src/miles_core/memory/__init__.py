"""Memory: what a run will hold, planned before it starts, and the heap of this process. No torch is imported here."""

from miles_core.memory.heap import LARGE_MODEL_BYTES, peak_rss_bytes, prepare_heap, release_freed

__all__ = ["LARGE_MODEL_BYTES", "peak_rss_bytes", "prepare_heap", "release_freed"]
