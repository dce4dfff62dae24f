"""What a run, a job or a dashboard would trip over, found beforehand: each finding is well, or says what to do."""

import contextlib
import os
import platform
import shutil
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.text import Text

from orchestration.cluster.ray_cluster import check_scratch
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.runs.config import ConfigError, load_config
from pipelines.limits import cpu_limit, memory_limit
from pipelines.storage.locations import CHECKOUT, find

_FREE_BYTES = 5e9  # ample for the default models; below it a larger one will not end well
_SECONDS = 10  # for one answer over the network


@dataclass(frozen=True)
class Finding:
    """``fix`` is what to do; None if all is well."""

    text: str
    fix: str | None = None

    def __rich__(self) -> Text:
        if self.fix is None:
            return Text.assemble(("ok   ", "green"), self.text)
        return Text.assemble(("FIX  ", "bold red"), f"{self.text}: {self.fix}")


def examine(address: str | None, tracking_uri: str | None, config: Path | Sequence[Path] | None) -> Iterator[Finding]:
    """Every finding, as it is made. Raises ConfigError if ``config`` is not a DDPO configuration."""
    settings = load_config(DdpoConfig, config, [f"tracking.uri={tracking_uri}"] if tracking_uri else [])
    checks = {"packages": _packages(), "GPU": _gpus(), "machine": _machine(), "disk": _disk()}
    checks |= {"models": _models(settings), "Ray": _ray(address), "MLflow": _mlflow(settings.tracking.uri)}
    for name, findings in checks.items():
        try:
            yield from findings
        except Exception as error:  # whatever it is, the other checks are still worth making
            yield Finding(name, " ".join(str(error).split()) or type(error).__name__)


def _packages() -> Iterator[Finding]:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    python, wanted = platform.python_version(), project["requires-python"]
    fits = SpecifierSet(wanted).contains(python, prereleases=True)
    yield Finding(f"Python {python}", None if fits else f"make a new environment with one that is {wanted}")
    for requirement in map(Requirement, project["dependencies"]):
        found = next((each.version for each in distributions(name=requirement.name)), "(none)")
        if found == "(none)" or not requirement.specifier.contains(found, prereleases=True):
            yield Finding(f"{requirement.name} {found}", f"pip install '{requirement}'")
    yield Finding(f"{len(project['dependencies'])} packages held against pyproject.toml")


def _gpus() -> Iterator[Finding]:
    if shutil.which("nvidia-smi") is None:
        yield Finding("no NVIDIA driver: models run on the processor")
        return
    import torch

    if not torch.cuda.is_available():
        remedy = "install a torch built for CUDA, and see whether nvidia-smi lists the GPU"
        yield Finding(f"an NVIDIA driver is here, but torch {torch.__version__} cannot use it", remedy)
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        yield Finding(f"GPU {number}: {name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")


def _machine() -> Iterator[Finding]:
    check_scratch()
    whole, given = psutil.virtual_memory().total, memory_limit()
    of = f" of {whole / 1e9:.1f}" if given < whole else ""
    yield Finding(f"{cpu_limit()} of {os.cpu_count()} CPUs and {given / 1e9:.1f}{of} GB of memory may be used")


def _disk() -> Iterator[Finding]:
    for place, use in ((Path.cwd(), "runs"), (Path(tempfile.gettempdir()), "Ray's own files")):
        free = shutil.disk_usage(place).free
        remedy = None if free >= _FREE_BYTES else f"{_FREE_BYTES / 1e9:.0f} GB are wanted: make room, or work elsewhere"
        yield Finding(f"{free / 1e9:.1f} GB free in {place}, for {use}", remedy)


def _models(config: DdpoConfig) -> Iterator[Finding]:
    from orchestration.experiments.ddpo.preflight import preflight_ddpo

    try:
        preflight_ddpo(config.model_copy(update={"output_dir": None}))
    except ConfigError as error:
        yield Finding("the configuration cannot be run here", str(error))
        return
    models = [config.model.path, config.captioner.path, config.evaluation.evaluator]
    models += [path for options in config.reward.functions.values() for path in options.model_paths.values()]
    for model in filter(None, models):
        place = find(model)
        yield Finding(f"model {model} in {place}") if place else _hub_model(model)


def _hub_model(name: str) -> Finding:
    from huggingface_hub import model_info, snapshot_download

    with contextlib.suppress(OSError):  # it has not been fetched yet
        return Finding(f"model {name} in {snapshot_download(name, local_files_only=True)}")
    try:
        model_info(name, timeout=_SECONDS)
        return Finding(f"model {name} on the hub")
    except Exception as error:
        reason = " ".join(str(error).split())
        return Finding(f"model {name} cannot be fetched", f"{reason}; name a directory, or set HF_TOKEN if it is gated")


def _ray(address: str | None) -> Iterator[Finding]:
    from orchestration.cluster.jobs import connect, named_server

    server = named_server(address)
    if server is None:
        yield Finding("no job server is named (--address): a run starts a Ray of its own, on loopback")
        return
    connect(server)
    import requests

    is_open = requests.get(f"{server}/api/jobs/", timeout=_SECONDS).ok
    remedy = "start its head with RAY_AUTH_MODE=token" if is_open else None
    yield Finding(f"Ray at {server} takes {'jobs without a' if is_open else 'this'} token", remedy)


def _mlflow(uri: str | None) -> Iterator[Finding]:
    if uri is None:
        yield Finding("no MLflow server is named (--tracking-uri): a run keeps its own store")
        return
    from orchestration.tracking.store import MlflowStore

    store = MlflowStore(uri)
    store.check()
    with store.named("writing"):
        run = store.client.create_run(store.experiment("ouroboros-doctor", None))
        try:
            store.client.log_artifact(run.info.run_id, str(CHECKOUT / "pyproject.toml"))
        finally:
            store.client.delete_run(run.info.run_id)
    yield Finding(f"MLflow at {uri} takes runs and artifacts")
