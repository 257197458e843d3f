"""The comparison of several runs: one table, five answers, and the pictures.

Runs that differ only in `-seedN` at the end of their folder's name are one row, with mean and standard deviation. A difference counts when it lies
outside the 95 % interval of no difference (Welch's t over seeds); with one seed nothing is claimed beyond "higher" or "lower".

Reads   RUN/metrics.json, train.args.json, samples.npy, nearest.png, trajectory.json where there is one, and the *.args.json of the stages before
Writes  OUT/report.md, report.json, frontier.png, per_class.png, samples.png, nearest.png

    python report.py runs/digits/full runs/digits/random --out runs/digits/report
"""
import json
import math
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import common

# Names that run_all.sh gives its runs. The five answers look for these, and for them with a budget behind (pruned-0.4); others stand in the table alone.
FULL, RANDOM, RANDOM_ATTACH, PRUNED, DRO, SELECT, D2C = "full", "random", "random-attach", "pruned", "pruned-dro", "d2c-select", "d2c-select-attach"
D2C_RANDOM = "d2c-random"                                             # where D2C keeps another number of images than pruning


# ---------------------------------------------------------------------------------------------- reading
def record_of(folder, script):
    file = Path(folder) / f"{script}.args.json"
    return common.load_json(file, f"the record of {script}.py") if file.exists() else None


def preparation(record):
    """{what: seconds} of all that had to be computed before a training run could start, each thing once: features, scores, weights, attachments, and the
    training of every network that these used."""
    cost, args = {}, record["args"]

    def trained(checkpoint, what):
        made = record_of(Path(checkpoint).parent, "train") if checkpoint else None
        if made:
            cost[f"{what} ({Path(checkpoint).parent.name})"] = made["train_seconds"]

    def scratch(name):
        file = Path(args["data"]) / "scratch.pt"
        if name == "scratch" and file.exists():
            cost["scratch network"] = float(common.load_pt(file).get("seconds", 0))

    for path in filter(None, (args.get("indices"), args.get("weights"), args.get("attach"), args.get("init"))):
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        if made := record_of(folder, "prune"):
            cost["features and scores"] = sum(made.get(k) or 0 for k in ("seconds_features", "seconds_scores")) or made["seconds"]
            if made["args"].get("score") not in (None, "random", "el2n", "ccs"):                    # these look at no surrogate (el2n trains its own)
                scratch(made["args"].get("surrogate"))
                trained(made["args"].get("weights"), "surrogate network")
        if made := record_of(folder, "reweight"):
            cost["DRO proxy"] = made["seconds"]
            trained(made["args"].get("reference"), "reference network")
        if made := record_of(folder, "attach"):
            parts = {"difficulty": made.get("seconds_difficulty"), "attachments": (made.get("seconds_text") or 0) + (made.get("seconds_visual") or 0)}
            cost.update({k: v for k, v in parts.items() if v and (k == "difficulty" or args.get("attach"))})
            if made["args"].get("select") != "random" and made.get("seconds_difficulty"):
                trained(made["args"].get("reference"), "scorer network")
            if args.get("attach"):
                scratch(made["args"].get("visual"))
                if made["args"].get("visual") == "ddae":
                    trained(made["args"].get("visual_weights") or made["args"].get("reference"), "visual encoder")
                if made["args"].get("indices"):                       # attached to a subset that another stage chose
                    cost.update(preparation({"args": {"data": args["data"], "indices": made["args"]["indices"]}}))
        trained(args.get("init") if path == args.get("init") else None, "start weights")
    seen = {}                                                         # a network that scored and aligned was trained once
    for what, seconds in cost.items():
        seen.setdefault(what[what.find("("):] if what.endswith(")") else what, (what, seconds))
    return dict(seen.values())


