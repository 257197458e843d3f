"""run_all.sh as a user runs it, with tiny sizes, in a copy of the repository."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import common
from common import plan, run_all
from conftest import copy_kit
from models.sit import SiT

ROOT = Path(__file__).resolve().parent.parent
RUNS = ["full", "random", "pruned", "pruned-dro", "random-attach", "d2c-select", "d2c-select-attach"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """One copy for all tests that do not mind each other's runs, in a folder whose name has a space."""
    return copy_kit(tmp_path_factory.mktemp("kit") / "lean diffusion")


def run_all_sh(there, *args, **sizes):
    """(exit code, all output); python3 is the interpreter of these tests."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **sizes}
    env.pop("PYTHONPATH")
    p = subprocess.run(["bash", "run_all.sh", *args], cwd=there, env=env, capture_output=True, text=True, timeout=900)
    return p.returncode, p.stdout + p.stderr


def test_unknown_input_is_one_line(copy):
    assert subprocess.run(["bash", "-n", copy / "run_all.sh"]).returncode == 0                          # all of it parses
    code, out = run_all_sh(copy, "no_such_folder")
    assert code == 2 and "no_such_folder" in out and len(out.strip().splitlines()) == 1 and not (copy / "runs").exists()


def checked(what, source, **env):
    """The comparison of these choices, looked at as run_all.sh has it looked at before it makes anything."""
    env = {"SURROGATE": "ddae", "JUDGE": "scratch pixels" if what != "imagenet" else "inception", **env}
    choices = plan.choices_of(what, env)
    plan.check_choices(what, choices)
    comparison = plan.Comparison(what, source, choices)
    run_all.check_commands(comparison)
    return comparison


@pytest.mark.parametrize("sizes, args, says", [
    ({"SEEDS": "0 1 0"}, [], "names something twice"), ({"RUNS": "full randm"}, [], "randm is none of full"), ({"JUDGE_WEIGHTS": "no/such.pth"}, [], "no/such.pth"),
    ({"QUICK": "1", "SCORER": "run_all.sh", "REFERENCE": "run_all.sh"}, ["imagenet", "models"], "QUICK"), ({"SCORER": ""}, ["imagenet", "models"], "SCORER"),
    *(({name: value}, [], f"{flag}: {value}" if flag else f"{name}={value}: must be") for name, flag, values in (
        ("STEPS", "train.py: argument --steps", "abc -5 1.5 1e3 1e30"), ("NUM_SAMPLES", "sample.py: argument --num", "-5 0"),
        ("PER_CLASS", "prune.py: argument --per-class", "none"), ("NPROC", "", "0 two"), ("JOBS", "", "0 two -1 1.5"), ("KEEP", "prune.py: argument --keep", "7 0 0.0 -0.1 1.5 nan 10% 5e-0 50e-1"),
        ("SEEDS", "train.py: argument --seed", "a -1"), ("REPORT", "", "ful"), ("TRAJECTORY", "evaluate.py: argument --trajectory-num", "0 every"),
        ("PROCESS", "train.py: argument --process: invalid choice", "sde"), ("QUICK", "", "yes")) for value in values.split()),
    ({"STEPS": "0"}, [], "STEPS=0: must be"), ({"JOBS": "2", "NPROC": "2"}, [], "use one of both"), ({"SEEDS": "00"}, [], "SEEDS=00: must be"), ({"SIZE": "8x8"}, ["cifar10", "cifar10"], "data.py: argument --size: 8x8"),
    ({"SCORE": "gaussian gausian", "RUNS": "full random pruned"}, [], "gausian"),
    ({"SCORE": "moderate"}, [], "SCORE=moderate does nothing without a run that prunes by it"), ({"SCORE": "gaussian herding", "RUNS": "full pruned-dro"}, [], "or take SCORE=gaussian and add to RUNS the runs pruned-herding"), ({"RUNS": "full pruned pruned-gaussian"}, [], "pruned is pruned-gaussian"),
    ({"RUNS": "full pruned-random"}, [], "pruned-random is none of full"), ({"SCORE": "gaussian moderate", "RUNS": "full pruned-dro"}, [], "only the run pruned has a row of every score"), ({"RUNS": "full pruned-hurding"}, [], "pruned-hurding is none of full"), ({"SURROGATE": "incepton", "RUNS": "full pruned"}, [], "incepton"), ({"VISUAL": "dino"}, [], "dino"), ({"VISUAL": "inception"}, [], "inception"),
    ({"JUDGE": "fid"}, [], "fid"), ({"SIZE": "16"}, [], "SIZE=16 does nothing with digits"),
    ({"JUDGE": "ddae scratch"}, [], "ddae needs JUDGE_WEIGHTS"), ({"TRAIN": '--lr "1'}, [], "TRAIN: not a readable list of flags"),
    ({"JUDGE": "scratch ddae", "JUDGE_WEIGHTS": "run_all.sh"}, [], "name ddae first")])
def test_bad_choices_are_refused_before_anything_is_made(sizes, args, says):
    with pytest.raises(common.UserError) as e:
        checked(*(args or ["digits", "digits"]), **{**sizes, **{k: str(ROOT / v) for k, v in sizes.items() if v == "run_all.sh"}})
    assert says in str(e.value).replace("'", ""), e.value


def test_a_bad_choice_is_one_line_of_the_shell(copy):
    code, out = run_all_sh(copy, KEEP="7")
    assert code == 2 and out.startswith("run_all.sh: error: prune.py: argument --keep: 7 is out of range") and len(out.strip().splitlines()) == 1
    assert not (copy / "runs").exists() and not (copy / "data/digits").exists()


def test_an_output_folder_that_cannot_be_is_one_line(stub):
    there, env = stub
    p = subprocess.run(["bash", "run_all.sh"], cwd=there, env=env | {"OUT": "run_all.sh"}, capture_output=True, text=True, timeout=60)
    assert p.returncode == 2 and p.stderr.startswith("run_all.sh: error: run_all.sh: File exists") and len(p.stderr.splitlines()) == 1, p.stderr


@pytest.mark.parametrize("what, env", [("digits", {}), ("digits", {"REPORT": "full", "SEEDS": "0 1", "SCORE": "gaussian el2n random kcenter"}), ("cifar10", {}), ("cifar10", {"QUICK": "1"}),
                                       ("folder", {"NPROC": "4", "RUNS": "d2c-select"}), ("imagenet", {"SCORER": "run_all.sh", "REFERENCE": "run_all.sh"})])
def test_good_choices_pass_the_scripts_own_parsers(what, env):
    env = {**env, **{k: str(ROOT / v) for k, v in env.items() if v == "run_all.sh"}}
    comparison = checked(what, "/some/photos" if what == "folder" else what, **env)
    assert comparison.runs and all(Path(ROOT, c.script).is_file() for c in comparison.commands)


@pytest.mark.parametrize("what, side, there, outside", [("digits", "", True, False), ("cifar10", "", True, True), ("cifar10", "16", True, True), ("cifar10", "8", True, False),
                                                        ("cifar10", "", False, False), ("folder", "64", True, True), ("folder", "", True, False)])
def test_imagenet_s_networks_are_taken_where_their_packages_are_and_the_pictures_fit(what, side, there, outside, monkeypatch):
    find = plan.importlib.util.find_spec
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: there if name in plan.PACKAGES else find(name))
    c = plan.choices_of(what, {"SIZE": side, "RUNS": plan.ALL_RUNS})
    made = plan.Comparison(what, "/no/photos" if what == "folder" else what, c)
    want = plan.OUTSIDE if outside else plan.OWN
    assert {name: getattr(c, name) for name in want} == want
    prune = next(command for command in made.commands if "--score gaussian" in str(command))
    assert f"--surrogate {want['SURROGATE']}" in str(prune)
    # What somebody chose stays.
    c = plan.choices_of(what, {"SIZE": side, "JUDGE": "inception"})
    plan.Comparison(what, "/no/photos" if what == "folder" else what, c)
    assert c.JUDGE == "inception" and c.SURROGATE == want["SURROGATE"]


def test_the_side_of_a_folder_s_pictures_is_known_once_they_are_there(tmp_path):
    c = plan.choices_of("folder", {})
    assert plan.side_of("folder", c, tmp_path) == 0
    np.save(tmp_path / "images.npy", np.zeros((2, 12, 20, 3), np.uint8))
    assert plan.side_of("folder", c, tmp_path) == 20


def commands_of(what, **env):
    made = checked(what, "/no/photos" if what == "folder" else what, **env)
    return [str(command) for command in made.commands]


def test_guidances_judges_and_a_weak_scorer():
    got = commands_of("digits", JUDGES="2", SCORER_STEPS="80", SEEDS="0", RUNS=plan.ALL_RUNS)
    assert all(" --cfg 1 1.5 " in c for c in got if c.startswith("sample.py")) and "--judges 2" in next(c for c in got if c.startswith("evaluate.py"))
    assert any(c.startswith("train.py") and "--steps 80 " in c and c.endswith("--out runs/digits/scorer") for c in got)
    assert all("--reference runs/digits/scorer/last.pt" in c for c in got if c.startswith("attach.py"))
    assert all("--reference runs/digits/full/last.pt" in c for c in got if c.startswith("reweight.py"))     # its excess is over the full model's loss
    assert any("--weights runs/digits/scorer/last.pt" in c for c in got if c.startswith("prune.py"))
    assert " --cfg 1 1.25 1.5 2 " in next(c for c in commands_of("digits", REPORT="full") if c.startswith("sample.py"))
    assert " --cfg 3 " in next(c for c in commands_of("digits", GUIDANCE="3") if c.startswith("sample.py"))
    assert not any("--bootstrap" in c for c in commands_of("digits", REPORT="full"))


def test_a_score_may_be_named_as_a_run():
    """Of a score that RUNS names there is that row alone, and its command is the same whoever is named beside it: a folder can be gone on with."""
    def pruned(**env):
        return [c for c in commands_of("digits", SEEDS="0", SURROGATE="ddae", **env) if c.startswith("prune.py") and "random" not in c]

    (herding,) = pruned(RUNS="full random pruned-herding")
    assert "--surrogate ddae" in herding and "--score herding --per-class 5" in herding and herding.endswith("--out runs/digits/pruned-herding/prune")
    (default,) = pruned()
    assert default == herding
    no_features, again, moderate = pruned(RUNS="full pruned-el2n pruned-herding pruned-moderate")
    assert "--surrogate" not in no_features and again == herding and "--surrogate ddae" in moderate
    # Beside SCORE's own rows it changes none of them, and no row comes twice.
    assert pruned(RUNS="full pruned pruned-herding", SCORE="gaussian herding") == pruned(RUNS="full pruned", SCORE="gaussian herding")
    for more in ("pruned", "pruned-dro", "random pruned-short"):
        gaussian, again = pruned(RUNS=f"full pruned-herding {more}")
        assert "--score gaussian" in gaussian and again == herding
    assert pruned(SCORE=" ") == pruned()                                  # a blank is no list
    # A data set's own further scores are not asked for where no run takes them; those of a user are refused (above).
    assert plan.choices_of("cifar10", {"RUNS": "full pruned-dro"}).SCORE == "gaussian" and plan.choices_of("cifar10", {}).SCORE == "gaussian moderate"
    with_budgets = [c.split("--out ")[1] for c in commands_of("cifar10", KEEP="0.1 0.4", RUNS="full pruned-herding") if c.startswith("train.py")]
    assert with_budgets == ["runs/cifar10/full", "runs/cifar10/pruned-herding", "runs/cifar10/pruned-herding-0.4"]


def test_what_somebody_asked_for_is_not_added_to(monkeypatch):
    """REPORT=full chooses runs where nobody did; a run that a comparison has not is refused, not left out."""
    assert plan.choices_of("digits", {"REPORT": "full"}).RUNS.split() == [*plan.ALL_RUNS.split(), "pruned-dro-resample"]
    assert plan.choices_of("digits", {"REPORT": "full", "RUNS": "full random"}).RUNS == "full random"
    files = {"SCORER": str(ROOT / "run_all.sh"), "REFERENCE": str(ROOT / "run_all.sh")}
    with pytest.raises(common.UserError, match="pruned pruned-dro: see imagenet-pruning"):
        checked("imagenet", "models", RUNS="random pruned pruned-dro", **files)


def test_side_by_side_stable_diffusion_as_it_is_is_nobody_s_full_run():
    """The audit's baseline is the full run, in the calls beside the trainings as in the last."""
    c = plan.choices_of("imagenet-pruning", {"MODEL": "sd", "SD": "models", "JUDGE": "inception", "SURROGATE": "inception"})
    made = plan.Comparison("imagenet-pruning", "photos", c, apart=True)
    beside = [command.flags for command in made.commands if command.script == "evaluate.py" and command.run]
    for flags, run in zip(beside, made.runs):
        at = flags.index("--runs")
        named = flags[at + 1:flags.index("--encoder")]
        full = f"{made.out}/full"
        assert named == ([run] if run in (f"{made.out}/base", full) else [full, run])


