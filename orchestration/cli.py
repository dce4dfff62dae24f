"""The ``ouroboros`` command. Light to start: everything heavy is imported by the command that needs it."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
import yaml
from pydantic import BaseModel
from rich.console import Console

from orchestration.config import Config, ConfigError, DdpoConfig, load_config

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130

app = typer.Typer(
    name="ouroboros",
    help="Two loops over generative models on Ray, tracked in MLflow: DDPO and MAD.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
runs_app = typer.Typer(help="Look at the runs there are.", no_args_is_help=True)
app.add_typer(runs_app, name="runs")

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as training.steps=20")]
File = Annotated[Path | None, typer.Option(help="YAML file; without it, all defaults")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print what would be run, and stop")]
Server = Annotated[str | None, typer.Option(help="MLflow server; the same as tracking.uri=…")]
RunDirectory = Annotated[Path, typer.Argument(metavar="RUN", help="a run's directory")]
Root = Annotated[Path, typer.Option(help="where the runs are")]


@app.command()
def ddpo(
    overrides: Overrides = None, config: File = None, dry_run: DryRun = False, tracking_uri: Server = None
) -> None:
    """Train a diffusion model with a reward (DDPO)."""
    from orchestration.preflight import describe, preflight

    settings = _read(DdpoConfig, config, overrides, tracking_uri)
    if dry_run:
        return _print_plan(settings, describe(settings, preflight(settings)))
    from orchestration.ddpo import run_ddpo

    print(run_ddpo(settings))


@app.command()
def mad(overrides: Overrides = None, config: File = None, dry_run: DryRun = False, tracking_uri: Server = None) -> None:
    """Train generators on their own samples (MAD). The same command again goes on with what output_dir holds."""
    from orchestration.mad_config import MadConfig
    from orchestration.mad_preflight import describe_mad, preflight_mad

    settings = _read(MadConfig, config, overrides, tracking_uri)
    if dry_run:
        return _print_plan(settings, describe_mad(settings, preflight_mad(settings)))
    from orchestration.mad import run_mad

    print(run_mad(settings))


@app.command()
def resume(run: RunDirectory) -> None:
    """Go on with an interrupted run, from what it has committed and in the same MLflow run."""
    from orchestration.run import read_manifest

    if read_manifest(run).get("loop") == "mad":
        from orchestration.mad import resume_mad

        print(resume_mad(run))
        return
    from orchestration.ddpo import resume_ddpo

    print(resume_ddpo(run))


@app.command()
def lineage(
    run: RunDirectory,
    sample: Annotated[
        str, typer.Argument(metavar="SAMPLE", help="ARM/SEED/GENERATION/NUMBER, or without its last parts")
    ],
) -> None:
    """Walk from a sample of a MAD run back to the real data."""
    from orchestration.lineage import render_lineage

    Console().print(render_lineage(run, sample))


@app.command()
def generate(
    source: Annotated[Path, typer.Argument(help="a run, one of its checkpoints, or a diffusers directory")],
    prompt: Annotated[list[str], typer.Option(help="what to draw; may be given several times")],
    seed: Annotated[int, typer.Option(help="seed of the first image of each prompt")] = 0,
    count: Annotated[int, typer.Option(min=1, help="images of each prompt")] = 1,
    output: Annotated[Path, typer.Option(help="directory for the PNG files")] = Path("generated"),
) -> None:
    """Draw images with what a run has learned."""
    from orchestration.generate import generate as draw

    pairs = [(text, seed + offset) for text in prompt for offset in range(count)]
    for path in draw(source, [p for p, _ in pairs], [s for _, s in pairs], output):
        print(path)


@app.command()
def pretrain(
    output: Annotated[Path, typer.Option(help="directory to build the default models in")] = Path("models/digits"),
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Rebuild the default models from scratch (about half an hour of CPU time)."""
    from pipelines.recipe.pretrain import pretrain as build

    build(output, seed)


@runs_app.command("list")
def list_command(root: Root = Path("runs")) -> None:
    """One line a run."""
    from orchestration.runs import list_runs, render_list

    Console().print(render_list(list_runs(root)))


@runs_app.command()
def show(run: Annotated[str, typer.Argument(metavar="RUN")], root: Root = Path("runs")) -> None:
    """Everything about one run."""
    from orchestration.runs import render_show

    Console().print(render_show(run, root))


@runs_app.command()
def compare(names: Annotated[list[str], typer.Argument(metavar="RUN...")], root: Root = Path("runs")) -> None:
    """Runs side by side: what differs in their configuration, and what came out."""
    from orchestration.runs import render_compare

    Console().print(render_compare(names, root))


def _read(schema: type[Config], path: Path | None, overrides: list[str] | None, tracking_uri: str | None) -> Config:
    server = [f"tracking.uri={tracking_uri}"] if tracking_uri else []
    return load_config(schema, path, [*(overrides or []), *server])


def _print_plan(settings: BaseModel, description: str) -> None:
    print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    print(description)


def main() -> None:
    """Entry point: an error becomes one line and an exit code, and SIGTERM ends a run as Ctrl-C does."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        code = app(standalone_mode=False) or 0
        if code == INTERRUPTED:
            # All is closed by now. Ray's threads may still be starting, and the interpreter's end under them crashes.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)
    except Exception as error:
        sys.exit(_report(error))


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Stop once: closing takes seconds, and a second Ctrl-C must not leave it half done."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def _report(error: Exception) -> int:
    """Print an error as people need it and return the exit code."""
    show = getattr(error, "show", None)  # what the command line library says of wrong arguments
    if show is not None:
        show()
        return BAD_INPUT
    if isinstance(error, ConfigError):
        print(f"ouroboros: {error}", file=sys.stderr)
        return BAD_INPUT
    if os.environ.get("OUROBOROS_TRACEBACK"):
        import traceback

        traceback.print_exception(error)
    print(f"ouroboros: {type(error).__name__}: {error}", file=sys.stderr)
    return FAILED


if __name__ == "__main__":
    main()
