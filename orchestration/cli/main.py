"""The ``ouroboros`` command. Light to start: everything heavy is imported by the command that needs it."""

import gc
import os
import re
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
import yaml
from pydantic import BaseModel

from orchestration.api import read, stopped_once
from orchestration.cli import options as common
from orchestration.cli.drag import drag
from orchestration.cli.jobs import jobs_app
from orchestration.cli.runs import runs_app
from orchestration.cluster.forks import leave
from orchestration.experiments.experiment import Experiment
from orchestration.experiments.registry import EXPERIMENTS, experiment_of
from orchestration.runs import run as run_directories
from orchestration.runs.browse import find_run
from orchestration.runs.config import ConfigError, about, override, visible
from orchestration.runs.display import Terminal
from orchestration.runs.manifest import check_links, read_manifest
from pipelines.storage.atomic import DamagedFiles

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130

app = typer.Typer(name="ouroboros", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(runs_app, name="runs")
app.add_typer(jobs_app, name="jobs")
reward_app = typer.Typer(help="Rewards: try them out before they teach, serve them.", no_args_is_help=True)
app.add_typer(reward_app, name="reward")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ouroboros {version('ouroboros-rl')}")
        raise typer.Exit


@app.callback()
def ouroboros(
    wanted: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print it")] = False,
) -> None:
    """Two loops over generative models on Ray, tracked in MLflow: DDPO and MAD."""


@app.command()
def ddpo(
    overrides: common.Overrides = None,
    config: common.File = None,
    dry_run: common.DryRun = False,
    tracking_uri: common.Server = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="a dry run for so many, there or not")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="tell where the time went; a trace for Perfetto")] = False,
) -> None:
    """Train a diffusion model with a reward (DDPO)."""
    from orchestration.cluster.ray_cluster import imagine_machine

    experiment, settings = EXPERIMENTS["ddpo"], _read("ddpo", config, overrides, tracking_uri)
    if dry_run or gpus:
        return _print_plan(experiment, settings, imagine_machine(gpus) if gpus else None)
    path = experiment.run(settings, profile=profile)
    if profile:
        from orchestration.runs.timeline import render_profile, write_trace

        Terminal().print(render_profile(path.parent))
        print(write_trace(path.parent))
    print(path)


@app.command()
def plan(
    overrides: common.Overrides = None,
    config: common.File = None,
    gpus: Annotated[
        str | None, typer.Option(help="so many, there or not, as in 8,64,512; without: this machine")
    ] = None,
    costs: Annotated[Path | None, typer.Option(help="stage costs that --save wrote; none: they are measured")] = None,
    save: Annotated[Path | None, typer.Option(help="write the stage costs to this file")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="dollars an hour of a GPU, or of a CPU machine")] = None,
    tflops: Annotated[float, typer.Option(min=1, help="what a GPU keeps up, where there is none to measure")] = 300.0,
    as_json: common.Json = False,
) -> None:
    """Foresee a DDPO run: time, memory, price, what limits it, and how many should draw and learn."""
    from orchestration.planning.plan import facts, plan_run, render

    counts = gpus.split(",") if gpus else []
    if not all(count.isdecimal() and int(count) for count in counts):
        raise ConfigError(f"--gpus {gpus} is not a number of GPUs, or several as in 8,64,512")
    settings = _read("ddpo", config, overrides)
    options, known = plan_run(settings, [int(count) for count in counts], costs, save, tflops)
    Terminal().show(facts(options, known, price), render, as_json, wraps=False)


def _command_of(experiment: Experiment) -> Callable[..., None]:
    """The command of an experiment, whose docstring's first line is its help."""

    def command(
        overrides: common.Overrides = None,
        config: common.File = None,
        dry_run: common.DryRun = False,
        tracking_uri: common.Server = None,
    ) -> None:
        settings = _read(experiment.name, config, overrides, tracking_uri)
        if dry_run:
            return _print_plan(experiment, settings)
        print(experiment.run(settings))

    command.__doc__ = experiment.__doc__
    return command


for _experiment in EXPERIMENTS.values():
    if _experiment.name != "ddpo":  # it has options of its own
        app.command(_experiment.name)(_command_of(_experiment))


