"""What the stages read of each other: data folder, kept indices, checkpoint, encoder by name."""
import argparse
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from common.errors import UserError, need, reading, user_errors
from common.files import (check_finite, fields, load_json, load_lines, load_npy, load_pt,
                          load_record, save_pt, sweep)
from common.processes import barrier, log, rank

ANEW = "make the data folder again with data.py"


# ------------------------------------------------------------------------------------- data folder
def open_data(folder, pixels=True):
    """A data folder of stage 0, checked: counts, dtypes, range of the labels.

    Returns a namespace: images uint8 (N, H, W, C) (a memory map, or None), latents (likewise),
    labels int64 (N,), classes, num_classes, info (dataset.json), test_images, test_labels, folder.
    pixels=False accepts a folder that holds latents only. Raises UserError that names the file.
    """
    folder = Path(folder)
    need(folder.is_dir(), f"{folder}: no such data folder; make it with: python data.py digits|"
                          f"cifar10|FOLDER|FILE.npz --out {folder}")
    info = load_json(folder / "dataset.json", "the data folder's description, written by data.py,")
    fields(folder / "dataset.json", info, sha256=str, name=str)
    data = SimpleNamespace(folder=folder, info=info, images=None, latents=None,
                           test_images=None, test_labels=None)
    data.classes = load_lines(folder / "classes.txt")
    data.num_classes = len(data.classes)
    data.labels = load_labels(folder / "labels.npy", "labels, int64 (N,)", data.num_classes)
    n = len(data.labels)
    if (folder / "latents.npy").exists():
        shape = (n, None, None, None)
        what = "latents, float16 (N, 2c, h, w)"
        data.latents = load_npy(folder / "latents.npy", what, shape, "f")
    if pixels or (folder / "images.npy").exists():
        shape = (n, None, None, None)
        data.images = load_images(folder / "images.npy", "images, uint8 (N, H, W, C)", shape)
    else:
        need(data.latents is not None, f"{folder}: neither images.npy nor latents.npy; {ANEW}")
    if (folder / "test_images.npy").exists():
        what = "held-out labels, int64 (n,)"
        data.test_labels = load_labels(folder / "test_labels.npy", what, data.num_classes)
        sides = (None,) * 3 if data.images is None else data.images.shape[1:]
        shape = (len(data.test_labels), *sides)
        what = "held-out images, uint8 (n, H, W, C)"
        data.test_images = load_images(folder / "test_images.npy", what, shape)
    return data


def load_labels(path, what, num_classes):
    """Labels int64 (N,), each of them one of the classes."""
    labels = np.array(load_npy(path, what, (None,), "iu"), dtype=np.int64)
    need(len(labels), f"{path}: holds no label; {ANEW}")
    low, high = labels.min(), labels.max()
    names = path.parent / "classes.txt"
    need(low >= 0 and high < num_classes,
         f"{path}: labels run {low}..{high}, but {names} names {num_classes} classes; {ANEW}")
    return labels


def load_images(path, what, shape):
    """A memory map of images uint8 (N, H, W, 1 or 3)."""
    images = load_npy(path, what, shape, "u")
    sound = images.dtype == np.uint8 and images.shape[3] in (1, 3) and 0 not in images.shape
    need(sound, f"{path}: {images.dtype} {images.shape}, but images must be uint8 (N, H, W, 1 or "
                f"3); {ANEW}")
    return images


def check_classes(data, per_class=None, remedy="lower it"):
    """Every class must hold an image, or `per_class` of them; the line names the smallest."""
    sizes = np.bincount(data.labels, minlength=data.num_classes)
    least = f"class {data.classes[np.argmin(sizes)]!r}"
    need(sizes.all(), f"{data.folder}: {least} has no image; make the folder again without it")
    need(not per_class or per_class <= sizes.min(),
         f"--per-class {per_class}: {least} has only {sizes.min()} images; {remedy}")


