"""Run Lean's command line inside this Python process: `python -I -S launch.py LIBRARY ARGUMENT...`.

`lean_main` ends only once per process, so the process ends with it. Imports nothing but ctypes; start-up counts here.
"""

import ctypes
import os
import sys


def main() -> None:
    """Call lean_main of the library and exit with its code."""
    library = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
    arguments = [b"lean", *map(os.fsencode, sys.argv[2:])]
    code = library.lean_main(len(arguments), (ctypes.c_char_p * (len(arguments) + 1))(*arguments, None))
    ctypes.CDLL(None).fflush(None)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    main()
