"""Frozen networks that turn images into vectors (surrogates, judges) or into patch tokens (what a diffusion model is aligned to).

    enc = load("inception", device, weights="pt_inception-2015-12-05-6726825d.pth")
    z = extract(enc, images)                                          # uint8 (N, H, W, C), a memory map will do -> float32 (N, 2048)
    v = extract(load("dinov2_vitb14", device), images, kind="tokens")                        # -> float32 (N, 256, 768)

ENCODERS is the one table of what there is; describe() prints it. Vae is the way to latents and back. Mistakes raise ValueError,
FileNotFoundError or ImportError with one full line; missing weights are never replaced by random ones.
"""
import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class Spec:
    size: object            # the side that images are resized to, or None: the network takes the data set's own size
    norm: str               # key of NORMS
    width: object           # of the pooled vector; a text where data or checkpoint decide
    tokens: object          # "T x d", or None where there are no patch tokens
    source: str
    needs: str              # what to install, or what to make first


NORMS = {"[-1,1]": ((0.5,), (0.5,)), "[0,1]": ((0.0,), (1.0,)), "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
         "CLIP": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)), "data set": ((0.0,), (1.0,))}   # data set: inside
URLS = {"inception": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",          # torchvision's IMAGENET1K_V1
        **{k: f"https://dl.fbaipublicfiles.com/dinov2/{k}/{k}_pretrain.pth" for k in ("dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14")}}
CLIP_NAME = "openai/clip-vit-base-patch32"
ENCODERS = {
    "inception":     Spec(299, "[-1,1]", 2048, None, "pytorch-fid's InceptionV3 with the FID weights, pool3", "92 MB download or .pth; pytorch-fid"),
    "resnet18":      Spec(224, "ImageNet", 512, "196 x 768", "torchvision IMAGENET1K_V1; tokens: layer3 beside layer4", "45 MB download or .pth"),
    "dinov2_vits14": Spec(224, "ImageNet", 384, "256 x 384", "facebookresearch/dinov2, normalised class token", "84 MB download or .pth"),
    "dinov2_vitb14": Spec(224, "ImageNet", 768, "256 x 768", "facebookresearch/dinov2, normalised class token", "330 MB download or .pth"),
    "dinov2_vitl14": Spec(224, "ImageNet", 1024, "256 x 1024", "facebookresearch/dinov2, normalised class token", "1.2 GB download or .pth"),
    "clip":          Spec(224, "CLIP", 512, None, f"{CLIP_NAME}, image embedding", "pip install transformers; download or folder"),
    "ddae":          Spec(None, "[-1,1]", "model's", "model's", "middle block of a diffusion model at time 0.05", "checkpoint of train.py (pixels)"),
    "scratch":       Spec(None, "data set", "32 to 256", "<= 64", "small ResNet trained on the data set's labels", "nothing; at least two classes"),
    "pixels":        Spec(None, "[0,1]", "<= 64", None, "PCA of the pixels", "nothing"),
}


def describe():
    """The table of encoders as aligned text, for --help and the README."""
    rows = [("encoder", "input", "normalised", "width", "tokens", "what it is", "needs")]
    rows += [(k, str(s.size or "own"), s.norm, str(s.width), s.tokens or "-", s.source, s.needs) for k, s in ENCODERS.items()]
    wide = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, wide)).rstrip() for r in rows)


class Encoder(nn.Module):
    """A frozen network behind one face: x is uint8 (n, H, W, C) on `device`, C 1 or 3; answers are float32, outside autocast, without gradients.

    name, width (of pooled), token_width (or None), identity: name and a hash of the weights, i.e. what a figure or a cache was made with.
    """

    def __init__(self, name, net, spec, device, probe):
        super().__init__()
        self.name, self.net, self.spec, self.device = name, net.to(device).eval().requires_grad_(False), spec, torch.device(device)
        h = hashlib.sha256()
        for key, value in sorted(net.state_dict().items()):
            h.update(f"{key}{tuple(value.shape)}".encode())
            h.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        self.identity = f"{name}:{h.hexdigest()[:16]}"
        z, tokens, _ = self._run(torch.from_numpy(np.array(probe)).to(device))        # images that do not fit are refused here, before any work
        self.width, self.token_width = z.shape[1], None if tokens is None else tokens.shape[2]

    @torch.no_grad()
    def _run(self, x):
        """(pooled (n, D), tokens (n, T, d) or None, logits (n, K) or None). Resizing: bilinear in pytorch-fid, bicubic in REPA, both without
        antialiasing; CLIP's has it. Flips nothing, crops nothing."""
        x = x.permute(0, 3, 1, 2).float() / 255                       # (n, C, H, W)
        c = getattr(self.net, "channels", 3)
        x = x.expand(-1, 3, -1, -1) if (x.shape[1], c) == (1, 3) else x
        if x.shape[1] != c:
            raise ValueError(f"encoder {self.name} was made for {c} colour channels, the images have {x.shape[1]}; use another encoder or weights")
        # fp32 means fp32: neither autocast nor TF32 convolutions, which cuDNN takes by default
        with torch.autocast(self.device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            if self.spec.size:
                x = F.interpolate(x, (self.spec.size, self.spec.size), mode="bilinear" if self.name == "inception" else "bicubic",
                                  antialias=self.name == "clip")
            mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in NORMS[self.spec.norm])
            return self.net((x - mean) / std)

    def _part(self, x, i, what, who):
        out = self._run(x)[i]
        if out is None:
            raise ValueError(f"encoder {self.name} has no {what}; use {who}")
        return out.float()

    def pooled(self, x):
        return self._part(x, 0, "features", "")                       # (n, D)

    def tokens(self, x):
        return self._part(x, 1, "patch tokens", "dinov2_vits14, dinov2_vitb14, dinov2_vitl14, resnet18, scratch or ddae")   # (n, T, d)

    def logits(self, x):
        return self._part(x, 2, "class logits", "inception or scratch")   # (n, K)


