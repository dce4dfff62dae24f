"""What a MAD experiment leaves to look at: summary.json, figures, report.html, and the last lines on the terminal."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from orchestration.experiments.mad.analysis import DISTANCES, comparisons, effective_samples, fresh_series, verdict
from orchestration.experiments.mad.config import DeriveSettings
from orchestration.experiments.mad.run import MadRun
from orchestration.runs.html_report import conclude
from pipelines.storage.names import file_name
from policies.common.intervals import interval, scale_of
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
_CURVES = (*_TITLES, "precision", "recall", "label_accuracy", "memorisation")
_GRID_COLUMNS, _MOST_ROWS = 16, 10


def report(run: MadRun) -> Path:
    """Write figures and summary.json, hand both to MLflow, and say what came out. Returns the summary's path."""
    summary = summarise(run)
    path = run.summarise(summary, indent=None)  # it has a number a universe and generation
    run.flush()
    for name, arm in summary["arms"].items():
        if arm["verdict"] and (tracker := run.tracker_of(name)):
            tracker.tags({"goes_mad": arm["verdict"]["goes_mad"]})
    return conclude(run, path, draw(run), summary=summary)


def summarise(run: MadRun) -> dict[str, Any]:
    """What machines read of an experiment."""
    config = run.config
    arms: dict[str, dict[str, Any]] = {}
    for name, arm in config.resolved_arms.items():
        exact, values = run.laws[name], run.values[name]
        arms[name] = {
            "settings": arm.described | arm.family_settings(),
            "sizes": [[m.size - (s := _synthetic(m)), s] for m in run.experiment.manifests[name]],
            "metrics": {metric: _metric(metric, values[metric], exact.get(metric)) for metric in values},
            "verdict": verdict(values),
        }
        if run.histograms[name]:
            arms[name]["class_histogram"] = _mean_histograms(run, name)
        if config.derive != DeriveSettings() and arm.underivable(config.generations) is None:
            arms[name]["effective_samples"] = plain(effective_samples(arm, values, config))
    return {
        "name": config.name,
        "generations": config.generations,
        "seeds": config.seed_list,
        "arms": arms,
        "floor": _floors(run),
        "comparisons": plain(comparisons(config, run.values, run.experiment.manifests)),
        "extractor_sha256": _extractor_hash(run),
        "seconds_by_generation": _seconds_by_generation(run),
    }


def draw(run: MadRun) -> Path:
    """Every figure the experiment has something for. Returns their directory."""
    from pipelines.figures import mad as mad_figures

    directory, config = run.directory / "figures", run.config
    directory.mkdir(exist_ok=True)
    shown = [metric for metric in _CURVES if any(metric in values for values in run.values.values())]
    curves = {metric: {name: v[metric] for name, v in run.values.items() if metric in v} for metric in shown}
    theory = {metric: {name: found[metric] for name, found in run.laws.items() if metric in found} for metric in shown}
    floors = {k: value for found in _floors(run).values() for k, value in found.items() if k in shown}
    mad_figures.arm_curves(directory / "curves.png", curves, theory, floors, titles=_TITLES)
    paths = {name: (v["precision"], v["recall"]) for name, v in run.values.items() if "precision" in v}
    if paths:
        mad_figures.precision_recall_paths(directory / "precision_recall.png", paths)
    for metric in DISTANCES:
        series = fresh_series(config, run.values, metric)
        if series is not None:
            path, floor = directory / "fresh_fraction.png", floors.get(metric)
            mad_figures.fresh_fraction_curve(path, *series, floor, _TITLES[metric], scale_of(metric))
    for name in config.resolved_arms:
        _draw_samples(run, name, directory)
    return directory


def _draw_samples(run: MadRun, name: str, directory: Path) -> None:
    """The first seed's samples, generation by generation, from the same latent seeds; and its class histogram."""
    from pipelines.figures import mad as mad_figures
    from pipelines.generators import load_generator
    from pipelines.mad.tasks import evaluation_points, read_samples

    arm, first = run.config.resolved_arms[name], run.config.seed_list[0]
    chain = [each for each in run.generations if each.arm == name and each.seeds[0] == first]
    picked = [chain[i] for i in sorted({round(i) for i in np.linspace(0, len(chain) - 1, min(len(chain), _MOST_ROWS))})]
    file = file_name(name)
    if not arm.generator.closed_form:
        sets = [read_samples(run.store.load(each.evaluation.key)).values[0] for each in picked if each.evaluation]
        rows = np.stack([images[:_GRID_COLUMNS] for images in sets])
        mad_figures.generations_grid(directory / f"samples_{file}.png", rows, [f"G{each.number}" for each in picked])
        shares = np.array(_mean_histograms(run, name))
        mad_figures.class_heatmap(directory / f"classes_{file}.png", shares)
    elif not arm.generator.many_universes:
        points = {}
        for each in picked:
            model = load_generator(arm.family, run.store.load(each.fit.key))
            points[f"G{each.number}"], real = evaluation_points(model, each.measure.parameters)
        mad_figures.points_grid(directory / f"samples_{file}.png", points, real)


def _floors(run: MadRun) -> dict[str, dict[str, float]]:
    """By family, what the metrics say of real samples."""
    tasks = run.experiment.floors
    return {family: {k: v[0] for k, v in run.metrics_of(task).items()} for family, task in tasks.items()}


def _metric(metric: str, values: np.ndarray, exact: np.ndarray | None) -> dict[str, Any]:
    """One metric for machines: ``values`` as seeds × generations, their means and 95 % intervals, the exact law."""
    found = dict(zip(("values", "mean", "low", "high"), (values, *interval(values, scale_of(metric))), strict=True))
    content: dict[str, Any] = plain(found if exact is None else found | {"oracle": exact})
    return content


def _synthetic(manifest: Any) -> int:
    """Synthetic samples in a training set (in expectation, where it is a draw)."""
    whole = sum(part.size for part in manifest.parts)
    synthetic = sum(part.size for part in manifest.parts if part.role == "synthetic")
    return round(synthetic * manifest.size / whole)


def _mean_histograms(run: MadRun, name: str) -> list[list[float]]:
    """Class shares (generations, classes), the mean over seeds."""
    held = run.histograms[name]
    generations = range(1, run.config.generations + 1)
    return [np.mean([held[seed, number] for seed in run.config.seed_list], axis=0).tolist() for number in generations]


def _extractor_hash(run: MadRun) -> str | None:
    tasks = {source.extractor.key for source in run.experiment.sources.values() if source.extractor}
    hashes = [json.loads(run.store.load(key)["about.json"])["sha256"] for key in tasks]
    return hashes[0] if hashes else None


def _seconds_by_generation(run: MadRun) -> dict[str, list[float]]:
    """CPU seconds (generations,) of each kind of task, the mean over the tasks that were done."""
    spent: dict[str, dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for each in run.generations:
        for task in (each.fit, *(batch.task for batch in each.drawn), each.evaluation, each.measure):
            if task is not None and task.key in run.store:
                spent[task.kind][each.number][task.key] = run.store.about(task.key).get("cpu_seconds", 0.0)
    numbers = range(1, run.config.generations + 1)
    return {kind: [round(float(np.mean([*by[n].values()] or [0])), 3) for n in numbers] for kind, by in spent.items()}
