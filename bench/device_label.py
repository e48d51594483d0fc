"""What a measurement ran on, and how that was set up; a ratio without it says nothing."""

from __future__ import annotations

import platform

import torch


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def steady(device: torch.device) -> torch.device:
    """``device``, made as quiet as it can be: on a CPU, threads of a busy machine wait in turn."""
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
