"""What executing PTX raises. All but Unsupported are mistakes of the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ptx.instructions import Instruction


class PTXError(RuntimeError):
    """A kernel did something wrong.

    The message names the instruction and, where it makes sense, CTA, thread and address.
    """

    def __init__(
        self,
        what: str,
        cta: tuple[int, int, int] | None = None,
        thread: int | None = None,
        addr: int | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.cta = cta
        self.thread = thread
        self.addr = addr
        self.kernel: str | None = None
        self.instruction: Instruction | None = None

    def at(self, kernel: str, instruction: Instruction | None = None) -> PTXError:
        """This error, which happened there unless it already knows where."""
        self.kernel = self.kernel or kernel
        self.instruction = self.instruction or instruction
        return self

    def __str__(self) -> str:
        parts = [self.what]
        if self.addr is not None:
            parts.append(f"address {self.addr:#x}")
        if self.cta is not None:
            parts.append(f"CTA {self.cta}")
        if self.thread is not None:
            warp, lane = divmod(self.thread, 32)
            parts.append(f"thread {self.thread} (warp {warp} lane {lane})")
        if self.instruction is not None:
            parts.append(f"in `{self.instruction.text}` [{self.instruction.where()}]")
        if self.kernel is not None:
            parts.append(f"of kernel {self.kernel}")
        return ", ".join(parts)


class OutOfBounds(PTXError):
    """An access to memory that belongs to no known allocation."""


class Misaligned(PTXError):
    """An access whose address is no multiple of its size."""


class UninitialisedShared(PTXError):
    """A read of shared bytes that nothing has written."""


class SharedRace(PTXError):
    """Unordered accesses to shared bytes or tensor memory by two warps or asynchronous units."""


class MissingFence(PTXError):
    """A read through the asynchronous proxy of shared bytes whose generic write nobody fenced."""


class GlobalRace(PTXError):
    """Conflicting accesses to global bytes that no barrier and release/acquire chain orders."""


class Divergence(PTXError):
    """A warp-synchronous instruction reached by a part of the warp."""


class Deadlock(PTXError):
    """No thread can continue."""


class DeviceAssert(PTXError):
    """``tl.device_assert`` failed."""


class Unsupported(Exception):
    """An instruction that cannot be executed: raises NotImplementedError when it is reached."""
