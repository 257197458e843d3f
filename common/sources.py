"""Where images come from: everything that data.py takes becomes a Source, and nothing is decoded.

A further kind of source is one function that returns a Source, and a line of KINDS.
"""
import contextlib
import dataclasses
import functools
import json
import os
import re
from pathlib import Path

import numpy as np

from common.containers import PACKED, PICTURES, check_strangers
from common.errors import UserError, need, reading
from common.files import load_lines, load_npz
from common.inputs import open_data
from common.labels import arrange, label_column, split_word
from common.listing import (Listing, image_suffixes, is_image, list_folder, list_tars, list_zip,
                            natural, printable)

# UCI ML repository, Alpaydin & Kaynak 1998, CC BY 4.0; tests/test_data.py makes it once more.
DIGITS = Path(__file__).resolve().parent.parent / "data" / "digits.npz"
DIGIT_NAMES = "zero one two three four five six seven eight nine".split()


@dataclasses.dataclass
class Split:
    """The training or the held-out images of a source."""
    images: np.ndarray    # pixels (n, h, w, C), or what common.read_image opens, objects (n,)
    labels: np.ndarray    # int64 (n,)
    names: np.ndarray     # (n,), for files.txt

    def __post_init__(self):
        self.labels = np.asarray(self.labels, np.int64)
        self.names = np.asarray(self.names, object)
        self.rows = np.arange(len(self.names))    # (n,), of the source

    def keep(self, rows):
        """Reduce all but the images to these rows (m,)."""
        self.labels = self.labels[rows]
        self.names = self.names[rows]
        self.rows = self.rows[rows]


@dataclasses.dataclass
class Source:
    """A data set before it is decoded."""
    classes: list         # K names
    train: Split
    test: Split = None
    parent: str = None    # sha256 of the data folder that it is
    said: str = ""        # where splits and labels come from, in words

    @property
    def splits(self):
        """{what the names of a split's files begin with: split}"""
        both = {"": self.train, "test_": self.test}
        return {prefix: split for prefix, split in both.items() if split}


def of_array(name, images, labels):
    """A Split out of the array of this name."""
    return Split(images, labels, [f"{name}[{row}]" for row in range(len(images))])


def objects(items):
    """An array (n,) of any objects: numpy itself would look into them."""
    out = np.empty(len(items), object)
    out[:] = items
    return out


# ------------------------------------------------------------------------- folders and archives
def read_listing(listing, args):
    """A folder or archive of images as a source."""
    found = arrange(listing, args)
    check_strangers(listing, found.strangers, args.skip_bad)
    splits = [None, None]
    for k, part in enumerate((found.train, found.test)):
        if part:
            names, labels, root = part
            start = len(root) + 1 if root else 0
            splits[k] = Split(objects([listing.files[n] for n in names]), labels,
                              [printable(n[start:]) for n in names])
    places = ", ".join(place or "all of it" for place in found.places)
    said = f"{places} for training" if len(found.places) == 1 else f"splits {places}"
    return Source([printable(c) for c in found.classes] or ["image"], *splits,
                  said=f"{said}; {found.source}")


def read_folder(path, args):
    """A folder of images, of tars (a webdataset) or of parquet files."""
    listing = list_folder(path)
    if not any(map(is_image, listing.files)):
        packed = sorted((f for f in listing.files.values() if is_packed(f)), key=lambda f: natural(
            str(f)))
        kinds = {f.suffix.lower() for f in packed}
        if kinds == {".parquet"}:
            return read_parquet(packed, args)
        if kinds == {".tar"}:
            return read_tars(packed, path, args)
    return read_listing(listing, args)


def is_packed(file):
    """A parquet file or a tar, as far as its first and last bytes tell."""
    kind = file.suffix.lower()
    if kind not in (".parquet", ".tar") or file.stat().st_size < 512:
        return False
    with open(file, "rb") as f:
        return kind == ".tar" or f.read(4) == b"PAR1"


def read_tars(paths, place, args):
    """Tars as one data set; those with the names of splits are splits."""
    kinds = {split_word(re.split(r"[-_.\d]", p.stem)[0]) for p in paths}
    if len(paths) > 1 and "train" in kinds and len(kinds) > 1:
        parts = {kind: [p for p in paths if split_word(re.split(r"[-_.\d]", p.stem)[0]) == kind]
                 for kind in ("train", "test", "val")}
        train = read_tars(parts["train"], place, args)
        held = read_tars(parts["test"] or parts["val"], place, args)
        return joined(train, held, place)
    listing = list_tars(paths, place)
    # A webdataset's shards are no class folders.
    return read_listing(flat_shards(listing, paths), args)


