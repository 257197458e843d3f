"""The whole chain on digits against kills, full disks, second processes and time. Run by hand; tests/test_chaos.py runs a short form.

    python tests/chaos.py --kills 30 --seed 0       kill every stage at random moments, restart it by the same command, compare with a straight run
    python tests/chaos.py --checks overwrite disk   other checks, see CHECKS; run_all kills run_all.sh itself, with everything that it has started
    python tests/chaos.py --soak 60                 a long training: memory, open files and disk over so many minutes

Every call of a script is a fork of this process, which has imported everything and computed nothing: a stage then costs what it does, not four seconds
of imports, and random moments fall into its work. The child runs main(argv) in a process group of its own, as `python SCRIPT argv` would.
"""
import argparse
import collections
import contextlib
import fcntl
import hashlib
import json
import os
import random
import re
import resource
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")                         # bit equality, and a parent without threads may fork
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib.backends.backend_agg  # noqa: E402, F401
import matplotlib.figure  # noqa: E402, F401
import numpy as np  # noqa: E402
import PIL.Image  # noqa: E402
import scipy.stats  # noqa: E402, F401
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401 (every optimizer imports it)

import attach, data, evaluate, prune, report, reweight, sample, train  # noqa: E401, E402, F401
from common.sources import DIGIT_NAMES  # noqa: E402
from conftest import copy_kit  # noqa: E402

# (stage, its out folder, command): all paths relative, so that two folders hold the same records
TRAIN = "train.py --data d --preset digits --steps 12 --batch-size 16 --checkpoint-every 4 --log-every 1 --sample-every 6 --device cpu"
DRAW = "--num 40 --batch-size 10 --sampler heun --steps 3 --cfg 1.5 --npz --device cpu"
CHAIN = [("data", "d", "data.py ../some.npz --workers 1 --out d"),
         ("train", "full", f"{TRAIN} --out full"),
         ("sample", "full", f"sample.py --checkpoint full/last.pt {DRAW} --out full"),
         ("prune", "prune", "prune.py --data d --surrogate ddae --weights full/last.pt --score gaussian --per-class 5 --device cpu --out prune"),
         ("reweight", "weigh", "reweight.py --data d --indices prune/keep.npy --reference full/last.pt --steps 12 --batch-size 16 --burn-in 2 "
          "--eta 0.05 --checkpoint-every 4 --device cpu --out weigh"),
         ("attach", "pick", "attach.py --data d --reference full/last.pt --per-class 5 --visual ddae --judge pixels --device cpu --out pick"),
         ("train, weighted", "dro", f"{TRAIN} --indices prune/keep.npy --weights weigh/weights.npy --out dro"),
         ("train, attached", "d2c", f"{TRAIN} --attach pick --out d2c"),
         ("sample, weighted", "dro", f"sample.py --checkpoint dro/last.pt {DRAW} --out dro"),
         ("sample, attached", "d2c", f"sample.py --checkpoint d2c/last.pt {DRAW} --out d2c"),
         ("evaluate", "full", "evaluate.py --data d --runs full dro d2c --encoder scratch pixels --device cpu"),
         ("report", "report", "report.py full dro d2c --out report")]


