"""Smaller configurations for launches that need more resources than the device has."""

import contextlib
import contextvars
from dataclasses import replace

from triton.runtime.errors import OutOfResources

from . import triton_version  # noqa: F401
from .launch_policy import GemmConfig, RowsConfig, StripConfig

__all__ = [
    "OutOfResources",
    "descent",
    "instead_of",
    "is_recording_drops",
    "recording_drops",
    "smaller",
]

_Config = GemmConfig | StripConfig | RowsConfig
_dropped = contextvars.ContextVar("dropped", default=None)


def smaller(config: _Config) -> _Config | None:
    """The configuration to try if this one does not fit; None after the smallest.

    First fewer stages, which cost nothing but overlap, then tiles of half the size, which cost
    traffic: of K before N, since more products share the rest of a tile then.
    """
    if config.num_stages > 2:
        return replace(config, num_stages=config.num_stages - 1)
    if not isinstance(config, GemmConfig):
        halves = {"BLOCK_L": config.BLOCK_L // 2}
    elif config.BLOCK_K > 32:
        halves = {"BLOCK_K": config.BLOCK_K // 2}
    else:
        # Half the columns need no parts for the part that dropout masks.
        config = replace(config, MASK_PARTS=1)
        halves = {"BLOCK_N": config.BLOCK_N // 2}
    return replace(config, **halves) if min(halves.values()) >= 16 else None


def instead_of(config):
    """The configuration to launch while Triton's OutOfResources for `config` is handled, which is
    raised again where nothing smaller is left. It is found out before a launch: nothing ran yet."""
    found = smaller(config)
    if found is None:
        raise
    dropped = _dropped.get()
    if dropped is not None:
        dropped.append((config, found))
    return found


@contextlib.contextmanager
def recording_drops():
    """A list of (configuration that did not fit, the one tried next), for launches in the block."""
    dropped = []
    token = _dropped.set(dropped)
    try:
        yield dropped
    finally:
        _dropped.reset(token)


def is_recording_drops():
    """Whether this is a block of :func:`recording_drops`."""
    return _dropped.get() is not None


def descent(config):
    """The configurations that a launch of `config` tries, in their order."""
    while config is not None:
        yield config
        config = smaller(config)
