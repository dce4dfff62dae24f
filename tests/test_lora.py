"""LoRA as one weight W + BA computes what peft's two paths compute, and is gone when it is switched off."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from pipelines.rl.learning import DiffusionLearner
from pipelines.rl.policy import DiffusionPolicy
from pipelines.rl.weights import changed_by, copied, exported, prepare, swapped
from pipelines.settings import ModelSettings
from policies.rl.settings import SamplingSettings, TrainingSettings
from tests.models import PROMPTS, build_tiny_pixels, build_tiny_sd3, build_tiny_xl

SAMPLING = SamplingSettings(steps=4, guidance_scale=2.0)
TARGETS = ("to_q", "to_out.0", "net.2", "conv1", "conv_shortcut", "proj_in", "time_emb_proj")  # 3×3, 1×1 and linear


def lora(path: Path, **more: object) -> ModelSettings:
    return ModelSettings.model_validate({"path": str(path), "lora_rank": 4, "lora_targets": TARGETS, **more})


def prepared(model: ModelSettings, seed: int = 0) -> tuple[DiffusionPolicy, dict[str, Tensor]]:
    """A policy whose LoRA, if it has one, is away from the identity, as after training."""
    torch.manual_seed(seed)
    policy = DiffusionPolicy(model, SAMPLING)
    parameters = prepare(policy.network, model)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return policy, dict(parameters)


def peft_itself(model: ModelSettings, parameters: dict[str, Tensor]) -> DiffusionPolicy:
    """The same LoRA in peft's own layers, which compute W x + B A x."""
    from peft import LoraConfig

    policy = DiffusionPolicy(model, SAMPLING)
    policy.network.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=list(TARGETS)))
    own = dict(policy.network.named_parameters())
    assert {name for name, each in own.items() if each.requires_grad} == parameters.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            own[name].copy_(parameter)
    return policy


def log_prob(policy: DiffusionPolicy) -> Callable[[], Tensor]:
    """Log-probabilities (3,) of one transition at each step that has a density."""
    torch.manual_seed(1)
    before, after = torch.randn(2, 3, 4, 8, 8)
    steps = policy.schedule.stochastic_steps
    embeddings = policy.embed(PROMPTS)

    def call() -> Tensor:
        output = policy.predict(before, policy.schedule.timesteps[steps], embeddings)
        return policy.schedule.log_prob(before, after, output, steps, "mean")

    return call


def test_outputs_log_probabilities_and_gradients_are_pefts(tiny_v_pipeline: Path) -> None:
    """Log-probabilities to 1e-6 relative, the gradient of all LoRA parameters to 1e-5 relative."""
    model = lora(tiny_v_pipeline)
    policy, parameters = prepared(model)
    other = peft_itself(model, parameters)
    merged, unmerged = log_prob(policy)(), log_prob(other)()
    torch.testing.assert_close(merged, unmerged, rtol=1e-6, atol=0)
    with torch.no_grad():
        assert (merged - log_prob(DiffusionPolicy(model, SAMPLING))()).abs().min() > 1e-3
    for each in (merged, unmerged):
        each.sum().backward()
    theirs = dict(other.network.named_parameters())
    ours = torch.cat([each.grad.flatten() for each in parameters.values() if each.grad is not None])
    expected = torch.cat([each.grad.flatten() for name in parameters if (each := theirs[name]).grad is not None])
    assert ours.shape == expected.shape == (sum(each.numel() for each in parameters.values()),)
    assert (ours - expected).norm() < 1e-5 * expected.norm()
    assert not any(each.grad is not None for each in policy.network.parameters() if not each.requires_grad)


def test_a_sampler_computes_the_learners_bits(tiny_v_pipeline: Path) -> None:
    """The learner's weight is the sampler's, so the first update's ratio is as exact as without LoRA."""
    model = lora(tiny_v_pipeline)
    policy, parameters = prepared(model)
    sampler = DiffusionPolicy(model, SAMPLING)
    assert sampler.load(weights := exported(policy.network)) == len(changed_by(weights)) > 7
    assert sum(each.nbytes for each in weights.values()) == sum(each.nbytes for each in parameters.values())
    with torch.no_grad():
        torch.testing.assert_close(log_prob(sampler)(), log_prob(policy)(), rtol=0, atol=0)


@pytest.mark.parametrize("rank", [0, 4])
def test_the_reference_is_where_training_began(tiny_v_pipeline: Path, rank: int) -> None:
    """For LoRA and for the whole network, also in the middle of a pass, whose gradient does not notice."""
    model = lora(tiny_v_pipeline, lora_rank=rank)
    torch.manual_seed(0)
    policy = DiffusionPolicy(model, SAMPLING)
    parameters, call = prepare(policy.network, model), log_prob(policy)
    with torch.no_grad():
        base = call()
    first = copied(parameters)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    trained = call()
    trained.sum().backward()
    expected = {name: parameter.grad for name, parameter in parameters.items()}
    policy.network.zero_grad(set_to_none=True)
    again = call()
    with torch.no_grad(), swapped(parameters, first):
        then = call()
        assert all(parameters[name].data_ptr() == value.data_ptr() for name, value in first.items())  # lent, not copied
    again.sum().backward()
    torch.testing.assert_close(then, base, rtol=0, atol=0)
    assert not then.requires_grad
    assert (trained - base).abs().max() > 1e-3
    torch.testing.assert_close(call(), trained, rtol=0, atol=0)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=0)
        assert parameter.requires_grad


