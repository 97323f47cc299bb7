"""Convert between Hugging Face model directories and Megatron checkpoints, bit for bit, with a ledger of hashes.

    tools/convert_megatron.py to-megatron MODEL_DIR OUT [--dtype bfloat16] [--vocab-multiple 128]
    tools/convert_megatron.py to-hf CHECKPOINT OUT

OUT/megatron is a torch_dist checkpoint that megatron-core reads into any tensor, pipeline or expert parallel layout. Runs on a
CPU. Needs miles-core[megatron]. Ends with code 1 and the tensors' names when something does not fit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=("to-megatron", "to-hf"))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="the stored dtype (to-megatron)")
    parser.add_argument("--vocab-multiple", type=int, default=1, help="pad the vocabulary to a multiple (to-megatron)")
    options = parser.parse_args()
    from miles_core.trainer.megatron.convert import hf_to_megatron, megatron_to_hf

    try:
        if options.way == "to-megatron":
            dtype = getattr(torch, options.dtype)
            ledger = hf_to_megatron(options.source, options.out, dtype=dtype, vocab_multiple=options.vocab_multiple)
        else:
            ledger = megatron_to_hf(options.source, options.out)
    except (ValueError, ImportError) as error:
        sys.exit(f"convert_megatron: {error}")
    counts = f"{len(ledger['hf'])} Hugging Face tensors, {len(ledger['megatron'])} Megatron tensors"
    print(f"{counts}, every hash accounted for: {options.out}")
    if options.way == "to-megatron" and ledger["left_out"]:
        print(f"{len(ledger['left_out'])} tensors of layers for multi-token prediction have no place there and are left out:")
        print(f"a draft's, which `miles-spec export {options.source} OUT` writes by itself")


if __name__ == "__main__":
    main()
