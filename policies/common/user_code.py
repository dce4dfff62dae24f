"""Code that is found by name: this program's own parts, installed plug-ins, and import paths: ``module:Name``,
``path/to/file.py:Name``, or ``in-process:name``, a function that the calling program gave itself."""

import contextlib
import difflib
import functools
import importlib
import inspect
import itertools
import marshal
import pkgutil
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Generic, TypeVar

_CHECKOUT = Path(__file__).resolve().parents[2]
PROGRAM = ("actors", "orchestration", "pipelines", "policies")  # this program's own packages
IN_PROCESS = "in-process"
_PLACES = 3
_given: dict[str, Callable[..., Any]] = {}  # in-process functions, by their import paths
Failure = TypeVar("Failure", bound=BaseException)


def described(error: BaseException) -> str:
    """An exception that was raised by code called from here, in a line: what, and where in whose file, last first."""
    frames = [each for each in _users(traceback.extract_tb(error.__traceback__)) if not each.filename.startswith("<")]
    places = []
    for frame in frames[: -_PLACES - 1 : -1]:
        file = Path(frame.filename)
        shown = file.relative_to(_CHECKOUT) if file.is_relative_to(_CHECKOUT) else file
        places.append(f"{shown}:{frame.lineno} in {frame.name}")
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{said} (at {', called at '.join(places)})" if places else said


def traced(raised: Failure, error: BaseException) -> Failure:
    """``raised``, which stands for ``error`` of a user's code, with the traceback of that code as a note.

    A note goes along where an exception is pickled. Its lines are indented: none of them is the message."""
    trace = traceback.TracebackException.from_exception(error)
    trace.stack = _users(trace.stack)
    if trace.stack or isinstance(error, SyntaxError):
        raised.add_note(textwrap.indent("".join(trace.format()), "  ").rstrip())
    return raised


def noted(raised: Failure, error: BaseException) -> Failure:
    """``raised``, which stands for ``error``, with its notes."""
    for note in getattr(error, "__notes__", ()):
        raised.add_note(note)
    return raised


def _users(frames: Iterable[traceback.FrameSummary]) -> traceback.StackSummary:
    """Frames from the first that is neither this program's nor of an import."""
    own = ("<frozen", str(Path(importlib.__file__).parent), *(str(_CHECKOUT / package) for package in PROGRAM))
    left = list(itertools.dropwhile(lambda each: each.filename.startswith(own), frames))
    return traceback.StackSummary.from_list(left)


def file_of(path: str) -> Path | None:
    """The source file that an import path ``path/to/file.py:Name`` names, found from here or from the checkout; None
    for an import path of a module. Raises ValueError if there is no such file."""
    name = path.rpartition(":")[0]
    places = (Path(name).expanduser(), _CHECKOUT / name) if name.endswith(".py") else ()
    file = next((each for each in places if each.is_file()), None)
    if places and file is None:
        raise ValueError(f"{path!r}: there is no file {name!r} in {Path.cwd()}")
    return file and file.resolve()


def source_of(function: Any) -> bytes:
    """What a function, class or callable object is made of: its source or, where no file holds that, its bytecode."""
    called = function if inspect.isclass(function) or hasattr(function, "__code__") else type(function).__call__
    try:
        return inspect.getsource(called).encode()
    except (OSError, TypeError):
        return marshal.dumps(getattr(called, "__code__", None))


@contextlib.contextmanager
def giving(function: Callable[..., Any]) -> Iterator[str]:
    """The import path by which ``function`` is found in this block, in this process alone."""
    path = f"{IN_PROCESS}:" + re.sub(r"\W", "", getattr(function, "__name__", type(function).__name__))
    while path in _given:
        path += "_"
    _given[path] = function
    try:
        yield path
    finally:
        del _given[path]


def import_function(path: str, setting: str, built_in: Iterable[str], what: str = "function") -> Any:
    """Import ``module:function`` or ``file.py:function``, the value of ``setting``. Raises ValueError that says which
    half is wrong."""
    if path in _given:
        return _given[path]
    module_name, _, function_name = path.rpartition(":")
    if not (module_name and function_name):
        forms = f"an import path 'module:{what}' or 'path/to/file.py:{what}'"
        names = list(built_in)
        near = [name for name in names if path and path in name] or difflib.get_close_matches(path, names, n=1)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"{setting} {path!r} is neither one of {', '.join(names)} nor {forms}{hint}")
    if module_name == IN_PROCESS:
        remedy = f"go on there with run_ddpo(resume=RUN, reward={function_name}), or name a function's file"
        raise ValueError(f"{setting} {path!r} was a function of the Python program that began this: {remedy}")
    file = file_of(path)
    try:
        module = importlib.import_module(module_name) if file is None else _module_of(file)
    except (Exception, SystemExit) as error:  # an imported module may fail in any way
        reason = f"module {module_name!r} cannot be imported: {described(error)}"
        if isinstance(error, ModuleNotFoundError) and Path(beside := f"{module_name.replace('.', '/')}.py").is_file():
            reason = f"module {module_name!r} is not on Python's path; by its file it is {beside}:{function_name}"
        raise traced(ValueError(f"{setting} {path!r}: {reason}"), error) from error
    if (function := getattr(module, function_name, None)) is None:
        near = difflib.get_close_matches(function_name, [name for name, each in vars(module).items() if callable(each)])
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{setting} {path!r}: module {module_name!r} has no {function_name!r}{hint}")
    if not callable(function):
        raise ValueError(f"{setting} {path!r}: {function_name!r} cannot be called")
    return function


