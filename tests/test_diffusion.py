"""models/diffusion.py: both processes against plain loops, every sampler against Gaussian data, whose exact denoiser and exact solution are known.

With a linear denoiser a sampler is an affine map of the start noise and of every noise it draws. `affine` reads that map off by pushing unit vectors
through the sampler, so mean and covariance of its samples come out exactly, with no Monte Carlo error.
"""
import math

import numpy as np
import pytest
import torch

from models import diffusion
from models.build import build
from models.diffusion import (DDPM, SAMPLERS, Flow, ancestral, ddim, diffusion_loss, dpm_solver_pp_2m, euler, euler_maruyama, generate, guidance_at, guided, heun,
                              make_process, to_uint8, trailing)

SHAPE, DIM = (2, 1, 2), 4                                             # C, H, W of the Gaussian data, laid out as an image


def gaussian(seed=0, low=0.01, high=1.5):
    """Mean (4,) and a covariance (4, 4) without a zero, eigenvalues from `low` to `high`; eigenvectors Q."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0]
    lam = np.geomspace(low, high, DIM)
    return rng.uniform(-0.8, 0.8, DIM), (q * lam) @ q.T


def exact(process, m, S):
    """f(x, t) -> E[what the network predicts | x_t = x] for data N(m, S):
    eps^ = s V^-1 (x - a m), x0^ = m + a S V^-1 (x - a m), V = a^2 S + s^2 I."""
    def f(x, t):
        a, s = (1 - t, t) if process.name == "flow" else process.alpha_sigma(t)
        r = np.linalg.solve(a * a * S + s * s * np.eye(DIM), (x.reshape(-1, DIM).numpy() - a * m).T).T
        eps, x0 = s * r, m + a * r @ S
        out = eps - x0 if process.name == "flow" else eps if process.predict == "eps" else a * eps - s * x0
        return torch.from_numpy(out).reshape(x.shape)
    return f


def affine(sampler, process, steps, m, S, draws=0, **options):
    """(A (4, 4), mean (4,), covariance (4, 4)) of the sampler's output for start noise N(0, I): x = A x_T + sum_k B_k z_k + b."""
    rows = 1 + DIM * (1 + draws)                                      # row 0: no noise at all; then a unit vector in one place each
    x = torch.zeros(rows, DIM, dtype=torch.float64)
    x[1:1 + DIM] = torch.eye(DIM)
    calls = []

    def noise(like):
        z = torch.zeros(rows, DIM, dtype=torch.float64)
        lo = 1 + DIM * (1 + len(calls))
        calls.append(lo)
        z[lo:lo + DIM] = torch.eye(DIM)
        return z.reshape(like.shape)
    out = sampler(exact(process, m, S), x.reshape(rows, *SHAPE), process, steps, noise, **options).reshape(rows, DIM).numpy()
    assert len(calls) == draws, f"{len(calls)} draws of noise instead of {draws}"
    G = out[1:] - out[0]                                              # row i: the response to unit vector i
    return G[:DIM].T, out[0], G.T @ G


def sqrtm(M):
    lam, q = np.linalg.eigh(M)
    return (q * np.sqrt(lam)) @ q.T


def ode_solution(m, S, start, end):
    """(A, b) of the exact probability-flow solution x_end = A x_start + b between (a, s) pairs: standardised per eigen-direction of S."""
    V = [a * a * S + s * s * np.eye(DIM) for a, s in (start, end)]
    A = sqrtm(V[1]) @ np.linalg.inv(sqrtm(V[0]))                      # all functions of S: they commute
    return A, end[0] * m - A @ (start[0] * m)


def error(A, b, A_, b_):
    return np.abs(np.c_[A - A_, b - b_]).max()


def slopes(errors):
    return [math.log2(a / b) for a, b in zip(errors, errors[1:])]


def scaled(T, predict="eps", low=0.1, high=20.0):
    """The same noise schedule cut into T steps: beta ~ 1 / T."""
    return DDPM(T=T, predict=predict, beta=(low / T, high / T))


