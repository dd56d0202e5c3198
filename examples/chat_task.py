"""The smallest useful task: one chat request a line.

    dispatcher run --task examples/chat_task.py:ChatTask \\
        --input examples/data/prompts.jsonl --output answers.jsonl
"""

from collections.abc import Generator
from typing import Any

from dispatcher.taskmanager.backend.request import Request, Response
from dispatcher.taskmanager.task import GeneratorTask, TaskFailed


class ChatTask(GeneratorTask):
    """Sends the line's `messages`; writes the line back with the model's `response`.

    Task arguments become part of the request: `--task-arg temperature=0`, say, or
    `--task-arg max_tokens=256` for longer answers.
    """

    def task_generator(self) -> Generator[Request, Response, dict[str, Any]]:
        """Ask once; a request that failed makes the line an `__ERROR__` line."""
        request = {"messages": self.data["messages"], "max_tokens": 64, **self.args}
        response = yield Request(request)
        if not response.is_success:
            raise TaskFailed(str(response.error), "model_error")
        return {**self.data, "response": response.get_text()}
