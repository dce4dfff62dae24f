"""What call size the UNet likes best: CPU milliseconds an image-step, forward and forward + backward, one thread.

    python -m benchmarks.micro_batch [--model models/digits/pipeline] [--rounds 5]

Sizes alternate within each round, so that a busy machine disturbs all of them alike; medians over rounds are printed.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch

from orchestration.runs.manifest import git_commit
from pipelines.rl.policy import DiffusionPolicy
from pipelines.settings import ModelSettings
from policies.rl.settings import SamplingSettings

SIZES = (16, 32, 64, 128, 256, 512)


def cpu_milliseconds(work: Callable[[], object]) -> float:
    """CPU time of one call."""
    started = time.process_time()
    work()
    return 1000 * (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/digits/pipeline")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    policy = DiffusionPolicy(ModelSettings(path=arguments.model), SamplingSettings())
    policy.network.requires_grad_(True)
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    for _ in range(arguments.rounds + 1):
        for batch in SIZES:
            latents, steps = torch.randn(batch, *policy.family.latent_shape), torch.full((batch,), 500)
            conditions = policy.embed([""] * batch)

            forward = partial(policy.predict, latents, steps, conditions)
            with torch.no_grad():
                times["forward", batch].append(cpu_milliseconds(forward))
            times["both", batch].append(cpu_milliseconds(lambda call=forward: call().sum().backward()))
    print(f"commit {git_commit()}, torch {torch.__version__}, one thread, {arguments.rounds} rounds")
    print("size  forward  forward+backward   CPU ms an image-step")
    for batch in SIZES:
        both, forward_only = (statistics.median(times[kind, batch][1:]) / batch for kind in ("both", "forward"))
        print(f"{batch:>4}  {forward_only:>7.3f}  {both:>16.3f}")


if __name__ == "__main__":
    main()
