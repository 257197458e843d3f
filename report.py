"""The comparison of several runs: one table, five answers, and the pictures.

Runs that differ only in `-seedN` at the end of their folder's name are one row, with mean and
standard deviation. Differences are paired: same start noise and labels, same seed, same judge. One
is claimed when its 95 % interval over seeds and judges excludes zero (models/effects.py). Else the
report says how large it would have to be, or that this setting cannot answer: where random images
are almost as good as all of them, no selection has anything to gain. One seed claims nothing.

Reads   RUN/metrics.json (metrics_cfg*.json of further guidances), train.args.json, samples.npy,
        nearest.png, trajectory.json where there is one, and the *.args.json of the stages before
        --beside: report.json of other data sets or networks, for the fifth question; a folder
        stands for all NAME/report/report.json in it
Writes  OUT/report.md        the table, five answers, the pictures: a minute's reading
        OUT/details.md       every comparison, judge, guidance and cost, and the protocol
        OUT/report.json, frontier.png, per_class.png, samples.png, nearest.png

    python report.py runs/digits/full runs/digits/random --out ex/report
"""
import contextlib
import itertools
import json
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import common
from common import comparison, need
from common.answers import (FULL, RUNS, SEED, all_effects, answer_cost, answer_elsewhere,
                            answer_memorising, answer_random, answer_source, best_is_strongest,
                            capital, cell, cost_of_each, elsewhere_in_full, equal_epochs,
                            headroom_lines, mean, memorising, of_full_set, percent, prepared, reach,
                            sentence)

TRAINED_WITH = ("model", "process", "predict", "batch_size", "lr", "schedule", "warmup", "ema",
                "label_drop", "dropout", "class_std", "grad_clip", "align", "flips", "amp",
                "mask_ratio", "min_snr", "optimizer", "betas", "lora")
DRAWN_WITH = ("sampler", "steps", "cfg", "cfg_interval", "cfg_power", "cfg_channels", "time_grid",
              "labels")
NUMBER = (int, float)
MAYBE = (int, float, type(None))


# --------------------------------------------------------------------------------------- reading
def read_run(folder):
    """One run as a namespace, its figures under every encoder at every guidance."""
    folder = Path(folder)
    guided = {}                                            # {guidance: figures}, the main one first
    files = common.samples_of(folder)
    for cfg, samples in files.items():
        file = folder / (f"metrics_cfg{cfg:g}.json" if guided else "metrics.json")
        guided[cfg] = read_metrics(file, folder, samples)
    train = read_training(folder / "train.args.json", folder)
    for metrics in guided.values():
        # Samples, figures and weights must be of one state of the run.
        drawn = metrics["protocol"].get("checkpoint_step")
        stands = steps_of(train)
        need(drawn in (None, stands), f"{folder}: samples are of step {drawn}, the run stands at "
             f"{stands}; draw and evaluate again")
    costs = costs_by_thing(train, folder)
    return SimpleNamespace(
        folder=folder,
        name=SEED.sub("", folder.name),                    # that of all its seeds
        metrics=next(iter(guided.values())),
        guided=guided,
        train=train,
        costs=costs,                                       # {thing: (what, seconds)}
        preparation=preparation(costs),                    # {what: seconds}
        samples=np.load(next(iter(files.values())), mmap_mode="r"),     # (n, H, W, C)
        trajectory=read_trajectory(folder / "trajectory.json"),
        nearest=read_picture(folder / "nearest.png"))      # (h, w[, 3]), or None


def read_metrics(file, folder, samples):
    """metrics.json of these samples, with all that every row of the report needs."""
    need(file.is_file(), f"{file}: no such file; measure the run first: python evaluate.py --runs "
         f"{folder} --data DATA")
    metrics = common.load_json(file, "figures of evaluate.py", data=str, encoders=dict,
                               protocol=dict, provenance=dict)
    # What follows need not have been measured: without pixels, without classes, without an audit.
    there(file, metrics, memorisation=(dict, type(None)))
    there(f"{file}: memorisation", metrics.get("memorisation") or {}, pixels=dict)
    measured = metrics["encoders"]
    need(measured, f"{file}: encoders is empty: nothing was measured; run evaluate.py again")
    for name, e in measured.items():
        part = f"{file}: encoders {name}"
        with common.reading(part, "row of figures"):
            common.fields(part, e, fd=NUMBER, n=int, identity=str, distance=str, reference=str)
            there(part, e, kid=dict, per_class=dict, fd_subset=MAYBE, read_as_labelled=MAYBE,
                  precision=MAYBE, recall=MAYBE, density=MAYBE, coverage=MAYBE, judges=list,
                  fd_random_subsets=(list, type(None)))
            for one in e.get("judges", []):
                common.fields(part, one, fd=NUMBER, identity=str)
    common.load_npy(samples, "samples, uint8 (n, H, W, C)", (None,) * 4, "u")
    need(metrics.get("samples_sha256") == common.sha256(samples),
         f"{file}: is of other samples than {samples}; run evaluate.py on this run again")
    return metrics


