"""`python -m miles_kernels.verify ...`: the command without an installed distribution."""

import argparse
import sys

from miles_kernels.verify.command import add_to

parser = argparse.ArgumentParser(prog="python -m miles_kernels.verify")
commands = parser.add_subparsers(required=True)
add_to(commands)
options = parser.parse_args(["verify", *sys.argv[1:]])
sys.exit(options.command(options))
