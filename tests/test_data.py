"""data.py: every kind of source, the ADM crop against a slow version of its own, and each mistake a user can make."""
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import common
import data
from conftest import ROOT, FakeKL
from conftest import processes as run_ranks
from models import vae

RNG = np.random.default_rng(0)
REAL_LOAD = vae.load_vae


def noise(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def save(path, pixels, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **kw)


def run(*argv):
    data.main([str(a) for a in argv])


def fails(capsys, out, *argv):
    """The one line of a call that must end with code 2 and leave `out` as it was."""
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} if out.exists() else None
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        run(*argv, "--out", out)
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("data.py: error:")]
    assert e.value.code == 2 and len(err) == 1
    assert before == ({p: p.read_bytes() for p in out.rglob("*") if p.is_file()} if out.exists() else None)
    return err[0]


@pytest.fixture
def folder(tmp_path):
    """Two classes, names that sort differently as text, odd depths and suffixes, things to ignore."""
    top = tmp_path / "pictures"
    for name in ("b10/x1.png", "b9/deep/er/y2.PNG", "b9/deep/y10.bmp", "b9/img10.tif", "b9/img9.Png", "b10/z.ppm"):
        save(top / name, noise(6, 6, 3))
    (top / "b9" / ".hidden.png").write_bytes(b"junk")
    (top / "b9" / "notes.txt").write_text("no image")
    (top / ".git").mkdir()
    (top / "b9" / "loop").symlink_to(top / "b9")
    return top


# ---- one image
def slow_resize(a, height, width, kernel, support):
    """Separable resampling with the kernel stretched when shrinking, 8-bit rounding after each pass, in plain loops."""
    def axis(a, n):                                                   # along axis 0
        scale = len(a) / n
        stretch, out = max(scale, 1.0), np.zeros((n, *a.shape[1:]))
        for i in range(n):
            centre, total = (i + 0.5) * scale, 0.0
            lo, hi = max(0, int(centre - support * stretch + 0.5)), min(len(a), int(centre + support * stretch + 0.5))
            for j in range(lo, hi):
                w = kernel((j - centre + 0.5) / stretch)
                out[i] += w * a[j]
                total += w
            out[i] /= total
        return np.floor(out + 0.5).clip(0, 255)
    a = axis(a.astype(float).transpose(1, 0, 2), width).transpose(1, 0, 2)
    return axis(a, height)


def box(x):
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def bicubic(x, a=-0.5):
    x = abs(x)
    return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x < 1 else a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


@pytest.mark.parametrize("height, width, size", [(45, 37, 8), (16, 33, 8), (5, 9, 8), (11, 8, 8), (8, 11, 8), (32, 32, 8), (30, 15, 8), (9, 9, 1)])
def test_adm_crop_equals_slow_version(height, width, size):
    pixels = noise(height, width, 3)
    a = pixels.astype(float)
    while min(a.shape[:2]) >= 2 * size:
        a = slow_resize(a, a.shape[0] // 2, a.shape[1] // 2, box, 0.5)
    scale = size / min(a.shape[:2])
    a = slow_resize(a, round(a.shape[0] * scale), round(a.shape[1] * scale), bicubic, 2.0)
    y, x = (a.shape[0] - size) // 2, (a.shape[1] - size) // 2
    difference = np.abs(np.asarray(common.adm_crop(Image.fromarray(pixels), size), float) - a[y:y + size, x:x + size])
    assert difference.shape == (size, size, 3)
    assert difference.max() <= 1 and difference.mean() < 0.02         # Pillow sums in fixed point


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "gif", "ppm", "tga", "jpg", "JPEG"])
def test_formats(tmp_path, suffix):
    flat = np.full((8, 8, 3), (200, 40, 90), np.uint8)
    flat[:4] = (10, 20, 250)
    save(tmp_path / "s" / "a" / f"1.{suffix}", flat, **({"lossless": True} if suffix == "webp" else {}))
    run(tmp_path / "s", "--out", tmp_path / "o")
    got = np.load(tmp_path / "o" / "images.npy")
    assert got.shape == (1, 8, 8, 3)
    assert np.abs(got[0].astype(int) - flat)[[0, 7]].max() <= (8 if suffix.lower() in ("jpg", "jpeg") else 0)


