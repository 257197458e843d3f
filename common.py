"""What every stage shares: one clear line per user error, device and process group, atomic saves, checked loads, seeds, the resume rule.

Nothing here knows a paper. A stage that is lifted into other code needs only its own formulas, not this file.

    import common
    @common.command                       # UserError -> one line and exit code 2, SIGTERM -> exit code 143
    def main(argv=None): ...
"""
import argparse
import contextlib
import datetime
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
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

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        for before, x in zip(["", *args], args):                      # --indices "$KEEP" with KEEP unset must not mean "all images"
            if x == "" or x.startswith("--") and x.endswith("="):
                self.error(f"{x or before or 'an argument'}: is empty; give a value or leave it out")
        return super().parse_known_args(args, namespace)


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
batch_type = number(int, low=1, high=2**20)
seed_type = number(int, low=0, high=2**62)


def command(main):
    """Decorator of a script's main(argv): user errors, a full disk and SIGTERM end in one line and the right exit code."""
    @functools.wraps(main)
    def run(argv=None):
        script = Path(sys.modules[main.__module__].__file__).name if main.__module__ in sys.modules else main.__module__
        in_thread = True
        with contextlib.suppress(ValueError):                         # not the main thread: signals belong to somebody else
            old, in_thread = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)), False
        where = f" [rank {rank()} of {world()}]" * (world() > 1)
        try:
            with machine_errors():
                result = main(argv)
            if world() > 1 and torch.distributed.is_initialized():    # else a process that ends first aborts now and then
                torch.distributed.destroy_process_group()
            return result
        except UserError as e:
            print(f"{script}: error: {' '.join(str(e).split())}{where}", file=sys.stderr)
            code = 2
            for stage in _stages:
                stage.undo()
        except KeyboardInterrupt:
            code = 130
        except (Exception, SystemExit) as e:
            if world() == 1:
                raise
            code = e.code or 0 if isinstance(e, SystemExit) else 1
            if lost := isinstance(e, RuntimeError) and re.search(r"Ranks? ([\d, ]+) failed to pass monitoredBarrier|/gloo/|NCCL", str(e)):
                print(f"{script}: error: {f'rank {lost[1]}' if lost[1] else 'another process'} has ended, or did not come within DIST_TIMEOUT = "
                      f"{dist_timeout().total_seconds():.0f} s; torchrun names the first that failed (... {' '.join(str(e).split())[-160:]}){where}", file=sys.stderr)
            elif code == 1:
                traceback.print_exc()
        finally:
            if not in_thread:
                signal.signal(signal.SIGTERM, old)
            _stages.clear()
            while _locks:                                             # main() called from Python: the folder is free again, however it ended
                os.close(_locks.pop())
        if world() > 1:                                               # a rank that fails must not leave the others waiting
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        raise SystemExit(code)
    return run


