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

    python report.py runs/digits/full runs/digits/random --out runs/digits/report
"""
import contextlib
import itertools
import json
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import common
from common import need


@dataclass(frozen=True)
class Kind:
    """What the answers need to know of a run by its name."""
    role: str                # full, random, selected (by a method), attached (to random images)
    title: str = ""          # in sentences


# The runs that run_all.sh may be asked for. The answers look for these names, and for them with a
# budget behind (pruned-0.4) or another score (pruned-moderate); others stand in the table alone.
RUNS = {
    "full":                Kind("full"),
    "random":              Kind("random"),
    "random-attach":       Kind("attached", "Attach on random images"),
    "pruned":              Kind("selected", "Pruning"),
    "pruned-dro":          Kind("selected", "Pruning + DRO weights"),
    "pruned-dro-resample": Kind("selected", "Pruning + DRO resampling"),
    "pruned-dro-permuted": Kind("selected", "Pruning + DRO weights of other classes"),
    "d2c-select":          Kind("selected", "D2C Select"),
    "d2c-select-attach":   Kind("selected", "D2C Select + Attach"),
    # The same for as many epochs as the full run, which is as much shorter as the subset is.
    "full-short":          Kind("short"),
    "random-short":        Kind("short"),
    "pruned-short":        Kind("short"),
}
FULL = "full"
# What a subset has to beat; the second where D2C keeps another number of images than pruning.
RANDOM = ("random", "d2c-random")
# Comparisons on the same images: run, its rival, and how the sentence calls them.
DRO = (("pruned-dro", "pruned", "DRO reweighting", "the same images unweighted"),
       ("pruned-dro-resample", "pruned", "DRO resampling", "the same images unweighted"),
       ("pruned-dro-resample", "pruned-dro", "DRO resampling", "DRO weights in the loss"),
       ("pruned-dro", "pruned-dro-permuted", "DRO reweighting", "the weights of other classes"))
TRAINED_WITH = ("model", "process", "predict", "batch_size", "lr", "schedule", "warmup", "ema",
                "label_drop", "dropout", "class_std", "grad_clip", "align", "flips", "amp",
                "mask_ratio", "min_snr", "optimizer", "betas", "lora")
DRAWN_WITH = ("sampler", "steps", "cfg", "cfg_interval", "cfg_power", "cfg_channels", "time_grid",
              "labels")
SEED = re.compile(r"-seed\d+$")                            # the end of a folder's name
WITHIN = 0.05                # how near to the full run's last distance counts as reached
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
        out["worst_three"] = [statistics.fmean(sorted(one["per_class"]["fd"])[-3:])
                              for one in judges]
    if run.trajectory:
        from models.effects import mean_until
        steps = [point["step"] for point in run.trajectory]
        values = [point.get("fds", [point["fd"]]) for point in run.trajectory]    # (points, judges)
        area = mean_until(steps, values, share * steps[-1])
        if area is not None:
            out["area"] = area.tolist()
    return out


def by_guidance(seeds, judge):
    """{guidance, as text: FD [[one value per judge] per seed]} of all samples.

    seeds: the runs of one name. Only guidances at which every one of them was measured.
    """
    figures = {}
    for cfg in seeds[0].guided:
        rows = [run.guided.get(cfg, {}).get("encoders", {}).get(judge) for run in seeds]
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
        rows = [run.guided.get(cfg, {}).get("encoders", {}).get(judge) for run in seeds]
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
        "read": e.get("read_as_labelled"),
        "precision": e.get("precision"), "recall": e.get("recall"),
        "density": e.get("density"), "coverage": e.get("coverage"),
        "memo_of": audit.get("model_of"),
        "memo": share.get("samples"), "memo_heldout": share.get("heldout"),
        "memo_noise": share.get("noise"), "memo_baseline": share.get("baseline"),
        "memo_alike": share.get("alike"), "memo_alike_n": audit.get("alike_n"),
        "memo_n": audit.get("n"), "memo_side": memo.get("samples", {}).get("n"),
        "ratio": ratio.get("samples"), "ratio_noise": ratio.get("noise")}


def averaged(runs, name):
    """The trajectory of a run, averaged over its seeds at the steps that all of them have."""
    seeds = [{point["step"]: point for point in run.trajectory}         # {step: point} of each
             for run in runs if run.name == name and run.trajectory]
    steps = sorted(set.intersection(*map(set, seeds))) if seeds else []
    path = []
    for step in steps:
        point = {"step": step, "n": seeds[0][step]["n"]}
        for key in ("images_seen", "seconds", "fd"):
            point[key] = statistics.fmean(seed[step][key] for seed in seeds)
        path.append(point)
    return path


def reach(runs):
    """When each run is as good as the full run at its end: {run name: (first such point, best)}.

    Points of trajectories averaged over seeds; the first is None where a run never gets there, and
    without a trajectory of the full run there is nothing. Checkpoints are the resolution: a run got
    there somewhere in the interval before the point.
    """
    paths = {run.name: averaged(runs, run.name) for run in runs if run.trajectory}
    paths = {name: path for name, path in paths.items() if path}
    if FULL not in paths:
        return {}
    # The full run reaches itself, though a seed of it may end above the mean.
    goal = (1 + WITHIN) * paths[FULL][-1]["fd"]
    reached = {}
    for name, path in paths.items():
        first = next((point for point in path if point["fd"] <= goal), None)
        reached[name] = first, min(path, key=lambda point: point["fd"])
    return reached


# ------------------------------------------------------------------------------- figures to words
def mean(values):
    values = [v for v in values if v is not None]
    return statistics.fmean(values) if values else None


def spread(values):
    values = [v for v in values if v is not None]
    return statistics.stdev(values) if len(values) > 1 else None


def prepared(row):
    """Mean seconds of preparation of a row of the table; None when that of a seed is unknown."""
    return None if None in row["preparation"] else mean(row["preparation"])


def cell(values, form="{:.3g}"):
    """'16.2 ± 0.8', '16.2' for one seed, '-' for none."""
    if mean(values) is None:
        return "-"
    text = form.format(mean(values))
    if spread(values) is not None:
        text += f" ± {form.format(spread(values))}"
    return text


def percent(x, sign=""):
    """'12 %', '0.4 %': whole percents from one on, a tenth below."""
    digits = 0 if x == 0 or abs(x) >= 0.01 else 1
    return format(x, f"{sign}.{digits}%").replace("%", " %")


# ----------------------------------------------------------------------------------- differences
@dataclass
class Effect:
    """How much a figure of one run lies above that of its rival, where lower is better."""
    who: str
    whom: str
    what: str                        # the figure, in words
    at: str                          # "at equal steps"
    change: float                    # of the mean, relative to the rival
    half: float | None               # of its 95 % interval; None for one seed
    seeds: int
    judges: int
    headroom: float | None           # how much lower the full run is than the rival; None: unknown

    @property
    def outcome(self):
        if self.half is None:
            return "one seed"
        if self.change == 0 and self.half == 0:
            return "identical"
        if abs(self.change) > self.half:
            return "lower" if self.change < 0 else "higher"
        # An effect as large as all that could be gained would not have been seen.
        if self.headroom is not None and self.headroom < 2 * self.half:
            return "unanswerable"
        return "undetected"

    @property
    def size(self):
        """'+5 % ± 26 %'."""
        text = percent(self.change, "+")
        return text if self.half is None else f"{text} ± {percent(self.half)}"


def matrix(row, key):
    """{seed: [figure of each judge]} of a row; rows of older reports have no seeds."""
    values = row.get("judged", {}).get(key)
    if values is None:
        if None in row.get(key, [None]):
            return {}
        values = [[value] for value in row[key]]
    return dict(zip(row.get("seed", range(len(values))), values))


def effect(t, run, rival, who, whom, what="FD", key="fd"):
    """The Effect of a run against its rival over the seeds of both; None without figures."""
    found = measured_effect(t[run], t[rival], key)
    if found is None:
        return None
    change, half, seeds, judges = found
    at = "at equal steps"
    # The sentence says so where the budgets differ.
    if set(t[run]["steps"]) != set(t[rival]["steps"]):
        at = f"at {t[run]['steps'][0]:,} steps against {t[rival]['steps'][0]:,}"
    return Effect(who, whom, what, at, change, half, seeds, judges, headroom(t, rival, key))


def measured_effect(a, b, key):
    """(change, half, seeds, judges) between two rows, or None where a figure is missing."""
    from models.effects import relative_effect
    mine = matrix(a, key)
    theirs = matrix(b, key)
    seeds = [seed for seed in mine if seed in theirs]
    if not seeds:
        return None
    x = [mine[seed] for seed in seeds]
    y = [theirs[seed] for seed in seeds]
    if len({len(values) for values in (*x, *y)}) > 1:
        return None                      # of different judges
    change, half = relative_effect(x, y)
    return change, half, len(seeds), len(x[0])


def headroom(t, rival, key="fd"):
    """How much lower the full run's figure is, relative to the rival's: what could be gained."""
    if FULL not in t or rival == FULL:
        return None
    found = measured_effect(t[FULL], t[rival], key)
    return None if found is None else -found[0]


def sentence(e):
    """One Effect in words, for details.md. Nothing is called equal."""
    repeated = f"n={e.seeds} seeds"
    if e.judges > 1:
        repeated += f" x {e.judges} judges"
    against = f"{e.who} against {e.whom}, {e.what} {e.at}"
    if e.outcome == "one seed":
        return f"{against}: {e.size}; one seed, so no claim"
    if e.outcome == "identical":
        return f"{against}: the same figures to the last digit, {repeated}"
    if e.outcome in ("lower", "higher"):
        return f"{against}: {e.outcome}, {e.size}, {repeated}"
    if e.outcome == "undetected":
        return (f"{against}: a difference is not detectable below {percent(e.half)} (measured "
                f"{e.size}), {repeated}")
    full = f"{percent(abs(e.headroom))} {'lower' if e.headroom > 0 else 'higher'}"
    return (f"{against}: cannot be answered in this setting: it would show from {percent(e.half)} "
            f"on, and the full run is {full} than {e.whom} (measured {e.size}), {repeated}")


# The order of the outcomes in a summary, and how it calls them.
OUTCOMES = {"lower": "better", "higher": "worse", "undetected": "not detectable",
            "unanswerable": "cannot be answered in this setting",
            "identical": "the same figures", "one seed": "one seed, so no claim"}


def summary(effects, named=lambda e: e.who):
    """All effects in one sentence, by outcome: 'better: Pruning (-23 % ± 8 %); worse: ...'."""
    parts = []
    for outcome, words in OUTCOMES.items():
        found = [e for e in effects if e.outcome == outcome]
        if found:
            figures = ", ".join(f"{named(e)} ({figure_of(e)})" for e in found)
            parts.append(f"{words}: {figures}")
    return "; ".join(parts)


def figure_of(e):
    """The figure of an effect in a summary."""
    if e.outcome == "undetected":
        return f"below {percent(e.half)}, measured {percent(e.change, '+')}"
    return e.size


def family(name):
    """'pruned' for 'pruned-0.4': the run's name without its budget."""
    # A share may be written 0.4, .4 or 5e-2.
    return re.sub(r"-(\d+\.?\d*|\.\d+)(e-?\d+)?$", "", name)


