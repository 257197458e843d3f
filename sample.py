"""Stage 5: draw samples from a checkpoint, always from its EMA.

Sample i depends on (seed, i) alone: not on the batch size, the number of processes or where an interrupted call stopped. A model of latents draws
latents, which the VAE that made its data decodes (pip install diffusers).

Reads   CHECKPOINT           last.pt or step_*.pt of train.py; the architecture comes from the settings inside. Or, with --official dit|sit, the
                             published weights (Peebles & Xie 2023; Ma et al. 2024), whose learned sigma is not used: see --variance
Writes  OUT/samples.npy      uint8 (n, H, W, C);  OUT/sample_labels.npy int64 (n,);  OUT/grid.png;  with --npz OUT/samples.npz (arr_0, the ADM form)

    python sample.py --checkpoint runs/digits/full/last.pt --num 1000 --sampler heun --steps 12 --out runs/digits/full
    python sample.py --checkpoint SiT-XL-2-256x256.pt --official sit --cfg 1.5 --sampler sde --steps 250 --batch-size 32 --out runs/official
Run the same command again after an interruption: what is there is kept.
"""
import math
from pathlib import Path

import numpy as np
import torch

import common
from models import diffusion
from models.diffusion import SAMPLERS, to_uint8

DEFAULT_SAMPLER = {"ddpm": ("ddim", 50), "flow": ("heun", 25)}


def make_labels(spec, n, num_classes, seed):
    """(n,) int64. 'balanced': 0..K-1 in turn, so that any prefix is balanced; 'random': uniform, label i from (seed, i) alone; or a .npy file."""
    if spec == "balanced":
        return np.arange(n) % num_classes
    if spec == "random":
        return np.array([torch.randint(num_classes, (), generator=common.generator(seed, "label", i)).item() for i in range(n)], dtype=np.int64)
    y = np.array(common.load_npy(spec, f"labels, int64 ({n},)", (n,), "iu"), dtype=np.int64)
    if y.min() < 0 or y.max() > num_classes:
        raise common.UserError(f"{spec}: labels run {y.min()}..{y.max()}, but the model knows 0..{num_classes - 1} ({num_classes} = no class); use labels of its classes")
    return y


