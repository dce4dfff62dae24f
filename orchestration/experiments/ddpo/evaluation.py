"""The held-out measure: images of fixed prompts and seeds, and what captioner, reward and evaluator say of them."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from pipelines.settings import RewardSettings
from policies.common.seeding import derive_seed
from policies.rl.advantages import weighted_sum


class Evaluation:
    """Some images and all that was said of them, joined from what the chunks gave.

    ``unseen``: whether nothing is ever trained on the image's prompt (n,) bool;
    ``images`` (n, height, width, 3) uint8; ``scores`` (n,), the reward; ``by_function``: what each reward function
    says, trained on or held out (n,); ``captions`` (n,) or None; ``fulfilled``: for each slot
    and for "full" whether the image shows what its prompt asks for (n,) bool, or None without an evaluator;
    ``agreement``: share of images in which captioner and evaluator name the same in every slot, None of videos;
    ``kl_to_base``: of the denoising of the first images, in nats an image; ``held_out``: the function that the run is
    judged by, if any.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        images: Sequence[np.ndarray],
        captions: Sequence[list[str]],
        by_function: dict[str, np.ndarray],
        verdicts: Sequence[Any],
        reward: RewardSettings,
        unseen: Collection[str] = (),
        divergences: Sequence[np.ndarray] = (),
    ) -> None:
        self.prompts, self.images, self.by_function = list(prompts), np.concatenate(images), by_function
        self.unseen = np.array([prompt in unseen for prompt in prompts])
        self.captions = [caption for part in captions for caption in part] or None
        self.scores, self.held_out = weighted_sum(by_function, reward.weights), next(iter(reward.held_out), None)
        self.kl_to_base = float(np.concatenate(divergences).mean()) if divergences else None
        self.fulfilled: dict[str, np.ndarray] | None = None
        self.agreement: float | None = None
        if verdicts:
            self.fulfilled = {key: np.concatenate([v[0][key] for v in verdicts]) for key in verdicts[0][0]}
            seen = {slot: [word for v in verdicts for word in v[1][slot]] for slot in verdicts[0][1]}
            self.agreement = _agreement(self.captions, seen) if self.captions and seen else None

    @property
    def accuracy(self) -> float | None:
        """Share of images that show everything their prompt asks for."""
        return None if self.fulfilled is None else float(self.fulfilled["full"].mean())

    @property
    def measure(self) -> np.ndarray:
        """What runs are judged by (n,): the evaluator, else the first held-out function, else the reward itself."""
        if self.fulfilled is not None:
            return self.fulfilled["full"].astype(np.float64)
        return self.scores if self.held_out is None else self.by_function[self.held_out]

    def metrics(self) -> dict[str, float]:
        """For charts: evaluation/reward, /diversity and /kl_to_base, evaluator/<slot>, /full and /agreement,
        rewards/<function>; of seen and of unseen prompts apart, seen/reward and /full, unseen/reward and /full."""
        judged = self.fulfilled or {}
        values = {"evaluation/reward": float(self.scores.mean())}
        if len(self.by_function) > 1:
            values |= {f"rewards/{name}": float(scores.mean()) for name, scores in self.by_function.items()}
        for part, mask in (("seen", ~self.unseen), ("unseen", self.unseen)) if self.unseen.any() else ():
            values[f"{part}/reward"] = float(self.scores[mask].mean())
            values |= {f"{part}/full": float(judged["full"][mask].mean())} if judged else {}
        values |= {f"evaluator/{slot}": float(hits.mean()) for slot, hits in judged.items()}
        spread = diversity(self.images, self.prompts)
        others = {"evaluation/kl_to_base": self.kl_to_base, "evaluation/diversity": spread}
        others |= {"evaluator/agreement": self.agreement}
        return values | {name: value for name, value in others.items() if value is not None}


def fixed_work(prompts: Sequence[str], images: int) -> tuple[list[str], list[int]]:
    """Mixed prompts and seeds of the held-out measure, the same for every run: the first n are that of n images."""
    order = np.random.default_rng(derive_seed(0, "evaluation order")).permutation(len(prompts))
    chosen = [prompts[order[index % len(prompts)]] for index in range(images)]
    return chosen, [derive_seed(0, "evaluation", index) for index in range(images)]


def diversity(images: np.ndarray, prompts: Sequence[str]) -> float | None:
    """Mean distance of two images of one prompt: root mean square over pixels, in units of the full range.

    0 if the images of a prompt have collapsed into one; None if no prompt has two. Large images are thinned to at most
    32 pixels a side, which a mean over pixels hardly notices.
    """
    stride = max(1, images.shape[1] // 32)
    flat = images[:, ::stride, ::stride].reshape(len(images), -1).astype(np.float32) / 255
    names, distances = np.asarray(prompts), []
    for prompt in dict.fromkeys(prompts):
        group = flat[names == prompt]
        if len(group) > 1:
            first, second = np.triu_indices(len(group), k=1)
            distances.append(np.sqrt(((group[first] - group[second]) ** 2).mean(axis=1)).mean())
    return float(np.mean(distances)) if distances else None


def _agreement(captions: Sequence[str], seen: dict[str, list[str]]) -> float:
    from pipelines.data.digits import parse

    parsed = [parse(caption) for caption in captions]
    return float(np.mean([all(p[slot] == seen[slot][i] for slot in seen) for i, p in enumerate(parsed)]))
