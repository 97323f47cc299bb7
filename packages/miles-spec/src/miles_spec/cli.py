"""The `miles-spec` command: simulate, bench, train, inspect, export, verify-lossless."""

from __future__ import annotations

import argparse
import importlib
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miles_spec import __version__
from miles_spec.bench import KINDS, BenchSettings, Cell, heading, line, write
from miles_spec.draft import DRAFTS
from miles_spec.metrics import AcceptStats
from miles_spec.models import command as model_command
from miles_spec.train import command as train_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; exit code 0, or 2 for wrong input."""
    parser = argparse.ArgumentParser(prog="miles-spec", description="Lossless speculative decoding with keyed sampling.")
    parser.add_argument("--version", action="version", version=f"miles-spec {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    simulate = commands.add_parser(
        "simulate",
        help="run drafts over recorded or synthetic sequences and print accept lengths",
        description="With a FILE (JSON lines of token ids, or a run's samples), count what its sequences would have accepted. "
        "Without one, sample from a synthetic target with and without drafts and check that the tokens are the same.",
    )
    simulate.add_argument("file", nargs="?", type=Path)
    simulate.add_argument("--draft", choices=[*DRAFTS, "all"], default="all")
    simulate.add_argument("--num-draft", type=int, default=4, help="most tokens proposed at once")
    simulate.add_argument("--num-sequences", type=int, default=16, help="synthetic only")
    simulate.add_argument("--num-tokens", type=int, default=256, help="synthetic only: sampled tokens of each sequence")
    simulate.add_argument("--vocab", type=int, default=64, help="synthetic only")
    simulate.add_argument(
        "--order", type=int, default=1, help="synthetic only: how many tokens decide the next one's distribution"
    )
    simulate.add_argument("--sharpness", type=float, default=6.0, help="synthetic only: standard deviation of the logits")
    simulate.add_argument("--temperature", type=float, default=1.0, help="synthetic only; 0 is greedy")
    simulate.add_argument("--seed", type=int, default=0, help="synthetic and --costs only")
    simulate.add_argument(
        "--costs",
        type=Path,
        metavar="FILE",
        help='choose draft lengths in an engine of these costs: JSON lines {"rows": R, "seconds": [without drafts, with 1, ..]}',
    )
    simulate.add_argument(
        "--accept",
        type=float,
        nargs="+",
        default=[0.0, 0.3, 0.6, 0.9],
        help="--costs only: chances that a draft token is accepted",
    )
    lossless = commands.add_parser(
        "verify-lossless",
        help="compare the embedded engine with and without drafts, bit for bit",
        description="Random requests of all kinds through engines with every draft, length 1 to 8, control and size; tokens, "
        "log-probabilities, texts and finish reasons must equal those of plain decoding. Exit code 1 when anything differs. "
        "Needs miles-rollout[embedded].",
    )
    lossless.add_argument("--tokens", type=int, default=20_000, help="compare at least this many tokens")
    lossless.add_argument("--seed", type=int, default=0)
    lossless.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    lossless.add_argument("--seconds", type=float, default=1e9, help="stop after this long, however few tokens were compared")
    lossless.add_argument(
        "--part", default="0/1", metavar="I/N", help="only the I-th of N shares of all combinations, for N commands side by side"
    )
    _add_bench(commands)
    train_command.add_arguments(commands)
    model_command.add_arguments(commands)
    options = parser.parse_args(arguments)
    try:
        if options.command == "verify-lossless":
            return _lossless(options)
        if options.command == "bench":
            return _bench(options)
        if options.command == "train":
            return train_command.run(options)
        if options.command in ("inspect", "export"):
            return model_command.run(options)
        _check(options)
        if options.costs:
            return _controlled(options)
        return _recorded(options) if options.file else _synthetic(options)
    except (OSError, ValueError) as error:
        words = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"miles-spec: {words}", file=sys.stderr)
        return 2


def _engine(command: str, module: str) -> Any:
    """The engine lies above this package, so it is looked up by name and only here."""
    try:
        return importlib.import_module(f"miles_rollout.engines.embedded.{module}")
    except ModuleNotFoundError as error:
        raise ValueError(
            f'{command} runs the embedded engine: pip install "miles-rollout[embedded]" ({error.name} is missing)'
        ) from error


def _add_bench(commands: Any) -> None:
    known = BenchSettings()
    bench = commands.add_parser(
        "bench",
        help="tokens per second without drafts, with every fixed length and with the controller's",
        description="Decode the same requests in the embedded engine in every way, in turn, and print tokens per second over "
        "plain decoding's. Exit code 1 when tokens differ. Needs miles-rollout[embedded].",
    )
    bench.add_argument("model", nargs="?", type=Path, metavar="MODEL", help="a Hugging Face directory; left out: a random model")
    bench.add_argument(
        "--draft", default=known.draft, help=f"{', '.join(KINDS)} (the layers MODEL carries), or a draft's directory"
    )
    bench.add_argument("--device", choices=["cpu", "cuda"], default=known.device)
    bench.add_argument("--rows", type=int, nargs="+", default=known.rows, help="sequences decoded at a time")
    bench.add_argument("--temperatures", type=float, nargs="+", default=known.temperatures, metavar="T")
    bench.add_argument("--num-draft", type=int, default=known.num_draft, help="longest draft")
    bench.add_argument("--rounds", type=int, default=known.rounds, help="times every arm runs; the best counts")
    bench.add_argument("--settle", type=int, default=known.settle, help="runs that the controller learns from beforehand")
    bench.add_argument(
        "--prompts", type=Path, metavar="FILE", help="JSON lines of token ids, or a run's samples; else random ids"
    )
    bench.add_argument("--prompt-tokens", type=int, default=known.prompt_tokens, help="of random prompts")
    bench.add_argument("--new-tokens", type=int, default=known.new_tokens, help="sampled tokens of each sequence")
    bench.add_argument("--catch-up", default=known.catch_up, help="whole, keys or captured: how a silent draft catches up")
    bench.add_argument("--graph-lengths", action="store_true", help="capture every length at the start")
    bench.add_argument("--layers", type=int, default=known.layers, help="of the random model")
    bench.add_argument("--hidden", type=int, default=known.hidden, help="of the random model")
    bench.add_argument("--out", type=Path, metavar="DIR", help="write bench.md, bench.json, bench.svg and costs.jsonl there")


def _bench(options: argparse.Namespace) -> int:
    given: dict[str, Any] = {name: value for name, value in vars(options).items() if name != "command"}
    given |= {"rows": tuple(options.rows), "temperatures": tuple(options.temperatures)}
    settings = BenchSettings(**given)
    settings.validate()
    engine = _engine("bench", "speculate_bench")
    machine, cells = engine.machine_of(settings), []
    print(f"{machine}\n\n{heading(settings)}", flush=True)

    def told(cell: Cell) -> None:
        cells.append(cell)
        print(line(cell), flush=True)
        if settings.out is not None:
            write(cells, settings, machine, settings.out)

    engine.measure(settings, told)
    different = sum(cell.num_different for cell in cells)
    print(f"\n{'tokens identical in all arms' if not different else f'{different} arms gave other tokens than plain decoding'}")
    return 1 if different else 0


def _lossless(options: argparse.Namespace) -> int:
    if options.tokens < 1:
        raise ValueError(f"--tokens must be at least 1, not {options.tokens}")
    part = re.fullmatch(r"(\d+)/(\d+)", options.part)
    if part is None or not int(part[1]) < int(part[2]):
        raise ValueError(f"--part must be I/N with I < N, such as 0/4; got {options.part!r}")
    check = _engine("verify-lossless", "speculate_check")
    shares = (int(part[1]), int(part[2]))
    return int(check.main(options.tokens, options.seed, options.device, options.seconds, shares))


def _controlled(options: argparse.Namespace) -> int:
    from miles_spec.simulate_control import CostTable, control

    if any(not 0.0 <= chance <= 1.0 for chance in options.accept):
        raise ValueError(f"--accept must lie in 0..1, not {options.accept}")
    table = CostTable.read(options.costs)
    print("rows  acceptance  best length  adaptive / plain  adaptive / best")
    for rows in sorted(table.seconds):
        for chance in options.accept:
            found = control(table, [chance] * table.most, rows, seed=options.seed)
            print(f"{rows:4}  {chance:10.2f}  {found.best_length:11}  {found.over_plain:16.3f}  {found.over_best:15.3f}")
    return 0


def _check(options: argparse.Namespace) -> None:
    for name in ("num_draft", "num_sequences", "num_tokens", "order"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(options, name)}")
    if options.vocab < 2:
        raise ValueError(f"--vocab must be at least 2, not {options.vocab}")


def _chosen(options: argparse.Namespace) -> list[str]:
    return list(DRAFTS) if options.draft == "all" else [options.draft]


def _line(name: str, stats: AcceptStats, remark: str = "") -> str:
    by_position = " ".join(f"{stats.rate_at(position):.2f}" for position in sorted(stats.proposed_at))
    return (
        f"{name:<8} accept_length {stats.accept_length:.3f}  accept_rate {stats.accept_rate:.3f}  "
        f"steps {stats.num_steps}  by position [{by_position}]{remark}"
    )


def _recorded(options: argparse.Namespace) -> int:
    from miles_spec.simulate import read_recorded, replay

    sequences = read_recorded(options.file)
    num_tokens = sum(len(sequence.token_ids) - sequence.num_prompt for sequence in sequences)
    print(f"{len(sequences)} recorded sequences, {num_tokens} sampled tokens")
    for name in _chosen(options):
        total = AcceptStats()
        total.merge(replay(sequence, DRAFTS[name](), options.num_draft) for sequence in sequences)
        print(_line(name, total))
    return 0


def _synthetic(options: argparse.Namespace) -> int:
    from miles_spec.decoding import Sampling, decode
    from miles_spec.simulate import synthetic_target

    target = synthetic_target(options.vocab, options.order, options.sharpness, options.seed)
    rng = random.Random(options.seed)
    prompts = [[rng.randrange(options.vocab) for _ in range(8)] for _ in range(options.num_sequences)]
    sampling = [Sampling(seed=options.seed, sample_id=i, temperature=options.temperature) for i in range(len(prompts))]
    print(f"{len(prompts)} synthetic sequences of {options.num_tokens} tokens, vocabulary {options.vocab}")
    plain = [decode(target, prompt, options.num_tokens, how) for prompt, how in zip(prompts, sampling, strict=True)]
    for name in _chosen(options):
        draft, total, different = DRAFTS[name](), AcceptStats(), 0
        for prompt, how, reference in zip(prompts, sampling, plain, strict=True):
            result = decode(target, prompt, options.num_tokens, how, draft=draft, num_draft=options.num_draft)
            total.merge([result.stats])
            different += sum(a != b for a, b in zip(result.token_ids, reference.token_ids, strict=True))
            different += sum(a != b for a, b in zip(result.logprobs, reference.logprobs, strict=True))
        assert not different, f"{name}: {different} tokens or log-probabilities differ from plain sampling"
        print(_line(name, total, "  tokens identical to plain sampling"))
    return 0
