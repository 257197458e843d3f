"""A network from its settings, and what every network must offer.

A checkpoint carries the settings it was made with, so nobody has to name an architecture twice.
A new network is a class that keeps to `Network`, and a row of MODELS: nothing else asks for names.
"""
from typing import NamedTuple, Protocol

import torch

from models.diffusion import make_process
from models.mdt import MDT, MDTS
from models.official import MDT_MARK, official_weights
from models.sd import SD, PromptTable
from models.sit import SITS, SiT
from models.unet import UNETS, UNet

# The buffer with the text tokens in a state dict: conditions, not weights; and the class table.
TEXT_KEY = "y_embedder.text"
TABLE_KEY = "y_embedder.embedding_table.weight"


class Network(Protocol):
    """The interface of a network, an nn.Module besides: all that the stages ask of one.

    __init__ takes size, channels, num_classes, the keys of its row in MODELS, those of `options`,
    and text, mask, text_shape, class_std, recompute (see build) and time_scale, a factor on t.
    """

    options: tuple      # settings that only this kind of network knows: ("depth", "dropout", ...)
    size: object        # side of its square images or latents, or (height, width)
    channels: int       # C
    num_classes: int    # K; label K is the null class
    grid: object        # its tokens lie on grid x grid places, or on (rows, columns)
    token_width: int    # D, numbers a token
    token_layer: int    # the tokens_after whose tokens the alignment loss sees
    y_embedder: object  # the ConditionEmbedder of class and text, under this name; or None

    def forward(self, x, t, y, tokens_after=None):
        """What the process predicts: x (n, C, H, W), t (n,) model time, y (n,) in 0..K -> like x.

        With tokens_after=k it returns (prediction, tokens (n, T, D)): the tokens behind layer k,
        row by row of the grid, with gradients.
        """


class Row(NamedTuple):
    """A row of MODELS: the class, and the arguments that make this size of it."""

    network: type
    sizes: dict


MODELS = {name: Row(UNet, sizes) for name, sizes in UNETS.items()}
MODELS.update({name: Row(SiT, sizes) for name, sizes in SITS.items()})
MODELS.update({name: Row(MDT, sizes) for name, sizes in MDTS.items()})
MODELS["sd"] = Row(SD, {})


def build(settings, text=None, mask=None):
    """The network of `settings`, a dict.

    model (a name of MODELS), process, size, channels, num_classes; optionally class_std (spread of
    the class embedding), text_shape [L, d], recompute, and the options of the network: `dropout` of
    a U-Net; `learn_sigma`, and `depth` where it is not that of the name, of a SiT; `decode` and
    `mask_ratio` besides of an MDT; `unet`, `lora`, `base` of Stable Diffusion. Those of another
    network are passed over. text (K, L, d) and mask (K, L) fill the text tokens; without them a
    network with text_shape starts with zeros. Stable Diffusion's text is its table, (K + 1, L, d).

    Raises ValueError when the name is unknown or a size does not fit.
    """
    name = settings["model"]
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(MODELS)}")
    for key, least in (("size", 1), ("channels", 1), ("num_classes", 0)):
        value = settings[key]
        # A size of two sides, (height, width), is not square.
        pair = key == "size" and isinstance(value, (list, tuple)) and len(value) == 2
        for number in value if pair else [value]:
            if not isinstance(number, int) or number < least:
                raise ValueError(f"{key} is {value!r}, but must be a whole number of at least "
                                 f"{least}")
    network, sizes = MODELS[name]
    kwargs = dict(sizes, text=text, mask=mask, text_shape=settings.get("text_shape"))
    kwargs["class_std"] = settings.get("class_std", 0.02)
    kwargs["recompute"] = settings.get("recompute", False)
    for key in network.options:
        if settings.get(key) is not None:
            kwargs[key] = settings[key]
    # A network's own time_scale stretches a flow's time in [0, 1]; that of DDPM is 0..999 already.
    if settings["process"] == "ddpm":
        kwargs["time_scale"] = 1.0
    size = settings["size"]
    if not isinstance(size, int):
        size = tuple(size)
    return network(size, settings["channels"], settings["num_classes"], **kwargs)


def knows(name, option):
    """Whether the network of this name has such an option: whether the setting does anything."""
    return option in MODELS[name].network.options


