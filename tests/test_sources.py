"""What people bring: splits, labels, archives and pictures of every kind, each read as its owner means it or refused in one line that names the way out."""
import errno
import importlib.util
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import common
import data
import odd_files as odd
from common.labels import split_word


def made(tmp_path, source, *flags, capsys=None):
    """The data folder that data.py makes of a source."""
    out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
    data.main([str(source), "--workers", "1", "--out", str(out), *map(str, flags)])
    return common.open_data(out)


def names(d):
    return (d.folder / "files.txt").read_text().splitlines()


def labelled(d):
    """{file name without its folders: class}"""
    return {name.rpartition("/")[2]: d.classes[k] for name, k in zip(names(d), d.labels)}


def refused(tmp_path, capsys, source, *flags):
    """The one line of a call that ends with code 2 and leaves nothing behind."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        data.main([str(source), "--workers", "1", "--out", str(tmp_path / "no" / "o"), *map(str, flags)])
    lines = [x for x in capsys.readouterr().err.splitlines() if "error:" in x]
    assert e.value.code == 2 and len(lines) == 1 and not (tmp_path / "no").exists()
    return lines[0]


def pets(*places, n=2):
    return [f"{place}/{c}/{i}.png" for place in places for c in ("cat", "dog") for i in range(n)]


# ---- splits
@pytest.mark.parametrize("name, kind", [
    ("train", "train"), ("Train", "train"), ("TRAINING", "train"), ("train2017", "train"), ("training_set", "train"), ("seg_train", "train"), ("trainSet", "train"),
    ("Training Data", "train"), ("train_images", "train"), ("valid", "val"), ("validation", "val"), ("Val", "val"), ("dev", "val"), ("held_out", "val"), ("Test", "test"),
    ("testing", "test"), ("test_set", "test"), ("test1", "test"), ("TEST-images", "test"),
    ("train_station", None), ("trains", None), ("contest", None), ("testudo", None), ("valley", None), ("cat", None), ("00000", None), ("device", None), ("bus", None)])
def test_names_of_splits(name, kind):
    assert split_word(name) == kind


@pytest.mark.parametrize("places", [
    ("train", "valid"), ("train", "validation"), ("Train", "Test"), ("TRAIN", "dev"), ("training_set/training_set", "test_set/test_set"),
    ("seg_train/seg_train", "seg_test/seg_test"), ("archive/train", "archive/test"), ("archive/pets/train", "archive/pets/val"), ("train", "val", "test")])
def test_splits_are_no_classes(tmp_path, places):
    """The last one is held out: of val and test it is test."""
    d = made(tmp_path, odd.tree(tmp_path / "s", pets(*places)))
    assert d.classes == ["cat", "dog"] and len(d.images) == 4 and d.test_labels.tolist() == [0, 0, 1, 1]
    for folder, images in ((places[0], d.images), (places[-1], d.test_images)):
        want = [np.asarray(Image.open(tmp_path / "s" / folder / c / f"{i}.png")) for c in ("cat", "dog") for i in range(2)]
        assert (images == np.stack(want)).all()


def test_a_folder_beside_the_splits(tmp_path, capsys):
    top = odd.tree(tmp_path / "s", pets("train", "val", "test") + ["extra/1.png"])
    d = made(tmp_path, top)
    assert d.classes == ["cat", "dog"] and len(d.images) == 4 and "extra beside the splits is left out" in capsys.readouterr().out
    for beside, word in ((["train/1.png", "test/1.png", "bus/1.png"], "bus lies beside"), (pets("train", "more"), "more lies beside"),
                         (pets("test", "val"), "test, val look like splits"), (pets("train1", "train2"), "train1, train2 look like splits"),
                         (["test/1.png", "cat/1.png"], "test look like splits"), (pets("train", "test", "more"), "more lies beside"),
                         (["cat/train/1.png", "cat/test/2.png", "dog/train/3.png", "dog/test/4.png"], "would be mixed")):
        other = odd.tree(tmp_path / str(len(list(tmp_path.iterdir()))), beside)
        text = refused(tmp_path, capsys, other)
        assert word in text and "--splits" in text
        assert len(made(tmp_path, other, "--splits", "none").images) == len(beside)
    rail = odd.tree(tmp_path / "rail", ["train/1.png", "bus/1.png"])      # beside other folders of images a train is a train
    assert made(tmp_path, rail).classes == ["bus", "train"]
    d = made(tmp_path, odd.tree(tmp_path / "own", pets("a", "b", "c")), "--splits", "b", "c")
    assert d.classes == ["cat", "dog"] and len(d.images) == len(d.test_images) == 4
    assert "--splits x: no such folder" in refused(tmp_path, capsys, tmp_path / "own", "--splits", "x")


def test_one_folder_of_folders_is_no_class(tmp_path, capsys):
    top = odd.tree(tmp_path / "s", pets("animals"))
    assert made(tmp_path, top).classes == ["cat", "dog"] and "animals is used" in capsys.readouterr().out
    assert made(tmp_path, top, "--labels-from", "none").classes == ["image"]
    one = odd.tree(tmp_path / "one", ["cat/1.png", "cat/2.png"])
    assert made(tmp_path, one).classes == ["cat"]


def test_held_out_images_without_labels_are_left_out(tmp_path, capsys):
    """Kaggle: train/CLASS, and test/ for the submission."""
    d = made(tmp_path, odd.tree(tmp_path / "s", pets("train") + ["test/1.png", "test/2.png"]))
    assert d.classes == ["cat", "dog"] and d.test_images is None and "test has no labels and is left out" in capsys.readouterr().out
    assert "do not match" in refused(tmp_path, capsys, odd.tree(tmp_path / "t", ["train/x/1.png", "test/y/2.png"]))


# ---- labels beside the images
LABELS = [2, 0, 1, 1, 0, 2, 0, 2, 1, 0]


def test_dataset_json_of_edm(tmp_path, capsys):
    want = {f"img{i:08d}.png": str(k) for i, k in enumerate(LABELS)}
    sources = [odd.edm_folder(tmp_path / "edm", LABELS), odd.edm_zip(tmp_path / "stored.zip", LABELS), odd.edm_zip(tmp_path / "packed.zip", LABELS, zipfile.ZIP_DEFLATED)]
    sums = set()
    for source in sources:
        d = made(tmp_path, source)
        assert labelled(d) == want and d.classes == ["0", "1", "2"]
        sums.add(d.info["sha256"])
    assert len(sums) == 1                                             # the zip, without unpacking, is the folder
    assert (d.images[3] == odd.encoded(3)[1]).all()
    (tmp_path / "edm" / "classes.txt").write_text("ant\nbee\ncow\n")  # names line by line
    assert made(tmp_path, sources[0]).classes == ["ant", "bee", "cow"]
    assert made(tmp_path, odd.edm_folder(tmp_path / "none", None, n=8)).classes == ["image"]
    assert made(tmp_path, sources[0], "--labels-from", "folders").classes == ["00000", "00001", "00002"]
    (tmp_path / "edm" / "00000" / "img00000001.png").unlink()
    assert "img00000001.png is not there" in refused(tmp_path, capsys, sources[0])
    for labels, word in (([["00000/img00000000.png", [0, 1]]], "vector"), ("x", "dataset.json"), ([[1]], "dataset.json")):
        (tmp_path / "edm" / "dataset.json").write_text(json.dumps({"labels": labels}))
        assert word in refused(tmp_path, capsys, sources[0])


@pytest.mark.parametrize("name, head, row", [
    ("labels.csv", "file_name,label", "{0},{1}"), ("metadata.csv", "\ufefffile_name;label", "{0};{1}"), ("labels.tsv", "id\tbreed", "{2}\t{1}"),
    ("train.csv", "index,image,class", "7,{0},{1}"), ("meta.csv", "Filename, Class", "images\\{0}, {1}"), ("labels.csv", 'path,label', '"./{0}","{1}"')])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r\n\r\n"])
def test_tables(tmp_path, name, head, row, end):
    """With and without suffix, marks of Excel, Windows's paths and line ends, a column of numbers before."""
    top = odd.tree(tmp_path / "s", [f"{i}.png" for i in range(6)])
    lines = [head, *(row.format(f"{i}.png", "cat" if i % 3 else "dog", i) for i in range(6))]
    (top / name).write_bytes(end.join(lines).encode() + end.encode())
    d = made(tmp_path, top)
    assert labelled(d) == {f"{i}.png": "cat" if i % 3 else "dog" for i in range(6)} and d.classes == ["cat", "dog"]