def _module_of(file: Path) -> ModuleType:
    """The module of a source file, which may import what lies beside it; anew if the file has changed."""
    name, source = str(file), file.read_bytes()
    held = sys.modules.get(name)
    if held is None or vars(held).get("__source__") != source:
        held = ModuleType(name)
        held.__file__ = name
        if str(file.parent) not in sys.path:
            sys.path.append(str(file.parent))
        sys.modules[name] = held  # while it is read, too: dataclasses look themselves up
        exec(compile(source, name, "exec"), vars(held))
        vars(held)["__source__"] = source
    return held


def check_function(
    path: str, setting: str, asked: Sequence[str], options: Mapping[str, Any] | None, built_in: Iterable[str]
) -> None:
    """Raise ValueError unless what ``module:function`` leads to can be called with the arguments ``asked`` and
    ``options``. Those of a class make the instance that is called; None: no class is wanted. Nothing is called."""
    own, given = import_function(path, setting, built_in), dict(options or {})
    if isinstance(own, type) and options is None:
        raise ValueError(f"{setting} {path!r} is a class: name a function of {', '.join(asked)}")
    steps = [(own, asked, given)]
    if isinstance(own, type):
        if "__call__" not in dir(own):
            raise ValueError(f"{setting} {path!r}: the class has no __call__(self, {', '.join(asked)})")
        steps = [(own, (), given), (functools.partial(own.__call__, None), asked, {})]
    for function, positional, keywords in steps:
        if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(inspect.unwrap(function)):
            raise ValueError(f"{setting} {path!r} is async or yields: it has to return its numbers")
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # written in C, some say nothing of their arguments
            continue
        try:
            signature.bind(*positional, **keywords)
        except TypeError as error:
            unknown = [name for name in keywords if name not in signature.parameters]
            near = difflib.get_close_matches(unknown[0], signature.parameters, n=1) if unknown else []
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{setting} {path!r} takes {signature}: {error}{hint}") from error


@contextlib.contextmanager
def calling(names: Sequence[str]) -> Iterator[None]:
    """Let any failure of the block, which calls code of the import paths ``names``, be a ValueError that says where."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, ValueError) or not names:
            raise
        raise traced(noted(ValueError(f"{' or '.join(names)} failed: {described(error)}"), error), error) from error


class Named:
    """What a configuration names: a class with ``names`` is found by them, any other by its import path."""

    names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def name(cls) -> str:
        """The first of its names, or its import path."""
        return cls.names[0] if vars(cls).get("names") else f"{cls.__module__}:{cls.__qualname__}"


Kind = TypeVar("Kind", bound=Named)


class Registry(Generic[Kind]):
    """All classes derived from ``base``: those of the modules of ``package``, by their names; those that installed
    packages offer as entry points of ``group``; and any other by its import path ``module:Name``.

    A class in a new module of the package is found without being entered anywhere. Nothing foreign is imported before
    it is asked for with :meth:`find`.
    """

    def __init__(
        self,
        base: type[Kind],
        package: str,
        group: str,
        setting: str,
        besides: Sequence[str] = (),
        by_path: bool = True,
    ) -> None:
        self.base, self.group, self.setting = base, group, setting
        self._package, self._besides, self._by_path = package, besides, by_path

    @cached_property
    def built_in(self) -> dict[str, type[Kind]]:
        """This program's own, by name."""
        modules = {each.name for each in pkgutil.iter_modules(importlib.import_module(self._package).__path__)}
        held = [vars(importlib.import_module(f"{self._package}.{name}")) for name in sorted(modules - {*self._besides})]
        found = [each for module in held for each in module.values() if isinstance(each, type)]
        kinds = [each for each in found if issubclass(each, self.base)]
        return {name: kind for kind in kinds for name in vars(kind).get("names", ())}

    @cached_property
    def installed(self) -> dict[str, EntryPoint]:
        """Entry points of other packages, by name."""
        return {each.name: each for each in entry_points(group=self.group) if each.name not in self.built_in}

    @property
    def all_names(self) -> list[str]:
        """Every name but import paths."""
        return [*self.built_in, *self.installed]

    def check(self, name: str) -> str:
        """``name`` as it is. Raises ValueError if it is neither known nor of the form of an import path."""
        if name not in self.all_names and not (self._by_path and all(name.partition(":"))):
            known, path = ", ".join(map(repr, self.all_names)), " or an import path 'module:Name'" * self._by_path
            raise ValueError(f"Input should be {known}{path}")
        return name

    def path(self, name: str) -> str | None:
        """The import path of what is not this program's own."""
        return None if name in self.built_in else self.installed[name].value if name in self.installed else name

    def find(self, name: str) -> type[Kind]:
        """The class. Raises ValueError if an import path leads to none."""
        path = self.path(name)
        if path is None:
            return self.built_in[name]
        kind = import_function(path, self.setting, self.all_names, "Name")
        if not (isinstance(kind, type) and issubclass(kind, self.base)):
            wanted = f"{self.base.__module__}.{self.base.__name__}"
            raise ValueError(f"{self.setting} {name!r} is not a class derived from {wanted}")
        return kind
