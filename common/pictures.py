"""Pictures: grids of images and plots, drawn without a screen and saved whole or not at all."""
import contextlib
import warnings

import numpy as np

from common.files import atomic


@contextlib.contextmanager
def no_bombs():
    """Pillow only warns of pictures up to twice its limit of pixels: here that is an error too.

    Its other warnings are silent.
    """
    from PIL import Image
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def save_grid(path, images, pad=1, least=48):
    """Write a PNG of images uint8 (rows, columns, H, W, C) with white gaps.

    Small images are enlarged (nearest) to about `least` pixels.
    """
    from PIL import Image
    rows, columns, h, w, channels = images.shape
    sheet = np.full((rows * (h + pad) + pad, columns * (w + pad) + pad, channels), 255, np.uint8)
    for i in range(rows):
        for j in range(columns):
            top = i * (h + pad) + pad
            left = j * (w + pad) + pad
            sheet[top:top + h, left:left + w] = images[i, j]
    if channels == 1:
        sheet = sheet.squeeze(-1)
    picture = Image.fromarray(sheet)
    zoom = max(1, round(least / h))
    size = (picture.width * zoom, picture.height * zoom)
    with atomic(path) as tmp:
        picture.resize(size, Image.NEAREST).save(tmp)


def figure(width, height):
    """A matplotlib figure that needs no screen and leaves nothing behind (pyplot keeps every figure)."""
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(path, fig, dpi=100):
    """Write a figure as PNG, whole or not at all."""
    with atomic(path) as tmp:
        fig.savefig(tmp, dpi=dpi)


def shown_classes(num_classes, most=12):
    """At most `most` classes, spread evenly, of which a picture shows something."""
    return np.unique(np.linspace(0, num_classes - 1, min(most, num_classes)).astype(int))
