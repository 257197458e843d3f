"""Stage 0: a data set becomes a data folder of plain arrays, which every other stage reads.

SOURCE  digits     1 797 real 8x8 handwritten digits, embedded (data/digits.npz): 1 500 for training, 150 of each class, and 297 held out
        cifar10    torchvision's copy, read from --root or downloaded into it
        FOLDER     images in class sub-folders, at any depth below them; or without sub-folders: one class. When train/ is there and nothing else
                   but test/ (or val/), these are the splits. Labels follow the natural order of the class names, or a classes.txt at the top.
                   Transparent pixels become white, 16 bits become 8, EXIF rotation is applied; one channel only if every image is grey.
                   (A folder called digits or cifar10: write ./digits.) A folder is known by its path: after a change to it use --overwrite.
        FILE.npz   images uint8 (N, H, W) or (N, H, W, C); labels; classes; test_images, test_labels (all but images optional); or ADM's arr_0, arr_1
        DATA       a data folder made earlier, to export a part of it or another size
--size S resizes and centre-crops as ADM does (Dhariwal & Nichol 2021, and as DiT and SiT take it over).
--vae V  adds the latents of a VAE (an AutoencoderKL of diffusers, by name or folder): the posterior's mean and std of every image, unscaled, from
         which train.py draws anew in every step. --latents-only stores no pixels: images are decoded, cropped, encoded and forgotten, the held-out
         split is left out. torchrun shares the encoding out; rank 0 alone does the rest while the others wait. To resume: the same command again.
         What needs pixels of a kept subset later (attach.py --images) gets them from the same source: --indices keep.npy --out D.

Writes  OUT/images.npy uint8 (N, H, W, C), order of the source kept;  labels.npy int64 (N,);  classes.txt, files.txt;  dataset.json;  preview.png;
        OUT/test_images.npy, test_labels.npy where a split is held out.
        With --vae: OUT/latents.npy float16 (N, 2c, h, w), mean and std;  latents.json: VAE, scale, mean and std of the scaled draws, sha256
        With --as-folder: OUT/CLASS/INDEX.png instead; OUT/train/... and OUT/test/... where a split is held out.

    python data.py cifar10 --out data/cifar10
    python data.py ~/photos --size 64 --out data/photos
    torchrun --nproc_per_node 8 data.py ~/imagenet --size 256 --vae stabilityai/sd-vae-ft-ema --latents-only --batch-size 512 --out data/imagenet
    python data.py data/cifar10 --indices runs/cifar10/pruned/prune/keep.npy --as-folder --out export/cifar10_pruned
"""
import contextlib
import functools
import hashlib
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import common
from common import UserError

# data/digits.npz (UCI ML repository, Alpaydin & Kaynak 1998, CC BY 4.0) was made once with these lines:
#   d = sklearn.datasets.load_digits(); images = np.rint(d.images * 255 / 16).astype(np.uint8); rng = np.random.default_rng(0)
#   train = np.sort(np.concatenate([rng.permutation(np.flatnonzero(d.target == k))[:150] for k in range(10)]))
#   test = np.setdiff1d(np.arange(len(images)), train)
#   np.savez_compressed("data/digits.npz", images=images[train], labels=d.target[train], test_images=images[test], test_labels=d.target[test])
DIGITS = Path(__file__).resolve().parent / "data" / "digits.npz"
DIGIT_NAMES = "zero one two three four five six seven eight nine".split()
GREY = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"}    # Pillow's modes without colour
SPLITS = ("", "test_")                                                # prefixes of the arrays of the training and the held-out split


# ---- one image
def adm_crop(image, size):
    """The size x size centre of a PIL image whose shorter side is brought to `size`: box halving while it is twice too large, then bicubic."""
    from PIL import Image
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    x, y = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((x, y, x + size, y + size))


