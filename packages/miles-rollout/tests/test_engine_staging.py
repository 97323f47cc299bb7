"""Weights into the ranks of a divided engine, a bucket at a time: the bits of one process, all or nothing, and little memory."""

from __future__ import annotations

import asyncio
import queue
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from test_engine_parallel import GLM, MOE, WIDE
from torch.overrides import TorchFunctionMode

from miles_kernels.checksum import as_numbers
from miles_kernels.nn.checkpoint import random_decoder, save_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import Decoder
from miles_kernels.nn.parallel import empty_shard, fold_decoder, shard_tensors
from miles_rollout.engines.embedded import ranks, staging
from miles_rollout.engines.embedded.core import EngineCore
from miles_rollout.engines.embedded.factory import stored_weights
from miles_rollout.engines.embedded.feed import feed
from miles_rollout.engines.embedded.lead import LARGE_BYTES, RankCore
from miles_rollout.engines.embedded.staging import Staging
from miles_rollout.weights.group import BroadcastGroup
from miles_rollout.weights.offer import WINDOW, DiskOffer, GroupInvitation, WeightUpdate, layout
from miles_rollout.weights.receiver import WeightReceiver
from miles_rollout.weights.stage import make_manifest, stage
from miles_rollout.weights.store import WeightStore
from miles_rollout.wire import WeightManifest

RANKS = 2
BUCKET = 1 << 15
SHAPES = {"dense": WIDE, "moe": MOE, "glm": GLM, "shared": replace(GLM, num_key_value_heads=1)}
Pairs = list[tuple[str, torch.Tensor]]


class Core:
    """A rank, as far as weights concern it; what the leader does the others do, told through queues."""

    def __init__(self, decoder: Decoder, group: Any, rank: int, others: list[queue.Queue[Any]]) -> None:
        self.decoder, self.group, self.rank, self.others = decoder, group, rank, others
        self.staging: Staging | None = None
        self.refused: list[str] = []
        self.state = (1, 2, 3)
        self.spoils: int | None = None
        """Number of a tensor of which this rank finds another hash."""

    def begin_update(self, manifest: WeightManifest) -> Staging:
        self._tell("begin_update", manifest)
        self.staging = Staging(manifest, self.decoder, self.group, self.rank)
        return self.staging

    def take_bucket(self, numbers: tuple[int, ...]) -> None:
        self._tell("take_bucket", numbers)
        assert self.staging is not None
        self.staging.take(numbers)

    def drop_update(self) -> None:
        self._tell("drop_update")
        self.staging = None

    def finish_update(self, stated: tuple[str, ...]) -> None:
        self._tell("finish_update", stated)
        staged, self.staging = self.staging, None
        assert staged is not None
        if self.spoils is not None:
            staged.found[self.spoils] = "f" * 16
        staged.verify(stated, self.state)
        staged.put(self.decoder)

    def _tell(self, name: str, *arguments: Any) -> None:
        for other in self.others:
            other.put((name, arguments))

    def follow(self, inbox: queue.Queue[Any]) -> None:
        while (told := inbox.get(timeout=60)) is not None:
            try:
                getattr(self, told[0])(*told[1])
            except (ValueError, MemoryError, RuntimeError) as error:
                self.refused.append(str(error))


def divided(shape: DecoderConfig, work: Callable[[list[Core]], None], *, within: Any = None) -> list[Core]:
    """Two ranks in two threads of this process; `work` is the leader's. `within` is entered in the other's thread."""
    store = ranks.make_store(0, leads=True, deadline_s=60)
    inbox: queue.Queue[Any] = queue.Queue()
    cores: dict[int, Core] = {}
    contract = random_decoder(replace(shape, num_hidden_layers=1, mlp_only_layers=(), first_k_dense_replace=0), 0).contract
    failed: list[BaseException] = []
    both = threading.Barrier(RANKS, timeout=60)

    def rank(number: int) -> None:
        try:
            own = store if number == 0 else ranks.make_store(store.port, leads=False, deadline_s=60)
            group = ranks.make_group(own, number, RANKS, torch.device("cpu"), 60)
            local = empty_shard(shape, contract, group, rank=number, device="cpu")
            local.load_hf_state(
                shard_tensors(random_decoder(shape, 0).hf_state(), number, RANKS, shape.num_experts, shape.head_dim)
            )
            cores[number] = Core(local, group, number, [inbox] if number == 0 else [])
            both.wait()
            if number == 0:
                try:
                    work([cores[0], cores[1]])
                finally:
                    inbox.put(None)
            else:
                with within(local) if within else torch.inference_mode():
                    cores[1].follow(inbox)
        except BaseException as error:
            failed.append(error)
            both.abort()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if failed:
        raise failed[0]
    return [cores[0], cores[1]]


