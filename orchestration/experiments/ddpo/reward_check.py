"""Can a reward teach anything? What it says of images that fit their prompts, of the same with others, of noise, and
of what the base model draws."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Group

from orchestration.cluster.ray_cluster import external_address
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.evaluation import Evaluation
from orchestration.experiments.ddpo.preflight import Plan, preflight_ddpo
from orchestration.experiments.ddpo.worker_group import WorkerGroup
from orchestration.runs.display import plain_table
from pipelines.rewards import OwnReward, load_reward, score
from pipelines.storage.locations import resolve_model
from policies.common.seeding import derive_seed
from policies.rl.advantages import weighted_sum

_PROMPTS, _IMAGES = 24, 8  # of a check: prompts, and images of each
_CHANCE = 2.0  # standard errors

Scores = dict[str, np.ndarray]  # by function
Scoring = Callable[[np.ndarray, Sequence[str], Iterable[str]], Scores]  # of images, prompts and functions
Drawn = tuple[Evaluation, Scoring]


def calibrate(workers: WorkerGroup, prompts: Sequence[str], images: np.ndarray) -> dict[str, float]:
    """calibration/true, /shuffled and /noise of the reward for ``images`` (n, height, width, 3) uint8 that fit."""
    weights = workers.config.reward.weights
    cases = compared(workers.score_images, prompts, images, weights)
    return {f"calibration/{name}": float(weighted_sum(scores, weights).mean()) for name, scores in cases.items()}


def compared(scoring: Scoring, prompts: Sequence[str], images: np.ndarray, names: Iterable[str]) -> dict[str, Scores]:
    """Scores (n,) by function of the images with their prompts (true), with others' (shuffled), and of noise."""
    rng = np.random.default_rng(derive_seed(0, "calibration"))
    shift = int(rng.integers(1, len(prompts))) if len(prompts) > 1 else 0
    cases = {
        "true": (images, list(prompts)),
        "shuffled": (images, [*prompts[shift:], *prompts[:shift]]),
        "noise": (rng.integers(0, 256, images.shape, dtype=np.uint8), list(prompts)),
    }
    return {name: scoring(*case, names) for name, case in cases.items()}


def fitting_images(config: DdpoConfig, before: Evaluation) -> tuple[list[str], np.ndarray]:
    """Prompts, and images that fit them. Real digits if there is an evaluator and they are of the size of what the base
    draws, else the base's own."""
    from pipelines.data.digits import IMAGE_SIZE, real_images

    prompts = list(dict.fromkeys(before.prompts))
    if config.evaluation.evaluator is None or before.images.shape[1:3] != (IMAGE_SIZE, IMAGE_SIZE):
        first = [before.prompts.index(prompt) for prompt in prompts]
        return prompts, before.images[first]
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
    plan, functions = preflight_ddpo(config.model_copy(update={"output_dir": None})), config.reward.functions
    prompts = plan.prompts[:: max(1, len(plan.prompts) // _PROMPTS)][:_PROMPTS]
    asked = [prompt for prompt in prompts for _ in range(_IMAGES)]
    seeds = [derive_seed(config.seed, "reward check", number) for number in range(len(asked))]
    asked, _ = plan.guard.grounded(
        asked, [derive_seed(config.seed, "guard", each // _IMAGES) for each in range(len(asked))]
    )
    # One's own functions, which take no model of this program's, are tried before its actors would have started.
    light = all(isinstance(each, OwnReward) and each.is_light(name) for name, each in functions.items())
    with ExitStack() as stack:
        work = config, plan, asked, seeds
        drawn, scoring = _here(*work) if light and not external_address() else _by_actors(stack, *work)
        cases = compared(scoring, *fitting_images(config, drawn), functions)
        return {name: _finding(config, scoring, name, drawn, cases) for name in functions}


def _by_actors(stack: ExitStack, config: DdpoConfig, plan: Plan, asked: list[str], seeds: list[int]) -> Drawn:
    """Images of the prompts ``asked``, with all that is said of them, and a way to have others scored."""
    from orchestration.runs.display import Display

    roles = [role for role in plan.roles if role.name != "learner"]
    plan = replace(plan, roles=roles, notes=())
    workers = stack.enter_context(WorkerGroup(config, plan, stack.enter_context(Display("reward check", 0, 0))))
    return workers.measure(workers.samplers.rollout(asked, seeds), asked), workers.score_images


def _here(config: DdpoConfig, plan: Plan, asked: list[str], seeds: list[int]) -> Drawn:
    """The same by this process alone, without captions."""
    from pipelines.measures.evaluator import load_evaluator
    from pipelines.rl.policy import DiffusionPolicy

    device = next(role.device for role in plan.roles if role.name == "sampler")
    policy = DiffusionPolicy(config.model, config.sampling, device)
    size, judge = config.actors.images_per_call, config.evaluation.evaluator
    parts = [slice(start, start + size) for start in range(0, len(asked), size)]
    images = np.concatenate([policy.rollout(asked[part], seeds[part])[0] for part in parts])
    rewards = config.reward.functions.items()
    functions = {name: load_reward(name, options, device, plan.frames) for name, options in rewards}

    def scoring(pictures: np.ndarray, words: Sequence[str], names: Iterable[str]) -> Scores:
        return {name: score(functions[name], pictures, words, None) for name in names}

    verdicts: list[Any] = [(load_evaluator(resolve_model(judge)).judge(images, asked), {})] if judge else []
    return Evaluation(asked, [images], [], scoring(images, asked, functions), verdicts, config.reward), scoring


def _finding(config: DdpoConfig, scoring: Scoring, name: str, drawn: Evaluation, found: dict[str, Scores]) -> Finding:
    cases = {case: scores[name] for case, scores in found.items()}
    scores = drawn.by_function[name].reshape(-1, _IMAGES)
    gain = cases["true"] - cases["shuffled"]
    judged = drawn.measure.reshape(-1, _IMAGES) if drawn.fulfilled is not None else None
    one, all_of_them = (_seconds(scoring, name, drawn, n) for n in (config.actors.images_per_call, len(drawn.prompts)))
    return Finding(
        {case: float(each.mean()) for case, each in cases.items()},
        config.reward.functions[name].needs_captions,
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


def _seconds(scoring: Scoring, name: str, drawn: Evaluation, most: int) -> float:
    """Seconds an image to caption and score the first so many images that were drawn."""
    images, prompts = drawn.images[:most], drawn.prompts[:most]
    begun = time.monotonic()
    scoring(images, prompts, [name])
    return (time.monotonic() - begun) / len(prompts)


def render(findings: dict[str, Finding]) -> Group:
    """A table, and a verdict on each."""
    columns, rows = ("true", "shuffled", "noise", "spread", "rank", "ms/image", "images/s"), []
    for name, found in findings.items():
        rank = "–" if found.rank_correlation is None else f"{found.rank_correlation:.3f}"
        means = [f"{found.means[case]:.3f}" for case in columns[:3]]
        rows.append([name, *means, f"{found.spread:.4f}", rank, f"{found.milliseconds:.1f}", f"{found.per_second:.0f}"])
    verdicts = (f"{name}: {found.objection or 'can teach'}" for name, found in findings.items())
    return Group(plain_table(["reward", *columns], rows, numbers=columns), *verdicts)
