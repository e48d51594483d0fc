"""The pretended CUDA device, as a plugin that pytest loads before anything imports PyTorch.

    PYTEST_PLUGINS=tests.pretended_gpu.device python -m pytest -m pretended

device.cpp is compiled on first use. PyTorch asks once, when it is imported, whether it has CUDA, so
the library is loaded before it; then the functions of torch.cuda get answers. Without a C++
compiler, or with a PyTorch that was built for CUDA, there is no such device and its tests are
skipped.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_name("device.cpp")
COMPILER = os.environ.get("CXX", "g++")
ARCH = 90
NAME = "pretended GPU"


def can_be() -> bool:
    """Whether this machine and its PyTorch can have the device."""
    folder = _torch_folder()
    built_for_cuda = (folder / "lib" / "libtorch_cuda.so").exists()
    return sys.platform == "linux" and shutil.which(COMPILER) is not None and not built_for_cuda


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the pretended GPU needs torch")
    return Path(spec.origin).parent


def build(torch_folder: Path) -> Path:
    """The shared library of device.cpp for the installed PyTorch, compiled unless it is there."""
    version = importlib.metadata.version("torch")
    key = hashlib.sha256(f"{version} {torch_folder}".encode() + SOURCE.read_bytes()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_fast_tests"
    library = cache / f"pretended_gpu_{key[:16]}.so"
    if not library.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        include = torch_folder / "include"
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made = Path(folder) / library.name
            command = [
                *(COMPILER, "-O1", "-std=c++20", "-shared", "-fPIC"),
                *(f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"),
                *(str(SOURCE), "-o", str(made)),
                *(f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"),
            ]
            subprocess.run(command, check=True)
            made.replace(library)
    return library


def load() -> None:
    """Give PyTorch the device, before it is imported."""
    if "torch" in sys.modules:
        raise RuntimeError("the pretended GPU must be loaded before torch is imported")
    folder = _torch_folder()
    library = build(folder)
    for needed in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(folder / "lib" / needed), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


class Stream:
    """The only stream."""

    cuda_stream = stream_id = device_index = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def wait_stream(self, stream: Stream) -> None:
        pass


class Current:
    """Which device is current makes no difference."""

    def __init__(self, device: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class Event:
    """The host's clock."""

    def __init__(self, **_: Any) -> None:
        self.recorded = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.recorded = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.recorded - self.recorded)


class Generator:
    """The numbers of a CUDA generator: a seed and an offset. PyTorch draws from the CPU's."""

    def __init__(self) -> None:
        self.offset = 0

    def initial_seed(self) -> int:
        import torch

        return torch.default_generator.initial_seed()

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        self.offset = offset

    def manual_seed(self, seed: int) -> None:
        self.offset = 0

    def get_state(self) -> Any:
        import torch

        return torch.tensor([self.offset]).view(torch.uint8)

    def set_state(self, state: Any) -> None:
        import torch

        self.offset = int(state.view(torch.int64))


def _on_the_cpu(name: str) -> Any:
    """An operation of bitsandbytes, which has code for this device that PyTorch would compile."""
    import torch

    operation = getattr(torch.ops.bitsandbytes, name)

    def moved(value: Any, device: str) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    def computed(*operands: Any) -> Any:
        found = operation(*(moved(value, "cpu") for value in operands))
        return tuple(moved(t, "cuda") for t in found) if type(found) is tuple else found.to("cuda")

    return computed


def _product(a: Any, b: Any, out_dtype: Any) -> Any:
    """A product that is not rounded to the dtype of its operands, which the CPU does not have."""
    return a.to(out_dtype) @ b.to(out_dtype)


def answer() -> None:
    """Let torch.cuda speak of the device."""
    import torch

    if importlib.util.find_spec("bitsandbytes"):
        # Before there is a GPU: it would load its library for CUDA.
        import bitsandbytes  # noqa: F401

        for way in ("quantize", "dequantize"):
            for kind in ("4bit", "blockwise"):
                name = f"{way}_{kind}"
                torch.library.impl(f"bitsandbytes::{name}", "CUDA")(_on_the_cpu(name))
    for name in ("aten::mm.dtype", "aten::bmm.dtype"):
        torch.library.impl(name, "CUDA")(_product)

    cuda, stream, generator = torch.cuda, Stream(), Generator()
    properties = SimpleNamespace(
        name=NAME,
        major=ARCH // 10,
        minor=ARCH % 10,
        multi_processor_count=132,
        L2_cache_size=50 << 20,
        total_memory=80 << 30,
        warp_size=32,
        regs_per_multiprocessor=1 << 16,
        shared_memory_per_block_optin=227 << 10,
        max_threads_per_multi_processor=2048,
    )
    histc = torch.histc

    def histogram(x: torch.Tensor, **options: Any) -> torch.Tensor:
        """Of integers too, which the CPU does not count."""
        return histc(x if x.is_floating_point() else x.float(), **options).to(x.dtype)

    answers: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "_initialized": True,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: NAME,
        "is_bf16_supported": lambda *_, **__: True,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: False,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda stream: stream,
        "device": Current,
        "Stream": Stream,
        "Event": Event,
        "default_generators": (generator,),
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "mem_get_info": lambda device=None: (70 << 30, 80 << 30),
    }
    for name, value in answers.items():
        setattr(cuda, name, value)
    cuda.random.device_count = answers["device_count"]

    def new(shape: Any, strides: Any, dtype: torch.dtype) -> torch.Tensor:
        """What inductor's code allocates by."""
        return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")

    def whole(storage: torch.UntypedStorage) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

    def cloned(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """PyTorch cannot allocate storage on the device without a tensor."""
        return whole(storage).clone().untyped_storage()

    def loaded(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
        """What torch.load has read on the CPU."""
        return whole(storage).cuda().untyped_storage() if location.startswith("cuda") else None

    torch.UntypedStorage.clone = cloned  # type: ignore[method-assign]
    torch.serialization.register_package(0, lambda storage: None, loaded)
    torch._C._dynamo.guards._empty_strided_cuda = new  # type: ignore[attr-defined]
    torch._C._cuda_getDevice = lambda: 0  # type: ignore[attr-defined]
    torch.histc = histogram  # type: ignore[assignment]
    torch.version.cuda = "13.0"  # type: ignore[assignment]


def is_loaded() -> bool:
    """Whether CUDA is pretended in this process."""
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_name() == NAME


def pytest_load_initial_conftests() -> None:
    if can_be():
        load()
        answer()
