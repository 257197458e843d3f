"""models/mdt.py, models/adan.py and what train.py does with them: the published numbers, the two passes, official weights, every stage on an MDT."""
import copy
import json

import numpy as np
import pytest
import torch

import attach
import common
import reweight
import sample
import train
from conftest import as_flags, crash_at, make_data, processes, stats
from models.adan import Adan
from models.build import build, from_checkpoint, init_from
from models.diffusion import DDPM, make_process, snr_weight
from models.encoders import load
from models.mdt import MDT, MDTS, PositionBias, relative_index
from models.official import official_checkpoint
from models.sit import SiT

TINY = dict(depth=6, width=32, heads=4, patch=2, decode=2)
BASE = dict(model="MDT-T/2", process="ddpm", preset="digits", steps=6, batch_size=8, lr=1e-3, schedule="constant", warmup=2, log_every=2, checkpoint_every=2, device="cpu")


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(train, "preview", lambda *a, **k: None)
    monkeypatch.setattr(train, "loss_plot", lambda rows, path, constant: path.write_bytes(b""))


def fill_by_name(model):
    """value_i = 0.3 sin(0.7 i + len(name)) for every weight."""
    with torch.no_grad():
        for name, w in model.state_dict().items():
            i = torch.arange(w.numel(), dtype=torch.float64)
            w.copy_((0.3 * torch.sin(0.7 * i + len(name))).reshape(w.shape))
    return model.eval()


def tiny(**more):
    return fill_by_name(MDT(8, 4, 5, **TINY, learn_sigma=True, **more))


def example():
    """x (2, 4, 8, 8), t, y, and an order of the 16 tokens for each of the two."""
    x = torch.sin(0.37 * torch.arange(512, dtype=torch.float64)).float().reshape(2, 4, 8, 8)
    j = torch.arange(16)
    return x, torch.tensor([7.0, 812.0]), torch.tensor([2, 5]), torch.stack([5 * j % 16, 3 * j % 16])


AT = [0, 1, 100, 255, 256, 400, 511]
FULL = [0.25864, -0.09015, 1.44843, 2.68302, -3.52268, 0.60361, 2.45697]
MASKED = [-0.58702, 0.77983, 1.38969, 2.65347, -3.87134, -3.59115, 2.45630]


# ---------------------------------------------------------------------------------------------- the network
@torch.no_grad()
@pytest.mark.parametrize("count, want, mean, std", [(None, FULL, -0.120904, 2.468132), (9, MASKED, -0.101881, 3.332483)], ids=["full", "masked"])
def test_both_passes_answer_as_the_public_class_does(count, want, mean, std):
    """Figures that the public MDTv2 class gave for these weights and this input."""
    x, t, y, order = example()
    kept = None if count is None else order[:, :count]
    out = tiny()(x, t, y, kept=kept).flatten()
    np.testing.assert_allclose(out[AT], want, atol=1e-4)
    assert out.mean().item() == pytest.approx(mean, abs=1e-4) and out.std().item() == pytest.approx(std, abs=1e-4)


@torch.no_grad()
def test_all_tokens_kept_is_the_full_pass_and_their_order_changes_nothing():
    x, t, y, order = example()
    net = tiny()
    assert (net(x, t, y, kept=order) - net(x, t, y)).abs().max() < 3e-5
    kept = order[:, :9]
    again = torch.stack([row[torch.randperm(9, generator=torch.Generator().manual_seed(0))] for row in kept])
    assert (net(x, t, y, kept=again) - net(x, t, y, kept=kept)).abs().max() < 3e-5
    assert (net(x, t, y, kept=order[:, 1:10]) - net(x, t, y, kept=kept)).abs().max() > 0.1                # other tokens do


def test_the_bias_of_two_tokens_is_that_of_their_offset():
    bias = PositionBias(3, 2)
    table = bias.relative_position_bias_table
    got = bias(relative_index(3))
    assert table.shape == (5 * 5 + 3, 2) and got.shape == (2, 9, 9)
    for i in range(9):
        for j in range(9):
            (r, c), (r_, c_) = divmod(i, 3), divmod(j, 3)
            for h in range(2):
                assert got[h, i, j] == table[(r - r_ + 2) * 5 + (c - c_ + 2), h]


