"""Timings stored on disk: one JSON file for each device and set of versions.

The folder is LORA_FAST_CACHE_DIR, else lora_fast in XDG_CACHE_HOME or ~/.cache. A file is replaced
atomically, after merging what other processes have written in the meantime. If a file cannot be
read or written, there is a warning and the timings are lost, nothing else. Nothing in it is
executed: a plan is a name that must be among the candidates.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # no POSIX: replacing the file is atomic, merging is not
    fcntl = None  # type: ignore[assignment]


# Of the keys and the names of plans; a file of another one has another name.
FORMAT = "2"
_POLL_SECONDS = 0.1


def folder() -> Path:
    """The folder of tuning files. RuntimeError: there is no home directory."""
    given = os.environ.get("LORA_FAST_CACHE_DIR")
    if given:
        return Path(given)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "lora_fast"


def versions(device: str) -> dict[str, str]:
    """The device and versions that a timing is valid for."""
    import torch
    import triton

    from ..kernels.descriptors import DESCRIBES
    from ..version import __version__

    return {
        "format": FORMAT,
        "device": device,
        "lora_fast": __version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "descriptors": str(int(DESCRIBES)),
    }


class Cache:
    """The plans of one file by key. Read on first use, written after every new timing."""

    def __init__(self, header: Mapping[str, str]) -> None:
        self.header = dict(header)
        self._plans: dict[str, dict[str, Any]] | None = None
        self._warned = False
        self._writable: bool | None = None

    @property
    def path(self) -> Path:
        words = "_".join(f"{name}-{value}" for name, value in self.header.items())
        return folder() / (re.sub(r"[^\w.+-]+", "-", words) + ".json")

    def __len__(self) -> int:
        return len(self._plans or ())

    def get(self, key: str) -> str | None:
        """The name of the plan that was fastest; None if the key was not timed."""
        if self._plans is None:
            self._plans = self._read()
        entry = self._plans.get(key)
        return None if entry is None else entry["plan"]

    def wait_for(self, key: str, seconds: float) -> str | None:
        """As `get`; the file is read again, once more at least, until another process has stored
        the key."""
        deadline = time.monotonic() + seconds
        while (found := self.get(key)) is None:
            is_last = time.monotonic() >= deadline
            self._plans = {**(self._plans or {}), **self._read()}
            found = self.get(key)
            if is_last or found is not None:
                break
            time.sleep(_POLL_SECONDS)
        return found

    def is_writable(self) -> bool:
        """Whether plans can be stored; one warning if not."""
        if self._writable is None:
            try:
                path = self.path
                path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=path.parent):
                    pass
                self._writable = True
            except (OSError, RuntimeError) as error:
                self._writable = False
                self._warn(
                    f"nothing is timed, since it could not be stored: {error}; LORA_FAST_CACHE_DIR "
                    "names another folder, LORA_FAST_AUTOTUNE=0 is silent"
                )
        return self._writable

    def put(
        self,
        key: str,
        plan: str,
        milliseconds: Mapping[str, float],
        *,
        instead_of: str | None = None,
    ) -> None:
        """Store a choice and its times. The first process to store a key wins, unless its choice is
        `instead_of`, a plan that no longer exists."""
        ours = self._plans if self._plans is not None else {}
        self._plans = {**ours, key: {"plan": plan, "milliseconds": dict(milliseconds)}}
        try:
            path = self.path
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                stored = self._read()
                if key in stored and stored[key]["plan"] == instead_of:
                    del stored[key]
                merged = {**self._plans, **stored}
                _replace(path, json.dumps({**self.header, "plans": merged}, indent=1))
        except (OSError, RuntimeError) as error:
            self._warn(f"timings are kept in memory only: {error}")

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            stored = json.loads(self.path.read_text())
            plans = stored.pop("plans")
            if stored != self.header or not all(
                isinstance(entry["plan"], str) for entry in plans.values()
            ):
                raise ValueError("not written by this version")
            return plans
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            self._warn(f"timings cannot be read: {error}")
        except RuntimeError as error:
            self._warn(f"timings are kept in memory only: {error}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._warn(f"{self.path} is damaged and will be replaced: {error}")
        return {}

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"lora_fast: {text}", RuntimeWarning, stacklevel=2)


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock between reading and replacing, so that no plans are lost."""
    with open(path, "w") as file:
        if fcntl is not None:
            # Some network file systems have no locks; then two processes may both time a key.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