def there(path, value, **kinds):
    """common.fields() for those of the keys that the dict has."""
    common.fields(path, value, **{key: kind for key, kind in kinds.items() if key in value})


def read_training(file, folder):
    """train.args.json of a finished run."""
    train = common.record_of(folder, "train")
    need(train and train.get("seconds") is not None,
         f"{folder}: no finished train.args.json; the report compares complete runs, so train this "
         "one to its end")
    common.fields(file, train, images_seen=int, images_kept=int, epochs=NUMBER,
                  train_seconds=NUMBER)
    common.fields(file, train["args"], data=str, model=str, process=str, batch_size=int, lr=NUMBER,
                  ema=NUMBER)
    batch = train["args"]["batch_size"]
    need(batch > 0, f"{file}: a batch_size of {batch}; train the run again")
    return train


def read_trajectory(file):
    """trajectory.json, or None where there is none."""
    if not file.exists():
        return None
    what = "points of evaluate.py"
    made = common.load_json(file, what, encoder=str, name=str, points=list)
    need(made["points"], f"{file}: points is empty; run evaluate.py --trajectory again")
    with common.reading(file, what):
        # The key says how the points were drawn; older files have none.
        there(file, made, key=dict)
        there(file, made.get("key", {}), settings=dict)
        for point in made["points"]:
            common.fields(file, point, step=int, images_seen=int, seconds=NUMBER, fd=NUMBER, n=int)
    return made


def read_picture(file):
    """The pixels of a picture that evaluate.py drew, or None where there is none."""
    from PIL import Image
    if not file.exists():
        return None
    remedy = "remove it, or draw it again with evaluate.py --overwrite"
    with common.reading(file, "picture", remedy), common.no_bombs(), Image.open(file) as picture:
        return np.asarray(picture)


def reports_in(places, out):
    """The report.json named by --beside; a folder stands for those of the comparisons in it.

    Not the one that is made here, nor what is no whole report: nobody asked for that by name.
    """
    files = []
    for place in places:
        if not Path(place).is_dir():
            files.append(place)
            continue
        for file in sorted(Path(place).glob("*/report/report.json")):
            with contextlib.suppress(common.UserError):
                common.fields(file, common.load_json(file, "a report"), setting=list)
                if file.parent.resolve() != out.resolve():
                    files.append(file)
    return files


def read_beside(files, own):
    """{what it is: its table} of the reports of other data sets and networks.

    own: the setting of this one, of which more would say nothing new.
    """
    out = {}
    for file in files:
        made = common.load_json(file, "a report.json of report.py", rows=dict, about=str,
                                judge=str, setting=list)
        # More of the same network and data would pass for a confirmation.
        if made["setting"] == own:
            common.log(f"{file}: the same network and data set as here, so no answer to whether it "
                       "holds elsewhere; left out")
            continue
        for name, row in made["rows"].items():
            part = f"{file}: row {name}"
            with common.reading(part, "row of figures"):
                common.fields(part, row, fd=list, kept=list, steps=list)
            numbers = [value for value in row["fd"] if isinstance(value, NUMBER)]  # one per seed
            need(numbers and len(numbers) == len(row["fd"]),
                 f"{part}: fd is no list of numbers; make that report again")
        place = Path(file).resolve().parent.parent.name
        out[f"{made['about']}, {made['judge']} [{place}]"] = made["rows"]
    return out


def steps_of(train):
    """Optimizer steps of a run, by its train.args.json."""
    return train["images_seen"] // train["args"]["batch_size"]


def costs_by_thing(record, run="the run"):
    """{thing: (what it is, seconds)} of all that a training run needed before it could start.

    Features, scores, weights, attachments, and the training of every network that these used, each
    thing once. None: unknown. record: train.args.json.
    """
    cost = {}
    for step in common.upstream(record, run):
        what, known = cost.get(step.key, (step.what, 0.0))
        # Of two figures for one thing the larger counts: a checkpoint at the end of training
        # contains those before it.
        unknown = step.seconds is None or known is None
        cost[step.key] = what, None if unknown else max(step.seconds, known)
    return cost


