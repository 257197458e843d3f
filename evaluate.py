"""Stage 6: measure samples against the FULL training set, and ask whether they are copies of what the model has seen.

For one run or several in one process (the reference is encoded once). The distance is called FID only on pytorch-fid's Inception features;
on any other encoder it is FD with the encoder's name. Figures depend on n, so n is always printed.

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
import models
from models import encoders, metrics
from models.diffusion import generate, to_uint8

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
        try:
            with np.load(path, allow_pickle=False) as z:
                images = z["arr_0" if "arr_0" in z else "images"]
                labels = z["arr_1"] if "arr_1" in z else z["labels"] if "labels" in z else None
        except Exception as e:                                        # zip and npy faults come in many kinds
            raise common.UserError(f"{path}: not a readable .npz with arr_0 or images ({e})")
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
        raise common.UserError(f"{folder}: no picture in it or below it")
    out = []
    for f in common.progress(files, desc=str(folder)):
        try:
            with Image.open(f) as im:
                out.append(np.asarray(im if im.mode == "L" else im.convert("RGB")))
        except Exception as e:
            raise common.UserError(f"{f}: not a readable picture ({e}); remove or replace it")
        if out[-1].shape != out[0].shape:
            raise common.UserError(f"{f}: shape {out[-1].shape}, but {files[0].name} has {out[0].shape}; bring all samples to one size")
    images = np.stack(out)
    return images if images.ndim == 4 else images[..., None]


# ---------------------------------------------------------------------------------------------- reference
class Reference:
    """The full training set under one encoder: mu and sigma of all of it, and the features of up to `most` images for neighbours and kernels."""

    def __init__(self, d, enc, batch_size, most, seed):
        self.d, self.enc, self.batch_size = d, enc, batch_size
        self.rows = np.sort(np.random.default_rng([seed, 0]).choice(len(d.labels), min(most, len(d.labels)), replace=False))
        bar = common.progress(total=len(self.rows), desc=f"{enc.name}: reference")
        with common.user_errors():
            self.features = encoders.extract(enc, d.images, batch_size, rows=self.rows, bar=bar)          # (R, D)
        bar.close()
        self.labels, cache = d.labels[self.rows], d.folder / f"stats_{enc.name}.npz"
        self.mu, self.sigma, self.n = self._cached(cache)
        self.test = None if d.test_images is None else encoders.extract(enc, d.test_images, batch_size)
        self.heldout = None if self.test is None or len(self.test) < 2 else self.distance(self.test)

    def _cached(self, cache):
        key = f"{self.enc.identity} {self.d.info['sha256']}"
        try:
            with np.load(cache, allow_pickle=False) as z:
                if str(z["key"]) == key:
                    return z["mu"], z["sigma"], int(z["n"])
        except Exception:                                             # absent, damaged or of another kind: it is only a cache
            pass
        mu, sigma = metrics.gaussian_stats(self.features if len(self.rows) == len(self.d.labels) else self)
        with common.atomic(cache) as tmp, open(tmp, "wb") as f:
            np.savez(f, mu=mu, sigma=sigma, n=len(self.d.labels), key=key)
        return mu, sigma, len(self.d.labels)

    # The whole training set as a matrix of features that is encoded as it is read: gaussian_stats goes over it once, block by block.
    shape = property(lambda self: (len(self.d.labels), self.enc.width))

    def __len__(self):
        return len(self.d.labels)

    def __getitem__(self, index):
        return encoders.extract(self.enc, self.d.images, self.batch_size, rows=np.arange(len(self))[index])

    def distance(self, features):
        return metrics.frechet_distance(self.mu, self.sigma, *metrics.gaussian_stats(features))


def read_statistics(path, width=None):
    """(mu, sigma) from an .npz of somebody else: mu/sigma (pytorch-fid, ADM) or m2/s2 (lucidrains). Refused when the width is not the encoder's."""
    if not Path(path).is_file():
        raise common.UserError(f"{path}: no such file (.npz with mu and sigma expected)")
    try:
        with np.load(path, allow_pickle=False) as z:
            mu, sigma = next((z[a], z[b]) for a, b in (("mu", "sigma"), ("m2", "s2")) if a in z and b in z)
    except StopIteration:
        raise common.UserError(f"{path}: holds neither mu and sigma nor m2 and s2")
    except Exception as e:
        raise common.UserError(f"{path}: not a readable .npz ({e})")
    if mu.dtype.kind != "f" or sigma.dtype.kind != "f" or mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise common.UserError(f"{path}: mu {mu.dtype} {mu.shape} and sigma {sigma.dtype} {sigma.shape}, but floats (D,) and (D, D) are expected")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise common.UserError(f"{path}: mu or sigma holds NaN or infinity; make it again")
    if width is not None and len(mu) != width:
        raise common.UserError(f"{path}: statistics of {len(mu)} features, but the encoder's are {width}; take those of the same encoder")
    return mu.astype(np.float64), sigma.astype(np.float64)


