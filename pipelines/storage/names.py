"""Names of files from names that people chose: one function, so that two names never mean one file.

A name that is safe everywhere stays as it is. Any other keeps what is readable of it and ends in ``--`` and a hash of
the whole, which no safe name does.
"""

import hashlib
import re
import unicodedata

_SAFE = re.compile(r"[a-z0-9_]+([.-][a-z0-9_]+)*")  # no capitals, which some file systems fold; no --; no . at an end
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?")  # devices, on Windows


def file_name(name: str, most: int = 200) -> str:
    """A file's name for ``name``, in the characters a–z, A–Z, 0–9, ``_``, ``-`` and ``.``, at most so many (and bytes).

    Different names have different file names, also where upper and lower case are one. The default leaves room for
    what is put around it: a file's name has 255 bytes at most.
    """
    if len(name) <= most and _SAFE.fullmatch(name) and not _RESERVED.fullmatch(name):
        return name
    letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    readable = re.sub(r"[\W-]+", "-", letters).strip("-")
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{readable[: most - 16].rstrip('-') or 'name'}--{digest}"
