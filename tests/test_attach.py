"""attach.py: the score against closed forms, selection against a plain loop, text and visual tokens, resume, and one clear line for each mistake."""
import hashlib
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import attach
import prune
import train
from conftest import processes
from models import conditioning, encoders
from models.build import build, from_checkpoint
from models.conditioning import class_words, minilm_tokens, text_tokens
from models.diffusion import DDPM, Flow
from models.scratch import train_scratch
from models.sit import SiT

ROOT = Path(attach.__file__).parent
NAMES = ("cat", "dog", "truck")


def make_data(folder, sizes=(9, 14, 6), side=8, channels=1, names=NAMES):
    """A data folder as data.py writes it, classes interleaved; with a scratch network that saw one epoch."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int64)
    images = (rng.integers(0, 120, (len(labels), side, side, channels)) + 40 * labels[:, None, None, None]).astype(np.uint8)
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    (folder / "classes.txt").write_text("".join(f"{n}\n" for n in names[:len(sizes)]))
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    (folder / "dataset.json").write_text(json.dumps({"name": "test", "sha256": digest}))
    if len(sizes) > 1:
        torch.save(train_scratch(images, labels, len(sizes), "cpu", epochs=1), folder / "scratch.pt")
    return folder


def make_checkpoint(path, process="flow", num_classes=3, size=8, channels=1, seed=0, **more):
    """A checkpoint of train.py whose network answers something: the zero start of adaLN is undone."""
    settings = {"model": "SiT-T/2", "process": process, "predict": "v" if process == "flow" else "eps", "size": size, "channels": channels,
                "num_classes": num_classes, "class_std": 1.0, **more}
    torch.manual_seed(seed)
    net = build(settings)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    torch.save({"args": settings, "ema": net.state_dict(), "step": 1}, path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    top = tmp_path_factory.mktemp("attach")
    return make_data(top / "data"), make_checkpoint(top / "flow.pt")


def run(data, out, *flags):
    attach.main(["--data", str(data), "--out", str(out), "--device", "cpu", *map(str, flags)])
    return json.loads((out / "attach.args.json").read_text())


def refused(capsys, data, out, *flags):
    """The one line of an exit with code 2 that left nothing behind."""
    with pytest.raises(SystemExit) as e:
        run(data, out, *flags)
    text = capsys.readouterr().err.strip()
    assert e.value.code == 2 and "\n" not in text and text.startswith("attach.py: error:") and not out.exists(), text
    return text


# ---------------------------------------------------------------------------------------------- the score
def noise(T=10, shape=(2, 4, 4)):
    return torch.randn(T, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("process", [DDPM(), DDPM(predict="v"), Flow()])
def test_score_of_a_model_with_known_error(process):
    """A model that answers 0: the score is the mean square of the target, written out here from x, eps and the schedule."""
    x, eps, ts = torch.randn(5, 2, 4, 4), noise(), attach.stratified_times()
    got = attach.difficulty_scores(lambda x, t, y: torch.zeros_like(x), process, x, torch.zeros(5).long(), eps, ts)
    want, abar = np.zeros(5), np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for j in range(10):
        a, s = np.sqrt(abar[100 * j + 50]), np.sqrt(1 - abar[100 * j + 50])
        for i in range(5):
            e, xi = eps[j].double().numpy(), x[i].double().numpy()
            target = e - xi if process.name == "flow" else e if process.predict == "eps" else a * e - s * xi
            want[i] += (target ** 2).mean() / 10
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5)


def test_score_of_the_noise_plus_a_constant_is_its_square():
    """eps_theta = eps + c_y: every image of class y scores c_y^2 whatever the image and the noise; the times are the indices 50 ... 950."""
    eps, x, c, seen = noise(), torch.randn(6, 2, 4, 4), torch.tensor([0.1, 2.0, -3.0]), []
    process, y = DDPM(), torch.tensor([0, 1, 2, 2, 1, 0])

    def model(x_t, t, y):
        seen.append(t[0].item())
        a, s = (v[int(t[0])] for v in (process.abar.sqrt(), (1 - process.abar).sqrt()))
        return ((x_t - a * x) / s + c[y].view(-1, 1, 1, 1)).float()
    np.testing.assert_allclose(attach.difficulty_scores(model, process, x, y, eps, attach.stratified_times()), c[y] ** 2, rtol=1e-3)
    assert seen == [50 + 100 * j for j in range(10)]


def test_every_image_meets_the_same_noise():
    x = torch.zeros(4, 2, 4, 4)
    s = attach.difficulty_scores(lambda x, t, y: torch.zeros_like(x), DDPM(), x, torch.zeros(4).long(), noise(), attach.stratified_times())
    assert (s == s[0]).all() and s.dtype == torch.float32


def test_reversed_time_equals_the_official_formula():
    """An official SiT runs from noise to data and predicts x - eps at x_t = t x + (1 - t) eps: its loss, written in its own time, is the score."""
    torch.manual_seed(0)
    net = build({"model": "SiT-T/2", "process": "flow", "size": 4, "channels": 2, "num_classes": 3, "learn_sigma": True}).eval()
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x, y, eps, ts = torch.randn(3, 2, 4, 4), torch.tensor([0, 1, 2]), noise(), attach.stratified_times()
    want = torch.zeros(3)
    with torch.no_grad():
        for t, e in zip(1 - ts, eps):
            v = net(t * x + (1 - t) * e, t.expand(3), y)
            want += (v - (x - e)).square().mean((1, 2, 3)) / 10
    torch.testing.assert_close(attach.difficulty_scores(lambda x, t, y: -net(x, 1 - t, y), Flow(), x, y, eps, ts), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("process", ["ddpm", "flow"])
def test_the_script_scores_as_a_plain_loop(tmp_path, process):
    data, ck = make_data(tmp_path / "data"), make_checkpoint(tmp_path / "ck.pt", process)
    run(data, tmp_path / "a", "--reference", ck, "--per-class", 2, "--judge", "none", "--batch-size", 4, "--seed", 3)
    record = run(data, tmp_path / "b", "--reference", ck, "--per-class", 2, "--judge", "none", "--batch-size", 29, "--seed", 3)
    net, proc = from_checkpoint(torch.load(ck, weights_only=True))
    images, labels = np.load(data / "images.npy"), np.load(data / "labels.npy")
    eps, again = (torch.randn(10, 1, 8, 8, generator=attach.common.generator(3, "difficulty", r)) for r in (0, 1))
    want = []
    for im, c in zip(images, labels):
        x, total = torch.from_numpy(im).float().permute(2, 0, 1)[None] / 127.5 - 1, 0.0
        for j in range(10):
            u = torch.tensor([j / 10 + 0.05])
            out = net(proc.diffuse(x, u, eps[j:j + 1]), proc.model_time(u), torch.tensor([c]))
            total += ((out - proc.target(x, u, eps[j:j + 1])) ** 2).mean().item() / 10
        want.append(total)
    for folder in "ab":
        s = np.load(tmp_path / folder / "difficulty.npy")
        assert s.dtype == np.float32
        np.testing.assert_allclose(s, want, rtol=1e-5)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    other = attach.difficulty_scores(net, proc, x, torch.from_numpy(labels), again, attach.stratified_times()).numpy()
    rank = lambda v: np.argsort(np.argsort(v))                                                # noqa: E731
    want = np.mean([np.corrcoef(rank(s[labels == c]), rank(other[labels == c]))[0, 1] for c in range(3)])
    assert record["repeat_correlation"] == pytest.approx(want)


def test_latents_are_scored_at_the_posterior_mean(tmp_path):
    data = make_data(tmp_path / "data")
    z = np.random.default_rng(0).normal(size=(29, 8, 8, 8)).astype(np.float16)
    np.save(data / "latents.npy", z)
    (data / "images.npy").unlink()
    (data / "latents.json").write_text(json.dumps({"scale": 0.5}))
    ck = make_checkpoint(tmp_path / "ck.pt", channels=4, latent_scale=0.5)
    run(data, tmp_path / "out", "--reference", ck, "--per-class", 2, "--judge", "none")
    net, proc = from_checkpoint(torch.load(ck, weights_only=True))
    eps, y = torch.randn(10, 4, 8, 8, generator=attach.common.generator(0, "difficulty", 0)), torch.from_numpy(np.load(data / "labels.npy"))
    want = attach.difficulty_scores(net, proc, 0.5 * torch.from_numpy(z[:, :4]).float(), y, eps, attach.stratified_times())
    np.testing.assert_allclose(np.load(tmp_path / "out" / "difficulty.npy"), want, rtol=1e-5)


def make_official(path, channels=1, num_classes=3, width=384, drop=None, bare=False, nan=False):
    """Official DiT/SiT weights: names, shapes and wrapping as published; every weight random. Returns (path, the network)."""
    torch.manual_seed(0)
    net = SiT(size=8, channels=channels, num_classes=num_classes, depth=2, width=width, heads=6, patch=2, learn_sigma=True).eval()
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    if nan:
        net.pos_embed.data[:] = torch.nan
    weights = {k if bare else f"module.{k}": v for k, v in net.state_dict().items() if k != drop}
    torch.save(weights if bare else {"ema": weights}, path)
    return path, net


@pytest.mark.parametrize("kind", ["dit", "sit"])
@pytest.mark.parametrize("latents", [False, True], ids=["images", "latents"])
def test_official_weights_score_as_their_own_loss(tmp_path, kind, latents):
    """The score in the words of their papers: DiT predicts eps at the steps 50 ... 950; SiT x - eps on t x + (1 - t) eps, from noise to data."""
    data, scale = make_data(tmp_path / "data", sizes=(3, 5, 4)), 0.18215
    labels = torch.from_numpy(np.load(data / "labels.npy"))
    x = torch.from_numpy(np.load(data / "images.npy")).permute(0, 3, 1, 2).float() / 127.5 - 1
    if latents:
        z = np.random.default_rng(0).normal(size=(12, 8, 8, 8)).astype(np.float16)
        np.save(data / "latents.npy", z)
        (data / "latents.json").write_text(json.dumps({"scale": scale}))
        x = scale * torch.from_numpy(z[:, :4]).float()
    ck, net = make_official(tmp_path / "official.pt", x.shape[1])
    record = run(data, tmp_path / "out", "--reference", ck, "--official", kind, "--per-class", 2, "--judge", "none", "--batch-size", 8)
    eps, want = torch.randn(10, x.shape[1], 8, 8, generator=attach.common.generator(0, "difficulty", 0)), torch.zeros(12)
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    with torch.no_grad():
        for j, e in enumerate(eps):
            if kind == "dit":
                t = 100 * j + 50
                error = net(float(abar[t] ** 0.5) * x + float((1 - abar[t]) ** 0.5) * e, torch.full((12,), float(t)), labels) - e
            else:
                t = 1 - (j + 0.5) / 10
                error = net(t * x + (1 - t) * e, torch.full((12,), t), labels) - (x - e)
            want += error.square().mean((1, 2, 3)) / 10
    np.testing.assert_allclose(np.load(tmp_path / "out" / "difficulty.npy"), want, rtol=1e-4)
    assert record["args"]["official"] == kind and len(np.load(tmp_path / "out" / "keep.npy")) == 6


def test_official_latents_have_the_published_scale(tmp_path, capsys):
    data = make_data(tmp_path / "data")
    np.save(data / "latents.npy", np.zeros((29, 8, 8, 8), np.float16))
    (data / "latents.json").write_text(json.dumps({"scale": 0.5}))
    ck, _ = make_official(tmp_path / "official.pt", 4)
    assert "latents x 0.18215" in refused(capsys, data, tmp_path / "out", "--reference", ck, "--official", "sit", "--per-class", 2)


@pytest.mark.parametrize("how, flags, words", [
    ({}, [], "--official dit or --official sit"), ({"bare": True}, [], "--official dit or --official sit"),
    ({"width": 96}, ["--official", "sit"], "width is 96"),
    ({"drop": "blocks.1.mlp.fc1.bias"}, ["--official", "dit"], "blocks.1.mlp.fc1.bias is missing"),
    ({"channels": 3}, ["--official", "dit"], "has images (1, 8, 8)"), ({"num_classes": 5}, ["--official", "sit"], "5 classes"),
    ({"nan": True}, ["--official", "sit"], "NaN"), ({}, ["--official", "unet"], "--official"),
    ({}, ["--official", "dit", "--visual", "ddae"], "--visual ddae takes its maps from a checkpoint of train.py"),
    ({}, ["--official", "dit", "--visual", "ddae", "--visual-weights", "SELF"], "--official dit or --official sit"),
    (None, ["--official", "dit"], "a checkpoint of train.py, not official")], ids=str)
def test_mistakes_with_official_weights_end_in_one_line(made, tmp_path, capsys, how, flags, words):
    data, ck = made
    if how is not None:
        ck, _ = make_official(tmp_path / "official.pt", **how)
    flags = [ck if f == "SELF" else f for f in flags]
    text = refused(capsys, data, tmp_path / "out", "--reference", ck, "--per-class", 3, "--judge", "none", *flags)
    assert words in text and (str(ck) in text or "--visual" in flags or "unet" in flags), text


def test_repeat_correlation_is_within_the_class():
    labels = np.repeat([0, 1], 50)
    groups = [np.arange(50), np.arange(50, 100)]
    a = np.random.default_rng(0).normal(size=100) + 10 * labels
    assert attach.repeat_correlation(a, a ** 3, groups) == pytest.approx(1)
    assert attach.repeat_correlation(a, 10 * labels - a, groups) == pytest.approx(-1)          # between the classes it goes the other way
    b = np.random.default_rng(1).normal(size=100)
    rank = lambda v: [sorted(v).index(u) for u in v]                                          # noqa: E731
    want = np.mean([np.corrcoef(rank(a[g]), rank(b[g]))[0, 1] for g in (slice(0, 50), slice(50, 100))])
    assert attach.repeat_correlation(a, b, groups) == pytest.approx(want)
    flat = np.where(labels == 0, a, 0.0)                              # a class whose scores are all equal, one too small: neither says anything
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert attach.repeat_correlation(flat, flat, [*groups, np.arange(2)]) == pytest.approx(1)
        assert attach.repeat_correlation(flat, flat, [groups[1], np.arange(2)]) is None and attach.repeat_correlation(a, a, []) is None


# ---------------------------------------------------------------------------------------------- the selection
def plain_select(s, labels, K, ipc, how, interval):
    """The rule of the paper, one class and one rank at a time, in plain Python."""
    keep = []
    for c in range(K):
        ordered = sorted((float(s[i]), i) for i in range(len(s)) if labels[i] == c)
        n, m = len(ordered), min(ipc, len(ordered))
        if how == "easy":
            ranks = range(m)
        elif how == "hard":
            ranks = range(n - m, n)
        elif how == "medium":
            first = (n - m) // 2
            ranks = range(first, first + m)
        else:
            k = {"auto": max(1, (3 * n) // (4 * m)), "span": 10**9}.get(interval, interval)
            while m > 1 and k * (m - 1) > n - 1:                      # the widest that fills the quota
                k -= 1 if k < 10**6 else k - n
            ranks, r = [], 0
            while len(ranks) < m:
                ranks.append(r)
                r += k
        keep += [ordered[r][1] for r in ranks]
    return sorted(keep)


@pytest.mark.parametrize("how, interval", [*(("interval", k) for k in ("auto", "span", 1, 3, 96)), ("easy", None), ("hard", None), ("medium", None)])
def test_selection_is_the_plain_loop(how, interval):
    rng = np.random.default_rng(5)
    for _ in range(40):
        K, ipc = int(rng.integers(1, 6)), int(rng.integers(1, 12))
        labels = rng.permutation(np.repeat(np.arange(K), rng.integers(1, 60, K)))
        s = rng.integers(0, 30, len(labels)).astype(np.float32)       # with ties: the lower index first
        got = attach.select(s, [np.flatnonzero(labels == c) for c in range(K)], ipc, how, interval)
        assert got.tolist() == plain_select(s, labels, K, ipc, how, interval) and got.dtype == np.int64


@pytest.mark.parametrize("n, m, k", [(1300, 10, 97), (1300, 50, 19), (1300, 100, 9), (5000, 100, 37), (150, 15, 7), (15, 15, 1), (7, 1, 1)])
def test_auto_interval_of_known_scales(n, m, k):
    assert attach.interval_of(n, m, "auto") == k
    assert attach.interval_of(n, m, 10**6) == attach.interval_of(n, m, "span") == (1 if m == 1 else (n - 1) // (m - 1))
    assert (m - 1) * k <= n - 1


def test_random_is_prunes_random(made, tmp_path):
    data, _ = made
    run(data, tmp_path / "a", "--select", "random", "--per-class", 3, "--seed", 4, "--judge", "none", "--text", "none")
    prune.main(["--data", str(data), "--out", str(tmp_path / "p"), "--score", "random", "--per-class", "3", "--seed", "4", "--device", "cpu"])
    np.testing.assert_array_equal(np.load(tmp_path / "a" / "keep.npy"), np.load(tmp_path / "p" / "keep.npy"))
    assert not (tmp_path / "a" / "difficulty.npy").exists()


# ---------------------------------------------------------------------------------------------- the text
def test_embedded_text_makes_sense():
    def cos(a, b):
        u, v = minilm_tokens([a, b])[0][:, 0].astype(np.float64)
        return u @ v / np.linalg.norm(u) / np.linalg.norm(v)
    assert cos("cat", "dog") > cos("cat", "truck") + 0.1
    assert cos("automobile", "truck") > cos("automobile", "frog") + 0.1
    assert cos("three", "3") > cos("three", "four") + 0.1
    assert cos("crane bird", "bird") > cos("crane", "bird")
    for a, b in (("aquarium_fish", "Aquarium fish"), ("n01440764", "tench, Tinca tinca"), ("n01440764", "TENCH"),
                 ("maillot, tank suit", "maillot tank suit"), ("n03710721", "maillot tank suit"), ("n02113186", "cardigan welsh corgi"),
                 ("n02963159", "cardigan"), ("n02012849", "crane bird")):
        np.testing.assert_array_equal(*minilm_tokens([a, b])[0])
    with pytest.raises(ValueError, match="'zorblax'.*--text none"):
        minilm_tokens(["cat", "zorblax"])


def test_embedded_text_covers_every_class_of_its_data_sets():
    from torchvision.models._meta import _IMAGENET_CATEGORIES
    few = "zero one two three four five six seven eight nine airplane automobile bird cat deer dog frog horse ship truck".split()
    tokens, mask = minilm_tokens([*few, *"0123456789", *_IMAGENET_CATEGORIES])
    assert tokens.shape == (1030, 1, 384) and tokens.dtype == np.float16 and mask.shape == (1030, 1) and mask.all()
    np.testing.assert_allclose(np.linalg.norm(tokens[:, 0].astype(np.float64), axis=1), 1, atol=2e-3)
    assert len(np.unique(tokens[:, 0], axis=0)) == 1029               # one name twice, case apart: the Cardigan and the cardigan
    path = ROOT / "models" / "text_minilm.npz"
    assert path.stat().st_size < 1.2e6
    with np.load(path, allow_pickle=False) as f:
        assert len(np.unique(f["wnid_rows"])) == len(np.unique(f["wnids"])) == 1000


def test_a_prompt_names_the_classes_of_imagenet_in_words(tmp_path, monkeypatch, capsys):
    """Its folders are called n01440764: to a text model "a photo of a n01440764" is noise, and the same noise for all."""
    from torchvision.models._meta import _IMAGENET_CATEGORIES
    with np.load(ROOT / "models" / "text_minilm.npz", allow_pickle=False) as f:
        words = class_words(sorted(f["wnids"].tolist()))              # torchvision's categories are in this order
    assert [(a, b) for a, b in zip(words, _IMAGENET_CATEGORIES) if a != b.lower()] == [("cardigan welsh corgi", "Cardigan")]
    assert class_words(["N01440764", "aquarium_fish", "Snow leopard", "n1"]) == ["tench", "aquarium fish", "Snow leopard", "n1"]
    seen, data = [], make_data(tmp_path / "data", (3, 3))
    monkeypatch.setattr(conditioning, "text_tokens", lambda where, prompts, device: seen.append(prompts) or (np.ones((2, 1, 4)), np.ones((2, 1), bool)))
    (data / "classes.txt").write_text("n01440764\nn01443537\n")
    run(data, tmp_path / "a", "--select", "all", "--judge", "none", "--text", "some/t5")
    assert seen == [["a photo of a tench", "a photo of a goldfish"]]
    (data / "classes.txt").write_text("n01440764\nn99999999\n")
    assert "n99999999" in refused(capsys, data, tmp_path / "b", "--select", "all", "--judge", "none", "--text", "some/t5") and len(seen) == 1


def test_text_from_a_file(made, tmp_path, capsys):
    data, _ = made
    tokens, mask = np.random.default_rng(0).normal(size=(3, 4, 5)), np.arange(4) < np.array([[2], [4], [1]])
    np.save(tmp_path / "t.npy", tokens)
    run(data, tmp_path / "a", "--select", "all", "--judge", "none", "--text", tmp_path / "t.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "a" / "text.npy"), tokens.astype(np.float16))
    assert np.load(tmp_path / "a" / "text_mask.npy").all()
    np.save(tmp_path / "t_mask.npy", mask)
    run(data, tmp_path / "b", "--select", "all", "--judge", "none", "--text", tmp_path / "t.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "b" / "text_mask.npy"), mask)
    bad = ["--select", "all", "--judge", "none", "--text", tmp_path / "t.npy"]
    np.save(tmp_path / "t_mask.npy", mask & (np.arange(3) != 1)[:, None])
    assert "'dog'" in refused(capsys, data, tmp_path / "c", *bad)
    np.save(tmp_path / "t_mask.npy", mask)
    np.save(tmp_path / "t.npy", tokens * 1e6)
    assert "float16" in refused(capsys, data, tmp_path / "c", *bad)
    np.save(tmp_path / "t.npy", tokens[:2])
    assert "(3, any, any)" in refused(capsys, data, tmp_path / "c", *bad)


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_text_model_of_transformers(tmp_path, kind, made):
    """A tiny model saved in the real format, against its own forward of the unpadded prompt."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models as kinds, pre_tokenizers, processors
    words = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "a", "photo", "of", "cat", "dog", "truck"])}
    t = Tokenizer(kinds.WordLevel(words, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=t, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    if kind == "t5":
        net = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
    else:
        net = transformers.CLIPTextModel(transformers.CLIPTextConfig(
            vocab_size=9, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=20,
            eos_token_id=1, bos_token_id=3, pad_token_id=0))
    net.eval().save_pretrained(tmp_path / "net"), tokenizer.save_pretrained(tmp_path / "net")
    tokens, mask = text_tokens(str(tmp_path / "net"), ["a photo of a cat", "a dog"])
    assert tokens.shape == (2, 16, 16) and tokens.dtype == np.float32 and mask.dtype == bool
    assert mask.sum(1).tolist() == [6, 3] and mask[0, :6].all()
    ids = torch.tensor([[3, 7, 1]])
    with torch.no_grad():
        want = (net.get_encoder() if kind == "t5" else net)(input_ids=ids).last_hidden_state
    np.testing.assert_allclose(tokens[1, :3], want[0], atol=1e-5)
    run(made[0], tmp_path / "out", "--select", "all", "--judge", "none", "--text", tmp_path / "net", "--prompt", "{class} of a photo")
    want, _ = text_tokens(str(tmp_path / "net"), [f"{n} of a photo" for n in NAMES])
    np.testing.assert_allclose(np.load(tmp_path / "out" / "text.npy"), want, atol=2e-3)
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="bert model"):
        text_tokens(str(tmp_path / "bert"), ["a"])


def test_a_text_model_that_cannot_be_had(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)            # as if it were not installed
    text = refused(capsys, made[0], tmp_path / "out", "--select", "all", "--judge", "none", "--text", tmp_path / "none")
    assert "pip install transformers" in text


# ---------------------------------------------------------------------------------------------- the visual tokens
@pytest.mark.parametrize("encoder", ["ddae", "scratch"])
def test_visual_tokens_belong_to_the_kept_images(made, tmp_path, encoder):
    data, ck = made
    record = run(data, tmp_path / "out", "--reference", ck, "--per-class", 3, "--visual", encoder, "--flips", "--judge", "pixels", "--batch-size", 2)
    keep, v, images = np.load(tmp_path / "out" / "keep.npy"), np.load(tmp_path / "out" / "visual.npy"), np.load(data / "images.npy")
    enc = encoders.load(encoder, "cpu", weights=ck if encoder == "ddae" else data / "scratch.pt", images=images)
    assert v.dtype == np.float16 and v.shape == (9, 2, 16, enc.token_width) and record["visual_megabytes"] == pytest.approx(v.nbytes / 1e6, abs=1e-3)
    for j, i in enumerate(keep):
        for k, x in enumerate((images[i], images[i][:, ::-1])):
            np.testing.assert_allclose(v[j, k], enc.tokens(torch.from_numpy(x.copy())[None])[0], rtol=2e-3, atol=1e-4)
    unit = v.astype(np.float64) / np.linalg.norm(v.astype(np.float64), axis=-1, keepdims=True)
    assert record["mean_token_cosine"] == pytest.approx(np.linalg.norm(np.nan_to_num(unit).reshape(-1, v.shape[-1]).mean(0)), abs=2e-3)
    run(data, tmp_path / "one", "--reference", ck, "--per-class", 3, "--visual", encoder, "--judge", "none")
    np.testing.assert_allclose(np.load(tmp_path / "one" / "visual.npy"), v[:, 0], rtol=2e-3, atol=1e-4)


def test_features_beyond_float16_are_refused(made, tmp_path, capsys, monkeypatch):
    tokens = encoders.Encoder.tokens
    monkeypatch.setattr(encoders.Encoder, "tokens", lambda self, x: 1e6 * tokens(self, x))
    text = refused(capsys, made[0], tmp_path / "out", "--reference", made[1], "--per-class", 3, "--visual", "ddae", "--judge", "none")
    assert "float16" in text


def test_train_takes_what_attach_writes(made, tmp_path):
    data, ck = made
    out = tmp_path / "attach"
    run(data, out, "--reference", ck, "--per-class", 3, "--visual", "ddae")
    train.main(["--data", str(data), "--attach", str(out), "--out", str(tmp_path / "run"), "--steps", "2", "--batch-size", "4", "--device", "cpu"])
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    np.testing.assert_array_equal(state["ema"]["y_embedder.text"][:3], np.load(out / "text.npy"))
    assert "projector" in state


# ---------------------------------------------------------------------------------------------- the script
def test_outputs_and_a_second_call(made, tmp_path, capsys):
    data, ck = made
    flags = ["--reference", ck, "--per-class", 3, "--interval", "span", "--visual", "ddae"]
    record = run(data, tmp_path / "out", *flags)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["attach.args.json", "difficulty.npy", "difficulty.png", "keep.npy", "montage.png",
                                                                    "text.npy", "text_mask.npy", "visual.npy"]
    keep, labels, s = np.load(tmp_path / "out" / "keep.npy"), np.load(data / "labels.npy"), np.load(tmp_path / "out" / "difficulty.npy")
    assert keep.tolist() == plain_select(s, labels, 3, 3, "interval", "span")
    assert record["inputs"]["data"] == json.loads((data / "dataset.json").read_text())["sha256"]
    assert -1 <= record["repeat_correlation"] <= 1 and len(record["fd_random"]) == 20
    z = encoders.extract(encoders.load("scratch", "cpu", weights=data / "scratch.pt"), np.load(data / "images.npy"))
    from scipy.linalg import sqrtm
    a, b = np.cov(z[keep].T), np.cov(z.T)
    want = ((z[keep].mean(0) - z.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(b @ a).real)
    assert record["fd_subset"] == pytest.approx(want, rel=0.02, abs=1e-4)
    printed = capsys.readouterr().out
    assert "repeats under other noise" in printed and "of 20 random subsets" in printed and "one constant vector reaches" in printed
    run(data, tmp_path / "out", *flags)
    assert "nothing to do" in capsys.readouterr().out


def test_difficulty_is_taken_over(made, tmp_path):
    data, ck = made
    first = run(data, tmp_path / "a", "--reference", ck, "--per-class", 3, "--judge", "none")
    again = run(data, tmp_path / "b", "--difficulty", tmp_path / "a" / "difficulty.npy", "--per-class", 3, "--judge", "none")
    for name in ("keep.npy", "difficulty.npy"):
        np.testing.assert_array_equal(np.load(tmp_path / "a" / name), np.load(tmp_path / "b" / name))
    for k in ("seconds_difficulty", "repeat_correlation"):
        assert again[k] == first[k] is not None


def test_given_indices_are_kept_as_they_are(made, tmp_path):
    keep = np.concatenate([np.flatnonzero(np.load(made[0] / "labels.npy") == c)[:2] for c in range(3)])
    np.save(tmp_path / "keep.npy", np.sort(keep))
    run(made[0], tmp_path / "out", "--indices", tmp_path / "keep.npy", "--visual", "ddae", "--reference", made[1])
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "keep.npy"), np.sort(keep))
    assert len(np.load(tmp_path / "out" / "visual.npy")) == 6 and not (tmp_path / "out" / "difficulty.npy").exists()


