"""A generation aligned with a reward before it draws for the next: steps of DDPO or DiffusionNFT in one process."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from pydantic import Field, model_validator

from pipelines.generators import Generator
from pipelines.refinements import Refinement
from pipelines.settings import RewardSettings
from policies.common.seeding import derive_seed
from policies.loops.rules import Rule
from policies.rl.advantages import PromptStatistics, advantages
from policies.rl.health import alike, check_finite
from policies.rl.settings import AdvantageSettings, SamplingSettings, TrainingSettings

_GROUP = 8  # images of a prompt, among which a reward counts
_ROLLOUT = 64  # images drawn in one call
_AVERAGE = 0.5  # of DiffusionNFT's old policy, which draws


class Aligned(Refinement):
    """Moves a text-to-image generation up a reward, by the objectives and the learner of the ``ddpo`` loop. Its prompts
    are what its training set showed."""

    names = ("aligned",)

    steps: int = Field(5, ge=1, description="sample → reward → learn rounds of each generation")
    reward: str | dict[str, float] = Field("sentence_cosine", description="as reward.function of ddpo: docs/rewards.md")
    options: dict[str, dict[str, Any]] = Field({}, description="of each reward by its name")
    objective: str = Field("importance_sampling", description="DDPO_IS; or score_function, negative_aware")
    learning_rate: float = Field(1e-4, gt=0, description="AdamW's")
    images_per_step: int = Field(128, ge=16, multiple_of=16, description="images of a step, 8 of each of its prompts")
    sampling_steps: int = Field(10, ge=1, le=1000, description="DDIM steps of the images that are learned from")
    kl_weight: float = Field(0.0, ge=0, description="weight of the KL to the generation as it was fitted")
    shuffled: bool = Field(False, description="a control: rewards are dealt out to the images of a step at random")

    @property
    def training(self) -> TrainingSettings:
        """As the ``ddpo`` loop would be told. Raises ValueError."""
        return TrainingSettings(
            steps=self.steps,
            objective=self.objective,
            learning_rate=self.learning_rate,
            images_per_step=self.images_per_step,
            images_per_prompt=_GROUP,
            updates_per_step=1 if self.objective == "score_function" else 2,
            kl_weight=self.kl_weight,
            ema_decay=_AVERAGE if self.objective == "negative_aware" else 0.0,
            on_sick_numbers="skip",
        )

    @property
    def rewarded(self) -> RewardSettings:
        """The reward with its options."""
        return RewardSettings(function=self.reward, options=self.options)

    @model_validator(mode="after")
    def _can_be_trained(self) -> "Aligned":
        _ = self.training, self.rewarded
        return self

    def check(self, generator: type[Generator], settings: Any, loop: Rule) -> None:
        """It has to draw what words ask for, and the reward's captions have to be written."""
        if not generator.captioned:
            raise ValueError(f"refinement aligned: family {generator.name()} knows no prompts; text_to_image does")
        if not generator.has_density:
            why = "draws in one pass, which has no density to learn from: use text_to_image, or rule=curated"
            raise ValueError(f"refinement aligned: family {generator.name()} {why}")
        if self.rewarded.needs_captions and settings.captioner is None:
            raise ValueError(f"refinement aligned: reward {self.rewarded.title} reads captions: name a captioner")

    def refine(
        self, model: Generator, settings: Any, seeds: Sequence[int], sampling_bias: float, device: str
    ) -> Generator:
        """See :class:`Aligned`."""
        from pipelines.rl.learning import DiffusionLearner
        from pipelines.rl.trajectory import Trajectory
        from pipelines.rl.weights import copied
        from pipelines.scoring import Scorer

        (seed,), training, known = seeds, self.training, cast(Any, model)
        guidance = 1.0 if training.algorithm.on_forward_process else 1 / sampling_bias
        sampling = SamplingSettings(steps=self.sampling_steps, guidance_scale=guidance)
        learner = DiffusionLearner(known.model, sampling, training, derive_seed(seed, "learner"), device)
        learner.begin_at(known.fitted())
        scorer = Scorer(self.rewarded, settings.captioner if self.rewarded.needs_captions else None, device)
        words, shares = list(known.captions), list(known.captions.values())
        history, groups = PromptStatistics(2), training.prompts_per_step
        for step in range(self.steps):
            random = np.random.default_rng(derive_seed(seed, "alignment", step))
            chosen = random.choice(len(words), groups, replace=bool(np.count_nonzero(shares) < groups), p=shares)
            prompts = [words[number] for number in chosen.tolist() for _ in range(_GROUP)]
            numbers = [derive_seed(seed, "rollout", step, index) for index in range(len(prompts))]
            cuts = [slice(start, start + _ROLLOUT) for start in range(0, len(prompts), _ROLLOUT)]
            with learner.holding("current"):
                drawn = [learner.policy.rollout(prompts[cut], numbers[cut], learner.weights_version) for cut in cuts]
            rewards = scorer(np.concatenate([images for images, _ in drawn]), prompts)
            rewards = random.permutation(rewards) if self.shuffled else rewards
            check_finite(rewards, prompts)
            if alike(rewards):
                continue  # all images are equally good: there is nothing to learn in this step
            advantage = advantages(rewards, prompts, AdvantageSettings(), history)
            trajectory = Trajectory.concatenate([each for _, each in drawn])
            if advantage.any():
                learner.learn(trajectory, advantage, derive_seed(seed, "timesteps", step))
        with learner.holding("averaged"):
            return model.holding(copied(learner.parameters, "cpu"))
