"""Every script against damaged files, wrong flags and misplaced folders: exit code 2, one line that names the culprit and what to do, nothing touched.

A case is one line of the table: the scripts it runs (each with its command of COMMANDS), what is damaged in a copy of a small world that is otherwise
in order, what the message must hold, flags that are added. A word of the message may differ from script to script: then it stands in that script's line.
"""
import argparse
import contextlib
import errno
import hashlib
import importlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import evaluate
from conftest import ROOT, make_data

COMMANDS = {
    "data": "data --out out",
    "prune": "--data data --score random --keep 0.5 --out out",
    "reweight": "--data data --reference run/step_0000002.pt --indices prune/keep.npy --steps 2 --burn-in 0 --batch-size 4 --out out",
    "attach": "--data data --reference run/step_0000002.pt --per-class 2 --text none --visual ddae --judge none --out out",
    "train": "--data data --preset digits --steps 1 --batch-size 4 --warmup 0 --flips --out out",
    "sample": "--checkpoint run/step_0000002.pt --num 4 --steps 1 --out out",
    "evaluate": "--data data --runs run --encoder pixels --overwrite",
    "report": "run small --out out",
}
READERS = "data prune reweight attach train evaluate"                 # the scripts that read a data folder
EVEN, ODD = "data prune train", "reweight attach evaluate"             # where the reader is the same function, half of them do
REMEDY = re.compile(r"; |must |see --help|expected|give |use |make |choose |needs? |say |take ", re.I)
SECONDS = 60                                                          # a case takes a tenth of one; a loaded machine is given time


# ---------------------------------------------------------------------------------------------- the world
@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Data, runs and the outputs of every stage, small and in order. Paths in it are relative: the cases run in copies of it."""
    top, here = tmp_path_factory.mktemp("base"), os.getcwd()
    for name, seed in (("data", 0), ("other", 1)):
        folder = make_data(top / name, sizes=(10, 9, 8), seed=seed)
        test = make_data(top / "test", sizes=(4, 4, 4), seed=seed + 2)
        for part in ("images.npy", "labels.npy"):
            (test / part).rename(folder / f"test_{part}")
        shutil.rmtree(test)
    os.chdir(top)
    try:
        x, y = np.load("data/images.npy"), np.load("data/labels.npy")
        np.savez("set.npz", images=x, labels=y)
        np.savez("samples.npz", arr_0=x, arr_1=y)
        for i in range(6):
            Path(f"pictures/{'ab'[i % 2]}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(x[i, ..., 0]).save(f"pictures/{'ab'[i % 2]}/{i}.png")
        np.save("text.npy", np.ones((3, 2, 5), np.float16))
        np.save("difficulty.npy", np.random.default_rng(0).random(27).astype(np.float32))
        np.save("features.npy", np.random.default_rng(0).normal(size=(27, 4)).astype(np.float32))
        np.savez("stats.npz", mu=np.zeros(26), sigma=np.eye(26))
        run("train", COMMANDS["train"] + " --steps 2 --checkpoint-every 1 --schedule constant --out run")
        run("prune", COMMANDS["prune"] + " --out prune")
        run("reweight", COMMANDS["reweight"] + " --out reweight")
        run("attach", COMMANDS["attach"] + " --text text.npy --flips --out attach")
        run("train", COMMANDS["train"] + " --indices prune/keep.npy --weights reweight/weights.npy --out small")
        for name in ("run", "small"):
            run("sample", f"--checkpoint {name}/last.pt --num 12 --steps 1 --out {name}")
        run("evaluate", "--data data --runs run small --encoder pixels")
        run("evaluate", "--data data --runs run --encoder pixels --trajectory")
        run("data", "digits --out again --size 4")
        common.open_encoder("scratch", common.open_data("data"), "cpu")
    finally:
        os.chdir(here)
    before = snapshot(top, content=True)
    yield top
    assert snapshot(top, content=True) == before, "a case wrote into the world that all share"


@pytest.fixture
def world(base, tmp_path, monkeypatch):
    """A copy of hard links, where the test then stands; what damages a file replaces it."""
    for top, _, files in os.walk(base):
        copy = tmp_path / "w" / os.path.relpath(top, base)
        copy.mkdir()
        for f in files:
            os.link(os.path.join(top, f), copy / f)
    monkeypatch.chdir(tmp_path / "w")
    old = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"took more than {SECONDS} s"))
    signal.alarm(SECONDS)
    yield tmp_path / "w"
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


def snapshot(top, content=False):
    """{path: what tells a change} of everything below `top`: content and size, or place and time of the last change; of records always the content."""
    out = {}
    for folder, _, files in os.walk(top):
        out[folder] = "folder"
        for f in files:
            path = os.path.join(folder, f)
            if content or f.endswith(".args.json") and os.path.isfile(path):
                out[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            else:
                s = os.lstat(path)
                out[path] = s.st_size, s.st_mtime_ns, s.st_ino
    return out


def run(script, line):
    argv = line if isinstance(line, list) else line.split()
    importlib.import_module(script).main(["--device", "cpu"] * (script not in ("data", "report")) + argv)


def refused(script, line, *words, top="."):
    """Run a script that must end in exit code 2 with one line that holds all `words`, and leave everything below `top` as it was. Returns the line."""
    before, err = snapshot(top), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        with pytest.raises(SystemExit) as e:
            run(script, line)
    assert e.value.code == 2
    lines = [x for x in re.split(r"[\r\n]+", err.getvalue()) if x.strip() and not re.search(r"\d+%\||: \d+ ?images|\?it/s|it/s\]|\?images/s", x)]
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{script}.py: error: ") and len(lines[0]) < 700, lines[0]
    for word in words:
        assert word in lines[0], (word, lines[0])
    assert REMEDY.search(lines[0]), lines[0]
    after = snapshot(top)
    assert after == before, {k: (before.get(k), after.get(k)) for k in {*before, *after} if before.get(k) != after.get(k)}
    return lines[0]


# ---------------------------------------------------------------------------------------------- ways to damage
def fresh(path):
    """`path`, free to be written: a file of the shared world is unlinked first."""
    path = Path(path)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def put(path, value):
    """An array as .npy, bytes or text as they are, a dict or list as JSON."""
    def damage():
        v = value() if callable(value) else value
        file = fresh(path)
        if isinstance(v, np.ndarray):
            with open(file, "wb") as f:
                np.save(f, v)
        elif isinstance(v, bytes):
            file.write_bytes(v)
        else:
            file.write_text(v if isinstance(v, str) else json.dumps(v))
    return damage


def change(path, edit):
    """The array, JSON value, .pt or .npz dict in `path` after edit(value); edit may change it in place."""
    def damage():
        kind = Path(path).suffix
        if kind == ".json":
            v = json.loads(Path(path).read_text())
        elif kind == ".pt":
            v = torch.load(path, weights_only=True)
        else:
            with np.load(path) if kind == ".npz" else contextlib.nullcontext(np.load(path)) as z:
                v = dict(z) if kind == ".npz" else z
        new = edit(v)
        v = v if new is None else new
        if kind == ".pt":
            torch.save(v, fresh(path))
        elif kind == ".npz":
            np.savez(fresh(path), **v)
        else:
            put(path, v)()
    return damage


def lacks(path, *keys):
    """The dict in `path` without its entry at keys."""
    def edit(v):
        for k in keys[:-1]:
            v = v[k]
        del v[keys[-1]]
    return change(path, edit)


def holds(path, *keys_and_value):
    """The dict in `path` with another value at keys."""
    *keys, value = keys_and_value

    def edit(v):
        for k in keys[:-1]:
            v = v[k]
        v[keys[-1]] = value
    return change(path, edit)


def swap(path, source):
    return lambda: (shutil.copyfile(source, path + ".new"), fresh(path), os.replace(path + ".new", path))


def cut(path, share=0.5):
    def damage():
        b = Path(path).read_bytes()
        put(path, b[:int(len(b) * share)])()
    return damage


def gone(path):
    return lambda: shutil.rmtree(path) if Path(path).is_dir() else os.unlink(path)


def folder(path):
    return lambda: fresh(path).mkdir()


def both(*damages):
    return lambda: [d() for d in damages]


class Bomb:
    """Pickled code: whoever unpickles it makes the file `ran`."""
    def __reduce__(self):
        return os.mkdir, ("ran",)


def bomb_npy(path):
    return put(path, lambda: np.array([Bomb()], dtype=object))


def bomb_raw(path):
    return put(path, lambda: pickle.dumps(Bomb()))


def bomb_pt(path):
    return lambda: torch.save({"ema": Bomb(), "args": {}}, fresh(path))


def npy_header(shape, dtype="|u1"):
    """A .npy file that claims `shape` and holds nothing of it."""
    f = io.BytesIO()
    np.lib.format.write_array_header_1_0(f, {"descr": dtype, "fortran_order": False, "shape": shape})
    return f.getvalue() + bytes(64)


def npz_claim(path, **shapes):
    """An .npz whose members claim shapes beyond any memory, in their headers and in the archive's own list."""
    def damage():
        with zipfile.ZipFile(fresh(path), "w", zipfile.ZIP_DEFLATED) as z:
            for name, (shape, dtype) in shapes.items():
                z.writestr(f"{name}.npy", npy_header(shape, dtype))
            for m in z.infolist():
                shape, dtype = shapes[m.filename[:-4]]
                m.file_size = len(npy_header(shape, dtype)) - 64 + int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
    return damage


def png_bomb(path, side=30_000):
    """A PNG of side x side grey pixels in about a megabyte: past Pillow's limit for decompression bombs."""
    def damage():
        def chunk(kind, body):
            return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        z = zlib.compressobj(1)
        body = b"".join(z.compress(bytes(side + 1)) for _ in range(8)) + z.flush()
        fresh(path).write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)) + chunk(b"IDAT",
            body) + chunk(b"IEND", b""))
    return damage