@contextlib.contextmanager
def machine_errors():
    """A full disk, missing rights, a path that cannot be opened and too little memory are no bugs: one line, exit code 2. What else fails, shows."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"{e.filename or 'output'}: {e.strerror}; the last complete files are intact, make room or rights and run the same "
                            "command again") from e
        if e.errno is None or e.filename is None:
            raise
        raise UserError(f"{e.filename}: {e.strerror}; mend this path and run the same command again") from e
    except (MemoryError, RuntimeError) as e:
        if not (isinstance(e, MemoryError) or re.search("out of memory|not enough memory|allocate memory", str(e))):
            raise
        raise UserError(f"not enough memory ({str(e)[:160]}); use a smaller batch, image size or network, or another device") from e


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
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")                # huge pages for large CPU tensors: a tenth of a U-Net's step was page faults
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
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=dist_timeout())
        _groups.update((k, torch.distributed.new_group(backend="gloo", timeout=t)) for k, t in (("prompt", dist_timeout()), ("patient", PATIENCE)))
    return device


PATIENCE = datetime.timedelta(days=30)
_groups = {}                                                          # where processes meet and pass Python values: over CPU sockets, also beside NCCL


def dist_timeout():
    """How long processes wait for each other: DIST_TIMEOUT seconds, 30 minutes by default."""
    return datetime.timedelta(seconds=int(os.environ.get("DIST_TIMEOUT", 1800)))


def single_process(script):
    """For scripts whose work is not shared out: under torchrun every process would do all of it and write the same files."""
    if world() > 1:
        raise UserError(f"{script} runs in one process; start it with python, not with torchrun")


def barrier(group="prompt"):
    """All processes meet here; one that has ended or is DIST_TIMEOUT late ends them all, and rank 0 names it. "patient": rank 0 may be as late as it
    likes, for what it does alone takes hours on large data."""
    if world() > 1:
        limit = PATIENCE if group == "patient" and rank() else dist_timeout()
        torch.distributed.monitored_barrier(_groups[group], timeout=limit, wait_all_ranks=True)


def all_reduce(x):
    """Sum of a tensor over all processes, in place; the tensor itself for one process."""
    if world() > 1:
        torch.distributed.all_reduce(x, group=None if x.is_cuda else _groups["prompt"])
    return x


def shard(n):
    """The contiguous part [lo, hi) of n rows that belongs to this rank; parts differ by at most one row."""
    return n * rank() // world(), n * (rank() + 1) // world()


def from_rank0(make):
    """make() on rank 0, its (JSON-like or array) value on every rank; the others wait as long as it takes."""
    box = [make() if rank() == 0 else None]
    if world() > 1:
        barrier("patient")
        torch.distributed.broadcast_object_list(box, group=_groups["prompt"])
    return box[0]


def gather(value):
    """[the (JSON-like or array) value of every rank, in their order] on rank 0, None on the others."""
    box = [value] * world() if rank() == 0 else None
    if world() > 1:
        barrier()
        torch.distributed.gather_object(value, box, group=_groups["prompt"])
    return box


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
    """Yields a temporary name beside `path`; on success it is flushed to disk and renamed, on any failure removed. It is locked meanwhile: one that is
    not belongs to a process that was killed, see sweep()."""
    path = Path(path)
    fd, tmp = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=f".tmp{path.suffix}", dir=path.parent)
    try:
        with contextlib.suppress(OSError):                            # a file system without locks
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield tmp
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.chmod(tmp, 0o666 & ~_umask())
        os.replace(tmp, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.unlink(tmp)
        if isinstance(e, OSError) and e.errno is None:                # numpy's and Pillow's words for a short write
            raise OSError(errno.ENOSPC, f"could not be written ({str(e)[:80]})", str(path)) from e
        raise
    finally:
        os.close(fd)


def sweep(folder):
    """Remove the temporary files of atomic() in `folder` whose process was killed: the lock of a living one's file is held."""
    for path in Path(folder).iterdir():
        if re.fullmatch(r"\..+\.[a-z0-9_]{8}\.tmp(\.\w+)?", path.name) and path.is_file():
            with contextlib.suppress(OSError), open(path, "rb") as f:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


@functools.lru_cache
def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def need_disk(folder, size):
    """Raise UserError where the disk of an output folder has no room for so many bytes, before time is spent on them."""
    free_for_output(Path(folder))
    free = shutil.disk_usage(next(p for p in (Path(folder).absolute(), *Path(folder).absolute().parents) if p.exists())).free
    if size > free:
        raise UserError(f"{folder}: {size / 1e9:,.1f} GB will be written, the disk has {free / 1e9:,.1f} GB left; make room or ask for less")


def allocate(path, dtype, shape):
    """A .npy of zeros whose disk space is reserved, so that a full disk shows now and not hours later. Atomic."""
    with atomic(path) as tmp:
        np.lib.format.open_memmap(tmp, "w+", dtype, shape).flush()
        with open(tmp, "rb+") as f:
            try:
                os.posix_fallocate(f.fileno(), 0, os.path.getsize(tmp))
            except AttributeError:                                    # not every system has the call ...
                pass
            except OSError as e:                                      # ... and not every file system
                if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise OSError(e.errno, e.strerror, str(path)) from e


