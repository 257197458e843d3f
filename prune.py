"""Stage 1: keep the part of a data set that is worth training on.

Encodes every image with a surrogate network, scores the features and keeps the best (Li et al.
2024, arXiv 2409.19128: the data selection of GANs carried over to diffusion models). A higher score
is kept first; ties go by an order drawn from --seed. Scores that pick a set are minus the place in
the order of picking, -inf for what is not picked.

With --scope class every class is scored and cut by itself, to floor(keep * n_c + 1/2) images and at
least one. With --scope global all images compete: gaussian and moderate still measure an image
against its own class, the others treat the set as one class. kcenter, herding and cluster read the
features about once per picked image: on large sets use them per class.

Reads   DATA/images.npy  uint8 (N, H, W, C);  DATA/labels.npy  int64 (N,);  DATA/classes.txt
Writes  OUT/features.npy float32 (N, D), unless --features is given or the score needs none
        OUT/scores.npy   float64 (N,);  OUT/keep.npy  int64 (M,), sorted
        OUT/montage.png, OUT/scores.png;  DATA/scratch.pt where --surrogate scratch finds none
An interrupted extraction goes on where it stopped. torchrun spreads it; the first process scores.

    python prune.py --data data/digits --surrogate pixels --score gaussian --per-class 5 \\
        --out ex/prune
"""
import math
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import common

OUTPUTS = ("scores.npy", "keep.npy", "scores.png", "montage.png")


# --------------------------------------------------------------------------------------- formulas
def gaussian_score(z, eps=1e-5):
    """Log-density (n,) of each row under the Gaussian fitted to all rows, in nats, float64.

    Sigma = (1/n) sum (z - mu)(z - mu)^T + eps I   (DeVries et al. 2020, arXiv 2007.15255, 3.1).
    """
    from models.chunked import mean_row
    n, D = z.shape
    mu = mean_row(z)                                                     # (D,)
    measure = mahalanobis_by_gram if n < D else mahalanobis
    distance, logdet = measure(z, mu, eps)                               # (n,), ()
    return (-0.5 * (distance + logdet + D * math.log(2 * math.pi))).numpy()


def mahalanobis(z, mu, eps):
    """(z - mu)^T Sigma^-1 (z - mu) of every row, (n,), and log |Sigma|."""
    scatter = sum(x.T @ x for x in centred(z, mu))                       # (D, D)
    L, logdet = cholesky(scatter / z.shape[0], eps)
    white = (torch.linalg.solve_triangular(L, x.T, upper=False) for x in centred(z, mu))
    return torch.cat([w.square().sum(0) for w in white]), logdet


def mahalanobis_by_gram(z, mu, eps):
    """The same for n < D, from the n x n Gram matrix A = X X^T / n + eps I of X = z - mu.

    diag(X Sigma^-1 X^T) = n (1 - eps diag A^-1) and |Sigma| = |A| eps^(D - n): this keeps the
    digits that the large and almost equal distances lose in D x D.
    """
    n, D = z.shape
    x = torch.cat(list(centred(z, mu)))                                  # (n, D)
    L, logdet = cholesky(x @ x.T / n, eps)
    root = torch.linalg.solve_triangular(L, torch.eye(n, dtype=L.dtype), upper=False)    # L^-1
    diagonal = root.square().sum(0)                                      # (n,) of A^-1
    return n * (1 - eps * diagonal), logdet + (D - n) * math.log(eps)


def centred(z, mu):
    """z - mu by chunks, as tensors."""
    from models.chunked import chunks
    for x in chunks(z):
        # All products are torch's, for two BLAS pools at once fight for the cores.
        yield torch.from_numpy(x - mu)


def cholesky(S, eps):
    """L L^T = S + eps I, and its log-determinant."""
    L, failed = torch.linalg.cholesky_ex(S + eps * torch.eye(len(S), dtype=S.dtype))
    if failed:
        raise ValueError("score gaussian: covariance not positive definite: the features are too "
                         f"large for the ridge of {eps:g}; scale them down")
    return L, 2 * L.diagonal().log().sum()


