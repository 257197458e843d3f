"""Everyday files that are a little odd, made with Pillow, struct and the standard library: what phones, Kaggle, EDM and other people's programs leave behind.

Each function writes what its docstring says and returns the path; a reader sees here what a damaged EXIF block is, byte by byte.
"""
import io
import json
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def fresh(path):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def picture(path, colour=0, size=(8, 8), mode="RGB", **kw):
    """A flat image (width, height) of this colour."""
    Image.new(mode, size, colour).save(fresh(path), **kw)
    return Path(path)


def noisy(path, seed, size=(8, 8), channels=3, **kw):
    """An image (width, height) of noise; the same seed gives the same pixels, which are returned: uint8 (h, w, 3) or (h, w)."""
    shape = (size[1], size[0], channels)[:3 if channels > 1 else 2]
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(fresh(path), **kw)
    return pixels


def tree(top, names, size=(8, 8)):
    """A folder of noisy images with these names, each another one."""
    for seed, name in enumerate(names):
        noisy(Path(top) / name, seed, size)
    return Path(top)


def encoded(seed, size=(8, 8), kind="PNG"):
    """(bytes of an image file, its pixels)."""
    f = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(f, kind)
    return f.getvalue(), pixels


# ---- EXIF
def exif_block(orientation, rational=None):
    """A TIFF block, big-endian, of an orientation and, where given, an exposure time (numerator, denominator) as signed rational."""
    count = 1 if rational is None else 2
    entries = struct.pack(">HHIHH", 0x112, 3, 1, orientation, 0)
    data = b""
    if rational is not None:
        after = 8 + 2 + 12 * count + 4
        # Type 5 is an unsigned rational; -1/0 in it is what some cameras write for "not known".
        entries += struct.pack(">HHII", 0x829A, 5, 1, after)
        data = struct.pack(">ii", *rational)
    return b"MM\0*" + struct.pack(">IH", 8, count) + entries + struct.pack(">I", 0) + data


def jpeg_turned(path, pixels, orientation=6, rational=(-1, 0)):
    """A JPEG whose EXIF block says how it was held, beside a rational that no program can divide."""
    f = io.BytesIO()
    Image.fromarray(pixels).save(f, "JPEG", quality=95, subsampling=0)
    body = b"Exif\0\0" + exif_block(orientation, rational)
    segment = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    fresh(path).write_bytes(f.getvalue()[:2] + segment + f.getvalue()[2:])
    return Path(path)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with(path, pixels, kind, body):
    """A PNG with one more chunk before its pixels."""
    f = io.BytesIO()
    Image.fromarray(pixels).save(f, "PNG")
    raw = f.getvalue()
    fresh(path).write_bytes(raw[:33] + chunk(kind, body) + raw[33:])         # 8 of signature, 25 of IHDR
    return Path(path)


def png_broken_exif(path, pixels):
    """A sound PNG whose eXIf block is no TIFF."""
    return png_with(path, pixels, b"eXIf", b"\0\1\2garbage")


def png_grey16(path, values):
    """A grey PNG of 16 bits."""
    Image.fromarray(np.asarray(values, np.uint16)).save(fresh(path))
    return Path(path)


def png_rgb16(path, values):
    """A colour PNG of 16 bits a channel, (h, w, 3), which Pillow cannot write but reads by the high byte."""
    v = np.asarray(values, ">u2")
    h, w, _ = v.shape
    rows = b"".join(b"\0" + v[i].tobytes() for i in range(h))
    head = struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0)
    fresh(path).write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return Path(path)


def large_scan(path, side=10_000):
    """A bilevel PNG of side x side pixels in a few kB: a scan, not a bomb."""
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes(1 + (side + 7) // 8) * side)
    fresh(path).write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b""))
    return Path(path)


def heic(path):
    """The first box of a phone's HEIC picture."""
    fresh(path).write_bytes(struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(64))
    return Path(path)


# ---- data sets as others pack them
def edm_names(n, a_shard=4):
    return [f"{i // a_shard:05d}/img{i:08d}.png" for i in range(n)]


def edm_labels(labels):
    """dataset.json as EDM's and StyleGAN's dataset_tool write it; labels None: a set without classes."""
    if labels is None:
        return json.dumps({"labels": None})
    return json.dumps({"labels": [[name, int(label)] for name, label in zip(edm_names(len(labels)), labels)]})


def edm_folder(top, labels, n=None):
    n = len(labels) if labels is not None else n
    tree(top, edm_names(n))
    (Path(top) / "dataset.json").write_text(edm_labels(labels))
    return Path(top)


def edm_zip(path, labels, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(fresh(path), "w", method) as z:
        for i, name in enumerate(edm_names(len(labels))):
            z.writestr(name, encoded(i)[0])
        z.writestr("dataset.json", edm_labels(labels))
    return Path(path)


def zipped(path, folder):
    """A folder as a zip, with the entries of the folders themselves and macOS's own."""
    folder = Path(folder)
    with zipfile.ZipFile(fresh(path), "w", zipfile.ZIP_DEFLATED) as z:
        for file in sorted(folder.rglob("*")):
            z.write(file, file.relative_to(folder.parent))
        z.writestr(f"__MACOSX/{folder.name}/._1.png", b"\0\5\x16\7")
    return Path(path)


def webdataset(path, labels, key="cls"):
    """A tar of KEY.png beside KEY.cls or KEY.json."""
    with tarfile.open(fresh(path), "w") as t:
        for i, label in enumerate(labels):
            beside = json.dumps({"label": label}) if key == "json" else str(label)
            for name, body in ((f"{i:06d}.png", encoded(i)[0]), (f"{i:06d}.{key}", beside.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(body)
                t.addfile(member, io.BytesIO(body))
    return Path(path)


def parquet(path, labels, names=None, first=0):
    """A parquet file as Hugging Face exports it: image {bytes, path}, label, and the names of the classes in its metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    images = [{"bytes": encoded(first + i)[0], "path": f"{i}.png"} for i in range(len(labels))]
    table = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
    label = {"names": names, "_type": "ClassLabel"} if names else {"dtype": "int64", "_type": "Value"}
    about = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), fresh(path), row_group_size=3)
    return Path(path)
