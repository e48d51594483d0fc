"""Parameters and x as a backward pass reads them: with the values of the forward pass.

Autograd gives a saved leaf back as the object that it is, with whatever was assigned to its
``.data`` in the meantime, as ``model.to(dtype)`` does. Stock PEFT saves views of them, whose memory
stays, so a fused operation saves a leaf detached: that memory, and the version by which
autograd notices what is written into it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor


def as_they_are(
    tensors: Sequence[Tensor | None], unread: Iterable[int] = ()
) -> list[Tensor | None]:
    """The tensors to save in place of `tensors`: leaves detached, and None at the positions
    `unread`, which backward does not read (a frozen bias may even be an inference tensor)."""
    saved = [*tensors]
    for i in unread:
        saved[i] = None
    for i, t in enumerate(saved):
        if t is not None and t.is_leaf:
            saved[i] = t.detach()
    return saved


def x_as_it_is(x: Tensor | None) -> Tensor | None:
    """The x to save: a leaf detached, unless it is a matrix, of which stock PEFT saves no view."""
    return x.detach() if x is not None and x.is_leaf and x.dim() != 2 else x
