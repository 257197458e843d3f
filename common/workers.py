"""Worker processes of one machine: they end with the process that started them, however it ends."""
import collections
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from common.errors import UserError
from common.processes import log
from common.signals import ENDS


def start_worker():
    """Signals belong to the main process; a worker goes when its main process was killed."""
    # A scheduler may signal every process of a job; what ends the main one is seen below.
    for number in ENDS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def start(pool):
    """Start all workers now: they fork before a progress bar starts a thread of its own."""
    # Python loses a signal that comes while it forks.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
    try:
        pool.submit(os.getpid)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)


@contextlib.contextmanager
def open_pool(workers):
    """An executor of so many processes, or of one thread instead of one; it ends with the block."""
    if workers == 1:
        pool = ThreadPoolExecutor(1)
    else:
        # Fork: a fresh interpreter would import torch again in every worker.
        method = "fork" if sys.platform == "linux" else None
        try:
            pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), start_worker)
        except OSError as e:
            # Processes share their locks through /dev/shm, which a container may not have.
            log(f"note: no worker processes here ({e.strerror}; is /dev/shm there?): threads, "
                "which are slower")
            pool = ThreadPoolExecutor(workers)
    try:
        start(pool)
        yield pool
    except BrokenProcessPool as e:
        # A signal to all of them may reach a worker first: then ours ends the call as it should.
        time.sleep(0.2)
        raise UserError("a worker process was killed, most likely for want of memory; use fewer "
                        "--workers") from e
    finally:
        # What has not begun is dropped: an error or a signal waits for one job a worker at most.
        pool.shutdown(cancel_futures=True)


def work_ahead(pool, function, jobs, depth):
    """Yields function(job) of each job, in order; the pool is at most `depth` jobs ahead."""
    waiting = collections.deque()
    for job in jobs:
        waiting.append(pool.submit(function, job))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
