"""Tasks of several steps for the simulation, its model, and the judge of recorded steps.

What must hold: a step whose record a worker was told of is there whenever the item is handed out
later, unless something said that it is void; it is not asked of the model again; and whatever a
task is answered, live or from the record, the model said it to the very same request.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from dispatcher.models import ReleaseItem, Step, StepItem, StepOutcome, WorkItem
from dispatcher.taskmanager.backend.request import Request, Response
from dispatcher.taskmanager.steps import Asked, Position, StepLog
from dispatcher.taskmanager.task import GeneratorTask

EVERY = 8
_MOST_YIELDS = 4


@dataclass(slots=True)
class _Acknowledged:
    hash: str
    at: float


@dataclass
class StepLedger:
    """What workers were told of recorded steps, and what the model was asked and said."""

    complain: Callable[[str], None]
    counts: Counter[str]
    now: Callable[[], float]
    _kept: dict[int, dict[Position, _Acknowledged]] = field(default_factory=dict)
    _voiding: dict[int, list[tuple[object, Position]]] = field(default_factory=dict)
    _voided: dict[int, list[tuple[float, Position]]] = field(default_factory=dict)
    _cut_at: dict[str, Position] = field(default_factory=dict)
    _handed_in: set[tuple[int, Position, str, str]] = field(default_factory=set)
    _brought: dict[str, dict[Position, Step]] = field(default_factory=dict)
    _said: dict[str, tuple[int, str]] = field(default_factory=dict)

    # ---------------------------------------------------------------- the model

    def answer(self, lease: str, number: int, log: StepLog, asked: Asked) -> Response:
        """Answer a request, never twice the same."""
        known = self._brought.get(lease, {}).get(asked.position)
        is_void = log.cut_at is not None and asked.position >= log.cut_at
        is_void = is_void or self._cut_at.get(lease, (1 << 30, 0)) <= asked.position
        if known is not None and known.hash == asked.hash and not is_void:
            self.complain(f"lease {lease} asked again for its step {asked.position}")
        self.counts["model requests"] += 1
        text = str(len(self._said))
        self._said[text] = (number, asked.request.content["prompt"])
        return Response(asked.request, {"choices": [{"text": text}]}, model_name="m")

    def check_answer(self, number: int, prompt: str, response: Response) -> str:
        """Return the text of what a task was answered, live or from the record."""
        text = str(response.get_text())
        if self._said.get(text) != (number, prompt):
            self.complain(f"item {number} was answered {text!r} to another request")
        return text

    # ---------------------------------------------------------------- what is handed in

    def note_handing_in(self, steps: Iterable[StepItem]) -> None:
        """Steps leave for the server."""
        for step in steps:
            kept = self._kept.get(step.work_id, {}).get(step.pos)
            if step.response is None:
                self.counts["step mismatches told"] += step.lease not in self._cut_at
                self._cut_at[step.lease] = min(step.pos, self._cut_at.get(step.lease, step.pos))
                self._void(step.work_id, step.pos)
            else:
                self._handed_in.add((step.work_id, step.pos, step.hash, step.response))
                if kept is not None and kept.hash != step.hash:
                    # A copy of the item that had not this step goes on as the only one.
                    self._cut_at[step.lease] = min(step.pos, self._cut_at.get(step.lease, step.pos))
                    self._void(step.work_id, step.pos)

    def note_taken(
        self, steps: Iterable[StepItem], outcomes: Iterable[StepOutcome], sent_at: float
    ) -> None:
        """The server told what became of steps that left at `sent_at`."""
        for step, outcome in zip(steps, outcomes, strict=True):
            self.counts[f"step {outcome}"] += step.response is not None
            if outcome is not StepOutcome.ACCEPTED or step.response is None:
                continue
            # A copy of a call that told a mismatch may come late, and void what came after it.
            cut_at = self._cut_at.get(step.lease, (1 << 30, 0))
            voids = [first for _, first in self._voiding.get(step.work_id, [])]
            voids += [first for at, first in self._voided.get(step.work_id, []) if at >= sent_at]
            if all(step.pos < first for first in (cut_at, *voids)):
                kept = self._kept.setdefault(step.work_id, {})
                kept[step.pos] = _Acknowledged(step.hash, self.now())

    def note_renewed(self, old: str, new: str) -> None:
        """A worker goes on with an item, where it is, under another lease."""
        self._brought.setdefault(new, self._brought.get(old, {}))
        if old in self._cut_at:
            self._cut_at.setdefault(new, self._cut_at[old])

    # ---------------------------------------------------------------- what voids it

    def note_releasing(self, items: Iterable[ReleaseItem]) -> object:
        """Releases leave; until their reply is here, what they void may be void or not."""
        return self._begin_voiding(
            (item.work_id, (0 if item.steps == "drop" else item.keep_yields, 0))
            for item in items
            if item.steps == "drop" or item.keep_yields is not None
        )

    def note_results(self, items: Iterable[Any]) -> object:
        """Results leave; an item that is done needs no steps, one that is no JSON voids them."""
        return self._begin_voiding((item.work_id, (0, 0)) for item in items)

    def note_reply(self, voiding: object) -> None:
        """What was to be void is: what is recorded from here on counts."""
        for work_id, voids in list(self._voiding.items()):
            for by, first in voids:
                if by is voiding:
                    self._void(work_id, first)
            left = [(by, first) for by, first in voids if by is not voiding]
            self._voiding[work_id] = left
            if not left:
                del self._voiding[work_id]

    def _begin_voiding(self, voids: Iterable[tuple[int, tuple[int | None, int]]]) -> object:
        token = object()
        for work_id, (keep_yields, place) in voids:
            first = (keep_yields or 0, place)
            self._voiding.setdefault(work_id, []).append((token, first))
            self._void(work_id, first)
        return token

    def _void(self, work_id: int, first: Position) -> None:
        self._voided.setdefault(work_id, []).append((self.now(), first))
        kept = self._kept.get(work_id, {})
        for position in [at for at in kept if at >= first]:
            del kept[position]

    # ---------------------------------------------------------------- what is handed out

    def note_granted(self, item: WorkItem, asked_at: float) -> None:
        """An item was handed out to a call that began at `asked_at`."""
        steps = {step.pos: step for step in item.steps or ()}
        self._brought[item.lease or ""] = steps
        self.counts["steps handed out"] += len(steps)
        for position, kept in self._kept.get(item.work_id, {}).items():
            if kept.at >= asked_at:
                continue
            if position not in steps:
                self.complain(f"item {item.work_id} was handed out without its step {position}")
            elif steps[position].hash != kept.hash:
                self.complain(f"step {position} of item {item.work_id} is one of another request")
        for step in steps.values():
            if (item.work_id, step.pos, step.hash, step.response) not in self._handed_in:
                self.complain(f"nobody recorded step {step.pos} of item {item.work_id}")


class SimTask(GeneratorTask):
    """One line in EVERY asks several times, some of it at once, each time about all before.

    `rewords` is the yield from which on a worker of another version asks something else.
    """

    ledger: StepLedger
    rewords: int | None = None

    def task_generator(self) -> Any:
        number = self.data["id"]
        heard: list[str] = []
        for turn in range(yields_of(number)):
            wording = "!" if self.rewords is not None and turn >= self.rewords else "?"
            prompts = [
                f"{number} {turn} {place} {','.join(heard)}{wording}"
                for place in range(requests_of(number, turn))
            ]
            if len(prompts) == 1:
                responses = [(yield Request({"prompt": prompts[0]}))]
            else:
                responses = yield [Request({"prompt": prompt}) for prompt in prompts]
            heard += [
                self.ledger.check_answer(number, prompt, response)
                for prompt, response in zip(prompts, responses, strict=True)
            ]
        return {"id": number, "heard": heard}


def yields_of(number: int) -> int:
    """Return how often the task of a line asks."""
    return 1 if number % EVERY else 2 + number // EVERY % (_MOST_YIELDS - 1)


def requests_of(number: int, turn: int) -> int:
    """Return how much its task asks at once."""
    return 1 if number % EVERY else 1 + (number // EVERY + turn) % 2
