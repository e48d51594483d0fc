"""Events that a run reports. The command line displays them; tests record them."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """Receives the progress of a run. Every method returns at once."""

    def stage(self, text: str) -> None:
        """A new part of the run begins."""

    def note(self, text: str) -> None:
        """Something the user should know, in one line."""

    def fact(self, name: str, text: str) -> None:
        """A property of the run: its name and one line of text."""

    def training(self, arm: str, first_step: int, total_steps: int) -> None:
        """The training of ``arm`` begins after ``first_step`` finished steps."""

    def step(self, step: int, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        """An optimizer step is done; ``loss`` is its mean over the batch."""

    def trained(self) -> None:
        """The most recent training has ended or was stopped."""

    def done(self, *, well: bool = True) -> None:
        """The most recent part has ended, ``well`` or not; no other has begun."""


class Silent:
    """An observer that ignores everything."""

    def stage(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def fact(self, name: str, text: str) -> None: ...

    def training(self, arm: str, first_step: int, total_steps: int) -> None: ...

    def step(
        self, step: int, loss: float, learning_rate: float, tokens_per_second: float
    ) -> None: ...

    def trained(self) -> None: ...

    def done(self, *, well: bool = True) -> None: ...