def preparation(costs):
    """{what: seconds} of costs_by_thing()."""
    # Several things may be of one kind, as the kept sets of two calls of prune.py.
    out = {}
    for what, seconds in costs.values():
        before = out.get(what, 0)
        out[what] = None if seconds is None or before is None else before + seconds
    return out


def amortised(run, runs):
    """Seconds of a run's preparation when all that use a thing share its cost; None: unknown."""
    shares = []
    for thing, (_, seconds) in run.costs.items():
        users = sum(thing in other.costs for other in runs)
        shares.append(None if seconds is None else seconds / users)
    return None if None in shares else sum(shares)


def total(cost):
    """Seconds in all, None when a part is unknown."""
    return None if None in cost.values() else sum(cost.values())


# --------------------------------------------------------------------------- is it one comparison
def seeds_of_one_run(runs):
    """Runs of one name become one row, as seeds: these must be the same run with other seeds."""
    for a, b in itertools.combinations(runs, 2):
        if a.name != b.name:
            continue
        mine = recipe(a)
        theirs = recipe(b)
        # One training that counts twice would make the spread too small.
        seed = a.train["args"].get("seed")
        faults = [f"differ in {key}" for key in mine if mine[key] != theirs[key]]
        if seed == b.train["args"].get("seed"):
            faults.append(f"have the same seed, {seed}")
        if faults:
            raise common.UserError(f"{a.folder} and {b.folder}: would count as two seeds of "
                                   f"{a.name}, but {faults[0]}; leave one out, or give it a folder "
                                   "of another name")


def recipe(run):
    """What two seeds of one run have in common."""
    args = {key: run.train["args"].get(key) for key in (*TRAINED_WITH, "reweight_mode")}
    return args | {key: run.train[key] for key in ("images_kept", "images_seen")}


def comparable(runs, judge):
    """A line for each setting in which runs differ although it moves the figures.

    Differences that make the comparison void are refused.
    """
    need_equal(runs, "data sets", [r.metrics["data"] for r in runs], "one report per data set")
    need_equal(runs, "versions of the data set", [r.metrics.get("data_sha256") for r in runs],
               "evaluate all runs on one data folder")
    # A run that was not measured under the judge has no row.
    for r in runs:
        need(judge in r.metrics["encoders"], f"{r.folder}: no figures under encoder {judge}; run "
             f"evaluate.py --runs {r.folder} --encoder {judge}")
    judged = [r.metrics["encoders"][judge] for r in runs]     # one row of figures a run
    need_equal(runs, "networks", [e["identity"] for e in judged],
               "run evaluate.py for all of them again, with the same weights")
    need_equal(runs, "references", [e["reference"] for e in judged],
               "run evaluate.py for all of them with the same reference")
    need_equal(runs, "numbers of samples", [e["n"] for e in judged],
               "a distance depends on n: draw or --num equally many")
    return [*differing(runs, "sampling", [r.metrics["protocol"] for r in runs], DRAWN_WITH),
            *differing(runs, "training", [r.train["args"] for r in runs], TRAINED_WITH)]


def need_equal(runs, what, values, remedy):
    for run, value in zip(runs, values):
        need(value == values[0], f"{runs[0].folder} and {run.folder} were measured on different "
             f"{what} ({values[0]}, {value}); {remedy}")


def differing(runs, what, settings, keys):
    """A line for each key in which the settings (a dict per run) differ."""
    lines = []
    for key in keys:
        # As JSON, for a list is no key of a dict.
        got = {json.dumps(s.get(key)): run.name for run, s in zip(runs, settings)}
        if len(got) > 1:
            values = ", ".join(f"{value} ({name}, ...)" for value, name in got.items())
            lines.append(f"{what} differs in {key}: {values}")
    return lines


def use_trajectories(runs, judge):
    """Leave each run its points, when they were scored by the judge; returns notes on the others.

    From here on run.trajectory is a list of points, all at one n.
    """
    notes = []
    for run in runs:
        made = run.trajectory
        run.trajectory = []
        fault = made and fault_of_trajectory(run, made, judge)
        if fault:
            notes.append(f"the trajectory of {run.folder.name} {fault}")
        elif made:
            for point in made["points"]:
                seconds = common.device_seconds(run.train, point["seconds"])
                run.trajectory.append({**point, "seconds": seconds})
    # A distance depends on n, so curves of two n are not two curves of one figure.
    numbers = {point["n"] for run in runs for point in run.trajectory}
    need(len(numbers) < 2, f"{runs[0].folder / 'trajectory.json'} and others hold points at "
         "different n; run evaluate.py --trajectory for all with one --trajectory-num")
    return notes


