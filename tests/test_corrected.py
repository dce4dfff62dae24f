"""Correctors: what takes the place of a share of synthetic samples, and what a real one is worth beside the ideal."""

from typing import Any

import numpy as np
import pytest

from orchestration.experiments.mad.analysis import laws
from orchestration.experiments.mad.config import ArmSettings, MadConfig
from orchestration.experiments.mad.preflight import preflight_mad
from orchestration.runs.config import ConfigError, load_config
from policies.loops.rules import Drawing
from policies.loops.rules.corrected import Corrected
from policies.loops.samples import Samples
from tests.test_mad_laws import measured


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.8])
def test_anchors_replace_a_share_by_the_nearest_centre_of_real_data(kept: float) -> None:
    """Two real clusters, far from each other: what is corrected comes to lie on their means."""
    rng = np.random.default_rng(0)
    real = np.concatenate([rng.normal(at, 0.1, (1, 50, 2)) for at in (-5, 5)], axis=1)
    drawn = rng.normal(0, 3, (1, 4000, 2))
    selection = {"rule": "corrected", "kept": kept, "corrector": "anchors", "anchors": 2, "real": 100}

    def draw(count: int, first: int = 0) -> Samples:
        return Samples(drawn)

    drawing = Drawing(draw, draw, 4000, [np.random.default_rng(1)], None, real=lambda count: Samples(real))
    found = Corrected.select(selection, drawing).values[0]
    same = (found == drawn[0]).all(axis=1)
    assert abs(same.mean() - kept) < 3 * np.sqrt(kept * (1 - kept) / 4000)
    centres = real.reshape(2, 50, 2).mean(axis=1)
    side = (drawn[0] @ np.ones(2) > 0).astype(int)
    sure = ~same & (np.abs(drawn[0] @ np.ones(2)) > 0.5)
    np.testing.assert_allclose(found[sure], centres[side[sure]], atol=1e-9)


def test_a_real_corrector_is_worth_less_than_the_ideal_one() -> None:
    """Its gap to the exact law of the ideal corrector, which is itself obeyed by the same chain."""
    common: Any = {"family": "gaussian", "dimension": 2, "n_ini": 40, "rule": "corrected", "correction": 0.5}
    common |= {"n_real": 0, "n_synthetic": 40}
    ideal, anchored = (ArmSettings(**common, corrector=corrector) for corrector in ("ideal", 8))
    assert laws(anchored, 5) == {}
    law = laws(ideal, 5)["variance"]
    found, other = (measured(arm, 5, 250)["variance"] for arm in (ideal, anchored))
    error = found[:, -1].std(ddof=1) / np.sqrt(len(found))
    assert abs(found[:, -1].mean() - law[-1]) < 3 * error
    assert other[:, -1].mean() < law[-1] - 6 * error  # centres have less variance than what they stand for


def test_a_classifier_replaces_by_what_it_is_surest_of() -> None:
    images = np.arange(250, dtype=np.uint8).reshape(1, 250, 1, 1, 1)

    class Bright:
        def probabilities(self, images: np.ndarray) -> np.ndarray:
            light = images.reshape(len(images), -1).mean(axis=1) / 255
            return np.stack([light, 1 - light], axis=1)

    def draw(count: int, first: int = 0) -> Samples:
        return Samples(images[:, first : first + count], np.zeros((1, count), np.int64))

    drawing = Drawing(draw, draw, 50, [np.random.default_rng(0)], Bright())
    found = Corrected.select({"rule": "corrected", "kept": 0.5, "corrector": "classifier"}, drawing).values.ravel()
    replaced = found != np.arange(50)
    assert 15 < replaced.sum() < 35
    assert (found[replaced] == np.arange(200, 250)[replaced]).all()  # the brightest of its four
    assert len(found) == 50


def test_of_one_generation_nothing_follows_but_itself() -> None:
    """Its law has no later sizes."""
    probabilities = [0.2, 0.3, 0.5]
    law = Corrected(n_ini=4, n_real=0, n_synthetic=4).categorical_law(1, probabilities)
    np.testing.assert_allclose(law["heterozygosity"], [(1 - 1 / 4) * (1 - np.square(probabilities).sum())])


def test_an_ideally_corrected_loop_may_be_long() -> None:
    """Its variance cannot vanish, as that of the same loop without a corrector does."""
    long = ["n_ini=20", "generations=400", "sampling_bias=0.1", "rule=corrected", "n_real=0", "n_synthetic=20"]
    assert preflight_mad(load_config(MadConfig, None, long)).manifests
    with pytest.raises(ConfigError, match="too small for a number to hold"):
        preflight_mad(load_config(MadConfig, None, [*long, "correction=0"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["corrector=30"], "corrector is 30 centres, of the 20 real samples"),
        (["corrector=5", "family=categorical"], "categories have no centres"),
        (["corrector=classifier"], "corrector classifier needs images with labels"),
        (["family=diffusion"], "draws from the truth, which family diffusion has only data of"),
    ],
)
def test_correctors_that_cannot_be_used_are_refused(overrides: list[str], message: str) -> None:
    corrected = ["rule=corrected", "n_ini=20", "n_real=0", "n_synthetic=20", *overrides]
    with pytest.raises(ConfigError, match=message):
        preflight_mad(load_config(MadConfig, None, corrected))
