"""A task of two steps for lines of `oracle.input_line`."""

from collections.abc import Generator
from typing import Any

from dispatcher.taskmanager.backend.request import Request, Response
from dispatcher.taskmanager.task import GeneratorTask, TaskFailed


class TwoStepTask(GeneratorTask):
    """Asks about the line, then about the answer; the result has the line's id.

    The first one of a process prints "at work", so that a test knows when to kill it.
    """

    at_work = False

    def task_generator(self) -> Generator[Request, Response, dict[str, Any]]:
        """Ask twice."""
        if not TwoStepTask.at_work:
            TwoStepTask.at_work = True
            print("at work")
        text = self.data["text"]
        for _ in range(2):
            response = yield Request({"messages": [{"role": "user", "content": text}]})
            if not response.is_success:
                raise TaskFailed(str(response.error), "model_error")
            text = response.get_text()
        return {"id": self.data["id"], "answer": text}
