"""The comparison of several runs: one table, five answers, and the pictures.

Runs that differ only in `-seedN` at the end of their folder's name are one row, with mean and spread (standard deviation). A difference counts when it is
larger than twice its standard error over seeds; with one seed nothing is claimed beyond "higher" or "lower".

Reads   RUN/metrics.json, train.args.json, stats.jsonl, samples.npy, nearest.png, trajectory.json where there is one, and the *.args.json of the stages before
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

# Names that run_all.sh gives its runs. The five answers look for these; other runs stand in the table alone.
FULL, RANDOM, RANDOM_ATTACH, PRUNED, DRO, SELECT, D2C = "full", "random", "random-attach", "pruned", "pruned-dro", "d2c-select", "d2c-select-attach"


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
            cost["features and scores"] = made["seconds"]
            scratch("scratch" if made["args"].get("score") in ("el2n", "ccs") else made["args"].get("surrogate"))
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
        seen.setdefault(what[what.find("("):] if "network (" in what or "encoder (" in what else what, (what, seconds))
    return dict(seen.values())


def read_run(folder):
    """One run as a namespace, its figures under every encoder."""
    folder = Path(folder)
    m = common.load_json(folder / "metrics.json", "figures of evaluate.py")
    t = record_of(folder, "train")
    if t is None or t.get("seconds") is None:
        raise common.UserError(f"{folder}: no finished train.args.json; the report compares complete runs")
    lines = (folder / "stats.jsonl").read_text(encoding="utf-8").splitlines() if (folder / "stats.jsonl").exists() else []
    file = folder / "trajectory.json"
    return SimpleNamespace(folder=folder, name=re.sub(r"-seed\d+$", "", folder.name), metrics=m, train=t, stats=[json.loads(x) for x in lines],
                           preparation=preparation(t), trajectory=common.load_json(file, "points of evaluate.py")["points"] if file.exists() else [])


def rows_of(runs, judge):
    """{run name: {figure: [one value per seed]}} in the order given."""
    table = {}
    for r in runs:
        if judge not in r.metrics["encoders"]:
            raise common.UserError(f"{r.folder}: no figures under encoder {judge}; run evaluate.py --runs {r.folder} --encoder {judge}")
        e, memo = r.metrics["encoders"][judge], (r.metrics.get("memorisation") or {}).get("pixels", {})
        best = min((p["fd"] for p in r.trajectory), default=None)
        values = dict(kept=r.train["images_kept"], steps=r.train["args"]["steps"], epochs=r.train["epochs"], images_seen=r.train["images_seen"], fd=e["fd"],
                      fd_subset=e.get("fd_subset"), worst=e.get("per_class", {}).get("worst_fd"), worst_n=e.get("per_class", {}).get("n"),
                      precision=e.get("precision"), recall=e.get("recall"), density=e.get("density"), coverage=e.get("coverage"),
                      read=e.get("read_as_labelled"), memo=memo.get("samples", {}).get("share"), memo_heldout=memo.get("heldout", {}).get("share"),
                      memo_noise=memo.get("noise", {}).get("share"), memo_baseline=memo.get("baseline", {}).get("share"),
                      ratio=memo.get("samples", {}).get("ratio", {}).get("share"), seconds=r.train["train_seconds"], preparation=sum(r.preparation.values()),
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
    """(relative change of the mean from b to a, twice its standard error or None, number of seeds, whether the change counts)."""
    a, b = [v for v in a if v is not None], [v for v in b if v is not None]
    rel, n = mean(a) / mean(b) - 1, min(len(a), len(b))
    if n < 2:
        return rel, None, n, False
    error = 2 * math.sqrt(spread(a) ** 2 / len(a) + spread(b) ** 2 / len(b)) / mean(b)
    return rel, error, n, abs(rel) > error


def compare(a, b, who, whom, what="FD", at="at equal steps"):
    """One sentence on two runs; lower is better. It claims a difference only when it is beyond the spread over seeds."""
    rel, error, n, counts = difference(a, b)
    size = f"{abs(rel):.0%}"
    if n < 2:
        return f"{who} has {size} {'lower' if rel < 0 else 'higher'} {what} than {whom} {at}; one seed, so no claim"
    if not counts:
        return f"No difference beyond the spread between {who} and {whom}: {what} {'lower' if rel < 0 else 'higher'} by {size} {at}, n={n}, uncertainty {error:.0%}"
    return f"{who} {'beats' if rel < 0 else 'is worse than'} {whom} by {size} {what} {at}, n={n}, uncertainty {error:.0%}"


def answer_random(t):
    """Is it better than random?"""
    out = [compare(t[run]["fd"], t[RANDOM]["fd"], name, "random") for run, name in ((PRUNED, "Pruning"), (DRO, "Pruning + DRO weights"), (SELECT, "D2C Select"))
           if run in t and RANDOM in t]
    if DRO in t and PRUNED in t:
        out.append(compare(t[DRO]["worst"], t[PRUNED]["worst"], "DRO reweighting", "the same images unweighted", f"worst-class FD (n={t[DRO]['worst_n'][0]})"))
    return out


def answer_source(t):
    """Does the gain come from selection or from the attachments?"""
    if not {RANDOM, RANDOM_ATTACH, SELECT, D2C} <= set(t):
        return []
    alone = compare(t[SELECT]["fd"], t[RANDOM]["fd"], "Selection alone", "random")
    attach = compare(t[RANDOM_ATTACH]["fd"], t[RANDOM]["fd"], "Attaching alone", "random")
    both = compare(t[D2C]["fd"], t[RANDOM]["fd"], "Both together", "random")
    return [alone, attach, both, compare(t[D2C]["fd"], t[RANDOM_ATTACH]["fd"], "Selection on top of attachments", "attachments on random images")]


def answer_memorising(t):
    """Is it memorising?"""
    out = []
    for name, r in t.items():
        m, held, noise, base = (mean(r[k]) for k in ("memo", "memo_heldout", "memo_noise", "memo_baseline"))
        if m is None:
            continue
        if held is None:
            out.append(f"{name}: {m:.2f} of the samples lie nearer to training images than to held-out ones (0.5 = none copied, {noise:.2f} = what noisy copies would score)")
            continue
        zero = max(held, base if base is not None else held)
        verdict = ("copies" if m > (zero + noise) / 2 else "leans towards copying" if m > zero + 0.1 else "does not memorise beyond its controls")
        out.append(f"{name} {verdict}: {m:.2f} of the samples lie nearer to its own images than to equally many unseen ones (held-out images {held:.2f}"
                   + (f", samples of the full model {base:.2f}" if base is not None else "") + f", noisy copies {noise:.2f})")
    return out


def answer_cost(t, reached):
    """What does preparation cost, and what is the speed-up?"""
    out = []
    for name, r in t.items():
        if name == FULL:
            continue
        train, prep = mean(r["seconds"]), mean(r["preparation"])
        if prep > 0:
            out.append(f"{name}: {prep:,.0f} s of preparation for {train:,.0f} s of training")
        if reached and name in reached and FULL in reached:
            point, goal = reached[name], reached[FULL]
            if point is None:
                out.append(f"{name}: full-data quality not reached (best FD {mean(r['fd_best']):.3g}, full {mean(t[FULL]['fd']):.3g})")
            else:
                out.append(f"{name}: within 5 % of the full run's final FD after {point['step']:,.0f} steps, {point['images_seen']:,.0f} images, {point['seconds']:,.0f} s: "
                           f"speed-up {goal['seconds'] / max(point['seconds'], 1e-9):.2f}x without preparation, {goal['seconds'] / max(point['seconds'] + prep, 1e-9):.2f}x with it")
    return out


def answer_elsewhere(t, train):
    """Does it hold on another model or data set?"""
    return [f"This report is {train['args']['model']} ({train['args']['process']}) on {train['data']}; read it beside the report of another --model or data set: "
            "bash run_all.sh with MODEL=unet-tiny, or with another data set, writes one"]


def reach(runs, goal, within=0.05):
    """{run name: first point of its trajectory, averaged over seeds, with FD <= (1 + within) goal, or None}; runs without a trajectory are left out."""
    out = {}
    for name in {r.name for r in runs if r.trajectory}:
        first = [next((p for p in r.trajectory if p["fd"] <= (1 + within) * goal), None) for r in runs if r.name == name]
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


MARKS = "osD^vPX*<>"


def frontier(runs, t, judge, path):
    """FD against steps, images seen and seconds; without trajectories the end points against seconds of training, and with preparation."""
    with_points = [r for r in runs if r.trajectory]
    if with_points:
        fig = figure(12, 3.8)
        for ax, (key, label) in zip(fig.subplots(1, 3, sharey=True), (("step", "steps"), ("images_seen", "images seen"), ("seconds", "seconds of training (dashed: + preparation)"))):
            for k, r in enumerate(with_points):
                color = f"C{list(t).index(r.name) % 10}"
                y = [p["fd"] for p in r.trajectory]
                first = next(q for q in with_points if q.name == r.name) is r
                ax.plot([p[key] for p in r.trajectory], y, color=color, marker=MARKS[list(t).index(r.name) % len(MARKS)], ms=3.5, label=r.name if first else None)
                if key == "seconds" and sum(r.preparation.values()):
                    ax.plot([p[key] + sum(r.preparation.values()) for p in r.trajectory], y, color=color, ls="--", lw=1)
            ax.set(xlabel=label, yscale="log")
            ax.grid(alpha=0.3)
        fig.axes[0].set(ylabel=f"{judge}, lower is better")
        fig.axes[0].legend(fontsize=7)
    else:
        fig = figure(7, 4)
        ax = fig.subplots()
        for k, (name, r) in enumerate(t.items()):
            x, fd = mean(r["seconds"]), mean(r["fd"])
            ax.errorbar([x], [fd], yerr=spread(r["fd"]), marker=MARKS[k % len(MARKS)], color=f"C{k % 10}", label=name, ls="", ms=7)
            if mean(r["preparation"]):
                ax.plot([x, x + mean(r["preparation"])], [fd, fd], color=f"C{k % 10}", ls="--", lw=1)
        ax.set(xlabel="seconds of training (dashed: + preparation)", ylabel=f"{judge}, lower is better", xlim=(0, None), ylim=(0, None))
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    save(fig, path)


def per_class(runs, t, judge, path):
    """Bars of the distance per class, first seed of each run, real images as a line."""
    data = [(r.name, r.metrics["encoders"][judge]["per_class"]) for r in runs if "per_class" in r.metrics["encoders"][judge] and not re.search(r"-seed\d+$", r.folder.name)]
    if not data:
        return False
    K = min(len(data[0][1]["fd"]), 20)
    fig = figure(12, 3.6)
    ax, w = fig.subplots(), 0.85 / len(data)
    for k, (name, p) in enumerate(data):
        ax.bar(np.arange(K) + (k - len(data) / 2 + 0.5) * w, p["fd"][:K], w, label=name, color=f"C{list(t).index(name) % 10}")
    ax.plot(np.arange(K), data[0][1]["real"][:K], "k_", ms=26, label="real images")
    ax.set(xlabel="class", ylabel=f"distance per class, n={data[0][1]['n']}", xticks=np.arange(K))
    ax.legend(fontsize=7, ncols=4)
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
def page(runs, t, judge, reached, pictures):
    r0 = runs[0]
    e = r0.metrics["encoders"][judge]
    seeds = max(len(r["fd"]) for r in t.values())
    share = lambda values: cell(values, "{:.2f}")                     # noqa: E731
    lines = [f"# {r0.metrics['data']}: is it better than random?", "",
             f"{e['distance']}, lower is better, {e['n']:,} samples a run, reference: {e['reference']} ({e['reference_n']:,} images)"
             + (f"; held-out images score {e['fd_heldout']:.3g} (n={e['fd_heldout_n']:,})" if e["fd_heldout"] is not None else "") + f". Seeds: {seeds}"
             + (", mean ± standard deviation." if seeds > 1 else " (no spread: differences below are not claims)."), "",
             "| run | images | steps | epochs | FD | FD of the subset itself | worst class FD | precision | recall | read as labelled | memorised share | train s | prepare s |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for name, r in t.items():
        lines.append(f"| {name} | {r['kept'][0]:,} | {r['steps'][0]:,} | {mean(r['epochs']):,.0f} | {cell(r['fd'])} | {cell(r['fd_subset'])} | {cell(r['worst'])} | "
                     f"{share(r['precision'])} | {share(r['recall'])} | {share(r['read'])} | {share(r['memo'])} | {cell(r['seconds'], '{:,.0f}')} | {cell(r['preparation'], '{:,.0f}')} |")
    heldout, noise = mean([v for r in t.values() for v in r["memo_heldout"]]), mean([v for n, r in t.items() if n != FULL for v in r["memo_noise"]])
    lines += ["", "*Memorised share*: samples nearer (pixels) to the images that the model saw than to equally many, class-matched images that it did not see; "
              + (f"held-out images score {heldout:.2f}, noisy copies {noise:.2f}. " if heldout is not None and noise is not None else "")
              + "For `full` the unseen images are the held-out split. *FD of the subset itself* is what a perfect copier of the kept images would score. "
              + (f"*Worst class FD* is at n={t[r0.name]['worst_n'][0]} a class, where real images score {e['per_class']['real_mean']:.3g} on average. " if "per_class" in e else "")
              + "*Prepare s* counts features, scores, weights, attachments and the training of every network these used.", ""]
    circular = sorted({r.name for r in runs if r.metrics["encoders"][judge].get("circular")})
    if circular:
        lines += [f"> **Warning.** The judge {judge} also selected the images of, or was aligned to by: {', '.join(circular)}. Look at a second encoder's figures.", ""]
    for other in sorted({k for r in runs for k in r.metrics["encoders"]} - {judge}):
        got = {}
        for r in runs:
            if other in r.metrics["encoders"]:
                got.setdefault(r.name, []).append(r.metrics["encoders"][other]["fd"])
        lines += [f"Second judge, {runs[0].metrics['encoders'].get(other, {}).get('distance', other)}: " + ", ".join(f"{n} {cell(v)}" for n, v in got.items()), ""]
    questions = (("Is it better than random?", answer_random(t)), ("Is the gain from selection or from attachments?", answer_source(t)),
                 ("Is it memorising?", answer_memorising(t)), ("What does preparation cost?", answer_cost(t, reached)),
                 ("Does it hold on another model or data set?", answer_elsewhere(t, {**r0.train, "data": r0.metrics["data"]})))
    lines += ["## The five questions", ""]
    for k, (question, answers) in enumerate(questions, 1):
        lines += [f"{k}. **{question}** " + (". ".join(a[0].upper() + a[1:] for a in answers) + "." if answers else "The runs that would answer it are not here."), ""]
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
    if len({r.metrics["data"] for r in runs}) > 1:
        raise common.UserError(f"{a.runs[0]} and others were measured on different data sets: {', '.join(sorted({r.metrics['data'] for r in runs}))}; one report per data set")
    judge = a.encoder or next(iter(runs[0].metrics["encoders"]))
    t = rows_of(runs, judge)
    reached = reach(runs, mean(t[FULL]["fd"])) if FULL in t else {}
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    distance = runs[0].metrics["encoders"][judge]["distance"]
    frontier(runs, t, distance, out / "frontier.png")
    pictures = [("frontier.png", "Quality against cost. Lower and further left is better; dashed: with preparation")]
    sample_sheet(runs, out / "samples.png")
    pictures.append(("samples.png", "Samples, the same label and start noise in each column"))
    if per_class(runs, t, judge, out / "per_class.png"):
        pictures.append(("per_class.png", "Distance per class; the black marks are real images"))
    if nearest_sheet(runs, out / "nearest.png"):
        pictures.append(("nearest.png", "The most suspicious samples (upper row) and the nearest image each model has seen (lower row)"))
    common.save_json(out / "report.json", {"judge": judge, "rows": t, "reached": reached, "preparation": {r.folder.name: r.preparation for r in runs}})
    text = page(runs, t, judge, reached, pictures)
    common.save_text(out / "report.md", text)
    common.log("\n".join(line for line in text.splitlines() if line.startswith("|") or line[:1].isdigit()))
    common.log(f"report: {out / 'report.md'}")


if __name__ == "__main__":
    main()
