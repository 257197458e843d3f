"""prune.py: each score against scikit-learn or a plain loop, counts, ties, resume, and one clear line for each mistake."""
import hashlib
import json
import math
import subprocess
import sys
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import common
import models.encoders
import models.scratch
import prune
from conftest import processes
from models import chunked

ROOT = Path(prune.__file__).parent


def make_data(folder, sizes=(9, 14, 6), side=8, seed=0, channels=1):
    """A data folder as data.py writes it, classes interleaved."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int64)
    images = (rng.integers(0, 120, (len(labels), side, side, channels)) + 40 * labels[:, None, None, None]).astype(np.uint8)
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    (folder / "classes.txt").write_text("".join(f"class{c}\n" for c in range(len(sizes))))
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    (folder / "dataset.json").write_text(json.dumps({"name": "test", "sha256": digest}))
    return folder


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "data")


def run(data, out, *flags):
    prune.main(["--data", str(data), "--out", str(out), "--device", "cpu", *map(str, flags)])
    return np.load(out / "scores.npy"), np.load(out / "keep.npy")


def refused(capsys, data, out, *flags):
    """The one line of an exit with code 2 that left nothing behind."""
    with pytest.raises(SystemExit) as e:
        run(data, out, *flags)
    text = capsys.readouterr().err.strip()
    assert e.value.code == 2 and "\n" not in text and text.startswith("prune.py: error:") and not out.exists(), text
    return text


def features(n, D=12, seed=0, duplicates=False):
    z = np.random.default_rng(seed).normal(size=(n, D)) @ np.random.default_rng(1).normal(size=(D, D)) + 3
    if duplicates:
        z[n // 2:] = z[:n - n // 2]
    return z.astype(np.float32)


def tie_of(n, seed=7):
    return np.random.default_rng(seed).permutation(n)


# ---------------------------------------------------------------------------------------------- the scores
@pytest.mark.parametrize("n, D", [(200, 12), (40, 40), (41, 40), (39, 40), (25, 60)])
def test_gaussian_is_sklearns(n, D, monkeypatch):
    from sklearn.mixture import GaussianMixture
    z = features(n, D).astype(np.float64)
    want = GaussianMixture(1, reg_covar=1e-5, means_init=z.mean(0)[None]).fit(z).score_samples(z)
    chunks = chunked.chunks
    monkeypatch.setattr(chunked, "chunks", lambda z, width=0: chunks(z, width, limit=8 * D * 7))   # seven rows at a time
    got = prune.gaussian_score(chunked.LazyRows(features(n, D), np.arange(n)))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    if n > D:
        assert (np.argsort(got) == np.argsort(want)).all()


def test_gaussian_order_survives_fewer_images_than_dimensions():
    from fractions import Fraction
    z = np.random.default_rng(3).integers(-4, 5, (5, 9))              # the same formula in exact arithmetic
    n, D = z.shape
    x = [[Fraction(int(v)) - Fraction(int(z[:, j].sum()), n) for j, v in enumerate(r)] for r in z]
    eps = Fraction(1e-5)
    S = [[sum(r[i] * r[j] for r in x) / n + (eps if i == j else 0) for j in range(D)] for i in range(D)]
    maha = []
    for r in x:                                                       # solve S y = r by elimination
        A = [row[:] + [v] for row, v in zip(S, r)]
        for k in range(D):
            A[k] = [v / A[k][k] for v in A[k]]
            for i in range(D):
                if i != k:
                    A[i] = [a - A[i][k] * b for a, b in zip(A[i], A[k])]
        maha.append(sum(v * A[i][D] for i, v in enumerate(r)))
    got = prune.gaussian_score(z.astype(np.float32))
    differences = [float(-(m - maha[0]) / 2) for m in maha]           # about 1e-6 of the distances themselves
    np.testing.assert_allclose(got - got[0], differences, rtol=1e-4, atol=1e-12)


def test_gaussian_refuses_what_float64_cannot_hold():
    z = np.tile([[2.0**40, 2.0**40], [-2.0**40, -2.0**40]], (5, 1))   # two equal columns of variance 2^80, exact in float64: the ridge is lost
    with pytest.raises(ValueError, match="scale them down"):
        prune.gaussian_score(z)


@pytest.mark.parametrize("n", [1, 2, 11, 30])
@pytest.mark.parametrize("duplicates", [False, True])
def test_moderate_is_the_plain_loop(n, duplicates):
    z, tie = features(n, 5, duplicates=duplicates), tie_of(n)
    median = [sorted(z[:, j].tolist()) for j in range(5)]
    median = [(c[(n - 1) // 2] + c[n // 2]) / 2 for c in median]
    d = [math.sqrt(sum((float(v) - c) ** 2 for v, c in zip(r, median))) for r in z]
    want = [-abs(sum((d[j], tie[j]) < (d[i], tie[i]) for j in range(n)) - (n - 1) / 2) for i in range(n)]
    assert prune.middle_band(prune.median_distance(z), tie).tolist() == want
    lazy = chunked.LazyRows(np.concatenate([z, z + 1]), np.arange(n))
    assert prune.middle_band(prune.median_distance(lazy), tie).tolist() == want
    groups = np.zeros(n, np.int64)
    assert prune.score_all("moderate", groups, [n], tie, 0, z).tolist() == want


def plain_kcenter(z, m, tie):
    dist = lambda a, b: sum((float(x) - float(y)) ** 2 for x, y in zip(a, b))
    mean = z.astype(np.float64).mean(0)
    picked = [min(range(len(z)), key=lambda i: (dist(z[i], mean), tie[i]))]
    while len(picked) < m:
        picked.append(min((i for i in range(len(z)) if i not in picked), key=lambda i: (-min(dist(z[i], z[p]) for p in picked), tie[i])))
    return picked


def plain_herding(z, m, tie):
    """iCaRL's Eq. 4 as it stands."""
    z = z.astype(np.float64)
    mu = z.mean(0)
    picked = []
    for k in range(1, m + 1):
        def distance(i):
            return round(float(np.linalg.norm(mu - (z[i] + sum(z[j] for j in picked)) / k)), 9)
        picked.append(min((i for i in range(len(z)) if i not in picked), key=lambda i: (distance(i), tie[i])))
    return picked


