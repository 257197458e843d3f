"""Stage 1: keep the part of a data set that is worth training on.

Encodes every image with a surrogate network, scores the features and keeps the best (Li et al. 2024, arXiv 2409.19128: the data selection of GANs
carried over to diffusion models). Higher score = kept first, for every score; ties go by an order drawn from --seed.
  gaussian   log-density under the Gaussian of the class         moderate   ranks of the distance to the class median: the middle band
  kcenter    greedy cover, from the image nearest to the mean    herding    greedy running mean that follows the class mean
  cluster    the images nearest to M_c k-means centres           random     the baseline that every other score has to beat
  el2n       hardest for a small network after a few epochs      ccs        el2n without its hardest 10 %, spread evenly over its range
kcenter, herding, ccs and cluster pick a set: their score is minus the place in the order of picking, -inf for what is not picked.
With --scope class every class is scored and cut by itself, floor(keep * n_c + 1/2) images, at least one. With --scope global all images compete:
gaussian and moderate still measure an image against its own class, the others treat the set as one class. kcenter, herding and cluster read the
features about once per picked image: on large sets use them per class.

Reads   DATA/images.npy  uint8 (N, H, W, C);  DATA/labels.npy  int64 (N,);  DATA/classes.txt
Writes  OUT/features.npy float32 (N, D), unless --features is given or the score needs none;  OUT/scores.npy float64 (N,);
        OUT/keep.npy int64 (M,), sorted;  OUT/montage.png, OUT/scores.png;  DATA/scratch.pt where --surrogate scratch finds none
Features stay on disk, memory-mapped; an interrupted extraction goes on where it stopped (features.part.npy, features.done.npy, features.json), also
under another number of processes. torchrun spreads the extraction; the first process scores.

    python prune.py --data data/cifar10 --surrogate inception --score gaussian --keep 0.4 --out runs/cifar10/pruned/prune
"""
import math
import time
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

import common
from models import encoders, scratch

FEATURE_SCORES = ("gaussian", "moderate", "kcenter", "herding", "cluster")
SCORES = (*FEATURE_SCORES, "random", "el2n", "ccs")


class Rows:
    """Rows `index` of the 2-D array z as float64, read only when sliced: z[a:b] or z[a:b, c:d]."""

    def __init__(self, z, index):
        self.z, self.index, self.shape = z, index, (len(index), z.shape[1])

    def __getitem__(self, key):
        rows, cols = key if isinstance(key, tuple) else (key, slice(None))
        return np.asarray(self.z[self.index[rows], cols], np.float64)


