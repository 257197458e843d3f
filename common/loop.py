"""What trainer and proxy share: seeds, precision, the optimizer and its step, signals."""
import math
import signal
import sys
import zlib

import numpy as np
import torch
import torch.nn as nn

from common.errors import need
from common.processes import all_reduce, log

MAX_BAD_STEPS = 20                                    # non-finite steps in a row before a run stops
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def generator(seed, *key, device="cpu"):
    """A torch.Generator whose stream depends on (seed, key) alone; key holds ints and strings."""
    words = [zlib.crc32(k.encode()) if isinstance(k, str) else int(k) for k in key]
    state = np.random.SeedSequence([int(seed), *words]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


def autocast(device, amp):
    """The autocast context of `--amp bf16|fp16|none`."""
    dtype = AMP[amp]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def lr_at(step, lr, warmup, schedule, steps):
    """Learning rate of step n: linear warm-up, then constant or a cosine to zero at the last step."""
    rate = lr
    if warmup:
        rate = lr * min(1.0, (step + 1) / warmup)
    if schedule == "cosine":
        rate = rate * (0.5 * (1 + math.cos(math.pi * step / steps)))
    return rate


def optimizer_of(net, lr, device, amp):
    """AdamW without weight decay, and its scaler.

    One path for every precision: the scaler skips a non-finite step inside the fused kernel, without waiting
    for the device. Only fp16 scales.
    """
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    scale, interval = (2.0**16, 2000) if amp == "fp16" else (1.0, 2**31 - 1)
    scaler = torch.amp.GradScaler(device.type, init_scale=scale, growth_interval=interval)
    return optimizer, scaler


def optimizer_step(optimizer, scaler, net, grad_clip, amp):
    """Unscale, clip, step, clear. Returns the gradient's norm before clipping, a tensor on the device.

    grad_clip: the largest norm, 0 for none. A step whose norm is not finite changes no weight.
    """
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(net.parameters(), grad_clip or math.inf)
    scaler.step(optimizer)
    # Only fp16 needs another scale after a bad step: a scale of 1 would decay into underflow.
    scaler.update(None if amp == "fp16" else 1.0)
    optimizer.zero_grad(set_to_none=True)
    return norm


class BadSteps:
    """Counts the steps whose loss or gradient was not finite, in a row and in all.

    On the device, so that counting waits for nothing; `refuse` and `in_a_row` wait for it.
    """

    def __init__(self, device, before=0):
        self.counts = torch.tensor([0, before], device=device)        # in a row, in all

    def add(self, norm):
        """Note the gradient norm of one step; returns whether it was finite, a bool tensor."""
        finite = norm.isfinite()
        self.counts[0] = torch.where(finite, 0, self.counts[0] + 1)
        self.counts[1] += ~finite
        return finite

    def in_a_row(self):
        return int(self.counts[0])

    def in_all(self):
        return int(self.counts[1])

    def refuse(self, out, done, last, stands=""):
        """UserError when the run has diverged; stands: what is left of it, in words."""
        row = self.in_a_row()
        # One or two are fp16 finding its scale, and the weights are sound.
        sound = row <= 2 if last else row < MAX_BAD_STEPS
        need(sound, f"{out}: {row} steps in a row had a non-finite loss or gradient, up to step {done}; {stands}"
                    "check the data, lower --lr, or use --amp bf16 or none")


class Stop:
    """SIGTERM finishes the step, saves, and ends the process with 143."""

    def __init__(self):
        self.asked = 0
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_):
        self.asked += 1

    def asked_on_any_rank(self):
        """True on every rank as soon as one was told to stop: all must leave after the same step.

        A tensor of the CPU: the device is not waited for.
        """
        return bool(all_reduce(torch.tensor(self.asked)))

    def leave(self, done):
        """Say so and end the process."""
        log(f"stopped by SIGTERM at step {done}; run the same command again to go on")
        sys.stdout.flush()
        sys.exit(143)