def plain_welling(z, m, tie):
    """Welling 2009, Eq. 5 and 6: by inner products."""
    z = z.astype(np.float64)
    mu = z.mean(0)
    w, picked = mu.copy(), []
    for _ in range(m):
        i = max((i for i in range(len(z)) if i not in picked), key=lambda i: (round(float(w @ z[i]), 9), -tie[i]))
        picked.append(i)
        w = w + mu - z[i]
    return picked


def plain_ccs(d, m, tie):
    n = len(d)
    order = sorted(range(n), key=lambda i: (d[i], tie[i]))
    order = order[:n - min(int(0.1 * n), n - m)]
    lo, hi = min(d[i] for i in order), max(d[i] for i in order)
    strata = [[] for _ in range(50)]
    for i in order:
        strata[min(int(50 * ((d[i] - lo) / (hi - lo))), 49) if hi > lo else 0].append(i)
    picked, left = [], m
    while strata:
        smallest = min(strata, key=len)                               # first among equals, as a stable sort has it
        share = min(len(smallest), left // len(strata))
        picked += sorted(smallest, key=lambda i: tie[i])[:share]
        left -= share
        strata.pop(next(k for k, s in enumerate(strata) if s is smallest))
    return picked


def order_of(score):
    """The picks in their order, read off the scores."""
    picked = np.flatnonzero(np.isfinite(score))
    assert sorted(-score[picked]) == list(range(len(picked)))
    return picked[np.argsort(-score[picked])].tolist()


def test_scores_of_picks_are_their_places():
    z, tie = features(24, 5), tie_of(24)
    for name, source in (("kcenter", z), ("herding", z), ("cluster", z), ("ccs", z[:, 0])):
        given = {"difficulty" if name == "ccs" else "features": source}
        picked = prune.SCORES[name].function(source, 9, tie, np.random.default_rng([3, 0]))
        score = prune.score_all(name, np.zeros(24, np.int64), [9], tie, 3, **given)
        assert order_of(score) == list(picked) and len(picked) == 9


@pytest.mark.parametrize("m", [1, 2, 9, 24])
@pytest.mark.parametrize("picks, plain", [(prune.kcenter_picks, plain_kcenter), (prune.herding_picks, plain_herding)])
def test_pickers_are_the_plain_loops(picks, plain, m):
    z, tie = features(24, 5), tie_of(24)
    assert picks(z, m, tie) == plain(z, m, tie)
    integers = np.random.default_rng(5).integers(0, 3, (24, 2)).astype(np.float32) * 4             # many exact ties and duplicates
    integers = np.concatenate([integers, 8 - integers])               # mean exactly (4, 4)
    assert picks(integers, m, tie_of(48)) == plain(integers, m, tie_of(48))


def test_herding_by_distance_and_by_inner_products():
    """The same on features of length one; where lengths differ the running mean stays far nearer to the class mean."""
    z, tie = features(60, 5), tie_of(60)
    one = z / np.linalg.norm(z, axis=1, keepdims=True)
    assert prune.herding_picks(one, 25, tie) == plain_welling(one, 25, tie)
    long = one * np.random.default_rng(1).uniform(0.5, 4, (60, 1)) + 1
    far = lambda picked: np.linalg.norm(long.mean(0) - long[picked].mean(0))
    assert [far(prune.herding_picks(long, m, tie)) < far(plain_welling(long, m, tie)) for m in (1, 2, 5, 10, 25)] == [True] * 5
    assert far(prune.herding_picks(long, 10, tie)) < 0.5 * far(plain_welling(long, 10, tie))


@pytest.mark.parametrize("n, m", [(1, 1), (40, 1), (40, 17), (40, 36), (40, 37), (40, 40), (500, 250)])
@pytest.mark.parametrize("kind", ["spread", "skewed", "equal"])
def test_ccs_is_the_plain_loop(n, m, kind):
    d = np.random.default_rng(2).random(n) ** (4 if kind == "skewed" else 1) * (kind != "equal")
    got = prune.ccs_picks(d, m, tie_of(n))
    assert got == plain_ccs(d.tolist(), m, tie_of(n)) and len(got) == m
    if kind == "spread" and n == 500:
        assert not set(got) & set(np.argsort(d)[-50:])                # the hardest tenth is gone
        assert len({int(50 * v / 0.9) for v in d[got]}) >= 49         # every stratum is there


@pytest.mark.parametrize("m", [1, 5, 30])
def test_cluster_takes_the_nearest_to_each_centre(m):
    z, tie = features(30, 4), tie_of(30)
    C, sizes = chunked.kmeans(z, m, np.random.default_rng(3))
    want = []
    for j in sorted(range(m), key=lambda j: (-sizes[j], j)):
        want.append(min((i for i in range(30) if i not in want), key=lambda i: float(((z[i] - C[j]) ** 2).sum())))
    assert prune.cluster_picks(z, m, tie, np.random.default_rng(3)) == want


def test_kmeans_finds_separate_blobs_and_stands_duplicates():
    rng = np.random.default_rng(0)
    where = np.array([[0, 0], [50, 0], [0, 50], [50, 50]])
    z = (where[np.arange(80) % 4] + rng.normal(size=(80, 2))).astype(np.float32)
    for seed in range(20):                                            # centres drawn evenly miss a blob in most runs, and Lloyd rarely mends it
        C, sizes = chunked.kmeans(z, 4, np.random.default_rng(seed))
        assert sorted(sizes) == [20] * 4
    for w in where:
        np.testing.assert_allclose(C[((C - w) ** 2).sum(1).argmin()], z[(np.arange(80) % 4) == where.tolist().index(w.tolist())].mean(0), rtol=1e-6)
    inertia = ((z[:, None] - C) ** 2).sum(2).min(1).sum()
    from sklearn.cluster import KMeans
    assert inertia <= KMeans(4, n_init=3, random_state=0).fit(z).inertia_ * (1 + 1e-6)
    picked = prune.cluster_picks(np.ones((6, 3), np.float32), 4, tie_of(6), rng)
    assert len(set(picked)) == len(picked) == 4


def test_chunked_reading_changes_nothing(monkeypatch):
    z = features(60, 6)
    index = np.sort(np.random.default_rng(0).permutation(60)[:37])
    tie = tie_of(37)
    calls = [prune.gaussian_score, prune.median_distance, lambda z: prune.kcenter_picks(z, 9, tie), lambda z: prune.herding_picks(z, 9, tie),
             lambda z: prune.cluster_picks(z, 9, tie, np.random.default_rng(1))]
    whole = [call(z[index]) for call in calls]
    chunks = chunked.chunks
    monkeypatch.setattr(chunked, "chunks", lambda z, width=0: chunks(z, width, limit=8 * 6 * 5))
    for want, call in zip(whole, calls):
        np.testing.assert_allclose(call(chunked.LazyRows(z, index)), want, rtol=1e-9)


def test_rows_beyond_memory_are_read_when_they_are_sliced():
    z, rows = features(60, 6), np.arange(3, 40, 2)
    assert isinstance(chunked.rows_of(z, rows), np.ndarray) and isinstance(chunked.rows_of(z[:, 0], rows, most=1), np.ndarray)
    lazy = chunked.rows_of(z, rows, most=len(rows) * 6)
    assert isinstance(lazy, chunked.LazyRows) and lazy.shape == (len(rows), 6)
    assert np.array_equal(lazy[2:7, 1:3], z[rows][2:7, 1:3]) and lazy[:].dtype == np.float64
    within = np.flatnonzero(rows > 20)                                # rows of rows
    assert np.array_equal(chunked.LazyRows(lazy, within)[:], z[rows[within]])


# ---------------------------------------------------------------------------------------------- counts
@pytest.mark.parametrize("seed", range(6))
def test_counts_are_exact_for_every_score_and_ratio(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 25, rng.integers(2, 6))
    groups = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    n, tie = len(groups), rng.permutation(len(groups))
    z, difficulty = rng.integers(0, 4, (n, 3)).astype(np.float32), rng.integers(0, 6, n) / 6       # ties everywhere
    for name in prune.SCORES:
        for keep in (0.01, 0.1, 0.5, rng.random(), 1.0):
            m = prune.counts_to_keep(sizes, keep)
            assert m.tolist() == [max(1, int((Decimal(str(float(keep))) * int(s)).to_integral_value(ROUND_HALF_UP))) for s in sizes]
            scores = prune.score_all(name, groups, m, tie, seed, z, difficulty)
            kept = prune.top(scores, groups, m, tie)
            assert scores.shape == (n,) and scores.dtype == np.float64 and kept.dtype == np.int64 and not np.isnan(scores).any()
            assert (np.bincount(groups[kept], minlength=len(sizes)) == m).all() and (np.diff(kept) > 0).all()
            for c in range(len(sizes)):
                mine = np.flatnonzero(groups == c)
                inside = np.isin(mine, kept)
                assert scores[mine[inside]].min() > -np.inf
                if not inside.all():
                    assert scores[mine[inside]].min() >= scores[mine[~inside]].max()


def test_ties_are_broken_by_the_seed():
    groups, m = np.zeros(100, np.int64), np.array([30])
    a, b = (prune.top(np.zeros(100), groups, m, tie_of(100, s)) for s in (0, 1))
    assert (a == np.sort(np.argsort(tie_of(100, 0))[:30])).all() and not (a == b).all() and (a[0] != 0 or a[-1] != 29)


def test_a_half_is_rounded_up():
    assert prune.counts_to_keep([90, 170, 330, 50, 1, 5000], 0.35).tolist() == [32, 60, 116, 18, 1, 1750]       # 0.35 * 90 < 31.5 in floats
    assert prune.counts_to_keep([50, 10], 0.29).tolist() == [15, 3] and prune.counts_to_keep([1797], 1e-9).tolist() == [1]


@pytest.mark.parametrize("name", ["gaussian", "moderate"])
def test_global_scope_measures_within_the_class_and_ranks_all(name):
    """Classes far apart: a Gaussian or a median of the whole set would tell classes apart, not the typical from the odd within each."""
    from sklearn.mixture import GaussianMixture
    rng = np.random.default_rng(2)
    labels = rng.permutation(np.repeat([0, 1, 2], [40, 60, 80]))
    z = rng.normal(size=(180, 3)) * (1 + labels[:, None]) + 50 * labels[:, None]
    tie, want = tie_of(180), np.empty(180)
    for c in range(3):
        x = z[labels == c]
        if name == "gaussian":
            want[labels == c] = GaussianMixture(1, reg_covar=1e-5).fit(x).score_samples(x)
        else:
            want[labels == c] = np.sqrt(((x - np.median(x, 0)) ** 2).sum(1))
    if name == "moderate":                                            # one sort over all classes, as the published code does
        order = sorted(range(180), key=lambda i: (want[i], tie[i]))
        want = np.array([-abs(order.index(i) - 89.5) for i in range(180)])
    got = prune.score_all(name, np.zeros(180, np.int64), np.array([18]), tie, 0, z, labels=labels)
    np.testing.assert_allclose(got, want, rtol=1e-6)


# ---------------------------------------------------------------------------------------------- the script
@pytest.fixture
def no_training(monkeypatch):
    """el2n without its networks."""
    def el2n(images, labels, num_classes, device, epochs, seeds=3):
        assert images.dtype == np.uint8 and num_classes == 3 and epochs == 4
        return np.random.default_rng(11).random(len(images))
    monkeypatch.setattr(models.scratch, "el2n", el2n)


def forbid(monkeypatch, *names):
    for name in names:
        module = models.scratch if name == "el2n" else models.encoders
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail(f"{name} was called"))


