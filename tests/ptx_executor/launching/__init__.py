"""Replaces the CUDA driver: the interface that Triton uses, and the arguments of a launch."""
