"""The recipe of the default models, in a few steps: it builds every part, resumes, and repeats itself."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from pipelines.recipe import autoencoder, captioner, diffusion, evaluator, pretrain


@pytest.fixture
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (autoencoder, captioner, diffusion, evaluator):
        monkeypatch.setattr(module, "STEPS", 2)
        monkeypatch.setattr(module, "BATCH_SIZE", 4)
    monkeypatch.setattr(diffusion, "LOOSENING_STEPS", 2)
    monkeypatch.setattr(diffusion, "CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(diffusion, "LOOSENING_CHECKPOINT_EVERY", 1)
    prompts = pretrain.all_prompts()[:2]
    monkeypatch.setattr(pretrain, "all_prompts", lambda: prompts)
    images, captions = pretrain._test_set()
    monkeypatch.setattr(pretrain, "_test_set", lambda: (images[:8], captions[:8]))


def weights(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): b"".join(
            tensor.numpy().tobytes() for _, tensor in sorted(load_file(path).items())
        )
        for path in directory.rglob("*.safetensors")
    }


@pytest.mark.usefixtures("_hasty")
def test_pretrain_builds_resumes_and_repeats_itself(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    pretrain.pretrain(first, seed=3, progress=lambda line: None)
    assert {path.name for path in first.iterdir()} == {
        "pipeline",
        "captioner",
        "evaluator",
        "measurements.json",
        "README.md",
    }

    texts = [path.read_text() for path in first.rglob("*") if path.suffix in {".json", ".md"}]
    assert not any(str(tmp_path) in text for text in texts)

    def fail_at_the_pipeline(line: str) -> None:
        if line.startswith("diffusion"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(second, seed=3, progress=fail_at_the_pipeline)
    assert not (second / "pipeline").exists()
    lines: list[str] = []
    pretrain.pretrain(second, seed=3, progress=lines.append)
    assert lines[:3] == ["evaluator: already there", "captioner: already there", "autoencoder: already there"]
    assert len(weights(first)) == 5
    assert weights(second) == weights(first)

    with pytest.raises(ValueError, match="begun with seed 3, not 4"):
        pretrain.pretrain(first, seed=4)