def rows_by_class(labels, num_classes):
    """[rows (n_c,) of class c, ascending]; one sort, not a pass over all labels per class."""
    order = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.bincount(labels, minlength=num_classes))
    return np.split(order, ends[:-1])


# ----------------------------------------------------------------------------- scores, kept sets
def load_features(path, data):
    """Features (N, D) of all images made earlier: a memory map, and the seconds that they took.

    The seconds stand beside the file, or are 0.
    """
    path = Path(path)
    n = len(data.labels)
    features = load_npy(path, f"features, float (N = {n}, D)", (n, None), "f")
    check_origin(path, data)
    need(features.shape[1], f"{path}: features of width 0; extract them again")
    if rank() == 0:
        check_finite(features, path, "features", rows=8192)
    note = path.with_suffix(".seconds.json")
    if not note.exists():
        return features, 0.0
    return features, load_json(note, "the seconds of the extraction", (int, float))


def load_scores(path, data, what, dtype=np.float64, unpicked=False):
    """A number for each image (N,) made earlier. unpicked: what was not picked may be at -inf."""
    n = len(data.labels)
    stored = load_npy(path, f"{what}, float (N = {n},)", (n,), "f")
    # A number beyond float32 becomes infinite, which the next lines refuse.
    with np.errstate(over="ignore"):
        scores = np.array(stored, dtype)
    finite = np.where(np.isneginf(scores), 0, scores) if unpicked else scores
    check_finite(finite, path, what)
    check_origin(path, data)
    return scores


def check_origin(path, data):
    """A file of another stage says beside it of which data set it is: another one is refused."""
    for file in Path(path).parent.glob("*.args.json"):
        record = load_record(file)
        made_of = record["inputs"].get("data")
        if made_of not in (None, data.info["sha256"]):
            source = record.get("args", {}).get("data")
            raise UserError(f"{path}: was made from {source}, another data set than {data.folder} "
                            f"({data.info['name']}); make it again for this one")


def load_indices(path, n, labels=None, num_classes=None):
    """keep.npy: int64 (M,) sorted, distinct, in 0..n-1; with labels, every class keeps an image."""
    keep = np.array(load_npy(path, "kept indices, int64 (M,)", (None,), "iu"), dtype=np.int64)
    run = f"{keep.min()}..{keep.max()}" if len(keep) else "-..-"
    need(len(keep) and keep.min() >= 0 and keep.max() < n,
         f"{path}: indices run {run}, but the data set has images 0..{n - 1}; take indices that "
         "were made for it")
    need((np.diff(keep) > 0).all(),
         f"{path}: indices must be sorted and without repeats; np.unique(keep) makes them so")
    if labels is not None:
        counts = np.bincount(labels[keep], minlength=num_classes)
        need(counts.all(), f"{path}: class {np.argmin(counts)} keeps no image; keep at least one "
                           "of each class")
    return keep


def open_kept_images(folder, data, keep):
    """The data folder whose image j is image keep[j] of `data`, as both files.txt tell."""
    pixels = open_data(folder)
    ours = load_lines(data.folder / "files.txt")
    theirs = load_lines(pixels.folder / "files.txt")
    source = data.info.get("source", "SOURCE")
    same = (len(ours) == len(data.labels) and theirs == [ours[j] for j in keep]
            and np.array_equal(pixels.labels, data.labels[keep]))
    need(same, f"{folder}: its images are not the {len(keep)} of --indices, in their order; make "
               f"it with: python data.py {source} --indices keep.npy --out {folder}")
    return pixels


def load_text_file(path, data):
    """Text tokens (K, L, d) of the user's, and FILE_mask.npy (K, L) or, without it, all true."""
    what = f"text tokens, float (K = {data.num_classes}, L, d)"
    tokens = np.array(load_npy(path, what, (data.num_classes, None, None), "f"))
    need(tokens.size, f"{path}: shape {tokens.shape}: no token at all, but text tokens must be "
                      "(K, L, d)")
    beside = path.with_name(f"{path.stem}_mask.npy")
    if not beside.exists():
        return tokens, np.ones(tokens.shape[:2], bool)
    mask = np.array(load_npy(beside, f"text mask, bool {tokens.shape[:2]}", tokens.shape[:2], "b"))
    empty = ~mask.any(1)                                                 # (K,)
    need(not empty.any(), f"{beside}: masks every token of class "
                          f"{data.classes[np.argmax(empty)]!r}; each class needs one")
    return tokens, mask


