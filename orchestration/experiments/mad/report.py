"""What a MAD experiment leaves to look at: summary.json, figures, report.html, and the last lines on the terminal."""

import json
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from orchestration.experiments.mad.analysis import DISTANCES, comparisons, effective_samples, fresh_series, verdict
from orchestration.experiments.mad.run import MadRun
from orchestration.runs.html_report import conclude
from pipelines.mad.tasks import read_real_data
from pipelines.storage.names import file_name
from policies.common.intervals import scale_of, summary_of
from policies.loops.verdicts import plain

_TITLES = {
    "fid": "FID",
    "frechet": "Fréchet distance",
    "w2_squared": "W₂² to the truth",
    "variance": "variance, tr Σ / d",
    "mean_square": "‖μ‖² / d",
    "log_det": "log det Σ",
    "heterozygosity": "heterozygosity, 1 − Σp²",
    "modes_covered": "modes covered",
}
_CURVES = (*_TITLES, "precision", "recall", "label_accuracy", "prompt_accuracy", "reward", "memorisation")
_GRID_COLUMNS, _MOST_ROWS = 16, 10


def report(run: MadRun, figures: bool) -> Path:
    """Write summary.json and, if they are wanted, figures, hand both to MLflow, and say what came out. Returns the
    summary's path."""
    summary = summarise(run)
    path = run.summarise(summary, indent=None)  # it has a number a universe and generation
    run.flush()
    if len(summary["arms"]) == 1:  # what a list of runs, or of a sweep's trials, is sorted by
        (only,) = summary["arms"].values()
        last = {metric: held["mean"][-1] for metric, held in only["metrics"].items()}
        found = {metric: value for metric, value in last.items() if value is not None}
        run.tracker.metrics(run.config.generations, found, int(time.time() * 1000))
    for name, arm in summary["arms"].items():
        if arm["verdict"] and (tracker := run.tracker_of(name)):
            tracker.tags({"goes_mad": arm["verdict"]["goes_mad"]})
    if figures:
        draw(run)
    verdicts = Counter(arm["verdict"]["goes_mad"] for arm in summary["arms"].values() if arm["verdict"])
    counts = [f"{answer} ({count} of {len(summary['arms'])} arms)" for answer, count in verdicts.items()]
    words = f"goes MAD: {', '.join(counts) or 'no verdict'}"
    return conclude(run, path, words, summary=summary)


def summarise(run: MadRun) -> dict[str, Any]:
    """What machines read of an experiment."""
    config, images, floors = run.config, run.experiment.images, _floors(run)
    arms: dict[str, dict[str, Any]] = {}
    for name, arm in config.resolved_arms.items():
        values, laws = run.values[name], {metric: {"oracle": law} for metric, law in run.laws[name].items()}
        metrics = {metric: summary_of(metric, held) | laws.get(metric, {}) for metric, held in values.items()}
        sizes = [
            [manifest.size - manifest.synthetic, manifest.synthetic] for manifest in run.experiment.manifests[name]
        ]
        settings = arm.described | arm.family_settings()
        judged = verdict(values, floors.get(arm.family))
        arms[name] = {"settings": settings, "sizes": sizes, "metrics": plain(metrics), "verdict": judged}
        if run.histograms[name]:
            arms[name]["class_histogram"] = _mean_histograms(run, name)
        if config.derive and arm.underivable(config.generations) is None:
            arms[name]["effective_samples"] = plain(effective_samples(arm, values, config))
    extractor = json.loads(run.store.load(images.extractor.key)["about.json"]) if images and images.extractor else {}
    return {
        "name": config.name,
        "generations": config.generations,
        "seeds": config.seed_list,
        "arms": arms,
        "floor": floors,
        "comparisons": plain(comparisons(config, run.values, run.experiment.manifests)),
        "extractor_sha256": extractor.get("sha256"),
        "labels": _labels(run),
        "seconds_by_generation": _seconds_by_generation(run),
    }


def _labels(run: MadRun) -> dict[str, Any] | None:
    """Of real images that came with labels in part: how many did, of how many, and what gave the others theirs."""
    source = run.experiment.images
    if source is None or source.labeller is None or source.data is None:
        return None
    given = read_real_data(run.store.load(source.data.key))["pool_labelled"]
    return {"given": int(given.sum()), "pool": len(given), "labeller": dict(source.labeller)}


