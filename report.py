"""The comparison of several runs: one table, five answers, and the pictures.

Runs that differ only in `-seedN` at the end of their folder's name are one row, with mean and standard deviation. A difference counts when it lies
outside the 95 % interval of no difference (Welch's t over seeds); with one seed nothing is claimed beyond "higher" or "lower".

Reads   RUN/metrics.json, train.args.json, samples.npy, nearest.png, trajectory.json where there is one, and the *.args.json of the stages before;
        --beside: report.json of other data sets or networks, for the fifth question
Writes  OUT/report.md, report.json, frontier.png, per_class.png, samples.png, nearest.png

    python report.py runs/digits/full runs/digits/random --out runs/digits/report
"""
import itertools
import json
import math
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import common

# Names that run_all.sh gives its runs. The five answers look for these, and for them with a budget behind (pruned-0.4); others stand in the
# table alone.
FULL, RANDOM, RANDOM_ATTACH, SELECT, D2C = "full", "random", "random-attach", "d2c-select", "d2c-select-attach"
PRUNED, DRO, DRO_RESAMPLE = "pruned", "pruned-dro", "pruned-dro-resample"
D2C_RANDOM = "d2c-random"                                             # where D2C keeps another number of images than pruning
TITLES = {PRUNED: "Pruning", DRO: "Pruning + DRO weights", DRO_RESAMPLE: "Pruning + DRO resampling", SELECT: "D2C Select", D2C: "D2C Select + Attach"}


# ---------------------------------------------------------------------------------------------- reading
def record_of(folder, script):
    file = Path(folder) / f"{script}.args.json"
    return common.load_record(file) if file.exists() else None


def steps_of(train):
    """Optimizer steps of a run, by its train.args.json."""
    return train["images_seen"] // train["args"]["batch_size"]


def device_seconds(record, seconds):
    """What a script took by the clock, times the processes that it ran on (as its record says, else one). Features, difficulty and tokens are noted
    so already."""
    return None if seconds is None else seconds * ((record or {}).get("provenance") or {}).get("processes", 1)


class Preparation:
    """What had to be computed before a training run could start, each thing once; seconds None = unknown. Paths are as the records name them."""

    def __init__(self, record, run):
        self.run, self.data, self.cost, self.visited = run, record["args"]["data"], {}, set()
        args = record["args"]
        for path, what in ((args.get("indices"), "kept set"), (args.get("weights"), "class weights"), (args.get("attach"), "attachments")):
            if path:
                self.follow(path, what, attached=path == args.get("attach"))
        if args.get("init"):
            self.network(args["init"], "start weights", args.get("official"))

    def need(self, path):
        if not Path(path).exists():
            raise common.UserError(f"{path}: no such file, but {self.run} was prepared with it; "
                                   "run report.py from the folder where the runs were made")
        return Path(path)

    def done(self, folder, script):
        """The record of a stage that has finished, or None where it never ran."""
        made = record_of(folder, script)
        if made and made.get("seconds") is None:
            raise common.UserError(f"{folder}: {script}.py has not finished there, but {self.run} was prepared with it; run its command again")
        return made

    def add(self, what, seconds, key):
        """Of two figures for one thing the larger counts: a checkpoint at the end of training contains those before it."""
        name, known = self.cost.get(key, (what, 0.0))
        self.cost[key] = name, None if seconds is None or known is None else max(seconds, known)

    def network(self, checkpoint, what, official=None):
        """Training of a diffusion model up to this checkpoint; that of official weights is unknown."""
        path = self.need(checkpoint)
        if official:
            seconds = None
        elif path.name == "last.pt" and (made := self.done(path.parent, "train")):
            seconds = device_seconds(made, made["train_seconds"])
        else:                                                         # step_*.pt: not what came after it
            seconds = device_seconds(record_of(path.parent, "train"), common.load_pt(path).get("seconds"))
        self.add(f"{what} ({path.parent.name})", seconds, path.parent.resolve())

    def encoder(self, name, weights, what):
        """Training of an encoder that this project trains; those of others count nothing."""
        if name == "ddae":
            self.network(weights, what)
        elif name == "scratch":
            file = self.need(weights or Path(self.data) / "scratch.pt")
            self.add("scratch network", float(common.load_pt(file).get("seconds", 0)), file.resolve())

    def follow(self, path, what, attached=False, features=False):
        """The stage that wrote `path`, and the stages before it. attached: its attachments are used too; features: only its features are."""
        path = self.need(path)
        folder = path if path.is_dir() else path.parent
        here = folder.resolve()
        if (here, attached, features) in self.visited:
            return
        self.visited.add((here, attached, features))
        prune, reweight, attach = (self.done(folder, script) for script in ("prune", "reweight", "attach"))
        if prune:
            self.pruned(prune, here, features)
        if reweight:
            self.add("DRO proxy", device_seconds(reweight, reweight["seconds"]), (here, "proxy"))
            self.network(reweight["args"]["reference"], "reference network", reweight["args"].get("official"))
        if attach:
            self.attached(attach, here, attached)
        if not (prune or reweight or attach):                         # the user's own file
            self.add(f"{what} ({path})", None, path.resolve())

    def pruned(self, made, here, features):
        args, extracted, scored = made["args"], made.get("seconds_features") or 0, made.get("seconds_scores") or 0
        looked = args.get("score") not in (None, "random", "el2n", "ccs")           # these look at no features (el2n trains its own network)
        if features:
            scored = 0
        elif args.get("features") and looked:                                    # its seconds_features are those of the file, where it knew them
            if extracted and not record_of(Path(args["features"]).parent, "prune"):
                self.need(args["features"])
            else:
                extracted = 0
                self.follow(args["features"], "features", features=True)
        if args.get("scores") and not features:
            self.follow(args["scores"], "scores")
        self.add("features and scores", extracted + scored or (0 if features or args.get("features") else made["seconds"]), (here, "prune"))
        if looked and not args.get("features"):
            self.encoder(args.get("surrogate"), args.get("weights"), "surrogate network")

    def attached(self, made, here, attached):
        args, origin = made["args"], made["args"].get("difficulty")
        if args.get("select") in ("interval", "easy", "medium", "hard"):
            home = Path(origin).parent.resolve() if origin else here
            self.add("difficulty", made.get("seconds_difficulty") or 0, (home, "difficulty"))
            if origin:                                                # scored by an earlier call, with its reference
                self.follow(origin, "difficulty")
            else:
                self.network(args["reference"], "scorer network", args.get("official"))
        if attached:
            if seconds := (made.get("seconds_text") or 0) + (made.get("seconds_visual") or 0):
                self.add("attachments", seconds, (here, "attachments"))
            weights = args.get("visual_weights") or (args.get("reference") if args.get("visual") == "ddae" else None)
            self.encoder(args.get("visual"), weights, "visual encoder")
        if args.get("indices"):                                       # a subset that another stage chose
            self.follow(args["indices"], "kept set")


