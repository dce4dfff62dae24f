"""What can a reward be fooled with? Images that please it, by gradients or queries, beside real ones and the judge."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from rich.console import Group

from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.preflight import preflight_ddpo
from orchestration.runs.config import ConfigError, about
from orchestration.runs.display import plain_table
from pipelines.default_models.pretrain import make
from pipelines.storage.locations import resolve_model
from pipelines.storage.names import file_name
from policies.common.seeding import derive_seed
from policies.inverting import InvertingSettings, verdict

Where = Literal["pixels", "latents"]
_SHOWN = 20  # pairs in a picture


class Finding(NamedTuple):
    """What an audit found: means by column, how many images there were, the verdict with its interval; its picture."""

    means: dict[str, float]
    images: int
    verdict: tuple[str, float, float]
    picture: Path


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
    tell: Callable[[str], None],
) -> dict[str, Finding]:
    """Audit the functions ``names``, each with so many ``images`` of other prompts, and ``tell`` how it is searched.

    Gradients search pixels and queries the model's latents, unless ``where`` says otherwise. Raises ConfigError."""
    names, judged = chosen(config, names), config.evaluation.evaluator
    if judged is None:
        raise ConfigError("evaluation.evaluator is null: an audit needs a judge that is not the reward; name one")
    plan = preflight_ddpo(config.model_copy(update={"output_dir": None}))
    with about("--output"):
        make(output)
    from pipelines.captioner import Captioner
    from pipelines.figures.plots import before_after
    from pipelines.inverting import Auditor, Space, latents_of
    from pipelines.measures.evaluator import load_evaluator

    device = next(role.device for role in plan.roles if role.name == "sampler")
    judge = load_evaluator(resolve_model(judged), device)
    captioner = Captioner(config.captioner, device) if config.captioner.path else None
    prompts = plan.prompts[:: max(1, len(plan.prompts) // images)][:images]
    pixels, latents = Space((3, judge.image_size, judge.image_size)), latents_of(config.model.path, device)
    seed, findings = derive_seed(config.seed, "audit"), dict[str, Finding]()
    for name in names:
        sign = -1.0 if config.reward.weights.get(name, 1) < 0 else 1.0
        auditor = Auditor(name, config.reward.functions[name], captioner, judge, device, sign)
        place = where or ("pixels" if auditor.pleased else "latents")
        how = f"gradients, {place}, {settings.steps} steps, {settings.views or 'no'} views"
        if auditor.pleased is None:
            many = f"{settings.queries:,} an image, {settings.queries * len(prompts):,} in all"
            how = f"not differentiable, so queries alone: {place}, {many}"
        tell(f"{name}: {how}")
        drawn = auditor.find(prompts, pixels if place == "pixels" else latents, settings, seed)
        _, example, found = auditor.audit(drawn, prompts, seed)
        pair = example[:_SHOWN], drawn[:_SHOWN]
        said = [captioner.caption(each) if captioner else None for each in pair]
        picture = output / f"{file_name(name)}.png"
        before_after(picture, *pair, prompts[:_SHOWN], said[0], said[1], ("real", "found"), f"{name}: {how}")
        means = {column: float(each.mean()) for column, each in found.items()}
        findings[name] = Finding(means, len(prompts), verdict(found["fooled"]), picture)
    return findings


def render(findings: dict[str, Finding]) -> Group:
    """A table, and a verdict on each."""
    columns = {"real": "real", "found": "score", "rank": "rank", "judge": "seen_full", "gap": "gap"}
    rows = [[name, *(f"{each.means[key]:.3f}" for key in columns.values())] for name, each in findings.items()]
    said = []
    for name, (means, images, (word, low, high), picture) in findings.items():
        share = f"{means['fooled']:.2f} [{low:.2f}, {high:.2f}] of {images} images"
        said.append(f"{name}: {word} ({share}), see {picture}")
    return Group(plain_table(["reward", *columns], rows, numbers=[*columns]), *said)
