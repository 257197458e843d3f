"""What run_all.sh ends in: the commands of a comparison are checked, then called in their order.

    python -m common.run_all digits digits           (the data set's name, and its source)

First the scripts' own parsers look at the whole list of commands, so a mistake shows before
anything is made. Then the commands are called, JOBS of them at a time, each as soon as what it
reads is there (common/jobs.py); each skips what it finds done.
"""
import contextlib
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError, machine_errors, need, show_everything
from common.jobs import JUDGES, is_so_far, jobs_of, order_of, out_of, places_of, waits_for
from common.plan import Command, Comparison, check_choices, choices_of, integer, side_of
from common.signals import ENDS, code_of, listen


# --------------------------------------------------------------------------------------- the check
def check_commands(comparison):
    """UserError at the first command that its script would refuse, or that overwrites another's."""
    scores = importlib.import_module("prune").SCORES
    known = [*importlib.import_module("report").RUNS,
             *(f"pruned-{score}" for score in scores if score != "random")]
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
@dataclass
class Started:
    """A process that runs: of a command, in its place; reader passes its lines on."""
    child: subprocess.Popen
    command: Command
    place: dict
    reader: threading.Thread


class Runner:
    """Calls the commands; a signal to it, or a failure, reaches those that run: they save and end.

    places: the environments of those that go side by side, or [None] for one after the other.
    """

    def __init__(self, comparison):
        self.comparison = comparison
        self.places = [None]
        self.running = []                # [Started]
        listen(lambda number, _: sys.exit(code_of(number)))

    def start(self, argv, command=None, place=None, variables=None, output=None):
        """A Python command as a process of its own. place: it is one of several at once.

        variables: of the environment; output: where it prints to, by default as we do.
        """
        errors = None
        if place is not None and output is None:
            output = subprocess.PIPE
            errors = subprocess.STDOUT
        # A signal while it starts would find nobody to pass it on to.
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
        child = subprocess.Popen([sys.executable, *argv], stdout=output, stderr=errors,
                                 env={**os.environ, **(variables or {})},
                                 preexec_fn=deaf_to_interrupts)
        reader = None
        if errors:
            reader = threading.Thread(target=pass_on, daemon=True,
                                      args=(child.stdout, self.name_of(command)))
            reader.start()
        started = Started(child, command, place, reader)
        self.running.append(started)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
        return started

    def next_end(self):
        """Waits for the first that ends, and returns it. A failure ends everything."""
        while not any(one.child.poll() is not None for one in self.running):
            if len(self.running) == 1:
                self.running[0].child.wait()
            else:
                time.sleep(0.1)
        one = next(one for one in self.running if one.child.poll() is not None)
        if one.reader:
            one.reader.join(10)
        self.running.remove(one)
        code = one.child.returncode
        if code and len(self.places) > 1:
            print(f"run_all.sh: error: {one.command.script} of {self.name_of(one.command)} ended "
                  f"with {code}; the others save and end", file=sys.stderr, flush=True)
        if code:
            raise SystemExit(code if code > 0 else 128 - code)
        return one

    @contextlib.contextmanager
    def stopping(self):
        """However the block ends too early, what it started saves and ends before."""
        try:
            yield
        except BaseException:
            # No second signal cuts that short.
            listen(signal.SIG_IGN)
            for one in self.running:
                one.child.terminate()
            for one in self.running:
                one.child.wait()
                if one.reader:
                    one.reader.join(10)
            raise

    def check(self):
        """Has the scripts look at all commands. Returns the number of GPUs that torch sees."""
        # In a process of its own: this one stays small, for it waits for hours.
        argv = ["-m", "common.run_all", "--check", self.comparison.what, self.comparison.source]
        with self.stopping():
            child = self.start(argv, output=subprocess.PIPE).child
            text = child.stdout.read().decode()
            self.next_end()
        return int(text.split()[-1])

    def name_of(self, command):
        """What tells the lines of one command from those of another."""
        out = out_of(command) or command.run or command.script.removesuffix(".py")
        return out.removeprefix(f"{self.comparison.out}/")

    def begin(self, command, place):
        """Start one command of the comparison."""
        comparison = self.comparison
        script = command.script
        flags = list(command.flags)
        run = command.run
        drawn = sorted(Path(run).glob("samples*.npy")) if run else []
        if script == "sample.py" and any(newer(f"{run}/last.pt", file) for file in drawn):
            flags.append("--overwrite")      # trained on since they were drawn
        so_far = is_so_far(command)
        torchrun = []
        alone = script == "report.py" or (script == "data.py" and "--vae" not in flags)
        if comparison.c.NPROC != "1" and not alone:
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                        comparison.c.NPROC, "--"]
        renewed = so_far and comparison.c.QUICK          # its lines would come after every run
        if not renewed:
            print(f"--- {Command(script, flags)}", flush=True)
        variables = place
        if script in JUDGES and not so_far:
            variables = None                 # nothing is left to go beside it: it has all cores
        quiet = subprocess.DEVNULL if renewed else None
        self.start([*torchrun, script, *flags], command, place, variables, quiet)

    def run(self, gpus):
        comparison = self.comparison
        with self.stopping():
            self.begin(comparison.commands[0], None)       # the data
            self.next_end()
        classes = Path(comparison.data, "classes.txt").read_text(encoding="utf-8").splitlines()
        # Size and classes of the pictures are known now.
        c = choices_of(comparison.what, os.environ)
        one_class = len(classes) == 1
        self.choose_places(c, gpus)
        apart = len(self.places) > 1
        comparison = Comparison(comparison.what, comparison.source, c, one_class, apart)
        self.comparison = comparison
        print(f"surrogate {c.SURROGATE}, visual target {c.VISUAL}")
        names = " ".join(Path(run).name for run in comparison.runs)
        print(f"{len(comparison.runs)} trainings of {c.STEPS} steps, {c.NUM_SAMPLES} samples each, "
              f"judged by {c.JUDGE}; in this order: {names}", flush=True)
        if apart:
            each = "".join(f", {name}={value}" for name, value in self.places[0].items()
                           if name == "OMP_NUM_THREADS")
            print(f"{len(self.places)} at a time{each}; JOBS=1: one after the other", flush=True)
        plan = "".join(f"python {command}\n" for command in comparison.commands)
        write_whole(Path(comparison.out, "plan.txt"), plan)
        threading.Thread(target=tell_time, args=(comparison, len(self.places)),
                         daemon=True).start()
        with self.stopping():
            self.run_all(comparison.commands)

    def choose_places(self, c, gpus):
        """How many go side by side, and where each of them runs."""
        side = side_of(self.comparison.what, c, self.comparison.data)
        self.places = places_of(jobs_of(c, side, gpus), c.DEVICE, gpus)

    def run_all(self, commands):
        """Each as soon as what it reads is there and a place is free."""
        waits = waits_for(commands)
        done = {0}
        todo = [j for j in order_of(commands, waits, len(self.places)) if j != 0]
        free = list(self.places)
        while todo or self.running:
            ready = [j for j in todo if waits[j] <= done] if free else []
            if not ready:
                one = self.next_end()
                # By identity: the report after a trajectory is the same command once more.
                done.update(j for j, command in enumerate(commands) if command is one.command)
                free.append(one.place)
                if is_so_far(one.command) and one.command.script == "report.py":
                    print(f"report so far: {self.comparison.out}/report/report.md", flush=True)
                continue
            j = ready[0]
            follows = "--trajectory" in commands[j].flags
            missing = without_checkpoints(self.comparison.runs) if follows else None
            if missing:
                print(f"no trajectory: {missing} has no step_*.pt (TRAIN=\"--checkpoint-every N\")")
                todo = []                    # the trajectory and its report are the last
                continue
            todo.remove(j)
            self.begin(commands[j], free.pop(0))


