"""Official DiT and SiT weights, as checkpoints of this kit."""
import math
import re

import torch

from models.conditioning import timestep_embedding
from models.sit import SITS, SIZES

SD_VAE, SD_SCALE = "stabilityai/sd-vae-ft-ema", 0.18215              # what the official DiT and SiT were trained behind


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
