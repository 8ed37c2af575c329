"""The end of a server; this file is the last, for it ends the one that the others share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from learner_batch import demo_model
from tinker import types
from tinker_server import Server, datum, trainee

from pyrl.engine.trial import check_learning
from pyrl.learner.reader import Reader
from pyrl.models import load_model
from pyrl.serve.policies import Policies, shared_copy
from pyrl.serve.training import Adam, optim_step, read_batch
from pyrl.serve.wire import Datum, Pass

PROMPT, RESPONSE = [5, 3, 6, 4, 14], [3, 4, 5, 6, 1]


def test_a_server_that_is_stopped_saves_what_has_changed(server: Server, output: Path) -> None:
    data = [datum(PROMPT, RESPONSE, weights=[1.0] * len(RESPONSE))]
    training = trainee(server.client())
    adam = types.AdamParams(learning_rate=1e-3, eps=1e-8)
    losses = []
    for _ in range(3):
        read = training.forward_backward(data, "cross_entropy").result()
        losses.append(read.metrics["loss:sum"])
        if len(losses) < 3:
            training.optim_step(adam).result()
    assert len({*losses}) == 3
    path = f"tinker://{training.model_id}/weights/unsaved"
    assert f"saved    {path}" in server.stop()

    model, tokenizer = load_model("demo")
    check_learning(model)
    policy = Policies(model, tokenizer, "demo", output).load(path, optimizer=True)
    full = np.array(PROMPT + RESPONSE)
    weight_T = np.array([0.0] * (len(PROMPT) - 1) + [1.0] * len(RESPONSE), np.float32)
    columns = {"target_tokens": full[1:], "weights": weight_T}
    asked = Pass("m", 1, "cross_entropy", {}, False, [Datum(full[:-1], columns)])
    read_batch(policy, Reader(), asked)
    step = optim_step(policy, Adam(1e-3, (0.9, 0.95), 1e-8, 0.0, 0.0))
    assert step["grad_norm"] > 0
    assert {float(state["step"]) for state in policy.optimizer.state.values()} == {3.0}
    # Its folder is an adapter as pyrl and transformers load it.
    with torch.no_grad():
        ids = torch.from_numpy(full)[None]
        merged = load_model(str(output / path.removeprefix("tinker://")))[0]
        own = merged(input_ids=ids).logits[0, :-1].log_softmax(-1)
    chosen_T = own.gather(1, ids[0, 1:, None])[len(PROMPT) - 1 :, 0]
    assert abs(-float(chosen_T.sum()) - losses[2]) < 1e-4


def test_copies_share_the_weights_of_the_served_model() -> None:
    model = demo_model(torch.float32)
    copied = shared_copy(model)
    pairs = zip(model.parameters(), copied.parameters(), strict=True)
    assert all(own is other for own, other in pairs)
    assert copied.get_input_embeddings() is not model.get_input_embeddings()
