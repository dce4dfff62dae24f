"""Numbers that nothing can be learned from, found in the step that made them."""

from collections.abc import Sequence

import numpy as np

# Of a reward, what is no difference: the mean of three times 0.1 is not 0.1, nor is 0.1 + 0.2 + 0.3 of three functions
# 0.3 + 0.2 + 0.1, and an optimiser that scales gradients would make a step of it.
ROUNDING = 1e-12


class RewardError(RuntimeError):
    """A reward function failed or did not return one number an image. It is never scored as zero."""


class DegenerateBatch(RuntimeError):  # noqa: N818
    """Rewards, captions or gradients from which no update should be made."""


class ShortOfMemoryError(RuntimeError):
    """A learner ran out of memory while the others waited for its part of a sharded network: all must begin anew."""


def check_drawn(finite: bool) -> None:
    """Raise DegenerateBatch unless what a generator draws is ``finite``: as bytes it would look like an image."""
    if not finite:
        raise DegenerateBatch(
            "the generator draws NaN or infinite numbers: its training went wrong, lower its learning rate"
        )


def check_finite(rewards: np.ndarray, prompts: Sequence[str]) -> None:
    """Raise DegenerateBatch if one of ``rewards`` (images,) is not finite."""
    if not np.isfinite(rewards).all():
        bad = int(np.flatnonzero(~np.isfinite(rewards))[0])
        raise DegenerateBatch(
            f"the reward of image {bad} ({prompts[bad]!r}) is {rewards[bad]}: check the reward function"
        )


def alike(rewards: np.ndarray) -> bool:
    """Whether several finite ``rewards`` (images,) are equal but for rounding."""
    halves = rewards / 2  # which do not overflow
    return len(rewards) > 1 and bool(np.ptp(halves) <= ROUNDING * np.abs(halves).max())


def check_rewards(rewards: np.ndarray, prompts: Sequence[str]) -> None:
    """Raise DegenerateBatch if one of the ``rewards`` (images,) is not finite, or all are equal but for rounding."""
    check_finite(rewards, prompts)
    if alike(rewards):
        raise DegenerateBatch(f"all {len(rewards)} rewards are {rewards[0]:g}: this reward tells no image from another")
