"""report.py on made-up runs: every outcome of the generated sentences, the accounting of costs, refusals, and that the pictures show what they should."""
import argparse
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import common
import report
from common import answers, comparison

SEVEN = ("full", "random", "random-attach", "pruned", "pruned-dro", "d2c-select", "d2c-select-attach")


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_run(folder, fd=1.0, steps=700, kept=150, memo=(0.55, 0.5, 0.5, 1.0), points=None, train_args=(), data="digits", n=1000, circular=False, worst=2.0, encoders=("scratch",),
             train_seconds=100.0, per_class=True, judges=None, guided=None, model_of=None):
    """A run folder as train.py, sample.py and evaluate.py leave it. memo: samples, held-out, baseline, noise; points: [(step, fd)]; judges: FD under each of several (fd is their
    mean then); guided: {guidance: [[FD of each half of the noise] of each judge]} for a run drawn at several, the first the main one."""
    name, rng = folder.name, np.random.default_rng(len(folder.name))
    share = dict(zip(("samples", "heldout", "baseline", "noise"), memo or ()))
    spaces = {k: {"share": v, "ratio": {"share": v / 10}} for k, v in share.items() if v is not None}
    row = {"identity": "scratch:1", "distance": "FD (scratch)", "n": n, "reference": f"{data}, the full training set", "reference_n": 1500, "fd": fd, "fd_heldout": 0.13,
           "fd_heldout_n": 297, "fd_at_heldout_n": fd + 0.2, "fd_subset": None if kept == 1500 else 0.2, "precision": 0.8, "recall": 0.7, "density": 0.9, "coverage": 0.8,
           "neighbours_n": n, "precision_k": 3, "density_k": 5, "read_as_labelled": 0.97, "kid": {"subset_size": 1000}, "circular": circular}
    if per_class:
        row["per_class"] = {"n": 24, "fd": [worst - 0.1 * c for c in range(10)], "worst": 0, "worst_fd": worst, "real": list(rng.uniform(0.4, 0.8, 10)), "real_mean": 0.6}
    if judges:
        row.update(fd=float(np.mean(judges)), judges=[dict(row, fd=f, identity=f"scratch:{k}") for k, f in enumerate(judges)])
    folder.mkdir(parents=True, exist_ok=True)
    audit = {"n": n, "pixels": spaces} if memo else None
    if model_of:
        audit["model_of"] = model_of
    for cfg, halves in (guided or {1.5: None}).items():
        main = not guided or cfg == next(iter(guided))
        end = f"_cfg{cfg:g}" if guided else ""
        np.save(folder / f"samples{end}.npy", rng.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8))
        mine = dict(row)
        if halves:
            fds = [float(np.mean(pair)) for pair in halves]
            mine.update(fd=float(np.mean(fds)), judges=[dict(row, fd=f, fd_halves=pair, identity=f"scratch:{k}") for k, (f, pair) in enumerate(zip(fds, halves))])
        write(folder / ("metrics.json" if main else f"metrics{end}.json"), {
            "run": name, "data": data, "data_sha256": data, "samples_sha256": common.sha256(folder / f"samples{end}.npy"), "memorisation": audit if main else None,
            "protocol": dict(sampler="heun", steps=12, cfg=cfg, cfg_interval=[0, 1], labels="balanced", seed=0, weights="EMA", amp="none"),
            "encoders": {k: dict(mine, identity=f"{k}:1") for k in encoders}, "provenance": {"python": "3"}})
    if guided:
        write(folder / "sample.args.json", {"args": {"cfg": list(guided)}, "inputs": {}, "seconds": 1.0})
    write(folder / "train.args.json", {
        "args": dict(dict(data=str(folder.parent / "data"), model="SiT-T/2", process="flow", batch_size=128, lr=3e-3, ema=0.99, amp="none", steps=steps, seed=int(name.partition("-seed")[2] or 0)),
                     **dict(train_args)),
        "seconds": train_seconds + 1, "train_seconds": train_seconds, "images_seen": steps * 128, "epochs": steps * 128 / kept, "images_kept": kept})
    if points:
        write(folder / "trajectory.json", {"encoder": "scratch:1", "name": "scratch", "points": [
            dict(step=s, images_seen=128 * s, seconds=s / 7, fd=f, n=n) for s, f in points]})
    (folder / "last.pt").touch()
    Image.fromarray(rng.integers(0, 256, (114, 870), dtype=np.uint8)).save(folder / "nearest.png")
    return folder


def table(**rows):
    """{run: {figure: values}} of the figures given, for the answers."""
    blank = dict(kept=[150], steps=[700], worst_n=[24], seconds=[100.0], preparation=[0.0], preparation_shared=[0.0], ratio=[None], ratio_noise=[None], memo_n=[1000], memo_side=[297],
                 memo=[None], memo_heldout=[None], memo_baseline=[None], memo_alike=[None], memo_noise=[None], worst=[2.0], fd=[1.0])
    return {k.replace("_", "-"): {**blank, **v} for k, v in rows.items()}


# ---------------------------------------------------------------------------------------------- sentences
def test_cell():
    assert answers.cell([16.16]) == "16.2" and answers.cell([]) == answers.cell([None]) == "-"
    assert answers.cell([15.0, 16.0, 17.0]) == "16 ± 1" and answers.cell([1.0, None, 3.0]) == "2 ± 1.41"
    assert answers.cell([0.5, 0.7], "{:.2f}") == "0.60 ± 0.14" and answers.cell([1200.4], "{:,.0f}") == "1,200"


def test_effects_pair_the_seeds_that_both_runs_have():
    """A seed that one run lacks counts in neither; rows of an older report, without seeds, are paired in their order."""
    a, b = dict(seed=[0, 1, 2], fd=[1.1, 2.2, 3.3]), dict(seed=[2, 0], fd=[3.0, 1.0])
    change, half, seeds, judges = answers.measured_effect(a, b, "fd")
    assert seeds == 2 and judges == 1 and change == pytest.approx((0.1 + 0.3) / 2 / 2) and half == pytest.approx(12.706 * np.std([0.05, 0.15], ddof=1) / 2 ** 0.5, rel=1e-3)
    assert answers.measured_effect(dict(fd=[1.0, 2.0]), dict(fd=[1.0, 2.0]), "fd")[:3] == (0.0, 0.0, 2)
    assert answers.measured_effect(dict(seed=[0], fd=[1.0]), dict(seed=[1], fd=[1.0]), "fd") is None
    # Other judges are other figures.
    assert answers.measured_effect(dict(seed=[0], judged=dict(fd=[[1.0, 2.0]])), dict(seed=[0], fd=[1.0]), "fd") is None


def judged(*rows):
    """A row of the table with FD [seed][judge]."""
    return dict(seed=list(range(len(rows))), fd=[float(np.mean(row)) for row in rows], judged=dict(fd=[list(row) for row in rows]))