def test_tables_in_doubt(tmp_path, capsys):
    top = odd.tree(tmp_path / "s", [f"{i}.png" for i in range(24)])

    def table(text, name="labels.csv"):
        (top / name).write_text(text)
    table("file_name,breed,colour\n" + "".join(f"{i}.png,{'ab'[i % 2]},{'xyz'[i % 3]}\n" for i in range(24)))
    assert "--label-column" in refused(tmp_path, capsys, top)
    assert made(tmp_path, top, "--label-column", "colour").classes == ["x", "y", "z"]
    assert "breed, colour" in refused(tmp_path, capsys, top, "--label-column", "size")
    table("file_name,text\n" + "".join(f"{i}.png,a photo of {i}\n" for i in range(24)))
    assert "are no classes" in refused(tmp_path, capsys, top)         # captions
    table("file_name,label\n0.png,a\n1.png,\n")
    assert "row 3" in refused(tmp_path, capsys, top)
    table("file_name,label\n0.png,a\n0.png,b\n")
    assert "two labels" in refused(tmp_path, capsys, top)
    table("file_name,label\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(20)) + "lost.png,a\n")
    d = made(tmp_path, top)
    text = capsys.readouterr().out
    assert len(d.images) == 20 and "4 images have no label" in text and "lost.png" in text
    table("id,label\n" + "".join(f"{i},0\n" for i in range(24)), "sample_submission.csv")
    assert made(tmp_path, top).classes == ["a", "b"]                  # its labels are placeholders
    table("file_name,label\n" + "".join(f"{i}.png,{'cd'[i % 2]}\n" for i in range(24)), "more.csv")
    assert "--labels-from FILE" in refused(tmp_path, capsys, top)
    assert made(tmp_path, top, "--labels-from", "more.csv").classes == ["c", "d"]
    assert made(tmp_path, top, "--labels-from", "none").classes == ["image"]
    assert "no such file" in refused(tmp_path, capsys, top, "--labels-from", "less.csv")


def test_metadata_in_each_split(tmp_path):
    """Hugging Face's imagefolder: a metadata file in train/ and one in test/, with the same file names."""
    for k, split in enumerate(("train", "test")):
        top = odd.tree(tmp_path / "s" / split, [f"{i}.png" for i in range(4)])
        (top / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"{i}.png", "label": (i + k) % 2}) + "\n" for i in range(4)))
    d = made(tmp_path, tmp_path / "s")
    assert d.classes == ["0", "1"] and d.labels.tolist() == [0, 1, 0, 1] and d.test_labels.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("pattern", ["{0}_{1:04d}.png", "{0}.{1}.png", "{0} ({1}).png", "{0}-{1}.png", "{0}{1}.png"])
