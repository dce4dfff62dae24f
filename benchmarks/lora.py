"""What LoRA costs: CPU seconds of forward + backward of the whole network, of peft's LoRA, and of LoRA as W + BA.

    python -m benchmarks.lora [--config configs/ddpo/digits-lora.yaml] [--batch 320] [--rounds 9]

The three alternate within each round, so that a busy machine disturbs all alike: medians over rounds, one thread.
"""

import argparse
import statistics
from pathlib import Path

import torch

from benchmarks.micro_batch import cpu_milliseconds
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.runs.config import load_config
from orchestration.runs.manifest import git_commit
from pipelines.rl.policy import DiffusionPolicy
from pipelines.rl.weights import prepare
from pipelines.settings import ModelSettings
from policies.rl.settings import SamplingSettings


def pefts(policy: DiffusionPolicy, model: ModelSettings) -> None:
    """LoRA in peft's own layers, which compute W x + B A x."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=model.lora_rank, lora_alpha=model.lora_rank, target_modules=list(model.lora_targets))
    inject_adapter_in_model(config, policy.network)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/ddpo/digits-lora.yaml"))
    parser.add_argument("--batch", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load_config(DdpoConfig, arguments.config, arguments.overrides).model
    policies = {name: DiffusionPolicy(model, SamplingSettings()) for name in ("full", "peft", "W + BA")}
    prepare(policies["full"].network, model.model_copy(update={"lora_rank": 0}))
    pefts(policies["peft"], model)
    prepare(policies["W + BA"].network, model)
    latents = torch.randn(arguments.batch, *policies["full"].family.latent_shape)
    steps = torch.full((arguments.batch,), 500)
    times: dict[str, list[float]] = {name: [] for name in policies}
    for _ in range(arguments.rounds + 1):
        for name, policy in policies.items():
            told = policy.embed([""] * arguments.batch)
            forward_and_backward = lambda: policy.predict(latents, steps, told).sum().backward()  # noqa: E731, B023
            times[name].append(cpu_milliseconds(forward_and_backward) / 1000)
            policy.network.zero_grad(set_to_none=True)
    targets = f"rank {model.lora_rank} on {', '.join(model.lora_targets)}"
    print(f"commit {git_commit()}, torch {torch.__version__}, one thread, {arguments.rounds} rounds, {targets}")
    full = times["full"][1:]
    print(f"CPU seconds of forward + backward of {arguments.batch} transitions; ratio to full, round by round")
    for name, all_rounds in times.items():
        ratios = [mine / its for mine, its in zip(all_rounds[1:], full, strict=True)]
        parameters = sum(each.numel() for each in policies[name].network.parameters() if each.requires_grad)
        spread = f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"
        print(f"{name:<7} {statistics.median(all_rounds[1:]):.3f} s  {spread}  {parameters:>9,} parameters")


if __name__ == "__main__":
    main()