# Random at 1.0, and at what a run must stand for each outcome; full stands 30 % lower.
RANDOM = judged([0.99, 1.0], [1.0, 1.01], [1.01, 0.99])
LOWER, HIGHER, SAME = judged([0.87, 0.88], [0.88, 0.89], [0.89, 0.87]), judged([1.19, 1.2], [1.2, 1.21], [1.21, 1.19]), judged([0.98, 1.0], [1.02, 1.03], [1.01, 0.99])
NOISY = judged([0.5, 1.2], [1.5, 0.8], [0.9, 1.4])
FULL, CLOSE = judged([0.7, 0.71], [0.7, 0.69], [0.69, 0.7]), judged([0.99, 0.98], [1.0, 0.99], [1.0, 0.99])


@pytest.mark.parametrize("row, full, outcome, said", [
    (LOWER, FULL, "lower", "D2C Select against random, FD at equal steps: lower, -12 % ± "), (HIGHER, FULL, "higher", "D2C Select against random, FD at equal steps: higher, +20 % ± "),
    (SAME, FULL, "undetected", "D2C Select against random, FD at equal steps: a difference is not detectable below "),
    (NOISY, FULL, "unanswerable", "D2C Select against random, FD at equal steps: cannot be answered in this setting: it would show from "),
    (SAME, CLOSE, "unanswerable", "and the full run is 0.8 % lower than random"), (HIGHER, CLOSE, "higher", "higher, +20 % ± "), (SAME, None, "undetected", "is not detectable below "),
    (judged([0.8, 0.8]), judged([0.7, 0.7]), "one seed", "D2C Select against random, FD at equal steps: -20 %; one seed, so no claim"),
    (RANDOM, FULL, "identical", "D2C Select against random, FD at equal steps: the same figures to the last digit")])
def test_sentence_for_each_outcome(row, full, outcome, said):
    rows = dict(random=RANDOM, d2c_select=row, **({"full": dict(full, kept=[1500])} if full else {}))
    e, = answers.against_random(table(**rows))
    assert e.outcome == outcome and said in answers.sentence(e), answers.sentence(e)
    for word in ("no difference", "nothing", "No "):
        assert word not in answers.sentence(e) and word not in answers.summary([e])
    if outcome not in ("one seed", "identical"):
        assert "n=3 seeds x 2 judges" in answers.sentence(e)
        assert answers.summary([e]).startswith(f"{answers.OUTCOMES[outcome]}: D2C Select (")


def test_a_summary_names_the_runs_by_outcome():
    t = table(full=FULL, random=RANDOM, pruned=HIGHER, pruned_moderate=LOWER, d2c_select=NOISY, d2c_select_attach=HIGHER)
    said = answers.answer_random(answers.all_effects(t, 0.3))
    assert len(said) == 1
    assert re.sub(r"± \d+ %", "±", said[0]) == ("FD against random images: better: Pruning (moderate) (-12 % ±); worse: Pruning (+20 % ±), D2C Select + Attach (+20 % ±); "
                                             "cannot be answered in this setting: D2C Select (+5 % ±)")


@pytest.mark.parametrize("full, run, top, answerable", [(FULL, HIGHER, "-30 %", True), (FULL, NOISY, "-30 %", False), (CLOSE, SAME, "-0.8 %", False), (HIGHER, SAME, "+20 %", False)])
def test_headroom_stands_above_the_answers(full, run, top, answerable):
    t = table(full=full, random=RANDOM, pruned=run)
    line, _ = answers.headroom_lines(t, answers.all_effects(t, 0.3))
    assert f"change FD by {top}" in line and "**Detectable**" in line and ("cannot be answered" in line) != answerable
    assert ("no ceiling" in line) == top.startswith("+")                  # a full run that is worse than random bounds nothing


def test_headroom_by_hand():
    t = table(full=judged([0.5], [0.6]), random=judged([1.0], [1.2]), pruned=judged([1.0], [1.2]))
    assert answers.headroom(t, "random") == pytest.approx(0.5) and answers.headroom(t, "full") is None and answers.headroom(table(random=RANDOM), "random") is None


def test_an_old_report_of_one_judge_says_so(tmp_path):
    runs = [make_run(tmp_path / n, fd, kept=k) for n, fd, k in (("full", 1.0, 1500), ("random", 2.0, 150))]
    report.main([*map(str, runs), "--out", str(tmp_path / "r")])
    text = (tmp_path / "r" / "report.md").read_text()
    assert "One judge" in text and "Judges: 1." in text
    runs = [make_run(tmp_path / "b" / n, kept=k, judges=[fd, 1.1 * fd]) for n, fd, k in (("full", 1.0, 1500), ("random", 2.0, 150))]
    report.main([*map(str, runs), "--out", str(tmp_path / "s")])
    text = (tmp_path / "s" / "report.md").read_text()
    assert "One judge" not in text and "Judges: 2." in text and "judge 1" in (tmp_path / "s" / "details.md").read_text()


def test_best_guidance_is_chosen_on_the_other_half(tmp_path):
    """full: 1 wins in half 0 and 2 in half 1, by luck of one half each; random: 2 throughout. Worked out by hand."""
    halves = {"full": {1.0: [[1.0, 3.0]], 2.0: [[2.0, 2.0]]}, "random": {1.0: [[4.0, 4.0]], 2.0: [[3.0, 3.2]]}}
    runs = [make_run(tmp_path / n, kept=k, guided=halves[n]) for n, k in (("full", 1500), ("random", 150))]
    report.main([*map(str, runs), "--out", str(tmp_path / "r")])
    rows = json.loads((tmp_path / "r" / "report.json").read_text())["rows"]
    assert rows["full"]["best_fd"] == [pytest.approx((3.0 + 2.0) / 2)] and rows["full"]["best_guidance"] == [1.0, 2.0]
    assert rows["random"]["best_fd"] == [pytest.approx(3.1)] and rows["random"]["best_guidance"] == [2.0] and rows["full"]["fd"] == [2.0]
    text, details = ((tmp_path / "r" / f).read_text() for f in ("report.md", "details.md"))
    assert "| 2.5 (at 1 or 2) |" in text and "| 3.1 (at 2) |" in text and "guidance 1, reference" in text and "| guidance 1 | guidance 2 |" in details
    assert "Of random the strongest guidance tried was the best" in details + text
    (tmp_path / "random" / "metrics_cfg2.json").unlink()
    with pytest.raises(SystemExit):
        report.main([*map(str, runs), "--out", str(tmp_path / "r")])


@pytest.mark.parametrize("fds, said", [((1.0, 2.0, 3.0), False), ((2.0, 1.0, 3.0), False), ((3.0, 2.0, 1.0), True)])
def test_a_best_guidance_at_the_edge_is_said_to_be_one(fds, said, tmp_path):
    runs = [make_run(tmp_path / "full", kept=1500, guided={cfg: [[fd, fd]] for cfg, fd in zip((1.0, 1.5, 2.0), fds)})]
    report.main([*map(str, runs), "--out", str(tmp_path / "r")])
    text = "".join((tmp_path / "r" / name).read_text() for name in ("report.md", "details.md"))
    assert ("Of full the strongest guidance tried was the best" in text) == said


@pytest.mark.parametrize("short, briefly, random, verdict", [
    (0.99, 1.2, 1.3, "holds"), (0.99, 1.2, 0.9, "does not hold"), (1.2, 1.4, 1.4, "does not hold"), (0.99, 0.99, 1.3, "cannot be answered")])
