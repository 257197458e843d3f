"""Official DiT, SiT, REPA and MDTv2 weights, as checkpoints of this kit.

    state = official_checkpoint(torch.load("DiT-XL-2-256x256.pt", weights_only=True), "dit")
    model, process = from_checkpoint(state)
"""
import math
import re

import torch

from models.conditioning import timestep_embedding
from models.mdt import MDTS
from models.sit import SITS, SIZES

# The kinds of published weights that are one file; train.py also knows sd, a folder: models/sd.py.
OFFICIAL = ("dit", "sit", "mdt", "repa")
# What the official networks were trained behind.
SD_VAE = "stabilityai/sd-vae-ft-ema"
SD_SCALE = 0.18215

# What an error calls each kind.
NAMES = {"dit": "DiT/SiT", "sit": "DiT/SiT", "repa": "DiT/SiT", "mdt": "MDTv2"}

# {width: name} of the official sizes; T is this kit's own.
WIDTHS = {SIZES[name]["width"]: name for name in ("XL", "L", "B", "S")}

# What only weights of MDTv2 have, and what only those of its first version have.
MDT_MARK = "decoder_pos_embed"
MDT_V1_MARK = "blocks.0.attn.rel_pos_bias.relative_position_bias_table"

# The weights that the sizes are read off, with their number of dimensions.
NEEDED = {
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "y_embedder.embedding_table.weight": 2,
    "final_layer.linear.weight": 2,
    "final_layer.linear.bias": 1,
    "t_embedder.mlp.0.weight": 2,
}


def official_weights(state):
    """The tensors of an official checkpoint under their own names, or {} when it is none.

    They come bare or as {"ema": ...}, {"model": ...}, and with the prefixes that
    DistributedDataParallel and torch.compile leave.
    """
    inner = state
    for key in ("model", "ema"):  # the EMA where there are both
        if isinstance(state.get(key), dict):
            inner = state[key]
    weights = {}
    for key, value in inner.items():
        if torch.is_tensor(value):
            weights[re.sub(r"^((module|_orig_mod)\.)+", "", str(key))] = value
    if "x_embedder.proj.weight" not in weights:
        return {}
    return weights


def official_checkpoint(state, kind):
    """An official checkpoint as train.py would have written it: {"ema": weights, "args": settings}.

    To score, sample and train on from. kind 'dit' (Peebles & Xie 2023: ddpm, predicts eps), 'mdt'
    (Gao et al. 2023, version 2: likewise), 'sit' (Ma et al. 2024: flow, its time turned round) or
    'repa' (Yu et al. 2025: flow in our direction of time; its projectors are left out). Names and
    shapes of dit, sit and repa are the same, so a file does not say which it is. Raises ValueError
    when it is none, or its width is of no known size. Whether every weight is there and fits shows
    where a model takes them.
    """
    if isinstance(state.get("args"), dict) and "process" in state["args"]:
        # A SiT of ours fits as well, and means another time.
        raise ValueError("a checkpoint of train.py, not official DiT/SiT weights; leave --official "
                         "out")
    weights = official_weights(state)
    if fault := not_official(weights, kind):
        raise ValueError(f"not official {NAMES[kind]} weights{fault}")
    if kind == "repa":
        weights = {k: v for k, v in weights.items() if not k.startswith("projectors.")}
    # An index of places stands in every file of MDT; the network makes its own.
    weights = {k: v for k, v in weights.items() if not k.endswith("relative_position_index")}
    settings = settings_of(weights)
    settings.update(latents=True, latent_scale=SD_SCALE, vae=SD_VAE)
    if kind in ("sit", "repa"):
        settings.update(process="flow", predict="v")
    else:
        settings.update(process="ddpm", predict="eps")
    if kind == "sit":
        _, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        if len(weights["final_layer.linear.weight"]) == channels * patch**2:
            # The only trace of REPA where its projectors were taken out: with the time reversed it
            # would draw nonsense without a word.
            raise ValueError("not official SiT weights, which have a second half of outputs: these "
                             "look like REPA's without projectors; say --official repa")
        weights = reverse_time(weights)
    return {"ema": weights, "args": settings}


