"""Files that appear whole or not at all.

A directory is written aside, flushed to the disk and renamed. Its ``manifest.json`` holds the SHA-256 of every file, so
a truncated or altered one is detected when it is read.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
Files = dict[str, bytes]  # relative path → content


class DamagedFiles(RuntimeError):  # noqa: N818
    """A committed directory whose files do not match its manifest."""


def commit_directory(target: Path, files: Mapping[str, bytes], about: Mapping[str, Any]) -> None:
    """Put ``files`` at ``target``, in place of what was there; ``about`` is kept in the manifest."""
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _write_directory(aside, files, about)
    except OSError:  # a full disk is not left fuller
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)
    _flush_directory(target.parent)


def _write_directory(aside: Path, files: Mapping[str, bytes], about: Mapping[str, Any]) -> None:
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    manifest = json.dumps({**about, "sha256": hashes}, indent=1).encode()
    folders = {aside} | {(aside / name).parent for name in files}
    for folder in sorted(folders):
        folder.mkdir(parents=True, exist_ok=True)
    for name, content in {**files, MANIFEST: manifest}.items():
        write_durably(aside / name, content)
    for folder in folders:
        _flush_directory(folder)


def read_directory(directory: Path) -> tuple[Files, dict[str, Any]]:
    """The files of a commit and its manifest. Raises DamagedFiles."""
    manifest = read_manifest(directory)
    try:
        contents = {name: (directory / name).read_bytes() for name in manifest["sha256"]}
    except OSError as error:
        raise DamagedFiles(f"{directory} cannot be read: {type(error).__name__}: {error}") from error
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != manifest["sha256"][name]:
            raise DamagedFiles(f"{directory / name} does not match its manifest: it was truncated or altered")
    return contents, manifest


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a commit. Raises DamagedFiles."""
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise DamagedFiles(f"{directory} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("sha256"), dict):
        raise DamagedFiles(f"{directory} cannot be read: its {MANIFEST} is not one of a commit")
    for name in manifest["sha256"]:  # a stranger's may point anywhere
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DamagedFiles(f"{directory} cannot be read: its {MANIFEST} names {name!r}, outside of it")
    return manifest


def write_json(path: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
    """Put a JSON file in place of the old one; large ones without indent."""
    replace_durably(path, (json.dumps(content, indent=indent) + "\n").encode())


def as_lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    """One JSON object a line."""
    return b"".join(json.dumps(record, default=str).encode() + b"\n" for record in records)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines; none if there is no such file. What is damaged, as a last line may be that
    was cut off in the middle, is left out."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def cut_lines(path: Path, wanted: Callable[[dict[str, Any]], bool] = lambda _: True) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines that are ``wanted``; what else is in it, or damaged, is taken out of it."""
    records = [record for record in read_lines(path) if wanted(record)]
    if path.exists() and path.read_bytes() != as_lines(records):
        replace_durably(path, as_lines(records))
    return records


def replace_durably(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old or the new one, never half of it."""
    aside = path.with_name(f".{path.name}.partial")
    write_durably(aside, content)
    os.replace(aside, path)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and flush it to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def append_durably(path: Path, content: bytes) -> None:
    """Add all of ``content`` to a file, or nothing of it if the disk takes no more, and flush it to the disk."""
    with path.open("ab", buffering=0) as file:
        before, left = os.fstat(file.fileno()).st_size, memoryview(content)
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