# ---------------------------------------------------------------------------------------------- one run under one encoder
def figures(run, ref, a):
    """Everything that is measured of run's samples under one encoder; n is printed with each figure that depends on it."""
    d, enc, n = ref.d, ref.enc, len(run.images)
    bar = common.progress(total=n, desc=f"{enc.name}: {run.name}")
    z = encoders.extract(enc, run.images, a.batch_size, bar=bar)                                          # (n, D)
    bar.close()
    mu, sigma = read_statistics(a.reference_stats, enc.width) if a.reference_stats else (ref.mu, ref.sigma)
    out = {"identity": enc.identity, "distance": "FID" if enc.name == "inception" else f"FD ({enc.name})", "n": n,
           "reference": a.reference_stats or f"{d.info['name']}, the full training set", "reference_n": None if a.reference_stats else ref.n,
           "fd": metrics.frechet_distance(mu, sigma, *metrics.gaussian_stats(z)), "fd_heldout": ref.heldout,
           "fd_heldout_n": None if ref.test is None else len(ref.test)}
    if a.reference_stats and ref.test is not None:                    # the yardsticks stand beside fd, so they need its reference
        out["fd_heldout"] = metrics.frechet_distance(mu, sigma, *metrics.gaussian_stats(ref.test)) if len(ref.test) > 1 else None
    if out["fd_heldout"] is not None and n >= len(ref.test):          # a distance falls as n grows: the samples once more at the held-out images' n
        some = np.sort(np.random.default_rng([a.seed, 3]).choice(n, len(ref.test), replace=False))
        out["fd_at_heldout_n"] = metrics.frechet_distance(mu, sigma, *metrics.gaussian_stats(z, index=some))
    if n <= enc.width:
        common.log(f"note: {n} samples for {enc.width} features: the covariance is singular and the distance far too large; draw more samples")
    if a.bootstrap:
        mean, std, low, high = metrics.bootstrap_frechet(z, mu, sigma, a.bootstrap, a.seed)
        out["fd_bootstrap"] = dict(repeats=a.bootstrap, mean=mean, std=std, low=low, high=high)
    if run.keep is not None:                                          # what a perfect copier of the subset would score
        copies = encoders.extract(enc, d.images, a.batch_size, rows=run.keep)
        out["fd_subset"] = metrics.frechet_distance(mu, sigma, *metrics.gaussian_stats(copies)) if len(run.keep) > 1 else None
    if run.labels is not None and d.num_classes > 1:
        try:
            out["per_class"] = metrics.per_class_frechet(z, run.labels, ref.features, ref.labels, d.num_classes, a.seed,
                                                         *((ref.test, d.test_labels) if ref.test is not None else ()))
        except ValueError as e:
            common.log(f"note: no distance per class: {e}")
        if enc.name == "scratch":
            logits = encoders.extract(enc, run.images, a.batch_size, kind="logits")
            out["read_as_labelled"] = float((logits.argmax(1) == run.labels).mean())
    if enc.name == "inception" and n >= 10:
        logits = encoders.extract(enc, run.images, a.batch_size, kind="logits")[np.random.default_rng(a.seed).permutation(n)]
        out["inception_score"] = dict(zip(("mean", "std"), metrics.inception_score(logits)), splits=10)
    mean, error, size = metrics.kid(z, ref.features, seed=a.seed)
    out["kid"] = dict(mean=mean, standard_error=error, subset_size=size, subsets=100)
    m = min(n, len(ref.features))                                     # equally many of both: these four depend on n
    pick = lambda x: x[np.sort(np.random.default_rng([a.seed, 1]).choice(len(x), m, replace=False))]     # noqa: E731
    real, fake, device = pick(ref.features), pick(z), enc.device
    if m > 5:
        out.update(metrics.precision_recall(real, fake, 3, device), neighbours_n=m, precision_k=3)
        out.update(metrics.density_coverage(real, fake, 5, device), density_k=5)
    return out


