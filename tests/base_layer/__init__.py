"""Tests of lora_fast/base_layer/."""