def flat_shards(listing, paths):
    """Where the images of several tars lie at their tops, the tars are no folders of classes."""
    if len(paths) == 1 or any(name.count("/") > 1 for name in listing.files):
        return listing
    labelled = any(name.endswith((".cls", ".json")) for name in listing.files)
    if not labelled:
        return listing
    files = {name.replace("/", "-", 1): item for name, item in listing.files.items()}
    return Listing(listing.place, files)


def joined(train, held, place):
    """A source out of the sources of two splits."""
    need(set(held.classes) <= set(train.classes), f"{place}: the classes of the held-out split do "
         "not match those of the training images; both need the same names")
    number = np.array([train.classes.index(c) for c in held.classes])
    held.train.labels = number[held.train.labels]
    train.test = held.train
    train.said += f"; held out: {len(held.train.labels)}"
    return train


# ----------------------------------------------------------------------- parquet, Hugging Face
def need_package(name, what):
    """The optional package `name`; UserError with its pip command where it is missing."""
    try:
        return __import__(name, fromlist=["_"])
    except ImportError as e:
        package = name.partition(".")[0]
        raise UserError(f"{what} needs a package that is not installed: pip install "
                        f"{package}") from e


@functools.lru_cache(maxsize=2)
def row_group(file, group, column, pid):
    """The images of a row group of a parquet file, read once by each process."""
    from pyarrow.parquet import ParquetFile
    return ParquetFile(file).read_row_group(group, [column]).column(0).to_pylist()


@dataclasses.dataclass(frozen=True)
class Cell:
    """An image in a parquet file."""
    file: str
    group: int
    column: str
    row: int              # in its group

    def __str__(self):
        return f"{self.file}: row {self.row} of group {self.group}"

    def read(self):
        value = row_group(self.file, self.group, self.column, os.getpid())[self.row]
        value = value["bytes"] if isinstance(value, dict) else value
        if value is None:
            raise ValueError("no bytes in the file")
        return value


def read_parquet(paths, args):
    """Parquet files of Hugging Face's form: a column of images {bytes, path}, one of labels."""
    pq = need_package("pyarrow.parquet", paths[0])
    parts = {"train": [], "test": [], "val": []}
    for path in paths:
        # train-00000-of-00002.parquet, or train/0000.parquet as the hub converts them.
        words = [split_word(re.split(r"[-_.]", path.stem)[0]), split_word(path.parent.name)]
        parts[next(filter(None, words), "train")].append(path)
    need(parts["train"], f"{paths[0].parent}: parquet files of held-out splits only; give the "
                         "training file too")
    train, names = parquet_split(pq, parts["train"], args)
    held = parts["test"] or parts["val"]
    test = parquet_split(pq, held, args)[0] if held else None
    said = f"{len(parts['train'])} parquet files for training"
    return by_value(paths[0], train, test, names, said)


def parquet_split(pq, paths, args):
    """((cells, label values, names of rows), class names or None) of the files of a split."""
    cells, values, rows = [], [], []
    names = None
    for path in paths:
        with reading(path, "parquet file", "download it again"):
            file = pq.ParquetFile(path)
            schema = file.schema_arrow
            about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        image, label = parquet_columns(path, schema, args.label_column)
        features = about.get("info", {}).get("features", {})
        names = features.get(label, {}).get("names") or names
        for group in range(file.num_row_groups):
            n = file.metadata.row_group(group).num_rows
            cells += [Cell(str(path), group, image, row) for row in range(n)]
        if label:
            values += file.read([label]).column(0).to_pylist()
        rows += [f"{path.name}[{row}]" for row in range(file.metadata.num_rows)]
    return (cells, values or [0] * len(cells), rows), names


def parquet_columns(path, schema, asked):
    """(name of the column of images, that of labels or None)."""
    kinds = {field.name: str(field.type) for field in schema}
    images = [c for c, kind in kinds.items() if "bytes" in kind or kind in ("binary",
                                                                          "large_binary")]
    need(images, f"{path}: no column of images among {', '.join(kinds)}; this takes Hugging Face's "
                 "form, a column of {bytes, path}")
    rest = [c for c in kinds if c not in images]
    if not rest:
        return images[0], None
    return images[0], label_column(path, rest, asked)


