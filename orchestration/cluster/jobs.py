"""Jobs: runs of the working tree on a cluster, through Ray's job server.

What can be known here fails here, before anything is sent. A job's run lies outside the directory that Ray unpacks for
the job and removes after it: whatever ends the job, its last commit stands, and another job goes on from there.
"""

import logging
import os
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from rich.table import Table
from rich.text import Text

from orchestration.cluster.package import excludes, shipped_files
from orchestration.cluster.ray_cluster import environment
from orchestration.runs.config import ConfigError, about, visible
from orchestration.runs.display import duration, plain_table
from orchestration.runs.tables import ABSENT
from orchestration.tracking.tracker import names_user
from pipelines.storage.names import file_name
from policies.rl.settings import check_name

FAILED, INTERRUPTED = 1, 130

_SERVER, _LOCAL = "RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"
_STOP_SECONDS = 60  # from SIGTERM to SIGKILL: time for a run to close
_LIMIT = 512 * 2**20  # bytes; Ray keeps the package in the memory of the head
_TOKEN = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file that holds the cluster's token"
_REQUEST_SECONDS, _UPLOAD_SECONDS = 30, 600
_PATIENCE_SECONDS = 600  # how long followed logs may be out of reach
_LONGEST_ID = 200  # bytes
_NAMED = 10  # of what is left out
_LOOK_SECONDS, _LOOK_SHARE = 1.0, 0.1  # a look at the logs fetches them whole: a second apart, and seldom if it is slow
for _name in ("_private.runtime_env", "dashboard.modules.dashboard_sdk"):  # what they say is said here
    logging.getLogger(f"ray.{_name}").setLevel(logging.ERROR)
_COLOURS = {"RUNNING": "cyan", "PENDING": "cyan", "SUCCEEDED": "green", "STOPPED": "yellow", "FAILED": "red"}


class ClusterError(RuntimeError):
    """A job server refuses, or cannot do what it was asked."""


class ServerError(ClusterError):
    """A job server does not answer, or stumbles; it may do better later."""


class Cluster(JobSubmissionClient):
    """The job server at an address. Every request has a bound, and fails in one line."""

    def __init__(self, address: str) -> None:
        with environment({_SERVER: address}):  # Ray lets it go before the argument
            super().__init__(address)

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        seconds = _UPLOAD_SECONDS if method == "PUT" else _REQUEST_SECONDS
        try:
            return super()._do_request(method, endpoint, timeout=seconds, **options)
        except AuthenticationError as error:
            reason = "asks for a token" if "Missing" in str(error) else "refuses this token"
            raise ClusterError(f"Ray at {self._address} {reason}: {_TOKEN}") from error
        except requests.RequestException as error:
            reason = "in time" if isinstance(error, requests.Timeout) else "(connection refused or lost)"
            remedy = "is a head running there (docs/jobs.md), and is --address right?"
            raise ServerError(f"Ray at {self._address} does not answer {reason}: {remedy}") from error

    def _raise_error(self, r: requests.Response) -> None:
        reason = (r.text.strip() or "no reason given").splitlines()[-1]
        if r.status_code == 404:
            raise ConfigError(f"Ray at {self._address}: {reason}; see 'ouroboros jobs list'")
        kind = ServerError if r.status_code >= 500 else ClusterError
        raise kind(f"Ray at {self._address}: {reason}")


def named_server(address: str | None) -> str | None:
    """The job server that ``address`` or the environment names. Raises ConfigError if it is no web address."""
    shared = os.environ.get("RAY_ADDRESS", "")
    found = address or os.environ.get(_SERVER) or (shared if shared.startswith("http") else None)
    if found is None:
        return None
    if names_user(found):
        raise ConfigError("the address of a job server may hold no user and password: Ray asks for a token instead")
    if not re.match(r"https?://[^/]", found):
        raise ConfigError(f"{found!r} is not the address of a job server, such as {_LOCAL}")
    return found.rstrip("/")


