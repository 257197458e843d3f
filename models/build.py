"""A model from its settings. A checkpoint carries the settings it was made with, so nobody has to name an architecture twice."""
import torch

from models.diffusion import make_process
from models.official import official_weights
from models.sit import SITS, SiT
from models.unet import UNETS, UNet

MODELS = {**UNETS, **SITS}


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
