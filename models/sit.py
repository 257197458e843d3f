"""SiT / DiT: a vision transformer with adaLN-Zero.

Names, shapes and forward of the official checkpoints, so that their state dicts load as they are
(Peebles & Xie 2023, arXiv 2212.09748; Ma et al. 2024, arXiv 2401.08740).
"""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint

from models.conditioning import (ConditionEmbedder, align_depth, one_or_both, sides,
                                 timestep_embedding)

# The official sizes, and T, this kit's own for 8 x 8 digits. time_scale stretches a flow's time.
SIZES = {
    "XL": dict(depth=28, width=1152, heads=16),
    "L": dict(depth=24, width=1024, heads=16),
    "B": dict(depth=12, width=768, heads=12),
    "S": dict(depth=12, width=384, heads=6),
    "T": dict(depth=4, width=64, heads=4, time_scale=100.0),
}
SITS = {f"SiT-{s}/{p}": dict(SIZES[s], patch=p) for s in SIZES for p in (1, 2, 4, 8)}


def modulate(x, shift, scale):
    """x (n, T, D) under a shift and a scale (n, D), the same for all its tokens."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    def __init__(self, width, scale=1.0, frequencies=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.scale = scale
        self.frequencies = frequencies

    def forward(self, t):
        return self.mlp(timestep_embedding(t * self.scale, self.frequencies))  # (n, D)


class PatchEmbed(nn.Module):
    def __init__(self, patch, channels, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x):
        return rearrange(self.proj(x), "n D h w -> n (h w) D")  # (n, T, D)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        qkv = self.qkv(x)                           # (n, T, 3 D): q of all heads, then k, v
        qkv = rearrange(qkv, "n T (part heads d) -> part n heads T d", part=3, heads=self.heads)
        out = F.scaled_dot_product_attention(*qkv)  # (n, heads, T, d)
        return self.proj(rearrange(out, "n heads T d -> n T (heads d)"))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def plain_norm(width):
    """LayerNorm without weights of its own: scale and shift come from the condition."""
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class Block(nn.Module):
    """DiT block: adaLN gives shift, scale, gate for attention, then for the MLP, in this order."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = plain_norm(width)
        self.attn = Attention(width, heads)
        self.norm2 = plain_norm(width)
        self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        six = self.adaLN_modulation(c).chunk(6, dim=1)  # (n, D) each
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = six
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    def __init__(self, width, patch, out_channels):
        super().__init__()
        self.norm_final = plain_norm(width)
        self.linear = nn.Linear(width, patch * patch * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)  # (n, D) each
        x = modulate(self.norm_final(x), shift, scale)           # (n, T, D)
        return self.linear(x)                                    # (n, T, p p out)


class SiT(nn.Module):
    """A models.build.Network; its layers are the transformer blocks, counted from 1.

    learn_sigma: 2 C output channels as in the official checkpoints. The second half, the variance,
    is dropped.
    """

    options = ("depth", "learn_sigma")

    def __init__(self, size, channels, num_classes, depth, width, heads, patch, learn_sigma=False,
                 text=None, mask=None, text_shape=None, class_std=0.02, recompute=False,
                 time_scale=1.0):
        super().__init__()
        places = [side // patch for side in sides(size)]            # rows and columns of tokens
        if any(side % patch for side in sides(size)):
            raise ValueError(f"image size {size} is not a multiple of the patch size {patch}; "
                             "choose another --model or size")
        self.size = size
        self.channels = channels
        self.num_classes = num_classes
        self.patch = patch
        self.recompute = recompute
        self.out_channels = 2 * channels if learn_sigma else channels
        self.grid = one_or_both(*places)
        self.token_layer = align_depth(depth)
        self.token_width = width
        self.x_embedder = PatchEmbed(patch, channels, width)
        self.t_embedder = TimestepEmbedder(width, time_scale)
        self.y_embedder = ConditionEmbedder(num_classes, width, text, mask, text_shape, class_std)
        # A parameter as in the official code, but never trained.
        positions = torch.from_numpy(sincos_2d(width, self.grid)).float()
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)  # (1, T, D)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch, self.out_channels)
        initialise(self, self.blocks)

    def forward(self, x, t, y, tokens_after=None):
        c = self.t_embedder(t) + self.y_embedder(y)  # (n, D)
        x = self.x_embedder(x) + self.pos_embed      # (n, T, D)
        tokens = None
        for k, block in enumerate(self.blocks, 1):
            if self.recompute and self.training:
                # Keeps only the block's input; the rest is computed again on the way back.
                x = checkpoint(block, x, c, use_reentrant=False)
            else:
                x = block(x, c)
            if k == tokens_after:
                tokens = x
        x = self.final_layer(x, c)  # (n, T, p p out)
        x = unpatchify(x, self.grid, self.patch, self.channels)     # (n, C, H, W)
        if tokens_after is None:
            return x
        return x, tokens


def initialise(model, blocks):
    """DiT's initialisation of a transformer of these parts and its blocks, a ModuleList.

    Xavier for linear layers, N(0, 0.02) for embedders, zero for every modulation and the output
    (adaLN-Zero).
    """
    for module in (*blocks.modules(), *model.final_layer.modules()):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    # The patch embedding as the linear layer that it is: its fans are those of the flat patch.
    nn.init.xavier_uniform_(model.x_embedder.proj.weight.flatten(1))
    nn.init.zeros_(model.x_embedder.proj.bias)
    for layer in (model.t_embedder.mlp[0], model.t_embedder.mlp[2]):
        if model.t_embedder.scale == 1:
            nn.init.normal_(layer.weight, std=0.02)
        else:
            # The tiny size has a few hundred steps to find its way in time: larger weights, and a
            # time of 0..100 that the frequencies resolve.
            nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    modulations = [block.adaLN_modulation[1] for block in blocks]
    for layer in (*modulations, model.final_layer.adaLN_modulation[1], model.final_layer.linear):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def unpatchify(x, grid, patch, channels):
    """Tokens (n, T, p p out) -> (n, C, H, W): the first C of the `out` channels."""
    x = rearrange(x, "n (h w) (p q c) -> n c (h p) (w q)", h=sides(grid)[0], p=patch,
                  q=patch)
    return x[:, :channels]


def sincos_2d(width, grid):
    """Fixed positions (T, width) of a grid, float64: sin then cos over 1 / 10000^k.

    The column (w) in the first half of the channels, the row in the second.
    """
    omega = 1 / 10_000 ** (np.arange(width // 4) / (width / 4))  # (width / 4,)
    down, across = sides(grid)
    row, column = np.divmod(np.arange(down * across), across)    # (T,) each
    parts = [fn(np.outer(where, omega)) for where in (column, row) for fn in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1)
