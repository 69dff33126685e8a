"""Damage to files: of their bytes, and of what they say, behind a right checksum."""

import copy
import hashlib
import json
import math
import sqlite3
import struct
import tempfile
from pathlib import Path

from opacus_pi.unlearning.entry_hashes import commitment_of, entry_hash

NUMPY = {
    "BOOL": ("|b1", 1),
    "U8": ("|u1", 1),
    "I8": ("|i1", 1),
    "I16": ("<i2", 2),
    "U16": ("<u2", 2),
    "F16": ("<f2", 2),
    "BF16": ("<bf2", 2),
    "I32": ("<i4", 4),
    "U32": ("<u4", 4),
    "F32": ("<f4", 4),
    "F64": ("<f8", 8),
    "I64": ("<i8", 8),
    "U64": ("<u8", 8),
}
TORCH = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
NUMBERS = [math.nan, math.inf, -math.inf, -1.0, 0.0, 5e-324, 1e-300, 1e300, 2.0, 1e9]
SIZES = [0, 1, 2, 3, 7, 2**16, 2**31, 2**32 + 1, 2**53, 2**63 - 1, 2**64 - 1]
TEXTS = ["", "0", "-1", "1e3", "9" * 30, "nan", " 1", "１", "\0", "fixed", "x" * 999]
JSONS = [
    *(None, True, False, 0, 1, -1, 2, 10**40, 1.0, 1e308, "", "a", "done", "request"),
    *([], {}, [1, 2], [2, 1], [1, 1], [-1], [10**30], [True], [1.5], ["a"], [[0]]),
    {"id": "a", "indices": [1]},
]


# ------------------------------------------------------------------ any bytes


def damaged(content, chance):
    """Bytes with something wrong in them."""
    content = bytearray(content)
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        place = chance.randrange(len(content) or 1)
        length = chance.choice([1, 2, 8, 40])
        kind = chance.choice(("flip", "byte", "cut", "drop", "add", "again", "zero"))
        if not content or kind == "add":
            content[place:place] = chance.randbytes(length)
        elif kind == "flip":
            content[place] ^= 1 << chance.randrange(8)
        elif kind == "byte":
            content[place] = chance.randrange(256)
        elif kind == "cut":
            del content[place:]
        elif kind == "drop":
            del content[place : place + length]
        elif kind == "again":
            content[place:place] = content[place : place + length]
        else:
            content[place : place + length] = bytes(length)
    return bytes(content)


def other_length(content, chance):
    """A safetensors file that says another length of its header."""
    length = struct.unpack("<Q", content[:8])[0]
    said = chance.choice([*SIZES, length - 1, length + 1, len(content) - 8])
    return struct.pack("<Q", said % 2**64) + content[8:]


# ------------------------------------------------------------------ safetensors


class Tensors:
    """A safetensors file, taken apart."""

    def __init__(self, content, types):
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        self.facts = header.pop("__metadata__")
        self.types = types
        body = content[8 + length :]
        self.arrays = {
            name: [a["dtype"], list(a["shape"]), body[slice(*a["data_offsets"])]]
            for name, a in header.items()
        }

    def seal(self):
        """Make the checksum right for what the file says now."""
        self.facts.pop("checksum", None)
        digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode())
        for name in sorted(self.arrays):
            dtype, shape, content = self.arrays[name]
            text = self.types[dtype]
            digest.update(f"\0{name}\0{text}\0{tuple(shape)}\0".encode())
            digest.update(content)
        self.facts["checksum"] = digest.hexdigest()

    def content(self):
        """The file again."""
        header, start = {"__metadata__": self.facts}, 0
        for name, (dtype, shape, content) in self.arrays.items():
            offsets = [start, start + len(content)]
            start = offsets[1]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        text = json.dumps(header).encode()
        body = b"".join(content for _, _, content in self.arrays.values())
        return struct.pack("<Q", len(text)) + text + body


def edited(content, types, chance, *, seal):
    """A safetensors file that says something else."""
    file = Tensors(content, types)
    for _ in range(chance.choice([1, 1, 2, 4])):
        chance.choice(_EDITS)(file, chance)
    if seal:
        file.seal()
    return file.content()


def _name(file, chance):
    return chance.choice([*file.arrays] or [""])


def _edit_bits(file, chance):
    array = file.arrays.get(_name(file, chance), [0, 0, b""])
    if array[2]:
        raw = bytearray(array[2])
        raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        array[2] = bytes(raw)


