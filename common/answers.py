"""What the figures of several runs say, in sentences: report.py's five answers.

    t = {run name: {figure: [one value per seed], "judged": {figure: [[per judge] per seed]}}}

A difference is claimed when its 95 % interval over seeds and judges excludes zero. Else it is said
how large it would have to be, or that the setting cannot answer: where random images are almost as
good as all of them, no selection has anything to gain. One seed claims nothing.
"""
import math
import re
import statistics
from dataclasses import dataclass


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
SEED = re.compile(r"-seed\d+$")                            # the end of a folder's name
WITHIN = 0.05                # how near to the full run's last distance counts as reached


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


def best_is_strongest(row):
    """Whether the best guidance is the largest that was tried: the best may lie beyond it.

    False for a row of an earlier version, which does not say what was tried.
    """
    tried = [float(cfg) for cfg in row.get("by_guidance", ()) if cfg != "unknown"]
    return min(row.get("best_guidance", [1])) == max(tried, default=1) > 1


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
        if None in (to_full, *rivals):
            continue                     # of other judges, or without a seed in common
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
