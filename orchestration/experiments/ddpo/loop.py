"""The DDPO loop: sample → caption → reward → learn → publish, round and round (Black et al., 2305.13301).

Everything between actors is an object reference; chunks are captioned and scored while the next ones are drawn. The
driver owns every actor, and a step's state is committed as a whole or not at all.
"""

from pathlib import Path

import numpy as np

from actors.failures import ActorLost
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.evaluation import Evaluation, fixed_work
from orchestration.experiments.ddpo.metrics import step_metrics
from orchestration.experiments.ddpo.preflight import Plan, preflight, replan
from orchestration.experiments.ddpo.report import Report
from orchestration.experiments.ddpo.reward_check import calibrate, fitting_images
from orchestration.experiments.ddpo.rollout_queue import Ahead
from orchestration.experiments.ddpo.run import DdpoRun, Watch, ignore
from orchestration.experiments.ddpo.worker_group import Crew
from orchestration.runs.run import going_on
from pipelines.storage.checkpoint import LearnerState
from policies.common.seeding import PromptSchedule, derive_seed
from policies.rl.advantages import PromptStatistics, advantages
from policies.rl.health import SickNumbers
from policies.rl.over_optimisation import look_to_keep


def run_ddpo(config: DdpoConfig, watch: Watch = ignore, profile: bool = False) -> Path:
    """Run DDPO from the beginning. Returns the path of summary.json. Raises ConfigError before anything is started."""
    plan = preflight(config)
    return _loop(DdpoRun.create(config, profile), plan, watch)


def resume_ddpo(directory: Path, trusted: bool = False, changes: bool = False, watch: Watch = ignore) -> Path:
    """Go on from the last commit of ``directory``, to the weights an undisturbed run would have had."""
    with going_on(directory, DdpoConfig, trusted) as (manifest, config):
        run = DdpoRun.resume(manifest, config, changes)
        return _loop(run, preflight(run.config.model_copy(update={"output_dir": None})), watch)


def _loop(run: DdpoRun, plan: Plan, watch: Watch) -> Path:
    with run:
        while True:
            try:
                with Crew(run.config, plan, run.display, run.profile) as crew:
                    return _train(run, crew, plan, watch)
            except ActorLost as lost:  # one that cannot be replaced: the learner, or several with their node
                run.roll_back(lost)
                plan = replan(run.config, plan)


def _train(run: DdpoRun, crew: Crew, plan: Plan, watch: Watch) -> Path:
    config, training = run.config, run.config.training
    ahead = Ahead(run, crew, PromptSchedule(plan.prompts, training.prompts_per_step, config.seed))
    history = PromptStatistics(config.advantage.history_size)
    held_out_prompts, held_out_seeds = fixed_work([*plan.prompts, *plan.unseen], config.evaluation.images)
    report = Report(run, held_out_prompts)

    def evaluate(images: int) -> Evaluation:
        with run.stage("evaluate"):
            return crew.evaluate(held_out_prompts[:images], held_out_seeds[:images])

    if run.checkpoint is None:
        micro_batch = crew.wait(crew.learner.everyone("micro_batch"), "micro-batch")[0]
        run.describe(plan.prompts, plan.roles, micro_batch)
        before = evaluate(config.evaluation.images)
        report.before(before, calibrate(crew, *fitting_images(config, before)))
    else:
        crew.restore(LearnerState(run.checkpoint.tensors, run.checkpoint.state["weights_version"]))
        history.restore(run.checkpoint.state["prompt_statistics"])
        ahead.redo(run.step, run.checkpoint.state.get("drawn_by"))
        run.display.say(f"resumed after step {run.step}")

    held_out: Evaluation | None = None
    for step in run.remaining_steps():
        if report.over_optimised():
            break
        with run.stage("sample"):
            chunks = ahead.step(step)  # at depth 1 the next step is drawn from here on, while this one is learned from
            images = np.concatenate(crew.wait([chunk.images for chunk in chunks], f"step {step + 1}: sampling"))
            step_prompts = [prompt for chunk in chunks for prompt in chunk.prompts]
            crew.acknowledge()
        try:
            with run.stage("reward"):
                scores = crew.rewarded(chunks, f"step {step + 1}: rewards")
                advantage = advantages(scores, step_prompts, config.advantage, history)
        except SickNumbers as sick:
            metrics = run.spare(sick)
        else:
            with run.stage("learn"):
                learned, weights = crew.learner.learn(chunks, advantage, derive_seed(config.seed, "timesteps", step))
                update = crew.wait(learned, f"step {step + 1}: learning")[0]
            with run.stage("publish"):
                crew.publish(update, weights, expect_change=training.on_sick_numbers == "stop")
            metrics = step_metrics(scores, advantage, update, images, step_prompts)

        measured = config.evaluation.size_after(step + 1, training.steps)
        held_out = evaluate(measured) if measured else None
        run.record(step, metrics | crew.footprint() | (held_out.metrics() if held_out else {}))
        if held_out:  # before the commit, after which nothing of this step is done again
            report.progress(step + 1, held_out)

        if run.commit_due():
            with run.stage("commit"):
                run.store.pinned = report.best_step()  # anew each time: a resumed run knows it from its evaluations
                state = crew.wait(crew.learner.everyone("state"), "the learner's state")[0]
                known = {"prompt_statistics": history.state(), "drawn_by": ahead.drawn_by}
                run.commit(state, known, crew.accounts())
        watch(run)

    kept = report.best_step(look_to_keep)
    if kept not in (None, run.step):  # the last weights do worse than others did, where nothing is trained
        best, held_out = run.store.load(kept), None
        crew.restore(LearnerState(best.tensors, best.state["weights_version"]))
    whole = held_out is not None and len(held_out.images) == config.evaluation.images
    after = held_out if held_out and whole else evaluate(config.evaluation.images)
    update = crew.wait(crew.learner.weights("averaged")[0], "the final weights")[0]
    files = crew.wait(crew.learner.everyone("pipeline"), "the pipeline")[0]
    return report.finish(after, update.checksum, files, crew.accounts())
