"""Stage 3: D2C, choose few images by difficulty and attach text and visual information to them (Huang et al. 2025, arXiv 2507.05914).

Select  s(x, y) = mean over t of ||target - model(x_t, t, y)||^2 under a frozen class-conditional diffusion model (Eq. 7; low = easy): T = 10 fixed
        times, the same noise for every image, the model's own target. Per class, sorted from easy to hard, the ranks {0, k, 2k, ...} are taken.
Attach  text tokens of "a photo of a {class}" for every class (ImageNet's n01440764 is read as "tench"), and the visual tokens of a frozen encoder for every kept image.
Before anyone trains it prints how far the ranking repeats under other noise, and FD(subset -> full set) beside that of random subsets.

--interval auto  k = max(1, 3 n_c // (4 IPC)), IPC = --per-class, n_c images in the class: its hardest quarter is left out. The paper's ImageNet
                 recipe is 96, 16 or 10 for 10, 50 or 100 images per class. span: the widest k that fits; no k goes beyond that.
--select random  the images that prune.py --score random takes with the same seed. all: everything (with dinov2_vitb14: the REPA baseline).

Reads   DATA/                  images.npy or latents.npy (the posterior mean), labels.npy, classes.txt
        --reference CKPT       diffusion model that scores, of train.py or --official dit|sit;  --difficulty FILE  float (N,), made earlier
        --indices keep.npy     int64 (M,), instead of selecting
        --images DIR           where DATA has latents only: a data folder with the pixels of these M images, for --visual. Select first (--visual none),
                               then python data.py SOURCE --indices OUT/keep.npy --out DIR, then attach with --indices OUT/keep.npy --images DIR
Writes  OUT/keep.npy           int64 (M,), sorted;  OUT/difficulty.npy float32 (N,);  OUT/difficulty.png, OUT/montage.png (easy, middle, hard)
        OUT/text.npy           float16 (K, L, d);  OUT/text_mask.npy bool (K, L)
        OUT/visual.npy         float16 (M, T, d), row j belongs to keep[j]; (M, 2, T, d) with --flips, the mirrored image second
        DATA/scratch.pt        where --judge scratch or --visual scratch finds none

    python attach.py --data data/digits --reference runs/digits/full/last.pt --per-class 15 --visual ddae --out runs/digits/d2c/attach
"""
import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import common
from models import encoders
from models.conditioning import PROMPT, class_words, mean_token_cosine, minilm_tokens, text_tokens
from models.diffusion import diffusion_loss, to_pixels
from models.metrics import frechet_distance, gaussian_stats

SELECT = ("interval", "easy", "hard", "medium", "random", "all")
OUTPUTS = ("keep.npy", "difficulty.npy", "difficulty.png", "montage.png", "text.npy", "text_mask.npy", "visual.npy")
SCRAPS = ("judge.npy", "*.seconds.json", "*.part.npy", "*.done.npy")  # of common.fill, for a resume


# ---------------------------------------------------------------------------------------------- Select
@torch.no_grad()
def difficulty_scores(model, process, x, y, eps, ts):
    """s = (1/|T|) sum_t ||target - model(x_t, t, y)||^2 / d, float32 (n,), low = easy (D2C, Eq. 7 with the sign of its Algorithm 2).

    x (n, C, H, W); y (n,); ts (T,) in [0, 1); eps (T, C, H, W), one noise per time for ALL images: so the ranking repeats better than with a noise
    per image. One conditional pass, no guidance.
    """
    s = torch.zeros(len(x), device=x.device)
    for t, e in zip(ts, eps):
        s += diffusion_loss(process, model, x, t.expand(len(x)), e.expand_as(x), y)           # (n,) pixel means
    return s / len(ts)


def stratified_times(T=10):
    """t_j = (j + 1/2) / T; a ddpm model sees its indices 50, 150, ..., 950."""
    return (torch.arange(T) + 0.5) / T


