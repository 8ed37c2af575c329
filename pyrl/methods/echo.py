"""ECHO: entropy and confidence shape the tree, the clip and the advantage (arXiv:2602.02150)."""

from dataclasses import replace

from pyrl.advantage import Hybrid
from pyrl.algorithm import Algorithm, Sample
from pyrl.fork import EntropyConfidence, FixedEntropyConfidence
from pyrl.loss import ConfidenceClip
from pyrl.loss.aggregate import SeqMeanTokenMean
from pyrl.methods.ttrl import ttrl
from pyrl.prune import Doubt, FixedDoubt
from pyrl.select import Stratified


def echo() -> Algorithm:
    """Entropy and confidence shape the trees, the clip and the advantages; all 32 leaves train.

    Thresholds are running quantiles, with a cool-down and a cap of a trunk's leaves. Where the
    paper leaves numbers open or its released code cannot fork at all, the thresholds are calibrated
    on the run's own samples, CA-Clip is centred on the batch's median tail confidence, and the
    token signal of the hybrid advantage is whitened.
    """
    parent = ttrl()
    return replace(
        parent,
        sample=Sample(votes=32, train=32, temperature=0.8),
        fork=EntropyConfidence(),
        prune=Doubt(),
        select=Stratified(),
        advantage=(*parent.advantage, Hybrid()),
        loss=replace(parent.loss, bounds=ConfidenceClip()),
    )


def echo_paper() -> Algorithm:
    """ECHO with the paper's windows, raw hybrid signal, uncentred CA-Clip and mean of sequences."""
    parent = echo()
    return replace(
        parent,
        fork=EntropyConfidence(group_window=4, cooldown=0, trunk_cap=32),
        prune=Doubt(decline_run=3, tail_window=8),
        advantage=(*ttrl().advantage, Hybrid(whiten=False)),
        loss=replace(parent.loss, bounds=ConfidenceClip(centre=1.0), aggregate=SeqMeanTokenMean()),
    )


def echo_fixed() -> Algorithm:
    """ECHO with fixed thresholds in place of quantiles, which act from the first token on."""
    return replace(echo(), fork=FixedEntropyConfidence(), prune=FixedDoubt())


def echo_released() -> Algorithm:
    """What the released scripts run: no tree, the hybrid advantage, and CA-Clip about 1.

    Confidence is the sampled token's probability in both, as there.
    """
    parent = ttrl()
    return replace(
        parent,
        sample=Sample(votes=32, train=32, temperature=0.8),
        advantage=(*parent.advantage, Hybrid(of="token")),
        loss=replace(parent.loss, bounds=ConfidenceClip(centre=1.0, of="token")),
    )
