"""A model from its settings. A checkpoint carries the settings it was made with, so nobody has to name an architecture twice."""
import math
import re

import torch

from models.conditioning import timestep_embedding
from models.diffusion import make_process
from models.sit import SITS, SIZES, SiT
from models.unet import UNETS, UNet

MODELS = {**UNETS, **SITS}
SD_VAE, SD_SCALE = "stabilityai/sd-vae-ft-ema", 0.18215              # what the official DiT and SiT were trained behind


def build(settings, text=None, mask=None):
    """The network of `settings`: model (a name of MODELS), process, size, channels, num_classes, and optionally class_std, text_shape, learn_sigma,
    dropout, recompute, depth (where it is not that of the name). text (K, L, d) and mask (K, L) fill the text tokens; without them a model with
    text_shape starts with zeros.

    Raises ValueError when the name is unknown or the size does not fit.
    """
    name = settings["model"]
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(MODELS)}")
    for k, least in (("size", 1), ("channels", 1), ("num_classes", 0)):
        if not isinstance(settings[k], int) or settings[k] < least:
            raise ValueError(f"{k} is {settings[k]!r}, but must be a whole number of at least {least}")
    kw = dict(MODELS[name], size=settings["size"], channels=settings["channels"], num_classes=settings["num_classes"], text=text, mask=mask,
              text_shape=settings.get("text_shape"), class_std=settings.get("class_std", 0.02), recompute=settings.get("recompute", False))
    if name in SITS:
        kw["depth"] = settings.get("depth") or kw["depth"]
        if settings["process"] == "ddpm":                             # its time is 0..999 already
            kw["time_scale"] = 1.0
        return SiT(**kw, learn_sigma=settings.get("learn_sigma", False))
    if settings.get("dropout") is not None:
        kw["dropout"] = settings["dropout"]
    return UNet(**kw, time_scale=1000.0 if settings["process"] == "flow" else 1.0)


def from_checkpoint(state, ema=True):
    """(model in eval mode, process) from a checkpoint dict of train.py. Raises ValueError when it is none, or its weights do not fit its settings."""
    if not isinstance(state.get("args"), dict) or not isinstance(state.get("ema"), dict):
        if official_weights(state):
            raise ValueError("not a checkpoint of train.py but official DiT/SiT weights, as it looks: say which, where the script reads them, with "
                             "--official dit or --official sit")
        raise ValueError("not a checkpoint of train.py (no settings inside); give its last.pt or step_*.pt")
    args = state["args"]
    try:
        model = build(args)
        weights = state["ema" if ema else "model"]
        process = make_process(args["process"], args.get("predict", "eps"))
    except (KeyError, TypeError, RuntimeError, MemoryError) as e:
        raise ValueError(f"a setting or part is missing or of the wrong kind ({str(e)[:160]}); use another checkpoint") from e
    fits(model, weights)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False), process


def official_weights(state):
    """The tensors of an official DiT/SiT checkpoint under their own names, or {} when it is none. They come bare or as {"ema": ...}, {"model": ...},
    and with the prefixes that DistributedDataParallel and torch.compile leave."""
    inner = next((state[k] for k in ("ema", "model") if isinstance(state.get(k), dict)), state)
    weights = {re.sub(r"^((module|_orig_mod)\.)+", "", str(k)): v for k, v in inner.items() if torch.is_tensor(v)}
    return weights if "x_embedder.proj.weight" in weights else {}


