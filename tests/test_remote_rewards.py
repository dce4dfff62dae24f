"""Rewards that a server computes: the same numbers as here, and a typed failure for whatever a server can do wrong.

All servers are real ones on loopback: the reference server, and small ones that misbehave.
"""

import base64
import io
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
import uvicorn
from PIL import Image, ImageDraw, ImageFont

from pipelines.rewards import (
    NonsenseError,
    Reward,
    RewardError,
    RewardFunction,
    TooSlowError,
    UnreachableError,
    load_reward,
    parse_options,
    score,
    server,
)
from pipelines.rewards.server import build_app
from pipelines.rewards.writing import vetoed
from tests import processes
from tests.network import free_port, listeners
from tests.rewards import redness
from tests.test_config import command

pytestmark = pytest.mark.usefixtures("preloaded")  # psutil has to see forks at their place

IMAGES = np.random.default_rng(0).integers(0, 256, size=(24, 8, 12, 3), dtype=np.uint8)
IMAGES[::3, :4] = 128
PROMPTS = [f'{"a" * (i % 5)} "zèbre" {{{i}}}\n' for i in range(24)]
CAPTIONS = [f"caption {i**3}" for i in range(24)]


def reads_everything(images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> np.ndarray:
    """A number that needs each pixel, prompt and caption to be in its place."""
    weights = np.arange(images[0].size).reshape(images[0].shape) / 7
    said = [sum(map(ord, text)) for text in captions or [""] * len(prompts)]
    return (images * weights).sum(axis=(1, 2, 3)) + [len(p) / 3 for p in prompts] + np.array(said) * 1e3


@contextmanager
def reference(
    function: RewardFunction, name: str = "mine", options: Reward | None = None, token: str | None = None
) -> Iterator[str]:
    """The address at which the reference server answers with ``function``."""
    port = free_port()
    app = build_app(name, function, options or parse_options("jpeg_compressibility", {}), token)
    how: dict[str, Any] = {"http": server.Protocol, "log_level": "critical"}
    running = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, **how))
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        processes.wait_until(lambda: running.started or not thread.is_alive(), 20, "the reward server")
        yield f"http://127.0.0.1:{port}/score"
    finally:
        running.should_exit = True
        thread.join()


Respond = Callable[[BaseHTTPRequestHandler, bytes], None]


