"""Stage 4: train a diffusion model on a data set or on a kept part of it.

DDPM (Ho et al. 2020, arXiv 2006.11239) or SiT (Ma et al. 2024, arXiv 2401.08740), in one loop for
CPU, one GPU and many (torchrun), for fp32, bf16 and fp16. Everything random in step n (batch, time,
noise, label dropout, flips) is drawn from (seed, n) for the whole global batch, so a resumed run
equals a straight one bit for bit on a CPU, and more processes change only the order of sums.

Reads   DATA/                  a data folder of data.py (images.npy or latents.npy, labels.npy)
        --indices keep.npy     int64 (M,), train on these images only (prune.py, attach.py)
        --weights weights.npy  float32 (K,), class weights (reweight.py), to multiply or to draw by
        --attach DIR           text.npy, visual.npy: conditions and alignment targets (attach.py)
        --init CKPT            whose EMA is the start, or official weights (--official)
Writes  OUT/last.pt, step_*.pt (EMA only), stats.jsonl, loss.png, samples_*.png, train.args.json

    python train.py --data data/digits --preset digits --out runs/digits/full
    torchrun --nproc_per_node 8 train.py --data data/cifar10 --preset cifar10 --out runs/cifar/full

To resume, or to go on for more --steps, run the same command again.

    python train.py --data data/digits --process ddpm --predict v --out runs/digits/v

--predict v suits a DDPM that will be sampled in few steps (Salimans & Ho 2022). --class-std 1 suits
runs of a few hundred steps, too few for class embeddings that start at 0.02 to come apart. With
--recompute a network trains whose batch would exceed the memory, a third slower.

An MDT (Gao et al. 2023, arXiv 2303.14389, version 2) takes two passes a step and sums their losses:
a full one, and one whose encoder sees 1 - r of the tokens, r in [--mask-ratio, --mask-ratio + 0.2].
They have a curve each, "diffusion" and "masked". The masked one is higher, and that is no
fault: a network that predicts nothing scores 1 in each.

Stable Diffusion 1 or 2 (Rombach et al. 2022; pip install diffusers transformers) is fine-tuned on
latents of its own VAE, with "a photo of a {class}" for every class and nothing for the null class:

    python train.py --data data/in100 --official sd --init sd15/ --steps 0 --out runs/in100/base
    python train.py --data data/in100 --init runs/in100/base/last.pt --out runs/in100/full

The first makes it a checkpoint like others, and is the baseline of what follows. --lora RANK trains
adapters alone (pip install peft), with --official sd --init FOLDER.
"""
import argparse
import contextlib
import copy
import functools
import json
import math
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn

import common
from models.build import MODELS, build, init_from, knows
from models.conditioning import (Projector, alignment_loss, drop_labels, match_grid,
                                 mean_token_cosine, sides)
from models.diffusion import (SCALED_LINEAR, diffusion_loss, generate, make_process, snr_weight,
                              to_uint8)
from models.official import OFFICIAL
from models.vae import check_latents

# The published recipe of each scale: DDPM's for CIFAR-10, SiT's for ImageNet, that of the public
# script for MDTv2, that of diffusers' README for Stable Diffusion with batch and warm-up of ours;
# digits is this kit's own, in float32 on any hardware: so small a network gains nothing from less.
# A flag overrides.
PRESETS = {
    "digits": dict(
        model="SiT-T/2", process="flow", steps=800, batch_size=128, lr=6e-3, schedule="cosine",
        warmup=50, ema=0.99, class_std=1.0, flips=False, amp="none", checkpoint_every=100),
    "cifar10": dict(
        model="unet", process="ddpm", steps=100_000, batch_size=128, lr=2e-4, schedule="constant",
        warmup=5000, ema=0.9999, class_std=0.02, flips=True, amp="auto", checkpoint_every=10_000),
    "imagenet": dict(
        model="SiT-XL/2", process="flow", steps=40_000, batch_size=256, lr=1e-4,
        schedule="constant", warmup=0, ema=0.9999, class_std=0.02, flips=False, amp="auto",
        checkpoint_every=10_000),
    "mdt": dict(
        model="MDT-S/2", process="ddpm", steps=400_000, batch_size=256, lr=5e-4,
        schedule="constant", warmup=0, ema=0.9999, class_std=0.02, flips=False, amp="auto",
        checkpoint_every=50_000, optimizer="adan", min_snr=5.0, mask_ratio=0.3),
    "sd": dict(
        model="sd", process="ddpm", steps=15_000, batch_size=64, lr=1e-5, schedule="constant",
        warmup=500, ema=0.9999, flips=False, amp="auto", recompute=True, checkpoint_every=2500),
}
LORA_LR = 1e-4          # adapters take ten times the rate of the whole network
MOMENTS = {"adan": 4}   # tensors that an optimizer keeps a weight; AdamW 2
MASK_SPREAD = 0.2       # the masked share of a step lies within [mask_ratio, mask_ratio + this]
# What a run leaves, which a run that begins anew removes ...
WRITES = ("last.pt", "step_*.pt", "samples_*.png", "stats.jsonl", "loss.png")
# ... with what other stages made of its weights, or it would pass for the new run's.
DRAWN = ("sample*.*", "grid.png", "nearest.png", "metrics.json", "trajectory.json",
         "evaluate.args.json")


