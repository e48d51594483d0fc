"""What ``import lora_fast`` costs, and a first use of the operation itself."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[1]
# Half a second of the two and a half that `import torch` takes; measured is 0.02 of it.
MOST = 0.2
HEAVY = {"triton", "transformers", "peft", "bitsandbytes", "matplotlib", "rich", "typer"}
CODE = """
    import json, sys, time
    start = time.process_time()
    import torch
    between = time.process_time()
    import lora_fast
    lora_fast.functional.adapted_linear
    end = time.process_time()
    print(json.dumps({
        "torch": between - start,
        "lora_fast": end - between,
        "initialised": torch.cuda.is_initialized(),
        "modules": sorted({name.split(".")[0] for name in sys.modules}),
    }))
"""


def test_it_costs_little_beside_torch() -> None:
    """In CPU time of one process: other load slows both parts alike."""
    found: dict[str, Any] = json.loads(
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(CODE)],
            cwd=CHECKOUT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    assert "lora_fast" in found["modules"]
    assert not HEAVY.intersection(found["modules"])
    assert not found["initialised"]
    assert found["lora_fast"] <= MOST * found["torch"]


EACH_FIRST = """
    import os, sys
    import peft, torch, transformers
    failed = []
    for name in sys.argv[1].split(","):
        child = os.fork()
        if child == 0:
            import lora_fast
            getattr(lora_fast, name)
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            failed.append(name)
    print(",".join(failed))
"""


def test_every_public_name_can_be_the_first_that_is_asked_for() -> None:
    """Each in its own process: with circular imports only the first module fails."""
    pytest.importorskip("peft")
    import lora_fast

    names = sorted(set(lora_fast.__all__) - {"__version__"})
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(EACH_FIRST), ",".join(names)],
        cwd=CHECKOUT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == "", found.stderr