def by_value(where, train, test, names, said):
    """A Source of (items, values, rows) whose labels are any values; names: those of 0..K-1."""
    need(None not in train[1], f"{where}: an image without a label; leave it out")
    values = sorted(set(train[1]), key=lambda v: natural(str(v)))
    if names:
        values = [k for k in range(len(names)) if k in set(train[1])]
    number = {v: k for k, v in enumerate(values)}
    classes = [str(names[v]) if names else str(v) for v in values]
    need(len(set(classes)) == len(classes), f"{where}: two classes have one name; rename one")
    many = len(values)
    need(many <= max(10, len(train[0]) // 2), f"{where}: {many} labels for {len(train[0])} images "
         "are no classes; say with --label-column which column holds them")
    splits = []
    for part in filter(None, (train, test)):
        items, labels, rows = part
        strange = [v for v in labels if v not in number]
        need(not strange, f"{where}: the held-out label {strange[:1]} is no class of the training "
                          "images; both need the same")
        splits.append(Split(objects(items), [number[v] for v in labels], rows))
    if many == 1 and not names:
        classes = ["image"]
    return Source([printable(c) for c in classes], *splits, said=said)


@functools.lru_cache(maxsize=4)
def hub_split(name, config, split):
    """A split of a data set of the hub, its images as bytes; in a forked process the parent's."""
    import datasets
    data = datasets.load_dataset(name, config, split=split)
    return undecoded(data)


def undecoded(data):
    """A data set of `datasets` whose images stay bytes."""
    import datasets
    image = next(c for c, f in data.features.items() if isinstance(f, datasets.Image))
    return data.cast_column(image, datasets.Image(decode=False))


@dataclasses.dataclass(frozen=True)
class HubRow:
    """An image of a data set of the hub."""
    name: str
    config: str
    split: str
    column: str
    row: int

    def __str__(self):
        return f"hf:{self.name} {self.split}[{self.row}]"

    def read(self):
        value = hub_split(self.name, self.config, self.split)[self.row][self.column]
        return value["bytes"] or Path(value["path"]).read_bytes()


def read_hub(source, args):
    """hf:NAME or hf:NAME:CONFIG through the package `datasets`, which downloads it."""
    datasets = need_package("datasets", source)
    name, _, config = source.removeprefix("hf:").partition(":")
    config = config or None
    try:
        splits = datasets.get_dataset_split_names(name, config)
    except Exception as e:
        raise UserError(f"{source}: {type(e).__name__}: {' '.join(str(e).split())[:200]}; is the "
                        "name right (hf:OWNER/NAME or hf:OWNER/NAME:CONFIG), and the hub within "
                        "reach?") from e
    words = {split_word(s): s for s in reversed(splits)}
    chosen = args.splits or list(filter(None, [words.get("train"), words.get("test")
                                               or words.get("val")]))
    need(chosen and set(chosen) <= set(splits), f"{source}: has the splits {', '.join(splits)}; "
         "say which with --splits TRAIN [HELD_OUT]")
    parts = [hub_part(name, config, split, args) for split in chosen[:2]]
    test = parts[1][0] if len(parts) > 1 else None
    return by_value(source, parts[0][0], test, parts[0][1], f"splits {', '.join(chosen[:2])}")


def hub_part(name, config, split, args):
    """parquet_split of a split of the hub."""
    data = hub_split(name, config, split)
    image = next(c for c, f in data.features.items() if hasattr(f, "decode") and not f.decode)
    rest = [c for c in data.features if c != image]
    label = label_column(f"hf:{name}", rest, args.label_column) if rest else None
    names = getattr(data.features[label], "names", None) if label else None
    items = [HubRow(name, config, split, image, row) for row in range(len(data))]
    values = list(data[label]) if label else [0] * len(data)
    return (items, values, [f"{split}[{row}]" for row in range(len(data))]), names


# ---------------------------------------------------------------------------------------- arrays
# What others call the arrays of an .npz: ours, ADM's, MedMNIST's, Keras's.
ALIASES = {
    "images": ("images", "arr_0", "train_images", "x_train"),
    "labels": ("labels", "arr_1", "train_labels", "y_train"),
    "test_images": ("test_images", "x_test", "val_images"),
    "test_labels": ("test_labels", "y_test", "val_labels"),
    "classes": ("classes",),
}


def npz_split(path, arrays, name, labels, span):
    """The Split in two arrays of an .npz, checked. All labels are 0 where they are not there."""
    x = arrays[name]    # (n, H, W) or (n, H, W, C)
    need(not (x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] not in (1, 3)),
         f"{path}: {name} is {x.dtype} {x.shape}, channels first, but must be (N, H, W, C); save "
         "x.transpose(0, 2, 3, 1)")
    shaped = x.ndim in (3, 4) and 0 not in x.shape and x.shape[3:] in ((), (1,), (3,))
    ranged = x.dtype == np.uint8 or (span is not None and x.dtype.kind in "iuf")
    need(shaped and ranged, f"{path}: {name} is {x.dtype} {x.shape}, but must be uint8 (N, H, W) "
                            "or (N, H, W, 1 or 3), values 0..255; or say with --range LO HI which "
                            "values are black and white")
    y = arrays.get(labels, np.zeros(len(x), np.int64))    # (n,) or (n, 1)
    need(y.dtype.kind in "iu" and y.shape in ((len(x),), (len(x), 1)),
         f"{path}: {labels} is {y.dtype} {y.shape}, but must be integers ({len(x)},): one for each "
         f"of the {name}")
    return of_array(name, x.reshape(*x.shape[:3], -1), y.reshape(-1))    # (n, H, W, C), (n,)


