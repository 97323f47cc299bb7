"""Turn a row into token ids: template and worked examples around text, the model's chat template for conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from miles_core.data.config import DataConfig
from miles_core.data.record import DataError, Message, Prompt, Row
from miles_rollout.text import Tokenizer


class PromptBuilder:
    """Builds prompts one way for training, evaluation and SFT, so that they cannot drift apart."""

    def __init__(self, tokenizer: Tokenizer, config: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self._shared_ids: dict[int, int] = {}
        self._head = config.prefix + "".join(
            self._wrap(shot.prompt) + shot.answer + config.fewshot_separator for shot in config.fewshot
        )

    def build(self, row: Row) -> Prompt:
        """The prompt of a row; raises DataError naming the row when tokenizer or chat template refuse it."""
        conversation = self.conversation(row)
        try:
            if conversation is None:
                assert isinstance(row.prompt, str)
                text = self._head + self._wrap(row.prompt)
                ids = self.tokenizer.encode(text)
            else:
                ids = self.render(conversation, row.tools, add_generation_prompt=True)
                text = self.tokenizer.decode(ids, skip_special_tokens=False)
        except ValueError as error:
            raise DataError(f"{row.origin}: {error}") from error
        share = self._shared_ids.setdefault  # one int object per id keeps a large dataset at 8 bytes a token
        return Prompt(
            prompt_id=row.origin,
            input_ids=tuple([share(i, i) for i in ids]),
            text=text,
            messages=conversation,
            label=row.label,
            metadata=row.metadata,
        )

    def conversation(self, row: Row) -> tuple[Message, ...] | None:
        """The chat turns of the prompt, worked examples and system prompt included; None for plain text."""
        config = self.config
        if isinstance(row.prompt, str):
            if config.chat_template != "always":
                chat: dict[str, Any] = {
                    "system_prompt": config.system_prompt,
                    "chat_template_options": config.chat_template_options,
                }
                chat["tools"] = row.tools if config.chat_template == "auto" else None
                for name, value in chat.items():
                    if value:
                        raise DataError(f'{row.origin}: {name} needs a conversation; set data.chat_template = "always"')
                return None
            turns: list[Message] = [{"role": "user", "content": row.prompt}]
        elif config.chat_template == "never":
            raise DataError(f'{row.origin}: the prompt is a conversation, but data.chat_template = "never"; set "auto"')
        elif config.prefix:
            raise DataError(f"{row.origin}: data.prefix is plain text, but the prompt is a conversation; use data.system_prompt")
        else:
            turns = list(row.prompt)
        num_system = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
        system, turns = turns[:num_system], turns[num_system:]
        if config.system_prompt is not None and not system:
            system = [{"role": "system", "content": config.system_prompt}]
        shots: list[Message] = []
        for shot in config.fewshot:
            shots += [{"role": "user", "content": self._wrap(shot.prompt)}, {"role": "assistant", "content": shot.answer}]
        if turns and turns[-1]["role"] == "user" and isinstance(turns[-1].get("content"), str):
            turns[-1] = {**turns[-1], "content": self._wrap(turns[-1]["content"])}
        elif config.template != "{prompt}":
            raise DataError(f"{row.origin}: data.template needs a conversation that ends with a user turn of text")
        return (*system, *shots, *turns)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, *, add_generation_prompt: bool
    ) -> list[int]:
        """Ids of a conversation under the model's chat template and data.chat_template_options."""
        options = self.config.chat_template_options
        return self.tokenizer.apply_chat_template(messages, tools, add_generation_prompt=add_generation_prompt, **options)

    def _wrap(self, text: str) -> str:
        return self.config.template.replace("{prompt}", text)
