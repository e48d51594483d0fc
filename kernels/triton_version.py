"""The versions of Triton that the kernels support, checked when one of them is imported."""

import re

import triton

# From the first to below the second. The suite runs with several in between: tests/matrix.py.
SUPPORTED = ((3, 5, 1), (4, 0, 0))


def supported(version: str) -> tuple[int, ...]:
    """`version` as numbers. ImportError: it is not in the range; says what to install."""
    first, end = SUPPORTED
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if first <= numbers < end:
        return numbers
    wanted = ">={}.{}.{},<{}".format(*first, end[0])
    raise ImportError(
        f"lora_fast's kernels need triton{wanted}, got {version}: pip install 'triton{wanted}' and "
        "a torch that goes with it, or choose the backend without kernels: LORA_FAST_BACKEND=torch"
    )


VERSION = supported(triton.__version__)