def median_distance(z):
    """Distance of each row to the coordinate-wise median of all rows: (n, D) -> (n,)."""
    from models.chunked import distances, median_row
    return distances(z, median_row(z))


def middle_band(d, tie):
    """-|rank(d) - (n - 1)/2|: the middle of the distances d (n,) scores highest.

    Moderate-DS (Xia et al. 2023, ICLR), with the median as in its code; the paper has the mean.
    """
    rank = np.empty(len(d))                                              # (n,)
    rank[np.lexsort((tie, d))] = np.arange(len(d))
    return -np.abs(rank - (len(d) - 1) / 2)


def kcenter_picks(z, m, tie, rng=None):
    """m rows by greedy k-center (Sener and Savarese 2018, arXiv 1708.00489, Algorithm 1).

    It starts at the row nearest to the mean, and keeps one distance per row, to the nearest pick.
    """
    from models.chunked import mean_row, products, squared_distances, squared_norms
    sq = squared_norms(z)                                                # (n,)
    # |z - mu|^2 is smallest where 2 <z, mu> - |z|^2 is largest.
    picked = [first(2 * products(z, mean_row(z)) - sq, tie)]
    near = np.full(len(sq), np.inf)                                      # (n,)
    while len(picked) < m:
        near = np.minimum(near, squared_distances(z, sq, picked[-1]))
        # Below every distance: a duplicate of a pick may be picked, a pick may not.
        near[picked] = -1
        picked.append(first(near, tie))
    return picked


def herding_picks(z, m, tie, rng=None):
    """m rows whose running mean stays near mu: herding as in iCaRL (Rebuffi et al. 2017, Eq. 4).

    Pick k is argmin_z |mu - (z + picks) / k|, each row once: argmax <w, z> - |z|^2 / 2 with w =
    k mu - picks. Without the last term (Welling 2009, Eq. 5 and 6) long rows win for being long.
    """
    from models.chunked import mean_row, products, squared_norms
    along = products(z, mean_row(z))                                     # (n,) <mu, z>
    gain = along - squared_norms(z) / 2       # (n,), which is kept up to date instead of w
    taken = np.zeros(len(along), bool)                                   # (n,)
    picked = []
    while len(picked) < m:
        i = first(np.where(taken, -np.inf, gain), tie)
        taken[i] = True
        picked.append(i)
        gain += along - products(z, z[i:i + 1][0])
    return picked


