"""One image as 8-bit pixels, by one rule for every format, mode and bit depth.

Upright as its EXIF block says, where that can be read. Transparent pixels lie on white. Grey where
it is stored without colour. 16 bits: 65535 is white, unless a range says what is black and white.
"""
import contextlib
import io
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import UserError, need
from common.pictures import no_bombs

# Pillow's modes without colour.
GREY = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F"}
# How EXIF says that a camera was held, as Pillow's name of what puts it right.
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
         6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}


class Picture(NamedTuple):
    """An image as it is used: pixels uint8 RGB (H, W, 3); grey: whether it was stored so.

    extent: (lowest, highest) value of one with more than 8 bits, else None.
    """

    pixels: np.ndarray
    grey: bool
    extent: tuple = None


def adm_crop(image, size):
    """The centre of a PIL image, brought to cover `size`: a side, or (height, width).

    Box halving while it is twice too large, then bicubic (Dhariwal & Nichol 2021, their code).
    """
    from PIL import Image
    height, width = (size, size) if isinstance(size, int) else size
    # Averages of 2 x 2 first: bicubic alone would be coarser.
    while image.width >= 2 * width and image.height >= 2 * height:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    scaled = (round(image.width * scale), round(image.height * scale))    # (w, h)
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left = (image.width - width) // 2
    top = (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_levels(values, span=None):
    """uint8 of numbers with more than 8 bits, linear from span = (LO, HI), else 0 to 65535."""
    if span is None:
        # 65535 = 255 * 257, rounded to the nearest level.
        v = np.asarray(values).astype(np.int64).clip(0, 65535)
        return ((v + 128) // 257).astype(np.uint8)
    low, high = span
    share = (np.asarray(values, np.float64) - low) / (high - low)
    return np.floor(share.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def extent_of(values):
    """(lowest, highest) as plain numbers; ValueError where one is NaN or infinite."""
    low, high = np.min(values).item(), np.max(values).item()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("pixels that are NaN or infinite")
    return low, high


def upright(image):
    """A PIL image turned as its EXIF block says. One that cannot be read says nothing."""
    from PIL import Image
    try:
        turn = TURNS.get(image.getexif().get(0x112))
    except Exception:
        # A damaged block raises a dozen kinds, and the pixels beside it are sound.
        return image
    return image.transpose(getattr(Image.Transpose, turn)) if turn else image


def to_rgb(image, span=None):
    """(a PIL image of any mode in RGB, extent of the values of one with more than 8 bits)."""
    from PIL import Image
    extent = None
    if image.mode == "F" or image.mode.startswith("I"):
        # 16 bits in Pillow's mode I too; convert("L") would clip at 255.
        values = np.asarray(image)                               # (H, W)
        extent = extent_of(values)
        image = Image.fromarray(to_levels(values, span))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        # On white, as a page shows them; convert("RGB") alone would show what lies behind.
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB"), extent


def wide_colour(image):
    """Whether an image, not loaded yet, stores colours of 16 bits, of which Pillow keeps 8."""
    return image.mode[0] not in "IF" and any(";16" in str(tile[3]) for tile in image.tile)


def open_image(source):
    """A PIL image of a file's path, or of what read() gives the bytes of a file."""
    from PIL import Image
    if isinstance(source, Path):
        return Image.open(source)
    return Image.open(io.BytesIO(source.read()))


def read_image(source, size=None, span=None):
    """The Picture in a file, in bytes (see open_image), or in an array (h, w, 1 or 3).

    size: crop to this. span: (LO, HI), the values that become 0 and 255 where there are more than
    8 bits. Raises what Pillow raises, and ValueError.
    """
    if isinstance(source, np.ndarray):
        return read_array(source, size, span)
    with open_image(source) as image:
        wide = wide_colour(image)
        if wide and span:
            raise ValueError("16-bit colour, of which only the high byte can be read: --range is "
                             "for grey; save it with 8 bits")
        grey = image.mode in GREY
        float_pixels = image.mode == "F"
        image, extent = to_rgb(upright(image), span)
        if wide:
            # The high byte stands for the whole: enough to see that it is never used.
            low, high = extent_of(np.asarray(image))
            extent = (257 * low, 257 * high)
        if float_pixels and not span:
            raise ValueError(f"float pixels, {extent[0]:g} to {extent[1]:g}: say with --range LO "
                             "HI what is black and what is white")
        if size:
            image = adm_crop(image, size)
        return Picture(np.asarray(image), grey, extent)


def about_image(source, span=None):
    """((width, height) upright, mode in words, extent or None) of a file, decoded where needed."""
    with open_image(source) as image:
        wide = wide_colour(image)
        mode = f"{image.mode} of 16 bits" if wide else image.mode
        if getattr(image, "is_animated", False):
            mode += " of several frames, the first of which is used,"
        size = image.size
        with contextlib.suppress(Exception):
            if image.getexif().get(0x112) in (5, 6, 7, 8):
                size = size[::-1]
        deep = wide or image.mode == "F" or image.mode.startswith("I")
    # A header alone says nothing of the values.
    return size, mode, read_image(source, None, span).extent if deep else None


def read_array(values, size, span):
    """read_image of an array (h, w, 1 or 3)."""
    from PIL import Image
    extent = None
    if values.dtype != np.uint8:
        extent = extent_of(values)
        values = to_levels(values, span)
    # Pillow wants grey as (h, w).
    grey = values.shape[2] == 1
    image = Image.fromarray(values[..., 0] if grey else values).convert("RGB")
    if size:
        image = adm_crop(image, size)
    return Picture(np.asarray(image), grey, extent)


# ----------------------------------------------------------------------------------- a set of them
def need_range(name, extent, span):
    """UserError where values of one image lie outside 16 bits, and no range says what they mean."""
    if extent is None or span:
        return
    low, high = extent
    need(low >= 0 and high <= 65535, f"{name}: its values run {low:g} to {high:g}, beyond "
         "0..65535; say with --range LO HI what is black and what is white")


def need_bright(name, extent, span):
    """UserError where a set with more than 8 bits never uses the upper half of 16."""
    if extent is None or span or extent[1] >= 32768:
        return
    low, high = extent
    # Cameras and scanners write 10, 12 or 14 of 16 bits.
    bits = max(1, math.ceil(math.log2(high + 1)))
    raise UserError(f"{name}: stored with 16 bits, but its values run {low:g} to {high:g} of 65535 "
                    f"and would come out almost black; give --range 0 {2**bits - 1}, or the values "
                    "that mean black and white (16-bit colour: save it with 8 bits)")


def wider(a, b):
    """The extent that holds both; None where there is none."""
    if a is None or b is None:
        return a or b
    return min(a[0], b[0]), max(a[1], b[1])


def fault_of(error):
    """An exception of a reader in words. Of a picture beyond the limit: how large it is."""
    text = f"{type(error).__name__}: {error}"
    if "DecompressionBomb" in text:
        pixels, limit = re.findall(r"\d+", str(error))[:2]
        return (f"{int(pixels) / 1e6:.0f} megapixels, beyond the limit of {limit} against "
                f"decompression bombs; if it is a sound scan, give --max-pixels {pixels}")
    return text


def unreadable(file, fault):
    """The line about an image that cannot be read."""
    if "--" in fault:
        return f"{file}: {fault}, or go on without such images: --skip-bad"
    return (f"{file}: unreadable image ({fault}); mend or remove it, or go on without such images: "
            "--skip-bad, where pixels are stored")


def decode_images(images, shape, size=None, skip_bad=False, span=None, most=None):
    """(pixels uint8 (b, H, W, C), {place: fault}, all grey, extent) of some images.

    images: files (b,) or arrays (b, h, w, C). most: the largest number of pixels of one. With
    skip_bad those that cannot be read stay black, else UserError names the first.
    """
    pixels = np.zeros((len(images), *shape), np.uint8)    # (b, H, W, C)
    faults = {}
    all_grey = True
    extent = None
    with no_bombs(most):
        for place, image in enumerate(images):
            name = f"image {place}" if isinstance(image, np.ndarray) else image
            try:
                picture = read_image(image, size, span)
            except Exception as e:
                # On damaged files Pillow's plugins raise a dozen kinds.
                faults[place] = fault_of(e)
                need(skip_bad, unreadable(name, faults[place]))
                continue
            need_range(name, picture.extent, span)
            height, width, _ = picture.pixels.shape       # (h, w, 3)
            need((height, width) == tuple(shape[:2]),
                 f"{name}: {width}x{height} pixels, but the first image has {shape[1]}x{shape[0]}; "
                 "give --size S to bring all to S x S")
            # Of a grey array one of three equal channels.
            pixels[place] = picture.pixels[..., :shape[2]]
            all_grey &= picture.grey
            extent = wider(extent, picture.extent)
    return pixels, faults, all_grey, extent
