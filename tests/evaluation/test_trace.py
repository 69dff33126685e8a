import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opacus_pi.evaluation.trace import UnlearningTrace, time_to_unlearn

UA, GUS = "unlearning_accuracy", "gaussian_unlearning_score"


def trace(values, metric=UA, times=None, **more):
    times = list(range(len(values))) if times is None else times
    return UnlearningTrace(times, {metric: values}, **more)


def first_by_hand(times, values, oracle, tolerance):
    for time, value in zip(times, values, strict=True):
        if abs(value - oracle) <= tolerance:
            return time
    return float("inf")


@given(
    st.lists(st.integers(-1000, 1000), min_size=1, max_size=20),
    st.lists(st.integers(-1000, 1000), min_size=1, max_size=5),
    st.integers(0, 500),
)
def test_time_is_the_first_evaluation_within_the_tolerance(values, seeds, tolerance):
    times = [0.5 * i for i in range(len(values))]
    got = time_to_unlearn(
        trace(values, times=times), seeds, metric=UA, tolerance=tolerance
    )
    assert got == first_by_hand(times, values, sum(seeds) / len(seeds), tolerance)


def test_five_points_of_accuracy_by_default_and_the_boundary_counts():
    run = trace([0.30, 0.40, 0.55, 0.50])
    assert time_to_unlearn(run, 0.50, metric=UA) == 2  # 0.55 - 0.5 > 0.05 in floats
    assert time_to_unlearn(run, 0.32, metric=UA) == 0
    assert time_to_unlearn(run, 0.90, metric=UA) == np.inf


def test_a_wider_tolerance_never_takes_longer():
    random = np.random.default_rng(0)
    run = trace(random.random(50))
    times = [
        time_to_unlearn(run, 0.7, metric=UA, tolerance=t) for t in np.linspace(0, 1, 21)
    ]
    assert times == sorted(times, reverse=True)
    assert times[-1] == 0


def test_oracle_as_number_array_or_mapping():
    run = trace([0.0, 0.3, 0.6])
    for oracle in (0.3, [0.2, 0.4], np.array([0.3]), {UA: [0.1, 0.5], "other": 9}):
        assert time_to_unlearn(run, oracle, metric=UA) == 1


def test_gus_counts_in_units_of_the_distance_before():
    run = trace([2.0, 0.2, 0.09, 0.0], metric=GUS)
    assert time_to_unlearn(run, 0.0, metric=GUS) == 2  # 0.05 * 2 = 0.1
    assert time_to_unlearn(run, 0.0, metric=GUS, tolerance=0.1) == 1
    far = trace([200.0, 20.0, 9.0, 0.0], metric=GUS)
    assert time_to_unlearn(far, 0.0, metric=GUS) == 2
    assert time_to_unlearn(trace([0.3], metric=GUS), 0.3, metric=GUS) == 0


def test_not_a_number_is_never_there():
    assert time_to_unlearn(trace([np.nan, np.nan]), 0.5, metric=UA) == np.inf


def test_append_is_the_constructor_one_by_one():
    run = UnlearningTrace(unit="steps")
    run.append(0, {"a": 1, "b": 2})
    run.append(2.5, {"b": 4, "a": 3})
    assert run == UnlearningTrace([0, 2.5], {"a": [1, 3], "b": [2, 4]}, "steps")
    assert len(run) == 2
    np.testing.assert_array_equal(run["b"], [2.0, 4.0])


def test_file_round_trip_and_nothing_beside_it(tmp_path):
    run = trace([0.1, np.inf], unit="steps", cost={"seconds": 3.5, "num_examples": 7})
    run.save(tmp_path / "trace.json")
    assert UnlearningTrace.load(tmp_path / "trace.json") == run
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]


def test_a_foreign_or_truncated_file_is_refused(tmp_path):
    path = tmp_path / "trace.json"
    trace([0.1]).save(path)
    whole = path.read_text()
    path.write_text(whole[:-5])
    with pytest.raises(ValueError, match="truncated, or it is not a trace"):
        UnlearningTrace.load(path)
    path.write_text(json.dumps({**json.loads(whole), "version": 2}))
    with pytest.raises(ValueError, match="version 1, got .* of version 2"):
        UnlearningTrace.load(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="truncated, or it is not a trace"):
        UnlearningTrace.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"times": None}, "the field times is missing"),
        ({"metrics": [1]}, "metrics is not a dict"),
        ({"metrics": {UA: 1}}, "metrics.*is not a list of numbers"),
        ({"times": ["0"]}, "times has a value that is not an int or a float"),
    ],
)
def test_a_file_with_other_fields_names_the_field(tmp_path, change, message):
    path = tmp_path / "trace.json"
    trace([0.1]).save(path)
    content = {**json.loads(path.read_text()), **change}
    content = {name: value for name, value in content.items() if value is not None}
    content.pop("checksum")
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**content, "checksum": digest}))
    with pytest.raises(ValueError, match=f"other content in .*: {message}"):
        UnlearningTrace.load(path)


def appended(time, metrics):
    run = trace([0.1, 0.2])
    try:
        run.append(time, metrics)
    finally:
        assert run == trace([0.1, 0.2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trace([0.1, 0.2], times=[1, 1]), "strictly increasing"),
        (lambda: trace([0.1], times=[1, 2]), "one value at each of 2 times"),
        (lambda: appended(1, {UA: 0.1}), "time must be later than 1.0, got 1"),
        (lambda: appended(np.nan, {UA: 0.1}), "time must be finite, got nan"),
        (lambda: appended(2, {"x": 0.1}), r"metrics must be named .*, got \['x'\]"),
        (lambda: trace([0.1])["x"], "metric must be one of .*, got 'x'"),
        (
            lambda: time_to_unlearn(trace([0.1]), {"x": 1}, metric=UA),
            "oracle must .*'x'",
        ),
        (lambda: time_to_unlearn(trace([0.1]), [], metric=UA), "finite numbers"),
        (lambda: time_to_unlearn(trace([0.1]), [np.nan], metric=UA), "finite numbers"),
        (
            lambda: time_to_unlearn(trace([]), 0.1, metric=UA),
            "must contain an evaluation",
        ),
        (
            lambda: time_to_unlearn(trace([0.1]), 0.1, metric=UA, tolerance=-1),
            "tolerance must be at least 0, got -1",
        ),
        (
            lambda: time_to_unlearn(trace([1.0], GUS, [1]), 0.1, metric=GUS),
            r"trace.times\[0\] must be 0, got 1.0",
        ),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "metrics, message",
    [
        (0.5, r"^metrics must be a dict of numbers by name, got 0.5. Return named"),
        (None, "got None"),
        ((0.5, 0.6), "dict of numbers by name"),
        ({"a": np.zeros(3)}, r"metrics\['a'\] must be a single number, got ndarray"),
        ({"a": "good"}, "got str"),
        ({"a": None}, "got NoneType"),
    ],
)
def test_an_evaluation_returns_numbers_by_name(metrics, message):
    trace = UnlearningTrace(unit="epochs")
    with pytest.raises(ValueError, match=message):
        trace.append(0, metrics)
    assert len(trace) == 0 and trace.metrics == {}
