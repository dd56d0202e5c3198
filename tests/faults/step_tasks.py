"""Tasks of several steps; each prompt begins with the step's line, yield and place in it."""

import random
import uuid
from collections.abc import Generator
from typing import Any

from dispatcher.taskmanager.backend.request import Request, Response
from dispatcher.taskmanager.task import GeneratorTask, TaskFailed

STEPS_IN_TURN = 8
STEPS_AT_ONCE = 4
_SHOWN_CHARACTERS = 60

Steps = Generator[Any, Any, dict[str, Any]]


class _StepTask(GeneratorTask):
    """The first one of a process prints "at work", so that a test knows when to kill it."""

    is_at_work = False

    def ask(self, of_yield: int, place: int, *words: object) -> Request:
        """Return a request that names its place first."""
        if not _StepTask.is_at_work:
            _StepTask.is_at_work = True
            print("at work")
        prompt = " ".join(map(str, (self.data["id"], of_yield, place, *words)))
        return Request({"messages": [{"role": "user", "content": prompt}]})


def text_of(response: Response) -> str:
    """Return the answer's text. Raises TaskFailed when there is none."""
    if not response.is_success:
        raise TaskFailed(str(response.error), "model_error")
    return str(response.get_text())


class InTurnTask(_StepTask):
    """Asks again and again, each time about the answer before."""

    def task_generator(self) -> Steps:
        """Ask one after the other."""
        answers = [str(self.data["text"])]
        for number in range(STEPS_IN_TURN):
            about = answers[-1][:_SHOWN_CHARACTERS]
            answers.append(text_of((yield self.ask(number, 0, about))))
        return {"id": self.data["id"], "answers": answers[1:]}


class AtOnceTask(_StepTask):
    """Asks several things at once, then about all of the answers."""

    def task_generator(self) -> Steps:
        """Ask at once, then once more."""
        responses = yield [self.ask(0, place) for place in range(STEPS_AT_ONCE)]
        answers = [text_of(response) for response in responses]
        summary = text_of((yield self.ask(1, 0, *(answer[:24] for answer in answers))))
        return {"id": self.data["id"], "answers": answers, "summary": summary}


class FickleTask(_StepTask):
    """Asks something else whenever it is begun again, from its second step on."""

    def task_generator(self) -> Steps:
        """Ask one after the other."""
        asked: list[str] = []
        answers = [""]
        for number in range(4):
            chance = (random.random(), uuid.uuid4()) if number in (1, 2) else ()
            request = self.ask(number, 0, *chance, answers[-1][:_SHOWN_CHARACTERS])
            asked.append(request.content["messages"][0]["content"])
            answers.append(text_of((yield request)))
        return {"id": self.data["id"], "asked": asked, "answers": answers[1:]}
