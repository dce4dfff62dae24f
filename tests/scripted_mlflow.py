"""An MLflow server as far as a run needs one, in this process, whose answers a test may spoil."""

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

Answer = tuple[int, bytes]  # HTTP status and body; of status 0, the connection is closed instead
_MISSING = 404, json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such thing"}).encode()


class ScriptedMlflow:
    """What it was told, by run. ``spoil`` sees each call's last path and content, and answers instead unless None."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.metrics: dict[str, list[tuple[str, int, float]]] = {}
        self.params: dict[str, dict[str, str]] = {}
        self.files: list[str] = []
        self.calls: list[str] = []
        self.uri = ""
        self.spoil: Callable[[str, Any], Answer | None] = lambda path, content: None
        self._experiments: list[str] = []

    def status(self, run: str) -> str:
        return str(self.runs[run]["info"]["status"])

    def answer(self, method: str, path: str, content: Any) -> Answer:
        """Do what is asked."""
        name = path.rpartition("/mlflow/")[2]
        self.calls.append(name)
        if method == "PUT":
            self.files.append(path.rpartition("/artifacts/")[2])
        elif name == "experiments/get-by-name":
            if content["experiment_name"] not in self._experiments:
                return _MISSING
            return _json({"experiment": {"experiment_id": "1", "name": "e", "lifecycle_stage": "active"}})
        elif name == "experiments/create":
            self._experiments.append(content["name"])
            return _json({"experiment_id": "1"})
        elif name == "runs/create":
            run = f"{len(self.runs):032x}"
            info = {"run_id": run, "run_uuid": run, "experiment_id": "1", "lifecycle_stage": "active"}
            info |= {"status": "RUNNING", "start_time": content["start_time"], "run_name": content["run_name"]}
            info["artifact_uri"] = f"mlflow-artifacts:/1/{run}/artifacts"
            self.runs[run] = {"info": info, "data": {"tags": content.get("tags", [])}}
            return _json({"run": self.runs[run]})
        elif name == "runs/get":
            return _json({"run": self.runs[content["run_id"]]}) if content["run_id"] in self.runs else _MISSING
        elif name == "runs/search":
            return _json({"runs": list(self.runs.values())})
        elif name == "runs/log-batch":
            points = content.get("metrics", [])
            self.metrics.setdefault(content["run_id"], []).extend((p["key"], p["step"], p["value"]) for p in points)
            self.params.setdefault(content["run_id"], {}).update(
                {p["key"]: p["value"] for p in content.get("params", [])}
            )
        elif name == "runs/update":
            self.runs[content["run_id"]]["info"]["status"] = content["status"]
            return _json({"run_info": self.runs[content["run_id"]]["info"]})
        return _json({})


def _json(content: Any) -> Answer:
    return 200, json.dumps(content).encode()


@contextmanager
def scripted_mlflow(certificate: Path | None = None) -> Iterator[ScriptedMlflow]:
    """One on loopback for the length of a block; by HTTPS with the ``certificate`` (key and all) if one is given."""
    fake = ScriptedMlflow()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self) -> None:
            url, body = urlsplit(self.path), self.rfile.read(int(self.headers.get("Content-Length") or 0))
            content: Any = {key: values[0] for key, values in parse_qs(url.query).items()}
            with suppress(ValueError):
                content = content or json.loads(body)
            spoiled = fake.spoil(url.path.rpartition("/mlflow/")[2], content)
            status, text = spoiled or fake.answer(self.command, url.path, content)
            if not status:
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = reply  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    fake.uri = f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
