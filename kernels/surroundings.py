"""What the launches of a plan (launch_plans.py) depend on beside their operands."""

import torch
import triton
from triton.runtime.driver import driver

from .environment import tf32_setting

# A knob that Triton 3.5 does not have.
_MODE = "instrumentation_mode"
_is_deterministic = torch._C._get_deterministic_algorithms


class Surroundings:
    """What launches depend on beside their arguments: the device of Triton's driver, settings of
    Triton's, TF32."""

    __slots__ = ("device", "driver", "settings")

    def __init__(self, dtype):
        self.driver = driver.active
        self.device = self.driver.get_current_device()
        runtime = triton.knobs.runtime
        tf32 = dtype == torch.float32
        self.settings = (
            runtime.debug, getattr(triton.knobs.compilation, _MODE, None),
            getattr(runtime, "add_stages_inspection_hook", None), tf32 and tf32_setting(),
            _is_deterministic(),
        )  # fmt: skip

    def hold(self):
        """Whether all of it is as it was, and nobody observes launches."""
        active, knobs = self.driver, triton.knobs
        runtime = knobs.runtime
        debug, mode, stages, tf32, deterministic = self.settings
        return (
            # Not the property, which is a call.
            driver._active is active
            and active.get_current_device() == self.device
            and runtime.debug is debug
            and getattr(knobs.compilation, _MODE, None) == mode
            and getattr(runtime, "add_stages_inspection_hook", None) is stages
            and (tf32 is False or tf32 == tf32_setting())
            and _is_deterministic() is deterministic
            and not getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
            and not getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
        )
