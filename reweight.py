"""Stage 2: class weights by distributionally robust optimisation (DRO) over a frozen reference.

Class-wise DoReMi (Xie et al. 2023, arXiv 2305.10429, Algorithm 1) with domain := class, as "Pruning
then Reweighting" (Li et al. 2024, arXiv 2409.19128) names it. A proxy is trained while adversarial
class weights a grow on the classes where it lags the reference, a diffusion model; the weights are
a's mean over the steps. Excess loss cancels difficulty that no model can remove: a class with added
noise is not favoured, a class that the proxy learns late is.

Reads   DATA/              a data folder of data.py;  --indices keep.npy int64 (M,)
        --reference CKPT   last.pt or step_*.pt of train.py on the same data set: its EMA, frozen;
                           flags left out take its values. Or official weights with --official
                           dit|sit, their classes in the order of the folder; flags left out take
                           the published recipe
Writes  OUT/weights.npy    float32 (K,), w_i = abar_i / (M_i / M), mean 1 over the M kept images
        OUT/abar.npy       float64 (K,), mean of a over the steps after the burn-in
        OUT/history.npy    float32 (steps, K), a after every step
        OUT/excess.npy     float32 (steps, 2, B): the per-example l_proxy - l_reference of a step,
                           and their labels
        OUT/proxy.pt       the proxy (loadable as a checkpoint), the state of an interrupted run
        OUT/weights.png, OUT/reweight.args.json

    python reweight.py --data data/digits --reference runs/digits/full/last.pt --eta 0.05 \\
        --steps 400 --batch-size 64 --out runs/digits/weighted/reweight

To resume, run the same command again, with the same --steps: burn-in and mean depend on them.
`--burn-in 0` is DoReMi as published; with a fresh proxy its weights mostly echo the first steps,
when the excess is a constant minus the reference's loss: the class hardest for it gets the least.
The null: the same recursion over the recorded excess losses with labels permuted. Its band holds
all its classes and permutations; weights that mean nothing leave it, in any class, with probability
2 / (permutations + 1) at most: 10 % for 20.
"""
import math
from types import SimpleNamespace

import numpy as np
import torch

import common

OUTPUTS = ("weights.npy", "abar.npy", "history.npy", "excess.npy", "weights.png", "proxy.pt")
# Flags that, left out, take the value with which the reference was trained.
FROM_REFERENCE = dict(steps=int, batch_size=int, lr=(int, float), amp=str, warmup=int, schedule=str,
                      grad_clip=(int, float), flips=bool)
# The recipe of DiT and SiT, for their weights name none.
PUBLISHED = dict(batch_size=256, lr=1e-4, amp="none", warmup=0, schedule="constant", grad_clip=0.0,
                 flips=False)
# What the proxy has in common with the reference: what it predicts, and of which images.
SETTINGS = ("process", "predict", "size", "channels", "num_classes", "class_std", "text_shape",
            "learn_sigma", "recompute", "latents", "latent_scale", "vae", "classes", "data",
            "data_sha256")


# ---------------------------------------------------------------------------- formulas
def class_excess(excess, y, K, last, clip="class"):
    """lambda_i = max(mean excess loss of class i, 0) (Xie 2023, Algorithm 1).

    excess (..., B) or (B,), y (..., B) int64, last (..., K). A class absent from the batch keeps
    last_i; a non-finite value counts as absent. clip='example' clips inside the mean, as DoReMi
    does per token. Its bias: where proxy and reference are equally good, E max(noise, 0) > 0.
    Returns (..., K) float64.
    """
    excess = excess.double().expand(y.shape)
    ok = excess.isfinite()
    kept = torch.where(ok, excess.clamp(min=0) if clip == "example" else excess, 0)
    sums = torch.zeros_like(last).scatter_add_(-1, y, kept)
    counts = torch.zeros_like(last).scatter_add_(-1, y, ok.double())
    return torch.where(counts > 0, (sums / counts.clamp(min=1)).clamp(min=0), last)


def dro_update(log_a, lam, eta, c):
    """a <- a exp(eta lambda), normalised, then (1 - c) a + c / K (Xie 2023, Algorithm 1).

    In log space: eta lambda may be far beyond exp's range. log_a, lam (..., K) float64. Returns
    log a (..., K).
    """
    log_a = torch.log_softmax(log_a + eta * lam, -1)
    uniform = torch.full_like(log_a, c / log_a.shape[-1]).log()
    return torch.logaddexp(log_a + math.log1p(-c), uniform)


