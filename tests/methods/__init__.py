"""Tests of lora_fast/methods/."""
