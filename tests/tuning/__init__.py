"""Tests of lora_fast/tuning/."""
