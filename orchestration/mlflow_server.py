"""MLflow's own server over one directory, and on loopback unless told otherwise.

Clients send artifacts through it, so that whoever logs to it needs no disk in common with it. It ends with its
children when this process is interrupted.
"""

import ipaddress
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestration.config import ConfigError
from orchestration.mlflow_store import TrackingError, check_server

_START_SECONDS = 120  # the first start creates the tables
_END_SECONDS = 5


@dataclass(frozen=True)
class MlflowServer:
    """Where it listens (IPv4), to whom, and where it keeps what it is given."""

    directory: Path
    host: str
    port: int
    store: str | None  # None: SQLite in the directory
    allowed_hosts: str | None  # None: this machine and private networks
    basic_auth: bool

    @property
    def address(self) -> str:
        """What a client on this machine calls."""
        return f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.port}"

    def check(self) -> None:
        """Raise ConfigError unless it could listen there."""
        try:
            place = socket.gethostbyname(self.host)
            with socket.socket() as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((place, self.port))
        except OSError as error:
            raise ConfigError(f"--host {self.host} --port {self.port}: {error.strerror}; choose another") from error
        if not ipaddress.ip_address(place).is_loopback and not self.basic_auth:
            raise ConfigError(f"--host {self.host} lets the whole network read and write: add --basic-auth")

    def command(self) -> list[str]:
        """``mlflow server``, as this project needs it."""
        artifacts = f"--artifacts-destination={self.directory / 'artifacts'}"
        options = [f"--host={self.host}", f"--port={self.port}", "--workers=1", "--serve-artifacts", artifacts]
        options += [f"--allowed-hosts={self.allowed_hosts}"] if self.allowed_hosts else []
        options += ["--app-name=basic-auth"] if self.basic_auth else []
        return [sys.executable, "-m", "mlflow", "server", *options]

    def environment(self) -> dict[str, str]:
        """Of the server. A store's address may hold a password, which the list of processes would show."""
        store = self.store or f"sqlite:///{self.directory / 'mlflow.db'}"
        fixed = {"MLFLOW_BACKEND_STORE_URI": store, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        return {"MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32), **os.environ, **fixed}


def serve(server: MlflowServer) -> None:
    """Run the server until it is interrupted. Raises ConfigError before it starts, RuntimeError if it ends itself."""
    server.check()
    server.directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # hashes of passwords may lie in it
    log = server.directory / "server.log"
    with log.open("wb") as output, _running(server, output.fileno()) as process:
        deadline = time.monotonic() + _START_SECONDS
        while process.poll() is None and not _answers(server.address):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the MLflow server does not answer within {_START_SECONDS} s; see {log}")
            time.sleep(0.2)
        if process.poll() is None:
            print(f"MLflow at {server.address}, in {server.directory}; Ctrl-C ends it", flush=True)
        process.wait()
    reason = (log.read_text(errors="replace").strip() or "it said nothing").splitlines()[-1]
    raise RuntimeError(f"the MLflow server ended itself ({reason}); see {log}")


@contextmanager
def _running(server: MlflowServer, output: int) -> Iterator[psutil.Popen]:
    """The server's process, ended with all its children."""
    process = psutil.Popen(
        server.command(), env=server.environment(), cwd=server.directory, stdout=output, stderr=output
    )
    try:
        yield process
    finally:
        family = [process, *process.children(recursive=True)] if process.poll() is None else []
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.terminate()
        for survivor in psutil.wait_procs(family, timeout=_END_SECONDS)[1]:
            survivor.kill()


def _answers(address: str) -> bool:
    with suppress(TrackingError):
        check_server(address, seconds=2)
        return True
    return False
