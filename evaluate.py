"""Stage 6: measure samples against the FULL training set, and ask whether they are copies of what the model has seen.

For one run or several at once (the reference is encoded once). torchrun spreads the encoding and the drawing of trajectories; the first process
measures. The distance is called FID only on pytorch-fid's Inception features; on any other encoder it is FD with the encoder's name.
Figures depend on n, so n is always printed.

Reads   RUN/samples.npy, sample_labels.npy, sample.args.json, train.args.json; or --samples FILE|FOLDER (.npy, .npz with arr_0 or images, pictures)
        DATA/                the data folder; its statistics are cached as DATA/stats_<encoder>.npz (mu, sigma, n)
Writes  RUN/metrics.json     every figure under its encoder, with the protocol;  RUN/nearest.png, the most suspicious samples and their nearest images
        RUN/trajectory.json  with --trajectory: the distance of every kept checkpoint

    python evaluate.py --runs runs/digits/full runs/digits/random --data data/digits --encoder scratch
"""
import hashlib
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import common
from models import diffusion, encoders, metrics
from models.diffusion import to_uint8

AUDIT_BYTES = 16e9                                                    # a space whose vectors would take more memory is left out of the audit
DRAWN_WITH = ("sampler", "steps", "cfg", "cfg_interval", "labels", "seed", "eta", "variance", "amp")     # of sample.args.json


# ---------------------------------------------------------------------------------------------- samples
def read_samples(path):
    """(images uint8 (n, H, W, C), labels (n,) or None) from .npy, .npz (arr_0 / images, arr_1 / labels) or a folder of pictures
    at any depth."""
    path = Path(path)
    labels = None
    if path.is_dir():
        images = read_folder(path)
    elif path.suffix.lower() == ".npz":
        z = common.load_npz(path, ("arr_0", "arr_1", "images", "labels"), "an .npz with arr_0 or images, uint8 (n, H, W, C),")
        images, labels = z.get("arr_0", z.get("images", np.empty(0))), z.get("arr_1", z.get("labels"))
    else:
        images = common.load_npy(path, "samples, uint8 (n, H, W, C)", (None,) * 4, "u")
        beside = path.parent / "sample_labels.npy"
        if path.name == "samples.npy" and beside.exists():
            labels = np.array(common.load_npy(beside, "labels of the samples, int64 (n,)", (len(images),), "iu"))
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise common.UserError(f"{path}: {images.dtype} {images.shape}, but samples must be uint8 (n, H, W, 1 or 3)")
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise common.UserError(f"{path}: {len(images)} samples but labels {labels.dtype} of shape {labels.shape}; one integer per sample expected")
    return images, labels


def pictures(folder):
    from PIL import Image
    known = Image.registered_extensions()
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in known and not f.name.startswith("."))


def read_folder(folder):
    from PIL import Image
    files = pictures(folder)
    if not files:
        raise common.UserError(f"{folder}: no picture in it or below it; give the folder, .npy or .npz that holds the samples")
    images = None
    for k, f in enumerate(common.progress(files, desc=str(folder))):
        try:
            with common.no_bombs(), Image.open(f) as im:
                if im.mode[0] in "IF":
                    raise ValueError(f"mode {im.mode}: more than 8 bits a channel")
                x = np.asarray(im if im.mode == "L" else im.convert("RGB"))
        except Exception as e:
            raise common.UserError(f"{f}: not a readable picture ({e}); remove or replace it")
        images = np.empty((len(files), *x.shape), np.uint8) if images is None else images
        if x.shape != images.shape[1:]:
            raise common.UserError(f"{f}: shape {x.shape}, but {files[0].name} has {images.shape[1:]}; bring all samples to one size")
        images[k] = x
    return images if images.ndim == 4 else images[..., None]


# ---------------------------------------------------------------------------------------------- the work that all processes share
class Selection:
    """images[rows] that are read only when asked for: len(p), p[index]."""

    def __init__(self, images, rows):
        self.images, self.rows = images, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.images[self.rows[index]]


