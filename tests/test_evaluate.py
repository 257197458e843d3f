"""evaluate.py end to end on tiny runs of a tiny data set: what is compared with what, what is measured again, what is refused. The formulas are test_metrics.py's."""
import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import evaluate
import odd_files as odd
import sample
import train
from conftest import processes
from models import encoders, metrics, scratch

ROOT = Path(__file__).resolve().parent.parent
K, PER, TEST = 3, 40, 8                                               # classes, training and held-out images of each


def pictures_of(rng, per):
    """per noisy 8 x 8 images of each class, a bright bar whose place is the class."""
    x, y = rng.normal(60, 25, (K * per, 8, 8, 1)), np.arange(K * per) % K
    for c in range(K):
        x[y == c, :, 2 * c + 1:2 * c + 3] += rng.normal(120, 20, ((y == c).sum(), 1, 1, 1))
    return x.clip(0, 255).astype(np.uint8), y


def data_folder(folder, seed=0, name="bars", test=True):
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for prefix, per in (("", PER), ("test_", TEST))[:1 + test]:
        x, y = pictures_of(rng, per)
        np.save(folder / f"{prefix}images.npy", x), np.save(folder / f"{prefix}labels.npy", y)
    (folder / "classes.txt").write_text("\n".join("abc"))
    (folder / "dataset.json").write_text(json.dumps({"name": name, "sha256": common.sha256(folder / "images.npy"), "num_classes": K}))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data folder, a run on all of it and a run on 12 images (first trained for 4 steps with a checkpoint every 2, then 40 samples drawn), nothing measured."""
    out = tmp_path_factory.mktemp("made")
    data = data_folder(out / "data")
    np.save(out / "keep.npy", np.arange(3, 3 + 12))
    for name, flags in (("full", []), ("small", ["--indices", str(out / "keep.npy")])):
        train.main(["--data", str(data), "--out", str(out / name), "--model", "SiT-T/2", "--process", "flow", "--preset", "digits", "--steps", "4", "--batch-size", "8",
                    "--checkpoint-every", "2", "--device", "cpu", "--lr", "0.02", "--warmup", "0", "--ema", "0.1", "--schedule", "constant", *flags])
        sample.main(["--checkpoint", str(out / name / "last.pt"), "--out", str(out / name), "--num", "40", "--steps", "2", "--cfg", "1.5", "--seed", "3", "--device", "cpu"])
    common.open_encoder("scratch", common.open_data(data), "cpu")     # once for all tests
    return out


@pytest.fixture
def world(made, tmp_path):
    """A copy that a test may spoil. Records name the kept indices by their old path, which still stands."""
    shutil.copytree(made, tmp_path / "w")
    return tmp_path / "w"


def run(world, *flags, runs=("full", "small"), encoder="scratch", judges=1):
    evaluate.main(["--data", str(world / "data"), "--runs", *(str(world / r) for r in runs), "--encoder", encoder, "--judges", str(judges), "--device", "cpu", *flags])
    return [json.loads((world / r / "metrics.json").read_text()) for r in runs if (world / r / "metrics.json").exists()]


def outside(world, samples, *flags, encoder="pixels", out="out"):
    evaluate.main(["--data", str(world / "data"), "--samples", str(samples), "--out", str(world / out), "--encoder", encoder, "--judges", "1", "--device", "cpu", *flags])
    return json.loads((world / out / "metrics.json").read_text())


def refused(capsys, call, *words, absent=()):
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        call()
    err = [line for line in capsys.readouterr().err.splitlines() if line and "it/s" not in line and "?it" not in line]
    assert e.value.code == 2 and len(err) == 1 and all(str(w) in err[0] for w in words), err
    for path in absent:
        assert not Path(path).exists(), path


def features(world, images, encoder="scratch"):
    return encoders.extract(common.open_encoder(encoder, common.open_data(world / "data"), "cpu"), images).astype(np.float64)


def direct(a, b):
    """Frechet distance of two sets of features by scipy's matrix root, independent of models.metrics."""
    import scipy.linalg
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s @ t)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * np.trace(root.real))


# ---------------------------------------------------------------------------------------------- what is compared with what
def test_reference_is_the_full_training_set_also_for_a_subset_run(world):
    full, small = run(world)
    everything, kept = np.load(world / "data" / "images.npy"), np.load(world / "keep.npy")
    all_of_it = features(world, everything)
    for name, m in (("full", full), ("small", small)):
        e = m["encoders"]["scratch"]
        z = features(world, np.load(world / name / "samples.npy"))
        assert e["fd"] == pytest.approx(direct(z, all_of_it), rel=1e-4) and e["reference_n"] == len(everything) == K * PER
        assert abs(e["fd"] - direct(z, features(world, everything[kept]))) > 1e-3 * e["fd"]                     # the wrong reference is told apart
        assert e["fd_heldout"] == pytest.approx(direct(features(world, np.load(world / "data" / "test_images.npy")), all_of_it), rel=1e-3)
    assert small["encoders"]["scratch"]["fd_subset"] == pytest.approx(direct(features(world, everything[kept]), all_of_it), rel=1e-3)
    assert "fd_subset" not in full["encoders"]["scratch"]


def test_protocol_is_complete(world):
    full, small = run(world)
    for m in (full, small):
        e, p = m["encoders"]["scratch"], m["protocol"]
        assert (p["sampler"], p["steps"], p["cfg"], p["cfg_interval"], p["labels"], p["seed"], p["amp"]) == ("heun", 2, 1.5, [0.0, 1.0], "balanced", 3, "none")
        assert p["weights"] == "EMA" and p["checkpoint_step"] == 4 and p["sample_seconds"] > 0 and p["image_format"] == "uint8 arrays"
        assert e["n"] == 40 and e["distance"] == "FD (scratch)" and e["identity"].startswith("scratch:") and e["seconds"] >= 0 and e["fd_heldout_n"] == K * TEST
        assert (e["precision_k"], e["density_k"], e["neighbours_n"]) == (3, 5, 40) and e["kid"]["subset_size"] == 40 and e["per_class"]["n"] == TEST
        assert {"precision", "recall", "density", "coverage", "read_as_labelled"} <= set(e) and len(e["per_class"]["fd"]) == K
        assert m["data"] == "bars" and m["samples_sha256"] == common.sha256(world / m["run"] / "samples.npy") and "torch" in m["provenance"]
    some = np.sort(np.random.default_rng([0, 3]).choice(40, K * TEST, replace=False))
    z = features(world, np.load(world / "full" / "samples.npy"))
    assert full["encoders"]["scratch"]["fd_at_heldout_n"] == pytest.approx(direct(z[some], features(world, np.load(world / "data" / "images.npy"))), rel=1e-3)