# ---------------------------------------------------------------------------------------------- the table
CASES = []


def case(name, scripts, damage, words="", more="", instead=None):
    """One line of the table; a case for each of the scripts (separated by blanks). words: what the message holds, separated by |."""
    for script in scripts.split():
        line = (COMMANDS[script] if instead is None else instead) + " " + more
        CASES.append(pytest.param(script, line, damage, words, id=f"{script}-{name.replace(' ', '_')}"))


I64, U8, F32 = np.int64, np.uint8, np.float32
nothing = lambda: None                                                # noqa: E731

# ---- the data folder
case("data folder absent", READERS, gone("data"), "data|no such")
case("data folder is a file", "prune reweight attach train evaluate", both(gone("data"), put("data", "x")), "data|no such data folder")
case("data folder empty", "prune reweight attach train evaluate", folder("data"), "dataset.json")
for name, value in (("a list", []), ("a number", 3), ("text", "sha"), ("empty", b""), ("half", b'{"name": "a", '), ("null", "null"), ("not text", b"\xff\xfe\0"),
                    ("deep", "[" * 100_000), ("NaN", '{"name": "a", "sha256": NaN}')):
    case(f"dataset.json {name}", READERS, put("data/dataset.json", value), "data/dataset.json")
case("dataset.json without sha256", READERS, lacks("data/dataset.json", "sha256"), "data/dataset.json|sha256")
case("dataset.json without name", "prune reweight train evaluate", lacks("data/dataset.json", "name"), "data/dataset.json|name")
case("dataset.json sha256 a list", READERS, holds("data/dataset.json", "sha256", [1]), "data/dataset.json|sha256")
case("dataset.json name a number", READERS, holds("data/dataset.json", "name", 5), "data/dataset.json|name")
case("labels absent", "prune reweight attach train evaluate", gone("data/labels.npy"), "data/labels.npy")
case("labels a folder", "prune reweight attach train evaluate", folder("data/labels.npy"), "data/labels.npy")
case("labels empty array", EVEN, put("data/labels.npy", np.zeros(0, I64)), "data/labels.npy")
case("labels empty file", ODD, put("data/labels.npy", b""), "data/labels.npy")
case("labels cut", EVEN, cut("data/labels.npy"), "data/labels.npy")
case("labels one short", ODD, change("data/labels.npy", lambda y: y[:-1]), "data/")
case("labels floats", EVEN, change("data/labels.npy", lambda y: y.astype(float)), "data/labels.npy|float64|integers")
case("labels a column", ODD, change("data/labels.npy", lambda y: y[:, None]), "data/labels.npy|(27, 1)")
case("labels negative", EVEN, change("data/labels.npy", lambda y: y - 1), "data/labels.npy|-1..1")
case("labels too large", ODD, change("data/labels.npy", lambda y: y + 1), "data/labels.npy|1..3")
case("labels huge unsigned", "train", change("data/labels.npy", lambda y: y.astype(np.uint64) + np.uint64(2**63)), "data/labels.npy")
case("labels are images", EVEN, swap("data/labels.npy", "data/images.npy"), "data/labels.npy|(27, 8, 8, 1)")
case("labels pickled", ODD, bomb_npy("data/labels.npy"), "data/labels.npy")
case("labels a bare pickle", EVEN, bomb_raw("data/labels.npy"), "data/labels.npy")
case("images absent", "evaluate", gone("data/images.npy"), "data|images.npy")
case("images absent and no latents", "data prune reweight attach train", gone("data/images.npy"), "data|images.npy")
case("images cut", ODD, cut("data/images.npy"), "data/images.npy")
case("images floats", EVEN, change("data/images.npy", lambda x: x / F32(255)), "data/images.npy|float32")
case("images 16 bits", ODD, change("data/images.npy", lambda x: x.astype(np.uint16)), "data/images.npy|uint16")
case("images without channels", EVEN, change("data/images.npy", lambda x: x[..., 0]), "data/images.npy|(27, 8, 8)")
case("images with two channels", ODD, change("data/images.npy", lambda x: x.repeat(2, 3)), "data/images.npy|(27, 8, 8, 2)")
case("images of no height", EVEN, put("data/images.npy", np.zeros((27, 0, 8, 1), U8)), "data/images.npy|(27, 0, 8, 1)")
case("images are labels", ODD, swap("data/images.npy", "data/labels.npy"), "data/images.npy")
case("images pickled", EVEN, bomb_npy("data/images.npy"), "data/images.npy")
case("images a checkpoint", ODD, swap("data/images.npy", "run/step_0000002.pt"), "data/images.npy")
case("images an npz", EVEN, swap("data/images.npy", "set.npz"), "data/images.npy")
case("images claim too much", ODD, put("data/images.npy", npy_header((27, 2**20, 2**20, 3))), "data/images.npy")
case("images claim a negative size", "train", put("data/images.npy", npy_header((27, -8, 8, 1))), "data/images.npy")
case("images not square", "train reweight", change("data/images.npy", lambda x: x[:, :4]), "data")
case("classes absent", EVEN, gone("data/classes.txt"), "data/classes.txt")
case("classes empty", ODD, put("data/classes.txt", ""), "data/classes.txt")
case("classes not text", EVEN, put("data/classes.txt", b"\xff\xfe\xff"), "data/classes.txt")
case("classes a folder", ODD, folder("data/classes.txt"), "data/classes.txt")
case("a class without images", "prune attach reweight data", put("data/classes.txt", "a\nb\nc\nd\n"), "data")
case("test labels absent", EVEN, gone("data/test_labels.npy"), "data/test_labels.npy")
case("test labels out of range", ODD, change("data/test_labels.npy", lambda y: y + 5), "data/test_labels.npy|5..7")
case("test labels empty", EVEN, both(put("data/test_labels.npy", np.zeros(0, I64)), change("data/test_images.npy", lambda x: x[:0])), "data/test_labels.npy")
case("test images cut", ODD, cut("data/test_images.npy"), "data/test_images.npy")
case("test images of another size", EVEN, change("data/test_images.npy", lambda x: x[:, :4]), "data/test_images.npy|(12, 4, 8, 1)")
case("test images 16 bits", ODD, change("data/test_images.npy", lambda x: x.astype(np.uint16)), "data/test_images.npy|uint16")
case("one class", "reweight", both(put("data/labels.npy", np.zeros(27, I64)), put("data/classes.txt", "a\n")), "data|class")
case("one class, scratch", "prune", both(put("data/labels.npy", np.zeros(27, I64)), put("data/test_labels.npy", np.zeros(12, I64)), put("data/classes.txt", "a\n")),
     "data|one class", "", "--data data --score gaussian --surrogate scratch --keep 0.5 --out out")

# ---- latents
latents = put("data/latents.npy", lambda: np.random.default_rng(0).normal(size=(27, 8, 4, 4)).astype(np.float16))
settings = put("data/latents.json", {"scale": 0.18215, "mean": 0, "std": 0.2, "vae": "x"})
case("latents.json absent", "train", latents, "data/latents.json", "--no-flips")
case("latents.json a list", "train", both(latents, put("data/latents.json", [])), "data/latents.json", "--no-flips")
case("latents.json without scale", "train", both(latents, put("data/latents.json", {"vae": "x"})), "data/latents|scale", "--no-flips")
case("latents.json scale text", "train", both(latents, put("data/latents.json", {"scale": "x"})), "data/latents|scale", "--no-flips")
case("latents.json scale NaN", "train", both(latents, put("data/latents.json", '{"scale": NaN}')), "data/latents.json", "--no-flips")
case("latents with integers", "train", both(settings, put("data/latents.npy", np.zeros((27, 8, 4, 4), I64))), "data/latents.npy|int64")
case("latents too few", "train", both(settings, put("data/latents.npy", np.zeros((26, 8, 4, 4), np.float16))), "data/latents.npy|(26, 8, 4, 4)")
case("latents odd channels", "train", both(settings, put("data/latents.npy", np.zeros((27, 7, 4, 4), np.float16))), "data/latents.npy|7 channels", "--no-flips")
case("latents cut", "train", both(latents, settings, cut("data/latents.npy")), "data/latents.npy")

# ---- kept indices: --indices of data, reweight, attach, train
USERS = {"data": "data --out out --indices keep.npy", "reweight": COMMANDS["reweight"].replace("prune/", ""),
         "attach": "--data data --indices keep.npy --text text.npy --judge none --out out", "train": COMMANDS["train"] + " --indices keep.npy"}
for script, line in USERS.items():
    for name, damage, words in (
            ("absent", nothing, "no such file"), ("a folder", folder("keep.npy"), "no such file"), ("empty file", put("keep.npy", b""), "not a readable"),
            ("of nothing", put("keep.npy", np.zeros(0, I64)), ""), ("floats", put("keep.npy", np.arange(9.0)), "float64"),
            ("weights", swap("keep.npy", "reweight/weights.npy"), "float32"), ("labels", swap("keep.npy", "data/labels.npy"), "sorted"),
            ("images", swap("keep.npy", "data/images.npy"), "(27, 8, 8, 1)"), ("a checkpoint", swap("keep.npy", "run/step_0000002.pt"), "not a"),
            ("negative", put("keep.npy", np.arange(-1, 27)), "-1..26"), ("too large", put("keep.npy", np.arange(28)), "0..27"),
            ("twice the same", put("keep.npy", np.array([0, 1, 1, 2])), "repeats"), ("unsorted", put("keep.npy", np.arange(27)[::-1].copy()), "sorted"),
            ("booleans", put("keep.npy", np.ones(27, bool)), "bool"), ("complex", put("keep.npy", np.ones(27, complex)), "complex"),
            ("huge", put("keep.npy", npy_header((2**50,), "<i8")), "not a readable"), ("text", put("keep.npy", np.array(["a"])), "<U1"),
            ("dates", put("keep.npy", np.array(["2020-01-01"], "M8[D]")), "datetime"), ("a scalar", put("keep.npy", np.array(3)), "()"),
            ("pickled", bomb_npy("keep.npy"), "not a readable"), ("a bare pickle", bomb_raw("keep.npy"), "not a readable"),
            ("without a class", put("keep.npy", lambda: np.flatnonzero(np.load("data/labels.npy") != 1)), "class")):
        case(f"indices {name}", script, damage, f"keep.npy|{words}", "", line)
