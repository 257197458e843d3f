"""Official DiT and SiT weights, as checkpoints of this kit.

    state = official_checkpoint(torch.load("DiT-XL-2-256x256.pt", weights_only=True), "dit")
    model, process = from_checkpoint(state)
"""
import math
import re

import torch

from models.conditioning import timestep_embedding
from models.sit import SITS, SIZES

# What the official DiT and SiT were trained behind.
SD_VAE = "stabilityai/sd-vae-ft-ema"
SD_SCALE = 0.18215

# {width: name} of the official sizes; T is this kit's own.
WIDTHS = {SIZES[name]["width"]: name for name in ("XL", "L", "B", "S")}

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
    """The tensors of an official DiT/SiT checkpoint under their own names, or {} when it is none.

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

    To score, sample and train on from. kind 'dit' (Peebles & Xie 2023: ddpm, predicts eps) or 'sit'
    (Ma et al. 2024: flow, its time turned round): names and shapes are the same in both, so a file
    does not say which it is. Raises ValueError when it is none, or its width is of no known size.
    Whether every weight is there and fits shows where a model takes them.
    """
    if isinstance(state.get("args"), dict) and "process" in state["args"]:
        # A SiT of ours fits as well, and means another time.
        raise ValueError("a checkpoint of train.py, not official DiT/SiT weights; leave --official "
                         "out")
    weights = official_weights(state)
    if fault := not_official(weights):
        raise ValueError(f"not official DiT/SiT weights{fault}")
    settings = settings_of(weights)
    settings.update(latents=True, latent_scale=SD_SCALE, vae=SD_VAE)
    if kind == "sit":
        settings.update(process="flow", predict="v")
        weights = reverse_time(weights)
    else:
        settings.update(process="ddpm", predict="eps")
    return {"ema": weights, "args": settings}


def not_official(weights):
    """Why these are no official weights: the end of an error's sentence; None when they are."""
    if not weights:
        return " (no x_embedder.proj.weight inside)"
    for key, dims in NEEDED.items():
        if key not in weights:
            return f": {key} is missing"
        if weights[key].ndim != dims:
            return f": {key} is of shape {tuple(weights[key].shape)}"
    width, _, patch, _ = weights["x_embedder.proj.weight"].shape
    if width not in WIDTHS:
        known = ", ".join(map(str, WIDTHS))
        return f": their width is {width}, official ones are {known} wide"
    if f"SiT-{WIDTHS[width]}/{patch}" not in SITS:
        return f": their patches have {patch} pixels, official ones 1, 2, 4 or 8"
    return None


def settings_of(weights):
    """The settings of the network that has these weights, read off their shapes.

    With a learned sigma its half of the output stays in the weights, unused.
    """
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    name = f"SiT-{WIDTHS[width]}/{patch}"
    # Numbers of the blocks, which the names carry.
    blocks = [int(key.split(".")[1]) for key in weights if re.match(r"blocks\.\d+\.", key)]
    depth = 1 + max(blocks, default=0)
    outputs = len(weights["final_layer.linear.weight"])  # p p C, or 2 p p C with sigma
    settings = {
        "model": name,
        "size": math.isqrt(weights["pos_embed"].shape[1]) * patch,
        "channels": channels,
        "num_classes": len(weights["y_embedder.embedding_table.weight"]) - 1,
        "learn_sigma": outputs == 2 * channels * patch**2,
    }
    if depth != SITS[name]["depth"]:
        settings["depth"] = depth
    return settings


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
