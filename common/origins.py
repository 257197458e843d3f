"""What came before a training run: the one walk through the records of the stages."""
from dataclasses import dataclass
from pathlib import Path

from common.errors import need
from common.files import load_pt, load_record

# What a call of prune.py and of attach.py chose by, for records older than their `looked_at`. Other
# scores look at features, other selections at a difficulty.
OLD_SCORES = {"random": "nothing", "el2n": "labels", "ccs": "labels", None: "scores"}
OLD_SELECTIONS = {"random": "nothing", "all": "nothing", None: "nothing"}


@dataclass(frozen=True)
class Step:
    """One thing that had to be computed before a training run could start."""
    what: str                        # in words
    script: str                      # that computed it, train for a network; "" for other files
    role: str                        # chose (images), weighted (classes), aligned, started (a run)
    key: tuple                       # the same for two uses of one thing
    encoder: str = ""                # through whose eyes it looked at the images
    seconds: float | None = 0.0      # of all processes together; None: unknown


def upstream(record, run=""):
    """Yields every Step before a training run, by its record and those of the stages it names.

    record: train.args.json. run: what messages call the run, where the seconds are asked for too.
    Then every file must be there and every stage have finished, and networks are opened; else only
    records are read.
    """
    args = record["args"]
    walk = Upstream(args.get("data", ""), run)
    if args.get("indices"):
        yield from walk.follow(args["indices"], "kept set")
    if args.get("weights"):
        yield from walk.follow(args["weights"], "class weights", "weighted")
    if args.get("attach"):
        yield from walk.follow(args["attach"], "attachments")
    if args.get("init"):
        yield from walk.network(args["init"], "start weights", "started", args.get("official"))


def record_of(folder, script):
    """<script>.args.json of a folder, or None where the script never ran."""
    file = Path(folder) / f"{script}.args.json"
    return load_record(file) if file.exists() else None


def sample_names(cfg):
    """{guidance: name of its samples}: one keeps the plain name, several are told apart by it."""
    if not isinstance(cfg, list):
        return {cfg: "samples"}
    return {one: f"samples_cfg{one:g}" for one in cfg}


def samples_of(folder):
    """{guidance: its samples.npy} of a run, the main one first; without a record {None: file}."""
    record = record_of(folder, "sample")
    cfg = None if record is None else record["args"]["cfg"]
    return {one: Path(folder) / f"{name}.npy" for one, name in sample_names(cfg).items()}


def device_seconds(record, seconds):
    """What a script took by the clock, times the processes of its record (without one: one).

    The seconds of features, difficulty and tokens are noted so already.
    """
    if seconds is None:
        return None
    made = record or {}
    return seconds * (made.get("provenance") or {}).get("processes", 1)


