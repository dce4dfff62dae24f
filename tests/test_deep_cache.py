"""Features cached between denoising steps, and guidance whose halves share their beginning, against stock networks."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipelines.denoisers.deep_cache import caching, check, forward, guided_halves, multiply_adds
from pipelines.rl.policy import DiffusionPolicy
from pipelines.settings import ModelSettings
from policies.rl.settings import SamplingSettings
from tests.models import PROMPTS, build_tiny_xl

DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
# The networks of Stable Diffusion 1.5, 2.1 and XL, with their blocks and layers, narrow; and what else may occur.
SHAPES: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": (16, 16, 32, 32), "attention_head_dim": 2},
    "sd2": {
        "block_out_channels": (16, 16, 32, 32),
        "attention_head_dim": (2, 2, 4, 4),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "xl": {
        "block_out_channels": (16, 32, 32),
        "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP, UP),
        "transformer_layers_per_block": (1, 2, 3),
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 10,
    },
    "uneven layers": {
        "block_out_channels": (16, 16, 32),
        "down_block_types": (CROSS_DOWN, DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, UP, CROSS_UP),
        "layers_per_block": (1, 2, 3),
        "attention_head_dim": 2,
        "time_embedding_act_fn": "silu",
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    },
    "no attention": {
        "block_out_channels": (16, 16),
        "down_block_types": (DOWN, DOWN),
        "up_block_types": (UP, UP),
        "mid_block_type": "UNetMidBlock2D",
    },
    "no middle": {
        "block_out_channels": (16, 16),
        "down_block_types": (DOWN, DOWN),
        "up_block_types": (UP, CROSS_UP),
        "attention_head_dim": 2,
        "mid_block_type": None,
    },
}
BRANCHES = {"sd15": 12, "sd2": 12, "xl": 9, "uneven layers": 9, "no attention": 6, "no middle": 6}


@pytest.fixture(scope="module", params=SHAPES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def unet(name: str) -> Any:
    return build(name)


def build(name: str) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=16, cross_attention_dim=12, norm_num_groups=8, **SHAPES[name]).eval()


@pytest.fixture(scope="module")
def digits() -> DiffusionPolicy:
    return DiffusionPolicy(ModelSettings(), SamplingSettings())


def conditions_of(unet: Any, rows: int, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    given = {"encoder_hidden_states": torch.randn(rows, 7, 12, generator=draw)}
    if unet.config.addition_embed_type:
        given["text_embeds"] = torch.randn(rows, 10, generator=draw)
        given["time_ids"] = torch.randint(0, 64, (rows, 6), generator=draw).float()
    return given


def inputs_of(unet: Any, sides: tuple[int, int] = (16, 16)) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Of three rows with timesteps of their own."""
    return torch.randn(3, 4, *sides), torch.tensor([981, 500, 3]), conditions_of(unet, 3)


