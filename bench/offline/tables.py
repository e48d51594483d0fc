"""The counted rows as Markdown tables, which also read well on a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from lora_fast.tuning import cost_model
from lora_fast.tuning.rooflines import EXPOSED_C, L2_SOURCE, ROOFLINES

from .band import SLOW, with_activation
from .contestants import Case
from .counting import MAIN, MODELLED, OURS
from .layers import SHAPES
from .markdown import band_of, kernel_table, table

Rows = list[dict[str, Any]]
LINEAR, LAYER = SHAPES[0].name, SHAPES[1].name


def everything(results: dict[str, Rows], breakdown: Rows) -> str:
    """All tables of one run; ``results`` by part (tasks.PARTS)."""
    counts, launches, kernels = (results[part] for part in ("counts", "launches", "kernels"))
    parts = [
        "# Counted and modelled, not measured",
        _assumptions(),
        "## In short: one Llama-3-8B layer, bfloat16, M = 8192, r = 16, forward + backward",
        in_short(counts, results["whole_layers"]),
        "## The linears and the activation of one layer: M = 8192, r = 16, forward + backward",
        with_mlp(results["activated"]),
        "## Every device: bfloat16, M = 8192, r = 16, forward + backward",
        summary(counts),
        "## The routes that are taken, until a device was measured: r = 16, forward + backward",
        routes(counts),
        "## Targets",
        targets(counts, launches, kernels),
    ]
    for name in dict.fromkeys(row["layer"] for row in counts):
        parts += [f"## {name}, M = 8192, r = 16, forward + backward", _layer(counts, name)]
    parts += ["## lora_fast at other sizes", _sizes(counts)]
    parts += [f"## Where the bytes come from: {MAIN}, sm_90", _breakdown(breakdown)]
    parts += ["## Machine code", kernel_table(kernels)]
    return "\n\n".join(parts) + "\n"


def in_short(counts: Rows, whole_layers: Rows) -> str:
    """The README's table: the linears of a dense decoder layer, times on an H100 from e = 1 down
    to ``band.SLOW``; the slowest first, ours last."""
    saved = {row["who"]: row["saved_bytes"] for row in whole_layers}
    lines = []
    for who in _IN_SHORT:
        (row,) = (
            row
            for row in _select(counts, LAYER, "dense", 0.0)
            if row["who"] == who and row["arch"] in (None, 90)
        )
        cells = (
            _NAMES[who],
            str(row["launches_forward"] + row["launches_backward"]),
            f"{row['extra_bytes'] / 1e9:.1f} GB",
            f"{row['saved_bytes'] / 1e6:.0f} MB",
            f"{saved[who] / 1e6:.0f} MB" if who in saved else "–",
            band_of(row, "H100", digits=2),
        )
        lines.append(tuple(f"**{cell}**" for cell in cells) if who == "lora_fast" else cells)
    head = ("", "launches", "HBM traffic over frozen", "saved by the linears")
    return table((*head, "saved by the layer", "time over frozen, H100"), lines)


_IN_SHORT = ("peft", "unsloth", "lorafusion", "lora_fast")
_NAMES = {
    "peft": "PEFT, bfloat16 adapters",
    "unsloth": "Unsloth (model of its graph)",
    "lorafusion": "LoRAFusion (model of its graph)",
    "lora_fast": "lora_fast",
}


def with_mlp(rows: Rows) -> str:
    """The linears of a decoder layer with the activation of its MLP, as each computes both, over
    the frozen layer as Hugging Face computes it; of ours one row for each device."""
    devices = [r.name for r in ROOFLINES]
    lines = [
        (
            row["weight"],
            row["who"],
            str(row["launches"]),
            f"{row['bytes'] / 1e9:.2f} GB",
            f"{row['saved_bytes'] / 1e6:.0f} MB",
            *(f"{row['over_frozen'][d]:.3f}" if d in row["over_frozen"] else "" for d in devices),
        )
        for row in rows
    ]
    return table(("W", "", "launches", "HBM traffic", "saved", *devices), lines)


def routes(counts: Rows) -> str:
    """Of linear and layers, dense and NF4: the default route and its band, beside the kernels
    alone."""
    lines = []
    for row in _defaults(counts):
        size = tuple(row[key] for key in ("layer", "M", "weight"))
        (device,) = row["over_frozen"]
        alone = [
            other
            for other in counts
            if other["who"] == OURS[1] and device in other["over_frozen"]
            if (other["R"], other["p"], *(other[key] for key in ("layer", "M", "weight")))
            == (16, 0.0, *size)
        ]
        whole = "-"
        shape = next(shape for shape in SHAPES if shape.name == row["layer"])
        if shape.intermediate:
            case = Case(shape, row["M"], 16, row["weight"], 0.0)
            both = (row[name][device] for name in ("over_frozen", "over_frozen_slow"))
            shown = (f"{with_activation(case, ratio, device):.3f}" for ratio in both)
            whole = " – ".join(dict.fromkeys(shown))
        lines.append(
            (
                device,
                *map(str, size),
                "hybrid" if row["weight"] == "dense" else "augmented, hybrid",
                band_of(row, device, digits=3),
                whole,
                *(band_of(other, device, digits=3) for other in alone[:1]),
                *([] if alone else ["-"]),
            )
        )
    head = ("", "", "M", "W", "route", "linears", "linears and activation", "fused, linears")
    return table(head, lines)


def _defaults(counts: Rows) -> Rows:
    wanted = {"who": OURS[0], "R": 16, "p": 0.0}
    found = [row for row in counts if all(row[key] == value for key, value in wanted.items())]
    devices, names = [r.name for r in ROOFLINES], [shape.name for shape in SHAPES]
    return sorted(
        (row for row in found if row["M"] >= 2048),
        key=lambda row: (
            devices.index(next(iter(row["over_frozen"]))), names.index(row["layer"]),
            row["weight"], row["M"],
        ),
    )  # fmt: skip


def summary(counts: Rows) -> str:
    """Everybody's launches, bytes and modelled times, for a dense linear and a decoder layer."""
    lines = []
    for layer in (LINEAR, LAYER):
        for who, rows in _by(_select(counts, layer, "dense", 0.0), "who"):
            first, times = _merged(rows)
            lines.append(
                (
                    layer,
                    f"{who} (model)" if who in MODELLED else who,
                    str(first["launches_forward"] + first["launches_backward"]),
                    f"{first['extra_bytes'] / 1e6:.0f}",
                    f"{first['saved_bytes'] / 1e6:.0f}",
                    *times,
                )
            )
    head = ("", "", "launches", "HBM MB over frozen", "saved for backward, MB")
    return table((*head, *(r.name for r in ROOFLINES)), lines)


