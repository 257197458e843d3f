"""Stage 2: class weights by distributionally robust optimisation (DRO) over a frozen reference.

Class-wise DoReMi (Xie et al. 2023, arXiv 2305.10429, Algorithm 1) with domain := class, as "Pruning
then Reweighting" (Li et al. 2024, arXiv 2409.19128) names it. A proxy is trained while adversarial
class weights a grow on the classes where it lags the reference; the weights are a's mean over the
steps. Excess loss cancels difficulty that no model can remove: a class with added noise is not
favoured, a class that the proxy learns late is.

Reads   DATA/             a data folder of data.py;  --indices keep.npy int64 (M,)
        --reference CKPT  a checkpoint of train.py on the same data set, whose values the flags left
                          out take; or official weights (--official) and the published recipe
Writes  OUT/weights.npy   float32 (K,), w_i = abar_i / (M_i / M), mean 1 over the M kept images
        OUT/abar.npy      float64 (K,), mean of a over the steps after the burn-in
        OUT/history.npy   float32 (steps, K), a after every step
        OUT/weights_permuted.npy  float32 (K,), the same abar, each dealt to another class: a
                          control for train.py --weights, equally spread and without meaning
        OUT/excess.npy    float32 (steps, 2, B), per example l_proxy - l_reference, and the labels
        OUT/excess_rows.npy  int64 (steps, B), which image of DATA each of these is
        OUT/proxy.pt      the proxy, a checkpoint like others; the state of an interrupted run
        OUT/weights.png, OUT/reweight.args.json

    python reweight.py --data data/digits --reference runs/digits/full/last.pt --eta 0.05 \\
        --steps 400 --batch-size 64 --out runs/digits/weighted/reweight

To resume, run the same command again, with the same --steps: burn-in and mean depend on them.
`--burn-in 0 --clip example` is DoReMi as its paper has it (c = 1e-3, which is the default; its code
has `--smoothing 1e-4`). Its clip is per token; an image is one example. A fresh proxy then gives
least to the class hardest for the reference: its first excess is a constant minus the reference's.
The null: the same recursion, over the recorded excess losses, with images exchanged between classes
once for the whole record. Weights that mean nothing leave its band, in any class, in 5 % of cases.
"""
import math
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import common

OUTPUTS = ("weights.npy", "weights_permuted.npy", "abar.npy", "history.npy", "excess.npy",
           "excess_rows.npy", "weights.png", "proxy.pt")
FREE = ("checkpoint_every", "log_every", "permutations")
# Flags that, left out, take the value with which the reference was trained, and their types.
FROM_REFERENCE = dict(steps=int, batch_size=int, lr=(int, float), amp=str, warmup=int, schedule=str,
                      grad_clip=(int, float), flips=bool)
# That of DiT and SiT, whose published weights name none.
PUBLISHED = dict(batch_size=256, lr=1e-4, amp="none", warmup=0, schedule="constant", grad_clip=0.0,
                 flips=False)
# What the proxy has in common with the reference: what it predicts, and of which images.
SETTINGS = ("process predict betas size channels num_classes class_std text_shape learn_sigma "
            "depth decode recompute latents latent_scale vae classes data data_sha256 optimizer "
            "unet prompts lora base base_sha256").split()


# ---------------------------------------------------------------------------- formulas
def class_excess(excess, y, K, last, clip="class"):
    """lambda_i = max(mean excess loss of class i, 0) (Xie 2023, Algorithm 1).

    excess (..., B) or (B,), y (..., B) int64, last (..., K). A class absent from the batch keeps
    last_i; a non-finite value counts as absent. clip='example' clips inside the mean, as DoReMi
    does per token: where proxy and reference are equally good, E max(noise, 0) > 0.
    """
    excess = excess.double().expand(y.shape)
    ok = excess.isfinite()                                            # (..., B)
    kept = torch.where(ok, excess.clamp(min=0) if clip == "example" else excess, 0)
    sums = torch.zeros_like(last).scatter_add_(-1, y, kept)           # (..., K)
    counts = torch.zeros_like(last).scatter_add_(-1, y, ok.double())  # (..., K)
    return torch.where(counts > 0, (sums / counts.clamp(min=1)).clamp(min=0), last)


