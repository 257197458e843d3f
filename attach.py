"""Stage 3: D2C, choose few images by difficulty and attach text and visual information to them.

Huang et al. 2025, arXiv 2507.05914.
Select  s(x, y) = mean over t of ||target - model(x_t, t, y)||^2 under a frozen class-conditional
        diffusion model (Eq. 7; low = easy): T = 10 fixed times, the same noise for every image, the
        model's own target. Per class, from easy to hard, the ranks {0, k, 2k, ...} are taken.
Attach  text tokens of "a photo of a {class}" for every class (ImageNet's n01440764 is read as
        "tench"), and visual tokens of a frozen encoder for every kept image.
It prints how far the ranking repeats under other noise, and FD(subset -> full set) beside that of
random subsets, before anyone trains.

--interval auto  k = max(1, 3 n_c // (4 IPC)) for --per-class IPC of the n_c images of a class: its
                 hardest quarter is left out. The paper's ImageNet recipe is 96, 16 or 10 for 10, 50
                 or 100 images per class. span: the widest k that fits; no k goes beyond that.
--select random  the images of prune.py --score random with the same seed. all: everything.

Reads   DATA/              images.npy or latents.npy (the posterior mean), labels.npy, classes.txt
        --reference CKPT   diffusion model that scores; --difficulty FILE: float (N,), made earlier
        --indices keep.npy int64 (M,), instead of selecting
        --images DIR       for --visual where DATA has latents only: a data folder with the pixels
                           of the --indices, made with data.py SOURCE --indices keep.npy --out DIR
Writes  OUT/keep.npy       int64 (M,), sorted;  OUT/difficulty.npy float32 (N,)
        OUT/difficulty.png, OUT/montage.png: what was taken, from easy to hard
        OUT/text.npy       float16 (K, L, d);  OUT/text_mask.npy bool (K, L)
        OUT/visual.npy     float16 (M, T, d), row j belongs to keep[j]; with --flips (M, 2, T, d),
                           the mirrored image second

    python attach.py --data data/digits --reference runs/digits/full/last.pt --per-class 5 \\
        --visual ddae --out ex/attach
"""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import common

RANKED = ("interval", "easy", "hard", "medium")                          # by difficulty
SELECT = (*RANKED, "random", "all")
OUTPUTS = ("keep.npy", "difficulty.npy", "difficulty.png", "montage.png", "text.npy",
           "text_mask.npy", "visual.npy")
SCRAPS = ("judge.npy", "judge.part.npy", "judge.done.npy", "judge.seconds.json",
          "difficulty.seconds.json", "visual.seconds.json")


# --------------------------------------------------------------------------------------- formulas
@torch.no_grad()
def difficulty_scores(model, process, x, y, eps, ts):
    """s = (1/|T|) sum_t ||target - model(x_t, t, y)||^2 / d, float32 (n,), low = easy.

    D2C, Eq. 7, with the sign of its Algorithm 2. x (n, C, H, W); y (n,); ts (T,) in [0, 1); eps
    (T, C, H, W), one noise per time for ALL images: so the ranking repeats better than with a noise
    per image. One conditional pass, no guidance.
    """
    from models.diffusion import diffusion_loss
    s = torch.zeros(len(x), device=x.device)                                             # (n,)
    for t, e in zip(ts, eps):
        s += diffusion_loss(process, model, x, t.expand(len(x)), e.expand_as(x), y)      # means
    return s / len(ts)


def stratified_times(T=10):
    """t_j = (j + 1/2) / T; a ddpm model sees its indices 50, 150, ..., 950."""
    return (torch.arange(T) + 0.5) / T                                   # (T,)


