"""Who gets how much of the machine."""

from collections import Counter
from typing import Any

import hypothesis
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from actors.allocation import allocate, cards_of, check_room, plan_roles
from actors.settings import ActorSettings
from pipelines.storage.locations import CHECKOUT


def test_two_cores_are_shared_by_fractions() -> None:
    roles = plan_roles(ActorSettings(), cpus=2, gpus=0)
    assert sum(role.count * role.cpus for role in roles) <= 2
    assert {role.name for role in roles} == {"sampler", "captioner", "reward", "learner", "evaluator"}
    assert all(role.cpus > 0 and role.gpus == 0 and role.device == "cpu" for role in roles)


@pytest.mark.parametrize("gpus", [2, 3, 8])
def test_learners_that_work_together_have_a_card_each(gpus: int) -> None:
    for placement in ("shared", "spread"):
        settings = ActorSettings(learners=2, samplers=1 if placement == "spread" else 3, placement=placement)
        offers = [{"CPU": 32.0, "GPU": max(gpus, 4 * (placement == "spread"))}]
        roles = plan_roles(settings, 32, int(offers[0]["GPU"]), offers=offers)
        learner = next(role for role in roles if role.name == "learner")
        assert 0.5 < learner.gpus <= 1
        assert [names.count("learner") for names in cards_of(roles, offers)].count(1) == 2
    with pytest.raises(ValueError, match=r"actors\.learners is 9 and each needs a GPU of its own, but there are"):
        plan_roles(ActorSettings(learners=9), cpus=32, gpus=gpus)


def test_eight_learners_or_samplers_use_eight_cards() -> None:
    offers = [{"CPU": 96.0, "GPU": 8.0}]

    def cards(rewards: dict[str, bool] | None = None, **settings: Any) -> list[list[str]]:
        return cards_of(plan_roles(ActorSettings(**settings), 96, 8, offers=offers, rewards=rewards), offers)

    assert all("learner" in names for names in cards(learners=8))
    assert all("sampler" in names for names in cards(samplers=8))
    shipped = yaml.safe_load((CHECKOUT / "configs/scale/8-gpus.yaml").read_text())["actors"]
    for names in cards({"reward": True}, **shipped):
        assert names.count("sampler") + names.count("captioner") == 1
    sixty_four = [{"CPU": 96.0, "GPU": 8.0}] * 8
    shipped = yaml.safe_load((CHECKOUT / "configs/scale/64-gpus.yaml").read_text())["actors"]
    roles = plan_roles(ActorSettings(**shipped), 768, 64, offers=sixty_four)
    assert sum("sampler" in names for names in cards_of(roles, sixty_four)) == 56


@st.composite
def casts(draw: Any) -> tuple[ActorSettings, list[dict[str, float]], dict[str, bool]]:
    """Settings, nodes and rewards: those that do not fit as well."""
    count = st.integers(1, 12)
    nodes = [
        {"CPU": float(draw(st.integers(4, 96))), "GPU": float(draw(st.integers(0, 8))), f"kind{n % 2}": 1.0}
        for n in range(draw(st.integers(1, 6)))
    ]
    kinds = st.sampled_from([None, "kind0"])
    rewards = draw(st.dictionaries(st.sampled_from(["reward a", "reward b"]), st.booleans(), min_size=1))
    settings = ActorSettings(
        samplers=draw(count),
        learners=draw(count),
        replicas={"captioner": draw(count), "reward": draw(count)},
        placement=draw(st.sampled_from(["shared", "shared", "spread"])),
        nodes={"sampler": draw(kinds), "learner": draw(kinds)},
    )
    return settings, nodes, rewards


@hypothesis.settings(deadline=None)
@given(casts())
def test_every_bundle_fits_and_no_card_is_idle_beside_two_of_a_kind(cast: Any) -> None:
    settings, nodes, rewards = cast
    cpus, gpus = (int(sum(node[name] for node in nodes)) for name in ("CPU", "GPU"))
    try:
        roles = plan_roles(settings, cpus, gpus, offers=nodes, rewards=rewards)
    except ValueError:
        return
    bundles = allocate(roles, nodes)
    check_room(bundles, nodes)
    assert Counter(name for each in bundles for name in each.names()) == {role.name: role.count for role in roles}
    for number, node in enumerate(nodes):
        here = [each for each in bundles if each.node == number]
        assert sum(each.on_card for each in here) <= node["GPU"]
        assert sum(each.demand.get("CPU", 0) for each in here) <= node["CPU"] + 1e-6
    for card in bundles:
        assert sum(role.gpus for role in card.roles) <= 1 + 1e-9
        assert card.on_card or len(card.roles) == 1
        assert card.on_card == all(role.gpus > 0 for role in card.roles)
        for role in card.roles:
            assert role.node is None or role.node in nodes[card.node]
            if card.on_card and card.roles.count(role) > 1:
                assert role.name != "learner"
                for other, node in enumerate(nodes):  # every card that would do has one
                    if role.node is None or role.node in node:
                        kin = [each for each in bundles if each.node == other and each.on_card and role in each.roles]
                        assert len(kin) == node["GPU"]


def test_learners_share_the_cpus_of_a_node() -> None:
    def threads(learners: int, nodes: int) -> int:
        offers = [{"CPU": 4.0}] * nodes
        roles = plan_roles(ActorSettings(learners=learners), cpus=4 * nodes, gpus=0, offers=offers)
        return next(role.threads for role in roles if role.name == "learner")

    assert [threads(*each) for each in ((1, 1), (2, 1), (3, 1), (2, 2), (9, 1))] == [4, 2, 1, 4, 1]


def test_sampler_threads_do_not_depend_on_how_many_there_are() -> None:
    threads = {
        next(r.threads for r in plan_roles(ActorSettings(samplers=n), cpus=8, gpus=0) if r.name == "sampler")
        for n in (1, 2, 5)
    }
    assert threads == {1}


def test_spread_takes_whole_devices_or_says_what_is_missing() -> None:
    settings = ActorSettings(placement="spread", threads={"learner": 1})
    assert all(role.cpus == 1 for role in plan_roles(settings, cpus=6, gpus=0))
    with pytest.raises(ValueError, match="need 6 CPUs and 4 GPUs, there are 8 and 3"):
        plan_roles(settings, cpus=8, gpus=3)


def test_roles_that_are_not_wanted_are_not_planned() -> None:
    names = {role.name for role in plan_roles(ActorSettings(), cpus=2, gpus=0, captioner=False, evaluator=False)}
    assert names == {"sampler", "reward", "learner"}
