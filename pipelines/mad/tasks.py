"""What the tasks of a self-consuming loop do: pure functions from parameters and files to files.

Closed-form families draw samples wherever they are needed: a draw is a function of (model, seed, bias, number) and
cheaper than storing it. Families that train a network do one universe a task, and their samples are stored.
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines.data.real_data import RealData, ledger_order
from pipelines.generators import GENERATORS, Generator, load_generator
from pipelines.mad.captions import load_captioner, recaptioned, refit
from pipelines.mad.drawing import draw
from pipelines.refinements import REFINEMENTS
from pipelines.storage.atomic import Files, packed, unpacked
from pipelines.storage.locations import resolve_model
from policies.common.seeding import derive_seed
from policies.loops.rules.curated import BUILT_IN
from policies.loops.samples import Samples
from policies.loops.training_sets import REAL, Manifest, Part

Parameters = Mapping[str, Any]


def perform(kind: str, parameters: Parameters, inputs: list[Files], device: str) -> Files:
    """Do one task."""
    return _TASKS[kind](parameters, inputs, device)


def real_data_files(real: RealData, pool: np.ndarray, reference: np.ndarray) -> Files:
    """Real images as the result of a task: the pool that models learn from, and the reference that none ever sees."""
    images = real.images
    arrays = {"pool": images[pool], "pool_rows": pool, "reference": images[reference], "reference_rows": reference}
    if real.labels is not None:
        arrays["pool_labels"] = real.labels[pool]
    if real.captions is not None:
        arrays["pool_captions"] = real.captions[pool]
    return _arrays_file(arrays)


def _arrays_file(arrays: Mapping[str, Any]) -> Files:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return {"real.npz": buffer.getvalue()}


def read_real_data(files: Files) -> dict[str, np.ndarray]:
    """The arrays of :func:`real_data_files`; and of images whose labels were completed ``pool_labelled`` (n,): which of
    them came with theirs."""
    with np.load(io.BytesIO(files["real.npz"])) as arrays:
        return dict(arrays)


def read_rows(files: Files, first: int | None = None) -> dict[str, Any]:
    """What is stored of the samples of one universe, or of so many of the ``first``, column by column."""
    from datasets import Dataset

    def load(directory: Path) -> dict[str, Any]:
        rows: dict[str, Any] = Dataset.load_from_disk(directory).with_format("numpy")[:first]
        return rows

    read: dict[str, Any] = unpacked(files, load)
    return read


def read_samples(files: Files, first: int | None = None) -> Samples:
    """The stored samples of one universe, or so many of the ``first``."""
    rows = read_rows(files, first)
    images = np.stack([np.asarray(image, np.uint8) for image in rows["image"]])
    images = images[..., None] if images.ndim == 3 else images
    unlabelled = rows["label"].dtype.kind != "i"  # a column of nothing is read as numbers that are not
    labels = None if unlabelled else rows["label"][None]
    captions = np.array(rows["caption"], dtype=str)[None] if "caption" in rows else None
    return Samples(images[None], labels, captions=captions)


def evaluation_points(model: Generator, parameters: Parameters) -> tuple[np.ndarray, np.ndarray]:
    """Points (n, 2) that the first universe's model draws for its evaluation, and as many real ones."""
    count, seed = parameters["samples"], parameters["seeds"][0]
    drawn = model.sample(count, [derive_seed(seed, "evaluation")], parameters["sampling_bias"])
    return drawn.values[0], _reference_points(parameters)


def _reference_points(parameters: Parameters, stream: str = "reference") -> np.ndarray:
    kind, settings = _generator(parameters)
    truth: Samples = kind.truth(settings, [derive_seed(0, stream)], 0, parameters["samples"])
    return truth.values[0]


def _generator(parameters: Parameters) -> tuple[Any, Any]:
    """The class of a task's generator, and its settings."""
    kind = GENERATORS.find(parameters["family"])
    return kind, kind.schema(**parameters["settings"])


def _fit(parameters: Parameters, inputs: list[Files], device: str) -> Files:
    """Train a generation's model on the samples of its manifest."""
    (kind, settings), seeds = _generator(parameters), parameters["seeds"]
    start = load_generator(parameters["family"], inputs[-1], device) if parameters["fine_tunes"] else None
    data, ids = _training_set(parameters, inputs)
    streams = [derive_seed(seed, "initialisation", parameters["manifest"]["generation"]) for seed in seeds]
    files = packed(kind.fit(settings, data, streams, start=start, device=device).save)
    return files if kind.closed_form else files | {"training_set.json": json.dumps(ids).encode()}


