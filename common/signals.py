"""The signals that ask a process to save and end: schedulers, closing terminals and people."""
import contextlib
import signal
import sys

# 128 + 15: what a shell shows for a process that SIGTERM ended; 128 + 2 for Ctrl-C.
STOPPED = 143
INTERRUPTED = 130
# SLURM warns with USR1 or USR2 as its script asks, SGE with USR1, USR2 and XCPU.
ASKING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
ENDS = (*ASKING, signal.SIGINT)


class Stopped(SystemExit):
    """A signal asked this process to end; its code is the exit code."""

    def __init__(self, number):
        super().__init__(code_of(number))
        self.name = signal.Signals(number).name


def code_of(number):
    """The exit code of a process that saved and ended because of this signal."""
    return INTERRUPTED if number == signal.SIGINT else STOPPED


def listen(handler, signals=ENDS):
    """Install handler(number, frame); returns {signal: its handler before}, for restore().

    A signal that is ignored stays so: nohup ignores HUP, a shell INT in the background. In a thread
    signals are somebody else's.
    """
    before = {}
    for number in signals:
        if signal.getsignal(number) is signal.SIG_IGN:
            continue
        try:
            before[number] = signal.signal(number, handler)
        except ValueError:
            return {}
    return before


def restore(before):
    for number, handler in before.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def stoppable():
    """In the block each of ASKING raises Stopped, and a second one no longer disturbs."""
    def leave(number, _):
        # What the first one began to tidy up must come to its end.
        listen(signal.SIG_IGN, ASKING)
        raise Stopped(number)
    before = listen(leave, ASKING)
    try:
        yield
    finally:
        restore(before)


def say_stopped(script, error):
    """The line about a call that a signal ended."""
    name = getattr(error, "name", "Ctrl-C")
    with contextlib.suppress(OSError):
        print(f"{script}: stopped by {name}; run the same command again to go on", file=sys.stderr)
