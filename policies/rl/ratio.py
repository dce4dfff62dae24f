"""The ratio of a step's first update, which is 1 but for rounding: how much of it that may be, and what is done where
rounding is larger than what is to be learned from.

Sampler and learner compute the same in calls of other sizes, with other kernels. In half precision that alone can move
a log-probability further than PPO's clip lets an update move it. Importable without torch.
"""

import math
from typing import TYPE_CHECKING, NamedTuple, Self

from policies.rl.settings import TrainingSettings

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 1e-4  # nats, of a density averaged over channels and pixels: what was never too little in float32
_MARGIN = 10  # of the rounding that was measured: more steps, prompts and kernels are to come
_MOST = {False: 1e-3, True: 2e-2}  # nats, where numbers are coarse or not; dropout of .1 does more than either


class RatioError(RuntimeError):
    """The learner does not reproduce the log-probabilities under which the images were drawn."""


class RatioBound(NamedTuple):
    """``tolerance``: the largest |Δ log p| allowed on a step's first update, in nats. ``recomputes``: whether the old
    log-probabilities are computed in the learner's own calls, which costs one more pass forward for each transition but
    those of the first update. ``noise``: the rounding that was measured, None if nothing was."""

    tolerance: float
    recomputes: bool
    noise: float | None = None

    @classmethod
    def of(cls, training: TrainingSettings, numbers: int, noise: float | None = None, coarse: bool = False) -> Self:
        """What ``training`` asks for, of latents of so many ``numbers``. Where it leaves that open, it follows from the
        ``noise``: stored log-probabilities would be clipped at random where it comes near the clip range. ``coarse``:
        whether the network computes in half precision or TF32. Raises RatioError on more noise than that explains."""
        asked, size = training.ratio_tolerance, numbers if training.log_density == "sum" else 1
        if isinstance(asked, float | int):
            return cls(asked, False, noise)
        if noise is not None and not noise <= (most := _MOST[coarse] * size):
            raise RatioError(
                f"with the same weights, log-probabilities of a learner's calls differ by {noise:.3g} nats from those "
                f"of a sampler's, and rounding does {most:g} at most. Look for dropout, or for layers that mix the "
                "images of a call; or set training.ratio_tolerance to what you accept"
            )
        wide = _MARGIN * (noise or 0.0)
        can = training.algorithm.clips_ratio  # others have no old log-probabilities, or one update
        return cls(max(wide, LEAST * size), can and (asked == "recompute" or wide > training.clip_range), noise)


def check_reproduced(difference: "Tensor", steps: "Tensor", tolerance: float) -> dict[int, float]:
    """The largest |Δ log p| of each denoising step. Raises RatioError beyond ``tolerance``."""
    # NaN compares as smaller than anything: as infinity it is the worst that it is.
    difference, steps = difference.abs().nan_to_num(nan=math.inf).cpu(), steps.cpu()
    errors = {int(step): float(difference[steps == step].max()) for step in steps.unique()}
    worst = max(errors, key=lambda step: errors[step])
    if not errors[worst] <= tolerance:
        raise RatioError(
            f"before any update the log-probability at denoising step {worst} differs by {errors[worst]:.3g} nats from "
            f"the stored one (allowed: {tolerance:.3g}). Sampler and learner differ: check weights version, guidance, "
            "precision and dropout"
        )
    return errors
