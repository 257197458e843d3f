"""The U-Net of DDPM (Ho et al. 2020, arXiv 2006.11239, appendix B).

An embedding of class and text is added to that of time. `unet` without classes is the paper's
CIFAR-10 network: 35.7 M parameters.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint

from models.conditioning import ConditionEmbedder, one_or_both, sides, timestep_embedding

# Channels, their multiple at each resolution, blocks a resolution, resolutions with attention.
UNETS = {
    "unet": dict(ch=128, mult=(1, 2, 2, 2), blocks=2, attention=(16,), dropout=0.1),
    "unet-small": dict(ch=64, mult=(1, 2, 2), blocks=1, attention=(8,), dropout=0.0),
    "unet-tiny": dict(ch=32, mult=(1, 2), blocks=1, attention=(4,), dropout=0.0),
}


def norm(ch):
    groups = 32 if ch % 32 == 0 else 8
    return nn.GroupNorm(groups, ch, eps=1e-6)


class ResBlock(nn.Module):
    """x (n, c_in, h, w), emb (n, D) -> (n, c_out, h, w)."""

    def __init__(self, c_in, c_out, emb, dropout):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb, c_out)
        self.norm2 = norm(c_out)
        self.drop = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Identity()
        # With weights of its own only where the channels change.
        if c_in != c_out:
            self.skip = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))    # (n, c_out, h, w)
        h = h + self.emb(emb)[:, :, None, None]  # the same at all places
        return self.skip(x) + self.conv2(self.drop(F.silu(self.norm2(h))))


class SelfAttention(nn.Module):
    """One head over all places."""

    def __init__(self, ch):
        super().__init__()
        self.norm = norm(ch)
        self.qkv = nn.Conv2d(ch, 3 * ch, 1)
        self.proj = nn.Conv2d(ch, ch, 1)

    def forward(self, x):
        qkv = self.qkv(self.norm(x))                # (n, 3 c, h, w)
        qkv = rearrange(qkv, "n c h w -> n 1 (h w) c").chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(*qkv)  # (n, 1, h w, c)
        out = rearrange(out, "n 1 (h w) c -> n c h w", h=x.shape[2])
        return x + self.proj(out)


class Down(nn.Module):
    """Convolution of stride 2, padded right and below as TensorFlow's SAME does."""

    def __init__(self, ch):
        super().__init__()
        self.conv = nn.Conv2d(ch, ch, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (n, c, h / 2, w / 2)


class Up(nn.Module):
    def __init__(self, ch):
        super().__init__()
        self.conv = nn.Conv2d(ch, ch, 3, padding=1)

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x)  # (n, c, 2 h, 2 w)


class Layer(nn.Module):
    """A residual block and, where the resolution asks for it, attention."""

    def __init__(self, c_in, c_out, emb, dropout, attend):
        super().__init__()
        self.res = ResBlock(c_in, c_out, emb, dropout)
        self.attn = nn.Identity()
        if attend:
            self.attn = SelfAttention(c_out)

    def forward(self, x, emb):
        return self.attn(self.res(x, emb))


class UNet(nn.Module):
    """A models.build.Network; its tokens are those of the middle block.

    num_classes = 0 leaves the class embedding out.
    """

    options = ("dropout",)

    def __init__(self, size, channels, num_classes, ch, mult, blocks, attention, dropout,
                 text=None, mask=None, text_shape=None, class_std=0.02, recompute=False,
                 time_scale=1000.0):
        super().__init__()
        halvings = len(mult) - 1
        middle = [side // 2**halvings for side in sides(size)]       # of the feature map
        if any(side % 2**halvings for side in sides(size)):
            raise ValueError(f"image size {size} cannot be halved {halvings} times; choose "
                             "another --model or size")
        self.size = size
        self.channels = channels
        self.num_classes = num_classes
        self.ch = ch
        self.time_scale = time_scale
        self.recompute = recompute
        self.token_layer = 1             # any number gives the same tokens
        self.token_width = ch * mult[-1]
        self.grid = one_or_both(*middle)
        emb = 4 * ch
        self.time = nn.Sequential(nn.Linear(ch, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.y_embedder = None
        if num_classes:
            self.y_embedder = ConditionEmbedder(num_classes, emb, text, mask, text_shape, class_std)
        self.conv_in = nn.Conv2d(channels, ch, 3, padding=1)

        # Down: channels of every output, which the way up takes back in reverse.
        skips = [ch]
        c = ch                  # channels at this point
        res = min(sides(size))  # and resolution, of the shorter side
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for level, factor in enumerate(mult):
            for _ in range(blocks):
                self.down.append(Layer(c, ch * factor, emb, dropout, res in attention))
                c = ch * factor
                skips.append(c)
            if level < halvings:
                self.down.append(Down(c))
                skips.append(c)
                res //= 2

        self.mid1 = Layer(c, c, emb, dropout, attend=True)
        self.mid2 = ResBlock(c, c, emb, dropout)

        # Up: one block more a resolution, for there is one output more to take back.
        for level in reversed(range(len(mult))):
            for _ in range(blocks + 1):
                c_out = ch * mult[level]
                self.up.append(Layer(c + skips.pop(), c_out, emb, dropout, res in attention))
                c = c_out
            if level > 0:
                self.up.append(Up(c))
                res *= 2

        self.norm_out = norm(c)
        self.conv_out = nn.Conv2d(c, channels, 3, padding=1)
        self._init()

    def _init(self):
        """Ho's initialisation: uniform with variance 1 / fan-average everywhere.

        Near zero at the end of each residual branch and at the output.
        """
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # Drawn a second time, behind all others: the order of the draws is part of every result.
        for module in self.modules():
            if isinstance(module, ResBlock):
                nn.init.xavier_uniform_(module.conv2.weight, gain=1e-5)
            elif isinstance(module, SelfAttention):
                nn.init.xavier_uniform_(module.proj.weight, gain=1e-5)
        nn.init.xavier_uniform_(self.conv_out.weight, gain=1e-5)

    def forward(self, x, t, y=None, tokens_after=None):
        emb = self.time(timestep_embedding(t * self.time_scale, self.ch))  # (n, 4 ch)
        if self.y_embedder is not None:
            emb = emb + self.y_embedder(y)                                 # (n, 4 ch)
        emb = F.silu(emb)

        h = self.conv_in(x)  # (n, ch, H, W)
        hs = [h]
        for layer in self.down:
            h = self._run(layer, h, emb)
            hs.append(h)
        h = self.mid2(self.mid1(h, emb), emb)  # (n, D, h, w)
        # Here and not behind the way up: gradients add in this order, which bits depend on.
        tokens = rearrange(h, "n D h w -> n (h w) D")
        for layer in self.up:
            if not isinstance(layer, Up):
                h = torch.cat([h, hs.pop()], dim=1)    # the skip of the same size
            h = self._run(layer, h, emb)
        out = self.conv_out(F.silu(self.norm_out(h)))  # (n, C, H, W)
        if tokens_after is None:
            return out
        return out, tokens

    def _run(self, layer, h, emb):
        if isinstance(layer, (Down, Up)):
            return layer(h)
        if self.recompute and self.training:
            # Keeps only the layer's input; the rest is computed again on the way back.
            return checkpoint(layer, h, emb, use_reentrant=False)
        return layer(h, emb)
