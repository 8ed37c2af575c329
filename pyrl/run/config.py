"""The settings of a run: a typed record; `pyrl.run.parsing` reads and writes it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pyrl.checks import one_of
from pyrl.engine.launch import ENGINES
from pyrl.engine.vllm.options import VLLMOptions
from pyrl.foreign import TIME_LIMIT
from pyrl.models.lora import LoRA
from pyrl.remote.options import RemoteOptions
from pyrl.run.names import Names, Plugins


@dataclass(frozen=True)
class Run:
    """What is trained, on what, for how long. How it is trained is `algorithm`."""

    model: str
    """Model: "demo", "smollm2", a directory, a .gguf file, or a Hugging Face id."""
    data: str
    """Questions: a .jsonl, .json, .csv or .parquet file, "reasoning_gym:TASK", or a data set id."""
    method: Annotated[str, tyro.conf.Suppress]
    """Name of the method that `algorithm` began as."""
    algorithm: Annotated[Any, tyro.conf.arg(name="")]
    """Every choice of the method (pyrl.algorithm.Algorithm)."""
    output: Path
    """Directory of checkpoints, metrics and the report."""
    names: Annotated[Names, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Names)
    """The choices of `algorithm` that are not the method's own but were made by name."""
    plugin: Plugins = ()
    """Files of Python code with further methods and choices, in tables such as LOSSES."""
    resume: bool = False
    """Go on from the last checkpoint in the output directory."""
    steps: int = 80
    """Training steps: each samples, votes and updates once."""
    ahead: bool = False
    """Sample the next step in a second thread while this one's update runs: a step learns from the
    policy of exactly one step before, which its loss corrects for, and the engine has a copy."""
    total_tokens: int | None = None
    """Tokens that all steps may sample: the run ends before the first step that would exceed them.
    The learning rate then falls with the tokens that are spent, and --steps is one more limit."""
    total_trained_tokens: int | None = None
    """Response tokens with an advantage other than zero that all steps may train on: no step begins
    after them. The learning rate then falls with them."""
    total_seconds: float | None = None
    """Seconds that all steps may take: no step begins after them. The learning rate then falls
    with the seconds, so that no two such runs are alike to the last bit."""
    prompts_per_step: int = 16
    """Questions in a step."""
    seed: int = 0
    """Seed of sampling and of the order of the questions."""
    optimizer: Literal["adamw", "n_pg_igt", "n_harpg"] = "adamw"
    """"n_pg_igt" and "n_harpg": normalised momentum, by gradients at a point ahead of the weights,
    or corrected by how the gradient changes, for another pass. Their rate is the length of a step
    of all weights together; they have no weight decay."""
    learning_rate: float = 1e-6
    """Peak rate of the optimizer. Too high a rate collapses the model within a few steps."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's two moments; of the other optimizers' momentum the first."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    warmup_steps: int = 10
    """Steps in which the rate rises linearly to its peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up."""
    min_learning_rate: float = 0.05
    """What it falls towards, as a share of the peak; one step after the last it would be there."""
    clip_grad_norm: float = 1.0
    """Largest norm of the gradient; larger ones are scaled down to it."""
    old_logprobs: Literal["auto", "learner", "engine"] = "auto"
    """Whose log-probs the policy before the update has: "learner" (a pass over the samples before
    a step's updates) or "engine" (what it reported while sampling). "auto": the learner's where the
    loss compares both, reads what no engine reports, or follows the sign of a difference, and where
    the engine is another one or computes in another precision."""
    pack: Literal["tree", "flat"] = "tree"
    """"tree": the learner reads a beginning that rows share once. "flat": once for each row. The
    gradient is the same."""
    tokens_per_pass: int = 16_384
    """Tokens in one forward and backward pass: the memory knob. It does not change the result."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """Element type of weights, gradients and moments. bfloat16: 8 bytes a parameter in the place of
    16, updates rounded at random, and passes in bfloat16; an adapter stays in float32."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Element type of the forward and backward pass over float32 weights."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more time."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu", "cuda", "cuda:1"..."""
    threads: int | None = None
    """CPU threads; None takes all cores."""
    processes: int = 1
    """Processes on this machine that sample and learn together, each on a GPU of its own or a share
    of the cores; torchrun starts those of several machines. They end as one, up to rounding."""
    shard: bool = False
    """Split weights, gradients and the optimizer's state over the processes (FSDP2)."""
    lora: LoRA = dataclasses.field(default_factory=LoRA)
    """Low-rank adapters in the place of the weights."""
    engine: str = "hf"
    """Who samples: "hf" (transformers, with the learner's own weights), "vllm", or an engine that
    was added to pyrl.engine.launch.ENGINES."""
    vllm: VLLMOptions = dataclasses.field(default_factory=VLLMOptions)
    """How vLLM runs the model."""
    tinker: str | None = None
    """Address of a server of the Tinker protocol that samples and trains the model, as an adapter;
    its token is in TINKER_API_KEY."""
    remote: RemoteOptions = dataclasses.field(default_factory=RemoteOptions)
    """How that server is asked."""
    max_rows: int = 256
    """Branches that the engine samples at the same time."""
    chat: bool | None = None
    """Wrap questions in the tokenizer's chat template; None: if it has one."""
    prefix: str = ""
    """Text before each question."""
    suffix: str = ""
    """Text after each question, such as how the answer should be written."""
    prompt_column: str | None = None
    """Column of the questions; None: prompt, question, problem or messages."""
    answer_column: str | None = None
    """Column of the true answers; None: answer, solution, ground_truth or
    reward_model.ground_truth."""
    system: str | None = None
    """A system message before each question, for the chat template."""
    chat_arguments: tuple[str, ...] = ()
    """Variables of the chat template, each NAME=VALUE, such as enable_thinking=False."""
    extractor: str | None = None
    """How the answer is read from a response: "boxed", "whole", "number" or "regex:PATTERN"; None:
    as the questions ask for (reasoning_gym "whole", others "boxed")."""
    answer_after: str = ""
    """Read the answer only from what follows the last such text, as "</think>"; a response
    without it has none. Empty: from all of the response."""
    equivalence: Literal["math", "exact"] = "math"
    """When two answers are the same: as mathematics (math-verify), or as text."""
    stop: str | None = None
    """A response also ends where it has this text, of one token or several; None: as the questions
    ask for (reasoning_gym with worked examples a line break, others nothing)."""
    reward_function: tuple[str, ...] = ()
    """Reward responses by functions that you write, as TRL or verl calls them, not by the method's
    reward: each "module:function" or "file.py:function"."""
    reward_weights: tuple[float, ...] = ()
    """The weight of each in the sum of several; none: 1 each."""
    reward_answers: bool = False
    """Also pass that function the true answers, as the column `answer` and under the names of the
    data's own columns. A function of verl's needs them."""
    call_time_limit: float = TIME_LIMIT
    """Seconds that the reward function may take for the responses of a step, and the chat template
    for a question; a call that takes longer ends the run."""
    save_every: int = 10
    """Steps between checkpoints; the last step always leaves one."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay on disk."""
    eval_every: int = 0
    """Steps between evaluations during training; 0: none."""
    eval_before: bool = True
    """Score the model before training, if there are questions with answers."""
    eval_after: bool = True
    """Score the model after training, if there are questions with answers."""
    eval_limit: int | None = None
    """Score only this many questions of each set, the same random ones each time; 0: all; None: as
    many as cost less than a tenth of the tokens that training samples."""
    eval_data: str | None = None
    """Questions with answers to evaluate on; None: the training questions, if they have answers."""
    eval_samples: int = 16
    """Samples of each question for pass@n and maj@n."""
    save_trees: int = 0
    """Save the trees of the first N questions of each step for `pyrl report`, pruned branches
    included: about 30 bytes for each token of each response."""
    diagnostics: tuple[Literal["advantage_flips", "attention_entropy", "off_policy"], ...] = ()
    """More metrics of each update: signs of advantages without one of the rewards; how widely each
    head attends; reward, entropy and distance of the updated policy by its rows' weights."""
    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Besides metrics.jsonl."""

    def __post_init__(self) -> None:
        one_of(self.engine, ENGINES, "engine")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected >= {least}, got {value}")
        for name in ("learning_rate", "clip_grad_norm", "call_time_limit", "total_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected > 0, got {value}")
        if not 0 <= self.min_learning_rate <= 1:
            raise ValueError(
                f"min_learning_rate: expected a share of the peak in [0, 1], "
                f"got {self.min_learning_rate}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {self.betas}")
        if self.optimizer != "adamw" and self.weight_decay:
            raise ValueError(
                f"weight_decay: expected 0 with --optimizer {self.optimizer}, which has none, "
                f"got {self.weight_decay}"
            )
        if self.names.reward is not None and self.reward_function:
            raise ValueError(
                f"reward: expected a name or a reward_function, got {self.names.reward!r} and "
                f"{', '.join(self.reward_function)}"
            )
        if isinstance(self.reward_function, str):
            raise ValueError(
                f"reward_function: expected a tuple of functions, got {self.reward_function!r}"
            )
        weights, functions = len(self.reward_weights), len(self.reward_function)
        if weights not in (0, functions):
            raise ValueError(
                f"reward_weights: expected one for each of {functions} reward functions, or none, "
                f"got {weights}"
            )


_LEAST = {
    "steps": 1,
    "total_tokens": 1,
    "total_trained_tokens": 1,
    "prompts_per_step": 1,
    "seed": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "tokens_per_pass": 1,
    "threads": 1,
    "processes": 1,
    "max_rows": 1,
    "save_every": 1,
    "keep_checkpoints": 1,
    "eval_every": 0,
    "eval_limit": 0,
    "eval_samples": 1,
    "save_trees": 0,
}