@app.command()
def resume(
    run: common.RunName,
    root: common.Root = Path("runs"),
    trust: common.Trust = False,
    accept_changes: common.Changes = False,
) -> None:
    """Go on with an interrupted run, from what it has committed and in the same MLflow run."""
    directory = find_run(run, root).directory
    print(experiment_of(read_manifest(directory)["loop"]).resume(directory, trust, accept_changes))


@app.command()
def sync(run: common.RunName, root: common.Root = Path("runs"), trust: common.Trust = False) -> None:
    """Deliver to MLflow what an interrupted run left undelivered."""
    left = run_directories.sync(find_run(run, root).directory, print, trusted=trust)
    print(f"{left} records are left" if left else "everything is delivered")
    if left:
        raise typer.Exit(1)


@app.command()
def lineage(
    run: common.RunName,
    sample: Annotated[str, typer.Argument(metavar="SAMPLE", help="ARM/SEED/GENERATION, or with a /NUMBER")],
    root: common.Root = Path("runs"),
    trust: common.Trust = False,
) -> None:
    """Walk from a sample of a MAD run back to the real data."""
    from orchestration.experiments.mad.lineage import render_lineage

    Terminal().print(render_lineage(find_run(run, root).directory, sample, trust))


@app.command()
def report(run: common.RunName, root: common.Root = Path("runs"), trust: common.Trust = False) -> None:
    """Write a run's report.html, done or not."""
    from orchestration.experiments.ddpo.report import draw
    from orchestration.runs.html_report import write_report

    found = find_run(run, root)
    if not trust:
        check_links(found.directory)
    if found.loop == "ddpo":
        draw(found.directory, lambda line: print(visible(line), file=sys.stderr))
    try:
        print(write_report(found.directory))
    except PermissionError as error:
        raise ConfigError(
            f"{found.directory} cannot be written to ({error.strerror}): copy it, report the copy"
        ) from error


@app.command()
def generate(
    source: Annotated[str, typer.Argument(metavar="RUN|DIRECTORY", help="a run, a checkpoint, a diffusers pipeline")],
    prompt: Annotated[list[str], typer.Option(help="what to draw; may be given several times")],
    seed: Annotated[int, typer.Option(help="seed of the first image of each prompt")] = 0,
    count: Annotated[int, typer.Option(min=1, help="images of each prompt")] = 1,
    output: Annotated[Path, typer.Option(help="directory for the PNG files")] = Path("generated"),
    guard: Annotated[str | None, typer.Option(help="YAML file: what may be asked for and come out")] = None,
    root: common.Root = Path("runs"),
    trust: common.Trust = False,
) -> None:
    """Draw images with what a run has learned."""
    from orchestration.experiments.ddpo.generate import generate as draw

    pairs = [(text, seed + offset) for text in prompt for offset in range(count)]
    place = Path(source).expanduser()
    if not place.exists() and place.parent == Path():
        place = find_run(source, root).directory
    for path in draw(place, [p for p, _ in pairs], [s for _, s in pairs], output, trust, guard):
        print(path)


app.command()(drag)


@app.command("config")
def print_reference(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="one that it lists, or module:Class")] = None,
    key: Annotated[str | None, typer.Argument(metavar="KEY|BLOCK", help="such as training.steps")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="print all of it as a page")] = False,
    as_json: common.Json = False,
) -> None:
    """Look up settings: key, type, default and meaning."""
    from orchestration.experiments import reference

    if markdown:
        return print(reference.page(), end="")
    Terminal().show(reference.reference(name, key), reference.render, as_json)


