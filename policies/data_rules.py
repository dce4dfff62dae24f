"""Data rules: what generation t of a self-consuming loop is trained on, as pure functions.

A rule maps (loop, generation, sizes, ledger) to a :class:`Manifest`, which names samples without holding them: ranges
of the real data in a seed's own order, and ranges of what an earlier generation drew. ``Manifest.rows(seed)`` resolves
it to the exact sample ids of one universe, the same on every machine and at every repetition.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from policies.mad_settings import LoopSettings
from policies.streams import derive_seed

Role = Literal["real-fixed", "real-fresh", "synthetic"]
REAL = 0  # the "generation" of real data


class LedgerExhausted(ValueError):  # noqa: N818
    """A loop asks for more unseen real samples than there are."""


@dataclass(frozen=True)
class Part:
    """Samples ``start`` to ``stop`` of the real data (generation 0) or of what a generation's model drew."""

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
        return self.subsample or sum(part.size for part in self.parts)

    def rows(self, seed: int) -> list[np.ndarray]:
        """For each part, the ids one universe takes from it: int64 positions in the part's source."""
        rows = []
        for part in self.parts:
            if part.drawn is None:
                rows.append(np.arange(part.start, part.stop))
            else:
                random = np.random.default_rng(derive_seed(seed, "ledger draw", self.generation))
                rows.append(random.integers(part.start, part.stop, part.drawn))
        if self.subsample is None:
            return rows
        random = np.random.default_rng(derive_seed(seed, "subsample", self.generation))
        ends = np.cumsum([len(each) for each in rows])
        chosen = np.sort(random.choice(ends[-1], self.subsample, replace=False))
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


@dataclass(frozen=True)
class Ledger:
    """What of the real data was used. ``size`` None: a distribution that never runs out."""

    size: int | None
    used: int = 0

    def fixed(self, count: int) -> tuple[Part, "Ledger"]:
        """The first ``count`` real samples, the same every time. Raises LedgerExhausted."""
        self._check(count, 0)
        return Part("real-fixed", REAL, 0, count), replace(self, used=max(self.used, count))

    def fresh(self, count: int) -> tuple[Part, "Ledger"]:
        """``count`` real samples that no generation has seen. Raises LedgerExhausted."""
        self._check(count, self.used)
        return Part("real-fresh", REAL, self.used, self.used + count), replace(self, used=self.used + count)

    def fresh_with_replacement(self, count: int) -> tuple[Part, "Ledger"]:
        """``count`` independent draws from the real data, which may repeat."""
        if self.size is None:
            return self.fresh(count)
        return Part("real-fresh", REAL, 0, self.size, drawn=count), self

    def _check(self, count: int, used: int) -> None:
        if self.size is not None and used + count > self.size:
            raise LedgerExhausted(
                f"{count} more real samples are needed, but {self.size - used} of {self.size} are left unseen"
            )


def mix(loop: LoopSettings, generation: int, generations: int, ledger: Ledger) -> tuple[Manifest, Ledger]:
    """The training set of ``generation`` (1 to ``generations``), and the ledger after it.

    Raises LedgerExhausted if unseen real samples run out, ValueError if the set would be empty.
    """
    try:
        if generation == 1 or loop.rule == "real_only":  # the control, and generation 1 of every loop: one real set
            part, after = ledger.fixed(loop.initial())
            return Manifest(generation, (part,)), after
        parts, after = _parts(loop, generation, generations, ledger)
    except LedgerExhausted as error:
        raise LedgerExhausted(
            f"generation {generation}: {error}; use fewer (n_ini, n_real, fresh_fraction, generations), keep a smaller "
            f"reference, or allow repeats with real_supply=fresh_with_replacement"
        ) from error
    # Kazdan et al.'s draw of fixed size, without replacement, from everything so far.
    subsample = (loop.n_total or loop.initial()) if loop.rule == "accumulate_subsample" else None
    manifest = Manifest(generation, tuple(part for part in parts if part.size), subsample)
    if manifest.size < 2:
        raise ValueError(f"generation {generation} would be trained on {manifest.size} samples: give larger sizes")
    return manifest, after


def training_sets(loop: LoopSettings, generations: int, pool: int | None) -> list[Manifest]:
    """What every generation is trained on, given ``pool`` real samples (None: endless). Raises as :func:`mix`."""
    ledger, manifests = Ledger(pool), []
    for generation in range(1, generations + 1):
        manifest, ledger = mix(loop, generation, generations, ledger)
        manifests.append(manifest)
    return manifests


def _parts(loop: LoopSettings, generation: int, generations: int, ledger: Ledger) -> tuple[list[Part], Ledger]:
    """Real samples by the loop's supply, then synthetic ones of earlier generations; parts may be empty."""
    if loop.rule == "weighted_mixture":
        return _weighted_mixture(loop, generation, ledger)
    count, synthetic = loop.sizes(generation, generations)
    real, ledger = getattr(ledger, loop.supply)(count)
    drawn = _synthetic(loop, generation, synthetic)
    return [replace(real, weight=loop.real_weight), *(_drawn_by(g, size) for g, size in drawn.items())], ledger


def _synthetic(loop: LoopSettings, generation: int, count: int) -> dict[int, int]:
    """How many samples of which earlier generations a training set takes.

    Accumulation takes every earlier batch whole (Gerstgrasser et al. 2404.01413), and so does augmentation if told to;
    ``memory`` spreads them evenly over the last generations, the latest giving the rest. All other loops take those of
    the previous generation: the fully synthetic one (without real data), augmentation (with a fixed real set), fresh
    data, and iterative retraining (which goes on from the last weights); in curated and verified loops it is the
    drawing of samples that differs.
    """
    everything = loop.rule == "augmentation" and loop.synthetic_from == "all"
    if everything or loop.rule in ("accumulate", "accumulate_subsample"):
        return dict.fromkeys(range(1, generation), count)
    if loop.rule == "memory":
        remembered = range(max(1, generation - loop.memory), generation)
        each, rest = divmod(count, len(remembered))
        return {g: each + (rest if g == generation - 1 else 0) for g in remembered}
    return {generation - 1: count}


def _weighted_mixture(loop: LoopSettings, generation: int, ledger: Ledger) -> tuple[list[Part], Ledger]:
    """``shares`` of N from the fixed real set, new real data, the previous generation, and those before it."""
    counts = dict.fromkeys(("real_fixed", "real_fresh", "previous", "earlier"), 0)
    shares = {str(source): share for source, share in (loop.shares or {}).items()}
    counts |= largest_remainder(loop.n_total or loop.initial(), shares)
    fixed, ledger = ledger.fixed(counts["real_fixed"])
    fresh, ledger = ledger.fresh(counts["real_fresh"])
    real = [replace(part, weight=loop.real_weight) for part in (fixed, fresh)]
    before = range(1, generation - 1)
    if not before:  # generation 2 has nothing earlier yet
        return [*real, _drawn_by(1, counts["previous"] + counts["earlier"])], ledger
    each, rest = divmod(counts["earlier"], len(before))
    earlier = [_drawn_by(g, each + (g <= rest)) for g in before]
    return [*real, *earlier, _drawn_by(generation - 1, counts["previous"])], ledger


def _drawn_by(generation: int, count: int) -> Part:
    """The first ``count`` samples of what the model of ``generation`` drew."""
    return Part("synthetic", generation, 0, count)


def largest_remainder(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """``total`` split by ``shares`` (they sum to 1) into whole numbers that sum to it."""
    counts = {name: int(total * share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - total * shares[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts
