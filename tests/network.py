"""Ports: free ones, those that processes listen on, and a way to them that can be cut."""

import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

import psutil


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process and its children."""
    return [process, *process.children(recursive=True)]


def listeners(process: psutil.Process) -> set[tuple[str, int]]:
    """(address, port) on which a process and its children take connections or datagrams."""
    return ports(family(process))[0]


def ports(processes: Sequence[psutil.Process]) -> tuple[set[tuple[str, int]], set[str]]:
    """(address, port) on which processes take connections or datagrams, and addresses that they are connected to."""
    taken, called = set(), set()
    for member in processes:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            for each in member.net_connections(kind="inet"):
                if each.raddr:
                    called.add(each.raddr.ip.removeprefix("::ffff:"))
                elif each.status == psutil.CONN_LISTEN or each.type == socket.SOCK_DGRAM:
                    taken.add((each.laddr.ip.removeprefix("::ffff:"), each.laddr.port))
    return taken, called


class Tunnel:
    """Carries connections to a port of this machine, until it is cut."""

    def __init__(self, target: int) -> None:
        self.target, self.port = target, free_port()
        self._ends: list[socket.socket] = []

    def __enter__(self) -> Self:
        self._entrance = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._entrance,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for end in [self._entrance, *self._ends]:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._ends.clear()

    def _accept(self, entrance: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = entrance.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                self._ends += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=_carry, args=(source, sink), daemon=True).start()


def _carry(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