def title(run, roles=("selected",)):
    """'Pruning (moderate) 0.4' for 'pruned-moderate-0.4'; None for a run of another role."""
    name = family(run)
    budget = run[len(name):].replace("-", " ")
    if name in RUNS and RUNS[name].role in roles:
        return RUNS[name].title + budget
    # A further score of run_all.sh, by its name.
    if name not in RUNS and name.startswith("pruned-"):
        score = name.removeprefix("pruned-")
        return f"{RUNS['pruned'].title} ({score}){budget}"
    return None


def rival_of(t, run, families=RANDOM):
    """The row of one of these families with as many images, or None.

    A subset is compared at its own size only.
    """
    for name, row in t.items():
        if family(name) in families and set(row["kept"]) == set(t[run]["kept"]):
            return name
    return None


# ------------------------------------------------------------------------------ the five answers
def against_random(t, key="fd", what="FD"):
    """[Effect] of every selected run against the random row of its size."""
    found = []
    for run in t:
        who = title(run)
        rival = rival_of(t, run)
        if who and rival:
            found.append(effect(t, run, rival, who, rival, what, key))
    return [e for e in found if e]


def of_weights(t):
    """[Effect] of DRO against the same images unweighted, and weighted by the wrong classes.

    It is meant for the worst class.
    """
    found = []
    for run in t:
        for mine, other, who, whom in DRO:
            rival = rival_of(t, run, (other,))
            if family(run) != mine or not rival:
                continue
            who = who + run[len(mine):].replace("-", " ")
            found.append(effect(t, run, rival, who, whom))
            n = {*t[run]["worst_n"], *t[rival]["worst_n"]}
            if len(n) == 1:
                # It depends on n.
                what = f"worst-class FD (n={n.pop()} a class)"
                found.append(effect(t, run, rival, who, whom, what, "worst"))
    return [e for e in found if e]