def fault_of_trajectory(run, made, judge):
    """Why the points are not of this run under this judge, or ""."""
    again = "left out; run evaluate.py --trajectory again"
    # Points of another judge are another figure.
    if made["encoder"] != run.metrics["encoders"][judge]["identity"]:
        return f"was scored by {made['name']}, not by this report's judge {judge}: left out"
    end = made["points"][-1]["step"]
    stands = steps_of(run.train)
    # The run was prolonged since, or its trajectory broken off.
    if end != stands:
        return f"ends at step {end:,}, the run at {stands:,}: {again}"
    # The samples were drawn again with other settings.
    for key, value in made.get("key", {}).get("settings", {}).items():
        if run.metrics["protocol"].get(key) != value:
            return f"was drawn with another {key} than the samples: {again}"
    return ""


# ----------------------------------------------------------------------------------------- table
# Figures that every judge has of its own, under these names in the table.
JUDGED = dict(fd="fd", fd_subset="fd_subset", precision="precision", recall="recall",
              read="read_as_labelled", density="density", coverage="coverage")


def rows_of(runs, judge, share):
    """{run name: {figure: [one value per seed]}} in the order given.

    Under `judged` the figures of every judge: {figure: [[one value per judge] per seed]}. share: of
    the training, over which the mean FD of a trajectory is taken.
    """
    table = {}
    for run in runs:
        row = table.setdefault(run.name, {})
        for name, value in figures_of(run, judge).items():
            row.setdefault(name, []).append(value)
        row.setdefault("preparation_shared", []).append(amortised(run, runs))
        judged = row.setdefault("judged", {})
        for name, values in judged_figures(run, judge, share).items():
            judged.setdefault(name, []).append(values)
    for name, row in table.items():
        seeds = len(row["seed"])
        # What was not measured of every seed is left out.
        row["judged"] = {key: values for key, values in row["judged"].items()
                         if len(values) == seeds}
        repetitions = [run for run in runs if run.name == name]
        row["by_guidance"] = by_guidance(repetitions, judge)
        add_best_guidance(repetitions, row, judge)
        for key in ("area", "best_fd"):
            values = row["judged"].get(key, seeds * [[None]])
            row[key] = [mean(by_judge) for by_judge in values]
    return table


def judges_in(e):
    """[the figures of each judge] of one row of metrics.json; older files are of one judge."""
    return e.get("judges") or [e]


def judged_figures(run, judge, share):
    """{figure: [one value per judge]} of one run, what was measured."""
    e = run.metrics["encoders"][judge]
    judges = judges_in(e)
    out = {}
    for name, key in JUDGED.items():
        values = [one.get(key) for one in judges]
        if None not in values:
            out[name] = values
    if all("per_class" in one for one in judges):
        out["worst"] = [one["per_class"]["worst_fd"] for one in judges]
        # Steadier than the worst alone, which is another class under another judge.
        figures = [one["per_class"].get("fd_all", one["per_class"]["fd"]) for one in judges]
        out["worst_three"] = [statistics.fmean(sorted(by_class)[-3:]) for by_class in figures]
    if run.trajectory:
        from models.effects import mean_until
        steps = [point["step"] for point in run.trajectory]
        values = [point.get("fds", [point["fd"]]) for point in run.trajectory]    # (points, judges)
        area = mean_until(steps, values, share * steps[-1])
        if area is not None:
            out["area"] = area.tolist()
    return out


def rows_at(cfg, seeds, judge):
    """[row of metrics.json at this guidance] of each run, None where it was not measured."""
    return [run.guided.get(cfg, {}).get("encoders", {}).get(judge) for run in seeds]


def by_guidance(seeds, judge):
    """{guidance, as text: FD [[one value per judge] per seed]} of all samples.

    seeds: the runs of one name. Only guidances at which every one of them was measured.
    """
    figures = {}
    for cfg in seeds[0].guided:
        rows = rows_at(cfg, seeds, judge)
        if None not in rows:
            text = "unknown" if cfg is None else f"{cfg:g}"
            figures[text] = [[one["fd"] for one in judges_in(e)] for e in rows]
    return figures


