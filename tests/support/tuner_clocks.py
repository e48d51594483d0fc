"""A clock in place of a device's, for tests of the tuner."""

from __future__ import annotations

import torch
from tuner_queries import PLAIN

from lora_fast.factors import Needs
from lora_fast.tuning import cost_model
from lora_fast.tuning.plans import FORWARD
from lora_fast.tuning.timing import Measured

CPU = torch.device("cpu")
PLANS = cost_model.shortlist(PLAIN, 90)
OTHER = PLANS[-1]
FORWARD_QUERY = PLAIN._replace(op=FORWARD, needs=(Needs(),))


class Clock:
    """Runs what it times, and answers from a list of milliseconds by plan; each takes `seconds`."""

    def __init__(self, times, seconds=0.01):
        self.times, self.ran, self.seconds, self.left = times, [], seconds, []

    def __call__(self, call, left):
        call()
        self.left.append(left)
        return Measured(self.times[self.ran[-1]], self.seconds)

    def run(self, plan):
        self.ran.append(plan)


def clock_for(fastest):
    return Clock({plan: 1.0 if plan == fastest else 2.0 for plan in PLANS})