def test_short_and_permuted_runs():
    got = commands_of("cifar10", KEEP="0.1 0.4", RUNS="full random pruned full-short random-short pruned-short pruned-dro-permuted")
    trained = {c.split("--out ")[1].split("/")[-1]: c for c in got if c.startswith("train.py")}
    for end, steps in (("", 2000), ("-0.4", 8000)):
        assert all(f"--steps {steps} " in trained[f"{run}-short{end}"] for run in ("full", "random", "pruned"))
        assert "--indices" not in trained[f"full-short{end}"] and f"runs/cifar10/pruned{end}/prune/keep.npy" in trained[f"pruned-short{end}"]
        assert f"--weights runs/cifar10/pruned-dro{end}/reweight/weights_permuted.npy" in trained[f"pruned-dro-permuted{end}"]
    for per_class, steps in ((15, 80), (5, 26)):                          # of 150 images a class, as many epochs as the 800 steps of the full run
        assert any(f"--steps {steps} " in c for c in commands_of("digits", RUNS="full pruned pruned-short", PER_CLASS=str(per_class)) if c.startswith("train.py"))
    with pytest.raises(common.UserError, match="SHORT=steps"):
        c = plan.choices_of("digits", {"RUNS": "full pruned-short"})
        c.SHORT = ""
        plan.Comparison("digits", "digits", c)


