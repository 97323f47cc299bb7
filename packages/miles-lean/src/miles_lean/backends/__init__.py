"""Ways of running Lean behind one protocol."""
