"""Lines of jsonl files: what they may hold, and the errors for anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_fast.errors import TrainingError
from lora_fast.training.rows import causal_row, classification_row, read_jsonl

TALK = [{"role": "user", "content": "sky"}, {"role": "assistant", "content": "blue"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{bad", r"not JSON \(.* at column 2\)"),
        ('{"text": "abc", "label": ', r"not JSON \(Expecting value at column 26\)"),
        ("[1]", "must be a JSON object, got list"),
        ("[" * 100_000 + "]" * 100_000, "not JSON that can be read: it is nested too deeply"),
        ('{"text": "a", "text": "b", "label": 1}', "has 'text' twice"),
        ('{"label": 1}', r"has no 'text', got \['label'\]"),
        ('{"text": "", "label": 1}', "'text' must be a non-empty string, got ''"),
        ('{"text": 3, "label": 1}', "'text' must be a non-empty string, got 3"),
        ('{"text": "a"}', r"has no 'label', got \['text'\]"),
        ('{"text": "a", "label": null}', "'label' must be a string or an integer, got None"),
        ('{"text": "a", "label": 0.5}', "'label' must be a string or an integer, got 0.5"),
        ('{"text": "a", "text_pair": 1, "label": 1}', "'text_pair' must be a non-empty string"),
        ('{"text": "a \\ud800 b", "label": 1}', r"'text' must be Unicode text, .*\\ud800"),
        ('{"text": "a", "label": "\\udfff"}', r"'label' must be Unicode text, .*\\udfff"),
    ],
    ids=lambda text: text[:30],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_a_malformed_line_is_named_with_its_number(
    tmp_path: Path, line: str, message: str, end: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(f'{{"text": "a", "label": 0}}{end or chr(10)}\n{line}{end}'.encode())
    number = 3
    with pytest.raises(TrainingError, match=rf"data\.jsonl, line {number}: {message}"):
        read_jsonl(path, classification_row)


def talk(**changed: Any) -> dict[str, Any]:
    return {"messages": [TALK[0], {**TALK[1], **changed}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, r"has no 'text' or 'messages', got \['prompt'\]$"),
        ({"conversations": []}, r"has no 'text' or 'messages', .*turn ShareGPT's conversations"),
        ({"text": "a", "messages": TALK}, "has 'text' and 'messages': give one of them"),
        ({"messages": []}, "'messages' must be a non-empty list"),
        ({"messages": "hello"}, "'messages' must be a non-empty list, got 'hello'"),
        ({"messages": [{"role": "user"}]}, "message 1 must have 'role' and 'content'"),
        ({"messages": [*TALK, "hello"]}, "message 3 must have 'role' and 'content', got 'hello'"),
        (talk(role=3), "'role' of message 2 must be a non-empty string, got 3"),
        (talk(role=" "), "'role' of message 2 must be a non-empty string, got ' '"),
        (talk(content=None), "'content' of message 2 must be a string, got None"),
        (talk(content=5), "'content' of message 2 must be a string, got 5"),
        (talk(content={"a": 1}), "'content' of message 2 must be a string, got {'a': 1}"),
        (talk(content=["blue"]), "'content' of message 2 must be a string or a list of text parts"),
        (talk(content=[{"type": "image"}]), "must be a string or a list of text parts, got {'type"),
        (talk(content=[{"type": "text", "text": 1}]), "must be a string or a list of text parts"),
        (talk(content="\ud800"), r"'content' of message 2 must be Unicode text, .*\\ud800"),
        (talk(name=1), "'name' of message 2 must be a string, got 1"),
        (talk(reasoning_content=[]), "'reasoning_content' of message 2 must be a string"),
        (talk(tool_calls="x"), "'tool_calls' of message 2 must be a list of objects, got 'x'"),
        ({"messages": TALK, "tools": ["x"]}, "'tools' must be a list of objects"),
        ({"text": 1}, "'text' must be a non-empty string, got 1"),
    ],
)
def test_a_malformed_conversation_is_named_with_its_number(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(TrainingError, match=rf"data\.jsonl, line 2: .*{message}"):
        read_jsonl(path, causal_row)


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "very "}, {"type": "text", "text": "blue"}]
    assert causal_row(talk(content=parts))["messages"][1]["content"] == "very blue"


def test_calls_of_tools_need_no_text() -> None:
    call = {"function": {"name": "look", "arguments": {}}}
    for content in ({}, {"content": None}, {"content": "I look."}):
        message = {"role": "assistant", "tool_calls": [call], **content}
        (found,) = causal_row({"messages": [message], "tools": [{"type": "function"}]})["messages"]
        assert found == {
            "role": "assistant",
            "tool_calls": [call],
            "content": content.get("content") or "",
        }


def test_fields_that_nothing_reads_are_remembered() -> None:
    row = causal_row({"messages": [{**TALK[0], "weight": 0}], "id": 1})
    assert set(row.unused) == {"id", "weight of messages"}
    assert row == {"messages": [TALK[0]]}
    assert causal_row({"messages": [{**TALK[0], "name": "me"}]})["messages"][0]["name"] == "me"


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a mark"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_files_of_every_system_are_read(tmp_path: Path, start: bytes, end: bytes) -> None:
    lines = ['{"text": "Łódź", "label": "a"}', "", '{"text": "São Paulo", "label": "b"}']
    path = tmp_path / "data.jsonl"
    path.write_bytes(start + end.join(line.encode() for line in lines) + end)
    rows = read_jsonl(path, classification_row)
    assert [row["text"] for row in rows] == ["Łódź", "São Paulo"]
    assert [row.where for row in rows] == [f"{path}, line 1", f"{path}, line 3"]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "utf-32"])
def test_other_encodings_are_told_with_what_to_do(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes('{"text": "Zürich", "label": "a"}\n'.encode(encoding))
    with pytest.raises(TrainingError, match=r"not UTF-8 text \(.*\): save the file as UTF-8"):
        read_jsonl(path, classification_row)