def read_run(folder):
    """One run as a namespace, its figures under every encoder."""
    folder = Path(folder)
    if not (folder / "metrics.json").is_file():
        raise common.UserError(f"{folder / 'metrics.json'}: no such file; measure the run first: python evaluate.py --runs {folder} --data DATA")
    m = common.load_json(folder / "metrics.json", "figures of evaluate.py")
    t = record_of(folder, "train")
    if t is None or t.get("seconds") is None:
        raise common.UserError(f"{folder}: no finished train.args.json; the report compares complete runs")
    if not (folder / "samples.npy").is_file():
        raise common.UserError(f"{folder / 'samples.npy'}: no such file; draw the samples again with sample.py --out {folder}")
    file = folder / "trajectory.json"
    return SimpleNamespace(folder=folder, name=re.sub(r"-seed\d+$", "", folder.name), metrics=m, train=t, preparation=preparation(t),
                           trajectory=common.load_json(file, "points of evaluate.py") if file.exists() else None)


def comparable(runs, judge):
    """One line for each setting in which runs differ although it moves the figures; differences that make the comparison void are refused."""
    for what, value, remedy in (("data sets", lambda r: r.metrics["data"], "one report per data set"),
                                ("versions of the data set", lambda r: r.metrics.get("data_sha256"), "evaluate all runs on one data folder"),
                                ("networks", lambda r: r.metrics["encoders"][judge]["identity"], "run evaluate.py for all of them again, with the same weights"),
                                ("references", lambda r: r.metrics["encoders"][judge]["reference"], "run evaluate.py for all of them with the same reference"),
                                ("numbers of samples", lambda r: r.metrics["encoders"][judge]["n"], "a distance depends on n: draw or --num equally many")):
        if what == "networks":
            for r in runs:
                if judge not in r.metrics["encoders"]:
                    raise common.UserError(f"{r.folder}: no figures under encoder {judge}; run evaluate.py --runs {r.folder} --encoder {judge}")
        if other := next((r for r in runs if value(r) != value(runs[0])), None):
            raise common.UserError(f"{runs[0].folder} and {other.folder} were measured on different {what} ({value(runs[0])}, {value(other)}); {remedy}")
    out = []
    for k in ("sampler", "steps", "cfg", "cfg_interval", "labels"):
        got = {json.dumps(r.metrics["protocol"].get(k)): r.name for r in runs}
        if len(got) > 1:
            out.append(f"sampling differs in {k}: " + ", ".join(f"{v} ({name}, ...)" for v, name in got.items()))
    if len({r.train["args"]["batch_size"] for r in runs}) > 1:
        out.append("training differs in the batch size")
    return out


def use_trajectories(runs, judge):
    """Leave each run its points, when they were scored by the judge; all at one n. Returns notes on those left out."""
    notes = []
    for r in runs:
        kept, r.trajectory = r.trajectory, []
        if kept and kept["encoder"] == r.metrics["encoders"][judge]["identity"]:
            r.trajectory = kept["points"]
        elif kept:
            notes.append(f"the trajectory of {r.folder.name} was scored by {kept['name']}, not by this report's judge {judge}: left out")
    if len({p["n"] for r in runs for p in r.trajectory}) > 1:
        raise common.UserError(f"{runs[0].folder / 'trajectory.json'} and others hold points at different n; run evaluate.py --trajectory for all with one --trajectory-num")
    return notes


