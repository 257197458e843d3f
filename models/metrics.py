"""Metrics on features: Frechet distance and its bootstrap, KID, IS, precision/recall, density/coverage, and the memorisation audit.

Pure functions on arrays or tensors (N, D), memory-mapped ones included; statistics in float64; plain Python numbers or numpy arrays come out.
Distances go block by block on `device` (default: where the tensor lies, the CPU for arrays): no N x M matrix is ever held.
Nothing here knows an encoder: a Frechet distance is called FID only on pytorch-fid's Inception features (Heusel et al. 2017).

    from models.metrics import gaussian_stats, frechet_distance
    fd = frechet_distance(*gaussian_stats(samples), *gaussian_stats(reference))
"""
import math

import numpy as np
import torch


def _check(name, a, least=1):
    if not hasattr(a, "shape") or len(a.shape) != 2:
        raise ValueError(f"{name}: expected a matrix (N, D), got {tuple(a.shape) if hasattr(a, 'shape') else type(a).__name__}")
    if a.shape[0] < least:
        raise ValueError(f"{name}: {a.shape[0]} rows, at least {least} are needed")


def _check_pair(x, y, least=1):
    _check("first set", x, least), _check("second set", y, least)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"feature widths differ: {x.shape[1]} and {y.shape[1]}; both sets must come from one encoder")


def _rows(a, index, device):
    """Rows of an array or tensor (slice or index array) in float64 on the device. Copies, so that a read-only memory map stays legal."""
    if torch.is_tensor(a):
        block = a[index if isinstance(index, slice) else torch.as_tensor(index, device=a.device)]
    else:
        block = torch.from_numpy(np.array(a[index]))
    block = block.to(device).double()                                 # in this order: half the bytes go to a GPU, which converts them faster
    if not torch.isfinite(block).all():
        raise ValueError("the features hold NaN or infinity; encode again in fp32")
    return block


def _device(a, device=None):
    return torch.device(device) if device is not None else a.device if torch.is_tensor(a) else torch.device("cpu")


def gaussian_stats(features, chunk=4096, index=None, device=None):
    """Mean (D,) and unbiased covariance (D, D), float64 numpy, of the rows of `features` (of features[index] when given, repeats allowed).

    One pass with the first block's mean as origin: sum (x-o)(x-o)^T - n d d^T loses no digits when the mean is large against the spread.
    """
    n = features.shape[0] if index is None else len(index)
    _check("features", features)
    if n < 2:
        raise ValueError(f"features: {n} rows, a covariance needs at least 2")
    device = _device(features, device)
    origin = total = outer = None
    for i in range(0, n, chunk):
        x = _rows(features, slice(i, i + chunk) if index is None else index[i:i + chunk], device)       # (b, D)
        if origin is None:
            origin, total, outer = x.mean(0), 0, 0
        x -= origin
        total, outer = total + x.sum(0), outer + x.T @ x
    d = total / n                                                     # mean - origin
    sigma = (outer - n * torch.outer(d, d)) / (n - 1)
    return (origin + d).cpu().numpy(), ((sigma + sigma.T) / 2).cpu().numpy()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)   (Dowson & Landau 1982; Heusel et al. 2017, Eq. 6). A float >= 0.

    tr (S1 S2)^(1/2) = sum sqrt eig(H^T S2 H) with S1 = H H^T: symmetric, so it stays real and needs no epsilon when n < D. Equal statistics give 0.0.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a).detach().cpu().to(torch.float64) for a in (mu1, sigma1, mu2, sigma2))
    D = mu1.numel()
    if mu1.shape != (D,) or mu1.shape != mu2.shape or sigma1.shape != (D, D) or sigma2.shape != (D, D):
        raise ValueError(f"statistics do not match: means {tuple(mu1.shape)} and {tuple(mu2.shape)}, covariances {tuple(sigma1.shape)} and "
                         f"{tuple(sigma2.shape)}; both sets must come from one encoder")
    if not all(torch.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("the statistics hold NaN or infinity")
    if torch.equal(mu1, mu2) and torch.equal(sigma1, sigma2):
        return 0.0
    floor = D * torch.finfo(torch.float64).eps                        # an eigenvalue of 0 comes out as +-floor; its square root would be 1e-7, not 0
    w, V = torch.linalg.eigh(sigma1)
    keep = w > floor * w[-1].clamp(min=0)
    H = V[:, keep] * w[keep].sqrt()                                   # (D, rank)
    m = torch.linalg.eigvalsh(H.T @ sigma2 @ H) if H.shape[1] else torch.zeros(1, dtype=torch.float64)
    trace = m[m > floor * m[-1].clamp(min=0)].sqrt().sum()
    return max(float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace), 0.0)


