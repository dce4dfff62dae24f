"""Rewards that another server computes. JSON both ways, and every failure has a type.

``http`` asks a reward server (:mod:`pipelines.rewards.server` is one), ``judge`` a vision–language model behind an
endpoint of OpenAI's form. A server that is away, too slow or talks nonsense raises UnreachableError, TooSlowError or
NonsenseError; nothing that a server does becomes a score of zero. Redirects are not followed.
"""

import base64
import io
import os
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
from pydantic import AfterValidator, AliasPath, Base64Bytes, BaseModel, Field, ValidationError

from pipelines.rewards import NonsenseError, Reward, RewardFunction, TooSlowError, UnreachableError

MAX_ANSWER = 2**20  # bytes: forty thousand scores, or a judge who cannot stop
MAX_IMAGES = 1024
_WORDS = 300  # characters of an error's text that are passed on
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")


class Query(BaseModel):
    """Images to be scored, with a prompt, and if there is a captioner a caption, for each."""

    images: list[Base64Bytes] = Field(min_length=1, max_length=MAX_IMAGES, description="PNG files of one size, base64")
    prompts: list[str] = Field(description="one an image")
    captions: list[str] | None = Field(None, description="one an image, or null")


class Scores(BaseModel):
    """The answer to a query."""

    scores: list[Annotated[float, Field(strict=True, allow_inf_nan=False)]] = Field(
        description="one finite number an image, in the order of the images; higher is better"
    )


class _Completion(BaseModel):
    content: str = Field(validation_alias=AliasPath("choices", 0, "message", "content"))


Answer = TypeVar("Answer", bound=BaseModel)


