"""One module for each subcommand: `arguments(parser)` declares its options, `run(options)` does it and returns the exit code."""
