"""Adversarial examples: the attack exactly, what the sets hold, the audit of a reward, the study."""

import json
from math import inf
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from orchestration.experiments.adversarial_features import AdversarialFeatures
from orchestration.experiments.study.config import find_study
from pipelines.captioner import Captioner
from pipelines.data.digits import DIGITS, INKS, parse
from pipelines.measures.robustness import classifier, digit_named, learn, network_of
from pipelines.settings import CaptionerSettings
from pipelines.studies.adversarial_features import _crossings, audit, digits, examine, learn_source, make
from policies.adversarial import AttackSettings, LearningSettings, accuracy_under, attack, margin, noised, pgd

SMALL = AdversarialFeatures(
    tints=1,
    eps=1.0,
    curve=(0.0, 3.0),
    robust=(0.5,),
    audited=(0.0, 0.5),
    attack=AttackSettings(steps=3),
    learning=LearningSettings(updates=4, batch=8, attack_steps=2),
    captioner=None,
)


def inner(count: int = 6) -> Tensor:
    """Images far from black and white, so that no box is met."""
    return 0.5 + 0.02 * torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def distances(changed: Tensor, images: Tensor) -> Tensor:
    return (changed - images).flatten(1).norm(dim=1)


def test_descent_finds_the_nearest_point_of_the_ball_and_of_the_box() -> None:
    images, goal = inner(), torch.full((1, 4, 4), 5.0)

    def loss(x: Tensor) -> Tensor:
        return (x - goal).square().flatten(1).sum(dim=1)

    found = pgd(loss, images, 0.3, 40, 0.1)
    towards = goal - images
    exact = images + 0.3 * towards / towards.flatten(1).norm(dim=1)[:, None, None, None]
    assert torch.allclose(found, exact, atol=1e-3)
    assert torch.allclose(pgd(loss, images, inf, 40, 0.5), torch.ones_like(images))  # the box, which is all there is
    assert not found.requires_grad


def test_descent_keeps_the_best_it_met() -> None:
    images = inner()

    def loss(x: Tensor) -> Tensor:
        return (x - images).square().flatten(1).sum(dim=1)

    assert torch.equal(pgd(loss, images, 1.0, 5, 0.4), images)  # already best: every step is for the worse
    start = images + 0.1
    assert (loss(pgd(loss, images, 1.0, 7, 0.3, start)) <= loss(start)).all()
    far = pgd(lambda x: -loss(x + 1e-3), images, 0.25, 9, 0.2, images + 10)
    assert (distances(far, images) <= 0.25 + 1e-6).all()  # where it begins is within the ball, too


def test_accuracy_under_attack_of_a_linear_classifier_is_exact() -> None:
    """An attack moves the margin of two classes by eps |w_y − w_o|, and no attack moves it farther."""
    random = torch.Generator().manual_seed(1)
    weights, images = torch.randn(2, 16, generator=random), inner(400)
    bias = -(weights @ images.flatten(1).mean(dim=0))

    def classify(x: Tensor) -> Tensor:
        return x.flatten(1) @ weights.T + bias

    labels = torch.randint(2, (400,), generator=random)
    lead, gradient = margin(classify(images), labels), (weights[0] - weights[1]).norm()
    eps = [0.0, 0.01, 0.05]
    exact = [(lead > each * gradient).float().mean().item() for each in eps]
    assert accuracy_under(classify, images, labels, eps, AttackSettings()) == pytest.approx(exact)
    assert exact[0] > exact[1] > exact[2]
    moved = attack(classify, images, labels, 0.05, AttackSettings(), towards=True)
    assert torch.allclose(margin(classify(moved), labels), lead + 0.05 * gradient, atol=1e-4)


def test_margin_is_the_lead_over_the_best_other() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.5], [0.0, 4.0, 5.0]])
    assert margin(logits, torch.tensor([0, 1])).tolist() == pytest.approx([0.5, -1.0])


def test_noise_has_the_norm_of_the_attack_even_at_black_and_white() -> None:
    images = digits("test", 1, 0, "cpu")[0]
    moved = noised(images, 1.5, torch.Generator().manual_seed(0))
    assert torch.allclose(distances(moved, images), torch.full((297,), 1.5), atol=1e-3)
    assert moved.min() >= 0
    assert moved.max() <= 1


