"""reweight.py: the update against a plain loop, its fixed points, the null, and the script from end to end on a tiny set."""
import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from models.build import build, from_checkpoint
import reweight
from conftest import processes, published_loss
from models import diffusion
from models.permutation import (derangement, holm, permutation_test, permuted_null,
                                permuted_record)
from models.sit import SiT
from reweight import class_excess, class_weights, dro_path, dro_update, uniform_rows

ROOT = Path(reweight.__file__).parent
K, SIZE = 3, 4


def plain_dro(excess, labels, K, eta, c, clip, burn_in):
    """The recursion as one would write it down, in Python floats."""
    a, lam, path = [1 / K] * K, [0.0] * K, []
    for s, (es, ys) in enumerate(zip(excess.tolist(), labels.tolist())):
        for k in range(K):
            mine = [max(e, 0) if clip == "example" else e for e, y in zip(es, ys) if y == k]
            if mine:
                lam[k] = max(sum(mine) / len(mine), 0)
        if s >= burn_in:
            a = [x * math.exp(eta * v) for x, v in zip(a, lam)]
            a = [(1 - c) * x / sum(a) + c / K for x in a]
        path.append(a)
    return np.array(path)


def record(steps=60, B=7, K=4, seed=0, shift=None):
    """Random excess losses (steps, B) and labels; shift: added to class 0."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(K, (steps, B), generator=g)
    e = torch.randn(steps, B, generator=g)
    return e + (shift or 0) * (y == 0), y


# ------------------------------------------------------------------------------------------------ formulas
@pytest.mark.parametrize("clip", ["class", "example"])
@pytest.mark.parametrize("eta,c,burn_in", [(1.0, 1e-3, 0), (0.05, 1e-2, 10), (3.0, 0.0, 59)])
def test_path_against_plain_loop(clip, eta, c, burn_in):
    e, y = record()                                                   # 7 examples of 4 classes: classes are often absent
    path = torch.stack(list(dro_path(e, y, 4, eta, c, clip, burn_in))).numpy()
    np.testing.assert_allclose(path, plain_dro(e, y, 4, eta, c, clip, burn_in), rtol=1e-10)
    assert (path[:burn_in] == 0.25).all() and not np.allclose(path[-1], 0.25)


def test_update_in_log_space_survives_huge_steps():
    a = dro_update(torch.log(torch.tensor([0.2, 0.8], dtype=torch.float64)), torch.tensor([2000.0, 1.0], dtype=torch.float64), 1.0, 1e-3).exp()
    np.testing.assert_allclose(a, [1 - 5e-4, 5e-4], rtol=1e-12)


def test_absent_class_starts_at_zero_and_keeps_its_last_value():
    lam = torch.zeros(3, dtype=torch.float64)
    lam = class_excess(torch.tensor([1.0, 3.0, -5.0]), torch.tensor([0, 0, 1]), 3, lam)
    assert lam.tolist() == [2.0, 0.0, 0.0]                            # class 2 never seen: 0; class 1 clipped
    lam = class_excess(torch.tensor([0.5, float("nan")]), torch.tensor([2, 1]), 3, lam)
    assert lam.tolist() == [2.0, 0.0, 0.5]                            # class 0 absent: its last; a non-finite value does not count


def test_example_clipping_turns_noise_into_weight():
    e, y = torch.randn(20_000, generator=torch.Generator().manual_seed(0)), torch.arange(20_000) % 4
    e[y == 0] *= 3                                                    # proxy as good as the reference everywhere, class 0 merely noisier
    last = torch.zeros(4, dtype=torch.float64)
    assert class_excess(e, y, 4, last).max() < 0.1
    clipped = class_excess(e, y, 4, last, "example")
    np.testing.assert_allclose(clipped, [3 / math.sqrt(2 * math.pi)] + 3 * [1 / math.sqrt(2 * math.pi)], rtol=0.05)      # E max(sigma n, 0)


def fixed_point(g, K, eta, c):
    """The root in (0, 1) of (u-1) a^2 + [1 - (1-c) u - (c/K)(u-1)] a - c/K = 0, u = e^(eta g)."""
    u = math.exp(eta * g)
    roots = np.roots([u - 1, 1 - (1 - c) * u - c / K * (u - 1), -c / K])
    return float(roots[(roots > 0) & (roots < 1 + 1e-12)][0])


def settle(g, steps, K=10, eta=1.0, c=1e-3):
    """a of a class whose reference was lowered by g, everything else equal, after `steps` batches of one image a class."""
    e, y = torch.zeros(K, dtype=torch.float64), torch.arange(K)
    e[0] += g
    *_, a = dro_path(e.expand(steps, K), y.expand(steps, K), K, eta, c)
    return a[0].item(), a[1:]


@pytest.mark.parametrize("g,listed,steps", [(1e-4, 0.11, 6000), (1e-3, 0.32, 12_000), (1e-2, 0.91, 3000)])
def test_constant_gap_settles_at_the_fixed_point(g, listed, steps):
    a, rest = settle(g, steps)
    assert a == pytest.approx(fixed_point(g, 10, 1.0, 1e-3), rel=3e-3)
    assert a == pytest.approx(listed, abs=0.006)
    assert torch.allclose(rest, rest[0].expand(9))


def test_transient_is_slow():
    assert settle(1e-3, 1000)[0] == pytest.approx(0.18, abs=0.006)
    assert settle(1e-3, 5000)[0] == pytest.approx(0.30, abs=0.006)


def test_unbalanced_weights():
    abar, counts = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([10.0, 30.0, 60.0], dtype=torch.float64)
    w = class_weights(abar, counts)
    np.testing.assert_allclose(w, [0.5 / 0.1, 0.3 / 0.3, 0.2 / 0.6])
    assert (w * counts).sum() / 100 == pytest.approx(1)               # mean 1 over the images
    np.testing.assert_allclose(class_weights(abar, torch.full((3,), 7.0)), 3 * abar)


# ------------------------------------------------------------------------------------------------ the null
def drawn(counts, steps, B, g):
    """labels (M,) of classes of these sizes, and rows (steps, B): a class, then an image of it."""
    counts = torch.tensor(counts)
    labels = torch.repeat_interleave(torch.arange(len(counts)), counts)
    rows = torch.stack([uniform_rows(s, B, int(torch.randint(2**40, (), generator=g)), torch.arange(len(labels)), counts) for s in range(steps)])
    return labels, rows


def test_equal_classes_are_dealt_to_images_once():
    labels, rows = drawn([6, 6, 6], 30, 8, torch.Generator().manual_seed(0))
    e = torch.randn(30, 8)
    same, classes = permuted_record(e, rows, labels, 5, generator=torch.Generator().manual_seed(1))
    classes = torch.stack(list(classes), 1)                           # (P, steps, B)
    assert same is e and classes.shape == (5, 30, 8)
    for y in classes:
        of_image = {int(i): {int(k) for k in y[rows == i]} for i in rows.unique()}
        assert all(len(k) == 1 for k in of_image.values())            # every occurrence of one image carries one class
        assert len(of_image) == 18 and sorted(k for ks in of_image.values() for k in ks) == [0] * 6 + [1] * 6 + [2] * 6
    assert len({tuple(y.flatten().tolist()) for y in classes}) == 5
    null = permuted_null(lambda e, y: dro_path(e, y, 3, 0.5, 1e-3, burn_in=5), e, rows, labels, 5, 5, torch.Generator().manual_seed(1))
    for a, y in zip(null, classes):
        np.testing.assert_allclose(a, plain_dro(e, y, 3, 0.5, 1e-3, "class", 5)[5:].mean(0), rtol=1e-10)


def test_images_of_unequal_classes_exchange_their_mean_excess():
    labels, rows = drawn([3, 5, 12], 30, 6, torch.Generator().manual_seed(0))
    e = torch.randn(30, 6) + labels[rows]
    e[7, 2] = torch.nan
    own = {}
    for i in rows[10:].unique().tolist():                             # the mean excess beyond the step's, after the burn-in of 10
        own[i] = np.mean([e[s, b].item() - np.nanmean(e[s]) for s in range(10, 30) for b in range(6) if rows[s, b] == i and e[s, b] == e[s, b]])
    seen = {}                                                         # {(permutation, image): whose mean it got}
    values, classes = permuted_record(e, rows, labels, 4, 10, torch.Generator().manual_seed(1))
    for s, (v, y) in enumerate(zip(values, classes)):
        assert y.shape == (4, 6) and (y == labels[rows[s]]).all()     # places and classes stay
        for b in range(6):
            assert torch.isnan(v[:, b]).all() == torch.isnan(e[s, b])
            if rows[s, b].item() in own and e[s, b] == e[s, b]:
                took = v[:, b] - e[s, b] + own[rows[s, b].item()]
                for p, t in enumerate(took.tolist()):
                    assert abs(seen.setdefault((p, rows[s, b].item()), t) - t) < 1e-5          # an image gets one and the same everywhere
    for p in range(4):
        np.testing.assert_allclose(sorted(t for (q, _), t in seen.items() if q == p), sorted(own.values()), atol=1e-5)


def record_of(counts, seed, effect=0.0, mean=0.05, steps=80, B=48):
    """An excess (steps, B) with an effect of its own for every image, sd 0.044, and noise of sd 0.12 (as measured on digits); `effect`: of class 0."""
    g = torch.Generator().manual_seed(seed)
    labels, rows = drawn(counts, steps, B, g)
    own = 0.044 * torch.randn(len(labels), generator=g) + effect * (labels == 0)
    return mean + own[rows] + 0.12 * torch.randn(steps, B, generator=g), rows, labels, g


def calls(counts, seed, **how):
    """(by Holm, by the one p of all classes): is this record called a finding?"""
    e, rows, labels, g = record_of(counts, seed, **how)
    path = lambda e, y: dro_path(e, y, len(counts), 0.05, 1e-3, burn_in=20)
    abar = torch.stack(list(path(e, labels[rows])))[20:].mean(0)
    test = permutation_test(abar.log(), permuted_null(path, e, rows, labels, 20, 200, g).log())
    return (test.holm <= 0.05).any().item(), test.overall <= 0.05


def calls_by_steps(counts, seed):
    """The rule of earlier versions: labels permuted within each step, 20 permutations, one band for all classes."""
    e, rows, labels, g = record_of(counts, seed)
    y = labels[rows]
    abar = torch.stack(list(dro_path(e, y, len(counts), 0.05, 1e-3, burn_in=20)))[20:].mean(0)
    shuffled = (row[torch.rand(20, len(row), generator=g).argsort(-1)] for row in y)
    null = torch.stack(list(dro_path(e, shuffled, len(counts), 0.05, 1e-3, burn_in=20))[20:]).mean(0)
    return bool((abar < null.min()).any() or (abar > null.max()).any())


def test_classes_without_meaning_are_rarely_called_findings():
    """Persistent effects of images: at most 5 % are expected (3 % here); the old rule, which dealt them anew in every step, calls 76 %."""
    found = np.array([calls([12] * 5, s) for s in range(120)])
    assert (found.mean(0) <= 0.10).all(), found.mean(0)
    assert np.mean([calls_by_steps([12] * 5, s) for s in range(40)]) > 0.5


def test_neither_are_those_of_a_long_tail():
    """A mean excess of zero is the trap: max(mean, 0) is largest for the class with the fewest images in a step."""
    found = np.array([calls([60, 30, 15, 8, 4], s, mean=0.0) for s in range(120)])
    assert (found.mean(0) <= 0.10).all(), found.mean(0)


@pytest.mark.parametrize("counts", [[12] * 5, [24, 18, 12, 9, 6]])
def test_a_class_that_lags_is_found(counts):
    """By 0.07, i.e. 0.6 of the noise of one loss and 1.6 times the spread of images: in 80 % of the records at least."""
    found = np.array([calls(counts, s, effect=0.07) for s in range(50)])
    assert (found.mean(0) >= 0.8).all(), found.mean(0)


def test_p_values_by_definition():
    g = torch.Generator().manual_seed(0)
    x, null = torch.randn(4, generator=g), torch.randn(39, 4, generator=g) * torch.tensor([1, 2, 3, 4.0])
    x[1] = 5.5
    test = permutation_test(x, null)
    rows = np.concatenate([x[None], null]).astype(float)
    z = [[abs(v - np.mean(rows[:, k])) / np.std(rows[:, k], ddof=1) for k, v in enumerate(row)] for row in rows]
    p = [sum(row[k] >= z[0][k] for row in z) / 40 for k in range(4)]
    np.testing.assert_allclose(test.p, p)
    assert test.overall == pytest.approx(sum(max(row) >= max(z[0]) for row in z) / 40)
    np.testing.assert_allclose(test.holm, plain_holm(p))
    # As many records leave the band as have an overall p of 0.05 or less: two of forty.
    out = ((torch.cat([x[None], null]) < test.low) | (torch.cat([x[None], null]) > test.high)).any(1)
    assert out.sum() == 2
    same = permutation_test(torch.zeros(3), torch.zeros(19, 3))       # eta 0: nothing moves
    assert same.overall == 1 and same.p.tolist() == same.holm.tolist() == [1, 1, 1] and (same.low == 0).all()


def plain_holm(p):
    """Adjusted p: the largest of (K - j + 1) p_(j) over the places j up to its own."""
    ranked = sorted(p)
    return [min(1, max((len(p) - j) * q for j, q in enumerate(ranked[:ranked.index(v) + 1]))) for v in p]


def test_holm_by_definition():
    assert holm(torch.tensor([0.01, 0.04, 0.03, 0.005])).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])       # worked by hand
    for seed in range(20):
        p = torch.rand(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
        np.testing.assert_allclose(holm(p), plain_holm(p.tolist()), rtol=1e-12)


def test_derangements_move_everything_and_are_all_alike():
    assert derangement(2, torch.Generator()).tolist() == [1, 0]
    g = torch.Generator().manual_seed(0)
    seen = [tuple(derangement(4, g).tolist()) for _ in range(3600)]
    assert all(sorted(d) == [0, 1, 2, 3] and not any(i == k for i, k in enumerate(d)) for d in seen)
    times = [seen.count(d) for d in set(seen)]
    assert len(times) == 9 and min(times) > 320 and max(times) < 480  # 400 each, sd 19
    with pytest.raises(ValueError, match="one class"):
        derangement(1)


def test_rows_are_class_uniform_and_depend_on_seed_and_step_alone():
    labels = torch.tensor([2] * 5 + [0] * 90 + [1] * 5)
    by_class, counts = labels.argsort(stable=True), torch.bincount(labels)
    rows = uniform_rows(3, 30_000, 7, by_class, counts)
    np.testing.assert_allclose(torch.bincount(labels[rows]) / 30_000, 3 * [1 / 3], atol=0.02)
    np.testing.assert_allclose(torch.bincount(rows, minlength=100)[:5] / 10_000, 5 * [0.2], atol=0.03)       # uniform within a class
    assert torch.equal(rows, uniform_rows(3, 30_000, 7, by_class, counts)) and not torch.equal(rows, uniform_rows(4, 30_000, 7, by_class, counts))


# ------------------------------------------------------------------------------------------------ the script
@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """A data folder of 3 x 4 x 4 x 1 images, unbalanced, and a random reference on it."""
    root = tmp_path_factory.mktemp("reweight")
    make_data(root / "data", np.repeat([0, 1, 2], [20, 30, 10]))
    return root, make_reference(root / "ref.pt", root / "data")


def make_data(folder, labels, latents=False, sha="abc"):
    folder.mkdir()
    rng = np.random.default_rng(0)
    np.save(folder / "labels.npy", labels)
    if latents:
        np.save(folder / "latents.npy", rng.normal(size=(len(labels), 2, SIZE, SIZE)).astype(np.float16))
    else:
        np.save(folder / "images.npy", rng.integers(0, 256, (len(labels), SIZE, SIZE, 1), np.uint8))
    (folder / "classes.txt").write_text("ant\nbee\ncat\n")
    (folder / "dataset.json").write_text(json.dumps({"name": "tiny", "sha256": sha}))
    return folder


def make_reference(path, data, **other):
    args = dict(model="SiT-T/2", process="flow", predict="v", size=SIZE, channels=1, num_classes=K, class_std=1.0, text_shape=None, dropout=None, latents=False,
                latent_scale=None, classes=["ant", "bee", "cat"], data="tiny", data_sha256="abc", steps=6, batch_size=12, lr=3e-3, amp="none", warmup=2,
                schedule="constant", grad_clip=1.0, flips=True) | other
    torch.manual_seed(1)
    net = build(args)
    with torch.no_grad():
        for p in net.parameters():                                    # the zero-initialised output would make every excess zero
            p += 0.02 * torch.randn_like(p)
    torch.save({"model": net.state_dict(), "ema": net.state_dict(), "step": 6, "args": args}, path)
    return path


def run(kit, out, *flags):
    root, ref = kit
    given = {f for f in flags if str(f).startswith("--")}
    base = [x for k, v in (("--data", root / "data"), ("--reference", ref), ("--burn-in", 2), ("--device", "cpu")) if k not in given for x in (k, v)]
    reweight.main([str(x) for x in (*base, "--out", root / out, *flags)])
    return root / out


def load(out):
    return {n: np.load(out / f"{n}.npy") for n in ("weights", "abar", "history", "excess")}


@pytest.fixture(scope="module")
def straight(kit):
    return run(kit, "straight")


def test_outputs(kit, straight, capsys):
    r = load(straight)
    assert [(v.dtype.name, v.shape) for v in r.values()] == [("float32", (3,)), ("float64", (3,)), ("float32", (6, 3)), ("float32", (6, 2, 12))]
    path = plain_dro(r["excess"][:, 0].astype(np.float64), r["excess"][:, 1].astype(int), K, 1.0, 1e-3, "class", 2)
    np.testing.assert_allclose(r["history"], path, rtol=1e-6)
    np.testing.assert_allclose(r["abar"], path[2:].mean(0), rtol=1e-9)
    np.testing.assert_allclose(r["weights"], r["abar"] / (np.array([20, 30, 10]) / 60), rtol=1e-6)
    assert (r["history"][:2] == np.float32(1 / 3)).all() and np.ptp(r["history"][-1]) > 1e-5
    state = common.load_pt(straight / "proxy.pt")                     # the a that weighted the proxy's loss is the a that is reported
    np.testing.assert_allclose(state["log_a"].exp(), path[-1], rtol=1e-12)
    proxy, process = from_checkpoint(state)
    assert process.name == "flow" and state["args"]["dropout"] == 0.0
    facts = json.loads((straight / "reweight.args.json").read_text())
    assert facts["entropy_abar"] == pytest.approx(-(r["abar"] * np.log(r["abar"])).sum())
    assert facts["seconds"] >= facts["proxy_seconds"] > 0 and facts["null_spread"] > 0 and len(facts["null_low"]) == K
    assert facts["null_permutations"] == 200 and 0 < facts["null_p_overall"] <= 1 and len(facts["null_p_holm"]) == len(facts["null_p"]) == K
    rows, labels = np.load(straight / "excess_rows.npy"), np.load(kit[0] / "data" / "labels.npy")
    assert rows.dtype == np.int64 and (labels[rows] == r["excess"][:, 1]).all()
    other, names = np.load(straight / "weights_permuted.npy"), ["ant", "bee", "cat"]
    came = [names.index(name) for name in facts["permuted_from"]]
    assert sorted(came) == [0, 1, 2] and all(i != k for i, k in enumerate(came))
    np.testing.assert_allclose(other, r["abar"][came] / (np.array([20, 30, 10]) / 60), rtol=1e-6)
    assert other.dtype == np.float32 and (other * [20, 30, 10]).sum() / 60 == pytest.approx(1)
    assert (straight / "weights.png").read_bytes()[:4] == b"\x89PNG" and not list(straight.glob("*.part.npy"))
    before = (straight / "proxy.pt").stat().st_mtime_ns
    run(kit, "straight")
    assert "nothing to do" in capsys.readouterr().out and (straight / "proxy.pt").stat().st_mtime_ns == before


def test_the_record_says_which_image_stood_where(kit, monkeypatch):
    """Against the rows that the loop itself drew; with --indices they still count in the data set's order."""
    root, _ = kit
    np.save(root / "some.npy", np.r_[2:9, 22:40, 51:60])
    seen, real = [], common.DeviceRows.get
    monkeypatch.setattr(common.DeviceRows, "get", lambda self, rows, *rest: (seen.append(self.keep[rows.numpy()]), real(self, rows, *rest))[1])
    out = run(kit, "whose", "--indices", root / "some.npy")
    np.testing.assert_array_equal(np.load(out / "excess_rows.npy"), seen)


