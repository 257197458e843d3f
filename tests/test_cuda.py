"""The GPU's path on tensors that need no GPU (fake_cuda.py): every stage keeps to one device, and no training step waits for it outside log lines."""
import collections
import json
import math

import numpy as np
import pytest
import torch
import torchvision

import attach
import reweight
import sample
import train
from conftest import make_data
from fake_cuda import DEVICE, LOG_EVERY, fake_gpu
from models import build, encoders, memorisation
from test_encoders import dino_state

# Log lines at steps 2 and 4: what the third step does is counted with the line before it, the others are looked at.
BASE = f"--steps 4 --batch-size 8 --log-every {LOG_EVERY} --checkpoint-every 0 --warmup 2 --schedule constant --lr 1e-4 --ema 0.99 --device cuda".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """120 colour images of 16 x 16."""
    return make_data(tmp_path_factory.mktemp("data") / "x", sizes=(40, 40, 40), side=16, channels=3)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """50 latents of 4 x 16 x 16, as data.py writes them."""
    return make_latents(tmp_path_factory.mktemp("latents") / "x", 16)


def make_latents(folder, side):
    make_data(folder)
    mean = np.random.default_rng(0).normal(size=(50, 4, side, side))
    z = np.concatenate([mean, np.full_like(mean, 0.1)], 1).astype(np.float16)
    np.save(folder / "latents.npy", z)
    (folder / "images.npy").unlink()
    scale = 0.18215
    about = {"vae": "x", "scale": scale, "mean": scale * z[:, :4].astype(float).mean(), "std": scale * math.sqrt(z[:, :4].astype(float).var() + 0.01)}
    (folder / "latents.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def attached(data, tmp_path_factory):
    """What attach.py --flips leaves for half of the images."""
    folder = tmp_path_factory.mktemp("attach")
    rng = np.random.default_rng(0)
    np.save(folder / "keep.npy", np.arange(0, 120, 2))
    np.save(folder / "text.npy", rng.normal(size=(3, 4, 8)).astype(np.float16))
    np.save(folder / "text_mask.npy", np.ones((3, 4), bool))
    np.save(folder / "visual.npy", rng.normal(size=(60, 2, 16, 24)).astype(np.float16))
    sha = json.loads((data / "dataset.json").read_text())["sha256"]
    (folder / "attach.args.json").write_text(json.dumps({"args": {}, "inputs": {"data": sha}, "seconds": 1}))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "w.npy"
    np.save(file, np.array([0.5, 1, 1.5], np.float32))
    return file


def checkpoint(folder, data, **more):
    """A real checkpoint of random weights."""
    note = json.loads((data / "dataset.json").read_text())
    settings = dict(model="SiT-T/2", process="flow", predict="v", size=16, channels=3, num_classes=3, class_std=0.02, text_shape=None, dropout=None, latents=False, latent_scale=None,
                    classes=(data / "classes.txt").read_text().split(), data=note["name"], data_sha256=note["sha256"], steps=4, batch_size=8, lr=1e-4, amp="bf16", warmup=0, schedule="constant",
                    grad_clip=1.0, flips=True)
    settings.update(more)
    net = build.build(settings)
    torch.save({"model": net.state_dict(), "ema": net.state_dict(), "step": 4, "args": settings}, folder / "ref.pt")
    return folder / "ref.pt"


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(train, "preview", lambda *a, **k: None)
    monkeypatch.setattr(train, "loss_plot", lambda *a, **k: None)


def fit(monkeypatch, data, out, *more, **gpu):
    with fake_gpu(monkeypatch, **gpu) as seen:
        train.main(["--data", str(data), *BASE, "--out", str(out), *map(str, more)])
    return seen


RUNS = {
    "SiT with everything": ("--model SiT-T/2 --process flow --amp bf16 --flips --accumulate 2 --weigh --attach", {}),
    "data streamed": ("--model SiT-T/2 --process flow --amp auto --flips --attach", dict(free=1)),
    "U-Net, fp16": ("--model unet-tiny --process ddpm --amp fp16 --flips --dropout 0.1", {}),
    "older GPU": ("--model unet-tiny --process ddpm --predict v --amp auto --no-flips --recompute --weigh --reweight-mode resample", dict(capability=(7, 5))),
    "latents, Min-SNR": ("--model SiT-T/2 --process ddpm --amp bf16 --no-flips --min-snr 5 --latents", {}),
    "MDT": ("--model MDT-T/2 --process ddpm --amp bf16 --no-flips --optimizer adamw --min-snr 5", {}),
    "compiled": ("--model SiT-T/2 --process flow --amp none --no-flips --compile", {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_no_step_waits_for_the_device_outside_log_lines(name, data, latents, attached, weights, quiet, tmp_path, monkeypatch, capsys):
    words, gpu = RUNS[name]
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: compiled.append(type(net)))         # that it changes rounding only: test_train.py
    here = latents if "--latents" in words else data
    words = words.replace("--latents", "").replace("--attach", f"--attach {attached}").replace("--weigh", f"--weights {weights}").split()
    seen = fit(monkeypatch, here, tmp_path / "a", *words, **gpu)
    assert seen.in_steps() == {} and compiled == [train.Objective] * ("--compile" in words)
    # The row indices go to the device once a step, and where the data are not there, images and tokens; the table of a ddpm's noise goes once.
    copied = collections.Counter()
    for (phase, line), n in seen.copies.items():
        copied[line] += n * (phase != "setup")
    copied = {line: n for line, n in copied.items() if n}
    assert copied.pop("models/diffusion.py: self.tables[x.device] = table.to(x.device, torch.float32, non_blocking=True)", 1) == 1
    streamed = {"common/rows.py: return values.to(self.device, non_blocking=True)": 8} if gpu.get("free") == 1 else {}
    assert copied == {"train.py: there = rows.to(self.labels.device, non_blocking=True)        # copied once for all three": 4, **streamed}
    rows = [json.loads(line) for line in (tmp_path / "a/stats.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4] and (tmp_path / "a/last.pt").exists()
    becomes = {"data streamed": "bf16", "older GPU": "fp16"}.get(name)
    assert becomes is None or f"amp auto becomes {becomes}" in capsys.readouterr().out


def test_adan_waits_once_a_step(data, quiet, tmp_path, monkeypatch):
    """Its step must be left out by hand where a gradient is not finite (common/loop.py: optimizer_of)."""
    seen = fit(monkeypatch, data, tmp_path / "a", *"--model MDT-T/2 --process ddpm --amp bf16 --no-flips --optimizer adan".split())
    assert sum(seen.in_steps().values()) == 3 and {what for what, _ in seen.in_steps()} == {"item"}


@pytest.mark.parametrize("free", [1e12, 1])
def test_the_proxy_of_reweight_waits_at_log_lines_only(free, data, tmp_path, monkeypatch):
    ref = checkpoint(tmp_path, data)
    monkeypatch.setattr(reweight, "weigh", lambda args, inputs, record, run, out: {"shape": list(record.shape)})
    with fake_gpu(monkeypatch, free=free) as seen:
        reweight.main(["--data", str(data), "--reference", str(ref), "--burn-in", "1", "--log-every", str(LOG_EVERY), "--out", str(tmp_path / "w"), "--device", "cuda"])
    assert seen.in_steps() == {} and len([key for key in seen.waits if key[0] == "log"]) >= 4
    assert json.loads((tmp_path / "w/reweight.args.json").read_text())["shape"] == [4, 2, 8]


def test_stable_diffusion_waits_at_log_lines_only(tiny_sd, quiet, tmp_path, monkeypatch):
    data = make_latents(tmp_path / "data", 8)
    more = "--preset sd --official sd --no-recompute --amp bf16 --init".split()
    seen = fit(monkeypatch, data, tmp_path / "a", *more, tiny_sd["epsilon"])
    assert seen.in_steps() == {}


def test_a_wait_in_a_step_and_a_stray_tensor_are_seen(data, quiet, tmp_path, monkeypatch):
    """The instrument itself: what it must find, it finds."""
    real = train.total_loss
    monkeypatch.setattr(train, "total_loss", lambda diffusion, *rest: real(diffusion * max(1.0, diffusion.mean().item()), *rest))
    seen = fit(monkeypatch, data, tmp_path / "a", *"--model SiT-T/2 --process flow --amp none --no-flips".split())
    assert sum(seen.in_steps().values()) == 3
    for stray, says in ((lambda d, *rest: real(d * torch.ones(8), *rest), "same device"), (lambda d, *rest: real(d[d.nonzero()[:, 0]], *rest), None)):
        monkeypatch.setattr(train, "total_loss", stray)
        with pytest.raises(RuntimeError, match=says) if says else pytest.raises(Exception):
            fit(monkeypatch, data, tmp_path / "b", *"--model SiT-T/2 --process flow --amp none --no-flips".split())


# ---------------------------------------------------------------------------------------------- the other stages
@pytest.mark.parametrize("process, sampler", [("flow", "heun"), ("flow", "sde"), ("ddpm", "ddim"), ("ddpm", "ancestral"), ("ddpm", "dpm++")])
def test_samples_are_drawn_on_one_device(process, sampler, data, tmp_path, monkeypatch):
    ref = checkpoint(tmp_path, data, process=process, predict="v" if process == "flow" else "eps")
    with fake_gpu(monkeypatch):
        sample.main(["--checkpoint", str(ref), "--num", "6", "--steps", "3", "--sampler", sampler, "--cfg", "1.5", "--amp", "auto", "--out", str(tmp_path / "s"), "--device", "cuda"])
    assert np.load(tmp_path / "s/samples.npy").shape == (6, 16, 16, 3)
    assert json.loads((tmp_path / "s/sample.args.json").read_text())["args"]["amp"] == "bf16"


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_difficulty_is_scored_on_one_device(kind, data, latents, tmp_path, monkeypatch):
    here = data if kind == "pixels" else latents
    more = {} if kind == "pixels" else dict(latents=True, channels=4, latent_scale=0.18215, vae="x")
    ref = checkpoint(tmp_path, here, **more)
    with fake_gpu(monkeypatch):
        attach.main(["--data", str(here), "--reference", str(ref), "--per-class", "2", "--text", "none", "--visual", "none", "--judge", "none", "--amp", "auto", "--batch-size", "64",
                     "--out", str(tmp_path / "d"), "--device", "cuda"])
    assert len(np.load(tmp_path / "d/keep.npy")) == 6


@pytest.mark.parametrize("name", ["ddae", "pixels", "resnet18", "dinov2_vits14"])
def test_encoders_keep_to_one_device(name, data, tmp_path, monkeypatch):
    """Images in, features out: what comes back to the CPU is one copy a batch, and one for the probe."""
    images = np.load(data / "images.npy")[:4]
    weights = None
    if name == "ddae":
        weights = checkpoint(tmp_path, data)
    if name == "resnet18":
        weights = tmp_path / "r.pth"
        torch.save(torchvision.models.resnet18(weights=None).state_dict(), weights)
    if name == "dinov2_vits14":
        weights = tmp_path / "d.pth"
        torch.save(dino_state(384, 1, side=37), weights)
    with fake_gpu(monkeypatch) as seen:
        encoder = encoders.load(name, DEVICE, weights, images)
        before = seen.waits.total()
        z = encoders.extract(encoder, images, batch_size=2)
    assert z.shape == (4, encoder.width)
    assert sum(n for (_, what, _), n in seen.waits.items() if what == "copy from the device") >= 2 and seen.waits.total() > before


def test_the_audit_keeps_to_one_device(data, monkeypatch):
    images, labels = np.load(data / "images.npy"), np.load(data / "labels.npy")
    near, far = np.arange(0, 120, 2), np.arange(1, 120, 2)

    def encode(x):
        return x.reshape(len(x), -1) / 127.5 - 1
    with fake_gpu(monkeypatch) as seen:
        out = memorisation.memorisation_audit(encode, images[:10], images[near], labels[near], images[far], labels[far], heldout=images[20:30], draws=2, device=DEVICE)
    assert set(out) == {"samples", "heldout", "noise"} and seen.waits
