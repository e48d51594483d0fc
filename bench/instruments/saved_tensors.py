"""What autograd saves for backward, observed while a forward pass runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class SavedTensors:
    """The tensors that autograd saves inside ``with``, one of each storage, except those of
    ``known``: parameters and whatever else exists anyway."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        # By storages, which meta tensors have, too; they are held, since memory that is released
        # could become that of another tensor.
        self._known = {s._cdata: s for s in (tensor.untyped_storage() for tensor in known)}
        self._saved: dict[int, tuple[torch.UntypedStorage, tuple[int, ...], torch.dtype]] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    @property
    def shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """The shape and dtype in which each was saved last."""
        return [(shape, dtype) for _, shape, dtype in self._saved.values()]

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage, _, _ in self._saved.values())

    def elements(self, *, floating: bool) -> int:
        """Of floating point tensors, or of all others."""
        held = [s for s in self._saved.values() if s[2].is_floating_point == floating]
        return sum(storage.nbytes() // dtype.itemsize for storage, _, dtype in held)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._saved[storage._cdata] = (storage, tuple(tensor.shape), tensor.dtype)
        return tensor

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._hooks.__exit__(*details)