@torch.no_grad()
def test_only_the_encoder_is_blind_to_hidden_tokens():
    x, t, y, order = example()
    net, seen = tiny(), []
    net.en_outblocks[-1].register_forward_hook(lambda m, i, o: seen.append(o))
    kept = order[:, :9]
    hidden = order[0, 9]
    other = x.clone()
    r, c = divmod(int(hidden), 4)
    other[0, :, 2 * r:2 * r + 2, 2 * c:2 * c + 2] += 1                # pixels of one hidden patch
    a, b = net(x, t, y, kept=kept), net(other, t, y, kept=kept)
    assert torch.equal(seen[0], seen[1]) and (a[0] - b[0]).abs().max() > 0.01 and torch.equal(a[1], b[1])


@torch.no_grad()
def test_the_side_block_and_the_mask_token_serve_the_masked_pass_alone():
    x, t, y, order = example()
    net = tiny()
    before = net(x, t, y)
    for p in (*net.sideblocks.parameters(), net.mask_token):
        p.fill_(float("nan"))
    assert torch.equal(net(x, t, y), before) and not net(x, t, y, kept=order[:, :9]).isfinite().all()


def test_every_trained_weight_has_a_gradient_and_without_masks_their_parts_are_frozen():
    """DistributedDataParallel fails on a parameter that takes no part."""
    x, t, y, order = example()
    for ratio in (0.3, 0):
        net = fill_by_name(MDT(8, 4, 5, **TINY, mask_ratio=ratio)).train()
        loss = net(x, t, y).square().mean()
        if ratio:
            loss = loss + net(x, t, y, kept=order[:, :9]).square().mean()
        loss.backward()
        without = {n for n, p in net.named_parameters() if p.grad is None}
        assert without == {n for n, p in net.named_parameters() if not p.requires_grad}
        assert without == (set() if ratio else {n for n, _ in net.named_parameters() if n.startswith(("sideblocks", "mask_token"))})


def test_recompute_gives_the_same_gradients_in_both_passes():
    x, t, y, order = example()
    grads = []
    for again in (False, True):
        net = fill_by_name(MDT(8, 4, 5, **TINY, mask_ratio=0.3, recompute=again)).train()
        (net(x, t, y).square().mean() + net(x, t, y, kept=order[:, :9]).square().mean()).backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@torch.no_grad()
def test_tokens_come_after_in_out_and_decoder_blocks_in_turn():
    x, t, y, _ = example()
    net, seen = tiny(), []
    for block in (*net.en_inblocks, *net.en_outblocks, *net.de_blocks):
        block.register_forward_hook(lambda m, i, o: seen.append(o))
    for k in range(1, 7):
        seen.clear()
        out, tokens = net(x, t, y, tokens_after=k)
        assert torch.equal(tokens, seen[k - 1]) and out.shape == x.shape


@pytest.mark.parametrize("depth, decode", [(6, 3), (4, 4), (2, 4)])
def test_a_depth_that_does_not_halve_is_refused(depth, decode):
    """The public code builds one block fewer, silently."""
    with pytest.raises(ValueError, match="two equal halves"):
        MDT(8, 1, 3, **{**TINY, "depth": depth, "decode": decode})


SIZES = {"MDT-S/2": 38_454_872, "MDT-B/2": 152_112_272, "MDT-L/2": 507_015_776, "MDT-XL/2": 742_263_904}


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name):
    """Learned sigma, the side block and the trained positions are counted. The first two are those of the public class."""
    with torch.device("meta"):
        net = build(dict(model=name, process="ddpm", size=32, channels=4, num_classes=1000, learn_sigma=True, mask_ratio=0.3))
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == SIZES[name]