def of_sources(t, key="fd", what="FD"):
    """[Effect] of selecting and attaching, each alone and together."""
    chosen, attached, both = "d2c-select", "random-attach", "d2c-select-attach"
    if not {chosen, attached, both} <= set(t):
        return []
    base = rival_of(t, chosen)
    if not base:
        return []
    pairs = ((chosen, base, "Selection alone", base), (attached, base, "Attaching alone", base),
             (both, base, "Both", base),
             (both, attached, "Selection on top of attachments", "attachments on random images"))
    found = [effect(t, run, rival, who, whom, what, key) for run, rival, who, whom in pairs]
    return [e for e in found if e]


def all_effects(t, share):
    """{question: [Effect]} of all that the report compares."""
    at_best = "FD at each run's best guidance"
    early = f"mean FD over the first {percent(share)} of training"
    return {"random": against_random(t),
            "random, best guidance": against_random(t, "best_fd", at_best),
            "weights": of_weights(t), "source": of_sources(t),
            "source, best guidance": of_sources(t, "best_fd", at_best),
            "random, early": against_random(t, "area", early),
            "source, early": of_sources(t, "area", early)}


def answer_random(effects):
    """Is it better than random?"""
    said = []
    if effects["random"]:
        said.append(f"FD against random images: {summary(effects['random'])}")
    if effects["random, best guidance"]:
        found = summary(effects["random, best guidance"])
        said.append(f"At each run's best guidance: {found}")
    if effects["weights"]:
        def named(e):
            what = "worst class" if e.what.startswith("worst") else e.what
            return f"{e.who} against {e.whom}, {what}"
        said.append(f"Class weights: {summary(effects['weights'], named)}")
    return said