def test_an_interrupted_scoring_goes_on(made, tmp_path, monkeypatch):
    data, ck = made
    flags = ["--reference", ck, "--per-class", 3, "--judge", "none", "--batch-size", 4]
    run(data, tmp_path / "straight", *flags)
    score, calls = attach.difficulty_scores, []

    def interrupted(model, process, x, *rest):
        calls.append(len(x))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(model, process, x, *rest)
    monkeypatch.setattr(attach, "difficulty_scores", interrupted)
    with pytest.raises(SystemExit):
        run(data, tmp_path / "out", *flags)
    assert (tmp_path / "out" / "difficulty.part.npy").exists() and not (tmp_path / "out" / "difficulty.npy").exists()
    run(data, tmp_path / "out", *flags)
    assert sum(calls[4:]) == 29 - 12 + 29                             # the rows that were missing, and the second noise for all
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "difficulty.npy"), np.load(tmp_path / "straight" / "difficulty.npy"))


def test_a_small_class(made, tmp_path, capsys):
    data, ck = made
    flags = ["--reference", ck, "--per-class", 8, "--judge", "none"]
    assert "'truck' has only 6" in refused(capsys, data, tmp_path / "out", *flags)
    run(data, tmp_path / "out", *flags, "--allow-short")
    assert np.bincount(np.load(data / "labels.npy")[np.load(tmp_path / "out" / "keep.npy")]).tolist() == [8, 8, 6]


