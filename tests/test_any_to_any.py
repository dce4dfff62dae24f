"""Tones as sounds; conditions and contrast; layers on frozen UNets; the study of images and tones, in short."""

import io
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from orchestration.experiments.any_to_any import AnyToAny
from pipelines.data.digits import DIGITS, INKS
from pipelines.data.tones import (
    CLEAR,
    KEYS,
    RATE,
    SAMPLES,
    amplitudes,
    decode,
    folded,
    leveled,
    play,
    shown,
    sound,
    spectrogram,
    tones,
    unfolded,
    wav,
)
from pipelines.joint_attention import Encoder, Environment, Joint
from pipelines.storage.atomic import Files, unpacked
from pipelines.studies import products
from pipelines.studies.any_to_any import align, convert, draw_together, join, learn_tones
from policies.any_to_any import agreement_by_chance, contrast, mixed, unit


def test_every_tone_is_heard_as_what_it_is_and_no_two_are_alike() -> None:
    known = tones(3, 5)
    heard = decode(known.spectrograms)
    assert (heard.digits == known.digits).all()
    assert (heard.inks == known.inks).all()
    assert np.mean(heard.likeness >= CLEAR) > 0.98
    assert known.spectrograms.min() >= -1
    assert known.spectrograms.max() <= 1
    apart = np.abs(known.spectrograms[0::3] - known.spectrograms[1::3]).mean(axis=(1, 2))
    assert apart.min() > 0.001
    assert np.array_equal(known.spectrograms, tones(3, 5).spectrograms)
    assert not np.array_equal(known.spectrograms, tones(3, 6).spectrograms)


def test_a_sound_of_a_spectrogram_is_heard_as_the_same() -> None:
    known = tones(1, 2)
    again = decode(spectrogram(sound(known.spectrograms)))
    assert (again.digits == known.digits).all()
    assert (again.inks == known.inks).all()


def test_a_sine_wave_is_in_its_row_as_loud_as_it_is() -> None:
    """Of the A above middle C at half the full scale: row 9, −6 dB; nothing an octave up, nothing in silence."""
    time = np.arange(SAMPLES) / RATE
    rows = amplitudes(spectrogram(0.5 * np.sin(2 * np.pi * 440 * time)[None]))[0]
    assert rows[:, 2:6].argmax(axis=0).tolist() == [9] * 4
    assert np.allclose(rows[9, 2:6], 0.5, rtol=0.02)
    assert rows[21].max() < 0.01
    assert (spectrogram(np.zeros((1, SAMPLES))) == -1).all()


def test_the_fundamental_of_what_is_played_is_its_key() -> None:
    """By the largest line of a Fourier transform, which nothing here computes with."""
    digits = np.arange(len(DIGITS))
    played = play(digits, np.zeros(len(digits), int), np.random.default_rng(0))
    lines = np.abs(np.fft.rfft(played)).argmax(axis=1) * RATE / SAMPLES
    assert np.allclose(12 * np.log2(lines / 261.6256), KEYS, atol=0.25)


def test_levels_are_decibels_and_folding_is_undone() -> None:
    assert leveled(np.array([1.0, 10**-1.2, 10**-2.4, 0.0])) == pytest.approx([1, 0, -1, -1])
    given = np.array([0.01, 0.1, 1.0])
    assert amplitudes(leveled(given)) == pytest.approx(given, rel=1e-5)
    known = tones(1, 2).spectrograms
    assert folded(known).shape == (60, 8, 12, 4)
    assert np.allclose(unfolded(folded(known)), known, atol=1e-6)
    assert np.array_equal(folded(known)[0, :2, 0, 0], folded(known)[0].reshape(4, 2, 12, 4)[0, :, 0, 0])


def test_what_is_no_tone_is_not_clear() -> None:
    noise = np.random.default_rng(0).uniform(-1, 0.5, (50, 48, 8))
    assert decode(noise).likeness.max() < CLEAR
    time = np.arange(SAMPLES) / RATE
    chord = sum(0.2 * np.sin(2 * np.pi * 261.6256 * 2 ** (key / 12) * time) for key in KEYS[:2])
    assert decode(spectrogram(np.asarray(chord)[None])).likeness[0] < CLEAR  # two digits at once
    assert decode(np.full((1, 48, 8), -1.0)).likeness[0] == 0