def dro_path(excess, labels, K, eta, c, clip="class", burn_in=0):
    """Yields a (..., K) after every step of recorded excess losses.

    excess (steps, B); labels an iterable of (..., B) int64, one a step.
    """
    log_a = torch.tensor(-math.log(K), dtype=torch.float64)
    lam = torch.tensor(0.0, dtype=torch.float64)
    for step, (e, y) in enumerate(zip(excess, labels)):
        log_a = log_a.expand(*y.shape[:-1], K)
        lam = lam.expand(*y.shape[:-1], K)
        lam = class_excess(e, y, K, lam, clip)
        if step >= burn_in:
            log_a = dro_update(log_a, lam, eta, c)
        yield log_a.exp()


def permuted_null(excess, labels, K, eta, c, clip="class", burn_in=0, permutations=20,
                  generator=None):
    """abar (permutations, K) of the same record with labels permuted: no class means anything.

    excess, labels (steps, B). Labels are permuted within each step, so that every step keeps its
    class counts, its times and its stage of training. No training: that the proxy would have been
    trained with another a is left out.
    """
    def shuffled():
        for y in labels:
            yield y[torch.rand(permutations, len(y), generator=generator).argsort(-1)]     # (P, B)
    path = enumerate(dro_path(excess, shuffled(), K, eta, c, clip, burn_in))
    return sum(a for step, a in path if step >= burn_in) / (len(excess) - burn_in)


def class_weights(abar, counts):
    """w_i = abar_i / (M_i / M): K abar_i for balanced classes, mean 1 over the images.

    abar (..., K), counts (K,) images a class.
    """
    return abar / (counts / counts.sum())


# ---------------------------------------------------------------------------- the work
def uniform_rows(step, batch, seed, by_class, counts):
    """(batch,) rows, a function of (seed, step): class uniform over all K, then uniform within it.

    by_class (M,): rows sorted by class; counts (K,).
    """
    g = common.generator(seed, "order", step)
    k = torch.randint(len(counts), (batch,), generator=g)
    u = torch.rand(batch, generator=g, dtype=torch.float64)
    return by_class[counts.cumsum(0)[k] - counts[k] + (u * counts[k]).long()]