def answer_source(effects):
    """Does the gain come from selection or from the attachments?"""
    said = []
    if effects["source"]:
        said.append(f"FD: {summary(effects['source'])}")
    if effects["source, early"]:
        said.append(f"{capital(effects['source, early'][0].what)}: "
                    f"{summary(effects['source, early'])}")
    return said


def capital(text):
    return text[:1].upper() + text[1:]


def headroom_lines(t, effects):
    """What could be gained at most, and how large a difference would have shown.

    At the main guidance, and at each run's best where several were drawn.
    """
    lines = []
    for rival in [name for name in t if family(name) in RANDOM]:
        for key, asked, where in (("fd", "random", ""), ("best_fd", "random, best guidance",
                                                         " at each run's best guidance")):
            found = measured_effect(t[FULL], t[rival], key) if FULL in t else None
            if found:
                halves = [e.half for e in effects[asked] if e.whom == rival]
                lines += [headroom_line(rival, where, *found[:2], halves), ""]
    return lines


def headroom_line(rival, where, change, half, halves):
    """change, half: from the rival to the full run. halves: those of the comparisons with it."""
    size = percent(change, "+")
    text = f"**Headroom**{where}: all images instead of `{rival}` change FD by {size}"
    if change >= 0:
        text += ", so the full run is no ceiling here"
    known = [one for one in halves or [half] if one is not None]
    if not known:
        return f"{text}. One seed: nothing is detectable."
    x = statistics.median(known)
    text += f". **Detectable**: {percent(x)}, the middle half-width of a 95 % interval."
    if -change < 2 * x:
        text += (" Headroom below twice that: a gain that does not show **cannot be answered in "
                 "this setting**.")
    return text