def preparation(record, run="the run"):
    """{what: seconds} of all that had to be computed before a training run could start: features, scores, weights, attachments, and the training of
    every network that these used. None: unknown."""
    out = {}
    for what, seconds in Preparation(record, run).cost.values():
        out[what] = None if seconds is None or out.get(what, 0) is None else out.get(what, 0) + seconds
    return out


def total(cost):
    """Seconds in all, None when a part is unknown."""
    return None if None in cost.values() else sum(cost.values())


def read_run(folder):
    """One run as a namespace, its figures under every encoder."""
    folder = Path(folder)
    if not (folder / "metrics.json").is_file():
        raise common.UserError(f"{folder / 'metrics.json'}: no such file; measure the run first: python evaluate.py --runs {folder} --data DATA")
    m = common.load_json(folder / "metrics.json", "figures of evaluate.py", data=str, encoders=dict, protocol=dict, provenance=dict)
    check_figures(folder / "metrics.json", m)
    t = record_of(folder, "train")
    if t is None or t.get("seconds") is None:
        raise common.UserError(f"{folder}: no finished train.args.json; the report compares complete runs, so train this one to its end")
    number = (int, float)
    common.check_kinds(folder / "train.args.json", "the record of train.py", t, images_seen=int, images_kept=int, epochs=number, train_seconds=number)
    common.check_kinds(folder / "train.args.json", "its args", t["args"], data=str, model=str, process=str, batch_size=int, lr=number, ema=number)
    if t["args"]["batch_size"] < 1:
        raise common.UserError(f"{folder / 'train.args.json'}: a batch_size of {t['args']['batch_size']}; train the run again")
    drawn, stands = m["protocol"].get("checkpoint_step"), steps_of(t)
    if drawn not in (None, stands):
        raise common.UserError(f"{folder}: samples are of step {drawn}, the run stands at {stands}; draw and evaluate again")
    samples = common.load_npy(folder / "samples.npy", "samples, uint8 (n, H, W, C)", (None,) * 4, "u")
    if m.get("samples_sha256") != common.sha256(folder / "samples.npy"):
        raise common.UserError(f"{folder / 'metrics.json'}: is of other samples than {folder / 'samples.npy'}; run evaluate.py on this run again")
    return SimpleNamespace(folder=folder, name=re.sub(r"-seed\d+$", "", folder.name), metrics=m, train=t, preparation=preparation(t, folder),
                           trajectory=read_trajectory(folder / "trajectory.json"), samples=samples, nearest=read_picture(folder / "nearest.png"))


def check_figures(file, m):
    """Raise UserError where metrics.json lacks what every row of the report needs, or holds a word where a number belongs."""
    number, maybe, audit = (int, float), (int, float, type(None)), m.get("memorisation") or {}
    common.check_kinds(file, "memorisation", audit)
    common.check_kinds(file, "memorisation in pixels", audit.get("pixels", {}))
    if not m["encoders"]:
        raise common.UserError(f"{file}: encoders is empty: nothing was measured; run evaluate.py again")
    for name, e in m["encoders"].items():
        common.check_kinds(file, f"encoders {name}", e, fd=number, n=int, identity=str, distance=str, reference=str)
        common.check_kinds(file, f"kid of {name}", e.get("kid", {}))
        common.check_kinds(file, f"per_class of {name}", e.get("per_class", {}))
        for k in ("fd_subset", "read_as_labelled", "precision", "recall", "density", "coverage"):
            common.check_kinds(file, f"{k} of {name}", e.get(k), maybe)