def test_audit_has_its_controls_and_the_full_run_as_baseline(world):
    full, small = run(world)
    for space in ("pixels", "scratch"):
        assert set(small["memorisation"][space]) == {"samples", "heldout", "alike", "noise", "baseline"} and set(full["memorisation"][space]) == {"samples", "noise"}
        assert small["memorisation"][space]["samples"]["n"] == 12
    assert small["memorisation"]["model_of"] == "a subset" and full["memorisation"]["model_of"] == "the full set"
    assert small["memorisation"]["pixels"]["noise"]["share"] > 0.95 and 0.2 < small["memorisation"]["pixels"]["heldout"]["share"] < 0.8
    assert run(world, "--no-audit", "--overwrite", "--encoder", "pixels", runs=("small",))[0]["memorisation"] == small["memorisation"]


def test_nearest_png_pairs_a_copy_with_its_original_first(world):
    x, keep = np.load(world / "small" / "samples.npy"), np.load(world / "keep.npy")
    original = np.load(world / "data" / "images.npy")[keep[7]]
    x[25] = original
    np.save(world / "small" / "samples.npy", x)
    run(world)
    with Image.open(world / "small" / "nearest.png") as im:
        sheet = np.asarray(im)
    zoom = sheet.shape[1] // (16 * 9 + 1)
    cells = sheet[::zoom, ::zoom]
    assert cells.shape == (19, 145)
    assert (cells[1:9, 1:9] == original[..., 0]).all() and (cells[10:18, 1:9] == original[..., 0]).all()
    for j in range(16):                                               # each lower picture is the kept image nearest to the one above
        top, low = (cells[r:r + 8, 9 * j + 1:9 * j + 9].astype(float) for r in (1, 10))
        d = np.sqrt(((np.load(world / "data" / "images.npy")[keep][..., 0] - top) ** 2).sum((1, 2)))
        assert d.min() == pytest.approx(np.sqrt(((low - top) ** 2).sum()))


def test_identical_sets(world):
    e = outside(world, world / "data" / "images.npy")["encoders"]["pixels"]
    assert e["fd"] < 1e-6 and e["precision"] == e["recall"] == e["coverage"] == 1 and e["n"] == K * PER
    assert "per_class" not in e                                       # a bare .npy has no labels


# ---------------------------------------------------------------------------------------------- the cache of reference statistics
def test_statistics_are_cached_used_and_invalidated(world, monkeypatch):
    cache = world / "data" / "stats_pixels.npz"
    first = run(world, encoder="pixels")[0]["encoders"]["pixels"]["fd"]
    with np.load(cache) as z:
        kept = dict(z)
    assert kept["mu"] == pytest.approx(features(world, np.load(world / "data" / "images.npy"), "pixels").mean(0), abs=1e-5) and kept["n"] == K * PER
    np.savez(cache, **dict(kept, mu=kept["mu"] + 10))                 # same key, other figures: shows that it is read
    assert run(world, "--overwrite", encoder="pixels")[0]["encoders"]["pixels"]["fd"] > first + 10
    for spoil in (dict(kept, mu=kept["mu"] + 10, key="pixels:0000 " + str(kept["key"]).split()[1]), dict(kept, mu=kept["mu"] + 10, key=str(kept["key"]).split()[0] + " 0000")):
        np.savez(cache, **spoil)                                      # another encoder, another data set: made again
        assert run(world, "--overwrite", encoder="pixels")[0]["encoders"]["pixels"]["fd"] == pytest.approx(first, rel=1e-6)
    cache.write_bytes(b"PK damaged")
    assert run(world, "--overwrite", encoder="pixels")[0]["encoders"]["pixels"]["fd"] == pytest.approx(first, rel=1e-6)


def test_statistics_are_of_all_images_when_only_some_are_held(world):
    whole, = run(world, encoder="pixels", runs=("full",))
    (world / "data" / "stats_pixels.npz").unlink()
    part, = run(world, "--reference-max", "30", encoder="pixels", runs=("full",))
    a, b = whole["encoders"]["pixels"], part["encoders"]["pixels"]
    assert b["fd"] == pytest.approx(a["fd"], rel=1e-6) and b["reference_n"] == K * PER and b["neighbours_n"] == 30 and a["neighbours_n"] == 40


# ---------------------------------------------------------------------------------------------- samples from anywhere
def test_samples_in_every_form_give_one_figure(world):
    x, y = np.load(world / "full" / "samples.npy"), np.load(world / "full" / "sample_labels.npy")
    (world / "bare").mkdir()
    np.save(world / "bare" / "x.npy", x)
    want = outside(world, world / "bare" / "x.npy", out="o0")["encoders"]["pixels"]
    np.savez(world / "adm.npz", arr_0=x, arr_1=y), np.savez(world / "own.npz", images=x, labels=y), np.savez(world / "plain.NPZ", x=0)
    (world / "plain.NPZ.npz").unlink()
    shutil.copy(world / "adm.npz", world / "upper.NPZ")
    deep = world / "folder" / "a" / "b"
    deep.mkdir(parents=True)
    for i, im in enumerate(x):
        picture = Image.fromarray(im[..., 0])
        if i % 2:                                                     # lossless WebP comes back as RGB; PNG is enough for the odd ones
            picture.save(deep / f"{i:03}.PNG")
        else:
            picture.save(world / "folder" / f"{i:03}.png")
    (world / "folder" / "notes.txt").write_text("not a picture")
    for k, source in enumerate((world / "adm.npz", world / "own.npz", world / "upper.NPZ", world / "folder"), 1):
        m = outside(world, source, out=f"o{k}")
        assert m["encoders"]["pixels"]["fd"] == pytest.approx(want["fd"], rel=1e-9) and m["encoders"]["pixels"]["n"] == 40
        assert ("per_class" in m["encoders"]["pixels"]) == (source.suffix.lower() == ".npz")
    assert m["protocol"]["image_format"] == ".png files" and m["memorisation"] is None


def test_colour_pictures_and_webp(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "Sub").mkdir()
    x = rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    for i, name in enumerate(("a.PNG", "b.webp", "Sub/c.WebP", "Sub/d.bmp")):
        Image.fromarray(x[i]).save(tmp_path / name, **({"lossless": True} if "web" in name.lower() else {}), format=Path(name).suffix[1:].upper())
    got, labels = evaluate.read_samples(tmp_path)
    assert labels is None and got.shape == x.shape and sorted(got.sum((1, 2, 3))) == sorted(x.sum((1, 2, 3)))
    assert {".png", ".webp", ".bmp"} == {Path(f).suffix.lower() for f in evaluate.pictures(tmp_path)}