def _merged(rows: Rows) -> tuple[dict[str, Any], list[str]]:
    """The counts of sm_90, where it was counted, and the time on each device."""
    first = next((row for row in rows if row["arch"] == 90), rows[0])
    times = [
        next((t for row in rows if (t := band_of(row, r.name, digits=3)) != "-"), "-")
        for r in ROOFLINES
    ]
    return first, times


def _assumptions() -> str:
    devices = "; ".join(
        f"{r.name} {r.flops / 1e12:g} TFLOP/s, {r.bytes / 1e12:g} TB/s ({r.source}), of which "
        f"{r.attained_flops:.0%} and {r.attained_bytes:.0%} are attained ({r.attained_source})"
        for r in ROOFLINES
    )
    caches = ", ".join(f"{r.name} {r.l2 / 1e12:g} TB/s" for r in ROOFLINES if r.l2)
    return (
        "Launches, bytes, FLOPs and saved bytes are counted. Times over the frozen layer are "
        "device times, modelled: each launch takes the longer of its products and its memory "
        f"traffic, at attained rates, and {cost_model.LAUNCH_SECONDS * 1e6:g} µs; nothing "
        "overlaps, and the host keeps up. Triton multiplies as fast as cuBLAS (e = 1) unless "
        "shared memory or L2 is in the way of its tile; a range ends at "
        f"e = {SLOW}, where a product in Triton takes 1 / e of cuBLAS's time. Where cuBLAS adds "
        f"to a matrix, {EXPOSED_C:.0%} of its reading is not hidden. lora_fast is on the routes "
        "that are taken until a device was measured; lora_fast fused has every product in its own "
        f"kernels. Unsloth, LoRAFusion and NeMo are models of their graphs. Peaks: {devices}. "
        f"Reads of L2: {caches} ({L2_SOURCE})."
    )