def test_modes(tmp_path):
    def read(image, name="x.png", **kw):
        save(tmp_path / name, image, **kw)
        return common.read_image(tmp_path / name)[:2]
    wide = np.array([[0, 128, 129, 257 * 7, 257 * 7 + 129, 65535]], np.uint16)
    pixels, grey = read(Image.fromarray(wide))
    assert grey and pixels[0, :, 0].tolist() == [0, 0, 1, 7, 8, 255]
    pixels, grey = read(Image.fromarray(wide.astype(np.int32)), "x.tif")    # mode I
    assert grey and pixels[0, :, 0].tolist() == [0, 0, 1, 7, 8, 255]
    pixels, grey = read(Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"))
    assert grey and pixels.tolist() == [[[0] * 3, [255] * 3]]
    rgba = np.array([[[100, 0, 50, 0], [100, 0, 50, 255], [100, 0, 50, 51]]], np.uint8)
    pixels, grey = read(Image.fromarray(rgba))
    assert not grey and pixels.tolist() == [[[255] * 3, [100, 0, 50], [224, 204, 214]]]    # 0.2 * colour + 0.8 * 255
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert read(palette)[0].tolist() == [[[1, 2, 3], [40, 50, 60]]]
    assert read(palette, transparency=1)[0].tolist() == [[[1, 2, 3], [255] * 3]]
    pixels, grey = read(Image.merge("LA", [Image.new("L", (2, 1), 100), Image.new("L", (2, 1), 0)]))
    assert grey and (pixels == 255).all()
    pixels, grey = read(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "x.tif")
    assert not grey and pixels.tolist() == [[[255, 0, 0]]]
    exif = Image.Exif()
    exif[0x112] = 6                                                   # stored turned: to be shown 90 degrees clockwise
    stored = noise(2, 3, 3)
    assert (read(Image.fromarray(stored), exif=exif)[0] == np.rot90(stored, -1)).all()
    with pytest.raises(ValueError, match="float pixels"):
        read(Image.fromarray(np.zeros((2, 2), np.float32)), "f.tif")


# ---- sources
def test_digits(tmp_path):
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    run("digits", "--out", tmp_path)
    d = common.open_data(tmp_path)
    assert d.images.shape == (1500, 8, 8, 1) and d.test_images.shape == (297, 8, 8, 1) and d.classes[7] == "seven"
    assert np.bincount(d.labels).tolist() == [150] * 10
    raw = sklearn_datasets.load_digits()
    pixels, rng = np.rint(raw.images * 255 / 16).astype(np.uint8)[..., None], np.random.default_rng(0)
    rows = np.sort(np.concatenate([rng.permutation(np.flatnonzero(raw.target == k))[:150] for k in range(10)]))
    rest = np.setdiff1d(np.arange(len(pixels)), rows)                 # how data/digits.npz was made, and is made again
    assert (d.images == pixels[rows]).all() and (d.labels == raw.target[rows]).all()
    assert (d.test_images == pixels[rest]).all() and (d.test_labels == raw.target[rest]).all()
    known = sorted((*np.rint(x * 255 / 16).astype(int).ravel(), y) for x, y in zip(raw.images, raw.target))
    ours = sorted((*x.astype(int).ravel(), y) for x, y in [*zip(d.images, d.labels), *zip(d.test_images, d.test_labels)])
    assert known == ours                                              # every image once: the splits are disjoint and complete
    assert common.sources.DIGITS.stat().st_size < 100_000
    h = hashlib.sha256(b"(1500, 8, 8, 1)" + d.images.tobytes() + d.labels.astype("<i8").tobytes())
    assert d.info["sha256"] == h.hexdigest() == "87374d0d28ac64b09a50c1672a5d35ae935a0180742e382aaf468ac074a5ac7c"
    assert Image.open(tmp_path / "preview.png").size == (660, 660)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([
        "images.npy", "labels.npy", "classes.txt", "files.txt", "dataset.json", "preview.png", "test_images.npy", "test_labels.npy",
        "data.args.json"])


def test_folder_order_and_content(folder, tmp_path, capsys):
    run(folder, "--out", tmp_path / "o")
    d = common.open_data(tmp_path / "o")
    names = (tmp_path / "o" / "files.txt").read_text().splitlines()
    assert d.classes == ["b9", "b10"] and d.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert names == ["b9/deep/er/y2.PNG", "b9/deep/y10.bmp", "b9/img9.Png", "b9/img10.tif", "b10/x1.png", "b10/z.ppm"]
    for name, pixels in zip(names, d.images):
        assert (pixels == np.asarray(Image.open(folder / name))).all()
    text = capsys.readouterr().out
    assert "1 files without the suffix" in text and "2 classes hold fewer than 10" in text


def test_classes_txt_orders_the_labels(folder, tmp_path):
    for text, expected in (("b10\nb9\n", ["b10", "b9"]), ("1 of another kind\n", ["b9", "b10"])):
        (folder / "classes.txt").write_text(text)
        run(folder, "--overwrite", "--out", tmp_path / "o")
        d = common.open_data(tmp_path / "o")
        assert d.classes == expected and np.bincount(d.labels).tolist() == [{"b9": 4, "b10": 2}[c] for c in expected]


def test_workers_and_reruns_agree(tmp_path):
    for i in range(300):
        save(tmp_path / "s" / f"c{i % 3}" / f"{i}.png", noise(9, 12, 3) if i == 0 else noise(9, 12))    # one in colour, the first
    sums = []
    for workers in (1, 2):
        run(tmp_path / "s", "--size", 7, "--workers", workers, "--out", tmp_path / f"o{workers}")
        sums.append([(tmp_path / f"o{workers}" / f).read_bytes() for f in ("images.npy", "labels.npy", "files.txt", "preview.png", "dataset.json")])
    assert sums[0] == sums[1]
    first = np.asarray(common.adm_crop(Image.open(tmp_path / "s" / "c0" / "0.png"), 7))
    got = np.load(tmp_path / "o2" / "images.npy")
    assert got.shape == (300, 7, 7, 3) and (got[0] == first).all() and (first[..., 0] != first[..., 1]).any()


def test_splits_grey_and_one_class(tmp_path):
    for name in ("train/b/1.png", "train/a/1.png", "val/b/1.png"):
        save(tmp_path / "s" / name, noise(4, 4))
    run(tmp_path / "s", "--out", tmp_path / "o")
    d = common.open_data(tmp_path / "o")
    assert d.images.shape == (2, 4, 4, 1) and d.test_images.shape == (1, 4, 4, 1) and d.test_labels.tolist() == [1]
    assert (d.images[1, :, :, 0] == np.asarray(Image.open(tmp_path / "s/train/b/1.png"))).all()
    save(tmp_path / "s/val/b/2.png", noise(4, 4, 3))                  # one colour image anywhere: colour everywhere
    run(tmp_path / "s", "--out", tmp_path / "o", "--overwrite")
    d = common.open_data(tmp_path / "o")
    assert d.images.shape == (2, 4, 4, 3) and d.test_images.shape == (2, 4, 4, 3) and (d.images[..., 0] == d.images[..., 2]).all()
    run(tmp_path / "s" / "train" / "a", "--out", tmp_path / "one")
    assert common.open_data(tmp_path / "one").classes == ["image"]
    save(tmp_path / "rail" / "train" / "1.png", noise(4, 4))          # train beside other folders is a class
    save(tmp_path / "rail" / "bus" / "1.png", noise(4, 4))
    run(tmp_path / "rail", "--out", tmp_path / "r")
    assert common.open_data(tmp_path / "r").classes == ["bus", "train"]


def test_npz(tmp_path):
    x, y = noise(6, 5, 5), np.array([2, 0, 1, 1, 0, 2], np.uint8)
    np.savez(tmp_path / "a.npz", images=x, labels=y, test_images=x[:2], test_labels=y[:2], classes=np.array(["p", "q", "r"]))
    run(tmp_path / "a.npz", "--out", tmp_path / "a")
    d = common.open_data(tmp_path / "a")
    assert (d.images[..., 0] == x).all() and d.labels.tolist() == y.tolist() and d.classes == ["p", "q", "r"] and d.test_labels.tolist() == [2, 0]
    assert np.load(tmp_path / "a" / "labels.npy").dtype == np.int64
    rgb = np.asfortranarray(noise(3, 8, 8, 3))
    np.savez_compressed(tmp_path / "b.npz", rgb, np.array([0, 1, 0]))
    run(tmp_path / "b.npz", "--out", tmp_path / "b", "--size", 4)
    got = np.load(tmp_path / "b" / "images.npy")
    assert got.shape == (3, 4, 4, 3) and (got[2] == np.asarray(common.adm_crop(Image.fromarray(np.ascontiguousarray(rgb[2])), 4))).all()
    np.savez(tmp_path / "c.npz", images=x)
    run(tmp_path / "c.npz", "--out", tmp_path / "c", "--size", 3)
    d = common.open_data(tmp_path / "c")
    assert d.num_classes == 1 and d.images.shape == (6, 3, 3, 1)


def fake_cifar(root, monkeypatch):
    """Batches in the real pickled form, and torchvision's md5 lists set to theirs."""
    from torchvision.datasets import CIFAR10
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()

    def write(name, content):
        (base / name).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((base / name).read_bytes()).hexdigest()
    pixels = {f: noise(20, 3072) for f in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]}
    sums = {f: write(f, {"data": v, "labels": [i % 10 for i in range(20)], "filenames": ["x"] * 20}) for f, v in pixels.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[f, m] for f, m in sums.items() if f != "test_batch"])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": write("batches.meta", {"label_names": names})})
    return base, np.concatenate([v for f, v in pixels.items() if f != "test_batch"]), names


