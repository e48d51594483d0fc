"""What works without bitsandbytes, PEFT or transformers, and the errors where they are needed.

Each test runs in a process in which the packages are absent, though they are installed here.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

from absent_packages import CHECKOUT, run_without

from lora_fast import optional_packages
from lora_fast.cli.errors import explain

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
PLAN = """
    import lora_fast
    from torch import nn
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    lora_fast.convert(model, "all-linear")
    assert lora_fast.plan(model, batch_size=2).total > 0
"""
CALLS = """
    import lora_fast, torch
    from torch import nn
    from pathlib import Path

    dense = nn.Sequential(nn.Linear(64, 8))
    converted = lora_fast.convert(nn.Sequential(nn.Linear(6, 8)), "all-linear")
    for call in (
        lambda: lora_fast.convert(dense, "all-linear", quantize="nf4"),
        lambda: lora_fast.NF4Weight.from_dense(torch.ones(4, 64)),
        lambda: lora_fast.save_adapter(converted, Path("new")),
        lambda: lora_fast.load_adapter(converted, Path("old")),
        lambda: lora_fast.LoraFastCallback(),
        lambda: lora_fast.plan("sshleifer/tiny-gpt2"),
    ):
        try:
            call()
        except ImportError as error:
            print(error.name, "|", error)
    assert type(dense[0]) is nn.Linear
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


def test_what_is_needed_is_named_with_what_installs_it(tmp_path: Path) -> None:
    said = run_without("bitsandbytes", "peft", "transformers", code=CALLS, cwd=tmp_path)
    names, messages = zip(*(line.split(" | ") for line in said.splitlines()), strict=True)
    assert names == ("bitsandbytes",) * 2 + ("peft",) * 2 + ("transformers",) * 2
    for name, message in zip(names, messages, strict=True):
        extra = {"bitsandbytes": "qlora", "peft": "peft", "transformers": "train"}[name]
        assert f"needs {name}, which is not installed: pip install {name}" in message
        assert f"pip install '.[{extra}]'" in message


def test_the_extras_that_messages_name_install_the_package() -> None:
    extras = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    for package, extra in optional_packages._EXTRAS.items():
        lines = extras["optional-dependencies"][extra]
        assert any(line.startswith((package, f"lora_fast[{package}")) for line in lines), package


def test_a_package_that_fails_to_import_is_not_called_absent(tmp_path: Path) -> None:
    (tmp_path / "peft.py").write_text("import no_such_module")
    code = """
        from lora_fast.optional_packages import needed
        try:
            needed("peft", "this test")
        except ImportError as error:
            print(type(error).__name__, error.name)
    """
    assert run_without(code=code, cwd=tmp_path) == "ModuleNotFoundError no_such_module"


def test_planning_a_plain_model_needs_none_of_them(tmp_path: Path) -> None:
    hidden = ("bitsandbytes", "peft", "transformers", "safetensors", "huggingface_hub")
    assert run_without(*hidden, code=PLAN + LOADED, cwd=tmp_path) == ""


def test_the_command_line_trains_a_dense_model_without_bitsandbytes(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{n} is even", "label": str(n % 2 == 0)}) for n in range(16)]
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    code = """
        import sys
        from lora_fast.cli.app import main
        options = "--data few.jsonl --steps 2 --batch-size 2 --max-length 8 --out"
        for quantize in ("nf4", "none"):
            try:
                main(["train", *options.split(), quantize, "--quantize", quantize])
            except SystemExit as end:
                print(end.code)
    """
    *_, last = run_without("bitsandbytes", code=code, cwd=tmp_path).splitlines()
    assert last == "0"
    assert not (tmp_path / "nf4" / "metrics.json").exists()
    versions = json.loads((tmp_path / "none" / "metrics.json").read_text())["versions"]
    assert versions.keys() == {"torch", "transformers", "peft"}


def test_the_package_behind_an_error_without_a_name_is_found() -> None:
    """As transformers raises them, from one another."""
    try:
        try:
            raise ModuleNotFoundError("No module named 'cloudpickle'", name="cloudpickle.part")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("Could not import module 'GenerationMixin'") from error
    except ModuleNotFoundError as error:
        assert optional_packages.absent_package(error) == "cloudpickle"
        assert "cloudpickle is not installed" in str(explain(error, Path()))
    assert optional_packages.absent_package(ModuleNotFoundError("no name")) is None


def test_a_command_says_what_is_missing_in_a_line() -> None:
    error = optional_packages.MissingPackageError("--quantize nf4 needs bitsandbytes, which …")
    assert str(explain(error, Path())) == str(error)