def read_trajectory(file):
    """trajectory.json, or None where there is none."""
    if not file.exists():
        return None
    made = common.load_json(file, "points of evaluate.py", encoder=str, name=str, points=list)
    if not made["points"]:
        raise common.UserError(f"{file}: points is empty; run evaluate.py --trajectory again")
    common.check_kinds(file, "key", made.get("key", {}))
    common.check_kinds(file, "settings", made.get("key", {}).get("settings", {}))
    for p in made["points"]:
        common.check_kinds(file, "a point", p, step=int, images_seen=int, seconds=(int, float), fd=(int, float), n=int)
    return made


def read_picture(file):
    """The pixels of a picture that evaluate.py drew, or None where there is none."""
    from PIL import Image
    if not file.exists():
        return None
    try:
        with common.no_bombs(), Image.open(file) as im:
            return np.asarray(im)
    except Exception as e:                                            # on damaged files Pillow raises many kinds
        raise common.UserError(f"{file}: not a readable picture ({e}); remove it, or draw it again with evaluate.py --overwrite")


TRAINED_WITH = ("model", "process", "predict", "batch_size", "lr", "schedule", "warmup", "ema", "label_drop", "dropout", "class_std", "grad_clip", "align", "flips", "amp")


def seeds_of_one_run(runs):
    """Runs of one name become one row, as seeds: refused where they are the same seed twice, or not the same run."""
    recipe = lambda r: {k: r.train["args"].get(k) for k in (*TRAINED_WITH, "reweight_mode")} | {k: r.train[k] for k in ("images_kept", "images_seen")}      # noqa: E731
    for a, b in itertools.combinations(runs, 2):
        if a.name == b.name:
            mine, theirs, seed = recipe(a), recipe(b), a.train["args"].get("seed")
            what = next((f"differ in {k}" for k in mine if mine[k] != theirs[k]), f"have the same seed, {seed}" if seed == b.train["args"].get("seed") else None)
            if what:
                raise common.UserError(f"{a.folder} and {b.folder}: would count as two seeds of {a.name}, but {what}; leave one out, or give it a folder of another name")


def comparable(runs, judge):
    """One line for each setting in which runs differ although it moves the figures; differences that make the comparison void are refused."""
    encoder = lambda r: r.metrics["encoders"][judge]                  # noqa: E731
    for what, value, remedy in (
            ("data sets", lambda r: r.metrics["data"], "one report per data set"),
            ("versions of the data set", lambda r: r.metrics.get("data_sha256"), "evaluate all runs on one data folder"),
            ("networks", lambda r: encoder(r)["identity"], "run evaluate.py for all of them again, with the same weights"),
            ("references", lambda r: encoder(r)["reference"], "run evaluate.py for all of them with the same reference"),
            ("numbers of samples", lambda r: encoder(r)["n"], "a distance depends on n: draw or --num equally many")):
        if what == "networks":
            for r in runs:
                if judge not in r.metrics["encoders"]:
                    raise common.UserError(f"{r.folder}: no figures under encoder {judge}; run evaluate.py --runs {r.folder} --encoder {judge}")
        if other := next((r for r in runs if value(r) != value(runs[0])), None):
            raise common.UserError(f"{runs[0].folder} and {other.folder} were measured on different {what} ({value(runs[0])}, {value(other)}); "
                                   f"{remedy}")
    out = []
    for what, settings, keys in (("sampling", lambda r: r.metrics["protocol"], ("sampler", "steps", "cfg", "cfg_interval", "labels")),
                                 ("training", lambda r: r.train["args"], TRAINED_WITH)):
        for k in keys:
            got = {json.dumps(settings(r).get(k)): r.name for r in runs}
            if len(got) > 1:
                out.append(f"{what} differs in {k}: " + ", ".join(f"{v} ({name}, ...)" for v, name in got.items()))
    return out


def use_trajectories(runs, judge):
    """Leave each run its points, when they were scored by the judge; all at one n. Returns notes on those left out."""
    notes = []
    for r in runs:
        kept, r.trajectory = r.trajectory, []
        if not kept:
            continue
        drawn, end, stands = kept.get("key", {}).get("settings", {}), kept["points"][-1]["step"], steps_of(r.train)
        other = next((k for k, v in drawn.items() if r.metrics["protocol"].get(k) != v), None)
        again = "; run evaluate.py --trajectory again"
        wrong = (f"was scored by {kept['name']}, not by this report's judge {judge}: left out" if kept["encoder"] != r.metrics["encoders"][judge]["identity"] else
                 f"ends at step {end:,}, the run at {stands:,}: left out{again}" if end != stands else
                 f"was drawn with another {other} than the samples: left out{again}" if other else None)
        if wrong:
            notes.append(f"the trajectory of {r.folder.name} {wrong}")
        else:
            r.trajectory = [{**p, "seconds": device_seconds(r.train, p["seconds"])} for p in kept["points"]]
    if len({p["n"] for r in runs for p in r.trajectory}) > 1:
        raise common.UserError(f"{runs[0].folder / 'trajectory.json'} and others hold points at different n; run evaluate.py --trajectory for all "
                               "with one --trajectory-num")
    return notes


