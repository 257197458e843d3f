"""models/sit.py, models/unet.py, models/build.py, models/official.py: the official names, shapes and forward of DiT/SiT, the DDPM U-Net, models from checkpoints."""
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn as nn

from models.build import MODELS, Network, build, from_checkpoint, init_from, knows, text_of
from models.conditioning import ConditionEmbedder
from models.diffusion import DDPM, Flow, make_process
from models.mdt import MDT
from models.official import official_checkpoint, reverse_time
from models.sit import SIZES, SiT
from models.unet import Down, ResBlock, SelfAttention, UNet

SIT = dict(model="SiT-T/2", process="flow", size=8, channels=1, num_classes=3)
UNET = dict(model="unet-tiny", process="ddpm", size=8, channels=1, num_classes=3)


def randomised(model, seed=0):
    """Every weight random and far from zero, modulations and outputs too: adaLN-Zero would hide whatever stands behind a gate of zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.5))
    return model


def batch(n=3, channels=1, size=8, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, size, size, generator=g)


# ---------------------------------------------------------------------------------------------- SiT: a second implementation
def linear(p, name, x):
    return p[f"{name}.weight"] @ x + p[f"{name}.bias"]


def silu(x):
    return x / (1 + np.exp(-x))


def layer_norm(x):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6)


def plain_sit(p, x, t, y, depth, heads, patch, channels):
    """One image x (C, H, W), token by token in float64 numpy. p: the state dict as arrays. Returns (output (C, H, W), tokens after each block)."""
    C, H, W = x.shape
    D, h, w = p["x_embedder.proj.bias"].shape[0], H // patch, W // patch
    freq = [10_000 ** (-k / 128) for k in range(128)]
    emb = np.array([math.cos(t * f) for f in freq] + [math.sin(t * f) for f in freq])                # cos, then sin
    c = linear(p, "t_embedder.mlp.2", silu(linear(p, "t_embedder.mlp.0", emb))) + p["y_embedder.embedding_table.weight"][y]
    X = []
    for r in range(h):
        for col in range(w):
            piece = x[:, r * patch:(r + 1) * patch, col * patch:(col + 1) * patch]
            token = p["x_embedder.proj.bias"] + np.array([(p["x_embedder.proj.weight"][d] * piece).sum() for d in range(D)])
            where = [fn(v / 10_000 ** (k / (D // 4))) for v in (col, r) for fn in (math.sin, math.cos) for k in range(D // 4)]      # w first
            X.append(token + np.array(where))
    X, after = np.array(X), []
    for b in range(depth):
        name, hd = f"blocks.{b}", D // heads
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear(p, f"{name}.adaLN_modulation.1", silu(c)).reshape(6, D)
        qkv = np.array([linear(p, f"{name}.attn.qkv", layer_norm(v) * (1 + scale_a) + shift_a) for v in X])
        out = np.zeros_like(X)
        for i in range(heads):
            q, k, v = (qkv[:, part * D + i * hd:part * D + (i + 1) * hd] for part in range(3))       # (T, hd): q of all heads, then k, then v
            for token in range(len(X)):
                score = np.exp(k @ q[token] / math.sqrt(hd))
                out[token, i * hd:(i + 1) * hd] = (score / score.sum()) @ v
        X = X + gate_a * np.array([linear(p, f"{name}.attn.proj", v) for v in out])
        for token, v in enumerate(X):
            u = linear(p, f"{name}.mlp.fc1", layer_norm(v) * (1 + scale_m) + shift_m)
            u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))              # GELU, tanh form
            X[token] = v + gate_m * linear(p, f"{name}.mlp.fc2", u)
        after.append(X.copy())
    shift, scale = linear(p, "final_layer.adaLN_modulation.1", silu(c)).reshape(2, D)
    image = np.zeros((channels, H, W))
    for token, v in enumerate(X):
        out = linear(p, "final_layer.linear", layer_norm(v) * (1 + scale) + shift).reshape(patch, patch, -1)
        for a in range(patch):
            for b in range(patch):
                for ch in range(channels):                            # the first half when sigma is learned
                    image[ch, token // w * patch + a, token % w * patch + b] = out[a, b, ch]
    return image, after


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_sit_forward_against_a_second_implementation(learn_sigma):
    model = randomised(SiT(6, 2, 3, depth=2, width=24, heads=3, patch=2, learn_sigma=learn_sigma)).eval()
    p = {k: v.double().numpy() for k, v in model.state_dict().items() if k != "pos_embed"}
    x, t, y = batch(3, 2, 6), torch.tensor([0.3, 0.97, 517.0]), torch.tensor([2, 3, 0])              # flow times, and an index of DDPM; 3 = null
    with torch.no_grad():
        out, tokens = model(x, t, y, tokens_after=1)
        assert out.shape == x.shape and torch.equal(out, model(x, t, y))
    for i in range(3):
        want, after = plain_sit(p, x[i].double().numpy(), t[i].item(), int(y[i]), 2, 3, 2, 2)
        assert np.abs(want).max() > 0.5
        np.testing.assert_allclose(out[i].numpy(), want, rtol=0, atol=2e-5)
        np.testing.assert_allclose(tokens[i].numpy(), after[0], rtol=0, atol=2e-5)


def test_sit_layer_norms_have_the_official_epsilon():
    norms = [m for m in build(SIT).modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 2 * 4 + 1 and all(m.eps == 1e-6 and not m.elementwise_affine for m in norms)


# ---------------------------------------------------------------------------------------------- SiT: names, shapes, sizes
def official_names(depth, D, patch, channels, K, tokens, out):
    """The state dict of facebookresearch/DiT and willisma/SiT."""
    names = {"pos_embed": (1, tokens, D),
             "x_embedder.proj.weight": (D, channels, patch, patch), "x_embedder.proj.bias": (D,),
             "t_embedder.mlp.0.weight": (D, 256), "t_embedder.mlp.0.bias": (D,), "t_embedder.mlp.2.weight": (D, D), "t_embedder.mlp.2.bias": (D,),
             "y_embedder.embedding_table.weight": (K + 1, D),
             "final_layer.linear.weight": (patch * patch * out, D), "final_layer.linear.bias": (patch * patch * out,),
             "final_layer.adaLN_modulation.1.weight": (2 * D, D), "final_layer.adaLN_modulation.1.bias": (2 * D,)}
    for i in range(depth):
        for part, rows, cols in (("attn.qkv", 3 * D, D), ("attn.proj", D, D), ("mlp.fc1", 4 * D, D), ("mlp.fc2", D, 4 * D),
                                 ("adaLN_modulation.1", 6 * D, D)):
            names[f"blocks.{i}.{part}.weight"], names[f"blocks.{i}.{part}.bias"] = (rows, cols), (rows,)
    return names


@pytest.mark.parametrize("name, depth, width, heads", [("S", 12, 384, 6), ("B", 12, 768, 12), ("L", 24, 1024, 16), ("XL", 28, 1152, 16)])
def test_sit_has_the_official_names_and_shapes(name, depth, width, heads):
    assert SIZES[name] == dict(depth=depth, width=width, heads=heads)
    for patch in (2, 8):
        with torch.device("meta"):
            model = build(dict(model=f"SiT-{name}/{patch}", process="flow", size=32, channels=4, num_classes=1000, learn_sigma=True))
        got = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        assert got == official_names(depth, width, patch, 4, 1000, (32 // patch) ** 2, 8)
    assert model.blocks[0].attn.heads == heads


def test_sit_xl_2_has_675_million_parameters():
    with torch.device("meta"):
        model = build(dict(model="SiT-XL/2", process="flow", size=32, channels=4, num_classes=1000, learn_sigma=True))
    assert sum(p.numel() for p in model.parameters()) == 675_129_632
    assert not model.pos_embed.requires_grad and model.token_layer == 8 and model.token_width == 1152


def test_sit_starts_as_adaln_zero():
    model = build(SIT)
    x, y = batch(), torch.tensor([0, 1, 2])
    out, tokens = model(x, torch.rand(3), y, tokens_after=4)
    assert out.abs().max() == 0                                       # zero output, and every block the identity
    torch.testing.assert_close(tokens, model.x_embedder(x) + model.pos_embed)
    assert model.t_embedder.mlp[0].weight.std().item() == pytest.approx(math.sqrt(2 / (256 + 64)), rel=0.1)         # the tiny size: Xavier
    bound = math.sqrt(6 / (64 + 192))                                 # Xavier, uniform
    assert 0.9 * bound < model.blocks[0].attn.qkv.weight.abs().max().item() <= bound
    assert 0.8 * math.sqrt(6 / (64 + 4)) < model.x_embedder.proj.weight.abs().max().item() <= math.sqrt(6 / (64 + 4))    # fans of the flattened patch


def test_only_the_tiny_size_stretches_flow_time():
    """Official sizes see SiT's unscaled t in [0, 1] through N(0, 0.02) weights, or their checkpoints would mean something else; a ddpm time is 0..999 anyway."""
    official = build({**SIT, "model": "SiT-S/2"})
    assert official.t_embedder.scale == 1 and official.t_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert build({**SIT, "process": "flow"}).t_embedder.scale == 100 and build({**SIT, "process": "ddpm"}).t_embedder.scale == 1


