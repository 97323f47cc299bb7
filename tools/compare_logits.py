"""Logits and gradients of the decoder against transformers, on a model directory and real text.

    pip install transformers              # beside Miles; not a dependency of the decoder
    python tools/compare_logits.py --model DIR

Prints, per text, the largest absolute difference of the float32 logits; then the relative difference of the gradient of
the mean loss, per checked weight. Exit code 1 when a logit differs by more than --tolerance.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from miles_kernels.contract import Contract
from miles_kernels.nn.checkpoint import load_decoder
from miles_kernels.nn.decoder import PackedKV
from miles_kernels.ops.attention import packed_plan

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "2+6=8\n7+5=12\n4+0=4\n9+8=17\n3+4=",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n-1) +",
)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return float((ours - theirs).norm() / theirs.norm())


def main() -> int:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tolerance", type=float, default=2e-4)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = load_decoder(options.model, Contract.reference("float32"), torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    worst = 0.0
    for text in TEXTS:
        ids = torch.tensor(tokenizer(text)["input_ids"])
        plan, positions = packed_plan([len(ids)])
        with torch.no_grad():
            difference = (ours.logits(ours(ids, positions, PackedKV(plan))) - theirs(ids[None]).logits[0]).abs().max()
        worst = max(worst, float(difference))
        print(f"{len(ids)} tokens: logits differ by at most {float(difference):.2e}")
    theirs(ids[None], labels=ids[None]).loss.backward()
    hidden = ours(ids, positions, PackedKV(plan))
    (-ours.logprob(hidden[:-1], ids[1:], 1.0).logprob.mean()).backward()
    reference = dict(theirs.named_parameters())
    middle = len(ours.layers) // 2
    qkv = torch.cat([reference[f"model.layers.{middle}.self_attn.{name}_proj.weight"].grad for name in "qkv"])
    print(
        f"gradient of the embedding: {relative(ours.embed_tokens.grad, reference['model.embed_tokens.weight'].grad):.2e} relative"
    )
    print(f"gradient of q, k, v in layer {middle}: {relative(ours.layers[middle].qkv_proj.grad, qkv):.2e} relative")
    return int(worst > options.tolerance)


if __name__ == "__main__":
    sys.exit(main())
