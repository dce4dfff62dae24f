"""What a person's own code does wrong, told where it was done."""

import traceback
from pathlib import Path

from pipelines.storage.locations import CHECKOUT

_PLACES = 3


def described(error: BaseException) -> str:
    """An exception that was raised by code called from here, in a line: what, and where in whose file, last first."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)[1:] if not frame.filename.startswith("<")]
    places = []
    for frame in frames[: -_PLACES - 1 : -1]:
        file = Path(frame.filename)
        shown = file.relative_to(CHECKOUT) if file.is_relative_to(CHECKOUT) else file
        places.append(f"{shown}:{frame.lineno} in {frame.name}")
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{said} (at {', called at '.join(places)})" if places else said
