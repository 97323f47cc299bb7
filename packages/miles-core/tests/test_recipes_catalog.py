"""Packaged recipes: they resolve, their data has two disjoint halves, their model is the one they describe."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from miles_core.config.load import load_config
from miles_core.data.load import load_rows
from miles_core.recipes import addition, sorting
from miles_core.recipes.catalog import packaged_model, recipe_command, recipe_files, recipe_folders, recipe_for, recipe_summary


@pytest.mark.parametrize("name", recipe_files(plugins=()))
def test_recipes_resolve_and_their_splits_are_disjoint(name: str) -> None:
    config = load_config(name)
    assert config.run.name == name and recipe_summary(name) and recipe_command(name) in ("train", "sft")
    train = {row.columns["prompt"] for spec in config.data.train for row in load_rows(spec)}
    held_out = {row.columns["prompt"] for spec in config.data.eval for row in load_rows(spec)}
    shown = {shot.prompt for shot in config.data.fewshot}
    assert train and held_out and not train & held_out and not shown & (train | held_out)


def test_the_quickstart_model_is_the_one_its_recipe_describes() -> None:
    from miles_core.models import load_model, random_shape

    loaded = load_model(load_config("quickstart"), lambda line: None)
    described = random_shape(load_config("quickstart-sft").model, loaded.tokenizer)
    assert loaded.decoder.config == described
    assert sum(p.numel() for p in loaded.decoder.parameters()) < 500_000
    folder = packaged_model("recipe:quickstart")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2 << 20
    with pytest.raises(ValueError, match="recipe:quickstart"):
        packaged_model("recipe:other")


def test_sorting_problems() -> None:
    rows = list(sorting.problems(size=2000, seed=5, careless=0.5))
    assert len({row["prompt"] for row in rows}) == 2000
    assert rows[:10] == list(sorting.problems(size=10, seed=5, careless=0.5))
    assert rows[:10] != list(sorting.problems(size=10, seed=6, careless=0.5))
    for row in rows:
        digits = row["prompt"].removesuffix("=")
        assert row["label"] == "".join(sorted(digits)) and 4 <= len(digits) <= 6 and not sorting.is_held_out(digits)
        assert row["completion"] in (row["label"], "".join(sorted(digits[:-2])) + digits[-2:])
    wrong = sum(row["completion"] != row["label"] for row in rows) / 2000
    assert 0.35 < wrong < 0.5
    assert all(row["completion"] == row["label"] for row in sorting.problems(size=50, split="eval"))
    for bad, said in (
        ({"split": "test"}, 'split = "test" must be train or eval'),
        ({"min_length": 1}, "got 1 and 6"),
        ({"min_length": 7}, "got 7 and 6"),
        ({"size": 10**9}, "more than the .* problems to be had for split train"),
    ):
        with pytest.raises(ValueError, match=said):
            list(sorting.problems(**bad))  # type: ignore[arg-type]


def test_addition_problems_cover_the_table() -> None:
    train, held_out = list(addition.problems()), list(addition.problems(split="eval"))
    assert len(train) + len(held_out) == 96 and 20 <= len(held_out) <= 35
    for row in train + held_out:
        a, b = row["prompt"].removesuffix("=").split("+")
        assert int(a) + int(b) == int(row["label"])
    with pytest.raises(ValueError, match="train or eval"):
        list(addition.problems(split="x"))


def test_other_packages_bring_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "brought_recipes"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "mine.toml").write_text("# Mine\n[run]\nnum_steps = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    plugin = EntryPoint("mine", "brought_recipes", "miles.core.recipes")
    assert recipe_files([plugin])["mine"] == package / "mine.toml" and "mine" not in recipe_files([])
    (package / "quickstart.toml").write_text("# Not mine\n")
    with pytest.raises(ValueError, match="'quickstart' exists twice"):
        recipe_files([plugin])
    with pytest.raises(ValueError, match="no package 'absent_recipes'"):
        recipe_folders([EntryPoint("gone", "absent_recipes", "miles.core.recipes")])


def test_sft_takes_the_warm_up_of_a_recipe() -> None:
    assert recipe_for("sft", "quickstart") == "quickstart-sft" and recipe_for("train", "quickstart") == "quickstart"
    assert recipe_for("sft", "smollm2") == "smollm2" and recipe_for("sft", "my.toml") == "my.toml"