def rows_of(runs, judge):
    """{run name: {figure: [one value per seed]}} in the order given."""
    table = {}
    for r in runs:
        e, memo = r.metrics["encoders"][judge], (r.metrics.get("memorisation") or {}).get("pixels", {})
        best = min((p["fd"] for p in r.trajectory), default=None)
        values = dict(kept=r.train["images_kept"], steps=r.train["images_seen"] // r.train["args"]["batch_size"], epochs=r.train["epochs"], images_seen=r.train["images_seen"], fd=e["fd"],
                      fd_subset=e.get("fd_subset"), worst=e.get("per_class", {}).get("worst_fd"), worst_n=e.get("per_class", {}).get("n"),
                      precision=e.get("precision"), recall=e.get("recall"), density=e.get("density"), coverage=e.get("coverage"),
                      read=e.get("read_as_labelled"), memo=memo.get("samples", {}).get("share"), memo_heldout=memo.get("heldout", {}).get("share"),
                      memo_n=(r.metrics.get("memorisation") or {}).get("n"), memo_noise=memo.get("noise", {}).get("share"), memo_baseline=memo.get("baseline", {}).get("share"),
                      ratio=memo.get("samples", {}).get("ratio", {}).get("share"), ratio_noise=memo.get("noise", {}).get("ratio", {}).get("share"), seconds=r.train["train_seconds"], preparation=sum(r.preparation.values()),
                      fd_best=best, n=e["n"])
        for k, v in values.items():
            table.setdefault(r.name, {}).setdefault(k, []).append(v)
    return table


# ---------------------------------------------------------------------------------------------- figures to words
def mean(values):
    values = [v for v in values if v is not None]
    return statistics.fmean(values) if values else None


def spread(values):
    values = [v for v in values if v is not None]
    return statistics.stdev(values) if len(values) > 1 else None


def cell(values, form="{:.3g}"):
    """'16.2 ± 0.8', '16.2' for one seed, '-' for none."""
    m, s = mean(values), spread(values)
    return "-" if m is None else form.format(m) + (f" ± {form.format(s)}" if s is not None else "")


def difference(a, b):
    """(relative change of the mean from b to a, half the 95 % interval of it or None, number of seeds, whether the change counts).

    Welch's t test: with 3 seeds the factor is 2.8 to 4.3 standard errors, not 2. Runs of one seed share noise, which is left unused.
    """
    from scipy.stats import t as student
    a, b = [v for v in a if v is not None], [v for v in b if v is not None]
    rel, n = mean(a) / mean(b) - 1 if mean(b) else math.inf, min(len(a), len(b))
    if n < 2:
        return rel, None, n, False
    va, vb = spread(a) ** 2 / len(a), spread(b) ** 2 / len(b)
    freedom = (va + vb) ** 2 / (va ** 2 / (len(a) - 1) + vb ** 2 / (len(b) - 1)) if va + vb else 1
    error = float(student.ppf(0.975, freedom)) * math.sqrt(va + vb) / mean(b) if mean(b) else math.inf
    return rel, error, n, abs(rel) > error


def percent(x):
    return f"{x:.0%}".replace("%", " %")


def compare(a, b, who, whom, what="FD", at="at equal steps"):
    """One sentence on two runs; lower is better. It claims a difference only when it is beyond the spread over seeds. None without figures."""
    if mean(a) is None or mean(b) is None:
        return None
    rel, error, n, counts = difference(a, b)
    size, way = percent(abs(rel)), "lower" if rel < 0 else "higher"
    if n < 2:
        return f"{who} has {size} {way} {what} than {whom} {at}; one seed, so no claim"
    if not counts:
        return f"No difference beyond the spread between {who} and {whom}: {what} {size} {way} {at}, n={n}, spread {percent(error)}"
    return f"{who} {'beats' if rel < 0 else 'is worse than'} {whom} by {size} {what} {at}, n={n}, spread {percent(error)}"


def family(name):
    """'pruned' for 'pruned-0.4': the run's name without its budget."""
    return re.sub(r"-\d+(\.\d+)?$", "", name)


def versus(t, run, rival, who, whom, what="FD", key="fd"):
    """compare() on two rows of the table; the sentence says so when they did not train for the same number of steps."""
    a, b = t[run], t[rival]
    at = "at equal steps" if set(a["steps"]) == set(b["steps"]) else f"at {a['steps'][0]:,} steps against {b['steps'][0]:,}"
    return compare(a[key], b[key], who, whom, what, at)


