"""One step of trainer and proxy: seeds, precision, the optimizer. Their runs: common/run.py."""
import math
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn

from common.processes import world

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def generator(seed, *key, device="cpu"):
    """A torch.Generator whose stream depends on (seed, key) alone; key holds ints and strings."""
    # Strings enter by their checksum: Python's own hash differs from process to process.
    words = [zlib.crc32(k.encode()) if isinstance(k, str) else int(k) for k in key]
    state = np.random.SeedSequence([int(seed), *words]).generate_state(1, np.uint64)[0]
    # 63 bits: what manual_seed takes on every device.
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


def random_scores(seed, n):
    """A random number in [0, 1) for each of n images, float64 (n,), by which a random set is kept.

    The highest are kept first, so that a larger set holds every smaller one of the same seed.
    """
    g = generator(seed, "random score")
    return torch.rand(n, dtype=torch.float64, generator=g).numpy()


@dataclass
class Draws:
    """The random numbers of one step; draws[lo:hi] are those of a part of the batch."""

    u: torch.Tensor                          # (B,) time
    eps: torch.Tensor                        # (B, C, H, W) noise
    drop: torch.Tensor = None                # (B,) label dropout
    flip: torch.Tensor = None                # (B,) bool, mirrored
    post: torch.Tensor = None                # (B, C, H, W) the draw of a latent
    kept: torch.Tensor = None                # (B, T') tokens that a masked pass encodes

    def __getitem__(self, part):
        drawn = {name: x for name, x in vars(self).items() if x is not None}
        return Draws(**{name: x[part] for name, x in drawn.items()})


def step_draws(seed, name, step, batch, shape, device, latents, drop=True):
    """Everything random of step n, for the whole global batch: a function of (seed, name, n) alone.

    shape (C, H, W). The order of these draws is part of the result: a resumed run repeats it.
    """
    g = generator(seed, name, step, device=device)
    u = torch.rand(batch, generator=g, device=device)
    eps = torch.randn(batch, *shape, generator=g, device=device)
    draws = Draws(u, eps)
    if drop:
        draws.drop = torch.rand(batch, generator=g, device=device)
    draws.flip = torch.rand(batch, generator=g, device=device) < 0.5
    if latents:
        draws.post = torch.randn(batch, *shape, generator=g, device=device)
    return draws


def autocast(device, amp):
    """The autocast context of `--amp bf16|fp16|none`."""
    dtype = AMP[amp]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def fast_float32():
    """On a GPU float32 may round as TF32 does, and cuDNN looks for its fastest kernels."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def share_out(net, device):
    """The network under DistributedDataParallel, where there are several processes."""
    if world() == 1:
        return net
    ids = None
    if device.type == "cuda":
        ids = [device.index]
    # No buffers to broadcast: the text table never changes.
    return nn.parallel.DistributedDataParallel(net, device_ids=ids, broadcast_buffers=False)


def lr_at(step, lr, warmup, schedule, steps):
    """Learning rate of step n: linear warm-up, then constant or a cosine to zero at the last."""
    rate = lr
    if warmup:
        rate = lr * min(1.0, (step + 1) / warmup)
    if schedule == "cosine":
        rate = rate * (0.5 * (1 + math.cos(math.pi * step / steps)))
    return rate


def optimizer_of(net, lr, device, amp, name=None):
    """AdamW without weight decay, and its scaler, which leaves out a step that is not finite.

    One path for every precision: the fused kernel does so without waiting for the device. Only
    fp16 is scaled. name: 'adan' for MDT's optimizer, with which every step waits once.
    """
    params = [p for p in net.parameters() if p.requires_grad]
    if name == "adan":
        from models.adan import Adan
        optimizer = Adan(params, lr=lr)
    else:
        optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.999), weight_decay=0.0,
                                      fused=True)
    # A scale of 1 that never grows.
    scale = {"init_scale": 1.0, "growth_interval": 2**31 - 1}
    if amp == "fp16":
        scale = {"init_scale": 2.0**16, "growth_interval": 2000}
    return optimizer, torch.amp.GradScaler(device.type, **scale)


def backward(scaler, loss):
    """Gradients of a loss. One that is not finite makes them NaN, so that its step is left out."""
    # An infinite loss can have finite gradients, and the step would be taken.
    loss = loss * torch.where(loss.detach().isfinite(), 1, math.nan)
    scaler.scale(loss).backward()


def optimizer_step(optimizer, scaler, net, lr, grad_clip, amp):
    """One step at this learning rate. Returns the gradient's norm, a tensor on the device.

    grad_clip: the largest norm, 0 for none. A step whose norm is not finite changes no weight.
    """
    optimizer.param_groups[0]["lr"] = lr
    scaler.unscale_(optimizer)
    # The norm is that of the gradients themselves, after unscaling and before clipping.
    norm = nn.utils.clip_grad_norm_(net.parameters(), grad_clip or math.inf)
    # Leaves the weights as they are where a gradient is not finite.
    scaler.step(optimizer)
    # Only fp16 needs another scale after a bad step: a scale of 1 would decay into underflow.
    scaler.update(None if amp == "fp16" else 1.0)
    optimizer.zero_grad(set_to_none=True)
    return norm
