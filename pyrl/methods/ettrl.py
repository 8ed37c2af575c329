"""ETTRL: entropy-forked trees and advantages reshaped by entropy (arXiv:2508.11356)."""

from dataclasses import replace

from pyrl.advantage import EntropyReshape
from pyrl.algorithm import Algorithm
from pyrl.fork import TopEntropy
from pyrl.methods.ttrl import ttrl
from pyrl.select import Stratified


def ettrl() -> Algorithm:
    """60 leaves from 12 trunks, forked at their most uncertain tokens (ETMR); advantages by EAR.

    EAR: the advantage of a confident answer counts more (its form Res).
    """
    parent = ttrl()
    return replace(
        parent,
        sample=replace(parent.sample, votes=60),
        fork=TopEntropy(),
        select=Stratified(),
        advantage=(*parent.advantage, EntropyReshape()),
    )