def text_of(model):
    """The text tokens that build() takes for a network like this one; None when it has none."""
    if model.y_embedder is None or model.y_embedder.text is None:
        return None
    if isinstance(model.y_embedder, PromptTable):
        return model.y_embedder.text  # the empty prompt is one of its rows
    return model.y_embedder.text[:-1]  # the last row is the null class


# ---------------------------------------------------------------- checkpoints of train.py
def from_checkpoint(state, ema=True):
    """(network in eval mode, process) from a checkpoint dict of train.py.

    Raises ValueError when it is none, or its weights do not fit its settings.
    """
    if not_ours := what_else(state):
        raise ValueError(not_ours)
    settings = state["args"]
    try:
        model = build(settings)
        weights = state["ema" if ema else "model"]
        process = make_process(settings["process"], settings.get("predict", "eps"),
                               settings.get("betas"))
    except (KeyError, TypeError, RuntimeError, MemoryError) as e:
        raise ValueError("a setting or part is missing or of the wrong kind "
                         f"({str(e)[:160]}); use another checkpoint") from e
    fits(model, weights)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False), process


def init_from(model, state, path, new_classes=False):
    """Start weights for `model` from the EMA of a checkpoint dict of train.py; its text stays.

    But for the prompts of Stable Diffusion, which come with the weights.

    Raises ValueError that begins with `path`: when it is no such checkpoint, or at the first weight
    whose name or shape differs. Official weights go through official_checkpoint first, for SiT runs
    time the other way. new_classes: the class table starts anew, but for its null row; for
    fine-tuning to other classes.
    """
    if not_ours := what_else(state):
        raise ValueError(f"{path}: {not_ours}")
    weights = dict(state["ema"])
    if new_classes:
        weights.update(new_table(model, weights))
    try:
        fits(model, weights)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    if TEXT_KEY in weights and not isinstance(model.y_embedder, PromptTable):
        weights[TEXT_KEY] = model.state_dict()[TEXT_KEY]  # it came with --attach
    model.load_state_dict(weights)


def new_table(model, weights):
    """{name: tensor} of the classes of `model`, whose null row is that of the checkpoint."""
    own = model.state_dict()
    table = own[TABLE_KEY].clone()                       # (K + 1, D)
    old = weights.get(TABLE_KEY)
    if torch.is_tensor(old) and old.shape[1:] == table.shape[1:]:
        # Without a class the network draws as it did.
        table[-1] = old[-1]
    mine = {TABLE_KEY: table}
    mine.update({key: own[key] for key in (TEXT_KEY, "y_embedder.mask") if key in own})
    return mine


def what_else(state):
    """What a dict is instead of a checkpoint of train.py, for an error; None when it is one."""
    if isinstance(state.get("args"), dict) and isinstance(state.get("ema"), dict):
        return None
    if weights := official_weights(state):
        kind = "MDT" if MDT_MARK in weights else "DiT/SiT"
        which = "--official mdt" if kind == "MDT" else "--official dit or --official sit"
        return (f"not a checkpoint of train.py but official {kind} weights, as it looks: say "
                f"which, where the script reads them, with {which}")
    return "not a checkpoint of train.py (no settings inside); give its last.pt or step_*.pt"


def fits(model, weights):
    """Raise ValueError with the first weight that differs in name or shape, or is damaged.

    load_state_dict's own first line names neither.
    """
    own = model.state_dict()
    for key in (*own, *weights):
        if fault := misfit(key, own.get(key), weights.get(key)):
            raise ValueError(fault)


def misfit(key, own, given):
    """What is wrong with the weight `given` where the network has `own`; None when nothing is."""
    start = "the weights do not fit: " + key
    if given is None:
        return f"{start} is missing; use those of the same network"
    if own is None:
        return f"{start} is not part of this network; use those of the same network"
    if not torch.is_tensor(given) or given.is_floating_point() != own.is_floating_point():
        return f"{start} is no tensor of {own.dtype}; the file is damaged, use another"
    if own.shape != given.shape:
        return f"{start} has shape {tuple(given.shape)}, this network needs {tuple(own.shape)}"
    if not given.isfinite().all():
        return (f"the weights hold NaN or infinity, first in {key}: that run had diverged; use an "
                "earlier checkpoint or another run")
    return None
