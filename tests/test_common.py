"""common/: rooms that open one way, nothing half-written, nothing unpickled, one clear line for each mistake, the lock and the resume rule."""
import argparse
import ast
import errno
import fcntl
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
from conftest import ROOT, processes


class Canary:
    """Pickled code that leaves a mark when it is run."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def line_of(fn, *args, **kw):
    with pytest.raises(common.UserError) as e:
        fn(*args, **kw)
    return str(e.value)


# ---------------------------------------------------------------------------------------------- files
def test_a_failed_save_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch):
    savers = {"a.npy": lambda v: common.save_npy(tmp_path / "a.npy", np.full(3, v)), "a.pt": lambda v: common.save_pt(tmp_path / "a.pt", {"v": torch.tensor(v)}),
              "a.json": lambda v: common.save_json(tmp_path / "a.json", {"v": v}), "a.txt": lambda v: common.save_text(tmp_path / "a.txt", str(v))}
    for save in savers.values():
        save(1)
    before = {n: (tmp_path / n).read_bytes() for n in savers}
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(savers)

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        for save in savers.values():
            with pytest.raises(OSError):
                save(2)
    with pytest.raises(KeyboardInterrupt), common.atomic(tmp_path / "a.npy") as tmp:      # interrupted in the middle of writing
        Path(tmp).write_bytes(b"half")
        raise KeyboardInterrupt
    with pytest.raises(ValueError):
        common.save_json(tmp_path / "a.json", {"v": float("nan")})                        # not JSON
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    for save in savers.values():
        save(2)
    assert np.load(tmp_path / "a.npy")[0] == 2 and common.load_pt(tmp_path / "a.pt")["v"] == 2
    assert common.load_json(tmp_path / "a.json", "x") == {"v": 2}
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "a.npy").stat().st_mode & 0o777 == 0o666 & ~umask                  # not mkstemp's 600


def test_a_full_disk_inside_torch_save_is_said_as_such(tmp_path, monkeypatch):
    def zip_writer(state, f):
        raise RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0")
    monkeypatch.setattr(torch, "save", zip_writer)
    with pytest.raises(OSError) as e:
        common.save_pt(tmp_path / "last.pt", {})
    assert e.value.errno == errno.ENOSPC and e.value.filename == str(tmp_path / "last.pt") and not list(tmp_path.iterdir())


def test_load_npy_names_the_file_and_the_fault(tmp_path):
    f = tmp_path / "x.npy"
    assert "no such file" in line_of(common.load_npy, f, "numbers")
    np.save(f, np.arange(1000.0))
    whole = f.read_bytes()
    for damaged in (b"", whole[:40], whole[:-8], b"hello", whole[:200]):
        f.write_bytes(damaged)
        text = line_of(common.load_npy, f, "numbers")
        assert str(f) in text and "numbers" in text, damaged[:10]
    np.save(f, np.array([Canary(tmp_path / "mark")], dtype=object), allow_pickle=True)
    assert "not a readable" in line_of(common.load_npy, f, "numbers") and not (tmp_path / "mark").exists()
    f.write_bytes(pickle.dumps(Canary(tmp_path / "mark")))
    assert "not a readable" in line_of(common.load_npy, f, "numbers") and not (tmp_path / "mark").exists()
    np.savez(tmp_path / "y.npz", a=np.arange(3))
    (tmp_path / "y.npz").rename(f)
    assert "archive" in line_of(common.load_npy, f, "numbers")
    np.save(f, np.zeros((2, 3), np.float32))
    assert "float32" in line_of(common.load_npy, f, "labels", kind="iu")
    assert "(2, 3)" in line_of(common.load_npy, f, "labels", shape=(2,)) and "(any, 4)" in line_of(common.load_npy, f, "labels", shape=(None, 4))
    a = common.load_npy(f, "labels", (2, None), "f")
    with pytest.raises(ValueError):
        a[0] = 1                                                      # read-only


def test_check_finite_names_the_first_bad_row_of_any_chunk():
    a = np.zeros((10, 3), np.float16)
    common.check_finite(a, "f", "features", rows=4)
    a[9, 1], a[6, 2] = np.nan, np.inf
    assert "row 6" in line_of(common.check_finite, a, "f", "features", rows=4) and "row 6" in line_of(common.check_finite, a, "f", "features")


def test_load_pt_never_runs_what_is_in_the_file(tmp_path):
    f = tmp_path / "x.pt"
    for bad in ({"a": Canary(tmp_path / "mark")}, {"args": argparse.Namespace(a=1)}):
        torch.save(bad, f)
        text = line_of(common.load_pt, f)
        assert str(f) in text and not (tmp_path / "mark").exists()
    torch.save({"a": torch.ones(50)}, f)
    whole = f.read_bytes()
    for damaged in (b"", whole[:100], whole[:-30], b"PK\x03\x04"):
        f.write_bytes(damaged)
        assert str(f) in line_of(common.load_pt, f)
    torch.save([1, 2], f)
    assert "list" in line_of(common.load_pt, f)
    assert "no such file" in line_of(common.load_pt, tmp_path / "absent.pt")
    f.write_text("{")
    assert "JSON" in line_of(common.load_json, f, "x")


# ---------------------------------------------------------------------------------------------- the rooms
ORDER = "errors signals processes workers cli files pictures stage rowfill origins inputs pixels listing containers labels sources loop precision training run rows answers comparison plan jobs run_all".split()


def imports_of(file):
    """The modules that a file names in its import statements, wherever they stand."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def test_the_index_names_what_the_rooms_hold_and_what_the_stages_use():
    programs = {"plan", "jobs", "run_all"}                                    # run_all.sh's, which no stage calls
    assert {*common.ROOMS, *programs} == {f.stem for f in (ROOT / "common").glob("*.py") if f.stem != "__init__"}
    for room, names in common.ROOMS.items():
        for name in names.split():
            assert getattr(common, name) is getattr(getattr(common, room), name), name
    for file in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]:
        for name in set(re.findall(r"\bcommon\.([a-zA-Z_0-9]+)", file.read_text(encoding="utf-8"))) - {"py"}:
            getattr(common, name)                                     # AttributeError names the one that is missing
    with pytest.raises(AttributeError, match="nonsense"):
        getattr(common, "nonsense")


