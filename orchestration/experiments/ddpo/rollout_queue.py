"""The steps that are being drawn, up to ``training.depth`` further than the one that is learned from."""

from actors.work import Chunk
from orchestration.experiments.ddpo.run import DdpoRun
from orchestration.experiments.ddpo.worker_group import Crew
from policies.common.seeding import PromptSchedule, derive_seed


class Ahead:
    """Gives out a run's steps in order, drawn, captioned and scored or on the way to it.

    Step k is asked for when step k − depth begins, with the weights that samplers hold then: at depth 0 those that are
    learned from, at depth 1 exactly the version before. Prompts and seeds follow from the step alone.
    """

    def __init__(self, run: DdpoRun, crew: Crew, prompts: PromptSchedule) -> None:
        self._run, self._crew, self._prompts = run, crew, prompts
        self._asked: dict[int, list[Chunk]] = {}

    def step(self, step: int) -> list[Chunk]:
        """The chunks of ``step``. Those of the steps after it are on their way from now on, too."""
        training = self._run.config.training
        for following in range(step, min(step + training.depth + 1, training.steps)):
            if following not in self._asked:
                self._ask(following)
        return self._asked.pop(step)

    @property
    def drawn_by(self) -> int | None:
        """The version of the weights that draw what is on its way; None if nothing is."""
        return next((chunks[0].drawn_with.version for chunks in self._asked.values()), None)

    def redo(self, step: int, drawn_by: int | None) -> None:
        """Ask again, in a resumed run, for a step that was on its way when the run was committed; not at depth 0, where
        a fork of one that drew ahead learns from what the present weights draw."""
        if self._run.config.training.depth and drawn_by not in (None, self._crew.samplers.published.version):
            with self._crew.drawing_with("previous"):
                self._ask(step)

    def _ask(self, step: int) -> None:
        config = self._run.config
        prompts = [prompt for prompt in self._prompts.batch(step) for _ in range(config.training.images_per_prompt)]
        seeds = [derive_seed(config.seed, "sampling", step, image) for image in range(len(prompts))]
        self._asked[step] = chunks = self._crew.samplers.rollout(prompts, seeds)
        self._crew.score(chunks)
        self._run.manifest["asked_steps"] = step + 1