def test_speed_up_at_equal_epochs(short, briefly, random, verdict):
    """Within 5 % of the full run at its end, and better than full data and random images trained as briefly."""
    def row(fd, **more):
        return judged([fd, fd * 1.002], [fd * 1.001, fd], [fd * 1.001, fd * 1.002]) | more
    t = table(full=row(1.0, kept=[1500], steps=[1000]), full_short=row(briefly, kept=[1500], steps=[100]), random_short=row(random, steps=[100]), pruned_short=row(short, steps=[100]))
    (got, text), = answers.equal_epochs(t)
    assert got.startswith(verdict) and text.startswith(f"A speed-up of 10x at equal epochs (pruned-short, 100 steps) {verdict}") and "full at its end" in text
    assert answers.answer_cost(t, {}, [(got, text)]) == [text]
    assert answers.equal_epochs(table(full={}, pruned_short={})) == []


def test_early_quality_is_a_figure_of_its_own(tmp_path):
    """The mean height of the trajectory over the stated share of training, by hand: 100..200 of 1 000 steps at --area 0.2."""
    for n, k, first in (("full", 1500, 3.0), ("random", 150, 5.0)):
        make_run(tmp_path / n, kept=k, steps=1000, points=[(100, first), (200, first - 2), (1000, 1.0)])
    report.main([str(tmp_path / "full"), str(tmp_path / "random"), "--out", str(tmp_path / "r"), "--area", "0.2"])
    rows = json.loads((tmp_path / "r" / "report.json").read_text())["rows"]
    assert rows["full"]["area"] == [2.0] and rows["random"]["area"] == [4.0]


def test_costs_are_shared_by_the_runs_that_use_a_thing():
    from types import SimpleNamespace as S
    runs = [S(costs={"scorer": ("network", 90.0), "a": ("scores", 2.0)}), S(costs={"scorer": ("network", 90.0)}), S(costs={"scorer": ("network", 90.0), "b": ("tokens", None)}), S(costs={})]
    assert [report.amortised(run, runs) for run in runs] == [32.0, 30.0, None, 0]


def test_a_subset_is_compared_with_random_of_its_own_size_only():
    t = table(random=dict(kept=[5000], fd=[4.0]), random_04=dict(kept=[20000]), d2c_random=dict(kept=[1000], fd=[9.0]), d2c_select=dict(kept=[1000], fd=[4.5]),
              pruned=dict(kept=[5000], fd=[2.0]), d2c_select_attach=dict(kept=[1000], fd=[3.0]), random_attach=dict(kept=[1000], fd=[6.0]))
    t["random-0.4"], t["pruned-0.4"] = t.pop("random-04") | dict(fd=[2.0]), t["pruned"] | dict(kept=[20000], fd=[1.0])
    got = {(e.who, e.whom): round(e.change, 2) for e in answers.against_random(t)}
    assert got == {("Pruning", "random"): -0.5, ("Pruning 0.4", "random-0.4"): -0.5, ("D2C Select", "d2c-random"): -0.5, ("D2C Select + Attach", "d2c-random"): -0.67}
    source = [(e.who, e.whom, round(e.change, 2)) for e in answers.of_sources(t)]
    assert source == [("Selection alone", "d2c-random", -0.5), ("Attaching alone", "d2c-random", -0.33), ("Both", "d2c-random", -0.67),
                      ("Selection on top of attachments", "attachments on random images", -0.5)]
    nothing = answers.all_effects(table(random=dict(kept=[10]), pruned={}), 0.3)
    assert answers.answer_random(nothing) == [] and answers.answer_source(nothing) == [] and answers.of_sources(table(random={}, d2c_select={})) == []


def test_unequal_steps_are_said():
    t = table(random=dict(steps=[700], fd=[1.0]), pruned=dict(steps=[1400], fd=[0.5]))
    e, = answers.against_random(t)
    assert answers.sentence(e) == "Pruning against random, FD at 1,400 steps against 700: -50 %; one seed, so no claim"


def test_dro_is_judged_by_fd_and_by_the_worst_class():
    t = table(pruned=dict(worst=[4.0, 4.1], fd=[1.0, 1.01]), pruned_dro=dict(worst=[2.0, 2.1], fd=[1.2, 1.21]), pruned_dro_permuted=dict(worst=[4.0, 4.1], fd=[1.0, 1.01]))
    got = [(e.who, e.whom, e.what, e.outcome) for e in answers.of_weights(t)]
    assert got == [("DRO reweighting", whom, what, outcome) for whom in ("the same images unweighted", "the weights of other classes")
                   for what, outcome in (("FD", "higher"), ("worst-class FD (n=24 a class)", "lower"))]
    said, = answers.answer_random(dict(answers.all_effects(t, 0.3)))
    assert said.startswith("Class weights: better: DRO reweighting against the same images unweighted, worst class (-49 % ±")
    assert len(answers.of_weights(table(pruned=dict(worst=[None]), pruned_dro=dict(worst=[None])))) == 1


@pytest.mark.parametrize("m, held, base, noise, verdict", [
    (0.81, 0.52, 0.51, 1.0, "copies"), (0.65, 0.52, 0.51, 1.0, "leans towards copying"), (0.55, 0.52, 0.51, 1.0, "does not memorise beyond its controls"),
    (0.65, 0.50, 0.60, 1.0, "does not memorise beyond its controls"),             # a subset nearer to everything: the full model's samples are the zero
    (0.65, 0.70, None, 1.0, "cannot be judged"), (0.65, 0.50, 0.50, 0.6, "cannot be judged"),
    (0.53, None, None, 0.6, "shows no sign of copying"), (0.59, None, None, 0.6, "copies"), (0.57, None, None, 0.6, "leans towards copying"),
    (0.55, None, None, 0.6, "leans towards copying"),                             # half way to a low ceiling, within two standard errors of either
    (0.55, None, None, 0.53, "has too few held-out images or samples to tell")])
def test_verdict_on_memorising(m, held, base, noise, verdict):
    answer = memorising(pruned=dict(memo=[m], memo_heldout=[held], memo_baseline=[base], memo_noise=[noise]))
    assert answer.startswith(f"pruned {verdict}") and f"{m:.2f} of the samples" in answer and f"{noise:.2f}" in answer
    assert ("standard error 0.03" in answer) == (held is None)
    assert ("samples of the full model" in answer) == (base is not None) and ("than to held-out ones" in answer) == (held is None)


def memorising(**rows):
    """The whole sentence on one run."""
    (_, said), = answers.memorising(table(**rows)).values()
    return said


def test_without_held_out_images_the_controls_that_there_are_count():
    """A data folder without a held-out split: the full model's samples are the control, and nothing is said of held-out images."""
    row = dict(memo=[0.90], memo_baseline=[0.85], memo_noise=[1.0], memo_of=["a subset"])
    said = memorising(pruned=row)
    assert said.startswith("pruned cannot be judged, images that are no copies score almost") and "samples of the full model 0.85" in said and "held-out" not in said
    assert memorising(pruned=dict(row, memo_baseline=[0.5])).startswith("pruned copies")
    alone = memorising(pruned=dict(row, memo_baseline=[None]))
    assert alone.startswith("pruned cannot be judged, there is no control") and "(no control, noisy copies" in alone


