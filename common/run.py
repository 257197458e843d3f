"""A training over many calls: its state, its bad steps, divergence, and the signals that end it."""
import contextlib
import math
import signal
import sys
import time

import torch

from common.files import load_pt
from common.processes import all_reduce, log, progress, world
from common.signals import code_of, listen, restore

MAX_BAD_STEPS = 20              # steps in a row that are not finite before a run stops
MAX_LOSS = 100.0                # a mean pixel loss that only a diverged network has


def is_due(done, every, last=None):
    """True at every so many steps (0: never), and at the last."""
    return done == last or (every > 0 and done % every == 0)


class Run:
    """How far a training into the folder `out` is, and what its checkpoint holds.

    parts     {name: what has a state_dict, or a tensor, or None}
    settings  what a checkpoint carries as its args, besides the flags
    """

    def __init__(self, out, parts, settings, args, device):
        self.out = out
        self.parts = parts
        # Plain values only, so that it loads without pickled code.
        flags = {k: v for k, v in vars(args).items() if k not in ("device", "overwrite")}
        self.settings = {**flags, **settings}
        self.args = args
        self.batch = args.batch_size
        self.steps = args.steps
        self.step = 0
        self.first = 0                               # where this call began
        self.before = 0.0                            # seconds of earlier calls
        self.bad = BadSteps(device)
        self.begun = time.time()

    def describe(self, who, net, process, images, device, disk=0):
        """Print what will be trained. disk: bytes that it writes besides checkpoints."""
        args = self.args
        n = sum(p.numel() for p in net.parameters() if p.requires_grad)
        epochs = self.steps * self.batch / images
        # Weights, their average and AdamW's two moments, in float32.
        megabytes = (16 * n + disk) / 2**20 + 1
        log(f"{who} {n / 1e6:.2f} M parameters, {process.name}, {images:,} images, {self.steps:,} "
            f"steps of {self.batch} = {epochs:,.1f} effective epochs, lr {args.lr:g} "
            f"({args.schedule}, warm-up {args.warmup}), {device}, amp {args.amp}, each checkpoint "
            f"about {megabytes:,.0f} MB in {self.out}")

    def start(self):
        """The loop begins, with a progress bar: what came before was no training."""
        self.bar = progress(total=self.steps, initial=self.step, desc=str(self.out))
        self.begun = time.time()
        self.said = False

    def resume(self, path):
        """Take back what state() gave; returns it."""
        state = load_pt(path)
        for name, part in self.parts.items():
            if name == "scaler" and state["args"].get("amp") != self.args.amp:
                # --amp auto on other hardware: fp16 has to find its own scale for the loss.
                continue
            if torch.is_tensor(part):
                # In place: the loop holds the same tensor.
                part.copy_(state[name])
            elif part is not None:
                part.load_state_dict(state[name])
        self.step = state["step"]
        self.first = self.step
        self.before = state["seconds"]
        # Bad steps in a row are counted anew: a checkpoint is only written where they are few.
        self.bad = BadSteps(self.bad.counts.device, state.get("skipped", 0))
        log(f"resuming at step {self.step:,}")
        return state

    def advance(self):
        """A step is done; returns how many are."""
        self.step += 1
        self.bar.update()
        return self.step

    def must_look(self):
        """True when too many bad steps are in a row. A GPU is waited for at log lines only."""
        return self.bad.counts.device.type == "cpu" and self.bad.too_many()

    def images(self):
        """How many were seen."""
        return self.step * self.batch

    def about(self):
        """What every checkpoint says of its run."""
        return {"step": self.step, "images_seen": self.images(), "seconds": self.seconds(),
                "args": self.settings}

    def state(self):
        """What a checkpoint holds from which the run can go on."""
        state = {}
        for name, part in self.parts.items():
            plain = part is None or torch.is_tensor(part)
            state[name] = part if plain else part.state_dict()
        return {**state, **self.about(), "skipped": self.bad.in_all()}

    def seconds(self):
        return self.before + time.time() - self.begun

    @contextlib.contextmanager
    def paused(self):
        """What happens in the block is no training."""
        pause = time.time()
        yield
        self.begun += time.time() - pause

    def say_pace(self):
        """Print once how fast this call is, and how long it will take."""
        if self.said or self.step == self.steps:
            return
        self.said = True
        pace = (time.time() - self.begun) / (self.step - self.first)           # seconds a step
        log(f"{self.batch / pace:,.0f} images/s, about {pace * (self.steps - self.step) / 60:,.1f} "
            "minutes to go")


class BadSteps:
    """Counts the steps whose loss or gradient was not finite, in a row and in all.

    On the device, so that counting waits for nothing; asking for a number does.
    """

    def __init__(self, device, before=0):
        self.counts = torch.tensor([0, before], device=device)        # in a row, in all

    def add(self, norm):
        """Note the gradient norm of one step; returns whether it was finite, a bool tensor."""
        finite = norm.isfinite()
        self.counts[0] = torch.where(finite, 0, self.counts[0] + 1)
        self.counts[1] += ~finite
        return finite

    def in_a_row(self):
        return int(self.counts[0])

    def in_all(self):
        return int(self.counts[1])

    def too_many(self):
        return self.in_a_row() >= MAX_BAD_STEPS


def divergence(run, loss, what="the loss"):
    """In words, how a run shows that it has diverged, or "" where it does not.

    loss: mean pixel loss of the last steps, or how far it lies above that of a reference.
    """
    last = run.step == run.steps
    row = run.bad.in_a_row()
    # One or two at the end are fp16 finding its scale, and the weights are sound.
    if row >= MAX_BAD_STEPS or (last and row > 2):
        return f"{row} steps in a row had a non-finite loss or gradient, up to step {run.step}"
    if loss > MAX_LOSS or (last and math.isnan(loss)):
        return (f"{what} is {loss:.3g} up to step {run.step}, and that of a network that predicts "
                "nothing about 1: it has diverged")
    return ""


class Stop:
    """A signal asks to end: the step is finished, the state saved, the exit code 143 (Ctrl-C 130).

    Ctrl-C once more ends the process at once.
    """

    def __init__(self):
        self.asked = 0
        self.number = signal.SIGTERM
        self.before = listen(self._ask)

    def _ask(self, number, _):
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        self.asked += 1
        self.number = number

    def close(self):
        """After the loop a signal ends the process at once again."""
        restore(self.before)

    def asked_on_any_rank(self, done, last):
        """True on every rank once one was told to stop: all must leave after the same step.

        To ask the others takes a moment: every ten steps, and at the last.
        """
        if world() > 1 and done % 10 and not last:
            return False
        # A tensor of the CPU: the device is not waited for.
        return bool(all_reduce(torch.tensor(self.asked)))

    def leave(self, done):
        """Say so and end the process."""
        name = signal.Signals(self.number).name
        log(f"stopped by {name} at step {done}; run the same command again to go on")
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        sys.exit(code_of(self.number))
