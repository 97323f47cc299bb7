"""Adapter to reasoning-gym (the one place that imports it): procedural prompts, and the scorer that belongs to each."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

from miles_core.data.record import DataError
from miles_core.imports import require

EXTRA = "gym"


def gym_rows(name: str, *, size: int = 500, seed: int = 0, **settings: Any) -> list[dict[str, Any]]:
    """`size` rows of one reasoning-gym dataset: prompt, label, and in metadata.gym what the scorer needs to find the entry.

    `settings` are the dataset's own configuration fields. Raises DataError naming unknown datasets and fields.
    """
    settings = {"size": size, "seed": seed, **settings}
    dataset = _dataset(name, _key(settings))
    reference = {"dataset": name, "settings": settings}
    return [
        {"prompt": entry["question"], "label": entry["answer"], "metadata": {"gym": {**reference, "index": index}}}
        for index, entry in enumerate(dataset[i] for i in range(len(dataset)))
    ]


def gym_score(answer: str | None, metadata: Mapping[str, Any], label: str | None) -> float:
    """The dataset's own score of `answer`, between 0 and 1.

    The entry is found through metadata.gym {dataset, settings, index} (rows of `gym:` sources), or is the metadata itself
    with `source_dataset`, as reasoning-gym writes it to files; then the label is its answer.
    """
    reference = metadata.get("gym")
    if reference is not None:
        dataset = _dataset(reference["dataset"], _key(reference["settings"]))
        entry = dataset[reference["index"]]
        if label is not None and entry["answer"] != label:
            raise ValueError(
                f"reasoning-gym now makes answer {entry['answer']!r} for entry {reference['index']} of "
                f"{reference['dataset']}, the row says {label!r}; use the version the rows were made with"
            )
    elif "source_dataset" in metadata:
        if label is None:
            raise ValueError("a reasoning-gym entry needs its answer as label")
        dataset = _dataset(metadata["source_dataset"], _key({}))
        entry = {"question": "", "answer": label, "metadata": dict(metadata)}
    else:
        raise ValueError('metadata has neither "gym" nor "source_dataset"; use a gym: source or keep reasoning-gym\'s metadata')
    return float(dataset.score_answer(answer, entry))


def _key(settings: Mapping[str, Any]) -> str:
    return msgspec.json.encode(dict(sorted(settings.items()))).decode()


@lru_cache(maxsize=64)
def _dataset(name: str, settings_json: str) -> Any:
    require("reasoning_gym", extra=EXTRA, purpose=f"gym:{name}")
    factory: Any = require("reasoning_gym.factory", extra=EXTRA, purpose=f"gym:{name}")
    if name not in factory.DATASETS:
        near = difflib.get_close_matches(name, factory.DATASETS, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else f"; it has {', '.join(sorted(factory.DATASETS))}"
        raise DataError(f"gym:{name}: reasoning-gym has no such dataset{hint}")
    settings = msgspec.json.decode(settings_json)
    fields = {field.name for field in dataclasses.fields(factory.DATASETS[name][1])}
    unknown = sorted(settings.keys() - fields)
    if unknown:
        raise DataError(f"gym:{name}: no setting {', '.join(unknown)}; it has {', '.join(sorted(fields))}")
    try:
        return factory.create_dataset(name, **settings)
    except (AssertionError, ValueError, TypeError) as error:  # its configurations check themselves with assert
        raise DataError(f"gym:{name}: reasoning-gym refuses these settings: {error}") from error
