"""States: what choices of a method remember from step to step, and how a checkpoint keeps it.

An advantage stage, a selection and a reward stay frozen records. One that remembers something has
a method `initial`, which returns a dictionary. The run holds this dictionary, shows it to the
choice as `scored.state` (or `leaves.state`), and the choice changes it: what it writes there is
there in the next step, and bit for bit the same after a resume.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyrl.algorithm import Algorithm
from pyrl.checks import described
from pyrl.foreign import TIME_LIMIT, Foreign
from pyrl.methods.fields import stages

ARRAYS = frozenset(
    {"bool", "float16", "float32", "float64"}
    | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
)
"""Types of NumPy arrays that a checkpoint can hold."""

State = dict[str, Any]
"""By names: NumPy arrays; or texts, numbers of Python, None, lists and dictionaries of these."""


class States:
    """The states of a method's choices, by their places; those without `initial` have none."""

    def __init__(self, algorithm: Algorithm) -> None:
        """Each as it begins. ValueError names one that no checkpoint could hold; ForeignError."""
        places = [f"advantage.{name}" for name, _ in stages(algorithm.advantage)]
        choices: dict[str, Any] = dict(zip(places, algorithm.advantage, strict=True))
        choices |= {"select": algorithm.select, "reward": algorithm.reward}
        if algorithm.replay.capacity:
            choices["replay"] = algorithm.replay
        self._by_place: dict[str, State] = {}
        for place, choice in choices.items():
            if hasattr(choice, "initial"):
                with Foreign(f"{place}: {type(choice).__name__}.initial", TIME_LIMIT, None):
                    state = choice.initial()
                self._by_place[place] = state
        self._stages = places
        self.check()

    @property
    def advantage(self) -> list[State | None]:
        """Those of the stages in their order."""
        return [self._by_place.get(place) for place in self._stages]

    @property
    def select(self) -> State | None:
        """That of the selection."""
        return self._by_place.get("select")

    @property
    def reward(self) -> State | None:
        """That of the reward."""
        return self._by_place.get("reward")

    @property
    def replay(self) -> State | None:
        """The responses of earlier steps; None where none are kept."""
        return self._by_place.get("replay")

    def state_dict(self) -> dict[str, State]:
        """What a checkpoint's record keeps, as JSON has it."""
        return {
            place: {name: value for name, value in state.items() if not _is_array(value)}
            for place, state in self._by_place.items()
        }

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What it keeps in a file of arrays, by place and name."""
        return {
            f"{place}.{name}": np.array(value, order="C")
            for place, state in self._by_place.items()
            for name, value in state.items()
            if _is_array(value)
        }

    def load_state_dict(
        self, record: Mapping[str, State], arrays: Mapping[str, NDArray[Any]]
    ) -> None:
        """Take over what both returned. ValueError if they are those of other choices."""
        if record.keys() != self._by_place.keys():
            raise ValueError(
                f"states: expected those of {', '.join(self._by_place) or 'no choice'}, the "
                f"checkpoint has those of {', '.join(record) or 'no choice'}"
            )
        self._by_place = {place: dict(state) for place, state in record.items()}
        for name, array in arrays.items():
            place = next(place for place in record if name.startswith(f"{place}."))
            self._by_place[place][name.removeprefix(f"{place}.")] = array

    def check(self) -> None:
        """ValueError names what no checkpoint could hold."""
        for place, state in self._by_place.items():
            if not isinstance(state, dict):
                raise ValueError(f"{place}: expected a dictionary as state, got {described(state)}")
            for name, value in state.items():
                wrong = [*_unsavable({name: None if _is_array(value) else value})]
                if wrong:
                    raise ValueError(
                        f"{place}: state {name!r}: expected what a checkpoint can hold (a NumPy "
                        f"array of numbers; or a text, a number of Python, None, and lists and "
                        f"dictionaries of these), got {described(wrong[0])}"
                    )


def _is_array(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.name in ARRAYS


def _unsavable(value: Any) -> Iterator[object]:
    """What in it would not come back from JSON as it is."""
    if isinstance(value, list):
        for part in value:
            yield from _unsavable(part)
    elif isinstance(value, dict):
        yield from (name for name in value if type(name) is not str)
        for part in value.values():
            yield from _unsavable(part)
    elif not (value is None or type(value) in (bool, int, float, str)):
        yield value
