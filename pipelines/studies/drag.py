"""Dragging what a GAN of the loop draws (:mod:`policies.drag`), and how far that can be believed.

Everything is a function of the generator, the settings and the seed; on one machine a repeat gives the same bytes.
"""

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch

from pipelines.captioner import Captioner
from pipelines.data.digits import DIGITS, parse
from pipelines.data.poses import PosingSettings, posed
from pipelines.editing import invert, renderer
from pipelines.figures.dragging import marked, strip
from pipelines.generators import FAMILY, GENERATORS, load_generator
from pipelines.generators.adversarial import Adversarial, Styles
from pipelines.measures.evaluator import load_evaluator
from pipelines.measures.landmarks import stay_tips, tips
from pipelines.scoring import captioned
from pipelines.settings import CaptionerSettings
from pipelines.storage.atomic import Files, packed
from pipelines.storage.locations import resolve_model
from pipelines.studies import PRODUCT, metrics, products
from policies.common.seeding import derive_seed
from policies.drag import DragSettings, Moment, drag
from policies.loops.samples import Samples

_TRIES = 16  # ways of a drag, and styles to begin the search for a real digit's with, of which one is taken
_WAYS = np.stack([(np.cos(turn), np.sin(turn)) for turn in np.arange(8) * np.pi / 4])  # in which ink may lie farthest