# ---------------------------------------------------------------------------------------------- one call
class Events:
    """Counts what a save consists of (write at a place, flush, rename, remove) and kills its process group just before one of them."""

    def __init__(self, at=None):
        self.n, self.at = 0, at
        for name in ("fsync", "replace", "unlink", "pwrite"):
            setattr(os, name, self.counted(name, getattr(os, name)))

    def counted(self, name, real):
        def call(*args, **kw):
            self.n += 1
            if self.n == self.at:
                if name == "pwrite":                                  # half of the bytes are there
                    real(args[0], args[1][:len(args[1]) // 2], args[2])
                os.killpg(0, signal.SIGKILL)
            return real(*args, **kw)
        return call


def call(command, cwd, event=None, after=None, how=signal.SIGKILL, limit=None, timeout=300):
    """A script's call in `cwd`: (exit code, negative for a signal; all output; events that a save consists of; seconds).

    event: kill just before the n-th of them; after: send the signal `how` after so many seconds; limit: bytes that a file may have (RLIMIT_FSIZE).
    """
    r, w = os.pipe()
    pid, start = os.fork(), time.time()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            os.close(r), os.dup2(w, 1), os.dup2(w, 2), os.chdir(cwd)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            events, (script, *argv) = Events(event), shlex.split(command)
            try:
                sys.modules[script.removesuffix(".py")].main(argv)
                code = 0
            except SystemExit as e:
                code = e.code or 0
            print(f"events: {events.n}", flush=True)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    os.close(w)
    text, sent = b"", after is None
    while True:
        left = (timeout if sent else after) - (time.time() - start)
        ready = select.select([r], [], [], max(0, left))[0]
        if ready:
            if not (block := os.read(r, 65536)):
                break
            text += block
        elif not sent:
            with contextlib.suppress(ProcessLookupError):             # before its setsid there is no such group
                os.killpg(pid, how)
                sent = True
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
    os.close(r)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    text = text.decode(errors="replace")
    found = re.search(r"events: (\d+)\n", text)
    return code, text.replace(found[0], "") if found else text, int(found[1]) if found else None, time.time() - start


# ---------------------------------------------------------------------------------------------- what a folder says
TIMES = re.compile("second|spent|provenance|cost|preparation")        # how long things took, and on what
OF_TIMES = re.compile(r"(report|details)\.md|frontier\.png|.*\.seconds\.json")  # show such figures: only that they stand is compared
HASHED = {"checkpoint", "reference", "weights", "visual_weights", "baseline", "identity", "visual"}             # hashes of checkpoints, which hold their seconds


def plain(value):
    """A value out of a file as something to compare: tensors as bytes, without times."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items() if not TIMES.search(str(k)) and not (k in HASHED and isinstance(v, str))}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (torch.Tensor, np.ndarray)):
        a = np.ascontiguousarray(value)
        return f"{a.dtype}{a.shape}{hashlib.sha256(a.tobytes()).hexdigest()}"
    return value


def content(folder):
    """{path: what the file says} of every file below a folder; a file that cannot be read whole fails here."""
    out = {}
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".pt":
            value = plain(torch.load(path, weights_only=True))
        elif path.suffix == ".npy":
            value = plain(np.load(path, allow_pickle=False))
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as z:
                value = plain({k: z[k] for k in z.files})
        elif path.suffix in (".json", ".jsonl") and not OF_TIMES.fullmatch(path.name):
            text = path.read_text()                                   # a log's last line may be half: a resume cuts it off
            value = [plain(json.loads(t)) for t in ([x for x in text.splitlines() if x.endswith("}")] if path.suffix == ".jsonl" else [text])]
        else:
            value = None if OF_TIMES.fullmatch(path.name) else hashlib.sha256(path.read_bytes()).hexdigest()
        out[name] = value
    return out


def differences(a, b, where=""):
    """Where two such values differ, in words."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [x for k in sorted({*a, *b}) for x in ([f"{where}/{k}: {'only in the first' if k in a else 'only in the second'}"] if (k in a) != (k in b) else
                                                     differences(a[k], b[k], f"{where}/{k}"))]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [x for k, (u, v) in enumerate(zip(a, b)) for x in differences(u, v, f"{where}[{k}]")]
    return [] if a == b else [f"{where}: {str(a)[:60]} != {str(b)[:60]}"]


class Wrong(Exception):
    """A check found something."""


def expect(true, *what):
    if not true:
        raise Wrong(" ".join(map(str, what)))


def straight(folder):
    """The chain without interruption: {stage: (events, seconds, the files it made)}."""
    folder.mkdir(parents=True)
    with np.load(ROOT / "data/digits.npz") as z:                      # the first images of each split: the chain has to be short
        np.savez(folder.parent / "some.npz", classes=DIGIT_NAMES,
                 **{k: z[k][:60 if "test" in k else 150] for k in z.files})
    facts = {}
    for stage, _, command in CHAIN:
        before = set(folder.rglob("*"))
        code, text, n, seconds = call(command, folder)
        expect(code == 0, stage, "ended with", code, text[-2000:])
        facts[stage] = n, seconds, [f.relative_to(folder) for f in folder.rglob("*") if f not in before and f.is_file()]
    return facts


