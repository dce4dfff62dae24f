"""Training the small models of the MAD loop: CPU seconds of a fit over the bare forward and backward passes in it.

    python -m benchmarks.mad_training [--rounds 5] [--images 120] [--steps 100]

The floor makes the same network calls at the same batch size on the same tensors again and again: no data, no noise,
no optimiser, no schedule. One thread, alternating, CPU seconds, medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from sklearn.datasets import load_digits

from orchestration.runs.manifest import git_commit
from pipelines.generators.diffusion import DiffusionGenerator, DiffusionSettings
from pipelines.generators.gan import GanGenerator, GanSettings, critic_loss, pairing_loss
from pipelines.measures.evaluator import to_network_input
from policies.loops.samples import Samples


def diffusion(data: Samples, steps: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """A fit of the diffusion family, and its floor."""
    settings = DiffusionSettings(training_steps=steps)
    unet = DiffusionGenerator.fit(settings.model_copy(update={"training_steps": 1}), data, [0]).unet
    parameters = list(unet.train().requires_grad_(True).parameters())
    assert data.labels is not None
    clean = to_network_input(data.values[0, : settings.batch_size])
    labels, times = torch.from_numpy(data.labels[0, : len(clean)]), torch.randint(settings.timesteps, (len(clean),))

    def floor() -> None:
        for _ in range(settings.training_steps):
            loss = torch.nn.functional.mse_loss(unet(clean, times, labels).sample, clean)
            torch.autograd.grad(loss, parameters)

    return lambda: DiffusionGenerator.fit(settings, data, [0]), floor


def gan(data: Samples, steps: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """A fit of the GAN family, and its floor: one update of the critic and one of the generator a step."""
    settings, unlabelled = GanSettings(steps=steps), Samples(data.values)
    networks = GanGenerator.fit(settings.model_copy(update={"steps": 1}), unlabelled, [0]).networks.requires_grad_(True)
    critic = list(networks.critic.parameters())
    generator = [*networks.style.parameters(), *networks.synthesis.parameters()]
    real = to_network_input(data.values[0, : settings.batch_size])
    latents = torch.randn(len(real), settings.latent)

    def floor() -> None:
        for _ in range(settings.steps):
            fake = networks.synthesis(networks.style(latents))
            loss = critic_loss(networks.critic, real, fake.detach(), settings.gradient_penalty)
            torch.autograd.grad(loss, critic)
            torch.autograd.grad(pairing_loss(networks.critic(fake), networks.critic(real)), generator)

    return lambda: GanGenerator.fit(settings, unlabelled, [0]), floor


def main() -> None:
    """Print both families' fits over their floors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--steps", type=int, default=100, help="of a fit")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    digits = load_digits()
    images = (digits.images[: chosen.images, ..., None] * 255 / 16).round().astype(np.uint8)
    data = Samples(images[None], digits.target[None, : chosen.images])
    print(f"commit {git_commit()}, torch {torch.__version__}, one thread, {chosen.rounds} rounds")
    print("family       fit CPU s   floor CPU s   fit / floor   (lowest – highest)")
    for name, make in (("diffusion", diffusion), ("gan", gan)):
        works, spent = make(data, chosen.steps), ([], [])  # type: ignore[var-annotated]
        for _ in range(chosen.rounds):
            for work, seconds in zip(works, spent, strict=True):
                began = time.process_time()
                work()
                seconds.append(time.process_time() - began)
        ratios = [mine / bare for mine, bare in zip(*spent, strict=True)]
        fit, floor = (statistics.median(seconds) for seconds in spent)
        spread = f"({min(ratios):.3f} – {max(ratios):.3f})"
        print(f"{name:<10}{fit:>12.2f}{floor:>14.2f}{statistics.median(ratios):>14.3f}   {spread}", flush=True)


if __name__ == "__main__":
    main()
