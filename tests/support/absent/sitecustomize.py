"""Imported by Python at start-up: hides the packages named in ABSENT_PACKAGES.

Neither imports nor ``find_spec`` nor lists of installed packages show them. Child processes inherit
both environment variables and behave in the same way.
"""

import os
import sys

HIDDEN = frozenset(os.environ.get("ABSENT_PACKAGES", "").split(","))


class Hiding:
    """A finder of ``sys.meta_path`` that finds everything but what is hidden."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            return None
        return self.finder.find_spec(name, path, target)

    def find_distributions(self, context):
        find = getattr(self.finder, "find_distributions", None)
        found = () if find is None else find(context)
        return (d for d in found if str(d.metadata["Name"]).replace("-", "_") not in HIDDEN)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
