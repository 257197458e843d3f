"""train.py: what a step sees, what it does, and that an interrupted run equals a straight one. Tiny networks, through main()."""
import argparse
import copy
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from models.build import build, from_checkpoint
from models.diffusion import sample_latents, to_pixels
from models.sit import SiT
import train
from conftest import as_flags, crash_at, make_data, published_loss, stats

ROOT = Path(train.__file__).parent
BASE = dict(model="SiT-T/2", process="flow", steps=6, batch_size=8, lr=1e-3, schedule="constant", warmup=2, log_every=2, checkpoint_every=2, device="cpu")
REAL_PREVIEW, REAL_PLOT, REAL_LOSS = train.preview, train.loss_plot, train.diffusion_loss


class Crash(Exception):
    pass


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Pictures cost more than these runs; the tests that want them ask for the real ones."""
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")                         # for the processes that a test compares with this one: two threads may round otherwise
    monkeypatch.setattr(train, "preview", lambda *a, **k: None)
    monkeypatch.setattr(train, "loss_plot", lambda rows, path, constant: path.write_bytes(b""))


def argv(data, out, *extra, **flags):
    return as_flags({**BASE, "data": data, "out": out, **flags}) + [str(e) for e in extra]


def run(data, out, *extra, **flags):
    train.main(argv(data, out, *extra, **flags))
    return common.load_pt(Path(out) / "last.pt")


def refused(capsys, data, out, *extra, fresh=True, **flags):
    """The one line of an exit with code 2; fresh: nothing was written."""
    with pytest.raises(SystemExit) as e:
        run(data, out, *extra, **flags)
    text = capsys.readouterr().err.strip()
    text = text.splitlines()[-1] if not fresh and text else text       # a progress bar may stand before it
    assert e.value.code == 2 and text.startswith("train.py: error:") and "\n" not in text, text
    assert not fresh or not Path(out).exists()
    return text


def equal(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, (list, tuple)) else a == b


def same_state(a, b):
    return [k for k in ("model", "ema", "projector", "optimizer", "scaler", "step", "images_seen", "skipped") if not equal(a[k], b[k])] == []


def interrupted(step, *a, **kw):
    with crash_at(step):
        run(*a, **kw)


@pytest.fixture
def seen(monkeypatch):
    """Everything that enters the loss, one entry (x, u, eps, y) per call."""
    calls = []

    def spy(process, model, x, u, eps, y, **kw):
        calls.append(tuple(v.clone() for v in (x, u, eps, y)))
        return REAL_LOSS(process, model, x, u, eps, y, **kw)
    monkeypatch.setattr(train, "diffusion_loss", spy)
    return calls


# ---------------------------------------------------------------------------------------------- resume
@pytest.mark.parametrize("flags", [dict(), dict(model="unet-tiny", dropout=0.1, process="ddpm", flips=True), dict(schedule="cosine", accumulate=2)],
                         ids=["sit", "unet-dropout", "cosine"])
def test_resume_is_bit_equal_to_a_straight_run(flags, tiny_data, tmp_path, monkeypatch, seen):
    flags = {"steps": 9, "log_every": 4, "checkpoint_every": 3, **flags}
    straight = run(tiny_data, tmp_path / "a", **flags)
    inputs, seen[:] = list(seen), []
    interrupted(5, tiny_data, tmp_path / "b", **flags)       # between two checkpoints and two log lines
    n = len(seen)
    assert common.load_pt(tmp_path / "b/last.pt")["step"] == 3
    with open(tmp_path / "b/stats.jsonl", "a") as f:
        f.write('{"step": 5, "diff')                                      # the kill fell into the middle of a line
    if "dropout" in flags:
        torch.rand(7)                                                     # another process has another global stream
    resumed = run(tiny_data, tmp_path / "b", **flags)
    assert same_state(straight, resumed)
    per = len(inputs) // 9
    assert equal(seen[:n] + seen[n + 2 * per:], inputs) and equal(seen[n:n + 2 * per], inputs[3 * per:5 * per])       # data order included
    assert stats(tmp_path / "a") == stats(tmp_path / "b") and [r["step"] for r in stats(tmp_path / "b")] == [3, 4, 6, 8, 9]


def test_more_steps_continue_a_finished_run_unless_the_schedule_forbids(tiny_data, tmp_path, capsys):
    straight = run(tiny_data, tmp_path / "a", steps=8)
    run(tiny_data, tmp_path / "b", steps=4)
    capsys.readouterr()
    longer = run(tiny_data, tmp_path / "b", steps=8, sample_every=3)       # free flags may differ as well
    assert same_state(straight, longer) and stats(tmp_path / "a") == stats(tmp_path / "b") and "nothing to do" not in capsys.readouterr().out
    before = {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}
    run(tiny_data, tmp_path / "b", steps=8)
    assert "nothing to do" in capsys.readouterr().out
    assert "has 8 steps already, --steps 5 is fewer" in refused(capsys, tiny_data, tmp_path / "b", fresh=False, steps=5)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}
    run(tiny_data, tmp_path / "c", schedule="cosine", steps=2)
    assert "--steps = 2, now 3" in refused(capsys, tiny_data, tmp_path / "c", schedule="cosine", steps=3, fresh=False)
    for flag, value in (("lr", 2e-3), ("seed", 1), ("batch_size", 16), ("label_drop", 0.2), ("model", "SiT-T/4"), ("ema", 0.5)):
        text = refused(capsys, tiny_data, tmp_path / "b", fresh=False, **{"steps": 8, flag: value})
        assert f"--{flag.replace('_', '-')} = " in text and str(value) in text
    held = os.open(tmp_path / "b", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    start = time.time()
    assert "another process" in refused(capsys, tiny_data, tmp_path / "b", steps=9, fresh=False) and time.time() - start < 5
    os.close(held)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}


def test_overwrite_starts_again(tiny_data, tmp_path):
    run(tiny_data, tmp_path / "a", steps=4, seed=1)
    for name in ("samples.npy", "sample_labels.npy", "sample.args.json", "metrics.json", "trajectory.json", "nearest.png", "grid.png"):
        (tmp_path / "a" / name).write_text("of the first run's weights")
    fresh = run(tiny_data, tmp_path / "b", steps=2)
    again = run(tiny_data, tmp_path / "a", steps=2, overwrite=True)
    assert same_state(fresh, again) and stats(tmp_path / "a") == stats(tmp_path / "b")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {p.name for p in (tmp_path / "b").iterdir()}       # neither step_0000004.pt of the first run nor what was drawn from it


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", *(pytest.param(s, marks=pytest.mark.slow) for s in ("SIGHUP", "SIGUSR1", "SIGUSR2"))])
def test_a_signal_saves_and_exits_143(name, tiny_data, tmp_path):
    """SLURM warns by USR1, a closed terminal by HUP, a person by Ctrl-C (130)."""
    out = tmp_path / "a"
    p = subprocess.Popen([sys.executable, ROOT / "train.py", *argv(tiny_data, out, steps=100_000, checkpoint_every=0, log_every=1)],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         preexec_fn=lambda: [signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGHUP)])
    end = time.time() + 60
    while time.time() < end and not ((out / "stats.jsonl").exists() and len((out / "stats.jsonl").read_text().splitlines()) >= 3):
        time.sleep(0.02)
    done = len((out / "stats.jsonl").read_text().splitlines())
    start = time.time()
    p.send_signal(getattr(signal, name))
    text, err = p.communicate(timeout=60)
    assert p.returncode == (130 if name == "SIGINT" else 143) and f"stopped by {name}" in text and "Traceback" not in err and time.time() - start < 20
    step = common.load_pt(out / "last.pt")["step"]
    assert step >= done and stats(out)[-1]["step"] == step and not [f for f in out.iterdir() if f.name.startswith(".")]
    if name != "SIGTERM":
        return
    resumed = run(tiny_data, out, steps=step + 2, checkpoint_every=0, log_every=1)
    assert same_state(run(tiny_data, tmp_path / "b", steps=step + 2, checkpoint_every=0, log_every=1), resumed)
    assert stats(out) == stats(tmp_path / "b")


# ---------------------------------------------------------------------------------------------- what step n sees
def test_order_is_epochs_of_permutations_and_a_function_of_seed_and_step():
    for m, batch in ((50, 8), (5, 8), (3, 8), (8, 8), (1, 4), (7, 20)):
        order = train.Order(m, batch, seed=3)
        rows = torch.cat([order(n) for n in range(40)])
        for e in range(len(rows) // m):
            assert sorted(rows[e * m:(e + 1) * m].tolist()) == list(range(m))
        fresh = train.Order(m, batch, seed=3)
        assert all(torch.equal(fresh(n), rows[n * batch:(n + 1) * batch]) for n in (39, 0, 17, 3))       # in any order of asking
        assert m < 5 or not torch.equal(rows[:m], rows[m:2 * m]) and not torch.equal(train.Order(m, batch, seed=4)(0), rows[:batch])


def test_resampling_draws_classes_with_their_probabilities():
    labels = np.repeat([0, 1, 2, 3], [10, 30, 5, 15])
    labels = labels[np.random.default_rng(0).permutation(60)]
    p = torch.tensor([0.1, 0.2, 0.7, 0.0], dtype=torch.float64)
    order = train.Order(60, 64, 0, labels, p)
    rows = torch.cat([order(n) for n in range(300)])
    assert torch.equal(train.Order(60, 64, 0, labels, p)(123), rows[123 * 64:124 * 64])
    per_row, n = np.bincount(rows, minlength=60), len(rows)
    expected = p.numpy()[labels] / np.bincount(labels)[labels] * n         # uniform within a class
    chi2 = ((per_row - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert per_row[labels == 3].sum() == 0 and chi2 < 44 + 4 * np.sqrt(88)


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    net = torch.nn.Linear(10, 10)
    alone = common.device_budget(torch.device("cpu"), net)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert common.device_budget(torch.device("cpu"), net) == alone / 4 > 0


def test_a_gpu_s_budget_leaves_room_for_what_training_will_make(monkeypatch):
    """110 weights, of which 10 are frozen: 400 bytes of gradients and twice, for adan four times, as much of moments are still to come."""
    net = torch.nn.Linear(10, 10)
    net.bias.requires_grad_(False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (11_200, 16_000))
    assert common.device_budget(torch.device("cuda", 0), net) == pytest.approx(0.6 * (11_200 - 1200))
    assert common.device_budget(torch.device("cuda", 0), net, moments=4) == pytest.approx(0.6 * (11_200 - 2000))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 16_000))
    assert common.device_budget(torch.device("cuda", 0), net) == 0


def test_a_resume_holds_one_checkpoint_at_a_time(tiny_data, tmp_path, monkeypatch):
    """That of a large network is 10 GB, in every process."""
    run(tiny_data, tmp_path / "a", steps=2)
    (tmp_path / "a" / "loss.png").unlink()                            # as a call that was killed at its end
    calls, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, *a, **kw: calls.append(Path(path).name) or load(path, *a, **kw))
    train.main(argv(tiny_data, tmp_path / "a", steps=2))
    assert calls == ["last.pt"] and (tmp_path / "a" / "loss.png").exists()


def test_rows_from_disk_equal_resident_rows(tiny_data):
    images, keep = np.load(tiny_data / "images.npy", mmap_mode="r"), np.array([3, 4, 9, 20, 49])
    a, b = (common.DeviceRows(images, keep, torch.device("cpu"), budget) for budget in (1 << 30, 0))
    assert a.resident and not b.resident
    asked = [torch.randint(5, (8,)) for _ in range(12)]
    for k, rows in enumerate(asked[:-1]):
        ahead = asked[k + 1] if k % 3 else asked[0]                        # every third guess is wrong
        x = b.get(rows, ahead)
        assert torch.equal(a.get(rows, ahead), x) and np.array_equal(x.numpy(), images[keep[rows.numpy()]])


def test_noise_time_dropout_and_flips_are_fresh_per_step_and_per_sample(tiny_data, tmp_path, seen):
    run(tiny_data, tmp_path / "a", steps=40, batch_size=16, label_drop=0.4, flips=True, log_every=40, checkpoint_every=0)
    x, u, eps, y = (torch.cat(v) for v in zip(*seen))
    assert len(torch.unique(eps.flatten(1), dim=0)) == 640 == len(torch.unique(u))         # never the same start noise twice
    assert abs(eps.mean()) < 0.02 and abs(eps.std() - 1) < 0.02 and 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.05
    null = (y == 3).view(40, 16).double()                                  # K = 3, not 10, not 1000
    assert y.max() == 3 and abs(null.mean() - 0.4) < 0.06 and 0.06 < null.mean(1).std() < 0.2     # binomial(16): 0.12; per batch it would be 0.49
    left, right = (x[:, 0, :, 0] == 1).all(1), (x[:, 0, :, -1] == 1).all(1)
    flips = right.view(40, 16).double()
    assert (left ^ right).all() and abs(flips.mean() - 0.5) < 0.06 and flips.mean(1).std() < 0.2
    assert abs(np.corrcoef(flips.flatten(), null.flatten())[0, 1]) < 0.12 and abs(np.corrcoef(u, null.flatten())[0, 1]) < 0.12


def test_a_subset_smaller_than_the_batch_trains_every_step_and_image_alike(tiny_data, tmp_path, seen):
    labels, images = np.load(tiny_data / "labels.npy"), np.load(tiny_data / "images.npy")
    keep = np.sort([np.flatnonzero(labels == c)[2] for c in range(3)])
    np.save(tmp_path / "keep.npy", keep)
    state = run(tiny_data, tmp_path / "a", indices=tmp_path / "keep.npy", label_drop=0)
    assert state["step"] == 6 == len(seen) and state["images_seen"] == 48
    x, _, _, y = (torch.cat(v) for v in zip(*seen))
    wanted = to_pixels(torch.from_numpy(images[keep]))
    which = (x[:, None] == wanted[None]).flatten(2).all(2)                 # (48, 3)
    assert which.sum(0).tolist() == [16, 16, 16] and (torch.from_numpy(labels[keep])[which.int().argmax(1)] == y).all()
    record = json.loads((tmp_path / "a/train.args.json").read_text())
    assert record["epochs"] == 16 and record["images_kept"] == 3 and stats(tmp_path / "a")[-1]["epoch"] == 16
    assert wanted.min() == -1 + 2 * images[keep].min() / 255 and wanted.max() == 1


# ---------------------------------------------------------------------------------------------- what a step does
def by_hand(data, seen, flags, steps, weights=None):
    """The run again in plain code from what entered the loss: weights, losses, clipping, AdamW, learning rate, EMA."""
    labels = np.load(data / "labels.npy")
    torch.manual_seed(flags.get("seed", 0))
    model = build(dict(model=flags["model"], process="flow", size=8, channels=1, num_classes=3, class_std=1.0)).train()
    ema, opt = [p.detach().clone() for p in model.parameters()], torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1.0, weight_decay=0.0)
    order, losses, norms = train.Order(50, 8, flags.get("seed", 0)), [], []
    for n in range(steps):
        x, u, eps, y = seen[n]
        t = u.view(-1, 1, 1, 1)
        loss = ((model((1 - t) * x + t * eps, u, y) - (eps - x)) ** 2).mean((1, 2, 3))
        w = 1 if weights is None else torch.tensor(weights, dtype=torch.float32)[labels[order(n)]]          # the class, dropped or not
        opt.zero_grad()
        (w * loss).mean().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.sqrt(sum((g.double() ** 2).sum() for g in grads))
        for g in grads:
            g *= min(1.0, flags["grad_clip"] / (norm.item() + 1e-6))
        opt.param_groups[0]["lr"] = flags["lr"] * min(1, (n + 1) / flags["warmup"])
        opt.step()
        d = min(flags["ema"], (1 + n) / (10 + n))
        ema = [d * e + (1 - d) * p.detach() for e, p in zip(ema, model.parameters())]
        losses.append(loss.detach()), norms.append(norm.item())
    return model, ema, losses, norms


def close(state, model, ema, tol):
    names = [n for n, _ in model.named_parameters()]
    return max((state["model"][n] - p).abs().max().item() for n, p in model.named_parameters()) < tol and \
        max((state["ema"][n] - e).abs().max().item() for n, e in zip(names, ema)) < tol


@pytest.mark.parametrize("weights", [None, [0.2, 3.0, 1.0]], ids=["plain", "weighted"])
def test_the_loop_equals_plain_code(weights, tiny_data, tmp_path, seen):
    flags = dict(model="unet-tiny", lr=1e-3, warmup=3, ema=0.2 if weights else 0.9, grad_clip=0.05, label_drop=0.5, steps=5, log_every=5, checkpoint_every=0)
    if weights:
        np.save(tmp_path / "w.npy", np.array(weights, np.float32))
        flags["weights"] = tmp_path / "w.npy"
    state = run(tiny_data, tmp_path / "a", **flags)
    model, ema, losses, norms = by_hand(tiny_data, seen, flags, 5, weights)
    assert close(state, model, ema, 2e-5)                                  # a step moves a weight by up to 1e-3
    row, u, loss = stats(tmp_path / "a")[-1], torch.cat([s[1] for s in seen]), torch.cat(losses)
    assert row["diffusion"] == pytest.approx(loss.mean().item(), rel=1e-4)                     # the unweighted loss
    for k in range(10):                                                    # ten bins of t against a plain loop
        inside = [v.item() for t, v in zip(u, loss) if k / 10 <= t < (k + 1) / 10]
        assert row["loss_t"][k] == pytest.approx(sum(inside) / len(inside) if inside else 0, rel=1e-3)


def test_lr_at():
    flags = dict(lr=2.0, warmup=4, steps=10, schedule="constant")
    assert [common.lr_at(n, **flags) for n in range(6)] == [0.5, 1, 1.5, 2, 2, 2]
    flags.update(schedule="cosine", warmup=0)
    assert common.lr_at(0, **flags) == 2 and common.lr_at(5, **flags) == pytest.approx(1) and common.lr_at(10, **flags) == pytest.approx(0, abs=1e-12)
    flags["warmup"] = 10
    assert common.lr_at(4, **flags) == pytest.approx(0.5 * (1 + np.cos(0.4 * np.pi)))


def test_accumulation_changes_rounding_only(tiny_data, tmp_path, seen):
    flags = dict(model="unet-tiny", label_drop=0.5, flips=True, steps=3, grad_clip=0)
    one = run(tiny_data, tmp_path / "a", **flags)
    two = run(tiny_data, tmp_path / "b", accumulate=2, **flags)
    assert equal([torch.cat(pair) for pair in zip(*(seen[3 + k] for k in (0, 1)))], list(seen[0]))        # the same batch, cut in two
    assert [r["diffusion"] for r in stats(tmp_path / "a")] == pytest.approx([r["diffusion"] for r in stats(tmp_path / "b")], rel=1e-6)
    assert [r["grad_norm"] for r in stats(tmp_path / "a")] == pytest.approx([r["grad_norm"] for r in stats(tmp_path / "b")], rel=1e-5)
    moments = [[s["exp_avg"] for s in state["optimizer"]["state"].values()] for state in (one, two)]
    assert max((p - q).abs().max().item() for p, q in zip(*moments)) < 1e-6 < max(p.abs().max().item() for p in moments[0]) / 100
    # Adam divides rounding by rounding where a gradient is 0, and then moves a weight by up to lr a step, one way or the other; all others agree.
    apart = torch.cat([(one["model"][k] - two["model"][k]).abs().flatten() for k in one["model"]])
    lr = one["args"]["lr"]
    assert apart.max() <= 2 * 3 * lr and (apart > 1e-5).double().mean() < 1e-3, (apart.max(), (apart > 1e-5).double().mean(), lr)


# ---------------------------------------------------------------------------------------------- losses that are not finite
def break_loss(monkeypatch, bad, how):
    step = [0]

    def broken(process, model, *a, **kw):
        loss = REAL_LOSS(process, model, *a, **kw)
        step[0] += 1
        return (loss + torch.where(torch.arange(len(loss)) == 3, np.inf, 0.0) if how == "inf" else loss * np.nan) if step[0] - 1 in bad else loss
    monkeypatch.setattr(train, "diffusion_loss", broken)


@pytest.mark.parametrize("how", ["inf", "nan"])                            # "inf" has finite gradients: the loss itself must be looked at
def test_a_non_finite_step_is_skipped_and_counted(how, tiny_data, tmp_path, monkeypatch):
    params, real = [], train.ema_update

    def spy(ema, p, decay, step):
        params.append([t.detach().clone() for t in p])
        real(ema, p, decay, step)
    monkeypatch.setattr(train, "ema_update", spy)
    break_loss(monkeypatch, {2, 3}, how)
    state = run(tiny_data, tmp_path / "a", steps=6, checkpoint_every=0)
    assert equal(params[2], params[1]) and equal(params[3], params[1]) and not equal(params[4], params[3]) and not equal(params[1], params[0])
    assert [r["skipped"] for r in stats(tmp_path / "a")] == [0, 2, 2] and state["skipped"] == 2
    assert np.isfinite([r["diffusion"] for r in stats(tmp_path / "a")]).all()
    steps = [s["step"].item() for s in state["optimizer"]["state"].values()]
    assert set(steps) == {4}                                               # Adam's own count did not move either
    break_loss(monkeypatch, {5}, how)                                      # the last step: its weights are those of the step before, and are saved
    assert run(tiny_data, tmp_path / "b", steps=6, checkpoint_every=0)["skipped"] == 1


def test_twenty_bad_steps_in_a_row_stop_the_run_with_the_good_checkpoint_intact(tiny_data, tmp_path, monkeypatch, capsys):
    break_loss(monkeypatch, set(range(4, 1000)), "nan")
    text = refused(capsys, tiny_data, tmp_path / "a", steps=100, checkpoint_every=4, log_every=50, fresh=False)
    assert "20 steps in a row" in text and "step 24" in text
    state = common.load_pt(tmp_path / "a/last.pt")
    assert state["step"] == 4 and all(v.isfinite().all() for v in state["model"].values()) and from_checkpoint(state)
    assert [p.name for p in (tmp_path / "a").glob("step_*")] == ["step_0000004.pt"]
    monkeypatch.setattr(train, "diffusion_loss", REAL_LOSS)                # mended: the run goes on from there
    assert same_state(run(tiny_data, tmp_path / "a", steps=6), run(tiny_data, tmp_path / "b", steps=6))


# ---------------------------------------------------------------------------------------------- precision, processes
def test_bf16_and_fp16_run_on_a_cpu_beside_fp32(tiny_data, tmp_path):
    loss = {}
    for amp in ("none", "bf16", "fp16"):
        state = run(tiny_data, tmp_path / amp, amp=amp, model="unet-tiny")
        loss[amp] = [r["diffusion"] for r in stats(tmp_path / amp)]
        assert state["skipped"] <= 1 and all(v.dtype == torch.float32 for v in state["model"].values())
        assert all(v.isfinite().all() for v in state["ema"].values())
    assert loss["bf16"] != loss["none"] and loss["bf16"] == pytest.approx(loss["none"], rel=0.03)
    assert loss["fp16"] == pytest.approx(loss["none"], rel=0.03)
    assert state["scaler"]["scale"] > 1


def test_uneven_batches_are_refused(tiny_data, tmp_path, capsys, monkeypatch):
    assert "multiple of processes" in refused(capsys, tiny_data, tmp_path / "a", accumulate=3)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(common.UserError, match="3 x 1"):
        train.load_inputs(train.parse_args(argv(tiny_data, tmp_path / "a")))


def test_two_processes_equal_one(tiny_data, tmp_path):
    flags = dict(model="unet-tiny", lr=1e-4, steps=4, label_drop=0.5, accumulate=2, log_every=1, flips=True, checkpoint_every=2)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    p = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port), ROOT / "train.py",
                        *argv(tiny_data, tmp_path / "b", **flags)], capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert p.returncode == 0, p.stderr[-3000:]
    two, one = common.load_pt(tmp_path / "b/last.pt"), run(tiny_data, tmp_path / "a", **flags)
    a, b = stats(tmp_path / "a"), stats(tmp_path / "b")
    assert len(a) == len(b) == 4 and two["step"] == 4 and two["images_seen"] == 32         # the global batch is counted once
    for r, q in zip(a, b):
        assert q["diffusion"] == pytest.approx(r["diffusion"], rel=1e-5) and q["loss_t"] == pytest.approx(r["loss_t"], rel=1e-4)
        assert q["step"] == r["step"]
        assert q["grad_norm"] == pytest.approx(r["grad_norm"], rel=1e-4)
    assert max((one["model"][k] - two["model"][k]).abs().max().item() for k in one["model"]) < 1e-5
    assert not [k for k in two["model"] if k.startswith("module.")] and {p.name for p in (tmp_path / "a").iterdir()} <= {p.name for p in (tmp_path / "b").iterdir()}


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both_after_the_same_step(tiny_data, tmp_path):
    out = tmp_path / "a"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    p = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port), ROOT / "train.py",
                          *argv(tiny_data, out, steps=100_000, checkpoint_every=0, log_every=1000)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in p.stdout:
        if "to go" in line or "effective epochs" in line:
            break
    time.sleep(5)
    workers = [int(c) for c in Path(f"/proc/{p.pid}/task/{p.pid}/children").read_text().split() if "RANK=1" in Path(f"/proc/{c}/environ").read_text().split("\0")]
    assert len(workers) == 1
    os.kill(workers[0], signal.SIGTERM)
    text, _ = p.communicate(timeout=60)
    assert p.returncode != 0 and "stopped by SIGTERM" in text              # said by rank 0, which got no signal
    assert common.load_pt(out / "last.pt")["step"] == stats(out)[-1]["step"] > 0


@pytest.mark.slow
def test_compile_changes_rounding_only(tiny_data, tmp_path):
    import shutil
    if not (shutil.which("gcc") or shutil.which("cc")):
        pytest.skip("no compiler")
    plain, compiled = run(tiny_data, tmp_path / "a", steps=3), run(tiny_data, tmp_path / "b", steps=3, compile=True)
    assert plain["model"].keys() == compiled["model"].keys()               # no _orig_mod.
    assert [r["diffusion"] for r in stats(tmp_path / "b")] == pytest.approx([r["diffusion"] for r in stats(tmp_path / "a")], rel=1e-4)


# ---------------------------------------------------------------------------------------------- checkpoints and pictures
def test_checkpoints_are_plain_and_carry_their_settings(tiny_data, tmp_path):
    run(tiny_data, tmp_path / "a", steps=4)
    for name in ("last.pt", "step_0000002.pt", "step_0000004.pt"):
        state = torch.load(tmp_path / "a" / name, weights_only=True)       # no Namespace, no pickled code
        assert type(state) is dict and type(state["args"]) is dict
        model, process = from_checkpoint(state)
        assert not model.training and process.name == "flow" and model.num_classes == 3 and equal(dict(model.state_dict()), dict(state["ema"]))
    assert "model" in torch.load(tmp_path / "a/last.pt", weights_only=True)
    assert set(torch.load(tmp_path / "a/step_0000002.pt", weights_only=True)) == {"ema", "step", "images_seen", "seconds", "args"}
    again = run(tiny_data, tmp_path / "b", init=tmp_path / "a/last.pt", steps=0)
    first = torch.load(tmp_path / "a/last.pt", weights_only=True)
    assert again["step"] == 0 and equal(again["ema"], first["ema"]) and not equal(first["ema"], first["model"])


def test_flags_that_would_do_nothing_are_refused(tiny_data, tmp_path, capsys):
    assert "--dropout does nothing in SiT-T/2" in refused(capsys, tiny_data, tmp_path / "a", dropout=0.1)
    assert "--weights" in refused(capsys, tiny_data, tmp_path / "a", reweight_mode="resample")


def test_predict_v_trains_on_the_velocity_of_ddpm(tiny_data, tmp_path, monkeypatch):
    """sqrt(abar) eps - sqrt(1 - abar) x (Salimans & Ho 2022); the first network answers zero, so the first loss is the target's square."""
    calls = []

    def spy(process, model, x, u, eps, y, **kw):
        calls.append((x, u, eps, REAL_LOSS(process, model, x, u, eps, y, **kw)))
        return calls[-1][-1]
    monkeypatch.setattr(train, "diffusion_loss", spy)
    state = run(tiny_data, tmp_path / "a", process="ddpm", predict="v", steps=1)
    x, u, eps, loss = calls[0]
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[(u * 1000).long().numpy()]
    a, s = (torch.from_numpy(np.sqrt(v)).float().view(-1, 1, 1, 1) for v in (abar, 1 - abar))
    torch.testing.assert_close(loss, (a * eps - s * x).square().mean((1, 2, 3)))
    assert state["args"]["predict"] == "v" and from_checkpoint(state)[1].predict == "v"


