"""Setup: from the settings of a run to the parts that its steps work with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from tyro import MISSING

from pyrl._core.tree import Signals
from pyrl.algorithm import Algorithm
from pyrl.answers import EQUIVALENCES, Equivalence, Extractor
from pyrl.answers.reading import AnswerFormat, StopText, answer_format, check_formats, decoder
from pyrl.answers.truth import has_truth
from pyrl.checks import Checked
from pyrl.engine import Engine
from pyrl.engine.dealt import Dealt
from pyrl.engine.launch import ENGINES, Carry, Request
from pyrl.engine.sync import Copied, Shared, digests
from pyrl.learner import Learner
from pyrl.leaves import Decode
from pyrl.models import DTYPES, find_device, load_model, load_shape, model_location, room
from pyrl.models.lora import add_adapter, has_adapter, load_adapter
from pyrl.prompts import Prompt, load_prompts
from pyrl.ranks import ALONE, Ranks
from pyrl.remote.launch import launch
from pyrl.remote.learner import RemoteLearner
from pyrl.remote.needs import check_remote
from pyrl.remote.service import Service
from pyrl.reward import check_answers, function_reward
from pyrl.rollout import make_signals
from pyrl.run.checkpoint import Checkpoint, CheckpointError
from pyrl.run.config import Run
from pyrl.run.directory import find_start
from pyrl.run.evaluation import TRAINED
from pyrl.run.expert import Experts
from pyrl.run.sameness import Told, check_loaded, check_ranks
from pyrl.run.states import States
from pyrl.sources import Rows

Questions = str | Iterable[Any]
"""A source as `--data` names it, or rows in memory: a datasets.Dataset, dicts, or texts alone."""


@dataclass(frozen=True)
class Given:
    """What the caller of a run has already, in the place of what the settings name."""

    model: PreTrainedModel | None = None
    """It is the one that trains, also where the run is resumed."""
    tokenizer: PreTrainedTokenizerBase | None = None
    prompts: Iterable[Any] | None = None
    reward: Sequence[Callable[..., Any]] = ()
    reward_weights: Sequence[float] = ()

    def named(self, run: Run) -> Run:
        """The run whose settings say what is given. ValueError: it lacks the rest."""
        if (self.model is None) != (self.tokenizer is None):
            raise ValueError("model, tokenizer: expected both of them or neither")
        if self.model is not None:
            plain = isinstance(self.model, PreTrainedModel)
            if not plain or has_adapter(self.model):
                got = "one with an adapter" if plain else type(self.model).__name__
                raise ValueError(
                    f"model: expected a PreTrainedModel of transformers without an adapter "
                    f"(lora.rank makes a new one), got {got}"
                )
            if self.model.dtype != DTYPES[run.weights]:
                raise ValueError(
                    f"model: expected weights in {run.weights}, as the setting 'weights' says, got "
                    f"{self.model.dtype}"
                )
            name = self.model.config._name_or_path or type(self.model).__name__
            run = replace(run, model=name if run.model is MISSING else run.model)
        if self.prompts is not None:
            run = replace(run, data="prompts")
        for setting, value in (("model", run.model), ("data", run.data)):
            if value is MISSING:
                raise ValueError(f"{setting}: expected the setting, or an object in its place")
        return run


@dataclass(frozen=True)
class Parts:
    """What a run is made of: loaded, checked against each other, and as it was saved if it was."""

    algorithm: Algorithm
    """The method, with the run's reward function in the place of its reward if there is one."""
    states: States
    """What its choices remember from step to step."""
    start: Checkpoint | None
    """What the run goes on from; None if it begins."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base: int | None
    """Digest of the frozen weights below an adapter; None: there is none."""
    learner: Learner
    prompts: list[Prompt]
    """The training questions."""
    experts: Experts
    """What an expert says to them, for a loss that reads it."""
    eval_sets: dict[str, list[Prompt]]
    """Questions, some or all with true answers, by the names that the report gives them."""
    decode: Decode
    extractor: Extractor
    stop: StopText | None
    equivalence: Equivalence
    engine: Engine
    sync: Carry
    signals: Signals | None
    """Windows and sketches of the fork and prune rules; None where neither decides online."""


def assemble(
    run: Run,
    eval_sets: Mapping[str, Questions] | None = None,
    given: Given | None = None,
    ranks: Ranks = ALONE,
) -> Parts:
    """Load all parts that are not given. `eval_sets` names questions in the place of the run's own.

    RunError, CheckpointError, ModelError, DataError, ConfigError or EngineError names a setting or
    a file that cannot be used, RanksError a process that differs; nothing is written.
    """
    given = given or Given()
    if run.tinker is not None:
        check_remote(run)
    check_ranks(run, ranks)
    algorithm = _rewarded(run, given)
    states = States(algorithm)
    start = find_start(run)
    if run.threads:
        torch.set_num_threads(run.threads)
    learner, tokenizer, base, bits = _learner(run, start, given, ranks)
    model = learner.model
    load = _loader(run, model, tokenizer)
    data = run.data if given.prompts is None else Rows(given.prompts)
    prompts = check_answers(algorithm.reward, load(data), run.data)
    check_loaded(ranks, prompts, bits, start)
    experts = Experts(
        algorithm.loss,
        prompts,
        tokenizer,
        max_tokens=algorithm.sample.max_tokens,
        data=run.data,
    )
    sets = _eval_sets(run, data, prompts, load, eval_sets)
    form = answer_format(model, tokenizer, data, run.extractor, run.stop, run.answer_after)
    engine, sync = _engine(run, learner, form, prompts[0])
    signals = make_signals(algorithm.fork, algorithm.prune)
    if start:
        _go_on(start, learner, signals, states)
    return Parts(
        algorithm=algorithm,
        states=states,
        start=start,
        model=model,
        tokenizer=tokenizer,
        base=base,
        learner=learner,
        prompts=prompts,
        experts=experts,
        eval_sets=sets,
        decode=decoder(tokenizer),
        extractor=form.extractor,
        stop=form.stop,
        equivalence=EQUIVALENCES[run.equivalence](),
        engine=engine,
        sync=sync,
        signals=signals,
    )


def _go_on(start: Checkpoint, learner: Learner, signals: Signals | None, states: States) -> None:
    """Take over what the checkpoint remembers beside the weights."""
    learner.load_state(start.optimizer(), start.counts)
    learner.memory.load_state_dict(start.record["loss"])
    if signals is not None:
        signals.load(start.signals())
    states.load_state_dict(start.record["states"], start.arrays())


def _learner(
    run: Run, start: Checkpoint | None, given: Given, ranks: Ranks
) -> tuple[Learner, PreTrainedTokenizerBase, int | None, int]:
    """The learner with its model, here or on a server; the tokenizer; the digest of what stays
    frozen below an adapter that is here; and that of all weights, if other processes have them."""
    path = None if start is None else start.record.get("remote")
    if start is not None and (path is None) != (run.tinker is None):
        has = "here" if path is None else f"on a server, as {path}"
        raise CheckpointError(
            f"{start.path}: expected --tinker URL if the weights are on a server, and none if they "
            f"are here; they are {has}"
        )
    if run.tinker is not None:
        if given.model is not None:
            raise ValueError("model: expected a name that the server has, got a model")
        service = Service(run.tinker, run.model, run.remote.timeout)
        shape, tokenizer = load_shape(run.model)
        return RemoteLearner(service, shape, run, path), tokenizer, None, 0
    device = ranks.device(find_device(run.device))
    model, tokenizer, initial, base = _load(run, start, given)
    initial = None if initial is None else initial.to(device)
    bits = sum(digests(model.state_dict()).values()) if ranks.size > 1 else 0
    return Learner(model.to(device), initial, run, ranks), tokenizer, base, bits


def _load(
    run: Run, start: Checkpoint | None, given: Given
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, PreTrainedModel | None, int | None]:
    """The model as it trains or goes on, its tokenizer, the frozen first model if the method reads
    one, and the digest of what stays frozen below an adapter."""
    if given.model is not None and given.tokenizer is not None:
        model, tokenizer = given.model.eval(), given.tokenizer
    elif start is None or run.lora.rank is not None:
        model, tokenizer = load_model(run.model, dtype=run.weights)
    else:
        model, tokenizer = load_model(str(start.path), dtype=run.weights)
    if run.lora.rank is None:
        initial = None
        if run.algorithm.has_reference:
            same = given.model is not None or start is None
            initial = copy.deepcopy(model) if same else load_model(run.model, dtype=run.weights)[0]
        if start is not None and given.model is not None:
            model.load_state_dict(load_model(str(start.path), dtype=run.weights)[0].state_dict())
        return model, tokenizer, initial, None
    base = sum(digests(model.state_dict()).values())
    if start is None:
        where = run.model if given.model is not None else str(model_location(run.model))
        add_adapter(model, run.lora, where, run.seed)
    elif start.record["base"] != base:
        raise CheckpointError(
            f"{start.path}: expected the weights of {run.model} that its adapter has trained on, "
            f"they are others now"
        )
    else:
        load_adapter(model, start.path)
    return model, tokenizer, None, base


def _rewarded(run: Run, given: Given) -> Algorithm:
    """The method, with reward functions in the place of its reward if there are some."""
    algorithm: Algorithm = run.algorithm
    if functions := given.reward or run.reward_function:
        reward = function_reward(
            functions,
            given.reward_weights or run.reward_weights,
            pass_answers=run.reward_answers,
            time_limit=run.call_time_limit,
        )
        algorithm = replace(algorithm, reward=reward)
    _check_choices(algorithm)
    return algorithm


def _check_choices(algorithm: Algorithm) -> None:
    """ValueError names a file that a choice cannot use, or a part of the loss that cannot work with
    the rewards, as far as known."""
    for choice in (algorithm.vote, algorithm.fork):
        if isinstance(choice, Checked):
            choice.check()
    reward = algorithm.reward
    for axis in algorithm.loss.reshape:
        if hasattr(axis, "rewards") and hasattr(reward, "values"):
            other = " and ".join(f"{value:g}" for value in sorted(reward.values - axis.rewards))
            can = [f"{value:g}" for value in sorted(axis.rewards)]
            if other:
                raise ValueError(
                    f"{type(axis).__name__}: expected rewards of {' or '.join(can)}, got {other} "
                    f"by {type(reward).__name__}; --reward vote --reward.wrong {can[0]} "
                    f"--reward.no-answer {can[0]} gives such"
                )


def _loader(
    run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Callable[[str | Rows], list[Prompt]]:
    """Reads the questions of a source as the run asks for."""
    space = room(model)
    return partial(
        load_prompts,
        tokenizer=tokenizer,
        # A server samples a token after each text, also after one that it only scores.
        max_tokens=space.tokens - run.algorithm.sample.max_tokens - (run.tinker is not None),
        space=space.limit,
        chat=run.chat,
        prefix=run.prefix,
        suffix=run.suffix,
        prompt_column=run.prompt_column,
        answer_column=run.answer_column,
        system=run.system,
        chat_arguments=run.chat_arguments,
        time_limit=run.call_time_limit,
    )


def _engine(
    run: Run, learner: Learner, form: AnswerFormat, question: Prompt
) -> tuple[Engine, Carry]:
    """This process's engine, of which the learner knows how it computes; at the leader those of
    all processes as one."""
    engine, sync = _launched(run, learner, form, question)
    learner.sampler_dtype, learner.sampler_shares = engine.dtype, isinstance(sync, Shared | Copied)
    if run.ahead and isinstance(sync, Shared):
        engine.close()
        raise ValueError(
            f"ahead: expected an engine with weights of its own, got {run.engine!r}, which samples "
            f"with the learner's while they change"
        )
    if learner.ranks.leads:
        return Dealt(engine, learner.ranks), Told(sync, learner.ranks)
    return engine, sync


def _launched(
    run: Run, learner: Learner, form: AnswerFormat, question: Prompt
) -> tuple[Engine, Carry]:
    """The engine by its name, or the one of the learner's server."""
    if isinstance(learner, RemoteLearner):
        return launch(run, learner, form.eos, stops=form.stop is not None)
    request = Request(
        model=learner.model,
        source=run.model,
        eos=form.eos,
        max_rows=run.max_rows,
        dtype=run.weights if run.dtype == "float32" else run.dtype,
        probe_T=question.tokens,
        gather=learner.policy.gather if learner.policy.sharded else None,
        vllm=run.vllm,
        ahead=run.ahead,
    )
    return ENGINES[run.engine](request)


def _eval_sets(
    run: Run,
    data: str | Rows,
    prompts: list[Prompt],
    load: Callable[[str | Rows], list[Prompt]],
    given: Mapping[str, Questions] | None,
) -> dict[str, list[Prompt]]:
    if given is None:
        given = {"evaluation": run.eval_data} if run.eval_data else {}
    sources = {name: of if isinstance(of, str) else Rows(of) for name, of in given.items()}
    check_formats(data, sources.values(), run.extractor, run.stop)
    sets = {name: load(source) for name, source in sources.items()}
    for name, questions in sets.items():
        if not any(map(has_truth, questions)):
            raise ValueError(f"{sources[name]}: expected questions with true answers, none has one")
    if any(map(has_truth, prompts)):
        sets = {TRAINED: prompts} | sets
    return sets
