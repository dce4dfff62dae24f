"""TRL's DDPOTrainer, an epoch a line of standard input. Run by ``benchmarks.peer`` in TRL's own environment.

Its argument is a JSON object: ``pipeline`` (directory), ``lora``, ``ddpo`` (fields of TRL's DDPOConfig), ``scheduler``
(what is to be changed of its configuration), ``prompts``, ``images_per_prompt`` and ``rewards``: a file for images
(images, height, width, 3) uint8, which are then asked about by a line {"score": prompts} and answered by a line of
rewards; without it a reward that costs nothing. Each epoch answers a line: CPU and wall seconds of sampling, rewards,
and everything.
"""

import json
import random
import sys
import time
from collections import defaultdict
from typing import Any

import numpy as np
import torch


def main() -> None:
    given = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    from accelerate import PartialState
    from trl import DDPOConfig
    from trl.models.modeling_sd_base import DefaultDDPOStableDiffusionPipeline
    from trl.trainer.ddpo_trainer import DDPOTrainer

    PartialState()  # TRL warns by a logger that needs it, before it makes one itself
    draw = random.Random(given["ddpo"].get("seed", 0))
    order: list[str] = []

    def next_prompt() -> tuple[str, dict[str, str]]:
        if not order:  # every prompt equally often, each in a row of images
            shuffled = draw.sample(given["prompts"], len(given["prompts"]))
            order.extend(prompt for prompt in shuffled for _ in range(given.get("images_per_prompt", 1)))
        return order.pop(0), {}

    def reward(images: torch.Tensor, prompts: tuple[str, ...], _: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        if "rewards" not in given:
            return images.mean(dim=(1, 2, 3)), {}
        pixels = (images.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
        np.save(given["rewards"], pixels)
        print(json.dumps({"score": list(prompts)}), flush=True)
        return torch.tensor(json.loads(input())), {}

    pipeline = DefaultDDPOStableDiffusionPipeline(given["pipeline"], use_lora=given["lora"])
    stock = pipeline.sd_pipeline
    stock.scheduler = type(stock.scheduler).from_config(stock.scheduler.config, **given.get("scheduler", {}))
    if given["ddpo"]["sample_guidance_scale"] == 1:
        # With this release of diffusers TRL cannot draw without guidance: it would join the empty prompts all the same.
        stock._encode_prompt = lambda *_, prompt_embeds, **__: prompt_embeds
    config = DDPOConfig(**{"log_with": None, "mixed_precision": "no", "save_freq": 10**9} | given["ddpo"])
    trainer = DDPOTrainer(config, reward, next_prompt, pipeline)
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, stage: str) -> None:
        work = getattr(trainer, name)

        def measured(*arguments: Any, **options: Any) -> Any:
            cpu, wall = time.process_time(), time.perf_counter()
            try:
                return work(*arguments, **options)
            finally:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                spent[f"{stage} cpu"] += time.process_time() - cpu
                spent[f"{stage} wall"] += time.perf_counter() - wall

        setattr(trainer, name, measured)

    timed("_generate_samples", "sample")
    timed("compute_rewards", "reward")
    timed("step", "all")
    steps = 0
    trained = [each.numel() for each in pipeline.unet.parameters() if each.requires_grad]
    print(json.dumps({"parameters": sum(trained)}), flush=True)
    for epoch, line in enumerate(sys.stdin):
        if directory := json.loads(line).get("save"):
            pipeline.save_pretrained(directory)
        else:
            spent.clear()
            steps = trainer.step(epoch, steps)
        print(json.dumps(dict(spent)), flush=True)


if __name__ == "__main__":
    main()
