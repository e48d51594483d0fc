"""The tables at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..training.comparison_table import (
    BASELINE_TITLES,
    SCORE_TITLES,
    caption,
    table,
    without_numbers,
)
from ..training.run import Outcome
from .console import ARM_TITLES, print_whole


def show_outcome(console: Console, outcome: Outcome) -> None:
    """Print the scores, the costs, the fused layers and where everything is."""
    found = outcome.metrics
    console.print()
    print_whole(console, score_table(found))
    print_whole(console, cost_table(found))
    console.print(fused_line(found))
    for reason, count in found["fused"]["fallback_calls"].items():
        console.print(f"  [yellow]plain PEFT path, {count:,} calls: {escape(reason)}[/]")
    if "comparison" in found:
        difference = _number(found["comparison"]["max_relative_loss_difference"], "{:.1e}")
        masks = " (each draws its own dropout masks)" if found["config"]["dropout"] else ""
        console.print(f"Largest difference of the two loss curves: {difference}, relative{masks}")
    console.print(f"\nAdapter, metrics.json, pictures: [bold]{escape(str(outcome.out))}[/]")
    console.print("[dim]README.md there has the code that loads what was trained.[/]")


def show_comparison(console: Console, found: dict[str, Any], out: Path) -> None:
    """Print the table of a comparison, its baselines, the failures and where everything is."""
    head, rows = table(found)
    shown = _table(head[0])
    for title in head[1:]:
        shown.add_column(title, justify="right")
    for row, method in zip(rows, found["methods"].values(), strict=True):
        why = without_numbers(method)
        shown.add_row(*map(escape, row) if why is None else (row[0], why[0]))
    console.print()
    print_whole(console, shown)
    console.print(f"  [dim]{caption(found)}[/]")
    for name, scores in found["baselines"].items():
        text = ", ".join(
            f"{SCORE_TITLES[key]} {scores[key]:.3f}" for key in found["scores"] if key in scores
        )
        console.print(f"  [dim]{BASELINE_TITLES[name]}: {text}[/]")
    for row in found["methods"].values():
        why = without_numbers(row)
        if why is not None:
            colour = "red" if "error" in row else "yellow"
            console.print(f"[{colour}]{escape(row['title'])} {why[0]}: {escape(why[1])}[/]")
    console.print(f"\ncompare.json, compare.md, compare.png: [bold]{escape(str(out))}[/]")


def score_table(found: dict[str, Any]) -> Table:
    """Held-out scores of the baselines and of what was trained, a row each."""
    rows = {BASELINE_TITLES[name]: scores for name, scores in found["baselines"].items()}
    rows |= {ARM_TITLES[name]: arm["held_out"] for name, arm in found["results"].items()}
    shown = [name for name in SCORE_TITLES if any(name in scores for scores in rows.values())]
    table = _table(f"{found['examples']['held_out']:,} held-out examples")
    for name in shown:
        table.add_column(SCORE_TITLES[name], justify="right")
    for title, scores in rows.items():
        style = "bold" if title == ARM_TITLES["lora_fast"] else None
        cells = (_number(scores[name], "{:.3f}") if name in scores else "" for name in shown)
        table.add_row(title, *cells, style=style)
    return table


def cost_table(found: dict[str, Any]) -> Table:
    """What training cost; beside stock PEFT, with ratios, when comparing."""
    results = found["results"]
    comparison = found.get("comparison")
    arms = [name for name in ("stock", "lora_fast") if name in results]
    table = _table("training")
    for name in arms:
        table.add_column(ARM_TITLES[name], justify="right")
    if comparison:
        table.add_column("ratio", justify="right")

    def row(title: str, values: list[str], ratio: float | None = None) -> None:
        shown = [f"{ratio:.3f}" if ratio is not None else ""] if comparison else []
        table.add_row(title, *values, *shown)

    trained, share = found["trainable_parameters"], found["trainable_percent"]
    row("trainable parameters", [f"{trained:,} ({share:.2f}%)"] * len(arms))
    # Of two arms, one after the other: the load of the machine may differ by more than they do.
    apart = ", one after the other" if comparison else ""
    row(f"tokens/s{apart}", [_number(results[a]["tokens_per_second"], "{:,.0f}") for a in arms])
    row(f"step time{apart}", [_number(results[a]["step_seconds"], "{:.3f} s") for a in arms])
    if comparison:
        turns, pairs = comparison["forward_backward_seconds"], comparison["timed_pairs"]
        values = [f"{turns[a]:.3f} s" for a in arms]
        quotient = turns["lora_fast"] / turns["stock"]
        row("forward + backward, in turns", values, quotient)
        row(f"ratio of {pairs} pairs, median", [""] * len(arms), comparison["step_time_ratio"])
    saved = [results[a]["saved_activation_bytes"] for a in arms]
    ratio = comparison["saved_activation_ratio"] if comparison else None
    row("activations saved for backward", [_bytes(value) for value in saved], ratio)
    return table


def fused_line(found: dict[str, Any]) -> str:
    """How many of the adapted layers run fused, and how often they did."""
    fused = found["fused"]
    if not fused["adapted_layers"]:
        return "No adapted linear layers: nothing to fuse"
    colour = "green" if fused["all_fused"] else "yellow"
    slow = sum(fused["fallback_calls"].values())
    uncounted = fused.get("uncounted_layers", 0)  # not in the metrics of an older run
    apart = f"; the {uncounted} that stay PEFT's run its code at every step" if uncounted else ""
    calls = f"{fused['fused_calls']:,} fused calls, {slow:,} others{apart}"
    return (
        f"[{colour}]{fused['fused_layers']} of {fused['adapted_layers']} adapted layers fused[/] "
        f"({fused['backend']} backend): {calls}"
    )


def _table(title: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(title)
    return table


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _bytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 2**20:,.1f} MiB"
