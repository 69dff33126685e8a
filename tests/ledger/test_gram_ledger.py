import numpy as np
import pytest

from opacus_pi.accounting import NoisySGD
from opacus_pi.ledger.gram_ledger import GramLedger

RNG = np.random.default_rng(0)
G = RNG.normal(size=(3, 5, 7))
GRAMS = G @ G.transpose(0, 2, 1)
MECHANISM = NoisySGD(30, 0.1, 2.0, 2.5)


def test_scaled_is_the_gram_matrix_of_clipped_gradients():
    ledger = GramLedger(MECHANISM, [10, 20, 30], GRAMS)
    norms = np.linalg.norm(G, axis=2, keepdims=True)
    clipped = G * np.minimum(1, 2.5 / norms) / 2.0
    assert ledger.scaled() == pytest.approx(clipped @ clipped.transpose(0, 2, 1))


def test_a_schedule_applies_row_by_row():
    noise = np.array([1.0, 2.0, 4.0])
    scheduled = GramLedger(NoisySGD(30, 0.1, noise, 2.5), [10, 20, 30], GRAMS)
    for row in range(3):
        alone = NoisySGD(30, 0.1, noise[row], 2.5)
        single = GramLedger(alone, [10], GRAMS[row][None])
        assert scheduled.scaled()[row] == pytest.approx(single.scaled()[0])


def test_minibatch_sums_are_not_clipped_again():
    ledger = GramLedger(MECHANISM, [10], GRAMS[None], kind="minibatch")
    assert ledger.scaled() == pytest.approx(GRAMS[None] / 4)


def test_zero_gradients_stay_zero():
    ledger = GramLedger(MECHANISM, [10], np.zeros((1, 2, 2)))
    assert (ledger.scaled() == 0).all()


@pytest.mark.parametrize("kind", ["forget", "minibatch"])
def test_save_and_load(tmp_path, kind):
    grams = GRAMS if kind == "forget" else GRAMS[:, None]
    ids = np.array([3, 1, 4, 9, 5]) if kind == "forget" else None
    ledger = GramLedger(
        MECHANISM, [10, 20, 30], grams, kind=kind, example_ids=ids, data_set="d"
    )
    ledger.save(tmp_path / "grams")
    again = GramLedger.load(tmp_path / "grams")
    assert again.mechanism == ledger.mechanism
    assert again.kind == kind
    assert again.data_set == "d"
    assert np.array_equal(again.grams, ledger.grams)
    assert np.array_equal(again.steps, ledger.steps)
    assert (again.example_ids is None) == (ids is None)
    assert np.array_equal(again.scaled(), ledger.scaled())


def test_an_edited_file_is_refused(tmp_path):
    path = tmp_path / "grams"
    GramLedger(MECHANISM, [10, 20, 30], GRAMS).save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="checksum"):
        GramLedger.load(path)


def test_with_noise_std():
    ledger = GramLedger(MECHANISM, [10, 20, 30], GRAMS)
    assert ledger.with_noise_std(4.0).mechanism.assumed_noise
    assert ledger.with_noise_std(4.0).scaled() == pytest.approx(ledger.scaled() / 4)


def test_the_repr_holds_no_numbers_of_people():
    text = repr(GramLedger(MECHANISM, [10, 20, 30], GRAMS))
    assert "sensitive" in text
    assert str(round(GRAMS[0, 0, 0], 3)) not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "other"}, "kind must .*got 'other'"),
        ({"grams": GRAMS[0]}, r"shape \(N, m, m\)"),
        ({"grams": GRAMS[:2]}, "N = 3"),
        ({"grams": -GRAMS}, "inner products"),
        ({"grams": GRAMS + np.triu(np.ones((5, 5)), 1)}, "inner products"),
        ({"grams": GRAMS * np.nan}, "inner products"),
        ({"steps": [10, 10, 20]}, "strictly increasing"),
        ({"example_ids": [1, 2]}, "2 ids"),
        ({"example_ids": [1, 1, 2, 3, 4]}, "must not have duplicates"),
        (
            {"mechanism": NoisySGD(30, 0.1, np.ones(2), 1.0)},
            "noise_std must .*got an array",
        ),
    ],
)
def test_bad_input(change, message):
    good = {"mechanism": MECHANISM, "steps": [10, 20, 30], "grams": GRAMS}
    with pytest.raises(ValueError, match=message):
        GramLedger(**good | change)


def test_no_noise_no_scale():
    ledger = GramLedger(NoisySGD(30, 0.1, 0.0, 2.5), [10, 20, 30], GRAMS)
    with pytest.raises(ValueError, match="with_noise_std"):
        ledger.scaled()