@app.command()
def pretrain(
    recipe: Annotated[str, typer.Option(help="digits, or digits-attention: attention at 8×8, two canvases")] = "digits",
    output: Annotated[Path | None, typer.Option(help="directory to build in; by default models/RECIPE")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    train_workers: Annotated[int, typer.Option(min=1, help="workers that share each training, by Ray Train")] = 1,
) -> None:
    """Rebuild the default models from scratch (about half an hour of CPU time)."""
    from pipelines.default_models.pretrain import RECIPES

    if recipe not in RECIPES:
        raise ConfigError(f"--recipe: there is no {recipe!r}, choose {' or '.join(RECIPES)}")
    output = output or Path("models", recipe)
    with about("--output"):
        if train_workers > 1:
            from orchestration.cluster.building import build_together

            build_together(output, seed, train_workers, recipe)
        else:
            from pipelines.default_models.pretrain import pretrain as build

            build(output, seed, recipe=recipe)


@app.command()
def submit(
    words: Annotated[list[str], typer.Argument(metavar="-- ddpo|mad|study|sweep|resume", help="as after 'ouroboros'")],
    address: common.Address = None,
    job_id: common.NewId = None,
    output_root: Annotated[str, typer.Option(help="on the cluster: new runs are put below it")] = "~/ouroboros-runs",
    follow: common.Follow = True,
) -> None:
    """Run one of the loops as a job of a cluster, on the code of this working tree."""
    from orchestration.cluster.jobs import Job, launch, packed

    name = words[0]
    if name not in {*EXPERIMENTS, "resume"}:
        raise ConfigError(f"a job runs {', '.join(EXPERIMENTS)} or resume, not {name!r}")
    given = typer.main.get_group(app).commands[name].make_context(name, words[1:]).params
    package = packed(Path.cwd())
    if name == "resume":
        job = Job.resume(words, str(given["run"]), job_id)
    else:
        settings = _read(name, given["config"], given["overrides"], given["tracking_uri"])
        texts = (
            settings.model_dump_json() + getattr(settings, "example", settings).model_dump_json()
        )  # of a sweep a trial
        own = map(Path, re.findall(r'"([^"]+\.py):\w+"', texts))
        if left := [path for path in (*(given["config"] or ()), *own) if path not in package[0]]:
            raise ConfigError(f"{left[0]} is not a file that a job gets, by its path from here: see docs/jobs.md")
        job = Job.start(words, settings, output_root, job_id)
    raise typer.Exit(launch(job, package, address, follow))


@app.command()
def mlflow(
    directory: Annotated[Path, typer.Option(help="for database, artifacts and log")] = Path("mlflow"),
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option()] = 5000,
    backend_store_uri: Annotated[
        str | None, typer.Option(envvar="MLFLOW_BACKEND_STORE_URI", help="without it, SQLite in the directory")
    ] = None,
    allowed_hosts: Annotated[str | None, typer.Option(help="names by which browsers may call it, with commas")] = None,
    basic_auth: Annotated[bool, typer.Option("--basic-auth", help="ask for a user and a password")] = False,
) -> None:
    """Run an MLflow server, with artifacts through it."""
    from orchestration.tracking.server import serve

    serve(directory.resolve(), host, port, backend_store_uri, allowed_hosts, basic_auth)


@app.command()
def doctor(
    address: common.Address = None,
    tracking_uri: common.Server = None,
    config: common.File = None,
    as_json: common.Json = False,
) -> None:
    """Look for what a run would trip over; each line is ok, or says what to do."""
    from orchestration.planning.doctor import examine

    found = []
    for finding in examine(address, tracking_uri, config):
        found.append({"ok": finding.fix is None, "text": finding.text, "fix": finding.fix})
        if not as_json:
            Terminal().print(finding, soft_wrap=True)
    if as_json:
        Terminal().document(found)
    raise typer.Exit(0 if all(each["ok"] for each in found) else FAILED)


@reward_app.command()
def check(overrides: common.Overrides = None, config: common.File = None) -> None:
    """Look at a run's rewards before it: what they tell apart, how they rank, what they cost; can they teach?"""
    from orchestration.experiments.ddpo.reward_check import check as look
    from orchestration.experiments.ddpo.reward_check import render

    findings = look(_read("ddpo", config, overrides))
    Terminal().print(render(findings))
    raise typer.Exit(FAILED if any(each.objection for each in findings.values()) else 0)


@reward_app.command()
def audit(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="REWARD|KEY=VALUE", help="which functions, none: all; and settings")
    ] = None,
    config: common.File = None,
    images: Annotated[int, typer.Option(min=2, help="images, each of another prompt")] = 24,
    steps: Annotated[int, typer.Option(min=1, help="of a search by gradients")] = 200,
    views: Annotated[int, typer.Option(min=0, help="moved and scaled views a step; 0: the image as it is")] = 0,
    queries: Annotated[int, typer.Option(min=20, max=2000, help="an image, of a search without gradients")] = 2000,
    where: Annotated[
        Literal["pixels", "latents"] | None,
        typer.Option(help="pixels or latents; none: by gradients pixels, else latents"),
    ] = None,
    output: Annotated[Path, typer.Option(help="directory for the pictures")] = Path("audit"),
) -> None:
    """Look for images that please a run's rewards and show nothing: what can they be fooled with?"""
    from orchestration.experiments.ddpo.reward_audit import audit as look
    from orchestration.experiments.ddpo.reward_audit import render
    from policies.inverting import InvertingSettings

    named = [each for each in words or () if "=" not in each]
    settings = _read("ddpo", config, [each for each in words or () if "=" in each])
    how = InvertingSettings(steps=steps, views=views, queries=queries)
    findings = look(settings, named, images, how, where, output, Terminal().print)
    Terminal().print(render(findings))
    raise typer.Exit(FAILED if any(verdict == "easily fooled" for _, verdict in findings.values()) else 0)


