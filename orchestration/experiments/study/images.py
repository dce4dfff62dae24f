"""What studies of images have in common: the images that they read, and digests of all that they read."""

from functools import cached_property

from orchestration.experiments.study.config import Study
from pipelines.data.real_data import DataSettings, RealData, load_real_data
from pipelines.storage.locations import fingerprint


class ImageStudy(Study):
    """A study with a setting ``data``; its tasks' parameters name what they read by ``_digests``."""

    data: DataSettings

    @cached_property
    def _data(self) -> RealData:
        return load_real_data(self.data)

    @cached_property
    def _digests(self) -> dict[str, str | None]:
        read = {at: fingerprint(at)["sha256"] for key, at in sorted(self.reads().items()) if key != "data.source"}
        return read | {"data": self._data.sha256}