# ---------------------------------------------------------------------------------------------- samplers: deterministic, order of convergence
def test_exact_denoiser_is_the_regression_of_the_target():
    """The oracle itself: E[target | x_t] by least squares over draws, through diffuse() and target() of both processes."""
    g = torch.Generator().manual_seed(0)
    m, S = gaussian()
    n = 100_000
    x = torch.from_numpy(m + np.linalg.cholesky(S).dot(torch.randn(DIM, n, generator=g, dtype=torch.float64).numpy()).T).reshape(n, *SHAPE)
    eps = torch.randn(n, *SHAPE, generator=g, dtype=torch.float64)
    for process in (Flow(), DDPM(), DDPM(predict="v")):
        u = torch.full((n,), 0.4)
        xt = process.diffuse(x, u, eps).reshape(n, DIM).numpy()
        target = process.target(x, u, eps).reshape(n, DIM).numpy()
        W = np.linalg.lstsq(np.c_[xt, np.ones(n)], target, rcond=None)[0]
        f = exact(process, m, S)
        probe = torch.cat([torch.zeros(1, DIM), torch.eye(DIM)]).double()
        got = np.c_[probe.numpy(), np.ones(len(probe))] @ W
        want = f(probe.reshape(-1, *SHAPE), process.model_time(u)[0].item()).reshape(-1, DIM).numpy()
        assert np.abs(got - want).max() < 0.03, process.name


@pytest.mark.parametrize("sampler, order", [(euler, 1), (heun, 2)])
def test_flow_ode_order(sampler, order):
    m, S = gaussian(low=0.05)
    A, b = ode_solution(m, S, (0.0, 1.0), (1.0, 0.0))
    errors = []
    for steps in (40, 80, 160, 320):
        A_, b_, cov = affine(sampler, Flow(), steps, m, S)
        errors.append(error(A_, b_, A, b))
    assert errors[-1] < (0.01 if order == 1 else 1e-5) and abs(slopes(errors)[-1] - order) < 0.15, (errors, slopes(errors))
    assert np.abs(cov - S).max() < (0.02 if order == 1 else 1e-5)     # the start is exactly N(0, I), so the samples are exactly N(m, S) in the limit


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_ddim_order(predict):
    m, S = gaussian(low=0.05)
    process = scaled(1024, predict)
    A, b = ode_solution(m, S, process.alpha_sigma(process.T - 1), (1.0, 0.0))
    errors = []
    for steps in (128, 256, 512, 1024):
        A_, b_, cov = affine(ddim, process, steps, m, S, clip_x0=False)
        errors.append(error(A_, b_, A, b))
    assert errors[-1] < 0.005 and abs(slopes(errors)[-1] - 1) < 0.15, (errors, slopes(errors))
    assert np.abs(cov - S).max() < 0.02 and np.abs(b_ - m).max() < 0.02


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_dpm_solver_order(predict):
    """Exact up to the last node (index 0), where the data prediction is the answer: x0^ of the exact solution there."""
    m, S = gaussian(low=0.05)
    process = DDPM(predict=predict)
    a, s = process.alpha_sigma(0)
    A, b = ode_solution(m, S, process.alpha_sigma(process.T - 1), (a, s))
    K = a * S @ np.linalg.inv(a * a * S + s * s * np.eye(DIM))       # x0^ = m + K (x - a m)
    A, b = K @ A, m + K @ (b - a * m)
    errors = []
    for steps in (25, 50, 100, 200):
        A_, b_, cov = affine(dpm_solver_pp_2m, process, steps, m, S, clip_x0=False)
        errors.append(error(A_, b_, A, b))
    assert errors[-1] < 3e-4 and abs(slopes(errors)[-1] - 2) < 0.2, (errors, slopes(errors))
    assert np.abs(cov - S).max() < 5e-3 and np.abs(b_ - m).max() < 0.01


