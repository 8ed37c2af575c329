"""Train: the steps of a run, from questions to a better model and a report that shows why."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pyrl._core.tree import Forest, pack_flat
from pyrl.advantage import advantages
from pyrl.algorithm import Algorithm
from pyrl.answers import EQUIVALENCES, Answers, classify
from pyrl.answers.reading import answer_format, check_formats, decoder
from pyrl.engine import EngineFailure
from pyrl.engine.launch import ENGINES, Request
from pyrl.evaluate import Evaluator, Scoring
from pyrl.learner import Learner
from pyrl.leaves import Leaves, Scored, collect
from pyrl.models import find_device, load_model, positions
from pyrl.pack import TokenBatch, pack
from pyrl.prompts import Prompt, load_prompts
from pyrl.report import Alarms, Completion, Evaluation, MetricsLog, Progress, Report, save_curves
from pyrl.report.metrics import Row, plain_row, read_metrics
from pyrl.report.step import Unlogged, completion_metrics, first_completions, reward_metrics
from pyrl.report.tree import tree_metrics
from pyrl.reward import FunctionReward, check_answers, label_metrics, vote_metrics
from pyrl.rollout import Rollout, answer_start, derive_seed, make_signals
from pyrl.run import checkpoint
from pyrl.run.config import Run
from pyrl.run.directory import claim, find_start, naming
from pyrl.run.interrupt import RESUME, Interrupt
from pyrl.vote import FlipCounter, Votes


class Trainer:
    """One run, from its last finished step to its end."""

    def __init__(
        self,
        run: Run,
        progress: Progress,
        *,
        scoring: Scoring | None = None,
        eval_sets: Mapping[str, str] | None = None,
    ) -> None:
        self.run, self.progress = run, progress
        self.algorithm: Algorithm = run.algorithm
        if run.reward_function is not None:
            reward = FunctionReward(run.reward_function, run.reward_answers)
            self.algorithm = replace(run.algorithm, reward=reward)
        found = find_start(run)
        if run.threads:
            torch.set_num_threads(run.threads)
        device = find_device(run.device)
        self.model, self.tokenizer = load_model(str(found.path) if found else run.model)
        initial = load_model(run.model)[0].to(device) if self.algorithm.loss.has_reference else None
        self.learner = Learner(self.model.to(device), initial, run)
        self.decode = decoder(self.tokenizer)
        self.prompts = check_answers(self.algorithm.reward, self._load(run.data), run.data)
        self.eval_sets = self._eval_sets(eval_sets)
        sample = self.algorithm.sample
        self.scoring = scoring or Scoring(
            sample.temperature, run.eval_samples, max_tokens=sample.max_tokens
        )
        self.extractor, eos = answer_format(
            self.model, self.tokenizer, run.data, run.extractor, run.stop
        )
        self.equivalence = EQUIVALENCES[run.equivalence]()
        request = Request(
            self.model, run.model, eos, run.max_rows, run.dtype, self.prompts[0].tokens, run.vllm
        )
        self.engine, self.sync = ENGINES[run.engine](request)
        self.learner.sampler_dtype = self.engine.dtype
        self.signals = make_signals(self.algorithm.fork, self.algorithm.prune)
        self.evaluator = Evaluator(
            self.engine, self.decode, self.extractor, self.equivalence, run.seed, self._on_tokens
        )
        self.step = 0
        """Finished training steps."""
        self.unlogged: Unlogged | None = Unlogged({}, ())
        """What the last finished step still has to log."""
        self.sketches = self.signals.save() if self.signals else b""
        """The signals at the end of that step; sampling moves them on."""
        self.tokens = 0
        """Sampled in training since the run began, pruned ones included."""
        self.seconds = 0.0
        self.flips = FlipCounter()
        self.evaluations: list[Evaluation] = []
        self.interrupt = Interrupt()
        if found:
            self._restore(found)
        self.sync(self.step)

    # ---- one step

    def train_step(self) -> Row:
        """Sample, vote, reward, update: the step's metrics. RunError names questions with NaN."""
        prompts = self._questions(self.step)
        with naming(f"step {self.step + 1}", prompts):
            self.unlogged = self._train_on(prompts)
        return self.unlogged.metrics

    def _train_on(self, prompts: Sequence[Prompt]) -> Unlogged:
        started = time.monotonic()
        self.progress.phase("sampling")
        rollout = self._rollout(prompts)
        forest = self._grow(rollout)
        leaves = collect(forest, self.decode)
        self.progress.phase("scoring")
        answers = classify(leaves, self.extractor, self.equivalence)
        votes = self.algorithm.vote(leaves, answers)
        reward_N = self.algorithm.reward(leaves, answers, votes, prompts)
        kept_N = self.algorithm.select(leaves, self.algorithm.sample.train)
        self.progress.phase("updating")
        batch, metrics = self._advantages(forest, leaves, reward_N, kept_N)
        if self.algorithm.reward.usable(answers, votes, reward_N):
            metrics |= self.learner.update(batch, leaves.group_N[kept_N], self.step)
        else:
            self.progress.alarm(
                f"Step {self.step + 1}: no response can be rewarded, so there is no update. Check "
                f"--extractor ({self.run.extractor}) and --sample.max-tokens."
            )
        self.step += 1
        metrics |= self.sync(self.step)
        self.tokens += rollout.counts.sampled_tokens
        self.sketches = self.signals.save() if self.signals else b""
        metrics |= completion_metrics(leaves) | tree_metrics(forest, leaves, rollout)
        metrics |= self._vote_metrics(leaves, answers, votes, reward_N, kept_N, prompts)
        seconds = time.monotonic() - started
        self.seconds += seconds
        metrics |= {"step_time": seconds, "num_tokens": self.tokens}
        return Unlogged(
            plain_row(metrics), first_completions(prompts, leaves, answers, votes, reward_N)
        )

    def _rollout(self, prompts: Sequence[Prompt]) -> Rollout:
        sample = self.algorithm.sample
        return Rollout(
            self.engine,
            [prompt.tokens for prompt in prompts],
            votes=sample.votes,
            limit=sample.max_tokens,
            sampling=sample.sampling(),
            fork=self.algorithm.fork,
            prune=self.algorithm.prune,
            signals=self.signals,
            seed=derive_seed(self.run.seed, self.step),
            allowance=sample.allowance(),
            poll=self.algorithm.poll(self.decode, self.extractor, self.equivalence),
            answer_start=lambda tokens: answer_start(tokens, self.tokenizer),
            on_tokens=self._on_tokens,
        )

    def _grow(self, rollout: Rollout) -> Forest:
        """The rollout's trees; if the engine fails for good, what has grown is saved."""
        path = self.run.output / "forest_in_flight"
        try:
            forest = rollout.run()
        except EngineFailure as failure:
            path.write_bytes(rollout.forest.save())
            raise EngineFailure(
                f"step {self.step + 1}: {failure}. What had grown is in {path}; the same command "
                "with --resume goes on after the last checkpoint"
            ) from failure
        path.unlink(missing_ok=True)
        return forest

    def _advantages(
        self,
        forest: Forest,
        leaves: Leaves,
        reward_N: NDArray[np.float64],
        kept_N: NDArray[np.int64],
    ) -> tuple[TokenBatch, dict[str, Any]]:
        kept = leaves.take(kept_N)
        rows = pack_flat(forest, kept.leaf_N)
        scored = Scored(
            group_N=kept.group_N,
            trunk_N=kept.trunk_N,
            reward_N=reward_N[kept_N],
            entropy_N=kept.entropy_N,
            length_N=kept.length_N,
            segments=forest.segments(kept.leaf_N),
            leaf_T=rows.leaf_T,
            segment_T=rows.segment_T,
            entropy_T=rows.entropy_T,
            confidence_T=rows.confidence_T,
        )
        advantage_T, metrics = advantages(self.algorithm.advantage, scored)
        return pack(rows, advantage_T), dict(metrics)

    def close(self) -> None:
        """Give back what the engine holds: vLLM runs one in a process."""
        self.engine.close()

    # ---- the run

    def train(self) -> Report:
        """All steps, evaluations before and after, checkpoints between; the report of it all.

        After Ctrl-C the last finished step is saved and KeyboardInterrupt raised.
        """
        claim(self.run)
        resume_at = self.step + (self.unlogged is None) if self.run.resume else None
        alarms = Alarms(self.run.steps)
        with (
            MetricsLog(self.run.output, self.run.loggers, resume_at=resume_at) as log,
            self.interrupt,
        ):
            try:
                while True:
                    if self.unlogged is not None:
                        self._log(log, alarms, self.unlogged)
                    self.interrupt.check()
                    if self.step == self.run.steps:
                        break
                    self.progress.step(self.step + 1, self.run.steps)
                    self.train_step()
                if not any(e.model == "after" for e in self.evaluations):
                    # Resumed with fewer steps than it had: this was not known to be the last.
                    log.write(self.step, self._evaluate("after"))
                    self.save()
            except KeyboardInterrupt:
                self.save()
                raise KeyboardInterrupt(RESUME) from None
        return self._report()

    def _log(self, log: MetricsLog, alarms: Alarms, unlogged: Unlogged) -> None:
        """Evaluate and log the last finished step, and save it if it is its turn."""
        scores = self._evaluate_due()
        log.write_completions(self.step, unlogged.completions)
        self.progress.show(log.write(self.step, unlogged.metrics | scores))
        self.unlogged = None
        for message in alarms.check(read_metrics(self.run.output / "metrics.jsonl")):
            self.progress.alarm(message)
        if self.step % self.run.save_every == 0 or self.step == self.run.steps:
            self.save()

    def _evaluate_due(self) -> Row:
        """Scores of the untrained and of the trained model, and between of what does not train."""
        if self.step == 0:
            return self._evaluate("before")
        if self.step == self.run.steps:
            return self._evaluate("after")
        if not self.run.eval_every or self.step % self.run.eval_every:
            return {}
        how = replace(self.scoring, votes=0, low_temperature=0.0)
        sets = {k: v for k, v in self.eval_sets.items() if v is not self.prompts}
        return _metrics(self._scores("after", sets or self.eval_sets, how))

    def _evaluate(self, model: Literal["before", "after"]) -> Row:
        """Score all sets, remember the scores for the report, and return them as metrics.

        The larger vote is what the untrained model could do with the compute of training.
        """
        how = self.scoring if model == "before" else replace(self.scoring, votes=0)
        scores = self._scores(model, self.eval_sets, how)
        self.evaluations += scores
        return _metrics(scores)

    def _scores(
        self,
        model: Literal["before", "after"],
        sets: Mapping[str, Sequence[Prompt]],
        how: Scoring,
    ) -> list[Evaluation]:
        self.progress.phase("evaluating")
        scores = []
        for name, prompts in sets.items():
            with naming(f"evaluation of {name} after step {self.step}", prompts):
                scores.append(self.evaluator(name, model, prompts, how))
        return scores

    def _report(self) -> Report:
        """Write the trained model, report.md, report.json and curves.png; all whole or not."""
        output = self.run.output
        with checkpoint.replacing(output / "model") as folder:
            checkpoint.write_model(folder, self.model, self.tokenizer)
        facts = {
            "training steps": self.run.steps,
            "sampled tokens in training": self.tokens,
            "seconds of training": round(self.seconds),
            "learning rate": self.run.learning_rate,
            "seed": self.run.seed,
        }
        title = f"{self.run.method} on {self.run.model}, {self.run.data}"
        report = Report(title, tuple(self.evaluations), facts)
        report.save(output)
        save_curves(output / "metrics.jsonl", output / "curves.png", title)
        return report

    def save(self) -> None:
        """A checkpoint of the last finished step."""
        record = {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "labels": self.flips.state_dict(),
            "evaluations": [asdict(evaluation) for evaluation in self.evaluations],
            "unlogged": asdict(self.unlogged) if self.unlogged else None,
        }
        checkpoint.save(
            self.run.output,
            self.step,
            self.model,
            self.tokenizer,
            self.learner.state(),
            self.sketches,
            record,
            self.run.keep_checkpoints,
        )

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        self.step = found.step
        self.tokens = found.record["tokens"]
        self.seconds = found.record["seconds"]
        self.flips.load_state_dict(found.record["labels"])
        self.evaluations = [Evaluation(**row) for row in found.record["evaluations"]]
        self.unlogged = None
        if (row := found.record["unlogged"]) is not None:
            completions = tuple(Completion(**text) for text in row["completions"])
            self.unlogged = Unlogged(row["metrics"], completions)
        self.learner.load_state(found.optimizer(), found.counts)
        self.sketches = found.signals()
        if self.signals is not None:
            self.signals.load(self.sketches)

    # ---- data

    def _load(self, source: str) -> list[Prompt]:
        run = self.run
        room = positions(self.model)
        return load_prompts(
            source,
            self.tokenizer,
            max_tokens=room - self.algorithm.sample.max_tokens,
            chat=run.chat,
            prefix=run.prefix,
            suffix=run.suffix,
        )

    def _eval_sets(self, sources: Mapping[str, str] | None) -> dict[str, list[Prompt]]:
        if sources is None:
            sources = {"evaluation": self.run.eval_data} if self.run.eval_data else {}
        check_formats(self.run.data, sources.values(), self.run.extractor, self.run.stop)
        sets = {name: self._load(source) for name, source in sources.items()}
        if all(prompt.answer is not None for prompt in self.prompts):
            sets = {"trained questions": self.prompts} | sets
        return sets

    def _questions(self, step: int) -> list[Prompt]:
        """The questions of a step: one permutation of all of them after the other."""
        size, count = len(self.prompts), self.run.prompts_per_step
        places = range(step * count, (step + 1) * count)
        orders = {
            epoch: np.random.default_rng([self.run.seed, epoch]).permutation(size)
            for epoch in {place // size for place in places}
        }
        return [self.prompts[orders[place // size][place % size]] for place in places]

    # ---- reporting

    def _vote_metrics(
        self,
        leaves: Leaves,
        answers: Answers,
        votes: Votes,
        reward_N: NDArray[np.float64],
        kept_N: NDArray[np.int64],
        prompts: Sequence[Prompt],
    ) -> dict[str, float]:
        kept = leaves.take(kept_N), answers.take(kept_N), votes, reward_N[kept_N], prompts
        everyone = leaves, answers, votes, reward_N, prompts
        return (
            vote_metrics(leaves, answers, votes)
            | reward_metrics(leaves.group_N[kept_N], reward_N[kept_N])
            | {"vote/label_flips": self.flips.update(votes, prompts, self.equivalence)}
            | label_metrics(*everyone)
            | label_metrics(*kept, prefix="vote/post_")
        )

    def _on_tokens(self, tokens: int) -> None:
        self.progress.tokens(tokens)
        self.interrupt.check()


def _metrics(scores: Sequence[Evaluation]) -> Row:
    return {f"eval/{e.set}/{name}": value for e in scores for name, value in e.metrics.items()}
