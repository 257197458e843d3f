"""The two diffusion processes and their samplers.

Time runs from data to noise: u = 0 data, u = 1 noise, everywhere.

DDPM  Ho et al. 2020, arXiv 2006.11239: x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps, in T steps;
      predicts eps (or v).
Flow  Ma et al. 2024 (SiT), arXiv 2401.08740: x_t = (1 - t) x + t eps; predicts v = eps - x.

A sampler is one pure function `sampler(f, x, process, steps, noise, ...)`:
  f(x, t) -> prediction    the network's output at model time t, a float: index 0..T-1 for DDPM,
                           t in [0, 1] for Flow; use `guided` to make it
  x                        (n, C, H, W) the start noise; the state is float64 throughout
  noise(x) -> like x       fresh standard normal numbers, one stream per sample, so that sample i
                           never depends on its neighbours
"""
import math

import torch


# Where the two roots run from and to: "scaled-linear" is Stable Diffusion's (Rombach 2022).
SCALED_LINEAR = (0.00085, 0.012)


class DDPM:
    """T steps, beta linear 1e-4..0.02 (Ho 2020, section 4).

    predict: 'eps', or 'v' (Salimans & Ho 2022). scaled: (first, last) beta, with sqrt(beta) linear
    between them, instead.
    """

    name = "ddpm"

    def __init__(self, T=1000, predict="eps", beta=(1e-4, 0.02), scaled=None):
        self.T = T
        self.predict = predict
        if scaled is None:
            beta = torch.linspace(*beta, T, dtype=torch.float64)
        else:
            first, last = scaled
            roots = torch.linspace(first**0.5, last**0.5, T, dtype=torch.float64)
            beta = roots**2
        self.abar = torch.cumprod(1 - beta, 0)  # (T,)
        self.tables = {}                        # {device: (2, T) of it}

    def model_time(self, u):
        """u (n,) in [0, 1) -> the step's index 0..T-1, as the float that the network embeds."""
        return (u * self.T).floor().clamp(max=self.T - 1)

    def diffuse(self, x, u, eps):
        """x_t of Eq. 4. x, eps (n, C, H, W); u (n,)."""
        a, s = self.alpha_sigma_of(u, x)
        return a * x + s * eps

    def target(self, x, u, eps):
        """What the network is to predict at x_t; like x."""
        if self.predict == "eps":
            return eps
        a, s = self.alpha_sigma_of(u, x)
        return a * eps - s * x

    def x0_eps(self, out, x, i):
        """(x0, eps) that a prediction at index i (a float) stands for."""
        a, s = self.alpha_sigma(i)
        if self.predict == "eps":
            return (x - s * out) / a, out
        return a * x - s * out, s * x + a * out

    def alpha_sigma_of(self, u, x):
        """(sqrt(abar), sqrt(1 - abar)) at u (n,), float32 (n, 1, 1, 1) each, on the device of x."""
        if x.device not in self.tables:  # copied once, not once a step
            table = torch.stack([self.abar.sqrt(), (1 - self.abar).sqrt()])
            self.tables[x.device] = table.to(x.device, torch.float32, non_blocking=True)
        a, s = self.tables[x.device][:, self.model_time(u).long()]
        return a.view(-1, 1, 1, 1), s.view(-1, 1, 1, 1)

    def alpha_sigma(self, i):
        """Floats (sqrt(abar), sqrt(1 - abar)) at index i, abar log-linear between the indices.

        i = -1 is clean data.
        """
        if i < 0:
            return 1.0, 0.0
        # Between the indices `low` and `high`, of which a process of one step has but one.
        low = max(min(int(i), self.T - 2), 0)
        high = min(low + 1, self.T - 1)
        w = i - low
        abar = math.exp((1 - w) * math.log(self.abar[low]) + w * math.log(self.abar[high]))
        return math.sqrt(abar), math.sqrt(1 - abar)


class Flow:
    """The linear path of SiT and rectified flow."""

    name = "flow"
    T = 1
    predict = "v"

    def model_time(self, u):
        return u

    def diffuse(self, x, u, eps):
        u = u.view(-1, 1, 1, 1)
        return (1 - u) * x + u * eps

    def target(self, x, u, eps):
        return eps - x


