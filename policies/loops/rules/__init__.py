"""Data rules: what a generation of a self-consuming loop is trained on, one class a file, settings included.

Names and meanings follow Alemohammad et al., "Self-Consuming Generative Models Go MAD" (2307.01850). A rule of one's
own is a class derived from :class:`Rule`, named in a configuration by its import path, ``rule=my_module:MyRule``.
Importable without torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from pydantic import Field

from policies.common.user_code import Named, Registry
from policies.loops import laws  # as this package has modules of its functions' names
from policies.loops.laws import How, Laws
from policies.loops.samples import Samples
from policies.loops.training_sets import Ledger, Part, spread
from policies.rl.settings import Settings

Supply = Literal["fixed", "fresh", "fresh_with_replacement"]
Share = Annotated[float, Field(ge=0, le=1)]


class Classifier(Protocol):
    """What selection may ask about images."""

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Of each image (n, height, width, channels) uint8, the probability of each class: (n, classes)."""


class Drawing(NamedTuple):
    """What samples are selected from. ``draw`` takes how many a universe, and from which on (the first); ``candidates``
    how many, and how many for each: the j-th for the i-th stands at j times how many + i."""

    draw: Callable[..., Samples]
    candidates: Callable[[int, int], Samples]
    size: int  # samples that are asked for
    streams: Sequence[np.random.Generator]  # one a universe
    classifier: Classifier | None
    truth: Callable[[int], Samples] | None = None  # so many samples of it a universe, that no training set has held
    scorer: Callable[[Samples], np.ndarray] | None = None  # of one universe's samples, where words ask for images
    real: Callable[[int], Samples] | None = None  # the first so many real samples a universe, as generation 1 has them


class FreshSchedule(Settings):
    """A fresh fraction that goes linearly from ``first`` at generation 2 to ``last`` at the last generation."""

    first: Share = Field(description="share of real data at generation 2")
    last: Share = Field(description="share of real data at the last generation")