def test_sit_tokens_are_those_after_block_k():
    model = randomised(build(SIT)).eval()
    x, t, y = batch(), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 3, 2])
    h, c = model.x_embedder(x) + model.pos_embed, model.t_embedder(t) + model.y_embedder(y)
    plain = model(x, t, y)
    for k, block in enumerate(model.blocks, 1):
        h = block(h, c)
        out, tokens = model(x, t, y, tokens_after=k)
        assert torch.equal(tokens, h) and torch.equal(out, plain) and tokens.shape == (3, 16, 64)


def test_learned_sigma_is_dropped():
    model = randomised(SiT(8, 3, 2, depth=1, width=16, heads=2, patch=4, learn_sigma=True)).eval()
    x, t, y = batch(2, 3), torch.tensor([0.2, 0.6]), torch.tensor([0, 1])
    out = model(x, t, y)
    assert out.shape == (2, 3, 8, 8)
    rows = model.final_layer.linear.weight.data.view(16, 6, 16)       # (pixel of the patch, channel, D)
    rows[:, 3:] = 100
    assert torch.equal(model(x, t, y), out)
    rows[:, 2] *= 2
    assert torch.equal(model(x, t, y)[:, :2], out[:, :2]) and not torch.equal(model(x, t, y)[:, 2], out[:, 2])