def official_names():
    """MDTv2-S/2's names and shapes, as its file has them; 188 entries, 13 of them an index of places."""
    D, T = 384, 256
    names = {"pos_embed": (1, T, D), "decoder_pos_embed": (1, T, D), "mask_token": (1, 1, D), "x_embedder.proj.weight": (D, 4, 2, 2), "x_embedder.proj.bias": (D,),
             "t_embedder.mlp.0.weight": (D, 256), "t_embedder.mlp.0.bias": (D,), "t_embedder.mlp.2.weight": (D, D), "t_embedder.mlp.2.bias": (D,),
             "y_embedder.embedding_table.weight": (1001, D), "final_layer.linear.weight": (32, D), "final_layer.linear.bias": (32,),
             "final_layer.adaLN_modulation.1.weight": (2 * D, D), "final_layer.adaLN_modulation.1.bias": (2 * D,)}
    for kind, count in (("en_inblocks", 3), ("en_outblocks", 3), ("de_blocks", 6), ("sideblocks", 1)):
        for i in range(count):
            b = f"{kind}.{i}."
            names |= {b + "attn.qkv.weight": (3 * D, D), b + "attn.qkv.bias": (3 * D,), b + "attn.proj.weight": (D, D), b + "attn.proj.bias": (D,),
                      b + "attn.rel_pos_bias.relative_position_bias_table": (964, 6), b + "attn.rel_pos_bias.relative_position_index": (T, T),
                      b + "mlp.fc1.weight": (4 * D, D), b + "mlp.fc1.bias": (4 * D,), b + "mlp.fc2.weight": (D, 4 * D), b + "mlp.fc2.bias": (D,),
                      b + "adaLN_modulation.1.weight": (6 * D, D), b + "adaLN_modulation.1.bias": (6 * D,)}
            if kind in ("en_outblocks", "de_blocks"):
                names |= {b + "skip_linear.weight": (D, 2 * D), b + "skip_linear.bias": (D,)}
    return names


def test_the_names_and_shapes_are_the_official_ones():
    names = official_names()
    assert len(names) == 188
    index = {k for k in names if k.endswith("index")}
    with torch.device("meta"):
        own = build(dict(model="MDT-S/2", process="ddpm", size=32, channels=4, num_classes=1000, learn_sigma=True)).state_dict()
    assert {k: tuple(v.shape) for k, v in own.items()} == {k: s for k, s in names.items() if k not in index}


# ---------------------------------------------------------------------------------------------- official weights
def official(depth=4, decode=2, width=384, heads=6):
    """(a network of few blocks, its weights as they are published)"""
    net = MDT(8, 4, 5, depth=depth, width=width, heads=heads, patch=2, decode=decode, learn_sigma=True).eval()
    g = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=g)
    weights = dict(net.state_dict())
    for key in list(weights):
        if key.endswith("bias_table"):
            weights[key.replace("bias_table", "index")] = relative_index(4)      # an int64 buffer in every file
    return net, weights


@torch.no_grad()
@pytest.mark.parametrize("key, prefix", [(None, ""), ("ema", "module."), (None, "_orig_mod.module.")])
def test_official_weights_answer_as_their_network(key, prefix):
    net, weights = official()
    state = {prefix + k: v for k, v in weights.items()}
    found = official_checkpoint({key: state} if key else state, "mdt")
    assert found["args"] == dict(model="MDT-S/2", size=8, channels=4, num_classes=5, learn_sigma=True, depth=4, decode=2, process="ddpm", predict="eps", latents=True,
                                 latent_scale=0.18215, vae="stabilityai/sd-vae-ft-ema")
    model, process = from_checkpoint(found)
    x, t, y, order = example()
    assert torch.equal(model(x, t, y), net(x, t, y)) and type(process) is DDPM and process.predict == "eps"
    start = build({**found["args"], "mask_ratio": 0.3})
    init_from(start, found, "x.pt")
    assert torch.equal(start.eval()(x, t, y, kept=order[:, :9]), net(x, t, y, kept=order[:, :9]))