def rows_of(runs, judge):
    """{run name: {figure: [one value per seed]}} in the order given."""
    table = {}
    for r in runs:
        e, audit = r.metrics["encoders"][judge], r.metrics.get("memorisation") or {}
        classes, memo = e.get("per_class", {}), audit.get("pixels", {})
        share = lambda name, memo=memo: memo.get(name, {}).get("share")                         # noqa: E731
        ratio = lambda name, memo=memo: memo.get(name, {}).get("ratio", {}).get("share")        # noqa: E731
        values = {
            "kept": r.train["images_kept"], "steps": steps_of(r.train), "epochs": r.train["epochs"],
            "images_seen": r.train["images_seen"], "seconds": device_seconds(r.train, r.train["train_seconds"]), "preparation": total(r.preparation),
            "n": e["n"], "fd": e["fd"], "fd_subset": e.get("fd_subset"),
            "worst": classes.get("worst_fd"), "worst_n": classes.get("n"), "read": e.get("read_as_labelled"),
            **{k: e.get(k) for k in ("precision", "recall", "density", "coverage")},
            "memo": share("samples"), "memo_heldout": share("heldout"), "memo_noise": share("noise"), "memo_baseline": share("baseline"),
            "memo_alike": share("alike"),
            "memo_n": audit.get("n"), "memo_side": memo.get("samples", {}).get("n"), "ratio": ratio("samples"), "ratio_noise": ratio("noise")}
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


def prepared(row):
    """Mean seconds of preparation of a row of the table; None when that of a seed is unknown."""
    return None if None in row["preparation"] else mean(row["preparation"])


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
    return re.sub(r"-(\d+\.?\d*|\.\d+)(e-?\d+)?$", "", name)


def title(run):
    """'Pruning (moderate) 0.4' for 'pruned-moderate-0.4', None for a run that no selection made."""
    name = family(run)
    if name in TITLES:
        who = TITLES[name]
    elif name.startswith(PRUNED + "-"):                               # a second score, by its name
        who = f"{TITLES[PRUNED]} ({name[len(PRUNED) + 1:]})"
    else:
        return None
    return who + run[len(name):].replace("-", " ")


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
    out = []
    for run in t:
        if (who := title(run)) and (rival := rival_of(t, run)):
            out.append(versus(t, run, rival, who, rival))
    for run in t:                                                     # DRO is meant for the worst class
        for mine, other, who, whom in ((DRO, PRUNED, "DRO reweighting", "the same images unweighted"),
                                       (DRO_RESAMPLE, PRUNED, "DRO resampling", "the same images unweighted"),
                                       (DRO_RESAMPLE, DRO, "DRO resampling", "DRO weights in the loss")):
            if family(run) == mine and (rival := rival_of(t, run, (other,))):
                out.append(versus(t, run, rival, who, whom))
                if len({*t[run]["worst_n"], *t[rival]["worst_n"]}) == 1:          # it depends on n
                    out.append(versus(t, run, rival, who, whom, f"worst-class FD (n={t[run]['worst_n'][0]} a class)", "worst"))
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
        m, held, noise, base, alike = (mean(r[k]) for k in ("memo", "memo_heldout", "memo_noise", "memo_baseline", "memo_alike"))
        if m is None:
            continue
        chance = 1 / math.sqrt(min(r["memo_n"]))                      # two standard errors of a share near one half; seeds share the held-out images
        ratio, ratio_noise, second = mean(r["ratio"]), mean(r["ratio_noise"]), ""
        if ratio is not None and ratio_noise is not None:
            second = f"; far nearer to one of them than to the next 50: {percent(ratio)}, noisy copies {percent(ratio_noise)}"
        if held is None:                                              # a copier cannot score 1 here: see models.metrics.matched_set_test
            error = math.sqrt(0.25 / min(v for v in (*r["memo_n"], *r["memo_side"]) if v))          # of the samples, or of the few held-out images
            gap = noise - 0.5
            verdict = ("has too few held-out images or samples to tell" if gap < 2 * error else
                       "copies" if m > 0.5 + max(0.8 * gap, 2 * error) else
                       "leans towards copying" if m > 0.5 + max(gap / 4, 1.5 * error) else "shows no sign of copying")
            out.append(f"{name} {verdict}: {m:.2f} of the samples lie nearer to training images than to held-out "
                       f"ones (0.50 = none copied, {noise:.2f} = all of them noisy copies, standard error {error:.2f}){second}")
            continue
        zero = max(v for v in (held, base, alike) if v is not None)
        verdict = ("copies" if m > (zero + noise) / 2 else
                   "leans towards copying" if m > zero + max(0.1, chance) else "does not memorise beyond its controls")
        if abs(held - 0.5) > 0.1 and base is None:
            verdict = "cannot be judged, its controls are off"
        if noise < zero + 0.2:
            verdict = "cannot be judged, images that are no copies score almost what copies do"
        out.append(f"{name} {verdict}: {m:.2f} of the samples lie nearer to its own images than to equally many unseen ones "
                   f"(held-out images {held:.2f}"
                   + (f", those most like its own {alike:.2f}" if alike is not None else "")
                   + (f", samples of the full model {base:.2f}" if base is not None else "") + f", noisy copies {noise:.2f}){second}")
    return out


