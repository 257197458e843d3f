"""Stage 0: a data set becomes a data folder of plain arrays, which every other stage reads.

SOURCE  digits     1 797 real 8x8 handwritten digits, embedded (data/digits.npz): 1 500 for
                   training, 150 of each class, and 297 held out
        cifar10    torchvision's copy, read from --root or downloaded into it
        FOLDER     images at any depth; FILE.zip, FILE.tar: the same without unpacking. Folders with
                   the names of splits (train, valid, Test ...) are splits. Labels: dataset.json of
                   EDM and StyleGAN, a table (labels.csv, metadata.csv, ...), a webdataset's .cls,
                   or class folders in natural order or that of a classes.txt; or --labels-from
        FILE.npz   images uint8 (N, H, W) or (N, H, W, C); labels; classes; test_images,
                   test_labels (all but images optional); or ADM's, MedMNIST's or Keras's names
        FILE.parquet, or a folder of them; hf:NAME: Hugging Face's form (pip install pyarrow;
                   pip install datasets)
        DATA       a data folder made earlier, to export a part of it or another size
What was understood is printed before the work begins; docs/data.md has the rules. (A folder called
digits or cifar10: write ./digits.) Every image becomes 8-bit RGB, or grey if all are grey: upright
by EXIF, transparent pixels white, 16 bits from 0..65535 or --range.
--size S resizes and centre-crops as ADM, DiT and SiT do (Dhariwal & Nichol 2021).
--vae V  adds the latents of a VAE (an AutoencoderKL of diffusers, by name or folder): the
         posterior's mean and std of every image, unscaled, from which train.py draws anew in every
         step. --latents-only stores no pixels and no held-out split. torchrun shares the work out.
         To resume: the same command again. What needs pixels of a kept subset later (attach.py
         --images) gets them from the same source: --indices keep.npy --out D.

Writes  OUT/images.npy uint8 (N, H, W, C), order of the source kept;  labels.npy int64 (N,);
        classes.txt, files.txt;  dataset.json;  preview.png;
        OUT/test_images.npy, test_labels.npy where a split is held out.
        With --vae: OUT/latents.npy float16 (N, 2c, h, w), mean and std;  latents.json: VAE, scale,
        mean and std of the scaled draws, sha256.
        With --as-folder: OUT/[train|test/]CLASS/INDEX.png instead, without the held-out split
        where --indices are given; flat: OUT/[train|test/]INDEX.png and labels.csv.

    python data.py cifar10 --out data/cifar10
    python data.py ~/photos --size 64 --out data/photos
    torchrun --nproc_per_node 8 data.py ~/imagenet --size 256 --vae stabilityai/sd-vae-ft-ema \\
        --latents-only --batch-size 512 --out data/imagenet
    python data.py data/cifar10 --indices runs/cifar10/pruned/prune/keep.npy --as-folder --out kept
"""
import collections
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import math
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np

import common
from common import UserError


# ---------------------------------------------------------------------------------------- formulas
# One image to pixels: common/pixels.py.


def content_sha256(images, labels, look=None):
    """Hex sha256 of "shape", the pixels in C order and the labels as little-endian int64.

    It is the same whatever wrote the files. look(rows) sees every part on the way, so that nothing
    large is read twice.
    """
    # The shape first: the same bytes may be wide or high images.
    digest = hashlib.sha256(str(tuple(map(int, images.shape))).encode())
    for lo in range(0, len(images), 1024):
        rows = np.ascontiguousarray(images[lo:lo + 1024])    # (b, ...)
        digest.update(rows)
        if look:
            look(rows)
    digest.update(labels.astype("<i8"))
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------- the work
BEGUN = "latents.begun.json"    # dataset.json while the latents are being made
# What stages derive from a data set, and what a call may leave out that another one wrote.
STALE = ("dataset.json", "images.npy", "test_images.npy", "test_labels.npy", "preview.png",
         "latents*", "scratch.pt", "stats_*.npz")


# `images` are pixels uint8 (n, h, w, C) or files, objects (n,), which come out with C = 3.
def channels_of(images):
    return 3 if images.ndim == 1 else images.shape[3]


def name_of(images, row):
    """How a message calls an image."""
    return str(images[row]) if images.ndim == 1 else f"images[{row}]"


