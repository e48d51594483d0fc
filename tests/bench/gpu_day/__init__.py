"""Tests of bench/gpu_day/."""