def stock(unet: Any, latents: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    states = conditions["encoder_hidden_states"]
    return unet(latents, timesteps, states, added_cond_kwargs=conditions, return_dict=False)[0]


def calls(unet: Any, work: Callable[[], object]) -> dict[str, int]:
    """Rows of each call of a leaf module, added, by the module's name."""
    counted: dict[str, int] = {}

    def counter(name: str) -> Callable[..., None]:
        def count(_: nn.Module, __: Any, output: Tensor) -> None:
            counted[name] = counted.get(name, 0) + len(output)

        return count

    leaves = [(name, each) for name, each in unet.named_modules() if not list(each.children())]
    hooks = [each.register_forward_hook(counter(name)) for name, each in leaves]
    work()
    for hook in hooks:
        hook.remove()
    return counted


@pytest.mark.parametrize("sides", [(16, 16), (16, 24), (13, 22)])
@torch.no_grad()
def test_without_features_it_is_the_stock_forward(unet: Any, sides: tuple[int, int]) -> None:
    """Also on sides that doubling does not lead back to."""
    inputs = inputs_of(unet, sides)
    output, _ = forward(unet, *inputs)
    assert torch.equal(output, stock(unet, *inputs))


@torch.no_grad()
def test_calls_of_a_stock_pipeline_are_cached_anew_for_every_image(unet: Any) -> None:
    states = conditions_of(unet, 2)
    given = {"encoder_hidden_states": states["encoder_hidden_states"], "added_cond_kwargs": states}
    latents = torch.randn(5, 2, 4, 16, 16)
    whole = [
        forward(unet, each, torch.tensor([time, time]), states)
        for each, time in zip(latents, (9, 6, 3, 9, 6), strict=True)
    ]
    later = forward(unet, latents[1], torch.tensor([6, 6]), states, 0, whole[0][1])[0]
    with caching(unet, 2, 0):
        outputs = [unet(each, time, **given).sample for each, time in zip(latents, (9, 6, 3, 9, 6), strict=True)]
        assert torch.equal(unet(latents[3], torch.tensor(9), **given, return_dict=False)[0], whole[3][0])
    for number in (0, 2, 3):
        assert torch.equal(outputs[number], whole[number][0])
    assert torch.equal(outputs[1], later)
    assert not torch.equal(outputs[1], whole[1][0])
    assert torch.equal(unet(latents[1], 6, **given).sample, whole[1][0])


@pytest.mark.parametrize("model", ["digits", "sd", "xl"])
@torch.no_grad()
def test_conditions_are_those_of_the_families(model: str, tiny_pipeline: Path, tmp_path: Path) -> None:
    paths = {
        "digits": lambda: "models/digits/pipeline",
        "sd": lambda: tiny_pipeline,
        "xl": lambda: build_tiny_xl(tmp_path),
    }
    policy = DiffusionPolicy(ModelSettings(path=str(paths[model]())), SamplingSettings(guidance_scale=2))
    unet, latents, timesteps = policy.network, torch.randn(3, *policy.family.latent_shape), torch.tensor([900, 500, 20])
    given, empty = policy.embed(PROMPTS), policy.embed([None])
    check(policy.family.network.config | {"_class_name": type(unet).__name__}, 1)
    output, _ = forward(unet, latents, timesteps, given)
    assert torch.equal(output, policy.family.forward(latents, timesteps, given))
    unconditional, conditional = guided_halves(unet, latents, timesteps, empty, given)[0].chunk(2)
    guided = unconditional + 2 * (conditional - unconditional)
    assert (guided - policy.predict(latents, timesteps, given)).abs().max() < 1e-5
    assert (conditional - unconditional).abs().max() > 1e-3


@torch.no_grad()
def test_features_are_what_enters_the_up_resnet_before_its_skip(name: str, unet: Any) -> None:
    resnets = [each for block in unet.up_blocks for each in block.resnets][::-1]
    assert len(resnets) == BRANCHES[name]
    widths, layers = unet.config.block_out_channels, unet.config.layers_per_block
    blocks = zip(widths, [layers] * len(widths) if isinstance(layers, int) else layers, strict=True)
    skips = [widths[0], *(width for width, count in blocks for _ in range(count + 1))]  # a downsampler's is the last
    inputs, entered = inputs_of(unet), dict[int, Tensor]()
    hooks = [
        each.register_forward_pre_hook(lambda _, given, number=number: entered.update({number: given[0]}))
        for number, each in enumerate(resnets)
    ]
    stock(unet, *inputs)
    for hook in hooks:
        hook.remove()
    for branch in range(BRANCHES[name]):
        _, features = forward(unet, *inputs, branch)
        assert torch.equal(features, entered[branch][:, : features.shape[1]])
        assert entered[branch].shape[1] - features.shape[1] == skips[branch]


@torch.no_grad()
def test_features_of_the_same_step_change_nothing_and_those_of_another_do(name: str, unet: Any) -> None:
    latents, timesteps, conditions = inputs_of(unet)
    expected = stock(unet, latents, timesteps, conditions)
    for branch in range(BRANCHES[name]):
        _, features = forward(unet, latents, timesteps, conditions, branch)
        output, returned = forward(unet, latents, timesteps, conditions, branch, features)
        assert torch.equal(output, expected)
        assert returned is features
        _, earlier = forward(unet, latents + 0.1, timesteps + 10, conditions, branch)
        output, _ = forward(unet, latents, timesteps, conditions, branch, earlier)
        assert (output - expected).abs().max() > 1e-6


@torch.no_grad()
def test_a_cached_step_calls_nothing_below_its_branch(name: str, unet: Any) -> None:
    inputs = inputs_of(unet)
    whole = calls(unet, lambda: stock(unet, *inputs))
    before: set[str] = set()
    for branch in range(BRANCHES[name]):
        _, features = forward(unet, *inputs, branch)
        called = calls(unet, partial(forward, unet, *inputs, branch, features))
        assert all(whole[each] == rows for each, rows in called.items())
        assert not any(each.startswith("mid_block") for each in called)
        ups = {".".join(each.split(".")[:4]) for each in called if each.startswith("up_blocks") and ".resnets." in each}
        assert len(ups) == branch + 1
        # Skips after that of conv_in are of a resnet, which has one conv2, or of a downsampler.
        downs = [
            each for each in called if each == "conv_in" or ("down" in each and each.endswith(("conv2", "0.conv")))
        ]
        assert len(downs) == branch + 1
        assert before < set(called)
        before = set(called)
    assert before == {each for each in whole if not each.startswith("mid_block")}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_stock_network(name: str, checkpointing: bool) -> None:
    """Of a full step, and through the features of a cached one; checkpointed resnets are computed a second time."""
    unet = build(name)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    inputs = inputs_of(unet)

    def gradients(output: Tensor) -> dict[str, Tensor]:
        unet.zero_grad()
        output.square().sum().backward()
        return {each: held.grad.clone() for each, held in unet.named_parameters() if held.grad is not None}

    expected = gradients(stock(unet, *inputs))
    found = gradients(forward(unet, *inputs, 2)[0])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[each], held) for each, held in expected.items())
    _, features = forward(unet, *inputs, 2)
    through = gradients(forward(unet, *inputs, 2, features)[0])
    assert through.keys() == expected.keys()
    for each, held in expected.items():  # conv_in and the like add two parts, in another order
        torch.testing.assert_close(through[each], held, rtol=1e-4, atol=1e-4 * float(held.abs().max()))
    counted = calls(unet, lambda: forward(unet, *inputs)[0].sum().backward())
    assert counted["up_blocks.0.resnets.0.conv1"] == (6 if checkpointing else 3)


