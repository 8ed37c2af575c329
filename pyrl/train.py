"""Train: a step reads as its stations, and a run is its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyrl.advantage import advantages
from pyrl.answers import Answers, classify
from pyrl.diagnostics import Updated, diagnose
from pyrl.engine import EngineFailure
from pyrl.evaluate import Evaluator, Scoring
from pyrl.fork import Flat
from pyrl.leaves import Leaves, Scored, collect, score
from pyrl.pack import TokenBatch, pack
from pyrl.prompts import Prompt, other_prompts
from pyrl.prune import Keep
from pyrl.ranks import ALONE, Ranks
from pyrl.report import Alarms, MetricsLog, Phases, Progress, Report
from pyrl.report.alarms import no_update
from pyrl.report.metrics import Row, read_metrics
from pyrl.report.saved_trees import save_trees
from pyrl.report.step import StepObserver, Unlogged, completion_metrics
from pyrl.reward import FunctionReward, WeightedReward, metrics_of, rewards
from pyrl.rollout import Rollout
from pyrl.run import checkpoint
from pyrl.run.config import Run
from pyrl.run.directory import claim, keeping_forest, naming
from pyrl.run.evaluation import Evaluations
from pyrl.run.interrupt import RESUME, Interrupt
from pyrl.run.lock import Lock, RunError, one_process
from pyrl.run.parsing import settings_of
from pyrl.run.results import write_results
from pyrl.run.resume import first_words, record_of, restore
from pyrl.run.sampling import Sampled, Sampler
from pyrl.run.setup import Given, Parts, Questions, assemble
from pyrl.run.snapshot import check_sampled
from pyrl.run.spending import Spent, all_spent, check_tokens, share_spent
from pyrl.select import accepted, lift, of_accepted, rounds, selected, tokens_that_train
from pyrl.tempered import mixed
from pyrl.vote import Votes, told


@dataclass(frozen=True)
class Step:
    """All that one training step came to; `pyrl.report.step` computes its metrics from it."""

    prompts: Sequence[Prompt]
    rollout: Rollout
    """Its trees, and counts of what happened to them."""
    leaves: Leaves
    answers: Answers
    votes: Votes
    reward_N: NDArray[np.float64]
    """NaN is unknown."""
    kept_N: NDArray[np.int64]
    """Ordinals of the leaves that have advantages and train."""
    advantage_T: NDArray[np.float64]
    """Of their tokens, leaf after leaf."""
    shaping: Mapping[str, float]
    """Metrics of the reward, the selection and the advantage stages."""
    update: Mapping[str, float] | None
    """Metrics of the optimizer; None: no response could be rewarded, so there was no update."""
    sync: Mapping[str, float]
    """Metrics of the way of the new weights to the engine."""
    timing: Mapping[str, float]
    """Seconds of each phase."""
    seconds: float
    cpu_seconds: float | None = None
    """Of all threads of this process; None: not measured."""
    staleness: int | None = None
    """Steps between the weights that sampled and those that learn; None: none is sampled ahead."""


class Trainer:
    """One run, from its last finished step to its end."""

    def __init__(
        self,
        run: Run,
        progress: Progress | None = None,
        *,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prompts: Iterable[Any] | None = None,
        reward: Sequence[Callable[..., Any]] = (),
        reward_weights: Sequence[float] = (),
        callbacks: Sequence[Callable[[Step, Row], object]] = (),
        scoring: Scoring | None = None,
        eval_sets: Mapping[str, Questions] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Load what the run needs and is not given.

        `model` and `tokenizer`, a causal language model of transformers, train in the place of what
        `run.model` names, and `prompts` (a datasets.Dataset, dicts, or texts) in the place of
        `run.data`. `reward`: functions as TRL or verl calls them; of several the sum with
        `reward_weights`. `callbacks` are called after each step, with its record and its metrics,
        as a line of metrics.jsonl has them.
        `eval_sets`: further questions to score, by their names. `progress`: the caller has entered
        it; None: `train` shows its own. `ranks`: the processes that this one leads; the others are
        in `pyrl.run.following.follow`.

        Raises what `pyrl.run.setup.assemble` does, ValueError for objects that do not fit, and
        RunError if another process has the output directory or if this one is one of several.
        """
        if not ranks.leads:
            one_process()
        if run.processes not in (1, ranks.size):
            raise RunError(
                f"processes: expected 1 for a Trainer that Python makes, got {run.processes}; "
                f"pyrl train and pyrl demo run in several"
            )
        given = Given(model, tokenizer, prompts, reward, reward_weights)
        self.run = run = given.named(run)
        self.progress = progress or Progress()
        self.display = nullcontext() if progress else self.progress
        self.callbacks = tuple(callbacks)
        self.interrupt = Interrupt()
        with ExitStack() as undo:
            self.lock = undo.enter_context(Lock(run.output))
            parts = assemble(run, eval_sets, given, ranks)
            undo.pop_all()
        self._take(parts, scoring)
        idle = self.learner.never_acts
        words = first_words(run, parts.start, parts.prompts, self.evaluations, idle)
        self.first_words = tuple(words)
        """Sentences that `train` begins with."""
        self.sync(self.step)

    def _take(self, parts: Parts, scoring: Scoring | None) -> None:
        """Work with these parts, from where they were saved."""
        run = self.run
        self.algorithm, self.prompts, self.experts = parts.algorithm, parts.prompts, parts.experts
        self.model, self.tokenizer, self.learner = parts.model, parts.tokenizer, parts.learner
        self.engine, self.sync, self.signals = parts.engine, parts.sync, parts.signals
        self.sampler = Sampler(run, parts, lambda tokens: self._on_tokens(tokens))
        self.states, self.base = parts.states, parts.base
        self.decode, self.extractor, self.stop = parts.decode, parts.extractor, parts.stop
        self.equivalence = parts.equivalence
        self.observer = StepObserver(parts.equivalence)
        self.alarms = Alarms(run.steps)
        sample = parts.algorithm.sample
        self.evaluations = Evaluations(
            run,
            Evaluator(
                parts.engine,
                parts.decode,
                parts.extractor,
                parts.equivalence,
                run.seed,
                self._on_tokens,
                parts.stop,
            ),
            parts.eval_sets,
            scoring or Scoring(sample.temperature, run.eval_samples, max_tokens=sample.max_tokens),
            self.progress,
            self._free_engine,
        )
        self.step = 0
        """Finished training steps."""
        self.unlogged: Unlogged | None = Unlogged({}, ())
        """What the last finished step still has to log."""
        self.sketches = self.sampler.sketches()
        """The signals at the end of that step; sampling moves them on."""
        if parts.start:
            self.step = parts.start.step
            self.unlogged = restore(parts.start.record, self.observer, self.evaluations)

    def train_step(self) -> Step:
        """Sample, vote, reward, update and sync once. RunError names questions with NaN; Spent: the
        run would exceed its tokens, and nothing has changed."""
        started, cpu = time.monotonic(), time.process_time()
        algorithm, states, ahead = self.algorithm, self.states, self.run.ahead
        spent = share_spent(self.run, self.observer)
        progress = self.step / self.run.steps if spent is None else spent
        phase = Phases(self.progress)
        got = self._sample(phase, progress)
        prompts, leaves, answers, votes = got.prompts, got.leaves, got.answers, got.votes
        reward_N, sync = got.reward_N, got.sync
        with naming(f"step {self.step + 1}", prompts):
            kept_N = selected(
                algorithm.select, leaves, algorithm.sample.train, states.select, reward_N
            )
            earned = self._told(leaves, answers, votes, reward_N, kept_N)
            wanted = self.run.prompts_per_step
            kept_N, refusing = of_accepted(algorithm.select, leaves, kept_N, got.accepted_G, wanted)
            if ahead:
                self.sampler.begin(self.step + 1)
            phase("updating")
            kept = leaves.take(kept_N)
            scored = score(kept, reward_N[kept_N], self.learner.before(kept.rows))
            advantage_T, shaping = advantages(algorithm.advantage, scored, states.advantage)
            train_T, sifting = tokens_that_train(
                algorithm.select, scored, advantage_T, states.select
            )
            update, done = None, dict[str, float]()
            if algorithm.reward.usable(answers, votes, reward_N):
                own = pack(kept.rows, advantage_T, scored.reward_N, train_T)
                update, done = self._update(got, scored, own, spent)
            self.step += 1
            if not ahead:
                phase("syncing")
                sync = self.sync(self.step)
        return Step(
            prompts=prompts,
            rollout=got.rollout,
            leaves=leaves,
            answers=answers,
            votes=votes,
            reward_N=reward_N,
            kept_N=kept_N,
            advantage_T=advantage_T,
            shaping=earned | refusing | shaping | sifting | done,
            update=update,
            sync=sync,
            timing=phase.metrics(),
            seconds=time.monotonic() - started,
            cpu_seconds=time.process_time() - cpu,
            staleness=got.staleness if ahead else None,
        )

    def _sample(self, phase: Phases, progress: float) -> Sampled:
        """The step's samples with their rewards; ahead of the learner, those that have grown."""
        algorithm, state, sync = self.algorithm, self.states.reward, dict[str, float]()
        phase("waiting" if self.run.ahead else "sampling")
        trees, snapshot = self.sampler.take(self.step)
        prompts, rollout = trees.prompts, trees.rollout
        if self.run.ahead:
            phase("syncing")
            sync = self.sync(self.step)
        reward_N = np.empty(0)
        with naming(f"step {self.step + 1}", prompts):
            for left in reversed(range(1 + rounds(algorithm.select))):
                check_tokens(self.run, self.observer.tokens, rollout.counts.sampled_tokens)
                phase("scoring")
                limit = algorithm.sample.max_tokens
                leaves = collect(rollout.forest, self.decode, progress=progress, limit=limit)
                if snapshot is not None and not reward_N.size:
                    check_sampled(self.learner, snapshot, leaves)
                answers = classify(leaves, self.extractor, self.equivalence)
                votes = algorithm.vote(leaves, answers)
                asked = leaves, answers, votes, prompts
                reward_N = rewards(algorithm.reward, *asked, state, reward_N)
                accepted_G = accepted(algorithm.select, leaves, reward_N)
                if not left or not self._sample_others(rollout, prompts, accepted_G):
                    break
                phase("sampling")
                with keeping_forest(self.run.output, rollout.forest, self.step + 1):
                    rollout.run()
        staleness = 0 if snapshot is None else self.step - snapshot.version
        return Sampled(prompts, rollout, *asked[:3], reward_N, accepted_G, staleness, sync)

    def _told(
        self,
        leaves: Leaves,
        answers: Answers,
        votes: Votes,
        reward_N: NDArray[np.float64],
        kept_N: NDArray[np.int64],
    ) -> dict[str, float]:
        """What reward, selection and vote tell of themselves."""
        algorithm, state = self.algorithm, self.states.reward
        return (
            metrics_of(algorithm.reward, leaves, answers, votes, state)
            | lift(algorithm.select, reward_N, kept_N)
            | told(algorithm.vote, leaves, answers, votes)
        )

    def _update(
        self, got: Sampled, scored: Scored, own: TokenBatch, spent: float | None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Learn from a step's rows: metrics of the optimizer, and of what stands around it."""
        batch, found = self._temper(got.prompts, got.leaves, own, scored.group_N)
        experts, stale = self.experts(got.prompts), got.staleness > 0
        update = self.learner.update(batch, scored.group_N, self.step, experts, spent, stale=stale)
        stages, states = self.algorithm.advantage, self.states.advantage
        found |= diagnose(self.run.diagnostics, Updated(stages, states, scored, own, self.learner))
        return update | self._replay(own, scored, spent), found

    def _replay(self, batch: TokenBatch, scored: Scored, spent: float | None) -> dict[str, float]:
        """Keep the good responses of a step, and update with those of earlier ones when due."""
        replay, state = self.algorithm.replay, self.states.replay
        if state is None:
            return {}
        replay.keep(state, batch, scored, self.step)
        held = len(state["reward_N"])
        again = replay.due(state, self.step, scored.progress)
        found = {"replay/held": float(held), "replay/trained": 0.0}
        if again is not None:
            ordinal_N = np.arange(len(again))
            update = self.learner.update(again, ordinal_N, self.step, spent=spent, replayed=True)
            found |= {"replay/trained": float(len(again)), "replay/loss": update["loss"]}
        return found

    def train(self) -> Report:
        """All steps, evaluations before and after, checkpoints between; the report of it all.

        After Ctrl-C or SIGTERM the last finished step is saved and KeyboardInterrupt raised.
        """
        with self.display, self.lock, self.interrupt:
            claim(self.run)
            for sentence in self.first_words:
                self.progress.alarm(sentence)
            try:
                self._steps()
            finally:
                self.sampler.drop()
            return write_results(
                replace(self.run, steps=self.step),
                self.model,
                self.tokenizer,
                self.evaluations,
                self.observer,
                self.learner.changed,
                self.learner.weights(),
                self.learner.publish(),
            )

    def _steps(self) -> None:
        """The steps that are missing."""
        resume_at = self.step + (self.unlogged is None) if self.run.resume else None
        with MetricsLog(
            self.run.output,
            self.run.loggers,
            resume_at=resume_at,
            settings=settings_of(self.run),
        ) as log:
            try:
                while True:
                    if self.unlogged is not None:
                        self._log(log, self.unlogged)
                    self.interrupt.check()
                    if self.step == self.run.steps or all_spent(self.run, self.observer):
                        break
                    self.progress.step(self.step + 1, self.run.steps)
                    try:
                        step = self.train_step()
                    except Spent:
                        break
                    metrics = self.observe(step)
                    self._call_back(step, metrics)
                self.sampler.drop()
                scored = self.evaluations.finished
                if not scored:
                    # It was not known to be the last: the total is spent, or there are now fewer.
                    log.write(self.step, self.evaluations.score("after", self.step))
                if not (scored and checkpoint.place(self.run.output, self.step).exists()):
                    self.save()
            except (KeyboardInterrupt, EngineFailure) as end:
                # A signal to all processes of a job ends an engine in its own process as well.
                if isinstance(end, EngineFailure) and not self.interrupt.noted:
                    raise
                self.save()
                raise KeyboardInterrupt(RESUME) from None

    def _call_back(self, step: Step, metrics: Row) -> None:
        """Tell the callbacks of a step, which is saved if one of them raises something."""
        with ExitStack() as unheard:
            unheard.callback(self.save)
            for callback in self.callbacks:
                callback(step, {"step": self.step, **metrics})
            unheard.pop_all()

    def observe(self, step: Step) -> Row:
        """The metrics of a step that was just made; what a checkpoint keeps is now after it."""
        self.unlogged = self.observer(step)
        self.evaluations.goes_on()
        if step.update is None and self.alarms.news("no update", self.step):
            self.progress.alarm(f"Step {self.step}: {self._no_update(step)}")
        if self.run.save_trees:
            save_trees(self.run.output, self.step, step, self.run.save_trees, self.learner.after)
        self.sketches = self.sampler.sketches()
        self.states.check()
        return self.unlogged.metrics

    def save(self) -> None:
        """A checkpoint of the last finished step."""
        checkpoint.save(
            self.run.output,
            self.step,
            self.model,
            self.tokenizer,
            self.learner.state(),
            self.sketches,
            self.states.arrays(),
            record_of(
                self.run,
                self.step,
                self.observer,
                self.evaluations,
                self.learner.memory,
                self.states,
                self.unlogged,
                self.base,
                self.learner.keep(self.step),
            ),
            self.run.keep_checkpoints,
            self.learner.weights(),
            snapshot.weights if (snapshot := self.sampler.snapshot) else None,
        )

    def close(self) -> None:
        """Give back the directory, and what the engine holds: vLLM runs one in a process."""
        self.sampler.drop()
        self.lock.release()
        self.engine.close()

    def _log(self, log: MetricsLog, unlogged: Unlogged) -> None:
        """Evaluate and log the last finished step, and save it if it is its turn."""
        log.write_alarms(self.step, self.progress.take_alarms())
        self.progress.show(unlogged.metrics)
        scores = self.evaluations.due(self.step)
        log.write_completions(self.step, unlogged.completions)
        log.write(self.step, unlogged.metrics | scores)
        self.unlogged = None
        for message in self.alarms.check(read_metrics(self.run.output / "metrics.jsonl")):
            self.progress.alarm(message)
        log.write_alarms(self.step, self.progress.take_alarms())
        if self.step % self.run.save_every == 0 or self.step == self.run.steps:
            self.save()

    def _no_update(self, step: Step) -> str:
        if isinstance(self.algorithm.reward, FunctionReward | WeightedReward):
            return "The reward function gave no response a number, so there is no update."
        cut = completion_metrics(step.leaves)["completions/clipped_ratio"]
        return no_update(step.leaves.text_N, step.answers.answer_N, self.extractor, cut)

    def _temper(
        self,
        prompts: Sequence[Prompt],
        leaves: Leaves,
        batch: TokenBatch,
        group_N: NDArray[np.int64],
    ) -> tuple[TokenBatch, dict[str, float]]:
        """The batch with answers at another temperature, if the method has such, and what they
        were. Their log-probs are the learner's at the temperature of sampling."""
        temper, states = self.algorithm.temper, self.states
        asked = prompts[: temper.questions(len(prompts))]
        if not asked:
            return batch, {}
        entropy = float(np.average(leaves.entropy_N, weights=leaves.length_N))
        factor, sample = temper.factor(entropy), self.algorithm.sample
        heated = replace(sample, temperature=sample.temperature * factor, stop_when_decided=False)
        plain = replace(self.algorithm, sample=heated, fork=Flat(), prune=Keep())
        rollout = self.sampler.rollout(asked, plain, None, self.step, 1)
        other = collect(rollout.run(), self.decode, progress=leaves.progress, limit=leaves.limit)
        answers = classify(other, self.extractor, self.equivalence)
        votes = self.algorithm.vote(other, answers)
        given = other, answers, votes, asked
        reward_N = rewards(self.algorithm.reward, *given, deepcopy(states.reward), np.empty(0))
        scored = score(other, reward_N, self.learner.before(other.rows))
        advantage_T, _ = advantages(self.algorithm.advantage, scored, deepcopy(states.advantage))
        mean_N = np.bincount(scored.leaf_T, advantage_T) / other.length_N
        chosen_N = temper.chosen(mean_N, entropy)
        rows = pack(other.rows, np.ones(len(advantage_T)), reward_N).take(chosen_N)
        replaced = 0
        if len(rows):
            logprob_T = self.learner.logprobs(rows).astype(np.float32)
            rows = replace(rows, old_logprob_T=logprob_T)
            batch, replaced = mixed(batch, group_N, rows, other.group_N[chosen_N])
        return batch, {
            "temper/factor": factor,
            "temper/rows": float(replaced),
            "temper/tokens": float(rollout.counts.sampled_tokens),
        }

    def _sample_others(
        self, rollout: Rollout, prompts: list[Prompt], accepted_G: NDArray[np.bool_]
    ) -> bool:
        """Add questions to a step in the place of those that it refuses; False: there are none, or
        no time for them."""
        if rollout.limits.late:
            return False
        missing = max(0, self.run.prompts_per_step - int(accepted_G.sum()))
        others = other_prompts(self.prompts, prompts, self.step, missing, self.run.seed)
        prompts += others
        rollout.extend([prompt.tokens for prompt in others])
        return bool(others)

    def _free_engine(self) -> None:
        """Before an evaluation: trees that grow ahead have the engine, and older weights."""
        self.sampler.wait()
        if self.engine.weight_version() != self.step:
            self.sync(self.step)

    def _on_tokens(self, tokens: int) -> None:
        self.progress.tokens(tokens)
        self.interrupt.check()
