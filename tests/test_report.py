"""report.py on made-up runs: every outcome of the generated sentences, the accounting of costs, refusals, and that the pictures show what they should."""
import argparse
import json
import shutil
import math

import numpy as np
import pytest
import torch
from PIL import Image

import common
import report

SEVEN = ("full", "random", "random-attach", "pruned", "pruned-dro", "d2c-select", "d2c-select-attach")


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_run(folder, fd=1.0, steps=700, kept=150, memo=(0.55, 0.5, 0.5, 1.0), points=None, train_args=(), data="digits", n=1000, circular=False, worst=2.0, encoders=("scratch",),
             train_seconds=100.0, per_class=True):
    """A run folder as train.py, sample.py and evaluate.py leave it. memo: samples, held-out, baseline, noise; points: [(step, fd)]."""
    name, rng = folder.name, np.random.default_rng(len(folder.name))
    share = dict(zip(("samples", "heldout", "baseline", "noise"), memo or ()))
    spaces = {k: {"share": v, "ratio": {"share": v / 10}} for k, v in share.items() if v is not None}
    row = {"identity": "scratch:1", "distance": "FD (scratch)", "n": n, "reference": f"{data}, the full training set", "reference_n": 1500, "fd": fd, "fd_heldout": 0.13,
           "fd_heldout_n": 297, "fd_at_heldout_n": fd + 0.2, "fd_subset": None if kept == 1500 else 0.2, "precision": 0.8, "recall": 0.7, "density": 0.9, "coverage": 0.8,
           "neighbours_n": n, "precision_k": 3, "density_k": 5, "read_as_labelled": 0.97, "kid": {"subset_size": 1000}, "circular": circular}
    if per_class:
        row["per_class"] = {"n": 24, "fd": [worst - 0.1 * c for c in range(10)], "worst": 0, "worst_fd": worst, "real": list(rng.uniform(0.4, 0.8, 10)), "real_mean": 0.6}
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "samples.npy", rng.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8))
    write(folder / "metrics.json", {
        "run": name, "data": data, "data_sha256": data, "samples_sha256": common.sha256(folder / "samples.npy"), "memorisation": {"n": n, "pixels": spaces} if memo else None,
        "protocol": dict(sampler="heun", steps=12, cfg=1.5, cfg_interval=[0, 1], labels="balanced", seed=0, weights="EMA", amp="none"),
        "encoders": {k: dict(row, identity=f"{k}:1") for k in encoders}, "provenance": {"python": "3"}})
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
    blank = dict(kept=[150], steps=[700], worst_n=[24], seconds=[100.0], preparation=[0.0], ratio=[None], ratio_noise=[None], memo_n=[1000], memo_side=[297],
                 memo=[None], memo_heldout=[None], memo_baseline=[None], memo_alike=[None], memo_noise=[None], worst=[2.0], fd=[1.0])
    return {k.replace("_", "-"): {**blank, **v} for k, v in rows.items()}


# ---------------------------------------------------------------------------------------------- sentences
def test_cell():
    assert report.cell([16.16]) == "16.2" and report.cell([]) == report.cell([None]) == "-"
    assert report.cell([15.0, 16.0, 17.0]) == "16 ± 1" and report.cell([1.0, None, 3.0]) == "2 ± 1.41"
    assert report.cell([0.5, 0.7], "{:.2f}") == "0.60 ± 0.14" and report.cell([1200.4], "{:,.0f}") == "1,200"


def test_difference_is_welch_s_t_test():
    from scipy import stats
    rng = np.random.default_rng(0)
    for trial in range(30):
        a, b = list(rng.normal(1 + trial / 50, 0.1, 3)), list(rng.normal(1, 0.2, rng.integers(2, 6)))
        rel, error, n, counts = report.difference(a, b)
        assert n == min(len(a), len(b)) and math.isclose(rel, np.mean(a) / np.mean(b) - 1)
        test = stats.ttest_ind(a, b, equal_var=False)
        assert counts == (test.pvalue < 0.05)
        low, high = test.confidence_interval(0.95)
        assert math.isclose(error, (high - low) / 2 / np.mean(b), rel_tol=1e-9)
    assert report.difference([1.0, 1.0], [2.0, 2.0]) == (-0.5, 0.0, 2, True)
    assert report.difference([1.0], [2.0, 3.0])[1:] == (None, 1, False)


