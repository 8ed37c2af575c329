"""TRL: its GRPOTrainer on pyrl's trees, with the votes, the advantages and the loss of a method.

The host keeps its arguments, data, reward functions, optimizer, logs, callbacks, checkpoints, LoRA
and launch. pyrl takes over what is inside a training step: who samples, what a token is worth, and
how rows are read, each beginning that they share once. docs/hosts.md has it in a table.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pyrl.algorithm import Algorithm
from pyrl.answers import EQUIVALENCES, Extractor
from pyrl.answers.extraction import extractor_named
from pyrl.attention import attending
from pyrl.checks import one_of
from pyrl.engine.hf import HFEngine
from pyrl.hosts.trees import Grown, Trees
from pyrl.hosts.trl.options import (
    LossOf,
    check_arguments,
    check_loaded,
    check_options,
    end_ids,
    host_grpo,
    sampled_as,
)
from pyrl.hosts.trl.release import GRPOConfig, GRPOTrainer, base_model
from pyrl.hosts.trl.rows import put_advantages, read_rows, weighed
from pyrl.hosts.trl.updates import Updates, make_learner
from pyrl.loss import Loss
from pyrl.methods.fields import class_name
from pyrl.prompts import tokenized
from pyrl.rollout import derive_seed

__all__ = ["TreeGRPOTrainer"]


class TreeGRPOTrainer(GRPOTrainer):
    """GRPOTrainer (TRL 1.14 to 1.16) whose training steps grow trees.

    `num_generations` leaves of each prompt train; `algorithm.sample.votes` of them are grown and
    vote. What both name, sampling and sizes, is as `args` says. Without `reward_funcs` the method's
    own reward counts, such as a vote. The host's arguments are followed by:

    `algorithm`: any method, as `METHODS["echo"]()`; None: flat groups and the host's baseline.
    `loss`: "host" (`args.loss_type`) or "pyrl" (the method's). `extractor`, `equivalence`: how
    answers are read for a vote and compared, as in `pyrl train`; a function of the text also reads.
    `tokens_per_pass`: tokens in one forward and backward pass of pyrl's.

    Raises ValueError for an option that contradicts, by its name, and ModelError for a model that
    pyrl cannot sample from.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        *,
        algorithm: Algorithm | None = None,
        loss: LossOf = "host",
        extractor: str | Extractor = "boxed",
        equivalence: Literal["math", "exact"] = "math",
        tokens_per_pass: int = 16_384,
    ) -> None:
        if loss not in ("host", "pyrl"):
            raise ValueError(f"loss: expected 'host' or 'pyrl', got {loss!r}")
        check_arguments(locals())
        given = GRPOConfig() if args is None else args
        check_options(given, loss)
        one_of(equivalence, EQUIVALENCES, "equivalence")
        read = extractor_named(extractor) if isinstance(extractor, str) else extractor
        method = sampled_as(host_grpo(given) if algorithm is None else algorithm, given, loss)
        self.algorithm = method if loss == "pyrl" else replace(method, loss=Loss())
        self.loss = loss
        super().__init__(
            model=model,
            reward_funcs=reward_funcs or self.method_reward,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        check_loaded(self, loss)
        self._base: PreTrainedModel = base_model(self.model)
        with attending(self._base):
            engine = HFEngine(self._base, end_ids(given, self._base, self._tokenizer))
            self.learner = make_learner(
                self._base, self.algorithm, given, trains=loss == "pyrl", tokens=tokens_per_pass
            )
        self.learner.sampler_dtype = engine.dtype
        same = EQUIVALENCES[equivalence]()
        self.trees = Trees(self.algorithm, engine, self._tokenizer, read, same)
        self.updates = Updates(self.learner, given)
        self._rows: list[dict[str, Any]] = []
        self._grown: Grown
        self._reward_N: NDArray[np.float64]

    def method_reward(self, prompts: list[Any], **columns: Any) -> list[float | None]:
        """The method's own reward of the rows of a training step, called as a reward function."""
        reward_N = self.trees.rewards(self._grown)[self._grown.kept_N]
        return [None if np.isnan(reward) else float(reward) for reward in reward_N]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The host's, within which the model attends to trees if there is one process."""
        with ExitStack() as stack:
            if self._reads_trees:
                for read in filter(None, (self._base, self.ref_model)):
                    stack.enter_context(attending(read))
            step: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return step

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return dict(super()._generate_and_score_completions(inputs))
        self._rows = inputs
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        with self._training(), attending(self._base):
            look = self.learner.before(self._grown.kept.rows)
            credit = self.trees.credit(self._grown, self._reward_N, look)
            if self.loss == "pyrl":
                own = self.reward_funcs == [self.method_reward]
                usable = self.trees.usable(self._grown, self._reward_N, own=own)
                seed = (self.args.seed << 32) + self.state.global_step
                self._count(self.updates.begin(credit if usable else None, seed, self._progress))
        self._count(self.trees.metrics(self._grown, credit))
        put_advantages(output, credit.batch)
        if not credit.batch.mask_T.all():
            items = (output["completion_mask"] * output["tool_mask"]).sum()
            output["num_items_in_batch"] = self.accelerator.gather(items).sum()
        return output

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, *more: Any
    ) -> Any:
        """The leaves that train, in the order of the host's rows; in evaluation the host's own."""
        if not self.model.training:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *more)
        each = self.num_generations
        prompts = []
        for row, ids in zip(self._rows[::each], prompt_ids[::each], strict=True):
            token_T = np.array(ids, np.int32)
            prompts.append(tokenized(row, token_T, zlib.crc32(token_T.tobytes())))
        step, place = self.state.global_step, self._step % self.args.gradient_accumulation_steps
        seed = derive_seed(self.args.seed, step, place, self.accelerator.process_index)
        with self._training(), attending(self._base):
            self.trees.engine.load_weights(None, step)
            self._grown = self.trees.grow(prompts, seed, self._progress)
        if (self._grown.kept_G != each).any():
            raise ValueError(
                f"select: expected num_generations, {each}, leaves of each prompt, "
                f"{class_name(type(self.algorithm.select))} kept {self._grown.kept_G.tolist()}"
            )
        return [token_T.tolist() for token_T in self._grown.kept.token_N], None

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        """The host's call of its reward functions; this process's rows are weighed as it does."""
        of_all: Tensor = super()._calculate_rewards(
            inputs, prompts, completions, completion_ids_list
        )
        self._reward_N = weighed(
            of_all, self.reward_weights, self.accelerator.process_index, len(prompts)
        )
        return of_all

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **of_images: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The host's numbers [N, T], from rows read as trees where the model attends so."""
        if not (self._reads_trees and self.model.training):
            found: tuple[Tensor, Tensor | None, Tensor | None] = (
                super()._get_per_token_logps_and_entropies(
                    model,
                    input_ids,
                    attention_mask,
                    logits_to_keep,
                    batch_size=batch_size,
                    compute_entropy=compute_entropy,
                )
            )
            return found
        read = read_rows(
            self.learner.reader, base_model(model), input_ids, attention_mask, logits_to_keep
        )
        return read[0], read[1] if compute_entropy else None, None

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The host's loss, or the number of the method's, whose gradient is there already."""
        if self.loss == "host" or not self.model.training:
            found: Tensor = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return found
        with self._training():
            metrics = self.updates.gradient(self._step)
        self._count(metrics)
        return torch.tensor(metrics["loss"], device=self.accelerator.device, requires_grad=True)

    @property
    def _reads_trees(self) -> bool:
        """One process: several reduce gradients of what the host's wrapper has read."""
        return bool(self.accelerator.num_processes == 1)

    @property
    def _progress(self) -> float:
        return float(self.state.global_step / max(1, self.state.max_steps))

    @contextmanager
    def _training(self) -> Iterator[None]:
        """What the host takes for training mode is on again afterwards."""
        try:
            yield
        finally:
            self.model.train()

    def _count(self, metrics: Mapping[str, float]) -> None:
        """Log numbers under names that the host has none for."""
        of_host = HOSTS_OWN | ({"entropy"} if self.loss == "host" else set())
        for name, value in metrics.items():
            if name not in of_host:
                self._metrics["train"][name].append(value)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial))
        at = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.trees.save(self._state_file(at), self.learner.memory.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            more = self.trees.load(self._state_file(Path(checkpoint)))
            self.learner.memory.load_state_dict(more)

    def _state_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"pyrl_{self.accelerator.process_index}.safetensors"


HOSTS_OWN = frozenset(
    {"loss", "reward", "reward_std", "frac_reward_zero_std", "step_time", "num_tokens"}
    | {"completions/mean_length", "completions/clipped_ratio"}
)
"""Metrics that the host logs itself under the same names."""
