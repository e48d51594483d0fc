"""The doctor's findings: it reports what works and finds what is broken."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from tiny_runs import run_cli, save_llama
from transformers import AutoModelForCausalLM

from lora_fast.doctor import compile_check, diagnosis
from lora_fast.doctor.compile_check import KernelCheck, compile_kernels, parse_arch
from lora_fast.doctor.diagnosis import diagnose
from lora_fast.features import SHARDED_INTEGERS


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def paths(found: diagnosis.Diagnosis) -> dict[tuple[str, str, str | None], int]:
    return {(path.kind, path.base, path.obstacle): path.count for path in found.layers}


@pytest.mark.parametrize(
    ("method", "kind", "count"),
    [("lora", "lora.Linear", 14), ("adalora", "adalora.SVDLinear", 14), ("ia3", "ia3.Linear", 6)],
)
def test_every_layer_of_a_method_has_its_path(
    method: str, kind: str, count: int, llama: Path
) -> None:
    found = diagnose(model=str(llama), method=method, quantize="nf4", kernels=False)
    assert paths(found) == {(kind, "nf4", None): count}
    assert found.problems == ()


def test_layers_of_an_adapter_say_why_they_are_not_fused(llama: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
    model.save_pretrained(tmp_path)
    found = diagnose(model=str(llama), adapter=str(tmp_path), kernels=False)
    assert paths(found) == {
        ("lora.Embedding", "bfloat16", "lora.Embedding has no fused path"): 1,
        ("lora.Linear", "bfloat16", None): 2,
    }
    assert {path.example for path in found.layers} == {
        "model.embed_tokens",
        "model.layers.0.self_attn.q_proj",
    }


def test_a_config_without_weights_and_what_it_would_do(llama: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head", "c_attn"], lora_dropout=0.1)
    config.save_pretrained(tmp_path)
    for given in (tmp_path, tmp_path / "adapter_config.json"):
        found = diagnose(model=str(llama), config=str(given), autocast="bf16", kernels=False)
        assert paths(found) == {("lora.Linear", "bfloat16", None): 3}
        said = [line.split(":")[0] for line in found.warnings]
        assert said == [
            "lm_head",
            "adapters",
            "lora_dropout = 0.1 is applied here; libraries whose kernels have none leave it out "
            "or run PEFT's code, so losses beside theirs differ",
            "target_modules of default",
        ]
    assert found.to_dict()["warnings"] == found.warnings
    with pytest.raises(ValueError, match="autocast must be one of none, bf16, fp16, got 'int8'"):
        diagnose(autocast="int8", kernels=False)


def test_packages_out_of_range_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch>=99", "peft>=0.1; extra == 'peft'", "bitsandbytes>=0.1; extra == 'qlora'"]
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    found = diagnose(kernels=False)
    assert [problem.split()[0] for problem in found.problems] == ["torch"]
    assert "must be >=99" in found.problems[0]


def test_what_is_too_old_for_the_commands_alone_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ["peft>=0.1; extra == 'peft'", "torch>=2"]
    commands = [
        "peft>=99; extra == 'train'",
        "torch>=2; extra == 'train'",
        "rich>=1; extra == 'train'",
    ]
    tools = ["torch>=99; extra == 'bench'"]
    monkeypatch.setattr(metadata, "requires", lambda name: [*library, *commands, *tools])
    found = diagnose(kernels=False)
    assert found.problems == ()
    (reason,) = found.switched_off
    assert reason == f"lora-fast's commands: need peft >=99, got {metadata.version('peft')}"


def test_a_feature_that_needs_more_is_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lora_fast.features.installed", lambda package: (2, 11, 0))
    found = diagnose(kernels=False)
    assert found.problems == () and SHARDED_INTEGERS.obstacle() in found.switched_off
    assert run_cli("doctor", "--no-kernels") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"off {SHARDED_INTEGERS.obstacle()}" in shown


def test_a_required_package_that_is_absent_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def without(name: str) -> str:
        if name in ("numpy", "bitsandbytes", "peft"):
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without)
    found = diagnose(kernels=False)
    assert len(found.problems) == 1 and found.problems[0].startswith("numpy is absent")


def test_a_kernel_that_does_not_compile_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise RuntimeError("ptxas died\nof old age")

    monkeypatch.setattr(compile_check, "_layers", lambda: {"LoRA": fails, "none": lambda: None})
    assert run_cli("doctor") == 1
    shown = capsys.readouterr().out
    assert "LoRA does not compile for sm_90: RuntimeError: ptxas died" in shown.replace("\n", " ")
    assert run_cli("doctor", "--json", "--arch", "sm_80") == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["healthy"] and found["arch"] == 80
    assert found["kernels"][0]["error"] == "RuntimeError: ptxas died"


GEMMS = ("ticketed_gemm", "strips")
LAUNCHED = {
    "QLoRA, many rows": ("nf4_decode", *GEMMS),
    "DoRA's norms": ("row_norms",),
    "merging": ("weight_update",),
}


def compiled(arch: int, told: Callable[[str], None]) -> Iterator[KernelCheck]:
    """What compiling every layer gives, without compiling."""
    for layer in compile_check._layers():
        told(layer)
        for kernel in LAUNCHED.get(layer, GEMMS):
            shared = 0 if kernel == "nf4_decode" else 227 * 1024
            yield KernelCheck(layer, kernel, None, 9.94, shared, 8)


def test_the_command_shows_one_screen(
    llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 lines of 80 columns, one for each kind of layer that is compiled."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(diagnosis, "compile_kernels", compiled)
    monkeypatch.chdir(llama.parent)
    assert run_cli("doctor", "--model", f"./{llama.name}") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    heads = ["lora_fast ", "GPU ", "backend ", "kernels ", "layers ", "✓ nothing is broken"]
    found = [next(i for i, line in enumerate(lines) if line.startswith(head)) for head in heads]
    assert found == sorted(found) and found[-1] == len(lines) - 1
    rows = [line.split("  ", 2) for line in lines[found[3] + 1 : found[4]]]
    assert [row[1] for row in rows] == list(compile_check._layers())
    assert rows[3][2].strip() == "nf4_decode 0 K, ticketed_gemm 227 K, strips 227 K  9.9 s"
    (layers,) = lines[found[4] + 1 : found[5]]
    assert layers == "  14 × lora.Linear on nf4: fused (model.layers.0.self_attn.q_proj)"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--arch", "sm_42"),
        ("--model", "./absent"),
        ("--model", "LLAMA", "--method", "lorra"),
        ("--model", "LLAMA", "--quantize", "int3"),
        ("--model", "LLAMA", "--adapter", "LLAMA"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(
    arguments: tuple[Any, ...],
    llama: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before any kernel is compiled, which takes a minute."""
    compiled: list[Any] = []
    monkeypatch.setattr(diagnosis, "compile_kernels", lambda *args: compiled.append(args) or ())
    given = [llama if argument == "LLAMA" else argument for argument in arguments]
    assert run_cli("doctor", *given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not compiled


def test_architectures_are_read_in_every_spelling() -> None:
    assert {parse_arch(text) for text in ("sm_90", "sm_90a", "9.0", "90")} == {90}
    assert parse_arch("12.0") == 120


@pytest.mark.offline
@pytest.mark.parametrize("arch", [80, 120])
def test_kernels_compile_for_a_device_that_is_not_there(
    arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_layers = compile_check._layers()
    some = {name: all_layers[name] for name in ("QLoRA, few rows", "DoRA's norms", "merging")}
    monkeypatch.setattr(compile_check, "_layers", lambda: some)
    told: list[str] = []
    found = compile_kernels(arch, told.append)
    assert [c.kernel for c in compile_kernels(arch)] == [c.kernel for c in found]
    assert told == list(some)
    assert [check.error for check in found] == [None] * len(found)
    names = {check.kernel for check in found}
    assert names == {"ticketed_gemm", "strips", "row_norms", "weight_update"}
    limit = compile_check.DEVICES[arch][0] * compile_check.KIB
    assert all(0 < check.shared_bytes <= limit for check in found)
