"""The DDPO loop: rollout → score → train → update_weights, round and round (Black et al., 2305.13301).

Everything between actors is an object reference; chunks of images are captioned and scored while the next ones are
drawn. The driver owns every actor. A step's state is committed as a whole or not at all: a run that is resumed, or that
lost an actor, goes on from its last commit to the weights that an undisturbed run has.
"""

from pathlib import Path

from actors.failures import ActorLost
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.evaluation import Evaluation
from orchestration.experiments.ddpo.metrics import step_metrics
from orchestration.experiments.ddpo.preflight import Plan, preflight_ddpo, replan
from orchestration.experiments.ddpo.report import SERVED_STEPS, Report
from orchestration.experiments.ddpo.reward_check import calibrate, fitting_images
from orchestration.experiments.ddpo.rollout_queue import RolloutQueue
from orchestration.experiments.ddpo.run import DdpoRun, StepCallback, ignore
from orchestration.experiments.ddpo.worker_group import WorkerGroup
from orchestration.runs.run import going_on
from pipelines.denoisers import is_distilled
from pipelines.guard import write_log
from policies.common.seeding import PromptSchedule, derive_seed
from policies.rl.advantages import PromptStatistics, advantages
from policies.rl.health import DegenerateBatch
from policies.rl.over_optimisation import point_to_keep


def run_ddpo(config: DdpoConfig, on_step: StepCallback = ignore, profile: bool = False) -> Path:
    """Run DDPO from the beginning. Returns the path of summary.json. Raises ConfigError before anything is started."""
    plan = preflight_ddpo(config)
    return _loop(DdpoRun.create(config, profile), plan, on_step)


def resume_ddpo(directory: Path, trusted: bool = False, changes: bool = False, on_step: StepCallback = ignore) -> Path:
    """Go on from the last commit of ``directory``, to the weights an undisturbed run would have had."""
    with going_on(directory, DdpoConfig, trusted) as (manifest, config):
        run = DdpoRun.resume(manifest, config, changes)
        return _loop(run, preflight_ddpo(run.config.model_copy(update={"output_dir": None})), on_step)


def _loop(run: DdpoRun, plan: Plan, on_step: StepCallback) -> Path:
    with run:
        while True:
            try:
                with WorkerGroup(run.config, plan, run.display, run.profile) as workers:
                    return _train(run, workers, plan, on_step)
            except ActorLost as lost:  # one that cannot be replaced: the learner, or several with their node
                run.roll_back(lost)
                plan = replan(run.config, plan)


def _train(run: DdpoRun, workers: WorkerGroup, plan: Plan, on_step: StepCallback) -> Path:
    config, training = run.config, run.config.training
    queue = RolloutQueue(run, workers, PromptSchedule(plan.prompts, training.prompts_per_step, config.seed))
    history = PromptStatistics(config.advantage.history_size)
    report = Report(run, plan.frames)

    def evaluate(images: int) -> Evaluation:
        with run.stage("evaluate"):
            return workers.evaluate(images)

    if run.checkpoint is None:
        run.describe(plan.prompts, plan.roles, workers.ask_learner("micro_batch"), workers.ratio_bound(None))
        write_log(run.directory / "guard.jsonl", plan.refused)
        before = evaluate(config.evaluation.images)
        queue.request(run.step)  # drawn while the reward is calibrated
        report.before(before, calibrate(workers, *fitting_images(config, before)))
    else:
        workers.restore(run.checkpoint)
        run.ratio_bound = workers.ratio_bound(run.ratio_bound)
        history.restore(run.checkpoint.state["prompt_statistics"])
        queue.redo(run.step, run.checkpoint.state.get("drawn_by"))
        run.display.say(f"resumed after step {run.step}")

    held_out: Evaluation | None = None
    for step in run.remaining_steps():
        if report.over_optimised():
            break
        with run.stage("sample"):
            rollout = queue.rollout(step)  # at depth 1 the next step is drawn while this one is trained on
        try:
            with run.stage("reward"):
                rewards = workers.score(rollout)
                advantage = advantages(rewards, rollout.prompts, config.advantage, history)
        except DegenerateBatch as degenerate:
            metrics = run.skip_update(degenerate)
        else:
            with run.stage("learn"):
                update, weights = workers.train(rollout, advantage, derive_seed(config.seed, "timesteps", step))
            with run.stage("publish"):
                workers.update_weights(update, weights)
            metrics = step_metrics(rewards, advantage, update, rollout.images, rollout.prompts)
            metrics |= workers.unasked(rollout)

        measured = config.evaluation.size_after(step + 1, training.steps)
        held_out = evaluate(measured) if measured else None
        run.record(step, metrics | workers.footprint() | (held_out.metrics() if held_out else {}))
        if held_out:  # before the commit, after which nothing of this step is done again
            report.keep(step + 1, held_out, held_out.metrics())

        if run.commit_due():
            with run.stage("commit"):
                run.store.pinned = report.best_step()  # anew each time: a resumed run knows it from its evaluations
                known = {"prompt_statistics": history.state(), "drawn_by": queue.drawn_by}
                run.commit(workers.learner_state(), known, workers.accounts())
        on_step(run)

    kept = report.best_step(point_to_keep)
    if kept not in (None, run.step):  # the last weights do worse than others did, where nothing is trained
        workers.restore(run.store.load(kept))
        held_out = None
    whole = config.evaluation.images
    after = held_out if held_out and len(held_out.images) == whole else evaluate(whole)
    distilled = config.sampling.calls > SERVED_STEPS and is_distilled(config.model.path, config.sampling)
    served = workers.evaluate(whole, SERVED_STEPS) if distilled else None
    return report.finish(after, served, *workers.export(), workers.accounts())
