"""Files are replaced in one step, for their owner only, and never through a link."""

import contextlib
import errno
import fcntl
import os
import secrets
import signal
import stat
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from opacus_pi.accounting import GradNormLedger, NoisySGD
from opacus_pi.files import atomic_file, unfinished
from opacus_pi.files.atomic_file import (
    put_new_file,
    replace_file,
    replacing,
    restrict_to_owner,
)
from opacus_pi.files.regular_file import require_regular
from opacus_pi.files.unfinished import temporary_directory
from opacus_pi.recording.state_file import write_state
from tests.faults.killing import no_file_above


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def ledger(value, num_examples=20_000):
    mechanism = NoisySGD(num_steps=10, sample_rate=0.1, noise_std=1.0)
    norms = np.full((1, num_examples), value, np.float32)
    return GradNormLedger(mechanism, [10], norms)


@pytest.fixture
def known_name(monkeypatch):
    """The attacker's best case: the random part of temporary names is known."""
    monkeypatch.setattr(secrets, "token_hex", lambda size: "0" * 2 * size)
    monkeypatch.setattr(unfinished, "_system", lambda: "")
    return lambda path: path.with_name(f".{path.name}.{'0' * 16}.tmp")


def test_threads_that_save_to_one_name_never_leave_a_part(tmp_path):
    path, errors, loaded = tmp_path / "ledger", [], set()
    ledgers = [ledger(1.0), ledger(2.0)]
    ledgers[0].save(path)
    done = threading.Event()

    def write(mine):
        while not done.is_set():
            try:
                mine.save(path)
            except OSError as error:
                errors.append(error)

    threads = [threading.Thread(target=write, args=(mine,)) for mine in ledgers * 2]
    for thread in threads:
        thread.start()
    for _ in range(150):
        loaded.add(float(GradNormLedger.load(path).grad_norms[0, 0]))
    done.set()
    for thread in threads:
        thread.join()
    assert not errors and loaded <= {1.0, 2.0}
    assert os.listdir(tmp_path) == ["ledger"]


