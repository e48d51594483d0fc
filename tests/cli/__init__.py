"""Tests of lora_fast/cli/."""
