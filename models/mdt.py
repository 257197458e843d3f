"""MDTv2: a masked diffusion transformer (Gao et al. 2023, arXiv 2303.14389, version 2).

A U-shaped encoder and a decoder of DiT blocks with a relative position bias. It trains on two
passes a step: a full one, and one in which the encoder sees some of the tokens only and a side
block fills in the rest. Names, shapes and forward are those of the official checkpoints.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint

from models.conditioning import ConditionEmbedder, align_depth
from models.sit import (SIZES, Block, FinalLayer, PatchEmbed, TimestepEmbedder, initialise,
                        modulate, sincos_2d, unpatchify)

# Decoder blocks of each size, which are counted in its depth. XL as released, S as the public
# script; the others are this kit's own choice: the paper's are not known.
DECODE = {"XL": 4, "L": 4, "B": 6, "S": 6, "T": 2}
MDTS = {f"MDT-{s}/2": dict(SIZES[s], patch=2, decode=d) for s, d in DECODE.items()}
# Rows of a bias table behind those of the offsets: never used, but in every official file.
SPARE = 3


def relative_index(grid):
    """(T, T) int64: the row of the bias table for tokens i, j of a grid x grid square.

    (r_i - r_j + G - 1)(2 G - 1) + (c_i - c_j + G - 1), r and c being row and column of a token.
    """
    token = torch.arange(grid * grid)
    row, column = token // grid, token % grid                     # (T,) each
    down = row[:, None] - row[None] + grid - 1                    # (T, T), 0 .. 2 G - 2
    right = column[:, None] - column[None] + grid - 1             # (T, T)
    return down * (2 * grid - 1) + right


class PositionBias(nn.Module):
    """What is added to the logits of two tokens, by their offset: one number a head."""

    def __init__(self, grid, heads):
        super().__init__()
        table = torch.empty((2 * grid - 1) ** 2 + SPARE, heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def forward(self, rel):
        """rel (..., T, T) rows of the table -> (..., heads, T, T)."""
        return rearrange(self.relative_position_bias_table[rel], "... i j heads -> ... heads i j")


class BiasedAttention(nn.Module):
    def __init__(self, width, heads, grid):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_bias = PositionBias(grid, heads)

    def forward(self, x, rel):
        qkv = self.qkv(x)                                         # (n, T, 3 D)
        qkv = rearrange(qkv, "n T (part heads d) -> part n heads T d", part=3, heads=self.heads)
        # Under autocast the table stays in float32, but mask and q must be of one dtype.
        bias = self.rel_pos_bias(rel).to(qkv.dtype)               # ([n,] heads, T, T)
        out = F.scaled_dot_product_attention(*qkv, attn_mask=bias)     # (n, heads, T, d)
        return self.proj(rearrange(out, "n heads T d -> n T (heads d)"))


class MaskedBlock(Block):
    """DiT's block with the bias; with `skip` it first mixes in what an earlier layer passes on."""

    def __init__(self, width, heads, grid, skip):
        super().__init__(width, heads)
        self.attn = BiasedAttention(width, heads, grid)
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(self, x, c, rel, skip=None):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=2))     # (n, T, D)
        six = self.adaLN_modulation(c).chunk(6, dim=1)            # (n, D) each
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = six
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a), rel)
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class MDT(nn.Module):
    """A models.build.Network; layers are in-, out- and decoder blocks in their order, from 1.

    depth: their number; decode: how many of them decode. learn_sigma as of SiT. mask_ratio: the
    least share of hidden tokens in training; at 0 the masked pass is not meant to be used, and its
    own parts, which would have no gradient, are frozen.
    """

    options = ("depth", "decode", "learn_sigma", "mask_ratio")

    def __init__(self, size, channels, num_classes, depth, width, heads, patch, decode,
                 learn_sigma=False, mask_ratio=0.0, text=None, mask=None, text_shape=None,
                 class_std=0.02, recompute=False, time_scale=1.0):
        super().__init__()
        if not isinstance(size, int):
            raise ValueError(f"image size {size} is not square, as MDT needs it; choose another "
                             "--model, or data.py --size S")
        if size % patch:
            raise ValueError(f"image size {size} is not a multiple of the patch size {patch}; "
                             "choose another --model or size")
        half, odd = divmod(depth - decode, 2)
        if odd or half < 1:
            raise ValueError(f"{depth} blocks, {decode} of which decode: the others must be two "
                             "equal halves of the encoder")
        self.size = size
        self.channels = channels
        self.num_classes = num_classes
        self.patch = patch
        self.recompute = recompute
        self.grid = grid = size // patch
        self.token_layer = align_depth(depth)
        self.token_width = width
        self.x_embedder = PatchEmbed(patch, channels, width)
        self.t_embedder = TimestepEmbedder(width, time_scale)
        self.y_embedder = ConditionEmbedder(num_classes, width, text, mask, text_shape, class_std)
        # Both start from DiT's fixed positions, and are trained.
        positions = torch.from_numpy(sincos_2d(width, grid)).float()[None]     # (1, T, D)
        self.pos_embed = nn.Parameter(positions.clone())
        self.decoder_pos_embed = nn.Parameter(positions)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))

        def blocks(count, skip):
            return nn.ModuleList(MaskedBlock(width, heads, grid, skip) for _ in range(count))
        self.en_inblocks = blocks(half, skip=False)
        self.en_outblocks = blocks(half, skip=True)
        self.de_blocks = blocks(decode, skip=True)
        self.sideblocks = blocks(1, skip=False)
        self.final_layer = FinalLayer(width, patch, 2 * channels if learn_sigma else channels)
        initialise(self, nn.ModuleList([*self.en_inblocks, *self.en_outblocks, *self.de_blocks,
                                        *self.sideblocks]))
        self.register_buffer("rel", relative_index(grid), persistent=False)    # (T, T)
        if not mask_ratio:
            self.mask_token.requires_grad_(False)
            self.sideblocks.requires_grad_(False)

    def forward(self, x, t, y, tokens_after=None, kept=None):
        """The full pass; or, with kept (n, T') int64 tokens in any order, the masked one."""
        c = self.t_embedder(t) + self.y_embedder(y)               # (n, D)
        u = self.x_embedder(x) + self.pos_embed                   # (n, T, D)
        layers = [u]                                              # and the output of every layer
        if kept is None:
            x = self.encode(u, c, self.rel, layers) + self.decoder_pos_embed
        else:
            x = self.fill_in(self.encode(*self.some(u, c, kept), layers), c, kept)
        for block in self.de_blocks:
            # The skip is the input itself, hidden tokens and all: only the encoder is blind.
            x = self.run(block, x, c, self.rel, u)
            layers.append(x)
        x = unpatchify(self.final_layer(x, c), self.grid, self.patch, self.channels)
        if tokens_after is None:
            return x                                              # (n, C, H, W)
        return x, layers[tokens_after]

    def some(self, u, c, kept):
        """u, c and the bias table's rows of the kept tokens: (n, T', D), (n, D), (n, T', T')."""
        u = u.gather(1, kept[..., None].expand(-1, -1, u.shape[2]))
        return u, c, self.rel[kept[:, :, None], kept[:, None, :]]

    def encode(self, x, c, rel, layers):
        """Both halves of the encoder; what they put out is appended to `layers`."""
        skips = []
        for block in self.en_inblocks:
            x = self.run(block, x, c, rel)
            skips.append(x)
        layers += skips
        for block in self.en_outblocks:
            # The first takes what it has just been given: so the weights were trained.
            x = self.run(block, x, c, rel, skips.pop())
            layers.append(x)
        return x

    def fill_in(self, x, c, kept):
        """The side interpolater: encoded kept tokens x (n, T', D) -> all tokens (n, T, D)."""
        places = kept[..., None].expand(-1, -1, x.shape[2])       # (n, T', D)
        q = self.mask_token.to(x.dtype).repeat(len(x), len(self.rel), 1)
        q = q.scatter(1, places, x) + self.decoder_pos_embed      # (n, T, D)
        hidden = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device).scatter(1, kept, False)
        side = self.run(self.sideblocks[0], q, c, self.rel)
        return torch.where(hidden[..., None], side, q)

    def run(self, block, *inputs):
        if self.recompute and self.training:
            # Keeps only the block's inputs; the rest is computed again on the way back.
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)