def test_cifar10_local(tmp_path, monkeypatch, capsys):
    from torchvision.datasets import CIFAR10
    base, pixels, names = fake_cifar(tmp_path / "root", monkeypatch)
    run("cifar10", "--root", tmp_path / "root", "--out", tmp_path / "o")
    d = common.open_data(tmp_path / "o")
    assert d.classes == names and d.images.shape == (100, 32, 32, 3) and d.test_images.shape == (20, 32, 32, 3) and d.labels[13] == 3
    assert d.images[70, 5, 9].tolist() == [pixels[70, c * 1024 + 5 * 32 + 9] for c in range(3)]
    run("cifar10", "--root", base, "--out", tmp_path / "o2")          # the inner folder itself
    assert common.open_data(tmp_path / "o2").info["sha256"] == d.info["sha256"]

    class Trap:                                                       # runs code when unpickled; its md5 is not the known one
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)
    (base / "data_batch_2").write_bytes(pickle.dumps(Trap()))
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    message = fails(capsys, tmp_path / "o3", "cifar10", "--root", tmp_path / "root")
    assert "cifar-10-python.tar.gz" in message and str(tmp_path / "root") in message and not (tmp_path / "executed").exists()
    assert "--root" in fails(capsys, tmp_path / "o3", "cifar10", "--root", tmp_path / "no" / "where")
    assert not (tmp_path / "no").exists()


# ---- subsets
def test_subset_and_as_folder(tmp_path):
    run("digits", "--out", tmp_path / "full")
    full = common.open_data(tmp_path / "full")
    keep = np.sort(np.concatenate([np.flatnonzero(full.labels == k)[3:6] for k in range(10)]))
    np.save(tmp_path / "keep.npy", keep)
    run(tmp_path / "full", "--indices", tmp_path / "keep.npy", "--out", tmp_path / "sub")
    sub = common.open_data(tmp_path / "sub")
    assert (sub.images == full.images[keep]).all() and (sub.labels == full.labels[keep]).all() and (sub.test_images == full.test_images).all()
    assert sub.info["parent"] == full.info["sha256"] != sub.info["sha256"]
    assert (tmp_path / "sub" / "files.txt").read_text().splitlines() == [f"images[{i}]" for i in keep]
    run("digits", "--indices", tmp_path / "keep.npy", "--out", tmp_path / "sub2")
    assert common.open_data(tmp_path / "sub2").info["sha256"] == sub.info["sha256"]
    run(tmp_path / "full", "--indices", tmp_path / "keep.npy", "--as-folder", "--out", tmp_path / "png")
    first = tmp_path / "png" / full.classes[full.labels[keep[0]]] / f"{keep[0]:06d}.png"
    assert (np.asarray(Image.open(first)) == full.images[keep[0], :, :, 0]).all()
    # Whoever reads the folder at any depth finds the kept images and nothing else.
    assert sorted(p.name for p in (tmp_path / "png").rglob("*.png")) == [f"{i:06d}.png" for i in keep]
    assert not list((tmp_path / "png").rglob("*.npy"))
    run(tmp_path / "png", "--out", tmp_path / "back")                 # and back: grouped by class, otherwise the same
    back, order = common.open_data(tmp_path / "back"), np.argsort(sub.labels, kind="stable")
    assert back.classes == sub.classes and (back.images == sub.images[order]).all() and (back.labels == sub.labels[order]).all()
    run("digits", "--as-folder", "--out", tmp_path / "all")
    run(tmp_path / "all", "--out", tmp_path / "again")
    assert len(common.open_data(tmp_path / "again").test_images) == 297