def test_imports_run_one_way():
    """Stage -> common -> models; inside common a room imports only those before it in ORDER; models/ knows nobody above it."""
    stages = {f.stem for f in ROOT.glob("*.py")}
    for file in [*(ROOT / "common").glob("*.py"), *(ROOT / "models").glob("*.py"), *ROOT.glob("*.py")]:
        for module in imports_of(file):
            top, _, room = module.partition(".")
            assert top not in stages, f"{file.name} imports the stage {module}"
            if file.parent.name == "models":
                assert top != "common", f"{file.name} imports {module}"
            if file.parent.name == "common" and file.stem != "__init__" and top == "common":
                assert room in ORDER[:ORDER.index(file.stem)], f"{file.name} imports {module}"


def test_importing_the_index_opens_no_room():
    code = "import sys, common; print(*sorted(m for m in sys.modules if m.startswith('common')), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["common", "False"], done


# ---------------------------------------------------------------------------------------------- numbers and seeds
def test_number_refuses_what_is_not_a_number_in_range():
    good = common.number(float, low=0, high=1)
    assert good("0") == 0 and good("1") == 1 and common.count("3") == 3 and isinstance(common.count("3"), int)
    for parse, bad in ((good, "nan inf -inf -0.1 1.1 x"), (common.number(above=0), "0 -1 nan inf"), (common.count, "0 -3 1.5 1e3 nan 9999999999999999"),
                       (common.number(int, low=0), "-1 inf"), (common.number(), "nan inf -inf")):
        for text in [*bad.split(), ""]:
            with pytest.raises(argparse.ArgumentTypeError):
                parse(text)
    assert common.number(int, low=0)("9" * 400) == int("9" * 400)     # too large for a float, and no traceback


def test_generator_is_a_function_of_seed_and_key():
    def draw(*key):
        return torch.randn(8, generator=common.generator(*key))
    first = draw(0, "noise", 3)
    torch.manual_seed(99)
    torch.randn(5)
    assert torch.equal(first, draw(0, "noise", 3))
    others = [draw(*k) for k in ((1, "noise", 3), (0, "noise", 4), (0, "order", 3), (0, 3, "noise"), (0, "noise"), (0, "noise", 3, 1), (2**62, "noise", 3))]
    assert all(not torch.isclose(first, o).any() for o in others)
    many = torch.stack([torch.rand(4, generator=common.generator(0, "sample", i)) for i in range(4000)])       # neighbouring keys are independent
    corr = np.corrcoef(many[:-1].T.numpy(), many[1:].T.numpy()) - np.eye(8)
    assert np.abs(corr).max() < 0.07 and abs(many.mean() - 0.5) < 0.02


def test_shards_cover_every_row_once(monkeypatch):
    for w in (1, 2, 3, 7):
        for n in (0, 1, 5, 50):
            parts = []
            for r in range(w):
                monkeypatch.setenv("WORLD_SIZE", str(w)), monkeypatch.setenv("RANK", str(r))
                parts.append(range(*common.shard(n)))
            assert [i for p in parts for i in p] == list(range(n)) and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_get_device_refuses_in_one_line():
    assert common.get_device("cpu").type == "cpu"
    for name in ("cuda:99", "tpu-ish", "mps:7", "meta"):
        assert f"--device {name}" in line_of(common.get_device, name)