for script in "reweight train attach".split():                        # data.py may take the indices to the same images in another size
    case("indices of another data set", script, holds("prune/prune.args.json", "inputs", "data", "0" * 64), "keep.npy|another data set", "",
         USERS[script].replace("keep.npy", "prune/keep.npy"))
case("indices with a record that is a list", "reweight train", put("prune/prune.args.json", []), "prune.args.json", "--indices prune/keep.npy")
case("indices with a record without inputs", "reweight train", lacks("prune/prune.args.json", "inputs"), "prune.args.json|inputs", "--indices prune/keep.npy")
case("indices with a record of text inputs", "train", holds("prune/prune.args.json", "inputs", "x"), "prune.args.json|inputs", "--indices prune/keep.npy")

# ---- class weights
for name, damage, words in (
        ("absent", nothing, "no such file"), ("are indices", swap("w.npy", "prune/keep.npy"), "int64"), ("too few", put("w.npy", np.ones(2, F32)), "(2,)"),
        ("NaN", put("w.npy", np.array([1, np.nan, 1], F32)), "finite"), ("infinite", put("w.npy", np.array([1, np.inf, 1], F32)), "finite"),
        ("negative", put("w.npy", np.array([1, -1, 1], F32)), "negative"), ("all zero", put("w.npy", np.zeros(3, F32)), "zero"),
        ("a matrix", put("w.npy", np.ones((3, 1), F32)), "(3, 1)"), ("a checkpoint", swap("w.npy", "run/step_0000002.pt"), "not a"),
        ("pickled", bomb_npy("w.npy"), ""),
        ("cut", both(swap("w.npy", "reweight/weights.npy"), cut("w.npy")), "not a readable"), ("text", put("w.npy", "1 1 1"), "not a readable"),
        ("a folder", folder("w.npy"), "no such file")):
    case(f"weights {name}", "train", damage, f"w.npy|{words}", "--weights w.npy")
case("weights of another data set", "train", holds("reweight/reweight.args.json", "inputs", "data", "0" * 64), "weights.npy|another",
    "--weights reweight/weights.npy")

# ---- checkpoints: --checkpoint of sample, --reference of reweight and attach, --init of train, weights of ddae
CKPT = {"sample": COMMANDS["sample"].replace("run/step_0000002", "c"), "reweight": COMMANDS["reweight"].replace("run/step_0000002", "c"),
        "attach": COMMANDS["attach"].replace("run/step_0000002", "c").replace("ddae", "none"), "train": COMMANDS["train"] + " --init c.pt",
        "prune": "--data data --score gaussian --surrogate ddae --weights c.pt --keep 0.5 --out out"}
good = swap("c.pt", "run/step_0000002.pt")
for script, line in CKPT.items():
    for name, damage, words in (
            ("absent", nothing, "c.pt|no such file"), ("a folder", folder("c.pt"), "c.pt"), ("empty", put("c.pt", b""), "c.pt"),
            ("cut", both(good, cut("c.pt", 0.7)), "c.pt"),
            ("text", put("c.pt", "hello"), "c.pt"), ("an array", swap("c.pt", "prune/keep.npy"), "c.pt"), ("pickled", bomb_pt("c.pt"), "c.pt"),
            ("a bare pickle", bomb_raw("c.pt"), "c.pt"), ("a list", lambda: torch.save([1], fresh("c.pt")), "c.pt|list"),
            ("a tensor", lambda: torch.save(torch.ones(3), fresh("c.pt")), "c.pt|Tensor"), ("an empty dict", lambda: torch.save({}, fresh("c.pt")), "c.pt"),
            ("the scratch network", swap("c.pt", "data/scratch.pt"), "c.pt"), ("without ema", both(good, lacks("c.pt", "ema")), "c.pt"),
            ("without args", both(good, lacks("c.pt", "args")), "c.pt"), ("args a list", both(good, holds("c.pt", "args", [])), "c.pt"),
            ("a weight missing", both(good, lacks("c.pt", "ema", "x_embedder.proj.weight")), "c.pt|x_embedder.proj.weight"),
            ("a weight a number", both(good, holds("c.pt", "ema", "x_embedder.proj.weight", 3)), "c.pt|x_embedder.proj.weight"),
            ("a weight of another shape", both(good, holds("c.pt", "ema", "x_embedder.proj.weight", torch.ones(2))), "c.pt|x_embedder.proj.weight"),
            ("a weight of integers", both(good, change("c.pt", lambda s: s["ema"].update({"x_embedder.proj.weight": s["ema"]["x_embedder.proj.weight"].long()}))),
             "c.pt|x_embedder.proj.weight"),
            ("a weight NaN", both(good, change("c.pt", lambda s: None if s["ema"]["x_embedder.proj.weight"].fill_(float("nan")) is not None else s)), "c.pt|NaN")):
        if name in ("absent", "cut", "pickled", "a weight NaN") or script in ("sample", "train"):     # one reader for all but train's --init
            case(f"checkpoint {name}", script, damage, words, "", line)
for key in ("model", "size", "channels", "num_classes", "process"):
    case(f"checkpoint args without {key}", "sample reweight attach", both(swap("run/c.pt", "run/step_0000002.pt"), lacks("run/c.pt", "args", key),
        swap("run/step_0000002.pt", "run/c.pt")), f"step_0000002.pt|{key}")
for key, value in (("model", "nosuch"), ("model", 5), ("size", "8"), ("size", -8), ("size", 0), ("size", 7), ("size", 10**9), ("channels", 0), ("channels", 2),
        ("num_classes", -5),
                   ("num_classes", 10**12), ("num_classes", "x"), ("process", "x"), ("predict", "x"), ("class_std", "x"), ("text_shape", "x"),
                   ("text_shape", [-1, 2])):
    case(f"checkpoint args {key} {value}", "sample", holds("run/step_0000002.pt", "args", key, value), "step_0000002.pt")
case("checkpoint args without lr", "reweight", lacks("run/step_0000002.pt", "args", "lr"), "step_0000002.pt|lr")
case("checkpoint of another data set", "reweight", nothing, "run/step_0000002.pt|tiny|other|other", instead=COMMANDS["reweight"].replace("--data data",
    "--data other").replace("--indices prune/keep.npy", ""))
case("checkpoint of other classes", "attach", both(put("data/classes.txt", "a\nb\nc\nd\n"), change("data/labels.npy", lambda y: np.r_[3, y[1:]])),
    "step_0000002.pt|3", instead=COMMANDS["attach"].replace("per-class 2", "per-class 1"))
case("init of another process", "train", nothing, "run/step_0000002.pt|process", "--init run/step_0000002.pt --process ddpm")
case("init of another network", "train", nothing, "run/step_0000002.pt", "--init run/step_0000002.pt --model unet-tiny")
case("proxy-init a scratch network", "reweight", nothing, "scratch.pt", "--proxy-init data/scratch.pt")
case("proxy-init absent", "reweight", nothing, "nosuch.pt", "--proxy-init nosuch.pt")

# ---- prune
G = "--data data --score gaussian --keep 0.5 --out out"
for name, damage, words in (
        ("absent", nothing, "no such file"), ("cut", both(swap("f.npy", "features.npy"), cut("f.npy")), "not a readable"),
        ("too few", put("f.npy", np.ones((26, 4), F32)), "(26, 4)"),
        ("flat", put("f.npy", np.ones(27, F32)), "(27,)"), ("of no width", put("f.npy", np.ones((27, 0), F32)), "width 0"),
        ("NaN", put("f.npy", np.full((27, 4), np.nan, F32)), "row 0"), ("infinite", change("features.npy", lambda z: z / np.zeros(4, F32)), "features.npy"),
        ("integers", put("f.npy", np.ones((27, 4), I64)), "int64"), ("images", swap("f.npy", "data/images.npy"), "uint8"), ("pickled", bomb_npy("f.npy"), "")):
    case(f"features {name}", "prune", damage, "" if name == "infinite" else f"f.npy|{words}", f"--features {'features' if name == 'infinite' else 'f'}.npy", G)
case("features too large", "prune", put("f.npy", lambda: np.random.default_rng(0).normal(size=(27, 4)) * 1e200), "features", "--features f.npy", G)
case("features of another data set", "prune", both(swap("prune/f.npy", "features.npy"), holds("prune/prune.args.json", "inputs", "data", "0" * 64)),
     "f.npy|another data set|data (tiny)", "--features prune/f.npy", G)
case("scores of another data set", "prune", holds("prune/prune.args.json", "inputs", "data", "0" * 64), "scores.npy|another data set", "",
     "--data data --scores prune/scores.npy --keep 0.5 --out out")
case("features with a bad note", "prune", put("features.seconds.json", [3]), "features.seconds.json", "--features features.npy", G)
case("features with a text note", "prune", put("features.seconds.json", '"x"'), "features.seconds.json", "--features features.npy", G)
for name, damage, words in (("absent", nothing, "no such file"), ("NaN", put("s.npy", np.full(27, np.nan)), "row 0"),
        ("too many", put("s.npy", np.ones(28)), "(28,)"),
                            ("labels", swap("s.npy", "data/labels.npy"), "int64"), ("nothing picked", put("s.npy", np.full(27, -np.inf)), "picks fewer"),
                            ("plus infinity", put("s.npy", np.full(27, np.inf)), "row 0")):
    case(f"scores {name}", "prune", damage, f"s.npy|{words}", "", "--data data --scores s.npy --keep 0.5 --out out")