def rival_of(t, run, families=(RANDOM, D2C_RANDOM)):
    """The row of one of these families that kept as many images as `run`, or None: a subset is compared at its own size only."""
    return next((name for name in t if family(name) in families and set(t[name]["kept"]) == set(t[run]["kept"])), None)


def answer_random(t):
    """Is it better than random?"""
    out, titles = [], {PRUNED: "Pruning", DRO: "Pruning + DRO weights", SELECT: "D2C Select", D2C: "D2C Select + Attach"}
    for run in t:
        if family(run) in titles and (rival := rival_of(t, run)):
            out.append(versus(t, run, rival, titles[family(run)] + run[len(family(run)):].replace("-", " "), rival))
    for run in t:
        if family(run) == DRO and (rival := rival_of(t, run, (PRUNED,))):
            out.append(versus(t, run, rival, "DRO reweighting", "the same images unweighted", f"worst-class FD (n={t[run]['worst_n'][0]} a class)", "worst"))
    return [x for x in out if x]


def answer_source(t):
    """Does the gain come from selection or from the attachments?"""
    if not {RANDOM_ATTACH, SELECT, D2C} <= set(t) or not (base := rival_of(t, SELECT)):
        return []
    pairs = ((SELECT, base, "Selection alone", base), (RANDOM_ATTACH, base, "Attaching alone", base), (D2C, base, "Their combination", base),
             (D2C, RANDOM_ATTACH, "Selection on top of attachments", "attachments on random images"))
    return [x for x in (versus(t, *p) for p in pairs) if x]


def answer_memorising(t):
    """Is it memorising?"""
    out = []
    for name, r in t.items():
        m, held, noise, base = (mean(r[k]) for k in ("memo", "memo_heldout", "memo_noise", "memo_baseline"))
        if m is None:
            continue
        chance = 1 / math.sqrt(min(r["memo_n"]))                      # two standard errors of a share near one half; seeds share the held-out images
        ratio, ratio_noise = mean(r["ratio"]), mean(r["ratio_noise"])
        second = f"; far nearer to one of them than to the next 50: {percent(ratio)}, noisy copies {percent(ratio_noise)}" if ratio is not None and ratio_noise is not None else ""
        if held is None:                                              # a copier cannot score 1 here: see models.metrics.matched_set_test
            gap = noise - 0.5
            verdict = ("has too few held-out images or samples to tell" if gap < 2 * chance else "copies" if m > 0.5 + max(gap / 2, 1.5 * chance) else
                       "leans towards copying" if m > 0.5 + max(gap / 4, 1.5 * chance) else "shows no sign of copying")
            out.append(f"{name} {verdict}: {m:.2f} of the samples lie nearer to training images than to held-out "
                       f"ones (0.50 = none copied, {noise:.2f} = all of them noisy copies){second}")
            continue
        zero = max(held, base if base is not None else held)
        verdict = ("copies" if m > (zero + noise) / 2 else "leans towards copying" if m > zero + max(0.1, chance) else "does not memorise beyond its controls")
        if abs(held - 0.5) > 0.1 and base is None or noise < zero + 0.2:
            verdict = "cannot be judged, its controls are off"
        out.append(f"{name} {verdict}: {m:.2f} of the samples lie nearer to its own images than to equally many unseen ones (held-out images {held:.2f}"
                   + (f", samples of the full model {base:.2f}" if base is not None else "") + f", noisy copies {noise:.2f}){second}")
    return out


