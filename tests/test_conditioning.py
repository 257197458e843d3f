"""models/conditioning.py: class and text embedding, label dropout, time embedding and the alignment loss against plain loops."""
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from models.build import build, from_checkpoint
from models.conditioning import (ConditionEmbedder, Projector, align_depth, alignment_loss, drop_labels, match_grid, mean_token_cosine,
                                 timestep_embedding)

K, L, D_TEXT, WIDTH = 3, 4, 5, 8


def tokens(seed=0, L=L):
    """Text tokens (K, L, d) float16 and a mask (K, L) with another number of tokens per class."""
    g = np.random.default_rng(seed)
    mask = np.arange(L)[None] < np.array([[L], [max(1, L - 2)], [1]])
    return g.standard_normal((K, L, D_TEXT)).astype(np.float16), mask


def randomised(module, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=g))
    return module


def dc_embedding(e, y, text, mask):
    """D2C, Eq. 9 and 10, for one label y, scalar by scalar: tt = Conv1d(tokens * mask), y_text = MLP(tt) + tt + e_y. Null: tokens of zeros."""
    p = {k: v.detach().double().numpy() for k, v in e.named_parameters()}
    L_ = text.shape[1]
    tt = np.zeros(WIDTH)
    for o in range(WIDTH):
        tt[o] = p["conv.bias"][o]
        for l in range(L_):
            for d in range(D_TEXT):
                tt[o] += p["conv.weight"][o, d, l] * (float(text[y, l, d]) * float(mask[y, l]) if y < K else 0.0)
    mean = sum(tt) / WIDTH
    var = sum((v - mean) ** 2 for v in tt) / WIDTH
    h = np.array([(v - mean) / math.sqrt(var + 1e-5) for v in tt])
    h = p["mlp.1.weight"] @ h + p["mlp.1.bias"]
    h = np.array([v / (1 + math.exp(-v)) for v in h])
    return p["mlp.3.weight"] @ h + p["mlp.3.bias"] + tt + p["embedding_table.weight"][y]


@pytest.mark.parametrize("length", [1, 4])
def test_dc_embedding_against_a_plain_loop(length):
    text, mask = tokens(L=length)
    e = randomised(ConditionEmbedder(K, WIDTH, text, mask))
    out = e(torch.tensor([2, 0, 3, 1, 3]))
    for row, y in zip(out, (2, 0, 3, 1, 3)):
        np.testing.assert_allclose(row.detach().numpy(), dc_embedding(e, y, text, mask), rtol=1e-4, atol=1e-5)


def test_masked_tokens_have_no_influence():
    text, mask = tokens()
    y, other = torch.arange(K + 1), text.copy()
    other[~mask] = 1000.0
    a, b, c = (randomised(ConditionEmbedder(K, WIDTH, t, m))(y) for t, m in ((text, mask), (other, mask), (other, None)))
    assert torch.equal(a, b)
    assert not torch.allclose(a[1], c[1]) and torch.equal(a[0], c[0])           # class 0 has no masked token


def test_without_text_the_table_alone_with_its_spread():
    torch.manual_seed(0)
    e = ConditionEmbedder(1000, 64, std=0.3)
    assert list(e.state_dict()) == ["embedding_table.weight"] and e.embedding_table.weight.shape == (1001, 64)
    assert abs(e.embedding_table.weight.std().item() - 0.3) < 0.01
    y = torch.tensor([1000, 0, 7])
    assert torch.equal(e(y), e.embedding_table.weight[y])


