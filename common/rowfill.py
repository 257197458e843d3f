"""Large arrays, made row by row by all processes; an interrupted call goes on where it stopped."""
import functools
import math
import os
import time
from pathlib import Path

import numpy as np
import torch

from common.errors import user_errors
from common.files import allocate, check_finite, load_json, save_json, write_at
from common.processes import barrier, from_rank0, gather, log, progress, rank, shard, world


def fill(out, name, shape, dtype, batch, compute, stream=False):
    """OUT/name.npy of `shape`, row by row: compute(rows (b,)) -> (b, ...).

    Every process does its part; what an interrupted call did is kept, also under another number of
    processes. batch: rows at once, over all processes. stream: compute takes all that is to come,
    [rows (b,), ...], and yields the values of each, so that it can work ahead. Returns (read-only
    memory map, seconds of all processes together for the whole of it).
    """
    if not stream:
        compute = functools.partial(map, compute)
    final = Path(out) / f"{name}.npy"
    part = final.with_suffix(".part.npy")
    flags = final.with_suffix(".done.npy")
    note = final.with_suffix(".seconds.json")

    def missing():
        """(rows that are not done,), or None where nothing is left to do."""
        if final.exists() and note.exists():
            flags.unlink(missing_ok=True)            # a kill just before the end left it
            return None
        if not (part.exists() and flags.exists()):
            final.unlink(missing_ok=True)
            note.unlink(missing_ok=True)
            allocate(flags, np.uint8, shape[:1])     # the flags first: zeros are always true
            allocate(part, dtype, shape)
        return np.flatnonzero(np.load(flags, mmap_mode="r") == 0)

    # Only rank 0 looks: other nodes may see a new file late.
    todo = from_rank0(missing)
    if todo is not None:
        start = time.time()
        earlier = 0.0
        if rank() == 0 and note.exists():
            earlier = noted_seconds(note)
        lo, hi = shard(len(todo))
        fill_rows(part, flags, note, todo[lo:hi], max(1, batch // world()), compute, earlier)
        # Rank 0 goes on when the rows of all are on disk.
        spent = gather(time.time() - start)
        if rank() == 0:
            save_json(note, round(earlier + sum(spent), 3))
            os.replace(part, final)
            flags.unlink()
        barrier()
    rows = np.load(final, mmap_mode="r", allow_pickle=False)
    return rows, from_rank0(lambda: noted_seconds(note))


def fill_features(out, name, encoder, data, batch, noted=False, anew=False):
    """fill() with the encoder's pooled features of all images: OUT/name.npy float32 (N, D).

    noted: OUT/name.json says whose rows they are, and those of other data or of another encoder
    go; for a folder whose record does not say so. anew: they go in any case.
    """
    from models.encoders import extract
    n = len(data.images)
    D = encoder.width
    note = Path(out) / f"{name}.json"
    key = {"data": data.info["sha256"], "identity": encoder.identity, "shape": [n, D]}
    if noted and rank() == 0:
        if anew or not note.exists() or load_json(note, "whose the features are") != key:
            for file in Path(out).glob(f"{name}.*"):
                file.unlink()
            log(f"writing {4 * n * D / 1e9:.2f} GB of features ({n} x {D}) of {encoder.name}")
            save_json(note, key)

    def compute(rows):
        with user_errors():
            return extract(encoder, data.images, batch_size=len(rows), rows=rows)
    features, seconds = fill(out, name, (n, D), np.float32, batch, compute)
    if noted and rank() == 0:
        check_finite(features, Path(out) / f"{name}.npy", "features", rows=8192)
    return features, seconds


def fill_tokens(out, name, encoder, images, rows, flips, batch):
    """fill() with the encoder's patch tokens of images[rows]: OUT/name.npy float16 (M, T, d).

    flips: (M, 2, T, d), the mirrored image second. Numbers beyond float16 are refused.
    """
    from models.encoders import extract
    sides = 2 if flips else 1
    with user_errors():
        first = encoder.tokens(torch.from_numpy(np.array(images[rows[:1]])).to(encoder.device))
    _, T, d = first.shape
    shape = (len(rows), sides, T, d) if flips else (len(rows), T, d)
    log(f"writing {2 * math.prod(shape) / 1e6:,.1f} MB of tokens {shape} of {encoder.name}")

    def compute(places):
        v = np.empty((len(places), sides, T, d), np.float16)
        with user_errors():
            for side in range(sides):
                extract(encoder, images, batch_size=len(places), kind="tokens", out=v[:, side],
                        rows=rows[places], flip=side == 1)
        return v
    return fill(out, name, shape, np.float16, batch, compute)


def fill_rows(part, flags, note, todo, batch, compute, earlier):
    """Compute these rows and write each at its place; its flag is set after the row is on disk.

    Not through a shared memory map: two nodes that map one file over a network overwrite each
    other's pages.
    """
    head = np.load(part, mmap_mode="r")
    first_row = head.offset              # where row 0 and flag 0 lie in their files
    first_flag = np.load(flags, mmap_mode="r").offset
    width = head.dtype.itemsize * math.prod(head.shape[1:])
    start = noted = time.time()
    with (open(part, "rb+", 0) as rows, open(flags, "rb+", 0) as marks,
          progress(total=len(todo), desc=part.name.split(".")[0], delay=2) as bar):
        batches = [todo[k:k + batch] for k in range(0, len(todo), batch)]
        for ids, values in zip(batches, compute(batches)):
            values = np.ascontiguousarray(values, head.dtype)
            values = values.reshape(len(ids), *head.shape[1:])
            # Consecutive rows are written at once.
            gaps = np.flatnonzero(np.diff(ids) != 1) + 1
            runs = np.split(np.arange(len(ids)), gaps)
            for run in runs:
                write_at(rows, first_row + int(ids[run[0]]) * width, values[run])
            os.fsync(rows.fileno())
            for run in runs:
                write_at(marks, first_flag + int(ids[run[0]]), np.ones(len(run), np.uint8))
            bar.update(len(ids))
            if rank() == 0 and time.time() - noted > 30:
                # For a call that goes on after this one was killed.
                noted = time.time()
                save_json(note, round(earlier + world() * (noted - start), 3))
        os.fsync(marks.fileno())


def noted_seconds(note):
    """The seconds in a NAME.seconds.json."""
    return load_json(note, "the seconds taken", (int, float))
