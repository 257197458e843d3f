"""Files: written whole or not at all, read with a check that names the file, never unpickled."""
import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from common.errors import FULL, UserError, first_line, need, reading

AGAIN = "write it again with the script that makes it"
# The names that atomic() gives to what it is writing.
TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp(\.\w+)?")


# ---------------------------------------------------------------------------------------- writing
@contextlib.contextmanager
def atomic(path):
    """Yields a temporary name beside `path`, which is flushed and renamed at the end of the block.

    On any failure the temporary file goes and `path` stays as it was. It is locked meanwhile: one
    that is not belongs to a process that was killed, see sweep().
    """
    path = Path(path)
    # Hidden, and with the ending of the file: np.save would add one of its own.
    before, after = f".{path.stem}.", f".tmp{path.suffix}"
    fd, tmp = locked_file(before, after, path.parent)
    try:
        yield tmp
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        # mkstemp's file is for its owner alone, which a shared folder is not.
        os.chmod(tmp, 0o666 & ~_umask())
        os.replace(tmp, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.unlink(tmp)
        if isinstance(e, OSError) and e.errno is None:
            # These are numpy's and Pillow's words for a short write.
            text = f"could not be written ({str(e)[:80]})"
            raise OSError(errno.ENOSPC, text, str(path)) from e
        raise
    finally:
        os.close(fd)


def locked_file(before, after, folder):
    """(descriptor, name) of a new file of this process in `folder`, locked."""
    while True:
        fd, name = tempfile.mkstemp(prefix=before, suffix=after, dir=folder)
        # A file system without locks is no reason to stop.
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.exists(name):
            return fd, name
        # Another process swept it away before it was locked.
        os.close(fd)


def sweep(folder):
    """Remove the temporary files of atomic() in `folder` whose process was killed.

    Those of the living are locked: several stages write into one data folder.
    """
    for path in Path(folder).iterdir():
        if TEMPORARY.fullmatch(path.name) and path.is_file():
            with contextlib.suppress(OSError), open(path, "rb") as f:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


@functools.lru_cache
def _umask():
    # It can only be read by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def free_for_output(folder):
    """Raise UserError where `folder` neither is one nor can become one."""
    folder = Path(folder)
    blocked = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
    what = "file" if blocked.exists() else "broken link"
    need(blocked.is_dir(), f"{folder}: a {what} stands where the output folder should be "
                           f"({blocked}); choose another --out")


def need_disk(folder, size):
    """Raise UserError where the disk of an output folder has no room for so many bytes."""
    free_for_output(folder)
    absolute = Path(folder).absolute()
    # The folder itself may still have to be made: its disk is that of the first one above it.
    place = next(p for p in (absolute, *absolute.parents) if p.exists())
    free = shutil.disk_usage(place).free
    need(size <= free, f"{folder}: {size / 1e9:,.1f} GB will be written, the disk has "
                       f"{free / 1e9:,.1f} GB left; make room or ask for less")


def allocate(path, dtype, shape):
    """A .npy of zeros with its disk space reserved: a full disk shows now and not hours later."""
    with atomic(path) as tmp:
        np.lib.format.open_memmap(tmp, "w+", dtype, shape).flush()
        with open(tmp, "rb+") as f:
            try:
                os.posix_fallocate(f.fileno(), 0, os.path.getsize(tmp))
            except AttributeError:
                pass                                 # a system without the call
            except OSError as e:
                # A file system without the call is no reason to stop, a full one is.
                if e.errno in FULL:
                    raise OSError(e.errno, e.strerror, str(path)) from e


def write_at(file, offset, array):
    """Write an array's bytes at `offset` of an unbuffered file."""
    left = memoryview(array).cast("B")
    while left:
        # os.pwrite may write less than it was given.
        n = os.pwrite(file.fileno(), left, offset)
        left = left[n:]
        offset += n


def save_npy(path, array):
    """Atomic np.save."""
    with atomic(path) as tmp, open(tmp, "wb") as f:
        # Numpy must not see a file: its own way of writing hides a full disk at the end.
        np.save(SimpleNamespace(write=f.write), np.asarray(array), allow_pickle=False)


def save_pt(path, state):
    """Atomic torch.save."""
    with atomic(path) as tmp:
        try:
            with open(tmp, "wb") as f:
                torch.save(state, f)
        except RuntimeError as e:
            # A full disk shows up as an error of torch's zip writer.
            text = f"could not be written ({first_line(e, 80)})"
            raise OSError(errno.ENOSPC, text, str(path)) from e


def save_text(path, text):
    """Atomic write of a text in UTF-8."""
    with atomic(path) as tmp:
        Path(tmp).write_text(text, encoding="utf-8")


def save_json(path, value):
    """Atomic write of a JSON value; NaN and infinity raise ValueError."""
    save_text(path, json.dumps(value, indent=1, allow_nan=False, default=float) + "\n")


# ---------------------------------------------------------------------------------------- reading
def existing(path, what):
    """The path of a file that is there."""
    path = Path(path)
    need(path.is_file(), f"{path}: no such file ({what} expected)")
    return path


KINDS = {"i": "integers", "u": "unsigned integers", "f": "floats", "b": "booleans"}


def load_npy(path, what, shape=None, kind=None):
    """A read-only memory map of a .npy file, checked; never unpickles.

    shape: a tuple with None for "any"; kind: numpy's kinds, e.g. 'iu'. Raises UserError that names
    the file, what is wrong and what was expected.
    """
    path = existing(path, what)
    with reading(path, f".npy file ({what} expected)"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    # An .npz under the name of an .npy opens, too, as an archive.
    need(isinstance(array, np.ndarray), f"{path}: an archive, not a .npy array ({what} expected)")
    if kind and array.dtype.kind not in kind:
        wanted = " or ".join(KINDS[k] for k in kind)
        raise UserError(f"{path}: dtype {array.dtype}, but {what} must be {wanted}")
    if shape is not None:
        fits = len(shape) == array.ndim and all(s in (None, n) for s, n in zip(shape, array.shape))
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        need(fits, f"{path}: shape {array.shape}, but {what} must be ({wanted})")
    return array


def check_finite(array, path, what, rows=65536):
    """UserError that names the first row of an array with NaN or infinity; reads in chunks."""
    for lo in range(0, len(array), rows):
        part = np.isfinite(np.asarray(array[lo:lo + rows]))
        sound = part.reshape(len(part), -1).all(1)                    # (rows,)
        bad = lo + int(np.argmin(sound))
        need(sound.all(), f"{path}: {what} has NaN or infinity, first in row {bad}; make it again")


def sound_rows(x, rows, path):
    """The tensor x (b, ...) that was read as these rows of a file; NaN and infinity are refused."""
    if x.is_floating_point():
        sound = x.isfinite().flatten(1).all(1).tolist()
        if not all(sound):
            raise UserError(f"{path}: NaN or infinity in row {rows[sound.index(False)]}; {AGAIN}")
    return x


def free_memory():
    """Bytes that can be had: on Linux with what its file cache would give back, elsewhere all."""
    try:
        text = Path("/proc/meminfo").read_text()
        return int(re.search(r"MemAvailable:\s+(\d+)", text)[1]) * 1024
    except (OSError, TypeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def load_npz(path, names, what):
    """{name: array} of those members of an .npz that are among `names`; nothing is unpickled.

    What each claims to be is compared with its size in the archive and with memory before it is
    loaded.
    """
    path = existing(path, what)
    arrays = {}
    with reading(path, f".npz ({what} expected)"), zipfile.ZipFile(path) as archive:
        members = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
        for name in names:
            if name in members:
                arrays[name] = load_member(path, archive, name, members[name])
    held = ", ".join(members)[:100] or "nothing"
    need(arrays, f"{path}: holds {held}; {what} expected")
    return arrays


def load_member(path, archive, name, member):
    """One array of an .npz, after a look at its header."""
    headers = {(1, 0): np.lib.format.read_array_header_1_0,
               (2, 0): np.lib.format.read_array_header_2_0}
    # The header alone, before a byte of the array is read.
    with archive.open(member) as f:
        shape, _, dtype = headers[np.lib.format.read_magic(f)](f)
        claim = math.prod(shape) * dtype.itemsize
        held = member.file_size - f.tell()
    need(not dtype.hasobject, f"{path}: '{name}' holds pickled objects, which are never read; save "
                              "it as a plain array")
    need(claim == held, f"{path}: damaged: '{name}' claims {claim} bytes, holds {held}; {AGAIN}")
    need(claim <= free_memory(), f"{path}: '{name}' needs {claim / 1e9:.1f} GB of memory, more "
                                 "than is free; use a folder of images")
    with archive.open(member) as f:
        return np.lib.format.read_array(f, allow_pickle=False)


class Part(dict):
    """A dict out of a file. A key that is missing is the file's fault, and the error names it."""

    def __init__(self, value, path):
        super().__init__(value)
        self.path = path

    def __missing__(self, key):
        raise UserError(f"{self.path}: lacks {key!r}; it is damaged or of another version, {AGAIN}")


def load_pt(path, what="a checkpoint", allow=()):
    """torch.load(weights_only=True) of a dict, on the CPU; nothing in the file is executed.

    allow: classes whose objects it may hold.
    """
    path = existing(path, what)
    try:
        with torch.serialization.safe_globals(list(allow)):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        need(allow or "argparse.Namespace" not in str(e),
             f"{path}: not readable as {what}, but holds an argparse.Namespace, as official "
             "DiT/SiT training checkpoints do: say which it is, where the script reads them, with "
             "--official dit or --official sit")
        raise UserError(f"{path}: not readable as {what} ({first_line(e, 120)}); it is damaged, or "
                        "holds pickled code, which is never run; use another file")
    kind = type(state).__name__
    need(isinstance(state, dict), f"{path}: holds a {kind}, but {what} must be a dict")
    # The settings are looked up all over the kit.
    if isinstance(state.get("args"), dict):
        state["args"] = Part(state["args"], path)
    return Part(state, path)


def load_json(path, what, kind=dict, **kinds):
    """The JSON value in a file, which must be of this kind. Dicts come as Part; NaN is refused.

    kinds: {key: type} of what a dict must hold.
    """
    path = existing(path, what)

    # Python's reader takes NaN and Infinity, which are no JSON and which save_json never writes.
    def refuse(constant):
        raise ValueError(constant)
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, object_hook=lambda d: Part(d, path), parse_constant=refuse)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not readable as JSON ({e}); {what} expected, {AGAIN}")
    need_kind(path, what, value, kind)
    fields(path, value, **kinds)
    return value


def need_kind(path, name, value, kind):
    """Raise UserError unless a value out of a file is of this type, or of one of these types."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    # A bool is an int to Python, but not to a reader of JSON.
    fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    is_now = "nothing" if value is None else f"a {type(value).__name__}"
    wanted = " or ".join("nothing" if k is type(None) else k.__name__ for k in kinds)
    need(fits, f"{path}: {name} is {is_now}, but must be {wanted}; {AGAIN}")


def fields(path, value, **kinds):
    """UserError unless the dict `value`, out of this file, has these keys, of these types."""
    for key, kind in kinds.items():
        need_kind(path, repr(key), value[key], kind)


def load_record(path):
    """A <script>.args.json: args and inputs are dicts, seconds a number, or None before the end."""
    record = load_json(path, f"the record of {Path(path).name.split('.')[0]}.py")
    kinds = {"args": dict, "inputs": dict, "seconds": (int, float, type(None))}
    # What is missing shows when it is asked for.
    fields(path, record, **{key: kind for key, kind in kinds.items() if key in record})
    return record


def load_lines(path):
    """The lines of a text file of a data folder."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not readable ({e}); make the data folder again with data.py")


def named_twice(paths):
    """The first of these paths that names the same place as one before it, or None."""
    seen = set()
    for path in paths:
        place = Path(path).resolve()
        if place in seen:
            return path
        seen.add(place)
    return None


def sha256(path):
    """Hex sha256 of a file, read in blocks of 4 MB."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
