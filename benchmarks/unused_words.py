"""What does the default model draw for words that no caption holds? For choosing words that are to stand for a subject.

    python -m benchmarks.unused_words [--slot ink] [--images 3] [--seed 100]

For each one-token word of the vocabulary that the prompts leave unused, put where they name the slot: how often the
evaluator sees each of the slot's words, most even first (by entropy).
"""

import argparse

import numpy as np
import torch

from orchestration.runs.manifest import git_commit
from pipelines.data.digits import CHOICES, all_prompts, parse
from pipelines.data.prompts import renamed
from pipelines.denoisers import load_family
from pipelines.measures.evaluator import load_evaluator
from pipelines.studies.distil import draw

_MODEL, _JUDGE = "models/digits/pipeline", "models/digits/evaluator"


def main() -> None:
    """Print a line a word."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slot", choices=list(CHOICES), default="ink")
    parser.add_argument("--images", type=int, default=3, help="of each prompt, less the slot")
    parser.add_argument("--seed", type=int, default=100)
    given = parser.parse_args()
    pipeline, judge = load_family(_MODEL, torch.float32).pipeline, load_evaluator(_JUDGE)
    tokenizer, first = pipeline.tokenizer, CHOICES[given.slot][0]
    asked = [text for text in all_prompts() if parse(text)[given.slot] == first] * given.images
    used = {token for text in all_prompts() for token in tokenizer(text).input_ids}
    plain = {word.removesuffix("</w>") for word in tokenizer.get_vocab()}
    tokens = {word: tokenizer(word).input_ids[1:-1] for word in plain if word.isascii() and word.isalpha()}
    words = sorted(word for word, found in tokens.items() if len(found) == 1 and found[0] not in used)
    lines = []
    for word in (word for word in words if word.islower()):
        texts = [renamed(text, first, word) for text in asked]
        images = draw(pipeline, texts, given.seed, num_inference_steps=10, eta=1.0, guidance_scale=1.0)
        seen = np.array(judge.slots(images)[given.slot])
        shares = np.array([np.mean(seen == choice) for choice in CHOICES[given.slot]])
        entropy = -float(np.sum(shares * np.log(np.where(shares > 0, shares, 1))))
        lines.append((entropy, f"{word:6} {entropy:.2f} nats  {'  '.join(map('{:.2f}'.format, shares))}"))
    print(f"commit {git_commit()}; {given.slot} of {len(asked)} images a word: {', '.join(CHOICES[given.slot])}")
    print(*(line for _, line in sorted(lines, reverse=True)), sep="\n")


if __name__ == "__main__":
    main()