def dro_update(log_a, lam, eta, c):
    """a <- a exp(eta lambda), normalised, then (1 - c) a + c / K (Xie 2023, Algorithm 1).

    log_a, lam (..., K) float64. In log space: eta lambda may be far beyond exp's range.
    """
    log_a = torch.log_softmax(log_a + eta * lam, -1)
    uniform = torch.full_like(log_a, c / log_a.shape[-1]).log()       # of the share c
    return torch.logaddexp(log_a + math.log1p(-c), uniform)


def dro_path(excess, labels, K, eta, c, clip="class", burn_in=0):
    """Yields a (..., K) after each step of excess (steps, B), labels iterable of (..., B) int64."""
    log_a = torch.tensor(-math.log(K), dtype=torch.float64)
    lam = torch.tensor(0.0, dtype=torch.float64)
    for step, (e, y) in enumerate(zip(excess, labels)):
        log_a = log_a.expand(*y.shape[:-1], K)
        lam = lam.expand(*y.shape[:-1], K)
        lam = class_excess(e, y, K, lam, clip)
        if step >= burn_in:
            log_a = dro_update(log_a, lam, eta, c)
        yield log_a.exp()


def class_weights(abar, counts):
    """w_i = abar_i / (M_i / M), mean 1 over the images. abar (..., K); counts (K,), images each."""
    return abar / (counts / counts.sum())


# ---------------------------------------------------------------------------- the work
def uniform_rows(step, batch, seed, by_class, counts):
    """(batch,) rows, a function of (seed, step): class uniform over all K, uniform within it.

    by_class (M,): rows sorted by class; counts (K,): images of each.
    """
    g = common.generator(seed, "order", step)
    k = torch.randint(len(counts), (batch,), generator=g)             # classes
    u = torch.rand(batch, generator=g, dtype=torch.float64)           # places within them
    return by_class[counts.cumsum(0)[k] - counts[k] + (u * counts[k]).long()]


def train_proxy(args, inputs, stage, device):
    """DoReMi's Algorithm 1 with classes. Returns (record (steps, 2, B) on rank 0, the run)."""
    from models.diffusion import diffusion_loss
    B = args.batch_size
    K = len(inputs.counts)
    mine = slice(*common.shard(B))                   # this rank's part of a batch
    reference = inputs.reference.to(device, memory_format=torch.channels_last)
    proxy = inputs.proxy.to(device, memory_format=torch.channels_last).train()
    optimizer, scaler = common.optimizer_of(proxy, args.lr, device, args.amp,
                                            inputs.settings.get("optimizer"))
    lam = torch.zeros(K, dtype=torch.float64, device=device)
    log_a = lam - math.log(K)                        # (K,)
    # There is no moving average: both names hold the same tensors.
    parts = {"model": proxy, "ema": proxy, "optimizer": optimizer, "scaler": scaler,
             "log_a": log_a, "lam": lam}
    run = common.Run(stage.out, parts, {"label_drop": 0.0, **inputs.settings}, args, device)
    record = open_record(args, run, stage)
    if run.step == args.steps:
        return record.file, run
    images = common.DeviceRows(inputs.source, inputs.keep, device,
                               common.device_budget(device, proxy))
    drawn = lru_cache(2)(partial(uniform_rows, batch=B, seed=args.seed, by_class=inputs.by_class,
                                 counts=inputs.counts))
    wrapped = common.share_out(proxy, device)
    stop = common.Stop()
    run.describe(f"proxy {args.proxy_model} (eta {args.eta:g}, burn-in {args.burn_in})", proxy,
                 inputs.process, len(inputs.labels), device, 8 * args.steps * B)
    run.start()

    for step in range(run.step, args.steps):
        y_all = inputs.labels[drawn(step)].to(device, non_blocking=True)       # (B,)
        y = y_all[mine]                                               # (n,)
        stored = images.get(drawn(step)[mine], drawn(step + 1)[mine])
        # One (u, eps) per example, the same for both networks.
        x, u, eps = proxy_batch(args, inputs, step, stored, mine)
        with common.autocast(device, args.amp):
            with torch.no_grad():
                l_ref = diffusion_loss(inputs.process, reference, x, u, eps, y)            # (n,)
            loss = diffusion_loss(inputs.process, wrapped, x, u, eps, y)                   # (n,)

        # Every rank sees the excess of the whole batch, and so holds the same a.
        excess = torch.zeros(B, device=device)
        excess[mine] = loss.detach() - l_ref
        common.all_reduce(excess)
        lam[:] = class_excess(excess, y_all, K, lam, args.clip)       # (K,)
        if step >= args.burn_in:
            log_a[:] = dro_update(log_a, lam, args.eta, args.smoothing)    # (K,)

        # sum_j a_{y_j} l_j / sum_j a_{y_j} over the whole batch; DDP takes the mean over ranks,
        # hence their number.
        a_y = log_a.exp()[y_all].float()                              # (B,)
        common.backward(scaler, common.world() * (a_y[mine] * loss).sum() / a_y.sum())
        lr = common.lr_at(step, args.lr, args.warmup, args.schedule, args.steps)
        norm = common.optimizer_step(optimizer, scaler, proxy, lr, args.grad_clip, args.amp)
        run.bad.add(norm)
        record.add(step, torch.stack([excess, y_all.float()]))

        done = run.advance()
        stopping = stop.asked_on_any_rank(done, done == args.steps)
        saving = stopping or common.is_due(done, args.checkpoint_every, args.steps)
        if saving or common.is_due(done, args.log_every) or run.must_look():
            # Weights made of the losses of a diverged proxy would look like any others.
            mean = excess.nanmean().item()
            why = common.divergence(run, mean, "its loss beyond the reference's")
            common.need(not why, f"{stage.out}: {why}; lower --lr, or use --amp bf16 or none")
            a_max = log_a.max().exp().item()
            run.bar.set_postfix(excess=f"{mean:.4f}", a_max=f"{a_max:.3f}", refresh=False)
            # The record first: rows past the state are written again, rows missing are not.
            record.write()
            run.say_pace()
        if saving and not common.rank():
            common.save_pt(stage.out / "proxy.pt", run.state())
        if stopping:
            stop.leave(done)                         # exit code 143
    run.bar.close()
    stop.close()
    return record.file, run