def test_other_programs_read_an_export_with_our_labels_and_count(tmp_path, capsys):
    """ImageFolder sorts folders by name, pytorch-fid's command looks at one folder alone: the three forms, read by both."""
    from torchvision.datasets import ImageFolder
    run("digits", "--out", tmp_path / "full")
    full = common.open_data(tmp_path / "full")
    keep = np.arange(0, 1500, 10)
    np.save(tmp_path / "keep.npy", keep)
    for form in ("names", "numbered", "flat"):
        capsys.readouterr()
        run(tmp_path / "full", "--indices", tmp_path / "keep.npy", "--as-folder", form, "--out", tmp_path / form)
        text = capsys.readouterr().out
        assert ("ImageFolder" in text) == (form == "names")           # there its label 0 is "eight"
        assert len(list((tmp_path / form).rglob("*.png"))) == 150
        if form == "flat":
            continue
        theirs = {int(Path(p).stem): label for p, label in ImageFolder(tmp_path / form).samples}
        same = all(theirs[i] == full.labels[i] for i in keep)
        assert same == (form == "numbered") and len(theirs) == 150
    assert len(list((tmp_path / "flat").glob("*.png"))) == 150         # what pytorch-fid's command counts
    run(tmp_path / "flat", "--out", tmp_path / "back")                 # labels.csv and classes.txt lead back
    back = common.open_data(tmp_path / "back")
    assert back.classes == full.classes and (back.labels == full.labels[keep]).all() and (back.images == full.images[keep]).all()


def test_names_in_an_npz_cannot_leave_the_folder(tmp_path):
    np.savez(tmp_path / "a.npz", images=noise(2, 4, 4), labels=[0, 1], classes=np.array(["../../out", "/etc"]))
    run(tmp_path / "a.npz", "--as-folder", "--out", tmp_path / "deep" / "er" / "o")
    assert sorted(str(p.relative_to(tmp_path / "deep/er/o")) for p in tmp_path.rglob("*.png")) == ["_.._out/000000.png", "_etc/000001.png"]


# ---- resume
def test_resume(folder, tmp_path, capsys):
    out = tmp_path / "new" / "o"
    run(folder, "--out", out)
    (out / "scratch.pt").write_bytes(b"derived from the old content")
    stamp = (out / "images.npy").stat().st_mtime_ns
    run(folder, "--out", out, "--workers", 1)
    assert "nothing to do" in capsys.readouterr().out and (out / "images.npy").stat().st_mtime_ns == stamp
    (out / "dataset.json").unlink()                                   # interrupted before the end
    run(folder, "--out", out)
    assert (out / "dataset.json").exists() and not (out / "scratch.pt").exists()
    (folder / "b9" / "img9.Png").write_bytes(b"broken")               # a failed --overwrite leaves the old folder
    assert "img9.Png" in fails(capsys, out, folder, "--overwrite")
    run(folder, "--out", out)
    assert "nothing to do" in capsys.readouterr().out
    assert "--size" in fails(capsys, out, folder, "--size", 4)


def test_a_folder_of_an_earlier_version_is_known_again(folder, tmp_path, capsys):
    """Its record knows none of the newer flags, which left out mean what they meant."""
    for out, flags in (("o", []), ("png", ["--as-folder"])):
        run(folder, "--out", tmp_path / out, *flags)
        file = tmp_path / out / "data.args.json"
        record = json.loads(file.read_text())
        known = {"source", "size", "indices", "vae", "latents_only", "as_folder", "skip_bad", "seed"}      # of commit ccc2c20
        assert set(record["args"]) <= known and record["args"]["as_folder"] is bool(flags)
        del record["source_state"]
        file.write_text(json.dumps(record))
        capsys.readouterr()
        run(folder, "--out", tmp_path / out, *flags)
        assert "nothing to do" in capsys.readouterr().out
    assert "--labels-from" in fails(capsys, tmp_path / "o", folder, "--labels-from", "none")


def test_a_call_killed_before_its_record_was_whole(folder, tmp_path, monkeypatch, capsys):
    """dataset.json comes last: where it stands, nothing is left but the record, and the source is not read again."""
    run(folder, "--out", tmp_path / "o")
    file = tmp_path / "o" / "data.args.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "seconds": None}))
    before = {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir() if p != file}
    with monkeypatch.context() as m:
        m.setattr(common.sources, "read_source", None)
        run(folder, "--out", tmp_path / "o")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir() if p != file}
    assert json.loads(file.read_text())["seconds"] > 0
    (tmp_path / "o" / ".data").mkdir()                                # as a kill in the middle leaves it
    (tmp_path / "o" / ".data" / "images.part.npy").write_bytes(b"half")
    (tmp_path / "o" / ".dataset.abcd1234.tmp.json").write_text("{")
    run(folder, "--out", tmp_path / "o", "--overwrite")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir() if p != file}


def test_an_export_goes_on_and_is_not_mixed(tmp_path, monkeypatch, capsys):
    out, real = tmp_path / "png", data.save_pngs
    np.save(tmp_path / "keep.npy", np.arange(300))

    def fail(file, first, names):
        real(file, first, names)
        raise OSError(28, "No space left on device", str(names[0]))
    with monkeypatch.context() as m:
        m.setattr(data, "save_pngs", fail)
        with pytest.raises(SystemExit):
            run("digits", "--as-folder", "--workers", 1, "--out", out)
    assert len(list(out.rglob("*.png"))) and not (out / "classes.txt").exists()
    assert "--indices" in fails(capsys, out, "digits", "--as-folder", "--indices", tmp_path / "keep.npy")
    run("digits", "--as-folder", "--out", out)
    assert len(list(out.rglob("*.png"))) == 1797 and not list(out.glob(".*"))
    run("digits", "--as-folder", "--out", out)
    assert "nothing to do" in capsys.readouterr().out