def refusal(code, text):
    """The one line of a call that had to be refused."""
    said = [line for line in text.splitlines() if "error:" in line or "Traceback" in line or "Error" in line.split(":")[0]]
    expect(code == 2 and len(said) == 1, "exit code", code, "and not one line of error:", text[-1500:])
    return said[0]


# ---------------------------------------------------------------------------------------------- the checks
def check_same(base, facts, kills, rng):
    """The same commands in another folder give the same arrays and figures."""
    straight(base / "again")
    found = differences(content(base / "ref"), content(base / "again"))
    expect(not found, f"{len(found)} differences between two straight runs:", *found[:8])
    return f"{len(content(base / 'ref'))} files of {len(CHAIN)} stages equal"


def check_kills(base, facts, kills, rng):
    """Kills at random moments, half of them inside a save; then the same command again."""
    table, done, rounds = collections.defaultdict(collections.Counter), 0, 0
    wanted = content(base / "ref")
    while done < kills:
        folder, rounds = base / f"killed{rounds}", rounds + 1
        folder.mkdir()
        names = [stage for stage, *_ in CHAIN]                         # every stage once, then again
        share = collections.Counter((rng.sample(names, len(names)) + rng.sample(names, len(names)))[:kills - done])
        for stage, out, command in CHAIN:
            for _ in range(share[stage]):
                n, seconds, _ = facts[stage]
                kind = rng.choice(["save", "save", "moment", "term"])
                plan = dict(event=rng.randint(1, n)) if kind == "save" else dict(after=rng.uniform(0.05, 0.8) * seconds)
                if kind == "term":
                    plan["how"] = signal.SIGTERM
                code, text, _, _ = call(command, folder, **plan)
                if code == 0:                                         # it had ended before
                    break
                expect(code == (143 if kind == "term" else -9), f"{stage} {plan}: exit code {code}:", text[-1500:])
                table[stage][kind], done = table[stage][kind] + 1, done + 1
                if stopped := re.search(r"stopped by SIGTERM at step (\d+)", text):
                    state = folder / out / ("proxy.pt" if stage == "reweight" else "last.pt")
                    expect(torch.load(state, weights_only=True)["step"] == int(stopped[1]), f"{state}: not the step that it said", stopped[0])
            code, text, _, _ = call(command, folder)
            expect(code == 0, f"{stage}: after {dict(table[stage])} it ended with", code, text[-1500:])
        for stage, _, command in CHAIN:                               # all is complete; what a kill at the very end left is swept away
            code, text, _, _ = call(command, folder)
            expect(code == 0 and (stage == "report" or "nothing to do" in text), stage, "again:", code, text[-1500:])
        found = differences(wanted, content(folder))
        expect(not found, f"round {rounds}: {len(found)} differences, kills {dict(table)}:", *found[:8])
    print(f"{'stage':<20}{'in a save':>10}{'at a moment':>12}{'SIGTERM':>9}")
    for stage, *_ in CHAIN:
        print(f"{stage:<20}{table[stage]['save']:>10}{table[stage]['moment']:>12}{table[stage]['term']:>9}")
    inside = sum(c["save"] for c in table.values())
    return f"{done} kills in {rounds} chains, {inside} of them inside a save: all {len(wanted)} files equal those of the straight run, no temporary file left"