def audit(run, ref, a, baseline):
    """The memorisation audit of metrics.memorisation_audit in pixels and under the encoder, and nearest.png."""
    d, keep = ref.d, run.keep if run.keep is not None else np.arange(len(ref.d.labels))
    rest = np.setdiff1d(np.arange(len(d.labels)), keep)
    if len(rest):                                                     # a model of a subset: unseen training images to compare with
        pool, pool_labels, heldout = d.images[rest], d.labels[rest], d.test_images
    elif d.test_images is not None:                                   # a model of the full set: the held-out split
        pool, pool_labels, heldout = d.test_images, d.test_labels, None
    else:
        return {"skipped": "a model of the full set, and the data folder has no held-out images to compare with"}
    thin = np.sort(np.random.default_rng([a.seed, 2]).choice(len(run.images), min(len(run.images), a.audit_samples), replace=False))
    spaces = {ref.enc.name: lambda x: encoders.extract(ref.enc, x, a.batch_size),                   # "pixels" is always the raw ones, not the encoder
              "pixels": lambda x: (np.asarray(x).reshape(len(x), -1) / 127.5 - 1).astype(np.float32)}
    out = {"n": len(thin), "draws": 20, "noise": 0.2, "model_of": "a subset" if len(rest) else "the full set"}
    for space, encode in spaces.items():
        try:
            out[space] = metrics.memorisation_audit(encode, run.images[thin], d.images[keep], d.labels[keep], pool, pool_labels, heldout,
                                                    baseline if len(rest) else None, seed=a.seed, device=ref.enc.device)
        except ValueError as e:
            return {"skipped": str(e)}
    x, train = spaces["pixels"](run.images[thin]), spaces["pixels"](d.images[keep])
    dist, index = metrics.knn(x, train, min(51, len(train)), device=ref.enc.device)
    worst = np.argsort(dist[:, 0] / dist[:, 1:].mean(1).clip(1e-9), kind="stable")[:16]
    pairs = np.stack([run.images[thin[worst]], d.images[keep][index[worst, 0]]])                        # (2, 16, H, W, C)
    common.save_grid(run.out / "nearest.png", pairs)
    return out


