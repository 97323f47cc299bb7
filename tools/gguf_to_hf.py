"""GGUF file to a Hugging Face folder: the same as `miles convert gguf FILE OUT`, callable as a script."""

from __future__ import annotations

import sys

from miles_core.cli import main

if __name__ == "__main__":
    main(["convert", "gguf", *sys.argv[1:]])