def test_prefix(tmp_path, pattern, capsys):
    top = odd.tree(tmp_path / "s", [pattern.format(c, i) for c in ("cat", "great_dane") for i in (1, 12)])
    d = made(tmp_path, top)
    assert d.classes == ["image"] and ("--labels-from prefix" in capsys.readouterr().out) == (pattern[3] in "_-.")
    assert made(tmp_path, top, "--labels-from", "prefix").classes == ["cat", "great_dane"]


def test_prefix_needs_numbers(tmp_path, capsys):
    d = made(tmp_path, odd.tree(tmp_path / "s", ["n01440764_18.png", "n01443537_2.png"]), "--labels-from", "prefix")
    assert d.classes == ["n01440764", "n01443537"]
    assert "does not end in a number" in refused(tmp_path, capsys, odd.tree(tmp_path / "t", ["cat_1.png", "dog_b.png"]), "--labels-from", "prefix")


def test_numbered_shards(tmp_path, capsys):
    ffhq = odd.tree(tmp_path / "ffhq", [f"{1000 * k:05d}/{1000 * k + i:05d}.png" for k in range(3) for i in range(2)])
    assert made(tmp_path, ffhq).classes == ["image"] and "numbered shards" in capsys.readouterr().out
    assert made(tmp_path, ffhq, "--labels-from", "folders").classes == ["00000", "01000", "02000"]
    signs = odd.tree(tmp_path / "gtsrb", [f"{k:05d}/{j:05d}_{i:05d}.png" for k in range(3) for j in range(2) for i in range(2)])
    assert "--labels-from folders" in refused(tmp_path, capsys, signs)      # German traffic signs: these are classes
    assert made(tmp_path, signs, "--labels-from", "folders").num_classes == 3
    digits = odd.tree(tmp_path / "mnist", [f"{k}/{k * 10 + i}.png" for k in range(3) for i in range(2)])
    assert made(tmp_path, digits).classes == ["0", "1", "2"]                # of one digit: classes


