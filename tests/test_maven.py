"""MAVEN by its losses, as a generator of the loop, as what labels the images that have no label, and as a study."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from orchestration.cluster.ray_cluster import Machine
from orchestration.experiments.few_labels import FewLabels
from orchestration.experiments.mad.config import MadConfig
from orchestration.experiments.mad.loop import run_mad, unroll
from orchestration.experiments.mad.preflight import describe_mad, preflight_mad
from orchestration.runs.config import ConfigError, load_config
from pipelines.data.real_data import DataSettings, RealData, load_real_data, split_reference
from pipelines.generators.maven import Maven, MavenSettings, chosen_labels
from pipelines.mad.graph import image_source
from pipelines.mad.tasks import read_real_data
from pipelines.measures.distances import moments_nearness
from pipelines.refinements.neon import Neon
from pipelines.storage.tasks import TaskStore, in_order
from pipelines.studies.few_labels import learn_features, learn_few, learn_maven
from policies.loops.samples import Samples
from policies.maven import PlainSettings, class_loss, discriminator_loss, divergence, log_fake, log_real, matching_loss

TINY = MavenSettings(width=4, latent=6, steps=4, batch_size=8, discriminators=2)
MACHINE = Machine(cpus=2, gpus=0)


@pytest.fixture(scope="module")
def data() -> Samples:
    random = np.random.default_rng(0)
    labels = np.where(np.arange(20) < 8, np.arange(20) % 3, -1)
    return Samples(random.integers(0, 256, (1, 20, 12, 8, 3), dtype=np.uint8), labels[None])


@pytest.fixture(scope="module")
def fitted(data: Samples) -> Maven:
    return Maven.fit(TINY, data, [0])


def parameters(model: Maven) -> torch.Tensor:
    return torch.cat([values.flatten() for values in model.networks.state_dict().values()])


def test_losses_are_those_of_a_softmax_over_one_class_more_whose_logit_is_0() -> None:
    random = np.random.default_rng(1)
    logits, labels = random.normal(size=(4, 5, 3)) * 3, np.array([0, 2, 1, 1, 0])
    whole = np.exp(np.concatenate([logits, np.zeros((4, 5, 1))], axis=2))
    shares = whole / whole.sum(axis=2, keepdims=True)
    known, real, generated, encoded = map(torch.from_numpy, logits)
    np.testing.assert_allclose(log_fake(known), np.log(shares[0, :, 3]))
    np.testing.assert_allclose(log_real(known), np.log(1 - shares[0, :, 3]))
    classes = -np.log(shares[0, np.arange(5), labels]).mean()
    assert class_loss(known, torch.from_numpy(labels)).item() == pytest.approx(classes)
    expected = classes - np.log(1 - shares[1, :, 3]).mean()
    expected -= 0.8 * np.log(shares[2, :, 3]).mean() + 0.2 * np.log(shares[3, :, 3]).mean()
    found = discriminator_loss(torch.from_numpy(labels), known, real, generated, encoded)
    assert found.item() == pytest.approx(expected)
    assert torch.isfinite(discriminator_loss(torch.from_numpy(labels), *(1e4 * torch.from_numpy(logits)))).all()


def test_means_of_features_are_matched_and_the_kl_is_the_gaussians() -> None:
    a, b = torch.tensor([[0.0, 4.0], [2.0, 0.0]]), torch.tensor([[4.0, 2.0], [0.0, 2.0]])
    assert matching_loss(a, b).item() == pytest.approx((1**2 + 0) / 2)
    mean, log_variance = torch.tensor([[0.5, -1.0]]), torch.tensor([[0.3, -0.7]])
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    exact = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum()
    assert divergence(mean, log_variance).item() == pytest.approx(exact.item())


def test_moments_are_those_of_all_intensities() -> None:
    random = np.random.default_rng(2)
    a, b = random.integers(0, 256, (9, 4, 4, 1), dtype=np.uint8), random.integers(0, 99, (7, 4, 4, 1), dtype=np.uint8)

    def of(images: np.ndarray) -> list[float]:
        counts = np.bincount(images.ravel(), minlength=256) / images.size
        shades = np.arange(256) / 255
        mean = (counts * shades).sum()
        second, third, fourth = ((counts * (shades - mean) ** power).sum() for power in (2, 3, 4))
        return [mean, second, third / second**1.5, fourth / second**2 - 3]

    expected = -sum(w * np.log(abs(x - y)) for w, x, y in zip((0.4, 0.3, 0.2, 0.1), of(a), of(b), strict=True))
    assert moments_nearness(a, b) == pytest.approx(expected)
    assert moments_nearness(a, a) == pytest.approx(-np.log(1e-6))
    assert moments_nearness(a, b) < moments_nearness(a, a)
    assert of(a)[3] == pytest.approx(stats.kurtosis(a.ravel() / 255))
    with pytest.raises(ValueError, match="one shade"):
        moments_nearness(a, np.full_like(a, 7))


def test_labels_are_chosen_evenly_and_those_that_are_none_never() -> None:
    labels = np.repeat([-1, 0, 1, 2], [50, 30, 10, 3])
    rows = chosen_labels(labels, 8, 0)
    assert np.bincount(labels[rows]).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])
    assert np.bincount(labels[chosen_labels(labels, 20, 0)]).tolist() in ([9, 8, 3], [8, 9, 3])
    assert not np.array_equal(rows, chosen_labels(labels, 8, 1))
    assert np.array_equal(chosen_labels(labels, None, 0), np.arange(50, 93))
    assert len(chosen_labels(np.full(4, -1), 2, 0)) == 0


def test_a_class_is_the_mean_of_what_discriminators_say_and_they_differ(data: Samples, fitted: Maven) -> None:
    images, networks = data.values[0], fitted.networks.discriminators
    shown = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    each = [torch.softmax(network(shown), dim=1).detach().numpy() for network in networks]
    assert each[0].shape == (20, 3)  # without the class of what is generated
    np.testing.assert_allclose(fitted.classify(images), np.mean(each, axis=0), atol=1e-5)
    np.testing.assert_allclose(fitted.classify(images).sum(axis=1), 1)
    fresh = Maven.build(TINY, fitted.known, 0).discriminators
    for one, other in (fresh, networks):
        assert not torch.equal(one[0].weight, other[0].weight)
        assert not torch.equal(one[-1].weight, other[-1].weight)


def test_samples_have_its_own_labels_and_equal_seeds_give_equal_bytes(data: Samples, fitted: Maven) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again, other = Maven.fit(TINY, data, [0]), Maven.fit(TINY, data, [1])
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(parameters(fitted), parameters(again))
    assert not torch.equal(parameters(fitted), parameters(other))
    drawn, redrawn = fitted.sample(30, [5], 0.5), again.sample(30, [5], 0.5)
    assert np.array_equal(drawn.values, redrawn.values)
    assert drawn.labels is not None
    assert np.array_equal(drawn.labels[0], fitted.classify(drawn.values[0]).argmax(axis=1))
    assert drawn.values.shape == (1, 30, 12, 8, 3)
    images, maps = fitted.render(fitted.styles(3, 0))
    assert images.shape == (3, 3, 12, 8)
    assert [each.shape[2:] for each in maps] == [(3, 2), (6, 4)]
    random = MavenSettings(**TINY.model_dump() | {"feedback": "random"})
    assert not torch.equal(parameters(Maven.fit(random, data, [0])), parameters(fitted))


def test_a_label_of_minus_1_and_what_weighs_nothing_teach_no_class(data: Samples, fitted: Maven) -> None:
    assert data.labels is not None
    few = TINY.model_copy(update={"labelled": 3})
    all_known = replace(data, labels=np.arange(20)[None] % 3)
    rows = chosen_labels(all_known.labels[0], 3, 0)
    hidden = np.full((1, 20), -1)
    hidden[0, rows] = all_known.labels[0, rows]
    first, second = (parameters(Maven.fit(few, each, [0])) for each in (all_known, replace(data, labels=hidden)))
    assert torch.equal(first, second)
    weights = np.ones(20)
    weights[:8:3] = 0  # all of class 0
    light = Maven.fit(TINY.model_copy(update={"classes": 3}), replace(data, weights=weights), [0])
    gone = data.labels.copy()
    gone[0, :8:3] = -1
    same = Maven.fit(TINY.model_copy(update={"classes": 3}), replace(data, weights=weights, labels=gone), [0])
    assert torch.equal(parameters(light), parameters(same))
    assert not torch.equal(parameters(light), parameters(fitted))
    with pytest.raises(ValueError, match="no image has one"):
        Maven.fit(TINY, replace(data, labels=None), [0])
    with pytest.raises(ValueError, match="label 2 is none of the 2 classes"):
        Maven.fit(TINY.model_copy(update={"classes": 2}), data, [0])


def test_saving_loses_nothing_and_weights_can_be_led_away(data: Samples, fitted: Maven, tmp_path: Path) -> None:
    fitted.save(tmp_path / "first")
    loaded = Maven.load(tmp_path / "first")
    loaded.save(tmp_path / "second")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    tuned, retuned = (Maven.fit(TINY, data, [2], start=each) for each in (fitted, loaded))
    assert torch.equal(parameters(tuned), parameters(retuned))
    same = fitted.holding(fitted.fitted())
    assert np.array_equal(same.sample(5, [1], 1.0).values, fitted.sample(5, [1], 1.0).values)
    away = Neon(weight=0.5, samples=20, updates=2).refine(fitted, TINY, [0], 1.0, "cpu")
    assert not np.array_equal(away.sample(5, [1], 1.0).values, fitted.sample(5, [1], 1.0).values)


def folder(root: Path, given: int) -> RealData:
    """scikit-learn's digits, of which some are in their classes' directories; what they show, for the test alone."""
    digits = load_real_data(DataSettings())
    assert digits.labels is not None
    known = set(chosen_labels(digits.labels, given, 0).tolist())
    for number, (image, label) in enumerate(zip(digits.images, digits.labels.tolist(), strict=True)):
        path = root / (str(label) if number in known else "Unlabelled") / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    return digits


def test_a_directory_called_unlabelled_is_no_class_and_fills_the_reference(tmp_path: Path) -> None:
    folder(tmp_path, 30)
    data = load_real_data(DataSettings(source=str(tmp_path)), partly=True)
    assert data.labels is not None
    assert np.bincount(data.labels[data.labels >= 0]).tolist() == [3] * 10
    assert [*data.classes] == [*map(str, range(10))]
    assert "1,767 without a label" in data.describe()[0]
    pool, reference = split_reference(data, 397)
    assert (data.labels[reference] < 0).all()
    np.testing.assert_array_equal(np.sort(np.concatenate([pool, reference])), np.arange(1797))
    most, reference = split_reference(data, 1787)  # more than have no label
    assert (data.labels[reference] < 0).sum() == 1767
    assert (data.labels[most] >= 0).all()
    with pytest.raises(ValueError, match="1,767 images have no label"):
        load_real_data(DataSettings(source=str(tmp_path)))


def test_what_has_all_labels_keeps_its_tasks_and_a_labeller_is_part_of_the_key() -> None:
    plain, labelled = (
        image_source("0" * 64, 397, 1400, 10),
        image_source("0" * 64, 397, 1400, 10, labeller={"steps": 3}),
    )
    assert plain.data is not None
    assert "labeller" not in plain.described
    assert plain.stored == [plain.data]
    assert [task.key for task in labelled.stored] == [plain.data.key]
    assert labelled.extractor.key != plain.extractor.key  # type: ignore[union-attr]
    again = image_source(**labelled.described)
    assert [task.key for task in again.tasks] == [task.key for task in labelled.tasks]


def config(*overrides: str) -> MadConfig:
    return load_config(MadConfig, None, ["family=maven", "n_ini=60", "n_synthetic=60", "generations=2", *overrides])


def test_labels_of_the_pool_are_completed_before_the_loop_and_right(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = folder(tmp_path / "images", 100)
    arms = "arms={drawn: {maven: {steps: 3}}, checked: {rule: relabelled, maven: {steps: 3}}}"
    run = config(
        f"data.source={tmp_path / 'images'}", "data.reference=100", "maven.steps=300", "maven.discriminators=2", arms,
        "seeds=1", f"output_dir={tmp_path / 'run'}", "tracking.uri=null", "n_real=0",
    )  # fmt: skip
    experiment = preflight_mad(run, MACHINE)
    assert "100 of the former have a label: maven learns from all of them, and gives 1,597 theirs" in describe_mad(
        run, experiment
    )
    summary = json.loads(run_mad(run, figures=False).read_text())
    assert summary["labels"]["given"] == 100
    assert summary["labels"]["pool"] == 1697
    assert "label_accuracy" in summary["arms"]["drawn"]["metrics"]
    source, store = experiment.images, TaskStore(tmp_path / "run" / "tasks")
    assert source is not None
    assert source.data is not None
    real = read_real_data(store.load(source.data.key))
    assert digits.labels is not None
    by_image = {image.tobytes(): label for image, label in zip(digits.images, digits.labels.tolist(), strict=True)}
    true = np.array([by_image[image.tobytes()] for image in real["pool"]])
    assert real["pool_labelled"].sum() == 100
    assert (real["pool_labels"] == true)[real["pool_labelled"]].all()
    assert (real["pool_labels"] == true).mean() >= 0.8
    for generation in unroll(run, experiment):  # nothing reads images whose labels are missing but the labeller
        for task in in_order([generation.measure]):
            assert task.kind == "label" or experiment.images.stored[0] not in task.inputs  # type: ignore[union-attr]


@pytest.mark.parametrize("rule", ["fresh", "accumulate", "verified", "memory"])
def test_every_kind_of_rule_takes_it(rule: str) -> None:
    asked = config(f"rule={rule}", "n_real=30", "maven.steps=2")
    experiment = preflight_mad(asked, MACHINE)
    assert experiment.images is not None
    assert experiment.images.labeller is None
    assert len(unroll(asked, experiment)) == 2 * len(asked.seed_list)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["maven.classes=9"], "maven.classes is 9, the images have 10"),
        (["maven.labelled=9"], "maven.labelled is 9: give one label or more to each of 10 classes"),
        (["maven.discriminators=0"], "maven.discriminators: Input should be greater than or equal to 1"),
        (["maven.feedback=median"], "maven.feedback: Input should be 'mean' or 'random'"),
        (["data.image_size=10"], "family maven needs sides that are multiples of 4, not 10×10"),
    ],
)
def test_bad_settings_are_one_line(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        preflight_mad(config(*overrides), MACHINE)
    assert "\n" not in str(caught.value)


def test_too_few_labels_to_learn_from_are_one_line(tmp_path: Path) -> None:
    folder(tmp_path, 15)
    with pytest.raises(ConfigError, match=r"class . has 1 to learn from: label 2 images or more") as caught:
        preflight_mad(config(f"data.source={tmp_path}"), MACHINE)
    assert "\n" not in str(caught.value)


SHORT = FewLabels(
    data=DataSettings(reference=60, limit=200),
    labelled=(20,),
    maven=MavenSettings(steps=3, width=4, discriminators=2),
    plain=PlainSettings(updates=80, learning_rate=0.02, retraining=5, confidence=0.2),
)


def test_the_study_measures_what_its_claims_ask_for() -> None:
    SHORT.preflight()
    tasks = {arm: SHORT.tasks(arm, 0)[0] for arm in SHORT.arms}
    eye = learn_features(tasks["maven"].inputs[0].parameters, [], "cpu")
    found: dict[str, dict[str, Any]] = {}
    for arm, task in tasks.items():
        do = learn_few if arm in ("supervised", "pseudo") else learn_maven
        found[arm] = json.loads(do(task.parameters, [eye] if task.inputs else [], "cpu")["metrics.json"])
    for claim in SHORT.claimed():
        assert all(claim.metric in found[arm] for arm in (claim.arm, claim.control or claim.arm)), claim
    assert found["pseudo"]["kept/of_20"] > 0
    assert 0 < found["maven"]["disagree/of_20"] <= 1
    assert "disagree/of_20" not in found["one"]
    assert {arm: task.parameters["settings"]["width"] for arm, task in tasks.items()} == {
        arm: 8 if arm == "wide" else 4 for arm in SHORT.arms
    }
    assert {task.parameters["settings"]["labelled"] for task in tasks.values()} == {20}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"labelled": (9,)}, "labelled: give each number once, from 10 to"),
        ({"labelled": (20, 20)}, "labelled: give each number once"),
        ({"maven": MavenSettings(labelled=20)}, "maven.labelled: the study's own"),
        ({"maven": MavenSettings(discriminators=1)}, "give 2 or more"),
        ({"data": DataSettings(image_size=10)}, "sides must be multiples of 4"),
        ({"data": DataSettings(extractor="self_supervised")}, "data.extractor"),
    ],
)
def test_what_cannot_be_studied_is_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        FewLabels(**changes).preflight()
    assert "\n" not in str(caught.value)
