"""A run is a list of phases: a training has one; a search that goes on to train has two."""

from dataclasses import dataclass
from typing import Any, Callable, Dict, List


def _nothing() -> None:
    pass


def _never() -> bool:
    return False


@dataclass
class Phase:
    """A part of a run, whose iterations take the same kinds of step.

    Attributes:
        first_steps: name of an objective → the first iteration that takes its step. An iteration
            takes the steps in this order. Iterations are counted from the start of the run.
        end: the number of iterations done when it ends.
        is_over: asked before each iteration: whether it ends now, before its time.
        finish: called at its end, before the next one begins.
        begin: called at its beginning, and again when a run is resumed in it.
    """

    first_steps: Dict[str, int]
    end: int
    is_over: Callable[[], bool] = _never
    finish: Callable[[], None] = _nothing
    begin: Callable[[], None] = _nothing

    def objectives(self, iteration: int) -> List[str]:
        """Names of the objectives of which an iteration takes a step."""
        return [name for name, first in self.first_steps.items() if iteration >= first]


class Phases:
    """The phases of a run, and in which of them it is. The last one ends with the run."""

    def __init__(self, *phases: Phase):
        self._phases = phases
        self._number = 0

    @property
    def current(self) -> Phase:
        return self._phases[self._number]

    @property
    def start(self) -> int:
        """The first iteration of the current phase."""
        return self._phases[self._number - 1].end if self._number else 0

    def before_iteration(self, iteration: int) -> None:
        """Go on to the next phase where the current one ends with the iteration before."""
        if iteration >= self.current.end or self.current.is_over():
            self.current.finish()
            self.current.end = iteration
            self._number += 1
            self.current.begin()

    def state_dict(self) -> Dict[str, Any]:
        return {"number": self._number, "ends": [phase.end for phase in self._phases]}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Go on to the phase of a checkpoint, whose weights have been loaded."""
        for phase, end in zip(self._phases, state["ends"]):
            phase.end = end
        while self._number < state["number"]:
            self._number += 1
            self.current.begin()
