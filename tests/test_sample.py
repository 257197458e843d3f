"""sample.py: sample i is a function of (seed, i) alone, an interruption costs nothing, and what is asked for is what is drawn."""
import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
from models.build import build, from_checkpoint
import sample
from conftest import FakeKL, processes
from models import diffusion
from models.diffusion import SAMPLERS, guided, to_uint8
from models.sit import SiT

ROOT = Path(sample.__file__).parent
REAL = diffusion.generate


def make_checkpoint(path, process="flow", model="SiT-T/2", **more):
    """As train.py writes it, with random weights whose output is not zero."""
    torch.manual_seed(0)
    args = dict(model=model, process=process, predict="v" if process == "flow" else "eps", size=8, channels=1, num_classes=3, class_std=1.0, text_shape=None, latents=False,
                data="tiny", data_sha256="d") | more
    ema = {k: v + 0.05 * torch.randn_like(v) if v.is_floating_point() else v for k, v in build(args).state_dict().items()}
    torch.save({"ema": ema, "model": {k: v + 1 for k, v in ema.items()}, "step": 7, "args": args}, path)
    return path


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("c") / "flow.pt")


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("c") / "ddpm.pt", "ddpm", "unet-tiny")


def argv(checkpoint, out, *flags, num=20, steps=2):
    return [str(v) for v in ("--checkpoint", checkpoint, "--out", out, "--num", num, "--steps", steps, "--device", "cpu", *flags)]


def draw(checkpoint, out, *flags, **kw):
    sample.main(argv(checkpoint, out, *flags, **kw))
    return np.load(out / "samples.npy")


def refused(capsys, checkpoint, out, *flags, fresh=True, **kw):
    with pytest.raises(SystemExit) as e:
        draw(checkpoint, out, *flags, **kw)
    text = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sample.py")]
    assert e.value.code == 2 and len(text) == 1 and "error:" in text[0]
    assert not fresh or not out.exists()
    return text[0]


def alike(a, b):
    """Equal, or off by one level in a few pixels: a matrix product may sum in another order at another batch size, and that may cross a rounding edge."""
    off = np.abs(a.astype(int) - b)
    return a.shape == b.shape and off.max() <= 1 and (off > 0).mean() < 0.005


@pytest.mark.parametrize("which, flags", [("flow", ("--sampler", "heun", "--cfg", 2)), ("flow", ("--sampler", "sde")), ("ddpm", ("--sampler", "ancestral")),
                                          ("ddpm", ("--sampler", "ddim", "--eta", 0.5))])
def test_sample_i_does_not_depend_on_the_batch_or_on_how_many_follow(which, flags, flow, ddpm, tmp_path):
    checkpoint = {"flow": flow, "ddpm": ddpm}[which]
    full = draw(checkpoint, tmp_path / "a", *flags, "--batch-size", 64)
    for k, batch in enumerate((1, 7)):
        assert alike(full, draw(checkpoint, tmp_path / f"b{k}", *flags, "--batch-size", batch))
    assert alike(full[:9], draw(checkpoint, tmp_path / "c", *flags, num=9))
    other = draw(checkpoint, tmp_path / "d", *flags, "--seed", 1)
    assert not alike(full, other) and len(np.unique(full.reshape(20, -1), axis=0)) == 20       # fresh noise for each sample and seed


def test_samples_are_those_of_the_ema_with_the_asked_guidance(flow, tmp_path):
    state = torch.load(flow, weights_only=True)
    model = build(state["args"]).eval()
    model.load_state_dict(state["ema"])
    y = torch.arange(20) % 3
    noise = torch.stack([torch.randn(1, 8, 8, generator=common.generator(5, "sample", i)) for i in range(20)])
    drawn = {}
    for cfg, interval in ((1, (0, 1)), (3, (0, 1)), (3, (0.7, 1))):
        x = noise.double()
        for t in (1.0, 0.75, 0.5, 0.25):                                   # Euler, in plain code
            with torch.no_grad():
                t_ = torch.full((20,), t)
                v, null = model(x.float(), t_, y).double(), model(x.float(), t_, torch.full_like(y, 3)).double()
            x = x - 0.25 * (null + cfg * (v - null) if cfg != 1 and interval[0] <= t <= interval[1] else v)
        out = tmp_path / f"{cfg}{interval[0]}"
        drawn[out] = draw(flow, out, "--sampler", "euler", "--cfg", cfg, "--cfg-interval", *interval, "--seed", 5, steps=4)
        assert alike(drawn[out], to_uint8(x.float()).numpy())
        assert (np.load(out / "sample_labels.npy") == y.numpy()).all()
    a, b, c = drawn.values()
    assert not alike(a, b) and not alike(b, c) and not alike(a, c)