def read_image(source, size=None):
    """One image as uint8 RGB (H, W, 3), and whether it was stored grey. source: a file, or a uint8 array (H, W, 1 or 3)."""
    from PIL import Image, ImageOps
    image = Image.open(source) if isinstance(source, Path) else Image.fromarray(source[..., 0] if source.shape[2] == 1 else source)
    with image:
        ImageOps.exif_transpose(image, in_place=True)
        grey = image.mode in GREY
        if image.mode.startswith("I"):                                # 16 bits, in Pillow's mode I too; convert("L") would clip at 255
            v = np.asarray(image).astype(np.int64).clip(0, 65535)
            image = Image.fromarray(((v + 128) // 257).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("float pixels, whose range is not known; save it with 8 or 16 bits")
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        return np.asarray(adm_crop(image, size) if size else image), grey


# ---- many images, in parallel
def decode_chunk(job, file, size):
    """Write images job = (first row, list of images) into the .npy at `file`. Returns ({row: fault}, {row: other (H, W)}, all of them grey)."""
    first, images = job
    out, faults, other, all_grey = np.load(file, mmap_mode="r+"), {}, {}, True
    with common.no_bombs():
        for row, image in enumerate(images, first):
            try:
                pixels, grey = read_image(image, size)
            except Exception as e:                                    # on damaged files Pillow's plugins raise a dozen kinds
                faults[row] = f"{type(e).__name__}: {e}"
                continue
            if pixels.shape[:2] == out.shape[1:3]:
                out[row] = pixels[..., :out.shape[3]]
            else:
                other[row] = pixels.shape[:2]
            all_grey &= grey
    return faults, other, all_grey


def start_worker():
    """Signals belong to the main process; a worker whose main process was killed goes too, instead of waiting for ever."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def run_chunks(function, jobs, workers, what, total):
    """function(job) for each (first row, rows) job, in order, by `workers` processes, under a progress bar that counts rows."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    if workers == 1 or len(jobs) == 1:
        pool, results = None, map(function, jobs)
    else:                                                             # fork: a fresh interpreter would import torch again in every worker
        pool = ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("fork" if sys.platform == "linux" else None), start_worker)
        results = pool.map(function, jobs)
    try:
        with common.progress(total=total, desc=what, unit=" images", leave=False) as bar:
            for (_, rows), result in zip(jobs, results):
                yield result
                bar.update(len(rows))
    except BrokenProcessPool:
        raise UserError("a worker process was killed, most likely for want of memory; use fewer --workers")
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def chunks(rows, size=64):
    return [(lo, rows[lo:lo + size]) for lo in range(0, len(rows), size)]


def room(file, shape, dtype=np.uint8):
    """Refuse an array that the disk does not hold, and say beforehand when it is large."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size > shutil.disk_usage(Path(file).parent).free:
        raise UserError(f"{Path(file).parent}: {size / 1e9:.2f} GB needed for {shape[0]} x {shape[1:]} of {np.dtype(dtype)}, less is free; make room or "
                        "use a smaller --size")
    if size > 1e9:
        common.log(f"data.py: {size / 1e9:.1f} GB will be written to {Path(file).parent}")


def allocate(file, shape):
    """A uint8 .npy of zeros with its disk space reserved: writing to a memory map of a full disk would kill the process."""
    room(file, shape)
    common.allocate(file, np.uint8, shape)
    return np.load(file, mmap_mode="r+")


def fill(file, images, size, workers, skip_bad, what):
    """Write `images`, an array (N, H, W, C) or a list of files, to the .npy at `file`. Returns the readable rows, and whether all are grey."""
    n, is_array = len(images), isinstance(images, np.ndarray)
    if is_array and size in (None, *({images.shape[1]} & {images.shape[2]})):
        out = allocate(file, images.shape)
        for lo, rows in chunks(images, 4096):
            out[lo:lo + len(rows)] = rows
        return np.arange(n), images.shape[3] == 1
    shape, faults, grey = (size, size), {}, True
    for image in () if size else images:                              # the first readable image sets the size of all
        with contextlib.suppress(Exception):
            shape = read_image(image)[0].shape[:2]
            break
    else:
        if not size:
            raise UserError(f"{images[0].parent}: none of the {n} images is readable; mend or replace them")
    allocate(file, (n, *shape, images.shape[3] if is_array else 3))
    results = run_chunks(functools.partial(decode_chunk, file=file, size=size), chunks(images), workers, what, n)
    with contextlib.closing(results):                                 # an error below stops the workers at once
        for bad, other, all_grey in results:
            for row, (height, width) in other.items():
                raise UserError(f"{images[row]}: {width}x{height} pixels, but the first images have {shape[1]}x{shape[0]}; "
                                "give --size S to bring all to S x S")
            for row, fault in bad.items():
                if not skip_bad:
                    raise UserError(f"{images[row]}: unreadable image ({fault}); mend or remove it, or go on without such images: --skip-bad")
                common.log(f"data.py: skipped {images[row]} ({fault})")
            faults.update(bad)
            grey &= all_grey
    return np.array([row for row in range(n) if row not in faults], dtype=np.int64), grey


def rewrite(file, rows, channels):
    """Reduce the .npy at `file` to some rows and its first channels (grey images have three equal ones)."""
    old = np.load(file, mmap_mode="r")
    if (len(rows), channels) == (len(old), old.shape[3]):
        return
    with common.atomic(file) as smaller:
        new = allocate(smaller, (len(rows), *old.shape[1:3], channels))
        for lo, part in chunks(rows, 4096):
            new[lo:lo + len(part)] = old[part][..., :channels]


# ---- sources: namespace(classes, splits, meta)
def split_of(images, labels, files):
    return SimpleNamespace(images=images, labels=np.asarray(labels, dtype=np.int64), files=list(files))


def read_cifar10(root):
    """CIFAR-10 through torchvision, which compares the md5 of every batch before it unpickles anything."""
    import socket
    from torchvision.datasets import CIFAR10
    root = Path(root)
    if root.name == CIFAR10.base_folder:
        root = root.parent
    new = [p for p in (root, *root.parents) if not p.exists()]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)                                      # a network that swallows packets would hang for minutes
    try:
        train, test = CIFAR10(str(root), train=True, download=True), CIFAR10(str(root), train=False)
    except Exception as e:                                            # urllib, ssl, tarfile and torchvision each raise their own
        for p in new:
            with contextlib.suppress(OSError):
                p.rmdir()
        raise UserError(f"{root / CIFAR10.base_folder}: missing or damaged, and the download failed ({type(e).__name__}: {e}); put "
                        f"{CIFAR10.filename} from {CIFAR10.url} into {root}, or give --root DIR with {CIFAR10.base_folder} inside")
    finally:
        socket.setdefaulttimeout(timeout)
    splits = {prefix: split_of(d.data, d.targets, (f"{prefix}images[{i}]" for i in range(len(d.data)))) for prefix, d in zip(SPLITS, (train, test))}
    return SimpleNamespace(classes=list(train.classes), splits=splits, meta={})


def natural(name):
    """Sort key that puts image10 after image9."""
    return [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", name)], name


def printable(name):
    """One line of text: file names may hold line breaks or bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else "?" for c in name)


