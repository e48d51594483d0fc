"""The settings of `install`."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

_CHOICES = {
    "bounds": ("storage", "tensor"),
    "autotune": ("first", "run"),
    "check_fences": (None, "error", "count", "off"),
}


@dataclass(frozen=True)
class Options:
    """How a launch is executed and what is checked. ValueError for a value that none has.

    check_shared        uninitialised reads and races in shared memory
    check_tensor        races in tensor memory (sm_100)
    check_fences        a missing fence.proxy.async before wgmma, tcgen05.mma or a bulk store reads
                        what was written generically: "error", "count" or "off"; None: an error
                        from Triton 3.7 on, counted below, where compilers leave some out
    check_global_race   conflicting global accesses by two CTAs that no barrier and release/acquire
                        chain orders; "warps": by two warps of one CTA, too
    bounds              what a tensor argument makes accessible: its "storage", or no more than
                        the "tensor" covers
    unique_bytes        count distinct global bytes read and written
    autotune            "first": every configuration costs the same, so the first wins and none is
                        run; "run": each is run, and costs the warp instructions executed
    transform           PTX text → PTX text, applied before decoding: to look at it, or to plant
                        mistakes
    ignore_printf       do not print what ``tl.device_print`` prints
    schedule            order and interleaving of CTAs: "lockstep" (batches, in order),
                        "sequential" (one after the other), "reverse" (the last first),
                        "random:SEED" (random start order, random slices)
    resident            at most so many CTAs started and unfinished at a time, as on a GPU with
                        few free slots
    batch_lanes         threads executed as one numpy vector: several CTAs in lock step
    slice_blocks        basic blocks after which a batch of CTAs gives way
    max_live            batches under way before a new one waits for all of them to block
    max_blocks          basic blocks without a change in global memory after which to give up
    devices             types of devices whose memory the CPU can read
    """

    check_shared: bool = True
    check_tensor: bool = True
    check_fences: Literal["error", "count", "off"] | None = None
    check_global_race: bool | Literal["warps"] = False
    bounds: Literal["storage", "tensor"] = "storage"
    unique_bytes: bool = True
    autotune: Literal["first", "run"] = "first"
    transform: Callable[[str], str] | None = None
    ignore_printf: bool = False
    schedule: str = "lockstep"
    resident: int | None = None
    batch_lanes: int = 4096
    slice_blocks: int = 50_000
    max_live: int = 16
    max_blocks: int = 5_000_000
    devices: tuple[str, ...] = ("cpu",)

    def __post_init__(self) -> None:
        schedules = r"lockstep|sequential|reverse|random:\d+"
        if not re.fullmatch(schedules, self.schedule):
            raise ValueError(
                "`schedule` must be 'lockstep', 'sequential', 'reverse' or 'random:SEED', "
                f"got {self.schedule!r}"
            )
        if self.resident is not None and self.resident < 1:
            raise ValueError(f"`resident` must be None or at least 1, got {self.resident}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}")

    def of_missing_fences(self) -> str:
        """What becomes of them: "error", "count" or "off"."""
        if self.check_fences is not None:
            return self.check_fences
        version = importlib.metadata.version("triton").split(".")
        return "error" if (int(version[0]), int(version[1])) >= (3, 7) else "count"
