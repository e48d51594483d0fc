"""Clones of the repository and packages beside them, for tests of what is imported from where."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("[!_]*.py"))
IMPORT_KERNELS = f"""
    import importlib, pathlib
    for name in {KERNELS}:
        module = importlib.import_module("lora_fast.kernels." + name)
        print(pathlib.Path(module.__file__).resolve().parent)
"""


def run_python(code: str, cwd: Path, *path: Path) -> str:
    """Run ``code`` in a new process in ``cwd`` with ``path`` as PYTHONPATH; return its output."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path:
        env["PYTHONPATH"] = os.pathsep.join(map(str, path))
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def clone(folder: Path) -> Path:
    """A copy of what a clone holds of the package, so that builds leave this tree alone."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("lora_fast", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def other_kernels_in(folder: Path) -> Path:
    """An installed distribution `kernels` of a version that transformers accepts.

    Whatever name transformers takes from it is a class that accepts every call.
    """
    from transformers.utils import import_utils

    # Before transformers 5 any is good enough.
    version = getattr(import_utils, "KERNELS_MIN_VERSION", "0.12.0")
    package = folder / "kernels"
    package.mkdir()
    package.joinpath("__init__.py").write_text(
        textwrap.dedent(
            """
            OWNER = "another project"

            class _AnyClass(type):
                def __getattr__(cls, name):
                    if name.startswith("__"):
                        raise AttributeError(name)
                    return cls()

            class Anything(metaclass=_AnyClass):
                def __init__(self, *args, **kwargs):
                    pass

                def __call__(self, *args, **kwargs):
                    return args[0] if args else self

                def __or__(self, other):
                    return self

            def __getattr__(name):
                if name.startswith("__"):
                    raise AttributeError(name)
                return Anything
            """
        )
    )
    info = folder / f"kernels-{version}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"
    info.joinpath("METADATA").write_text(metadata)
    # Or importlib.metadata does not know whose package this is, from Python 3.12 on.
    info.joinpath("top_level.txt").write_text("kernels\n")
    return folder
