"""TTRL: the majority of a model's own answers is the label (arXiv:2504.16084)."""

from pyrl import advantage
from pyrl.algorithm import Algorithm, Sample


def ttrl() -> Algorithm:
    """64 independent answers vote, the first 32 train by GRPO with k3 KL 0.001 and dual clip 3.

    8 updates share the samples of a step: the released scripts for AIME and AMC take 8 questions
    a step and one of them for each update (the one for MATH-500 32).
    """
    return Algorithm(
        advantage=advantage.grpo(),
        sample=Sample(votes=64, train=32, temperature=0.6),
        updates_per_step=8,
    )
