"""A task of two requests, whose second one needs the answer of the first."""

from collections.abc import Generator
from typing import Any

from dispatcher.taskmanager.backend.request import Request, Response
from dispatcher.taskmanager.task import GeneratorTask, TaskFailed


class TwoStepTask(GeneratorTask):
    """Asks about the line, then about the answer."""

    def task_generator(self) -> Generator[Request, Response, dict[str, Any]]:
        """Ask twice; a request that failed makes the line an `__ERROR__` line."""
        about = self.data["text"]
        for number in range(2):
            prompt = f"{number} {about}"
            response = yield Request({"messages": [{"role": "user", "content": prompt}]})
            if not response.is_success:
                raise TaskFailed(str(response.error), "model_error")
            about = response.get_text()
        return {"id": self.data["id"], "answer": about}
