"""Tests of lora_fast/backends/."""
