"""Mutations of bytes, of JSON and of safetensors headers, and the hostile values in them."""

from __future__ import annotations

import copy
import json
import math
import random
import struct
from typing import Any


def deep(levels: int) -> Any:
    """Lists inside lists."""
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


VALUES: list[Any] = [
    10**12, 2**63, 2**64, 10**400, -1, 0, -(10**12), 1, 2, 3, 4, 1e308, 1.5, 4.0, math.nan, math.inf, -math.inf, True, False,
    None, "", "4", "4.0", "rank", "../../etc/passwd", "__class__", "__import__('os').system('id')", "\u0000", "\ud800",
    "a" * 100_000, [], {}, [4], {"rank": 4}, [[]], deep(100), {"a": {"b": {"c": {}}}}, ["x"] * 1000,
]  # fmt: skip

NAMES = [
    "", ".", "..", "../../x", "/etc/passwd", "__class__", "__dict__.weight", "_modules", "_parameters", "forward", "training", "0",
    "encoder..layer", "bert", "bert.encoder", "bert.encoder.layer", "bert.encoder.layer.0", "a" * 10_000, ".".join("a" * 5_000),
    "bert.embeddings.word_embeddings", "classifier", "bert.pooler.dense", "bert.encoder.layer.99.output.dense", "\u0000", "*", "é",
    "bert.encoder.layer.0.output.LayerNorm", "bert.encoder.layer.-1.output.dense", "version", "quant_method", "ranks", "layers",
]  # fmt: skip

PATTERNS = [
    r"(a+)+$", r"(.*)*x", r"([a-z0-9.]+)+X", r"(\w|\w\w)+!", r"((.*)*)*y", r"(?:[a-z]*[a-z]*)*Z", "(" * 3000, "[" * 10, "a{99999999999999}",
    r"(?P<a>x)(?P=b)", r"\1", "(?<=a+)b", "a" * 100_000, "(?:" * 2000 + ")" * 2000, "((a{1,100}){1,100}){1,100}", r"(.*\.)?(.*)+query",
    "*", "", "query", ".*query", r"(?i)QUERY", "query|", "\u0000",
]  # fmt: skip


class Gentle(random.Random):
    """With this source nothing is changed: every door has to load its good files."""


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four changes of bytes: flip, set, delete, insert, cut off, repeat."""
    if isinstance(rng, Gentle):
        return data
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(out)) if out else 0
        kind = rng.randrange(6)
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and out:
            out[at] = rng.choice(b'0123456789"{}[]:,.-eENtrue\\\x00\xff')
        elif kind == 2:
            del out[at : at + rng.choice((1, 1, 3, 20))]
        elif kind == 3:
            out[at:at] = rng.choice(
                (
                    b"9" * 15,
                    b"-",
                    b"NaN",
                    b"null",
                    b"[" * 2000,
                    b'{"a":' * 30_000,
                    b"\x00",
                    b'"',
                    b"1e999",
                    b"\xff\xfe",
                    b"{}",
                )
            )
        elif kind == 4:
            del out[at:]
        else:
            out[at:at] = out[at : at + rng.choice((2, 10, 100))]
    return bytes(out)


def mutate_json(value: Any, rng: random.Random, patterns: bool = False) -> Any:
    """One to three changes of values and keys, at any depth."""
    if isinstance(rng, Gentle):
        return value
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = [(root, 0)]
        stack = [root[0]]
        while stack:
            node = stack.pop()
            items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
            for key, inner in items:
                if len(places) < 3000:
                    places.append((node, key))
                    stack.append(inner)
        holder, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind <= 3 or (kind <= 5 and not isinstance(holder, dict)):
            holder[key] = copy.deepcopy(rng.choice(VALUES + PATTERNS * patterns))
        elif kind == 4:
            holder[rng.choice(NAMES + PATTERNS * patterns)] = holder.pop(key)
        elif kind == 5:
            holder[rng.choice(NAMES + PATTERNS * patterns)] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 6 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
            holder[key] += rng.choice((-1, 1, 2, 1000))
        elif holder is not root:
            del holder[key]
    return root[0]


def dump(value: Any) -> bytes:
    """JSON, ASCII alone, with NaN and what else Python's json writes."""
    return json.dumps(value, ensure_ascii=True).encode()


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header length, header or tensor bytes."""
    if isinstance(rng, Gentle):
        return data
    (size,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + size], data[8 + size :]
    kind = rng.randrange(5)
    if kind == 0:
        wrong = rng.choice((0, 1, size - 1, size + 1, len(data), 2**31, 2**63, 2**64 - 1, 10**8 + 1))
        return struct.pack("<Q", wrong) + header + body
    if kind == 1:
        header = mutate_bytes(header, rng)
    elif kind == 2:
        return data[:8] + header + mutate_bytes(body, rng)
    else:
        fields = json.loads(header)
        name = rng.choice(list(fields))
        entry = fields[name]
        what = rng.randrange(6)
        if what == 0 and "shape" in entry:
            entry["shape"] = rng.choice(
                ([10**12], [10**6, 10**6], [-1, 4], [0], [], [2**63, 2], [4, 32, 1], [32, 4], [1.5], ["4"])
            )
        elif what == 1 and "shape" in entry:
            entry["data_offsets"] = rng.choice(([0, 10**12], [-8, 8], [8, 0], [0, 0], [0, 4], [2**64, 2**64], [0]))
        elif what == 2 and "shape" in entry:
            entry["dtype"] = rng.choice(("F64", "F16", "I64", "BOOL", "F8_E4M3", "U8", "X", "", None, 4))
        elif what == 3:
            del fields[name]
        elif what == 4:
            fields[rng.choice([*NAMES, *fields]) + rng.choice(("", ".weight", ".down.weight", ".up.weight"))] = (
                fields.pop(name)
            )
        else:
            fields = mutate_json(fields, rng)
        header = dump(fields)
    return struct.pack("<Q", len(header)) + header + body