def npz_test(path, arrays, train, span):
    """The held-out Split of an .npz."""
    need("test_labels" in arrays or "labels" not in arrays,
         f"{path}: test_labels is missing, but there are labels; give both or none")
    test = npz_split(path, arrays, "test_images", "test_labels", span)
    shape = train.images.shape[1:]
    need(test.images.shape[1:] == shape, f"{path}: test_images are {test.images.shape[1:]}, but "
                                         f"images are {shape}; both must be alike")
    low, high = test.labels.min(), test.labels.max()
    most = train.labels.max()
    need(low >= 0 and high <= most, f"{path}: test_labels run {low}..{high}, but must be among the "
                                    f"labels, 0..{most}")
    return test


def npz_classes(path, arrays, num_classes):
    """The class names of an .npz, or their numbers."""
    if "classes" not in arrays:
        return ["image"] if num_classes == 1 else [str(k) for k in range(num_classes)]
    # Bytes or text, of any shape.
    names = [printable(str(c)) for c in arrays["classes"].astype(str).ravel()]
    need(len(names) == len(set(names)) == num_classes,
         f"{path}: {len(names)} names in 'classes' for {num_classes} classes; there must be one "
         "each, all different")
    return names


def named(arrays):
    """({our name: array}, in words which array is taken for what) of an .npz."""
    ours = {}
    said = []
    for name, others in ALIASES.items():
        held = next((other for other in others if other in arrays), None)
        if held:
            ours[name] = arrays[held]
            if held != name:
                said.append(f"{held} are the {name}")
    left = [name for name in arrays if not any(ours[o] is arrays[name] for o in ours)]
    if left:
        said.append(f"{', '.join(left)} left out")
    return ours, "; ".join(said)


def read_npz(path, span=None):
    """An .npz as a source."""
    what = ("an .npz of np.savez(path, images=..., labels=...) with images uint8 (N, H, W, C), or "
            "ADM's arr_0 and arr_1,")
    known = list(dict.fromkeys(name for others in ALIASES.values() for name in others))
    arrays, said = named(load_npz(path, known, what))
    need("images" in arrays, f"{path}: holds {', '.join(arrays)}, but 'images' uint8 (N, H, W, C) "
                             "is needed, or ADM's 'arr_0'")
    train = npz_split(path, arrays, "images", "labels", span)
    low, high = train.labels.min(), train.labels.max()
    # Counting comes last: a huge label would ask for a huge array.
    need(low >= 0 and high < len(train.labels) and np.bincount(train.labels).all(),
         f"{path}: labels run {low}..{high}, but must be 0..K-1 with at least one image of each "
         "class")
    source = Source(npz_classes(path, arrays, high + 1), train, said=said)
    if "test_images" in arrays:
        source.test = npz_test(path, arrays, train, span)
    return source


