"""Every source file has its tests: in the file of its name, or in the one that is named here."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Where a file is part of what another one does, and is tested with it.
TESTED_IN = {
    "kernels/environment.py": "kernels/test_launch_policy.py",
    "kernels/activations.py": "kernels/test_gated_kernels.py",
    "kernels/expert_gate_backward.py": "kernels/test_expert_gate.py",
    "kernels/expert_gate_forward.py": "kernels/test_expert_gate.py",
    "kernels/expert_gate_gradients.py": "kernels/test_expert_gate.py",
    "kernels/expert_gate_tiles.py": "kernels/test_expert_gate.py",
    "kernels/expert_gradients.py": "kernels/test_expert_kernels.py",
    "kernels/expert_policy.py": "kernels/test_expert_kernels.py",
    "kernels/expert_product.py": "kernels/test_expert_kernels.py",
    "kernels/expert_scatter.py": "kernels/test_expert_kernels.py",
    "kernels/expert_shrink.py": "kernels/test_expert_kernels.py",
    "kernels/expert_sums.py": "kernels/test_expert_gate.py",
    "kernels/gated_backward.py": "kernels/test_gated_kernels.py",
    "kernels/gated_forward.py": "kernels/test_gated_kernels.py",
    "kernels/gated_gradients.py": "kernels/test_gated_kernels.py",
    "kernels/gated_policy.py": "kernels/test_gated_offline.py",
    "kernels/gated_scales.py": "kernels/test_gated_kernels.py",
    "kernels/gated_tiles.py": "kernels/test_gated_kernels.py",
    "kernels/gemm_tiles.py": "kernels/test_kernels.py",
    "kernels/nf4_codes.py": "kernels/test_nf4_decode.py",
    "kernels/nf4_tile.py": "kernels/test_nf4_gemm.py",
    "kernels/scaling.py": "kernels/test_small_gradients.py",
    "kernels/shrink_tiles.py": "kernels/test_kernels.py",
    "kernels/strip_tiles.py": "kernels/test_kernels.py",
    "kernels/strips.py": "kernels/test_kernels.py",
    "kernels/surroundings.py": "kernels/test_launch_plans.py",
    "kernels/sync_layout.py": "kernels/test_stuck.py",
    "kernels/ticketed_gemm.py": "kernels/test_kernels.py",
    "lora_fast/factors.py": "test_functional.py",
    "lora_fast/gated.py": "operation/test_gated_mlp.py",
    "lora_fast/peft_layers/plain_groups.py": "peft_layers/test_shared_input.py",
    "lora_fast/skeleton.py": "planning/test_memory.py",
    "lora_fast/version.py": "project/test_packaging.py",
    "lora_fast/backends/protocol.py": "backends/test_backends.py",
    "lora_fast/backends/selection.py": "backends/test_backends.py",
    "lora_fast/backends/torch_dropout.py": "test_functional.py",
    "lora_fast/backends/torch_experts.py": "operation/test_expert_layers.py",
    "lora_fast/backends/torch_grouped.py": "operation/test_expert_layers.py",
    "lora_fast/backends/torch_gates.py": "operation/test_expert_layers.py",
    "lora_fast/experts/module_layout.py": "peft_layers/test_expert_wrappers.py",
    "lora_fast/experts/storage.py": "experts/test_quantisation.py",
    "lora_fast/peft_layers/expert_merging.py": "experts/test_quantisation.py",
    "lora_fast/peft_layers/expert_state.py": "peft_layers/test_expert_wrappers.py",
    "lora_fast/experts/nf4_experts.py": "operation/test_expert_layers.py",
    "lora_fast/experts/operands.py": "operation/test_expert_layers.py",
    "lora_fast/operation/expert_validation.py": "operation/test_expert_layers.py",
    "lora_fast/backends/torch_gated.py": "operation/test_gated_mlp.py",
    "lora_fast/backends/torch_gated_rows.py": "operation/test_gated_mlp.py",
    "lora_fast/backends/torch_opaque.py": "operation/test_low_rank.py",
    "lora_fast/backends/triton_opaque.py": "operation/test_low_rank.py",
    "lora_fast/base_layer/int8.py": "peft_layers/test_opaque_layers.py",
    "lora_fast/operation/int8_product.py": "peft_layers/test_opaque_layers.py",
    "lora_fast/base_layer/opaque.py": "peft_layers/test_opaque_layers.py",
    "lora_fast/backends/torch_low_rank.py": "backends/test_torch_products.py",
    "lora_fast/backends/torch_ops.py": "test_functional.py",
    "lora_fast/backends/triton_expert_products.py": "backends/test_triton_experts.py",
    "lora_fast/backends/triton_gradients.py": "backends/test_routes.py",
    "lora_fast/backends/triton_operands.py": "backends/test_routes.py",
    "lora_fast/backends/triton_own_gates.py": "backends/test_triton_expert_plans.py",
    "lora_fast/backends/triton_ops.py": "backends/test_routes.py",
    "lora_fast/base_layer/call_counts.py": "acceleration/test_report.py",
    "lora_fast/base_layer/obstacles.py": "base_layer/test_linear.py",
    "lora_fast/cli/console.py": "cli/test_app.py",
    "lora_fast/cli/doctor.py": "doctor/test_diagnosis.py",
    "lora_fast/cli/errors.py": "cli/test_words.py",
    "lora_fast/cli/merge.py": "export/test_merged_model.py",
    "lora_fast/cli/options.py": "cli/test_help.py",
    "lora_fast/cli/streams.py": "cli/test_help.py",
    "lora_fast/cli/train.py": "cli/test_runs.py",
    "lora_fast/doctor/compile_check.py": "doctor/test_diagnosis.py",
    "lora_fast/export/base_checkpoint.py": "export/test_files.py",
    "lora_fast/export/changes.py": "export/test_methods.py",
    "lora_fast/export/model_writer.py": "export/test_merged_model.py",
    "lora_fast/four_bit/decoded.py": "operation/test_recomputation.py",
    "lora_fast/files/adapter_files.py": "export/test_files.py",
    "lora_fast/files/fingerprint.py": "export/test_origin.py",
    "lora_fast/files/json_files.py": "training/test_artefacts.py",
    "lora_fast/files/peft_format.py": "files/test_peft_files.py",
    "lora_fast/files/peft_read_back.py": "modules/test_model_families.py",
    "lora_fast/files/run_files.py": "training/test_inputs.py",
    "lora_fast/files/safe_files.py": "export/test_files.py",
    "lora_fast/files/sizes.py": "planning/test_cards.py",
    "lora_fast/gated_mlps/closed_code.py": "gated_mlps/test_discovery.py",
    "lora_fast/gated_mlps/operands.py": "gated_mlps/test_fused_mlp.py",
    "lora_fast/gated_mlps/status.py": "gated_mlps/test_switch.py",
    "lora_fast/gated_mlps/symbols.py": "gated_mlps/test_discovery.py",
    "lora_fast/methods/adapters.py": "methods/test_table.py",
    "lora_fast/methods/base_model.py": "training/test_models.py",
    "lora_fast/methods/options.py": "methods/test_table.py",
    "lora_fast/modules/dora.py": "modules/test_dora_and_vera.py",
    "lora_fast/modules/vera.py": "modules/test_dora_and_vera.py",
    "lora_fast/modules/weight_reads.py": "modules/test_model_families.py",
    "lora_fast/operation/autograd.py": "test_functional.py",
    "lora_fast/operation/compiled_groups.py": "operation/test_compiled_ops.py",
    "lora_fast/peft_layers/adalora_layers.py": "peft_layers/test_methods.py",
    "lora_fast/peft_layers/call_reader.py": "peft_layers/test_forward_source.py",
    "lora_fast/peft_layers/four_bit_classes.py": "peft_layers/test_tuners.py",
    "lora_fast/peft_layers/fused_forward.py": "peft_layers/test_fallbacks.py",
    "lora_fast/peft_layers/ia3_layers.py": "peft_layers/test_methods.py",
    "lora_fast/peft_layers/lora_merging.py": "peft_layers/test_merging.py",
    "lora_fast/peft_layers/lora_state.py": "peft_layers/test_lora_layers.py",
    "lora_fast/peft_layers/module_conditions.py": "peft_layers/test_forward_source.py",
    "lora_fast/peft_layers/vera_layers.py": "peft_layers/test_methods.py",
    "lora_fast/planning/advice.py": "planning/test_memory.py",
    "lora_fast/planning/memory_plan.py": "planning/test_memory.py",
    "lora_fast/planning/settings.py": "planning/test_memory.py",
    "lora_fast/planning/states.py": "planning/test_memory.py",
    "lora_fast/training/comparison_table.py": "training/test_comparison.py",
    "lora_fast/training/events.py": "training/test_run.py",
    "lora_fast/training/experiment.py": "training/test_run.py",
    "lora_fast/training/folder.py": "cli/test_runs.py",
    "lora_fast/training/summary.py": "training/test_run.py",
    "lora_fast/training/trainer.py": "training/test_run.py",
    "bench/accuracy_table.py": "bench/test_bench.py",
    "bench/builtin_model.py": "bench/test_bench.py",
    "bench/decoder_layer.py": "bench/test_bench.py",
    "bench/gated_mlp.py": "bench/test_bench.py",
    "bench/delta_lora_rounding.py": "optim/test_delta_lora.py",
    "bench/quantised_base.py": "bench/test_bench.py",
    "bench/linear.py": "bench/test_bench.py",
    "bench/linear_cases.py": "bench/test_bench.py",
    "bench/expert_blocks.py": "bench/test_experts.py",
    "bench/expert_counts.py": "bench/test_experts.py",
    "bench/expert_graphs.py": "bench/test_experts.py",
    "bench/expert_plots.py": "bench/test_experts.py",
    "bench/host_experts.py": "bench/test_host.py",
    "bench/instruments/launchless.py": "bench/test_host.py",
    "bench/instruments/device_label.py": "bench/test_bench.py",
    "bench/instruments/paired.py": "bench/test_bench.py",
    "bench/instruments/gated_traffic.py": "bench/offline/test_traffic.py",
    "bench/instruments/passes.py": "bench/offline/test_traffic.py",
    "bench/instruments/traffic.py": "bench/offline/test_traffic.py",
    **{
        f"bench/gpu_day/{name}.py": f"bench/gpu_day/test_{test}.py"
        for test, names in {
            "decisive": "measured_e",
            "rehearsal": "accuracy blocks_of_experts ceilings decoder_layers one_step operations "
            "plans run_units",
            "measuring": "device integrations linears modelled stand_in tables timing",
            "day": "commands journal report runner steps",
        }.items()
        for name in names.split()
    },
    "bench/gpu_day/plots.py": "bench/test_pictures.py",
    **{
        f"bench/offline/{name}.py": f"bench/offline/test_{test}.py"
        for test, names in {
            "offline": "contestants layers lorafusion_graph markdown operations tables tasks "
            "unsloth_graph",
            "activated": "nemo_graph",
            "check": "band counting issue machine_code regression variants whole_layer",
        }.items()
        for name in names.split()
    },
    "bench/offline/one_case.py": "bench/test_machine_code.py",
    "bench/offline/plots.py": "bench/test_pictures.py",
}


def sources() -> list[Path]:
    """What can have tests of its own: neither packages nor commands nor pytest's benchmarks."""
    found = [
        p for folder in ("kernels", "lora_fast", "bench") for p in (ROOT / folder).rglob("*.py")
    ]
    left_out = ("__init__", "__main__", "conftest", "test_linear")
    return sorted(p.relative_to(ROOT) for p in found if p.stem not in left_out)


def own_test(source: Path) -> Path:
    parts = source.parts[1:] if source.parts[0] == "lora_fast" else source.parts
    return ROOT.joinpath("tests", *parts).with_name(f"test_{source.name}")


def test_every_source_has_its_tests() -> None:
    without = [str(s) for s in sources() if not own_test(s).is_file() and str(s) not in TESTED_IN]
    assert without == []


def test_the_table_is_true() -> None:
    known = {str(s): own_test(s) for s in sources()}
    assert TESTED_IN.keys() <= known.keys()
    assert [s for s in TESTED_IN if known[s].is_file()] == [], "these have tests of their own"
    assert [t for t in TESTED_IN.values() if not (ROOT / "tests" / t).is_file()] == []