# ---- worker processes
def children(pid):
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def until(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("what, code", [("worker", 2), (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9),
                                       *(pytest.param(s, 143, marks=pytest.mark.slow) for s in (signal.SIGUSR1, signal.SIGHUP))])
def test_workers_end_with_the_call(what, code, tmp_path):
    """A killed worker, and signals to the call: one line, nothing left behind, and no orphan however it ends."""
    for i in range(1100):                                             # three batches
        save(tmp_path / "s" / f"{i}.bmp", noise(2, 2, 3))
    (tmp_path / "go.py").write_text("import time, data\nfrom common import pixels\nreal = pixels.read_image\n"
                                    "pixels.read_image = lambda *a: (time.sleep(0.01), real(*a))[1]\ndata.main()\n")
    call = [sys.executable, tmp_path / "go.py", tmp_path / "s", "--size", "2", "--workers", "2", "--out", tmp_path / "o"]
    p = subprocess.Popen([*map(str, call)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                         preexec_fn=lambda: [signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGHUP)])      # a shell ignores them in the background
    until(lambda: p.poll() is not None or len(children(p.pid)) == 2)
    workers = children(p.pid)
    time.sleep(0.5)
    if what == "worker":
        os.kill(workers[0], signal.SIGKILL)
    elif what in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        os.killpg(p.pid, what)                                        # as a terminal and a scheduler do
    else:
        os.kill(p.pid, what)
    _, err = p.communicate(timeout=60)
    assert p.returncode == code, err
    if what == "worker":
        assert "a worker process was killed" in err and err.count("\n") == 1
    until(lambda: not any(Path(f"/proc/{w}").exists() for w in workers), 10)
    assert (tmp_path / "o").exists() == (what == signal.SIGKILL)
    if what == signal.SIGKILL:
        run(tmp_path / "s", "--size", 2, "--out", tmp_path / "o")
        assert len(common.open_data(tmp_path / "o").images) == 1100 and not list((tmp_path / "o").glob(".*"))


def test_the_pool_is_a_bounded_number_of_jobs_ahead():
    begun = []
    with common.open_pool(1) as pool:
        results = common.work_ahead(pool, lambda k: begun.append(k) or k * k, iter(range(50)), depth=3)
        assert next(results) == 0 and len(begun) <= 4
        assert [*results] == [k * k for k in range(1, 50)]


# ---- mistakes
def test_bad_folders(folder, tmp_path, capsys):
    out = tmp_path / "deep" / "o"

    def message(*more):
        text = fails(capsys, out, folder, *more)
        assert not (tmp_path / "deep").exists()
        return text
    assert "no such source" in fails(capsys, out, tmp_path / "nothing")
    assert "neither a folder" in fails(capsys, out, folder / "b9" / "notes.txt")
    assert "lies in the source" in fails(capsys, folder / "o", folder)
    assert ">= 1" in message("--size", 0)
    (folder / "b11").mkdir()
    assert "b11" in message()
    (folder / "b11").rmdir()
    save(folder / "b10" / "larger.png", noise(7, 6, 3))
    text = message()
    assert "larger.png: 6x7" in text and "--size" in text
    run(folder, "--size", 12, "--out", tmp_path / "up")               # smaller than the size: enlarged
    assert common.open_data(tmp_path / "up").images.shape == (7, 12, 12, 3)
    whole = (folder / "b10" / "x1.png").read_bytes()
    for broken in (b"", b"text", whole[:60], whole[:-40]):
        (folder / "b10" / "x1.png").write_bytes(broken)
        for workers in (1, 2):
            assert "x1.png: unreadable" in message("--size", 6, "--workers", workers)
    capsys.readouterr()
    run(folder, "--size", 6, "--skip-bad", "--out", tmp_path / "skip")
    d = common.open_data(tmp_path / "skip")
    assert len(d.images) == 6 and d.info["skipped"] == 1 and "1 skipped" in capsys.readouterr().out
    names = (tmp_path / "skip" / "files.txt").read_text().splitlines()
    assert "b10/x1.png" not in names and (d.images[names.index("b10/z.ppm")] == np.asarray(Image.open(folder / "b10" / "z.ppm"))).all()
    np.save(tmp_path / "k.npy", np.arange(2))
    assert "shift" in message("--skip-bad", "--indices", tmp_path / "k.npy")
    for f in ("z.ppm", "larger.png"):
        (folder / "b10" / f).write_bytes(b"")
    assert "b10" in message("--size", 6, "--skip-bad")
    (tmp_path / "empty").mkdir()
    assert "no image" in fails(capsys, out, tmp_path / "empty")


def test_bombs(tmp_path, capsys, monkeypatch):
    save(tmp_path / "s" / "big.png", noise(8, 8))
    for limit in (63, 60, 31):                                        # 64 pixels: above the limit, where Pillow only warns, and twice
        text = fails(capsys, tmp_path / "o", tmp_path / "s", "--size", 4, "--max-pixels", limit)
        assert "big.png: 0 megapixels, beyond the limit of" in text and "--max-pixels 64" in text and "--skip-bad" in text
    run(tmp_path / "s", "--size", 4, "--max-pixels", 64, "--out", tmp_path / "o64")
    assert Image.MAX_IMAGE_PIXELS == 2**28 // 3                        # nobody else's limit has changed
    header = b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '|u1', 'fortran_order': False, 'shape': (100000, 5000, 5000, 3), }".ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "liar.npz", "w") as z:
        z.writestr("images.npy", header + b"0" * 10)
    assert "claims 7500000000000 bytes, holds 10" in fails(capsys, tmp_path / "o", tmp_path / "liar.npz")
    np.savez_compressed(tmp_path / "zeros.npz", images=np.zeros((100, 64, 64), np.uint8))
    monkeypatch.setattr(common.files, "free_memory", lambda: 300_000)
    assert "memory" in fails(capsys, tmp_path / "o", tmp_path / "zeros.npz")