def connect(address: str | None) -> Cluster:
    """The job server to use, by default that of this machine. Raises ClusterError unless it answers and lets us in."""
    server = named_server(address) or _LOCAL
    try:
        return Cluster(server)
    except ClusterError:
        raise
    except AuthenticationError as error:  # before anything is asked
        raise ClusterError(f"RAY_AUTH_MODE is token, but there is no token here: {_TOKEN}") from error
    except (RuntimeError, ValueError, KeyError) as error:
        raise ClusterError(f"{server} answers, but not as Ray's job server does: correct --address") from error


def packed(tree: Path) -> tuple[dict[Path, int], dict[Path, str]]:
    """What a job gets of a working tree, and what not and why. Raises ConfigError beyond Ray's limit."""
    if not (tree / "orchestration" / "cli" / "main.py").is_file():
        raise ConfigError(f"{tree} is no checkout of this project: change into one, it is what a job is given")
    with about():
        files, left_out = shipped_files(tree)
    parts = Counter[str]()
    for path, size in files.items():
        parts[path.parts[0]] += size
    if parts.total() > _LIMIT:
        largest = ", ".join(f"{name} {_megabytes(size)}" for name, size in parts.most_common(3))
        raise ConfigError(
            f"the working tree has {_megabytes(parts.total())}, and Ray takes {_megabytes(_LIMIT)}; the largest parts: "
            f"{largest}. Name in .gitignore or .rayignore what a job does not need; data belongs on the cluster"
        )
    return files, left_out


@dataclass(frozen=True)
class Job:
    """What a cluster is asked for: the words after ``ouroboros``, and the directory of the run they make there."""

    id: str
    words: tuple[str, ...]
    run: str

    @classmethod
    def start(cls, words: Sequence[str], settings: Any, root: str, name: str | None) -> "Job":
        """A new run with ``settings``, which ``words`` stand for, below ``root`` unless they say where."""
        uri = settings.tracking.uri or ""
        database = Path(uri.removeprefix("sqlite:///"))
        if uri.startswith("sqlite:///") and database.is_relative_to(Path.cwd()):
            _check_lasting("tracking.uri", str(database.relative_to(Path.cwd())))
        identity = _identity(name, f"{words[0]}-{settings.name}")
        run = settings.output_dir or f"{root}/{identity}"
        _check_lasting("output_dir", run)
        return cls(identity, (*words, f"output_dir={run}"), run)

    @classmethod
    def resume(cls, words: Sequence[str], run: str, name: str | None) -> "Job":
        """Go on with the run in a directory of the cluster."""
        _check_lasting("RUN", run)
        return cls(_identity(name, f"resume-{file_name(Path(run).name, 150)}"), tuple(words), run)


def launch(job: Job, package: tuple[dict[Path, int], dict[Path, str]], address: str | None, follow: bool) -> int:
    """Submit a job with the working tree, and follow it if asked to. Returns an exit code."""
    files, left_out = package
    cluster = connect(address)
    for path, reason in list(left_out.items())[:_NAMED]:
        print(visible(f"left out: {path}: {reason}"))
    more = f"; {len(left_out) - _NAMED} more left out" if len(left_out) > _NAMED else ""
    print(f"package: {len(files)} files, {_megabytes(sum(files.values()))}{more}", flush=True)
    cluster.submit_job(
        # The shell gives way to Python, so that a signal has one receiver.
        entrypoint=shlex.join(["exec", "python", "-m", "orchestration.cli", *job.words]),
        submission_id=job.id,
        runtime_env={
            "working_dir": str(Path.cwd()),
            "excludes": excludes(left_out),
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_SECONDS)},
        },
        metadata={"run": job.run},
    )
    print(f"job {job.id}, its run in {job.run}", flush=True)
    return attend(cluster, job.id) if follow else 0


def attend(cluster: Cluster, job: str) -> int:
    """Follow a job until it ends, or until Ctrl-C, which leaves the job alone. Returns an exit code."""
    try:
        return follow(cluster, job)
    except KeyboardInterrupt:
        print(f"\n{job} goes on. Follow it: ouroboros jobs logs {job} --follow. Stop it: ouroboros jobs stop {job}")
        return INTERRUPTED