def shape_of(args, images):
    """(H, W, C) of all images: that of --size, or what the first readable one has."""
    if args.size:
        sides = args.size if isinstance(args.size, list) else [args.size, args.size]
        return *sides, channels_of(images)
    if images.ndim == 4:
        return images.shape[1:]
    with common.no_bombs(args.max_pixels):
        for file in images:
            try:
                return common.read_image(file, None, args.range).pixels.shape    # (H, W, 3)
            except Exception as e:
                fault = common.pixels.fault_of(e)
            common.need(args.skip_bad, common.pixels.unreadable(file, fault))
    raise UserError(f"{args.source}: none of the {len(images)} images is readable; mend or replace "
                    "them")


class Decoder:
    """decode([rows (b,), ...]) yields the pixels uint8 (b, H, W, C) of each, read and cropped.

        decode = Decoder(args, images, shape)
        with common.open_pool(decode.workers) as decode.pool:
            common.fill(out, "images", (n, *shape), np.uint8, batch, decode, stream=True)

    Processes read, for Pillow holds the interpreter's lock in parts; each has one such batch at a
    time. With --skip-bad unreadable images are black and stand in .faults.
    """

    def __init__(self, args, images, shape):
        self.images = images
        self.work = functools.partial(common.pixels.decode_images, shape=shape, size=args.size,
                                      skip_bad=args.skip_bad, span=args.range,
                                      most=args.max_pixels)
        self.faults = {}    # {row: what is wrong with the image}
        self.extent = None  # of the values with more than 8 bits
        self.all_grey = images.ndim == 1 or shape[2] == 1    # as far as is known
        # Pixels of this shape are as they should be.
        self.ready = images.shape[1:] == shape and images.dtype == np.uint8
        # --workers counts for a machine: each process of torchrun has its share.
        share = args.workers // common.processes.from_environment("LOCAL_WORLD_SIZE", 1)
        useful = 1 if self.ready else math.ceil(len(images) / 64)
        self.workers = max(1, min(share, useful))

    def __call__(self, batches):
        if self.ready:
            yield from (np.asarray(self.images[rows]) for rows in batches)
            return
        jobs = (self.images[rows] for rows in batches)    # pixels (b, h, w, C) or files (b,)
        # Two batches more than workers: none idles while a batch is written.
        results = common.work_ahead(self.pool, self.work, jobs, depth=self.workers + 2)
        for rows, (pixels, faults, all_grey, extent) in zip(batches, results):
            self.faults |= {int(rows[place]): fault for place, fault in faults.items()}
            self.all_grey &= all_grey
            self.extent = common.pixels.wider(self.extent, extent)
            yield pixels

    def outcome(self):
        """({row: fault} in their order, whether all were grey, extent), of all processes."""
        # Each process has seen its rows alone.
        shares = common.gather((self.faults, self.all_grey, self.extent))
        everyone = common.from_rank0(lambda: shares)
        faults = {row: fault for share in everyone for row, fault in share[0].items()}
        extent = functools.reduce(common.pixels.wider, [share[2] for share in everyone])
        return dict(sorted(faults.items())), all(share[1] for share in everyone), extent


@contextlib.contextmanager
def workshop(out):
    """OUT/.data, where nothing passes for whole; it goes with the block, however that ends."""
    place = out / ".data"
    if common.rank() == 0:
        # The folder's lock says that what a killed call left there has no owner.
        for old in filter(Path.is_dir, out.glob(".data*")):
            shutil.rmtree(old)
        place.mkdir()
    try:
        yield place
    finally:
        if common.rank() == 0:
            shutil.rmtree(place)


def need_room(out, shape, dtype):
    """Refuse an array that the disk does not hold, and say beforehand when it is large."""
    size = math.prod(shape) * np.dtype(dtype).itemsize    # bytes
    # Rank 0 alone: what it then begins to write would count for a rank that asks later.
    common.from_rank0(lambda: common.need_disk(out, size))
    if size > 1e9:
        common.log(f"data.py: {size / 1e9:.1f} GB will be written to {out}")


