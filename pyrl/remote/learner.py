"""Learner: the updates of a run, whose passes and optimizer steps a server makes.

A loss of pyrl is computed here, from the log-probs of tokens, and its derivatives by them travel as
the weights of the protocol's cross entropy: the one loss that every server has.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from pyrl.learner import Learner
from pyrl.learner.effects import effects
from pyrl.learner.tally import Tally
from pyrl.logits.token_stats import Options, TokenStats
from pyrl.loss.axis import LossState
from pyrl.loss.columns import Columns
from pyrl.loss.old_policy import loss_columns, tensors
from pyrl.loss.policy_loss import policy_loss
from pyrl.loss.result import PolicyLoss
from pyrl.loss.terms import Terms
from pyrl.pack import TokenBatch
from pyrl.remote.service import Service

if TYPE_CHECKING:
    from pyrl.run.config import Run

STEPS = "steps"
"""What a checkpoint calls the number of optimizer steps."""

EPSILON = 1e-8
"""Of Adam, as the local learner has it."""


class RemoteLearner(Learner):
    """`Learner` whose model and optimizer are a training client's."""

    def __init__(
        self, service: Service, shape: PreTrainedModel, run: Run, path: str | None
    ) -> None:
        """`shape`: the model without its weights; `path`: where the server has the state that the
        run goes on from."""
        self.service, self._path = service, path
        self._steps = self._tokens = 0
        super().__init__(shape, shape, run)

    def _own(self, model: PreTrainedModel, initial: PreTrainedModel | None) -> None:
        """There is nothing to prepare: the server has the model."""

    @cached_property
    def client(self) -> Any:
        """The training client. It is made when it is first used: what a run can be refused for
        before has been said by then."""
        if self._path is not None:
            return self.service.trainer_from(self._path)
        assert self.run.lora.rank is not None
        return self.service.trainer(self.run.lora.rank, self.run.seed)

    @cached_property
    def _untrained(self) -> Any:
        """The first model, for a reference."""
        return self.service.untrained()

    @property
    def changed(self) -> bool:
        return self._steps > 0

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def sampler(self) -> Any:
        """A client that samples from the weights as they are now."""
        return self.service.ready(self.client.save_weights_and_get_sampling_client)

    def gradient(
        self, batch: TokenBatch, state: LossState | None = None, *, exact: bool = False
    ) -> Tally:
        """Leave the gradient of the whole batch's loss on the server.

        Where the policy has not moved and the loss reads no more than its ratio to itself, the
        derivatives are known before a pass; otherwise one pass tells the log-probs first.
        """
        terms = self._terms(batch, state)
        tally = Tally(effects(self.loss, terms, batch))
        used_N = self._used(batch, terms)
        if not len(used_N):
            return tally
        batch, terms = batch.take(used_N), terms.take(used_N)
        known = exact and {need.name for need in self.loss.token_needs} <= {"old_logprob_T"}
        logprob_T = batch.old_logprob_T if known else self._forward(batch)
        out = self._policy_loss(batch, terms, logprob_T, exact)
        weight_T = -out.logprob_grad_T.numpy()
        sent = self.client.forward_backward(self._data(batch, weight_T), "cross_entropy")
        learned_T = torch.from_numpy(self._logprobs(sent, batch)).double()
        entropy_T = torch.from_numpy(batch.entropy_T)
        tally.add(out, TokenStats(learned_T, entropy_T, torch.zeros_like(learned_T)), batch, terms)
        return tally

    def _policy_loss(
        self, batch: TokenBatch, terms: Terms, logprob_T: NDArray[np.float32], exact: bool
    ) -> PolicyLoss:
        columns = tensors(loss_columns(batch), self.device)
        current_T = torch.from_numpy(logprob_T).double()
        reference: Tensor | None = None
        if self.loss.has_reference:
            reference = torch.from_numpy(self._read(batch, frozen=True)["logprob_T"])
        given: Columns = {
            "rollout_logprob_T": columns["rollout_logprob_T"],
            "ref_logprob_T": reference,
            "expert_logprob_T": columns.get("expert_logprob_T"),
            "old_logprob_T": current_T if exact else columns["old_logprob_T"],
        }
        entropy_T = columns["entropy_T"].double()
        return policy_loss(current_T, entropy_T, loss=self.loss, terms=terms, **given)

    def _move(
        self, batch: TokenBatch, state: LossState, tally: Tally, rate: float, *, on_policy: bool
    ) -> dict[str, float]:
        """The server clips the gradient, and says its norm if it knows it."""
        self.check(tally, 0.0, on_policy=on_policy)
        if not tally.weight:
            return {}
        run = self.run
        adam = self.service.types.AdamParams(
            learning_rate=rate,
            beta1=run.betas[0],
            beta2=run.betas[1],
            eps=EPSILON,
            weight_decay=run.weight_decay,
            grad_clip_norm=run.clip_grad_norm,
        )
        told = self.service.wait(self.client.optim_step(adam)).metrics or {}
        self._steps += 1
        return {"grad_norm": float(told["grad_norm"])} if "grad_norm" in told else {}

    def _has_read(self) -> dict[str, float]:
        """The server alone knows how it reads rows that begin alike."""
        read, self._tokens = self._tokens, 0
        return {"pack/tokens": float(read)}

    def _drop_gradient(self) -> None:
        """The run ends here, and with it what the server has added up."""

    def _read(
        self, batch: TokenBatch, asked: Options | None = None, *, frozen: bool = False
    ) -> dict[str, NDArray[np.float64]]:
        """Log-probs of each response token [T]; no more is known of the distribution."""
        read = self._reference if frozen else self._forward
        logprob_T = read(batch).astype(np.float64) if len(batch) else np.empty(0)
        return {"logprob_T": logprob_T, "old_logprob_T": logprob_T}

    def _forward(self, batch: TokenBatch) -> NDArray[np.float32]:
        nothing_T = np.zeros(len(batch.label_T), np.float32)
        return self._logprobs(
            self.client.forward(self._data(batch, nothing_T), "cross_entropy"), batch
        )

    def _logprobs(self, sent: Any, batch: TokenBatch) -> NDArray[np.float32]:
        """What a pass says of the response tokens [T]; a row's targets end with them."""
        rows = self.service.wait(sent).loss_fn_outputs
        own_N = np.diff(batch.token_offset_N1).tolist()
        parts = [np.asarray(row["logprobs"].data)[-n:] for row, n in zip(rows, own_N, strict=True)]
        return np.concatenate(parts).astype(np.float32)

    def _reference(self, batch: TokenBatch) -> NDArray[np.float32]:
        """The same by the first model."""
        places = zip(batch.input_offset_N1[:-1], batch.input_offset_N1[1:], strict=True)
        asked = [
            self._untrained.compute_logprobs(self.service.text(batch.input_I[i:j].tolist()))
            for i, j in places
        ]
        own_N = np.diff(batch.token_offset_N1).tolist()
        told = [self.service.wait(future)[-n:] for future, n in zip(asked, own_N, strict=True)]
        found = [self.service.told("log-probs of prompts", p) for part in told for p in part]
        return np.array(found, np.float32)

    def _data(self, batch: TokenBatch, weight_T: NDArray[np.floating]) -> list[Any]:
        """Each row as the protocol has it: the targets are the input moved by one place."""
        self._tokens += len(batch.input_I)
        found = []
        for n in range(len(batch)):
            input_I = batch.input_I[batch.input_offset_N1[n] : batch.input_offset_N1[n + 1]]
            own_T = weight_T[batch.token_offset_N1[n] : batch.token_offset_N1[n + 1]]
            columns = {
                "target_tokens": input_I[1:],
                "weights": np.pad(own_T, (len(input_I) - 1 - len(own_T), 0)).astype(np.float32),
            }
            text = self.service.text(input_I[:-1].tolist())
            found.append(self.service.types.Datum(model_input=text, loss_fn_inputs=columns))
        return found

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """How many steps there were; the server has the rest (`keep`)."""
        return {}, {STEPS: float(self._steps)}

    def load_state(self, tensors: Mapping[str, Tensor], counts: Mapping[str, float]) -> None:
        """The same; `client` begins with the rest."""
        self._steps = int(counts[STEPS])

    def weights(self) -> None:
        """The server has them."""

    def keep(self, step: int) -> str:
        saving = self.client.save_state(f"step-{step}", overwrite=True)
        return str(self.service.wait(saving).path)

    def publish(self) -> str:
        saving = self.client.save_weights_for_sampler("trained")
        return str(self.service.wait(saving).path)
