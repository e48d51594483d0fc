"""Tests of lora_fast/modules/."""
