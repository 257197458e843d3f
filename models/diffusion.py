"""The two diffusion processes and their samplers. Time runs from data to noise: u = 0 data, u = 1 noise, everywhere.

DDPM  Ho et al. 2020, arXiv 2006.11239: discrete, x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps, predicts eps (or v).
Flow  Ma et al. 2024 (SiT), arXiv 2401.08740: linear path, x_t = (1 - t) x + t eps, predicts v = eps - x.

A sampler is one pure function `sampler(f, x, process, steps, noise, ...)`:
  f(x, t) -> prediction    the network's output at model time t, a float: index 0..T-1 for DDPM, t in [0, 1] for Flow; use `guided` to make it
  x                        (n, C, H, W) the start noise; the state is float64 throughout
  noise(x) -> like x       fresh standard normal numbers, one stream per sample, so that sample i never depends on its neighbours
"""
import math

import torch


class DDPM:
    """T steps, beta linear 1e-4..0.02 (Ho 2020, section 4). predict: 'eps', or 'v' (Salimans & Ho 2022)."""

    name = "ddpm"

    def __init__(self, T=1000, predict="eps", beta=(1e-4, 0.02)):
        self.T, self.predict = T, predict
        self.abar = torch.cumprod(1 - torch.linspace(*beta, T, dtype=torch.float64), 0)      # (T,)
        self._on = {}

    def model_time(self, u):
        """u (n,) in [0, 1) -> the step's index 0..T-1, as the float that the network embeds."""
        return (u * self.T).floor().clamp(max=self.T - 1)

    def _alpha_sigma(self, u, x):
        if x.device not in self._on:                                  # copied to the device once, not once a step
            self._on[x.device] = torch.stack([self.abar.sqrt(), (1 - self.abar).sqrt()]).to(x.device, torch.float32)
        a, s = self._on[x.device][:, self.model_time(u).long()]       # (n,), (n,)
        return a.view(-1, 1, 1, 1), s.view(-1, 1, 1, 1)

    def diffuse(self, x, u, eps):
        """x_t of Eq. 4. x, eps (n, C, H, W); u (n,)."""
        a, s = self._alpha_sigma(u, x)
        return a * x + s * eps

    def target(self, x, u, eps):
        if self.predict == "eps":
            return eps
        a, s = self._alpha_sigma(u, x)
        return a * eps - s * x

    def x0_eps(self, out, x, i):
        """(x0, eps) that a prediction at index i (a float; abar log-linear between indices) stands for."""
        a, s = self.alpha_sigma(i)
        if self.predict == "eps":
            return (x - s * out) / a, out
        return a * x - s * out, s * x + a * out

    def alpha_sigma(self, i):
        """Floats (sqrt(abar), sqrt(1 - abar)) at index i; i = -1 is clean data."""
        if i < 0:
            return 1.0, 0.0
        lo = min(int(i), self.T - 2) if self.T > 1 else 0
        hi, w = min(lo + 1, self.T - 1), i - lo
        abar = math.exp((1 - w) * math.log(self.abar[lo]) + w * math.log(self.abar[hi]))
        return math.sqrt(abar), math.sqrt(1 - abar)


class Flow:
    """The linear path of SiT and rectified flow."""

    name, T, predict = "flow", 1, "v"

    def model_time(self, u):
        return u

    def diffuse(self, x, u, eps):
        u = u.view(-1, 1, 1, 1)
        return (1 - u) * x + u * eps

    def target(self, x, u, eps):
        return eps - x


def make_process(name, predict="eps"):
    if name not in ("ddpm", "flow") or predict not in ("eps", "v"):
        raise ValueError(f"unknown process {name!r} predicting {predict!r}; known are ddpm (eps or v) and flow (v)")
    return Flow() if name == "flow" else DDPM(predict=predict)


def diffusion_loss(process, model, x, u, eps, y, **kw):
    """Pixel mean of the squared error, one float32 value per sample (Ho 2020, Eq. 14; SiT, Eq. 5).

    x, eps (n, C, H, W); u (n,) in [0, 1); y (n,) int64. Returns (n,), or ((n,), tokens) with tokens_after=k.
    """
    out = model(process.diffuse(x, u, eps), process.model_time(u), y, **kw)
    out, tokens = out if isinstance(out, tuple) else (out, None)
    loss = (out.float() - process.target(x, u, eps)).square().mean((1, 2, 3))                 # (n,)
    return loss if tokens is None else (loss, tokens)


