"""The table of a comparison, as text: for the terminal, and for ``compare.md``."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from ..magnitudes import short_count
from .encoding import describe_examples

Result = dict[str, Any]

SCORE_TITLES = {
    "accuracy": "accuracy",
    "f1": "F1",
    "roc_auc": "ROC AUC",
    "loss": "loss",
    "perplexity": "perplexity",
}
BASELINE_TITLES = {
    "majority": "majority class",
    "linear_probe": "linear probe, frozen model",
    "base_model": "before training",
}


def facts(found: Result) -> list[tuple[str, str]]:
    """What the methods have in common, by name."""
    config = found["config"]
    kind = "NF4" if found["quantized"] == "nf4" else "unquantised"
    seeds = ", ".join(map(str, found["seeds"]))
    size = config["batch_size"] * config["grad_accum"]
    length = f"{config['steps']:,} steps" if config["steps"] else f"{config['epochs']:g} epochs"
    return [
        (
            "Model",
            f"{found['model']}, {short_count(found['parameters'])} parameters, {kind}, "
            f"{found['dtype']} on {found['device']} ({found['threads']} threads)",
        ),
        ("Data", describe_examples(found["examples"])),
        ("Runs", f"{length} of {size} examples, seed {seeds}"),
    ]


def picture_title(found: Result) -> str:
    """What the picture of a comparison is of."""
    config = found["config"]
    kind = "NF4" if found["quantized"] == "nf4" else "unquantised"
    seeds = ", ".join(map(str, found["seeds"]))
    size = config["batch_size"] * config["grad_accum"]
    length = f"{config['steps']:,} steps" if config["steps"] else f"{config['epochs']:g} epochs"
    return (
        f"{len(found['methods'])} methods on {found['model']} ({kind}, {found['dtype']}), "
        f"{found['device']}\n{Path(config['data']).name}: {found['examples']['train']:,} examples "
        f"to train, {found['examples']['held_out']:,} held out; {length} of {size}, seed {seeds}"
    )


def caption(found: Result) -> str:
    """What the columns of costs mean."""
    return (
        "step: time of one step, in units of forward and backward of the frozen model without an "
        f"adapter (the floor); memory: {found['memory']}; fused: layers, of those adapted"
    )


def table(found: Result) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the table, as text; a failed method shows its reason."""
    head = ["method", "trained", "step", "memory", "fused"]
    head += [SCORE_TITLES[name] for name in found["scores"]]
    return head, [_row(row, found["scores"]) for row in found["methods"].values()]


def _row(row: Result, scores: list[str]) -> list[str]:
    why = without_numbers(row)
    if why is not None:
        return [row["title"], ": ".join(why)]
    memory = row["memory_bytes"]
    fused = f"{row['fused_layers']} of {row['adapted_layers']}" if row["adapted_layers"] else "–"
    return [
        row["title"],
        f"{row['trainable_percent']:.3f}%",
        f"{row['step_ratio']:.2f}",
        "–" if memory is None else f"{memory / 2**20:,.1f} MiB",
        fused,
        *(spread(row["scores"][name]) for name in scores),
    ]


def without_numbers(row: Result) -> tuple[str, str] | None:
    """What became of a method that has no numbers, and why; None for one that has."""
    for key, what in (("error", "failed"), ("not_applicable", "does not apply")):
        if key in row:
            return what, row[key]
    return None


def spread(values: list[float]) -> str:
    """The mean, and with several seeds the standard deviation: ``0.812 ± 0.004``."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"


def markdown(found: Result) -> str:
    """The comparison as Markdown."""
    head, rows = table(found)
    lines = [f"# {len(rows)} methods on {found['model']}", ""]
    lines += [f"{name}: {text}  " for name, text in facts(found)]
    lines += ["", f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for row in rows:
        cells = [*row, *[""] * (len(head) - len(row))]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, "", caption(found)]) + "\n"