def test_runs_are_named_by_verdict():
    row = dict(memo=[0.5], memo_heldout=[0.5], memo_baseline=[0.5], memo_noise=[1.0])
    said = answers.answer_memorising(answers.memorising(table(random=row, pruned=dict(row, memo=[0.9]), d2c_select=row)))
    assert said == ["random, d2c-select: does not memorise beyond its controls; pruned: copies"] and answers.answer_memorising({}) == []


def test_few_images_that_are_alike_make_a_wide_zero():
    row = dict(memo=[0.68], memo_heldout=[0.5], memo_baseline=[0.5], memo_alike=[0.55], memo_noise=[1.0])
    assert memorising(pruned=dict(row, memo_alike_n=[1000])).startswith("pruned leans towards copying")
    assert memorising(pruned=dict(row, memo_alike_n=[30])).startswith("pruned does not memorise beyond its controls")


def test_a_model_of_typical_images_does_not_copy_by_drawing_typical_ones():
    """CIFAR-10 at 8 x 8, Gaussian pruning: 0.90, and 0.85 for held-out images of that kind, which no model has seen."""
    row = dict(memo=[0.90], memo_heldout=[0.71], memo_baseline=[0.74], memo_noise=[1.0])
    blind = memorising(pruned=row)
    seeing = memorising(pruned=dict(row, memo_alike=[0.85]))
    assert blind.startswith("pruned copies") and seeing.startswith("pruned cannot be judged, images that are no copies score") and "held-out images most like its own 0.85" in seeing


def test_few_samples_make_no_verdict_of_copying():
    row = dict(memo=[0.62], memo_heldout=[0.5], memo_baseline=[0.5], memo_noise=[1.0], ratio=[0.06], ratio_noise=[0.97])
    many = memorising(random=dict(row, memo_n=[1000]))
    few = memorising(random=dict(row, memo_n=[40]))
    assert "leans towards copying" in many and "does not memorise" in few and "6 %, noisy copies 97 %" in many


def points(*fds):
    return [dict(step=100 * k, images_seen=12800 * k, seconds=10.0 * k, fd=f, n=100) for k, f in enumerate(fds, 1)]


def test_reach_is_the_first_crossing_of_the_mean_over_seeds():
    from types import SimpleNamespace as S
    runs = [S(name="full", trajectory=points(3, 2, 1.04, 1.2, 0.8)), S(name="full", trajectory=points(3, 2, 1.0, 1.2, 1.2)),        # last on average: 1
            S(name="d2c", trajectory=points(1.05, 2, 1)), S(name="d2c", trajectory=points(4, 0.1, 1.0)), S(name="random", trajectory=points(3, 1.06)),
            S(name="random", trajectory=points(1.0, 1.06, 0.5)), S(name="none", trajectory=[])]
    reached = answers.reach(runs)
    assert list(reached) == ["full", "d2c", "random"] and reached["random"] == (None, dict(step=200, n=100, images_seen=25600, seconds=20, fd=pytest.approx(1.06)))
    want = {"full": (300, 1.02), "d2c": (200, 1.05)}                  # the full run reaches itself, though one of its seeds ends 20 % above the mean
    assert all(reached[k][0] == dict(step=s, n=100, images_seen=128 * s, seconds=s / 10, fd=pytest.approx(fd)) for k, (s, fd) in want.items())
    assert answers.reach(runs[2:]) == {}


def test_costs_and_speed_up_are_stated_for_each_run():
    at = dict(step=300, images_seen=38400, seconds=30.0, n=500)
    t = table(full={}, d2c_select=dict(preparation=[30.0], preparation_shared=[10.0]), random={})
    out = answers.cost_of_each(t, reached := {"full": (at, at), "d2c-select": (dict(step=100, images_seen=12800, seconds=10.0, n=500), at), "random": (None, dict(at, fd=1.5))})
    assert out == ["full: within 5 % of the full run's final FD (n=500) after 300 steps, 38,400 images, 30 s",
                   "d2c-select: 30.0 s of preparation (10.0 s shared) for 100 s of training",
                   "d2c-select: within 5 % of the full run's final FD (n=500) after 100 steps, 12,800 images, 10 s (speed-up 3.00x, with preparation 0.75x)",
                   "random: the full run's final FD (within 5 %) was not reached; its best is 1.5 after 300 steps (n=500)"]
    assert answers.answer_cost(t, {}, []) == ["Preparation takes 30 s a run (10 s where runs share it) beside 100 s of training"]
    assert answers.answer_cost(t, reached, [])[1] == ("Within 5 % of the full run's final FD at equal steps: full after 300 steps; d2c-select after 100 steps (speed-up 3.00x, with "
                                                     "preparation 0.75x); not reached: random")


# ---------------------------------------------------------------------------------------------- preparation
@pytest.fixture
def prepared(tmp_path):
    """Records of every stage: full run 100 s, features 7 + 3 s, DRO 20 s, difficulty 11 s, text 2 s, visual 5 s, scratch network 13 s."""
    out, full = tmp_path, str(tmp_path / "full" / "last.pt")
    make_run(out / "full", train_seconds=100.0)
    (out / "data").mkdir()
    torch.save({"seconds": 13.0}, out / "data" / "scratch.pt")
    prune = lambda name, **kw: write(out / name / "prune" / "prune.args.json", {"args": kw, "seconds": 12.0, "seconds_features": 7.0, "seconds_scores": 3.0})  # noqa: E731
    prune("ddae", score="gaussian", surrogate="ddae", weights=full)
    prune("scratch", score="herding", surrogate="scratch", weights=None)
    prune("el2n", score="el2n", surrogate="scratch", weights=None)
    write(out / "random" / "prune" / "prune.args.json", {"args": dict(score="random", surrogate="scratch", weights=None), "seconds": 0.5, "seconds_features": 0, "seconds_scores": 0.25})
    write(out / "dro" / "reweight" / "reweight.args.json", {"args": dict(reference=full), "seconds": 20.0})
    attach = dict(reference=full, select="interval", indices=None, visual="ddae", visual_weights=None)
    write(out / "d2c" / "attach" / "attach.args.json", {"args": attach, "seconds": 25.0, "seconds_difficulty": 11.0, "seconds_text": 2.0, "seconds_visual": 5.0})
    write(out / "rattach" / "attach" / "attach.args.json", {"args": dict(attach, select=None, indices=str(out / "random/prune/keep.npy")), "seconds": 9.0,
                                                          "seconds_difficulty": None, "seconds_text": 2.0, "seconds_visual": 5.0})
    write(out / "sattach" / "attach" / "attach.args.json", {"args": dict(attach, visual="scratch"), "seconds": 9.0,
                                                          "seconds_difficulty": 11.0, "seconds_text": 2.0, "seconds_visual": 5.0})
    for stage in ("ddae/prune", "scratch/prune", "el2n/prune", "random/prune", "dro/reweight", "d2c/attach"):
        for name in ("keep.npy", "scores.npy", "features.npy", "weights.npy", "difficulty.npy"):
            (out / stage / name).touch()
    (out / "own.npy").touch()
    torch.save({"seconds": 40.0, "step": 3}, out / "full" / "step_0000003.pt")

    def reuse(name, script, **args):
        seconds = dict(seconds_difficulty=11.0) if script == "attach" else dict(seconds_features=7.0 * ("features" in args), seconds_scores=0.5)
        write(out / name / script / f"{script}.args.json", {"args": args, "seconds": 1.0, **seconds})
        (out / name / script / "keep.npy").touch()

    reuse("cut", "prune", score=None, scores=str(out / "ddae/prune/scores.npy"), surrogate="inception", weights=None)
    reuse("recut", "prune", score=None, scores=str(out / "cut/prune/scores.npy"), surrogate="inception", weights=None)
    (out / "cut/prune/scores.npy").touch()
    reuse("again", "prune", score="herding", features=str(out / "ddae/prune/features.npy"), surrogate="inception", weights=None)
    reuse("foreign", "prune", score=None, scores=str(out / "own.npy"), surrogate="inception", weights=None)
    reuse("early", "prune", score="gaussian", surrogate="ddae", weights=str(out / "full/step_0000003.pt"))
    reuse("hard", "attach", select="hard", reference=None, difficulty=str(out / "d2c/attach/difficulty.npy"))
    torch.save({"ema": {}, "args": argparse.Namespace(model="SiT-XL/2")}, out / "official.pt")            # as the published training checkpoints are
    reuse("official", "attach", select="interval", reference=str(out / "official.pt"), official="sit")
    write(out / "open" / "train.args.json", {"args": {}, "seconds": None})
    (out / "open" / "last.pt").touch()
    reuse("unready", "prune", score="gaussian", surrogate="ddae", weights=str(out / "open/last.pt"))
    reuse("lost", "prune", score="gaussian", surrogate="ddae", weights="elsewhere/full/last.pt")
    write(out / "part" / "reweight" / "reweight.args.json", {"args": dict(reference=full), "seconds": None})
    (out / "part/reweight/weights.npy").touch()
    return lambda **args: report.preparation(report.costs_by_thing({"args": dict({"data": str(out / "data")}, **{k: str(out / v) for k, v in args.items()})}))