@pytest.mark.parametrize("score", prune.SCORES)
def test_every_score_through_the_script(data, tmp_path, score, monkeypatch, no_training, capsys):
    if score in ("random", "el2n", "ccs"):
        forbid(monkeypatch, "load", "extract")
    out = tmp_path / "out"
    scores, keep = run(data, out, "--surrogate", "pixels", "--score", score, "--keep", 0.4, "--el2n-epoch", 4)
    labels = np.load(data / "labels.npy")
    assert scores.dtype == np.float64 and keep.dtype == np.int64 and np.bincount(labels[keep]).tolist() == [4, 6, 2]
    for c in range(3):
        mine = np.flatnonzero(labels == c)
        assert scores[np.intersect1d(mine, keep)].min() >= scores[np.setdiff1d(mine, keep)].max()
    assert (out / "montage.png").stat().st_size > 1000 and (out / "scores.png").stat().st_size > 1000
    assert (out / "features.npy").exists() == (prune.SCORES[score].needs == "features") and not (out / "features.part.npy").exists()
    record = json.loads((out / "prune.args.json").read_text())
    assert record["looked_at"] == prune.SCORES[score].needs and "looked_at" not in record["args"]
    assert record["kept"] == 12 and record["seconds_scores"] >= 0 and (record["seconds_features"] > 0) == (prune.SCORES[score].needs == "features")
    assert "kept 12 of 29 images (41.4 %), per class 2..6" in capsys.readouterr().out
    if score == "random":
        assert len(set(scores.tolist())) == 29
    if score == "el2n":
        assert (scores == np.random.default_rng(11).random(29)).all()
    forbid(monkeypatch, "load", "extract", "el2n")                    # once more: nothing to do
    before = (out / "keep.npy").stat().st_mtime_ns
    run(data, out, "--surrogate", "pixels", "--score", score, "--keep", 0.4, "--el2n-epoch", 4, "--batch-size", 3)
    assert "nothing to do" in capsys.readouterr().out and (out / "keep.npy").stat().st_mtime_ns == before


