"""An MLflow store: whether it is there, what it finds, what its failures mean, and where its artifacts lie.

A run's address of it is the configuration's alone; names, passwords, certificates and proxies are the environment's,
as for MLflow's own client.
"""

import errno
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

HEALTH_SECONDS = 5  # a server answers /health within this, or it counts as away
KEY = "ouroboros.run"  # the tag by which a run's records are found whose ids were lost
NOTE = "mlflow.note.content"  # the tag that MLflow shows as a description
_HOPELESS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "INVALID_STATE", "MALFORMED_REQUEST"}
_ALL_RUNS = 50_000  # MLflow gives no more at a time
_PASSING_STATUS = 401, 403, 407, 408, 429  # HTTP: a person or time may mend it, and it is not about what was sent
_POINTLESS = re.compile(r"failed with error code 40[1345]\b")  # to wait for: no permission, or no MLflow
_PASSING_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EINTR, errno.EAGAIN}
_PASSING_ERRORS |= {errno.ECONNREFUSED, errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH}
Found = TypeVar("Found")
Say = Callable[[str], None]  # prints a line for people


class TrackingError(RuntimeError):
    """MLflow could not be reached, or did not take what it was given."""


class Away(TrackingError):  # noqa: N818
    """No server answers at the address."""


class Refused(TrackingError):  # noqa: N818
    """MLflow will not take this, however often it is asked."""


class Gone(Refused):
    """The MLflow run itself is not there any longer: it takes nothing."""


class MlflowStore:
    """A store by its address: a server (http://…), or a database (sqlite:///…)."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        _configure_mlflow()
        from mlflow import MlflowClient

        new = uri.startswith("sqlite:///") and not (database := Path(uri.removeprefix("sqlite:///"))).exists()
        with self.named("opening the store"):
            if new:
                _copy_tables(database)
            self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            if new:
                _keep_tables(database)

    @property
    def is_server(self) -> bool:
        """Whether it may be away."""
        return self.uri.startswith("http")

    def check(self, seconds: float = HEALTH_SECONDS) -> None:
        """Raise TrackingError unless the store can be asked."""
        if self.is_server:
            check_server(self.uri, seconds)

    def find(self, run: str) -> Any:
        """A run of the store; None if there is none, or if it was deleted."""
        from mlflow.exceptions import MlflowException

        try:
            found = self.client.get_run(run)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return None if found.info.lifecycle_stage == "deleted" else found

    def runs_of(self, key: str, experiment: str) -> list[Any]:
        """What an experiment holds of the run with ``key``: itself, and the runs below it."""
        return list(self.client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", max_results=_ALL_RUNS))

    def insist(self, what: str, attempt: Callable[[], Found], say: Say, seconds: float) -> Found:
        """Ask the store until it answers, for some ``seconds``. Raises TrackingError after that, and at once if it
        will not do it."""
        deadline, pause = time.monotonic() + seconds, 0.2
        while True:
            try:
                self.check()
                with self.named(what, refusing=True):
                    return attempt()
            except TrackingError as error:
                if isinstance(error, Refused) or _POINTLESS.search(str(error)) or time.monotonic() + pause > deadline:
                    raise
                if pause < 0.3:
                    say(f"warning: {error}; trying again for {seconds:.0f} seconds")
            time.sleep(pause)
            pause = min(2 * pause, 2.0)

    def experiment(self, name: str, note: str | None) -> str:
        """The experiment's id; a new one is described by ``note``, and on SQLite has its artifacts by the database."""
        from mlflow.exceptions import MlflowException

        if (existing := self.client.get_experiment_by_name(name)) is None:
            database = Path(self.uri.removeprefix("sqlite:///"))
            place = None if self.is_server else (database.parent / "artifacts").as_uri()
            try:
                return self.client.create_experiment(name, artifact_location=place, tags={NOTE: note} if note else {})
            except MlflowException:
                if (existing := self.client.get_experiment_by_name(name)) is None:  # no other run has made it meanwhile
                    raise
        if existing.lifecycle_stage == "deleted":
            raise Refused(
                f"MLflow at {self.uri}: experiment {name!r} was deleted; "
                "restore it or set tracking.experiment to another"
            )
        return existing.experiment_id

    def register(self, name: str, run: str, path: str, alias: str, tags: Mapping[str, str]) -> str:
        """Make a run's artifacts at ``path`` its version of the model ``name``. Returns that version's address."""
        from mlflow.exceptions import MlflowException

        self.check()
        with self.named(f"registering {name}"):
            if not self.client.list_artifacts(run, path):
                raise TrackingError(f"MLflow at {self.uri}: the run {run} holds no {path} to register")
            try:
                self.client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            source = f"{self.client.get_run(run).info.artifact_uri}/{path}"
            known = self.client.search_model_versions(f"name='{name}' and run_id='{run}'")
            version = (known or [self.client.create_model_version(name, source, run, tags=dict(tags))])[0].version
            self.client.set_registered_model_alias(name, alias, version)
        return f"models:/{name}/{version}"

    @contextmanager
    def named(self, what: str, *, refusing: bool = False) -> Iterator[None]:
        """Turn any failure into a TrackingError that says what failed, where, and why; into Refused if it is final."""
        try:
            yield
        except TrackingError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:400] or type(error).__name__
            kind = Refused if refusing and _is_final(error) else TrackingError
            raise kind(f"MLflow at {self.uri}{_way(self.uri)}: {what} failed: {reason}") from error


