"""A run over a rollout service that runs by itself: the bits of a run with an engine of its own, and no weights but its own."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from miles_core.config.load import load_config
from miles_core.config.sections import ServiceConfig
from miles_core.models import load_model
from miles_core.rollout.service import ServiceEngine
from miles_kernels.nn.checkpoint import save_decoder
from miles_rollout.wire import GenerateRequest, SamplingParams

TOKEN = "a token"
FLAGS = ("--steps", "3", "--eval.every", "3", "--checkpoint.every", "3")


class Service:
    """`miles-rollout serve` as a process, and how runs are told of it."""

    def __init__(self, model: Path, weights: Path) -> None:
        self.weights = weights
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "miles_rollout.cli", "serve", str(model), "--port", "0", "--threads", "1",
                "--weights-root", str(weights), "--admin-token", TOKEN, "--kv-memory-mib", "1",
            ],
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self.process.stderr is not None
        said = ""
        for line in self.process.stderr:
            said += line
            if found := re.search(r"on (http://127\.0\.0\.1:\d+)", line):
                self.url = found[1]
                break
        else:
            raise AssertionError(f"the service did not start: {said}")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def end(self) -> None:
        """End the process."""
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, micro_text: str) -> Iterator[Service]:
    """Over other weights of the same shape: a run has to bring its own."""
    folder = tmp_path_factory.mktemp("service")
    (folder / "micro.toml").write_text(micro_text)
    model = load_model(load_config(str(folder / "micro.toml"), ["--run.seed", "7"]), lambda line: None)
    save_decoder(model.decoder, folder / "served")
    model.tokenizer.save(folder / "served")
    (folder / "weights").mkdir()
    made = Service(folder / "served", folder / "weights")
    yield made
    made.end()


@pytest.fixture
def service(running: Service, monkeypatch: pytest.MonkeyPatch) -> Service:
    """The same for all tests: its versions grow."""
    monkeypatch.setenv("MILES_ROLLOUT_ADMIN_TOKEN", TOKEN)
    return running


@pytest.fixture
def flags(service: Service, tmp_path: Path) -> tuple[str, ...]:
    """Of a run that uses it."""
    return ("--service.url", service.url, "--service.directory", str(service.weights / tmp_path.name))


def samples(run: Path) -> list[Any]:
    """What was sampled, without when."""
    files = sorted((run / "samples").iterdir())
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_the_bits_of_a_run_with_its_own_engine_and_one_run_after_the_other(
    micro: Any, service: Service, flags: tuple[str, ...], result: Any
):
    assert micro.miles("train", "micro.toml", *FLAGS)[0] == 0
    expected = result(micro.run("micro"))
    code, said = micro.miles("train", "micro.toml", "--name", "served", *FLAGS, *flags)
    assert code == 0, said
    found = result(micro.run("served"))
    assert found == expected
    rows = [json.loads(line) for line in (micro.run("served") / "metrics.jsonl").read_text().splitlines()]
    assert {row["mismatch/tokens_unequal"] for row in rows if "mismatch/tokens_unequal" in row} == {0}
    (folder,) = Path(flags[3]).glob("served-*")
    assert sorted(path.name for path in folder.iterdir()) == ["version-000002", "version-000003"]
    # the trainer in a process of its own, and a service whose versions have grown already
    code, said = micro.miles(
        "train", "micro.toml", "--name", "workers", *FLAGS, *flags, "--cluster.num_trainers", "1"
    )  # fmt: skip
    assert code == 0, said
    assert {**result(micro.run("workers")), "metrics": ()} == {**expected, "metrics": ()}  # of memory others are recorded
    # rollouts alone are of the weights that are there: those of the last run's end
    code, said = micro.miles("rollout", "micro.toml", "--name", "alone", "--steps", "1", "--service.url", service.url)
    assert code == 0, said
    code, said = micro.miles(
        "rollout", "micro.toml", "--name", "dry", "--dry-run", "--service.url", service.url, "--cluster.num_trainers", "1"
    )
    assert code == 0 and "the model is the service's" in said, said
    assert samples(micro.run("alone")) and samples(micro.run("alone")) != samples(micro.run("served"))[:16]


def test_what_does_not_fit_is_refused_by_name(micro: Any, service: Service, flags: tuple[str, ...]):
    code, said = micro.miles("train", "micro.toml", "--service.url", service.url)
    assert code == 2 and "training needs service.directory, too" in said
    code, said = micro.miles("train", "micro.toml", "--service.url", "http://127.0.0.1:9", "--service.directory", "weights",
                             "--service.deadline_s", "1")  # fmt: skip
    assert code == 2 and 'service.url = "http://127.0.0.1:9"' in said and "miles-rollout serve" in said
    code, said = micro.miles("train", "micro.toml", *flags, "--model.architecture.num_hidden_layers", "2")
    assert code == 2 and "weight version 0" in said and "model.layers.1." in said and "unexpected" in said
    for more, why in (
        (("--cluster.num_engines", "1"), "service.url and cluster.num_engines"),
        (("--draft.model", "mtp"), "with service.url the service has its own"),
        (("--sync.deadline_s", "9"), "by way of service.directory"),
    ):
        code, said = micro.miles("train", "micro.toml", *flags, *more)
        assert code == 2 and why in said, said
    code, said = micro.miles("train", "micro.toml", "--service.url", "127.0.0.1:9")
    assert code == 2 and "must begin with http:// or https://" in said
    for url in ("http://h:99999", "http://h:abc", "http://[::1", "http://:80"):
        code, said = micro.miles("rollout", "micro.toml", "--service.url", url)
        assert code == 2 and "names no host and port" in said, said


def test_files_that_were_damaged_on_the_way_are_refused(micro: Any, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    from miles_core.sync import service as sync

    written = sync.write_model

    def damaged(folder: Path, *rest: Any, **options: Any) -> None:
        written(folder, *rest, **options)
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(sync, "write_model", damaged)
    code, said = micro.miles("train", "micro.toml", *FLAGS, *flags)
    assert code != 0 and "hash mismatch, the file was damaged after it was written" in said and "no engine has taken it" in said


def test_an_engine_that_computes_otherwise_is_measured_if_asked(
    micro: Any, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    """As SGLang does. Here the trainer states another contract than the engine, and computes as before."""
    from miles_core import compose

    plain = compose.make_trainer

    def other(*arguments: Any) -> Any:
        trainer = plain(*arguments)
        contract = trainer.contract

        class Otherwise(type(trainer)):  # type: ignore[misc]
            @property
            def contract(self) -> Any:
                return type("Contract", (), {"digest": "mk1-otherwise", "__getattr__": lambda _, name: getattr(contract, name)})()

        trainer.__class__ = Otherwise
        return trainer

    monkeypatch.setattr(compose, "make_trainer", other)
    code, said = micro.miles("train", "micro.toml", *FLAGS, *flags)
    assert code == 2 and "disagree on the numeric contract" in said and "mk1-otherwise" in said, said
    code, said = micro.miles("train", "micro.toml", "--name", "measured", *FLAGS, *flags, "--service.numbers", "measured")
    assert code == 0 and "algorithm.mismatch_clip = 2.0 would" in said, said


def test_weights_that_are_not_the_runs_are_noticed(service: Service):
    """A service that was started anew, or that somebody else updates, serves other weights than the run believes."""
    request = GenerateRequest(request_id="a", input_ids=(5, 6, 7), sampling=SamplingParams(max_new_tokens=2), sample_ids=(1,))

    async def main() -> None:
        engine = await ServiceEngine.open(ServiceConfig(url=service.url))
        assert engine.info().weight_version == -1
        engine.published(0)
        with pytest.raises(
            ValueError, match=r"sampled under weight version \d+, and this run's last update was \d+: it was started"
        ):
            await engine.generate(request)
        engine.published(-1)  # which is what it serves
        made = await engine.generate(request)
        assert made.completions[0].weight_spans[0].version == -1
        assert [chunk.weight_version async for chunk in engine.stream(request)][0] == -1
        with pytest.raises(ValueError, match="by way of a folder"):
            await engine.update_weights(None, [])  # type: ignore[arg-type]
        other = await ServiceEngine.open(ServiceConfig(url=service.url), published=False)  # whose requests are named alike
        long = msgspec.structs.replace(request, sampling=SamplingParams(max_new_tokens=20, ignore_eos=True))
        found = await asyncio.gather(*(each.generate(long) for each in (engine, other)))
        assert [each.request_id for each in found] == ["a", "a"] and found[1].completions[0].weight_spans[0].version == 0
        running = asyncio.ensure_future(engine.generate(long))
        await asyncio.sleep(0)
        assert await engine.abort("a") and (await running).request_id == "a"
        await engine.close()
        await other.close()

    asyncio.run(main())
