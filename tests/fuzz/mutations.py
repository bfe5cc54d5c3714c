"""Changes of valid files, each where the format has structure; all choices come from one source of random numbers."""

from __future__ import annotations

import io
import json
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable
from random import Random
from typing import Any

Files = dict[str, bytes]

DTYPES = (
    "BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
    "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64", "X9", "",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**64, -(2**63), 1.5, float("inf"), float("nan"), "", "x", "\0",
    "../x",
    "a" * 300, [], [1], ["a", None], [[]], {}, {"a": 1}, {"": {}}, {"quant_method": 3}, "é\ud800",
)  # fmt: skip
HEADS = (
    b"version https://git-lfs.github.com/spec/v1\n",
    b"<!doctype html>",
    b"GGUF",
    b"",
    b"PK\x03\x04",
    b"\x80\x02",
    b"\x1f\x8b",
)
JSONS = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"3",
    b'"x"',
    b"[" * 5000,
    b'{"a":' * 5000,
    b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    b'{"weight_map": {}}',
)


def odd(draw: Random) -> Any:
    """Return a value of JSON that few readers expect."""
    return draw.choice(ODD)


# bytes


def flipped(content: bytes, draw: Random) -> bytes:
    """Change a few bytes."""
    raw = bytearray(content)
    for _ in range(draw.randint(1, 4) if raw else 0):
        raw[draw.randrange(len(raw))] = draw.randrange(256)
    return bytes(raw)


def cut(content: bytes, draw: Random) -> bytes:
    """Keep the beginning."""
    return content[: draw.randint(0, max(len(content) - 1, 0))]


def grown(content: bytes, draw: Random) -> bytes:
    """Put bytes in."""
    at = draw.choice((0, len(content), draw.randint(0, len(content))))
    return content[:at] + draw.randbytes(draw.randint(1, 16)) + content[at:]


def spliced(content: bytes, draw: Random) -> bytes:
    """Repeat, move or drop a piece."""
    start = draw.randint(0, len(content))
    end = min(len(content), start + draw.randint(1, 64))
    to = draw.randint(0, len(content))
    kept = content[:start] + content[end:] if draw.random() < 0.5 else content
    return kept[:to] + content[start:end] * draw.randint(0, 2) + kept[to:]


def replaced(content: bytes, draw: Random) -> bytes:
    """Put something else in its place, at its start or whole."""
    head = draw.choice(HEADS)
    return head + (content[len(head) :] if draw.random() < 0.5 else b"")


BYTES = (flipped, flipped, cut, grown, spliced, replaced)


def any_bytes(content: bytes, draw: Random) -> bytes:
    """Change bytes without looking at their meaning."""
    return draw.choice(BYTES)(content, draw)


# JSON


def dump(value: Any) -> bytes:
    """Write JSON as the bytes of a file, odd texts included."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def any_json(content: bytes, draw: Random) -> bytes:
    """Change one entry of a table, at any depth, or the text."""
    if draw.random() < 0.15:
        return draw.choice(JSONS)
    try:
        root = json.loads(content)
    except (ValueError, RecursionError):
        return any_bytes(content, draw)
    tables = list(_tables(root))
    if not tables:
        return dump(odd(draw))
    table = draw.choice(tables)
    way, name = draw.randrange(5), draw.choice(sorted(table) or [""])
    if way == 0 or not table:
        table[draw.choice(("quantization_config", "weight_map", "r", "x", name))] = odd(draw)
    elif way == 1:
        del table[name]
    elif way == 2:
        table[name] = table[draw.choice(sorted(table))]
    elif way == 3:
        return _twice(dump(root), name, odd(draw))
    else:
        table[name] = odd(draw)
    return dump(root)


def _tables(value: Any) -> Iterable[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _tables(part)


def _twice(text: bytes, name: str, value: Any) -> bytes:
    return text.replace(dump(name) + b":", dump(name) + b": " + dump(value) + b", " + dump(name) + b":", 1)


# safetensors


def header(content: bytes, draw: Random) -> bytes:
    """Change the table at the start of a safetensors file, and mostly keep its length right."""
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > len(content):
        return any_bytes(content, draw)
    try:
        table = json.loads(content[8 : 8 + size])
    except (ValueError, RecursionError):
        return any_bytes(content, draw)
    if not isinstance(table, dict):
        return any_bytes(content, draw)
    body = content[8 + size :]
    names = [name for name in table if name != "__metadata__" and isinstance(table[name], dict)]
    if not names or draw.random() < 0.2:
        text = any_json(content[8 : 8 + size], draw)
    else:
        text = (
            dump(table)
            if _entry(table, draw.choice(names), body, draw)
            else _twice(dump(table), names[0], table[names[0]])
        )
    length = len(text) if draw.random() < 0.95 else draw.choice((0, size, size + 8, 2**40, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + text + body


def _entry(table: dict[str, Any], name: str, body: bytes, draw: Random) -> bool:
    """Change one tensor's entry; False asks for it to be written twice."""
    entry, way = table[name], draw.randrange(9)
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    shape = shape if isinstance(shape, list) else []
    if way == 0:
        entry["dtype"] = draw.choice(DTYPES)
    elif way == 1:
        entry["shape"] = draw.choice(([], [0], [-1], [2**63], [2**32, 2**32], [1, *shape], shape[::-1], "x", [1.5]))
    elif way == 2 and isinstance(offsets, list):
        entry["data_offsets"] = [o + draw.choice((-4, -1, 0, 1, 4, 2**40)) for o in offsets if isinstance(o, int)]
    elif way == 3:
        entry["data_offsets"] = draw.choice(
            ([0, 0], [0, len(body)], [len(body), 0], [], [0], [0.5, 1], "x", [0, 2**64])
        )
    elif way == 4:
        table[draw.choice((name + "x", "", "__metadata__", "a.qweight", "module." + name))] = table.pop(name)
    elif way == 5:
        table["__metadata__"] = draw.choice(
            (
                {"byom": json.dumps(odd(draw))},
                {"byom": json.dumps({"ties": {"t": name}})},
                {"byom": json.dumps({draw.choice(("ties", "crc32")): odd(draw)})},
                {"format": "tf"},
                odd(draw),
            )
        )
    elif way == 6:
        entry[draw.choice(sorted(entry) or ["x"])] = odd(draw)
    elif way == 7:
        other = draw.choice(sorted(table))
        table[name], table[other] = table[other], table[name]
    else:
        return False
    return True