STAGE = """import os, signal, sys, time
from types import SimpleNamespace
RUNS = ("full random random-attach pruned pruned-dro pruned-dro-resample pruned-dro-permuted d2c-select d2c-select-attach full-short random-short "
        "pruned-short").split()
SCORES = {name: SimpleNamespace(needs="features") for name in ("gaussian", "moderate", "herding")}
def parse_args(flags):
    return flags
if __name__ == "__main__":
    call = " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
    if os.environ.get("REFUSE", "no such flag") in call:
        sys.exit(2)
    with open("calls.txt", "a") as f:
        f.write(call + "\\n")
    out = sys.argv[sys.argv.index("--out") + 1] if "--out" in sys.argv else "."
    os.makedirs(out, exist_ok=True)
    with open(f"{out}/classes.txt", "w") as f:
        f.write("".join(c + "\\n" for c in os.environ["CLASSES"].split()))
    if os.environ.get("SLOW"):
        def saved(*_):
            with open("calls.txt", "a") as f:
                f.write("saved\\n")
            sys.exit(143)
        signal.signal(signal.SIGTERM, saved)
        time.sleep(30)
    if call.startswith(os.environ.get("FAIL", "no such script")):
        sys.exit(7)
    if os.environ.get("PAUSE"):
        print("hello")
        time.sleep(float(os.environ["PAUSE"]))
        with open("calls.txt", "a") as f:
            f.write("end " + call + "\\n")
"""


