"""Data sets that are packed in ways of their own: what each is, and the way in."""
import os
from collections import Counter

from common.errors import need
from common.processes import log

# Pictures that Pillow alone does not read, by suffix: the way to those that it does.
PICTURES = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "pip install pillow-heif, or set the phone to "
                    "'most compatible' and export JPEG"),
    ".avif": "update Pillow to 11.3 or newer, or convert them to PNG",
    ".jxl": "convert them to PNG: djxl IN OUT.png",
    ".svg": "they are drawings; render them to PNG: rsvg-convert -w 256 IN -o OUT",
    **dict.fromkeys((".dcm", ".dicom"), "pip install pydicom, save pixel_array as 16-bit PNG or "
                    "TIFF, and give --range"),
    **dict.fromkeys((".nii", ".nrrd", ".mha"), "they are volumes; save their slices as 16-bit PNG "
                    "or TIFF, and give --range"),
    **dict.fromkeys((".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf"),
                    "they are raw; develop them to JPEG or TIFF (pip install rawpy)"),
}
HUB = ("pip install datasets, then from datasets import load_from_disk and "
       "load_from_disk(FOLDER)['train'].to_parquet('train-0.parquet'), which data.py reads")
# Packed data sets, by suffix or by name: what they are and how data.py gets at them.
PACKED = {
    ".parquet": "parquet files, which data.py reads: is the suffix right, and pip install pyarrow",
    ".arrow": f"a data set of Hugging Face's datasets; {HUB}",
    ".mdb": "an LMDB; pip install lmdb, then write each value to a file in a class folder, or "
            "torchvision.datasets.LSUN for LSUN",
    ".tar": "tar files; data.py reads them where they are not compressed and hold images",
    ".tgz": "a compressed tar; unpack it: tar -xzf FILE",
    ".tar.gz": "a compressed tar; unpack it: tar -xzf FILE",
    ".gz": "compressed files; unpack them (MNIST: torchvision.datasets.MNIST, then .data and "
           ".targets into np.savez(path, images=..., labels=...))",
    ".bz2": "compressed files; unpack them",
    ".xz": "compressed files; unpack them",
    ".zst": "compressed files; unpack them",
    ".7z": "an archive; unpack it: 7z x FILE",
    ".rar": "an archive; unpack it: unrar x FILE",
    ".zip": "zip files; give data.py the zip itself, it need not be unpacked",
    ".tfrecord": "TFRecords; pip install tensorflow-datasets and write the images to class folders",
    ".mat": "MATLAB files; torchvision.datasets.SVHN, or scipy.io.loadmat, then np.savez(path, "
            "images=..., labels=...)",
    ".h5": "HDF5; h5py, then np.savez(path, images=..., labels=...)",
    ".hdf5": "HDF5; h5py, then np.savez(path, images=..., labels=...)",
    ".npy": "arrays; np.savez('set.npz', images=np.load(...), labels=np.load(...)), then give "
            "set.npz",
    ".npz": "an .npz; give that file itself",
    ".pt": "tensors; np.savez('set.npz', images=x.numpy(), labels=y.numpy()), then give set.npz",
    ".pkl": "pickles, which are never opened here; np.savez(path, images=..., labels=...) from a "
            "program that you trust",
    ".bin": "binary batches; torchvision.datasets.CIFAR10, CIFAR100 or STL10 reads them, then "
            "np.savez(path, images=..., labels=...)",
    "-ubyte": "MNIST's files; torchvision.datasets.MNIST reads them, then .data and .targets into "
              "np.savez(path, images=..., labels=...)",
    ".mp4": "videos; take frames: ffmpeg -i FILE -vf fps=1 frames/%06d.png",
    ".pdf": "documents; take their images: pdfimages -png FILE OUT",
}


def way_in(listing, folder):
    """One line about a folder without images that holds something else known, or ""."""
    names = [name.rpartition("/")[2].lower() for name in listing.inside(folder)]
    where = listing.where(folder)
    if {"data_batch_1", "test_batch"} & set(names):
        return (f"{where}: CIFAR-10's own batches; use them with: python data.py cifar10 --root "
                f"{where}")
    if {"train", "meta"} <= set(names):
        return (f"{where}: CIFAR-100's own batches; torchvision.datasets.CIFAR100(root, True) "
                "reads them, then .data and .targets into np.savez(path, images=..., labels=...)")
    kinds = Counter(kind for name in names for kind in (*PACKED, *PICTURES) if name.endswith(kind))
    if not kinds:
        return ""
    kind, count = kinds.most_common(1)[0]
    if kind in PICTURES:
        return (f"{where}: {count} pictures of a format that Pillow does not read ({kind}); "
                f"{PICTURES[kind]}")
    return f"{where}: no image, but {count} x {kind}: {PACKED[kind]}"


def check_strangers(listing, names, skip):
    """What lies beside the images: pictures that cannot be read are refused, the rest is counted.

    names: files that are no images. skip: such pictures are left out with the rest.
    """
    kinds = Counter(os.path.splitext(name)[1].lower() for name in names)
    for kind, way in PICTURES.items():
        count = kinds.get(kind, 0)
        need(not count or skip, f"{listing.where('')}: {count} pictures are {kind}, which Pillow "
             f"does not read; {way}; or leave them out: --skip-bad")
    if names:
        shown = ", ".join(f"{n} {kind or 'without suffix'}" for kind, n in kinds.most_common(4))
        log(f"data.py: {len(names)} files without the suffix of an image format are left out "
            f"({shown})")