@contextmanager
def server_that(respond: Respond) -> Iterator[str]:
    """The address of a server that does what ``respond`` does with a request and its body."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            respond(self, self.rfile.read(int(self.headers["Content-Length"])))

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads, block_on_close = True, False

        def handle_error(self, *_: Any) -> None:
            pass  # whoever asked has left

    running = Quiet(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/score"
    finally:
        running.shutdown()
        running.server_close()


def send(handler: BaseHTTPRequestHandler, body: str | bytes, status: int = 200, **headers: str) -> None:
    data = body.encode() if isinstance(body, str) else body
    handler.send_response(status)
    for name, value in {"Content_Length": str(len(data)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def http(url: str, **options: Any) -> RewardFunction:
    return load_reward("http", parse_options("http", {"url": url, **options}))


@pytest.mark.parametrize("captions", [CAPTIONS, None], ids=["captions", "no captions"])
def test_a_server_gives_the_numbers_of_its_function(captions: list[str] | None) -> None:
    with reference(reads_everything) as url:
        far = score(http(url), IMAGES, PROMPTS, captions)
    np.testing.assert_array_equal(far, reads_everything(IMAGES, PROMPTS, captions))
    assert len(set(far)) == 24


@pytest.mark.parametrize("name", ["jpeg_incompressibility", "jpeg_compressibility"])
def test_a_built_in_reward_is_the_same_from_afar(name: str) -> None:
    options = parse_options(name, {})
    near = load_reward(name, options)
    with reference(near, name, options) as url:
        np.testing.assert_array_equal(score(http(url), IMAGES, PROMPTS, None), score(near, IMAGES, PROMPTS, None))


def test_the_command_serves_until_it_is_killed_in_the_middle_of_an_answer(tmp_path: Path) -> None:
    port, log, hang = free_port(), tmp_path / "log", tmp_path / f"ouroboros-hang-{os.getuid()}"
    words = ["reward", "serve", "tests.rewards:hangs_once", "--port", str(port)]
    process = processes.start(words, log, {**os.environ, "TMPDIR": str(tmp_path)})
    reward = http(f"http://127.0.0.1:{port}/score")
    try:
        processes.wait_until(lambda: process.poll() is not None or answers(port), 60, "the command")
        assert f"http://127.0.0.1:{port}/score answers with tests.rewards:hangs_once" in log.read_text()
        np.testing.assert_array_equal(score(reward, IMAGES, PROMPTS, None), redness(IMAGES, PROMPTS, None))
        hang.touch()
        caught: list[Exception] = []

        def ask() -> None:
            try:
                score(reward, IMAGES, PROMPTS, None)
            except Exception as error:
                caught.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        processes.wait_until(lambda: not hang.exists(), 20, "the server at work")
        process.kill()
        asking.join(20)
        assert [type(error) for error in caught] == [UnreachableError]
        process.wait(20)
        # Refused, or reset while the command, a fork, still dies.
        with pytest.raises(UnreachableError, match=r"Connection re(fused|set)"):
            score(reward, IMAGES, PROMPTS, None)
    finally:
        process.kill()
        process.wait(20)


def answers(port: int) -> bool:
    try:
        return requests.get(f"http://127.0.0.1:{port}/openapi.json", timeout=5).ok
    except requests.ConnectionError:
        return False


def test_the_schema_is_documented() -> None:
    with reference(redness) as url:
        page = requests.get(url.replace("/score", "/openapi.json"), timeout=20).json()
        assert requests.get(url.replace("/score", "/docs"), timeout=20).ok
    schemas = page["components"]["schemas"]
    asked = page["paths"]["/score"]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert schemas[asked.rsplit("/", 1)[1]]["properties"].keys() == {"images", "prompts", "captions"}
    assert schemas["Scores"]["properties"]["scores"]["items"] == {"type": "number"}


def picture(width: int = 8, height: int = 8, form: str = "PNG") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, form)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("what?", r"body\.0: JSON"),
        ({"prompts": ["a"]}, r"body\.images: Field required"),
        ({"images": [], "prompts": []}, r"body\.images: .*at least 1"),
        ({"images": [picture()], "prompts": ["a", "b"]}, "prompts: 2 for 1 images"),
        ({"images": [picture()], "prompts": ["a"], "captions": []}, "captions: 0 for 1 images"),
        ({"images": [picture()], "prompts": [3]}, r"body\.prompts\.0"),
        ({"images": ["hello"], "prompts": ["a"]}, r"body\.images\.0: .*base64"),
        ({"images": [picture(), "aGVsbG8="], "prompts": ["a", "b"]}, "image 1: cannot identify"),
        ({"images": [picture(form="BMP")], "prompts": ["a"]}, "image 0: cannot identify"),
        ({"images": [picture()[:60]], "prompts": ["a"]}, "image 0: "),
        ({"images": [picture(), picture(9)], "prompts": ["a", "b"]}, r"image 1: its size is \(8, 9\)"),
        ({"images": [picture(20, 20), picture(20, 20)], "prompts": ["a", "b"]}, "image 1: a query has at most 500"),
    ],
)
def test_the_server_says_what_is_wrong_with_a_query(
    query: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_PIXELS", 500)
    with reference(redness) as url:
        data = query if isinstance(query, str) else json.dumps(query)
        answer = requests.post(url, data=data, headers={"Content-Type": "application/json"}, timeout=20)
    assert answer.status_code == 422
    assert re.search(message, answer.json()["detail"])
    assert len(answer.text) < 300  # nothing of the query comes back


def test_the_server_sees_what_is_transparent_on_white() -> None:
    files = []
    for transparency in ({}, {"transparency": (255, 0, 0)}):
        Image.new("RGB", (2, 1), "red").save(buffer := io.BytesIO(), "PNG", **transparency)
        files.append(buffer.getvalue())
    np.testing.assert_array_equal(server.decode(files)[:, 0, 0], [[255, 0, 0], [255, 255, 255]])


def test_the_server_bounds_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_BODY", 1000)
    with reference(redness) as url:
        large = requests.post(url, data=b" " * 1001, timeout=20)
        unsaid = requests.post(url, data=iter([b"{}"]), timeout=20)  # in chunks, of no known length
    assert (large.status_code, unsaid.status_code) == (413, 411)
    assert "1,000 bytes" in large.json()["detail"]
    assert "Content-Length" in unsaid.json()["detail"]


TOKEN = "correct-horse-battery-staple"


def test_a_server_with_a_token_answers_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    large = json.dumps({"images": [picture()] * 1000, "prompts": ["a" * 4000] * 1000})
    with reference(redness, token=TOKEN) as url:
        for path in ("/score", "/docs", "/openapi.json", "/nothing"):
            for given in ({}, {"Authorization": f"Bearer {TOKEN[:-1]}"}, {"Authorization": TOKEN}):
                for data in ("{}", large):
                    answer = requests.post(url.replace("/score", path), data=data, headers=given, timeout=20)
                    assert answer.status_code == 401
                    assert TOKEN not in answer.text
        with pytest.raises(NonsenseError, match="refused with 401"):
            score(http(url), IMAGES, PROMPTS, None)
        monkeypatch.setenv("REWARD_KEY", f" {TOKEN}\n")
        far = score(http(url, api_key_variable="REWARD_KEY"), IMAGES, PROMPTS, None)
    np.testing.assert_array_equal(far, redness(IMAGES, PROMPTS, None))
    monkeypatch.delenv("REWARD_KEY")
    with pytest.raises(ValueError, match="the environment has no REWARD_KEY"):
        http("http://127.0.0.1:9/", api_key_variable="REWARD_KEY")


def test_a_key_goes_to_its_server_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And into no message, whatever the server says of it; nor are options more than its variable's name."""
    monkeypatch.setenv("REWARD_KEY", TOKEN)

    def echo(handler: BaseHTTPRequestHandler, _: bytes) -> None:
        said = handler.headers["Authorization"]
        send(handler, f"you said {said}", 302, Location=f"http://127.0.0.1:9/?{said}")

    with (
        server_that(echo) as url,
        pytest.raises(NonsenseError, match=r"302 and sends on to .*you said Bearer \.\.\.") as e,
    ):
        score(http(url, api_key_variable="REWARD_KEY"), IMAGES, PROMPTS, None)
    assert TOKEN not in str(e.value)
    assert TOKEN not in parse_options("http", {"url": url, "api_key_variable": "REWARD_KEY"}).model_dump_json()