def fill(out, name, shape, dtype, batch, compute):
    """OUT/name.npy of `shape`, row by row: compute(rows (b,)) -> (b, ...). Every process does its part; what an interrupted call did is kept, also
    under another number of processes. batch: rows at once, over all processes.

    Returns (read-only memory map, seconds of all processes together for the whole of it). A flag per row is set after the row is on disk. Rows are
    written at their place in the file, not through a shared memory map: two nodes that map one file over a network overwrite each other's pages.
    """
    final, part, flags, note = (Path(out) / f"{name}{end}" for end in (".npy", ".part.npy", ".done.npy", ".seconds.json"))

    def missing():                                                    # (rows that are not done,), or None where nothing is left to do
        if final.exists() and note.exists():
            flags.unlink(missing_ok=True)                             # a kill just before the end left it
            return None
        if not (part.exists() and flags.exists()):
            for old in (final, note):
                old.unlink(missing_ok=True)
            allocate(flags, np.uint8, shape[:1])                      # the flags first: zeros are always true
            allocate(part, dtype, shape)
        return np.flatnonzero(np.load(flags, mmap_mode="r") == 0)
    todo = from_rank0(missing)                                        # only rank 0 looks: other nodes may see a new file late
    if todo is not None:
        start, width, batch = time.time(), np.dtype(dtype).itemsize * math.prod(shape[1:]), max(1, batch // world())
        earlier, noted = load_json(note, "the seconds taken", (int, float)) if rank() == 0 and note.exists() else 0.0, start
        head, first = (np.load(f, mmap_mode="r").offset for f in (part, flags))               # where row 0 and flag 0 lie in their files
        todo = todo[slice(*shard(len(todo)))]
        with open(part, "rb+", 0) as rows, open(flags, "rb+", 0) as marks, progress(total=len(todo), desc=name, delay=2) as bar:
            for k in range(0, len(todo), batch):
                ids = todo[k:k + batch]
                values = np.ascontiguousarray(compute(ids), dtype).reshape(len(ids), *shape[1:])
                runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(ids) != 1) + 1)   # [consecutive rows, ...]
                for r in runs:
                    write_at(rows, head + int(ids[r[0]]) * width, values[r])
                os.fsync(rows.fileno())
                for r in runs:
                    write_at(marks, first + int(ids[r[0]]), np.ones(len(r), np.uint8))
                bar.update(len(ids))
                if rank() == 0 and time.time() - noted > 30:          # for a call that goes on after this one was killed
                    noted = time.time()
                    save_json(note, round(earlier + world() * (noted - start), 3))
            os.fsync(marks.fileno())
        spent = gather(time.time() - start)                           # rank 0 goes on when all rows are on disk
        if rank() == 0:
            save_json(note, round(earlier + sum(spent), 3))
            os.replace(part, final)
            flags.unlink()
        barrier()
    return np.load(final, mmap_mode="r", allow_pickle=False), from_rank0(lambda: load_json(note, "the seconds taken", (int, float)))


def write_at(file, offset, array):
    """Write an array's bytes at `offset` of an unbuffered file; os.pwrite may write less than it was given."""
    left = memoryview(array).cast("B")
    while left:
        n = os.pwrite(file.fileno(), left, offset)
        left, offset = left[n:], offset + n


def save_npy(path, array):
    with atomic(path) as tmp, open(tmp, "wb") as f:                   # numpy must not see a file: its own way of writing hides a full disk at the end
        np.save(SimpleNamespace(write=f.write), np.asarray(array), allow_pickle=False)


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


def sound_rows(x, rows, path):
    """The tensor x (b, ...) that was read as these rows of a file; UserError names the first row that holds NaN or infinity."""
    if x.is_floating_point() and not (sound := x.isfinite().flatten(1).all(1)).all():
        raise UserError(f"{path}: NaN or infinity in row {rows[sound.tolist().index(False)]}; write the file again with the stage that makes it")
    return x