# ---------------------------------------------------------------------------------------------- guidance
def guided(model, process, y, cfg=1.0, interval=(0.0, 1.0)):
    """f(x, t) for the samplers: v = v_null + w (v_cond - v_null) on ALL channels (Ho & Salimans 2022), within an interval of u in [0, 1]
    (Kynkaanniemi 2024). One forward of 2n samples where guidance acts, n elsewhere: w = 1 needs no null pass."""
    null = torch.full_like(y, model.num_classes)

    def f(x, t):
        t_ = torch.full((len(x),), float(t), device=x.device)
        if cfg == 1 or not interval[0] <= t / process.T <= interval[1]:
            return model(x.float(), t_, y).to(x.dtype)
        cond, uncond = model(x.float().repeat(2, 1, 1, 1), t_.repeat(2), torch.cat([y, null])).to(x.dtype).chunk(2)
        return uncond + cfg * (cond - uncond)
    return f


# ---------------------------------------------------------------------------------------------- DDPM samplers
def trailing(T, steps):
    """`steps` indices from T - 1 downwards at equal distance, then -1 for clean data: steps + 1 integers."""
    return [round(T * (steps - k) / steps) - 1 for k in range(steps)] + [-1]


def ancestral(f, x, process, steps, noise, variance="beta", clip_x0=True):
    """Ho 2020, Algorithm 2; fewer steps than T by respacing (Nichol & Dhariwal 2021). variance: 'beta', or 'beta-tilde' of the posterior."""
    x, ts = x.double(), trailing(process.T, min(steps, process.T))
    for i, j in zip(ts[:-1], ts[1:]):
        (a, s), (a_, s_) = process.alpha_sigma(i), process.alpha_sigma(j)
        x0, _ = process.x0_eps(f(x, i), x, i)
        x0 = x0.clamp(-1, 1) if clip_x0 else x0
        beta = 1 - (a / a_) ** 2                                      # of the respaced step
        mean = (a_ * beta * x0 + a / a_ * s_**2 * x) / s**2           # Eq. 7
        var = beta * (s_ / s) ** 2 if variance == "beta-tilde" else beta
        x = mean + math.sqrt(var) * noise(x) if j >= 0 else mean
    return x


def ddim(f, x, process, steps, noise=None, eta=0.0, clip_x0=True):
    """Song et al. 2021, arXiv 2010.02502, Eq. 12 and 16. eta = 0 is deterministic."""
    x, ts = x.double(), trailing(process.T, min(steps, process.T))
    for i, j in zip(ts[:-1], ts[1:]):
        (a, s), (a_, s_) = process.alpha_sigma(i), process.alpha_sigma(j)
        x0, eps = process.x0_eps(f(x, i), x, i)
        if clip_x0:
            x0 = x0.clamp(-1, 1)
            eps = (x - a * x0) / s                                    # keep x = a x0 + s eps true after clipping
        sigma = eta * (s_ / s) * math.sqrt(1 - (a / a_) ** 2)
        x = a_ * x0 + math.sqrt(max(s_**2 - sigma**2, 0)) * eps
        if sigma > 0:
            x = x + sigma * noise(x)
    return x


def dpm_solver_pp_2m(f, x, process, steps, noise=None, clip_x0=True):
    """DPM-Solver++(2M), Lu et al. 2022, arXiv 2211.01095, Algorithm 2: steps uniform in lambda = log(alpha / sigma), last one to clean data.

    The nodes lie between the trained indices: the networks embed real-valued time.
    """
    x, lam = x.double(), lambda i: math.log(process.alpha_sigma(i)[0] / process.alpha_sigma(i)[1])
    grid = [_solve(lam, lam(process.T - 1) + (lam(0) - lam(process.T - 1)) * k / max(steps - 1, 1), process.T - 1) for k in range(steps)]
    old, h_old = None, None
    for k, i in enumerate(grid):
        x0, _ = process.x0_eps(f(x, i), x, i)
        x0 = x0.clamp(-1, 1) if clip_x0 else x0
        if k == steps - 1:
            return x0                                                 # lambda -> infinity: x becomes x0
        h = lam(grid[k + 1]) - lam(i)
        D = x0 if old is None else (1 + h / (2 * h_old)) * x0 - h / (2 * h_old) * old
        (_, s), (a_, s_) = process.alpha_sigma(i), process.alpha_sigma(grid[k + 1])
        x, old, h_old = s_ / s * x - a_ * math.expm1(-h) * D, x0, h
    return x


