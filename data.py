"""Stage 0: a data set becomes a data folder of plain arrays, which every other stage reads.

SOURCE  digits     1 797 real 8x8 handwritten digits, embedded (data/digits.npz): 1 500 for
                   training, 150 of each class, and 297 held out
        cifar10    torchvision's copy, read from --root or downloaded into it
        FOLDER     images in class sub-folders, at any depth below them; or without sub-folders:
                   one class. When train/ is there and nothing else but test/ (or val/), these are
                   the splits. Labels follow the natural order of the class names, or a classes.txt
                   at the top. Transparent pixels become white, 16 bits become 8, EXIF rotation is
                   applied; one channel only if every image is grey. (A folder called digits or
                   cifar10: write ./digits.) A folder is known by its path: after a change to it
                   use --overwrite.
        FILE.npz   images uint8 (N, H, W) or (N, H, W, C); labels; classes; test_images,
                   test_labels (all but images optional); or ADM's arr_0, arr_1
        DATA       a data folder made earlier, to export a part of it or another size
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
        With --as-folder: OUT/[train|test/]CLASS/INDEX.png instead.

    python data.py cifar10 --out data/cifar10
    python data.py ~/photos --size 64 --out data/photos
    torchrun --nproc_per_node 8 data.py ~/imagenet --size 256 --vae stabilityai/sd-vae-ft-ema \\
        --latents-only --batch-size 512 --out data/imagenet
    python data.py data/cifar10 --indices runs/cifar10/pruned/prune/keep.npy --as-folder --out kept
"""
import contextlib
import dataclasses
import functools
import hashlib
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
# Pillow's modes without colour.
GREY = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"}


