"""What a run leaves to look at: grids of fixed prompts and seeds, curves, before → after, summary, report."""

import io
import json
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.worker import Account
from orchestration.experiments.ddpo.evaluation import Evaluation
from orchestration.experiments.ddpo.run import DdpoRun, first_look
from orchestration.runs.browse import RunInfo, glance
from orchestration.runs.browse import facts as told
from orchestration.runs.evaluations import kept_evaluations, kept_step
from orchestration.runs.html_report import conclude
from orchestration.runs.run import TEMPLATES
from orchestration.runs.timeline import middle_of, read_spans
from orchestration.tracking.tracker import FIRST_LOOK, flatten
from pipelines.pages import fill
from pipelines.storage import atomic
from pipelines.storage.atomic import Content, DamagedFiles, Files
from pipelines.videos import gif
from policies.rl.over_optimisation import EvaluationPoint, best_point, over_optimised, point_to_keep

_RESULTS = {  # of the summary, each before and after
    "reward": "evaluation/reward",
    "evaluator_accuracy": "evaluator/full",
    "agreement": "evaluator/agreement",
    "diversity": "evaluation/diversity",
}
SERVED_STEPS = 2  # that a distilled model is drawn with after it was trained with more
_GRID_IMAGES = 12  # the first of the held-out ones
_VIDEOS = 6  # of a row of an animation: before in the first row, after in the second
_MOST_BYTES = 2**30  # of the images of an evaluation
_MOST_STEPS = 8  # in the picture of a run's progress
_GLANCE_PROMPTS, _GLANCE_STEPS = 2, 5  # of it on MLflow's page of the run