def train_proxy(args, inputs, stage, device):
    """Trains the proxy and records the excess losses: Algorithm 1 of DoReMi with classes.

    Returns (record (steps, 2, B) on rank 0, seconds, steps left out as not finite).
    """
    from models.diffusion import diffusion_loss
    K = len(inputs.counts)
    B = args.batch_size
    mine = slice(*common.shard(B))                   # this rank's part of a batch
    reference = inputs.reference.to(device, memory_format=torch.channels_last)
    proxy = inputs.proxy.to(device, memory_format=torch.channels_last).train()
    optimizer, scaler = common.optimizer_of(proxy, args.lr, device, args.amp)
    # There is no moving average: both names hold the same tensors.
    parts = {"model": proxy, "ema": proxy, "optimizer": optimizer, "scaler": scaler}
    run = common.Run(parts, {"label_drop": 0.0, **inputs.settings}, args, device)
    lam = torch.zeros(K, dtype=torch.float64, device=device)
    log_a = lam - math.log(K)
    record, state = open_record(args, run, stage)
    if state:
        log_a = state["log_a"].to(device)
        lam = state["lam"].to(device)
    wrapped = common.share_out(proxy, device)
    labels = torch.from_numpy(inputs.data.labels[inputs.keep])        # (M,)
    by_class = labels.argsort(stable=True)
    counts = torch.from_numpy(inputs.counts)
    describe(args, inputs, stage.out, device)
    stop = common.Stop()
    bar = common.progress(total=args.steps, initial=run.step, desc=str(stage.out))
    run.start()

    for step in range(run.step, args.steps):
        rows = uniform_rows(step, B, args.seed, by_class, counts)     # (B,)
        y_all = labels[rows].to(device)
        y = y_all[mine]                                               # (n,)
        # One (u, eps) per example, the same for both networks.
        x, u, eps = proxy_batch(args, inputs, step, rows, mine, device)
        with common.autocast(device, args.amp):
            with torch.no_grad():
                l_ref = diffusion_loss(inputs.process, reference, x, u, eps, y)            # (n,)
            loss = diffusion_loss(inputs.process, wrapped, x, u, eps, y)                   # (n,)

        # Every rank sees the excess of the whole batch, and so holds the same a. The last number
        # says whether one of them was told to stop.
        shared = torch.zeros(B + 1, device=device)
        shared[mine] = loss.detach() - l_ref
        shared[B] = stop.asked
        excess = common.all_reduce(shared)[:B]
        lam = class_excess(excess, y_all, K, lam, args.clip)          # (K,)
        if step >= args.burn_in:
            log_a = dro_update(log_a, lam, args.eta, args.smoothing)

        # sum_j a_{y_j} l_j / sum_j a_{y_j} over the whole batch; DDP takes the mean over ranks,
        # hence their number.
        a_y = log_a.exp()[y_all].float()                              # (B,)
        common.backward(scaler, common.world() * (a_y[mine] * loss).sum() / a_y.sum())
        lr = common.lr_at(step, args.lr, args.warmup, args.schedule, args.steps)
        norm = common.optimizer_step(optimizer, scaler, proxy, lr, args.grad_clip, args.amp)
        run.bad.add(norm)
        if record is not None:
            record[step] = torch.stack([excess, y_all.float()]).cpu().numpy()

        run.step = done = step + 1
        bar.update()
        if common.is_due(done, args.log_every, args.steps) or run.bad.too_many():
            mean = excess.nanmean().item()
            refuse_divergence(run, mean, stage.out)
            bar.set_postfix(excess=f"{mean:.4f}", a_max=f"{log_a.max().exp():.3f}", refresh=False)
        if done == run.first + 20:
            run.say_pace()
        stopping = bool(shared[B])
        if record is not None and (stopping or common.is_due(done, args.checkpoint_every, args.steps)):
            # The record first: rows past the state are written again, rows missing are not.
            record.flush()
            now = {"log_a": log_a.cpu(), "lam": lam.cpu()}
            common.save_pt(stage.out / "proxy.pt", {**run.state(), **now})
        if stopping:
            stop.leave(done)                         # exit code 143
    bar.close()
    return record, run.seconds(), run.bad.in_all()


def proxy_batch(args, inputs, step, rows, mine, device):
    """x, eps (n, C, H, W) and u (n,) of this rank's part of step n, all drawn from (seed, n)."""
    settings = inputs.settings
    B = len(rows)
    shape = (B, settings["channels"], settings["size"], settings["size"])
    g = common.generator(args.seed, "reweight", step, device=device)
    u = torch.rand(B, generator=g, device=device)
    eps = torch.randn(shape, generator=g, device=device)
    mirrored = torch.rand(B, generator=g, device=device)[mine] < 0.5
    post = None
    if settings["latents"]:
        post = torch.randn(shape, generator=g, device=device)[mine]
    at = inputs.keep[rows[mine].numpy()]
    x = torch.from_numpy(inputs.source[at])
    x = common.sound_rows(x, at, inputs.data.folder / "latents.npy").to(device)
    x = common.as_input(x, settings.get("latent_scale"), post, mirrored if args.flips else None)
    return x, u[mine], eps[mine]


def open_record(args, run, stage):
    """(memory map of all excess losses on rank 0, proxy.pt of an interrupted call or None)."""
    part = stage.out / "excess.part.npy"
    proxy = stage.out / "proxy.pt"
    state = None
    if stage.resuming and part.exists() and proxy.exists():
        state = run.resume(proxy)
    # All have looked before rank 0 makes the file.
    common.barrier()
    if common.rank():
        return None, state
    if state is None:
        common.allocate(part, np.float32, (args.steps, 2, args.batch_size))
    return np.lib.format.open_memmap(part, "r+"), state


def describe(args, inputs, out, device):
    """Says what will be trained."""
    n = sum(p.numel() for p in inputs.proxy.parameters())
    size = n * 12 + args.steps * args.batch_size * 8
    common.log(f"proxy {args.proxy_model} {n / 1e6:.2f} M parameters, {inputs.process.name}, "
               f"{len(inputs.keep):,} images of {len(inputs.counts)} classes, {args.steps:,} steps "
               f"of {args.batch_size}, lr {args.lr:g} ({args.schedule}, warm-up {args.warmup}), "
               f"eta {args.eta:g}, burn-in {args.burn_in}, {device}, amp {args.amp}, about "
               f"{size / 2**20 + 1:,.0f} MB in {out}")
    if args.eta >= 10:
        common.log(f"warning: --eta {args.eta:g} lets single batches decide the weights; 1 is the "
                   "published value")


