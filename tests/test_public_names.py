"""The public face: what `from opacus_pi import` reaches, no more and no less."""

import importlib
import pkgutil

import pytest

import opacus_pi

TOP = {
    "AccountingError",
    "FineTune",
    "GradNormLedger",
    "GradSampleModule",
    "GramLedger",
    "GroupAccountant",
    "Guarantee",
    "L1Sparse",
    "Langevin",
    "NoisySGD",
    "PerInstanceAccountant",
    "PrivacyEngine",
    "Recorder",
    "Unlearner",
    "audit",
}
ACCOUNTING = {
    "epsilons",
    "group_divergence",
    "log_moment",
    "lsi_track",
    "per_step_losses",
    "privacy_losses",
    "rdp_to_delta",
    "rdp_to_epsilon",
    "renyi_divergence",
    "steps_to_unlearn",
    "unlearning_divergence",
    "worst_case_loss",
}
ELSEWHERE = {
    "opacus_pi.recording.gram_recording": {"gram_ledger"},
    "opacus_pi.evaluation": {
        "evaluate",
        "gaussian_unlearning_score",
        "apply_permutation",
        "loss_barrier",
        "membership_inference",
        "permutation_spec",
        "time_to_unlearn",
        "weight_matching",
    },
    "opacus_pi.difficulty.forget_sets": {"difficulty_strata", "top_k", "by_class"},
    "opacus_pi.report": {"score", "write_report"},
    "opacus_pi.gradients": {"gradient_gram", "norm_sweep", "per_example_grad_norms"},
}


def modules():
    found = pkgutil.walk_packages(opacus_pi.__path__, "opacus_pi.")
    names = [module.name for module in found if "._" not in module.name]
    return [importlib.import_module(name) for name in names]


def test_top_level_names_are_pinned():
    assert set(opacus_pi.__all__) == TOP
    assert all(hasattr(opacus_pi, name) for name in TOP)


def test_accounting_names_are_there():
    assert set(importlib.import_module("opacus_pi.accounting").__all__) >= ACCOUNTING


@pytest.mark.parametrize("module", ELSEWHERE)
def test_names_of_other_rooms_are_there(module):
    room = importlib.import_module(module)
    assert all(hasattr(room, name) for name in ELSEWHERE[module])


def test_every_public_name_exists_and_is_documented():
    for module in [opacus_pi, *modules()]:
        names = getattr(module, "__all__", [])
        for name in names:
            value = getattr(module, name)
            assert value.__doc__ if callable(value) else True, (module, name)