# ---------------------------------------------------------------------------------------------- the environment
def test_a_closed_terminal_does_not_end_the_work(capfd):
    """What prints into nothing goes on; the log of a training is in its folder."""
    code = "import os, sys, common; os.close(1); common.log('x' * 100000); common.log('y'); print('alive', file=sys.stderr); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == "alive\n"


def test_names_of_any_script_on_a_terminal_of_ascii():
    code = "import common\n@common.command\ndef main(argv=None):\n    common.log('\\u732b')\nmain()"
    file = ["-c", code.replace("main()", "import sys; sys.modules['__main__'].__file__ = 'x.py'; main()")]
    done = subprocess.run([sys.executable, *file], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout == "\\u732b\n", done


@pytest.mark.parametrize("name, value, words", [
    ("DIST_TIMEOUT", "abc", "DIST_TIMEOUT=abc: must be a whole number"), ("WORLD_SIZE", "two", "WORLD_SIZE=two"), ("WORLD_SIZE", "0", "WORLD_SIZE=0"),
    ("RANK", "-1", "RANK=-1"), ("WORLD_SIZE", "2", "start with torchrun")])
def test_launch_variables_that_make_no_sense_are_one_line(name, value, words, tmp_path, tiny_data):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")}
    if name == "DIST_TIMEOUT":
        env |= {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29411"}
    command = [sys.executable, "prune.py", "--data", tiny_data, "--score", "random", "--keep", "0.5", "--device", "cpu", "--out", tmp_path / "o"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT, env={**env, name: value})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr, done


def test_no_shared_memory_for_locks_means_threads(monkeypatch, capsys):
    """A container without /dev/shm: processes have no locks to share."""
    import multiprocessing.synchronize

    def broken(*a, **kw):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    monkeypatch.setattr(multiprocessing.synchronize, "SemLock", type("SemLock", (), {"__init__": broken}))
    for kind in ("Lock", "BoundedSemaphore", "Semaphore"):
        monkeypatch.setattr(multiprocessing.synchronize, kind, broken)
    with common.open_pool(2) as pool:
        assert [*common.work_ahead(pool, lambda k: k * k, range(9), 3)] == [k * k for k in range(9)]
    assert "/dev/shm" in capsys.readouterr().out


def test_a_judge_that_cannot_be_kept_is_not_trained(tiny_data, monkeypatch, tmp_path):
    """A shared, read-only data folder: said before minutes are spent, with a way that works."""
    import shutil
    from models import scratch
    shutil.copytree(tiny_data, tmp_path / "ro")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "ro")
    monkeypatch.setattr(scratch, "train_scratch", None)               # would be a TypeError
    data = common.open_data(tmp_path / "ro")
    line = line_of(common.open_encoder, "scratch", data, "cpu")
    assert "cannot be written to" in line
    subprocess.run(re.search("cp -rs .*? MINE", line)[0].replace("MINE", str(tmp_path / "mine")), shell=True, check=True)
    mine = common.open_data(tmp_path / "mine")
    assert (mine.folder / "images.npy").is_symlink() and np.array_equal(mine.images, data.images)


def test_home_where_the_shell_left_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    p = common.Parser("doc")
    p.add_argument("--out")
    p.add_argument("more", nargs="*")
    args = p.parse_args(["--out=~/x", "~/y", "~", "a~/b", "~nosuch/z"])
    assert args.out == f"{tmp_path}/x" and args.more == [f"{tmp_path}/y", str(tmp_path), "a~/b", "~nosuch/z"]


# ---------------------------------------------------------------------------------------------- exit codes
def test_command_turns_mistakes_into_one_line_and_the_right_code(capsys):
    def ends(error):
        @common.command
        def main(argv=None):
            raise error
        before = signal.getsignal(signal.SIGTERM)
        try:
            main()
        except SystemExit as e:
            assert signal.getsignal(signal.SIGTERM) is before
            return e.code, capsys.readouterr().err
    code, err = ends(common.UserError("x.npy: is\nwrong"))
    assert code == 2 and err == "test_common.py: error: x.npy: is wrong\n"
    code, err = ends(OSError(errno.ENOSPC, "No space left on device", "big.pt"))
    assert code == 2 and err.count("\n") == 1 and "big.pt" in err and "No space left" in err and "room" in err
    assert ends(KeyboardInterrupt())[0] == 130 and ends(SystemExit(7))[0] == 7
    with pytest.raises(ZeroDivisionError):                            # a bug of ours keeps its traceback
        ends(ZeroDivisionError())
    with pytest.raises(OSError):
        ends(OSError(errno.ENOENT, "no such"))

    @common.command
    def terminated(argv=None):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    with pytest.raises(SystemExit) as e:
        terminated()
    assert e.value.code == 143 and "stopped by SIGTERM; run the same command again" in capsys.readouterr().err

    @common.command
    def parsing(argv=None):
        p = common.Parser("doc")
        p.add_argument("--n", type=common.count)
        return p.parse_args(argv).n
    assert parsing(["--n", "3"]) == 3
    for argv in (["--n", "0"], ["--nonsense"], ["--n"]):
        with pytest.raises(SystemExit) as e:
            parsing(argv)
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.count("\n") == 1 and "error:" in err


# ---------------------------------------------------------------------------------------------- the resume rule
def stage(out, n=1, seed=0, inputs=(), overwrite=False, **kw):
    args = argparse.Namespace(n=n, seed=seed, batch=n * 8, out=str(out), overwrite=overwrite, device="cpu")
    return common.Stage("toy", args, inputs, ("x.npy",), ("batch",), **kw)


def enter(out, **kw):
    with stage(out, **kw) as s:
        return s


def free(folder):
    """Whether another process could claim the folder now."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def test_resume_rule(tmp_path, capsys):
    source, out = tmp_path / "input", tmp_path / "a" / "b"
    source.write_text("1")
    inputs = {"weights": source, "data": {"sha256": "d"}}
    with stage(out, inputs={**inputs, "none": None}) as s:
        assert not s.done and not s.resuming and json.loads((out / "toy.args.json").read_text())["seconds"] is None
        assert not free(out)
    assert free(out)
    with stage(out, inputs=inputs) as s:
        assert not s.done and not s.resuming                          # no part of an output stands: the record binds nobody
        np.save(out / "x.part.npy", 0)
    with stage(out, inputs=inputs) as s:
        assert not s.done and s.resuming                              # interrupted
        s.finish(note=3)                                              # says it is finished, but its output is missing
    record = json.loads((out / "toy.args.json").read_text())
    assert record["seconds"] >= 0 and record["note"] == 3 and record["args"] == {"n": 1, "seed": 0} and record["inputs"]["data"] == "d"
    assert {"commit", "torch", "device"} <= set(record["provenance"])
    with stage(out, inputs=inputs) as s:
        assert not s.done and s.resuming
        s.save("x.npy", 0)
        (out / "x.part.npy").unlink()
        s.finish()
    finished = (out / "toy.args.json").read_bytes()
    free_n = argparse.Namespace(n=2, seed=0, out=str(out), overwrite=False, device="cpu")
    with common.Stage("toy", free_n, inputs, ("x.npy",), ("n",)) as s:
        assert s.done                                                 # a later version no longer binds n
    capsys.readouterr()
    with stage(out, inputs=inputs) as s:
        assert s.done and "nothing to do" in capsys.readouterr().out
    for kw, word in ((dict(n=2), "--n = 1, now 2"), (dict(seed=5), "--seed = 0"), (dict(inputs={"weights": source, "data": {"sha256": "e"}}), "'data'"),
                     (dict(inputs={"data": {"sha256": "d"}}), "'weights'")):
        text = line_of(enter, out, **{"inputs": inputs, **kw})
        assert word in text and "--overwrite" in text
        assert free(out)
    source.write_text("2")
    assert "'weights'" in line_of(enter, out, inputs=inputs)
    assert free(out)
    assert (out / "toy.args.json").read_bytes() == finished           # a refusal changes nothing
    with stage(out, n=2, overwrite=True, stale=("x.npy",)) as s:
        assert not s.done and not s.resuming and not (out / "x.npy").exists()
        s.save("x.npy", 1)
    with stage(out, n=2, ready=lambda: False) as s:
        s.finish()
    with stage(out, n=2, ready=lambda: False) as s:
        assert not s.done                                             # x.npy stands, but is not enough
    (out / "toy.args.json").unlink()
    assert "somebody else" in line_of(enter, out, n=2)
    assert "output folder" in line_of(enter, source)


def test_a_call_that_fails_before_its_first_output_leaves_nothing(tmp_path):
    def fail(out, part=None, **kw):
        with pytest.raises(ZeroDivisionError):
            with stage(out, **kw) as s:
                if part:
                    (s.out / part).write_text("x")
                1 / 0
    fail(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine").mkdir()
    fail(tmp_path / "mine" / "out")
    fail(tmp_path / "mine")
    assert not list((tmp_path / "mine").iterdir())                    # what was there before stays
    for part in ("x.npy", "x.part.npy", "scrap"):
        fail(tmp_path / part, part, scraps=("scrap",))
        assert sorted(f.name for f in (tmp_path / part).iterdir()) == sorted((part, "toy.args.json"))


def test_overwriting_takes_the_record_away_before_the_outputs(tmp_path, monkeypatch):
    """Killed in between, what is left is nobody's: it must never pass for the new call's."""
    with stage(tmp_path, stale=("x.npy",)) as s:
        s.save("x.npy", 0)
        s.finish()
    gone, unlink = [], Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda self, *a, **kw: gone.append(self.name) or unlink(self, *a, **kw))
    with stage(tmp_path, n=2, overwrite=True, stale=("x.npy",)):
        assert gone == ["toy.args.json", "x.npy"]


def test_one_process_in_a_folder_even_after_a_kill(tmp_path):
    code = ("import argparse, common, sys, time\n"
            "args = argparse.Namespace(n=1, seed=0, batch=8, out=sys.argv[1])\n"
            "with common.Stage('toy', args, (), ('x.npy',), ('batch',)) as s:\n"
            "    s.save('x.npy', 0)\n"
            "    print('held', flush=True)\n"
            "    time.sleep(60)")
    p = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "held\n"
    start = time.time()
    assert "another process" in line_of(enter, tmp_path / "out") and time.time() - start < 2
    p.kill()
    p.wait()
    with stage(tmp_path / "out") as s:                                # the kernel has dropped the lock
        assert s.resuming
    assert free(tmp_path / "out")


def test_main_called_from_python_frees_the_folder_however_it_ends(tmp_path):
    @common.command
    def main(n):
        with stage(tmp_path / "out", n=n):
            raise common.UserError("later")
    for n in (1, 2, 1):
        (tmp_path / "out").mkdir(exist_ok=True)
        with pytest.raises(SystemExit) as e:
            main(n)
        assert e.value.code == 2 and free(tmp_path / "out")


def test_a_folder_without_write_permission_is_one_line():
    folder, root = Path(tempfile.mkdtemp()), os.geteuid() == 0        # not below tmp_path, which nobody else may enter
    folder.chmod(0o555)
    try:
        if root:                                                      # who may write anywhere
            os.seteuid(65534)
        assert "cannot write" in line_of(enter, folder / "out") and not (folder / "out").exists()
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755), shutil.rmtree(folder)


# ---------------------------------------------------------------------------------------------- data folders
def test_open_data_and_load_indices_name_the_fault(tiny_data, tmp_path):
    d = common.open_data(tiny_data)
    assert d.images.shape == (50, 8, 8, 1) and d.num_classes == 3 and d.latents is None and d.test_images is None
    assert "no such data folder" in line_of(common.open_data, tmp_path / "none")

    def broken(name, array):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for f in tiny_data.iterdir():
            (folder / f.name).write_bytes(f.read_bytes())
        np.save(folder / name, array)
        text = line_of(common.open_data, folder)
        assert name in text
        return text
    assert "0..3" in broken("labels.npy", np.where(np.arange(50) == 7, 3, d.labels))
    assert "-1" in broken("labels.npy", np.where(np.arange(50) == 7, -1, d.labels))
    broken("labels.npy", d.labels.astype(np.float32))
    broken("images.npy", d.images[:40])
    broken("images.npy", d.images.astype(np.float32))
    broken("images.npy", np.repeat(d.images, 2, axis=3))

    keep = tmp_path / "keep.npy"
    for value, word in (([], "run -"), ([0, 50], "0..49"), ([-1, 3], "run -1"), ([3, 3], "repeats"), ([5, 2], "sorted"), (np.flatnonzero(d.labels != 1), "class 1")):
        np.save(keep, np.array(value, np.int64))
        text = line_of(common.load_indices, keep, 50, d.labels, 3)
        assert word in text and str(keep) in text
    np.save(keep, np.arange(0, 50, 2))
    assert np.array_equal(common.load_indices(keep, 50, d.labels, 3), np.arange(0, 50, 2))


def test_save_grid_places_every_picture(tmp_path):
    from PIL import Image
    x = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4, 1)
    common.save_grid(tmp_path / "g.png", x, least=8)
    sheet = np.asarray(Image.open(tmp_path / "g.png"))[::2, ::2]      # enlarged twice
    assert sheet.shape == (2 * 5 + 1, 3 * 5 + 1) and (sheet[::5] == 255).all()
    for i in range(2):
        for j in range(3):
            assert np.array_equal(sheet[i * 5 + 1:i * 5 + 5, j * 5 + 1:j * 5 + 5], x[i, j, ..., 0])


def test_files_of_another_data_set_are_refused(tiny_data, tmp_path):
    """Another set may have as many images: only the record beside the file tells."""
    d = common.open_data(tiny_data)
    np.save(tmp_path / "keep.npy", np.arange(5))
    common.check_origin(tmp_path / "keep.npy", d)                     # nobody says where it is from: the user's own
    record = tmp_path / "prune.args.json"
    record.write_text(json.dumps({"inputs": {"data": d.info["sha256"]}}))
    common.check_origin(tmp_path / "keep.npy", d)
    record.write_text(json.dumps({"inputs": {"data": "0" * 64}}))
    with pytest.raises(common.UserError, match="another data set than .*tiny"):
        common.check_origin(tmp_path / "keep.npy", d)


def test_single_process(monkeypatch):
    common.single_process("prune.py")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(common.UserError, match="prune.py runs in one process"):
        common.single_process("prune.py")


def test_the_scale_of_fp32_does_not_decay():
    """110 skipped steps in a long run would halve a scale of 1 into underflow; only fp16 has a use for backing off."""
    net = torch.nn.Linear(2, 1)
    optimizer, scaler = common.optimizer_of(net, 1e-3, torch.device("cpu"), "bf16")
    for _ in range(3):
        scaler.scale(net(torch.full((1, 2), torch.nan)).sum()).backward()
        scaler.unscale_(optimizer), scaler.step(optimizer), scaler.update(1.0)
        optimizer.zero_grad()
    assert scaler.get_scale() == 1 and all(p.isfinite().all() for p in net.parameters())


# ---------------------------------------------------------------------------------------------- rows that all processes make
def rows_of(ids):
    return np.stack([ids, ids * 2.0, -ids], 1)                        # what row i must hold: (i, 2 i, -i)


def test_fill_goes_on_where_it_stopped(tmp_path):
    seen = []

    def compute(ids):
        if len(seen) == 2:
            seen.append(None)
            raise KeyboardInterrupt
        seen.append(ids.tolist())
        return rows_of(ids)
    with pytest.raises(KeyboardInterrupt):
        common.fill(tmp_path, "x", (11, 3), np.float16, 4, compute)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.done.npy", "x.part.npy"] and np.load(tmp_path / "x.done.npy").tolist() == [1] * 8 + [0] * 3
    assert (np.load(tmp_path / "x.part.npy")[8:] == 0).all()
    x, seconds = common.fill(tmp_path, "x", (11, 3), np.float16, 4, compute)
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], None, [8, 9, 10]] and seconds >= 0 and x.dtype == np.float16 and not x.flags.writeable
    np.testing.assert_array_equal(x, rows_of(np.arange(11)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npy", "x.seconds.json"]
    common.fill(tmp_path, "x", (11, 3), np.float16, 4, None)          # it stands: nothing is computed


def test_fill_counts_the_seconds_of_interrupted_calls(tmp_path, monkeypatch):
    """Each batch takes 40 s here. The note is kept up as it goes; what a call that finds nothing left adds is its own time, not a share of the rows'."""
    clock, stop = [0.0], [True]
    monkeypatch.setattr(common.rowfill.time, "time", lambda: clock[0])

    def compute(ids):
        if 9 in ids and stop:
            stop.pop()
            raise KeyboardInterrupt
        clock[0] += 40
        return rows_of(ids)
    with pytest.raises(KeyboardInterrupt):
        common.fill(tmp_path, "x", (11, 3), np.float16, 4, compute)
    assert common.fill(tmp_path, "x", (11, 3), np.float16, 4, compute)[1] == 120
    (tmp_path / "x.npy").rename(tmp_path / "x.part.npy")              # killed just before the end
    np.save(tmp_path / "x.done.npy", np.ones(11, np.uint8))
    assert common.fill(tmp_path, "x", (11, 3), np.float16, 4, None)[1] == 120
    for f in tmp_path.glob("x*.npy"):                                 # made anew: an old note does not count
        f.unlink()
    assert common.fill(tmp_path, "x", (11, 3), np.float16, 4, compute)[1] == 120


def test_fill_writes_scattered_rows_at_their_places(tmp_path):
    """Holes as a call with other processes leaves them; vectors and numbers, of any width."""
    for shape, kind in (((9,), np.float32), ((9, 2, 3), np.uint8)):
        full = (np.arange(np.prod(shape)) % 251).reshape(shape).astype(kind)
        common.allocate(tmp_path / "y.done.npy", np.uint8, (9,)), common.allocate(tmp_path / "y.part.npy", kind, shape)
        done, part = (np.load(tmp_path / f"y.{n}.npy", mmap_mode="r+") for n in ("done", "part"))
        done[[1, 4, 5]], part[[1, 4, 5]] = 1, 77
        done.flush(), part.flush()
        y, _ = common.fill(tmp_path, "y", shape, kind, 4, lambda ids, full=full: full[ids])
        want = full.copy()
        want[[1, 4, 5]] = 77                                          # what was there is left alone
        np.testing.assert_array_equal(y, want)
        for f in tmp_path.iterdir():
            f.unlink()


def test_fill_marks_a_row_after_its_bytes_are_on_disk(tmp_path, monkeypatch):
    calls, sync, write = [], os.fsync, common.files.write_at
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("sync " + Path(f"/proc/self/fd/{fd}").readlink().name) or sync(fd))
    monkeypatch.setattr(common.rowfill, "write_at", lambda file, *a: calls.append("write " + Path(file.name).name) or write(file, *a))
    common.fill(tmp_path, "x", (2, 3), np.float32, 1, rows_of)
    row = ["write x.part.npy", "sync x.part.npy", "write x.done.npy"]
    assert [c for c in calls if c[-10:] in ("x.part.npy", "x.done.npy")] == [*row, *row, "sync x.done.npy"]


