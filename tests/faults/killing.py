"""Processes that die by SIGKILL at a chosen moment, and disks that are full."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import traceback

from tqdm import tqdm


def fork(act):
    """Run a function in a child process; its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    if (child := os.fork()) == 0:
        code = 70
        try:
            tqdm.set_lock(threading.RLock())  # tqdm's own is shared with the parent
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def ended(child):
    """Wait for a child; its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(moment, act):
    """Do something, and be killed before the ``moment``-th call of a C function.

    Between two such calls (open, write, fsync, rename, ...) nothing reaches the disk,
    so the moments are all that a kill can tell apart, but for the inside of a write.
    """
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        if event == "c_call":
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1

    sys.setprofile(count)
    try:
        act()
    finally:
        sys.setprofile(None)
    return calls


def num_moments(act):
    """How many moments there are, found by doing it in a child."""
    here, there = os.pipe()

    def tell():
        os.write(there, str(die_at(-1, act)).encode())

    assert ended(fork(tell)) == 0
    os.close(there)
    with os.fdopen(here) as told:
        return int(told.read())


def killed_throughout(act, after, most=12, last=10):
    """Kill children that do something, at moments all over it.

    Args:
        act: What they do; it must start from the same state each time.
        after: Called before, after each kill, and after a child that was not killed;
            it checks the disk and puts back the state of before.
        most: Moments, chosen evenly.
        last: Moments before the end, around the rename, besides.

    Returns:
        What ``after`` returned each time.
    """
    after()  # what is imported or kept at a first time is, from now on
    total = num_moments(act)
    after()
    step = max(1, total // most)
    moments = sorted({*range(0, total, step), *range(max(0, total - last), total)})
    found, codes = [], set()
    for moment in moments:  # (a child may need a few calls less, and not be killed)
        codes.add(ended(fork(lambda m=moment: die_at(m, act))))
        found.append(after())
    assert -signal.SIGKILL in codes and codes <= {0, -signal.SIGKILL}
    assert ended(fork(act)) == 0
    return [*found, after()]


@contextlib.contextmanager
def no_file_above(num_bytes):
    """A quota: no file may grow beyond a size, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def mounted(folder, size):
    """A file system of its own on a folder; None where that is not permitted."""
    options = f"size={size}"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        made = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        made = False
    if not made:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remounted(folder, how):
    """Make a mounted folder ``"ro"`` or ``"rw"``."""
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)