@pytest.fixture
def stub(copy, tmp_path):
    """run_all.sh with stages that only write down what they were asked for: (folder, environment)."""
    there = tmp_path / "kit"
    there.mkdir()
    shutil.copy(copy / "run_all.sh", there)
    shutil.copytree(copy / "common", there / "common")
    for script in "data prune reweight attach train sample evaluate report".split():
        (there / f"{script}.py").write_text(STAGE)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "CLASSES": "cat dog"}
    env.pop("PYTHONPATH")
    # Whether the machine of the tests has further packages and cores is no part of them.
    env.update(SURROGATE="ddae", VISUAL="ddae", JUDGE="scratch pixels", JOBS="1")
    return there, env


def calls(stub, *args, **sizes):
    there, env = stub
    p = subprocess.run(["bash", "run_all.sh", *args], cwd=there, env=env | sizes, capture_output=True, text=True, timeout=60)
    assert p.returncode == 0, p.stdout + p.stderr
    assert (there / sizes.get("OUT", ".")).is_dir()
    return (there / "calls.txt").read_text().splitlines()


def flag(call, name):
    return call.split(f"{name} ")[1].split(" --")[0] if f"{name} " in call else None


def test_what_a_whole_cifar10_run_asks_for(stub):
    """13 trainings: two budgets and two scores, each with its own random row, and D2C at 1 000 images with its own; every run is judged."""
    got = calls(stub, "cifar10", TRAIN="--lr 1e-4")
    trained = {flag(c, "--out").split("/")[-1]: c for c in got if c.startswith("train.py")}
    assert list(trained) == ["full", "random", "pruned", "pruned-moderate", "pruned-dro", "random-0.4", "pruned-0.4", "pruned-moderate-0.4", "pruned-dro-0.4", "d2c-random", "random-attach",
                             "d2c-select", "d2c-select-attach"]
    assert all("--steps 20000" in c and c.count("--lr 1e-4") == 1 for c in trained.values())
    assert flag(trained["pruned-moderate-0.4"], "--indices") == "runs/cifar10/pruned-moderate-0.4/prune/keep.npy"
    assert flag(trained["pruned-dro-0.4"], "--indices") == "runs/cifar10/pruned-0.4/prune/keep.npy"
    assert [flag(c, "--keep") for c in got if c.startswith("prune.py") and "--score moderate" in c] == ["0.1", "0.4"]
    judged = next(c for c in got if c.startswith("evaluate.py"))
    assert len(flag(judged, "--runs").split()) == 13 and flag(judged, "--encoder") == "scratch pixels"
    assert next(c for c in got if c.startswith("report.py")).endswith("--encoder scratch --beside runs --out runs/cifar10/report")


def test_quick_adds_to_the_users_flags_and_stands_in_a_folder_of_its_own(stub):
    got = calls(stub, "cifar10", QUICK="1", TRAIN="--compile --warmup 100", NUM_SAMPLES="1000")
    trained = [c for c in got if c.startswith("train.py")]
    assert [flag(c, "--out") for c in trained] == [f"runs/cifar10-quick/{r}" for r in ("full", "random", "pruned", "d2c-random", "random-attach", "d2c-select", "d2c-select-attach")]
    assert all("--warmup 500 --checkpoint-every 1000 --compile --warmup 100" in c for c in trained)            # of a flag given twice the last counts
    assert sum(c.startswith("report.py") for c in got) == 7           # after every run; no trajectory without step_*.pt


