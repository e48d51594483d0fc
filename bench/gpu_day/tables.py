"""Tables of the report: rows of the journal in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .modelled import Modelled

Rows = dict[str, dict[str, Any]]
_REASONS = 200


def steps(found: dict[str, dict[str, Any]]) -> str:
    """The outcome of each step."""
    lines = []
    for name, step in found.items():
        refuted = sum(row.get("ok") is False for row in step["rows"].values())
        state = step["stopped"] or ("finished" if step["finished"] else "not finished")
        if step["absent"]:
            state += f", {len(step['absent'])} without "
            state += ", ".join(sorted(set(step["absent"].values())))
        seconds = sum(row["seconds"] for row in step["rows"].values())
        done = f"{len(step['rows'])} of {len(step['units'])}"
        lines.append((name, done, str(refuted), str(len(step["broken"])), f"{seconds:.0f}", state))
    return table(("step", "units with a result", "failed", "broken", "seconds", "state"), lines)


def failures(found: dict[str, dict[str, Any]]) -> str:
    """Every failure and its reason; empty if there is none."""
    lines = []
    for name, step in found.items():
        if step["stopped"]:
            lines.append(f"- {name}: {step['stopped']}")
        lines += [f"- {name}, {unit}: {reason}" for unit, reason in step["broken"].items()]
        for unit, row in step["rows"].items():
            if row.get("ok") is False:
                lines.append(f"- {name}, {unit}: {row.get('summary', 'failed')[:_REASONS]}")
            lines += [f"  - {line[:_REASONS]}" for line in row.get("failures", [])]
            for who, contestant in row.get("contestants", {}).items():
                for key in ("failed", "graph_failed"):
                    if key in contestant:
                        lines.append(f"  - {unit}, {who}, {key}: {contestant[key][:_REASONS]}")
    return "\n".join(lines)


def contests(rows: Rows, modelled: Modelled) -> str:
    """Measured beside modelled, one line for each contestant."""
    lines = []
    for unit, row in rows.items():
        for who, found in row["contestants"].items():
            lines.append((unit, who, *_measured(row, who, found, modelled)))
    head = (
        *("case", "who", "eager ms", "graph ms", "over", "modelled", "extra ms", "modelled ms"),
        *("TFLOP/s", "GB/s", "peak MB"),
    )
    return table(head, lines)


def best(found: dict[str, Any]) -> dict[str, Any] | None:
    """The times that the report compares: of the graph, or eager ones if there is none."""
    times: dict[str, Any] | None = found.get("graph") or found.get("eager")
    return times


def _measured(
    row: dict[str, Any], who: str, found: dict[str, Any], modelled: Modelled
) -> tuple[str, ...]:
    times = best(found)
    if times is None:
        return (*("failed",) * 2, *("-",) * 7)
    floor = best(row["contestants"].get(row["baseline"], {}))
    seconds = times["seconds"]["median"]
    extra = None if floor is None else seconds - floor["seconds"]["median"]
    flops, moved = _work(row, who)
    return (
        _milliseconds(found.get("eager")),
        _milliseconds(found.get("graph")) if "graph_failed" not in found else "failed",
        _ratio(times),
        _number(modelled.over_floor(row, who), 1.0, 3),
        _number(extra, 1e3, 3),
        _number(modelled.extra_seconds(row, who), 1e3, 3),
        _number(flops and flops / seconds, 1e-12, 0),
        _number(moved and moved / seconds, 1e-9, 0),
        _number(found.get("peak_bytes"), 1e-6, 0),
    )


def _work(row: dict[str, Any], who: str) -> tuple[float | None, float | None]:
    if "work" in row:
        return row["work"]["flops"] or None, row["work"]["bytes"]
    if "flops" in row:
        return row["flops"]["frozen" if who == row["baseline"] else "adapted"], None
    return None, None


def _milliseconds(times: dict[str, Any] | None) -> str:
    if times is None:
        return "-"
    low, median, high = (1e3 * times["seconds"][name] for name in ("low", "median", "high"))
    return f"{median:.3f} ({low:.3f}-{high:.3f})"


def _ratio(times: dict[str, Any]) -> str:
    ratio = times.get("over_baseline")
    return f"{ratio['median']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f})" if ratio else "-"


def _number(value: float | None, scale: float, digits: int) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"


def decisive(rows: Rows) -> str:
    """e of each way: the floor's time over its own, so that below 1 is slower; the host's time."""
    lines = []
    for unit, row in rows.items():
        medians = _medians(row) if "contestants" in row else {}
        for who in row.get("contestants", {}):
            seconds, floor = medians.get(who), medians.get(row["baseline"])
            flops, moved = row["work"]["flops"], row["work"]["bytes"]
            lines.append(
                (
                    *(unit, who, _number(seconds, 1e3, 4) if seconds else "failed"),
                    _number(floor and seconds and floor / seconds, 1.0, 3),
                    _number(seconds and flops and flops / seconds, 1e-12, 0),
                    _number(seconds and moved and moved / seconds, 1e-12, 2),
                )
            )
        for who, seconds in row.get("host_seconds", {}).items():
            lines.append((unit, who, _number(seconds, 1e3, 4), "-", "-", "-"))
    return table(("case", "way", "ms", "e", "TFLOP/s", "TB/s"), lines)


def crossover(rows: Rows) -> str:
    """Where decoding an NF4 weight is faster, and where the library decodes it."""
    lines = []
    for unit, row in rows.items():
        medians = _medians(row)
        faster = _fastest(medians, ("workspace", "in the product"))
        shown = (_number(medians.get(name), 1e3, 4) for name in row["contestants"])
        lines.append((unit, *shown, faster, row["chosen"]))
    names = [*next(iter(rows.values()))["contestants"]]
    return table(("case", *(f"{name}, ms" for name in names), "faster", "chosen"), lines)


def candidates(rows: Rows) -> str:
    """The tuner's candidates, and whether the cost model picks the fastest."""
    lines = []
    for unit, row in rows.items():
        medians, modelled = _medians(row), row.get("modelled_seconds", {})
        fastest = _fastest(medians, tuple(row["contestants"]))
        picked = row.get("picked", "-")
        lost = medians[picked] / medians[fastest] if {picked, fastest} <= medians.keys() else None
        for name in row["contestants"]:
            note = " and ".join(["picked"] * (name == picked) + ["fastest"] * (name == fastest))
            expected = modelled.get(name if name == "hybrid" else "fused")
            lines.append(
                (
                    *(unit, name, _number(medians.get(name), 1e3, 4), _number(expected, 1e3, 4)),
                    *(note, _number(lost, 1.0, 3) if name == picked else ""),
                )
            )
    return table(("case", "way", "ms", "modelled ms, one way", "", "picked / fastest"), lines)