# ---------------------------------------------------------------------------------------------- several judges, several guidances
def test_every_judge_s_figures_are_those_of_its_own_network_and_the_row_is_their_mean(world):
    before = common.load_pt(world / "data" / "scratch.pt")
    row = run(world, runs=("full",), judges=3)[0]["encoders"]["scratch"]
    states = common.networks_in(world / "data" / "scratch.pt")
    assert [s["seed"] for s in states] == [0, 1, 2]
    for key, value in before["model"].items():                        # an old file of one network is the first judge of the new one
        assert (states[0]["model"][key] == value).all()
    x, everything = np.load(world / "full" / "samples.npy"), np.load(world / "data" / "images.npy")
    fds = []
    for state in states:
        net = scratch.Scratch.restore(state).eval()
        z = []
        for images in (x, everything):
            with torch.no_grad():
                z.append(net(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)[0].numpy().astype(np.float64))
        fds.append(direct(*z))
    assert [one["fd"] for one in row["judges"]] == pytest.approx(fds, rel=1e-3)
    assert row["fd"] == pytest.approx(np.mean(fds), rel=1e-3) and len({one["identity"] for one in row["judges"]}) == 3
    assert row["precision"] == pytest.approx(np.mean([one["precision"] for one in row["judges"]]))
    per = np.mean([one["per_class"]["fd"] for one in row["judges"]], 0)
    assert row["per_class"]["fd"] == pytest.approx(per) and row["per_class"]["worst_fd"] == pytest.approx(per.max()) and row["per_class"]["worst"] == per.argmax()


def test_judges_that_stand_are_not_asked_again_and_more_of_them_are(world, capsys, monkeypatch):
    run(world, runs=("full",), judges=2)
    first = (world / "full" / "metrics.json").read_bytes()
    run(world, runs=("full",), judges=2)
    assert "measured already" in capsys.readouterr().out and (world / "full" / "metrics.json").read_bytes() == first
    # Cut short behind the first judge: only the second is asked again.
    made = json.loads(first)
    del made["encoders"]["scratch"]["judges"][1]
    (world / "full" / "metrics.json").write_text(json.dumps(made))
    asked, figures = [], evaluate.figures
    monkeypatch.setattr(evaluate, "figures", lambda r, ref, args: asked.append(ref.judge) or figures(r, ref, args))
    run(world, runs=("full",), judges=2)
    row = json.loads((world / "full" / "metrics.json").read_text())["encoders"]["scratch"]
    assert asked == [1] and [one["fd"] for one in row["judges"]] == [one["fd"] for one in json.loads(first)["encoders"]["scratch"]["judges"]]
    run(world, runs=("full",), judges=3)
    assert asked == [1, 0, 1, 2]


def test_a_file_with_fewer_judges_than_asked_for_is_refused(world, capsys):
    path = world / "one.pt"
    shutil.copy(world / "data" / "scratch.pt", path)
    refused(capsys, lambda: run(world, "--encoder-weights", str(path), judges=2), path, "--judges 2")


def test_several_guidances_are_measured_each_and_each_half_alone(world):
    sample.main(["--checkpoint", str(world / "full" / "last.pt"), "--out", str(world / "full"), "--num", "40", "--steps", "2", "--cfg", "1", "1.5", "--seed", "3", "--device", "cpu", "--overwrite"])
    run(world, runs=("full",))
    everything = features(world, np.load(world / "data" / "images.npy"))
    for name, cfg in (("metrics.json", 1), ("metrics_cfg1.5.json", 1.5)):
        made = json.loads((world / "full" / name).read_text())
        z = features(world, np.load(world / "full" / f"samples_cfg{cfg}.npy"))
        row = made["encoders"]["scratch"]
        assert made["protocol"]["cfg"] == cfg and row["fd"] == pytest.approx(direct(z, everything), rel=1e-3)
        assert row["fd_halves"] == pytest.approx([direct(z[:20], everything), direct(z[20:], everything)], rel=1e-3)
        assert (made["memorisation"] is not None) == (cfg == 1)
    # The guided set of before, drawn alone, is the same: sample i depends on (seed, i) alone.
    drawn = np.load(world / "full" / "samples_cfg1.5.npy")
    sample.main(["--checkpoint", str(world / "full" / "last.pt"), "--out", str(world / "alone"), "--num", "40", "--steps", "2", "--cfg", "1.5", "--seed", "3", "--device", "cpu"])
    assert np.array_equal(drawn, np.load(world / "alone" / "samples.npy"))


def test_random_subsets_have_the_class_counts_of_the_kept_one(world):
    row = run(world, runs=("small",))[0]["encoders"]["scratch"]
    images, labels, keep = np.load(world / "data" / "images.npy"), np.load(world / "data" / "labels.npy"), np.load(world / "keep.npy")
    z = features(world, images)
    rng, mine = np.random.default_rng(7), []
    for _ in range(200):                                              # other draws: the same distribution
        rows = [rng.choice(np.flatnonzero(labels == c), (labels[keep] == c).sum(), replace=False) for c in range(K)]
        mine.append(direct(z[np.concatenate(rows)], z))
    theirs = row["fd_random_subsets"]
    assert len(theirs) == 20 and len(set(theirs)) == 20
    assert abs(np.mean(theirs) - np.mean(mine)) < 4 * np.std(mine) / 20 ** 0.5


def test_num_takes_the_first(world):
    m, = run(world, "--num", "20", runs=("full",))
    assert m["encoders"]["scratch"]["n"] == 20
    assert m["encoders"]["scratch"]["fd"] == pytest.approx(direct(features(world, np.load(world / "full" / "samples.npy")[:20]), features(world, np.load(world / "data" / "images.npy"))), rel=1e-3)


def test_bootstrap(world):
    e = run(world, "--bootstrap", "5", encoder="pixels", runs=("full",))[0]["encoders"]["pixels"]
    z = features(world, np.load(world / "full" / "samples.npy"), "pixels")
    mu, sigma = metrics.gaussian_stats(features(world, np.load(world / "data" / "images.npy"), "pixels"))
    b = e["fd_bootstrap"]
    assert (b["mean"], b["std"], b["low"], b["high"]) == pytest.approx(metrics.bootstrap_frechet(z, mu, sigma, 5, 0), rel=1e-4) and b["repeats"] == 5
    assert b["low"] < b["high"] and b["mean"] > e["fd"]


