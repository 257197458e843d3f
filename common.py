"""What every stage shares: one clear line per user error, device and process group, atomic saves, checked loads, seeds, the resume rule.

Nothing here knows a paper. A stage that is lifted into other code needs only its own formulas, not this file.

    import common
    @common.command                       # UserError -> one line and exit code 2, SIGTERM -> exit code 143
    def main(argv=None): ...
"""
import argparse
import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch


# ---------------------------------------------------------------------------------------------- command line
class UserError(Exception):
    """A mistake of the user's: its text is the one line that is printed before exit code 2."""


class Parser(argparse.ArgumentParser):
    """argparse with the script's docstring as the manual page and errors of one line."""

    def __init__(self, doc, **kw):
        super().__init__(description=doc, formatter_class=_Help, allow_abbrev=False, **kw)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def number(kind=float, low=-math.inf, high=math.inf, above=-math.inf):
    """An argparse type: a finite int or float with low <= x <= high and x > above."""
    def parse(text):
        try:
            x = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a{'n integer' if kind is int else ' number'}")
        if not (-math.inf < x < math.inf and low <= x <= high and x > above):         # no isfinite: it overflows on a huge int
            bounds = [f"> {above:g}"] * (above > -math.inf) + [f">= {low:g}"] * (low > -math.inf) + [f"<= {high:g}"] * (high < math.inf)
            raise argparse.ArgumentTypeError(f"{text} is out of range: must be {' and '.join(bounds) or 'finite'}")
        return x
    return parse


count = number(int, low=1, high=2**40)                                # the type of every "how many" flag
seed_type = number(int, low=0, high=2**62)


def command(main):
    """Decorator of a script's main(argv): user errors, a full disk and SIGTERM end in one line and the right exit code."""
    @functools.wraps(main)
    def run(argv=None):
        script = Path(sys.modules[main.__module__].__file__).name if main.__module__ in sys.modules else main.__module__
        in_thread = True
        with contextlib.suppress(ValueError):                         # not the main thread: signals belong to somebody else
            old, in_thread = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)), False
        try:
            return main(argv)
        except UserError as e:
            print(f"{script}: error: {' '.join(str(e).split())}", file=sys.stderr)
            code = 2
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            print(f"{script}: error: {e.filename or 'output'}: {e.strerror}; the last complete files are intact, make room or rights and run "
                  "the same command again", file=sys.stderr)
            code = 2
        except KeyboardInterrupt:
            code = 130
        finally:
            if not in_thread:
                signal.signal(signal.SIGTERM, old)
            while _locks:                                             # main() called from Python: the folder is free again, however it ended
                os.close(_locks.pop())
        if world() > 1:                                               # a rank that fails must not leave the others waiting
            sys.stderr.flush()
            os._exit(code)
        raise SystemExit(code)
    return run


@contextlib.contextmanager
def user_errors():
    """Errors that models/ raises about what it was given (weights, names, shapes) are the user's to mend: one line, exit code 2."""
    try:
        yield
    except (ValueError, FileNotFoundError, ImportError) as e:
        raise UserError(str(e)) from e


def log(*parts):
    """Print on rank 0, at once."""
    if rank() == 0:
        print(*parts, flush=True)


def progress(iterable=None, **kw):
    """tqdm on rank 0; quiet when the output is not a terminal but for a line every 30 seconds."""
    from tqdm import tqdm
    return tqdm(iterable, disable=rank() != 0, mininterval=0.2 if sys.stderr.isatty() else 30, dynamic_ncols=True, **kw)


# ---------------------------------------------------------------------------------------------- device and processes
def world():
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    return int(os.environ.get("RANK", 0))


