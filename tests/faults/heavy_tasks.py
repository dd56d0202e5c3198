"""Tasks that hold a thread between their requests: by computing, by sleeping, or without asking."""

import time
from collections.abc import Generator
from typing import Any

from dispatcher.taskmanager.backend.request import Request
from dispatcher.taskmanager.task import GeneratorTask

COMPUTED_S = 0.3
SLEPT_S = 2.0
HEAVY_REQUESTS = 3


class HeavyTask(GeneratorTask):
    """Does what `kind` of its line says; prompts begin with it."""

    def task_generator(self) -> Generator[Any, Any, dict[str, Any]]:
        """Answer one line."""
        kind = self.data["kind"]
        if kind == "heavy":
            for _ in range(HEAVY_REQUESTS):
                compute(COMPUTED_S)
                yield self.ask()
        elif kind == "sleeper":
            time.sleep(SLEPT_S)
            yield self.ask()
        elif kind == "silent":
            time.sleep(0.02)
        else:
            yield self.ask()
        return {"id": self.data["id"]}

    def ask(self) -> Request:
        """Return a request that names what it is for."""
        prompt = f"{self.data['kind']} {self.data['id']}"
        return Request({"messages": [{"role": "user", "content": prompt}]})


def compute(seconds: float) -> None:
    """Use so many seconds of CPU in Python, as parsing or scoring an answer does."""
    end = time.thread_time() + seconds
    number = 0
    while time.thread_time() < end:
        for _ in range(2000):
            number += 1
