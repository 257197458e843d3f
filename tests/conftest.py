"""Puts the repository root on the path and keeps tests on few threads, so that two of them do not fight for cores."""
import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

# Before torch, which reads it when it is imported, and takes no more threads than there are cores: as the processes that
# tests start do. torch.set_num_threads would take more, and round otherwise than they.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes, not seconds; run by .ci/run after the fast ones")


def pytest_collection_modifyitems(items):
    for item in items:                                                # diffusers is optional: .ci/run installs it before the slow tests
        if {"real_vae", "tiny_sd"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


def as_flags(values):
    """batch_size=8, flips=True, model=None -> --batch-size 8 --flips, the words of a command line."""
    words = []
    for k, v in values.items():
        words += [] if v is None or v is False else ["--" + k.replace("_", "-")] + ([] if v is True else [str(v)])
    return words


def stats(out, drop=("seconds",)):
    """The rows of a run's stats.jsonl without what differs from call to call."""
    return [{k: v for k, v in json.loads(line).items() if k not in drop} for line in (Path(out) / "stats.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def crash_at(step):
    """In the block the training loop raises at `step`, as a killed process stops there; it must come that far."""
    import common

    class Crash(Exception):
        pass

    real = common.lr_at

    def lr_at(n, *rest):
        if n == step:
            raise Crash
        return real(n, *rest)

    with pytest.MonkeyPatch.context() as m, pytest.raises(Crash):
        m.setattr(common, "lr_at", lr_at)
        yield


def copy_kit(there):
    """What the scripts need of the repository, copied to `there`."""
    for folder in ("common", "models"):
        shutil.copytree(ROOT / folder, there / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (there / "data").mkdir()
    for file in (*ROOT.glob("*.py"), ROOT / "run_all.sh", ROOT / "requirements.txt", ROOT / "data/digits.npz"):
        shutil.copy(file, there / file.relative_to(ROOT))
    return there


def make_data(folder, sizes=(20, 17, 13), side=8, channels=1, seed=0):
    """A data folder as data.py writes it: noisy images whose brightness is their class, with a bright left column so that mirroring shows."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int64)
    images = (rng.integers(0, 100, (len(labels), side, side, channels)) + 40 * labels[:, None, None, None]).astype(np.uint8)
    images[:, :, 0] = 255
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    (folder / "classes.txt").write_text("".join(f"class{c}\n" for c in range(len(sizes))))
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    (folder / "dataset.json").write_text(json.dumps({"name": "tiny", "sha256": digest, "num_classes": len(sizes)}))
    return folder


def processes(n, *command, timeout=120, **env):
    """A Python command as the n ranks of one process group on this machine, as torchrun would start them: [(exit code, stdout, stderr) of each rank]."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **env}
    ranks = [subprocess.Popen([sys.executable, *map(str, command)], env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True) for r in range(n)]
    try:
        texts = [p.communicate(timeout=timeout) for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    return [(p.returncode, *t) for p, t in zip(ranks, texts)]


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """50 images 8 x 8 x 1 in 3 classes. Shared by all tests: read only."""
    return make_data(tmp_path_factory.mktemp("tiny") / "data")


@torch.no_grad()
def published_loss(net, kind, x, u, eps, y):
    """(n,) losses of an official network by its own paper's formula: DiT's eps at the step of u (n,), SiT's x - eps in its own time, 1 - u."""
    u, abar = u.view(-1, 1, 1, 1), torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))).float()
    if kind == "dit":
        t = (u.flatten() * 1000).long()
        a = abar[t].view(-1, 1, 1, 1)
        error = net(a.sqrt() * x + (1 - a).sqrt() * eps, t.float(), y) - eps
    else:
        error = net((1 - u) * x + u * eps, 1 - u.flatten(), y) - (x - eps)
    return error.square().mean((1, 2, 3))


class FakeKL:
    """What models.vae.Vae asks of diffusers' AutoencoderKL, in a few lines: every 2 x 2 pixels become one, no weights. `seen`: batch sizes."""
    config = dict(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(1, 1), scaling_factor=0.25)

    def __init__(self):
        self.seen = []

    def encode(self, x):
        self.seen.append(len(x))
        small = torch.nn.functional.avg_pool2d(x, 2)                  # (n, 3, h, w)
        mean = torch.cat([3 * small + 0.5, small[:, :1] * small[:, 1:2]], 1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=0.1 + mean.abs() / 8))

    def decode(self, z):
        self.seen.append(len(z))
        pixels = torch.sin(0.03 * (z[:, :3] + 0.5 * z[:, 3:]))        # bounded, and never flat however large the latents
        return SimpleNamespace(sample=torch.nn.functional.interpolate(pixels, scale_factor=2, mode="nearest"))


def use_fake_vae(**config):
    """Put it in the place of every VAE that is asked for; returns the network."""
    from models import vae
    net = FakeKL()
    net.config = {**FakeKL.config, **config}
    vae.load_vae = lambda name, device="cpu": vae.Vae(net, name)
    return net


@pytest.fixture
def fake_vae(monkeypatch):
    from models import vae
    monkeypatch.setattr(vae, "load_vae", vae.load_vae)      # put back afterwards
    return use_fake_vae()


@pytest.fixture(scope="session")
def real_vae(tmp_path_factory):
    """The folder of a tiny AutoencoderKL with random weights, written by diffusers itself; skips where that is not installed."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.AutoencoderKL(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
                                  up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16, scaling_factor=0.3)
    folder = tmp_path_factory.mktemp("vae")
    net.save_pretrained(folder)
    return folder, net.eval()


def make_sd(folder, predict="epsilon", seed=0):
    """A tiny Stable Diffusion with random weights, saved by diffusers in the real format (0.5 MB): 8 x 8 latents of 16 x 16 pixels. Returns the pipeline."""
    import diffusers
    import transformers
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
                                          cross_attention_dim=32, attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                          up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
                                  up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16, scaling_factor=0.18215)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=514, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                                                 bos_token_id=512, eos_token_id=513, pad_token_id=513))
    # CLIP writes a byte as a printable letter; a word's last letter has an ending of its own. Without merges every letter is a token.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in plain} | {b: chr(256 + k) for k, b in enumerate(b for b in range(256) if b not in plain)}
    words = [*letters.values(), *(c + "</w>" for c in letters.values()), "<|startoftext|>", "<|endoftext|>"]
    there = folder / "tokenizer"
    there.mkdir(parents=True)
    (there / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}), encoding="utf-8")
    (there / "merges.txt").write_text("#version: 0.2\n")
    (there / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>",
                                                             "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(there)
    scheduler = diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, skip_prk_steps=True, steps_offset=1,
                                        prediction_type=predict)
    pipe = diffusers.StableDiffusionPipeline(vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None, feature_extractor=None,
                                             requires_safety_checker=False)
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """{"epsilon": folder, "v_prediction": folder} of such a model each; skips where its packages are not installed. Read only."""
    for name in ("diffusers", "transformers", "peft"):
        pytest.importorskip(name)
    folders = {}
    for k, predict in enumerate(("epsilon", "v_prediction")):
        folders[predict] = tmp_path_factory.mktemp("sd") / predict
        make_sd(folders[predict], predict, seed=k)
    return folders