def test_quick_digits_is_no_longer_than_digits(stub):
    for quick in ("1", "0"):
        (stub[0] / "calls.txt").unlink(missing_ok=True)
        got = calls(stub, QUICK=quick, OUT=f"runs/{quick}")
        random = ["random", "random-attach"] if quick == "1" else ["random", *(f"random-seed{k}" for k in (1, 2, 3, 4))]                                                 # no model twice
        assert [flag(c, "--out") for c in got if c.startswith("train.py") and "random" in c] == [f"runs/{quick}/{run}" for run in random]
        assert all("--steps 800 " in c and "--warmup" not in c for c in got if c.startswith("train.py")) and all("--num 1000 " in c for c in got if c.startswith("sample.py"))
        assert sum(c.startswith("report.py") for c in got) == (6 if quick == "1" else 1)


def test_a_corrected_command_is_not_held_against_the_mistake(stub):
    """A flag that the first training refuses has made nothing, and so must not be what the folder was 'made with'."""
    there, env = stub
    p = subprocess.run(["bash", "run_all.sh"], cwd=there, env=env | {"TRAIN": "--lr abc", "RUNS": "full", "REFUSE": "--lr abc"}, capture_output=True, text=True, timeout=60)
    assert p.returncode == 2
    calls(stub, RUNS="full", TRAIN="--lr 1e-3")
    (there / "runs/digits/full").mkdir(exist_ok=True)
    (there / "runs/digits/full/train.args.json").touch()
    p = subprocess.run(["bash", "run_all.sh"], cwd=there, env=env | {"TRAIN": "--lr 1e-4", "RUNS": "full"}, capture_output=True, text=True, timeout=60)
    assert p.returncode == 2 and "was made with TRAIN= --lr 1e-3, now TRAIN= --lr 1e-4" in p.stderr


def test_pictures_that_lie_in_data_are_not_overwritten(stub):
    (stub[0] / "data/photos").mkdir(parents=True)
    got = calls(stub, "data/photos", CLASSES="cat dog", RUNS="full")
    assert flag(got[0], "--out") == "data/my-photos" and flag(next(c for c in got if c.startswith("train.py")), "--data") == "data/my-photos"


def test_small_cifar10_has_a_folder_and_a_preset_of_its_own(stub):
    got = calls(stub, "cifar10", SIZE="8", RUNS="full")
    assert got[0] == "data.py cifar10 --size 8 --out data/cifar10-8"
    assert "--preset" not in (trained := next(c for c in got if c.startswith("train.py"))) and flag(trained, "--out") == "runs/cifar10-8/full"


def test_one_class_needs_no_classifier_and_no_weights(stub, tmp_path):
    (tmp_path / "faces").mkdir()
    got = calls(stub, str(tmp_path / "faces"), CLASSES="face", REPORT="full", KEEP="0.1 5e-2")
    assert not any(c.startswith("reweight.py") for c in got) and flag(next(c for c in got if c.startswith("evaluate.py")), "--encoder") == "pixels"
    (stub[0] / "calls.txt").unlink()
    got = calls(stub, str(tmp_path / "faces"), CLASSES="face", OUT="runs/b", JUDGE="inception scratch", RUNS="full d2c-select")
    assert flag(next(c for c in got if c.startswith("evaluate.py")), "--encoder") == "inception"


def test_imagenet_keeps_the_pixels_of_a_run_in_the_run(stub):
    got = calls(stub, "imagenet", "common", SCORER="run_all.sh", REFERENCE="run_all.sh", MODEL="SiT-L/2")
    pixels = [c for c in got if c.startswith("data.py") and "--indices" in c]
    assert [flag(c, "--out") for c in pixels] == [f"runs/imagenet-SiT-L_2/{how}-attach/images" for how in ("random", "d2c-select")]
    assert [flag(c, "--images") for c in got if c.startswith("attach.py") and "--images" in c] == [flag(c, "--out") for c in pixels]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143), (signal.SIGUSR1, 143), (signal.SIGUSR2, 143)])
def test_a_signal_to_run_all_reaches_the_stage(number, code, stub):
    there, env = stub
    p = subprocess.Popen(["bash", "run_all.sh"], cwd=there, env=env | {"SLOW": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                         preexec_fn=lambda: [signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGHUP)])      # a shell ignores them in the background
    for _ in range(200):
        if (there / "calls.txt").exists():
            break
        time.sleep(0.05)
    time.sleep(0.3)
    p.send_signal(number)
    assert p.wait(20) == code
    assert (there / "calls.txt").read_text().splitlines()[1:] == ["saved"]                     # the stage was told, waited for, and none came after it


def test_a_failing_stage_ends_the_run_with_its_code(stub):
    there, env = stub
    p = subprocess.run(["bash", "run_all.sh"], cwd=there, env=env | {"QUICK": "1", "FAIL": "prune.py"}, capture_output=True, text=True, timeout=60)
    assert p.returncode == 7 and (there / "calls.txt").read_text().splitlines()[-1].startswith("prune.py")


