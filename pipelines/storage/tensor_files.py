"""Arrays on their way to a file and back, a part at a time: what is as large as a model's state is never held whole."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

PART = 2**27  # bytes that are on their way at a time; a larger array is a part of its own
Outline = dict[str, tuple[str, tuple[int, ...]]]  # name → type and shape of an array, in the order in which they come
_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16"}
_CODES |= {"int8": "I8", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL"}


class StreamedTensors(Mapping[str, np.ndarray]):
    """Arrays that ``fetch`` gives by their names, when they are asked for: read in order, each part is fetched once."""

    def __init__(self, outline: Outline, fetch: Callable[[list[str]], Sequence[np.ndarray]]) -> None:
        self.outline, self._fetch = outline, fetch
        self._part_of = {name: part for part in parts(sizes(outline)) for name in part}
        self._held: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._held:
            part = self._part_of[name]
            self._held = {}  # before the next comes
            self._held = dict(zip(part, self._fetch(part), strict=True))
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.outline)

    def __len__(self) -> int:
        return len(self.outline)


def outline_of(tensors: Mapping[str, np.ndarray]) -> Outline:
    """What they are, without fetching any."""
    if isinstance(tensors, StreamedTensors):
        return tensors.outline
    return {name: (array.dtype.name, array.shape) for name, array in tensors.items()}


def size_of(outline: Outline, name: str) -> int:
    """Bytes of one of the arrays."""
    kind, shape = outline[name]
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize


def sizes(outline: Outline) -> dict[str, int]:
    """Bytes of each array."""
    return {name: size_of(outline, name) for name in outline}


def parts(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The names of what has so many bytes, in order, in parts of about :data:`PART` bytes."""
    part: list[str] = []
    taken = 0
    for name, size in sizes.items():
        if part and taken + size > PART:
            yield part
            part, taken = [], 0
        part.append(name)
        taken += size
    if part:
        yield part


def encoded(tensors: Mapping[str, np.ndarray]) -> tuple[int, Iterator[bytes]]:
    """The size and the content of a safetensors file, wide types first, as its readers want them aligned."""
    outline = outline_of(tensors)
    names = sorted(outline, key=lambda name: -np.dtype(outline[name][0]).itemsize)
    header, end = {}, 0
    for name in names:
        begin, end = end, end + size_of(outline, name)
        header[name] = {"dtype": _CODES[outline[name][0]], "shape": outline[name][1], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def content() -> Iterator[bytes]:
        yield len(text).to_bytes(8, "little") + text
        for name in names:
            yield np.asarray(tensors[name], order="C").tobytes()

    return 8 + len(text) + end, content()


def tensor_file(path: Path) -> StreamedTensors:
    """The arrays of a safetensors file, read when they are asked for."""
    from safetensors import safe_open

    kinds = {code: kind for kind, code in _CODES.items()}
    with safe_open(path, framework="np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        outline = {name: (kinds[each.get_dtype()], tuple(each.get_shape())) for name, each in slices.items()}

    def fetch(names: list[str]) -> list[np.ndarray]:
        with safe_open(path, framework="np") as file:
            return [file.get_tensor(name) for name in names]

    return StreamedTensors(outline, fetch)
