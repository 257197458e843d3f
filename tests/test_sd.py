"""models/sd.py: a tiny Stable Diffusion, saved by diffusers in the real format, against diffusers itself; then through every stage. Slow: it needs
diffusers, transformers and peft. What needs none of them comes last."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import attach
import common
import reweight
import sample
import train
from conftest import as_flags, crash_at, make_data, stats
from models.build import from_checkpoint, text_of
from models.diffusion import diffusion_loss, generate, snr_weight
from models import sd
from models.sd import load_sd
from models.vae import latent_moments, latent_sums

CLASSES = ["class0", "class1", "class2"]
BASE = dict(preset="sd", steps=3, batch_size=4, warmup=0, log_every=1, checkpoint_every=2, amp="none", device="cpu", lr=1e-3)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(train, "loss_plot", lambda rows, path, constant: path.write_bytes(b""))


@pytest.fixture
def data(tmp_path):
    """Images 16 x 16 of three classes with random latents of 8 x 8 beside them."""
    folder = make_data(tmp_path / "data", sizes=(6, 5, 5), side=16, channels=3)
    rng = np.random.default_rng(0)
    z = np.concatenate([rng.normal(size=(16, 4, 8, 8)), np.full((16, 4, 8, 8), 0.1)], 1).astype(np.float16)
    np.save(folder / "latents.npy", z)
    mean, std = latent_moments(latent_sums(z), 0.18215)
    (folder / "latents.json").write_text(json.dumps({"scale": 0.18215, "mean": mean, "std": std, "vae": "tiny"}))
    return folder


def run(data, out, **flags):
    train.main(as_flags({**BASE, "data": data, "out": out, **flags}))
    return common.load_pt(out / "last.pt")


def refused(capsys, data, out, **flags):
    with pytest.raises(SystemExit) as e:
        run(data, out, **flags)
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 2 and text.startswith("train.py: error:") and not out.exists(), text
    return text


def pipeline(folder):
    import diffusers
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---------------------------------------------------------------------------------------------- against diffusers
@torch.no_grad()
@pytest.mark.parametrize("predict", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_diffusers(predict, tiny_sd):
    """q(x_t), the target, the network with text and the mean square, as its training script computes them; and Min-SNR's weight."""
    import diffusers
    model, process = from_checkpoint(load_sd(tiny_sd[predict], CLASSES))
    pipe = pipeline(tiny_sd[predict])
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    assert (process.abar.float() - scheduler.alphas_cumprod).abs().max() < 1e-6
    g = torch.Generator().manual_seed(0)
    x, eps, u = torch.randn(4, 4, 8, 8, generator=g), torch.randn(4, 4, 8, 8, generator=g), torch.tensor([0.0004, 0.21, 0.6, 0.999])
    y = torch.tensor([0, 2, 3, 1])
    t = (u * 1000).long()
    prompts = [*(f"a photo of a {c}" for c in CLASSES), ""]
    ids = pipe.tokenizer([prompts[k] for k in y], padding="max_length", max_length=77, return_tensors="pt").input_ids
    states = pipe.text_encoder(ids)[0].half().float()                # as the table holds them
    out = pipe.unet(scheduler.add_noise(x, eps, t), t, encoder_hidden_states=states).sample
    target = eps if predict == "epsilon" else scheduler.get_velocity(x, eps, t)
    want = (out - target).square().mean((1, 2, 3))
    torch.testing.assert_close(diffusion_loss(process, model, x, u, eps, y), want, rtol=1e-5, atol=1e-6)
    snr = diffusers.training_utils.compute_snr(scheduler, t)
    weight = snr.clamp(max=5) / (snr if predict == "epsilon" else snr + 1)
    torch.testing.assert_close(snr_weight(process, u, 5.0), weight, rtol=1e-4, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("predict", ["epsilon", "v_prediction"])
def test_guided_sampling_is_that_of_the_pipeline(predict, tiny_sd):
    import diffusers
    model, process = from_checkpoint(load_sd(tiny_sd[predict], CLASSES))
    pipe = pipeline(tiny_sd[predict])
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False, steps_offset=0)
    noise = torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(5))
    want = pipe("a photo of a class1", height=16, width=16, num_inference_steps=10, guidance_scale=3.0, latents=noise[None], output_type="latent").images
    got = generate(model, process, torch.tensor([1]), [torch.Generator().manual_seed(5)], "ddim", 10, cfg=3.0, clip_x0=False)
    difference = (got - want).abs().max().item()
    print(f"{predict}: ddim against the pipeline {difference:.2e} at a scale of {want.abs().max():.1f}")
    assert difference < 1e-3 * want.abs().max()