def answer_cost(t, reached):
    """What does preparation cost, and when does each run reach the full run's final FD?"""
    out = []
    for name, r in t.items():
        train, prep = mean(r["seconds"]), mean(r["preparation"])
        if prep > 0:
            out.append(f"{name}: {prep:,.1f} s of preparation for {train:,.0f} s of training")
        if FULL not in reached or name not in reached:
            continue
        point, goal = reached[name], reached[FULL]
        if point is None:
            seeds = "" if len(r["fd_best"]) < 2 else " in every seed"
            out.append(f"{name}: the full run's final FD (within 5 %) was not reached{seeds}; its best is {mean(r['fd_best']):.3g}")
            continue
        out.append(f"{name}: within 5 % of the full run's final FD after {point['step']:,.0f} steps, {point['images_seen']:,.0f} images, {point['seconds']:,.0f} s"
                   + (f" (speed-up {goal['seconds'] / max(point['seconds'], 1e-9):.2f}x, with preparation {goal['seconds'] / max(point['seconds'] + prep, 1e-9):.2f}x)"
                      if name != FULL and goal else ""))
    return out


def answer_elsewhere(t, train):
    """Does it hold on another model or data set?"""
    return [f"This report is {train['args']['model']} ({train['args']['process']}) on {train['data']}; read it beside the report of another --model or data set: "
            "bash run_all.sh with MODEL=unet-tiny, or with another data set, writes one"]


def reach(runs, goal, within=0.05):
    """{run name: first point of its trajectory, averaged over seeds, with FD <= (1 + within) goal, or None when a seed has none}; without trajectory: left out.

    Checkpoints are the resolution: a run reached it somewhere in the interval before the point.
    """
    out = {}
    for name in dict.fromkeys(r.name for r in runs if r.trajectory):
        first = [next((p for p in r.trajectory if p["fd"] <= (1 + within) * goal), None) for r in runs if r.name == name and r.trajectory]
        out[name] = None if any(p is None for p in first) else {k: statistics.fmean(p[k] for p in first) for k in ("step", "images_seen", "seconds")}
    return out


# ---------------------------------------------------------------------------------------------- pictures
def figure(width, height):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def save(fig, path):
    with common.atomic(path) as tmp:
        fig.savefig(tmp, dpi=110)


# Told apart in grey print too: by mark, dash and hatch.
MARKS, DASHES, HATCHES = "osD^vPX*<>", ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 2, 1, 2))), ("", "///", "...", "\\\\\\", "xxx", "ooo", "+++")


def look(t, name):
    k = list(t).index(name)
    return dict(color=f"C{k % 10}", marker=MARKS[k % len(MARKS)], ls=DASHES[k % len(DASHES)])


def curve(runs, name, key):
    """(x, mean, lowest, highest FD) over the seeds of a run, at the steps that all its seeds have; x is the mean of `key`."""
    per = [{p["step"]: p for p in r.trajectory} for r in runs if r.name == name and r.trajectory]
    steps = sorted(set.intersection(*map(set, per)))
    fd = np.array([[p[s]["fd"] for s in steps] for p in per])
    return np.array([statistics.fmean(p[s][key] for p in per) for s in steps]), fd.mean(0), fd.min(0), fd.max(0)