@pytest.mark.parametrize("text", [b"\xef\xbb\xbfb\r\na\r\n", b"b\r\na\r\n\r\n", b"b\na\n\n", "b\na".encode("utf-16"), b" b \na\t\n"])
def test_classes_txt_as_windows_writes_it(tmp_path, text):
    top = odd.tree(tmp_path / "s", ["a/1.png", "b/1.png"])
    (top / "classes.txt").write_bytes(text)
    assert made(tmp_path, top).classes == ["b", "a"]


def test_classes_txt_in_another_spelling(tmp_path):
    top = odd.tree(tmp_path / "s", ["caf\u00e9/1.png", "bar/1.png"])
    (top / "classes.txt").write_text("cafe\u0301\nbar\n", encoding="utf-8")     # macOS spells it so
    assert made(tmp_path, top).classes == ["caf\u00e9", "bar"]


def test_what_systems_leave_is_no_image(tmp_path):
    junk = ["@eaDir/1.png", "lost+found/1.png", "__MACOSX/1.png", "$RECYCLE.BIN/1.png", "#recycle/1.png", ".ipynb_checkpoints/1.png", "a/._1.png",
            "a/@eaDir/1.png/SYNOPHOTO_THUMB_M.png", "a/.thumbs/1.png", "System Volume Information/1.png"]
    d = made(tmp_path, odd.tree(tmp_path / "s", ["a/1.png", "b/1.png", *junk]))
    assert d.classes == ["a", "b"] and names(d) == ["a/1.png", "b/1.png"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_folder_that_cannot_be_read_is_named(tmp_path, capsys, monkeypatch, code):
    """At any depth, whatever the system says; its images must not be missing without a word."""
    top = odd.tree(tmp_path / "s", ["a/x/1.png", "a/y/1.png", "b/1.png"])
    real = os.scandir

    def scandir(path):
        if str(path).endswith("/y"):
            raise OSError(code, os.strerror(code), str(path))
        return real(path)
    monkeypatch.setattr(os, "scandir", scandir)
    assert f"a/y: {os.strerror(code)}" in refused(tmp_path, capsys, top)
    assert f"a/y: {os.strerror(code)}" in refused(tmp_path, capsys, top, "--skip-bad")


# ---- archives
def test_a_zip_is_its_folder(tmp_path, capsys):
    """With entries for folders, one folder around everything, and what macOS adds."""
    sums = set()
    for wrapper in ("", "archive/"):
        top = odd.tree(tmp_path / f"s{len(wrapper)}" / "in", pets(f"{wrapper}train", f"{wrapper}test"))
        packed = odd.zipped(tmp_path / f"{len(wrapper)}.zip", top)
        for source in (top, packed):
            d = made(tmp_path, source)
            assert d.classes == ["cat", "dog"] and len(d.images) == len(d.test_images) == 4
            sums.add((d.info["sha256"], d.info["sha256_test"], *names(d)))
    assert len(sums) == 1
    (tmp_path / "cut.zip").write_bytes(packed.read_bytes()[:200])
    assert "cut.zip: not a readable zip" in refused(tmp_path, capsys, tmp_path / "cut.zip")


def test_workers_share_a_zip(tmp_path):
    """Each process opens the zip anew: with one open file all would share one place in it."""
    with zipfile.ZipFile(tmp_path / "many.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for i in range(300):
            z.writestr(f"{i % 2}/{i}.png", odd.encoded(i)[0])
    data.main([str(tmp_path / "many.zip"), "--workers", "3", "--out", str(tmp_path / "o")])
    d = common.open_data(tmp_path / "o")
    for name, pixels in zip(names(d), d.images):
        assert (pixels == odd.encoded(int(Path(name).stem))[1]).all()


@pytest.mark.parametrize("key", ["cls", "json"])
def test_webdataset(tmp_path, key, capsys):
    d = made(tmp_path, odd.webdataset(tmp_path / "one.tar", LABELS, key))
    assert d.classes == ["0", "1", "2"] and d.labels.tolist() == LABELS and (d.images[4] == odd.encoded(4)[1]).all()
    for name, labels in (("train-000000.tar", LABELS[:6]), ("train-000001.tar", LABELS[6:]), ("val-000000.tar", [1, 0, 2])):
        odd.webdataset(tmp_path / "shards" / name, labels, key)
    d = made(tmp_path, tmp_path / "shards")
    assert d.labels.tolist() == LABELS and d.test_labels.tolist() == [1, 0, 2] and d.classes == ["0", "1", "2"]
    raw = (tmp_path / "one.tar").read_bytes()
    import gzip
    (tmp_path / "two.tar").write_bytes(gzip.compress(raw))
    assert "tar -xf" in refused(tmp_path, capsys, tmp_path / "two.tar")
    (tmp_path / "two.tar.gz").write_bytes(gzip.compress(raw))
    assert "unpack" in refused(tmp_path, capsys, tmp_path / "two.tar.gz")


def test_parquet(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    for name, labels, first in (("train-00000-of-00002", LABELS[:6], 0), ("train-00001-of-00002", LABELS[6:], 6), ("test-00000-of-00001", [1, 0], 20)):
        odd.parquet(tmp_path / "data" / f"{name}.parquet", labels, ["ant", "bee", "cow"], first)
    d = made(tmp_path, tmp_path / "data")
    assert d.classes == ["ant", "bee", "cow"] and d.labels.tolist() == LABELS and d.test_labels.tolist() == [1, 0]
    assert all((d.images[i] == odd.encoded(i)[1]).all() for i in range(10)) and (d.test_images[1] == odd.encoded(21)[1]).all()
    d = made(tmp_path, odd.parquet(tmp_path / "x.parquet", LABELS))
    assert d.classes == ["0", "1", "2"] and d.labels.tolist() == LABELS
    (tmp_path / "y.parquet").write_bytes(b"PAR1junk")
    assert "y.parquet: not a readable parquet" in refused(tmp_path, capsys, tmp_path / "y.parquet")
    assert "--label-column color" in refused(tmp_path, capsys, tmp_path / "x.parquet", "--label-column", "color")


def test_hugging_face_by_name(tmp_path, monkeypatch):
    """Through the package itself, which takes a local folder for a name: the same pixels and labels as from the files."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, labels, first in (("train-00000-of-00001", LABELS, 0), ("test-00000-of-00001", [1, 0], 20)):
        odd.parquet(tmp_path / "p" / f"{name}.parquet", labels, ["ant", "bee", "cow"], first)
    a, b = made(tmp_path, tmp_path / "p"), made(tmp_path, f"hf:{tmp_path / 'p'}")
    assert a.info["sha256"] == b.info["sha256"] and a.info["sha256_test"] == b.info["sha256_test"] and a.classes == b.classes


@pytest.mark.parametrize("source, package", [("x.parquet", "pyarrow"), ("hf:ylecun/mnist", "datasets")])
def test_optional_packages_are_named(tmp_path, capsys, monkeypatch, source, package):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    for name in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    where = source if ":" in source else tmp_path / source
    assert f"pip install {package}" in refused(tmp_path, capsys, where)


@pytest.mark.parametrize("name, words", [
    ("data.mdb", "LMDB"), ("data_batch_1", "cifar10 --root"), ("train", "CIFAR100"), ("train-images-idx3-ubyte", "torchvision.datasets.MNIST"),
    ("train-images-idx3-ubyte.gz", "unpack"), ("x.tfrecord", "TFRecords"), ("train_32x32.mat", "SVHN"), ("a.h5", "HDF5"), ("a.npy", "np.savez"), ("a.rar", "unpack"),
    ("data-00000-of-00001.arrow", "to_parquet"), ("clip.mp4", "ffmpeg"), ("scan.dcm", "pydicom"), ("IMG_1.HEIC", "pillow-heif"), ("x.tar.gz", "compressed"),
    ("x.parquet", "pyarrow"), ("x.npz", "give that file"), ("a.pkl", "pickles")])
def test_packed_data_sets_are_called_by_their_names(tmp_path, capsys, name, words):
    if name.endswith(".HEIC") and importlib.util.find_spec("pillow_heif"):
        pytest.skip("pillow-heif is installed here")
    for file in (name, "meta"):
        odd.fresh(tmp_path / "s" / file).write_bytes(b"?")
    assert words in refused(tmp_path, capsys, tmp_path / "s")


def test_phone_pictures_among_others_are_refused(tmp_path, capsys):
    top = odd.tree(tmp_path / "s", ["a/1.png", "b/1.png"])
    odd.heic(top / "a" / "IMG_2.HEIC")
    (top / "a" / "IMG_2.MOV").write_bytes(b"video")
    if ".heic" in common.listing.image_suffixes():
        pytest.skip("pillow-heif is installed here")
    text = refused(tmp_path, capsys, top)
    assert "1 pictures are .heic" in text and "pip install pillow-heif" in text and "--skip-bad" in text
    assert len(made(tmp_path, top, "--skip-bad").images) == 2 and "1 .heic, 1 .mov" in capsys.readouterr().out


# ---- further layouts
def test_kaggle_with_a_table_for_the_training_images(tmp_path, capsys):
    """train/ and test/ without folders, train.csv by id, and a submission whose labels are placeholders for images of the same names."""
    top = odd.tree(tmp_path / "s", [f"{split}/{i}.png" for split in ("train", "test") for i in range(12)])
    (top / "train.csv").write_text("id,breed\n" + "".join(f"{i},{'ab'[i % 2]}\n" for i in range(12)))
    (top / "sample_submission.csv").write_text("id,breed\n" + "".join(f"{i},x\n" for i in range(12)))
    d = made(tmp_path, top)
    assert d.classes == ["a", "b"] and len(d.images) == 12 and d.test_images is None and "test has no labels" in capsys.readouterr().out
    assert (d.images[3] == np.asarray(Image.open(top / "train/3.png"))).all() and d.labels.tolist() == [i % 2 for i in range(12)]


def test_tables_of_both_splits(tmp_path):
    """Beside the splits: Train.csv and Test.csv, one table with the paths of both, one that tells them apart by nothing but the path."""
    def labels(d):
        return d.labels.tolist(), None if d.test_labels is None else d.test_labels.tolist()
    top = odd.tree(tmp_path / "s", [f"{split}/{i}.png" for split in ("Train", "Test") for i in range(4)])
    (top / "Train.csv").write_text("Path,ClassId\n" + "".join(f"Train/{i}.png,{i % 2}\n" for i in range(4)))
    (top / "Test.csv").write_text("Path,ClassId\n" + "".join(f"Test/{i}.png,{(i + 1) % 2}\n" for i in range(4)))
    assert labels(made(tmp_path, top)) == ([0, 1, 0, 1], [1, 0, 1, 0])
    for name in ("Train.csv", "Test.csv"):
        (top / name).unlink()
    (top / "labels.csv").write_text("label,file\n" + "".join(f"{i % 2},{i}.png\n" for i in range(4)))        # labels that are names of files, too
    assert labels(made(tmp_path, top, "--splits", "Train")) == ([0, 1, 0, 1], None)
    (top / "labels.csv").write_text("file,label\n" + "".join(f"Train/{i}.png,{i % 2}\nTest/{i}.png,{(i + 1) % 2}\n" for i in range(4)))
    assert labels(made(tmp_path, top)) == ([0, 1, 0, 1], [1, 0, 1, 0])
    (top / "labels.csv").write_text("file,label\n" + "".join(f"{i}.png,{i % 2}\n" for i in range(4)))     # of which split? not of the held-out one
    assert labels(made(tmp_path, top)) == ([0, 1, 0, 1], None)


def test_folders_that_are_no_classes(tmp_path, capsys):
    pets = odd.tree(tmp_path / "pets", ["images/1.png", "images/2.png", "annotations/trimaps/1.png", "annotations/trimaps/2.png"])
    assert "not like classes" in refused(tmp_path, capsys, pets)
    assert len(made(tmp_path, pets / "images").images) == 2
    thumbs = odd.tree(tmp_path / "thumbs", ["1.png", "2.png", "3.png", "small/1.png"])
    assert "3 images lie beside the folders small, and 1 in them" in refused(tmp_path, capsys, thumbs)
    assert len(made(tmp_path, thumbs, "--labels-from", "none").images) == 4
    (odd.tree(tmp_path / "hollow", ["train/a/1.png", "train/b/1.png"]) / "test").mkdir()
    assert made(tmp_path, tmp_path / "hollow").test_images is None and "test holds no image" in capsys.readouterr().out


def test_a_table_beside_class_folders(tmp_path, capsys):
    """One that agrees, one that says nothing of labels, and one that divides the images otherwise."""
    top = odd.tree(tmp_path / "s", [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(6)])

    def table(head, row):
        (top / "metadata.csv").write_text(head + "\n" + "".join(row(c, i) + "\n" for c in ("cat", "dog") for i in range(6)))
    table("file_name,label", lambda c, i: f"{c}/{i}.png,{c}s")
    assert made(tmp_path, top).classes == ["cats", "dogs"]
    table("file_name,width,camera", lambda c, i: f"{c}/{i}.png,8,{i % 3}")
    assert made(tmp_path, top).classes == ["cat", "dog"] and "no column of it is called a label" in capsys.readouterr().out
    assert made(tmp_path, top, "--label-column", "camera", "--labels-from", "metadata.csv").classes == ["0", "1", "2"]
    table("file_name,label", lambda c, i: f"{c}/{i}.png,{i % 3}")
    assert "divide the images otherwise" in refused(tmp_path, capsys, top)
    assert made(tmp_path, top, "--labels-from", "folders").classes == ["cat", "dog"]


def test_several_frames_are_said(tmp_path, capsys):
    frames = [Image.fromarray(np.full((8, 8, 3), v, np.uint8)) for v in (10, 200)]
    odd.fresh(tmp_path / "s" / "a.tif")
    frames[0].save(tmp_path / "s" / "a.tif", save_all=True, append_images=frames[1:])
    assert made(tmp_path, tmp_path / "s").images.max() == 10 and "several frames" in capsys.readouterr().out


# ---- arrays
def test_npz_of_other_programs(tmp_path, capsys):
    x = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    y = np.arange(12) % 3
    np.savez(tmp_path / "medmnist.npz", train_images=x, train_labels=y[:, None], val_images=x[:2], val_labels=y[:2, None], test_images=x[:6], test_labels=y[:6, None])
    d = made(tmp_path, tmp_path / "medmnist.npz")
    text = capsys.readouterr().out
    assert (d.images[..., 0] == x).all() and d.labels.tolist() == y.tolist() and len(d.test_images) == 6
    assert "train_images are the images" in text and "val_images, val_labels left out" in text
    np.savez(tmp_path / "keras.npz", x_train=x, y_train=y, x_test=x[:3], y_test=y[:3])
    assert len(made(tmp_path, tmp_path / "keras.npz").test_images) == 3
    np.savez(tmp_path / "first.npz", images=x[:, None].repeat(3, 1))
    assert "transpose(0, 2, 3, 1)" in refused(tmp_path, capsys, tmp_path / "first.npz")
    np.savez(tmp_path / "deep.npz", images=x.astype(np.uint16) * 16)
    assert "--range" in refused(tmp_path, capsys, tmp_path / "deep.npz")
    assert (made(tmp_path, tmp_path / "deep.npz", "--range", 0, 255 * 16).images[..., 0] == x).all()
    np.savez(tmp_path / "float.npz", images=x / 255)
    assert (made(tmp_path, tmp_path / "float.npz", "--range", 0, 1).images[..., 0] == x).all()


# ---- pictures
def test_values_of_more_than_8_bits(tmp_path, capsys):
    rng = np.random.default_rng(0)
    v = rng.integers(0, 4096, (8, 8))
    v[0, :2] = 0, 4095
    twelve = odd.png_grey16(tmp_path / "twelve" / "a.png", v).parent
    text = refused(tmp_path, capsys, twelve)
    assert "run 0 to 4095" in text and "--range 0 4095" in text
    got = made(tmp_path, twelve, "--range", 0, 4095).images[0, ..., 0]
    assert (got == np.floor(v / 4095 * 255 + 0.5)).all()
    ct = rng.integers(-1000, 2000, (8, 8)).astype(np.int32)
    ct[0, 0] = -1000
    odd.fresh(tmp_path / "ct" / "a.tif")
    Image.fromarray(ct).save(tmp_path / "ct" / "a.tif")
    assert "-1000 to" in refused(tmp_path, capsys, tmp_path / "ct")
    got = made(tmp_path, tmp_path / "ct", "--range", -500, 1500).images[0, ..., 0]
    assert (got == np.floor((ct.clip(-500, 1500) + 500) / 2000 * 255 + 0.5)).all()
    odd.fresh(tmp_path / "f" / "a.tif")
    Image.fromarray((v / 4095).astype(np.float32)).save(tmp_path / "f" / "a.tif")
    assert "float" in refused(tmp_path, capsys, tmp_path / "f") and "--range" in refused(tmp_path, capsys, tmp_path / "f")
    assert np.abs(made(tmp_path, tmp_path / "f", "--range", 0, 1).images[0, ..., 0] - v / 4095 * 255.0).max() <= 0.51
    full = odd.png_grey16(tmp_path / "full" / "a.png", v * 16).parent      # of the whole range: as before
    assert (made(tmp_path, full).images[0, ..., 0] == (v * 16 + 128) // 257).all()
    colour = odd.png_rgb16(tmp_path / "rgb" / "a.png", np.dstack([v, v, v])).parent
    assert "almost black" in refused(tmp_path, capsys, colour) and "8 bits" in refused(tmp_path, capsys, colour, "--range", 0, 4095)
    assert made(tmp_path, odd.png_rgb16(tmp_path / "rgb2" / "a.png", np.dstack([v, v, v]) * 16).parent).images.max() == 255
    for i in range(200):                                              # one dark image of a set is no reason
        odd.png_grey16(tmp_path / "mixed" / f"{i}.png", v if i else v * 16)
    assert made(tmp_path, tmp_path / "mixed").images.shape == (200, 8, 8, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_beside_a_damaged_entry(tmp_path, orientation):
    pixels = np.kron(np.random.default_rng(0).integers(0, 256, (2, 3), dtype=np.uint8), np.ones((8, 8), np.uint8))
    pixels = np.dstack([pixels] * 3)
    odd.jpeg_turned(tmp_path / "s" / "a.jpg", pixels, orientation)
    x = pixels.astype(int)
    want = {1: x, 2: x[:, ::-1], 3: x[::-1, ::-1], 4: x[::-1], 5: x.transpose(1, 0, 2), 6: np.rot90(x, -1), 7: x[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(x)}
    got = made(tmp_path, tmp_path / "s").images[0]
    assert got.shape == want[orientation].shape and np.abs(got - want[orientation]).max() < 12


def test_a_broken_exif_block_says_nothing(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    odd.png_broken_exif(tmp_path / "s" / "a.png", pixels)
    odd.png_with(tmp_path / "s" / "b.png", pixels, b"eXIf", odd.exif_block(9))     # an orientation that there is not
    odd.png_with(tmp_path / "s" / "c.png", pixels, b"eXIf", odd.exif_block(6)[:14])
    assert (made(tmp_path, tmp_path / "s").images == pixels).all()


def test_a_large_scan(tmp_path, capsys):
    scan = odd.large_scan(tmp_path / "s" / "scan.png").parent
    text = refused(tmp_path, capsys, scan, "--size", 8)
    assert "100 megapixels" in text and "--max-pixels 100000000" in text and "bilevel" not in text
    assert made(tmp_path, scan, "--size", 8, "--max-pixels", 10**8).images.shape == (1, 8, 8, 1)


def test_sizes_that_are_not_square(tmp_path, capsys):
    top = odd.tree(tmp_path / "s", ["a/1.png", "b/1.png"], size=(24, 16))
    assert made(tmp_path, top).images.shape == (2, 16, 24, 3)
    assert made(tmp_path, top, "--size", 8).images.shape == (2, 8, 8, 3)
    d = made(tmp_path, top, "--size", 8, 12)
    assert d.images.shape == (2, 8, 12, 3)                            # half of 16 x 24: the mean of every 2 x 2
    x = np.asarray(Image.open(top / "a/1.png"), float)
    assert np.abs(d.images[0] - x.reshape(8, 2, 12, 2, 3).mean((1, 3))).max() <= 1
    odd.noisy(top / "a" / "2.png", 5, size=(16, 24))
    text = refused(tmp_path, capsys, top)
    assert "--size" in text and "16x24" in text


def test_what_was_understood_is_said_first(tmp_path, capsys):
    made(tmp_path, odd.tree(tmp_path / "s", pets("train", "valid"), size=(8, 6)))
    text = capsys.readouterr().out
    assert "splits train, valid; class folders" in text and "cat 2, dog 2" in text and "4 held out" in text and "8x6 4" in text and "RGB 4" in text


def test_a_source_that_has_changed_is_said(tmp_path, capsys):
    top = odd.tree(tmp_path / "s", ["a/1.png", "b/1.png"])
    for change in (lambda: odd.noisy(top / "a" / "2.png", 7), lambda: odd.noisy(top / "a" / "1.png", 8), lambda: (top / "b" / "1.png").rename(top / "b" / "3.png")):
        data.main([str(top), "--out", str(tmp_path / "o"), "--overwrite"])
        capsys.readouterr()
        data.main([str(top), "--out", str(tmp_path / "o")])
        text = capsys.readouterr().out
        assert "nothing to do" in text and "has changed" not in text
        change()
        data.main([str(top), "--out", str(tmp_path / "o")])
        assert "has changed since" in capsys.readouterr().out