def test_random_is_of_the_seed_and_nested(data, tmp_path):
    a = run(data, tmp_path / "a", "--score", "random", "--keep", 0.3)
    b = run(data, tmp_path / "b", "--score", "random", "--keep", 0.3)
    c = run(data, tmp_path / "c", "--score", "random", "--keep", 0.3, "--seed", 1)
    d = run(data, tmp_path / "d", "--score", "random", "--keep", 0.6)
    assert (a[0] == b[0]).all() and (a[1] == b[1]).all() and not (a[0] == c[0]).all() and np.isin(a[1], d[1]).all()


def test_scope_and_per_class(data, tmp_path):
    z = features(29, 4)
    np.save(tmp_path / "z.npy", z)
    scores, keep = run(data, tmp_path / "a", "--features", tmp_path / "z.npy", "--score", "gaussian", "--scope", "global", "--keep", 0.5)
    labels = np.load(data / "labels.npy")
    for c in range(3):                                                # measured within the class ...
        np.testing.assert_allclose(scores[labels == c], prune.gaussian_score(z[labels == c]))
    assert set(keep) == set(np.argsort(-scores)[:15])                 # ... ranked over all: floor(14.5 + 0.5)
    scores, keep = run(data, tmp_path / "b", "--features", tmp_path / "z.npy", "--score", "kcenter", "--per-class", 6)
    assert np.bincount(labels[keep]).tolist() == [6, 6, 6] and np.isfinite(scores).sum() == 18
    assert (np.isfinite(scores[labels == 2])).all()                   # all six of the smallest class
    again, kept = run(data, tmp_path / "c", "--scores", tmp_path / "b" / "scores.npy", "--per-class", 2)
    assert np.array_equal(again, scores) and set(kept) == set(np.flatnonzero(scores >= -1))