def new_weights(shape: DecoderConfig) -> tuple[Pairs, WeightManifest]:
    pairs = [(name, tensor.clone()) for name, tensor in random_decoder(shape, 1).hf_state()]
    return pairs, make_manifest(pairs, version=1, contract_digest="d")


def holds(core: Core, shape: DecoderConfig, seed: int) -> bool:
    expected = dict(shard_tensors(random_decoder(shape, seed).hf_state(), core.rank, RANKS, shape.num_experts, shape.head_dim))
    found = dict(core.decoder.hf_state())
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], expected[name]) for name in found)


class Windows:
    """The stream of a manifest in windows; `brings` its checksums, or none."""

    def __init__(self, manifest: WeightManifest, pairs: Pairs, seals: list[str]) -> None:
        self.stream, self._seals = stage(manifest, pairs).stream, seals

    def windows(self) -> Iterator[tuple[int, torch.Tensor]]:
        for start in range(0, len(self.stream), 3 * WINDOW):
            window = self.stream[start : start + 3 * WINDOW].clone()
            yield start, window
            window.zero_()  # the next one lies there

    def seals(self) -> torch.Tensor:
        return as_numbers(self._seals)


class Pieces(Windows):
    windows = None  # type: ignore[assignment]

    def pieces(self) -> Iterator[tuple[int, torch.Tensor]]:
        return Windows.windows(self)


class Spans:
    device = torch.device("cpu")

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def addresses(self) -> tuple[int, ...]:
        return tuple(tensor.data_ptr() for _, tensor in self.pairs)


def unsealed(manifest: WeightManifest) -> tuple[WeightManifest, list[str]]:
    bare = [msgspec.structs.replace(spec, hash="") for spec in manifest.tensors]
    return msgspec.structs.replace(manifest, tensors=tuple(bare)), [spec.hash for spec in manifest.tensors]


