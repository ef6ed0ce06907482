"""Hostile JSON, generated from a seed: what a damaged disk, another program or an attacker may put in place of ours.

Every case is made from a valid document. Those of a kind in `MUST_REFUSE` are never valid, whatever the document
means; one with another value or key may be, where its reader does not care for that field.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

PATHS = (
    "../outside.safetensors", "../../etc/passwd", "/etc/passwd", "..", ".", "", "a/../../outside.safetensors", "C:\\x",
    "..\\outside.safetensors", "model/../x", ".hidden", "x\0.safetensors", "~/x", "file:///etc/passwd", "\n", "a" * 300,
    "link-to-outside.safetensors", "link-to-parent/outside.safetensors", "link-to-zeros", "pipe.safetensors",
    "\u202egpj.exe", "ﬁle", "model.safetensors/", "./model.safetensors", "//x", "CON", "%2e%2e%2fx", "\ud800",
)  # fmt: skip
"""Names that lead out of a directory, to no regular file, or to another spelling of one."""

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**53 + 1, 2**63, 10**18, 10**400, -(10**400), 0.5, -0.0, 1e308, 1e-320, "",
    "x", "NaN", "1", "true", "x" * 10_000, "\ud800", "\0", "é" * 100, [], {}, [[]], [{}], {"": {}}, [None],
    ["x", 1, {}], {"x": {"y": [1]}}, [0] * 1000, *PATHS,
)  # fmt: skip

NOT_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "0x10", "01", "1.", ".5", "+1", "1_000", "١")

MUST_REFUSE = frozenset({"duplicate key", "not a number", "nested deeply", "not text", "no object", "cut or spliced"})


@dataclass(frozen=True)
class Case:
    """One hostile file."""

    kind: str
    content: bytes
    what: str
    """For the message, should it be taken."""

    @property
    def must_be_refused(self) -> bool:
        return self.kind in MUST_REFUSE


Place = tuple[Any, Any]
"""A container and the key or index in it."""


def cases(valid: bytes, seed: str, count: int) -> Iterator[Case]:
    """`count` hostile variants of a JSON object, the same for the same seed."""
    draw = random.Random(seed)
    makers = list(MAKERS.items())
    for number in range(count):
        kind, make = makers[number % len(makers)]
        content, what = make(valid, draw)
        yield Case(kind, content, f"{kind}: {what}"[:300])


def places(document: Any) -> list[Place]:
    """Every value of a document, by where it stands."""
    found: list[Place] = []
    waiting = [document]
    while waiting:
        container = waiting.pop()
        pairs = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in pairs:
            found.append((container, key))
            if isinstance(value, (dict, list)):
                waiting.append(value)
    return found


def other_value(valid: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Some value replaced by one of another type, size or meaning."""
    document = json.loads(valid)
    container, key = draw.choice(places(document))
    container[key] = draw.choice(VALUES)
    return _dumped(document), f"{key} = {str(container[key])[:60]!r}"


def other_key(valid: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A key renamed, removed or added."""
    document = json.loads(valid)
    objects = [document, *(c[k] for c, k in places(document) if isinstance(c[k], dict))]
    chosen = draw.choice(objects)
    key = draw.choice(list(chosen)) if chosen else ""
    change = draw.choice(("renamed", "removed", "added"))
    new = draw.choice([*PATHS, "__class__", "auto_map", "_name_or_path", "x", "1", "self", "dtype"])
    if change == "added":
        chosen[new] = draw.choice(VALUES)
    elif chosen:
        value = chosen.pop(key)
        if change == "renamed":
            chosen[new] = value
    return _dumped(document), f"{key!r} {change} {new!r}"


def duplicate_key(valid: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A key that stands twice in one object, here or at any depth."""
    document = json.loads(valid)
    objects = [c for c in [document, *(c[k] for c, k in places(document))] if isinstance(c, dict) and c]
    chosen = draw.choice(objects)
    key = draw.choice(list(chosen))
    chosen["duplicate-marker"] = chosen[key] if draw.random() < 0.5 else draw.choice(VALUES)
    text = json.dumps(document).replace('"duplicate-marker"', json.dumps(key))
    return text.encode(), f"{key!r} twice"


def not_a_number(valid: bytes, draw: random.Random) -> tuple[bytes, str]:
    """NaN, an infinity, or a spelling that JSON does not have."""
    document = json.loads(valid)
    container, key = draw.choice(places(document))
    container[key] = "number-marker"
    word = draw.choice(NOT_NUMBERS)
    return json.dumps(document).replace('"number-marker"', word).encode(), f"{key} = {word}"


def nested_deeply(valid: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A value within hundreds or a hundred thousand brackets."""
    document = json.loads(valid)
    container, key = draw.choice(places(document))
    container[key] = "deep-marker"
    depth = draw.choice((100, 500, 2_000, 100_000))
    opening, closing = draw.choice((("[", "]"), ('{"a":', "}")))
    nested = opening * depth + "1" + closing * depth * draw.choice((0, 1, 1))
    return json.dumps(document).replace('"deep-marker"', nested).encode(), f"{key} {depth} levels deep"


def not_text(valid: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Nothing, another encoding, or bytes that are no UTF-8."""
    at = draw.randrange(len(valid))
    torn = valid[:at] + draw.choice((b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf8\x88")) + valid[at:]
    other = valid.decode().encode("utf-16")
    content = draw.choice((torn, other, b"", b" \n", b"\xef\xbb\xbf" + valid, bytes(len(valid)), b"\x80\x04N."))
    return content, f"begins {content[:12]!r}"


def no_object(valid: bytes, draw: random.Random) -> tuple[bytes, str]:
    """JSON, but a list, a number, a word."""
    words = (b"[]", b"null", b"1", b'"x"', b"true", b"[" + valid + b"]", json.dumps(valid.decode()).encode(), b"[{}]")
    content = draw.choice(words)
    return content, f"begins {content[:12]!r}"


def cut_or_spliced(valid: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Cut off, twice in a row, or with a piece repeated behind the end."""
    at = draw.randrange(1, len(valid.rstrip()))
    content = draw.choice((valid[:at], valid + valid, valid + valid[at:], valid[at:], valid + b"\0", b"//\n" + valid))
    return content, f"{len(content)} bytes for {len(valid)}"


def bytes_changed(valid: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A few bytes flipped anywhere."""
    damaged = bytearray(valid)
    for _ in range(draw.randrange(1, 5)):
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged), "flipped bits"


MAKERS: dict[str, Callable[[bytes, random.Random], tuple[bytes, str]]] = {
    "other value": other_value,
    "other key": other_key,
    "duplicate key": duplicate_key,
    "other value, again": other_value,
    "not a number": not_a_number,
    "nested deeply": nested_deeply,
    "other value, once more": other_value,
    "not text": not_text,
    "no object": no_object,
    "cut or spliced": cut_or_spliced,
    "bytes changed": bytes_changed,
}


def _dumped(document: Any) -> bytes:
    return json.dumps(document).encode()