def test_ccs_over_reused_el2n(data, tmp_path, monkeypatch):
    forbid(monkeypatch, "load", "extract", "el2n")
    d = np.random.default_rng(0).random(29)
    np.save(tmp_path / "el2n.npy", d)
    scores, keep = run(data, tmp_path / "out", "--scores", tmp_path / "el2n.npy", "--score", "ccs", "--scope", "global", "--keep", 0.6)
    assert len(keep) == 17 and not np.isin(np.argsort(d)[-2:], keep).any()


def test_interrupted_extraction_goes_on_where_it_stopped(data, tmp_path, monkeypatch):
    flags = ("--surrogate", "pixels", "--score", "gaussian", "--keep", 0.5, "--batch-size", 7)
    straight = run(data, tmp_path / "straight", *flags)
    extract, seen = models.encoders.extract, []

    def killed(enc, images, batch_size=256, kind="pooled", out=None, rows=None):
        if len(seen) == 2:
            seen.append("killed")
            raise KeyboardInterrupt
        seen.append(rows.tolist())
        return extract(enc, images, batch_size, kind, out=out, rows=rows)

    monkeypatch.setattr(models.encoders, "extract", killed)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as e:
        run(data, out, *flags)
    assert e.value.code == 130 and not (out / "keep.npy").exists() and not (out / "features.npy").exists()
    assert np.load(out / "features.done.npy").sum() == 14
    resumed = run(data, out, *flags)
    assert seen[3][0] == 14 and sum(seen[3:], []) == list(range(14, 29))
    assert np.array_equal(np.load(out / "features.npy"), np.load(tmp_path / "straight" / "features.npy"))
    assert np.array_equal(resumed[0], straight[0]) and np.array_equal(resumed[1], straight[1])
    del seen[:]
    seen.append("x"), seen.append("x"), seen.append("x")
    (out / "keep.npy").unlink()
    run(data, out, *flags)                                            # killed after the extraction: the features stand
    assert len(seen) == 3
    np.lib.format.open_memmap(out / "features.npy", "r+")[:] = 0
    assert np.array_equal(run(data, out, *flags, "--overwrite")[0], straight[0]) and len(seen) > 3


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_processes_write_what_one_writes(n, data, tmp_path):
    """29 images: uneven shards. The encoder answers alike whatever the batch, so that every figure is equal."""
    flags = ("--surrogate", "pixels", "--score", "gaussian", "--keep", 0.5, "--batch-size", 8)
    scores, keep = run(data, tmp_path / "one", *flags)
    ranks = processes(n, ROOT / "prune.py", "--data", data, "--out", tmp_path / "all", "--device", "cpu", *flags)
    assert [code for code, *_ in ranks] == n * [0] and [out.count("kept 15 of 29") for _, out, _ in ranks] == [1] + (n - 1) * [0], ranks
    np.testing.assert_allclose(np.load(tmp_path / "all" / "features.npy"), np.load(tmp_path / "one" / "features.npy"), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.load(tmp_path / "all" / "scores.npy"), scores, rtol=1e-6)
    assert np.array_equal(np.load(tmp_path / "all" / "keep.npy"), keep)
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())
    record = json.loads((tmp_path / "all" / "prune.args.json").read_text())
    assert record["provenance"]["processes"] == n and record["kept"] == 15