class Upstream:
    """The walk of upstream(). Paths are as the records name them."""

    def __init__(self, data, run):
        self.data = data
        self.run = run
        self.visited = set()

    def file(self, path):
        path = Path(path)
        need(not self.run or path.exists(),
             f"{path}: no such file, but {self.run} was prepared with it; run report.py from the "
             "folder where the runs were made")
        return path

    def made(self, folder, script):
        """The record of a stage, or None where it never ran."""
        record = record_of(folder, script)
        unfinished = record is not None and record.get("seconds") is None
        need(not (self.run and unfinished),
             f"{folder}: {script}.py has not finished there, but {self.run} was prepared with it; "
             "run its command again")
        return record

    def follow(self, path, what, role="chose"):
        """The stages that made `path`, which was used as `what`, and those before them."""
        path = self.file(path)
        folder = path if what == "attachments" else path.parent
        here = folder.resolve()
        if (here, what) in self.visited:
            return
        self.visited.add((here, what))
        prune, reweight, attach = (self.made(folder, s) for s in ("prune", "reweight", "attach"))
        if prune:
            yield from self.pruned(prune, here, what, role)
        if reweight:
            yield from self.reweighted(reweight, here)
        if attach:
            yield from self.attached(attach, here, what, role, path.name == "difficulty.npy")
        if not (prune or reweight or attach):
            # A file of the user's own.
            yield Step(f"{what} ({path})", "", role, (path.resolve(), ""), seconds=None)

    def pruned(self, made, here, what, role):
        args = made["args"]
        looked_at = made.get("looked_at", OLD_SCORES.get(args.get("score"), "features"))
        given = args.get("features")                       # made by another call
        extracted = made.get("seconds_features") or 0
        scored = made.get("seconds_scores") or 0
        if what == "features":
            scored = 0
        elif given and looked_at != "features":
            extracted = 0                                  # the score does not look at them
        elif given and extracted and not record_of(Path(given).parent, "prune"):
            self.file(given)                               # prune.py read the seconds beside it
        elif given:
            extracted = 0
            yield from self.follow(given, "features", role)
        if what != "features" and args.get("scores"):
            yield from self.follow(args["scores"], "scores", role)
        seconds = extracted + scored
        if not seconds and not given and what != "features":
            seconds = made.get("seconds")                  # a record that does not tell them apart
        encoder = ""
        if looked_at == "labels":
            encoder = "scratch"              # other seeds, but the same network on the same labels
        elif looked_at == "features" and not given:
            encoder = args.get("surrogate")
        yield Step("features and scores", "prune", role, (here, "prune"), encoder, seconds)
        if looked_at == "features" and not given:
            yield from self.encoder(encoder, args.get("weights"), "surrogate network", role)

    def reweighted(self, made, here):
        args = made["args"]
        seconds = device_seconds(made, made.get("seconds"))
        yield Step("DRO proxy", "reweight", "weighted", (here, "proxy"), seconds=seconds)
        yield from self.network(args["reference"], "reference network", "weighted",
                                args.get("official"))

    def attached(self, made, here, what, role, scores_alone):
        """scores_alone: nothing of that call is used but its difficulty.npy."""
        args = made["args"]
        old = OLD_SELECTIONS.get(args.get("select"), "difficulty")
        origin = args.get("difficulty")                    # scored by an earlier call
        if scores_alone or made.get("looked_at", old) == "difficulty":
            home = Path(origin).parent.resolve() if origin else here
            encoder = "" if origin else "ddae"
            seconds = made.get("seconds_difficulty") or 0
            yield Step("difficulty", "attach", role, (home, "difficulty"), encoder, seconds)
            if origin:
                yield from self.follow(origin, "difficulty", role)
            else:
                yield from self.network(args["reference"], "scorer network", role,
                                        args.get("official"))
        if what == "attachments":
            yield from self.attachments(made, here)
        if args.get("indices") and not scores_alone:
            yield from self.follow(args["indices"], "kept set", role)

    def attachments(self, made, here):
        args = made["args"]
        encoder = args.get("visual")
        if encoder in (None, "none"):
            encoder = ""
        seconds = (made.get("seconds_text") or 0) + (made.get("seconds_visual") or 0)
        if encoder or seconds:
            yield Step("attachments", "attach", "aligned", (here, "attachments"), encoder, seconds)
        weights = args.get("visual_weights")
        if encoder == "ddae":
            weights = weights or args.get("reference")
        yield from self.encoder(encoder, weights, "visual encoder", "aligned")

    def encoder(self, name, weights, what, role):
        """The training of an encoder, where it is one that this project trains."""
        if name == "ddae":
            yield from self.network(weights, what, role)
        elif name == "scratch":
            file = self.file(weights or Path(self.data) / "scratch.pt")
            seconds = float(load_pt(file).get("seconds", 0)) if self.run else 0.0
            yield Step("scratch network", "", role, (file.resolve(), ""), seconds=seconds)

    def network(self, checkpoint, what, role, official=None):
        """The training of a diffusion model, up to this checkpoint."""
        path = self.file(checkpoint)
        folder = path.parent
        seconds = None                                     # that of official weights is unknown
        if self.run and not official:
            train = record_of(folder, "train")
            if path.name == "last.pt" and self.made(folder, "train"):
                seconds = device_seconds(train, train["train_seconds"])
            else:
                # Not what came after step_*.pt.
                seconds = device_seconds(train, load_pt(path).get("seconds"))
        yield Step(f"{what} ({folder.name})", "train", role, (folder.resolve(), "train"),
                   seconds=seconds)