@torch.no_grad()
def test_guided_halves_are_the_doubled_batch(name: str, unet: Any) -> None:
    latents, timesteps, given = inputs_of(unet)
    empty = conditions_of(unet, 1, seed=1)
    both = {key: torch.cat([empty[key].expand_as(each), each]) for key, each in given.items()}
    doubled = latents.repeat(2, 1, 1, 1), timesteps.repeat(2), both
    expected = stock(unet, *doubled)
    output, _ = guided_halves(unet, latents, timesteps, empty, given)
    assert output.shape == (6, 4, 16, 16)
    assert (output - expected).abs().max() < 1e-5
    prompts_matter = name != "no attention"
    assert ((output[:3] - output[3:]).abs().max() > 1e-4) == prompts_matter
    for branch in (0, 2, BRANCHES[name] - 1):
        _, features = guided_halves(unet, latents, timesteps, empty, given, branch)
        _, earlier = guided_halves(unet, latents + 0.1, timesteps + 10, empty, given, branch)
        assert len(features) == 6
        output, _ = guided_halves(unet, latents, timesteps, empty, given, branch, earlier)
        cached, _ = forward(unet, *doubled, branch, earlier)
        assert (output - cached).abs().max() < 1e-5
        assert (output - expected).abs().max() > 1e-6


SHARED = {
    "sd15": {"conv_in", "time_embedding.linear_1", "down_blocks.0.resnets.0.conv2"},
    "xl": {"conv_in", "time_embedding.linear_1"},
    "no middle": {
        "down_blocks.0.resnets.1.conv2",
        "down_blocks.0.downsamplers.0.conv",
        "down_blocks.1.resnets.1.conv2",
    },
}
DOUBLED = {
    "sd15": {"down_blocks.0.attentions.0.proj_in", "down_blocks.0.resnets.1.conv1", "conv_out"},
    "xl": {"add_embedding.linear_1", "down_blocks.0.resnets.0.conv1", "conv_out"},
    "no middle": {"up_blocks.1.attentions.0.proj_in", "conv_out"},
}