def text_tokens(text, prompt, data, device):
    """What --text names: tokens (K, L, d) float16, mask (K, L) bool, and the seconds it took.

    text: minilm, FILE.npy, or a model of transformers, which reads `prompt` of every class.
    """
    from models import conditioning
    start = time.time()
    with user_errors():
        if text == "minilm":
            tokens, mask = conditioning.minilm_tokens(data.classes)
        elif text.endswith(".npy"):
            tokens, mask = load_text_file(Path(text), data)
        else:
            words = conditioning.class_words(data.classes)
            prompts = [prompt.replace("{class}", word) for word in words]
            tokens, mask = conditioning.text_tokens(text, prompts, device)
    with np.errstate(over="ignore"):
        half = np.asarray(tokens).astype(np.float16)
    check_finite(half, text, "the text tokens, as float16,")
    return half, mask, round(time.time() - start, 3)


# ---------------------------------------------------------------------------------------- networks
def load_checkpoint(path, official=None):
    """A checkpoint dict; official weights (a kind of OFFICIAL) as train.py would have written them.

    Official training checkpoints carry their flags as an argparse.Namespace. Only for them that one
    class is let in: it has no __setstate__, so loading it sets attributes and runs nothing.
    """
    need(not Path(path).is_dir(),
         f"{path}: a folder, where a checkpoint is wanted; of a Stable Diffusion make one first: "
         f"train.py --official sd --init {path} --steps 0 --data DATA --out OUT")
    if not official:
        return load_pt(path, "a checkpoint of train.py")
    from models.official import official_checkpoint
    state = load_pt(path, "official DiT/SiT weights", allow=[argparse.Namespace])
    try:
        return official_checkpoint(state, official)
    except ValueError as e:
        raise UserError(f"{path}: {e}") from e


def open_checkpoint(path, official=None):
    """(checkpoint dict, model of its EMA in eval mode, process) of such a file."""
    from models.build import from_checkpoint
    state = load_checkpoint(path, official)
    try:
        return state, *from_checkpoint(state)
    except (ValueError, FileNotFoundError, ImportError) as e:
        raise UserError(f"{path}: {e}") from e


