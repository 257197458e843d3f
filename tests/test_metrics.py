"""models/metrics.py and models/memorisation.py against closed forms, plain loops of the published definitions, scipy, scikit-learn and pytorch-fid."""
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from models import metrics as M
from models.memorisation import matched_set_test, memorisation_audit, most_alike, nn_ratio_share


def data(n, D, seed=0, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    return (shift + scale * rng.standard_normal((n, D)) @ (np.eye(D) + 0.3 * rng.standard_normal((D, D)))).astype(np.float32)


# ---------------------------------------------------------------------------------------------- Frechet distance
def test_stats_equal_numpy_in_chunks_and_from_a_memory_map(tmp_path):
    x = data(301, 12)
    np.save(tmp_path / "x.npy", x)
    for a in (x, torch.from_numpy(x), np.load(tmp_path / "x.npy", mmap_mode="r")):
        mu, sigma = M.gaussian_stats(a, chunk=37)
        assert isinstance(mu, np.ndarray) and mu.dtype == sigma.dtype == np.float64
        np.testing.assert_allclose(mu, x.astype(np.float64).mean(0), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-11, atol=1e-13)
    rows = np.array([3, 3, 7, 300, 0, 7])
    np.testing.assert_allclose(M.gaussian_stats(x, chunk=4, index=rows)[1], np.cov(x[rows].astype(np.float64), rowvar=False), rtol=1e-10, atol=1e-12)


def test_stats_keep_their_digits_far_from_the_origin():
    x = np.random.default_rng(1).standard_normal((500, 4)) + 1e8
    np.testing.assert_allclose(M.gaussian_stats(x, chunk=64)[1], np.cov(x, rowvar=False), rtol=1e-7)


def test_frechet_closed_forms():
    rng = np.random.default_rng(0)
    a, b, mu, nu = rng.uniform(0.1, 4, 20), rng.uniform(0.1, 4, 20), rng.standard_normal(20), rng.standard_normal(20)
    Q = np.linalg.qr(rng.standard_normal((20, 20)))[0]                # commuting: one basis, other eigenvalues
    true = ((mu - nu) ** 2).sum() + ((a ** 0.5 - b ** 0.5) ** 2).sum()
    assert M.frechet_distance(mu, np.diag(a), nu, np.diag(b)) == pytest.approx(true, rel=1e-10)
    turned = [torch.tensor(z) for z in (mu, Q * a @ Q.T, nu, Q * b @ Q.T)]
    assert M.frechet_distance(*turned) == pytest.approx(true, rel=1e-10)
    small = M.frechet_distance(1e-4 * mu, 1e-8 * np.diag(a), 1e-4 * nu, 1e-8 * np.diag(b))            # features of another scale: no absolute epsilon
    assert small == pytest.approx(1e-8 * true, rel=1e-9)
    assert M.frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(5.0, rel=1e-12)        # (1-3)^2 + (2-3)^2
    assert M.frechet_distance(mu, np.zeros((20, 20)), nu, np.diag(b)) == pytest.approx(((mu - nu) ** 2).sum() + b.sum(), rel=1e-12)


def test_frechet_equals_scipy_and_pytorch_fid(monkeypatch):
    scipy_linalg = pytest.importorskip("scipy.linalg")
    fid = pytest.importorskip("pytorch_fid.fid_score")
    # newer scipy has no sqrtm(disp=): give pytorch-fid's function what it unpacks, its own code stays as it is
    sqrtm = scipy_linalg.sqrtm
    monkeypatch.setattr(fid.linalg, "sqrtm", lambda a, disp=True: sqrtm(a) if disp else (sqrtm(a), 0.0))
    for n in (400, 90):
        s, t = M.gaussian_stats(data(n, 64, 1)), M.gaussian_stats(data(500, 64, 2, 1.3, 0.1))
        plain = ((s[0] - t[0]) ** 2).sum() + np.trace(s[1]) + np.trace(t[1]) - 2 * np.trace(sqrtm(s[1] @ t[1])).real
        assert M.frechet_distance(*s, *t) == pytest.approx(plain, rel=1e-6)
        assert M.frechet_distance(*s, *t) == pytest.approx(fid.calculate_frechet_distance(*s, *t), rel=1e-6)


@pytest.mark.parametrize("n,m", [(20, 30), (20, 500), (500, 20), (2, 3)])
def test_frechet_rank_deficient(n, m):
    x, y = data(n, 64, 3).astype(np.float64), data(m, 64, 4, 2.0).astype(np.float64)
    X, Y = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    # tr (X^T X Y^T Y)^(1/2) is the nuclear norm of X Y^T: no square root of a zero eigenvalue anywhere
    true = ((x.mean(0) - y.mean(0)) ** 2).sum() + (X ** 2).sum() + (Y ** 2).sum() - 2 * np.linalg.norm(X @ Y.T, "nuc")
    assert M.frechet_distance(*M.gaussian_stats(x), *M.gaussian_stats(y)) == pytest.approx(true, rel=1e-6)


def test_frechet_identical_is_zero_and_never_negative():
    for n, seed in ((n, seed) for n in (10, 300) for seed in range(10)):
        x = data(n, 32, seed)
        s = M.gaussian_stats(x)
        assert M.frechet_distance(*s, *M.gaussian_stats(x.copy())) == 0.0
        assert 0 <= M.frechet_distance(*s, *M.gaussian_stats(x[::-1].copy())) < 1e-9 * np.trace(s[1])


def test_frechet_refuses():
    mu, S = np.zeros(3), np.eye(3)
    with pytest.raises(ValueError, match="do not match"):
        M.frechet_distance(mu, S, np.zeros(4), np.eye(4))
    with pytest.raises(ValueError, match="NaN"):
        M.frechet_distance(mu, S, mu, S * np.nan)
    with pytest.raises(ValueError, match="NaN"):
        M.gaussian_stats(np.full((5, 3), np.inf))
    with pytest.raises(ValueError, match="at least 2"):
        M.gaussian_stats(np.zeros((1, 3)))


def test_more_samples_of_a_class_are_judged_alone():
    """With twice the n of the real images, fd_all: the distance of all samples, by the mean and covariance of each class."""
    rng = np.random.default_rng(3)
    y, yr = np.repeat([0, 1], 90), np.repeat([0, 1], 40)
    x, ref = rng.normal(size=(180, 4)) + y[:, None], rng.normal(size=(80, 4)) + yr[:, None]
    r = M.per_class_frechet(x, y, ref, yr, 2)
    assert r["n"] == 40 and r["n_all"] == 90
    for c in range(2):
        a, b = x[y == c], ref[yr == c]
        root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
        want = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
        assert r["fd_all"][c] == pytest.approx(want, rel=1e-5)
    assert "fd_all" not in M.per_class_frechet(x[::2], y[::2], ref, yr, 2)


def test_per_class_frechet():
    x, ref, real = data(90, 5, 1), data(200, 5, 2), data(60, 5, 3)
    y, yr, yh = np.arange(90) % 3, np.arange(200) % 3, np.arange(60) % 3
    x[y == 1] += 5                                                    # class 1 is bad
    r = M.per_class_frechet(x, y, ref, yr, 3, 0, real, yh)
    assert r["n"] == 20 and r["disjoint"] and r["worst"] == 1 and r["worst_fd"] == r["fd"][1] == max(r["fd"])
    assert r["mean"] == pytest.approx(np.mean(r["fd"])) and r["real_mean"] == pytest.approx(np.mean(r["real"])) and max(r["real"]) < r["fd"][1]
    stats = lambda a: (a.mean(0), np.cov(a.astype(np.float64), rowvar=False))  # noqa: E731  all 20 real images of a class are used: no draw to repeat
    for c in range(3):
        assert r["real"][c] == pytest.approx(M.frechet_distance(*stats(real[yh == c]), *stats(ref[yr == c])), rel=1e-5)
    r = M.per_class_frechet(x, y, ref, yr, 3)
    assert r["n"] == 30 and not r["disjoint"]
    assert M.per_class_frechet(ref, yr, ref, yr, 3)["n"] == 66        # 67, 67, 66
    whole = M.per_class_frechet(ref[:198], yr[:198], ref[:198], yr[:198], 3)
    assert whole["fd"] == whole["real"] == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="class 3 has 0"):
        M.per_class_frechet(x, y, ref, yr, 4)
    with pytest.raises(ValueError, match="labels run"):
        M.per_class_frechet(x, y, ref, yr, 2)
    with pytest.raises(ValueError, match="widths differ"):
        M.per_class_frechet(x[:, :4], y, ref, yr, 3)


