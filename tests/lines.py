"""Lines of source without blanks, comments and docstrings, by package: ``python -m tests.lines``."""

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def count(text: str) -> int:
    """Lines of a module that hold code."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, documented) and ast.get_docstring(n) is not None]
    words = {line for node in nodes for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)}
    tokens = [each for each in tokenize.generate_tokens(io.StringIO(text).readline) if each.type not in _NO_CODE]
    return len({line for each in tokens for line in range(each.start[0], each.end[0] + 1)} - words)


if __name__ == "__main__":
    lines: Counter[str] = Counter()
    for package in ("orchestration", "actors", "pipelines", "policies", "benchmarks", "tests"):
        for path in Path(package).rglob("*.py"):
            lines[str(Path(*path.parts[:-1][:3]))] += count(path.read_text())
            lines[package + " in all"] += count(path.read_text())
    print(*(f"{number:7,}  {name}" for name, number in sorted(lines.items())), sep="\n")
    source = sum(lines[f"{package} in all"] for package in ("orchestration", "actors", "pipelines", "policies"))
    print(f"{source:7,}  source in all, apart from benchmarks and tests")