def proxy_batch(args, inputs, step, stored, mine):
    """x, eps (n, C, H, W) and u (n,) of this rank's part of step n; stored: as the data hold it."""
    from models.conditioning import sides
    settings = inputs.settings
    shape = (settings["channels"], *sides(settings["size"]))
    draws = common.step_draws(args.seed, "reweight", step, args.batch_size, shape, stored.device,
                              settings["latents"], drop=False)[mine]
    mirrored = draws.flip if args.flips else None
    x = common.as_input(stored, settings.get("latent_scale"), draws.post, mirrored)
    return x, draws.u, draws.eps


def open_record(args, run, stage):
    """The StepRecord of all excess losses, on rank 0; takes up an interrupted call.

    Where a whole record stands, no step is left to train, and the weights alone are made again.
    """
    part, whole = stage.out / "excess.part.npy", stage.out / "excess.npy"
    standing = (stage.out / "proxy.pt").exists() and (part.exists() or whole.exists())
    resuming = stage.resuming and standing
    if resuming:
        run.resume(stage.out / "proxy.pt")
    # All have looked before rank 0 makes the file.
    common.barrier()
    if common.rank():
        return common.StepRecord(None)
    if not resuming:
        common.allocate(part, np.float32, (args.steps, 2, args.batch_size))
    return common.StepRecord(np.lib.format.open_memmap(part if part.exists() else whole, "r+"))


