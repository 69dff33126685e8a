"""Parts of the page of results that are made of verdicts: summary, tables, sections."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from benchmarks.common.report import markdown
from benchmarks.reproduce.figures import FIGURES, Figure
from benchmarks.reproduce.judging.effects import Effect
from benchmarks.reproduce.judging.order import FARTHER, SLOWER
from benchmarks.reproduce.judging.scenario import KINDS
from benchmarks.reproduce.judging.verdicts import (
    BORNE_OUT,
    NOT_BORNE_OUT,
    Verdict,
    sentences,
)

Named = list[tuple[str, Verdict]]
_SAID = {
    FARTHER: "That forget sets of higher privacy loss start *farther* from models "
    "retrained without them is",
    SLOWER: "That they are also unlearned more *slowly* is",
}


def summary(verdicts: dict[str, Verdict]) -> str:
    """Return what the figures found, in plain words.

    Args:
        verdicts: The verdict on each figure.
    """
    kinds = [one.verdict for one in verdicts.values()]
    counts = _listed(f"{number} *{kind}*" for kind, number in _counts(kinds).items())
    parts = [f"Verdicts on {len(kinds)} claims: {counts}."]
    parts += filter(None, (_order_of(verdicts, claim) for claim in (FARTHER, SLOWER)))
    for kind in (BORNE_OUT, NOT_BORNE_OUT):
        claims = _listed(
            f"*{FIGURES[name].claim.rstrip('.')}* ({linked(name)})"
            for name, one in verdicts.items()
            if one.verdict == kind
        )
        parts.append(f"Claims {kind} as a whole: {claims or 'none'}.")
    return " ".join(parts)


def _order_of(verdicts: dict[str, Verdict], claim: str) -> str:
    """Return a sentence on *farther* or *slower* in all figures that judge it."""
    figures, found = defaultdict(list), []
    for name, verdict in verdicts.items():
        for path, one in verdict.walk():
            if path.split(", ")[-1] == claim and one.parts:
                figures[one.verdict].append(linked(name))
                found += [leaf.effect for leaf in one.judged if leaf.effect]
    if not figures:
        return ""
    where = "; ".join(
        f"{kind} in {_listed(dict.fromkeys(names))}" for kind, names in figures.items()
    )
    said = f"{_SAID[claim]} {where}. {_range_of([one.estimate for one in found])}"
    if (different := len(set(found))) < len(found):
        said += (
            f" Only {different} of these {len(found)} are different; the others repeat "
            "numbers of the same sets and trainings."
        )
    if claim == SLOWER:
        said += (
            " They depend on the assumed movement of forgotten images: see *Slower in "
            "detail* [below](#how-to-read-this-page)."
        )
    return said.strip()


def _range_of(values: list[float]) -> str:
    """Return the range of correlations with difficulty, in a sentence."""
    if not values:
        return ""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    middle = f"are {low}" if low == high else f"lie between {low} and {high}"
    against = "; all are negative, the opposite of the claim" if max(values) < 0 else ""
    return f"The correlations in the tables {middle}{against}."


def _counts(kinds: list[str]) -> dict[str, int]:
    """Return how often each verdict was given, in a fixed order; others come last."""
    order = dict.fromkeys([*KINDS, *sorted(kinds)])
    return {kind: kinds.count(kind) for kind in order if kind in kinds}


def _listed(words: Iterable[str]) -> str:
    """Return words separated by commas, the last one by "and"."""
    *some, last = [*words] or [""]
    return f"{', '.join(some)} and {last}" if some else last


def linked(name: str) -> str:
    """Return the name of a figure as a link to its section."""
    return f"[{name}](#{name})"


def table_of_claims(verdicts: dict[str, Verdict]) -> str:
    """Return a table: claim, verdict and main effects of each figure."""
    rows = [["figure", "claim", "verdict", "main effect, 95 % interval"]]
    rows += [
        [
            linked(name),
            FIGURES[name].claim,
            _cell(one),
            "; ".join(_main_effects(one)) or "–",
        ]
        for name, one in verdicts.items()
    ]
    return markdown(rows)


def _cell(verdict: Verdict) -> str:
    """Return the verdict on a figure and those of its parts that differ from it."""
    others = [
        f"{name}: {one.verdict}"
        for name, one in verdict.parts.items()
        if one.verdict not in ("", verdict.verdict)
    ]
    return "; ".join([f"**{verdict.verdict}**", *others])


def _main_effects(verdict: Verdict) -> list[str]:
    """Return the effect of each kind that is the least favourable to the claim."""
    return [
        f"{name}: {min((one.effect for _, one in rows), key=_favour).value()}"
        for name, rows in _by_effect(verdict).items()
    ]


def _favour(effect: Effect) -> float:
    """Return how much an effect favours the claim; a limit does if it is small."""
    return -effect.high if effect.low is None else effect.estimate


def _by_effect(verdict: Verdict) -> dict[str, Named]:
    """Return the parts that were measured, by what was measured."""
    found = defaultdict(list)
    for path, one in verdict.walk():
        if one.effect:
            found[one.effect.name].append((path, one))
    return found


def section(figure: Figure, verdict: Verdict, table: Path) -> str:
    """Return the section of a figure: claim, note, verdict, tables, picture.

    Args:
        figure: The figure.
        verdict: The verdict on it.
        table: The file of the figure's own table, if there is one.
    """
    parts = [head(figure, verdict)]
    parts += [_table(name, rows) for name, rows in _by_effect(verdict).items()]
    parts += [_untested(verdict), _remarks(verdict)]
    parts.append(f"![{figure.name}](results/{figure.name}.png)")
    if table.exists():
        parts.append(table.read_text(encoding="utf-8").rstrip())
    return "\n\n".join(filter(None, parts)) + "\n"


def section_of_earlier(figure: Figure, verdict: Verdict, description: str) -> str:
    """Return the section of a figure that was run with the earlier design only."""
    shown = f"**The earlier run.** {description}"
    return f"{head(figure, verdict)}\n\n{shown}\n"


def head(figure: Figure, verdict: Verdict) -> str:
    """Return the head of a section: claim, note, verdict, how many parts have which."""
    kinds = [one.verdict for one in verdict.judged]
    counts = ""
    if len(kinds) > 1:
        numbers = _listed(
            f"{n} {'is' if n == 1 else 'are'} {kind}"
            for kind, n in _counts(kinds).items()
        )
        counts = f"of {len(kinds)} parts, {numbers}"
        if len(set(kinds)) == 1:
            counts = f"all {len(kinds)} parts are {kinds[0]}"
    said = sentences(_claims(verdict), counts, verdict.reason)
    claim = f"**Claim.** {figure.claim}\n\n"
    note = f"**Measured.** {figure.note}\n\n" if figure.note else ""
    return (
        f"### {figure.name}\n\n{claim}{note}"
        f"**Verdict: {verdict.verdict}.** {said}".rstrip()
    )


def _claims(verdict: Verdict) -> str:
    """Return the verdicts on two or three claims that have parts of their own."""
    found = {name: one for name, one in verdict.parts.items() if one.verdict}
    if not 1 < len(found) < 4 or not any(one.parts for one in found.values()):
        return ""
    return _listed(f"*{name}* is {one.verdict}" for name, one in found.items())


def _table(name: str, rows: Named) -> str:
    """Return a table of the parts of which one kind of effect was measured."""
    common, labels = _labels([path for path, _ in rows])
    lines = [["part", "verdict", "effect, 95 % interval", "one-sided p", "number"]]
    for label, (_, one) in zip(labels, rows, strict=True):
        effect = one.effect
        assert effect is not None
        cells = effect.value(), effect.p_value() or "–", effect.counted()
        lines.append([label, one.verdict, *cells])
    what = f"**{name[0].upper()}{name[1:]}**{f' ({common})' if common else ''}"
    return f"{what}\n\n{markdown(lines)}"


def _labels(paths: list[str]) -> tuple[str, list[str]]:
    """Return the words that several names share, and each name without them."""
    split = [path.split(", ") for path in paths]
    common = [word for word in split[0] if all(word in words for words in split)]
    if len(paths) == 1 or any(len(words) == len(common) for words in split):
        return "", [path or "whole claim" for path in paths]
    rest = (", ".join(w for w in words if w not in common) for words in split)
    return ", ".join(common), list(rest)


def _untested(verdict: Verdict) -> str:
    """Return a table of the parts that have no effect, with the reason."""
    reasons = defaultdict(list)
    for path, one in verdict.walk():
        if path and one.verdict and not one.effect and one.judged == [one]:
            reasons[one.text].append(path)
    if not reasons:
        return ""
    rows = [["; ".join(paths), sentences(text)] for text, paths in reasons.items()]
    return markdown([["part that is not testable yet", "why"], *rows])


def _remarks(verdict: Verdict) -> str:
    """Return further sentences on the parts, each with the parts that it is about."""
    about = defaultdict(list)
    for path, one in verdict.walk():
        said = one.remarks if one.effect else ()
        if path and (not one.verdict or one.judged != [one]):
            said = (*said, *filter(None, (one.reason,)))
        for text in said:
            about[text].append(path)
    said_of = defaultdict(list)
    for text, paths in about.items():
        said_of["; ".join(filter(None, paths))].append(text)
    return "\n".join(
        f"- {f'**{names}**: ' if names else ''}{sentences(*texts)}"
        for names, texts in said_of.items()
    )