def get_device(name="auto"):
    """The torch device of this process; joins torchrun's process group (NCCL on CUDA, gloo on CPU) when there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such kind of device; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0)) if world() > 1 else device.index or 0
        if index >= torch.cuda.device_count():
            raise UserError(f"--device {name}: this machine shows {torch.cuda.device_count()} CUDA devices; use --device cpu or fewer processes")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"--device {name}: not available here; use auto, cpu, cuda or cuda:N")
    if world() > 1 and not torch.distributed.is_initialized():
        import datetime
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(
            seconds=int(os.environ.get("DIST_TIMEOUT", 1800))))
    return device


def single_process(script):
    """For scripts whose work is not shared out: under torchrun every process would do all of it and write the same files."""
    if world() > 1:
        raise UserError(f"{script} runs in one process; start it with python, not with torchrun")


def barrier():
    if world() > 1:
        torch.distributed.barrier()


def all_reduce(x):
    """Sum of a tensor over all processes, in place; the tensor itself for one process."""
    if world() > 1:
        torch.distributed.all_reduce(x)
    return x


def shard(n):
    """The contiguous part [lo, hi) of n rows that belongs to this rank; parts differ by at most one row."""
    return n * rank() // world(), n * (rank() + 1) // world()


def from_rank0(make):
    """make() on rank 0, its (JSON-like or array) value on every rank."""
    box = [make() if rank() == 0 else None]
    if world() > 1:
        torch.distributed.broadcast_object_list(box)
    return box[0]


AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device, amp):
    """The autocast context of `--amp bf16|fp16|none`."""
    return torch.autocast(device.type, dtype=AMP[amp] or torch.bfloat16, enabled=AMP[amp] is not None)


def optimizer_of(net, lr, device, amp):
    """AdamW without weight decay, and its scaler. One path for every precision: the scaler skips a non-finite step inside the fused kernel, without
    waiting for the device; only fp16 scales."""
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    scale, interval = (2.0**16, 2000) if amp == "fp16" else (1.0, 2**31 - 1)
    return optimizer, torch.amp.GradScaler(device.type, init_scale=scale, growth_interval=interval)


def lr_at(step, a):
    """Learning rate of step n from a.lr, a.warmup, a.schedule, a.steps: linear warm-up, then constant or a cosine to zero at the last step."""
    warm = min(1.0, (step + 1) / a.warmup) if a.warmup else 1.0
    return a.lr * warm * (0.5 * (1 + math.cos(math.pi * step / a.steps)) if a.schedule == "cosine" else 1.0)


def generator(seed, *key, device="cpu"):
    """A torch.Generator whose stream depends on (seed, key) alone; key holds ints and strings, e.g. (seed, 'noise', step)."""
    words = [zlib.crc32(k.encode()) if isinstance(k, str) else int(k) for k in key]
    state = np.random.SeedSequence([int(seed), *words]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


# ---------------------------------------------------------------------------------------------- files
@contextlib.contextmanager
def atomic(path):
    """Yields a temporary name beside `path`; on success it is flushed to disk and renamed, on any failure removed."""
    path = Path(path)
    fd, tmp = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=f".tmp{path.suffix}", dir=path.parent)
    os.close(fd)
    try:
        yield tmp
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.chmod(tmp, 0o666 & ~_umask())
        os.replace(tmp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(tmp)
        raise


@functools.lru_cache
def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_npy(path, array):
    with atomic(path) as tmp, open(tmp, "wb") as f:
        np.save(f, np.asarray(array), allow_pickle=False)


def save_pt(path, state):
    """Atomic torch.save. A full disk shows up inside torch as a RuntimeError of its zip writer: said as what it is."""
    with atomic(path) as tmp:
        try:
            with open(tmp, "wb") as f:
                torch.save(state, f)
        except RuntimeError as e:
            raise OSError(errno.ENOSPC, f"could not be written ({str(e).splitlines()[0][:80]})", str(path)) from e


def save_text(path, text):
    with atomic(path) as tmp:
        Path(tmp).write_text(text, encoding="utf-8")


def save_json(path, value):
    save_text(path, json.dumps(value, indent=1, allow_nan=False, default=float) + "\n")


def load_npy(path, what, shape=None, kind=None):
    """A read-only memory map of a .npy file, checked. shape: a tuple with None for "any"; kind: numpy kinds, e.g. 'iu' or 'f'.

    Raises UserError that names the file, what is wrong and what was expected. Never unpickles; a header that claims more than the file holds fails here.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file ({what} expected)")
    try:
        a = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as e:                                            # truncated, empty, pickled, not npy: numpy raises many kinds
        raise UserError(f"{path}: not a readable .npy file ({what} expected): {e}; write it again with the stage that makes it")
    if not isinstance(a, np.ndarray):
        raise UserError(f"{path}: an archive, not a .npy array ({what} expected)")
    if kind and a.dtype.kind not in kind:
        raise UserError(f"{path}: dtype {a.dtype}, but {what} must be {' or '.join(_KIND[k] for k in kind)}")
    if shape is not None and (a.ndim != len(shape) or any(s not in (None, n) for s, n in zip(shape, a.shape))):
        raise UserError(f"{path}: shape {a.shape}, but {what} must be ({', '.join('any' if s is None else str(s) for s in shape)})")
    return a


