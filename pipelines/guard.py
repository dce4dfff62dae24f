"""A guard in front of a sampler and behind it, read from a YAML file: what may be asked for, and what may come out.

Four stages after the system cards of DALL·E 2 and 3 (OpenAI 2022, 2023), each of which is measured alone by the study
``guard``: a blocklist, a classifier of prompts, rewriting by rules, and a check of the images. Each says what it did
and why (:class:`Entry`). Nothing here is random but the words that rewriting draws, by the prompt's own seed.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from pipelines.data.prompts import spelled, words_in
from pipelines.settings import CaptionerSettings
from pipelines.storage.locations import check_model, find
from pipelines.storage.model_files import read_json
from pipelines.storage.yaml_text import read_yaml
from policies.common.seeding import derive_seed
from policies.rl.settings import Settings, Share, explain

if TYPE_CHECKING:
    from pipelines.captioner import Captioner

FRONT = ("blocklist", "classifier")
STAGES = (*FRONT, "rewriting", "output")
Words = tuple[str, ...]
Decision = Literal["allowed", "refused", "rewritten", "withheld"]
Rollout = Callable[[list[str], list[int]], np.ndarray]  # of prompts and seeds an image each


class ClassifierSettings(Settings):
    """Logistic regression on sentence embeddings of examples, each in every context."""

    refused: Words = Field(min_length=1, description="what prompts ask for that are refused")
    allowed: Words = Field(min_length=1, description="what others ask for, of the same kinds")
    contexts: Words = Field(("{}",), min_length=1, description="prompts with {} in place of an example")
    threshold: Share = Field(0.5, description="a prompt is refused from this probability on")


class Rule(Settings):
    """What a prompt leaves open, and the words that are put there."""

    name: str = Field(min_length=1, description="of what is left open, in the log")
    unless: Words = Field((), description="words that leave nothing open; those that are drawn are among them")
    where: Words = Field(min_length=1, description="the first of these words in the prompt is rewritten")
    becomes: str = Field("{drawn}", description="what it becomes, with {drawn} and, to keep it, {word}")
    drawn: dict[str, Share] = Field(min_length=1, description="words and their probabilities, which are 1 in all")


class OutputSettings(Settings):
    """A captioner that looks at what was drawn."""

    words: Words = Field(min_length=1, description="what captions may not name")
    captioner: str = Field("models/digits/captioner", description="BLIP or BLIP-2: directory or hub name")
    threshold: float = Field(0.5, gt=0, le=1, description="an image is withheld from this probability of a word on")
    tries: int = Field(1, ge=1, le=100, description="images that are drawn until one is not withheld")


class GuardSettings(Settings):
    """A guard's stages; one that is left out is off."""

    blocklist: Words = Field((), description="words, or several in a row, that no prompt may hold, in any inflection")
    classifier: ClassifierSettings | None = Field(None, description="of prompts; null: none")
    rewriting: tuple[Rule, ...] = Field((), description="rules, applied one after another")
    output: OutputSettings | None = Field(None, description="of images; null: none")

    def only(self, stages: Collection[str]) -> "GuardSettings":
        """With no other stages than these."""
        off = {name: type(self).model_fields[name].default for name in STAGES if name not in stages}
        return self.model_copy(update=off)

    @model_validator(mode="after")
    def _is_of_one_mind(self) -> "GuardSettings":
        if wrong := [
            each for each in (*self.blocklist, *(self.output.words if self.output else ())) if not spelled(each)
        ]:
            raise ValueError(f"{wrong[0]!r} holds no letter and no digit")
        if self.classifier and (wrong := [each for each in self.classifier.contexts if each.count("{}") != 1]):
            raise ValueError(f"classifier.contexts: {wrong[0]!r} needs one {{}}, where an example is put")
        for rule in self.rewriting:
            if abs(sum(rule.drawn.values()) - 1) > 1e-6:
                raise ValueError(f"rewriting {rule.name}: probabilities are {sum(rule.drawn.values()):g} in all, not 1")
            if "{drawn}" not in rule.becomes or {"{", "}"} & {*re.sub("{drawn}|{word}", "", rule.becomes)}:
                raise ValueError(
                    f"rewriting {rule.name}: becomes has {{drawn}}, may have {{word}}, and no other braces"
                )
            if wrong := [each for each in rule.drawn if words_in(self.blocklist, each)]:
                raise ValueError(f"rewriting {rule.name}: draws {wrong[0]!r}, which the blocklist refuses")
        return self


