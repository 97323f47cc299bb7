"""Full and delta updates on disk: bit-exact, chained, small for small changes, and damaged ones refused by name."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from miles_rollout.weights.offer import layout
from miles_rollout.weights.stage import make_manifest, stream_views
from miles_rollout.weights.store import WeightStore, to_stream, weights_digest
from miles_rollout.wire import WeightManifest

Weights = dict[str, Tensor]


def draw(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(400, 300, generator=generator).bfloat16(),
        "b": torch.randn(33, generator=generator),
        "empty": torch.empty(0, 3),
        "c": torch.randint(0, 256, (7, 5), generator=generator, dtype=torch.uint8),
    }


def stepped(weights: Weights, share: float, seed: int) -> Weights:
    """What a small learning rate does to bf16: a few values move by one in their last bit."""
    generator = torch.Generator().manual_seed(seed)
    new = {name: tensor.clone() for name, tensor in weights.items()}
    moved = torch.rand(new["a"].shape, generator=generator) < share
    new["a"].view(torch.int16)[moved] += 1
    return new


def stated(weights: Weights, version: int) -> tuple[WeightManifest, Tensor]:
    manifest = make_manifest(weights.items(), version=version, contract_digest="x")
    return manifest, to_stream(manifest, weights.values())[0]


def digest(weights: Weights) -> str:
    return weights_digest(stated(weights, 0)[0])


def filled(root: Path) -> tuple[WeightStore, dict[int, Weights]]:
    """Versions 1 (full), 2 and 4 (deltas)."""
    store, versions = WeightStore(root), {1: draw(1)}
    versions[2] = stepped(versions[1], 0.02, 2)
    versions[4] = stepped(versions[2], 0.02, 3)
    store.write_full(*stated(versions[1], 1))
    store.write_delta(*stated(versions[2], 2), *stated(versions[1], 1))
    store.write_delta(*stated(versions[4], 4), *stated(versions[2], 2))
    return store, versions


@pytest.mark.parametrize("held", [0, 1, 2])
def test_a_reader_comes_to_the_newest_version_from_wherever_it_is(held: int, tmp_path: Path) -> None:
    store, versions = filled(tmp_path)
    own = versions.get(held, draw(9))
    manifest, stream = store.load(4, held, own, digest(own))
    views = stream_views(manifest, layout(manifest), stream)
    assert all(torch.equal(views[name], tensor) for name, tensor in versions[4].items())
    assert manifest == stated(versions[4], 4)[0]


def test_a_small_step_makes_a_small_delta_and_an_equal_tensor_none(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    full, delta = store.read(1), store.read(2)
    assert delta.size_bytes < 0.1 * full.size_bytes
    assert [changed.name for changed in delta.changed] == ["a"]


def test_a_stale_base_is_refused_though_its_version_fits(tmp_path: Path) -> None:
    store, versions = filled(tmp_path)
    other = stepped(versions[2], 0.001, 77)
    with pytest.raises(ValueError, match=r"delta of version 4 applies to other weights of version 2 than .*a stale base"):
        store.load(4, 2, other, digest(other))
    with pytest.raises(ValueError, match="version 4 is a delta and this engine cannot show what it holds|no weight update"):
        WeightStore(tmp_path / "nowhere").load(4, 2, None, "")


def test_damage_gaps_and_twice_the_same_version_are_named(tmp_path: Path) -> None:
    store, versions = filled(tmp_path)
    own = draw(9)
    with pytest.raises(ValueError, match="000004-delta: there already"):
        store.write_delta(*stated(versions[4], 4), *stated(versions[2], 2))
    data = tmp_path / "000002-delta" / "data.bin"
    good = data.read_bytes()
    data.write_bytes(good[:9] + bytes([good[9] ^ 1]) + good[10:])
    with pytest.raises(ValueError, match=r"000002-delta.data.bin: damaged"):
        store.load(4, 0, own, digest(own))
    data.write_bytes(good)
    facts = tmp_path / "000002-delta" / "update.json"
    whole = facts.read_bytes()
    other = msgspec.structs.replace(store.read(2), base_digest="0" * 64)
    facts.write_bytes(msgspec.json.encode(other))
    with pytest.raises(ValueError, match="the delta of version 2 applies to other weights than version 1 has"):
        store.load(4, 0, own, digest(own))
    facts.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=r"update.json: cannot be read"):
        store.load(4, 0, own, digest(own))
    (tmp_path / "000002-delta").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="no weight update of version 2"):
        store.load(4, 0, own, digest(own))


def test_what_a_crash_left_is_not_a_link_and_old_links_are_pruned(tmp_path: Path) -> None:
    store, versions = filled(tmp_path)
    (tmp_path / ".tmp-000005-delta").mkdir()
    assert list(store.links()) == [1, 2, 4]
    store.write_full(*stated(versions[4], 7))
    store.prune(4)
    assert list(store.links()) == [1, 2, 4, 7]
    store.prune(7)
    assert list(store.links()) == [7]
