"""Files of torch.save are read without running their code, or refused by name."""

import argparse
import io
import os
import pathlib
import zipfile

import numpy as np
import pytest
import torch

from opacus_pi.files.torch_file import (
    OtherObjects,
    read_torch_file,
    require_bounded,
)


class Mine:
    """A user's own type, at the top of a module so that it can be pickled."""

    number = 3


def touching(path):
    """An object whose unpickling makes a file, as a hostile one would run anything."""

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(path),)

    return Hostile()


def stored(content, path=None, **options):
    target = io.BytesIO() if path is None else path
    torch.save(content, target, **options)
    if path is None:
        target.seek(0)
    return target


def test_what_programs_put_beside_weights_is_read():
    content = {
        "weights": {"w": torch.arange(3.0)},
        "best": np.float64(0.5),
        "step": np.int64(7),
        "curve": np.arange(4, dtype=np.float32),
        "mask": np.array([True, False]),
        "arguments": argparse.Namespace(lr=0.1, name="run"),
        "folder": pathlib.PurePath("a") / "b",
        "nested": [1, (2.5, None), {"text": "x"}, {3}],
    }
    content["folder"] = pathlib.Path(content["folder"])
    found = read_torch_file(stored(content))
    assert torch.equal(found.pop("weights")["w"], content.pop("weights")["w"])
    for name in ("curve", "mask"):
        one, other = found.pop(name), content.pop(name)
        assert one.dtype == other.dtype and (one == other).all()
    assert found == content


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_not_run_and_the_file_stays_where_it_was(tmp_path, zipped):
    hostile = {"w": torch.ones(1), "x": touching(tmp_path / "made")}
    file = io.BytesIO(b"before")
    file.seek(0, io.SEEK_END)
    start = file.tell()
    torch.save(hostile, file, _use_new_zipfile_serialization=zipped)
    file.seek(start)
    with pytest.raises(ValueError, match="without running code from it"):
        read_torch_file(file)
    assert not (tmp_path / "made").exists() and file.tell() == start


@pytest.mark.parametrize(
    "nested",
    [
        lambda hostile: np.array([hostile], dtype=object),
        lambda hostile: argparse.Namespace(x=hostile),
        lambda hostile: [{"a": (hostile,)}],
    ],
)
def test_harmless_types_do_not_carry_code(tmp_path, nested):
    content = {"x": nested(touching(tmp_path / "made"))}
    with pytest.raises(ValueError, match=r"posix\.mkdir|nt\.mkdir"):
        read_torch_file(stored(content))
    assert not (tmp_path / "made").exists()


def test_other_types_are_named_with_the_callers_remedy(tmp_path):
    path = stored({"a": Mine(), "b": 1}, tmp_path / "own.pt")
    before = set(torch.serialization.get_safe_globals())
    with pytest.raises(OtherObjects, match=r"test_torch_file\.Mine\. Do this\.$"):
        read_torch_file(path, remedy="Do this.")
    with torch.serialization.safe_globals([Mine, np.ndarray]):
        assert read_torch_file(path)["a"].number == 3
        assert np.ndarray in torch.serialization.get_safe_globals()  # still the user's
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize(
    "content", [b"", b"junk", b"PK\3\4junk", b"x" * 1000, b"\x80\x02}q\x00", b"\0" * 99]
)
def test_other_files_and_damage_are_errors_of_one_kind(content):
    with pytest.raises(ValueError, match="^path"):
        read_torch_file(io.BytesIO(content))


# ------------------------------------------------------------------ bounded size


def bomb(path, name="archive/data.pkl", size=1 << 27):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, bytes(size))


def test_archives_that_grow_are_refused(tmp_path):
    bomb(tmp_path / "bomb.pt")
    assert (tmp_path / "bomb.pt").stat().st_size < 1 << 20
    with pytest.raises(ValueError, match="compressed, or asks for more memory"):
        require_bounded(tmp_path / "bomb.pt")


def test_a_member_that_claims_more_than_the_file_is_refused(tmp_path):
    path = tmp_path / "claim.pt"
    torch.save({"w": torch.ones(4)}, path)
    content = bytearray(path.read_bytes())
    record = content.rindex(b"PK\1\2")  # the last entry of the archive's directory
    content[record + 24 : record + 28] = (1 << 30).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match="more memory"):
        require_bounded(path)


@pytest.mark.parametrize("content", [bytearray(5), torch.FloatTensor])
def test_objects_of_any_length_are_refused(tmp_path, content):
    path = stored({"x": content}, tmp_path / "sized.pt")
    with pytest.raises(ValueError, match="more memory"):
        require_bounded(path)


def test_what_torch_saves_is_within_bounds(tmp_path):
    content = {
        "text": "a Tensor, a bytearray",  # only names of types count, not texts
        "w": torch.nn.Linear(2, 2).state_dict(),
        "b": torch.ones(2, dtype=torch.bfloat16),
        "n": np.float64(2),
    }
    require_bounded(stored(content, tmp_path / "good.pt"))


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_file_that_was_cut_is_refused_by_name(tmp_path, share):
    whole = tmp_path / "whole.pt"
    torch.save({"weights": torch.randn(1000)}, whole)
    content = whole.read_bytes()
    cut = tmp_path / "cut.pt"
    cut.write_bytes(content[: int(share * len(content))])
    with pytest.raises((ValueError, RuntimeError), match="cut.pt|archive"):
        read_torch_file(cut)


def test_the_name_of_a_file_does_not_decide_its_format(tmp_path):
    content = stored({"w": torch.ones(3)}, tmp_path / "whole.safetensors").read_bytes()
    assert read_torch_file(tmp_path / "whole.safetensors", mmap=True)["w"].sum() == 3
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="torch.save, got .*cut.safetensors"):
        read_torch_file(tmp_path / "cut.safetensors")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_flipped_byte_is_harmless_or_refused_by_name(tmp_path):
    content = stored({"w": torch.ones(3), "n": 5}).getvalue()
    path, num_refused = tmp_path / "flipped.pt", 0
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 0x55
        path.write_bytes(flipped)
        try:
            read_torch_file(path)
        except ValueError as error:
            assert str(path) in str(error), place
            num_refused += 1
    assert num_refused > 100


@pytest.mark.parametrize("place", ["nowhere", "cuda:99"])
def test_an_option_that_does_not_fit_is_torchs_error(tmp_path, place):
    path = stored({"w": torch.ones(3)}, tmp_path / "whole.pt")
    with pytest.raises(RuntimeError, match="(?i)device|location"):
        read_torch_file(path, map_location=place)
