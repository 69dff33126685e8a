import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from opacus_pi.attribution import UNATTRIBUTED, Tracker, probe
from opacus_pi.attribution.causes import ANOTHER_INPUT, INPUTS_DISAGREE
from opacus_pi.attribution.delivery import LoaderPass
from opacus_pi.attribution.forward_probe import ForwardProbe
from opacus_pi.recording import AccountingError


class Source:
    """Something that delivers, in passes."""

    def __init__(self):
        self.current_pass = LoaderPass(self)


def matched(tracker, inputs, size, **options):
    """What a forward and backward pass over some inputs is attributed to."""
    tracker.mark_backward(tracker.bind(inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tracker.attribute([size], **options).tolist()


def batch(seed, size=3):
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))


def test_copies_with_equal_samples_stay_unattributed_only_where_they_must():
    x = batch(0, 4)
    x[1] = x[3]  # two examples that look alike
    tracker = Tracker()
    tracker.delivered([5, 6, 7, 8], x)
    assert matched(tracker, [x.clone()], 4) == [5, 6, 7, 8]  # all in their places
    moved = x[[2, 3, 0, 1]].clone()
    assert matched(tracker, [moved], 4) == [7, 6, 5, 8]  # equal examples
    assert matched(tracker, [moved[:3]], 3) == [7, UNATTRIBUTED, 5]
    tracker.delivered([5, 6, 7, 8], [x, torch.arange(4)])  # their targets differ
    assert matched(tracker, [moved], 4) == [7, UNATTRIBUTED, 5, UNATTRIBUTED]


def test_equal_batches_of_different_examples_stay_unattributed():
    tracker, x = Tracker(), batch(0)
    tracker.delivered([0, 1, 2], x)
    tracker.delivered([3, 1, 4], x.clone())
    assert matched(tracker, [x.clone()], 3) == [UNATTRIBUTED, 1, UNATTRIBUTED]


def test_flags_are_no_evidence_by_themselves_but_must_agree():
    tracker = Tracker()
    x, flags = batch(0), torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    tracker.delivered([0, 1, 2], {"flags": flags, "x": x})
    assert matched(tracker, [x.clone(), flags.clone()], 3) == [0, 1, 2]
    assert matched(tracker, [x[[2, 0, 1]], flags[[2, 0, 1]]], 3) == [2, 0, 1]
    assert matched(tracker, [x.clone(), 1 - flags], 3) == [0, 1, 2]
    others = flags[[1, 0, 2]]
    for inputs in ([x, others], [x.clone(), others]):
        assert matched(tracker, inputs, 3) == [UNATTRIBUTED, UNATTRIBUTED, 2]
    assert tracker.causes == {INPUTS_DISAGREE.name: 4}


def test_equally_wide_inputs_are_all_known():
    tracker, x, mask = Tracker(), batch(0), torch.ones(3, 4)
    tracker.delivered([0, 1, 2], {"mask": mask, "x": x})
    assert matched(tracker, {"mask": mask.clone(), "x": x[[2, 0, 1]]}, 3) == [2, 0, 1]
    mask[0, 3] = 0
    tracker.delivered([4, 5, 6], {"mask": mask, "x": x + 1})
    assert matched(tracker, [mask.clone(), (x + 1).clone()], 3) == [4, 5, 6]


def test_inputs_of_two_deliveries_are_unattributed():
    tracker, x, u = Tracker(), batch(0), batch(1)
    tracker.delivered([0, 1, 2], x)
    tracker.delivered([3, 4, 5], u)
    assert matched(tracker, [x, u], 3) == [UNATTRIBUTED] * 3
    assert matched(tracker, [x.clone(), u.clone()], 3) == [UNATTRIBUTED] * 3


def test_packed_sequences_are_not_assumed_in_order():
    tracker, x = Tracker(), torch.randn(3, 5, 2)
    packed = pack_padded_sequence(
        x + 1, torch.tensor([2, 5, 3]), batch_first=True, enforce_sorted=False
    )
    tracker.delivered([0, 1, 2], x)
    assert matched(tracker, [packed], 3) == [UNATTRIBUTED] * 3


def test_batches_along_the_second_dimension():
    tracker, x = Tracker(batch_first=False), torch.randn(5, 3, 2)  # [time, example, :]
    tracker.delivered([7, 8, 9], x)
    assert matched(tracker, [x], 3) == [7, 8, 9]
    assert matched(tracker, [x.clone()[:, [2, 0, 1]]], 3) == [9, 7, 8]
    collated = torch.randn(3, 5, 2)  # by torch's collation; the loop transposes
    tracker.delivered([1, 2, 3], collated)
    assert matched(tracker, [collated.transpose(0, 1)], 3) == [1, 2, 3]


def test_latest_is_assumed_only_if_it_is_the_only_unused_one():
    source, tracker, x, u = Source(), Tracker(), batch(1), batch(2)
    tracker.delivered([0, 1, 2], batch(0), source.current_pass)
    assert matched(tracker, [batch(9)], 3) == [0, 1, 2]
    assert matched(tracker, [batch(8)], 3) == [0, 1, 2]  # another view of it
    tracker.delivered([3, 4, 5], x, source.current_pass)
    tracker.delivered([6, 7, 8], u, source.current_pass)
    assert matched(tracker, [batch(7)], 3) == [UNATTRIBUTED] * 3
    del x, u  # no longer held, and their pass over the loader is over
    source.current_pass = LoaderPass(source)
    tracker.delivered([0, 1, 2], batch(3), source.current_pass)
    assert matched(tracker, [batch(6)], 3) == [0, 1, 2]
    assert tracker.counts["by_latest"] == 9