def learn(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: a generator of posed digits as a product, for :mod:`orchestration.cli.drag`, too."""
    kind, rng = GENERATORS.find(parameters["family"]), np.random.default_rng(derive_seed(0, "poses"))
    posing = PosingSettings(**parameters["posing"])
    images, labels, captions = posed(posing, "train", posing.rounds, rng)
    data = Samples(images[None], labels[None], captions=np.array(captions)[None])
    stream = derive_seed(parameters["seed"], "generator")
    fitted = kind.fit(kind.schema(**parameters["settings"]), data, [stream], device=device)
    files = packed(fitted.save) | {FAMILY: json.dumps({"family": parameters["family"]}).encode()}
    return {f"{PRODUCT}{name}": content for name, content in files.items()}


class Drags(NamedTuple):
    """Drags of one point each: of what, ``handles`` and ``targets`` (n, 2), in which of eight directions the ink lies
    farthest at the handle (n, 2), and the images (n, height, width, channels) at first."""

    styles: Styles
    handles: np.ndarray
    targets: np.ndarray
    ways: np.ndarray
    images: np.ndarray

    @classmethod
    def of(
        cls, generator: Adversarial, styles: Styles, count: int, lengths: Sequence[float], spread: float, rng: Any
    ) -> "Drags":
        """The first ``count`` of the images of ``styles`` whose ink has a tip in a direction of chance, to be dragged
        by a length between the ``lengths``, whichever way stays in the image and leaves it the farthest ink there."""
        images = generator.draw(styles)
        ways = _WAYS[rng.integers(len(_WAYS), size=len(images))]
        handles, found = tips(images, ways)
        turns = rng.uniform(0, 2 * np.pi, (len(images), _TRIES, 1))
        around = rng.uniform(*lengths, turns.shape) * np.concatenate([np.cos(turns), np.sin(turns)], axis=2)
        fits = stay_tips(images, ways, handles, places := handles[:, None] + around)
        chosen = np.flatnonzero((found <= spread) & fits.any(axis=1))[:count]
        if not len(chosen):
            raise ValueError("no image has a tip of ink to drag: the generator has collapsed, or spread is too small")
        begin = handles[chosen], places[chosen, fits.argmax(axis=1)[chosen]]
        return cls(styles.taken(chosen), *begin, ways[chosen], images[chosen])

    def part_of_the_way(self, share: float) -> "Drags":
        """The same, to a place between."""
        return self._replace(targets=self.handles + share * (self.targets - self.handles))

    @property
    def fixed(self) -> np.ndarray:
        """The half (n, height, width) away from each handle: 1 there."""
        rows, columns = np.indices(self.images.shape[1:3])
        places = np.stack([columns - columns.mean(), rows - rows.mean()], axis=-1)
        return (np.einsum("hwp,np->nhw", places, self.ways) < 0).astype(np.float32)

    def done(self, generator: Adversarial, settings: DragSettings, masked: bool) -> Moment:
        """Where they stand at last."""
        handles, targets = (torch.from_numpy(each[:, None]).float() for each in (self.handles, self.targets))
        fixed = torch.from_numpy(self.fixed).to(generator.device) if masked else None
        given = self.styles.w, handles.to(generator.device), targets.to(generator.device), fixed
        return [*drag(renderer(generator, self.styles), *given, settings)][-1]


def measure(parameters: Mapping[str, Any], inputs: list[Files], device: str) -> Files:
    """Task: what became of an arm's drags of images that the first of ``inputs`` draws, and of real digits that it has
    drawn again; ``walk`` goes as far in w as the drags of the second of them, any way.

    ``reach``: the landmark is within 1.5 pixels of the target; ``believed``: the features say so; ``kept``: the judge
    sees the digit that it saw; ``changed``: mean |change| of pixels in the half away from the handle; ``disagree``:
    captioner and judge see different digits in a real one, dragged by so many pixels."""
    arm, seed, pixels = parameters["arm"], parameters["seed"], parameters["pixels"]
    generator, settings = load_generator(parameters["family"], products(inputs[0])[""], device), parameters["dragging"]
    judge = load_evaluator(resolve_model(parameters["evaluator"]), device)
    captioner = Captioner(CaptionerSettings(path=parameters["captioner"]), device)
    rng, count = np.random.default_rng(derive_seed(seed, "drags")), parameters["drags"]
    styles = generator.styles(64 * count, derive_seed(seed, "styles"), parameters["bias"])
    sets = {"drawn": Drags.of(generator, styles, count, parameters["lengths"], parameters["spread"], rng)}
    found: dict[str, Any] = {"drags": len(sets["drawn"].handles)}
    if arm in ("dragged", "walk", "still"):  # of the others nothing is asked about real digits
        real, labels, captions = posed(PosingSettings(**parameters["posing"]), "test", 1, rng)
        chosen = rng.permutation(len(real))[: 2 * count]
        told: Any = {"prompts": [captions[each] for each in chosen] * _TRIES} if generator.captioned else {}
        begins = generator.styles(_TRIES * len(chosen), derive_seed(seed, "candidates"), parameters["bias"], **told)
        again, left = invert(generator, real[chosen], begins, steps=100)
        seen = judge.slots(generator.draw(again))["digit"]
        known = np.array([DIGITS.index(each) for each in seen]) == labels[chosen]
        hard = Drags.of(generator, again, count, (pixels[-1], pixels[-1]), np.inf, rng)
        sets |= {str(each): hard.part_of_the_way(each / pixels[-1]) for each in pixels}
        found |= {"reconstruction/error": float(left.mean()), "seen/reconstruction": float(known.mean())}
    lengths, pictures = {}, Files()
    walked = json.loads(inputs[1]["lengths.json"]) if arm == "walk" else {}
    how = DragSettings(**(settings | ({"tracking": False} if arm == "untracked" else {})))
    for name, drags in sets.items():
        begin = drags.styles.w
        if arm in ("walk", "still"):
            away = torch.from_numpy(rng.standard_normal(begin.shape)).to(begin)
            far = begin.new_tensor(walked.get(name, [0.0] * len(begin)))[:, None]
            w, points = begin + far * away / away.norm(dim=1, keepdim=True), drags.handles
        else:
            last = drags.done(generator, how, masked=arm != "unmasked")
            w, points = last.styles, last.points[:, 0].cpu().numpy()
        images = generator.draw(Styles(w, drags.styles.conditions))
        lengths[name] = (w - begin).flatten(1).norm(dim=1).tolist()
        seen = judge.slots(images)["digit"]
        if name == "drawn":
            off = np.linalg.norm(tips(images, drags.ways)[0] - drags.targets, axis=1)
            change, fixed = np.abs(images.astype(float) - drags.images).mean(axis=-1) / 255, drags.fixed
            before = judge.slots(drags.images)["digit"]
            believed = np.linalg.norm(points - drags.targets, axis=1) <= how.stop
            found |= {"reach": float((off <= parameters["near"]).mean()), "believed": float(believed.mean())}
            found |= {"kept": float(np.mean(np.array(before) == seen)), "distance": float(off.mean())}
            found["changed"] = float((change * fixed).sum() / fixed.sum())
            whole = zip(drags.images, images, drags.handles, points, drags.targets, strict=True)
            shown = [(marked(a, h[None], t[None]), marked(b, p[None], t[None])) for a, b, h, p, t in whole][:8]
            strip([*zip(*shown, strict=True)]).save(picture := BytesIO(), "PNG")
            pictures["images/drags.png"] = picture.getvalue()
        else:
            said = [parse(text)["digit"] for text in captioned(captioner, images)]
            found[f"disagree/at_{name}"] = float(np.mean(np.array(said) != seen))
            found.setdefault("disagree", []).append(found[f"disagree/at_{name}"])
    return metrics(found) | pictures | {"lengths.json": json.dumps(lengths).encode()}