def test_other_arguments_need_another_folder(data, tmp_path, capsys):
    out = tmp_path / "out"
    run(data, out, "--score", "random", "--keep", 0.5)
    assert len(run(data, out, "--score", "random", "--keep", 0.25, "--overwrite")[1]) == 8
    with pytest.raises(SystemExit) as e:
        run(data, out, "--score", "random", "--keep", 0.5)
    assert e.value.code == 2 and "--keep = 0.25, now 0.5" in capsys.readouterr().err and len(np.load(out / "keep.npy")) == 8


def test_weights_that_cannot_be_read_cost_no_result(data, tmp_path, capsys):
    """--overwrite removes nothing before all that the flags name has been loaded."""
    out = tmp_path / "out"
    run(data, out, "--score", "random", "--keep", 0.5)
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    (tmp_path / "bad.pt").write_text("no checkpoint")
    with pytest.raises(SystemExit) as e:
        run(data, out, "--score", "gaussian", "--keep", 0.5, "--surrogate", "ddae", "--weights",
            tmp_path / "bad.pt", "--overwrite")
    assert e.value.code == 2 and "bad.pt" in capsys.readouterr().err
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    run(data, out, "--score", "random", "--keep", 0.5)
    assert "nothing to do" in capsys.readouterr().out


def test_the_choices_can_be_asked_for(capsys):
    for name, words in (("score", prune.SCORES), ("surrogate", models.encoders.ENCODERS)):
        with pytest.raises(SystemExit) as e:
            prune.main(["--list", name])
        assert e.value.code == 0 and capsys.readouterr().out.split() == list(words)
    with pytest.raises(SystemExit):
        prune.main(["--help"])
    page = capsys.readouterr().out
    assert all(score.what in page for score in prune.SCORES.values())


