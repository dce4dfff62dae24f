"""Files of prompts, and what a model's text encoders see of them. Importable without torch."""

import codecs
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipelines.denoisers import ModelFiles
from pipelines.storage.locations import find
from pipelines.storage.model_files import read_json, reading

UNSEEN = "[unseen]"  # in a file of prompts: those below are for evaluations alone
_T5_TOKENS = 256  # what the stock pipeline of Stable Diffusion 3 gives to T5


def read_prompts(path: str) -> tuple[list[str], list[str]]:
    """The prompts of a UTF-8 text file, one a line, and those after the line ``[unseen]``, in any case, which are for
    evaluations alone.

    Lines end with a line feed, a carriage return, or both; blank ones and those that start with # are left out. Raises
    ValueError naming the line.
    """
    found = find(path)
    if found is None or not found.is_file():
        raise ValueError(f"prompts: there is no file {path!r}")
    content = found.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"prompts: {path!r} is UTF-16 or UTF-32 text: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = content[: error.start].count(b"\n") + 1
        raise ValueError(f"prompts: line {where} of {path!r} is not UTF-8 text: save the file as UTF-8") from error
    given = []
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1):
        odd = [c for c in line if c == "\ufeff" or (c != "\t" and unicodedata.category(c) in ("Cc", "Zl", "Zp"))]
        if odd:
            name = f"U+{ord(odd[0]):04X}"
            raise ValueError(f"prompts: line {number} of {path!r} holds the control character {name}: take it out")
        if line.strip() and not line.lstrip().startswith("#"):
            given.append(UNSEEN if line.strip().lower() == UNSEEN else line.strip())
    seen = given.index(UNSEEN) if UNSEEN in given else len(given)
    prompts, unseen = given[:seen], given[seen + 1 :]
    if not prompts:
        raise ValueError(f"prompts: {path!r} holds no prompt to train on")
    repeated = len(given) - len(set(given))
    if repeated:
        raise ValueError(f"prompts: {path!r} repeats {repeated} of its prompts; each may stand once")
    return prompts, unseen


def naming(concept: str, text: str) -> re.Match[str] | None:
    """Where ``text`` first holds the words of ``concept``, in any case; None: nowhere."""
    return re.search(rf"(?<!\w){re.escape(concept)}(?!\w)", text, re.IGNORECASE)


def renamed(text: str, concept: str, word: str) -> str:
    """``text`` with another word for the concept, where it is first named."""
    found = naming(concept, text)
    return f"{text[: found.start()]}{word}{text[found.end() :]}" if found else text


def spelled(text: str) -> list[str]:
    """The words of a text, runs of letters or of digits, without case, accents, fonts and invisible characters."""
    plain = "".join(
        c for c in unicodedata.normalize("NFKD", text.casefold()) if unicodedata.category(c) not in ("Cf", "Mn")
    )
    return re.findall(r"[^\W\d_]+|\d+", plain)


@lru_cache
def _inflected(entry: str) -> re.Pattern[str]:
    """Finds a word in any inflection, or several of them in a row, in words that are joined by blanks."""

    def forms(word: str) -> str:
        if not word.isalpha():
            return word
        short = f"|{word[:-1]}(?:ing|ed|er|ers|y|ies|ity|ish)" if len(word) > 3 and word[-1] in "ey" else ""
        return f"(?:{word}(?:s|es|d|ed|ing|er|ers|ish|ly|fold)?|{word}{word[-1]}(?:ing|ed|er|ers){short})"

    return re.compile(rf"(?<!\S){' '.join(map(forms, spelled(entry)))}(?!\S)")


def words_in(entries: Iterable[str], text: str) -> str | None:
    """The first of ``entries`` that a text holds, by its words."""
    words = " ".join(spelled(text))
    return next((each for each in entries if _inflected(each).search(words)), None)


def unseen_words(prompts: Sequence[str], files: ModelFiles) -> list[str]:
    """Words of ``prompts`` that the model's text encoders do not see, for people: a line for each prompt that one of
    them cuts, and for each that is the same to all of them as one before."""
    ids: list[list[tuple[int, ...]]] = [[] for _ in prompts]
    lines = []
    tokenizers = sorted(part for part in files.parts if part.startswith("tokenizer"))
    for part in tokenizers:
        most, encode = _tokenizer(files.directory / part, files.parts[part])
        for number, prompt in enumerate(prompts):
            found = encode(prompt)
            ids[number].append(tuple(found.ids[:most]))
            if len(found.ids) > most:
                rest = prompt[found.offsets[most][0] :]
                count = f"{most} of the {len(found.ids)} tokens of prompt {number + 1}"
                lines.append(f"{part} reads {count}, {prompt!r}: {rest!r} is left out")
    first: dict[tuple[tuple[int, ...], ...], int] = {}
    for number, known in enumerate(map(tuple, ids)):
        if tokenizers and (same := first.setdefault(known, number)) != number:
            both = f"{prompts[same]!r} and {prompts[number]!r}"
            lines.append(f"prompts {same + 1} and {number + 1} are one to the model, which reads the same of {both}")
    return lines


def unused(word: str, texts: Iterable[str], files: ModelFiles) -> bool:
    """Whether ``word`` is one token of each of the model's vocabularies, and one that is nowhere in ``texts``."""
    for part in (part for part in files.parts if part.startswith("tokenizer")):
        _, encode = _tokenizer(files.directory / part, files.parts[part])
        (token, *more), known = encode(word).ids, {each for text in texts for each in encode(text).ids}
        if more or token in known or not naming(word, encode(word).tokens[0].removesuffix("</w>")):
            return False
    return True


def _tokenizer(directory: Path, entry: tuple[str, str]) -> tuple[int, Callable[[str], Any]]:
    """How many tokens of a prompt are read beside those that mark its ends, and what splits it up."""
    from tokenizers import Tokenizer

    with reading(directory):
        most = read_json(directory / "tokenizer_config.json").get("model_max_length")
        most = _T5_TOKENS if entry[1].startswith("T5") else most
        if type(most) is not int or not 2 < most < 100_000:
            raise ValueError(f"model_max_length is {most!r}, no number of tokens that prompts are cut to")
        if (directory / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        else:
            import transformers

            tokenizer = getattr(transformers, entry[1]).from_pretrained(directory).backend_tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        marks = tokenizer.num_special_tokens_to_add(is_pair=False)
    return most - marks, lambda prompt: tokenizer.encode(prompt, add_special_tokens=False)
