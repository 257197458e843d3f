"""One output folder while a script writes to it: the lock, the resume rule and the record.

The only file that knows how a stage is resumed and where its inputs came from. Two rules keep it
small: everything that flags name is loaded before the folder is claimed, and a record binds only
while an output, or a part of one, stands. So nothing has to be undone after an error.
"""
import contextlib
import fcntl
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError, need, user_errors
from common.files import (allocate, check_finite, free_for_output, load_json, load_pt,
                          load_record, save_json, save_npy, sha256, sweep, write_at)
from common.processes import barrier, from_rank0, gather, log, progress, rank, shard, world


def provenance():
    """Code commit, library versions and device name: what a figure needs to be repeated."""
    here = os.path.dirname(os.path.abspath(__file__))
    git = ["git", "-C", here, "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    device = f"CPU, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {"commit": commit or "unknown", "python": sys.version.split()[0],
            "torch": torch.__version__, "numpy": np.__version__, "device": device,
            "processes": world()}


# --------------------------------------------------------------------------------------- the lock
@contextlib.contextmanager
def claim(out):
    """Make the folder `out`, see that it can be written to, and hold its lock until the block ends.

    The kernel drops the lock when the process dies, however it dies. Under several processes rank 0
    alone holds it.
    """
    out = Path(out)
    free_for_output(out)
    if rank():
        yield
        return
    made = [p for p in (out, *out.parents) if not p.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as e:
        raise UserError(f"{out}: cannot write there ({e.strerror}); choose another --out or mend "
                        "the rights")
    lock = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"{out}: another process is writing there; wait for it or choose another "
                        "--out")
    except OSError:
        log(f"note: {out} lies on a file system without locks; see to it that one process writes")
    try:
        yield
    finally:
        # A call that failed before its first output leaves no folder behind.
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        os.close(lock)


# ------------------------------------------------------------------------------------- the record
class Stage:
    """The resume rule over one output folder, and `<script>.args.json`, its record.

        with common.Stage("prune", args, inputs, outputs, free=["batch_size"]) as stage:
            if stage.done:
                return
            stage.save("keep.npy", keep)
            stage.finish(kept=len(keep))

    args     holds out and overwrite; they, device and the flags in `free` may differ on a resume
    inputs   {name: path of a file, or a data folder's info dict}, whose hashes the record keeps
    outputs  names that must stand for the stage to be done; ready() has the last word on that
    load     called where the stage is not done, before anything is removed or written: for what
             takes long to load, and may be refused
    late     the block itself calls begin(), once it has made what takes the place of the old
    stale    patterns that a call which begins anew removes: what another call left must not pass
             for its own
    scraps   patterns that only a resume needs: finish() removes them
    parts    further names that bind the record while they stand (of X.npy, X.part.npy does so)

    In the block `.done` says that nothing is left to do, and `.resuming` that an earlier,
    interrupted call with the same arguments began here.
    """

    def __init__(self, script, args, inputs=(), outputs=(), free=(), stale=(), scraps=(), parts=(),
                 ready=None, load=None, late=False):
        self.script = script
        self.out = Path(args.out)
        self.file = self.out / f"{script}.args.json"
        self.outputs = outputs
        self.ready = ready or (lambda: True)
        self.load = load or (lambda: None)
        self.late = late
        self.overwrite = getattr(args, "overwrite", False)
        self.inputs = dict(inputs)
        unbound = {"out", "overwrite", "device", *free}
        self.args = {k: v for k, v in vars(args).items() if k not in unbound}
        # What fill() leaves in the middle of an array belongs to the array.
        filling = [name.replace(".npy", end) for name in outputs if name.endswith(".npy")
                   for end in (".part.npy", ".done.npy")]
        self.scraps = scraps
        self.binding = (*outputs, *filling, *parts, *scraps)
        self.stale = (*stale, *scraps, *filling)
        self.earlier = 0.0               # seconds of the interrupted calls before this one

    def __enter__(self):
        self.start = time.time()
        self.claimed = contextlib.ExitStack()
        self.claimed.enter_context(claim(self.out))
        try:
            self.record = self._new_record()
            self.done, self.resuming, self.earlier = from_rank0(self._compare)
            if self.done:
                log(f"{self.script}.py: {self.out} is complete and was made with these arguments; "
                    "nothing to do (--overwrite makes it again)")
                if rank() == 0:
                    self._remove(self.scraps)
                barrier()
            elif not self.late:
                self.load()
                self.begin()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, kind, error, trace):
        # A call that failed before its first output leaves the place as if it had never been there.
        if kind is not None and rank() == 0 and not self._found(self.binding):
            self.file.unlink(missing_ok=True)
        self.claimed.close()

    def _new_record(self):
        args = {k: str(v) if isinstance(v, Path) else v for k, v in self.args.items()}
        hashes = {}
        for name, source in self.inputs.items():
            if rank() or source is None:
                continue
            if not isinstance(source, dict):
                flag = name.replace("_", "-")
                need(Path(source).is_file(), f"{source}: no such file (--{flag}); give one")
            hashes[name] = source["sha256"] if isinstance(source, dict) else sha256(source)
        return {"args": args, "inputs": hashes, "seconds": None, "provenance": provenance()}

    def _found(self, patterns):
        return sorted({file for pattern in patterns for file in self.out.glob(pattern)})

    def _remove(self, patterns):
        for file in self._found(patterns):
            file.unlink()

    def _compare(self):
        """(done, resuming, seconds of earlier calls); UserError where something else stands."""
        if self.overwrite or not self._found(self.binding):
            return False, False, 0.0
        if not self.file.exists():
            for name in self.outputs:
                need(not (self.out / name).exists(),
                     f"{self.out}: holds the {name} of another stage or of somebody else (no "
                     f"{self.file.name} beside it); choose another --out, or --overwrite to "
                     "replace it")
            return False, False, 0.0
        old = load_record(self.file)
        new = json.loads(json.dumps(self.record, default=float))
        for part, noun in (("args", "--{}"), ("inputs", "the input '{}'")):
            for key in sorted({*old[part], *new[part]}):
                was = old[part].get(key)
                now = new[part].get(key)
                name = noun.format(key.replace("_", "-"))
                need(was == now, f"{self.out}: was made with {name} = {was}, now {now}; use "
                                 "another --out, or --overwrite to redo it")
        standing = all((self.out / name).exists() for name in self.outputs)
        done = old["seconds"] is not None and standing and self.ready()
        return done, True, old.get("spent", 0.0)

    def begin(self):
        """What another call left goes, and the record of this one stands."""
        if rank() == 0:
            sweep(self.out)
            if not self.resuming:
                # The record goes first: killed from here on, what is left no longer counts as ours.
                self.file.unlink(missing_ok=True)
                self._remove(self.stale)
            self._write(None)
        barrier(patient=True)

    def _write(self, seconds, **extra):
        record = {**self.record, "seconds": seconds, "spent": self.spent(), **extra}
        save_json(self.file, record)

    def spent(self):
        """Seconds of this call and of the interrupted ones before it, as far as they noted them."""
        return round(self.earlier + time.time() - self.start, 3)

    def save(self, name, array):
        """OUT/name, a .npy, by rank 0."""
        if rank() == 0:
            save_npy(self.out / name, array)

    def finish(self, **figures):
        """All outputs stand: note the seconds and what else is worth knowing."""
        barrier(patient=True)
        if rank() == 0:
            self._write(self.spent(), **figures)
            self._remove(self.scraps)


