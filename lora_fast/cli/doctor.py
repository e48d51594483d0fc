"""``lora-fast doctor``: what is installed, what compiles, and which path a model's layers take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import TrainingError, first_line
from . import options as opt
from .errors import EXIT_ERROR, one_line_errors

if TYPE_CHECKING:
    from rich.console import Console

    from ..doctor.diagnosis import Diagnosis

MODEL = "Layers of a model"
Model = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|config.json|HUB_ID",
        help="Show which path each layer would take; only the config is read.",
        rich_help_panel=MODEL,
    ),
]
AdapterOption = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="With this adapter.", rich_help_panel=MODEL),
]
ConfigOption = Annotated[
    str | None,
    typer.Option(
        metavar="adapter_config.json",
        help="Or with a new adapter of this config.",
        rich_help_panel=MODEL,
    ),
]
AutocastOption = Annotated[
    str,
    typer.Option(metavar="bf16|fp16|none", help="Autocast of the run.", rich_help_panel=MODEL),
]
MethodOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Or with an adapter as lora-fast train makes it.",
        rich_help_panel=MODEL,
    ),
]
QuantizeOption = Annotated[
    str,
    typer.Option(
        metavar="nf4|none",
        help="Storage of the frozen weights: nf4, as lora-fast train.",
        rich_help_panel=MODEL,
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        metavar="sm_80 … sm_120", help="Compile for this GPU (default: the one here, else sm_90)."
    ),
]
Kernels = Annotated[
    bool, typer.Option(help="Compile the kernels, which takes up to a minute once.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def doctor(
    model: Model = None,
    adapter: AdapterOption = None,
    config: ConfigOption = None,
    method: MethodOption = "lora",
    quantize: QuantizeOption = "nf4",
    target_modules: opt.TargetModules = None,
    autocast: AutocastOption = "none",
    arch: Arch = None,
    kernels: Kernels = True,
    as_json: Json = False,
    debug: opt.Debug = False,
) -> None:
    """Show versions, the GPU, the backend, which kernels compile and which layers run fused.

    Of a model it warns of what it and its adapters would do without a word: experts that nothing
    trains, adapters that a fused loss ignores, target modules that match nothing, …

    The exit code is 1 if something is broken.
    """
    with one_line_errors(Path(), debug=debug, interruption=lambda *_: "interrupted"):
        from rich.console import Console

        from .console import Working, quiet_libraries

        if not debug:
            quiet_libraries()
        from ..doctor.diagnosis import diagnose

        console = Console(highlight=False)
        try:
            with Working() as working:
                working.told("Looking")
                found = diagnose(
                    model=model,
                    adapter=adapter,
                    config=config,
                    method=method,
                    quantize=quantize,
                    target_modules=target_modules,
                    autocast=autocast,
                    arch=arch,
                    kernels=kernels,
                    told=working.told,
                )
        except (ValueError, NotImplementedError) as error:
            raise TrainingError(first_line(error)) from error
        if as_json:
            import json

            print(json.dumps(found.to_dict(), indent=2))
        else:
            show_diagnosis(console, found)
    if found.problems:
        raise typer.Exit(EXIT_ERROR)


def show_diagnosis(console: Console, found: Diagnosis) -> None:
    """Print one screen."""
    from rich.markup import escape

    versions = (f"{p.name} {p.version or '–'}" for p in found.packages)
    console.print(f"[bold]lora_fast {found.version}[/], Python {found.python}")
    console.print(f"[dim]{escape(', '.join(versions))}[/]")
    console.print(f"GPU      {escape(found.device or 'none')}")
    console.print(f"backend  {found.backend}: {found.backend_reason}")
    if found.kernels:
        _show_kernels(console, found)
    if found.model is not None:
        _show_layers(console, found)
    for warning in found.warnings:
        console.print(f"[yellow]![/] {escape(warning)}")
    for reason in found.switched_off:
        console.print(f"[yellow]off[/]      {escape(reason)}")
    for problem in found.problems:
        console.print(f"[red]✗[/] {escape(problem)}")
    if not found.problems:
        console.print("[green]✓[/] nothing is broken")


def _show_kernels(console: Console, found: Diagnosis) -> None:
    from rich.markup import escape

    names: dict[str, list[str]] = {}
    seconds: dict[str, float] = {}
    for check in found.kernels:
        size = f" {check.shared_bytes / 1024:.0f} K"
        text = f"[red]{escape(check.error)}[/]" if check.error else f"{check.kernel}[dim]{size}[/]"
        names.setdefault(check.layer, []).append(text)
        seconds[check.layer] = check.seconds
    console.print(f"kernels  for sm_{found.arch}, with shared memory of a block:")
    width = max(map(len, names))
    for layer, kernels in names.items():
        took = f"[dim]{seconds[layer]:.1f} s[/]"
        console.print(f"  {escape(layer):<{width}}  {', '.join(kernels)}  {took}")


def _show_layers(console: Console, found: Diagnosis) -> None:
    from rich.markup import escape

    console.print(f"layers   of {escape(str(found.model))}, as they would run:")
    if not found.layers:
        console.print("  none is adapted by a layer of its own: nothing to fuse")
    for path in found.layers:
        how = "[green]fused[/]" if path.obstacle is None else f"[yellow]{escape(path.obstacle)}[/]"
        console.print(
            f"  {path.count} × {path.kind} on {path.base}: {how} [dim]({escape(path.example)})[/]"
        )
    if found.experts:
        console.print(f"  {found.experts}")
