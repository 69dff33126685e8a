"""Whether two fingerprints are of one data set, and how much of it they compare.

A fingerprint has parts: class, length and labels, then hashes of what the data set
holds. Two fingerprints are compared in the parts that both have, because those of
earlier releases have fewer. What was not compared is said, and a guarantee that needs
it lists it as a declaration.

>>> old, new = "Faces:600:8cc4e2b29a3c0356", "Faces:600:8cc4e2b29a3c0356:p" + "0" * 16
>>> same_data_set(old, new)
True
>>> compared(old, new)
Compared(covers_examples=False, evidence='only class, length and labels were compared')
"""

import re
from dataclasses import dataclass

__all__ = [
    "Compared",
    "base_of",
    "compared",
    "difference",
    "name_without_erased",
    "num_erased",
    "same_data_set",
    "same_transforms",
    "unlike_what_remains",
    "without_hashes",
    "without_transforms",
]

_PART = re.compile(r":([a-z])([0-9a-f]{16})$")
_LABELS = re.compile(r":\d+:[0-9a-f]{16}$")
_FIELDS = re.compile(r"(.+?):(\d+)(?::([0-9a-f]{16}))?", re.DOTALL)
_BASE = "class, length and labels"
_BASE_WITHOUT_LABELS = "class and length"
_NO_LABELS = " (no labels were found)"
_TRANSFORMS = "t"
_ERASED = "z"  # not a hash: the number of examples that may have been erased
_PARTS = {
    "x": "the inputs of evenly spaced examples",
    "e": "hashes of numbers in the inputs of every example",
    "s": "hashes of numbers in the inputs of evenly spaced examples",
    "o": "the orders that the data set holds",
    "y": "single numbers of each example, such as labels",
    "p": "the names of files or texts of all examples",
    "f": "the sizes and ends of the files of all examples",
    "w": "the content of the files of all examples",
    "v": "drawn blocks of the files of all examples",
    "g": "the sizes and ends of evenly spaced files",
}
_CONTENT = {*_PARTS} - {"o", "y"}  # these tell something about the inputs
_INPUTS = {"x", "e", "s"}
_PREPROCESSED = " (was a value or the preprocessing changed, such as a tokenizer?)"
_WHOLE = {"e", "w"}  # these depend on every example and its position
# A data set may count or note something in these while it is used, so a difference is
# no reason to refuse. But positions may then name other examples.
_NUMBERS, _SETTINGS, _SOME_SETTINGS = "n", "a", "b"
_NOTED = {
    _NUMBERS: "single numbers of each example beside the labels",
    _SETTINGS: "settings of the data set",
}

# One changed example changes the hash of its part, so a difference says no more.
_DIFFERENCES = {
    "x": "at least one input of the evenly spaced ones that were compared",
    "e": "at least one input",
    "s": "a number of at least one of the inputs that were compared",
    "y": "at least one number of an example, such as a label",
    "p": "at least one file name or text",
    "f": "the size, start or end of at least one file",
    "w": "the content of at least one file",
    "v": "a part of at least one file",
    "g": "the size, start or end of at least one of the files that were compared",
}


@dataclass(frozen=True)
class Compared:
    """What the comparison of two fingerprints of one data set covered.

    Args:
        covers_examples: Whether content of every example was compared at its position.
        evidence: What was compared, as a sentence without a full stop.
    """

    covers_examples: bool
    evidence: str


def same_data_set(one: str, other: str) -> bool:
    """Return whether two fingerprints agree in the parts that both of them have.

    Transforms do not count: they do not change which example a position names.

    Args:
        one: A fingerprint. Those of earlier releases have fewer parts.
        other: Another, or any name that a user gave.
    """
    return not difference(one, other)


def difference(one: str, other: str) -> str:
    """Return in what two fingerprints differ, in words; empty if they do not.

    Args:
        one: A fingerprint.
        other: Another, or any name that a user gave.
    """
    (base, parts), (other_base, others) = _parts(one), _parts(other)
    found = [] if base == other_base else [_difference_of_bases(base, other_base)]
    unlike = {x for x in _PARTS if x in parts and x in others and parts[x] != others[x]}
    if "e" in unlike:  # it says what the parts of some inputs would say again
        unlike -= {"x", "s"}
    found += [_DIFFERENCES.get(x, _PARTS[x]) for x in _PARTS if x in unlike]
    only_inputs = bool(found) and {*found} <= {_DIFFERENCES[x] for x in _INPUTS}
    return "; ".join(found) + _PREPROCESSED * only_inputs


def _difference_of_bases(one: str, other: str) -> str:
    """Return which of class, length and labels differ, in words.

    >>> _difference_of_bases("Faces:600:8cc4e2b29a3c0356", "Faces:599")
    'length and labels'

    Args:
        one: Class, length and maybe a hash of labels.
        other: Others, or a name that a user gave.
    """
    ours, theirs = _FIELDS.fullmatch(one), _FIELDS.fullmatch(other)
    if ours is None or theirs is None:
        return "name"
    names = ("class", "length", "labels")
    fields = zip(names, ours.groups(), theirs.groups(), strict=True)
    *first, last = [name for name, mine, yours in fields if mine != yours]
    return f"{', '.join(first)} and {last}" if first else last


