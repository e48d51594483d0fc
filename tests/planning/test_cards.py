"""Sizes of memory as they are written, and what fits on a card."""

from __future__ import annotations

import pytest
import typer

from lora_fast.cli.app import app
from lora_fast.files.sizes import parse_memory
from lora_fast.planning import cards


def test_memory_is_read_as_it_is_written() -> None:
    assert parse_memory("24GB") == parse_memory("24") == 24 * 10**9
    assert parse_memory("80 GiB") == 80 << 30
    for text in ("", "-1GB", "24XB", "many", "0"):
        with pytest.raises(ValueError, match="memory must be a size"):
            parse_memory(text)
    with pytest.raises(ValueError, match="card must be one of"):
        cards.card_bytes("voodoo2")
    assert cards.card_bytes("H100") == 81559 << 20
    assert cards.fits(20 * 10**9, cards.card_bytes("rtx4090"))
    assert not cards.fits(25 * 10**9, cards.card_bytes("rtx4090"))


def test_the_help_of_the_command_lists_them() -> None:
    command = typer.main.get_command(app).commands["plan"]
    options = {option.name: option for option in command.params}
    listed = options["card"].help.removeprefix("One of ").rstrip(".").split(", ")
    assert listed == list(cards.CARDS)
