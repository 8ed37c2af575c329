"""What trains through the server is what trains without it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from learner_batch import demo_model, settings
from safetensors.torch import load_file
from tinker import types
from tinker_server import Server, datum, prompt, ready, trainee
from torch import Tensor
from transformers import PreTrainedModel

from pyrl.engine import Branches
from pyrl.engine.hf import HFEngine
from pyrl.learner import Learner
from pyrl.logits.sampling import Sampling
from pyrl.loss import KL, Loss, TokenSum, Unbounded
from pyrl.models.lora import LoRA, add_adapter
from pyrl.pack import pack_given
from pyrl.serve.sampling import seeds

PROMPT = [5, 3, 6, 4, 14]
SAMPLES, STEPS, LIMIT = 8, 3, 6
ADAM = {"learning_rate": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.01}


def adapted(seed: int = 3) -> PreTrainedModel:
    model = demo_model(torch.float32)
    add_adapter(model, LoRA(rank=4), "demo", seed)
    return model


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def advantages(responses: list[list[int]]) -> list[float]:
    """Whole numbers less their mean over 8: float32, which the protocol sends, holds them."""
    reward_N = np.array([float(np.sum(np.array(response) % 3)) for response in responses])
    return (reward_N - reward_N.mean()).tolist()


def through_the_server(server: Server) -> dict[str, Tensor]:
    client = server.client()
    training = trainee(client)
    for step in range(STEPS):
        sampling = ready(training.save_weights_and_get_sampling_client())
        params = types.SamplingParams(max_tokens=LIMIT, seed=step, stop=[])
        drawn = sampling.sample(prompt(PROMPT), SAMPLES, params).result().sequences
        responses = [[int(token) for token in sample.tokens] for sample in drawn]
        data = [
            datum(PROMPT, tokens, advantages=[a] * len(tokens), logprobs=list(sample.logprobs))
            for tokens, sample, a in zip(responses, drawn, advantages(responses), strict=True)
        ]
        training.forward_backward(data, "importance_sampling")
        training.optim_step(types.AdamParams(**ADAM)).result()
    path = training.save_state("end").result().path
    return adapter(server.output / path.removeprefix("tinker://"))


def without_it() -> dict[str, Tensor]:
    loss = Loss(bounds=Unbounded(), dual=None, kl=KL(coef=0.0), aggregate=TokenSum())
    rate = {"learning_rate": ADAM["learning_rate"], "weight_decay": ADAM["weight_decay"]}
    model = adapted()
    run = settings(loss, betas=(0.9, 0.95), clip_grad_norm=1e9, **rate)
    sample = replace(run.algorithm.sample, temperature=1.0)
    run = replace(run, algorithm=replace(run.algorithm, sample=sample))
    learner = Learner(model, None, run)
    for step in range(STEPS):
        responses, logprobs = drawn_by_hand(model, step)
        length_N = [len(response) for response in responses]
        batch = pack_given(
            [np.array(PROMPT, np.int32)] * SAMPLES,
            [np.array(response) for response in responses],
            advantage_T=np.repeat(advantages(responses), length_N),
            logprob_T=np.concatenate(logprobs).astype(np.float32),
        )
        learner.update(batch, np.zeros(SAMPLES, np.int64), step)
    # The server's file has the names of peft's own.
    return {
        f"base_model.model.{name.replace('.default', '')}": p.detach()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def drawn_by_hand(model: PreTrainedModel, seed: int) -> tuple[list[list[int]], list[list[float]]]:
    engine = HFEngine(model, ())
    engine.start(Sampling())
    one = np.zeros(SAMPLES, np.int64)
    prompts = [np.array(PROMPT, np.int32)]
    branch_B, limit_B = np.arange(SAMPLES), np.full(SAMPLES, LIMIT)
    engine.submit(Branches(prompts, one, branch_B, seeds(seed, SAMPLES), limit_B))
    tokens: list[list[int]] = [[] for _ in range(SAMPLES)]
    logprobs: list[list[float]] = [[] for _ in range(SAMPLES)]
    while len((sampled := engine.step()).branch_B):
        for b, token, logprob in zip(
            sampled.branch_B, sampled.token_B, sampled.logprob_B, strict=True
        ):
            tokens[b].append(int(token))
            logprobs[b].append(float(logprob))
    return tokens, logprobs


def test_a_run_through_the_server_has_the_weights_of_the_same_run_without_it(
    server: Server,
) -> None:
    served, own = through_the_server(server), without_it()
    assert served.keys() == own.keys()
    assert max(float(own[name].abs().max()) for name in own if "lora_B" in name) > 1e-3
    for name in own:
        assert torch.allclose(served[name], own[name], rtol=0, atol=1e-6), name


TEXTS = [([5, 3, 6, 4, 14], [3, 4, 5, 6, 1]), ([5, 3, 6, 4, 14], [3, 6, 2]), ([7, 7, 14], [7, 7])]
FORMULAS = {
    "cross_entropy": lambda lp, a, q, c: -(a * lp).sum(),
    "importance_sampling": lambda lp, a, q, c: -(a * (lp - q).exp()).sum(),
    "ppo": lambda lp, a, q, c: (
        -torch.minimum(
            a * (lp - q).exp(), a * (lp - q).exp().clamp(c.get("low", 0.8), c.get("high", 1.2))
        ).sum()
    ),
    "cispo": lambda lp, a, q, c: (
        -((lp - q).exp().clamp(c.get("low", 0.8), c.get("high", 1.2)).detach() * a * lp).sum()
    ),
    "dro": lambda lp, a, q, c: -(a * lp - c.get("beta", 0.05) / 2 * (lp - q) ** 2).sum(),
}
CONFIGS = {
    "ppo": {"clip_low_threshold": 0.7, "clip_high_threshold": 1.05},
    "dro": {"beta": 0.7},
}


def reference(name: str, rows: list[dict[str, list[float]]], config: dict[str, float]) -> float:
    """The norm of the gradient by plain torch."""
    model, loss = adapted(), torch.tensor(0.0)
    short = {key.split("_")[-2] if "clip" in key else key: v for key, v in config.items()}
    for (before, after), row in zip(TEXTS, rows, strict=True):
        ids = torch.tensor(before + after)
        logits = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        lp = logits[:-1].gather(1, ids[1:, None])[:, 0]
        # Tokens of the prompt take part in the formula as well, with zeros.
        none = [0.0] * (len(before) - 1)
        a = torch.tensor(none + row["weights" if name == "cross_entropy" else "advantages"])
        q = torch.tensor(none + row["logprobs"]) if "logprobs" in row else lp.detach()
        loss = loss + FORMULAS[name](lp, a, q, short)
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads))


@pytest.mark.parametrize("name", FORMULAS)
def test_each_loss_is_that_of_its_formula(server: Server, name: str) -> None:
    rng = np.random.default_rng(2)
    rows = []
    for _, after in TEXTS:
        column = rng.normal(size=len(after)).astype(np.float32).tolist()
        noise = (-1 - rng.random(len(after))).astype(np.float32).tolist()
        sampled = {"advantages": column, "logprobs": noise}
        rows.append({"weights": column} if name == "cross_entropy" else sampled)
    training = trainee(server.client())
    data = [datum(b, a, **row) for (b, a), row in zip(TEXTS, rows, strict=True)]
    for config in ({}, CONFIGS.get(name, {})):
        training.forward_backward(data, name, config).result()
        told = training.optim_step(types.AdamParams(learning_rate=0.0)).result().metrics
        expected = reference(name, rows, config)
        assert expected > 0
        assert told["grad_norm"] == pytest.approx(expected, rel=1e-4)


def test_requests_add_their_gradients_and_a_custom_loss_is_its_client_s(server: Server) -> None:
    training = trainee(server.client())
    (before, after), still = TEXTS[0], types.AdamParams(learning_rate=0.0)
    one = [datum(before, after, weights=[1.0] * len(after))]

    def norm() -> float:
        return training.optim_step(still).result().metrics["grad_norm"]

    first = training.forward_backward(one, "cross_entropy").result()
    single = norm()
    training.forward_backward(one, "cross_entropy")
    training.forward(one, "cross_entropy")
    training.forward_backward(one, "cross_entropy")
    assert norm() == pytest.approx(2 * single, rel=1e-6)

    def custom(data: object, logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        return -3 * logprobs[0][len(before) - 1 :].sum(), {}

    told = training.forward_backward_custom(one, custom).result()
    assert norm() == pytest.approx(3 * single, rel=1e-5)
    assert told.metrics["loss:sum"] == pytest.approx(3 * first.metrics["loss:sum"], rel=1e-5)


def test_targets_that_only_fill_up_the_prompt_take_no_part(server: Server) -> None:
    training = trainee(server.client())
    (before, after), still = TEXTS[0], types.AdamParams(learning_rate=0.0)
    columns = {"advantages": [1.0] * len(after), "logprobs": [-1.0] * len(after)}
    whole = datum(before, after, **columns)
    filled = types.Datum(
        model_input=whole.model_input,
        loss_fn_inputs={
            **whole.loss_fn_inputs,
            "target_tokens": [0] * (len(before) - 1) + after,
        },
    )
    told, norms = [], []
    for row in (whole, filled):
        told.append(training.forward_backward([row], "ppo").result().loss_fn_outputs[0])
        norms.append(training.optim_step(still).result().metrics["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    one, other = (list(x["logprobs"].data) for x in told)
    assert other[: len(before) - 1] == [0.0] * (len(before) - 1)
    assert other[len(before) - 1 :] == pytest.approx(one[len(before) - 1 :], abs=1e-5)


def test_a_saved_state_goes_on_as_if_nothing_had_been_between(server: Server) -> None:
    client = server.client()
    training = trainee(client)
    before, after = TEXTS[0]
    data = [datum(before, after, weights=[1.0] * len(after))]

    def steps(trained: object, count: int) -> list[float]:
        told = []
        for _ in range(count):
            told.append(
                trained.forward_backward(data, "cross_entropy").result().metrics["loss:sum"]
            )
            trained.optim_step(types.AdamParams(learning_rate=1e-3)).result()
        return told

    steps(training, 2)
    path = training.save_state("middle").result().path
    plain = training.save_weights_for_sampler("middle").result().path
    expected = steps(training, 3)
    assert len({*expected}) == 3
    again = ready(client.create_training_client_from_state_with_optimizer(path))
    assert steps(again, 3) == expected
    training.load_state_with_optimizer(path).result()
    assert steps(training, 3) == expected
    fresh = ready(client.create_training_client_from_state(path))
    assert steps(fresh, 1) == expected[:1]
    sampler = ready(client.create_sampling_client(model_path=plain))
    full = prompt(before + after)
    scored = sampler.compute_logprobs(full).result()
    assert -sum(scored[len(before) :]) == pytest.approx(expected[0], rel=1e-5)
