"""Stage 4: train a diffusion model, DDPM (Ho 2020) or SiT (Ma 2024), on a data set or on a kept part of it.

One loop for CPU, one GPU and many (torchrun), for fp32, bf16 and fp16. Images stay on the device as uint8 and are augmented there. Everything random in
step n (batch, time, noise, label dropout, flips) is drawn from (seed, n) for the whole global batch, so a resumed run equals a straight one bit for bit
on a CPU, and the number of processes changes nothing but the order of sums.

Reads   DATA/                a data folder of data.py (images.npy or latents.npy, labels.npy)
        --indices keep.npy   int64 (M,), train on these images only                                 (prune.py, attach.py)
        --weights weights.npy  float32 (K,), class weights: times the loss, or as sampling            (reweight.py)
        --attach DIR         keep.npy, text.npy, visual.npy: conditions and alignment targets         (attach.py)
Writes  OUT/last.pt, step_*.pt (EMA only), stats.jsonl, loss.png, samples_*.png, train.args.json

    python train.py --data data/digits --preset digits --out runs/digits/full
    torchrun --nproc_per_node 8 train.py --data data/cifar10 --preset cifar10 --out runs/cifar10/full
To resume, or to go on for more --steps, run the same command again.
"""
import argparse
import copy
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import common
from models.build import MODELS, build, init_from
from models.conditioning import Projector, alignment_loss, drop_labels, match_grid, mean_token_cosine
from models.diffusion import diffusion_loss, generate, make_process, sample_latents, to_pixels, to_uint8
from models.vae import check_latents

# The published recipe of each scale (DDPM's CIFAR-10 setting, SiT's ImageNet setting; digits is this kit's own). A flag overrides.
PRESETS = {
    "digits":   dict(model="SiT-T/2", process="flow", steps=800, batch_size=128, lr=6e-3, schedule="cosine", warmup=50, ema=0.99, class_std=1.0, flips=False, amp="none", checkpoint_every=100),
    "cifar10":  dict(model="unet", process="ddpm", steps=100_000, batch_size=128, lr=2e-4, schedule="constant", warmup=5000, ema=0.9999, class_std=0.02, flips=True, amp="bf16", checkpoint_every=10_000),
    "imagenet": dict(model="SiT-XL/2", process="flow", steps=40_000, batch_size=256, lr=1e-4, schedule="constant", warmup=0, ema=0.9999, class_std=0.02, flips=False, amp="bf16", checkpoint_every=10_000),
}
MAX_BAD_STEPS = 20                                                    # non-finite steps in a row before the run stops
MAX_LOSS = 100.0                                                      # mean pixel loss that only a diverged network has
WRITES = ("last.pt", "step_*.pt", "samples_*.png", "stats.jsonl", "loss.png")
DRAWN = ("sample*.*", "grid.png", "nearest.png", "metrics.json", "trajectory.json", "evaluate.args.json")                # from its weights