@pytest.mark.slow
def test_digits_from_nothing_to_the_report_and_again(copy):
    sizes = dict(STEPS="12", NUM_SAMPLES="60", DRO="--eta 0.05 --steps 12 --batch-size 8 --burn-in 2", DEVICE="cpu", RUNS=plan.ALL_RUNS, SEEDS="0")
    code, out = run_all_sh(copy, **sizes)
    assert code == 0, out[-3000:]
    report = (copy / "runs/digits/report/report.md").read_text(encoding="utf-8")
    assert [line.split("|")[1].strip() for line in report.splitlines() if line.startswith("|")][2:9] == RUNS
    for name in ("frontier.png", "per_class.png", "samples.png", "nearest.png"):
        assert name in report and (copy / "runs/digits/report" / name).stat().st_size > 2000
    kept = {r: json.loads((copy / f"runs/digits/{r}/train.args.json").read_text())["images_kept"] for r in RUNS}
    assert kept == {r: 1500 if r == "full" else 50 for r in RUNS}   # equal budgets: each comparison changes one thing
    assert np.array_equal(np.load(copy / "runs/digits/random/prune/keep.npy"), np.load(copy / "runs/digits/random-attach/attach/keep.npy"))
    stamps = {f: f.stat().st_mtime_ns for f in copy.glob("runs/digits/*/*.pt")}
    code, again = run_all_sh(copy, **sizes)                              # the same command: everything stands
    assert code == 0 and again.count("nothing to do") >= 20 and stamps == {f: f.stat().st_mtime_ns for f in copy.glob("runs/digits/*/*.pt")}


@pytest.mark.slow
def test_a_folder_of_pictures(copy, tmp_path):
    """Two budgets, each with its own random row, and D2C beside its own; a folder whose name has a space; two processes."""
    rng = np.random.default_rng(0)
    for c in ("cat", "dog"):
        (tmp_path / "my pets" / c).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(rng.integers(0, 120, (16, 16, 3)).astype(np.uint8) + (100 if c == "cat" else 0)).save(tmp_path / f"my pets/{c}/{i}.png")
    code, out = run_all_sh(copy, str(tmp_path / "my pets"), STEPS="3", NUM_SAMPLES="24", PER_CLASS="3", KEEP="0.3 0.5", MODEL="unet-tiny", DEVICE="cpu", NPROC="2",
                        RUNS="full random pruned random-attach d2c-select", SAMPLER="--steps 3 --cfg 1.5",
                        SURROGATE="ddae", VISUAL="ddae", JUDGE="scratch pixels", JUDGES="1")
    assert code == 0, out[-3000:]
    table = (copy / "runs/my pets-unet-tiny/report/report.md").read_text(encoding="utf-8")
    for run in ("full", "random", "random-0.5", "pruned", "pruned-0.5", "d2c-random", "random-attach", "d2c-select"):
        assert f"| {run} |" in table


@pytest.mark.slow
def test_the_imagenet_recipe(copy, tmp_path, real_vae):
    """Every command of the recipe in small: 2 wnids, a scorer in the official format, a real (random) VAE, visual encoder and judge; no pixels kept."""
    rng = np.random.default_rng(0)
    for c in ("n01440764", "n01443537"):
        (tmp_path / "train" / c).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)).save(tmp_path / f"train/{c}/{i}.JPEG")
    scorer = SiT(size=8, channels=4, num_classes=2, depth=1, width=384, heads=6, patch=2, learn_sigma=True)
    for name, net in (("DiT", scorer), ("inception", torchvision.models.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)),
                      ("resnet18", torchvision.models.resnet18(weights=None))):
        torch.save(net.state_dict(), tmp_path / f"{name}.pth")
    shutil.copytree(real_vae[0], tmp_path / "vae")
    config = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps({**config, "scaling_factor": 0.18215}))     # what official weights were trained with
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    sizes = dict(SCORER=str(tmp_path / "DiT.pth"), VAE=str(tmp_path / "vae"), IMAGE_SIZE="16", REFERENCE=str(tmp_path / "adm.npz"), JUDGE_WEIGHTS=str(tmp_path / "inception.pth"),
                 TEXT="minilm", VISUAL="resnet18", VISUAL_WEIGHTS=str(tmp_path / "resnet18.pth"), PER_CLASS="3", INTERVAL="2", STEPS="2", NUM_SAMPLES="6", MODEL="SiT-T/2",
                 SAMPLER="--sampler sde --steps 3 --cfg 1.5", DEVICE="cpu")
    code, out = run_all_sh(copy, "imagenet", str(tmp_path / "train"), **sizes)
    assert code == 0, out[-3000:]
    assert not (copy / "data/imagenet/images.npy").exists() and np.load(copy / "data/imagenet/latents.npy").shape == (24, 8, 8, 8)
    table = (copy / "runs/imagenet-SiT-T_2/report/report.md").read_text(encoding="utf-8")
    for run in ("random", "random-attach", "d2c-select", "d2c-select-attach"):
        assert f"| {run} |" in table and json.loads((copy / f"runs/imagenet-SiT-T_2/{run}/metrics.json").read_text())["encoders"]["inception"]["n"] == 6
    kept = np.load(copy / "runs/imagenet-SiT-T_2/select/keep.npy")
    details = (copy / "runs/imagenet-SiT-T_2/report/details.md").read_text(encoding="utf-8")
    assert len(kept) == 6 and "latents only" in details
    code, again = run_all_sh(copy, "imagenet", str(tmp_path / "train"), **sizes)
    assert code == 0 and again.count("nothing to do") >= 16