def test_a_folder_of_an_earlier_version_gets_its_null_without_training(kit, straight, monkeypatch, capsys):
    """It has no rows, no control and another number of permutations. Nothing that others may have used is written again."""
    out = kit[0] / "earlier"
    shutil.copytree(straight, out)
    for name in ("excess_rows.npy", "weights_permuted.npy"):
        (out / name).unlink()
    facts = json.loads((out / "reweight.args.json").read_text())
    facts = {k: v for k, v in facts.items() if not k.startswith("null_p")}
    facts["args"]["permutations"] = 20
    (out / "reweight.args.json").write_text(json.dumps(facts))
    kept = ("weights.npy", "abar.npy", "history.npy", "excess.npy", "proxy.pt")
    before = {name: (out / name).stat().st_mtime_ns for name in kept}
    monkeypatch.setattr(reweight, "proxy_batch", None)                # a step of training would fail
    run(kit, "earlier")
    assert "all classes together" in capsys.readouterr().out
    assert before == {name: (out / name).stat().st_mtime_ns for name in kept}
    for name in ("excess_rows.npy", "weights_permuted.npy"):
        assert (out / name).read_bytes() == (straight / name).read_bytes()
    run(kit, "earlier", "--permutations", 59)                         # more of them: the null alone
    assert json.loads((out / "reweight.args.json").read_text())["null_permutations"] == 59
    assert "59 permutations" in capsys.readouterr().out
    run(kit, "earlier", "--permutations", 59)
    assert "nothing to do" in capsys.readouterr().out


