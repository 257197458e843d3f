"""The way to latents and back: a frozen VAE, and a check of latents that somebody has stored.

    vae = load_vae("stabilityai/sd-vae-ft-ema", "cuda")
    z = vae.encode(x)                  # (n, 3, H, W) in [-1, 1] -> mean and std, (n, 2 c, h, w)
    x = vae.decode(z[:, :vae.channels])

Mistakes raise ValueError, FileNotFoundError or ImportError with one full line.
"""
import contextlib
import math

import numpy as np
import torch

AGAIN = "encode the images again with data.py --vae"


class Vae:
    """A frozen AutoencoderKL of diffusers: images in [-1, 1] <-> latents, unscaled.

    (n, 3, H, W) <-> (n, channels, H / factor, W / factor). scale: a diffusion model sees scale z.
    """

    def __init__(self, net, name):
        config = net.config
        for key in ("shift_factor", "latents_mean", "latents_std"):
            if config.get(key):
                raise ValueError(f"VAE {name}: its latents are also shifted ({key}), which is not "
                                 "built here; take one with a scaling_factor alone")
        if config["in_channels"] != 3 or config["out_channels"] != 3:
            raise ValueError(f"VAE {name}: works on {config['in_channels']} colour channels; take "
                             "one for RGB images")
        self.net = net
        self.name = name
        self.scale = config["scaling_factor"]
        self.channels = config["latent_channels"]
        # Every block but the last halves the map.
        self.factor = 2 ** (len(config["block_out_channels"]) - 1)

    @torch.no_grad()
    def encode(self, x):
        """(n, 3, H, W) -> mean and std of the posterior, (n, 2 channels, h, w) float32."""
        with float32(x.device):
            posterior = self.net.encode(x).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1)     # each (n, c, h, w)

    @torch.no_grad()
    def decode(self, z, batch=16):
        """(n, channels, h, w) unscaled -> (n, 3, H, W) float32, `batch` at a time.

        The last layers take a hundred times the memory of the latents.
        """
        with float32(z.device):
            return torch.cat([self.net.decode(part).sample for part in z.float().split(batch)])


@contextlib.contextmanager
def float32(device):
    """Neither autocast nor TF32: Stable Diffusion's VAE is known for NaN in half precision."""
    with (torch.autocast(device.type, enabled=False),
          torch.backends.cudnn.flags(enabled=True, allow_tf32=False)):
        yield


def load_vae(name, device="cpu"):
    """The Vae `name`, of the Hugging Face hub or a folder with config.json and a .safetensors file.

    Pickled weights are not read.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as e:
        raise ImportError("a VAE needs the package diffusers: pip install diffusers") from e
    try:
        net, info = AutoencoderKL.from_pretrained(
            name, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True)
    except Exception as e:           # absent, offline, damaged, another class: many kinds
        raise FileNotFoundError(
            f"VAE {name}: cannot be loaded ({' '.join(str(e).split())[:200]}); put a copy of "
            "https://huggingface.co/stabilityai/sd-vae-ft-ema (config.json and the .safetensors "
            "file) into a folder and pass it (--vae PATH)") from e
    if info["missing_keys"]:
        # Important! Diffusers would go on with random weights.
        raise ValueError(f"VAE {name}: {min(info['missing_keys'])} is missing from its weights")
    return Vae(net.to(device).float().eval().requires_grad_(False), str(name))


# ---------------------------------------------------------------------------- stored latents
def latent_sums(z):
    """float64 (3,): count, sum and sum of squares that draws mean + std noise have on average.

    z is (n, 2 c, h, w) as stored. Sums of parts add up.
    """
    mean, std = np.split(np.asarray(z, np.float64), 2, axis=1)       # each (n, c, h, w)
    # E (mean + std noise)^2 = mean^2 + std^2.
    return np.array([mean.size, mean.sum(), (mean**2 + std**2).sum()])


def latent_moments(sums, scale):
    """(mean, std) over all values of scale (mean + std noise), i.e. of what a model sees.

    sums are those of latent_sums. latents.json holds the two.
    """
    n, first, second = sums
    variance = second / n - (first / n) ** 2
    # Rounding may leave a constant with a variance below zero.
    return scale * first / n, scale * math.sqrt(max(variance, 0.0))


def check_latents(latents, about, most=2048):
    """Raise ValueError unless stored latents (N, 2 c, h, w) are what the dict of latents.json says.

    At most `most` rows, spread over the set, are looked at; 10 % of std is room for their draw.
    Latents stored scaled, or under another scale, are off by a factor of five, and they train
    without any error, on a loss that only looks better.
    """
    check_about(about)
    if latents.shape[1] % 2:
        raise ValueError(f"{latents.shape[1]} channels, but mean and std of the posterior make an "
                         f"even number; {AGAIN}")
    rows = np.linspace(0, len(latents) - 1, min(len(latents), most)).astype(np.int64)
    rows = np.unique(rows)                           # sorted, as a memory map likes it
    sums = np.zeros(3)
    for part in np.array_split(rows, math.ceil(len(rows) / 256)):
        z = latents[part]                            # (b, 2 c, h, w)
        check_rows(z, part)
        sums += latent_sums(z)
    mean, std = latent_moments(sums, about["scale"])
    room = 0.1 * about["std"]
    # For NaN neither would hold, but check_about and check_rows let none through.
    if abs(std - about["std"]) > room or abs(mean - about["mean"]) > room:
        raise ValueError(f"x {about['scale']:g} its draws have mean {mean:.4g} and std {std:.4g}, "
                         f"but latents.json beside it says {about['mean']:.4g} and "
                         f"{about['std']:.4g}: latents of another scale or another VAE; {AGAIN}")


def check_about(about):
    """Raise ValueError unless what was read from latents.json says enough."""
    for key in ("scale", "mean", "std"):
        value = about.get(key) if isinstance(about, dict) else None
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError("latents.json beside it lacks a finite scale, mean or std (of the "
                             f"scaled latents); {AGAIN}")


def check_rows(z, rows):
    """Raise ValueError at the first of these rows z (b, 2 c, h, w) that no posterior can be."""
    values = z.reshape(len(z), -1)                   # (b, 2 c h w)
    std = z[:, z.shape[1] // 2:].reshape(len(z), -1)
    finite = np.isfinite(values).all(1)
    if not finite.all():
        raise ValueError(f"NaN or infinity in row {rows[np.argmin(finite)]}; {AGAIN}")
    sound = (std >= 0).all(1)
    if not sound.all():
        raise ValueError(f"row {rows[np.argmin(sound)]} has a negative standard deviation; the "
                         "second half of the channels must hold the posterior's std (not its "
                         f"logarithm); {AGAIN}")
