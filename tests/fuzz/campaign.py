"""Feeds mutated files to every reader, and tells what none may answer."""

import random
import re
import resource
import shutil
import signal
import tempfile
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from tests.fuzz.targets import Refused, any_damage, targets

SECONDS = 10.0  # a reader that takes longer hangs
MEMORY = 1 << 30  # more than this for a file of a few kB is a huge allocation
# what is wrong with which value, and what to do: in one form, or in full sentences
CLEAR = re.compile(r".+ must .+, got .+\. .+|.+ .+\. [A-Z].+ .+\.", re.DOTALL)
FOLDER = "/dev/shm" if Path("/dev/shm").is_dir() else None


class Hang(BaseException):
    """A reader did not come back."""


def campaign(count, seed=0, names=None, report=lambda done, outcomes: None):
    """Try mutated files, half of them with the checksum made right again.

    Args:
        count: How many, over all readers in turn.
        seed: Of the mutations; case i is the same whatever ``count`` is.
        names: Only these readers.
        report: Told the progress now and then.

    Returns:
        Counts of outcomes by (reader, sealed, outcome), and a list of failures, each
        (case, reader, sealed, what happened).
    """
    found = {n: t for n, t in targets().items() if names is None or n in names}
    outcomes, failures = Counter(), []
    with _guarded(), tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        for number in range(count):
            name = [*found][number % len(found)]
            seal = (number // len(found)) % 2 == 1
            outcome = one(found[name], f"{seed}/{number}", seal, Path(folder, "case"))
            kind = outcome.split(":")[0]
            outcomes[name, seal, kind] += 1
            if kind not in ("refused", "equal", "valid"):
                failures.append((f"{seed}/{number}", name, seal, outcome))
            if number % 5000 == 4999:
                report(number + 1, outcomes)
    return outcomes, failures


def one(target, case, seal, folder):
    """What a reader makes of one mutated file."""
    chance = random.Random(case)
    content = any_damage(target, chance, seal=seal)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = folder / target.name
    path.write_bytes(content)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        answer = target.read(path)
    except Refused:
        return "refused"
    except ValueError as error:
        clear = type(error) is ValueError and bool(CLEAR.match(str(error)))
        return "refused" if clear else f"unclear: {error!r}"
    except Hang:
        return "hang"
    except Exception as error:
        return f"crash: {type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if target.equal(answer):
        return "equal"
    if not seal:
        return "silent: other data were taken for the original"
    try:
        target.check(answer)
    except Exception as error:
        return f"invalid: {type(error).__name__}: {error}"
    return "valid"


@contextmanager
def _guarded():
    """Hangs and huge allocations become errors; random states stay as they are."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    before = signal.signal(signal.SIGALRM, _hang)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0])
    size = used * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (size, limits[1]))
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _hang(*_):
    raise Hang
