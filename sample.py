"""Stage 5: draw samples from a checkpoint, always from its EMA.

Sample i depends on (seed, i) alone: not on the batch size, the number of processes or where an
interrupted call stopped. A model of latents draws latents, which the VAE that made its data decodes
(pip install diffusers).

Reads   CHECKPOINT         last.pt or step_*.pt of train.py, with the settings of its network. Or,
                           with --official dit|sit|mdt|repa, the published weights (Peebles & Xie
                           2023; Ma et al. 2024; Gao et al. 2023; Yu et al. 2025), whose learned
                           sigma is not used: see --variance
Writes  OUT/samples.npy    uint8 (n, H, W, C);  OUT/sample_labels.npy int64 (n,);  OUT/grid.png
        OUT/samples.npz    with --npz: arr_0 and arr_1, the form of ADM's evaluator
        OUT/png/           with --png flat: a file for each sample; classes: OUT/png-classes/
        DIR/unet or DIR/pytorch_lora_weights.safetensors with --export DIR, of Stable Diffusion
        With several --cfg each set is named by its guidance: samples_cfg1.5.npy, grid_cfg1.5.png,
        png_cfg1.5/. They share labels and start noise, so that only the guidance differs.

    python sample.py --checkpoint runs/digits/full/last.pt --num 1000 --sampler heun --steps 12 \\
        --out ex/samples
    python sample.py --checkpoint runs/digits/full/last.pt --cfg 1 1.25 1.5 2 --out ex/guidance
    python sample.py --checkpoint SiT-XL-2-256x256.pt --official sit --cfg 1.5 --sampler sde \\
        --steps 250 --batch-size 32 --out runs/official

Run the same command again after an interruption: what is there is kept.
"""
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import common
from models.conditioning import sides
from models.diffusion import SAMPLERS, sample_images, to_uint8
from models.official import OFFICIAL

# Sampler and steps where the flags are left out.
DEFAULT_SAMPLER = {"ddpm": ("ddim", 50), "flow": ("heun", 25)}


# ---------------------------------------------------------------------------- formulas
# The samplers and guidance: models/diffusion.py.


# ---------------------------------------------------------------------------- the work
def draw_samples(args, inputs, cfg, out, device):
    """OUT/samples.npy of one guidance, by every process its part. Returns a memory map of it."""
    model = inputs.model.to(device, memory_format=torch.channels_last)
    how = dict(sampler=args.sampler, steps=args.steps, cfg=cfg, eta=args.eta,
               cfg_interval=args.cfg_interval, cfg_power=args.cfg_power, variance=args.variance,
               cfg_channels=args.cfg_channels, time_grid=args.time_grid)
    name = inputs.names[cfg]
    common.log(f"writing {math.prod(inputs.shape) / 2**20:,.1f} MB of samples into "
               f"{out / name}.npy")

    def compute(rows):
        y = torch.from_numpy(inputs.labels[rows]).to(device)          # (b,)
        # A stream of its own for each sample.
        noise = [common.generator(args.seed, "sample", int(i)) for i in rows]
        with common.autocast(device, args.amp):
            # (b, C, H, W)
            x = sample_images(model, inputs.process, y, noise, how, inputs.vae, inputs.scale)
        common.need(x.isfinite().all(),
                    f"{args.checkpoint}: samples hold NaN or infinity; the checkpoint diverged, "
                    f"or --cfg {cfg:g} is too large")
        return to_uint8(x).cpu().numpy()                              # (b, H, W, C)
    pixels, _ = common.fill(out, name, inputs.shape, np.uint8, args.batch_size, compute)
    return pixels


def save_npz(path, pixels, labels):
    """The form of ADM's evaluator: arr_0 uint8 (n, H, W, 3), arr_1 int64 (n,)."""
    # It takes three channels, of grey samples three equal ones.
    pixels = np.broadcast_to(pixels, (*pixels.shape[:3], 3)) if pixels.shape[3] == 1 else pixels
    with common.atomic(path) as tmp, open(tmp, "wb") as f:
        np.savez(f, arr_0=pixels, arr_1=labels)


def save_pngs(folder, pixels, labels, form, classes):
    """A PNG for each sample, which pytorch-fid, clean-fid, torch-fidelity and ImageFolder read."""
    from PIL import Image
    # Under its name it is whole: a kill leaves the other one.
    half = folder.with_name(folder.name + ".part")
    shutil.rmtree(half, ignore_errors=True)
    # Numbered, so that programs that sort the folders by name keep the labels.
    width = len(str(max(labels)))
    for i, (image, k) in enumerate(zip(pixels, labels)):
        place = half
        if form == "classes":
            name = re.sub(r"[^\w\-. ]+", "_", classes[k] if k < len(classes) else "none")
            place = half / f"{k:0{width}d}_{name}"
        place.mkdir(parents=True, exist_ok=True)
        image = image[..., 0] if image.shape[2] == 1 else image
        Image.fromarray(image).save(place / f"{i:06d}.png")
    half.rename(folder)