def test_class_std_is_the_spread_of_the_first_class_embedding(tiny_data, tmp_path):
    wide, narrow = (run(tiny_data, tmp_path / str(std), class_std=std, steps=0)["model"] for std in (1.0, 0.02))
    key = "y_embedder.embedding_table.weight"
    torch.testing.assert_close(wide[key], 50 * narrow[key])
    assert abs(wide[key].std() - 1) < 0.1 and all(torch.equal(wide[k], narrow[k]) for k in wide if k != key)


@pytest.mark.parametrize("model, home", [("SiT-T/2", "sit"), ("unet-tiny", "unet")])
def test_recompute_is_the_same_training_with_every_block_run_twice(model, home, tiny_data, tmp_path, monkeypatch):
    import models.sit
    import models.unet
    place, calls = getattr(models, home), []
    real = place.checkpoint
    monkeypatch.setattr(place, "checkpoint", lambda *a, **kw: (calls.append(1), real(*a, **kw))[1])
    plain = run(tiny_data, tmp_path / "a", model=model, steps=2, accumulate=2)
    assert not calls
    saving = run(tiny_data, tmp_path / "b", model=model, steps=2, accumulate=2, recompute=True)
    assert len(calls) >= 4 * 4 and same_state(plain, saving) and saving["args"]["recompute"]


