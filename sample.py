"""Stage 5: draw samples from a checkpoint, always from its EMA.

Sample i depends on (seed, i) alone: not on the batch size, the number of processes or where an interrupted call stopped.

Reads   CHECKPOINT           last.pt or step_*.pt of train.py; the architecture comes from the settings inside
Writes  OUT/samples.npy      uint8 (n, H, W, C);  OUT/sample_labels.npy int64 (n,);  OUT/grid.png;  with --npz OUT/samples.npz (arr_0, the ADM form)

    python sample.py --checkpoint runs/digits/full/last.pt --num 1000 --sampler heun --steps 12 --out runs/digits/full
Run the same command again after an interruption: what is there is kept.
"""
import numpy as np
import torch

import common
from models.diffusion import SAMPLERS, generate, to_uint8

DEFAULT_SAMPLER = {"ddpm": ("ddim", 50), "flow": ("heun", 25)}


def make_labels(spec, n, num_classes, seed):
    """(n,) int64. 'balanced': 0..K-1 in turn, so that any prefix is balanced; 'random': uniform, label i from (seed, i) alone; or a .npy file."""
    if spec == "balanced":
        return np.arange(n) % num_classes
    if spec == "random":
        return np.array([torch.randint(num_classes, (), generator=common.generator(seed, "label", i)).item() for i in range(n)], dtype=np.int64)
    y = np.array(common.load_npy(spec, f"labels, int64 ({n},)", (n,), "iu"), dtype=np.int64)
    if y.min() < 0 or y.max() > num_classes:
        raise common.UserError(f"{spec}: labels run {y.min()}..{y.max()}, but the model knows 0..{num_classes - 1} ({num_classes} = no class)")
    return y


