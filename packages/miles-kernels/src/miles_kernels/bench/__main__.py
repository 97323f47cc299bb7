"""`python -m miles_kernels.bench [WHAT ...] --out DIR`: the command `miles-kernels bench`."""

import sys

from miles_kernels.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
