"""Can a reward teach anything? What it says of images that fit their prompts, of the same with others, of noise, and
of what the base model draws."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Group

from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.evaluation import Evaluation
from orchestration.experiments.ddpo.worker_group import WorkerGroup
from orchestration.runs.display import plain_table
from policies.common.seeding import derive_seed
from policies.rl.advantages import weighted_sum

_PROMPTS, _IMAGES = 24, 8  # of a check: prompts, and images of each
_CHANCE = 2.0  # standard errors


def calibrate(workers: WorkerGroup, prompts: Sequence[str], images: np.ndarray) -> dict[str, float]:
    """calibration/true, /shuffled and /noise of the reward for ``images`` (n, height, width, 3) uint8 that fit."""
    weights = workers.config.reward.weights
    cases = compared(workers, prompts, images, weights)
    return {f"calibration/{name}": float(weighted_sum(scores, weights).mean()) for name, scores in cases.items()}


def compared(
    workers: WorkerGroup, prompts: Sequence[str], images: np.ndarray, names: Mapping[str, Any]
) -> dict[str, dict[str, np.ndarray]]:
    """Scores (n,) by function of the images with their prompts (true), with others' (shuffled), and of noise."""
    rng = np.random.default_rng(derive_seed(0, "calibration"))
    shift = int(rng.integers(1, len(prompts))) if len(prompts) > 1 else 0
    cases = {
        "true": (images, list(prompts)),
        "shuffled": (images, [*prompts[shift:], *prompts[:shift]]),
        "noise": (rng.integers(0, 256, images.shape, dtype=np.uint8), list(prompts)),
    }
    found = {}
    for name, (pictures, words) in cases.items():
        chunks = workers.put(pictures, words)
        workers.begin_scoring(chunks, names)
        found[name] = workers.scores(chunks, f"calibration: {name}")
    return found


def fitting_images(config: DdpoConfig, before: Evaluation) -> tuple[list[str], np.ndarray]:
    """Prompts, and images that fit them. Real digits if there is an evaluator, else the base's own."""
    prompts = list(dict.fromkeys(before.prompts))
    if config.evaluation.evaluator is None:
        first = [before.prompts.index(prompt) for prompt in prompts]
        return prompts, before.images[first]
    from pipelines.data.digits import real_images

    return prompts, real_images(prompts, np.random.default_rng(derive_seed(0, "real images")))


@dataclass(frozen=True)
class Finding:
    """What a check found of one reward function.

    ``means`` of true, shuffled and noise; ``spread``: mean standard deviation over the base's images of one prompt;
    ``rank_correlation``: Spearman's, of score and held-out measure within a prompt, None without an evaluator;
    ``milliseconds`` an image, one after another in calls as a run makes them; ``per_second``: images, with all actors.
    """

    means: dict[str, float]
    compares_captions: bool
    prefers_fitting: bool
    spread: float
    rank_correlation: float | None
    milliseconds: float
    per_second: float

    @property
    def objection(self) -> str | None:
        """Why it cannot teach; None if nothing speaks against it."""
        if self.spread <= 1e-9:
            return "all images of a prompt score the same: there is nothing to learn from"
        if self.rank_correlation is not None and self.rank_correlation < 0:
            return "it ranks images against the held-out measure: what it teaches is wrong"
        if self.compares_captions and not self.prefers_fitting:
            return "it does not prefer images that fit their prompts: it cannot teach them"
        return None


def check(config: DdpoConfig) -> dict[str, Finding]:
    """Every reward function of ``config``, trained on or held out, looked at before a run."""
    from orchestration.experiments.ddpo.preflight import Plan, preflight_ddpo
    from orchestration.runs.display import Display

    plan = preflight_ddpo(config.model_copy(update={"output_dir": None}))
    roles = [role for role in plan.roles if role.name != "learner"]
    prompts = plan.prompts[:: max(1, len(plan.prompts) // _PROMPTS)][:_PROMPTS]
    asked = [prompt for prompt in prompts for _ in range(_IMAGES)]
    seeds = [derive_seed(config.seed, "reward check", number) for number in range(len(asked))]
    plan = Plan(plan.prompts, plan.unseen, roles, plan.offers)
    with Display("reward check", 0, 0) as display, WorkerGroup(config, plan, display) as workers:
        drawn = workers.measure(workers.samplers.rollout(asked, seeds), asked)
        cases = compared(workers, *fitting_images(config, drawn), workers.rewards)
        return {
            name: _finding(workers, name, drawn, {case: scores[name] for case, scores in cases.items()})
            for name in workers.rewards
        }


def _finding(workers: WorkerGroup, name: str, drawn: Evaluation, cases: dict[str, np.ndarray]) -> Finding:
    scores = drawn.by_function[name].reshape(-1, _IMAGES)
    gain = cases["true"] - cases["shuffled"]
    judged = drawn.measure.reshape(-1, _IMAGES) if drawn.fulfilled is not None else None
    one, all_of_them = _seconds(workers, name, drawn, 1), _seconds(workers, name, drawn, None)
    return Finding(
        {case: float(each.mean()) for case, each in cases.items()},
        workers.config.reward.functions[name].needs_captions,
        bool(gain.mean() > _CHANCE * gain.std() / np.sqrt(len(gain))),
        float(scores.std(axis=1).mean()),
        None if judged is None else _rank_correlation(scores, judged),
        1000 * one,
        1 / all_of_them,
    )


def _rank_correlation(scores: np.ndarray, judged: np.ndarray) -> float:
    """Of deviations from the prompt's mean: what advantages see."""
    from scipy.stats import spearmanr

    apart = [(each - each.mean(axis=1, keepdims=True)).ravel().round(9) for each in (scores, judged)]
    return float(np.nan_to_num(spearmanr(*apart).statistic))


def _seconds(workers: WorkerGroup, name: str, drawn: Evaluation, chunks: int | None) -> float:
    """Seconds an image to caption and score so many pieces of work, or all that were drawn."""
    work = workers.put(drawn.images, drawn.prompts)[:chunks]
    begun = time.monotonic()
    workers.begin_scoring(work, [name])
    workers.scores(work, f"timing {name}")
    return (time.monotonic() - begun) / sum(len(chunk.prompts) for chunk in work)


def render(findings: Mapping[str, Finding]) -> Group:
    """A table, and a verdict on each."""
    columns, rows = ("true", "shuffled", "noise", "spread", "rank", "ms/image", "images/s"), []
    for name, found in findings.items():
        rank = "–" if found.rank_correlation is None else f"{found.rank_correlation:.3f}"
        means = [f"{found.means[case]:.3f}" for case in columns[:3]]
        rows.append([name, *means, f"{found.spread:.4f}", rank, f"{found.milliseconds:.1f}", f"{found.per_second:.0f}"])
    verdicts = (f"{name}: {found.objection or 'can teach'}" for name, found in findings.items())
    return Group(plain_table(["reward", *columns], rows, numbers=columns), *verdicts)
