"""Objects of the user's own by import path, and what is said about a wrong one."""

import pytest

from opacus_pi.cli.commands import COMMANDS
from opacus_pi.cli.errors import BadInput
from opacus_pi.cli.imports import CRITERION, DATA_SET, MODEL, import_object
from tests.cli.conftest import MODEL as WEIGHTS


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("cli_project", "not of the form package.module:name"),
        (
            "no_such_module_here:x",
            "importing no_such_module_here raised ModuleNotFound",
        ),
        ("cli_project:nothing", "cli_project:nothing does not exist. cli_project has:"),
        ("cli_project:number", "cli_project:number is of type int, not a data set"),
        (
            "cli_project:build",
            "cli_project:build is of type Sequential, not a data set",
        ),
        ("cli_project:needs_argument", "cli_project:needs_argument() raised TypeError"),
    ],
)
def test_import_paths(run, path, message):
    words = ("--data", path, "--forget", "3", "--out", "never")
    code, out, err = run("unlearn", *WEIGHTS, *words)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("opacus-pi unlearn: --data: ") and message in err


def test_import_paths_may_have_dots():
    found = import_object("--data", "opacus_pi.cli:commands.COMMANDS.keys", CRITERION)
    assert list(found()) == list(COMMANDS)


@pytest.mark.parametrize(
    ("kind", "path", "offered"),
    [
        (DATA_SET, "trian_set", "train_set, other_set, images, labels, test_set"),
        (DATA_SET, "tset_set", "test_set, other_set, images, labels"),
        (DATA_SET, "number", "images, labels, test_set, build"),
        (MODEL, "biuld", "build, one_model, Broken, build_broken"),
        (MODEL, "number", "one_model, Broken, build, build_broken"),
    ],
)
def test_a_wrong_name_lists_what_the_module_offers_of_the_kind(
    project, monkeypatch, kind, path, offered
):
    monkeypatch.syspath_prepend(str(project))
    with pytest.raises(BadInput) as error:
        import_object("--data", f"cli_project:{path}", kind)
    assert f"cli_project has: {offered}" in str(error.value)
    assert not {"needs_argument", "TensorDataset", "number"} & set(
        str(error.value).split("has: ")[1].rstrip(".").split(", ")
    )


def test_a_wrong_name_where_there_is_none_and_where_there_are_many():
    with pytest.raises(
        BadInput, match=r"cli\.sets has no such object, and no function that could"
    ):
        import_object("--data", "opacus_pi.cli.sets:x", DATA_SET)
    with pytest.raises(BadInput, match=r"has: CrossEntropyLoss, .*, and \d+ more\."):
        import_object("--criterion", "torch.nn:CrosEntropyLoss", CRITERION)


def test_a_wrong_module_names_the_one_that_is_here(project, monkeypatch):
    monkeypatch.chdir(project)
    with pytest.raises(BadInput, match=r"Did you mean cli_project\? The current"):
        import_object("--model", "cli_projct:build", MODEL)
    with pytest.raises(BadInput, match=r"'zzz'\. The current"):
        import_object("--model", "zzz:build", MODEL)
