"""``lora-fast merge``: merge an adapter into its base model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ..errors import RunFailure, TrainingError, check_utf8, first_line
from . import options as opt
from .errors import one_line_errors

Base = Annotated[
    str,
    typer.Argument(metavar="BASE", help="Base model: folder or hub id; 16-bit, float32 or 4-bit."),
]
Adapter = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="Adapter folder written by lora-fast or PEFT.")
]
MergedOut = Annotated[
    Path, typer.Argument(metavar="OUT", help="A new folder, outside BASE and ADAPTER.")
]
MergedDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="bfloat16|float16|float32",
        help="Data type of the result (default: the base's).",
    ),
]
ShardSize = Annotated[
    str,
    typer.Option(metavar="SIZE", help="Largest file, and so the memory needed: 5GB, 500MiB."),
]
Replace = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace the model in OUT, if OUT holds nothing else."),
]


def merge(
    base: Base,
    adapter: Adapter,
    out: MergedOut,
    dtype: MergedDtype = None,
    max_shard_size: ShardSize = "5GB",
    overwrite: Replace = False,
    debug: opt.Debug = False,
) -> None:
    """Merge an adapter into its base model and write the result, shard by shard.

    OUT appears once it is complete; an interrupted merge leaves OUT as it was.

    A killed merge leaves .OUT.merging beside OUT, which the next merge into OUT deletes.
    """
    with one_line_errors(
        out, debug=debug, interruption=lambda *_: f"interrupted; {out} holds no half model"
    ):
        check_utf8("OUT", str(out))
        try:
            _merge(base, adapter, out, dtype, max_shard_size, overwrite=overwrite, debug=debug)
        except FileExistsError as error:
            choice = "choose another, or replace a model with --overwrite"
            raise TrainingError(f"{first_line(error)}: {choice}") from error
        except (ValueError, NotImplementedError) as error:
            raise TrainingError(first_line(error)) from error
        except BlockingIOError as error:
            raise RunFailure(first_line(error)) from error


def _merge(
    base: str,
    adapter: Path,
    out: Path,
    dtype: str | None,
    max_shard_size: str,
    *,
    overwrite: bool,
    debug: bool,
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from ..magnitudes import short_size
    from .console import duration, quiet_libraries

    if not debug:
        quiet_libraries()
    from ..export import merge_checkpoint

    began = time.monotonic()
    console = Console(highlight=False)
    columns = (
        TextColumn("Merging"),
        BarColumn(bar_width=30),
        DownloadColumn(),
        TimeRemainingColumn(compact=True),
    )
    quiet = not console.is_terminal  # a bar would leave an empty line in a log
    with Progress(*columns, console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task("", total=None)
        merge_checkpoint(
            base,
            adapter,
            out,
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            note=lambda line: console.print(f"[yellow]![/] {escape(line)}", soft_wrap=True),
        )
    shards = [path.stat().st_size for path in out.glob("model*.safetensors")]
    files = "1 shard" if len(shards) == 1 else f"{len(shards)} shards"
    took = duration(time.monotonic() - began)
    console.print(
        f"[green]✓[/] {escape(str(out))} [dim]{short_size(sum(shards))} in {files}, {took}[/]",
        soft_wrap=True,
    )
