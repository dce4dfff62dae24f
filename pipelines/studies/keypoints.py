"""Learning keypoints of posed digits without labels (:mod:`pipelines.keypoints`), and what they are worth.

Everything is a function of the pipeline, the settings and the seed; on one machine a repeat gives the same bytes.
"""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
import torch

from pipelines.data.poses import PosingSettings, posed
from pipelines.editing import as_bytes
from pipelines.figures.dragging import strip
from pipelines.figures.keypoints import pointed
from pipelines.keypoints import FILE, Keypoints, Seer
from pipelines.measures.evaluator import to_network_input
from pipelines.measures.landmarks import centres, tips
from pipelines.storage.atomic import Files, unpacked
from pipelines.studies import PRODUCT, metrics, products
from policies.common.seeding import derive_seed
from policies.keypoints import KeypointSettings, carried, mean_distance, regressed, regression, turns, warped

_WAYS = [(0, -1), (1, -1), (1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1)]  # in which a landmark lies farthest
Job = Mapping[str, Any]


def digits(job: Job, split: Any, rounds: int, stream: str) -> np.ndarray:
    """Images (n, height, width, 3) uint8 of a split's digits, each in so many poses, in an order of chance."""
    rng = np.random.default_rng(derive_seed(job["seed"], stream))
    images, labels, _ = posed(PosingSettings(**job["posing"]), split, rounds, rng, job["width"])
    return images[rng.permutation(np.flatnonzero(np.isin(labels, job["digits"])))]


def learn(job: Job, inputs: list[Files], device: str) -> Files:
    """Task: tokens of an arm as a product."""
    settings, seed = KeypointSettings(**job["learning"]), job["seed"]
    random = derive_seed(seed, "random network") if job["random"] else None
    images = digits(job, "train", job["posing"]["rounds"], "learned from")
    return {f"{PRODUCT}{FILE}": Seer(job["path"], settings, device, random).fit(images, seed).file()}


def landmarks(images: np.ndarray) -> np.ndarray:
    """Where the ink of each image lies farthest in eight directions, (n, 8, 2): found on pixels, without a model."""
    ways = np.array(_WAYS) / np.linalg.norm(_WAYS, axis=1, keepdims=True)
    return np.stack([tips(images, np.tile(way, (len(images), 1)))[0] for way in ways], axis=1)


def measure(job: Job, inputs: list[Files], device: str) -> Files:
    """Task: how good keypoints of the tokens of ``inputs`` are on digits that nothing was learned from; without inputs,
    of points that all are in the middle of any image.

    ``equivariance``: distance in pixels between a keypoint of a turned image and where the image's keypoint has gone,
    of all that are in the turned image; ``/median``: of these; ``/other``: in other colours. ``spread``: of keypoints
    of an image from one another, mean over pairs; ``error``: of landmarks that are regressed from keypoints;
    ``mean_shape``: of landmarks that are where they are on average; ``placed_shape``: of these, moved along with the
    centre of the ink; ``of_mean_shape``, ``of_placed_shape``: the error as a share of those.
    """
    seed, settings = job["seed"], KeypointSettings(**job["learning"])
    labelled = digits(job, "train", 1 + job["labelled"] // (90 * len(job["digits"])), "labelled")[: job["labelled"]]
    judged = digits(job, "test", 1 + job["judged"] // (25 * len(job["digits"])), "judged")[: job["judged"]]
    size = (judged.shape[1], judged.shape[2])
    middle, sides = (np.array(size[::-1]) - 1) / 2, np.array(size[::-1])

    def find(images: np.ndarray, view: int) -> np.ndarray:
        return keypoints(images, view) if keypoints else np.tile(middle, (len(images), settings.keypoints, 1))

    def astray(images: np.ndarray, found: np.ndarray, stream: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """How far keypoints of turned images are from where they should be; these images, and their keypoints."""
        how = turns(len(images), settings, size, np.random.default_rng(derive_seed(seed, stream)))
        turned = as_bytes(warped(to_network_input(images), how))
        expected, after = carried(torch.from_numpy(found), how.double(), size).numpy(), find(turned, 2)
        inside = ((expected >= 0) & (expected <= sides - 1)).all(axis=2)
        return np.linalg.norm(after - expected, axis=2)[inside], turned, after

    keypoints = unpacked(products(inputs[0])[""], lambda at: Keypoints(at / FILE, device)) if inputs else None
    known, found = find(labelled, 0), find(judged, 1)
    off, turned, after = astray(judged, found, "turned")
    other = digits({**job, "posing": job["posing"] | job["other"]}, "test", 1, "other")[: job["judged"]]
    elsewhere, *_ = astray(other, find(other, 1), "turned other")
    truth, learned = landmarks(judged), landmarks(labelled)
    guesses = {
        "error": regressed(found, regression(known, learned, size), size),
        "mean_shape": learned.mean(axis=0),
        "placed_shape": (learned - centres(labelled)[:, None]).mean(axis=0) + centres(judged)[:, None],
    }
    values = {name: float(np.linalg.norm(each - truth, axis=2).mean()) for name, each in guesses.items()}
    values |= {f"of_{name}": values["error"] / values[name] for name in ("mean_shape", "placed_shape")}
    values |= {"equivariance": float(off.mean()), "equivariance/median": float(np.median(off))}
    values |= {"equivariance/other": float(elsewhere.mean()), "spread": mean_distance(found)}
    rows = [[*map(pointed, images[:6], points)] for images, points in ((judged, found), (turned, after))]
    strip(rows).save(picture := BytesIO(), "PNG")
    return metrics(values) | {"images/keypoints.png": picture.getvalue()}
