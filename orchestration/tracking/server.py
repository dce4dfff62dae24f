"""MLflow's own server over one directory, on loopback unless ``--host`` says otherwise.

Clients send artifacts through it, so they need no disk in common with it.
"""

import configparser
import importlib.util
import ipaddress
import os
import secrets
import socket
import sys
from pathlib import Path
from typing import NoReturn

from orchestration.errors import ConfigError

_PUBLIC_PASSWORD = "password1234"  # what MLflow came with before it came with none
_QUIET = "--uvicorn-opts=--log-level=warning --timeout-graceful-shutdown=5"  # s


def serve(
    directory: Path, host: str, port: int, store: str | None, allowed_hosts: str | None, basic_auth: bool
) -> NoReturn:
    """Become the server, which ends with its children when it is interrupted. Raises ConfigError if it may not start.

    ``directory`` holds what it is given, ``store`` is an address in place of SQLite in it; ``allowed_hosts`` are the
    names by which browsers may call it, by default those of this machine and of private networks.
    """
    if not reaches_only_this_machine(host, port) and not basic_auth:
        raise ConfigError(f"--host {host} lets the whole network read and write: add --basic-auth")
    if basic_auth:
        _check_password(directory)
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


def reaches_only_this_machine(host: str, port: int) -> bool:
    """Whether who listens there is heard on this machine alone. Raises ConfigError if it cannot listen there."""
    try:
        place = socket.gethostbyname(host)
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((place, port))
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: {error.strerror}; choose another") from error
    return ipaddress.ip_address(place).is_loopback


def _check_password(directory: Path) -> None:
    """Raise ConfigError unless MLflow's first user gets a password that not all the world knows: some versions came
    with one."""
    package = importlib.util.find_spec("mlflow")
    named = os.environ.get("MLFLOW_AUTH_CONFIG_PATH")
    file = Path(named or Path((package and package.origin) or "").parent / "server" / "auth" / "basic_auth.ini")
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(file)
    held, given = settings.get("mlflow", "admin_password", fallback=""), os.environ.get("MLFLOW_AUTH_ADMIN_PASSWORD")
    if held and (not named or held == _PUBLIC_PASSWORD):
        raise ConfigError(
            f"--basic-auth: the first user's password in {file} is public: name a file with another in "
            "MLFLOW_AUTH_CONFIG_PATH, or install a newer MLflow"
        )
    if given == _PUBLIC_PASSWORD or not (given or named or (directory / "basic_auth.db").exists()):
        raise ConfigError("--basic-auth: set MLFLOW_AUTH_ADMIN_PASSWORD to a password of your own for the first user")
