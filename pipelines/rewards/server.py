"""A server for any reward of this machine, with the schema that the reward ``http`` speaks.

It is the reference of that schema: ``/openapi.json`` holds it, ``/docs`` shows it. Every error is JSON,
``{"detail": reason}``: 4xx for a query that cannot be scored, 500 for a reward that fails. No pickle, no files of the
query's choosing, and bounds on all that a query can make the server hold. Whoever can reach it can use it.
"""

import io
import threading
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from pipelines.rewards import RewardError, RewardFunction, score
from pipelines.rewards.options import RewardOptions
from pipelines.rewards.remote import Query, Scores
from policies.health import SickNumbers

MAX_BODY = 2**29  # bytes of a query
MAX_PIXELS = 2**28  # of all images of a query together


def build_app(name: str, function: RewardFunction, options: RewardOptions) -> FastAPI:
    """The application that answers ``POST /score`` with what ``function``, the reward ``name``, says."""
    app = FastAPI(title=f"reward {name}", version="1")
    one_at_a_time = threading.Lock()  # a reward need not be made for several threads

    @app.middleware("http")
    async def bound(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        length = request.headers.get("content-length", "" if request.method == "POST" else "0")
        if not length.isdigit():
            return JSONResponse({"detail": "the query has to say its Content-Length"}, 411)
        if int(length) > MAX_BODY:
            return JSONResponse({"detail": f"a query has at most {MAX_BODY:,} bytes"}, 413)
        return await go_on(request)

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
        images = decode(query.images)
        try:
            with one_at_a_time:
                return Scores(scores=score(function, images, query.prompts, query.captions).tolist())
        except (RewardError, SickNumbers) as error:
            raise HTTPException(500, str(error)) from error

    return app


def decode(files: Sequence[bytes]) -> np.ndarray:
    """PNG ``files`` of one size, on white, as images (batch, height, width, 3) uint8. Raises HTTPException 422."""
    from PIL import Image

    from pipelines.pictures import flat

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
        except Exception as error:  # a stranger's bytes may fail in any way
            raise HTTPException(422, f"image {number}: {error}") from error
    return np.stack(images)


def serve(name: str, function: RewardFunction, options: RewardOptions, host: str, port: int) -> None:
    """Answer until interrupted."""
    import uvicorn

    uvicorn.run(build_app(name, function, options), host=host, port=port, log_level="warning")