def test_an_interrupted_call_goes_on_and_equals_a_straight_one(flow, tmp_path, monkeypatch, capsys):
    straight = draw(flow, tmp_path / "a", "--batch-size", 6)
    rows = []

    def generate_twice(model, process, y, *a, **kw):
        if len(rows) == 2:
            raise RuntimeError("killed")
        rows.append(len(y))
        return REAL(model, process, y, *a, **kw)
    monkeypatch.setattr(diffusion, "generate", generate_twice)
    with pytest.raises(RuntimeError):
        draw(flow, tmp_path / "b", "--batch-size", 6)
    assert not (tmp_path / "b/samples.npy").exists() and rows == [6, 6]
    monkeypatch.setattr(diffusion, "generate", lambda *a, **kw: rows.append(len(a[2])) or REAL(*a, **kw))
    resumed = draw(flow, tmp_path / "b", "--batch-size", 5)                # the batch size may differ
    assert rows[2:] == [5, 3] and alike(straight, resumed)                 # only what was missing
    assert {p.name for p in (tmp_path / "b").iterdir()} == {"samples.npy", "sample_labels.npy", "grid.png", "sample.args.json"}
    capsys.readouterr()
    again = draw(flow, tmp_path / "b")
    assert "nothing to do" in capsys.readouterr().out and len(rows) == 4 and np.array_equal(again, resumed)
    for flags, word in ((("--seed", 3), "--seed = 0, now 3"), (("--cfg", 2), "--cfg"), (("--sampler", "euler"), "--sampler = heun")):
        assert word in refused(capsys, flow, tmp_path / "b", *flags, fresh=False)
    other = make_checkpoint(tmp_path / "other.pt", model="SiT-T/4")
    assert "checkpoint" in refused(capsys, other, tmp_path / "b", fresh=False)
    assert np.array_equal(np.load(tmp_path / "b/samples.npy"), resumed)
    assert not alike(draw(flow, tmp_path / "b", "--seed", 3, "--overwrite"), resumed)


def test_labels(flow, tmp_path, capsys):
    y = sample.make_labels("balanced", 20, 3, 0)
    assert y.tolist() == [i % 3 for i in range(20)]
    y = sample.make_labels("random", 600, 3, 0)
    assert np.array_equal(y[:50], sample.make_labels("random", 50, 3, 0)) and not np.array_equal(y, sample.make_labels("random", 600, 3, 1))
    assert set(y) == {0, 1, 2} and np.abs(np.bincount(y) - 200).max() < 45
    np.save(tmp_path / "y.npy", np.arange(20) % 4)                         # 3 is the null class
    draw(flow, tmp_path / "a", "--labels", tmp_path / "y.npy")
    assert np.array_equal(np.load(tmp_path / "a/sample_labels.npy"), np.arange(20) % 4)
    np.save(tmp_path / "y.npy", (np.arange(20) + 1) % 4)
    assert "'labels'" in refused(capsys, flow, tmp_path / "a", "--labels", tmp_path / "y.npy", fresh=False)       # not the labels of these samples any more
    for bad, word in ((np.full(20, 4), "0..2"), (np.full(20, -1), "-1"), (np.zeros(19, int), "(19,)"), (np.zeros(20), "float64")):
        np.save(tmp_path / "y.npy", bad)
        assert word in refused(capsys, flow, tmp_path / "b", "--labels", tmp_path / "y.npy")
    assert "'balancd' is no class" in refused(capsys, flow, tmp_path / "b", "--labels", "balancd")


