"""Tests of lora_fast/operation/."""