def test_reversed_time():
    """For one pair of data and noise the official field is data - noise along s data + (1 - s) noise; with s = 1 - t and the sign turned it is our target on
    our path: what reverse_time bakes into the weights."""
    data, noise, t = batch(seed=2), batch(seed=3), torch.tensor([0.25, 0.5, 0.75])
    process, s = make_process("flow"), (1 - t).view(-1, 1, 1, 1)
    torch.testing.assert_close(process.diffuse(data, t, noise), s * data + (1 - s) * noise)
    assert torch.equal(process.target(data, t, noise), -(data - noise)) and torch.equal(process.model_time(t), t)


@pytest.mark.parametrize("settings", [SIT, UNET], ids=["sit", "unet"])
def test_recomputation_gives_the_same_gradients(settings):
    x, t, y, grads = batch(), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 3, 2]), []
    for recompute in (False, True):
        model = randomised(build({**settings, "recompute": recompute})).train()
        out, tokens = model(x, t, y, tokens_after=model.token_layer)
        (out.square().mean() + tokens.square().mean()).backward()
        grads.append({k: p.grad for k, p in model.named_parameters() if p.requires_grad})
        assert all(g is not None and g.abs().max() > 0 for g in grads[-1].values())
    for k in grads[0]:
        torch.testing.assert_close(grads[0][k], grads[1][k], msg=k)


def test_recomputation_keeps_less_for_the_backward_pass():
    """A flag that changed nothing would pass the test of gradients."""
    kept = []
    for settings in (SIT, UNET):
        for recompute in (False, True):
            total, model = [0], build({**settings, "recompute": recompute}).train()
            with torch.autograd.graph.saved_tensors_hooks(lambda v: total.__setitem__(0, total[0] + v.numel()) or v, lambda v: v):
                model(batch(), torch.rand(3), torch.tensor([0, 1, 2]))
            kept.append(total[0])
    assert kept[1] < 0.5 * kept[0] and kept[3] < 0.7 * kept[2], kept


# ---------------------------------------------------------------------------------------------- U-Net
def test_the_unconditional_unet_is_the_ddpm_network():
    with torch.device("meta"):
        model = build(dict(model="unet", process="ddpm", size=32, channels=3, num_classes=0))
    assert sum(p.numel() for p in model.parameters()) == 35_746_307
    assert all(m.num_groups == 32 and m.eps == 1e-6 for m in model.modules() if isinstance(m, nn.GroupNorm))
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.1} and model.y_embedder is None
    assert sum(isinstance(m, ResBlock) for m in model.modules()) == 4 * 2 + 2 + 4 * 3


