"""TreeRL: surprisal-forked trees with a process advantage per segment (arXiv:2506.11902)."""

from dataclasses import replace

from pyrl import advantage
from pyrl.algorithm import Algorithm, Sample
from pyrl.fork import EPTree
from pyrl.methods.ttrl import ttrl
from pyrl.select import Stratified


def treerl() -> Algorithm:
    """EPTree (6, 2, 1, 2): 30 leaves vote, 16 train, with values of nodes from their leaves.

    One update takes all samples of a step: the released scripts train on 16 questions with 16
    leaves each, and their batch is 256.
    """
    return replace(
        ttrl(),
        sample=Sample(votes=30, train=16, temperature=1.2, top_p=0.95),
        fork=EPTree(),
        select=Stratified(),
        advantage=advantage.tree_rl(),
        updates_per_step=1,
    )