def test_scratch_is_trained_once_and_kept_with_the_data(data, tmp_path, monkeypatch):
    real, calls = models.scratch.train_scratch, []

    def train(*a, **k):
        calls.append(a[2:])
        k.pop("test_images"), k.pop("test_labels")
        return real(*a, epochs=1, **k)
    monkeypatch.setattr(models.scratch, "train_scratch", train)
    run(data, tmp_path / "a", "--surrogate", "scratch", "--score", "herding", "--keep", 0.5, "--seed", 3)
    run(data, tmp_path / "b", "--surrogate", "scratch", "--score", "moderate", "--keep", 0.5, "--seed", 3)
    assert len(calls) == 1 and calls[0][0] == 3 and (data / "scratch.pt").exists()
    assert np.array_equal(np.load(tmp_path / "a" / "features.npy"), np.load(tmp_path / "b" / "features.npy"))


def test_thin_classes_are_warned_of_once(data, tmp_path, capsys):
    np.save(tmp_path / "z.npy", features(29, 9))
    run(data, tmp_path / "a", "--features", tmp_path / "z.npy", "--score", "gaussian", "--keep", 0.5)
    assert capsys.readouterr().out.count("warning: 2 of 3 classes") == 1                            # 9 and 6 images, 9 columns


def test_bad_input_is_one_line_and_writes_nothing(data, tmp_path, capsys, no_training):
    out, z, s, bad = tmp_path / "out", tmp_path / "z.npy", tmp_path / "s.npy", tmp_path / "bad.npy"
    np.save(z, features(29, 4))
    np.save(s, np.arange(29.0))
    ask = lambda *flags: refused(capsys, data, out, *flags)
    use = ("--score", "gaussian", "--keep", 0.5, "--features")
    for ratio in (0, -0.1, 1.5, "nan", "much"):
        assert "--keep" in ask("--score", "random", "--keep", ratio)
    assert "either --keep" in ask("--score", "random")
    assert "either --keep" in ask("--score", "random", "--keep", 0.5, "--per-class", 3)
    assert "--scope global" in ask("--score", "random", "--per-class", 3, "--scope", "global")
    assert "'class2' has only 6" in ask("--score", "random", "--per-class", 7)
    assert "give --score" in ask("--keep", 0.5)
    assert "leave one out" in ask("--keep", 0.5, "--score", "gaussian", "--scores", s)
    assert "no such file" in ask(*use, tmp_path / "none.npy")
    np.save(bad, features(28, 4))
    assert "shape (28, 4)" in ask(*use, bad)
    np.save(bad, features(29, 4).astype(np.int64))
    assert "int64" in ask(*use, bad)
    np.save(bad, np.zeros((29, 0), np.float32))
    assert "width 0" in ask(*use, bad)
    holed = features(29, 4)
    holed[17, 2] = np.nan
    np.save(bad, holed)
    assert "row 17" in ask(*use, bad)
    huge, mine = features(29, 2), np.flatnonzero(np.load(data / "labels.npy") == 1)
    huge[mine] = 2.0**40 * (-1) ** np.arange(14)[:, None]
    np.save(bad, huge)
    assert "scale them down" in ask(*use, bad)
    cut = ("--keep", 0.5, "--scores")
    np.save(bad, np.arange(30.0))
    assert "shape (30,)" in ask(*cut, bad)
    np.save(bad, np.where(np.arange(29) == 5, np.nan, 0))
    assert "row 5" in ask(*cut, bad)
    np.save(bad, np.where(np.arange(29) == 6, np.inf, 0))
    assert "row 6" in ask(*cut, bad)
    labels = np.load(data / "labels.npy")
    np.save(bad, np.where(labels == 1, -np.inf, 0))
    assert "fewer than 7 images of class 'class1'" in ask(*cut, bad)
    assert "row" in ask(*cut, bad, "--score", "ccs")
    np.save(bad, labels.astype(np.float64))
    assert "class 'class0' without an image" in ask("--keep", 0.2, "--scope", "global", "--scores", bad)
    assert "encoder ddae" in ask("--score", "gaussian", "--keep", 0.5, "--surrogate", "ddae")
    assert "no such file" in ask("--score", "gaussian", "--keep", 0.5, "--surrogate", "ddae", "--weights", tmp_path / "none.pt")
    assert "no such data folder" in refused(capsys, tmp_path / "nowhere", out, "--score", "random", "--keep", 0.5)
    one = make_data(tmp_path / "one", (8,))
    for flags in (("--score", "el2n"), ("--score", "ccs"), ("--score", "gaussian", "--surrogate", "scratch")):
        assert "one class only" in refused(capsys, one, out, *flags, "--keep", 0.5)
    hollow = make_data(tmp_path / "hollow", (8, 0, 3))
    assert "'class1' has no image" in refused(capsys, hollow, out, "--score", "random", "--keep", 0.5)


