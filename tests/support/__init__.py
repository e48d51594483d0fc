"""Tests of what the tests are made with."""
