"""Stand-ins for torch.cuda on a machine without a GPU: a rehearsal runs the code of the real day.

Tensors are on the CPU, and queries of times, memory or graphs return meaningless values: every time
is one millisecond. A stand-in accepts exactly the arguments of torch's own function.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

MILLISECONDS = 1.0


class Event:
    """Times nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        inspect.signature(_REAL_EVENT.__new__).bind(_REAL_EVENT, *args, **kwargs)
        self._timing = bool(kwargs.get("enable_timing", args[:1] == (True,)))
        self._recorded = False

    def record(self, stream: Any = None) -> None:
        self._recorded = True

    def synchronize(self) -> None:
        """Nothing runs apart from the caller."""

    def elapsed_time(self, end: Event) -> float:
        if not (self._timing and end._timing and self._recorded and end._recorded):
            raise RuntimeError("both events must be recorded and made with enable_timing=True")
        return MILLISECONDS


class Stream:
    """The only stream there is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        inspect.signature(_REAL_STREAM.__new__).bind(_REAL_STREAM, *args, **kwargs)

    def wait_stream(self, stream: Stream) -> None:
        if not isinstance(stream, Stream):
            raise TypeError(f"stream must be a Stream, got {type(stream).__name__}")


class CUDAGraph:
    """Replays what it captured by doing nothing."""

    def __init__(self) -> None:
        self.captured = False

    def replay(self) -> None:
        if not self.captured:
            raise RuntimeError("a graph must be captured before it is replayed")


class graph:
    """Runs what it captures."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(_REAL_GRAPH.__init__).bind(self, *args, **kwargs)
        self._graph: CUDAGraph = bound.arguments["cuda_graph"]

    def __enter__(self) -> None:
        return None

    def __exit__(self, *details: Any) -> None:
        self._graph.captured = True


_REAL_EVENT, _REAL_STREAM = torch.cuda.Event, torch.cuda.Stream
_REAL_GRAPH = torch.cuda.graph
_CLASSES = {"Event": Event, "Stream": Stream, "CUDAGraph": CUDAGraph, "graph": graph}
_ANSWERS: dict[str, Any] = {
    "synchronize": None,
    "current_stream": Stream(),
    "graph_pool_handle": (0, 1),
    "memory_allocated": 0,
    "max_memory_allocated": 0,
    "reset_peak_memory_stats": None,
}


@contextlib.contextmanager
def cuda() -> Iterator[None]:
    """torch.cuda answers for an absent device."""
    with contextlib.ExitStack() as patches:
        for name, stand_in in _CLASSES.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        for name, answer in _ANSWERS.items():
            function = _answering(getattr(torch.cuda, name), answer)
            patches.enter_context(mock.patch.object(torch.cuda, name, function))
        patches.enter_context(mock.patch.object(torch.cuda, "stream", _stream))
        patches.enter_context(mock.patch("torch.cuda.profiler.start", lambda: None))
        patches.enter_context(mock.patch("torch.cuda.profiler.stop", lambda: None))
        yield


def _answering(real: Callable[..., Any], answer: Any) -> Callable[..., Any]:
    signature = inspect.signature(real)

    @functools.wraps(real)
    def answered(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)
        return answer

    return answered


def _stream(stream: Any) -> contextlib.AbstractContextManager[None]:
    if not isinstance(stream, Stream):
        raise TypeError(f"stream must be a Stream, got {type(stream).__name__}")
    return contextlib.nullcontext()