def _refine(parameters: Parameters, inputs: list[Files], device: str) -> Files:
    """Do to a fitted model what its arm does before it draws."""
    (_, settings), seeds = _generator(parameters), parameters["seeds"]
    refinement = REFINEMENTS.find(parameters["refinement"]).model_validate(parameters["how"])
    model = load_generator(parameters["family"], inputs[0], device)
    streams = [derive_seed(seed, "refinement", parameters["generation"]) for seed in seeds]
    return packed(refinement.refine(model, settings, streams, parameters["sampling_bias"], device).save)


def _captioner(parameters: Parameters, inputs: list[Files], device: str) -> Files:
    """Train the captioner on, with the training set of a generation."""
    (_, settings), (seed,) = _generator(parameters), parameters["seeds"]
    data, _ = _training_set(parameters, inputs)
    stream = derive_seed(seed, "captioner", parameters["manifest"]["generation"])

    def trained(start: Path | None) -> Files:
        how = settings.captioner, start, data, parameters["updates"], stream, device
        return packed(lambda directory: refit(*how, directory))

    return unpacked(inputs[-1], trained) if parameters["trained"] else trained(None)


def _sample(parameters: Parameters, inputs: list[Files], device: str) -> Files:
    """Draw one universe's samples, for training or for evaluation. Each row says where it comes from."""
    from datasets import Dataset, Features, Image, Value, disable_progress_bars

    model = load_generator(parameters["family"], inputs[0], device)
    count, seeds, bias = parameters["count"], parameters["seeds"], parameters["sampling_bias"]
    if parameters["role"] == "evaluation":  # the same latent seeds at every generation: pictures can be compared
        drawn = model.sample(count, [derive_seed(seed, "evaluation") for seed in seeds], bias)
    else:
        selection, start, generation = parameters["selection"], parameters["start"], parameters["generation"]
        captions = parameters.get("captions", {})
        judges = inputs[1:-1] if captions.get("refitted") else inputs[1:]
        real = _first_real(judges[-1], seeds) if selection and "real" in selection else None
        extractor = _load_extractor(judges[0], device) if judges[: -1 if real else None] else None
        scorer = _scorer(model.settings, selection, device) if selection and model.captioned else None
        drawn = draw(model, count, seeds, generation, bias, selection, extractor, start, scorer=scorer, real=real)
        if captions:
            load = partial(load_captioner, model.settings.captioner, device=device)
            captioner = unpacked(inputs[-1], load) if captions["refitted"] else load(None)
            stream = derive_seed(seeds[0], "captions", generation, start)
            drawn = recaptioned(drawn, captions["share"], captioner, stream)
    about = {"role": ("string", parameters["role"]), "generation": ("int32", parameters["generation"])}
    about |= {"seed": ("int64", seeds[0]), "checkpoint": ("string", parameters["checkpoint"])}
    about |= {"sampling_bias": ("float64", bias)}
    rows = {
        "image": [image.squeeze(-1) if image.shape[-1] == 1 else image for image in drawn.values[0]],
        "label": [None] * count if drawn.labels is None else drawn.labels[0].tolist(),
        **{name: [value] * count for name, (_, value) in about.items()},
    }
    kinds = {"image": Image(), "label": Value("int64")} | {name: Value(kind) for name, (kind, _) in about.items()}
    more = {**drawn.notes, **({} if drawn.captions is None else {"caption": drawn.captions})}
    rows |= {name: list(values[0].tolist()) for name, values in more.items()}
    kinds |= {name: _column(values) for name, values in more.items()}
    disable_progress_bars()
    return packed(Dataset.from_dict(rows, features=Features(kinds)).save_to_disk)


def _first_real(files: Files, seeds: Sequence[int]) -> Callable[[int], Samples]:
    """The real images of generation 1: the first of the pool in the order of the universe."""
    pool = read_real_data(files)["pool"]
    return lambda count: Samples(pool[ledger_order(len(pool), seeds[0])[:count]][None])


def _column(values: np.ndarray) -> Any:
    """What a data set calls the type of ``values`` (universes, n, …)."""
    from datasets import List, Value

    kind = Value("string" if values.dtype.kind == "U" else str(values.dtype))
    return List(kind) if values.ndim > 2 else kind


def _scorer(settings: Any, selection: Mapping[str, Any], device: str) -> Callable[[Samples], np.ndarray] | None:
    """What scores candidates in words' loops: a reward of docs/rewards.md; None: the rule has no such."""
    from pipelines.scoring import Scorer
    from pipelines.settings import RewardSettings

    if (name := selection.get("reward", BUILT_IN[0])) in BUILT_IN:
        return None
    options = selection.get("options")
    reward = RewardSettings(function=name, options={name: options} if options else {})
    scorer = Scorer(reward, settings.captioner, device)

    def scored(drawn: Samples) -> np.ndarray:
        assert drawn.captions is not None
        return scorer(drawn.values[0], drawn.captions[0].tolist())

    return scored


