"""A server for any reward of this machine, with the schema that the reward ``http`` speaks.

It is the reference of that schema: ``/openapi.json`` holds it, ``/docs`` shows it. Every error is JSON,
``{"detail": reason}``: 401 without the token, if there is one, 4xx for a query that cannot be scored, 500 for a reward
that fails. No pickle, no files of the query's choosing. All queries together hold a bounded amount of memory, and who
sends slowly is left.
"""

import asyncio
import hmac
import io
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipelines.rewards import Reward, RewardError, RewardFunction, score
from pipelines.rewards.remote import Query, Scores
from policies.rl.health import DegenerateBatch

MAX_BODY, MAX_HELD = 2**29, 2**30  # bytes of a query, and of all that are under way
MAX_PIXELS = 2**28  # of all images of a query together
TOKEN_VARIABLE, SHORTEST_TOKEN = "OUROBOROS_REWARD_TOKEN", 16
HOW_TO_MAKE_ONE = "openssl rand -hex 32 makes one"
MAX_CONNECTIONS = 128
PATIENCE_SECONDS = 60.0  # for a query to come in whole, and for its turn to


def read_token(file: Path | None) -> str | None:
    """The token that ``file`` or the environment holds. Raises ValueError for one that does not keep others out."""
    if file is None:
        token, where = os.environ.get(TOKEN_VARIABLE, "").strip(), f"the environment's {TOKEN_VARIABLE}"
        if not token:
            return None
    else:
        where = f"--token-file {file}"
        try:
            if file.stat().st_mode & 0o077:
                raise ValueError(f"{where} can be read by other users: chmod 600 {file}")
            token = file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{where} cannot be read: {getattr(error, 'strerror', 'it is no text')}") from error
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"{where} has to be {SHORTEST_TOKEN} printable characters or more: {HOW_TO_MAKE_ONE}")
    return token


class _Gate:
    """Lets a query in once it has the token and there is room for it, and the application read it from memory."""

    def __init__(self, app: Any, token: str | None) -> None:
        self.app, self.token = app, f"Bearer {token}".encode() if token else None
        self.held, self.turn = 0, asyncio.Condition()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        size = headers.get(b"content-length", b"" if scope["method"] == "POST" else b"0")
        length = int(size) if size.isdigit() else -1
        held, refusal = 0, None
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                if self.token and not hmac.compare_digest(headers.get(b"authorization", b""), self.token):
                    refusal = 401, "ask with the header Authorization: Bearer TOKEN"
                    await _read(receive, keep=False)  # or a client that is still sending would not hear of it
                elif length < 0:
                    refusal = 411, "the query has to say its Content-Length"
                elif length > MAX_BODY:
                    refusal = 413, f"a query has at most {MAX_BODY:,} bytes"
                else:
                    async with self.turn:
                        await self.turn.wait_for(lambda: self.held + length <= MAX_HELD)
                        self.held += (held := length)
                    messages = [{"type": "http.request", "body": await _read(receive)}]
            if refusal is None:
                return await self.app(scope, lambda: _next(messages, receive), send)
        except TimeoutError:
            refusal = 408, f"a query has to come in within {PATIENCE_SECONDS:g} s, or there are too many of them"
        finally:
            if held:
                async with self.turn:
                    self.held -= held
                    self.turn.notify_all()
        return await JSONResponse({"detail": refusal[1]}, refusal[0], {"connection": "close"})(scope, receive, send)


async def _read(receive: Any, keep: bool = True) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        more = message.get("more_body", False)
        if keep:
            parts.append(message.get("body", b""))
    return b"".join(parts)


async def _next(messages: list[Any], receive: Any) -> Any:
    return messages.pop() if messages else await receive()


class Protocol(H11Protocol):
    """HTTP that leaves a client that does not end the head of its request, which uvicorn waits for without end."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._look(None)

    def _look(self, before: Any) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle and before == (self.cycle,):
            self.transport.close()
        elif not self.transport.is_closing():
            self.loop.call_later(PATIENCE_SECONDS / 2, self._look, (self.cycle,) if idle else None)


def build_app(name: str, function: RewardFunction, options: Reward, token: str | None = None) -> FastAPI:
    """The application that answers ``POST /score`` with what ``function``, the reward ``name``, says: any client, or
    those that have the ``token``."""
    app = FastAPI(title=f"reward {name}", version="1")
    app.add_middleware(_Gate, token=token)
    one_at_a_time = threading.Lock()  # a reward need not be made for several threads

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]  # without what was sent, which the default handler would send back
        return JSONResponse({"detail": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"}, 422)

    @app.post("/score", summary=type(options).__doc__)
    def answer(query: Query) -> Scores:
        for part in ("prompts", "captions"):
            texts = getattr(query, part)
            if texts is None and options.needs_captions:
                raise HTTPException(422, f"{part}: {name} reads them, so the run needs a captioner")
            if texts is not None and len(texts) != len(query.images):
                raise HTTPException(422, f"{part}: {len(texts)} for {len(query.images)} images")
        try:
            with one_at_a_time:  # also of what is decoded
                images = decode(query.images)
                return Scores(scores=score(function, images, query.prompts, query.captions).tolist())
        except (RewardError, DegenerateBatch) as error:
            raise HTTPException(500, str(error)) from error

    return app


def decode(files: Sequence[bytes]) -> np.ndarray:
    """PNG ``files`` of one size, on white, as images (batch, height, width, 3) uint8. Raises HTTPException 422."""
    from PIL import Image

    from pipelines.data.pictures import flat

    images: list[np.ndarray] = []
    left = MAX_PIXELS
    for number, file in enumerate(files):
        try:
            with Image.open(io.BytesIO(file), formats=["PNG"]) as image:  # only its head is read by now
                left -= image.width * image.height
                if left < 0:
                    raise ValueError(f"a query has at most {MAX_PIXELS:,} pixels")
                images.append(np.asarray(flat(image).convert("RGB")))
            if images[-1].shape != images[0].shape:
                raise ValueError(f"its size is {images[-1].shape[:2]}, that of the first {images[0].shape[:2]}")
        except Exception as error:  # bytes from outside may fail in any way
            raise HTTPException(422, f"image {number}: {error}") from error
    return np.stack(images)


def serve(name: str, function: RewardFunction, options: Reward, host: str, port: int, token: str | None) -> None:
    """Answer until interrupted."""
    import uvicorn

    app = build_app(name, function, options, token)
    limits: dict[str, Any] = {"limit_concurrency": MAX_CONNECTIONS, "http": Protocol, "ws": "none"}
    uvicorn.run(app, host=host, port=port, log_level="warning", **limits)