# ---------------------------------------------------------------------------- formulas
class Objective(nn.Module):
    """Network, projector and losses as one module, so that DDP and torch.compile wrap one thing."""

    def __init__(self, model, process, projector=None):
        super().__init__()
        self.model = model
        self.process = process
        self.projector = projector

    def forward(self, x, u, eps, y, v=None, second=None):
        """Diffusion loss (n,), alignment loss and masked loss (n,) or None, of x, eps (n, C, H, W).

        u, y (n,). v (n, T, d): visual tokens to which those after the network's token layer are
        aligned. second: (eps, y, kept tokens (n, T')) of the masked pass at the same x and u.
        """
        loss, align = self.full(x, u, eps, y, v)
        masked = None
        if second is not None:
            masked = self.masked(x, u, *second)
        return loss, align, masked

    def full(self, x, u, eps, y, v):
        if self.projector is None:
            return diffusion_loss(self.process, self.model, x, u, eps, y), None
        after = self.model.token_layer
        # (n,) and the network's tokens (n, T', D)
        loss, tokens = diffusion_loss(self.process, self.model, x, u, eps, y, tokens_after=after)
        projected = self.projector(tokens)                            # (n, T', d)
        return loss, alignment_loss(projected, match_grid(v, tokens.shape[1], self.model.grid))

    def masked(self, x, u, eps, y, kept):
        """The loss (n,) over all tokens, hidden ones too, of a pass that encodes the kept ones."""
        return diffusion_loss(self.process, self.model, x, u, eps, y, kept=kept)


def total_loss(diffusion, align, weight, lam, masked=None):
    """L = mean(w_y L_diff) + lambda mean(L_proj)   (2409.19128, III-B; D2C, section 3.3).

    diffusion (n,); align (n,) or None; weight (n,), the class weight of each sample, by its
    Min-SNR weight where there is one. masked (n,): the second loss of MDT, as heavy as the first.
    """
    loss = (weight * diffusion).mean()               # (), the only mean over samples
    if masked is not None:
        loss = loss + (weight * masked).mean()
    if align is not None:
        loss = loss + lam * align.mean()
    return loss


def mask_draws(seed, step, u, shape, tokens, ratio):
    """Everything random of the masked pass of step n, for the whole global batch at times u (B,).

    Noise and label dropout of its own, and kept (B, T') int64, an own random choice of the tokens
    for each sample. One share for the whole batch, 1 - r of the tokens with r uniform in [ratio,
    ratio + MASK_SPREAD], drawn on the CPU: no length waits for the device, and ranks agree. Streams
    of their own: those of step_draws are the same with and without masks.
    """
    r = ratio + MASK_SPREAD * torch.rand((), generator=common.generator(seed, "ratio", step)).item()
    count = max(1, int(tokens * (1 - r)))
    g = common.generator(seed, "mask", step, device=u.device)
    eps = torch.randn(len(u), *shape, generator=g, device=u.device)
    drop = torch.rand(len(u), generator=g, device=u.device)
    kept = torch.rand(len(u), tokens, generator=g, device=u.device).argsort(1)[:, :count]
    return common.Draws(u, eps, drop, kept=kept)


def average_of(model):
    """A copy of the network that holds its average, and the tensors to average: its, and ours.

    What is not trained, as all but the adapters of a LoRA, is shared and not copied.
    """
    fixed = [*model.buffers(), *(p for p in model.parameters() if not p.requires_grad)]
    ema = copy.deepcopy(model, {id(tensor): tensor for tensor in fixed}).eval()
    both = [(e, p) for e, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]
    ema.requires_grad_(False)
    return ema, [e for e, _ in both], [p for _, p in both]


@torch.no_grad()
def ema_update(ema, params, decay, step):
    """EMA with the warm-up min(d, (1 + n) / (10 + n)).

    A plain 0.9999 would keep 14 % of the initial weights after 20 000 steps.
    """
    torch._foreach_lerp_(ema, params, 1 - min(decay, (1 + step) / (10 + step)))