def _label(parameters: Parameters, inputs: list[Files], device: str) -> Files:
    """The real images, all of the pool with labels: MAVEN, trained on all of it, gives those without one theirs."""
    from pipelines.generators.maven import Maven, MavenSettings

    real, settings = read_real_data(inputs[0]), MavenSettings(**parameters["settings"])
    pool, given = real["pool"], real["pool_labels"]
    seeds = [derive_seed(parameters["seed"], "labeller")]
    model = Maven.fit(settings, Samples(pool[None], given[None]), seeds, device=device)
    labels = np.where(given < 0, model.classify(pool).argmax(axis=1), given)
    files = {f"labeller/{name}": content for name, content in packed(model.save).items()}
    return {**_arrays_file(real | {"pool_labels": labels, "pool_labelled": given >= 0}), **files}


def _extractor(parameters: Parameters, inputs: list[Files], device: str) -> Files:
    """The frozen eye of the image metrics, trained on the pool or given, and what it sees of the reference."""
    from pipelines.measures.features import train_extractor

    real, seed = read_real_data(inputs[0]), derive_seed(0, "extractor")
    if inputs[1:]:
        extractor, files = _load_extractor(inputs[1], device), inputs[1]
    else:
        extractor = train_extractor(real["pool"], real.get("pool_labels"), parameters["classes"], seed, device)
        files = packed(extractor.save)
    np.save(buffer := io.BytesIO(), extractor.features(real["reference"]))
    about = json.dumps({"sha256": extractor.sha256}).encode()
    return {**files, "about.json": about, "reference.npy": buffer.getvalue()}


def _load_extractor(files: Files, device: str) -> Any:
    from pipelines.measures.features import load_extractor

    return unpacked(files, lambda directory: load_extractor(directory, device))


def _measure(parameters: Parameters, inputs: list[Files], device: str) -> Files:
    """The metrics of a generation: for each name one value a universe."""
    kind, settings = _generator(parameters)
    if kind.closed_form:
        model = load_generator(parameters["family"], inputs[0])
        points = () if kind.many_universes else evaluation_points(model, parameters)
        return _metrics(kind.compare(settings, *points) if points else model.measure())
    from pipelines.measures.distances import measure_images

    drawn, real, extractor = read_samples(inputs[0]), read_real_data(inputs[1]), _load_extractor(inputs[2], device)
    training, _ = _training_set(parameters, inputs[3:])
    images, labels = drawn.values[0], None if drawn.labels is None else drawn.labels[0]
    reference = real["reference"], np.load(io.BytesIO(inputs[2]["reference.npy"]))
    classes = parameters["classes"]
    figures, shares = measure_images(images, labels, *reference, training.values[0], extractor, classes)
    if drawn.captions is not None:
        figures |= measure_words(images, drawn.captions[0].tolist(), settings, parameters.get("reward"), device)
    return _metrics(figures, shares)


def _floor(parameters: Parameters, inputs: list[Files], device: str) -> Files:
    """The real-versus-real floor: what the metrics say of real samples in place of generated ones."""
    if not inputs:
        kind, settings = _generator(parameters)
        points = (_reference_points(parameters, stream) for stream in ("floor", "reference"))
        return _metrics(kind.compare(settings, *points))
    from pipelines.measures.distances import measure_images

    data, extractor = read_real_data(inputs[0]), _load_extractor(inputs[1], device)
    order = np.random.default_rng(derive_seed(0, "floor")).permutation(len(data["pool"]))
    apart, rest = np.split(order, [len(data["reference"])])
    pool, classes = data["pool"], parameters["classes"]
    labels = data["pool_labels"][apart] if "pool_labels" in data else None
    reference = data["reference"], np.load(io.BytesIO(inputs[1]["reference.npy"]))
    return _metrics(*measure_images(pool[apart], labels, *reference, pool[rest], extractor, classes))


def measure_words(
    images: np.ndarray, prompts: Sequence[str], settings: Any, reward: Mapping[str, Any] | None, device: str
) -> dict[str, float]:
    """How well ``images`` (n, height, width, 3) show their ``prompts``: by the judge, in the captioner's words, and by
    the reward that a loop is led by, as far as there are such."""
    from pipelines.measures.evaluator import load_evaluator
    from pipelines.scoring import Scorer, agreement, captioned
    from pipelines.settings import RewardSettings

    found = {}
    if settings.evaluator:
        verdict = load_evaluator(resolve_model(settings.evaluator), device).judge(images, prompts)
        found["prompt_accuracy"] = float(verdict["full"].mean())
    if settings.captioner:
        captioner = load_captioner(settings.captioner, None, device)
        found["caption_agreement"] = agreement(captioned(captioner, images), prompts)
    if reward:
        scorer = Scorer(RewardSettings(**reward), settings.captioner, device)
        found["reward"] = float(scorer(images, prompts).mean())
    return found


