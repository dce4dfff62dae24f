"""The structure that no linter knows."""

import ast

import pytest

from pipelines.storage.locations import CHECKOUT

PACKAGES = ("orchestration", "actors", "pipelines", "policies")
MODULES = [path for package in PACKAGES for path in sorted((CHECKOUT / package).rglob("*.py"))]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_what_is_private_to_another(package: str) -> None:
    for path in (path for path in MODULES if path.is_relative_to(CHECKOUT / package)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private, f"{path.relative_to(CHECKOUT)} imports {private} of {node.module}"


def test_modules_are_short_and_say_what_they_are_for() -> None:
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 450, path
        assert ast.get_docstring(ast.parse(text)), path


def test_the_page_of_ddpo_is_read_in_one_go() -> None:
    tree = ast.parse((CHECKOUT / "orchestration/experiments/ddpo/loop.py").read_text(encoding="utf-8"))
    lines = [
        node.end_lineno - node.lineno + 1 for node in tree.body if isinstance(node, ast.FunctionDef) and node.end_lineno
    ]
    assert sum(lines[-2:]) <= 80  # the loop, and what surrounds it
