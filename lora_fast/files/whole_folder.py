"""A model folder that is written completely or not at all, and that replaces nothing but a model.

Everything is written to ``.NAME.merging`` beside the folder NAME, and renamed once all of it is on
disk. An existing model of that name is exchanged with it in one step and deleted as
``.NAME.merging``. If the system has no such step there are two, and ``.NAME.replaced`` is the old
model in between. The next writer deletes, or restores, what a killed one left behind. Locks, which
end with the process, keep two writers apart.

Only files of a model are ever deleted: a folder with anything else in it is refused.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import some
from .adapter_files import CONFIG as ADAPTER_CONFIG
from .adapter_files import WEIGHTS as ADAPTER_WEIGHTS
from .json_files import PARTIAL
from .safe_files import COMPANIONS, CONFIG, INDEX, SINGLE

WEIGHTS = (SINGLE, "model-?????-of-?????.safetensors")
MODEL_FILES = (CONFIG, INDEX, *WEIGHTS, *COMPANIONS)
# The last two are unfinished files: of the index, and of safetensors.
BEGUN = (*MODEL_FILES, ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX + PARTIAL, ".tmp??????")
BESIDE = "what is left beside out must be nothing but a model"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


class WholeFolder:
    """Context manager: write to ``path`` inside the block; at its end it becomes `out`.

    Links in `out` are followed. `inputs` are folders to read from, by argument name: they must not
    overlap with `out`.

    Raises ValueError: `out` is, contains or lies in one of `inputs`; is a file, a mount point or a
    link that leads to itself; or is to be replaced and holds something that does not belong to a
    model; FileExistsError: `out` is not empty, and must not be replaced; BlockingIOError: another
    process is writing the same folder.
    """

    def __init__(self, out: Path, *, overwrite: bool = False, **inputs: Path) -> None:
        self.out = Path(os.path.realpath(out))
        self.overwrite = overwrite
        if self.out.is_symlink():
            raise ValueError(f"out must be a folder, got {self.out}, a link that leads to itself")
        _refuse_inputs(self.out, inputs)
        self.path = self.out.with_name(f".{self.out.name}.merging")
        self._old = self.out.with_name(f".{self.out.name}.replaced")
        for beside in (self.path, self._old):
            _refuse_inputs(beside, inputs)
        self._locks = ExitStack()

    def __enter__(self) -> WholeFolder:
        with ExitStack() as undo:
            undo.enter_context(self._locks)
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except FileNotFoundError as error:  # for example in /proc
                raise ValueError(
                    f"out must be where a folder can be made, got {self.out}"
                ) from error
            self._locks.enter_context(_locked(self.path))
            _clear(self.path)
            undo.callback(shutil.rmtree, self.path)
            self._recover()
            self._replaces()
            undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._locks:
            with ExitStack() as undo:
                undo.callback(shutil.rmtree, self.path)
                if kind is not None:
                    return
                for path in (*self.path.rglob("*"), self.path):
                    _flush(path)
                replaces = self._replaces()  # again: a file may have appeared in the meantime
                if replaces:  # the old model will be deleted, by this writer alone
                    self._locks.enter_context(_locked(self.out))
                undo.pop_all()
            self._publish(replaces=replaces)

    def _publish(self, *, replaces: bool) -> None:
        left = None
        if not replaces:
            os.replace(self.path, self.out)
        elif _exchange(self.path, self.out):
            left = self.path
        else:
            left = self._old
            os.replace(self.out, self._old)
            os.replace(self.path, self.out)
        _flush(self.out.parent)
        if left is not None:
            _delete(left)

    def _recover(self) -> None:
        """Finish what a writer began that was killed while it replaced the model in `out`."""
        if not self._old.exists():
            return
        with _locked(self._old):
            _refuse_foreign(self._old, BEGUN, BESIDE)
            if self.out.exists() and any(self.out.iterdir()):
                _delete(self._old)
            else:
                os.replace(self._old, self.out)

    def _replaces(self) -> bool:
        """Whether `out` holds a model to replace; raises if it must not be replaced."""
        if not self.out.exists():
            return False
        if not self.out.is_dir():
            raise ValueError(f"out must be a folder, got the file {self.out}")
        if self.out.is_mount():
            raise ValueError(f"out must not be a mount point, got {self.out}: take a folder in it")
        if not any(self.out.iterdir()):
            return False
        if not self.overwrite:
            raise FileExistsError(f"out must be a new or empty folder, got {self.out}")
        _refuse_foreign(self.out, MODEL_FILES, "out must be new, empty or hold nothing but a model")
        if not (self.out / CONFIG).is_file() or not any(
            list(self.out.glob(name)) for name in WEIGHTS
        ):
            raise ValueError(
                f"out must be new, empty or hold a model, got {self.out} without {CONFIG} and "
                "weights in safetensors: choose another folder"
            )
        return True


def _refuse_inputs(place: Path, inputs: dict[str, Path]) -> None:
    for name, folder in inputs.items():
        inside, around = _is_within(place, folder), _is_within(folder, place)
        if inside or around:
            how = "is" if inside and around else "lies in" if inside else "contains"
            raise ValueError(
                f"out must be apart from {name}, got {place}, which {how} {folder}: "
                "choose another folder"
            )


def _is_within(path: Path, folder: Path) -> bool:
    """Whether `path`, which need not exist, is or lies in `folder`, with links resolved."""
    real = Path(os.path.realpath(path))
    return folder.exists() and any(
        place.exists() and place.samefile(folder) for place in (real, *real.parents)
    )


def _refuse_foreign(folder: Path, files: tuple[str, ...], wanted: str) -> None:
    foreign = sorted(
        f"{path.name}/" if path.is_dir() else path.name
        for path in folder.iterdir()
        if path.is_dir() or not any(fnmatchcase(path.name, name) for name in files)
    )
    if foreign:
        raise ValueError(
            f"{wanted}, got {folder} with {some(foreign)}: choose another folder, or move them away"
        )


def _clear(folder: Path) -> None:
    """Delete the files of a model in `folder`; raises first if there are other files."""
    _refuse_foreign(folder, BEGUN, BESIDE)
    for path in folder.iterdir():
        path.unlink()


def _delete(folder: Path) -> None:
    _clear(folder)
    folder.rmdir()


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; False if the system or disk cannot.

    Source: renameat2(2), RENAME_EXCHANGE.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform != "linux" or not hasattr(library, "renameat2"):
        return False
    names = os.fsencode(one), os.fsencode(other)
    if library.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    import fcntl

    with ExitStack() as stack:
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous writer may just have renamed the folder and released it.
            if os.stat(folder).st_ino != os.fstat(handle).st_ino:
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            busy = f"another process is writing to {folder.name}"
            raise BlockingIOError(busy) from None
        yield


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