@pytest.mark.parametrize("names", [("mu", "sigma"), ("m2", "s2")])
def test_reference_statistics_of_others(world, names):
    z = features(world, np.load(world / "data" / "images.npy")[:90], "pixels")
    mu, sigma = metrics.gaussian_stats(z)
    np.savez(world / "ref.npz", **dict(zip(names, (mu, sigma))))
    before, = run(world, encoder="pixels", runs=("small",))
    m, = run(world, "--reference-stats", str(world / "ref.npz"), encoder="pixels", runs=("small",))
    e, everything = m["encoders"]["pixels"], np.load(world / "data" / "images.npy")
    assert e["fd"] == pytest.approx(direct(features(world, np.load(world / "small" / "samples.npy"), "pixels"), z), rel=1e-3) and e["reference"].endswith("ref.npz")
    assert e["fd"] != before["encoders"]["pixels"]["fd"] and e["reference_n"] is None
    assert e["fd_subset"] == pytest.approx(direct(features(world, everything[np.load(world / "keep.npy")], "pixels"), z), rel=1e-3)    # the same reference


def test_pictures_are_read_as_data_py_reads_them(tmp_path):
    """One reader: what makes a data folder and what judges a folder of samples see the same pixels, whatever the files are like."""
    pixels = odd.noisy(tmp_path / "s" / "a.png", 0, (8, 12))
    odd.jpeg_turned(tmp_path / "s" / "b.jpg", np.rot90(pixels).copy(), 6)
    clear = np.dstack([pixels, np.random.default_rng(1).integers(0, 256, (12, 8), dtype=np.uint8)])
    Image.fromarray(clear).save(tmp_path / "s" / "c.png")
    odd.noisy(tmp_path / "s" / "d.png", 2, (8, 12), channels=1)
    odd.png_grey16(tmp_path / "s" / "e.png", np.random.default_rng(3).integers(0, 65536, (12, 8)))
    odd.tree(tmp_path / "s" / ".ipynb_checkpoints", ["x.png", "y.png"], (8, 12))
    odd.tree(tmp_path / "s" / "@eaDir", ["x.png"], (8, 12))
    odd.noisy(tmp_path / "elsewhere" / "z.png", 9, (8, 12))
    (tmp_path / "s" / "link").symlink_to(tmp_path / "elsewhere")
    images, labels = evaluate.read_samples(tmp_path / "s")
    data.main([str(tmp_path / "s"), "--labels-from", "none", "--workers", "1", "--out", str(tmp_path / "d")])
    assert labels is None and np.array_equal(images, np.load(tmp_path / "d" / "images.npy")) and len(images) == 6
    assert (images[0] == pixels).all() and np.abs(images[1].astype(int) - pixels).mean() < 40
    share = clear[..., 3:] / 255
    assert np.abs(images[2] - (share * pixels + (1 - share) * 255)).max() <= 1
    odd.zipped(tmp_path / "s.zip", tmp_path / "elsewhere")
    assert np.array_equal(evaluate.read_samples(tmp_path / "s.zip")[0], images[5:])
    grey = odd.tree(tmp_path / "g", ["1.png"]).parent / "g2"
    Image.fromarray(np.dstack([images[3][..., 0]] * 3)).save(odd.fresh(grey / "1.png"))       # grey in three equal channels
    three = evaluate.read_samples(grey)[0]
    assert three.shape[3] == 3 and evaluate.with_channels(three, 1).shape[3] == 1 and evaluate.with_channels(three[..., :1], 3).shape[3] == 3
    assert evaluate.with_channels(images, 1).shape[3] == 3            # colour stays colour, and is refused


def test_a_data_folder_that_cannot_be_written_costs_the_cache_only(world, monkeypatch, capsys):
    """Shared data sets are read-only as a rule."""
    real = common.atomic

    def atomic(path):
        if Path(path).parent == world / "data":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)
    monkeypatch.setattr(common, "atomic", atomic)
    m, = run(world, encoder="pixels", runs=("full",))
    assert m["encoders"]["pixels"]["fd"] > 0 and "is not kept (Permission denied)" in capsys.readouterr().out
    assert not list((world / "data").glob("stats_*"))


# ---------------------------------------------------------------------------------------------- measured again, or not
def without_alike(m):
    """The audit in pixels, but for the control whose images the encoder chose."""
    return {k: v for k, v in m["memorisation"]["pixels"].items() if k != "alike"}


def test_second_encoder_joins_the_first(world, capsys):
    first = run(world)
    second = run(world, encoder="pixels")
    for a, b in zip(first, second):
        assert list(b["encoders"]) == ["scratch", "pixels"] and b["encoders"]["scratch"] == a["encoders"]["scratch"]
        assert b["memorisation"]["scratch"] == a["memorisation"]["scratch"]
        assert without_alike(b) == without_alike(a)                     # the space of raw pixels, not the encoder of that name
    fewer = run(world, "--num", "20", encoder="scratch")[1]["memorisation"]
    assert fewer["n"] == 20 and set(fewer) & {"scratch", "pixels"} == {"scratch", "pixels"} and fewer["scratch"] != first[1]["memorisation"]["scratch"]
    only = run(world, "--num", "30", encoder="pixels")[1]["memorisation"]
    assert only["n"] == 30 and "scratch" not in only                  # one n for all spaces: it says how far a share may lie from one half
    run(world, "--overwrite"), run(world, "--overwrite", encoder="pixels")
    stamps = [(world / r / "metrics.json").stat().st_mtime_ns for r in ("full", "small")]
    capsys.readouterr()
    run(world), run(world, encoder="pixels")
    assert capsys.readouterr().out.count("nothing to do") == 4
    assert stamps == [(world / r / "metrics.json").stat().st_mtime_ns for r in ("full", "small")]
    (world / "full/evaluate.args.json").unlink()                      # killed between the figures and the record
    (world / "full/.evaluate.args.abcdefgh.tmp.json").write_text("half")
    run(world)
    assert json.loads((world / "full/evaluate.args.json").read_text())["seconds"] is not None and not list((world / "full").glob(".*"))
    assert stamps == [(world / r / "metrics.json").stat().st_mtime_ns for r in ("full", "small")]


