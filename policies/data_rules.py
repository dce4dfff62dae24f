"""Data rules: what generation t of a self-consuming loop is trained on, as pure functions.

A rule maps (loop, generation, sizes, ledger) to a :class:`Manifest`, which names samples without holding them: ranges
of the real data in a seed's own order, and ranges of what an earlier generation drew. ``Manifest.rows(seed)`` resolves
it to the exact sample ids of one universe, the same on every machine and at every repetition.
"""

from collections.abc import Callable, Mapping
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


Mix = tuple[Manifest, Ledger]


@dataclass(frozen=True)
class Sizes:
    """How many real and synthetic samples a training set is to hold."""

    real: int
    synthetic: int


RuleFunction = Callable[[LoopSettings, int, Sizes, Ledger], Mix]


def mix(loop: LoopSettings, generation: int, generations: int, ledger: Ledger) -> Mix:
    """The training set of ``generation`` (1 to ``generations``), and the ledger after it.

    Raises LedgerExhausted if unseen real samples run out, ValueError if the set would be empty.
    """
    try:
        if generation == 1:
            return _real_only(loop, 1, Sizes(loop.initial(), 0), ledger)
        sizes = Sizes(*loop.sizes(generation, generations))
        manifest, after = _RULES[loop.rule](loop, generation, sizes, ledger)
    except LedgerExhausted as error:
        raise LedgerExhausted(
            f"generation {generation}: {error}; use fewer (n_ini, n_real, fresh_fraction, generations), keep a smaller "
            f"reference, or allow repeats with real_supply=fresh_with_replacement"
        ) from error
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


def _real_only(loop: LoopSettings, generation: int, sizes: Sizes, ledger: Ledger) -> Mix:
    """The control, and generation 1 of every loop: the same real set."""
    part, ledger = ledger.fixed(loop.initial())
    return Manifest(generation, (part,)), ledger


def _latest(loop: LoopSettings, generation: int, sizes: Sizes, ledger: Ledger) -> Mix:
    """Real samples by the supply + samples of the previous generation.

    This is the fully synthetic loop (no real data), augmentation (fixed), fresh data, and iterative retraining (which
    goes on from the last weights); in curated and verified loops it is the drawing of samples that differs.
    """
    real, ledger = _real(loop, sizes.real, ledger)
    return Manifest(generation, _nonempty(*real, _drawn_by(generation - 1, sizes.synthetic))), ledger


def _augmentation(loop: LoopSettings, generation: int, sizes: Sizes, ledger: Ledger) -> Mix:
    """The same real set each time + samples of the previous generation, or of all earlier ones."""
    rule = _latest if loop.synthetic_from == "previous" else _accumulate
    return rule(loop, generation, sizes, ledger)


def _accumulate(loop: LoopSettings, generation: int, sizes: Sizes, ledger: Ledger) -> Mix:
    """The real set ∪ every earlier synthetic batch (Gerstgrasser et al. 2404.01413)."""
    real, ledger = _real(loop, sizes.real, ledger)
    return Manifest(generation, (*real, *(_drawn_by(g, sizes.synthetic) for g in range(1, generation)))), ledger


def _accumulate_subsample(loop: LoopSettings, generation: int, sizes: Sizes, ledger: Ledger) -> Mix:
    """A uniform draw of fixed size, without replacement, from everything so far (Kazdan et al.)."""
    everything, ledger = _accumulate(loop, generation, sizes, ledger)
    return replace(everything, subsample=loop.n_total or loop.initial()), ledger


def _memory(loop: LoopSettings, generation: int, sizes: Sizes, ledger: Ledger) -> Mix:
    """Real samples + synthetic ones spread evenly over the last ``memory`` generations, the latest giving the rest."""
    real, ledger = _real(loop, sizes.real, ledger)
    remembered = range(max(1, generation - loop.memory), generation)
    each, rest = divmod(sizes.synthetic, len(remembered))
    parts = [_drawn_by(g, each + (rest if g == generation - 1 else 0)) for g in remembered]
    return Manifest(generation, _nonempty(*real, *parts)), ledger


def _weighted_mixture(loop: LoopSettings, generation: int, sizes: Sizes, ledger: Ledger) -> Mix:
    """``shares`` of N from the fixed real set, new real data, the previous generation, and those before it."""
    counts = dict.fromkeys(("real_fixed", "real_fresh", "previous", "earlier"), 0)
    counts |= largest_remainder(
        loop.n_total or loop.initial(), {str(source): share for source, share in (loop.shares or {}).items()}
    )
    fixed, ledger = ledger.fixed(counts["real_fixed"])
    fresh, ledger = ledger.fresh(counts["real_fresh"])
    real = [replace(part, weight=loop.real_weight) for part in (fixed, fresh)]
    before = range(1, generation - 1)
    if not before:  # generation 2 has nothing earlier yet
        return Manifest(2, _nonempty(*real, _drawn_by(1, counts["previous"] + counts["earlier"]))), ledger
    each, rest = divmod(counts["earlier"], len(before))
    earlier = [_drawn_by(g, each + (g <= rest)) for g in before]
    return Manifest(generation, _nonempty(*real, *earlier, _drawn_by(generation - 1, counts["previous"]))), ledger


_RULES: dict[str, RuleFunction] = {
    "real_only": _real_only,
    "fully_synthetic": _latest,
    "augmentation": _augmentation,
    "fresh": _latest,
    "accumulate": _accumulate,
    "accumulate_subsample": _accumulate_subsample,
    "iterative_retraining": _latest,
    "curated": _latest,
    "verified": _latest,
    "memory": _memory,
    "weighted_mixture": _weighted_mixture,
}


def _real(loop: LoopSettings, count: int, ledger: Ledger) -> tuple[tuple[Part, ...], Ledger]:
    """``count`` real samples by the loop's supply."""
    part, ledger = getattr(ledger, loop.supply)(count)
    return _nonempty(replace(part, weight=loop.real_weight)), ledger


def _drawn_by(generation: int, count: int) -> Part:
    """The first ``count`` samples of what the model of ``generation`` drew."""
    return Part("synthetic", generation, 0, count)


def _nonempty(*parts: Part) -> tuple[Part, ...]:
    return tuple(part for part in parts if part.size)


def largest_remainder(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """``total`` split by ``shares`` (they sum to 1) into whole numbers that sum to it."""
    counts = {name: int(total * share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - total * shares[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts
