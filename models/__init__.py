"""A model from its settings. A checkpoint carries the settings it was made with, so nobody has to name an architecture twice."""
import math
import re

import torch

from models.diffusion import DDPM, Flow, make_process
from models.sit import SITS, SIZES, Reversed, SiT
from models.unet import UNETS, UNet

MODELS = {**UNETS, **SITS}


def build(settings, text=None, mask=None):
    """The network of `settings`: model (a name of MODELS), process, size, channels, num_classes, and optionally class_std, text_shape, learn_sigma,
    dropout, recompute. text (K, L, d) and mask (K, L) fill the text tokens; without them a model with text_shape starts with zeros.

    Raises ValueError when the name is unknown or the size does not fit.
    """
    name = settings["model"]
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(MODELS)}")
    kw = dict(MODELS[name], size=settings["size"], channels=settings["channels"], num_classes=settings["num_classes"], text=text, mask=mask,
              text_shape=settings.get("text_shape"), class_std=settings.get("class_std", 0.02), recompute=settings.get("recompute", False))
    if name in SITS:
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
            raise ValueError("not a checkpoint of train.py but official DiT/SiT weights, as it looks: only the --reference of attach.py can be that, "
                             "with --official dit or --official sit")
        raise ValueError("not a checkpoint of train.py (no settings inside)")
    args = state["args"]
    try:
        model = build(args)
        weights = state["ema" if ema else "model"]
        process = make_process(args["process"], args.get("predict", "eps"))
    except (KeyError, TypeError, RuntimeError) as e:
        raise ValueError(f"a setting or part is missing or of the wrong kind ({e})") from e
    fits(model, weights)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False), process


def official_weights(state):
    """The tensors of an official DiT/SiT checkpoint under their own names, or {} when it is none. They come bare or as {"ema": ...}, {"model": ...},
    and with the prefixes that DistributedDataParallel and torch.compile leave."""
    inner = next((state[k] for k in ("ema", "model") if isinstance(state.get(k), dict)), state)
    weights = {re.sub(r"^((module|_orig_mod)\.)+", "", str(k)): v for k, v in inner.items() if torch.is_tensor(v)}
    return weights if "x_embedder.proj.weight" in weights else {}


def from_official(state, kind):
    """(model in eval mode, process) from an official checkpoint, kind 'dit' (Peebles & Xie 2023: ddpm, predicts eps) or 'sit' (Ma et al. 2024: flow,
    its time turned round by Reversed). Names and shapes are the same in both, so the file cannot tell which it is. The sizes are read off the shapes.

    Raises ValueError when it is none, its width is of no known size, or a weight is missing, left over or of another shape.
    """
    if isinstance(state.get("args"), dict) and "process" in state["args"]:                    # a SiT of ours fits as well, and means another time
        raise ValueError("a checkpoint of train.py, not official DiT/SiT weights; leave --official out")
    w, heads = official_weights(state), {s["width"]: s["heads"] for name, s in SIZES.items() if name != "T"}
    need = {"x_embedder.proj.weight": 4, "pos_embed": 3, "y_embedder.embedding_table.weight": 2, "final_layer.linear.weight": 2}
    if not w:
        raise ValueError("not official DiT/SiT weights (no x_embedder.proj.weight inside)")
    if (wrong := next((k for k, n in need.items() if k not in w or w[k].ndim != n), None)):
        raise ValueError(f"not official DiT/SiT weights: {wrong} is {f'of shape {tuple(w[wrong].shape)}' if wrong in w else 'missing'}")
    width, channels, patch, _ = w["x_embedder.proj.weight"].shape
    if width not in heads:
        raise ValueError(f"not official DiT/SiT weights: their width is {width}, official ones are {', '.join(map(str, heads))} wide")
    model = SiT(size=math.isqrt(w["pos_embed"].shape[1]) * patch, channels=channels, num_classes=len(w["y_embedder.embedding_table.weight"]) - 1,
                depth=1 + max((int(k.split(".")[1]) for k in w if re.match(r"blocks\.\d+\.", k)), default=0), width=width, heads=heads[width],
                patch=patch, learn_sigma=len(w["final_layer.linear.weight"]) == 2 * channels * patch**2)
    fits(model, w)
    model.load_state_dict(w)
    model.eval().requires_grad_(False)
    return (Reversed(model).eval(), Flow()) if kind == "sit" else (model, DDPM())


def init_from(model, state, path):
    """Start weights for `model` from the EMA of a checkpoint dict of train.py; its text tokens stay its own. `path` names the file in messages.

    Raises ValueError when it is no such checkpoint, or at the first weight whose name or shape differs. Official DiT/SiT weights are refused: SiT
    runs time the other way, which the time embedding cannot absorb, so training on from them would start from a wrong network.
    """
    if not isinstance(state.get("args"), dict) or not isinstance(state.get("ema"), dict):
        if official_weights(state):
            raise ValueError(f"{path}: official DiT/SiT weights can only be the --reference of attach.py (with --official dit or --official sit), "
                             "not start weights; give a checkpoint of train.py")
        raise ValueError(f"{path}: not a checkpoint of train.py (no settings inside)")
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
            raise ValueError(f"the weights do not fit: {k} is missing")
        if k not in mine:
            raise ValueError(f"the weights do not fit: {k} is not part of this network")
        if mine[k].shape != weights[k].shape:
            raise ValueError(f"the weights do not fit: {k} has shape {tuple(weights[k].shape)}, this network needs {tuple(mine[k].shape)}")
