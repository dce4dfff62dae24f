"""MLflow's own server over one directory, and on loopback unless told otherwise.

Clients send artifacts through it, so that whoever logs to it needs no disk in common with it.
"""

import ipaddress
import os
import secrets
import socket
import sys
from pathlib import Path
from typing import NoReturn

from orchestration.config import ConfigError

_QUIET = "--uvicorn-opts=--log-level=warning --timeout-graceful-shutdown=5"  # s


def serve(
    directory: Path, host: str, port: int, store: str | None, allowed_hosts: str | None, basic_auth: bool
) -> NoReturn:
    """Become the server, which ends with its children when it is interrupted. Raises ConfigError if it may not start.

    ``directory`` holds what it is given, ``store`` is an address in place of SQLite in it; ``allowed_hosts`` are the
    names by which browsers may call it, by default those of this machine and of private networks.
    """
    _check(host, port, basic_auth)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # hashes of passwords may lie in it
    command = [sys.executable, "-m", "mlflow", "server", f"--host={host}", f"--port={port}", "--workers=1", _QUIET]
    command += ["--serve-artifacts", f"--artifacts-destination={directory / 'artifacts'}"]
    command += [f"--allowed-hosts={allowed_hosts}"] if allowed_hosts else []
    command += ["--app-name=basic-auth"] if basic_auth else []
    # A store's address may hold a password, which the list of processes would show.
    fixed = {"MLFLOW_BACKEND_STORE_URI": store or f"sqlite:///{directory / 'mlflow.db'}"}
    fixed |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    address = "127.0.0.1" if host == "0.0.0.0" else host
    print(f"MLflow at http://{address}:{port}, in {directory}; Ctrl-C ends it", flush=True)
    os.chdir(directory)
    key = {"MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32)}
    os.execve(sys.executable, command, key | os.environ | fixed)


def _check(host: str, port: int, basic_auth: bool) -> None:
    """Raise ConfigError unless it could listen there, and should."""
    try:
        place = socket.gethostbyname(host)
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((place, port))
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: {error.strerror}; choose another") from error
    if not ipaddress.ip_address(place).is_loopback and not basic_auth:
        raise ConfigError(f"--host {host} lets the whole network read and write: add --basic-auth")
