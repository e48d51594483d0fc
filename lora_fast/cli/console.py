"""What a run looks like in a terminal, and in a log file."""

from __future__ import annotations

import logging
import os
import time
import warnings
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Table

ARM_TITLES = {"stock": "stock PEFT", "lora_fast": "lora_fast"}
LOG_LINES = 10
WIDEST = 1000
# Seconds without a sign of life.
PATIENCE = 2.0


class Terminal:
    """Shows the stages of a run and a progress bar; without a terminal, plain lines."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._status: Status | None = None
        self._stage = ""
        self._began = 0.0
        self._progress: Progress | None = None
        self._total = 0
        self._loss = 0.0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close(done=error is None)

    def stage(self, text: str) -> None:
        """Tick off the previous stage and show this one as running."""
        self._close(done=True)
        self._stage, self._began = text, time.monotonic()
        if self.console.is_terminal:
            self._status = self.console.status(f"{text} …", spinner_style="cyan")
            self._status.start()

    def note(self, text: str) -> None:
        """Print one line, above whatever is running."""
        self.console.print(f"[yellow]![/] {escape(text)}")

    def fact(self, name: str, text: str) -> None:
        """Print one line about the run, once the stage before it is done."""
        self._close(done=True)
        self.console.print(f"  [bold]{escape(name):<6}[/] {escape(text)}")

    def training(self, arm: str, first_step: int, total_steps: int) -> None:
        """Show the progress bar of one arm."""
        title = f"Training with {ARM_TITLES.get(arm, arm)}"
        if first_step:
            title += f" from step {first_step}"
        self.stage(title)
        self._total = total_steps
        if not self.console.is_terminal:
            return
        self._stop_status()
        self._progress = Progress(
            SpinnerColumn(style="cyan"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("[dim]{task.fields[numbers]}[/]"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            transient=True,
        )
        self._progress.add_task(title, total=total_steps, completed=first_step, numbers="")
        self._progress.start()

    def step(self, step: int, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        """Move the bar; in a log, print a line for every tenth of the steps."""
        numbers = f"loss {loss:.3f} · {tokens_per_second:,.0f} tok/s"
        self._loss = loss
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step, numbers=numbers)
        elif not self.console.is_terminal and step % max(1, self._total // LOG_LINES) == 0:
            self.console.print(f"  step {step}/{self._total} · {numbers} · lr {learning_rate:.1e}")

    def trained(self) -> None:
        """Remove the bar."""
        self._stop_progress()

    def done(self, *, well: bool = True) -> None:
        """Tick off what is running, or remove it if it failed."""
        self._close(done=well)

    def _close(self, *, done: bool) -> None:
        self._stop_progress()
        self._stop_status()
        if self._stage and done:
            seconds = time.monotonic() - self._began
            self.console.print(f"[green]✓[/] {escape(self._stage)} [dim]{duration(seconds)}[/]")
        self._stage = ""

    def _stop_progress(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _stop_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


class Working:
    """Shows progress on stderr: one line that disappears; in a log, after two seconds, a line for
    each stage that begins."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, stderr=True)
        self._status: Status | None = None
        self._began: float | None = None

    def __enter__(self) -> Working:
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def told(self, stage: str) -> None:
        """Show the stage that begins."""
        now = time.monotonic()
        self._began = now if self._began is None else self._began
        if self._console.is_terminal:
            if self._status is None:
                self._status = self._console.status("", spinner_style="cyan")
                self._status.start()
            self._status.update(f"{escape(stage)} …")
        elif now - self._began > PATIENCE:
            self._console.print(f"  {escape(stage)} …")


def print_whole(console: Console, table: Table) -> None:
    """Print a table at its own width: a narrower terminal wraps lines and cuts nothing."""
    options = console.options.update(max_width=WIDEST)
    table.width = Measurement.get(console, options, table).maximum
    console.print(table, crop=False)


def duration(seconds: float) -> str:
    """``4.2 s`` or ``2 min 5 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def quiet_libraries() -> None:
    """Silence the progress bars, advice and warnings of other libraries. Call before a run."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    for name in ("transformers", "peft", "accelerate", "bitsandbytes", "torch", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
