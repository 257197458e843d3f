"""Metrics on features: Frechet distance, KID, IS, precision and recall, density and coverage.

Pure functions on arrays or tensors (N, D), memory-mapped ones included; statistics in float64;
plain Python numbers or numpy arrays come out. Distances go block by block on `device` (default:
where the tensor lies, the CPU for arrays): no N x M matrix is ever held. Nothing here knows an
encoder: a Frechet distance is called FID only on pytorch-fid's Inception features (Heusel et al.
2017).

    from models.metrics import gaussian_stats, frechet_distance
    fd = frechet_distance(*gaussian_stats(samples), *gaussian_stats(reference))
"""
import numpy as np
import torch

# Relative: two float64 sums of the same squares differ by less, two distances of float32 data that
# are not the same by more.
TIE = 1e-9


# ---------------------------------------------------------------- Frechet distance
def gaussian_stats(features, chunk=4096, index=None, device=None):
    """Mean (D,) and unbiased covariance (D, D), float64 numpy, of the rows of `features`.

    Of features[index] when given, repeats allowed. One pass with the first block's mean as origin
    o: sum (x-o)(x-o)^T - n d d^T loses no digits when the mean is large against the spread.
    """
    check_matrix("features", features)
    n = features.shape[0] if index is None else len(index)
    if n < 2:
        raise ValueError(f"features: {n} rows, a covariance needs at least 2")
    device = _device(features, device)
    origin = None
    total = 0
    outer = 0
    for start in range(0, n, chunk):
        part = slice(start, start + chunk)
        if index is not None:
            part = index[part]
        x = _rows(features, part, device)  # (b, D)
        if origin is None:
            origin = x.mean(0)             # (D,)
        x = x - origin
        total = total + x.sum(0)           # (D,)
        outer = outer + x.T @ x            # (D, D)
    d = total / n                          # mean - origin
    sigma = (outer - n * torch.outer(d, d)) / (n - 1)
    sigma = (sigma + sigma.T) / 2
    return (origin + d).cpu().numpy(), sigma.cpu().numpy()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2), a float >= 0.

    Dowson & Landau 1982; Heusel et al. 2017, Eq. 6. tr (S1 S2)^(1/2) = sum sqrt eig(H^T S2 H)
    with S1 = H H^T: symmetric, so it stays real and needs no epsilon when n < D. Equal statistics
    give 0.0.
    """
    stats = [torch.as_tensor(a).detach().cpu().double() for a in (mu1, sigma1, mu2, sigma2)]
    mu1, sigma1, mu2, sigma2 = stats
    D = mu1.numel()
    if [a.shape for a in stats] != [(D,), (D, D), (D,), (D, D)]:
        mu1, sigma1, mu2, sigma2 = (tuple(a.shape) for a in stats)
        raise ValueError(f"statistics do not match: means {mu1} and {mu2}, covariances {sigma1} "
                         f"and {sigma2}; both sets must come from one encoder")
    if not all(torch.isfinite(a).all() for a in stats):
        raise ValueError("the statistics hold NaN or infinity")
    if torch.equal(mu1, mu2) and torch.equal(sigma1, sigma2):
        return 0.0
    # An eigenvalue of 0 comes out as +-floor times the largest; its root would be 1e-7, not 0.
    floor = D * torch.finfo(torch.float64).eps
    w, V = torch.linalg.eigh(sigma1)
    keep = w > floor * w[-1].clamp(min=0)
    H = V[:, keep] * w[keep].sqrt()                  # (D, rank)
    trace = 0.0
    if H.shape[1]:
        m = torch.linalg.eigvalsh(H.T @ sigma2 @ H)  # (rank,)
        trace = m[m > floor * m[-1].clamp(min=0)].sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace
    return max(float(distance), 0.0)


def random_subsets(groups, sizes, draws, seed):
    """[sorted rows (M,)] of `draws` subsets with sizes[g] of the rows groups[g] (n_g,)."""
    rng = np.random.default_rng(seed)
    subsets = []
    for _ in range(draws):
        parts = [rng.choice(rows, m, replace=False) for rows, m in zip(groups, sizes)]
        subsets.append(np.sort(np.concatenate(parts)))
    return subsets


def subset_frechet(z, keep, groups, seed=0, draws=20):
    """Frechet distance of the rows `keep` (M,) of z (N, D) to all of them, beside chance.

    groups: [rows (n_g,) of group g]. Returns (float, [the same of `draws` random subsets with as
    many rows of each group as `keep` has]).
    """
    sizes = [np.isin(rows, keep).sum() for rows in groups]
    subsets = [keep, *random_subsets(groups, sizes, draws, seed)]
    full = gaussian_stats(z)
    fd, *random = [frechet_distance(*gaussian_stats(z, index=rows), *full) for rows in subsets]
    return fd, random


def per_class_frechet(feats, labels, ref_feats, ref_labels, K, seed=0, real_feats=None,
                      real_labels=None):
    """Frechet distance class by class at one n for all, with real images as the yardstick.

    A per-class distance depends mostly on n, so n = the smallest class count over all sets given.
    Per class: n samples (drawn without replacement) against the statistics of ALL reference
    images of the class, and n real images against the same statistics. Real images come from
    real_feats (held-out, disjoint from the reference) when given. Otherwise they are drawn from
    the reference itself, which flatters them (0 at n = the whole class): `disjoint` says which.
    Where every class has at least twice as many samples as n, `fd_all` is the distance of n_all of
    each, the smallest number of them: steadier, but of another n than the real images.
    Returns dict(n, fd [K], mean, worst (class index), worst_fd, real [K], real_mean, disjoint), and
    maybe n_all, fd_all [K].
    """
    if (real_feats is None) != (real_labels is None):
        raise ValueError("give real_feats and real_labels, or neither")
    disjoint = real_feats is not None
    if not disjoint:
        real_feats = ref_feats
        real_labels = ref_labels
    rows = {}
    for name, f, y in (("samples", feats, labels), ("reference", ref_feats, ref_labels),
                       ("real", real_feats, real_labels)):
        check_pair(f, ref_feats)
        rows[name] = rows_of_class(name, y, len(f), K)
    counts = {(name, c): len(rows[name][c]) for name in rows for c in range(K)}
    n = min(counts.values())
    if n < 2:
        name, c = min(counts, key=counts.get)
        raise ValueError(f"{name}: class {c} has {n} rows, a per-class Frechet distance needs at "
                         "least 2")

    most = min(counts["samples", c] for c in range(K))

    def distance_of_some(features, mine, ref, rng, n=n):
        # Sorted, which is kinder to a memory map.
        drawn = np.sort(rng.choice(mine, n, replace=False))
        return frechet_distance(*ref, *gaussian_stats(features, index=drawn))

    fd = []
    real = []
    fd_all = []
    for c in range(K):
        rng = np.random.default_rng([seed, c])
        ref = gaussian_stats(ref_feats, index=rows["reference"][c])
        fd.append(distance_of_some(feats, rows["samples"][c], ref, rng))
        real.append(distance_of_some(real_feats, rows["real"][c], ref, rng))
        if most >= 2 * n:
            fd_all.append(distance_of_some(feats, rows["samples"][c], ref, rng, most))
    worst = int(np.argmax(fd))
    out = dict(n=n, fd=fd, mean=float(np.mean(fd)), worst=worst, worst_fd=fd[worst],
               real=real, real_mean=float(np.mean(real)), disjoint=disjoint)
    if fd_all:
        out.update(n_all=most, fd_all=fd_all)
    return out


def bootstrap(fn, n, repeats=20, seed=0):
    """fn(index) on resamples of n rows with replacement (Efron 1979).

    (mean, std, 2.5 % and 97.5 % quantile). Trap: a statistic that depends on n is biased by the
    repeats in a resample (63 % of the rows are distinct). A Frechet distance moves UP, so quote
    point estimate +- std and read mean - point as the bias; the quantiles need not hold the point
    estimate.
    """
    if n < 2 or repeats < 2:
        raise ValueError(f"a bootstrap needs at least 2 rows and 2 repeats, got {n} and {repeats}")
    values = []
    for r in range(repeats):
        index = np.random.default_rng([seed, r]).integers(n, size=n)
        values.append(fn(np.sort(index)))
    values = np.array(values)
    low, high = np.quantile(values, (0.025, 0.975))
    return float(values.mean()), float(values.std(ddof=1)), float(low), float(high)


def bootstrap_frechet(features, mu_ref, sigma_ref, repeats=20, seed=0):
    """(mean, std, low, high) of the samples' Frechet distance, the reference fixed; see bootstrap.

    Holds one block at a time, not a resample.
    """
    def distance(index):
        return frechet_distance(mu_ref, sigma_ref, *gaussian_stats(features, index=index))

    return bootstrap(distance, len(features), repeats, seed)


# ---------------------------------------------------------------- KID and IS
def mmd2_unbiased(x, y, device=None):
    """Unbiased squared MMD, kernel (a.b / D + 1)^3. May be below 0.

    Gretton et al. 2012, Eq. 3; Binkowski et al. 2018, section 4.
    """
    check_pair(x, y, least=2)
    device = _device(x, device)
    x = _rows(x, slice(None), device)  # (m, D)
    y = _rows(y, slice(None), device)  # (n, D)
    m = len(x)
    n = len(y)
    kxx = _kernel(x, x)                # (m, m)
    kyy = _kernel(y, y)                # (n, n)
    kxy = _kernel(x, y)                # (m, n)
    # Without the diagonal: no row is paired with itself.
    within_x = (kxx.sum() - kxx.trace()) / (m * (m - 1))
    within_y = (kyy.sum() - kyy.trace()) / (n * (n - 1))
    return float(within_x + within_y - 2 * kxy.mean())


def _kernel(x, y):
    """(m, n) of rows x (m, D) and y (n, D)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mmd2_of_subsets(x, y, rows_x, rows_y, device=None):
    """[mmd2_unbiased(x[rows_x[s]], y[rows_y[s]])] of subsets, each (S, m) without repetitions.

    From one kernel of all rows, which is cheaper where the sets are hardly larger than a subset.
    """
    device = _device(x, device)
    x = _rows(x, slice(None), device)  # (n, D)
    y = _rows(y, slice(None), device)  # (k, D)
    m = len(rows_x[0])
    inside_x = torch.zeros(len(rows_x), len(x), dtype=x.dtype, device=device)         # (S, n)
    inside_y = torch.zeros(len(rows_y), len(y), dtype=x.dtype, device=device)         # (S, k)
    inside_x.scatter_(1, torch.as_tensor(np.array(rows_x), device=device), 1)
    inside_y.scatter_(1, torch.as_tensor(np.array(rows_y), device=device), 1)
    kxx = _kernel(x, x).fill_diagonal_(0)                             # no row with itself
    kyy = _kernel(y, y).fill_diagonal_(0)
    within_x = (inside_x @ kxx * inside_x).sum(1) / (m * (m - 1))     # (S,)
    within_y = (inside_y @ kyy * inside_y).sum(1) / (m * (m - 1))
    between = (inside_x @ _kernel(x, y) * inside_y).sum(1) / m**2
    return (within_x + within_y - 2 * between).tolist()