def test_npz_grid_and_record(ddpm, tmp_path):
    from PIL import Image
    x = draw(ddpm, tmp_path / "a", "--npz", "--sampler", "dpm++", num=12, steps=3)
    z = np.load(tmp_path / "a/samples.npz")
    assert x.dtype == np.uint8 and x.shape == (12, 8, 8, 1) and np.array_equal(z["arr_0"], np.repeat(x, 3, 3)) and np.array_equal(z["arr_1"], np.arange(12) % 3)
    sheet = np.asarray(Image.open(tmp_path / "a/grid.png"))[::6, ::6]      # 8 pixels are enlarged to 48
    assert sheet.shape == (10, 10 * 9 + 1) and np.array_equal(sheet[1:9, 10:18], x[1, ..., 0])
    record = json.loads((tmp_path / "a/sample.args.json").read_text())
    assert record["step"] == 7 and record["data_sha256"] == "d"
    assert record["args"]["sampler"] == "dpm++" and record["inputs"]["checkpoint"] == common.sha256(ddpm)
    assert draw(ddpm, tmp_path / "one", num=1).shape == (1, 8, 8, 1)


def test_mistakes_are_one_line_and_write_nothing(flow, ddpm, tmp_path, capsys):
    assert "ddpm model" in refused(capsys, ddpm, tmp_path / "a", "--sampler", "heun")
    assert "flow model" in refused(capsys, flow, tmp_path / "a", "--sampler", "ddim")
    assert "--cfg-interval" in refused(capsys, flow, tmp_path / "a", "--cfg-interval", 0.8, 0.2)
    assert "--cfg" in refused(capsys, flow, tmp_path / "a", "--cfg", "nan") and "--num" in refused(capsys, flow, tmp_path / "a", num=0)
    assert "does not name its VAE" in refused(capsys, latent(make_checkpoint(tmp_path / "l.pt")), tmp_path / "a")
    assert "nothing to decode" in refused(capsys, flow, tmp_path / "a", "--vae", "x")
    for sampler in ("ddim", "ancestral"):
        assert "has the 1000 steps" in refused(capsys, ddpm, tmp_path / "a", "--sampler", sampler, steps=1001)
    blind = make_checkpoint(tmp_path / "blind.pt", label_drop=0.0)
    assert "--cfg 1.5" in (text := refused(capsys, blind, tmp_path / "a", "--cfg", 1.5)) and "no null class" in text
    draw(blind, tmp_path / "unguided", num=2)
    state = torch.load(flow, weights_only=True)
    torch.save({"ema": state["ema"]}, tmp_path / "x.pt")
    assert "not a checkpoint of train.py" in refused(capsys, tmp_path / "x.pt", tmp_path / "a")        # weights without settings look official
    torch.save({**state, "args": {**state["args"], "num_classes": 5}}, tmp_path / "x.pt")
    assert "do not fit" in refused(capsys, tmp_path / "x.pt", tmp_path / "a")
    (tmp_path / "x.pt").write_bytes(flow.read_bytes()[:500])
    assert "x.pt" in refused(capsys, tmp_path / "x.pt", tmp_path / "a") and "none.pt" in refused(capsys, tmp_path / "none.pt", tmp_path / "a")


def latent(path, **more):
    state = torch.load(path, weights_only=True)
    torch.save({**state, "args": {**state["args"], "latents": True, **more}}, path)
    return path


@pytest.mark.parametrize("which", ["flow", "ddpm"])
def test_a_diverged_checkpoint_gives_one_line_and_no_samples(which, flow, ddpm, tmp_path, capsys):
    state = torch.load({"flow": flow, "ddpm": ddpm}[which], weights_only=True)
    name = next(k for k, v in state["ema"].items() if v.ndim > 1)
    state["ema"][name].view(-1)[0] = np.nan
    torch.save(state, tmp_path / "nan.pt")
    assert "diverged" in refused(capsys, tmp_path / "nan.pt", tmp_path / "a", fresh=False) and not (tmp_path / "a/samples.npy").exists()


def test_bf16_draws_nearly_the_same(flow, tmp_path):
    a, b = draw(flow, tmp_path / "a"), draw(flow, tmp_path / "b", "--amp", "bf16")
    off = np.abs(a.astype(int) - b)
    assert 0 < off.mean() < 4