def named_twice(paths):
    """The first of these paths that names the same place as one before it, or None."""
    places = [Path(p).resolve() for p in paths]
    return next((p for k, p in enumerate(paths) if places[k] in places[:k]), None)


def free_memory():
    """Bytes that can be had: Linux counts what its file cache would give back, elsewhere all memory."""
    try:
        return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def load_npz(path, names, what):
    """{name: array} of those members of an .npz that are among `names`. What each claims to be is compared with its size in the archive and with
    memory before it is loaded; nothing is unpickled. what: the words for the file in messages."""
    headers, arrays = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}, {}
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file ({what} expected)")
    try:
        with zipfile.ZipFile(path) as z:
            members = {m.filename.removesuffix(".npy"): m for m in z.infolist()}
            for name in (n for n in names if n in members):
                with z.open(members[name]) as f:                      # first the header alone
                    shape, _, dtype = headers[np.lib.format.read_magic(f)](f)
                    claim, held = math.prod(shape) * dtype.itemsize, members[name].file_size - f.tell()
                if dtype.hasobject:
                    raise UserError(f"{path}: '{name}' holds pickled objects, which are never read; save it as a plain array")
                if claim != held:
                    raise UserError(f"{path}: damaged: '{name}' claims {claim} bytes but holds {held}; write the file again")
                if claim > free_memory():
                    raise UserError(f"{path}: '{name}' needs {claim / 1e9:.1f} GB of memory, more than is free; use a folder of images")
                with z.open(members[name]) as f:
                    arrays[name] = np.lib.format.read_array(f, allow_pickle=False)
    except UserError:
        raise
    except Exception as e:                                            # zipfile, zlib and numpy each raise their own on damaged files
        raise UserError(f"{path}: not a readable .npz ({type(e).__name__}: {e}); {what} expected")
    if not arrays:
        raise UserError(f"{path}: holds {', '.join(members)[:100] or 'nothing'}; {what} expected")
    return arrays


def load_pt(path, what="a checkpoint", allow=()):
    """torch.load(weights_only=True) of a dict, on the CPU. Nothing in the file is executed; `allow` are classes whose objects it may hold."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file ({what} expected)")
    try:
        with torch.serialization.safe_globals(list(allow)):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        if "argparse.Namespace" in str(e) and not allow:
            raise UserError(f"{path}: not readable as {what}, but holds an argparse.Namespace, as official DiT/SiT training checkpoints do: say which it is, "
                            "where the script reads them, with --official dit or --official sit")
        raise UserError(f"{path}: not readable as {what} ({(str(e) or type(e).__name__).splitlines()[0][:120]}); it is damaged, or holds pickled "
                        "code, which is never run; use another file")
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, but {what} must be a dict")
    return Part({k: Part(v, path) if k == "args" and isinstance(v, dict) else v for k, v in state.items()}, path)


class Part(dict):
    """A dict out of a file. A key that is looked up in vain is the file's fault, and the error names it."""

    def __init__(self, value, path):
        super().__init__(value)
        self.path = path

    def __missing__(self, key):
        raise UserError(f"{self.path}: lacks {key!r}; it is damaged or of another version, write it again with the script that makes it")