def _edit_number(file, chance):
    array = file.arrays.get(_name(file, chance), ["", 0, b""])
    form = {"F32": "<f", "F64": "<d", "I64": "<q"}.get(array[0])
    size = struct.calcsize(form or "<d")
    if form is None or len(array[2]) < size:
        return
    value = chance.choice(NUMBERS)
    if form == "<q":
        value = chance.choice([-1, 0, 1, 2, 10**6, 2**63 - 1, -(2**63)])
    elif form == "<f" and abs(value) > 3e38:
        value = math.inf
    place = chance.randrange(len(array[2]) // size) * size
    array[2] = array[2][:place] + struct.pack(form, value) + array[2][place + size :]


def _edit_type(file, chance):
    array = file.arrays.get(_name(file, chance))
    if array:
        old, array[0] = array[0], chance.choice([*NUMPY])
        ratio = NUMPY[old][1] / NUMPY[array[0]][1]
        if array[1]:
            array[1][-1] = int(array[1][-1] * ratio)


def _edit_shape(file, chance):
    array = file.arrays.get(_name(file, chance))
    if not array:
        return
    kind = chance.choice(("flat", "turned", "one more", "some", "empty"))
    if kind == "flat":
        array[1] = [math.prod(array[1])]
    elif kind == "turned":
        array[1] = array[1][::-1]
    elif kind == "one more":
        array[1] = chance.choice([[1, *array[1]], [*array[1], 1]])
    elif kind == "some":
        array[1] = [chance.choice(SIZES) for _ in range(chance.randrange(4))]
    else:
        sizes = [0, *(chance.choice(SIZES) for _ in array[1][1:])]
        chance.shuffle(sizes)
        array[1], array[2] = sizes, b""


def _edit_length(file, chance):
    array = file.arrays.get(_name(file, chance))
    if array and array[1] and array[1][0]:
        row = len(array[2]) // array[1][0]
        if chance.random() < 0.5:
            array[1][0] -= 1
            array[2] = array[2][: len(array[2]) - row]
        else:
            array[1][0] += 1
            array[2] += array[2][:row]


def _edit_names(file, chance):
    name, other = _name(file, chance), chance.choice([*file.arrays, "unknown", ""])
    array = file.arrays.pop(name, None)
    kind = chance.choice(("gone", "renamed", "copied"))
    if array and kind == "copied":
        file.arrays[name] = array
    if array and kind != "gone":
        file.arrays[other] = copy.deepcopy(array)


def _edit_facts(file, chance):
    name = chance.choice([*file.facts, "unknown", "noise", "weights", "norms"])
    if chance.random() < 0.3:
        file.facts.pop(name, None)
    else:
        file.facts[name] = chance.choice([*TEXTS, *file.facts.values(), "assumed"])


_EDITS = (
    _edit_bits,
    _edit_number,
    _edit_number,
    _edit_type,
    _edit_shape,
    _edit_length,
    _edit_names,
    _edit_facts,
)


# ------------------------------------------------------------------ JSON


def other_json(value, chance):
    """A JSON value with something else somewhere in it."""
    value = copy.copy(value)  # what is changed below is copied there
    if isinstance(value, dict) and value and chance.random() < 0.8:
        name = chance.choice([*value])
        kind = chance.choice(("other", "other", "other", "gone", "new"))
        if kind == "gone":
            del value[name]
        else:
            name = name if kind == "other" else chance.choice(["new", "id", "ids"])
            value[name] = other_json(value.get(name), chance)
        return value
    if isinstance(value, list) and value and chance.random() < 0.7:
        place = chance.randrange(len(value))
        value[place] = other_json(value[place], chance)
        return value
    if chance.random() < 0.02:
        return [[]] if chance.random() < 0.5 else _deep(chance.choice([50, 3000]))
    return copy.deepcopy(chance.choice(JSONS))


def _deep(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def written(value):
    """JSON as an old deletion log has it, however deep."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def changed(entries, chance):
    """A list of entries that says something else."""
    for _ in range(chance.choice([1, 1, 2])):
        place = chance.randrange(len(entries) or 1)
        kind = chance.choice(("edit", "edit", "edit", "again", "gone", "swap"))
        if not entries:
            break
        if kind == "edit":
            entries[place] = other_json(entries[place], chance)
        elif kind == "again":
            entries.insert(chance.randrange(len(entries) + 1), entries[place])
        elif kind == "gone":
            del entries[place]
        else:
            chance.shuffle(entries)
    return entries


def other_chain(content, chance, *, seal):
    """An old deletion log whose lines say something else, in an unbroken chain."""
    entries = changed([json.loads(line) for line in content.splitlines()], chance)
    return _chained(entries, chance.random() < 0.9) if seal else _lines(entries)


def _lines(entries):
    texts = []
    for entry in entries:
        try:
            texts.append(written(entry).encode())
        except RecursionError:
            texts.append(b"[" * 3000 + b"]" * 3000)
    return b"".join(text + b"\n" for text in texts)


def _chained(entries, renumber):
    previous, lines = "0" * 64, []
    for number, entry in enumerate(entries):
        if isinstance(entry, dict):
            entry = {**entry, "previous": previous}
            entry |= {"number": number} if renumber else {}
            content = {k: v for k, v in entry.items() if k != "hash"}
            try:
                previous = hashlib.sha256(written(content).encode()).hexdigest()
            except RecursionError:
                pass
            entry["hash"] = previous
        lines.append(entry)
    return _lines(lines)


# ------------------------------------------------------------------ SQLite

COLUMNS = ("number", "time", "kind", "name", "salt", "body")


def edited_log(content, *statements):
    """A deletion log after some statements; one may come with its values."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "log")
        path.write_bytes(content)
        connection = sqlite3.connect(path)
        for statement in statements:
            connection.execute(*([statement] if type(statement) is str else statement))
        connection.commit()
        connection.close()
        return path.read_bytes()


def rows_of_log(content):
    """What the entries of a deletion log say, oldest first."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "log")
        path.write_bytes(content)
        connection = sqlite3.connect(path)
        rows = connection.execute(
            f"SELECT {', '.join(COLUMNS)} FROM entries NATURAL JOIN payloads "
            "ORDER BY number"
        ).fetchall()
        connection.close()
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows]


def other_log(content, chance, *, seal):
    """A deletion log that says something else, in an unbroken chain where sealed."""
    if not seal:
        table, names = chance.choice(
            [("entries", ("number", "time", "kind", "commitment", "previous", "hash"))]
            + [("payloads", ("number", "name", "salt", "body"))]
        )
        value = _stored(chance.choice([*TEXTS, *SIZES, *NUMBERS, None, b"", b"x"]))
        place = chance.randrange(5)
        name = chance.choice(names)
        if name == "number" and type(value) is not int:
            value = 7
        statement = f"UPDATE OR IGNORE {table} SET {name} = ? WHERE number = ?"
        return edited_log(content, (statement, (value, place)))
    rows = [{**row, "salt": row["salt"].hex()} for row in rows_of_log(content)]
    rows = [{**row, "body": json.loads(row["body"])} for row in rows]
    rows = [row for row in changed(rows, chance) if isinstance(row, dict)]
    statements, previous = ["DELETE FROM entries", "DELETE FROM payloads"], "0" * 64
    renumber, redacted = chance.random() < 0.9, chance.randrange(20)
    for number, row in enumerate(rows):
        if not renumber and type(row.get("number")) is int:
            number = _stored(row["number"])
        time, kind = (_stored(row.get(name)) for name in ("time", "kind"))
        name, body = row.get("name"), _as_text(row.get("body"))
        name = name if name is None or type(name) is str else _as_text(name)
        salt = repr(row.get("salt")).encode()
        commitment = commitment_of(salt, name, body)
        chained = entry_hash(number, time, kind, commitment, previous)
        values = (number, time, kind, commitment, previous, chained)
        statements.append(
            ("INSERT OR IGNORE INTO entries VALUES (?, ?, ?, ?, ?, ?)", values)
        )
        if number != redacted:
            statements.append(
                (
                    "INSERT OR IGNORE INTO payloads VALUES (?, ?, ?, ?)",
                    (number, name, salt, body),
                )
            )
        previous = chained
    return edited_log(content, *statements)


def _as_text(value):
    try:
        return written(value)
    except RecursionError:
        return "[" * 3000 + "]" * 3000


def _stored(value):
    """A value that SQLite takes, of the same type where it can be."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return 2**63 - 1
    if value is None or isinstance(value, str | bytes | int | float):
        return value
    return _as_text(value)
