"""A study: are adversarial examples features that nobody sees, yet that tell classes apart?

Ilyas et al., "Adversarial Examples Are Not Bugs, They Are Features" (1905.02175), on the tinted digits: data sets in
which only such features go with the labels (``random``, ``next``: the paper's D_rand, D_det), or which hold what a
robust network uses, or an ordinary one (``robust-features``, ``standard-features``: D_R, D_NR). Controls: the same
labels on images as they were, or with random noise of equal norm. The judge of what images show, an evaluator, takes no
part. The same attack measures how far the evaluator and the captioner, whose words are a reward, can be trusted.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product
from pathlib import Path

from pydantic import Field

from orchestration.experiments.study.config import Study
from pipelines.data.digits import DIGITS
from pipelines.storage.locations import check_model, fingerprint, portable, resolve_model
from pipelines.storage.model_files import read_json
from pipelines.storage.tasks import Task
from pipelines.studies import task
from policies.adversarial import AttackSettings, InversionSettings, LearningSettings
from policies.common.claims import Claim

FED = ("random", "next")  # what goes with the labels is what an attacker put in
INVERTED = ("robust-features", "standard-features")
FRESH = ("normalised", "strided")  # the networks that learn from a set: of the attacked one's architecture, and another
NETWORKS = {each: each for each in FRESH} | {"robust": "normalised"}  # that learn from true digits, by architecture


class AdversarialFeatures(Study):
    """Trains networks on adversarial examples, and asks them about clean digits."""

    study: str = "adversarial_features"
    name: str = "adversarial-features"
    arms: tuple[str, ...] = (
        "standard",
        *(f"{fed}{how}" for fed in FED for how in ("", "-unperturbed", "-noise")),
        *INVERTED,
    )
    tints: int = Field(2, ge=1, description="random tints of each of the 1,000 digits that sets are made of")
    test_tints: int = Field(1, ge=1, description="random tints of each of the 297 digits that networks are tested on")
    eps: float = Field(1.5, gt=0, description="L2 norm of the change in the sets, of images in [0, 1]")
    curve: tuple[float, ...] = Field((3.0, 5.0), description="further norms at which next is made")
    training_eps: float = Field(1.5, gt=0, description="norm that the robust network is trained against")
    robust: tuple[float, ...] = Field((0.5, 1.0), min_length=1, description="norms under which accuracy is robust")
    audited: tuple[float, ...] = Field((0.0, 0.25, 0.5, 1.0, 1.5), min_length=1, description="norms of the audit")
    attack: AttackSettings = AttackSettings()
    inversion: InversionSettings = InversionSettings()
    learning: LearningSettings = LearningSettings()
    evaluator: str | None = Field("models/digits/evaluator", description="says what an image shows; null: none")
    captioner: str | None = Field("models/digits/captioner", description="is audited, as a reward; null: none")
    learnt: float = Field(0.6, gt=0, lt=1, description="claimed: accuracy on clean digits after D_rand, and after D_NR")
    chance: float = Field(0.2, gt=0, lt=1, description="claimed: and at most this after each control")
    seen: float = Field(0.8, gt=0, lt=1, description="claimed: the judge sees the original in so many of the set")
    overruled: float = Field(0.4, gt=0, lt=1, description="claimed: accuracy on clean digits after D_det")
    times: float = Field(3.0, gt=1, description="claimed: D_R's accuracy under attack is so many times the control's")

    def preflight(self) -> None:
        """Norms are given once, the judge tells digits apart, and the captioner is one."""
        given = {"curve": (self.eps, *self.curve), "robust": (0.0, *self.robust), "audited": self.audited}
        for key, norms in given.items():
            if min(norms) < 0 or len(set(norms)) < len(norms):
                raise ValueError(f"{key}: give each norm once, and none below 0, not {list(getattr(self, key))}")
        for key, path in self.reads().items():
            check_model(path, "config.json", key)
            told = read_json(Path(resolve_model(path)) / "config.json")
            if key == "evaluator" and (told.get("classes") or {}).get("digit") != list(DIGITS):
                raise ValueError(f"evaluator: {path!r} is no directory of an evaluator of digits")
            looks = told.get("model_type"), told.get("vision_config", {}).get("image_size")
            if key == "captioner" and looks != ("blip", 16):
                raise ValueError(f"captioner: {path!r} is no BLIP that looks at images of 16 x 16 pixels")

    def reads(self) -> Mapping[str, str]:
        """The judge, and the reward that is audited."""
        return {key: at for key, at in (("evaluator", self.evaluator), ("captioner", self.captioner)) if at}

    def tasks(self, arm: str, seed: int) -> Sequence[Task]:
        """The set of an arm, and what fresh networks learn from it; beside true digits, the audit."""
        from pipelines.studies.adversarial_features import audit, examine, learn_source

        kept = {"tints", "test_tints", "robust", "attack", "inversion", "learning"}
        given = self.model_dump(mode="json", include=kept)
        given |= {"seed": seed, "evaluator": self.evaluator and portable(self.evaluator), "read": self._read}

        def network(name: str) -> Task:
            how = {"architecture": NETWORKS[name], "eps": self.training_eps if name == "robust" else 0.0}
            how |= {key: given[key] for key in ("tints", "learning", "seed")}
            return task(learn_source, how, label=f"{name} network, seed {seed}")

        asked = given | {"arm": arm, "eps": [self.eps, *(self.curve if arm == "next" else ())]}
        asked |= {} if arm in ("standard", *INVERTED) else {"robust": []}  # elsewhere none would be left
        names = ["robust" if arm == "robust-features" else "normalised"] if arm in (*FED, *INVERTED) else []
        found = [task(examine, asked, *map(network, names), label=f"{arm}, seed {seed}")]
        if arm == "standard":
            asked = given | {"networks": NETWORKS, "eps": list(self.audited)}
            asked |= {"captioner": self.captioner and portable(self.captioner)}
            found.append(task(audit, asked, *map(network, NETWORKS), label=f"audit, seed {seed}"))
        return found

    @cached_property
    def _read(self) -> dict[str, str | None]:
        return {at: fingerprint(at)["sha256"] for at in sorted(self.reads().values())}

    def claims(self) -> Iterator[Claim]:
        """What nobody sees is learned, and is what robust networks do without; and rewards can be led by it."""
        return (replace(claim, scale="share") for claim in self._claims())

    def _claims(self) -> Iterator[Claim]:
        most, least, third = self.chance, self.learnt, 1 / self.times
        for net in FRESH:
            by, right = f"{net} architecture", f"accuracy/{net}"
            yield Claim(f"D_rand: clean digits are learned, {by}", right, "random", "at least", least)
            for how in ("unperturbed", "noise"):
                yield Claim(f"control: not from these labels, {how}, {by}", right, f"random-{how}", "at most", most)
            yield Claim(f"D_det: what nobody sees overrules the rest, {by}", right, "next", "at least", self.overruled)
            for how in ("unperturbed", "noise"):
                yield Claim(f"control: it is not so {how}, {by}", right, f"next-{how}", "at most", most)
            yield Claim(f"D_NR: clean digits are learned, {by}", right, "standard-features", "at least", least)
        if self.evaluator:
            for fed in FED:
                yield Claim(f"the judge sees the original in {fed}", "judge/original", fed, "at least", self.seen)
            sentence = "D_NR: the judge seldom sees the digit whose label it has"
            yield Claim(sentence, "judge/label", "standard-features", "at most", most)
        for eps, net, arm in product(self.robust, FRESH, ("standard", "standard-features")):
            sentence = f"D_R: under {eps:g} {arm} keeps 1/{self.times:g} of its accuracy at most, {net} architecture"
            yield Claim(sentence, f"robust_{eps:g}/{net}", arm, "at most", third, "robust-features", "ratio")
        over = next((eps for eps in self.audited if eps >= 1), max(self.audited))
        for judge in self.reads():
            yield Claim(f"{judge}: wrong of most under {over:g}", f"under_{over:g}/{judge}", "standard", "at most", 0.5)
            sentence = f"control: {judge} is right under noise of {max(self.audited):g}"
            yield Claim(sentence, f"noise/{judge}", "standard", "at least", self.seen)