def load_json(path, what, kind=dict, **need):
    """The JSON value in a file, of this kind; need: {key: kind} of what it must hold. Dicts come as Part. NaN is refused, as save_json does."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file ({what} expected)")

    def refuse(constant):
        raise ValueError(constant)
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"), object_hook=lambda d: Part(d, path), parse_constant=refuse)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not readable as JSON ({e}); {what} expected, write it again with the script that makes it")
    check_kinds(path, what, value, kind, **need)
    return value


def load_record(path):
    """A <script>.args.json: args and inputs are dicts, seconds a number, or None while the script has not finished."""
    what, kinds = f"the record of {Path(path).name.split('.')[0]}.py", {"args": dict, "inputs": dict, "seconds": (int, float, type(None))}
    record = load_json(path, what)
    check_kinds(path, what, record, **{k: kind for k, kind in kinds.items() if k in record})             # what is missing shows when it is asked for
    return record


def check_kinds(path, what, value, kind=dict, **need):
    """Raise UserError unless `value`, out of the file, is of this kind and has these keys of these kinds."""
    for name, v, k in ((what, value, kind), *((f"{key!r}", value[key], k) for key, k in need.items() if isinstance(value, kind))):
        if not isinstance(v, k) or isinstance(v, bool) and k is not bool:
            kinds = " or ".join("nothing" if t is type(None) else t.__name__ for t in (k if isinstance(k, tuple) else (k,)))
            raise UserError(f"{path}: {name} is {f'a {type(v).__name__}' if v is not None else 'nothing'}, but must be {kinds}; write the file again with "
                            "the script that makes it")


@contextlib.contextmanager
def no_bombs():
    """Pillow only warns of pictures up to twice its limit of pixels: here that is an error too, and its other warnings are silent."""
    from PIL import Image
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


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
    info = load_json(folder / "dataset.json", "the data folder's description, written by data.py,", sha256=str, name=str)
    d = SimpleNamespace(folder=folder, info=info, images=None, latents=None, test_images=None, test_labels=None)
    d.labels = np.array(load_npy(folder / "labels.npy", "labels, int64 (N,)", (None,), "iu"), dtype=np.int64)
    d.classes = load_lines(folder / "classes.txt")
    d.num_classes, n = len(d.classes), len(d.labels)
    check_labels(folder / "labels.npy", d.labels, d.num_classes)
    if (folder / "latents.npy").exists():
        d.latents = load_npy(folder / "latents.npy", "latents, float16 (N, 2c, h, w)", (n, None, None, None), "f")
    if (folder / "images.npy").exists() or pixels:
        d.images = load_npy(folder / "images.npy", "images, uint8 (N, H, W, C)", (n, None, None, None), "u")
        if d.images.dtype != np.uint8 or d.images.shape[3] not in (1, 3) or 0 in d.images.shape:
            raise UserError(f"{folder / 'images.npy'}: {d.images.dtype} {d.images.shape}, but images must be uint8 (N, H, W, 1 or 3)")
    elif d.latents is None:
        raise UserError(f"{folder}: neither images.npy nor latents.npy; make the folder again with data.py")
    if (folder / "test_images.npy").exists():
        d.test_labels = np.array(load_npy(folder / "test_labels.npy", "held-out labels, int64 (n,)", (None,), "iu"), dtype=np.int64)
        d.test_images = load_npy(folder / "test_images.npy", "held-out images, uint8 (n, H, W, C)", (len(d.test_labels), *d.images.shape[1:]) if
                                 d.images is not None else None, "u")
        check_labels(folder / "test_labels.npy", d.test_labels, d.num_classes)
        if d.test_images.dtype != np.uint8:
            raise UserError(f"{folder / 'test_images.npy'}: {d.test_images.dtype}, but held-out images must be uint8, as the others are")
    return d


def load_lines(path):
    """The lines of a text file of a data folder."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not readable ({e}); make the data folder again with data.py")


def check_labels(path, y, num_classes):
    if len(y) == 0 or y.min() < 0 or y.max() >= num_classes:
        raise UserError(f"{path}: {f'labels run {y.min()}..{y.max()}' if len(y) else 'holds no label'}, but {Path(path).parent / 'classes.txt'} names "
                        f"{num_classes} classes; make the data folder again with data.py")


def open_checkpoint(path, official=None):
    """(checkpoint dict, model of its EMA in eval mode, process) of train.py, or of official weights where official is 'dit' or 'sit'; errors name the
    file."""
    import models
    state = load_checkpoint(path, official)
    try:
        return state, *models.from_checkpoint(state)
    except ValueError as e:
        raise UserError(f"{path}: {e}") from e


