"""The state of the installation, and the path that each layer of a model would take."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..backends.choice import check_driver, get_backend, uses_triton
from ..features import MISCOMPILED, is_miscompiled, switched_off
from .compile_check import KernelCheck, compile_kernels, parse_arch

REQUIRED = ("torch", "triton", "numpy")
OPTIONAL = ("bitsandbytes", "peft", "transformers", "accelerate", "safetensors", "typer", "rich")
# Extras of pyproject.toml.
OF_THE_LIBRARY, OF_THE_COMMANDS = ("peft", "qlora", "transformers", "trl"), ("train",)
DEFAULT_ARCH = 90
MIN_CAPABILITY = (8, 0)
AUTOCAST = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILERS = (os.environ.get("CC", "cc"), "gcc", "clang")


@dataclass(frozen=True)
class Package:
    """A package, its version (None if absent), and its problem, if any."""

    name: str
    version: str | None
    wanted: str
    problem: str | None


@dataclass(frozen=True)
class LayerPath:
    """Layers of one kind on one path; ``obstacle`` says why it is not the fused one."""

    kind: str
    base: str
    obstacle: str | None
    count: int
    example: str


@dataclass(frozen=True)
class Diagnosis:
    """The findings. ``problems``: what is broken, one line each; ``experts``: which of a mixture
    train and which are quantised; ``warnings``: what the model and
    its adapters would do without a word; ``switched_off``: features that these versions lack,
    without which the rest works."""

    version: str
    python: str
    packages: tuple[Package, ...]
    device: str | None
    backend: str
    backend_reason: str
    arch: int | None
    kernels: tuple[KernelCheck, ...]
    model: str | None
    layers: tuple[LayerPath, ...]
    experts: str | None
    warnings: tuple[str, ...]
    switched_off: tuple[str, ...]
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-compatible values."""
        return {**asdict(self), "healthy": not self.problems}


def diagnose(
    *,
    model: str | None = None,
    adapter: str | None = None,
    config: str | None = None,
    method: str = "lora",
    quantize: str = "none",
    target_modules: str | None = None,
    autocast: str = "none",
    arch: str | None = None,
    kernels: bool = True,
    told: Callable[[str], None] = lambda stage: None,
) -> Diagnosis:
    """Check versions, the GPU, the kernels and, with `model`, the path of each of its layers.

    `model`: a folder, a ``config.json`` or a hub id, of which only the config is read, adapted by
    the adapter in the folder `adapter`, by an ``adapter_config.json`` alone (`config`), else by
    `method` of ``lora-fast train``, with its frozen weights in `quantize`. `autocast` (bf16, fp16)
    is that of the run. `arch` (``sm_90``, …) is the target of the kernels, by default the GPU of
    this machine, else sm_90. ``told(stage)`` is called before slow stages.

    Raises ValueError for arguments that name nothing; broken parts are in the result.
    """
    problems: list[str] = []
    packages = tuple(_packages())
    problems += [f"{p.name} {p.version or 'is absent'}: {p.problem}" for p in packages if p.problem]
    device, capability = _device()
    if device is not None and not any(map(shutil.which, COMPILERS)):
        problems.append("no C compiler is on the PATH: Triton needs one to launch kernels")
    backend, reason = _backend(capability)
    if backend == "triton":
        try:
            check_driver()
        except ValueError as error:
            problems.append(str(error))
    target = parse_arch(arch) if arch else _arch_of(capability)
    # What may be named wrongly comes before what takes a minute.
    layers: tuple[LayerPath, ...] = ()
    warnings: tuple[str, ...] = ()
    experts: str | None = None
    if autocast not in AUTOCAST:
        raise ValueError(f"autocast must be one of {', '.join(AUTOCAST)}, got {autocast!r}")
    if model is not None:
        told(f"Building {model} without its weights")
        layers, warnings, experts = layer_paths(
            model, adapter or config, method, quantize, target_modules,
            autocast=AUTOCAST[autocast], has_weights=adapter is not None,
        )  # fmt: skip
    checks: tuple[KernelCheck, ...] = ()
    if kernels and _is_there("triton"):
        checks = tuple(compile_kernels(target, lambda layer: told(f"Compiling: {layer}")))
    problems += [
        f"{c.layer} does not compile for sm_{target}: {c.error}" for c in checks if c.error
    ]
    return Diagnosis(
        version=__version__,
        python=platform.python_version(),
        packages=packages,
        device=device,
        backend=backend,
        backend_reason=reason,
        arch=target if checks else None,
        kernels=checks,
        model=model,
        layers=layers,
        experts=experts,
        warnings=warnings,
        switched_off=(*switched_off(), *_too_old_for_commands(packages)),
        problems=tuple(problems),
    )