def memorising(t):
    """{run: (verdict, the whole sentence)}. Is it memorising?"""
    said = {}
    for name, row in t.items():
        if mean(row["memo"]) is not None:
            judge = against_heldout if of_full_set(row) else against_unseen
            said[name] = judge(name, row)
    return said


def of_full_set(row):
    """Whether a run was trained on all images; older audits do not say, but had no such control."""
    known = [of for of in row.get("memo_of", []) if of]
    if known:
        return known[0] == "the full set"
    return mean(row["memo_heldout"]) is None


def answer_memorising(said):
    """One sentence: the runs by their verdict."""
    verdicts = {}
    for name, (verdict, _) in said.items():
        verdicts.setdefault(verdict, []).append(name)
    parts = [f"{', '.join(names)}: {verdict}" for verdict, names in verdicts.items()]
    return ["; ".join(parts)] if parts else []


def against_heldout(name, row):
    """On a model of the full set, for which the held-out images are the unseen ones."""
    m = mean(row["memo"])
    noise = mean(row["memo_noise"])
    # Of a share near one half, over the samples or over the held-out images where these are fewer.
    error = math.sqrt(0.25 / min(v for v in (*row["memo_n"], *row["memo_side"]) if v))
    verdict = verdict_on_full(m, noise, error)
    return verdict, (f"{name} {verdict}: {m:.2f} of the samples lie nearer to training images than "
                     f"to held-out ones (0.50 = none copied, {noise:.2f} = all of them noisy "
                     f"copies, standard error {error:.2f}){ratio_in_words(row)}")


def verdict_on_full(m, noise, error):
    """noise is what a perfect copier scores, and not 1: see matched_set_test."""
    gap = noise - 0.5
    # Even a perfect copier would not stand out.
    if gap < 2 * error:
        return "has too few held-out images or samples to tell"
    # Most of the way to that copier, and beyond chance.
    if m > 0.5 + max(0.8 * gap, 2 * error):
        return "copies"
    if m > 0.5 + max(gap / 4, 1.5 * error):
        return "leans towards copying"
    return "shows no sign of copying"


def against_unseen(name, row):
    """On a model of a subset, for which other training images are the unseen ones."""
    m = mean(row["memo"])
    noise = mean(row["memo_noise"])
    # Controls: images and samples that are no copies, whatever they score. Not every data folder
    # has held-out images, nor every comparison a full run.
    controls = {"held-out images": mean(row["memo_heldout"]),
                "held-out images most like its own": mean(row["memo_alike"]),
                "samples of the full model": mean(row["memo_baseline"])}
    controls = {what: value for what, value in controls.items() if value is not None}
    # Two standard errors of a share near one half; seeds share the held-out images.
    numbers = [n for n in row["memo_n"] if n]
    if controls and max(controls, key=controls.get) == "held-out images most like its own":
        numbers += [n for n in row.get("memo_alike_n", []) if n]
    chance = 1 / math.sqrt(min(numbers))
    verdict = verdict_on_subset(m, controls, noise, chance)
    compared = ", ".join(f"{what} {value:.2f}" for what, value in controls.items())
    return verdict, (f"{name} {verdict}: {m:.2f} of the samples lie nearer to its own images than "
                     f"to equally many other training images ({compared or 'no control'}, noisy "
                     f"copies {noise:.2f}){ratio_in_words(row)}")


