"""Stage 2: class weights by distributionally robust optimisation (DRO) over a frozen reference diffusion model.

Class-wise DoReMi (Xie et al. 2023, arXiv 2305.10429, Algorithm 1) with domain := class, as "Pruning then Reweighting" (Li et al. 2024, arXiv
2409.19128) names it. A proxy is trained while adversarial class weights a grow on the classes where it lags the reference; the weights are a's mean over
the steps. Excess loss cancels difficulty that no model can remove: a class with added noise is not favoured, a class that the proxy learns late is.

Reads   DATA/                a data folder of data.py (images.npy or latents.npy, labels.npy);  --indices keep.npy int64 (M,)
        --reference CKPT     last.pt or step_*.pt of train.py on the same data set: its EMA, frozen; flags left out take its values. Or official
                             weights with --official dit|sit, their classes in the order of the folder; flags left out take the published recipe
Writes  OUT/weights.npy      float32 (K,), w_i = abar_i / (M_i / M), mean 1 over the M kept images: train.py --weights
        OUT/abar.npy         float64 (K,), mean of a over the steps after the burn-in
        OUT/history.npy      float32 (steps, K), a after every step
        OUT/excess.npy       float32 (steps, 2, B): excess[s, 0] the per-example l_proxy - l_reference of step s, excess[s, 1] their labels
        OUT/weights.png, OUT/reweight.args.json;  OUT/proxy.pt, the proxy (loadable as a checkpoint) and the state of an interrupted run

    python reweight.py --data data/digits --reference runs/digits/full/last.pt --eta 0.05 --steps 400 --batch-size 64 --out runs/digits/weighted/reweight
To resume, run the same command again (with the same --steps: the burn-in and the mean depend on them). `--burn-in 0` is DoReMi as published; with a
fresh proxy its weights mostly echo the first steps, when the excess is a constant minus the reference's loss: the class hardest for it gets the least.
The null: the same recursion over the recorded excess losses with labels permuted. Its band holds all its classes and permutations; weights that mean
nothing leave it, in any class, with probability 2 / (permutations + 1) at most: 10 % for 20.
"""
import math
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn

import common
from models.build import MODELS, build
from models.diffusion import diffusion_loss, sample_latents, to_pixels

OUTPUTS = ("weights.npy", "abar.npy", "history.npy", "excess.npy", "weights.png", "proxy.pt")
FROM_REFERENCE = dict(steps=int, batch_size=int, lr=(int, float), amp=str, warmup=int, schedule=str, grad_clip=(int, float), flips=bool)
SETTINGS = ("process", "predict", "size", "channels", "num_classes", "class_std", "text_shape", "learn_sigma", "recompute", "latents", "latent_scale", "vae",
            "classes", "data", "data_sha256")
PUBLISHED = dict(batch_size=256, lr=1e-4, amp="none", warmup=0, schedule="constant", grad_clip=0.0, flips=False)      # of DiT and SiT
MAX_BAD_STEPS = 20                                                    # non-finite steps in a row before the run stops
MAX_EXCESS = 100.0                                                    # mean excess loss that only a diverged proxy has


# ---------------------------------------------------------------------------------------------- the formulas
def class_excess(excess, y, K, last, clip="class"):
    """lambda_i = max(mean excess loss of class i, 0) (Xie 2023, Algorithm 1); clip='example' clips inside the mean, as DoReMi does per token.

    excess (..., B) or (B,), y (..., B) int64, last (..., K). A class absent from the batch keeps last_i; a non-finite value counts as absent.
    The bias of clip='example': where proxy and reference are equally good, E max(noise, 0) > 0. Returns (..., K) float64.
    """
    excess = excess.double().expand(y.shape)
    ok = excess.isfinite()
    kept = torch.where(ok, excess.clamp(min=0) if clip == "example" else excess, 0)
    sums = torch.zeros_like(last).scatter_add_(-1, y, kept)
    counts = torch.zeros_like(last).scatter_add_(-1, y, ok.double())
    return torch.where(counts > 0, (sums / counts.clamp(min=1)).clamp(min=0), last)