def test_pictures_come_from_the_ema_in_eval_mode(tiny_data, tmp_path, monkeypatch):
    used, real = [], train.generate

    def spy(model, process, y, generators, *a, **kw):
        used.append((model.training, copy.deepcopy(model.state_dict()), y.tolist(), [g.initial_seed() for g in generators]))
        return real(model, process, y, generators, *a[:-1], 2, **kw)
    monkeypatch.setattr(train, "generate", spy)
    monkeypatch.setattr(train, "preview", REAL_PREVIEW), monkeypatch.setattr(train, "loss_plot", REAL_PLOT)
    state = run(tiny_data, tmp_path / "a", model="unet-tiny", dropout=0.5, steps=4, sample_every=2)
    assert [u[0] for u in used] == [False, False] and equal(dict(used[1][1]), dict(state["ema"]))
    assert not equal(dict(used[1][1]), dict(state["model"]))
    # fixed noise, another for every picture
    assert used[0][2:] == used[1][2:] and used[0][2] == sorted(used[0][2]) and len(set(used[0][3])) == 24
    assert {"samples_0000002.png", "samples_0000004.png", "loss.png"} <= {p.name for p in (tmp_path / "a").iterdir() if p.stat().st_size > 500}


# ---------------------------------------------------------------------------------------------- class weights, attachments, latents
def test_wrong_weights_are_refused(tiny_data, tmp_path, capsys):
    for w, word in (([1, 1], "(3)"), ([1, -1, 1], "negative"), ([1, np.nan, 1], "finite"), ([1, np.inf, 1], "finite"), ([0, 0, 0], "zero"), ([[1, 1, 1]], "shape")):
        np.save(tmp_path / "w.npy", np.array(w, np.float32))
        assert word in refused(capsys, tiny_data, tmp_path / "a", weights=tmp_path / "w.npy"), w
    np.save(tmp_path / "w.npy", np.array([1, 2, 3]))
    assert "int64" in refused(capsys, tiny_data, tmp_path / "a", weights=tmp_path / "w.npy")
    np.save(tmp_path / "keep.npy", np.arange(60))
    assert "keep.npy" in refused(capsys, tiny_data, tmp_path / "a", indices=tmp_path / "keep.npy")


