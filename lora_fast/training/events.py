"""What a run tells whoever watches it. The command line draws it; tests record it."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """Receives the progress of a run. Every method returns at once."""

    def stage(self, text: str) -> None:
        """A new part of the run begins."""

    def note(self, text: str) -> None:
        """Something the user should know, in one line."""

    def fact(self, name: str, text: str) -> None:
        """What the run is about to do, in a word and a line."""

    def training(self, arm: str, first_step: int, total_steps: int) -> None:
        """The training of ``arm`` begins behind ``first_step`` finished steps."""

    def step(self, step: int, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        """An optimizer step is done; ``loss`` is its mean over the batch."""

    def trained(self) -> None:
        """The training announced last has ended or stopped."""

    def done(self, *, well: bool = True) -> None:
        """The part that was announced last has ended, ``well`` or not; no other begins yet."""


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
