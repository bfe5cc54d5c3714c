"""What clients send: tasks, texts and images, checked before anything waits for the model."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from starlette.datastructures import FormData, UploadFile

from byom.errors import suggest
from byom.serving.errors import Refusal
from byom.serving.model import Served
from byom.serving.options import Options

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
TEXTS, IMAGES = ("text", "texts"), ("image", "images")
EXAMPLE = {"text": '{"task": "NAME", "text": "..."}', "image": '{"task": "NAME", "image": "BASE64"}'}
TOP = 5


@dataclass(frozen=True)
class Asked:
    """A request as it was sent.

    Args:
        task: The task; None where the model is to tell it.
        items: Texts, mappings from columns to texts, or the bytes of images.
        top: How many of the likeliest classes the answers name.
    """

    task: str | None
    items: list[Any]
    top: int = TOP


def from_json(body: bytes, tasks: Mapping[str, Served], options: Options, *, routes: bool) -> Asked:
    """Read a JSON request.

    Args:
        body: Its bytes.
        tasks: Those that are served.
        options: Limits.
        routes: Whether the model tells tasks apart.

    Raises:
        Refusal: Saying what is wrong with it.
    """
    kind = next(iter(tasks.values())).input
    try:
        sent = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise Refusal(400, f"the body is not JSON ({reason}); send for example {EXAMPLE[kind]}") from error
    if not isinstance(sent, dict):
        raise Refusal(422, f"the body is {_kind(sent)} where an object is expected; send for example {EXAMPLE[kind]}")
    names = TEXTS if kind == "text" else IMAGES
    if unknown := [name for name in sent if name not in ("task", "top", *names)]:
        known = ("task", "top", *names)
        raise Refusal(422, f"there is no field {unknown[0][:80]!r}; {suggest(unknown[0][:80], known)}")
    given = [name for name in names if name in sent]
    if len(given) != 1:
        raise Refusal(422, f"give one of the fields {' and '.join(names)}, for example {EXAMPLE[kind]}")
    task = _task(sent.get("task"), tasks, routes=routes)
    items = sent[given[0]] if isinstance(sent[given[0]], list) else [sent[given[0]]]
    require_count(items, options)
    read = _image_bytes if kind == "image" else _text
    columns = next(iter(tasks.values())).columns if task is None else tasks[task].columns
    return Asked(task, [read(item, columns, options) for item in items], _top(sent.get("top", TOP)))


async def from_form(form: FormData, tasks: Mapping[str, Served], options: Options, *, routes: bool) -> Asked:
    """Read an upload of images, as a page's form sends it; see `from_json`."""
    if next(iter(tasks.values())).input != "image":
        raise Refusal(415, f"these tasks read texts, which are sent as JSON: {EXAMPLE['text']}")
    known = ("task", "top", *IMAGES)
    if unknown := [name for name in form if name not in known]:
        raise Refusal(422, f"there is no field {unknown[0][:80]!r}; {suggest(unknown[0][:80], known)}")
    files = [value for name in IMAGES for value in form.getlist(name)]
    if any(not isinstance(file, UploadFile) for file in files):
        raise Refusal(422, "the field image is a text where a file is expected; curl sends one with -F image=@FILE")
    require_count(files, options)
    task, top = form.get("task") or None, form.get("top", str(TOP))
    if not isinstance(top, str) or not top.isdecimal() or len(top) > 6:
        raise Refusal(422, f"top={str(top)[:80]!r} is not a whole number")
    items = [await file.read() for file in files if isinstance(file, UploadFile)]
    return Asked(_task(task, tasks, routes=routes), items, _top(int(top)))


def require_count(items: Sequence[Any], options: Options) -> None:
    """Refuse no items, and more than are allowed."""
    if not items:
        raise Refusal(422, "there is nothing to answer: the list is empty; send one item or more")
    if len(items) > options.items:
        raise Refusal(413, f"{len(items)} items in one request, and {options.items} are allowed; send several requests")


def image(content: bytes, options: Options) -> Image.Image:
    """Decode an image.

    Raises:
        Refusal: If it is none, is broken, or has too many pixels.
    """
    large = f"an image has more than {options.megapixels:g} million pixels; send a smaller one"
    try:
        opened = Image.open(io.BytesIO(content), formats=FORMATS)
        if opened.width * opened.height > options.megapixels * 1e6:  # before any pixel is decoded
            raise Refusal(413, large)
        return opened.convert("RGB")
    except Refusal:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refusal(413, large) from error
    except Exception as error:  # decoders of broken files raise errors of many kinds
        raise Refusal(422, f"an image cannot be read ({type(error).__name__}); send {', '.join(FORMATS)}") from error


def _task(name: Any, tasks: Mapping[str, Served], *, routes: bool) -> str | None:
    if name is None:
        if not routes:
            raise Refusal(
                422,
                f"no task is given, and the bundle has no router to guess it; give one of {', '.join(tasks)}, or pack "
                "the bundle with router=knn",
            )
        return None
    if not isinstance(name, str):
        raise Refusal(422, f"task is {_kind(name)} where a name is expected; GET /tasks lists them")
    if name not in tasks:
        raise Refusal(404, f"there is no task {name[:80]!r}; {suggest(name[:80], tasks)}")
    return name


def _top(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Refusal(422, "top is not a whole number of 1 or more")
    return value


def _text(item: Any, columns: tuple[str, ...], options: Options) -> Any:
    if columns:
        if not isinstance(item, dict) or set(item) != set(columns):
            raise Refusal(422, f"a text of this task is an object of the columns {', '.join(columns)}, and no other")
        return {name: _text(item[name], (), options) for name in columns}
    if not isinstance(item, str):
        raise Refusal(422, f"an item is {_kind(item)} where a text is expected; send a text or a list of texts")
    if len(item) > options.characters:
        raise Refusal(
            413, f"a text has {len(item):,} characters, and {options.characters:,} are allowed; send a part of it"
        )
    try:
        item.encode()
    except UnicodeEncodeError as error:
        raise Refusal(422, "a text has half of a surrogate pair in it, which is no character; send UTF-8") from error
    return item


def _image_bytes(item: Any, columns: tuple[str, ...], options: Options) -> bytes:
    if not isinstance(item, str):
        raise Refusal(422, f"an item is {_kind(item)} where an image in base64 is expected")
    text = item.partition(",")[2] if item.startswith("data:") else item
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(
            422, f"an image is not base64 ({error}); or upload files: curl -F task=NAME -F image=@FILE"
        ) from error


def _kind(value: Any) -> str:
    kinds = {type(None): "null", bool: "a truth value", int: "a number", float: "a number", str: "a text"}
    return kinds.get(type(value), "a list" if isinstance(value, list) else "an object")