def load_checkpoint(path, official=None):
    """A checkpoint dict; official weights ('dit', 'sit') as train.py would have written them.

    Official training checkpoints carry their flags as an argparse.Namespace. Only for them that one class is let in: it has no __setstate__, so
    loading it sets attributes and runs nothing; any other class in the file is refused as ever.
    """
    if not official:
        return load_pt(path, "a checkpoint of train.py")
    import models
    state = load_pt(path, "official DiT/SiT weights", allow=[argparse.Namespace])
    try:
        return models.official_checkpoint(state, official)
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
            barrier("patient")
        try:
            return encoders.load(name, device, weights=weights, images=d.images, labels=d.labels, num_classes=d.num_classes)
        except ValueError as e:
            raise e if weights is None or str(weights) in str(e) else UserError(f"{weights}: {e}; {d.folder} needs another")


def check_origin(path, d):
    """A file that another stage made says beside it, in <script>.args.json, of which data set: refused where that is not d."""
    for record in Path(path).parent.glob("*.args.json"):
        made = load_record(record)
        if made["inputs"].get("data") not in (None, d.info["sha256"]):
            raise UserError(f"{path}: was made from {made.get('args', {}).get('data')}, another data set than {d.folder} ({d.info['name']}); make it again for this one")


def load_indices(path, n, labels=None, num_classes=None):
    """keep.npy: int64 (M,) sorted, distinct, in 0..n-1. With labels, every class must keep at least one image."""
    keep = np.array(load_npy(path, "kept indices, int64 (M,)", (None,), "iu"), dtype=np.int64)
    if len(keep) == 0 or keep.min() < 0 or keep.max() >= n:
        raise UserError(f"{path}: indices run {keep.min() if len(keep) else '-'}..{keep.max() if len(keep) else '-'}, but the data set has images 0..{n - 1}; "
                        "take indices that were made for it")
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


def free_for_output(folder):
    """Raise UserError where `folder` neither is one nor can become one."""
    blocked = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
    if not blocked.is_dir():
        raise UserError(f"{folder}: a {'file' if blocked.exists() else 'broken link'} stands where the output folder should be ({blocked}); choose another --out")


_stages = []                                                          # those that may have to be undone
_locks = set()                                                        # file descriptors of the folders that this process holds