def verdict_on_subset(m, controls, noise, chance):
    """The zero is what images score that are no copies, by the highest of the controls."""
    if not controls:
        return "cannot be judged, there is no control (held-out images, or a full run)"
    zero = max(controls.values())
    # Copies must score visibly more than what is no copy.
    if noise < zero + 0.2:
        return "cannot be judged, images that are no copies score almost what copies do"
    # Held-out images of the same kind should score one half; the full model's samples tell
    # where a subset is nearer to everything.
    held = controls.get("held-out images", 0.5)
    if abs(held - 0.5) > 0.1 and "samples of the full model" not in controls:
        return "cannot be judged, its controls are off"
    # Nearer to what copies score than to what others do.
    if m > (zero + noise) / 2:
        return "copies"
    if m > zero + max(0.1, chance):
        return "leans towards copying"
    return "does not memorise beyond its controls"


def ratio_in_words(row):
    """The second test: samples that are far nearer to one image than to the next."""
    ratio = mean(row["ratio"])
    noise = mean(row["ratio_noise"])
    if ratio is None or noise is None:
        return ""
    return (f"; far nearer to one of them than to the next 50: {percent(ratio)}, noisy copies "
            f"{percent(noise)}")


def answer_cost(t, reached, epochs):
    """What does preparation cost, and when does a run reach the full run's final FD?"""
    said = []
    known = [row for row in t.values() if prepared(row)]
    if known:
        alone = [prepared(row) for row in known]
        shared = [mean(row["preparation_shared"]) for row in known]
        train = [mean(row["seconds"]) for row in known]
        said.append(f"Preparation takes {between(alone)} s a run ({between(shared)} s where runs "
                    f"share it) beside {between(train)} s of training")
    if reached:
        ways = [reached_in_short(t, name, reached) for name in reached if reached[name][0]]
        never = [name for name in reached if not reached[name][0]]
        if never:
            ways.append(f"not reached: {', '.join(never)}")
        said.append(f"Within 5 % of the full run's final FD at equal steps: {'; '.join(ways)}")
    said += [text for _, text in epochs]
    return said


def between(values):
    """'12 to 45'."""
    low, high = f"{min(values):,.0f}", f"{max(values):,.0f}"
    return low if low == high else f"{low} to {high}"


def reached_in_short(t, name, reached):
    point, _ = reached[name]
    text = f"{name} after {point['step']:,} steps"
    if name != FULL:
        text += f" ({speed_up(prepared(t[name]), point, reached)})"
    return text


def speed_up(cost, point, reached):
    """How much sooner than the full run itself, in seconds of all devices together."""
    goal = reached[FULL][0]["seconds"]
    text = f"speed-up {goal / max(point['seconds'], 1e-9):.2f}x"
    if cost is not None:
        text += f", with preparation {goal / max(point['seconds'] + cost, 1e-9):.2f}x"
    return text


def cost_of_each(t, reached):
    """A sentence on each run: preparation beside training, and when it was as good as the full."""
    said = []
    for name, row in t.items():
        cost = prepared(row)
        # None: unknown; 0: the full run and whatever needs nothing before it.
        if cost is None:
            said.append(f"{name}: a file it was prepared with has no record of how it was made, so "
                        "its preparation is unknown")
        elif cost > 0:
            train = mean(row["seconds"])
            said.append(f"{name}: {cost:,.1f} s of preparation "
                        f"({mean(row['preparation_shared']):,.1f} s shared) for {train:,.0f} s of "
                        "training")
        if name in reached:
            said.append(reached_in_words(name, cost, reached))
    return said


