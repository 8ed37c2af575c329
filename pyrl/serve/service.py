"""Service: the models that clients train, and what each request does to them.

Methods without an underscore that take a list of works run in the one thread that computes
(`pyrl.serve.futures`); the others answer from the event loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyrl.engine.trial import check_learning, has_plain_head
from pyrl.learner.reader import Reader
from pyrl.models import model_location, room
from pyrl.serve.body import Body, RequestError
from pyrl.serve.clients import Sessions
from pyrl.serve.policies import UNNAMED, Policies, Policy, checked_name
from pyrl.serve.sampling import Request, Samplers
from pyrl.serve.settings import ServeSettings
from pyrl.serve.training import Adam, check_pass, optim_step, read_batch
from pyrl.serve.wire import Pass

RANKS = 1024
"""Largest rank of an adapter."""
NAMES = 16_384
"""Sampling sessions at most; the oldest are forgotten."""


@dataclass(frozen=True)
class Creation:
    """A model that is to be made: a new adapter, or saved weights."""

    model_id: str
    rank: int = 0
    seed: int = 0
    attention: bool = True
    mlp: bool = True
    path: str | None = None
    optimizer: bool = False


@dataclass(frozen=True)
class Writing:
    """Weights that are to be written."""

    model_id: str
    path: str
    overwrite: bool
    sampler: str | None = None
    """The sampling session that gets them."""
    state: bool = True


class Service:
    """The served model, the policies over it, and their samplers."""

    def __init__(
        self, settings: ServeSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """ModelError for a model that pyrl cannot sample from or train."""
        check_learning(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.settings, self.sessions = settings, Sessions()
        self.name = str(model_location(settings.model))
        """How clients call the served model; they load its tokenizer by it."""
        self.vocabulary: int = model.get_input_embeddings().num_embeddings
        self.positions = room(model).tokens
        self.eos = _ends(model, tokenizer)
        self._policies = Policies(model, tokenizer, self.name, settings.output)
        self._samplers = Samplers(self._policies, settings.max_rows)
        self._reader = Reader(tokens_per_pass=settings.tokens_per_pass)
        self._reader.plain_head = has_plain_head(model)
        self._trained: OrderedDict[str, Policy] = OrderedDict()
        self._sampled: OrderedDict[str, str | None] = OrderedDict()
        self._drawn = settings.seed

    # What is answered at once.

    def check_name(self, name: str) -> None:
        """RequestError unless a client asks for the served model."""
        if name not in (self.name, self.settings.model):
            raise RequestError(f"base_model: expected {self.name!r}, which is served, got {name!r}")

    def info(self, model_id: str) -> dict[str, Any]:
        policy = self._policy(model_id)
        return {
            "model_id": model_id,
            "is_lora": True,
            "lora_rank": policy.rank,
            "model_name": self.name,
            "model_data": {
                "arch": type(policy.model).__name__,
                "model_name": self.name,
                "tokenizer_id": self.name,
            },
        }

    def weights_info(self, path: str) -> dict[str, Any]:
        rank = self._policies.saved_rank(path)
        return {"base_model": self.name, "is_lora": True, "lora_rank": rank, "train_unembed": False}

    def name_sampler(self, sampler_id: str, path: str | None) -> None:
        """Open a sampling session. RequestError: no such weights."""
        if path is not None:
            self._policies.found(path)
        while len(self._sampled) >= NAMES:
            self._sampled.popitem(last=False)
        self._sampled[sampler_id] = path

    def sampler(self, sampler_id: str) -> str | None:
        """The weights of a sampling session; RequestError: there is none of that name."""
        if sampler_id not in self._sampled:
            raise RequestError(
                f"sampling_session_id: expected a sampling session of this server, "
                f"got {sampler_id!r}",
                404,
            )
        return self._sampled[sampler_id]

    def request(self, body: Body, path: str | None) -> Request:
        """What is to be sampled, with a seed of its own if the client names none."""
        if path is not None:
            self._policies.found(path)
        self._drawn += 1
        return Request.read(body, path, self._drawn, self.eos, self.vocabulary, self.positions)

    def check_pass(self, request: Pass) -> None:
        """RequestError names what cannot be read."""
        self._policy(request.model_id)
        check_pass(request, self.vocabulary, self.positions)

    def creation(self, body: Body, model_id: str) -> Creation:
        """RequestError: another model than the served one, or an adapter that cannot be."""
        self.check_name(body.text("base_model"))
        lora = body.inner("lora_config")
        if body.has("optimizer_config") and body.inner("optimizer_config").text("type") != "adamw":
            raise RequestError("optimizer_config.type: expected 'adamw'")
        attention, mlp = lora.flag("train_attn", True), lora.flag("train_mlp", True)
        if not attention and not mlp:
            raise RequestError(
                "lora_config: expected train_attn or train_mlp; the head has no adapter here"
            )
        rank = lora.whole("rank", least=1, most=RANKS)
        seed = lora.whole("seed", self.settings.seed, least=0, most=(1 << 63) - 1)
        return Creation(model_id, rank, seed, attention, mlp)

    def known(self, model_id: str) -> None:
        """RequestError unless the model is being trained here."""
        self._policy(model_id)

    # What the thread computes.

    def create(self, works: Sequence[Creation]) -> list[dict[str, Any]]:
        """A model, or other weights for one that is there."""
        [work] = works
        if work.model_id not in self._trained:
            self._make_room()
        if work.path is None:
            policy = self._policies.new(
                work.rank, work.seed, attention=work.attention, mlp=work.mlp
            )
            answer = {"type": "create_model"}
        else:
            policy = self._policies.load(work.path, optimizer=work.optimizer)
            answer = {"type": "load_weights", "path": work.path}
        self._trained[work.model_id] = policy
        return [answer | {"model_id": work.model_id}]

    def forward_backward(self, works: Sequence[Pass]) -> list[bytes]:
        [work] = works
        return [read_batch(self._policy(work.model_id), self._reader, work)]

    def optim_step(self, works: Sequence[tuple[str, Adam]]) -> list[dict[str, Any]]:
        [(model_id, adam)] = works
        return [{"type": "optim_step", "metrics": optim_step(self._policy(model_id), adam)}]

    def save(self, works: Sequence[Writing]) -> list[dict[str, Any]]:
        """Write a model's weights; a sampling session reads them from there."""
        [work] = works
        policy = self._policy(work.model_id)
        self._policies.save(work.path, policy, overwrite=work.overwrite, state=work.state)
        self._samplers.forget(work.path)
        if work.state:
            return [{"type": "save_weights", "path": work.path}]
        answer: dict[str, Any] = {"type": "save_weights_for_sampler", "path": work.path}
        if work.sampler is not None:
            self.name_sampler(work.sampler, work.path)
            self._policies.drop_old(work.path)
            answer |= {"path": None, "sampling_session_id": work.sampler}
        return [answer]

    def sample(self, works: Sequence[Request]) -> list[bytes]:
        return self._samplers(works)

    def put_away(self) -> list[str]:
        """Write the models that have changed since they were last saved; where they are."""
        return [self._put_away(name) for name, p in self._trained.items() if not p.saved]

    def _put_away(self, model_id: str) -> str:
        path = f"tinker://{model_id}/weights/unsaved"
        self._policies.save(path, self._trained[model_id])
        return path

    def _make_room(self) -> None:
        """For one more model, in the place of one whose client has left."""
        if len(self._trained) < self.settings.max_models:
            return
        silent = [n for n in self._trained if self.sessions.silent(n.rpartition(":train:")[0])]
        if not silent:
            raise RequestError(
                f"create_model: expected fewer than {self.settings.max_models} models that clients "
                f"train at the same time (--max-models), got {len(self._trained)}"
            )
        if not self._trained[silent[0]].saved:
            self._put_away(silent[0])
        del self._trained[silent[0]]

    def _policy(self, model_id: str) -> Policy:
        if model_id not in self._trained:
            raise RequestError(
                f"model_id: expected a model that is trained here, got {model_id!r}; one whose "
                f"client was silent is in tinker://{model_id}/weights/unsaved",
                404,
            )
        return self._trained[model_id]