def subset_frechet(z, keep, groups, seed=0, draws=3):
    """Frechet distance of the rows `keep` (M,) of z (N, D) to all of them, and [that of `draws` random subsets].

    A random subset has as many rows of each group as `keep`. groups: [rows (n_g,) of group g].
    """
    sizes = [np.isin(rows, keep).sum() for rows in groups]
    rng = np.random.default_rng(seed)
    subsets = [keep]
    for _ in range(draws):
        parts = [rng.choice(rows, m, replace=False) for rows, m in zip(groups, sizes)]
        subsets.append(np.sort(np.concatenate(parts)))
    full = gaussian_stats(z)
    own, *random = [frechet_distance(*gaussian_stats(z, index=rows), *full) for rows in subsets]
    return own, random


def per_class_frechet(feats, labels, ref_feats, ref_labels, K, seed=0, real_feats=None, real_labels=None):
    """Frechet distance class by class at one n for all, with real images as the yardstick.

    A per-class distance depends mostly on n, so n = the smallest class count over all sets given. Per class: n samples (drawn without replacement)
    against the statistics of ALL reference images of the class, and n real images against the same statistics.
    Real images come from real_feats (held-out, disjoint from the reference) when given. Otherwise they are drawn from the reference itself, which
    flatters them (0 at n = the whole class): `disjoint` says which.
    Returns dict(n, fd [K], mean, worst (class index), worst_fd, real [K], real_mean, disjoint).
    """
    if (real_feats is None) != (real_labels is None):
        raise ValueError("give real_feats and real_labels, or neither")
    disjoint = real_feats is not None
    if not disjoint:
        real_feats, real_labels = ref_feats, ref_labels
    where = {}
    for name, f, y in ("samples", feats, labels), ("reference", ref_feats, ref_labels), ("real", real_feats, real_labels):
        _check_pair(f, ref_feats)
        where[name] = _by_class(name, y, len(f), K)
    smallest = {(name, c): len(rows) for name, per in where.items() for c, rows in enumerate(per)}
    n = min(smallest.values())
    if n < 2:
        name, c = min(smallest, key=smallest.get)
        raise ValueError(f"{name}: class {c} has {n} rows, a per-class Frechet distance needs at least 2")
    fd, real = [], []
    for c in range(K):
        rng = np.random.default_rng([seed, c])
        ref = gaussian_stats(ref_feats, index=where["reference"][c])
        draw = lambda name: np.sort(rng.choice(where[name][c], n, replace=False))  # noqa: E731  sorted: kinder to a memory map
        fd.append(frechet_distance(*ref, *gaussian_stats(feats, index=draw("samples"))))
        real.append(frechet_distance(*ref, *gaussian_stats(real_feats, index=draw("real"))))
    worst = int(np.argmax(fd))
    return dict(n=n, fd=fd, mean=float(np.mean(fd)), worst=worst, worst_fd=fd[worst], real=real, real_mean=float(np.mean(real)), disjoint=disjoint)


def _by_class(name, labels, n, K):
    """Row numbers of each of the K classes."""
    y = torch.as_tensor(labels).cpu().numpy()
    if y.shape != (n,):
        raise ValueError(f"{name}: {n} rows but labels of shape {y.shape}")
    if n and (y.min() < 0 or y.max() >= K):
        raise ValueError(f"{name}: labels run from {y.min()} to {y.max()}, expected 0 to {K - 1}")
    return [np.flatnonzero(y == c) for c in range(K)]