def test_unet_attends_at_16_and_in_the_middle_only():
    model = build(dict(model="unet", process="ddpm", size=32, channels=3, num_classes=10)).eval()
    seen = []
    for m in model.modules():
        if isinstance(m, SelfAttention):
            m.register_forward_hook(lambda m, i, o: seen.append((tuple(i[0].shape[1:]), m is model.mid1.attn)))
    with torch.no_grad():
        out = model(torch.randn(1, 3, 32, 32), torch.tensor([10.0]), torch.tensor([10]))
    assert out.shape == (1, 3, 32, 32)
    assert [s for s, mid in seen if mid] == [(256, 4, 4)] and [s for s, mid in seen if not mid] == [(256, 16, 16)] * 5     # 2 down, 3 up


@pytest.mark.parametrize("name, size, channels", [("unet-small", 16, 3), ("unet-tiny", 8, 1)])
def test_unet_shape_and_tokens(name, size, channels):
    model = randomised(build(dict(model=name, process="ddpm", size=size, channels=channels, num_classes=2))).eval()
    middle = []
    model.mid2.register_forward_hook(lambda m, i, o: middle.append(o))
    x, t, y = batch(2, channels, size), torch.tensor([3.0, 900.0]), torch.tensor([0, 2])
    out, tokens = model(x, t, y, tokens_after=1)
    assert out.shape == x.shape and torch.equal(out, model(x, t, y))
    assert tokens.shape == (2, model.grid**2, model.token_width)
    for r in range(model.grid):
        for c in range(model.grid):
            assert torch.equal(tokens[:, r * model.grid + c], middle[0][:, :, r, c])


def test_down_pads_as_tensorflow_does():
    """SAME with kernel 3, stride 2 and an even size: one row below and one column to the right, so that output (i, j) reads rows 2i..2i+2."""
    torch.manual_seed(0)
    m, x = Down(2).double(), torch.randn(1, 2, 6, 6, dtype=torch.float64)
    w, b = m.conv.weight.detach(), m.conv.bias.detach()
    out = m(x)
    assert out.shape == (1, 2, 3, 3)
    for o in range(2):
        for i in range(3):
            for j in range(3):
                total = b[o].item()
                for c in range(2):
                    for k in range(3):
                        for l in range(3):
                            if 2 * i + k < 6 and 2 * j + l < 6:
                                total += (w[o, c, k, l] * x[0, c, 2 * i + k, 2 * j + l]).item()
                assert abs(out[0, o, i, j].item() - total) < 1e-10


def test_unet_attention_and_residual_block_against_plain_loops():
    torch.manual_seed(0)
    m, x = randomised(SelfAttention(16)).double(), torch.randn(2, 16, 2, 3, dtype=torch.float64)
    h = m.norm(x).flatten(2)                                          # (n, c, hw)
    w, b = m.qkv.weight[:, :, 0, 0], m.qkv.bias
    q, k, v = (w[s] @ h + b[s, None] for s in (slice(0, 16), slice(16, 32), slice(32, 48)))
    out = torch.zeros_like(h)
    for i in range(2):
        for pos in range(6):
            score = torch.softmax(torch.stack([q[i, :, pos] @ k[i, :, other] / 4 for other in range(6)]), 0)
            out[i, :, pos] = sum(s * v[i, :, other] for other, s in enumerate(score))
    want = x + (m.proj.weight[:, :, 0, 0] @ out + m.proj.bias[:, None]).view_as(x)
    torch.testing.assert_close(m(x), want)
    r = randomised(ResBlock(16, 8, 5, 0.5)).double().eval()
    emb = torch.randn(2, 5, dtype=torch.float64)
    h = r.conv1(torch.nn.functional.silu(torch.nn.functional.group_norm(x, 8, r.norm1.weight, r.norm1.bias, 1e-6)))
    h = h + (emb @ r.emb.weight.T + r.emb.bias)[:, :, None, None]
    h = r.conv2(torch.nn.functional.silu(torch.nn.functional.group_norm(h, 8, r.norm2.weight, r.norm2.bias, 1e-6)))
    torch.testing.assert_close(r(x, emb), r.skip(x) + h)