def test_circular_judging_is_said(made, tmp_path, capsys):
    data, ck = made
    run(data, tmp_path / "a", "--reference", ck, "--per-class", 3, "--visual", "scratch")
    assert "circular judging" in capsys.readouterr().out
    run(data, tmp_path / "b", "--reference", ck, "--per-class", 3, "--judge", "ddae", "--judge-weights", ck)
    assert "circular judging" in capsys.readouterr().out
    run(data, tmp_path / "c", "--reference", ck, "--per-class", 3, "--visual", "ddae")
    assert "circular judging" not in capsys.readouterr().out


def test_overwriting_leaves_nothing_of_the_old_run(made, tmp_path):
    data, ck = made
    run(data, tmp_path / "out", "--reference", ck, "--per-class", 3, "--visual", "ddae", "--judge", "none")
    run(data, tmp_path / "out", "--select", "random", "--per-class", 3, "--text", "none", "--judge", "none", "--overwrite")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["attach.args.json", "keep.npy"]


def test_weights_that_cannot_be_read_cost_no_result(made, tmp_path, capsys):
    """--overwrite removes nothing before all that the flags name has been loaded."""
    data, ck = made
    out, flags = tmp_path / "out", ["--select", "random", "--per-class", 3, "--judge", "none"]
    run(data, out, *flags)
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    bad = tmp_path / "bad.pt"
    bad.write_text("no checkpoint")
    for more in (["--visual", "ddae", "--visual-weights", bad], ["--text", tmp_path / "none"],
                 ["--select", "easy", "--reference", bad]):
        with pytest.raises(SystemExit) as e:
            run(data, out, *flags, *more, "--overwrite")
        assert e.value.code == 2 and str(more[-1]) in capsys.readouterr().err
        assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    run(data, out, *flags)
    assert "nothing to do" in capsys.readouterr().out


