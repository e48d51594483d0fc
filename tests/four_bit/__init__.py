"""Tests of lora_fast/four_bit/."""
