"""From the arguments of a launch to the parameters of a kernel and the memory that it may reach."""

from __future__ import annotations

import inspect
import struct
from typing import Any

import numpy as np
import torch
import triton.backends.nvidia.driver as nvidia

from ..memory.global_memory import GlobalMemory
from ..memory.layout import host_buffer
from ..ptx.instructions import Param
from ..translation.program import Program
from .device import HostTensorMap

Value = tuple[str, Any] | HostTensorMap  # (type of the signature or "ptr", number)


class Parameters:
    """Kernel parameters and module variables in host memory."""

    def __init__(self, program: Program, values: list[Value], memory: GlobalMemory) -> None:
        params = program.kernel.params
        if len(values) != len(params):
            raise TypeError(f"{program.name} takes {len(params)} parameters, got {len(values)}")
        size = max((param.offset + param.size for param in params), default=0)
        self._offsets = {param.name: param.offset for param in params}
        self._raw, self._base = host_buffer(max(size, 16) + 128, 128)
        for param, value in zip(params, values, strict=True):
            packed = np.frombuffer(_pack(param, value), np.uint8)
            self._raw[param.offset : param.offset + param.size] = packed
        memory.add(self._base, max(size, 1), "kernel parameters", self._raw, writable=False)
        self._variables: dict[str, int] = {}
        for variable in program.kernel.variables.values():
            if variable.space in ("global", "const") and variable.init is not None:
                raw, address = host_buffer(max(variable.size, 16), 16)
                raw[: len(variable.init)] = np.frombuffer(variable.init, np.uint8)
                writable = variable.space == "global"
                memory.add(address, variable.size, f"variable {variable.name}", raw, writable)
                self._variables[variable.name] = address

    def address(self, name: str) -> int | None:
        """Where a parameter or variable lies."""
        if name in self._offsets:
            return self._base + self._offsets[name]
        return self._variables.get(name)

    def value(self, name: str, offset: int, dtype: np.dtype) -> np.generic:
        """A value at an offset in a parameter."""
        at = self._offsets[name] + offset
        return self._raw[at : at + dtype.itemsize].view(dtype)[0]


def _pack(param: Param, value: Value) -> bytes:
    if isinstance(value, HostTensorMap):
        return value.raw.tobytes()
    kind, number = value
    formats = {"fp16": "<e", "fp32": "<f", "f32": "<f", "fp64": "<d"}
    if kind in formats:
        return struct.pack(formats[kind], number).ljust(param.size, b"\0")
    if kind == "bf16":
        bits = int(np.float32(number).view(np.uint32))
        return (
            (bits + 0x7FFF + ((bits >> 16) & 1) >> 16)
            .to_bytes(2, "little")
            .ljust(param.size, b"\0")
        )
    return (int(number) & (256**param.size - 1)).to_bytes(param.size, "little")


class Binder:
    """Turns arguments into values of parameters and registers their tensors in `memory`.

    `bounds`: what a tensor makes accessible, its "storage" or what the "tensor" covers. `devices`:
    those whose memory the CPU can read.
    """

    def __init__(
        self, memory: GlobalMemory, bounds: str, devices: tuple[str, ...] = ("cpu",)
    ) -> None:
        self._memory, self._bounds, self._devices = memory, bounds, devices
        self.values: list[Value] = []

    def add_tensor(self, tensor: torch.Tensor, name: str) -> None:
        """Let the kernel reach a tensor. TypeError unless it is on the CPU."""
        if tensor.device.type not in self._devices:
            raise TypeError(f"`{name}` must be a CPU tensor, got one on {tensor.device}")
        if self._bounds == "storage":
            storage = tensor.untyped_storage()
            start, size = storage.data_ptr(), storage.nbytes()
        else:
            start, size = tensor.data_ptr(), _covered(tensor)
        self._memory.add(start, size, name, tensor)

    def add_arguments(
        self, signature: dict[str, Any], args: tuple[Any, ...], descriptor_layouts: list[Any]
    ) -> None:
        """All arguments of a launch, in the order of the kernel's signature."""
        layouts = iter(descriptor_layouts)
        for name, type_, arg in _flat(signature, args):
            if type_.startswith("tensordesc"):
                self._descriptor(name, arg, next(layouts, None))
            elif type_ == "nvTmaDesc":
                raise NotImplementedError("raw TMA descriptor arguments")
            elif type_[0] == "*":
                self._pointer(name, arg)
            else:
                self.values.append((type_, arg))

    def add_scratch(self, name: str, size: int, align: int) -> None:
        """Memory of the launch's own, or none."""
        address = 0
        if size:
            raw, address = host_buffer(size, max(align, 128))
            self._memory.add(address, size, name, raw)
        self.values.append(("ptr", address))

    def _pointer(self, name: str, arg: Any) -> None:
        if arg is None:
            self.values.append(("ptr", 0))
        elif hasattr(arg, "data_ptr"):
            base = getattr(arg, "base", None)  # of a wrapper such as TensorWrapper
            tensor = base if isinstance(base, torch.Tensor) else arg
            if isinstance(tensor, torch.Tensor):
                self.add_tensor(tensor, f"argument {name}")
            self.values.append(("ptr", arg.data_ptr()))
        else:
            self.values.append(("ptr", int(arg)))

    def _descriptor(self, name: str, arg: Any, layout: Any) -> None:
        """A tensor descriptor: a tensor map where the compiler gave it a layout, else a pointer."""
        rank = len(arg.shape)
        parts = _encode(arg, layout)
        if layout is None:
            flags = len(parts) - 1 - 4 * rank  # one before Triton 3.7, then two
            types = ["*", *["i64"] * (2 * rank), *["i1"] * flags, *["i32"] * rank, *["i64"] * rank]
        else:
            types = ["nvTmaDesc", *["i32"] * rank, *["i64"] * rank]
            self.add_tensor(arg.base, f"argument {name}")
        for type_, part in zip(types, parts, strict=True):
            if type_ == "*":
                self._pointer(name, part)
            else:
                self.values.append(part if type_ == "nvTmaDesc" else (type_, part))


def _encode(arg: Any, layout: Any) -> tuple[Any, ...]:
    """The parameters of a descriptor. From Triton 3.8 on there is a third argument, unused."""
    more = len(inspect.signature(nvidia.make_tensordesc_arg).parameters) - 2
    return nvidia.make_tensordesc_arg(arg, layout, *[None] * more)


def _covered(tensor: torch.Tensor) -> int:
    """Bytes from a strided tensor's first element to its last."""
    if tensor.numel() == 0:
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * stride for size, stride in steps) + 1) * tensor.element_size()


def _flat(signature: dict[str, Any], args: tuple[Any, ...]) -> list[tuple[str, str, Any]]:
    """(name, type, argument) of everything but constexprs, tuples member by member."""
    found = []

    def visit(name: str, type_: Any, arg: Any) -> None:
        if isinstance(type_, tuple):
            for inner_type, inner in zip(type_, arg, strict=False):
                visit(name, inner_type, inner)
        elif type_ != "constexpr":
            found.append((name, type_, arg))

    for (name, type_), arg in zip(signature.items(), args, strict=False):
        visit(name, type_, arg)
    return found
