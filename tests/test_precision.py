"""--amp auto: what each kind of hardware gets, that it is printed and recorded, and that a run goes on where the hardware is another."""
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import attach
import common
import reweight
import sample
import train
from common import precision

ROOT = Path(train.__file__).parent
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BASE = "--model SiT-T/2 --process flow --steps 4 --batch-size 8 --lr 1e-3 --schedule constant --warmup 0 --log-every 2 --checkpoint-every 2 --device cpu".split()


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(train, "preview", lambda *a, **k: None)
    monkeypatch.setattr(train, "loss_plot", lambda rows, path, constant: path.write_bytes(b""))


def hardware(monkeypatch, capability="AVX512", onednn=True, fp16=False, gpu=(8, 0), hip=None, gain=2.0, **has):
    """A machine that answers torch's questions so, and is so fast; has: those of torch.cpu, None where the version does not know the question."""
    monkeypatch.setattr(precision, "product_gain", lambda amp: gain)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: fp16, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu)
    monkeypatch.setattr(torch.version, "hip", hip)
    for name in ("avx512_bf16", "amx_tile"):
        if has.get(name, False) is None:
            monkeypatch.delattr(torch.cpu, f"_is_{name}_supported", raising=False)
        else:
            monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: has.get(name, False), raising=False)


@pytest.mark.parametrize("device, machine, becomes", [
    (CPU, dict(avx512_bf16=True), "bf16"), (CPU, dict(amx_tile=True), "bf16"), (CPU, dict(), "none"), (CPU, dict(capability="AVX2", avx512_bf16=True), "none"),
    (CPU, dict(onednn=False, avx512_bf16=True), "none"), (CPU, dict(capability="DEFAULT"), "none"), (CPU, dict(avx512_bf16=None, amx_tile=None), "none"),
    (CPU, dict(avx512_bf16=None, amx_tile=True), "bf16"), (CPU, dict(fp16=True), "none"), (CPU, dict(avx512_bf16=True, gain=0.5), "none"), (CPU, dict(avx512_bf16=True, gain=1.1), "none"),
    (CPU, dict(amx_tile=True, gain=8), "bf16"), (GPU, dict(gain=0.1), "bf16"), (GPU, dict(), "bf16"), (GPU, dict(gpu=(9, 0)), "bf16"), (GPU, dict(gpu=(12, 0)), "bf16"),
    (GPU, dict(gpu=(7, 5)), "fp16"), (GPU, dict(gpu=(7, 0)), "fp16"), (GPU, dict(gpu=(6, 1)), "fp16"), (GPU, dict(gpu=(7, 0), hip="6.2"), "bf16")])
def test_what_auto_becomes(device, machine, becomes, monkeypatch, capsys):
    hardware(monkeypatch, **machine)
    args = Namespace(amp="auto")
    assert precision.settle_amp(args, device) == ["amp"] and args.amp == becomes
    said = capsys.readouterr().out
    assert said.startswith(f"amp auto becomes {becomes}: ") and len(said.splitlines()) == 1
    assert precision.computes(device, becomes)


SLOW = "on this CPU a product in {} takes {} times as long as in float32"


@pytest.mark.parametrize("device, machine, amp, warns", [
    (CPU, dict(capability="AVX2", gain=1 / 40), "bf16", SLOW.format("bf16", "40.0")), (CPU, dict(capability="AVX2", gain=1 / 40), "fp16", SLOW.format("fp16", "40.0")),
    (CPU, dict(avx512_bf16=True, gain=0.5), "bf16", SLOW.format("bf16", "2.0")), (CPU, dict(capability="AVX2"), "none", ""), (CPU, dict(avx512_bf16=True), "bf16", ""),
    (CPU, dict(fp16=True), "fp16", ""), (GPU, dict(gpu=(7, 0)), "bf16", "this GPU has no instructions for bf16"), (GPU, dict(gpu=(7, 0)), "fp16", ""), (GPU, dict(gpu=(9, 0)), "bf16", "")])
def test_a_wish_is_followed_and_a_slow_one_is_warned_of(device, machine, amp, warns, monkeypatch, capsys):
    hardware(monkeypatch, **machine)
    args = Namespace(amp=amp)
    assert precision.settle_amp(args, device) == [] and args.amp == amp
    assert capsys.readouterr().out == (warns and f"warning: --amp {amp}: {warns}; use --amp auto\n")


def test_the_gain_is_that_of_the_times(monkeypatch):
    """A clock on which each product takes as long as its format is said to, and some turns are disturbed."""
    clock, slow = [0.0], iter([3, 1, 1, 5, 1, 1, 9, 1, 1, 1])

    class Product:
        def __init__(self, dtype):
            self.dtype = dtype

        def __matmul__(self, other):
            clock[0] += {torch.float32: 0.010, torch.bfloat16: 0.004}[self.dtype] * next(slow)

        def to(self, dtype):
            return Product(dtype)
    with monkeypatch.context() as m:
        m.setattr(torch, "randn", lambda *a, **k: Product(torch.float32))
        m.setattr(precision.time, "perf_counter", lambda: clock[0])
        precision.product_gain.cache_clear()
        assert precision.product_gain("bf16") == pytest.approx(2.5) and precision.product_gain("bf16") == pytest.approx(2.5)       # asked once
    precision.product_gain.cache_clear()


