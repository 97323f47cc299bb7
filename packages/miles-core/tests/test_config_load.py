"""Configuration: precedence, literals, every message with its place, round trip through TOML."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from miles_core.config.dump import config_toml, differences, read_config
from miles_core.config.load import ConfigError, Override, literal, load_config, parse_overrides
from miles_core.config.reference import reference, settings
from miles_core.config.schema import RunConfig
from miles_core.config.toml_lines import key_lines, line_of

MODEL = '[model]\npath = "somewhere"\n'


def problems(path: Path, text: str, *flags: str) -> tuple[str, ...]:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), flags)
    return caught.value.problems


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text(MODEL + "[optimizer]\nlr = 1e-3\n[rollout]\ngroup_size = 3\n")
    flags = ["--optimizer.lr", "2e-3", "--optimizer.lr=3e-3", "--eval.pass-at", "[1]"]
    config = load_config(str(file), flags, extra=[Override(("run", "num_steps"), 7, "7")])
    assert (config.optimizer.lr, config.rollout.group_size, config.run.num_steps, config.eval.pass_at) == (3e-3, 3, 7, (1,))
    assert config.run.name == "my"
    with pytest.raises(ValidationError):
        config.run.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("1e-4", 1e-4), ("true", True), ("[1, 2]", [1, 2]), ('"3"', "3"), ("plain text", "plain text"), ("", ""),
     ("-1", -1),     ("a.jsonl@[0:10]", "a.jsonl@[0:10]"), ("1\nrun.x = 2", "1\nrun.x = 2"), ("{a = 1}", {"a": 1})],
)  # fmt: skip
def test_literals(text: str, value: object) -> None:
    assert literal(text) == value and type(literal(text)) is type(value)


@given(st.text(max_size=20))
def test_a_literal_is_never_an_error_and_reads_back(text: str) -> None:
    value = literal(text)
    assert value == text if isinstance(value, str) and not text.strip().startswith(('"', "'")) else True


def test_a_number_where_text_is_wanted_is_text(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(MODEL)
    config = load_config(str(tmp_path / "m.toml"), ["--run.name", "007"])
    assert config.run.name == "007"


def test_all_problems_at_once_each_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    text = MODEL + '[optimizer]\nlr = "fast"\nbetta = 1\n\n[[data.fewshot]]\nprompt = "a"\n[rolout]\nx = 1\n'
    found = problems(file, text, "--run.seed", "-4", "--sampling.top_p=7")
    lines = text.splitlines()

    def at(line: str) -> str:
        return f"{file}:{lines.index(line) + 1}: "

    assert len(found) == 6
    assert any(p.startswith(at('lr = "fast"') + "optimizer.lr") and "'fast'" in p for p in found)
    assert any(p.startswith(at("betta = 1") + 'optimizer.betta: unknown key (did you mean "betas"?)') for p in found)
    assert any(p.startswith(at("[[data.fewshot]]") + "data.fewshot.0.answer: is required") for p in found)
    assert any(p.startswith(at("[rolout]")) and 'did you mean "rollout"' in p for p in found)
    assert any(p.startswith("--run.seed: ") for p in found)
    assert any(p.startswith("--sampling.top_p: ") and "top_p=7" in p for p in found)


def test_flags_that_are_no_settings() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides(["--steps", "3", "--optimizer.lr"])
    assert len(caught.value.problems) == 3  # --steps, its value, and the missing value
    with pytest.raises(ConfigError, match="value is missing"):
        parse_overrides(["--a.b", "--c.d", "1"])
    assert parse_overrides(["--sampling.top_k", "-1"])[0].value == -1


def test_a_setting_below_a_value_is_refused(tmp_path: Path) -> None:
    found = problems(tmp_path / "m.toml", MODEL, "--model.path.deeper", "1")
    assert any("model.path is a value, not a table" in p for p in found)


def test_rooms_must_agree(tmp_path: Path) -> None:
    assert any("data.eval" in p for p in problems(tmp_path / "m.toml", MODEL + "[eval]\nevery = 5\n"))
    again = '[draft]\nmodel = "mtp"\ncompare = ["none"]\n[rollout]\nproducer = "mine.py:play"\n'
    assert any("draft.compare makes every rollout again" in p for p in problems(tmp_path / "m.toml", MODEL + again))
    assert any("model: is required" in p and "exactly one of" in p for p in problems(tmp_path / "n.toml", ""))
    both = MODEL + 'source = "a==1"\n'
    assert any("path and source are set" in p for p in problems(tmp_path / "o.toml", both))
    assert any("name the version" in p for p in problems(tmp_path / "p.toml", '[model]\nsource = "a"\n'))
    assert any("no folder name" in p for p in problems(tmp_path / "q.toml", MODEL, "--run.name", "../up"))


def test_no_such_file_or_recipe() -> None:
    with pytest.raises(ConfigError, match='did you mean "smollm2"'):
        load_config("smolm2")
    with pytest.raises(ConfigError, match="no such file"):
        load_config("nowhere/x.toml")


def test_toml_round_trip(tmp_path: Path) -> None:
    config = load_config("smollm2", ["--reward.options.strip", "true", "--sampling.stop", '["\\n", "é\\"]"]'])
    text = config_toml(config)
    assert RunConfig.model_validate(tomllib.loads(text)) == config
    (tmp_path / "config.toml").write_text(text)
    assert read_config(tmp_path) == config
    changed = config.model_copy(update={"run": config.run.model_copy(update={"seed": 9})})
    assert differences(config, changed) == ["run.seed: 0 -> 9"]
    with pytest.raises(ValueError, match="no config.toml"):
        read_config(tmp_path / "absent")


def test_engine_section_mirrors_the_engine() -> None:
    from miles_core.config.engine import EngineConfig
    from miles_rollout.engines.embedded.config import EmbeddedConfig

    defaults = {name: getattr(EmbeddedConfig(), name) for name in EmbeddedConfig.__struct_fields__}
    assert EngineConfig().model_dump() == defaults
    assert EngineConfig(max_running=4, num_pages=3).embedded() == EmbeddedConfig(max_running=4, num_pages=3)
    with pytest.raises(ValidationError, match="multiple of 16"):
        EngineConfig(page_size=5)


def test_every_setting_is_documented() -> None:
    def undocumented(section: type) -> list[str]:
        return [name for name, field in section.model_fields.items() if not field.description]  # type: ignore[attr-defined]

    for name, field in RunConfig.model_fields.items():
        assert isinstance(field.annotation, type)
        assert undocumented(field.annotation) == [], name
        assert field.annotation.__doc__


def test_key_lines() -> None:
    text = 'top = 1\n[a.b]\nx = """\ny = 2\n"""\n"q.r" = 3\n[[c]]\nz = 1\n[[c]]\nz = 2\nd.e = 1\n[c.f]\ng = 1\n'
    lines = key_lines(text)
    assert lines[("top",)] == 1 and lines[("a", "b")] == 2 and lines[("a", "b", "x")] == 3 and ("a", "b", "y") not in lines
    assert lines[("c", 0, "z")] == 8 and lines[("c", 1, "z")] == 10 and lines[("c", 1, "d", "e")] == 11
    assert lines[("a", "b", "q.r")] == 6 and lines[("c", 1, "f", "g")] == 13
    assert line_of(lines, ("a", "b", "nothing")) == 2 and line_of(lines, ("zzz",)) is None


APART = ["--cluster.num_engines", "1"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sync.kind", "broadcast"], "is for engines in processes of their own"),
        ([*APART, "--sync.kind", "inprocess"], "puts trainer and engine into processes of their own"),
        ([*APART, "--sync.kind", "lent", "--cluster.layout", "disaggregated"], "needs trainer and engines on one GPU"),
        ([*APART, "--sync.kind", "lent", "--cluster.num_trainers", "2"], "lends the weights of a trainer of one process"),
    ],
)
def test_a_way_of_weights_that_does_not_fit_is_refused_before_anything_is_loaded(
    flags: list[str], words: str, tmp_path: Path
) -> None:
    found = problems(tmp_path / "my.toml", MODEL, *flags)
    assert len(found) == 1 and words in found[0], found


@pytest.mark.parametrize(
    "flags", [["--sync.kind", "inprocess"], [*APART, "--sync.kind", "lent"], [*APART, "--sync.kind", "broadcast"]]
)
def test_a_way_of_weights_that_fits_is_taken(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(MODEL)
    assert load_config(str(tmp_path / "my.toml"), flags).sync.kind == flags[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trainer.backend", "megatron"], "the megatron trainer does not fold its sums"),
        (["--model.precision", "fp8"], "float8 products are quantised by whole rows"),
        (["--cluster.kind", "ray"], "which Ray is not asked for"),
        (["--cluster.num_engines", "2"], "use cluster.layout disaggregated"),
        (["--engine.draft", "ngram"], "tensor_parallel=2 knows no drafts yet"),
    ],
)
def test_what_a_divided_engine_cannot_be_combined_with(tmp_path: Path, flags: list[str], message: str) -> None:
    found = problems(tmp_path / "my.toml", MODEL, "--engine.tensor_parallel", "2", *flags)
    assert any(message in problem for problem in found), found


def test_every_setting_is_explained_and_can_be_set(tmp_path: Path) -> None:
    found = settings()
    assert len({one.name for one in found}) == len(found) > 150
    assert [one.name for one in found if not one.text.strip()] == []
    for one in found:  # what is said of a default is TOML, and setting it by its flag is accepted
        if one.default and not one.name.startswith(("model.", "eval.reward.")):
            value = tomllib.loads(f"x = {one.default}")["x"]
            assert parse_overrides([f"--{one.name}", one.default])[0].value == value, one
    sections = reference(None, 100)
    assert all(f"[{name}]" in sections for name in RunConfig.model_fields) and max(map(len, sections.splitlines())) <= 100
    assert reference("optimizer.lr") == "--optimizer.lr  number = 1e-06  (at least 0.0)\n    Peak learning rate."
    assert '--algorithm.reduction  "token" | "sequence" | "constant" = "token"' in reference("[algorithm]")
    assert "--trainer.megatron.tp" in reference("trainer") and "--optimizer" not in reference("trainer.megatron")
    assert "--rollout.producer " in reference("environment")  # any word of an explanation
    with pytest.raises(ValueError, match='no setting mentions "optimzer.lrr"; near it: optimizer'):
        reference("optimzer.lrr")