def interval_of(n, m, interval):
    """k for m of n images of a class, never so wide that the quota is not filled."""
    widest = (n - 1) // (m - 1) if m > 1 else 1                          # (m - 1) k <= n - 1
    if interval == "span":
        return widest
    if interval == "auto":
        interval = max(1, 3 * n // (4 * m))
    return min(widest, interval)


def select_ranks(n, m, how, interval="auto"):
    """Ranks (m,) taken of n images of a class sorted from easy to hard (D2C, section 3.2)."""
    if how == "interval":
        return np.arange(m) * interval_of(n, m, interval)
    first = {"easy": 0, "medium": (n - m) // 2, "hard": n - m}[how]
    return first + np.arange(m)


def select(s, groups, per_class, how, interval="auto"):
    """Sorted indices of at most per_class images of each class by the score s (N,).

    groups: [rows (n_c,) of class c]. Ties go by the index.
    """
    keep = []                                                            # [(m_c,), ...]
    for rows in groups:
        order = rows[np.argsort(s[rows], kind="stable")]                 # from easy to hard
        m = min(per_class, len(rows))
        keep.append(order[select_ranks(len(rows), m, how, interval)])
    return np.sort(np.concatenate(keep))                                 # (M,)


def repeat_correlation(s, again, groups):
    """Spearman correlation of two scorings within a class, for only there do they select.

    The mean over classes of 3 images or more, or None. groups: [rows (n_c,) of class c].
    """
    from scipy.stats import spearmanr
    r = [spearmanr(s[rows], again[rows]).statistic for rows in groups if len(rows) > 2]
    # It is NaN where all scores of a class are equal.
    return float(np.nanmean(r)) if np.isfinite(r).any() else None


# --------------------------------------------------------------------------------------- the work
def attach_text(args, inputs, stage):
    """OUT/text.npy, OUT/text_mask.npy: tokens of a prompt for every class. Returns the figures."""
    if inputs.text is None:
        return {}
    tokens, mask, seconds = inputs.text                                  # (K, L, d), (K, L)
    stage.save("text_mask.npy", mask)
    stage.save("text.npy", tokens)
    common.log(f"attach.py: text tokens {tokens.shape} of {args.text}")
    return {"seconds_text": seconds, "text_shape": list(tokens.shape)}


def score_images(args, inputs, device, stage):
    """OUT/difficulty.npy: the scores (N,), or None where nothing asks for them, and the figures."""
    s = inputs.scores
    # What the file cost when it was made still counts.
    seconds = inputs.earlier.get("seconds_difficulty")
    repeats = inputs.earlier.get("repeat_correlation")
    if inputs.reference:
        model = inputs.reference[0]
        from models.conditioning import sides
        shape = (len(stratified_times()), model.channels, *sides(model.size))
        noise, other = (torch.randn(shape, generator=common.generator(args.seed, "difficulty", r))
                        for r in (0, 1))                                 # (T, C, H, W) each
        s, seconds = common.fill(stage.out, "difficulty", inputs.data.labels.shape, np.float32,
                                 args.batch_size,
                                 lambda rows: score_rows(args, inputs, device, rows, noise))
        repeats = common.from_rank0(lambda: score_again(args, inputs, device, s, other))
    elif s is not None:
        stage.save("difficulty.npy", s)
    if repeats is not None:
        common.log(f"attach.py: difficulty {s.min():.4f} .. {s.max():.4f}, mean {s.mean():.4f}; "
                   "within a class the ranking repeats under other noise at "
                   f"{repeats:.2f} (Spearman)")
    return s, {"seconds_difficulty": seconds, "repeat_correlation": repeats}


def score_rows(args, inputs, device, rows, eps):
    """The difficulty (b,) of these images under the noise eps (T, C, H, W)."""
    from models.diffusion import to_pixels
    model, process, scale = inputs.reference
    data = inputs.data
    if scale is None:
        x = to_pixels(torch.from_numpy(np.array(data.images[rows]))).to(device)  # (b, C, H, W)
    else:
        z = torch.from_numpy(np.array(data.latents[rows])).to(device).float()    # (b, 2c, h, w)
        x = scale * z.chunk(2, dim=1)[0]                                 # the posterior's mean
    y = torch.from_numpy(data.labels[rows]).to(device)                   # (b,)
    ts = stratified_times().to(device)
    with common.autocast(device, args.amp):
        s = difficulty_scores(model.to(device), process, x, y, eps.to(device), ts).cpu().numpy()
    finite = np.isfinite(s)                                              # (b,)
    common.need(finite.all(), f"{args.reference}: difficulty of image {rows[np.argmin(finite)]} is "
                              "not finite; use --amp none or another checkpoint")
    return s


def score_again(args, inputs, device, s, eps, most=2000):
    """How far the scores s (N,) repeat under eps, on at most 20 classes and `most` images."""
    groups = common.rows_by_class(inputs.data.labels, inputs.data.num_classes)
    rng = np.random.default_rng(args.seed)
    # The order of these draws is part of the result.
    classes = rng.permutation(len(groups))[:20]
    some = {c: np.sort(rng.permutation(groups[c])[:most // len(classes)]) for c in classes}
    rows = np.sort(np.concatenate(list(some.values())))                  # of all these classes
    again = np.empty(len(s), np.float32)                                 # (N,), filled at `rows`
    for lo in range(0, len(rows), args.batch_size):
        part = rows[lo:lo + args.batch_size]                             # (b,)
        again[part] = score_rows(args, inputs, device, part, eps)
    return repeat_correlation(s, again, [some[c] for c in sorted(some)])


def choose(args, inputs, s):
    """Kept indices (M,) sorted, and how they were chosen, in words. s (N,): where it is needed."""
    if args.indices:
        return inputs.keep, str(args.indices)
    n = len(inputs.data.labels)
    if args.select == "all":
        return np.arange(n), "all"                                       # (N,)
    groups = common.rows_by_class(inputs.data.labels, inputs.data.num_classes)
    if args.select == "random":
        # The highest numbers of each class, as prune.py takes them.
        numbers = common.random_scores(args.seed, n)                     # (N,)
        highest = [rows[np.argsort(-numbers[rows])[:args.per_class]] for rows in groups]
        return np.sort(np.concatenate(highest)), "random"
    keep = select(s, groups, args.per_class, args.select, args.interval)
    if args.select != "interval":
        return keep, args.select
    # Larger classes have wider intervals.
    ks = [interval_of(len(g), min(len(g), args.per_class), args.interval) for g in groups]
    ks = sorted({min(ks), max(ks)})
    return keep, f"interval {args.interval}: k = {'..'.join(map(str, ks))}"


def draw_selection(data, s, keep, how, out):
    """difficulty.png: a histogram per class, the kept marked. montage.png: easy, middle, hard."""
    def ranks_of(n):
        return [select_ranks(n, min(4, n), part) for part in ("easy", "medium", "hard")]

    title = f"difficulty, low = easy; marked: taken ({how})"
    width = 3 * min(4, data.num_classes)                                 # inches
    common.class_histograms(out / "difficulty.png", data, s, keep, title, width, 2)
    if data.images is not None:
        common.rank_montage(out / "montage.png", data, s, ranks_of, 4)


def subset_distance(args, inputs, keep, out):
    """FD(subset -> full set) under the judge, and that of random subsets. Returns the figures."""
    from models.metrics import subset_frechet
    judge = inputs.judge
    z, _ = common.fill_features(out, "judge", judge, inputs.data, args.batch_size)       # (N, D)
    groups = common.rows_by_class(inputs.data.labels, inputs.data.num_classes)
    # Every process encodes, the first one measures.
    fd, random = common.from_rank0(lambda: subset_frechet(z, keep, groups, args.seed))
    mean, sd = np.mean(random), np.std(random, ddof=1)
    common.log(f"attach.py: FD ({args.judge}, {judge.width} wide) of the subset to the full set "
               f"{fd:.4g}; of {len(random)} random subsets with as many of each class "
               f"{mean:.4g} +- {sd:.2g}")
    return {"fd_subset": fd, "fd_random": random, "judge": judge.identity}


def attach_visual(args, inputs, keep, out):
    """OUT/visual.npy: patch tokens of the kept images; and what an alignment has to beat."""
    from models.conditioning import mean_token_cosine
    rows = np.arange(len(keep)) if args.images else keep                 # of the folder of pixels
    v, seconds = common.fill_tokens(out, "visual", inputs.visual, inputs.pixels.images, rows,
                                    args.flips, args.batch_size)
    most = max(1, 2**26 // v[0].size)                                    # 256 MB as float32
    some = np.unique(np.linspace(0, len(v) - 1, min(len(v), most)).astype(int))
    cosine = common.from_rank0(lambda: mean_token_cosine(v[some]))       # of one vector for all
    megabytes = round(v.nbytes / 1e6, 3)
    common.log(f"attach.py: visual tokens {v.shape}: {megabytes:,} MB in {seconds:.1f} s; one "
               f"constant vector reaches the cosine {cosine:.3f} on this grid (more on a coarser "
               "one): an alignment below that has learned nothing")
    return {"seconds_visual": seconds, "visual_megabytes": megabytes,
            "mean_token_cosine": round(cosine, 4), "visual": inputs.visual.identity}


# ----------------------------------------------------------------------------------------- inputs
def load_inputs(args):
    """What the flags name, checked; what is slow to load comes in load_networks().

    keep (M,): of --indices; pixels: the data folder that the visual encoder reads; scores (N,): of
    --difficulty, and `earlier`: the record of the call that made them.
    """
    data = common.open_data(args.data, pixels=False)
    least = None if args.allow_short else args.per_class
    common.check_classes(data, least, "lower it, or --allow-short")
    blind = args.judge == "none" and (args.visual == "none" or args.images)
    common.need(data.images is not None or blind,
                f"{args.data}: has no images.npy, only latents; use --judge none, and --visual "
                "none or --images (see --help)")
    common.need(data.num_classes > 1 or "scratch" not in (args.visual, args.judge),
                f"{args.data}: has one class only, but the encoder scratch is a classifier; use "
                "--judge none or another encoder")
    common.need((args.out / "attach.args.json").exists() or not (args.out / "keep.npy").exists(),
                f"{args.out}: holds the keep.npy of another stage; choose another --out")
    inputs = SimpleNamespace(data=data, pixels=data, keep=None, scores=None, earlier={},
                             reference=None, text=None, judge=None, visual=None)
    if args.indices:
        n = len(data.labels)
        inputs.keep = common.load_indices(args.indices, n, data.labels, data.num_classes)
        common.check_origin(args.indices, data)
    if args.images:
        inputs.pixels = common.open_kept_images(args.images, data, inputs.keep)
    if args.difficulty:
        inputs.scores = common.load_scores(args.difficulty, data, "difficulty", np.float32)
        record = args.difficulty.with_name("attach.args.json")
        if record.is_file():
            inputs.earlier = common.load_record(record)
    return inputs


def load_networks(args, inputs, device):
    """The scoring model, the text tokens and the encoders; nothing is written yet."""
    data = inputs.data
    if args.select in RANKED and not args.difficulty:
        inputs.reference = common.open_scorer(args.reference, data, args.official)
    if args.text != "none" and common.rank() == 0:
        # A text model has gigabytes, and its tokens are needed once.
        inputs.text = common.text_tokens(args.text, args.prompt, data, device)
    if args.judge != "none":
        inputs.judge = common.open_encoder(args.judge, data, device, args.judge_weights)
    if args.visual != "none":
        inputs.visual = common.open_encoder(args.visual, inputs.pixels, device, args.visual_weights,
                                            tokens=True)
    aligned = inputs.judge and inputs.visual and inputs.judge.identity == inputs.visual.identity
    selected = inputs.reference and args.judge == "ddae" and args.judge_weights == args.reference
    # Who selected, or is aligned to, finds its own taste in what it judges.
    if aligned or selected:
        common.log(f"attach.py: warning: circular judging: {args.judge} judges the subset and "
                   f"{'is aligned to' if aligned else 'selected it'} as well; take another --judge "
                   "for figures that are to be believed")


def files_of(args, inputs):
    """{flag: file, or what dataset.json says of a data folder}, for the record."""
    files = {"data": inputs.data.info}
    if args.images:
        files["images"] = inputs.pixels.info
    for name in ("reference", "difficulty", "indices", "visual_weights", "judge_weights"):
        files[name] = getattr(args, name)
    if args.judge == "clip" and args.judge_weights and not args.judge_weights.is_file():
        files["judge_weights"] = None                                    # a folder or a name
    if args.text.endswith(".npy"):
        files["text"] = args.text
        mask = Path(f"{args.text[:-4]}_mask.npy")
        if mask.exists():
            files["text_mask"] = mask
    return files


def outputs_of(args):
    """The files that stand when all is done."""
    text = args.text != "none"
    scored = args.difficulty or args.select in RANKED
    made = {"keep.npy": True, "text.npy": text, "text_mask.npy": text, "difficulty.npy": scored,
            "difficulty.png": scored, "visual.npy": args.visual != "none"}
    return [name for name, wanted in made.items() if wanted]


# ----------------------------------------------------------------------------------- command line
def parse_args(argv=None):
    from models.conditioning import PROMPT
    from models.encoders import ENCODERS, describe
    from models.official import OFFICIAL
    judges = ("none", *ENCODERS)
    visuals = ("none", *(name for name, spec in ENCODERS.items() if spec.tokens))
    p = common.Parser(__doc__, epilog=f"encoders:\n{describe()}")
    p.add_argument("--data", type=Path, required=True, help="data folder of stage 0")
    p.add_argument("--out", type=Path, required=True, help="output folder")
    p.add_argument("--reference", type=Path, help="diffusion model that scores; also ddae's")
    p.add_argument("--official", choices=OFFICIAL,
                   help="--reference holds official weights of this kind: names and shapes are the "
                        "same, but DiT predicts noise and SiT a velocity in reversed time")
    p.add_argument("--difficulty", type=Path, help="difficulty.npy (N,) instead of scoring")
    p.add_argument("--select", choices=SELECT, help="which images of each class; default interval")
    p.add_argument("--per-class", type=common.count, help="images per class (IPC)")
    p.add_argument("--interval", type=interval_type, help="every K-th rank, auto (default) or span")
    p.add_argument("--allow-short", action="store_true", help="smaller classes give all they have")
    p.add_argument("--indices", type=Path, help="keep.npy: attach to these instead of selecting")
    p.add_argument("--images", type=Path, help="data folder with the pixels of the --indices")
    p.add_argument("--text", default="minilm", help="none, minilm (embedded), FILE.npy (K, L, d) "
                                                    "or a T5 or CLIP text model, name or folder")
    p.add_argument("--prompt", help=f"what a text model of transformers reads; default {PROMPT!r}")
    p.add_argument("--visual", choices=visuals, default="none", help="encoder of visual tokens")
    p.add_argument("--visual-weights", type=Path, help="its file; for ddae default: the reference")
    p.add_argument("--flips", action="store_true", help="store the mirrored images' tokens too")
    p.add_argument("--judge", choices=judges, default="scratch", help="encoder of FD(subset)")
    p.add_argument("--judge-weights", type=Path, help="its file")
    p.add_argument("--batch-size", type=common.batch_type, default=256, help="images at once")
    p.add_argument("--amp", choices=common.AMP_CHOICES, default="none",
                   help="precision of scoring; auto: the one that is fastest here")
    common.add_run_flags(p, "make the output again although it stands",
                         seed="of the noise and of --select random")
    common.add_list_flag(p, select=SELECT, visual=visuals, judge=judges)
    args = p.parse_args(argv)
    if args.indices and (args.select or args.per_class or args.interval or args.allow_short):
        p.error("--indices says which images to keep, so --select, --per-class, --interval and "
                "--allow-short would do nothing; leave them out")
    if not args.indices:
        args.select = args.select or "interval"
    # The other defaults depend on flags that must not contradict each other.
    for wrong, message in contradictions(args, args.prompt or PROMPT):
        if wrong:
            p.error(message)
    if args.select == "interval":
        args.interval = args.interval or "auto"
    if args.visual == "ddae":
        args.visual_weights = args.visual_weights or args.reference
    args.prompt = args.prompt or PROMPT
    return args


def interval_type(text):
    return text if text in ("auto", "span") else common.count(text)


def contradictions(args, prompt):
    """[(whether it is so, what to say)] of flags that contradict each other."""
    stands = args.text in ("none", "minilm") or args.text.endswith(".npy")
    maps = args.visual == "ddae" and not args.visual_weights             # of the reference
    return [
        (args.select == "all" and args.per_class, "--select all keeps everything, not --per-class"),
        (args.select in (*RANKED, "random") and not args.per_class,
         f"--select {args.select} needs --per-class COUNT"),
        (args.interval is not None and args.select != "interval",
         f"--interval belongs to --select interval, not to {args.select}"),
        (args.select in RANKED and not args.reference and not args.difficulty,
         f"--select {args.select} needs --reference CHECKPOINT, to score, or --difficulty FILE"),
        (args.reference and args.difficulty and not maps,
         "--difficulty says how hard each image is, so --reference would not score; leave one out"),
        (args.official and not args.reference, "--official says what it holds: give --reference"),
        (args.official and maps, "--visual ddae takes its maps from a checkpoint of train.py, not "
                                 "from --official weights; give --visual-weights CHECKPOINT"),
        (maps and not args.reference, "--visual ddae needs --visual-weights or --reference"),
        (args.judge == "ddae" and not args.judge_weights, "--judge ddae needs --judge-weights"),
        (args.images and (not args.indices or args.visual == "none"),
         "--images holds the pixels of the images of --indices, for --visual; give both"),
        (args.visual == "none" and (args.flips or args.visual_weights),
         "--flips and --visual-weights do nothing with --visual none; name an encoder"),
        (args.judge == "none" and args.judge_weights, "--judge-weights does nothing: --judge none"),
        (args.prompt is not None and stands, f"--prompt does nothing with --text {args.text}"),
        ("{class}" not in prompt, f"--prompt {prompt!r}: must hold {{class}}"),
    ]


@common.command
def main(argv=None):
    args = parse_args(argv)
    device = common.get_device(args.device)
    inputs = load_inputs(args)
    hardware = common.settle_amp(args, device)               # the flags that it decided
    # A file that is given may lie in this very folder.
    given = {path.absolute() for path in (args.difficulty, args.indices) if path}
    stale = [name for name in OUTPUTS if (args.out / name).absolute() not in given]
    with common.Stage("attach", args, files_of(args, inputs), outputs_of(args), free=["batch_size"],
                      stale=stale, scraps=SCRAPS, open=hardware,
                      load=lambda: load_networks(args, inputs, device)) as stage:
        if stage.done:
            return
        figures = attach_text(args, inputs, stage)
        scores, cost = score_images(args, inputs, device, stage)
        keep, how = common.from_rank0(lambda: choose(args, inputs, scores))
        sizes = np.bincount(inputs.data.labels[keep])                    # (K,)
        common.log(f"attach.py: kept {len(keep)} of {len(inputs.data.labels)} images, per class "
                   f"{sizes.min()}..{sizes.max()} ({how})")
        stage.save("keep.npy", keep)
        figures.update(cost, kept=len(keep), chosen=how)
        if scores is not None and common.rank() == 0:
            draw_selection(inputs.data, scores, keep, how, stage.out)
        if inputs.judge and len(keep) > 1:
            figures.update(subset_distance(args, inputs, keep, stage.out))
        if inputs.visual:
            figures.update(attach_visual(args, inputs, keep, stage.out))
        figures["looked_at"] = "difficulty" if args.select in RANKED else "nothing"
        stage.finish(**figures)


if __name__ == "__main__":
    main()