def official_checkpoint(state, kind):
    """An official checkpoint as train.py would have written it: {"ema": weights, "args": settings}, to score, sample and train on from.

    kind 'dit' (Peebles & Xie 2023: ddpm, predicts eps) or 'sit' (Ma et al. 2024: flow, its time turned round). Names and shapes are the same in both,
    so the file cannot tell which it is. The sizes are read off the shapes; with a learned sigma its half of the output stays in the weights, unused.
    Raises ValueError when it is none, or its width is of no known size. Whether every weight is there and fits shows where a model takes them.
    """
    if isinstance(state.get("args"), dict) and "process" in state["args"]:                    # a SiT of ours fits as well, and means another time
        raise ValueError("a checkpoint of train.py, not official DiT/SiT weights; leave --official out")
    w, sizes = official_weights(state), {s["width"]: name for name, s in SIZES.items() if name != "T"}
    need = {"x_embedder.proj.weight": 4, "pos_embed": 3, "y_embedder.embedding_table.weight": 2, "final_layer.linear.weight": 2,
            "final_layer.linear.bias": 1, "t_embedder.mlp.0.weight": 2}
    if not w:
        raise ValueError("not official DiT/SiT weights (no x_embedder.proj.weight inside)")
    if (wrong := next((k for k, n in need.items() if k not in w or w[k].ndim != n), None)):
        raise ValueError(f"not official DiT/SiT weights: {wrong} is {f'of shape {tuple(w[wrong].shape)}' if wrong in w else 'missing'}")
    width, channels, patch, _ = w["x_embedder.proj.weight"].shape
    if width not in sizes:
        raise ValueError(f"not official DiT/SiT weights: their width is {width}, official ones are {', '.join(map(str, sizes))} wide")
    if (name := f"SiT-{sizes[width]}/{patch}") not in SITS:
        raise ValueError(f"not official DiT/SiT weights: their patches have {patch} pixels, official ones 1, 2, 4 or 8")
    depth = 1 + max((int(k.split(".")[1]) for k in w if re.match(r"blocks\.\d+\.", k)), default=0)
    settings = dict(model=name, **({"depth": depth} if depth != SITS[name]["depth"] else {}), process="ddpm" if kind == "dit" else "flow",
                    predict="eps" if kind == "dit" else "v", size=math.isqrt(w["pos_embed"].shape[1]) * patch, channels=channels,
                    num_classes=len(w["y_embedder.embedding_table.weight"]) - 1,
                    learn_sigma=len(w["final_layer.linear.weight"]) == 2 * channels * patch**2, latents=True, latent_scale=SD_SCALE, vae=SD_VAE)
    return {"ema": reverse_time(w) if kind == "sit" else w, "args": settings}


def reverse_time(w):
    """Weights of an official SiT, which runs from noise (0) to data (1) and predicts x - eps, as one of ours: v(x, t) = -v_official(x, 1 - t).

    With the frequencies f of the time embedding, cos f(1-t) = cos f cos ft + sin f sin ft and sin f(1-t) = sin f cos ft - cos f sin ft: a fixed map of
    our embedding, which the linear layer behind it takes in exactly. The sign goes into the last layer, in which the output is linear.
    """
    first = w["t_embedder.mlp.0.weight"]
    c, s = timestep_embedding(torch.ones(1), first.shape[1]).double().chunk(2, dim=1)         # (1, F) each: cos f, sin f
    a, b = first.double().split(c.shape[1], dim=1)                    # (D, F) each: what meets the cosines, what meets the sines
    return {**w, "t_embedder.mlp.0.weight": torch.cat([a * c + b * s, a * s - b * c], dim=1).float(),
            **{k: -w[k] for k in ("final_layer.linear.weight", "final_layer.linear.bias")}}


def init_from(model, state, path):
    """Start weights for `model` from the EMA of a checkpoint dict of train.py; its text tokens stay its own. `path` names the file in messages.

    Raises ValueError when it is no such checkpoint, or at the first weight whose name or shape differs. Official DiT/SiT weights are refused as they
    are, for SiT runs time the other way: official_checkpoint first.
    """
    if not isinstance(state.get("args"), dict) or not isinstance(state.get("ema"), dict):
        if official_weights(state):
            raise ValueError(f"{path}: official DiT/SiT weights, as it looks, not a checkpoint of train.py: say which with --official dit or "
                             "--official sit")
        raise ValueError(f"{path}: not a checkpoint of train.py (no settings inside); give its last.pt or step_*.pt")
    try:
        fits(model, state["ema"])
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    own = {k: v for k, v in model.state_dict().items() if k.endswith("y_embedder.text")}      # conditions, not weights: they came with --attach
    model.load_state_dict({**state["ema"], **own})


def fits(model, weights):
    """Raise ValueError with the first name or shape in which the weights differ from the model's (load_state_dict's own first line names neither)."""
    mine = model.state_dict()
    for k in (*mine, *weights):
        if k not in weights:
            raise ValueError(f"the weights do not fit: {k} is missing; use those of the same network")
        if k not in mine:
            raise ValueError(f"the weights do not fit: {k} is not part of this network; use those of the same network")
        if not torch.is_tensor(weights[k]) or weights[k].is_floating_point() != mine[k].is_floating_point():
            raise ValueError(f"the weights do not fit: {k} is no tensor of {mine[k].dtype}; the file is damaged, use another")
        if mine[k].shape != weights[k].shape:
            raise ValueError(f"the weights do not fit: {k} has shape {tuple(weights[k].shape)}, this network needs {tuple(mine[k].shape)}")
        if not weights[k].isfinite().all():
            raise ValueError(f"the weights hold NaN or infinity, first in {k}: that run had diverged; use an earlier checkpoint or another run")
