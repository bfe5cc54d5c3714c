"""``byom serve``: a bundle over HTTP."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from byom.errors import OptionError, suggest
from byom.storage.place import at_home

if TYPE_CHECKING:
    from byom.serving.options import Options

LIBRARIES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")


def serve(arguments: Sequence[str]) -> int:
    """Serve a bundle until the process is told to end.

    Raises:
        OptionError: If an option is wrong, the address is taken or a library is missing.
        CheckpointError: If the folder is no bundle that can be served.
    """
    if lost := [name for name in LIBRARIES if find_spec(name) is None]:
        raise OptionError(f"byom serve needs {', '.join(lost)}: pip install 'byom[serve]'")
    if not arguments or "=" in arguments[0]:
        raise OptionError("which bundle? byom serve FOLDER [option=value ...]; byom pack makes one")
    from byom.serving.app import create_app
    from byom.serving.server import address, listening, run

    options = _options(arguments[1:])
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    socket = listening(options.host, options.port)  # before the model is read, which takes a while
    try:
        app = create_app(at_home(arguments[0]), options)
        sys.stdout.write(f"{address(socket)} answers; Ctrl+C ends it\n")
        sys.stdout.flush()
        run(app, socket, options)
    finally:
        socket.close()
    return 0


def _options(arguments: Sequence[str]) -> Options:
    from byom.serving.options import Options

    kinds = {field.name: type(field.default) for field in fields(Options)}
    given: dict[str, Any] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or name not in kinds:
            raise OptionError(f"byom serve has no option {argument!r}; {suggest(name, kinds)}")
        if name in given:
            raise OptionError(f"{name} is given twice; leave one of them out")
        try:
            given[name] = kinds[name](value)
        except ValueError as error:
            what = "a whole number" if kinds[name] is int else "a number"
            raise OptionError(
                f"{name}={value} is not {what}; use for example {name}={getattr(Options, name)}"
            ) from error
    return Options(**given)
