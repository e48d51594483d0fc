"""A launch whose configuration asks for more than the device has takes a smaller one."""

import contextlib
import contextvars
import functools
from dataclasses import replace

from triton.runtime.errors import OutOfResources

from . import triton_version  # noqa: F401
from .launch_policy import GemmConfig, StripConfig

_dropped = contextvars.ContextVar("dropped", default=None)


def smaller(config: GemmConfig | StripConfig) -> GemmConfig | StripConfig | None:
    """The configuration to try where this one does not fit; None after the smallest.

    First fewer stages, which cost nothing but overlap, then tiles of half the size, which cost
    traffic: of K before N, since more products share the rest of a tile then.
    """
    if config.num_stages > 2:
        return replace(config, num_stages=config.num_stages - 1)
    if isinstance(config, StripConfig):
        halves = {"BLOCK_L": config.BLOCK_L // 2}
    elif config.BLOCK_K > 32:
        halves = {"BLOCK_K": config.BLOCK_K // 2}
    else:
        # What dropout masks of half the columns needs no parts.
        config = replace(config, MASK_PARTS=1)
        halves = {"BLOCK_N": config.BLOCK_N // 2}
    return replace(config, **halves) if min(halves.values()) >= 16 else None


def drops_to_smaller(launch):
    """launch(config, …), again with the next smaller configuration while one does not fit.

    Triton finds out before it launches, so nothing has been computed; the last OutOfResources is
    raised where nothing smaller is left.
    """

    @functools.wraps(launch)
    def launched(config, *args, **kwargs):
        asked = config
        while True:
            try:
                result = launch(config, *args, **kwargs)
            except OutOfResources:
                config = smaller(config)
                if config is None:
                    raise
                continue
            if config is not asked and (dropped := _dropped.get()) is not None:
                dropped.append((asked, config))
            return result

    return launched


@contextlib.contextmanager
def recording_drops():
    """A list of (configuration asked for, smaller one that ran), for launches inside the block."""
    dropped = []
    token = _dropped.set(dropped)
    try:
        yield dropped
    finally:
        _dropped.reset(token)


def descent(config):
    """The configurations that a launch of `config` tries, in their order."""
    while config is not None:
        yield config
        config = smaller(config)