def plain_log(ax):
    """A logarithmic y axis with plain numbers."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def frontier(runs, t, judge, path):
    """FD against steps, images seen and seconds, band = lowest to highest seed; without trajectories the end points against seconds, and with preparation."""
    followed = [name for name in t if any(r.trajectory for r in runs if r.name == name)]
    if followed:
        fig = figure(12, 4.6)
        for ax, (key, label) in zip(fig.subplots(1, 3, sharey=True), (("step", "steps"), ("images_seen", "images seen"), ("seconds", "seconds of training + preparation"))):
            for name in followed:
                x, fd, low, high = curve(runs, name, key)
                x = x + (mean(t[name]["preparation"]) if key == "seconds" else 0)
                ax.plot(x, fd, ms=4, lw=1.3, label=name, **look(t, name))
                ax.fill_between(x, low, high, color=look(t, name)["color"], alpha=0.2, lw=0)
            ax.set(xlabel=label, xlim=(0, None))
            plain_log(ax)
            ax.grid(alpha=0.3, which="both")
        fig.axes[0].set(ylabel=f"{judge}, lower is better")
        fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8, handlelength=4)
    else:
        fig = figure(8, 4.2)
        ax = fig.subplots()
        for name, r in t.items():
            x, fd, style = mean(r["seconds"]), mean(r["fd"]), look(t, name)
            ax.errorbar([x], [fd], yerr=spread(r["fd"]), capsize=3, label=name, ms=7, **style | dict(ls="none"))
            if mean(r["preparation"]):
                ax.plot([x, x + mean(r["preparation"])], [fd, fd], color=style["color"], ls=":", lw=1)
                ax.plot([x + mean(r["preparation"])], [fd], ms=7, mfc="none", **style)
        ax.set(xlabel="seconds of training (filled) and with preparation (hollow)", ylabel=f"{judge}, lower is better", xlim=(0, None), ylim=(0, None))
        fig.legend(*ax.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
        ax.grid(alpha=0.3)
    save(fig, path)


def per_class(runs, t, judge, path):
    """Bars of the distance per class, mean over seeds, real images as a line."""
    rows = {}
    for r in runs:
        if "per_class" in r.metrics["encoders"][judge]:
            rows.setdefault(r.name, []).append(r.metrics["encoders"][judge]["per_class"])
    if not rows:
        return False
    real = next(iter(rows.values()))[0]
    K = min(len(real["fd"]), 20)
    fig = figure(12, 4.2)
    ax, w = fig.subplots(), 0.85 / len(rows)
    for k, (name, seeds) in enumerate(rows.items()):
        ax.bar(np.arange(K) + (k - len(rows) / 2 + 0.5) * w, np.mean([p["fd"][:K] for p in seeds], axis=0), w, label=name, color=look(t, name)["color"],
               hatch=HATCHES[k % len(HATCHES)], edgecolor="white", lw=0.3)
    ax.hlines(real["real"][:K], np.arange(K) - 0.45, np.arange(K) + 0.45, color="k", lw=1.8, label="real images")
    ax.set(xlabel="class" + (f" (the first {K} of {len(real['fd'])})" if len(real["fd"]) > K else ""), ylabel=f"distance per class, n={real['n']}", xticks=np.arange(K),
           xlim=(-0.6, K - 0.4))
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8)
    save(fig, path)
    return True


def sample_sheet(runs, path, columns=20):
    """A row of samples per run, the same labels and start noise in each column."""
    first = [r for r in runs if not re.search(r"-seed\d+$", r.folder.name)]
    fig = figure(12, 0.72 * len(first) + 0.1)
    for ax, r in zip(np.atleast_1d(fig.subplots(len(first), 1)), first):
        x = np.load(r.folder / "samples.npy", mmap_mode="r", allow_pickle=False)[:columns]
        strip = np.concatenate(np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255), axis=1)          # (H, columns W, C)
        ax.imshow(strip.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        ax.set_ylabel(r.name, rotation=0, ha="right", va="center", fontsize=9)
        ax.set(xticks=[], yticks=[])
    save(fig, path)


def nearest_sheet(runs, path):
    """nearest.png of every run: the most suspicious samples above, the nearest image that the model has seen below."""
    from PIL import Image
    first = [r for r in runs if not re.search(r"-seed\d+$", r.folder.name) and (r.folder / "nearest.png").exists()]
    if not first:
        return False
    fig = figure(12, 1.55 * len(first) + 0.1)
    for ax, r in zip(np.atleast_1d(fig.subplots(len(first), 1)), first):
        with Image.open(r.folder / "nearest.png") as im:
            ax.imshow(np.asarray(im), cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
        ax.set_ylabel(r.name, rotation=0, ha="right", va="center", fontsize=9)
        ax.set(xticks=[], yticks=[])
    save(fig, path)
    return True


# ---------------------------------------------------------------------------------------------- the page
def page(runs, t, judge, reached, pictures, notes=()):
    r0 = runs[0]
    e = r0.metrics["encoders"][judge]
    seeds = max(len(r["fd"]) for r in t.values())
    share = lambda values: cell(values, "{:.2f}")                     # noqa: E731
    lines = [f"# {r0.metrics['data']}: is it better than random?", "",
             f"{e['distance']}, lower is better, {e['n']:,} samples a run, reference: {e['reference']}" + (f" ({e['reference_n']:,} images)" if e["reference_n"] else "")
             + f". Seeds: {seeds}" + (", mean ± standard deviation." if seeds > 1 else " (no spread: differences below are not claims)."), "",
             "| run | images | steps | epochs | FD | FD of the subset itself | worst class FD | precision | recall | read as labelled | memorised share | train s | prepare s |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for name, r in t.items():
        lines.append(f"| {name} | {r['kept'][0]:,} | {r['steps'][0]:,} | {mean(r['epochs']):,.0f} | {cell(r['fd'])} | {cell(r['fd_subset'])} | {cell(r['worst'])} | "
                     f"{share(r['precision'])} | {share(r['recall'])} | {share(r['read'])} | {share(r['memo'])} | {cell(r['seconds'], '{:,.0f}')} | {cell(r['preparation'], '{:,.0f}')} |")
    if e["fd_heldout"] is not None:                                   # real images as the yardstick, at their own n
        at = e.get("fd_at_heldout_n")
        lines += ["", f"Real held-out images score {e['fd_heldout']:.3g} at n={e['fd_heldout_n']:,}" + (f"; {r0.name}'s samples score {at:.3g} at that n" if at is not None else "")
                  + (f". Neither is comparable with the column FD (n={e['n']:,}): a distance falls as n grows." if e["fd_heldout_n"] != e["n"] else ".")]
    heldout, noise = mean([v for r in t.values() for v in r["memo_heldout"]]), mean([v for n, r in t.items() if n != FULL for v in r["memo_noise"]])
    lines += ["", "*Memorised share*: samples nearer (pixels) to the images that the model saw than to equally many, class-matched images that it did not see"
              + (f"; held-out images score {heldout:.2f}, noisy copies {noise:.2f}. " if heldout is not None and noise is not None else ". ")
              + "For `full` the unseen images are the held-out split. *FD of the subset itself* is what a perfect copier of the kept images would score. "
              + (f"*Worst class FD* is at n={t[r0.name]['worst_n'][0]} a class, where real images score {e['per_class']['real_mean']:.3g} on average. " if "per_class" in e else "")
              + "*Prepare s* counts features, scores, weights, attachments and the training of every network these used; sampling and judging are in no column."
              + (" *Spread* below: half the width of the 95 % interval of a difference (Welch's t over seeds), in % of the second run's mean." if seeds > 1 else ""), ""]
    lines += [f"> **Note.** {note[0].upper() + note[1:]}.\n" for note in notes]
    circular = sorted({r.name for r in runs if r.metrics["encoders"][judge].get("circular")})
    if circular:
        lines += [f"> **Warning.** The judge, {judge}, also selected the images of, or was the alignment target of: {', '.join(circular)}. "
                  "Do not trust these rows under it: measure with a second encoder and compare.", ""]
    for other in sorted({k for r in runs for k in r.metrics["encoders"]} - {judge}):
        got = {}
        for r in runs:
            if other in r.metrics["encoders"]:
                got.setdefault(r.name, []).append(r.metrics["encoders"][other]["fd"])
        lines += [f"Second judge, {runs[0].metrics['encoders'].get(other, {}).get('distance', other)}: " + ", ".join(f"{n} {cell(v)}" for n, v in got.items()), ""]
    questions = (("Is it better than random?", answer_random(t)), ("Is the gain from selection or from attachments?", answer_source(t)),
                 ("Is it memorising?", answer_memorising(t)), ("What does preparation cost, and when is the full run's quality reached?", answer_cost(t, reached)),
                 ("Does it hold on another model or data set?", answer_elsewhere(t, {**r0.train, "data": r0.metrics["data"]})))
    lines += ["## The five questions", ""]
    for k, (question, answers) in enumerate(questions, 1):
        lines += [f"{k}. **{question}**" + ("" if answers else " The runs that would answer it are not here.")]
        lines += [*(f"   - {answer}." for answer in answers), ""]
    costs = {r.name: r.preparation for r in runs if r.preparation}
    if costs:
        lines += ["## Preparation, in seconds", "", "| run | " + "what |", "|---|---|"]
        lines += [f"| {n} | {', '.join(f'{k} {v:,.1f}' for k, v in c.items())} |" for n, c in costs.items()] + [""]
    lines += ["## Pictures", ""] + [f"![{caption}]({name})\n\n*{caption}*\n" for name, caption in pictures]
    p = r0.metrics["protocol"]
    lines += ["## Protocol", "", f"Sampler {p.get('sampler')}, {p.get('steps')} steps, guidance {p.get('cfg')} on t in {p.get('cfg_interval')}, labels {p.get('labels')}, seed {p.get('seed')}, "
              f"{p.get('weights')} weights, amp {p.get('amp')}; encoder {e['identity']}; precision/recall k={e.get('precision_k')}, density/coverage k={e.get('density_k')}, "
              f"n={e.get('neighbours_n')}; KID subsets of {e['kid']['subset_size']}. Training: {r0.train['args']['model']}, {r0.train['args']['process']}, batch {r0.train['args']['batch_size']}, "
              f"lr {r0.train['args']['lr']:g}, EMA {r0.train['args']['ema']}, amp {r0.train['args']['amp']}.", "",
              "Versions: " + ", ".join(f"{k} {v}" for k, v in r0.metrics["provenance"].items()) + ".", ""]
    return "\n".join(lines)


def parse_args(argv=None):
    p = common.Parser(__doc__)
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folders that evaluate.py has measured, the full run first")
    p.add_argument("--out", required=True, help="folder of the report")
    p.add_argument("--encoder", help="judge of the table; default: the first under which the first run was measured")
    return p.parse_args(argv)


@common.command
def main(argv=None):
    a = parse_args(argv)
    runs = [read_run(r) for r in a.runs]
    judge = a.encoder or next(iter(runs[0].metrics["encoders"]))
    notes = comparable(runs, judge)
    notes += use_trajectories(runs, judge)
    t = rows_of(runs, judge)
    goal = mean([r.trajectory[-1]["fd"] for r in runs if r.name == FULL and r.trajectory])          # its final FD, at the n of the trajectories
    reached = reach(runs, goal) if goal is not None else {}
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    distance = runs[0].metrics["encoders"][judge]["distance"]
    frontier(runs, t, distance, out / "frontier.png")
    pictures = [("frontier.png", "Quality against cost: lower and further left is better")]
    sample_sheet(runs, out / "samples.png")
    pictures.append(("samples.png", "Samples, the same label and start noise in each column"))
    if per_class(runs, t, judge, out / "per_class.png"):
        pictures.append(("per_class.png", "Distance per class; the black marks are real images"))
    if nearest_sheet(runs, out / "nearest.png"):
        pictures.append(("nearest.png", "The most suspicious samples (upper row) and the nearest image each model has seen (lower row)"))
    common.save_json(out / "report.json", {"judge": judge, "rows": t, "reached": reached, "preparation": {r.folder.name: r.preparation for r in runs}})
    text = page(runs, t, judge, reached, pictures, notes)
    common.save_text(out / "report.md", text)
    common.log("\n".join(line for line in text.splitlines() if line.startswith(("|", "   - ")) or line[:1].isdigit()))
    common.log(f"report: {out / 'report.md'}")


if __name__ == "__main__":
    main()