def weigh(args, inputs, record, run, out):
    """Writes the weights, prints them beside their null. Returns what is worth recording."""
    from models.permutation import derangement, permutation_test, permuted_null, told
    names, K = inputs.data.classes, inputs.data.num_classes
    excess = torch.from_numpy(np.array(record[:, 0]))                 # (steps, B)
    labels, counts = inputs.labels, inputs.counts.double()            # (M,), (K,)
    rows = torch.stack([uniform_rows(step, args.batch_size, args.seed, inputs.by_class,
                                     inputs.counts) for step in range(args.steps)])  # (steps, B)
    common.need(np.array_equal(labels[rows].numpy(), record[:, 1]),
                f"{out}: excess.npy was drawn by another rule; --overwrite makes it again")
    path = partial(dro_path, K=K, eta=args.eta, c=args.smoothing, clip=args.clip,
                   burn_in=args.burn_in)
    # The a of the loop, step by step.
    history = torch.stack(list(path(excess, labels[rows])))           # (steps, K) float64
    abar = history[args.burn_in:].mean(0)                             # (K,)
    null = permuted_null(path, excess, rows, labels, args.burn_in, args.permutations,
                         common.generator(args.seed, "null"))         # (P, K)
    test = permutation_test(abar.log(), null.log())
    w, low, high = (class_weights(v, counts) for v in (abar, test.low.exp(), test.high.exp()))
    other = derangement(K, common.generator(args.seed, "deal"))       # (K,)
    after = excess[args.burn_in:].flatten().double()
    y = labels[rows[args.burn_in:]].flatten()                         # like after
    mean = torch.stack([after[y == k].nanmean() for k in range(K)]).nan_to_num()           # (K,)
    saved = dict(abar=abar, history=history.float(), weights=w.float(), excess=record,
                 weights_permuted=class_weights(abar[other], counts).float(),
                 excess_rows=inputs.keep[rows])
    for name, values in saved.items():
        # What a finished call left stays, byte for byte: others may have trained with it.
        if run.first < args.steps or not (out / f"{name}.npy").exists():
            common.save_npy(out / f"{name}.npy", values)
    text, found = told(names, w, low, high, mean, test, len(null))
    common.log(text)
    curves = [v.numpy() for v in (history, w, low, high, mean, test.holm)]
    common.save_weights(out / "weights.png", names, *curves, test.overall, args.burn_in)
    facts = {"entropy_uniform": math.log(K), "weights": w.tolist(), "mean_excess": mean.tolist(),
             "outside_null": found, "null_low": low.tolist(), "null_high": high.tolist(),
             "null_p": test.p.tolist(), "null_p_holm": test.holm.tolist(),
             "null_p_overall": test.overall, "null_permutations": len(null),
             "null_spread": (K * null).std().item(), "spread": (K * abar).std().item(),
             "permuted_from": [names[k] for k in other]}
    for name, a in (("a", history[-1]), ("abar", abar)):
        facts[f"entropy_{name}"] = torch.special.entr(a).sum().item()                      # nats
        if a.max() > 0.5:
            common.log(f"warning: class {names[a.argmax()]} holds {a.max():.0%} of {name}: the "
                       "others hardly count; lower --eta or raise --smoothing")
    return facts


# ---------------------------------------------------------------------------- inputs
def load_inputs(args):
    """All that the flags name, checked before anything is written; fills the flags left out."""
    data = common.open_data(args.data, pixels=False)
    state, reference, process = common.open_checkpoint(args.reference, args.official)
    known = fill_flags(args, data, state["args"])
    keep = common.load_kept(args.indices, data)
    inputs = SimpleNamespace(data=data, reference=reference, process=process, keep=keep)
    inputs.source, _, _ = common.training_source(data)
    inputs.labels = torch.from_numpy(data.labels[keep])               # (M,)
    inputs.by_class = inputs.labels.argsort(stable=True)              # (M,) rows, sorted
    inputs.counts = inputs.labels.bincount(minlength=data.num_classes)     # (K,)
    load_proxy(args, inputs, known)
    inputs.files = {"data": data.info, "indices": args.indices, "reference": args.reference,
                    "proxy_init": args.proxy_init}
    return inputs