@dataclass(frozen=True)
class Entry:
    """A line of the log: what a stage made of a prompt, or of the image that was drawn for it with a seed."""

    prompt: str
    seed: int
    stage: str
    decision: Decision
    why: str
    rewritten_to: str | None = None

    @property
    def line(self) -> str:
        """For people."""
        return f"{self.stage}: {self.prompt!r} is {self.decision}: {self.why}"


def read_guard(path: str, what: str = "guard") -> GuardSettings:
    """The guard of a YAML file. Raises ValueError, one line that begins with ``what`` it is."""
    found = find(path)
    if found is None or not found.is_file():
        raise ValueError(f"{what}: there is no file {path!r}")
    try:
        if not isinstance(content := read_yaml(found), dict) or not content:
            raise ValueError(f"it holds no stage: give one or more of {', '.join(STAGES)}")
        settings = GuardSettings.model_validate_json(json.dumps(content, default=str))
        if settings.output:
            check_model(place := settings.output.captioner, "config.json", "output.captioner")
            if (at := find(place)) and read_json(at / "config.json").get("model_type") not in ("blip", "blip-2"):
                raise ValueError(f"output.captioner: {place} is no captioner; name a model of BLIP or BLIP-2")
    except ValueError as error:
        says = explain(GuardSettings, error) if isinstance(error, ValidationError) else error
        raise ValueError(f"{what} {path}: {says}") from error
    return settings


@lru_cache(maxsize=4)
def _trained(settings: ClassifierSettings) -> Callable[[str], float]:
    """The probability that a prompt is one to refuse. Texts are encoded alone, so that nothing depends on a batch."""
    from sklearn.linear_model import LogisticRegression

    from pipelines.rewards.text import load_encoder

    encoder = load_encoder(None)

    def embedded(text: str) -> np.ndarray:
        return np.asarray(encoder.encode(text, normalize_embeddings=True, show_progress_bar=False), np.float64)

    examples, contexts = settings.refused + settings.allowed, settings.contexts
    texts = np.stack([embedded(context.replace("{}", each)) for each in examples for context in contexts])
    fitted = LogisticRegression(C=1000, class_weight="balanced", max_iter=10_000)
    fitted.fit(texts, np.arange(len(texts)) < len(settings.refused) * len(contexts))
    return lru_cache(4096)(lambda text: float(fitted.predict_proba(embedded(text)[None])[0, 1]))


