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


def test_sampler_threads_do_not_depend_on_how_many_there_are() -> None:
    threads = {
        next(r.threads for r in plan_roles(ActorSettings(samplers=n), cpus=8, gpus=0) if r.name == "sampler")
        for n in (1, 2, 5)
    }
    assert threads == {1}


def test_spread_takes_whole_devices_or_says_what_is_missing() -> None:
    settings = ActorSettings(placement="spread", learner_threads=1)
    assert all(role.cpus == 1 for role in plan_roles(settings, cpus=6, gpus=0))
    with pytest.raises(ValueError, match="need 6 CPUs and 4 GPUs, there are 8 and 3"):
        plan_roles(settings, cpus=8, gpus=3)


def test_roles_that_are_not_wanted_are_not_planned() -> None:
    names = {role.name for role in plan_roles(ActorSettings(), cpus=2, gpus=0, captioner=False, evaluator=False)}
    assert names == {"sampler", "reward", "learner"}
