"""LoRA under DistributedDataParallel and fused, with gradients accumulated over micro-batches.

    pip install '.[peft]'                                        # from a clone
    torchrun --nproc_per_node 2 examples/ddp.py --smoke          # a CPU, no network
    torchrun --nproc_per_node 8 examples/ddp.py --model PATH_OR_HUB_ID --text FILE

--smoke trains a tiny Llama with random weights, again in one process, and compares the losses.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

import lora_fast

LENGTH, SEQUENCES, MICRO_BATCHES = 64, 8, 2


def lora(name: str | None, device: torch.device) -> Any:
    """The model `name`, or a tiny one, with LoRA in every linear layer, on the fused path."""
    set_seed(0)
    if name is None:
        config = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    else:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return lora_fast.accelerate(get_peft_model(model.to(device), config)).train()


def sequences(name: str | None, text: str | None, steps: int) -> Tensor:
    """[steps, MICRO_BATCHES, SEQUENCES, LENGTH] tokens: of the file `text`, or counts upwards."""
    shape = (steps, MICRO_BATCHES, SEQUENCES, LENGTH)
    if name is None or text is None:
        generator = torch.Generator().manual_seed(0)
        return (
            torch.randint(64, (*shape[:-1], 1), generator=generator) + torch.arange(LENGTH)
        ) % 64
    tokens = torch.tensor(AutoTokenizer.from_pretrained(name)(Path(text).read_text())["input_ids"])
    count = torch.Size(shape).numel()
    return tokens.repeat(-(-count // len(tokens)))[:count].view(shape)


def train(model: Any, data: Tensor, rank: int, world: int) -> list[float]:
    """The loss of every step, over all processes."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for step in data.to(next(model.parameters()).device):
        total = torch.zeros((), device=step.device)
        for number, batch in enumerate(step, start=1):
            # Gradients are exchanged once a step, with those of the last micro-batch.
            exchange = world == 1 or number == MICRO_BATCHES
            with contextlib.nullcontext() if exchange else model.no_sync():
                tokens = batch[rank::world]
                loss = model(input_ids=tokens, labels=tokens).loss / MICRO_BATCHES
                loss.backward()
            total += loss.detach().float()
        optimizer.step()
        optimizer.zero_grad()
        if world > 1:
            dist.all_reduce(total)
        losses.append(total.item() / world)
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
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    rank, world = dist.get_rank(), dist.get_world_size()
    data = sequences(options.model, options.text, 8 if options.smoke else options.steps)
    model = lora(options.model, device)
    losses = train(DistributedDataParallel(model) if world > 1 else model, data, rank, world)
    dist.destroy_process_group()
    if rank > 0:
        return 0
    counted = lora_fast.report(model)
    print(f"{counted.fused_calls} fused calls, fallbacks: {counted.fallback_calls or 'none'}")
    print(f"loss {losses[0]:.6f} → {losses[-1]:.6f} in {world} processes")
    if not options.smoke:
        return 0
    alone = train(lora(options.model, device), data, 0, 1)
    print(f"loss {alone[0]:.6f} → {alone[-1]:.6f} in one")
    apart = max(abs(a - b) / abs(b) for a, b in zip(losses, alone, strict=True))
    # 16-bit activations are rounded in another order, which every step carries on.
    allowed = 2e-2 if cuda else 1e-4
    print(f"largest relative difference of a step's loss {apart:.1e}, allowed {allowed:.0e}")
    return 0 if apart <= allowed else 1


if __name__ == "__main__":
    sys.exit(main())
