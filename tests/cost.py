"""What tests cost, in CPU seconds of all processes that they start: ``pytest -p tests.cost -n 0 FILE``.

Unlike the time on the clock it hardly depends on what else the machine does. Processes are looked at twice a second: of
what lives for less, and of what outlives its parent, a part is missed.
"""

import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

_spent: dict[psutil.Process, float] = {}
_tests: dict[str, float] = {}
_lock = threading.Lock()


def _seconds() -> float:
    with _lock:
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            _spent[process] = times.user + times.system
        return sum(_spent.values())


def _look() -> None:
    while True:
        time.sleep(0.5)
        _seconds()


threading.Thread(target=_look, daemon=True).start()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Fixtures count for the test that is first to need them."""
    before = _seconds()
    result: Any = yield
    _tests[item.nodeid] = _seconds() - before
    return result


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The ten that cost most, and all together."""
    dearest = sorted(_tests.items(), key=lambda each: -each[1])[:10]
    lines = [f"{seconds:8.1f} CPU s  {name}" for name, seconds in dearest]
    terminalreporter.section("most expensive tests")
    terminalreporter.write_line("\n".join([*lines, f"{_seconds():8.1f} CPU s  in all"]))