def interval_of(n, m, interval):
    """k for m of n images of a class: an integer, 'auto' or 'span', never so wide that the quota is not filled."""
    widest = int((n - 1) // (m - 1)) if m > 1 else 1
    return widest if interval == "span" else min(widest, max(1, int(3 * n // (4 * m))) if interval == "auto" else interval)


def select_ranks(n, m, how, interval="auto"):
    """Ranks (m,) taken of n images of a class sorted from easy to hard (D2C, section 3.2)."""
    if how == "interval":
        return np.arange(m) * interval_of(n, m, interval)
    return np.arange(m) + {"easy": 0, "medium": (n - m) // 2, "hard": n - m}[how]


def by_class(labels, num_classes):
    """[rows (n_c,) of class c, ascending]; one sort, not a pass over all labels per class."""
    return np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels, minlength=num_classes))[:-1])


def select(s, labels, num_classes, per_class, how, interval="auto"):
    """Sorted indices of min(per_class, n_c) images of each class c by the score s (N,), ties by index. how 'random': s is then a random number."""
    keep = []
    for idx in by_class(labels, num_classes):
        order, m = idx[np.argsort(s[idx], kind="stable")], min(per_class, len(idx))           # from easy to hard
        keep.append(order[select_ranks(len(order), m, "hard" if how == "random" else how, interval)])
    return np.sort(np.concatenate(keep))


def repeat_correlation(s, again, labels):
    """Spearman correlation of two scorings within a class, on which the selection depends: mean over the classes of 3 images or more, or None."""
    from scipy.stats import spearmanr
    groups = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    r = [spearmanr(s[g], again[g]).statistic for g in groups if len(g) > 2]
    return float(np.nanmean(r)) if len(r) and not np.isnan(r).all() else None


# ---------------------------------------------------------------------------------------------- inputs
def load_reference(path, d, official=None):
    """(model, process, latent scale or None) of a checkpoint that fits the data folder. Official weights ('dit', 'sit') name no classes: theirs are
    taken to be in the order of the folder."""
    state, model, process = common.open_checkpoint(path, official)
    args, want, has, scale = state["args"], (model.channels, model.size, model.size), {}, None            # (C, H, W)
    if d.images is not None:
        has["images"] = (d.images.shape[3], *d.images.shape[1:3])
    if d.latents is not None:
        has["latents"] = (d.latents.shape[1] // 2, *d.latents.shape[2:])
    if want not in has.values():
        raise common.UserError(f"{path}: a model of {want}, but {d.folder} has {' and '.join(f'{k} {v}' for k, v in has.items())}; use another")
    if model.num_classes != d.num_classes:
        raise common.UserError(f"{path}: a model of {model.num_classes} classes, but {d.folder} has {d.num_classes}; use another checkpoint")
    if want == has.get("latents"):
        scale = common.load_json(d.folder / "latents.json", "the description of the latents")["scale"]
        if args.get("latent_scale") not in (None, scale):
            raise common.UserError(f"{path}: was trained on latents x {args['latent_scale']}, {d.folder / 'latents.json'} says {scale}: encode anew")
    if args.get("classes") not in (None, d.classes):
        common.log(f"attach.py: warning: {path} names its classes otherwise ({args['classes'][0]!r} ..., not {d.classes[0]!r} ...)")
    if not all(p.isfinite().all() for p in model.parameters()):
        raise common.UserError(f"{path}: its weights hold NaN or infinity; use a checkpoint of a run that did not diverge")
    return model, process, scale


def check_inputs(a):
    """Everything that can be checked before the first file is written; what is big or slow to load comes later."""
    common.get_device(a.device)
    d = common.open_data(a.data, pixels=False)
    i = SimpleNamespace(data=d, reference=None, scores=None, keep=None, text=None, earlier={})
    sizes = np.bincount(d.labels, minlength=d.num_classes)
    least = int(np.argmin(sizes))
    if not sizes[least]:
        raise common.UserError(f"{a.data}: class {d.classes[least]!r} has no image; make the folder again without it")
    if a.per_class and sizes[least] < a.per_class and not a.allow_short:
        raise common.UserError(f"--per-class {a.per_class}: class {d.classes[least]!r} has only {sizes[least]} images; lower it, or --allow-short")
    if d.images is None and (a.judge != "none" or a.visual != "none" and not a.images):
        raise common.UserError(f"{a.data}: has no images.npy, only latents; use --judge none, and --visual none or --images (see --help)")
    if d.num_classes < 2 and "scratch" in (a.visual, a.judge):
        raise common.UserError(f"{a.data}: has one class only, but the encoder scratch is a classifier; use --judge none or another encoder")
    if a.indices:
        i.keep = common.load_indices(a.indices, len(d.labels), d.labels, d.num_classes)
        common.check_origin(a.indices, d)
    i.pixels, i.rows = (pixels_of(a.images, d, i.keep), np.arange(len(i.keep))) if a.images else (d, None)
    if a.difficulty:
        with np.errstate(over="ignore"):                              # what float32 does not hold is refused in the next line
            i.scores = np.array(common.load_npy(a.difficulty, f"difficulty, float (N = {len(d.labels)},)", (len(d.labels),), "f"), dtype=np.float32)
        common.check_finite(i.scores, a.difficulty, "difficulty")
        if (record := a.difficulty.with_name("attach.args.json")).is_file():                  # what it cost when it was made still counts
            i.earlier = common.load_record(record)
            common.check_origin(a.difficulty, d)
    elif a.scoring:
        i.reference = load_reference(a.reference, d, a.official)
    with common.user_errors():
        i.text = minilm_tokens(d.classes) if a.text == "minilm" else text_file(Path(a.text), d) if a.text.endswith(".npy") else None
    return i


def pixels_of(folder, d, keep):
    """The data folder whose image j is image keep[j] of d, as the names in both files.txt tell."""
    pixels = common.open_data(folder)
    names = [common.load_lines(f / "files.txt") for f in (d.folder, pixels.folder)]
    if len(names[0]) != len(d.labels) or names[1] != [names[0][j] for j in keep] or not np.array_equal(pixels.labels, d.labels[keep]):
        raise common.UserError(f"{folder}: its images are not the {len(keep)} of --indices, in their order; make it with: python data.py "
                               f"{d.info.get('source', 'SOURCE')} --indices keep.npy --out {folder}")
    return pixels


def half(tokens, where):
    """float16, refused where that does not hold the numbers."""
    with np.errstate(over="ignore"):
        out = np.asarray(tokens).astype(np.float16)
    common.check_finite(out, where, "the text tokens, as float16,")
    return out


def text_file(path, d):
    """Tokens (K, L, d) of a file, and the mask (K, L) of FILE_mask.npy beside it; without it every token counts."""
    tokens = np.array(common.load_npy(path, f"text tokens, float (K = {d.num_classes}, L, d)", (d.num_classes, None, None), "f"))
    if 0 in tokens.shape:
        raise common.UserError(f"{path}: shape {tokens.shape}: no token at all; text tokens must be (K, L, d)")
    mask, beside = np.ones(tokens.shape[:2], bool), path.with_name(f"{path.stem}_mask.npy")
    if beside.exists():
        mask = np.array(common.load_npy(beside, f"text mask, bool {tokens.shape[:2]}", tokens.shape[:2], "b"))
        if not mask.any(1).all():
            raise common.UserError(f"{beside}: masks every token of class {d.classes[int(np.argmin(mask.any(1)))]!r}; each class needs one")
    return tokens, mask


# ---------------------------------------------------------------------------------------------- the work
def score(a, i, out, device, most=2000):
    """difficulty.npy, its seconds, and the repeat correlation on at most 20 classes and `most` images with other noise."""
    d, (model, process, scale) = i.data, i.reference
    model, ts = model.to(device), stratified_times().to(device)
    draws = [torch.randn(len(ts), model.channels, model.size, model.size, generator=common.generator(a.seed, "difficulty", r)).to(device)
             for r in (0, 1)]                                         # (T, C, H, W) each

    def scores_of(rows, eps):
        if scale is None:
            x = to_pixels(torch.from_numpy(np.array(d.images[rows]))).to(device)
        else:
            x = scale * torch.from_numpy(np.array(d.latents[rows])).to(device).float().chunk(2, dim=1)[0]      # the posterior's mean
        with common.autocast(device, a.amp):
            s = difficulty_scores(model, process, x, torch.from_numpy(d.labels[rows]).to(device), eps, ts).cpu().numpy()
        if not np.isfinite(s).all():
            bad = rows[int(np.argmin(np.isfinite(s)))]
            raise common.UserError(f"{a.reference}: difficulty of image {bad} is not finite; use --amp none or another checkpoint")
        return s
    s, seconds = common.fill(out, "difficulty", (len(d.labels),), np.float32, a.batch_size, lambda rows: scores_of(rows, draws[0]))

    def repeats():
        rng = np.random.default_rng(a.seed)
        classes = rng.permutation(d.num_classes)[:20]
        some = np.sort(np.concatenate([rng.permutation(np.flatnonzero(d.labels == c))[:most // len(classes)] for c in classes]))
        again = np.concatenate([scores_of(some[k:k + a.batch_size], draws[1]) for k in range(0, len(some), a.batch_size)])
        return repeat_correlation(s[some], again, d.labels[some])
    return np.array(s), seconds, common.from_rank0(repeats)


def subset_distance(a, d, enc, keep, out, draws=3):
    """FD(subset -> full set) under the judge, and of `draws` random subsets with as many images of each class: (float, list of floats)."""
    def features(rows):
        with common.user_errors():
            return encoders.extract(enc, d.images, batch_size=len(rows), rows=rows)
    z, _ = common.fill(out, "judge", (len(d.labels), enc.width), np.float32, a.batch_size, features)

    def distances():
        groups, sizes = by_class(d.labels, d.num_classes), np.bincount(d.labels[keep], minlength=d.num_classes)
        full, rng = gaussian_stats(z), np.random.default_rng(a.seed)
        picks = [keep] + [np.sort(np.concatenate([rng.choice(g, m, replace=False) for g, m in zip(groups, sizes)])) for _ in range(draws)]
        return [frechet_distance(*gaussian_stats(z, index=p), *full) for p in picks]
    fd, *random = common.from_rank0(distances)
    return fd, random


def pictures(out, d, s, keep, title, most=12, side=4):
    """difficulty.png: histogram per class, the images taken marked. montage.png: a row per class, its easiest, middle and hardest `side` images."""
    from matplotlib.figure import Figure
    shown = np.unique(np.linspace(0, d.num_classes - 1, min(most, d.num_classes)).astype(int))
    across = min(4, len(shown))
    down, rows = math.ceil(len(shown) / across), []
    fig = Figure(figsize=(3 * across, 2 * down + 0.6), layout="constrained")
    for j, c in enumerate(shown):
        ax = fig.add_subplot(down, across, j + 1)
        n, taken = (d.labels == c).sum(), s[keep[d.labels[keep] == c]]
        ax.hist(s[d.labels == c], bins=40, color="C7")
        ax.plot(taken, np.zeros(len(taken)), "|", color="C3", markersize=14, clip_on=False)
        ax.set_title(f"{d.classes[c]}: {len(taken)} of {n}", fontsize=8)
    fig.suptitle(title)
    with common.atomic(out / "difficulty.png") as tmp:
        fig.savefig(tmp, dpi=110)
    if d.images is None:
        return
    step = max(1, d.images.shape[1] // 96)
    for c in shown:
        order = np.flatnonzero(d.labels == c)[np.argsort(s[d.labels == c], kind="stable")]
        for how in ("easy", "medium", "hard"):
            part = np.full((side, *d.images[0, ::step, ::step].shape), 255, np.uint8)         # stays white where a class is too small
            ranks = select_ranks(len(order), min(side, len(order)), how)
            part[:len(ranks)] = d.images[np.asarray(order[ranks]), ::step, ::step]
            rows.append(part)
    common.save_grid(out / "montage.png", np.stack(rows).reshape(len(shown), 3 * side, *rows[0].shape[1:]))


def attach_visual(a, d, enc, keep, out):
    """visual.npy: patch tokens of the images `keep` of d, and what an alignment to them has to beat."""
    with common.user_errors():
        T, width = enc.tokens(torch.from_numpy(np.array(d.images[keep[:1]])).to(enc.device)).shape[1:]
    shape = (len(keep), *[2] * a.flips, T, width)
    common.log(f"attach.py: writing {2 * math.prod(shape) / 1e6:,.1f} MB of visual tokens {shape} of {enc.name}")

    def tokens(rows):
        v = np.empty((len(rows), *shape[1:]), np.float16)
        with common.user_errors():                                    # more than float16 holds is refused there
            for j in range(1 + a.flips):
                encoders.extract(enc, d.images, batch_size=len(rows), kind="tokens", out=v[:, j] if a.flips else v, rows=keep[rows], flip=j == 1)
        return v
    v, seconds = common.fill(out, "visual", shape, np.float16, a.batch_size, tokens)
    some = np.unique(np.linspace(0, len(v) - 1, min(len(v), max(1, 2**26 // v[0].size))).astype(int))           # at most 256 MB as float32
    cosine = common.from_rank0(lambda: mean_token_cosine(v[some]))
    figures = {"seconds_visual": seconds, "visual_megabytes": round(v.nbytes / 1e6, 3), "mean_token_cosine": round(cosine, 4)}
    common.log(f"attach.py: visual tokens {v.shape}: {figures['visual_megabytes']:,} MB in {seconds:.1f} s; one constant vector reaches the cosine "
               f"{figures['mean_token_cosine']:.3f} on this grid (more on a coarser one): an alignment below that has learned nothing")
    return figures


def choose(a, i, s):
    """Kept indices (M,) sorted, by the scores s (N,) where they are needed, and how they were chosen, in words."""
    d = i.data
    if i.keep is not None:
        return i.keep, str(a.indices)
    if a.select == "all":
        return np.arange(len(d.labels)), "all"
    if a.select == "random":
        s = torch.rand(len(d.labels), dtype=torch.float64, generator=common.generator(a.seed, "random score")).numpy()
    keep = select(s, d.labels, d.num_classes, a.per_class, a.select, a.interval)
    if a.select != "interval":
        return keep, a.select
    ks = sorted(interval_of(n, min(n, a.per_class), a.interval) for n in np.bincount(d.labels))
    return keep, f"interval {a.interval}: k = {ks[0]}" + (f"..{ks[-1]}" if ks[0] < ks[-1] else "")


def attach(a, i, stage, device):
    """Encoders -> text -> difficulty -> kept indices -> distance of the subset -> visual tokens; returns the figures for attach.args.json."""
    d, out, main, s = i.data, stage.out, common.rank() == 0, i.scores
    judge = common.open_encoder(a.judge, d, device, a.judge_weights) if a.judge != "none" else None
    visual = common.open_encoder(a.visual, i.pixels, device, a.visual_weights) if a.visual != "none" else None
    aligned, selected = judge and visual and judge.identity == visual.identity, a.scoring and a.judge == "ddae" and a.judge_weights == a.reference
    if aligned or selected:
        common.log(f"attach.py: warning: circular judging: {a.judge} judges the subset and {'is aligned to' if aligned else 'selected it'} as well; "
                   "take another --judge for figures that are to be believed")
    figures = {k: i.earlier.get(k) for k in ("seconds_difficulty", "repeat_correlation")}
    if a.text != "none" and main:
        start = time.time()
        with common.user_errors():
            tokens, mask = i.text or text_tokens(a.text, [a.prompt.replace("{class}", c) for c in class_words(d.classes)], device)
        tokens = half(tokens, a.text)
        common.save_npy(out / "text_mask.npy", mask)
        common.save_npy(out / "text.npy", tokens)
        figures.update(seconds_text=round(time.time() - start, 3), text_shape=list(tokens.shape))
        common.log(f"attach.py: text tokens {tokens.shape} of {a.text}")
    if i.reference:
        s, figures["seconds_difficulty"], figures["repeat_correlation"] = score(a, i, out, device)
    elif s is not None and main:
        common.save_npy(out / "difficulty.npy", s)
    if s is not None and figures["repeat_correlation"] is not None:
        common.log(f"attach.py: difficulty {s.min():.4f} .. {s.max():.4f}, mean {s.mean():.4f}; within a class the ranking repeats under other noise "
                   f"at {figures['repeat_correlation']:.2f} (Spearman)")
    keep, how = common.from_rank0(lambda: choose(a, i, s))
    sizes = np.bincount(d.labels[keep])
    figures.update(kept=len(keep), chosen=how)
    common.log(f"attach.py: kept {len(keep)} of {len(d.labels)} images, per class {sizes.min()}..{sizes.max()} ({how})")
    if main:
        common.save_npy(out / "keep.npy", keep)
        if s is not None:
            pictures(out, d, s, keep, f"difficulty, low = easy; marked: taken ({how})")
    if judge and len(keep) > 1:
        fd, random = subset_distance(a, d, judge, keep, out)
        figures.update(fd_subset=fd, fd_random=random, judge=judge.identity)
        common.log(f"attach.py: FD ({a.judge}, {judge.width} wide) of the subset to the full set {fd:.4g}; of {len(random)} random subsets with as "
                   f"many images of each class {', '.join(f'{r:.4g}' for r in random)}")
    if visual:
        figures.update(attach_visual(a, i.pixels, visual, keep if i.rows is None else i.rows, out), visual=visual.identity)
    return figures


def interval_type(text):
    return text if text in ("auto", "span") else common.count(text)


def parse_args(argv=None):
    p = common.Parser(__doc__, epilog=f"encoders:\n{encoders.describe()}")
    p.add_argument("--data", type=Path, required=True, help="data folder of stage 0")
    p.add_argument("--out", type=Path, required=True, help="output folder")
    p.add_argument("--reference", type=Path, help="checkpoint of the diffusion model that scores, and whose maps --visual ddae attaches")
    p.add_argument("--official", choices=("dit", "sit"), help="--reference holds official weights of this kind; to be said, as names and shapes are "
                   "the same in both, but DiT predicts the noise and SiT a velocity in reversed time")
    p.add_argument("--difficulty", type=Path, help="difficulty.npy (N,) made earlier, instead of scoring")
    p.add_argument("--select", choices=SELECT, help="which images of each class; default interval")
    p.add_argument("--per-class", type=common.count, help="images per class (IPC)")
    p.add_argument("--interval", type=interval_type, help="every K-th rank from the easiest: a number, auto or span; default auto")
    p.add_argument("--allow-short", action="store_true", help="a class with fewer images than --per-class gives all it has")
    p.add_argument("--indices", type=Path, help="keep.npy: attach to these images instead of selecting")
    p.add_argument("--images", type=Path, help="data folder with the pixels of the --indices, where DATA has latents only")
    p.add_argument("--text", default="minilm", help="none, minilm (embedded), a T5 or CLIP text model by name or folder, or FILE.npy (K, L, d)")
    p.add_argument("--prompt", help=f"what a text model of transformers reads; default {PROMPT!r}")
    p.add_argument("--visual", choices=("none", *(k for k, v in encoders.ENCODERS.items() if v.tokens)), default="none",
                   help="encoder of the visual tokens (list below)")
    p.add_argument("--visual-weights", type=Path, help="its weights; for ddae a checkpoint, by default the reference")
    p.add_argument("--flips", action="store_true", help="store the tokens of the mirrored images too, so that train.py may mirror")
    p.add_argument("--judge", choices=("none", *encoders.ENCODERS), default="scratch", help="encoder of FD(subset -> full set)")
    p.add_argument("--judge-weights", type=Path, help="its weights")
    p.add_argument("--batch-size", type=common.batch_type, default=256, help="images at once, over all processes")
    p.add_argument("--amp", choices=common.AMP, default="none", help="precision of the scoring model")
    p.add_argument("--seed", type=common.seed_type, default=0, help="of the noise and of --select random")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--overwrite", action="store_true", help="make the output again although it stands")
    a = p.parse_args(argv)
    check_flags(a, p)
    return a


def check_flags(a, p):
    """Combinations that contradict each other, and the defaults that depend on others."""
    if a.indices and (a.select or a.per_class or a.interval or a.allow_short):
        p.error("--indices says which images to keep, so --select, --per-class, --interval and --allow-short would do nothing; leave them out")
    a.select = a.select or (None if a.indices else "interval")
    if a.select == "all" and a.per_class or a.select not in ("all", None) and not a.per_class:
        p.error(f"--select {a.select} {'keeps everything, leave --per-class out' if a.per_class else 'needs --per-class COUNT'}")
    if a.interval is not None and a.select != "interval":
        p.error(f"--interval belongs to --select interval, not to {a.select}")
    a.interval = a.interval or ("auto" if a.select == "interval" else None)
    a.scoring = a.select in ("interval", "easy", "medium", "hard")
    if a.scoring and not (a.reference or a.difficulty):
        p.error(f"--select {a.select} needs --reference CHECKPOINT, a diffusion model that scores, or --difficulty FILE")
    if a.reference and a.difficulty and (a.visual != "ddae" or a.visual_weights):
        p.error("--difficulty says how hard each image is, so --reference would not score; leave one out")
    if a.official and not a.reference:
        p.error(f"--official {a.official} says what --reference holds; give --reference CHECKPOINT, or leave it out")
    if a.official and a.visual == "ddae" and not a.visual_weights:
        p.error("--visual ddae takes its maps from a checkpoint of train.py, not from --official weights; give --visual-weights CHECKPOINT")
    if a.visual == "ddae" and not a.visual_weights:
        a.visual_weights = a.reference or p.error("--visual ddae needs --visual-weights CHECKPOINT or --reference CHECKPOINT")
    if a.judge == "ddae" and not a.judge_weights:
        p.error("--judge ddae needs --judge-weights CHECKPOINT")
    if a.images and (not a.indices or a.visual == "none"):
        p.error("--images holds the pixels of the images of --indices, for --visual; give both, or leave it out")
    if a.visual == "none" and (a.flips or a.visual_weights):
        p.error("--flips and --visual-weights do nothing with --visual none; leave them out, or name an encoder")
    if a.judge == "none" and a.judge_weights:
        p.error("--judge-weights does nothing with --judge none; leave it out")
    if a.prompt is not None and (a.text in ("none", "minilm") or a.text.endswith(".npy")):
        p.error(f"--prompt does nothing with --text {a.text}, whose tokens are made already; name a text model of transformers")
    a.prompt = a.prompt or PROMPT
    if "{class}" not in a.prompt:
        p.error(f"--prompt {a.prompt!r}: must hold {{class}}, or every class gets the same tokens")


@common.command
def main(argv=None):
    a = parse_args(argv)
    stood, i = a.out.exists(), check_inputs(a)
    if (a.out / "keep.npy").exists() and not (a.out / "attach.args.json").exists():
        raise common.UserError(f"{a.out}: holds the keep.npy of another stage; choose another --out")
    text = Path(a.text) if a.text.endswith(".npy") else None
    mask = text and text.with_name(f"{text.stem}_mask.npy")
    inputs = {"reference": a.reference, "difficulty": a.difficulty, "indices": a.indices, "visual_weights": a.visual_weights,
              "judge_weights": a.judge_weights, "text": text, "text_mask": mask if mask and mask.exists() else None}
    for name, path in inputs.items():
        if path and not path.is_file() and not (name == "judge_weights" and a.judge == "clip"):            # clip takes a folder
            raise common.UserError(f"{path}: no such file (--{name.replace('_', '-')}); give one")
    outputs = ["keep.npy", *["text.npy", "text_mask.npy"] * (a.text != "none"), *["visual.npy"] * (a.visual != "none"),
               *["difficulty.npy", "difficulty.png"] * (a.scoring or a.difficulty is not None)]
    stage = common.Stage("attach", a, {"data": i.data.info, "images": i.pixels.info if a.images else None,
                                        **{k: v for k, v in inputs.items() if v and v.is_file()}}, outputs,
                         ("batch_size", "scoring"), stale=OUTPUTS, scraps=SCRAPS).__enter__()
    try:
        if stage.done:
            return
        stage.finish(**attach(a, i, stage, common.get_device(a.device)))
    except common.UserError:                                          # found late (an encoder's weights): leave no half-made record
        if common.rank() == 0 and not stage.resuming:
            for path in (f for name in (*OUTPUTS, *SCRAPS, "attach.args.json") for f in stage.out.glob(name)):
                path.unlink()
            stood or stage.out.rmdir()
        raise
    finally:
        stage.__exit__(None, None, None)


if __name__ == "__main__":
    main()