def test_equal_proxy_and_reference_have_no_excess(kit):
    """Both see the same images, times and noise, without dropout: a proxy that starts as the reference starts at exactly zero."""
    e = load(run(kit, "same", "--proxy-init", kit[1], "--steps", 2, "--burn-in", 0))["excess"][:, 0]
    assert (e[0] == 0).all() and (e[1] != 0).any()
    assert common.load_pt(kit[0] / "same/proxy.pt")["args"]["label_drop"] == 0            # it never sees the null class: no guidance from it


def test_stopped_run_resumes_bit_equal(kit, straight, monkeypatch):
    seen = []

    def told_in_the_third_step(*a):
        seen.append(1)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*a)
    real = common.lr_at
    monkeypatch.setattr(common, "lr_at", told_in_the_third_step)
    with pytest.raises(SystemExit) as e:
        run(kit, "stopped")
    assert e.value.code == 143
    out = kit[0] / "stopped"
    assert common.load_pt(out / "proxy.pt")["step"] == 3 and not (out / "weights.npy").exists()
    monkeypatch.setattr(common, "lr_at", real)
    run(kit, "stopped")
    for name, v in load(out).items():
        assert np.array_equal(v, load(straight)[name]), name
    a, b = (common.load_pt(d / "proxy.pt")["model"] for d in (out, straight))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_theta_step_is_the_self_normalised_weighted_loss(kit, monkeypatch):
    """The gradient of one step, against the weighted mean written out for the whole batch."""
    grads, real = [], torch.nn.utils.clip_grad_norm_

    def spy(params, limit):
        params = list(params)
        grads.append([None if p.grad is None else p.grad.clone() for p in params])
        return real(params, limit)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    seen, loss = [], diffusion.diffusion_loss
    monkeypatch.setattr(diffusion, "diffusion_loss", lambda *x: (seen.append(x), loss(*x))[1])
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *x, **k: None)                        # theta stays: both losses can be taken again
    out = run(kit, "gradient", "--steps", 2, "--burn-in", 0, "--eta", 5)
    r = load(out)
    (process, net, x, u, eps, y), a = seen[-1], torch.from_numpy(r["history"][-1])
    losses = loss(process, net, x, u, eps, y)
    assert a.max() > 1.1 * a.min()
    total = sum(a[k] * l for k, l in zip(y.tolist(), losses)) / sum(a[k] for k in y.tolist())
    net.zero_grad()
    total.backward()
    for p, g in zip(net.parameters(), grads[-1]):
        if g is not None:
            torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