def refuse_divergence(run, excess, out):
    """Weights made of the losses of a diverged proxy would look like any others."""
    trouble = common.divergence(run, excess)
    common.need(not trouble, f"{out}: against the reference {trouble}; lower --lr, or use --amp bf16 "
                             "or none")


def weigh(args, inputs, record, out):
    """Writes the weights, prints them beside their null. Returns what is worth recording."""
    names = inputs.data.classes
    K = len(names)
    excess = torch.from_numpy(np.array(record[:, 0]))                 # (steps, B)
    labels = torch.from_numpy(np.array(record[:, 1])).long()          # (steps, B)
    rule = dict(K=K, eta=args.eta, c=args.smoothing, clip=args.clip, burn_in=args.burn_in)
    # (steps, K) float64: the a of the loop, step by step.
    history = torch.stack(list(dro_path(excess, labels, **rule)))
    abar = history[args.burn_in:].mean(0)
    g = common.generator(args.seed, "null")
    null = permuted_null(excess, labels, **rule, permutations=args.permutations, generator=g)
    # Every class is drawn alike: one band for abar, of all classes and permutations.
    counts = torch.from_numpy(inputs.counts).double()
    w = class_weights(abar, counts)
    low = class_weights(null.min(), counts)
    high = class_weights(null.max(), counts)
    after = excess[args.burn_in:].flatten().double()
    y = labels[args.burn_in:].flatten()
    mean = torch.stack([after[y == k].nanmean() for k in range(K)]).nan_to_num()           # (K,)
    arrays = dict(abar=abar, history=history.float(), weights=w.float(), excess=record)
    for name, values in arrays.items():
        common.save_npy(out / f"{name}.npy", values)
    curves = [v.numpy() for v in (history, w, low, high, mean)]
    picture(out / "weights.png", names, *curves, args.burn_in)
    outside = table(names, w, low, high, mean)
    facts = {"entropy_uniform": math.log(K), "weights": w.tolist(), "mean_excess": mean.tolist(),
             "outside_null": outside, "null_low": low.tolist(), "null_high": high.tolist(),
             "null_spread": (K * null).std().item(), "spread": (K * abar).std().item()}
    for name, a in (("a", history[-1]), ("abar", abar)):
        facts[f"entropy_{name}"] = torch.special.entr(a).sum().item()                      # nats
        if a.max() > 0.5:
            common.log(f"warning: class {names[a.argmax()]} holds {a.max():.0%} of {name}: the "
                       "others hardly count; lower --eta or raise --smoothing")
    return facts


def table(names, w, low, high, mean):
    """Prints the weights beside their null. Returns the classes outside its band, heaviest first."""
    K = len(names)
    order = w.argsort(descending=True).tolist()
    note = ""
    shown = range(K)
    if K > 20:
        note = "   (the ten heaviest and the ten lightest)"
        shown = order[:10] + order[-10:]
    common.log(f"{'class':<24}{'weight':>8}{'null':>18}{'mean excess':>13}{note}")
    for k in shown:
        band = f"{low[k]:.3f} .. {high[k]:.3f}"
        common.log(f"{names[k][:23]:<24}{w[k]:>8.3f}{band:>18}{mean[k]:>13.5f}")
    outside = [f"{names[k]} ({w[k]:.3f})" for k in order
               if w[k] < low[k] - 1e-9 or w[k] > high[k] + 1e-9]
    said = ", ".join(outside) or "none: the weights are not distinguishable from noise"
    common.log(f"classes whose weight lies outside the null's band: {said}")
    return outside


