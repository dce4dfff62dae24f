"""One unit of work on its way through the actors: object references, never the data."""

from dataclasses import dataclass, field
from typing import Any

from ray import ObjectRef


@dataclass
class Chunk:
    """Some images of a step. Each stage adds the reference of what it will have made."""

    prompts: list[str]
    seeds: list[int]
    images: ObjectRef
    trajectory: ObjectRef
    drawn_with: Any = None  # the PolicyVersion weights: kept, as a sampler that was started again asks for them
    captions: ObjectRef | None = None
    scores: dict[str, ObjectRef] = field(default_factory=dict)  # by the reward's name
    verdicts: ObjectRef | None = None