def visible(folder):
    return sorted((p for p in folder.iterdir() if not p.name.startswith((".", "__MACOSX"))), key=lambda p: natural(p.name))


def image_files(folder, suffixes):
    """All image files below `folder`, linked folders included, naturally sorted; and the number of files that are none."""
    found, others, seen = [], 0, {os.path.realpath(folder)}
    for path, folders, names in os.walk(folder, followlinks=True):
        real = {f: os.path.realpath(os.path.join(path, f)) for f in folders if not f.startswith(".")}
        folders[:] = [f for f in real if real[f] not in seen]         # a link to a folder above would lead round in circles
        seen.update(real.values())
        names = [n for n in names if not n.startswith(".")]
        images = [os.path.join(path, n) for n in names if os.path.splitext(n)[1].lower() in suffixes]
        found.extend(images)
        others += len(names) - len(images)
    return [Path(p) for p in sorted(found, key=natural)], others


def scan_folder(top):
    """A folder of images as a source: lists of files, nothing decoded."""
    from PIL import Image
    Image.init()
    suffixes = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    names = [p.name for p in visible(top) if p.is_dir()]
    roots = {"": top}
    if "train" in names and set(names) <= {"train", "test", "val"}:   # else "train" may well be a class
        roots = {"": top / "train"}
        if len(names) > 1:
            roots["test_"] = top / ("test" if "test" in names else "val")
    classes, order, splits, others = None, None, {}, 0
    if (top / "classes.txt").is_file():
        order = (top / "classes.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    for prefix, root in roots.items():
        folders = [p for p in visible(root) if p.is_dir()]
        loose = sum(p.suffix.lower() in suffixes for p in visible(root) if p.is_file()) if folders else 0
        if loose:
            common.log(f"data.py: warning: {loose} images lie in {root} itself, beside the class folders; they have no class and are left out")
        if prefix == "":
            classes = [p.name for p in folders] or None
            if order is not None and classes and sorted(order) != sorted(classes):
                common.log(f"data.py: note: {top / 'classes.txt'} does not name the class folders and is left out of account")
            elif classes:
                classes = order or classes
        elif bool(folders) != bool(classes) or {p.name for p in folders} - set(classes or ()):
            raise UserError(f"{root}: its class folders do not match those of {roots['']}; both need the same names")
        files, labels = [], []
        for k, folder in enumerate([root / c for c in classes] if classes else [root]):
            mine, rest = image_files(folder, suffixes) if folder.is_dir() else ([], 0)
            if not mine and (folder.is_dir() or not prefix):
                raise UserError(f"{folder}: no image in this {'class ' if classes else ''}folder; remove it or fill it")
            files += mine
            labels += [k] * len(mine)
            others += rest
        splits[prefix] = split_of(files, labels, (printable(str(f.relative_to(root))) for f in files))
    if others:
        common.log(f"data.py: {others} files without the suffix of an image format are left out")
    return SimpleNamespace(classes=[printable(c) for c in classes or ["image"]], splits=splits, meta={})


def read_npz(path):
    """An .npz as a source."""
    arrays = common.load_npz(path, ("images", "labels", "classes", "test_images", "test_labels", "arr_0", "arr_1"),
                             "an .npz of np.savez(path, images=..., labels=...) with images uint8 (N, H, W, C), or ADM's arr_0 and arr_1,")
    if "images" not in arrays:
        arrays = {**arrays, **{name: arrays[adm] for name, adm in (("images", "arr_0"), ("labels", "arr_1")) if adm in arrays}}
    if "images" not in arrays:
        raise UserError(f"{path}: holds {', '.join(arrays)}, but 'images' uint8 (N, H, W, C) is needed, or ADM's 'arr_0'")
    splits = {}
    for prefix in [p for p in SPLITS if f"{p}images" in arrays]:
        x, y = arrays[f"{prefix}images"], arrays.get(f"{prefix}labels")
        if x.dtype != np.uint8 or x.ndim not in (3, 4) or min(x.shape) == 0 or (x.ndim == 4 and x.shape[3] not in (1, 3)):
            raise UserError(f"{path}: {prefix}images is {x.dtype} {x.shape}, but must be uint8 (N, H, W) or (N, H, W, 1 or 3), values 0..255")
        if y is None and (prefix == "" or "labels" not in arrays):
            y = np.zeros(len(x), np.int64)
        if y is None or y.dtype.kind not in "iu" or y.shape not in ((len(x),), (len(x), 1)):
            held = "missing" if y is None else f"{y.dtype} {y.shape}"
            raise UserError(f"{path}: {prefix}labels is {held}, but must be integers ({len(x)},): one for each of the {prefix}images")
        splits[prefix] = split_of(x.reshape(*x.shape[:3], -1), y.reshape(-1), (f"{prefix}images[{i}]" for i in range(len(x))))
    train, test = splits[""], splits.get("test_")
    if test and test.images.shape[1:] != train.images.shape[1:]:
        raise UserError(f"{path}: test_images are {test.images.shape[1:]}, but images are {train.images.shape[1:]}; both must be alike")
    low, high = int(train.labels.min()), int(train.labels.max())
    if low < 0 or high >= len(train.labels) or (np.bincount(train.labels) == 0).any():
        raise UserError(f"{path}: labels run {low}..{high}, but must be 0..K-1 with at least one image of each class")
    if test and (test.labels.min() < 0 or test.labels.max() > high):
        raise UserError(f"{path}: test_labels run {test.labels.min()}..{test.labels.max()}, but must be among the labels, 0..{high}")
    classes = [printable(str(c)) for c in arrays["classes"].astype(str).ravel()] if "classes" in arrays else None
    if classes and (len(classes) != high + 1 or len(set(classes)) < len(classes)):
        raise UserError(f"{path}: {len(classes)} names in 'classes' for {high + 1} classes; there must be one each, all different")
    return SimpleNamespace(classes=classes or (["image"] if high == 0 else [str(k) for k in range(high + 1)]), splits=splits, meta={})


def open_pixels(folder):
    """common.open_data of a folder that has to hold pixels."""
    d = common.open_data(folder, pixels=False)
    if d.images is None:
        raise UserError(f"{folder}: holds latents only; take the source that it was made from, {d.info.get('source', 'see its dataset.json')}")
    return d


def read_data_folder(folder):
    """A data folder made earlier as a source."""
    d = open_pixels(folder)
    files = folder / "files.txt"
    names = common.load_lines(files) if files.exists() else [f"images[{i}]" for i in range(len(d.labels))]
    if len(names) != len(d.labels):
        raise UserError(f"{files}: {len(names)} names for {len(d.labels)} images; make the data folder again")
    splits = {"": split_of(d.images, d.labels, names)}
    if d.test_images is not None:
        splits["test_"] = split_of(d.test_images, d.test_labels, (f"test_images[{i}]" for i in range(len(d.test_labels))))
    return SimpleNamespace(classes=d.classes, splits=splits, meta={"parent": d.info["sha256"]})


def read_source(name, root):
    if name == "digits":
        source = read_npz(DIGITS)
        source.classes = list(DIGIT_NAMES)
        return source
    if name == "cifar10":
        return read_cifar10(root)
    return read_npz(name) if Path(name).is_file() else read_data_folder(Path(name)) if is_data_folder(name) else scan_folder(Path(name))


# ---- output
def content_sha256(images, labels, look=lambda rows: None):
    """Hex sha256 of "shape", then the pixels in C order, then the labels as little-endian int64: the same whatever wrote the files.

    look(rows) sees every chunk on the way, so that nothing large is read twice.
    """
    h = hashlib.sha256(str(tuple(map(int, images.shape))).encode())
    for _, rows in chunks(images, 1024):
        h.update(np.ascontiguousarray(rows))
        look(rows)
    h.update(labels.astype("<i8"))
    return h.hexdigest()


def preview(images, labels, num_classes, seed, rows=10, columns=10):
    """A PIL picture with one row per class (ten classes at most, spread evenly), images drawn by the seed."""
    from PIL import Image
    rng, side = np.random.default_rng(seed), min(128, max(64, max(images.shape[1:3])))
    shown = np.unique(np.linspace(0, num_classes - 1, min(rows, num_classes)).round().astype(int))
    sheet = Image.new("RGB", (columns * (side + 2), len(shown) * (side + 2)), "white")
    for j, k in enumerate(shown):
        mine = np.flatnonzero(labels == k)
        for i, row in enumerate(np.sort(rng.choice(mine, min(columns, len(mine)), replace=False))):
            tile = Image.fromarray(np.repeat(images[row], 3, axis=2) if images.shape[3] == 1 else np.asarray(images[row]))
            factor = side / max(tile.size)
            tile = tile.resize([max(1, int(s * factor)) for s in tile.size], Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BOX)
            sheet.paste(tile, (i * (side + 2), j * (side + 2)))
    return sheet


def save_chunk(job, file, names):
    """Write rows of the .npy at `file` as the PNG files `names`."""
    from PIL import Image
    first, rows = job
    images = np.load(file, mmap_mode="r")
    for row in range(first, first + len(rows)):
        # Straight to its name: flushing each small file takes minutes, and the record counts as complete only after the last one.
        Image.fromarray(images[row, :, :, 0] if images.shape[3] == 1 else images[row]).save(names[row], "PNG")


def write_pngs(out, files, source, index, workers):
    """OUT/[train|test/]CLASS/INDEX.png, where INDEX is the row in the source; classes.txt keeps the order of the labels."""
    safe = [re.sub(r"[^\w\-. ]+", "_", c).strip(". ") for c in source.classes]    # a name from a file must not lead out of the folder
    safe = safe if len({s.lower() for s in safe} - {""}) == len(safe) else [f"{k:04d}_{s}" for k, s in enumerate(safe)]
    for prefix, split in source.splits.items():
        top = out / ("test" if prefix else "train") if "test_" in source.splits else out
        for k in np.unique(split.labels):
            (top / safe[k]).mkdir(parents=True, exist_ok=True)
        names = [top / safe[k] / f"{i:06d}.png" for k, i in zip(split.labels, index[prefix])]
        job = functools.partial(save_chunk, file=files[prefix], names=names)
        for _ in run_chunks(job, chunks(range(len(names))), workers, "writing", len(names)):
            pass
    common.save_text(out / "classes.txt", "\n".join(safe) + "\n")


@contextlib.contextmanager
def undone_on_failure(stage, record, new_folders):
    """When the body fails, the out folder is as before: its earlier record is back, or it is gone if this call made it."""
    try:
        yield
    except BaseException:
        if record is None:
            stage.file.unlink(missing_ok=True)
        else:
            common.save_text(stage.file, record)
        for folder in new_folders:
            with contextlib.suppress(OSError):                        # not empty: something complete is in it
                folder.rmdir()
        raise


def is_data_folder(path):
    return (Path(path) / "dataset.json").is_file() and (Path(path) / "labels.npy").is_file()


def take_subset(args, source):
    """Reduce the training split to --indices. Returns {prefix: rows of the source that are left}."""
    train, index = source.splits[""], {p: np.arange(len(s.files)) for p, s in source.splits.items()}
    if args.indices:
        index[""] = common.load_indices(args.indices, len(train.files), train.labels, len(source.classes))
        rows = train.images
        train.images = [rows[i] for i in index[""]] if isinstance(rows, list) else rows[index[""]]
        train.labels, train.files = train.labels[index[""]], [train.files[i] for i in index[""]]
    return index


def describe(args, source, height, width, channels, **more):
    """The content of dataset.json but for the hash."""
    labels, test = source.splits[""].labels, source.splits.get("test_")
    counts = np.bincount(labels, minlength=len(source.classes))
    return {"name": Path(args.source).stem, "num_images": len(labels), "num_classes": len(counts), "height": height, "width": width,
            "channels": channels, "num_test": len(test.labels) if test else 0, "class_counts": counts.tolist(), "source": args.source,
            "indices": args.indices and str(args.indices), **source.meta, **more}


def clear_old(out):
    """The old content goes: what other stages derived from it, and its description first of all."""
    for name in ("dataset.json", "latents*", "scratch.pt", "test_images.npy", "test_labels.npy", "stats_*.npz"):
        for old in out.glob(name):
            old.unlink()


def write_labels(out, source):
    for prefix, split in source.splits.items():
        common.save_npy(out / f"{prefix}labels.npy", split.labels)
    common.save_text(out / "classes.txt", "\n".join(source.classes) + "\n")
    common.save_text(out / "files.txt", "\n".join(source.splits[""].files) + "\n")


def build(args, source, vae=None):
    """Decode, check and write everything but latents; the description comes last. Returns its content."""
    train = source.splits[""]
    index, skipped = take_subset(args, source), 0
    with tempfile.TemporaryDirectory(dir=args.out, prefix=".data.") as tmp:
        files = {p: os.path.join(tmp, f"{p}images.npy") for p in source.splits}
        for prefix, split in source.splits.items():
            good, split.grey = fill(files[prefix], split.images, args.size, args.workers, args.skip_bad, "held-out images" if prefix else "images")
            skipped += len(split.labels) - len(good)
            split.labels, split.files, index[prefix], split.good = split.labels[good], [split.files[i] for i in good], index[prefix][good], good
        channels = 1 if all(split.grey for split in source.splits.values()) else 3
        for prefix, split in source.splits.items():
            if isinstance(split.images, list):
                rewrite(files[prefix], split.good, channels)
            split.images = np.load(files[prefix], mmap_mode="r")      # (N, H, W, C)
        counts = np.bincount(train.labels, minlength=len(source.classes))
        if (counts == 0).any():
            raise UserError(f"{args.source}: class '{source.classes[int(np.argmin(counts))]}' has no readable image left; give it some or leave the class out")
        test = source.splits.get("test_")
        if test and test.images.shape[1:3] != train.images.shape[1:3]:
            raise UserError(f"{args.source}: held-out images are {test.images.shape[1:3]}, but the others {train.images.shape[1:3]}; give --size S")
        if vae:
            room(args.out / "latents.npy", latent_shape(vae, *train.images.shape[:3]), np.float16)
        info = describe(args, source, *train.images.shape[1:], skipped=skipped, sha256=content_sha256(train.images, train.labels))
        if test:
            info["sha256_test"] = content_sha256(test.images, test.labels)
        if args.as_folder:
            write_pngs(args.out, files, source, index, args.workers)
            return info
        sheet = preview(train.images, train.labels, len(counts), args.seed)
        clear_old(args.out)
        for prefix, file in files.items():
            with open(file, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(file, args.out / f"{prefix}images.npy")
    write_labels(args.out, source)
    with common.atomic(args.out / "preview.png") as tmp:
        sheet.save(tmp)
    common.save_json(args.out / (BEGUN if vae else "dataset.json"), info)
    return info


# ---- latents
BEGUN = "latents.begun.json"                                          # dataset.json while the latents are being made: all else is complete


def latent_shape(vae, n, height, width):
    """(N, 2c, h, w) of the latents of n images."""
    if height % vae.factor or width % vae.factor:
        raise UserError(f"images of {height} x {width}: VAE {vae.name} needs sides that are multiples of {vae.factor}; give --size S")
    return n, 2 * vae.channels, height // vae.factor, width // vae.factor


def side_of(images, size):
    """(H, W) that every image has to come out with: --size, or that of the first."""
    try:
        return (size, size) if size else read_image(images[0])[0].shape[:2]
    except Exception as e:                                            # on damaged files Pillow's plugins raise a dozen kinds
        raise UserError(f"{image_name(images, 0)}: unreadable image ({type(e).__name__}: {e}); mend or remove it")


def image_name(images, row):
    return f"images[{row}]" if isinstance(images, np.ndarray) else str(images[row])


def begin_latents(args, source, vae):
    """A data folder without pixels, up to the latents: labels.npy, classes.txt, files.txt and the description."""
    train, test = source.splits[""], source.splits.pop("test_", None)
    if test:
        common.log(f"data.py: note: the {len(test.labels)} held-out images are left out, --latents-only stores no pixels")
    take_subset(args, source)
    height, width = side_of(train.images, args.size)
    room(args.out / "latents.npy", latent_shape(vae, len(train.labels), height, width), np.float16)
    clear_old(args.out)
    for name in ("images.npy", "preview.png"):
        (args.out / name).unlink(missing_ok=True)
    write_labels(args.out, source)
    common.save_json(args.out / BEGUN, describe(args, source, height, width, 3, skipped=0))


def pixel_reader(images, size, shape, pool):
    """read(rows) -> uint8 (b, H, W, 3) of a list of files or an array, decoded and cropped by the threads of `pool`, which go on with as many rows
    behind them while the VAE works: Pillow decodes outside the interpreter's lock."""
    coming = {}

    def one(row):
        try:
            pixels = read_image(images[row], size)[0]
        except Exception as e:                                        # on damaged files Pillow's plugins raise a dozen kinds
            raise UserError(f"{image_name(images, row)}: unreadable image ({type(e).__name__}: {e}); mend it and run the same command again, or "
                            "remove it and use --overwrite")
        if pixels.shape[:2] != shape:
            raise UserError(f"{image_name(images, row)}: {pixels.shape[1]}x{pixels.shape[0]} pixels, but the first image has {shape[1]}x{shape[0]}; "
                            "give --size S to bring all to S x S")
        return pixels

    def read(rows):
        rows = rows.tolist()
        jobs = [coming.pop(r, None) or pool.submit(one, r) for r in rows]
        after = range(rows[-1] + 1, min(rows[-1] + 1 + len(rows), len(images)))
        coming.update({r: pool.submit(one, r) for r in after if r not in coming})
        for r in set(coming).difference(after):                       # not asked for: an interrupted call had done them
            coming.pop(r).cancel()
        return np.stack([job.result() for job in jobs])
    return read


def encode(args, info, vae, device):
    """latents.npy, by every process its part, then latents.json and dataset.json by rank 0. info: what was begun."""
    import torch
    from models.diffusion import to_pixels
    from models.vae import latent_moments, latent_sums
    out, labels, size = args.out, np.load(args.out / "labels.npy"), None
    if args.latents_only:
        source, size = read_source(args.source, args.root), args.size
        take_subset(args, source)
        images, files = source.splits[""].images, source.splits[""].files
        if not np.array_equal(source.splits[""].labels, labels) or "\n".join(files) + "\n" != (out / "files.txt").read_text(encoding="utf-8"):
            raise UserError(f"{args.source}: holds other images than when {out} was begun; use --overwrite to encode it from the start")
    else:
        images = np.load(out / "images.npy", mmap_mode="r")
    shape = latent_shape(vae, len(labels), info["height"], info["width"])
    workers = max(1, args.workers // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    def compute(rows):
        z = vae.encode(to_pixels(torch.from_numpy(read(rows)).to(device))).half()             # (b, 2c, h, w)
        sound = z.isfinite().flatten(1).all(1).tolist()
        if not all(sound):
            raise UserError(f"{image_name(images, rows[sound.index(False)])}: its latent is not finite in float16; is {args.vae} the VAE you meant?")
        return z.cpu().numpy()
    with ThreadPoolExecutor(workers) as pool, common.no_bombs():
        read = pixel_reader(images, size, (info["height"], info["width"]), pool)
        z, seconds = common.fill(out, "latents", shape, np.float16, args.batch_size, compute)
    common.log(f"data.py: {z.nbytes / 1e6:,.1f} MB of latents {shape} of {args.vae}, {seconds:.1f} s over all processes")

    def describe_latents():
        sums = np.zeros(3)
        digest = content_sha256(z, labels, lambda rows: np.add(sums, latent_sums(rows), out=sums))
        mean, std = latent_moments(sums, vae.scale)
        common.save_json(out / "latents.json", {"vae": args.vae, "scale": vae.scale, "mean": mean, "std": std, "sha256": digest})
        common.save_json(out / "dataset.json", {"sha256": digest, **info})                    # without pixels the latents are what the set is known by
    common.from_rank0(describe_latents)


# ---- command line
def parse_args(argv=None):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lean-diffusion"
    p = common.Parser(__doc__)
    p.add_argument("source", help="digits, cifar10, a folder of images, an .npz, or a data folder made earlier")
    p.add_argument("--out", type=Path, required=True, help="the data folder to write")
    p.add_argument("--size", type=common.number(int, low=1, high=65500), help="side of the square images; without it all must have one size")
    p.add_argument("--root", type=Path, default=cache, help="cifar10 only: the folder that holds cifar-10-batches-py, or gets the download")
    p.add_argument("--indices", type=Path, help="keep.npy of prune.py or attach.py: export these training images; a held-out split goes along")
    p.add_argument("--vae", help="also encode to latents: stabilityai/sd-vae-ft-ema, another AutoencoderKL of diffusers, or its folder")
    p.add_argument("--latents-only", action="store_true", help="with --vae: store no pixels")
    p.add_argument("--batch-size", type=common.count, default=32, help="images that the VAE encodes at a time, over all processes")
    p.add_argument("--device", default="auto", help="of the VAE: auto, cpu, cuda or cuda:N")
    p.add_argument("--as-folder", action="store_true", help="write a folder of PNG files instead of arrays")
    p.add_argument("--skip-bad", action="store_true", help="leave unreadable images out, name and count them, instead of stopping")
    p.add_argument("--workers", type=common.number(int, low=1, high=1024), default=cores, help="processes that decode; does not change the result")
    p.add_argument("--seed", type=common.seed_type, default=0, help="draws the images of preview.png")
    p.add_argument("--overwrite", action="store_true", help="make the folder again although it stands")
    return p.parse_args(argv)


@common.command
def main(argv=None):
    args = parse_args(argv)
    if not args.vae:
        common.single_process("data.py without --vae")
    start, path = time.time(), Path(os.path.expanduser(args.source))    # (Path's own raises where there is no such user)
    common.free_for_output(args.out)
    folder = args.source not in ("digits", "cifar10") and path.is_dir()
    if args.source not in ("digits", "cifar10"):
        if not path.exists():
            raise UserError(f"{args.source}: no such source; give digits, cifar10, a folder of images or an .npz file")
        if not folder and path.suffix.lower() != ".npz":
            raise UserError(f"{args.source}: neither a folder nor an .npz file; a source is digits, cifar10, FOLDER or FILE.npz")
        args.source = str(path.resolve())
        if folder and path.resolve() in (args.out.resolve(), *args.out.resolve().parents):
            raise UserError(f"{args.out}: lies in the source {path}, which must stay as it is; choose another --out")
    if args.latents_only and not args.vae or args.vae and args.as_folder:
        raise UserError("--latents-only needs --vae; --as-folder writes pictures, which have no latents: leave --vae out")
    if args.skip_bad and args.latents_only:
        raise UserError("--skip-bad with --latents-only: rows left out would shift the indices of what is later taken from the source; mend the images")
    if args.skip_bad and args.indices and not (folder and is_data_folder(path)):
        raise UserError("--indices with --skip-bad: rows left out would shift the indices; make a data folder first, export from that")
    if args.indices:
        common.load_npy(args.indices, "kept indices, int64 (M,)", (None,), "iu")
    npz = DIGITS if args.source == "digits" else None if folder or args.source == "cifar10" else args.source
    inputs = {"indices": args.indices, "npz": npz}
    if folder and is_data_folder(path):
        inputs["data"] = open_pixels(path).info
    record_file = args.out / "data.args.json"
    record = record_file.read_text(encoding="utf-8") if record_file.is_file() else None
    if args.as_folder and args.out.is_dir() and any(args.out.iterdir()) and (record is None or args.overwrite):
        raise UserError(f"{args.out}: --as-folder writes into a new folder, and this one holds something; remove it or choose another --out")
    vae = device = None
    if args.vae:
        args.vae = str(Path(args.vae).resolve()) if Path(args.vae).is_dir() else args.vae
        device = common.get_device(args.device)
        from models.vae import load_vae
        with common.user_errors():
            vae = load_vae(args.vae, device)
    new_folders = [p for p in (args.out, *args.out.parents) if not p.exists()]
    outputs = () if args.as_folder else ("dataset.json", *["latents.npy", "latents.json"] * bool(vae))
    stage = common.Stage("data", args, inputs, outputs, free=("workers", "root", "batch_size"),
                         scraps=(BEGUN, "latents.seconds.json")).__enter__()
    if stage.done:
        return stage.__exit__(None, None, None)
    begun = args.out / BEGUN
    if common.rank() == 0:
        if not begun.exists():
            with undone_on_failure(stage, record, new_folders):
                for stale in args.out.glob(".data.*"):                # left by a call that was killed; the lock says that nobody else is at work
                    shutil.rmtree(stale)
                source = read_source(args.source, args.root)
                info = begin_latents(args, source, vae) if args.latents_only else build(args, source, vae)
    if vae:                                                           # the others wait here as long as rank 0 takes
        info = common.from_rank0(lambda: common.load_json(begun, "the description of the latents begun"))
        encode(args, info, vae, device)
    stage.finish()
    counts, seconds = info["class_counts"], time.time() - start
    common.log(f"data.py: {args.out}: {info['num_images']} images {info['height']}x{info['width']}x{info['channels']}, "
               f"{info['num_classes']} classes of {min(counts)} to {max(counts)}, {info['num_test']} held out" +
               f", {info['skipped']} skipped" * (info["skipped"] > 0) + f", latents of {args.vae}" * bool(vae) +
               f"; {seconds:.1f} s, {(info['num_images'] + info['num_test']) / seconds:.0f} images/s")
    if min(counts) < 10:
        common.log(f"data.py: warning: {sum(c < 10 for c in counts)} classes hold fewer than 10 images, the smallest {min(counts)}")


if __name__ == "__main__":
    main()
