"""What trainer and proxy are given: pixels or latents, weights, attachments, checkpoints."""

import numpy as np

from common.errors import need
from common.files import check_finite, fields, load_json, load_npy
from common.inputs import check_origin, load_indices
from common.loop import AMP
from common.processes import world

OURS = "use a checkpoint that train.py wrote"


def training_source(data):
    """(latents or images, channels, side or [height, width]) of what a network is trained on."""
    if data.latents is None:
        _, h, w, channels = data.images.shape
        source = data.images
    else:
        _, double, h, w = data.latents.shape         # mean and std of each channel
        source = data.latents
        channels = double // 2
    # A list, as a checkpoint holds it, where they are not square.
    return source, channels, h if h == w else [h, w]


def need_even_batch(batch, accumulate=1):
    """Every process gets as many images, and each of the parts into which it cuts them."""
    need(batch % (world() * accumulate) == 0,
         f"--batch-size {batch} is the global batch: it must be a multiple of processes x "
         f"accumulated parts = {world()} x {accumulate}")


def load_kept(path, data):
    """int64 (M,): the images to work on, those of keep.npy, or all; each class keeps one."""
    if not path:
        return np.arange(len(data.labels))
    check_origin(path, data)
    return load_indices(path, len(data.labels), data.labels, data.num_classes)


def load_class_weights(path, data):
    """weights.npy of reweight.py, float64 (K,)."""
    check_origin(path, data)
    what = f"class weights, float32 ({data.num_classes},)"
    w = np.array(load_npy(path, what, (data.num_classes,), "f"), np.float64)
    # One class may weigh nothing, but not all of them.
    need(np.isfinite(w).all() and (w >= 0).all() and w.any(),
         f"{path}: weights must be finite, not negative and not all zero; run reweight.py again")
    return w


def load_text(folder, num_classes):
    """Text tokens (K, L, d) and mask (K, L) of attach.py, or (None, None) where it made none."""
    if not (folder / "text.npy").exists():
        return None, None
    shape = (num_classes, None, None)                # (K, L, d)
    text = np.array(load_npy(folder / "text.npy", "text tokens, float16 (K, L, d)", shape, "f"))
    mask = load_npy(folder / "text_mask.npy", "text mask, bool (K, L)", text.shape[:2], "b")
    check_finite(text, folder / "text.npy", "text tokens")
    return text, np.array(mask)


def load_visual(folder, m):
    """Visual tokens float16 (M, [2,] T, d) of attach.py, a memory map, or None where it made none.

    The first rows are looked at; the others are when they are read.
    """
    path = folder / "visual.npy"
    if not path.exists():
        return None
    visual = load_npy(path, "visual tokens, float16 (M, [2,] tokens, d)", None, "f")
    shape = visual.shape
    sides = shape[1:-2]                              # () or, with flips, (2,)
    need(len(shape) in (3, 4) and shape[0] == m and sides in ((), (2,)) and 0 not in shape,
         f"{path}: shape {shape}, but {m} kept images need ({m}, tokens, d), or ({m}, 2, tokens, "
         "d) with flips; run attach.py again")
    check_finite(visual[:4096], path, "visual tokens")
    return visual


# ----------------------------------------------------------------------- a checkpoint's settings
def need_same(path, known, mine, ours, remedy="its weights would mean something else"):
    """A checkpoint whose settings `known` differ is refused; `ours` names what has these."""
    for name, value in mine.items():
        was = known.get(name)
        need(was == value, f"{path}: was trained with {name} = {was}, {ours} has {value}; {remedy}")


def need_trained_on(path, known, data):
    """A checkpoint that was trained on other images than those of a data folder is refused."""
    # The sha256 says that it is the same data set; the others say what differs, in words.
    _, channels, size = training_source(data)
    mine = {"num_classes": data.num_classes, "channels": channels, "size": size,
            "latents": data.latents is not None, "data_sha256": data.info["sha256"]}
    if data.latents is not None:
        note = data.folder / "latents.json"
        mine["latent_scale"] = load_json(note, "the description of the latents")["scale"]
    need_same(f"{path} (data set {known.get('data')})", known, mine,
              f"{data.folder} ({data.info['name']})", "train a reference on this data set")


def inherit_flags(args, kinds, path, known):
    """Flags left out take the values with which a checkpoint was trained; kinds {flag: type}."""
    for name in sorted(kinds):
        remedy = f"give --{name.replace('_', '-')}" if hasattr(args, name) else OURS
        need(name in known or getattr(args, name, None) is not None,
             f"{path}: does not say with which {name} it was trained; {remedy}")
    fields(path, known, **{name: kind for name, kind in kinds.items() if name in known})
    # Values of a later version, or of another trainer.
    for name, choices in (("amp", AMP), ("schedule", ("constant", "cosine"))):
        was = known.get(name)
        need(was in (None, *choices), f"{path}: was trained with {name} = {was!r}, which is none "
                                      f"of {', '.join(choices)}; {OURS}")
    for name in kinds:
        if getattr(args, name, None) is None:
            setattr(args, name, known[name])
