"""The digit world: captions and slots determine each other, colours are right, and no split sees another's
digits."""

import numpy as np

from pipelines.data.digits import (
    CHOICES,
    DIGITS,
    GROUNDS,
    INKS,
    SPLIT_SIZES,
    all_prompts,
    caption,
    load_split,
    parse,
    render,
    split_indices,
    tint,
)


def test_every_prompt_is_parsed_back_to_its_slots() -> None:
    prompts = all_prompts()
    assert len(set(prompts)) == len(prompts) == 180
    for prompt in prompts:
        slots = parse(prompt)
        assert caption(slots["digit"], slots["ink"], slots["ground"]) == prompt


def test_captions_use_the_right_article() -> None:
    assert caption("seven", "red", "black") == "a red seven on a black background"
    assert caption("two", "orange", "gray") == "an orange two on a gray background"


def test_a_missing_slot_is_none_and_case_does_not_matter() -> None:
    assert parse("A Red thing") == {"digit": None, "ink": "red", "ground": None}
    assert parse("someone blackened it") == {"digit": None, "ink": None, "ground": None}


def test_splits_are_disjoint_complete_and_hold_every_digit_alike() -> None:
    indices = split_indices()
    assert {name: len(chosen) for name, chosen in indices.items()} == SPLIT_SIZES
    assert np.array_equal(np.sort(np.concatenate(list(indices.values()))), np.arange(1797))
    for name, size in SPLIT_SIZES.items():
        shares = np.bincount(load_split(name).labels, minlength=10) / size
        assert np.all(np.abs(shares - 0.1) < 0.01)


def test_no_picture_of_one_split_is_repeated_in_another() -> None:
    pictures = {name: {strokes.tobytes() for strokes in load_split(name).strokes} for name in SPLIT_SIZES}
    assert not pictures["train"] & pictures["evaluator"]
    assert not pictures["test"] & (pictures["train"] | pictures["evaluator"])


def test_tint_paints_ink_on_ground() -> None:
    strokes = np.zeros((1, 2, 2), dtype=np.float32)
    strokes[0, 0, 0] = 1.0
    image = tint(strokes, ["blue"], ["white"])
    assert image.dtype == np.uint8
    assert tuple(image[0, 0, 0]) == INKS["blue"]
    assert tuple(image[0, 1, 1]) == GROUNDS["white"]


def test_every_ink_can_be_told_from_every_ground_and_ink() -> None:
    colours = [np.array(colour, dtype=float) for colour in (*INKS.values(), *GROUNDS.values())]
    distances = [np.linalg.norm(a - b) for i, a in enumerate(colours) for b in colours[:i]]
    assert min(distances) > 80


def test_render_says_what_it_drew_and_repeats_itself() -> None:
    digits = load_split("test")
    images, captions = render(digits, np.random.default_rng(3))
    again, captions_again = render(digits, np.random.default_rng(3))
    assert images.shape == (297, 16, 16, 3)
    assert np.array_equal(images, again)
    assert captions == captions_again
    assert [parse(text)["digit"] for text in captions] == [DIGITS[label] for label in digits.labels]
    corners = images[:, 0, 0].tolist()
    expected = [GROUNDS[parse(text)["ground"]] for text in captions]
    assert np.mean([tuple(a) == b for a, b in zip(corners, expected, strict=True)]) > 0.95
    assert {parse(text)["ink"] for text in captions} == set(CHOICES["ink"])
