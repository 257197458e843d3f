"""Runs side by side: who waits for whom, where they run, and that nothing but the time differs from one after the other."""
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common
from common import jobs, plan
from conftest import copy_kit
from test_run_all import copy, run_all_sh, stub  # noqa: F401


ALL = {"RUNS": plan.ALL_RUNS, "SEEDS": "0"}


def planned(what, apart=False, **env):
    env = {"SURROGATE": "ddae", "VISUAL": "ddae", "JUDGE": "scratch pixels", **ALL, **env}
    return plan.Comparison(what, what, plan.choices_of(what, env), apart=apart).commands


def known(commands):
    """{script of folder: place}, as train full; a judge is called by its number."""
    names = {}
    for j, command in enumerate(commands):
        script, out = command.script.removesuffix(".py"), jobs.out_of(command)
        name = f"{script} {'/'.join(Path(out or command.run).parts[2:])}".strip()
        while name in names:
            name += "+"
        names[name] = j
    return names


# Written by hand from what each stage reads: {who: for whom}, all of them and no others, aside from the data (and the data's own command).
DIGITS = {
    "train full": "", "sample full": "train full", "prune random/prune": "", "train random": "prune random/prune", "sample random": "train random",
    "prune pruned/prune": "train full", "train pruned": "prune pruned/prune", "sample pruned": "train pruned",
    "reweight pruned-dro/reweight": "prune pruned/prune, train full", "train pruned-dro": "prune pruned/prune, reweight pruned-dro/reweight", "sample pruned-dro": "train pruned-dro",
    "attach random-attach/attach": "prune random/prune, train full", "train random-attach": "attach random-attach/attach", "sample random-attach": "train random-attach",
    "attach d2c-select-attach/attach": "train full, attach random-attach/attach", "train d2c-select": "attach d2c-select-attach/attach", "sample d2c-select": "train d2c-select",
    "train d2c-select-attach": "attach d2c-select-attach/attach", "sample d2c-select-attach": "train d2c-select-attach"}


def test_who_waits_for_whom_on_digits():
    commands = planned("digits")
    at, waits = known(commands), jobs.waits_for(commands)
    assert sorted(at) == sorted([*DIGITS, "data", "evaluate", "report report"])
    for name, others in DIGITS.items():
        want = {at[other] for other in others.split(", ") if other}
        assert waits[at[name]] - {0} == want, name
    everything = {j for name, j in at.items() if name.split()[0] in ("train", "sample")}
    assert waits[at["evaluate"]] >= everything and waits[at["report report"]] >= everything | {at["evaluate"]} and waits[0] == set()
    # Measured as they are drawn: the full run first, with the judges, then each beside the others; at the end all of them.
    commands = planned("digits", apart=True)
    at, waits = known(commands), jobs.waits_for(commands)
    others = [name for name in at if name.startswith("evaluate ") and name != "evaluate full"]
    assert len(others) == 6 and waits[at["evaluate full"]] - {0} == {at["train full"], at["sample full"]}
    for name in others:
        assert waits[at[name]] - {0} == {at[step] for step in ("train full", "sample full", "evaluate full", *(name.replace("evaluate", step) for step in ("train", "sample")))}
    assert waits[at["evaluate"]] >= {at[name] for name in others} and at["evaluate full"] in waits[at["attach random-attach/attach"]]
    # A weight whose features another score computed waits for that score, and not for the training beside them; a so-far judge for those before it.
    commands = planned("cifar10", QUICK="1", SCORE="gaussian moderate")
    at, waits = known(commands), jobs.waits_for(commands)
    assert at["prune pruned/prune"] in waits[at["prune pruned-moderate/prune"]] and at["train pruned"] not in waits[at["prune pruned-moderate/prune"]]
    assert at["sample full"] in waits[at["evaluate full"]] and at["train random"] not in waits[at["evaluate full"]]
    assert at["evaluate full"] in waits[at["evaluate random"]] and at["evaluate full"] in waits[at["attach random-attach/attach"]]


@pytest.mark.parametrize("what, env", [("digits", {}), ("digits", {"REPORT": "full", "SEEDS": "0 1"}), ("cifar10", {}), ("cifar10", {"QUICK": "1"}), ("digits", {"SCORER_STEPS": "80"})])
@pytest.mark.parametrize("apart", [False, True])
def test_the_plan_s_own_order_is_always_allowed(what, env, apart):
    waits = jobs.waits_for(planned(what, apart, **env))
    assert all(i < j for j, before in enumerate(waits) for i in before)