# ---------------------------------------------------------------------------- the work
class Order:
    """Rows of the global batch of step n, a function of (seed, n) alone.

    Endless seeded epochs over m images; a batch larger than the set runs through several. Or, with
    class_probs (K,), classes drawn with these probabilities; then labels (m,) int64 are needed.
    """

    def __init__(self, m, batch, seed, labels=None, class_probs=None):
        self.m = m
        self.batch = batch
        self.seed = seed
        self.probs = class_probs
        self.perms = {}                      # of the epochs that the last step saw
        if class_probs is not None:
            # (m,) rows sorted by class; those of class c are counts[c] many, from starts[c] on.
            self.by_class = torch.from_numpy(np.argsort(labels, kind="stable"))
            counts = np.bincount(labels, minlength=len(class_probs))
            self.counts = torch.from_numpy(counts)                    # (K,)
            self.starts = self.counts.cumsum(0) - self.counts         # (K,)

    def __call__(self, step):
        """(batch,) int64 rows of step `step`, counted from 0."""
        if self.probs is not None:
            return self.resampled(step)
        # Places first..last in the endless row of epochs.
        first = step * self.batch
        last = first + self.batch - 1
        epochs = range(first // self.m, last // self.m + 1)
        for e in epochs:
            if e not in self.perms:
                g = common.generator(self.seed, "epoch", e)
                self.perms[e] = torch.randperm(self.m, generator=g)
        # Those of earlier epochs are let go.
        self.perms = {e: self.perms[e] for e in epochs}
        rows = torch.cat(list(self.perms.values()))
        return rows[first - epochs[0] * self.m:][:self.batch]

    def resampled(self, step):
        """Class ~ class_probs, then uniform within the class."""
        g = common.generator(self.seed, "order", step)
        c = torch.multinomial(self.probs, self.batch, replacement=True, generator=g)     # (batch,)
        u = torch.rand(self.batch, generator=g, dtype=torch.float64)
        within = (u * self.counts[c]).long()
        return self.by_class[self.starts[c] + within]


def seed_dropout(seed, step):
    """Dropout has no generator of its own: it draws from the global stream, here of (seed, n)."""
    g = common.generator(seed, "dropout", step, common.rank())
    torch.manual_seed(g.initial_seed())


class Feed:
    """This rank's part of each global batch: pixels or latents, labels, visual tokens."""

    def __init__(self, args, inputs, device):
        m = len(inputs.keep)
        order = Order(m, args.batch_size, args.seed, inputs.labels, inputs.class_probs)
        self.order = functools.lru_cache(maxsize=2)(order)            # this step and the next
        self.mine = slice(*common.shard(args.batch_size))
        self.flips = args.flips
        self.latent_scale = inputs.settings["latent_scale"]           # None for pixels
        self.labels = torch.from_numpy(inputs.labels).to(device)      # (M,)
        # What the network leaves is shared by images and tokens.
        budget = common.device_budget(device, inputs.net, MOMENTS.get(args.optimizer, 2))
        self.images = common.DeviceRows(inputs.source, inputs.keep, device, budget)
        self.tokens = None
        if inputs.visual is not None:
            if self.images.resident:
                budget -= self.images.size
            self.tokens = common.DeviceRows(inputs.visual, np.arange(m), device, budget)

    def share(self, step):
        """(x, y, v) as stored, of this rank's rows in step n; those of n + 1 are read ahead."""
        rows = self.order(step)[self.mine]                            # (b,)
        ahead = self.order(step + 1)[self.mine]                       # (b,)
        there = rows.to(self.labels.device, non_blocking=True)        # copied once for all three
        x = self.images.get(rows, ahead, there)                       # (b, H, W, C), (b, 2C, h, w)
        y = self.labels[there]                                        # (b,)
        v = None
        if self.tokens is not None:
            v = self.tokens.get(rows, ahead, there)                   # (b, [2,] T, d)
        return x, y, v

    def batch(self, share, part, draws):
        """x (n, C, H, W), y (n,) and v (n, T, d) or None: a part of a share as the network sees it.

        An image is mirrored together with its tokens.
        """
        x, y, v = share
        mirrored = None
        if self.flips:
            mirrored = draws.flip                                     # (n,)
        x = common.as_input(x[part], self.latent_scale, draws.post, mirrored)
        if v is not None:
            v = v[part]                                               # (n, [2,] T, d)
            if v.ndim == 4:
                # Index 1 holds the tokens of the mirrored image.
                which = torch.zeros_like(y[part]) if mirrored is None else mirrored.long()
                v = v[torch.arange(len(v), device=v.device), which]
        return x, y[part], v


class Log:
    """The lines of stats.jsonl: means of the losses since the line before.

    Their sums stay on the device: reading them for a line is the loop's only wait for it.
    """

    def __init__(self, run, device):
        self.file = run.out / "stats.jsonl"
        self.run = run
        self.board = open_board(run) if run.args.tensorboard and common.rank() == 0 else None
        self.device = device
        self.rows = []
        if self.file.exists():
            lines = self.file.read_text(encoding="utf-8").splitlines()
            # A kill may have fallen into the middle of a line.
            rows = [json.loads(line) for line in lines if line.endswith("}")]
            # Later lines belong to steps that will be done again.
            self.rows = [row for row in rows if row["step"] <= run.step]
        if common.rank() == 0:
            common.save_text(self.file, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.reset()

    def reset(self):
        self.sums = torch.zeros(24, dtype=torch.float64, device=self.device)
        self.loss = self.sums[:10]                   # by time, in ten bins
        self.count = self.sums[10:20]
        self.others = {"align": self.sums[20:22], "masked": self.sums[22:]}     # sum, count
        self.norm = torch.zeros(2, dtype=torch.float64, device=self.device)     # sum, count

    def add_losses(self, u, loss, align, masked=None):
        """u, loss (n,), align and masked (n,) or None: those of a part of a batch."""
        bins = (u * 10).long().clamp(0, 9)           # (n,)
        # A step that is left out must not spoil the mean of the others.
        finite = loss.detach().isfinite()
        # Float64: a sum of many float32 losses would lose the last ones.
        self.loss.index_add_(0, bins, torch.where(finite, loss.detach(), 0).double())
        self.count.index_add_(0, bins, finite.double())
        for name, other in (("align", align), ("masked", masked)):
            if other is not None:
                sums = self.others[name]
                sums[0] += torch.nan_to_num(other.detach()).sum().double()
                sums[1] += len(other)

    def add_norm(self, norm):
        """A step was made: it counts as bad where its gradient norm is not finite."""
        finite = self.run.bad.add(norm)
        self.norm[0] += torch.where(finite, norm, 0)
        self.norm[1] += finite

    def write(self, lr, scale, kept):
        """Add a line with the means over all ranks, of `kept` images. Returns it, a dict."""
        run = self.run
        common.all_reduce(self.sums)
        losses = self.loss.tolist()                  # (10,)
        counts = self.count.tolist()                 # (10,)
        row = {"step": run.step, "diffusion": sum(losses) / max(sum(counts), 1),
               "loss_t": [loss / max(n, 1) for loss, n in zip(losses, counts)]}
        for name, (total, n) in self.others.items():
            if n > 0:
                row[name] = (total / n).item()
        # Gradient norm and steps are the same on every rank.
        row["grad_norm"] = (self.norm[0] / self.norm[1].clamp(min=1)).item()
        row.update(lr=lr, images=run.images(), epoch=run.images() / kept,
                   seconds=round(run.seconds(), 3), skipped=run.bad.in_all(), scale=scale)
        self.rows.append(row)
        if common.rank() == 0:
            with open(self.file, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
        if self.board:
            for name in ("diffusion", "masked", "align", "grad_norm", "lr"):
                if name in row:
                    self.board.add_scalar(name, row[name], run.step)
            self.board.flush()
        run.bar.set_postfix(loss=f"{row['diffusion']:.4f}", refresh=False)
        self.reset()
        return row


def open_board(run):
    """TensorBoard's writer of a run; UserError with the pip command where it is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise common.UserError("--tensorboard needs a package that is not installed: pip install "
                               "tensorboard; or leave it out, stats.jsonl holds the same") from e
    # Steps behind the checkpoint are done again: what was written of them is dropped.
    return SummaryWriter(str(run.out / "tensorboard"), purge_step=run.step + 1)


def refuse_divergence(run, row):
    """UserError when the steps up to this line of the log say that the run has diverged."""
    why = common.divergence(run, row["diffusion"])
    if why:
        run.bar.close()
        stands = "no checkpoint was written before"
        if (run.out / "last.pt").exists():
            step = common.load_pt(run.out / "last.pt")["step"]
            stands = f"last.pt keeps the last good checkpoint, of step {step}"
        raise common.UserError(f"{run.out}: {why}; {stands}; lower --lr, raise --warmup, check the "
                               "data, or use --amp bf16 or none")


def train(args, inputs, stage, device):
    """The loop. Returns what is worth recording."""
    settings = inputs.settings
    latents = settings["latents"]
    shape = (settings["channels"], *sides(settings["size"]))         # (C, H, W)
    net = inputs.net.to(device, memory_format=torch.channels_last)
    # The moving average is of the network alone: sampling needs no projector.
    ema, ema_params, params = average_of(net.model)
    optimizer, scaler = common.optimizer_of(net, args.lr, device, args.amp, args.optimizer)
    parts = {"model": net.model, "ema": ema, "projector": net.projector, "optimizer": optimizer,
             "scaler": scaler}
    run = common.Run(stage.out, parts, settings, args, device)
    last = stage.out / "last.pt"
    if stage.resuming and last.exists():
        steps_left(last, run.resume(last), args.steps)
    feed = Feed(args, inputs, device)
    log = Log(run, device)
    class_weight = inputs.class_weight.to(device)                     # (K,), ones without --weights
    constant = describe(args, inputs, run, feed, device)
    wrapped = common.share_out(compiled(net) if args.compile else net, device)
    micro = args.batch_size // (common.world() * args.accumulate)     # rows in the network at once
    stop = common.Stop()
    run.start()
    net.train()
    if args.steps == 0:
        # --init CKPT --steps 0 makes another checkpoint one of ours.
        save(run, ema)

    for step in range(run.step, args.steps):
        lr = common.lr_at(step, args.lr, args.warmup, args.schedule, args.steps)
        draws = common.step_draws(args.seed, "step", step, args.batch_size, shape, device, latents)
        hide = None
        if args.mask_ratio:
            hide = mask_draws(args.seed, step, draws.u, shape, net.model.grid**2, args.mask_ratio)
            hide = hide[feed.mine]
        draws = draws[feed.mine]                     # the same of this rank's rows
        share = feed.share(step)                     # this rank's rows; reads ahead
        seed_dropout(args.seed, step)

        for k in range(args.accumulate):
            part = slice(k * micro, (k + 1) * micro)                  # of this rank's rows
            d = draws[part]
            x, y, v = feed.batch(share, part, d)     # mirrored together with its tokens
            # Per sample; the text goes with its label. The weight below is still that of the class.
            y_in = drop_labels(y, args.label_drop, settings["num_classes"], d.drop)
            weight = class_weight[y]                 # (n,)
            if args.min_snr:
                weight = weight * snr_weight(net.process, d.u, args.min_snr)
            second = None
            if hide is not None:
                m = hide[part]
                y_m = drop_labels(y, args.label_drop, settings["num_classes"], m.drop)
                second = (m.eps, y_m, m.kept)
            with sync_when(wrapped, k == args.accumulate - 1):
                with common.autocast(device, args.amp):
                    # (n,), the others also None
                    diffusion, align, masked = wrapped(x, d.u, d.eps, y_in, v, second)
                loss = total_loss(diffusion, align, weight, args.align, masked)
                common.backward(scaler, loss / args.accumulate)
            log.add_losses(d.u, diffusion, align, masked)

        norm = common.optimizer_step(optimizer, scaler, net, lr, args.grad_clip, args.amp)
        ema_update(ema_params, params, args.ema, step)
        log.add_norm(norm)                           # counts bad steps, on the device

        done = run.advance()
        stopping = stop.asked_on_any_rank(done, done == args.steps)
        saving = stopping or common.is_due(done, args.checkpoint_every, args.steps)
        # With each checkpoint goes a log line: a resume loses no sums.
        if saving or done % args.log_every == 0 or run.must_look():
            row = log.write(lr, scaler.get_scale(), len(inputs.keep))
            refuse_divergence(run, row)              # one line, exit code 2
            run.say_pace()
        if not latents and common.is_due(done, args.sample_every, args.steps):
            with run.paused():
                # The EMA is in eval mode; the trained weights would draw worse.
                file = stage.out / f"samples_{done:07d}.png"
                preview(ema, net.process, settings, device, file, args.seed)
                if log.board:
                    from PIL import Image
                    picture = np.asarray(Image.open(file).convert("RGB"))
                    log.board.add_image("samples", picture, done, dataformats="HWC")
        # A good checkpoint is never replaced in the middle of a divergence.
        if saving and run.bad.in_a_row() <= 2:
            save(run, ema, keep=common.is_due(done, args.checkpoint_every))
        if stopping:
            stop.leave(done)                         # exit code 143
    run.bar.close()
    stop.close()
    return summary(inputs, run, log, constant, device)


def save(run, ema, keep=False):
    """OUT/last.pt; keep: before it the EMA of this step, which is drawn from."""
    if common.rank():
        return
    if keep:
        file = run.out / f"step_{run.step:07d}.pt"
        common.save_pt(file, {"ema": ema.state_dict(), **run.about()})
    # Last of all: a resume does nothing again of what is in it.
    common.save_pt(run.out / "last.pt", run.state())


def compiled(net):
    """The Objective under torch.compile; of an MDT the full pass only.

    The masked pass has another number of tokens in every step, and would be compiled anew in each.
    """
    net.masked = torch.compiler.disable(net.masked)
    # Inside DDP, and by the method, as torch's "Where to apply torch.compile" advises: Dynamo does
    # not handle DDP's own hooks well, and no second module with other parameter names arises.
    net.compile()
    return net


def sync_when(wrapped, last):
    """Several processes add up their gradients with the last part of a batch alone."""
    if common.world() > 1 and not last:
        return wrapped.no_sync()
    return contextlib.nullcontext()


def describe(args, inputs, run, feed, device):
    """Says what will be trained. Returns the cosine that an alignment must beat, or None."""
    net = inputs.net
    mean = inputs.class_weight[inputs.labels].double().mean()
    if abs(mean - 1) > 1e-3:
        common.log(f"note: {args.weights} averages {mean:.3f} over these images, not 1, and scales "
                   "the loss by that: was it made for another kept set?")
    trained = sum(p.numel() for p in net.model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in net.model.parameters())
    moments = MOMENTS.get(args.optimizer, 2)
    # The checkpoint of the run counts on AdamW's two.
    run.describe(args.model, net.model, net.process, len(inputs.keep), device,
                 4 * trained * (moments - 2))
    # Weights; gradients, moments and average of what is trained; float32.
    memory = 4 * (whole + trained * (2 + moments)) / 2**30
    if args.model == "sd" or memory > 1:
        common.log(f"weights, gradients, moments and average take {memory:.1f} GB of memory, "
                   "activations come on top (less with --recompute, a smaller batch or "
                   "--accumulate)")
    if args.mask_ratio:
        common.log("two passes a step, full and masked, about 2.1 times the work of a DiT of this "
                   "size (1.8 of XL); the masked loss lies above the other, and that is right")
    if args.steps > run.step and not feed.images.resident:
        common.log("the images do not fit beside the network: they are read from disk ahead of "
                   "each step")
    if inputs.visual is None:
        return None
    grid = net.model.grid
    constant = mean_token_cosine(inputs.visual[:4096], math.prod(sides(grid)), grid=grid)
    common.log(f"alignment: one constant vector reaches the cosine {constant:.3f}; less than that "
               "has learned nothing")
    return constant


def summary(inputs, run, log, constant, device):
    """The end of a run: loss.png and two lines. Returns what is worth recording."""
    images = run.images()
    skipped = run.bad.in_all()
    seconds = 0
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        common.log(f"peak device memory {peak / 2**30:.1f} GB")
    if log.rows:
        if common.rank() == 0:
            loss_plot(log.rows, run.out / "loss.png", constant)
        seconds = log.rows[-1]["seconds"]
        common.log(f"{images:,} images in {seconds:,.1f} s, diffusion loss "
                   f"{log.rows[-1]['diffusion']:.4f}, {skipped} steps skipped")
    n = sum(p.numel() for p in inputs.net.model.parameters() if p.requires_grad)
    return {"train_seconds": seconds, "images_seen": images, "epochs": images / len(inputs.keep),
            "images_kept": len(inputs.keep), "parameters": n, "skipped": skipped}


# How a preview is drawn: sampler and steps.
PREVIEW = {"flow": ("heun", 12), "ddpm": ("ddim", 25)}


def preview(ema, process, settings, device, path, seed, per_class=8):
    """samples_*.png: EMA samples on fixed noise, a row per class (the first ten), by rank 0."""
    if common.rank():
        return
    rows = min(settings["num_classes"], 10)
    y = torch.arange(rows, device=device).repeat_interleave(per_class)         # (n,)
    # Fixed noise, another for every place: the same picture can be followed through the run.
    noise = [common.generator(seed, "preview", j) for j in range(len(y))]
    x = generate(ema, process, y, noise, *PREVIEW[process.name])                # (n, C, H, W)
    x = to_uint8(x).cpu().numpy()                                               # (n, H, W, C)
    common.save_grid(path, x.reshape(rows, per_class, *x.shape[1:]))


def loss_plot(stats, path, constant):
    """loss.png; constant: the cosine that one constant vector reaches, or None."""
    fig = common.figure(9, 3.5)
    left, right = fig.subplots(1, 2)
    steps = [row["step"] for row in stats]
    # With an alignment loss, which is negative, the axis is left to matplotlib.
    left.set(xlabel="step", ylabel="loss, pixel mean", title="training loss")
    left.plot(steps, [row["diffusion"] for row in stats], label="diffusion loss")
    if "masked" in stats[-1]:
        left.plot(steps, [row["masked"] for row in stats], color="C2", label="masked pass")
        left.legend()
    if "align" in stats[-1]:
        left.plot(steps, [row["align"] for row in stats], label="alignment loss (-cosine)")
        name = f"one constant vector ({-constant:.2f})"
        left.axhline(-constant, color="C1", ls=":", label=name)
        left.legend()
    else:
        left.set(ylim=(0, None))
    for k in range(0, 10, 3):
        name = f"t in [{k / 10:.1f}, {(k + 1) / 10:.1f})"
        right.plot(steps, [row["loss_t"][k] for row in stats], label=name)
    right.set(xlabel="step", title="loss by time (0 data, 1 noise)", yscale="log")
    right.legend(fontsize=8)
    common.save_figure(path, fig)


# ---------------------------------------------------------------------------- inputs
def load_inputs(args):
    """All that the flags name, checked before anything is written; fills the flags left out.

    Returns a namespace: data; source, its latents or images; keep (M,), the rows to train on, and
    labels (M,) of them; text, mask, visual of --attach; class_weight (K,) and class_probs (K,), of
    which one follows --weights; init, a checkpoint; settings, those of the network; files, whose
    hashes the record keeps.
    """
    data = common.open_data(args.data, pixels=False)
    inputs = SimpleNamespace(data=data, text=None, mask=None, visual=None, init=None)
    inputs.source, channels, size = common.training_source(data)
    load_start(args, inputs)
    inputs.keep = load_kept(args, data)
    # Before the preset fills --flips: only the user's own wish is refused.
    if args.attach:
        load_attachments(args, inputs)
    fill_flags(args, data)
    check_flags(args, data)
    common.need(inputs.sd or args.model != "sd", "--model sd goes on from given weights; give "
                "--official sd --init FOLDER, or --init CHECKPOINT")
    inputs.labels = data.labels[inputs.keep]
    load_weights(args, inputs)
    inputs.settings = settings_of(args, inputs, channels, size)
    inputs.files = {"data": data.info, "indices": args.indices, "weights": args.weights,
                    "init": args.init}
    if args.official == "sd":
        inputs.files["init"] = Path(args.init) / "unet/diffusion_pytorch_model.safetensors"
    for name in ("keep", "text", "visual"):
        if args.attach and (Path(args.attach) / f"{name}.npy").exists():
            inputs.files[f"attach_{name}"] = Path(args.attach) / f"{name}.npy"
    return inputs


def load_start(args, inputs):
    """The checkpoint of --init; official weights know their network and process."""
    common.need(args.init or not args.init_classes, "--init-classes says what becomes of the "
                "classes of --init; give --init CHECKPOINT, or leave it out")
    common.need(args.init or not args.official,
                f"--official {args.official} says what --init holds; give --init CHECKPOINT, or "
                "leave it out")
    common.need(not args.lora or args.official == "sd",
                "--lora puts adapters beside a Stable Diffusion; give --official sd --init FOLDER")
    if args.official == "sd":
        from models.sd import load_sd
        with common.user_errors():
            inputs.init = load_sd(args.init, inputs.data.classes, args.lora)
    elif args.init:
        # Official weights come as train.py would have written them.
        inputs.init = common.load_checkpoint(args.init, args.official)
    known = settings_in(inputs.init)
    inputs.sd = known.get("model") == "sd"
    if args.official or inputs.sd:
        args.model = args.model or known["model"]
        args.process = args.process or known["process"]
    if inputs.sd:
        check_sd(args, inputs, known)
        args.predict = args.predict or known["predict"]


def settings_in(state):
    """The settings of a checkpoint, {} where it has none."""
    known = (state or {}).get("args")
    return known if isinstance(known, dict) else {}


def check_sd(args, inputs, known):
    """Stable Diffusion is conditioned on its prompts, and brings its process and text along."""
    need = common.need
    for name in ("attach", "class_std", "dropout", "betas"):
        need(getattr(args, name) is None, f"--{name.replace('_', '-')} does nothing in Stable "
                                          "Diffusion; leave it out")
    need(args.model == "sd", f"--model {args.model}: {args.init} holds Stable Diffusion; leave it "
                             "out")
    need(inputs.data.latents is not None,
         f"{inputs.data.folder}: Stable Diffusion works on latents, and this folder has none; make "
         "it with data.py --vae FOLDER/vae")
    need(known["classes"] == inputs.data.classes,
         f"{args.init}: its prompts are of other classes ({known['classes'][0]!r} ..., not "
         f"{inputs.data.classes[0]!r} ...); make them anew with --official sd --init FOLDER")
    size = known["unet"].get("sample_size")
    side = inputs.data.latents.shape[2]
    if size != side:
        common.log(f"note: this network was trained on latents of {size} x {size}, these are "
                   f"{side} x {side}: expect worse pictures at first")


def load_kept(args, data):
    """int64 (M,): the rows of --indices, of --attach, or all."""
    if not args.attach:
        return common.load_kept(args.indices, data)
    folder = Path(args.attach)
    common.load_record(folder / "attach.args.json")                   # must be there
    keep = common.load_kept(folder / "keep.npy", data)
    if args.indices:
        asked = common.load_indices(args.indices, len(data.labels))
        common.need(np.array_equal(asked, keep),
                    f"{args.indices}: holds other indices than {folder / 'keep.npy'}, to which the "
                    "attachments belong; leave --indices out")
    return keep


def load_attachments(args, inputs):
    """text (K, L, d), mask (K, L), visual (M, [2,] T, d) of the folder --attach."""
    folder = Path(args.attach)
    inputs.text, inputs.mask = common.load_text(folder, inputs.data.num_classes)
    if args.align == 0:
        return
    inputs.visual = common.load_visual(folder, len(inputs.keep))
    common.need(inputs.text is not None or inputs.visual is not None,
                f"{folder}: neither text.npy nor visual.npy: nothing is attached; use --indices "
                f"{folder / 'keep.npy'}")
    if inputs.visual is not None and inputs.visual.ndim == 3:
        # A mirrored image would be aligned to features of the unmirrored one.
        common.need(not args.flips, f"--flips: {folder / 'visual.npy'} holds one orientation only; "
                                    "run attach.py --flips, or leave --flips out")
        args.flips = False


def fill_flags(args, data):
    """What was left out takes the value of the preset, which network and size of images choose."""
    if args.preset is None:
        if data.latents is not None:
            args.preset = {"MDT": "mdt", "sd": "sd"}.get((args.model or "")[:3], "imagenet")
        elif max(data.images.shape[1:3]) <= 16:
            args.preset = "digits"
        else:
            args.preset = "cifar10"
    if args.lora and args.lr is None:
        args.lr = LORA_LR
    recipe = dict(PRESETS[args.preset])
    # --model SiT-S/2 --preset mdt: a recipe without masks; --process flow: without Min-SNR.
    if not knows(args.model or recipe["model"], "mask_ratio"):
        recipe.pop("mask_ratio", None)
    if (args.process or recipe["process"]) != "ddpm":
        recipe.pop("min_snr", None)
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.mask_ratio is None and knows(args.model, "mask_ratio"):
        args.mask_ratio = PRESETS["mdt"]["mask_ratio"]
    args.predict = args.predict or "eps"
    args.recompute = bool(args.recompute)


def check_flags(args, data):
    """Flags that contradict each other or the data, or that would do nothing, are refused."""
    need = common.need
    for name in ("dropout", "mask_ratio"):
        need(getattr(args, name) is None or knows(args.model, name),
             f"--{name.replace('_', '-')} does nothing in {args.model}; leave it out")
    for name in ("min_snr", "betas"):
        need(getattr(args, name) is None or args.process == "ddpm",
             f"--{name.replace('_', '-')} is for --process ddpm; leave it out")
    need(args.weights or args.reweight_mode == "loss",
         "--reweight-mode resample says how --weights are used; give --weights, or leave it out")
    common.need_even_batch(args.batch_size, args.accumulate)
    if data.latents is not None:
        need(not args.sample_every, "--sample-every draws no pictures of latents; leave it out, "
                                    "and use sample.py on a checkpoint")
        need(not args.flips, "--flips: latents cannot be mirrored; use --no-flips")


def load_weights(args, inputs):
    """class_weight (K,), which multiplies the loss, and class_probs (K,) or None, to draw by."""
    data = inputs.data
    inputs.class_weight = torch.ones(data.num_classes)
    inputs.class_probs = None
    if not args.weights:
        return
    w = torch.from_numpy(common.load_class_weights(args.weights, data))          # (K,) float64
    if args.reweight_mode == "loss":
        inputs.class_weight = w.float()
        return
    # So the expected gradient is that of the weighted loss.
    counts = np.bincount(inputs.labels, minlength=data.num_classes)
    share = w * torch.from_numpy(counts).double()    # (K,)
    inputs.class_probs = share / share.sum()


def settings_of(args, inputs, channels, size):
    """The settings that a checkpoint carries: enough to build the network and to sample from it."""
    data = inputs.data
    latents = data.latents is not None
    about = {}
    if latents:
        about = load_latents_note(data)
    betas = list(SCALED_LINEAR) if args.betas == "scaled-linear" else None
    settings = dict(
        model=args.model, process=args.process,
        predict=args.predict if args.process == "ddpm" else "v", size=size, channels=channels,
        num_classes=data.num_classes, class_std=args.class_std,
        text_shape=None if inputs.text is None else list(inputs.text.shape[1:]),
        dropout=args.dropout, mask_ratio=args.mask_ratio, recompute=args.recompute,
        betas=betas, latents=latents, classes=data.classes,
        data=data.info["name"], data_sha256=data.info["sha256"],
        latent_scale=about.get("scale"), vae=about.get("vae"))
    known = settings_in(inputs.init)
    # Parts of an official network's shape.
    parts = ("learn_sigma", "depth", "decode")
    if inputs.sd:
        parts = ("unet", "betas", "text_shape", "prompts", "lora", "base", "base_sha256")
    settings.update({name: known[name] for name in parts if name in known})
    mine = {name: settings[name] for name in ("process", "predict", "latent_scale")
            if known.get(name) is not None}
    if known:
        # Those of earlier versions were all linear, and do not say so.
        mine["betas"] = settings["betas"]
    common.need_same(args.init, known, mine, "this run")
    return settings


def load_latents_note(data):
    """latents.json, once the latents are what it says of them."""
    about = common.load_json(data.folder / "latents.json", "the description of the latents")
    try:
        check_latents(data.latents, about)
    except ValueError as e:
        raise common.UserError(f"{data.folder / 'latents.npy'}: {e}") from e
    return about


def load_network(args, inputs):
    """inputs.net: the network with its start weights, the projector and the losses."""
    # The initial weights; everything later draws from (seed, step).
    torch.manual_seed(args.seed)
    process = make_process(args.process, inputs.settings["predict"], inputs.settings["betas"])
    with common.user_errors():
        model = build(inputs.settings, inputs.text, inputs.mask)
        if args.lora:
            # The base is in the network already; what is left are the prompts.
            model.load_state_dict(inputs.init["ema"])
        elif inputs.init is not None:
            init_from(model, inputs.init, args.init, args.init_classes == "new")
    inputs.init = None                               # that of a large network is let go
    projector = None
    if inputs.visual is not None:
        # The network's own start must not depend on the projector.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed + 1)
            first = torch.from_numpy(np.array(inputs.visual[:1, ..., :1])).flatten(0, -3)
            with common.reading(Path(args.attach) / "visual.npy", "file of tokens for this network",
                                "run attach.py again"):
                match_grid(first, math.prod(sides(model.grid)), model.grid)
            width = model.token_width
            # 2048 is REPA's, for networks of at least 384.
            hidden = 2048 if width >= 384 else 4 * width
            projector = Projector(width, inputs.visual.shape[-1], hidden)
    inputs.net = Objective(model, process, projector)


def steps_left(path, state, steps):
    """Steps that a checkpoint of this run still lacks; their number may grow, not shrink."""
    common.fields(path, state, step=int)
    done = state["step"]
    common.need(done <= steps, f"{path}: has {done} steps already, --steps {steps} is fewer; "
                               "choose another --out")
    return steps - done


# ---------------------------------------------------------------------------- command line
def list_presets():
    """The flags that every preset stands for, one paragraph each."""
    paragraphs = []
    for name, preset in PRESETS.items():
        flags = " ".join(f"{flag}={value}" for flag, value in preset.items())
        paragraphs.append(textwrap.fill(flags, 80, initial_indent=f"{name:<10}",
                                        subsequent_indent=" " * 10))
    return "\n".join(paragraphs)


def parse_args(argv=None):
    p = common.Parser(__doc__, epilog=f"presets, where no flag says otherwise:\n{list_presets()}")
    p.add_argument("--data", required=True, help="data folder made by data.py")
    p.add_argument("--out", required=True, help="run folder")
    p.add_argument("--indices", help="keep.npy: train on these images only")
    p.add_argument("--weights", help="weights.npy of reweight.py: class weights")
    p.add_argument("--reweight-mode", choices=("loss", "resample"), default="loss",
                   help="class weights multiply the loss, or set how often a class is drawn")
    p.add_argument("--attach", help="folder of attach.py: kept images, text and visual tokens")
    p.add_argument("--align", type=common.number(low=0, high=1000), default=0.5,
                   help="lambda of the alignment loss, 0 leaves it out")
    p.add_argument("--preset", choices=PRESETS,
                   help="recipe that fills the flags left out; default by image size")
    p.add_argument("--model", choices=MODELS, help="network")
    p.add_argument("--process", choices=("ddpm", "flow"), help="diffusion process")
    p.add_argument("--predict", choices=("eps", "v"),
                   help="what a ddpm network predicts, default eps; v for few-step sampling (flow: "
                        "always v)")
    p.add_argument("--betas", choices=("linear", "scaled-linear"),
                   help="noise of a ddpm; scaled-linear is Stable Diffusion's; default: linear")
    p.add_argument("--min-snr", type=common.number(above=0, high=1e6), metavar="GAMMA",
                   help="weigh the loss of a ddpm by min(SNR, GAMMA) / SNR; 5 is published")
    p.add_argument("--mask-ratio", type=common.number(low=0, high=0.79),
                   help="MDT: least share of hidden tokens in its second pass, 0 for none; "
                        "default 0.3")
    p.add_argument("--init", help="checkpoint whose EMA is the start, or official weights")
    p.add_argument("--init-classes", choices=("new",),
                   help="with --init: the class table starts anew, for other classes than its own")
    p.add_argument("--official", choices=(*OFFICIAL, "sd"),
                   help="--init holds official weights of this kind; sets --model and --process")
    p.add_argument("--steps", type=common.number(int, low=0, high=2**40), help="optimizer steps")
    p.add_argument("--batch-size", type=common.batch_type,
                   help="global batch, over all processes and accumulated parts")
    p.add_argument("--accumulate", type=common.count, default=1,
                   help="parts into which each process cuts its share of a batch")
    p.add_argument("--lr", type=common.number(above=0, high=1e6),
                   help="learning rate (weight decay 0)")
    p.add_argument("--optimizer", choices=("adamw", "adan"), help="default adamw; adan is MDT's")
    p.add_argument("--schedule", choices=("constant", "cosine"),
                   help="learning rate after the warm-up; a cosine run cannot be prolonged")
    p.add_argument("--warmup", type=common.number(int, low=0), help="steps of linear warm-up")
    p.add_argument("--ema", type=common.number(low=0, high=1), help="decay of the moving average")
    p.add_argument("--label-drop", type=common.number(low=0, high=1), default=0.1,
                   help="share of samples trained without label and text")
    p.add_argument("--grad-clip", type=common.number(low=0, high=1e6), default=1.0,
                   help="largest gradient norm, 0 for no clipping")
    p.add_argument("--flips", action=argparse.BooleanOptionalAction, help="mirror half the images")
    p.add_argument("--dropout", type=common.number(low=0, high=0.99),
                   help="dropout inside a U-Net; default: the network's own")
    p.add_argument("--class-std", type=common.number(above=0, high=100),
                   help="spread of the initial class embedding; 1 for short runs")
    p.add_argument("--amp", choices=common.AMP_CHOICES,
                   help="precision of forward and backward pass; auto: bf16 where the hardware "
                        "is fast in it, fp16 on older GPUs, else none, which is float32")
    p.add_argument("--compile", action="store_true",
                   help="torch.compile, of an MDT its full pass: minutes at the start, faster "
                        "steps on a GPU")
    p.add_argument("--recompute", action=argparse.BooleanOptionalAction,
                   help="activation checkpointing: a third slower, far less memory")
    p.add_argument("--lora", type=common.number(int, low=1, high=4096), metavar="RANK",
                   help="train adapters beside a Stable Diffusion, not its network")
    p.add_argument("--checkpoint-every", type=common.number(int, low=0),
                   help="steps between checkpoints, 0 for the last only")
    p.add_argument("--sample-every", type=common.number(int, low=0), default=0,
                   help="steps between sample pictures, 0 for the last only")
    p.add_argument("--log-every", type=common.count, default=50, help="steps between log lines")
    p.add_argument("--tensorboard", action="store_true",
                   help="also write the log lines and pictures for TensorBoard, into "
                        "OUT/tensorboard (pip install tensorboard)")
    common.add_run_flags(p, "start again where another run stands; its samples and figures go too",
                         "seed of everything random")
    return p.parse_args(argv)


@common.command
def main(argv=None):
    args = parse_args(argv)
    device = common.get_device(args.device)
    common.fast_float32()
    inputs = load_inputs(args)                       # nothing is written yet
    hardware = common.settle_amp(args, device)       # the flags that it decided
    last = Path(args.out) / "last.pt"

    def ready():
        return steps_left(last, common.load_pt(last), args.steps) == 0

    # A run with a constant rate can be prolonged.
    free = ["checkpoint_every", "sample_every", "log_every", "tensorboard"]
    if args.schedule == "constant":
        free.append("steps")
    # Samples and figures of a run that is made anew must not pass for the new run's.
    stale = WRITES
    if (Path(args.out) / "train.args.json").exists():
        stale = (*WRITES, *DRAWN)
    network = functools.partial(load_network, args, inputs)
    with common.Stage("train", args, inputs.files, ("last.pt", "loss.png"), free, stale,
                      ready=ready, load=network, open=hardware) as stage:
        if not stage.done:
            stage.finish(**train(args, inputs, stage, device))


if __name__ == "__main__":
    main()
