"""GigaGAN: kernels that samples mix, attention, pairs that do not match, the family in a loop, the study."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from orchestration.experiments.mad.config import MadConfig
from orchestration.experiments.mad.loop import run_mad, unroll
from orchestration.experiments.mad.preflight import preflight_mad
from orchestration.experiments.text_gan import TextGan
from orchestration.runs.config import ConfigError, load_config
from pipelines.data.digits import captioned
from pipelines.data.real_data import DataSettings, load_real_data
from pipelines.generators.gigagan import TYPICAL_DRAWS, GigaGan, GigaGanSettings
from pipelines.gigagan_networks import halved
from pipelines.gigagan_training import drawing_loss
from pipelines.storage.atomic import packed, unpacked
from pipelines.storage.tasks import in_order
from pipelines.studies import perform
from policies.gigagan import (
    ahead,
    alikeness,
    confusable,
    distance_attention,
    inverse_norms,
    mismatched,
    modulated_convolution,
    slope,
)
from policies.loops.samples import Samples

TINY = GigaGanSettings(width=2, steps=3)


@pytest.fixture(scope="module")
def data() -> Samples:
    images, _, captions = captioned(1)
    return Samples(images[None, :12], captions=np.array(captions[:12])[None])


@pytest.fixture(scope="module")
def model(data: Samples) -> GigaGan:
    return GigaGan.fit(TINY, data, [0])


def parameters(model: GigaGan, part: str = "") -> Tensor:
    return torch.cat([each.flatten() for name, each in model.networks.named_parameters() if part in name])


@pytest.mark.parametrize("filters", [1, 3])
def test_a_bank_is_each_samples_own_kernel(filters: int) -> None:
    x, bank = torch.randn(5, 4, 6, 7, dtype=torch.float64), torch.randn(3, filters, 4, 3, 3, dtype=torch.float64)
    mixture, scale = torch.randn(5, filters, dtype=torch.float64).softmax(dim=1), torch.rand(5, 4, dtype=torch.float64)
    found = modulated_convolution(x, bank, mixture, scale)
    for sample in range(5):
        kernel = sum(mixture[sample, f] * bank[:, f] for f in range(filters)) * scale[sample][:, None, None]
        assert isinstance(kernel, Tensor)
        kernel = kernel / kernel.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
        expected = conv2d(x[sample][None], kernel, padding=1)[0]
        torch.testing.assert_close(found[sample], expected)
    plain = modulated_convolution(x, bank, mixture, scale, demodulate=False)
    norms = inverse_norms(bank, mixture, scale)
    torch.testing.assert_close(plain * norms[:, :, None, None], found)


def test_demodulation_keeps_the_variance() -> None:
    x, bank = torch.randn(400, 8, 5, 5), torch.randn(6, 2, 8, 3, 3)
    mixture, scale = torch.randn(400, 2).softmax(dim=1), 10 * torch.rand(400, 8)
    inner = modulated_convolution(x, bank, mixture, scale)[:, :, 1:-1, 1:-1]
    assert inner.var(dim=(0, 2, 3)).sub(1).abs().max() < 0.15
    raw = modulated_convolution(x, bank, mixture, scale, demodulate=False)
    assert raw.var() > 50


def test_attention_is_by_distance() -> None:
    queries, keys, values = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 6)
    weights = (-torch.cdist(queries, keys).square() / 2).softmax(dim=-1)
    torch.testing.assert_close(distance_attention(queries, keys, values), weights @ values)
    same = distance_attention(keys, keys, torch.eye(5).expand(2, 5, 5))
    assert bool((same.argmax(dim=-1) == torch.arange(5)).all())  # nothing is nearer than oneself


@pytest.mark.parametrize(
    "captions", [[0, 1, 2, 3], [0, 0, 1, 1, 2], [0, 0, 0, 1, 2, 3], [5, 0, 5, 5, 5, 1], [1, 0, 1, 0], [3, 3]]
)
def test_no_caption_is_held_against_itself(captions: list[int]) -> None:
    random, own = torch.Generator().manual_seed(0), torch.tensor(captions)
    seen = Counter[int]()
    for _ in range(200):
        other = mismatched(own, random)
        if len(set(captions)) > 1:
            assert bool((own[other] != own).all())
        if max(Counter(captions).values()) * 2 <= len(captions):
            assert sorted(other.tolist()) == [*range(len(captions))]  # a rotation: each is asked for once
        seen[int(own[other[0]])] += 1
    assert len(seen) == max(1, len(set(captions)) - 1)  # and any other may be the one


def test_the_nearest_of_some_captions_is_held_against_an_image() -> None:
    own, random = torch.arange(6), torch.Generator().manual_seed(0)
    places = torch.tensor([0.0, 1, 10, 11, 20, 21])[:, None]
    assert confusable(own, places, 60, random).tolist() == [1, 0, 3, 2, 5, 4]
    distances = [
        (places[confusable(own, places, tries, random)] - places).abs().mean() for _ in range(50) for tries in (1, 4)
    ]
    assert np.mean(distances[1::2]) < np.mean(distances[::2]) / 2
    same = torch.tensor([0, 0, 1])
    assert confusable(same, torch.tensor([[0.0], [0.0], [5.0]]), 20, random)[:2].tolist() == [2, 2]


def test_losses_by_hand() -> None:
    one, two = torch.tensor([[2.0], [0.0]]), torch.tensor([[-1.0], [1.0]])
    single = (np.log1p(np.exp(-3)) + np.log1p(np.exp(1))) / 2
    assert ahead([one], [two]).item() == pytest.approx(single)
    assert ahead([one, two], [two, two]).item() == pytest.approx(single + np.log(2))
    images = [torch.tensor([[1.0, 2.0], [0.0, 1.0]], requires_grad=True), torch.ones(2, 1, requires_grad=True)]
    scores = [images[0].pow(2).sum(dim=1) + 3 * images[1][:, 0]]
    assert slope(scores, images, 2).item() == pytest.approx((4 + 16 + 4 + 9 + 9) / 2)


def test_pairs_that_do_not_match_reach_both_players(data: Samples, model: GigaGan) -> None:
    """With them the loss of either player, and its gradient, depends on which captions are the others."""
    model = unpacked(packed(model.save), GigaGan.load)
    (stage,) = model.networks
    stage.requires_grad_(True)
    states = model._states([str(each) for each in data.captions[0][:4]])
    z, own = torch.randn(4, TINY.latent), torch.arange(4)
    right = [torch.zeros(2, 4, places) for places in (16, 1)]

    def gradient(shift: int, matching: float) -> tuple[float, Tensor]:
        stage.zero_grad()
        fakes = stage.synthesis(*stage.styles(states, z, own))[0][:-3:-1]
        loss = drawing_loss(stage, fakes, states, own.roll(shift), right, matching)
        loss.backward()
        return loss.item(), torch.cat([each.grad.flatten() for each in stage.synthesis.colours.parameters()])

    (loss, found), (other_loss, other) = gradient(1, 1.0), gradient(2, 1.0)
    assert loss != other_loss
    assert not torch.allclose(found, other, rtol=1e-3)
    (plain, off), (same, off_too) = gradient(1, 0.0), gradient(2, 0.0)
    assert plain == same < loss
    assert torch.equal(off, off_too)
    without = GigaGan.fit(TINY.model_copy(update={"matching": 0.0}), data, [0])
    for part in ("critic", "synthesis"):
        assert not torch.equal(parameters(without, part), parameters(GigaGan.fit(TINY, data, [0]), part))


def test_images_of_a_caption_are_kept_apart(data: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    images, others = torch.zeros(2, 1, 2, 2), torch.full((2, 1, 2, 2), 0.48)
    latents, elsewhere = torch.zeros(2, 3), torch.tensor([[1.0, 1, 1], [0, 0, 3]])
    assert alikeness(images, others, latents, elsewhere).item() == pytest.approx(1 / 0.5)
    assert alikeness(images, images, latents, elsewhere).item() == pytest.approx(1 / 0.02)

    def spread(seeking: float) -> float:
        monkeypatch.setattr("pipelines.gigagan_training.SEEKING", seeking)
        settings = TINY.model_copy(update={"steps": 60})
        drawn = GigaGan.fit(settings, data, [0]).drawn([str(data.captions[0][0])] * 40, 1, 1.0)
        return float(drawn.std(axis=0).mean())

    assert spread(1.0) > 1.5 * spread(0.0)


@pytest.mark.parametrize(("further", "starts"), [(None, [0, 0, 0]), (1, [0, 1, 1])])
def test_further_steps_make_generations_go_on_under_any_rule(further: int | None, starts: list[int]) -> None:
    given = [
        "rule=fresh",
        "n_real=5",
        "n_synthetic=5",
        f"gigagan.further_steps={'null' if further is None else further}",
    ]
    config = load_config(MadConfig, None, [*LOOP, *given, "generations=3", "seeds=1"])
    generations = unroll(config, preflight_mad(config))
    fits = [each.fit for each in generations]
    assert [int(fit.parameters["fine_tunes"]) for fit in fits] == starts
    assert [sum(given.kind == "fit" for given in fit.inputs) for fit in fits] == starts


def test_equal_seeds_give_equal_models_and_images(data: Samples, model: GigaGan) -> None:
    before = torch.get_rng_state()
    again, other = (GigaGan.fit(TINY, data, [seed]) for seed in (0, 1))
    assert packed(again.save) == packed(model.save) != packed(other.save)
    assert np.array_equal(again.sample(9, [3], 0.5).values, model.sample(9, [3], 0.5).values)
    assert not np.array_equal(model.sample(9, [4], 1.0).values, model.sample(9, [3], 1.0).values)
    loaded = unpacked(packed(model.save), GigaGan.load)
    assert np.array_equal(loaded.sample(9, [3], 1.0).values, model.sample(9, [3], 1.0).values)
    assert packed(loaded.save) == packed(model.save)
    assert torch.equal(before, torch.get_rng_state())


def test_it_asks_for_what_it_saw_in_its_shares(data: Samples, model: GigaGan) -> None:
    weights = np.array([1.0] * 6 + [0.0] * 5 + [6.0])
    spoilt = replace(data, values=data.values.copy(), weights=weights)
    light = replace(data, weights=weights)
    spoilt.values[0, 6:11] = 0
    first, second = (GigaGan.fit(TINY, each, [0]) for each in (light, spoilt))
    assert packed(first.save) == packed(second.save) != packed(model.save)
    drawn = first.sample(48, [7], 1.0)
    assert drawn.values.shape == (1, 48, 16, 16, 3)
    assert drawn.captions is not None
    asked = Counter(drawn.captions[0].tolist())
    assert abs(asked[str(data.captions[0, 11])] - 24) <= 2
    candidates = first.candidates(5, 3, [7], 1.0).captions[0].tolist()
    assert candidates == candidates[:5] * 3
    assert len({each.tobytes() for each in first.candidates(1, 3, [7], 1.0).values[0]}) == 3


def test_a_bias_draws_toward_the_mean_of_the_same_caption(model: GigaGan) -> None:
    prompts = [*model.captions][:2] * 3
    (stage,) = model.networks
    free, half, least = (model.styles(6, 1, bias, prompts) for bias in (1.0, 0.5, 1e-9))
    torch.testing.assert_close(half.w, (free.w + least.w) / 2)
    torch.testing.assert_close(least.w[:2], least.w[2:4])
    assert (least.w[0] - least.w[1]).abs().max() > 1e-5
    tried = torch.randn(TYPICAL_DRAWS, TINY.latent, generator=torch.Generator().manual_seed(0))
    first = stage.styles(model._states(prompts[:1]), tried, torch.zeros(TYPICAL_DRAWS, dtype=torch.long))[0]
    torch.testing.assert_close(least.w[0], first.mean(dim=0))
    assert torch.equal(half.conditions["local"], free.conditions["local"])


def test_styles_are_rendered_with_gradients(model: GigaGan) -> None:
    styles = model.styles(3, 0)
    styles.w.requires_grad_()
    images, features = model.render(styles)
    assert images.shape == (3, 3, 16, 16)
    assert [tuple(each.shape[2:]) for each in features] == [(4, 4), (8, 8), (16, 16)]
    features[1].square().sum().backward()
    assert styles.w.grad is not None
    assert styles.w.grad.abs().min(dim=0).values.max() > 0
    with torch.inference_mode():
        prompts = model.prompts(3, 0)
        assert np.array_equal(model.draw(styles), model.drawn(prompts, 0, 1.0))


def test_it_goes_on_from_a_start_for_as_long_as_is_said(data: Samples, model: GigaGan) -> None:
    before = parameters(model).clone()
    slow = TINY.model_copy(update={"learning_rate": 1e-9})
    still, moved = (GigaGan.fit(each, data, [9], start=model) for each in (slow, TINY))
    assert torch.allclose(parameters(still), before, atol=1e-6)
    assert not torch.allclose(parameters(moved, "critic"), parameters(model, "critic"), atol=1e-3)
    short, same = (
        GigaGan.fit(TINY.model_copy(update=each), data, [9], start=model)
        for each in ({"further_steps": 1}, {"steps": 1})
    )
    assert torch.equal(parameters(short), parameters(same))
    assert not torch.equal(parameters(short), parameters(moved))
    assert torch.equal(parameters(model), before)
    led = model.holding({name: 2 * each for name, each in model.fitted().items()})
    assert torch.equal(parameters(led), 2 * before)
    assert led.captions == model.captions


def test_larger_images_and_what_enlarges() -> None:
    real = load_real_data(DataSettings(source="captioned_digits", image_size=32, limit=12))
    small = load_real_data(DataSettings(source="captioned_digits", limit=12))
    assert real.captions is not None
    assert small.captions is not None
    assert real.captions.tolist() == small.captions.tolist()
    again = halved(torch.from_numpy(real.images).permute(0, 3, 1, 2).float()).permute(0, 2, 3, 1).numpy()
    assert np.abs(again - small.images).mean() < 3 < np.abs(again - small.images[::-1]).mean()
    data = Samples(real.images[None], captions=real.captions[None])
    for upsample, sides in ((1, [4, 8, 16, 32]), (2, [4, 8, 16, 32])):
        model = GigaGan.fit(TINY.model_copy(update={"upsample": upsample}), data, [0])
        assert model.sample(3, [0], 0.5).values.shape == (1, 3, 32, 32, 3)
        images, features = model.render(model.styles(2, 0))
        assert [each.shape[-1] for each in features] == sides
        loaded = unpacked(packed(model.save), GigaGan.load)
        assert np.array_equal(loaded.sample(3, [0], 1.0).values, model.sample(3, [0], 1.0).values)
    styles = model.styles(2, 0)
    coarse = model.networks[0].synthesis(styles.w, styles.conditions["local"])[0][-1]
    assert (halved(images) - coarse).abs().mean() < (halved(images) - coarse.flip(0)).abs().mean()


LOOP = [
    "family=gigagan",
    *(f"gigagan.{name}={value}" for name, value in {"width": 2, "steps": 2}.items()),
    "data.source=captioned_digits",
    "data.limit=120",
    "data.reference=30",
    "n_ini=20",
    "generations=2",
]


def test_it_runs_through_loops(tmp_path: Path, tiny_captioner: Path) -> None:
    rules: dict[str, dict[str, Any]] = {
        "iterative_retraining": {"n_real": 5, "n_synthetic": 10, "gigagan": {"further_steps": 1}},
        "curated": {"reward": "tests.rewards:redness", "candidates": 2, "n_real": 5, "n_synthetic": 10},
        "corrected": {"corrector": 3, "correction": 0.5, "n_real": 5, "n_synthetic": 10},
        "neon": {
            "rule": "fully_synthetic",
            "refinement": "neon",
            "neon": {"samples": 10, "updates": 1},
            "sampling_bias": 0.5,
            "captions": {"share": 0.5},
        },
    }
    arms = {f"arms.{name}": json.dumps({"rule": name} | keys) for name, keys in rules.items()}
    more = [f"gigagan.captioner={tiny_captioner}", f"output_dir={tmp_path}/run", "seeds=1"]
    given = [*LOOP, *more, "tracking.system_metrics=false", *(f"{key}={value}" for key, value in arms.items())]
    found = json.loads(run_mad(load_config(MadConfig, None, given)).read_text())
    for name in rules:
        metrics = found["arms"][name]["metrics"]
        assert np.isfinite(metrics["fid"]["values"]).all()
        assert {"prompt_accuracy", "caption_agreement", "recall"} <= metrics.keys()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.source=digits"], "gigagan learns from captions, and the images have none"),
        (["gigagan.path=models/digits/captioner"], "model_index.json"),
        (["gigagan.evaluator=models/digits/captoiner"], "gigagan.evaluator: there is no directory"),
        (["captions.share=0.5", "gigagan.captioner=null"], "need gigagan.captioner, whose words"),
        (["refinement=aligned"], "family gigagan draws in one pass, which has no density"),
        (["refinement=sims"], "family gigagan"),
        (["gigagan.filters=0"], "filters"),
        (["gigagan.upsample=2", "data.image_size=20"], "needs sides that are multiples of 8, not 20×20"),
        (["data.image_size=6"], "needs sides of 8 pixels at least"),
    ],
)
def test_impossible_loops_are_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight_mad(load_config(MadConfig, None, [*LOOP, *overrides]))


DATA = DataSettings(source="captioned_digits", reference=12, limit=40, image_size=16)
SHORT = {"data": DATA, "gigagan": TINY, "enlarging": 2, "steps": 2, "timed": 4}


def test_the_study_judges_every_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.measures.features.UPDATES", 2)
    study = TextGan(**SHORT)
    study.preflight()
    done: dict[str, Any] = {}
    found = {}
    for arm in study.arms:
        tasks = study.tasks(arm, 0)
        for each in in_order(tasks):
            if each.key not in done:
                inputs = [done[given.key] for given in each.inputs]
                done[each.key] = perform(each.kind, each.parameters, inputs, "cpu")
        found[arm] = {}
        for each in tasks:
            found[arm] |= json.loads(done[each.key]["metrics.json"])
        assert done[tasks[-1].key].keys() & {"images/by_prompt.png", "metrics.json"}
    asked = {(claim.metric, arm) for claim in study.claimed() for arm in (claim.arm, claim.control) if arm}
    assert all(metric in found[arm] for metric, arm in asked)
    assert found["full"]["speed/ratio"] > 1
    assert found["upsampled"]["enlarged/fid"] > 0
    fitted = {arm: study.tasks(arm, 0)[0].parameters.get("settings") for arm in study.arms}
    assert fitted["unmatched"] == fitted["full"] | {"matching": 0.0}
    assert fitted["both"] == fitted["full"] | {"matching": 0.3}
    assert fitted["bank"] == fitted["full"] | {"filters": 2}
    assert len(TextGan(**SHORT, arms=("full",)).claimed()) < len(study.claimed())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": {"source": "digits", "image_size": 16}}, "has no captions"),
        ({"data": {"source": "captioned_digits"}}, "data.image_size: give a multiple of 4 pixels, not None"),
        ({"data": {"source": "captioned_digits", "reference": 4000, "image_size": 16}}, "leave none to learn from"),
        ({"gigagan": {"filters": 2}}, "gigagan.filters: leave it at 1"),
        ({"gigagan": {"matching": 0}}, "are arms of their own"),
        ({"gigagan": {"evaluator": "nowhere"}}, "gigagan.evaluator: there is no directory"),
        ({"gigagan": {"path": "models/digits/captioner"}}, "model_index.json"),
    ],
)
def test_what_cannot_be_studied_is_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        TextGan(**changes).preflight()
    assert "\n" not in str(caught.value)
