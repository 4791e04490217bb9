"""A reward of weight 0 that breaks the process it is computed in: `--rewards regression,tests.faults:Fault=0`.

FAULT in the environment is `STEP RANK WHAT`, in the first start of a run only. WHAT is the name of a signal that the
process sends to itself in that step; `hang`; or `nan`, what the loss is multiplied by from that step on.
"""

import os
import signal
import time

import torch
from torch import nn

import grpo.update
from grpo import distributed


class Fault(nn.Module):
    def __init__(self):
        super().__init__()
        step, rank, self.what = os.environ.get("FAULT", "0 0 nothing").split()
        ours = int(rank) == distributed.rank() and not distributed.restarts()
        self.step, self.calls = int(step) if ours else 0, 0
        if self.what == "nan" and ours:
            self.loss, grpo.update.grpo_loss = grpo.update.grpo_loss, self.poisoned

    def poisoned(self, *args, **kwargs):
        loss, terms = self.loss(*args, **kwargs)
        return loss * (torch.nan if self.calls >= self.step else 1), terms

    def forward(self, answers):
        self.calls += 1
        if self.calls == self.step and self.what == "hang":
            time.sleep(600)
        elif self.calls == self.step and self.what.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[self.what])
        return torch.zeros_like(answers.scores)
