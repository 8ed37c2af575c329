"""Loss: a policy loss as a value. One file an axis, one class a choice; `policy_loss` computes."""

from pyrl.loss.aggregate import (
    Aggregate,
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    SeqMeanTokenSumNorm,
    TokenMean,
    TokenSum,
)
from pyrl.loss.axis import Factor, Keep, LossState, Reshape, Select
from pyrl.loss.bounds import (
    BinaryKL,
    Bounds,
    Clip,
    ConfidenceClip,
    EntropyClip,
    PositionClip,
    Range,
    TotalVariation,
    Unbounded,
)
from pyrl.loss.factors import TIS, IcePop, Steer
from pyrl.loss.keep import (
    ClipB,
    ClipCov,
    ClipV,
    Improbable,
    Matched,
    NearGenerator,
    TopCovariance,
    TopEntropy,
)
from pyrl.loss.loss import Loss, Ratio
from pyrl.loss.penalties import KL, EntropySmoothing, ExpertLeak, NucleusAnchor, Penalty
from pyrl.loss.reshape import Blend, EntropyBand, EntropyZ, SignFilter, TokenGroup
from pyrl.loss.surrogates import ClampedLogp, Clipped, MaskedLogp, Sigmoid, SoftClipped

__all__ = [
    "KL",
    "TIS",
    "Aggregate",
    "BinaryKL",
    "Blend",
    "Bounds",
    "ClampedLogp",
    "Clip",
    "ClipB",
    "ClipCov",
    "ClipV",
    "Clipped",
    "ConfidenceClip",
    "EntropyBand",
    "EntropyClip",
    "EntropySmoothing",
    "EntropyZ",
    "ExpertLeak",
    "Factor",
    "IcePop",
    "Improbable",
    "Keep",
    "Loss",
    "LossState",
    "MaskedLogp",
    "Matched",
    "NearGenerator",
    "NucleusAnchor",
    "Penalty",
    "PositionClip",
    "Range",
    "Ratio",
    "Reshape",
    "Select",
    "SeqMeanTokenMean",
    "SeqMeanTokenSum",
    "SeqMeanTokenSumNorm",
    "Sigmoid",
    "SignFilter",
    "SoftClipped",
    "Steer",
    "TokenGroup",
    "TokenMean",
    "TokenSum",
    "TopCovariance",
    "TopEntropy",
    "TotalVariation",
    "Unbounded",
]