def make_process(name, predict="eps", betas=None):
    """The process of a checkpoint's settings. betas: [first, last] of a scaled-linear DDPM."""
    if name not in ("ddpm", "flow") or predict not in ("eps", "v"):
        raise ValueError(f"unknown process {name!r} predicting {predict!r}; known are ddpm (eps or "
                         "v) and flow (v)")
    if betas is not None:
        first, last = betas
        if name == "flow" or not 0 < first <= last < 1:
            raise ValueError(f"betas {betas} of a {name} process; only a ddpm has two, in (0, 1)")
    if name == "flow":
        return Flow()
    return DDPM(predict=predict, scaled=betas)


def diffusion_loss(process, model, x, u, eps, y, **kwargs):
    """Pixel mean of the squared error, one float32 value per sample (Ho 2020, Eq. 14; SiT, Eq. 5).

    x, eps (n, C, H, W); u (n,) in [0, 1); y (n,) int64. Returns (n,), or ((n,), tokens) with
    tokens_after=k.
    """
    out = model(process.diffuse(x, u, eps), process.model_time(u), y, **kwargs)
    tokens = None
    if isinstance(out, tuple):
        out, tokens = out
    error = out.float() - process.target(x, u, eps)  # (n, C, H, W)
    loss = error.square().mean((1, 2, 3))            # (n,)
    if tokens is None:
        return loss
    return loss, tokens


def snr_weight(process, u, gamma):
    """Min-SNR weight of the loss at u (n,): min(SNR, gamma) / SNR for eps (Hang et al. 2023, 3.4).

    Divided by SNR + 1 where v is predicted: the v-loss is SNR + 1 times that of x_0. SNR = abar /
    (1 - abar), of a ddpm. Returns float32 (n,) on the device of u, at most 1.
    """
    a, s = process.alpha_sigma_of(u, u)
    snr = (a / s).square().flatten()              # (n,)
    if process.predict == "v":
        return snr.clamp(max=gamma) / (snr + 1)
    return snr.clamp(max=gamma) / snr


# ---------------------------------------------------------------- guidance
def guidance_at(u, cfg, power=None):
    """w at time u in [0, 1]: cfg, or with a power s growing from 1 at noise to cfg at data.

    w(u) = 1 + (cfg - 1) (1 - cos(pi (1 - u)^s)) / 2, the power-cosine guidance of MDT (Gao et al.
    2023, arXiv 2303.14389).
    """
    if power is None:
        return cfg
    return 1 + (cfg - 1) * (1 - math.cos(math.pi * (1 - u) ** power)) / 2


def guided(model, process, y, cfg=1.0, interval=(0.0, 1.0), power=None, channels=None):
    """f(x, t) for the samplers: v = v_null + w (v_cond - v_null) on ALL channels.

    channels: on the first so many alone, as DiT's and SiT's own sampling does with 3 of 4.

    Ho & Salimans 2022, within an interval of u in [0, 1] (Kynkaanniemi 2024); w may grow towards
    the data (see guidance_at). One forward of 2n samples where guidance acts, n elsewhere: w = 1
    needs no null pass.
    """
    null = torch.full_like(y, model.num_classes)  # the label K

    def f(x, t):
        times = torch.full((len(x),), float(t), device=x.device)
        inside = interval[0] <= t / process.T <= interval[1]
        if cfg == 1 or not inside:
            return model(x.float(), times, y).to(x.dtype)
        twice = x.float().repeat(2, 1, 1, 1)  # (2 n, C, H, W)
        out = model(twice, times.repeat(2), torch.cat([y, null])).to(x.dtype)
        cond, uncond = out.chunk(2)           # (n, C, H, W) each
        w = guidance_at(t / process.T, cfg, power)
        out = uncond + w * (cond - uncond)
        if channels is None:
            return out
        return torch.cat([out[:, :channels], cond[:, channels:]], dim=1)

    return f


# ---------------------------------------------------------------- DDPM samplers
def trailing(T, steps):
    """`steps` indices from T - 1 downwards at equal distance, then -1 for clean data."""
    return [round(T * (steps - k) / steps) - 1 for k in range(steps)] + [-1]