@pytest.mark.parametrize("args, seconds", [
    ({}, 0), (dict(indices="random/prune/keep.npy"), 0.25), (dict(indices="el2n/prune/keep.npy"), 10), (dict(indices="scratch/prune/keep.npy"), 10 + 13),
    (dict(indices="ddae/prune/keep.npy"), 10 + 100),
    (dict(indices="ddae/prune/keep.npy", weights="dro/reweight/weights.npy"), 10 + 20 + 100),                  # the full run served twice, and was trained once
    (dict(indices="d2c/attach/keep.npy"), 11 + 100),                                                          # select only: no attachments
    (dict(attach="d2c/attach"), 11 + 2 + 5 + 100), (dict(attach="sattach/attach"), 11 + 2 + 5 + 100 + 13),
    (dict(attach="rattach/attach"), 2 + 5 + 100 + 0.25),                                                      # random images, but the visual encoder was trained
    (dict(indices="cut/prune/keep.npy"), 0.5 + 10 + 100), (dict(indices="recut/prune/keep.npy"), 0.5 + 0.5 + 10 + 100),     # scores used again
    (dict(indices="again/prune/keep.npy"), 0.5 + 7 + 100), (dict(indices="hard/attach/keep.npy"), 11 + 100),
    (dict(indices="early/prune/keep.npy"), 0.5 + 40), (dict(indices="early/prune/keep.npy", init="full/last.pt"), 0.5 + 100),   # to that checkpoint only
    (dict(init="full/last.pt"), 100), (dict(init="full/last.pt", indices="ddae/prune/keep.npy"), 10 + 100)])
def test_preparation_counts_everything_once(prepared, args, seconds):
    assert sum(prepared(**args).values()) == pytest.approx(seconds)


@pytest.mark.parametrize("path", ["own.npy", "foreign/prune/keep.npy", "official/attach/keep.npy"])
def test_a_file_without_record_has_unknown_cost(prepared, path):
    assert report.total(prepared(indices=path)) is None


@pytest.mark.parametrize("args, words", [
    (dict(indices="gone/keep.npy"), ["gone/keep.npy", "from the folder where the runs were made"]), (dict(indices="lost/prune/keep.npy"), ["elsewhere/full/last.pt"]),
    (dict(init="nothing/last.pt"), ["nothing/last.pt"]), (dict(indices="unready/prune/keep.npy"), ["open", "has not finished"]),
    (dict(weights="part/reweight/weights.npy"), ["part/reweight", "has not finished"])])
def test_unfinished_or_lost_preparation_is_refused(prepared, args, words):
    with pytest.raises(common.UserError) as e:
        prepared(**args)
    assert all(w in str(e.value) for w in words)


def test_unknown_preparation_in_the_report(tmp_path):
    (tmp_path / "keep.npy").touch()
    runs = [make_run(tmp_path / "full", 1.0, kept=1500, points=trail(1.0)), make_run(tmp_path / "mine", 1.0, points=trail(0.9), train_args=dict(indices=str(tmp_path / "keep.npy")))]
    report.main([*map(str, runs), "--out", str(tmp_path / "r")])
    text = (tmp_path / "r" / "report.md").read_text()
    row, = [line for line in text.splitlines() if line.startswith("| mine | 150")]
    details = (tmp_path / "r" / "details.md").read_text()
    assert row.endswith("| 100 | ? |") and "speed-up" in text and "with preparation" not in text + details and "preparation is unknown" in details
    assert json.loads((tmp_path / "r" / "report.json").read_text())["rows"]["mine"]["preparation"] == [None]


def test_resampling_is_a_role_of_its_own_and_budgets_may_begin_with_a_point():
    assert answers.family("pruned-.4") == "pruned" and answers.family("pruned-0.4") == "pruned" and answers.family("pruned-dro-resample-.4") == "pruned-dro-resample"
    assert answers.family("random-attach") == "random-attach"
    t = table(random=dict(fd=[2.0]), pruned=dict(fd=[None], worst=[4.0]), pruned_dro=dict(fd=[None], worst=[3.0]), pruned_dro_resample=dict(fd=[1.0], worst=[2.0]))
    got = [(e.who, e.whom, e.what, round(e.change, 2)) for e in (*answers.against_random(t), *answers.of_weights(t))]
    assert ("Pruning + DRO resampling", "random", "FD", -0.5) in got
    assert ("DRO resampling", "the same images unweighted", "worst-class FD (n=24 a class)", -0.5) in got
    assert ("DRO resampling", "DRO weights in the loss", "worst-class FD (n=24 a class)", -0.33) in got


def test_worst_classes_at_different_n_are_not_compared():
    assert not any("worst" in e.what for e in answers.of_weights(table(pruned=dict(worst=[4.0], worst_n=[24]), pruned_dro=dict(worst=[2.0], worst_n=[48]))))


def test_samples_of_other_weights_are_refused(tmp_path, capsys):
    run = make_run(tmp_path / "full")
    m = json.loads((run / "metrics.json").read_text())
    m["protocol"]["checkpoint_step"] = 700
    write(run / "metrics.json", m)
    assert report.read_run(run).name == "full"
    m["protocol"]["checkpoint_step"] = 500
    write(run / "metrics.json", m)
    refused(capsys, [run], f"{run}: samples are of step 500, the run stands at 700; draw and evaluate again")


