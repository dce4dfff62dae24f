"""What can a reward be fooled with? Images that please it, by gradients or queries, beside real ones and the judge."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Group

from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.preflight import preflight_ddpo
from orchestration.runs.config import ConfigError, about
from orchestration.runs.display import plain_table
from pipelines.inverting import Audit, Auditor, Space, latents_of
from pipelines.storage.locations import resolve_model
from policies.common.seeding import derive_seed
from policies.inverting import InvertingSettings, verdict

Where = Literal["pixels", "latents"]
_SHOWN = 20  # pairs in a picture


@dataclass(frozen=True)
class Finding:
    """What an audit found of one reward function, how it searched, and its picture."""

    audit: Audit
    how: str
    picture: Path

    @property
    def fooled(self) -> bool:
        """Whether that is the verdict."""
        return verdict(self.audit.fooled)[0] == "easily fooled"


def chosen(config: DdpoConfig, names: Sequence[str]) -> list[str]:
    """The reward functions to audit, by default all of ``config``. Raises ConfigError."""
    known = config.reward.functions
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"{unknown[0]!r} is no reward function of this configuration, which has {', '.join(known)}")
    return list(dict.fromkeys(names)) or list(known)


def audit(
    config: DdpoConfig,
    names: Sequence[str],
    images: int,
    settings: InvertingSettings,
    where: Where | None,
    output: Path,
) -> Iterator[tuple[str, Finding | str]]:
    """Yields, of each of ``names``, first in a line how it is searched, then what came out.

    Gradients search pixels and queries the model's latents, unless ``where`` says otherwise. Raises ConfigError."""
    functions = {name: config.reward.functions[name] for name in chosen(config, names)}
    if config.evaluation.evaluator is None:
        raise ConfigError("evaluation.evaluator is null: an audit needs a judge that is not the reward; name one")
    plan = preflight_ddpo(config.model_copy(update={"output_dir": None}))
    with about("--output"):
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{output} cannot be made ({error.strerror}): name another directory") from error
    from pipelines.captioner import Captioner
    from pipelines.figures.plots import before_after
    from pipelines.measures.evaluator import load_evaluator

    device = next(role.device for role in plan.roles if role.name == "sampler")
    judge = load_evaluator(resolve_model(config.evaluation.evaluator), device)
    captioner = Captioner(config.captioner, device) if config.captioner.path else None
    prompts = plan.prompts[:: max(1, len(plan.prompts) // images)][:images]
    spaces = {
        "pixels": Space((3, judge.image_size, judge.image_size)),
        "latents": latents_of(config.model.path, device),
    }
    for name, options in functions.items():
        sign = -1.0 if config.reward.weights.get(name, 1) < 0 else 1.0
        auditor = Auditor(name, options, captioner, judge, device, sign)
        place = where or ("pixels" if auditor.pleased else "latents")
        how = f"gradients, {place}, {settings.steps} steps, {settings.views or 'no'} views"
        if auditor.pleased is None:
            many = f"{settings.queries:,} an image, {settings.queries * len(prompts):,} in all"
            how = f"not differentiable: queries alone, {place}, {many}"
        yield name, how
        seed = derive_seed(config.seed, "audit")
        found = auditor.audit(auditor.search(prompts, spaces[place], settings, seed), prompts, seed)
        picture = output / f"{''.join(each if each.isalnum() else '_' for each in name)}.png"
        pair = found.example[:_SHOWN], found.images[:_SHOWN]
        real, said = (captioner.caption(each) if captioner else None for each in pair)
        before_after(picture, *pair, prompts[:_SHOWN], real, said, ("real", "found"), f"{name}: {how}")
        yield name, Finding(found, how, picture)


def render(findings: dict[str, Finding]) -> Group:
    """A table, and a verdict on each."""
    columns, rows, said = ("real", "found", "rank", "judge", "gap", "fooled"), [], []
    for name, finding in findings.items():
        found = finding.audit
        numbers = [found.real, found.scores, found.rank, found.seen["full"], found.gap, found.fooled]
        rows.append([name, *(f"{each.mean():.3f}" for each in numbers)])
        word, low, high = verdict(found.fooled)
        share = f"{found.fooled.mean():.2f} of {len(found.images)} images, 95 % [{low:.2f}, {high:.2f}]"
        said.append(f"{name}: {word} ({share}; {finding.how}): {finding.picture}")
    return Group(plain_table(["reward", *columns], rows, numbers=columns), *said)