def test_the_choices_can_be_asked_for(capsys):
    with pytest.raises(SystemExit) as e:
        attach.main(["--list", "visual"])
    tokens = [name for name, spec in encoders.ENCODERS.items() if spec.tokens]
    assert e.value.code == 0 and capsys.readouterr().out.split() == ["none", *tokens]


def test_the_folder_of_another_stage_is_left_alone(made, tmp_path, capsys):
    np.save(tmp_path / "keep.npy", np.arange(5))
    with pytest.raises(SystemExit) as e:
        run(made[0], tmp_path, "--select", "all", "--overwrite")
    assert e.value.code == 2 and "another stage" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["keep.npy"] and len(np.load(tmp_path / "keep.npy")) == 5


MISTAKES = [
    (["--reference", "CK"], "needs --per-class"),
    (["--per-class", 3], "--reference CHECKPOINT"),
    (["--reference", "CK", "--per-class", 0], "--per-class"),
    (["--reference", "CK", "--per-class", 3, "--interval", "wide"], "--interval"),
    (["--reference", "CK", "--per-class", 3, "--select", "easy", "--interval", 2], "--interval belongs"),
    (["--select", "all", "--per-class", 3], "--per-class"),
    (["--select", "all", "--indices", "KEEP"], "--indices"),
    (["--indices", "MISSING"], "no such file"),
    (["--reference", "MISSING", "--per-class", 3], "no such file"),
    (["--reference", "KEEP", "--per-class", 3], "not readable"),
    (["--reference", "BIG", "--per-class", 3], "has images (1, 8, 8)"),
    (["--reference", "TEN", "--per-class", 3], "10 classes"),
    (["--reference", "NAN", "--per-class", 3], "NaN"),
    (["--difficulty", "KEEP", "--per-class", 3], "floats"),
    (["--difficulty", "SHORT", "--per-class", 3], "(29)"),
    (["--difficulty", "NANS", "--per-class", 3], "row 7"),
    (["--difficulty", "OTHER", "--per-class", 3], "another data set"),
    (["--difficulty", "KEEP", "--reference", "CK", "--per-class", 3], "--reference would not score"),
    (["--select", "all", "--visual", "ddae"], "--visual ddae needs"),
    (["--select", "all", "--visual", "ddae", "--visual-weights", "MISSING"], "no such file"),
    (["--select", "all", "--visual", "ddae", "--visual-weights", "KEEP"], "keep.npy"),
    (["--select", "all", "--visual", "pixels"], "invalid choice"),
    (["--select", "all", "--flips"], "--flips"),
    (["--select", "all", "--official", "sit"], "give --reference"),
    (["--select", "all", "--judge", "ddae"], "--judge-weights"),
    (["--select", "all", "--judge", "none", "--judge-weights", "CK"], "--judge-weights does nothing"),
    (["--select", "all", "--prompt", "{class}"], "--prompt does nothing"),
    (["--select", "all", "--text", "folder", "--prompt", "a photo"], "{class}"),
    (["--select", "all", "--device", "tpu9"], "--device"),
]


