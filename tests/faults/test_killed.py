"""kill -9 at any moment of any write: the file is the old one or the new one."""

import os
import random
import shutil
import signal
import time

import pytest

from opacus_pi.unlearning.deletion_log import verify
from tests.faults.killing import die_at, ended, fork, killed_throughout, num_moments
from tests.faults.writers import WRITERS, read_ledger, training, write_ledger
from tests.unlearning.test_requests import data, requests, submitted, unlearner

pytestmark = [
    pytest.mark.filterwarnings("ignore:PrivacyEngine detected new dataset"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


@pytest.mark.parametrize("name", WRITERS)
def test_the_old_or_the_new_and_never_a_part(tmp_path, name):
    writer, folder, before = WRITERS[name], tmp_path / "now", tmp_path / "before"
    if name == "checkpoint":
        training(1)
    before.mkdir()
    writer.write(before, 0)

    def put_back():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)

    def after():
        found = writer.read(folder)
        put_back()
        return found

    put_back()
    found = killed_throughout(lambda: writer.write(folder, 1), after)
    assert found[0] == 0 and found[-1] == 1
    assert found == sorted(found)  # killed later, never less is done


def test_at_any_time_in_a_loop_of_writes(tmp_path):
    write_ledger(tmp_path, 0)

    ready, started = os.pipe()

    def loop():
        write_ledger(tmp_path, 1)
        os.write(started, b"1")
        while True:
            write_ledger(tmp_path, 0)
            write_ledger(tmp_path, 1)

    chance, found = random.Random(1), set()
    for _ in range(15):
        child = fork(loop)
        os.read(ready, 1)
        time.sleep(chance.uniform(0.001, 0.02))
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
        found.add(read_ledger(tmp_path))
    assert 1 in found and found <= {0, 1}


def test_what_a_killed_process_leaves_is_replaced_not_read(tmp_path):
    total = num_moments(lambda: write_ledger(tmp_path, 0))
    for moment in range(total - 12, total):
        ended(fork(lambda m=moment: die_at(m, lambda: write_ledger(tmp_path, 1))))
    left = {path.name for path in tmp_path.iterdir()} - {"run"}
    assert left and all(n.startswith(".run.") and n.endswith(".tmp") for n in left)
    assert read_ledger(tmp_path) in (0, 1)


def test_requests_are_carried_out_once_whenever_the_process_is_killed(tmp_path):
    before, folder = tmp_path / "before", tmp_path / "now"
    before.mkdir()
    submitted(before)
    shutil.copytree(before, folder)

    def act():
        requests(folder).process(unlearner(), data(), num_epochs=1)

    def after():
        last, mine = unlearner(), requests(folder)
        num_done = 3 - len(mine.pending)
        mine.process(last, data(), num_epochs=1)
        assert mine.pending == [] and last.forgotten.tolist() == [2, 3, 5, 8, 9]
        done = [e for e in mine.log.entries() if e.kind == "done"]
        assert [n for e in done for n in e.payload["requests"]] == [0, 1, 2]
        verify(mine.log.path)
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        return num_done

    found = killed_throughout(act, after, last=2)
    assert found == sorted(found) and {0, 1, 2, 3} <= {*found}