def picture(path, names, history, w, low, high, mean, burn_in):
    """weights.png: trajectories of a, weights with the null's band, mean excess per class."""
    K = len(names)
    fig = common.figure(14, 4)
    left, middle, right = fig.subplots(1, 3)
    steps = np.arange(0, len(history), max(1, len(history) // 1000))
    lines = left.plot(steps + 1, history[steps], lw=1)
    left.axvspan(0, burn_in, color="0.9", lw=0)
    left.set(xlabel="step", title=f"class weights a (shaded: burn-in, {burn_in} steps)")
    middle.bar(range(K), w)
    middle.bar(range(K), high - low, bottom=low, color="C1", alpha=0.5,
               label="null: permuted labels")
    middle.set(xlabel="class", title="weights, mean 1 over the images")
    middle.legend(fontsize=8)
    right.bar(range(K), mean, color="C2")
    right.set(xlabel="class", title="mean excess loss after the burn-in")
    if K <= 20:
        left.legend(lines, names, fontsize=7)
        for ax in (middle, right):
            ax.set_xticks(range(K), names, rotation=90, fontsize=8)
    common.save_figure(path, fig)


# ---------------------------------------------------------------------------- inputs
def load_inputs(args):
    """All that the flags name, checked before anything is written; fills the flags left out."""
    data = common.open_data(args.data, pixels=False)
    state, reference, process = common.open_checkpoint(args.reference, args.official)
    inputs = SimpleNamespace(data=data, reference=reference, process=process)
    inputs.source, _, _ = common.training_source(data)
    known = recipe_of(args, data, state["args"])
    inputs.keep = np.arange(len(data.labels))
    if args.indices:
        inputs.keep = common.load_indices(args.indices, len(data.labels))
        common.check_origin(args.indices, data)
    inputs.counts = np.bincount(data.labels[inputs.keep], minlength=data.num_classes)
    common.need(inputs.counts.all(),
                f"{args.indices or args.data}: class {np.argmin(inputs.counts)} keeps no image; "
                "keep at least one of each class")
    fill_flags(args, known)
    load_proxy(args, inputs, known)
    inputs.files = {"data": data.info, "indices": args.indices, "reference": args.reference,
                    "proxy_init": args.proxy_init}
    return inputs


def recipe_of(args, data, known):
    """The settings of the reference, which must have been trained on these images.

    Published weights name neither recipe nor data set.
    """
    if args.official:
        common.need(args.steps, f"--official {args.official}: the weights do not say for how many "
                                "steps they were trained; give --steps")
        known = {**PUBLISHED, **known, "classes": data.classes, "data": data.info["name"],
                 "data_sha256": data.info["sha256"]}
    _, channels, size = common.training_source(data)
    latents = data.latents is not None
    mine = dict(num_classes=data.num_classes, channels=channels, size=size, latents=latents,
                data_sha256=data.info["sha256"])
    if latents:
        note = data.folder / "latents.json"
        mine["latent_scale"] = common.load_json(note, "the description of the latents")["scale"]
    common.need_same(f"{args.reference} (data set {known.get('data')})", known, mine,
                     f"{args.data} ({data.info['name']})", "train a reference on this data set")
    common.need(data.num_classes > 1, f"{args.data}: one class only, there is nothing to weigh; "
                                      "train without --weights")
    return known


def fill_flags(args, known):
    """Flags left out take the reference's values; those that then fit nothing are refused."""
    ours = "use a checkpoint that train.py wrote"
    for name in sorted(FROM_REFERENCE):
        common.need(name in known or getattr(args, name, None) is not None,
                    f"{args.reference}: does not say with which {name} it was trained; {ours}")
    kinds = {name: kind for name, kind in FROM_REFERENCE.items() if name in known}
    common.fields(args.reference, known, **kinds)
    for name, choices in (("amp", common.AMP), ("schedule", ("constant", "cosine"))):
        common.need(known.get(name) in (None, *choices),
                    f"{args.reference}: was trained with {name} = {known.get(name)!r}, which is none "
                    f"of {', '.join(choices)}; {ours}")
    for name in FROM_REFERENCE:
        if getattr(args, name, None) is None:
            setattr(args, name, known[name])
    if args.burn_in is None:
        args.burn_in = max(200, args.steps // 10)
    args.proxy_model = args.proxy_model or known["model"]
    common.need(args.burn_in < args.steps,
                f"--burn-in {args.burn_in}: none of the {args.steps} steps is left to average over; "
                "give fewer, or more --steps")
    common.need(args.batch_size % common.world() == 0,
                f"--batch-size {args.batch_size} is the global batch: it must be a multiple of the "
                f"{common.world()} processes")


def load_proxy(args, inputs, known):
    """inputs.proxy and its settings: fresh, or with the EMA of --proxy-init."""
    from models.build import build, text_of
    settings = {name: known[name] for name in SETTINGS if name in known}
    if args.proxy_model == known["model"] and "depth" in known:
        settings["depth"] = known["depth"]
    inputs.settings = settings = {**settings, "model": args.proxy_model, "dropout": 0.0}
    with torch.random.fork_rng(devices=[]), common.user_errors():
        # Not the initial weights of a reference with the same --seed.
        torch.manual_seed(common.generator(args.seed, "proxy").initial_seed())
        inputs.proxy = build(settings, text_of(inputs.reference))
    if not args.proxy_init:
        return
    init, net, _ = common.open_checkpoint(args.proxy_init)
    # What it does not say is as here.
    mine = {name: settings.get(name) for name in ("process", "predict", "latent_scale")
            if name in init["args"]}
    common.need_same(args.proxy_init, init["args"], mine, "the reference")
    try:
        inputs.proxy.load_state_dict(net.state_dict())
    except (ValueError, RuntimeError) as e:
        raise common.UserError(f"{args.proxy_init}: does not fit the proxy, {args.proxy_model} on "
                               f"{args.data} ({str(e)[:120]}); see --proxy-model") from e


# ---------------------------------------------------------------------------- command line
def parse_args(argv=None):
    from models.build import MODELS
    p = common.Parser(__doc__)
    p.add_argument("--data", required=True, help="data folder made by data.py")
    p.add_argument("--indices", help="keep.npy: weigh the classes of these images only")
    p.add_argument("--reference", required=True,
                   help="checkpoint of train.py on this data set, or official weights")
    p.add_argument("--official", choices=("dit", "sit"),
                   help="--reference holds official weights of this kind")
    p.add_argument("--out", required=True, help="folder to write to")
    p.add_argument("--steps", type=common.count, help="steps of the proxy; default: the reference's")
    p.add_argument("--batch-size", type=common.batch_type,
                   help="global batch, classes drawn uniformly; default: the reference's")
    p.add_argument("--lr", type=common.number(above=0, high=1e6),
                   help="of AdamW; default: the reference's, with its warm-up and schedule")
    p.add_argument("--eta", type=common.number(low=0, high=1e6), default=1.0,
                   help="step size of a; 1 is DoReMi's, tiny data sets need less (digits 0.05)")
    p.add_argument("--smoothing", type=common.number(low=0, high=0.99), default=1e-3,
                   help="c: share of the uniform distribution mixed into a at every step")
    p.add_argument("--burn-in", type=common.number(int, low=0),
                   help="first steps with uniform a, not averaged; default max(200, 10 %% of the "
                        "steps)")
    p.add_argument("--clip", choices=("class", "example"), default="class",
                   help="clip at 0 after the class mean, or inside it (biased upwards)")
    p.add_argument("--proxy-model", choices=MODELS, help="its network; default: the reference's")
    p.add_argument("--proxy-init", help="checkpoint to start the proxy from (its EMA); default: "
                                        "from scratch")
    p.add_argument("--amp", choices=common.AMP,
                   help="precision of both networks; default: the reference's")
    p.add_argument("--permutations", type=common.number(int, low=1, high=10_000), default=20,
                   help="permutations of the labels for the null")
    p.add_argument("--checkpoint-every", type=common.count, default=200,
                   help="steps between saves of the state")
    p.add_argument("--log-every", type=common.count, default=50,
                   help="steps between updates of the progress line's figures")
    common.add_run_flags(p, "start again in a folder that holds another run",
                         seed="seed of everything random")
    return p.parse_args(argv)


@common.command
def main(argv=None):
    args = parse_args(argv)
    device = common.get_device(args.device)
    common.fast_float32()
    inputs = load_inputs(args)                       # nothing is written yet
    with common.Stage("reweight", args, inputs.files, OUTPUTS, ("checkpoint_every", "log_every"),
                      stale=OUTPUTS, scraps=("excess.part.npy",)) as stage:
        if stage.done:
            return
        record, seconds, skipped = train_proxy(args, inputs, stage, device)
        images = args.steps * args.batch_size
        common.log(f"proxy {seconds:,.1f} s, {images:,} images seen, {skipped} steps skipped")
        facts = {}
        if common.rank() == 0:
            facts = weigh(args, inputs, record, stage.out)
        stage.finish(proxy_seconds=round(seconds, 3), images_seen=images, skipped=skipped, **facts)


if __name__ == "__main__":
    main()