def test_a_full_disk_is_said_when_the_space_is_reserved(tmp_path, monkeypatch):
    def reserve(code):
        def fallocate(*_):
            raise OSError(code, os.strerror(code))
        monkeypatch.setattr(os, "posix_fallocate", fallocate)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        reserve(code)
        with pytest.raises(OSError) as e:
            common.fill(tmp_path, "x", (11, 3), np.float16, 4, rows_of)
        assert e.value.errno == code and str(e.value.filename).startswith(str(tmp_path / "x")) and not list(tmp_path.iterdir())
    reserve(errno.EOPNOTSUPP)                                         # a file system without the call
    assert len(common.fill(tmp_path, "x", (11, 3), np.float16, 4, rows_of)[0]) == 11
    monkeypatch.delattr(os, "posix_fallocate")
    assert len(common.fill(tmp_path, "y", (11, 3), np.float16, 4, rows_of)[0]) == 11


FILL = """
import os, signal, sys, time
import numpy as np, common
calls = []
@common.command
def main(argv=None):
    common.get_device("cpu")
    how, out = sys.argv[1:]
    def compute(ids):
        calls.append(ids)
        print("rows", *ids)
        if how == "die" and len(calls) == 2:
            time.sleep(0.5)                                           # until every rank has done one batch
            os.kill(os.getpid(), signal.SIGKILL)
        if common.rank() == 1:
            if how == "error":
                raise common.UserError("image 7 is damaged")
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "stuck":
                time.sleep(60)
            if how == "bug":
                1 / 0
        return np.stack([ids, ids * 2.0, -ids], 1)
    def alone():
        raise common.UserError("rank 0 has found it")
    if how == "rank 0":
        common.from_rank0(alone)
    if how == "patient":                                              # rank 0 may work alone for longer than the others wait for each other
        common.from_rank0(lambda: time.sleep(3))
    x, seconds = common.fill(out, "x", (11, 3), np.float32, 4, compute)
    sizes = common.gather(len(x))
    assert sizes == ([11] * common.world() if common.rank() == 0 else None)
    print("done", *x[:, 1].astype(int))
main()
"""


