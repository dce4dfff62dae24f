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
from unicodedata import category, normalize

import numpy as np
from pydantic import Field, ValidationError, field_validator, model_validator

from pipelines.settings import CaptionerSettings
from pipelines.storage.locations import check_model, find
from pipelines.storage.yaml_text import read_yaml
from policies.common.seeding import derive_seed
from policies.rl.settings import Settings, Share, explain

if TYPE_CHECKING:
    from pipelines.captioner import Captioner

STAGES = ("blocklist", "classifier", "rewriting", "output")
Words = tuple[str, ...]
Decision = Literal["allowed", "refused", "rewritten", "withheld"]
Rollout = Callable[[list[str], list[int]], np.ndarray]  # of prompts and seeds an image each
_BATCH = 90  # images that are looked at at once
_ENDINGS = "s|es|d|ed|ing|er|ers|ish|ly|fold"


class ClassifierSettings(Settings):
    """Logistic regression on sentence embeddings of examples, each in every context."""

    refused: Words = Field(min_length=1, description="what prompts ask for that are refused")
    allowed: Words = Field(min_length=1, description="what others ask for, of the same kinds")
    contexts: Words = Field(("{}",), min_length=1, description="prompts with {} in place of an example")
    threshold: Share = Field(0.5, description="a prompt is refused from this probability on")

    @field_validator("contexts")
    @classmethod
    def _have_a_place(cls, contexts: Words) -> Words:
        if wrong := [each for each in contexts if each.count("{}") != 1]:
            raise ValueError(f"{wrong[0]!r} needs one {{}}, where an example is put")
        return contexts


class Rule(Settings):
    """What a prompt leaves open, and the words that are put there."""

    name: str = Field(min_length=1, description="of what is left open, in the log")
    unless: Words = Field((), description="words that leave nothing open; those that are drawn are among them")
    where: Words = Field(min_length=1, description="the first of these words in the prompt is rewritten")
    becomes: str = Field("{drawn}", description="what it becomes, with {drawn} and, to keep it, {word}")
    drawn: dict[str, Share] = Field(min_length=1, description="words and their probabilities, which are 1 in all")

    @model_validator(mode="after")
    def _is_a_distribution(self) -> "Rule":
        if abs(sum(self.drawn.values()) - 1) > 1e-6:
            raise ValueError(f"drawn: the probabilities are {sum(self.drawn.values()):g} in all, not 1")
        left = self.becomes.replace("{drawn}", "").replace("{word}", "")
        if "{drawn}" not in self.becomes or set("{}") & set(left):
            raise ValueError(f"becomes: {self.becomes!r} must hold {{drawn}}, may hold {{word}}, and no other braces")
        return self


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
        for entry in (*self.blocklist, *(self.output.words if self.output else ())):
            if not spelled(entry):
                raise ValueError(f"{entry!r} holds no letter and no digit")
        for rule in self.rewriting:
            if wrong := [each for each in rule.drawn if named(self.blocklist, each)]:
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
        return f"{self.decision} by the {self.stage}: {self.prompt!r}: {self.why}"


def read_guard(path: str, what: str = "guard") -> GuardSettings:
    """The guard of a YAML file. Raises ValueError, one line that begins with ``what`` it is."""
    found = find(path)
    if found is None or not found.is_file():
        raise ValueError(f"{what}: there is no file {path!r}")
    try:
        content = read_yaml(found)
        if not isinstance(content, dict):
            raise ValueError(f"it holds no stage: give one or more of {', '.join(STAGES)}")
        return GuardSettings.model_validate(_tuples(content))
    except ValidationError as error:
        raise ValueError(f"{what} {path}: {explain(GuardSettings, error)}") from error
    except ValueError as error:
        raise ValueError(f"{what} {path}: {error}") from error


def _tuples(content: object) -> object:
    if isinstance(content, dict):
        return {key: _tuples(value) for key, value in content.items()}
    return tuple(map(_tuples, content)) if isinstance(content, list) else content


def spelled(text: str) -> list[str]:
    """The words of a text, runs of letters or of digits, without case, accents, fonts and invisible characters."""
    plain = "".join(c for c in normalize("NFKD", text.casefold()) if category(c) not in ("Cf", "Mn"))
    return re.findall(r"[^\W\d_]+|\d+", plain)


@lru_cache
def _pattern(entry: str) -> re.Pattern[str]:
    """Finds a word in any inflection, or several of them in a row, in words that are joined by blanks."""

    def forms(word: str) -> str:
        if not word.isalpha():
            return word
        short = f"|{word[:-1]}(?:ing|ed|er|ers|y|ies|ity|ish)" if word[-1] in "ey" else ""
        return f"(?:{word}(?:{_ENDINGS})?|{word}{word[-1]}(?:ing|ed|er|ers){short})"

    return re.compile(rf"(?<!\S){' '.join(map(forms, spelled(entry)))}(?!\S)")


def named(entries: Iterable[str], text: str) -> str | None:
    """The first of ``entries`` that a text holds, by its words."""
    words = " ".join(spelled(text))
    return next((each for each in entries if _pattern(each).search(words)), None)