SCR = "--data data --score gaussian --surrogate scratch --keep 0.5 --out out"
for name, damage in (("cut", cut("data/scratch.pt")), ("empty", put("data/scratch.pt", b"")), ("a checkpoint", swap("data/scratch.pt", "run/step_0000002.pt")),
        ("pickled", bomb_pt("data/scratch.pt")),
                     ("without settings", lacks("data/scratch.pt", "settings")), ("settings a list", holds("data/scratch.pt", "settings", [1])),
                     ("a folder", folder("data/scratch.pt")),
                     ("of another size", holds("data/scratch.pt", "settings", "size", 16)),
                     ("of other channels", holds("data/scratch.pt", "settings", "channels", 3)),
                     ("size text", holds("data/scratch.pt", "settings", "size", "x")), ("size huge", holds("data/scratch.pt", "settings", "num_classes", 10**13)),
                     ("NaN", change("data/scratch.pt", lambda s: None if s["model"]["mean"].fill_(float("nan")) is not None else s))):
    case(f"scratch network {name}", "prune", damage, "scratch", "", SCR)
    case(f"scratch network {name}", "evaluate", damage, "scratch", "", COMMANDS["evaluate"].replace("pixels", "scratch"))
case("more per class than there is", "prune", nothing, "--per-class 9|8", "", "--data data --score random --per-class 9 --out out")
case("global scope loses a class", "prune", put("s.npy", lambda: (np.load("data/labels.npy") != 2).astype(float)), "--scope global", "",
    "--data data --scores s.npy --keep 0.3 --scope global --out out")
case("weights of inception", "prune", nothing, "run/step_0000002.pt", "",
    "--data data --score gaussian --surrogate inception --weights run/step_0000002.pt --keep 0.5 --out out")

# ---- attach
TXT = COMMANDS["attach"].replace("--text none", "--text t.npy").replace("ddae", "none")
for name, damage, words in (
        ("absent", nothing, "no such file"), ("of other classes", put("t.npy", np.ones((4, 2, 5), F32)), "(4, 2, 5)"),
        ("flat", put("t.npy", np.ones((3, 5), F32)), "(3, 5)"),
        ("NaN", put("t.npy", np.full((3, 2, 5), np.nan, F32)), "NaN"), ("beyond half", put("t.npy", np.full((3, 2, 5), 1e9, F32)), "float16"),
        ("of no token", put("t.npy", np.ones((3, 0, 5), F32)), "no token"),
        ("integers", put("t.npy", np.ones((3, 2, 5), I64)), "int64"), ("pickled", bomb_npy("t.npy"), ""),
        ("cut", both(swap("t.npy", "text.npy"), cut("t.npy")), "not a readable")):
    case(f"text {name}", "attach", damage, f"t.npy|{words}", "", TXT)
text_ok = swap("t.npy", "text.npy")
case("text mask of another shape", "attach", both(text_ok, put("t_mask.npy", np.ones((3, 3), bool))), "t_mask.npy|(3, 3)", "", TXT)
case("text mask floats", "attach", both(text_ok, put("t_mask.npy", np.ones((3, 2), F32))), "t_mask.npy|float32", "", TXT)
case("text mask of nothing", "attach", both(text_ok, put("t_mask.npy", np.zeros((3, 2), bool))), "t_mask.npy|class0", "", TXT)
case("text unknown classes", "attach", nothing, "class0", "", TXT.replace("t.npy", "minilm"))
case("text model absent", "attach", nothing, "--text nosuch", "", TXT.replace("t.npy", "nosuch/model"))
DIF = "--data data --difficulty d.npy --per-class 2 --text none --judge none --out out"
for name, damage, words in (("absent", nothing, "no such file"), ("NaN", put("d.npy", np.full(27, np.nan)), "row 0"),
        ("too few", put("d.npy", np.ones(26)), "(26,)"),
                            ("overflows float32", put("d.npy", np.full(27, 1e300)), "row 0"), ("labels", swap("d.npy", "data/labels.npy"), "int64"),
                            ("pickled", bomb_npy("d.npy"), "")):
    case(f"difficulty {name}", "attach", damage, f"d.npy|{words}", "", DIF)
case("difficulty of another data set", "attach", holds("attach/attach.args.json", "inputs", "data", "0" * 64), "difficulty.npy|another data set", "",
    DIF.replace("d.npy", "attach/difficulty.npy"))
case("difficulty with a record that is a list", "attach", put("attach/attach.args.json", []), "attach.args.json", "", DIF.replace("d.npy", "attach/difficulty.npy"))
case("per-class too many", "attach", nothing, "--per-class 9|8", "--per-class 9")
case("out of prune", "attach", nothing, "prune", "--out prune")
case("judge weights absent", "attach", nothing, "nosuch.pt", "--judge scratch --judge-weights nosuch.pt")
case("judge weights a folder", "attach", nothing, "data", "--judge scratch --judge-weights data")
case("visual weights damaged", "attach", both(good, cut("c.pt")), "c.pt", "--visual ddae --visual-weights c.pt")
case("visual weights of another size", "attach", nothing, "run/step_0000002.pt|again", "",
    "--data again --select all --visual ddae --visual-weights run/step_0000002.pt --judge none --text none --out out")

# ---- the attach folder that train reads
ATT = COMMANDS["train"] + " --attach attach"
for name, damage, words in (
        ("absent", gone("attach"), "attach"), ("a file", both(gone("attach"), put("attach", "x")), "attach"),
        ("without a record", gone("attach/attach.args.json"), "attach.args.json"),
        ("record a list", put("attach/attach.args.json", []), "attach.args.json"),
        ("record without inputs", lacks("attach/attach.args.json", "inputs"), "attach.args.json"),
        ("record inputs a list", holds("attach/attach.args.json", "inputs", []), "attach.args.json"),
        ("of another data set", holds("attach/attach.args.json", "inputs", "data", "0"), "another data set"),
        ("without keep", gone("attach/keep.npy"), "attach/keep.npy"), ("other keep", put("attach/keep.npy", lambda: np.arange(27)), "visual.npy"),
        ("text cut", cut("attach/text.npy"), "attach/text.npy"),
        ("text of other classes", put("attach/text.npy", np.ones((4, 2, 5), np.float16)), "attach/text.npy"),
        ("text NaN", put("attach/text.npy", np.full((3, 2, 5), np.nan, np.float16)), "attach/text.npy"),
        ("text of no token", put("attach/text.npy", np.ones((3, 0, 5), np.float16)), "attach/text"),
        ("text integers", put("attach/text.npy", np.ones((3, 2, 5), I64)), "attach/text.npy"), ("mask absent", gone("attach/text_mask.npy"), "attach/text_mask.npy"),
        ("mask of another shape", put("attach/text_mask.npy", np.ones((3, 1), bool)), "attach/text_mask.npy"),
        ("visual cut", cut("attach/visual.npy"), "attach/visual.npy"),
        ("visual integers", put("attach/visual.npy", np.ones((6, 2, 16, 64), I64)), "attach/visual.npy"),
        ("visual one short", change("attach/visual.npy", lambda v: v[:-1]), "attach/visual.npy"),
        ("visual flat", change("attach/visual.npy", lambda v: v.reshape(6, -1)), "attach/visual.npy"),
        ("visual of three orientations", change("attach/visual.npy", lambda v: v[:, [0, 1, 1]]), "attach/visual.npy"),
        ("visual not square", change("attach/visual.npy", lambda v: v[:, :, :3]), "attach/visual.npy"),
        ("visual of no token", change("attach/visual.npy", lambda v: v[:, :, :0]), "attach/visual.npy"),
        ("visual of no width", change("attach/visual.npy", lambda v: v[..., :0]), "attach/visual.npy"),
        ("visual NaN", change("attach/visual.npy", lambda v: v * np.float16("nan")), "attach/visual.npy"),
        ("visual scalar", put("attach/visual.npy", np.array(1.0)), "attach/visual.npy"), ("visual pickled", bomb_npy("attach/visual.npy"), "attach/visual.npy"),
        ("visual unmirrored", change("attach/visual.npy", lambda v: v[:, 0]), "--flips")):
    case(f"attach {name}", "train", damage, words, "", ATT)
case("attach and other indices", "train", put("keep.npy", np.arange(27)), "keep.npy", "--indices keep.npy", ATT)

# ---- sample
for name, damage, words in (("absent", nothing, "no such file"), ("too few", put("y.npy", np.zeros(3, I64)), "(3,)"),
        ("out of range", put("y.npy", np.full(4, 4)), "4..4"), ("negative", put("y.npy", np.full(4, -1)), "-1"),
                            ("floats", put("y.npy", np.zeros(4)), "float64"), ("pickled", bomb_npy("y.npy"), ""),
                            ("a checkpoint", swap("y.npy", "run/step_0000002.pt"), "")):
    case(f"labels {name}", "sample", damage, f"y.npy|{words}", "--labels y.npy")
case("labels a typing error", "sample", nothing, "blanced", "--labels blanced")
case("sampler of the other process", "sample", nothing, "--sampler ddim", "--sampler ddim")
case("guidance interval turned round", "sample", nothing, "--cfg-interval", "--cfg-interval 0.9 0.1")
case("more samples than the disk holds", "sample", nothing, "out|disk", "--num 1000000000000")
case("more random labels than the disk holds", "sample", nothing, "out|disk", "--num 1000000000000 --labels random")

