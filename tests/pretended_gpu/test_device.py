"""The pretended device does what a GPU does with tensors."""

from __future__ import annotations

import copy
import io

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.pretended]
GPU = torch.device("cuda")


def test_operands_on_two_devices_are_refused() -> None:
    there, here = torch.ones(2, 3, device=GPU), torch.ones(3, 4)
    with pytest.raises(RuntimeError, match="same device"):
        there @ here
    # A number may lie anywhere.
    assert (there * torch.tensor(2.0)).device.type == "cuda"


def test_views_writes_and_gradients() -> None:
    base = torch.arange(12.0, device=GPU).view(3, 4)
    view = base.t()[1:3]
    view.zero_()
    assert view.is_cuda and base[:, 1:3].sum() == 0 and base.sum() == 3 + 4 + 7 + 8 + 11
    x = torch.full((3, 4), 2.0, device=GPU, requires_grad=True)
    x.square().sum().backward()
    assert x.grad is not None and x.grad.is_cuda
    assert torch.equal(x.grad.cpu(), torch.full((3, 4), 4.0))
    out = torch.empty(0, device=GPU)
    torch.mul(base, 2.0, out=out)
    assert out.shape == base.shape and torch.equal(out.cpu(), 2.0 * base.cpu())


def test_layers_move_and_are_cast() -> None:
    layer = torch.nn.Linear(4, 3).to(GPU, torch.bfloat16)
    with torch.autocast("cuda", torch.float16):
        y = layer(torch.ones(2, 4, device=GPU))
    assert layer.weight.is_cuda and (y.device.type, y.dtype) == ("cuda", torch.float16)


def test_inference_mode_keeps_views_of_ordinary_tensors_ordinary() -> None:
    ordinary = torch.ones(3, 4, device=GPU)
    with torch.inference_mode():
        assert not ordinary[0].is_inference()
        made = ordinary + ordinary
        assert made.is_inference() and made[0].is_inference()
        assert torch.nn.functional.embedding(torch.tensor([[1, 2]], device=GPU), made).is_cuda


def test_a_product_of_narrow_operands_is_not_rounded_to_their_dtype() -> None:
    row = torch.tensor([[1.0, 2.0**-10]], dtype=torch.bfloat16, device=GPU)
    found = torch.mm(row, torch.ones_like(row).t(), out_dtype=torch.float32)
    assert found.is_cuda and found.item() == 1.0 + 2.0**-10


def test_copies_files_and_pinned_memory() -> None:
    x = torch.arange(12.0, device=GPU).view(3, 4)
    file = io.BytesIO()
    torch.save({"whole": x, "part": x[1:]}, file)
    for device in (None, "cpu"):
        file.seek(0)
        found = torch.load(file, map_location=device)
        assert found["part"].is_cuda == (device is None)
        assert torch.equal(found["part"].cpu(), x[1:].cpu())
        assert found["part"].untyped_storage().data_ptr() == found["whole"].data_ptr()
    copied = copy.deepcopy(x)
    x.zero_()
    assert copied.is_cuda and copied.sum() == 66
    assert copied.cpu().pin_memory().to(GPU).sum() == 66


def test_the_state_of_the_generator() -> None:
    torch.manual_seed(1)
    state = torch.cuda.get_rng_state()
    generator = torch.cuda.default_generators[0]
    assert (generator.initial_seed(), generator.get_offset()) == (1, 0)
    generator.set_offset(generator.get_offset() + 8)
    assert not torch.equal(torch.cuda.get_rng_state(), state)
    torch.cuda.set_rng_state(state)
    assert generator.get_offset() == 0
    generator.set_offset(4)
    torch.manual_seed(1)
    assert torch.equal(torch.cuda.get_rng_state(), state)