def test_out_and_processes_are_checked_first(tmp_path, capsys, monkeypatch):
    run, out = make_run(tmp_path / "full"), tmp_path / "file"
    out.write_text("mine")
    for path in (out, out / "below"):
        with pytest.raises(SystemExit) as e:
            report.main([str(run), "--out", str(path)])
        err = capsys.readouterr().err
        assert e.value.code == 2 and str(path) in err and "a file stands" in err and err.count("\n") == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(common.UserError, match="report.py runs in one process"):                # unwrapped: a rank that fails ends its process
        report.main.__wrapped__([str(run), "--out", str(tmp_path / "r")])
    assert not (tmp_path / "r").exists()


# ---------------------------------------------------------------------------------------------- the whole report
def trail(last, start=6.0):
    return [(s, last + (start - last) * math.exp(-s / 150)) for s in range(100, 800, 100)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Seven runs of three seeds with trajectories, and the report on them."""
    out, folders = tmp_path_factory.mktemp("whole"), []
    final = dict(zip(SEVEN, (1.0, 2.0, 1.6, 1.9, 1.95, 1.7, 0.9)))
    for seed in range(3):
        for name in SEVEN:
            full, fd = name == "full", final[name] * (1 + 0.02 * seed)
            args = {} if name in ("full", "random") else dict(attach=str(out / "d2c-select-attach" / "attach"))
            folders.append(make_run(out / (name + f"-seed{seed}" * (seed > 0)), fd, kept=1500 if full else 150, memo=(0.53, None, None, 0.6) if full else (0.7, 0.5, 0.5, 1.0),
                                    points=trail(fd), train_args=args, circular="attach" in name, worst=fd * 2, encoders=("scratch", "pixels")))
    write(out / "d2c-select-attach" / "attach" / "attach.args.json", {"args": dict(reference=str(out / "full/last.pt"), select="interval", visual="ddae"), "seconds": 9.0,
                                                                       "seconds_difficulty": 11.0, "seconds_text": 2.0, "seconds_visual": 5.0})
    report.main([*map(str, folders), "--out", str(out / "report")])
    return out


def test_table_groups_seeds(whole):
    text = (whole / "report" / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| full |", "| random |", "| d2c-select-attach |"))]
    assert rows[0].startswith("| full | 1,500 | 700 | 1.02 ± 0.02 | - | 2.04 ± 0.04 |") and rows[1].startswith("| random | 150 | 700 | 2.04 ± 0.04 | 0.2 ± 0 |")
    assert rows[0].endswith("| 100 ± 0 | 0 ± 0 |") and "-seed1 |" not in text and "Seeds: 3" in text
    stored = json.loads((whole / "report" / "report.json").read_text())
    assert stored["judge"] == "scratch" and stored["rows"]["random"]["fd"] == pytest.approx([2.0, 2.04, 2.08])


def test_answers_and_warnings_stand_in_the_page(whole):
    text, details = ((whole / "report" / f).read_text() for f in ("report.md", "details.md"))
    assert "- D2C Select + Attach against random, FD at equal steps: lower, -55 % ± 3 %, n=3 seeds." in details
    assert "Is it better than random?**\n   - FD against random images: better: " in text and "**Headroom**: all images instead of `random` change FD by -50 %. **Detectable**" in text
    assert "- random: the full run's final FD (within 5 %) was not reached; its best is 2." in details
    assert "- d2c-select-attach: within 5 % of the full run's final FD (n=" in details and "- full: within 5 % of the full run's final FD (n=" in details
    assert "not reached: random" in text and "[details.md](details.md)" in text
    assert "Warning" in text and "random-attach" in text.split("Warning", 1)[1].splitlines()[0] and "Second judge" in details
    assert "Neither is comparable with the column FD (n=1,000)" in details and "score 0.13 at n=297" in details
    for bad in ("None", "nan", ";  ", "; For", "..", "{"):
        assert bad not in (text + details).replace("seed None", ""), bad


def test_the_report_is_read_in_a_minute(whole):
    """Seven runs, three seeds, every question: at most 340 words without the table, five answers of at most three sentences."""
    text = (whole / "report" / "report.md").read_text()
    words = [word for line in text.splitlines() if not line.startswith("|") for word in line.split() if re.search("[a-z]", word)]
    assert len(words) < 340, len(words)
    for block in re.split(r"\n\d\. ", text.split("## The five questions")[1])[1:]:
        assert block.split("## ")[0].count("   - ") <= 3


def test_pictures_are_written_and_show_something(whole):
    for name in ("frontier.png", "samples.png", "per_class.png", "nearest.png"):
        assert f"]({name})" in (whole / "report" / "report.md").read_text()
        with Image.open(whole / "report" / name) as im:
            x = np.asarray(im.convert("L"))
        assert x.shape[1] > 900 and x.std() > 20 and (x[[0, -1]] > 250).all(), name                            # nothing runs over the edge


def test_sample_sheet_shows_the_samples(tmp_path):
    """The strip of a run is its first 20 samples: an all-white run is white but for frame and name, a black one is not."""
    for name, value in (("full", 0), ("random", 255)):
        make_run(tmp_path / name)
        np.save(tmp_path / name / "samples.npy", np.full((40, 8, 8, 1), value, np.uint8))
        made = json.loads((tmp_path / name / "metrics.json").read_text())
        write(tmp_path / name / "metrics.json", dict(made, samples_sha256=common.sha256(tmp_path / name / "samples.npy")))
    comparison.sample_sheet([report.read_run(tmp_path / n) for n in ("full", "random")], tmp_path / "s.png")
    x = np.asarray(Image.open(tmp_path / "s.png").convert("L"))
    dark = (x < 60).mean(1)
    assert dark[: len(x) // 2].max() > 0.5 and dark[len(x) // 2 + 10: -10].mean() < 0.05


def test_one_seed_without_trajectories(tmp_path):
    runs = [make_run(tmp_path / n, fd, kept=k) for n, fd, k in (("full", 1.0, 1500), ("random", 2.0, 150), ("d2c-select", 1.5, 150))]
    report.main([*map(str, runs), "--out", str(tmp_path / "r")])
    text = (tmp_path / "r" / "report.md").read_text()
    assert "one seed, so no claim" in text and "better:" not in text and "worse:" not in text and "speed-up" not in text and "not reached" not in text
    assert Image.open(tmp_path / "r" / "frontier.png").width > 500
    assert "The runs that would answer it are not here (RUNS, REPORT=full)." in text


def test_runs_without_audit_classes_or_full_run(tmp_path):
    runs = [make_run(tmp_path / n, memo=None, per_class=False) for n in ("mine", "random")]
    (runs[0] / "nearest.png").unlink(), (runs[1] / "nearest.png").unlink()
    report.main([*map(str, runs), "--out", str(tmp_path / "r")])
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["details.md", "frontier.png", "report.json", "report.md", "samples.png"]


def test_a_trajectory_that_is_not_the_run_s_is_left_out(tmp_path):
    """The run was prolonged, or drawn otherwise, after its trajectory: its old points would answer for the new run."""
    full, random = make_run(tmp_path / "full", points=trail(1.0)), make_run(tmp_path / "random", points=[(100, 0.9), (600, 0.9)])
    report.main([str(full), str(random), "--out", str(tmp_path / "r")])
    text = (tmp_path / "r" / "report.md").read_text()
    assert "the trajectory of random ends at step 600, the run at 700: left out" in text.lower() and "random: within" not in text
    made = json.loads((full / "trajectory.json").read_text())
    write(full / "trajectory.json", dict(made, key={"settings": {"cfg": 4.0, "steps": 12}}))
    report.main([str(full), "--out", str(tmp_path / "r")])
    text = (tmp_path / "r" / "report.md").read_text()
    assert "was drawn with another cfg than the samples" in text and "within 5 %" not in text


def test_two_folders_of_one_name_are_no_seeds(tmp_path, capsys):
    full, twin = make_run(tmp_path / "full"), make_run(tmp_path / "b" / "full")
    refused(capsys, [full, twin], str(twin), "have the same seed, 0")
    for folder, change, words in (("c", dict(train_args=dict(seed=1, lr=1e-4)), "differ in lr"), ("d", dict(train_args=dict(seed=1), steps=800), "differ in images_seen"),
                                  ("e", dict(train_args=dict(seed=1), kept=90), "differ in images_kept")):
        refused(capsys, [full, make_run(tmp_path / folder / "full", **change)], words)


def test_what_training_differs_in_is_said(tmp_path):
    runs = [make_run(tmp_path / "full"), make_run(tmp_path / "random", train_args=dict(model="unet-tiny", ema=0.5))]
    report.main([*map(str, runs), "--out", str(tmp_path / "r")])
    text = (tmp_path / "r" / "report.md").read_text()
    assert 'Training differs in model: "SiT-T/2" (full, ...), "unet-tiny" (random, ...)' in text and "Training differs in ema: 0.99" in text and "differs in lr" not in text


def test_points_of_another_judge_are_left_out(tmp_path):
    runs = [make_run(tmp_path / n, encoders=("scratch", "pixels"), points=trail(1.0)) for n in ("full", "random")]
    report.main([*map(str, runs), "--out", str(tmp_path / "r"), "--encoder", "pixels"])
    text = (tmp_path / "r" / "report.md").read_text()
    assert "was scored by scratch, not by this report's judge pixels" in text and "within 5 %" not in text


def test_different_sampling_is_noted(tmp_path):
    runs = [make_run(tmp_path / n) for n in ("full", "random")]
    m = json.loads((runs[1] / "metrics.json").read_text())
    m["protocol"]["cfg"] = 4.0
    write(runs[1] / "metrics.json", m)
    report.main([*map(str, runs), "--out", str(tmp_path / "r")])
    assert "Sampling differs in cfg: 1.5 (full, ...), 4.0 (random, ...)" in (tmp_path / "r" / "report.md").read_text()


def refused(capsys, runs, *words, extra=()):
    out = runs[0].parent / "refused"
    with pytest.raises(SystemExit) as e:
        report.main([*map(str, runs), "--out", str(out), *extra])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and all(w in err for w in words), err
    assert not out.exists()


def test_refusals(tmp_path, capsys):
    full = make_run(tmp_path / "full", points=trail(1.0))
    bare = make_run(tmp_path / "bare")
    (bare / "metrics.json").unlink()
    refused(capsys, [full, bare], str(bare / "metrics.json"), f"evaluate.py --runs {bare}")
    refused(capsys, [full, make_run(tmp_path / "cifar", data="cifar10")], "digits", "cifar10", "one report per data set")
    refused(capsys, [full, make_run(tmp_path / "few", n=500)], "(1000, 500)", "--num")
    refused(capsys, [full, make_run(tmp_path / "pix", encoders=("pixels",))], str(tmp_path / "pix"), "--encoder scratch")
    refused(capsys, [full], "pixels", extra=("--encoder", "pixels"))
    short = make_run(tmp_path / "short", points=[(700, 2.0)])
    points = json.loads((short / "trajectory.json").read_text())
    points["points"][0]["n"] = 10
    write(short / "trajectory.json", points)
    refused(capsys, [full, short], "trajectory.json", "--trajectory-num")
    open_end = make_run(tmp_path / "open")
    write(open_end / "train.args.json", dict(json.loads((open_end / "train.args.json").read_text()), seconds=None))
    refused(capsys, [full, open_end], str(open_end), "no finished train.args.json")
    (bare / "metrics.json").write_text("{")
    refused(capsys, [bare], str(bare / "metrics.json"), "JSON")
    drawn_again = make_run(tmp_path / "again")
    np.save(drawn_again / "samples.npy", np.zeros((40, 8, 8, 1), np.uint8))
    refused(capsys, [full, drawn_again], str(drawn_again / "metrics.json"), "other samples")
    gone = make_run(tmp_path / "gone")
    (gone / "samples.npy").unlink()
    refused(capsys, [full, gone], str(gone / "samples.npy"))


def test_seconds_count_every_process():
    """Wall time of 8 processes is 8 times as dear; an old record without the number counts as one, an unknown figure stays unknown."""
    assert common.device_seconds({"provenance": {"processes": 8}}, 2.5) == 20.0 and common.device_seconds({"provenance": {}}, 2.5) == 2.5
    assert common.device_seconds(None, 2.5) == 2.5 and common.device_seconds({"provenance": {"processes": 8}}, None) is None


def test_upstream_names_each_step_with_its_role(prepared, tmp_path):
    """Who chose, who weighted, to whom it is aligned and what it started from; without a name for the run only records are read."""
    args = dict(data=str(tmp_path / "data"), indices=str(tmp_path / "ddae/prune/keep.npy"), weights=str(tmp_path / "dro/reweight/weights.npy"),
                attach=str(tmp_path / "sattach/attach"), init=str(tmp_path / "nothing/last.pt"))
    steps = list(common.upstream({"args": args}))
    assert [(s.what, s.script, s.role, s.encoder) for s in steps] == [
        ("features and scores", "prune", "chose", "ddae"), ("surrogate network (full)", "train", "chose", ""), ("DRO proxy", "reweight", "weighted", ""),
        ("reference network (full)", "train", "weighted", ""), ("difficulty", "attach", "chose", "ddae"), ("scorer network (full)", "train", "chose", ""),
        ("attachments", "attach", "aligned", "scratch"), ("scratch network", "", "aligned", ""), ("start weights (nothing)", "train", "started", "")]
    assert len({s.key for s in steps if s.what.endswith("(full)")}) == 1                     # one network, trained once
    with pytest.raises(common.UserError, match="nothing/last.pt"):
        list(common.upstream({"args": args}, "mine"))


def test_run_all_asks_for_the_names_of_runs(capsys):
    with pytest.raises(SystemExit) as stop:
        report.main(["--list", "runs"])
    names = capsys.readouterr().out.split()
    assert stop.value.code == 0 and {*SEVEN, "pruned-dro-resample", "pruned-dro-permuted", "full-short", "random-short", "pruned-short"} == set(names) == set(report.RUNS)


def test_an_audit_that_one_seed_lacks_is_that_of_the_others():
    row = dict(memo=[0.8, None], memo_heldout=[0.5, None], memo_baseline=[0.5, None], memo_noise=[1.0, None], memo_n=[1000, None], memo_side=[297, None])
    assert memorising(pruned=row).startswith("pruned copies: 0.80")


def test_titles_of_runs():
    assert answers.title("pruned-0.4") == "Pruning 0.4" and answers.title("pruned-moderate-0.4") == "Pruning (moderate) 0.4" and answers.title("pruned-moderate") == "Pruning (moderate)"
    assert answers.title("pruned-dro-0.1") == "Pruning + DRO weights 0.1" and answers.title("random-0.4") is None and answers.title("full") is None
    assert answers.family("random-5e-2") == "random" and answers.title("pruned-5e-2") == "Pruning 5e 2"


def test_the_fifth_question_is_answered_by_other_reports(tmp_path, capsys):
    """Two settings worked out by hand. In b D2C keeps fewer images than pruning and has a random row of its own: each row counts against that of its size."""
    fds = {"a": dict(full=0.3, random=0.5, pruned=1.0, **{"pruned-moderate": 0.6, "d2c-select": 0.4, "random-attach": 0.45, "d2c-select-attach": 0.45}),
           "b": dict(full=0.2, random=0.6, pruned=0.9, **{"pruned-moderate": 0.56, "d2c-random": 2.0, "d2c-select": 1.9, "random-attach": 1.8})}
    small = ("d2c-random", "d2c-select", "random-attach")
    for name, rows in fds.items():
        runs = [str(make_run(tmp_path / name / run, fd=fd, kept=1500 if run == "full" else 50 if run in small and name == "b" else 150,
                             train_args={"model": f"net-{name}"}.items())) for run, fd in rows.items()]
        beside = ["--beside", str(tmp_path / "a/report/report.json")] if name == "b" else []
        report.main([*runs, "--out", str(tmp_path / name / "report"), *beside])
    def read(name):
        return "".join((tmp_path / f"{name}/report/{file}").read_text(encoding="utf-8") for file in ("report.md", "details.md"))
    one, two = map(read, "ab")
    assert "run_all.sh puts those" in one and "run_all.sh puts those" not in two
    where = "net-a (flow) on digits 8 x 8, 700 steps of 128, scratch [a]"
    assert f"{where}: of 4 runs in both, 0 differ from random in both places beyond the interval, 0 of them the same way." in two
    assert f"Pruning, FD against random: +50 % here (one seed); +100 % with {where} (one seed)." in two
    assert f"D2C Select, FD against random: -5 % here (one seed); -20 % with {where} (one seed)." in two
    assert f"Attach on random images, FD against random: -10 % here (one seed); -10 % with {where} (one seed)." in two
    # here 50, -7, -5, -10 % (pruned, moderate, select, attach), there 100, 20, -20, -10: ranks 4 2 3 1 and 4 3 1 2, so 1 - 6 x 6 / (4 x 15)
    assert f"Order of these 4 runs here and with {where}: rank correlation 0.40." in two
    capsys.readouterr()
    report.main([str(tmp_path / "b/full"), "--out", str(tmp_path / "same"), "--beside", str(tmp_path / "b/report/report.json")])
    assert "the same network and data set as here" in capsys.readouterr().out and "Order of" not in (tmp_path / "same/details.md").read_text(encoding="utf-8")
    for broken in ("c", "d"):                                         # a folder: what is no whole report in it was not asked for by name
        (tmp_path / broken / "report").mkdir(parents=True)
        (tmp_path / broken / "report/report.json").write_text('{"setting"' if broken == "c" else "{}")
    report.main([*runs, "--out", str(tmp_path / "b/report"), "--beside", str(tmp_path)])
    assert read("b") == two and "the same network" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "c")
    sound = json.loads((tmp_path / "a/report/report.json").read_text())
    for change, word in ((lambda r: r["rows"]["full"].update(fd=[]), "row full"), (lambda r: r["rows"]["full"].update(fd="low"), "'fd' is a str"), (lambda r: r.pop("setting"), "setting"),
                         (None, "no such file")):
        (tmp_path / "a/report/report.json").unlink(missing_ok=True)
        if change:
            change(broken := json.loads(json.dumps(sound)))
            (tmp_path / "a/report/report.json").write_text(json.dumps(broken))
        with pytest.raises(SystemExit) as stop:
            report.main([str(tmp_path / "b/full"), "--out", str(tmp_path / "c"), "--beside", str(tmp_path / "a/report/report.json")])
        err = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and word in err and "report.json" in err and len(err.splitlines()) == 1 and not (tmp_path / "c").exists()


def test_above_random_says_what_counts():
    t = table(random=dict(fd=[1.0, 0.99, 1.01]), pruned=dict(fd=[1.2, 1.19, 1.21]), d2c_select=dict(fd=[0.9, 1.1, 1.03]), pruned_dro=dict(fd=[1.0], steps=[300]))
    got = answers.above_random(t)                                      # fewer steps than random: no comparison
    assert {run: (e.who, round(e.change, 3), e.outcome) for run, e in got.items()} == {"pruned": ("Pruning", 0.2, "higher"), "d2c-select": ("D2C Select", 0.01, "undetected")}


def test_agreement_elsewhere_is_counted_where_both_places_claim():
    rows = dict(random=RANDOM, pruned=HIGHER, d2c_select=LOWER, d2c_select_attach=NOISY)
    said, = answers.answer_elsewhere(table(**rows), "here", {"there": table(**rows | dict(d2c_select=HIGHER))})
    assert said == "there: of 3 runs in both, 2 differ from random in both places beyond the interval, 1 of them the same way"


def test_a_run_named_twice_is_no_second_seed(tmp_path, capsys):
    run = str(make_run(tmp_path / "full", kept=1500))
    with pytest.raises(SystemExit) as stop:
        report.main([run, f"{run}/../full", "--out", str(tmp_path / "report")])
    assert stop.value.code == 2 and "named twice" in capsys.readouterr().err


def test_scores_without_features_are_not_charged_with_them(tmp_path):
    """prune.py --score el2n --features FILE ignores the file: neither its making nor its surrogate is this run's preparation."""
    surrogate = make_run(tmp_path / "full", kept=1500, train_seconds=500.0)
    write(tmp_path / "a/prune.args.json", {"args": dict(score="gaussian", surrogate="ddae", weights=str(surrogate / "last.pt"), data="d"), "seconds": 9.0, "seconds_features": 7.0,
                                           "seconds_scores": 1.0})
    (tmp_path / "a/features.npy").touch()
    for score, want in (("el2n", {"features and scores": 3.0}), ("moderate", {"features and scores": 7.0 + 3.0, "surrogate network (full)": 500.0})):
        folder = tmp_path / score
        write(folder / "prune.args.json", {"args": dict(score=score, features=str(tmp_path / "a/features.npy"), data="d"), "seconds": 4.0,
                                           "seconds_features": 7.0, "seconds_scores": 3.0})
        (folder / "keep.npy").touch()
        got = report.preparation(report.costs_by_thing({"args": dict(data="d", indices=str(folder / "keep.npy"))}))
        assert got == want, (score, got)
