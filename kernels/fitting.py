"""What a launch does when its configuration asks for more than the device has."""

import contextlib
import contextvars
import functools

from triton.runtime.errors import OutOfResources

from .configs import smaller

_dropped = contextvars.ContextVar("dropped", default=None)


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