def test_resample_mode_follows_the_weights(tiny_data, tmp_path, seen):
    np.save(tmp_path / "w.npy", np.array([0, 1, 4], np.float32))
    run(tiny_data, tmp_path / "a", weights=tmp_path / "w.npy", reweight_mode="resample", steps=40, batch_size=16, label_drop=0, checkpoint_every=0, log_every=40)
    share = np.bincount(torch.cat([s[3] for s in seen]), minlength=4) / 640
    expected = np.array([0, 17 * 1, 13 * 4]) / (17 + 52)                   # class ~ weight x count
    assert share[0] == share[3] == 0 and np.abs(share[:3] - expected).max() < 0.07


def make_attach(folder, data, keep, both=False, text=True, width=6):
    rng = np.random.default_rng(1)
    folder.mkdir()
    np.save(folder / "keep.npy", keep)
    if text:
        np.save(folder / "text.npy", rng.normal(size=(3, 1, 8)).astype(np.float16))
        np.save(folder / "text_mask.npy", np.ones((3, 1), bool))
    v = rng.normal(size=(len(keep), 2, 4, width) if both else (len(keep), 4, width)).astype(np.float16)
    v[..., 0, 0] = np.arange(len(keep)).reshape((-1, 1) if both else -1)   # says whose it is,
    if both:
        v[:, :, 1, 0] = [0, 1]                                             # and which way round
    np.save(folder / "visual.npy", v)
    (folder / "attach.args.json").write_text(json.dumps({"inputs": {"data": json.loads((data / "dataset.json").read_text())["sha256"]}}))
    return folder