@pytest.mark.parametrize("brought", ["tensors", "windows", "pieces", "spans"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_rank_gets_its_part_of_what_arrives(monkeypatch, name: str, brought: str):
    """In buckets far smaller than the model, whichever way it comes: the bits of a part of the whole."""
    monkeypatch.setattr(staging, "BUCKET_BYTES", BUCKET)
    shape, numbers = SHAPES[name], []
    pairs, manifest = new_weights(shape)
    bare, seals = unsealed(manifest)
    shuffled = random.Random(2).sample(pairs, len(pairs))
    source: Any = {
        "tensors": (manifest, iter(shuffled)), "spans": (manifest, Spans(pairs)),
        "windows": (bare, Windows(manifest, pairs, seals)), "pieces": (bare, Pieces(manifest, pairs, seals)),
    }[brought]  # fmt: skip

    def work(cores: list[Core]) -> None:
        numbers.append(0)

        def call(run: Callable[[Any], Any]) -> Any:
            numbers[0] += 1
            assert all(holds(core, shape, 0) for core in cores[:1]), "until the end the old weights serve"
            return run(cores[0])

        cores[0].finish_update(feed(source[0], source[1], call))

    cores = divided(shape, work)
    assert all(holds(core, shape, 1) for core in cores) and not cores[1].refused
    assert numbers[0] > sum(t.nbytes for _, t in pairs) / (2 * BUCKET), "many buckets"


def test_a_broadcast_is_taken_in_pieces(monkeypatch):
    """Through a real group: the pieces are used again while the next one travels, and the checksums come last."""
    monkeypatch.setattr(staging, "BUCKET_BYTES", BUCKET)
    pairs, manifest = new_weights(MOE)
    bare, _ = unsealed(manifest)
    store = BroadcastGroup.store("127.0.0.1", 0, 60.0)
    invitations = [
        GroupInvitation(name="w", host="127.0.0.1", port=store.port, rank=rank, size=2, deadline_s=60.0) for rank in range(2)
    ]

    def publish() -> None:
        group = BroadcastGroup.listen(invitations[0], store)
        group.send(layout(manifest), [tensor for _, tensor in pairs], 2 * WINDOW, lambda: False)
        group.close()

    publisher = threading.Thread(target=publish)

    def work(cores: list[Core]) -> None:
        publisher.start()
        group = BroadcastGroup.join(invitations[1])
        cores[0].finish_update(feed(bare, group.source(bare, 2 * WINDOW), lambda run: run(cores[0])))
        group.close()

    cores = divided(MOE, work)
    publisher.join(60)
    assert all(holds(core, MOE, 1) for core in cores) and not publisher.is_alive()


def test_an_engine_that_is_divided_takes_whole_updates_from_a_disk_and_no_deltas(tmp_path):
    pairs, manifest = new_weights(WIDE)
    store, first = WeightStore(tmp_path), stage(manifest, pairs).stream
    store.write_full(manifest, first)
    later = flipped(pairs)
    second = make_manifest(later, version=2, contract_digest="d")
    store.write_delta(second, stage(second, later).stream, manifest, first)
    taken: list[int] = []

    class Divided:
        device = torch.device("cpu")
        version = 0

        def info(self) -> Any:
            return SimpleNamespace(weight_version=self.version)

        def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
            raise ValueError("the weights are divided over 2 processes; send a full update")
            yield

        async def update_weights(self, manifest: WeightManifest, tensors: Any) -> None:
            stage(manifest, tensors)
            taken.append(manifest.version)
            self.version = manifest.version

    receiver = WeightReceiver(Divided())  # type: ignore[arg-type]
    offers = [WeightUpdate(manifest=m, offer=DiskOffer(directory=str(tmp_path), version=m.version)) for m in (manifest, second)]
    asyncio.run(receiver.update(offers[0]))
    (tmp_path / "000001-full").rename(tmp_path / "elsewhere")  # else the whole way from there is taken
    with pytest.raises(ValueError, match="no weight update of version 1; there are"):
        asyncio.run(receiver.update(offers[1]))
    assert taken == [1]


def test_an_error_of_weights_that_are_shown_is_not_taken_for_weights_that_are_divided(monkeypatch, tmp_path):
    def fails(manifest: WeightManifest) -> str:
        raise ValueError("no digest")

    class Shows:
        device = torch.device("cpu")

        def info(self) -> Any:
            return SimpleNamespace(weight_version=0)

        def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
            yield "a", torch.zeros(1)

    monkeypatch.setattr("miles_rollout.weights.receiver.weights_digest", fails)
    manifest = make_manifest(Shows().weights(), version=1, contract_digest="d")
    with pytest.raises(ValueError, match="no digest"):
        WeightReceiver(Shows())._from_disk(manifest, DiskOffer(directory=str(tmp_path), version=1))  # type: ignore[arg-type]


def flipped(pairs: Pairs) -> Pairs:
    spoiled = [(name, tensor.clone()) for name, tensor in pairs]
    spoiled[-1][1].view(torch.int32).flatten()[3] ^= 1
    return spoiled


SPOILED: dict[str, tuple[Callable[[Pairs], Pairs], str]] = {
    "a flipped bit": (flipped, "hashes to .*, the publisher states"),
    "missing": (lambda pairs: pairs[1:], "1 tensors did not arrive: model.embed_tokens.weight"),
    "renamed": (lambda pairs: [("model.other", pairs[0][1]), *pairs[1:]], "tensor model.other is not in the manifest"),
    "one more": (lambda pairs: [*pairs, ("more", pairs[0][1])], "tensor more is not in the manifest"),
    "twice": (lambda pairs: [*pairs, pairs[0]], "arrived twice"),
    "another shape": (lambda pairs: [(pairs[0][0], pairs[0][1].t()), *pairs[1:]], "arrived as float32"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_refused_leaves_the_old_weights_on_every_rank(monkeypatch, name: str):
    monkeypatch.setattr(staging, "BUCKET_BYTES", BUCKET)
    spoil, words = SPOILED[name]
    pairs, manifest = new_weights(MOE)

    def work(cores: list[Core]) -> None:
        with pytest.raises(ValueError, match=words):
            feed(manifest, spoil(pairs), lambda run: run(cores[0]))
        assert cores[0].staging is None and holds(cores[0], MOE, 0)
        cores[0].finish_update(feed(manifest, pairs, lambda run: run(cores[0])))  # and sent again it goes through

    cores = divided(MOE, work)
    assert all(holds(core, MOE, 1) for core in cores)


def test_other_checksums_behind_the_bytes_are_refused():
    pairs, manifest = new_weights(WIDE)
    bare, seals = unsealed(manifest)
    source = Windows(manifest, pairs, [*seals[:-1], "0" * 16])

    def work(cores: list[Core]) -> None:
        with pytest.raises(ValueError, match=f"{manifest.tensors[-1].name} hashes to .*, the publisher states {'0' * 16}"):
            feed(bare, source, lambda run: run(cores[0]))
        with pytest.raises(ValueError, match="states no checksum of model.embed_tokens.weight"):
            feed(bare, pairs, lambda run: run(cores[0]))

    assert all(holds(core, WIDE, 0) for core in divided(WIDE, work))


def test_a_rank_that_got_other_bytes_refuses_for_all():
    pairs, manifest = new_weights(WIDE)

    def work(cores: list[Core]) -> None:
        cores[1].spoils = 5
        stated = feed(manifest, pairs, lambda run: run(cores[0]))
        with pytest.raises(ValueError, match=r"ranks \[1\] found other hashes"):
            cores[0].finish_update(stated)

    cores = divided(WIDE, work)
    assert all(holds(core, WIDE, 0) for core in cores)
    assert f"{manifest.tensors[5].name} hashes to {'f' * 16} on rank 1" in cores[1].refused[0]


def test_a_rank_without_memory_to_hash_refuses_for_all_and_lives(monkeypatch):
    pairs, manifest = new_weights(WIDE)
    hashes, leads = staging.tensor_hashes, threading.current_thread

    def work(cores: list[Core]) -> None:
        leader = leads()

        def full(tensors: Any) -> list[str]:
            if leads() is not leader:
                raise torch.OutOfMemoryError("no memory")
            return hashes(tensors)

        with monkeypatch.context() as patch:
            patch.setattr(staging, "tensor_hashes", full)
            stated = feed(manifest, pairs, lambda run: run(cores[0]))
            with pytest.raises(ValueError, match=r"ranks \[1\] had no memory to hash what arrived; lower engine.kv_memory_bytes"):
                cores[0].finish_update(stated)
        assert holds(cores[0], WIDE, 0)
        cores[0].finish_update(feed(manifest, pairs, lambda run: run(cores[0])))

    cores = divided(WIDE, work)
    assert all(holds(core, WIDE, 1) for core in cores)
    assert len(cores[1].refused) == 1 and "ranks [1] had no memory" in cores[1].refused[0]


def test_memory_is_let_go_whoever_holds_the_staging():
    _, manifest = new_weights(WIDE)

    def work(cores: list[Core]) -> None:
        staged = cores[0].begin_update(manifest)
        room, flat = weakref.ref(staged.room.untyped_storage()), weakref.ref(staged._flat.untyped_storage())
        assert room() is not None and flat() is not None
        staged.forget()
        assert staged.room.nbytes == staged._flat.nbytes == 0

    divided(WIDE, work)


def test_ranks_that_computed_different_things_take_no_weights():
    pairs, manifest = new_weights(WIDE)

    def work(cores: list[Core]) -> None:
        cores[1].state = (1, 2, 4)
        with pytest.raises(RuntimeError, match="the ranks have computed different things"):
            cores[0].finish_update(feed(manifest, pairs, lambda run: run(cores[0])))

    assert all(holds(core, WIDE, 0) for core in divided(WIDE, work))


def test_no_room_is_no_room_for_all():
    pairs, manifest = new_weights(WIDE)
    huge = msgspec.structs.replace(manifest.tensors[-1], shape=(1 << 50,))

    def work(cores: list[Core]) -> None:
        with pytest.raises(MemoryError, match=r"ranks \[0, 1\] have no room for \d+ bytes of staged weights and \d+ of a bucket"):
            feed(msgspec.structs.replace(manifest, tensors=(*manifest.tensors[:-1], huge)), pairs, lambda run: run(cores[0]))

    cores = divided(WIDE, work)
    assert "have no room" in cores[1].refused[0] and all(holds(core, WIDE, 0) for core in cores)


class Counting(TorchFunctionMode):
    """Bytes of all storages that calls of torch return in this thread and that are alive; the most there were."""

    def __init__(self, besides: Decoder | None = None) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.seen = {each.untyped_storage()._cdata: 0 for each in besides.parameters()} if besides is not None else {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            with torch._C.DisableTorchFunction():
                counts = isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu"
            if counts:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen[storage._cdata] = storage.nbytes()
                    self.alive += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata)
                self.peak = max(self.peak, self.alive)
        return out

    def _gone(self, key: int) -> None:
        self.alive -= self.seen.pop(key, 0)


def test_a_rank_takes_room_for_its_part_and_a_bucket(monkeypatch):
    monkeypatch.setattr(staging, "BUCKET_BYTES", BUCKET)
    pairs, manifest = new_weights(MOE)
    whole, sizes = layout(manifest).total_bytes, []
    counting: list[Counting] = []

    def count(decoder: Decoder) -> Counting:
        counting.append(Counting(besides=decoder))
        return counting[0]

    def work(cores: list[Core]) -> None:
        stated = feed(manifest, pairs, lambda run: run(cores[0]))
        other = cores[1].staging
        assert other is not None
        sizes.extend((other.part_bytes, other.room_bytes))
        cores[0].finish_update(stated)

    assert all(holds(core, MOE, 1) for core in divided(MOE, work, within=count))
    part, room = sizes
    assert part < 0.65 * whole and room <= max(BUCKET, 256 + max(tensor.nbytes for _, tensor in pairs))
    assert part + room <= counting[0].peak <= part + room + 4096, "what is counted beside them are a few numbers"
    control = Counting()
    with control:
        stage(manifest, pairs)
    assert control.peak >= whole > part + room, "an engine of one process stages the whole"


@pytest.mark.parametrize("size", [LARGE_BYTES, LARGE_BYTES - 1])
def test_a_large_part_goes_back_to_the_gpu_however_the_update_ends(monkeypatch, size: int):
    class Part:
        manifest = SimpleNamespace(version=3)
        part_bytes = size

        def verify(self, stated: Any, state: Any) -> None:
            calls.append("verify")
            if stated != ("a",):
                raise ValueError("other hashes")

        def forget(self) -> None:
            calls.append("forget")

    calls: list[str] = []
    core = RankCore.__new__(RankCore)
    core.released = set()
    monkeypatch.setattr(EngineCore, "_land", lambda self: calls.append("land"))
    monkeypatch.setattr(EngineCore, "settle", lambda self: calls.append("settle") or [])
    monkeypatch.setattr(EngineCore, "swap_weights", lambda self, staged, version: calls.append("swap") or [])
    monkeypatch.setattr(EngineCore, "_give_back", lambda self: calls.append("give back"))
    monkeypatch.setattr(RankCore, "state", lambda self: (0, 0, 0))
    end = ["forget", "give back"] if size == LARGE_BYTES else ["forget"]
    core._staging = Part()  # type: ignore[assignment]
    assert core.finish_update(("a",)) == [] and calls == ["land", "verify", "settle", "swap", *end]
    calls.clear()
    core._staging = Part()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="other hashes"):
        core.finish_update(("b",))
    assert calls == ["land", "verify", *end], "what is ready stays for the next call"
    calls.clear()
    core._staging = Part()  # type: ignore[assignment]
    core.drop_update()
    core.drop_update()
    assert calls == end


@pytest.mark.parametrize("is_cuda", [True, False])
def test_released_weights_take_the_tables_of_checksums_along(monkeypatch, is_cuda: bool):
    calls: list[str] = []
    core: Any = EngineCore.__new__(EngineCore)
    core.released, core._flights = set(), []
    core._scheduler = SimpleNamespace(num_running=0)
    core._runner = SimpleNamespace(graphs=None)
    core._decoder = SimpleNamespace(
        embed_tokens=SimpleNamespace(is_cuda=is_cuda), thaw_quantized=lambda: None, parameters=lambda: iter(())
    )
    monkeypatch.setattr("miles_rollout.engines.embedded.core.forget_tables", lambda: calls.append("tables"))
    monkeypatch.setattr(EngineCore, "_give_back", lambda self: calls.append("give back"))
    core.release(["cuda_graph"])
    core.release(["weights"])
    assert calls == ["give back", *(["tables"] if is_cuda else []), "give back"]


def test_stored_weights_are_read_one_by_one_and_what_does_not_fit_is_named(tmp_path):
    save_decoder(random_decoder(MOE, 3), tmp_path)
    shell = fold_decoder(Decoder(MOE, None, dtype=torch.float32, device="meta"))
    assert {name: tensor.sum().item() for name, tensor in stored_weights(tmp_path, shell)} == {
        name: tensor.sum().item() for name, tensor in random_decoder(MOE, 3).hf_state()
    }
    other = Decoder(replace(MOE, num_hidden_layers=3, vocab_size=64), None, dtype=torch.float32, device="meta")
    with pytest.raises(ValueError, match=r"weights do not fit.*missing model.layers.2.*misshaped model.embed_tokens.weight: \["):
        list(stored_weights(tmp_path, other))
    less = Decoder(replace(MOE, num_hidden_layers=1, mlp_only_layers=()), None, dtype=torch.float32, device="meta")
    with pytest.raises(ValueError, match=r"unexpected model.layers.1"):
        list(stored_weights(tmp_path, less))