def test_bad_npz(tmp_path, capsys):
    x, f = noise(4, 3, 3), tmp_path / "a.npz"

    def message(*more, **arrays):
        np.savez(f, **arrays)
        text = fails(capsys, tmp_path / "o", f, *more)
        assert not (tmp_path / "o").exists() and "a.npz" in text
        return text
    assert "(3,)" in message(images=x, labels=[0, 1, 0])
    assert "-1..1" in message(images=x, labels=[0, 1, 0, -1])
    assert "float64" in message(images=x, labels=[0., 1, 0, 1])
    assert "1..4" in message(images=x, labels=[1, 2, 3, 4])           # class 0 would be empty
    assert "0..9999999999" in message(images=x, labels=[0, 1, 2, 9999999999])
    assert "float32" in message(images=x.astype(np.float32))
    assert "(4, 3, 3, 2)" in message(images=noise(4, 3, 3, 2))
    assert "missing" in message(images=x, labels=[0, 1, 0, 1], test_images=x)
    assert "test_labels run" in message(images=x, labels=[0, 1, 0, 1], test_images=x, test_labels=[0, 1, 2, 0])
    assert "test_images are" in message(images=x, test_images=noise(2, 4, 4))
    assert "'classes'" in message(images=x, labels=[0, 1, 0, 1], classes=["a"])
    assert "pickled" in message(images=np.array([x, None], dtype=object))
    assert "holds pictures" in message(pictures=x)
    f.write_bytes(f.read_bytes()[:-30])
    assert "not a readable" in fails(capsys, tmp_path / "o", f)
    for keep, text in (([3, 9], "0..3"), ([1, 1], "repeats"), ([0, 2], "class 1 keeps")):
        np.save(tmp_path / "keep.npy", keep)
        np.savez(f, images=x, labels=[0, 1, 0, 1])
        assert text in fails(capsys, tmp_path / "o", f, "--indices", tmp_path / "keep.npy")


