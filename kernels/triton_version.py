"""Which versions of Triton the kernels are made for: checked when one of them is imported."""

import re

import triton

# From the first to below the last. The suite runs with several in between: tests/matrix.py.
SUPPORTED = ((3, 6, 0), (4, 0, 0))


def require_supported(version: str) -> None:
    """Raise an ImportError that says what to install unless `version` is in the range."""
    first, end = SUPPORTED
    if first <= tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < end:
        return
    wanted = ">={}.{}.{},<{}".format(*first, end[0])
    raise ImportError(
        f"lora_fast's kernels need triton{wanted}, got {version}: pip install 'triton{wanted}' and "
        "a torch that goes with it, or choose the backend without kernels: LORA_FAST_BACKEND=torch"
    )


require_supported(triton.__version__)