def extract(encoder, images, batch_size=256, kind="pooled", out=None, rows=None, flip=False, bar=None):
    """Features of images[rows] (of all without rows): row j of the answer belongs to rows[j]. kind: pooled, tokens or logits.

    out: an array or memory map of len(rows) rows to write into (float16 will do), else a new float32 one. flip: of the mirrored images.
    bar: something with update(n). Resuming is the caller's: call it again with the rows that are missing.
    """
    rows = np.arange(len(images)) if rows is None else np.asarray(rows)
    for lo in range(0, len(rows), batch_size):
        x = torch.from_numpy(np.array(images[rows[lo:lo + batch_size]])).to(encoder.device)   # (b, H, W, C)
        z = getattr(encoder, kind)(x.flip(2) if flip else x).cpu().numpy()
        out = np.empty((len(rows), *z.shape[1:]), np.float32) if out is None else out
        with np.errstate(over="ignore"):                              # float16 overflow is caught by the next check
            out[lo:lo + len(z)] = z
        if not np.isfinite(out[lo:lo + len(z)]).all():
            raise ValueError(f"encoder {encoder.name} gave NaN, infinity or more than {out.dtype} holds among images {rows[lo]}.."
                             f"{rows[lo + len(z) - 1]}; its weights are damaged")
        if bar is not None:
            bar.update(len(z))
    return out


def load(name, device, weights=None, images=None, **context):
    """The encoder `name`, ready to use. weights: a local file (for clip a folder or a name of its hub), else the usual download.

    images: uint8 (N, H, W, C), what pixels is fitted on and what every other network is tried on. Other context is not needed here.
    """
    if name not in ENCODERS:
        raise ValueError(f"unknown encoder {name!r}; choose one of {', '.join(ENCODERS)}")
    spec, kind = ENCODERS[name], "dinov2" if name in URLS and name.startswith("dinov2") else name
    if kind == "pixels":
        if images is None or weights is not None:
            raise ValueError("encoder pixels is fitted on the data set's images and takes no weights file; give none")
        net = Pixels(images)
    elif kind == "clip":
        net = Clip(weights or CLIP_NAME)
        spec = replace(spec, size=net.net.config.image_size)
    else:
        from models.scratch import Scratch
        state = _read(name, weights)
        try:
            net = {"inception": Inception, "resnet18": ResNet18, "dinov2": Dinov2, "scratch": Scratch.restore, "ddae": Ddae}[kind](state)
        except (ValueError, RuntimeError, KeyError, AttributeError, TypeError, IndexError) as e:   # what a foreign dict leads to
            raise ValueError(f"{weights or URLS[name]}: not usable as weights of encoder {name}: {' '.join(str(e).split())[:200]}; use others") from e
    if not all(v.isfinite().all() for v in net.state_dict().values()):
        raise ValueError(f"{weights or URLS.get(name, name)}: weights of encoder {name} that hold NaN or infinity; use others")
    size = getattr(net, "size", 32)
    return Encoder(name, net, spec, device, np.zeros((1, size, size, getattr(net, "channels", 3)), np.uint8) if images is None else images[:1])


