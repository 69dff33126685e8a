"""A disk that is full, a folder that cannot be written to: an error, and no loss."""

import os

import pytest

from opacus_pi.accounting import GradNormLedger
from opacus_pi.evaluation import OracleCache
from opacus_pi.unlearning.deletion_log import DeletionLog, verify
from tests.faults.killing import mounted, no_file_above, remounted
from tests.faults.writers import DATA, WRITERS, net, write_ledger
from tests.private_training import Recorder, Training

pytestmark = [
    pytest.mark.filterwarnings("ignore:PrivacyEngine detected new dataset"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
]
_KEPT = "the file was not written, and the earlier file of this name is unchanged. "
_LARGE = f"File too large: {_KEPT}Raise the limit"
_FULL = f"No space left on device: {_KEPT}Free space on the disk"
REPLACED = [name for name in WRITERS if name not in ("oracle", "log")]


@pytest.fixture
def disk(tmp_path):
    """A file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with mounted(folder, "256k") as here:
        if here is None:
            pytest.skip("mounting a file system is not permitted")
        yield here


def fill(folder, keep=0):
    """Use up a file system, but for some bytes."""
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, os.fstat(file.fileno()).st_size - keep))


@pytest.mark.parametrize("name", REPLACED)
def test_a_quota(tmp_path, name):
    """Beyond its quota nothing is written, and the file is the old one."""
    writer = WRITERS[name]
    writer.write(tmp_path, 0)
    (file,) = writer.names
    with no_file_above(100), pytest.raises(OSError, match=_LARGE) as raised:
        writer.write(tmp_path, 1)
    assert raised.value.filename == str(tmp_path / file)
    assert os.listdir(tmp_path) == [file]
    assert writer.read(tmp_path) == 0
    writer.write(tmp_path, 1)
    assert writer.read(tmp_path) == 1


def test_a_quota_on_the_deletion_log(tmp_path):
    log = DeletionLog(tmp_path / "deletions")
    log.append("request", {"indices": [1]}, name="a")
    before, head = log.path.read_bytes(), log.head
    more = {"indices": list(range(3000))}  # for which the file must grow
    with no_file_above(len(before) + 50), pytest.raises(OSError):
        log.append("request", more, name="b")
    assert log.path.read_bytes() == before and verify(log.path, head).num_added == 0
    log.append("request", more, name="b")
    assert [e.name for e in log.entries()] == ["a", "b"]


@pytest.mark.parametrize("name", REPLACED)
def test_a_full_disk(disk, name):
    writer = WRITERS[name]
    writer.write(disk, 0)
    fill(disk)
    with pytest.raises(OSError, match=_FULL) as raised:
        writer.write(disk, 1)
    assert raised.value.filename in {str(disk / name) for name in writer.names}
    assert sorted(os.listdir(disk)) == sorted([*writer.names, "filler"])
    assert writer.read(disk) == 0
    (disk / "filler").unlink()
    writer.write(disk, 1)
    assert writer.read(disk) == 1


def test_a_full_disk_and_the_deletion_log(disk):
    writer = WRITERS["log"]
    writer.write(disk, 0)
    fill(disk)
    with pytest.raises(OSError):
        writer.write(disk, 1)
    assert writer.read(disk) == 0
    (disk / "filler").unlink()
    writer.write(disk, 1)
    assert writer.read(disk) == 1
    assert sorted(os.listdir(disk)) == ["deletions"]  # no part of a write is left


ODD_KINDS = {
    "pipe": os.mkfifo,
    "directory": os.mkdir,
    "loop": lambda path: os.symlink(path, path),
    "device": lambda path: os.symlink("/dev/full", path),
}


@pytest.mark.parametrize("kind", ODD_KINDS)
@pytest.mark.parametrize("name", [*REPLACED, "log"])
def test_a_name_that_is_not_that_of_a_file(tmp_path, name, kind):
    """Neither writing nor reading waits, and what is there stays as it is."""
    writer = WRITERS[name]
    place = tmp_path / writer.names[0]
    ODD_KINDS[kind](place)
    before = os.lstat(place)
    with pytest.raises((ValueError, OSError)):
        writer.write(tmp_path, 0)
    if name != "result":  # which only its own test reads
        with pytest.raises((ValueError, OSError)):
            writer.read(tmp_path)
    after = os.lstat(place)
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
    assert os.listdir(tmp_path) == [place.name]


def test_an_oracle_that_cannot_be_stored_is_not_lost_without_a_word(disk):
    fill(disk)
    with pytest.raises(OSError):
        WRITERS["oracle"].write(disk, 1)
    (disk / "filler").unlink()
    assert WRITERS["oracle"].read(disk) == 0


@pytest.fixture
def read_only(tmp_path):
    """Makes a folder read-only, also for root."""
    folder = tmp_path / "folder"
    folder.mkdir()
    if os.geteuid() != 0:
        yield folder, lambda: folder.chmod(0o500)
        folder.chmod(0o700)
        return
    with mounted(folder, "1m") as here:
        if here is None:
            pytest.skip("root may write anywhere, and mounting is not permitted")
        yield here, lambda: remounted(here, "ro")


@pytest.mark.parametrize("name", WRITERS)
def test_a_read_only_folder(read_only, name):
    folder, protect = read_only
    WRITERS[name].write(folder, 0)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    protect()
    if name != "log" or os.geteuid() == 0:  # a file of one's own may be added to
        with pytest.raises((OSError, RuntimeError)):
            WRITERS[name].write(folder, 1)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    if name == "log":
        verify(folder / "deletions")  # checking needs no right to write
    elif name != "oracle":
        assert WRITERS[name].read(folder) == 0


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_ledger(tmp_path / "file", 1)
    with pytest.raises(OSError, match="file"):
        DeletionLog(tmp_path / "file" / "deletions")
    with pytest.raises(OSError, match="file"):
        OracleCache(tmp_path / "file").train(
            lambda retain, seed: net(1),
            key={},
            data_set=DATA,
            forget_indices=[1],
            seeds=[1],
            model_factory=lambda: net(5),
            progress=False,
        )
    assert (tmp_path / "file").read_text() == ""


def test_weights_that_cannot_be_kept_stop_the_training_and_lose_no_row(tmp_path):
    """The update was made and is counted; its row is written with the next update."""
    place = tmp_path / "weights"
    place.write_text("a file")
    training = Training(recorder=Recorder(every=1, weights_dir=place), batch_size=12)
    with pytest.raises(OSError, match="weights"):
        training.train(1)
    assert training.recorder.num_steps == 2
    place.unlink()
    training.train(1)
    found = training.engine.ledger
    assert found.mechanism.num_steps == 4
    assert found.steps.tolist() == [3, 4]
    assert sorted(os.listdir(place)) == [
        f"weights-{step:08d}.safetensors" for step in found.steps
    ]


def test_a_ledger_is_read_from_where_nothing_can_be_written(read_only):
    folder, protect = read_only
    write_ledger(folder, 1)
    protect()
    assert GradNormLedger.load(folder / "run").num_examples == 5000