class Report:
    """The evaluations of a run, kept in its directory so that a resumed run still knows where it came from."""

    def __init__(self, run: DdpoRun, frames: int = 1) -> None:
        """``frames``: of a video, if videos are drawn."""
        self.run, self.frames = run, frames
        self.directory = run.directory / "evaluations"
        self.stopped: str | None = None
        self._named: set[str] = set()  # damage
        run.display.begin(self._kept().get(0, {}))  # of a run that goes on

    def before(self, evaluation: Evaluation, calibration: dict[str, float]) -> None:
        """The base model's measure, and whether the reward can tell images apart."""
        say = self.run.display.say
        values = evaluation.metrics() | calibration
        timestamp = self._kept().get(0, {}).get("timestamp_ms", int(time.time() * 1000))
        self.keep(0, evaluation, {**values, "timestamp_ms": timestamp})
        self.run.display.begin(values)
        self.run.tracker.metrics(0, first_look(values) | values, timestamp)
        say("calibration: mean reward " + ", ".join(f"{k.split('/')[1]} {v:.3f}" for k, v in calibration.items()))
        prefers = calibration["calibration/true"] > calibration["calibration/shuffled"]
        self.run.tracker.tags({"reward_prefers_fitting_images": "yes" if prefers else "no"})
        if self.run.config.reward.needs_captions and not prefers:
            say("warning: this reward does not prefer images that fit their prompts; it cannot teach them")
        accuracy = "" if evaluation.accuracy is None else f", evaluator accuracy {evaluation.accuracy:.3f}"
        say(f"before: reward {evaluation.scores.mean():.3f}{accuracy} over {len(evaluation.images)} held-out images")

    def points(self) -> list[EvaluationPoint]:
        """The evaluations up to the present step, the base's first."""
        return [
            EvaluationPoint(step, np.array(kept["measure"]), kept["measured_reward"])
            for step, kept in self._kept().items()
            if step <= self.run.step and {"measure", "measured_reward"} <= kept.keys()  # older runs have none
        ]

    def best_step(self, of: Callable[[Sequence[EvaluationPoint]], EvaluationPoint | None] = best_point) -> int | None:
        """The step that is best by the held-out measure, of those evaluated and committed; with ``point_to_keep``, the
        one whose weights are the run's result. None if nothing was evaluated, or the last weights are wanted."""
        if not self.run.config.evaluation.patience:
            return None
        committed = {self.run.step, *self.run.store.steps()}
        best = of([point for point in self.points() if point.step and point.step in committed])
        return best.step if best else None

    def over_optimised(self) -> bool:
        """Whether the run has to stop, as the last evaluations were below the best one. Says so, and shows images."""
        points, run, say = self.points(), self.run, self.run.display.say
        if points and points[-1].step == run.step:
            self.stopped = over_optimised(points, run.config.evaluation.patience)
        if self.stopped:
            say(f"warning: stopped after step {run.step}: {self.stopped}")
            say(f"look at {draw(run.directory, say) / 'progress.png'}")
            run.tracker.tags({"stopped": self.stopped})
        return self.stopped is not None

    def finish(
        self,
        after: Evaluation,
        served: Evaluation | None,
        weights_sha256: str,
        pipeline: Mapping[str, Content],
        accounts: Mapping[str, Account],
    ) -> Path:
        """Figures, the pipeline with its card, artifacts and the summary. ``served``: what a distilled model makes of
        its reward in :data:`SERVED_STEPS`. Returns the path of summary.json."""
        run, values = self.run, after.metrics()
        best = self.best_step(point_to_keep) or run.step
        self.keep(best, after, {**values, "kept": True})
        figures = draw(run.directory, say := run.display.say)
        before = self._kept().get(0, {})
        if not before:
            say(f"warning: {self._path(0, 'json')} is damaged or gone: nothing is said of before, nor of any gain")
        gained = {"reward": "evaluation/reward", "accuracy": "evaluator/full"}
        gains = {f"gain/{name}": values[key] - before[key] for name, key in gained.items() if key in before}
        told_at = run.history[-1].get("timestamp_ms") if run.history else None
        run.tracker.metrics(run.step, gains, told_at or int(time.time() * 1000))
        ends = {"before": before, "after": values}
        facts = {f"{name}_{end}": ends[end].get(key) for name, key in _RESULTS.items() for end in ends} | {
            "evaluation_images": len(after.images),
            "kept_step": best,
            "stopped": self.stopped,
            "calibration": {k: v for k, v in before.items() if k.startswith("calibration/")},
            "weights_sha256": weights_sha256,
            "pipeline": str(run.directory / "pipeline"),
        }
        if served:
            found = {name: served.metrics().get(key) for name, key in _RESULTS.items()}
            facts["served"] = {"steps": SERVED_STEPS, **found}
            known = [f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.items() if value is not None]
            say(f"served in {SERVED_STEPS} steps, of {run.config.sampling.calls}: {', '.join(known)}")
        lora, shown = any(name.startswith("lora/") for name in pipeline), after.prompts[:_GRID_IMAGES]
        files = {**pipeline, **self._card(facts, figures, lora, list(dict.fromkeys(shown)))}
        atomic.commit_directory(run.directory / "pipeline", files, {"weights_sha256": weights_sha256})
        run.tracker.artifact(run.store.path(best), "checkpoints")
        if best != run.step:
            say(f"kept: the weights after step {best} of {run.step}, better by the held-out measure")
        path = run.summarise(facts | run.totals(accounts))
        ended = glance(told(RunInfo(run.directory)))
        gained_in_words = ", ".join(f"{name} {ended[name]}" for name in ("reward", "held-out accuracy") if ended[name])
        return conclude(run, path, gained_in_words, run.directory / "pipeline", before=before, after=values)

    def _card(self, facts: dict[str, Any], figures: Path, lora: bool, prompts: list[str]) -> Files:
        """What model hubs show of a pipeline: README.md and its pictures."""
        config = self.run.config
        blocks = config.model_dump(mode="json", include={"model", "reward", "sampling", "training", "advantage"})
        text = fill(
            TEMPLATES / "model_card.md",
            config=config,
            settings={key: json.dumps(value) for key, value in flatten(blocks).items()},
            facts=facts,
            prompts=prompts,
            lora=lora,
            commit=self.run.manifest["git_commit"],
            mlflow_run=self.run.tracker.run_id,
        )
        drawn = [figures / name for name in ("before_after.png", "curves.png")]
        pictures = {path.name: path.read_bytes() for path in drawn if path.exists()}
        return {"README.md": text.encode(), **pictures}

    def keep(self, step: int, evaluation: Evaluation, values: Mapping[str, Any]) -> None:
        """Keep a measure after ``step``, with its ``values``."""
        from pipelines.figures.plots import image_grid

        self.directory.mkdir(exist_ok=True)
        compared, images = self.run.config.evaluation.interim_images, evaluation.images[:_GRID_IMAGES]
        np.savez(packed := io.BytesIO(), images=images)
        atomic.write_durably(self._path(step, "npz"), packed.getvalue())
        content = {
            **values,
            **({"frames": self.frames} if self.frames > 1 else {}),
            "prompts": evaluation.prompts[:_GRID_IMAGES],
            "captions": (evaluation.captions or [])[:_GRID_IMAGES] or None,
            "measure": evaluation.measure[:compared].round(6).tolist(),
            "measured_reward": float(evaluation.scores[:compared].mean()),
        }
        atomic.write_json(self._path(step, "json"), atomic.with_digest(content))
        self.run.tracker.image(f"{FIRST_LOOK}/held_out", image_grid(images), step)

    def _kept(self) -> dict[int, dict[str, Any]]:
        """The evaluations so far. Each that is damaged is named, once."""
        damaged: list[str] = []
        kept = kept_evaluations(self.run.directory, damaged)
        for each in sorted({*damaged} - self._named):
            self.run.display.say(f"warning: {each}; it is left out")
        self._named |= {*damaged}
        return kept

    def _path(self, step: int, kind: str) -> Path:
        return self.directory / f"step-{step:06d}.{kind}"