def test_the_encoder_called_pixels_is_not_the_space_of_raw_pixels(world, monkeypatch):
    first = run(world, "--no-audit", "--overwrite") and without_alike(run(world)[1])
    monkeypatch.setattr(encoders.Pixels, "forward", lambda self, x: ((self.flat(x) - self.mean) @ self.components[:, :1], None, None))     # one component: other neighbours
    assert without_alike(run(world, encoder="pixels")[1]) == first


def test_what_has_changed_is_measured_again(world, capsys):
    run(world), run(world, encoder="pixels")
    capsys.readouterr()
    for flags in (["--num", "30"], ["--seed", "1"], ["--bootstrap", "3"], ["--reference-max", "50"], ["--audit-samples", "20"]):
        run(world, encoder="pixels", runs=("full",))                  # without the flag
        capsys.readouterr()
        run(world, *flags, encoder="pixels", runs=("full",))
        assert "nothing to do" not in capsys.readouterr().out, flags
        run(world, *flags, encoder="pixels", runs=("full",))
        assert "nothing to do" in capsys.readouterr().out, flags
    x = np.load(world / "full" / "samples.npy")
    np.save(world / "full" / "samples.npy", x[::-1])
    m, = run(world, runs=("full",))
    assert list(m["encoders"]) == ["scratch"] and "nothing to do" not in capsys.readouterr().out                 # figures of other samples do not stay
    d = common.open_data(world / "data")
    common.save_pt(world / "data" / "scratch.pt", scratch.train_scratch(d.images, d.labels, K, "cpu", seed=5, stop=2))
    new, = run(world, runs=("full",))
    assert new["encoders"]["scratch"]["identity"] != m["encoders"]["scratch"]["identity"]                        # another judge


def test_folder_samples_are_known_again(world, capsys):
    (world / "f").mkdir()
    for i, im in enumerate(np.load(world / "full" / "samples.npy")[:12]):
        Image.fromarray(im[..., 0]).save(world / "f" / f"{i}.png")
    outside(world, world / "f")
    capsys.readouterr()
    outside(world, world / "f")
    assert "nothing to do" in capsys.readouterr().out


def judges_used(folder, aligned=True):
    """Of a run that trained with the attachments of this folder, or on its kept set alone."""
    args = dict(attach=str(folder)) if aligned else dict(indices=str(folder / "keep.npy"))
    return evaluate.judges_used({"args": args})


def circular(world, encoder, score, **more):
    (world / "prune").mkdir(exist_ok=True)
    shutil.copy(world / "keep.npy", world / "prune" / "keep.npy")
    common.save_json(world / "prune" / "prune.args.json", {"args": {"score": score, "surrogate": "pixels", "features": None, **more}, "seconds": 1})
    record = json.loads((world / "small" / "train.args.json").read_text())
    record["args"]["indices"] = str(world / "prune" / "keep.npy")
    common.save_json(world / "small" / "train.args.json", record)
    return run(world, "--overwrite", "--no-audit", encoder=encoder, runs=("small",))[0]["encoders"][encoder]["circular"]


def test_circular_judges_are_named(world, capsys):
    assert circular(world, "pixels", "gaussian") and "WARNING" in capsys.readouterr().out
    assert not circular(world, "scratch", "gaussian") and "WARNING" not in capsys.readouterr().out
    assert not circular(world, "pixels", "random") and not circular(world, "pixels", "gaussian", features="f.npy") and circular(world, "scratch", "el2n")
    attach = world / "attach"
    attach.mkdir()
    shutil.copy(world / "keep.npy", attach / "keep.npy")
    common.save_json(attach / "attach.args.json", {"args": {"visual": "scratch", "indices": str(world / "prune" / "keep.npy")}, "seconds": 1})
    common.save_json(world / "prune" / "prune.args.json", {"args": {"score": "herding", "surrogate": "pixels"}, "seconds": 1})
    assert judges_used(attach) == {"scratch", "pixels"} and judges_used(attach, aligned=False) == {"pixels"}


def test_judges_are_followed_through_files_used_again(tmp_path):
    def made(name, script, **args):
        (tmp_path / name).mkdir()
        common.save_json(tmp_path / name / f"{script}.args.json", {"args": args, "seconds": 1})
        return lambda file: str(tmp_path / name / file)
    first = made("first", "prune", score="gaussian", surrogate="inception")
    second = made("cut", "prune", score=None, scores=first("scores.npy"), surrogate="inception")
    made("recut", "prune", score=None, scores=second("scores.npy"), surrogate="pixels")
    made("again", "prune", score="herding", features=first("features.npy"), surrogate="pixels")
    made("own", "prune", score=None, scores=str(tmp_path / "x.npy"), surrogate="pixels")
    d2c = made("d2c", "attach", select="interval", reference="r.pt", visual="scratch")
    made("hard", "attach", select="hard", reference=None, difficulty=d2c("difficulty.npy"), visual="none")
    made("drawn", "attach", select="random", reference="r.pt", visual="ddae")
    used = lambda name, aligned=True: judges_used(tmp_path / name, aligned)                     # noqa: E731
    assert used("cut") == used("recut") == used("again") == {"inception"} and used("own") == set()
    assert used("d2c") == {"ddae", "scratch"} and used("d2c", False) == used("hard") == {"ddae"}
    assert used("drawn") == {"ddae"} and used("drawn", False) == set()


def test_what_a_record_says_goes_before_the_name_of_a_score(tmp_path):
    """A score or a selection that is not known here is judged by the `looked_at` that its stage wrote."""
    def made(name, script, looked_at, **args):
        (tmp_path / name).mkdir()
        common.save_json(tmp_path / name / f"{script}.args.json", {"args": args, "seconds": 1, "looked_at": looked_at})
        return judges_used(tmp_path / name, aligned=False)
    for looked_at, used in (("features", {"inception"}), ("labels", {"scratch"}), ("nothing", set()), ("scores", set())):
        assert made(f"a-{looked_at}", "prune", looked_at, score="new", surrogate="inception") == used
        assert made(f"b-{looked_at}", "prune", looked_at, score="random", surrogate="inception") == used
    assert made("c", "attach", "difficulty", select="new", reference="r.pt") == {"ddae"} and made("d", "attach", "nothing", select="hard", reference="r.pt") == set()


def test_a_run_on_the_kept_set_of_attach_alone_is_not_aligned(world):
    (world / "attach").mkdir()
    shutil.copy(world / "keep.npy", world / "attach" / "keep.npy")
    common.save_json(world / "attach" / "attach.args.json", {"args": {"visual": "pixels", "select": "random", "reference": None}, "seconds": 1})
    record = json.loads((world / "small" / "train.args.json").read_text())
    for args, aligned in ((dict(indices=str(world / "attach" / "keep.npy")), False), (dict(indices=None, attach=str(world / "attach")), True)):
        common.save_json(world / "small" / "train.args.json", {**record, "args": {**record["args"], **args}})
        assert run(world, "--overwrite", "--no-audit", encoder="pixels", runs=("small",))[0]["encoders"]["pixels"]["circular"] == aligned


