"""Tests of lora_fast/training/."""