@pytest.mark.parametrize("model", ["MDT-S/2", "sd"])
def test_what_a_pruning_of_latent_models_asks_for(model):
    """Two budgets of random, pruned and DRO at equal steps, the first two and the full data at equal epochs; Stable Diffusion beside them as it is."""
    env = {"MODEL": model} if model != "sd" else {"MODEL": model, "SD": str(ROOT / "models")}
    comparison = checked("imagenet-pruning", "photos", SURROGATE="inception", JUDGE="inception", **env)
    trained = {flag(str(c), "--out").split("/")[-1]: str(c) for c in comparison.commands if c.script == "train.py"}
    rows = ["full", *(run + end for end in ("", "-0.4") for run in ("random", "pruned", "pruned-dro", "full-short", "random-short", "pruned-short"))]
    assert list(trained) == ["base"] * (model == "sd") + rows and [Path(run).name for run in comparison.runs] == list(trained)
    steps = {"MDT-S/2": 400_000, "sd": 15_000}[model]
    for run, command in trained.items():
        share = 1 if "short" not in run else 0.4 if "0.4" in run else 0.1
        assert flag(command, "--steps") == str(round(share * steps) if run != "base" else 0) and flag(command, "--preset") == {"MDT-S/2": "mdt", "sd": "sd"}[model]
        assert (flag(command, "--init") or "").endswith("base/last.pt") == (model == "sd" and run != "base")
    weighed = [str(c) for c in comparison.commands if c.script == "reweight.py"]
    assert len(weighed) == 2 and all(("--proxy-init" in c) == (model == "sd") and "full/last.pt" in c for c in weighed)
    data = str(comparison.commands[0])
    assert "--latents-only" not in data and flag(data, "--size") == {"MDT-S/2": "256", "sd": "512"}[model]
    if model == "sd":
        assert flag(data, "--vae") == str(ROOT / "models/vae") and flag(trained["base"], "--official") == "sd" and flag(trained["base"], "--init") == str(ROOT / "models")


def test_what_it_needs_is_counted():
    """1.28 million images of 256 x 256: 252 GB of pixels and 21 GB of latents; 5 000 000 steps would be so many hours of MDT-S/2."""
    comparison = checked("imagenet-pruning", "photos", SURROGATE="inception", JUDGE="inception", KEEP="0.1", RUNS="full pruned", NUM_SAMPLES="1000", GUIDANCE="1")
    said = comparison.needs(1_281_167)
    assert "pixels 251.9, latents 21.0, samples 0.4" in said and "800,000 steps of 256" in said
    hours = 800_000 * 256 * 2 * 6.1e9 * 3 * 2.1 / 6e13 / 3600
    assert f"{hours:,.1f} GPU hours" in said


@pytest.mark.parametrize("env, says", [(dict(MODEL="SiT-S/2"), "is for MDT-S/2 or another MDT, or sd"), (dict(MODEL="sd"), "needs SD=FOLDER"), (dict(QUICK="1"), "QUICK is for"),
                                       (dict(RUNS="full d2c-select"), "D2C's runs are those"), (dict(SIZE="64"), "SIZE=64 does nothing")], ids=str)
def test_bad_choices_of_it_are_refused(env, says):
    with pytest.raises(common.UserError, match=says):
        checked("imagenet-pruning", "photos", SURROGATE="inception", JUDGE="inception", **env)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["MDT-T/2", "sd"])