@pytest.mark.parametrize("kind", ["normalised", "strided"])
def test_networks_learn_and_a_repeat_is_the_same(kind: Any) -> None:
    assert network_of(kind, (1, 8, 12), 3)(torch.zeros(2, 1, 8, 12)).shape == (2, 3)
    images, labels, _ = digits("train", 1, 0, "cpu")
    settings = LearningSettings(updates=60)
    networks = [learn(images, labels, kind, settings, seed) for seed in (0, 0, 1)]
    weights = [torch.cat([each.flatten() for each in network.parameters()]) for network in networks]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert (classifier(networks[0])(images).argmax(dim=1) == labels).float().mean() > 0.6
    assert not any(each.requires_grad for each in networks[0].parameters())


def test_training_against_an_attacker_withstands_him() -> None:
    images, labels = (each[:300] for each in digits("train", 1, 0, "cpu")[:2])
    how = LearningSettings(updates=60, attack_steps=3)
    plain, robust = (learn(images, labels, "normalised", how, 0, eps) for eps in (0.0, 1.0))
    under = [
        accuracy_under(classifier(each), images, labels, [1.0], AttackSettings(steps=8))[0] for each in (plain, robust)
    ]
    assert under[1] > under[0] + 0.2


@pytest.fixture(scope="module")
def network() -> nn.Sequential:
    images, labels, _ = digits("train", 1, 0, "cpu")
    return learn(images, labels, "normalised", LearningSettings(updates=60), 9)


def test_sets_hold_what_they_say(network: nn.Sequential) -> None:
    images, labels, captions = shown = [each[:150] for each in digits("train", 1, 0, "cpu")]
    assert [DIGITS.index(str(parse(text)["digit"])) for text in captions] == labels.tolist()
    given = SMALL.tasks("random", 0)[0].parameters | {"inversion": {"steps": 30, "step": 0.2}}
    made = {
        arm: make({**given, "arm": arm}, network if SMALL.tasks(arm, 0)[0].inputs else None, tuple(shown), 1.0)
        for arm in SMALL.arms
    }
    for arm, (before, changed, label) in made.items():
        assert changed.shape == images.shape, arm
        assert 0 <= changed.min() <= changed.max() <= 1, arm
        kept = {"random": None, "next": (labels + 1) % 10}.get(arm.split("-")[0], labels)
        assert kept is None or torch.equal(label, kept), arm
        far = distances(changed, before)
        if arm in ("random", "next"):
            assert far.max() <= 1.0 + 1e-5
        elif arm.endswith("noise"):
            assert torch.allclose(far, torch.ones_like(far), atol=1e-3)
        elif arm.endswith("features"):
            assert torch.equal(before.flatten(1).sum(dim=1).sort()[0], images.flatten(1).sum(dim=1).sort()[0])
        else:
            assert torch.equal(changed, images), arm
    random = made["random"][2]
    assert all(torch.equal(made[f"random-{how}"][2], random) for how in ("unperturbed", "noise"))
    assert 0.03 < (random == labels).float().mean() < 0.18  # of all classes, the true one among them
    before, changed, _ = made["standard-features"]
    wanted, found, began = (network[:-1](2 * each - 1) for each in (images, changed, before))
    assert (found - wanted).norm() < 0.5 * (began - wanted).norm()


def test_a_crossing_is_where_the_curves_meet() -> None:
    curves = {f"{name}, {kind}": [0.0] * 3 for name in ("accuracy", "next") for kind in ("normalised", "strided")}
    curves |= {"accuracy, normalised": [0.0, 0.2, 0.6], "next, normalised": [1.0, 0.4, 0.2], "next, strided": [1, 1, 1]}
    assert _crossings(curves, [0.0, 1.0, 2.0]) == {"crossing/normalised": pytest.approx(1 + 0.2 / 0.6)}


