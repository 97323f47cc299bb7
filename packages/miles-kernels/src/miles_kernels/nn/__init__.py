"""The decoder built from the aligned ops, its configuration, and model directories."""