class Rule(Named, Settings):
    """A data rule and its settings. Sizes are given as ``n_real`` and ``n_synthetic``, or as ``n_total`` and
    ``fresh_fraction``. As it stands: real samples by ``supply``, then new samples of the previous generation.
    """

    names: ClassVar[tuple[str, ...]] = ()
    supplied: ClassVar[bool] = False  # whether real samples may be other than one fixed set
    same_real: ClassVar[bool] = False  # whether the real set is the same every time, so that no fraction is asked for
    real_first: ClassVar[bool] = False  # whether n_ini, if it is null, is the real set alone
    needs_one: ClassVar[tuple[str, ...]] = ()  # sizes of which one has to be given; none: both counts, or a fraction
    fine_tunes: ClassVar[bool] = False  # whether a generation goes on from the last one's weights
    sized_by: ClassVar[int] = 2  # so many of n_real and n_synthetic are the size of all later sets; 3: there is none
    mixed: ClassVar[bool] = False  # whether the law of mixtures is its own
    effective: ClassVar[bool] = False  # whether its limit is worth a number of new real samples, n_e
    relabels: ClassVar[bool] = False  # whether samples get other labels, which a model has to be asked by
    simulated: ClassVar[bool] = False  # whether the largest admissible n_s can be searched by simulating it

    n_ini: int | None = Field(None, ge=2, description="real samples of generation 1; null: the size of later sets")
    n_real: int | None = Field(None, ge=0, description="real samples of every later generation")
    n_synthetic: int | None = Field(None, ge=0, description="synthetic samples of every later generation")
    n_total: int | None = Field(None, ge=2, description="size N of every later training set; null: n_ini")
    fresh_fraction: Share | tuple[Share, ...] | FreshSchedule | None = Field(
        None, description="share of real data in a later set: a number, one a generation from 2 on, or {first, last}"
    )
    sampling_bias: float = Field(1.0, gt=0, le=1, description="MAD's λ: 1 is unbiased, less is quality over diversity")
    real_supply: Supply | None = Field(None, description="where later real samples come from; null: the rule's own")
    real_weight: float = Field(1.0, ge=1e-6, le=1e6, description="of a real sample in a fit; a synthetic one has 1")

    def check(self) -> None:
        """Raise ValueError unless the rule has what it needs and nothing that contradicts it."""
        counts = {"n_real": self.n_real, "n_synthetic": self.n_synthetic}
        given = [name for name, value in counts.items() if value is not None]
        total = (self.n_real or 0) + (self.n_synthetic or 0)
        if self.fresh_fraction is not None and given:
            raise ValueError(
                f"sizes are given both ways: fresh_fraction with {' and '.join(given)}; "
                f"keep n_total and fresh_fraction, or n_real and n_synthetic (set the others to null)"
            )
        if self.n_total not in (None, total) and len(given) >= self.sized_by:
            raise ValueError(f"n_total is {self.n_total}, but {' + '.join(given)} is {total}: leave one of them out")
        if self.same_real and self.fresh_fraction is not None:
            raise ValueError(f"rule {self.name()} uses the same real set every time: give n_real, not fresh_fraction")
        if problem := self.contradiction():
            raise ValueError(problem)
        if self.real_supply not in (None, "fixed") and not self.supplied:
            raise ValueError(f"rule {self.name()} uses one fixed real set: leave real_supply out, or use rule=fresh")
        if missing := self.missing():
            raise ValueError(f"rule {self.name()} needs {missing}")

    def contradiction(self) -> str | None:
        """Settings that the rule cannot have, as a message; None: there are none."""
        return None

    def missing(self) -> str | None:
        """What the rule cannot do without, in words."""
        if self.needs_one:
            given = any(getattr(self, size) is not None for size in self.needs_one)
            return None if given else " or ".join(self.needs_one)
        fraction = self.fresh_fraction is not None and (self.n_ini is not None or self.n_total is not None)
        counts = self.n_real is not None and self.n_synthetic is not None
        return None if counts or fraction else "n_real and n_synthetic, or n_total and fresh_fraction"

    def check_family(self, family: str, classified: bool) -> None:
        """Raise ValueError if the rule cannot be applied to samples of the ``family``; ``classified``: whether they are
        images for which there is a classifier."""

    @property
    def needs_truth(self) -> bool:
        """Whether it draws from the truth, which only closed forms have."""
        return False

    @property
    def renews(self) -> bool:
        """Whether some of its synthetic samples are the truth's, so that a variance cannot vanish."""
        return False

    @property
    def functions(self) -> list[str]:
        """Import paths of a person's own functions that the rule calls."""
        return []

    def worded_reward(self) -> dict[str, Any] | None:
        """What a reward of docs/rewards.md is called by and given, if the rule selects images by one that words asked
        for."""
        return None

    def probe(self, values: np.ndarray, labels: np.ndarray | None) -> None:
        """Call the ``functions`` on two real samples. Raises ValueError or RewardError if they cannot be used."""

    @property
    def supply(self) -> Supply:
        """Where the real samples of later generations come from: one fixed set, if nothing else is set."""
        return self.real_supply or "fixed"

    @property
    def accumulates(self) -> bool:
        """Whether a generation is trained on all that was drawn before."""
        return False

    def looks_back(self, generations: int) -> int:
        """How many earlier generations a training set reads at most."""
        return generations if self.accumulates else self.remembered

    @property
    def remembered(self) -> int:
        """Of how many earlier generations new synthetic samples are."""
        return 1

    def initial(self) -> int:
        """n_ini: the real samples of generation 1."""
        return self.n_ini if self.n_ini is not None else self.first_size()

    def first_size(self) -> int:
        """What n_ini is if it is null."""
        if self.real_first and self.fresh_fraction is None:
            return first_of(self.n_real, 0)
        return first_of(self.n_total, first_of(self.n_real, 0) + first_of(self.n_synthetic, 0))

    def total(self) -> int:
        """N of a rule whose later training sets have one size."""
        return first_of(self.n_total, self.initial())

    def sizes(self, generation: int, generations: int) -> tuple[int, int]:
        """(n_real, n_synthetic) of a generation ≥ 2. Raises ValueError for a fraction that is missing or too small."""
        if self.fresh_fraction is None:
            return first_of(self.n_real, 0), first_of(self.n_synthetic, 0)
        fraction, total = self._fraction(generation, generations), self.total()
        real = round(fraction * total)
        passing = isinstance(self.fresh_fraction, FreshSchedule) and 2 < generation < generations
        if 0 < fraction < 1 and real in (0, total) and not passing:
            raise ValueError(
                f"generation {generation}: fresh_fraction {fraction:g} of {total} samples rounds to "
                f"{'none of them real' if real == 0 else 'all of them real'}: one sample is {1 / total:.3g}"
            )
        return real, total - real

    def later_sizes(self, generations: int) -> list[tuple[int, int]]:
        """(n_real, n_synthetic) of generations 2, 3, …"""
        return [self.sizes(generation, generations) for generation in range(2, generations + 1)]

    def later_counts(self, generations: int) -> dict[str, list[int]]:
        """The same by what they are counts of, as laws take them; of one generation none."""
        sizes = self.later_sizes(generations)
        return {"n_real": [real for real, _ in sizes], "n_synthetic": [synthetic for _, synthetic in sizes]}

    def parts(self, generation: int, generations: int, ledger: Ledger) -> list[Part]:
        """What a generation ≥ 2 is trained on, as the ledger gives it; parts may be empty.

        Raises LedgerExhausted, or ValueError if the set cannot be drawn.
        """
        count, synthetic = self.sizes(generation, generations)
        real = replace(getattr(ledger, self.supply)(count), weight=self.real_weight)
        if self.accumulates:
            return [real, *(Part("synthetic", g, 0, synthetic) for g in range(1, generation))]
        return [real, *ledger.anew(self.synthetic(generation, synthetic))]

    def synthetic(self, generation: int, count: int) -> dict[int, int]:
        """Of which earlier generations a training set takes how many of its ``count`` new samples: as even as can be,
        later ones getting the rest."""
        earlier = range(max(1, generation - self.remembered), generation)
        if 0 < count < len(earlier):
            raise ValueError(
                f"generation {generation}: {count} synthetic samples are too few for {len(earlier)} generations: "
                f"set memory to {count} at most"
            )
        return dict(zip(earlier, spread(count, len(earlier)), strict=True))

    def subsample(self) -> int | None:
        """How many samples of its parts a training set draws; None: it is all of them."""
        return None

    def selection(self) -> dict[str, Any] | None:
        """How samples are selected, with what that depends on and nothing else: part of the names of tasks, and what
        :meth:`select` is given. It holds the rule's name as ``rule``. None: samples are drawn plainly."""
        return None

    @classmethod
    def select(cls, selection: Mapping[str, Any], drawing: Drawing) -> Samples:
        """Selected samples, of each universe as many as are asked for."""
        raise NotImplementedError

    def gaussian_law(self, generations: int, dimension: int, how: How) -> Laws:
        """What the Gaussian family does on average in two generations or more; empty where no law is known. ``how`` is
        what every law is given: generations, sampling_bias, covariance."""
        if not self.mixed:
            return {}
        if self.supply != "fixed":
            return laws.fresh(**how, n_ini=self.initial(), **self.later_counts(generations), memory=self.remembered)
        if (once := self.once(generations)) is None:
            return {}
        if self.accumulates:
            return laws.accumulate(**how, n_ini=self.initial(), n_synthetic=once)
        return laws.augmentation(**how, n_real=self.initial(), n_synthetic=once, memory=self.remembered)

    def categorical_law(self, generations: int, probabilities: Sequence[float]) -> Laws:
        """What the categorical family does on average; empty where no law is known."""
        return {}

    def fresh_supplies(self) -> tuple[Supply, ...]:
        """The series of arms, by their supply, in which it is one value of the fresh fraction."""
        return ()

    def once(self, generations: int) -> int | None:
        """n_synthetic, if all generations have the first one's real set and as many synthetic samples."""
        sizes = set(self.later_sizes(generations))
        n_real, n_synthetic = next(iter(sizes)) if len(sizes) == 1 else (None, None)
        return n_synthetic if n_real == self.initial() and self.supply == "fixed" else None

    def _fraction(self, generation: int, generations: int) -> float:
        fraction = self.fresh_fraction
        if isinstance(fraction, FreshSchedule):
            way = (generation - 2) / max(1, generations - 2)
            return fraction.first + (fraction.last - fraction.first) * way
        if isinstance(fraction, tuple):
            if len(fraction) != generations - 1:
                raise ValueError(
                    f"fresh_fraction lists {len(fraction)} values, but {generations} generations need "
                    f"{generations - 1}: one for each from generation 2 on"
                )
            return fraction[generation - 2]
        return fraction or 0.0


def first_of(*sizes: int | None) -> int:
    """The first that is given. 0 is: not to be confused with null."""
    return next(size for size in sizes if size is not None)


RULES = Registry(Rule, __name__, "ouroboros.rules", "rule")