def test_processes_with_one_id_do_not_share_a_temporary_name(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path = tmp_path / "state"
    with replacing(path) as outer:
        outer.write(b"outer")
        replace_file(path, b"inner")
        assert path.read_bytes() == b"inner"
    assert path.read_bytes() == b"outer" and os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize("planted", ["file", "link", "dangling"])
def test_a_planted_temporary_name_is_refused_and_not_touched(
    tmp_path, known_name, planted
):
    path, victim = tmp_path / "state", tmp_path / "victim"
    place = known_name(path)
    if planted == "file":
        place.write_bytes(b"planted")
        place.chmod(0o666)
    else:
        place.symlink_to(victim)
        if planted == "link":
            victim.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        replace_file(path, b"secret")
    assert not path.exists()
    if planted == "link":
        assert victim.read_bytes() == b"precious"
    if planted == "dangling":
        assert not victim.exists()


@pytest.mark.parametrize("before", [None, 0o644, 0o666])
def test_the_new_file_is_the_owners_whatever_was_there(tmp_path, before):
    path = tmp_path / "state"
    if before is not None:
        path.write_bytes(b"old")
        path.chmod(before)
    umask = os.umask(0)
    try:
        replace_file(path, b"new")
    finally:
        os.umask(umask)
    assert mode_of(path) == 0o600 and path.read_bytes() == b"new"


def test_a_link_of_ones_own_is_kept_and_its_target_replaced(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    replace_file(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_link_of_another_user_is_not_followed(tmp_path):
    victim, link = tmp_path / "victim", tmp_path / "link"
    victim.write_bytes(b"precious")
    link.symlink_to(victim)
    os.lchown(link, 12345, 12345)
    with pytest.raises(OSError, match="link of user 12345"):
        replace_file(link, b"new")
    assert victim.read_bytes() == b"precious"
    os.chown(tmp_path, 12345, 12345)  # now the link is in its owner's own directory
    replace_file(link, b"new")
    assert victim.read_bytes() == b"new"


def test_long_names_can_be_written(tmp_path):
    path = tmp_path / ("n" * 250)
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    other = tmp_path / ("m" * 250)
    assert put_new_file(other, lambda hidden: hidden.write_bytes(b"x"))


@pytest.mark.parametrize("kind", ["directory", "pipe", "device"])
def test_what_is_no_regular_file_is_refused_with_its_kind(tmp_path, kind):
    path = tmp_path / "it"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path = Path(os.devnull)
    with pytest.raises(ValueError, match=f"a regular file, not a {kind}, got"):
        replace_file(path, b"new")
    with pytest.raises(ValueError, match=f"a regular file, not a {kind}, got"):
        require_regular(path)


def leave_unfinished(path):
    """Be killed while writing; return the temporary file."""
    if (child := os.fork()) == 0:
        with replacing(path) as file:
            file.write(b"secret")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = set(path.parent.glob(f".{path.name}.*.tmp"))
    return left


def as_if_made_elsewhere(left, *, seconds_ago):
    """Give a temporary file the name and the age of one of another system."""
    name = left.name.rsplit(".", 2)[0]
    left = left.rename(left.with_name(f"{name}.{'0' * 16}.tmp"))
    os.utime(left, (time.time() - seconds_ago,) * 2)
    return left


@pytest.mark.parametrize("is_old", [False, True])
def test_the_next_write_removes_what_a_killed_one_left(tmp_path, is_old):
    """At once if it was made on the running system; else if it is an hour old."""
    path = tmp_path / "state"
    left = leave_unfinished(path)
    if is_old:
        left = as_if_made_elsewhere(left, seconds_ago=4000)
    replace_file(tmp_path / "other", b"of another name")
    assert left.read_bytes() == b"secret"
    replace_file(path, b"new")
    assert sorted(os.listdir(tmp_path)) == ["other", "state"]


@pytest.mark.parametrize("case", ["young", "locked", "other name", "other user"])
def test_a_temporary_file_that_may_be_in_use_stays(tmp_path, case):
    path = tmp_path / "state"
    left = leave_unfinished(path)
    with open(left, "rb") as file:
        if case == "young":
            left = as_if_made_elsewhere(left, seconds_ago=3000)
        elif case == "locked":
            fcntl.flock(file, fcntl.LOCK_EX)
        elif case == "other name":
            left = left.rename(tmp_path / ".state.mine.tmp")
        elif os.geteuid() == 0:
            os.chown(left, 12345, 12345)
        else:
            pytest.skip("only root can give files away")
        replace_file(path, b"new")
    assert left.read_bytes() == b"secret" and path.read_bytes() == b"new"


def killed_in_directory(target):
    """Be killed while a directory is filled; return the hidden directory."""
    if (child := os.fork()) == 0:
        with temporary_directory(target) as part:
            (part / "record").write_text("secret")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = set(target.parent.glob(f".{target.name}.*.tmp"))
    return left


def test_the_next_directory_removes_what_a_killed_run_left(tmp_path):
    left = killed_in_directory(tmp_path / "run")
    assert (left / "record").exists() and mode_of(left) == 0o700
    with temporary_directory(tmp_path / "other"):
        assert left.exists()
    with temporary_directory(tmp_path / "run") as part:
        assert not left.exists()
        part.rename(tmp_path / "run")
    assert (tmp_path / "run").is_dir()


@pytest.mark.parametrize("case", ["in use", "elsewhere", "other name"])
def test_a_directory_that_may_be_in_use_stays(tmp_path, case):
    with contextlib.ExitStack() as until_end:
        if case == "in use":
            start = temporary_directory(tmp_path / "run")
            left = until_end.enter_context(start)
        else:
            left = killed_in_directory(tmp_path / "run")
        if case == "elsewhere":
            left = as_if_made_elsewhere(left, seconds_ago=1e6)
        elif case == "other name":
            left = left.rename(tmp_path / ".run.mine.tmp")
        with temporary_directory(tmp_path / "run") as part:
            assert left.is_dir() and part != left
        assert left.is_dir()


def test_a_directory_that_another_process_removes_at_once_is_made_again(
    tmp_path, monkeypatch
):
    removed, plain = [], unfinished._open_directory

    def removed_at_once(path):
        handle = plain(path)
        if not removed:
            removed.append(path)
            os.rmdir(path)
        return handle

    monkeypatch.setattr(unfinished, "_open_directory", removed_at_once)
    with temporary_directory(tmp_path / "run") as part:
        assert part.is_dir() and removed != [part]


def test_without_a_name_of_the_system_only_old_files_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "_system", lambda: "")
    path = tmp_path / "state"
    left, folder = leave_unfinished(path), killed_in_directory(tmp_path / "run")
    replace_file(path, b"new")
    assert left.exists()
    os.utime(left, (time.time() - 4000,) * 2)
    replace_file(path, b"new")
    with temporary_directory(tmp_path / "run"):
        assert not left.exists() and folder.exists()


def test_a_new_file_that_was_taken_for_a_stale_one_is_made_again(tmp_path, monkeypatch):
    """Another process removes it after it was made, before it was locked."""
    path, made, plain = tmp_path / "state", [], os.open

    def removed_at_once(name, flags, mode=0o777):
        handle = plain(name, flags, mode)
        if flags & os.O_EXCL and not made:
            made.append(name)
            os.unlink(name)
        return handle

    monkeypatch.setattr(atomic_file.os, "open", removed_at_once)
    replace_file(path, b"new")
    assert made and path.read_bytes() == b"new" and os.listdir(tmp_path) == ["state"]


def test_put_new_file_replaces_nothing_and_leaves_no_part(tmp_path):
    path = tmp_path / "key"
    write = lambda hidden: hidden.write_bytes(b"first")  # noqa: E731
    assert put_new_file(path, write) and mode_of(path) == 0o600
    assert not put_new_file(path, lambda hidden: hidden.write_bytes(b"second"))
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["key"]


def test_permissions_of_others_are_taken_and_said(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"x")
    path.chmod(0o644)
    with pytest.warns(UserWarning, match="mode 0644.*mode is now 0600"):
        restrict_to_owner(path)
    assert mode_of(path) == 0o600
    restrict_to_owner(path)  # says nothing a second time


def test_a_directory_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    def refuse(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(atomic_file.os, "fsync", refuse)
    replace_file(tmp_path / "state", b"new")
    assert (tmp_path / "state").read_bytes() == b"new"


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    path = tmp_path / "no such directory" / "name"
    with pytest.raises(FileNotFoundError) as raised:
        replace_file(path, b"new")
    assert raised.value.filename == str(path)
    assert "the file was not written. Make the directory first" in str(raised.value)


def test_a_directory_that_may_not_be_written_is_an_error_with_a_remedy(
    tmp_path, monkeypatch
):
    def refuse(*names):
        raise PermissionError(13, "Permission denied", "hidden")

    monkeypatch.setattr(atomic_file.os, "open", refuse)
    with pytest.raises(PermissionError, match="directory in which you may") as raised:
        replace_file(tmp_path / "state", b"new")
    assert raised.value.filename == str(tmp_path / "state")


@pytest.mark.parametrize("limit", [0, 1000, 200_000])
def test_a_failed_write_names_the_file_wherever_it_fails(tmp_path, limit):
    """The buffer, the archive of torch.save, or the link to the name of a new file."""
    path = tmp_path / "state"
    large = torch.zeros(100_000)
    for write in (
        lambda: replace_file(path, bytes(300_000)),
        lambda: write_state(path, {"weights": large}),
        lambda: put_new_file(path, lambda hidden: hidden.write_bytes(bytes(300_000))),
    ):
        with no_file_above(limit), pytest.raises(OSError) as raised:
            write()
        assert raised.value.errno == errno.EFBIG
        assert raised.value.filename == str(path)
        assert "the file was not written. Raise the limit" in str(raised.value)
        assert os.listdir(tmp_path) == []


def test_an_error_of_the_block_stays_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="data.csv"):
        with replacing(tmp_path / "state"):
            open(tmp_path / "data.csv")
    with pytest.raises(RuntimeError, match="my own"):
        with replacing(tmp_path / "state"):
            raise RuntimeError("my own")
    assert os.listdir(tmp_path) == []
