"""Two processes on a CPU, of transformers' Trainer or of an example with a trainer in it.

ddp_trainer.py FOLDER [EXAMPLE.py]
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import trainer_runs
from lora_models import counted
from torch import multiprocessing


def work(rank: int, port: int, out: Path, example: Path | None) -> None:
    """One process, whose results go to a file."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost",
        MASTER_PORT=str(port), OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    torch.save(half() if example is None else run(example), out / f"{rank}.pt")


def half() -> dict[str, Any]:
    """A training with half of every batch."""
    with tempfile.TemporaryDirectory() as folder:
        trained = trainer_runs.train(
            Path(folder), fused=True, per_device_train_batch_size=trainer_runs.BATCH // 2,
            ddp_backend="gloo",
        )  # fmt: skip
    return {
        "result": trained.result(),
        "calls": counted(trained.model),
        "wrapped": type(trained.trainer.model_wrapped).__name__,
    }


def run(example: Path) -> tuple[int, str]:
    """The exit status of the example, and what it printed."""
    sys.argv = [example.name, "--smoke"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = runpy.run_path(str(example))["main"]()
    return status, printed.getvalue()


def main(out: Path, example: Path | None = None) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        free = probe.getsockname()[1]
    # Forked: what is imported is there at once, and no thread has been started yet.
    multiprocessing.start_processes(work, (free, out, example), nprocs=2, start_method="fork")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
