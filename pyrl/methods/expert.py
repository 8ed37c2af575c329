"""Expert: methods that read another model's responses to the questions."""

from dataclasses import replace

from pyrl import advantage, presets
from pyrl.algorithm import Algorithm
from pyrl.methods.grpo import grpo


def calibrl() -> Algorithm:
    """Pulls answers towards an expert's, harder where they are rare or wrong (arXiv:2602.20197).

    10 answers a question, centred and not divided by a deviation. The expert's responses are a
    column of the data, compared position by position as in the released code.
    """
    parent = grpo()
    return replace(
        parent,
        sample=replace(parent.sample, votes=10, train=10),
        advantage=advantage.dr_grpo(),
        loss=presets.calibrl(),
    )