def test_unet_starts_near_zero_and_as_the_identity():
    model = build({**UNET, "num_classes": 0})
    assert model(batch(), torch.rand(3) * 999).abs().max() < 1e-3     # the output's gain is 1e-5
    block = model.mid2
    h = torch.randn(2, 64, 4, 4)
    assert (block(h, torch.randn(2, 128)) - h).abs().max() < 1e-3


def test_dropout_acts_in_training_only():
    model = randomised(build({**UNET, "dropout": 0.5}))
    x, t, y = batch(), torch.full((3,), 100.0), torch.tensor([0, 1, 2])
    assert not torch.equal(model.train()(x, t, y), model(x, t, y))
    assert torch.equal(model.eval()(x, t, y), model(x, t, y))
    still = randomised(build({**UNET, "dropout": 0.0})).train()
    assert torch.equal(still(x, t, y), model(x, t, y))


@pytest.mark.parametrize("settings", [SIT, {**SIT, "process": "ddpm"}, UNET, {**UNET, "process": "flow"}],
                         ids=["sit flow", "sit ddpm", "unet ddpm", "unet flow"])
def test_time_class_and_null_class_matter(settings):
    model = randomised(build(settings)).eval()
    x, scale = batch(1).expand(4, -1, -1, -1), 1 if settings["process"] == "flow" else 1000
    by_class = model(x, torch.full((4,), 0.5 * scale), torch.arange(4))                       # 3 = null: the row K, whatever K is
    by_time = model(x, torch.tensor([0.2, 0.21, 0.5, 0.9]) * scale, torch.zeros(4, dtype=torch.long))
    for out in (by_class, by_time):
        for i in range(4):
            for j in range(i):
                assert (out[i] - out[j]).abs().max() > 1e-3, (i, j)
    assert model.y_embedder.embedding_table.weight.shape[0] == 4
    with pytest.raises(IndexError):
        model(x, torch.zeros(4), torch.full((4,), 4))


def test_a_unet_of_a_flow_sees_a_thousand_times_the_time():
    a, b = (randomised(build({**UNET, "process": p})).eval() for p in ("ddpm", "flow"))
    x, y = batch(), torch.tensor([0, 1, 2])
    t = torch.tensor([0.125, 0.5, 0.75])
    assert b.time_scale == 1000 and torch.equal(b(x, t, y), a(x, 1000 * t, y)) and not torch.allclose(b(x, t, y), a(x, t, y))


# ---------------------------------------------------------------------------------------------- a model from its settings
@pytest.mark.parametrize("change, message", [
    (dict(model="SiT-H/2"), "unknown model"), (dict(size=9), "multiple of the patch"), (dict(model="unet-tiny", size=7), "halved")])
def test_settings_that_do_not_work(change, message):
    with pytest.raises(ValueError, match=message):
        build({**SIT, **change})


def checkpoint(settings, seed=0):
    model = randomised(build(settings), seed)
    raw = {k: v + 1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    return model.eval(), {"model": raw, "ema": copy.deepcopy(model.state_dict()), "args": {**settings, "predict": "v", "steps": 7}}


@pytest.mark.parametrize("settings", [SIT, {**SIT, "model": "SiT-T/4", "process": "ddpm"}, UNET, {**UNET, "process": "flow"},
                                      {**UNET, "num_classes": 0}],
                         ids=["sit flow", "sit ddpm", "unet ddpm", "unet flow", "unet without classes"])
def test_checkpoint_round_trip(settings, tmp_path):
    model, state = checkpoint(settings)
    torch.save(state, tmp_path / "last.pt")
    again, process = from_checkpoint(torch.load(tmp_path / "last.pt", weights_only=True))
    x, t, y = batch(), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 0, 0])
    assert torch.equal(again(x, t, y), model(x, t, y))                # the EMA, not the raw weights
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert process.name == settings["process"] and process.predict == "v"
    raw, _ = from_checkpoint(state, ema=False)
    assert torch.equal(next(raw.parameters()), state["model"][next(iter(dict(raw.named_parameters())))])


