"""Kills, full disks, second processes and divergence: tests/chaos.py in short, and what it rests on."""
import argparse
import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import train

ROOT = Path(train.__file__).parent
TINY = "--model SiT-T/2 --process flow --steps {steps} --batch-size 8 --lr {lr} --schedule constant --warmup 2 --log-every 2 --checkpoint-every {every} --device cpu"


def chaos(*args):
    p = subprocess.run([sys.executable, ROOT / "tests/chaos.py", *map(str, args)], capture_output=True, text=True, timeout=1500,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert p.returncode == 0 and "WRONG" not in p.stdout, p.stdout[-4000:] + p.stderr[-4000:]
    return p.stdout


@pytest.mark.slow
def test_a_few_kills():
    text = chaos("--short", "--kills", 5, "--seed", 2, "--checks", "lock", "kills")
    assert "kills: 5 kills" in text or "kills: 6 kills" in text


@pytest.mark.slow
@pytest.mark.parametrize("check, n", [("same", 0), ("kills", 20), ("overwrite", 2), ("disk", 4), ("full", 0)])
def test_the_whole_chain(check, n):
    text = chaos("--kills", n, "--checks", check, *["--short"] * (check == "overwrite"))
    if "skipped" in text:
        pytest.skip(text)


# ---------------------------------------------------------------------------------------------- temporary files, --overwrite, what only a resume needs
def stage(out, n=1, overwrite=False, **kw):
    args = argparse.Namespace(n=n, out=str(out), overwrite=overwrite)
    return common.Stage("toy", args, outputs=("x.npy",), stale=("x.npy", "y_*.npy"), scraps=("z.part.npy",), **kw)


def test_temporary_files_of_the_dead_are_swept_by_the_stage_that_holds_the_folder(tmp_path):
    code = "import common, sys, time\nwith common.atomic(sys.argv[1]) as tmp:\n    print(tmp, flush=True)\n    time.sleep(60)"
    writer = subprocess.Popen([sys.executable, "-c", code, tmp_path / "b.part.npy"], stdout=subprocess.PIPE, text=True)
    temp, dead = Path(writer.stdout.readline().strip()), [tmp_path / f".{name}" for name in ("a.abcdefgh.tmp.npy", "c.x_012345.tmp")]
    own = [tmp_path / name for name in (".a.tmp", ".hidden", "a.tmp.npy", ".tmp", ".data.x1")]         # not of atomic()
    for f in dead + own:
        f.write_text("left")
    writer.kill()
    writer.wait()
    assert temp.exists()
    with stage(tmp_path):
        assert not temp.exists() and not any(f.exists() for f in dead) and all(f.exists() for f in own)
        with common.atomic(tmp_path / "x.npy") as tmp:
            Path(tmp).write_text("x")
            common.sweep(tmp_path)                                    # what is being written is no leftover
    assert (tmp_path / "x.npy").read_text() == "x"


def test_nothing_is_swept_without_the_folders_lock_or_where_nothing_is_left_to_do(tmp_path):
    (leftover := tmp_path / ".last.abcd_123.tmp.pt").write_bytes(b"half")
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(common.UserError, match="another process"):
        stage(tmp_path).__enter__()
    assert leftover.exists()
    os.close(fd)
    with stage(tmp_path) as s:
        assert not leftover.exists()
        s.save("x.npy", 0)
        s.finish()
    (tmp_path / ".stats_a.abcd_123.tmp.npz").write_bytes(b"another stage writes here")
    with stage(tmp_path) as s:
        assert s.done and (tmp_path / ".stats_a.abcd_123.tmp.npz").exists()


def test_files_of_an_earlier_call_never_pass_for_those_of_a_new_one(tmp_path, monkeypatch):
    """Killed at every moment of an --overwrite's begin, the same command without it never takes the old files for its own."""
    seen = []
    for moment in range(1, 20):
        out = tmp_path / str(moment)
        names = ("x.npy", "y_1.npy", "z.part.npy")
        with stage(out) as s:
            for name in (*names, "other.npy"):
                np.save(out / name, 0)
            common.save_json(s.file, {**s.record, "seconds": 1.0})
        left = [moment]

        def counted(real):
            def call(*args, **kw):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)
                return real(*args, **kw)
            return call
        pid = os.fork()
        if pid == 0:
            monkeypatch.setattr(os, "replace", counted(os.replace))
            monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
            stage(out, n=2, overwrite=True).__enter__()
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
            break                                                     # that was the last moment
        standing = {name for name in names if (out / name).exists()}
        try:
            with stage(out, n=2) as s:
                assert not s.done and not s.resuming and not any((out / name).exists() for name in names) and (out / "other.npy").exists()
                seen.append("begins anew")
        except common.UserError as e:                                 # what stands is the earlier call's, or nobody's
            whole = "was made with --n = 1" in str(e)
            assert (whole and standing == set(names)) or ("somebody else" in str(e) and "x.npy" in standing)
            seen.append("refused")
            with stage(out) if whole else stage(out, overwrite=True) as s:
                assert s.done == whole
    assert seen == ["refused", "refused", "begins anew", "begins anew", "begins anew"]                 # the record, three files, the new record


def test_scraps_go_with_the_end_even_when_it_was_killed(tmp_path):
    with stage(tmp_path):
        for name in ("x.npy", "z.part.npy"):
            np.save(tmp_path / name, 0)
    with stage(tmp_path) as s:
        assert s.resuming and (tmp_path / "z.part.npy").exists()
        s.finish()
        assert not (tmp_path / "z.part.npy").exists() and (tmp_path / "x.npy").exists()
    np.save(tmp_path / "z.part.npy", 0)                               # as if killed between the record and the removal
    with stage(tmp_path) as s:
        assert s.done and not (tmp_path / "z.part.npy").exists()