@pytest.fixture
def stage_file(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "stage.py").write_text(FILL)
    return tmp_path / "stage.py"


@pytest.mark.parametrize("first, then", [(2, 1), pytest.param(1, 3, marks=pytest.mark.slow), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_fill_goes_on_with_another_number_of_processes(first, then, stage_file, tmp_path):
    out = tmp_path / "out"
    assert {code for code, *_ in processes(first, stage_file, "die", out)} == {-signal.SIGKILL}
    held = np.flatnonzero(np.load(out / "x.done.npy"))
    assert 0 < len(held) < 11 and np.array_equal(np.load(out / "x.part.npy")[held], rows_of(held))
    ranks = processes(then, stage_file, "go", out)
    again = [[int(i) for line in text.splitlines() if line.startswith("rows") for i in line.split()[1:]] for _, text, _ in ranks]
    assert sorted(sum(again, [])) == sorted(set(range(11)) - set(held)) and max(map(len, again)) - min(map(len, again)) <= 1   # the rest, evenly
    assert all(code == 0 and f"done {' '.join(str(2 * i) for i in range(11))}" in text for code, text, _ in ranks), ranks
    np.testing.assert_array_equal(np.load(out / "x.npy"), rows_of(np.arange(11)))


FAILURES = [("error", "image 7 is damaged [rank 1 of 2]"), ("killed", "rank 1 has ended"),
            *(pytest.param(*case, marks=pytest.mark.slow) for case in (("stuck", "rank 1 has ended, or did not come within DIST_TIMEOUT = 2 s"),
                                                                       ("rank 0", "rank 0 has found it [rank 0 of 2]"), ("bug", "ZeroDivisionError")))]


@pytest.mark.parametrize("how, said", FAILURES, ids=["error", "killed", "stuck", "rank 0", "bug"])
def test_a_rank_that_fails_ends_all(how, said, stage_file, tmp_path):
    start = time.time()
    if how == "stuck":                                                # torchrun would end the one that sleeps
        stage_file.write_text(f"import threading, os\nthreading.Timer(12, lambda: os._exit(99)).start()\n{FILL}")
    ranks = processes(2, stage_file, how, tmp_path / "out", DIST_TIMEOUT="2")
    assert all(code for code, *_ in ranks) and said in " ".join(err for *_, err in ranks), ranks
    assert ranks[0][0] != 99 and time.time() - start < 40 and not (tmp_path / "out" / "x.npy").exists(), ranks


def test_what_the_network_library_says_is_not_lost(monkeypatch, capsys):
    """Two processes on one GPU, no route between two nodes: not every such error means that another process has ended."""
    codes = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(os, "_exit", lambda code: codes.append(code))

    @common.command
    def main(argv):
        raise RuntimeError("NCCL error in: x.cpp:94, invalid usage\nLast error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000")
    with pytest.raises(SystemExit):
        main([])
    err = capsys.readouterr().err
    assert codes == [1] and err.count("\n") == 1 and "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000" in err, err


@pytest.mark.slow
def test_rank_0_may_take_its_time(stage_file, tmp_path):
    ranks = processes(2, stage_file, "patient", tmp_path / "out", DIST_TIMEOUT="2")
    assert [code for code, *_ in ranks] == [0, 0], ranks


# ---------------------------------------------------------------------------------------------- names in pictures
NAMES = ["$_$", "a$b", "$\\frac{", "100% \\alpha", "\u732b", "caf\u00e9", "\U0001f408", "plain_name"]


def test_class_names_of_any_kind_are_drawn(tmp_path, recwarn):
    """Dollars are no formula; what no font here has becomes its number, not a box, of which matplotlib would warn."""
    from common import pictures
    n = len(NAMES)
    data = SimpleNamespace(classes=NAMES, num_classes=n, labels=np.arange(5 * n) % n, images=np.zeros((5 * n, 8, 8, 1), np.uint8))
    values, keep = np.random.default_rng(0).random(5 * n), np.arange(2 * n)
    pictures.class_histograms(tmp_path / "a.png", data, values, keep, "of $HOME", 12, 2.2)
    pictures.cut_montage(tmp_path / "b.png", data, values, keep, values, "$_$")
    history = np.full((3, n), 1 / n)
    pictures.save_weights(tmp_path / "c.png", NAMES, history, *[np.ones(n)] * 5, 0.5, 1)
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in "abc")
    assert not [w for w in recwarn if "Glyph" in str(w.message)]
    assert pictures.plain("$_$") == r"\$_\$" and pictures.plain("caf\u00e9") == "caf\u00e9" and pictures.plain("\U0010fffd") == r"\U0010fffd"


def test_a_notebooks_backend_does_not_matter(tmp_path):
    code = f"import common; fig = common.figure(2, 2); fig.add_subplot().plot([1, 2]); common.save_figure({str(tmp_path / 'a.png')!r}, fig)"
    for backend in ("module://no_such_inline", "no such backend"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "MPLBACKEND": backend})
        assert done.returncode == 0 and not done.stderr and (tmp_path / "a.png").stat().st_size > 500, done
        (tmp_path / "a.png").unlink()