def png_folder(name, form):
    """What the folder of pictures is called beside samples.npy of this name."""
    return name.replace("samples", "png") + ("-classes" if form == "classes" else "")


def save_first(path, pixels, labels, in_turn):
    """grid.png: up to ten rows of ten samples, sorted by class unless the classes come in turn."""
    # Fewer than ten samples make one row.
    columns = min(10, len(labels))
    rows = min(10, len(labels) // columns)
    order = np.arange(len(labels))                   # (n,)
    if not in_turn:
        # A row then shows a class, not ten of a thousand.
        order = np.argsort(labels, kind="stable")
    first = pixels[order[:rows * columns]]
    common.save_grid(path, first.reshape(rows, columns, *pixels.shape[1:]))


def draw_one(args, inputs, cfg, out, device):
    """All files of one guidance that are not there yet."""
    name = inputs.names[cfg]
    grid = out / f"{name.replace('samples', 'grid')}.png"
    # All may stand where --npz was asked for later.
    if not common.from_rank0(lambda: (out / f"{name}.npy").exists() and grid.exists()):
        if common.rank() == 0:
            # Pictures of other samples would pass for those of these.
            for form in ("flat", "classes"):
                shutil.rmtree(out / png_folder(name, form), ignore_errors=True)
        draw_samples(args, inputs, cfg, out, device)
    if common.rank() != 0:
        return
    pixels = np.load(out / f"{name}.npy", mmap_mode="r")
    if not grid.exists():
        in_turn = args.labels == "balanced" and inputs.model.num_classes <= 10
        save_first(grid, pixels, inputs.labels, in_turn)
    if args.npz and not (out / f"{name}.npz").exists():
        save_npz(out / f"{name}.npz", pixels, inputs.labels)
    folder = out / png_folder(name, args.png)
    if args.png and not folder.exists():
        save_pngs(folder, pixels, inputs.labels, args.png, inputs.settings.get("classes") or [])


# ---------------------------------------------------------------------------- inputs
def load_inputs(args, device):
    """All that the flags name, checked before anything is written; fills the flags left out."""
    state, model, process = common.open_checkpoint(args.checkpoint, args.official)
    settings = state["args"]
    sampler, steps = DEFAULT_SAMPLER[process.name]
    # The record shows what was drawn with, not that it was left out.
    args.sampler = args.sampler or sampler
    args.steps = args.steps or steps
    check_flags(args, process, settings)
    inputs = SimpleNamespace(model=model, process=process, settings=settings,
                             step=state.get("step"), vae=None, scale=None)
    height, width = sides(model.size)
    channels = model.channels
    if settings.get("latents"):
        inputs.vae = open_vae(args, settings, device)
        inputs.scale = settings["latent_scale"]
        # Decoded images: RGB, factor times as wide.
        height, width = height * inputs.vae.factor, width * inputs.vae.factor
        channels = 3
    inputs.shape = (args.num, height, width, channels)        # (n, H, W, C)
    inputs.names = common.sample_names(args.cfg)              # {guidance: name of its files}
    out = Path(args.out)
    # From the first row on the space of a file is reserved.
    missing = [name for name in inputs.names.values()
               if not ((out / f"{name}.npy").exists() or (out / f"{name}.part.npy").exists())]
    common.need_disk(out, len(missing) * math.prod(inputs.shape))
    inputs.files = {"checkpoint": args.checkpoint, "labels": None}
    if args.labels.endswith(".npy"):
        inputs.files["labels"] = args.labels
    inputs.labels = make_labels(args.labels, args.num, model.num_classes, args.seed,
                                settings.get("classes") or [])
    return inputs


def check_flags(args, process, settings):
    """Flags that the checkpoint cannot follow, or that contradict each other, are refused."""
    need = common.need
    known = SAMPLERS[process.name]
    need(args.sampler in known, f"--sampler {args.sampler}: {args.checkpoint} is a {process.name} "
                                f"model; choose one of {', '.join(known)}")
    need(args.sampler not in ("ancestral", "ddim") or args.steps <= process.T,
         f"--steps {args.steps}: {args.sampler} has the {process.T} steps of {args.checkpoint} at "
         "most; ask for no more")
    for cfg in common.sample_names(args.cfg):
        need(cfg == 1 or settings.get("label_drop") != 0,
             f"--cfg {cfg:g}: {args.checkpoint} was trained without label dropout and knows no "
             "null class to guide from; use --cfg 1")
    need(args.time_grid is None or process.name == "ddpm",
         f"--time-grid is of the ddpm samplers, and {args.checkpoint} is a {process.name} model; "
         "leave it out")
    need(args.cfg_channels is None or args.cfg_channels < settings.get("channels", 2**40),
         f"--cfg-channels {args.cfg_channels}: {args.checkpoint} has {settings.get('channels')} "
         "channels, all of which are guided then; leave it out")
    low, high = args.cfg_interval
    need(low <= high, f"--cfg-interval {low:g} {high:g}: the first must not be larger; 0 is data, "
                      "1 is noise")
    need(settings.get("latents") or not args.vae,
         f"--vae {args.vae}: {args.checkpoint} is a model of pixels, there is nothing to decode; "
         "leave it out")


def make_labels(spec, n, num_classes, seed, classes=()):
    """(n,) int64: balanced, random, those of a .npy file, or names and numbers in turn.

    K is no class. classes: the names of the checkpoint, where it knows them.
    """
    if spec == "balanced":
        # In turn, so that any prefix is balanced.
        return np.arange(n) % num_classes
    if spec == "random":
        # Label i comes from (seed, i) alone.
        own = [common.generator(seed, "label", i) for i in range(n)]
        return np.array([torch.randint(num_classes, (), generator=g).item() for g in own], np.int64)
    if not spec.endswith(".npy"):
        asked = named_labels(spec, num_classes, classes)              # (m,)
        return asked[np.arange(n) % len(asked)]
    labels = np.array(common.load_npy(spec, f"labels, int64 ({n},)", (n,), "iu"), np.int64)
    low, high = labels.min(), labels.max()
    common.need(low >= 0 and high <= num_classes,
                f"{spec}: labels run {low}..{high}, but the model knows 0..{num_classes - 1} "
                f"({num_classes} = no class); use labels of its classes")
    return labels


def named_labels(spec, num_classes, classes):
    """(m,) int64 of "cat, dog" or "3,3,7"; a name comes before a number."""
    known = {name.lower(): k for k, name in enumerate(classes)}
    known.update({name: k for k, name in enumerate(classes)})
    labels = []
    # A name may hold a comma itself, as ImageNet's do.
    for word in [spec] if spec.lower() in known else spec.split(","):
        word = word.strip()
        label = known.get(word, known.get(word.lower()))
        if label is None and word.isdecimal():
            label = int(word)
        some = ", ".join(classes[:6]) + (", ..." if len(classes) > 6 else "")
        common.need(label is not None and label <= num_classes,
                    f"--labels {spec}: {word!r} is no class; give balanced, random, a .npy file, "
                    f"numbers 0..{num_classes} ({num_classes} = no class), or names"
                    + (f" ({some})" if some else ", which this checkpoint does not hold"))
        labels.append(label)
    return np.array(labels, np.int64)


def open_vae(args, settings, device):
    """The Vae that decodes what the model draws: --vae, or the one that the checkpoint names."""
    from models.vae import load_vae
    args.vae = args.vae or settings.get("vae")
    common.need(args.vae, f"{args.checkpoint}: a model of latents that does not name its VAE; give "
                          "--vae")
    with common.user_errors():
        vae = load_vae(args.vae, device)
    wants = {"channels": settings["channels"], "scale": settings.get("latent_scale")}
    for what, value in wants.items():
        has = getattr(vae, what)
        common.need(has == value,
                    f"{args.checkpoint}: made for latents with {what} = {value}, those of VAE "
                    f"{args.vae} have {has}; give --vae the one it was trained with")
    return vae


# ---------------------------------------------------------------------------- command line
def parse_args(argv=None):
    p = common.Parser(__doc__)
    p.add_argument("--checkpoint", required=True, help="of train.py, or official weights")
    p.add_argument("--official", choices=OFFICIAL,
                   help="the checkpoint holds official weights of this kind")
    p.add_argument("--vae", help="decoder of a model of latents, an AutoencoderKL of diffusers by "
                                 "name or folder; default: its data's")
    p.add_argument("--out", help="folder to write to, usually the run's")
    p.add_argument("--export", metavar="DIR", help="Stable Diffusion: write DIR/unet, or the LoRA "
                   "file, as diffusers loads it, and draw nothing")
    p.add_argument("--num", type=common.count, default=1000,
                   help="number of samples (50 000 for published figures)")
    p.add_argument("--sampler", choices=sorted({s for kind in SAMPLERS.values() for s in kind}),
                   help="default: ddim for ddpm, heun for flow")
    p.add_argument("--steps", type=common.number(int, low=1, high=100_000),
                   help="default 50 for ddpm, 25 for flow (heun: 2 evaluations each)")
    p.add_argument("--cfg", type=common.number(low=0, high=1000), nargs="+", default=1.0,
                   help="guidance: v = v_null + cfg (v_cond - v_null); 1 = none. Of several the "
                        "first is the one that pictures and audit are of")
    p.add_argument("--cfg-interval", type=common.number(low=0, high=1), nargs=2, default=(0.0, 1.0),
                   metavar=("LO", "HI"), help="times (0 data, 1 noise) where guidance acts")
    p.add_argument("--cfg-power", type=common.number(above=0, high=100), metavar="S",
                   help="guidance grows from 1 at noise to --cfg at data, as MDT's does with 4")
    p.add_argument("--cfg-channels", type=common.count, metavar="C",
                   help="guide the first C channels alone: 3 is what DiT and SiT do with latents")
    p.add_argument("--time-grid", choices=("trailing", "linspace"),
                   help="times of the ddpm samplers: equal steps down from T (default), or from T "
                        "to 0 with both ends, as DiT and ADM have it")
    p.add_argument("--eta", type=common.number(low=0, high=1), default=0.0,
                   help="ddim: 0 deterministic, 1 as random as DDPM")
    p.add_argument("--variance", choices=("beta", "beta-tilde"), default="beta",
                   help="ancestral: variance of a step")
    p.add_argument("--labels", default="balanced", nargs="+",
                   help="balanced, random, a .npy of labels, or names or numbers of classes in "
                        "turn: cat dog; 3,3,7")
    p.add_argument("--batch-size", type=common.batch_type, default=256,
                   help="samples at a time, over all processes")
    p.add_argument("--amp", choices=common.AMP_CHOICES, default="none",
                   help="precision of the network; auto: the one that is fastest here")
    p.add_argument("--npz", action="store_true", help="also write samples.npz for ADM's evaluator")
    p.add_argument("--png", choices=("flat", "classes"),
                   help="also write each sample, as OUT/png/INDEX.png or OUT/png-classes/"
                        "CLASS/INDEX.png")
    common.add_run_flags(p, "draw again where other samples stand",
                         "sample i depends on (seed, i) alone")
    args = p.parse_args(argv)
    if isinstance(args.labels, list):
        # In the record a text, as it always was.
        args.labels = ",".join(args.labels)
    if bool(args.out) == bool(args.export):
        p.error("give --out FOLDER, to draw, or --export DIR")
    if isinstance(args.cfg, list):
        # 1.5 and 1.5000001 would share a file.
        if len(set(common.sample_names(args.cfg).values())) < len(args.cfg):
            p.error("--cfg: a guidance is named twice")
        # The record of a single guidance says what it always said.
        if len(args.cfg) == 1:
            args.cfg = args.cfg[0]
    return args


def export_network(args):
    """--export: the folder that diffusers loads, and nothing is drawn."""
    from models.sd import SD, export
    folder = Path(args.export)
    common.need(not folder.exists(), f"{folder}: is there already; choose another --export, or "
                                     "remove it")
    _, model, _ = common.open_checkpoint(args.checkpoint, args.official)
    common.need(isinstance(model, SD), f"--export {folder}: {args.checkpoint} holds no Stable "
                "Diffusion, and diffusers knows no other network of this kit; leave it out")
    if common.rank() == 0:
        export(model, folder)
        common.log(f"{folder}: its EMA, for diffusers")


@common.command
def main(argv=None):
    args = parse_args(argv)
    if args.export:
        return export_network(args)
    device = common.get_device(args.device)
    inputs = load_inputs(args, device)               # nothing is written yet
    hardware = common.settle_amp(args, device)       # the flags that it decided
    names = inputs.names.values()
    outputs = ["sample_labels.npy", *(f"{name}.npy" for name in names)]
    if args.npz:
        outputs += [f"{name}.npz" for name in names]
    if args.png:
        outputs += [png_folder(name, args.png) for name in names]
    with common.Stage("sample", args, inputs.files, outputs, free=["batch_size", "npz", "png"],
                      stale=["samples*.np[yz]", "grid*.png"],
                      scraps=["samples*.seconds.json"], open=hardware) as stage:
        if stage.done:
            return
        stage.save("sample_labels.npy", inputs.labels)
        for cfg in inputs.names:
            draw_one(args, inputs, cfg, stage.out, device)
        stage.finish(step=inputs.step, data_sha256=inputs.settings.get("data_sha256"),
                     data=inputs.settings.get("data"))


if __name__ == "__main__":
    main()