@pytest.mark.parametrize("name", SHARED, indirect=True)
@torch.no_grad()
def test_guidance_computes_once_what_comes_before_the_prompt(name: str, unet: Any) -> None:
    latents, timesteps, given = inputs_of(unet)
    empty = conditions_of(unet, 1, seed=1)
    rows = calls(unet, lambda: guided_halves(unet, latents, timesteps, empty, given))
    assert {rows[each] for each in SHARED[name]} == {3}
    assert {rows[each] for each in DOUBLED[name]} == {6}


@torch.no_grad()
def test_rows_that_do_not_fit_are_refused(digits: DiffusionPolicy) -> None:
    latents, timesteps = torch.randn(2, *digits.family.latent_shape), torch.tensor([900, 20])
    conditions = digits.embed([None, None])
    _, features = forward(digits.network, latents, timesteps, conditions)
    with pytest.raises(ValueError, match="2 latents cannot have conditions of 3 rows"):
        forward(digits.network, latents, timesteps, digits.embed([None] * 3))
    with pytest.raises(ValueError, match="conditions of 2 rows, and features of 1"):
        forward(digits.network, latents, timesteps, conditions, 0, features[:1])


@pytest.mark.parametrize(("branch", "share"), [(0, 0.1658), (1, 0.4174), (2, 0.6293)])
def test_multiply_adds_of_a_cached_step(digits: DiffusionPolicy, branch: int, share: float) -> None:
    latents, conditions = torch.zeros(2, *digits.family.latent_shape), digits.embed([None, None])
    full, cached = multiply_adds(digits.network, latents, conditions, branch)
    assert cached / full == pytest.approx(share, abs=0.0001)
    assert full == 2 * multiply_adds(digits.network, latents[:1], digits.embed([None]), branch)[0]
    assert not any(each._forward_hooks for each in digits.network.modules())


def test_known_networks_pass_the_check(name: str, unet: Any, digits: DiffusionPolicy) -> None:
    config = {**unet.config, "_class_name": "UNet2DConditionModel"}
    check(config, BRANCHES[name] - 1)
    with pytest.raises(ValueError, match=f"has up-resnets 0 to {BRANCHES[name] - 1}"):
        check(config, BRANCHES[name])
    check({"_class_name": "UNet2DConditionModel"}, 11)  # by the class's defaults
    with pytest.raises(ValueError, match="branch -1"):
        check(config, -1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "features of a UNet2DModel cannot be cached"),
        ({"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "down_block_types 'AttnDownBlock2D' is not supp"),
        (
            {"up_block_types": ["SimpleCrossAttnUpBlock2D"]},
            "up_block_types 'SimpleCrossAttnUpBlock2D' is not supported",
        ),
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep' is not supported"),
        ({"num_class_embeds": 10}, "num_class_embeds 10 is not supported"),
        ({"encoder_hid_dim": 8}, "encoder_hid_dim 8 is not supported"),
        ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type 'text_proj' is not supported"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim 256 is not supported"),
        ({"center_input_sample": True}, "center_input_sample True is not supported"),
        ({"dual_cross_attention": True}, "dual_cross_attention True is not supported"),
        ({"attention_type": "gated"}, "attention_type 'gated' is not supported"),
        ({"addition_embed_type": "image"}, "addition_embed_type 'image' is not supported"),
    ],
)
def test_other_networks_are_refused(digits: DiffusionPolicy, changed: dict[str, Any], message: str) -> None:
    config = {**digits.network.config, "_class_name": "UNet2DConditionModel"}
    check(config, 3)
    with pytest.raises(ValueError, match=message):
        check(config | changed, 0)


def test_the_check_needs_no_torch() -> None:
    asked = "import sys, pipelines.denoisers.deep_cache; print({'torch', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
