"""Who gets how much of the machine."""

import pytest

from actors.settings import ActorSettings, plan_roles


def test_two_cores_are_shared_by_fractions() -> None:
    roles = plan_roles(ActorSettings(), cpus=2, gpus=0)
    assert sum(role.count * role.cpus for role in roles) <= 2
    assert {role.name for role in roles} == {"sampler", "captioner", "reward", "learner", "evaluator"}
    assert all(role.cpus > 0 and role.gpus == 0 and role.device == "cpu" for role in roles)


@pytest.mark.parametrize("gpus", [1, 2, 3, 8])
def test_models_share_gpus_so_that_every_one_can_be_placed(gpus: int) -> None:
    roles = plan_roles(ActorSettings(samplers=3), cpus=16, gpus=gpus)
    slots = [0.0] * gpus
    for role in roles:
        for _ in range(role.count):
            if role.gpus:
                card = min(range(gpus), key=lambda i: slots[i])
                slots[card] += role.gpus
                assert slots[card] <= 1 + 1e-9
    assert {role.name for role in roles if role.gpus} == {"sampler", "captioner", "learner"}


@pytest.mark.parametrize("gpus", [2, 3, 8])
def test_learners_that_work_together_have_a_card_each(gpus: int) -> None:
    for placement in ("shared", "spread"):
        settings = ActorSettings(learners=2, samplers=1 if placement == "spread" else 3, placement=placement)
        roles = {role.name: role for role in plan_roles(settings, cpus=32, gpus=max(gpus, 4 * (placement == "spread")))}
        assert roles["learner"].count == 2
        assert 0.5 < roles["learner"].gpus <= 1
        if placement == "shared":  # beside a learner, and on every other card, is room for its part of the others
            others = roles["sampler"].count + roles["captioner"].count
            assert gpus * int((1 - roles["learner"].gpus) / roles["sampler"].gpus + 1e-9) >= others
    with pytest.raises(ValueError, match=r"actors\.learners is 9 and each needs a GPU of its own, but there are"):
        plan_roles(ActorSettings(learners=9), cpus=32, gpus=gpus)


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
