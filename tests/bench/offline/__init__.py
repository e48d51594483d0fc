"""Tests of bench/offline/."""