def test_checkpoints_that_do_not_fit():
    def refused(message, change=(), drop=None, ema=None, **kw):
        state = checkpoint(SIT)[1]
        state["args"].update(change)
        state["args"].pop(drop, None)
        state["ema"].update(ema or {})
        with pytest.raises(ValueError, match=message) as e:
            from_checkpoint(state, **kw)
        assert "\n" not in str(e.value)
    refused("unknown model 'SiT-Z/2'", dict(model="SiT-Z/2"))
    refused("unknown process 'flwo'", dict(process="flwo"))
    refused("x_embedder.proj.weight has shape", dict(channels=3))
    refused("pos_embed has shape", dict(size=16))
    refused("embedding_table.weight has shape", dict(num_classes=4))
    refused("y_embedder.text is missing", dict(text_shape=[1, 5]))
    refused("is missing|has shape|not part", dict(model="unet-tiny"))
    refused("blocks.9.attn is not part", ema={"blocks.9.attn": torch.zeros(1)})
    refused("channels", drop="channels")
    refused("process", drop="process")
    for state in ({}, {"ema": {}}, {"args": {}}, {"args": [], "ema": {}}, checkpoint(UNET)[1]["ema"]):
        with pytest.raises(ValueError, match="not a checkpoint"):
            from_checkpoint(state)
    state = checkpoint(SIT)[1]
    del state["model"]                                                # step_*.pt hold the EMA only
    from_checkpoint(state)
    with pytest.raises(ValueError, match="model"):
        from_checkpoint(state, ema=False)


# ---------------------------------------------------------------------------------------------- start weights
@pytest.mark.parametrize("settings", [SIT, UNET], ids=["sit", "unet"])
def test_init_from_takes_the_ema_of_a_checkpoint(settings):
    source, state = checkpoint(settings)
    model = randomised(build(settings), seed=5)
    init_from(model, state, "start.pt")
    for (k, a), b in zip(model.state_dict().items(), source.state_dict().values()):
        assert torch.equal(a, b), k
    assert any(p.requires_grad for p in model.parameters()) and model.training


def test_init_from_leaves_the_text_of_the_new_run():
    settings = {**SIT, "text_shape": [1, 5]}
    mine, theirs = torch.ones(3, 1, 5), torch.full((3, 1, 5), 2.0)
    state = {"ema": randomised(build(settings, theirs)).state_dict(), "args": settings}
    model = build(settings, mine)
    init_from(model, state, "start.pt")
    assert torch.equal(model.y_embedder.text[:3], mine) and torch.equal(model.y_embedder.conv.weight, state["ema"]["y_embedder.conv.weight"])


def test_init_from_names_what_does_not_fit_and_changes_nothing():
    model = build(SIT)
    before = copy.deepcopy(model.state_dict())
    for settings, message in (({**SIT, "num_classes": 5}, r"start.pt: .*embedding_table.weight has shape \(6, 64\), this network needs \(4, 64\)"),
                              ({**SIT, "text_shape": [1, 5]}, "start.pt: .*y_embedder.text is not part"), (UNET, "start.pt: .*is missing")):
        with pytest.raises(ValueError, match=message) as e:
            init_from(model, checkpoint(settings)[1], "start.pt")
        assert "\n" not in str(e.value)
    for state in ({}, {"weights": {}}, {"ema": {"conv.weight": torch.zeros(1)}}, {0: {}}):
        with pytest.raises(ValueError, match="start.pt: not a checkpoint"):
            init_from(model, state, "start.pt")
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("key", [None, "ema", "model"])
def test_init_from_refuses_official_weights(prefix, key):
    """They run time the other way: the names and shapes alone would pass."""
    model = build(SIT)
    official = {prefix + k: v for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="start.pt: not a checkpoint of train.py but official DiT/SiT weights, as it looks.*--official dit or --official sit"):
        init_from(model, official if key is None else {key: official}, "start.pt")


# ---------------------------------------------------------------------------------------------- official weights
def official(channels=4, patch=2, learn_sigma=True):
    """(the network, its weights as they are published)"""
    model = randomised(SiT(size=8, channels=channels, num_classes=5, depth=2, width=384, heads=6, patch=patch, learn_sigma=learn_sigma)).eval()
    return model, model.state_dict()


def from_official(state, kind):
    return from_checkpoint(official_checkpoint(state, kind))


def wrapped(weights, key, prefix):
    weights = {prefix + k: v for k, v in weights.items()}
    other = {k: v + 1 for k, v in weights.items()}           # the raw weights, which are not meant
    return weights if key is None else {"model": other, key: weights, "opt": {"state": {}}, "train_steps": 7}


@pytest.mark.parametrize("key, prefix", [("ema", "module."), ("model", "_orig_mod."), (None, ""), ("ema", "_orig_mod.module."),
                                         (None, "module._orig_mod.")])