def test_two_processes_and_one_draw_the_same(flow, tmp_path):
    for code, _, err in processes(2, ROOT / "sample.py", *argv(flow, tmp_path / "b", "--batch-size", 4, num=13)):
        assert code == 0, err[-3000:]
    assert alike(draw(flow, tmp_path / "a", num=13), np.load(tmp_path / "b/samples.npy"))
    assert {f.name for f in (tmp_path / "a").iterdir()} == {f.name for f in (tmp_path / "b").iterdir()}


def test_a_killed_overwrite_never_passes_the_old_samples_for_the_new(flow, tmp_path, monkeypatch):
    old = draw(flow, tmp_path / "a", num=6)
    with monkeypatch.context() as m:
        m.setattr(diffusion, "generate", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            draw(flow, tmp_path / "a", "--overwrite", "--seed", 5, num=6)
    new = draw(flow, tmp_path / "a", "--seed", 5, num=6)
    assert not np.array_equal(old, new) and np.array_equal(new, draw(flow, tmp_path / "b", "--seed", 5, num=6))


# ---------------------------------------------------------------------------------------------- latents
def plain_pixels(net, scale, x):
    """uint8 (n, H, W, 3) of latents x (n, c, h, w), decoded one by one."""
    with torch.no_grad():
        return np.concatenate([to_uint8(net.decode(one[None].float() / scale).sample).numpy() for one in x])


@pytest.mark.parametrize("process, sampler", [("flow", "euler"), ("ddpm", "ddim")])
def test_latents_are_decoded(process, sampler, tmp_path, fake_vae, capsys):
    """Drawn by the sampler on its own, unclipped (latents leave [-1, 1]), divided by the scale and decoded one by one."""
    checkpoint = latent(make_checkpoint(tmp_path / "l.pt", process, channels=4), latent_scale=0.25, vae="its/own")
    state = torch.load(checkpoint, weights_only=True)
    model, proc = from_checkpoint(state)
    noise, y = torch.stack([torch.randn(4, 8, 8, generator=common.generator(0, "sample", i)) for i in range(20)]), torch.arange(20) % 3
    with torch.no_grad():
        x = SAMPLERS[process][sampler](guided(model, proc, y), noise, proc, 2, **({"clip_x0": False} if process == "ddpm" else {}))
    assert x.abs().max() > 1.5
    got = draw(checkpoint, tmp_path / "a", "--sampler", sampler, "--batch-size", 7)
    assert got.shape == (20, 16, 16, 3) and alike(got, plain_pixels(FakeKL(), 0.25, x)) and len(np.unique(got)) > 40
    assert fake_vae.seen == [7, 7, 6] and json.loads((tmp_path / "a/sample.args.json").read_text())["args"]["vae"] == "its/own"
    assert alike(got, draw(checkpoint, tmp_path / "b", "--sampler", sampler, "--vae", "other/place"))
    assert max(fake_vae.seen) == 16                                       # however large the batch
    for change, word in ((dict(latent_scale=0.18215), "scale = 0.18215"), (dict(latent_scale=None), "scale = None")):
        other = latent(make_checkpoint(tmp_path / "o.pt", process, channels=4), **{"latent_scale": 0.25, "vae": "x", **change})
        assert word in refused(capsys, other, tmp_path / "c", "--sampler", sampler)
    other = latent(make_checkpoint(tmp_path / "o.pt", process, channels=3), latent_scale=0.25, vae="x")
    assert "channels = 3" in refused(capsys, other, tmp_path / "c", "--sampler", sampler)


def test_the_disk_is_asked_for_what_will_be_written(flow, tmp_path, monkeypatch, capsys, fake_vae):
    """Decoded images, not latents; and only before the first row: the space is reserved from then on."""
    latents = latent(make_checkpoint(tmp_path / "l.pt", channels=4), latent_scale=0.25, vae="its/own")
    disk = lambda free: monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))          # noqa: E731
    disk(20 * 16 * 16 * 3 - 1)
    assert "make room" in refused(capsys, latents, tmp_path / "a")
    disk(20 * 16 * 16 * 3)
    assert draw(latents, tmp_path / "a").shape == (20, 16, 16, 3)
    disk(0)
    draw(latents, tmp_path / "a")
    assert "nothing to do" in capsys.readouterr().out and "make room" in refused(capsys, flow, tmp_path / "b")