@reward_app.command("serve")
def serve_reward(
    name: Annotated[str, typer.Argument(metavar="REWARD", help="as in reward.function: built in, or file.py:function")],
    options: Annotated[list[str] | None, typer.Argument(metavar="OPTION=VALUE", help="of the reward")] = None,
    host: Annotated[str, typer.Option(help="address to listen on; beyond loopback a token is needed")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8100,
    device: Annotated[str, typer.Option(help="where its model is, such as cuda")] = "cpu",
    token_file: Annotated[Path | None, typer.Option(help="its token; else OUROBOROS_REWARD_TOKEN")] = None,
) -> None:
    """Answer the reward 'http' of runs elsewhere with a reward of this machine."""
    from orchestration.tracking.server import reaches_only_this_machine
    from pipelines.rewards import load_reward, parse_options
    from pipelines.rewards.server import HOW_TO_MAKE_ONE, TOKEN_VARIABLE, read_token, serve

    given: dict[str, Any] = {}
    for each in options or ():
        override(given, each)
    with about():
        reward, token = parse_options(name, given), read_token(token_file)
        if not reaches_only_this_machine(host, port) and token is None:
            raise ConfigError(
                f"--host {host} lets others ask: give {TOKEN_VARIABLE} or --token-file; {HOW_TO_MAKE_ONE}"
            )
        resolved = reward.resolved(name)
        if resolved.of_videos:
            raise ConfigError(f"{name} scores videos, and a server is sent images: name it in the run itself")
        resolved.check_call(name)
        function = load_reward(name, reward, device)
    whom = " those who have the token" if token else ""
    print(f"http://{host}:{port}/score answers{whom} with {name}, described by http://{host}:{port}/docs", flush=True)
    serve(name, function, reward, host, port, token)


def _read(name: str, paths: list[Path] | None, overrides: list[str] | None, tracking_uri: str | None = None) -> Any:
    server = [f"tracking.uri={tracking_uri}"] if tracking_uri else []
    return read(name, paths or (), [*(overrides or ()), *server])


def _print_plan(experiment: Experiment, settings: BaseModel, machine: Any = None) -> None:
    description = experiment.plan(settings, machine)
    print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    print(description, end="")


def program() -> NoReturn:
    """Entry point."""
    code = FAILED
    try:
        main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    except KeyboardInterrupt:
        code = INTERRUPTED
    finally:
        leave(code)


def main() -> None:
    """A command: an error becomes one line and an exit code, and SIGTERM ends a run as Ctrl-C does."""
    gc.set_threshold(100_000, 20, 50)  # the many objects of libraries stay, and each look at them takes time
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    while (nowhere := os.open(os.devnull, os.O_RDWR)) < 3:  # a closed stream's number is given to the next file
        pass
    os.close(nowhere)
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")
    with stopped_once():
        try:
            code = app(standalone_mode=False) or 0
            if code == INTERRUPTED:
                # All is closed by now, and Ray's threads may still be starting: what is to run at the end may crash.
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            sys.exit(code)
        except Exception as error:
            sys.exit(_report(error))


def _report(error: Exception) -> int:
    """Print an error as people need it and return the exit code."""
    show = getattr(error, "show", None)  # what the command line library says of wrong arguments
    if show is not None:
        show()
        return BAD_INPUT
    for note in getattr(error, "__notes__", ()):  # the traceback of a user's own code
        print(visible(note), file=sys.stderr)
    if isinstance(error, ConfigError | DamagedFiles):
        print(visible(f"ouroboros: {error}"), file=sys.stderr)
        return BAD_INPUT
    if os.environ.get("OUROBOROS_TRACEBACK"):
        traceback.print_exception(error)
    print(visible(f"ouroboros: {type(error).__name__}: {error}".rstrip(": ")), file=sys.stderr)
    return FAILED