_KIND = {"i": "integers", "u": "unsigned integers", "f": "floats", "b": "booleans"}


def check_finite(a, path, what, rows=65536):
    """Raise UserError naming the first row of `a` that holds NaN or infinity; reads in chunks."""
    for lo in range(0, len(a), rows):
        ok = np.isfinite(np.asarray(a[lo:lo + rows])).reshape(min(rows, len(a) - lo), -1).all(1)
        if not ok.all():
            raise UserError(f"{path}: {what} has NaN or infinity, first in row {lo + int(np.argmin(ok))}; make it again")


def load_pt(path, what="a checkpoint"):
    """torch.load(weights_only=True) of a dict, on the CPU. Nothing in the file is executed."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file ({what} expected)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise UserError(f"{path}: not readable as {what} ({(str(e) or type(e).__name__).splitlines()[0][:120]}); it is damaged, or holds pickled code, which is never run")
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, but {what} is a dict")
    return state


def load_json(path, what):
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file ({what} expected)")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path}: not readable as JSON ({e}); {what} expected, write it again with the stage that makes it")


def save_grid(path, images, pad=1, least=48):
    """Write a PNG of images uint8 (rows, columns, H, W, C), with a white gap; small images are enlarged (nearest) to about `least` pixels."""
    from PIL import Image
    r, c, h, w, ch = images.shape
    sheet = np.full((r * (h + pad) + pad, c * (w + pad) + pad, ch), 255, np.uint8)
    for i in range(r):
        for j in range(c):
            sheet[i * (h + pad) + pad:(i + 1) * (h + pad), j * (w + pad) + pad:(j + 1) * (w + pad)] = images[i, j]
    zoom = max(1, round(least / h))
    with atomic(path) as tmp:
        picture = Image.fromarray(sheet.squeeze(-1) if ch == 1 else sheet)
        picture.resize((picture.width * zoom, picture.height * zoom), Image.NEAREST).save(tmp)


def sha256(path):
    """Hex sha256 of a file, read in blocks of 4 MB."""
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            h.update(block)
    return h.hexdigest()


def open_data(folder, pixels=True):
    """A data folder of stage 0: namespace with images (memory map or None), latents, labels, classes, num_classes, info, and test_images/test_labels.

    pixels=False accepts a folder that holds latents only. Checks counts, dtypes and label range; raises UserError that names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such data folder; make it with: python data.py digits|cifar10|FOLDER|FILE.npz --out {folder}")
    info = load_json(folder / "dataset.json", "the data folder's description, written by data.py,")
    d = SimpleNamespace(folder=folder, info=info, images=None, latents=None, test_images=None, test_labels=None)
    d.labels = np.array(load_npy(folder / "labels.npy", "labels, int64 (N,)", (None,), "iu"), dtype=np.int64)
    try:
        d.classes = (folder / "classes.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as e:
        raise UserError(f"{folder / 'classes.txt'}: not readable ({e}); make the data folder again with data.py")
    d.num_classes, n = len(d.classes), len(d.labels)
    if d.labels.min() < 0 or d.labels.max() >= d.num_classes:
        raise UserError(f"{folder / 'labels.npy'}: labels run {d.labels.min()}..{d.labels.max()}, but classes.txt names {d.num_classes} classes")
    if (folder / "latents.npy").exists():
        d.latents = load_npy(folder / "latents.npy", "latents, float16 (N, 2c, h, w)", (n, None, None, None), "f")
    if (folder / "images.npy").exists() or pixels:
        d.images = load_npy(folder / "images.npy", "images, uint8 (N, H, W, C)", (n, None, None, None), "u")
        if d.images.dtype != np.uint8 or d.images.shape[3] not in (1, 3):
            raise UserError(f"{folder / 'images.npy'}: {d.images.dtype} {d.images.shape}, but images must be uint8 (N, H, W, 1 or 3)")
    elif d.latents is None:
        raise UserError(f"{folder}: neither images.npy nor latents.npy; make the folder again with data.py")
    if (folder / "test_images.npy").exists():
        d.test_labels = np.array(load_npy(folder / "test_labels.npy", "held-out labels, int64 (n,)", (None,), "iu"), dtype=np.int64)
        d.test_images = load_npy(folder / "test_images.npy", "held-out images, uint8 (n, H, W, C)", (len(d.test_labels), *d.images.shape[1:]) if
                                 d.images is not None else None, "u")
    return d


def open_checkpoint(path, official=None):
    """(checkpoint dict, model of its EMA in eval mode, process) of train.py, or of official weights where official is 'dit' or 'sit'; errors name the
    file."""
    import models
    state = load_pt(path, "official DiT/SiT weights" if official else "a checkpoint of train.py")
    try:
        return state, *(models.from_official(state, official) if official else models.from_checkpoint(state))
    except ValueError as e:
        raise UserError(f"{path}: {e}") from e


def open_encoder(name, d, device, weights=None):
    """models.encoders.load for the data folder d. `scratch` without weights is DATA/scratch.pt, trained once (seed 0, the full training set) where absent.

    Under several processes rank 0 trains it and the others wait.
    """
    from models import encoders
    with user_errors():
        if name == "scratch" and not weights:
            weights = d.folder / "scratch.pt"
            if rank() == 0 and not weights.exists():
                log(f"training the scratch network on {len(d.images):,} images, once: {weights}")
                start = time.time()
                state = encoders.train_scratch(d.images, d.labels, d.num_classes, device, test_images=d.test_images, test_labels=d.test_labels)
                save_pt(weights, {**state, "seconds": time.time() - start})
                log(f"scratch network: held-out accuracy {'unknown' if state['accuracy'] is None else format(state['accuracy'], '.1%')}")
            barrier()
        return encoders.load(name, device, weights=weights, images=d.images, labels=d.labels, num_classes=d.num_classes)


def check_origin(path, d):
    """A file that another stage made says beside it, in <script>.args.json, of which data set: refused where that is not d."""
    for record in Path(path).parent.glob("*.args.json"):
        made = load_json(record, "a record").get("inputs", {}).get("data")
        if made not in (None, d.info["sha256"]):
            raise UserError(f"{path}: was made from another data set than {d.folder} ({d.info['name']}); make it again for this one")


def load_indices(path, n, labels=None, num_classes=None):
    """keep.npy: int64 (M,) sorted, distinct, in 0..n-1. With labels, every class must keep at least one image."""
    keep = np.array(load_npy(path, "kept indices, int64 (M,)", (None,), "iu"), dtype=np.int64)
    if len(keep) == 0 or keep.min() < 0 or keep.max() >= n:
        raise UserError(f"{path}: indices run {keep.min() if len(keep) else '-'}..{keep.max() if len(keep) else '-'}, but the data set has images 0..{n - 1}")
    if (np.diff(keep) <= 0).any():
        raise UserError(f"{path}: indices must be sorted and without repeats; np.unique(keep) makes them so")
    if labels is not None:
        missing = np.flatnonzero(np.bincount(labels[keep], minlength=num_classes) == 0)
        if len(missing):
            raise UserError(f"{path}: class {missing[0]} keeps no image; keep at least one of each class")
    return keep


# ---------------------------------------------------------------------------------------------- provenance and the resume rule
def provenance():
    """Code commit, library versions and device name: what a figure needs to be repeated."""
    try:
        commit = subprocess.run(["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty"], capture_output=True,
                                text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return {"commit": commit or "unknown", "python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores", "processes": world()}


_locks = set()                                                        # file descriptors of the folders that this process holds


class Stage:
    """One out folder while a script writes to it: the lock, the resume rule and `<script>.args.json`.

    inputs: {name: path of a file, or a data folder's info dict}; outputs: names that must stand for the stage to count as done;
    free: flags that may differ on a resume (logging, inference batch ...); ready(): a last word on whether the outputs suffice. After the call,
    `.done` says that nothing is left to do and `.resuming` that an earlier, interrupted call with the same arguments began here.
    """

    def __init__(self, script, out, args, inputs=(), outputs=(), free=(), overwrite=False, ready=None):
        self.out, self.script, self.outputs, self.ready, self.start = Path(out), script, outputs, ready or (lambda: True), time.time()
        self.file = self.out / f"{script}.args.json"
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"{self.out}: a file stands where the output folder should be; choose another --out")
        if rank() == 0:
            self._claim()
        mine = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in {"out", "overwrite", "device", *free}}
        hashes = {k: v["sha256"] if isinstance(v, dict) else sha256(v) for k, v in dict(inputs).items() if v is not None}
        self.record = {"args": mine, "inputs": hashes, "seconds": None, "provenance": provenance()}
        try:
            self.done, self.resuming, self.earlier = from_rank0(lambda: self._compare(overwrite))
        except BaseException:
            self.release()
            raise
        if self.done:
            log(f"{script}.py: {self.out} is complete and was made with these arguments; nothing to do (--overwrite makes it again)")
            self.release()
        elif rank() == 0:
            self._write(None)
        barrier()

    def _claim(self):
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.out):
                pass
        except OSError as e:
            raise UserError(f"{self.out}: cannot write there ({e.strerror}); choose another --out or mend the rights")
        self.lock = os.open(self.out, os.O_RDONLY)                    # the kernel drops it when the process dies, however it dies
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.lock)
            raise UserError(f"{self.out}: another process is writing there; wait for it or choose another --out")
        except OSError:                                               # a file system without locks
            log(f"{self.script}.py: note: {self.out} lies on a file system without locks; see to it that one process writes there")
        _locks.add(self.lock)

    def _compare(self, overwrite):
        if overwrite or not self.file.exists():
            return False, False, 0.0
        old = load_json(self.file, "the record of an earlier run")
        new = json.loads(json.dumps(self.record, default=float))
        for part, noun in (("args", "--{}"), ("inputs", "the input '{}'")):
            for k in sorted({*old[part], *new[part]}):
                a, b = old[part].get(k), new[part].get(k)
                if a != b:
                    raise UserError(f"{self.out}: was made with {noun.format(k.replace('_', '-'))} = {a}, now {b}; use another --out, or --overwrite to redo it")
        return old["seconds"] is not None and all((self.out / o).exists() for o in self.outputs) and self.ready(), True, old.get("spent", 0.0)

    def _write(self, seconds, **extra):
        save_json(self.file, {**self.record, "seconds": seconds, "spent": self.spent(), **extra})

    def spent(self):
        """Seconds of this call and of the interrupted ones before it (those that came as far as noting them)."""
        return round(self.earlier + time.time() - self.start, 3)

    def finish(self, **extra):
        """All outputs stand: note the seconds and what else is worth knowing, release the folder."""
        barrier()
        if rank() == 0:
            self._write(self.spent(), **extra)
        self.release()

    def release(self):
        if rank() == 0 and self.lock in _locks:
            _locks.remove(self.lock)
            os.close(self.lock)
