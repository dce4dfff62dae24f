"""A memory: synthetic samples of the last K generations (Alemohammad et al. 2307.01850, figure 30)."""

from pydantic import Field

from policies.loops.rules import Rule


class Memory(Rule):
    """n_synthetic new samples, spread evenly over the last ``memory`` generations."""

    names = ("memory",)
    supplied = mixed = effective = True

    memory: int = Field(3, ge=1, description="memory: new samples of the last K generations")

    @property
    def remembered(self) -> int:
        """K."""
        return self.memory
