"""Training sets of a self-consuming loop, by name: which real and which generated samples each generation gets.

A data rule (``policies/loops/rules``) and a :class:`Ledger` give a :class:`Manifest`, which names samples without
holding them: ranges of the real data in a seed's own order, and ranges of what an earlier generation drew.
``Manifest.rows(seed)`` resolves it to the exact sample ids of one universe, the same on every machine and at every
repetition.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from policies.common.seeding import derive_seed

if TYPE_CHECKING:
    from policies.loops.rules import Rule

Role = Literal["real-fixed", "real-fresh", "synthetic"]
REAL = 0  # the "generation" of real data
MOST_PARTS = 5_000_000  # named by the training sets of one arm: a gigabyte


class LedgerExhausted(ValueError):  # noqa: N818
    """A loop asks for more unseen real samples than there are."""


@dataclass(frozen=True)
class Part:
    """Samples ``start`` to ``stop`` of the real data (generation 0) or of what a generation's model draws.

    A model's samples are drawn in batches; two parts with one ``start`` read the same batch.
    """

    role: Role
    generation: int
    start: int
    stop: int
    weight: float = 1.0
    drawn: int | None = None  # so many ids drawn with replacement from the range, in place of the range itself

    @property
    def size(self) -> int:
        """How many samples the part brings."""
        return self.stop - self.start if self.drawn is None else self.drawn


@dataclass(frozen=True)
class Manifest:
    """The training set of one generation; with ``subsample``, a uniform draw of so many from all parts."""

    generation: int
    parts: tuple[Part, ...]
    subsample: int | None = None

    @property
    def size(self) -> int:
        """Samples in the training set."""
        return sum(part.size for part in self.parts) if self.subsample is None else self.subsample

    @property
    def synthetic(self) -> int:
        """Synthetic samples among them (in expectation, where it is a draw)."""
        whole = sum(part.size for part in self.parts)
        return round(sum(part.size for part in self.parts if part.role == "synthetic") * self.size / whole)

    def rows(self, seed: int) -> list[np.ndarray]:
        """For each part, the ids one universe takes from it: int64 positions in the part's source."""

        def random(stream: str) -> np.random.Generator:
            return np.random.default_rng(derive_seed(seed, stream, self.generation))

        rows = [
            np.arange(part.start, part.stop)
            if part.drawn is None
            else random("ledger draw").integers(part.start, part.stop, part.drawn)
            for part in self.parts
        ]
        if self.subsample is None:
            return rows
        ends = np.cumsum([len(each) for each in rows])
        chosen = np.sort(random("subsample").choice(ends[-1], self.subsample, replace=False))
        pieces = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
        starts = ends - [len(each) for each in rows]
        return [each[piece - start] for each, piece, start in zip(rows, pieces, starts, strict=True)]

    def as_json(self) -> dict[str, Any]:
        """Plain content, from which :meth:`from_json` makes an equal manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Manifest":
        """The manifest of :meth:`as_json`."""
        return cls(content["generation"], tuple(Part(**part) for part in content["parts"]), content["subsample"])


class Ledger:
    """What training sets have held so far: of ``size`` real samples (None: a distribution that never runs out) so many
    ``used``, and of what each generation drew so many read."""

    def __init__(self, size: int | None) -> None:
        self.size, self.used = size, 0
        self._read: Counter[int] = Counter()

    def fixed(self, count: int) -> Part:
        """The first ``count`` real samples, the same every time. Raises LedgerExhausted."""
        self._check(count, 0)
        self.used = max(self.used, count)
        return Part("real-fixed", REAL, 0, count)

    def fresh(self, count: int) -> Part:
        """``count`` real samples that no generation has seen. Raises LedgerExhausted."""
        self._check(count, self.used)
        self.used += count
        return Part("real-fresh", REAL, self.used - count, self.used)

    def fresh_with_replacement(self, count: int) -> Part:
        """``count`` independent draws from the real data, which may repeat."""
        return self.fresh(count) if self.size is None else Part("real-fresh", REAL, 0, self.size, drawn=count)

    def anew(self, counts: Mapping[int, int]) -> list[Part]:
        """Of each generation in ``counts`` so many samples that no training set has held."""
        self._read.update(counts)
        return [Part("synthetic", g, self._read[g] - count, self._read[g]) for g, count in counts.items()]

    def _check(self, count: int, used: int) -> None:
        if self.size is not None and used + count > self.size:
            raise LedgerExhausted(
                f"{count} more real samples are needed, but {self.size - used} of {self.size} are left unseen"
            )


def training_sets(loop: "Rule", generations: int, pool: int | None) -> list[Manifest]:
    """What every generation is trained on, given ``pool`` real samples (None: endless).

    Raises LedgerExhausted if unseen real samples run out, ValueError if a set cannot be drawn, is next to empty, or
    there is too much to name.
    """
    parts = generations * min(generations, loop.looks_back(generations))
    if parts > MOST_PARTS:
        raise ValueError(
            f"generations is {generations}: with rule {loop.name()} that is {parts} batches of samples to name"
        )
    ledger = Ledger(pool)
    return [_training_set(loop, generation, generations, ledger) for generation in range(1, generations + 1)]


def _training_set(loop: "Rule", generation: int, generations: int, ledger: Ledger) -> Manifest:
    try:
        first = generation == 1
        parts = [ledger.fixed(loop.initial())] if first else loop.parts(generation, generations, ledger)
    except LedgerExhausted as error:
        raise LedgerExhausted(
            f"generation {generation}: {error}; use fewer (n_ini, n_real, fresh_fraction, generations), keep a smaller "
            f"reference, or allow repeats with real_supply=fresh_with_replacement"
        ) from error
    subsample, whole = loop.subsample() if generation > 1 else None, sum(part.size for part in parts)
    if subsample is not None and subsample > whole:
        raise ValueError(
            f"generation {generation}: {subsample} samples cannot be drawn from a pool of {whole} without replacement: "
            f"set n_total (null: n_ini) to {whole} at most, or n_real and n_synthetic higher"
        )
    manifest = Manifest(generation, tuple(part for part in parts if part.size), subsample)
    if manifest.size < 2:
        raise ValueError(f"generation {generation} would be trained on {manifest.size} samples: give larger sizes")
    return manifest


def spread(total: int, parts: int) -> list[int]:
    """``total`` in ``parts`` whole numbers as even as can be, the last ones getting the rest."""
    each, rest = divmod(total, parts)
    return [each + (part >= parts - rest) for part in range(parts)]


def largest_remainder(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """``total`` split by ``shares`` (they sum to 1) into whole numbers that sum to it."""
    counts = {name: int(total * share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - total * shares[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts
