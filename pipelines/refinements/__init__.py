"""What may be done to a fitted generator before it draws, one class a file, settings included.

A refinement is a function of the model, the sampling bias and a seed: a task between a generation's fit and its draws.
One's own is a class derived from :class:`Refinement`, named by its import path, ``refinement=my_module:MyRefinement``.
Importable without torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pipelines.generators import Generator
from policies.common.seeding import derive_seed
from policies.common.user_code import Named, Registry
from policies.loops.laws import Laws
from policies.loops.rules import Rule
from policies.loops.samples import Samples
from policies.rl.settings import Settings


class Refinement(Named, Settings):
    """A refinement and its settings."""

    names: ClassVar[tuple[str, ...]] = ()

    def check(self, generator: type[Generator], settings: Any, loop: Rule) -> None:
        """Raise ValueError if it cannot be applied to a generator with these settings, or not in this loop."""

    def refine(
        self, model: Generator, settings: Any, seeds: Sequence[int], sampling_bias: float, device: str
    ) -> Generator:
        """What draws in place of ``model``, which was fitted with ``settings``; equal seeds give equal results."""
        raise NotImplementedError

    def laws(self, generator: type[Generator], settings: Any, loop: Rule, generations: int) -> Laws:
        """The exact expectations of metrics, (generations,) each, as :meth:`Generator.laws`; empty: none is known."""
        return {}


def trained_on_own(
    model: Generator, settings: Any, count: int, updates: int, seeds: Sequence[int], sampling_bias: float, device: str
) -> Generator:
    """``model`` trained on with ``count`` samples of its own, in so many ``updates``; a closed form is fitted anew."""
    kind = type(model)
    drawn: Samples = model.sample(count, [derive_seed(seed, "own samples") for seed in seeds], sampling_bias)
    if kind.updates:
        settings = settings.model_copy(update={kind.updates: updates})
    own = [derive_seed(seed, "own training") for seed in seeds]
    return kind.fit(settings, drawn, own, start=model, device=device)


def extrapolated(better: Mapping[str, Any], worse: Mapping[str, Any], weight: float) -> dict[str, Any]:
    """(1 + w) a − w b of the weights a and b, by name."""
    return {name: (1 + weight) * value - weight * worse[name] for name, value in better.items()}


REFINEMENTS = Registry(Refinement, __name__, "ouroboros.refinements", "refinement")