# ---------------------------------------------------------------------------------------------- signals
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT", *(pytest.param(s, marks=pytest.mark.slow) for s in ("SIGUSR1", "SIGUSR2", "SIGXCPU"))])
def test_every_signal_that_asks_to_end_is_heard(name, tmp_path):
    """Outside a loop: an extraction keeps the rows that are done, says what happened, and its code tells a scheduler to call again."""
    (tmp_path / "go.py").write_text(f"""import sys, time
sys.path.insert(0, {str(ROOT)!r})
import numpy as np, common
def compute(rows):
    time.sleep(0.2)
    return np.full((len(rows), 2), 7.0)
@common.command
def main(argv=None):
    common.fill({str(tmp_path)!r}, "x", (40, 2), np.float32, 2, compute)
main()
""")
    p = subprocess.Popen([sys.executable, tmp_path / "go.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         preexec_fn=lambda: [signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGHUP)])
    flags = tmp_path / "x.done.npy"
    end = time.time() + 60
    while time.time() < end and not (flags.exists() and flags.stat().st_size and np.load(flags).sum() > 2):
        time.sleep(0.05)
    p.send_signal(getattr(signal, name))
    _, err = p.communicate(timeout=30)
    said = "Ctrl-C" if name == "SIGINT" else name
    assert p.returncode == (130 if name == "SIGINT" else 143) and f"go.py: stopped by {said}; run the same command again" in err and "Traceback" not in err
    done = np.load(flags) == 1
    assert 2 < done.sum() < 40 and (np.load(tmp_path / "x.part.npy")[done] == 7).all()


def test_what_is_ignored_stays_ignored():
    """nohup ignores HUP and goes on when the terminal closes; a second signal does not cut short what the first tidies up."""
    code = """import os, signal, sys
from common.signals import listen, stoppable
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with stoppable():
    os.kill(os.getpid(), signal.SIGHUP)
    print("on")
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        signal.pause()
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        print("tidy", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 143 and done.stdout == "on\ntidy\n", done