# ---------------------------------------------------------------------------------------------- quality over training
def trajectory(run, ref, a, device):
    """Distance of every kept checkpoint of a run, each with the labels, seeds and settings with which sample.py drew the run's samples.

    The last point therefore equals the run's own distance (to the last bit of the network's sums) when n is the same.
    """
    record = common.load_json(run.out / "sample.args.json", "the record of sample.py, whose settings the trajectory uses,")["args"]
    files = sorted(run.out.glob("step_*.pt"), key=lambda f: int(f.stem.removeprefix("step_")))
    last = common.load_pt(run.out / "last.pt")["step"] if (run.out / "last.pt").exists() else 0
    files += [run.out / "last.pt"] if last > int(files[-1].stem.removeprefix("step_")) else []        # --steps is no multiple of --checkpoint-every
    y = run.drawn[:a.trajectory_num]
    key = {"settings": {k: record[k] for k in DRAWN_WITH}, "labels": array_hash(y), "n": len(y), "data": ref.d.info["sha256"],
           "identity": ref.enc.identity, "checkpoints": {f.name: common.sha256(f) for f in files}}
    path, rows, n = run.out / "trajectory.json", [], len(y)
    if path.exists() and not a.overwrite and common.load_json(path, "points of evaluate.py").get("key") == key:
        return common.log(f"{path}: complete; nothing to do (--overwrite draws again)")
    for file in files:
        state = common.load_pt(file)
        model, process = models.from_checkpoint(state)
        model, images = model.to(device), []
        options = {"ancestral": {"variance": record["variance"]}, "ddim": {"eta": record["eta"]}}.get(record["sampler"], {})
        for lo in range(0, n, a.batch_size):
            ids = range(lo, min(lo + a.batch_size, n))
            with common.autocast(device, record["amp"]):
                noise = [common.generator(record["seed"], "sample", i) for i in ids]
                x = generate(model, process, torch.from_numpy(y[ids.start:ids.stop]).to(device), noise, record["sampler"], record["steps"],
                             record["cfg"], record["cfg_interval"], **options)
            if not x.isfinite().all():
                raise common.UserError(f"{file}: samples hold NaN or infinity; the run had diverged there, remove the file to leave it out")
            images.append(to_uint8(x).cpu().numpy())
        fd = ref.distance(encoders.extract(ref.enc, np.concatenate(images), a.batch_size))
        rows.append(dict(step=state["step"], images_seen=state["images_seen"], seconds=state["seconds"], fd=fd, n=n))
        common.log(f"{run.name}: step {state['step']:,}, {rows[-1]['images_seen']:,} images, {rows[-1]['seconds']:,.0f} s: {fd:.3f}")
    common.save_json(path, {"encoder": ref.enc.identity, "name": ref.enc.name, "points": rows, "key": key})


# ---------------------------------------------------------------------------------------------- the runs
def judges_used(folder, aligned=True):
    """Names of the encoders that chose the kept set of `folder` (of prune.py or attach.py), or that a run is aligned to: no fair judges of it.

    aligned: the run trained with the folder's attachments, not only on its kept set. Files of scores or features that another call made are followed.
    """
    used = set()
    if (folder / "attach.args.json").exists():
        made = common.load_json(folder / "attach.args.json", "the record of attach.py")["args"]
        if aligned:
            used |= {made.get("visual")} - {None, "none"}
        if made.get("select") in ("interval", "easy", "medium", "hard"):
            used |= scorers(made, "difficulty", folder) if made.get("difficulty") else {"ddae"} if made.get("reference") else set()
        if made.get("indices"):
            used |= judges_used(Path(made["indices"]).parent, False)
    if (folder / "prune.args.json").exists():
        made = common.load_json(folder / "prune.args.json", "the record of prune.py")["args"]
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
        return {common.load_json(prune, "the record of prune.py")["args"]["surrogate"]} if prune.exists() else set()
    if attach.exists() and Path(made[flag]).name == "difficulty.npy":            # scored whatever that call selected by
        origin = common.load_json(attach, "the record of attach.py")["args"]
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
    for name in a.encoder:
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
        record = common.load_json(run.out / "sample.args.json", "the record of sample.py")
        if record["seconds"] is None:
            raise common.UserError(f"{out}: sample.py has not finished there; run its command again")
        if record.get("data_sha256") not in (None, d.info["sha256"]):
            raise common.UserError(f"{out}: was trained on {record.get('data')}, but --data {a.data} is {d.info['name']}; "
                                   "evaluate on its own data set")
        run.protocol = {k: record["args"][k] for k in DRAWN_WITH} | {
            "checkpoint_step": record.get("step"), "weights": "EMA", "sample_seconds": record["seconds"]}
    if (run.out / "train.args.json").exists():
        record = common.load_json(run.out / "train.args.json", "the record of train.py")
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
    old = common.load_json(file, "figures of evaluate.py") if file.exists() else {}
    return old, old.get("samples_sha256") == run.sha256 and old.get("data_sha256") == run.data_sha256