def adm_crop(image, size):
    """The size x size centre of a PIL image whose shorter side is brought to `size`.

    Box halving while it is twice too large, then bicubic (Dhariwal & Nichol 2021, their code).
    """
    from PIL import Image
    # Averages of 2 x 2 first: bicubic alone would be coarser.
    while min(image.size) >= 2 * size:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = (round(image.width * scale), round(image.height * scale))    # (w, h)
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_rgb(image):
    """A PIL image of any mode in RGB: 16 bits become 8, transparent pixels white."""
    from PIL import Image
    # Nobody says whether they end at 1, at 255 or elsewhere.
    if image.mode == "F":
        raise ValueError("float pixels, whose range is not known; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        # 16 bits, in Pillow's mode I too; convert("L") would clip at 255.
        v = np.asarray(image).astype(np.int64).clip(0, 65535)    # (H, W)
        # 65535 = 255 * 257, rounded to the nearest level.
        image = Image.fromarray(((v + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        # On white, as a page shows them; convert("RGB") alone would show what lies behind.
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_image(source, size=None):
    """(pixels uint8 RGB (H, W, 3), whether the image was stored grey).

    source: a file, or an array uint8 (h, w, 1 or 3). size: crop to this square.
    """
    from PIL import Image, ImageOps
    if isinstance(source, Path):
        image = Image.open(source)
    else:
        # Pillow wants grey as (h, w).
        image = Image.fromarray(source[..., 0] if source.shape[2] == 1 else source)
    with image:
        # A camera may have been held upright: height and width change places.
        ImageOps.exif_transpose(image, in_place=True)
        grey = image.mode in GREY
        image = to_rgb(image)
        if size:
            image = adm_crop(image, size)
        return np.asarray(image), grey


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


def unreadable(file, fault):
    """The line about an image that cannot be read."""
    return (f"{file}: unreadable image ({fault}); mend or remove it, or go on without such images: "
            "--skip-bad, where pixels are stored")


def shape_of(args, images):
    """(H, W, C) of all images: the square of --size, or what the first readable one has."""
    if args.size:
        return args.size, args.size, channels_of(images)
    if images.ndim == 4:
        return images.shape[1:]
    with common.no_bombs():
        for file in images:
            try:
                return read_image(file)[0].shape    # (H, W, 3)
            except Exception as e:
                fault = f"{type(e).__name__}: {e}"
            common.need(args.skip_bad, unreadable(file, fault))
    raise UserError(f"{images[0].parent}: none of the {len(images)} images is readable; mend or "
                    "replace them")


def decode_images(images, shape, size, skip_bad):
    """(pixels uint8 (b, H, W, C), {place: fault}, whether all were stored grey) of some images.

    With skip_bad those that cannot be read stay black, else UserError names the first.
    """
    pixels = np.zeros((len(images), *shape), np.uint8)    # (b, H, W, C)
    faults = {}
    all_grey = True
    with common.no_bombs():
        for place, image in enumerate(images):
            try:
                rgb, grey = read_image(image, size)    # (h, w, 3)
            except Exception as e:
                # On damaged files Pillow's plugins raise a dozen kinds.
                faults[place] = f"{type(e).__name__}: {e}"
                common.need(skip_bad, unreadable(image, faults[place]))
                continue
            height, width, _ = rgb.shape
            common.need((height, width) == shape[:2],
                        f"{image}: {width}x{height} pixels, but the first image has {shape[1]}x"
                        f"{shape[0]}; give --size S to bring all to S x S")
            # Of a grey array one of three equal channels.
            pixels[place] = rgb[..., :shape[2]]
            all_grey &= grey
    return pixels, faults, all_grey


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
        self.work = functools.partial(decode_images, shape=shape, size=args.size,
                                      skip_bad=args.skip_bad)
        self.faults = {}    # {row: what is wrong with the image}
        self.all_grey = images.ndim == 1 or shape[2] == 1    # as far as is known
        # Pixels of this shape are as they should be.
        self.ready = images.shape[1:] == shape
        # --workers counts for a machine: each process of torchrun has its share.
        share = args.workers // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        useful = 1 if self.ready else math.ceil(len(images) / 64)
        self.workers = max(1, min(share, useful))

    def __call__(self, batches):
        if self.ready:
            yield from (np.asarray(self.images[rows]) for rows in batches)
            return
        jobs = (self.images[rows] for rows in batches)    # pixels (b, h, w, C) or files (b,)
        # Two batches more than workers: none idles while a batch is written.
        results = common.work_ahead(self.pool, self.work, jobs, depth=self.workers + 2)
        for rows, (pixels, faults, all_grey) in zip(batches, results):
            self.faults |= {int(rows[place]): fault for place, fault in faults.items()}
            self.all_grey &= all_grey
            yield pixels

    def outcome(self):
        """({row: fault} in their order, whether all images were grey), of all processes."""
        # Each process has seen its rows alone.
        shares = common.gather((self.faults, self.all_grey))
        everyone = common.from_rank0(lambda: shares)
        faults = {row: fault for share, _ in everyone for row, fault in share.items()}
        return dict(sorted(faults.items())), all(grey for _, grey in everyone)


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
    """FILE, uint8 (n, H, W, C), of the images. Returns (its memory map, {row: fault}, all grey)."""
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
        pixels, faults, all_grey = decode_split(args, split.images, place / f"{prefix}images.npy")
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
            write_pngs(args.out, source, args.workers)
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


def write_pngs(out, source, workers):
    """OUT/[train|test/]CLASS/INDEX.png, where INDEX is the row in the source."""
    # A name that was read from a file must not lead out of the folder.
    folders = [re.sub(r"[^\w\-. ]+", "_", c).strip(". ") for c in source.classes]
    if len({name.lower() for name in folders} - {""}) < len(folders):
        folders = [f"{k:04d}_{name}" for k, name in enumerate(folders)]
    for prefix, split in source.splits.items():
        top = out
        if source.test:
            top = out / ("test" if prefix else "train")
        for k in np.unique(split.labels):
            (top / folders[k]).mkdir(parents=True, exist_ok=True)
        names = [top / folders[k] / f"{row:06d}.png" for k, row in zip(split.labels, split.rows)]
        firsts = range(0, len(names), 64)
        # Portions: a job for each file would cost more than the file.
        portions = [names[lo:lo + 64] for lo in firsts]
        with common.open_pool(min(workers, len(portions))) as pool:
            files = itertools.repeat(split.images.filename)
            done = pool.map(save_pngs, files, firsts, portions)
            for _ in common.progress(done, total=len(portions), desc="writing", leave=False):
                pass
    # It keeps the order of the labels.
    common.save_text(out / "classes.txt", "\n".join(folders) + "\n")


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
# UCI ML repository, Alpaydin & Kaynak 1998, CC BY 4.0; tests/test_data.py makes it once more.
DIGITS = Path(__file__).resolve().parent / "data" / "digits.npz"
DIGIT_NAMES = "zero one two three four five six seven eight nine".split()


@dataclasses.dataclass
class Split:
    """The training or the held-out images of a source."""
    images: np.ndarray    # pixels uint8 (n, h, w, C), or files, objects (n,)
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
    """A data set before it is decoded. A further kind of source is one function that returns it."""
    classes: list         # K names
    train: Split
    test: Split = None
    parent: str = None    # sha256 of the data folder that it is

    @property
    def splits(self):
        """{what the names of a split's files begin with: split}"""
        both = {"": self.train, "test_": self.test}
        return {prefix: split for prefix, split in both.items() if split}


def of_array(name, images, labels):
    """A Split out of the array of this name."""
    return Split(images, labels, [f"{name}[{row}]" for row in range(len(images))])


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


def natural(name):
    """Sort key that puts image10 after image9."""
    return [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", name)], name


def printable(name):
    """One line of text: file names may hold line breaks or bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else "?" for c in name)


def visible(folder):
    """What a folder holds, in natural order."""
    paths = [p for p in folder.iterdir() if not p.name.startswith((".", "__MACOSX"))]
    return sorted(paths, key=lambda p: natural(p.name))


def image_files(folder, suffixes):
    """(image files below `folder` in natural order, how many others); links are followed."""
    found = []
    others = 0
    seen = {os.path.realpath(folder)}
    for path, folders, names in os.walk(folder, followlinks=True):
        shown = [f for f in folders if not f.startswith(".")]
        real = {f: os.path.realpath(os.path.join(path, f)) for f in shown}
        # A link to a folder above would lead round in circles.
        folders[:] = [f for f in shown if real[f] not in seen]
        seen.update(real.values())
        names = [n for n in names if not n.startswith(".")]
        images = [n for n in names if os.path.splitext(n)[1].lower() in suffixes]
        found += [os.path.join(path, n) for n in images]
        others += len(names) - len(images)
    return [Path(p) for p in sorted(found, key=natural)], others


def class_folders(root, suffixes):
    """Names of the folders in `root`, in natural order; says which images lie beside them."""
    paths = visible(root)
    folders = [p.name for p in paths if p.is_dir()]
    loose = sum(p.suffix.lower() in suffixes for p in paths if p.is_file())
    if folders and loose:
        common.log(f"data.py: warning: {loose} images lie in {root} itself, beside the class "
                   "folders; they have no class and are left out")
    return folders


def ordered(classes, file):
    """The classes in the order of a classes.txt, where there is one that names them all."""
    if not (classes and file.is_file()):
        return classes
    order = file.read_text(encoding="utf-8", errors="replace").splitlines()
    if sorted(order) == sorted(classes):
        return order
    common.log(f"data.py: note: {file} does not name the class folders and is left out of account")
    return classes


def scan_split(root, classes, suffixes, held_out=False):
    """(Split of the files in the class folders of `root`, or in itself; how many others)."""
    files = []
    labels = []
    others = 0
    # Without classes the folder itself is the only one.
    for k, name in enumerate(classes or [""]):
        folder = root / name
        # A class may be missing among held-out images.
        if held_out and not folder.is_dir():
            continue
        mine, rest = image_files(folder, suffixes)
        kind = "class folder" if classes else "folder"
        common.need(mine, f"{folder}: no image in this {kind}; remove it or fill it")
        files += mine
        labels += [k] * len(mine)
        others += rest
    names = [printable(str(f.relative_to(root))) for f in files]
    return Split(np.asarray(files, object), labels, names), others


def scan_folder(top):
    """A folder of images as a source: lists of files, nothing decoded."""
    from PIL import Image
    # Pillow knows all its formats only after this.
    Image.init()
    suffixes = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    names = {p.name for p in visible(top) if p.is_dir()}
    root = top
    # Beside other folders "train" may well be a class.
    apart = "train" in names and names <= {"train", "test", "val"}
    if apart:
        root = top / "train"
    classes = ordered(class_folders(root, suffixes), top / "classes.txt")
    train, others = scan_split(root, classes, suffixes)
    source = Source([printable(c) for c in classes] or ["image"], train)
    if apart and len(names) > 1:
        # Where both are there, test/ is the one that nobody has tuned on.
        held_out = top / ("test" if "test" in names else "val")
        theirs = class_folders(held_out, suffixes)
        alike = bool(theirs) == bool(classes) and set(theirs) <= set(classes)
        common.need(alike, f"{held_out}: its class folders do not match those of {root}; both need "
                           "the same names")
        source.test, more = scan_split(held_out, classes, suffixes, held_out=True)
        others += more
    if others:
        common.log(f"data.py: {others} files without the suffix of an image format are left out")
    return source


def npz_split(path, arrays, name, labels):
    """The Split in two arrays of an .npz, checked. All labels are 0 where they are not there."""
    x = arrays[name]    # (n, H, W) or (n, H, W, C)
    common.need(x.dtype == np.uint8 and x.ndim in (3, 4) and 0 not in x.shape
                and x.shape[3:] in ((), (1,), (3,)),
                f"{path}: {name} is {x.dtype} {x.shape}, but must be uint8 (N, H, W) or (N, H, W, "
                "1 or 3), values 0..255")
    y = arrays.get(labels, np.zeros(len(x), np.int64))    # (n,) or (n, 1)
    common.need(y.dtype.kind in "iu" and y.shape in ((len(x),), (len(x), 1)),
                f"{path}: {labels} is {y.dtype} {y.shape}, but must be integers ({len(x)},): one "
                f"for each of the {name}")
    return of_array(name, x.reshape(*x.shape[:3], -1), y.reshape(-1))    # (n, H, W, C), (n,)


def npz_test(path, arrays, train):
    """The held-out Split of an .npz."""
    common.need("test_labels" in arrays or "labels" not in arrays,
                f"{path}: test_labels is missing, but there are labels; give both or none")
    test = npz_split(path, arrays, "test_images", "test_labels")
    shape = train.images.shape[1:]
    common.need(test.images.shape[1:] == shape, f"{path}: test_images are {test.images.shape[1:]}, "
                                                f"but images are {shape}; both must be alike")
    low, high = test.labels.min(), test.labels.max()
    most = train.labels.max()
    common.need(low >= 0 and high <= most, f"{path}: test_labels run {low}..{high}, but must be "
                                           f"among the labels, 0..{most}")
    return test


def npz_classes(path, arrays, num_classes):
    """The class names of an .npz, or their numbers."""
    if "classes" not in arrays:
        return ["image"] if num_classes == 1 else [str(k) for k in range(num_classes)]
    # Bytes or text, of any shape.
    names = [printable(str(c)) for c in arrays["classes"].astype(str).ravel()]
    common.need(len(names) == len(set(names)) == num_classes,
                f"{path}: {len(names)} names in 'classes' for {num_classes} classes; there must be "
                "one each, all different")
    return names


def read_npz(path):
    """An .npz as a source."""
    names = "images labels classes test_images test_labels arr_0 arr_1".split()
    what = ("an .npz of np.savez(path, images=..., labels=...) with images uint8 (N, H, W, C), or "
            "ADM's arr_0 and arr_1,")
    arrays = common.load_npz(path, names, what)
    if "images" not in arrays:
        # ADM's sample files have names by number.
        of_adm = {"arr_0": "images", "arr_1": "labels"}
        arrays = {of_adm.get(name, name): array for name, array in arrays.items()}
    common.need("images" in arrays, f"{path}: holds {', '.join(arrays)}, but 'images' uint8 (N, H, "
                                    "W, C) is needed, or ADM's 'arr_0'")
    train = npz_split(path, arrays, "images", "labels")
    low, high = train.labels.min(), train.labels.max()
    # Counting comes last: a huge label would ask for a huge array.
    common.need(low >= 0 and high < len(train.labels) and np.bincount(train.labels).all(),
                f"{path}: labels run {low}..{high}, but must be 0..K-1 with at least one image of "
                "each class")
    source = Source(npz_classes(path, arrays, high + 1), train)
    if "test_images" in arrays:
        source.test = npz_test(path, arrays, train)
    return source


def open_pixels(folder):
    """common.open_data of a folder that has to hold pixels."""
    data = common.open_data(folder, pixels=False)
    origin = data.info.get("source", "see its dataset.json")
    common.need(data.images is not None, f"{folder}: holds latents only; take the source that it "
                                         f"was made from, {origin}")
    return data


def read_data_folder(folder):
    """A data folder made earlier as a source."""
    data = open_pixels(folder)
    # Memory maps: what is not asked for is not read.
    train = of_array("images", data.images, data.labels)
    file = folder / "files.txt"
    if file.exists():
        train.names = np.asarray(common.load_lines(file), object)
    common.need(len(train.names) == len(data.labels), f"{file}: {len(train.names)} names for "
                f"{len(data.labels)} images; make the data folder again")
    source = Source(data.classes, train, parent=data.info["sha256"])
    if data.test_images is not None:
        source.test = of_array("test_images", data.test_images, data.test_labels)
    return source


def kind_of(source):
    """digits, cifar10, npz, data or folder."""
    if source in ("digits", "cifar10"):
        return source
    path = Path(source)
    if path.is_file():
        return "npz"
    if (path / "dataset.json").is_file() and (path / "labels.npy").is_file():
        return "data"
    return "folder"


def read_source(args):
    """The Source that the command line names."""
    kind = kind_of(args.source)
    if kind == "digits":
        return dataclasses.replace(read_npz(DIGITS), classes=list(DIGIT_NAMES))
    if kind == "cifar10":
        return read_cifar10(args.root)
    readers = {"npz": read_npz, "data": read_data_folder, "folder": scan_folder}
    return readers[kind](Path(args.source))


def load_source(args):
    """The source, its training images reduced to --indices."""
    # Rank 0 comes first: it may download.
    if common.rank():
        common.barrier(patient=True)
    source = read_source(args)
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
    kind = kind_of(args.source)
    inputs = {"indices": args.indices, "npz": {"digits": DIGITS, "npz": args.source}.get(kind)}
    if kind == "data":
        inputs["data"] = open_pixels(Path(args.source)).info
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
    return common.Stage("data", args, inputs, outputs, free=["workers", "root", "batch_size"],
                        stale=stale, scraps=[BEGUN, "latents.seconds.json"], parts=parts, late=True)


# ------------------------------------------------------------------------------------ command line
def parse_args(argv=None):
    # A container may have fewer cores than its machine.
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lean-diffusion"
    p = common.Parser(__doc__)
    p.add_argument("source", help="digits, cifar10, a folder of images, an .npz, or a data folder "
                                  "made earlier")
    p.add_argument("--out", type=Path, required=True, help="the data folder to write")
    p.add_argument("--size", type=common.number(int, low=1, high=65500),
                   help="side of the square images; without it all must have one size")
    p.add_argument("--root", type=Path, default=cache,
                   help="cifar10 only: holds cifar-10-batches-py, or gets the download")
    p.add_argument("--indices", type=Path, help="keep.npy of prune.py or attach.py: export these "
                                                "training images; a held-out split goes along")
    p.add_argument("--vae", help="also encode to latents: stabilityai/sd-vae-ft-ema, another "
                                 "AutoencoderKL of diffusers, or its folder")
    p.add_argument("--latents-only", action="store_true", help="with --vae: store no pixels")
    p.add_argument("--batch-size", type=common.count, default=32,
                   help="images that the VAE encodes at a time, over all processes")
    p.add_argument("--as-folder", action="store_true",
                   help="write a folder of PNG files instead of arrays")
    p.add_argument("--skip-bad", action="store_true",
                   help="leave unreadable images out, name and count them, instead of stopping")
    p.add_argument("--workers", type=common.number(int, low=1, high=1024), default=cores,
                   help="processes that decode; does not change the result")
    common.add_run_flags(p, seed="draws the images of preview.png",
                         overwrite="make the folder again although it stands")
    args = p.parse_args(argv)
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
    common.need(path.exists(), f"{args.source}: no such source; give digits, cifar10, a folder of "
                               "images or an .npz file")
    common.need(path.is_dir() or path.suffix.lower() == ".npz",
                f"{args.source}: neither a folder nor an .npz file; a source is digits, cifar10, "
                "FOLDER or FILE.npz")
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
    if args.source not in ("digits", "cifar10"):
        args.source = checked_path(args)
    if args.vae and Path(args.vae).is_dir():
        args.vae = str(Path(args.vae).resolve())
    common.need(not (args.skip_bad and args.indices) or kind_of(args.source) == "data",
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
            return
        # The description comes last, and says that all but the latents is there.
        file = args.out / (BEGUN if vae else "dataset.json")
        begun = common.from_rank0(lambda: stage.resuming and file.exists())
        # Pixels that stand need no source any more.
        source = None
        if args.latents_only or not begun:
            source = load_source(args)
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
        stage.finish()
    say(args, info, time.time() - start)


if __name__ == "__main__":
    main()
