"""``lora-fast tune``: time the kernels that a model will launch, before it trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import TrainingError, first_line
from ..methods.options import BATCH_SIZE, MAX_LENGTH
from ..methods.table import METHODS
from . import options as opt
from .errors import EXIT_ERROR, one_line_errors
from .plan import ModelArgument, PlanDtype, PlanQuantize, PlanRank

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from ..planning.replica import Replica

TOKENS = str(BATCH_SIZE["causal-lm"] * MAX_LENGTH["causal-lm"])
TuneMethod = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help=f"Fine-tuning method: {', '.join(n for n, m in METHODS.items() if m.fused)}.",
    ),
]
Tokens = Annotated[
    str,
    typer.Option(
        metavar="N,N",
        help="Rows of a batch (size times length), one or more numbers; default: those of "
        "lora-fast train.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be timed and stop.")]


def tune(
    model: ModelArgument,
    method: TuneMethod = "lora",
    quantize: PlanQuantize = None,
    r: PlanRank = None,
    dropout: opt.Dropout = None,
    target_modules: opt.TargetModules = None,
    dtype: PlanDtype = "bfloat16",
    tokens: Tokens = TOKENS,
    dry_run: DryRun = False,
    debug: opt.Debug = False,
) -> None:
    """Time every way to compute each kind of layer of a model, on this GPU, and keep the fastest.

    Training then starts from these choices and times nothing. One layer of each kind is built with
    random weights; the model itself is not loaded.
    """
    options = {
        "method": method,
        "quantize": quantize,
        "r": r,
        "dropout": dropout,
        "target_modules": target_modules,
        "dtype": dtype,
    }
    with one_line_errors(Path(), debug=debug, interruption=_kept):
        try:
            timed = _tune(model, options, _numbers(tokens), dry_run=dry_run, debug=debug)
        except (ValueError, TypeError) as error:
            raise TrainingError(first_line(error)) from error
    if not timed:
        raise typer.Exit(EXIT_ERROR)


def _tune(
    model: str, options: dict[str, Any], tokens: list[int], *, dry_run: bool, debug: bool
) -> bool:
    """Whether anything was timed, or was to be."""
    from rich.console import Console

    from .console import Working, quiet_libraries

    if not debug:
        quiet_libraries()
    with Working() as working:
        working.told(f"Building {model} without its weights")
        from ..planning.replica import replica

        layers = replica(model, **options)
    console = Console(highlight=False)
    _show(console, model, layers, tokens)
    if dry_run or not layers.alike:
        return True
    device = gpu()
    if device is None:
        console.print(
            "[yellow]![/] no GPU that lora_fast has kernels for: nothing was timed or stored. "
            "Run this command on the machine that trains."
        )
        return False
    layers.materialise(device)
    _time(console, layers, tokens)
    return True


def gpu() -> torch.device | None:
    """The GPU to time; None without one."""
    import torch

    from ..backends.choice import uses_triton

    device = torch.device("cuda")
    return device if torch.cuda.is_available() and uses_triton(device) else None


def _show(console: Console, model: str, layers: Replica, tokens: list[int]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from ..acceleration.warm_up import base_of
    from .console import print_whole

    for note in layers.notes:
        console.print(f"[yellow]![/] {escape(note)}")
    for reason, count in layers.plain.items():
        console.print(f"[yellow]![/] {count} layers are not timed: {escape(reason)}")
    if not layers.alike:
        console.print(f"[bold]{escape(model)}[/]: no layer of it runs fused: nothing to time")
        return
    table = Table(box=None, pad_edge=False)
    for title in ("layers", "in", "out", "times"):
        table.add_column(title, justify="left" if title == "layers" else "right")
    for path, parent in layers.named_children():
        for name, layer in parent.named_children():
            if not hasattr(layer, "base_layer"):  # of an MLP: its activation, a layer not adapted
                continue
            base = base_of(layer)
            sizes = (str(base.in_features), str(base.out_features), str(layers.alike[path]))
            table.add_row(escape(_dotted(f"{path}.{name}")), *sizes)
    console.print(f"[bold]{escape(model)}[/]: forward and backward for {_listed(tokens)} rows of")
    print_whole(console, table)


def _time(console: Console, layers: Replica, tokens: list[int]) -> None:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from ..acceleration.warm_up import warm_up
    from ..tuning.tuner import tuner

    tuner.times = True
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("Compiling and timing")

        def progress(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=_dotted(name))
            if not console.is_terminal:
                console.print(f"  {done + 1}/{total} {_dotted(name)}")

        warm_up(layers.train(), tokens, progress=progress)
    for path, count in tuner.kept().items():
        console.print(f"[green]✓[/] {count} operations known for this device: {path}")


def _dotted(path: str) -> str:
    """The path of a layer in the model; in the replica, names of modules cannot have dots."""
    return path.replace("/", ".")


def _numbers(tokens: str) -> list[int]:
    words = [word.strip() for word in tokens.split(",")]
    if not all(word.isascii() and word.isdecimal() and int(word) > 0 for word in words):
        raise TrainingError(f"--tokens must be positive integers with commas, got {tokens!r}")
    return [int(word) for word in words]


def _listed(tokens: list[int]) -> str:
    *others, last = map(str, tokens)
    return f"{', '.join(others)} and {last}" if others else last


def _kept(stop: BaseException, out: Path) -> str:
    return "interrupted; the timings so far are stored"
