"""A study: does MAVEN (1906.06430) learn classes from few labels, and what do several discriminators give?

Beside what it has to beat: networks of the same size trained on the labelled images alone, and on pseudo-labels, too;
one discriminator, and one that is as many times as wide. All see the same labels, and are judged by images that none
has seen. What is drawn is held against these by features that have no part in the training.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field

from orchestration.experiments.study.images import ImageStudy
from pipelines.data.real_data import DataSettings, split_reference
from pipelines.generators.maven import Maven, MavenSettings
from pipelines.storage.locations import portable
from pipelines.storage.tasks import Task
from pipelines.studies import task
from policies.common.claims import Claim
from policies.maven import PlainSettings

ADVERSARIAL, PLAIN = ("maven", "random", "one", "wide"), ("supervised", "pseudo")


class FewLabels(ImageStudy):
    """Labels from few, by several ways."""

    study: str = "few_labels"
    name: str = "few_labels"
    arms: tuple[str, ...] = (*ADVERSARIAL, *PLAIN)
    data: DataSettings = DataSettings()
    labelled: tuple[int, ...] = Field((20, 100), min_length=1, description="how many labels are given")
    maven: MavenSettings = MavenSettings()
    plain: PlainSettings = PlainSettings()
    gain: float = Field(0.05, gt=0, lt=1, description="claimed at the fewest labels: accuracy over the supervised")
    margin: float = Field(0.02, gt=0, lt=1, description="within it, accuracies count as the same")

    def preflight(self) -> None:
        """The images have labels, and sides that it takes; there are enough of each."""
        if self.maven.labelled is not None:
            raise ValueError("maven.labelled: the study's own setting labelled says how many")
        if self.maven.discriminators < 2:
            raise ValueError("maven.discriminators: several are compared with one, so give 2 or more")
        found = self._data
        if found.labels is None:
            raise ValueError("data: the images have no labels to learn, or to be judged by")
        pool, _ = split_reference(found, self.data.reference)
        if self.data.extractor not in (None, "classifier"):
            raise ValueError("data.extractor: its classifier reads what is drawn, so leave it out")
        (height, width), classes = found.images.shape[1:3], int(found.labels.max()) + 1
        if min(height, width) < Maven.least_side or height % 4 or width % 4:
            raise ValueError(f"data: sides must be multiples of 4, 8 or more, not {height}×{width}: set image_size")
        for count in self.labelled:
            if not classes <= count <= len(pool) or self.labelled.count(count) > 1:
                raise ValueError(f"labelled: give each number once, from {classes} to {len(pool)}, not {count}")

    def reads(self) -> Mapping[str, str]:
        """The images."""
        return {} if self.data.source in ("digits", "captioned_digits") else {"data.source": self.data.source}

    def tasks(self, arm: str, seed: int) -> Sequence[Task]:
        """What is learned from each number of labels."""
        from pipelines.studies.few_labels import learn_features, learn_few, learn_maven

        data = self.data.model_dump() | {"source": portable(self.data.source)}
        common: dict[str, Any] = {"data": data, "read": self._digests, "seed": seed}
        eye = task(learn_features, {**common, "seed": 0, "path": None}, label="features")
        many = self.maven.discriminators
        how: dict[str, Any] = {
            "random": {"feedback": "random"},
            "one": {"discriminators": 1},
            "wide": {"discriminators": 1, "width": self.maven.width * many},
        }
        made = []
        for count in self.labelled:
            settings = self.maven.model_copy(update={"labelled": count, **how.get(arm, {})}).model_dump()
            job, label = {**common, "settings": settings}, f"{arm}, {count} labels, seed {seed}"
            if arm in PLAIN:
                made.append(
                    task(learn_few, {**job, "plain": self.plain.model_dump(), "pseudo": arm == "pseudo"}, label=label)
                )
            else:
                made.append(task(learn_maven, job, eye, label=label))
        return made

    def claims(self) -> Iterator[Claim]:
        """It learns from few labels; several discriminators are no better than one; the rest is asked, not known."""
        for count in self.labelled:
            at, right = f"with {count} labels", f"accuracy/of_{count}"
            if count == min(self.labelled):
                sentence = f"{at} MAVEN is more often right than networks of its size trained on these alone"
                yield Claim(sentence, right, "maven", "at least", self.gain, "supervised", "difference")
            for arm, name in (("pseudo", "pseudo-labels"), ("wide", "one discriminator as wide as all")):
                sentence = f"asked: {at} MAVEN is at least as often right as {name}"
                yield Claim(sentence, right, "maven", "at least", 0.0, arm, "difference")
            sentence = f"no ensemble gain: {at} several discriminators are right no more often than one, to within"
            yield Claim(f"{sentence} {self.margin:g}", right, "maven", "at most", self.margin, "one", "difference")
            sentence = f"no ensemble loss: {at} several discriminators are right no less often than one, to within"
            yield Claim(f"{sentence} {self.margin:g}", right, "maven", "at least", -self.margin, "one", "difference")
            sentence = f"asked: {at} feedback of one at random serves as well as the mean of all"
            yield Claim(sentence, right, "random", "at least", 0.0, "maven", "difference")
            sentence = f"asked: {at} several discriminators make samples that are nearer in FID than one"
            yield Claim(sentence, f"fid/of_{count}", "maven", "at most", 1.0, "one", "ratio")
            sentence = f"asked: {at} several discriminators make samples that are nearer in their moments than one"
            yield Claim(sentence, f"moments/of_{count}", "maven", "at least", 0.0, "one", "difference")