@pytest.mark.parametrize("how", ["indices", "attach"])
def test_a_kept_set_that_changed_since_is_refused(world, capsys, how):
    (world / "attach").mkdir()
    keep = world / "attach" / "keep.npy"
    shutil.copy(world / "keep.npy", keep)
    record = json.loads((world / "small" / "train.args.json").read_text())
    digest = record["inputs"].pop("indices")
    assert digest == common.sha256(keep)
    args = dict(indices=str(keep)) if how == "indices" else dict(indices=None, attach=str(keep.parent))
    record["inputs"]["indices" if how == "indices" else "attach_keep"] = digest
    common.save_json(world / "small" / "train.args.json", {**record, "args": {**record["args"], **args}})
    np.save(keep, np.arange(12))
    refused(capsys, lambda: run(world, encoder="pixels"), str(keep), "has changed since", absent=[world / "full" / "metrics.json"])
    common.save_json(world / "small" / "train.args.json", {**record, "inputs": {}, "args": {**record["args"], **args}})     # an older record: not known
    assert len(run(world, encoder="pixels")) == 2


def test_other_heldout_images_are_measured_again(world, capsys):
    run(world, encoder="pixels", runs=("full",))
    info = json.loads((world / "data" / "dataset.json").read_text())
    common.save_json(world / "data" / "dataset.json", {**info, "sha256_test": "another"})
    capsys.readouterr()
    run(world, encoder="pixels", runs=("full",))
    assert "nothing to do" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- several processes
