"""A real MLflow server that can be killed and started again at the same address."""

import os
import signal
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from tests import prefork
from tests.network import free_port
from tests.processes import wait_until

APP = "mlflow.server.fastapi_app:app"


class MlflowServer:
    """A server on loopback that keeps everything in ``directory``. With its workers it is a process group."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.port = directory, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Returns once it answers."""
        self.begin()
        wait_until(lambda: self.answers() or not self.lives(), 90, "the MLflow server")
        assert self.lives(), (self.directory / "server.log").read_text()[-2000:]
        return self

    def begin(self) -> None:
        """Start it, as ``mlflow server`` does, and do not wait."""
        from mlflow import server

        command = prefork.command("-m", "uvicorn", "--host=127.0.0.1", f"--port={self.port}", APP)
        given = {
            server.BACKEND_STORE_URI_ENV_VAR: f"sqlite:///{self.directory}/server.db",
            server.ARTIFACTS_DESTINATION_ENV_VAR: f"{self.directory}/stored",
            server.ARTIFACT_ROOT_ENV_VAR: "mlflow-artifacts:/",
            server.SERVE_ARTIFACTS_ENV_VAR: "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        with (self.directory / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env=os.environ | given,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.directory,
            )

    def lives(self) -> bool:
        """Whether its process is there."""
        return self.process is not None and self.process.poll() is None

    def answers(self) -> bool:
        """Whether it is there."""
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL, with its workers."""
        if self.process is not None and self.lives():
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=20)


class Gate:
    """The way to a server, by another port. While it is shut nobody answers, as if the server's machine were gone;
    the server goes on, so that its own start takes nothing from whoever shares its cores."""

    def __init__(self, server: MlflowServer) -> None:
        self.server, self.port = server, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._sockets: list[socket.socket] = []

    def open(self) -> Self:
        """Let through."""
        listener = socket.create_server(("127.0.0.1", self.port))
        self._sockets = [listener]
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return self

    def shut(self) -> None:
        """Close every connection and take no more."""
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # shut
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self.server.port))
                self._sockets += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=_carry, args=pair, daemon=True).start()


def _carry(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(2**16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@contextmanager
def mlflow_server(directory: Path) -> Iterator[MlflowServer]:
    """A server for the length of a block."""
    server = MlflowServer(directory)
    try:
        yield server.start()
    finally:
        server.kill()
