"""Tests of lora_fast/acceleration/."""