def kid(x, y, subsets=100, subset_size=1000, seed=0, device=None):
    """Kernel Inception Distance (Binkowski et al. 2018, section 4).

    (mean over subsets, its standard error, subset size used). The size falls to min(subset_size,
    n_x, n_y). With fewer than a few thousand rows the subsets overlap and the error is too small;
    it is 0 when both sets are used whole, because nothing is left to vary.
    """
    check_pair(x, y, least=2)
    if subsets < 2 or subset_size < 2:
        raise ValueError("KID needs at least 2 subsets of at least 2 rows, got "
                         f"{subsets} of {subset_size}")
    m = min(subset_size, len(x), len(y))
    rng = np.random.default_rng(seed)
    device = _device(x, device)

    drawn = [[np.sort(rng.choice(len(a), m, replace=False)) for a in (x, y)]
             for _ in range(subsets)]
    if len(x) + len(y) <= 4 * m:
        values = mmd2_of_subsets(x, y, *zip(*drawn), device)
    else:
        values = [mmd2_unbiased(_rows(x, a, device), _rows(y, b, device)) for a, b in drawn]
    error = np.std(values, ddof=1) / subsets**0.5
    return float(np.mean(values)), float(error), m


def inception_score(logits_or_probs, splits=10):
    """exp E_x KL(p(y|x) || p(y)) on each of `splits` consecutive parts: (mean, population std).

    Salimans et al. 2016, section 4. Rows that are non-negative and sum to 1 are taken as
    probabilities, anything else as logits. Trap: parts are consecutive, as published, so samples
    sorted by class must be shuffled first (a part of one class scores 1).
    """
    check_matrix("class scores", logits_or_probs, least=max(splits, 1))
    p = _rows(logits_or_probs, slice(None), _device(logits_or_probs))  # (n, classes)
    if (p < 0).any() or (p.sum(1) - 1).abs().max() > 1e-3:
        p = p.softmax(1)
    scores = []
    for s in range(splits):
        q = p[len(p) * s // splits:len(p) * (s + 1) // splits]
        kl = (torch.xlogy(q, q) - torch.xlogy(q, q.mean(0))).sum(1)  # (part,)
        scores.append(float(kl.mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


# ---------------------------------------------------------------- neighbours
def knn(x, y, k, exclude_self=False, chunk=2048, device=None):
    """The k nearest rows of y for each row of x, nearest first, ties by lower index.

    (dist (n, k) float64, index (n, k) int64), numpy. exclude_self: x and y are the same rows in
    the same order, and row i is no neighbour of row i (a repeat of it elsewhere is, at distance
    0). Candidates (k + 16) come from fp32 blocks, their order from exact float64 distances. Only
    more than 16 rows within fp32 error of the k-th (1e-6 of the squared norms) can hide one: the
    distance is then off by that error at most.
    """
    check_pair(x, y)
    n = len(x)
    m = len(y)
    others = m - 1 if exclude_self else m
    if exclude_self and n != m:
        raise ValueError(f"exclude_self needs the same rows twice, got {n} and {m}")
    if not 1 <= k <= others:
        raise ValueError(f"{k} neighbours asked for, the set has {others}; use a smaller k or more "
                         "rows")
    device = _device(x, device)
    candidates = min(k + 16, others)
    dist = np.empty((n, k))
    index = np.empty((n, k), np.int64)
    best_d = None
    best_c = None
    for i, j, d2, _ in _blocks(x, y, device, chunk):
        if exclude_self and i == j:
            # x and y are cut alike, so self pairs are the diagonals of the diagonal blocks.
            d2.fill_diagonal_(torch.inf)
        d, c = d2.topk(min(candidates, d2.shape[1]), largest=False)
        c = c + j
        if j > 0:
            # With the best of the blocks before.
            d = torch.cat([best_d, d], 1)
            c = torch.cat([best_c, c], 1)
        if d.shape[1] > candidates:
            d, order = d.topk(candidates, largest=False)
            c = c.gather(1, order)
        best_d = d  # (bx, candidates) squared, fp32
        best_c = c  # (bx, candidates) rows of y
        if j + d2.shape[1] == m:
            # The last block of these rows.
            rows = torch.arange(i, i + len(c), device=device)
            d, c = _exact_order(x, rows, y, c, exclude_self, device)
            dist[i:i + len(c)] = d[:, :k].cpu().numpy()
            index[i:i + len(c)] = c[:, :k].cpu().numpy()
    return dist, index


def _exact_order(x, rows, y, columns, exclude_self, device):
    """(distances, columns), nearest first; columns (b, c): candidates in y for rows (b,) of x."""
    # By index first: the stable sort below then breaks ties by it.
    columns = columns.sort(1).values
    each = rows.repeat_interleave(columns.shape[1])  # (b c,)
    d = _exact(x, each, y, columns.flatten(), device).view(columns.shape)
    if exclude_self:
        d[columns == rows[:, None]] = torch.inf
    d, order = d.sort(dim=1, stable=True)
    return d, columns.gather(1, order)


def nearest(samples, train, device=None):
    """Distance (n,) and index (n,) of the nearest training row of each sample."""
    dist, index = knn(samples, train, 1, device=device)
    return dist[:, 0], index[:, 0]


def precision_recall(real, fake, k=3, device=None):
    """Share of fakes inside a real k-NN ball, and of reals inside a fake one.

    Kynkaanniemi et al. 2019, Eq. 1-2; the rim counts. A set where every point has k repeats has
    balls of radius 0: its recall of 0 says nothing about diversity, use unique samples. Both
    depend on n: take equally many reals and fakes. Returns dict(precision, recall).
    """
    check_pair(real, fake, least=k + 1)
    device = _device(real, device)

    def covered(x, y):
        radius = knn(y, y, k, exclude_self=True, device=device)[0][:, -1]  # (m,)
        return float((_balls(x, y, radius, True, device) > 0).mean())

    return dict(precision=covered(fake, real), recall=covered(real, fake))


def density_coverage(real, fake, k=5, device=None):
    """Real k-NN balls around a fake, over k, on average; share of real balls that hold a fake.

    Naeem et al. 2020, section 3. Rim excluded, as in the authors' code: identical sets then have
    density 1 exactly. Fakes may repeat, reals should not (balls of radius 0 hold nothing).
    Returns dict(density, coverage).
    """
    check_pair(real, fake)
    check_matrix("real", real, least=k + 1)
    device = _device(real, device)
    radius = knn(real, real, k, exclude_self=True, device=device)[0][:, -1]  # (n,)
    density = _balls(fake, real, radius, False, device).mean() / k
    closest, _ = nearest(real, fake, device)
    return dict(density=float(density), coverage=float((closest < radius * (1 - TIE)).mean()))


def _balls(x, y, radius, closed, device, chunk=2048):
    """For each row of x, in how many balls (y[j], radius[j]) it lies; closed: the rim counts.

    Pairs near the rim are measured once more, exactly.
    """
    inside = torch.zeros(len(x), dtype=torch.int64, device=device)
    radius = torch.as_tensor(radius, device=device)      # (m,)
    for i, j, d2, norms in _blocks(x, y, device, chunk):
        gap = d2 - radius[j:j + chunk].square().float()  # (bx, by)
        near = gap.abs() <= 1e-5 * norms                 # within the error of fp32
        inside[i:i + chunk] += ((gap < 0) & ~near).sum(1)
        a, b = near.nonzero(as_tuple=True)               # (pairs,) each
        d = _exact(x, a + i, y, b + j, device)           # (pairs,)
        if closed:
            hit = d <= radius[b + j] * (1 + TIE)
        else:
            hit = d < radius[b + j] * (1 - TIE)
        inside.index_add_(0, a + i, hit.to(torch.int64))
    return inside.cpu().numpy()


# ---------------------------------------------------------------- rows and blocks
def check_matrix(name, a, least=1):
    """Raise ValueError unless a is a matrix of at least so many rows."""
    shape = getattr(a, "shape", None)
    if shape is None or len(shape) != 2:
        found = type(a).__name__ if shape is None else tuple(shape)
        raise ValueError(f"{name}: expected a matrix (N, D), got {found}")
    if shape[0] < least:
        raise ValueError(f"{name}: {shape[0]} rows, at least {least} are needed")


def check_pair(x, y, least=1):
    check_matrix("first set", x, least)
    check_matrix("second set", y, least)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"feature widths differ: {x.shape[1]} and {y.shape[1]}; both sets must "
                         "come from one encoder")


def _device(a, device=None):
    if device is not None:
        return torch.device(device)
    if torch.is_tensor(a):
        return a.device
    return torch.device("cpu")


def _rows(a, index, device):
    """Rows of an array or tensor (slice or index array) in float64 on the device."""
    if torch.is_tensor(a):
        if not isinstance(index, slice):
            index = torch.as_tensor(index, device=a.device)
        block = a[index]
    else:
        block = torch.from_numpy(np.array(a[index]))  # a copy: memory maps are read-only
    # In this order half the bytes go to a GPU, which converts them faster.
    block = block.to(device).double()
    if not torch.isfinite(block).all():
        raise ValueError("the features hold NaN or infinity; encode again in fp32")
    return block


def rows_of_class(name, labels, n, K):
    """The row numbers of each of the K classes, a list of arrays."""
    y = torch.as_tensor(labels).cpu().numpy()
    if y.shape != (n,):
        raise ValueError(f"{name}: {n} rows but labels of shape {y.shape}")
    if n and (y.min() < 0 or y.max() >= K):
        raise ValueError(f"{name}: labels run from {y.min()} to {y.max()}, expected 0 to {K - 1}")
    return [np.flatnonzero(y == c) for c in range(K)]


def _blocks(x, y, device, chunk):
    """Yield (i, j, d2, norms): fp32 squared distances (bx, by) of rows from i and j on.

    norms = |x|^2 + |y|^2 (bx, by) is their error scale. |x|^2 + |y|^2 - 2 x.y cancels for
    near-duplicates: rows are centred first, and whoever needs the last digits measures those
    pairs again with _exact.
    """
    centre = 0
    for j in range(0, len(y), chunk):
        centre = centre + _rows(y, slice(j, j + chunk), device).sum(0)
    centre = centre / len(y)  # (D,)
    old = torch.get_float32_matmul_precision()
    try:
        # Training may have allowed TF32: its 10 bits would reorder neighbours.
        torch.set_float32_matmul_precision("highest")
        for i in range(0, len(x), chunk):
            a = (_rows(x, slice(i, i + chunk), device) - centre).float()      # (bx, D)
            for j in range(0, len(y), chunk):
                b = (_rows(y, slice(j, j + chunk), device) - centre).float()  # (by, D)
                norms = a.square().sum(1)[:, None] + b.square().sum(1)        # (bx, by)
                yield i, j, torch.addmm(norms, a, b.T, alpha=-2), norms
    finally:
        torch.set_float32_matmul_precision(old)


def _exact(x, rows, y, columns, device, pairs=4096):
    """Distances |x[r] - y[c]| in float64 for paired index vectors."""
    rows = rows.cpu().numpy()
    columns = columns.cpu().numpy()
    out = [torch.zeros(0, dtype=torch.float64, device=device)]  # for no pairs at all
    for start in range(0, len(rows), pairs):
        part = slice(start, start + pairs)
        gap = _rows(x, rows[part], device) - _rows(y, columns[part], device)
        out.append(gap.square().sum(1).sqrt())
    return torch.cat(out)
