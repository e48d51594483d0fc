"""The Triton kernels, imported as ``lora_fast.kernels``.

Hugging Face has a package `kernels`, which transformers and bitsandbytes import if it is installed.
In a clone this folder comes before it on ``sys.path`` whenever Python runs in the repository root;
imported under that name it gives way to the next `kernels`, or raises ModuleNotFoundError if there
is none.
"""

import importlib.machinery
import importlib.util
import os
import sys

# transformers imports a package that has no metadata to ask it for a version, and catches nothing.
_ASKS_FOR_A_VERSION = "transformers.utils.import_utils"


def _next_spec():
    """Where the import system would find `kernels` if this folder were not there, or None."""
    root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    places = {os.path.realpath(entry): entry for entry in reversed(sys.path)}
    # In the order of sys.path, each place once, so that two clones do not call each other forever.
    order = list(dict.fromkeys(map(os.path.realpath, sys.path)))
    rest = order[order.index(root) + 1 :] if root in order else order
    for finder in sys.meta_path:
        spec = finder.find_spec("kernels", [places[place] for place in rest])
        # Without a loader it is an ordinary folder, not a package.
        if spec is not None and spec.loader is not None and not _is_here(spec.origin):
            return spec
    return None


def _is_here(origin):
    return origin is not None and os.path.realpath(origin) == os.path.realpath(__file__)


def _importer():
    """The name of the module that asks for `kernels`."""
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name not in (__name__, "importlib") and not name.startswith("importlib."):
            return name
        frame = frame.f_back
    return ""


def _give_way():
    spec = _next_spec()
    if spec is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["kernels"] = module
        spec.loader.exec_module(module)
    elif _importer() != _ASKS_FOR_A_VERSION:
        raise ModuleNotFoundError("No module named 'kernels'", name="kernels")


if __name__ == "kernels":
    _give_way()

    def __getattr__(name):
        """For transformers: a version that is too old for it, once; then this module is gone."""
        sys.modules.pop("kernels", None)
        if name == "__version__":
            return "0"
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
