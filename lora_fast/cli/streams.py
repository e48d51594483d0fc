"""Printing to streams of any encoding: characters that one lacks are replaced."""

from __future__ import annotations

import codecs
import io
import sys

REPLACEMENTS = "lora_fast.replacements"
# Characters beyond ASCII that the commands print, and their replacements.
ASCII = {
    "✓": "+", "✗": "x", "…": "...", "–": "-", "—": "-", "·": "-", "×": "x", "±": "+/-",
    "│": "|", "─": "-", "━": "-", "╸": "-", "╺": "-", "█": "#", "┃": "|", "→": "->", "≤": "<=",
    "’": "'", "“": '"', "”": '"', "\u00a0": " ", "\u202f": " ",
}  # fmt: skip


def prepare_streams() -> None:
    """Let stdout and stderr print every text, in any encoding, and never raise for a character."""
    codecs.register_error(REPLACEMENTS, _replaced)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors=REPLACEMENTS)


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    text = ASCII.get(character, "?")
    return text, error.start + 1