def test_weights_of_another_kind_are_refused():
    mdt = official()[1]
    dit = SiT(size=8, channels=4, num_classes=5, depth=2, width=384, heads=6, patch=2, learn_sigma=True).state_dict()
    v1 = {**dit, "decoder_pos_embed": mdt["pos_embed"], "blocks.0.attn.rel_pos_bias.relative_position_bias_table": torch.zeros(52, 6)}
    repa = {**dit, "projectors.0.0.weight": torch.zeros(4, 4)}
    narrow = official(width=64, heads=4)[1]
    cases = [(mdt, "dit", "but MDTv2's, by their decoder_pos_embed; say --official mdt"), (mdt, "sit", "say --official mdt"), (mdt, "repa", "say --official mdt"),
             (dit, "mdt", "no decoder_pos_embed inside"), (v1, "mdt", "MDT v1 weights; only MDTv2 is built here"), (v1, "dit", "only MDTv2 is built here"),
             (repa, "sit", "say --official repa"), (repa, "dit", "say --official repa"), (narrow, "mdt", "width is 64"), (narrow, "dit", "say --official mdt")]
    for weights, kind, words in cases:
        with pytest.raises(ValueError, match=words) as e:
            official_checkpoint(weights, kind)
        assert str(e.value).startswith("not official ") and "\n" not in str(e.value)
    with pytest.raises(ValueError, match="official MDT weights, as it looks.*--official mdt$"):
        from_checkpoint(mdt)
    broken = {k: v for k, v in mdt.items() if k != "de_blocks.1.skip_linear.bias"}
    with pytest.raises(ValueError, match="de_blocks.1.skip_linear.bias is missing"):
        from_checkpoint(official_checkpoint(broken, "mdt"))


@torch.no_grad()
@pytest.mark.parametrize("projectors", [True, False])
def test_repa_runs_in_our_direction_of_time(projectors):
    """x_t = (1 - t) x + t eps and v = eps - x: REPA's own formulas are ours, so its network is taken as it is."""
    net = SiT(size=8, channels=4, num_classes=5, depth=2, width=384, heads=6, patch=2).eval()
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    weights = dict(net.state_dict())
    if projectors:
        weights |= {"projectors.0.0.weight": torch.randn(8, 384), "projectors.0.0.bias": torch.randn(8)}
    model, process = from_checkpoint(official_checkpoint({"ema": weights}, "repa"))
    x, _, y, _ = example()
    t = torch.tensor([0.1, 0.8])
    assert process.name == "flow" and torch.equal(model(x, t, y), net(x, t, y))


# ---------------------------------------------------------------------------------------------- Adan
def test_adan_against_the_formulas_in_plain_numbers():
    lr, wd, (b1, b2, b3), eps = 0.1, 0.02, (0.98, 0.92, 0.99), 1e-8
    theta, grads = [1.0, -2.0, 0.5], [[0.3, -0.1, 0.0], [0.2, 0.4, -1.0], [-0.5, 0.1, 0.2], [0.1, 0.1, 0.1]]
    p = torch.nn.Parameter(torch.tensor(theta, dtype=torch.float64))
    opt = Adan([p], lr=lr, weight_decay=wd)
    m, v, n, last = [0.0] * 3, [0.0] * 3, [0.0] * 3, grads[0]
    for k, g in enumerate(grads, 1):
        p.grad = torch.tensor(g, dtype=torch.float64)
        opt.step()
        for i in range(3):
            d = g[i] - last[i]
            m[i] = b1 * m[i] + (1 - b1) * g[i]
            v[i] = b2 * v[i] + (1 - b2) * d
            n[i] = b3 * n[i] + (1 - b3) * (g[i] + b2 * d) ** 2
            step = (m[i] / (1 - b1**k) + b2 * v[i] / (1 - b2**k)) / ((n[i] / (1 - b3**k)) ** 0.5 + eps)
            theta[i] = (theta[i] - lr * step) / (1 + lr * wd)
        last = g
        np.testing.assert_allclose(p.detach(), theta, rtol=1e-12)


def test_adan_goes_on_from_its_state_exactly():
    def some(k):
        return torch.randn(5, 3, generator=torch.Generator().manual_seed(k))

    def steps(p, opt, ks):
        for k in ks:
            p.grad = some(k)
            opt.step()
    p = torch.nn.Parameter(some(99))
    opt = Adan([p], lr=0.1)
    steps(p, opt, range(3))
    q = torch.nn.Parameter(p.detach().clone())
    again = Adan([q], lr=0.7)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))          # as from a file: no tensor is shared
    steps(p, opt, range(3, 6))
    steps(q, again, range(3, 6))
    assert torch.equal(p, q)


# ---------------------------------------------------------------------------------------------- train.py
def run(data, out, **flags):
    train.main(as_flags({**BASE, "data": data, "out": out, **flags}))
    return common.load_pt(out / "last.pt")


