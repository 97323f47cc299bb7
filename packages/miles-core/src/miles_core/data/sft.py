"""SFT examples: which tokens of a conversation or of prompt + completion the model is to imitate."""

from __future__ import annotations

from miles_core.data.prompts import PromptBuilder
from miles_core.data.record import DataError, Message, Row, SFTExample


def build_example(row: Row, builder: PromptBuilder) -> SFTExample:
    """Token ids and loss mask [L] of one row; prompts carry no loss, the end of each imitated turn does.

    Raises DataError when the row has nothing to imitate, or the chat template rewrites earlier turns.
    """
    if row.completion is None:
        shapes = "messages that end with the assistant, or prompt and completion"
        raise DataError(f"{row.origin}: nothing to imitate; SFT needs {shapes} (see data.completion_column)")
    conversation = builder.conversation(row)
    try:
        if conversation is None:
            return _from_text(row, builder)
        completion = row.completion
        added = ({"role": "assistant", "content": completion},) if isinstance(completion, str) else completion
        first = len(conversation) if row.completion_is_apart else 0
        return _from_messages(row, (*conversation, *added), builder, first)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{row.origin}: {error}") from error


def _from_text(row: Row, builder: PromptBuilder) -> SFTExample:
    if not isinstance(row.completion, str):
        raise DataError(f"{row.origin}: the prompt is text and the completion a conversation; use one kind for both")
    prompt_ids = builder.build(row).input_ids
    # encoded apart from the prompt: at inference, too, the completion starts at a token boundary
    completion_ids = builder.tokenizer.encode(row.completion, add_special_tokens=False)
    token_ids = (*prompt_ids, *completion_ids, _eos(row, builder))
    mask = (False,) * len(prompt_ids) + (True,) * (len(completion_ids) + 1)
    return SFTExample(example_id=row.origin, token_ids=token_ids, loss_mask=mask)


def _from_messages(row: Row, turns: tuple[Message, ...], builder: PromptBuilder, first: int) -> SFTExample:
    """Render once, then find each assistant turn between two renderings of its prefix.

    A turn's tokens run from the end of the prefix with a generation prompt to the turn's own end-of-sequence token;
    what the template writes after that (a line break, say) the model never has to produce.
    """
    config, tools = builder.config, row.tools
    num_shots = 2 * len(config.fewshot)
    num_system = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    token_ids = builder.render(turns, tools, add_generation_prompt=False)
    mask = [False] * len(token_ids)
    eos_ids = set(builder.tokenizer.eos_token_ids)
    imitated = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i >= max(first, num_system + num_shots)]
    if config.sft_turns == "last":
        imitated = imitated[-1:]
    for i in imitated:
        before = builder.render(turns[:i], tools, add_generation_prompt=True)
        after = token_ids if i == len(turns) - 1 else builder.render(turns[: i + 1], tools, add_generation_prompt=False)
        if token_ids[: len(before)] != before or token_ids[: len(after)] != after:
            raise DataError(
                f"{row.origin}: the chat template writes turn {i} differently inside the whole conversation than at its end, "
                f'so what the model saw when it answered cannot be masked; set data.sft_turns = "last" or split the conversation'
            )
        start, stop = len(before), len(after)
        ends = [j for j in range(start, stop) if token_ids[j] in eos_ids]
        if ends:
            stop = ends[-1] + 1
        elif i == len(turns) - 1:
            token_ids.append(_eos(row, builder))
            mask.append(False)
            stop += 1
        mask[start:stop] = [True] * (stop - start)
    if not any(mask):
        raise DataError(f"{row.origin}: no assistant turn to imitate")
    length = max(j for j, on in enumerate(mask) if on) + 1
    return SFTExample(example_id=row.origin, token_ids=tuple(token_ids[:length]), loss_mask=tuple(mask[:length]))


def _eos(row: Row, builder: PromptBuilder) -> int:
    if builder.config.eos_token_id is not None:
        return builder.config.eos_token_id
    if not builder.tokenizer.eos_token_ids:
        raise DataError(f"{row.origin}: the tokenizer names no end-of-sequence token; set data.eos_token_id")
    return builder.tokenizer.eos_token_ids[0]