@pytest.mark.parametrize("a, b, sentence", [
    ([0.87, 0.88, 0.89], [1.0, 0.99, 1.01], "D2C Select beats random by 12 % FD at equal steps, n=3, spread 2 %"),
    ([1.19, 1.20, 1.21], [1.0, 0.99, 1.01], "D2C Select is worse than random by 20 % FD at equal steps, n=3, spread 2 %"),
    ([0.8, 0.95, 1.1], [1.0, 0.9, 1.1], "No difference beyond the spread between D2C Select and random: FD 5 % lower at equal steps, n=3, spread 31 %"),
    ([0.8], [1.0], "D2C Select has 20 % lower FD than random at equal steps; one seed, so no claim"),
    ([1.3], [1.0, 1.0], "D2C Select has 30 % higher FD than random at equal steps; one seed, so no claim"),
    ([None], [1.0], None)])
def test_sentence_for_each_outcome(a, b, sentence):
    assert report.compare(a, b, "D2C Select", "random") == sentence
    t = table(random=dict(fd=b), d2c_select=dict(fd=a))
    assert report.answer_random(t) == ([sentence] if sentence else [])


def test_a_subset_is_compared_with_random_of_its_own_size_only():
    t = table(random=dict(kept=[5000], fd=[4.0]), random_04=dict(kept=[20000]), d2c_random=dict(kept=[1000], fd=[9.0]), d2c_select=dict(kept=[1000], fd=[4.5]),
              pruned=dict(kept=[5000], fd=[2.0]), d2c_select_attach=dict(kept=[1000], fd=[3.0]), random_attach=dict(kept=[1000], fd=[6.0]))
    t["random-0.4"], t["pruned-0.4"] = t.pop("random-04") | dict(fd=[2.0]), t["pruned"] | dict(kept=[20000], fd=[1.0])
    text = ". ".join(report.answer_random(t))
    assert "D2C Select has 50 % lower FD than d2c-random" in text and "Pruning has 50 % lower FD than random at" in text
    assert "Pruning 0.4 has 50 % lower FD than random-0.4" in text
    source = report.answer_source(t)
    assert len(source) == 4 and source[0].startswith("Selection alone has 50 % lower FD than d2c-random") and source[1].startswith("Attaching alone has 33 % lower FD than d2c-random")
    assert source[2].startswith("Their combination has 67 %") and source[3].startswith("Selection on top of attachments has 50 % lower FD than attachments on random images")
    assert report.answer_random(table(random=dict(kept=[10]), pruned={})) == [] and report.answer_source(table(random={}, d2c_select={})) == []


def test_unequal_steps_are_said():
    t = table(random=dict(steps=[700], fd=[1.0]), pruned=dict(steps=[1400], fd=[0.5]))
    assert report.answer_random(t) == ["Pruning has 50 % lower FD than random at 1,400 steps against 700; one seed, so no claim"]


def test_dro_is_judged_by_fd_and_by_the_worst_class():
    t = table(pruned=dict(worst=[4.0, 4.1], fd=[1.0, 1.01]), pruned_dro=dict(worst=[2.0, 2.1], fd=[1.2, 1.21]))
    assert report.answer_random(t) == ["DRO reweighting is worse than the same images unweighted by 20 % FD at equal steps, n=2, spread 3 %",
                                       "DRO reweighting beats the same images unweighted by 49 % worst-class FD (n=24 a class) at equal steps, n=2, spread 8 %"]
    assert len(report.answer_random(table(pruned=dict(worst=[None]), pruned_dro=dict(worst=[None])))) == 1