class Guard:
    """The stages of ``settings``, ready to use."""

    def __init__(self, settings: GuardSettings, device: str = "cpu") -> None:
        self.settings, self.device = settings, device

    def refusal(self, prompt: str, seed: int = 0) -> Entry | None:
        """Why a prompt is refused, by the first stage that does; None: it is not."""
        if word := words_in(self.settings.blocklist, prompt):
            return Entry(prompt, seed, "blocklist", "refused", f"it names {word!r}")
        classifier = self.settings.classifier
        if classifier and (chance := _trained(classifier)(prompt)) >= classifier.threshold:
            return Entry(prompt, seed, "classifier", "refused", f"probability {chance:.3f}")
        return None

    def ground(self, prompt: str, seed: int) -> tuple[str, list[Entry]]:
        """The prompt with what it leaves open put in, drawn by ``seed``, and what each rule did."""
        entries = []
        for rule in self.settings.rewriting:
            anywhere = rf"(?<!\w)(?:{'|'.join(map(re.escape, rule.where))})(?!\w)"
            if words_in((*rule.drawn, *rule.unless), prompt) or not (
                place := re.search(anywhere, prompt, re.IGNORECASE)
            ):
                continue
            random = np.random.default_rng(derive_seed(seed, f"guard {rule.name} {prompt}"))
            drawn = [*rule.drawn][np.searchsorted(np.cumsum([*rule.drawn.values()])[:-1], random.random(), "right")]
            text = rule.becomes.replace("{word}", place[0]).replace("{drawn}", drawn)
            article = "an" if drawn[0].lower() in "aeiou" else "a"
            whole = f"{prompt[: place.start()]}{text}{prompt[place.end() :]}"
            whole = re.sub(rf"\ban?(?= {re.escape(drawn)}\b)", article, whole)
            why = f"it leaves the {rule.name} open: drew {drawn!r} of {len(rule.drawn)}"
            entries.append(Entry(prompt, seed, "rewriting", "rewritten", why, whole))
            prompt = whole
        return prompt, entries

    def front(self, prompt: str, seed: int) -> tuple[str | None, list[Entry]]:
        """What may be drawn for a prompt, None for nothing, and the log of the stages in front of the sampler."""
        if refused := self.refusal(prompt, seed):
            return None, [refused]
        grounded, entries = self.ground(prompt, seed)
        return grounded, entries or [Entry(prompt, seed, "front", "allowed", "no stage objects")]

    def grounded(self, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[list[str], list[Entry]]:
        """:meth:`ground` of several."""
        found = [*map(self.ground, prompts, seeds)]
        return [text for text, _ in found], [entry for _, entries in found for entry in entries]

    def drawn(
        self, rollout: Rollout, asked: Sequence[str], prompts: Sequence[str], seeds: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, list[Entry]]:
        """Images (n, height, width, 3) uint8 that ``rollout`` draws of what is ``asked`` for ``prompts``, which of them
        are withheld (n,), and the log. One that is withheld is drawn again by another seed, up to so many tries."""
        images, withheld, log = rollout(list(asked), list(seeds)), np.zeros(len(asked), bool), list[Entry]()
        if not (output := self.settings.output):
            return images, withheld, log
        waiting = list(range(len(asked)))
        for attempt in range(output.tries if waiting else 0):
            if attempt:
                fresh = [derive_seed(seeds[each], "guard", attempt) for each in waiting]
                images[waiting] = rollout([asked[each] for each in waiting], fresh)
            chances = _captioner(output.captioner, self.device).chances(images[waiting], output.words)
            withheld[waiting] = chances >= output.threshold
            for each, chance in zip(waiting, chances, strict=True):
                why = f"try {attempt + 1}: a caption would name it with probability {chance:.3f}"
                decision: Decision = "withheld" if withheld[each] else "allowed"
                log.append(Entry(prompts[each], seeds[each], "output", decision, why))
            if not (waiting := np.flatnonzero(withheld).tolist()):
                break
        return images, withheld, log

    def unasked(self, captions: Sequence[str]) -> float:
        """Share of captions that name what the output stage forbids."""
        words = self.settings.output.words if self.settings.output else ()
        return float(np.mean([words_in(words, each) is not None for each in captions]))


NO_GUARD = Guard(GuardSettings())


@lru_cache(maxsize=1)
def _captioner(path: str, device: str) -> "Captioner":
    from pipelines.captioner import Captioner

    return Captioner(CaptionerSettings(path=path), device)


def write_log(path: Path, entries: Iterable[Entry], **more: int) -> None:
    """Add ``entries``, a JSON object a line, to the file at ``path``, if there are any."""
    if lines := [json.dumps({**more, **asdict(each)}, ensure_ascii=False) + "\n" for each in entries]:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
