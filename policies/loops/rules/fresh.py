"""The fresh data loop: new real samples at every generation, beside samples of the previous one."""

from policies.loops.rules import Rule, Supply


class Fresh(Rule):
    """n_real new real samples and n_synthetic new synthetic ones."""

    names = ("fresh",)
    supplied = mixed = effective = simulated = True

    def contradiction(self) -> str | None:
        """A fixed real set."""
        instead = "rule fresh draws new real data: for the same real set each time use rule=augmentation"
        return instead if self.real_supply == "fixed" else None

    @property
    def supply(self) -> Supply:
        """Unseen samples, if nothing else is set."""
        return self.real_supply or "fresh"

    def fresh_supplies(self) -> tuple[Supply, ...]:
        """Its own."""
        return (self.supply,)
