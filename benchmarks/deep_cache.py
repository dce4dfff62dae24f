"""How near cached features stay to the whole trajectory, beside DDIM with fewer steps and no fewer multiply-adds.

    python -m benchmarks.deep_cache [--model models/digits/pipeline] [--images 540] [--rounds 4]

Deterministic DDIM (η = 0) with guidance 2 from the same noise, one thread. Cached: 20 steps, all computed where the
step's number is a multiple of N, else from branch 0 or 1 up (pipelines/denoisers/deep_cache.py). Beside each, as few
plain steps as cost at least as many multiply-adds. All share the beginning of guidance's halves, but for the first
line, which is the stock forward of the doubled batch. Printed are, against 20 plain steps, the squared error of the
final latents (mean, its standard error and median over images), multiply-adds and CPU seconds (median over rounds, in
which ways alternate); and the share of images in which the evaluator sees all that the prompt says, and the Fréchet
distance of the evaluator's features to those of as many real images of the same prompts.
"""

import argparse
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from torch import Tensor

from orchestration.runs.manifest import git_commit
from pipelines.data.digits import all_prompts, real_images
from pipelines.denoisers.deep_cache import guided_halves, multiply_adds
from pipelines.measures.distances import frechet_distance
from pipelines.measures.evaluator import load_evaluator, to_network_input
from pipelines.rl.policy import DiffusionPolicy
from pipelines.settings import ModelSettings
from policies.rl.settings import SamplingSettings

STEPS, GUIDANCE, INTERVALS, BRANCHES = 20, 2.0, (2, 3), (0, 1)
EVALUATOR = "models/digits/evaluator"


@dataclass(frozen=True)
class Way:
    """``steps`` of DDIM, of which every ``interval``-th is computed whole; ``stock``: by the network's own forward."""

    steps: int
    interval: int = 1
    branch: int = 0
    stock: bool = False

    def __str__(self) -> str:
        cached = f", N = {self.interval}, branch {self.branch}" if self.interval > 1 else ""
        return f"{self.steps} steps{cached}{', stock' if self.stock else ''}"

    def cost(self, full: float, cached: float) -> float:
        """In multiply-adds, from those of both kinds of step."""
        whole = len(range(0, self.steps, self.interval))
        return whole * full + (self.steps - whole) * cached


@torch.no_grad()
def draw(policy: DiffusionPolicy, way: Way, prompts: list[str], noise: Tensor) -> Tensor:
    """Final latents (batch, channels, height, width) from ``noise`` of the same shape."""
    family = policy.family
    schedule = family.schedule(SamplingSettings(steps=way.steps))
    empty, given = policy.embed([None]), policy.embed(prompts)
    latents, features = noise, None
    for step, timestep in enumerate(schedule.timesteps):
        timesteps = timestep.repeat(len(prompts))
        if way.stock:
            output = policy.predict(latents, timesteps, given, GUIDANCE)
        else:
            earlier = features if step % way.interval else None
            both, features = guided_halves(policy.network, latents, timesteps, empty, given, way.branch, earlier)
            unconditional, conditional = both.chunk(2)
            output = unconditional + GUIDANCE * (conditional - unconditional)
        latents = family.step(schedule, step, latents, output, torch.zeros_like(latents), eta=0.0)
    return latents


def costs(policy: DiffusionPolicy, branch: int) -> tuple[int, int]:
    """Multiply-adds of a guided image's full and cached step."""
    latents, conditions = torch.zeros(1, *policy.family.latent_shape), policy.embed([None, None])
    return multiply_adds(policy.network, latents, conditions, branch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/digits/pipeline")
    parser.add_argument("--images", type=int, default=540)
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    policy = DiffusionPolicy(ModelSettings(path=arguments.model), SamplingSettings(guidance_scale=GUIDANCE))
    evaluator, known = load_evaluator(EVALUATOR), all_prompts()
    prompts = [known[image % len(known)] for image in range(arguments.images)]
    noise = torch.randn(len(prompts), *policy.family.latent_shape, generator=torch.Generator().manual_seed(0))

    plain, (full, _) = Way(STEPS), costs(policy, 0)
    ways, relative = [Way(STEPS, stock=True), plain], {plain: 1.0}
    doubled = multiply_adds(policy.network, noise[:2], policy.embed([None, None]))[0]
    relative[ways[0]] = doubled / full
    for interval in INTERVALS:
        for branch in BRANCHES:
            cached = Way(STEPS, interval, branch)
            cost = cached.cost(*costs(policy, branch)) / (STEPS * full)
            fewer = Way(math.ceil(cost * STEPS))
            relative |= {cached: cost, fewer: fewer.steps / STEPS}
            ways += [cached, fewer]

    latents: dict[Way, Tensor] = {}
    seconds: dict[Way, list[float]] = defaultdict(list)
    for _ in range(arguments.rounds + 1):
        for way in dict.fromkeys(ways):
            started = time.process_time()
            latents[way] = draw(policy, way, prompts, noise)
            seconds[way].append(time.process_time() - started)
    spent = {way: median(each[1:]) for way, each in seconds.items()}

    def features(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return evaluator.network.features(to_network_input(images)).double().numpy()

    real = features(real_images(prompts, np.random.default_rng(0)))
    print(f"commit {git_commit()}, {len(prompts)} images, {arguments.rounds} rounds; latents' variance", end=" ")
    print(f"{latents[plain].var().item():.3f}; multiply-adds and CPU of {plain}: 1 and {spent[plain]:.2f} s")
    print(f"{'way':<28}{'squared error':>20}{'median':>9}{'multiply-adds':>15}{'CPU':>7}{'accuracy':>10}{'FID':>8}")
    for way in ways:
        errors = (latents[way] - latents[plain]).square().flatten(1).mean(dim=1).double()
        error = f"{errors.mean():.5f} ± {errors.std() / math.sqrt(len(errors)):.5f}"
        images = policy.decode(latents[way])
        accuracy, distance = evaluator.judge(images, prompts)["full"].mean(), frechet_distance(features(images), real)
        times = f"{relative[way]:>15.3f}{spent[way] / spent[plain]:>7.2f}"
        print(f"{way!s:<28}{error:>20}{errors.median():>9.5f}{times}{accuracy:>10.3f}{distance:>8.3f}")


if __name__ == "__main__":
    main()
