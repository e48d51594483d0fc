"""Tests of lora_fast/experts/."""
