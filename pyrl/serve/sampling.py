"""Sampling: requests of one policy drawn together by pyrl's engine, and log-probs of given text."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyrl.engine import RUNNING, TRUNCATED, Branches
from pyrl.engine.hf import HFEngine
from pyrl.logits.sample_tokens import sample_tokens
from pyrl.logits.sampling import Sampling
from pyrl.serve import wire
from pyrl.serve.body import Body, RequestError
from pyrl.serve.policies import Policies
from pyrl.serve.wire import Top

ENGINES = 2
"""Policies that are loaded to be sampled from; a further one takes the place of the oldest."""
ROWS = 256
"""Rows of a text whose logits lie in memory at a time."""
TOKENS = 4096
"""Tokens of samples that are read at a time for their most probable tokens."""
MOST_SAMPLES, MOST_TOP = 1024, 128
"""Samples of a request, and tokens at a place, at most."""
NOWHERE = -99999.0
"""What the protocol has for a log-prob at a place without any."""


@dataclass(frozen=True, eq=False)
class Request:
    """What a client asks of a policy."""

    sampler: str | None
    """Path of saved weights; None: the served model."""
    prompt_L: NDArray[np.int32]
    count: int
    limit: int
    seed: int
    sampling: Sampling
    stop_tokens: frozenset[int]
    stop_texts: tuple[str, ...]
    top: int
    """Tokens at each place of a sample whose log-probs are told."""
    prompt_top: int
    prompt_last: int
    """Tokens at the end of the prompt whose log-probs are told."""
    alternatives: int
    """Tokens drawn in the place of each of the prompt's but the first."""

    @classmethod
    def read(
        cls,
        body: Body,
        sampler: str | None,
        seed: int,
        eos: frozenset[int],
        vocabulary: int,
        positions: int,
    ) -> Request:
        """RequestError names what is out of its range; `seed` is for a request without one."""
        for name in ("target_prompt_logprobs", "record_stability_info"):
            if body.has(name) and not (name.startswith("record") and not body.flag(name)):
                raise RequestError(f"{name}: expected nothing, this server does not have it")
        prompt = body.tokens("prompt")
        if not 1 <= len(prompt) < positions:
            raise RequestError(f"prompt: expected 1 to {positions - 1} tokens, got {len(prompt)}")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise RequestError(
                f"prompt: expected token ids in 0..{vocabulary - 1}, "
                f"got {min(prompt)}..{max(prompt)}"
            )
        given = body.inner("sampling_params")
        room = positions - len(prompt)
        tokens, texts = given.stops("stop")
        prompt_top = body.whole("topk_prompt_logprobs", 0, least=0, most=MOST_TOP)
        scored = body.flag("prompt_logprobs") or prompt_top > 0
        top_k = given.whole("top_k", -1, least=-1, most=vocabulary)
        try:
            sampling = Sampling(
                temperature=given.number("temperature", 1.0, least=0),
                top_k=max(0, top_k),
                top_p=given.number("top_p", 1.0),
            )
        except ValueError as error:
            raise RequestError(f"sampling_params.{error}") from error
        return cls(
            sampler=sampler,
            prompt_L=np.array(prompt, np.int32),
            count=body.whole("num_samples", 1, least=1, most=MOST_SAMPLES),
            limit=given.whole("max_tokens", room, least=1, most=room),
            seed=given.whole("seed", seed, least=-(1 << 63), most=(1 << 64) - 1) % (1 << 64),
            sampling=sampling,
            stop_tokens=eos if tokens is None else frozenset(tokens),
            stop_texts=tuple(texts),
            top=body.whole("topk_sample_logprobs", 0, least=0, most=MOST_TOP),
            prompt_top=prompt_top,
            prompt_last=(
                body.whole("prompt_logprobs_last_n", len(prompt), least=1, most=len(prompt))
                if scored
                else 0
            ),
            alternatives=body.whole("prompt_alt_tokens_k", 0, least=0, most=MOST_TOP),
        )