def writing(body: Body, model_id: str) -> Writing:
    """RequestError: weights cannot have this name."""
    name = checked_name(body.text("path"))
    return Writing(model_id, f"tinker://{model_id}/weights/{name}", body.flag("overwrite"))


def sampler_writing(body: Body, model_id: str) -> Writing:
    """Weights to sample from: with a name, or for a sampling session."""
    if body.has("path"):
        name = checked_name(body.text("path"))
        if name.startswith(UNNAMED):
            raise RequestError(
                f"path: expected a name that does not begin with {UNNAMED!r}, got {name!r}"
            )
        path = f"tinker://{model_id}/sampler_weights/{name}"
        return Writing(model_id, path, overwrite=True, state=False)
    number = body.whole("sampling_session_seq_id", least=0, most=1 << 62)
    path = f"tinker://{model_id}/sampler_weights/{UNNAMED}{number}"
    session = f"{model_id.rpartition(':train:')[0]}:sample:{number}"
    return Writing(model_id, path, overwrite=True, sampler=session, state=False)


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a sample unless a request says which."""
    named = [tokenizer.eos_token_id]
    if model.generation_config is not None:
        of_model = model.generation_config.eos_token_id
        named += of_model if isinstance(of_model, list) else [of_model]
    return frozenset(token for token in named if token is not None)
