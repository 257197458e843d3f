"""Measurements that are run by hand; none of them is a test.

    python tests/bench.py train                    # train.py's own loop against diffusers and denoising-diffusion-pytorch, turn by turn in one process
    python tests/bench.py sample                   # DDIM against diffusers' pipeline at equal steps
    python tests/bench.py evaluate                 # the distance at 2 048 dimensions and the extraction, against pytorch-fid
    python tests/bench.py prune                    # memory and time of every score on 200 000 x 2 048 features, 1 000 classes (1.6 GB of disk)
    python tests/bench.py prune --only kcenter     # one row of it
    python tests/bench.py prune --size 0.01        # the same on a hundredth, to see that it runs
    python tests/bench.py large                    # memory and start-up at ImageNet's size

train and sample need the peers, in an environment of their own so that the project's stays as it is:
    python -m venv .venv-bench && .venv-bench/bin/pip install -r requirements.txt diffusers denoising-diffusion-pytorch
    .venv-bench/bin/python tests/bench.py train

Each benchmark is a function of BENCHMARKS that prints a table and, for scripts, plain lines `name value`. Machines are noisy: contestants take turns
in one process, what is compared is the median over the turns. Scratch files go to a temporary folder (--scratch) and are deleted.

What the profile said (two CPU cores, bf16, U-Net, batch 16; shares of a step): convolutions 68 %, and these run at the rate of a large matmul; attention 6 %, the mask
of dropout 5 % (one random number an element), group norm backwards 7 %, copies between float32 and bf16 2 to 5 %, AdamW with EMA under 3 %. Huge pages for large
tensors took the page faults out: 7.0 -> 8.0 images/s (common.get_device; the peers run in the same process and gain as well). Tried and left out, each under 10 %:
group norm in float32 (2 %), attention as two plain products (5 %, and it rounds the scores to bf16), dropout from random bytes (4 %), NCHW instead of NHWC (0 to -3 %).
"""
import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def measure(command):
    """Run a command; (seconds, peak anonymous memory in GB, its output). RssAnon leaves out mapped files: what the kernel can drop at will."""
    start, peak = time.time(), 0
    with tempfile.TemporaryFile("w+") as log:
        p = subprocess.Popen([sys.executable, *map(str, command)], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        while p.poll() is None:
            try:
                peak = max(peak, int(re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{p.pid}/status").read_text())[1]))
            except (TypeError, OSError):                              # it has just ended
                pass
            time.sleep(0.02)
        log.seek(0)
        text = log.read()
    if p.returncode:
        sys.exit(f"{' '.join(map(str, command))}\nended with {p.returncode}:\n{text}")
    return time.time() - start, peak * 1024 / 1e9, text


def prune_data(folder, n, D, classes):
    """A data folder of n grey 8 x 8 images in shuffled classes, and features.npy (n, D): each class its own mean, nearly low rank plus noise."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(n) % classes)
    np.save(folder / "labels.npy", labels)
    np.save(folder / "images.npy", rng.integers(0, 256, (n, 8, 8, 1), dtype=np.uint8))
    whole = folder.with_name("whole")                                 # the same images as one class: 20 picks cannot serve 1 000 classes
    whole.mkdir()
    (whole / "images.npy").symlink_to(folder / "images.npy")
    np.save(whole / "labels.npy", np.zeros_like(labels))
    for f, k in ((folder, classes), (whole, 1)):
        (f / "classes.txt").write_text("".join(f"{c}\n" for c in range(k)))
        (f / "dataset.json").write_text(json.dumps({"name": "bench", "sha256": f"made by bench.py, {k} classes"}))
    means, mix = rng.random((classes, D), np.float32), rng.normal(size=(64, D)).astype(np.float32) / 16
    z = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float32, (n, D))
    for lo in range(0, n, 10_000):
        c = labels[lo:lo + 10_000]
        z[lo:lo + len(c)] = means[c] + rng.standard_normal((len(c), 64), np.float32) @ mix + 0.1 * rng.standard_normal((len(c), D), np.float32)
    z.flush()


def bench_prune(args):
    """Every score per class at 10 %; the features' scores over the whole set as well (the greedy ones with few picks: they cost a pass each)."""
    n, D, classes = int(200_000 * args.size), 2048, max(2, int(1000 * args.size))
    runs = [(s, "class", 0.1, ()) for s in ("random", "gaussian", "moderate", "kcenter", "herding", "cluster")]
    runs += [("el2n", "class", 0.1, ("--el2n-epoch", 1)), ("ccs", "class", 0.1, ("--scores", "el2n"))]
    runs += [(s, "global", 0.5, ()) for s in ("gaussian", "moderate")] + [(s, "global", 20 / n, ()) for s in ("kcenter", "herding", "cluster")]
    print(f"{n} x {D} float32 features ({n * D * 4 / 1e9:.2f} GB), {classes} classes; peak anonymous memory of the whole process\n"
          f"{'score':10} {'scope':7} {'kept':>8} {'RssAnon GB':>11} {'seconds':>8} {'of these scoring':>17}", flush=True)
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="bench_prune_") as tmp:
        data = Path(tmp, "data")
        data.mkdir()
        prune_data(data, n, D, classes)
        lines = []
        for score, scope, keep, more in runs:
            if args.only and score not in args.only:
                continue
            out = Path(tmp, f"{score}_{scope}")
            if more and more[0] == "--scores":
                more = ("--scores", data / "difficulty.npy")
                np.save(more[1], np.random.default_rng(1).random(n))
            flags = () if score in ("random", "el2n", "ccs") else ("--features", data / "features.npy")
            folder = data if scope == "class" else data.with_name("whole")
            seconds, gb, _ = measure([ROOT / "prune.py", "--data", folder, "--out", out, "--score", score, "--scope", scope, "--keep", keep,
                                      *more, *flags])
            record = json.loads((out / "prune.args.json").read_text())
            print(f"{score:10} {scope:7} {record['kept']:8d} {gb:11.2f} {seconds:8.1f} {record['seconds_scores']:17.1f}", flush=True)
            lines.append(f"prune_{score}{'_global' * (scope == 'global')}_rss_gb {gb:.3f}")
        print("\n".join(lines))


# ---------------------------------------------------------------------------------------------- turns
def wait(device):
    if device.type == "cuda":
        import torch
        torch.cuda.synchronize()


def matmul_peak(device, dtype, n=None, repeats=40, seconds=10):
    """FLOP/s of the best of `repeats` products of two n x n matrices, or as many as `seconds` hold: what the device can do in practice."""
    import torch
    n = n or (8192 if device.type == "cuda" else 2048)
    a, best = torch.randn(n, n, device=device).to(dtype), math.inf
    begun = time.perf_counter()
    for k in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        a @ a
        wait(device)
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - begun > seconds:
            break
    return 2 * n**3 / best


def precisions(device):
    """[--amp]: none, and before it bf16 where the hardware has instructions for it, fast or not. Emulated it would take half an hour to say what is known."""
    from common.precision import computes
    if computes(device, "bf16"):
        return ["bf16", "none"]
    print("bf16 is left out: this hardware has no instructions for it and emulates it, 14 to 30 times slower than fp32", flush=True)
    return ["none"]


def machine(device):
    """The device and what it does at most, in words; {--amp: FLOP/s of a large product}."""
    import torch
    name = f"CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    dtypes = {"none": torch.float32, "bf16": torch.bfloat16}
    peak = {amp: matmul_peak(device, dtypes[amp]) for amp in precisions(device)}
    print(f"{name}: matmul peak " + ", ".join(f"{p / 1e9:,.0f} GFLOP/s {'fp32' if amp == 'none' else amp}" for amp, p in peak.items()), flush=True)
    return peak


def turns_within(step, minutes, contestants, block, most):
    """How many turns of all contestants fit, at the pace of one step of a peer; at least one, beside the two of warm-up."""
    step()
    start = time.perf_counter()
    step()
    turn = (time.perf_counter() - start) * contestants * block
    return max(1, min(most, int(60 * minutes / turn) - 2))


def table(device, rows, header):
    import torch
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{name}, torch {torch.__version__}\n" + header)
    for r in rows:
        print(r)


class Turns:
    """Stands in for the progress bar of train.py: after every `block` steps of ours each peer makes `block` steps. So it is train.py's real loop that is
    measured, with its data order, log, EMA and checks. seconds: {name: [of each turn]}; the first two turns are warm-up."""

    def __init__(self, ours, peers, block, device):
        self.ours, self.peers, self.block, self.device, self.n, self.seconds = ours, peers, block, device, 0, {k: [] for k in (ours, *peers)}

    def __call__(self, *_, **__):                                     # train.py makes its bar just before the loop
        self.go()
        return self

    def go(self):
        if self.device.type == "cuda":                                # every wait for the device inside the loop becomes a warning, see train_turns
            import torch
            torch.cuda.set_sync_debug_mode("warn")
        self.start = time.perf_counter()

    def update(self, _=1):
        self.n += 1
        if self.n % self.block:
            return
        if self.device.type == "cuda":
            import torch
            torch.cuda.set_sync_debug_mode("default")
        wait(self.device)
        self.seconds[self.ours].append(time.perf_counter() - self.start)
        for name, step in self.peers.items():
            start = time.perf_counter()
            for _ in range(self.block):
                step()
            wait(self.device)
            self.seconds[name].append(time.perf_counter() - start)
        self.go()

    set_postfix = close = lambda *_, **__: None

    def medians(self):
        return {k: statistics.median(v[2:]) / self.block for k, v in self.seconds.items()}


# ---------------------------------------------------------------------------------------------- training
def loop_of(model, loss_of, device, amp, ema_of=None):
    """The plain loop of diffusers' unconditional example: loss, backward, clipping, AdamW, schedule, zero_grad, EMA."""
    import torch
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    schedule, ema = get_scheduler("constant", optimizer), EMAModel(model.parameters(), decay=0.9999)
    model.train()

    def step():
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            loss = loss_of(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        return loss.item()                                            # it logs each step's loss
    return step


def diffusers_unet(dropout):
    """The U-Net of google/ddpm-cifar10-32: 35.7 M parameters, the blocks of models/unet.py."""
    from diffusers import UNet2DModel
    return UNet2DModel(sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2, dropout=dropout, downsample_padding=0, norm_eps=1e-6,
                       flip_sin_to_cos=False, freq_shift=1, attention_head_dim=None,
                       down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
                       up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"))


def diffusers_dit(size):
    from diffusers import DiTTransformer2DModel
    from models.sit import SIZES
    s = SIZES[size]
    return DiTTransformer2DModel(num_attention_heads=s["heads"], attention_head_dim=s["width"] // s["heads"], in_channels=4, out_channels=4,
                                 num_layers=s["depth"], sample_size=32, patch_size=2, num_embeds_ada_norm=1000)


def eps_loss(x, classes=None):
    """Loss of a diffusers model on the fixed batch x (B, C, H, W), fresh noise and times, by its own scheduler."""
    import torch
    from diffusers import DDPMScheduler
    scheduler = DDPMScheduler(num_train_timesteps=1000)

    def loss_of(model):
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),), device=x.device)
        more = {} if classes is None else {"class_labels": torch.randint(0, classes, (len(x),), device=x.device)}
        return torch.nn.functional.mse_loss(model(scheduler.add_noise(x, noise, t), t, **more).sample.float(), noise.float())
    return loss_of


def lucidrains_step(x, device):
    """denoising-diffusion-pytorch: its own U-Net of width 128 (another network: compare its share of the peak, not its speed)."""
    import torch
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    net = Unet(dim=128, dim_mults=(1, 2, 2, 2), dropout=0.1, flash_attn=False)
    diffusion = GaussianDiffusion(net, image_size=32, timesteps=1000).to(device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4)

    def step():
        loss = diffusion(x * 0.5 + 0.5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    return step, net


def forward_flops(net, *inputs):
    """FLOPs of one forward pass (a multiplication and an addition are two), by torch.utils.flop_counter."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(*inputs)
    return counter.get_total_flops()


def training_data(folder, latents, classes):
    """A data folder of 2 048 random images 32 x 32 x 3, or as many latents 32 x 32 x 4, in `classes` classes."""
    from models.vae import latent_moments, latent_sums
    folder.mkdir()
    rng, n = np.random.default_rng(0), 2048
    np.save(folder / "labels.npy", np.arange(n) % classes)
    (folder / "classes.txt").write_text("".join(f"{c}\n" for c in range(classes)))
    (folder / "dataset.json").write_text(json.dumps({"name": "bench", "sha256": "made by bench.py"}))
    if latents:
        z = np.concatenate([rng.normal(size=(n, 4, 32, 32)), np.full((n, 4, 32, 32), 0.1)], 1).astype(np.float16)
        np.save(folder / "latents.npy", z)
        mean, std = latent_moments(latent_sums(z), 1.0)
        (folder / "latents.json").write_text(json.dumps({"vae": "bench", "scale": 1.0, "mean": mean, "std": std}))
    else:
        np.save(folder / "images.npy", rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8))


def train_turns(args, name, batch, amp, peers, tmp, block, turns_made, more=()):
    """({name: median seconds a step} of train.py and of each peer, taking turns; how often train.py's loop waited for a GPU)."""
    import common
    import train
    sit = name.startswith("SiT")
    data, out = Path(tmp, "latents" if sit else "images"), Path(tmp, f"run{len(list(Path(tmp).glob('run*')))}")
    if not data.exists():
        training_data(data, sit, 1000 if sit else 10)
    turns = Turns("ours", peers, block, args.device)
    with (mock.patch.object(common.run, "progress", turns), mock.patch.object(train, "preview"),              # the pictures after the last step are not the loop
          warnings.catch_warnings(record=True) as caught):
        warnings.simplefilter("always")
        train.main(["--data", str(data), "--out", str(out), "--preset", "imagenet" if sit else "cifar10", "--model", name, "--batch-size", str(batch), "--amp", amp,
                    "--steps", str(block * (turns_made + 2)), "--log-every", "1000000", "--checkpoint-every", "0", "--no-flips", "--device", str(args.device), *more])
    return turns.medians(), sum("synchroniz" in str(w.message) for w in caught)


def bench_train(args):
    """Images per second of train.py's loop and of the peers, the FLOPs counted and the share of the matmul peak."""
    import torch

    from models.build import build
    gpu = args.device.type == "cuda"
    rows, lines = [], []
    peak = machine(args.device)
    cases = [("unet", b, "U-Net") for b in ((128, 512) if gpu else (16,))] + [("SiT-XL/2" if gpu else "SiT-S/2", 256 if gpu else 16, "DiT")]
    cases += [] if gpu else [("SiT-T/2", 16, "DiT")]
    cases = [c for c in cases if not args.only or c[0] in args.only]
    share = args.minutes / max(1, len(cases) * len(peak))
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="bench_train_") as tmp:
        for name, batch, kind in cases:
            sit = kind == "DiT"
            x = torch.randn(batch, 4 if sit else 3, 32, 32, device=args.device)
            make = (lambda: diffusers_dit(name[4:-2])) if sit else (lambda: diffusers_unet(0.1))              # noqa: B023
            loss_of, one = eps_loss(x, 1000 if sit else None), torch.zeros(1, dtype=torch.long)
            net = build(dict(model=name, process="flow" if sit else "ddpm", size=32, channels=x.shape[1], num_classes=1000 if sit else 10))
            flops = {"ours": forward_flops(net, torch.zeros(1, *x.shape[1:]), one.float(), one),
                     "diffusers": forward_flops(make(), torch.zeros(1, *x.shape[1:]), one, *([one] if sit else []))}
            params = sum(p.numel() for p in net.parameters() if p.requires_grad)
            del net
            for amp in peak:
                peers = {"diffusers_fp32": loop_of(make().to(args.device), loss_of, args.device, False)}
                if amp == "bf16":
                    peers["diffusers_bf16"] = loop_of(make().to(args.device), loss_of, args.device, True)
                if not sit and amp == "none":
                    peers["lucidrains_fp32"], other = lucidrains_step(x, args.device)
                    flops["lucidrains"] = forward_flops(other, x[:1], one.to(args.device))
                block = 10 if gpu else 1
                turns = turns_within(peers["diffusers_fp32"], share, 1 + len(peers), block, args.turns)
                seconds, waits = train_turns(args, name, batch, amp, peers, tmp, block, turns, ["--compile"] * gpu)
                for who, s in seconds.items():
                    precision = amp if who == "ours" else "none" if who.endswith("fp32") else "bf16"
                    f = flops[who.split("_")[0]]
                    rows.append(f"{name:9} {batch:6} {'train.py' if who == 'ours' else who.split('_')[0]:12} {'fp32' if precision == 'none' else precision:5} {batch / s:10.2f} {f / 1e9:9.2f} "
                                f"{3 * f * batch / s / peak[precision]:8.0%}")
                tag, mine = name.replace("/", "").replace("-", "").lower() + (f"_b{batch}" if gpu else ""), "fp32_" if amp == "none" else ""
                lines += [f"train_{tag}_{amp}_waits_for_the_device {waits}", f"train_{tag}_{amp}_peak_memory_gb {torch.cuda.max_memory_allocated() / 2**30:.1f}"] * gpu
                for who in seconds:
                    if who.startswith("diffusers"):
                        lines.append(f"train_{'' if tag == 'unet' else tag + '_'}{mine}vs_{who} {seconds[who] / seconds['ours']:.3f}")
            rows.append(f"{'':9} {params / 1e6:.1f} M parameters")
    table(args.device, rows, f"a training step counts as three forward passes; at most {args.turns} turns, as many as {args.minutes:g} minutes hold\n"
          f"{'network':9} {'batch':>6} {'loop':12} {'amp':5} {'images/s':>10} {'GFLOP/img':>9} {'of peak':>8}")
    print("\n".join(lines))


# ---------------------------------------------------------------------------------------------- sampling and evaluation
def take_turns(contestants, turns, device):
    """Median seconds of each of {name: function} over `turns` rounds, in turn, after one round of warm-up."""
    seconds = {k: [] for k in contestants}
    for _ in range(turns + 1):
        for name, run in contestants.items():
            wait(device)
            start = time.perf_counter()
            run()
            wait(device)
            seconds[name].append(time.perf_counter() - start)
    return {k: statistics.median(v[1:]) for k, v in seconds.items()}


def bench_sample(args):
    """DDIM with the CIFAR-10 U-Net: generate() as sample.py calls it against diffusers' DDIMPipeline, equal steps, same batch."""
    import torch
    from diffusers import DDIMPipeline, DDIMScheduler

    import common
    from models.build import build
    from models.diffusion import generate, make_process
    gpu = args.device.type == "cuda"
    n, steps = (256, 50) if gpu else (16, 5)
    model = build(dict(model="unet", process="ddpm", size=32, channels=3, num_classes=10)).eval().requires_grad_(False)
    model = model.to(args.device, memory_format=torch.channels_last)
    process, y = make_process("ddpm"), torch.zeros(n, dtype=torch.long, device=args.device)
    pipe = DDIMPipeline(diffusers_unet(0.1).eval().to(args.device), DDIMScheduler(num_train_timesteps=1000))
    pipe.set_progress_bar_config(disable=True)

    def ours(amp, cfg=1.0):
        with common.autocast(args.device, amp):
            generate(model, process, y, [common.generator(0, "sample", i) for i in range(n)], "ddim", steps, cfg, clip_x0=True)

    def theirs(half):
        with torch.autocast(args.device.type, dtype=torch.bfloat16, enabled=half):
            pipe(batch_size=n, num_inference_steps=steps, output_type="np")
    contestants = {"sample.py": lambda: ours("none"), "diffusers DDIMPipeline": lambda: theirs(False)}
    if "bf16" in precisions(args.device):
        contestants.update({"sample.py --amp bf16": lambda: ours("bf16"), "diffusers DDIMPipeline, bf16": lambda: theirs(True)})
    turns = turns_within(lambda: theirs(False), args.minutes, len(contestants), 1, args.turns)
    s = take_turns(contestants, turns, args.device)
    table(args.device, [f"{k:30} {n / v:10.3f} {n * steps / v:14.2f}" for k, v in s.items()],
          f"DDIM, {steps} steps, {n} images at a time, {turns} turns\n{'who':30} {'images/s':>10} {'evaluations/s':>14}")
    ours_fp32, theirs_fp32, *half = s.values()
    print(f"sample_fp32_vs_diffusers_fp32 {theirs_fp32 / ours_fp32:.3f}")
    if half:
        print(f"sample_vs_diffusers {theirs_fp32 / half[0]:.3f}\nsample_bf16_vs_diffusers_bf16 {half[1] / half[0]:.3f}")


def bench_evaluate(args):
    """The Frechet distance at 2 048 dimensions and Inception's features, against pytorch-fid."""
    from types import SimpleNamespace

    import scipy.linalg
    import torch
    import torchvision
    from PIL import Image
    from pytorch_fid import fid_score
    from pytorch_fid import inception as fid

    from models import encoders, metrics
    rng, D = np.random.default_rng(0), 2048
    stats = [metrics.gaussian_stats(rng.standard_normal((3 * D, D), np.float32) @ rng.standard_normal((D, D), np.float32) / D**0.5 + shift) for shift in (0, 0.1)]
    if tuple(map(int, scipy.__version__.split(".")[:2])) >= (1, 18):  # scipy dropped the argument that pytorch-fid 0.3.0 passes
        fid_score.linalg = SimpleNamespace(sqrtm=lambda a, disp=None: (scipy.linalg.sqrtm(a), None), norm=scipy.linalg.norm)
    values = {}
    s = take_turns({"ours": lambda: values.update(ours=metrics.frechet_distance(*stats[0], *stats[1])),
                    "pytorch-fid": lambda: values.update(theirs=fid_score.calculate_frechet_distance(*stats[0], *stats[1]))}, max(1, args.turns // 3), args.device)
    rows = [f"distance, {D} dimensions           {s['ours']:10.2f} s {s['pytorch-fid']:10.2f} s   relative difference {abs(values['ours'] / values['theirs'] - 1):.1e}"]
    lines = [f"frechet_vs_pytorch_fid {s['pytorch-fid'] / s['ours']:.3f}"]
    n = 2048 if args.device.type == "cuda" else 32
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="bench_evaluate_") as tmp:
        images = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        files = [Path(tmp, f"{i:05d}.png") for i in range(n)]
        for f, x in zip(files, images):
            Image.fromarray(x).save(f)
        random = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False).state_dict()
        torch.save(random, Path(tmp, "inception.pth"))
        fid.load_state_dict_from_url = lambda *_, **__: random        # random weights in the real layout, nothing downloaded
        enc, peer = encoders.load("inception", args.device, weights=Path(tmp, "inception.pth")), fid.InceptionV3([3]).to(args.device)
        fid_score.tqdm = lambda x, **_: x
        values = {}
        s = take_turns({"ours": lambda: values.update(ours=encoders.extract(enc, images, 50)),
                        "pytorch-fid": lambda: values.update(theirs=fid_score.get_activations(files, peer, 50, 2048, args.device, 1))},
                       max(1, args.turns // 3), args.device)
    worst = np.abs(values["ours"] - values["theirs"]).max() / np.abs(values["theirs"]).max()
    rows.append(f"Inception features, {n:5} images   {s['ours']:10.2f} s {s['pytorch-fid']:10.2f} s   relative difference {worst:.1e}")
    lines.append(f"extract_vs_pytorch_fid {s['pytorch-fid'] / s['ours']:.3f}")
    table(args.device, rows, f"{'':34} {'ours':>10}   {'pytorch-fid':>10}")
    print("\n".join(lines))


def bench_large(args):
    """Memory and time of what every script does first, on as many latents as ImageNet has (sparse files of the right size)."""
    n, classes = int(1_281_167 * args.size), 1000
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="bench_large_") as tmp:
        data = Path(tmp, "data")
        data.mkdir()
        np.save(data / "labels.npy", rng.integers(0, classes, n))
        np.lib.format.open_memmap(data / "latents.npy", "w+", np.float16, (n, 8, 32, 32)).flush()
        (data / "classes.txt").write_text("".join(f"{c}\n" for c in range(classes)))
        (data / "dataset.json").write_text(json.dumps({"name": "bench", "sha256": "made by bench.py"}))
        (data / "latents.json").write_text(json.dumps({"vae": "bench", "scale": 1.0, "mean": 0.0, "std": 0.0}))
        np.save(Path(tmp, "difficulty.npy"), rng.random(n, np.float32))
        train = [ROOT / "train.py", "--data", data, "--model", "SiT-T/2", "--steps", 2, "--batch-size", 8, "--device", "cpu", "--amp", "none"]
        commands = {"prune.py, random": [ROOT / "prune.py", "--data", data, "--score", "random", "--per-class", 10, "--out", f"{tmp}/prune"],
                    "attach.py, interval": [ROOT / "attach.py", "--data", data, "--difficulty", f"{tmp}/difficulty.npy", "--per-class", 10, "--text", "none", "--judge", "none",
                                            "--out", f"{tmp}/attach"],
                    "train.py, 2 steps, 10 000 images": [*train, "--indices", f"{tmp}/attach/keep.npy", "--out", f"{tmp}/kept"],
                    "train.py, 2 steps, all images": [*train, "--out", f"{tmp}/full"]}
        print(f"{n:,} latents (8, 32, 32) float16, {n * 16384 / 1e9:.1f} GB\n{'command':34} {'RssAnon GB':>11} {'seconds':>8}")
        lines = []
        for name, command in commands.items():
            seconds, gb, _ = measure(command)
            print(f"{name:34} {gb:11.2f} {seconds:8.1f}", flush=True)
            lines.append(f"large_{re.sub('[^a-z0-9]+', '_', name)}_rss_gb {gb:.3f}")
        print("\n".join(lines))


BENCHMARKS = {"train": bench_train, "sample": bench_sample, "evaluate": bench_evaluate, "prune": bench_prune, "large": bench_large}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("benchmark", choices=tuple(BENCHMARKS))
    p.add_argument("--size", type=float, default=1.0, help="share of the full size")
    p.add_argument("--only", nargs="+", help="these rows alone")
    p.add_argument("--turns", type=int, default=10, help="turns of each contestant, after two of warm-up")
    p.add_argument("--minutes", type=float, default=8, help="train and sample: at most about so many, with fewer turns where the machine is slow; building networks comes on top")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--scratch", type=Path, help="folder for temporary files instead of the system's")
    args = p.parse_args(argv)
    if args.benchmark not in ("prune", "large"):
        import common
        args.device = common.get_device(args.device)
    BENCHMARKS[args.benchmark](args)


if __name__ == "__main__":
    main()