@dataclass
class _Sample:
    """One that is being drawn."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False


class Samplers:
    """The engines of the policies that are sampled from."""

    def __init__(self, policies: Policies, max_rows: int) -> None:
        self._policies, self._max_rows = policies, max_rows
        self._loaded: OrderedDict[str | None, tuple[PreTrainedModel, HFEngine]] = OrderedDict()

    def forget(self, sampler: str) -> None:
        """These weights have been written anew."""
        self._loaded.pop(sampler, None)

    def __call__(self, requests: Sequence[Request]) -> list[bytes]:
        """The results of requests of one policy and one distribution, drawn as one batch."""
        model, engine = self._engine(requests[0].sampler)
        sample_B = [_Sample(request) for request in requests for _ in range(request.count)]
        _draw(engine, self._policies.tokenizer, sample_B)
        drawn = iter(zip(sample_B, _tops(model, sample_B), strict=True))
        return [
            _result(model, request, [next(drawn) for _ in range(request.count)])
            for request in requests
        ]

    def _engine(self, sampler: str | None) -> tuple[PreTrainedModel, HFEngine]:
        if sampler not in self._loaded:
            while len(self._loaded) >= ENGINES:
                self._loaded.popitem(last=False)
            model = self._policies.sampler(sampler)
            # Requests differ in what ends a sample: the engine itself knows no end.
            self._loaded[sampler] = model, HFEngine(model, (), max_rows=self._max_rows)
        self._loaded.move_to_end(sampler)
        return self._loaded[sampler]


def seeds(seed: int, count: int) -> NDArray[np.uint64]:
    """A seed for each sample of a request; the first has the request's own."""
    others = np.random.SeedSequence(seed).generate_state(count - 1, np.uint64)
    return np.concatenate([np.array([seed], np.uint64), others.astype(np.uint64)])


def _draw(
    engine: HFEngine, tokenizer: PreTrainedTokenizerBase, sample_B: Sequence[_Sample]
) -> None:
    requests = [*dict.fromkeys(sample.request for sample in sample_B)]
    place = {id(request): p for p, request in enumerate(requests)}
    seed_B = np.concatenate([seeds(request.seed, request.count) for request in requests])
    engine.start(requests[0].sampling)
    engine.submit(
        Branches(
            prompts=[request.prompt_L for request in requests],
            prompt_B=np.array([place[id(sample.request)] for sample in sample_B], np.int64),
            branch_B=np.arange(len(sample_B)),
            seed_B=seed_B,
            limit_B=np.array([sample.request.limit for sample in sample_B], np.int64),
        )
    )
    running = set(range(len(sample_B)))
    try:
        while len((sampled := engine.step()).branch_B):
            rows = zip(
                sampled.branch_B.tolist(),
                sampled.token_B.tolist(),
                sampled.logprob_B.tolist(),
                sampled.finish_B.tolist(),
                strict=True,
            )
            ended = []
            for branch, token, logprob, finish in rows:
                sample = sample_B[branch]
                sample.tokens.append(token)
                sample.logprobs.append(logprob)
                sample.stopped = _ends(tokenizer, sample)
                if sample.stopped and finish == RUNNING:
                    ended.append(branch)
                if sample.stopped or finish == TRUNCATED:
                    running.discard(branch)
            if ended:
                engine.finish(np.array(ended, np.int64))
    finally:
        if running:
            engine.abort(np.array(sorted(running), np.int64))


def _ends(tokenizer: PreTrainedTokenizerBase, sample: _Sample) -> bool:
    """Whether the last token ends a sample, or the last text of it does."""
    request = sample.request
    if sample.tokens[-1] in request.stop_tokens:
        return True
    if not request.stop_texts:
        return False
    # A character has at most four tokens.
    tail = sample.tokens[-4 * max(map(len, request.stop_texts)) - 4 :]
    text = tokenizer.decode(tail)
    return any(stop in text for stop in request.stop_texts)


def _result(
    model: PreTrainedModel, request: Request, drawn: Sequence[tuple[_Sample, Top | None]]
) -> bytes:
    sequences = [
        wire.sequence(sample.tokens, sample.logprobs, stopped=sample.stopped, top=top)
        for sample, top in drawn
    ]
    logprob_L = top = alternatives = None
    if request.prompt_last:
        begin = max(1, len(request.prompt_L) - request.prompt_last)
        logprob_L = _of_prompt(model, request.prompt_L, begin)
        if request.prompt_top:
            hidden_IH = _hidden(model, request.prompt_L.astype(np.int64)[None])[0]
            told = _most(model, hidden_IH[begin - 1 : -1], request.prompt_top, 1.0)
            top = _padded(told, begin)
    if request.alternatives:
        alternatives = _alternatives(model, request)
    return wire.samples(sequences, logprob_L, top, alternatives)