@lru_cache(maxsize=4)
def _trained(settings: ClassifierSettings) -> Callable[[str], float]:
    """The probability that a prompt is one to refuse. Texts are encoded alone, so that nothing depends on a batch."""
    from sklearn.linear_model import LogisticRegression

    from pipelines.rewards.text import load_encoder

    encoder = load_encoder(None)

    def embedded(text: str) -> np.ndarray:
        return np.asarray(encoder.encode(text, normalize_embeddings=True, show_progress_bar=False), np.float64)

    texts = [
        context.replace("{}", each) for each in settings.refused + settings.allowed for context in settings.contexts
    ]
    labels = np.arange(len(texts)) < len(settings.refused) * len(settings.contexts)
    fitted = LogisticRegression(C=1000, class_weight="balanced", max_iter=10_000)
    fitted.fit(np.stack([embedded(text) for text in texts]), labels)
    return lru_cache(4096)(lambda text: float(fitted.predict_proba(embedded(text)[None])[0, 1]))


class Guard:
    """The stages of ``settings``, ready to use."""

    def __init__(self, settings: GuardSettings, device: str = "cpu") -> None:
        self.settings, self.device = settings, device

    @classmethod
    def read(cls, path: str, what: str = "guard") -> "Guard":
        """Of a file. Raises ValueError, also where its captioner is not there."""
        settings = read_guard(path, what)
        if settings.output:
            check_model(settings.output.captioner, "config.json", f"{what} {path}: output.captioner")
        return cls(settings)

    def refusal(self, prompt: str, seed: int = 0) -> Entry | None:
        """Why a prompt is refused, by the first stage that does; None: it is not."""
        if word := named(self.settings.blocklist, prompt):
            return Entry(prompt, seed, "blocklist", "refused", f"it names {word!r}")
        if classifier := self.settings.classifier:
            chance = _trained(classifier)(prompt)
            if chance >= classifier.threshold:
                return Entry(prompt, seed, "classifier", "refused", f"probability {chance:.3f}")
        return None

    def ground(self, prompt: str, seed: int) -> tuple[str, list[Entry]]:
        """The prompt with what it leaves open put in, drawn by ``seed``, and what each rule did."""
        entries = []
        for rule in self.settings.rewriting:
            place = None if named((*rule.drawn, *rule.unless), prompt) else _first(rule.where, prompt)
            if place:
                random = np.random.default_rng(derive_seed(seed, f"guard {rule.name}"))
                shares = np.array([*rule.drawn.values()])
                drawn = str(random.choice([*rule.drawn], p=shares / shares.sum()))
                text = rule.becomes.replace("{word}", place[0]).replace("{drawn}", drawn)
                whole = f"{prompt[: place.start()]}{text}{prompt[place.end() :]}"
                article = "an" if drawn[0].lower() in "aeiou" else "a"
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
        found = [self.ground(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        return [text for text, _ in found], [entry for _, entries in found for entry in entries]

    def drawn(
        self, rollout: Rollout, asked: Sequence[str], prompts: Sequence[str], seeds: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, list[Entry]]:
        """Images (n, height, width, 3) uint8 that ``rollout`` draws of what is ``asked`` for ``prompts``, which of them
        are withheld (n,), and the log. One that is withheld is drawn again by another seed, up to so many tries."""
        images, withheld, log = rollout(list(asked), list(seeds)), np.zeros(len(asked), bool), list[Entry]()
        output, waiting = self.settings.output, np.arange(len(asked))
        for attempt in range(output.tries) if output else ():
            if attempt and len(waiting):
                fresh = [derive_seed(seeds[each], "guard", attempt) for each in waiting]
                images[waiting] = rollout([asked[each] for each in waiting], fresh)
            chances = self.chances(images[waiting])
            withheld[waiting] = chances >= output.threshold
            for each, chance in zip(waiting, chances, strict=True):
                why = f"try {attempt + 1}: a caption would name it with probability {chance:.3f}"
                decision: Decision = "withheld" if withheld[each] else "allowed"
                log.append(Entry(prompts[each], seeds[each], "output", decision, why))
            waiting = np.flatnonzero(withheld)
        return images, withheld, log

    def unasked(self, captions: Sequence[str]) -> float:
        """Share of captions that name what the output stage forbids."""
        words = self.settings.output.words if self.settings.output else ()
        return float(np.mean([named(words, each) is not None for each in captions]))


NO_GUARD = Guard(GuardSettings())


def _first(words: Sequence[str], prompt: str) -> re.Match[str] | None:
    """The first place of a prompt where one of ``words`` stands as it is, in any case."""
    return re.search(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", prompt, re.IGNORECASE)


@lru_cache(maxsize=1)
def _looker(path: str, device: str) -> "Captioner":
    from pipelines.captioner import Captioner

    return Captioner(CaptionerSettings(path=path), device)


def write_log(path: Path, entries: Iterable[Entry], **more: int) -> None:
    """Add ``entries``, a JSON object a line, to the file at ``path``, if there are any."""
    if not (entries := list(entries)):
        return
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**more, **asdict(each)}, ensure_ascii=False) + "\n" for each in entries)