def not_official(weights, kind):
    """Why these are no official weights: the end of an error's sentence; None when they are."""
    if not weights:
        return " (no x_embedder.proj.weight inside)"
    if MDT_V1_MARK in weights:
        return ": MDT v1 weights; only MDTv2 is built here"
    # Before any width: the names of all other weights are those of DiT.
    if (MDT_MARK in weights) != (kind == "mdt"):
        if kind == "mdt":
            return f" (no {MDT_MARK} inside); say --official dit, sit or repa"
        return f" but MDTv2's, by their {MDT_MARK}; say --official mdt"
    if kind in ("dit", "sit") and any(key.startswith("projectors.") for key in weights):
        return ": REPA's, which have projectors; say --official repa"
    for key, dims in NEEDED.items():
        if key not in weights:
            return f": {key} is missing"
        if weights[key].ndim != dims:
            return f": {key} is of shape {tuple(weights[key].shape)}"
    width, _, patch, _ = weights["x_embedder.proj.weight"].shape
    if width not in WIDTHS:
        known = ", ".join(map(str, WIDTHS))
        return f": their width is {width}, official ones are {known} wide"
    if kind == "mdt" and f"MDT-{WIDTHS[width]}/{patch}" not in MDTS:
        return f": their patches have {patch} pixels, official ones 2"
    if f"SiT-{WIDTHS[width]}/{patch}" not in SITS:
        return f": their patches have {patch} pixels, official ones 1, 2, 4 or 8"
    return None


def settings_of(weights):
    """The settings of the network that has these weights, read off their shapes.

    With a learned sigma its half of the output stays in the weights, unused.
    """
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    if MDT_MARK in weights:
        name = f"MDT-{WIDTHS[width]}/{patch}"
        decode = count_blocks(weights, "de_blocks")
        shape = {"depth": 2 * count_blocks(weights, "en_inblocks") + decode, "decode": decode}
        usual = MDTS[name]
    else:
        name = f"SiT-{WIDTHS[width]}/{patch}"
        shape = {"depth": count_blocks(weights, "blocks")}
        usual = SITS[name]
    outputs = len(weights["final_layer.linear.weight"])  # p p C, or 2 p p C with sigma
    settings = {
        "model": name,
        "size": math.isqrt(weights["pos_embed"].shape[1]) * patch,
        "channels": channels,
        "num_classes": len(weights["y_embedder.embedding_table.weight"]) - 1,
        "learn_sigma": outputs == 2 * channels * patch**2,
    }
    settings.update({key: value for key, value in shape.items() if value != usual[key]})
    return settings


def count_blocks(weights, kind):
    """How many blocks of a kind there are, by the numbers that the names carry; at least one."""
    found = [key.split(".")[1] for key in weights if re.match(rf"{kind}\.\d+\.", key)]
    return 1 + max(map(int, found), default=0)


def reverse_time(weights):
    """An official SiT as one of ours: v(x, t) = -v_official(x, 1 - t).

    The official one runs from noise (0) to data (1) and predicts x - eps. With the frequencies f of
    the time embedding,

        cos f(1-t) = cos f cos ft + sin f sin ft,  sin f(1-t) = sin f cos ft - cos f sin ft,

    a fixed map of our embedding, which the linear layer behind it takes in exactly. The sign goes
    into the last layer, in which the output is linear.
    """
    first = weights["t_embedder.mlp.0.weight"]
    at_1 = timestep_embedding(torch.ones(1), first.shape[1]).double()
    cos, sin = at_1.chunk(2, dim=1)  # (1, F) each: cos f, sin f
    # What meets the cosines and what meets the sines of the embedding, (D, F) each.
    a, b = first.double().split(cos.shape[1], dim=1)
    turned = torch.cat([a * cos + b * sin, a * sin - b * cos], dim=1)
    weights = {**weights, "t_embedder.mlp.0.weight": turned.float()}
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        weights[key] = -weights[key]
    return weights
