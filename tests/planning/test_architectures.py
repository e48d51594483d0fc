"""Planning, tuning and the doctor on any architecture: they end where they should, and say why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import run_cli
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    DeepseekV3Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    Qwen3MoeConfig,
)

from lora_fast.methods.table import METHODS
from lora_fast.planning import plan
from lora_fast.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("libraries_as_before")

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 144,
}
MIXTURE = {**SMALL, "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 32}
# As the hub has them: one per shape of a config that a command met with.
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"]),
    "qwen3-moe": Qwen3MoeConfig(
        **MIXTURE, num_experts=8, num_experts_per_tok=2, architectures=["Qwen3MoeForCausalLM"]
    ),
    "gpt-oss": GptOssConfig(
        **{**MIXTURE, "intermediate_size": 64},
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
        architectures=["GptOssForCausalLM"],
        quantization_config={"quant_method": "mxfp4"},
    ),
    "deepseek": DeepseekV3Config(
        **{**MIXTURE, "num_key_value_heads": 4},
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        architectures=["DeepseekV3ForCausalLM"],
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
    ),
    "bert": BertConfig(**SMALL, architectures=["BertForMaskedLM"]),
    "gpt2": GPT2Config(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, architectures=["GPT2LMHeadModel"]
    ),
}
OTHERS = ["t5", "whisper", "vit", "mamba", "xlnet", "wavlm", "bloom"]
NAMES = [*CONFIGS, *OTHERS]


def config_of(name: str) -> Any:
    if name in CONFIGS:
        return CONFIGS[name]
    config = AutoConfig.for_model(name)
    for count in ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers"):
        if isinstance(getattr(config, count, None), int):
            setattr(config, count, 2)
    kinds = (
        auto._model_mapping.get(type(config), None) for auto in (AutoModelForCausalLM, AutoModel)
    )
    kind: Any = next(kind for kind in kinds if kind)
    config.architectures = [kind.__name__]
    return config


@pytest.mark.parametrize("name", NAMES)
def test_every_command_ends_well_on_every_architecture(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_of(name).save_pretrained(tmp_path)
    for command in (
        ("plan", tmp_path, "--batch-size", 1, "--max-length", 16),
        ("tune", tmp_path, "--dry-run"),
        ("doctor", "--model", tmp_path, "--no-kernels"),
    ):
        assert run_cli(*command) == 0, (command, capsys.readouterr())
        shown = capsys.readouterr()
        assert "error" not in shown.err and "Traceback" not in shown.err
        words = " ".join(shown.out.split())
        assert any(text in words for text in ("total", "rows of", "to time", "as they would run"))


def test_what_cannot_run_fused_is_said_and_not_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reasons = {
        "qwen3-moe": "all-linear leaves out routers (model.layers.0.mlp.gate and 1 more)",
        "gpt2": "8 layers are not timed: base layer is Conv1D",
        "mamba": "all-linear leaves out dt_proj, out_proj, x_proj: the model multiplies",
        "gpt-oss": "the checkpoint is stored in mxfp4; this is for a copy in bfloat16",
    }
    for name, reason in reasons.items():
        config_of(name).save_pretrained(tmp_path / name)
        assert run_cli("tune", tmp_path / name, "--dry-run") == 0
        assert reason in " ".join(capsys.readouterr().out.split())
    assert run_cli("tune", tmp_path / "gpt2", "--dry-run") == 0
    assert "nothing to time" in capsys.readouterr().out


def test_experts_are_counted_apart_and_told_of() -> None:
    config = CONFIGS["qwen3-moe"]
    shape = {"batch_size": 1, "max_length": 16, "advise": False}
    adapted = plan(config, **shape)
    size = 2 * 8 * (2 * 32 * 64 + 64 * 32)  # layers, experts, gate and up, down
    # Half a byte, a byte of absmax for 64 elements, and of four weights the tables of constants.
    packed = adapted.parts["weights of experts, nf4"]
    assert 0 < packed - size * (1 / 2 + 1 / 64) < 4 * 4 * (16 + 256 + 16)
    about = adapted.notes[0]
    assert "experts: 98.3 K parameters in 2 modules" in about
    assert "in nf4, " in about
    assert "and LoRA trains" in about
    attention = plan(config, target_modules="q_proj,k_proj,v_proj,o_proj", **shape)
    assert attention.notes[0].endswith("and are not adapted")
    dense = plan(config, quantize="none", **shape)
    assert dense.parts["weights of experts, bfloat16"] == 2 * size
    assert "in bfloat16, " in dense.notes[0]


def test_fewer_target_modules_are_among_the_changes() -> None:
    shape = {"batch_size": 8, "max_length": 64}
    found = plan(CONFIGS["qwen3-moe"], **shape)
    what = "--target-modules q_proj,k_proj,v_proj,o_proj"
    saves = {change.what: change.saves for change in found.changes}
    named = plan(CONFIGS["qwen3-moe"], target_modules=what.split()[1], advise=False, **shape)
    assert saves[what] == found.total - named.total > 0
    assert not any(
        "--target-modules" in change.what
        for change in plan(CONFIGS["qwen3-moe"], target_modules="q_proj", **shape).changes
    )


def test_the_defaults_are_those_of_training() -> None:
    for name, task in (("llama", "causal-lm"), ("bert", "classification")):
        settings = plan(CONFIGS[name], advise=False).settings
        run = TrainConfig(model="m", data="d", task=task).with_defaults(0)
        for field in (
            "task",
            "method",
            "quantize",
            "batch_size",
            "optim",
            "gradient_checkpointing",
        ):
            assert getattr(settings, field) == getattr(run, field), (name, field)
        limit = CONFIGS[name].max_position_embeddings
        assert settings.max_length == min(run.max_length, limit)
        assert settings.rank == run.r == METHODS["lora"].options["r"]