def test_a_step_is_both_passes_with_weights_on_both(tiny_data, tmp_path, monkeypatch):
    """Three steps again in plain code: noise and labels of their own in each pass, Min-SNR and class weights on both, Adan on the clipped gradient."""
    seen, real = [], train.diffusion_loss

    def spy(process, model, x, u, eps, y, **kw):
        seen.append(({k: v.clone() for k, v in dict(x=x, u=u, eps=eps, y=y, **kw).items()}))
        return real(process, model, x, u, eps, y, **kw)
    monkeypatch.setattr(train, "diffusion_loss", spy)
    np.save(tmp_path / "w.npy", np.array([0.2, 3.0, 1.0], np.float32))
    flags = dict(steps=3, optimizer="adan", min_snr=5, label_drop=0.5, grad_clip=0.05, warmup=0, log_every=1, weights=tmp_path / "w.npy")
    state = run(tiny_data, tmp_path / "a", **flags)
    torch.manual_seed(0)
    net = build(dict(model="MDT-T/2", process="ddpm", size=8, channels=1, num_classes=3, class_std=1.0, mask_ratio=0.3))
    opt = Adan([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    order, labels = train.Order(50, 8, 0), np.load(tiny_data / "labels.npy")
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    assert len(seen) == 6
    for n, row in enumerate(stats(tmp_path / "a")):
        full, masked = seen[2 * n:2 * n + 2]
        assert torch.equal(full["x"], masked["x"]) and torch.equal(full["u"], masked["u"])             # the same image and time
        assert not torch.equal(full["eps"], masked["eps"]) and not torch.equal(full["y"], masked["y"])
        y = labels[order(n)]
        for part in (full, masked):
            assert all(int(a) in (int(b), 3) for a, b in zip(part["y"], y))
        i = (full["u"] * 1000).long()
        a = abar[i].float().view(-1, 1, 1, 1)
        w = torch.tensor([0.2, 3.0, 1.0])[y] * (((1 - abar) / abar)[i] * 5).clamp(max=1).float()
        losses = []
        for part in (full, masked):
            x_t = a.sqrt() * part["x"] + (1 - a).sqrt() * part["eps"]
            losses.append((net(x_t, i.float(), part["y"], kept=part.get("kept")) - part["eps"]).square().mean((1, 2, 3)))
        assert row["diffusion"] == pytest.approx(losses[0].mean().item(), rel=1e-4) and row["masked"] == pytest.approx(losses[1].mean().item(), rel=1e-4)
        opt.zero_grad()
        (w * losses[0] + w * losses[1]).mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        opt.step()
    assert max((state["model"][k] - v).abs().max().item() for k, v in net.state_dict().items()) < 2e-5
    assert state["args"]["mask_ratio"] == 0.3 and state["args"]["optimizer"] == "adan"


def test_mask_draws():
    shape, u = (1, 8, 8), torch.rand(400)
    m = train.mask_draws(0, 3, u, shape, 256, 0.3)
    assert torch.equal(m.kept.sort(1).values.diff(dim=1) > 0, torch.ones(400, m.kept.shape[1] - 1, dtype=torch.bool))          # no token twice
    assert (torch.bincount(m.kept.flatten(), minlength=256) / (400 * m.kept.shape[1] / 256) - 1).abs().max() < 0.5             # any token alike
    again, other = train.mask_draws(0, 3, u, shape, 256, 0.3), train.mask_draws(0, 4, u, shape, 256, 0.3)
    assert all(torch.equal(getattr(m, k), getattr(again, k)) for k in ("eps", "drop", "kept")) and not torch.equal(m.eps, other.eps)
    base = common.step_draws(0, "step", 3, 400, shape, torch.device("cpu"), False)
    assert not torch.equal(base.eps, m.eps) and not torch.equal(base.drop, m.drop)
    counts = [train.mask_draws(0, n, u[:1], shape, 256, 0.3).kept.shape[1] for n in range(300)]
    assert min(counts) in range(128, 132) and max(counts) in range(176, 180)                  # 1 - r of 256, r in 0.3 .. 0.5
    assert abs(np.mean(counts) - 153.6) < 3


def test_resume_with_adan_is_bit_equal(tiny_data, tmp_path):
    flags = dict(optimizer="adan", min_snr=5, steps=7, checkpoint_every=3, accumulate=2)
    straight = run(tiny_data, tmp_path / "a", **flags)
    with crash_at(5):
        run(tiny_data, tmp_path / "b", **flags)
    resumed = run(tiny_data, tmp_path / "b", **flags)
    for part in ("model", "ema"):
        assert all(torch.equal(straight[part][k], resumed[part][k]) for k in straight[part])
    rows = [stats(tmp_path / out) for out in "ab"]
    assert rows[0] == rows[1] and all("masked" in r for r in rows[0])


def test_two_processes_equal_one(tiny_data, tmp_path):
    flags = dict(steps=3, label_drop=0.5, log_every=1, lr=1e-4)
    for code, _, err in processes(2, train.__file__, *as_flags({**BASE, "data": tiny_data, "out": tmp_path / "b", **flags})):
        assert code == 0, err[-2000:]
    one, two = run(tiny_data, tmp_path / "a", **flags), common.load_pt(tmp_path / "b/last.pt")
    assert max((one["model"][k] - two["model"][k]).abs().max().item() for k in one["model"]) < 1e-5
    for r, q in zip(stats(tmp_path / "a"), stats(tmp_path / "b")):
        assert q["masked"] == pytest.approx(r["masked"], rel=1e-5) and q["diffusion"] == pytest.approx(r["diffusion"], rel=1e-5)


def test_without_masks_it_is_one_pass_and_masks_change_no_draw_of_the_full_pass(tiny_data, tmp_path, monkeypatch):
    seen, real = [], train.diffusion_loss

    def spy(process, model, x, u, eps, y, **kw):
        if "kept" not in kw:
            seen.append((x, u, eps, y))
        return real(process, model, x, u, eps, y, **kw)
    monkeypatch.setattr(train, "diffusion_loss", spy)
    plain = run(tiny_data, tmp_path / "a", mask_ratio=0, steps=3)
    assert not any("masked" in row for row in stats(tmp_path / "a")) and plain["args"]["mask_ratio"] == 0
    run(tiny_data, tmp_path / "b", steps=3)
    run(tiny_data, tmp_path / "c", steps=3, model="SiT-T/2")
    n = len(seen) // 3
    for a, b, c in zip(seen[:n], seen[n:2 * n], seen[2 * n:]):
        assert all(torch.equal(p, q) and torch.equal(p, r) for p, q, r in zip(a, b, c))


@pytest.mark.parametrize("flags, words", [
    (dict(model="SiT-T/2", mask_ratio=0.3), "--mask-ratio does nothing in SiT-T/2"), (dict(process="flow", min_snr=5), "--min-snr is for --process ddpm"),
    (dict(process="flow", betas="scaled-linear"), "--betas is for --process ddpm"), (dict(mask_ratio=0.9), "must be"), (dict(min_snr=0), "must be")], ids=str)
def test_flags_that_would_do_nothing_are_refused(flags, words, tiny_data, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        run(tiny_data, tmp_path / "r", **flags)
    said = capsys.readouterr().err.strip()
    assert e.value.code == 2 and words in said and not (tmp_path / "r").exists()


def test_the_preset_is_that_of_the_public_script(tmp_path):
    data = with_latents(tmp_path / "data")
    args = train.parse_args(["--data", str(data), "--out", str(tmp_path / "o"), "--model", "MDT-S/2"])
    train.fill_flags(args, common.open_data(data, pixels=False))
    got = {k: getattr(args, k) for k in ("preset", "process", "steps", "batch_size", "lr", "schedule", "warmup", "optimizer", "min_snr", "mask_ratio", "ema", "predict")}
    assert got == dict(preset="mdt", process="ddpm", steps=400_000, batch_size=256, lr=5e-4, schedule="constant", warmup=0, optimizer="adan", min_snr=5.0, mask_ratio=0.3,
                       ema=0.9999, predict="eps")
    args = train.parse_args(["--data", str(data), "--out", str(tmp_path / "o"), "--model", "SiT-S/2", "--preset", "mdt"])         # the recipe without masks
    train.fill_flags(args, common.open_data(data, pixels=False))
    assert args.mask_ratio is None and args.optimizer == "adan"


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_trains_both_passes(amp, tiny_data, tmp_path):
    """The bias is of the attention's precision, and a step that fp16 cannot hold is left out by Adan as well."""
    run(tiny_data, tmp_path / "a", amp=amp, optimizer="adan", steps=4, lr=1e-4)
    run(tiny_data, tmp_path / "b", optimizer="adan", steps=4, lr=1e-4)
    for r, q in zip(stats(tmp_path / "a"), stats(tmp_path / "b")):
        assert r["masked"] == pytest.approx(q["masked"], rel=0.02) and r["diffusion"] == pytest.approx(q["diffusion"], rel=0.02)


def test_the_average_shares_what_is_not_trained():
    net = MDT(8, 1, 3, **TINY)
    ema, averaged, trained = train.average_of(net)
    assert ema.mask_token is net.mask_token and ema.rel is net.rel and ema.sideblocks[0].mlp.fc1.weight is net.sideblocks[0].mlp.fc1.weight
    assert ema.pos_embed is not net.pos_embed and torch.equal(ema.pos_embed, net.pos_embed) and not ema.pos_embed.requires_grad and net.pos_embed.requires_grad
    assert len(averaged) == len(trained) == sum(p.requires_grad for p in net.parameters()) and not ema.training and net.training


@pytest.mark.slow
def test_it_learns_the_classes_of_digits(tmp_path):
    """A classifier from elsewhere reads its samples as the digits that were asked for."""
    import data as stage0
    from sklearn.linear_model import LogisticRegression
    stage0.main(["digits", "--out", str(tmp_path / "digits")])
    train.main(["--data", str(tmp_path / "digits"), "--preset", "digits", "--model", "MDT-T/2", "--steps", "350", "--device", "cpu", "--out", str(tmp_path / "run")])
    sample.main(["--checkpoint", str(tmp_path / "run/last.pt"), "--num", "200", "--sampler", "heun", "--steps", "12", "--cfg", "1.5", "--device", "cpu", "--out",
                 str(tmp_path / "run")])
    x, y = np.load(tmp_path / "digits/images.npy"), np.load(tmp_path / "digits/labels.npy")
    reader = LogisticRegression(max_iter=500).fit(x.reshape(len(x), -1) / 255, y)
    drawn = np.load(tmp_path / "run/samples.npy").reshape(200, -1) / 255
    read = reader.score(drawn, np.load(tmp_path / "run/sample_labels.npy"))
    print(f"read as asked for: {read:.0%}")
    assert read > 0.8


@pytest.mark.slow
def test_compile_of_the_full_pass_changes_rounding_only(tiny_data, tmp_path):
    a, b = (run(tiny_data, tmp_path / name, compile=name == "b", steps=3, lr=1e-5) for name in "ab")
    assert max((a["model"][k] - b["model"][k]).abs().max().item() for k in a["model"]) < 4e-5
    for r, q in zip(stats(tmp_path / "a"), stats(tmp_path / "b")):
        assert q["masked"] == pytest.approx(r["masked"], rel=1e-3)


# ---------------------------------------------------------------------------------------------- the other stages
def with_latents(folder):
    data = make_data(folder, sizes=(6, 5, 5))
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=(16, 4, 8, 8)), np.full((16, 4, 8, 8), 0.1)
    np.save(data / "latents.npy", np.concatenate([mean, std], 1).astype(np.float16))
    (data / "latents.json").write_text(json.dumps({"scale": 0.18215, "mean": 0.18215 * mean.mean(), "std": 0.18215 * float(np.sqrt(mean.var() + 0.01))}))
    return data


def test_every_stage_works_on_an_mdt(tiny_data, tmp_path):
    """Reference -> ddae features, difficulty and attachments -> weights -> a run with text, alignment and class weights -> samples."""
    run(tiny_data, tmp_path / "full", steps=2, optimizer="adan", min_snr=5)
    last = tmp_path / "full/last.pt"
    images = np.load(tiny_data / "images.npy")
    encoder = load("ddae", "cpu", weights=last)
    assert encoder.width == 64 and encoder.token_width == 64
    attach.main(["--data", str(tiny_data), "--reference", str(last), "--per-class", "3", "--visual", "ddae", "--judge", "none", "--text", text(tmp_path), "--device", "cpu",
                 "--out", str(tmp_path / "attach")])
    assert np.load(tmp_path / "attach/difficulty.npy").shape == (len(images),) and np.load(tmp_path / "attach/visual.npy").shape == (9, 16, 64)
    reweight.main(["--data", str(tiny_data), "--reference", str(last), "--steps", "3", "--burn-in", "1", "--device", "cpu", "--out", str(tmp_path / "dro")])
    proxy = common.load_pt(tmp_path / "dro/proxy.pt")
    assert proxy["args"]["model"] == "MDT-T/2" and proxy["args"]["optimizer"] == "adan" and "g" in proxy["optimizer"]["state"][0]
    from_checkpoint(proxy)
    state = run(tiny_data, tmp_path / "d2c", attach=tmp_path / "attach", weights=tmp_path / "dro/weights.npy", steps=2)
    assert state["projector"] and state["model"]["y_embedder.text"].shape == (4, 1, 5) and {"align", "masked"} <= set(stats(tmp_path / "d2c")[-1])
    sample.main(["--checkpoint", str(tmp_path / "d2c/last.pt"), "--num", "6", "--steps", "2", "--cfg", "3.8", "--cfg-power", "4", "--device", "cpu", "--out",
                 str(tmp_path / "d2c")])
    assert np.load(tmp_path / "d2c/samples.npy").shape == (6, 8, 8, 1)


def text(folder):
    np.save(folder / "text.npy", np.random.default_rng(0).normal(size=(3, 1, 5)).astype(np.float16))
    return str(folder / "text.npy")


def test_official_weights_are_trained_on_from_their_own_loss(tmp_path):
    data = with_latents(tmp_path / "data")
    net = official()[0]
    net = MDT(8, 4, 3, depth=4, width=384, heads=6, patch=2, decode=2, learn_sigma=True).eval()
    weights = {f"module.{k}": v for k, v in net.state_dict().items()}
    torch.save(weights, tmp_path / "mdt.pt")
    state = run(data, tmp_path / "a", preset=None, model=None, process=None, init=tmp_path / "mdt.pt", official="mdt", steps=0, amp="none")
    assert {k: v.shape for k, v in state["ema"].items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert all(torch.equal(state["ema"][k], v) for k, v in net.state_dict().items())
    assert (state["args"]["model"], state["args"]["decode"], state["args"]["depth"], state["args"]["preset"]) == ("MDT-S/2", 2, 4, "mdt")


def test_min_snr_weights_are_those_of_the_formula():
    u = torch.tensor([0.0, 0.05, 0.1305, 0.5, 0.999])
    for predict in ("eps", "v"):
        process = make_process("ddpm", predict)
        for value, w in zip(u.tolist(), snr_weight(process, u, 5.0).tolist()):
            abar = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[:int(value * 1000) + 1])
            snr = abar / (1 - abar)
            want = min(snr, 5) / (snr if predict == "eps" else snr + 1)
            assert w == pytest.approx(want, rel=2e-3)
    eps = snr_weight(make_process("ddpm"), torch.arange(1000) / 1000 + 5e-4, 5.0)
    assert eps[0].item() == pytest.approx(5e-4, rel=0.01) and eps.mean().item() == pytest.approx(0.913, abs=1e-3) and (eps[130:] == 1).all() and eps[129] < 1


def test_every_size_has_its_blocks():
    for name, sizes in MDTS.items():
        half, odd = divmod(sizes["depth"] - sizes["decode"], 2)
        assert not odd and half > 0, name


def test_repa_without_its_projectors_is_not_taken_for_sit():
    """Their outputs tell: SiT's own have a second half, REPA's none. With the time reversed it would draw nonsense without a word."""
    net = SiT(size=8, channels=4, num_classes=5, depth=2, width=384, heads=6, patch=2, learn_sigma=False)
    with pytest.raises(ValueError, match="say --official repa"):
        official_checkpoint({"ema": net.state_dict()}, "sit")
    official_checkpoint({"ema": net.state_dict()}, "repa")
