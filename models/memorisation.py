"""Memorisation: do samples lie nearer to the images of the training set than chance has it?

Pure functions on arrays or tensors, as in models/metrics.py.

    from models.memorisation import matched_set_test, memorisation_audit
"""
import math

import numpy as np
import torch

from models.metrics import (TIE, check_matrix, check_pair, gaussian_stats, knn, nearest,
                            rows_of_class)


def nn_ratio_share(samples, train, neighbours=50, threshold=1 / 3, device=None):
    """Share of samples with d1 < threshold * mean(d2 .. d_{neighbours+1}).

    d: distances to the training rows. After Carlini et al. 2023 (50 neighbours) and Yoon et al.
    2023 (1/3). A smaller set takes all it has. Returns dict(share, neighbours, threshold).
    """
    check_matrix("training set", train, least=2)
    neighbours = min(neighbours, len(train) - 1)
    d, _ = knn(samples, train, neighbours + 1, device=device)  # (n, neighbours + 1)
    copied = (d[:, 0] < threshold * d[:, 1:].mean(1)) | (d[:, 0] == 0)
    return dict(share=float(copied.mean()), neighbours=neighbours, threshold=threshold)


def matched_set_test(samples, subset, subset_labels, pool, pool_labels, draws=20, seed=0,
                     device=None):
    """Share of samples nearer to `subset` than to as large, class-matched draws from `pool`.

    subset: seen in training; pool: real images not seen. 0.5 = no memorising, ties count half.
    Class c gives min(count in subset, count in pool) images on both sides, the larger side
    redrawn each time without replacement. Where the subset is the larger side (a model of the
    full set, pool = held-out split) a copied image is in the draw only with that ratio's chance:
    a perfect copier then scores about 0.5 + ratio / 2, not 1.
    Returns dict(share: mean over draws, spread: their std, n: images a side).
    """
    check_pair(subset, pool)
    K = 1 + max(int(subset_labels.max()), int(pool_labels.max()))
    in_subset = rows_of_class("subset", subset_labels, len(subset), K)
    in_pool = rows_of_class("pool", pool_labels, len(pool), K)
    for c in range(K):
        if len(in_subset[c]) and not len(in_pool[c]):
            raise ValueError(f"the pool has no image of class {c}, the subset has "
                             f"{len(in_subset[c])}: nothing to match it with; hold some back")
    sizes = [min(len(a), len(b)) for a, b in zip(in_subset, in_pool)]  # of each class, a side
    seen = None
    unseen = None
    shares = []
    for r in range(draws):
        rng = np.random.default_rng([seed, r])
        # Distances (n,) to either side. One that is used whole is the same in every draw.
        if seen is None or sum(sizes) < len(subset):
            seen, _ = nearest(samples, _drawn(subset, in_subset, sizes, rng), device)
        if unseen is None or sum(sizes) < len(pool):
            unseen, _ = nearest(samples, _drawn(pool, in_pool, sizes, rng), device)
        # An image that lies in both sides counts half.
        tie = np.abs(seen - unseen) <= TIE * np.maximum(seen, unseen)
        shares.append(np.mean(np.where(tie, 0.5, seen < unseen)))
    return dict(share=float(np.mean(shares)), spread=float(np.std(shares)), n=sum(sizes))


def _drawn(a, rows, sizes, rng):
    """Some rows of a: of each class c sizes[c], out of rows[c]."""
    if sum(sizes) == len(a):
        return a
    picks = []
    for mine, size in zip(rows, sizes):
        if len(mine) > size:
            mine = rng.choice(mine, size, replace=False)
        picks.append(mine)
    picks = np.sort(np.concatenate(picks))  # (n,), kinder to a memory map
    if torch.is_tensor(a):
        picks = torch.as_tensor(picks, device=a.device)
    return a[picks]