def add_best_guidance(seeds, row, judge):
    """row: FD at the best guidance, chosen on one half of the noise and scored on the other.

    seeds: the runs of one name. Their numbers are of half as many samples as the column FD.
    """
    from models.effects import best_guidance
    settings = list(seeds[0].guided)
    halves = []                                            # [guidance][seed][judge][half]
    for cfg in settings:
        rows = rows_at(cfg, seeds, judge)
        if None in rows or any("fd_halves" not in one for e in rows for one in judges_in(e)):
            return
        halves.append([[one["fd_halves"] for one in judges_in(e)] for e in rows])
    if len(settings) < 2:
        return
    values, chosen = best_guidance(halves)
    row["judged"]["best_fd"] = values.tolist()
    row["best_guidance"] = sorted({settings[k] for k in chosen})


def figures_of(run, judge):
    """{figure: value} of one run; None where it was not measured."""
    train = run.train
    e = run.metrics["encoders"][judge]
    classes = e.get("per_class", {})
    audit = run.metrics.get("memorisation") or {}
    memo = audit.get("pixels", {})
    share = {name: figure.get("share") for name, figure in memo.items()}
    ratio = {name: figure.get("ratio", {}).get("share") for name, figure in memo.items()}
    # Every figure that a later report may want to read from report.json.
    return {
        "seed": train["args"].get("seed"), "guidance": run.metrics["protocol"].get("cfg"),
        "kept": train["images_kept"], "steps": steps_of(train), "epochs": train["epochs"],
        "images_seen": train["images_seen"],
        "seconds": common.device_seconds(train, train["train_seconds"]),
        "preparation": total(run.preparation),
        "n": e["n"], "fd": e["fd"], "fd_subset": e.get("fd_subset"),
        "fd_random_subsets": mean(e.get("fd_random_subsets") or []),
        "worst": classes.get("worst_fd"), "worst_n": classes.get("n"),
        "worst_three_n": classes.get("n_all", classes.get("n")),
        "read": e.get("read_as_labelled"),
        "precision": e.get("precision"), "recall": e.get("recall"),
        "density": e.get("density"), "coverage": e.get("coverage"),
        "memo_of": audit.get("model_of"),
        "memo": share.get("samples"), "memo_heldout": share.get("heldout"),
        "memo_noise": share.get("noise"), "memo_baseline": share.get("baseline"),
        "memo_alike": share.get("alike"), "memo_alike_n": audit.get("alike_n"),
        "memo_n": audit.get("n"), "memo_side": memo.get("samples", {}).get("n"),
        "ratio": ratio.get("samples"), "ratio_noise": ratio.get("noise")}


# -------------------------------------------------------------------------------------- the page
def heading(t, e, data):
    seeds = max(len(row["fd"]) for row in t.values())
    judges = len(judges_in(e))
    spreads = " (one seed: differences below are not claims)."
    if seeds > 1:
        spreads = ", mean ± standard deviation over them."
    size = f" ({e['reference_n']:,} images)" if e.get("reference_n") else ""
    cfg = guidance_of(t)
    lines = [f"# {data}: is it better than random?", "",
             f"{e['distance']}, lower is better, {e['n']:,} samples a run{cfg}, reference: "
             f"{e['reference']}{size}. Judges: {judges}. Seeds: {seeds}{spreads}", ""]
    if judges == 1 and e["identity"].startswith("scratch"):
        lines += ["> **One judge.** Scratch networks of other seeds may order these runs "
                  "otherwise; run evaluate.py again, which asks several.", ""]
    return lines


def guidance_of(t):
    settings = {cfg for row in t.values() for cfg in row.get("guidance", [])}
    return f", guidance {settings.pop():g}" if len(settings) == 1 and None not in settings else ""


def main_table(t):
    """What a minute's reading needs; the other figures are in details.md."""
    return table_of({name: main_cells(row) for name, row in t.items()})


def table_of(rows):
    """Lines of a table {name: {column: text}}; a column without any figure is left out."""
    columns = [column for column in next(iter(rows.values()))
               if any(cells[column] != "-" for cells in rows.values())]
    return [line_of("run", *columns), "|---|" + "---|" * len(columns),
            *(line_of(name, *(cells[column] for column in columns))
              for name, cells in rows.items())]