def follow(cluster: Cluster, job: str) -> int:
    """Print what a job logs until it ends. Returns its exit code. A connection that is lost is taken up again."""
    shown, lost_at = 0, 0.0
    while True:
        began = time.monotonic()
        try:
            details = cluster.get_job_info(job)  # before the logs: once it is over, they are complete
            logs = cluster.get_job_logs(job)
        except ServerError as error:
            if not lost_at:
                lost_at = began
                print(f"{error}; the job goes on, trying again for {duration(_PATIENCE_SECONDS)}", file=sys.stderr)
            if began - lost_at > _PATIENCE_SECONDS:
                raise
        else:
            if lost_at:
                print("connected again", file=sys.stderr)
                lost_at = 0.0
            sys.stdout.write(logs[shown:])
            sys.stdout.flush()
            shown = len(logs)
            if details.status.is_terminal():
                return _exit_code(details)
        time.sleep(max(_LOOK_SECONDS, (time.monotonic() - began) / _LOOK_SHARE))


def stop(cluster: Cluster, job: str) -> JobDetails:
    """Have a job stopped, and wait until it is. Raises ClusterError if it takes longer than it can."""
    cluster.stop_job(job)
    deadline = time.monotonic() + _STOP_SECONDS + _REQUEST_SECONDS
    while not (details := cluster.get_job_info(job)).status.is_terminal():
        if time.monotonic() > deadline:
            raise ClusterError(f"{job} goes on, though it was asked to stop; see 'ouroboros jobs logs {job}'")
        time.sleep(_LOOK_SECONDS)
    return details


def run_of(cluster: Cluster, job: str) -> str:
    """The directory of the run that a job made. Raises ConfigError for a job that was not submitted here."""
    run = (cluster.get_job_info(job).metadata or {}).get("run")
    if run is None:
        raise ConfigError(f"{job} does not say where its run is: use 'ouroboros submit -- resume RUN'")
    return run


def facts(jobs: Sequence[JobDetails]) -> list[dict[str, Any]]:
    """What is known of each job that was submitted, the newest first."""
    found, now = [], datetime.now().astimezone()
    for job in sorted((job for job in jobs if job.submission_id), key=lambda job: job.start_time or 0, reverse=True):
        begun, ended = _instant(job.start_time), _instant(job.end_time)
        known: dict[str, Any] = {"job": job.submission_id, "status": job.status.value}
        known |= {"started": begun and begun.isoformat(), "ended": ended and ended.isoformat()}
        known["seconds"] = ((ended or now) - begun).total_seconds() if begun else None
        found.append(known | {"run": (job.metadata or {}).get("run")})
    return found


def _instant(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000).astimezone() if milliseconds else None


def render_jobs(jobs: Sequence[Mapping[str, Any]]) -> Table | Text:
    """A line a job."""
    rows = []
    for job in jobs:
        started, took = (job["started"] or ABSENT)[:19].replace("T", " "), job["seconds"]
        row = [job["job"], Text(job["status"], _COLOURS[job["status"]]), started]
        rows.append([*row, ABSENT if took is None else duration(took), job["run"] or ABSENT])
    return plain_table(["job", "status", "started", "took", "run"], rows) if rows else Text("no jobs")


def _exit_code(details: JobDetails) -> int:
    """What the job's own process ended with; a signal as a shell tells it."""
    if details.status == JobStatus.STOPPED:
        return INTERRUPTED
    if (code := details.driver_exit_code) is None:
        print(f"the job could not run: {details.message}", file=sys.stderr)
        return FAILED
    return code if code >= 0 else 128 - code


def _identity(name: str | None, default: str) -> str:
    return check_id(name or f"{default}-{datetime.now():%Y%m%d-%H%M%S}")


def check_id(job: str) -> str:
    """A job's id as it is. Raises ConfigError for what cannot be one: it becomes a part of addresses and paths."""
    with about(f"{job[:80]!r} is no job's id"):
        return check_name(job, _LONGEST_ID)


def _check_lasting(what: str, path: str) -> None:
    if not Path(path).is_absolute() and not path.startswith("~"):
        raise ConfigError(
            f"{what} {path!r} would lie in the directory that Ray removes after the job: name a place on the cluster "
            "that stays, such as /data/runs/one or ~/one"
        )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
