"""The way to latents and back: a frozen AutoencoderKL, and what is known of the latents that it made."""
import math

import numpy as np
import torch
import torch.nn as nn


class Vae(nn.Module):
    """A frozen AutoencoderKL of diffusers: images (n, 3, H, W) in [-1, 1] <-> latents (n, channels, H / factor, W / factor), unscaled.

    Always float32 outside autocast: Stable Diffusion's VAE is known for NaN in half precision. scale: what a diffusion model multiplies latents by.
    """

    def __init__(self, net, name):
        super().__init__()
        config = net.config
        extra = [k for k in ("shift_factor", "latents_mean", "latents_std") if config.get(k)]
        if extra:
            raise ValueError(f"VAE {name}: its latents are also shifted ({extra[0]}), which is not built here; take one with a scaling_factor alone")
        if config["in_channels"] != 3 or config["out_channels"] != 3:
            raise ValueError(f"VAE {name}: works on {config['in_channels']} colour channels; take one for RGB images")
        self.net, self.name, self.scale, self.channels = net, name, config["scaling_factor"], config["latent_channels"]
        self.factor = 2 ** (len(config["block_out_channels"]) - 1)

    def _exact(self, x):
        return torch.autocast(x.device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False)

    @torch.no_grad()
    def encode(self, x):
        """(n, 3, H, W) -> mean and std of the posterior, (n, 2 channels, h, w) float32."""
        autocast, tf32 = self._exact(x)
        with autocast, tf32:
            posterior = self.net.encode(x).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1)

    @torch.no_grad()
    def decode(self, z, batch=16):
        """(n, channels, h, w) unscaled -> (n, 3, H, W) float32, `batch` at a time: the last layers take a hundred times the memory of the latents."""
        autocast, tf32 = self._exact(z)
        with autocast, tf32:
            return torch.cat([self.net.decode(part).sample for part in z.float().split(batch)])


def load_vae(name, device="cpu"):
    """The Vae `name`, of the Hugging Face hub or a folder with config.json and diffusion_pytorch_model.safetensors. Pickled weights are not read."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as e:
        raise ImportError("a VAE needs the package diffusers: pip install diffusers") from e
    try:
        net, info = AutoencoderKL.from_pretrained(name, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True)
    except Exception as e:                                            # absent, offline, damaged, another class: many kinds
        raise FileNotFoundError(f"VAE {name}: cannot be loaded ({' '.join(str(e).split())[:200]}); put a copy of https://huggingface.co/"
                                "stabilityai/sd-vae-ft-ema (config.json and the .safetensors file) into a folder and pass it (--vae PATH)") from e
    if info["missing_keys"]:                                          # important! diffusers would go on with random weights
        raise ValueError(f"VAE {name}: {sorted(info['missing_keys'])[0]} is missing from its weights")
    return Vae(net.to(device).float().eval().requires_grad_(False), str(name))


def latent_sums(z):
    """float64 (3,): count, sum and sum of squares that draws mean + std noise have on average; z (n, 2c, h, w) as stored. Sums of parts add up."""
    mean, std = np.split(np.asarray(z, np.float64), 2, axis=1)
    return np.array([mean.size, mean.sum(), (mean**2 + std**2).sum()])


def latent_moments(sums, scale):
    """(mean, std) over all values of latents as a model sees them, scale (mean + std noise), from latent_sums: what latents.json holds."""
    n, first, second = sums
    return scale * first / n, scale * math.sqrt(max(second / n - (first / n) ** 2, 0.0))


def check_latents(latents, about, most=2048):
    """Raise ValueError unless stored latents (N, 2c, h, w) are what latents.json, the dict `about`, says of them.

    mean and std are compared on at most `most` rows spread over the set, with room for the draw of the rows (10 % of std): latents stored scaled, or
    under another scale, are off by a factor of five and train without any error, on a loss that only looks better. NaN is found among these rows only.
    """
    if not isinstance(about, dict) or not all(isinstance(about.get(k), (int, float)) and math.isfinite(about[k]) for k in ("scale", "mean", "std")):
        raise ValueError("latents.json beside it lacks a finite scale, mean or std (of the scaled latents); encode the images with data.py --vae")
    if latents.shape[1] % 2:
        raise ValueError(f"{latents.shape[1]} channels, but mean and std of the posterior make an even number; encode the images with data.py --vae")
    spread = np.unique(np.linspace(0, len(latents) - 1, min(len(latents), most)).astype(np.int64))
    sums = np.zeros(3)
    for part in np.array_split(spread, -(-len(spread) // 256)):
        z = latents[part]                                             # (b, 2c, h, w)
        sound = np.isfinite(z).reshape(len(z), -1).all(1)
        if not sound.all():
            raise ValueError(f"NaN or infinity in row {part[np.argmin(sound)]}; encode the images again with data.py --vae")
        positive = (z[:, z.shape[1] // 2:] >= 0).reshape(len(z), -1).all(1)
        if not positive.all():
            raise ValueError(f"row {part[np.argmin(positive)]} has a negative standard deviation; the second half of the channels must hold the "
                             "posterior's std (not its logarithm); encode the images with data.py --vae")
        sums += latent_sums(z)
    mean, std = latent_moments(sums, about["scale"])
    if abs(std - about["std"]) > 0.1 * about["std"] or abs(mean - about["mean"]) > 0.1 * about["std"]:
        raise ValueError(f"x {about['scale']:g} its draws have mean {mean:.4g} and std {std:.4g}, but latents.json beside it says {about['mean']:.4g} "
                         f"and {about['std']:.4g}: latents of another scale or another VAE; encode the images again with data.py --vae")
