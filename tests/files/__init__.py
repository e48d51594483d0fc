"""Tests of lora_fast/files/."""