def test_a_wav_file_holds_the_sounds_and_pauses() -> None:
    played = sound(tones(1, 2).spectrograms[:2])
    with wave.open(io.BytesIO(wav(played, pause=0.1))) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, RATE)
        values = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
    assert len(values) == 2 * (SAMPLES + RATE // 10)
    assert np.allclose(values[:SAMPLES], np.clip(played[0], -1, 1), atol=1e-4)
    assert not values[SAMPLES : SAMPLES + RATE // 10].any()


def test_a_picture_has_low_tones_at_the_bottom() -> None:
    quiet = np.full((1, 48, 8), -1.0)
    quiet[0, 0, 3] = 1
    picture = shown(quiet)
    assert picture.shape == (1, 48, 16, 3)
    assert picture[0, -1, 6].sum() > 2 * picture[0, 0, 6].sum()


def test_conditions_are_mixed_by_weights() -> None:
    one, other = torch.zeros(2, 3), torch.ones(2, 3)
    assert torch.allclose(mixed([(one, 1.0), (other, 3.0)]), torch.full((2, 3), 0.75))
    assert torch.equal(mixed([(other, 2.0)]), other)
    for weights in ((0.0, 0.0), (2.0, -1.0)):
        with pytest.raises(ValueError, match="at least 0, and not all 0"):
            mixed([*zip((one, other), weights, strict=True)])


def test_contrast_is_the_cross_entropy_of_pairs_both_ways() -> None:
    random = torch.Generator().manual_seed(0)
    ones, others = (torch.randn((4, 3, 2), generator=random) for _ in range(2))
    cosines = np.array([[torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) for b in others] for a in ones])
    scores = np.exp(cosines / 0.2)
    there, back = -np.log(np.diag(scores / scores.sum(1)[:, None])), -np.log(np.diag(scores / scores.sum(0)))
    found = contrast(ones, others, torch.arange(4), 0.2)
    assert found.item() == pytest.approx((there.mean() + back.mean()) / 2, rel=1e-4)


def test_pairs_are_told_apart_within_their_group() -> None:
    random = torch.Generator().manual_seed(0)
    ones, others = (torch.randn((6, 4), generator=random) for _ in range(2))
    kinds = torch.tensor([0, 1, 0, 2, 2, 1])
    parts = [contrast(ones[part], others[part], kinds[part], 0.3) for part in (slice(0, 3), slice(3, 6))]
    assert torch.allclose(contrast(ones, others, kinds, 0.3, group=3), torch.stack(parts).mean())


def test_pairs_of_a_kind_are_no_negatives_of_one_another() -> None:
    """Where all are alike and of one kind, nothing can be told apart, and nothing pulls."""
    ones = torch.randn((4, 5), generator=torch.Generator().manual_seed(1)).requires_grad_()
    others = torch.ones(4, 5)
    alike = contrast(ones, others, torch.zeros(4, dtype=torch.long), 0.1)
    twins = contrast(others, others, torch.zeros(4, dtype=torch.long), 0.1)
    assert twins.item() == pytest.approx(np.log(4), rel=1e-5)
    assert alike.item() >= np.log(4) - 1e-5
    assert contrast(others, others, torch.arange(4), 0.1).item() == pytest.approx(np.log(4), rel=1e-5)
    assert torch.allclose(unit(ones).norm(dim=1), torch.ones(4))


def test_agreement_by_chance_is_that_of_all_pairs() -> None:
    ones, others = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1])
    pairs = [bool(a == b) for a in ones for b in others]
    assert agreement_by_chance(ones, others, 3) == pytest.approx(np.mean(pairs))


def network(channels: int) -> UNet2DConditionModel:
    torch.manual_seed(channels)
    made = UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    return made.eval().requires_grad_(False)


