"""Memory in launch plans: allocations, and parts of a tensor, without PyTorch's dispatcher.

A plan allocates and views by the functions of Inductor's generated code, where PyTorch has them:
they take half the time of ``torch.empty`` and ``Tensor.as_strided``. What a launch alone reads is
an address, for which Triton's launcher needs no tensor.
"""

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

_new = object.__new__
_INDUCTORS = getattr(getattr(torch._C, "_dynamo", None), "guards", None)


def allocator(device):
    """A function that allocates on `device`, the current one of its kind, from shape, strides and
    dtype."""
    direct = getattr(_INDUCTORS, f"_empty_strided_{device.type}", None)

    def allocate(shape, strides, dtype):
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    return direct or allocate


def view():
    """A function that views a tensor's memory from its shape, its strides and where it starts, in
    elements from the first one of the tensor."""

    def as_strided(tensor, shape, strides, start):
        return tensor.as_strided(shape, strides, tensor.storage_offset() + start)

    return getattr(_INDUCTORS, "_reinterpret_tensor", as_strided)


class Part:
    """An address that tells in whose memory it lies: drivers that run kernels on the CPU let them
    reach the memory of tensors among the arguments, and no other."""

    __slots__ = ("base", "pointer")

    def data_ptr(self):
        return self.pointer


def address(tensor, start, shape, strides):
    """What a launch takes for a part of a tensor's memory, `start` bytes from its first one."""
    pointer = tensor.data_ptr() + start
    if tensor.is_cuda:
        return pointer
    part = _new(Part)
    part.base, part.pointer = tensor, pointer
    return part


def described(fields, base):
    """A tensor descriptor as one before, of other memory."""
    descriptor = _new(TensorDescriptor)
    own = descriptor.__dict__
    own.update(fields)
    own["base"] = base
    return descriptor


def contiguous(shape):
    """The strides of a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides[: len(shape)]))