def main_cells(row):
    """{column: text} of one row of the table."""
    best = cell(row["best_fd"])
    if best != "-":
        best += f" (at {' or '.join(f'{cfg:g}' for cfg in row['best_guidance'])})"
    subset = cell(row["fd_subset"])
    if mean(row["fd_random_subsets"]) is not None:
        subset += f" ({mean(row['fd_random_subsets']):.3g})"
    # A mean over seeds of which one is unknown is unknown.
    preparing = "?"
    if prepared(row) is not None:
        preparing = cell(row["preparation"], "{:,.0f}")
    return {"images": f"{row['kept'][0]:,}", "steps": f"{row['steps'][0]:,}",
            "FD": cell(row["fd"]), "FD at its best guidance": best,
            "FD of the subset itself (random ones)": subset,
            "worst class FD": cell(row["worst"]), "memorised share": cell(row["memo"], "{:.2f}"),
            "train s": cell(row["seconds"], "{:,.0f}"), "prepare s": preparing}


def more_cells(row):
    """{column: text} of the second table."""
    return {"epochs": f"{mean(row['epochs']):,.0f}", "precision": cell(row["precision"], "{:.2f}"),
            "recall": cell(row["recall"], "{:.2f}"), "density": cell(row["density"], "{:.2f}"),
            "coverage": cell(row["coverage"], "{:.2f}"),
            "read as labelled": cell(row["read"], "{:.2f}"), "early FD": cell(row["area"])}


def line_of(*cells):
    return f"| {' | '.join(cells)} |"


def judge_table(t):
    """FD under each judge alone, mean over seeds: how far one judge's order can be trusted."""
    rows = {}
    for name, row in t.items():
        values = row["judged"].get("fd", [])
        if not values or len(values[0]) < 2:
            return []
        by_judge = np.mean(values, 0)                                 # (J,)
        rows[name] = {f"judge {k}": f"{value:.3g}" for k, value in enumerate(by_judge)}
    return ["## Every judge alone", "", *table_of(rows), ""]


def guidance_table(t):
    """FD at each guidance, mean over seeds."""
    settings = {tuple(row["by_guidance"]) for row in t.values()}
    if len(settings) > 1 or len(next(iter(settings))) < 2:
        return []
    rows = {}
    for name, row in t.items():
        rows[name] = {f"guidance {cfg}": cell([mean(by_judge) for by_judge in values])
                      for cfg, values in row["by_guidance"].items()}
    return ["## Every guidance, all samples", "", *table_of(rows), ""]


def yardstick(e, name):
    """Real images, at their own n."""
    if e.get("fd_heldout") is None:
        return []
    text = f"Real held-out images score {e['fd_heldout']:.3g} at n={e['fd_heldout_n']:,}"
    if e.get("fd_at_heldout_n") is not None:
        text += f"; {name}'s samples score {e['fd_at_heldout_n']:.3g} at that n"
    if e["fd_heldout_n"] != e["n"]:
        text += (f". Neither is comparable with the column FD (n={e['n']:,}): a distance falls as "
                 "n grows")
    return [text + ".", ""]


def legend(t, e, name, share):
    """What the columns mean."""
    heldout = mean([v for row in t.values() for v in row["memo_heldout"]])
    # Not of the full run: its noisy copies have another ceiling.
    noise = mean([v for run, row in t.items() if run != FULL for v in row["memo_noise"]])
    controls = ""
    if heldout is not None and noise is not None:
        controls = f"; held-out images score {heldout:.2f}, noisy copies {noise:.2f}"
    text = ["*Memorised share*: samples nearer (pixels) to the images that the model saw than to "
            f"equally many, class-matched images that it did not see{controls}."]
    if any(of_full_set(row) and mean(row["memo"]) is not None for row in t.values()):
        text.append("For a run on all images the unseen ones are the held-out split.")
    text.append("*FD of the subset itself* is what a perfect copier of the kept images would "
                "score, in brackets the mean of 20 random subsets of as many of each class.")
    if any(row["best_fd"] != [None] * len(row["seed"]) for row in t.values()):
        text.append(f"*FD at its best guidance* is of half as many samples ({e['n'] // 2:,}): the "
                    "guidance is chosen on one half of the noise and scored on the other.")
        strongest = [run for run, row in t.items() if best_is_strongest(row)]
        if strongest:
            text.append(f"Of {', '.join(strongest)} the strongest guidance tried was the best, so "
                        "a stronger one may be better still (GUIDANCE of run_all.sh, sample.py "
                        "--cfg).")
    if mean(t[name]["worst_n"]) is not None:
        text.append(f"*Worst class FD* is at n={t[name]['worst_n'][0]} a class, where real images "
                    f"score {e['per_class']['real_mean']:.3g} on average.")
    text.append(f"*Early FD* is the mean over the first {percent(share)} of training, along the "
                "trajectory from its first checkpoint on. Seconds are those of all processes "
                "together. *Prepare s* counts features, scores, weights, attachments and the "
                "training of every network these used; sampling and judging are in no column.")
    if any(prepared(row) is None for row in t.values()):
        text.append("*?*: a file that the run was prepared with has no record of what it cost.")
    text.append("± is a standard deviation over seeds in tables, and half of a 95 % interval over "
                "seeds and judges in sentences (two-way analysis of variance, Satterthwaite's "
                "degrees of freedom), in % of the second run's mean; it is not corrected for the "
                "number of comparisons.")
    return [" ".join(text), ""]


