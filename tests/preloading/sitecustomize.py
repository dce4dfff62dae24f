"""In a command that a test starts: the Ray that it starts has its workers forked, see ``tests/prefork.py``.

Python imports this by itself, as its directory is in ``PYTHONPATH``. Nothing else of the process is other than a
person's, nor of what it starts in turn: it removes its own trace first.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module of Ray's, once, and has it changed when it is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "ray._private.parameter":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        loader: Any = spec and spec.loader
        execute = loader.exec_module

        def changed(module: ModuleType) -> None:
            execute(module)
            names = vars(module)
            worker = os.path.join(os.path.dirname(_HERE), "prefork.py")
            names["RayParams"] = partial(names["RayParams"], setup_worker_path=worker)

        loader.exec_module = changed
        return spec


sys.path[:] = [each for each in sys.path if os.path.abspath(each) != _HERE]
_places = [each for each in os.environ.pop("PYTHONPATH").split(os.pathsep) if os.path.abspath(each) != _HERE]
if _places:
    os.environ["PYTHONPATH"] = os.pathsep.join(_places)
sys.meta_path.insert(0, _Finder())