def test_label_dropout_is_per_sample_and_takes_the_text_along():
    y, uniform = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0.05, 0.5, 0.0, 0.1, 0.0999])
    dropped = drop_labels(y, 0.1, K, uniform)
    assert dropped.tolist() == [K, 1, K, 0, K] and y.tolist() == [0, 1, 2, 0, 1]
    assert drop_labels(y, 0.0, K, uniform).tolist() == y.tolist() and drop_labels(y, 1.0, K, uniform).tolist() == [K] * 5
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    assert abs((drop_labels(torch.zeros(20_000, dtype=torch.long), 0.1, K, u) == K).float().mean().item() - 0.1) < 0.01
    text, mask = tokens()
    e = randomised(ConditionEmbedder(K, WIDTH, text, mask))
    null = dc_embedding(e, K, text, mask)                             # zero text and null class at once, for each dropped sample
    out = e(dropped).detach().numpy()
    np.testing.assert_allclose(out[[0, 2, 4]], np.stack([null] * 3), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out[1], dc_embedding(e, 1, text, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["SiT-T/4", "unet-tiny"])
def test_text_travels_in_the_checkpoint(name, tmp_path):
    """Sampling needs neither text.npy nor the encoder: the settings carry the shape, the state dict the tokens."""
    text, mask = tokens()
    settings = dict(model=name, process="flow", size=8, channels=1, num_classes=K, text_shape=list(text.shape[1:]), class_std=1.0)
    model = randomised_model(build(settings, text, mask))
    torch.save({"ema": model.state_dict(), "model": model.state_dict(), "args": settings}, tmp_path / "last.pt")
    again, _ = from_checkpoint(torch.load(tmp_path / "last.pt", weights_only=True))
    assert torch.equal(again.y_embedder.text[:K], torch.from_numpy(text).float() * torch.from_numpy(mask)[..., None])
    assert again.y_embedder.text[K].abs().max() == 0
    x, t, y = torch.randn(4, 1, 8, 8), torch.full((4,), 0.3), torch.arange(4)
    assert torch.equal(again(x, t, y), model.eval()(x, t, y))
    with torch.no_grad():
        again.y_embedder.text[0] += 1
    assert (again(x, t, y) - model(x, t, y)).abs().amax((1, 2, 3)).gt(1e-6).tolist() == [True, False, False, False]


def randomised_model(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


# ---------------------------------------------------------------------------------------------- time
def test_timestep_embedding_against_a_plain_loop():
    t = torch.tensor([0.0, 0.37, 1.0, 5.0, 999.0])
    got = timestep_embedding(t, 16)
    for row, v in zip(got, t.tolist()):
        for k in range(8):
            w = 10_000 ** (-k / 8)
            assert abs(row[k].item() - math.cos(v * w)) < 1e-4 and abs(row[8 + k].item() - math.sin(v * w)) < 1e-4
    assert got.shape == (5, 16) and timestep_embedding(t.half(), 16).dtype == torch.float32


# ---------------------------------------------------------------------------------------------- alignment
def plain_alignment(a, b):
    """-mean over tokens of the cosine, one value per sample, in Python floats."""
    out = []
    for i in range(len(a)):
        total = 0.0
        for p, q in zip(a[i].double().tolist(), b[i].double().tolist()):
            total += sum(x * y for x, y in zip(p, q)) / math.sqrt(sum(x * x for x in p)) / math.sqrt(sum(y * y for y in q))
        out.append(-total / a.shape[1])
    return torch.tensor(out)


@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1.0), (torch.float16, 8000.0), (torch.bfloat16, 1e18), (torch.float16, 1e-4)])
def test_alignment_loss_against_a_plain_loop(dtype, scale):
    """float16 features of norm 8 000 sqrt(d) have squares beyond its range: the sum must be taken in float32."""
    g = torch.Generator().manual_seed(0)
    p, v = ((scale * torch.randn(3, 4, 6, generator=g)).to(dtype) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = alignment_loss(p, v)
    outside = alignment_loss(p, v)
    torch.testing.assert_close(outside, plain_alignment(p, v), rtol=1e-4, atol=1e-5)
    assert torch.equal(inside, outside) and outside.dtype == torch.float32 and outside.shape == (3,)


def test_alignment_loss_limits_and_zero_vectors():
    v = torch.randn(2, 3, 5)
    torch.testing.assert_close(alignment_loss(7 * v, v), torch.tensor([-1.0, -1.0]))
    torch.testing.assert_close(alignment_loss(-v, v), torch.tensor([1.0, 1.0]))
    p = torch.zeros(2, 3, 5, requires_grad=True)
    alignment_loss(p, v).sum().backward()
    assert p.grad.isfinite().all()


def test_match_grid():
    v = torch.randn(2, 16, 3)
    assert match_grid(v, 16) is v
    rect = torch.randn(2, 6, 3)
    assert match_grid(rect, 6) is rect                                # equal counts need no square
    for T, tokens in ((6, 16), (16, 6)):
        with pytest.raises(ValueError, match="square"):
            match_grid(torch.randn(2, T, 3), tokens)
    plane = torch.randn(2, 64, 3)
    for side in (4, 5, 16):                                           # triangle filter around each new centre, widened when the grid shrinks
        scale, width = 8 / side, max(8 / side, 1.0)
        W = np.zeros((side, 8))
        for i in range(side):
            for k in range(8):
                W[i, k] = max(0.0, 1 - abs(k + 0.5 - (i + 0.5) * scale) / width)
            W[i] /= W[i].sum()
        got = match_grid(plane, side * side).reshape(2, side, side, 3).double()
        for n in range(2):
            for d in range(3):
                want = W @ plane[n, :, d].reshape(8, 8).double().numpy() @ W.T
                np.testing.assert_allclose(got[n, :, :, d].numpy(), want, rtol=0, atol=1e-5)
    assert match_grid(plane.half(), 16).dtype == torch.float32


def test_mean_token_cosine_is_what_the_best_constant_reaches():
    g = np.random.default_rng(0)
    v = (g.standard_normal((5, 4, 6)) + np.linspace(0, 2, 6)).astype(np.float16)
    unit = [row / np.linalg.norm(row) for row in v.reshape(-1, 6).astype(np.float64)]
    mean = sum(unit) / len(unit)
    const = mean / np.linalg.norm(mean)
    want = sum(float(u @ const) for u in unit) / len(unit)            # no constant does better: (mean of units) . c is largest along itself
    assert abs(mean_token_cosine(v) - want) < 1e-5
    assert abs(mean_token_cosine(torch.from_numpy(v)) - want) < 1e-5
    for _ in range(20):
        c = g.standard_normal(6)
        assert sum(float(u @ c) for u in unit) / len(unit) / np.linalg.norm(c) <= want
    assert abs(mean_token_cosine(np.ones((2, 3, 4), np.float16)) - 1) < 1e-6


@pytest.mark.parametrize("shape", [(40, 16, 8), (20, 2, 16, 8)])
def test_the_constant_is_measured_on_the_grid_that_is_aligned_to(shape):
    """Tokens averaged to a coarser grid lose their noise: a constant reaches far more there, and that is what an alignment has to beat."""
    v = (np.random.default_rng(3).standard_normal(shape) + 0.5).astype(np.float16)
    flat = torch.from_numpy(v.astype(np.float32)).reshape(-1, 16, 8)
    coarse = torch.stack([match_grid(x[None], 4)[0] for x in flat])
    unit = coarse / coarse.norm(dim=-1, keepdim=True)
    assert mean_token_cosine(v, 4) == pytest.approx(unit.reshape(-1, 8).mean(0).norm().item(), abs=1e-5)
    assert mean_token_cosine(v, 16) == pytest.approx(mean_token_cosine(v), abs=1e-6) and mean_token_cosine(v, 4) > 1.3 * mean_token_cosine(v)


def test_align_depth():
    assert {d: align_depth(d) for d in (1, 2, 3, 4, 5, 7, 8, 12, 24, 28)} == {1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 7: 2, 8: 8, 12: 8, 24: 8, 28: 8}


def test_projector():
    p = Projector(1152, 768)
    assert {k: tuple(v.shape) for k, v in p.state_dict().items()} == {
        "0.weight": (2048, 1152), "0.bias": (2048,), "2.weight": (2048, 2048), "2.bias": (2048,), "4.weight": (768, 2048), "4.bias": (768,)}
    p = randomised(Projector(4, 3, hidden=6)).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    h = x.numpy()
    for k in (0, 2, 4):
        h = h @ p[k].weight.detach().numpy().T + p[k].bias.detach().numpy()
        h = h / (1 + np.exp(-h)) if k < 4 else h
    np.testing.assert_allclose(p(x).detach().numpy(), h, rtol=1e-10)


def test_it_can_be_lifted_alone():
    """Importing it loads none of the kit's other files but the empty models/__init__.py, and few lines."""
    code = "import sys; import models.conditioning; print(*sorted(m for m in sys.modules if m.split('.')[0] in ('models', 'common', 'einops')))"
    root = Path(__file__).parent.parent
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert out.stdout.split() == ["models", "models.conditioning"]
    assert sum(len((root / "models" / f).read_text().splitlines()) for f in ("__init__.py", "conditioning.py")) < 450