def _web_address(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError(f"{url!r} is no web address such as http://127.0.0.1:8100/score")
    if "@" in parts.netloc or re.search(r"(?i)(token|key|secret|password|signature)=", parts.query):
        raise ValueError("leave passwords and keys out of the address, which is stored: see api_key_variable")
    return url


class Http(Reward):
    """Whatever the server at ``url`` computes."""

    names = ("http",)
    url: Annotated[str, AfterValidator(_web_address)] = Field(description="what is asked, such as that of reward serve")
    timeout_seconds: float = Field(60, gt=0, description="for the whole answer to one chunk of images")
    api_key_variable: str | None = Field(
        None, pattern=r"^[A-Za-z_]\w*$", description="variable of the actors' environment with a key; null: none"
    )

    @property
    def key(self) -> str:
        """What the variable holds here: sent to ``url`` alone, and stored nowhere. Raises ValueError if it is unfit."""
        found = os.environ.get(self.api_key_variable or "", "").strip()
        if not (found.isascii() and found.isprintable()):
            raise ValueError(f"the environment's {self.api_key_variable} holds what cannot be sent as a key")
        return found

    def check(self, prompts: Sequence[str]) -> None:
        """The key that is named is there, unless the actors' environment is that of another machine."""
        named = self.api_key_variable if "api_key_variable" in self.model_fields_set else None
        if named and not self.key and "RAY_ADDRESS" not in os.environ:
            raise ValueError(f"the environment has no {named}: export it")

    def load(self, name: str, device: str) -> RewardFunction:
        """Asks for each chunk."""
        if self.api_key_variable and not self.key:
            raise ValueError(f"the environment has no {self.api_key_variable}: export it where the actors run")
        return self.scores

    def scores(self, images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> np.ndarray:
        """Scores (batch,) of images (batch, height, width, 3) uint8. Raises the failures of this module."""
        pictures = [_base64_png(image) for image in images]
        query = {"images": pictures, "prompts": list(prompts), "captions": captions and list(captions)}
        scores = _ask(self, self.url, query, Scores).scores
        if len(scores) != len(images):
            raise NonsenseError(f"{self.url} gave {len(scores)} scores for {len(images)} images")
        return np.array(scores)


class Judge(Http):
    """A vision–language model behind an endpoint of OpenAI's form: its number from 0 to ``scale``, divided by that."""

    names = ("judge",)
    model: str = Field(description="its name there")
    question: str = Field(
        'How well does this image show "{prompt}"? Answer with one number from 0 (not at all) to {scale} (perfectly), '
        "and nothing else.",
        pattern=r"\{prompt\}",
        description="may hold {scale}; the first number of the answer counts",
    )
    scale: float = Field(10, gt=0, description="the largest number of an answer")
    api_key_variable: str | None = Field("OPENAI_API_KEY", pattern=r"^[A-Za-z_]\w*$", description="sent if it is set")
    parallel: int = Field(8, ge=1, le=64, description="images asked about at once")

    def load(self, name: str, device: str) -> RewardFunction:
        """Asks for each image."""
        return self.scores

    def scores(self, images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> np.ndarray:
        """Scores (batch,) in [0, 1] of images (batch, height, width, 3) uint8. Raises the failures of this module."""
        with ThreadPoolExecutor(self.parallel) as threads:
            return np.array(list(threads.map(self._judge, images, prompts)))

    def _judge(self, image: np.ndarray, prompt: str) -> float:
        url = self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        question = self.question.replace("{scale}", f"{self.scale:g}").replace("{prompt}", prompt)
        picture = "data:image/png;base64," + _base64_png(image)
        content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": picture}}]
        query = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        words = _ask(self, url, query, _Completion).content
        number = _NUMBER.search(words)
        if number is None or not 0 <= float(number[0]) <= self.scale:
            raise NonsenseError(f"{url} answered {words[:_WORDS]!r}, not a number of 0 to {self.scale:g}")
        return float(number[0]) / self.scale


def _base64_png(image: np.ndarray) -> str:
    """An image (height, width, 3) uint8 as a PNG file, base64."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def _ask(options: Http, url: str, query: Mapping[str, Any], schema: type[Answer]) -> Answer:
    """POST ``query`` and read the answer, all within the time that is given. Raises the failures of this module.

    The bound holds for the whole: the exchange has a thread of its own, which is left alone if it takes longer, as a
    server that sends a byte now and then would keep every bound on a single wait.
    """
    answer: Future[Answer] = Future()
    seconds, key = options.timeout_seconds, options.key

    def exchange() -> None:
        try:
            answer.set_result(_exchange(url, query, schema, seconds, key))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=exchange, daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        raise TooSlowError(f"{url} did not answer within {seconds:g} s") from None


def _exchange(url: str, query: Mapping[str, Any], schema: type[Answer], seconds: float, key: str) -> Answer:
    import requests

    # A second more, so that the bound of the whole is what is met; and passwords in ~/.netrc are for other uses.
    how: dict[str, Any] = {"timeout": seconds + 1, "allow_redirects": False, "auth": lambda request: request}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = b""
    try:
        with requests.post(url, json=query, headers=headers, stream=True, **how) as response:
            for piece in response.iter_content(2**14):
                body += piece
                if len(body) > MAX_ANSWER:
                    raise NonsenseError(f"{url} answered with more than {MAX_ANSWER:,} bytes")
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        reason: BaseException = error
        while reason.__context__ is not None:
            reason = reason.__context__
        raise UnreachableError(f"{url} cannot be asked: {reason}") from error
    except requests.RequestException as error:
        raise NonsenseError(f"{url} cannot be read: {error}") from error
    text, elsewhere = body.decode(errors="replace"), response.headers.get("location", "")
    if key:
        text, elsewhere = text.replace(key, "..."), elsewhere.replace(key, "...")
    words, status = " ".join(text.split())[:_WORDS], response.status_code
    if status == 429 or status >= 500:
        raise UnreachableError(f"{url} failed with {status}: {words}")
    if status != 200:
        raise NonsenseError(f"{url} refused with {status}{elsewhere and f' and sends on to {elsewhere}'}: {words}")
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise NonsenseError(f"{url} answered {words!r}: {'.'.join(map(str, first['loc']))} {first['msg']}") from error
