"""The pictures of report.py: quality against cost, distance per class, samples, nearest images."""
import numpy as np

from common.answers import SEED, averaged, mean, prepared, spread
from common.pictures import figure, plain, save_figure

# Told apart in grey print too: by mark, dash and hatch.
MARKS = "osD^vPX*<>"
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "ooo", "+++")
DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 2, 1, 2)))


def look(t, name):
    k = list(t).index(name)
    return dict(color=f"C{k % 10}", marker=MARKS[k % len(MARKS)], ls=DASHES[k % len(DASHES)])


def label_of(t, name):
    """The run's name, which says so where its points stand at the seconds of training alone."""
    shown = plain(name)
    return f"{shown} (preparation unknown)" if prepared(t[name]) is None else shown


def frontier(runs, t, judge, path):
    """FD against cost, along the trajectories, or at the runs' ends where there are none."""
    # Runs that have points, in the order of the table.
    followed = [name for name in t if any(run.trajectory for run in runs if run.name == name)]
    fig = frontier_curves(runs, t, followed) if followed else frontier_ends(t)
    fig.axes[0].set(ylabel=f"{judge}, lower is better")
    save_figure(path, fig, dpi=110)


def frontier_curves(runs, t, followed):
    """FD against steps, images seen and seconds; the band is the lowest to the highest seed."""
    fig = figure(12, 4.6)
    left, middle, right = fig.subplots(1, 3, sharey=True)
    for ax, key, label in ((left, "step", "steps"), (middle, "images_seen", "images seen"),
                           (right, "seconds", "seconds of training + preparation")):
        for name in followed:
            x, fd, low, high = curve(runs, name, key)                 # (steps,) each
            # The clock of a run starts with its preparation.
            if key == "seconds":
                x = x + (prepared(t[name]) or 0)
            style = look(t, name)
            ax.plot(x, fd, ms=4, lw=1.3, label=label_of(t, name), **style)
            ax.fill_between(x, low, high, color=style["color"], alpha=0.2, lw=0)
        ax.set(xlabel=label, xlim=(0, None))
        plain_log(ax)
        ax.grid(alpha=0.3, which="both")
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8,
               handlelength=4)
    return fig


def curve(runs, name, key):
    """(x, mean, lowest, highest FD), each (steps,), at the steps that all seeds of a run have."""
    path = averaged(runs, name)
    fd = []                                                           # (steps, seeds)
    for mean_point in path:
        fd.append([point["fd"] for run in runs if run.name == name for point in run.trajectory
                   if point["step"] == mean_point["step"]])
    x = np.array([point[key] for point in path])
    return x, np.array([point["fd"] for point in path]), np.min(fd, 1), np.max(fd, 1)


def plain_log(ax):
    """A logarithmic y axis with plain numbers."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
    ax.set_yscale("log")
    # Decades alone would leave a narrow range without a number.
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def frontier_ends(t):
    """FD against seconds of training, and hollow with those of preparation."""
    fig = figure(8, 4.2)
    ax = fig.subplots()
    for name, row in t.items():
        x = mean(row["seconds"])
        fd = mean(row["fd"])
        style = look(t, name)
        dot = style | dict(ls="none")
        ax.errorbar([x], [fd], yerr=spread(row["fd"]), capsize=3, label=label_of(t, name), ms=7,
                    **dot)
        # Two points joined by a dotted line.
        cost = prepared(row)
        if cost:
            ax.plot([x, x + cost], [fd, fd], color=style["color"], ls=":", lw=1)
            ax.plot([x + cost], [fd], ms=7, mfc="none", **style)
    ax.set(xlabel="seconds of training (filled) and with preparation (hollow)")
    ax.set(xlim=(0, None), ylim=(0, None))
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    ax.grid(alpha=0.3)
    return fig


def per_class(runs, t, judge, path, most=20):
    """Bars of the distance per class, mean over seeds, real images as a line.

    Returns whether there was something to draw.
    """
    seeds = {}
    for run in runs:
        figures = run.metrics["encoders"][judge]
        if "per_class" in figures:
            seeds.setdefault(run.name, []).append(figures["per_class"])
    if not seeds:
        return False
    # Real images are the same for all runs: the first row's are drawn.
    real = next(iter(seeds.values()))[0]
    K = len(real["fd"])
    shown = min(K, most)
    place = np.arange(shown)                                          # (shown,)
    width = 0.85 / len(seeds)
    fig = figure(12, 4.2)
    ax = fig.subplots()
    for k, (name, figures) in enumerate(seeds.items()):
        height = np.mean([one["fd"][:shown] for one in figures], axis=0)       # (shown,)
        shift = (k - len(seeds) / 2 + 0.5) * width
        ax.bar(place + shift, height, width, label=plain(name),
               color=look(t, name)["color"], hatch=HATCHES[k % len(HATCHES)], edgecolor="white",
               lw=0.3)
    ax.hlines(real["real"][:shown], place - 0.45, place + 0.45, color="k", lw=1.8,
              label="real images")
    some = f" (the first {shown} of {K})" if K > shown else ""
    ax.set(xlabel="class" + some, ylabel=f"distance per class, n={real['n']}", xticks=place,
           xlim=(-0.6, shown - 0.4))
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8)
    save_figure(path, fig, dpi=110)
    return True


def first_seeds(runs):
    """The runs without their repetitions."""
    return [run for run in runs if not SEED.search(run.folder.name)]


def sample_sheet(runs, path, columns=20):
    """A row of samples per run, the same labels and start noise in each column."""
    strips = []
    for run in first_seeds(runs):
        x = run.samples[:columns]
        # A white pixel between neighbours.
        framed = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
        strips.append((run.name, np.concatenate(framed, axis=1).squeeze()))          # (H, n W[, C])
    sheet(strips, path, 0.72)


def nearest_sheet(runs, path):
    """nearest.png of every run; returns whether there was one."""
    strips = [(run.name, run.nearest) for run in first_seeds(runs) if run.nearest is not None]
    if strips:
        sheet(strips, path, 1.55, aspect="auto")
    return bool(strips)


def sheet(strips, path, height, **how):
    """Pictures [(name, pixels)] one below the other, each `height` inches high and named."""
    fig = figure(12, height * len(strips) + 0.1)
    for ax, (name, pixels) in zip(np.atleast_1d(fig.subplots(len(strips), 1)), strips):
        ax.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest", **how)
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        ax.set(xticks=[], yticks=[])
    save_figure(path, fig, dpi=110)


def draw_all(runs, t, distance, judge, out):
    """The pictures, each in a file of its own: [(file name, caption)]."""
    # Points of a trajectory may be of fewer samples than the table.
    at = next((f", {p['n']:,} samples a point" for run in runs for p in run.trajectory), "")
    drawn = [("frontier.png", f"Quality against cost: lower and further left is better{at}"),
             ("samples.png", "Samples, the same label and start noise in each column")]
    frontier(runs, t, distance, out / "frontier.png")
    sample_sheet(runs, out / "samples.png")
    if per_class(runs, t, judge, out / "per_class.png"):
        drawn.append(("per_class.png", "Distance per class; the black marks are real images"))
    if nearest_sheet(runs, out / "nearest.png"):
        drawn.append(("nearest.png", "The most suspicious samples (upper row) and the nearest "
                                     "image each model has seen (lower row)"))
    return drawn
