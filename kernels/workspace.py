"""Small int32 words that the CTAs of one launch meet on: tickets, flags, arrival counters.

Every kernel that uses them leaves zeros behind, so one buffer per device and stream serves all
launches without a memset and without a host synchronisation.
"""

import torch

_MINIMUM = 1024
_cache: dict[tuple[str, int | None, int], torch.Tensor] = {}


def sync_words(device: torch.device, count: int) -> torch.Tensor:
    """At least `count` int32 zeros that no other stream uses.

    While a CUDA graph is captured the words are new and belong to the graph: its replays may
    overlap with anything.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(count, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    key = (device.type, device.index, stream)
    words = _cache.get(key)
    if words is None or words.numel() < count:
        words = torch.zeros(max(count, _MINIMUM), dtype=torch.int32, device=device)
        _cache[key] = words
    return words


def forget() -> None:
    """Drop the cached words, after a launch that was aborted half-way."""
    _cache.clear()