_TASKS: dict[str, Callable[[Parameters, list[Files], str], Files]] = {
    "label": _label,
    "fit": _fit,
    "refine": _refine,
    "captioner": _captioner,
    "sample": _sample,
    "extractor": _extractor,
    "measure": _measure,
    "floor": _floor,
}


def _metrics(values: Mapping[str, float | np.ndarray], histogram: Sequence[float] | None = None) -> Files:
    """``values`` of one universe, or (universes,) each."""
    metrics = {name: np.atleast_1d(value).tolist() for name, value in values.items()}
    return {"metrics.json": json.dumps({"metrics": metrics, "class_histogram": histogram}).encode()}


def _training_set(parameters: Parameters, inputs: Sequence[Files]) -> tuple[Samples, list[dict[str, Any]]]:
    """The samples that a manifest names, part after part; and their ids in the first universe."""
    manifest = Manifest.from_json(parameters["manifest"])
    parts = [*zip(manifest.parts, parameters["sources"], strict=True)]
    held = [_held(parameters, part, source, inputs) for part, source in parts]
    alike = manifest.subsample is None and all(part.drawn is None for part in manifest.parts)
    rows = [  # of each universe, for each part: a subsample takes other numbers of each in every universe
        [row - each.first for row, each in zip(manifest.rows(seed), held, strict=True)]
        for seed in parameters["seeds"][: 1 if alike else None]
    ]

    def joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
        if alike:
            return np.concatenate([array[:, row] for array, row in zip(arrays, rows[0], strict=True)], axis=1)
        universes = [[array[u][row] for array, row in zip(arrays, own, strict=True)] for u, own in enumerate(rows)]
        return np.stack([np.concatenate(parts) for parts in universes])

    origin = next((each.origin for each in held if each.origin is not None), None)
    labels = [each.samples.labels for each in held if each.samples.labels is not None]
    captions = [each.samples.captions for each in held if each.samples.captions is not None]
    weights = np.repeat([part.weight for part in manifest.parts], [*map(len, rows[0])])
    samples = Samples(
        joined([each.values_from(origin) for each in held]),
        joined(labels) if len(labels) == len(held) else None,  # an unconditional model labels nothing
        None if np.all(weights == weights[0]) else weights,
        origin,
        joined(captions) if len(captions) == len(held) else None,
    )
    taken = zip(manifest.parts, held, rows[0], strict=True)
    names = [
        {"role": part.role, "generation": part.generation, "ids": each.names[row].tolist()} for part, each, row in taken
    ]
    return samples, names


class _Held(NamedTuple):
    """What a part takes from: samples of each universe, their names, and the manifest's number for the first.

    ``origin`` (universes, d), None for 0, is the point from which a Gaussian's values are counted.
    """

    samples: Samples
    names: np.ndarray
    first: int
    origin: np.ndarray | None = None

    def values_from(self, origin: np.ndarray | None) -> np.ndarray:
        """The values, counted from another point."""
        if origin is None:
            return self.samples.values
        shift: np.ndarray = (0 if self.origin is None else self.origin) - origin
        return self.samples.values + shift[:, None]


def _held(parameters: Parameters, part: Part, source: int | None, inputs: Sequence[Files]) -> _Held:
    (kind, settings), seeds = _generator(parameters), parameters["seeds"]
    if source is None:  # a distribution, which never runs out
        drawn = kind.truth(settings, seeds, part.start, part.size)
        return _Held(drawn, np.arange(part.start, part.stop), part.start)
    files = inputs[source]
    if part.generation == REAL:
        real = read_real_data(files)
        order = ledger_order(len(real["pool"]), seeds[0])
        labels = real["pool_labels"][order][None] if "pool_labels" in real else None
        captions = real["pool_captions"][order][None] if "pool_captions" in real else None
        samples = Samples(real["pool"][order][None], labels, captions=captions)
        return _Held(samples, real["pool_rows"][order], 0)
    numbers = np.arange(part.start, part.stop)
    if not kind.closed_form:
        return _Held(read_samples(files), numbers, part.start)
    model, selection = load_generator(parameters["family"], files), parameters["selection"]
    origin = None
    if selection is None:  # else a spread far below its mean would be rounded away
        model, origin = model.centred()

    def truth(universes: Sequence[int], count: int) -> Samples:
        real: Samples = kind.truth(settings, universes, 0, count)
        return real

    bias, start = parameters["sampling_bias"], part.start
    own = partial(truth, seeds)
    drawn = draw(model, part.size, seeds, part.generation, bias, selection, start=start, truth=truth, real=own)
    return _Held(drawn, numbers, part.start, origin)