def test_two_processes_give_the_same_weights(kit, straight):
    root, ref = kit
    for code, _, err in processes(2, ROOT / "reweight.py", "--data", root / "data", "--reference", ref, "--burn-in", 2, "--device", "cpu", "--out", root / "two"):
        assert code == 0, err[-2000:]
    one, two = load(straight), load(root / "two")
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4 if name == "excess" else 1e-5, atol=1e-5)
    a, b = (common.load_pt(d / "proxy.pt")["model"] for d in (straight, root / "two"))
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-3    # Adam turns rounding of a tiny gradient into steps of its own


def test_latents_and_indices(kit, monkeypatch):
    root, _ = kit
    data = make_data(root / "latent_data", np.repeat([0, 1, 2], 10), latents=True)
    (data / "latents.json").write_text('{"scale": 0.5}')
    ref = make_reference(root / "latent.pt", data, latents=True, latent_scale=0.5, flips=False)
    np.save(root / "keep.npy", np.r_[0:5, 10:20, 25:30])
    seen, real = [], diffusion.sample_latents
    monkeypatch.setattr(common.rows, "sample_latents", lambda x, *rest: (seen.append(x), real(x, *rest))[1])
    r = load(run((root, ref), "latent", "--data", data, "--indices", root / "keep.npy"))
    z, keep = np.load(data / "latents.npy"), np.load(root / "keep.npy")
    for x, y in zip(torch.cat(seen).numpy(), r["excess"][:, 1].flatten()):                            # only kept images, each with its own label
        assert [k // 10 for k in keep if (z[k] == x).all()] == [y]
    np.testing.assert_allclose(r["weights"], r["abar"] / [0.25, 0.5, 0.25], rtol=1e-6)


def test_warnings(kit, capsys):
    run(kit, "warned", "--eta", 200, "--smoothing", 0)
    out = capsys.readouterr().out
    assert "--eta 200" in out and "of abar" in out and "holds" in out


@pytest.mark.parametrize("flags,says", [
    (["--eta", "-1"], "--eta"), (["--smoothing", "1"], "--smoothing"), (["--steps", "0"], "--steps"), (["--burn-in", "6"], "--burn-in 6"),
    (["--reference", "missing.pt"], "missing.pt: no such file"), (["--data", "nowhere"], "nowhere: no such data folder"),
    (["--indices", "BAD_INDICES"], "0..59"), (["--indices", "NO_CAT"], "class 2 keeps no image"), (["--reference", "OTHER_DATA"], "other_sha"),
    (["--reference", "OTHER_CLASSES"], "num_classes"), (["--reference", "OTHER_SIZE"], "size"), (["--reference", "OTHER_CHANNELS"], "channels"),
    (["--reference", "NOT_A_CKPT"], "not a checkpoint"), (["--proxy-init", "OTHER_CLASSES"], "that fits the proxy"),
    (["--proxy-init", "OTHER_PROCESS"], "process = ddpm, the reference has flow"),
    (["--reference", "WORD_FOR_LR"], "'lr' is a str"), (["--reference", "NEW_AMP"], "amp = 'fp4'"), (["--reference", "NO_WARMUP"], "does not say with which warmup"),
    (["--proxy-model", "SiT-T/8"], "patch size 8"), (["--out", "A_FILE"], "a file stands")])
def test_bad_input(kit, flags, says, capsys):
    root, _ = kit
    make = {"BAD_INDICES": lambda p: np.save(p, np.array([0, 99])), "NEW_AMP": lambda p: make_reference(p, None, amp="fp4"), "NO_CAT": lambda p: np.save(p, np.arange(40)),
            "OTHER_DATA": lambda p: make_reference(p, None, data_sha256="other_sha"), "OTHER_CLASSES": lambda p: make_reference(p, None, num_classes=4),
            "OTHER_PROCESS": lambda p: make_reference(p, None, process="ddpm", predict="eps"), "OTHER_SIZE": lambda p: make_reference(p, None, size=8), "OTHER_CHANNELS": lambda p: make_reference(p, None, channels=3),
            "WORD_FOR_LR": lambda p: make_reference(p, None, lr="fast"), "NO_WARMUP": lambda p: without(p, "warmup"),
            "NOT_A_CKPT": lambda p: torch.save({"x": 1}, p), "A_FILE": lambda p: p.write_text("")}
    if flags[1] in make:
        path = root / f"{flags[1]}{'.npy' if flags[0] == '--indices' else '.pt'}"
        make[flags[1]](path)
        flags = [flags[0], path]
    with pytest.raises(SystemExit) as e:
        run(kit, "refused", *flags)
    err = capsys.readouterr().err
    assert e.value.code == 2 and says in err and err.count("\n") == 1 and not (root / "refused").exists()


def without(path, setting):
    make_reference(path, None)
    state = torch.load(path, weights_only=True)
    del state["args"][setting]
    torch.save(state, path)


@pytest.mark.parametrize("lr, says", [(0.3, "it has diverged; lower --lr"), (1e4, "had a non-finite loss or gradient, up to step 6; lower --lr")])
def test_a_proxy_that_diverges_stops(lr, says, kit, capsys):
    """A loss far beyond that of a network which predicts nothing, finite or not: weights made of it would look like any others."""
    with pytest.raises(SystemExit) as e:
        run(kit, f"diverged{lr}", "--lr", lr)
    err = capsys.readouterr().err
    assert e.value.code == 2 and says in err and f"diverged{lr}" in err and not (kit[0] / f"diverged{lr}/weights.npy").exists()


def test_skipped_steps_are_counted(kit, monkeypatch, capsys):
    real, calls = diffusion.diffusion_loss, []

    def nan_in_the_second_step(*a):
        calls.append(1)
        return real(*a) * (float("nan") if len(calls) == 4 else 1)    # two calls a step: the reference, then the proxy
    monkeypatch.setattr(diffusion, "diffusion_loss", nan_in_the_second_step)
    out = run(kit, "skipped")
    assert "1 steps skipped" in capsys.readouterr().out and json.loads((out / "reweight.args.json").read_text())["skipped"] == 1
    assert common.load_pt(out / "proxy.pt")["skipped"] == 1 and np.isfinite(load(out)["weights"]).all()


def test_other_arguments_are_refused_in_a_used_folder(kit, straight, capsys):
    with pytest.raises(SystemExit) as e:
        run(kit, "straight", "--eta", "0.5")
    assert e.value.code == 2 and "--eta = 1.0, now 0.5" in capsys.readouterr().err


@pytest.mark.slow
def test_class_with_irreducible_noise_is_not_upweighted(tmp_path):
    """Three easy classes, one of them with noise that no model can predict: its loss is high in proxy and reference alike."""
    import train
    rng, n = np.random.default_rng(0), 200
    labels = np.repeat(np.arange(3), n)
    x = np.stack([np.kron(p, np.ones((2, 2))) for p in ([[1, 0], [0, 1]], [[1, 1], [0, 0]], [[0, 1], [0, 1]])])[labels]     # (600, 4, 4)
    x = 128 + 80 * (x - 0.5) * rng.uniform(0.5, 1.5, (len(x), 1, 1)) + np.where(labels == 0, 60, 4)[:, None, None] * rng.uniform(-1, 1, x.shape)
    make_data(tmp_path / "data", labels)
    np.save(tmp_path / "data" / "images.npy", x.clip(0, 255).astype(np.uint8)[..., None])
    flags = ["--data", str(tmp_path / "data"), "--device", "cpu", "--batch-size", "48"]
    train.main([*flags, "--preset", "digits", "--steps", "500", "--out", str(tmp_path / "run")])
    model, process = from_checkpoint(common.load_pt(tmp_path / "run" / "last.pt"))
    g = torch.Generator().manual_seed(0)
    x = torch.from_numpy(np.load(tmp_path / "data" / "images.npy")).permute(0, 3, 1, 2).float() / 127.5 - 1
    u, eps = torch.rand(len(x), generator=g), torch.randn(x.shape, generator=g)
    loss = diffusion.diffusion_loss(process, model, x, u, eps, torch.from_numpy(labels)).numpy()
    losses = [loss[labels == k].mean() for k in range(3)]
    assert losses[0] > 1.3 * max(losses[1:])                          # hard for the reference ...
    flags += ["--reference", str(tmp_path / "run" / "last.pt"), "--eta", "0.05", "--steps", "400", "--burn-in", "150"]
    reweight.main([*flags, "--out", str(tmp_path / "dro")])
    w = np.load(tmp_path / "dro" / "weights.npy")
    facts = json.loads((tmp_path / "dro" / "reweight.args.json").read_text())
    assert w[0] <= max(1.0, facts["null_high"][0])                    # ... and not favoured


@pytest.mark.parametrize("kind", ["sit", pytest.param("dit", marks=pytest.mark.slow)])
def test_an_official_reference(kind, kit, monkeypatch, capsys):
    """Its losses are those of the published formula on the published weights; the proxy starts afresh under the published recipe."""
    root, _ = kit
    if not (data := root / "official_data").exists():
        make_data(data, np.repeat([0, 1, 2], 6), latents=True)
        (data / "latents.json").write_text('{"scale": 0.18215}')
    torch.manual_seed(0)
    net = SiT(size=SIZE, channels=1, num_classes=K, depth=1, width=384, heads=6, patch=2, learn_sigma=True).eval()
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    torch.save({"ema": net.state_dict(), "opt": {}}, root / "official.pt")
    calls, real = [], diffusion.diffusion_loss

    def record(process, model, x, u, eps, y):
        calls.append((x, u, eps, y, real(process, model, x, u, eps, y)))
        return calls[-1][-1]
    monkeypatch.setattr(diffusion, "diffusion_loss", record)
    flags = ["--data", data, "--official", kind, "--proxy-model", "SiT-T/2"]
    out = run((root, root / "official.pt"), f"official_{kind}", *flags, "--steps", 3, "--batch-size", 8)
    x, u, eps, y, loss = calls[0]                                     # the reference is asked first
    torch.testing.assert_close(loss, published_loss(net, kind, x, u, eps, y), rtol=1e-4, atol=1e-5)
    state = common.load_pt(out / "proxy.pt")
    assert (state["args"]["lr"], state["args"]["warmup"], state["args"]["flips"], state["args"]["process"]) == (1e-4, 0, False, {"dit": "ddpm", "sit": "flow"}[kind])
    from_checkpoint(state)
    same = run((root, root / "official.pt"), f"official_{kind}_depth", *flags[:4], "--steps", 1, "--burn-in", 0, "--batch-size", 8)
    assert common.load_pt(same / "proxy.pt")["args"]["depth"] == 1    # the reference's architecture, also where its depth has no name
    z = np.load(data / "latents.npy")
    np.save(data / "latents.npy", np.where(np.arange(len(z)).reshape(-1, 1, 1, 1) == 7, np.nan, z))
    with pytest.raises(SystemExit) as e:
        run((root, root / "official.pt"), f"official_{kind}_nan", *flags, "--steps", 20, "--batch-size", 8)
    assert e.value.code == 2 and "latents.npy: NaN or infinity in row 7" in capsys.readouterr().err
    np.save(data / "latents.npy", z)
    for words, more in (("give --steps", []), ("latent_scale = 0.18215", ["--steps", 3])):
        if more:
            (data / "latents.json").write_text('{"scale": 0.5}')
        with pytest.raises(SystemExit) as e:
            run((root, root / "official.pt"), "refused", *flags, *more)
        assert e.value.code == 2 and words in capsys.readouterr().err and not (root / "refused").exists()
    (data / "latents.json").write_text('{"scale": 0.18215}')
