"""A run killed with SIGKILL, repeatedly and at random moments, loses nothing."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import torch
from cpu_kinds import force_for_good
from same_runs import assert_same_run
from tiny_runs import run, save_bert, sentiment_rows, write_jsonl

from lora_fast.files.run_files import CONFIG_FILE
from lora_fast.training.config import TrainConfig

KILLS = 3


def _train_until_killed(config: TrainConfig, out: str, delay: float) -> None:
    torch.set_num_threads(1)
    force_for_good()
    timer = threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGKILL))
    timer.start()
    resume = (Path(out) / CONFIG_FILE).exists()
    run(TrainConfig() if resume else config, Path(out), resume=resume)
    timer.cancel()


def test_killed_at_random_points_a_run_ends_like_any_other(tmp_path: Path) -> None:
    config = TrainConfig(
        model=str(save_bert(tmp_path / "model")),
        data=str(write_jsonl(tmp_path / "data.jsonl", sentiment_rows())),
        steps=6, batch_size=8, r=4, lr=3e-3, save_every=1,
    )  # fmt: skip
    started = time.monotonic()
    run(config, tmp_path / "whole")
    whole = time.monotonic() - started
    # Children of a server that has imported everything start at once, and hold no locks of ours.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    rng = random.Random(0)
    out, killed = tmp_path / "killed", 0
    for _ in range(KILLS):
        arguments = (config, str(out), whole * rng.uniform(0.05, 0.9))
        process = processes.Process(target=_train_until_killed, args=arguments)
        process.start()
        process.join(120)
        assert process.exitcode in (0, -signal.SIGKILL), "it went on from what the last one left"
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 1
    resume = (out / CONFIG_FILE).exists()
    run(TrainConfig() if resume else config, out, resume=resume)
    assert_same_run(out, tmp_path / "whole")