def answer_cost(t, reached):
    """What does preparation cost, and when does each run reach the full run's final FD?"""
    out = []
    for name, r in t.items():
        train, prep = mean(r["seconds"]), prepared(r)
        if prep is None:
            out.append(f"{name}: a file it was prepared with has no record of how it was made, so its preparation is unknown")
        elif prep > 0:
            out.append(f"{name}: {prep:,.1f} s of preparation for {train:,.0f} s of training")
        if FULL not in reached or name not in reached:
            continue
        (point, best), (goal, _) = reached[name], reached[FULL]
        if point is None:
            out.append(f"{name}: the full run's final FD (within 5 %) was not reached; its best is {best['fd']:.3g} after {best['step']:,} steps (n={best['n']:,})")
            continue
        sped = ""
        if name != FULL:
            sped = f"speed-up {goal['seconds'] / max(point['seconds'], 1e-9):.2f}x"
            sped += "" if prep is None else f", with preparation {goal['seconds'] / max(point['seconds'] + prep, 1e-9):.2f}x"
        out.append(f"{name}: within 5 % of the full run's final FD (n={point['n']:,}) after {point['step']:,} steps, {point['images_seen']:,.0f} images, "
                   f"{point['seconds']:,.0f} s" + (f" ({sped})" if sped else ""))
    return out


def answer_elsewhere(t, setting, others):
    """Does it hold on another model or data set? others: {what it is: its table}. Distances of different judges and budgets do not compare; how much a
    run lies above the random row of its own size does, roughly, and so does the order of these figures."""
    if not others:
        return [f"This report is {setting}; run_all.sh puts those of other networks and data sets beside it (MODEL=unet-tiny bash run_all.sh makes one)"]
    from scipy.stats import spearmanr
    out, mine = [], above_random(t)
    theirs = {name: above_random(o) for name, o in others.items()}
    for run, (who, rel, counts) in mine.items():
        said = [f"{rel:+.0%} here{counts}"] + [f"{o[run][1]:+.0%} with {name}{o[run][2]}" for name, o in theirs.items() if run in o]
        if len(said) > 1:
            out.append(f"{who}, FD against random: " + "; ".join(said).replace("%", " %"))
    for name, o in theirs.items():
        both = [run for run in mine if run in o]
        a, b = ([rows[run][1] for run in both] for rows in (mine, o))
        if len(both) > 3 and len(set(a)) > 1 and len(set(b)) > 1:         # three are in some order anyway; a constant has none
            out.append(f"Order of these {len(both)} runs here and with {name}: rank correlation {spearmanr(a, b).statistic:.2f}")
    return out


def above_random(t):
    """{run: (title, FD relative to the random row of its size and steps - 1, ' (n=3)' or what keeps it from counting)} of all selected or attached runs."""
    out = {}
    for run in t:
        who, rival = title(run) or (run == RANDOM_ATTACH and "Attach on random images"), rival_of(t, run)
        if who and rival and set(t[run]["steps"]) == set(t[rival]["steps"]):
            rel, _, n, counts = difference(t[run]["fd"], t[rival]["fd"])
            out[run] = who, rel, f" ({f'n={n}' if counts else f'within the spread, n={n}' if n > 1 else 'one seed'})"
    return out


def read_beside(files, own):
    """{what it is: its table} of the reports of other data sets and networks; `own` is the setting of this one, of which more would say nothing new."""
    out = {}
    for file in files:
        made = common.load_json(file, "a report.json of report.py", rows=dict, about=str, judge=str, setting=list)
        if made["setting"] == own:
            common.log(f"{file}: the same network and data set as here, so no answer to whether it holds elsewhere; left out")
            continue
        for name, row in made["rows"].items():
            common.check_kinds(file, f"row {name}", row, fd=list, kept=list, steps=list)
            if not row["fd"] or not all(isinstance(v, (int, float)) for v in row["fd"]):
                raise common.UserError(f"{file}: row {name}: fd is no list of numbers; make that report again")
        out[f"{made['about']}, {made['judge']} [{Path(file).resolve().parent.parent.name}]"] = made["rows"]
    return out


def averaged(runs, name):
    """The trajectory of a run, averaged over its seeds at the steps that all of them have: [point]."""
    per = [{p["step"]: p for p in r.trajectory} for r in runs if r.name == name and r.trajectory]
    steps = sorted(set.intersection(*map(set, per))) if per else []
    return [{"step": s, "n": per[0][s]["n"], **{k: statistics.fmean(p[s][k] for p in per) for k in ("images_seen", "seconds", "fd")}} for s in steps]