def layer_paths(
    model: str,
    adapter: str | None,
    method: str,
    quantize: str,
    target_modules: str | None,
    *,
    autocast: torch.dtype | None = None,
    has_weights: bool = True,
) -> tuple[tuple[LayerPath, ...], tuple[str, ...], str | None]:
    """The path of each adapted layer of a model that is not loaded, grouped by kind, the lines of
    pitfalls, and one on its experts if it has any. `adapter`: a folder, or unless it
    `has_weights` a config alone."""
    from ..acceleration.expert_summary import about_experts
    from ..acceleration.pitfalls import pitfalls
    from ..acceleration.report import adapted_layers, report
    from ..acceleration.switch import accelerate
    from ..planning.settings import QUANTIZERS
    from ..planning.states import nf4_layers
    from ..skeleton import default_task, imagined, load_config, skeleton

    if quantize not in QUANTIZERS:
        raise ValueError(f"quantize must be one of {', '.join(QUANTIZERS)}, got {quantize!r}")
    config = load_config(model)
    base = skeleton(config, default_task(config) if adapter is None else None, torch.bfloat16)
    quantised = nf4_layers(base) if quantize == "nf4" else {}
    names = {name for name, layer in base.named_modules() if id(layer) in _ids(quantised)}
    wrapped = _wrapped(
        model, base, adapter, method, target_modules, default_task(config), has_weights
    )
    found: Counter[tuple[str, str, str | None]] = Counter()
    example: dict[tuple[str, str, str | None], str] = {}
    with imagined(wrapped) as fake:
        if next(adapted_layers(fake), None) is not None:
            accelerate(fake)
        for layer in report(fake).layers:
            name = layer.name.removeprefix("base_model.model.")
            key = (layer.kind, "nf4" if name in names else layer.base, layer.obstacle)
            found[key] += 1
            example.setdefault(key, name)
        trained = adapter is None and quantize == "nf4"
        said = pitfalls(fake, autocast=autocast, packs_experts=trained)
        experts = about_experts(fake, will_be_packed=trained)
    paths = tuple(LayerPath(*key, count, example[key]) for key, count in found.items())
    return paths, said, experts


def _wrapped(
    name: str,
    base: Any,
    adapter: str | None,
    method: str,
    target_modules: str | None,
    task: str | None,
    has_weights: bool,
) -> nn.Module:
    if adapter is not None:
        from ..files.adapter_files import CONFIG, adapt, adapter_config

        folder = Path(adapter)
        if not has_weights and folder.name == CONFIG:
            folder = folder.parent
        config = adapter_config(folder, has_weights=has_weights)
        wrapped: nn.Module = adapt(base, config, folder)
        return wrapped
    from ..planning.memory import adapted
    from ..planning.settings import Settings

    settings = Settings(method=method, target_modules=target_modules, task=task)
    built: nn.Module = adapted(name, base, settings)
    return built


def _ids(layers: dict[int, nn.Module]) -> set[int]:
    return {id(layer) for layer in layers.values()}


def _packages() -> list[Package]:
    wanted = {**_wanted(*OF_THE_COMMANDS), **_wanted("", *OF_THE_LIBRARY)}
    found = []
    for name in (*REQUIRED, *OPTIONAL):
        specifier = wanted.get(name, "")
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            problem = "needed: pip install " + name if name in REQUIRED else None
            found.append(Package(name, None, specifier, problem))
            continue
        found.append(Package(name, version, specifier, _range_problem(version, specifier)))
    return found


def _wanted(*extras: str) -> dict[str, str]:
    """The version ranges that this package requires in `extras` ("": without an extra); empty in a
    checkout that is not installed."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("lora_fast") or []
    except metadata.PackageNotFoundError:
        return {}
    found = {}
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        is_asked = any(marker is None or marker.evaluate({"extra": extra}) for extra in extras)
        if requirement.specifier and is_asked:
            found[requirement.name] = str(requirement.specifier)
    return found


def _too_old_for_commands(packages: Iterable[Package]) -> list[str]:
    """Packages that suffice for the library, but not for the command line."""
    wanted = _wanted(*OF_THE_COMMANDS)
    return [
        f"lora-fast's commands: need {p.name} {wanted[p.name]}, got {p.version}"
        for p in packages
        if p.version and p.name in wanted and not p.problem
        if _range_problem(p.version, wanted[p.name])
    ]


def _range_problem(version: str, specifier: str) -> str | None:
    from packaging.specifiers import SpecifierSet

    inside = SpecifierSet(specifier).contains(version, prereleases=True)
    return None if inside else f"must be {specifier}"


def _is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _device() -> tuple[str | None, tuple[int, int] | None]:
    if not torch.cuda.is_available():
        return None, None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    capability = (properties.major, properties.minor)
    memory = properties.total_memory / 1e9
    return f"{properties.name}, sm_{capability[0]}{capability[1]}, {memory:.0f} GB", capability


def _arch_of(capability: tuple[int, int] | None) -> int:
    if capability is None:
        return DEFAULT_ARCH
    try:
        return parse_arch(f"{capability[0]}{capability[1]}")
    except ValueError:
        return DEFAULT_ARCH


def _backend(capability: tuple[int, int] | None) -> tuple[str, str]:
    """The backend, and why it was chosen."""
    choice = get_backend()
    if choice != "auto":
        return choice, "chosen by LORA_FAST_BACKEND or set_backend"
    if capability is None:
        return "torch", "no CUDA device"
    if uses_triton(torch.device("cuda", torch.cuda.current_device())):
        return "triton", "a CUDA device of compute capability 8.0 or more"
    if not _is_there("triton"):
        return "torch", "Triton is not installed"
    if capability < MIN_CAPABILITY:
        return "torch", "the device is older than compute capability 8.0"
    if is_miscompiled(capability[0]):
        return "torch", MISCOMPILED
    return "torch", "not an NVIDIA device"
