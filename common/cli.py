"""The command line: a parser with one-line errors, range-checked types, and what main() ends in."""
import argparse
import math
import os
import re
import sys
import traceback
from pathlib import Path

import torch

from common.errors import UserError, machine_errors, show_everything
from common.processes import dist_timeout, rank, world
from common.signals import INTERRUPTED, Stopped, say_stopped, stoppable


# ----------------------------------------------------------------------------------------- flags
class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and the default of every flag that has a value of its own."""

    def _get_help_string(self, action):
        # "(default: None)" says nothing, and of a switch "(default: False)" neither.
        if action.default is None or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with the script's docstring as the manual page and errors of one line."""

    def __init__(self, doc, **kw):
        # Without abbreviations a flag that is added later cannot change what an old command means.
        super().__init__(description=doc, formatter_class=Help, allow_abbrev=False, **kw)

    def error(self, message):
        raise UserError(f"{message} (see --help)")

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        # --indices "$KEEP" with KEEP unset must not mean "all images".
        for before, word in zip(["", *args], args):
            if word == "" or (word.startswith("--") and word.endswith("=")):
                what = word or before or "an argument"
                self.error(f"{what}: is empty; give a value or leave it out")
        return super().parse_known_args([at_home(word) for word in args], namespace)


def at_home(word):
    """An argument in which ~ is the home folder where a shell left it: --out=~/x, "~/x"."""
    flag, mark, value = "", "", word
    if word.startswith("--"):
        flag, mark, value = word.partition("=")
    # Somebody else's home, ~name, is left to the shell.
    if value == "~" or value.startswith("~/"):
        value = os.path.expanduser(value)
    return flag + mark + value


def number(kind=float, low=-math.inf, high=math.inf, above=-math.inf):
    """An argparse type: a finite int or float with low <= x <= high and x > above."""
    # The words of the refusal, made once for every flag of this type.
    bounds = []
    if above > -math.inf:
        bounds.append(f"> {above:g}")
    if low > -math.inf:
        bounds.append(f">= {low:g}")
    if high < math.inf:
        bounds.append(f"<= {high:g}")

    def parse(text):
        try:
            x = kind(text)
        except ValueError:
            name = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name}")
        # Comparisons, not math.isfinite: that overflows on a huge int.
        finite = -math.inf < x < math.inf
        if not (finite and low <= x <= high and x > above):
            wanted = " and ".join(bounds) or "finite"
            raise argparse.ArgumentTypeError(f"{text} is out of range: must be {wanted}")
        return x
    return parse


count = number(int, low=1, high=2**40)                # the type of every "how many" flag
batch_type = number(int, low=1, high=2**20)
seed_type = number(int, low=0, high=2**62)


def add_run_flags(parser, overwrite, seed=None):
    """What every stage ends with: --seed where it draws anything, --device, --overwrite."""
    if seed:
        parser.add_argument("--seed", type=seed_type, default=0, help=seed)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--overwrite", action="store_true", help=overwrite)


def add_list_flag(parser, **choices):
    """Adds `--list NAME`, which prints what NAME may be, and ends."""
    class List(argparse.Action):
        def __call__(self, parser, namespace, value, option_string=None):
            print(*choices[value])
            parser.exit(0)
    parser.add_argument("--list", choices=sorted(choices), action=List, default=argparse.SUPPRESS,
                        help="print the choices of this name and end")


# ---------------------------------------------------------------------------------------- the end
def run_command(main, argv=None):
    """main(argv); a user's mistake, a full disk and signals end in one line and an exit code."""
    script = Path(sys.modules[main.__module__].__file__).name
    several = False
    where = ""
    show_everything()
    try:
        # A mistake in torchrun's variables is the user's, too.
        several = world() > 1
        if several:
            where = f" [rank {rank()} of {world()}]"
        with stoppable(), machine_errors():
            result = main(argv)
        if several and torch.distributed.is_initialized():
            # Without this a process that ends first aborts now and then.
            torch.distributed.destroy_process_group()
        return result
    except UserError as e:
        print(f"{script}: error: {' '.join(str(e).split())}{where}", file=sys.stderr)
        code = 2
    except (KeyboardInterrupt, Stopped) as e:
        if not where or where.startswith(" [rank 0"):
            say_stopped(script, e)
        code = e.code if isinstance(e, Stopped) else INTERRUPTED
    except (Exception, SystemExit) as e:
        # A bug keeps its traceback.
        if not several:
            raise
        code = failed_rank(e, script, where)
    if several:
        # A rank that fails must not leave the others waiting.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def failed_rank(error, script, where):
    """Says what ended one of several processes; returns its exit code."""
    if isinstance(error, SystemExit):
        return error.code or 0
    # What torch and gloo say on the ranks that are left when one has ended or does not come.
    lost = re.search(r"Ranks? ([\d, ]+) failed to pass monitoredBarrier|/gloo/|NCCL", str(error))
    if not (lost and isinstance(error, RuntimeError)):
        traceback.print_exception(error)
        return 1
    who = f"rank {lost[1]}" if lost[1] else "another process"
    tail = " ".join(str(error).split())[-160:]
    print(f"{script}: error: {who} has ended, or did not come within DIST_TIMEOUT = "
          f"{dist_timeout().total_seconds():.0f} s; torchrun names the first that failed "
          f"(... {tail}){where}", file=sys.stderr)
    return 1