def test_what_is_started_first():
    """One at a time, and where the report is renewed in between, the plan's order. Else no long run is left to the end: with the seconds that a training (45), a set of samples (11), DRO (18),
    a judgement (150) and the rest (5) take on digits, two places have drawn all samples sooner than in the plan's order, and within a tenth of what two could do at best."""
    for what, env, n in (("digits", {}, 1), ("cifar10", {"QUICK": "1"}, 3)):
        commands = planned(what, **env)
        assert jobs.order_of(commands, jobs.waits_for(commands), n) == list(range(len(commands)))
    commands = planned("digits")
    waits = jobs.waits_for(commands)
    seconds = [{"train.py": 45, "sample.py": 11, "reweight.py": 18, "evaluate.py": 150}.get(command.script, 5) for command in commands]

    def drawn(order, places=2):
        now, done, todo, running, last = 0, {0}, [j for j in order if j], [], 0
        while todo or running:
            ready = [j for j in todo if waits[j] <= done]
            if ready and len(running) < places:
                todo.remove(ready[0])
                running.append((now + seconds[ready[0]], ready[0]))
                continue
            now, j = min(running)
            running.remove((now, j))
            done.add(j)
            last = now if commands[j].script == "sample.py" else last
        return last
    ours, plain = drawn(jobs.order_of(commands, waits, 2)), drawn(range(len(commands)))
    best = sum(s for s, command in zip(seconds[1:], commands[1:]) if command.script not in jobs.JUDGES) / 2
    assert best <= ours < plain and ours < 1.1 * best


@pytest.mark.parametrize("env, side, gpus, cores, want", [
    ({}, 8, 0, 2, 2), ({}, 8, 0, 1, 1), ({}, 8, 0, 64, 4), ({"MODEL": "unet-tiny"}, 64, 0, 2, 2), ({"MODEL": "SiT-S/2"}, 8, 0, 8, 1), ({}, 32, 0, 8, 1), ({}, 0, 0, 8, 1),
    ({}, 32, 3, 8, 3), ({}, 8, 1, 8, 1), ({"DEVICE": "cpu"}, 8, 3, 2, 2), ({"DEVICE": "cuda:1"}, 8, 3, 2, 1), ({"NPROC": "2"}, 8, 2, 8, 1), ({"JOBS": "5"}, 32, 1, 2, 5)])
def test_how_many_by_default(env, side, gpus, cores, want, monkeypatch):
    monkeypatch.setattr(jobs, "cores", lambda: cores)
    assert jobs.jobs_of(SimpleNamespace(**{"JOBS": "", "NPROC": "1", "DEVICE": "auto", "MODEL": "", **env}), side, gpus) == want


def test_where_each_of_them_runs(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jobs, "cores", lambda: 8)
    assert jobs.places_of(1, "auto", 4) == [None]
    # How many share a card, or the cores' memory, goes with it.
    assert jobs.places_of(3, "auto", 2) == [{"CUDA_VISIBLE_DEVICES": k, "RUNS_BESIDE": "2"} for k in "010"]
    assert jobs.places_of(2, "cpu", 2) == [{"OMP_NUM_THREADS": "4", "RUNS_BESIDE": "2"}] * 2
    assert jobs.places_of(16, "auto", 0) == [{"OMP_NUM_THREADS": "1", "RUNS_BESIDE": "16"}] * 16
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-6")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in jobs.places_of(2, "cuda", 2)] == ["4", "GPU-6"]
    assert jobs.places_of(2, "cpu", 2)[0] == {"OMP_NUM_THREADS": "3", "RUNS_BESIDE": "2"}


def test_runs_side_by_side_share_the_memory(monkeypatch):
    """A quarter of it is for the data of all of them together, however many."""
    from common.rows import device_budget
    monkeypatch.delenv("RUNS_BESIDE", raising=False)
    alone = device_budget(torch.device("cpu"), None)
    monkeypatch.setenv("RUNS_BESIDE", "4")
    assert device_budget(torch.device("cpu"), None) == alone / 4