def test_without_diffusers_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    checkpoint = latent(make_checkpoint(tmp_path / "l.pt", channels=4), latent_scale=0.25, vae="x")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install diffusers" in refused(capsys, checkpoint, tmp_path / "a")


def test_samples_of_the_real_format(real_vae, tmp_path):
    folder, net = real_vae
    checkpoint = latent(make_checkpoint(tmp_path / "l.pt", channels=4), latent_scale=0.3, vae=str(folder))
    model, process = from_checkpoint(torch.load(checkpoint, weights_only=True))
    noise, y = torch.stack([torch.randn(4, 8, 8, generator=common.generator(0, "sample", i)) for i in range(20)]), torch.arange(20) % 3
    with torch.no_grad():
        x = SAMPLERS["flow"]["heun"](guided(model, process, y), noise, process, 2)
    assert alike(draw(checkpoint, tmp_path / "a"), plain_pixels(net, 0.3, x))


# ---------------------------------------------------------------------------------------------- official weights
def make_official(path, **more):
    torch.manual_seed(0)
    net = SiT(size=8, channels=4, num_classes=3, depth=1, width=384, heads=6, patch=2, learn_sigma=True).eval()
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    torch.save({"ema": {f"module.{k}": v for k, v in net.state_dict().items()}, "opt": {}, **more}, path)
    return net


@pytest.mark.parametrize("kind", ["dit", "sit"])
def test_official_weights_draw_by_their_own_formulas(kind, tmp_path, monkeypatch, fake_vae, capsys):
    """SiT from noise (0) to data (1) along dx/dt = v; DiT by DDIM on its own indices. Guidance as published, on all channels."""
    monkeypatch.setattr(FakeKL, "config", {**FakeKL.config, "scaling_factor": 0.18215})
    fake_vae.config = FakeKL.config
    net = make_official(tmp_path / "x.pt", args=argparse.Namespace(model="SiT-S/2", lr=1e-4))
    y, null = torch.arange(6) % 3, torch.full((6,), 3)
    x = torch.stack([torch.randn(4, 8, 8, generator=common.generator(0, "sample", i)) for i in range(6)])
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    with torch.no_grad():
        def field(x, t):
            t = torch.full((6,), float(t))
            return net(x, t, null) + 2 * (net(x, t, y) - net(x, t, null))
        for k in range(4):
            if kind == "sit":
                x = x + field(x, k / 4) / 4
            else:
                i, j = 999 - 250 * k, 749 - 250 * k
                a, b = abar[i], abar[j] if j > 0 else 1.0
                eps = field(x, i)
                x = b**0.5 * (x - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - b) ** 0.5 * eps
    flags = ("--cfg", 2, "--sampler", {"sit": "euler", "dit": "ddim"}[kind])
    got = draw(tmp_path / "x.pt", tmp_path / "a", "--official", kind, *flags, num=6, steps=4)
    assert alike(got, plain_pixels(FakeKL(), 0.18215, x.float())) and len(np.unique(got)) > 40
    args = json.loads((tmp_path / "a/sample.args.json").read_text())["args"]
    assert args["vae"] == "stabilityai/sd-vae-ft-ema" and args["official"] == kind
    assert "--official dit or --official sit" in refused(capsys, tmp_path / "x.pt", tmp_path / "b")
    make_official(tmp_path / "plain.pt")
    assert "--official dit or --official sit" in refused(capsys, tmp_path / "plain.pt", tmp_path / "b")
    assert "leave --official out" in refused(capsys, make_checkpoint(tmp_path / "own.pt"), tmp_path / "b", "--official", kind)


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Sub(argparse.Namespace):
    """A kind of Namespace that is not the one let in."""

    def __setstate__(self, state):
        Path(os.environ["CANARY"]).touch()


