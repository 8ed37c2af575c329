"""Effects: what the axes of a loss did to a mini-batch, beside the clip, in numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrl.loss.factors import IcePop
from pyrl.loss.loss import Loss
from pyrl.loss.old_policy import loss_mask
from pyrl.loss.penalties import Penalty
from pyrl.loss.terms import Terms, slots
from pyrl.pack import TokenBatch


def effects(loss: Loss, terms: Terms, batch: TokenBatch) -> dict[str, float]:
    """Means over the tokens of a mini-batch that take part, of those axes that the loss has."""
    device = terms.advantage_T.device
    used_T = loss_mask(loss, batch).to(device)
    count = max(1, int(used_T.sum()))

    def mean(value_T: Tensor) -> float:
        return float(torch.where(used_T, value_T.double(), 0.0).sum()) / count

    found: dict[str, float] = {}
    kept_T = used_T if terms.mask_T is None else terms.mask_T
    if terms.factor_T is not None:
        kept_T = kept_T & (terms.factor_T != 0)
        if loss.behaviour is not None or loss.weight is not None:
            factor_T = torch.where(kept_T, terms.factor_T, 0.0)
            found["loss/factor"] = float(factor_T.sum()) / max(1, int(kept_T.sum()))
    if loss.keep or isinstance(loss.behaviour, IcePop):
        found["loss/kept"] = mean(kept_T)
    if loss.reshape:
        advantage_T = torch.from_numpy(batch.advantage_T).to(device)
        found["loss/reshaped"] = mean((terms.advantage_T - advantage_T).abs())
    for slot, penalty in enumerate(slots(loss), 1):
        scale_T: Tensor | None = vars(terms)[f"scale_{slot}_T"]
        if scale_T is not None and not (isinstance(penalty, Penalty) and penalty.select is None):
            found["loss/penalized"] = mean(scale_T != 0)
    if terms.addend_T is not None:
        found["loss/outside_band"] = mean(terms.addend_T != 0)
    if terms.nucleus_gap is not None and loss.nucleus is not None:
        found[loss.nucleus.metric] = float(terms.nucleus_gap)
    return found