def targets(counts: Rows, launches: Rows, kernels: Rows) -> str:
    """Targets and counted values, as far as the rows have them."""
    lines = [
        (what, limit, shown, "yes" if met else "NO")
        for what, limit, shown, met in (
            *_targets_of_counts(counts),
            *_targets_of_launches(launches),
            *_targets_of_code(kernels),
        )
    ]
    return table(("target (sm_90, M = 8192, r = 16)", "limit", "counted", "met"), lines)


_Target = tuple[str, str, str, bool]


def _at_most(what: str, limit: float, counted: float, shown: str = "") -> _Target:
    return what, f"≤ {limit:g}", shown or f"{counted:g}", counted <= limit


def _none(what: str, missing: list[str]) -> _Target:
    """A target that every kernel must meet; `missing` lists those that do not."""
    return _at_most(what, 0, len(missing), ", ".join(missing))


def _targets_of_counts(counts: Rows) -> list[_Target]:
    linear, nf4 = (_ours(counts, LINEAR, weight, 0.0, OURS[1]) for weight in ("dense", "nf4"))
    found = []
    if linear:
        extra = linear["extra_bytes"] / 1e6
        # 8 of them are parts of T that 264 CTAs of strips leave, where 128 left half as many.
        found.append(_at_most("linear, fused: HBM MB over frozen", 240, extra, f"{extra:.1f}"))
        for direction, limit in (("forward", 1), ("backward", 3)):
            count = linear[f"launches_{direction}"]
            found.append(_at_most(f"linear, fused: launches {direction}", limit, count))
            if nf4:
                more = nf4[f"launches_{direction}"] - count
                what = f"linear, fused: launches that NF4 adds {direction}"
                found.append(_at_most(what, 1, more))
    fused = _ours(counts, LAYER, "dense", 0.0, OURS[1])
    if fused:
        extra = fused["extra_bytes"] / 1e9
        launches = fused["launches_forward"] + fused["launches_backward"]
        found += [
            _at_most("Llama-3-8B layer, fused: HBM GB over frozen", 1.1, extra, f"{extra:.2f}"),
            _at_most("Llama-3-8B layer, fused: launches", 26, launches),
        ]
    for weight, limit in (("dense", 1.11), ("nf4", 1.09)):
        layer, dropped = (_ours(counts, LAYER, weight, p) for p in (0.0, 0.1))
        if layer:
            what = f"Llama-3-8B layer, {weight}: modelled time over frozen at e = {SLOW}, H100"
            time = layer["over_frozen_slow"]["H100"]
            found.append(_at_most(what, limit, time, f"{time:.3f}"))
        if layer and dropped:
            more = dropped["saved_bytes"] - layer["saved_bytes"]
            what = f"Llama-3-8B layer, {weight}: saved bytes that p = 0.1 adds"
            found.append(_at_most(what, 0, more))
    return found


def _targets_of_launches(launches: Rows) -> list[_Target]:
    """Of few rows, where the GEMM decodes an NF4 weight; the most of any device."""
    by_weight = {(row["arch"], row["M"], row["weight"]): row for row in launches}
    found = []
    for direction in ("forward", "backward"):
        more = [
            row[direction] - by_weight[arch, M, "dense"][direction]
            for (arch, M, weight), row in by_weight.items()
            if M <= 64 and weight == "nf4" and (arch, M, "dense") in by_weight
        ]
        if more:
            what = f"linear, M = 16 and 64, any device: launches that NF4 adds {direction}"
            found.append(_at_most(what, 0, max(more)))
    return found