def draw(a, model, process, y, shape, device, stage, vae=None, scale=None):
    """samples.npy of `shape`, by every process its part, then grid.png. With a vae the model's samples are latents times `scale`."""
    drawn = dict(sampler=a.sampler, steps=a.steps, cfg=a.cfg, cfg_interval=a.cfg_interval, eta=a.eta, variance=a.variance)

    def compute(ids):
        with common.autocast(device, a.amp):
            noise = [common.generator(a.seed, "sample", int(i)) for i in ids]
            x = diffusion.draw(model, process, torch.from_numpy(y[ids]).to(device), noise, drawn, vae, scale)          # (b, channels, side, side)
        if not x.isfinite().all():
            raise common.UserError(f"{a.checkpoint}: samples hold NaN or infinity; the checkpoint has diverged, or --cfg {a.cfg:g} is too large")
        return to_uint8(x).cpu().numpy()
    pixels, _ = common.fill(stage.out, "samples", shape, np.uint8, a.batch_size, compute)
    if common.rank() == 0:
        columns = min(10, len(y))
        rows = min(10, len(y) // columns)
        by_class = np.argsort(y, kind="stable") if model.num_classes > columns or a.labels != "balanced" else np.arange(len(y))
        common.save_grid(stage.out / "grid.png", pixels[by_class[:rows * columns]].reshape(rows, columns, *pixels.shape[1:]))


def open_vae(a, settings, device):
    """The Vae that decodes what the model draws: --vae, or the one named by the checkpoint's settings; None for a model of pixels."""
    if not settings.get("latents"):
        if a.vae:
            raise common.UserError(f"--vae {a.vae}: {a.checkpoint} is a model of pixels, there is nothing to decode; leave it out")
        return None
    a.vae = a.vae or settings.get("vae")
    if not a.vae:
        raise common.UserError(f"{a.checkpoint}: a model of latents that does not name its VAE; give --vae")
    from models.vae import load_vae
    with common.user_errors():
        vae = load_vae(a.vae, device)
    for what, mine, theirs in (("channels", vae.channels, settings["channels"]), ("scale", vae.scale, settings.get("latent_scale"))):
        if mine != theirs:
            raise common.UserError(f"{a.checkpoint}: made for latents with {what} = {theirs}, those of VAE {a.vae} have {mine}; give --vae the one it "
                                   "was trained with")
    return vae


def parse_args(argv=None):
    p = common.Parser(__doc__)
    p.add_argument("--checkpoint", required=True, help="checkpoint of train.py, or official weights")
    p.add_argument("--official", choices=("dit", "sit"), help="the checkpoint holds official weights of this kind")
    p.add_argument("--vae", help="decoder of a model of latents, an AutoencoderKL of diffusers by name or folder; default: its data's")
    p.add_argument("--out", required=True, help="folder to write to, usually the run's")
    p.add_argument("--num", type=common.count, default=1000, help="number of samples (50 000 for published figures)")
    p.add_argument("--sampler", choices=sorted({s for kind in SAMPLERS.values() for s in kind}), help="default: ddim for ddpm, heun for flow")
    p.add_argument("--steps", type=common.number(int, low=1, high=100_000), help="sampler steps; default 50 for ddpm, 25 for flow (heun: 2 evaluations each)")
    p.add_argument("--cfg", type=common.number(low=0, high=1000), default=1.0, help="guidance: v = v_null + cfg (v_cond - v_null); 1 = none")
    p.add_argument("--cfg-interval", type=common.number(low=0, high=1), nargs=2, default=(0.0, 1.0), metavar=("LO", "HI"),
                   help="times (0 data, 1 noise) where guidance acts")
    p.add_argument("--eta", type=common.number(low=0, high=1), default=0.0, help="ddim: 0 deterministic, 1 as random as DDPM")
    p.add_argument("--variance", choices=("beta", "beta-tilde"), default="beta", help="ancestral: variance of a step")
    p.add_argument("--labels", default="balanced", help="balanced, random, or a .npy of int64 labels")
    p.add_argument("--batch-size", type=common.batch_type, default=256, help="samples at a time, over all processes")
    p.add_argument("--amp", choices=common.AMP, default="none", help="precision of the network")
    p.add_argument("--npz", action="store_true", help="also write samples.npz for ADM's evaluator")
    p.add_argument("--seed", type=common.seed_type, default=0, help="sample i depends on (seed, i) alone")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--overwrite", action="store_true", help="draw again where other samples stand")
    return p.parse_args(argv)


@common.command
def main(argv=None):
    a = parse_args(argv)
    device = common.get_device(a.device)
    state, model, process = common.open_checkpoint(a.checkpoint, a.official)
    settings = state["args"]
    a.sampler = a.sampler or DEFAULT_SAMPLER[process.name][0]
    a.steps = a.steps or DEFAULT_SAMPLER[process.name][1]
    if a.sampler not in SAMPLERS[process.name]:
        raise common.UserError(f"--sampler {a.sampler}: {a.checkpoint} is a {process.name} model; choose one of {', '.join(SAMPLERS[process.name])}")
    if a.sampler in ("ancestral", "ddim") and a.steps > process.T:
        raise common.UserError(f"--steps {a.steps}: {a.sampler} has the {process.T} steps of {a.checkpoint} at most; ask for no more")
    if a.cfg != 1 and settings.get("label_drop") == 0:
        raise common.UserError(f"--cfg {a.cfg:g}: {a.checkpoint} was trained without label dropout and knows no null class to guide from; use --cfg 1")
    if a.cfg_interval[0] > a.cfg_interval[1]:
        raise common.UserError(f"--cfg-interval {a.cfg_interval[0]:g} {a.cfg_interval[1]:g}: the first must not be larger; 0 is data, 1 is noise")
    vae = open_vae(a, settings, device)
    side, channels = (model.size * vae.factor, 3) if vae else (model.size, model.channels)
    shape, out = (a.num, side, side, channels), Path(a.out)
    if not ((out / "samples.npy").exists() or (out / "samples.part.npy").exists()):           # from the first row on the space is reserved
        common.need_disk(out, math.prod(shape))
    y = make_labels(a.labels, a.num, model.num_classes, a.seed)
    outputs = ["samples.npy", "sample_labels.npy"] + ["samples.npz"] * a.npz
    labels = None if a.labels in ("balanced", "random") else a.labels
    stage = common.Stage("sample", a, {"checkpoint": a.checkpoint, "labels": labels}, outputs, ("batch_size", "npz"),
                         stale=("samples*.np[yz]", "grid.png"), scraps=("samples.seconds.json",)).__enter__()
    if stage.done:
        return
    if common.rank() == 0:
        common.save_npy(stage.out / "sample_labels.npy", y)
    if not common.from_rank0(lambda: all((stage.out / name).exists() for name in ("samples.npy", "grid.png"))):      # else --npz was asked for later
        common.log(f"writing {math.prod(shape) / 2**20:,.1f} MB of samples into {stage.out}")
        draw(a, model.to(device, memory_format=torch.channels_last), process, y, shape, device, stage, vae, settings["latent_scale"] if vae else None)
    if a.npz and common.rank() == 0:
        with common.atomic(stage.out / "samples.npz") as tmp, open(tmp, "wb") as f:
            np.savez(f, arr_0=np.load(stage.out / "samples.npy", mmap_mode="r"), arr_1=y)
    stage.finish(step=state.get("step"), data_sha256=settings.get("data_sha256"), data=settings.get("data"))


if __name__ == "__main__":
    main()
