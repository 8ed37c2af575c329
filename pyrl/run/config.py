"""The settings of a run: a typed record, read from the command line and from YAML alike."""

from __future__ import annotations

import dataclasses
import difflib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml
from tyro import MISSING
from tyro.conf import AvoidSubcommands, FlagConversionOff
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from pyrl.checks import one_of
from pyrl.engine.launch import ENGINES
from pyrl.engine.vllm.options import VLLMOptions
from pyrl.foreign import TIME_LIMIT
from pyrl.methods.fields import classes, has_stages, is_record, leaves, stages
from pyrl.methods.registry import Registry
from pyrl.models.lora import LoRA
from pyrl.remote.options import RemoteOptions
from pyrl.run.names import (
    ConfigError,
    Given,
    Names,
    Plugins,
    check_owners,
    first_pass,
    flatten,
    make_choices,
    owned,
    take_names,
    take_plugins,
    without_replaced,
)


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
    total_tokens: int | None = None
    """Tokens that all steps may sample: the run ends before the first step that would exceed them.
    The learning rate then falls with the tokens that are spent, and --steps is one more limit."""
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
    """Element type of the weights, of their gradients and of the optimizer's moments. bfloat16: 8
    bytes a parameter in the place of 16, updates rounded at random; passes are in bfloat16 then,
    and an adapter stays in float32."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Element type of the forward and backward pass over float32 weights."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more time."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu", "cuda", "cuda:1"..."""
    threads: int | None = None
    """CPU threads; None takes all cores."""
    processes: int = 1
    """Processes on this machine that sample and learn together, each with all weights, on a GPU of
    its own or on a share of the cores; torchrun starts them on several machines. They end with the
    same weights, up to the order of sums."""
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


CHOICES = "choices"
"""Where a settings file has the class of each choice: PPO and CISPO can have the same numbers."""


def parse_train(argv: Sequence[str]) -> Run:
    """Settings from all that follows `pyrl train`: METHOD, unless the file names it, and options.

    ValueError: there is no such method, or what `parse_run` raises.
    """
    if argv[0].startswith("-"):
        argv = [method_of(argv), *argv]
    method, *options = argv
    given = first_pass(options)
    plugins = given.plugins
    if plugins is None and given.config is not None:
        plugins = take_plugins(_read(given.config), given.config)
    return parse_run(options, method, Registry(plugins or ()).method(method))


def parse_run(argv: Sequence[str], method: str, algorithm: object) -> Run:
    """Settings from the options of `pyrl train METHOD`; `algorithm` holds the method's defaults.

    Choices by name (`--loss gspo`) come first: they say which settings there are. Any nested frozen
    dataclass works: `--loss.kl.coef 0` sets algorithm.loss.kl.coef, and a stage of a tuple goes by
    its class: `--advantage.group-baseline.scale`. `--config FILE` reads YAML before the options,
    except for the settings of choices that the options replace by name. A wrong option exits with
    code 2 after naming the nearest right one; ConfigError: wrong file; ValueError: there is no such
    name, or an option belongs to another choice.
    """
    given = first_pass(argv)
    settings = _read(given.config) if given.config else {}
    run = _begin(method, algorithm, given, settings)
    check_owners(given.options, run.algorithm, Registry(run.plugin))
    return _parse(run, given.options)


def settings(method: str, /, **values: Any) -> Run:
    """A run's settings from Python, by the names that options and YAML have:

    settings("ettrl", model="demo", data="demo:train", loss="gspo", fork={"max_width": 3})

    `model` and `data` may be left to the objects that a Trainer is given. ConfigError names a
    setting that does not exist or cannot have its value; ValueError: there is no such name.
    """
    where, flat = Path("settings"), dict(flatten(values))
    registry = Registry(take_plugins(dict(flat), where))
    return _begin(method, registry.method(method), Given(where, None, {}, []), flat)


def _begin(method: str, algorithm: object, given: Given, settings: dict[str, Any]) -> Run:
    """The run before its options are read: with the choices by name, and the file's settings."""
    path = given.config or Path()
    named = settings.pop("method", method)
    if named != method:
        raise ConfigError(f"{path}: method: expected {method!r}, got {named!r}")
    of_file, plugins = take_names(settings, path), take_plugins(settings, path)
    names = of_file | given.names
    registry = Registry(plugins if given.plugins is None else given.plugins)
    run = Run(
        MISSING,
        MISSING,
        method,
        make_choices(algorithm, names, registry, path, of_file),
        Path("runs") / method,
        Names(**names),
        registry.plugins,
    )
    settings = without_replaced(settings, of_file, given.names)
    return _apply(run, settings, path, registry) if settings else run


def method_of(argv: Sequence[str]) -> str:
    """The method that the file of `--config` names; ConfigError: no such file, or it names none."""
    path = first_pass(argv).config
    if path is None:
        raise ConfigError(f"expected a method before the options of pyrl train, got {argv[0]!r}")
    method = _read(path).get("method")
    if not isinstance(method, str):
        raise ConfigError(f"{path}: expected the setting 'method', or a method before the options")
    return method


def settings_of(run: Run) -> dict[str, Any]:
    """All settings, nested as on the command line, names first, and the class of each choice."""
    nested: dict[str, Any] = {"method": run.method}
    nested |= {kind: {"name": name} for kind, name in run.names.chosen.items()}
    for name, value in _leaves(run):
        *groups, last = name.split(".")
        target = nested
        for group in groups:
            target = target.setdefault(group, {})
        target[last] = _plain(value)
    nested[CHOICES] = dict(classes(run.algorithm))
    return nested


