"""docs/results: every table of the page is what the command prints from the figures that lie there."""
import importlib
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT

FILES = sorted((ROOT / "docs/results").glob("*.json"))


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs/results/tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def made(tables, tmp_path, monkeypatch):
    """A report of three runs, two seeds and three judges, added as `small`; the figures of its FD are returned."""
    rng = np.random.default_rng(0)
    fds = {name: rng.uniform(1, 2, (2, 3)) for name in ("full", "random", "pruned")}
    rows = {name: {"seed": [0, 1], "kept": [150, 150], "steps": [8, 8], "epochs": [1, 1], "n": [60, 60], "worst_three_n": [400, 400], "memo": [0.5, None], "memo_alike": [None, None], "seconds": [1.0, 2.0],
                   "judged": {"fd": fd.tolist(), "best_fd": (fd / 2).tolist(), "worst_three": (3 * fd).tolist()}, "best_guidance": [1.0, 1.5],
                   "by_guidance": {"1": fd.tolist(), "2": rng.uniform(1, 2, (2, 3)).tolist()}} for name, fd in fds.items()}
    monkeypatch.setattr(tables, "HERE", tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({"judge": "scratch", "rows": rows}))
    tables.main(["--add", "small", str(tmp_path / "report.json"), "--title", "Small", "--command", "a b"])
    tables.main(["--add", "timed", str(tmp_path / "report.json"), "--title", "Timed", "--command", "a b", "--timed", "--rivals", "pruned:full random"])
    (tmp_path / "report.json").unlink()
    return fds


def test_figures_are_kept_and_printed(tables, made, capsys):
    """Mean and standard deviation over seeds, effects by Student's interval over judges and seeds as a plain loop has them."""
    tables.main(["small"])
    out = capsys.readouterr().out
    assert out.startswith("### Small\n\n`a b`\n") and "2 seeds, scratch x 3, 60 samples a run" in out
    mean = made["pruned"].mean(1)
    assert f"| pruned | 150 | {mean.mean():.2f} ± {abs(mean[0] - mean[1]) / math.sqrt(2):.2f} | {mean.mean() / 2:.2f} ±" in out
    assert f"| {3 * mean.mean():.2f} ± {3 * abs(mean[0] - mean[1]) / math.sqrt(2):.2f} |" in out
    total = sum((made["pruned"][s, j] - made["random"][s, j]) / np.mean(made["random"][:, j]) for s in range(2) for j in range(3)) / 6
    assert re.search(rf"\| pruned \| random \| \{'+' if total > 0 else '-'}{abs(total):.0%}".replace("%", " %"), out), (total, out)
    kept = json.loads((tables.HERE / "small.json").read_text())
    assert np.allclose(kept["rows"]["full"]["judged"]["fd"], made["full"], rtol=5e-5) and "seconds" not in kept["rows"]["full"]


def test_the_gate_opens_where_there_is_twice_as_much_to_gain(tables):
    def setting(full, random):
        rows = {name: {"seed": [0, 1, 2], "kept": [15], "steps": [8], "judged": {"fd": values}} for name, values in (("full", full), ("random", random))}
        return {"a": {"rows": rows}}
    gap = [[0.5], [0.52], [0.48]]
    assert "**open**" in tables.gate(setting(gap, [[1.0], [1.01], [0.99]]))[4]
    assert "**open**" not in tables.gate(setting(gap, [[1.0], [0.6], [0.5]]))[4]
    briefly = setting(gap, [[1.0], [1.01], [0.99]])
    briefly["a"]["rows"]["random-short"] = briefly["a"]["rows"]["random"]
    assert not any("random-short" in line for line in tables.gate(briefly))              # of fewer steps
    assert "**open**" not in tables.gate(setting([[1.0], [1.01], [0.99]], gap))[4]       # worse than random: nothing to gain


def test_what_does_not_stand_there_is_named(tables, made, capsys):
    with pytest.raises(SystemExit) as e:
        tables.main(["other"])
    assert e.value.code == 2 and "other: there is small, timed" in capsys.readouterr().err


