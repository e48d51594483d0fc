"""What a batch of CTAs has: registers, memory, copies and products under way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MissingFence, PTXError
from ..memory.layout import POISON
from ..memory.local_memory import LocalMemory
from ..memory.shared_memory import SharedMemory
from . import special_registers

if TYPE_CHECKING:
    from ..counts import Counts
    from ..launching.parameters import Parameters
    from ..memory.clocks import Clock
    from ..memory.global_memory import GlobalMemory
    from ..memory.tensor_memory import TensorMemory
    from ..options import Options
    from ..translation.program import Program

Dim3 = tuple[int, int, int]


class Launch:
    """What all batches of a launch share."""

    def __init__(
        self,
        program: Program,
        grid: Dim3,
        threads: int,
        global_memory: GlobalMemory,
        params: Parameters,
        opts: Options,
        counts: Counts,
    ) -> None:
        self.program, self.grid, self.threads = program, grid, threads
        self.global_memory, self.params = global_memory, params
        self.opts, self.counts = opts, counts

    @property
    def ctas(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def cta(self, number: int) -> Dim3:
        """%ctaid of a CTA by its number."""
        x, y, _ = self.grid
        return number % x, number // x % y, number // (x * y)


class State:
    """The threads of some CTAs as one vector: `lanes` = CTAs · `threads` of each.

    lane_*: of every thread; `bw` is a warp of the batch, a warp number one of the launch.
    """

    def __init__(self, launch: Launch, numbers: list[int]) -> None:
        self.launch = launch
        self.program, self.params, self.opts = launch.program, launch.params, launch.opts
        self.grid, self.threads = launch.grid, launch.threads
        self.global_memory = launch.global_memory
        self.cta_numbers = numbers
        self.ctas = [launch.cta(number) for number in numbers]
        self.cta_name = launch.cta
        self.lanes, self.warps = self.threads * len(numbers), self.threads // 32
        self._make_memory()
        self._number_lanes()
        self._poison_registers()
        # Clocks of acquire and release, by warp of the batch.
        self.released: dict[int, Clock] = {}  # what its last fence may pass on
        self.observed: dict[int, Clock | None] = {}  # met by relaxed reads
        # Asynchronous copies and products, whose groups are counted by thread or warpgroup.
        self.cp_committed = np.zeros(self.lanes, np.int64)
        self.cp_pending: list[Any] = []
        self.wg_committed = np.zeros(max(self.lanes // 128, 1), np.int64)
        self.wg_pending: list[Any] = []
        self.wg_hidden: dict[int, dict[int, np.ndarray]] = {}  # register → warpgroup → result
        self.bulk_committed = np.zeros(self.lanes, np.int64)
        self.bulk_pending: list[tuple[Any, ...]] = []
        self.bulk_writes: list[tuple[Any, ...]] = []  # which other CTAs cannot rely on yet
        self.mbarriers: dict[int, Any] = {}
        self.fragments: dict[tuple[Any, ...], tuple[np.ndarray, list[np.ndarray]]] = {}
        self.call_arguments: dict[str, np.ndarray] = {}
        # Set by handlers: an attempt failed; something has changed that others may wait for.
        self.spinning = self.progress = False
        self._missing_fences = self.opts.of_missing_fences()
        self._special: dict[str, np.ndarray] = {}
        self._params: dict[tuple[Any, ...], np.ndarray] = {}

    def _make_memory(self) -> None:
        program, ctas = self.program, len(self.ctas)
        self.shared = SharedMemory(
            ctas,
            program.shared_size,
            self.warps,
            program.granule,
            self.opts.check_shared,
            clocks=self.global_memory.order is not None,
        )
        has_local = program.local_size > 0
        self.local = LocalMemory(self.lanes, program.local_size) if has_local else None
        self.tensor: TensorMemory | None = None

    def _number_lanes(self) -> None:
        agents = self.shared.agents
        cta = np.repeat(np.arange(len(self.ctas)), self.threads)
        self.lane_cta = cta
        self.lane_thread = np.tile(np.arange(self.threads), len(self.ctas))
        self.lane_warp = self.lane_thread // 32
        self.lane_shared = cta * self.shared.stride
        self.lane_row = (cta * agents + self.lane_warp) * agents  # of SharedMemory.seen_flat
        self.lane_bw = cta * self.warps + self.lane_warp
        numbers = np.repeat(np.array(self.cta_numbers), self.threads)
        self.lane_warp_number = numbers * self.warps + self.lane_warp

    def _poison_registers(self) -> None:
        self.alive = np.ones(self.lanes, bool)
        self.exited = False  # whether any thread has
        self.all_warps = np.ones((self.lanes // 32, 32), bool)
        fill = {stored: np.full(self.lanes, value) for stored, value in POISON.items()}
        self.poison32 = fill["b32"]
        self.regs = [fill[stored] for stored in self.program.kernel.regs]

    def who(self, k: int, lanes: np.ndarray | None = None) -> tuple[Dim3, int]:
        """(CTA, thread) of a lane, or of the k-th of these lanes."""
        lane = k if lanes is None else int(lanes[k])
        return self.ctas[lane // self.threads], lane % self.threads

    def unsupported(self, ins: Any, why: str) -> None:
        where = f"`{ins.text}` [{ins.where()}] of kernel {self.program.name}"
        raise NotImplementedError(f"PTX not executed: {where}: {why}")

    def missing_fence(self, ins: Any, writer: str, cta: Dim3, thread: int, addr: int) -> None:
        """Report an unfenced read, as the options say. MissingFence."""
        if self._missing_fences == "error":
            text = (
                f"{ins.op} reads shared bytes that {writer} wrote with no fence.proxy.async since"
            )
            raise MissingFence(text, cta, thread, addr)
        if self._missing_fences == "count":
            self.launch.counts.missing_fences[f"{ins.full} [{ins.where()}]"] += 1

    def trap(self, error: PTXError, q: np.ndarray | None) -> None:
        if q is None or q.any():
            raise error

    def special(self, name: str) -> np.ndarray:
        """A special register."""
        if name not in self._special:
            self._special[name] = special_registers.value_of(self, name)
        return self._special[name]

    def symbol(self, name: str, dtype: np.dtype) -> np.ndarray:
        """The address of a variable or parameter."""
        address = self.params.address(name)
        if address is None:
            raise NotImplementedError(f"symbol {name} in kernel {self.program.name}")
        return np.full(self.lanes, dtype.type(address), dtype)

    def param(self, name: str, offset: int, dtype: np.dtype) -> np.ndarray:
        """A value in the parameters."""
        key = (name, offset, dtype)
        if key not in self._params:
            value = self.params.value(name, offset, dtype)
            self._params[key] = np.full(self.lanes, value, dtype)
        return self._params[key]

    def mbarrier(self, place: int, lane: int) -> Any:
        """The mbarrier at a place of the batch's shared memory. PTXError."""
        barrier = self.mbarriers.get(place)
        if barrier is None:
            raise PTXError("use of an mbarrier that was not initialised", *self.who(lane))
        return barrier

    def commit_warpgroups(self, groups: np.ndarray) -> None:
        """Close the group of wgmma instructions of these warpgroups."""
        self.wg_committed = self.wg_committed.copy()
        self.wg_committed[groups] += 1

    def count_mma(self, kind: str, count: int, flops: int) -> None:
        self.launch.counts.mma[kind] += int(count)
        self.launch.counts.flops += int(flops)