def reach(runs, within=0.05):
    """{run name: (first point of its averaged trajectory with FD <= (1 + within) x the full run's last, or None; its best point)}; {} without a full
    run's trajectory.

    Checkpoints are the resolution: a run reached it somewhere in the interval before the point.
    """
    paths = {name: path for name in dict.fromkeys(r.name for r in runs) if (path := averaged(runs, name))}
    if FULL not in paths:
        return {}
    return {name: (next((p for p in path if p["fd"] <= (1 + within) * paths[FULL][-1]["fd"]), None), min(path, key=lambda p: p["fd"])) for name, path in paths.items()}


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
MARKS, HATCHES = "osD^vPX*<>", ("", "///", "...", "\\\\\\", "xxx", "ooo", "+++")
DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 2, 1, 2)))


def look(t, name):
    k = list(t).index(name)
    return dict(color=f"C{k % 10}", marker=MARKS[k % len(MARKS)], ls=DASHES[k % len(DASHES)])


def curve(runs, name, key):
    """(x, mean, lowest, highest FD) over the seeds of a run, at the steps that all its seeds have; x is the mean of `key`."""
    path = averaged(runs, name)
    fd = [[p["fd"] for r in runs if r.name == name for p in r.trajectory if p["step"] == point["step"]] for point in path]         # (steps, seeds)
    return np.array([p[key] for p in path]), np.array([p["fd"] for p in path]), np.min(fd, 1), np.max(fd, 1)