def fill_pixels(file, shape, compute, **kw):
    """common.fill of FILE, uint8 (n, H, W, C), shared by all processes. Returns its memory map."""
    need_room(file.parent, shape, np.uint8)
    # 32 MB at a time, as long as that is not too many small images for one worker.
    batch = max(1, min(512, 2**25 // math.prod(shape[1:]))) * common.world()
    return common.fill(file.parent, file.stem, shape, np.uint8, batch, compute, **kw)[0]


def decode_split(args, images, file):
    """FILE, uint8 (n, H, W, C), of the images. Returns its memory map and Decoder.outcome()."""
    shape = shape_of(args, images)
    decode = Decoder(args, images, shape)
    with common.open_pool(decode.workers) as decode.pool:
        pixels = fill_pixels(file, (len(images), *shape), decode, stream=True)
        return pixels, *decode.outcome()


def reduced(pixels, rows, channels):
    """The .npy behind the memory map `pixels`, with these rows and its first channels alone."""
    shape = (len(rows), *pixels.shape[1:3], channels)
    if shape == pixels.shape:
        return pixels
    # A second pass over the file: only now is it known what all images have in common.
    file = Path(pixels.filename)
    smaller = file.with_name("reduced.npy")
    fill_pixels(smaller, shape, lambda part: pixels[rows[part]][..., :channels])
    common.from_rank0(lambda: os.replace(smaller, file))
    return np.load(file, mmap_mode="r")


def decode_source(args, source, place):
    """The images of each split become a memory map of decoded ones, less the unreadable."""
    good = {}
    grey = set()
    for prefix, split in source.splits.items():
        file = place / f"{prefix}images.npy"
        pixels, faults, all_grey, extent = decode_split(args, split.images, file)
        common.pixels.need_bright(args.source, extent, args.range)
        for row, fault in faults.items():
            common.log(f"data.py: skipped {name_of(split.images, row)} ({fault})")
        split.images = pixels
        good[prefix] = np.setdiff1d(np.arange(len(pixels)), list(faults))    # (m,)
        split.keep(good[prefix])
        grey.add(all_grey)
    for prefix, split in source.splits.items():
        # Grey images have three equal channels.
        channels = 1 if grey == {True} else split.images.shape[3]
        split.images = reduced(split.images, good[prefix], channels)


def check_decoded(args, source, vae):
    """UserError where the decoded images make no data set."""
    counts = np.bincount(source.train.labels, minlength=len(source.classes))    # (K,)
    common.need(counts.all(), f"{args.source}: class '{source.classes[np.argmin(counts)]}' has no "
                              "readable image left; give it some or leave the class out")
    sides = source.train.images.shape[1:3]    # (H, W)
    for split in source.splits.values():
        theirs = split.images.shape[1:3]
        common.need(theirs == sides, f"{args.source}: held-out images are {theirs}, but the others "
                                     f"{sides}; give --size S")
    if vae:
        need_room(args.out, latent_shape(vae, sum(counts), *sides), np.float16)


def build(args, source, vae, stage):
    """Decode, check and write all but latents and the description, which is returned.

    What stands is not touched before everything is decoded and checked.
    """
    images = sum(len(split.labels) for split in source.splits.values())
    with workshop(args.out) as place:
        decode_source(args, source, place)
        check_decoded(args, source, vae)
        info = describe(args, source, source.train.images.shape[1:])
        info["skipped"] = images - info["num_images"] - info["num_test"]
        if common.rank() == 0:
            # Later stages compare these and never hash the images again.
            for prefix, split in source.splits.items():
                name = "sha256_test" if prefix else "sha256"
                info[name] = content_sha256(split.images, split.labels)
        # From here on what stood goes.
        stage.begin()
        if args.as_folder:
            write_pngs(args, source)
        elif common.rank() == 0:
            # Killed from here on, the folder has no description and is none.
            for split in source.splits.values():
                file = Path(split.images.filename)
                os.replace(file, args.out / file.name)
            save_preview(args.out / "preview.png", source.train, len(source.classes), args.seed)
            write_labels(args.out, source)
    return info


def describe(args, source, shape):
    """The content of dataset.json but for the hashes; shape: (H, W, C) of the images."""
    counts = np.bincount(source.train.labels, minlength=len(source.classes)).tolist()    # (K,)
    info = {"name": Path(args.source).stem, "num_images": sum(counts), "num_classes": len(counts),
            "height": shape[0], "width": shape[1], "channels": shape[2], "num_test": 0,
            "class_counts": counts, "source": args.source, "indices": None}
    if source.test:
        info["num_test"] = len(source.test.labels)
    if args.indices:
        info["indices"] = str(args.indices)
    if source.parent:
        info["parent"] = source.parent
    return {**info, "skipped": 0}


def write_labels(out, source):
    """labels.npy, test_labels.npy, classes.txt and files.txt."""
    for prefix, split in source.splits.items():
        common.save_npy(out / f"{prefix}labels.npy", split.labels)
    common.save_text(out / "classes.txt", "\n".join(source.classes) + "\n")
    common.save_text(out / "files.txt", "\n".join(source.train.names) + "\n")


def save_preview(path, split, num_classes, seed, most=10):
    """A picture with a row per class (ten at most, spread evenly) of ten images, drawn by seed."""
    from PIL import Image
    rng = np.random.default_rng(seed)
    images = split.images    # (N, H, W, C)
    # Tiles of 64 to 128 pixels, with a gap of two.
    side = min(128, max(64, *images.shape[1:3]))
    # Seldom all classes: a thousand rows would be no picture.
    shown = np.linspace(0, num_classes - 1, min(most, num_classes)).round()
    shown = np.unique(shown.astype(int))
    sheet = Image.new("RGB", (most * (side + 2), len(shown) * (side + 2)), "white")
    for j, k in enumerate(shown):
        mine = np.flatnonzero(split.labels == k)    # (n_k,)
        drawn = rng.choice(mine, min(most, len(mine)), replace=False)
        for i, row in enumerate(np.sort(drawn)):
            rgb = np.broadcast_to(images[row], (*images.shape[1:3], 3))    # (H, W, 3)
            tile = Image.fromarray(np.ascontiguousarray(rgb))
            # Small images keep their pixels, large ones are averaged.
            factor = side / max(tile.size)
            size = [max(1, int(length * factor)) for length in tile.size]
            kind = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BOX
            sheet.paste(tile.resize(size, kind), (i * (side + 2), j * (side + 2)))
    with common.atomic(path) as tmp:
        sheet.save(tmp)


def save_pngs(file, first, names):
    """Write rows of the .npy at `file`, from `first` on, as these PNG files."""
    from PIL import Image
    images = np.load(file, mmap_mode="r")    # (N, H, W, C)
    if images.shape[3] == 1:
        images = images[..., 0]    # Pillow wants grey as (H, W).
    for row, name in enumerate(names, first):
        # Straight to its name: flushing each small file takes minutes, and classes.txt, which
        # comes last, says that all are there.
        Image.fromarray(images[row]).save(name, "PNG")


def png_folders(classes, form):
    """Names of the class folders of an export; a name that was read from a file stays inside."""
    folders = [re.sub(r"[^\w\-. ]+", "_", c).strip(". ") for c in classes]
    if form == "numbered":
        width = len(str(len(classes) - 1))
        return [f"{k:0{width}d}_{name}" for k, name in enumerate(folders)]
    if len({name.lower() for name in folders} - {""}) < len(folders):
        folders = [f"{k:04d}_{name}" for k, name in enumerate(folders)]
    return folders


def write_pngs(args, source):
    """OUT/[train|test/]CLASS/INDEX.png, or flat, where INDEX is the row in the source."""
    folders = png_folders(source.classes, args.as_folder)
    splits = source.splits
    if args.indices and source.test:
        # A program that reads OUT at any depth must find the kept images alone.
        common.log(f"data.py: note: the {len(source.test.labels)} held-out images are left out of "
                   "the export of --indices")
        splits = {"": source.train}
    for prefix, split in splits.items():
        top = args.out
        if len(splits) > 1:
            top = args.out / ("test" if prefix else "train")
        names = [f"{folders[k]}/{row:06d}.png" for k, row in zip(split.labels, split.rows)]
        if args.as_folder == "flat":
            names = [f"{row:06d}.png" for row in split.rows]
        for folder in {(top / name).parent for name in names}:
            folder.mkdir(parents=True, exist_ok=True)
        write_split(split, [top / name for name in names], args.workers)
        if args.as_folder == "flat":
            table = io.StringIO()
            rows = [(name, source.classes[k]) for name, k in zip(names, split.labels)]
            csv.writer(table, lineterminator="\n").writerows([("file_name", "label"), *rows])
            common.save_text(top / "labels.csv", table.getvalue())
    if args.as_folder is True and sorted(folders) != folders:
        common.log("data.py: note: torchvision's ImageFolder sorts the folders by name, so its "
                   f"label 0 is {sorted(folders)[0]!r}, ours {folders[0]!r} (classes.txt); "
                   "--as-folder numbered keeps the labels")
    # It keeps the order of the labels.
    shown = source.classes if args.as_folder == "flat" else folders
    common.save_text(args.out / "classes.txt", "\n".join(shown) + "\n")


def write_split(split, names, workers):
    """The images of a split under these paths, by several processes."""
    firsts = range(0, len(names), 64)
    # Portions: a job for each file would cost more than the file.
    portions = [names[lo:lo + 64] for lo in firsts]
    with common.open_pool(min(workers, len(portions))) as pool:
        files = itertools.repeat(split.images.filename)
        done = pool.map(save_pngs, files, firsts, portions)
        for _ in common.progress(done, total=len(portions), desc="writing", leave=False):
            pass


def latent_shape(vae, n, height, width):
    """(N, 2c, h, w) of the latents of n images."""
    common.need(height % vae.factor == 0 and width % vae.factor == 0,
                f"images of {height} x {width}: VAE {vae.name} needs sides that are multiples of "
                f"{vae.factor}; give --size S")
    return n, 2 * vae.channels, height // vae.factor, width // vae.factor


def begin_latents(args, source, vae, stage):
    """A folder without pixels, latents and the description, which is returned."""
    if source.test:
        common.log(f"data.py: note: the {len(source.test.labels)} held-out images are left out, "
                   "--latents-only stores no pixels")
        source.test = None
    # At most the first image is read here, to know what is coming.
    height, width, _ = shape_of(args, source.train.images)
    need_room(args.out, latent_shape(vae, len(source.train.labels), height, width), np.float16)
    info = describe(args, source, (height, width, 3))
    stage.begin()
    if common.rank() == 0:
        write_labels(args.out, source)
    return info


def images_to_encode(args, source):
    """The pixels that stand in OUT; with --latents-only the source, which must be as it was."""
    if not args.latents_only:
        return np.load(args.out / "images.npy", mmap_mode="r")
    # Row i of the latents has to stay image i.
    train = source.train
    names = common.load_lines(args.out / "files.txt")
    labels = np.load(args.out / "labels.npy")
    common.need(names == train.names.tolist() and np.array_equal(labels, train.labels),
                f"{args.source}: holds other images than when {args.out} was begun; use "
                "--overwrite to encode it from the start")
    return train.images


def encode(args, images, info, vae, device):
    """latents.npy of the images, by every process its part; then rank 0 describes them."""
    import torch
    from models.diffusion import to_pixels
    channels = channels_of(images)
    shape = latent_shape(vae, len(images), info["height"], info["width"])
    decode = Decoder(args, images, (info["height"], info["width"], channels))

    def latents(batches):
        for rows, pixels in zip(batches, decode(batches)):    # (b,), (b, H, W, C)
            # A VAE of diffusers takes three channels.
            if channels == 1:
                pixels = np.repeat(pixels, 3, axis=3)
            x = to_pixels(torch.from_numpy(pixels).to(device))    # (b, 3, H, W)
            z = vae.encode(x).half()    # (b, 2c, h, w)
            # float16 ends at 65504, far beyond the latents of a VAE that fits.
            sound = z.isfinite().flatten(1).all(1).tolist()    # (b,)
            if not all(sound):
                name = name_of(images, rows[sound.index(False)])
                raise UserError(f"{name}: its latent is not finite in float16; is {args.vae} the "
                                "VAE you meant?")
            yield z.cpu().numpy()
    with common.open_pool(decode.workers) as decode.pool:
        z, seconds = common.fill(args.out, "latents", shape, np.float16, args.batch_size, latents,
                                 stream=True)
    # z (N, 2c, h, w) is a memory map.
    common.log(f"data.py: {z.nbytes / 1e6:,.1f} MB of latents {shape} of {args.vae}, "
               f"{seconds:.1f} s over all processes")
    common.from_rank0(lambda: describe_latents(args, z, info, vae.scale))


def describe_latents(args, z, info, scale):
    """latents.json, then dataset.json; z (N, 2c, h, w)."""
    from models.vae import latent_moments, latent_sums
    sums = np.zeros(3)    # count, sum and sum of squares

    def look(rows):
        sums[:] += latent_sums(rows)
    digest = content_sha256(z, np.load(args.out / "labels.npy"), look)
    # Of what a model sees: train.py compares, for latents of another scale train without an error.
    mean, std = latent_moments(sums, scale)
    about = {"vae": args.vae, "scale": scale, "mean": mean, "std": std, "sha256": digest}
    common.save_json(args.out / "latents.json", about)
    # Without pixels the latents are what the set is known by.
    common.save_json(args.out / "dataset.json", {"sha256": digest, **info})


# ------------------------------------------------------------------------------------------ inputs
def load_source(args):
    """The source, its training images reduced to --indices."""
    # Rank 0 comes first: it may download.
    if common.rank():
        common.barrier(patient=True)
    source = common.read_source(args)
    if common.rank() == 0:
        common.barrier()
    train = source.train
    # The held-out images go along, whatever is kept of the others.
    if args.indices:
        n = len(train.labels)
        keep = common.load_indices(args.indices, n, train.labels, len(source.classes))    # (m,)
        train.images = train.images[keep]
        train.keep(keep)
    return source


def open_vae(args):
    """(the VAE of --vae, its device), or None twice."""
    if not args.vae:
        return None, None
    from models.vae import load_vae
    device = common.get_device(args.device)
    with common.user_errors():
        return load_vae(args.vae, device), device


def open_stage(args):
    """OUT, which stays as it is until begin()."""
    # Of a folder of images and of torchvision's files there is no hash: their path counts.
    kind = common.kind_of(args.source)
    npz = {"digits": common.sources.DIGITS, "npz": args.source}.get(kind)
    inputs = {"indices": args.indices, "npz": npz}
    if kind == "data":
        inputs["data"] = common.sources.open_pixels(Path(args.source)).info
    outputs = ["dataset.json"]
    stale = STALE
    parts = []
    if args.vae:
        outputs += ["latents.npy", "latents.json"]
    if args.as_folder:
        # Every picture binds the record, and none is ever removed.
        outputs = ["classes.txt"]
        stale = []
        parts = ["*"]
    # What an earlier version did not know is not in its record: left out it means the same.
    free = ["workers", "root", "batch_size", "max_pixels"]
    later = dict(range=None, labels_from="auto", label_column=None, splits=None)
    free += [name for name, value in later.items() if getattr(args, name) == value]
    return common.Stage("data", args, inputs, outputs, free=free, stale=stale,
                        scraps=[BEGUN, "latents.seconds.json"], parts=parts, late=True)


def state_of_source(args):
    """What tells that a source known by its path has changed; None for the others."""
    if common.kind_of(args.source) in ("folder", "zip", "tar", "parquet"):
        return common.listing.state_of(args.source)
    return None


def say_changes(args, stage):
    """A warning where the source is no longer what OUT was made from."""
    was = common.load_record(stage.file).get("source_state")
    now = state_of_source(args)
    if was and now and was != now:
        common.log(f"data.py: warning: {args.source} has changed since: {was[0]} files then, "
                   f"{now[0]} now, or other sizes or times; {args.out} is still what it was, "
                   "--overwrite makes it anew")


def look_at(args, source):
    """Prints what was understood, before the work: splits, classes, sizes and modes of a sample."""
    counts = np.bincount(source.train.labels, minlength=len(source.classes))    # (K,)
    held = len(source.test.labels) if source.test else 0
    shown = ", ".join(f"{c} {n}" for c, n in zip(source.classes[:12], counts))
    more = ", ..." if len(counts) > 12 else ""
    where = f" ({source.said})" if source.said else ""
    common.log(f"data.py: {args.source}{where}: {len(source.train.labels)} images, {held} held out;"
               f" {len(counts)} classes: {shown}{more}")
    if source.train.images.ndim == 1:
        look_at_files(args, source.train.images)


def look_at_files(args, images, most=64):
    """Sizes, modes and values of some files, spread evenly; what cannot work is refused here."""
    sizes = {}                       # {"8x8": the files}
    modes = collections.Counter()
    extent = None
    rows = np.unique(np.linspace(0, len(images) - 1, min(most, len(images))).astype(int))
    with common.no_bombs(args.max_pixels):
        for image in images[rows]:
            # What is damaged is named when all are decoded.
            with contextlib.suppress(Exception):
                size, mode, values = common.pixels.about_image(image, args.range)
                sizes.setdefault(f"{size[0]}x{size[1]}", []).append(image)
                modes[mode] += 1
                extent = common.pixels.wider(extent, values)
    counts = collections.Counter({size: len(files) for size, files in sizes.items()})
    text = f"data.py: {len(rows)} looked at: {told(counts)} (width x height), {told(modes)}"
    if extent:
        text += f", values {extent[0]:g} to {extent[1]:g}"
    common.log(text)
    common.pixels.need_range(args.source, extent, args.range)
    common.pixels.need_bright(args.source, extent, args.range)
    if len(sizes) > 1 and not args.size:
        odd = counts.most_common()[-1][0]
        raise UserError(f"{sizes[odd][0]}: {odd} pixels, and the images are of several sizes "
                        f"({told(counts)}); give --size S to bring all to S x S")


def told(counter, most=4):
    """ "RGB 60, L 4" of a Counter."""
    shown = ", ".join(f"{name} {n}" for name, n in counter.most_common(most))
    return shown + (", ..." if len(counter) > most else "")




# ------------------------------------------------------------------------------------ command line
def parse_args(argv=None):
    from common.pictures import MAX_PIXELS
    # A container may have fewer cores than its machine.
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    # A container may know no home.
    home = os.path.expanduser("~")
    home = "." if home == "~" else f"{home}/.cache"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or home) / "lean-diffusion"
    p = common.Parser(__doc__)
    p.add_argument("source", help="digits, cifar10, a folder, .zip or .tar of images, .npz, "
                                  ".parquet, hf:NAME, or a data folder made earlier")
    p.add_argument("--out", type=Path, required=True, help="the data folder to write")
    p.add_argument("--size", type=common.number(int, low=1, high=65500), nargs="+", metavar="S",
                   help="side of the square images, or height and width; without it all must have "
                        "one size")
    p.add_argument("--labels-from", default="auto", metavar="HOW",
                   help="auto, folders, prefix (cat_0001.png), none, or a table in the source")
    p.add_argument("--label-column", metavar="NAME",
                   help="which column of a table or parquet file is the label")
    p.add_argument("--splits", nargs="+", metavar="NAME",
                   help="folders of training and held-out images; none: they are classes")
    p.add_argument("--range", type=common.number(), nargs=2, metavar=("LO", "HI"),
                   help="values of more than 8 bits that become black and white")
    p.add_argument("--max-pixels", type=common.count, default=MAX_PIXELS,
                   help="largest image that is opened, against decompression bombs")
    p.add_argument("--root", type=Path, default=cache,
                   help="cifar10 only: holds cifar-10-batches-py, or gets the download")
    p.add_argument("--indices", type=Path,
                   help="keep.npy of prune.py or attach.py: export these training images; a "
                        "held-out split goes along, but not with --as-folder")
    p.add_argument("--vae", help="also encode to latents: stabilityai/sd-vae-ft-ema, another "
                                 "AutoencoderKL of diffusers, or its folder")
    p.add_argument("--latents-only", action="store_true", help="with --vae: store no pixels")
    p.add_argument("--batch-size", type=common.count, default=32,
                   help="images that the VAE encodes at a time, over all processes")
    p.add_argument("--as-folder", nargs="?", const="names", default=False,
                   choices=("names", "numbered", "flat"),
                   help="write PNG files instead of arrays: in class folders, in numbered ones "
                        "(0_zero), or in one folder beside labels.csv")
    p.add_argument("--skip-bad", action="store_true",
                   help="leave unreadable images out, name and count them, instead of stopping")
    p.add_argument("--workers", type=common.number(int, low=1, high=1024), default=cores,
                   help="processes that decode; does not change the result")
    common.add_run_flags(p, seed="draws the images of preview.png",
                         overwrite="make the folder again although it stands")
    args = p.parse_args(argv)
    if args.size and len(args.size) > 2:
        p.error("--size takes one side, or height and width")
    if args.size and len(set(args.size)) == 1:
        # As the records of earlier versions have it.
        args.size = args.size[0]
    if args.as_folder == "names":
        # As the records of earlier versions have it.
        args.as_folder = True
    if args.range and not args.range[0] < args.range[1]:
        p.error("--range LO HI: LO must be below HI")
    if args.splits and len(args.splits) > 2:
        p.error("--splits takes TRAIN, TRAIN HELD_OUT, or none")
    if args.latents_only and not args.vae:
        p.error("--latents-only needs --vae")
    if args.vae and args.as_folder:
        p.error("--as-folder writes pictures, which have no latents: leave --vae out")
    if args.skip_bad and args.latents_only:
        p.error("--skip-bad with --latents-only: rows left out would shift the indices of what is "
                "later taken from the source; mend the images")
    return args


def checked_path(args):
    """The whole path of the source, which must be there; the record calls it so."""
    # Path's own raises where there is no such user.
    path = Path(os.path.expanduser(args.source))
    common.need(path.exists(), f"{args.source}: no such source; give digits, cifar10, hf:NAME, a "
                               "folder of images, or a .zip, .tar, .npz or .parquet file")
    if common.kind_of(str(path)) is None:
        common.sources.refuse_file(path)
    path = path.resolve()
    out = args.out.resolve()
    common.need(path.is_file() or path not in (out, *out.parents),
                f"{args.out}: lies in the source {path}, which must stay as it is; choose another "
                "--out")
    return str(path)


def check_places(args):
    """What flags name must be there, and what stands in OUT must not be in the way.

    The record knows a folder by its whole path, from wherever the script is called.
    """
    # Only the encoding is worth several processes.
    if not args.vae:
        common.single_process("data.py without --vae")
    common.free_for_output(args.out)
    if common.kind_of(args.source) not in ("digits", "cifar10", "hub"):
        args.source = checked_path(args)
    if args.vae and Path(args.vae).is_dir():
        args.vae = str(Path(args.vae).resolve())
    common.need(not (args.skip_bad and args.indices) or common.kind_of(args.source) == "data",
                "--indices with --skip-bad: rows left out would shift the indices; make a data "
                "folder first, export from that")
    # Whether they fit the source shows when that is read.
    if args.indices:
        common.load_npy(args.indices, "kept indices, int64 (M,)", (None,), "iu")
    if args.as_folder and args.out.is_dir():
        # What a killed call was decoding does not count.
        held = [p for p in args.out.iterdir() if not p.name.startswith(".data")]
        going_on = (args.out / "data.args.json").is_file() and not args.overwrite
        common.need(going_on or not held, f"{args.out}: --as-folder writes into a new folder, and "
                    "this one holds something; remove it or choose another --out")


def say(args, info, seconds):
    """The last lines."""
    counts = info["class_counts"]    # (K,)
    text = (f"data.py: {args.out}: {info['num_images']} images "
            f"{info['height']}x{info['width']}x{info['channels']}, {len(counts)} classes of "
            f"{min(counts)} to {max(counts)}, {info['num_test']} held out")
    if info["skipped"]:
        text += f", {info['skipped']} skipped"
    if args.vae:
        text += f", latents of {args.vae}"
    pace = (info["num_images"] + info["num_test"]) / seconds
    common.log(f"{text}; {seconds:.1f} s, {pace:.0f} images/s")
    # Statistics of a class, as in prune.py and evaluate.py, need more.
    if min(counts) < 10:
        small = sum(c < 10 for c in counts)
        common.log(f"data.py: warning: {small} classes hold fewer than 10 images, the smallest "
                   f"{min(counts)}")


@common.command
def main(argv=None):
    start = time.time()
    args = parse_args(argv)
    check_places(args)
    vae, device = open_vae(args)
    with open_stage(args) as stage:
        if stage.done:
            common.from_rank0(lambda: say_changes(args, stage))
            return
        # The description comes last, and says that all but the latents is there.
        file = args.out / (BEGUN if vae else "dataset.json")
        begun = common.from_rank0(lambda: stage.resuming and file.exists())
        # Pixels that stand need no source any more.
        source = None
        if args.latents_only or not begun:
            source = load_source(args)
            look_at(args, source)
        if begun:
            stage.begin()
            info = common.from_rank0(lambda: common.load_json(file, "what was begun"))
        else:
            make = begin_latents if args.latents_only else build
            info = make(args, source, vae, stage)
            if common.rank() == 0 and not args.as_folder:
                common.save_json(file, info)
            common.barrier(patient=True)
        if vae:
            encode(args, images_to_encode(args, source), info, vae, device)
        stage.finish(source_state=common.from_rank0(lambda: state_of_source(args)))
    say(args, info, time.time() - start)


if __name__ == "__main__":
    main()
