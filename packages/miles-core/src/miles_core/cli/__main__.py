"""`python -m miles_core.cli`."""

from miles_core.cli.app import main

main()