@pytest.mark.parametrize("both", [False, True], ids=["one", "both"])
def test_visual_tokens_belong_to_their_image_and_its_orientation(both, tiny_data, tmp_path, monkeypatch, capsys):
    keep = np.arange(0, 50, 2)
    attach = make_attach(tmp_path / "attach", tiny_data, keep, both)
    pairs, real = [], train.Objective.forward

    def spy(self, x, u, eps, y, v, *more):
        pairs.append((x.clone(), v.clone()))
        return real(self, x, u, eps, y, v, *more)
    monkeypatch.setattr(train.Objective, "forward", spy)
    if not both:
        assert "one orientation only" in refused(capsys, tiny_data, tmp_path / "r", attach=attach, flips=True)
    # a preset's flips give way
    state = run(tiny_data, tmp_path / "a", *(["--flips"] if both else ["--preset", "cifar10", "--amp", "none"]), attach=attach, steps=4, accumulate=2)
    x, v = (torch.cat(p) for p in zip(*pairs))
    pixels = to_pixels(torch.from_numpy(np.load(tiny_data / "images.npy")[keep]))
    mirrored = (x[:, 0, :, -1] == 1).all(1)
    assert mirrored.any() == both and not mirrored.all()
    assert torch.equal(torch.where(mirrored.view(-1, 1, 1, 1), x.flip(-1), x), pixels[v[:, 0, 0].long()])
    assert not both or torch.equal(v[:, 1, 0].long(), mirrored.long())
    assert state["projector"] and not [k for k in state["ema"] if "projector" in k] and "align" in stats(tmp_path / "a")[-1]
    model, _ = from_checkpoint(state)
    assert not [n for n, _ in model.named_modules() if "projector" in n] and torch.equal(model.y_embedder.text[:3, 0].half(), torch.from_numpy(np.load(attach / "text.npy"))[:, 0])


