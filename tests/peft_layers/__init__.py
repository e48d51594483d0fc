"""Tests of lora_fast/peft_layers/."""
