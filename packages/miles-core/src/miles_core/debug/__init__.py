"""Looking at a run afterwards, from its directory alone."""
