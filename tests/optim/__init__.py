"""Tests of lora_fast/optim/."""