# ---------------------------------------------------------------------------------------------- what step n sees
class Order:
    """Rows of the global batch of step n, a function of (seed, n) alone: endless seeded epochs, or classes drawn with `class_probs`.

    m images; a batch larger than the set runs through several epochs. labels (m,) int64 is needed with class_probs (K,).
    """

    def __init__(self, m, batch, seed, labels=None, class_probs=None):
        self.m, self.batch, self.seed, self.probs, self.perms = m, batch, seed, class_probs, {}
        if class_probs is not None:
            self.by_class = torch.from_numpy(np.argsort(labels, kind="stable"))
            self.counts = torch.from_numpy(np.bincount(labels, minlength=len(class_probs)))
            self.starts = self.counts.cumsum(0) - self.counts

    def __call__(self, step):
        """(batch,) int64 rows of step `step`, counted from 0."""
        if self.probs is not None:                                    # class ~ probs, then uniform within it
            g = common.generator(self.seed, "order", step)
            c = torch.multinomial(self.probs, self.batch, replacement=True, generator=g)
            within = (torch.rand(self.batch, generator=g, dtype=torch.float64) * self.counts[c]).long()
            return self.by_class[self.starts[c] + within]
        first, last = step * self.batch, (step + 1) * self.batch - 1
        epochs = range(first // self.m, last // self.m + 1)
        self.perms = {e: self.perms.get(e, None) if e in self.perms else torch.randperm(self.m, generator=common.generator(self.seed, "epoch", e)) for e in epochs}
        rows = torch.cat([self.perms[e] for e in epochs])
        return rows[first - epochs[0] * self.m:][:self.batch]


class Rows:
    """Rows of a (memory-mapped) array on the device: all of it resident where it fits, else gathered ahead of time by a background thread.

    Every row is looked at as it is read: one NaN among latents would spoil each step that draws it. UserError names the row.
    """

    def __init__(self, array, keep, device, budget):
        self.array, self.keep, self.device = array, keep, device
        size = array[:1].nbytes * len(keep)
        self.resident = size <= budget
        if self.resident:
            self.data = torch.empty((len(keep), *array.shape[1:]), dtype=torch.from_numpy(array[:1].copy()).dtype, device=device)
            for lo in range(0, len(keep), 4096):
                self.data[lo:lo + 4096] = self._read(keep[lo:lo + 4096]).to(device)
        else:
            self.pool, self.next = ThreadPoolExecutor(1), (None, None)

    def _read(self, rows):
        return common.sound_rows(torch.from_numpy(self.array[rows]), rows, getattr(self.array, "filename", "input"))

    def _gather(self, rows):
        out = self._read(self.keep[rows.numpy()])
        return out.pin_memory() if self.device.type == "cuda" else out

    def get(self, rows, ahead=None):
        """rows (b,) int64 on the CPU -> (b, ...) on the device; `ahead` are the rows that will be asked for next."""
        if self.resident:
            return self.data[rows.to(self.device, non_blocking=True)]
        key = rows.numpy().tobytes()
        out = self.next[1].result() if self.next[0] == key else self._gather(rows)
        if ahead is not None:
            self.next = (ahead.numpy().tobytes(), self.pool.submit(self._gather, ahead))
        return out.to(self.device, non_blocking=True)


def device_budget(device):
    """Bytes that data may take: 60 % of the free device memory, on a CPU a quarter of the memory, which the processes of this machine share."""
    if device.type == "cuda":
        return 0.6 * torch.cuda.mem_get_info(device)[0]
    return 0.25 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


# ---------------------------------------------------------------------------------------------- the objective
class Objective(nn.Module):
    """Network, projector and losses as one module, so that DDP and torch.compile wrap one thing."""

    def __init__(self, model, process, projector=None):
        super().__init__()
        self.model, self.process, self.projector = model, process, projector

    def forward(self, x, u, eps, y, v=None):
        """-> (diffusion loss (n,), alignment loss (n,) or None): L = L_diff + lambda L_proj is put together by the loop."""
        if self.projector is None:
            return diffusion_loss(self.process, self.model, x, u, eps, y), None
        loss, tokens = diffusion_loss(self.process, self.model, x, u, eps, y, tokens_after=self.model.token_layer)
        return loss, alignment_loss(self.projector(tokens), match_grid(v, tokens.shape[1]))


@torch.no_grad()
def ema_update(ema, params, decay, step):
    """EMA with the warm-up min(d, (1 + n) / (10 + n)): a plain 0.9999 would keep 14 % of the initial weights after 20 000 steps."""
    torch._foreach_lerp_(ema, params, 1 - min(decay, (1 + step) / (10 + step)))


# ---------------------------------------------------------------------------------------------- inputs
def load_inputs(a):
    """Everything that the flags name, checked before anything is written. Returns a namespace."""
    d, init = common.open_data(a.data, pixels=False), common.load_checkpoint(a.init, a.official) if a.init else None
    if a.official:
        if not a.init:
            raise common.UserError(f"--official {a.official} says what --init holds; give --init CHECKPOINT, or leave it out")
        a.model, a.process = a.model or init["args"]["model"], a.process or init["args"]["process"]
    a.preset = a.preset or ("imagenet" if d.latents is not None else "digits" if d.images.shape[1] <= 16 else "cifar10")
    for k, v in PRESETS[a.preset].items():
        if getattr(a, k) is None:
            setattr(a, k, v)
    if a.dropout is not None and not a.model.startswith("unet"):
        raise common.UserError(f"--dropout does nothing in {a.model}; leave it out")
    if a.reweight_mode == "resample" and not a.weights:
        raise common.UserError("--reweight-mode resample says how --weights are used; give --weights, or leave it out")
    if a.sample_every and d.latents is not None:
        raise common.UserError("--sample-every draws no pictures of latents; leave it out, and use sample.py on a checkpoint")
    if a.batch_size % (common.world() * a.accumulate):
        raise common.UserError(f"--batch-size {a.batch_size} is the global batch: it must be a multiple of processes x --accumulate = {common.world()} x {a.accumulate}")
    i = argparse.Namespace(data=d, attach=None, text=None, mask=None, visual=None, weights=None, init=init)
    i.keep = np.arange(len(d.labels))
    if a.attach:
        attach = Path(a.attach)
        common.load_record(attach / "attach.args.json")               # must be there
        common.check_origin(attach / "keep.npy", d)
        i.keep = common.load_indices(attach / "keep.npy", len(d.labels), d.labels, d.num_classes)
        if a.indices and not np.array_equal(common.load_indices(a.indices, len(d.labels)), i.keep):
            raise common.UserError(f"{a.indices}: holds other indices than {attach / 'keep.npy'}, to which the attachments belong; leave --indices out")
        if (attach / "text.npy").exists():
            i.text = np.array(common.load_npy(attach / "text.npy", "text tokens, float16 (K, L, d)", (d.num_classes, None, None), "f"))
            i.mask = np.array(common.load_npy(attach / "text_mask.npy", "text mask, bool (K, L)", i.text.shape[:2], "b"))
            common.check_finite(i.text, attach / "text.npy", "text tokens")
        if (attach / "visual.npy").exists() and a.align > 0:
            i.visual = common.load_npy(attach / "visual.npy", "visual tokens, float16 (M, [2,] tokens, d)", None, "f")
            if i.visual.ndim not in (3, 4) or len(i.visual) != len(i.keep) or 0 in i.visual.shape or (i.visual.ndim == 4 and i.visual.shape[1] != 2):
                raise common.UserError(f"{attach / 'visual.npy'}: shape {i.visual.shape}, but {len(i.keep)} kept images need ({len(i.keep)}, tokens, d), or "
                                       f"({len(i.keep)}, 2, tokens, d) with flips; run attach.py again")
            common.check_finite(i.visual[:4096], attach / "visual.npy", "visual tokens")
            if math.isqrt(i.visual.shape[-2]) ** 2 != i.visual.shape[-2]:
                raise common.UserError(f"{attach / 'visual.npy'}: {i.visual.shape[-2]} tokens do not make a square grid; run attach.py again")
            if i.visual.ndim == 3:                                    # a mirrored image would be aligned to features of the unmirrored one
                if a.flips_asked:
                    raise common.UserError(f"--flips: {attach / 'visual.npy'} holds one orientation only; run attach.py --flips, or leave --flips out")
                a.flips = False
        elif a.align > 0 and i.text is None:
            raise common.UserError(f"{attach}: neither text.npy nor visual.npy: nothing is attached; use --indices {attach / 'keep.npy'}")
    elif a.indices:
        i.keep = common.load_indices(a.indices, len(d.labels), d.labels, d.num_classes)
        common.check_origin(a.indices, d)
    i.labels = d.labels[i.keep]
    if a.weights:
        common.check_origin(a.weights, d)
        w = np.array(common.load_npy(a.weights, f"class weights, float32 ({d.num_classes},)", (d.num_classes,), "f"), dtype=np.float64)
        if not np.isfinite(w).all() or (w < 0).any() or w.sum() == 0:
            raise common.UserError(f"{a.weights}: weights must be finite, not negative and not all zero; run reweight.py again")
        i.weights = torch.from_numpy(w)
    if d.latents is not None:
        i.about = common.load_json(d.folder / "latents.json", "the description of the latents")
        try:
            check_latents(d.latents, i.about)
        except ValueError as e:
            raise common.UserError(f"{d.folder / 'latents.npy'}: {e}") from e
        if a.flips:
            raise common.UserError("--flips: latents cannot be mirrored; use --no-flips")
        if (scale := init_settings(i).get("latent_scale")) not in (None, i.about["scale"]):
            raise common.UserError(f"{a.init}: was trained on latents x {scale}, {d.folder / 'latents.json'} says {i.about['scale']}: encode anew")
    return i


def init_settings(i):
    """The settings that the checkpoint of --init carries, or {}."""
    args = (i.init or {}).get("args")
    return args if isinstance(args, dict) else {}


def settings_of(a, i):
    """The settings that a checkpoint carries: enough to build the network again and to sample from it."""
    d, source = i.data, i.data.latents if i.data.latents is not None else i.data.images
    size, channels = (source.shape[2], source.shape[1] // 2) if d.latents is not None else (source.shape[1], source.shape[3])
    if source.shape[2] != (source.shape[3] if d.latents is not None else source.shape[1]):
        raise common.UserError(f"{d.folder}: images are not square {source.shape}; make them so with data.py --size")
    settings = dict(model=a.model, process=a.process, predict=a.predict if a.process == "ddpm" else "v", size=size, channels=channels, num_classes=d.num_classes,
                    class_std=a.class_std, text_shape=list(i.text.shape[1:]) if i.text is not None else None, dropout=a.dropout, recompute=a.recompute,
                    latents=d.latents is not None, classes=d.classes, data=d.info["name"], data_sha256=d.info["sha256"],
                    latent_scale=i.about["scale"] if d.latents is not None else None, vae=i.about.get("vae") if d.latents is not None else None,
                    **{k: v for k, v in init_settings(i).items() if k in ("learn_sigma", "depth")})         # parts of an official network's shape
    for k in ("process", "predict"):
        if (was := init_settings(i).get(k, settings[k])) != settings[k]:
            raise common.UserError(f"{a.init}: was trained with --{k} {was}, this run has {settings[k]}; its weights would mean something else")
    return settings


# ---------------------------------------------------------------------------------------------- pictures and the log
def preview(ema, process, settings, device, path, seed, per_class=8):
    """samples_*.png: EMA samples on fixed noise, a row per class (the first ten)."""
    rows = min(settings["num_classes"], 10)
    y = torch.arange(rows, device=device).repeat_interleave(per_class)
    generators = [common.generator(seed, "preview", j) for j in range(len(y))]
    x = to_uint8(generate(ema, process, y, generators, *(("heun", 12) if process.name == "flow" else ("ddim", 25)))).cpu().numpy()
    common.save_grid(path, x.reshape(rows, per_class, *x.shape[1:]))


def loss_plot(stats, path, constant):
    """loss.png; constant: the cosine that one constant vector reaches, which the alignment has to beat."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    fig = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = fig.subplots(1, 2)
    steps = [s["step"] for s in stats]
    left.plot(steps, [s["diffusion"] for s in stats], label="diffusion loss")
    if "align" in stats[-1]:
        left.plot(steps, [s["align"] for s in stats], label="alignment loss (-cosine)")
        left.axhline(-constant, color="C1", ls=":", label=f"one constant vector ({-constant:.2f})")
        left.legend()
    left.set(xlabel="step", ylabel="loss, pixel mean", title="training loss", ylim=None if "align" in stats[-1] else (0, None))
    for k in range(0, 10, 3):
        right.plot(steps, [s["loss_t"][k] for s in stats], label=f"t in [{k / 10:.1f}, {(k + 1) / 10:.1f})")
    right.set(xlabel="step", title="loss by time (0 data, 1 noise)", yscale="log")
    right.legend(fontsize=8)
    with common.atomic(path) as tmp:
        fig.savefig(tmp, dpi=100)


class Log:
    """Sums of the losses on the device between two log lines; reading them is the loop's only wait for the device."""

    def __init__(self, out, device):
        self.file, self.device, self.rows = out / "stats.jsonl", device, []
        self.reset()

    def reset(self):
        self.sums = torch.zeros(24, dtype=torch.float64, device=self.device)     # bins: 10 sums, 10 counts; align, its count, grad norm, steps

    def resume(self, step):
        """Keep the lines up to `step`: what came after belongs to steps that will be done again."""
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        self.rows = [r for r in (json.loads(x) for x in lines if x.endswith("}")) if r["step"] <= step]
        if common.rank() == 0:
            common.save_text(self.file, "".join(json.dumps(r) + "\n" for r in self.rows))

    def add(self, u, loss, align):
        bins = (u * 10).long().clamp(0, 9)
        ok = loss.isfinite()                                          # a skipped step must not spoil the mean of the others
        self.sums.index_add_(0, bins, torch.where(ok, loss, 0).double())
        self.sums.index_add_(0, bins + 10, ok.double())
        if align is not None:
            self.sums[20] += torch.nan_to_num(align).sum().double()
            self.sums[21] += len(align)

    def write(self, step, **extra):
        sums, own = self.sums, self.sums[22:].clone()                 # gradient norm and steps are the same on every rank
        common.all_reduce(sums)
        bins, counts = sums[:10].tolist(), sums[10:20].tolist()
        row = {"step": step, "diffusion": sum(bins) / max(sum(counts), 1), "loss_t": [b / c if c else 0.0 for b, c in zip(bins, counts)]}
        if sums[21] > 0:
            row["align"] = (sums[20] / sums[21]).item()
        row.update(grad_norm=(own[0] / own[1].clamp(min=1)).item(), **extra)
        self.rows.append(row)
        if common.rank() == 0:
            with open(self.file, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
        self.reset()
        return row


# ---------------------------------------------------------------------------------------------- the loop
def train(a, i, stage, device):
    d, settings, main = i.data, settings_of(a, i), common.rank() == 0
    source = d.latents if d.latents is not None else d.images
    shape, M, B = (settings["channels"], settings["size"], settings["size"]), len(i.keep), a.batch_size
    torch.manual_seed(a.seed)                                         # initial weights; all else draws from (seed, step)
    process = make_process(a.process, settings["predict"])
    with common.user_errors():
        model = build(settings, i.text, i.mask)
    if i.init is not None:
        with common.user_errors():
            init_from(model, i.init, a.init)
    projector = None
    if i.visual is not None:
        with torch.random.fork_rng(devices=[]):                       # the network's own start must not depend on the projector
            torch.manual_seed(a.seed + 1)
            projector = Projector(model.token_width, i.visual.shape[-1], hidden=2048 if model.token_width >= 384 else 4 * model.token_width)
    net = Objective(model, process, projector).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(net.model).eval().requires_grad_(False)
    params, ema_params = list(net.model.parameters()), list(ema.parameters())
    optimizer, scaler = common.optimizer_of(net, a.lr, device, a.amp)
    start, images_seen, seconds, skipped_before = 0, 0, 0.0, 0
    logger = Log(stage.out, device)
    if stage.resuming and (stage.out / "last.pt").exists():
        state = common.load_pt(stage.out / "last.pt")
        net.model.load_state_dict(state["model"]), ema.load_state_dict(state["ema"])
        if projector is not None:
            projector.load_state_dict(state["projector"])
        optimizer.load_state_dict(state["optimizer"]), scaler.load_state_dict(state["scaler"])
        steps_left(stage.out / "last.pt", state["step"], a.steps)
        start, images_seen, seconds, skipped_before = state["step"], state["images_seen"], state["seconds"], state["skipped"]
        common.log(f"resuming at step {start:,}")
        del state
    logger.resume(start)
    budget = device_budget(device)
    images = Rows(source, i.keep, device, budget)
    visual = Rows(i.visual, np.arange(M), device, budget - images.resident * source[:1].nbytes * M) if i.visual is not None else None
    constant = mean_token_cosine(i.visual[:4096], model.grid ** 2) if visual else None
    labels = torch.from_numpy(i.labels).to(device)
    counts = torch.from_numpy(np.bincount(i.labels, minlength=d.num_classes)).double()
    resample = i.weights is not None and a.reweight_mode == "resample"
    order = Order(M, B, a.seed, i.labels, i.weights * counts / (i.weights * counts).sum() if resample else None)
    class_weight = None if i.weights is None or resample else i.weights.float().to(device)
    if class_weight is not None and abs(at := (i.weights * counts).sum().item() / M - 1) > 1e-3:
        common.log(f"note: {a.weights} averages {at + 1:.3f} over these images, not 1, and scales the loss by that: was it made for another kept set?")
    wrapped = torch.compile(net) if a.compile else net
    if common.world() > 1:
        wrapped = nn.parallel.DistributedDataParallel(wrapped, broadcast_buffers=False,          # the text table never changes
                                                      device_ids=[device.index] if device.type == "cuda" else None)
    lo, hi = B * common.rank() // common.world(), B * (common.rank() + 1) // common.world()
    micro, stop, bad = (hi - lo) // a.accumulate, [], torch.zeros(2, dtype=torch.int64, device=device)      # bad: in a row, in all
    bad[1] = skipped_before
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))       # finish the step, save, exit 143

    def save(step):
        if main:
            common.save_pt(stage.out / "last.pt", {
                "model": net.model.state_dict(), "ema": ema.state_dict(), "projector": projector.state_dict() if projector else None,
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "step": step, "images_seen": images_seen,
                "seconds": seconds + time.time() - clock, "skipped": int(bad[1]), "args": {**vars_of(a), **settings}})

    n_params = sum(p.numel() for p in params if p.requires_grad)
    common.log(f"{a.model} {n_params / 1e6:.2f} M parameters, {a.process}, {M:,} images, {a.steps:,} steps of {B} = {a.steps * B / M:,.1f} effective epochs, {device}, "
               f"amp {a.amp}, each checkpoint about {n_params * 16 / 2**20 + 1:,.0f} MB in {stage.out}")
    if visual:
        common.log(f"alignment: one constant vector reaches the cosine {constant:.3f}; less than that has learned nothing")
    if a.steps > start and images.resident is False:
        common.log("the images do not fit beside the network: they are read from disk ahead of each step")
    bar, clock, first_log = common.progress(total=a.steps, initial=start, desc=str(stage.out)), time.time(), None
    net.train()
    if a.steps == 0:                                                  # --init CKPT --steps 0: another checkpoint as one of ours
        save(0)
    rows = order(start)
    for step in range(start, a.steps):
        ahead = order(step + 1)
        g = common.generator(a.seed, "step", step, device=device)
        u_all, eps_all = torch.rand(B, generator=g, device=device), torch.randn(B, *shape, generator=g, device=device)
        drop_all, flip_all = torch.rand(B, generator=g, device=device), torch.rand(B, generator=g, device=device) < 0.5
        post_all = torch.randn(B, *shape, generator=g, device=device) if settings["latents"] else None
        torch.manual_seed(common.generator(a.seed, "dropout", step, common.rank()).initial_seed())          # dropout has no generator of its own
        optimizer.param_groups[0]["lr"] = common.lr_at(step, a.lr, a.warmup, a.schedule, a.steps)
        mine, x_all = rows[lo:hi], images.get(rows[lo:hi], ahead[lo:hi])
        y_all = labels[mine.to(device, non_blocking=True)]
        v_all = visual.get(mine, ahead[lo:hi]) if visual else None
        for k in range(a.accumulate):
            part, whole = slice(k * micro, (k + 1) * micro), slice(lo + k * micro, lo + (k + 1) * micro)
            u, eps, flip, y = u_all[whole], eps_all[whole], flip_all[whole], y_all[part]
            if settings["latents"]:
                x = sample_latents(x_all[part], settings["latent_scale"], post_all[whole])
            else:
                x = to_pixels(x_all[part])
                x = torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x) if a.flips else x
            v = None if v_all is None else v_all[part] if v_all.ndim == 3 else v_all[part][torch.arange(micro, device=device), flip.long() * a.flips]
            weight = 1.0 if class_weight is None else class_weight[y]
            x = x.contiguous(memory_format=torch.channels_last)
            y_in = drop_labels(y, a.label_drop, d.num_classes, drop_all[whole])          # per sample, and text with it
            if common.world() > 1:
                wrapped.require_backward_grad_sync = k == a.accumulate - 1                # no_sync() but for the last part
            with common.autocast(device, a.amp):
                loss, align = wrapped(x, u, eps, y_in, v)                                 # (n,), (n,)
            total = (weight * loss).mean() + (a.align * align.mean() if align is not None else 0)
            total = total * torch.where(total.detach().isfinite(), 1, math.nan)           # an infinite loss can have finite gradients
            scaler.scale(total / a.accumulate).backward()
            logger.add(u, loss.detach(), None if align is None else align.detach())
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(net.parameters(), a.grad_clip or math.inf)        # after unscaling
        scaler.step(optimizer)
        scaler.update(None if a.amp == "fp16" else 1.0)               # only fp16 needs another scale after a bad step
        optimizer.zero_grad(set_to_none=True)
        ema_update(ema_params, params, a.ema, step)
        finite = norm.isfinite()
        bad[0], bad[1] = torch.where(finite, 0, bad[0] + 1), bad[1] + (~finite)
        logger.sums[22] += torch.where(finite, norm, 0)
        logger.sums[23] += 1 * finite
        images_seen, rows = images_seen + B, ahead
        bar.update()
        done, last = step + 1, step + 1 == a.steps
        leave = any_rank(stop) if common.world() == 1 or last or done % 10 == 0 else False        # asking the other ranks takes a moment
        saving = last or leave or a.checkpoint_every and done % a.checkpoint_every == 0  # a log line with each checkpoint: a resume loses no sums
        if done % a.log_every == 0 or saving or device.type == "cpu" and bad[0] >= MAX_BAD_STEPS:       # a GPU is waited for at log lines only
            spent = seconds + time.time() - clock
            if bad[0] >= MAX_BAD_STEPS or last and bad[0] > 2:        # one or two are fp16 finding its scale, and their weights are sound
                bar.close()
                raise common.UserError(f"{stage.out}: {int(bad[0])} steps in a row had a non-finite loss or gradient, up to step {done}; {last_good(stage.out)}; "
                                       "check the data, lower --lr, or use --amp bf16 or none")
            row = logger.write(done, lr=common.lr_at(step, a.lr, a.warmup, a.schedule, a.steps), images=images_seen, epoch=images_seen / M, seconds=round(spent, 3), skipped=int(bad[1]), scale=scaler.get_scale())
            bar.set_postfix(loss=f"{row['diffusion']:.4f}", refresh=False)
            if row["diffusion"] > MAX_LOSS:
                bar.close()
                raise common.UserError(f"{stage.out}: the loss is {row['diffusion']:.3g} up to step {done}, and that of a network that predicts nothing about 1: the run "
                                       f"has diverged; {last_good(stage.out)}; lower --lr, or raise --warmup")
            if first_log is None and not last:
                first_log = (spent - seconds) / (done - start)
                common.log(f"{B / first_log:,.0f} images/s, about {first_log * (a.steps - done) / 60:,.1f} minutes to go")
        if main and not settings["latents"] and (a.sample_every and done % a.sample_every == 0 or last):
            pause = time.time()
            preview(ema, process, settings, device, stage.out / f"samples_{done:07d}.png", a.seed)
            clock += time.time() - pause                              # pictures are not training
        if saving and bad[0] <= 2:                                    # never replace a good checkpoint in the middle of a divergence
            if main and a.checkpoint_every and done % a.checkpoint_every == 0:
                common.save_pt(stage.out / f"step_{done:07d}.pt", {"ema": ema.state_dict(), "step": done, "images_seen": images_seen,
                                                                   "seconds": seconds + time.time() - clock, "args": {**vars_of(a), **settings}})
            save(done)                                                # last of all: a resume does nothing again of what is in it
        if leave:
            common.log(f"stopped by SIGTERM at step {done}; run the same command again to go on")
            sys.stdout.flush()
            sys.exit(143)
    bar.close()
    if device.type == "cuda":
        common.log(f"peak device memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GB")
    if main and logger.rows:
        loss_plot(logger.rows, stage.out / "loss.png", constant)
    if (spent := logger.rows[-1]["seconds"] if logger.rows else 0) > 0:
        common.log(f"{images_seen:,} images in {spent:,.1f} s, diffusion loss {logger.rows[-1]['diffusion']:.4f}, {int(bad[1])} steps skipped")
    return {"train_seconds": spent, "images_seen": images_seen, "epochs": images_seen / M, "images_kept": M, "parameters": n_params, "skipped": int(bad[1])}