def equal_epochs(t):
    """[(verdict, sentence)] on the papers' speed-up, of every pruned run trained that briefly.

    r = its steps / the full run's. It holds where the pruned run comes within 5 % of the full run
    at its end, and is better than the full data and than random images trained for as many steps.
    """
    said = []
    for run, row in t.items():
        if family(run) != "pruned-short" or FULL not in t:
            continue
        steps = set(row["steps"])
        briefly = [name for name in t if family(name) == "full-short"
                   and set(t[name]["steps"]) == steps]
        random = rival_of(t, run, ("random-short",))
        if not briefly or not random or set(t[random]["steps"]) != steps:
            continue
        to_full = effect(t, run, FULL, run, "full at its end")
        rivals = [effect(t, run, briefly[0], run, "full data trained as briefly"),
                  effect(t, run, random, run, "random images trained as briefly")]
        verdict = verdict_on_epochs(to_full, rivals)
        times = t[FULL]["steps"][0] / row["steps"][0]
        figures = ", ".join(f"{e.size} against {e.whom}" for e in (to_full, *rivals))
        said.append((verdict, f"A speed-up of {times:.3g}x at equal epochs ({run}, "
                              f"{row['steps'][0]:,} steps) {verdict}: FD {figures}"))
    return said


def verdict_on_epochs(to_full, rivals):
    """In words; to_full: Effect against the full run, rivals: against what trained as briefly."""
    if to_full.half is None:
        return "is not decided by one seed"
    if to_full.change + to_full.half <= WITHIN and all(e.outcome == "lower" for e in rivals):
        return "holds"
    if to_full.change - to_full.half > WITHIN or any(e.outcome == "higher" for e in rivals):
        return "does not hold"
    return "cannot be answered at this number of seeds"


def reached_in_words(name, cost, reached):
    point, best = reached[name]                            # the first within reach, the best
    if point is None:
        return (f"{name}: the full run's final FD (within 5 %) was not reached; its best is "
                f"{best['fd']:.3g} after {best['step']:,} steps (n={best['n']:,})")
    said = (f"{name}: within 5 % of the full run's final FD (n={point['n']:,}) after "
            f"{point['step']:,} steps, {point['images_seen']:,.0f} images, "
            f"{point['seconds']:,.0f} s")
    if name == FULL:
        return said
    # Against the moment at which the full run itself came within reach.
    return f"{said} ({speed_up(cost, point, reached)})"


def answer_elsewhere(t, setting, others):
    """Does it hold on another model or data set? others: {what it is: its table}.

    In short: how many of the differences that both places claim have the same sign.
    """
    if not others:
        return [f"This report is {setting}; run_all.sh puts those of other networks beside it "
                "(MODEL=unet-tiny bash run_all.sh makes one)"]
    mine = above_random(t)
    said = []
    for name, table in others.items():
        theirs = above_random(table)
        both = [run for run in mine if run in theirs]
        claimed = [run for run in both if mine[run].outcome in ("lower", "higher")
                   and theirs[run].outcome in ("lower", "higher")]
        same = sum(mine[run].outcome == theirs[run].outcome for run in claimed)
        if both:
            said.append(f"{name}: of {len(both)} runs in both, {len(claimed)} differ from random "
                        f"in both places beyond the interval, {same} of them the same way")
    return said