def check_overwrite(base, facts, kills, rng):
    """A kill at every event of an --overwrite: the old command finds the old output or refuses, the new one refuses or makes the new output."""
    tried = 0
    for stage in ("data", "train", "sample", "prune", "reweight", "attach"):
        _, out, old = next(row for row in CHAIN if row[0] == stage)
        new = old + " --seed 1"
        before, after = base / "ref", base / "over_new"
        shutil.copytree(before, after, copy_function=shutil.copy2)
        for f in facts[stage][2]:                                     # the new output as it comes out of an empty folder
            (after / f).unlink()
        code, text, _, _ = call(new, after)
        expect(code == 0, stage, code, text[-1500:])
        shutil.copytree(before, base / "over_try")
        n = call(f"{new} --overwrite", base / "over_try")[2]
        shutil.rmtree(base / "over_try")
        others = re.compile(r"scratch|stats_|samples\.|sample_labels|sample\.args|grid|nearest|metrics|evaluate")
        said = lambda folder: {k: v for k, v in content(folder / out).items() if not others.match(k) or stage == "sample"}      # noqa: E731
        states = said(before), said(after)                            # but for what others cache in a data folder, or drew from a run that is gone
        events = range(1, n + 1) if kills >= n else {*range(1, kills // 2 + 1), *rng.sample(range(1, n + 1), kills - kills // 2)}         # old files go first
        for event in sorted(events):
            for command, right in ((old, states[0]), (new, states[1])):
                there = base / "over_try"
                shutil.copytree(before, there)
                code, text, _, _ = call(f"{new} --overwrite", there, event=event)
                expect(code == -9, stage, event, code, text[-500:])
                code, text, _, _ = call(command, there)
                if code:                                              # the record goes first: then what is left is nobody's
                    expect(re.search("was made with|of another stage or of somebody else", refusal(code, text)), stage, event, text)
                else:
                    found = differences(right, said(there))
                    expect(not found, f"{stage} --overwrite, killed before event {event} of {n}, then '{command[-30:]}':", *found[:5])
                code, text, _, _ = call(f"{command} --overwrite", there)        # and --overwrite always helps
                found = differences(right, said(there)) if code == 0 else [text[-500:]]
                expect(not found, f"{stage}, event {event}: --overwrite after the kill:", *found[:5])
                shutil.rmtree(there)
                tried += 1
        shutil.rmtree(after)
    return f"{tried} kills inside an --overwrite, never the old output for the new one's"


def check_disk(base, facts, kills, rng):
    """Every stage with a limit on the size of files just below each file that it writes, then without."""
    folder, refused = base / "limited", 0
    folder.mkdir()
    for stage, out, command in CHAIN:
        before = {p for p in (base / "ref").rglob("*")} if stage == "evaluate" else set()
        made = [p for p in (base / "ref" / out).rglob("*") if p.is_file() and not (folder / p.relative_to(base / "ref")).exists() and p not in before]
        limits = sorted({0, 1, *(p.stat().st_size - 1 for p in made)})
        for limit in limits if kills >= len(limits) else sorted(rng.sample(limits, kills)):
            good = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and (folder / out) not in p.parents}
            code, text, _, _ = call(command, folder, limit=limit)
            if code:
                said = refusal(code, text)
                expect("run the same command again" in said or "cannot write there" in said, stage, limit, said)
                refused += 1
            content(folder)                                           # all that stands can be read
            expect(all(p.read_bytes() == b for p, b in good.items()), stage, limit, "changed another stage's file")
            expect(not list(folder.rglob(".*.tmp*")), stage, limit, "left a temporary file")
        code, text, _, _ = call(command, folder)
        expect(code == 0, stage, "with room again:", code, text[-1500:])
    found = differences(content(base / "ref"), content(folder))
    expect(not found, "after", refused, "refusals:", *found[:8])
    return f"{refused} refusals for want of room, one line each; the chain then gives the files of the straight run"


@contextlib.contextmanager
def small_disk(folder):
    """A tmpfs at `folder`; yields resize(bytes, options). Raises PermissionError where this user may not mount."""
    def mount(*options):
        if (p := subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True, text=True)).returncode:
            raise PermissionError(p.stderr)
    folder.mkdir()
    if shutil.which("mount") is None:
        raise PermissionError("no mount command")
    mount("-o", "size=64m")
    try:
        yield lambda size, more="rw": mount("-o", f"remount,size={int(size)},{more}")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def check_full(base, facts, kills, rng):
    """Every stage on a disk that is full now, or soon; then with room. Last of all a disk that may not be written to."""
    refused, need = 0, 0
    try:
        with small_disk(base / "full") as resize:
            folder = base / "full"
            for stage, out, command in CHAIN:
                for share in (0, 0.3, 0.8):
                    need = sum(p.stat().st_blocks * 512 for p in (base / "ref" / out).rglob("*"))
                    page = os.sysconf("SC_PAGE_SIZE")
                    used = shutil.disk_usage(folder).used
                    resize(max(used + share * need, page) // page * page)
                    code, text, _, _ = call(command, folder)
                    if code:
                        said = refusal(code, text)
                        expect("run the same command again" in said or "cannot write there" in said or "make room" in said, stage, share, said)
                        refused += 1
                    content(folder)
                    resize(2**26)
                code, text, _, _ = call(command, folder)
                expect(code == 0, stage, "with room again:", code, text[-1500:])
            found = differences(content(base / "ref"), content(folder))
            expect(not found, *found[:8])
            resize(2**26, "ro")
            for stage, out, command in CHAIN:
                for c in {command + " --overwrite" * (stage == "evaluate"), command + " --overwrite" * (stage != "report")}:
                    code, text, _, seconds = call(c, folder)
                    said = refusal(code, text)
                    expect(re.search("cannot write|Read-only", said) and seconds < 5, stage, f"{seconds:.1f} s", said)
                    refused += 1
    except PermissionError as e:
        return f"skipped: no mount here ({str(e).strip()[:80]})"
    return f"{refused} refusals on a full or read-only disk, one line each; with room the chain gives the files of the straight run"


def check_lock(base, facts, kills, rng):
    """A second process in an out folder is refused at once, in every script."""
    folder = base / "ref"
    for stage, out, command in CHAIN:
        fd = os.open(folder / out, os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
        for c in {command + " --overwrite" * (stage == "evaluate"), command + " --overwrite" * (stage != "report")}:          # complete, evaluate needs no lock
            code, text, _, _ = call(c, folder)
            expect("another process" in refusal(code, text), stage, text[-500:])
        os.close(fd)
        expect({p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before, stage, "changed something")
    return f"{len(CHAIN)} commands refused"


def check_run_all(base, facts, kills, rng):
    """run_all.sh itself: killed with all that it has started, at random moments, and started again by the same command until it ends."""
    env = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "RUNS": "full pruned-dro d2c-select-attach", "SEEDS": "0", "STEPS": "12", "NUM_SAMPLES": "40",
           "TRAIN": "--checkpoint-every 4", "SAMPLER": "--sampler heun --steps 3 --cfg 1.5", "DRO": "--eta 0.05 --steps 12 --batch-size 16 --burn-in 2 --checkpoint-every 4", "DEVICE": "cpu"}

    def run(there, limit=None):
        """Exit code and output, or None when it was killed after `limit` seconds."""
        with open(there / "log", "a+") as log:
            p = subprocess.Popen(["bash", "run_all.sh"], cwd=there, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code = p.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(p.pid, signal.SIGKILL)
                p.wait()
                return None
            expect(code == 0, there, "ended with", code, (there / "log").read_text()[-2000:])
            return code
    first, start = copy_kit(base / "straight/kit"), time.time()
    run(first)
    seconds, done, rounds = time.time() - start, 0, 0
    wanted, at = {k: content(first / k) for k in ("runs", "data")}, collections.Counter()
    while done < kills:
        there, rounds = copy_kit(base / f"killed{rounds}/kit"), rounds + 1
        while run(there, rng.uniform(0.05, 1.2) * seconds if done < kills else None) is None:
            done, began = done + 1, [x.split()[1] for x in (there / "log").read_text().splitlines() if x.startswith("--- ")]
            at[began[-1] if began else "before the first stage"] += 1
        found = differences(wanted, {k: content(there / k) for k in ("runs", "data")})
        expect(not found, f"{len(found)} differences after {done} kills {dict(at)}:", *found[:8])
        expect(not list(there.rglob(".*.tmp*")), "left a temporary file")
    return f"{done} kills in {rounds} runs of run_all.sh ({', '.join(f'{k} {n}' for k, n in at.most_common())}): {sum(map(len, wanted.values()))} files equal those of an undisturbed run"


CHECKS = {name.removeprefix("check_"): f for name, f in list(globals().items()) if name.startswith("check_")}


# ---------------------------------------------------------------------------------------------- time
def slope(x, y):
    """Least-squares slope of y over x."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    return float(((x - x.mean()) * (y - y.mean())).sum() / max(((x - x.mean()) ** 2).sum(), 1e-12))


def soak(base, minutes, every=10):
    """A training of digits with a checkpoint every 200 steps: memory, open files, threads and disk every ten seconds; are they flat after the warm-up?

    The numbered checkpoints (step_*.pt) and the log grow by design, so the disk is counted without them.
    """
    subprocess.run([sys.executable, ROOT / "data.py", "digits", "--out", base / "d"], check=True, stdout=subprocess.DEVNULL)
    run, end, rows = base / "run", time.time() + 60 * minutes, []
    p = subprocess.Popen([sys.executable, ROOT / "train.py", "--data", base / "d", "--preset", "digits", "--schedule", "constant", "--lr", "1e-3", "--steps", str(10**9),
                          "--checkpoint-every", "200", "--sample-every", "400", "--device", "cpu", "--out", run], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(f"{'minutes':>8}{'steps >=':>9}{'RSS MB':>9}{'files':>7}{'threads':>9}{'disk kB':>9}{'numbered':>10}")
    try:
        while time.time() < end and p.poll() is None:
            time.sleep(every)
            proc = Path(f"/proc/{p.pid}")
            with contextlib.suppress(FileNotFoundError):              # a temporary file that is gone by now
                files = [f for f in run.iterdir() if not f.name.startswith(".")] if run.exists() else []
                numbered = [f for f in files if re.match(r"step_|samples_|stats", f.name)]
                memory = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
                rows.append((round((time.time() - end) / 60 + minutes, 2), 200 * sum(f.name.startswith("step_") for f in files), memory, len(os.listdir(proc / "fd")),
                             len(os.listdir(proc / "task")), sum(f.stat().st_size for f in files if f not in numbered) / 1024, len(numbered)))
                print("{:>8.2f}{:>9,}{:>9.1f}{:>7}{:>9}{:>9.0f}{:>10}".format(*rows[-1]), flush=True)
    finally:
        p.terminate()
        code = p.wait(60)
    expect(code == 143, "training ended with", code)
    warm = rows[min(len(rows) // 3, 60):]
    for k, name, least in ((2, "RSS, MB", 0.01), (3, "open files", 0), (4, "threads", 0), (5, "disk without numbered files, kB", 0.01)):
        hours, values = [r[0] / 60 for r in warm], [r[k] for r in warm]
        rise = slope(hours, values) * (hours[-1] - hours[0])
        print(f"{name}: {min(values):,.1f} .. {max(values):,.1f} after the warm-up, {slope(hours, values):+,.2f} an hour: "
              f"{'flat' if abs(rise) <= max(least * values[0], 0.5) else 'NOT FLAT'}")


def main():
    PIL.Image.init()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=30, help="kills in all; of --overwrite and of limits: most per stage")
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    p.add_argument("--checks", nargs="+", default=["kills"], choices=CHECKS)
    p.add_argument("--soak", type=float, metavar="MINUTES", help="train for so long instead")
    p.add_argument("--out", type=Path, help="folder to work in; default: a temporary one")
    p.add_argument("--short", action="store_true", help="a shorter chain: one network, one judge")
    a = p.parse_args()
    if a.short:
        CHAIN[:] = [(stage, out, command.replace("full dro d2c", "full").replace("scratch pixels", "pixels").replace(" --sample-every 6", ""))
                    for stage, out, command in CHAIN if "," not in stage]
    wrong = 0
    with tempfile.TemporaryDirectory() as tmp:
        base = a.out or Path(tmp)
        if a.soak:
            return soak(base, a.soak)
        facts = straight(base / "ref")
        print("   ".join(f"{stage} {seconds:.1f} s" for stage, (_, seconds, _) in facts.items()))
        print(f"straight chain: {sum(s for _, s, _ in facts.values()):.1f} s, {sum(n for n, *_ in facts.values())} events", flush=True)
        for name in a.checks:
            start = time.time()
            try:
                said = CHECKS[name](base, facts, a.kills, random.Random(a.seed))
            except Wrong as e:
                said, wrong = f"WRONG: {e}", wrong + 1
            print(f"{name}: {said} ({time.time() - start:.0f} s)", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