def _medians(row: dict[str, Any]) -> dict[str, float]:
    times = {who: best(found) for who, found in row["contestants"].items()}
    return {who: t["seconds"]["median"] for who, t in times.items() if t}


def _fastest(medians: dict[str, float], names: tuple[str, ...]) -> str:
    """The fastest of ``names``; empty unless all of them ran."""
    if not set(names) <= medians.keys():
        return "-"
    return min(names, key=lambda name: medians[name])


def accuracy(rows: Rows) -> str:
    """The worst error of each case, relative to the largest element, beside eager's."""
    lines = []
    for unit, row in rows.items():
        for result in row["results"]:
            errors = (f"{result['lora_fast']:.1e}", f"{result['eager']:.1e}")
            lines.append((unit, result["result"], *errors, result["broken"] or "within the rule"))
    return table(("case", "result", "lora_fast", "eager", "verdict"), lines)


def profile(rows: Rows, modelled: Modelled) -> str:
    """Hardware counters of each kernel, beside the counts made without a GPU."""
    lines = []
    for unit, row in rows.items():
        if "kernels" in row:
            counted = _number(modelled.bytes_moved(_profiled(row), "lora_fast fused"), 1e-6, 1)
            total = ("all kernels", "-", f"{row['bytes'] / 1e6:.1f} (counted: {counted})")
            lines.append((unit, *total, *("-",) * 6))
        for k in row.get("kernels", []):
            moved = k.get("bytes_read", 0) + k.get("bytes_written", 0)
            time = k.get("nanoseconds")
            lines.append(
                (
                    unit,
                    k["kernel"][:60],
                    _number(time, 1e-3, 1),
                    _number(moved, 1e-6, 1),
                    _number(k.get("bytes_through_l2"), 1e-6, 1),
                    _number(time and moved / time, 1.0, 0),
                    *(_number(k.get(f"{n}_percent"), 1.0, 0) for n in _PERCENT),
                    _number(k.get("registers"), 1.0, 0),
                )
            )
    head = ("unit", "kernel", "µs", "MB of memory", "MB through L2", "GB/s", *_PERCENT, "registers")
    return table(head, lines)


def _profiled(row: dict[str, Any]) -> dict[str, Any]:
    """The case of bench.gpu_day.one_step."""
    size = {"M": row["M"], "K": row["K"], "N": row["K"], "R": 16, "p": 0.0}
    direction = "forward+backward"
    return {**size, "weight": row["weight"], "direction": direction, "baseline": "frozen"}


_PERCENT = ("compute", "memory", "occupancy")


def table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    rows = [head, ("---",) * len(head), *lines]
    return "\n".join("| " + " | ".join(c.replace("|", "/") for c in row) + " |" for row in rows)
