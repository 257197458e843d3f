"""One process or many (torchrun): who we are, where we meet, and what is printed only once."""
import contextlib
import datetime
import os
import sys

import torch

from common.errors import UserError, need

DEVICES = "use auto, cpu, cuda or cuda:N"
PATIENCE = datetime.timedelta(days=30)
_meeting = None                  # the process group of CPU sockets over which Python values pass


# ------------------------------------------------------------------------------------- who we are
# torchrun sets these variables; a plain `python train.py` is one process, and needs no group.
def world():
    """The number of processes."""
    return from_environment("WORLD_SIZE", 1)


def rank():
    """The place of this process among them, from 0."""
    return from_environment("RANK", 0)


def from_environment(name, default):
    """The whole number in an environment variable."""
    text = os.environ.get(name, "") or str(default)
    need(text.isdecimal() and int(text) >= min(default, 1),
         f"{name}={text}: must be a whole number of at least {min(default, 1)}; mend or unset it")
    return int(text)


def log(*parts):
    """Print on rank 0, at once."""
    if rank() == 0:
        # A terminal that is closed must not end a training that was started to outlive it.
        with contextlib.suppress(OSError):
            print(*parts, flush=True)


def progress(iterable=None, **kw):
    """tqdm on rank 0; where the output is no terminal, one line every 30 seconds."""
    # Imported here: a formula must not pay for a bar.
    from tqdm import tqdm
    pause = 0.2 if sys.stderr.isatty() else 30
    return tqdm(iterable, disable=rank() != 0, mininterval=pause, dynamic_ncols=True, **kw)


def get_device(name="auto"):
    """The torch device of this process; joins torchrun's process group where there is one."""
    # Huge pages for large CPU tensors: a tenth of a U-Net's step was page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such kind of device; {DEVICES}")
    if device.type == "cuda":
        index = device.index or 0
        if world() > 1:
            index = from_environment("LOCAL_RANK", 0)
        count = torch.cuda.device_count()
        need(index < count, f"--device {name}: this machine shows {count} CUDA devices; use "
                            "--device cpu or fewer processes")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    else:
        need(device.type == "cpu", f"--device {name}: not available here; {DEVICES}")
    # Called twice in one process by some scripts; the group is joined once.
    if world() > 1 and not torch.distributed.is_initialized():
        join(device)
    return device


def join(device):
    """Join the process group (NCCL between GPUs, else gloo), and gloo beside it to meet in."""
    global _meeting
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    need(not missing, f"WORLD_SIZE={world()} is set, but {' and '.join(missing)} is not; start "
                      "with torchrun, which sets all of them, or unset WORLD_SIZE")
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=dist_timeout())
    # Over sockets also beside NCCL: for Python values, and so that rank 0 may take its time.
    _meeting = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def dist_timeout():
    """How long processes wait for each other: DIST_TIMEOUT seconds, 30 minutes by default."""
    return datetime.timedelta(seconds=from_environment("DIST_TIMEOUT", 1800))


def single_process(script):
    """For scripts whose work is not shared out: every process would write the same files."""
    need(world() == 1, f"{script} runs in one process; start it with python, not with torchrun")


# ---------------------------------------------------------------------------------- where we meet
def barrier(patient=False):
    """All processes meet here; one that has ended, or is DIST_TIMEOUT late, ends them all.

    patient: rank 0 may be as late as it likes, for what it does alone takes hours on large data.
    """
    if world() > 1:
        # Rank 0 waits for the others by the clock; they wait for it as they are told.
        limit = PATIENCE if patient and rank() else dist_timeout()
        torch.distributed.monitored_barrier(_meeting, timeout=limit, wait_all_ranks=True)


def all_reduce(x):
    """Sum of a tensor over all processes, in place; the tensor itself for one process."""
    if world() > 1:
        # NCCL adds up on GPUs only: a CPU tensor beside it goes through the meeting's sockets.
        beside_nccl = torch.distributed.get_backend() == "nccl" and not x.is_cuda
        torch.distributed.all_reduce(x, group=_meeting if beside_nccl else None)
    return x


def shard(n):
    """The part [lo, hi) of n rows that belongs to this rank; parts differ by at most one row."""
    return n * rank() // world(), n * (rank() + 1) // world()


def from_rank0(make):
    """make() on rank 0, its (JSON-like or array) value on every rank; the others wait for it."""
    box = [make() if rank() == 0 else None]
    if world() > 1:
        barrier(patient=True)
        torch.distributed.broadcast_object_list(box, group=_meeting)
    return box[0]


def gather(value):
    """[the (JSON-like or array) value of every rank, in their order] on rank 0, None elsewhere."""
    box = [value] * world() if rank() == 0 else None
    if world() > 1:
        barrier()
        torch.distributed.gather_object(value, box, group=_meeting)
    return box
