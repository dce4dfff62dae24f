"""What the documents name is there: files, modules, commands with their options, and settings with their keys."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import pytest
import typer
import yaml

from orchestration.cli.main import app
from orchestration.experiments.metric_names import ddpo_metrics
from orchestration.experiments.registry import EXPERIMENTS
from orchestration.runs.config import load_config
from pipelines.generators import GENERATORS
from pipelines.guard import read_guard
from pipelines.storage.locations import CHECKOUT
from policies.common.claims import OUTCOMES

PAGES = [CHECKOUT / "README.md", CHECKOUT / "CONTRIBUTING.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
COMMAND = re.compile(r"^(?P<prompt>    |\$ )(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?ouroboros (?P<words>.*?)(?: +#.*)?$", re.M)
MENTION = re.compile(r"(?<![\w/.-])ouroboros ([a-z]+)(?: ([a-z]+))?([^`'\"|\n#]*)")


def commands(text: str, prompt: str = "    $ ") -> list[list[str]]:
    """The words of every whole command of a page; those with an ellipsis stand for others. Without a ``prompt`` of
    ``$``, whose commands may be meant to be refused, they have to be right."""
    lines = [each["words"] for each in COMMAND.finditer(text.replace("\\\n", " ")) if each["prompt"] in prompt]
    return [words for line in lines if "…" not in line and (words := shlex.split(line)) and not {"|", ">"} & {*words}]


def mentions() -> Iterator[tuple[str, re.Match[str]]]:
    """Every command that a page, a message, a docstring or a comment names."""
    packages = ("orchestration", "actors", "pipelines", "policies", "benchmarks", "configs", "docs", "deploy", "models")
    below = [path for package in packages for path in (CHECKOUT / package).rglob("*.*") if path.is_file()]
    for path in [*below, *CHECKOUT.glob("*.*")]:
        if path.suffix in {".py", ".md", ".yaml", ".html", ".txt", ".toml"}:
            yield from ((path.name, found) for found in MENTION.finditer(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", TEXTS)
def test_what_a_page_names_is_there(name: str) -> None:
    page = next(page for page in PAGES if page.name == name)
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXTS[name]):
        assert (page.parent / target).exists(), target
    tops = "orchestration|actors|pipelines|policies|tests|benchmarks|configs|docs"
    for path in re.findall(rf"`((?:{tops})/[\w./-]+)`", TEXTS[name]):
        assert (CHECKOUT / path).exists() or path.startswith("configs/mine"), path
    for module in re.findall(r"python -m ((?:benchmarks|tests|orchestration|pipelines)[\w.]*)", TEXTS[name]):
        assert importlib.util.find_spec(module), module


def test_every_metric_is_on_its_page() -> None:
    words = ["reward.function={strict: 1, jpeg_compressibility: 1}", "training.depth=1"]
    config = load_config(EXPERIMENTS["ddpo"].schema, None, words)
    names = {f"first_update_error/timestep_{n:02d}" for n in range(3)} | {"sick", "seconds/evaluate", "seconds/commit"}
    names |= {*ddpo_metrics(config, ["a"], ["b"]), *(f"claims/{outcome}" for outcome in OUTCOMES)}
    names |= {f"calibration/{case}" for case in ("true", "shuffled", "noise")}
    names |= {metric for kind in GENERATORS.built_in.values() for metric in kind.metrics}
    page = {re.sub(r"<\w+>", "*", name) for name in re.findall(r"`([^`]+)`", TEXTS["metrics.md"])}
    assert not {name for name in names if not any(fnmatchcase(name, known) for known in page)}
    rows = [line.split("|")[1:-1] for line in TEXTS["metrics.md"].splitlines() if line.startswith("| `")]
    assert all(cell.strip() for row in rows for cell in row[:3])
    assert len({*map(len, rows)}) == 2  # MAD's say the family, too


def parse(words: list[str]) -> None:
    """Raises what the command line library does for a command, an option or an argument that there is not."""
    command: Any = typer.main.get_group(app)
    rest = words
    while hasattr(command, "commands"):
        assert rest[0] in command.commands, words
        command, rest = command.commands[rest[0]], rest[1:]
    with command.make_context(words[0], list(rest)) as context:
        assert not context.args, words
        if words[0] == "submit":
            parse(context.params["words"])


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if commands(text)])
def test_commands_of_a_page_have_these_options(name: str) -> None:
    for words in commands(TEXTS[name]):
        parse(words)
    for words in commands(TEXTS[name], "    "):
        start = words.index("--") + 1 if words[0] == "submit" else 0
        name, *rest = words[start:]
        if name in EXPERIMENTS:
            with typer.main.get_group(app).commands[name].make_context(name, rest) as context:
                files = [CHECKOUT / path for path in context.params["config"] or ()]
            if all(path.exists() for path in files):  # not those of an example
                load_config(EXPERIMENTS[name].schema, files, context.params["overrides"] or ())


def test_commands_that_are_named_anywhere_are_there() -> None:
    group, seen = typer.main.get_group(app), 0
    for where, found in mentions():
        command: Any = group.commands.get(found[1])
        assert command, (where, found[0])
        if hasattr(command, "commands") and found[2]:
            command = command.commands.get(found[2])
            assert command, (where, found[0])
        options = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
        assert {*re.findall(r"(?<=\s)--[a-z-]+", found[3].split(" -- ")[0])} <= options, (where, found[0])
        seen += 1
    assert seen > 150


def test_every_configuration_file_is_of_an_experiment() -> None:
    for path in sorted((CHECKOUT / "configs").glob("*/*.yaml")):
        schema = EXPERIMENTS.get({"sweeps": "sweep", "studies": "study"}.get(path.parent.name, path.parent.name))
        if schema is not None:
            load_config(schema.schema, path)
        elif path.parent.name == "guards":
            read_guard(str(path))
        else:
            assert path.parent.name in ("scale", "recipes"), path  # parts of a DDPO configuration
            base = CHECKOUT / "configs/ddpo/digits.yaml"
            load_config(EXPERIMENTS["ddpo"].schema, [base, path])
        assert yaml.safe_load(path.read_text(encoding="utf-8")), path