def test_few_steps_of_the_second_order_solvers_beat_the_first_order_ones():
    m, S = gaussian(low=0.05)
    process = DDPM()
    spread = {f.__name__: np.abs(affine(f, Flow(), 20, m, S)[2] - S).max() for f in (euler, heun)}
    spread |= {f.__name__: np.abs(affine(f, process, 20, m, S, clip_x0=False)[2] - S).max() for f in (ddim, dpm_solver_pp_2m)}
    assert spread["heun"] < spread["euler"] / 2 and spread["dpm_solver_pp_2m"] < spread["ddim"] / 2, spread


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("sampler, process", [(ddim, DDPM()), (ancestral, DDPM()), (dpm_solver_pp_2m, DDPM()), (euler, Flow())])
def test_a_point_mass_is_hit_in_any_number_of_steps(sampler, process, steps):
    """S = 0: x0^ is the same everywhere, so that these samplers end on it however few their steps."""
    m = gaussian()[0]
    options = dict(clip_x0=False) if process.name == "ddpm" else {}
    _, b, cov = affine(sampler, process, steps, m, np.zeros((DIM, DIM)), steps - 1 if sampler is ancestral else 0, **options)
    assert np.abs(b - m).max() < 1e-9 and np.abs(cov).max() < 1e-9


@pytest.mark.parametrize("sampler", [ddim, ancestral, dpm_solver_pp_2m])
def test_clipping_acts_on_the_predicted_data(sampler):
    """Data at 3 and -2, beyond the range of pixels, ends at 1 and -1 with clipping (the default), where it is without."""
    m = np.array([3.0, -2.0, 0.5, -0.25])
    draws = 4 if sampler is ancestral else 0
    for options, want in (({}, m.clip(-1, 1)), (dict(clip_x0=False), m)):
        _, b, cov = affine(sampler, DDPM(), 5, m, np.zeros((DIM, DIM)), draws, **options)
        assert np.abs(b - want).max() < 1e-9 and np.abs(cov).max() < 1e-9


# ---------------------------------------------------------------------------------------------- samplers with noise
@pytest.mark.parametrize("variance", ["beta", "beta-tilde"])
def test_ancestral_on_gaussian_data(variance):
    m, S = gaussian()
    errors = []
    for T in (100, 200, 400):
        A, b, cov = affine(ancestral, scaled(T), T, m, S, draws=T - 1, variance=variance, clip_x0=False)
        errors.append(max(np.abs(cov - S).max(), np.abs(b - m).max()))
    assert errors[-1] < (0.005 if variance == "beta" else 0.03) and all(0.7 < s < 1.3 for s in slopes(errors)), (errors, slopes(errors))