@pytest.mark.parametrize("flags, words", MISTAKES, ids=[" ".join(map(str, f)) for f, _ in MISTAKES])
def test_mistakes_end_in_one_line(made, tmp_path, capsys, flags, words):
    data, ck = made
    files = {"CK": lambda p: ck, "MISSING": lambda p: p / "missing.npy", "BIG": lambda p: make_checkpoint(p / "b.pt", size=16),
             "TEN": lambda p: make_checkpoint(p / "t.pt", num_classes=10)}
    rows = {"KEEP": ("keep.npy", np.arange(29)), "SHORT": ("s.npy", np.zeros(5)), "NANS": ("n.npy", np.where(np.arange(29) == 7, np.nan, 1.0))}
    for name, (file, value) in rows.items():
        files[name] = lambda p, file=file, value=value: np.save(p / file, value) or p / file

    def diverged(p):
        state = torch.load(ck, weights_only=True)
        state["ema"]["pos_embed"][:] = torch.nan
        torch.save(state, p / "nan.pt")
        return p / "nan.pt"

    def other(p):
        (p / "attach.args.json").write_text(json.dumps({"inputs": {"data": "else"}}))
        return np.save(p / "o.npy", np.zeros(29)) or p / "o.npy"
    files.update(NAN=diverged, OTHER=other)
    flags = [files[f](tmp_path) if f in files else f for f in flags]
    assert words in refused(capsys, data, tmp_path / "out", *flags)


