"""Tests of bench/instruments/."""