def pass_on(stream, name):
    """Print the lines of a process, each with the name of its command before it."""
    # A progress bar ends its lines with a return.
    for line in io.TextIOWrapper(stream, encoding="utf-8", errors="replace"):
        if line.strip():
            with contextlib.suppress(OSError):
                # One write: the lines of others come between two.
                print(f"[{name}] {line.rstrip()}\n", end="", flush=True)


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


def tell_time(comparison, jobs):
    """Waits for the first log line of any training, then says how long all of them will take."""
    while not any(last_row(run) for run in comparison.runs):
        time.sleep(1)
    # Of every training the steps that are left, and its pace where it has begun.
    left = 0
    pace = []
    for command in comparison.commands:
        if command.script != "train.py":
            continue
        row = last_row(command.run)
        steps = integer(command.flags[command.flags.index("--steps") + 1], 0)
        left += max(0, steps - (row["step"] if row else 0))
        if row:
            pace.append(row["seconds"] / row["step"])
    if left:
        free = shutil.disk_usage(comparison.out).free / 1e9
        minutes = sum(pace) / len(pace) * left / min(jobs, len(comparison.runs)) / 60
        print(f"\nall trainings together: about {minutes:,.0f} more minutes at the "
              "pace of the first steps, sampling and judging not counted; "
              f"{free:,.0f} GB of disk are free", flush=True)


def compare(what, source, check):
    """The whole comparison of a data set; check: only a look at what would be called."""
    c = choices_of(what, os.environ)
    check_choices(what, c)
    comparison = Comparison(what, source, c)
    if check:
        check_commands(comparison)
        # The scripts have imported it.
        torch = sys.modules.get("torch")
        return print(torch.cuda.device_count() if torch else 0)
    runner = Runner(comparison)
    gpus = runner.check()
    check_sizes(comparison)
    if what == "imagenet-pruning":
        images = sum(len(files) for _, _, files in os.walk(source))
        print(f"{images:,} images: {comparison.needs(images)}", flush=True)
    runner.run(gpus)


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