def _read(name, weights):
    """The dict of tensors in a local file or, without one, from torch.hub's folder, where it is downloaded to when absent."""
    url = URLS.get(name)
    if weights is None and url is None:
        raise ValueError(f"encoder {name} reads {'a checkpoint of train.py' if name == 'ddae' else 'a network trained on labels'}: pass the file "
                         "(--encoder-weights PATH)")
    place = Path(weights) if weights is not None else Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    if weights is not None and not place.is_file():
        raise FileNotFoundError(f"{weights}: no such file; encoder {name} expects its weights there" + (f" (official file: {url})" if url else ""))
    try:
        if weights is None:
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, check_hash=True)       # where the name carries one
        state = torch.load(place, map_location="cpu", weights_only=True)
    except Exception as e:                                            # no network: URLError and its kin; a damaged file: torch raises many kinds
        if not place.is_file():
            raise FileNotFoundError(f"encoder {name}: its weights are not on this machine and could not be downloaded ({' '.join(str(e).split())}); "
                                    f"put {url} at {place}, or anywhere and pass it (--encoder-weights PATH)") from e
        raise ValueError(f"{place}: not readable as weights of encoder {name} ({' '.join(str(e).split())[:120]}); the file is damaged, or holds "
                         "pickled code, which is never run") from e
    if not isinstance(state, dict):
        raise ValueError(f"{place}: holds a {type(state).__name__}, but weights of encoder {name} must be a dict of tensors")
    return state


class Inception(nn.Module):
    """pytorch-fid's network: torchvision's layout with four kinds of block patched; pooled = pool3, the input of the 1 008-way layer."""

    def __init__(self, state):
        super().__init__()
        try:
            from pytorch_fid import inception as fid
        except ImportError as e:
            raise ImportError("encoder inception needs the package pytorch-fid: pip install pytorch-fid") from e
        net = fid._inception_v3(num_classes=1008, aux_logits=False, weights=None)
        for block, (width, branch) in {"5b": (192, 32), "5c": (256, 64), "5d": (288, 64)}.items():
            setattr(net, f"Mixed_{block}", fid.FIDInceptionA(width, pool_features=branch))
        for block, width in {"6b": 128, "6c": 160, "6d": 160, "6e": 192}.items():
            setattr(net, f"Mixed_{block}", fid.FIDInceptionC(768, channels_7x7=width))
        net.Mixed_7b, net.Mixed_7c = fid.FIDInceptionE_1(1280), fid.FIDInceptionE_2(2048)
        net.load_state_dict(state)
        self.fc, net.fc, self.net = net.fc, nn.Identity(), net

    def forward(self, x):                                             # (n, 3, 299, 299)
        z = self.net(x)                                               # (n, 2048)
        return z, None, z @ self.fc.weight.T                          # important! without the bias, as ADM's evaluator computes the Inception Score


class ResNet18(nn.Module):
    """torchvision's ResNet-18. Tokens: the layer3 map (14 x 14 x 256) beside the layer4 map (7 x 7 x 512), each cell of which covers 2 x 2 tokens."""

    def __init__(self, state):
        super().__init__()
        from torchvision.models import resnet18
        self.net = resnet18(weights=None)
        self.net.load_state_dict(state)

    def forward(self, x):                                             # (n, 3, 224, 224)
        net = self.net
        low = net.layer3(net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))))   # (n, 256, 14, 14)
        high = net.layer4(low)                                        # (n, 512, 7, 7)
        return high.mean((2, 3)), torch.cat([low, F.interpolate(high, low.shape[2:])], 1).flatten(2).transpose(1, 2), None