def _targets_of_code(kernels: Rows) -> list[_Target]:
    found = []
    decoding = [
        row["instructions_per_weight"] for row in kernels if "instructions_per_weight" in row
    ]
    if decoding:
        what = "NF4 workspace, any device: instructions per weight"
        found.append(_at_most(what, 7.5, max(decoding)))
    in_gemm = [
        row
        for row in kernels
        if row["kernel"].startswith("sm_90") and " NF4 " in row["kernel"]
        if row["config"].startswith("M128 N128 K64 ")
    ]
    if in_gemm:
        what = "NF4 in the GEMM, sm_90, 128 × 128 × 64"
        # Why not more of them: docs/kernels.md.
        of_a_layer = re.compile("sm_90 (forward|dX) NF4 r16( p|$)")
        longest = max(sum(row["loops"][row["main_loop"]].values()) for row in in_gemm)
        spilled = [row["kernel"] for row in in_gemm if row["spilled_bytes"]]
        layer = [row for row in in_gemm if of_a_layer.match(row["kernel"])]
        alone = [row["kernel"] for row in layer if row["ctas_per_sm"] < 2]
        found += [
            _at_most(f"{what}: instructions in the K-loop", 250, longest),
            _none(f"{what}: kernels that spill", spilled),
            _none(f"{what}: kernels of a layer, r = 16, without 2 CTAs on a multiprocessor", alone),
        ]
    for arch, wanted in ((90, "HGMMA"), (100, "UTCHMMA")):
        forward = [
            row
            for row in kernels
            if row["kernel"].startswith(f"sm_{arch} forward r") and "main_loop_mma" in row
            # Tiles of fewer rows do not fill these instructions.
            if not row["config"].startswith("M16 ")
        ]
        others = [row["kernel"] for row in forward if row["main_loop_mma"] != [wanted]]
        if forward:
            what = f"dense forward, sm_{arch}: K-loops that do not multiply by {wanted}"
            found.append(_none(what, others))
    spilled = [row["kernel"] for row in kernels if row["spilled_bytes"]]
    found.append(_none("kernels that spill", spilled))
    return found


def _ours(
    counts: Rows, layer: str, weight: str, p: float, who: str = OURS[0]
) -> dict[str, Any] | None:
    for row in _select(counts, layer, weight, p):
        if row["who"] == who and row["arch"] == 90:
            return row
    return None


def _select(counts: Rows, layer: str, weight: str, p: float) -> Rows:
    wanted = {"layer": layer, "weight": weight, "p": p, "M": 8192, "R": 16}
    return [row for row in counts if all(row[key] == value for key, value in wanted.items())]


def _layer(counts: Rows, layer: str) -> str:
    lines = []
    for weight in ("dense", "nf4"):
        for p in (0.0, 0.1):
            for who, rows in _by(_select(counts, layer, weight, p), "who"):
                first, times = _merged(rows)
                lines.append(
                    (
                        weight,
                        f"{p:g}",
                        who,
                        f"{first['launches_forward']} + {first['launches_backward']}",
                        f"{first['flops'] / 1e12:.3f}",
                        f"{first['compulsory_bytes'] / 1e6:.0f}",
                        f"{first['bytes'] / 1e6:.0f}",
                        f"{first['extra_bytes'] / 1e6:.0f}",
                        f"{first['saved_bytes'] / 1e6:.0f}",
                        *times,
                    )
                )
    head = ("W", "p", "who", "launches", "TFLOP", "compulsory MB", "MB", "over frozen", "saved MB")
    return table((*head, *(f"time {r.name}" for r in ROOFLINES)), lines)


def _by(rows: Rows, key: str) -> Iterable[tuple[str, Rows]]:
    names = dict.fromkeys(row[key] for row in rows)
    return [(name, [row for row in rows if row[key] == name]) for name in names]


def _sizes(counts: Rows) -> str:
    """Bytes over frozen and modelled time, ours and PEFT's, for every size, on an H100."""
    lines = []
    for row in counts:
        if row["who"] != "lora_fast" or row["arch"] != 90 or row["p"]:
            continue
        size = tuple(row[key] for key in ("layer", "M", "R", "weight"))
        (peft,) = (
            other
            for other in counts
            if other["who"] == "peft"
            and not other["p"]
            and tuple(other[key] for key in ("layer", "M", "R", "weight")) == size
        )
        lines.append(
            (
                *(str(value) for value in size),
                f"{row['extra_bytes'] / 1e6:.0f}",
                f"{peft['extra_bytes'] / 1e6:.0f}",
                band_of(row, "H100", digits=3),
                band_of(peft, "H100", digits=3),
            )
        )
    head = ("layer", "M", "r", "W", "MB over frozen", "PEFT's", "time over frozen, H100", "PEFT's")
    return table(head, lines)


def _breakdown(rows: Rows) -> str:
    lines = [
        (row["launch"], row["argument"], f"{row['read'] / 1e6:.2f}", f"{row['written'] / 1e6:.2f}")
        for row in rows
    ]
    return table(("launch: pass", "argument", "MB read", "MB written"), lines)
