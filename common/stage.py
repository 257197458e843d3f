"""One output folder while a script writes to it: the lock, the resume rule and the record.

The only file that knows how a stage is resumed. Two rules keep it small: everything that flags name
is loaded before anything is written, and a record binds only while an output, or a part of one,
stands. So nothing has to be undone after an error.
"""
import contextlib
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError, need
from common.files import free_for_output, load_record, save_json, save_npy, sha256, sweep
from common.processes import barrier, from_rank0, log, rank, world


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
    open     flags that are recorded and may differ on a resume, which is said then
    late     the block itself calls begin(), once it has made what takes the place of the old
    stale    patterns that a call which begins anew removes: what another call left must not pass
             for its own
    scraps   patterns that only a resume needs: finish() removes them
    parts    further names that bind the record while they stand (of X.npy, X.part.npy does so)

    In the block `.done` says that nothing is left to do, and `.resuming` that an earlier,
    interrupted call with the same arguments began here.
    """

    def __init__(self, script, args, inputs=(), outputs=(), free=(), stale=(), scraps=(), parts=(),
                 ready=None, load=None, late=False, open=()):
        self.script = script
        self.out = Path(args.out)
        self.file = self.out / f"{script}.args.json"
        self.outputs = outputs
        self.ready = ready or (lambda: True)
        self.load = load or (lambda: None)
        self.late = late
        self.open = open
        self.overwrite = getattr(args, "overwrite", False)
        self.inputs = dict(inputs)
        self.unbound = {"out", "overwrite", "device", *free}
        self.args = {k: v for k, v in vars(args).items() if k not in self.unbound}
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
        changed = []
        for part, noun in (("args", "--{}"), ("inputs", "the input '{}'")):
            # An earlier version may have bound a flag that is free by now.
            free = self.unbound if part == "args" else ()
            for key in sorted({*old[part], *new[part]}.difference(free)):
                was = old[part].get(key)
                now = new[part].get(key)
                name = noun.format(key.replace("_", "-"))
                if part == "args" and key in self.open:
                    changed += [f"{name} = {was}, now {now}"] * (was != now)
                    continue
                need(was == now, f"{self.out}: was made with {name} = {was}, now {now}; use "
                                 "another --out, or --overwrite to redo it")
        standing = all((self.out / name).exists() for name in self.outputs)
        done = old["seconds"] is not None and standing and self.ready()
        if changed and not done:
            log(f"note: {self.out} was begun with {', '.join(changed)}: it goes on otherwise than "
                "it would have gone where it began")
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