def _solve(fn, value, hi):
    """The index in [0, hi] where the decreasing function fn takes `value`, by bisection."""
    lo = 0.0
    for _ in range(60):
        mid = (lo + hi) / 2
        lo, hi = (mid, hi) if fn(mid) > value else (lo, mid)
    return (lo + hi) / 2


# ---------------------------------------------------------------------------------------------- Flow samplers
def euler(f, x, process, steps, noise=None):
    """First-order ODE steps on t = linspace(1, 0)."""
    x = x.double()
    for k in range(steps):
        x = x - f(x, 1 - k / steps) / steps
    return x


def heun(f, x, process, steps, noise=None):
    """Second-order ODE steps (Karras 2022, Algorithm 1, without churn); 2 evaluations a step."""
    x, h = x.double(), 1 / steps
    for k in range(steps):
        t = 1 - k * h
        d = f(x, t)
        x = x - h / 2 * (d + f(x - h * d, max(t - h, 0.0)))
    return x


def euler_maruyama(f, x, process, steps, noise, last=0.04):
    """The reverse SDE of SiT (section 3.4) with g^2 = 2t: eps^ = x + (1-t) v, dx = (v + eps^) dt + sqrt(2 t |dt|) z on linspace(1, last, steps), then
    one step to 0 without noise."""
    x, ts = x.double(), torch.linspace(1, last, steps, dtype=torch.float64).tolist() + [0.0]
    for k, (t, t_) in enumerate(zip(ts[:-1], ts[1:])):
        v = f(x, t)
        x_new = x + (v + x + (1 - t) * v) * (t_ - t)
        x = x_new + math.sqrt(2 * t * (t - t_)) * noise(x) if k < steps - 1 else x_new
    return x


SAMPLERS = {"ddpm": {"ancestral": ancestral, "ddim": ddim, "dpm++": dpm_solver_pp_2m},
            "flow": {"euler": euler, "heun": heun, "sde": euler_maruyama}}


@torch.no_grad()
def generate(model, process, y, generators, sampler, steps, cfg=1.0, interval=(0.0, 1.0), **options):
    """Samples (n, C, H, W) float32 for labels y (n,): start noise and every later number of sample i come from generators[i] alone.

    Noise is drawn where the generators live (the CPU), so that a sample is the same on every device up to rounding.
    """
    shape = (model.channels, model.size, model.size)

    def noise(_=None):
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(y.device)     # (n, C, H, W)
    x = SAMPLERS[process.name][sampler](guided(model, process, y, cfg, interval), noise(), process, steps, noise, **options)
    return x.float()


def draw(model, process, y, generators, drawn, vae=None, scale=None):
    """Images (n, C, H, W) float32 in [-1, 1] for labels y (n,), as sample.py draws them and evaluate.py's trajectories once more.

    drawn: dict with sampler, steps, cfg, cfg_interval, eta and variance. With a vae the model's samples are latents times `scale`, and decoded.
    """
    options = {"ancestral": {"variance": drawn["variance"]}, "ddim": {"eta": drawn["eta"]}}.get(drawn["sampler"], {})
    if process.name == "ddpm":
        options["clip_x0"] = vae is None                              # pixels lie in [-1, 1], latents do not
    x = generate(model, process, y, generators, drawn["sampler"], drawn["steps"], drawn["cfg"], drawn["cfg_interval"], **options)
    return x if vae is None else vae.decode(x / scale)


def to_pixels(x):
    """uint8 (n, H, W, C) -> float32 (n, C, H, W) in [-1, 1]."""
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1


def sample_latents(z, scale, noise):
    """(n, 2c, h, w) stored mean and std of the VAE posterior, noise (n, c, h, w) -> a fresh draw, scaled: scale (mean + std noise)."""
    mean, std = z.float().chunk(2, dim=1)
    return scale * (mean + std * noise)


def to_uint8(x):
    """(n, C, H, W) in [-1, 1] -> uint8 (n, H, W, C), rounded to the nearest level (the inverse of to_pixels)."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