def elsewhere_in_full(t, others):
    """Every run here and there, and the order of the runs.

    Distances of different judges and budgets do not compare. How much a run lies above the random
    row of its own size does, roughly, and so does the order of these figures.
    """
    from scipy.stats import spearmanr
    said = []
    mine = above_random(t)
    theirs = {name: above_random(table) for name, table in others.items()}
    for run, e in mine.items():
        figures = [f"{e.size} here ({e.outcome})"]
        figures += [f"{rows[run].size} with {name} ({rows[run].outcome})"
                    for name, rows in theirs.items() if run in rows]
        if len(figures) > 1:
            said.append(f"{e.who}, FD against random: {'; '.join(figures)}")
    for name, rows in theirs.items():
        both = [run for run in mine if run in rows]
        a = [mine[run].change for run in both]
        b = [rows[run].change for run in both]
        # Three are in some order anyway; a constant has none.
        if len(both) > 3 and len(set(a)) > 1 and len(set(b)) > 1:
            said.append(f"Order of these {len(both)} runs here and with {name}: rank correlation "
                        f"{spearmanr(a, b).statistic:.2f}")
    return said


def above_random(t):
    """{run: Effect against the random row of its size and steps}, of selected and attached runs."""
    out = {}
    for run in t:
        who = title(run, ("selected", "attached"))
        rival = rival_of(t, run)
        if not who or not rival or set(t[run]["steps"]) != set(t[rival]["steps"]):
            continue
        e = effect(t, run, rival, who, rival)
        if e:
            out[run] = e
    return out


# -------------------------------------------------------------------------------------- pictures
# Told apart in grey print too: by mark, dash and hatch.
MARKS = "osD^vPX*<>"
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "ooo", "+++")
DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 2, 1, 2)))


def look(t, name):
    k = list(t).index(name)
    return dict(color=f"C{k % 10}", marker=MARKS[k % len(MARKS)], ls=DASHES[k % len(DASHES)])


def label_of(t, name):
    """The run's name, which says so where its points stand at the seconds of training alone."""
    shown = common.plain(name)
    return f"{shown} (preparation unknown)" if prepared(t[name]) is None else shown


def frontier(runs, t, judge, path):
    """FD against cost, along the trajectories, or at the runs' ends where there are none."""
    # Runs that have points, in the order of the table.
    followed = [name for name in t if any(run.trajectory for run in runs if run.name == name)]
    fig = frontier_curves(runs, t, followed) if followed else frontier_ends(t)
    fig.axes[0].set(ylabel=f"{judge}, lower is better")
    common.save_figure(path, fig, dpi=110)


def frontier_curves(runs, t, followed):
    """FD against steps, images seen and seconds; the band is the lowest to the highest seed."""
    fig = common.figure(12, 4.6)
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
    fig = common.figure(8, 4.2)
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
    fig = common.figure(12, 4.2)
    ax = fig.subplots()
    for k, (name, figures) in enumerate(seeds.items()):
        height = np.mean([figure["fd"][:shown] for figure in figures], axis=0)       # (shown,)
        shift = (k - len(seeds) / 2 + 0.5) * width
        ax.bar(place + shift, height, width, label=common.plain(name),
               color=look(t, name)["color"], hatch=HATCHES[k % len(HATCHES)], edgecolor="white",
               lw=0.3)
    ax.hlines(real["real"][:shown], place - 0.45, place + 0.45, color="k", lw=1.8,
              label="real images")
    some = f" (the first {shown} of {K})" if K > shown else ""
    ax.set(xlabel="class" + some, ylabel=f"distance per class, n={real['n']}", xticks=place,
           xlim=(-0.6, shown - 0.4))
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8)
    common.save_figure(path, fig, dpi=110)
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
    fig = common.figure(12, height * len(strips) + 0.1)
    for ax, (name, pixels) in zip(np.atleast_1d(fig.subplots(len(strips), 1)), strips):
        ax.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest", **how)
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        ax.set(xticks=[], yticks=[])
    common.save_figure(path, fig, dpi=110)


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
        nothing = "" if said else " The runs that would answer it are not here."
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
            f"Sampler {drawn('sampler')}, {drawn('steps')} steps, guidance {drawn('cfg')}{power} on "
            f"t in {drawn('cfg_interval')}, labels {drawn('labels')}, seed {drawn('seed')}, "
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
        pictures = draw_all(runs, t, distance, judge, out)
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