@torch.no_grad()
def test_the_null_class_is_the_empty_prompt(tiny_sd):
    model, _ = from_checkpoint(load_sd(tiny_sd["epsilon"], CLASSES))
    pipe = pipeline(tiny_sd["epsilon"])
    empty = pipe.text_encoder(pipe.tokenizer([""], padding="max_length", max_length=77, return_tensors="pt").input_ids)[0]
    table = text_of(model)
    assert table.shape == (4, 77, 32) and table.dtype == torch.float16
    torch.testing.assert_close(table[3].float(), empty[0], rtol=0, atol=2e-3)
    assert all((table[3] - table[k]).abs().max() > 0.01 for k in range(3)) and table[3].abs().max() > 0.1


# ---------------------------------------------------------------------------------------------- training
def test_no_steps_make_it_a_checkpoint_and_training_goes_on_from_it(tiny_sd, data, tmp_path, monkeypatch, capsys):
    base = run(data, tmp_path / "base", official="sd", init=tiny_sd["v_prediction"], steps=0)
    given = load_sd(tiny_sd["v_prediction"], CLASSES)["ema"]
    assert given.keys() == base["ema"].keys() and all(torch.equal(given[k], base["ema"][k]) for k in given)
    assert base["args"]["predict"] == "v" and base["args"]["betas"] == [0.00085, 0.012] and base["args"]["prompts"][1] == "a photo of a class1"
    assert "GB of memory" in capsys.readouterr().out
    flags = dict(init=tmp_path / "base/last.pt", min_snr=5, label_drop=0.5, recompute=True)
    straight = run(data, tmp_path / "a", **flags)
    assert sum(not torch.equal(straight["model"][k], given[k]) for k in given) > 100 and torch.equal(straight["ema"]["y_embedder.text"], given["y_embedder.text"])
    with crash_at(2):
        run(data, tmp_path / "b", **flags)
    resumed = run(data, tmp_path / "b", **flags)
    assert all(torch.equal(straight[part][k], resumed[part][k]) for part in ("model", "ema") for k in given) and stats(tmp_path / "a") == stats(tmp_path / "b")
    plain = run(data, tmp_path / "c", **{**flags, "recompute": False}, steps=1)          # --preset sd recomputes
    assert plain["args"]["recompute"]
    (data / "classes.txt").write_text("class0\nclass1\ncat\n")
    assert "prompts are of other classes" in refused(capsys, data, tmp_path / "d", **flags)


def test_a_class_of_weight_0_teaches_nothing(tiny_sd, data, tmp_path):
    """Other latents of the two classes that weigh nothing, and the same weights come out of a step."""
    labels = np.load(data / "labels.npy")
    np.save(tmp_path / "w.npy", np.array([1, 0, 0], np.float32))
    assert 0 < (labels[train.Order(16, 4, 0)(0)] == 0).sum() < 4       # the batch holds images of both kinds
    state = run(data, tmp_path / "a", official="sd", init=tiny_sd["epsilon"], steps=1, weights=tmp_path / "w.npy")
    again = np.load(data / "latents.npy")
    again[labels != 0] *= 3                                           # other pictures of the classes that weigh nothing
    again[:, 4:] = 0.1
    np.save(data / "latents.npy", again)
    mean, std = latent_moments(latent_sums(again), 0.18215)
    (data / "latents.json").write_text(json.dumps({"scale": 0.18215, "mean": mean, "std": std, "vae": "tiny"}))
    other = run(data, tmp_path / "b", official="sd", init=tiny_sd["epsilon"], steps=1, weights=tmp_path / "w.npy")
    assert all(torch.equal(state["model"][k], other["model"][k]) for k in state["model"]) and stats(tmp_path / "a") != stats(tmp_path / "b")


