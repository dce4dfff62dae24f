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
    evaluator, captioner, autoencoder, pipeline = (measurements[name] for name in _PARTS)
    chosen, last = pipeline["chosen"], pipeline["last"]
    parameters = pipeline["parameters"] | {"vae": autoencoder["parameters"]}
    pipeline_seconds = pipeline["cpu_seconds"] + autoencoder["cpu_seconds"]
    built = sum(measurements[name]["cpu_seconds"] for name in _PARTS)
    return f"""# The default models: tinted handwritten digits

Three tiny models, trained from scratch by `ouroboros pretrain`, which also measures them and writes this card. They load
without network or GPU, and are of the same classes as Stable Diffusion 1 and BLIP, so every part of Ouroboros treats them alike.

| Directory | What it is | Parameters | MB | CPU seconds to build |
|---|---|---|---|---|
| `pipeline/` | `StableDiffusionPipeline`: 16 × 16 px, 4 × 4 × 8 latents, v-prediction, DDIM | {_count(sum(parameters.values()))} \
(UNet {_count(parameters["unet"])}, text encoder {_count(parameters["text_encoder"])}, \
autoencoder {_count(parameters["vae"])}) | {pipeline["megabytes"]} | {pipeline_seconds} |
| `captioner/` | `BlipForConditionalGeneration` | {_count(captioner["parameters"])} | {captioner["megabytes"]} \
| {captioner["cpu_seconds"]} |
| `evaluator/` | the independent judge, a convolutional network | {_count(evaluator["parameters"])} \
| {evaluator["megabytes"]} | {evaluator["cpu_seconds"]} |

Built with seed {measurements["seed"]} and torch {pipeline["torch"]} in {built} CPU seconds.

## Data

scikit-learn's 1,797 handwritten digits (UCI Machine Learning Repository, *Optical Recognition of Handwritten Digits*, E. Alpaydin
and C. Kaynak, CC BY 4.0), upsampled to 16 × 16 px, in one of 6 inks on one of 3 grounds: {len(all_prompts())} captions such as
"a red seven on a black background". The digit images are split once, stratified by digit: {SPLIT_SIZES["train"]} train
autoencoder, diffusion model and captioner; {SPLIT_SIZES["evaluator"]} others train the evaluator; on the remaining
{SPLIT_SIZES["test"]} nothing is trained.

## Accuracy on test digits

Every test digit in four random tints. `full` means all three slots at once; for the captioner, the exact caption by greedy
decoding; for the autoencoder, the evaluator's reading of its reconstructions
({autoencoder["test"]["psnr_db"]} dB peak signal-to-noise ratio).

| Model | digit | ink | ground | full |
|---|---|---|---|---|
| evaluator | {_row(evaluator["test"])} |
| captioner | {_row(captioner["test"])} |
| autoencoder | | | | {autoencoder["test"]["full"]:.3f} |

## The diffusion model: which checkpoint, and why not the best

Reinforcement learning needs room to show what it does. So the shipped checkpoint is the one whose full-caption accuracy, drawn
without guidance in 10 DDIM steps at η = 1 and read by the evaluator, is nearest {measurements["target_accuracy"]:.2f}: **step
{chosen["step"]}**. Colours are right by then; what is often wrong is the digit. Supervised training alone goes on to improve it:

| Model | digit | ink | ground | full |
|---|---|---|---|---|
| shipped, step {chosen["step"]}, unguided | {_row(chosen["guidance_1"])} |
| shipped, guidance 2 | {_row(chosen["guidance_2"])} |
| more supervised training, step {last["step"]}, unguided | {_row(last["guidance_1"])} |
| more supervised training, guidance 2 | {_row(last["guidance_2"])} |

({pipeline["fine_images"]} images a row, every caption equally often. The standard error of a share near one half is
{(0.25 / pipeline["fine_images"]) ** 0.5:.3f}.)

Every checkpoint, unguided, on {pipeline["curve_images"]} images (standard error up to
{(0.25 / pipeline["curve_images"]) ** 0.5:.3f}):

| Step | digit | ink | ground | full |
|---|---|---|---|---|
{chr(10).join(f"| {point['step']} | {_row(point)} |" for point in pipeline["curve"])}

## Limits

The models know these {len(all_prompts())} captions and nothing else. The captioner and the diffusion model saw the same digit
images; the evaluator did not, which is why results are to be reported by the evaluator. The evaluator always names some digit:
it has no class for an image that shows none.
"""


def _row(accuracy: dict[str, float]) -> str:
    return " | ".join(f"{accuracy[column]:.3f}" for column in _COLUMNS)


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} M"
