"""``lora-fast plan``: the memory that a run needs, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import TrainingError, first_line
from ..magnitudes import short_count, short_size
from ..training import config
from . import options as opt
from .errors import EXIT_ERROR, one_line_errors

if TYPE_CHECKING:
    from rich.console import Console

    from ..planning import MemoryPlan

PLANNED = "Plan"
BAR = 24
SHOWN_CHANGES = 3
# A part smaller than the total by more than this has no row of its own.
NEGLIGIBLE = 100_000

ModelArgument = Annotated[
    str, typer.Argument(metavar="FOLDER|config.json|HUB_ID", help="Only its config is read.")
]
PlanMethod = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Method of lora-fast train, or full (16-bit: with a float32 master copy).",
        rich_help_panel=PLANNED,
    ),
]
PlanQuantize = Annotated[
    str | None,
    typer.Option(
        metavar="nf4|none",
        help="Frozen weights in 4 bits: nf4, as lora-fast train; full: none.",
        rich_help_panel=PLANNED,
    ),
]
PlanDtype = Annotated[
    str,
    typer.Option(
        metavar="bfloat16|float16|float32",
        help="Dtype of weights and computation; adapters are float32.",
        rich_help_panel=PLANNED,
    ),
]
PlanTask = Annotated[
    str | None,
    typer.Option(
        metavar="causal-lm|classification",
        help="Default: causal-lm if the architecture is one, else classification.",
        rich_help_panel=PLANNED,
    ),
]
PlanBatch = Annotated[
    int | None,
    typer.Option(
        help=f"Examples per batch (default {config.BATCH_SIZE['causal-lm']}; "
        f"classification {config.BATCH_SIZE['classification']}).",
        rich_help_panel=PLANNED,
    ),
]
PlanLength = Annotated[
    int | None,
    typer.Option(
        help=f"Tokens per example (default {config.MAX_LENGTH['causal-lm']}; classification "
        f"{config.MAX_LENGTH['classification']}; at most the model's limit).",
        rich_help_panel=PLANNED,
    ),
]
PlanOptim = Annotated[
    str,
    typer.Option(
        help="adamw_torch, adamw_torch_fused, adamw_8bit, paged_adamw_32bit, paged_adamw_8bit, "
        "sgd.",
        rich_help_panel=PLANNED,
    ),
]
PlanRank = Annotated[int | None, typer.Option("--r", help="Rank.", rich_help_panel=PLANNED)]
StockPeft = Annotated[
    bool,
    typer.Option(
        "--stock", help="Plan for stock PEFT instead of lora_fast.", rich_help_panel=PLANNED
    ),
]
Card = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="One of t4, rtx3090, rtx4090, rtx5090, l4, a10g, a6000, l40s, a100-40, a100-80, h100, "
        "h200, b200, mi300x.",
        rich_help_panel="Fits on",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Or the GPU's memory: 24GB, 80GiB.", rich_help_panel="Fits on"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def plan(
    model: ModelArgument,
    method: PlanMethod = "lora",
    quantize: PlanQuantize = None,
    r: PlanRank = None,
    dropout: opt.Dropout = None,
    target_modules: opt.TargetModules = None,
    experts: opt.Experts = False,
    dtype: PlanDtype = "bfloat16",
    task: PlanTask = None,
    batch_size: PlanBatch = None,
    max_length: PlanLength = None,
    gradient_checkpointing: opt.GradientCheckpointing = False,
    optim: PlanOptim = "adamw_torch",
    stock: StockPeft = False,
    card: Card = None,
    memory: Memory = None,
    as_json: Json = False,
    debug: opt.Debug = False,
) -> None:
    """Count the memory of a training step, part by part, before anything is loaded.

    The defaults are those of lora-fast train on a GPU. With --card or --memory, the exit code is 1
    if it does not fit.
    """
    settings = {
        "method": method,
        "quantize": quantize,
        "r": r,
        "dropout": dropout,
        "target_modules": target_modules,
        "experts": experts,
        "dtype": dtype,
        "task": task,
        "batch_size": batch_size,
        "max_length": max_length,
        "gradient_checkpointing": gradient_checkpointing,
        "optim": optim,
        "fused": not stock,
    }
    with one_line_errors(Path(), debug=debug, interruption=lambda *_: "interrupted"):
        try:
            fitting = _plan(model, settings, card, memory, as_json=as_json, debug=debug)
        except (ValueError, TypeError) as error:
            raise TrainingError(first_line(error)) from error
    if not fitting:
        raise typer.Exit(EXIT_ERROR)


def _plan(
    model: str,
    settings: dict[str, Any],
    card: str | None,
    memory: str | None,
    *,
    as_json: bool,
    debug: bool,
) -> bool:
    from .console import Working, quiet_libraries

    if not debug:
        quiet_libraries()
    from ..files.sizes import parse_memory
    from ..planning import cards

    if card is not None and memory is not None:
        raise TrainingError("--card and --memory must not be given together")
    room = cards.card_bytes(card) if card else parse_memory(memory) if memory else None
    import lora_fast

    with Working() as working:
        found = lora_fast.plan(model, told=working.told, **settings)
    fitting = room is None or cards.fits(found.total, room)
    if as_json:
        import json

        room_facts = {"memory": room, "fits": None if room is None else fitting}
        print(json.dumps({**found.to_dict(), **room_facts}, indent=2))
    else:
        from rich.console import Console

        show_plan(Console(highlight=False), found, room, card or memory)
    return fitting


def show_plan(console: Console, found: MemoryPlan, room: int | None, place: str | None) -> None:
    """Print the parts, the cards they fit on and the changes that would help."""
    from rich.markup import escape
    from rich.table import Table

    from ..planning import cards
    from .console import print_whole

    s = found.settings
    console.print(
        f"[bold]{escape(found.model)}[/]: {short_count(found.parameters)} parameters, "
        f"{short_count(found.trainable)} train; {s.method}"
        f"{f' r={s.rank}' if s.rank else ''}, {s.task or 'its own task'}, "
        f"batch {s.batch_size} × {s.max_length} tokens"
        f"{', checkpointing' if s.gradient_checkpointing else ''}, {s.optim}"
    )
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="cyan")
    for name, size in visible(found.parts).items():
        bar = "█" * round(BAR * size / found.total)
        table.add_row(name, short_size(size), bar)
    table.add_row("[bold]total[/]", f"[bold]{short_size(found.total)}[/]", "")
    print_whole(console, table)
    if found.paged:
        console.print(f"optimizer state that may be paged to the host: {short_size(found.paged)}")
    if found.activations is not None:
        with_, without = found.activations["with_checkpointing"], found.activations["without"]
        console.print(
            f"[dim]activations: {short_size(without)}, with checkpointing {short_size(with_)}; "
            f"not counted: {short_size(cards.RESERVE)} for the CUDA context and fragmentation[/]"
        )
    for note in found.notes:
        console.print(f"[yellow]![/] {escape(note)}")
    _show_room(console, found, room, place)


def visible(parts: Mapping[str, int]) -> dict[str, int]:
    """The parts that get a row: no few bytes beside gigabytes; JSON has all of them."""
    total = sum(parts.values())
    return {name: size for name, size in parts.items() if size and size >= total / NEGLIGIBLE}


def _show_room(console: Console, found: MemoryPlan, room: int | None, place: str | None) -> None:
    from ..planning import cards

    if room is None:
        names = [name for name, size in cards.CARDS.items() if cards.fits(found.total, size << 20)]
        dtype = found.settings.dtype
        shown = ", ".join(f"{name}{cards.caveat(name, dtype)}" for name in names)
        console.print(f"fits on: {shown or 'none of the cards in the table'}")
    elif cards.fits(found.total, room):
        left = room - found.total - cards.RESERVE
        caveat = cards.caveat(str(place).lower(), found.settings.dtype)
        room_left = f"({short_size(room)}), {short_size(left)} to spare"
        console.print(f"[green]✓[/] fits on {place}{caveat} {room_left}")
    else:
        over = found.total + cards.RESERVE - room
        missing = f"{short_size(over)} too much"
        console.print(f"[red]✗[/] does not fit on {place} ({short_size(room)}): {missing}")
    for number, change in enumerate(found.changes[:SHOWN_CHANGES]):
        enough = ""
        if room is not None and not cards.fits(found.total, room):
            enough = ", then it fits" if cards.fits(found.total - change.saves, room) else ""
        label = "helps most:" if number == 0 else "           "
        console.print(f"{label} {change.what} saves {short_size(change.saves)}{enough}")