def save_run(run: Run, path: Path) -> None:
    """Write all settings as YAML, whole or not at all; `load_run` gives an equal Run back."""
    part = path.with_name(path.name + ".part")
    # Escaped beyond ASCII: YAML folds raw line separators such as U+0085 into spaces.
    part.write_text(yaml.safe_dump(settings_of(run), sort_keys=False, allow_unicode=False), "utf-8")
    os.replace(part, path)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(map(_plain, value))
    return str(value) if isinstance(value, Path) else value


def load_run(path: Path, methods: Mapping[str, Callable[[], object]] | None = None) -> Run:
    """Settings that `save_run` wrote; ConfigError names what is wrong with the file.

    `methods`: those that it may name; None: all that there are, the file's plugins included.
    """
    settings = _read(path)
    method: Any = settings.get("method")
    if methods is None:
        registry = Registry(take_plugins(dict(settings), path))
        methods = {entry.name: entry.make for entry in registry.entries("method")}
    if method not in methods:
        raise ConfigError(f"{path}: method: expected one of {', '.join(methods)}, got {method!r}")
    run = _begin(method, methods[method](), Given(path, None, {}, []), settings)
    if MISSING in (run.model, run.data):
        raise ConfigError(f"{path}: expected the settings 'model' and 'data'")
    return run


def _parse(run: Run, options: Sequence[str], *markers: Any) -> Run:
    about = (
        f"Train by {run.method}. --config FILE reads settings from YAML; options override it.\n"
        "`pyrl methods` lists the names of choices; --loss gspo --help has that loss's settings."
    )
    return tyro.cli(
        Run,
        prog=f"pyrl train {run.method}",
        description=about,
        args=options,
        default=run,
        registry=_registry(),
        config=(AvoidSubcommands, *markers),
    )


def _registry() -> ConstructorRegistry:
    """Rules that let a field be whatever dataclass its default is, also behind a Protocol."""
    registry = ConstructorRegistry()
    asking = False

    @registry.struct_rule
    def narrow(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal asking
        if asking or not dataclasses.is_dataclass(info.type):
            return None
        asking = True
        spec = ConstructorRegistry.get_struct_spec(info)
        asking = False
        assert isinstance(spec, StructConstructorSpec)
        return replace(spec, fields=tuple(map(_narrowed, spec.fields)))

    @registry.struct_rule
    def tuples(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not has_stages(info.default):
            return None
        return StructConstructorSpec(
            instantiate=lambda **parts: tuple(parts.values()),
            fields=tuple(
                StructFieldSpec(name, type(stage), stage) for name, stage in stages(info.default)
            ),
        )

    return registry


def _narrowed(field: StructFieldSpec) -> StructFieldSpec:
    value = field.default
    if not (is_record(value) or has_stages(value)):
        return field
    metadata = getattr(field.type, "__metadata__", ())
    kind: Any = Annotated[(type(value), *metadata)] if metadata else type(value)
    return replace(field, type=kind)


def _leaves(run: Run) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of all settings; the algorithm's stand beside the run's."""
    yield from leaves(run, without=("method", "algorithm", "names"))
    yield from leaves(run.algorithm)


def _read(path: Path) -> dict[str, Any]:
    """Dotted names and values of a YAML file."""
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except (ValueError, yaml.YAMLError) as error:  # a date such as 2020-99-99 is a ValueError
        raise ConfigError(f"{path}: no valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected settings `name: value`, got {content!r}")
    return dict(flatten(content))


def _apply(run: Run, settings: Mapping[str, Any], path: Path, registry: Registry) -> Run:
    """The run with the settings of a file, read by the same parser as options."""
    current, own = dict(_leaves(run)), dict(classes(run.algorithm))
    options = []
    for name, value in settings.items():
        head, _, choice = name.partition(".")
        if head == CHOICES:
            if value != own.get(choice):
                kind = choice.partition(".")[0]
                whose = f"{kind} {vars(run.names)[kind]!r}" if kind in run.names.chosen else ""
                raise ConfigError(
                    f"{path}: {choice}: expected {own.get(choice)}, as the "
                    f"{whose or f'method {run.method!r}'} has it, got {value}"
                )
            continue
        if name not in current:
            if owners := owned(name, run.algorithm, registry):
                raise ConfigError(f"{path}: {name}{owners}")
            near = difflib.get_close_matches(name, current, n=1, cutoff=0)[0]
            raise ConfigError(f"{path}: there is no setting {name!r}; the nearest is {near!r}")
        if value in ([], None) and current[name] == ():
            continue  # choices that a method leaves out are no option
        if isinstance(value, list):
            options += [f"--{name}", *map(str, value)]
        elif value is not None or current[name] is not None:
            # A choice that a method leaves out (None) is no option, so it is not given back as one.
            options.append(f"--{name}={value}")
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            read = _parse(replace(run, model="", data=""), options, FlagConversionOff)
    except SystemExit as stop:
        raise ConfigError(f"{path}:\n{said.getvalue().rstrip()}") from stop
    return replace(read, **{n: MISSING for n in ("model", "data") if n not in settings})
