"""Tests of lora_fast/gated_mlps/."""