def test_the_pruning_of_latent_models(model, tmp_path, tiny_sd):
    """Every command in small: 2 wnids, the VAE of a tiny Stable Diffusion in the real format, a random Inception as surrogate. It judges few runs: 2 048
    features a run take a quarter of a minute."""
    copy, rng = copy_kit(tmp_path / "kit"), np.random.default_rng(0)
    some = dict(RUNS="full pruned-dro", JUDGE="inception", JUDGE_WEIGHTS=str(tmp_path / "inception.pth")) if model == "sd" else dict(JUDGE="pixels")
    judge = some["JUDGE"]
    for k, c in enumerate(("n01440764", "n01443537")):
        (tmp_path / "train" / c).mkdir(parents=True)
        for i in range(12):
            Image.fromarray((rng.integers(0, 156, (20, 24, 3)) + 50 * k).astype(np.uint8)).save(tmp_path / f"train/{c}/{i}.JPEG")
    torch.save(torchvision.models.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False).state_dict(), tmp_path / "inception.pth")
    folder, out = tiny_sd["epsilon"], f"runs/imagenet-pruning-16-{model.replace('/', '_')}"
    sizes = dict(MODEL=model, SD=str(folder), VAE=str(folder / "vae"), IMAGE_SIZE="16", SURROGATE_WEIGHTS=str(tmp_path / "inception.pth"), **some,
                 STEPS="5", NUM_SAMPLES="6", KEEP="0.5", SAMPLER="--sampler ddim --steps 2 --cfg-power 4", TRAIN="--batch-size 4 --amp none --warmup 0", GUIDANCE="1.5", OUT=out,
                 DRO="--burn-in 1", DEVICE="cpu")
    code, said = run_all_sh(copy, "imagenet-pruning", str(tmp_path / "train"), **sizes)
    assert code == 0, said[-3000:]
    assert "24 images: about " in said and "GPU hours" in said
    rows = ["base", "full", "pruned-dro"] if model == "sd" else ["full", "random", "pruned", "pruned-dro", "full-short", "random-short", "pruned-short"]
    table = (copy / out / "report/report.md").read_text(encoding="utf-8")
    for run in rows:
        assert f"| {run} |" in table and json.loads((copy / out / run / "metrics.json").read_text())["encoders"][judge]["n"] == 6
    assert len(np.load(copy / out / "pruned/prune/keep.npy")) == 12 and (copy / "data/imagenet-pruning-16/latents.npy").exists()
    state = common.load_pt(copy / out / "pruned-dro/last.pt")
    assert state["args"]["model"] == model and state["step"] == 5 and ("masked" in (copy / out / "full/stats.jsonl").read_text()) == (model != "sd")


@pytest.mark.slow
def test_quick_renews_the_report_and_puts_other_reports_beside_it(tmp_path):
    copy = copy_kit(tmp_path / "kit")                                 # of its own: every report in runs/ would stand beside this one's
    sizes = dict(QUICK="1", STEPS="4", NUM_SAMPLES="40", TRAJECTORY="20", TRAIN="--checkpoint-every 2", RUNS="full random pruned", SEEDS="0", DEVICE="cpu")
    code, out = run_all_sh(copy, **sizes, SCORE="gaussian moderate", OUT="runs/quick")
    assert code == 0, out[-3000:]
    planned = ["full", "random", "pruned", "pruned-moderate"]
    assert f"4 trainings of 4 steps, 40 samples each, judged by scratch; in this order: {' '.join(planned)}" in out and "more minutes at the pace of the first steps" in out
    at = [out.index(f"--- train.py --data data/digits --preset digits --steps 4 --seed 0 --device cpu --checkpoint-every 2{rest}")
                                                for rest in (" --out runs/quick/full", " --indices runs/quick/random", " --indices runs/quick/pruned/", " --indices runs/quick/pruned-mod")]
    assert out.count("report so far") == 3 and at == sorted(at)
    for run in planned:
        points = json.loads((copy / f"runs/quick/{run}/trajectory.json").read_text())["points"]
        assert [(p["step"], p["n"]) for p in points] == [(2, 20), (4, 20)]
    record = json.loads((copy / "runs/quick/pruned-moderate/prune/prune.args.json").read_text())
    assert record["args"]["score"] == "moderate" and record["args"]["features"].endswith("pruned/prune/features.npy")          # encoded once
    assert "| pruned-moderate |" in (copy / "runs/quick/report/report.md").read_text(encoding="utf-8")
    code, out = run_all_sh(copy, PROCESS="ddpm", STEPS="4", NUM_SAMPLES="40", RUNS="full random pruned", SEEDS="0", JUDGE="scratch", DEVICE="cpu")          # the first report beside it
    assert code == 0 and "report so far" not in out, out[-3000:]
    text = (copy / "runs/digits-ddpm/report/details.md").read_text(encoding="utf-8")
    assert re.search(r"Pruning, FD against random: [+-][\d.]+ % here \(one seed\); [+-][\d.]+ % with SiT-T/2 \(flow\) on digits 8 x 8, 4 steps of 128, scratch \[quick\]", text)


def test_sources_of_every_kind_and_flags_of_data_py(stub):
    """Archives and names of the hub, ~ in quotes, height and width, and what data.py needs to be told."""
    there, env = stub
    (there / "home").mkdir()
    (there / "home" / "pets.zip").write_bytes(b"x")
    home = {"HOME": str(there / "home"), "RUNS": "full", "OUT": "~/out"}
    p = subprocess.run(["bash", "run_all.sh", "~/pets.zip"], cwd=there, env=env | home | {"SIZE": "48 64", "DATA_FLAGS": "--labels-from prefix"}, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    first = (there / "calls.txt").read_text().splitlines()[0]
    assert first == f"data.py {there}/home/pets.zip --size 48 64 --labels-from prefix --out data/pets"
    assert (there / "home" / "out" / "plan.txt").exists() and not (there / "~").exists()
    (there / "calls.txt").unlink()
    p = subprocess.run(["bash", "run_all.sh", "hf:owner/name"], cwd=there, env=env | {"RUNS": "full"}, capture_output=True, text=True)
    assert p.returncode == 0 and (there / "calls.txt").read_text().startswith("data.py hf:owner/name --out data/owner-name\n"), p.stderr