def test_bootstrap():
    x = np.random.default_rng(0).standard_normal(400)
    mean, std, low, high = M.bootstrap(lambda i: x[i].mean(), 400, repeats=400)
    assert mean == pytest.approx(x.mean(), abs=0.01) and std == pytest.approx(x.std() / 20, rel=0.15)       # closed form: sigma / sqrt(n)
    assert low == pytest.approx(mean - 1.96 * std, abs=0.02) and high == pytest.approx(mean + 1.96 * std, abs=0.02)
    z, ref = data(200, 8, 1), M.gaussian_stats(data(400, 8, 2))
    mean, std, low, high = M.bootstrap_frechet(z, *ref, repeats=10)
    assert low <= mean <= high and std > 0 and mean > M.frechet_distance(*M.gaussian_stats(z), *ref)        # the documented bias is upward
    assert M.bootstrap_frechet(z, *ref, repeats=10) == (mean, std, low, high)


# ---------------------------------------------------------------------------------------------- KID and IS
def test_mmd_equals_loops_and_sklearn():
    x, y = data(13, 6, 1).astype(np.float64), data(17, 6, 2).astype(np.float64)
    k = lambda a, b: (a @ b / 6 + 1) ** 3  # noqa: E731
    loop = (sum(k(x[i], x[j]) for i in range(13) for j in range(13) if i != j) / (13 * 12)
            + sum(k(y[i], y[j]) for i in range(17) for j in range(17) if i != j) / (17 * 16)
            - 2 * sum(k(a, b) for a in x for b in y) / (13 * 17))
    assert M.mmd2_unbiased(x, y) == pytest.approx(loop, rel=1e-10)
    K = pytest.importorskip("sklearn.metrics.pairwise").polynomial_kernel
    off = lambda a: (K(a).sum() - np.trace(K(a))) / (len(a) * (len(a) - 1))  # noqa: E731  sklearn's defaults: degree 3, gamma 1/D, coef0 1
    assert M.mmd2_unbiased(torch.tensor(x), torch.tensor(y)) == pytest.approx(off(x) + off(y) - 2 * K(x, y).mean(), rel=1e-10)


