"""How bad input is refused: one line, before anything is started."""

import contextlib
from collections.abc import Iterator

from policies.common.user_code import noted


class ConfigError(ValueError):
    """A configuration that cannot be run: what is wrong, where, and what to do. One line."""


@contextlib.contextmanager
def about(what: str = "") -> Iterator[None]:
    """Let a ValueError of the block be a ConfigError that begins with ``what`` it is about."""
    try:
        yield
    except ValueError as error:
        raise noted(ConfigError(f"{what}: {error}" if what else str(error)), error) from error