def linspace(T, steps):
    """`steps` indices from T - 1 to 0, both included, then -1: DiT's and ADM's grid."""
    return [round((T - 1) * (steps - 1 - k) / max(1, steps - 1)) for k in range(steps)] + [-1]


TIME_GRIDS = {"trailing": trailing, "linspace": linspace}


def denoise(f, x, process, i, clip_x0):
    """(x0, eps) that the network sees in x at index i; with clip_x0 within the range of pixels."""
    x0, eps = process.x0_eps(f(x, i), x, i)
    if clip_x0:
        x0 = x0.clamp(-1, 1)
        a, s = process.alpha_sigma(i)
        eps = (x - a * x0) / s  # keeps x = a x0 + s eps true
    return x0, eps


def ancestral(f, x, process, steps, noise, variance="beta", clip_x0=True,
              grid=trailing):
    """Ho 2020, Algorithm 2; fewer steps than T by respacing (Nichol & Dhariwal 2021).

    variance: 'beta', or 'beta-tilde' of the posterior.
    """
    x = x.double()
    indices = grid(process.T, min(steps, process.T))
    for i, j in zip(indices[:-1], indices[1:]):
        a, s = process.alpha_sigma(i)
        a_, s_ = process.alpha_sigma(j)
        x0, _ = denoise(f, x, process, i, clip_x0)
        beta = 1 - (a / a_) ** 2                          # of the respaced step
        x = (a_ * beta * x0 + a / a_ * s_**2 * x) / s**2  # mean of the posterior, Eq. 7
        if j < 0:
            break                                         # clean data takes no noise
        var = beta
        if variance == "beta-tilde":
            var = beta * (s_ / s) ** 2
        x = x + math.sqrt(var) * noise(x)
    return x


def ddim(f, x, process, steps, noise=None, eta=0.0, clip_x0=True, grid=trailing):
    """Song et al. 2021, arXiv 2010.02502, Eq. 12 and 16. eta = 0 is deterministic."""
    x = x.double()
    indices = grid(process.T, min(steps, process.T))
    for i, j in zip(indices[:-1], indices[1:]):
        a, s = process.alpha_sigma(i)
        a_, s_ = process.alpha_sigma(j)
        x0, eps = denoise(f, x, process, i, clip_x0)
        sigma = eta * (s_ / s) * math.sqrt(1 - (a / a_) ** 2)  # Eq. 16
        x = a_ * x0 + math.sqrt(max(s_**2 - sigma**2, 0)) * eps
        if sigma > 0:
            x = x + sigma * noise(x)
    return x


def dpm_solver_pp_2m(f, x, process, steps, noise=None, clip_x0=True, grid=trailing):
    """DPM-Solver++(2M), Lu et al. 2022, arXiv 2211.01095, Algorithm 2.

    Steps uniform in lambda = log(alpha / sigma), the last one to clean data. The nodes lie between
    the trained indices: the networks embed real-valued time.
    """
    def lam(i):
        a, s = process.alpha_sigma(i)
        return math.log(a / s)

    last = process.T - 1
    width = lam(0) - lam(last)
    nodes = [solve(lam, lam(last) + width * k / max(steps - 1, 1), last) for k in range(steps)]
    x = x.double()
    x0_old = None
    h_old = None
    for i, j in zip(nodes[:-1], nodes[1:]):
        _, s = process.alpha_sigma(i)
        a_, s_ = process.alpha_sigma(j)
        x0, _ = denoise(f, x, process, i, clip_x0)
        h = lam(j) - lam(i)
        D = x0  # the first step is of first order
        if x0_old is not None:
            D = (1 + h / (2 * h_old)) * x0 - h / (2 * h_old) * x0_old
        x = s_ / s * x - a_ * math.expm1(-h) * D
        x0_old = x0
        h_old = h
    # lambda -> infinity: x becomes x0.
    x0, _ = denoise(f, x, process, nodes[-1], clip_x0)
    return x0


def solve(fn, value, high):
    """The index in [0, high] where the decreasing function fn takes `value`, by bisection."""
    low = 0.0
    # 60 halvings leave nothing of a range of 1000 in float64.
    for _ in range(60):
        middle = (low + high) / 2
        if fn(middle) > value:
            low = middle
        else:
            high = middle
    return (low + high) / 2