def test_joint_attention_begins_with_nothing_and_comes_to_hear_the_other_stream() -> None:
    """A stream's answer is the frozen UNet's at first; after an update it depends on the token that it is given, and
    the UNet is what it was."""
    networks = {"image": network(4), "tone": network(3)}
    joint, random = (
        Joint(networks, {"image": (4, 8, 8), "tone": (3, 8, 8), "text": (5,)}, 6),
        torch.Generator().manual_seed(0),
    )
    noisy, states = torch.randn((2, 4, 8, 8), generator=random), torch.randn((2, 3, 6), generator=random)
    times, tokens = torch.tensor([5, 900]), unit(torch.randn((2, 1, 6), generator=random))
    plain = networks["image"](noisy, times, states).sample
    assert torch.allclose(joint("image", noisy, times, states, tokens), plain, atol=1e-6)
    before = {name: each.clone() for name, each in networks["image"].state_dict().items()}
    optimizer = torch.optim.AdamW(joint.parameters(), lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        (joint("image", noisy, times, states, tokens) - noisy).square().mean().backward()
        optimizer.step()
    changed = joint("image", noisy, times, states, tokens)
    assert not torch.allclose(changed, plain, atol=1e-3)
    assert not torch.allclose(changed, joint("image", noisy, times, states, -tokens), atol=1e-4)
    assert torch.equal(networks["image"](noisy, times, states).sample, plain)  # its hooks are gone
    assert all(torch.equal(each, before[name]) for name, each in networks["image"].state_dict().items())
    assert not any("conv_in" in name for name in joint.state_dict())  # and no weight of it is among these


def test_environments_and_encoders_have_the_shape_and_length_of_what_they_stand_for() -> None:
    times, random = torch.tensor([3, 700]), torch.Generator().manual_seed(0)
    for shape in ((4, 6, 5), (4,)):
        given = torch.randn((2, *shape), generator=random)
        seen = Environment(shape, 16)
        assert seen(given, times).shape == (2, 1, 16)
        assert torch.allclose(seen(given, times).norm(dim=2), torch.ones(2, 1))
        assert not torch.allclose(seen(given, times), seen(given, times.flip(0)))
    states = torch.randn((7, 4, 6), generator=random)
    found = Encoder((3, 9, 7), states)(torch.randn((2, 3, 9, 7), generator=random))
    apart = (states - states.mean(dim=0)).flatten(1).norm(dim=1).mean()
    assert torch.allclose((found - states.mean(dim=0)).flatten(1).norm(dim=1), apart.expand(2))


SHORT: dict[str, Any] = {name: {"steps": 2, "batch": 16} for name in ("tones", "encoders", "meeting", "joint")}
SHORT |= {"steps": 2, "images": 64, "each": 2, "count": 8}


@pytest.fixture(scope="module")
def heard() -> Files:
    return learn_tones(AnyToAny(**SHORT).tasks("paired", 0)[1].parameters, [], "cpu")


def numbers(files: Files) -> dict[str, float]:
    found: dict[str, float] = json.loads(files["metrics.json"])
    return found


def test_the_tone_model_is_one_that_stock_diffusers_loads(heard: Files) -> None:
    model = unpacked(products(heard)["tones"], UNet2DConditionModel.from_pretrained)
    drawn: Tensor = model(torch.zeros(1, 8, 12, 4), 5, torch.zeros(1, 16, 64)).sample
    assert drawn.shape == (1, 8, 12, 4)
    assert drawn.isfinite().all()


def test_the_study_in_short(heard: Files) -> None:
    """Its tasks, by themselves: equal repeats, and arms that differ where they should."""
    study = AnyToAny(**SHORT)
    study.preflight()
    found: dict[str, Files] = {}
    learned: dict[str, Files] = {}
    for arm in study.arms:
        together = study.tasks(arm, 0)[0]
        inputs = [heard]
        if arm != "independent":
            known = learned.get(together.inputs[1].key) or join(together.inputs[1].parameters, [heard], "cpu")
            learned[together.inputs[1].key] = known
            inputs.append(known)
            if arm == "paired":
                assert known == join(together.inputs[1].parameters, [heard], "cpu")
        found[arm] = draw_together(together.parameters, inputs, "cpu")
    assert len(learned) == 3
    assert len({files["sounds/pairs.wav"] for files in found.values()}) == len(study.arms)
    for files in found.values():
        assert files["figures/pairs.png"][:4] == b"\x89PNG"
        values = numbers(files)
        assert values.keys() >= {"agreement", "agreement_ink", "by_chance", "valid/image", "told_tone"}
        assert all(0 <= each <= 1 for each in values.values())


def test_conversions_in_short(heard: Files) -> None:
    study = AnyToAny(**SHORT)
    of_texts, of_others = (study.tasks(arm, 0)[1] for arm in ("unpaired", "shuffled"))
    made = [align(each.inputs[1].parameters, [], "cpu") for each in (of_texts, of_others)]
    assert made[0].keys() == {"image.safetensors", "tone.safetensors"}
    assert made[0] != made[1]
    values = numbers(convert(of_texts.parameters, [heard, made[0]], "cpu"))
    assert values.keys() >= {"tone_to_image", "image_to_tone", "image_and_text_to_tone", "other_text_to_tone"}


def test_arms_share_what_is_the_same_in_all() -> None:
    study = AnyToAny()
    together = {arm: study.tasks(arm, 0)[0] for arm in study.arms}
    assert len({each.key for each in together.values()}) == len(study.arms)
    assert len({each.inputs[0].key for each in together.values()}) == 1  # one tone model
    assert len(together["independent"].inputs) == 1
    metrics = {each.metric for each in study.claimed()}
    assert metrics >= {"agreement", "tone_to_image", "image_to_tone", "image_and_text_to_tone"}
    assert {each.arm for each in AnyToAny(arms=("paired",)).claimed()} == {"paired"}
    assert len(INKS) * len(DIGITS) == 60


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"joint": {"steps": 2, "batch": 20}}, "joint.batch: 20 is no multiple of 16"),
        ({"path": "models/digits/pipeline"}, "does not draw 8 × 8 latents"),
        ({"path": "models/digits"}, "path: .* has no model_index.json"),
        ({"path": "nowhere"}, "path: there is no directory"),
        ({"evaluator": "models/digits/captioner"}, "no directory of an evaluator"),
    ],
)
def test_what_cannot_be_studied_is_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        AnyToAny(**changes).preflight()
    assert "\n" not in str(caught.value)


def test_the_configuration_is_the_study(tmp_path: Path) -> None:
    from orchestration.experiments.study.config import find_study

    assert find_study("any_to_any") is AnyToAny