@pytest.mark.parametrize("m, held, base, noise, verdict", [
    (0.81, 0.52, 0.51, 1.0, "copies"), (0.65, 0.52, 0.51, 1.0, "leans towards copying"), (0.55, 0.52, 0.51, 1.0, "does not memorise beyond its controls"),
    (0.65, 0.50, 0.60, 1.0, "does not memorise beyond its controls"),             # a subset nearer to everything: the full model's samples are the zero
    (0.65, 0.70, None, 1.0, "cannot be judged"), (0.65, 0.50, 0.50, 0.6, "cannot be judged"),
    (0.53, None, None, 0.6, "shows no sign of copying"), (0.59, None, None, 0.6, "copies"), (0.57, None, None, 0.6, "leans towards copying"),
    (0.55, None, None, 0.6, "leans towards copying"),                             # half way to a low ceiling, within two standard errors of either
    (0.55, None, None, 0.53, "has too few held-out images or samples to tell")])
def test_verdict_on_memorising(m, held, base, noise, verdict):
    answer, = report.answer_memorising(table(pruned=dict(memo=[m], memo_heldout=[held], memo_baseline=[base], memo_noise=[noise])))
    assert answer.startswith(f"pruned {verdict}") and f"{m:.2f} of the samples" in answer and f"{noise:.2f}" in answer
    assert ("standard error 0.03" in answer) == (held is None)
    assert ("samples of the full model" in answer) == (base is not None) and ("than to held-out ones" in answer) == (held is None)


def test_a_model_of_typical_images_does_not_copy_by_drawing_typical_ones():
    """CIFAR-10 at 8 x 8, Gaussian pruning: 0.90, and 0.85 for held-out images of that kind, which no model has seen."""
    row = dict(memo=[0.90], memo_heldout=[0.71], memo_baseline=[0.74], memo_noise=[1.0])
    blind, = report.answer_memorising(table(pruned=row))
    seeing, = report.answer_memorising(table(pruned=dict(row, memo_alike=[0.85])))
    assert blind.startswith("pruned copies") and seeing.startswith("pruned cannot be judged, images that are no copies score") and "those most like its own 0.85" in seeing


def test_few_samples_make_no_verdict_of_copying():
    row = dict(memo=[0.62], memo_heldout=[0.5], memo_baseline=[0.5], memo_noise=[1.0], ratio=[0.06], ratio_noise=[0.97])
    many, = report.answer_memorising(table(random=dict(row, memo_n=[1000])))
    few, = report.answer_memorising(table(random=dict(row, memo_n=[40])))
    assert "leans towards copying" in many and "does not memorise" in few and "6 %, noisy copies 97 %" in many


def points(*fds):
    return [dict(step=100 * k, images_seen=12800 * k, seconds=10.0 * k, fd=f, n=100) for k, f in enumerate(fds, 1)]


def test_reach_is_the_first_crossing_of_the_mean_over_seeds():
    from types import SimpleNamespace as S
    runs = [S(name="full", trajectory=points(3, 2, 1.04, 1.2, 0.8)), S(name="full", trajectory=points(3, 2, 1.0, 1.2, 1.2)),        # last on average: 1
            S(name="d2c", trajectory=points(1.05, 2, 1)), S(name="d2c", trajectory=points(4, 0.1, 1.0)), S(name="random", trajectory=points(3, 1.06)),
            S(name="random", trajectory=points(1.0, 1.06, 0.5)), S(name="none", trajectory=[])]
    reached = report.reach(runs)
    assert list(reached) == ["full", "d2c", "random"] and reached["random"] == (None, dict(step=200, n=100, images_seen=25600, seconds=20, fd=pytest.approx(1.06)))
    want = {"full": (300, 1.02), "d2c": (200, 1.05)}                  # the full run reaches itself, though one of its seeds ends 20 % above the mean
    assert all(reached[k][0] == dict(step=s, n=100, images_seen=128 * s, seconds=s / 10, fd=pytest.approx(fd)) for k, (s, fd) in want.items())
    assert report.reach(runs[2:]) == {}