def most_alike(z, labels, kept, kept_labels, ref, ref_labels, share):
    """Rows of z, sorted, that look most like a kept subset, `share` of each class (ours).

    Those with the largest log N(u; kept) - log N(u; 0, I). What images of the subset's kind score
    that no model has seen. All are features (n, D) with labels (n,); kept, ref: of the subset and
    of the full training set. u: features whitened by the mean and covariance of their class in
    ref. All classes share one Gaussian of the kept u: one a class would tell a small random
    subset by its chance features. A class with fewer than two images in ref gives no rows.
    """
    white = {}  # {class: (mean (D,), root of its covariance (D, D))}
    for c in np.unique(kept_labels):
        rows = np.flatnonzero(ref_labels == c)
        if len(rows) > 1:
            mu, sigma = gaussian_stats(ref, index=rows)
            D = len(sigma)
            # Fewer images than columns leave a covariance without an inverse.
            ridge = 1e-3 * np.trace(sigma) / D + 1e-12
            white[c] = (mu, np.linalg.cholesky(sigma + ridge * np.eye(D)))

    def whitened(features, of, c):
        mu, L = white[c]
        x = np.asarray(features[np.flatnonzero(of == c)], np.float64)
        return np.linalg.solve(L, (x - mu).T).T  # (n of class c, D)

    own = [whitened(kept, kept_labels, c) for c in white]  # [(m_c, D)]
    if sum(map(len, own)) < 2:
        return np.empty(0, np.int64)
    m, S = gaussian_stats(np.concatenate(own))             # (D,), (D, D)
    S = S + 1e-3 * np.eye(len(S))
    chosen = []
    for c in white:
        u = whitened(z, labels, c)          # (n_c, D)
        mine = np.flatnonzero(labels == c)  # (n_c,)
        # (n_c,): twice the log-ratio, up to a constant.
        ratio = (u**2).sum(1) - ((u - m) * np.linalg.solve(S, (u - m).T).T).sum(1)
        best = np.argsort(-ratio, kind="stable")[:math.ceil(share * len(mine))]
        chosen.append(mine[best])
    return np.sort(np.concatenate(chosen))


def memorisation_audit(encode, samples, subset, subset_labels, pool, pool_labels, heldout=None,
                       baseline=None, draws=20, seed=0, noise=0.2, controls=2000, device=None,
                       alike=None):
    """The matched-set test and the neighbour ratio of `samples`, with controls for both.

    encode: uint8 images (n, H, W, C) -> (n, D) vectors (pixel space: flatten, / 127.5 - 1). All
    other sets are uint8 images. Model of a subset: subset, pool = the rest of the training
    images, heldout = the held-out split. Model of the full set: subset = all training images,
    pool = the held-out split, heldout = None (it is the pool, so that control does not exist).

    Returns {set: {**matched_set_test, "ratio": nn_ratio_share}} for
      "samples"
      "heldout"   must be near 0.5
      "noise"     seen images + noise in the [-1, 1] scale, clipped to uint8: must be near 1 (for a
                  model of the full set it is a perfect copier's score, see matched_set_test)
      "alike"     held-out images of the subset's kind, see most_alike
      "baseline"  samples of a full-set model
    The last two are the zero, not 0.5, for a subset not drawn at random: a model of typical images
    draws typical images, without having copied any. Control sets above `controls` images are
    thinned, the baseline aside.
    """
    rng = np.random.default_rng([seed, 2**31])

    def thinned(images):
        most = min(len(images), controls)
        return np.asarray(images[np.sort(rng.choice(len(images), most, replace=False))])

    def vectors(images):
        # The searches read them many times over: on a GPU they stay there, where they fit.
        z = encode(images)
        if device is None or torch.device(device).type != "cuda":
            return z
        if z.nbytes >= 0.25 * torch.cuda.mem_get_info(device)[0]:
            return z
        return torch.as_tensor(z, device=device)

    # Draws in this order: subset, noise, held-out, alike.
    seen = thinned(subset)
    noisy = seen / 127.5 - 1 + noise * rng.standard_normal(seen.shape)
    noisy = np.clip(np.rint((noisy + 1) * 127.5), 0, 255).astype(np.uint8)
    sets = {"samples": samples}
    if heldout is not None:
        sets["heldout"] = thinned(heldout)
    sets["noise"] = noisy
    if alike is not None:
        sets["alike"] = thinned(alike)
    if baseline is not None:
        sets["baseline"] = baseline
    train = vectors(subset)
    rest = vectors(pool)
    out = {}
    for name, images in sets.items():
        z = vectors(images)
        out[name] = matched_set_test(z, train, subset_labels, rest, pool_labels, draws, seed,
                                     device)
        out[name]["ratio"] = nn_ratio_share(z, train, device=device)
    return out