def test_fill_removes_its_flags_after_a_kill_at_the_very_end(tmp_path):
    rows = lambda ids: np.zeros((len(ids), 2))                        # noqa: E731
    common.fill(tmp_path, "x", (5, 2), np.float32, 2, rows)
    common.allocate(tmp_path / "x.done.npy", np.uint8, (5,))
    common.fill(tmp_path, "x", (5, 2), np.float32, 2, rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npy", "x.seconds.json"]


def test_a_short_write_without_an_error_number_is_a_full_disk(tmp_path, capsys):
    """numpy: OSError('3840 requested and 599 written'), no errno."""
    def save():
        with common.atomic(tmp_path / "a.npy"):
            raise OSError("3840 requested and 599 written")
    with pytest.raises(OSError) as e:
        save()
    assert e.value.errno == errno.ENOSPC and e.value.filename.endswith("a.npy") and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as e:
        common.command(lambda argv=None: save())()
    assert e.value.code == 2 and "599 written" in capsys.readouterr().err


def test_a_disk_that_is_full_at_the_last_byte_of_an_array_is_noticed(tmp_path):
    """np.save on a file loses what C's own buffer still holds, and says nothing."""
    code = """
import common, numpy as np, os, resource
common.save_npy("good.npy", np.arange(10**5))
for missing in (1, 4000, 5 * 10**5):
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize("good.npy") - missing, resource.RLIM_INFINITY))
    try:
        common.command(lambda argv=None: common.save_npy("good.npy", np.arange(10**5) + 1))()
    except SystemExit as e:
        print(e.code)
"""
    (tmp_path / "out").mkdir()
    (tmp_path / "writes_all.py").write_text(code)
    p = subprocess.run([sys.executable, tmp_path / "writes_all.py"], cwd=tmp_path / "out", capture_output=True, text=True, timeout=60)
    assert p.stdout == "2\n2\n2\n" and p.stderr.count("run the same command again") == 3 and "Traceback" not in p.stderr, p.stdout + p.stderr
    assert np.array_equal(np.load(tmp_path / "out/good.npy"), np.arange(10**5)) and [f.name for f in (tmp_path / "out").iterdir()] == ["good.npy"]


# ---------------------------------------------------------------------------------------------- training
@pytest.fixture
def quick(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(train, "preview", lambda ema, process, settings, device, path, seed: path.write_bytes(b"picture"))
    monkeypatch.setattr(train, "loss_plot", lambda rows, path, constant: path.write_bytes(b"plot"))


def fit(data, out, *extra, steps=6, lr=1e-3, every=2):
    train.main(["--data", str(data), "--out", str(out), *TINY.format(steps=steps, lr=lr, every=every).split(), *extra])


@pytest.mark.parametrize("at", ["step_0000006.pt", "last.pt", "samples_0000006.png", "loss.png"])
def test_a_run_killed_beside_any_of_its_last_files_gets_them_all(at, quick, tiny_data, tmp_path, monkeypatch):
    fit(tiny_data, tmp_path / "a")
    with monkeypatch.context() as m:
        real, seen = os.replace, []

        def killed_after(src, dst):
            real(src, dst)
            seen.append(Path(dst).name)
            if seen.count(at) == (3 if at == "last.pt" else 1):
                raise KeyboardInterrupt
        m.setattr(os, "replace", killed_after)
        for name, place in (("preview", 4), ("loss_plot", 1)):
            m.setattr(train, name, lambda *args, place=place: common.save_text(args[place], ""))
        with pytest.raises(SystemExit) as e:
            fit(tiny_data, tmp_path / "b")
        assert e.value.code == 130
    fit(tiny_data, tmp_path / "b")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {p.name for p in (tmp_path / "b").iterdir()}


def test_divergence_leaves_the_last_good_checkpoint_and_says_so(quick, tiny_data, tmp_path, capsys, monkeypatch):
    fit(tiny_data, tmp_path / "a", steps=4)
    good = (tmp_path / "a/last.pt").read_bytes()
    for lr, words in (("1e6", "no checkpoint was written before"), ("1", "has diverged")):
        with pytest.raises(SystemExit) as e:
            fit(tiny_data, tmp_path / lr, steps=60, lr=lr, every=50)
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert e.value.code == 2 and words in err and "lower --lr" in err and not (tmp_path / lr / "last.pt").exists()
    real = train.diffusion_loss                                       # a finite loss that grows, after a good checkpoint
    monkeypatch.setattr(train, "diffusion_loss", lambda *args, **kw: real(*args, **kw) * 1e4)
    with pytest.raises(SystemExit) as e:
        fit(tiny_data, tmp_path / "a", steps=8)
    assert e.value.code == 2 and "last good checkpoint, of step 4" in capsys.readouterr().err and (tmp_path / "a/last.pt").read_bytes() == good


def test_fp16_overflows_are_skipped_counted_and_halve_the_scale(quick, tiny_data, tmp_path, monkeypatch):
    real = common.optimizer_of
    monkeypatch.setattr(common, "optimizer_of", lambda *args: (real(*args)[0], torch.amp.GradScaler("cpu", init_scale=2.0**24)))
    fit(tiny_data, tmp_path / "a", "--amp", "fp16", steps=20, every=20)
    state = common.load_pt(tmp_path / "a/last.pt")
    assert 0 < state["skipped"] < 15 and state["scaler"]["scale"] == 2.0**(24 - state["skipped"])
    assert {s["step"].item() for s in state["optimizer"]["state"].values()} == {20 - state["skipped"]}
    assert all(v.isfinite().all() for v in state["model"].values())