def test_slow_and_many_queries_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PATIENCE_SECONDS", 0.6)
    monkeypatch.setattr(server, "MAX_HELD", 4000)
    query = json.dumps({"images": [picture()], "prompts": ["a" * 2500]}).encode()
    head = b"POST /score HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
    whole = head + b"Content-Length: %d\r\n\r\n" % len(query)

    def answered(connection: socket.socket) -> bytes:
        with connection:
            return b"".join(iter(lambda: connection.recv(4096), b""))

    with reference(redness) as url:
        place = ("127.0.0.1", int(url.split(":")[2].split("/")[0]))

        def sent(data: bytes) -> socket.socket:
            connection = socket.create_connection(place, timeout=10)
            connection.sendall(data)
            return connection

        slow, headless, silent = sent(whole + query[:-1]), sent(head), sent(b"")
        beside = sent(whole + query)  # there is no room for it while the slow one is waited for
        assert answered(slow).startswith(b"HTTP/1.1 408")
        assert answered(beside)[:12] in (b"HTTP/1.1 200", b"HTTP/1.1 408")
        assert answered(headless) == answered(silent) == b""
        assert requests.post(url, data=query, headers={"Content-Type": "application/json"}, timeout=20).ok
        last = whole.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        many = [sent(last + query) for _ in range(6)]  # one after another, as there is room for one
        assert [answered(each)[:12] for each in many] == [b"HTTP/1.1 200"] * 6