def test_costs_and_speed_up_are_stated_for_each_run():
    at = dict(step=300, images_seen=38400, seconds=30.0, n=500)
    t = table(full={}, d2c_select=dict(preparation=[30.0]), random={})
    out = report.answer_cost(t, {"full": (at, at), "d2c-select": (dict(step=100, images_seen=12800, seconds=10.0, n=500), at), "random": (None, dict(at, fd=1.5))})
    assert out == ["full: within 5 % of the full run's final FD (n=500) after 300 steps, 38,400 images, 30 s",
                   "d2c-select: 30.0 s of preparation for 100 s of training",
                   "d2c-select: within 5 % of the full run's final FD (n=500) after 100 steps, 12,800 images, 10 s (speed-up 3.00x, with preparation 0.75x)",
                   "random: the full run's final FD (within 5 %) was not reached; its best is 1.5 after 300 steps (n=500)"]
    assert report.answer_cost(t, {}) == ["d2c-select: 30.0 s of preparation for 100 s of training"]


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
    return lambda **args: report.preparation({"args": dict({"data": str(out / "data")}, **{k: str(out / v) for k, v in args.items()})})


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
    assert row.endswith("| 100 | ? |") and "speed-up" in text and "with preparation" not in text and "preparation is unknown" in text
    assert json.loads((tmp_path / "r" / "report.json").read_text())["rows"]["mine"]["preparation"] == [None]


def test_resampling_is_a_role_of_its_own_and_budgets_may_begin_with_a_point():
    assert report.family("pruned-.4") == "pruned" and report.family("pruned-0.4") == "pruned" and report.family("pruned-dro-resample-.4") == "pruned-dro-resample"
    assert report.family("random-attach") == "random-attach"
    t = table(random=dict(fd=[2.0]), pruned=dict(fd=[None], worst=[4.0]), pruned_dro=dict(fd=[None], worst=[3.0]), pruned_dro_resample=dict(fd=[1.0], worst=[2.0]))
    text = report.answer_random(t)
    assert any(x.startswith("Pruning + DRO resampling has 50 % lower FD than random") for x in text)
    assert any(x.startswith("DRO resampling has 50 % lower worst-class FD (n=24 a class) than the same images unweighted") for x in text)
    assert any(x.startswith("DRO resampling has 33 % lower worst-class FD (n=24 a class) than DRO weights in the loss") for x in text)


def test_worst_classes_at_different_n_are_not_compared():
    assert not any("worst" in x for x in report.answer_random(table(pruned=dict(worst=[4.0], worst_n=[24]), pruned_dro=dict(worst=[2.0], worst_n=[48]))))


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
    assert rows[0].startswith("| full | 1,500 | 700 | 60 | 1.02 ± 0.02 | - | 2.04 ± 0.04 |") and rows[1].startswith("| random | 150 | 700 | 597 | 2.04 ± 0.04 | 0.2 ± 0 |")
    assert rows[0].endswith("| 100 ± 0 | 0 ± 0 |") and "-seed1 |" not in text.split("## Preparation")[0] and "Seeds: 3" in text
    stored = json.loads((whole / "report" / "report.json").read_text())
    assert stored["judge"] == "scratch" and stored["rows"]["random"]["fd"] == pytest.approx([2.0, 2.04, 2.08])


def test_answers_and_warnings_stand_in_the_page(whole):
    text = (whole / "report" / "report.md").read_text()
    assert "D2C Select + Attach beats random by 55 % FD at equal steps, n=3, spread" in text and "No difference beyond the spread between Pruning + DRO weights and random" in text
    assert "- random: the full run's final FD (within 5 %) was not reached; its best is 2." in text
    assert "- d2c-select-attach: within 5 % of the full run's final FD (n=" in text and "- full: within 5 % of the full run's final FD (n=" in text
    assert "Warning" in text and "random-attach" in text.split("Warning", 1)[1].splitlines()[0] and "Second judge" in text
    assert "Neither is comparable with the column FD (n=1,000)" in text and "score 0.13 at n=297" in text
    for bad in ("None", "nan", ";  ", "; For", "..", "{"):
        assert bad not in text.replace("seed None", ""), bad


