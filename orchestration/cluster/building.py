"""The default models, built by several workers."""

import json
from pathlib import Path

from orchestration.cluster.ray_cluster import connected, find_machine
from pipelines.default_models.pretrain import build, make

_SECONDS = 3600.0  # the longest wait of workers for one another


def build_together(output: Path, seed: int, workers: int, recipe: str = "digits") -> None:
    """``pretrain`` by so many ``workers`` of Ray Train that share its trainings, a CPU each. Raises ValueError."""
    if (cpus := find_machine("cpu").cpus) < workers:
        raise ValueError(f"--train-workers is {workers}, there are {cpus} CPUs")
    make(output)
    with connected(0, "the same command again"):
        import ray

        from actors.failures import result
        from actors.tasks import COMMIT_SECONDS
        from actors.train_group import TrainGroup, divided
        from pipelines.studies import perform

        at = output.resolve() / ".training"
        group = TrainGroup((workers, workers), {"CPU": 1.0}, False, _SECONDS, str(at), COMMIT_SECONDS, losses=3)
        kind = f"{build.__module__}:{build.__name__}"
        parameters = {"output": str(output.resolve()), "seed": seed, "recipe": recipe}
        built, seen = divided(group).remote(perform, "pretrain", kind, parameters, "cpu", []), set[str]()
        while not ray.wait([built], timeout=1)[0]:
            seen = _told(output, seen)
        result(built, "building the default models")
        _told(output, seen)
        at.rmdir()
    print(f"default models: ready in {output}")


def _told(output: Path, before: set[str]) -> set[str]:
    """Say which parts are there that were not ``before``. Returns all."""
    record = output / "measurements.json"
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    parts = {name for name, each in known.items() if isinstance(each, dict)}
    for name in sorted(parts - before):
        print(f"{name}: built")
    return parts