def test_as_a_program(tmp_path):
    call = [sys.executable, data.__file__, "digits", "--out", str(tmp_path / "o"), "--size", "4"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "1500 images 4x4x1" in done.stdout
    assert json.loads((tmp_path / "o" / "dataset.json").read_text())["height"] == 4
    done = subprocess.run([*call[:-1], "none"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "--size" in done.stderr


# ---- latents
@pytest.fixture
def pictures(tmp_path):
    """23 images in 3 classes, one of them grey, no two of one shape: an uneven number for 2 or 3 processes."""
    for i in range(23):
        save(tmp_path / "s" / f"c{i % 3}" / f"{i}.png", noise(9 + i, 12) if i == 5 else noise(9 + i, 12, 3))
    return tmp_path / "s"


def plain_latents(folder, names, size):
    """(N, 2c, h, w) float16, image by image: cropped by adm_crop, to [-1, 1], and through the network as it is."""
    import torch
    out = []
    for name in names:
        pixels = np.asarray(common.adm_crop(Image.open(folder / name).convert("RGB"), size), np.float32)
        d = FakeKL().encode(torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]).latent_dist
        out.append(np.concatenate([d.mean[0].numpy(), d.std[0].numpy()]))
    return np.stack(out).astype(np.float16)


def encode(source, out, *flags):
    run(source, "--size", 8, "--vae", "a/vae", "--device", "cpu", "--out", out, *flags)
    return np.load(out / "latents.npy")


def test_latents_with_and_without_pixels(pictures, tmp_path, fake_vae, capsys):
    z = encode(pictures, tmp_path / "a", "--latents-only", "--batch-size", 4)
    assert fake_vae.seen == [4] * 5 + [3] and "left out" not in capsys.readouterr().out
    names = (tmp_path / "a" / "files.txt").read_text().splitlines()
    want = plain_latents(pictures, names, 8)
    assert z.dtype == np.float16 and z.shape == (23, 8, 4, 4)
    np.testing.assert_allclose(z.astype(float), want.astype(float), rtol=2e-3, atol=1e-3)       # one step of float16
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"latents.npy", "latents.json", "labels.npy", "classes.txt", "files.txt", "dataset.json",
                                                            "data.args.json"}
    about, info = json.loads((tmp_path / "a" / "latents.json").read_text()), json.loads((tmp_path / "a" / "dataset.json").read_text())
    draws = np.random.default_rng(0).normal(size=(4000, *z[:, :4].shape[1:]))                 # what a model sees, drawn for real
    some = z[np.arange(4000) % 23].astype(np.float64)
    draws = 0.25 * (some[:, :4] + some[:, 4:] * draws)
    assert (about["vae"], about["scale"]) == ("a/vae", 0.25)
    assert about["mean"] == pytest.approx(draws.mean(), abs=2e-3) and about["std"] == pytest.approx(draws.std(), rel=5e-3)
    d = common.open_data(tmp_path / "a", pixels=False)
    h = hashlib.sha256(str(z.shape).encode() + z.tobytes() + d.labels.astype("<i8").tobytes()).hexdigest()
    assert info["sha256"] == about["sha256"] == h and (info["height"], info["num_images"], info["class_counts"]) == (8, 23, [8, 8, 7])
    both = encode(pictures, tmp_path / "b")                            # pixels beside them: known by the pixels, as without latents
    run(pictures, "--size", 8, "--out", tmp_path / "c")
    one, other = (common.open_data(tmp_path / f) for f in "bc")
    assert np.array_equal(both, z) and one.info["sha256"] == other.info["sha256"] and np.array_equal(one.images, other.images)
    assert np.array_equal(encode(tmp_path / "c", tmp_path / "d", "--latents-only"), z)          # from a data folder, whose pixels stay where they are
    np.save(tmp_path / "keep.npy", np.array([0, 3, 8, 9, 17, 22]))
    assert np.array_equal(encode(pictures, tmp_path / "e", "--latents-only", "--indices", tmp_path / "keep.npy"), z[[0, 3, 8, 9, 17, 22]])
    assert "latents only" in fails(capsys, tmp_path / "f", tmp_path / "a", "--indices", tmp_path / "keep.npy")
    run(pictures, "--size", 8, "--indices", tmp_path / "keep.npy", "--out", tmp_path / "g")     # later: the pixels of a subset
    assert np.array_equal(common.open_data(tmp_path / "g").images, other.images[[0, 3, 8, 9, 17, 22]])
    run("digits", "--vae", "x", "--latents-only", "--device", "cpu", "--out", tmp_path / "h")
    h = common.open_data(tmp_path / "h", pixels=False)                # one channel becomes three equal ones
    assert "297 held-out images are left out" in capsys.readouterr().out and h.info["num_test"] == 0 and h.test_images is None
    np.testing.assert_array_equal(h.latents[:, 0], h.latents[:, 2])


def test_an_interrupted_encoding_goes_on(pictures, tmp_path, fake_vae, monkeypatch, capsys):
    straight, real = encode(pictures, tmp_path / "a", "--latents-only"), FakeKL.encode
    monkeypatch.setattr(FakeKL, "encode", lambda net, x: real(net, x) if len(fake_vae.seen) < 4 else (_ for _ in ()).throw(KeyboardInterrupt))
    for flags in (("--latents-only",), ()):
        out = tmp_path / f"b{len(flags)}"
        fake_vae.seen[:] = [0]
        with pytest.raises(SystemExit) as e:
            encode(pictures, out, *flags, "--batch-size", 4)
        assert e.value.code == 130 and fake_vae.seen == [0, 4, 4, 4] and not (out / "dataset.json").exists()
        (pictures / "c0" / "x.png").write_bytes((pictures / "c0" / "0.png").read_bytes())       # the folder changes in between
        if flags:
            capsys.readouterr()
            with pytest.raises(SystemExit):
                encode(pictures, out, *flags)
            assert "other images than when" in capsys.readouterr().err
        (pictures / "c0" / "x.png").unlink()
        fake_vae.seen[:] = []
        with monkeypatch.context() as m:
            m.setattr(FakeKL, "encode", real)
            m.setattr(data, "build", None)                            # the pixels stand
            assert np.array_equal(encode(pictures, out, *flags, "--batch-size", 5), straight)
        assert fake_vae.seen == [5, 5, 1]                             # only what was missing
        assert not [p.name for p in out.iterdir() if ".part" in p.name or ".done" in p.name or "begun" in p.name or "seconds" in p.name]
        capsys.readouterr()
        encode(pictures, out, *flags)
        assert "nothing to do" in capsys.readouterr().out and fake_vae.seen == [5, 5, 1]
    fake_vae.seen[:] = [0]                                            # an --overwrite that is killed never passes old rows for new ones
    with pytest.raises(SystemExit):
        encode(pictures, out, "--overwrite", "--batch-size", 4)
    monkeypatch.setattr(FakeKL, "encode", real)
    fake_vae.seen[:] = []
    run(pictures, "--size", 6, "--vae", "a/vae", "--device", "cpu", "--overwrite", "--out", out)
    assert np.load(out / "latents.npy").shape == (23, 8, 3, 3) and sum(fake_vae.seen) == 23


def test_mistakes_with_latents(pictures, tmp_path, fake_vae, monkeypatch, capsys):
    def message(*flags, size=8, vae="x", source=pictures):
        text = fails(capsys, tmp_path / "new" / "o", source, *(["--size", size] if size else []), *(["--vae", vae] if vae else []), "--device", "cpu", *flags)
        assert not (tmp_path / "new").exists()
        return text
    only = "--latents-only"
    assert "needs --vae" in message(only, vae=None) and "leave --vae out" in message("--as-folder") and "shift" in message(only, "--skip-bad")
    assert "multiples of 2" in message(only, size=7) and "multiples of 2" in message(size=7)
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda p: SimpleNamespace(free=5000))
        assert "0.0 GB will be written, the disk has 0.0 GB left" in message(only)
    (pictures / "c0" / "0.png").write_bytes(b"broken")
    assert "several sizes" in message(only, size=None)
    (tmp_path / "one" / "c").mkdir(parents=True)
    (tmp_path / "one" / "c" / "0.png").write_bytes(b"broken")
    save(tmp_path / "one" / "c" / "1.png", noise(8, 8, 3))
    assert "0.png: unreadable" in message(only, size=None, source=tmp_path / "one")
    save(pictures / "c0" / "0.png", noise(9, 12))
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "diffusers", None)                     # as if it were not installed
        m.setattr(vae, "load_vae", REAL_LOAD)
        assert "pip install diffusers" in message(only)

    def later(*flags, size=8):                                        # found in the middle: what is done stays, to go on from
        with pytest.raises(SystemExit):
            run(pictures, "--vae", "x", only, "--device", "cpu", "--batch-size", 4, "--out", tmp_path / "o", *(["--size", size] if size else []), *flags)
        return [line for line in capsys.readouterr().err.splitlines() if "error:" in line][0]
    for name, height in (("first", 8), ("second", 10)):
        save(tmp_path / "odd" / f"{name}.png", noise(height, 8, 3))
    with pytest.raises(SystemExit):
        run(tmp_path / "odd", "--vae", "x", only, "--device", "cpu", "--out", tmp_path / "odd_out")
    assert "second.png: 8x10 pixels, and the images are of several sizes (8x8 1, 8x10 1); give --size" in capsys.readouterr().err
    whole = (pictures / "c2" / "20.png").read_bytes()
    (pictures / "c2" / "20.png").write_bytes(whole[:60])
    assert "20.png: unreadable" in later("--overwrite") and (tmp_path / "o" / "latents.part.npy").exists()
    (pictures / "c2" / "20.png").write_bytes(whole)
    fake_vae.seen.clear()
    run(pictures, "--vae", "x", only, "--device", "cpu", "--size", 8, "--out", tmp_path / "o")
    assert 0 < sum(fake_vae.seen) < 23 and np.array_equal(np.load(tmp_path / "o" / "latents.npy"), encode(pictures, tmp_path / "p", only))
    real = FakeKL.encode

    def overflow(net, x):
        d = real(net, x).latent_dist
        if len(net.seen) == 2:
            d.mean[1, 0, 0, 0] = 1e5                                  # more than float16 holds
        return SimpleNamespace(latent_dist=d)
    monkeypatch.setattr(FakeKL, "encode", overflow)
    fake_vae.seen.clear()
    names = (tmp_path / "p" / "files.txt").read_text().splitlines()
    assert f"{names[5]}: its latent is not finite" in later("--overwrite")