def chunks(z, width=0, limit=2**26):
    """The rows of z as float64, so many at once that neither they nor a (rows, width) matrix beside them passes `limit` bytes."""
    step = max(1, limit // (8 * max(z.shape[1], width, 1)))
    for lo in range(0, z.shape[0], step):
        yield np.asarray(z[lo:lo + step], np.float64)


def each(z, f, width=0):
    """f of all rows, by chunks: (n,) or (n, width)."""
    return np.concatenate([f(x) for x in chunks(z, width)])


def first(value, tie):
    """Index of the largest value; among equals the one with the smallest tie."""
    best = np.flatnonzero(value == value.max())
    return best[np.argmin(tie[best])]


def picked_score(picked, n):
    """Score of a set that was picked one by one: minus the place in the order, -inf for the rest."""
    score = np.full(n, -np.inf)
    score[picked] = -np.arange(len(picked), dtype=np.float64) + 0.0
    return score


def gaussian_score(z, eps=1e-5):
    """Log-density of each row under the Gaussian fitted to all rows (DeVries et al. 2020, arXiv 2007.15255, section 3.1). Returns (n,) nats.

    Sigma = (1/n) sum (z - mu)(z - mu)^T + eps I, in float64 by Cholesky. For n < D the same numbers come from the n x n Gram matrix:
    with A = X X^T / n + eps I, diag(X Sigma^-1 X^T) = n (1 - eps diag A^-1) and |Sigma| = |A| eps^(D - n), which keeps the digits that the large
    and almost equal distances lose in D x D.
    """
    n, D = z.shape
    mu = sum(x.sum(0) for x in chunks(z)) / n                                   # (D,)
    X = lambda: (torch.from_numpy(x - mu) for x in chunks(z))                   # all products in torch: two BLAS pools at once fight for the cores
    A = torch.cat(list(X())) if n < D else None                                 # (n, D)
    A = A @ A.T if n < D else sum(x.T @ x for x in X())
    L, failed = torch.linalg.cholesky_ex(A / n + eps * torch.eye(min(n, D), dtype=torch.float64))
    if failed:
        raise ValueError(f"score gaussian: covariance not positive definite: the features are too large for the ridge of {eps:g}; scale them down")
    if n < D:
        maha = n * (1 - eps * torch.linalg.solve_triangular(L, torch.eye(n, dtype=L.dtype), upper=False).square().sum(0))   # (n,)
    else:
        maha = torch.cat([torch.linalg.solve_triangular(L, x.T, upper=False).square().sum(0) for x in X()])                 # (n,)
    logdet = 2 * L.diagonal().log().sum() + max(D - n, 0) * math.log(eps)
    return (-0.5 * (maha + logdet + D * math.log(2 * math.pi))).numpy()


def median_distance(z):
    """Distance (n,) of each row to the coordinate-wise median of all rows."""
    n, D = z.shape
    cols = max(1, 2**25 // n)                                                   # by column blocks: a median needs all rows at once
    centre = np.concatenate([np.median(np.ascontiguousarray(np.asarray(z[:, lo:lo + cols], np.float64).T), axis=1, overwrite_input=True)
                             for lo in range(0, D, cols)])                      # (D,)
    return each(z, lambda x: np.sqrt(((x - centre) ** 2).sum(1)))


def middle_band(d, tie):
    """-|rank(d) - (n - 1)/2| of distances d (n,): the middle ranks score highest."""
    rank = np.empty(len(d))
    rank[np.lexsort((tie, d))] = np.arange(len(d))
    return -np.abs(rank - (len(d) - 1) / 2)


def moderate_score(z, tie):
    """Moderate-DS of one class (Xia et al. 2023, ICLR): the middle band of the distances to the class's median (as in its code; the paper: mean)."""
    return middle_band(median_distance(z), tie)


def kcenter_score(z, m, tie):
    """m picks of greedy k-center (Sener and Savarese 2018, arXiv 1708.00489, Algorithm 1), started at the row nearest to the mean.

    Keeps one distance per row, to the nearest pick so far: never an n x m matrix.
    """
    sq = each(z, lambda x: (x * x).sum(1))
    mu = sum(x.sum(0) for x in chunks(z)) / z.shape[0]
    picked = [first(2 * each(z, lambda x: x @ mu) - sq, tie)]
    near = np.full(len(sq), np.inf)
    while len(picked) < m:
        i = picked[-1]
        near = np.minimum(near, np.maximum(sq - 2 * each(z, lambda x, c=z[i:i + 1][0]: x @ c) + sq[i], 0))
        near[picked] = -1                                                       # below every distance: duplicates of a pick may be picked, picks not
        picked.append(first(near, tie))
    return picked_score(picked, len(sq))


def herding_score(z, m, tie):
    """m picks of herding (Welling 2009, Eq. 5 and 6): argmax <w, z>, then w <- w + mu - z, from w = mu; each row at most once."""
    mu = sum(x.sum(0) for x in chunks(z)) / z.shape[0]
    along = each(z, lambda x: x @ mu)                                           # (n,) <mu, z>
    wz, taken, picked = along.copy(), np.zeros(len(along), bool), []            # wz = <w, z> is kept up to date instead of w
    while len(picked) < m:
        i = first(np.where(taken, -np.inf, wz), tie)
        taken[i] = True
        picked.append(i)
        wz += along - each(z, lambda x, c=z[i:i + 1][0]: x @ c)
    return picked_score(picked, len(along))


def ccs_score(difficulty, m, tie, strata=50, drop=0.1):
    """Coverage-centric selection (Zheng et al. 2023, arXiv 2210.15809, Algorithm 1) of m rows over a difficulty, high = hard.

    The hardest `drop` go first (fewer where m needs them), the rest falls into strata of equal width over its range; from the smallest stratum to
    the largest each gives an equal share of what is left to pick, or all that it has. Within a stratum the order of `tie` decides.
    """
    n = len(difficulty)
    easy = np.lexsort((tie, difficulty))[:n - min(int(drop * n), n - m)]        # indices, easiest first
    d = difficulty[easy]
    width = d.max() - d.min()
    bins = np.minimum((strata * ((d - d.min()) / width)).astype(int), strata - 1) if width > 0 else np.zeros(len(d), int)
    members = sorted((easy[bins == b] for b in range(strata)), key=len)
    picked = []
    for i, rows in enumerate(members):
        quota = min(len(rows), (m - len(picked)) // (strata - i))
        picked.extend(rows[np.argsort(tie[rows])[:quota]])
    return picked_score(picked, n)


def kmeans(z, k, rng, iterations=10):
    """Centres (k, D) and sizes (k,) of k-means++ (Arthur and Vassilvitskii 2007) followed by Lloyd's steps; a centre without rows stays in place."""
    sq = each(z, lambda x: (x * x).sum(1))
    C, near, i, last = np.empty((k, z.shape[1])), np.full(len(sq), np.inf), rng.integers(len(sq)), None
    for j in range(k):
        C[j] = z[i:i + 1]
        near = np.minimum(near, np.maximum(sq - 2 * each(z, lambda x: x @ C[j]) + sq[i], 0))
        near[i] = 0
        total = np.cumsum(near)
        i = min(np.searchsorted(total, rng.random() * total[-1], side="right"), len(sq) - 1)
    for _ in range(iterations):
        half, sums, nearest = 0.5 * (C * C).sum(1), np.zeros(C.shape), []
        for x in chunks(z, k):
            nearest.append((x @ C.T - half).argmax(1))
            order = np.argsort(nearest[-1], kind="stable")
            used, start = np.unique(nearest[-1][order], return_index=True)
            sums[used] += np.add.reduceat(x[order], start)
        nearest = np.concatenate(nearest)
        sizes = np.bincount(nearest, minlength=k)
        C[sizes > 0] = sums[sizes > 0] / sizes[sizes > 0, None]
        if np.array_equal(nearest, last):
            break
        last = nearest
    return C, sizes


def cluster_score(z, m, tie, rng):
    """The rows nearest to m k-means centres (as in Briq et al. 2024, arXiv 2411.12523); the largest cluster first, each takes the nearest left."""
    C, sizes = kmeans(z, m, rng)
    C, sq, picked = C[np.argsort(-sizes, kind="stable")], each(z, lambda x: (x * x).sum(1)), []
    block = max(1, 2**25 // len(sq))                                            # centres at once: no (n, m) matrix beyond 256 MB
    for lo in range(0, m, block):
        closer = each(z, lambda x: x @ C[lo:lo + block].T, block) - sq[:, None] / 2   # (n, block), larger = closer
        for j in range(closer.shape[1]):
            closer[picked, j] = -np.inf
            picked.append(first(closer[:, j], tie))
    return picked_score(picked, len(sq))


def counts_to_keep(sizes, keep):
    """Images to keep of groups of these sizes (K,): floor(keep * n + 1/2), at least 1. Exact: as floats 0.35 * 90 is less than 31.5."""
    return np.array([max(1, math.floor(Fraction(repr(float(keep))) * int(n) + Fraction(1, 2))) for n in sizes])


def top(scores, groups, m, tie):
    """Sorted indices of the m[g] highest scores of each group g."""
    order = np.lexsort((tie, -scores, groups))
    start = np.searchsorted(groups[order], np.arange(len(m)))
    return np.sort(np.concatenate([order[a:a + b] for a, b in zip(start, m)]))


def members(groups):
    """[rows (n_g,) of group g, ascending]."""
    return np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])


def score_all(name, groups, m, tie, seed, features=None, difficulty=None, labels=None):
    """Scores (N,) float64 of all images, which compete within their group. labels: the classes, where they are not the groups. difficulty: el2n, for
    el2n and ccs."""
    if name == "random":
        return torch.rand(len(groups), dtype=torch.float64, generator=common.generator(seed, "random score")).numpy()   # M plays no part: sets nest
    if name == "el2n":
        return np.asarray(difficulty, np.float64)
    within = groups if labels is None or name not in ("gaussian", "moderate") else labels      # these two measure an image against its own class
    scores = np.empty(len(groups))
    for g, idx in enumerate(common.progress(members(within), desc=name, leave=False, delay=2)):
        z = Rows(features, idx) if name != "ccs" else None                      # sorted rows: scattered in the file, but read front to back
        if z and z.shape[0] * z.shape[1] < 2**25:
            z = z[:]                                                            # at most 256 MB in memory
        scores[idx] = {"gaussian": lambda: gaussian_score(z),
                       "moderate": lambda: median_distance(z),
                       "kcenter": lambda: kcenter_score(z, m[g], tie[idx]),
                       "herding": lambda: herding_score(z, m[g], tie[idx]),
                       "cluster": lambda: cluster_score(z, m[g], tie[idx], np.random.default_rng([seed, g])),
                       "ccs": lambda: ccs_score(difficulty[idx], m[g], tie[idx])}[name]()
    for idx in members(groups) if name == "moderate" else ():                   # ranked against all that compete: Moderate-DS's code with --scope global
        scores[idx] = middle_band(scores[idx], tie[idx])
    return scores


def extract_features(d, args, device):
    """OUT/features.npy as (memory map, seconds of all processes together). features.json says whose the rows are."""
    n, note = len(d.images), args.out / "features.json"
    with common.user_errors():
        enc = common.open_encoder(args.surrogate, d, device, args.weights)                      # a scratch network notes its own seconds
        key = {"data": d.info["sha256"], "identity": enc.identity, "shape": [n, enc.width]}
        if common.rank() == 0 and not (note.exists() and common.load_json(note, "whose the features are") == key):
            for file in args.out.glob("features.*"):                  # of other data or another surrogate
                file.unlink()
            common.log(f"prune.py: writing {n * enc.width * 4 / 1e9:.2f} GB of features ({n} x {enc.width}) of {args.surrogate}")
            common.save_json(note, key)
        return common.fill(args.out, "features", (n, enc.width), np.float32, args.batch_size,
                           lambda rows: encoders.extract(enc, d.images, batch_size=len(rows), rows=rows))


def pictures(out, d, scores, keep, tie, title, most=12, five=5):
    """montage.png: a row per class, highest kept | border | lowest dropped. scores.png: histogram per class with the cut. At most `most` classes."""
    from matplotlib.figure import Figure
    shown = np.unique(np.linspace(0, d.num_classes - 1, min(most, d.num_classes)).astype(int))
    kept, down = np.isin(np.arange(len(scores)), keep), math.ceil(len(shown) / 4)
    fig = Figure(figsize=(12, 2.2 * down + 0.6), layout="constrained")
    for place, c in enumerate(shown, 1):
        ax = fig.add_subplot(down, min(4, len(shown)), place)
        s, k = scores[d.labels == c], scores[kept & (d.labels == c)]
        ax.hist(s[np.isfinite(s)], bins=40)
        ax.axvline(k.min(), color="C3")
        ax.set_title(f"{d.classes[c]}: {len(k)} of {len(s)} kept" + f", {np.isneginf(s).sum()} not picked" * bool(np.isneginf(s).any()), fontsize=8)
    fig.suptitle(title)
    with common.atomic(out / "scores.png") as tmp:
        fig.savefig(tmp, dpi=110)
    if d.images is None:
        return
    step = max(1, d.images.shape[1] // 96)
    h, w = d.images[0, ::step, ::step].shape[:2]
    wide = five * (w + 1) + max(2, w // 4)                                      # of a group of images and the gap after it
    canvas = np.full((len(shown) * (h + 1), 3 * wide, 3), 255, np.uint8)
    for r, c in enumerate(shown):
        idx = np.flatnonzero(d.labels == c)
        best = idx[np.lexsort((tie[idx], -scores[idx]))]
        m = kept[best].sum()
        for g, group in enumerate((best[:m][:five], best[max(0, m - 3):m + 2], best[m:][-five:])):
            for x, i in enumerate(group):
                canvas[r * (h + 1):, g * wide + x * (w + 1):][:h, :w] = d.images[i, ::step, ::step]
    fig = Figure(figsize=(12, 1.2 + 12 * canvas.shape[0] / canvas.shape[1]), layout="constrained")
    ax = fig.add_subplot(title=title)
    ax.imshow(canvas, interpolation="nearest")
    ax.set_xticks(wide * np.arange(3) + five * (w + 1) / 2, ["highest kept", "border: last 3 kept, first 2 dropped", "lowest dropped"])
    ax.set_yticks((h + 1) * np.arange(len(shown)) + h / 2, [d.classes[c] for c in shown])
    with common.atomic(out / "montage.png") as tmp:
        fig.savefig(tmp, dpi=120)


def parse_args(argv=None):
    p = common.Parser(__doc__, epilog=f"surrogates:\n{encoders.describe()}")
    p.add_argument("--data", type=Path, required=True, help="data folder of stage 0")
    p.add_argument("--out", type=Path, required=True, help="output folder")
    p.add_argument("--score", choices=SCORES, help="how images are ranked; may be left out with --scores")
    p.add_argument("--keep", type=common.number(float, above=0, high=1), help="share of the images to keep, in (0, 1]")
    p.add_argument("--per-class", type=common.count, help="images to keep of each class, instead of --keep")
    p.add_argument("--scope", choices=("class", "global"), default="class", help="images compete within their class, or all with all")
    p.add_argument("--surrogate", choices=tuple(encoders.ENCODERS), default="inception", help="network whose pooled features are scored (list below)")
    p.add_argument("--weights", "--encoder-weights", type=Path, help="its weights; for ddae: a checkpoint of train.py")
    p.add_argument("--features", type=Path, help="features.npy (N, D) made earlier, instead of a surrogate")
    p.add_argument("--scores", type=Path, help="scores.npy (N,) made earlier, to cut again; with --score ccs: the el2n scores to stratify")
    p.add_argument("--el2n-epoch", type=common.number(int, low=1, high=10_000), default=10, help="epochs after which el2n looks at the network")
    p.add_argument("--batch-size", type=common.batch_type, default=256, help="images encoded at once")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--seed", type=common.seed_type, default=0, help="of random, of the order among ties and of k-means")
    p.add_argument("--overwrite", action="store_true", help="make the output again although it stands")
    args = p.parse_args(argv)
    if (args.keep is None) == (args.per_class is None):
        p.error("give either --keep RATIO or --per-class COUNT")
    if args.per_class and args.scope == "global":
        p.error("--per-class contradicts --scope global, which cuts the set as a whole; use --keep")
    if args.score is None and args.scores is None:
        p.error(f"give --score, one of {', '.join(SCORES)}, or --scores FILE")
    if args.scores and args.score not in (None, "ccs"):
        p.error(f"--scores FILE is cut as it stands, so --score {args.score} would do nothing; leave one out (only ccs takes both)")
    args.extract = args.score in FEATURE_SCORES and not args.features
    args.el2n = args.score in ("el2n", "ccs") and not args.scores
    return args


def check_inputs(args):
    """The data folder, the groups (N,) within which images compete, how many to keep of each, and the arrays of --features and --scores."""
    common.get_device(args.device)
    d = common.open_data(args.data, pixels=args.extract or args.el2n)
    n, sizes = len(d.labels), np.bincount(d.labels, minlength=d.num_classes)
    least = d.classes[np.argmin(sizes)]
    if not sizes.all():
        raise common.UserError(f"{args.data}: class {least!r} has no image; make the folder again without it")
    if args.per_class and args.per_class > sizes.min():
        raise common.UserError(f"--per-class {args.per_class}: class {least!r} has only {sizes.min()} images; lower it")
    if d.num_classes < 2 and (args.el2n or args.extract and args.surrogate == "scratch"):
        raise common.UserError(f"{args.data}: has one class only, but {'--score ' + args.score if args.el2n else '--surrogate scratch'} "
                               "trains a classifier; choose a score or a surrogate that needs no labels")
    groups = d.labels if args.scope == "class" else np.zeros(n, np.int64)
    m = counts_to_keep(np.bincount(groups), args.keep) if args.keep else np.full(d.num_classes, args.per_class)
    features = scores = None
    if args.features:
        features = common.load_npy(args.features, f"features, float (N = {n}, D)", (n, None), "f")
        common.check_origin(args.features, d)
        if features.shape[1] == 0:
            raise common.UserError(f"{args.features}: features of width 0; extract them again")
        if common.rank() == 0:
            common.check_finite(features, args.features, "features", rows=8192)
    if args.scores:
        scores = np.array(common.load_npy(args.scores, f"scores, float (N = {n},)", (n,), "f"), np.float64)
        common.check_origin(args.scores, d)
        common.check_finite(np.where(np.isneginf(scores) & (args.score is None), 0, scores), args.scores, "scores")
        short = np.flatnonzero(np.bincount(groups[np.isfinite(scores)], minlength=len(m)) < m)
        if len(short):
            where = f"class {d.classes[short[0]]!r}" if args.scope == "class" else "the whole set"
            raise common.UserError(f"{args.scores}: picks fewer than {m[short[0]]} images of {where}; score again with the larger share")
    return d, groups, m, features, scores


def cut(args, d, groups, m, features, scores, device):
    """Features -> scores -> kept indices -> files; returns the figures for prune.args.json."""
    start, tie = time.time(), torch.randperm(len(groups), generator=common.generator(args.seed, "ties")).numpy()
    if args.score == "gaussian" and (thin := (np.bincount(d.labels) <= features.shape[1]).sum()):
        common.log(f"prune.py: warning: {thin} of {d.num_classes} classes have no more images than features have columns ({features.shape[1]}): their "
                   "distances are almost constant (the order still holds); a narrower surrogate separates them better")
    if args.score:
        with common.user_errors():
            difficulty = scratch.el2n(d.images, d.labels, d.num_classes, device, args.el2n_epoch) if args.el2n else scores
            scores = score_all(args.score, groups, m, tie, args.seed, features, difficulty, d.labels)
    keep = top(scores, groups, m, tie)
    kept = np.bincount(d.labels[keep], minlength=d.num_classes)
    if not kept.all():
        raise common.UserError(f"--scope global leaves class {d.classes[np.argmin(kept)]!r} without an image; use --scope class or a larger --keep")
    seconds = round(time.time() - start, 3)
    common.save_npy(args.out / "scores.npy", scores)
    pictures(args.out, d, scores, keep, tie, f"{args.score or args.scores}: {len(keep)} of {len(scores)} images kept")
    common.save_npy(args.out / "keep.npy", keep)
    common.log(f"prune.py: kept {len(keep)} of {len(scores)} images ({100 * len(keep) / len(scores):.1f} %), per class {kept.min()}..{kept.max()}")
    return {"kept": len(keep), "seconds_scores": seconds}


def prune(args, d, groups, m, features, scores):
    """All processes extract, the first one scores and cuts; returns the figures for prune.args.json."""
    device, seconds = common.get_device(args.device), 0.0
    if args.extract:
        features, seconds = extract_features(d, args, device)
        if common.rank() == 0:
            common.check_finite(features, args.out / "features.npy", "features", rows=8192)
    elif args.features and (note := args.features.with_suffix(".seconds.json")).exists():   # what they cost when they were made still counts
        seconds = common.load_json(note, "the seconds of the extraction", (int, float))
    figures = common.from_rank0(lambda: cut(args, d, groups, m, features, scores, device)) | {"seconds_features": round(seconds, 3)}
    common.log(f"prune.py: seconds: features {seconds:.1f}, scores {figures['seconds_scores']:.1f}")
    return figures


@common.command
def main(argv=None):
    args = parse_args(argv)
    stood, inputs = args.out.exists(), check_inputs(args)
    d = inputs[0]
    weights = args.weights if args.extract and args.weights and args.weights.is_file() else None    # (a folder or a name for clip)
    stale = ["keep.npy", "scores.png", "montage.png"] + ["scores.npy"] * (not args.scores)          # those may be given from this very folder
    stale += ["features.json"] * (args.overwrite and args.extract)              # else the features that stand would be taken for good
    stage = common.Stage("prune", args, {"data": d.info, "features": args.features, "scores": args.scores, "weights": weights},
                         ["scores.npy", "keep.npy", "scores.png"] + (d.images is not None) * ["montage.png"],
                         ready=lambda: not args.extract or (args.out / "features.npy").exists(),
                         free=("batch_size", "extract", "el2n"), stale=stale, parts=("features.npy",)).__enter__()
    try:
        if not stage.done:
            stage.finish(**prune(args, *inputs))
    except common.UserError:                                                    # found late (weights, an emptied class): leave no half-made record
        if common.rank() == 0:
            stage.resuming or stage.file.unlink(missing_ok=True)
            with suppress(OSError):
                stood or args.out.rmdir()
        raise
    finally:
        stage.__exit__(None, None, None)


if __name__ == "__main__":
    main()
