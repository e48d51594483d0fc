"""Switching a model to the kernels and reporting on it; imports nothing heavy."""