def test_a_batch_that_is_still_held_may_still_be_used():
    source, tracker, x = Source(), Tracker(), batch(0)
    tracker.delivered([0, 1, 2], x, source.current_pass)
    source.current_pass = LoaderPass(source)
    tracker.delivered([3, 4, 5], batch(1), source.current_pass)
    assert matched(tracker, [batch(9)], 3) == [UNATTRIBUTED] * 3
    del x
    tracker.delivered([6, 7, 8], batch(2), LoaderPass(source))
    assert matched(tracker, [batch(9)], 3) == [UNATTRIBUTED] * 3  # [3, 4, 5] may come
    source.current_pass = LoaderPass(source)
    tracker.delivered([0, 1, 2], batch(3), source.current_pass)
    assert matched(tracker, [batch(9)], 3) == [0, 1, 2]


def test_deliveries_long_ago_are_forgotten():
    tracker, first = Tracker(), batch(0)
    tracker.delivered([0, 1, 2], first)
    for seed in range(1, 20):
        tracker.delivered([3, 4, 5], batch(seed))
    assert matched(tracker, [first], 3) == [UNATTRIBUTED] * 3


def test_backward_passes_come_in_any_order():
    tracker, x, u = Tracker(), batch(0), batch(1)
    tracker.delivered([0, 1, 2], x)
    tracker.delivered([3, 4, 5], u)
    first, second = tracker.bind([x]), tracker.bind([u])
    tracker.mark_backward(second)
    tracker.mark_backward(first)
    assert tracker.attribute([3, 3]).tolist() == [3, 4, 5, 0, 1, 2]


def test_one_uncertain_pass_leaves_the_others_attributed():
    tracker, x = Tracker(), batch(0)
    for indices, delivered in (([0, 1, 2], x), ([3, 4, 5], batch(1)), ([6], batch(2))):
        tracker.delivered(indices, delivered)
    for inputs in ([x], [batch(5)]):
        tracker.mark_backward(tracker.bind(inputs))
    with pytest.warns(UserWarning, match="3 samples are unattributed"):
        assert tracker.attribute([3, 3]).tolist() == [0, 1, 2] + [UNATTRIBUTED] * 3


def test_gradients_for_more_samples_than_were_passed():
    tracker, x = Tracker(), batch(0)
    tracker.delivered([0, 1, 2], x)
    assert matched(tracker, [x], 4) == [UNATTRIBUTED] * 4


def test_strict_names_the_cause():
    tracker = Tracker(strict=True)
    with pytest.raises(AccountingError, match="Call the model itself"):
        tracker.attribute([3])
    tracker.delivered([0, 1, 2], batch(0))
    tracker.mark_backward(tracker.bind([batch(1)]))
    with pytest.raises(AccountingError, match="without verification"):
        tracker.attribute([3])


def test_probes_report_training_passes_only():
    model, tracker = nn.Linear(4, 2), Tracker()
    handle = probe(model, tracker)
    assert probe(model, tracker) is handle and len(model._forward_hooks) == 1
    x = batch(0)
    tracker.delivered([0, 1, 2], x)
    with torch.no_grad():
        model(x)
    model.eval()(x)
    assert tracker.take() == []
    model.train()(x).sum().backward()
    assert [f.indices.tolist() for f in tracker.take()] == [[0, 1, 2]]
    handle.remove()
    model(x).sum().backward()
    assert tracker.take() == []


def test_probes_without_a_tracker_do_nothing():
    model = nn.Linear(4, 2)
    probe(model, Tracker())  # gone at once
    model(batch(0)).sum().backward()
    hook = ForwardProbe()
    hook.report_to(tracker := Tracker())
    for duplicate in (copy.deepcopy(hook), pickle.loads(pickle.dumps(hook))):
        duplicate(model, (batch(0),), {}, model(batch(0)))
    assert tracker.take() == []


@pytest.mark.parametrize(
    ("second", "causes"),
    [
        (lambda x: x.mean(0).expand(len(x), -1).clone(), {ANOTHER_INPUT.name: 3}),
        (lambda x: torch.linspace(0, 1, 5).expand(len(x), -1).clone(), {}),
        (lambda x: torch.full((len(x), 5), 0.5), {}),
        (lambda x: torch.full((len(x), 5), float(x[0, 0])), {ANOTHER_INPUT.name: 3}),
        (lambda x: x.max().expand(len(x)).clone(), {ANOTHER_INPUT.name: 3}),
        (lambda x: torch.full((len(x),), 2), {}),
        (lambda x: torch.full((len(x), 1), x.shape[1]), {}),
    ],
    ids=["mean", "table", "constant", "one of them", "maximum", "number", "size"],
)
@pytest.mark.filterwarnings("ignore:Samples are attributed without verification")
def test_a_second_input_alike_in_all_samples_must_be_alike_in_all_batches(
    second, causes
):
    tracker, generator = Tracker(), torch.Generator().manual_seed(2)
    for k in range(2):
        x = torch.randn(3, 5, generator=generator)
        tracker.delivered([3 * k, 3 * k + 1, 3 * k + 2], x)
        tracker.mark_backward(tracker.bind((x, second(x))))
        tracker.attribute([3])
    assert tracker.causes == causes