def draw(run: MadRun) -> None:
    """Every figure the experiment has something for."""
    from pipelines.figures import mad as mad_figures

    directory, by_arm = run.directory / "figures", run.values
    directory.mkdir(exist_ok=True)
    shown = [metric for metric in _CURVES if any(metric in values for values in by_arm.values())]
    curves, theory = (
        {metric: {name: held[metric] for name, held in found.items() if metric in held} for metric in shown}
        for found in (by_arm, run.laws)
    )
    floors = {k: value for found in _floors(run).values() for k, value in found.items() if k in shown}
    mad_figures.arm_curves(directory / "curves.png", curves, theory, floors, titles=_TITLES)
    few = {metric: curves[metric] for metric in shown[:3]}
    mad_figures.arm_curves(directory / "glance.png", few, theory, floors, titles=_TITLES, glance=True)
    if paths := {name: (held["precision"], held["recall"]) for name, held in by_arm.items() if "precision" in held}:
        mad_figures.precision_recall_paths(directory / "precision_recall.png", paths)
    for metric in DISTANCES:
        if (series := fresh_series(run.config, by_arm, metric)) is not None:
            path, floor = directory / "fresh_fraction.png", floors.get(metric)
            mad_figures.fresh_fraction_curve(path, *series, floor, _TITLES[metric], scale_of(metric))
    for name in by_arm:
        _draw_samples(run, name, directory)


def _draw_samples(run: MadRun, name: str, directory: Path) -> None:
    """The first seed's samples, generation by generation, from the same latent seeds, below real ones; and its class
    histogram."""
    from pipelines.figures import mad as mad_figures
    from pipelines.generators import load_generator
    from pipelines.mad.tasks import evaluation_points, read_samples

    arm, first = run.config.resolved_arms[name], run.config.seed_list[0]
    chain = [each for each in run.generations if each.arm == name and each.seeds[0] == first]
    picked = [chain[i] for i in sorted({round(i) for i in np.linspace(0, len(chain) - 1, min(len(chain), _MOST_ROWS))})]
    labels, path = [f"G{each.number}" for each in picked], directory / f"samples_{file_name(name)}.png"
    if not arm.generator.closed_form:
        stored = [run.store.load(each.evaluation.key) for each in picked if each.evaluation]
        sets = [read_samples(files, _GRID_COLUMNS).values[0] for files in stored]
        if real := run.experiment.sources[name].data:  # what the others should look like
            sets, labels = [read_real_data(run.store.load(real.key))["reference"], *sets], ["real", *labels]
        columns = min(_GRID_COLUMNS, *map(len, sets))
        mad_figures.generations_grid(path, np.stack([images[:columns] for images in sets]), labels)
        if run.histograms[name]:
            path = directory / f"classes_{file_name(name)}.png"
            mad_figures.class_heatmap(path, np.array(_mean_histograms(run, name)))
    elif not arm.generator.many_universes:
        models = [load_generator(arm.family, run.store.load(each.fit.key)) for each in picked]
        clouds = [evaluation_points(model, each.measure.parameters) for model, each in zip(models, picked, strict=True)]
        points = {label: drawn for label, (drawn, _) in zip(labels, clouds, strict=True)}
        mad_figures.points_grid(path, points, reference=clouds[-1][1])


def _floors(run: MadRun) -> dict[str, dict[str, float]]:
    """By family, what the metrics say of real samples."""
    floors = {family: run.measured(task)[0] for family, task in run.experiment.floors.items()}
    return {family: {metric: values[0] for metric, values in metrics.items()} for family, metrics in floors.items()}


def _mean_histograms(run: MadRun, name: str) -> list[list[float]]:
    """Class shares (generations, classes), the mean over seeds."""
    held, seeds = run.histograms[name], run.config.seed_list
    return [np.mean([held[s, n] for s in seeds], axis=0).tolist() for n in range(1, run.config.generations + 1)]


def _seconds_by_generation(run: MadRun) -> dict[str, list[float]]:
    """CPU seconds (generations,) of each kind of task, the mean over the tasks that were done."""
    spent: dict[str, dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for each in run.generations:
        for task in (each.fit, *(batch.task for batch in each.drawn), each.evaluation, each.measure):
            if task is not None and task.key in run.store:
                spent[task.kind][each.number][task.key] = run.store.about(task.key).get("cpu_seconds", 0.0)
    numbers = range(1, run.config.generations + 1)
    return {kind: [round(float(np.mean([*by[n].values()] or [0])), 3) for n in numbers] for kind, by in spent.items()}
