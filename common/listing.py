"""What lies in a folder, a zip or a tar: names and what reads them, nothing unpacked or decoded."""
import functools
import json
import os
import re
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError, need, reading

# What systems and network drives leave beside everybody's files, in lower case.
JUNK = {"__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information", "#recycle",
        "@recycle", "@recently-snapshot", "thumbs.db", "desktop.ini"}


def natural(name):
    """Sort key that puts image10 after image9."""
    return [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", name)], name


def printable(name):
    """One line of text: file names may hold line breaks or bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else "?" for c in name)


def is_junk(name):
    """Whether a file or folder of this name is hidden, or the system's own."""
    return name.startswith(".") or name.lower() in JUNK


@functools.lru_cache
def image_suffixes():
    """The suffixes, in lower case, of the formats that Pillow can open."""
    from PIL import Image
    try:
        # Optional: pip install pillow-heif, for the pictures of phones.
        import pillow_heif
        pillow_heif.register_heif_opener()
    except ImportError:
        pass
    # Pillow knows all its formats only after this.
    Image.init()
    # Documents, and formats that Pillow knows by name alone.
    kinds = set(Image.OPEN) - {"PDF", "EPS", "HDF5", "GRIB", "BUFR", "WMF", "MPEG"}
    return {s for s, kind in Image.registered_extensions().items() if kind in kinds}


def is_image(name):
    return os.path.splitext(name)[1].lower() in image_suffixes()


@functools.lru_cache(maxsize=8)
def open_zip(archive, pid):
    """A ZipFile for each process: after a fork two would share one place in the file."""
    return zipfile.ZipFile(archive)


@dataclass(frozen=True)
class ZipMember:
    """A file in a zip."""
    archive: str
    name: str

    def __str__(self):
        return f"{self.archive}: {self.name}"

    def read(self):
        return open_zip(self.archive, os.getpid()).read(self.name)


@dataclass(frozen=True)
class TarMember:
    """A file in a tar: its bytes, and where they lie."""
    archive: str
    name: str
    start: int
    length: int

    def __str__(self):
        return f"{self.archive}: {self.name}"

    def read(self):
        with open(self.archive, "rb") as f:
            f.seek(self.start)
            return f.read(self.length)


class Listing:
    """The files of a place by their names from there, with slashes: Paths, or what has read().

    folders: the names of all folders, those without files too.
    """

    def __init__(self, place, files, folders=()):
        self.place = place
        self.files = files
        self.folders = set()
        # Of an archive's folders only some are entries of their own.
        for folder in (*folders, *{name.rpartition("/")[0] for name in files}):
            while folder and folder not in self.folders:
                self.folders.add(folder)
                folder = folder.rpartition("/")[0]

    def inside(self, folder):
        """Names of the files in a folder ("": the place itself), at any depth."""
        if not folder:
            return list(self.files)
        return [name for name in self.files if name.startswith(folder + "/")]

    def children(self, folder):
        """Names of the folders directly in a folder, in natural order."""
        start = folder + "/" if folder else ""
        names = {name[len(start):] for name in self.folders if name.startswith(start)}
        return sorted((name for name in names - {""} if "/" not in name), key=natural)

    def loose(self, folder):
        """Names of the files directly in a folder."""
        start = folder + "/" if folder else ""
        return [name for name in self.inside(folder) if "/" not in name[len(start):]]

    def where(self, name):
        """How a message calls a file or folder."""
        if isinstance(self.place, Path) and self.place.is_file():
            return f"{self.place}: {name}" if name else str(self.place)
        return str(Path(self.place) / name)

    def text(self, name):
        """A text file, without the byte order mark that Windows puts first."""
        source = self.files[name]
        raw = source.read_bytes() if isinstance(source, Path) else source.read()
        with reading(self.where(name), "text file in UTF-8", "save it as UTF-8"):
            # Windows calls UTF-16 "Unicode" and marks it.
            kind = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
            return raw.decode(kind)

    def json(self, name):
        with reading(self.where(name), "JSON file", "write it again"):
            return json.loads(self.text(name))


def list_folder(top):
    """The Listing of a folder; links are followed, but not round in circles."""
    files = {}
    folders = []
    seen = {os.path.realpath(top)}

    def refuse(error):
        raise UserError(f"{error.filename}: {error.strerror}, so nobody can tell what lies there; "
                        "mend the rights or the disk, or move it away") from error

    for path, below, names in os.walk(top, followlinks=True, onerror=refuse):
        shown = [f for f in below if not is_junk(f)]
        real = {f: os.path.realpath(os.path.join(path, f)) for f in shown}
        # A link to a folder above would lead round in circles.
        below[:] = [f for f in shown if real[f] not in seen]
        seen.update(real.values())
        start = os.path.relpath(path, top).replace(os.sep, "/") + "/"
        start = "" if start == "./" else start
        folders += [start + f for f in below]
        files.update({start + n: Path(path, n) for n in names if not is_junk(n)})
    return Listing(top, files, folders)


def of_archive(place, members):
    """The Listing of [(name, whether it is a folder, what reads it)]."""
    files = {}
    folders = []
    for name, is_folder, member in members:
        name = name.replace("\\", "/").removeprefix("./").rstrip("/")
        if not name or any(map(is_junk, name.split("/"))):
            continue
        if is_folder:
            folders.append(name)
        else:
            files[name] = member
    return Listing(place, files, folders)


def list_zip(path):
    """The Listing of a zip, which stays packed."""
    with reading(path, "zip archive", "download it again"), zipfile.ZipFile(path) as z:
        members = z.infolist()
    secret = [m.filename for m in members if m.flag_bits & 1]
    need(not secret, f"{path}: {secret[:1]} is encrypted; unpack it first")
    return of_archive(path, [(m.filename, m.is_dir(), ZipMember(str(path), m.filename))
                             for m in members])


def list_tars(paths, place):
    """The Listing of one tar, or of several that are one data set; they stay packed."""
    members = []
    for path in paths:
        with reading(path, "tar without compression", f"unpack it: tar -xf {path}"):
            # "r:" takes no compression: in a compressed one no file has a place of its own.
            with tarfile.open(path, "r:") as t:
                for m in t:
                    # Two shards may use the same names.
                    name = f"{path.name}/{m.name}" if len(paths) > 1 else m.name
                    if m.isfile() or m.isdir():
                        members.append((name, m.isdir(), TarMember(str(path), m.name,
                                                                   m.offset_data, m.size)))
    return of_archive(place, members)


def state_of(path):
    """[files, bytes, checksum of names, sizes and times] of a file or folder.

    What tells that it has changed without reading it.
    """
    path = Path(path)
    files = {path.name: path} if path.is_file() else list_folder(path).files
    size = 0
    check = 0
    for name, file in sorted(files.items()):
        # A link that leads nowhere is no image either.
        if file.exists():
            stat = file.stat()
            size += stat.st_size
            line = f"{name} {stat.st_size} {stat.st_mtime_ns}"
            check = zlib.crc32(line.encode(errors="surrogateescape"), check)
    return [len(files), size, check]
