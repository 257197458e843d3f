"""What a model is conditioned on and aligned to: class and text embedding, label dropout, the visual alignment loss (D2C, arXiv 2507.05914, section 3.3).

The text tokens live in the model as a buffer with one row per class and a zero row for the null class. So label dropout drops class and text
together, sampling needs no file beside the checkpoint, and the null condition is the same in training and in guidance.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class ConditionEmbedder(nn.Module):
    """y (n,) in 0..K, K = null -> (n, width). Without text the table of DiT; with text the DC-embedding y_text = MLP(tt) + tt + e_y (D2C, Eq. 9 and 10).

    text: (K, L, d) float tokens, mask: (K, L) bool; or text_shape=(L, d) to make the module empty, before its state is loaded.
    """

    def __init__(self, num_classes, width, text=None, mask=None, text_shape=None, std=0.02):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.embedding_table.weight, std=std)
        self.conv = None
        if text is not None or text_shape:
            L, d = text_shape or text.shape[1:]
            tokens = torch.zeros(num_classes + 1, L, d)
            if text is not None:
                tokens[:-1] = torch.as_tensor(text).float() * (1 if mask is None else torch.as_tensor(mask).float().unsqueeze(-1))
            self.register_buffer("text", tokens)                                              # (K + 1, L, d), last row zero
            self.conv = nn.Conv1d(d, width, kernel_size=L, stride=L)                          # all L tokens -> one vector
            self.mlp = nn.Sequential(nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, y):
        e = self.embedding_table(y)                                                           # (n, D)
        if self.conv is None:
            return e
        tt = self.conv(self.text[y].transpose(1, 2)).squeeze(-1)                              # (n, d, L) -> (n, D)
        return self.mlp(tt) + tt + e


def drop_labels(y, p, null, uniform):
    """Label dropout per sample, for classifier-free guidance: null where uniform (n,) < p. One mask drops class and text together."""
    return torch.where(uniform < p, torch.full_like(y, null), y)


def timestep_embedding(t, dim, max_period=10_000):
    """(n,) -> (n, dim): cos, then sin (the order of DiT's checkpoints)."""
    freqs = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=t.device, dtype=torch.float32) / (dim // 2))
    args = t.float()[:, None] * freqs[None]
    return torch.cat([args.cos(), args.sin()], dim=1)


class Projector(nn.Sequential):
    """phi of REPA (Yu et al. 2025, arXiv 2410.06940): Linear - SiLU - Linear - SiLU - Linear."""

    def __init__(self, width, out, hidden=2048):
        super().__init__(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out))


def match_grid(v, tokens):
    """Interpolate stored tokens (n, T, d) on a square grid to `tokens` tokens on a square grid; the same tensor when T fits already."""
    n, T, d = v.shape
    if T == tokens:
        return v
    a, b = math.isqrt(T), math.isqrt(tokens)
    if a * a != T or b * b != tokens:
        raise ValueError(f"visual tokens lie on grids of {T} and {tokens}: only square grids can be interpolated")
    v = F.interpolate(v.transpose(1, 2).reshape(n, d, a, a).float(), size=(b, b), mode="bilinear", align_corners=False, antialias=b < a)
    return v.reshape(n, d, tokens).transpose(1, 2)


def alignment_loss(projected, v):
    """L_proj = -(1/h) sum_i cos(phi(h_i), v_i), one value per sample (D2C, Eq. 11). projected, v (n, T, d).

    In float32 whatever came in: |v|^2 of half-precision features overflows, and the normalised vector is then NaN.
    """
    with torch.autocast(projected.device.type, enabled=False):
        return -(F.normalize(projected.float(), dim=-1) * F.normalize(v.float(), dim=-1)).sum(-1).mean(-1)     # (n,)


def mean_token_cosine(v):
    """The mean cosine that ONE constant vector reaches against all tokens v (..., d): |mean of the unit tokens|. An alignment below it has learned nothing."""
    return F.normalize(torch.as_tensor(v).float(), dim=-1).flatten(0, -2).mean(0).norm().item()


def align_depth(depth):
    """Block (1-based) whose output is aligned: 8 where there are as many (REPA), else ceil(0.28 depth)."""
    return 8 if depth >= 8 else math.ceil(0.28 * depth)
