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

    `--task-arg max_tokens=256` allows longer answers.
    """

    def task_generator(self) -> Generator[Request, Response, dict[str, Any]]:
        """Ask once; a request that failed makes the line an `__ERROR__` line."""
        max_tokens = self.args.get("max_tokens", 64)
        response = yield Request({"messages": self.data["messages"], "max_tokens": max_tokens})
        if not response.is_success:
            raise TaskFailed(str(response.error), "model_error")
        return {**self.data, "response": response.get_text()}