def test_unfit_data_folders(tmp_path, capsys):
    ck = make_checkpoint(tmp_path / "ck.pt")
    odd = make_data(tmp_path / "odd", names=("cat", "zorblax", "dog"))
    assert "'zorblax'" in refused(capsys, odd, tmp_path / "out", "--reference", ck, "--per-class", 3)
    one = make_data(tmp_path / "one", sizes=(9,))
    assert "--judge none" in refused(capsys, one, tmp_path / "out", "--select", "all")
    empty = make_data(tmp_path / "empty")
    (empty / "classes.txt").write_text("cat\ndog\ntruck\nfrog\n")
    assert "'frog' has no image" in refused(capsys, empty, tmp_path / "out", "--select", "all")
    (empty / "images.npy").rename(empty / "elsewhere.npy")
    np.save(empty / "latents.npy", np.zeros((29, 8, 4, 4), np.float16))
    (empty / "classes.txt").write_text("cat\ndog\ntruck\n")
    assert "only latents" in refused(capsys, empty, tmp_path / "out", "--select", "all")


def test_in_a_process_of_its_own(made, tmp_path):
    data, ck = made
    done = subprocess.run([sys.executable, str(ROOT / "attach.py"), "--data", str(data), "--out", str(tmp_path / "out"), "--reference", str(ck),
                           "--device", "cpu", "--judge", "none", "--per-class", "2"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and len(np.load(tmp_path / "out" / "keep.npy")) == 6, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_processes_write_what_one_writes(n, made, tmp_path):
    data, ck = made
    flags = ["--data", str(data), "--reference", str(ck), "--per-class", "3", "--visual", "ddae", "--device", "cpu", "--batch-size", "4"]
    attach.main([*flags, "--out", str(tmp_path / "one")])
    ranks = processes(n, ROOT / "attach.py", *flags, "--out", tmp_path / "all")
    assert [code for code, *_ in ranks] == n * [0] and [out.count("attach.py: kept 9 of 29") for _, out, _ in ranks] == [1] + (n - 1) * [0], ranks
    for name in ("difficulty.npy", "visual.npy"):
        np.testing.assert_allclose(np.load(tmp_path / "all" / name), np.load(tmp_path / "one" / name), rtol=2e-3, atol=1e-4)   # float16 at most
    np.testing.assert_allclose(np.load(tmp_path / "all" / "difficulty.npy"), np.load(tmp_path / "one" / "difficulty.npy"), rtol=1e-5)
    for name in ("keep.npy", "text.npy", "text_mask.npy"):
        np.testing.assert_array_equal(np.load(tmp_path / "all" / name), np.load(tmp_path / "one" / name))
    a, b = (json.loads((tmp_path / out / "attach.args.json").read_text()) for out in ("all", "one"))
    for key in ("fd_subset", "fd_random", "mean_token_cosine", "repeat_correlation", "kept"):
        assert a[key] == pytest.approx(b[key], rel=1e-4), key
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())


# ---------------------------------------------------------------------------------------------- latents without pixels
def test_the_pixels_of_the_kept_images_come_from_a_folder_of_their_own(tmp_path, capsys):
    """Select on latents alone; then the visual tokens are those that the full set of pixels would have given."""
    data, ck = make_data(tmp_path / "full"), make_checkpoint(tmp_path / "ck.pt")
    (data / "files.txt").write_text("".join(f"{j}.png\n" for j in range(29)))
    labels = np.load(data / "labels.npy")
    keep = np.sort(np.concatenate([np.flatnonzero(labels == c)[1:4] for c in range(3)]))[:-1]
    np.save(tmp_path / "keep.npy", keep)
    full = ["--indices", tmp_path / "keep.npy", "--visual", "ddae", "--visual-weights", ck, "--judge", "none", "--text", "none"]
    run(data, tmp_path / "a", *full)
    bare, kept = shutil.copytree(data, tmp_path / "bare"), shutil.copytree(data, tmp_path / "kept")
    np.save(bare / "latents.npy", np.zeros((29, 8, 4, 4), np.float16))
    (bare / "images.npy").unlink()
    for name in ("images", "labels"):
        np.save(kept / f"{name}.npy", np.load(data / f"{name}.npy")[keep])
    (kept / "files.txt").write_text("".join(f"{j}.png\n" for j in keep))
    assert "only latents" in refused(capsys, bare, tmp_path / "b", *full)
    run(bare, tmp_path / "b", *full, "--images", kept)
    assert np.array_equal(np.load(tmp_path / "a/visual.npy"), np.load(tmp_path / "b/visual.npy"))
    assert "give both" in refused(capsys, bare, tmp_path / "c", "--images", kept, "--select", "all", "--visual", "ddae", "--visual-weights", ck)
    assert "are not the 8 of --indices" in refused(capsys, bare, tmp_path / "c", *full, "--images", data)
    (kept / "files.txt").write_text("".join(f"{j}.png\n" for j in keep[::-1]))
    assert "are not the 8 of --indices" in refused(capsys, bare, tmp_path / "c", *full, "--images", kept)
    (kept / "files.txt").unlink()
    assert "files.txt" in refused(capsys, bare, tmp_path / "c", *full, "--images", kept)
