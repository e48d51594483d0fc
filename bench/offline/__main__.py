"""Counts what an adapted linear and whole decoder layers cost, without a GPU; minutes on a CPU.

    python -m bench.offline                  count everything, print it, write it to --out
    python -m bench.offline --check          count again and compare; exits 1 and lists regressions
    python -m bench.offline --check --fast   the same for the main cases on one device: seconds
    python -m bench.offline --case linear,8192,16,nf4 --arch 90
                                             one case alone: LAYER,M,R,WEIGHT[,P]; writes nothing,
                                             with --check it is compared

Written are results.json, tables.md, bars.png and roofline.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lora_fast.tuning.rooflines import BY_ARCH

from . import activated, counting, one_case, regression, tables, tasks, whole_layer
from .contestants import Case
from .counting import EVERYTHING, FAST, MAIN

RESULTS = Path(__file__).resolve().parents[1] / "results" / "offline"
FILE = "results.json"


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    kept = _load(options.out / FILE) if options.check else None
    if options.case is not None:
        found = one_case.count(options.case, options.arch)
        print(one_case.text(options.case, options.arch, found))
        return 0 if kept is None else _compared({"about": _about(), **found}, kept)
    selection = FAST if options.fast else EVERYTHING
    new = {"about": _about(), **tasks.count(selection, options.jobs)}
    if kept is None:
        _keep(new, options.out)
        return 0
    return _compared(new, kept)


def _compared(new: dict[str, Any], kept: dict[str, Any]) -> int:
    """The exit code: 1 after a line for each regression from the stored results."""
    worse = regression.regressions(new, kept)
    if new["about"] != kept["about"]:
        print(f"note: counted with {new['about']}, kept with {kept['about']}")
    for line in worse:
        print(f"worse: {line}")
    changed = regression.differences(new, kept)
    if changed and not worse:
        print(f"note: {changed} rows differ and none is worse; python -m bench.offline keeps them")
    fresh = regression.not_kept(new, kept)
    if fresh:
        print(f"note: {len(fresh)} kernels are not kept yet: {', '.join(fresh)}")
    print(f"{len(new['counts'])} counts, {len(new['kernels'])} kernels: {len(worse)} regressions")
    return 1 if worse else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m bench.offline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="compare with the stored results")
    parser.add_argument("--fast", action="store_true", help="the main cases on sm_90 alone")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the stored results")
    parser.add_argument("--case", type=_case, help=f"one case, {one_case.FORM}")
    parser.add_argument("--arch", type=int, default=90, help="of --case (default 90)")
    options = parser.parse_args(arguments)
    if options.arch not in BY_ARCH:
        parser.error(f"--arch must be one of {', '.join(map(str, BY_ARCH))}, got {options.arch}")
    if options.fast and not options.check and options.out == RESULTS:
        parser.error("--fast must come with --check or --out, or it would replace the full results")
    return options


def _case(text: str) -> Case:
    try:
        return one_case.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _about() -> dict[str, str]:
    import bitsandbytes
    import peft
    import torch
    import triton

    modules = (torch, triton, peft, bitsandbytes)
    return {module.__name__: module.__version__.split("+")[0] for module in modules}


def _keep(new: dict[str, Any], folder: Path) -> None:
    """Write results, tables and pictures, with the parts that --check does not compare."""
    folder.mkdir(parents=True, exist_ok=True)
    new = {**new, "whole_layers": whole_layer.rows(), "activated": activated.rows()}
    _write(folder / FILE, new)
    text = tables.everything(new, counting.breakdown(MAIN, 90))
    (folder / "tables.md").write_text(text)
    print(text)
    try:
        from . import plots

        print("drawn:", *plots.draw(new["counts"], folder))
    except ImportError as error:
        print(f"not drawn: {error}")


def _write(path: Path, results: dict[str, Any]) -> None:
    """One line a row, so that a difference shows what changed; counts as lists under COLUMNS."""
    counts = [[row[name] for name in counting.COLUMNS] for row in results["counts"]]
    parts = {
        "about": json.dumps(results["about"]),
        "columns": json.dumps(counting.COLUMNS),
        "counts": _lines(counts),
        "launches": _lines(results["launches"]),
        "kernels": _lines(results["kernels"]),
        "whole_layers": _lines(results["whole_layers"]),
        "activated": _lines(results["activated"]),
    }
    body = ",\n".join(f"{json.dumps(name)}: {text}" for name, text in parts.items())
    path.write_text("{\n" + body + "\n}\n")


def _lines(rows: list[Any]) -> str:
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]"


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SystemExit(f"{path} is missing: run python -m bench.offline first")
    kept: dict[str, Any] = json.loads(path.read_text())
    kept["counts"] = [dict(zip(kept["columns"], row, strict=True)) for row in kept["counts"]]
    return kept


if __name__ == "__main__":
    sys.exit(main())