def test_ancestral_respaced_is_the_chain_of_the_respaced_schedule():
    """Nichol & Dhariwal 2021: `steps` of T indices = a DDPM with those abar. Against Algorithm 2 written out with alpha, beta of that schedule."""
    process, steps = DDPM(T=60, beta=(1e-3, 0.1)), 15
    ts = [59 - 4 * k for k in range(steps)]
    betas = torch.linspace(1e-3, 0.1, 60, dtype=torch.float64)
    abar = [float(torch.prod(1 - betas[:i + 1])) for i in ts] + [1.0]
    g = torch.Generator().manual_seed(1)
    x = torch.randn(5, *SHAPE, generator=g, dtype=torch.float64)
    zs = [torch.randn(5, *SHAPE, generator=g, dtype=torch.float64) for _ in range(steps)]

    def f(x, t):
        return torch.sin(2 * x + 0.1 * t)
    for variance in ("beta", "beta-tilde"):
        it = iter(zs)
        got = ancestral(f, x, process, steps, lambda _: next(it), variance=variance, clip_x0=False)
        y = x
        for k, i in enumerate(ts):
            alpha = abar[k] / abar[k + 1]
            beta = 1 - alpha
            y = (y - beta / math.sqrt(1 - abar[k]) * f(y, i)) / math.sqrt(alpha)                     # Algorithm 2, line 4
            var = beta if variance == "beta" else beta * (1 - abar[k + 1]) / (1 - abar[k])
            y = y + math.sqrt(var) * zs[k] if k < steps - 1 else y
        torch.testing.assert_close(got, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clip", [False, True])
def test_ddim_with_eta_1_is_ancestral_with_the_posterior_variance(clip):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(3, *SHAPE, generator=g)
    zs = torch.randn(40, 3, *SHAPE, generator=g, dtype=torch.float64)
    runs = []
    for sampler, options in ((ancestral, dict(variance="beta-tilde")), (ddim, dict(eta=1.0))):
        it = iter(zs)
        runs.append(sampler(lambda x, t: torch.cos(x) * (1 + t / 1000), x, DDPM(), 40, lambda _: next(it), clip_x0=clip, **options))
    torch.testing.assert_close(*runs, rtol=1e-8, atol=1e-8)
    assert not clip or runs[0].abs().max() <= 1


def test_ddim_with_eta_1_on_gaussian_data():
    m, S = gaussian()
    errors = []
    for T in (100, 200, 400):
        A, b, cov = affine(ddim, scaled(T), T, m, S, draws=T - 1, eta=1.0, clip_x0=False)
        errors.append(max(np.abs(cov - S).max(), np.abs(b - m).max()))
    assert errors[-1] < 0.03 and all(0.7 < s < 1.3 for s in slopes(errors)), (errors, slopes(errors))


def test_euler_maruyama_on_gaussian_data():
    m, S = gaussian()
    errors = []
    for steps in (100, 200, 400):
        A, b, cov = affine(euler_maruyama, Flow(), steps, m, S, draws=steps - 1, last=1 / steps)
        errors.append(max(np.abs(cov - S).max(), np.abs(b - m).max()))
    assert errors[-1] < 0.01 and all(0.7 < s < 1.3 for s in slopes(errors)), (errors, slopes(errors))


def test_euler_maruyama_with_a_fixed_last_step_converges_to_a_wrong_variance():
    """The published last = 0.04: from the exact marginal V there, one step of the full drift without noise ends at x0^ - t eps^,
    however many steps came before."""
    m, S, t = np.zeros(DIM), 0.01, 0.04
    V = (1 - t) ** 2 * S + t * t
    limit = (((1 - t) * S - t * t) / V) ** 2 * V / S
    assert abs(limit - 0.59) < 0.005
    off = [affine(euler_maruyama, Flow(), steps, m, S * np.eye(DIM), draws=steps - 1)[2][0, 0] / S - limit for steps in (250, 500, 1000)]
    assert abs(off[-1]) < 0.01 and abs(slopes(np.abs(off))[-1] - 1) < 0.2, (limit, off, slopes(np.abs(off)))


# ---------------------------------------------------------------------------------------------- processes and the loss
def test_abar_table_against_a_plain_loop():
    abar, out = 1.0, []
    for i in range(1000):
        abar *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        out.append(abar)
    process = DDPM()
    np.testing.assert_allclose(process.abar.numpy(), out, rtol=1e-12)
    for i in (0, 1, 500, 998, 999):
        np.testing.assert_allclose(process.alpha_sigma(i), (math.sqrt(out[i]), math.sqrt(1 - out[i])), rtol=1e-9)
        u = torch.tensor([(i + 0.5) / 1000])
        one = torch.ones(1, 1, 1, 1)
        np.testing.assert_allclose(process.diffuse(one, u, 0 * one).item(), math.sqrt(out[i]), rtol=1e-6)
        np.testing.assert_allclose(process.diffuse(0 * one, u, one).item(), math.sqrt(1 - out[i]), rtol=1e-6)
    assert process.alpha_sigma(-1) == (1.0, 0.0)
    a, _ = process.alpha_sigma(10.25)                                 # log-linear in between
    np.testing.assert_allclose(2 * math.log(a), 0.75 * math.log(out[10]) + 0.25 * math.log(out[11]), rtol=1e-12)


def test_model_time():
    u = torch.tensor([0.0, 0.0004, 0.001, 0.5, 0.9995, 1.0])
    assert DDPM().model_time(u).tolist() == [0, 0, 1, 500, 999, 999]
    assert torch.equal(Flow().model_time(u), u)


def test_trailing_indices():
    assert trailing(1000, 4) == [999, 749, 499, 249, -1]
    assert trailing(10, 10) == [*range(9, -1, -1), -1]
    for T in (7, 100, 1000):
        for steps in range(1, T + 1, 3 if T < 1000 else 37):
            ts = trailing(T, steps)
            assert len(ts) == steps + 1 and ts[0] == T - 1 and all(a > b for a, b in zip(ts, ts[1:])) and ts[-2] >= 0


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_x0_eps_inverts_the_target(predict):
    process, g = DDPM(predict=predict), torch.Generator().manual_seed(0)
    x, eps = (torch.randn(6, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    for i in (0, 300, 999):
        u = torch.full((6,), (i + 0.5) / 1000)
        x_, eps_ = process.x0_eps(process.target(x, u, eps), process.diffuse(x, u, eps), i)
        torch.testing.assert_close(eps_, eps, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x_, x, rtol=1e-3, atol=1e-3)       # float32 tables, divided by sqrt(abar) = 0.006


@pytest.mark.parametrize("process", [Flow(), DDPM(), DDPM(predict="v")], ids=["flow", "eps", "v"])
def test_diffusion_loss_against_a_plain_loop(process):
    g = torch.Generator().manual_seed(3)
    n, C, H, W = 5, 2, 3, 3
    x, eps = torch.randn(n, C, H, W, generator=g), torch.randn(n, C, H, W, generator=g)
    u, y = torch.tensor([0.0, 0.1234, 0.5, 0.7705, 0.9999]), torch.arange(n)
    seen = {}

    def model(xt, t, y):
        seen.update(t=t, y=y)
        return torch.tanh(xt) * (1 + y.view(-1, 1, 1, 1)) + t.view(-1, 1, 1, 1) / process.T
    loss = diffusion_loss(process, model, x, u, eps, y)
    betas = np.linspace(1e-4, 0.02, 1000)
    for j in range(n):
        uj = float(u[j])
        if process.name == "flow":
            t, a, s = uj, 1 - uj, uj
        else:
            t = math.floor(uj * 1000)
            abar = np.prod(1 - betas[:t + 1])
            a, s = math.sqrt(abar), math.sqrt(1 - abar)
        total = 0.0
        for c in range(C):
            for h in range(H):
                for w in range(W):
                    x0, e = float(x[j, c, h, w]), float(eps[j, c, h, w])
                    want = e - x0 if process.name == "flow" else e if process.predict == "eps" else a * e - s * x0
                    total += (math.tanh(a * x0 + s * e) * (1 + j) + t / process.T - want) ** 2
        mean = total / (C * H * W)
        assert abs(loss[j].item() - mean) < 1e-5 * max(1, mean), j
        assert abs(seen["t"][j].item() - t) < 1e-6
    assert loss.shape == (n,) and loss.dtype == torch.float32 and torch.equal(seen["y"], y)


def test_diffusion_loss_is_float32_for_half_precision_outputs_and_passes_tokens_on():
    x, eps, u, y = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2), torch.tensor([0.2, 0.6]), torch.zeros(2, dtype=torch.long)

    def model(x, t, y, tokens_after):
        return torch.full_like(x, 300.0).half(), tokens_after
    loss, tokens = diffusion_loss(Flow(), model, x, u, eps, y, tokens_after=3)
    assert loss.dtype == torch.float32 and loss.tolist() == [90_000.0, 90_000.0] and tokens == 3       # 300^2 overflows float16


def test_unknown_processes_are_refused():
    assert make_process("flow", "v").predict == "v" and make_process("ddpm", "v").predict == "v"
    for name, predict in (("flwo", "eps"), ("ddpm", "x0")):
        with pytest.raises(ValueError, match="unknown process"):
            make_process(name, predict)


# ---------------------------------------------------------------------------------------------- guidance and generation
class Echo(torch.nn.Module):
    """A network whose output depends on everything, differently on each channel; counts what it is asked."""
    num_classes, channels, size = 4, 4, 2

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, t, y):
        self.calls.append((len(x), t.clone(), y.clone()))
        c = torch.arange(1.0, 5.0).view(1, 4, 1, 1)
        return (x * c + (y.float().view(-1, 1, 1, 1) + 1) ** c + t.view(-1, 1, 1, 1)).float()


@pytest.mark.parametrize("process", [Flow(), DDPM()], ids=["flow", "ddpm"])
def test_guidance_on_all_channels_and_within_the_interval(process):
    y, x = torch.tensor([0, 3, 2]), torch.randn(3, 4, 2, 2, dtype=torch.float64)
    net = Echo()
    for cfg in (0.0, 1.5, 4.0):
        f = guided(net, process, y, cfg, interval=(0.2, 0.7))
        for u, acts in ((0.1, False), (0.2, True), (0.5, True), (0.7, True), (0.9, False)):
            t = u * process.T
            net.calls.clear()
            got = f(x, t)
            assert [len(c[2]) for c in net.calls] == [6 if acts else 3]
            assert all(torch.allclose(c[1], torch.tensor(t).float()) for c in net.calls)
            time = torch.full((3,), t)
            cond, null = net(x.float(), time, y), net(x.float(), time, torch.full((3,), 4))
            want = null + cfg * (cond - null) if acts else cond
            assert got.dtype == torch.float64
            torch.testing.assert_close(got, want.double(), rtol=1e-5, atol=1e-4)


def test_no_guidance_needs_no_null_pass():
    net = Echo()
    guided(net, Flow(), torch.tensor([1, 2]), 1.0)(torch.zeros(2, 4, 2, 2), 0.5)
    assert [c[0] for c in net.calls] == [2] and net.calls[0][2].tolist() == [1, 2]


def randomised(settings, seed=0, std=0.05):
    torch.manual_seed(seed)
    model = build(settings)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(std * torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize("process, sampler", [(p, s) for p in SAMPLERS for s in SAMPLERS[p]])
def test_a_sample_does_not_depend_on_its_neighbours(process, sampler):
    model = randomised(dict(model="SiT-T/4", process=process, size=8, channels=1, num_classes=3))
    y = torch.tensor([0, 1, 2, 0, 0])

    def draw(ids):
        return generate(model, make_process(process), y[ids], [torch.Generator().manual_seed(100 + i) for i in ids], sampler, 4, cfg=2.0)
    whole = draw([0, 1, 2, 3, 4])
    assert whole.shape == (5, 1, 8, 8) and whole.dtype == torch.float32 and whole.isfinite().all()
    torch.testing.assert_close(torch.cat([draw([0, 1]), draw([2]), draw([3, 4])]), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(draw([4, 2, 0])[[2, 1, 0]], whole[[0, 2, 4]], rtol=1e-4, atol=1e-5)
    assert (whole[3] - whole[4]).abs().max() > 0.01 and (whole[0] - whole[3]).abs().max() > 0.01       # same class, other noise


def test_every_draw_of_noise_is_fresh_and_belongs_to_its_sample(monkeypatch):
    draws = []

    def probe(f, x, process, steps, noise):
        draws.extend([x, noise(x), noise(x)])
        return x
    monkeypatch.setitem(SAMPLERS["flow"], "probe", probe)
    generate(Echo(), Flow(), torch.zeros(2, dtype=torch.long), [torch.Generator().manual_seed(s) for s in (7, 8)], "probe", 1)
    for row, seed in enumerate((7, 8)):
        g = torch.Generator().manual_seed(seed)
        for d in draws:
            assert torch.equal(d[row], torch.randn(4, 2, 2, generator=g))


def test_to_uint8_inverts_the_scaling_for_every_level():
    levels = torch.arange(256, dtype=torch.uint8)
    x = (levels.float() / 127.5 - 1).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(x).flatten(), levels)
    rgb = torch.tensor([-5.0, 0.0, 5.0]).view(1, 3, 1, 1).expand(1, 3, 2, 4)
    assert to_uint8(rgb).shape == (1, 2, 4, 3) and to_uint8(rgb)[0, 1, 2].tolist() == [0, 128, 255]


# ---------------------------------------------------------------------------------------------- guidance in time, and other betas
@pytest.mark.parametrize("u, w", [(0, 3.8), (0.1, 3.06), (0.25, 1.64), (0.5, 1.03), (0.76, 1.00)])
def test_power_guidance_has_the_figures_of_its_formula(u, w):
    assert guidance_at(u, 3.8, 4) == pytest.approx(w, abs=0.006)
    assert guidance_at(u, 3.8) == 3.8 and guidance_at(1, 3.8, 4) == 1


def test_power_guidance_acts_in_the_sampler_at_its_own_time():
    class Net(torch.nn.Module):
        num_classes = 3

        def forward(self, x, t, y):
            return (y.float() + 1).view(-1, 1, 1, 1).expand_as(x)                 # null 4, class 1: 2
    x, y = torch.zeros(2, 1, 2, 2, dtype=torch.float64), torch.tensor([1, 1])
    for process, t, u in ((DDPM(), 250.0, 0.25), (Flow(), 0.25, 0.25)):
        w = 1 + 2.8 * (1 - math.cos(math.pi * (1 - u) ** 4)) / 2
        out = guided(Net(), process, y, 3.8, power=4)(x, t)
        np.testing.assert_allclose(out, 4 + w * (2 - 4))


def test_scaled_linear_betas_are_those_of_stable_diffusion():
    """A plain loop; the last abar is the published 0.00466. Linear betas stay what they were."""
    process, abar = make_process("ddpm", "v", [0.00085, 0.012]), 1.0
    for i in range(1000):
        abar *= 1 - (0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2
        assert process.abar[i].item() == pytest.approx(abar, rel=1e-9)
    assert abar == pytest.approx(0.00466, abs=5e-6) and process.predict == "v"
    assert make_process("ddpm").abar[-1].item() == pytest.approx(4.04e-5, rel=0.01)
    for bad in ([0.012], [0.0, 0.1], [0.5, 0.1], [0.1, 1.0]):
        with pytest.raises(ValueError):
            make_process("ddpm", "eps", bad)
    with pytest.raises(ValueError, match="only a ddpm"):
        make_process("flow", "v", [0.00085, 0.012])


def test_guidance_of_some_channels_and_dits_time_grid():
    """DiT's forward_with_cfg: eps of the first three channels is guided, the rest is the conditional prediction. ADM's space_timesteps for one section."""
    class Net:
        num_classes, channels, size = 3, 4, 2

        def __call__(self, x, t, y):
            return x * 0 + y.view(-1, 1, 1, 1).float()
    process = make_process("ddpm", "eps")
    y, x = torch.tensor([0, 2]), torch.zeros(2, 4, 2, 2)
    got = diffusion.guided(Net(), process, y, cfg=1.5, channels=3)(x, 500)
    assert got[:, :3, 0, 0].tolist() == [[3 + 1.5 * (0 - 3)] * 3, [3 + 1.5 * (2 - 3)] * 3] and got[:, 3, 0, 0].tolist() == [0, 2]

    def space_timesteps(T, count):                                    # ADM's loop, step by step
        stride, current, steps = (T - 1) / (count - 1), 0.0, []
        for _ in range(count):
            steps.append(round(current))
            current += stride
        return steps
    for T, steps in ((1000, 250), (1000, 50), (1000, 7), (100, 100), (1000, 2)):
        assert diffusion.linspace(T, steps) == [*space_timesteps(T, steps)[::-1], -1]
    f = diffusion.guided(Net(), process, y)
    seen = []
    diffusion.ddim(lambda x, t: seen.append(t) or f(x, t), x, process, 5, grid=diffusion.linspace)
    assert seen == [999, 749, 500, 250, 0] or seen == [999, 749, 499, 250, 0], seen