def test_the_gain_is_taken_on_one_thread(monkeypatch):
    """And all of them are there afterwards, also where the product fails."""
    threads = torch.get_num_threads()
    seen = []
    try:
        torch.set_num_threads(2)
        monkeypatch.setattr(precision, "ratio_of_times", lambda dtype: seen.append(torch.get_num_threads()) or 3.0)
        precision.product_gain.cache_clear()
        assert precision.product_gain("bf16") == 3.0 and seen == [1] and torch.get_num_threads() == 2
        monkeypatch.setattr(precision, "ratio_of_times", lambda dtype: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            precision.product_gain("fp16")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
        precision.product_gain.cache_clear()


def test_an_inherited_precision_is_kept_where_the_hardware_has_it(monkeypatch, capsys):
    for machine, amp, becomes in ((dict(avx512_bf16=True), "bf16", "bf16"), (dict(capability="AVX2"), "bf16", "none"), (dict(avx512_bf16=True), "none", "none"), (dict(avx512_bf16=True), "fp16", "bf16"), (dict(avx512_bf16=True, gain=0.5), "bf16", "none")):
        hardware(monkeypatch, **machine)
        args = Namespace(amp=amp)
        assert precision.settle_amp(args, CPU, inherited=True) == ["amp"] and args.amp == becomes
        assert ("the checkpoint's amp" in capsys.readouterr().out) == (amp != becomes)


def test_the_environment_takes_instructions_away():
    """The real questions, in a process that may not use what its CPU has: true on every x86."""
    code = "import torch; from common.precision import fastest; print(fastest(torch.device('cpu')))"
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "none", done


def test_auto_agrees_with_what_the_processor_says_of_itself():
    """/proc/cpuinfo is an oracle that does not ask torch; how fast the instructions are it does not say."""
    info = Path("/proc/cpuinfo")
    if not info.exists() or "flags" not in info.read_text() or {"ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"} & set(os.environ):
        pytest.skip("not an x86 of Linux, or its instructions are limited")
    flags = set(next(line for line in info.read_text().splitlines() if line.startswith("flags")).split())
    assert precision.computes(CPU, "bf16") == bool(flags & {"avx512_bf16", "amx_bf16"})


# ---------------------------------------------------------------------------------------------- runs
def fit(data, out, *more, steps=4):
    train.main(["--data", str(data), "--out", str(out), *BASE, "--steps", str(steps), *more])
    return json.loads((out / "train.args.json").read_text())["args"]["amp"], common.load_pt(out / "last.pt")


def test_presets_ask_for_auto_and_digits_for_float32():
    assert {name: preset["amp"] for name, preset in train.PRESETS.items()} == {name: "none" if name == "digits" else "auto" for name in train.PRESETS}


@pytest.mark.parametrize("was, now", [("bf16", "none"), ("fp16", "bf16"), ("none", "fp16"), ("none", "none")])
def test_a_run_goes_on_where_the_hardware_is_another(was, now, tiny_data, tmp_path, monkeypatch, capsys):
    """Also one of an earlier version, whose record names bf16 or none: to resume it under auto is the same."""
    monkeypatch.setattr(precision, "fastest", lambda device: now)
    assert fit(tiny_data, tmp_path / "a", "--amp", was)[0] == was
    capsys.readouterr()
    recorded, state = fit(tiny_data, tmp_path / "a", "--amp", "auto", steps=8)
    said = capsys.readouterr().out
    assert recorded == now and state["args"]["amp"] == now and state["step"] == 8 and state["skipped"] <= 4
    assert (f"was begun with --amp = {was}, now {now}" in said) == (was != now) and f"amp auto becomes {now}" in said
    # fp16 finds its own scale, and the others have none: that of the earlier hardware does not live on.
    assert (state["scaler"]["scale"] > 1) == (now == "fp16")
    if now == "fp16":
        assert state["scaler"]["growth_interval"] == 2000
    fit(tiny_data, tmp_path / "a", "--amp", "auto", steps=8)
    said = capsys.readouterr().out
    assert "nothing to do" in said and "was begun" not in said


def test_a_named_precision_still_binds(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(precision, "fastest", lambda device: "bf16")
    fit(tiny_data, tmp_path / "a", "--amp", "auto")
    with pytest.raises(SystemExit):
        fit(tiny_data, tmp_path / "a", "--amp", "none", steps=8)
    assert "was made with --amp = bf16, now none" in capsys.readouterr().err
    # Naming what auto became is no change.
    assert fit(tiny_data, tmp_path / "a", "--amp", "bf16", steps=6)[1]["step"] == 6


def test_the_other_stages_record_what_auto_became(tiny_data, tmp_path, monkeypatch, capsys):
    hardware(monkeypatch, capability="AVX2")
    fit(tiny_data, tmp_path / "full", "--amp", "bf16")
    last = str(tmp_path / "full" / "last.pt")
    capsys.readouterr()
    reweight.main(["--data", str(tiny_data), "--reference", last, "--steps", "4", "--burn-in", "1", "--permutations", "19", "--device", "cpu", "--out", str(tmp_path / "w")])
    assert "the checkpoint's amp bf16 becomes none" in capsys.readouterr().out
    sample.main(["--checkpoint", last, "--num", "4", "--steps", "1", "--amp", "auto", "--device", "cpu", "--out", str(tmp_path / "s")])
    attach.main(["--data", str(tiny_data), "--reference", last, "--per-class", "2", "--text", "none", "--visual", "none", "--judge", "none", "--amp", "auto", "--device", "cpu", "--out", str(tmp_path / "d")])
    assert capsys.readouterr().out.count("amp auto becomes none") == 2
    for place, script in (("w", "reweight"), ("s", "sample"), ("d", "attach")):
        assert json.loads((tmp_path / place / f"{script}.args.json").read_text())["args"]["amp"] == "none"