def test_official_weights_answer_as_their_network(key, prefix):
    model, weights = official()
    x, y = batch(3, 4), torch.tensor([0, 4, 5])
    dit, process = from_official(wrapped(weights, key, prefix), "dit")
    assert type(process) is DDPM and process.predict == "eps"
    t = torch.tensor([50.0, 500.0, 950.0])
    assert torch.equal(dit(x, t, y), model(x, t, y))
    sit, process = from_official(wrapped(weights, key, prefix), "sit")
    assert type(process) is Flow
    t = torch.tensor([0.05, 0.5, 0.75])
    torch.testing.assert_close(sit(x, t, y), -model(x, 1 - t, y), rtol=0, atol=1e-5)
    assert (sit(x, t, y) + model(x, t, y)).abs().max() > 0.01 < (sit(x, t, y) - model(x, 1 - t, y)).abs().max()
    for m in (dit, sit):
        assert (m.size, m.channels, m.num_classes, m.patch, len(m.blocks), m.blocks[0].attn.heads) == (8, 4, 5, 2, 2, 6)
        assert not any(part.training for part in m.modules()) and not any(p.requires_grad for p in m.parameters())


def test_official_weights_against_the_second_implementation():
    """Read, unwrapped and (SiT) turned round in time, they answer as the published formulas do on the published weights; also when trained on from."""
    weights = official()[1]
    p = {k: v.double().numpy() for k, v in weights.items() if k != "pos_embed"}
    x, y = batch(1, 4), torch.tensor([5])                             # 5 = null
    for kind, times, sign, theirs in (("dit", (903.0,), 1, lambda t: t), ("sit", (0.8,), -1, lambda t: 1 - t)):
        want = [sign * plain_sit(p, x[i].double().numpy(), theirs(t), int(y[i]), 2, 6, 2, 4)[0] for i, t in enumerate(times)]
        state = official_checkpoint(wrapped(weights, "ema", "module."), kind)
        start = build(state["args"])
        init_from(start, state, "x.pt")
        for net in (from_official(weights, kind)[0], start.eval()):
            with torch.no_grad():
                out = net(x, torch.tensor(times), y)
            np.testing.assert_allclose(out.numpy(), want, rtol=0, atol=2e-5)


def test_turning_time_round_is_exact():
    """In float64 arithmetic: what is left is the float32 rounding of one layer's weights."""
    weights = randomised(SiT(4, 2, 3, depth=1, width=24, heads=3, patch=2)).state_dict()
    a, b = ({k: v.double().numpy() for k, v in w.items() if k != "pos_embed"} for w in (weights, reverse_time(weights)))
    for t in (0.0, 0.3, 1.0):
        x = batch(1, 2, 4)[0].double().numpy()
        theirs, ours = (plain_sit(p, x, s, 2, 1, 3, 2, 2)[0] for p, s in ((a, 1 - t), (b, t)))
        assert np.abs(theirs).max() > 0.5
        np.testing.assert_allclose(ours, -theirs, rtol=0, atol=1e-6)


def test_official_settings():
    """What the checkpoint of train.py says that an official one becomes."""
    for kind, process, predict in (("dit", "ddpm", "eps"), ("sit", "flow", "v")):
        names = official_names(12, 384, 2, 4, 1000, 256, 8)
        weights = {k: torch.zeros(()).expand(s) for k, s in names.items()} if kind == "dit" else official()[1]          # these take no memory
        args = official_checkpoint({"ema": weights, "args": object(), "opt": {}}, kind)["args"]
        size = dict(model="SiT-S/2", size=32, num_classes=1000) if kind == "dit" else dict(model="SiT-S/2", depth=2, size=8, num_classes=5)
        assert args == dict(**size, process=process, predict=predict, channels=4, learn_sigma=True, latents=True, latent_scale=0.18215,
                            vae="stabilityai/sd-vae-ft-ema")


@pytest.mark.parametrize("channels, patch, learn_sigma", [(3, 4, True), (1, 1, False), (4, 8, False)])
def test_official_sizes_are_read_off_the_shapes(channels, patch, learn_sigma):
    model, weights = official(channels, patch, learn_sigma)
    again, _ = from_official(weights, "dit")
    x, t, y = batch(3, channels), torch.tensor([1.0, 40.0, 999.0]), torch.tensor([0, 4, 5])
    assert torch.equal(again(x, t, y), model(x, t, y)) and (again.patch, again.out_channels) == (patch, channels * (1 + learn_sigma))


