"""``ouroboros runs``: look at the runs there are."""

from pathlib import Path
from typing import Annotated

import typer

from orchestration.cli.options import Json, Overrides, Root, RunName, RunNames, Trust
from orchestration.runs import browse
from orchestration.runs import run as run_directories
from orchestration.runs.browse import find_run
from orchestration.runs.config import ConfigError
from orchestration.runs.display import Terminal

runs_app = typer.Typer(help="Look at the runs there are.", no_args_is_help=True)


@runs_app.command("list")
def list_command(root: Root = Path("runs"), as_json: Json = False) -> None:
    """One line a run."""
    found = [browse.facts(run) for run in browse.list_runs(root)]
    Terminal().show(found, lambda runs: browse.render_list(runs) if runs else f"no runs under {root}", as_json)


@runs_app.command()
def fork(
    run: RunName,
    overrides: Overrides = None,
    step: Annotated[int | None, typer.Option(help="the commit to begin from; without it, the newest")] = None,
    root: Root = Path("runs"),
    trust: Trust = False,
) -> None:
    """Make a DDPO run that begins at a commit of another, with other settings from there on."""
    from orchestration.experiments.ddpo.run import DdpoRun

    directory = DdpoRun.fork(find_run(run, root).directory, overrides or [], step, trust)
    print(f"go on with: ouroboros resume {directory}")


@runs_app.command()
def rm(
    names: RunNames, root: Root = Path("runs"), yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False
) -> None:
    """Remove runs from the disk. What MLflow knows of them stays."""
    found = [find_run(name, root, whole=yes) for name in names]
    if yes or typer.confirm(f"remove {', '.join(str(each.directory) for each in found)}?"):
        for each in found:
            browse.remove(each)


@runs_app.command()
def register(
    run: RunName,
    name: Annotated[str, typer.Argument(metavar="MODEL", help="name of the registered model")],
    alias: Annotated[str, typer.Option(help="what this version is called from now on")] = "best",
    root: Root = Path("runs"),
    trust: Trust = False,
) -> None:
    """Make the pipeline of a finished DDPO run a version of an MLflow model."""
    print(run_directories.register(find_run(run, root).directory, name, alias, print, trusted=trust))


@runs_app.command()
def show(run: RunName, root: Root = Path("runs"), as_json: Json = False) -> None:
    """Everything about one run."""
    Terminal().show(browse.everything(find_run(run, root)), browse.render_show, as_json)


@runs_app.command()
def compare(
    names: RunNames,
    weights: Annotated[bool, typer.Option("--weights", help="what moved from the first's to the second's")] = False,
    mask: Annotated[
        list[Path] | None, typer.Option(help="with --weights: neurons.safetensors of a concept; may be repeated")
    ] = None,
    root: Root = Path("runs"),
    as_json: Json = False,
) -> None:
    """Runs side by side: what differs in their configuration, and what came out; or the weights of two, of which each
    may be the directory of a pipeline."""
    if len(names) < 2:
        raise ConfigError("one run cannot be compared: name two or more, or see it with 'ouroboros runs show'")
    if mask and not weights:
        raise ConfigError("--mask says of which concepts the weights that moved are: give --weights, too")
    if weights:
        from orchestration.runs.moved import find_pipeline, moved, render_moved

        if len(names) > 2:
            raise ConfigError(f"--weights compares two: the base and what was trained from it, not {len(names)}")
        base, trained = (find_pipeline(name, root) for name in names)
        return Terminal().show(moved(base, trained, mask or ()), render_moved, as_json)
    found = browse.compared([find_run(name, root) for name in names])
    Terminal().show(found, browse.render_compare, as_json)