def _tops(model: PreTrainedModel, sample_B: Sequence[_Sample]) -> list[Top | None]:
    """The most probable tokens at each place of each sample, if its request asks for them."""
    found: list[Top | None] = [None] * len(sample_B)
    asked = [b for b, sample in enumerate(sample_B) if sample.request.top]
    while asked:
        longest = max(len(sample_B[b].request.prompt_L) + sample_B[b].request.limit for b in asked)
        count = max(1, TOKENS // longest)
        part, asked = asked[:count], asked[count:]
        rows = [sample_B[b] for b in part]
        length_N = np.array([len(sample.tokens) for sample in rows])
        begin_N = np.array([len(sample.request.prompt_L) for sample in rows])
        ids_NL = np.zeros((len(rows), int((begin_N + length_N).max())), np.int64)
        for ids_L, sample, begin in zip(ids_NL, rows, begin_N, strict=True):
            ids_L[:begin] = sample.request.prompt_L
            ids_L[begin : begin + len(sample.tokens)] = sample.tokens
        # What stands to the right of a text is not seen by it.
        hidden_NLH = _hidden(model, ids_NL)
        hidden_RH = torch.cat(
            [h[b - 1 : b - 1 + n] for h, b, n in zip(hidden_NLH, begin_N, length_N, strict=True)]
        )
        temperature = rows[0].request.sampling.temperature or 1.0
        most = max(sample.request.top for sample in rows)
        top = _most(model, hidden_RH, most, temperature)
        ends = np.cumsum(length_N)[:-1]
        split = (np.split(top.token_LK, ends), np.split(top.logprob_LK, ends))
        for b, token_LK, logprob_LK in zip(part, *split, strict=True):
            k = sample_B[b].request.top
            found[b] = Top(token_LK[:, :k], logprob_LK[:, :k])
    return found


def _hidden(model: PreTrainedModel, ids_NL: NDArray[np.int64]) -> Tensor:
    """Last hidden states [N, L, H] of texts."""
    model.eval()
    with torch.no_grad():
        ids = torch.from_numpy(ids_NL).to(model.device)
        hidden: Tensor = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def _most(model: PreTrainedModel, hidden_RH: Tensor, k: int, temperature: float) -> Top:
    """The k most probable tokens after each hidden state."""
    parts = []
    with torch.no_grad():
        for hidden in torch.split(hidden_RH, ROWS):
            logits_RV = model.get_output_embeddings()(hidden).float() / temperature
            parts.append(logits_RV.log_softmax(-1).topk(min(k, logits_RV.shape[1])))
    tokens = [part.indices.cpu().numpy().astype(np.int32) for part in parts]
    return Top(
        np.concatenate(tokens), np.concatenate([part.values.cpu().numpy() for part in parts])
    )


def _logits(
    model: PreTrainedModel, token_I: NDArray[np.int32], begin: int
) -> Iterator[tuple[int, Tensor]]:
    """Where rows of logits [R, V] begin, and these: of the tokens from `begin` on, some at a time.

    The logits of a token are those after the tokens before it.
    """
    hidden_IH = _hidden(model, token_I.astype(np.int64)[None])[0]
    with torch.no_grad():
        for first in range(begin, len(token_I), ROWS):
            last = min(first + ROWS, len(token_I))
            yield first, model.get_output_embeddings()(hidden_IH[first - 1 : last - 1]).float()


def _of_prompt(
    model: PreTrainedModel, token_I: NDArray[np.int32], begin: int
) -> NDArray[np.float32]:
    """Log-probs [I] at a temperature of 1; NaN before `begin`."""
    logprob_I = np.full(len(token_I), np.nan, np.float32)
    for first, logits_RV in _logits(model, token_I, begin):
        own_R = torch.from_numpy(token_I[first : first + len(logits_RV)].astype(np.int64))
        chosen_RV = logits_RV.log_softmax(-1).cpu()
        logprob_I[first : first + len(own_R)] = chosen_RV.gather(1, own_R[:, None])[:, 0].numpy()
    return logprob_I


def _padded(top: Top, begin: int) -> Top:
    """The same with places before it, where there is nothing to tell."""
    shape = (begin, top.token_LK.shape[1])
    return Top(
        np.concatenate([np.zeros(shape, np.int32), top.token_LK]),
        np.concatenate([np.full(shape, NOWHERE, np.float32), top.logprob_LK]),
    )


def _alternatives(model: PreTrainedModel, request: Request) -> Top:
    """Tokens drawn at the request's temperature for each of the prompt's but the first, with their
    log-probs at a temperature of 1."""
    k = request.alternatives
    seed_K = seeds(request.seed, k)
    tokens, logprobs = [np.empty((0, k), np.int32)], [np.empty((0, k), np.float32)]
    sampling = Sampling(temperature=request.sampling.temperature)
    for first, logits_RV in _logits(model, request.prompt_L, 1):
        rows = len(logits_RV)
        place_B = np.repeat(np.arange(first, first + rows), k)
        drawn = sample_tokens(
            logits_RV.repeat_interleave(k, 0), np.tile(seed_K, rows), place_B, sampling
        )
        token_RK = drawn.token_B.reshape(rows, k)
        chosen_RK = logits_RV.log_softmax(-1).cpu().gather(1, torch.from_numpy(token_RK).long())
        tokens.append(token_RK)
        logprobs.append(chosen_RK.numpy())
    return Top(np.concatenate(tokens), np.concatenate(logprobs))
