"""Tests of the PTX executor."""