@pytest.mark.parametrize("how", ["call", "subclass", "inside"])
def test_letting_a_namespace_in_runs_no_other_pickle(how, tmp_path, monkeypatch, fake_vae, capsys):
    mark = tmp_path / "ran"
    monkeypatch.setenv("CANARY", str(mark))
    bad = {"call": Canary(mark), "subclass": Sub(x=1), "inside": argparse.Namespace(x=Canary(mark))}[how]
    make_official(tmp_path / "x.pt", args=bad)
    for flags in (("--official", "sit"), ()):
        assert "x.pt: not readable" in refused(capsys, tmp_path / "x.pt", tmp_path / "a", *flags, num=1) and not mark.exists()
    torch.load(tmp_path / "x.pt", weights_only=False)                     # the trap itself works
    assert mark.exists()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()          # and the door is closed again


# ---- what is asked for
def test_labels_by_name_and_number_in_turn(tmp_path, capsys):
    ckpt = make_checkpoint(tmp_path / "c.pt", classes=["cat", "dog, small", "7"])
    for words, want in ((["cat"], [0] * 5), (["CAT", "1"], [0, 1, 0, 1, 0]), (["1,1,2"], [1, 1, 2, 1, 1]), (["dog, small"], [1] * 5), (["7"], [2] * 5), (["3"], [3] * 5)):
        out = tmp_path / "".join(words)
        draw(ckpt, out, "--labels", *words, num=5, steps=1)
        assert np.load(out / "sample_labels.npy").tolist() == want
        assert json.loads((out / "sample.args.json").read_text())["args"]["labels"] == ",".join(words)
    for words, said in (("bird", "'bird' is no class"), ("4", "numbers 0..3"), ("0,,1", "'' is no class"), ("-1", "'-1' is no class"), ("nothing.npy", "no such file")):
        with pytest.raises(SystemExit):
            draw(ckpt, tmp_path / "no", f"--labels={words}", num=5, steps=1)
        assert said in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_files_for_other_programs(flow, tmp_path):
    """ADM's evaluator takes three channels; a folder of files each, flat or by class, whole or not at all; asked for later as well."""
    from PIL import Image
    x = draw(flow, tmp_path, "--npz", num=7)
    z = np.load(tmp_path / "samples.npz")
    assert z["arr_0"].shape == (7, 8, 8, 3) and (z["arr_0"] == x).all() and z["arr_0"].dtype == np.uint8
    stamp = (tmp_path / "samples.npy").stat().st_mtime_ns
    for form, name in (("flat", "png"), ("classes", "png-classes")):
        draw(flow, tmp_path, "--npz", "--png", form, num=7)
        files = sorted((tmp_path / name).rglob("*.png"), key=lambda f: f.name)
        assert len(files) == 7 and all((np.asarray(Image.open(f)) == x[i, ..., 0]).all() for i, f in enumerate(files))
    assert [f.parent.name for f in files] == [f"{i % 3}_none" for i in range(7)] and (tmp_path / "samples.npy").stat().st_mtime_ns == stamp
    y = draw(flow, tmp_path, "--seed", 1, "--png", "flat", "--overwrite", num=5)
    assert len(list((tmp_path / "png").iterdir())) == 5 and not (tmp_path / "png-classes").exists()
    assert (np.asarray(Image.open(tmp_path / "png/000004.png")) == y[4, ..., 0]).all()


def test_choices_of_published_sampling(flow, tmp_path, capsys):
    four = make_checkpoint(tmp_path / "four.pt", "ddpm", channels=3)
    a = draw(four, tmp_path / "a", "--cfg", 2, num=4)
    b = draw(four, tmp_path / "b", "--cfg", 2, "--cfg-channels", 1, num=4)
    c = draw(four, tmp_path / "c", "--cfg", 2, "--time-grid", "linspace", num=4)
    assert (a != b).any() and (a != c).any() and json.loads((tmp_path / "c/sample.args.json").read_text())["args"]["time_grid"] == "linspace"
    for flags, words in ((("--time-grid", "linspace"), "ddpm samplers"), (("--cfg-channels", "1"), "has 1 channels")):
        with pytest.raises(SystemExit):
            draw(flow, tmp_path / "no", *flags, num=4)
        assert words in capsys.readouterr().err
