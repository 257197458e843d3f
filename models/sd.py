"""Stable Diffusion as a class-conditional network (Rombach et al. 2022, arXiv 2112.10752).

Its classes are prompts: a table of the text states of "a photo of a {class}", and of the empty
prompt as the null class. So label dropout is caption dropout, `guided` is Stable Diffusion's
guidance, and difficulty, class weights and DRO need to know nothing of text. The text encoder runs
once, for K + 1 prompts; the VAE is data.py's and sample.py's. In training the U-Net is alone.

    state = load_sd("stable-diffusion-v1-5", classes)     # as train.py would have written it
    model, process = from_checkpoint(state)

Needs diffusers and transformers, adapters peft too (pip install diffusers transformers peft).
Mistakes raise ValueError, FileNotFoundError or ImportError with one full line.
"""
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
import torch.nn as nn

from models.conditioning import PROMPT, class_words

TEXT = "y_embedder.text"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
NO_WEIGHTS = ("{}: no such file (pickled .bin weights and half-precision variants are not read); "
              "save the model anew with diffusers, in float32 and with safe_serialization")
# What diffusers takes where an old VAE's config names no scale.
OLD_SCALE = 0.18215
# The layers that adapters are put beside, those of diffusers' own script.
ADAPTED = ["to_q", "to_k", "to_v", "to_out.0"]


class PromptTable(nn.Module):
    """y (n,) in 0..K, K = null -> text states (n, L, d) of its prompt; float16 inside."""

    def __init__(self, rows, shape, text=None):
        super().__init__()
        if text is None:
            text = torch.zeros(rows, *shape)
        self.register_buffer("text", text.half())                 # (K + 1, L, d)

    def forward(self, y):
        return self.text[y].float()


class SD(nn.Module):
    """A models.build.Network without token layers: neither aligned to, nor a source of features.

    unet: the config of its U-Net. lora: rank of adapters, or None to train everything. With
    adapters only they and the text are in the state dict; the U-Net is that of the folder `base`,
    whose weights have the hash base_sha256. text (K + 1, L, d), the null row with it.
    """

    options = ("unet", "lora", "base", "base_sha256")

    def __init__(self, size, channels, num_classes, unet=None, lora=None, base=None,
                 base_sha256=None, text=None, mask=None, text_shape=None, class_std=None,
                 recompute=False, time_scale=1.0):
        super().__init__()
        if unet is None or text_shape is None:
            raise ValueError("sd takes its network and prompts from given weights; use train.py "
                             "--official sd --init FOLDER")
        self.size = size
        self.channels = channels
        self.num_classes = num_classes
        self.grid = self.token_width = self.token_layer = None
        self.lora = lora
        self.unet = make_unet(unet)
        self.y_embedder = PromptTable(num_classes + 1, text_shape, text)
        if recompute:
            self.unet.enable_gradient_checkpointing()
        if lora:
            if sha256(Path(base) / WEIGHTS) != base_sha256:
                raise ValueError(f"{base}: its {WEIGHTS} is not the one that these adapters were "
                                 "trained on; put that one there")
            self.unet.load_state_dict(read_unet(Path(base)))
            self.unet.requires_grad_(False)
            add_adapters(self.unet, lora)

    def forward(self, x, t, y):
        # No mask: all L states count, those of the padding too, as in its own training.
        states = self.y_embedder(y).to(x.dtype)                   # (n, L, d)
        return self.unet(x, t, encoder_hidden_states=states).sample

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        if self.lora:
            state = {k: v for k, v in state.items() if "lora_" in k or k.endswith(TEXT)}
        return state

    def load_state_dict(self, state, strict=True, assign=False):
        # With adapters the base is not in it.
        return super().load_state_dict(state, strict and not self.lora, assign)


def package(name, what):
    """The module of an optional package; `what` needs it."""
    try:
        return __import__(name)
    except ImportError as e:
        raise ImportError(f"{what} needs the package {name}: pip install diffusers transformers "
                          "peft") from e


def make_unet(config):
    """The U-Net of a config, with random weights."""
    return package("diffusers", "Stable Diffusion").UNet2DConditionModel.from_config(config)


def add_adapters(unet, rank):
    """LoRA (Hu et al. 2021, arXiv 2106.09685) with alpha = rank: gaussian A, zero B, trained."""
    peft = package("peft", "--lora")
    unet.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                                     target_modules=ADAPTED))


# ---------------------------------------------------------------- a folder of diffusers
def load_sd(folder, classes, lora=None):
    """A Stable Diffusion folder as train.py would have written it: {"ema": weights, "args": dict}.

    Versions 1 and 2, of diffusers' format, with .safetensors. classes: K names, of which the
    prompts are made. With lora, a rank, the weights are the text's alone.
    """
    folder = Path(folder)
    package("diffusers", "--official sd")
    package("transformers", "--official sd")
    if lora:
        package("peft", "--lora")
    config = unet_config(folder)
    settings = {"model": "sd", "process": "ddpm", **schedule_of(folder), "size":
                config["sample_size"], "channels": config["in_channels"], "unet": config,
                "latents": True, "latent_scale": scale_of(folder), "vae": str(folder / "vae"),
                "num_classes": len(classes), "classes": list(classes), "base": str(folder),
                "base_sha256": sha256(folder / WEIGHTS), "lora": lora}
    settings["prompts"] = [PROMPT.replace("{class}", word) for word in class_words(classes)]
    text = text_states(folder, [*settings["prompts"], ""]).half()
    settings["text_shape"] = list(text.shape[1:])
    if text.shape[2] != config["cross_attention_dim"]:
        raise ValueError(f"{folder}: text states are {text.shape[2]} wide, its U-Net takes "
                         f"{config['cross_attention_dim']}; the folder mixes two models")
    weights = {TEXT: text}
    if not lora:
        weights.update({f"unet.{key}": value for key, value in read_unet(folder).items()})
    return {"ema": weights, "args": settings}


