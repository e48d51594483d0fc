"""Lines of a jsonl file with every field checked; errors give file, line and column.

A classification line holds ``text``, optionally ``text_pair``, and ``label``; a causal-lm line
holds ``text``, or ``messages`` for the tokenizer's chat template and optionally their ``tools``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import TrainingError, first_line

# Fields beside role and content that chat templates know.
TEXT_FIELDS = ("name", "tool_call_id", "reasoning_content", "thinking")
ONE_LINE = 60


class Row(dict[str, Any]):
    """One example as it was read. ``where``: its file and line; ``unused``: its other fields.

    Neither is part of the example, so equal examples compare equal wherever they come from.
    """

    where: str = ""
    unused: tuple[str, ...] = ()


Read = Callable[[dict[str, Any]], Row]


def read_jsonl(path: Path, read: Read, option: str = "--data") -> list[Row]:
    """``read(object)`` for every non-blank line of the jsonl file that `option` names.

    Raises TrainingError: the file cannot be read, or a line is malformed (the message has its
    number).
    """
    rows = []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    row = read(_json_object(line))
                except ValueError as error:
                    raise TrainingError(f"{option} {where}: {first_line(error)}") from error
                row.where = where
                rows.append(row)
    except FileNotFoundError:
        raise TrainingError(f"{option} {path}: no such file") from None
    except IsADirectoryError:
        raise TrainingError(f"{option} must be a jsonl file, got the folder {path}") from None
    except UnicodeDecodeError as error:
        raise TrainingError(
            f"{option} {path}: not UTF-8 text ({first_line(error)}): save the file as UTF-8"
        ) from error
    except OSError as error:
        raise TrainingError(f"{option} {path}: {error.strerror}") from error
    if not rows:
        raise TrainingError(f"{option} {path}: holds no examples")
    return rows


def classification_row(found: dict[str, Any]) -> Row:
    """Check a line of ``--task classification``.

    Raises ValueError: a field is absent or of another type.
    """
    row = Row(text=_text(found, "text"), label=_label(found))
    if found.get("text_pair") is not None:
        row["text_pair"] = _text(found, "text_pair")
    row.unused = tuple(found.keys() - {"text", "text_pair", "label"})
    return row


def causal_row(found: dict[str, Any]) -> Row:
    """Check a line of ``--task causal-lm``.

    Raises ValueError: a field is absent or of another type.
    """
    if "messages" in found and "text" in found:
        raise ValueError("has 'text' and 'messages': give one of them")
    if "messages" not in found:
        row = Row(text=_text(found, "text", or_else="messages"))
        row.unused = tuple(found.keys() - {"text"})
        return row
    messages = found["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'messages' must be a non-empty list, got {_shown(messages)}")
    unused = found.keys() - {"messages", "tools"}
    checked = []
    for number, message in enumerate(messages, start=1):
        checked.append(_message(message, number))
        if isinstance(message, dict):
            known = {"role", "content", "tool_calls", *TEXT_FIELDS}
            unused |= {f"{name} of messages" for name in message.keys() - known}
    row = Row(messages=checked)
    if found.get("tools") is not None:
        row["tools"] = _objects(found["tools"], "'tools'")
    row.unused = tuple(unused)
    return row


def _message(message: Any, number: int) -> dict[str, Any]:
    at = f"of message {number}"
    if not isinstance(message, dict) or "role" not in message:
        raise ValueError(f"message {number} must have 'role' and 'content', got {_shown(message)}")
    if not isinstance(message["role"], str) or not message["role"].strip():
        raise ValueError(f"'role' {at} must be a non-empty string, got {_shown(message['role'])}")
    found: dict[str, Any] = {"role": message["role"]}
    calls = message.get("tool_calls")
    content = message.get("content")
    if calls:
        found["tool_calls"] = _objects(calls, f"'tool_calls' {at}")
        content = "" if content is None else content
    elif "content" not in message:
        raise ValueError(f"message {number} must have 'role' and 'content', got {_shown(message)}")
    found["content"] = _content(content, f"'content' {at}")
    for name in TEXT_FIELDS:
        value = message.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise ValueError(f"{name!r} {at} must be a string, got {_shown(value)}")
        found[name] = _unicode(value, f"{name!r} {at}")
    return found


def _content(content: Any, name: str) -> str:
    """A message's text: a string, or a list of text parts, which are joined."""
    if isinstance(content, list):
        parts = []
        for part in content:
            is_text = isinstance(part, dict) and part.get("type") == "text"
            if not is_text or not isinstance(part.get("text"), str):
                raise ValueError(
                    f"{name} must be a string or a list of text parts, got {_shown(part)}"
                )
            parts.append(part["text"])
        content = "".join(parts)
    if not isinstance(content, str):
        raise ValueError(f"{name} must be a string, got {_shown(content)}")
    return _unicode(content, name)


def _objects(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{name} must be a list of objects, got {_shown(value)}")
    return value


def _text(row: dict[str, Any], name: str, *, or_else: str | None = None) -> str:
    if name not in row:
        wanted = repr(name) if or_else is None else f"{name!r} or {or_else!r}"
        hint = "; turn ShareGPT's conversations into messages with role and content"
        raise ValueError(
            f"has no {wanted}, got {sorted(row)}"
            + (hint if or_else is not None and "conversations" in row else "")
        )
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name!r} must be a non-empty string, got {_shown(value)}")
    return _unicode(value, repr(name))


def _label(row: dict[str, Any]) -> str | int:
    if "label" not in row:
        hint = "; --task causal-lm learns from text alone" if "text" in row else ""
        raise ValueError(f"has no 'label', got {sorted(row)}{hint}")
    label = row["label"]
    if not isinstance(label, str | int):
        raise ValueError(f"'label' must be a string or an integer, got {_shown(label)}")
    return _unicode(label, "'label'") if isinstance(label, str) else label


def _unicode(text: str, name: str) -> str:
    """The text, checked to be Unicode: JSON can escape half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        raise ValueError(f"{name} must be Unicode text, got the half character {half}") from None
    return text


def _json_object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line.rstrip("\r\n"), object_pairs_hook=_without_repetition)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError:
        raise ValueError("not JSON that can be read: it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object, got {type(value).__name__}")
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"has {twice!r} twice")
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= ONE_LINE else f"{text[:ONE_LINE]}…"