def plain_log(ax):
    """A logarithmic y axis with plain numbers."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def frontier(runs, t, judge, path):
    """FD against steps, images seen and seconds, band = lowest to highest seed; without trajectories the end points against seconds, and with
    preparation. Where that is unknown the points stand at the training seconds, and the name says so."""
    label_of = lambda name: name + " (preparation unknown)" * (prepared(t[name]) is None)       # noqa: E731
    followed = [name for name in t if any(r.trajectory for r in runs if r.name == name)]
    if followed:
        fig = figure(12, 4.6)
        axes = (("step", "steps"), ("images_seen", "images seen"), ("seconds", "seconds of training + preparation"))
        for ax, (key, label) in zip(fig.subplots(1, 3, sharey=True), axes):
            for name in followed:
                x, fd, low, high = curve(runs, name, key)
                x = x + (prepared(t[name]) or 0 if key == "seconds" else 0)
                ax.plot(x, fd, ms=4, lw=1.3, label=label_of(name), **look(t, name))
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
            ax.errorbar([x], [fd], yerr=spread(r["fd"]), capsize=3, label=label_of(name), ms=7, **style | dict(ls="none"))
            if prep := prepared(r):
                ax.plot([x, x + prep], [fd, fd], color=style["color"], ls=":", lw=1)
                ax.plot([x + prep], [fd], ms=7, mfc="none", **style)
        ax.set(xlabel="seconds of training (filled) and with preparation (hollow)", ylabel=f"{judge}, lower is better")
        ax.set(xlim=(0, None), ylim=(0, None))
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
        height, place = np.mean([p["fd"][:K] for p in seeds], axis=0), np.arange(K) + (k - len(rows) / 2 + 0.5) * w             # (K,) both
        ax.bar(place, height, w, label=name, color=look(t, name)["color"], hatch=HATCHES[k % len(HATCHES)], edgecolor="white", lw=0.3)
    ax.hlines(real["real"][:K], np.arange(K) - 0.45, np.arange(K) + 0.45, color="k", lw=1.8, label="real images")
    some = f" (the first {K} of {len(real['fd'])})" if len(real["fd"]) > K else ""
    ax.set(xlabel="class" + some, ylabel=f"distance per class, n={real['n']}", xticks=np.arange(K), xlim=(-0.6, K - 0.4))
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8)
    save(fig, path)
    return True


def sample_sheet(runs, path, columns=20):
    """A row of samples per run, the same labels and start noise in each column."""
    first = [r for r in runs if not re.search(r"-seed\d+$", r.folder.name)]
    fig = figure(12, 0.72 * len(first) + 0.1)
    for ax, r in zip(np.atleast_1d(fig.subplots(len(first), 1)), first):
        x = r.samples[:columns]
        strip = np.concatenate(np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255), axis=1)          # (H, columns W, C)
        ax.imshow(strip.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        ax.set_ylabel(r.name, rotation=0, ha="right", va="center", fontsize=9)
        ax.set(xticks=[], yticks=[])
    save(fig, path)


def nearest_sheet(runs, path):
    """nearest.png of every run: the most suspicious samples above, the nearest image that the model has seen below."""
    first = [r for r in runs if not re.search(r"-seed\d+$", r.folder.name) and r.nearest is not None]
    if not first:
        return False
    fig = figure(12, 1.55 * len(first) + 0.1)
    for ax, r in zip(np.atleast_1d(fig.subplots(len(first), 1)), first):
        ax.imshow(r.nearest, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
        ax.set_ylabel(r.name, rotation=0, ha="right", va="center", fontsize=9)
        ax.set(xticks=[], yticks=[])
    save(fig, path)
    return True


# ---------------------------------------------------------------------------------------------- the page
def heading(t, e, data):
    seeds = max(len(r["fd"]) for r in t.values())
    spreads = ", mean ± standard deviation." if seeds > 1 else " (no spread: differences below are not claims)."
    size = f" ({e['reference_n']:,} images)" if e["reference_n"] else ""
    return [f"# {data}: is it better than random?", "",
            f"{e['distance']}, lower is better, {e['n']:,} samples a run, reference: {e['reference']}{size}. Seeds: {seeds}{spreads}", ""]


def main_table(t):
    share, whole = lambda values: cell(values, "{:.2f}"), lambda values: cell(values, "{:,.0f}")          # noqa: E731
    columns = {
        "images": lambda r: f"{r['kept'][0]:,}", "steps": lambda r: f"{r['steps'][0]:,}", "epochs": lambda r: f"{mean(r['epochs']):,.0f}",
        "FD": lambda r: cell(r["fd"]), "FD of the subset itself": lambda r: cell(r["fd_subset"]), "worst class FD": lambda r: cell(r["worst"]),
        "precision": lambda r: share(r["precision"]), "recall": lambda r: share(r["recall"]), "read as labelled": lambda r: share(r["read"]),
        "memorised share": lambda r: share(r["memo"]), "train s": lambda r: whole(r["seconds"]),
        "prepare s": lambda r: "?" if prepared(r) is None else whole(r["preparation"])}
    line = lambda cells: f"| {' | '.join(cells)} |"                   # noqa: E731
    rows = [[name, *(show(r) for show in columns.values())] for name, r in t.items()]
    return [line(["run", *columns]), "|---|" + "---|" * len(columns), *map(line, rows)]


def yardstick(e, name):
    """Real images, at their own n."""
    if e["fd_heldout"] is None:
        return []
    text = f"Real held-out images score {e['fd_heldout']:.3g} at n={e['fd_heldout_n']:,}"
    if (at := e.get("fd_at_heldout_n")) is not None:
        text += f"; {name}'s samples score {at:.3g} at that n"
    if e["fd_heldout_n"] != e["n"]:
        text += f". Neither is comparable with the column FD (n={e['n']:,}): a distance falls as n grows"
    return ["", text + "."]


def legend(t, e, name):
    """What the columns mean."""
    heldout, noise = mean([v for r in t.values() for v in r["memo_heldout"]]), mean([v for n, r in t.items() if n != FULL for v in r["memo_noise"]])
    controls = f"; held-out images score {heldout:.2f}, noisy copies {noise:.2f}" if heldout is not None and noise is not None else ""
    text = ["*Memorised share*: samples nearer (pixels) to the images that the model saw than to equally many, class-matched images that it did not "
            f"see{controls}. For `full` the unseen images are the held-out split.",
            "*FD of the subset itself* is what a perfect copier of the kept images would score."]
    if "per_class" in e:
        text.append(f"*Worst class FD* is at n={t[name]['worst_n'][0]} a class, "
                    f"where real images score {e['per_class']['real_mean']:.3g} on average.")
    text.append("Seconds are those of all processes together. *Prepare s* counts features, scores, weights, attachments and the training of every "
                "network these used; sampling and judging are in "
                "no column.")
    if any(prepared(r) is None for r in t.values()):
        text.append("*?*: a file that the run was prepared with has no record of what it cost.")
    if max(len(r["fd"]) for r in t.values()) > 1:
        text.append("*Spread* below: half the width of the 95 % interval of a difference (Welch's t over seeds), in % of the second run's mean; "
                    "not corrected for the number of comparisons.")
    return ["", " ".join(text), ""]


def warnings(runs, judge):
    """Rows that the judge is not fair to, and the figures of other judges."""
    lines = []
    circular = sorted({r.name for r in runs if r.metrics["encoders"][judge].get("circular")})
    if circular:
        lines += [f"> **Warning.** The judge, {judge}, also selected the images of, or was the alignment target of: {', '.join(circular)}. "
                  "Do not trust these rows under it: measure with a second encoder and compare.", ""]
    for other in sorted({k for r in runs for k in r.metrics["encoders"]} - {judge}):
        got = {}
        for r in runs:
            if other in r.metrics["encoders"]:
                got.setdefault(r.name, []).append(r.metrics["encoders"][other]["fd"])
        title = runs[0].metrics["encoders"].get(other, {}).get("distance", other)
        lines += [f"Second judge, {title}: " + ", ".join(f"{n} {cell(v)}" for n, v in got.items()), ""]
    return lines


def about(runs):
    """'SiT-T/2 (flow) on digits 8 x 8, 800 steps of 128'."""
    train, (model, process, data, size) = runs[0].train, setting_of(runs)
    return f"{model} ({process}) on {data} {size}, {steps_of(train):,} steps of {train['args']['batch_size']}"


def setting_of(runs):
    """[network, process, data set, size of its images]."""
    a = runs[0].train["args"]
    return [a["model"], a["process"], runs[0].metrics["data"], " x ".join(map(str, runs[0].samples.shape[1:3]))]


def answers(runs, t, reached, others):
    lines = ["## The five questions", ""]
    for k, (question, said) in enumerate((
            ("Is it better than random?", answer_random(t)),
            ("Is the gain from selection or from attachments?", answer_source(t)),
            ("Is it memorising?", answer_memorising(t)),
            ("What does preparation cost, and when is the full run's quality reached?", answer_cost(t, reached)),
            ("Does it hold on another model or data set?", answer_elsewhere(t, about(runs), others))), 1):
        lines += [f"{k}. **{question}**" + ("" if said else " The runs that would answer it are not here.")]
        lines += [*(f"   - {answer}." for answer in said), ""]
    return lines


def costs(runs):
    """{run name: what its preparation cost} as a table, that of the last seed."""
    cost = {r.name: r.preparation for r in runs if r.preparation}
    if not cost:
        return []
    seconds = lambda v: "?" if v is None else f"{v:,.1f}"             # noqa: E731
    rows = [f"| {name} | {', '.join(f'{what} {seconds(v)}' for what, v in parts.items())} |" for name, parts in cost.items()]
    return ["## Preparation, in seconds", "", "| run | what |", "|---|---|", *rows, ""]


def protocol(r, e):
    p, a = r.metrics["protocol"], r.train["args"]
    return ["## Protocol", "",
            f"Sampler {p.get('sampler')}, {p.get('steps')} steps, guidance {p.get('cfg')} on t in {p.get('cfg_interval')}, labels {p.get('labels')}, "
            f"seed {p.get('seed')}, {p.get('weights')} weights, amp {p.get('amp')}; encoder {e['identity']}; "
            + (f"precision/recall k={e.get('precision_k')}, density/coverage k={e.get('density_k')}, n={e.get('neighbours_n')}; "
               f"KID subsets of {e['kid']['subset_size']}. " if "kid" in e else "no figure that needs single training images: the data folder holds latents only. ") +
            f"Training: {a['model']}, {a['process']}, batch {a['batch_size']}, lr {a['lr']:g}, EMA {a['ema']}, amp {a['amp']}.", "",
            "Versions: " + ", ".join(f"{k} {v}" for k, v in r.metrics["provenance"].items()) + ".", ""]


def page(runs, t, judge, reached, pictures, notes=(), others=None):
    r0 = runs[0]
    e = r0.metrics["encoders"][judge]
    shown = ["## Pictures", ""] + [f"![{caption}]({name})\n\n*{caption}*\n" for name, caption in pictures]
    remarks = [f"> **Note.** {note[0].upper() + note[1:]}.\n" for note in notes]
    return "\n".join([*heading(t, e, r0.metrics["data"]), *main_table(t), *yardstick(e, r0.name), *legend(t, e, r0.name), *remarks,
                      *warnings(runs, judge), *answers(runs, t, reached, others), *costs(runs), *shown, *protocol(r0, e)])


def parse_args(argv=None):
    p = common.Parser(__doc__)
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folders that evaluate.py has measured, the full run first")
    p.add_argument("--out", required=True, help="folder of the report")
    p.add_argument("--beside", nargs="+", default=[], metavar="FILE", help="report.json of other data sets or networks, to compare the order of the runs with")
    p.add_argument("--encoder", help="judge of the table; default: the first under which the first run was measured")
    return p.parse_args(argv)


@common.command
def main(argv=None):
    common.single_process("report.py")
    a = parse_args(argv)
    out = Path(a.out)
    common.free_for_output(out)
    if twice := common.named_twice(a.runs):
        raise common.UserError(f"{twice}: is named twice, and would count as two seeds; name each run once")
    if same := next((r for r in a.runs if Path(r).resolve() == out.resolve()), None):
        raise common.UserError(f"{out}: is the run {same}, whose nearest.png the report's would replace; choose another --out")
    runs = [read_run(r) for r in a.runs]
    others = read_beside(a.beside, setting_of(runs))
    judge = a.encoder or next(iter(runs[0].metrics["encoders"]))
    seeds_of_one_run(runs)
    notes = comparable(runs, judge)
    notes += use_trajectories(runs, judge)
    t = rows_of(runs, judge)
    reached = reach(runs)
    held = common.claim(out); held.__enter__()
    distance = runs[0].metrics["encoders"][judge]["distance"]
    frontier(runs, t, distance, out / "frontier.png")
    at = next((f", {p['n']:,} samples a point" for r in runs for p in r.trajectory), "")
    pictures = [("frontier.png", f"Quality against cost: lower and further left is better{at}")]
    sample_sheet(runs, out / "samples.png")
    pictures.append(("samples.png", "Samples, the same label and start noise in each column"))
    if per_class(runs, t, judge, out / "per_class.png"):
        pictures.append(("per_class.png", "Distance per class; the black marks are real images"))
    if nearest_sheet(runs, out / "nearest.png"):
        pictures.append(("nearest.png", "The most suspicious samples (upper row) and the nearest image each model has seen (lower row)"))
    common.save_json(out / "report.json", {"about": about(runs), "setting": setting_of(runs), "judge": judge, "rows": t, "reached": reached,
                                           "preparation": {r.folder.name: r.preparation for r in runs}})
    text = page(runs, t, judge, reached, pictures, notes, others)
    common.save_text(out / "report.md", text)
    common.log("\n".join(line for line in text.splitlines() if line.startswith(("|", "   - ")) or line[:1].isdigit()))
    common.log(f"report: {out / 'report.md'}")


if __name__ == "__main__":
    main()
