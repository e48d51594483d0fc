"""Tests of lora_fast/export/."""