def open_scorer(path, data, official=None):
    """(model, process, scale or None) of a checkpoint that can score the images of a data folder.

    scale: by which it wants the latents; None where it takes pixels. Official weights name no
    classes: theirs are taken to be in the order of the folder.
    """
    from models.conditioning import sides
    state, model, process = open_checkpoint(path, official)
    known = state["args"]
    wants = (model.channels, *sides(model.size))                         # (C, H, W)
    has = {}
    if data.images is not None:
        has["images"] = (data.images.shape[3], *data.images.shape[1:3])
    if data.latents is not None:
        has["latents"] = (data.latents.shape[1] // 2, *data.latents.shape[2:])
    held = " and ".join(f"{name} {shape}" for name, shape in has.items())
    need(wants in has.values(), f"{path}: a model of {wants}, but {data.folder} has {held}; use "
                                "another")
    need(model.num_classes == data.num_classes,
         f"{path}: a model of {model.num_classes} classes, but {data.folder} has "
         f"{data.num_classes}; use another checkpoint")
    scale = None
    if wants == has.get("latents"):
        note = data.folder / "latents.json"
        scale = load_json(note, "the description of the latents")["scale"]
        was = known.get("latent_scale")
        need(was in (None, scale), f"{path}: was trained on latents x {was}, {note} says {scale}: "
                                   "encode anew")
    classes = known.get("classes")
    if classes not in (None, data.classes):
        log(f"warning: {path} names its classes otherwise ({classes[0]!r} ..., not "
            f"{data.classes[0]!r} ...)")
    sound = all(p.isfinite().all() for p in model.parameters())
    need(sound, f"{path}: its weights hold NaN or infinity; use a checkpoint of a run that did not "
                "diverge")
    return model, process, scale


def open_encoder(name, data, device, weights=None, tokens=False, judge=0):
    """The encoder `name` for a data folder. scratch without weights: DATA/scratch.pt, made once.

    tokens: it must have patch tokens that float16 holds; those of the first image are tried.
    judge: which network of a file of scratch's, see open_judges().
    """
    from models import encoders
    with user_errors():
        if name == "scratch" and not weights:
            weights = own_scratch(data, device)
        try:
            encoder = encoders.load(name, device, weights=weights, images=data.images, judge=judge)
            if tokens:
                shape = encoders.extract(encoder, data.images, kind="tokens", rows=[0]).shape
                half = np.empty(shape, np.float16)
                encoders.extract(encoder, data.images, kind="tokens", rows=[0], out=half)
            return encoder
        except ValueError as e:
            if weights is None or str(weights) in str(e):
                raise
            raise UserError(f"{weights}: {e}; {data.folder} needs another")


def open_judges(name, data, device, weights=None, count=1):
    """[Encoder]: scratch as `count` networks of different seeds, any other encoder as itself.

    Of a file that the user names, all that are asked for must be in it.
    """
    from models import encoders
    if not encoders.ENCODERS[name].needs_labels:
        return [open_encoder(name, data, device, weights)]
    if weights:
        held = len(networks_in(weights))
        need(held >= count, f"{weights}: holds {held} network(s), fewer than --judges {count}; "
                            "give fewer, or leave the file out")
    # The first is tried before others are trained to stand beside it.
    judges = [open_encoder(name, data, device, weights)]
    if not weights:
        with user_errors():
            weights = own_scratch(data, device, count)
    return judges + [open_encoder(name, data, device, weights, judge=k) for k in range(1, count)]


def own_scratch(data, device, count=1):
    """DATA/scratch.pt with at least `count` networks, trained by rank 0 where missing."""
    path = data.folder / "scratch.pt"
    # One network is in every such file: it need not be read for that.
    if rank() == 0 and (count > 1 or not path.exists()):
        make_scratch(path, data, device, count)
    barrier(patient=True)
    return path


def networks_in(path):
    """[state of each network] of a scratch.pt; [] where it is not there or not readable."""
    from models.scratch import several
    if not Path(path).exists():
        return []
    what = "a file of scratch networks"
    states = several(load_pt(path, what))
    with reading(path, what, "remove it, and it is made again"):
        sound = all(isinstance(state[key], dict) for state in states
                    for key in ("model", "settings"))
    need(sound, f"{path}: not {what}; remove it, and it is made again")
    return states


def make_scratch(path, data, device, count=1):
    """See that the file holds `count` scratch networks (seeds 0, 1, ...) of the training set."""
    from models.scratch import add_networks, train_scratch
    states = networks_in(path)
    if len(states) >= count:
        return
    # Looked at first: what took minutes could not be kept.
    need(os.access(data.folder, os.W_OK),
         f"{path}: the scratch network is kept there, and {data.folder} cannot be written to; make "
         f"a folder of links that can: cp -rs {data.folder.resolve()} MINE, and give --data MINE")
    sweep(data.folder)               # a killed call may have left its half of the file

    def train(seed):
        log(f"training scratch network {seed} on {len(data.images):,} images, once: {path}")
        start = time.time()
        state = train_scratch(data.images, data.labels, data.num_classes, device, seed,
                              test_images=data.test_images, test_labels=data.test_labels)
        accuracy = "unknown" if state["accuracy"] is None else f"{state['accuracy']:.1%}"
        log(f"scratch network {seed}: held-out accuracy {accuracy}")
        return {**state, "seconds": time.time() - start}

    save_pt(path, add_networks(states[0] if states else None, count, train))