# ---- evaluate
case("run absent", "evaluate", gone("run"), "run/samples.npy")
case("run a file", "evaluate", both(gone("run"), put("run", "x")), "run/samples.npy")
for name, damage in (("absent", gone("run/samples.npy")), ("cut", cut("run/samples.npy")), ("floats", change("run/samples.npy", lambda x: x / 255.0)),
        ("empty", put("run/samples.npy", b"")),
                     ("one", put("run/samples.npy", np.zeros((1, 8, 8, 1), U8))), ("none", put("run/samples.npy", np.zeros((0, 8, 8, 1), U8))),
                     ("pickled", bomb_npy("run/samples.npy")),
                     ("of another size", put("run/samples.npy", np.zeros((12, 4, 4, 1), U8))),
                     ("of two channels", put("run/samples.npy", np.zeros((12, 8, 8, 2), U8))), ("a folder", folder("run/samples.npy"))):
    case(f"samples {name}", "evaluate", both(damage, change("run/sample_labels.npy", lambda y: y[:1]) if name == "one" else change("run/sample_labels.npy",
        lambda y: y[:0]) if name == "none" else nothing),
         "run/samples.npy")
case("sample labels too few", "evaluate", change("run/sample_labels.npy", lambda y: y[:-1]), "run/sample_labels.npy")
case("sample labels floats", "evaluate", change("run/sample_labels.npy", lambda y: y * 1.0), "run/sample_labels.npy")
case("samples of another data set", "evaluate", nothing, "run|tiny|other", instead="--data other --runs run --encoder pixels")
for file in ("sample", "train"):
    for name, damage in (("a list", put(f"run/{file}.args.json", [])), ("empty", put(f"run/{file}.args.json", b"")),
        ("without args", lacks(f"run/{file}.args.json", "args")), ("args a list", holds(f"run/{file}.args.json", "args", []))):
        case(f"{file} record {name}", "evaluate", damage, f"run/{file}.args.json")
case("sample record without cfg", "evaluate", lacks("run/sample.args.json", "args", "cfg"), "run/sample.args.json|cfg")
case("sample record without seconds", "evaluate", lacks("run/sample.args.json", "seconds"), "run/sample.args.json|seconds")
case("sample record unfinished", "evaluate", holds("run/sample.args.json", "seconds", None), "run|sample.py")
case("metrics a list", "evaluate report", put("run/metrics.json", [1]), "run/metrics.json")
case("metrics empty", "evaluate report", put("run/metrics.json", b""), "run/metrics.json")
case("metrics without encoders", "evaluate report", lacks("run/metrics.json", "encoders"), "run/metrics.json|encoders")
case("metrics encoders a list", "evaluate report", holds("run/metrics.json", "encoders", []), "run/metrics.json|encoders")
case("kept set gone", "evaluate", gone("prune/keep.npy"), "prune/keep.npy", instead="--data data --runs small --encoder pixels --overwrite")
case("kept set changed", "evaluate", put("prune/keep.npy", np.arange(3)), "prune/keep.npy", instead="--data data --runs small --encoder pixels --overwrite")
case("record of the kept set a list", "evaluate", put("prune/prune.args.json", []), "prune/prune.args.json",
    instead="--data data --runs small --encoder pixels --overwrite")
case("trajectory without checkpoints", "evaluate", gone("run/step_0000001.pt"), "", instead="--data data --runs small --encoder pixels --trajectory")
case("trajectory of a damaged checkpoint", "evaluate", cut("run/step_0000001.pt"), "step_0000001.pt", "--trajectory")
case("trajectory of a checkpoint without seconds", "evaluate", lacks("run/step_0000001.pt", "seconds"), "step_0000001.pt|seconds", "--trajectory")
case("trajectory of a wrong weight", "evaluate", holds("run/step_0000001.pt", "ema", "x_embedder.proj.weight", torch.ones(2)),
    "step_0000001.pt|x_embedder", "--trajectory")
for key, value in (("none", None), ("a list", [1]), ("of text settings", {"settings": "x"})):
    case(f"trajectory key {key}", "report", holds("run/trajectory.json", "key", value), "run/trajectory.json")
case("trajectory.json a list", "evaluate", put("run/trajectory.json", []), "trajectory.json", instead="--data data --runs run --encoder pixels --trajectory")
case("checkpoint with a strange name", "evaluate", swap("run/step_x.pt", "run/step_0000002.pt"), "step_x.pt", "--trajectory")
ST = "--reference-stats s.npz"
for name, damage, words in (
        ("absent", nothing, "no such file"), ("empty", put("s.npz", b""), ""), ("cut", both(swap("s.npz", "stats.npz"), cut("s.npz")), ""),
        ("an array", swap("s.npz", "features.npy"), ""),
        ("other names", swap("s.npz", "set.npz"), "mu"), ("NaN", both(swap("s.npz", "stats.npz"), holds("s.npz", "mu", np.full(26, np.nan))), "NaN"),
        ("integers", both(swap("s.npz", "stats.npz"), holds("s.npz", "mu", np.zeros(26, I64))), "int64"),
        ("not square", both(swap("s.npz", "stats.npz"), holds("s.npz", "sigma", np.zeros((26, 3)))), "(26, 3)"),
        ("of another width", both(swap("s.npz", "stats.npz"), holds("s.npz", "mu", np.zeros(5)), holds("s.npz", "sigma", np.eye(5))), "5"),
        ("not symmetric", both(swap("s.npz", "stats.npz"), holds("s.npz", "sigma", np.triu(np.ones((26, 26))))), "symmetric"),
        ("negative", both(swap("s.npz", "stats.npz"), holds("s.npz", "sigma", -np.eye(26))), "sigma"),
        ("too large", npz_claim("s.npz", mu=((2**40,), "<f8"), sigma=((2**20, 2**20), "<f8")), "memory"),
        ("pickled", lambda: np.savez(fresh("s.npz"), mu=np.array([Bomb()], object), sigma=np.eye(1)), ""),
        ("a folder", folder("s.npz"), "")):
    case(f"reference statistics {name}", "evaluate", damage, f"s.npz|{words}", ST)
SAM = "--data data --samples {} --out out --encoder pixels"
for name, file, damage, words in (
        ("absent", "x.npy", nothing, ""), ("npz cut", "samples.npz", cut("samples.npz"), ""), ("npz of other names", "stats.npz", nothing, ""),
        ("npz pickled", "x.npz", lambda: np.savez(fresh("x.npz"), arr_0=np.array([Bomb()], object)), ""),
        ("npz too large", "x.npz", npz_claim("x.npz", arr_0=((2**40, 8, 8, 1), "|u1")), "memory"),
        ("npz labels of another number", "samples.npz", holds("samples.npz", "arr_1", np.zeros(3, I64)), "labels"),
        ("npz labels floats", "samples.npz", change("samples.npz", lambda z: z.update(arr_1=z["arr_1"] * 1.0)), "labels"),
        ("npz floats", "samples.npz", change("samples.npz", lambda z: z.update(arr_0=z["arr_0"] / 255)), "float64"),
        ("a picture", "pictures/a/0.png", nothing, ""), ("a checkpoint", "run/step_0000002.pt", nothing, ""), ("text", "data/classes.txt", nothing, ""),
        ("an empty folder", "x", folder("x"), ""), ("a folder with a damaged picture", "pictures", cut("pictures/a/0.png"), "pictures/a/0.png"),
        ("a folder with pictures of two sizes", "pictures", lambda: Image.new("L", (4, 4)).save(fresh("pictures/b/1.png")), "pictures/b/1.png"),
        ("a folder with a bomb", "pictures", png_bomb("pictures/a/0.png"), "pictures/a/0.png"),
        ("a folder with a smaller bomb", "pictures", png_bomb("pictures/a/0.png", 11_000), "pictures/a/0.png"),
        ("a folder with text as a picture", "pictures", put("pictures/a/0.png", "x"), "pictures/a/0.png"),
        ("a folder with float pictures", "pictures", lambda: Image.fromarray(np.ones((8, 8), F32)).save(fresh("pictures/a/0.tif")), "pictures/a/0.tif"),
        ("a folder with 16 bits", "pictures", lambda: Image.fromarray(np.full((8, 8), 4_000, np.uint16)).save(fresh("pictures/a/0.png")), "16 bits")):
    case(f"samples given {name}", "evaluate", damage, f"{file}|{words}", "", SAM.format(file))
case("num beyond the samples", "evaluate", nothing, "--num 13", "--num 13")
case("num of one sample", "evaluate", nothing, "run/samples.npy", "--num 1")
case("encoder weights damaged", "evaluate", both(good, cut("c.pt")), "c.pt", "", COMMANDS["evaluate"].replace("pixels", "ddae --encoder-weights c.pt"))
case("encoder weights for pixels", "evaluate", nothing, "pixels", "--encoder-weights run/step_0000002.pt")
case("out is a file", "evaluate", nothing, "set.npz", "", SAM.format("samples.npz").replace("--out out", "--out set.npz"))
case("test images of one class", "evaluate", both(change("data/test_labels.npy", lambda y: y * 0 + 7)), "data/test_labels.npy")