def dro_update(log_a, lam, eta, c):
    """a <- a exp(eta lambda), normalised, then (1 - c) a + c / K (Xie 2023, Algorithm 1), in log space: eta lambda may be far beyond exp's range.

    log_a, lam (..., K) float64. Returns log a (..., K).
    """
    log_a = torch.log_softmax(log_a + eta * lam, -1)
    return torch.logaddexp(log_a + math.log1p(-c), torch.full_like(log_a, c / log_a.shape[-1]).log())


def dro_path(excess, labels, K, eta, c, clip="class", burn_in=0):
    """Yields a (..., K) after every step of recorded excess losses: excess (steps, B); labels an iterable of (..., B) int64, one a step."""
    log_a, lam = torch.tensor(-math.log(K), dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    for step, (e, y) in enumerate(zip(excess, labels)):
        log_a, lam = log_a.expand(*y.shape[:-1], K), lam.expand(*y.shape[:-1], K)
        lam = class_excess(e, y, K, lam, clip)
        if step >= burn_in:
            log_a = dro_update(log_a, lam, eta, c)
        yield log_a.exp()


def permuted_null(excess, labels, K, eta, c, clip="class", burn_in=0, permutations=20, generator=None):
    """abar (permutations, K) of the same record with labels permuted: what the weights come to when the class means nothing. No training.

    excess, labels (steps, B). Labels are permuted within each step, so that every step keeps its class counts, its times and its stage of training.
    That the proxy would have been trained with another a is left out.
    """
    shuffled = (y[torch.rand(permutations, len(y), generator=generator).argsort(-1)] for y in labels)      # (P, B) a step
    return sum(a for step, a in enumerate(dro_path(excess, shuffled, K, eta, c, clip, burn_in)) if step >= burn_in) / (len(excess) - burn_in)


def class_weights(abar, counts):
    """w_i = abar_i / (M_i / M): K abar_i for balanced classes, mean 1 over the images. abar (..., K), counts (K,) images a class."""
    return abar / (counts / counts.sum())


# ---------------------------------------------------------------------------------------------- inputs
def load_inputs(a):
    """Everything that the flags name, checked before anything is written; fills the flags left out. Returns a namespace."""
    d, (state, reference, process) = common.open_data(a.data, pixels=False), common.open_checkpoint(a.reference, a.official)
    ref, source = state["args"], d.images if d.latents is None else d.latents
    channels, size = (source.shape[3], source.shape[1]) if d.latents is None else (source.shape[1] // 2, source.shape[2])
    mine = dict(num_classes=d.num_classes, channels=channels, size=size, latents=d.latents is not None, data_sha256=d.info["sha256"])
    if d.latents is not None:
        mine["latent_scale"] = common.load_json(d.folder / "latents.json", "the description of the latents")["scale"]
    if a.official:                                                    # published weights name no data set
        ref = {**PUBLISHED, **ref, "classes": d.classes, "data": d.info["name"], "data_sha256": d.info["sha256"]}
        if a.steps is None:
            raise common.UserError(f"--official {a.official}: the weights do not say for how many steps they were trained; give --steps")
    if (wrong := next((k for k in mine if mine[k] != ref.get(k)), None)):
        raise common.UserError(f"{a.reference}: made with {wrong} = {ref.get(wrong)} (data set {ref.get('data')}), but {a.data} has {mine[wrong]} "
                               f"({d.info['name']}); train a reference on this data set")
    if d.num_classes < 2:
        raise common.UserError(f"{a.data}: one class only, there is nothing to weigh; train without --weights")
    keep = common.load_indices(a.indices, len(d.labels)) if a.indices else np.arange(len(d.labels))
    if a.indices:
        common.check_origin(a.indices, d)
    counts = np.bincount(d.labels[keep], minlength=d.num_classes)
    if counts.min() == 0:
        raise common.UserError(f"{a.indices or a.data}: class {np.argmin(counts)} keeps no image; keep at least one of each class")
    if missing := {k for k in FROM_REFERENCE if getattr(a, k, None) is None} - ref.keys():
        raise common.UserError(f"{a.reference}: does not say with which {min(missing)} it was trained; use a checkpoint that train.py wrote")
    common.check_kinds(a.reference, "what it was trained with", ref, **{k: v for k, v in FROM_REFERENCE.items() if k in ref})
    for k, known in (("amp", common.AMP), ("schedule", ("constant", "cosine"))):
        if ref.get(k) not in (None, *known):
            raise common.UserError(f"{a.reference}: was trained with {k} = {ref[k]!r}, which is none of {', '.join(known)}; use a checkpoint that train.py wrote")
    for k in FROM_REFERENCE:
        setattr(a, k, ref[k] if getattr(a, k, None) is None else getattr(a, k))
    a.burn_in, a.proxy_model = max(200, a.steps // 10) if a.burn_in is None else a.burn_in, a.proxy_model or ref["model"]
    if a.burn_in >= a.steps:
        raise common.UserError(f"--burn-in {a.burn_in}: none of the {a.steps} steps is left to average over; give fewer, or more --steps")
    if a.batch_size % common.world():
        raise common.UserError(f"--batch-size {a.batch_size} is the global batch: it must be a multiple of the {common.world()} processes")
    settings = {**{k: ref[k] for k in (*SETTINGS, *["depth"] * (a.proxy_model == ref["model"])) if k in ref}, "model": a.proxy_model, "dropout": 0.0}
    text = next((v[:-1] for k, v in state["ema"].items() if k.endswith("y_embedder.text")), None)          # the last row is the null class
    with torch.random.fork_rng(devices=[]), common.user_errors():
        torch.manual_seed(common.generator(a.seed, "proxy").initial_seed())       # not the initial weights of a reference with the same --seed
        proxy = build(settings, text)
    if a.proxy_init:
        init, net, _ = common.open_checkpoint(a.proxy_init)
        for k in ("process", "predict", "latent_scale"):
            if (was := init["args"].get(k, settings.get(k))) != settings.get(k):
                raise common.UserError(f"{a.proxy_init}: was trained with {k} = {was}, the reference with {settings.get(k)}; its weights would mean something else")
        try:
            proxy.load_state_dict(net.state_dict())
        except (ValueError, RuntimeError) as e:
            raise common.UserError(f"{a.proxy_init}: does not fit the proxy, {a.proxy_model} on {a.data} ({str(e)[:120]}); see --proxy-model")
    return SimpleNamespace(data=d, source=source, keep=keep, counts=counts, reference=reference, process=process, proxy=proxy, settings=settings)


def uniform_rows(step, batch, seed, by_class, counts):
    """(batch,) rows, a function of (seed, step): class uniform over all K, then uniform within it. by_class: rows sorted by class."""
    g = common.generator(seed, "order", step)
    k = torch.randint(len(counts), (batch,), generator=g)
    return by_class[counts.cumsum(0)[k] - counts[k] + (torch.rand(batch, generator=g, dtype=torch.float64) * counts[k]).long()]


# ---------------------------------------------------------------------------------------------- the loop
def train_proxy(a, i, stage, device):
    """Trains the proxy and records the excess losses. Returns (record (steps, 2, B) on rank 0, seconds, steps skipped as not finite)."""
    s, K, B, main = i.settings, i.data.num_classes, a.batch_size, common.rank() == 0
    reference, proxy = (m.to(device, memory_format=torch.channels_last) for m in (i.reference, i.proxy.train()))
    optimizer, scaler = common.optimizer_of(proxy, a.lr, device, a.amp)
    lam, start, seconds, bad, skipped = torch.zeros(K, dtype=torch.float64, device=device), 0, 0.0, 0, 0
    log_a = lam - math.log(K)
    part = stage.out / "excess.part.npy"
    resuming = stage.resuming and part.exists() and (stage.out / "proxy.pt").exists()
    if resuming:
        state = common.load_pt(stage.out / "proxy.pt")
        start, seconds, skipped, log_a, lam = state["step"], state["seconds"], state.get("skipped", 0), state["log_a"].to(device), state["lam"].to(device)
        proxy.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"]), scaler.load_state_dict(state["scaler"])
        common.log(f"resuming at step {start:,}")
    common.barrier()                                                  # all have looked before rank 0 makes the file
    if main and not resuming:
        common.allocate(part, np.float32, (a.steps, 2, B))
    record = np.lib.format.open_memmap(part, "r+") if main else None  # rows past the saved state are written again
    wrapped = nn.parallel.DistributedDataParallel(proxy, broadcast_buffers=False) if common.world() > 1 else proxy
    labels, counts = torch.from_numpy(i.data.labels[i.keep]), torch.from_numpy(i.counts)
    by_class, (lo, hi), shape, stop = labels.argsort(stable=True), common.shard(B), (B, s["channels"], s["size"], s["size"]), []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))       # finish the step, or the next, save, exit 143
    n_params = sum(p.numel() for p in proxy.parameters())
    common.log(f"proxy {a.proxy_model} {n_params / 1e6:.2f} M parameters, {i.process.name}, {len(i.keep):,} images of {K} classes, {a.steps:,} steps of {B}, "
               f"lr {a.lr:g} ({a.schedule}, warm-up {a.warmup}), eta {a.eta:g}, burn-in {a.burn_in}, {device}, amp {a.amp}, "
               f"about {(n_params * 12 + a.steps * B * 8) / 2**20 + 1:,.0f} MB in {stage.out}")
    bar, clock, spent = common.progress(total=a.steps, initial=start, desc=str(stage.out)), time.time(), seconds
    for step in range(start, a.steps):
        rows = uniform_rows(step, B, a.seed, by_class, counts)
        g = common.generator(a.seed, "reweight", step, device=device)
        u, eps, flip = torch.rand(B, generator=g, device=device), torch.randn(shape, generator=g, device=device), torch.rand(B, generator=g, device=device)
        noise = torch.randn(shape, generator=g, device=device)[lo:hi] if s["latents"] else None
        y_all = labels[rows].to(device)
        at = i.keep[rows[lo:hi].numpy()]
        x = common.sound_rows(torch.from_numpy(i.source[at]), at, i.data.folder / "latents.npy").to(device)
        x = sample_latents(x, s["latent_scale"], noise) if s["latents"] else to_pixels(x)
        x = torch.where((flip < 0.5)[lo:hi].view(-1, 1, 1, 1), x.flip(-1), x) if a.flips else x
        x = x.contiguous(memory_format=torch.channels_last)
        u, eps, y = u[lo:hi], eps[lo:hi], y_all[lo:hi]                # ONE (t, eps) per example, the same for both networks
        with common.autocast(device, a.amp):
            with torch.no_grad():
                l_ref = diffusion_loss(i.process, reference, x, u, eps, y)                      # (n,)
            loss = diffusion_loss(i.process, wrapped, x, u, eps, y)                             # (n,)
        shared = torch.zeros(B + 1, device=device)                    # every rank sees the whole batch and holds the same a; last: told to stop
        shared[lo:hi], shared[B] = loss.detach() - l_ref, len(stop)
        excess, leave = common.all_reduce(shared)[:B], bool(shared[B])
        lam = class_excess(excess, y_all, K, lam, a.clip)
        if step >= a.burn_in:
            log_a = dro_update(log_a, lam, a.eta, a.smoothing)
        a_y = log_a.exp()[y_all].float()
        # sum_j a_{y_j} l_j / sum_j a_{y_j} over the whole batch; DDP takes the mean over ranks, hence the number of them
        scaler.scale(common.world() * (a_y[lo:hi] * loss).sum() / a_y.sum()).backward()
        optimizer.param_groups[0]["lr"] = common.lr_at(step, a.lr, a.warmup, a.schedule, a.steps)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(proxy.parameters(), a.grad_clip or math.inf)
        scaler.step(optimizer)                                        # leaves out a non-finite step
        scaler.update(None if a.amp == "fp16" else 1.0)
        optimizer.zero_grad(set_to_none=True)
        bad, skipped = (0, skipped) if norm.isfinite() else (bad + 1, skipped + 1)
        if main:
            record[step] = torch.stack([excess, y_all.float()]).cpu().numpy()
        done, spent = step + 1, seconds + time.time() - clock
        if bad >= MAX_BAD_STEPS or done == a.steps and bad > 2:       # one or two are fp16 finding its scale
            raise common.UserError(f"{stage.out}: {bad} steps in a row had a non-finite loss or gradient, up to {done}; lower --lr, or use --amp bf16 or none")
        bar.update()
        if done % a.log_every == 0 and excess.nanmean() > MAX_EXCESS or done == a.steps and not excess.nanmean() <= MAX_EXCESS:
            raise common.UserError(f"{stage.out}: the proxy's loss is {excess.nanmean().item():.3g} above the reference's at step {done}: it has diverged; lower --lr")
        if done % a.log_every == 0:
            bar.set_postfix(excess=f"{excess.nanmean().item():.4f}", a_max=f"{log_a.max().exp().item():.3f}", refresh=False)
        if done == start + 20:
            common.log(f"{20 * B / (spent - seconds):,.0f} images/s, about {(spent - seconds) / 20 * (a.steps - done) / 60:,.1f} minutes to go")
        if main and (done % a.checkpoint_every == 0 or done == a.steps or leave):
            record.flush()                                            # the record first: rows past the state are written again, rows missing are not
            weights = proxy.state_dict()                              # there is no moving average: both names hold the same tensors
            common.save_pt(stage.out / "proxy.pt", {
                "model": weights, "ema": weights, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "log_a": log_a.cpu(), "lam": lam.cpu(),
                "step": done, "images_seen": done * B, "seconds": spent, "skipped": skipped,
                "args": {**{k: v for k, v in vars(a).items() if k not in ("device", "overwrite")}, "label_drop": 0.0, **s}})
        if leave:
            common.log(f"stopped by SIGTERM at step {done}; run the same command again to go on")
            sys.stdout.flush()
            sys.exit(143)
    bar.close()
    return record, spent, skipped


def weigh(a, i, record, out):
    """Writes the weights, prints them beside their null. Returns what is worth recording."""
    K, names, counts = i.data.num_classes, i.data.classes, torch.from_numpy(i.counts).double()
    excess, labels = torch.from_numpy(np.array(record[:, 0])), torch.from_numpy(np.array(record[:, 1])).long()     # (steps, B) each
    rule = dict(K=K, eta=a.eta, c=a.smoothing, clip=a.clip, burn_in=a.burn_in)
    history = torch.stack(list(dro_path(excess, labels, **rule)))                             # (steps, K) float64: the a of the loop, step by step
    abar = history[a.burn_in:].mean(0)
    null = permuted_null(excess, labels, **rule, permutations=a.permutations, generator=common.generator(a.seed, "null"))          # (P, K)
    w, low, high = (class_weights(v, counts) for v in (abar, null.min(), null.max()))         # every class is drawn alike: one band for abar
    after, y = excess[a.burn_in:].flatten().double(), labels[a.burn_in:].flatten()
    mean = torch.stack([after[y == k].nanmean() for k in range(K)]).nan_to_num()
    for name, v in dict(abar=abar, history=history.float(), weights=w.float(), excess=record).items():
        common.save_npy(out / f"{name}.npy", v)
    picture(out / "weights.png", names, history.numpy(), *(v.numpy() for v in (w, low, high, mean)), a.burn_in)
    order = w.argsort(descending=True).tolist()
    common.log(f"{'class':<24}{'weight':>8}{'null':>18}{'mean excess':>13}{'   (the ten heaviest and the ten lightest)' * (K > 20)}")
    for k in range(K) if K <= 20 else order[:10] + order[-10:]:
        common.log(f"{names[k][:23]:<24}{w[k]:>8.3f}{f'{low[k]:.3f} .. {high[k]:.3f}':>18}{mean[k]:>13.5f}")
    outside = [f"{names[k]} ({w[k]:.3f})" for k in order if not low[k] - 1e-9 <= w[k] <= high[k] + 1e-9]
    common.log(f"classes whose weight lies outside the null's band: {', '.join(outside) or 'none: the weights are not distinguishable from noise'}")
    facts = {"entropy_uniform": math.log(K), "weights": w.tolist(), "mean_excess": mean.tolist(), "outside_null": outside, "null_low": low.tolist(),
             "null_high": high.tolist(), "null_spread": (K * null).std().item(), "spread": (K * abar).std().item()}
    for name, v in (("a", history[-1]), ("abar", abar)):
        facts[f"entropy_{name}"] = torch.special.entr(v).sum().item()                         # nats
        if v.max() > 0.5:
            common.log(f"warning: class {names[v.argmax()]} holds {v.max():.0%} of {name}: the others hardly count; lower --eta or raise --smoothing")
    return facts


def picture(path, names, history, w, low, high, mean, burn_in):
    """weights.png: trajectories of a, weights with the null's band, mean excess per class."""
    from matplotlib.figure import Figure
    fig, K = Figure(figsize=(14, 4), layout="constrained"), len(names)
    left, middle, right = fig.subplots(1, 3)
    steps = np.arange(0, len(history), max(1, len(history) // 1000))
    lines = left.plot(steps + 1, history[steps], lw=1)
    left.axvspan(0, burn_in, color="0.9", lw=0)
    left.set(xlabel="step", title=f"class weights a (shaded: burn-in, {burn_in} steps)")
    middle.bar(range(K), w)
    middle.bar(range(K), high - low, bottom=low, color="C1", alpha=0.5, label="null: permuted labels")
    middle.legend(fontsize=8)
    right.bar(range(K), mean, color="C2")
    for ax, title in ((middle, "weights, mean 1 over the images"), (right, "mean excess loss after the burn-in")):
        ax.set(title=title, xlabel="class")
        if K <= 20:
            left.legend(lines, names, fontsize=7)
            ax.set_xticks(range(K), names, rotation=90, fontsize=8)
    with common.atomic(path) as tmp:
        fig.savefig(tmp, dpi=100)


def parse_args(argv=None):
    p = common.Parser(__doc__)
    p.add_argument("--data", required=True, help="data folder made by data.py")
    p.add_argument("--indices", help="keep.npy: weigh the classes of these images only")
    p.add_argument("--reference", required=True, help="checkpoint of train.py on this data set, or official weights")
    p.add_argument("--official", choices=("dit", "sit"), help="--reference holds official weights of this kind")
    p.add_argument("--out", required=True, help="folder to write to")
    p.add_argument("--steps", type=common.count, help="steps of the proxy; default: the reference's")
    p.add_argument("--batch-size", type=common.batch_type, help="global batch, classes drawn uniformly; default: the reference's")
    p.add_argument("--lr", type=common.number(above=0, high=1e6), help="learning rate of AdamW; default: the reference's, with its warm-up and schedule")
    p.add_argument("--eta", type=common.number(low=0, high=1e6), default=1.0, help="step size of a; 1 is DoReMi's, tiny data sets need less (digits 0.05)")
    p.add_argument("--smoothing", type=common.number(low=0, high=0.99), default=1e-3, help="c: share of the uniform distribution mixed into a at every step")
    p.add_argument("--burn-in", type=common.number(int, low=0), help="first steps with uniform a, not averaged; default max(200, 10 %% of the steps)")
    p.add_argument("--clip", choices=("class", "example"), default="class", help="clip at 0 after the class mean, or inside it (biased upwards)")
    p.add_argument("--proxy-model", choices=MODELS, help="network of the proxy; default: the reference's")
    p.add_argument("--proxy-init", help="checkpoint to start the proxy from (its EMA); default: from scratch")
    p.add_argument("--amp", choices=common.AMP, help="precision of both networks; default: the reference's")
    p.add_argument("--permutations", type=common.number(int, low=1, high=10_000), default=20, help="permutations of the labels for the null")
    p.add_argument("--checkpoint-every", type=common.count, default=200, help="steps between saves of the state")
    p.add_argument("--log-every", type=common.count, default=50, help="steps between updates of the progress line's figures")
    p.add_argument("--seed", type=common.seed_type, default=0, help="seed of everything random")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--overwrite", action="store_true", help="start again in a folder that holds another run")
    return p.parse_args(argv)


@common.command
def main(argv=None):
    a = parse_args(argv)
    device = common.get_device(a.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    i = load_inputs(a)
    inputs = {"data": i.data.info, "indices": a.indices, "reference": a.reference, "proxy_init": a.proxy_init}
    stage = common.Stage("reweight", a, inputs, OUTPUTS, ("checkpoint_every", "log_every"), stale=OUTPUTS,
                         scraps=("excess.part.npy",)).__enter__()
    if stage.done:
        return
    if a.eta >= 10:
        common.log(f"warning: --eta {a.eta:g} lets single batches decide the weights; 1 is the published value")
    record, seconds, skipped = train_proxy(a, i, stage, device)
    common.log(f"proxy {seconds:,.1f} s, {a.steps * a.batch_size:,} images seen, {skipped} steps skipped")
    facts = weigh(a, i, record, stage.out) if common.rank() == 0 else {}
    stage.finish(proxy_seconds=round(seconds, 3), images_seen=a.steps * a.batch_size, skipped=skipped, **facts)


if __name__ == "__main__":
    main()
