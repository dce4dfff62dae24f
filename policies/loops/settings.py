"""Settings of the self-consuming loop: what a generation is trained on. Importable without torch.

Names and meanings follow Alemohammad et al., "Self-Consuming Generative Models Go MAD" (2307.01850).
"""

from typing import Annotated, Literal

from pydantic import Field

from policies.rl.settings import Settings

Rule = Literal[
    "real_only",
    "fully_synthetic",
    "augmentation",
    "fresh",
    "accumulate",
    "accumulate_subsample",
    "iterative_retraining",
    "curated",
    "verified",
    "memory",
    "weighted_mixture",
]
Supply = Literal["fixed", "fresh", "fresh_with_replacement"]
Source = Literal["real_fixed", "real_fresh", "previous", "earlier"]
Share = Annotated[float, Field(ge=0, le=1)]

_SUPPLIED = ("fresh", "curated", "verified", "memory")  # rules whose real samples need not be one fixed set
_OF_ONE_SIZE = (*_SUPPLIED, "fully_synthetic", "augmentation", "iterative_retraining")  # n_real + n_synthetic, or N


class FreshSchedule(Settings):
    """A fresh fraction that goes linearly from ``first`` at generation 2 to ``last`` at the last generation."""

    first: Share
    last: Share


class LoopSettings(Settings):
    """One arm's loop. Sizes are given as ``n_real`` and ``n_synthetic``, or as ``n_total`` and ``fresh_fraction``."""

    rule: Rule = Field("fully_synthetic", description="what a generation's training set is made of")
    n_ini: int | None = Field(None, ge=2, description="real samples of generation 1; null: the size of later sets")
    n_real: int | None = Field(None, ge=0, description="real samples of every later generation")
    n_synthetic: int | None = Field(None, ge=0, description="synthetic samples of every later generation")
    n_total: int | None = Field(None, ge=2, description="size N of every later training set; null: n_ini")
    fresh_fraction: Share | tuple[Share, ...] | FreshSchedule | None = Field(
        None, description="share of real data in a later set: a number, one a generation from 2 on, or {first, last}"
    )
    sampling_bias: float = Field(1.0, gt=0, le=1, description="MAD's λ: 1 is unbiased, less is quality over diversity")
    real_supply: Supply | None = Field(None, description="where later real samples come from; null: the rule's own")
    synthetic_from: Literal["previous", "all"] = Field("previous", description="augmentation: which generations")
    memory: int = Field(3, ge=1, description="memory: new samples of the last K generations")
    shares: dict[Source, Share] | None = Field(None, description="weighted_mixture: each source's share of n_total")
    real_weight: float = Field(1.0, ge=1e-6, le=1e6, description="of a real sample in a fit; a synthetic one has 1")
    candidates: int = Field(4, ge=2, description="curated: draws of which one is kept; verified: most draws for one")
    reward: str = Field("confidence", description="curated: confidence, first_coordinate, or module:function")
    acceptance: float = Field(0.8, gt=0, lt=1, description="verified: least probability of the label by the classifier")

    def check(self) -> None:
        """Raise ValueError unless the rule has what it needs and nothing that contradicts it."""
        counts = {"n_real": self.n_real, "n_synthetic": self.n_synthetic}
        given = [name for name, value in counts.items() if value is not None]
        total = sum(value for value in counts.values() if value is not None)
        if self.fresh_fraction is not None and given:
            raise ValueError(
                f"sizes are given both ways: fresh_fraction with {' and '.join(given)}; "
                f"keep n_total and fresh_fraction, or n_real and n_synthetic (set the others to null)"
            )
        sized = len(given) == 2 or (self.rule == "fully_synthetic" and bool(given))
        if self.n_total not in (None, total) and sized and self.rule in _OF_ONE_SIZE:
            raise ValueError(f"n_total is {self.n_total}, but {' + '.join(given)} is {total}: leave one of them out")
        if self.rule == "fully_synthetic" and (self.n_real or self.fresh_fraction):
            raise ValueError(
                f"rule {self.rule} uses no real data after generation 1: leave n_real and fresh_fraction out"
            )
        if self.fresh_fraction is not None and self.rule in ("augmentation", "accumulate", "accumulate_subsample"):
            raise ValueError(f"rule {self.rule} uses the same real set every time: give n_real, not fresh_fraction")
        if self.rule == "weighted_mixture" and (not self.shares or abs(sum(self.shares.values()) - 1) > 1e-9):
            raise ValueError(
                "rule weighted_mixture needs shares that sum to 1, such as {real_fixed: 0.3, previous: 0.7}"
            )
        if self.rule == "fresh" and self.real_supply == "fixed":
            raise ValueError("rule fresh draws new real data: for the same real set each time use rule=augmentation")
        if self.real_supply not in (None, "fixed") and self.rule not in _SUPPLIED:
            raise ValueError(f"rule {self.rule} uses one fixed real set: leave real_supply out, or use rule=fresh")
        if self.rule == "accumulate_subsample" and self.real_weight != 1:
            raise ValueError("rule accumulate_subsample draws all samples alike: leave real_weight out")
        missing = self._missing()
        if missing:
            raise ValueError(f"rule {self.rule} needs {missing}")

    def _missing(self) -> str | None:
        """What the rule cannot do without, in words."""
        first = self.n_ini is not None
        fraction = self.fresh_fraction is not None and (first or self.n_total is not None)
        counts = self.n_real is not None and self.n_synthetic is not None
        if self.rule == "real_only":
            return None if first else "n_ini"
        if self.rule == "fully_synthetic":
            sized = self.n_synthetic is not None or self.n_total is not None
            return None if first or sized else "n_synthetic or n_ini"
        if self.rule in ("accumulate", "accumulate_subsample"):
            sized = self.n_real is not None
            return None if first or sized else "n_ini (real samples) and n_synthetic (a batch; null: n_ini)"
        if self.rule == "weighted_mixture":
            return None if first or self.n_total is not None else "n_total or n_ini"
        return None if counts or fraction else "n_real and n_synthetic, or n_total and fresh_fraction"

    @property
    def supply(self) -> Supply:
        """Where the real samples of later generations come from: one fixed set, unless told otherwise."""
        return self.real_supply or ("fresh" if self.rule == "fresh" else "fixed")

    @property
    def accumulates(self) -> bool:
        """Whether a generation is trained on all that was drawn before."""
        everything = self.rule == "augmentation" and self.synthetic_from == "all"
        return everything or self.rule in ("accumulate", "accumulate_subsample")

    @property
    def fine_tunes(self) -> bool:
        """Whether a generation goes on from the last one's weights (Bertrand et al. 2310.00429)."""
        return self.rule == "iterative_retraining"

    def initial(self) -> int:
        """n_ini: the real samples of generation 1."""
        if self.n_ini is not None:
            return self.n_ini
        if self.rule == "fully_synthetic":
            return _given(self.n_synthetic, self.n_total, 0)
        if self.fresh_fraction is None and self.rule in ("augmentation", "iterative_retraining", "accumulate"):
            return _given(self.n_real, 0)
        return _given(self.n_total, _given(self.n_real, 0) + _given(self.n_synthetic, 0))

    def total(self) -> int:
        """N of a rule whose later training sets have one size."""
        return _given(self.n_total, self.initial())

    def sizes(self, generation: int, generations: int) -> tuple[int, int]:
        """(n_real, n_synthetic) of a generation ≥ 2. Raises ValueError for a fraction that is missing or too small."""
        if self.rule == "real_only":
            return self.initial(), 0
        if self.rule in ("accumulate", "accumulate_subsample"):
            return _given(self.n_real, self.initial()), _given(self.n_synthetic, self.initial())
        if self.fresh_fraction is not None:
            fraction, total = self._fraction(generation, generations), self.total()
            real = round(fraction * total)
            passing = isinstance(self.fresh_fraction, FreshSchedule) and 2 < generation < generations
            if 0 < fraction < 1 and real in (0, total) and not passing:
                raise ValueError(
                    f"generation {generation}: fresh_fraction {fraction:g} of {total} samples rounds to "
                    f"{'none of them real' if real == 0 else 'all of them real'}: one sample is {1 / total:.3g}"
                )
            return real, total - real
        if self.rule == "fully_synthetic":
            return 0, _given(self.n_synthetic, self.total())
        return _given(self.n_real, 0), _given(self.n_synthetic, 0)

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


def _given(*sizes: int | None) -> int:
    """The first that is given. 0 is: not to be confused with null."""
    return next(size for size in sizes if size is not None)