# ---------------------------------------------------------------- Flow samplers
def euler(f, x, process, steps, noise=None):
    """First-order ODE steps on t = linspace(1, 0)."""
    x = x.double()
    for k in range(steps):
        x = x - f(x, 1 - k / steps) / steps  # dt = -1 / steps
    return x


def heun(f, x, process, steps, noise=None):
    """Second-order ODE steps (Karras 2022, Algorithm 1, without churn); 2 evaluations a step."""
    x = x.double()
    h = 1 / steps
    for k in range(steps):
        t = 1 - k * h
        d = f(x, t)  # the slope here
        # And at the end of Euler's step; rounding must not take its time below 0.
        d_ = f(x - h * d, max(t - h, 0.0))
        x = x - h / 2 * (d + d_)
    return x


def euler_maruyama(f, x, process, steps, noise, last=0.04):
    """The reverse SDE of SiT (section 3.4) with g^2 = 2t, on linspace(1, last, steps).

    eps^ = x + (1-t) v, dx = (v + eps^) dt + sqrt(2 t |dt|) z; then one step to 0 without noise.
    """
    x = x.double()
    times = torch.linspace(1, last, steps, dtype=torch.float64).tolist() + [0.0]
    for k, (t, t_) in enumerate(zip(times[:-1], times[1:])):
        v = f(x, t)
        # The drift is v + eps^, with eps^ = x + (1 - t) v.
        x = x + (v + x + (1 - t) * v) * (t_ - t)
        if k < steps - 1:
            x = x + math.sqrt(2 * t * (t - t_)) * noise(x)
    return x


SAMPLERS = {"ddpm": {"ancestral": ancestral, "ddim": ddim, "dpm++": dpm_solver_pp_2m},
            "flow": {"euler": euler, "heun": heun, "sde": euler_maruyama}}


@torch.no_grad()
def generate(model, process, y, generators, sampler, steps, cfg=1.0, interval=(0.0, 1.0),
             power=None, channels=None, **options):
    """Samples (n, C, H, W) float32 for labels y (n,).

    Start noise and every later number of sample i come from generators[i] alone. Noise is drawn
    where the generators live, on the CPU, so that a sample is the same on every device up to
    rounding.
    """
    from models.conditioning import sides
    shape = (model.channels, *sides(model.size))

    def noise(_=None):
        rows = [torch.randn(shape, generator=g) for g in generators]
        return torch.stack(rows).to(y.device)  # (n, C, H, W)

    f = guided(model, process, y, cfg, interval, power, channels)
    x = SAMPLERS[process.name][sampler](f, noise(), process, steps, noise, **options)
    return x.float()


def sample_images(model, process, y, generators, how, vae=None, scale=None):
    """Images (n, C, H, W) float32 in [-1, 1] for labels y (n,), as sample.py draws them.

    how: dict with sampler, steps, cfg, cfg_interval, eta, variance and perhaps cfg_power,
    cfg_channels and time_grid (of ddpm). With a
    vae the model's samples are latents times `scale`, and decoded.
    """
    options = {}
    if how["sampler"] == "ancestral":
        options["variance"] = how["variance"]
    if how["sampler"] == "ddim":
        options["eta"] = how["eta"]
    if process.name == "ddpm":
        options["clip_x0"] = vae is None  # pixels lie in [-1, 1], latents do not
        options["grid"] = TIME_GRIDS[how.get("time_grid") or "trailing"]
    x = generate(model, process, y, generators, how["sampler"], how["steps"], how["cfg"],
                 how["cfg_interval"], how.get("cfg_power"), how.get("cfg_channels"), **options)
    if vae is None:
        return x
    return vae.decode(x / scale)


# ---------------------------------------------------------------- pixels and latents
def to_pixels(x):
    """uint8 (n, H, W, C) -> float32 (n, C, H, W) in [-1, 1]."""
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x):
    """(n, C, H, W) in [-1, 1] -> uint8 (n, H, W, C), to the nearest level."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)


def sample_latents(z, scale, noise):
    """A fresh draw from the VAE posterior, scaled: scale (mean + std noise).

    z (n, 2c, h, w): its mean and std as they are stored; noise (n, c, h, w).
    """
    mean, std = z.float().chunk(2, dim=1)  # (n, c, h, w) each
    return scale * (mean + std * noise)
