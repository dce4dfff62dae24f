"""Files that appear whole or not at all.

A directory is written aside, flushed to the disk and renamed. Its ``manifest.json`` holds the SHA-256 of every file, so
a truncated or altered one is detected when it is read. Readers name the file that is damaged, and bound what they read.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

MANIFEST = "manifest.json"
Files = dict[str, bytes]  # relative path → content
Content = bytes | Iterable[bytes]  # of a file, whole or piece by piece
_MOST, _DEEPEST = 2**28, 100  # bytes of a JSON file or a journal, and levels of an object in it
_PIECE = 2**24  # bytes of a large file that are read at a time
_DIGEST = "_digest"  # of a record: the end of what it says, so that a digit that was changed is noticed


class DamagedFiles(RuntimeError):  # noqa: N818
    """A committed directory whose files do not match its manifest."""


def commit_directory(target: Path, files: Mapping[str, Content], about: Mapping[str, Any]) -> None:
    """Put ``files`` at ``target``, in place of what was there; ``about`` is kept in the manifest."""
    aside = target.with_name(f".{target.name}.partial")
    remove(aside)
    try:
        _write_directory(aside, files, about)
    except Exception:  # a full disk is not left fuller
        remove(aside)
        raise
    before = target.with_name(f".{target.name}.before")
    recover(target)
    if target.exists():
        os.replace(target, before)
    os.replace(aside, target)
    _flush_directory(target.parent)
    remove(before)


def recover(target: Path) -> None:
    """Put back what was at ``target`` if the process that replaced it died in between; then remove what it left."""
    before = target.with_name(f".{target.name}.before")
    if before.exists() and not target.exists():
        os.replace(before, target)
    remove(before)


def remove(path: Path) -> None:
    """Remove a file, a link or a directory, if it is there and as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _write_directory(aside: Path, files: Mapping[str, Content], about: Mapping[str, Any]) -> None:
    folders = {aside} | {(aside / name).parent for name in files}
    for folder in sorted(folders):
        folder.mkdir(parents=True, exist_ok=True)
    hashes = {}
    for name, content in files.items():
        digest = hashlib.sha256()
        write_durably(aside / name, _passing(content, digest.update))
        hashes[name] = digest.hexdigest()
    write_durably(aside / MANIFEST, json.dumps({**about, "sha256": hashes}, indent=1).encode())
    for folder in folders:
        _flush_directory(folder)


def _passing(content: Content, tell: Callable[[bytes], None]) -> Iterator[bytes]:
    """The pieces of ``content``, each of which is told of on its way."""
    for piece in [content] if isinstance(content, bytes) else content:
        tell(piece)
        yield piece


def read_directory(directory: Path) -> tuple[Files, dict[str, Any]]:
    """The files of a commit and its manifest. Raises DamagedFiles."""
    contents = {name: b"".join(content) for name, content in pieces_of(directory).items()}
    return contents, read_manifest(directory)


def check_directory(directory: Path) -> dict[str, Any]:
    """The manifest of a commit whose files are what it says; none is held whole. Raises DamagedFiles."""
    for content in pieces_of(directory).values():
        for _ in content:
            pass
    return read_manifest(directory)


def pieces_of(directory: Path) -> dict[str, Iterator[bytes]]:
    """The files of a commit, piece by piece. Raises DamagedFiles, at the last piece of one that is not what the
    manifest says."""

    def pieces(path: Path, expected: str) -> Iterator[bytes]:
        digest = hashlib.sha256()
        with _opened(path, most=2**63) as file:
            yield from _passing(iter(partial(file.read, _PIECE), b""), digest.update)
        if digest.hexdigest() != expected:
            raise DamagedFiles(f"{path} does not match its manifest: it was truncated or altered")

    return {name: pieces(directory / name, digest) for name, digest in read_manifest(directory)["sha256"].items()}


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a commit. Raises DamagedFiles."""
    recover(directory)
    manifest = read_json(directory / MANIFEST)
    if not isinstance(manifest.get("sha256"), dict):
        raise DamagedFiles(f"{directory / MANIFEST} is not one of a commit")
    for name in manifest["sha256"]:  # a stranger's may point anywhere
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DamagedFiles(f"{directory} cannot be read: its {MANIFEST} names {name!r}, outside of it")
    return manifest


def read_bytes(path: Path, most: int = _MOST) -> bytes:
    """A regular file of at most ``most`` bytes. Raises DamagedFiles."""
    with _opened(path, most) as file:
        return file.read()


@contextlib.contextmanager
def _opened(path: Path, most: int) -> Iterator[BinaryIO]:
    """A regular file of at most ``most`` bytes: a pipe or a device would be read for ever. Raises DamagedFiles."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_size > most:
                raise DamagedFiles(f"{path} is not a file of at most {most / 1e6:,.0f} MB")
            yield file
    except OSError as error:
        raise DamagedFiles(f"{path} cannot be read: {error.strerror}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file holds; of one with a digest, as ``with_digest`` adds it. Raises DamagedFiles."""
    return _record(read_bytes(path), str(path))


def _record(text: bytes, where: str, needed: Collection[str] = ()) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFiles(f"{where} is damaged: {type(error).__name__}: {str(error)[:80]}") from error
    if not isinstance(content, dict):
        raise DamagedFiles(f"{where} is damaged: it holds no object")
    if missing := [key for key in needed if not isinstance(content.get(key), int | dict)]:
        raise DamagedFiles(f"{where} is damaged: it has no {missing[0]}")
    level: list[Any] = [content]
    for _ in range(_DEEPEST):
        level = [v for each in level for v in (each.values() if isinstance(each, dict) else each) if _is_nested(v)]
    if level:
        raise DamagedFiles(f"{where} is damaged: it goes deeper than {_DEEPEST} levels")
    if content.pop(_DIGEST, None) not in (None, _digest(content)):
        raise DamagedFiles(f"{where} was altered: it does not match its digest")
    return content


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict | list) and bool(value)