def draw(directory: Path, say: Callable[[str], None] = print) -> Path:
    """Every figure that a run's evaluations and journal have something for, done or not. Returns their directory. What
    is damaged is left out, and named."""
    from pipelines.figures.mad import generations_grid
    from pipelines.figures.plots import before_after, curves, timeline

    figures, kept = directory / "figures", kept_evaluations(directory)
    if not kept:
        return figures
    figures.mkdir(exist_ok=True)
    steps, last = list(kept), kept_step(kept)
    picked = _some(steps, _MOST_STEPS)
    packed = {step: _images(directory / "evaluations" / f"step-{step:06d}.npz", say) for step in {*picked, last}}
    images = {step: each for step, each in packed.items() if each is not None}
    first = kept[picked[0]]

    def pairs() -> None:
        before, after = images[picked[0]], images[last]
        shown = min(len(before), len(after))
        captions = (each["captions"] and each["captions"][:shown] for each in (first, kept[last]))
        before_after(figures / "before_after.png", before[:shown], after[:shown], first["prompts"][:shown], *captions)

    def videos() -> None:
        if (frames := first.get("frames", 1)) > 1:
            shown = np.concatenate([images[step][:_VIDEOS] for step in dict.fromkeys([picked[0], last])])
            atomic.write_durably(figures / "videos.gif", gif(shown, frames, min(_VIDEOS, len(images[last]))))

    def strips(path: Path, prompts: int, there: Sequence[int], glance: bool) -> None:
        shown = min(prompts, *(len(images[step]) for step in there))
        grid = np.stack([images[step][:shown] for step in there], axis=1)
        rewards = [kept[step].get("measured_reward", kept[step]["evaluation/reward"]) for step in there]
        above = [f"step {step}\nreward\n{reward:.3f}" for step, reward in zip(there, rewards, strict=True)]
        above = [f"step {there[0]}", *map(str, there[1:])] if glance else above
        generations_grid(path, grid, first["prompts"][:shown], above, glance)

    def progress() -> None:
        there = [step for step in picked if step in images]
        strips(figures / "progress.png", _GRID_IMAGES, there, glance=False)
        strips(figures / "glance_1.png", _GLANCE_PROMPTS, _some(there, _GLANCE_STEPS), glance=True)

    def courses() -> None:
        measured = {k: v for k, v in first.items() if k.startswith(("evaluator/", "evaluation/", "unseen/"))}
        start = [{"step": 0, "reward/mean": first["evaluation/reward"], **measured}] if picked[0] == 0 else []
        history = [*start, *atomic.read_lines(directory / "metrics.jsonl", ["step"])]
        curves(figures / "curves.png", history)
        curves(figures / "glance_2.png", history, glance=True)

    def lanes() -> None:
        if window := middle_of(read_spans(directory)):
            timeline(figures / "timeline.png", window)

    drawn = {"before_after.png": pairs, "videos.gif": videos, "progress.png": progress, "curves.png": courses}
    for name, picture in (drawn | {"timeline.png": lanes}).items():
        try:
            picture()
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            say(f"warning: {figures / name} is not drawn: what it shows is damaged or gone in {directory} ({what})")
    return figures


def _some(steps: Sequence[int], most: int) -> list[int]:
    """At most so many of them, the first and the last among them."""
    return [steps[round(at)] for at in np.linspace(0, len(steps) - 1, min(len(steps), most))]


def _images(path: Path, say: Callable[[str], None]) -> np.ndarray | None:
    """The images (n, height, width, 3) uint8 that an evaluation kept; None if they are damaged, which is said."""
    try:
        with np.load(io.BytesIO(atomic.read_bytes(path))) as packed:
            if sum(each.file_size for each in packed.zip.infolist()) > _MOST_BYTES:
                raise ValueError(f"it unpacks to more than {_MOST_BYTES / 1e6:,.0f} MB")
            images = packed["images"]
        if images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3 and images.size:
            return images
        say(f"warning: {path} holds no images; it is left out")
    except (DamagedFiles, KeyError, ValueError, OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        say(f"warning: {path} is left out: {type(error).__name__}: {error}")
    return None
