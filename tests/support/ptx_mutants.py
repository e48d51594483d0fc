"""Compiled kernels with statements removed, which a check must notice."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from tests import ptx_executor


def ptx_of(run: Callable[[], None], arch: int) -> str:
    """The PTX of the only kernel that `run` launches."""
    found: list[str] = []
    with ptx_executor.installed(arch, transform=lambda ptx: found.append(ptx) or ptx):
        run()
    (ptx,) = found
    return ptx


def mutants(ptx: str, pattern: re.Pattern[str]) -> Iterator[tuple[str, Callable[[str], str]]]:
    """(statement, the PTX without it) of every statement that the pattern's group matches."""
    for found in pattern.finditer(ptx):
        statement = found.group(1)
        # A wait for an mbarrier is a loop: without its instruction it must end.
        instead = "mov.pred complete, -1;" if "try_wait" in statement else ";"
        mutant = ptx[: found.start(1)] + instead + ptx[found.end(1) :]
        yield statement, lambda _, mutant=mutant: mutant