@pytest.mark.parametrize("n, k, m", [(60, 90, 40), (60, 60, 60), (50, 50, 2)])
def test_kid_from_one_kernel_is_kid_of_each_subset(n, k, m):
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(n, 7)), rng.normal(size=(k, 7)) + 0.3
    rows = [[rng.choice(len(a), m, replace=False) for _ in range(6)] for a in (x, y)]
    each = [M.mmd2_unbiased(x[a], y[b]) for a, b in zip(*rows)]
    assert M.mmd2_of_subsets(x, y, *rows) == pytest.approx(each, rel=1e-9, abs=1e-12)


def test_kid():
    x, y, z = data(400, 6, 1), data(300, 6, 1), data(400, 6, 1, 1.5)
    mean, se, size = M.kid(x, z, subsets=50, subset_size=1000)
    assert size == 400 and mean == pytest.approx(M.mmd2_unbiased(x, z), rel=1e-9) and se == pytest.approx(0, abs=1e-9)   # nothing left to vary
    mean, se, size = M.kid(x, z, subsets=50, subset_size=100)
    assert size == 100 and abs(mean - M.mmd2_unbiased(x, z)) < 4 * se and se > 0
    assert M.kid(x, z, subsets=50, subset_size=100) == (mean, se, size) != M.kid(x, z, subsets=50, subset_size=100, seed=1)
    assert M.kid(x, y, subsets=2)[2] == 300 and 0.4 < M.kid(x, z, subsets=200, subset_size=100)[1] / se < 0.6       # 1 / sqrt(subsets)
    # unbiased: two sets from one law average 0, a biased estimator would stand at about E k(x, x) / m
    law = [M.mmd2_unbiased(*np.random.default_rng(s).standard_normal((2, 20, 6))) for s in range(400)]
    assert abs(np.mean(law)) < 3 * np.std(law) / 20
    with pytest.raises(ValueError, match="widths differ"):
        M.kid(x, z[:, :3])