# ---- report
case("run absent", "report", gone("run"), "run/metrics.json")
case("run a file", "report", both(gone("run"), put("run", "x")), "run")
case("run without train record", "report", gone("run/train.args.json"), "run|train.args.json")
case("run unfinished", "report", holds("run/train.args.json", "seconds", None), "run|train.args.json")
case("train record a list", "report", put("run/train.args.json", []), "run/train.args.json")
case("samples absent", "report", gone("run/samples.npy"), "run/samples.npy")
case("samples cut", "report", cut("run/samples.npy"), "run/samples.npy")
case("samples pickled", "report", bomb_npy("run/samples.npy"), "run/samples.npy")
case("samples flat", "report", put("run/samples.npy", np.zeros(5, U8)), "run/samples.npy")
case("samples of floats", "report", put("run/samples.npy", np.zeros((12, 8, 8, 1))), "run/samples.npy")
case("nearest.png cut", "report", cut("small/nearest.png"), "small/nearest.png")
case("nearest.png text", "report", put("small/nearest.png", "x"), "small/nearest.png")
case("nearest.png a bomb", "report", png_bomb("small/nearest.png"), "small/nearest.png|bomb")
case("nearest.png a smaller bomb", "report", png_bomb("small/nearest.png", 11_000), "small/nearest.png|bomb")
case("runs of other data sets", "report", holds("run/metrics.json", "data", "else"), "run|small|data sets")
case("runs of other networks", "report", holds("run/metrics.json", "encoders", "pixels", "identity", "else"), "run|small|networks")
case("runs with other n", "report", holds("run/metrics.json", "encoders", "pixels", "n", 5), "run|small|numbers of samples")
case("encoder not measured", "report", nothing, "inception", "--encoder inception")
case("samples of another step", "report", holds("run/metrics.json", "protocol", "checkpoint_step", 99), "run|99")
case("kept set gone", "report", gone("prune/keep.npy"), "prune/keep.npy")
case("prune record a list", "report", put("prune/prune.args.json", []), "prune/prune.args.json")
case("prune record unfinished", "report", holds("prune/prune.args.json", "seconds", None), "prune.py")
case("reweight record without args", "report", lacks("reweight/reweight.args.json", "args"), "reweight/reweight.args.json|args")
case("reference network gone", "report", gone("run/step_0000002.pt"), "run/step_0000002.pt")
case("trajectory a list", "report", put("run/trajectory.json", []), "run/trajectory.json")
case("trajectory without points", "report", lacks("run/trajectory.json", "points"), "run/trajectory.json|points")
case("trajectory of no points", "report", holds("run/trajectory.json", "points", []), "run/trajectory.json|points")
case("trajectory points numbers", "report", holds("run/trajectory.json", "points", [1]), "run/trajectory.json")
case("trajectory point without fd", "report", lacks("run/trajectory.json", "points", 0, "fd"), "run/trajectory.json|fd")
for keys in (("protocol",), ("data",), ("encoders", "pixels", "fd"), ("encoders", "pixels", "n"), ("encoders", "pixels", "identity"),
        ("encoders", "pixels", "reference"), ("provenance",)):
    case(f"metrics without {keys[-1]}", "report", lacks("run/metrics.json", *keys), f"run/metrics.json|{keys[-1]}")
for keys, value in ((("protocol",), []), (("encoders",), {}), (("encoders", "pixels"), 3), (("encoders", "pixels", "fd"), "x"), (("encoders", "pixels",
    "fd"), None), (("encoders", "pixels", "per_class"), [1]), (("memorisation",), [1]),
                    (("memorisation",), {"pixels": 3}), (("encoders", "pixels", "kid"), 3), (("encoders", "pixels", "precision"), "high"), (("encoders",
                    "pixels", "recall"), True), (("provenance",), 3)):
    case(f"metrics {keys[-1]} {json.dumps(value)}", "report", holds("run/metrics.json", *keys, value), f"run/metrics.json|{keys[-1]}")
for keys in (("args",), ("images_seen",), ("train_seconds",), ("images_kept",), ("epochs",), ("args", "batch_size"), ("args", "lr"), ("args", "model")):
    case(f"train record without {keys[-1]}", "report", lacks("run/train.args.json", *keys), f"run/train.args.json|{keys[-1]}")
case("train record batch size zero", "report", holds("run/train.args.json", "args", "batch_size", 0), "run/train.args.json|batch_size")
case("train record images text", "report", holds("run/train.args.json", "images_seen", "x"), "run/train.args.json|images_seen")
case("out is a run", "report", nothing, "run", "", "run small --out run")
case("out is a file", "report", nothing, "set.npz", "", "run small --out set.npz")

# ---- data.py: sources
NPZ = "set.npz --out out"
for name, damage, words in (
        ("empty", put("set.npz", b""), ""), ("cut", cut("set.npz"), ""), ("an array", swap("set.npz", "data/images.npy"), ""),
        ("a checkpoint", swap("set.npz", "run/step_0000002.pt"), "images"), ("of other names", swap("set.npz", "stats.npz"), "images"),
        ("floats", change("set.npz", lambda z: z.update(images=z["images"] / 255)), "float64"),
        ("labels floats", change("set.npz", lambda z: z.update(labels=z["labels"] / 2)), "float64"),
        ("labels too few", change("set.npz", lambda z: z.update(labels=z["labels"][1:])), "(26,)"),
        ("labels out of range", change("set.npz", lambda z: z.update(labels=z["labels"] + 1)), "1..3"),
        ("labels negative", change("set.npz", lambda z: z.update(labels=z["labels"] - 1)), "-1..1"),
        ("labels with a gap", change("set.npz", lambda z: z.update(labels=z["labels"] * 2)), "0..4"),
        ("of no image", change("set.npz", lambda z: z.update(images=z["images"][:0], labels=z["labels"][:0])), "(0, 8, 8, 1)"),
        ("flat", change("set.npz", lambda z: z.update(images=z["images"].reshape(27, 64))), "(27, 64)"),
        ("four channels", change("set.npz", lambda z: z.update(images=z["images"].repeat(4, 3))), "(27, 8, 8, 4)"),
        ("pickled", lambda: np.savez(fresh("set.npz"), images=np.array([Bomb()], object)), "pickled"),
        ("too large", npz_claim("set.npz", images=((2**40, 8, 8, 1), "|u1")), "memory"),
        ("header larger than the member", lambda: zipfile.ZipFile(fresh("set.npz"), "w").writestr("images.npy", npy_header((2**40, 8, 8, 1))), "claims"),
        ("names too few", change("set.npz", lambda z: z.update(classes=np.array(["a"]))), "names"),
        ("names twice", change("set.npz", lambda z: z.update(classes=np.array(["a", "a", "b"]))), "names"),
        ("test without labels", change("set.npz", lambda z: z.update(test_images=z["images"])), "test_labels"),
        ("test of another size", change("set.npz", lambda z: z.update(test_images=z["images"][:, :4], test_labels=z["labels"])), "test_images"),
        ("test labels out of range", change("set.npz", lambda z: z.update(test_images=z["images"], test_labels=z["labels"] + 1)), "test_labels"),
        ("a folder of that name", folder("set.npz"), ""),
        ("one member a folder", lambda: zipfile.ZipFile(fresh("set.npz"), "w").writestr("images/", b""), "")):
    case(f"npz {name}", "data", damage, f"set.npz|{words}", "", NPZ)
PIC = "pictures --out out"
for name, damage, words, more in (
        ("cut", cut("pictures/a/2.png"), "pictures/a/2.png|--skip-bad", ""), ("text", put("pictures/a/2.png", "hello"), "pictures/a/2.png", ""),
        ("empty", put("pictures/a/2.png", b""), "pictures/a/2.png", ""),
        ("an array", swap("pictures/a/2.png", "data/images.npy"), "pictures/a/2.png", ""), ("pickled", bomb_raw("pictures/a/2.png"), "pictures/a/2.png", ""),
        ("of another size", lambda: Image.new("L", (4, 4)).save(fresh("pictures/b/1.png")), "pictures/b/1.png|--size", ""),
        ("a bomb", png_bomb("pictures/a/2.png"), "pictures/a/2.png|megapixels|--max-pixels", ""),
        ("a smaller bomb", png_bomb("pictures/a/2.png", 11_000), "pictures/a/2.png|megapixels|--max-pixels", "--size 8"),
        ("the first a bomb", png_bomb("pictures/a/0.png"), "pictures/a/0.png|megapixels|--max-pixels", ""),
        ("floats", lambda: Image.fromarray(np.ones((8, 8), F32)).save(fresh("pictures/a/2.tif")), "pictures/a/2.tif|float", ""),
        ("all bad", both(*(put(f"pictures/{'ab'[i % 2]}/{i}.png", "x") for i in range(6))), "pictures", ""),
        ("a class bad", both(*(put(f"pictures/a/{i}.png", "x") for i in (0, 2, 4))), "pictures|'a'", "--skip-bad"),
        ("an empty class", folder("pictures/c"), "pictures/c", ""),
        ("no image at all", both(gone("pictures"), put("pictures/readme.txt", "x")), "pictures", ""),
        ("an empty folder", both(gone("pictures"), folder("pictures")), "pictures", ""),
        ("splits of other classes", both(gone("pictures/a"), gone("pictures/b"), *(lambda path=f"pictures/{c}.png": Image.new("L", (8,
        8)).save(fresh(path)) for c in ("train/x/0", "test/y/0"))),
         "pictures/test", "")):
    case(f"pictures {name}", "data", damage, words, more, PIC)
case("source a word", "data", nothing, "digit|no such source", "", "digit --out out")
case("source of an unknown user", "data", nothing, "~nosuch/x", "", "~nosuch/x --out out")
case("source a checkpoint", "data", nothing, "run/step_0000002.pt", "", "run/step_0000002.pt --out out")
case("source an array", "data", nothing, "images.npy", "", "data/images.npy --out out")
case("out in the source", "data", nothing, "data/out", "", "data --out data/out")
case("out is the source", "data", nothing, "data", "", "data --out data --overwrite")
case("as-folder into a filled folder", "data", nothing, "run", "", "data --as-folder --out run")
case("files.txt too short", "data", put("data/files.txt", "a\n"), "data/files.txt")
case("files.txt not text", "data", put("data/files.txt", b"\xff" * 9), "data/files.txt")
case("files.txt a folder", "data", folder("data/files.txt"), "data/files.txt")
case("cifar10 damaged", "data", put("r/cifar-10-batches-py/data_batch_1", "x"), "cifar-10", "", "cifar10 --root r --out out")

