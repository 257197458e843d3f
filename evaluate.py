"""Stage 6: measure samples against the FULL training set, and ask whether they copy what was seen.

For one run or several at once (the reference is encoded once). torchrun spreads the encoding and
the drawing of trajectories; the first process measures. The distance is called FID only on
pytorch-fid's Inception features; on any other encoder it is FD with the encoder's name. Figures
depend on n, so n is always printed.

One trained network is one opinion: encoder scratch is --judges J networks of different seeds, every
figure is their mean, and metrics.json keeps each judge's own, for the intervals of report.py.

Reads   RUN/samples.npy, sample_labels.npy, sample.args.json, train.args.json; of several guidances
        every samples_cfg*.npy
        --samples            instead: a .npy, .npz (arr_0 or images), or a folder or .zip of
                             pictures, which are read as data.py reads them
        DATA/                its statistics are cached as DATA/stats_<encoder>.npz (mu, sigma, n)
Writes  RUN/metrics.json     every figure under its encoder, with the protocol; of further guidances
        RUN/metrics_cfg*.json
        RUN/nearest.png      the most suspicious samples and their nearest images
        RUN/trajectory.json  with --trajectory: the distance of every kept checkpoint

    python evaluate.py --runs runs/digits/full runs/digits/random --data data/digits
"""
import contextlib
import hashlib
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import common
from common import need
from models import diffusion, encoders, memorisation, metrics

# A space whose vectors would take more memory is left out of the audit.
AUDIT_BYTES = 16e9
DRAWS = 20                           # matched sets of the audit; random subsets beside FD(subset)
NOISE = 0.2                          # of its noisy copies, in the scale [-1, 1]
# What sample.args.json says of how samples were drawn.
DRAWN_WITH = ("sampler", "steps", "cfg", "cfg_interval", "labels", "seed", "eta", "variance", "amp")


# --------------------------------------------------------------------------------------- formulas
def some_rows(n, most, seed):
    """Rows (m,), sorted, m = min(n, most), drawn evenly from 0..n-1; seed: ints."""
    return np.sort(np.random.default_rng(seed).choice(n, min(n, most), replace=False))


def at_most(rows, labels, limits, rng):
    """Thin out rows (n,), sorted, until class c has at most limits[c] of them, drawn evenly."""
    order = rows[rng.permutation(len(rows))]
    order = order[np.argsort(labels[order], kind="stable")]           # class by class
    begin = np.searchsorted(labels[order], labels[order])             # of the class of each row
    place = np.arange(len(order)) - begin                             # within the class
    return np.sort(order[place < limits[labels[order]]])


def judges_for(images):
    """How many scratch networks judge a data set: 8 where one trains in seconds, else 3.

    images: uint8 (N, H, W, C), or None.
    """
    small = images is None or math.prod(images.shape[:3]) <= 1_000_000
    return 8 if small else 3


def mean_of(rows):
    """The mean of rows of figures, key by key and entry by entry; what is no number must agree."""
    first = rows[0]
    if isinstance(first, dict):
        return {key: mean_of([row[key] for row in rows]) for key in first}
    if isinstance(first, list):
        return [mean_of(list(values)) for values in zip(*rows)]
    if all(row == first for row in rows):
        return first                     # counts stay whole numbers
    return sum(rows) / len(rows)


def joint(rows):
    """One row of figures out of those of several judges [row, ...]; one judge's stays as it is.

    Means throughout, but the worst class is that of the mean.
    """
    if len(rows) == 1:
        return dict(rows[0])
    out = mean_of([{key: value for key, value in row.items() if key != "identity"} for row in rows])
    hashed = hashlib.sha256(" ".join(row["identity"] for row in rows).encode()).hexdigest()
    name = rows[0]["identity"].split(":")[0]
    out["identity"] = f"{name} x {len(rows)}:{hashed[:16]}"
    if "per_class" in out:
        fd = out["per_class"]["fd"]
        out["per_class"]["worst"] = int(np.argmax(fd))
        out["per_class"]["worst_fd"] = max(fd)
    return out


def raw(images):
    """Pixel space: (n, H * W * C) float32 in [-1, 1] of uint8 images, or of a Selection of some."""
    out = np.empty((len(images), images[:1].size), np.float32)
    for lo in range(0, len(out), 1024):
        # A memory map is read block by block.
        part = np.asarray(images[lo:lo + 1024])
        out[lo:lo + 1024] = part.reshape(-1, out.shape[1]) / 127.5 - 1
    return out


# --------------------------------------------------------------------------------------- the work
class Selection:
    """images[rows] that are read only when asked for: len(s), s[index]."""

    def __init__(self, images, rows):
        self.images = images
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.images[self.rows[index]]