def test_alignment_trains_resumes_and_lambda_0_is_no_alignment(tiny_data, tmp_path, monkeypatch):
    keep = np.arange(25)
    attach = make_attach(tmp_path / "attach", tiny_data, keep)
    plain = make_attach(tmp_path / "plain", tiny_data, keep)
    (plain / "visual.npy").unlink()
    off, without = run(tiny_data, tmp_path / "a", attach=attach, align=0), run(tiny_data, tmp_path / "b", attach=plain, align=0)
    assert same_state(off, without) and stats(tmp_path / "a") == stats(tmp_path / "b") and off["projector"] is None
    on = run(tiny_data, tmp_path / "c", attach=attach, steps=6)
    assert not equal(on["model"], off["model"]) and "align" not in stats(tmp_path / "a")[-1]
    interrupted(5, tiny_data, tmp_path / "d", attach=attach, steps=6)
    assert same_state(on, run(tiny_data, tmp_path / "d", attach=attach, steps=6))
    long = run(tiny_data, tmp_path / "e", attach=attach, steps=40, lr=3e-3, log_every=10, checkpoint_every=0)
    assert stats(tmp_path / "e")[-1]["align"] < stats(tmp_path / "e")[0]["align"] - 0.05 and long["skipped"] == 0


def test_wrong_attachments_are_refused(tiny_data, tmp_path, capsys):
    keep = np.arange(25)

    def attempt(word, change, **flags):
        folder = make_attach(tmp_path / f"attach{len(list(tmp_path.iterdir()))}", tiny_data, keep)
        change(folder)
        text = refused(capsys, tiny_data, tmp_path / "a", attach=folder, **flags)
        assert word in text, text
    attempt("another data set", lambda f: (f / "attach.args.json").write_text(json.dumps({"inputs": {"data": "other"}})))
    attempt("visual.npy", lambda f: np.save(f / "visual.npy", np.zeros((24, 4, 6), np.float16)))
    attempt("visual.npy", lambda f: np.save(f / "visual.npy", np.zeros((25, 3, 4, 6), np.float16)))
    attempt("square", lambda f: np.save(f / "visual.npy", np.zeros((25, 5, 6), np.float16)))
    attempt("text.npy", lambda f: np.save(f / "text.npy", np.zeros((4, 1, 8), np.float16)))
    attempt("text.npy", lambda f: np.save(f / "text.npy", np.full((3, 1, 8), np.nan, np.float16)))
    attempt("text_mask.npy", lambda f: np.save(f / "text_mask.npy", np.ones((3, 2), bool)))
    attempt("keep.npy", lambda f: np.save(f / "keep.npy", np.arange(60)))
    attempt("attach.args.json", lambda f: (f / "attach.args.json").unlink())
    attempt("nothing is attached", lambda f: [(f / n).unlink() for n in ("text.npy", "visual.npy")])
    np.save(tmp_path / "other.npy", np.arange(24))
    attempt("other indices", lambda f: None, indices=tmp_path / "other.npy")


