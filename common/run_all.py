"""What run_all.sh ends in: the commands of a comparison are checked, then called in their order.

    python -m common.run_all digits digits           (the data set's name, and its source)

First the scripts' own parsers look at the whole list of commands, so a mistake shows before
anything is made. Then the commands are called one after the other; each skips what it finds done.
"""
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from common.errors import UserError, machine_errors, need, show_everything
from common.plan import Command, Comparison, check_choices, choices_of, integer
from common.signals import ENDS, code_of, listen


# --------------------------------------------------------------------------------------- the check
def check_commands(comparison):
    """UserError at the first command that its script would refuse, or that overwrites another's."""
    known = importlib.import_module("report").RUNS
    for run in comparison.c.RUNS.split():
        need(run in known, f"RUNS: {run} is none of {' '.join(known)}")
    for command in comparison.commands:
        script = importlib.import_module(command.script.removesuffix(".py"))
        try:
            script.parse_args(command.flags)
        except UserError as e:
            raise UserError(f"{command.script}: {e}") from e


def check_sizes(comparison):
    """An output folder has one set of sizes: another would leave half of the runs at the old."""
    out = Path(comparison.out)
    file = out / "sizes.txt"
    held = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    sizes = dict(line.split("=", 1) for line in held)
    for name, script in dict(STEPS="train", TRAIN="train", NUM_SAMPLES="sample", SAMPLER="sample",
                             GUIDANCE="sample").items():
        now = getattr(comparison.c, name)
        was = sizes.get(name, now)
        need(was == now or not any(out.glob(f"*/{script}.args.json")),
             f"{out} was made with {name}={was}, now {name}={now}; use OUT=another folder, or "
             f"remove {out}")
        sizes[name] = now
    out.mkdir(parents=True, exist_ok=True)
    write_whole(file, "".join(f"{name}={now}\n" for name, now in sizes.items()))


def write_whole(file, text):
    """A small file, whole or not at all. Not common.save_text, which costs an import of torch."""
    half = file.with_suffix(".tmp")
    half.write_text(text, encoding="utf-8")
    os.replace(half, file)


# ----------------------------------------------------------------------------------- the execution
class Runner:
    """Calls the commands in order; a signal to it reaches the stage, which saves and ends."""

    def __init__(self, comparison):
        self.comparison = comparison
        listen(lambda number, _: sys.exit(code_of(number)))

    def call(self, argv, quiet=False):
        """A Python command as a process of its own; if it fails, everything ends with its code."""
        output = subprocess.DEVNULL if quiet else None
        # A signal while it starts would find nobody to pass it on to.
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
        child = subprocess.Popen([sys.executable, *argv], stdout=output,
                                 preexec_fn=deaf_to_interrupts)
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
            code = child.wait()
        except SystemExit:
            # We were told to stop: the stage saves and ends, and no second signal cuts that short.
            listen(signal.SIG_IGN)
            child.terminate()
            child.wait()
            raise
        if code:
            raise SystemExit(code if code > 0 else 128 - code)

    def stage(self, command):
        """One command of the comparison, where there is something left to do."""
        comparison = self.comparison
        script = command.script
        flags = list(command.flags)
        run = command.run
        drawn = sorted(Path(run).glob("samples*.npy")) if run else []
        if script == "sample.py" and any(newer(f"{run}/last.pt", file) for file in drawn):
            flags.append("--overwrite")      # trained on since they were drawn
        so_far = run and script in ("evaluate.py", "report.py")
        measured = drawn and all(newer(f"{run}/metrics.json", file) for file in drawn)
        if so_far and measured and script == "evaluate.py":
            return
        torchrun = []
        alone = script == "report.py" or (script == "data.py" and "--vae" not in flags)
        if comparison.c.NPROC != "1" and not alone:
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                        comparison.c.NPROC, "--"]
        if not so_far:
            print(f"--- {Command(script, flags)}", flush=True)
        self.call([*torchrun, script, *flags], quiet=so_far)
        if so_far and script == "report.py":
            print(f"report so far: {comparison.out}/report/report.md", flush=True)

    def run(self):
        comparison = self.comparison
        self.stage(comparison.commands[0])                 # the data
        classes = Path(comparison.data, "classes.txt").read_text(encoding="utf-8").splitlines()
        # Size and classes of the pictures are known now.
        c = choices_of(comparison.what, os.environ)
        one_class = len(classes) == 1
        comparison = Comparison(comparison.what, comparison.source, c, one_class)
        self.comparison = comparison
        print(f"surrogate {c.SURROGATE}, visual target {c.VISUAL}")
        names = " ".join(Path(run).name for run in comparison.runs)
        print(f"{len(comparison.runs)} trainings of {c.STEPS} steps, {c.NUM_SAMPLES} samples each, "
              f"judged by {c.JUDGE}; in this order: {names}", flush=True)
        plan = "".join(f"python {command}\n" for command in comparison.commands)
        write_whole(Path(comparison.out, "plan.txt"), plan)
        threading.Thread(target=tell_time, args=(comparison,), daemon=True).start()
        for command in comparison.commands[1:]:
            missing = without_checkpoints(comparison.runs)
            if "--trajectory" in command.flags and missing:
                print(f"no trajectory: {missing} has no step_*.pt (TRAIN=\"--checkpoint-every N\")")
                break                        # the trajectory and its report are the last
            self.stage(command)


