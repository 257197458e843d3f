"""A mistake of the user's is one line: the file, what is wrong, what to do. Exit code 2."""
import contextlib
import errno
import re
import sys

# Errors of the system that the user can mend while the last complete files stay intact.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class UserError(Exception):
    """A mistake of the user's: its text is the one line that is printed before exit code 2."""


def need(condition, message):
    """An assert for what users bring: raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def first_line(error, length=160):
    """What an exception says, on one line and not too long; its name where it says nothing."""
    text = " ".join(str(error).split())
    return text[:length] or type(error).__name__


@contextlib.contextmanager
def reading(path, what, remedy="write it again with the script that makes it"):
    """Any failure over the content of a file becomes one line: file, fault, remedy.

    Bodies stay short, for a mistake of ours in one would be blamed on the file. Too little memory
    and errors that are such a line already pass through.
    """
    try:
        yield
    except (UserError, MemoryError):
        # The first is such a line already, the second is the machine's fault and not the file's.
        raise
    except KeyError as e:
        raise UserError(f"{path}: lacks {e}, so it is no {what}; {remedy}") from e
    except Exception as e:
        raise UserError(f"{path}: not a readable {what} ({first_line(e, 120)}); {remedy}") from e


@contextlib.contextmanager
def user_errors():
    """What models/ raise about weights, names and shapes is the user's to mend."""
    try:
        yield
    except (ValueError, FileNotFoundError, ImportError) as e:
        raise UserError(str(e)) from e


@contextlib.contextmanager
def machine_errors():
    """A full disk, missing rights, a path that cannot be opened and too little memory are no bugs.

    Each becomes one line. All other errors show as they are.
    """
    try:
        yield
    except OSError as e:
        if e.errno in (*FULL, *FORBIDDEN):
            raise UserError(f"{e.filename or 'output'}: {e.strerror}; the last complete files are "
                            "intact, make room or rights and run the same command again") from e
        # Without a file name it is no path of the user's, so it may be a bug of ours.
        if e.errno is None or e.filename is None:
            raise
        raise UserError(f"{e.filename}: {e.strerror}; mend this path and run the same command "
                        "again") from e
    except (MemoryError, RuntimeError) as e:
        # Torch says so in words only: on a CPU one way, on a GPU another.
        of_memory = re.search("out of memory|not enough memory|allocate memory", str(e))
        if not (of_memory or isinstance(e, MemoryError)):
            raise
        raise UserError(f"not enough memory ({str(e)[:160]}); use a smaller batch, image size or "
                        "network, or another device") from e


def show_everything():
    """Class names in any script are printed on a terminal of ASCII, too: escaped."""
    for stream in (sys.stdout, sys.stderr):
        # A notebook or a test may have put something else there.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