def draw(a, model, process, y, device, stage):
    """Fill samples.part.npy; a flag per row is set after its pixels are on disk, so that nothing is drawn twice or left half-written."""
    n, shape = len(y), (model.size, model.size, model.channels)
    part, flags = stage.out / "samples.part.npy", stage.out / "samples.done.npy"
    if common.rank() == 0 and not (stage.resuming and part.exists() and flags.exists()):
        for path, s in ((flags, (n,)), (part, (n, *shape))):          # the flags first: zeros are always true
            with common.atomic(path) as tmp:
                np.lib.format.open_memmap(tmp, "w+", np.uint8, s).flush()
    common.barrier()
    pixels, done = (np.lib.format.open_memmap(f, "r+") for f in (part, flags))
    lo, hi = common.shard(n)
    todo = lo + np.flatnonzero(done[lo:hi] == 0)                      # (rows of this rank that are missing,)
    batch = max(1, a.batch_size // common.world())
    options = {"ancestral": {"variance": a.variance}, "ddim": {"eta": a.eta}}.get(a.sampler, {})
    if process.name == "ddpm":
        options["clip_x0"] = True
    bar = common.progress(total=hi - lo, initial=hi - lo - len(todo), desc="samples")
    for k in range(0, len(todo), batch):
        ids = todo[k:k + batch]
        with common.autocast(device, a.amp):
            x = generate(model, process, torch.from_numpy(y[ids]).to(device), [common.generator(a.seed, "sample", int(i)) for i in ids],
                         a.sampler, a.steps, a.cfg, a.cfg_interval, **options)
        if not x.isfinite().all():
            bar.close()
            raise common.UserError(f"{a.checkpoint}: samples hold NaN or infinity; the checkpoint has diverged, or --cfg {a.cfg:g} is too large")
        pixels[ids] = to_uint8(x).cpu().numpy()
        pixels.flush()
        done[ids] = 1
        done.flush()
        bar.update(len(ids))
    bar.close()
    common.barrier()
    if common.rank() == 0:
        common.save_npy(stage.out / "sample_labels.npy", y)
        columns = min(10, n)
        rows = min(10, n // columns)
        by_class = np.argsort(y, kind="stable") if model.num_classes > columns or a.labels != "balanced" else np.arange(n)
        common.save_grid(stage.out / "grid.png", np.asarray(pixels)[by_class[:rows * columns]].reshape(rows, columns, *shape))
        part.replace(stage.out / "samples.npy")
        flags.unlink()


def parse_args(argv=None):
    p = common.Parser(__doc__)
    p.add_argument("--checkpoint", required=True, help="checkpoint of train.py")
    p.add_argument("--out", required=True, help="folder to write to, usually the run's")
    p.add_argument("--num", type=common.count, default=1000, help="number of samples (50 000 for published figures)")
    p.add_argument("--sampler", choices=sorted({s for kind in SAMPLERS.values() for s in kind}), help="default: ddim for ddpm, heun for flow")
    p.add_argument("--steps", type=common.number(int, low=1, high=100_000), help="sampler steps; default 50 for ddpm, 25 for flow (heun: 2 evaluations each)")
    p.add_argument("--cfg", type=common.number(low=0, high=1000), default=1.0, help="guidance: v = v_null + cfg (v_cond - v_null); 1 = none")
    p.add_argument("--cfg-interval", type=common.number(low=0, high=1), nargs=2, default=(0.0, 1.0), metavar=("LO", "HI"), help="times (0 data, 1 noise) where guidance acts")
    p.add_argument("--eta", type=common.number(low=0, high=1), default=0.0, help="ddim: 0 deterministic, 1 as random as DDPM")
    p.add_argument("--variance", choices=("beta", "beta-tilde"), default="beta", help="ancestral: variance of a step")
    p.add_argument("--labels", default="balanced", help="balanced, random, or a .npy of int64 labels")
    p.add_argument("--batch-size", type=common.count, default=256, help="samples at a time, over all processes")
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
    state, model, process = common.open_checkpoint(a.checkpoint)
    a.sampler = a.sampler or DEFAULT_SAMPLER[process.name][0]
    a.steps = a.steps or DEFAULT_SAMPLER[process.name][1]
    if a.sampler not in SAMPLERS[process.name]:
        raise common.UserError(f"--sampler {a.sampler}: {a.checkpoint} is a {process.name} model; choose one of {', '.join(SAMPLERS[process.name])}")
    if state["args"]["latents"]:
        raise common.UserError(f"{a.checkpoint}: a model of latents; drawing from it needs a VAE decoder, which this version does not have")
    if a.cfg_interval[0] > a.cfg_interval[1]:
        raise common.UserError(f"--cfg-interval {a.cfg_interval[0]:g} {a.cfg_interval[1]:g}: the first must not be larger; 0 is data, 1 is noise")
    y = make_labels(a.labels, a.num, model.num_classes, a.seed)
    outputs = ["samples.npy", "sample_labels.npy"] + ["samples.npz"] * a.npz
    stage = common.Stage("sample", a.out, a, {"checkpoint": a.checkpoint}, outputs, ("batch_size", "npz"), a.overwrite)
    if stage.done:
        return
    if not stage.resuming and common.rank() == 0:                     # those of another call must never pass for this one's
        (stage.out / "samples.npy").unlink(missing_ok=True)
    common.barrier()
    if not (stage.resuming and (stage.out / "samples.npy").exists()):  # else --npz was asked for later
        common.log(f"writing {a.num * model.size**2 * model.channels / 2**20:,.1f} MB of samples into {stage.out}")
        draw(a, model.to(device), process, y, device, stage)
    if a.npz and common.rank() == 0:
        with common.atomic(stage.out / "samples.npz") as tmp, open(tmp, "wb") as f:
            np.savez(f, arr_0=np.load(stage.out / "samples.npy", mmap_mode="r"), arr_1=y)
    stage.finish(step=state["step"], data_sha256=state["args"]["data_sha256"], data=state["args"]["data"])


if __name__ == "__main__":
    main()