@pytest.mark.parametrize("width, heads", [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_official_heads_come_from_the_width(width, heads):
    net = SiT(size=2, channels=1, num_classes=1, depth=1, width=width, heads=1, patch=2)      # the weights do not show them
    assert from_official(net.state_dict(), "dit")[0].blocks[0].attn.heads == heads


def test_official_weights_that_are_none():
    weights = official()[1]

    def refused(state, message):
        with pytest.raises(ValueError, match=message) as e:
            from_official(state, "sit")
        assert "\n" not in str(e.value)
    without = lambda k: {n: v for n, v in weights.items() if n != k}                          # noqa: E731
    refused(SiT(8, 3, 5, depth=1, width=64, heads=4, patch=2).state_dict(), "width is 64, official ones are 1152, 1024, 768, 384 wide")
    refused(SiT(12, 3, 5, depth=1, width=384, heads=6, patch=3).state_dict(), "patches have 3 pixels")
    refused(without("blocks.0.attn.qkv.bias"), "blocks.0.attn.qkv.bias is missing")
    refused(without("pos_embed"), "pos_embed is missing")
    refused({**weights, "pos_embed": torch.zeros(16)}, r"pos_embed is of shape \(16,\)")
    refused({**weights, "pos_embed": torch.zeros(1, 15, 384)}, "pos_embed has shape")
    refused({**weights, "final_layer.linear.weight": torch.zeros(12, 384)}, "final_layer.linear.weight has shape")
    refused({**weights, "extra": torch.zeros(1)}, "extra is not part")
    refused({k: v for k, v in weights.items() if not k.startswith("blocks.")}, "is missing")
    for state in ({}, {"ema": {}}, {0: torch.zeros(1)}, {"ema": {"conv.weight": torch.zeros(1)}}, {"x_embedder.proj.weight": 3}):
        refused(state, "not official DiT/SiT weights")
    ours = {**SIT, "model": "SiT-S/2"}                                # the same names and shapes, another time
    refused({"args": ours, "ema": build(ours).state_dict()}, "a checkpoint of train.py.*leave --official out")


@pytest.mark.parametrize("key, prefix", [("ema", "module."), (None, "")])
def test_official_weights_are_no_checkpoint_of_ours(key, prefix):
    with pytest.raises(ValueError, match="^not a checkpoint of train.py but official.*--official dit or --official sit$"):
        from_checkpoint(wrapped(official()[1], key, prefix))


def test_every_model_of_the_table_can_be_built():
    with torch.device("meta"):
        for name in MODELS.keys() - {"sd"}:                           # made of given weights: tests/test_sd.py
            model = build(dict(model=name, process="flow", size=32, channels=3, num_classes=10))
            assert isinstance(model, (SiT, UNet, MDT)) and isinstance(model.y_embedder, ConditionEmbedder) and model.num_classes == 10
            assert all(hasattr(model, name) for name in Network.__annotations__)


@pytest.mark.parametrize("settings", [SIT, UNET, {**SIT, "model": "MDT-T/2"}], ids=["sit", "unet", "mdt"])
def test_every_network_keeps_to_the_written_interface(settings):
    model = build({**settings, "text_shape": [2, 5]}, torch.ones(3, 2, 5)).eval()
    x, t, y = batch(), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 3, 2])
    out, tokens = model(x, t, y, tokens_after=model.token_layer)
    assert out.shape == x.shape and tokens.shape == (3, model.grid**2, model.token_width)
    assert torch.equal(out, model(x, t, y))
    assert text_of(model).shape == (3, 2, 5) and (text_of(model) == 1).all()          # the null row aside
    assert text_of(build(settings)) is None and text_of(build({**UNET, "num_classes": 0})) is None


def test_which_networks_have_dropout():
    assert {name: knows(name, "dropout") for name in MODELS} == {name: name.startswith("unet") for name in MODELS}
    for name in ("unet-tiny", "SiT-T/2"):
        model = build({**SIT, "model": name, "dropout": 0.25})
        assert any(isinstance(m, nn.Dropout) and m.p == 0.25 for m in model.modules()) == knows(name, "dropout")


def test_options_of_another_network_are_passed_over():
    assert build({**UNET, "depth": 2, "learn_sigma": True}).channels == 1 and len(build({**SIT, "depth": 2}).blocks) == 2
    assert build({**SIT, "learn_sigma": True}).out_channels == 2 and build({**SIT, "learn_sigma": None}).out_channels == 1
