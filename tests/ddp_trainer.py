"""Two processes of the Trainer, and of examples/sft_trl.py, on CPU for test_callback.py.

ddp_trainer.py FOLDER
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

import test_callback
import torch
from lora_models import counted
from torch import multiprocessing


def train(rank: int, port: int, out: Path) -> None:
    """One process: half of every batch; what came of it goes to a file."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost",
        MASTER_PORT=str(port), OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = test_callback.train(
            Path(folder), fused=True, per_device_train_batch_size=test_callback.BATCH // 2,
            ddp_backend="gloo",
        )  # fmt: skip
    found = {
        "result": run.result(),
        "calls": counted(run.model),
        "wrapped": type(run.trainer.model_wrapped).__name__,
        "example": example(),
    }
    torch.save(found, out / f"{rank}.pt")


def example() -> tuple[int, str]:
    """The exit status of the example, and what it printed."""
    sys.argv = ["sft_trl.py", "--smoke"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = runpy.run_path(str(test_callback.EXAMPLE))["main"]()
    return status, printed.getvalue()


if __name__ == "__main__":
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        free = probe.getsockname()[1]
    # Forked: what is imported is there at once, and no thread has been started yet.
    multiprocessing.start_processes(train, (free, Path(sys.argv[1])), nprocs=2, start_method="fork")