# ---- where to write
WRITERS = "data prune reweight attach train sample report"
case("out a file", WRITERS, put("out", "x"), "out|a file stands|--out")
case("out below a file", WRITERS, put("f", "x"), "f/out", "--out f/out")
case("out in proc", WRITERS, nothing, "/proc/nosuch", "--out /proc/nosuch/out")
case("out a name too long", WRITERS, nothing, "x" * 60, "--out " + "x" * 300)
case("out a loop of links", WRITERS, lambda: os.symlink("out", "out"), "out|--out")
case("out a link to nothing", WRITERS, lambda: os.symlink("/nosuch/place", "out"), "out|a broken link stands|--out")
for script, file in (("prune", "keep.npy"), ("reweight", "weights.npy"), ("attach", "keep.npy"), ("train", "last.pt"), ("sample", "samples.npy"),
        ("data", "dataset.json")):
    case("out with somebody's file", script, put(f"out/{file}", "precious"), f"out|{file}")
for script, name in (("data", "again"), ("prune", "prune"), ("reweight", "reweight"), ("attach", "attach"), ("train", "run"), ("sample", "run")):
    line = {"data": "digits --size 4", "reweight": COMMANDS["reweight"],
        "train": COMMANDS["train"] + " --steps 2 --checkpoint-every 1 --schedule constant", "sample": COMMANDS["sample"] + " --num 12 --checkpoint run/last.pt",
            "attach": COMMANDS["attach"].replace("--text none", "--text text.npy") + " --flips"}.get(script, COMMANDS[script]) + f" --out {name}"
    for what, damage in (("a list", put(f"{name}/{script}.args.json", [])), ("empty", put(f"{name}/{script}.args.json", b"")),
        ("without args", lacks(f"{name}/{script}.args.json", "args")),
                         ("args a number", holds(f"{name}/{script}.args.json", "args", 3)),
                         ("without seconds", lacks(f"{name}/{script}.args.json", "seconds")), ("inputs a list", holds(f"{name}/{script}.args.json", "inputs", []))):
        case(f"own record {what}", script, damage, f"{script}.args.json", "", line)
    case("other arguments", script, nothing, f"{name}|--seed", "--seed 5", line)
GO_ON = COMMANDS["train"] + " --steps 3 --checkpoint-every 1 --schedule constant --out run"
for name, damage in (("cut", cut("run/last.pt")), ("a list", lambda: torch.save([], fresh("run/last.pt"))), ("without step", lacks("run/last.pt", "step")),
        ("step text", holds("run/last.pt", "step", "x")), ("a folder", folder("run/last.pt"))):
    case(f"going on from a checkpoint {name}", "train", damage, "run/last.pt", "", GO_ON)

# ---- flags that contradict each other or the data
for script, more, words in (
        ("prune", "--per-class 3", "--per-class"), ("prune", "--keep 1.5", "--keep"), ("prune", "--score nosuch", "--score"),
        ("prune", "--nosuch 3", "--nosuch"), ("prune", "--scores s.npy", "--scores"), ("attach", "--select all", "--per-class"),
        ("attach", "--interval 0", "--interval"), ("attach", "--interval wide", "--interval"), ("attach", "--prompt photo", "--prompt"),
        ("attach", "--judge ddae", "--judge-weights"), ("train", "--batch-size 5 --accumulate 2", "--batch-size"),
        ("train", "--dropout 1", "--dropout"), ("train", "--seed -1", "--seed"), ("reweight", "--burn-in 2", "--burn-in"),
        ("reweight", "--smoothing 1", "--smoothing"), ("sample", "--cfg 1e30", "--cfg"),
        ("sample", "--cfg-interval 0", "--cfg-interval"), ("evaluate", "--trajectory --samples x", "--samples"),
        ("evaluate", "--bootstrap 1e30", "--bootstrap"), ("data", "--size 65501", "--size"), ("data", "--workers 0", "--workers"),
        ("train", "--device nosuch", "nosuch"), ("sample", "--device mps", "mps"), ("prune", "--device cuda:99", "cuda:99"),
        ("train", "--batch-size 1099511627776", "--batch-size"), ("reweight", "--batch-size 1099511627776", "--batch-size"),
        ("reweight", "--permutations 1099511627776", "--permutations"), ("prune", "--el2n-epoch 1099511627776", "--el2n-epoch")):
    case(f"flags {more}", script, nothing, words, more)


@pytest.mark.parametrize("script, line, damage, words", CASES)
def test_bad_input(script, line, damage, words, world):
    damage()
    refused(script, line, *filter(None, words.split("|")))
    assert not Path("ran").exists(), "pickled code was run"


# ---------------------------------------------------------------------------------------------- flags
NUMBERS = {script: re.findall(r'add_argument\("(--[\w-]+)"[^\n]*type=(?:common\.(?:number|count|batch_type|seed_type)|interval_type)',
    (ROOT / f"{script}.py").read_text())
           for script in COMMANDS}
for script, flags in NUMBERS.items():                                 # common.add_run_flags adds --seed where it is told what is drawn
    if re.search(r"add_run_flags\([^)]*\bseed", (ROOT / f"{script}.py").read_text()):
        flags.append("--seed")


# Where nothing is a number like any other: no steps yet, none of it, as little as that.
ZERO = set("--steps --align --warmup --ema --label-drop --grad-clip --dropout --checkpoint-every --sample-every --eta --smoothing --burn-in --cfg --cfg-interval "
           "--bootstrap --seed --mask-ratio".split())


@pytest.mark.parametrize("script, flag", [(s, f) for s, flags in NUMBERS.items() for f in flags])
def test_absurd_numbers(script, flag, world):
    """Every flag that takes a number refuses what is none before anything is read or written."""
    before = snapshot(".")
    for value in ("", "nan", "inf", "-1", "1e999", "1e30", "abc", "1,5", "9" * 5000, "0x10", "None", *["0"] * (flag not in ZERO)):
        with pytest.raises(SystemExit) as e, contextlib.redirect_stderr(io.StringIO()) as err:
            run(script, [*COMMANDS[script].split(), f"{flag}={value}", *["0.5"] * (flag == "--cfg-interval")])
        assert e.value.code == 2 and flag in err.getvalue() and err.getvalue().count("\n") == 1 and "see --help" in err.getvalue()
    assert snapshot(".") == before


def test_number_flags_are_found():
    assert sum(map(len, NUMBERS.values())) >= 50 and {"--keep", "--per-class"} < set(NUMBERS["prune"]) and "--lr" in NUMBERS["train"]


PATHS = {"prune": "data out weights features scores", "reweight": "data indices reference out proxy-init",
    "attach": "data out reference difficulty indices text visual-weights judge-weights images",
         "train": "data out indices weights attach init", "sample": "checkpoint out labels vae export", "evaluate": "data samples out reference-stats runs encoder-weights",
    "data": "out root indices", "report": "out encoder"}


@pytest.mark.parametrize("script, flag", [(s, f"--{f}") for s, flags in PATHS.items() for f in flags.split()])
def test_an_empty_value_is_not_a_flag_left_out(script, flag, world):
    """--indices "$KEEP" with KEEP unset must not train on all images, nor --out "" write into the current folder."""
    for form in ([flag, ""], [f"{flag}="]):
        assert flag in refused(script, [*COMMANDS[script].split(), *form], "empty")


def test_an_empty_source_or_run(world):
    refused("data", ["", "--out", "out"], "empty")
    refused("report", ["run", "", "--out", "out"], "empty")


# ---------------------------------------------------------------------------------------------- what is strange, but legal
STRANGE = "Ordner mit Leer\u00e4 \u65e5\u672c \U0001f600 'q' -x;$(HOME)"


def test_paths_with_blanks_and_letters_of_all_kinds_work(world):
    """Every script once, each path below a folder whose name holds blanks, quotes, letters beyond ASCII and what a shell would expand."""
    top = Path(STRANGE)
    for name in ("data", "run", "small", "prune", "reweight", "attach", "pictures", "set.npz", "text.npy", "stats.npz"):
        Path(name).rename(top / name) if top.is_dir() else (top.mkdir(), Path(name).rename(top / name))
    p = lambda name: str(top / name)                                  # noqa: E731
    run("data", [p("pictures"), "--out", p("o/data")])
    run("data", [p("set.npz"), "--out", p("o/npz")])
    run("data", [p("data"), "--indices", p("prune/keep.npy"), "--as-folder", "--out", p("o/export")])
    run("prune", ["--data", p("data"), "--score", "gaussian", "--surrogate", "ddae", "--weights", p("run/step_0000002.pt"), "--keep", "0.5", "--out", p("o/prune")])
    run("reweight", ["--data", p("data"), "--reference", p("run/step_0000002.pt"), *"--steps 1 --burn-in 0 --batch-size 4 --out".split(), p("o/reweight")])
    run("attach", ["--data", p("data"), "--reference", p("run/step_0000002.pt"), *"--per-class 2 --judge none --text".split(), p("text.npy"), "--out",
        p("o/attach")])
    run("train", [*COMMANDS["train"].replace("--data data", "").replace("--out out", "").split(), "--data", p("data"), "--attach", p("o/attach"),
        "--weights", p("o/reweight/weights.npy"), "--out", p("o/run")])
    run("sample", ["--checkpoint", p("o/run/last.pt"), "--num", "12", "--steps", "1", "--out", p("o/run")])
    run("evaluate", ["--data", p("data"), "--runs", p("o/run"), "--encoder", "pixels", "--reference-stats", p("stats.npz")])
    run("report", [p("o/run"), "--out", p("o/report")])
    assert {f.name for f in (top / "o").glob("*/*.args.json")} == {f"{s}.args.json" for s in COMMANDS if s != "report"} and (top / "o/report/report.md").exists()
    assert len(list((top / "o/export").rglob("*.png"))) == len(np.load(p("prune/keep.npy")))