def test_latents_are_fresh_draws_at_the_right_scale(tmp_path, seen, capsys):
    rng = np.random.default_rng(0)
    data = make_data(tmp_path / "data")
    mean, std = 5 * rng.normal(size=(50, 4, 8, 8)), 0.5 + rng.random((50, 4, 8, 8))
    z = np.concatenate([mean, std], 1).astype(np.float16)
    np.save(data / "latents.npy", z)
    (data / "images.npy").unlink()
    about = {"vae": "x", "scale": 0.18215, "mean": 0.18215 * mean.mean(), "std": 0.18215 * np.sqrt(mean.var() + (std**2).mean())}
    (data / "latents.json").write_text(json.dumps(about))
    noise = rng.normal(size=(50, 4, 8, 8)).astype(np.float32)
    got = sample_latents(torch.from_numpy(z), 0.18215, torch.from_numpy(noise)).numpy()
    assert np.abs(got - 0.18215 * (z[:, :4].astype(np.float32) + z[:, 4:].astype(np.float32) * noise)).max() < 1e-6
    assert "mirrored" in refused(capsys, data, tmp_path / "r", "--flips", preset="digits")
    flags = dict(preset="digits", steps=50, checkpoint_every=0, log_every=50)
    run(data, tmp_path / "a", **flags)
    x = torch.cat([s[0] for s in seen])                                    # 400 draws: each image 8 times
    labels_order = torch.cat([train.Order(50, 8, 0)(n) for n in range(50)])
    for j in (0, 17, 49):
        draws = x[labels_order == j] / 0.18215
        assert len(torch.unique(draws.flatten(1), dim=0)) == 8             # never the same draw twice
        assert abs((draws - torch.from_numpy(mean[j])).div(torch.from_numpy(std[j])).std() - 1) < 0.06
    assert abs(x.std() - 0.18215 * np.sqrt(25 + (std**2).mean())) < 0.02
    state = common.load_pt(tmp_path / "a/last.pt")
    assert state["args"]["latents"] and state["args"]["latent_scale"] == 0.18215 and state["args"]["channels"] == 4 and state["args"]["size"] == 8
    assert state["args"]["vae"] == "x"

    capsys.readouterr()

    def other(latents=z, **changed):
        np.save(data / "latents.npy", latents)
        (data / "latents.json").write_text(json.dumps({**about, **changed}))
        return refused(capsys, data, tmp_path / "r", **flags)
    assert "another scale" in other((z * np.float16(0.18215)).astype(np.float16))              # stored scaled: the loss would look 10 times better
    assert "another scale" in other(scale=1.0) and "another scale" in other(z + np.float16(2))
    assert "lacks" in other(std=None) and "lacks" in other(mean=[0.0])
    broken = z.copy()
    broken[31, 2, 3, 4] = np.nan
    assert "row 31" in other(broken)
    broken[31, 2, 3, 4], broken[7, 5, 0, 0] = 0, -1
    assert "row 7 has a negative standard deviation" in other(broken)