def bootstrap(fn, n, repeats=20, seed=0):
    """fn(index) on `repeats` resamples of n rows with replacement (Efron 1979): (mean, std, 2.5 % and 97.5 % quantile).

    Trap: a statistic that depends on n is biased by the repeats in a resample (63 % of the rows are distinct). A Frechet distance moves UP, so quote
    point estimate +- std and read mean - point as the bias; the quantiles need not hold the point estimate.
    """
    if n < 2 or repeats < 2:
        raise ValueError(f"a bootstrap needs at least 2 rows and 2 repeats, got {n} and {repeats}")
    values = np.array([fn(np.sort(np.random.default_rng([seed, r]).integers(n, size=n))) for r in range(repeats)])
    return float(values.mean()), float(values.std(ddof=1)), *(float(q) for q in np.quantile(values, (0.025, 0.975)))


def bootstrap_frechet(features, mu_ref, sigma_ref, repeats=20, seed=0):
    """(mean, std, low, high) of the samples' Frechet distance, the reference held fixed; see bootstrap. Holds one block, not a resample."""
    return bootstrap(lambda index: frechet_distance(mu_ref, sigma_ref, *gaussian_stats(features, index=index)), len(features), repeats, seed)


def mmd2_unbiased(x, y, device=None):
    """Unbiased squared MMD, kernel (a.b / D + 1)^3 (Gretton et al. 2012, Eq. 3; Binkowski et al. 2018, section 4). May be below 0."""
    _check_pair(x, y, least=2)
    device = _device(x, device)
    x, y = _rows(x, slice(None), device), _rows(y, slice(None), device)
    (m, D), n = x.shape, y.shape[0]
    kxx, kyy, kxy = ((a @ b.T / D + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    return float((kxx.sum() - kxx.trace()) / (m * (m - 1)) + (kyy.sum() - kyy.trace()) / (n * (n - 1)) - 2 * kxy.mean())


def kid(x, y, subsets=100, subset_size=1000, seed=0, device=None):
    """Kernel Inception Distance (Binkowski et al. 2018, section 4): (mean over subsets, its standard error, subset size used).

    The size falls to min(subset_size, n_x, n_y). With fewer than a few thousand rows the subsets overlap and the error is too small; it is 0
    when both sets are used whole, because nothing is left to vary.
    """
    _check_pair(x, y, least=2)
    if subsets < 2 or subset_size < 2:
        raise ValueError(f"KID needs at least 2 subsets of at least 2 rows, got {subsets} of {subset_size}")
    m, rng = min(subset_size, len(x), len(y)), np.random.default_rng(seed)
    pick = lambda a: np.sort(rng.choice(len(a), m, replace=False))    # noqa: E731
    device = _device(x, device)
    v = [mmd2_unbiased(_rows(x, pick(x), device), _rows(y, pick(y), device)) for _ in range(subsets)]
    return float(np.mean(v)), float(np.std(v, ddof=1) / subsets ** 0.5), m


def inception_score(logits_or_probs, splits=10):
    """exp E_x KL(p(y|x) || p(y)) on each of `splits` consecutive parts: (mean, population std)   (Salimans et al. 2016, section 4).

    Rows that are non-negative and sum to 1 are taken as probabilities, anything else as logits. Trap: parts are consecutive, as published, so samples
    sorted by class must be shuffled first (a part of one class scores 1).
    """
    _check("class scores", logits_or_probs, least=max(splits, 1))
    p = _rows(logits_or_probs, slice(None), _device(logits_or_probs))
    if (p < 0).any() or (p.sum(1) - 1).abs().max() > 1e-3:
        p = p.softmax(1)
    bounds = [len(p) * s // splits for s in range(splits + 1)]
    scores = []
    for a, b in zip(bounds, bounds[1:]):
        q = p[a:b]
        scores.append(float((torch.xlogy(q, q) - torch.xlogy(q, q.mean(0))).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


TIE = 1e-9       # relative: two float64 sums of the same squares differ by less, two distances that differ in float32 data by more


def _blocks(x, y, device, chunk):
    """Yield (i, j, d2 (bx, by) fp32 squared distances of rows i.. and j.., |x|^2 + |y|^2 as their error scale).

    |x|^2 + |y|^2 - 2 x.y cancels for near-duplicates: rows are centred first, and whoever needs the last digits recomputes those pairs with _exact.
    """
    centre = sum(_rows(y, slice(j, j + chunk), device).sum(0) for j in range(0, len(y), chunk)) / len(y)            # (D,)
    old = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")                 # training may have allowed TF32: its 10 bits would reorder neighbours
        for i in range(0, len(x), chunk):
            a = (_rows(x, slice(i, i + chunk), device) - centre).float()                         # (bx, D)
            for j in range(0, len(y), chunk):
                b = (_rows(y, slice(j, j + chunk), device) - centre).float()                     # (by, D)
                norms = a.square().sum(1)[:, None] + b.square().sum(1)
                yield i, j, torch.addmm(norms, a, b.T, alpha=-2), norms
    finally:
        torch.set_float32_matmul_precision(old)


def _exact(x, rows, y, cols, device, pairs=4096):
    """Distances |x[r] - y[c]| in float64 for paired index vectors."""
    rows, cols = rows.cpu().numpy(), cols.cpu().numpy()
    return torch.cat([(_rows(x, rows[s:s + pairs], device) - _rows(y, cols[s:s + pairs], device)).square().sum(1).sqrt()
                      for s in range(0, len(rows), pairs)] or [torch.zeros(0, dtype=torch.float64, device=device)])


def knn(x, y, k, exclude_self=False, chunk=2048, device=None):
    """The k nearest rows of y for each row of x, nearest first, ties by lower index: (dist (n, k) float64, index (n, k) int64), numpy.

    exclude_self: x and y are the same rows in the same order, and row i is no neighbour of row i (a repeat of it elsewhere is, at distance 0).
    Candidates (k + 16) come from fp32 blocks, their order from exact float64 distances. Only more than 16 rows within fp32 error of the k-th
    (1e-6 of the squared norms) can hide one: the distance is then off by that error at most.
    """
    _check_pair(x, y)
    n, m = len(x), len(y)
    if exclude_self and n != m:
        raise ValueError(f"exclude_self needs the same rows twice, got {n} and {m}")
    if not 1 <= k <= m - exclude_self:
        raise ValueError(f"{k} neighbours asked for, the set has {m - exclude_self}; use a smaller k or more rows")
    device, want = _device(x, device), min(k + 16, m - exclude_self)
    dist, index = np.empty((n, k)), np.empty((n, k), np.int64)
    for i, j, d2, _ in _blocks(x, y, device, chunk):
        if exclude_self and i == j:                                   # x and y are cut alike, so self pairs are the diagonals of the diagonal blocks
            d2.fill_diagonal_(torch.inf)
        d, c = d2.topk(min(want, d2.shape[1]), largest=False)
        best = (d, c + j) if j == 0 else (torch.cat([best[0], d], 1), torch.cat([best[1], c + j], 1))
        if best[0].shape[1] > want:
            d, order = best[0].topk(want, largest=False)
            best = d, best[1].gather(1, order)
        if j + d2.shape[1] == m:                                      # the last block of these rows
            c = best[1].sort(1).values                                # by index: the stable sort below then breaks ties by it
            rows = torch.arange(i, i + len(c), device=device).repeat_interleave(c.shape[1])
            d = _exact(x, rows, y, c.flatten(), device).view(c.shape)
            if exclude_self:
                d[c == torch.arange(i, i + len(c), device=device)[:, None]] = torch.inf
            d, order = d.sort(dim=1, stable=True)
            dist[i:i + len(c)], index[i:i + len(c)] = d[:, :k].cpu().numpy(), c.gather(1, order)[:, :k].cpu().numpy()
    return dist, index


def _balls(x, y, radius, closed, device, chunk=2048):
    """For each row of x, in how many balls (centre y[j], radius[j]) it lies; closed: the rim counts. Pairs near the rim are recomputed exactly."""
    inside, r = torch.zeros(len(x), dtype=torch.int64, device=device), torch.as_tensor(radius, device=device)
    rim = 1 + TIE if closed else 1 - TIE
    for i, j, d2, norms in _blocks(x, y, device, chunk):
        gap = d2 - r[j:j + chunk].square().float()
        near = gap.abs() <= 1e-5 * norms
        inside[i:i + chunk] += ((gap < 0) & ~near).sum(1)
        a, b = near.nonzero(as_tuple=True)
        d = _exact(x, a + i, y, b + j, device)
        hit = d <= r[b + j] * rim if closed else d < r[b + j] * rim
        inside.index_add_(0, a + i, hit.to(torch.int64))
    return inside.cpu().numpy()


def precision_recall(real, fake, k=3, device=None):
    """Share of fakes inside a real k-NN ball, and of reals inside a fake one (Kynkaanniemi et al. 2019, Eq. 1-2; the rim counts).

    A set where every point has k repeats has balls of radius 0: its recall of 0 says nothing about diversity, use unique samples.
    Both depend on n: take equally many reals and fakes. Returns dict(precision, recall).
    """
    _check_pair(real, fake, least=k + 1)
    device = _device(real, device)
    cover = lambda x, y: float((_balls(x, y, knn(y, y, k, True, device=device)[0][:, -1], True, device) > 0).mean())  # noqa: E731
    return dict(precision=cover(fake, real), recall=cover(real, fake))


def density_coverage(real, fake, k=5, device=None):
    """Mean number of real k-NN balls around a fake over k, and share of real balls that hold a fake (Naeem et al. 2020, section 3).

    Rim excluded, as in the authors' code: identical sets then have density 1 exactly. Fakes may repeat, reals should not (balls of radius 0 hold
    nothing). Returns dict(density, coverage).
    """
    _check_pair(real, fake)
    _check("real", real, least=k + 1)
    device = _device(real, device)
    radius = knn(real, real, k, True, device=device)[0][:, -1]
    density = _balls(fake, real, radius, False, device).mean() / k
    return dict(density=float(density), coverage=float((knn(real, fake, 1, device=device)[0][:, 0] < radius * (1 - TIE)).mean()))


def nearest(samples, train, device=None):
    """Distance (n,) and index (n,) of the nearest training row of each sample."""
    dist, index = knn(samples, train, 1, device=device)
    return dist[:, 0], index[:, 0]


def nn_ratio_share(samples, train, neighbours=50, threshold=1 / 3, device=None):
    """Share of samples with d1 < threshold * mean(d2 .. d_{neighbours+1}), distances to the training rows.

    After Carlini et al. 2023 (50 neighbours) and Yoon et al. 2023 (1/3). A smaller set takes all it has. Returns dict(share, neighbours, threshold).
    """
    _check("training set", train, least=2)
    neighbours = min(neighbours, len(train) - 1)
    d = knn(samples, train, neighbours + 1, device=device)[0]
    return dict(share=float(((d[:, 0] < threshold * d[:, 1:].mean(1)) | (d[:, 0] == 0)).mean()), neighbours=neighbours, threshold=threshold)


def matched_set_test(samples, subset, subset_labels, pool, pool_labels, draws=20, seed=0, device=None):
    """Share of samples nearer to `subset` (seen in training) than to an equally large, class-matched draw from `pool` (real images not seen).

    0.5 = no memorising, ties count half. Class c gives min(count in subset, count in pool) images on both sides, the larger side redrawn each time
    without replacement. Where the subset is the larger side (a model of the full set, pool = held-out split) a copied image is in the draw only with
    that ratio's chance: a perfect copier then scores about 0.5 + ratio / 2, not 1.
    Returns dict(share: mean over draws, spread: their std, n: images a side).
    """
    _check_pair(subset, pool)
    K = 1 + max(int(subset_labels.max()), int(pool_labels.max()))
    a, b = _by_class("subset", subset_labels, len(subset), K), _by_class("pool", pool_labels, len(pool), K)
    for c in range(K):
        if len(a[c]) and not len(b[c]):
            raise ValueError(f"the pool has no image of class {c}, the subset has {len(a[c])}: nothing to match it with; hold some back")
    sizes = [min(len(p), len(q)) for p, q in zip(a, b)]
    shares, known = [], {}

    def distances(side, rows, rng):
        picks = np.sort(np.concatenate([r if len(r) == s else rng.choice(r, s, replace=False) for r, s in zip(rows, sizes)]))
        if sum(map(len, rows)) != sum(sizes):
            return nearest(samples, side[torch.as_tensor(picks, device=side.device)] if torch.is_tensor(side) else side[picks], device)[0]
        if id(side) not in known:                                     # a side that is used whole is the same in every draw
            known[id(side)] = nearest(samples, side, device)[0]
        return known[id(side)]

    for r in range(draws):
        rng = np.random.default_rng([seed, r])
        seen, unseen = distances(subset, a, rng), distances(pool, b, rng)
        tie = np.abs(seen - unseen) <= TIE * np.maximum(seen, unseen)
        shares.append(np.mean(np.where(tie, 0.5, seen < unseen)))
    return dict(share=float(np.mean(shares)), spread=float(np.std(shares)), n=int(sum(sizes)))


def most_alike(z, labels, kept, kept_labels, ref, ref_labels, share):
    """Rows of z, sorted, that look most like a kept subset: the `share` of each class with the largest log N(u; kept) - log N(u; 0, I) (ours).

    What images of the subset's kind score that no model has seen. All are features (n, D) with labels (n,); kept, ref: of the subset and of the full
    training set. u: features whitened by the mean and covariance of their class in ref. All classes share one Gaussian of the kept u: one a class would
    tell a small random subset by its chance features. A class with fewer than two images in ref gives no rows.
    """
    white = {}
    for c in np.unique(kept_labels):
        if (ref_labels == c).sum() > 1:
            mu, sigma = gaussian_stats(ref, index=np.flatnonzero(ref_labels == c))
            white[c] = mu, np.linalg.cholesky(sigma + (1e-3 * np.trace(sigma) / len(sigma) + 1e-12) * np.eye(len(sigma)))
    u = lambda x, y, c: np.linalg.solve(white[c][1], (np.asarray(x[np.flatnonzero(y == c)], np.float64) - white[c][0]).T).T       # noqa: E731
    own = [u(kept, kept_labels, c) for c in white]
    if sum(map(len, own)) < 2:
        return np.empty(0, np.int64)
    m, S = gaussian_stats(np.concatenate(own))
    S, rows = S + 1e-3 * np.eye(len(S)), []
    for c in white:
        x, mine = u(z, labels, c), np.flatnonzero(labels == c)
        ratio = (x ** 2).sum(1) - ((x - m) * np.linalg.solve(S, (x - m).T).T).sum(1)           # twice the log-ratio, up to a constant
        rows.append(mine[np.argsort(-ratio, kind="stable")[:math.ceil(share * len(mine))]])
    return np.sort(np.concatenate(rows))


def memorisation_audit(encode, samples, subset, subset_labels, pool, pool_labels, heldout=None, baseline=None, draws=20, seed=0, noise=0.2,
                       controls=2000, device=None, alike=None):
    """The matched-set test and the neighbour ratio of `samples`, with the controls that say whether to believe them.

    encode: uint8 images (n, H, W, C) -> (n, D) vectors (pixel space: flatten, / 127.5 - 1). All other sets are uint8 images.
    Model of a subset: subset, pool = the rest of the training images, heldout = the held-out split. Model of the full set: subset = all training
    images, pool = the held-out split, heldout = None (it is the pool, so that control does not exist).
    Returns {set: {**matched_set_test, "ratio": nn_ratio_share}} for "samples", "heldout" (must be near 0.5), "noise": seen images + noise in the
    [-1, 1] scale, clipped to uint8 (must be near 1; for a model of the full set this is a perfect copier's score, see matched_set_test), "baseline":
    samples of a full-set model, "alike": held-out images of the subset's kind, see most_alike (these two are the zero, not 0.5, for a subset not drawn
    at random: a model of typical images draws typical images, without having copied any). Control sets above `controls` images are thinned.
    """
    rng = np.random.default_rng([seed, 2**31])
    thin = lambda a: np.asarray(a[np.sort(rng.choice(len(a), min(len(a), controls), replace=False))])    # noqa: E731
    seen = thin(subset)
    x = seen / 127.5 - 1 + noise * rng.standard_normal(seen.shape)
    sets = dict(samples=samples, heldout=None if heldout is None else thin(heldout), noise=np.clip(np.rint((x + 1) * 127.5), 0, 255).astype(np.uint8),
                alike=None if alike is None else thin(alike), baseline=baseline)
    def resident(z):                                                  # the searches read these rows many times over: on a GPU they stay there, where they fit
        fits = device is not None and torch.device(device).type == "cuda" and z.nbytes < 0.25 * torch.cuda.mem_get_info(device)[0]
        return torch.as_tensor(z, device=device) if fits else z
    train, rest = resident(encode(subset)), resident(encode(pool))
    out = {}
    for name, images in sets.items():
        if images is not None:
            z = resident(encode(images))
            out[name] = matched_set_test(z, train, subset_labels, rest, pool_labels, draws, seed, device)
            out[name]["ratio"] = nn_ratio_share(z, train, device=device)
    return out