def warnings(runs, judge):
    """Rows that the judge is not fair to."""
    circular = {run.name for run in runs if run.metrics["encoders"][judge].get("circular")}
    if not circular:
        return []
    names = ", ".join(sorted(circular))
    return [f"> **Warning.** The judge, {judge}, also selected the images of, or was the "
            f"alignment target of: {names}. Do not trust these rows under it: measure with a "
            "second encoder and compare.", ""]


def second_judges(runs, judge):
    """The figures of other encoders."""
    lines = []
    # Not every run need have been measured under each of them.
    others = {name for run in runs for name in run.metrics["encoders"]} - {judge}
    for other in sorted(others):
        # {run name: [distance of each seed]}
        got = {}
        for run in runs:
            if other in run.metrics["encoders"]:
                got.setdefault(run.name, []).append(run.metrics["encoders"][other]["fd"])
        distance = runs[0].metrics["encoders"].get(other, {}).get("distance", other)
        figures = ", ".join(f"{name} {cell(values)}" for name, values in got.items())
        lines += [f"Second judge, {distance}: {figures}", ""]
    return lines


def about(runs):
    """'SiT-T/2 (flow) on digits 8 x 8, 800 steps of 128'."""
    train = runs[0].train
    model, process, data, size = setting_of(runs)
    return (f"{model} ({process}) on {data} {size}, {steps_of(train):,} steps of "
            f"{train['args']['batch_size']}")


def setting_of(runs):
    """[network, process, data set, size of its images]."""
    run = runs[0]
    size = " x ".join(map(str, run.samples.shape[1:3]))
    return [run.train["args"]["model"], run.train["args"]["process"], run.metrics["data"], size]


def answers(asked):
    """asked: {question: [sentence]}."""
    lines = ["## The five questions", ""]
    for k, (question, said) in enumerate(asked.items(), 1):
        nothing = "" if said else " The runs that would answer it are not here (RUNS, REPORT=full)."
        lines += [f"{k}. **{question}**{nothing}", *(f"   - {answer}." for answer in said), ""]
    return lines


def costs(runs):
    """{run name: what its preparation cost} as a table, that of the last seed."""
    # Seeds share their preparation, or differ in it by chance: the last one's is shown.
    cost = {run.name: run.preparation for run in runs if run.preparation}
    if not cost:
        return []
    rows = []
    for name, parts in cost.items():
        seconds = ["?" if v is None else f"{v:,.1f}" for v in parts.values()]
        rows.append(line_of(name, ", ".join(map(" ".join, zip(parts, seconds)))))
    return ["## Preparation, in seconds", "", "| run | what |", "|---|---|", *rows, ""]


def protocol(run, e):
    drawn = run.metrics["protocol"].get
    args = run.train["args"]
    # Without pixels nothing was compared with single images.
    figures = "no figure that needs single training images: the data folder holds latents only. "
    if "kid" in e:
        figures = (f"precision/recall k={e.get('precision_k')}, density/coverage "
                   f"k={e.get('density_k')}, n={e.get('neighbours_n')}; KID subsets of "
                   f"{e['kid']['subset_size']}. ")
    power = "" if drawn("cfg_power") is None else f" with power {drawn('cfg_power'):g}"
    versions = ", ".join(f"{name} {value}" for name, value in run.metrics["provenance"].items())
    return ["## Protocol", "",
            f"Sampler {drawn('sampler')}, {drawn('steps')} steps, guidance {drawn('cfg')}{power} "
            f"on t in {drawn('cfg_interval')}, labels {drawn('labels')}, seed {drawn('seed')}, "
            f"{drawn('weights')} weights, amp {drawn('amp')}; encoder {e['identity']}; {figures}"
            f"Training: {args['model']}, {args['process']}, batch {args['batch_size']}, lr "
            f"{args['lr']:g}, EMA {args['ema']}, amp {args['amp']}.", "",
            f"Versions: {versions}.", ""]