class Team:
    """Rank 0 measures; where it needs images encoded or drawn it calls, and the other processes, which wait in serve(), do their part of each call.
    One process calls itself."""

    def __init__(self, encs, batch_size, device):
        self.encs, self.batch_size, self.device = encs, max(1, batch_size // common.world()), device

    def call(self, task, *args):
        """[what self.task(*args) gives on every rank], in their order. task: the name of a method."""
        common.from_rank0(lambda: (task, args))
        return self._share(task, args)

    def serve(self):
        while order := common.from_rank0(lambda: None):               # the answer of rank 0's call(), or of its dismiss()
            self._share(*order)

    def _share(self, task, args):
        with common.user_errors():
            part = getattr(self, task)(*args)
        return common.gather(part)

    def dismiss(self):
        common.from_rank0(lambda: None)

    def encode(self, enc, images, kind="pooled", title=None):
        """Features (n, D) float32 of images, an array (n, H, W, C) or a Selection of one. Every process reads a memory map itself; other arrays are sent,
        256 MB at a time."""
        part = images if isinstance(images, Selection) else Selection(images, np.arange(len(images)))
        file, which, out = getattr(part.images, "filename", None), self.encs.index(enc), []
        step = len(part) if file else max(1, 2**28 // part.images[0].nbytes)
        for lo in range(0, len(part), step):
            rows = part.rows[lo:lo + step]
            out += self.call("extract", which, *((str(file), rows) if file else (part[lo:lo + step], np.arange(len(rows)))), kind, title)
        return np.concatenate([z for z in out if z is not None])      # fewer rows than processes: None

    def extract(self, which, images, rows, kind, title):
        if isinstance(images, str):
            images = np.load(images, mmap_mode="r", allow_pickle=False)
        lo, hi = common.shard(len(rows))
        with common.progress(total=hi - lo, desc=title, delay=0 if title else 2) as bar:
            return encoders.extract(self.encs[which], images, self.batch_size, kind, rows=rows[lo:hi], bar=bar)

    def draw(self, which, file, record, y):
        """(features of this rank's part of one sample for each label of y (n,), what the checkpoint says of its training)."""
        state, model, process = common.open_checkpoint(file)
        model, (lo, hi), images = model.to(self.device, memory_format=torch.channels_last), common.shard(len(y)), []
        from models.vae import load_vae
        vae = load_vae(record["vae"], self.device) if state["args"]["latents"] else None
        for k in range(lo, hi, self.batch_size):
            ids = range(k, min(k + self.batch_size, hi))
            with common.autocast(self.device, record["amp"]):
                noise = [common.generator(record["seed"], "sample", i) for i in ids]
                x = diffusion.draw(model, process, torch.from_numpy(y[ids.start:ids.stop]).to(self.device), noise, record, vae,
                                   state["args"]["latent_scale"])
            if not x.isfinite().all():
                raise common.UserError(f"{file}: samples hold NaN or infinity; the run had diverged there, remove the file to leave it out")
            images.append(to_uint8(x).cpu().numpy())
        z = encoders.extract(self.encs[which], np.concatenate(images), self.batch_size) if images else None
        return z, {k: state[k] for k in ("step", "images_seen", "seconds")}


# ---------------------------------------------------------------------------------------------- reference
class Reference:
    """The full training set under one encoder: mu and sigma of all of it, and the features of up to `most` images for neighbours and kernels.

    With a file `statistics` mu and sigma are those in it. Of a data folder that holds latents only there are no features (None).
    """

    def __init__(self, d, enc, team, most, seed, statistics=None):
        self.d, self.enc, self.team = d, enc, team
        self.features = self.test = self.heldout = self.n = None
        if statistics:
            self.mu, self.sigma = read_statistics(statistics, enc.width)
        if d.images is None:
            return
        self.rows = np.sort(np.random.default_rng([seed, 0]).choice(len(d.labels), min(most, len(d.labels)), replace=False))
        self.features = team.encode(enc, Selection(d.images, self.rows), title=f"{enc.name}: reference")       # (R, D)
        self.labels = d.labels[self.rows]
        if not statistics:
            self.mu, self.sigma, self.n = self._cached(d.folder / f"stats_{enc.name}.npz")
        self.test = None if d.test_images is None else team.encode(enc, d.test_images)
        self.heldout = None if self.test is None or len(self.test) < 2 else self.distance(self.test)

    def _cached(self, cache):
        key = f"{self.enc.identity} {self.d.info['sha256']}"
        try:
            with np.load(cache, allow_pickle=False) as z:
                if str(z["key"]) == key:
                    return z["mu"], z["sigma"], int(z["n"])
        except Exception:                                             # absent, damaged or of another kind: it is only a cache
            pass
        mu, sigma = metrics.gaussian_stats(self, device=self.enc.device)
        try:
            with common.atomic(cache) as tmp, open(tmp, "wb") as f:
                np.savez(f, mu=mu, sigma=sigma, n=len(self.d.labels), key=key)
        except OSError as e:                                          # a shared, read-only data set
            common.log(f"note: {cache} is not kept ({e.strerror}): the next call encodes the whole set again")
        return mu, sigma, len(self.d.labels)

    # The whole training set as a matrix of features: gaussian_stats goes over it once, block by block. What is not held is encoded as it is read.
    shape = property(lambda self: (len(self.d.labels), self.enc.width))

    def __len__(self):
        return len(self.d.labels)

    def __getitem__(self, index):
        return self.of(np.arange(len(self))[index])

    def of(self, rows):
        """Features (n, D) of these training images."""
        return self.features[rows] if len(self.rows) == len(self) else self.team.encode(self.enc, Selection(self.d.images, rows))

    def distance(self, features):
        return metrics.frechet_distance(self.mu, self.sigma, *metrics.gaussian_stats(features))


def read_statistics(path, width=None):
    """(mu, sigma) from an .npz of somebody else: mu/sigma (pytorch-fid, ADM) or m2/s2 (lucidrains). Refused when the width is not the encoder's."""
    what = "an .npz with mu and sigma, or m2 and s2,"
    z = common.load_npz(path, ("mu", "sigma", "m2", "s2"), what)
    if not (pair := next((p for p in (("mu", "sigma"), ("m2", "s2")) if set(p) <= set(z)), None)):
        raise common.UserError(f"{path}: holds {', '.join(z)} only; {what} expected")
    mu, sigma = (z[k] for k in pair)
    if mu.dtype.kind != "f" or sigma.dtype.kind != "f" or mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise common.UserError(f"{path}: mu {mu.dtype} {mu.shape} and sigma {sigma.dtype} {sigma.shape}, but floats (D,) and (D, D) are expected")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise common.UserError(f"{path}: mu or sigma holds NaN or infinity; make it again")
    if not np.allclose(sigma, sigma.T, rtol=1e-3, atol=1e-3 * np.abs(sigma).max(initial=0)) or (sigma.diagonal() < 0).any():
        raise common.UserError(f"{path}: sigma is no covariance: it must be symmetric, without a negative variance; make it again")
    if width is not None and len(mu) != width:
        raise common.UserError(f"{path}: statistics of {len(mu)} features, but the encoder's are {width}; take those of the same encoder")
    return mu.astype(np.float64), sigma.astype(np.float64)


# ---------------------------------------------------------------------------------------------- one run under one encoder
def figures(run, ref, a):
    """Everything that is measured of run's samples under one encoder; n is printed with each figure that depends on it."""
    d, enc, n = ref.d, ref.enc, len(run.images)
    z = ref.team.encode(enc, run.images, title=f"{enc.name}: {run.name}")                                 # (n, D)
    out = {"identity": enc.identity, "distance": "FID" if enc.name == "inception" else f"FD ({enc.name})", "n": n,
           "reference": a.reference_stats or f"{d.info['name']}, the full training set", "reference_n": ref.n,
           "fd": ref.distance(z), "fd_heldout": ref.heldout, "fd_heldout_n": None if ref.test is None else len(ref.test)}
    if out["fd_heldout"] is not None and n >= len(ref.test):          # a distance falls as n grows: the samples once more at the held-out images' n
        some = np.sort(np.random.default_rng([a.seed, 3]).choice(n, len(ref.test), replace=False))
        out["fd_at_heldout_n"] = ref.distance(z[some])
    if n <= enc.width:
        common.log(f"note: {n} samples for {enc.width} features: the covariance is singular and the distance far too large; draw more samples")
    if a.bootstrap:
        mean, std, low, high = metrics.bootstrap_frechet(z, ref.mu, ref.sigma, a.bootstrap, a.seed)
        out["fd_bootstrap"] = dict(repeats=a.bootstrap, mean=mean, std=std, low=low, high=high)
    if ref.features is not None and run.keep is not None:             # what a perfect copier of the subset would score
        out["fd_subset"] = ref.distance(ref.of(run.keep)) if len(run.keep) > 1 else None
    if ref.features is not None and run.labels is not None and d.num_classes > 1:
        try:
            out["per_class"] = metrics.per_class_frechet(z, run.labels, ref.features, ref.labels, d.num_classes, a.seed,
                                                         *((ref.test, d.test_labels) if ref.test is not None else ()))
        except ValueError as e:
            common.log(f"note: no distance per class: {e}")
        if enc.name == "scratch":
            logits = ref.team.encode(enc, run.images, "logits")
            out["read_as_labelled"] = float((logits.argmax(1) == run.labels).mean())
    if enc.name == "inception" and n >= 10:
        logits = ref.team.encode(enc, run.images, "logits")[np.random.default_rng(a.seed).permutation(n)]
        out["inception_score"] = dict(zip(("mean", "std"), metrics.inception_score(logits)), splits=10)
    if ref.features is None:                                          # what follows compares with single images
        return out
    mean, error, size = metrics.kid(z, ref.features, seed=a.seed)
    out["kid"] = dict(mean=mean, standard_error=error, subset_size=size, subsets=100)
    m = min(n, len(ref.features))                                     # equally many of both: these four depend on n
    pick = lambda x: x[np.sort(np.random.default_rng([a.seed, 1]).choice(len(x), m, replace=False))]     # noqa: E731
    real, fake, device = pick(ref.features), pick(z), enc.device
    if m > 5:
        out.update(metrics.precision_recall(real, fake, 3, device), neighbours_n=m, precision_k=3)
        out.update(metrics.density_coverage(real, fake, 5, device), density_k=5)
    return out


def at_most(rows, labels, limits, rng):
    """Those of rows (n,), sorted, that are left when class c may have limits[c] of them; who goes is drawn."""
    order = rows[rng.permutation(len(rows))]
    order = order[np.argsort(labels[order], kind="stable")]           # by class
    place = np.arange(len(order)) - np.searchsorted(labels[order], labels[order])               # within the class
    return np.sort(order[place < limits[labels[order]]])


def raw(images):
    """Pixel space: (n, H * W * C) float32 in [-1, 1] of uint8 images or a Selection of some."""
    out = np.empty((len(images), images[:1].size), np.float32)
    for lo in range(0, len(out), 1024):
        out[lo:lo + 1024] = np.asarray(images[lo:lo + 1024]).reshape(-1, out.shape[1]) / 127.5 - 1
    return out


def audit(run, ref, a, baseline, draws=20):
    """The memorisation audit of metrics.memorisation_audit in pixels and under the encoder, and nearest.png. Rank 0 holds one space's vectors of the
    images seen and of those they are compared with; a space that would need more than AUDIT_BYTES is left out, and said so."""
    if ref.features is None:
        return {"skipped": "the data folder holds latents only, and the audit compares pixels"}
    d, keep = ref.d, run.keep if run.keep is not None else np.arange(len(ref.d.labels))
    rest = np.setdiff1d(np.arange(len(d.labels)), keep, assume_unique=True)
    if len(rest):                                                     # a model of a subset: unseen training images to compare with
        limits = draws * np.bincount(d.labels[keep], minlength=d.num_classes)                   # all draws together take no more of a class
        rest = at_most(rest, d.labels, limits, np.random.default_rng([a.seed, 4]))
        pool, pool_labels, heldout = Selection(d.images, rest), d.labels[rest], d.test_images
    elif d.test_images is not None:                                   # a model of the full set: the held-out split
        pool, pool_labels, heldout = d.test_images, d.test_labels, None
    else:
        return {"skipped": "a model of the full set, and the data folder has no held-out images to compare with"}
    thin = np.sort(np.random.default_rng([a.seed, 2]).choice(len(run.images), min(len(run.images), a.audit_samples), replace=False))
    samples, seen, device = Selection(run.images, thin), Selection(d.images, keep), ref.enc.device

    def encoded(x):
        return ref.of(x.rows) if isinstance(x, Selection) and x.images is d.images else ref.team.encode(ref.enc, x)
    alike = None
    if len(rest) and ref.test is not None:                            # the held-out images of the subset's kind: as large a share, but enough of them to count
        share = max(len(keep) / len(d.labels), min(1 / 3, 1000 / len(ref.test)))
        alike = Selection(d.test_images, metrics.most_alike(ref.test, d.test_labels, ref.of(keep), d.labels[keep], ref.features, ref.labels, share))
        alike = alike if len(alike) else None
    spaces = {ref.enc.name: (encoded, ref.enc.width), "pixels": (raw, d.images[0].size)}        # "pixels" is always the raw ones, not the encoder
    out = {"n": len(thin), "draws": draws, "noise": 0.2, "model_of": "a subset" if len(rest) else "the full set"}
    for space, (encode, width) in list(spaces.items()):
        if (need := 4 * width * (len(seen) + len(pool))) > AUDIT_BYTES:
            common.log(f"note: {run.name}: no memorisation audit in {space}: {need / 1e9:.0f} GB of vectors, more than {AUDIT_BYTES / 1e9:.0f}")
            out.setdefault("left_out", []).append(space)
            del spaces[space]
            continue
        try:
            out[space] = metrics.memorisation_audit(encode, samples, seen, d.labels[keep], pool, pool_labels, heldout,
                                                    baseline if len(rest) else None, draws, a.seed, device=device, alike=alike)
        except ValueError as e:
            return {"skipped": str(e)}
    if not spaces:
        return {"skipped": f"more than {AUDIT_BYTES / 1e9:.0f} GB of vectors"}
    encode = list(spaces.values())[-1][0]                             # pixels, where they fit
    x, train = encode(samples), encode(seen)
    dist, index = metrics.knn(x, train, min(51, len(train)), device=device)
    worst = np.argsort(dist[:, 0] / dist[:, 1:].mean(1).clip(1e-9), kind="stable")[:16]
    common.save_grid(run.out / "nearest.png", np.stack([samples[worst], seen[index[worst, 0]]]))          # (2, 16, H, W, C)
    return out


# ---------------------------------------------------------------------------------------------- quality over training
def step_of(file):
    """The step in the name of step_0005000.pt."""
    if not (step := file.stem.removeprefix("step_")).isdecimal():
        raise common.UserError(f"{file}: its name has no step, as in step_0005000.pt; rename it or move it away")
    return int(step)


def trajectory(run, ref, a):
    """Distance of every kept checkpoint of a run, each with the labels, seeds and settings with which sample.py drew the run's samples.

    The last point therefore equals the run's own distance (to the last bit of the network's sums) when n is the same.
    """
    record = common.load_record(run.out / "sample.args.json")["args"]     # whose settings the trajectory uses
    files = sorted(run.out.glob("step_*.pt"), key=step_of)
    last = common.load_pt(run.out / "last.pt")["step"] if (run.out / "last.pt").exists() else 0
    files += [run.out / "last.pt"] if last > step_of(files[-1]) else []        # --steps is no multiple of --checkpoint-every
    y = run.drawn[:a.trajectory_num]
    key = {"settings": {k: record[k] for k in DRAWN_WITH}, "labels": array_hash(y), "n": len(y), "data": ref.d.info["sha256"],
           "identity": ref.enc.identity, "checkpoints": {f.name: common.sha256(f) for f in files}}
    if a.reference_stats:
        key["reference"] = common.sha256(a.reference_stats)
    path, rows, n = run.out / "trajectory.json", [], len(y)
    if path.exists() and not a.overwrite and common.load_json(path, "points of evaluate.py").get("key") == key:
        return common.log(f"{path}: complete; nothing to do (--overwrite draws again)")
    for file in files:
        parts = ref.team.call("draw", ref.team.encs.index(ref.enc), str(file), record, y)
        fd, state = ref.distance(np.concatenate([z for z, _ in parts if z is not None])), parts[0][1]
        rows.append({**state, "fd": fd, "n": n})
        common.log(f"{run.name}: step {state['step']:,}, {state['images_seen']:,} images, {state['seconds']:,.0f} s: {fd:.3f}")
    common.save_json(path, {"encoder": ref.enc.identity, "name": ref.enc.name, "points": rows, "key": key})


# ---------------------------------------------------------------------------------------------- the runs
def judges_used(folder, aligned=True):
    """Names of the encoders that chose the kept set of `folder` (of prune.py or attach.py), or that a run is aligned to: no fair judges of it.

    aligned: the run trained with the folder's attachments, not only on its kept set. Files of scores or features that another call made are followed.
    """
    used = set()
    if (folder / "attach.args.json").exists():
        made = common.load_record(folder / "attach.args.json")["args"]
        if aligned:
            used |= {made.get("visual")} - {None, "none"}
        if made.get("select") in ("interval", "easy", "medium", "hard"):
            used |= scorers(made, "difficulty", folder) if made.get("difficulty") else {"ddae"} if made.get("reference") else set()
        if made.get("indices"):
            used |= judges_used(Path(made["indices"]).parent, False)
    if (folder / "prune.args.json").exists():
        made = common.load_record(folder / "prune.args.json")["args"]
        if made.get("scores"):
            used |= scorers(made, "scores", folder)
        if made.get("score") in ("el2n", "ccs"):
            used.add("scratch")                                       # other seeds, but the same network on the same labels
        elif made.get("score") not in (None, "random"):               # random scores name a surrogate too, and never look at it
            used |= scorers(made, "features", folder) if made.get("features") else {made["surrogate"]}
    return used


def scorers(made, flag, folder):
    """The networks behind the file of --features, --scores or --difficulty, as the records beside that file tell."""
    home = Path(made[flag]).parent
    prune, attach = home / "prune.args.json", home / "attach.args.json"
    if home.resolve() == folder.resolve():                            # its own output: the first call's record is gone
        return set()
    if flag == "features":                                            # whatever that call then scored with
        return {common.load_record(prune)["args"]["surrogate"]} if prune.exists() else set()
    if attach.exists() and Path(made[flag]).name == "difficulty.npy":            # scored whatever that call selected by
        origin = common.load_record(attach)["args"]
        return scorers(origin, "difficulty", home) if origin.get("difficulty") else {"ddae"}
    return judges_used(home, False)


def open_run(out, samples, d, a):
    """Samples, labels, kept indices and protocol of a run folder, checked. keep is None for a model of the full set or one we know nothing of."""
    run = SimpleNamespace(out=Path(out), name=Path(out).name, keep=None, known=False, protocol={}, aligned=set())
    run.images, run.labels = read_samples(samples)
    run.drawn, run.data_sha256 = run.labels, d.info["sha256"]
    run.format = "uint8 arrays" if Path(samples).is_file() else " and ".join(sorted({f.suffix.lower() for f in pictures(Path(samples))})) + " files"
    if a.num:
        if a.num > len(run.images):
            raise common.UserError(f"{samples}: {len(run.images)} samples, fewer than --num {a.num}; draw more with sample.py")
        run.images, run.labels = run.images[:a.num], None if run.labels is None else run.labels[:a.num]
    if len(run.images) < 2:
        raise common.UserError(f"{samples}: {len(run.images)} samples, a distance needs at least 2; draw more with sample.py")
    for name in a.encoder if d.images is not None else ():
        if not encoders.ENCODERS[name].size and run.images.shape[1:] != d.images.shape[1:]:
            raise common.UserError(f"{samples}: samples of {run.images.shape[1:]}, but {d.info['name']} has {d.images.shape[1:]}, "
                                   f"and encoder {name} does not resize; draw or bring them to that size")
    if run.labels is not None and (run.labels.min() < 0 or run.labels.max() >= d.num_classes):
        common.log(f"note: {samples}: labels outside the data set's {d.num_classes} classes (drawn without class?): nothing is measured per class")
        run.labels = None
    if a.trajectory and run.drawn is None:
        raise common.UserError(f"{run.out / 'sample_labels.npy'}: no such file, and --trajectory draws with these labels; draw again with sample.py")
    if a.trajectory and not any(run.out.glob("step_*.pt")):
        raise common.UserError(f"{run.out}: no step_*.pt to follow; train with --checkpoint-every")
    if a.trajectory and (a.trajectory_num or 0) > len(run.drawn):
        raise common.UserError(f"{samples}: {len(run.drawn)} samples, fewer than --trajectory-num {a.trajectory_num}; draw more with sample.py")
    run.sha256 = common.sha256(samples) if Path(samples).is_file() else hashlib.sha256(np.ascontiguousarray(run.images)).hexdigest()
    if (run.out / "sample.args.json").exists():
        record = common.load_record(run.out / "sample.args.json")
        if record["seconds"] is None:
            raise common.UserError(f"{out}: sample.py has not finished there; run its command again")
        if record.get("data_sha256") not in (None, d.info["sha256"]):
            raise common.UserError(f"{out}: was trained on {record.get('data')}, but --data {a.data} is {d.info['name']}; "
                                   "evaluate on its own data set")
        run.protocol = {k: record["args"][k] for k in DRAWN_WITH} | {
            "checkpoint_step": record.get("step"), "weights": "EMA", "sample_seconds": record["seconds"]}
    if (run.out / "train.args.json").exists():
        record = common.load_record(run.out / "train.args.json")
        made = record["args"]
        source = made.get("indices") or (Path(made["attach"]) / "keep.npy" if made.get("attach") else None)
        run.keep, run.known = common.load_indices(source, len(d.labels)) if source else None, True
        if source:
            trained_on = record.get("inputs", {}).get("indices" if made.get("indices") else "attach_keep")
            if trained_on not in (None, common.sha256(source)):
                raise common.UserError(f"{source}: the kept set has changed since {out} was trained on it; "
                                       "train the run again, or bring the file back")
            run.aligned = judges_used(Path(source).parent, bool(made.get("attach")))
    return run


def settings(run, name, weights, a, d, full):
    """What the figures of a run under an encoder depend on, beside its samples: when any of it has changed they are measured again."""
    own = weights or (d.folder / "scratch.pt" if name == "scratch" else None)
    digest = lambda path: common.sha256(path) if path and Path(path).is_file() else path and str(path)   # noqa: E731
    return {"num": len(run.images), "seed": a.seed, "bootstrap": a.bootstrap, "audit": a.audit_samples if a.audit else 0, "data": d.info["sha256"],
            "heldout": d.info.get("sha256_test"), "weights": digest(own), "reference_stats": digest(a.reference_stats),
            "reference_max": a.reference_max, "labels": array_hash(run.labels), "kept": array_hash(run.keep),
            "baseline": full.sha256 if full and run.keep is not None else None}


def array_hash(x):
    return None if x is None else hashlib.sha256(np.ascontiguousarray(x)).hexdigest()


def earlier(run):
    """(metrics.json as it stands, whether it is of these samples)."""
    file = run.out / "metrics.json"
    old = common.load_json(file, "figures of evaluate.py", encoders=dict) if file.exists() else {}
    return old, old.get("samples_sha256") == run.sha256 and old.get("data_sha256") == run.data_sha256


def plan(a, d, pairs):
    """(runs, the one on the full set or None, [(encoder name, its weights, indices of the runs that it has to judge)]), all inputs checked."""
    for out, samples in pairs:
        if not Path(samples).exists():
            raise common.UserError(f"{samples}: no samples there; draw them with sample.py --out {out}")
    if a.reference_stats:
        read_statistics(a.reference_stats)
    if d.images is None and not a.reference_stats:
        raise common.UserError(f"{d.folder}: holds latents only; give the statistics of its pixels with --reference-stats FILE.npz (mu and sigma, such as ADM's)")
    for name in a.encoder if d.images is None else ():
        if not encoders.ENCODERS[name].size:
            raise common.UserError(f"{d.folder}: holds latents only, and encoder {name} needs its pixels; use --encoder inception")
    runs, jobs = [open_run(out, samples, d, a) for out, samples in pairs], []
    full = next((r for r in runs if r.known and r.keep is None), None)
    for name, weights in zip(a.encoder, (a.encoder_weights or []) + [None] * len(a.encoder)):
        todo = []
        for k, run in enumerate(runs):
            old, same = earlier(run)
            row = old.get("encoders", {}).get(name) if same and not a.overwrite else None
            if row and not a.trajectory and row.get("settings") == settings(run, name, weights, a, d, full):
                common.log(f"{run.out}: measured already under {name}; nothing to do (--overwrite measures again)")
            else:
                todo.append(k)
        if todo:
            jobs.append((name, weights, todo))
    return runs, full, jobs


def evaluate(a, d, team, runs, full, jobs):
    for enc, (_, weights, todo) in zip(team.encs, jobs):
        with common.user_errors():
            ref = Reference(d, enc, team, a.reference_max, a.seed, a.reference_stats)
        for run in (runs[k] for k in todo):
            if a.trajectory:
                with common.user_errors():
                    trajectory(run, ref, a)
                continue
            start, (old, same) = time.time(), earlier(run)
            with common.user_errors():
                row = figures(run, ref, a) | {"settings": settings(run, enc.name, weights, a, d, full), "circular": enc.name in run.aligned}
                memo = old.get("memorisation") if same else None
                if a.audit and run.known and enc.name == a.encoder[0]:
                    new = audit(run, ref, a, Selection(full.images, np.arange(min(len(full.images), a.audit_samples))) if full else None)
                    spaces = memo if memo and memo.get("n") == new.get("n") and "skipped" not in memo else {}            # those of an earlier judge stay
                    memo = new if "skipped" in new else {**spaces, **new}
            row["seconds"] = round(time.time() - start, 2)
            common.save_json(run.out / "metrics.json", {
                "run": run.name, "data": d.info["name"], "data_sha256": d.info["sha256"], "samples_sha256": run.sha256,
                "protocol": {**run.protocol, "image_format": run.format}, "encoders": {**(old["encoders"] if same else {}), enc.name: row},
                "memorisation": memo, "provenance": common.provenance()})
            tell(run, row, memo)


def tell(run, row, memo):
    heldout = f"; held-out images {row['fd_heldout']:.3f}, n={row['fd_heldout_n']}" if row["fd_heldout"] is not None else ""
    parts = [f"{row['distance']} {row['fd']:.3f} (n={row['n']:,}{heldout})"]
    if row.get("fd_subset") is not None:
        parts.append(f"the subset itself {row['fd_subset']:.3f}")
    if "per_class" in row:
        c = row["per_class"]
        parts.append(f"worst class {c['worst']}: {c['worst_fd']:.2f} (n={c['n']}, real images {c['real_mean']:.2f})")
    if "precision" in row:
        parts.append(f"precision {row['precision']:.3f}, recall {row['recall']:.3f}, density {row['density']:.3f}, "
                     f"coverage {row['coverage']:.3f} (n={row['neighbours_n']:,})")
    if "kid" in row:
        parts.append(f"KID {row['kid']['mean']:.4f} +- {row['kid']['standard_error']:.4f} (subsets of {row['kid']['subset_size']})")
    if "read_as_labelled" in row:
        parts.append(f"read as labelled {row['read_as_labelled']:.1%}")
    if memo and "pixels" in memo:
        m = memo["pixels"]
        parts.append("nearer to seen than to unseen images {:.2f} (held-out {}, seen + noise {:.2f})".format(
            m["samples"]["share"], f"{m['heldout']['share']:.2f}" if "heldout" in m else "-", m["noise"]["share"]))
    if row["circular"]:
        parts.append("WARNING: this judge also selected or was aligned to")
    common.log(f"{run.name}: " + "; ".join(parts))


def parse_args(argv=None):
    p = common.Parser(__doc__, epilog="Encoders:\n" + encoders.describe())
    p.add_argument("--data", required=True, help="data folder: the reference is its full training set")
    p.add_argument("--runs", nargs="+", metavar="RUN", help="run folders with samples.npy; a run on the full set among them is the audit's baseline")
    p.add_argument("--samples", help="instead of --runs: samples from anywhere, a .npy, .npz or a folder of pictures")
    p.add_argument("--out", help="with --samples: folder to write to")
    p.add_argument("--encoder", nargs="+", default=["scratch"], choices=encoders.ENCODERS, help="the judge, or several; the first does the audit")
    p.add_argument("--encoder-weights", nargs="+", metavar="PATH", help="local weights, in the order of --encoder")
    p.add_argument("--reference-stats", metavar="FILE.npz", help="take mu and sigma from there instead of the data folder (mu/sigma or m2/s2)")
    p.add_argument("--reference-max", type=common.count, default=50_000, help="most training images for neighbours, kernels and classes")
    p.add_argument("--num", type=common.count, help="use the first so many samples")
    p.add_argument("--bootstrap", type=common.number(int, low=0, high=10_000), default=0,
                   help="resamplings for an interval of the distance (it is biased upwards)")
    p.add_argument("--no-audit", dest="audit", action="store_false", help="leave the memorisation audit out")
    p.add_argument("--audit-samples", type=common.count, default=10_000, help="most samples in the audit")
    p.add_argument("--trajectory", action="store_true", help="score every kept checkpoint of the runs instead")
    p.add_argument("--trajectory-num", type=common.count, help="samples per checkpoint; default: as many as the run drew")
    p.add_argument("--batch-size", type=common.batch_type, default=256, help="images at a time, over all processes")
    p.add_argument("--seed", type=common.seed_type, default=0, help="of subsets, draws and resamplings")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--overwrite", action="store_true", help="measure again what has been measured")
    a = p.parse_args(argv)
    if bool(a.runs) == bool(a.samples) or bool(a.samples) != bool(a.out):
        p.error("give either --runs RUN ..., or --samples FILE with --out DIR")
    if a.trajectory and a.samples:
        p.error("--trajectory needs --runs: it draws from their checkpoints")
    if a.trajectory and len(a.encoder) > 1:
        p.error("--trajectory follows a run under one judge; give one --encoder")
    if twice := common.named_twice(a.runs or ()):
        p.error(f"--runs: {twice} is named twice")
    if a.samples and (Path(a.out) / "train.args.json").exists() and Path(a.samples).resolve().parent != Path(a.out).resolve():
        p.error(f"--out {a.out} is a run of train.py, and {a.samples} lies elsewhere: its figures would pass for the run's; choose another folder")
    if len(a.encoder_weights or []) > len(a.encoder):
        p.error("more --encoder-weights than --encoder")
    return a


@common.command
def main(argv=None):
    a = parse_args(argv)
    device = common.get_device(a.device)
    d = common.open_data(a.data, pixels=False)
    pairs = [(a.out, a.samples)] if a.samples else [(r, Path(r) / "samples.npy") for r in a.runs]
    runs, full, jobs = plan(a, d, pairs) if common.rank() == 0 else (None, None, None)
    jobs = common.from_rank0(lambda: jobs)
    encs = [common.open_encoder(name, d, device, weights) for name, weights, _ in jobs]
    if a.reference_stats:
        for enc in encs:
            read_statistics(a.reference_stats, enc.width)
    team, everything = Team(encs, a.batch_size, device), list(vars(a))   # a run may be measured in many ways: metrics.json keeps them apart
    stages = [common.Stage("evaluate", __import__("argparse").Namespace(**{**vars(a), "out": out, "overwrite": True}), {"data": d.info}, free=everything).__enter__()
              for k, (out, _) in enumerate(pairs) if any(k in todo for *_, todo in jobs)]
    if common.rank() == 0:
        evaluate(a, d, team, runs, full, jobs)
        team.dismiss()
    else:
        team.serve()
    for s in stages:
        s.finish()


if __name__ == "__main__":
    main()
