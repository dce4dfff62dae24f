"""Writes the model card from what ``pretrain`` measured; no number in it is typed by hand."""

from pathlib import Path
from typing import Any

from pipelines.digits import SLOTS, SPLIT_SIZES, all_prompts

_PARTS = ("evaluator", "captioner", "autoencoder", "pipeline")
_COLUMNS = (*SLOTS, "full")


def write_card(output_dir: Path, measurements: dict[str, Any]) -> None:
    """Writes ``README.md`` beside the models."""
    (output_dir / "README.md").write_text(model_card(measurements))


def model_card(measurements: dict[str, Any]) -> str:
    """The card's Markdown."""
    return "\n".join(
        [
            _introduction(measurements),
            _data(),
            _test_accuracy(measurements),
            _checkpoint_choice(measurements),
            _LIMITS,
        ]
    )


def _introduction(measurements: dict[str, Any]) -> str:
    evaluator, captioner, autoencoder, pipeline = (measurements[name] for name in _PARTS)
    parameters = pipeline["parameters"] | {"vae": autoencoder["parameters"]}
    parts = ", ".join(f"`{name}` {_count(number)}" for name, number in parameters.items())
    seconds = {name: measurements[name]["cpu_seconds"] for name in _PARTS}
    table = _table(
        ("Directory", "Class", "Parameters", "MB", "CPU seconds to build"),
        (
            "`pipeline/`",
            "`StableDiffusionPipeline`: 16 × 16 px, 4 × 4 × 8 latents, v-prediction, DDIM",
            f"{_count(sum(parameters.values()))} ({parts})",
            pipeline["megabytes"],
            seconds["pipeline"] + seconds["autoencoder"],
        ),
        (
            "`captioner/`",
            "`BlipForConditionalGeneration`",
            _count(captioner["parameters"]),
            captioner["megabytes"],
            seconds["captioner"],
        ),
        (
            "`evaluator/`",
            "`pipelines.evaluator`: a convolutional network, the independent judge",
            _count(evaluator["parameters"]),
            evaluator["megabytes"],
            seconds["evaluator"],
        ),
    )
    return f"""# The default models: tinted handwritten digits

Three tiny models, trained from scratch by `ouroboros pretrain`, which also measures them and writes this card.
They load without network or GPU. Pipeline and captioner are of the same classes as Stable Diffusion 1 and BLIP, so
every part of Ouroboros treats them alike.

{table}

Seed {measurements["seed"]}, torch {pipeline["torch"]}, {sum(seconds.values())} CPU seconds in all.
"""


def _data() -> str:
    return f"""## Data

scikit-learn's 1,797 handwritten digits (E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI
Machine Learning Repository, CC BY 4.0), upsampled to 16 × 16 px, in one of 6 inks on one of 3 grounds:
{len(all_prompts())} captions such as "a red seven on a black background". The digit images are split once,
stratified by digit: {SPLIT_SIZES["train"]} train autoencoder, diffusion model and captioner,
{SPLIT_SIZES["evaluator"]} others train the evaluator, and on the remaining {SPLIT_SIZES["test"]} nothing is trained.
"""


def _test_accuracy(measurements: dict[str, Any]) -> str:
    reconstruction = measurements["autoencoder"]["test"]
    table = _table(
        ("Model", *_COLUMNS),
        ("evaluator", *_accuracies(measurements["evaluator"]["test"])),
        ("captioner", *_accuracies(measurements["captioner"]["test"])),
        ("evaluator, on the autoencoder's reconstructions", *_accuracies(reconstruction)),
    )
    return f"""## Accuracy on test digits

Every test digit in four random tints. `full` means all three slots at once; for the captioner, the exact caption,
decoded greedily. The reconstructions have a peak signal-to-noise ratio of {reconstruction["psnr_db"]} dB.

{table}
"""


def _checkpoint_choice(measurements: dict[str, Any]) -> str:
    pipeline = measurements["pipeline"]
    chosen, supervised, target = pipeline["chosen"], pipeline["supervised"], measurements["target_accuracy"]
    first = min(pipeline["curve"], key=lambda point: abs(point["full"] - target))
    choice = _table(
        ("Diffusion model", *_COLUMNS),
        (f"shipped (step {chosen['step']}), unguided", *_accuracies(chosen["guidance_1"])),
        (f"shipped (step {chosen['step']}), guidance 2", *_accuracies(chosen["guidance_2"])),
        (f"true captions only (step {supervised['step']}), unguided", *_accuracies(supervised["guidance_1"])),
        (f"true captions only (step {supervised['step']}), guidance 2", *_accuracies(supervised["guidance_2"])),
    )
    return f"""## Which checkpoint is shipped, and why not the best

Reinforcement learning needs room to show what it does. So the diffusion model is first trained on true captions, to
step {supervised["step"]}, and then a little longer on captions of which {pipeline["wrong_digits"]:.0%} have their
digit word replaced by a random one, as captions from the web are often wrong. It keeps drawing clean digits in the
right colours, but heeds the digit word less. Shipped is the checkpoint of this second phase whose full-caption
accuracy is nearest {target:.2f}, drawn without guidance in 10 DDIM steps at η = 1 and read by the
evaluator: **step {chosen["step"]}**. (In the first phase, step {first["step"]} comes nearest, but its digits look less
finished.)
Supervised training on true captions alone reaches what the last two rows say:

{choice}

Each row: {pipeline["fine_images"]} images, every caption equally often; standard error at most
{_standard_error(pipeline["fine_images"])}.

Every checkpoint of the first phase, unguided, on {pipeline["curve_images"]} images (standard error at most
{_standard_error(pipeline["curve_images"])}):

{_curve(pipeline["curve"])}

Every checkpoint of the second phase, unguided, on {pipeline["candidate_images"]} images (standard error at most
{_standard_error(pipeline["candidate_images"])}):

{_curve(pipeline["candidates"])}
"""


def _curve(points: list[dict[str, float]]) -> str:
    return _table(("Step", *_COLUMNS), *((point["step"], *_accuracies(point)) for point in points))


_LIMITS = f"""## Limits

The models know these {len(all_prompts())} captions and nothing else. Captioner and diffusion model saw the same
digit images; the evaluator did not, which is why results are to be reported by the evaluator. The evaluator always
names some digit: it has no class for an image that shows none.
"""


def _table(header: tuple[object, ...], *rows: tuple[object, ...]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _accuracies(accuracy: dict[str, float]) -> list[str]:
    return [f"{accuracy[column]:.3f}" for column in _COLUMNS]


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} M"


def _standard_error(images: int) -> str:
    return f"{(0.25 / images) ** 0.5:.3f}"
