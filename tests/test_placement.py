"""What runs where: shares of several nodes, kinds of nodes, and room for all actors of a run at once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.allocation import Offer, Role, allocate, cards_of, plan_roles
from actors.settings import ActorSettings, WorkerSettings
from orchestration.cluster.ray_cluster import Machine
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.preflight import describe_ddpo, preflight_ddpo
from orchestration.experiments.mad.config import MadConfig
from orchestration.experiments.mad.preflight import preflight_mad
from orchestration.runs.config import ConfigError, load_config
from pipelines.storage.locations import CHECKOUT, portable, resolve_model

STABLE: Offer = {"CPU": 8, "GPU": 1, "stable": 1}
SPOT: Offer = {"CPU": 4, "GPU": 1, "preemptible": 1}
HEAD: Offer = {"node:__internal_head__": 1}


def machine(*offers: Offer) -> Machine:
    return Machine(*(int(sum(offer.get(name, 0) for offer in offers)) for name in ("CPU", "GPU")), offers)


def plan(settings: ActorSettings, *offers: Offer) -> dict[str, Role]:
    whole = machine(*offers)
    return {role.name: role for role in plan_roles(settings, whole.cpus, whole.gpus, offers=offers)}


def test_shares_are_cut_so_that_nodes_hold_their_actors() -> None:
    three = [{"CPU": 1.0}] * 3  # shares of 3/5 would leave two of five actors without a node
    roles = plan(ActorSettings(samplers=1), *three)
    assert all(0 < role.cpus <= 0.5 for role in roles.values())
    crowded = ActorSettings(samplers=3, nodes={"sampler": "preemptible", "captioner": "preemptible"})
    roles = plan(crowded, HEAD, STABLE, SPOT)
    assert (roles["sampler"].gpus, roles["captioner"].gpus, roles["learner"].gpus) == (0.25, 0.25, 1)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_every_actor_finds_its_kind_of_node(count: int) -> None:
    nodes = {"learner": "stable", "sampler": "preemptible"}
    roles = plan(ActorSettings(samplers=count, nodes=nodes), HEAD, STABLE, *[SPOT] * count)
    planned = allocate(roles.values(), [HEAD, STABLE, *[SPOT] * count])
    bundles = {name: each for each in planned for name in each.names()}
    assert bundles["learner"].demand["stable"] == bundles["sampler"].demand["preemptible"] == 0.001
    assert set(bundles["reward"].demand) == {"CPU"}
    assert count * roles["sampler"].gpus <= count


def test_the_learners_threads_are_those_of_a_node_not_of_the_cluster() -> None:
    assert plan(ActorSettings(), *[{"CPU": 2.0}] * 5)["learner"].threads == 2
    assert plan(ActorSettings(nodes={"learner": "preemptible"}), STABLE, SPOT)["learner"].threads == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nodes": {"learner": "stable "}}, r"actors\.nodes\.learner is stable , but no node advertises"),
        (
            {"nodes": {"sampler": "huge"}},
            r"""ray start --resources='{"huge": 1}', or set actors\.nodes\.sampler=null""",
        ),
        ({"placement": "spread", "threads": {"learner": 9}}, r"no node has room for the learner: 9 CPU, 1 GPU"),
        ({"placement": "spread", "samplers": 1, "nodes": {"sampler": "stable"}}, r"room for the learner: 8 CPU, 1 GPU"),
        ({"nodes": {"learner": "node:__internal_head__"}}, r"the learner: .* node:__internal_head__ nodes\. Ask for"),
    ],
)
def test_what_no_node_can_take_is_said_before_anything_starts(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(ActorSettings.model_validate(settings), HEAD, STABLE, SPOT, SPOT)


def test_a_dry_run_says_what_runs_where() -> None:
    config = load_config(DdpoConfig, None, ["actors.nodes.learner=stable", "actors.nodes.sampler=preemptible"])
    shown = describe_ddpo(config, preflight_ddpo(config, machine(STABLE, SPOT, SPOT)))
    assert "1 × learner: " in shown
    assert "8 threads, on cuda, stable nodes" in shown
    assert "2 × sampler: " in shown
    assert "on cuda, preemptible nodes" in shown
    with pytest.raises(ConfigError, match=r"actors\.nodes\.samplers.*'\^\(sampler\|captioner\|"):
        load_config(DdpoConfig, None, ["actors.nodes.samplers=preemptible"])


def test_mad_tasks_go_to_a_kind_of_node() -> None:
    config = load_config(MadConfig, None, ["n_ini=60", "workers.nodes=preemptible"])
    assert preflight_mad(config, machine(STABLE, SPOT)).resources["nodes"] == "preemptible"
    with pytest.raises(ConfigError, match=r"workers\.nodes is preemptible, but no node"):
        preflight_mad(config, machine(STABLE))
    assert WorkerSettings().nodes is None


def test_a_model_has_one_name_on_all_nodes(tmp_path: Path) -> None:
    assert portable("models/digits/pipeline") == "./models/digits/pipeline"
    assert portable(str(CHECKOUT / "models")) == "./models"
    assert portable(str(tmp_path)) == str(tmp_path)
    assert portable("someone/model") == resolve_model("someone/model") == "someone/model"
    assert resolve_model("./models") == str(CHECKOUT / "models")
    with pytest.raises(FileNotFoundError, match=r"no \./runs/lost on node .*: files that git ignores are not shipped"):
        resolve_model("./runs/lost")


HALF = Role("half", 2, 0.5, 0.0, 1, "cpu")


@pytest.fixture(scope="module")
def ray_session(preloaded: None) -> Iterator[None]:
    """A private Ray with eight cards, which nothing here uses; Ray counts them."""
    from orchestration.cluster import ray_cluster as cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "cpu_limit", lambda: 96)
        with cluster.connected(gpus=8):
            yield


@pytest.fixture
def free_cpus(ray_session: None) -> float:
    """What Ray has once earlier runs have left it."""
    import ray

    from tests.processes import wait_until

    total = ray.cluster_resources()["CPU"]
    wait_until(lambda: ray.available_resources().get("CPU", 0) == total, 60, "free CPUs")
    return total


def test_room_is_for_all_actors_or_for_none(free_cpus: float) -> None:
    import ray

    from actors.placement import Reservation
    from tests.processes import wait_until

    most = Role("most", 1, free_cpus - 0.5, 0.0, 1, "cpu")
    offers = [{"CPU": free_cpus}]
    first, waited = Reservation([most], offers), []
    first.wait(60, lambda: None)
    second = Reservation([HALF], offers)  # half of it would fit
    with pytest.raises(TimeoutError, match=r"no room .* for 2 × half: 0\.5 CPU, .* free: 0\.5 CPU"):
        second.wait(1.5, lambda: waited.append(ray.available_resources()["CPU"]))
    assert set(waited) == {0.5}
    first.release()
    second.wait(60, lambda: None)
    assert [place is None for place in second.placed()["half"].places] == [False, False]
    second.release()
    wait_until(lambda: ray.available_resources().get("CPU", 0) == free_cpus, 60, "room given back")


@pytest.mark.parametrize(
    ("rewards", "settings"),
    [
        ({}, {"learners": 8}),
        ({}, {"samplers": 8}),
        ({"reward": True}, {"learners": 3, "samplers": 2, "placement": "spread"}),
        ({"reward": True, "held out": False}, {"learners": 5, "samplers": 11, "replicas": {"captioner": 3}}),
        ({}, yaml.safe_load((CHECKOUT / "configs/scale/8-gpus.yaml").read_text())["actors"]),
    ],
)
def test_what_is_planned_for_eight_cards_fits_a_ray_of_eight(
    free_cpus: float, rewards: dict[str, bool], settings: dict[str, Any]
) -> None:
    """By Ray's own count of cards: every card is used, and all of the room is there at once."""
    import ray

    from actors.placement import Reservation
    from tests.processes import wait_until

    offers = [{"CPU": free_cpus, "GPU": 8.0}]
    roles = plan_roles(ActorSettings(**settings), int(free_cpus), 8, offers=offers, rewards=rewards)
    room = Reservation(roles, offers)
    room.wait(30, lambda: None)
    try:
        wanted = sum(role.count * role.gpus for role in roles)
        left = ray.available_resources()
        assert 8 - left.get("GPU", 0) >= wanted - 1e-3
        assert all(map(all, cards_of(roles, offers)))
        assert {name: len(each.places) for name, each in room.placed().items()} == {r.name: r.count for r in roles}
    finally:
        room.release()
    wait_until(lambda: ray.available_resources().get("GPU", 0) == 8, 60, "room given back")


def test_actors_of_a_trial_live_in_its_placement_group(free_cpus: float) -> None:
    import ray
    from ray.util import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    def trial() -> tuple[str, list[str]]:
        """What a sweep's trial does: start a role's actors. Returns its group and theirs."""
        from ray.util import get_current_placement_group

        from actors.placement import Reservation
        from actors.pool import Pool
        from actors.worker import Worker

        class Where(Worker):
            def __init__(self, device: str, threads: int) -> None:
                super().__init__(threads)

            def group(self) -> str:
                return get_current_placement_group().id.hex()

        room = Reservation([HALF], get_current_placement_group().bundle_specs)
        room.wait(0, lambda: None)
        pool = Pool(room.placed()["half"], Where)
        room.release()
        return get_current_placement_group().id.hex(), ray.get(pool.everyone("group"), timeout=60)

    group = placement_group([{"CPU": 0.1}, {"CPU": 1}])
    inside = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
    try:
        found = ray.get(ray.remote(trial).options(num_cpus=0.1, scheduling_strategy=inside).remote(), timeout=120)
    finally:
        remove_placement_group(group)
    assert found == (group.id.hex(), [group.id.hex()] * 2)