class Team:
    """The judges of one encoder on every rank: rank 0 measures, all encode and draw their shares.

    Rank 0 asks for such work, and the others follow() until it dismisses them. One process asks
    itself. judges: [Encoder], one for all encoders but scratch.
    """

    def __init__(self, judges, batch_size, device):
        self.judges = judges
        self.batch_size = max(1, batch_size // common.world())
        self.device = device

    def encode(self, judge, images, kind="pooled"):
        """Features (n, D) float32 of images, an array (n, H, W, C) or a Selection of one.

        judge: its place in judges.
        """
        shares = []
        for source, rows in sendable(images):
            shares += self.ask("encode_share", judge, source, rows, kind)
        # Where there are fewer rows than processes, some rank has no share.
        return np.concatenate([z for z in shares if z is not None])

    def ask(self, task, *what):
        """[what every rank makes of its share of the task], in their order."""
        # The others wait for this in follow(), for hours if need be.
        common.from_rank0(lambda: (task, what))
        return self.do(task, what)

    def follow(self):
        while order := common.from_rank0(lambda: None):
            self.do(*order)

    def dismiss(self):
        common.from_rank0(lambda: None)

    def do(self, task, what):
        with common.user_errors():
            share = getattr(self, task)(*what)
        return common.gather(share)

    def encode_share(self, judge, images, rows, kind):
        """Features of this rank's part of rows (n,) of an array or file, None where it has none."""
        enc = self.judges[judge]
        # Every rank opens the file itself.
        if isinstance(images, str):
            images = np.load(images, mmap_mode="r", allow_pickle=False)
        lo, hi = common.shard(len(rows))
        with common.progress(total=hi - lo, desc=enc.name, delay=2) as bar:
            return encoders.extract(enc, images, self.batch_size, kind, rows=rows[lo:hi], bar=bar)

    def draw_share(self, file, drawn, y):
        """([features of each judge], state): samples for this rank's part of labels y (n,), anew.

        state: what the checkpoint says of its training. drawn: the settings of sample.py.
        """
        state, model, process = common.open_checkpoint(file)
        model = model.to(self.device, memory_format=torch.channels_last)
        scale = state["args"]["latent_scale"]
        vae = None
        if state["args"]["latents"]:
            from models.vae import load_vae
            vae = load_vae(drawn["vae"], self.device)
        lo, hi = common.shard(len(y))
        images = []
        for k in range(lo, hi, self.batch_size):
            ids = range(k, min(k + self.batch_size, hi))
            labels = torch.from_numpy(y[ids.start:ids.stop]).to(self.device)
            with common.autocast(self.device, drawn["amp"]):
                # Sample i depends on (seed, i) alone, so these are the run's own start noises.
                noise = [common.generator(drawn["seed"], "sample", i) for i in ids]
                x = diffusion.sample_images(model, process, labels, noise, drawn, vae, scale)
            need(x.isfinite().all(), f"{file}: samples hold NaN or infinity; the run had diverged "
                 "there, remove the file to leave it out")
            images.append(diffusion.to_uint8(x).cpu().numpy())
        features = None
        if images:
            x = np.concatenate(images)
            features = [encoders.extract(enc, x, self.batch_size) for enc in self.judges]
        return features, {key: state[key] for key in ("step", "images_seen", "seconds")}


def sendable(images):
    """Yields (source, rows) by which every rank can read images.

    source: the file of a memory map; else arrays, 256 MB at a time.
    """
    if not isinstance(images, Selection):
        images = Selection(images, np.arange(len(images)))
    file = getattr(images.images, "filename", None)
    if file:
        yield str(file), images.rows
        return
    # What rank 0 has read from an archive or from pictures, the others do not hold.
    step = max(1, 2**28 // images.images[0].nbytes)
    for lo in range(0, len(images), step):
        part = images[lo:lo + step]
        yield part, np.arange(len(part))


class Reference:
    """The full training set under one judge of a team.

    mu, sigma: of all of it, or those in the file `statistics`. features (R, D), labels (R,): of up
    to `most` images, for neighbours and kernels. test: features of the held-out images, heldout:
    their distance. Of a data folder that holds latents only there are no features (None).

    As a matrix of features it is the whole training set, which gaussian_stats goes over once, block
    by block; what is not held is encoded as it is read.
    """

    def __init__(self, data, team, judge, most, seed, statistics=None):
        N = len(data.labels)
        self.data = data
        self.team = team
        self.judge = judge
        self.seed = seed
        self.enc = team.judges[judge]
        self.random = {}                 # {images of each class: FD of random subsets}
        self.shape = (N, self.enc.width)
        self.features = self.test = self.heldout = self.n = None
        if statistics:
            self.mu, self.sigma = read_statistics(statistics, self.enc.width)
        if data.images is None:
            return
        self.rows = some_rows(N, most, [seed, 0])
        self.features = team.encode(judge, Selection(data.images, self.rows))
        self.labels = data.labels[self.rows]
        if not statistics:
            name = f"stats_{self.enc.name}{judge or ''}.npz"
            self.mu, self.sigma = self.full_statistics(data.folder / name)
            self.n = N
        if data.test_images is not None:
            # Other real images: what a perfect model would score at their number.
            self.test = team.encode(judge, data.test_images)
            if len(self.test) > 1:
                self.heldout = self.distance(self.test)

    def full_statistics(self, cache):
        """(mu, sigma) of the whole training set, out of the file `cache` where it holds them."""
        key = f"{self.enc.identity} {self.data.info['sha256']}"
        try:
            with np.load(cache, allow_pickle=False) as z:
                if str(z["key"]) == key:
                    return z["mu"], z["sigma"]
        except Exception:
            pass                         # absent, damaged or of another kind: it is only a cache
        # To it this object is a matrix, read block by block.
        mu, sigma = metrics.gaussian_stats(self, device=self.enc.device)
        try:
            with common.atomic(cache) as tmp, open(tmp, "wb") as f:
                np.savez(f, mu=mu, sigma=sigma, n=len(self), key=key)
        except OSError as e:
            # A shared data set is read-only as a rule.
            common.log(f"note: {cache} is not kept ({e.strerror}): the next call encodes the whole "
                       "set again")
        return mu, sigma

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        return self.of(np.arange(len(self))[index])

    def of(self, rows):
        """Features (n, D) of these training images."""
        if len(self.rows) == len(self):
            return self.features[rows]
        return self.team.encode(self.judge, Selection(self.data.images, rows))

    def encode(self, images, kind="pooled"):
        """Features (n, D) of any images; those of the training set may be held."""
        held = isinstance(images, Selection) and images.images is self.data.images
        if held and kind == "pooled":
            return self.of(images.rows)
        return self.team.encode(self.judge, images, kind)

    def distance(self, features):
        mu, sigma = metrics.gaussian_stats(features)
        return metrics.frechet_distance(self.mu, self.sigma, mu, sigma)

    def random_subsets(self, counts):
        """[FD of DRAWS random subsets] with counts (K,) images a class, of those that are held.

        None where a class holds fewer. What FD(subset) has to be compared with: it depends on n.
        """
        held = np.bincount(self.labels, minlength=len(counts))
        if (held < counts).any() or counts.sum() < 2:
            return None
        key = counts.tobytes()
        if key not in self.random:
            groups = common.rows_by_class(self.labels, len(counts))
            subsets = metrics.random_subsets(groups, counts, DRAWS, [self.seed, 5])
            self.random[key] = [self.distance(self.features[rows]) for rows in subsets]
        return self.random[key]


# ------------------------------------------------------------------ one run under one encoder
def figures(run, ref, args):
    """Everything that is measured of a run's samples under one encoder.

    n is stored with each figure that depends on it.
    """
    data = ref.data
    z = ref.encode(run.images)                                        # (n, D)
    out = distances(z, run, ref, args)
    if ref.features is not None and run.labels is not None and data.num_classes > 1:
        out |= class_figures(z, run, ref, args.seed)
    if ref.enc.name == "inception" and len(z) >= 10:
        logits = ref.encode(run.images, "logits")
        # Samples come sorted by class or in turn, and its parts are consecutive.
        shuffled = logits[np.random.default_rng(args.seed).permutation(len(z))]
        mean, std = metrics.inception_score(shuffled)
        out["inception_score"] = dict(mean=mean, std=std, splits=10)
    if ref.features is not None:
        out |= neighbour_figures(z, ref, args.seed)
    return out


def distances(z, run, ref, args):
    """Distances of the samples z (n, D), of real images and of the kept subset to the reference."""
    enc = ref.enc
    n = len(z)
    held = None if ref.test is None else len(ref.test)
    out = {"identity": enc.identity,
           "distance": "FID" if enc.name == "inception" else f"FD ({enc.name})",
           "n": n,
           "reference": args.reference_stats or f"{ref.data.info['name']}, the full training set",
           "reference_n": ref.n, "fd": ref.distance(z), "fd_heldout": ref.heldout,
           "fd_heldout_n": held}
    if ref.heldout is not None and n >= held:
        # A distance falls as n grows: the samples once more at the held-out images' n.
        out["fd_at_heldout_n"] = ref.distance(z[some_rows(n, held, [args.seed, 3])])
    if n <= enc.width and ref.judge == 0:
        common.log(f"note: {n} samples for {enc.width} features: the covariance is singular and "
                   "the distance far too large; draw more samples")
    if args.bootstrap:
        mean, std, low, high = metrics.bootstrap_frechet(z, ref.mu, ref.sigma, args.bootstrap,
                                                         args.seed)
        out["fd_bootstrap"] = dict(repeats=args.bootstrap, mean=mean, std=std, low=low, high=high)
    if run.guided:
        # A best guidance is chosen on one half of the noise and scored on the other.
        out["fd_halves"] = [ref.distance(z[:n // 2]), ref.distance(z[n // 2:2 * (n // 2)])]
    if ref.features is not None and run.keep is not None:
        # What a perfect copier of the subset would score, and of random ones of that size.
        out["fd_subset"] = None
        if len(run.keep) > 1:
            out["fd_subset"] = ref.distance(ref.of(run.keep))
        kept = np.bincount(ref.data.labels[run.keep], minlength=ref.data.num_classes)
        out["fd_random_subsets"] = ref.random_subsets(kept)
    return out


def class_figures(z, run, ref, seed):
    """Distances class by class, and how often the scratch network reads the label asked for."""
    data = ref.data
    out = {}
    # The yardstick; without held-out images it is drawn from the reference itself.
    real = ()
    if ref.test is not None:
        real = (ref.test, data.test_labels)
    try:
        out["per_class"] = metrics.per_class_frechet(z, run.labels, ref.features, ref.labels,
                                                     data.num_classes, seed, *real)
    except ValueError as e:
        common.log(f"note: no distance per class: {e}")
    if ref.enc.spec.needs_labels:
        read = ref.encode(run.images, "logits").argmax(1)             # (n,)
        out["read_as_labelled"] = float((read == run.labels).mean())
    return out


def neighbour_figures(z, ref, seed):
    """What compares with single images of the training set."""
    mean, error, size = metrics.kid(z, ref.features, seed=seed)
    out = {"kid": dict(mean=mean, standard_error=error, subset_size=size, subsets=100)}
    # Equally many of both, for these four depend on n.
    m = min(len(z), len(ref.features))
    real = ref.features[some_rows(len(ref.features), m, [seed, 1])]   # (m, D)
    fake = z[some_rows(len(z), m, [seed, 1])]                         # (m, D)
    # Fewer images have no five neighbours.
    if m > 5:
        device = ref.enc.device
        out |= metrics.precision_recall(real, fake, 3, device)
        out |= dict(neighbours_n=m, precision_k=3)
        out |= metrics.density_coverage(real, fake, 5, device)
        out |= dict(density_k=5)
    return out


# ----------------------------------------------------------------------- copies of what was seen
def audit(run, ref, args, full):
    """The audit of models/memorisation.py, in pixels and under the encoder, and nearest.png.

    full: a run on the full set, whose samples are the baseline, or None. Rank 0 holds one space's
    vectors of the images seen and of those they are compared with; a space that would need more
    than AUDIT_BYTES is left out, and that is said.
    """
    device = ref.enc.device
    sets = audit_sets(run, ref, args, full)
    if isinstance(sets, str):
        return {"skipped": sets}
    # Beside the shares: how far one may lie from one half by chance depends on n.
    out = {"n": len(sets.samples), "draws": DRAWS, "noise": NOISE, "model_of": sets.model_of}
    if sets.alike is not None:
        out["alike_n"] = len(sets.alike)
    # Pixels are always the raw ones, not the encoder of that name.
    spaces = {ref.enc.name: (ref.encode, ref.enc.width), "pixels": (raw, run.images[0].size)}
    encode = None
    for space, (vectors_of, width) in spaces.items():
        size = 4 * width * (len(sets.seen) + len(sets.pool))
        if size > AUDIT_BYTES:
            common.log(f"note: {run.name}: no memorisation audit in {space}: {size / 1e9:.0f} GB "
                       f"of vectors, more than {AUDIT_BYTES / 1e9:.0f}")
            out.setdefault("left_out", []).append(space)
            continue
        encode = vectors_of
        try:
            out[space] = memorisation.memorisation_audit(
                encode, sets.samples, sets.seen, sets.seen_labels, sets.pool, sets.pool_labels,
                sets.heldout, sets.baseline, DRAWS, args.seed, NOISE, device=device,
                alike=sets.alike)
        except ValueError as e:
            return {"skipped": str(e)}
    if encode is None:
        return {"skipped": f"more than {AUDIT_BYTES / 1e9:.0f} GB of vectors"}
    # In the last space that was measured: pixels, where they fit.
    nearest_picture(run.out / "nearest.png", sets.samples, sets.seen, encode, device)
    return out


def audit_sets(run, ref, args, full):
    """What the audit compares with what; or, in words, why there is none.

    A model of a subset is compared with unseen training images, one of the full set with the
    held-out images.
    """
    data = ref.data
    if ref.features is None:
        return "the data folder holds latents only, and the audit compares pixels"
    everything = np.arange(len(data.labels))
    keep = everything if run.keep is None else run.keep
    rest = np.setdiff1d(everything, keep, assume_unique=True)
    rows = some_rows(len(run.images), args.audit_samples, [args.seed, 2])
    sets = SimpleNamespace(samples=Selection(run.images, rows), seen=Selection(data.images, keep),
                           seen_labels=data.labels[keep], heldout=None, baseline=None, alike=None)
    if len(rest) == 0:
        sets.model_of = "the full set"
        sets.pool = data.test_images
        sets.pool_labels = data.test_labels
        if sets.pool is None:
            return ("a model of the full set, and the data folder has no held-out images to "
                    "compare with")
        return sets
    # All draws together take no more of a class than this.
    limits = DRAWS * np.bincount(sets.seen_labels, minlength=data.num_classes)
    rest = at_most(rest, data.labels, limits, np.random.default_rng([args.seed, 4]))
    sets.model_of = "a subset"
    sets.pool = Selection(data.images, rest)
    sets.pool_labels = data.labels[rest]
    sets.heldout = data.test_images
    if full:
        most = min(len(full.images), args.audit_samples)
        sets.baseline = Selection(full.images, np.arange(most))
    if ref.test is not None:
        sets.alike = images_alike(ref, keep)
    return sets


def images_alike(ref, keep):
    """The held-out images that look most like those of the subset, or None where there are none.

    As large a share as the subset is of its classes: a larger one would be less alike.
    """
    data = ref.data
    share = len(keep) / len(data.labels)
    rows = memorisation.most_alike(ref.test, data.test_labels, ref.of(keep), data.labels[keep],
                                   ref.features, ref.labels, share)
    return Selection(data.test_images, rows) if len(rows) else None


def nearest_picture(path, samples, seen, encode, device):
    """The 16 most suspicious samples (above) and the nearest image that the model has seen."""
    x = encode(samples)
    train = encode(seen)
    dist, index = metrics.knn(x, train, min(51, len(train)), device=device)          # (n, 51) each
    # Low where a sample is far nearer to one image than to the next 50.
    ratio = dist[:, 0] / dist[:, 1:].mean(1).clip(1e-9)               # (n,)
    worst = np.argsort(ratio, kind="stable")[:16]
    pairs = np.stack([samples[worst], seen[index[worst, 0]]])         # (2, 16, H, W, C)
    common.save_grid(path, pairs)


def joined(old, new):
    """The audit `new` with those spaces of an earlier one that other judges gave, at the same n."""
    # One n for all spaces: it says how far a share may lie from one half.
    if not old or "skipped" in old or "skipped" in new or old.get("n") != new.get("n"):
        return new
    spaces = {space: figures for space, figures in old.items() if isinstance(figures, dict)}
    return {**spaces, **new}


# ------------------------------------------------------------------------- quality over training
def trajectory(run, refs, args):
    """Distance of every kept checkpoint, drawn with the labels, seeds and settings of sample.py.

    refs: the Reference of every judge. Of several guidances it follows the first.

    The last point therefore equals the run's own distance (to the last bit of the network's sums)
    when n is the same.
    """
    path = run.out / "trajectory.json"
    ref = refs[0]
    identity = joint([{"identity": one.enc.identity} for one in refs])["identity"]
    # A prefix of balanced labels is balanced.
    y = run.drawn[:args.trajectory_num]
    n = len(y)
    key = {"settings": drawn_with(run.sampling),
           "labels": array_hash(y), "n": n, "data": ref.data.info["sha256"],
           "identity": identity,
           "checkpoints": {file.name: common.sha256(file) for file in run.checkpoints}}
    if args.reference_stats:
        key["reference"] = common.sha256(args.reference_stats)
    if path.exists() and not args.overwrite:
        if common.load_json(path, "points of evaluate.py").get("key") == key:
            common.log(f"{path}: complete; nothing to do (--overwrite draws again)")
            return
    points = []
    for file in run.checkpoints:
        shares = ref.team.ask("draw_share", str(file), run.sampling, y)
        # Every rank has opened the same checkpoint.
        state = shares[0][1]
        fds = []                                                      # of each judge
        for k, one in enumerate(refs):
            z = np.concatenate([share[k] for share, _ in shares if share is not None])     # (n, D)
            fds.append(one.distance(z))
        fd = sum(fds) / len(fds)
        points.append({**state, "fd": fd, "fds": fds, "n": n})
        common.log(f"{run.name}: step {state['step']:,}, {state['images_seen']:,} images, "
                   f"{state['seconds']:,.0f} s: {fd:.3f}")
    common.save_json(path, {"encoder": identity, "name": ref.enc.name, "points": points,
                            "key": key})


# ------------------------------------------------------------------------------------ all runs
def measure(args, inputs, team, weights, todo):
    """The runs `todo` {place in inputs.runs: judges that did} under those of a team, by rank 0."""
    def reference(judge):
        with common.user_errors():
            return Reference(inputs.data, team, judge, args.reference_max, args.seed,
                             args.reference_stats)

    judges = range(len(team.judges))
    if args.trajectory:
        refs = [reference(judge) for judge in judges]
        for k in todo:
            with common.user_errors():
                trajectory(inputs.runs[k], refs, args)
        return
    # The networks are all there by now.
    key = judged_by(team.judges[0].name, weights, inputs)
    # One judge after the other, for each holds the features of the whole training set.
    for judge in judges:
        left = [k for k, done in todo.items() if judge >= done]
        if not left:
            continue
        ref = reference(judge)
        for k in left:
            measure_samples(inputs.runs[k], ref, args, inputs, key)


def measure_samples(run, ref, args, inputs, key):
    """The figures of one judge into metrics.json, where those of the judges before it stay."""
    start = time.time()
    info = inputs.data.info
    name = ref.enc.name
    # An encoder adds its row to what stands; figures of other samples go.
    old = earlier(run, info)
    memo = old.get("memorisation")
    rows = []
    if ref.judge:
        rows = old["encoders"][name]["judges"][:ref.judge]
    with common.user_errors():
        mine = figures(run, ref, args)
        first = ref.judge == 0 and name == args.encoder[0]
        if args.audit and first and run.main and run.known:
            memo = joined(memo, audit(run, ref, args, inputs.full))
    mine["seconds"] = round(time.time() - start, 2)
    rows.append(mine)
    row = joint(rows)
    row["seconds"] = sum(one["seconds"] for one in rows)
    row["settings"] = settings(run, key, args, inputs)
    row["circular"] = name in run.judges
    row["judges"] = rows
    common.save_json(run.file, {
        "run": run.name, "data": info["name"], "data_sha256": info["sha256"],
        "samples_sha256": run.sha256, "protocol": {**run.protocol, "image_format": run.format},
        "encoders": {**old.get("encoders", {}), name: row}, "memorisation": memo,
        "provenance": common.provenance()})
    if len(rows) == judges_of(name, inputs):
        tell(run, row, memo)


def tell(run, row, memo):
    """The figures of one run, on one line."""
    text = f"{row['distance']} {row['fd']:.3f} (n={row['n']:,}"
    if len(row["judges"]) > 1:
        sd = np.std([one["fd"] for one in row["judges"]], ddof=1)
        text = (f"{row['distance']} {row['fd']:.3f} +- {sd:.3f} over {len(row['judges'])} judges "
                f"(n={row['n']:,}")
    if row["fd_heldout"] is not None:
        text += f"; held-out images {row['fd_heldout']:.3f}, n={row['fd_heldout_n']}"
    said = [text + ")"]
    if "fd_bootstrap" in row:
        again = row["fd_bootstrap"]
        said.append(f"resampled {again['mean']:.3f} +- {again['std']:.3f}, biased upwards")
    if row.get("fd_subset") is not None:
        text = f"the subset itself {row['fd_subset']:.3f}"
        if row["fd_random_subsets"]:
            mean, sd = np.mean(row["fd_random_subsets"]), np.std(row["fd_random_subsets"], ddof=1)
            text += f" ({DRAWS} random subsets {mean:.3f} +- {sd:.3f})"
        said.append(text)
    if "per_class" in row:
        c = row["per_class"]
        said.append(f"worst class {c['worst']}: {c['worst_fd']:.2f} (n={c['n']}, real images "
                    f"{c['real_mean']:.2f})")
    if "precision" in row:
        said.append(f"precision {row['precision']:.3f}, recall {row['recall']:.3f}, "
                    f"density {row['density']:.3f}, coverage {row['coverage']:.3f} "
                    f"(n={row['neighbours_n']:,})")
    if "kid" in row:
        kid = row["kid"]
        said.append(f"KID {kid['mean']:.4f} +- {kid['standard_error']:.4f} "
                    f"(subsets of {kid['subset_size']})")
    if "read_as_labelled" in row:
        said.append(f"read as labelled {row['read_as_labelled']:.1%}")
    if memo and "pixels" in memo:
        share = {name: f"{figure['share']:.2f}" for name, figure in memo["pixels"].items()}
        said.append(f"nearer to seen than to unseen images {share['samples']} (held-out "
                    f"{share.get('heldout', '-')}, seen + noise {share['noise']})")
    if row["circular"]:
        said.append("WARNING: this judge also selected or was aligned to")
    who = run.name
    if run.guided:
        who += f" (guidance {run.protocol['cfg']:g})"
    common.log(f"{who}: " + "; ".join(said))


# ----------------------------------------------------------------------------------------- inputs
@dataclass
class Run:
    """Samples, and what is known of the model that drew them."""
    out: Path                        # where its figures go
    file: Path                       # its metrics.json
    guided: bool                     # whether it was drawn at several guidances
    main: bool                       # of those the one that pictures, audit and trajectory are of
    images: np.ndarray               # uint8 (n, H, W, C)
    labels: np.ndarray | None        # (n,), or None: not known, or none of the data set's
    drawn: np.ndarray | None         # labels of all the samples that there are
    format: str                      # of the samples, in words
    sha256: str                      # of the samples
    protocol: dict = field(default_factory=dict)
    sampling: dict | None = None     # the flags of sample.py, which a trajectory draws by
    checkpoints: tuple = ()          # that a trajectory follows
    known: bool = False              # train.py left its record there
    trained: bool = False            # for at least one step
    keep: np.ndarray | None = None   # (M,) images it was trained on; None: all, or not known
    judges: set = field(default_factory=set)       # that chose its images, or that it is aligned to

    @property
    def name(self):
        return self.out.name


def read_samples(path):
    """(images uint8 (n, H, W, C), labels (n,) or None) of a .npy, .npz, folder or .zip of pictures.

    An .npz holds arr_0 or images, and may hold arr_1 or labels; labels of RUN/samples.npy lie
    beside it.
    """
    path = Path(path)
    labels = None
    if path.is_dir() or path.suffix.lower() == ".zip":
        images = read_pictures(path)
    elif path.suffix.lower() == ".npz":
        what = "an .npz with arr_0 or images, uint8 (n, H, W, C),"
        z = common.load_npz(path, ("arr_0", "arr_1", "images", "labels"), what)
        images = z.get("arr_0", z.get("images", np.empty(0)))
        labels = z.get("arr_1", z.get("labels"))
    else:
        images = common.load_npy(path, "samples, uint8 (n, H, W, C)", (None,) * 4, "u")
        beside = path.parent / "sample_labels.npy"
        if path.stem.split("_cfg")[0] == "samples" and beside.exists():
            what = "labels of the samples, int64 (n,)"
            labels = np.array(common.load_npy(beside, what, (len(images),), "iu"))
    sound = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] in (1, 3)
    need(sound, f"{path}: {images.dtype} {images.shape}, but samples must be uint8 "
         "(n, H, W, 1 or 3)")
    if labels is not None:
        sound = labels.shape == (len(images),) and labels.dtype.kind in "iu"
        need(sound, f"{path}: {len(images)} samples but labels {labels.dtype} of shape "
             f"{labels.shape}; one integer per sample expected")
    return images, labels


def pictures(place):
    """{name: what read_image opens} of the images in a folder, at any depth, or in a .zip; sorted.

    By the same rules as data.py: hidden files and those of the system are none, links are followed.
    """
    rooms = common.listing
    listing = rooms.list_zip(place) if place.is_file() else rooms.list_folder(place)
    names = sorted(filter(rooms.is_image, listing.files), key=lambda name: name.split("/"))
    need(names, f"{place}: no picture in it or below it; give the folder, .zip, .npy or .npz that "
         "holds the samples")
    return {name: listing.files[name] for name in names}


def read_pictures(place):
    """uint8 (n, H, W, C) of the images in a folder or .zip, as data.py would read them."""
    files = list(pictures(place).values())
    # The first picture says how large all of them are.
    images = None
    all_grey = True
    extent = None
    for k, file in enumerate(common.progress(files, desc=str(place))):
        with common.reading(file, "picture", "remove or replace it"), common.no_bombs():
            picture = common.read_image(file)
        x = picture.pixels                                             # (h, w, 3)
        if images is None:
            images = np.empty((len(files), *x.shape), np.uint8)
        need(x.shape == images.shape[1:], f"{file}: {x.shape[1]}x{x.shape[0]} pixels, but the "
             f"first has {images.shape[2]}x{images.shape[1]}; bring all samples to one size")
        images[k] = x
        all_grey &= picture.grey
        extent = common.pixels.wider(extent, picture.extent)
        need(extent is None or 0 <= extent[0] <= extent[1] <= 65535,
             f"{file}: its values run beyond 0..65535; save the samples with 8 bits")
    need(extent is None or extent[1] >= 32768, f"{place}: stored with 16 bits, but no value is "
         "above the lower half, so all would be almost black; save the samples with 8 bits")
    return images[..., :1] if all_grey else images


def with_channels(images, channels):
    """Samples (n, H, W, C) with the data set's channels, where they are grey in one of both."""
    if images.shape[3] == 1 and channels == 3:
        return np.repeat(images, 3, axis=3)
    if images.shape[3] == 3 and channels == 1:
        first = images[..., :1]
        # Other programs store grey pictures in three equal channels.
        if all((images[k:k + 1024] == first[k:k + 1024]).all() for k in range(0, len(first), 1024)):
            return first
    return images


def read_statistics(path, width=None):
    """(mu, sigma) of an .npz of somebody else: mu, sigma (pytorch-fid, ADM) or m2, s2 (lucidrains).

    width: of the encoder's features, where it is known.
    """
    what = "an .npz with mu and sigma, or m2 and s2,"
    z = common.load_npz(path, ("mu", "sigma", "m2", "s2"), what)
    pairs = [(z[m], z[s]) for m, s in (("mu", "sigma"), ("m2", "s2")) if m in z and s in z]
    need(pairs, f"{path}: holds {', '.join(z)} only; {what} expected")
    mu, sigma = pairs[0]
    D = len(mu) if mu.ndim == 1 else -1
    floats = mu.dtype.kind == "f" and sigma.dtype.kind == "f"
    need(floats and sigma.shape == (D, D), f"{path}: mu {mu.dtype} {mu.shape} and sigma "
         f"{sigma.dtype} {sigma.shape}, but floats (D,) and (D, D) are expected")
    need(np.isfinite(mu).all() and np.isfinite(sigma).all(),
         f"{path}: mu or sigma holds NaN or infinity; make it again")
    tolerance = 1e-3 * np.abs(sigma).max(initial=0)
    symmetric = np.allclose(sigma, sigma.T, rtol=1e-3, atol=tolerance)
    need(symmetric and (sigma.diagonal() >= 0).all(),
         f"{path}: sigma is no covariance: it must be symmetric, without a negative variance; make "
         "it again")
    need(width in (None, D), f"{path}: statistics of {D} features, but the encoder's are {width}; "
         "take those of the same encoder")
    return mu.astype(np.float64), sigma.astype(np.float64)


def judges_used(record):
    """Names of the encoders that chose a run's images or that it is aligned to, by train.args.json.

    They are no fair judges of it.
    """
    steps = common.upstream(record)
    return {step.encoder for step in steps if step.role in ("chose", "aligned")} - {""}


def open_runs(out, files, data, args):
    """[Run] of a folder, checked: one for each guidance. files: {guidance: samples}."""
    runs = []
    for cfg, samples in files.items():
        file = Path(out) / "metrics.json"
        if runs:
            file = Path(out) / f"metrics_cfg{cfg:g}.json"
        run = open_run(Path(out), file, Path(samples), data, args)
        run.guided = len(files) > 1
        run.main = not runs
        read_sampling(run, cfg, data, args.data)
        read_training(run, data)
        if args.trajectory and run.main:
            read_checkpoints(run, samples, args.trajectory_num)
        runs.append(run)
    return runs


def open_run(out, file, samples, data, args):
    """A Run as its samples alone tell."""
    images, labels = read_samples(samples)
    drawn = labels
    if args.num:
        need(args.num <= len(images), f"{samples}: {len(images)} samples, fewer than --num "
             f"{args.num}; draw more with sample.py")
        images = images[:args.num]
        labels = None if labels is None else labels[:args.num]
    need(len(images) > 1, f"{samples}: {len(images)} samples, a distance needs at least 2; draw "
         "more with sample.py")
    # An encoder without a size of its own was made for the data set's.
    size = None if data.images is None else data.images.shape[1:]
    if size:
        images = with_channels(images, size[2])
    for name in args.encoder:
        need(size in (None, images.shape[1:]) or encoders.ENCODERS[name].size,
             f"{samples}: samples of {images.shape[1:]}, but {data.info['name']} has {size}, and "
             f"encoder {name} does not resize; draw or bring them to that size")
    # sample.py may draw without class, as label K.
    if labels is not None and (labels.min() < 0 or labels.max() >= data.num_classes):
        common.log(f"note: {samples}: labels outside the data set's {data.num_classes} classes "
                   "(drawn without class?): nothing is measured per class")
        labels = None
    if samples.is_file() and samples.suffix.lower() != ".zip":
        form = "uint8 arrays"
        digest = common.sha256(samples)
    else:
        form = " and ".join(sorted({Path(name).suffix.lower()
                                  for name in pictures(samples)})) + " files"
        digest = array_hash(images)
    return Run(out, file, False, True, images, labels, drawn, form, digest)


def drawn_with(args):
    """What says how samples were drawn; what was added later only where it is set."""
    drawn = {key: args[key] for key in DRAWN_WITH}
    for key in ("cfg_power", "cfg_channels", "time_grid"):
        if args.get(key) is not None:
            drawn[key] = args[key]
    return drawn


def read_sampling(run, cfg, data, folder):
    """How the samples of one guidance were drawn, where sample.py says it."""
    record = common.record_of(run.out, "sample")
    if record is None:
        return
    need(record["seconds"] is not None, f"{run.out}: sample.py has not finished there; run its "
         "command again")
    need(record.get("data_sha256") in (None, data.info["sha256"]),
         f"{run.out}: was trained on {record.get('data')}, but --data {folder} is "
         f"{data.info['name']}; evaluate on its own data set")
    run.sampling = {**record["args"], "cfg": cfg}
    run.protocol = drawn_with(run.sampling)
    run.protocol |= {"checkpoint_step": record.get("step"), "weights": "EMA",
                     "sample_seconds": record["seconds"]}


def read_training(run, data):
    """What the model has seen, and by whose choice, where train.py says it."""
    record = common.record_of(run.out, "train")
    if record is None:
        return
    run.known = True
    made = record["args"]
    run.trained = made.get("steps") != 0
    # train.py notes the hash of what it kept, under the name of the flag.
    source = made.get("indices")
    name = "indices"
    if not source and made.get("attach"):
        source = Path(made["attach"]) / "keep.npy"
        name = "attach_keep"
    if not source:
        return
    run.keep = common.load_indices(source, len(data.labels))
    trained_on = record.get("inputs", {}).get(name)        # an old record does not tell
    need(trained_on in (None, common.sha256(source)),
         f"{source}: the kept set has changed since {run.out} was trained on it; train the run "
         "again, or bring the file back")
    run.judges = judges_used(record)


def read_checkpoints(run, samples, num):
    """What a trajectory of `num` samples needs (None: as many as the run drew)."""
    labels = run.out / "sample_labels.npy"
    need(run.drawn is not None, f"{labels}: no such file, and --trajectory draws with these "
         "labels; draw again with sample.py")
    files = sorted(run.out.glob("step_*.pt"), key=step_of)
    need(files, f"{run.out}: no step_*.pt to follow; train with --checkpoint-every")
    need((num or 0) <= len(run.drawn), f"{samples}: {len(run.drawn)} samples, fewer than "
         f"--trajectory-num {num}; draw more with sample.py")
    need(run.sampling, f"{run.out / 'sample.args.json'}: no such file, and --trajectory draws by "
         "it; draw again with sample.py")
    last = run.out / "last.pt"
    # --steps need not be a multiple of --checkpoint-every.
    if last.exists() and common.load_pt(last)["step"] > step_of(files[-1]):
        files.append(last)
    run.checkpoints = files


def step_of(file):
    """The step in the name of step_0005000.pt."""
    step = file.stem.removeprefix("step_")
    need(step.isdecimal(), f"{file}: its name has no step, as in step_0005000.pt; rename it or "
         "move it away")
    return int(step)


# ---------------------------------------------------------------------- what is measured already
def settings(run, key, args, inputs):
    """What a run's figures under an encoder depend on, beside its samples.

    When any of it has changed they are measured again. key: that of the weights, judged_by().
    """
    info = inputs.data.info
    # Only a model of a subset is compared with the full model's samples.
    baseline = None
    audited = args.audit and run.main
    if audited and inputs.full and run.keep is not None:
        baseline = inputs.full.sha256
    return {"num": len(run.images), "seed": args.seed, "bootstrap": args.bootstrap,
            "audit": args.audit_samples if audited else 0, "data": info["sha256"],
            "heldout": info.get("sha256_test"), "weights": key, "halves": run.guided,
            "reference_stats": digest_of(args.reference_stats),
            "reference_max": args.reference_max, "labels": array_hash(run.labels),
            "kept": array_hash(run.keep), "baseline": baseline}


def judged_by(name, weights, inputs):
    """What an encoder's weights are known by: hash of their file, or of each network of scratch.

    None, which no figures of scratch have, while some of its networks are still to be trained.
    """
    if encoders.ENCODERS[name].needs_labels:
        return identities(weights or inputs.data.folder / "scratch.pt", inputs.judges)
    return digest_of(weights)


def identities(path, count):
    """Hashes of the first `count` networks in a scratch.pt; None where it holds fewer."""
    states = common.networks_in(path)[:count]
    if len(states) < count:
        return None
    with common.reading(path, "a file of scratch networks"):
        return [encoders.digest(state["model"]) for state in states]


def digest_of(path):
    """The hash of a file; of a folder, or of a file that is not there yet, its name."""
    if path and Path(path).is_file():
        return common.sha256(path)
    return str(path) if path else None


def array_hash(x):
    return None if x is None else hashlib.sha256(np.ascontiguousarray(x)).hexdigest()


def earlier(run, info):
    """metrics.json as it stands, or {} where it is not of these samples and this data set."""
    if not run.file.exists():
        return {}
    old = common.load_json(run.file, "figures of evaluate.py", encoders=dict)
    same = old.get("samples_sha256") == run.sha256 and old.get("data_sha256") == info["sha256"]
    return old if same else {}


def standing(run, name, key, args, inputs):
    """Of how many judges metrics.json holds the run's figures, and they stand."""
    row = earlier(run, inputs.data.info).get("encoders", {}).get(name)
    if not row or args.overwrite or args.trajectory:
        return 0
    same = row.get("settings") == settings(run, key, args, inputs)
    return len(row["judges"]) if same else 0


def load_inputs(args, data):
    """What the flags name, checked, by rank 0.

    A namespace: data, runs (one for each guidance), full (that of them on the full set, or None),
    judges (how many networks scratch is), jobs [(encoder, its weights, {place in runs of one that
    it has to judge: how many judges did}, how many there are)].
    """
    files = {args.out: {None: args.samples}}
    if args.runs:
        files = {run: common.samples_of(run) for run in args.runs}
    for out, drawn in files.items():
        for samples in drawn.values():
            need(Path(samples).exists(), f"{samples}: no samples there; draw them with sample.py "
                 f"--out {out}")
    if args.reference_stats:
        read_statistics(args.reference_stats)
    if data.images is None:
        need(args.reference_stats, f"{data.folder}: holds latents only; give the statistics of its "
             "pixels with --reference-stats FILE.npz (mu and sigma, such as ADM's)")
        for name in args.encoder:
            need(encoders.ENCODERS[name].size, f"{data.folder}: holds latents only, and encoder "
                 f"{name} needs its pixels; use --encoder inception")
    inputs = SimpleNamespace(data=data, jobs=[], judges=args.judges or judges_for(data.images))
    inputs.runs = []
    for out, drawn in files.items():
        inputs.runs += open_runs(out, drawn, data, args)
    if args.trajectory:
        inputs.runs = [run for run in inputs.runs if run.main]
    full = [run for run in inputs.runs if run.main and run.known and run.trained
            and run.keep is None]
    inputs.full = full[0] if full else None
    # Weights are given in the order of the encoders, and the last may have none.
    weights_of = [*(args.encoder_weights or ()), *[None] * len(args.encoder)]
    for name, weights in zip(args.encoder, weights_of):
        count = judges_of(name, inputs)
        key = judged_by(name, weights, inputs)
        todo = {}
        for k, run in enumerate(inputs.runs):
            done = standing(run, name, key, args, inputs)
            if done < count:
                todo[k] = done
            elif run.main:
                common.log(f"{run.out}: measured already under {name}; nothing to do (--overwrite "
                           "measures again)")
        if todo:
            inputs.jobs.append((name, weights, todo, count))
    return inputs


def judges_of(name, inputs):
    """How many networks an encoder is."""
    return inputs.judges if encoders.ENCODERS[name].needs_labels else 1


# ----------------------------------------------------------------------------------- command line
def parse_args(argv=None):
    p = common.Parser(__doc__, epilog="Encoders:\n" + encoders.describe())
    p.add_argument("--data", required=True,
                   help="data folder: the reference is its full training set")
    p.add_argument("--runs", nargs="+", metavar="RUN",
                   help="run folders; the first on the full set is the audit's baseline")
    p.add_argument("--samples", help="instead: a .npy, .npz, or folder or .zip of pictures")
    p.add_argument("--out", help="with --samples: folder to write to")
    p.add_argument("--encoder", nargs="+", default=["scratch"], choices=encoders.ENCODERS,
                   help="the judge, or several; the first does the audit")
    p.add_argument("--judges", type=common.number(int, low=1, high=100),
                   help="networks of encoder scratch, seeds 0, 1, ...; default 8 for small data "
                        "sets, else 3")
    p.add_argument("--encoder-weights", nargs="+", metavar="PATH",
                   help="local weights, in the order of --encoder")
    p.add_argument("--reference-stats", metavar="FILE.npz",
                   help="mu and sigma (or m2 and s2) to compare with, instead of the data folder's")
    p.add_argument("--reference-max", type=common.count, default=50_000,
                   help="most training images for neighbours, kernels and classes")
    p.add_argument("--num", type=common.count, help="use the first so many samples")
    p.add_argument("--bootstrap", type=common.number(int, low=0, high=10_000), default=0,
                   help="resamplings for an interval of the distance (biased upwards), printed")
    p.add_argument("--no-audit", dest="audit", action="store_false", help="no memorisation audit")
    p.add_argument("--audit-samples", type=common.count, default=10_000, help="most samples in it")
    p.add_argument("--trajectory", action="store_true", help="score every kept checkpoint instead")
    p.add_argument("--trajectory-num", type=common.count,
                   help="samples per checkpoint; default: as many as the run drew")
    p.add_argument("--batch-size", type=common.batch_type, default=256,
                   help="images at a time, over all processes")
    common.add_run_flags(p, overwrite="measure again what has been measured",
                         seed="of subsets, draws and resamplings")
    args = p.parse_args(argv)
    check_flags(p, args)
    return args


def check_flags(p, args):
    """Flags that contradict each other."""
    if bool(args.runs) == bool(args.samples) or bool(args.samples) != bool(args.out):
        p.error("give either --runs RUN ..., or --samples FILE with --out DIR")
    if args.trajectory and args.samples:
        p.error("--trajectory needs --runs: it draws from their checkpoints")
    if args.trajectory and len(args.encoder) > 1:
        p.error("--trajectory follows a run under one judge; give one --encoder")
    twice = common.named_twice(args.runs or ())
    if twice:
        p.error(f"--runs: {twice} is named twice")
    if args.samples and (Path(args.out) / "train.args.json").exists():
        if Path(args.samples).resolve().parent != Path(args.out).resolve():
            p.error(f"--out {args.out} is a run of train.py, and {args.samples} lies elsewhere: "
                    "its figures would pass for the run's; choose another folder")
    if len(args.encoder_weights or ()) > len(args.encoder):
        p.error("more --encoder-weights than --encoder")


@common.command
def main(argv=None):
    args = parse_args(argv)
    device = common.get_device(args.device)
    data = common.open_data(args.data, pixels=False)
    # Rank 0 alone holds the samples; the others learn which encoders to open.
    inputs = None
    if common.rank() == 0:
        common.sweep(data.folder)                            # statistics that a kill cut short
        inputs = load_inputs(args, data)
    jobs = common.from_rank0(lambda: inputs.jobs)
    teams = []
    for name, weights, _, count in jobs:
        judges = common.open_judges(name, data, device, weights, count)
        if args.reference_stats:
            read_statistics(args.reference_stats, judges[0].width)
        teams.append(Team(judges, args.batch_size, device))
    # Runs that are measured already need no lock, unless a kill came between that and the record.
    outs = [Path(out) for out in args.runs or [args.out]]
    busy = common.from_rank0(lambda: busy_places(outs, inputs))
    with contextlib.ExitStack() as claimed:
        start = time.time()
        for k in busy:
            claimed.enter_context(common.claim(outs[k]))
            if common.rank() == 0:
                common.sweep(outs[k])
        for team, (_, weights, todo, _) in zip(teams, jobs):
            if common.rank() == 0:
                measure(args, inputs, team, weights, todo)
                team.dismiss()
            else:
                team.follow()
        for k in busy:
            write_record(outs[k], data, round(time.time() - start, 3))


def busy_places(outs, inputs):
    """[place in outs of a folder that something is written to]."""
    unmeasured = {inputs.runs[k].out for _, _, todo, _ in inputs.jobs for k in todo}
    return [k for k, out in enumerate(outs) if out in unmeasured or not recorded(out)]


def recorded(out):
    """Whether a call that measured this run came to its end."""
    record = common.record_of(out, "evaluate")
    return record is not None and record["seconds"] is not None


def write_record(out, data, seconds):
    """OUT/evaluate.args.json. It binds no flag: metrics.json keeps many ways of measuring apart."""
    if common.rank() == 0:
        common.save_json(out / "evaluate.args.json", {
            "args": {}, "inputs": {"data": data.info["sha256"]}, "seconds": seconds,
            "provenance": common.provenance(), "spent": seconds})


if __name__ == "__main__":
    main()