def test_a_vae_of_another_kind_is_refused():
    for change, word in ((dict(shift_factor=0.1), "shift_factor"), (dict(latents_mean=[0.1]), "latents_mean"), (dict(in_channels=1), "1 colour")):
        net = FakeKL()
        net.config = {**net.config, **change}
        with pytest.raises(ValueError, match=word):
            vae.Vae(net, "x")
    with pytest.raises(FileNotFoundError if importable("diffusers") else ImportError):
        REAL_LOAD("/no/such/folder")


def importable(name):
    import importlib.util
    return importlib.util.find_spec(name) is not None


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_encode_the_same(processes, pictures, tmp_path, fake_vae):
    """Uneven parts. With two, the other waits for rank 0 whatever it takes: here longer than DIST_TIMEOUT."""
    (tmp_path / "go.py").write_text("import time, data, common, conftest\nconftest.use_fake_vae()\nreal = common.sources.read_source\n"
                                    f"def slow(args):\n    time.sleep({10 * (processes == 2)} * (common.rank() == 0))\n    return real(args)\n"
                                    "common.sources.read_source = slow\ndata.main()\n")
    ranks = run_ranks(processes, tmp_path / "go.py", pictures, "--size", 8, "--vae", "a/vae", "--latents-only", "--device", "cpu", "--out", tmp_path / "o",
                      "--batch-size", 6, DIST_TIMEOUT="8" if processes == 2 else "600", PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    assert [code for code, _, _ in ranks] == [0] * processes, ranks
    alone = encode(pictures, tmp_path / "a", "--latents-only")
    assert np.array_equal(np.load(tmp_path / "o" / "latents.npy"), alone)
    for name in ("dataset.json", "latents.json", "labels.npy", "files.txt"):
        assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


@pytest.mark.parametrize("colour", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_several_processes_decode_the_same(colour, tmp_path, fake_vae):
    """Pixels beside latents: each process decodes its part; what one finds unreadable or in colour counts for all."""
    for i in range(40):
        save(tmp_path / "s" / ("val" if i % 4 == 0 else "train") / f"c{i % 2}" / f"{i}.png", noise(9, 12))
    for name in ("train/c1/3.png", "val/c0/36.png"):
        (tmp_path / "s" / name).write_bytes(b"broken")
    if colour:
        save(tmp_path / "s" / "train" / "c1" / "39.png", noise(9, 12, 3))                           # the last one
    (tmp_path / "go.py").write_text("import data, conftest\nconftest.use_fake_vae()\ndata.main()\n")
    out = [tmp_path / "two", tmp_path / "one"]
    flags = ["--size", 8, "--vae", "a/vae", "--device", "cpu", "--skip-bad", "--out"]
    ranks = run_ranks(2, tmp_path / "go.py", tmp_path / "s", *flags, out[0], PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    assert [code for code, _, _ in ranks] == [0, 0], ranks
    assert ranks[0][1].count("skipped") == 3 and not ranks[1][1]
    run(tmp_path / "s", *flags, out[1])
    one, two = ({p.name: p.read_bytes() for p in folder.iterdir() if p.name != "data.args.json"} for folder in out)
    assert one == two and common.open_data(out[1]).images.shape == (29, 8, 8, 3 if colour else 1)


def test_latents_of_the_real_format(pictures, real_vae, tmp_path, capsys):
    """diffusers' own posterior is the oracle; its folder is read as save_pretrained writes it, also under the names of the released file."""
    import torch
    from safetensors.torch import load_file, save_file
    folder, net = real_vae
    run(pictures, "--size", 16, "--vae", folder, "--latents-only", "--device", "cpu", "--batch-size", 5, "--out", tmp_path / "o")
    z, names = np.load(tmp_path / "o" / "latents.npy"), (tmp_path / "o" / "files.txt").read_text().splitlines()
    about = json.loads((tmp_path / "o" / "latents.json").read_text())
    assert z.shape == (23, 8, 8, 8) and about["scale"] == 0.3 and about["vae"] == str(folder.resolve())
    for row in (0, 7, 22):
        pixels = np.asarray(common.adm_crop(Image.open(pictures / names[row]).convert("RGB"), 16), np.float32) / 127.5 - 1
        with torch.no_grad():
            d = net.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None]).latent_dist
        np.testing.assert_allclose(z[row].astype(float), torch.cat([d.mean, d.std], 1)[0].numpy(), rtol=2e-3, atol=1e-4)
    old = tmp_path / "old"                                            # the names of sd-vae-ft-ema, and its config without a scaling_factor
    shutil.copytree(folder, old)
    weights = load_file(old / "diffusion_pytorch_model.safetensors")
    for new, was in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        weights = {k.replace(new, was): v for k, v in weights.items()}
    save_file(weights, old / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    config = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "scaling_factor"}))
    a, b, x = vae.load_vae(old), vae.load_vae(folder), torch.rand(2, 3, 16, 16)
    assert torch.equal(a.encode(x), b.encode(x)) and (a.scale, b.scale) == (0.18215, 0.3)
    del weights["encoder.conv_in.bias"]
    save_file(weights, old / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    text = fails(capsys, tmp_path / "new", pictures, "--size", 16, "--vae", old, "--device", "cpu")
    assert "encoder.conv_in.bias is missing" in text
    assert "cannot be loaded" in fails(capsys, tmp_path / "new", pictures, "--size", 16, "--vae", tmp_path / "s" / "c0", "--device", "cpu")
