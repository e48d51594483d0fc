"""Callbacks of transformers' Trainer: progress, clocks, Ctrl-C, divergence."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..acceleration.report import adapted_layers
from ..errors import RunFailure
from ..gated_mlps.discovery import STATE
from .events import Observer
from .measurement import synchronize

WARMUP_STEPS = 2


class StepClock(TrainerCallback, ExportableState):
    """Measures every optimizer step, without checkpoints and logging, and counts its tokens.

    ``stored`` is what a checkpoint holds of earlier steps, from all processes that ran them;
    ``began`` are the numbers of finished steps at which one of these processes started.
    """

    def __init__(self, stored: dict[str, Any] | None = None) -> None:
        stored = stored or {}
        self.seconds: list[float] = stored.get("seconds", [])
        self.tokens: list[int] = stored.get("tokens", [])
        self.began: list[int] = stored.get("began", [])
        self._start = 0.0
        self._tokens_before = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began.append(len(self.seconds))
        self._tokens_before = int(state.num_input_tokens_seen)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        synchronize(args.device)
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        synchronize(args.device)
        self.seconds.append(time.perf_counter() - self._start)
        self.tokens.append(int(state.num_input_tokens_seen) - self._tokens_before)
        self._tokens_before = int(state.num_input_tokens_seen)

    def tokens_per_second(self) -> float:
        """Tokens that are not padding, over all steps but the first two of every process."""
        cold = {step + i for step in self.began for i in range(WARMUP_STEPS)}
        steps = range(len(self.seconds))
        warm = [step for step in steps if step not in cold] or steps
        seconds = sum(self.seconds[step] for step in warm)
        return sum(self.tokens[step] for step in warm) / seconds if seconds else 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        kept = {"seconds": self.seconds, "tokens": self.tokens, "began": self.began}
        return {"args": {}, "attributes": kept}


class CallCounter(TrainerCallback, ExportableState):
    """Continues the counts of the fused and plain calls, of layers and gated MLPs, from a
    checkpoint."""

    def __init__(self, model: Any, stored: dict[str, Any]) -> None:
        self._calls: dict[str, Any] = {
            name: layer._lora_fast_calls
            for name, layer in adapted_layers(model)
            if hasattr(layer, "_lora_fast_calls")
        }
        for name, module in model.named_modules():
            if STATE in module.__dict__:
                self._calls[name] = module.__dict__[STATE].calls
        for name, counts in stored.get("calls", {}).items():
            if name in self._calls:
                self._calls[name].restore(counts)

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        # The reasons in a plain dict: transformers would make pairs of a Counter's keys.
        kept = {
            name: {**vars(calls), "fallbacks": dict(calls.fallbacks)}
            for name, calls in self._calls.items()
        }
        return {"args": {}, "attributes": {"calls": kept}}


class Progress(TrainerCallback):
    """Tells an observer about every step, and stops a run whose loss is no longer finite."""

    def __init__(self, arm: str, observer: Observer, clock: StepClock) -> None:
        self.arm = arm
        self.observer = observer
        self.clock = clock

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.observer.training(self.arm, state.global_step, state.max_steps)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        loss = logs["loss"]
        if not math.isfinite(loss):
            raise RunFailure(f"the loss is {loss} at step {state.global_step}: try a lower --lr")
        rate = self.clock.tokens_per_second()
        self.observer.step(state.global_step, loss, logs.get("learning_rate", 0.0), rate)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.observer.trained()


class RankAllocation(TrainerCallback):
    """Shows AdaLoRA's allocator the gradients of every step and lets it move its budget.

    Between two allocations a pruned direction may grow again, and PEFT saves without it. So it is
    pruned once more at the end of training, and the scores are those of the saved adapter.
    """

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        model.base_model.update_and_allocate(state.global_step + 1)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        allocator = model.base_model.rankallocator
        if allocator.peft_config.rank_pattern:
            allocator.mask_using_rank_pattern(
                model.base_model.model, allocator.peft_config.rank_pattern
            )


def early_stopping(patience: int, stored: dict[str, Any]) -> EarlyStoppingCallback:
    """Transformers' early stopping, its count restored from the checkpoint, if any."""
    callback = EarlyStoppingCallback(early_stopping_patience=patience)
    callback.early_stopping_patience_counter = stored.get("early_stopping_patience_counter", 0)
    return callback


class BestCheckpoint(TrainerCallback):
    """Finds the best checkpoint in the run's current folder, which may have moved since."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        best = state.best_model_checkpoint
        if best is not None:
            state.best_model_checkpoint = str(Path(args.output_dir) / Path(best).name)


class StopRequest(TrainerCallback):
    """Ends training after the current step, with a checkpoint, once :meth:`ask` was called."""

    def __init__(self) -> None:
        self.asked = False

    def ask(self) -> None:
        """Ask for the stop. May be called from a signal handler."""
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True


@contextmanager
def stop_on_signals(request: StopRequest, observer: Observer) -> Iterator[None]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop; a second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.ask()
        observer.note("Stopping after this step; press Ctrl-C again to stop at once.")

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, handle) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
