"""Commands side by side: which must wait for which, how many at once, and where each of them runs.

Imports nothing heavy: the process that uses it waits for hours.
"""
import os

JUDGES = ("evaluate.py", "report.py")
TINY = ("SiT-T/", "MDT-T/", "unet-tiny")
MOST = 4                         # tiny trainings at once on a CPU: a comparison has few more to do


def waits_for(commands):
    """[the places of the commands that must be done before] of each, a set, from the files alone.

    What a flag names was written by the earlier commands whose --out holds it. Of several such
    folders the innermost counts: RUN/prune/keep.npy is prune.py's, not of the training in RUN.
    """
    waits = []
    for j, command in enumerate(commands):
        before = set()
        for word in command.flags:
            before |= writers(word, commands[:j])
        if command.script in JUDGES:
            before |= judged_before(command, commands[:j])
        # The first makes DATA/scratch.pt, which the others read.
        if asks_scratch(command):
            before.update([i for i in range(j) if asks_scratch(commands[i])][:1])
        waits.append(before)
    return waits


def judged_before(command, earlier):
    """The places of the judges whose figures a judge reads, or who write where it writes.

    Those are the judges of the runs that it names; of everybody, where it judges all of them.
    """
    judges = {i: one for i, one in enumerate(earlier) if one.script in JUDGES}
    if not command.run:
        return set(judges)
    return {i for i, one in judges.items() if one.run in command.flags or not one.run}


def order_of(commands, waits, jobs):
    """The places of the commands in the order in which those that are ready are started.

    The plan's own for one at a time, and where the report is renewed in between. Else first what
    most is still to come after, or a long run would be left to the end, alone. A training counts as
    four of the others, about what it takes on digits, and so does the training of the judges.
    """
    if jobs == 1 or any(one.run and one.script == "report.py" for one in commands):
        return list(range(len(commands)))
    asking = [j for j, command in enumerate(commands) if asks_scratch(command)]
    left = [0] * len(commands)               # of each the longest chain that begins with it
    for j in reversed(range(len(commands))):
        after = [left[i] for i, before in enumerate(waits) if j in before]
        long = commands[j].script == "train.py" or j in asking[:1]
        left[j] = max(after, default=0) + (4 if long else 1)
    return sorted(range(len(commands)), key=lambda j: (-left[j], j))


def is_so_far(command):
    """Whether it judges one run, or those up to it, while others are still to come."""
    return bool(command.run) and command.script in JUDGES


def writers(path, commands):
    """The places of the commands that write this path, or into this folder."""
    outs = [out_of(command) for command in commands]
    holding = [out for out in outs if out and (path == out or path.startswith(out + "/"))]
    if not holding:
        return set()
    inner = max(holding, key=len)
    # Samples lie beside the checkpoint, and nobody who reads that has to wait for them.
    checkpoint = path.endswith(".pt")
    return {i for i, out in enumerate(outs)
            if out == inner and not (checkpoint and commands[i].script == "sample.py")}


def out_of(command):
    """The folder that a command writes to, "" where it names none."""
    flags = command.flags
    return flags[flags.index("--out") + 1] if "--out" in flags else ""


def asks_scratch(command):
    """Whether it looks at the network that is kept in the data folder, or makes it."""
    flags = command.flags
    if command.script == "attach.py":
        return "--judge" not in flags or flags[flags.index("--judge") + 1] == "scratch"
    return command.script in ("evaluate.py", "prune.py") and "scratch" in flags


def cores():
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def jobs_of(c, side, gpus):
    """How many runs go side by side where JOBS does not say. side: of the pictures in pixels.

    One a GPU. On a CPU several only of tiny networks, whose operations are too short for a second
    thread: on digits two runs of one thread each make 1.2 times the steps of one with two.
    """
    if c.JOBS:
        return int(c.JOBS)
    if c.NPROC != "1":
        return 1
    if c.DEVICE in ("auto", "cuda") and gpus:
        return gpus
    tiny = c.MODEL.startswith(TINY) or (not c.MODEL and 0 < side <= 16)
    return min(MOST, cores()) if tiny and c.DEVICE in ("auto", "cpu") else 1


def places_of(jobs, device, gpus):
    """[the environment of each of the runs that go side by side]: a GPU each, or so many threads.

    The number of threads does not depend on which others happen to run: results would round
    otherwise. RUNS_BESIDE says how many share a device's memory. One run alone is left as it is,
    [None].
    """
    if jobs == 1:
        return [None]
    if gpus and device in ("auto", "cuda"):
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        names = seen.split(",")
        beside = str(-(-jobs // len(names)))
        return [{"CUDA_VISIBLE_DEVICES": names[k % len(names)], "RUNS_BESIDE": beside}
                for k in range(jobs)]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // jobs))
    return [{"OMP_NUM_THREADS": threads, "RUNS_BESIDE": str(jobs)} for _ in range(jobs)]