def compared(one: str, other: str) -> Compared:
    """Return what was compared of two fingerprints that agree.

    Args:
        one: A fingerprint.
        other: One that agrees with it.
    """
    (base, parts), (_, others) = _parts(one), _parts(other)
    common = parts.keys() & others.keys()
    shown = _BASE if _LABELS.search(base) else _BASE_WITHOUT_LABELS
    if shown != _BASE and "y" not in common:  # numbers of each example may be labels
        shown += _NO_LABELS
    found = [shown, *(words for name, words in _PARTS.items() if name in common)]
    listed, doubts = "; ".join(found), _doubts(parts, others)
    if _ERASED in {*parts, *others}:
        listed += "; all of the remaining examples, by means of the deletion log"
    if common & _WHOLE and not doubts:
        return Compared(True, f"equal: {listed}")
    return Compared(False, "; ".join([f"only {listed} were compared", *doubts]))


def _doubts(parts: dict[str, str], others: dict[str, str]) -> list[str]:
    """Return why positions may name other examples, although all that counts is equal.

    Args:
        parts: The parts of a fingerprint by letter.
        others: Those of another one, which agrees with it.
    """
    found = []
    if _SOME_SETTINGS in {*parts, *others}:
        found.append("some attributes of the data set, such as generators, were not")
    parts, others = (
        {_SETTINGS if name == _SOME_SETTINGS else name: one for name, one in p.items()}
        for p in (parts, others)
    )
    for name in ("o", "y", _NUMBERS, _SETTINGS):
        words = _NOTED.get(name) or _PARTS[name]
        if (name in parts) != (name in others):
            found.append(f"{words} were not")
        elif parts.get(name) != others.get(name):
            found.append(f"{words} differ")
    return found


def same_transforms(one: str, other: str) -> bool | None:
    """Return whether the transforms describe themselves alike; None if it is unknown.

    Args:
        one: A fingerprint.
        other: Another.
    """
    ours, theirs = _parts(one)[1], _parts(other)[1]
    if _TRANSFORMS not in ours or _TRANSFORMS not in theirs:
        return None
    return ours[_TRANSFORMS] == theirs[_TRANSFORMS]


def without_transforms(name: str) -> str:
    """Return a fingerprint without the part for transforms.

    Args:
        name: A fingerprint.
    """
    base, parts = _parts(name)
    kept = [(key, part) for key, part in parts.items() if key != _TRANSFORMS]
    return base + "".join(f":{key}{part}" for key, part in reversed(kept))


def base_of(name: str) -> str:
    """Return class, length and labels of a fingerprint.

    Args:
        name: A fingerprint.
    """
    return _parts(name)[0]


def without_hashes(name: str) -> str:
    """Return class and length of a fingerprint, which tell nothing of an example.

    Whoever holds all examples but one can guess that one, and try it by the hashes.

    >>> without_hashes("Faces:600:8cc4e2b29a3c0356:p0000000000000000")
    'Faces:600'

    Args:
        name: A fingerprint, or a name that a user gave, which is returned as it is.
    """
    found = _FIELDS.fullmatch(base_of(name))
    return name if found is None else f"{found[1]}:{found[2]}"


def num_erased(name: str) -> int:
    """Return how many examples may have been erased from a data set since training.

    Args:
        name: A fingerprint.
    """
    return int(_parts(name)[1].get(_ERASED, "0"), 16)


def unlike_what_remains(stored: str, at_hand: str) -> str:
    """Return in what a data set differs from what must remain; empty if it does not.

    A part that the data set at hand does not have is a difference, too: otherwise a
    data set of which nothing can be read would pass.

    Args:
        stored: ``fingerprint_of_some`` of the examples that must remain.
        at_hand: The same of the data set at hand.
    """
    found = [words] if (words := difference(stored, at_hand)) else []
    parts, others = _parts(stored)[1], _parts(at_hand)[1]
    found += [
        f"{words} (which could not be read)"
        for letter, words in _PARTS.items()
        if letter in parts and letter not in others
    ]
    if not found and not parts.keys() & _CONTENT:
        return "parts that cannot be compared without loading examples"
    return "; ".join(found)


def name_without_erased(whole: str, stored: str, at_hand: str, number: int) -> str:
    """Return the name of a data set whose erased examples are no longer there.

    It is that of the whole data set in the parts that were compared for the remaining
    examples. Another part is left out, so that it counts as not compared.

    Args:
        whole: Fingerprint of the data set when nothing was erased.
        stored: ``fingerprint_of_some`` of the examples that must remain.
        at_hand: The same of the data set at hand, which agrees.
        number: How many examples were erased.
    """
    base, parts = _parts(whole)
    ours, theirs = _parts(stored)[1], _parts(at_hand)[1]
    kept = {
        letter: part if ours[letter] == theirs[letter] else theirs[letter]
        for letter, part in reversed(parts.items())
        if letter in ours and letter in theirs
    }
    kept[_ERASED] = f"{number:016x}"
    return base + "".join(f":{letter}{part}" for letter, part in kept.items())


def _parts(name: str) -> tuple[str, dict[str, str]]:
    """Return class, length and labels as they are, and the other parts by letter."""
    parts: dict[str, str] = {}
    while (found := _PART.search(name)) is not None:
        parts[found[1]] = found[2]
        name = name[: found.start()]
    return name, parts