def test_the_reference_is_left_when_something_fails(tiny_v_pipeline: Path) -> None:
    policy, parameters = prepared(lora(tiny_v_pipeline))
    call, zeros = log_prob(policy), {name: torch.zeros_like(each) for name, each in parameters.items()}
    expected = call()
    with pytest.raises(RuntimeError, match="lost"), swapped(parameters, zeros):
        raise RuntimeError("lost")
    torch.testing.assert_close(call(), expected, rtol=0, atol=0)


def test_a_small_step_survives_a_coarse_type(tiny_v_pipeline: Path) -> None:
    """A and B are float32 in a bfloat16 network: a step of 1e-4 on a weight of 1 would be rounded away."""
    policy, parameters = prepared(lora(tiny_v_pipeline, dtype="bfloat16"))
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    weights = exported(policy.network)
    sampler = DiffusionPolicy(lora(tiny_v_pipeline, dtype="bfloat16"), SAMPLING)
    sampler.load(weights)
    with torch.no_grad():
        torch.testing.assert_close(log_prob(sampler)(), log_prob(policy)(), rtol=0, atol=0)


def test_a_target_that_is_no_matrix_is_refused(tiny_v_pipeline: Path) -> None:
    with pytest.raises(ValueError, match="Target module GroupNorm"):
        prepared(lora(tiny_v_pipeline, lora_targets=("conv_norm_out",)))


def test_lora_alone_in_the_bases_stock_pipeline_draws_the_same(tiny_v_pipeline: Path, tmp_path: Path) -> None:
    """To one level of 255: the stock pipeline computes two paths, the sampler one."""
    model = lora(tiny_v_pipeline)
    learner = DiffusionLearner(model, SAMPLING, TrainingSettings(micro_batch=8), seed=0)
    with torch.no_grad():
        for name, parameter in learner.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    learner.save(tmp_path)
    base, sampler = DiffusionPolicy(model, SAMPLING), DiffusionPolicy(model, SAMPLING)
    sampler.load(learner.weights())
    seeds = [3, 1, 2]
    (shown, _), (unlearned, _) = (each.rollout(PROMPTS, seeds) for each in (sampler, base))
    assert np.abs(shown.astype(int) - unlearned).max() > 9

    stock = StableDiffusionPipeline.from_pretrained(tiny_v_pipeline, safety_checker=None)
    stock.load_lora_weights(tmp_path / "lora")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    call = {"generator": generators, "num_inference_steps": 4, "eta": 1.0, "guidance_scale": 2.0}
    drawn = np.stack([np.asarray(image) for image in stock(list(PROMPTS), **call).images]).astype(int)
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]
    assert np.abs(drawn - shown).max() <= 1
    assert (drawn == shown).mean() > 0.99


@pytest.mark.parametrize("build", [build_tiny_xl, build_tiny_sd3, build_tiny_pixels])
def test_lora_of_other_families(build: Callable[[Path], Path], tmp_path: Path) -> None:
    """A UNet of two text encoders, a transformer with patches, a UNet on pixels, which has no loader."""
    targets = ("to_q", "to_out.0", "conv1") if build is not build_tiny_sd3 else ("to_q", "net.2", "pos_embed.proj")
    model = lora(build(tmp_path / "base"), lora_targets=targets)
    sampling = SAMPLING.model_copy(update={"guidance_scale": 1.0})
    learner = DiffusionLearner(model, sampling, TrainingSettings(micro_batch=8), seed=0)
    with torch.no_grad():
        for parameter in learner.parameters.values():
            parameter.normal_(std=0.1)
    learner.save(tmp_path / "out")

    def output(policy: DiffusionPolicy) -> Tensor:
        torch.manual_seed(1)
        latents, times = torch.randn(2, *policy.family.latent_shape), policy.schedule.timesteps[:2]
        with torch.no_grad():
            return policy.predict(latents, times, policy.embed(PROMPTS[:2]))

    trained, base = output(learner.policy), DiffusionPolicy(model, sampling)
    merged = DiffusionPolicy(model.model_copy(update={"path": str(tmp_path / "out")}), sampling)
    torch.testing.assert_close(output(merged), trained, rtol=0, atol=0)
    assert (output(base) - trained).abs().max() > 1e-2
    if build is build_tiny_pixels:
        assert not (tmp_path / "out" / "lora").exists()
    else:
        base.family.pipeline.load_lora_weights(tmp_path / "out" / "lora")
        torch.testing.assert_close(output(base), trained, rtol=0, atol=1e-5)
