"""The cost model: simulated steps against closed forms, what limits them, and the plan that a person sees."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from orchestration.cluster.ray_cluster import imagine_machine
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.preflight import preflight_ddpo
from orchestration.planning.cost_model import (
    Actor,
    Cast,
    Cost,
    Costs,
    Processor,
    Seat,
    Timeline,
    Work,
    bottlenecks,
    simulate,
)
from orchestration.planning.plan import best, plan_run, splits, work_of
from orchestration.planning.stage_costs import StageCosts, assumed, settings_behind
from orchestration.runs.config import ConfigError, load_config
from pipelines.storage.locations import CHECKOUT
from tests.test_config import command

ALIGNMENT = CHECKOUT / "configs/ddpo/alignment.yaml"
COSTS = Costs(
    sample=Cost(call=0.01, each=0.001),
    caption=Cost(each=0.002),
    rewards={"similarity": Cost(each=0.001)},
    gradient=Cost(call=0.02, each=0.003),
    update=0.05,
    learn=0.1,
    publish=0.2,
)
WORK = Work(64, 16, 10, transitions=32, updates=2, micro_batch=16, trained_on=("similarity",))
DRAW = 10 * (0.01 + 0.016)  # seconds of a call
SCORE = 16 * (0.002 + 0.001)
LEARN = 0.1 + 2 * (2 * (0.02 + 16 * 0.003) + 0.05)
STALE = 2 * (0.01 + 0.016)  # at depth 1, the second update's look at the step's first weights


def cast(samplers: int = 1, learners: int = 1, cores: int | None = None, threads: int = 1, nodes: int = 1) -> Cast:
    """Actors on processors of their own, or all on so many cores."""
    counts = {"driver": 1, "sampler": samplers, "captioner": 1, "similarity": 1, "learner": learners}

    def seat(role: str, number: int) -> Seat:
        return Seat("cpu" if cores else f"{role} {number}", threads if role == "learner" else 1)

    seats = {role: [seat(role, number) for number in range(count)] for role, count in counts.items()}
    names = {each.processor for role in seats.values() for each in role}
    return Cast(seats, {name: Processor(cores or 1) for name in names}, nodes)


def test_a_synchronous_step_is_the_sum_of_its_stages() -> None:
    found = simulate(WORK, COSTS, cast())
    assert found.seconds == pytest.approx(
        4 * DRAW + SCORE + LEARN + 0.2
    )  # the last chunk's scores alone are waited for
    assert found.images_per_second == pytest.approx(64 / found.seconds)
    waits = {"sample": 4 * DRAW, "reward": SCORE, "learn": LEARN, "publish": 0.2, "driver": 0.0}
    assert found.waits == pytest.approx(waits)
    assert found.busy["sampler"] == pytest.approx((4 * DRAW + 0.2) / found.seconds)
    assert found.busy["learner"] == pytest.approx(LEARN / found.seconds)


@pytest.mark.parametrize(("samplers", "rounds"), [(2, 2), (3, 2), (4, 1), (8, 1)])
def test_samplers_share_the_chunks(samplers: int, rounds: int) -> None:
    assert simulate(WORK, COSTS, cast(samplers)).waits["sample"] == pytest.approx(rounds * DRAW)


def test_samplers_do_not_draw_faster_than_there_are_cores() -> None:
    free = COSTS.model_copy(update={"caption": Cost(), "rewards": {"similarity": Cost()}})
    one, two, four = (simulate(WORK, free, cast(n, cores=2)).waits["sample"] for n in (1, 2, 4))
    assert one == pytest.approx(2 * two)
    assert four == pytest.approx(two)


def test_calls_on_one_processor_share_it() -> None:
    line = Timeline({"cpu": Processor(2)})
    long, middle, short = (line.submit(Actor(Seat("cpu")), seconds) for seconds in (3.0, 2.0, 1.0))
    assert line.wait([short]) == pytest.approx(1.5)  # three at ⅔ each
    assert line.wait([middle]) == pytest.approx(1.0)  # then two at full speed
    assert line.wait([long]) == pytest.approx(1.0)
    assert line.wait([long, short]) == 0


def test_threads_that_wait_for_one_another_lose_more_than_their_share() -> None:
    assert Processor(2).rate(2, 3) == pytest.approx(2 / 3)
    assert Processor(2, coupling=2).rate(2, 3) == pytest.approx(4 / 9)
    assert Processor(2, coupling=2).rate(1, 3) == pytest.approx(2 / 3)
    assert Processor(2, coupling=2).rate(4, 4) == 1  # as it was measured: alone


def test_an_actor_keeps_the_order_of_its_queue() -> None:
    line = Timeline({"a": Processor(), "b": Processor()})
    one, other = Actor(Seat("a")), Actor(Seat("b"))
    before = line.submit(other, 5.0)
    held = line.submit(one, 1.0, [before])
    behind = line.submit(one, 1.0)  # could begin at once, but stands behind
    assert line.wait([behind]) == pytest.approx(7.0)
    assert held.done


@pytest.mark.parametrize("slower", ["sample", "gradient"])
def test_at_depth_1_the_longer_of_drawing_and_learning_is_left(slower: str) -> None:
    costs = COSTS.scaled([slower], 10).model_copy(update={"publish": 0.0})
    found = simulate(replace(WORK, depth=1), costs, cast(), steps=20)
    drawing, learning = 40 * costs.sample(16), 0.1 + 2 * (2 * costs.gradient(16) + 0.05) + 2 * costs.sample(16)
    assert found.seconds == pytest.approx(max(drawing, learning), rel=1e-6)
    assert found.seconds < simulate(WORK, costs, cast()).seconds


def test_depth_1_gains_nothing_where_all_share_one_core() -> None:
    free = COSTS.model_copy(update={"caption": Cost(), "rewards": {"similarity": Cost()}})
    synchronous, overlapped = (simulate(replace(WORK, depth=d), free, cast(cores=1), steps=20) for d in (0, 1))
    assert overlapped.seconds == pytest.approx(synchronous.seconds + STALE, rel=1e-6)


def test_learners_share_the_transitions_and_exchange_gradients() -> None:
    costs = COSTS.model_copy(update={"gradient_bytes": 1e9, "bus": 1e-10, "link": 1e-9, "latency": 1e-3, "tensors": 10})
    alone, four, apart = (simulate(WORK, costs, cast(learners=n, nodes=m)) for n, m in ((1, 1), (4, 1), (4, 2)))
    own = 0.02 + 8 * 0.003  # 8 of 32 transitions, one call
    exchange = 2 * 3 / 4 * 1e9 * 1e-10 + 10 * 1e-3
    assert alone.waits["learn"] == pytest.approx(LEARN)
    assert four.waits["learn"] == pytest.approx(0.1 + 2 * (own + 0.05 + exchange))
    assert apart.waits["learn"] - four.waits["learn"] == pytest.approx(2 * 2 * 3 / 4 * 1e9 * 9e-10)


def test_evaluations_and_commits_come_as_often_as_they_do() -> None:
    costs = COSTS.model_copy(update={"commit": 0.6})
    work = replace(WORK, commit_every=2, evaluate_every=3, evaluation_images=32)
    found = simulate(work, costs, cast(), steps=6)
    assert found.waits["commit"] == pytest.approx(0.3)
    # The comparison with the base model begins when both chunks are drawn, and takes two passes of 16 images.
    assert found.waits["evaluate"] == pytest.approx((2 * DRAW + max(2 * DRAW, SCORE)) / 3)
    assert found.seconds == pytest.approx(sum(found.waits.values()))


@pytest.mark.parametrize(
    ("part", "dear"),
    [
        ("sampling", {"sample": Cost(each=1.0)}),
        ("captioning", {"caption": Cost(each=1.0)}),
        ("rewards", {"rewards": {"similarity": Cost(each=1.0)}}),
        ("learning", {"gradient": Cost(each=9.0)}),
        ("optimiser", {"update": 99.0}),
        ("network", {"link": 1.0, "gradient_bytes": 99.0}),
        ("taking weights", {"publish": 99.0}),
        ("driver", {"dispatch": 9.0}),
        ("commits", {"commit": 99.0}),
    ],
)
def test_the_bottleneck_is_named(part: str, dear: dict[str, object]) -> None:
    work = replace(WORK, commit_every=1)
    found = bottlenecks(work, COSTS.model_copy(update=dear), cast(learners=2, nodes=2))
    assert next(iter(found)) == part
    assert found[part] > 0.8
    assert sum(found.values()) == pytest.approx(1, abs=0.02)


def test_what_is_hidden_limits_nothing() -> None:
    found = bottlenecks(replace(WORK, depth=1), COSTS.scaled(["gradient"], 20), cast())
    assert found["sampling"] < 0.2 < 0.7 < found["learning"]
    assert found["captioning"] == pytest.approx(0, abs=1e-9)


def test_the_work_is_the_configs() -> None:
    config = load_config(DdpoConfig, CHECKOUT / "configs/ddpo/digits.yaml")
    work = work_of(config, 100, 0)
    assert (work.images, work.images_per_call, work.updates, work.transitions) == (256, 64, 4, 64 * 4)
    assert (work.commit_every, work.evaluate_every, work.evaluation_images) == (5, 10, 180)


def test_more_gpus_draw_faster_at_a_higher_price_and_other_things_limit_them() -> None:
    config = load_config(DdpoConfig, ALIGNMENT)
    known = assumed(config, 300)
    few, many = (best(config, imagine_machine(count), known) for count in (8, 64))
    for option, count in ((few[0], 8), (many[1], 64)):
        assert option.gpus == count == sum(len(seats) > 0 for seats in option.cast.processors if seats != "cpu")
        assert sum(role.gpus * role.count for role in option.roles) <= count + 1e-6
        assert {seat.processor for seat in option.cast.seats["sampler"]} <= set(option.cast.processors)
    assert many[1].forecast.images_per_second > 2 * few[0].forecast.images_per_second
    assert many[1].forecast.images_per_second < 8 * few[0].forecast.images_per_second
    first, then = (bottlenecks(option.work, known.costs, option.cast) for option in (few[0], many[1]))
    assert next(iter(first)) == "learning"
    assert first["network"] < 0.05 < then["network"]
    assert first["learning"] > then["learning"]


def test_the_command_plans_clusters(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--config", str(ALIGNMENT), "--gpus", "1,8", "--price", "2", "--tflops", "100"]
    assert command(words, monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "GPUs assumed to keep up 100 TFLOP/s (nothing was measured)" in printed
    assert "fastest on 1 GPUs" in printed
    assert "fastest on 8 GPUs: training.depth=" in printed
    assert "learner on cuda: 18 GB" in printed  # what was drawn stays in the machine's memory
    row = next(line.split() for line in printed.splitlines() if line.startswith("8 "))
    speed, dollars = float(row[8]), float(row[9])
    assert dollars == pytest.approx(1000 / speed / 3600 * 2 * 8, rel=0.01)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "8,many"], "--gpus 8,many is not a number of GPUs, or several as in 8,64,512"),
        (["--gpus", "0"], "--gpus 0 is not"),
        (["--gpus", "8", "--costs", "no.json"], "--costs no.json cannot be read"),
        (
            ["--gpus", "8", "model.path=somebody/something"],
            "somebody/something: its floating-point operations are not known",
        ),
        (["--gpus", "8", "sampling.step=3"], "did you mean 'sampling.steps'"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["plan", "--config", str(ALIGNMENT), *words], monkeypatch) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_costs_of_other_models_are_refused(tmp_path: Path) -> None:
    config = load_config(DdpoConfig, ALIGNMENT)
    path = tmp_path / "costs.json"
    options, known = plan_run(config, [1], None, path, 300)
    again, read = plan_run(config, [1], path, None, 50)
    assert read == known
    assert [each.forecast for each in again] == [each.forecast for each in options]
    with pytest.raises(ConfigError, match=r"was measured for model .*LoRA rank 0, guided, not .*LoRA rank 4"):
        StageCosts.read(path, load_config(DdpoConfig, ALIGNMENT, ["model.lora_rank=4"]))
    path.write_text(json.dumps({**json.loads(path.read_text()), "micro_batch": 0}))
    with pytest.raises(ConfigError, match="holds no stage costs: micro_batch"):
        StageCosts.read(path, config)


def test_stages_are_measured_with_the_real_models(tmp_path: Path, tiny_pipeline: Path, tiny_captioner: Path) -> None:
    words = [f"model.path={tiny_pipeline}", f"captioner.path={tiny_captioner}", "evaluation.evaluator=null"]
    words += ["training.images_per_step=32", "training.updates_per_step=2", "actors.samplers=1", "sampling.steps=4"]
    words += ["reward.function={jpeg_compressibility: 1.0, jpeg_incompressibility: 0.5}", "actors.images_per_call=8"]
    words += ["actors.threads={learner: 1}", "captioner.max_new_tokens=4"]
    config = load_config(DdpoConfig, None, words)
    options, known = plan_run(config, [], None, tmp_path / "costs.json", 1)
    costs = known.costs
    assert known.about == settings_behind(config)
    assert costs.sample(8) >= costs.sample(1) > 0  # one image may take as long as eight on a machine that is busy
    assert costs.caption(8) > 0 < costs.gradient(known.micro_batch)
    assert set(costs.rewards) == {"jpeg_compressibility", "jpeg_incompressibility"}
    assert min(costs.publish, costs.learn, costs.commit) > 0
    assert costs.latent_bytes == 4 * 8 * 8 * 4
    assert costs.gradient_bytes == costs.weight_bytes  # the whole network is trained
    assert options[0].work.images_per_call == 8
    assert all(math.isfinite(option.forecast.images_per_second) for option in options)
    assert preflight_ddpo(config).roles == options[0].roles


def test_a_plan_as_json_has_what_the_table_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--config", str(CHECKOUT / "configs/ddpo/alignment.yaml"), "--gpus", "2", "--price", "3"]
    assert command(words, monkeypatch) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("2 ")]
    assert command([*words, "--json"], monkeypatch) == 0
    known = json.loads(capsys.readouterr().out)
    assert len(rows) == len(known["options"]) == 2
    for row, each in zip(rows, known["options"], strict=True):
        split = [str(each["gpus"]), str(each["depth"]), str(each["samplers"]), str(each["captioners"])]
        assert [*row[:3], row[4]] == split
        assert row[8] == f"{each['images_per_second']:.3g}"
        assert row[9] == f"{each['dollars_per_1000_images']:.3g}"
        assert each["dollars_per_1000_images"] == pytest.approx(1000 / each["images_per_second"] / 3600 * 3 * 2)
        assert f"{row[10]} {row[11].rstrip(',')}" == "{} {:.0%}".format(*next(iter(each["limited_by"].items())))
    assert [each["fastest"] for each in known["options"]].count(True) == 1
    learner = next(role for role in known["options"][0]["memory"]["roles"] if role["role"] == "learner")
    assert learner["bytes"] == sum(learner["parts"].values()) > 1e10


def test_a_plan_names_no_captioner_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(DdpoConfig, CHECKOUT / "configs/ddpo/compressibility.yaml", ["captioner.path=null"])
    known = assumed(config, 300.0)
    assert known.costs.caption == Cost()
    found = list(splits(config, 8, 64, known))
    assert found
    assert not any("captioner" in actors.replicas for actors in found)
    words = ["--config", str(CHECKOUT / "configs/ddpo/compressibility.yaml"), "captioner.path=null", "--gpus", "2"]
    assert command(["plan", *words], monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "caption" not in printed
    assert printed.splitlines()[2].split()[2:5] == ["S", ":", "L"]