class Dinov2(nn.Module):
    """DINOv2's vision transformer (Oquab 2023) under the parameter names of its official files; sizes are read off the state, heads are 64 wide.

    Plain MLP blocks only: neither the giant (SwiGLU) nor the variants with registers load.
    """

    def __init__(self, state):
        super().__init__()
        (hidden, d), patch = state["blocks.0.mlp.fc1.weight"].shape, state["patch_embed.proj.weight"].shape[-1]
        self.cls_token, self.mask_token = nn.Parameter(torch.zeros(1, 1, d)), nn.Parameter(torch.zeros(1, d))   # the mask token serves training only
        self.pos_embed = nn.Parameter(torch.zeros(state["pos_embed"].shape))          # (1, 1 + 37 * 37, d): trained at 518 pixels
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, d, patch, patch)})
        self.blocks = nn.ModuleList(DinoBlock(d, hidden) for _ in {k.split(".")[1] for k in state if k.startswith("blocks.")})
        self.norm = nn.LayerNorm(d, eps=1e-6)
        self.load_state_dict(state)

    def positions(self, h, w):
        """The table resampled to h x w patches. The released models run with the scale (h + 0.1) / 37 instead of h / 37 in the bicubic
        resampling: once a guard against rounding, now part of what their features are."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if (h, w) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)   # (1, d, side, side)
        grid = F.interpolate(grid, scale_factor=((h + 0.1) / side, (w + 0.1) / side), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)

    def forward(self, x):                                             # (n, 3, 224, 224)
        x = self.patch_embed["proj"](x)                               # (n, d, 16, 16)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + self.positions(*x.shape[2:])
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)                                              # (n, 1 + 256, d)
        return x[:, 0], x[:, 1:], None


class DinoBlock(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d, eps=1e-6), nn.LayerNorm(d, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(d, 3 * d), "proj": nn.Linear(d, d)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(d, hidden), "fc2": nn.Linear(hidden, d)})
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": nn.Parameter(torch.ones(d))}) for _ in range(2))   # LayerScale

    def forward(self, x):                                             # (n, T, d)
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, -1, 64)).permute(2, 0, 3, 1, 4)   # each (n, heads, T, 64)
        x = x + self.ls1["gamma"] * self.attn["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.ls2["gamma"] * self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Clip(nn.Module):
    def __init__(self, where):
        super().__init__()
        try:
            from transformers import CLIPVisionModelWithProjection
            self.net, info = CLIPVisionModelWithProjection.from_pretrained(where, output_loading_info=True)
        except ImportError as e:
            raise ImportError("encoder clip needs the package transformers: pip install transformers") from e
        except Exception as e:                                        # absent, offline, damaged: many kinds
            raise FileNotFoundError(f"encoder clip: cannot load {where} ({' '.join(str(e).split())[:160]}); put a copy of "
                                    f"https://huggingface.co/{CLIP_NAME} into a folder and pass it (--encoder-weights PATH)") from e
        if info["missing_keys"]:                                      # important! transformers would go on with random weights
            raise ValueError(f"{where}: not the weights of a CLIP image encoder: {sorted(info['missing_keys'])[0]} is missing")

    def forward(self, x):
        return self.net(pixel_values=x).image_embeds, None, None


class Pixels(nn.Module):
    """PCA of pixels in [0, 1]: at most 64 components, fitted in float64 on at most 20 000 images spread evenly over the set.

    Images of more than 3 072 values are first averaged down to 32 x 32. The largest entry of each component is positive.
    """

    def __init__(self, images):
        super().__init__()
        self.channels, self.shape = images.shape[3], images.shape[1:3]
        rows = np.unique(np.linspace(0, len(images) - 1, min(20_000, len(images))).astype(np.int64))
        total = second = 0
        for part in np.array_split(rows, -(-len(rows) // 1000)):
            x = self.flat(torch.from_numpy(np.array(images[part])).permute(0, 3, 1, 2).double() / 255)   # (b, P)
            total, second = total + x.sum(0), second + x.T @ x
        mean = total / len(rows)
        _, v = torch.linalg.eigh(second / len(rows) - torch.outer(mean, mean))
        v = v.flip(1)[:, :max(1, min(64, len(rows) - 1))]             # (P, D), by falling variance
        self.register_buffer("mean", mean.float())
        self.register_buffer("components", (v * v.gather(0, v.abs().argmax(0, keepdim=True)).sign()).float())

    def flat(self, x):                                                # (n, C, H, W) -> (n, P)
        return (F.interpolate(x, (32, 32), mode="area") if math.prod(x.shape[1:]) > 3072 else x).flatten(1)

    def forward(self, x):
        if x.shape[2:] != self.shape:
            raise ValueError(f"encoder pixels was fitted on {self.shape[0]} x {self.shape[1]} images, these are {x.shape[2]} x {x.shape[3]}")
        return (self.flat(x) - self.mean) @ self.components, None, None


class Ddae(nn.Module):
    """Features of a diffusion model of our own (Xiang et al. 2023, DDAE): the middle block's tokens for slightly noised images.

    Every image meets the same noise, so a feature depends on its image alone; the null class, so labels do not leak into it.
    """
    U = 0.05                                                          # our choice time of the noised images, 0 data .. 1 noise

    def __init__(self, state):
        super().__init__()
        from models.build import from_checkpoint
        self.net, self.process = from_checkpoint(state, ema=True)
        if state["args"].get("label_drop") == 0:
            raise ValueError("the checkpoint was trained without label dropout (--label-drop 0), and the null class, with which images are encoded, means nothing to it; train with --label-drop above 0, or name another encoder")
        self.channels, self.size = self.net.channels, self.net.size
        if self.channels not in (1, 3):
            raise ValueError(f"the checkpoint works on latents of {self.channels} channels; features need one that was trained on pixels")
        self.register_buffer("eps", torch.randn(1, self.channels, self.size, self.size, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):                                             # (n, C, H, W) in [-1, 1]
        if x.shape[2:] != self.eps.shape[2:]:
            raise ValueError(f"encoder ddae: the checkpoint draws {self.size} x {self.size} images, these are {x.shape[2]} x {x.shape[3]}")
        u, null = torch.full((len(x),), self.U, device=x.device), torch.full((len(x),), self.net.num_classes, device=x.device)
        x = self.process.diffuse(x, u, self.eps.expand_as(x))
        _, tokens = self.net(x, self.process.model_time(u), null, tokens_after=self.net.token_layer)   # (n, T, D)
        return tokens.float().mean(1), tokens, None
