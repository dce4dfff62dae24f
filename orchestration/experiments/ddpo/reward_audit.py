"""What can a reward be fooled with? Images that please it, by gradients or queries, beside real ones and the judge."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from rich.table import Table

from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.preflight import preflight_ddpo
from orchestration.runs.config import ConfigError, about
from orchestration.runs.display import plain_table
from pipelines.default_models.pretrain import make
from pipelines.storage.locations import resolve_model
from pipelines.storage.names import file_name
from policies.common.seeding import derive_seed
from policies.inverting import InvertingSettings, verdict

Where = Literal["pixels", "latents"] | None
Tell = Callable[[str], None]
Finding = tuple[dict[str, float], str]  # means by column, and the verdict
_SHOWN = 20  # pairs in a picture


def audit(
    config: DdpoConfig, names: Sequence[str], images: int, by: InvertingSettings, where: Where, output: Path, tell: Tell
) -> dict[str, Finding]:
    """Audit the functions ``names``, by default all of ``config``, each with so many ``images`` of other prompts, and
    ``tell`` how each is searched and what came out.

    Gradients search pixels and queries the model's latents, unless ``where`` says otherwise. Raises ConfigError."""
    plan = preflight_ddpo(config.model_copy(update={"output_dir": None}))
    known, judged = config.reward.functions, config.evaluation.evaluator
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"{unknown[0]!r} is no reward function of this configuration, which has {', '.join(known)}")
    if judged is None:
        raise ConfigError("evaluation.evaluator is null: an audit needs a judge that is not the reward; name one")
    if plan.frames > 1:
        raise ConfigError(f"model.path {config.model.path} draws videos, and an audit looks at images: name another")
    with about("--output"):
        make(output)
    from pipelines.captioner import Captioner
    from pipelines.figures.plots import before_after
    from pipelines.measures.evaluator import load_evaluator
    from pipelines.studies.invert import Auditor, Space, latents_of

    device = next(role.device for role in plan.roles if role.name == "sampler")
    judge = load_evaluator(resolve_model(judged), device)
    captioner = Captioner(config.captioner, device) if config.captioner.path else None
    prompts = plan.prompts[:: max(1, len(plan.prompts) // images)][:images]
    pixels, latents = Space((3, judge.image_size, judge.image_size)), latents_of(config.model.path, device)
    seed, findings = derive_seed(config.seed, "audit"), dict[str, Finding]()
    for name in names or known:
        sign = -1.0 if config.reward.weights.get(name, 1) < 0 else 1.0
        auditor = Auditor(name, known[name], captioner, judge, device, sign)
        place = where or ("pixels" if auditor.pleased else "latents")
        how = f"gradients, {place}, {by.steps} steps, {by.views or 'no'} views"
        if auditor.pleased is None:
            many = f"{by.queries:,} an image, {by.queries * len(prompts):,} in all"
            how = f"not differentiable, so queries alone: {place}, {many}"
        tell(f"{name}: {how}")
        drawn = auditor.find(prompts, pixels if place == "pixels" else latents, by, seed)
        _, example, found, seen = auditor.audit(drawn, prompts, seed)
        pair, picture = (example[:_SHOWN], drawn[:_SHOWN]), output / f"{file_name(name)}.png"
        said = [captioner.caption(each) if captioner else None for each in pair]
        before_after(picture, *pair, prompts[:_SHOWN], said[0], said[1], ("real", "found"), f"{name}: {how}")
        means = {column: float(each.mean()) for column, each in (found | {"judge": seen["full"]}).items()}
        word, low, high = verdict(found["fooled"])
        share = f"fooled by {means['fooled']:.2f} [{low:.2f}, {high:.2f}] of {len(prompts)} images"
        findings[name] = means, word
        tell(f"{name}: {word}; {share}: {picture}")
    return findings


def render(findings: dict[str, Finding]) -> Table:
    """What the verdicts stand on."""
    columns = "real", "score", "rank", "judge", "gap", "fooled"
    rows = [[name, *(f"{means[key]:.3f}" for key in columns)] for name, (means, _) in findings.items()]
    return plain_table(["reward", *columns], rows, numbers=[*columns])
