"""What works without bitsandbytes, PEFT or transformers, and what is said where they are needed.

Each test runs in a process in which the packages are absent, though they are installed here.
"""

from __future__ import annotations

from pathlib import Path

from absent_packages import run_without

LOADED = """
    import sys
    names = {"bitsandbytes", "peft", "transformers"}
    print(*sorted(names & {name.split(".")[0] for name in sys.modules}))
"""
OPERATION = """
    import torch, lora_fast
    x, W, A, B = (torch.randn(shape) for shape in ((5, 6), (7, 6), (2, 6), (7, 2)))
    B.requires_grad_()
    y = lora_fast.functional.adapted_linear(x, W, A=A, B=B, scaling=0.5)
    y.sum().backward()
    torch.testing.assert_close(y, lora_fast.reference.adapted_linear(x, W, A=A, B=B, scaling=0.5))
    assert B.grad.abs().min() > 0
"""
OWN_LAYERS = """
    import torch, lora_fast
    from torch import nn
    for method in ("lora", "dora", "vera"):
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        lora_fast.convert(model, "all-linear", method=method, r=2)
        model(torch.randn(3, 6)).square().sum().backward()
        found = lora_fast.report(model)
        assert found.all_fused and found.fused_calls == 2, found
        for layer in (model[0], model[2]):
            layer.merge()
            layer.unmerge()
"""
PEFT_LAYERS = """
    import torch, lora_fast
    from peft import AdaLoraConfig, IA3Config, LoraConfig, VeraConfig, get_peft_model
    from torch import nn

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.q_proj(x) * self.k_proj(x)

    names = ["q_proj", "k_proj"]
    for config in (
        LoraConfig(r=2, target_modules=names),
        LoraConfig(r=2, target_modules=names, use_dora=True),
        VeraConfig(r=2, target_modules=names),
        AdaLoraConfig(init_r=2, target_r=1, total_step=9, target_modules=names),
        IA3Config(target_modules=names, feedforward_modules=[]),
    ):
        model = lora_fast.accelerate(get_peft_model(Attention(), config))
        model(torch.randn(3, 8)).square().sum().backward()
        found = lora_fast.report(model)
        assert found.all_fused and found.fused_calls == 2, found
        model.merge_adapter()
        model.unmerge_adapter()
        lora_fast.decelerate(model)
        assert not lora_fast.report(model).all_fused
"""


def test_the_operation_needs_none_of_them(tmp_path: Path) -> None:
    hidden = ("bitsandbytes", "peft", "transformers", "safetensors", "huggingface_hub")
    assert run_without(*hidden, code=OPERATION + LOADED, cwd=tmp_path) == ""


def test_own_layers_need_none_of_them(tmp_path: Path) -> None:
    hidden = ("bitsandbytes", "peft", "transformers", "safetensors", "huggingface_hub")
    assert run_without(*hidden, code=OWN_LAYERS + LOADED, cwd=tmp_path) == ""


def test_own_layers_on_dense_weights_load_none_of_them_where_they_are_there(tmp_path: Path) -> None:
    assert run_without(code=OWN_LAYERS + LOADED, cwd=tmp_path) == ""


def test_every_kind_of_peft_layer_on_dense_weights_needs_no_bitsandbytes(tmp_path: Path) -> None:
    found = run_without("bitsandbytes", code=PEFT_LAYERS + LOADED, cwd=tmp_path)
    assert found == "peft transformers"