def last_good(out):
    """What stands of a run that diverged, in words."""
    if not (out / "last.pt").exists():
        return "no checkpoint was written before"
    return f"last.pt keeps the last good checkpoint, of step {common.load_pt(out / 'last.pt')['step']}"


def steps_left(checkpoint, done, steps):
    """Steps that a run with `done` of them still lacks; the number may grow, not shrink."""
    common.check_kinds(checkpoint, "its step", done, int)
    if done > steps:
        raise common.UserError(f"{checkpoint}: has {done} steps already, --steps {steps} is fewer; choose another --out")
    return steps - done


def any_rank(stop):
    """True on every rank as soon as one was told to stop: all must leave after the same step. A tensor of the CPU: the device is not waited for."""
    return bool(common.all_reduce(torch.tensor(len(stop))))


def vars_of(a):
    return {k: v for k, v in vars(a).items() if k not in ("device", "overwrite", "flips_asked")}


def parse_args(argv=None):
    p = common.Parser(__doc__)
    p.add_argument("--data", required=True, help="data folder made by data.py")
    p.add_argument("--out", required=True, help="run folder")
    p.add_argument("--indices", help="keep.npy: train on these images only")
    p.add_argument("--weights", help="weights.npy of reweight.py: class weights")
    p.add_argument("--reweight-mode", choices=("loss", "resample"), default="loss", help="class weights multiply the loss, or set how often a class is drawn")
    p.add_argument("--attach", help="folder of attach.py: its kept images, text conditions and visual tokens")
    p.add_argument("--align", type=common.number(low=0, high=1000), default=0.5, help="lambda of the alignment loss, 0 leaves it out")
    p.add_argument("--preset", choices=PRESETS, help="recipe that fills the flags left out; default by image size")
    p.add_argument("--model", choices=MODELS, help="network")
    p.add_argument("--process", choices=("ddpm", "flow"), help="diffusion process")
    p.add_argument("--predict", choices=("eps", "v"), default="eps", help="what a ddpm network predicts (flow: always v)")
    p.add_argument("--init", help="checkpoint of train.py to take the start weights from (its EMA), or official weights")
    p.add_argument("--official", choices=("dit", "sit"), help="--init holds official weights of this kind; sets --model and --process where they are left out")
    p.add_argument("--steps", type=common.number(int, low=0, high=2**40), help="optimizer steps in all")
    p.add_argument("--batch-size", type=common.batch_type, help="global batch, over all processes and accumulated parts")
    p.add_argument("--accumulate", type=common.count, default=1, help="parts into which each process cuts its share of a batch")
    p.add_argument("--lr", type=common.number(above=0, high=1e6), help="learning rate of AdamW (weight decay 0)")
    p.add_argument("--schedule", choices=("constant", "cosine"), help="learning rate after the warm-up; a cosine run cannot be prolonged")
    p.add_argument("--warmup", type=common.number(int, low=0), help="steps of linear warm-up")
    p.add_argument("--ema", type=common.number(low=0, high=1), help="decay of the weights' moving average")
    p.add_argument("--label-drop", type=common.number(low=0, high=1), default=0.1, help="share of samples trained without label and text")
    p.add_argument("--grad-clip", type=common.number(low=0, high=1e6), default=1.0, help="largest gradient norm, 0 for no clipping")
    p.add_argument("--flips", action=argparse.BooleanOptionalAction, help="mirror half of the images")
    p.add_argument("--dropout", type=common.number(low=0, high=0.99), help="dropout inside a U-Net; default: the network's own")
    p.add_argument("--class-std", type=common.number(above=0, high=100), help="spread of the initial class embedding")
    p.add_argument("--amp", choices=common.AMP, help="precision of the forward and backward pass")
    p.add_argument("--compile", action="store_true", help="torch.compile: minutes at the start, faster steps on a GPU")
    p.add_argument("--recompute", action="store_true", help="activation checkpointing: a third slower, far less memory")
    p.add_argument("--checkpoint-every", type=common.number(int, low=0), help="steps between checkpoints, 0 for the last only")
    p.add_argument("--sample-every", type=common.number(int, low=0), default=0, help="steps between sample pictures, 0 for the last only")
    p.add_argument("--log-every", type=common.count, default=50, help="steps between log lines")
    p.add_argument("--seed", type=common.seed_type, default=0, help="seed of everything random")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--overwrite", action="store_true", help="start again in a folder that holds another run; its samples and figures go too")
    a = p.parse_args(argv)
    a.flips_asked = a.flips is True
    return a


@common.command
def main(argv=None):
    a = parse_args(argv)
    device = common.get_device(a.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    i = load_inputs(a)
    settings_of(a, i)
    free = ["checkpoint_every", "sample_every", "log_every", "flips_asked"] + ["steps"] * (a.schedule == "constant")
    attached = {f"attach_{n}": Path(a.attach) / f"{n}.npy" for n in ("keep", "text", "visual") if a.attach and (Path(a.attach) / f"{n}.npy").exists()}
    inputs, last = {"data": i.data.info, "indices": a.indices, "weights": a.weights, "init": a.init, **attached}, Path(a.out) / "last.pt"
    again = (Path(a.out) / "train.args.json").exists()                # the samples and figures of a run that is made anew must not pass for the new run's
    stage = common.Stage("train", a, inputs, ("last.pt", "loss.png"), free, stale=WRITES + DRAWN * again,
                         ready=lambda: steps_left(last, common.load_pt(last)["step"], a.steps) == 0).__enter__()
    if stage.done:
        return
    stage.finish(**train(a, i, stage, device))


if __name__ == "__main__":
    main()