@pytest.mark.filterwarnings("ignore:Glyph")
def test_class_names_of_all_kinds_work(world):
    """Names out of files become folders, titles and rows of tables: none may lead out of the folder or stop a picture."""
    names = ["../../up", "a/b $x_{1}$ <&|", "\u65e5\u672c \U0001f600 \\ "]
    put("data/classes.txt", "\n".join(names) + "\n")()
    run("data", "data --as-folder --out out/export")
    run("prune", "--data data --score random --keep 0.5 --out out/prune")
    run("attach", "--data data --difficulty difficulty.npy --per-class 2 --text none --judge none --out out/attach")
    run("train", COMMANDS["train"] + " --out out/run")
    assert len(list(Path("out/export").rglob("*.png"))) == 27 + 12 and not Path("up").exists()


@pytest.mark.parametrize("script", "data prune attach train evaluate".split())
def test_one_class_works(script, world):
    both(*(change(f"data/{p}labels.npy", lambda y: y * 0) for p in ("", "test_")), put("data/classes.txt", "only\n"), holds("data/dataset.json", "sha256", "1"))()
    if script == "evaluate":
        run("evaluate", "--data data --samples samples.npz --out out --encoder pixels")
    elif script == "attach":
        run("attach", "--data data --difficulty difficulty.npy --per-class 2 --text none --judge none --out out")
    else:
        run(script, COMMANDS[script])
    assert list(Path("out").glob(f"{script}.args.json"))


def test_one_image_works_or_says_why(world):
    both(*(change(f"data/{n}.npy", lambda x: x[:1] * (n == "images")) for n in ("images", "labels")), put("data/classes.txt", "only\n"),
        gone("data/test_images.npy"), gone("data/test_labels.npy"),
         holds("data/dataset.json", "sha256", "1"))()
    run("data", "data --out out/data")
    for score in ("random", "gaussian", "moderate", "kcenter", "herding", "cluster"):
        put("f.npy", np.ones((1, 4), F32))()
        run("prune", f"--data data --score {score} --keep 0.1 --out out/{score} " + "--features f.npy" * (score != "random"))
        assert np.load(f"out/{score}/keep.npy").tolist() == [0]
    run("train", COMMANDS["train"].replace("--out out", "--indices out/random/keep.npy --out out/run"))
    run("sample", "--checkpoint out/run/last.pt --num 1 --steps 1 --out out/run")
    refused("evaluate", "--data data --runs out/run --encoder pixels", "samples.npy", "at least 2")
    put("d.npy", np.ones(1))()
    run("attach", "--data data --difficulty d.npy --per-class 1 --text none --judge none --out out/attach")
    refused("reweight", "--data data --reference out/run/last.pt --steps 2 --burn-in 0 --out out/reweight", "one class")
    refused("prune", "--data data --score el2n --keep 1 --out out/el2n", "one class")


def test_an_output_folder_may_be_the_data_folder_where_nothing_is_lost(world):
    """prune and sample write beside the arrays; the arrays stay as they are."""
    before = {k: v for k, v in snapshot("data", content=True).items()}
    run("prune", COMMANDS["prune"] + " --out data")
    run("sample", COMMANDS["sample"] + " --out data")
    after = snapshot("data", content=True)
    assert {k: after[k] for k in before} == before


# ---------------------------------------------------------------------------------------------- failures in the middle
def test_a_first_call_that_fails_late_leaves_nothing(world):
    """The start weights fit no network of this run: found after the folder was made. It goes, with the folders above it that were made for it."""
    refused("train", COMMANDS["train"] + " --init run/step_0000002.pt --model unet-tiny --out deep/er/out", "run/step_0000002.pt")
    Path("mine").mkdir()
    refused("train", COMMANDS["train"] + " --init run/step_0000002.pt --model unet-tiny --out mine", "run/step_0000002.pt")


def test_a_call_that_fails_after_its_first_output_can_be_resumed(world):
    def call(n, part=None, outputs=("x.npy",)):
        args = argparse.Namespace(n=n, out="new/out", overwrite=False)
        with common.Stage("toy", args, outputs=outputs) as stage:
            if part:
                Path("new/out", part).write_text("x")
            if not stage.resuming:
                raise common.UserError("later")
            return Path("new/out/toy.args.json").read_text()
    for first in (True, False):                                       # a new folder, then one that holds something
        with pytest.raises(common.UserError, match="later"):
            call(1, "x.part.npy" if first else "x.npy")
        assert '"n": 1' in call(1)
        with pytest.raises(common.UserError, match="--n = 1, now 9"):
            call(9)                                                   # what stands is bound to its arguments
        for file in Path("new/out").glob("x.*"):
            file.unlink()
    with pytest.raises(common.UserError, match="later"):
        call(9)                                                       # nothing but the record stands, and that binds nobody
    assert not list(Path("new/out").iterdir())


@pytest.mark.parametrize("error, words", [
    (MemoryError("Unable to allocate 8 TiB"), "not enough memory|smaller batch"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), "not enough memory"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "not enough memory|smaller batch"), (OSError(errno.ENOSPC, "No space left on device",
    "out/x.npy"), "out/x.npy|make room"),
    (OSError(errno.EACCES, "Permission denied", "f"), "f: Permission denied|rights"), (IsADirectoryError(errno.EISDIR, "Is a directory", "f"),
    "f: Is a directory|mend")])
def test_machine_errors_are_one_line(error, words, world, monkeypatch):
    def fail(*_, **__):
        raise error
    monkeypatch.setattr(importlib.import_module("train"), "make_process", fail)
    refused("train", COMMANDS["train"], *words.split("|"))


@pytest.mark.parametrize("error", [KeyError("typo"), TypeError("x"), ValueError("x"), AttributeError("x"), IndexError("x"),
    RuntimeError("The size of tensor a (4) must match"), OSError("no file name: a bug"), StopIteration()])
def test_programming_errors_are_not_hidden(error, world, monkeypatch):
    def fail(*_, **__):
        raise error
    monkeypatch.setattr(importlib.import_module("train"), "make_process", fail)
    with pytest.raises(type(error)):
        run("train", COMMANDS["train"])


# ---------------------------------------------------------------------------------------------- from the shell
SHELL = {"data": "nosuch --out out", "prune": "--data pictures --score random --keep 0.5 --out out", "reweight": "--data data --reference set.npz --out out",
         "attach": "--data set.npz --select all --out out",
         "train": "--data data --indices data/images.npy --out out", "sample": "--checkpoint data/images.npy --out out",
         "evaluate": "--data data --runs pictures", "report": "prune --out out"}
FORK = """import os, runpy, sys, torch                                       # torch is imported once, then each script runs as a process of its own
for line in sys.stdin.read().splitlines():
    path, *argv = line.split()
    if (child := os.fork()) == 0:
        sys.argv, name = [path, *argv], os.path.basename(path)
        for stream, end in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{name}.{end}", os.O_WRONLY | os.O_CREAT), stream)
        runpy.run_path(path, run_name="__main__")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_from_the_shell(world):
    """Each script as a process: exit code, one line on stderr, nothing on stdout."""
    lines = "".join(f"{ROOT / s}.py {line}\n" for s, line in SHELL.items())
    done = subprocess.run([sys.executable, "-c", FORK], input=lines, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["2"] * len(COMMANDS), done.stdout + done.stderr
    for s in COMMANDS:
        err = Path(f"{s}.py.err").read_text()
        assert err.startswith(f"{s}.py: error: ") and err.count("\n") == 1 and "Traceback" not in err and REMEDY.search(err), err
        assert Path(f"{s}.py.out").read_text() == ""
    assert not Path("out").exists()


# ---------------------------------------------------------------------------------------------- random damage to every reader
def damaged(b, rng):
    """The bytes cut off, some of them replaced, a part doubled or removed."""
    b, n = bytearray(b), len(b)
    kind, i, j = rng.integers(4), *sorted(rng.integers(0, n, 2))
    if kind == 0:
        return bytes(b[:i])
    if kind == 1:
        head = min(n, 400) if rng.random() < 0.7 else n               # most of what can go wrong stands in front
        for k in rng.integers(0, head, rng.integers(1, 9)):
            b[k] = rng.integers(256)
        return bytes(b)
    return bytes(b[:j] + b[i:]) if kind == 2 else bytes(b[:i] + b[j:])


def load_images_of(path):
    """data.py's reader of one picture, as its workers call it: faults come back as text."""
    return common.pixels.decode_images([Path(path)], (8, 8, 3), 8, skip_bad=True)


READ = {
    "load_npy": ("prune/keep.npy", lambda p: np.array(common.load_npy(p, "indices", (None,), "iu"))), "load_indices": ("prune/keep.npy",
    lambda p: common.load_indices(p, 27)),
    "load_pt": ("run/step_0000001.pt", common.load_pt), "open_checkpoint": ("run/step_0000001.pt", common.open_checkpoint),
    "load_json": ("data/dataset.json", lambda p: common.load_json(p, "x")), "load_record": ("prune/prune.args.json", common.load_record),
    "read_npz": ("set.npz", common.sources.read_npz), "read_samples": ("samples.npz", evaluate.read_samples), "read_samples of .npy": ("run/samples.npy",
    lambda p: np.array(evaluate.read_samples(p)[0])),
    "read_statistics": ("stats.npz", evaluate.read_statistics), "read_image": ("pictures/a/0.png", load_images_of), "read_folder": ("pictures/a/0.png",
    lambda p: evaluate.read_samples(Path(p).parent)),
    "open_data": ("data/labels.npy", lambda p: common.open_data("data")), "classes.txt": ("data/classes.txt", lambda p: common.open_data("data")),
}


@pytest.mark.parametrize("reader", READ)
def test_random_damage_is_a_user_error_or_harmless(reader, world):
    path, read = READ[reader]
    whole, rng, refusals = Path(path).read_bytes(), np.random.default_rng(zlib.crc32(reader.encode())), 0
    read(path)
    for _ in range(30):
        put(path, damaged(whole, rng))()
        try:
            read(path)
        except common.UserError as e:
            refusals += 1
            assert path.split("/")[0] in str(e)
    assert refusals >= 8 or reader in ("read_image", "classes.txt")   # the damage is damage