# pickles


def zipped(content: bytes, draw: Random) -> bytes:
    """Change an entry of a zip file, or which there are."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, RuntimeError):
        return any_bytes(content, draw)
    if not entries:
        return any_bytes(content, draw)
    at = draw.randrange(len(entries))
    pickles = [i for i, (name, _) in enumerate(entries) if name.endswith("data.pkl")]
    if pickles and draw.random() < 0.6:
        at = pickles[0]
    name, inner = entries[at]
    way = draw.randrange(8)
    if way <= 3:
        entries[at] = (name, opcodes(inner, draw) if name.endswith(".pkl") else any_bytes(inner, draw))
    elif way == 4:
        del entries[at]
    elif way == 5:
        entries[at] = (
            draw.choice((name + "x", "data.pkl", name.rpartition("/")[2], "../" + name, "constants.pkl", name.upper())),
            inner,
        )
    elif way == 6:
        other = draw.randrange(len(entries))
        entries[at], entries[other] = (name, entries[other][1]), (entries[other][0], inner)
    else:
        entries.append((name, any_bytes(inner, draw)))
    return _zip(entries, zipfile.ZIP_DEFLATED if draw.random() < 0.05 else zipfile.ZIP_STORED)


def _zip(entries: list[tuple[str, bytes]], kind: int) -> bytes:
    made = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(made, "w", kind) as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, inner in entries:
            archive.writestr(name, inner)
    return made.getvalue()


WORDS = (
    b"cos\nsystem\n", b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch.nn\nLinear\n",
    b"ccollections\nOrderedDict\n", b"ctorch\nDoubleStorage\n", b"ctorch._utils\n_rebuild_sparse_tensor\n",
)  # fmt: skip
NUMBERS = (
    b"K\0",
    b"K\x01",
    b"K\xff",
    b"J\xff\xff\xff\xff",
    b"J\xff\xff\xff\x7f",
    b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
    b"N",
    b"\x88",
    b"G?\xf0\0\0\0\0\0\0",
    b")",
    b"]",
    b"}",
)
STRAY = (
    b"0",
    b"2",
    b"(",
    b"R",
    b"b",
    b"s",
    b"u",
    b"a",
    b"e",
    b"t",
    b"\x85",
    b"\x86",
    b"\x87",
    b"Q",
    b"\x81",
    b".",
    b"1",
)


def opcodes(content: bytes, draw: Random) -> bytes:
    """Drop, repeat, exchange or replace opcodes of a pickle."""
    try:
        starts = [at for _, _, at in pickletools.genops(content) if at is not None]
    except Exception:
        return any_bytes(content, draw)
    parts = [content[a:b] for a, b in zip(starts, [*starts[1:], len(content)], strict=True)]
    for _ in range(draw.randint(1, 3)):
        i, way = draw.randrange(len(parts)), draw.randrange(8)
        j = draw.randrange(len(parts))
        if way == 0:
            parts[i] = b""
        elif way == 1:
            parts[i] *= 2
        elif way == 2:
            parts[i], parts[j] = parts[j], parts[i]
        elif way == 3:
            parts[i] = draw.choice(WORDS)
        elif way == 4:
            parts[i] += draw.choice(STRAY)
        elif way == 5:
            parts[i] = flipped(parts[i], draw)
        else:
            numbers = [
                k for k, part in enumerate(parts) if part[:1] in (b"K", b"M", b"J", b"\x89", b"\x88", b"N", b"\x8a")
            ]
            parts[draw.choice(numbers or [i])] = draw.choice(NUMBERS)
    return b"".join(parts)


# folders


def mutated(files: Files, draw: Random) -> Files:
    """Change a folder of files: one of them, mostly by its format, and now and then which there are."""
    files = dict(files)
    for _ in range(1 if draw.random() < 0.8 else 2):
        name = draw.choice(sorted(files))
        way = draw.random()
        if way < 0.08:
            _shuffled(files, name, draw)
        elif way < 0.25:
            files[name] = any_bytes(files[name], draw)
        else:
            files[name] = _kind(name)(files[name], draw)
        if not files:
            break
    return files


def _kind(name: str) -> Callable[[bytes, Random], bytes]:
    if name.endswith(".json"):
        return any_json
    if name.endswith(".safetensors"):
        return header
    return (
        opcodes
        if name.endswith(".pkl")
        else lambda content, draw: (zipped if content[:2] == b"PK" else opcodes)(content, draw)
    )


def _shuffled(files: Files, name: str, draw: Random) -> None:
    other = draw.choice(sorted(files))
    way = draw.randrange(4)
    if way == 0:
        del files[name]
    elif way == 1:
        files[name], files[other] = files[other], files[name]
    else:
        more = (
            "model.safetensors",
            "pytorch_model.bin",
            "model-00003-of-00003.safetensors",
            "adapter_config.json",
            "config.json",
        )
        files[draw.choice(more)] = files[name]