def without_checkpoints(runs):
    """The first run that keeps no checkpoint which a trajectory could follow, or None."""
    return next((run for run in runs if not any(Path(run).glob("step_*.pt"))), None)


def deaf_to_interrupts():
    """A terminal sends Ctrl-C to everybody in it: the stages hear of it from us, as SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)


def newer(file, other):
    """Whether both files are there and `file` was written later."""
    if not (os.path.exists(file) and os.path.exists(other)):
        return False
    return os.stat(file).st_mtime_ns > os.stat(other).st_mtime_ns


def last_row(run):
    """The last whole line of a run's stats.jsonl, or None."""
    file = Path(run, "stats.jsonl")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    whole = [line for line in lines if line.endswith("}")]
    return json.loads(whole[-1]) if whole else None


def tell_time(comparison):
    """Waits for the first log line of any training, then says how long all of them will take."""
    while not any(last_row(run) for run in comparison.runs):
        time.sleep(1)
    rows = [last_row(run) for run in comparison.runs]
    pace = [row["seconds"] / row["step"] for row in rows if row]
    steps = integer(comparison.c.STEPS, 0)
    left = sum(steps - min(steps, row["step"] if row else 0) for row in rows)
    if left:
        free = shutil.disk_usage(comparison.out).free / 1e9
        print(f"\nall trainings together: about {pace[-1] * left / 60:,.0f} more minutes at the "
              "pace of the first steps, sampling and judging not counted; "
              f"{free:,.0f} GB of disk are free", flush=True)


def compare(what, source, check):
    """The whole comparison of a data set; check: only a look at what would be called."""
    c = choices_of(what, os.environ)
    check_choices(what, c)
    comparison = Comparison(what, source, c)
    if check:
        return check_commands(comparison)
    runner = Runner(comparison)
    # In a process of its own: this one stays small, for it waits for hours.
    runner.call(["-m", "common.run_all", "--check", what, source])
    check_sizes(comparison)
    if what == "imagenet-pruning":
        images = sum(len(files) for _, _, files in os.walk(source))
        print(f"{images:,} images: {comparison.needs(images)}", flush=True)
    runner.run()


def main(argv):
    """main(["digits", "digits"]); with --check before, only looks at what would be called."""
    show_everything()
    # torchrun passes the first four on by itself; USR1 would kill it and orphan its workers.
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE",
                          "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2")
    try:
        with machine_errors():
            compare(*argv[-2:], check=argv[0] == "--check")
    except UserError as e:
        print(f"run_all.sh: error: {' '.join(str(e).split())}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
