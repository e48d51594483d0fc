"""Tests of lora_fast/planning/."""
