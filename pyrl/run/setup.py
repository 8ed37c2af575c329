"""Setup: from the settings of a run to the parts that its steps work with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyrl._core.tree import Signals
from pyrl.algorithm import Algorithm
from pyrl.answers import EQUIVALENCES, Equivalence, Extractor
from pyrl.answers.reading import StopText, answer_format, check_formats, decoder
from pyrl.answers.truth import has_truth
from pyrl.checks import Checked
from pyrl.engine import Engine
from pyrl.engine.launch import ENGINES, Carry, Request
from pyrl.engine.sync import Shared, digests
from pyrl.learner import Learner
from pyrl.leaves import Decode
from pyrl.models import find_device, load_model, model_location, room
from pyrl.models.lora import add_adapter, load_adapter
from pyrl.prompts import Prompt, load_prompts
from pyrl.reward import FunctionReward, check_answers
from pyrl.rollout import make_signals
from pyrl.run.checkpoint import Checkpoint, CheckpointError
from pyrl.run.config import Run
from pyrl.run.directory import find_start
from pyrl.run.evaluation import TRAINED
from pyrl.run.expert import Experts
from pyrl.run.states import States


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


def assemble(run: Run, eval_sets: Mapping[str, str] | None = None) -> Parts:
    """Load all parts. `eval_sets` names sources of questions in the place of the run's own.

    RunError, CheckpointError, ModelError, DataError, ConfigError or EngineError names a setting or
    a file that cannot be used; nothing is written.
    """
    algorithm: Algorithm = run.algorithm
    if run.reward_function is not None:
        reward = FunctionReward(run.reward_function, run.reward_answers, run.call_time_limit)
        algorithm = replace(algorithm, reward=reward)
    _check_choices(algorithm)
    states = States(algorithm)
    start = find_start(run)
    if run.threads:
        torch.set_num_threads(run.threads)
    device = find_device(run.device)
    model, tokenizer, base = _load(run, start)
    twin = algorithm.has_reference and base is None
    initial = load_model(run.model, dtype=run.weights)[0].to(device) if twin else None
    learner = Learner(model.to(device), initial, run)

    load = _loader(run, model, tokenizer)
    prompts = check_answers(algorithm.reward, load(run.data), run.data)
    experts = Experts(
        algorithm.loss,
        prompts,
        tokenizer,
        max_tokens=algorithm.sample.max_tokens,
        data=run.data,
    )
    sets = _eval_sets(run, prompts, load, eval_sets)
    form = answer_format(model, tokenizer, run.data, run.extractor, run.stop, run.answer_after)
    engine, sync = _engine(run, model, form.eos, prompts[0])
    learner.sampler_dtype, learner.sampler_shares = engine.dtype, isinstance(sync, Shared)
    signals = make_signals(algorithm.fork, algorithm.prune)
    if start:
        learner.load_state(start.optimizer(), start.counts)
        if signals is not None:
            signals.load(start.signals())
        states.load_state_dict(start.record["states"], start.arrays())
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


def _load(
    run: Run, start: Checkpoint | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int | None]:
    """The model as it trains or goes on, its tokenizer, and the digest of what stays frozen."""
    if run.lora.rank is None:
        return *load_model(str(start.path) if start else run.model, dtype=run.weights), None
    model, tokenizer = load_model(run.model, dtype=run.weights)
    base = sum(digests(model.state_dict()).values())
    if start is None:
        add_adapter(model, run.lora, str(model_location(run.model)), run.seed)
    elif start.record["base"] != base:
        raise CheckpointError(
            f"{start.path}: expected the weights of {run.model} that its adapter has trained on, "
            f"they are others now"
        )
    else:
        load_adapter(model, start.path)
    return model, tokenizer, base


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
) -> Callable[[str], list[Prompt]]:
    """Reads the questions of a source as the run asks for."""
    space = room(model)
    return partial(
        load_prompts,
        tokenizer=tokenizer,
        max_tokens=space.tokens - run.algorithm.sample.max_tokens,
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
    run: Run, model: PreTrainedModel, eos: Collection[int], question: Prompt
) -> tuple[Engine, Carry]:
    request = Request(
        model=model,
        source=run.model,
        eos=eos,
        max_rows=run.max_rows,
        dtype=run.weights if run.dtype == "float32" else run.dtype,
        probe_T=question.tokens,
        vllm=run.vllm,
    )
    return ENGINES[run.engine](request)


def _eval_sets(
    run: Run,
    prompts: list[Prompt],
    load: Callable[[str], list[Prompt]],
    sources: Mapping[str, str] | None,
) -> dict[str, list[Prompt]]:
    if sources is None:
        sources = {"evaluation": run.eval_data} if run.eval_data else {}
    check_formats(run.data, sources.values(), run.extractor, run.stop)
    sets = {name: load(source) for name, source in sources.items()}
    for name, questions in sets.items():
        if not any(map(has_truth, questions)):
            raise ValueError(f"{sources[name]}: expected questions with true answers, none has one")
    if any(map(has_truth, prompts)):
        sets = {TRAINED: prompts} | sets
    return sets
