"""A model's directory that cannot be used is refused by the dry run, in one line that names file or directory."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from orchestration.cluster.ray_cluster import Machine
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.memory_plan import counted
from orchestration.experiments.ddpo.preflight import describe_ddpo, preflight_ddpo
from orchestration.experiments.registry import EXPERIMENTS
from orchestration.experiments.sweep.config import SweepConfig
from orchestration.experiments.sweep.preflight import describe_sweep, preflight_sweep
from orchestration.runs.config import ConfigError, load_config, validate
from pipelines.rehearsal import rehearse
from pipelines.settings import CaptionerSettings, ModelSettings
from pipelines.storage.locations import CHECKOUT
from tests.models import build_tiny_clip, build_tiny_encoder, build_tiny_vqa

DIGITS, PIPELINE = CHECKOUT / "configs/ddpo/digits.yaml", CHECKOUT / "models/digits/pipeline"
UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
Damage = Callable[[Path], object]


def fields(file: str, **change: Any) -> Damage:
    return lambda path: (path / file).write_text(
        json.dumps(json.loads((path / file).read_text(encoding="utf-8")) | change), encoding="utf-8"
    )


def content(file: str, held: bytes) -> Damage:
    return lambda path: (path / file).write_bytes(held)


def tensors(file: str, change: Callable[[dict[str, np.ndarray]], object]) -> Damage:
    def damage(path: Path) -> None:
        held = load_file(path / file)
        change(held)
        save_file(held, path / file)

    return damage


def renamed(file: str, name: str) -> Damage:
    return lambda path: (path / file).rename(path / file.split("/")[0] / name)


def sharded(absent: bool) -> Damage:
    def damage(path: Path) -> None:
        held = load_file(path / UNET)
        (path / UNET).unlink()
        halves = {"a.safetensors": sorted(held)[::2], "b.safetensors": sorted(held)[1::2]}
        for name, keys in halves.items():
            save_file({key: held[key] for key in keys}, path / "unet" / name)
        places = {key: name for name, keys in halves.items() for key in keys}
        (path / f"{UNET}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
        if absent:
            (path / "unet" / "b.safetensors").unlink()

    return damage


def first(held: dict[str, np.ndarray]) -> str:
    return sorted(held)[0]


# What a look at files and headers finds, before any library is imported.
PLAIN: dict[str, tuple[Damage, str]] = {
    "a variant": (renamed(UNET, "diffusion_pytorch_model.fp16.safetensors"), "unet holds only .*fp16.*variant"),
    "pickled": (renamed(TEXT, "pytorch_model.bin"), r"text_encoder holds only pytorch_model\.bin \(pickled"),
    "a missing shard": (sharded(absent=True), r"index\.json names b\.safetensors, which is not in its directory"),
    "a shard elsewhere": (
        lambda path: [(path / UNET).unlink(), content(f"{UNET}.index.json", b'{"weight_map": {"x": "../y"}}')(path)],
        r"names \.\./y",
    ),
    "no weights": (lambda path: (path / UNET).unlink(), "unet holds no weights"),
    "empty weights": (content(UNET, b""), f"{UNET}: .*header"),
    "half the weights": (lambda path: os.truncate(path / UNET, 100_000), f"{UNET}: .*not fully covered"),
    "a huge header": (content(UNET, b"\xff" * 7 + b"\x3f{}"), f"{UNET}: .*header too large"),
    "integers": (
        tensors(UNET, lambda held: held.update({first(held): held[first(held)].astype(np.int8)})),
        "is I8; known are F64",
    ),
    "no autoencoder": (lambda path: shutil.rmtree(path / "vae"), "has no vae"),
    "no scheduler": (lambda path: shutil.rmtree(path / "scheduler"), "has no scheduler"),
    "no words": (lambda path: (path / "tokenizer/tokenizer.json").unlink(), "tokenizer holds no tokenizer.json"),
    "a part of null": (fields("model_index.json", text_encoder=[None, None]), "has no text_encoder"),
    "code of its own": (fields("model_index.json", unet=["my_module", "MyUNet"]), "of neither diffusers nor"),
    "a size of null": (fields("unet/config.json", sample_size=None), "sample_size None"),
    "a size of words": (fields("unet/config.json", sample_size="8"), "sample_size '8'"),
    "a size beyond memory": (fields("unet/config.json", sample_size=10**9), "sample_size 1000000000"),
    "learned variance": (fields("unet/config.json", out_channels=16), "out_channels 16"),
    "an inpainting network": (fields("unet/config.json", in_channels=17, out_channels=17), "latent_channels 8"),
    "quantised": (fields("unet/config.json", quantization_config={"bits": 4}), "quantization_config"),
    "a list": (content("unet/config.json", b"[]"), r"unet/config\.json is damaged"),
    "a deep list": (content("vae/config.json", b"[" * 100_000), r"vae/config\.json is damaged"),
    **{
        f"{field} {value!r}": (fields(f"{part}/config.json", **{field: value}), rf"{part}/config\.json: {field} is ")
        for part, field, values in (
            ("vae", "scaling_factor", (0, None, float("nan"), "1.0", True, 1e-30, [1])),
            ("unet", "mid_block_scale_factor", (0, None, "x")),
            ("unet", "norm_eps", (0, -1.0, None, 1e8)),
            ("unet", "freq_shift", (24, "x", None)),
            ("text_encoder", "layer_norm_eps", (0, "x")),
        )
        for value in values
    },
    "no step of so many": (fields("scheduler/scheduler_config.json", num_train_timesteps=1), "config.json: .*steps"),
    "layers without end": (fields("text_encoder/config.json", num_hidden_layers=10**9), "num_hidden_layers is"),
    "a directory for a file": (
        lambda path: [(path / "unet/config.json").unlink(), (path / "unet/config.json").mkdir()],
        r"unet/config\.json cannot be read",
    ),
    "a pipe": (
        lambda path: [(path / "unet/config.json").unlink(), os.mkfifo(path / "unet/config.json")],
        r"unet/config\.json is not a file",
    ),
}
# What the libraries' own loaders find, and a first step without numbers.
REHEARSED: dict[str, tuple[Damage, str]] = {
    "a tensor less": (tensors(UNET, lambda held: held.pop("conv_in.weight")), "unet lacks 1 of its .*conv_in.weight"),
    "a text encoder's less": (tensors(TEXT, lambda held: held.pop(first(held))), "text_encoder lacks 1"),
    "another shape": (
        tensors(UNET, lambda held: held.update({"conv_in.weight": held["conv_in.weight"][:, :1].copy()})),
        r"unet: .*conv_in\.weight expected shape",
    ),
    "a text encoder's other shape": (
        tensors(TEXT, lambda held: held.update({first(held): held[first(held)][:1].copy()})),
        "text_encoder holds other shapes of 1",
    ),
    "more words than places": (fields("tokenizer/tokenizer_config.json", model_max_length=40), "Sequence length"),
    "a word beyond its text encoder": (
        fields("tokenizer/tokenizer_config.json", pad_token="unheard of"),
        "tokenizer: it makes token 582, and its text encoder knows 582",
    ),
    "a network that does not fit itself": (fields("unet/config.json", downsample_padding=5), r"unet/config\.json: "),
    "an autoencoder that does not": (
        fields("vae/config.json", up_block_types=["UpDecoderBlock2D"]),
        r"vae/config\.json: ",
    ),
    "no noise": (fields("scheduler/scheduler_config.json", trained_betas=[0.0] * 1000), "scheduler: .*its betas"),
    "a class of nobody": (fields("model_index.json", unet=["diffusers", "Nothing"]), "has no attribute Nothing"),
}


def dry_run(model: Path, *overrides: str) -> str:
    config = load_config(DdpoConfig, DIGITS, [f"model.path={model}", *overrides])
    return describe_ddpo(config, preflight_ddpo(config, Machine(2, 0)))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return shutil.copytree(PIPELINE, tmp_path / "model")


@pytest.mark.parametrize("case", [*PLAIN, *REHEARSED])
def test_a_damaged_model_is_refused_by_the_dry_run(case: str, model: Path) -> None:
    damage, expected = (PLAIN | REHEARSED)[case]
    damage(model)
    look = preflight_ddpo if case in PLAIN else EXPERIMENTS["ddpo"].plan
    with pytest.raises(ConfigError, match=expected) as found:
        look(load_config(DdpoConfig, DIGITS, [f"model.path={model}"]), Machine(2, 0))
    assert str(model) in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("content", [None, b"x" * 99])
def test_a_damaged_evaluator_is_refused_by_the_dry_run(content: bytes | None, tmp_path: Path) -> None:
    judge = shutil.copytree(PIPELINE.with_name("evaluator"), tmp_path / "judge")
    (judge / "model.safetensors").unlink()
    if content:
        (judge / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=str(judge)):
        dry_run(PIPELINE, f"evaluation.evaluator={judge}")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.lora_targets=[to_x]"], "LoRA target 'to_x' matches no module"),
        (["model.lora_targets=[]"], "LoRA target '' matches no module"),
        (["model.lora_targets=[to_q, norm1]"], "LoRA target 'norm1' is a layer that is neither linear nor"),
        (["model.lora_targets=[attn1]"], "LoRA target 'attn1' matches no module"),
    ],
)
def test_lora_that_binds_to_nothing_is_refused_by_the_dry_run(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        preflight_ddpo(load_config(DdpoConfig, DIGITS, ["model.lora_rank=4", *overrides]), Machine(2, 0))


def test_shards_are_counted_as_one_file(model: Path) -> None:
    whole = counted(str(model), ["to_q"])
    sharded(absent=False)(model)
    assert counted(str(model), ["to_q"]) == whole
    assert whole["unet"] > 10**6
    assert "learnable timesteps" in dry_run(model)


def test_images_that_are_no_squares_are_planned(model: Path) -> None:
    fields("unet/config.json", sample_size=[4, 8])(model)
    assert counted(str(model))["latent"] == counted(str(PIPELINE))["latent"] * 2
    assert "learnable timesteps" in dry_run(model, "evaluation.evaluator=null")
    assert "learnable timesteps" in dry_run(model)  # on a wider canvas the evaluator looks at the square around the ink
    fields("unet/config.json", sample_size=[8, 4])(model)
    with pytest.raises(ConfigError, match=r"models/digits/evaluator: .*of shape \(n, 16, 16, 3\).* \(1, 32, 16, 3\)"):
        dry_run(model)


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for each kind of model that rewards load, and a head of the aesthetic predictor."""
    home = tmp_path_factory.mktemp("rewards")
    build_tiny_clip(home / "clip_score")
    build_tiny_vqa(home / "blip_vqa")
    build_tiny_encoder(home / "bertscore_f1")
    shutil.copytree(home / "clip_score", home / "aesthetic")
    shutil.copytree(home / "bertscore_f1", home / "sentence_cosine")
    modules = [{"path": "", "type": "Transformer"}, {"path": "1_Pooling", "type": "Pooling"}]
    for number, module in enumerate(modules):
        module |= {"idx": number, "name": str(number), "type": f"sentence_transformers.models.{module['type']}"}
    (home / "sentence_cosine" / "modules.json").write_text(json.dumps(modules))
    (home / "sentence_cosine" / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    (home / "sentence_cosine" / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    save_file({"0.weight": np.ones((1, 11), np.float32), "0.bias": np.ones(1, np.float32)}, home / "head.safetensors")
    return home


def only(*names: str) -> Damage:
    def damage(path: Path) -> None:
        for each in [each for each in path.iterdir() if each.name not in names]:
            shutil.rmtree(each) if each.is_dir() else each.unlink()

    return damage


def without(*names: str) -> Damage:
    return lambda path: [(path / name).unlink(missing_ok=True) for name in names]


WEIGHTS, WORDS = "model.safetensors", ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt")
OF_REWARDS: dict[str, tuple[str, Damage, str]] = {
    "CLIP's configuration alone": ("clip_score", only("config.json"), "clip_score holds no weights"),
    "an encoder's list alone": ("sentence_cosine", only("modules.json"), "sentence_cosine holds no weights"),
    "a list of nothing known": ("sentence_cosine", content("modules.json", b"[3]"), r"modules\.json: TypeError"),
    "pickled": (
        "blip_vqa",
        lambda path: (path / WEIGHTS).rename(path / "pytorch_model.bin"),
        r"blip_vqa holds only pytorch_model\.bin \(pickled",
    ),
    "half the weights": ("bertscore_f1", lambda path: os.truncate(path / WEIGHTS, 5000), rf"bertscore_f1/{WEIGHTS}: "),
}
OF_REWARDS_REHEARSED: dict[str, tuple[str, Damage, str]] = {
    "a tensor less": (
        "sentence_cosine",
        tensors(WEIGHTS, lambda held: held.pop(first(held))),
        "lacks 1 of its tensors",
    ),
    "another shape": (
        "clip_score",
        tensors(WEIGHTS, lambda held: held.update({"visual_projection.weight": np.ones((9, 9), np.float32)})),
        "clip_score holds other shapes of 1 of its tensors, such as visual_projection",
    ),
    "no words": ("bertscore_f1", without(*WORDS), "bertscore_f1: its tokenizer knows no words"),
    "no words of sentences": ("sentence_cosine", without(*WORDS), "sentence_cosine: its tokenizer knows no words"),
    "an image that does not fit": (
        "clip_score",
        fields("preprocessor_config.json", crop_size={"height": 20, "width": 20}),
        r"clip_score: Input image size \(20\*20\)",
    ),
    "words beyond its vocabulary": (
        "blip_vqa",
        lambda path: shutil.copy(CHECKOUT / "models/digits/captioner" / WORDS[0], path / WORDS[0]),
        "blip_vqa: IndexError: index out of range",
    ),
    "no list of poolings": ("sentence_cosine", lambda path: shutil.rmtree(path / "1_Pooling"), "Pooling"),
    "a head of another CLIP": ("aesthetic", lambda path: None, r"head\.safetensors: layers \[\(1, 11\)\].* 12 numbers"),
}


def of_reward(name: str, directory: Path, rewards: Path) -> list[str]:
    options = {"model": str(directory)} | ({"head": str(rewards / "head.safetensors")} if name == "aesthetic" else {})
    return [f"reward.function={name}", f"reward.options.{name}={json.dumps(options)}"]


@pytest.mark.parametrize("case", [*OF_REWARDS, *OF_REWARDS_REHEARSED])
def test_a_damaged_model_of_a_reward_is_refused(case: str, rewards: Path, tmp_path: Path) -> None:
    name, damage, expected = (OF_REWARDS | OF_REWARDS_REHEARSED)[case]
    damaged = shutil.copytree(rewards / name, tmp_path / name)
    damage(damaged)
    config = load_config(DdpoConfig, DIGITS, of_reward(name, damaged, rewards))
    with pytest.raises(ValueError, match=expected) as found:  # noqa: PT012
        preflight_ddpo(config, Machine(2, 0))
        assert case in OF_REWARDS_REHEARSED
        nothing = CaptionerSettings(path=None)
        rehearse(
            ModelSettings(path="of/hub"),
            config.sampling,
            nothing,
            config.reward,
            None,
            ["a yellow seven on a white background"],
        )
    assert str(rewards if name == "aesthetic" else tmp_path) in str(found.value)
    assert "\n" not in str(found.value)


def test_whole_models_of_rewards_pass_the_dry_run_and_another_head_does_not(rewards: Path) -> None:
    names = ("clip_score", "blip_vqa", "bertscore_f1", "sentence_cosine")
    overrides = [each for name in names for each in of_reward(name, rewards / name, rewards)]
    overrides += [f"reward.function={json.dumps(dict.fromkeys(names, 1.0))}"]
    assert "learnable timesteps" in dry_run(PIPELINE, *overrides)
    with pytest.raises(ConfigError, match=r"head\.safetensors: layers \[\(1, 11\)\]"):
        dry_run(PIPELINE, *of_reward("aesthetic", rewards / "aesthetic", rewards))


def test_a_sweep_tries_out_each_choice_of_models(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dry_sweep(**space: list[Any]) -> str:
        dotted = {name.replace("__", "."): values for name, values in space.items()}
        config = validate(SweepConfig, {"config": str(DIGITS), "search": "grid", "space": dotted})
        return describe_sweep(config, preflight_sweep(config))

    tensors(UNET, lambda held: held.pop("conv_in.weight"))(model)
    with pytest.raises(ConfigError, match=rf"at .*{model}.*: {model}/unet lacks 1 of its tensors"):
        dry_sweep(model__path=[str(model)])
    tried: list[DdpoConfig] = []
    monkeypatch.setattr(
        "orchestration.experiments.ddpo.preflight.describe_ddpo", lambda config, plan: tried.append(config)
    )
    captioners = [f"{'./' * dots}models/digits/captioner" for dots in range(7)]
    models = ["models/digits/pipeline", "./models/digits/pipeline"]
    text = dry_sweep(model__path=models, captioner__path=captioners, training__learning_rate=[1e-4, 1e-5])
    assert "8 of 14 choices of models tried out" in text
    assert len(tried) == 8
    assert {each.model.path for each in tried} == set(models)
    assert {each.captioner.path for each in tried} == set(captioners)


def test_a_damaged_captioner_is_refused_by_the_dry_run(tmp_path: Path) -> None:
    captioner = shutil.copytree(CHECKOUT / "models/digits/captioner", tmp_path / "captioner")
    tensors("model.safetensors", lambda held: held.pop(first(held)))(captioner)
    with pytest.raises(ConfigError, match=f"{captioner} lacks 1 of its tensors"):
        dry_run(PIPELINE, f"captioner.path={captioner}")
    (captioner / "model.safetensors").rename(captioner / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=f"{captioner} holds only pytorch_model.bin"):
        dry_run(PIPELINE, f"captioner.path={captioner}")