def ccs_picks(difficulty, m, tie, rng=None, strata=50, drop=0.1):
    """m rows by coverage-centric selection (Zheng et al. 2023, arXiv 2210.15809, Algorithm 1).

    Of a difficulty (n,), high = hard, the hardest `drop` go first (fewer where m needs them), the
    rest falls into strata of equal width over its range. From the smallest stratum to the largest
    each gives an equal share of what is left to pick, or all that it has.
    """
    n = len(difficulty)
    dropped = min(int(drop * n), n - m)
    easy = np.lexsort((tie, difficulty))[:n - dropped]                   # indices, easiest first
    d = difficulty[easy] - difficulty[easy].min()                        # from 0 upwards
    stratum = np.zeros(len(d), int)
    if d.max() > 0:
        stratum = np.minimum((strata * (d / d.max())).astype(int), strata - 1)
    by_size = sorted((easy[stratum == b] for b in range(strata)), key=len)   # [(n_b,), ...]
    picked = []
    for i, rows in enumerate(by_size):
        quota = min(len(rows), (m - len(picked)) // (strata - i))
        picked.extend(rows[np.argsort(tie[rows])[:quota]])
    return picked


def cluster_picks(z, m, tie, rng):
    """The m rows nearest to m k-means centres (as in Briq et al. 2024, arXiv 2411.12523).

    The largest cluster comes first; each takes the nearest row that is left.
    """
    from models.chunked import kmeans, products, squared_norms
    C, sizes = kmeans(z, m, rng)
    C = C[np.argsort(-sizes, kind="stable")]                             # (m, D)
    sq = squared_norms(z)                                                # (n,)
    picked = []
    block = max(1, 2**25 // len(sq))          # centres at once: no (n, m) matrix beyond 256 MB
    for lo in range(0, m, block):
        closer = products(z, C[lo:lo + block].T, block) - sq[:, None] / 2    # (n, block)
        for j in range(closer.shape[1]):
            closer[picked, j] = -np.inf
            picked.append(first(closer[:, j], tie))
    return picked


def first(value, tie):
    """Index of the largest value; among equals the one with the smallest tie."""
    best = np.flatnonzero(value == value.max())
    return best[np.argmin(tie[best])]


@dataclass(frozen=True)
class Score:
    """What the stages need to know of a score. A new one is its function and a line in SCORES."""
    function: object        # (x) -> scores (n,), or (x, m, tie, rng) -> m rows in the order picked
    needs: str              # x: "features" (n, D), "labels": EL2N (n,), "nothing": random (n,)
    what: str               # one line for --help
    picks: bool = False     # picks a set of m images one by one
    within: bool = False    # measures an image against its own class also where all compete
    ranked: object = None   # (scores, tie) -> (n,), over all that compete


SCORES = {
    "gaussian": Score(gaussian_score, "features", "density under the class Gaussian", within=True),
    "moderate": Score(median_distance, "features", "the middle of the distances to the median",
                      within=True, ranked=middle_band),
    "kcenter":  Score(kcenter_picks, "features", "greedy cover, from the most central image", True),
    "herding":  Score(herding_picks, "features", "greedy, their mean is near the class mean", True),
    "cluster":  Score(cluster_picks, "features", "the images nearest to M_c k-means centres", True),
    "random":   Score(np.asarray, "nothing", "the baseline that every other score has to beat"),
    "el2n":     Score(np.asarray, "labels", "hardest for a small network after a few epochs"),
    "ccs":      Score(ccs_picks, "labels", "el2n, spread over all but the hardest 10 %", True),
}


def counts_to_keep(sizes, keep):
    """Images to keep of groups of these sizes (K,): floor(keep * n + 1/2), at least 1."""
    share = Fraction(repr(float(keep)))       # exact: as floats 0.35 * 90 is less than 31.5
    return np.array([max(1, math.floor(share * int(n) + Fraction(1, 2))) for n in sizes])


def top(scores, groups, m, tie):
    """Sorted indices of the m[g] highest scores of each group g. scores, groups, tie: (N,)."""
    order = np.lexsort((tie, -scores, groups))                           # by group, best first
    start = np.searchsorted(groups[order], np.arange(len(m)))            # (G,)
    return np.sort(np.concatenate([order[lo:lo + k] for lo, k in zip(start, m)]))


# --------------------------------------------------------------------------------------- the work
def score_all(name, groups, m, tie, seed, features=None, difficulty=None, labels=None):
    """Scores (N,) float64 of all images, which compete within their group, for m[g] places.

    difficulty (N,): EL2N. labels (N,): the classes, where they are not the groups.
    """
    from models.chunked import rows_of
    score = SCORES[name]
    # They do not depend on how many are kept: a larger set holds every smaller one.
    random = common.random_scores(seed, len(groups))                     # (N,)
    source = {"features": features, "labels": difficulty, "nothing": random}[score.needs]
    within = labels if score.within and labels is not None else groups
    scores = np.full(len(groups), -np.inf)                               # what is not picked
    sets = common.rows_by_class(within, within.max() + 1)
    for g, rows in enumerate(common.progress(sets, desc=name, leave=False, delay=2)):
        x = rows_of(source, rows)                                        # (n, D) or (n,)
        if score.picks:
            picked = score.function(x, m[g], tie[rows], np.random.default_rng([seed, g]))
            scores[rows[picked]] = 0.0 - np.arange(len(picked))
        else:
            scores[rows] = score.function(x)
    if score.ranked:
        for rows in common.rows_by_class(groups, len(m)):
            scores[rows] = score.ranked(scores[rows], tie[rows])
    return scores


def cut(args, inputs, device):
    """Features -> scores -> kept indices -> files: how many were kept, and the seconds it took."""
    from models import scratch
    start = time.time()
    data = inputs.data
    labels = data.labels                                                 # (N,)
    tie = torch.randperm(len(labels), generator=common.generator(args.seed, "ties")).numpy()  # (N,)
    if args.score == "gaussian":
        D = inputs.features.shape[1]
        thin = np.sum(np.bincount(labels) <= D)
        if thin:
            common.log(f"prune.py: warning: {thin} of {data.num_classes} classes have no more "
                       f"images than features have columns ({D}), so that their distances are "
                       "almost equal; a narrower surrogate separates them better")
    with common.user_errors():
        scores = inputs.scores                                           # (N,), or None
        if inputs.trains:
            scores = scratch.el2n(data.images, labels, data.num_classes, device, args.el2n_epoch)
        if args.score:
            scores = score_all(args.score, inputs.groups, inputs.m, tie, args.seed, inputs.features,
                               scores, labels)
    keep = top(scores, inputs.groups, inputs.m, tie)                     # (M,)
    kept = np.bincount(labels[keep], minlength=data.num_classes)         # (K,)
    common.need(kept.all(), f"--scope global leaves class {data.classes[np.argmin(kept)]!r} without"
                            " an image; use --scope class or a larger --keep")
    seconds = round(time.time() - start, 3)
    common.save_npy(args.out / "scores.npy", scores)
    title = f"{args.score or args.scores}: {len(keep)} of {len(scores)} images kept"
    common.class_histograms(args.out / "scores.png", data, scores, keep, title, 12, 2.2, cut=True)
    if data.images is not None:
        common.cut_montage(args.out / "montage.png", data, scores, keep, tie, title)
    common.save_npy(args.out / "keep.npy", keep)
    common.log(f"prune.py: kept {len(keep)} of {len(scores)} images "
               f"({100 * len(keep) / len(scores):.1f} %), per class {kept.min()}..{kept.max()}")
    return len(keep), seconds


# ----------------------------------------------------------------------------------------- inputs
def load_inputs(args):
    """What the flags name, checked; nothing is written yet.

    groups (N,): within which images compete; m (G,): how many to keep of each; looked_at: what the
    score needs; extracts, trains: whether features or the networks of EL2N are to be made.
    """
    from models.encoders import ENCODERS
    inputs = SimpleNamespace(features=None, scores=None, seconds=0.0)
    inputs.looked_at = SCORES[args.score].needs if args.score else "scores"
    inputs.extracts = inputs.looked_at == "features" and not args.features
    inputs.trains = inputs.looked_at == "labels" and not args.scores
    data = inputs.data = common.open_data(args.data, pixels=inputs.extracts or inputs.trains)
    common.check_classes(data, args.per_class)
    by_labels = ENCODERS[args.surrogate].needs_labels
    classifies = inputs.trains or (inputs.extracts and by_labels)
    common.need(data.num_classes > 1 or not classifies,
                f"{args.data}: has one class only, but --score {args.score} or --surrogate "
                f"{args.surrogate} trains a classifier; choose one that needs no labels")
    inputs.groups = data.labels if args.scope == "class" else np.zeros_like(data.labels)
    sizes = np.bincount(inputs.groups)                                   # (G,)
    inputs.m = np.full_like(sizes, args.per_class or 0)
    if args.keep:
        inputs.m = counts_to_keep(sizes, args.keep)
    if args.features:
        inputs.features, inputs.seconds = common.load_features(args.features, data)
    if args.scores:
        # For ccs they are a difficulty, which every image has to have.
        inputs.scores = common.load_scores(args.scores, data, "scores", unpicked=not args.score)
        picked = np.bincount(inputs.groups[np.isfinite(inputs.scores)], minlength=len(inputs.m))
        short = np.argmax(picked < inputs.m)
        where = f"class {data.classes[short]!r}" if args.scope == "class" else "the whole set"
        common.need(picked[short] >= inputs.m[short],
                    f"{args.scores}: picks fewer than {inputs.m[short]} images of {where}; score "
                    "again with the larger share")
    return inputs


# ----------------------------------------------------------------------------------- command line
def parse_args(argv=None):
    from models.encoders import ENCODERS, describe
    listed = "\n".join(f"{name:<10}{score.what}" for name, score in SCORES.items())
    p = common.Parser(__doc__, epilog=f"scores:\n{listed}\n\nsurrogates:\n{describe()}")
    p.add_argument("--data", type=Path, required=True, help="data folder of stage 0")
    p.add_argument("--out", type=Path, required=True, help="output folder")
    p.add_argument("--score", choices=SCORES, help="how images are ranked (list below)")
    p.add_argument("--keep", type=common.number(float, above=0, high=1), help="share, in (0, 1]")
    p.add_argument("--per-class", type=common.count, help="images to keep of each class, instead")
    p.add_argument("--scope", choices=("class", "global"), default="class", help="who competes")
    p.add_argument("--surrogate", choices=ENCODERS, default="inception", help="encoder (see below)")
    p.add_argument("--weights", "--encoder-weights", type=Path, help="its file; ddae: a checkpoint")
    p.add_argument("--features", type=Path, help="features.npy (N, D) instead of a surrogate")
    p.add_argument("--scores", type=Path, help="scores.npy (N,) to cut again; for ccs: el2n's")
    p.add_argument("--el2n-epoch", type=common.number(int, low=1, high=10_000), default=10,
                   help="epochs after which el2n looks at the network")
    p.add_argument("--batch-size", type=common.batch_type, default=256, help="images at once")
    common.add_run_flags(p, "make the output again although it stands",
                         seed="of random, of the order among ties and of k-means")
    common.add_list_flag(p, score=SCORES, surrogate=ENCODERS)
    args = p.parse_args(argv)
    if (args.keep is None) == (args.per_class is None):
        p.error("give either --keep RATIO or --per-class COUNT")
    if args.per_class and args.scope == "global":
        p.error("--per-class contradicts --scope global, which cuts the set as a whole; use --keep")
    if args.score is None and args.scores is None:
        p.error(f"give --score, one of {', '.join(SCORES)}, or --scores FILE")
    score = SCORES.get(args.score)
    if args.scores and score and not (score.picks and score.needs == "labels"):
        p.error(f"--scores FILE is cut as it stands, so --score {args.score} would do nothing; "
                "leave one out (only ccs takes both)")
    return args


@common.command
def main(argv=None):
    args = parse_args(argv)
    device = common.get_device(args.device)
    inputs = load_inputs(args)
    files = {"data": inputs.data.info, "features": args.features, "scores": args.scores}
    if inputs.extracts and args.weights and args.weights.is_file():      # for clip it is a folder
        files["weights"] = args.weights
    outputs = OUTPUTS if inputs.data.images is not None else OUTPUTS[:3]
    # Scores that are given may lie in this very folder.
    stale = [name for name in OUTPUTS if name != "scores.npy" or not args.scores]

    def load():
        if inputs.extracts:
            inputs.encoder = common.open_encoder(args.surrogate, inputs.data, device, args.weights)

    with common.Stage("prune", args, files, outputs, free=["batch_size"], stale=stale, load=load,
                      ready=lambda: not inputs.extracts or (args.out / "features.npy").exists()
                      ) as stage:
        if stage.done:
            return
        if inputs.extracts:
            inputs.features, inputs.seconds = common.fill_features(
                args.out, "features", inputs.encoder, inputs.data, args.batch_size, noted=True,
                anew=args.overwrite)
        kept, seconds = common.from_rank0(lambda: cut(args, inputs, device))
        common.log(f"prune.py: seconds: features {inputs.seconds:.1f}, scores {seconds:.1f}")
        stage.finish(kept=kept, seconds_scores=seconds, seconds_features=round(inputs.seconds, 3),
                     looked_at=inputs.looked_at)


if __name__ == "__main__":
    main()