def test_a_repeat_gives_the_same_bytes_and_the_metrics_of_the_claims() -> None:
    source = {name: learn_source(SMALL.tasks("next", 3)[0].inputs[0].parameters, [], "cpu") for name in ("a", "b")}
    assert source["a"] == source["b"]
    job = {**SMALL.tasks("next", 3)[0].parameters, "tints": 1}
    files = examine(job, [source["a"]], "cpu")
    assert files == examine(job, [source["a"]], "cpu")
    found = json.loads(files["metrics.json"])
    shares = {name: value for name, value in found.items() if not name.startswith(("moved", "crossing"))}
    assert all(0 <= each <= 1 for each in shares.values())
    assert found["moved"] < 1.0 + 0.05  # of rounding to 8 bits
    assert found["moved/at_0"] == 0
    assert found["moved/at_3"] > 2
    assert {"figures/examples.png", "figures/examples_at_3.png", "figures/next.png"} <= files.keys()
    told = {arm: {claim.metric for claim in SMALL.claimed() if claim.arm == arm} for arm in SMALL.arms}
    assert told["next"] <= found.keys()
    plain = examine(SMALL.tasks("standard", 3)[0].parameters, [], "cpu")
    asked = SMALL.tasks("standard", 3)[1].parameters
    networks = [
        source["a"],
        learn_source({**SMALL.tasks("standard", 3)[1].inputs[1].parameters}, [], "cpu"),
        source["b"],
    ]
    checked = audit(asked, networks, "cpu")
    everything = json.loads(plain["metrics.json"]) | json.loads(checked["metrics.json"])
    assert told["standard"] <= everything.keys()
    assert everything["under_0/evaluator"] > 0.95  # of true digits that it has not seen
    assert everything["under_0.5/evaluator"] < everything["noise/evaluator"]


def test_the_captioner_as_a_classifier_says_what_it_writes() -> None:
    captioner = Captioner(CaptionerSettings(path="models/digits/captioner"))
    images, labels, captions = digits("test", 1, 0, "cpu")
    classify = digit_named(captioner, captions)
    said = classify(images).argmax(dim=1)
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    written = [DIGITS.index(str(parse(text)["digit"])) for text in captioner.caption(pixels)]
    assert np.mean(said.numpy() == written) > 0.97  # it may begin with another ink
    assert (said == labels).float().mean() > 0.9
    under = accuracy_under(classify, images, labels, [0.0, 0.75], AttackSettings(steps=6))
    assert under[1] < under[0] - 0.3
    with pytest.raises(ValueError, match="no word of its own for each digit"):
        digit_named(captioner, [f"a {ink}" for ink in INKS])
    captioner.image_processor.size = {"height": 32, "width": 32}
    with pytest.raises(ValueError, match="not of 16 x 16 pixels"):
        digit_named(captioner, captions)


def test_study_plans_arms_with_their_controls() -> None:
    study = AdversarialFeatures()
    assert find_study("adversarial_features") is AdversarialFeatures
    jobs = {arm: study.tasks(arm, 0)[0] for arm in study.arms}
    sources = {arm: [each.parameters["eps"] for each in job.inputs] for arm, job in jobs.items()}
    fed = {arm: [0.0] for arm in ("random", "next", "standard-features")}
    assert {arm: eps for arm, eps in sources.items() if eps} == fed | {"robust-features": [1.5]}
    assert jobs["random"].inputs[0].key == jobs["next"].inputs[0].key  # done once
    assert jobs["next"].parameters["eps"] == [1.5, 3.0, 5.0]
    assert [each.kind.split(":")[1] for each in study.tasks("standard", 0)] == ["examine", "audit"]
    claims = study.claimed()
    assert {each.arm for each in claims} == set(study.arms) - {"robust-features"}
    assert all(each.scale == "share" for each in claims)
    alone = AdversarialFeatures(evaluator=None, captioner=None, arms=("random",))
    assert {each.metric for each in alone.claimed()} == {"accuracy/normalised", "accuracy/strided"}
    assert alone.reads() == {}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"curve": (1.5,)}, "curve: give each norm once"),
        ({"robust": (0.0,)}, "robust: give each norm once"),
        ({"audited": (0.5, -1.0)}, "audited: give each norm once, and none below 0"),
        ({"evaluator": "models/digits/nowhere"}, "evaluator: there is no directory"),
        ({"evaluator": "models/digits/captioner"}, "no directory of an evaluator of digits"),
        ({"captioner": "models/digits/evaluator"}, "no BLIP that looks at images of 16 x 16 pixels"),
    ],
)
def test_what_cannot_be_studied_is_one_line(changes: dict[str, Any], says: str) -> None:
    AdversarialFeatures().preflight()
    with pytest.raises(ValueError, match=says) as caught:
        AdversarialFeatures(**changes).preflight()
    assert "\n" not in str(caught.value)