def test_seconds_and_several_rivals_are_asked_for(tables, made, capsys):
    tables.main(["small", "timed"])
    small, timed = capsys.readouterr().out.split("### Timed")
    assert "train s" not in small and "| train s |" in timed and timed.count("| 2 ± 1 |") == 3
    assert re.findall(r"\| pruned \| ([a-z]+) \|", small) == ["random"] and re.findall(r"\| pruned \| ([a-z]+) \|", timed) == ["full", "random"]


def test_the_differences_at_one_guidance(tables, made, capsys):
    """Two seeds and three judges by a plain sum; and a setting whose figures are of one guidance alone does not stop the others."""
    file = tables.HERE / "small.json"
    kept = json.loads(file.read_text())
    tables.main(["--by-guidance", "small"])
    out = capsys.readouterr().out
    assert out.startswith("### Small: at the same guidance") and "| FD, guidance 1 | FD, guidance 2 |" in out
    (printed,) = re.findall(r"\| pruned \| random \| ([^|]+) \| ([^|]+) \|", out)
    for said, cfg in zip(printed, ("1", "2")):
        mine, theirs = (np.array(kept["rows"][name]["by_guidance"][cfg]) for name in ("pruned", "random"))
        change = sum((mine[s, j] - theirs[s, j]) / theirs[:, j].mean() for s in range(2) for j in range(3)) / 6
        assert said.startswith(f"{change:+.0%}".replace("%", " % ±")), (said, change)
    for row in kept["rows"].values():
        del row["by_guidance"]
    file.write_text(json.dumps(kept))
    tables.main(["--by-guidance"])
    out = capsys.readouterr().out
    assert "### Small: its figures say nothing of single guidances" in out and "### Timed: at the same guidance" in out


def test_the_page_holds_the_differences_at_one_guidance(tables):
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    (name,) = re.findall(r"tables.py --by-guidance ([\w-]+)`", page)
    lines = tables.by_guidance(json.loads((ROOT / f"docs/results/{name}.json").read_text(encoding="utf-8")))[2:]
    assert len(lines) > 4 and not [line for line in lines if line not in page]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_the_page_holds_what_the_command_prints(tables, file):
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    lines = tables.lines_of(json.loads(file.read_text(encoding="utf-8")))
    missing = [line for line in lines if line not in page]
    assert len(lines) > 8 and not missing, missing[:2]


def test_the_page_holds_the_gate(tables):
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    lines = tables.gate({file.stem: json.loads(file.read_text(encoding="utf-8")) for file in FILES})[2:]
    assert len(lines) > len(FILES) and not [line for line in lines if line not in page]


STUB = """#!{python}
import json, os, sys
if os.path.basename(sys.argv[0]) == "python" and sys.argv[1] == "-c" and "np." not in sys.argv[2]:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with open(os.environ["LOG"], "a") as f:
    print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]), file=f)
"""


@pytest.mark.parametrize("script, flags, trainings", [
    ("longtail.sh", [], 15), ("unet.sh", [], 6), ("cifar.sh", ["{tmp}"], 60), ("cifar.sh", ["{tmp}", "attach"], 21)])
def test_the_scripts_call_what_there_is(script, flags, trainings, tmp_path):
    """With a python that notes its calls instead of making them: every one of them parses, and as many train as the page says."""
    for name in ("python", "bash"):
        (tmp_path / name).write_text(STUB.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    out = str(tmp_path / "out")
    flags = [flag.format(tmp=tmp_path) for flag in flags or [out]]
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "LOG": str(tmp_path / "log"), "OUT": out}
    done = subprocess.run(["/usr/bin/env", "-u", "PER_CLASS", shutil.which("bash"), ROOT / "docs/results" / script, *flags], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    for python, file, *argv in calls:
        if python == "python" and file != "-c":
            importlib.import_module(file.removesuffix(".py")).parse_args(argv)
    assert sum(call[:2] == ["python", "train.py"] for call in calls) == trainings