def read_digits():
    return dataclasses.replace(read_npz(DIGITS), classes=list(DIGIT_NAMES))


def read_cifar10(root):
    """CIFAR-10 through torchvision, which compares the md5 of a batch before it unpickles it."""
    import socket
    from torchvision.datasets import CIFAR10
    if root.name == CIFAR10.base_folder:
        root = root.parent
    # What torchvision makes before a download that then fails.
    new = [p for p in (root, *root.parents) if not p.exists()]
    timeout = socket.getdefaulttimeout()
    # A network that swallows packets would hang for minutes.
    socket.setdefaulttimeout(20)
    try:
        train = CIFAR10(str(root), train=True, download=True)
        test = CIFAR10(str(root), train=False)
    except Exception as e:
        # urllib, ssl, tarfile and torchvision each raise their own.
        for p in new:
            with contextlib.suppress(OSError):
                p.rmdir()
        raise UserError(f"{root / CIFAR10.base_folder}: missing or damaged, and the download "
                        f"failed ({type(e).__name__}: {e}); put {CIFAR10.filename} from "
                        f"{CIFAR10.url} into {root}, or give --root DIR with "
                        f"{CIFAR10.base_folder} inside")
    finally:
        socket.setdefaulttimeout(timeout)
    return Source(list(train.classes), of_array("images", train.data, train.targets),
                  of_array("test_images", test.data, test.targets))


def open_pixels(folder):
    """open_data of a folder that has to hold pixels."""
    data = open_data(folder, pixels=False)
    origin = data.info.get("source", "see its dataset.json")
    need(data.images is not None, f"{folder}: holds latents only; take the source that it was made "
                                  f"from, {origin}")
    return data


def read_data_folder(folder):
    """A data folder made earlier as a source."""
    data = open_pixels(folder)
    # Memory maps: what is not asked for is not read.
    train = of_array("images", data.images, data.labels)
    file = folder / "files.txt"
    if file.exists():
        train.names = np.asarray(load_lines(file), object)
    need(len(train.names) == len(data.labels), f"{file}: {len(train.names)} names for "
         f"{len(data.labels)} images; make the data folder again")
    source = Source(data.classes, train, parent=data.info["sha256"])
    if data.test_images is not None:
        source.test = of_array("test_images", data.test_images, data.test_labels)
    return source


# ------------------------------------------------------------------------------------ all kinds
NAMES = ("digits", "cifar10")
FILES = {".npz": "npz", ".zip": "zip", ".tar": "tar", ".parquet": "parquet"}


def kind_of(source):
    """digits, cifar10, hub, npz, zip, tar, parquet, data or folder; None for any other file."""
    if source in NAMES:
        return source
    if source.startswith("hf:"):
        return "hub"
    path = Path(source)
    if path.is_file():
        return FILES.get(path.suffix.lower())
    if (path / "dataset.json").is_file() and (path / "labels.npy").is_file():
        return "data"
    return "folder"


def refuse_file(path):
    """UserError about a file that is none of the sources: what it is, and the way in."""
    name = path.name.lower()
    for kind, way in {**PACKED, **PICTURES}.items():
        need(not name.endswith(kind), f"{path}: neither a folder nor an .npz, .zip, .tar or "
                                      f".parquet file; {way}")
    if path.suffix.lower() in image_suffixes():
        raise UserError(f"{path}: one image; give the folder that holds it")
    raise UserError(f"{path}: neither a folder nor an .npz, .zip, .tar or .parquet file; a source "
                    "is digits, cifar10, hf:NAME, FOLDER or such a FILE")


def read_source(args):
    """The Source that args.source names; args.root is CIFAR-10's."""
    kind = kind_of(args.source)
    path = Path(args.source)
    kinds = {"digits": read_digits, "cifar10": lambda: read_cifar10(args.root),
             "hub": lambda: read_hub(args.source, args),
             "npz": lambda: read_npz(path, args.range), "data": lambda: read_data_folder(path),
             "zip": lambda: read_listing(list_zip(path), args),
             "tar": lambda: read_tars([path], path, args),
             "parquet": lambda: read_parquet([path], args),
             "folder": lambda: read_folder(path, args)}
    return kinds[kind]()