@pytest.mark.parametrize(
    ("token", "mode", "message"),
    [
        (None, 0o600, "--host 0.0.0.0 lets others ask: give OUROBOROS_REWARD_TOKEN or --token-file; openssl rand"),
        ("short", 0o600, "has to be 16 printable characters or more"),
        (TOKEN, 0o644, "can be read by other users: chmod 600"),
    ],
)
def test_a_server_beyond_loopback_needs_a_token(
    token: str | None,
    mode: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = []
    if token:
        (tmp_path / "token").write_text(token)
        (tmp_path / "token").chmod(mode)
        given = ["--token-file", str(tmp_path / "token")]
    words = ["reward", "serve", "jpeg_compressibility", "--host", "0.0.0.0", "--port", str(free_port()), *given]
    assert command(words, monkeypatch) == 2
    assert message in capsys.readouterr().err


def test_a_reward_that_reads_captions_asks_for_them() -> None:
    options = parse_options("sentence_cosine", {})
    with (
        reference(reads_everything, "sentence_cosine", options) as url,
        pytest.raises(NonsenseError, match=r"422.*captions: sentence_cosine reads them"),
    ):
        score(http(url), IMAGES, PROMPTS, None)


def test_a_reward_that_fails_afar_keeps_its_reason() -> None:
    def failing(*_: object) -> list[float]:
        raise KeyError("the weights")

    with reference(failing) as url, pytest.raises(UnreachableError, match=r"500.*KeyError: 'the weights'"):
        score(http(url), IMAGES, PROMPTS, None)
    with (
        reference(lambda *_: np.full(24, np.nan)) as url,
        pytest.raises(UnreachableError, match=r"500.*is nan: check the reward function"),
    ):
        score(http(url), IMAGES, PROMPTS, None)


def drip_body(handler: BaseHTTPRequestHandler, _: bytes) -> None:
    """A right answer, but a byte at a time."""
    data = scores_of(24).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    drip(handler, data)


def drip(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    for each in data[:40]:
        handler.wfile.write(bytes([each]))
        time.sleep(0.05)
    handler.wfile.write(data[40:])


def scores_of(count: int) -> str:
    return json.dumps({"scores": [0.25] * count})


@pytest.mark.parametrize(
    ("respond", "failure", "message"),
    [
        (lambda h, _: send(h, "out of order", 500), UnreachableError, "500: out of order"),
        (lambda h, _: send(h, "<h1>Bad Gateway</h1>", 502), UnreachableError, "502: <h1>Bad"),
        (lambda h, _: send(h, "later", 429), UnreachableError, "429: later"),
        (lambda h, _: None, UnreachableError, "without response"),
        (lambda h, _: send(h, scores_of(24)[:20], Content_Length="500"), UnreachableError, "20 bytes read"),
        (lambda h, _: send(h, "5\r\nhello", Transfer_Encoding="chunked"), UnreachableError, "cannot be asked"),
        (lambda h, _: time.sleep(3), TooSlowError, "within 0.4 s"),
        (drip_body, TooSlowError, "within 0.4 s"),
        (lambda h, _: drip(h, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"), TooSlowError, "within 0.4 s"),
        (lambda h, _: send(h, "no such model\nhere", 404), NonsenseError, "404: no such model here"),
        (lambda h, _: send(h, scores_of(24), 206), NonsenseError, "206"),
        (lambda h, _: send(h, "I am a reward"), NonsenseError, "'I am a reward'.*JSON"),
        (lambda h, _: send(h, ""), NonsenseError, "JSON"),
        (lambda h, _: send(h, b"\x80\x04K\x00."), NonsenseError, "JSON"),
        (lambda h, _: send(h, b"not gzip", Content_Encoding="gzip"), NonsenseError, "cannot be read"),
        (lambda h, _: send(h, "[0.5]"), NonsenseError, "Scores|object"),
        (lambda h, _: send(h, "[" * 100_000), NonsenseError, "JSON"),
        (lambda h, _: send(h, '{"rewards": [0.5]}'), NonsenseError, "scores Field required"),
        (lambda h, _: send(h, scores_of(23)), NonsenseError, "23 scores for 24 images"),
        (lambda h, _: send(h, scores_of(0)), NonsenseError, "0 scores for 24 images"),
        (lambda h, _: send(h, '{"scores": ["0.5"]}'), NonsenseError, r"scores\.0 .*number"),
        (lambda h, _: send(h, '{"scores": [true]}'), NonsenseError, r"scores\.0 .*number"),
        (lambda h, _: send(h, '{"scores": [null]}'), NonsenseError, r"scores\.0 .*number"),
        (lambda h, _: send(h, '{"scores": [0.1, NaN]}'), NonsenseError, r"scores\.1 .*finite"),
        (lambda h, _: send(h, '{"scores": [-Infinity]}'), NonsenseError, r"scores\.0 .*finite"),
        (lambda h, _: send(h, '{"scores": [1e999]}'), NonsenseError, r"scores\.0 .*finite"),
        (lambda h, _: send(h, f'{{"scores": [1{"0" * 400}]}}'), NonsenseError, r"scores\.0 "),
        (lambda h, _: send(h, " " * (2**20 + 1)), NonsenseError, "more than 1,048,576 bytes"),
    ],
)
def test_a_failure_has_its_type_and_its_reason(respond: Respond, failure: type[RewardError], message: str) -> None:
    with server_that(respond) as url, pytest.raises(failure, match=message) as caught:
        score(http(url, timeout_seconds=0.4 if failure is TooSlowError else 20), IMAGES, PROMPTS, None)
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_redirect_is_not_followed() -> None:
    asked = []
    with (
        server_that(lambda h, body: (asked.append(body), send(h, scores_of(24)))[1]) as other,
        server_that(lambda h, _: send(h, "", 307, Location=other)) as url,
    ):
        with pytest.raises(NonsenseError, match=f"refused with 307 and sends on to {other}"):
            score(http(url), IMAGES, PROMPTS, None)
        assert not asked
        assert score(http(other), IMAGES, PROMPTS, None).tolist() == [0.25] * 24  # it is that which would have come
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("http", {}, "options of http: url: Field required"),
        ("http", {"url": "file:///etc/passwd"}, "no web address"),
        ("http", {"url": "127.0.0.1:8100/score"}, "no web address"),
        ("http", {"url": "http:///score"}, "no web address"),
        ("http", {"url": "http://[::1/score"}, "url: .*IPv6"),
        ("http", {"url": "http://host:99999/"}, "url: Port out of range"),
        ("http", {"url": "https://me:secret@host/score"}, "leave passwords and keys out"),
        ("http", {"url": "https://host/score?api_key=secret"}, "leave passwords and keys out"),
        ("http", {"url": "http://h/", "api_key_variable": "sk-secret"}, "api_key_variable: .*pattern"),
        ("http", {"url": "http://h/", "timeout_seconds": 0}, "timeout_seconds: .*greater than 0"),
        ("http", {"url": "http://h/", "timeout": 5}, "unknown key 'timeout'; did you mean 'timeout_seconds'"),
        ("judge", {"url": "http://h/"}, "options of judge: model: Field required"),
        ("judge", {"url": "ftp://h/", "model": "m"}, "no web address"),
        ("judge", {"url": "http://h/", "model": "m", "question": "Is it nice?"}, r"question: .*\{prompt\\}"),
        ("judge", {"url": "http://h/", "model": "m", "scale": -1}, "scale: .*greater than 0"),
    ],
)
def test_options_that_cannot_be_meant(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_options(name, options)
    assert "secret" not in str(caught.value)


def judge(url: str, **options: Any) -> RewardFunction:
    return load_reward("judge", parse_options("judge", {"url": url, "model": "llava", **options}))


def says(handler: BaseHTTPRequestHandler, words: str | None) -> None:
    send(handler, json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": words}}]}))


@pytest.mark.parametrize("tail", ["", "/", "/chat/completions"])
def test_a_judge_sees_each_image_with_its_prompt(tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge here adds the mean of the green channel and the prompt's length, and answers out of 20."""
    monkeypatch.setenv("JUDGES_KEY", "sk-test\n")
    seen: list[tuple[str, str | None, dict[str, Any]]] = []

    def look(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        query = json.loads(body)
        text, image = query["messages"][0]["content"]
        head, data = image["image_url"]["url"].split(",")
        assert head == "data:image/png;base64"
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        seen.append((handler.path, handler.headers["Authorization"], query))
        prompt = text["text"].removeprefix("Of 20: ")
        time.sleep(0.02 * (len(prompt) % 3))  # answers do not come in the order of the questions
        says(handler, f"I give {pixels[..., 1].mean() / 255 + len(prompt) / 4:.6f}/20.")

    options = {"question": "Of {scale}: {prompt}", "scale": 20, "api_key_variable": "JUDGES_KEY", "parallel": 5}
    with server_that(look) as url:
        scores = score(judge(url.replace("/score", "/v1") + tail, **options), IMAGES, PROMPTS, None)
    expected = [(i[..., 1].mean() / 255 + len(p) / 4) / 20 for i, p in zip(IMAGES, PROMPTS, strict=True)]
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-7)
    assert len(seen) == 24
    for path, authorization, query in seen:
        assert (path, authorization) == ("/v1/chat/completions", "Bearer sk-test")
        assert (query["model"], query["temperature"]) == ("llava", 0)


def test_a_judge_without_a_key_is_asked_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    seen = []

    def look(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        seen.append((handler.headers["Authorization"], json.loads(body)["messages"][0]["content"][0]["text"]))
        says(handler, "7")

    with server_that(look) as url:
        assert score(judge(url), IMAGES[:1], ["a cat"], None).tolist() == [0.7]
    assert seen[0][0] is None
    assert '"a cat"? Answer with one number from 0 (not at all) to 10 (perfectly)' in seen[0][1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("It is lovely.", "'It is lovely.', not a number of 0 to 10"),
        ("11", "'11', not a number"),
        ("-3 of 10", "not a number"),
        ("", "'', not a number"),
        ("nan", "not a number"),
        (None, "choices.0.message.content .*string"),
    ],
)
def test_a_judge_that_gives_no_number(words: str | None, message: str) -> None:
    with server_that(lambda h, _: says(h, words)) as url, pytest.raises(NonsenseError, match=message):
        score(judge(url), IMAGES[:3], PROMPTS[:3], None)


@pytest.mark.parametrize(
    ("respond", "failure"),
    [
        (lambda h, _: send(h, '{"choices": []}'), NonsenseError),
        (lambda h, _: send(h, '{"error": {"message": "no credit"}}', 401), NonsenseError),
        (lambda h, _: send(h, "busy", 503), UnreachableError),
        (lambda h, _: time.sleep(3), TooSlowError),
    ],
)
def test_a_judge_fails_as_a_reward_server_does(respond: Respond, failure: type[RewardError]) -> None:
    with server_that(respond) as url, pytest.raises(failure):
        score(judge(url, timeout_seconds=0.4 if failure is TooSlowError else 20), IMAGES[:2], PROMPTS[:2], None)


@pytest.mark.parametrize("status", [200, 401, 500])
def test_a_key_is_never_told(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")

    def echo(handler: BaseHTTPRequestHandler, _: bytes) -> None:
        send(handler, f"who is {handler.headers['Authorization']}?", status)

    with server_that(echo) as url, pytest.raises(RewardError, match=r"who is Bearer \.\.\.\?") as caught:
        score(judge(url), IMAGES[:1], PROMPTS[:1], None)
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\nsecret")
    with server_that(echo) as url, pytest.raises(RewardError, match="holds what cannot be sent") as caught:
        score(judge(url), IMAGES[:1], PROMPTS[:1], None)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["jpeg_incompressibilty"], "neither one of"),
        (["tests.rewards:blueness"], "has no 'blueness'"),
        (["tests.rewards:two_arguments"], "takes (images"),
        (["tests.rewards:redness", "size=3"], "takes (images"),
        (["jpeg_compressibility", "quality=3"], "unknown key 'quality'; known keys: none"),
        (["sentence_cosine", "template"], "is not key=value"),
    ],
)
def test_a_reward_that_cannot_be_served(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["reward", "serve", *words], monkeypatch) == 2
    assert message in capsys.readouterr().err


def test_the_command_ends_when_it_is_told_to(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    process = processes.start(["reward", "serve", "jpeg_compressibility", "--port", str(port)], log)
    try:
        processes.wait_until(lambda: process.poll() is not None or answers(port), 60, "the command")
        assert listeners(psutil.Process(process.pid)) == {("127.0.0.1", port)}
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, 130), log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()


def written(text: str, size: int = 128) -> np.ndarray:
    """A gray image (size, size, 3) with a red disc, and ``text`` on it."""
    image = Image.new("RGB", (size, size), "gray")
    draw = ImageDraw.Draw(image)
    draw.ellipse((size * 0.6, size * 0.6, size * 0.9, size * 0.9), fill="red")
    draw.multiline_text((size // 16, size // 6), text, fill="white", font=ImageFont.load_default(size // 6))
    return np.asarray(image)


def test_words_of_the_prompt_in_the_image_are_a_veto() -> None:
    pytest.importorskip("rapidocr_onnxruntime")
    cases = [
        ("ZEBRA", "a zebra on a beach", True),
        ("a zebra", "a zebra on a beach", True),
        ("six\nzebras", "Zebras at home", True),
        ("horse", "a zebra on a beach", False),
        ("on a", "a zebra on a beach", False),
        ("", "a zebra on a beach", False),
        ("", "", False),
        ("7", "a red seven on a gray background", False),
    ]
    images = np.stack([written(text) for text, _, _ in cases])
    verdict = vetoed(images, [prompt for _, prompt, _ in cases])
    assert (verdict.dtype, verdict.tolist()) == (np.dtype(bool), [expected for *_, expected in cases])
    assert not vetoed(IMAGES, ["a noise"] * 24).any()
    veto = load_reward("no_writing", parse_options("no_writing", {}))
    scores = score(veto, images, [prompt for _, prompt, _ in cases], None)
    assert scores.tolist() == [-float(expected) for *_, expected in cases]


def test_a_veto_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.rewards.writing.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape("options of no_writing: text in images is read by")) as refused:
        parse_options("no_writing", {})
    assert "pip install 'ouroboros-rl[ocr]'" in str(refused.value)