def test_pictures_are_written_and_show_something(whole):
    for name in ("frontier.png", "samples.png", "per_class.png", "nearest.png"):
        assert f"({name})" in (whole / "report" / "report.md").read_text()
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
    report.sample_sheet([report.read_run(tmp_path / n) for n in ("full", "random")], tmp_path / "s.png")
    x = np.asarray(Image.open(tmp_path / "s.png").convert("L"))
    dark = (x < 60).mean(1)
    assert dark[: len(x) // 2].max() > 0.5 and dark[len(x) // 2 + 10: -10].mean() < 0.05


def test_one_seed_without_trajectories(tmp_path):
    runs = [make_run(tmp_path / n, fd, kept=k) for n, fd, k in (("full", 1.0, 1500), ("random", 2.0, 150), ("d2c-select", 1.5, 150))]
    report.main([*map(str, runs), "--out", str(tmp_path / "r")])
    text = (tmp_path / "r" / "report.md").read_text()
    assert "one seed, so no claim" in text and "beats" not in text and "speed-up" not in text and "not reached" not in text
    assert Image.open(tmp_path / "r" / "frontier.png").width > 500
    assert "The runs that would answer it are not here." in text


def test_runs_without_audit_classes_or_full_run(tmp_path):
    runs = [make_run(tmp_path / n, memo=None, per_class=False) for n in ("mine", "random")]
    (runs[0] / "nearest.png").unlink(), (runs[1] / "nearest.png").unlink()
    report.main([*map(str, runs), "--out", str(tmp_path / "r")])
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["frontier.png", "report.json", "report.md", "samples.png"]


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
    assert stop.value.code == 0 and {*SEVEN, "pruned-dro-resample"} == set(names) == set(report.RUNS)


def test_an_audit_that_one_seed_lacks_is_that_of_the_others():
    row = dict(memo=[0.8, None], memo_heldout=[0.5, None], memo_baseline=[0.5, None], memo_noise=[1.0, None], memo_n=[1000, None], memo_side=[297, None])
    answer, = report.answer_memorising(table(pruned=row))
    assert answer.startswith("pruned copies: 0.80")


def test_titles_of_runs():
    assert report.title("pruned-0.4") == "Pruning 0.4" and report.title("pruned-moderate-0.4") == "Pruning (moderate) 0.4" and report.title("pruned-moderate") == "Pruning (moderate)"
    assert report.title("pruned-dro-0.1") == "Pruning + DRO weights 0.1" and report.title("random-0.4") is None and report.title("full") is None
    assert report.family("random-5e-2") == "random" and report.title("pruned-5e-2") == "Pruning 5e 2"


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
    one, two = ((tmp_path / f"{name}/report/report.md").read_text(encoding="utf-8") for name in "ab")
    assert "run_all.sh puts those" in one and "run_all.sh puts those" not in two
    where = "net-a (flow) on digits 8 x 8, 700 steps of 128, scratch [a]"
    assert f"Pruning, FD against random: +50 % here (one seed); +100 % with {where} (one seed)." in two
    assert f"D2C Select, FD against random: -5 % here (one seed); -20 % with {where} (one seed)." in two
    assert f"Attach on random images, FD against random: -10 % here (one seed); -10 % with {where} (one seed)." in two
    # here 50, -7, -5, -10 % (pruned, moderate, select, attach), there 100, 20, -20, -10: ranks 4 2 3 1 and 4 3 1 2, so 1 - 6 x 6 / (4 x 15)
    assert f"Order of these 4 runs here and with {where}: rank correlation 0.40." in two
    capsys.readouterr()
    report.main([str(tmp_path / "b/full"), "--out", str(tmp_path / "same"), "--beside", str(tmp_path / "b/report/report.json")])
    assert "the same network and data set as here" in capsys.readouterr().out and "Order of" not in (tmp_path / "same/report.md").read_text(encoding="utf-8")
    for broken in ("c", "d"):                                         # a folder: what is no whole report in it was not asked for by name
        (tmp_path / broken / "report").mkdir(parents=True)
        (tmp_path / broken / "report/report.json").write_text('{"setting"' if broken == "c" else "{}")
    report.main([*runs, "--out", str(tmp_path / "b/report"), "--beside", str(tmp_path)])
    assert (tmp_path / "b/report/report.md").read_text(encoding="utf-8") == two and "the same network" not in capsys.readouterr().out
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
    got = report.above_random(t)
    assert {run: (who, round(rel, 3), note) for run, (who, rel, note) in got.items()} == {
        "pruned": ("Pruning", 0.2, " (n=3)"), "d2c-select": ("D2C Select", 0.01, " (within the spread, n=3)")}          # fewer steps than random: no comparison


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
        got = report.preparation({"args": dict(data="d", indices=str(folder / "keep.npy"))})
        assert got == want, (score, got)
