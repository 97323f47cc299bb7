"""The held-out prompts of a run, by evaluation set."""

from __future__ import annotations

from collections.abc import Callable

from miles_core.config.schema import RunConfig
from miles_core.data.load import load_prompts
from miles_core.data.record import Prompt
from miles_core.models import prompt_room
from miles_kernels.nn.config import DecoderConfig
from miles_rollout.text import Tokenizer


def load_held_out(
    config: RunConfig, tokenizer: Tokenizer, shape: DecoderConfig, say: Callable[[str], None]
) -> dict[str, list[Prompt]]:
    """The prompts of every evaluation set; those of `data.eval` under the name "". Says what each file gave."""
    room = prompt_room(shape, config, held_out=True)
    found = {}
    for name, sources in {"": config.data.eval, **config.eval.sets}.items():
        if sources:
            found[name], report = load_prompts(sources, tokenizer, config.data, max_tokens=room)
            for line in report.lines():
                say(f"{f'eval.sets.{name}' if name else 'data.eval'}: {line}")
    return found