def alike(a, b, where=""):
    """Two JSON values: integers, words and lengths equal, floats to 1e-5."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for k in a.keys() - {"seconds", "provenance"}:
            alike(a[k], b[k], f"{where}/{k}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            alike(x, y, f"{where}/{i}")
    else:
        assert a == (pytest.approx(b, rel=1e-5, abs=1e-6) if isinstance(a, float) else b), where


@pytest.mark.parametrize("n, more", [(2, ()), pytest.param(3, ("--trajectory",), marks=pytest.mark.slow), pytest.param(2, ("--trajectory",), marks=pytest.mark.slow),
                                     pytest.param(3, (), marks=pytest.mark.slow)])
def test_processes_measure_what_one_measures(n, more, world, tmp_path):
    """Uneven shards everywhere; statistics of more images than are held; samples of an .npz are sent to the others."""
    flags = ["--reference-max", "50", "--bootstrap", "2", *more]
    shutil.copytree(world, tmp_path / "n")
    torch.set_num_threads(1)  # as each of the processes: training the judges rounds by the number of threads
    run(world, "--batch-size", "16", *flags, judges=2)
    ranks = processes(n, ROOT / "evaluate.py", "--data", tmp_path / "n" / "data", "--runs", tmp_path / "n" / "full", tmp_path / "n" / "small", "--encoder", "scratch", "--judges", "2",
                      "--device", "cpu", "--batch-size", "16", *flags)
    assert [code for code, *_ in ranks] == n * [0] and all(not out for _, out, _ in ranks[1:]), ranks
    for name in ("full", "small"):
        file = "trajectory.json" if more else "metrics.json"
        alike(*(json.loads((w / name / file).read_text()) for w in (tmp_path / "n", world)))
        assert more or (tmp_path / "n" / name / "nearest.png").read_bytes() == (world / name / "nearest.png").read_bytes()
        assert sorted(p.name for p in (tmp_path / "n" / name).iterdir()) == sorted(p.name for p in (world / name).iterdir())


def test_images_are_encoded_alike_from_a_file_and_from_memory(world):
    """Team.encode: rows of a memory map, of an array that would be sent in several parts, and all of it."""
    d = common.open_data(world / "data")
    enc = common.open_encoder("scratch", d, "cpu")
    team, rows = evaluate.Team([enc], 16, "cpu"), np.array([2, 3, 50, 119])
    want = encoders.extract(enc, d.images, rows=rows)
    sizes, ask = [], team.ask
    team.ask = lambda task, judge, source, ids, *rest: sizes.append(len(ids)) or ask(task, judge, source, ids, *rest)
    for images in (d.images, np.array(d.images), evaluate.Selection(d.images, np.arange(K * PER)), np.broadcast_to(np.array(d.images)[:, None], (K * PER, 1, 8, 8, 1))[:, 0]):
        np.testing.assert_allclose(team.encode(0, images)[rows], want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(team.encode(0, evaluate.Selection(d.images, rows)), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(team.encode(0, evaluate.Selection(np.array(d.images), rows)), want, rtol=1e-5, atol=1e-5)
    assert sizes == [K * PER] * 4 + [4, 4]


def test_the_audit_s_pool_is_thinned_only_where_no_draw_can_tell(world):
    """at_most: a class keeps its limit, drawn evenly; nothing changes where no class is above it."""
    labels = np.array([0] * 50 + [1] * 30 + [2] * 5)
    rows, rng = np.delete(np.arange(85), [3, 60]), np.random.default_rng(0)
    assert np.array_equal(evaluate.at_most(rows, labels, np.array([49, 29, 5]), rng), rows)
    seen = np.zeros(85)
    for _ in range(400):
        some = evaluate.at_most(rows, labels, np.array([10, 0, 99]), rng)
        assert np.bincount(labels[some], minlength=3).tolist() == [10, 0, 5] and (np.diff(some) > 0).all() and np.isin(some, rows).all()
        seen[some] += 1
    assert abs(seen[rows[labels[rows] == 0]] / 400 - 10 / 49).max() < 0.1


def test_a_space_too_large_for_memory_is_left_out_of_the_audit(world, monkeypatch, capsys):
    """Pixels are 64 wide, scratch features 32."""
    whole = run(world, runs=("small",))[0]["memorisation"]
    (world / "small" / "metrics.json").unlink()                       # spaces measured earlier would stay
    monkeypatch.setattr(evaluate, "AUDIT_BYTES", 4 * 64 * K * PER - 1)
    m = run(world, "--overwrite", runs=("small",))[0]["memorisation"]
    assert "no memorisation audit in pixels" in capsys.readouterr().out and m["left_out"] == ["pixels"] and "pixels" not in m and m["scratch"] == whole["scratch"]
    monkeypatch.setattr(evaluate, "AUDIT_BYTES", 4 * 32 * K * PER - 1)
    assert "GB of vectors" in run(world, "--overwrite", runs=("small",))[0]["memorisation"]["skipped"]


def test_what_goes_wrong_in_the_shared_work_is_one_line_on_every_rank(monkeypatch):
    """follow() runs on the ranks that do not measure: a ValueError of models/ there must not end in a traceback."""
    team = evaluate.Team(None, 4, "cpu")

    def broken(*_):
        raise ValueError("VAE x: cannot be loaded")
    monkeypatch.setattr(team, "draw_share", broken)
    monkeypatch.setattr(common, "from_rank0", lambda make: ("draw_share", ("last.pt", {}, None)))
    for work in (lambda: team.ask("draw_share"), team.follow):
        with pytest.raises(common.UserError, match="VAE x"):
            work()


# ---------------------------------------------------------------------------------------------- trajectory
def test_trajectory_ends_at_the_run_s_own_distance(world, capsys):
    m = run(world, "--no-audit")
    run(world, "--trajectory", "--batch-size", "16")
    for name, figures in zip(("full", "small"), m):
        t = json.loads((world / name / "trajectory.json").read_text())
        assert [p["step"] for p in t["points"]] == [2, 4] and [p["images_seen"] for p in t["points"]] == [16, 32] and t["name"] == "scratch"
        assert t["points"][-1]["fd"] == pytest.approx(figures["encoders"]["scratch"]["fd"], rel=1e-4) and {p["n"] for p in t["points"]} == {40}
        assert t["points"][0]["fd"] != t["points"][1]["fd"] and t["points"][0]["seconds"] < t["points"][1]["seconds"]
    capsys.readouterr()
    run(world, "--trajectory")
    assert capsys.readouterr().out.count("nothing to do") == 2
    run(world, "--trajectory", "--trajectory-num", "10", runs=("full",))
    assert {p["n"] for p in json.loads((world / "full" / "trajectory.json").read_text())["points"]} == {10}


def test_trajectory_is_measured_against_the_given_statistics(world, capsys):
    z = features(world, np.load(world / "data" / "images.npy"), "pixels")
    for name, part in (("a", z[:60]), ("b", z[60:])):
        np.savez(world / f"{name}.npz", **dict(zip(("mu", "sigma"), metrics.gaussian_stats(part))))
    ends = []
    for name in "ab":
        flags = ("--reference-stats", str(world / f"{name}.npz"))
        m, = run(world, "--no-audit", *flags, encoder="pixels", runs=("full",))
        capsys.readouterr()
        run(world, "--trajectory", *flags, encoder="pixels", runs=("full",))
        assert "nothing to do" not in capsys.readouterr().out         # other statistics, other points
        ends.append(json.loads((world / "full" / "trajectory.json").read_text())["points"][-1]["fd"])
        assert ends[-1] == pytest.approx(m["encoders"]["pixels"]["fd"], rel=1e-4)
    assert ends[0] != pytest.approx(ends[1], rel=1e-3)


def test_trajectory_draws_as_sample_py_did(world):
    """Random labels, and a last checkpoint that is no multiple of the interval."""
    (world / "full" / "step_0000004.pt").unlink()
    sample.main(["--checkpoint", str(world / "full" / "last.pt"), "--out", str(world / "full"), "--num", "30", "--steps", "2", "--sampler", "sde", "--labels", "random",
                 "--cfg-interval", "0.2", "0.9", "--cfg", "2", "--seed", "4", "--overwrite", "--device", "cpu"])
    m, = run(world, "--no-audit", runs=("full",))
    run(world, "--trajectory", runs=("full",))
    points = json.loads((world / "full" / "trajectory.json").read_text())["points"]
    assert [p["step"] for p in points] == [2, 4] and points[-1]["fd"] == pytest.approx(m["encoders"]["scratch"]["fd"], rel=1e-4)


def test_trajectory_refusals(world, capsys):
    refused(capsys, lambda: run(world, "--trajectory", "--trajectory-num", "41"), "40 samples", "--trajectory-num 41")
    refused(capsys, lambda: run(world, "--trajectory", "--encoder", "scratch", "pixels"), "one --encoder")
    for f in (world / "full").glob("step_*.pt"):
        f.unlink()
    refused(capsys, lambda: run(world, "--trajectory", runs=("full",)), "no step_*.pt", "--checkpoint-every", absent=[world / "full" / "trajectory.json", world / "full" / "evaluate.args.json"])
    (world / "small" / "sample_labels.npy").unlink()
    refused(capsys, lambda: run(world, "--trajectory", runs=("small",)), "sample_labels.npy")


# ---------------------------------------------------------------------------------------------- refusals
def test_bad_samples(world, capsys):
    out, x = world / "out", np.load(world / "full" / "samples.npy")
    nothing = [out, world / "full" / "metrics.json", world / "full" / "evaluate.args.json"]
    bad = world / "bad"
    bad.mkdir()

    def case(name, array, *words, **kw):
        np.savez(bad / name, **kw) if name.endswith(".npz") else np.save(bad / name, array)
        refused(capsys, lambda: outside(world, bad / name), bad / name, *words, absent=nothing)
    case("one.npy", x[:1], "1 samples", "at least 2")
    case("size.npy", np.zeros((5, 16, 16, 1), np.uint8), "(16, 16, 1)", "(8, 8, 1)")
    case("float.npy", x.astype(np.float32), "float32")
    case("flat.npy", x[..., 0], "(40, 8, 8)")
    case("keys.npz", None, "arr_0", other=x)
    case("labels.npz", None, "40 samples but labels", arr_0=x, arr_1=np.zeros(39, int))
    case("names.npz", None, "one integer per sample", arr_0=x, arr_1=np.full(40, "cat"))
    (bad / "cut.npy").write_bytes((world / "full" / "samples.npy").read_bytes()[:500])
    refused(capsys, lambda: outside(world, bad / "cut.npy"), "cut.npy", absent=nothing)
    (bad / "cut.npz").write_bytes(b"PK")
    refused(capsys, lambda: outside(world, bad / "cut.npz"), "cut.npz", absent=nothing)
    refused(capsys, lambda: outside(world, bad / "absent.npy"), "absent.npy", "sample.py", absent=nothing)
    refused(capsys, lambda: run(world, "--num", "41"), "40 samples", "--num 41", absent=nothing)
    (bad / "empty").mkdir()
    refused(capsys, lambda: outside(world, bad / "empty"), "no picture", absent=nothing)
    for i in range(2):
        Image.fromarray(x[i, ..., 0]).save(bad / "empty" / f"{i}.png")
    (bad / "empty" / "broken.png").write_bytes(b"\x89PNG not")
    refused(capsys, lambda: outside(world, bad / "empty"), "broken.png", "not a readable picture", absent=nothing)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(bad / "empty" / "broken.png")
    refused(capsys, lambda: outside(world, bad / "empty"), "broken.png", "9x9", absent=nothing)
    (world / "small" / "samples.npy").unlink()
    refused(capsys, lambda: run(world), "small/samples.npy", "sample.py", absent=nothing)


def test_bad_runs(world, capsys):
    nothing = [world / "full" / "metrics.json", world / "full" / "evaluate.args.json"]
    np.save(world / "small" / "sample_labels.npy", np.zeros(39, np.int64))
    refused(capsys, lambda: run(world), "sample_labels.npy", "(39,)", absent=nothing)
    np.save(world / "small" / "sample_labels.npy", np.zeros(40, np.int64))
    record = world / "small" / "sample.args.json"
    saved = json.loads(record.read_text())
    common.save_json(record, {**saved, "seconds": None})
    refused(capsys, lambda: run(world), "small", "has not finished", absent=nothing)
    common.save_json(record, saved)
    data_folder(world / "other", seed=9, name="stripes")
    refused(capsys, lambda: evaluate.main(["--data", str(world / "other"), "--runs", str(world / "full"), "--encoder", "pixels", "--device", "cpu"]), "bars", "stripes", absent=nothing)
    refused(capsys, lambda: run(world, "--samples", "x"), "either --runs", absent=nothing)
    refused(capsys, lambda: run(world, runs=("full", "small", "full")), "full is named twice", absent=nothing)
    refused(capsys, lambda: outside(world, world / "data/test_images.npy", out="full"), "is a run of train.py", absent=nothing)
    refused(capsys, lambda: run(world, "--encoder-weights", "a", "b"), "--encoder-weights", absent=nothing)
    refused(capsys, lambda: run(world, "--encoder-weights", str(world / "none.pth"), encoder="inception"), "none.pth", absent=nothing)


@pytest.mark.parametrize("change, words", [
    (dict(mu=np.zeros(5), sigma=np.eye(5)), ["5 features", "same encoder"]), (dict(mu=np.zeros(5), sigma=np.eye(4)), ["(5,)", "(4, 4)"]),
    (dict(mu=np.full(32, np.nan), sigma=np.eye(32)), ["NaN"]), (dict(mean=np.zeros(5)), ["holds mean", "mu and sigma, or m2 and s2"]),
    (dict(mu=np.full(5, "a"), sigma=np.eye(5)), ["floats"]), (None, ["not a readable .npz"])])
def test_bad_reference_statistics(world, capsys, change, words):
    path = world / "ref.npz"
    path.write_bytes(b"no") if change is None else np.savez(path, **change)
    refused(capsys, lambda: run(world, "--reference-stats", str(path)), path, *words, absent=[world / "full" / "metrics.json", world / "full" / "evaluate.args.json"])


def test_a_model_of_everything_without_heldout_images_skips_the_audit(world):
    (world / "data" / "test_images.npy").unlink(), (world / "data" / "test_labels.npy").unlink()
    full, small = run(world)
    assert "no held-out images" in full["memorisation"]["skipped"] and "heldout" not in small["memorisation"]["pixels"]
    assert full["encoders"]["scratch"]["fd_heldout"] is None and "fd_at_heldout_n" not in full["encoders"]["scratch"]


def test_as_a_process(world):
    done = subprocess.run([sys.executable, str(ROOT / "evaluate.py"), "--data", str(world / "data"), "--runs", str(world / "full"), "--encoder", "pixels", "--device", "cpu"],
                          capture_output=True, text=True, cwd=world)
    assert done.returncode == 0 and "FD (pixels)" in done.stdout and (world / "full" / "nearest.png").exists(), done.stderr
    done = subprocess.run([sys.executable, str(ROOT / "report.py"), str(world / "full"), "--out", str(world / "report")], capture_output=True, text=True, cwd=world)
    assert done.returncode == 0 and (world / "report" / "report.md").exists(), done.stderr


# ---------------------------------------------------------------------------------------------- on real digits
@pytest.mark.slow
def test_real_digits(tmp_path):
    """A model of 150 digits memorises and a model of 1 500 does not; an outside classifier reads the full model's samples as labelled."""
    from sklearn.svm import SVC
    python = lambda script, *flags: subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], check=True, capture_output=True, text=True)   # noqa: E731
    data = tmp_path / "digits"
    python("data.py", "digits", "--out", data)
    x, y = np.load(data / "images.npy"), np.load(data / "labels.npy")
    np.save(tmp_path / "keep.npy", np.sort(np.concatenate([np.random.default_rng(c).permutation(np.flatnonzero(y == c))[:15] for c in range(10)])))
    runs = [tmp_path / "full", tmp_path / "small"]
    for out, flags in zip(runs, ([], ["--indices", tmp_path / "keep.npy"])):
        python("train.py", "--data", data, "--preset", "digits", "--checkpoint-every", 0, "--out", out, *flags)
        python("sample.py", "--checkpoint", out / "last.pt", "--num", 1000, "--sampler", "heun", "--steps", 12, "--cfg", 1.5, "--out", out)
    python("evaluate.py", "--runs", *runs, "--data", data)
    full, small = (json.loads((r / "metrics.json").read_text()) for r in runs)
    judge = SVC(C=10).fit(x.reshape(len(x), -1) / 255, y)
    assert judge.score(np.load(data / "test_images.npy").reshape(297, -1) / 255, np.load(data / "test_labels.npy")) > 0.97
    assert judge.score(np.load(runs[0] / "samples.npy").reshape(1000, -1) / 255, np.load(runs[0] / "sample_labels.npy")) >= 0.9
    m, f = small["memorisation"]["pixels"], full["memorisation"]["pixels"]
    share = {k: v["share"] for k, v in m.items()}
    assert 0.45 < share["heldout"] < 0.55 and share["noise"] > 0.95 and share["samples"] > max(share["baseline"], share["heldout"], f["samples"]["share"]) + 0.15, share
    assert 0.45 < f["samples"]["share"] < 0.58 and m["samples"]["ratio"]["share"] > m["baseline"]["ratio"]["share"]
    assert small["encoders"]["scratch"]["recall"] < full["encoders"]["scratch"]["recall"]