def read_config(path, *needed):
    """A JSON file of the folder, a dict that has the needed keys."""
    remedy = "give the folder of a Stable Diffusion 1 or 2 in diffusers' format"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        what = e.__class__.__name__
        raise FileNotFoundError(f"{path}: missing or no JSON ({what}); {remedy}") from e
    for key in needed:
        if not isinstance(config, dict) or config.get(key) is None:
            raise ValueError(f"{path}: does not say its {key}; {remedy}")
    return config


def unet_config(folder):
    """The config of its U-Net, once it is known to be one that takes text and nothing else."""
    file = folder / "unet/config.json"
    config = read_config(file, "sample_size", "in_channels", "out_channels", "cross_attention_dim")
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    for key in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
        if config.get(key):
            raise ValueError(f"{file}: has {key} = {config[key]!r}, as SDXL and others; only "
                             "Stable Diffusion 1 and 2 are built here")
    if config["in_channels"] != config["out_channels"]:
        raise ValueError(f"{file}: {config['in_channels']} channels in and "
                         f"{config['out_channels']} out: a model that fills in or edits pictures; "
                         "take the text-to-image one")
    return config


def schedule_of(folder):
    """{"predict": eps or v, "betas": [first, last]} of its scheduler."""
    file = folder / "scheduler/scheduler_config.json"
    config = read_config(file, "beta_start", "beta_end", "beta_schedule")
    needed = {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
              "rescale_betas_zero_snr": False, "trained_betas": None}
    for key, wanted in needed.items():
        has = config.get(key) or wanted
        if has != wanted:
            raise ValueError(f"{file}: {key} is {has}, but only {wanted} is built here; take "
                             "another model")
    predicts = {"epsilon": "eps", "v_prediction": "v"}
    kind = config.get("prediction_type", "epsilon")
    if kind not in predicts:
        raise ValueError(f"{file}: predicts {kind!r}; only {' and '.join(predicts)} are built here")
    return {"predict": predicts[kind], "betas": [config["beta_start"], config["beta_end"]]}


def scale_of(folder):
    return read_config(folder / "vae/config.json").get("scaling_factor", OLD_SCALE)


def read_unet(folder):
    """The weights of its U-Net, float32, from the .safetensors file; pickled ones are not read."""
    file = folder / WEIGHTS
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        return {key: value.float() for key, value in load_file(file).items()}
    except SafetensorError as e:
        raise ValueError(f"{file}: damaged ({e}); copy it again") from e


@torch.no_grad()
def text_states(folder, prompts, batch=32):
    """Last hidden states (len(prompts), L, d) of the folder's text encoder, float32.

    Padded to the tokenizer's length, without a mask: so it was trained.
    """
    transformers = package("transformers", "--official sd")
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
        net, info = transformers.CLIPTextModel.from_pretrained(
            folder / "text_encoder", use_safetensors=True, output_loading_info=True)
    except Exception as e:           # absent, damaged, pickled: transformers raises many kinds
        said = " ".join(str(e).split())[:160]
        raise FileNotFoundError(f"{folder}: its tokenizer or text encoder cannot be loaded "
                                f"({said}); give the whole folder, with .safetensors") from e
    # Important: transformers would go on with random weights where some are missing.
    if info["missing_keys"]:
        raise ValueError(f"{folder}: {sorted(info['missing_keys'])[0]} is missing from the weights "
                         "of its text encoder")
    length = tokenizer.model_max_length
    states = []
    for start in range(0, len(prompts), batch):
        part = prompts[start:start + batch]
        if max(map(len, tokenizer(part).input_ids)) > length:
            print(f"warning: a prompt is cut at {length} tokens", flush=True)
        ids = tokenizer(part, padding="max_length", truncation=True, max_length=length,
                        return_tensors="pt").input_ids            # (b, L)
        states.append(net.float().eval()(ids)[0])                 # (b, L, d)
    return torch.cat(states)


def sha256(path):
    """The hash of the U-Net's weights, in hexadecimal digits."""
    if not path.exists():
        raise FileNotFoundError(NO_WEIGHTS.format(path))
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def export(model, folder):
    """Write what diffusers loads: folder/unet, or with adapters one LoRA file. Not half-written.

    UNet2DConditionModel.from_pretrained(folder, subfolder="unet") or
    pipeline.load_lora_weights(folder).
    """
    folder = Path(folder)
    half = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(half, ignore_errors=True)
    if model.lora:
        from diffusers import StableDiffusionPipeline
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft.utils import get_peft_model_state_dict
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model.unet))
        StableDiffusionPipeline.save_lora_weights(half, unet_lora_layers=layers)
    else:
        model.unet.save_pretrained(half / "unet")
    os.replace(half, folder)