def test_inception_score_equals_a_loop():
    logits = 3 * np.random.default_rng(0).standard_normal((103, 7))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    parts = []
    for s in range(5):
        q = p[103 * s // 5:103 * (s + 1) // 5]
        marginal = [sum(row[c] for row in q) / len(q) for c in range(7)]
        parts.append(np.exp(sum(row[c] * np.log(row[c] / marginal[c]) for row in q for c in range(7)) / len(q)))
    for given in (logits, p, torch.tensor(logits)):
        assert M.inception_score(given, splits=5) == pytest.approx((np.mean(parts), np.std(parts)), rel=1e-10)
    assert M.inception_score(np.eye(10)[np.arange(200) % 10], splits=2) == pytest.approx((10, 0), abs=1e-9)      # zeros in p: 0 log 0 = 0


# ---------------------------------------------------------------------------------------------- neighbours
def brute(x, y):
    return np.array([[np.sqrt(((a - b) ** 2).sum()) for b in y] for a in x.astype(np.float64)])


@pytest.mark.parametrize("chunk", [7, 50, 4096])
def test_knn_equals_loops(chunk):
    x, y = data(41, 5, 1), data(63, 5, 2)
    d = brute(x, y)
    dist, index = M.knn(x, y, 4, chunk=chunk)
    assert (index == np.argsort(d, 1, kind="stable")[:, :4]).all()
    np.testing.assert_allclose(dist, np.sort(d, 1)[:, :4], rtol=1e-12)
    d = brute(y, y)
    np.fill_diagonal(d, np.inf)
    dist, index = M.knn(torch.from_numpy(y), torch.from_numpy(y), 62, exclude_self=True, chunk=chunk)
    assert (index == np.argsort(d, 1, kind="stable")[:, :62]).all()


def test_knn_ties_repeats_and_self():
    y = np.array([[0.0], [0], [1], [-1], [1]])
    dist, index = M.knn(y, y, 4, exclude_self=True, chunk=2)
    assert index[0].tolist() == [1, 2, 3, 4] and dist[0].tolist() == [0, 1, 1, 1]       # the repeat is a neighbour, the point itself is not
    assert index[4].tolist() == [2, 0, 1, 3] and dist[4].tolist() == [0, 1, 1, 2]
    for bad in (0, 5):
        with pytest.raises(ValueError, match="neighbours asked for"):
            M.knn(y, y, bad, exclude_self=True)


def test_knn_keeps_near_duplicates_apart():
    """Rows 1e-4 to 6e-4 apart, far from the origin and from each other's clusters: |x|^2 + |y|^2 - 2 x.y alone orders them at random."""
    rng = np.random.default_rng(0)
    centres = 100 + 10 * rng.standard_normal((20, 64))
    step = rng.standard_normal((20, 64))
    step /= np.linalg.norm(step, axis=1, keepdims=True)
    y = np.concatenate([centres + s * 1e-4 * step for s in (1, 2, 3, 4, 5, 6)])
    dist, index = M.knn(centres, y, 2)
    assert (index == np.arange(20)[:, None] + 20 * np.arange(2)).all()
    np.testing.assert_allclose(dist, np.tile(np.arange(1, 3) * 1e-4, (20, 1)), rtol=1e-6)


def loops(real, fake, k):
    """The four definitions, word for word: NN_k excludes the point itself; rim in for precision and recall, out for density and coverage."""
    rr, ff, rf = brute(real, real), brute(fake, fake), brute(real, fake)
    radius = lambda d, i: sorted(d[i][j] for j in range(len(d)) if j != i)[k - 1]  # noqa: E731
    R, F = [radius(rr, i) for i in range(len(real))], [radius(ff, j) for j in range(len(fake))]
    n, m = rf.shape
    return dict(precision=sum(any(rf[i][j] <= R[i] for i in range(n)) for j in range(m)) / m,
                recall=sum(any(rf[i][j] <= F[j] for j in range(m)) for i in range(n)) / n,
                density=sum(rf[i][j] < R[i] for i in range(n) for j in range(m)) / (k * m),
                coverage=sum(min(rf[i]) < R[i] for i in range(n)) / n)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("kind", ["normal", "integer grid"])
def test_precision_recall_density_coverage_equal_loops(k, kind):
    if kind == "normal":
        real, fake = data(60, 3, 1), data(45, 3, 2, 0.8, 0.5)
    else:                                                             # many exact ties: every rim decision counts
        real, fake = (np.random.default_rng(s).integers(0, 4, (n, 3)).astype(np.float32) for s, n in ((1, 60), (2, 45)))
    got = M.precision_recall(real, fake, k) | M.density_coverage(torch.from_numpy(real), fake, k)
    true = loops(real, fake, k)
    assert got == pytest.approx(true, abs=1e-12) and (k == 1 or 0 < true["recall"] < 1 or kind != "normal")


def test_identical_sets_and_repeats():
    x = data(300, 16)
    assert M.precision_recall(x, x.copy()) == dict(precision=1.0, recall=1.0)
    assert M.density_coverage(x, x.copy()) == dict(density=1.0, coverage=1.0)
    far = data(300, 16, 5) + 100
    assert M.precision_recall(x, far) == dict(precision=0.0, recall=0.0) and M.density_coverage(x, far) == dict(density=0.0, coverage=0.0)
    repeats = np.repeat(data(60, 16, 7), 5, axis=0)                   # radius 0 everywhere: recall 0 whatever the diversity
    assert M.precision_recall(x, repeats)["recall"] == 0 < M.precision_recall(x, repeats)["precision"]
    with pytest.raises(ValueError, match="at least 4"):
        M.precision_recall(x, x[:3])


def test_distances_ignore_a_training_script_s_tf32_setting():
    torch.set_float32_matmul_precision("high")
    try:
        M.knn(data(9, 3), data(9, 3), 2)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


# ---------------------------------------------------------------------------------------------- memorisation audit
def digits():
    """(train images, labels, held-out images): uint8 (N, 8, 8, 1), 1 500 / 297 stratified."""
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    split = pytest.importorskip("sklearn.model_selection").train_test_split
    x = np.rint(bunch.images * 255 / 16).astype(np.uint8)[..., None]
    train, held, y, y_held = split(x, bunch.target, test_size=297, stratify=bunch.target, random_state=0)
    return train, y, held, y_held


def pixels(images):
    return images.reshape(len(images), -1) / 127.5 - 1


def pick(y, per_class, seed=0):
    rng = np.random.default_rng(seed)
    return np.sort(np.concatenate([rng.choice(np.flatnonzero(y == c), per_class, replace=False) for c in range(10)]))


def test_audit_controls_on_digits():
    train, y, held, _ = digits()
    keep = pick(y, 15)
    rest = np.setdiff1d(np.arange(1500), keep)
    half = np.concatenate([held[:148], train[keep][:149]])            # a model that copies half of the time
    a = memorisation_audit(pixels, half, train[keep], y[keep], train[rest], y[rest], heldout=held, baseline=held[::2])
    assert 0.45 <= a["heldout"]["share"] <= 0.55 and a["noise"]["share"] > 0.95 and a["samples"]["n"] == 150
    assert 0.70 <= a["samples"]["share"] <= 0.80 and set(a) == {"samples", "heldout", "noise", "baseline"}
    assert a["heldout"]["ratio"]["share"] < 0.1 and a["noise"]["ratio"]["share"] > 0.9 and a["samples"]["ratio"]["neighbours"] == 50
    assert 1e-3 < a["heldout"]["spread"] < 0.1


def test_most_alike_finds_the_kind_of_the_subset_and_favours_none_for_a_random_one():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 6000)
    x = rng.normal(size=(6000, 3)) * (1 + y[:, None]) + 5 * y[:, None]
    train, test, yt, yh = x[:4000], x[4000:], y[:4000], y[4000:]
    r = np.linalg.norm((x - 5 * y[:, None]) / (1 + y[:, None]), axis=1)                                # distance to the centre of the class
    inner = np.flatnonzero(r[:4000] < 1)
    rows = most_alike(test, yh, train[inner], yt[inner], train, yt, 0.1)
    assert (np.bincount(yh[rows]) == [math.ceil(0.1 * n) for n in np.bincount(yh)]).all() and (np.diff(rows) > 0).all()
    for c in (0, 1):                                                  # those of the subset's kind: near the centre, whatever the class is like
        assert r[4000:][rows[yh[rows] == c]].max() < np.quantile(r[4000:][yh == c], 0.15)
    drawn = np.sort(rng.choice(4000, 400, replace=False))
    rows = most_alike(test, yh, train[drawn], yt[drawn], train, yt, 0.1)
    nearer = brute(test[rows], train[drawn]).min(1) < brute(test[rows], train[np.setdiff1d(np.arange(4000), drawn)[:400]]).min(1)
    assert 0.4 < nearer.mean() < 0.6                                  # nothing to tell a random subset by: its figure stays one half
    # the log-ratio in scipy's words, on features whitened by the class with a root of another kind
    from scipy.linalg import sqrtm
    from scipy.stats import multivariate_normal as normal

    def u(a, of, c):
        full = train[yt == c]
        sigma = np.cov(full.T)
        return (a[of == c] - full.mean(0)) @ np.linalg.inv(sqrtm(sigma + 1e-3 * np.trace(sigma) / 3 * np.eye(3)).real)
    own = np.concatenate([u(train[inner], yt[inner], c) for c in (0, 1)])
    rows = most_alike(test, yh, train[inner], yt[inner], train, yt, 0.05)
    for c in (0, 1):
        x, mine = u(test, yh, c), np.flatnonzero(yh == c)
        want = normal(own.mean(0), np.cov(own.T)).logpdf(x) - normal(np.zeros(3)).logpdf(x)
        m = math.ceil(0.05 * len(mine))
        assert len(set(mine[np.argsort(-want)[:m]]) & set(rows)) >= m - 2           # (each class was whitened by a rotation of this root: nearly the same pooled Gaussian)
    assert len(most_alike(test, yh, train[:2], yt[:2], train, yt, 0.01)) == sum(math.ceil(0.01 * (yh == c).sum()) for c in set(yt[:2]))
    assert most_alike(test, yh, train[:2], np.array([0, 1]), train[:1], yt[:1], 0.5).size == 0


