"""The file of timings: shared by processes, survived when damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from lora_fast.tuning.cache import Cache, folder

ROOT = Path(__file__).resolve().parents[2]
HEADER = {"device": "GPU (80 GB)", "lora_fast": "1", "torch": "2.0+cu1", "triton": "3"}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_FAST_CACHE_DIR", str(tmp_path / "cache"))


def test_what_is_put_is_found_by_the_next_process():
    cache = Cache(HEADER)
    assert cache.get("a") is None
    cache.put("a", "fused", {"fused": 1.0, "hybrid": 2.0})
    assert cache.get("a") == "fused"
    again = Cache(HEADER)
    assert again.get("a") == "fused"
    assert again.get("b") is None
    stored = json.loads(again.path.read_text())
    assert stored["plans"] == {
        "a": {"plan": "fused", "milliseconds": {"fused": 1.0, "hybrid": 2.0}}
    }
    assert {name: stored[name] for name in HEADER} == HEADER


@pytest.mark.parametrize("field", HEADER)
def test_every_device_and_version_has_a_file_of_its_own(field):
    Cache(HEADER).put("a", "fused", {})
    assert Cache({**HEADER, field: "other"}).get("a") is None


def test_the_folder(monkeypatch, tmp_path):
    assert folder() == tmp_path / "cache"
    monkeypatch.delenv("LORA_FAST_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder() == tmp_path / "xdg" / "lora_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert folder() == tmp_path / "home" / ".cache" / "lora_fast"


def test_what_others_wrote_meanwhile_is_kept():
    ours, theirs = Cache(HEADER), Cache(HEADER)
    assert ours.get("a") is None
    theirs.put("b", "hybrid", {})
    theirs.put("c", "hybrid", {})
    ours.put("a", "fused", {})
    ours.put("c", "fused", {})
    found = Cache(HEADER)
    assert [found.get(key) for key in "abc"] == ["fused", "hybrid", "hybrid"]
    assert ours.get("c") == "fused"


def test_processes_that_write_at_once_lose_nothing():
    code = (
        "import sys; from lora_fast.tuning.cache import Cache; "
        f"cache = Cache({HEADER}); "
        "[cache.put(f'{sys.argv[1]}-{i}', 'fused', {}) for i in range(20)]"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(number)], env=env) for number in range(4)
    ]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    found = Cache(HEADER)
    assert all(found.get(f"{w}-{i}") == "fused" for w in range(4) for i in range(20))
    assert not list(found.path.parent.glob("*.tmp"))


DAMAGED = [
    "", "{", "[]", "3", "{}", '{"plans": {}}', '{"plans": []}',
    json.dumps({**HEADER, "plans": {"a": "fused"}}),
    json.dumps({**HEADER, "plans": {"a": {"plan": 3}}}),
    json.dumps({**HEADER, "plans": {"a": None}}),
    json.dumps({**HEADER, "device": "another", "plans": {}}),
    "\x00" * 100,
]  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_costs_one_warning_and_is_replaced(text):
    cache = Cache(HEADER)
    cache.path.parent.mkdir(parents=True)
    cache.path.write_text(text)
    with pytest.warns(RuntimeWarning, match="damaged") as caught:
        assert cache.get("a") is None
        cache.put("a", "fused", {})
        cache.put("b", "fused", {})
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Cache(HEADER).get("b") == "fused"


def test_bytes_that_are_no_text_are_damage():
    cache = Cache(HEADER)
    cache.path.parent.mkdir(parents=True)
    cache.path.write_bytes(b"\xff\xfe\x80")
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert cache.get("a") is None


def test_a_folder_that_cannot_be_made_costs_one_warning(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_FAST_CACHE_DIR", str(tmp_path / "file" / "below"))
    cache = Cache(HEADER)
    with pytest.warns(RuntimeWarning, match="timings") as caught:
        assert cache.get("a") is None
        cache.put("a", "fused", {})
        cache.put("b", "hybrid", {})
    assert len(caught) == 1
    assert (cache.get("a"), cache.get("b")) == ("fused", "hybrid")


def test_a_write_that_fails_leaves_the_old_file(monkeypatch):
    cache = Cache(HEADER)
    cache.put("a", "fused", {})

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.warns(RuntimeWarning, match="No space left") as caught:
            cache.put("b", "fused", {})
            cache.put("c", "fused", {})
    assert len(caught) == 1
    assert not list(cache.path.parent.glob("*.tmp"))
    assert cache.get("b") == "fused"
    assert [Cache(HEADER).get(key) for key in "ab"] == ["fused", None]


def test_no_home_costs_one_warning(monkeypatch):
    monkeypatch.delenv("LORA_FAST_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    cache = Cache(HEADER)
    with pytest.warns(RuntimeWarning, match="home directory") as caught:
        cache.get("a")
        cache.put("a", "fused", {})
    assert len(caught) == 1
    assert cache.get("a") == "fused"
