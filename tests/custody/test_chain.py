"""The chain of custody: states of links, files, and what readings do with them."""

import numpy as np
import pytest

from opacus_pi import AccountingError
from opacus_pi.accounting import epsilons, privacy_losses
from opacus_pi.accounting.statement import privacy_statement
from opacus_pi.custody import Chain, SampleCounts
from opacus_pi.ledger import GradNormLedger
from opacus_pi.ledger.custody import LINKS, Custody, Link
from opacus_pi.ledger.mechanism import NoisySGD

MECHANISM = NoisySGD(20, sample_rate=0.25, noise_std=2.0, max_grad_norm=1.0)
BROKEN = Custody((Link("draw", "broken", "A batch was used twice."),))


def ledger(custody=None):
    norms = np.array([[0.5, 2.0], [0.25, 1.0]])
    return GradNormLedger(MECHANISM, [10, 20], norms, custody=custody)


def test_the_strongest_statement_wins():
    chain = Chain()
    chain.check("model", "It was probed.")
    assert state(chain, "model") == ("checked", "It was probed.")
    with pytest.warns(
        UserWarning, match="assumes, without a check, that the model's output"
    ):
        chain.leave_unchecked("model", "It is not deterministic.")
    chain.check("model", "It was probed again.")
    assert state(chain, "model") == ("unchecked", "It is not deterministic.")
    chain.break_link("model", "It mixes examples.")
    chain.leave_unchecked("model", "Another doubt.", warn=False)
    assert state(chain, "model") == ("broken", "It mixes examples.")


def state(chain, name):
    link = {link.name: link for link in chain.custody().links}[name]
    return link.state, link.sentence


def test_links_that_nobody_looked_at_are_unchecked():
    assert [link.name for link in Chain().custody().unchecked] == list(LINKS)
    assert "engine.audit" in state(Chain(), "loss")[1]


def test_a_broken_link_is_reported_whenever_the_reader_comes():
    chain, reasons = Chain(), []
    chain.break_link("draw", "before")
    chain.on_break(reasons.append)
    chain.break_link("noise", "after")
    chain.break_link("noise", "a second reason of one link")
    assert reasons == ["before", "after"]


def test_a_resumed_chain_forgets_nothing():
    chain = Chain(lambda: SampleCounts(10, 1, "why"))
    chain.break_link("draw", "reused")
    chain.leave_unchecked("weights", "clamped", warn=False)
    again = Chain(lambda: SampleCounts(5, 0))
    again.resume(Custody.from_json(chain.custody().to_json()))
    found = again.custody()
    assert [link.sentence for link in found.broken] == ["reused", *over(found)]
    assert (found.num_samples, found.num_unattributed, found.cause) == (15, 1, "why")
    assert state(again, "weights") == ("unchecked", "clamped")


def over(custody):
    """The sentence about unattributed samples, which are more than 1 % here."""
    (link,) = [link for link in custody.broken if link.name == "identity"]
    assert "1 of 15 samples" in link.sentence
    return [link.sentence]


@pytest.mark.parametrize("num, refused", [(0, False), (10, False), (11, True)])
def test_more_than_one_percent_unattributed_is_refused(num, refused):
    found = Custody((), 1000, num, cause="Because.")
    assert bool(found.broken) == refused
    told = Custody((), 1000, num, allows_unattributed=True)
    assert not told.broken


def test_the_file_keeps_the_chain(tmp_path):
    chain = Custody((Link("loss", "unchecked", "Nicht gesehen: «ä»."),), 7, 0)
    ledger(chain).save(tmp_path / "run")
    assert GradNormLedger.load(tmp_path / "run").custody == chain
    ledger(None).save(tmp_path / "run")
    assert GradNormLedger.load(tmp_path / "run").custody is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"links": [["draw", "fine", ""]], "num_samples": 1, "num_unattributed": 0}',
        '{"links": [], "num_samples": 1, "num_unattributed": 2}',
        '{"links": [["draw"]], "num_samples": 1, "num_unattributed": 0}',
    ],
)
def test_a_text_that_is_no_chain(text):
    with pytest.raises(ValueError, match="custody|link's state"):
        Custody.from_json(text)


def test_a_printed_chain_has_a_paragraph_for_each_link():
    long = Link(
        "loss", "unchecked", "The criterion " + "was not seen, " * 12 + "so far."
    )
    found = str(Custody((long, Link("draw", "broken", "A batch was used twice."))))
    names = [line.split()[0] for line in found.splitlines() if line[0] != " "]
    assert names == list(LINKS)
    assert found.startswith("draw      broken     A batch was used twice.\n")
    assert max(map(len, found.splitlines())) <= 88
    assert " ".join(found.split()).count("was not seen,") == 12
    many = Custody((), num_samples=10, num_unattributed=5)
    assert "identity  broken" in str(many)


@pytest.mark.parametrize(
    "read",
    [
        lambda run: privacy_losses(run, 8),
        lambda run: epsilons(run, 1e-5),
        lambda run: privacy_losses([run, ledger()], 8),
        lambda run: privacy_statement(run, [0], 1e-5),
        lambda run: privacy_losses(run.subset([1]), 8),
        lambda run: privacy_losses(run.with_noise_std(3.0), 8),
    ],
)
def test_every_reading_refuses_a_broken_chain(read):
    with pytest.raises(AccountingError, match="A batch was used twice"):
        read(ledger(BROKEN))
    read(ledger(Custody()))


def test_unchecked_links_are_assumptions_of_a_statement():
    chain = Custody((Link("loss", "unchecked", "It was not seen."),))
    found = privacy_statement(ledger(chain), [0], 1e-5).assumptions
    (loss,) = [a for a in found if a.statement == LINKS["loss"]]
    assert loss.is_declared and loss.evidence == "It was not seen."
    by_hand = privacy_statement(ledger(), [0], 1e-5).assumptions
    assert not [a for a in by_hand if a.statement in LINKS.values()]


def test_samples_that_were_undone_are_left_out():
    counts = [SampleCounts(10, 3, "why")]
    chain = Chain(lambda: counts[-1])
    chain.undo_samples()
    assert chain.custody().num_samples == 0 and not chain.custody().cause
    counts.append(SampleCounts(14, 9, "why"))  # two were counted as known before
    found = chain.custody()
    assert (found.num_samples, found.num_unattributed, found.cause) == (4, 4, "why")
    assert Custody.from_json(found.to_json()) == found
