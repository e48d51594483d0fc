"""Conversations as tokens, and which of them are the assistant's.

A template with ``{% generation %}`` marks them. With any other, ever longer prefixes of the
conversation are rendered: a turn of the assistant begins where the prompt for it ends, and ends
where the text rendered up to and including it ends.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..errors import TrainingError, first_line
from .rows import Row

# {{ '\n' + message.content }}
SAID_WITH_BREAK = re.compile(r"""\{\{-?\s*(['"])\\n\1\s*\+\s*message(\.content|\[)""")

Span = tuple[int, int]
Message = dict[str, Any]


class Conversations:
    """Encodes conversations with one tokenizer; ``train_on``: which turns are trained on."""

    def __init__(self, tokenizer: Any, train_on: str) -> None:
        self.tokenizer = tokenizer
        self.train_on = train_on
        if not tokenizer.chat_template:
            raise TrainingError(
                "the tokenizer has no chat template: give 'text' instead of 'messages'"
            )

    def encode(self, row: Row) -> tuple[list[int], list[bool]]:
        """The tokens of a conversation, and which of them are trained on.

        Raises TrainingError: the template rejects it, or its turns cannot be found.
        """
        if self.train_on == "all":
            ids = self._tokens(self._render(row, row["messages"]))["input_ids"]
            return ids, [True] * len(ids)
        if self._is_marked(row):
            return self._marked(row)
        text = self._render(row, row["messages"])
        turns = (i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
        return self._learned(row, text, [self._span(row, i, text) for i in turns])

    def _is_marked(self, row: Row) -> bool:
        template = self.tokenizer.get_chat_template(tools=row.get("tools"))
        return "{% generation" in template or "{%- generation" in template

    def _marked(self, row: Row) -> tuple[list[int], list[bool]]:
        try:
            found = self.tokenizer.apply_chat_template(
                row["messages"],
                tools=row.get("tools"),
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except Exception as error:  # the template is the model's own program
            raise _refused(row, error) from error
        return found["input_ids"], [bool(mask) for mask in found["assistant_masks"]]

    def _render(self, row: Row, messages: Sequence[Message], *, prompt: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages),
                tools=row.get("tools"),
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except Exception as error:  # the template is the model's own program: it may raise anything
            raise _refused(row, error) from error
        return text

    def _tokens(self, text: str) -> Any:
        return self.tokenizer(text, add_special_tokens=False)

    def _span(self, row: Row, index: int, text: str) -> Span:
        """Where message `index`, the assistant's, begins and ends in `text`."""
        messages = row["messages"]
        try:
            before = self._render(row, messages[:index], prompt=True)
            after = text
            if index + 1 < len(messages):
                after = self._render(row, messages[: index + 1])
        except TrainingError as error:
            raise _cannot_tell(row, index) from error
        start = len(before) - self._break_before(row, before)
        end = _end(text, start, after, messages[index], self.tokenizer.eos_token or "")
        if not text.startswith(before) or end is None:
            raise _cannot_tell(row, index)
        return start, end

    def _break_before(self, row: Row, before: str) -> int:
        """How many line breaks at the end of the prompt belong to the assistant's turn: 0 or 1.

        Qwen 2.5's template emits the one after the role together with the content.
        """
        template = self.tokenizer.get_chat_template(tools=row.get("tools"))
        return int(before.endswith("\n") and SAID_WITH_BREAK.search(template) is not None)

    def _learned(self, row: Row, text: str, spans: list[Span]) -> tuple[list[int], list[bool]]:
        found = self._tokens(text)
        ids: list[int] = found["input_ids"]
        learned = [False] * len(ids)
        for start, end in spans:
            if start == end:
                continue
            if self.tokenizer.is_fast:
                first, last = found.char_to_token(start), found.char_to_token(end - 1)
                last = len(ids) - 1 if last is None else last
            else:
                first, last = self._tokens_before(text, start, ids), len(ids) - 1
                if end < len(text) and first is not None:
                    behind = self._tokens_before(text, end, ids)
                    last = -1 if behind is None else behind - 1
            if first is None or last < first:
                raise _cannot_tell(row, None)
            learned[first : last + 1] = [True] * (last + 1 - first)
        return ids, learned

    def _tokens_before(self, text: str, place: int, ids: list[int]) -> int | None:
        """How many tokens stand before a place in the text; None if one stands across it."""
        before = self._tokens(text[:place])["input_ids"]
        return len(before) if ids[: len(before)] == before else None


def _end(text: str, start: int, after: str, message: Message, eos: str) -> int | None:
    """Where a turn that begins at `start` ends; `after` is what is written up to its end alone.

    Some templates end every text with a token that is absent if another turn follows, and some
    render a turn differently once it is not the last: then its content is searched for, and
    after it the text that closes the turn.
    """
    open_end = after.removesuffix(eos)
    for candidate in (after, open_end):
        if text.startswith(candidate) and len(candidate) >= start:
            return len(candidate)
    said = message["content"].strip()
    in_text, in_after = text.find(said, start), after.rfind(said)
    if not said or in_text < 0 or in_after < 0 or text[start:in_text].strip():
        return None
    closed = in_text + len(said)
    for closing in (after[in_after + len(said) :], open_end[in_after + len(said) :]):
        if closing.strip() and text.startswith(closing, closed):
            return closed + len(closing)
    return None


def _refused(row: Row, error: Exception) -> TrainingError:
    where = f"{row.where}: " if row.where else ""
    return TrainingError(f"{where}the chat template refused the messages: {first_line(error)}")


def _cannot_tell(row: Row, index: int | None) -> TrainingError:
    where = f"{row.where}: " if row.where else ""
    which = "the assistant's turns" if index is None else f"message {index + 1}"
    return TrainingError(
        f"{where}the chat template does not show where {which} begins and ends: train on whole "
        "conversations with --train-on all, or mark the turns in the template with "
        "{% generation %}"
    )