# ------------------------------------------------------------------------------------- row by row
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


# -------------------------------------------------------------------------- what came before a run
# What a call of prune.py and of attach.py chose by, for records older than their `looked_at`. Other
# scores look at features, other selections at a difficulty.
OLD_SCORES = {"random": "nothing", "el2n": "labels", "ccs": "labels", None: "scores"}
OLD_SELECTIONS = {"random": "nothing", "all": "nothing", None: "nothing"}


@dataclass(frozen=True)
class Step:
    """One thing that had to be computed before a training run could start."""
    what: str                        # in words
    script: str                      # that computed it, train for a network; "" for other files
    role: str                        # chose (images), weighted (classes), aligned, started (a run)
    key: tuple                       # the same for two uses of one thing
    encoder: str = ""                # through whose eyes it looked at the images
    seconds: float | None = 0.0      # of all processes together; None: unknown


def upstream(record, run=""):
    """Yields every Step before a training run, by its record and those of the stages it names.

    record: train.args.json. run: what messages call the run, where the seconds are asked for too.
    Then every file must be there and every stage have finished, and networks are opened; else only
    records are read.
    """
    args = record["args"]
    walk = Upstream(args.get("data", ""), run)
    if args.get("indices"):
        yield from walk.follow(args["indices"], "kept set")
    if args.get("weights"):
        yield from walk.follow(args["weights"], "class weights", "weighted")
    if args.get("attach"):
        yield from walk.follow(args["attach"], "attachments")
    if args.get("init"):
        yield from walk.network(args["init"], "start weights", "started", args.get("official"))


def record_of(folder, script):
    """<script>.args.json of a folder, or None where the script never ran."""
    file = Path(folder) / f"{script}.args.json"
    return load_record(file) if file.exists() else None


def device_seconds(record, seconds):
    """What a script took by the clock, times the processes of its record (without one: one).

    The seconds of features, difficulty and tokens are noted so already.
    """
    if seconds is None:
        return None
    made = record or {}
    return seconds * (made.get("provenance") or {}).get("processes", 1)