@pytest.mark.parametrize("kind", ["dit", "sit"])
def test_official_start_weights_begin_with_the_official_loss(kind, tmp_path, monkeypatch, capsys):
    """The loss of step 0 is that of the published formula on the published weights: DiT's eps at a step of its own, SiT's x - eps in its own time."""
    data, rng = make_data(tmp_path / "data", sizes=(4, 3, 3)), np.random.default_rng(0)
    mean, std = rng.normal(size=(10, 4, 8, 8)), np.full((10, 4, 8, 8), 0.1)
    np.save(data / "latents.npy", np.concatenate([mean, std], 1).astype(np.float16))
    (data / "latents.json").write_text(json.dumps({"scale": 0.18215, "mean": 0.18215 * mean.mean(), "std": 0.18215 * np.sqrt(mean.var() + 0.01)}))
    torch.manual_seed(0)
    net = SiT(size=8, channels=4, num_classes=3, depth=2, width=384, heads=6, patch=2, learn_sigma=True).eval()
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    torch.save({"ema": {f"module.{k}": v for k, v in net.state_dict().items()}, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "official.pt")
    flags = dict(init=tmp_path / "official.pt", model="SiT-S/2", process=None, steps=1, warmup=0, label_drop=0.0, amp="none")
    calls = []

    def record(process, model, x, u, eps, y, **kw):
        calls.append((x, u, eps, y, REAL_LOSS(process, model, x, u, eps, y, **kw)))
        return calls[-1][-1]
    monkeypatch.setattr(train, "diffusion_loss", record)
    state = run(data, tmp_path / "a", official=kind, **flags)
    x, u, eps, y, loss = calls[0]
    torch.testing.assert_close(loss, published_loss(net, kind, x, u, eps, y), rtol=1e-4, atol=1e-5)
    args = state["args"]
    assert args["learn_sigma"] and args["depth"] == 2 and args["process"] == {"dit": "ddpm", "sit": "flow"}[kind]
    again, _ = from_checkpoint(state)                               # an ordinary checkpoint of ours from here on
    assert len(again.blocks) == 2 and (again.final_layer.linear.weight.abs() - net.final_layer.linear.weight.abs()).abs().max() < 2e-3
    capsys.readouterr()
    assert "--official dit or --official sit" in refused(capsys, data, tmp_path / "b", **flags)
    assert "give --init" in refused(capsys, data, tmp_path / "b", official=kind, **{**flags, "init": None})
    other = {**flags, "process": {"dit": "flow", "sit": "ddpm"}[kind]}
    assert "was trained with process" in refused(capsys, data, tmp_path / "b", official=kind, **other)
    (data / "latents.json").write_text(json.dumps({"scale": 0.5, "mean": 0.5 * mean.mean(), "std": 0.5 * np.sqrt(mean.var() + 0.01)}))
    assert "latent_scale = 0.18215" in refused(capsys, data, tmp_path / "b", official=kind, **flags)


def test_a_row_that_is_not_finite_is_named_when_it_is_read():
    z = np.zeros((10, 2, 2, 2), np.float16)
    z[7, 1, 0, 1] = np.nan
    keep, cpu = np.array([1, 3, 7, 8]), torch.device("cpu")
    for budget, rows in ((1e9, None), (0, torch.tensor([0, 2]))):     # resident, and gathered ahead of the step
        with pytest.raises(common.UserError, match="NaN or infinity in row 7"):
            images = common.DeviceRows(z, keep, cpu, budget)
            images.get(torch.tensor([0, 1]), rows)
            images.get(rows)
        assert common.DeviceRows(z, keep[[0, 1, 3]], cpu, budget).get(torch.tensor([2])).shape == (1, 2, 2, 2)


# ---------------------------------------------------------------------------------------------- command lines
@pytest.mark.parametrize("script", sorted(p.stem for p in ROOT.glob("*.py") if "def parse_args" in p.read_text()))
def test_every_flag_is_used_by_some_code(script, monkeypatch):
    import importlib
    flags = []

    def capture(self, *a, **k):
        flags.extend(x.dest for x in self._actions if x.dest not in ("help", "list"))
        raise Crash
    monkeypatch.setattr(common.Parser, "parse_args", capture)
    with pytest.raises(Crash):
        importlib.import_module(script).parse_args([])
    source = "".join(f.read_text() for f in (ROOT / f"{script}.py", ROOT / "common/stage.py",     # common.Stage reads --out and --overwrite,
                                               *[ROOT / f"common/{room}.py" for room in ("sources", "labels") if script == "data"]))
    body = re.sub(r"def parse_args.*?(?=\n\S)", "", source, flags=re.S)
    assert flags and "def parse_args" not in body
    assert [f for f in flags if not re.search(rf"\b(a|args|how)(\.|, \"){f}\b", body)] == []


def test_wrong_command_lines_are_one_line_each(tiny_data, tmp_path, capsys):
    for flags, word in ((dict(batch_size=0), "--batch-size"), (dict(lr=0), "--lr"), (dict(lr="nan"), "--lr"), (dict(ema=1.5), "--ema"), (dict(label_drop=-1), "--label-drop"),
                        (dict(model="SiT-Z"), "--model"), (dict(device="cuda:77"), "cuda:77"), (dict(steps=-1), "--steps"),
                        (dict(init=tmp_path / "no.pt"), "no.pt"), (dict(indices=tmp_path / "no.npy"), "no.npy")):
        assert word in refused(capsys, tiny_data, tmp_path / "a", **flags)


def test_other_classes_on_fine_tuning(tiny_data, tmp_path, capsys):
    """The class table starts anew; everything else, the null row too, is that of the checkpoint."""
    run(tiny_data, tmp_path / "a", steps=2)
    other = make_data(tmp_path / "five", sizes=(9, 8, 7, 6, 5))
    with pytest.raises(SystemExit):
        run(other, tmp_path / "b", steps=0, init=tmp_path / "a/last.pt")
    assert "embedding_table" in capsys.readouterr().err
    run(other, tmp_path / "b", steps=0, init=tmp_path / "a/last.pt", init_classes="new")
    a, b = (common.load_pt(tmp_path / f / "last.pt")["ema"] for f in "ab")
    table = "y_embedder.embedding_table.weight"
    assert b[table].shape == (6, 64) and torch.equal(a[table][-1], b[table][-1]) and b[table][:-1].std() > 0.5
    assert all(torch.equal(a[k], b[k]) for k in a if k != table)
    run(other, tmp_path / "c", steps=2, init=tmp_path / "a/last.pt", init_classes="new")     # and it trains
    with pytest.raises(SystemExit):
        run(other, tmp_path / "d", steps=1, init_classes="new")
    assert "give --init" in capsys.readouterr().err


def test_tensorboard_is_optional(tiny_data, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(SystemExit):
            run(tiny_data, tmp_path / "a", steps=2, tensorboard=True)
        assert "pip install tensorboard" in capsys.readouterr().err
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(train, "preview", REAL_PREVIEW)
    run(tiny_data, tmp_path / "b", steps=2, log_every=1, tensorboard=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / "b" / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("diffusion")] == pytest.approx([row["diffusion"] for row in stats(tmp_path / "b")])
    assert events.Images("samples")