def _is_final(error: Exception) -> bool:
    """Whether the same call would fail again, however often."""
    import requests
    from mlflow.exceptions import MlflowException, RestException

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return 400 <= error.response.status_code < 500 and error.response.status_code not in _PASSING_STATUS
    if isinstance(error, MlflowException):
        # Where it could not read an answer, another than MLflow may have given it.
        status = None if isinstance(error, RestException) else re.search(r"failed with error code (\d+)", str(error))
        return status.group(1) == "413" if status else error.error_code in _HOPELESS
    if isinstance(error, OSError):  # of an artifact's store; requests' own are among them
        return error.errno is not None and error.errno not in _PASSING_ERRORS
    return isinstance(error, ImportError | ValueError | TypeError | LookupError | AttributeError | ArithmeticError)


def check_server(uri: str, seconds: float = HEALTH_SECONDS) -> None:
    """Raise Away unless a server answers at ``uri``, as MLflow's own client asks: with its certificates and through its
    proxy. What it answers, the next calls will judge."""
    _configure_mlflow()
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    ask: dict[str, Any] = {"timeout": seconds, "max_retries": 0, "raise_on_status": False}
    try:
        status = http_request(get_default_host_creds(uri), "/health", "GET", **ask).status_code
        if status < 500:
            return
        reason = f"it answers HTTP {status}"
    except Exception as error:
        reason = " ".join(_root(error).split())[:400]
    remedy = "Start it, correct tracking.uri, or set tracking.uri to null for a database in the run directory"
    if "certificate" in reason:
        remedy = "Name its authority's certificate in MLFLOW_TRACKING_SERVER_CERT_PATH, or correct tracking.uri"
    raise Away(f"MLflow at {uri}{_way(uri)} cannot be reached: {reason}. {remedy}")


def _root(error: BaseException) -> str:
    """The first cause of an error in words: libraries wrap it several times."""
    below = error.__cause__ or error.__context__
    return (below and _root(below)) or str(error)


def _way(uri: str) -> str:
    """The proxy that the environment puts between here and a server, in words."""
    if not uri.startswith("http"):
        return ""
    from requests.utils import get_environ_proxies, select_proxy

    proxy = select_proxy(uri, get_environ_proxies(uri))
    place = urlsplit(proxy if "//" in proxy else f"//{proxy}").netloc.rpartition("@")[2] if proxy else ""
    return f", through the proxy {place} of the environment," if proxy else ""


def settle(database: Path) -> None:
    """Make a run's own database say that its artifacts lie beside it, wherever it was when they were stored.

    Raises TrackingError if it is damaged, or if a link would lead out of the directory.
    """
    place = database.parent / "artifacts"
    for path in (database, place, *place.glob("*"), *place.glob("*/*")):
        if path.is_symlink():
            raise TrackingError(f"{path} is a link: nothing is stored through it; remove it")
    if not database.exists():
        return
    try:
        with closing(sqlite3.connect(database, timeout=20)) as store, store:
            tables = {name for (name,) in store.execute("SELECT name FROM sqlite_master")}
            if not {"experiments", "runs", "model_versions"} <= tables:  # a first start was cut off
                return
            new, moved = place.as_uri(), "?1 || '/' || run_uuid || '/artifacts'"
            strays = "SELECT 1 FROM experiments WHERE artifact_location IS NOT ?1 UNION ALL "
            if not store.execute(f"{strays} SELECT 1 FROM runs WHERE artifact_uri IS NOT {moved}", (new,)).fetchone():
                return
            known = store.execute("SELECT DISTINCT artifact_location FROM experiments")
            for old in [old for (old,) in known if old and old != new]:
                for column in ("source", "storage_location"):
                    store.execute(f"UPDATE model_versions SET {column} = replace({column}, ?, ?)", (old, new))
            store.execute("UPDATE experiments SET artifact_location = ?1", (new,))
            store.execute(f"UPDATE runs SET artifact_uri = {moved}", (new,))
    except sqlite3.Error as error:
        raise TrackingError(f"{database} cannot be used: {error}; without it the run goes on in a new one") from error


def _template() -> Path:
    """Where a database lies that holds MLflow's tables and nothing else, of this version of MLflow."""
    from mlflow.version import VERSION

    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "ouroboros", f"mlflow-{VERSION}.db")


def _copy_tables(database: Path) -> None:
    """Begin a new database with a copy of the tables, which MLflow takes seconds to make: every migration in turn."""
    copy_of = database.with_name(f".{database.name}.{os.getpid()}")
    try:
        template = _template()
        if template.stat().st_uid != os.getuid() or template.is_symlink():
            return
        shutil.copyfile(template, copy_of)
        with closing(sqlite3.connect(copy_of)) as store, store:  # as MLflow would have said here
            store.execute("UPDATE experiments SET artifact_location = ?", (str(Path.cwd() / "mlruns" / "0"),))
        os.link(copy_of, database)  # fails where another process was faster
    except (OSError, RuntimeError, sqlite3.Error):
        return
    finally:
        copy_of.unlink(missing_ok=True)


def _keep_tables(database: Path) -> None:
    """Keep the tables of a new database that nothing is recorded in yet, for the next one, if there is a place."""
    with suppress(OSError, RuntimeError, sqlite3.Error):
        if not (template := _template()).exists():
            template.parent.mkdir(parents=True, exist_ok=True)
            copy_of = template.with_name(f".{template.name}.{os.getpid()}")
            with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(copy_of)) as target:
                source.backup(target)
            copy_of.rename(template)


def _configure_mlflow() -> None:
    """Before MLflow is imported: no telemetry, no chatter on the terminal, a call takes a minute at most."""
    import logging

    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    import mlflow  # noqa: F401  (it sets the levels of these loggers when it is imported)

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(os.environ["MLFLOW_LOGGING_LEVEL"].upper())
    # Retries are reported by the error in the end, and what goes wrong in a database by the one that it leads to.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
