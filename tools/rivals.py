"""What the comparison scripts share: the same prompts, lengths and weights given to transformers and TRL.

transformers and TRL are not dependencies of Miles; install them beside it to run the comparisons:
    pip install transformers trl
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def draw_lengths(kind: str, count: int, longest: int, *, shortest: int = 4, seed: int = 0) -> list[int]:
    """New tokens per request: all `longest` ("even"), or evenly spaced over shortest..longest in random order ("uneven")."""
    if kind == "even":
        return [longest] * count
    lengths = [round(shortest + (longest - shortest) * i / max(1, count - 1)) for i in range(count)]
    random.Random(seed).shuffle(lengths)
    return lengths


def draw_prompts(count: int, length: int, vocab_size: int, *, lowest: int = 4, seed: int = 1) -> list[list[int]]:
    """Random prompts of one length, so that the rival needs no padding."""
    rng = random.Random(seed)
    return [[rng.randrange(lowest, vocab_size) for _ in range(length)] for _ in range(count)]


def draw_sums(tokenizer: Any, count: int, length: int, *, seed: int = 1) -> list[list[int]]:
    """Prompts of `length` tokens that survive a round trip through a real tokenizer: lists of small sums, cut."""
    rng = random.Random(seed)
    prompts = []
    while len(prompts) < count:
        text = "".join(f"{a} + {b} = {a + b}\n" for a, b in ((rng.randrange(10), rng.randrange(10)) for _ in range(length)))
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"][:length]
        if tokenizer(tokenizer.decode(prompt), add_special_tokens=False)["input_ids"] == prompt:
            prompts.append(prompt)
    return prompts


class RowLengths:
    """transformers stopping criterion: row i is finished after lengths[i] new tokens. The cheapest way to say so."""

    def __init__(self, prompt_length: int, lengths: Sequence[int]) -> None:
        self.last = torch.tensor(lengths) + prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.last


def hf_tokenizer(model_dir: Path) -> Any:
    """The tokenizer of an HF directory; for our character tokenizer, the same alphabet as a transformers tokenizer."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not (model_dir / "char_tokenizer.json").exists():
        return AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    from miles_rollout.text import load_tokenizer

    ours = load_tokenizer(model_dir)
    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3}
    vocab |= {ours.decode([token]): token for token in range(4, ours.vocab_size) if ours.decode([token])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def interleave(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Time the sides in turn, A B A B …, after one warm-up each; seconds as each side reports them."""
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            seconds[name].append(run())
    return seconds


def timed(run: Callable[[], Any]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def report(title: str, seconds: dict[str, list[float]], ours: str, rival: str, *, tokens: int) -> dict[str, Any]:
    """Print medians and the pairwise ratio, and return them as one JSON-ready record."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [r / o for o, r in zip(seconds[ours], seconds[rival], strict=True)]
    record = {
        "case": title,
        "tokens": tokens,
        **{f"{name}_s": round(value, 4) for name, value in medians.items()},
        **{f"{name}_tokens_per_s": round(tokens / value, 1) for name, value in medians.items()},
        "speed_ratio_median": round(statistics.median(ratios), 3),
        "speed_ratio_min": round(min(ratios), 3),
        "speed_ratio_max": round(max(ratios), 3),
    }
    print(json.dumps(record), flush=True)
    return record
