"""Pictures: grids of images and plots, drawn without a screen and saved whole or not at all."""
import contextlib
import functools
import os
import re
import sys
import warnings

import numpy as np

from common.files import atomic


# Pillow's own limit, from which on it warns.
MAX_PIXELS = 2**28 // 3


@contextlib.contextmanager
def no_bombs(most=None):
    """Pictures of more than `most` pixels (default: Pillow's limit) are an error in the block.

    Pillow itself only warns up to twice its limit. Its other warnings are silent.
    """
    from PIL import Image
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if most:
            Image.MAX_IMAGE_PIXELS = most
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def save_grid(path, images, pad=1, least=48):
    """Write a PNG of images uint8 (rows, columns, H, W, C) with white gaps.

    Small images are enlarged (nearest) to about `least` pixels.
    """
    from PIL import Image
    rows, columns, h, w, channels = images.shape
    # White, so that what is not covered makes the gaps.
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


def class_tiles(data, groups_of, most, side=96):
    """A row of groups of images for each class shown: uint8 (R, G, most, h, w, C).

    groups_of(rows (n_c,)) gives the G groups of indices of a class; what is left stays white.
    Images of twice `side` pixels and more are thinned to a height of at least `side`.
    """
    step = max(1, data.images.shape[1] // side)
    tiles = []                                               # [(G, most, h, w, C), ...]
    for c in shown_classes(data.num_classes):
        groups = groups_of(np.flatnonzero(data.labels == c))
        row = np.full((len(groups), most, *data.images[0, ::step, ::step].shape), 255, np.uint8)
        for g, group in enumerate(groups):
            for j, i in enumerate(group):
                row[g, j] = data.images[i, ::step, ::step]
        tiles.append(row)
    return np.stack(tiles)


def save_montage(path, tiles, row_names, group_names, title):
    """Write tiles (R, G, n, h, w, C) as a PNG with a name beside each row and below each group."""
    R, G, n, h, w, _ = tiles.shape
    group = n * (w + 1)
    stride = group + max(2, w // 4)                          # with the gap after it
    # Grey images spread over the three colours.
    canvas = np.full((R * (h + 1), G * stride, 3), 255, np.uint8)
    for r, g, j in np.ndindex(R, G, n):
        top = r * (h + 1)
        left = g * stride + j * (w + 1)
        canvas[top:top + h, left:left + w] = tiles[r, g, j]
    fig = figure(12, 1.2 + 12 * canvas.shape[0] / canvas.shape[1])
    ax = fig.add_subplot(title=plain(title))
    ax.imshow(canvas, interpolation="nearest")
    ax.set_xticks(stride * np.arange(G) + group / 2, group_names)
    ax.set_yticks((h + 1) * np.arange(R) + h / 2, row_names)
    save_figure(path, fig, dpi=120)


def rank_montage(path, data, s, ranks_of, most):
    """A row per class shown: groups of its images at ranks_of(n_c), sorted by the score s (N,)."""
    def groups_of(rows):
        order = rows[np.argsort(s[rows], kind="stable")]
        return [order[ranks] for ranks in ranks_of(len(rows))]

    tiles = class_tiles(data, groups_of, most)                           # (R, G, most, h, w, C)
    save_grid(path, tiles.reshape(len(tiles), -1, *tiles.shape[3:]))


def cut_montage(path, data, scores, keep, tie, title):
    """A row per class shown: its highest images, those on both sides of the cut, its lowest."""
    def groups_of(rows):
        best = rows[np.lexsort((tie[rows], -scores[rows]))]              # (n_c,), highest first
        m = np.isin(best, keep).sum()
        return best[:m][:5], best[max(0, m - 3):m + 2], best[m:][-5:]

    tiles = class_tiles(data, groups_of, 5)
    names = [plain(data.classes[c]) for c in shown_classes(data.num_classes)]
    below = ["highest kept", "border: last 3 kept, first 2 dropped", "lowest dropped"]
    save_montage(path, tiles, names, below, title)


def figure(width, height):
    """A matplotlib figure that needs no screen and leaves nothing behind, unlike pyplot's."""
    if "matplotlib" not in sys.modules:
        # A notebook names a backend of its own, which this environment may lack.
        os.environ["MPLBACKEND"] = "Agg"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig


@functools.lru_cache
def glyph_fonts():
    """{name: the characters it draws} of matplotlib's own font and of those for far scripts."""
    from matplotlib import font_manager, ft2font, rcParams
    # Of each of these that is installed; the list is of names, for looking into all takes seconds.
    wanted = re.compile("Noto Sans (CJK|SC|JP|KR)|WenQuanYi|SimHei|Microsoft YaHei|PingFang|"
                        "Hiragino|Source Han Sans|Droid Sans Fallback|Arial Unicode|IPAGothic|"
                        "Nanum|Unifont")
    own = rcParams["font.sans-serif"][:1]
    files = {name: font_manager.findfont(name) for name in own}
    files.update({f.name: f.fname for f in font_manager.fontManager.ttflist
                  if wanted.match(f.name)})
    return {name: set(ft2font.FT2Font(file).get_charmap()) for name, file in files.items()}


def plain(name):
    """A class name as matplotlib can draw it: no formula between dollars, no boxes.

    A character that no font here has becomes its number, as in \\u732b.
    """
    from matplotlib import rcParams
    text = name.replace("$", r"\$")
    if name.isascii():
        return text
    fonts = glyph_fonts()
    # The first is matplotlib's own; what it lacks is looked for in the others.
    rcParams["font.family"] = list(fonts)
    known = set().union(*fonts.values())
    return "".join(c if ord(c) in known else c.encode("unicode_escape").decode() for c in text)


def save_figure(path, fig, dpi=100):
    """Write a figure as PNG, whole or not at all."""
    with atomic(path) as tmp:
        fig.savefig(tmp, dpi=dpi)


def shown_classes(num_classes, most=12):
    """At most `most` classes, spread evenly, of which a picture shows something."""
    return np.unique(np.linspace(0, num_classes - 1, min(most, num_classes)).astype(int))


def bin_edges(values, bins=40):
    """Edges (bins + 1,), float64, around finite values (n,), which may be equal to rounding."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    # numpy refuses bins that are narrower than the spacing of the numbers.
    margin = 1e-6 * max(abs(low), abs(high)) or 1e-6
    return np.linspace(low - margin, high + margin, bins + 1)


def class_histograms(path, data, values, keep, title, width, height, cut=False):
    """A histogram of values (N,) for each class shown, and in red the images `keep` (M,) of it.

    cut: only the lowest of these, as a line. width: inches of the figure; height: of a row of it.
    """
    shown = shown_classes(data.num_classes)
    across = min(4, len(shown))
    down = -(-len(shown) // across)
    fig = figure(width, height * down + 0.6)
    fig.suptitle(plain(title))
    for place, c in enumerate(shown, 1):
        ax = fig.add_subplot(down, across, place)
        mine = values[data.labels == c]                                  # (n_c,)
        taken = values[keep[data.labels[keep] == c]]                     # (m_c,)
        finite = np.isfinite(mine)
        ax.hist(mine[finite], bins=bin_edges(mine[finite]), color="C0" if cut else "C7")
        label = f"{plain(data.classes[c])}: {len(taken)} of {len(mine)}"
        if cut:
            ax.axvline(taken.min(), color="C3")
            label += " kept"
        else:
            ax.plot(taken, np.zeros(len(taken)), "|", color="C3", markersize=14, clip_on=False)
        if not finite.all():
            label += f", {np.sum(~finite)} not picked"
        ax.set_title(label, fontsize=8)
    save_figure(path, fig, dpi=110)


def save_weights(path, names, history, w, low, high, mean, holm, overall, burn_in):
    """Write weights.png of reweight.py: paths of a, weights with the null's band, mean excess.

    history (steps, K); w, low, high, mean, holm (K,): of the last the p values; overall: one p.
    """
    K = len(names)
    fig = figure(14, 4)
    names = [plain(name) for name in names]
    left, middle, right = fig.subplots(1, 3)
    steps = np.arange(0, len(history), max(1, len(history) // 1000))
    lines = left.plot(steps + 1, history[steps], lw=1)
    left.axvspan(0, burn_in, color="0.9", lw=0)
    left.set(xlabel="step", title=f"class weights a (shaded: burn-in, {burn_in} steps)")
    middle.bar(range(K), high - low, bottom=low, color="C1", alpha=0.5,
               label="null: 95 %, all classes at once")
    middle.scatter(range(K), w, c=np.where(holm <= 0.05, "C3", "C0"), zorder=3)
    middle.set(xlabel="class", title=f"weights, mean 1 over the images\nred: Holm p <= 0.05; "
                                     f"all classes together: p = {overall:.3f}")
    middle.legend(fontsize=8)
    right.bar(range(K), mean, color="C2")
    right.set(xlabel="class", title="mean excess loss after the burn-in")
    if K <= 20:
        left.legend(lines, names, fontsize=7)
        for ax in (middle, right):
            ax.set_xticks(range(K), names, rotation=90, fontsize=8)
    save_figure(path, fig)
