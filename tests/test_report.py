"""The page is whole, loads nothing, escapes everything, and says what was found."""

import base64
import json
import math
import re
import stat
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from opacus_pi import GradNormLedger, Guarantee, NoisySGD
from opacus_pi.accounting import epsilon_limits, epsilons, privacy_losses
from opacus_pi.accounting.composed_epsilon import composed_worst_case
from opacus_pi.accounting.guarantee import Assumption, EpsilonDelta, rounded_up
from opacus_pi.difficulty.forget_sets import ranking, top_k
from opacus_pi.evaluation import UnlearningTrace
from opacus_pi.files.strict_json import json_text
from opacus_pi.models.weights_name import weights_name
from opacus_pi.plotting import plot_distribution
from opacus_pi.report import Barriers, score, write_report
from opacus_pi.unlearning import Unlearner

ACTING = "\0\x1b[2J\x9b\x7f\u202e\u2028\ud800"  # on a terminal or a page
HOSTILE = '<script>alert("x")</script><img src=http://evil onerror=1>&$\\frac{' + ACTING
EMPTY = {"meta", "img", "br", "hr", "link", "input"}


@dataclass(frozen=True)
class Result:
    trace: UnlearningTrace
    guarantee: Guarantee
    record: dict[str, Any]


class Page(HTMLParser):
    """A strict reader: every element is closed, in order; what it holds is kept."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def make_ledger(num_examples=60, **options):
    norms = np.random.default_rng(0).lognormal(-1, 1, (3, num_examples))
    mechanism = NoisySGD(30, sample_rate=0.1, noise_std=1.0, max_grad_norm=1.0)
    return GradNormLedger(mechanism, [10, 20, 30], norms, **options)


def make_result(name="forget_loss", text="plain words"):
    return Result(
        UnlearningTrace([0, 1, 2], {name: [0.1, 0.4, 0.6]}),
        Guarantee(text, (Assumption(text, False, text),), (2.0,), (0.5,)),
        {"method": text, "forget_indices": [3, 17], "forgotten_before": [], text: text},
    )


def read(path, **options):
    facts = write_report(path, **options)
    page = Page(path.read_text(encoding="utf-8"))
    assert json.loads(path.with_suffix(".json").read_text()) == facts
    return page, facts


def test_numbers_are_the_librarys(tmp_path):
    ledger = make_ledger(data_set="digits")
    page, facts = read(tmp_path / "r.html", ledger=ledger, order=4, delta=1e-4, top=3)
    losses, own = privacy_losses(ledger, 4.0), epsilons(ledger, 1e-4)
    levels = [(-round(a, 9), -round(b, 9)) for a, b in zip(losses, own, strict=True)]
    top = np.array(sorted(ranking(losses)[::-1], key=levels.__getitem__)[:3])
    assert [row["id"] for row in facts["hardest"]] == top.tolist()
    assert [row["loss"] for row in facts["hardest"]] == losses[top].tolist()
    assert facts["quantiles"]["epsilon"][-1] == own.max()
    assert f"{losses.max():.2g}" in page.text and "digits" in page.text
    assert "nothing was unlearned" in page.text
    assert "per_example" not in facts  # only the hardest are listed
    assert "unlearning" not in facts and "Guarantee" not in page.text


def test_the_worst_case_is_named_by_its_method(tmp_path):
    """Numerical composition gives the smaller bound, and the page says it first."""
    ledger = make_ledger()
    page, facts = read(tmp_path / "r.html", ledger=ledger)
    composed = composed_worst_case(ledger.mechanism, 1e-5, steps=ledger.steps)
    assert facts["composed_worst_case"] == composed < facts["worst_case_epsilon"]
    assert page.text.count(rounded_up(composed)) >= 2  # in the card, and in the list
    assert rounded_up(facts["worst_case_epsilon"]) in page.text
    assert "the same bound, converted as the ε of the examples" in page.text
    assumed = score(ledger.with_noise_std(2.0)).facts(3)
    assert assumed["composed_worst_case"] == math.inf


def test_draws_limit_the_epsilons(tmp_path):
    ledger = make_ledger()
    assert "ε at most" not in read(tmp_path / "swept.html", ledger=ledger)[0].text
    mechanism = replace(ledger.mechanism, sample_rate=0.6, noise_std=3.0)
    drawn = np.random.default_rng(1).random((30, 60)) < 0.6
    norms = np.where(drawn, np.repeat(ledger.grad_norms, 10, axis=0), np.nan)
    steps = np.arange(30) + 1
    observed = GradNormLedger(mechanism, steps, norms, source="observed")
    page, facts = read(tmp_path / "r.html", ledger=observed, tolerance=0, top=5)
    limits = epsilon_limits(observed, 1e-5, tolerance=0)
    worst, own = facts["worst_case_epsilon"], epsilons(observed, 1e-5, tolerance=0)
    expected = np.minimum(limits, worst)
    for row in facts["hardest"]:
        assert row["limit"] == pytest.approx(expected[row["id"]], rel=1e-9)
    quantiles = facts["quantiles"]
    lowest = quantiles["limit"][0]
    assert lowest == pytest.approx(expected[own.argmin()]) and lowest < 0.9 * worst
    assert (np.array(quantiles["limit"]) >= quantiles["epsilon"]).all()
    assert page.text.count("ε at most") == 3 and rounded_up(lowest) in page.text
    assert "95 % confidence" in page.text
    assumed = score(observed.with_noise_std(2.0)).facts(3)
    assert assumed["quantiles"]["limit"] is None
    assert [row["limit"] for row in assumed["hardest"]] == [None] * 3


@pytest.mark.filterwarnings("ignore:A forget set contains only a part")
def test_the_hardest_are_those_of_top_k_where_losses_tie():
    ledger = make_ledger(num_examples=80)
    clipped = np.where(np.arange(80) < 50, 9.0, ledger.grad_norms)
    found = score(replace(ledger, grad_norms=clipped), order=8)
    assert found.num_at_bound >= 50
    ids = sorted(row["id"] for row in found.hardest(7))
    assert ids == top_k(found.losses, 7).tolist()
    assert ids != list(range(7)) and ids != list(range(73, 80))


def test_the_warning_comes_first(tmp_path):
    page, _ = read(tmp_path / "r.html", ledger=make_ledger())
    first = next(attributes for tag, attributes in page.tags if tag == "div")
    assert first["role"] == "note" and first["class"] == "warning"
    assert page.text.index("Do not share this page") < page.text.index("Training")


def test_unlearning_beside_retrained_models(tmp_path):
    page, facts = read(
        tmp_path / "r.html",
        ledger=make_ledger(),
        result=make_result(),
        oracle={"forget_loss": [0.5, 0.66]},
        barriers=Barriers([0.25, 0.125], [0.5], matched=True),
    )
    (line,) = facts["unlearning"]["metrics"]
    assert line["before"] == 0.1 and line["after"] == 0.6 and line["time"] == 2
    assert line["oracle_mean"] == pytest.approx(0.58)
    assert facts["unlearning"]["barriers"]["to_oracles"] == [0.25, 0.125]
    assert facts["unlearning"]["forget_set"]["size"] == 2
    assert "forget_indices" not in json.dumps(facts)
    assert "Not met or unknown: plain words" in page.text
    places = [page.text.index(f" {title} ") for title in ("In short", "Guarantee")]
    assert places == sorted(places) and places[1] < page.text.index(" Training ")
    assert "asked forget 2 examples" in page.text
    assert "not met or unknown plain words" in page.text
    assert "an estimate, not a bound" in page.text and " 0.12 " in page.text
    assert len(page.all("img")) == 3


def test_the_card_gives_no_limit_if_none_is_proved(tmp_path):
    unproved = replace(make_result().guarantee, orders=(), divergences=())
    page, _ = read(
        tmp_path / "r.html",
        ledger=make_ledger(),
        result=replace(make_result(), guarantee=unproved),
    )
    card = page.text[: page.text.index(" Guarantee ")]
    assert "empirical, no ε at δ = 1e-05" in card and "≤" not in card


def test_the_card_of_an_exact_rewind_says_that_epsilon_is_0(tmp_path):
    exact = EpsilonDelta(0.0, 0.0, "exact rewind", True)
    met = Assumption("plain words", True, "")
    guarantee = Guarantee("exact rewind", (met,), statements=(exact,))
    result = replace(make_result(), guarantee=guarantee)
    page, _ = read(tmp_path / "r.html", ledger=make_ledger(), result=result)
    card = page.text[: page.text.index(" Guarantee ")]
    assert ", ε = 0 at δ = 1e-05" in card and "≤" not in card


def test_never_reached_is_said(tmp_path):
    page, facts = read(
        tmp_path / "r.html",
        ledger=make_ledger(),
        result=make_result(),
        oracle={"forget_loss": 9.0},
    )
    assert facts["unlearning"]["metrics"][0]["time"] == "inf" and "never" in page.text


@pytest.mark.parametrize(
    ("num_steps", "state"),
    [(30, "after update 10"), (0, "none: the trained model was kept")],
)
def test_a_rewind_is_described_in_words(tmp_path, num_steps, state):
    result = make_result()
    record = {"forget_indices": [3, 17], "forgotten_before": [], "start": 10}
    record |= {"method": "exact rewind", "num_steps": num_steps, "requests": ["r-1"]}
    trace = UnlearningTrace([0, 15], {"forget_loss": [0.6, 0.1]})
    result = replace(result, record=record, trace=trace)
    path, oracle = tmp_path / "report.html", {"forget_loss": [0.12, 0.1]}
    write_report(path, ledger=make_ledger(), result=result, oracle=oracle)
    words = Page(path.read_text()).text
    assert f"went back to the state {state} updates made again {num_steps}" in words
    assert "requests r-1" in words and "retrained like retrained" in words
    assert "0.10 0.11 ± 0.014 yes" in words and "epochs until near" not in words


@pytest.mark.parametrize(
    ("after", "oracle", "like", "cell"),
    [
        (0.40, [0.8, 0.8, 0.54], True, "yes"),  # inside the spread of the others
        (-0.4, [0.8, 0.8, 0.54], False, "no"),
        (0.76, [0.8], True, "yes"),  # within the tolerance
        (0.40, [0.8, 0.6], None, "not judged"),  # two models: the spread is unknown
        (0.40, [0.8] * 5, None, "not judged"),
    ],
)
def test_a_run_is_judged_by_the_spread_of_retrained_models(
    tmp_path, after, oracle, like, cell
):
    trace = UnlearningTrace([0, 1], {"forget_loss": [1.9, after]})
    result = replace(make_result(), trace=trace)
    page, facts = read(
        tmp_path / "r.html",
        ledger=make_ledger(),
        result=result,
        oracle={"forget_loss": oracle},
    )
    (line,) = facts["unlearning"]["metrics"]
    assert line["is_like_retrained"] is like
    assert f" {cell} " in page.text
    near = abs(after - np.mean(oracle)) <= 0.05  # the paper's number is as it was
    assert line["time"] == (1 if near else "inf")


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (
            {"method": "exact rewind", "forgotten_before": [3, 5], "num_kept_exact": 0},
            "examples that are exactly forgotten all of them, 3",
        ),
        (
            {"method": "filtered rewind", "num_kept_exact": 1},
            "examples that are exactly forgotten 1, by earlier rewinds",
        ),
        ({"method": "filtered rewind", "num_kept_exact": 0}, None),
        ({"method": "FineTune()"}, None),
    ],
)
def test_a_page_says_how_many_examples_are_exactly_forgotten(tmp_path, facts, words):
    record = {"forget_indices": [3, 17], "forgotten_before": [], **facts}
    result = replace(make_result(), record=record)
    page, _ = read(tmp_path / "r.html", ledger=make_ledger(), result=result)
    assert words in page.text if words else "exactly forgotten" not in page.text


def test_a_ranking_has_no_epsilon(tmp_path):
    ledger = make_ledger().with_noise_std(2.0)
    page, facts = read(tmp_path / "r.html", ledger=ledger)
    assert facts["ranking_only"] is True and facts["quantiles"]["epsilon"] is None
    assert all(row["epsilon"] is None for row in facts["hardest"])
    assert "there is no ε" in page.text and len(page.all("img")) == 1


def hostile_page(path):
    result = make_result(HOSTILE, HOSTILE)
    return read(
        path,
        ledger=make_ledger(data_set=HOSTILE),
        result=replace(result, trace=replace(result.trace, unit=HOSTILE)),
        oracle={HOSTILE: [0.5]},
        title=HOSTILE,
    )[0]


def test_everything_from_a_file_is_escaped(tmp_path):
    page = hostile_page(tmp_path / "r.html")
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "iframe", "object", "link", "svg", "a", "form"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
    assert page.text.count('<script>alert("x")</script>') >= 6
    written = (tmp_path / "r.html").read_text() + (tmp_path / "r.json").read_text()
    assert not set(ACTING) - set("[2J") & set(written)
    assert json.loads((tmp_path / "r.json").read_text())["title"] == HOSTILE


def test_the_page_loads_nothing(tmp_path):
    page = hostile_page(tmp_path / "r.html")
    addresses = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in {"src", "href", "srcset", "data", "action", "poster"}
    ]
    assert addresses and all(a.startswith("data:image/svg+xml") for a in addresses)
    (style,) = re.findall(
        r"<style>(.*?)</style>", (tmp_path / "r.html").read_text(), re.DOTALL
    )
    assert "url(" not in style and "@import" not in style
    for address in addresses:
        picture = base64.b64decode(address.split(",", 1)[1]).decode()
        loaded = re.findall(r'(?:href|src)="([^"]*)"', picture)
        assert all(target.startswith("#") for target in loaded)
        assert "<script" not in picture and "<image" not in picture


def test_the_page_can_be_read_by_everybody(tmp_path):
    page, _ = read(tmp_path / "r.html", ledger=make_ledger(), result=make_result())
    assert page.all("html")[0]["lang"] == "en"
    names = [m.get("name") for m in page.all("meta")]
    assert "viewport" in names
    assert all(image["alt"] for image in page.all("img"))
    assert len(page.all("caption")) == len(page.all("table")) >= 4
    assert all(th["scope"] in {"row", "col"} for th in page.all("th"))
    regions = [d for d in page.all("div") if d.get("role") == "region"]
    assert all(d["aria-label"] and d["tabindex"] == "0" for d in regions)
    assert len(page.all("h1")) == 1


def test_files_are_for_the_owner_and_the_same_twice(tmp_path):
    for name in ("a.html", "b.html"):
        write_report(tmp_path / name, ledger=make_ledger())
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"oracle": {"forget_loss": 1.0}},
            "result must be given if oracle or barriers are given, got None",
        ),
        ({"top": -1}, "top must be at least 0, got -1"),
        ({"order": 1.0}, "order must be finite and above 1, got 1.0"),
        ({"delta": 0.0}, "delta must be in (0, 1), got 0.0"),
        ({"result": make_result(), "oracle": {"forget_loss": []}}, "oracle must"),
    ],
)
def test_errors_write_nothing(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        write_report(tmp_path / "r.html", ledger=make_ledger(), **options)
    assert not list(tmp_path.iterdir())


def test_the_page_is_not_the_json(tmp_path):
    with pytest.raises(ValueError, match=r"must not end in \.json"):
        write_report(tmp_path / "r.json", ledger=make_ledger())


def test_a_ledger_without_examples_is_refused():
    with pytest.raises(ValueError, match="num_examples"):
        score(make_ledger(0))


def test_a_schedule_is_shown_as_a_range(tmp_path):
    ledger = make_ledger()
    noise = np.array([1.0, 2.0, 3.0])
    ledger = replace(ledger, mechanism=replace(ledger.mechanism, noise_std=noise))
    page, _ = read(tmp_path / "r.html", ledger=ledger)
    assert "1 to 3, by a schedule" in page.text


def test_strict_json():
    facts = {"a": np.float64("nan"), "b": [np.int64(2), -np.inf], "c": (True, None)}
    text = '{"a": "nan", "b": [2, "-inf"], "c": [true, null]}'
    assert json_text(facts, indent=None) == text


def test_distribution_counts_every_finite_value():
    values = [*np.geomspace(0.1, 1000, 50), np.inf]
    ax = plot_distribution(values, name="loss", marks={"here": 3.0, "no": np.inf})
    assert sum(bar.get_height() for bar in ax.patches) == 50
    assert ax.get_xscale() == "log" and "1 infinite" in ax.get_xlabel()
    assert [line.get_label() for line in ax.lines] == ["here"]
    same = plot_distribution([2.0, 2.0], name="loss")
    assert sum(bar.get_height() for bar in same.patches) == 2
    assert same.get_xscale() == "linear"
    with pytest.raises(ValueError, match="must contain a finite number"):
        plot_distribution([np.inf], name="loss")


@pytest.mark.parametrize("largest", [21.0, 400.0, 5e3, 1e5])
def test_names_on_a_logarithmic_axis_do_not_run_together(largest):
    ax = plot_distribution(np.geomspace(1.0, largest, 50), name="loss")
    ax.figure.canvas.draw()
    low, high = ax.get_xlim()
    every = [*ax.xaxis.get_major_ticks(), *ax.xaxis.get_minor_ticks()]
    named = [t.label1 for t in every if low <= t.get_loc() <= high]
    boxes = [label.get_window_extent() for label in named if label.get_text()]
    boxes.sort(key=lambda box: box.x0)
    assert 2 <= len(boxes) <= 11
    assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:], strict=False))


def test_ties_are_on_the_page(tmp_path):
    ledger = make_ledger()
    norms = np.minimum(ledger.grad_norms, 0.3)
    page, facts = read(tmp_path / "r.html", ledger=replace(ledger, grad_norms=norms))
    tied = np.count_nonzero((norms == norms.max()).all(0))
    assert facts["num_at_top"] == tied > 1 and facts["num_at_bound"] == 0
    assert f"{tied} examples share the largest loss: the loss cannot" in page.text
    hardest = [row["id"] for row in facts["hardest"] if row["loss"] == tied_loss(facts)]
    assert ", ".join(map(str, hardest)) in page.text and len(hardest) > 1


def tied_loss(facts):
    return max(row["loss"] for row in facts["hardest"])


def test_a_worst_case_far_away_leaves_the_histogram_visible():
    values = np.linspace(1.0, 2.0, 50)
    ax = plot_distribution(values, name="loss", marks={"worst case": 90.0, "mean": 2.5})
    ax.figure.canvas.draw()
    assert ax.get_xlim()[1] < 5 and len(ax.lines) == 2
    legend = ax.get_legend()
    words = [text.get_text() for text in legend.get_texts()]
    assert words == ["worst case: 90, further right", "mean"]
    assert legend.get_window_extent().y0 >= ax.get_window_extent().y1 - 1


@pytest.mark.parametrize("has_weights", [False, True])
def test_a_result_belongs_to_the_ledger_of_its_training(tmp_path, has_weights):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(60, 3), torch.arange(60) % 2)
    model = torch.nn.Linear(3, 2)
    own = make_ledger(weights=weights_name(model) if has_weights else None)
    worker = Unlearner(model, criterion=torch.nn.CrossEntropyLoss(), ledger=own)
    results = [worker.unlearn(data, [i], num_epochs=1) for i in (3, 17)]
    other = replace(own, grad_norms=own.grad_norms * 1.5)
    foreign = replace(other, weights=f"sha256:{0:064}") if has_weights else other
    for result in results:
        for good in (own, own.with_noise_std(2.0), [foreign, own]):
            facts = write_report(tmp_path / "r.html", ledger=good, result=result)
            assert facts["unlearning"]["not_checked"] == []
        (tmp_path / "r.html").unlink()
        for bad in (foreign, [foreign, foreign]):
            with pytest.raises(ValueError, match="ledger must be of the training from"):
                write_report(tmp_path / "r.html", ledger=bad, result=result)
        assert not (tmp_path / "r.html").exists()
    if has_weights:  # another ledger of the same training
        write_report(tmp_path / "r.html", ledger=other, result=results[0])


def test_a_result_without_a_ledger_is_known_by_its_weights(tmp_path):
    data = TensorDataset(torch.randn(60, 3), torch.arange(60) % 2)
    worker = Unlearner(torch.nn.Linear(3, 2), criterion=torch.nn.CrossEntropyLoss())
    result = worker.unlearn(data, [3], num_epochs=1)
    facts = write_report(tmp_path / "r.html", ledger=make_ledger(), result=result)
    (sentence,) = facts["unlearning"]["not_checked"]
    assert "the ledger does not name the weights that its training left" in sentence
    foreign = make_ledger(weights=f"sha256:{0:064}")
    with pytest.raises(ValueError, match="which left weights with the hash sha256:"):
        write_report(tmp_path / "r.html", ledger=foreign, result=result)


def test_many_examples_are_rounded_up_and_the_page_says_so(tmp_path):
    norms = np.random.default_rng(0).lognormal(-1, 1, (1, 16_500))
    mechanism = NoisySGD(10, sample_rate=0.1, noise_std=2.0, max_grad_norm=1.0)
    ledger = GradNormLedger(mechanism, steps=[10], grad_norms=norms)
    write_report(tmp_path / "many.html", ledger=ledger, order=4)
    page = Page((tmp_path / "many.html").read_text())
    assert "rounded up, by at most 0.1 % of their value" in page.text
    scores = score(ledger, order=4)
    few = np.arange(0, 16_500, 500)
    exact = privacy_losses(ledger.subset(few), 4), epsilons(ledger.subset(few), 1e-5)
    for found, true in zip((scores.losses, scores.epsilons), exact, strict=True):
        assert (found[few] >= true * (1 - 1e-9)).all()
        assert (found[few] <= true * 1.001).all()
    write_report(tmp_path / "exact.html", ledger=ledger.subset(few))
    assert "rounded up" not in Page((tmp_path / "exact.html").read_text()).text