def test_an_emptied_class_leaves_the_features_for_the_next_call(data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    flags = ("--surrogate", "pixels", "--score", "gaussian", "--keep", 0.04)
    with pytest.raises(SystemExit):
        run(data, out, *flags, "--scope", "global")
    assert "without an image" in capsys.readouterr().err
    assert sorted(p.name for p in out.iterdir()) == ["features.json", "features.npy", "features.seconds.json"]
    foreign = tmp_path / "foreign"                                    # features of other weights do not count as done
    foreign.mkdir()
    note = json.loads((out / "features.json").read_text())
    note["identity"] = "pixels:0000"
    (foreign / "features.json").write_text(json.dumps(note))
    np.save(foreign / "features.npy", np.zeros_like(np.load(out / "features.npy")))
    run(data, foreign, *flags)
    assert np.array_equal(np.load(foreign / "features.npy"), np.load(out / "features.npy"))
    forbid(monkeypatch, "extract")
    assert len(run(data, out, *flags)[1]) == 3


def test_latents_without_images_can_be_cut(data, tmp_path):
    np.save(data / "latents.npy", np.zeros((29, 8, 2, 2), np.float16))
    (data / "images.npy").unlink()
    np.save(tmp_path / "z.npy", features(29, 4))
    run(data, tmp_path / "out", "--features", tmp_path / "z.npy", "--score", "gaussian", "--keep", 0.5)
    assert not (tmp_path / "out" / "montage.png").exists()


def test_command_line(data, tmp_path):
    call = [sys.executable, str(ROOT / "prune.py"), "--data", str(data), "--out", str(tmp_path / "out"), "--surrogate", "pixels", "--score",
            "kcenter", "--keep", "0.3", "--device", "cpu"]
    p = subprocess.run(call, capture_output=True, text=True)
    assert p.returncode == 0 and "kept 9 of 29" in p.stdout, p.stderr
    p = subprocess.run([*call, "--seed", "-1"], capture_output=True, text=True)
    assert p.returncode == 2 and "Traceback" not in p.stderr and len(p.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("low, high", [(0.7, 0.7), (0.7, np.nextafter(np.float32(0.7), np.float32(1))), (0, 0), (-3e30, 3e30), (1e-20, 1.0000001e-20), (None, None)])
def test_scores_that_are_equal_to_rounding_are_drawn(low, high, tiny_data, tmp_path):
    """numpy makes no bins narrower than the spacing of the numbers: a class of near twins ended in a traceback. None: nothing in a class is finite."""
    from common.pictures import class_histograms
    data = common.open_data(tiny_data)
    scores = np.full(len(data.labels), -np.inf if low is None else low, np.float32)
    scores[::2] = scores[0] if low is None else high
    scores[data.labels == 1] = np.arange((data.labels == 1).sum())
    class_histograms(tmp_path / "scores.png", data, scores, np.arange(len(scores)), "scores", 12, 2.2, cut=True)
    assert Image.open(tmp_path / "scores.png").size[0] > 1000