def plan(a, d, runs, full, device):
    """[(encoder, its weights, runs that it has to judge)], the encoders open and every input checked: from here on nothing is the user's fault."""
    out = []
    for name, weights in zip(a.encoder, (a.encoder_weights or []) + [None] * len(a.encoder)):
        todo = []
        for run in runs:
            old, same = earlier(run)
            row = old.get("encoders", {}).get(name) if same and not a.overwrite else None
            if row and not a.trajectory and row.get("settings") == settings(run, name, weights, a, d, full):
                common.log(f"{run.out}: measured already under {name}; nothing to do (--overwrite measures again)")
            else:
                todo.append(run)
        if todo:
            enc = common.open_encoder(name, d, device, weights)
            if a.reference_stats:
                read_statistics(a.reference_stats, enc.width)
            out.append((enc, weights, todo))
    return out


def evaluate(a, d, judges, full, device):
    for enc, weights, runs in judges:
        with common.user_errors():
            ref = Reference(d, enc, a.batch_size, a.reference_max, a.seed)
        for run in runs:
            if a.trajectory:
                with common.user_errors():
                    trajectory(run, ref, a, device)
                continue
            start, (old, same) = time.time(), earlier(run)
            with common.user_errors():
                row = figures(run, ref, a) | {"settings": settings(run, enc.name, weights, a, d, full), "circular": enc.name in run.aligned}
                memo = old.get("memorisation") if same else None
                if a.audit and run.known and enc.name == a.encoder[0]:
                    new = audit(run, ref, a, full.images[:a.audit_samples] if full else None)
                    memo = new if "skipped" in new else {**(memo or {}), **new}          # the spaces of an earlier judge stay
                    memo = memo if "skipped" in new else {k: v for k, v in memo.items() if k != "skipped"}
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
    p.add_argument("--batch-size", type=common.count, default=256, help="images at a time")
    p.add_argument("--seed", type=common.seed_type, default=0, help="of subsets, draws and resamplings")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--overwrite", action="store_true", help="measure again what has been measured")
    a = p.parse_args(argv)
    if bool(a.runs) == bool(a.samples) or bool(a.samples) != bool(a.out):
        p.error("give either --runs RUN ..., or --samples FILE with --out DIR")
    if a.trajectory and a.samples:
        p.error("--trajectory needs --runs: it draws from their checkpoints")
    if len(a.encoder_weights or []) > len(a.encoder):
        p.error("more --encoder-weights than --encoder")
    return a


@common.command
def main(argv=None):
    common.single_process("evaluate.py")
    a = parse_args(argv)
    device = common.get_device(a.device)
    d = common.open_data(a.data)
    pairs = [(a.out, a.samples)] if a.samples else [(r, Path(r) / "samples.npy") for r in a.runs]
    for out, samples in pairs:
        if not Path(samples).exists():
            raise common.UserError(f"{samples}: no samples there; draw them with sample.py --out {out}")
    if a.reference_stats:
        read_statistics(a.reference_stats)
    runs = [open_run(out, samples, d, a) for out, samples in pairs]
    full = next((r for r in runs if r.known and r.keep is None), None)
    judges = plan(a, d, runs, full, device)
    everything = [k for k in vars(a)]                                 # a run may be measured in many ways: metrics.json keeps them apart
    stages = [common.Stage("evaluate", r.out, a, {"data": d.info}, free=everything, overwrite=True)
              for r in runs if any(r is other for _, _, todo in judges for other in todo)]
    evaluate(a, d, judges, full, device)
    for s in stages:
        s.finish()


if __name__ == "__main__":
    main()