def with_digest(record: Mapping[str, Any]) -> dict[str, Any]:
    """``record`` and the digest by which a reader knows that nobody changed it."""
    return {**record, _DIGEST: _digest(record)}


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_json(path: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
    """Put a JSON file in place of the old one; large ones without indent."""
    replace_durably(path, (json.dumps(content, indent=indent) + "\n").encode())


def as_lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    """One JSON object a line."""
    return b"".join(json.dumps(record, default=str).encode() + b"\n" for record in records)


def read_lines(path: Path, needed: Collection[str] = (), damaged: list[str] | None = None) -> list[dict[str, Any]]:
    """The records of a journal; none if there is no such file. What is damaged or lacks a ``needed`` number or object
    is left out, and named in ``damaged`` unless it is a last line that was cut off in the middle."""
    return [record for _, record in _lines(path, needed, damaged)]


def cut_lines(
    path: Path,
    wanted: Callable[[dict[str, Any]], bool] = lambda _: True,
    needed: Collection[str] = (),
    damaged: list[str] | None = None,
) -> list[dict[str, Any]]:
    """The records of a journal that are ``wanted``; what else is in it, or damaged, is taken out of it."""
    kept = [(line, record) for line, record in _lines(path, needed, damaged) if wanted(record)]
    content = b"".join(line + b"\n" for line, _ in kept)
    if os.path.lexists(path) and not (path.is_file() and path.read_bytes() == content):
        replace_durably(path, content)
    return [record for _, record in kept]


def _lines(path: Path, needed: Collection[str], damaged: list[str] | None) -> list[tuple[bytes, dict[str, Any]]]:
    records: list[tuple[bytes, dict[str, Any]]] = []
    damaged = [] if damaged is None else damaged
    try:
        lines = read_bytes(path).split(b"\n") if os.path.lexists(path) else []
    except DamagedFiles as error:
        damaged.append(str(error))
        return records
    for number, line in enumerate(lines, start=1):
        try:
            records += [(line, _record(line, f"{path}:{number}", needed))] if line.strip() else []
        except DamagedFiles as error:
            damaged += [str(error)] if number < len(lines) else []
    return records


def replace_durably(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old or the new one, never half of it."""
    aside = path.with_name(f".{path.name}.partial")
    write_durably(aside, content)
    os.replace(aside, path)


def write_durably(path: Path, content: Content) -> None:
    """Write a file and flush it to the disk."""
    with open(path, "wb", opener=not_through_a_link) as file:
        for piece in [content] if isinstance(content, bytes) else content:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def append_durably(path: Path, content: bytes) -> None:
    """Add all of ``content`` to a file, or nothing of it if the disk takes no more, and flush it to the disk."""
    with open(path, "ab", buffering=0, opener=not_through_a_link) as file:
        before, left = os.fstat(file.fileno()).st_size, memoryview(content)
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def not_through_a_link(path: str, flags: int) -> int:
    """An opener for files that are written: what a stranger's directory links to is not, and a pipe is no file."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def packed(save: Callable[[Path], Any]) -> Files:
    """The files that ``save(directory)`` writes."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        save(directory)
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def content_digest(files: Files) -> str:
    """What identifies files by their names and contents."""
    found = sorted((name, hashlib.sha256(content).hexdigest()) for name, content in files.items())
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def unpacked(files: Files, load: Callable[[Path], Any]) -> Any:
    """What ``load(directory)`` makes of ``files``."""
    with tempfile.TemporaryDirectory() as name:
        for path, content in files.items():
            target = Path(name) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return load(Path(name))
