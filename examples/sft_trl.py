"""Supervised fine-tuning with TRL's SFTTrainer, fused: one callback is all that changes.

    pip install '.[trl]'                                             # from a clone
    python examples/sft_trl.py --smoke                               # seconds on a CPU, no network
    python examples/sft_trl.py                                       # a minute on a CPU
    torchrun --nproc_per_node 8 examples/sft_trl.py --model PATH_OR_HUB_ID

Without --model, a tiny Llama with random weights learns to add numbers from 0 to 9. --smoke trains
five steps, again without lora_fast, and compares the losses. Several processes share each batch, so
that they have the losses of one.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

import lora_fast

BATCH = 16
WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))


def sums() -> Dataset:
    """Every sum of two digits, as a prompt and its completion."""
    pairs = [(a, b) for a in range(10) for b in range(10)]
    return Dataset.from_list(
        [{"prompt": f"{a} plus {b} is", "completion": f" {a + b}."} for a, b in pairs]
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte."""
    alphabet = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def base_model(name: str | None) -> tuple[Any, Any]:
    """The model `name` and its tokenizer, or a tiny one."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    tokenizer = byte_tokenizer()
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config), tokenizer


def train(name: str | None, steps: int, *, fused: bool) -> tuple[Any, list[float]]:
    """The trained PEFT model and the loss of every step."""
    model, tokenizer = base_model(name)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=BATCH // WORLD,
                learning_rate=5e-3 if name is None else 2e-4,
                bf16=torch.cuda.is_available(),
                use_cpu=not torch.cuda.is_available(),
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=sums(),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
            callbacks=[lora_fast.LoraFastCallback()] if fused else [],
        )
        trainer.train()
    history = trainer.state.log_history
    return trainer.model, [float(entry["loss"]) for entry in history if "loss" in entry]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or hub id; default: a tiny model")
    parser.add_argument("--steps", type=int, default=200, help="default 200")
    parser.add_argument("--smoke", action="store_true", help="five steps, compared")
    parser.add_argument("--compare", action="store_true", help="train without lora_fast, too")
    options = parser.parse_args()
    if BATCH % WORLD:
        parser.error(f"the number of processes must divide the batch of {BATCH}, got {WORLD}")
    steps = 5 if options.smoke else options.steps
    model, losses = train(options.model, steps, fused=True)
    stock = None
    if options.smoke or options.compare:
        _, stock = train(options.model, steps, fused=False)
    if dist.is_initialized():
        dist.destroy_process_group()
    if RANK > 0:
        return 0
    print(lora_fast.report(model))
    where = "one process" if WORLD == 1 else f"{WORLD} processes"
    print(f"loss {losses[0]:.6f} → {losses[-1]:.6f} in {where}")
    if stock is None:
        return 0
    print(f"loss {stock[0]:.6f} → {stock[-1]:.6f} without lora_fast")
    apart = max(abs(a - b) / abs(b) for a, b in zip(losses, stock, strict=True))
    # 16-bit activations are rounded in another order, which every step carries on.
    allowed = 2e-2 if torch.cuda.is_available() else 1e-4
    print(f"largest relative difference of a step's loss {apart:.1e}, allowed {allowed:.0e}")
    return 0 if apart <= allowed else 1


if __name__ == "__main__":
    sys.exit(main())