# ---------------------------------------------------------------------------------------------- with stages that do nothing
def test_several_at_once_in_an_allowed_order(stub):  # noqa: F811
    there, env = stub
    p = subprocess.run(["bash", "run_all.sh"], cwd=there, env=env | ALL | {"JOBS": "3", "PAUSE": "0.1"}, capture_output=True, text=True, timeout=120)
    assert p.returncode == 0, p.stderr
    lines = (there / "calls.txt").read_text().splitlines()
    running, most, ended = set(), 0, set()
    commands = planned("digits", apart=True)
    at = {name: str(commands[j]) for name, j in known(commands).items()}
    # The judges' networks are made by the first who asks for them.
    wanted = {**DIGITS, "attach d2c-select-attach/attach": "train full, evaluate full", "evaluate random": "sample random, evaluate full", "evaluate full": "sample full",
              "evaluate": "evaluate d2c-select-attach, evaluate pruned-dro", "report report": "evaluate"}
    before = {at[name]: [at[other] for other in others.split(", ") if other] for name, others in wanted.items()}
    for line in lines:
        if line.startswith("end "):
            running.remove(line[4:])
            ended.add(line[4:])
            continue
        assert all(other in ended for other in before.get(line, [])), line
        running.add(line)
        most = max(most, len(running))
    assert most == 3 and len(ended) == len(commands) and lines[-1].startswith("end report.py")
    assert "3 at a time, OMP_NUM_THREADS=" in p.stdout
    # Every line of a stage says whose it is.
    said = [line for line in p.stdout.splitlines() if line.endswith("hello")]
    assert len(said) == len(commands) and {"[pruned-dro/reweight] hello", "[full] hello", "[evaluate] hello", "[report] hello"} <= set(said)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_a_signal_reaches_all_that_run(number, code, stub):  # noqa: F811
    there, env = stub
    (there / "data/digits").mkdir(parents=True)
    script = there / "data.py"
    script.write_text(script.read_text().replace('os.environ.get("SLOW")', "False"))
    p = subprocess.Popen(["bash", "run_all.sh"], cwd=there, env=env | ALL | {"SLOW": "1", "JOBS": "2"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                         preexec_fn=lambda: [signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGHUP)])
    end = time.time() + 30
    while time.time() < end and not ((there / "calls.txt").exists() and len((there / "calls.txt").read_text().splitlines()) == 3):
        time.sleep(0.05)
    time.sleep(0.5)
    p.send_signal(number)
    assert p.wait(20) == code
    assert (there / "calls.txt").read_text().splitlines()[3:] == ["saved"] * 2


def test_a_failure_is_named_and_ends_the_others(stub):  # noqa: F811
    there, env = stub
    script = there / "train.py"
    script.write_text(script.read_text().replace('os.environ.get("SLOW")', "True"))
    start = time.time()
    p = subprocess.run(["bash", "run_all.sh"], cwd=there, env=env | ALL | {"JOBS": "2", "FAIL": "prune.py"}, capture_output=True, text=True, timeout=60)
    assert p.returncode == 7 and time.time() - start < 25
    assert "prune.py of random/prune ended with 7; the others save and end" in p.stderr
    assert (there / "calls.txt").read_text().splitlines()[-1] == "saved"


# ---------------------------------------------------------------------------------------------- a real one
@pytest.mark.slow
def test_the_same_bytes_as_one_after_the_other(tmp_path):
    """Digits with few steps, one thread a run: weights, kept sets, samples and figures."""
    sizes = dict(STEPS="12", NUM_SAMPLES="60", DRO="--eta 0.05 --steps 12 --batch-size 8 --burn-in 2", DEVICE="cpu", OMP_NUM_THREADS="1", SURROGATE="ddae", VISUAL="ddae", JUDGE="scratch pixels",
                 JUDGES="2", GUIDANCE="1 1.5", SEEDS="0", RUNS="full random pruned-dro d2c-select-attach")
    kits = [copy_kit(tmp_path / name / "kit") for name in ("one", "two")]
    for kit, n in zip(kits, "12"):
        code, out = run_all_sh(kit, JOBS=n, **sizes)
        assert code == 0, out[-3000:]
        shutil.rmtree(kit / "models")                                 # nothing else of the kit is looked at
    a, b = (kit / "runs/digits" for kit in kits)
    files = sorted(f.relative_to(a) for f in a.rglob("*.npy"))
    assert len(files) > 20 and files == sorted(f.relative_to(b) for f in b.rglob("*.npy"))
    for file in files:
        assert (a / file).read_bytes() == (b / file).read_bytes(), file
    for file in sorted(f.relative_to(a) for f in a.rglob("last.pt")):
        x, y = (common.load_pt(there / file) for there in (a, b))
        assert all(torch.equal(x["ema"][k], y["ema"][k]) and torch.equal(x["model"][k], y["model"][k]) for k in x["ema"]), file

    def figures(there, run):
        text = (there / run / "metrics.json").read_text()
        return {name: {k: v for k, v in e.items() if "seconds" not in k} for name, e in json.loads(text)["encoders"].items()}
    for run in ("full", "random", "pruned-dro", "d2c-select-attach"):
        x, y = figures(a, run), figures(b, run)
        assert x.keys() == y.keys() and all(x[name].get("fd") == y[name].get("fd") for name in x), run
