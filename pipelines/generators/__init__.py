"""Generators of the self-consuming loop, one file each, settings included.

Whatever a generator is, the loop only fits it, draws from it, saves it and loads it. Those whose fit is arithmetic do
thousands of *universes* (seeds) in one call; those that train a network do one. One's own is a class derived from
:class:`Generator`, named in a configuration by its import path, ``family=my_module:MyGenerator``. What is built in is
importable without torch, which is imported where it is needed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from pipelines.storage.atomic import Files, unpacked
from policies.common.user_code import Named, Registry
from policies.loops.laws import Laws
from policies.loops.rules import Rule
from policies.loops.samples import Samples
from policies.loops.training_sets import Manifest
from policies.rl.settings import Settings

Seeds = Sequence[int]
NEIGHBOURS = ("precision", "recall", "density", "coverage")
OF_CLASSES = ("class_entropy", "label_accuracy")  # metrics that only a classifier of the labels gives


class Generator(Named):
    """A fitted generator of images, and what the loop has to know of its class. ``settings`` is a ``schema``, ``seeds``
    holds one seed a universe; equal seeds give equal results."""

    schema: ClassVar[type[Settings]] = Settings
    flat: ClassVar[bool] = False  # built in: whether its keys are an arm's own, in place of a block of its name
    closed_form: ClassVar[bool] = False  # the truth is a distribution, and a draw cheaper than a file
    many_universes: ClassVar[bool] = False  # fitted side by side in one task, and measured by their parameters
    conditional: ClassVar[bool] = False  # whether it learns from labels
    captioned: ClassVar[bool] = False  # whether it learns from captions, and is asked for images in words
    extrapolates: ClassVar[bool] = False  # whether differences of its weights mean something
    has_score: ClassVar[bool] = False  # whether it draws by a score, from which it can be led away
    has_density: ClassVar[bool] = False  # whether its steps have densities, as reinforcement learning needs
    shares_training: ClassVar[bool] = False  # whether several workers can share a fit, by ``pipelines.training``
    updates: ClassVar[str | None] = None  # its setting of how many updates a fit takes; closed forms have none
    least_side: ClassVar[int] = 1  # of images, in pixels
    metrics: ClassVar[tuple[str, ...]] = ("fid", *NEIGHBOURS, "class_entropy", "memorisation")  # the first one compares

    @classmethod
    def fit(cls, settings: Any, data: Samples, seeds: Seeds, start: Self | None = None, device: str = "cpu") -> Self:
        """Train from scratch on ``data``, or go on from ``start``."""
        raise NotImplementedError

    def sample(self, count: int, seeds: Seeds, bias: float) -> Samples:
        """``count`` samples a universe; ``bias`` in (0, 1] trades diversity for quality, 1 is unbiased (MAD's λ)."""
        raise NotImplementedError

    def candidates(self, count: int, each: int, seeds: Seeds, bias: float) -> Samples:
        """``each`` samples for every one of ``count``: the j-th for the i-th stands at j · ``count`` + i."""
        return self.sample(count * each, seeds, bias)

    def fitted(self) -> dict[str, Any]:
        """What was fitted, by name; of those that ``extrapolates``."""
        raise NotImplementedError

    def holding(self, weights: Mapping[str, Any]) -> Self:
        """The same generator with other weights. Raises ValueError if they are those of none."""
        raise NotImplementedError

    def led_away(self, other: Self, strength: float) -> Self:
        """What draws with the score (1 + ω) of this − ω of the ``other``; of those that have one."""
        raise NotImplementedError

    def save(self, directory: Path) -> None:
        """Write everything that :meth:`load` needs. Equal generators write equal bytes."""
        raise NotImplementedError

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> Self:
        """The generator that :meth:`save` wrote."""
        raise NotImplementedError

    @classmethod
    def goes_on(cls, settings: Any) -> bool:
        """Whether a generation goes on from the last one's weights under any data rule."""
        return False

    @classmethod
    def settled(cls, settings: Any, classes: int) -> Any:
        """``settings`` for real images of so many ``classes``; 0: without labels."""
        return settings

    @classmethod
    def check(cls, settings: Any, loop: Rule) -> None:
        """Raise ValueError if the settings cannot be used, or not with this loop."""

    @classmethod
    def check_sets(cls, settings: Any, loop: Rule, manifests: Sequence[Manifest]) -> None:
        """Raise ValueError if it cannot be fitted to these training sets."""

    @classmethod
    def check_classes(cls, settings: Any, classes: int) -> None:
        """Raise ValueError if it cannot be fitted to images of so many classes; 0: without labels."""
        if cls.conditional and not classes:
            raise ValueError(f"family {cls.__name__} learns from labels, and the images have none")

    @classmethod
    def side_multiple(cls, settings: Any) -> int:
        """Sides of images must be multiples of this."""
        return 1

    @classmethod
    def numbers(cls, settings: Any, size: int, image: int = 1) -> int:
        """How many numbers ``size`` samples (each image of ``image``) and the model of them hold, at least."""
        return size * image

    @classmethod
    def laws(cls, settings: Any, loop: Rule, generations: int) -> Laws:
        """The exact expectations of metrics, (generations,) each; empty where no law is known."""
        return {}

    @classmethod
    def underivable(cls, settings: Any, loop: Rule, generations: int, largest: bool) -> str | None:
        """What n_e, or the ``largest`` admissible n_s, needs and this loop lacks; None if it can be found."""
        return "family=gaussian with rule=fresh, or with rule=memory and real_supply=fresh"


class ClosedForm(Generator):
    """A generator that is nothing but the arrays which its dataclass names, of a truth that is a distribution."""

    closed_form = True

    @classmethod
    def truth(cls, settings: Any, seeds: Seeds, start: int, count: int) -> Samples:
        """``count`` real samples a universe, from the ``start``-th on."""
        raise NotImplementedError

    def measure(self) -> dict[str, np.ndarray]:
        """With ``many_universes``, the metrics by the parameters; each (universes,)."""
        raise NotImplementedError

    @classmethod
    def compare(cls, settings: Any, generated: np.ndarray, reference: np.ndarray) -> dict[str, float]:
        """Without ``many_universes``, the metrics of points (n, 2) against as many real ones."""
        raise NotImplementedError

    def centred(self) -> tuple[Self, np.ndarray | None]:
        """The same spread around 0, and the mean (universes, d) that it was around; None: it stays where it is."""
        return self, None

    def save(self, directory: Path) -> None:
        """Write them. Equal generators write equal bytes."""
        from safetensors.numpy import save_file

        save_file(vars(self), directory / "model.safetensors")

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> Self:
        """Read them."""
        from safetensors.numpy import load_file

        return cls(**load_file(directory / "model.safetensors"))


FAMILY = "family.json"  # beside a fitted generator that is a study's product: what family it is of
GENERATORS = Registry(Generator, __name__, "ouroboros.generators", "family")


def load_generator(family: str, files: Files, device: str = "cpu") -> Any:
    """The fitted generator that ``packed(generator.save)`` holds."""
    return unpacked(files, lambda directory: GENERATORS.find(family).load(directory, device))