def pages(runs, t, judge, reached, pictures, notes, others, share):
    """(report.md, details.md, {question: [Effect]})."""
    first = runs[0]
    e = first.metrics["encoders"][judge]
    effects = all_effects(t, share)
    verdicts = memorising(t)
    epochs = equal_epochs(t)
    said = {
        "Is it better than random?": answer_random(effects),
        "Is the gain from selection or from attachments?": answer_source(effects),
        "Is it memorising?": answer_memorising(verdicts),
        "What does preparation cost, and when is the full run's quality reached?":
            answer_cost(t, reached, epochs),
        "Does it hold on another model or data set?": answer_elsewhere(t, about(runs), others)}
    remarks = [f"> **Note.** {capital(note)}.\n" for note in notes]
    shown = [f"![{Path(name).stem}]({name})\n\n*{caption}*\n" for name, caption in pictures]
    data = first.metrics["data"]
    main = [*heading(t, e, data), *main_table(t), "", *headroom_lines(t, effects), *remarks,
            *warnings(runs, judge), *answers(said), "## Pictures", "", *shown,
            "Every comparison, judge, guidance and cost, the meaning of the columns and the "
            "protocol: [details.md](details.md).", ""]
    every = [sentence(one) for found in effects.values() for one in found]
    every += [text for _, text in verdicts.values()]
    every += cost_of_each(t, reached)
    every += [text for _, text in epochs]
    every += elsewhere_in_full(t, others) if others else []
    details = [f"# {data}: all of it", "", *yardstick(e, first.name), "## Further figures", "",
               *table_of({name: more_cells(row) for name, row in t.items()}), "",
               *legend(t, e, first.name, share), *second_judges(runs, judge),
               *judge_table(t), *guidance_table(t), "## Every comparison", "",
               *(f"- {text}." for text in every), "", *costs(runs), *protocol(first, e)]
    return "\n".join(main), "\n".join(details), effects


# ----------------------------------------------------------------------------------- command line
def parse_args(argv=None):
    p = common.Parser(__doc__)
    p.add_argument("runs", nargs="+", metavar="RUN",
                   help="run folders that evaluate.py has measured, the full run first")
    p.add_argument("--out", required=True, help="folder of the report")
    p.add_argument("--beside", nargs="+", default=[], metavar="FILE", help="report.json of other "
                   "data sets or networks, or the folder of their comparisons (runs)")
    p.add_argument("--area", type=common.number(above=0, high=1), default=0.3, help="share of the "
                   "training over which early quality is averaged, along trajectories")
    p.add_argument("--encoder", help="judge of the table; default: the first under which the first "
                   "run was measured")
    common.add_list_flag(p, runs=RUNS)
    return p.parse_args(argv)


@common.command
def main(argv=None):
    common.single_process("report.py")
    args = parse_args(argv)
    out = Path(args.out)
    common.free_for_output(out)
    twice = common.named_twice(args.runs)
    need(not twice, f"{twice}: is named twice, and would count as two seeds; name each run once")
    for run in args.runs:
        need(Path(run).resolve() != out.resolve(),
             f"{out}: is the run {run}, whose nearest.png the report's would replace; choose "
             "another --out")
    runs = [read_run(run) for run in args.runs]
    others = read_beside(reports_in(args.beside, Path(args.out)), setting_of(runs))
    judge = args.encoder or next(iter(runs[0].metrics["encoders"]))
    seeds_of_one_run(runs)
    notes = comparable(runs, judge) + use_trajectories(runs, judge)
    t = rows_of(runs, judge, args.area)
    reached = reach(runs)
    distance = runs[0].metrics["encoders"][judge]["distance"]
    with common.claim(out):
        common.sweep(out)
        pictures = comparison.draw_all(runs, t, distance, judge, out)
        text, details, effects = pages(runs, t, judge, reached, pictures, notes, others, args.area)
        compared = {question: [{**vars(e), "outcome": e.outcome} for e in found]
                    for question, found in effects.items()}
        common.save_json(out / "report.json", {
            "about": about(runs), "setting": setting_of(runs), "judge": judge, "rows": t,
            "effects": compared, "reached": reached,
            "preparation": {run.folder.name: run.preparation for run in runs}})
        common.save_text(out / "details.md", details)
        common.save_text(out / "report.md", text)
    for line in text.splitlines():
        if line.startswith(("|", "   - ", "**Headroom")) or line[:1].isdigit():
            common.log(line)
    common.log(f"report: {out / 'report.md'}")


if __name__ == "__main__":
    main()
