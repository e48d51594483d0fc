"""QLoRA sharded by FSDP2 and fused: `fully_shard` around accelerated layers, nothing else.

    pip install '.[peft]'                                                # from a clone
    torchrun --nproc_per_node 2 examples/fsdp2_qlora.py --smoke          # a CPU, no network
    torchrun --nproc_per_node 8 examples/fsdp2_qlora.py --model PATH_OR_HUB_ID --text FILE

The NF4 bytes are stored as bfloat16, so that FSDP2 shards them as it does any other parameter.
--smoke trains a tiny Llama with random weights, again in one process, and compares the losses.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

import lora_fast

LENGTH, SEQUENCES = 64, 8


def tiny_llama(folder: str) -> None:
    """A small model with random weights on disk, as a pretrained one would lie there."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def qlora(name: str, device: torch.device) -> Any:
    """The model `name` in NF4 with LoRA in every linear layer, on the fused path."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=dtype,
        device_map={"": device},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=torch.bfloat16,
        ),
    )
    model = prepare_model_for_kbit_training(
        model, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    set_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return lora_fast.accelerate(get_peft_model(model, config)).train()


def shard(model: Any, device: torch.device) -> None:
    """One group of parameters for each decoder layer, the rest in the root's."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def sequences(name: str | None, text: str | None, steps: int) -> Tensor:
    """[steps, SEQUENCES, LENGTH] tokens: of the file `text`, or counts upwards."""
    if name is None or text is None:
        starts = torch.randint(
            64, (steps, SEQUENCES, 1), generator=torch.Generator().manual_seed(0)
        )
        return (starts + torch.arange(LENGTH)) % 64
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokens = torch.tensor(tokenizer(Path(text).read_text())["input_ids"])
    count = steps * SEQUENCES * LENGTH
    return tokens.repeat(-(-count // len(tokens)))[:count].view(steps, SEQUENCES, LENGTH)


def train(model: Any, data: Tensor, rank: int, world: int) -> list[float]:
    """The loss of every step, over all processes."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for batch in data.to(next(model.parameters()).device):
        tokens = batch[rank::world]
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().float()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or hub id; default: a tiny model")
    parser.add_argument("--text", help="a text file to train on, with --model")
    parser.add_argument("--steps", type=int, default=100, help="default 100")
    parser.add_argument(
        "--smoke", action="store_true", help="eight steps, compared with one process"
    )
    options = parser.parse_args()
    if (options.model is None) != (options.text is None):
        parser.error("--model and --text must be given together")
    if "RANK" not in os.environ:
        sys.exit(f"start it with torchrun: torchrun --nproc_per_node 2 {' '.join(sys.argv)}")
    if options.model is not None:
        return run(options, options.model)
    with tempfile.TemporaryDirectory() as folder:
        # Before the processes know of each other: transformers then saves in the first alone.
        tiny_llama(folder)
        return run(options, folder)


def run(options: argparse.Namespace, name: str) -> int:
    """Train the model `name` in all processes and, for --smoke, in this one; the exit status."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    rank, world = dist.get_rank(), dist.get_world_size()
    data = sequences(options.model, options.text, 8 if options.smoke else options.steps)
    model = qlora(name, device)
    shard(model, device)
    losses = train(model, data, rank, world)
    dist.destroy_process_group()
    if rank > 0:
        return 0
    counted = lora_fast.report(model)
    print(f"{counted.fused_calls} fused calls, fallbacks: {counted.fallback_calls or 'none'}")
    print(f"loss {losses[0]:.6f} → {losses[-1]:.6f} in {world} processes")
    if not options.smoke:
        return 0
    alone = train(qlora(name, device), data, 0, 1)
    print(f"loss {alone[0]:.6f} → {alone[-1]:.6f} in one")
    apart = max(abs(a - b) / abs(b) for a, b in zip(losses, alone, strict=True))
    # 16-bit activations are rounded in another order, which every step carries on.
    allowed = 2e-2 if cuda else 1e-4
    print(f"largest relative difference of a step's loss {apart:.1e}, allowed {allowed:.0e}")
    return 0 if apart <= allowed else 1


if __name__ == "__main__":
    sys.exit(main())