class Upstream:
    """The walk of upstream(). Paths are as the records name them."""

    def __init__(self, data, run):
        self.data = data
        self.run = run
        self.visited = set()

    def file(self, path):
        path = Path(path)
        need(not self.run or path.exists(),
             f"{path}: no such file, but {self.run} was prepared with it; run report.py from the "
             "folder where the runs were made")
        return path

    def made(self, folder, script):
        """The record of a stage, or None where it never ran."""
        record = record_of(folder, script)
        unfinished = record is not None and record.get("seconds") is None
        need(not (self.run and unfinished),
             f"{folder}: {script}.py has not finished there, but {self.run} was prepared with it; "
             "run its command again")
        return record

    def follow(self, path, what, role="chose"):
        """The stages that made `path`, which was used as `what`, and those before them."""
        path = self.file(path)
        folder = path if what == "attachments" else path.parent
        here = folder.resolve()
        if (here, what) in self.visited:
            return
        self.visited.add((here, what))
        prune, reweight, attach = (self.made(folder, s) for s in ("prune", "reweight", "attach"))
        if prune:
            yield from self.pruned(prune, here, what, role)
        if reweight:
            yield from self.reweighted(reweight, here)
        if attach:
            yield from self.attached(attach, here, what, role, path.name == "difficulty.npy")
        if not (prune or reweight or attach):
            # A file of the user's own.
            yield Step(f"{what} ({path})", "", role, (path.resolve(), ""), seconds=None)

    def pruned(self, made, here, what, role):
        args = made["args"]
        looked_at = made.get("looked_at", OLD_SCORES.get(args.get("score"), "features"))
        given = args.get("features")                       # made by another call
        extracted = made.get("seconds_features") or 0
        scored = made.get("seconds_scores") or 0
        if what == "features":
            scored = 0
        elif given and looked_at != "features":
            extracted = 0                                  # the score does not look at them
        elif given and extracted and not record_of(Path(given).parent, "prune"):
            self.file(given)                               # prune.py read the seconds beside it
        elif given:
            extracted = 0
            yield from self.follow(given, "features", role)
        if what != "features" and args.get("scores"):
            yield from self.follow(args["scores"], "scores", role)
        seconds = extracted + scored
        if not seconds and not given and what != "features":
            seconds = made.get("seconds")                  # a record that does not tell them apart
        encoder = ""
        if looked_at == "labels":
            encoder = "scratch"              # other seeds, but the same network on the same labels
        elif looked_at == "features" and not given:
            encoder = args.get("surrogate")
        yield Step("features and scores", "prune", role, (here, "prune"), encoder, seconds)
        if looked_at == "features" and not given:
            yield from self.encoder(encoder, args.get("weights"), "surrogate network", role)

    def reweighted(self, made, here):
        args = made["args"]
        seconds = device_seconds(made, made.get("seconds"))
        yield Step("DRO proxy", "reweight", "weighted", (here, "proxy"), seconds=seconds)
        yield from self.network(args["reference"], "reference network", "weighted",
                                args.get("official"))

    def attached(self, made, here, what, role, scores_alone):
        """scores_alone: nothing of that call is used but its difficulty.npy."""
        args = made["args"]
        old = OLD_SELECTIONS.get(args.get("select"), "difficulty")
        origin = args.get("difficulty")                    # scored by an earlier call
        if scores_alone or made.get("looked_at", old) == "difficulty":
            home = Path(origin).parent.resolve() if origin else here
            encoder = "" if origin else "ddae"
            seconds = made.get("seconds_difficulty") or 0
            yield Step("difficulty", "attach", role, (home, "difficulty"), encoder, seconds)
            if origin:
                yield from self.follow(origin, "difficulty", role)
            else:
                yield from self.network(args["reference"], "scorer network", role,
                                        args.get("official"))
        if what == "attachments":
            yield from self.attachments(made, here)
        if args.get("indices") and not scores_alone:
            yield from self.follow(args["indices"], "kept set", role)

    def attachments(self, made, here):
        args = made["args"]
        encoder = args.get("visual")
        if encoder in (None, "none"):
            encoder = ""
        seconds = (made.get("seconds_text") or 0) + (made.get("seconds_visual") or 0)
        if encoder or seconds:
            yield Step("attachments", "attach", "aligned", (here, "attachments"), encoder, seconds)
        weights = args.get("visual_weights")
        if encoder == "ddae":
            weights = weights or args.get("reference")
        yield from self.encoder(encoder, weights, "visual encoder", "aligned")

    def encoder(self, name, weights, what, role):
        """The training of an encoder, where it is one that this project trains."""
        if name == "ddae":
            yield from self.network(weights, what, role)
        elif name == "scratch":
            file = self.file(weights or Path(self.data) / "scratch.pt")
            seconds = float(load_pt(file).get("seconds", 0)) if self.run else 0.0
            yield Step("scratch network", "", role, (file.resolve(), ""), seconds=seconds)

    def network(self, checkpoint, what, role, official=None):
        """The training of a diffusion model, up to this checkpoint."""
        path = self.file(checkpoint)
        folder = path.parent
        seconds = None                                     # that of official weights is unknown
        if self.run and not official:
            train = record_of(folder, "train")
            if path.name == "last.pt" and self.made(folder, "train"):
                seconds = device_seconds(train, train["train_seconds"])
            else:
                # Not what came after step_*.pt.
                seconds = device_seconds(train, load_pt(path).get("seconds"))
        yield Step(f"{what} ({folder.name})", "train", role, (folder.resolve(), "train"),
                   seconds=seconds)