def claim(out):
    """Make the folder `out`, see that it can be written to, lock it for this process and sweep it; returns the lock's file descriptor.

    The kernel drops the lock when the process dies, however it dies; @command drops it at the end of main().
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as e:
        raise UserError(f"{out}: cannot write there ({e.strerror}); choose another --out or mend the rights")
    lock = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"{out}: another process is writing there; wait for it or choose another --out")
    except OSError:                                                   # a file system without locks
        log(f"note: {out} lies on a file system without locks; see to it that one process writes there")
    _locks.add(lock)
    sweep(out)
    return lock


class Stage:
    """One out folder while a script writes to it: the lock, the resume rule and `<script>.args.json`.

    inputs: {name: path of a file, or a data folder's info dict}; outputs: names that must stand for the stage to count as done;
    free: flags that may differ on a resume (logging, inference batch ...); ready(): a last word on whether the outputs suffice. After the call,
    `.done` says that nothing is left to do and `.resuming` that an earlier, interrupted call with the same arguments began here.

    stale, scraps: names and patterns in the folder. A call that begins anew removes both: what another call left must never pass for its own. scraps
    are what only a resume needs: finish() removes them.
    """

    def __init__(self, script, out, args, inputs=(), outputs=(), free=(), overwrite=False, ready=None, stale=(), scraps=()):
        self.out, self.script, self.outputs, self.ready, self.start = Path(out), script, outputs, ready or (lambda: True), time.time()
        self.file, self.scraps = self.out / f"{script}.args.json", scraps
        free_for_output(self.out)
        if rank() == 0:
            self._claim()
        mine = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in {"out", "overwrite", "device", *free}}
        hashes = {k: v["sha256"] if isinstance(v, dict) else sha256(v) for k, v in dict(inputs).items() if v is not None} if rank() == 0 else {}
        self.record = {"args": mine, "inputs": hashes, "seconds": None, "provenance": provenance()}
        try:
            self.done, self.resuming, self.earlier = from_rank0(lambda: self._compare(overwrite))
        except BaseException:
            self.release()
            raise
        if self.done:
            log(f"{script}.py: {self.out} is complete and was made with these arguments; nothing to do (--overwrite makes it again)")
            self._remove(scraps)
            self.release()
        elif rank() == 0:
            if not self.resuming and self._remove((*stale, *scraps), dry=True):
                self._write(None, begun=False)                        # killed from here on: the next call of this command removes the rest
                self._remove((*stale, *scraps))
            self._write(None)
        barrier()

    def _remove(self, patterns, dry=False):
        """Remove these files of the folder; returns them. dry: only look."""
        found = sorted({f for p in patterns for f in self.out.glob(p)}) if rank() == 0 else []
        for f in () if dry else found:
            f.unlink(missing_ok=True)
        return found

    def _claim(self):
        self.new = [p for p in (self.out, *self.out.parents) if not p.exists()]
        self.lock = claim(self.out)
        self.found = self._others(), self.file.read_bytes() if self.file.is_file() else None
        _stages.append(self)

    def _others(self):
        """What a change to the folder, the record aside, would show in."""
        return {e.name: e.stat(follow_symlinks=False).st_mtime_ns for e in os.scandir(self.out) if e.name != self.file.name}

    def undo(self):
        """After an error: where nothing but the record was written so far, the folder becomes what it was, or goes."""
        if self.out.is_dir() and self._others() == self.found[0]:
            if self.found[1] is None:
                self.file.unlink(missing_ok=True)
            elif self.file.read_bytes() != self.found[1]:
                self.file.write_bytes(self.found[1])
            for folder in self.new:
                with contextlib.suppress(OSError):                    # not empty: somebody else's
                    folder.rmdir()

    def _compare(self, overwrite):
        if not overwrite and not self.file.exists() and (foreign := [o for o in self.outputs if (self.out / o).exists()]):
            raise UserError(f"{self.out}: holds the {foreign[0]} of another stage or of somebody else (no {self.file.name} beside it); choose another --out, or "
                            "--overwrite to replace it")
        if overwrite or not self.file.exists():
            return False, False, 0.0
        old = load_record(self.file)
        new = json.loads(json.dumps(self.record, default=float))
        for part, noun in (("args", "--{}"), ("inputs", "the input '{}'")):
            for k in sorted({*old[part], *new[part]}):
                a, b = old[part].get(k), new[part].get(k)
                if a != b:
                    raise UserError(f"{self.out}: was made with {noun.format(k.replace('_', '-'))} = {a}, now {b}; use another --out, or --overwrite to redo it")
        if not old.get("begun", True):                                # killed while it removed what an earlier call had left
            return False, False, 0.0
        return old["seconds"] is not None and all((self.out / o).exists() for o in self.outputs) and self.ready(), True, old.get("spent", 0.0)

    def _write(self, seconds, **extra):
        save_json(self.file, {**self.record, "seconds": seconds, "spent": self.spent(), **extra})

    def spent(self):
        """Seconds of this call and of the interrupted ones before it (those that came as far as noting them)."""
        return round(self.earlier + time.time() - self.start, 3)

    def finish(self, **extra):
        """All outputs stand: note the seconds and what else is worth knowing, release the folder."""
        barrier("patient")
        if rank() == 0:
            self._write(self.spent(), **extra)
            self._remove(self.scraps)
        self.release()

    def release(self):
        if rank() == 0 and self.lock in _locks:
            _locks.remove(self.lock)
            os.close(self.lock)
