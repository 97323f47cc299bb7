"""Weight updates and admission, as far as they need no model."""

from __future__ import annotations

import random

import pytest
import torch

from miles_rollout.engine import EngineRefusal
from miles_rollout.engines.embedded.admission import Limits, check_request
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.weights import check_manifest, dtype_name, make_manifest, stage, swap
from miles_rollout.wire import GenerateRequest, SamplingParams

LIMITS = Limits(vocab_size=10, max_context=64, page_size=16, num_pages=3)


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(4, 6, generator=generator),
        "b.weight": torch.randn(5, generator=generator).bfloat16(),
        "scalar": torch.randn((), generator=generator),
    }


def held(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tuple(t.shape), dtype_name(t.dtype)) for name, t in tensors.items()}


def test_stage_and_swap_replace_every_bit():
    old, new = weights(random.randrange(10**6)), weights(random.randrange(10**6, 10**7))
    manifest = make_manifest(new.items(), version=3, contract_digest="mk1-x")
    check_manifest(manifest, held(old), version=2, contract_digest="mk1-x")
    staged = stage(manifest, iter(new.items()))
    assert all(staged[name].data_ptr() != new[name].data_ptr() for name in new)
    swap(old.items(), staged)
    assert all(torch.equal(old[name], new[name]) for name in new) and set(staged) == set(new)


def test_manifest_names_everything_wrong_at_once():
    old, new = weights(1), weights(2)
    del new["scalar"]
    new["c"] = torch.zeros(1)
    new["a.weight"] = torch.zeros(4, 7)
    new["b.weight"] = new["b.weight"].float()
    manifest = make_manifest(list(new.items()) + [("c", new["c"])], version=2, contract_digest="mk1-y")
    with pytest.raises(ValueError) as error:
        check_manifest(manifest, held(old), version=2, contract_digest="mk1-x")
    for part in (
        "version 2 does not grow",
        "mk1-y",
        "missing: scalar",
        "unexpected: c",
        "twice: c",
        "[4, 7]",
        "float32 [5]",
        "bfloat16 [5]",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t["a.weight"].view(torch.int32)[0, 0].bitwise_xor_(1), "a.weight hashes to"),
        (lambda t: t.pop("scalar"), "1 tensors did not arrive: scalar"),
        (lambda t: t.update(c=torch.zeros(1)), "c is not in the manifest"),
        (lambda t: t.update(scalar=torch.zeros(1)), "scalar arrived as float32 [1], the manifest says float32 []"),
        (lambda t: t.update(scalar=t["scalar"].double()), "scalar arrived as float64"),
    ],
)
def test_stage_refuses_what_the_manifest_does_not_promise(damage, message):
    new = weights(2)
    manifest = make_manifest(new.items(), version=1, contract_digest="")
    damage(new)
    with pytest.raises(ValueError) as error:
        stage(manifest, iter(new.items()))
    assert message in str(error.value)


def test_stage_refuses_a_tensor_that_comes_twice():
    new = weights(2)
    manifest = make_manifest(new.items(), version=1, contract_digest="")
    with pytest.raises(ValueError, match="scalar arrived twice"):
        stage(manifest, [*new.items(), ("scalar", new["scalar"])])


def request(ids: tuple[int, ...] = (1, 2), **options: object) -> GenerateRequest:
    sample_ids = options.pop("sample_ids", ())
    return GenerateRequest(request_id="r", input_ids=ids, sampling=SamplingParams(**options), sample_ids=sample_ids)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request(()), "input_ids is empty"),
        (request((1, 10)), "input_ids[1] = 10 is outside the vocabulary of 10"),
        (request((1, -1)), "input_ids[1] = -1"),
        (request(stop_token_ids=(11,)), "stop_token_ids[0] = 11"),
        (
            request((1,) * 60, max_new_tokens=5),
            "60 prompt tokens + max_new_tokens=5 = 65 exceed the context of 64; lower max_new_tokens to 4 or less",
        ),
        (request((1,) * 70, max_new_tokens=5), "shorten the prompt by at least 7 tokens"),
        (request((1,) * 40, max_new_tokens=10), "need 4 pages of 16 tokens, the KV cache has 3"),
        (request(max_new_tokens=4, n=2, sample_ids=(1,)), "sample_ids has 1 entries for n=2"),
        (request(max_new_tokens=4, n=1, sample_ids=(2**63,)), "must lie in 0..2^63-1"),
        (request(max_new_tokens=4, top_p=0.0), "top_p=0.0"),
        (GenerateRequest(request_id="r", input_ids=(1,), schema=2), "schema 2"),
    ],
)
def test_what_can_never_be_served_is_refused_with_the_numbers(bad: GenerateRequest, message: str):
    with pytest.raises(EngineRefusal) as error:
        check_request(bad, LIMITS)
    assert message in str(error.value) and str(error.value).startswith("request 'r'")


def test_what_just_fits_is_let_through():
    check_request(request((1,) * 40, max_new_tokens=9), LIMITS)
    check_request(request((1,) * 48, max_new_tokens=1), LIMITS)
    with pytest.raises(EngineRefusal):
        check_request(request((1,) * 48, max_new_tokens=2), LIMITS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_size": 8}, "page_size=8"),
        ({"page_size": 24}, "page_size=24"),
        ({"max_running": 0}, "max_running=0"),
        ({"num_pages": 0}, "num_pages=0"),
        ({"max_running": 100, "max_batched_tokens": 50}, "max_batched_tokens=50 must be at least max_running=100"),
    ],
)
def test_config_names_the_field(options: dict[str, int], message: str):
    with pytest.raises(ValueError) as error:
        EmbeddedConfig(**options).validate()
    assert message in str(error.value)


def test_pages_are_as_large_as_the_device_likes_them_unless_told():
    assert EmbeddedConfig().page_size_on("cpu") == 16 and EmbeddedConfig().page_size_on("cuda") == 64
    assert EmbeddedConfig(page_size=32).page_size_on("cpu") == EmbeddedConfig(page_size=32).page_size_on("cuda") == 32
