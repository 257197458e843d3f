"""The U-Net of DDPM (Ho et al. 2020, arXiv 2006.11239, appendix B), with an embedding of class and text added to that of time.

`unet` without classes is the paper's CIFAR-10 network: 35.7 M parameters.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from models.conditioning import ConditionEmbedder, timestep_embedding

UNETS = {"unet": dict(ch=128, mult=(1, 2, 2, 2), blocks=2, attention=(16,), dropout=0.1),
         "unet-small": dict(ch=64, mult=(1, 2, 2), blocks=1, attention=(8,), dropout=0.0),
         "unet-tiny": dict(ch=32, mult=(1, 2), blocks=1, attention=(4,), dropout=0.0)}


def norm(ch):
    return nn.GroupNorm(32 if ch % 32 == 0 else 8, ch, eps=1e-6)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, emb, dropout):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb, c_out)
        self.norm2, self.drop, self.conv2 = norm(c_out), nn.Dropout(dropout), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.emb(emb)[:, :, None, None]
        return self.skip(x) + self.conv2(self.drop(F.silu(self.norm2(h))))


class SelfAttention(nn.Module):
    """One head over all positions."""

    def __init__(self, ch):
        super().__init__()
        self.norm, self.qkv, self.proj = norm(ch), nn.Conv2d(ch, 3 * ch, 1), nn.Conv2d(ch, ch, 1)

    def forward(self, x):
        n, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)       # (n, 1, hw, c) each
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(out.squeeze(1).transpose(1, 2).reshape(n, c, h, w))


class Down(nn.Module):
    """Convolution of stride 2, padded right and below as TensorFlow's SAME does."""

    def __init__(self, ch):
        super().__init__()
        self.conv = nn.Conv2d(ch, ch, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    def __init__(self, ch):
        super().__init__()
        self.conv = nn.Conv2d(ch, ch, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """A residual block and, where the resolution asks for it, attention."""

    def __init__(self, c_in, c_out, emb, dropout, attend):
        super().__init__()
        self.res, self.attn = ResBlock(c_in, c_out, emb, dropout), SelfAttention(c_out) if attend else nn.Identity()

    def forward(self, x, emb):
        return self.attn(self.res(x, emb))


class UNet(nn.Module):
    """x (n, C, H, W), t (n,) model time, y (n,) in 0..K -> (n, C, H, W). num_classes = 0 leaves the class embedding out.

    tokens_after (any number) also returns the middle block's output as tokens (n, h w, D). time_scale: 1000 for a time in [0, 1].
    """

    def __init__(self, size, channels, num_classes, ch, mult, blocks, attention, dropout, text=None, mask=None, text_shape=None, class_std=0.02,
                 time_scale=1.0, recompute=False):
        super().__init__()
        if size % 2 ** (len(mult) - 1):
            raise ValueError(f"image size {size} cannot be halved {len(mult) - 1} times; choose another --model or size")
        self.size, self.channels, self.num_classes, self.ch, self.time_scale, self.recompute = size, channels, num_classes, ch, time_scale, recompute
        self.token_layer, self.token_width, self.grid = 1, ch * mult[-1], size // 2 ** (len(mult) - 1)
        emb = 4 * ch
        self.time = nn.Sequential(nn.Linear(ch, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.y_embedder = ConditionEmbedder(num_classes, emb, text, mask, text_shape, std=class_std) if num_classes else None
        self.conv_in = nn.Conv2d(channels, ch, 3, padding=1)
        skips, c, res = [ch], ch, size
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, m in enumerate(mult):
            for _ in range(blocks):
                self.down.append(Stage(c, ch * m, emb, dropout, res in attention))
                c = ch * m
                skips.append(c)
            if level < len(mult) - 1:
                self.down.append(Down(c))
                skips.append(c)
                res //= 2
        self.mid1, self.mid2 = Stage(c, c, emb, dropout, True), ResBlock(c, c, emb, dropout)
        for level, m in reversed(list(enumerate(mult))):
            for _ in range(blocks + 1):
                self.up.append(Stage(c + skips.pop(), ch * m, emb, dropout, res in attention))
                c = ch * m
            if level > 0:
                self.up.append(Up(c))
                res *= 2
        self.norm_out, self.conv_out = norm(c), nn.Conv2d(c, channels, 3, padding=1)
        self._init()

    def _init(self):
        """Ho's initialisation: uniform with variance 1 / fan-average everywhere, near zero at the end of each residual branch and at the output."""
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        for m in self.modules():
            last = m.conv2 if isinstance(m, ResBlock) else m.proj if isinstance(m, SelfAttention) else None
            if last is not None:
                nn.init.xavier_uniform_(last.weight, gain=1e-5)
        nn.init.xavier_uniform_(self.conv_out.weight, gain=1e-5)

    def forward(self, x, t, y=None, tokens_after=None):
        emb = self.time(timestep_embedding(t * self.time_scale, self.ch))                     # (n, 4 ch)
        if self.y_embedder is not None:
            emb = emb + self.y_embedder(y)
        emb = F.silu(emb)
        h = self.conv_in(x)
        hs = [h]
        for m in self.down:
            h = m(h) if isinstance(m, Down) else self._run(m, h, emb)
            hs.append(h)
        h = self.mid2(self.mid1(h, emb), emb)                                                 # (n, D, h, w)
        tokens = h.flatten(2).transpose(1, 2) if tokens_after is not None else None           # (n, h w, D)
        for m in self.up:
            h = m(h) if isinstance(m, Up) else self._run(m, torch.cat([h, hs.pop()], dim=1), emb)
        out = self.conv_out(F.silu(self.norm_out(h)))
        return out if tokens is None else (out, tokens)

    def _run(self, stage, h, emb):
        if self.recompute and self.training:
            return torch.utils.checkpoint.checkpoint(stage, h, emb, use_reentrant=False)
        return stage(h, emb)