def test_export_of_the_whole_network_is_exact(tiny_sd, data, tmp_path, capsys):
    import diffusers
    run(data, tmp_path / "a", official="sd", init=tiny_sd["epsilon"])
    sample.main(["--checkpoint", str(tmp_path / "a/last.pt"), "--export", str(tmp_path / "out")])
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out", subfolder="unet")
    ema = common.load_pt(tmp_path / "a/last.pt")["ema"]
    assert all(torch.equal(ema[f"unet.{k}"], v) for k, v in unet.state_dict().items())
    with pytest.raises(SystemExit):
        sample.main(["--checkpoint", str(tmp_path / "a/last.pt"), "--export", str(tmp_path / "out")])
    assert "is there already" in capsys.readouterr().err


@torch.no_grad()
def test_lora_trains_adapters_alone_and_its_export_is_exact(tiny_sd, data, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "sd"
    shutil.copytree(tiny_sd["epsilon"], folder)
    flags = dict(official="sd", init=folder, lora=4, lr=1e-2, ema=0.5)
    with torch.enable_grad():
        state = run(data, tmp_path / "a", **flags)
        assert all("lora_" in k or k == "y_embedder.text" for k in state["model"]) and state["args"]["lora"] == 4
        with crash_at(2):
            run(data, tmp_path / "b", **flags)
        resumed = run(data, tmp_path / "b", **flags)
    assert all(torch.equal(state[part][k], resumed[part][k]) for part in ("model", "ema") for k in state["ema"])
    model, _ = from_checkpoint(state)
    base = load_sd(folder, CLASSES)["ema"]
    own = {k.replace(".base_layer", ""): v for k, v in model.unet.state_dict().items() if "lora_" not in k}
    assert all(torch.equal(own[k.removeprefix("unet.")], v) for k, v in base.items() if k.startswith("unet."))
    assert any(v.abs().max() > 0 for k, v in state["ema"].items() if "lora_B" in k)
    with torch.enable_grad():
        reweight.main(["--data", str(data), "--reference", str(tmp_path / "a/last.pt"), "--steps", "2", "--burn-in", "1", "--device", "cpu", "--out", str(tmp_path / "dro")])
    assert common.load_pt(tmp_path / "dro/proxy.pt")["model"].keys() == state["model"].keys()
    sample.main(["--checkpoint", str(tmp_path / "a/last.pt"), "--export", str(tmp_path / "out")])
    pipe = pipeline(folder)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([0, 3])
    before = pipe.unet(x, t, encoder_hidden_states=model.y_embedder(y)).sample
    pipe.load_lora_weights(tmp_path / "out")
    after = pipe.unet(x, t, encoder_hidden_states=model.y_embedder(y)).sample
    assert torch.equal(after, model(x, t, y)) and (after - before).abs().max() > 1e-3
    other = pipeline(tiny_sd["v_prediction"]).unet
    other.save_pretrained(folder / "unet")                            # another model in the place of the base
    sample_flags = ["--checkpoint", str(tmp_path / "a/last.pt"), "--num", "2", "--device", "cpu", "--out", str(tmp_path / "s")]
    for _ in range(2):
        with pytest.raises(SystemExit):
            sample.main(sample_flags)
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert "is not the one that these adapters were trained on" in said or "no such file" in said
        (folder / "unet/diffusion_pytorch_model.safetensors").unlink(missing_ok=True)


def test_every_stage_works_on_it(tiny_sd, data, tmp_path):
    """A reference that was trained, a proxy from the base, difficulty, and samples decoded by the folder's own VAE."""
    run(data, tmp_path / "base", official="sd", init=tiny_sd["epsilon"], steps=0)
    run(data, tmp_path / "full", init=tmp_path / "base/last.pt")
    last = str(tmp_path / "full/last.pt")
    reweight.main(["--data", str(data), "--reference", last, "--proxy-init", str(tmp_path / "base/last.pt"), "--steps", "3", "--burn-in", "1", "--device", "cpu", "--out",
                   str(tmp_path / "dro")])
    proxy, _ = from_checkpoint(common.load_pt(tmp_path / "dro/proxy.pt"))
    assert text_of(proxy).abs().max() > 0.1 and np.load(tmp_path / "dro/weights.npy").shape == (3,)
    attach.main(["--data", str(data), "--reference", last, "--per-class", "2", "--text", "none", "--visual", "none", "--judge", "none", "--device", "cpu", "--out",
                 str(tmp_path / "attach")])
    assert np.isfinite(np.load(tmp_path / "attach/difficulty.npy")).all()
    sample.main(["--checkpoint", last, "--num", "3", "--steps", "2", "--cfg", "3", "--vae", str(tiny_sd["epsilon"] / "vae"), "--device", "cpu", "--out",
                 str(tmp_path / "full")])
    assert np.load(tmp_path / "full/samples.npy").shape == (3, 16, 16, 3)


# ---------------------------------------------------------------------------------------------- what is refused
def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def broken(folder, how):
    """Damage a copy of the folder in one way; returns words of the line that must follow."""
    if how == "sdxl":
        edit(folder / "unet/config.json", addition_embed_type="text_time")
        return "only Stable Diffusion 1 and 2"
    if how == "inpainting":
        edit(folder / "unet/config.json", in_channels=9)
        return "take the text-to-image one"
    if how == "zero-snr":
        edit(folder / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True)
        return "rescale_betas_zero_snr is True"
    if how == "sample":
        edit(folder / "scheduler/scheduler_config.json", prediction_type="sample")
        return "predicts 'sample'"
    if how == "no scheduler":
        shutil.rmtree(folder / "scheduler")
        return "scheduler_config.json: missing"
    if how == "half a config":
        edit(folder / "scheduler/scheduler_config.json", beta_start=None)
        return "does not say its beta_start"
    if how == "list":
        (folder / "unet/config.json").write_text("[1]")
        return "does not say its sample_size"
    if how == "bin":
        (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet/diffusion_pytorch_model.bin")
        return "no such file (pickled .bin weights"
    if how == "scale":
        edit(folder / "vae/config.json", scaling_factor=0.5)
        return "was trained with latent_scale = 0.5"
    if how == "no text":
        shutil.rmtree(folder / "text_encoder")
        return "cannot be loaded"
    from safetensors.torch import load_file, save_file
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_out.bias"]
    save_file(weights, file)
    return "unet.conv_out.bias is missing"


@pytest.mark.parametrize("how", ["sdxl", "inpainting", "zero-snr", "sample", "no scheduler", "half a config", "list", "bin", "scale", "no text", "missing weight"])
def test_a_folder_that_is_not_built_here_is_one_line(how, tiny_sd, data, tmp_path, capsys):
    shutil.copytree(tiny_sd["epsilon"], tmp_path / "sd")
    words = broken(tmp_path / "sd", how)
    assert words in refused(capsys, data, tmp_path / "r", official="sd", init=tmp_path / "sd", steps=0)


def test_flags_that_do_nothing_are_refused(tiny_sd, data, tmp_path, capsys):
    there = dict(official="sd", init=tiny_sd["epsilon"], steps=0)
    for flags, words in ((dict(class_std=1.0), "--class-std does nothing"), (dict(betas="linear"), "--betas does nothing"), (dict(attach=tmp_path), "--attach does nothing"),
                         (dict(dropout=0.1), "--dropout does nothing"), (dict(process="flow"), "was trained with process"), (dict(model="SiT-S/2"), "leave it out"),
                         (dict(predict="v"), "was trained with predict = eps")):
        assert words in refused(capsys, data, tmp_path / "r", **there, **flags)
    (data / "latents.npy").unlink()
    assert "works on latents, and this folder has none" in refused(capsys, data, tmp_path / "r", **there)


# ---------------------------------------------------------------------------------------------- without the packages
class FakeUNet(torch.nn.Module):
    """What models.sd asks of diffusers' network: a convolution, and the mean of the text added to it."""

    def __init__(self):
        super().__init__()
        self.conv, self.text = torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.Linear(5, 4)
        self.again = False

    def enable_gradient_checkpointing(self):
        self.again = True

    def forward(self, x, t, encoder_hidden_states):
        words = self.text(encoder_hidden_states.mean(1))              # (n, 4)
        return SimpleNamespace(sample=self.conv(x) + words[:, :, None, None] + (t / 1000).view(-1, 1, 1, 1))


def test_a_fake_network_goes_through_train_and_reweight(data, tmp_path, monkeypatch):
    """Text by class, the empty prompt where the label is dropped, and the proxy's prompts are the reference's."""
    monkeypatch.setattr(sd, "make_unet", lambda config: FakeUNet())
    torch.manual_seed(0)
    text = torch.randn(4, 7, 5).half()
    weights = {"y_embedder.text": text, **{f"unet.{k}": v for k, v in FakeUNet().state_dict().items()}}
    settings = dict(model="sd", process="ddpm", predict="v", betas=[0.00085, 0.012], size=8, channels=4, num_classes=3, unet={"sample_size": 8}, text_shape=[7, 5],
                    latents=True, latent_scale=0.18215, vae="tiny", classes=CLASSES, prompts=CLASSES, base="there", base_sha256="0", lora=None)
    torch.save({"ema": weights, "args": settings}, tmp_path / "start.pt")
    state = run(data, tmp_path / "a", init=tmp_path / "start.pt", label_drop=0.5)
    assert torch.equal(state["ema"]["y_embedder.text"], text) and state["args"]["betas"] == [0.00085, 0.012] and state["args"]["predict"] == "v"
    model, _ = from_checkpoint(state)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([100.0])
    with torch.no_grad():
        for y in range(4):
            want = model.unet(x, t, text[y:y + 1].float()).sample
            assert torch.equal(model(x, t, torch.tensor([y])), want)
    reweight.main(["--data", str(data), "--reference", str(tmp_path / "a/last.pt"), "--proxy-init", str(tmp_path / "start.pt"), "--steps", "2", "--burn-in", "1", "--device",
                   "cpu", "--out", str(tmp_path / "dro")])
    assert torch.equal(common.load_pt(tmp_path / "dro/proxy.pt")["model"]["y_embedder.text"], text)


def test_without_the_packages_the_line_names_them(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    assert "needs the package diffusers: pip install" in refused(capsys, data, tmp_path / "r", official="sd", init=tmp_path, steps=0)


def test_a_folder_in_the_place_of_a_checkpoint_is_told_what_to_do(data, tmp_path, capsys):
    (tmp_path / "sd").mkdir()
    assert "train.py --official sd --init" in refused(capsys, data, tmp_path / "r", init=tmp_path / "sd")
    assert "--model sd goes on from given weights" in refused(capsys, data, tmp_path / "r", init=None)
    assert "--lora puts adapters beside" in refused(capsys, data, tmp_path / "r", lora=4)
    with pytest.raises(SystemExit):
        reweight.main(["--data", str(data), "--reference", str(tmp_path / "sd"), "--out", str(tmp_path / "r")])
    assert "of a Stable Diffusion make one first: train.py --official sd --init" in capsys.readouterr().err