def fill_flags(args, data, known):
    """Flags left out take values of the reference's settings `known`, which are returned.

    Published weights name neither recipe nor data set.
    """
    if args.official:
        known = {**PUBLISHED, **known, "classes": data.classes, "data": data.info["name"],
                 "data_sha256": data.info["sha256"]}
    common.need_trained_on(args.reference, known, data)
    common.need(data.num_classes > 1, f"{args.data}: one class only, there is nothing to weigh; "
                                      "train without --weights")
    common.check_classes(data)
    common.inherit_flags(args, FROM_REFERENCE, args.reference, known)
    args.proxy_model = args.proxy_model or known["model"]
    if args.burn_in is None:
        args.burn_in = max(200, args.steps // 10)
    common.need(args.burn_in < args.steps,
                f"--burn-in {args.burn_in}: none of {args.steps} steps is left to average over; "
                "give fewer, or more --steps")
    if args.permutations is None:
        args.permutations = max(200, min(20 * data.num_classes, 2000))
    common.need_even_batch(args.batch_size)
    return known


def load_proxy(args, inputs, known):
    """inputs.proxy and its settings: fresh, or with the EMA of --proxy-init."""
    from models.build import build, text_of
    settings = {name: known[name] for name in SETTINGS if name in known}
    if args.proxy_model != known["model"]:
        settings = {k: v for k, v in settings.items() if k not in ("depth", "decode")}
    inputs.settings = settings = {**settings, "model": args.proxy_model, "dropout": 0.0}
    with torch.random.fork_rng(devices=[]), common.user_errors():
        # Not the initial weights of a reference with the same --seed.
        torch.manual_seed(common.generator(args.seed, "proxy").initial_seed())
        inputs.proxy = build(settings, text_of(inputs.reference))
    if args.proxy_init:
        init, net, _ = common.open_checkpoint(args.proxy_init)
        mine = {name: settings.get(name) for name in ("process", "predict", "latent_scale")
                if name in init["args"]}
        common.need_same(args.proxy_init, init["args"], mine, "the reference")
        what = f"checkpoint that fits the proxy, {args.proxy_model} on {args.data}"
        with common.reading(args.proxy_init, what, "see --proxy-model"):
            inputs.proxy.load_state_dict(net.state_dict())


# ---------------------------------------------------------------------------- command line
def parse_args(argv=None):
    from models.build import MODELS
    from models.official import OFFICIAL
    p = common.Parser(__doc__)
    p.add_argument("--data", required=True, help="data folder made by data.py")
    p.add_argument("--indices", help="keep.npy: weigh the classes of these images only")
    p.add_argument("--reference", required=True, help="checkpoint of train.py, or official weights")
    p.add_argument("--official", choices=OFFICIAL,
                   help="--reference holds such weights, their classes in the folder's order")
    p.add_argument("--out", required=True, help="folder to write to")
    p.add_argument("--steps", type=common.count, help="of the proxy; default: the reference's")
    p.add_argument("--batch-size", type=common.batch_type,
                   help="global batch, classes drawn uniformly; default: the reference's")
    p.add_argument("--lr", type=common.number(above=0, high=1e6),
                   help="of AdamW; default: the reference's, with its warm-up and schedule")
    p.add_argument("--eta", type=common.number(low=0, high=1e6), default=1.0,
                   help="step size of a; 1 is DoReMi's, tiny data sets need less (digits 0.05)")
    p.add_argument("--smoothing", type=common.number(low=0, high=0.99), default=1e-3,
                   help="c: uniform share of a; DoReMi's paper 1e-3, its code 1e-4")
    p.add_argument("--burn-in", type=common.number(int, low=0), help="first steps with uniform a, "
                   "not averaged; default max(200, 10 %% of the steps)")
    p.add_argument("--clip", choices=("class", "example"), default="class",
                   help="clip at 0 after the class mean, or inside it: DoReMi's, biased upwards")
    p.add_argument("--proxy-model", choices=MODELS, help="its network; default: the reference's")
    p.add_argument("--proxy-init", help="checkpoint whose EMA the proxy starts from; default: none")
    p.add_argument("--amp", choices=common.AMP_CHOICES,
                   help="precision; default: the reference's, auto where that gains nothing")
    p.add_argument("--permutations", type=common.number(int, low=19, high=100_000),
                   help="of the images, for the null; default 200, or 20 a class up to 2 000")
    p.add_argument("--checkpoint-every", type=common.count, default=200, help="steps between saves")
    p.add_argument("--log-every", type=common.count, default=50, help="steps between log figures")
    common.add_run_flags(p, "start again where another run stands", "seed of everything random")
    return p.parse_args(argv)


@common.command
def main(argv=None):
    args = parse_args(argv)
    device = common.get_device(args.device)
    common.fast_float32()
    inherited = args.amp is None
    inputs = load_inputs(args)                       # nothing is written yet
    hardware = common.settle_amp(args, device, inherited)
    def ready():                                     # else the null alone is made anew
        record = common.load_record(Path(args.out, "reweight.args.json"))
        return record.get("null_permutations") == args.permutations

    with common.Stage("reweight", args, inputs.files, OUTPUTS, FREE, stale=OUTPUTS,
                      scraps=("excess.part.npy",), ready=ready, open=hardware) as stage:
        if stage.done:
            return
        if args.eta >= 10:
            common.log(f"warning: --eta {args.eta:g} lets single batches decide the weights; 1 is "
                       "the published value")
        record, run = train_proxy(args, inputs, stage, device)
        seconds = run.seconds()
        skipped = run.bad.in_all()
        common.log(f"proxy {seconds:,.1f} s, {run.images():,} images seen, {skipped} steps skipped")
        facts = weigh(args, inputs, record, run, stage.out) if record is not None else {}
        stage.finish(proxy_seconds=round(seconds, 3), images_seen=run.images(), skipped=skipped,
                     **facts)


if __name__ == "__main__":
    main()
