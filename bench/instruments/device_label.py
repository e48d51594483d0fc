"""The device that a measurement ran on, and its setup; a ratio without them means nothing."""

from __future__ import annotations

import platform

import torch


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def steady(device: torch.device) -> torch.device:
    """``device``, set up for steady timing: on a CPU a single thread."""
    if device.type == "cpu":
        torch.set_num_threads(1)
    return device


def backend_name(device: torch.device) -> str:
    """The backend of lora_fast that computes on ``device``."""
    from lora_fast.backends.choice import uses_triton

    return "triton" if uses_triton(device) else "torch"


def label(device: torch.device) -> str:
    """Device, backend and versions, in a line."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU ({platform.machine()}, threads: {torch.get_num_threads()})"
    return f"{name}, {backend_name(device)} backend, torch {torch.__version__}"
