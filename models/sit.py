"""SiT / DiT: a vision transformer with adaLN-Zero. Names, shapes and forward of the official checkpoints (Peebles & Xie 2023, arXiv 2212.09748; Ma et al. 2024,
arXiv 2401.08740), so that their state dicts load as they are."""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from models.conditioning import ConditionEmbedder, align_depth, timestep_embedding

SIZES = {"XL": dict(depth=28, width=1152, heads=16), "L": dict(depth=24, width=1024, heads=16), "B": dict(depth=12, width=768, heads=12),
         "S": dict(depth=12, width=384, heads=6), "T": dict(depth=4, width=64, heads=4, time_scale=100.0)}                        # T is this kit's own, for 8 x 8 digits
SITS = {f"SiT-{s}/{p}": dict(**SIZES[s], patch=p) for s in SIZES for p in (1, 2, 4, 8)}


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    def __init__(self, width, scale=1.0, frequencies=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.scale, self.frequencies = scale, frequencies

    def forward(self, t):
        return self.mlp(timestep_embedding(t * self.scale, self.frequencies))                 # (n, D)


class PatchEmbed(nn.Module):
    def __init__(self, patch, channels, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)                                        # (n, T, D)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        n, T, D = x.shape
        q, k, v = self.qkv(x).view(n, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)    # (n, heads, T, d) each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, T, D))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """DiT block: adaLN order shift, scale, gate for attention, then for the MLP."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    def __init__(self, width, patch, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SiT(nn.Module):
    """x (n, C, H, W), t (n,) model time, y (n,) in 0..K -> (n, C, H, W). learn_sigma: 2C output channels as in the official checkpoints, the second
    half (the variance) dropped. tokens_after=k also returns the tokens after block k (1-based), (n, T, D)."""

    def __init__(self, size, channels, num_classes, depth, width, heads, patch, learn_sigma=False, text=None, mask=None, text_shape=None, class_std=0.02,
                 recompute=False, time_scale=1.0):
        super().__init__()
        if size % patch:
            raise ValueError(f"image size {size} is not a multiple of the patch size {patch}; choose another --model or size")
        self.size, self.channels, self.num_classes, self.patch, self.recompute = size, channels, num_classes, patch, recompute
        self.out_channels, self.grid = channels * (2 if learn_sigma else 1), size // patch
        self.token_layer, self.token_width = align_depth(depth), width
        self.x_embedder = PatchEmbed(patch, channels, width)
        self.t_embedder = TimestepEmbedder(width, time_scale)
        self.y_embedder = ConditionEmbedder(num_classes, width, text, mask, text_shape, std=class_std)
        self.pos_embed = nn.Parameter(torch.from_numpy(sincos_2d(width, self.grid)).float()[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch, self.out_channels)
        self._init()

    def _init(self):
        """DiT's initialisation: Xavier for linear layers, N(0, 0.02) for embedders, zero for every modulation and the output (adaLN-Zero)."""
        for m in (*self.blocks.modules(), *self.final_layer.modules()):
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.weight.shape[0], -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for i in (0, 2):
            weight = self.t_embedder.mlp[i].weight
            # Official size: 0.02. The tiny size has a few hundred steps to find its way in time: Xavier, and a time of 0..100 that the frequencies resolve.
            nn.init.normal_(weight, std=0.02) if self.t_embedder.scale == 1 else nn.init.xavier_uniform_(weight)
            nn.init.zeros_(self.t_embedder.mlp[i].bias)
        for m in (*(b.adaLN_modulation[1] for b in self.blocks), self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(m.weight)
            nn.init.zeros_(m.bias)

    def forward(self, x, t, y, tokens_after=None):
        c = self.t_embedder(t) + self.y_embedder(y)                                           # (n, D)
        x, tokens = self.x_embedder(x) + self.pos_embed, None                                 # (n, T, D)
        for k, block in enumerate(self.blocks, 1):
            x = checkpoint(block, x, c, use_reentrant=False) if self.recompute and self.training else block(x, c)
            if k == tokens_after:
                tokens = x
        x = self.final_layer(x, c)                                                            # (n, T, p p out)
        n, h, p, o = len(x), self.grid, self.patch, self.out_channels
        x = x.view(n, h, h, p, p, o).permute(0, 5, 1, 3, 2, 4).reshape(n, o, h * p, h * p)[:, :self.channels]
        return x if tokens_after is None else (x, tokens)


def sincos_2d(width, grid):
    """Fixed positions (grid^2, width), float64: sin then cos over 1/10000^k, the column (w) in the first half of the channels, the row in the second."""
    omega = 1 / 10_000 ** (np.arange(width // 4) / (width / 4))
    row, col = np.divmod(np.arange(grid * grid), grid)
    parts = [fn(np.outer(pos, omega)) for pos in (col, row) for fn in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1)
