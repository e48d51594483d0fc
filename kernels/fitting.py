"""What a launch does when its configuration asks for more than the device has."""

import functools

from triton.runtime.errors import OutOfResources

from .configs import smaller


def drops_to_smaller(launch):
    """launch(config, …), again with the next smaller configuration while one does not fit.

    Triton finds out before it launches, so nothing has been computed; the last OutOfResources is
    raised where nothing smaller is left.
    """

    @functools.wraps(launch)
    def launched(config, *args, **kwargs):
        while True:
            try:
                return launch(config, *args, **kwargs)
            except OutOfResources:
                config = smaller(config)
                if config is None:
                    raise

    return launched
