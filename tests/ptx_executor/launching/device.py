"""The device that Triton sees: limits, events, and what stands in for torch.cuda."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..handlers.tensor_maps import encode_map

# Compute capability → (bytes of shared memory for a CTA, multiprocessors).
_LIMITS = {
    80: (166912, 108),
    86: (101376, 84),
    87: (166912, 16),
    89: (101376, 128),
    90: (232448, 132),
    100: (232448, 148),
}


class HostTensorMap:
    """What the encoder of TMA descriptors returns: the 128 bytes that a kernel gets by value."""

    def __init__(self, raw: np.ndarray) -> None:
        self.raw = raw


class Utils:
    """What Triton asks driver.utils for."""

    CUtensorMap = HostTensorMap

    def __init__(self, arch: int) -> None:
        shared, multiprocessors = _LIMITS.get(arch, _LIMITS[90])
        self._properties = {
            "max_shared_mem": shared,
            "multiprocessor_count": multiprocessors,
            "sm_clock_rate": 1410000,
            "mem_clock_rate": 1215000,
            "mem_bus_width": 5120,
            "max_num_regs": 65536,
            "warpSize": 32,
        }

    def get_device_properties(self, device: int) -> dict[str, int]:
        return dict(self._properties)

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """(module, function, registers, spills, most threads)."""
        return name, name, 0, 0, 1024

    def unload_module(self, module: Any) -> None:  # from Triton 3.8 on
        pass

    def set_printf_fifo_size(self, size: int) -> None:
        pass

    def fill_tma_descriptor_tiled(
        self,
        base: int,
        swizzle: int,
        element_bytes: int,
        element: int,
        block: Sequence[int],
        shape: Sequence[int],
        strides: Sequence[int],
        padding: int,
    ) -> HostTensorMap:
        """A descriptor made on the host; its element types are numbered in another order."""
        element = {10: 8, 8: 9, 9: 10}.get(element, element)
        dims, box = list(shape)[::-1], list(block)[::-1]
        in_bytes = [int(stride) * element_bytes for stride in list(strides)[::-1][1:]]
        return HostTensorMap(encode_map(base, element, swizzle, padding, box, dims, in_bytes))

    fill_tma_descriptor = fill_tma_descriptor_tiled  # before Triton 3.7

    def fill_tma_descriptor_im2col(self, *args: Any) -> None:
        raise NotImplementedError("im2col tensor descriptors")


class Event:
    """An event of a clock that ticks at every record."""

    _ticks = itertools.count(1)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time = 0

    def record(self, *args: Any) -> None:
        self._time = next(Event._ticks)

    def elapsed_time(self, other: Event) -> float:
        return float(max(other._time - self._time, 1))

    def synchronize(self) -> None:
        pass


class DeviceInterface:
    """Stands in for torch.cuda. The number of a device is its compute capability."""

    Event = Event

    def __init__(self, arch: int, utils: Utils) -> None:
        self._arch, self._utils = arch, utils

    def current_device(self) -> int:
        return self._arch

    def set_device(self, device: int) -> None:
        pass

    def device_count(self) -> int:
        return 1

    def is_available(self) -> bool:
        return True

    def synchronize(self, *args: Any) -> None:
        pass

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return divmod(self._arch, 10)

    def get_device_name(self, device: Any = None) -> str:
        return f"PTX executor sm_{self._arch}"

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        limits = self._utils.get_device_properties(self._arch)
        major, minor = self.get_device_capability()
        return SimpleNamespace(
            name=self.get_device_name(),
            major=major,
            minor=minor,
            multi_processor_count=limits["multiprocessor_count"],
            warp_size=32,
            total_memory=80 << 30,
            shared_memory_per_block_optin=limits["max_shared_mem"],
            regs_per_multiprocessor=65536,
        )

    def current_stream(self, device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(cuda_stream=0)
