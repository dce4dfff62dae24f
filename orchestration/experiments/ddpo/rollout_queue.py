"""The steps that are being drawn, up to ``training.depth`` further than the one that is learned from."""

import numpy as np

from actors.roles.sampler import Chunk
from orchestration.experiments.ddpo.run import DdpoRun
from orchestration.experiments.ddpo.worker_group import Rollout, WorkerGroup
from pipelines.guard import write_log
from policies.common.seeding import PromptSchedule, derive_seed


class RolloutQueue:
    """Gives out a run's steps in order, drawn, captioned and scored or on the way to it.

    Step k is asked for when step k − depth begins, with the weights that samplers hold then: at depth 0 those that are
    learned from, at depth 1 exactly the version before. Prompts and seeds follow from the step alone.
    """

    def __init__(self, run: DdpoRun, workers: WorkerGroup, prompts: PromptSchedule) -> None:
        self._run, self._workers, self._prompts = run, workers, prompts
        self._asked: dict[int, list[Chunk]] = {}

    def request(self, step: int) -> None:
        """Have what ``step`` is trained on drawn, and what those after it need, as far ahead as is allowed."""
        training = self._run.config.training
        for following in range(step, min(step + training.depth + 1, training.steps)):
            if following not in self._asked:
                self._ask(following)

    def rollout(self, step: int) -> Rollout:
        """What ``step`` is trained on, drawn. What the steps after it need is on its way from now on, too."""
        self.request(step)
        chunks = self._asked.pop(step)
        images = self._workers.wait([chunk.images for chunk in chunks], f"step {step + 1}: sampling")
        self._workers.check_receipts()
        return Rollout(step, chunks, [prompt for chunk in chunks for prompt in chunk.prompts], np.concatenate(images))

    @property
    def drawn_by(self) -> int | None:
        """The version of the weights that draw what is on its way; None if nothing is."""
        return next((chunks[0].drawn_with.version for chunks in self._asked.values()), None)

    def redo(self, step: int, drawn_by: int | None) -> None:
        """Ask again, in a resumed run, for a step that was on its way when the run was committed; not at depth 0, where
        a fork of one that drew ahead learns from what the present weights draw."""
        if self._run.config.training.depth and drawn_by not in (None, self._workers.samplers.policy.version):
            with self._workers.drawing_with("previous"):
                self._ask(step)

    def _ask(self, step: int) -> None:
        config = self._run.config
        asked = self._prompts.batch(step)  # a guard rewrites once for a group, whose images are compared
        own = [derive_seed(config.seed, "guard", step, number) for number in range(len(asked))]
        grounded, entries = self._workers.plan.guard.grounded(asked, own)
        write_log(self._run.directory / "guard.jsonl", entries, step=step + 1)
        prompts = [prompt for prompt in grounded for _ in range(config.training.images_per_prompt)]
        seeds = [derive_seed(config.seed, "sampling", step, image) for image in range(len(prompts))]
        self._asked[step] = chunks = self._workers.samplers.rollout(prompts, seeds)
        self._workers.begin_scoring(chunks)
        self._run.manifest["asked_steps"] = step + 1