def test_audit_of_vectors_that_stay_on_a_device_is_the_same():
    """On a GPU the vectors are tensors there, and their rows are converted where they lie."""
    train, y, held, _ = digits()
    keep = pick(y, 5)
    rest = np.setdiff1d(np.arange(1500), keep)
    args = held[:60], train[keep], y[keep], train[rest], y[rest]
    a, b = (memorisation_audit(encode, *args, heldout=held[60:90], draws=3) for encode in (pixels, lambda x: torch.from_numpy(pixels(x))))
    assert a == b


def test_audit_of_a_model_of_the_full_set():
    """The held-out split is the pool; the training set is redrawn. A perfect copier reaches about 0.5 + 297/1500/2, as documented."""
    train, y, held, y_held = digits()
    a = memorisation_audit(pixels, train[::3], train, y, held, y_held)
    assert set(a) == {"samples", "noise"} and a["samples"]["n"] <= 297
    assert 0.55 < a["samples"]["share"] < 0.65 and 0.55 < a["noise"]["share"] < 0.65


def test_matched_set_test_equals_a_loop_and_counts_ties_half():
    subset, pool, z = data(6, 3, 1), data(6, 3, 2), data(40, 3, 3)
    y = np.array([0, 0, 0, 1, 1, 1])
    share = np.mean([float(a < b) for a, b in zip(brute(z, subset).min(1), brute(z, pool).min(1))])
    r = matched_set_test(z, subset, y, pool, y)
    assert r == pytest.approx(dict(share=share, spread=0, n=6), abs=1e-12)                              # both sides whole: nothing to draw
    assert matched_set_test(z, subset, y, subset, y)["share"] == 0.5
    # 1 of class 0 and 3 of class 1 against a pool of 3 and 2: n = 1 + 2, both sides redrawn
    r = matched_set_test(*(torch.from_numpy(v) for v in (z, subset[2:], y[2:], pool[:5], y[:5])))
    assert r["n"] == 3 and r["spread"] > 0
    # class-matched: a pool whose only images near z belong to a class that the subset lacks must not enter
    near = np.concatenate([pool + 50, z[:3]])
    assert matched_set_test(z, subset, y, near, np.array([0, 0, 0, 1, 1, 1, 2, 2, 2]))["share"] == 1.0
    with pytest.raises(ValueError, match="no image of class 1"):
        matched_set_test(z, subset, y, pool[:3], y[:3])


def test_nearest_and_ratio_equal_loops():
    z, t = data(400, 2, 1), data(80, 2, 2)
    d = np.sort(brute(z, t), 1)
    share = np.mean([row[0] < np.mean(row[1:51]) / 3 for row in d])
    assert nn_ratio_share(z, t) == pytest.approx(dict(share=share, neighbours=50, threshold=1 / 3)) and 0 < share < 1
    assert nn_ratio_share(z, t[:20])["neighbours"] == 19
    dist, index = M.nearest(z, t)
    assert (index == brute(z, t).argmin(1)).all() and dist.shape == (400,)


@pytest.mark.slow
def test_knn_memory_does_not_grow_with_the_product_of_the_sizes():
    """8 000 x 8 000: the matrix alone would be 256 MB in fp32; inputs are 2 x 8 MB."""
    code = """
import resource, numpy as np, torch
from models.metrics import knn
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
x = np.random.default_rng(0).standard_normal((8000, 256), dtype=np.float32)
knn(x[:1000], x[:1000], 3, chunk=1000)
before = peak()
knn(x, x, 3, True, chunk=1000)
print(peak() - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert int(out.stdout) < 100_000                                  # kB
