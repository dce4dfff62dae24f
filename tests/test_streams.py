"""Random streams depend on the run's seed and the position, and on nothing else."""

from collections import Counter

from policies.common.seeding import PromptSchedule, derive_seed

PROMPTS = [f"prompt {index}" for index in range(10)]


def test_seeds_differ_in_every_coordinate() -> None:
    seeds = {
        derive_seed(run, stream, step, index)
        for run in range(3)
        for stream in ("sampling", "shuffling")
        for step in range(20)
        for index in range(20)
    }
    assert len(seeds) == 3 * 2 * 20 * 20
    assert derive_seed(0, "sampling", 1, 23) != derive_seed(0, "sampling", 12, 3)


def test_seeds_are_the_same_on_every_machine() -> None:
    # Another value would draw other images on the resumption of an old run.
    assert derive_seed(0, "sampling", 3, 14) == 8898758567672784144
    assert all(0 <= derive_seed(seed, "sampling") < 2**63 for seed in range(100))


def test_every_prompt_comes_once_before_any_comes_again() -> None:
    schedule = PromptSchedule(PROMPTS, per_step=4, run_seed=0)
    drawn = [prompt for step in range(10) for prompt in schedule.batch(step)]
    for start in range(0, 40, 10):
        assert sorted(drawn[start : start + 10]) == sorted(PROMPTS)
    assert drawn[:10] != drawn[10:20]
    assert Counter(drawn) == dict.fromkeys(PROMPTS, 4)


def test_a_batch_is_a_function_of_step_and_seed() -> None:
    schedule = PromptSchedule(PROMPTS, per_step=4, run_seed=0)
    forwards = [schedule.batch(step) for step in range(6)]
    backwards = [PromptSchedule(PROMPTS, 4, 0).batch(step) for step in reversed(range(6))]
    assert forwards == backwards[::-1]
    assert forwards != [PromptSchedule(PROMPTS, 4, run_seed=1).batch(step) for step in range(6)]


def test_a_step_may_draw_every_prompt() -> None:
    assert sorted(PromptSchedule(PROMPTS, 10, 0).batch(5)) == sorted(PROMPTS)
