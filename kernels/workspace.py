"""int32 words through which the CTAs of a launch synchronise: tickets, flags, arrival counters.

Every kernel that uses them resets them to zero, so one buffer per device and stream serves all
launches without a memset or a host synchronisation.

A launch captured by a CUDA graph gets its own words for the life of the process: replays may
overlap with anything, and nothing tells when a graph is released. They come from an arena that was
zeroed before the capture began (torch.cuda.graph synchronises there), so a replay clears nothing;
16,000 layers of 64 rows or fewer take 2 MiB.

If a word is not zero when a launch starts, tiles wait forever or read S too early. With
LORA_FAST_DEBUG=1 a check, which waits for the device, precedes every launch that is not captured.
"""

import os
import threading
from dataclasses import dataclass

import torch


def _debugs_by_environment() -> bool:
    value = os.environ.get("LORA_FAST_DEBUG", "0")
    if value not in ("0", "1"):
        raise ValueError(f"LORA_FAST_DEBUG must be 0 or 1, got {value!r}")
    return value == "1"


DEBUG = _debugs_by_environment()
_MINIMUM = 1024
_ARENA = 1 << 16
# A cache line: launches do not share one, and pointers to words are aligned like a buffer's.
_LINE = 32
_cache: dict[tuple[torch.device, int], torch.Tensor] = {}
_lock = threading.Lock()


@dataclass
class _Arena:
    """Zeros of one device, of which the first `used` belong to captured launches."""

    words: torch.Tensor
    used: int = 0


_arenas: dict[torch.device, _Arena] = {}
# Graphs hold pointers into them.
_full: list[_Arena] = []


def sync_words(device: torch.device, count: int) -> torch.Tensor:
    """At least `count` int32 zeros that no other stream and no other graph uses."""
    is_cuda = device.type == "cuda"
    stream = torch.cuda.current_stream(device).cuda_stream if is_cuda else 0
    return words_of(device, stream, count, is_cuda=is_cuda)


def words_of(device: torch.device, stream: int, count: int, *, is_cuda: bool) -> torch.Tensor:
    """:func:`sync_words` of the current stream, where it is known."""
    if is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return _captured(device, count)
        _provide(device)
    words = _cache.get((device, stream))
    if words is None or words.numel() < count:
        words = _zeros(max(count, _MINIMUM), device)
        _cache[device, stream] = words
    elif DEBUG:
        _check_zero(words)
    return words


def debug_options() -> dict[str, bool]:
    """Options of a launch that enable tl.device_assert and no other check."""
    return {"debug": True, "sanitize_overflow": False} if DEBUG else {}


def _check_zero(words: torch.Tensor) -> None:
    found = words.nonzero()
    if found.numel():
        first = int(found[0])
        raise RuntimeError(
            f"lora_fast: words that thread blocks synchronise through must be zero before a "
            f"launch, got {found.numel()} that are not, the first words[{first}] = "
            f"{int(words[first])} on {words.device}; a launch before this one was aborted, or "
            f"something else wrote to them (docs/kernels.md, Errors)"
        )


def forget() -> None:
    """Drop the cached words after an aborted launch."""
    _cache.clear()


def _provide(device: torch.device) -> None:
    """Ensure that at least half an arena is free for future captures."""
    arena = _arenas.get(device)
    if arena is not None and 2 * arena.used <= _ARENA:
        return
    with _lock:
        # Another thread may have provided one in the meantime.
        if _arenas.get(device) is arena:
            if arena is not None:
                _full.append(arena)
            _arenas[device] = _Arena(_zeros(_ARENA, device))


def _captured(device: torch.device, count: int) -> torch.Tensor:
    with _lock:
        arena = _arenas.get(device)
        if arena is None or arena.used + count > _ARENA:
            # The graph's own memory, cleared by every replay before the launch.
            return _zeros(count, device)
        words = arena.words[arena.used : arena.used + count]
        arena.used += -(-count // _LINE) * _LINE
    return words


def _zeros(count: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)
