"""Python processes in which installed packages are hidden."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
HIDING = Path(__file__).parent / "absent"


def environment_without(*packages: str, path: tuple[Path, ...] = ()) -> dict[str, str]:
    """os.environ for processes in which `packages` cannot be found; `path` comes first in
    sys.path."""
    folders = [HIDING, *path, CHECKOUT]
    return os.environ | {
        "ABSENT_PACKAGES": ",".join(packages),
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
    }


def run_without(*packages: str, code: str, cwd: Path) -> str:
    """What `code` prints where `packages` are not installed; fails where it fails."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env=environment_without(*packages),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
