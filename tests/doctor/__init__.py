"""Tests of lora_fast/doctor/."""
