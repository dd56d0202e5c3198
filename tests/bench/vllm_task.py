"""The task of `vllm_throughput`: so many requests in turn, each about the answer before."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

from dispatcher.taskmanager.backend.request import Request, Response
from dispatcher.taskmanager.task import GeneratorTask, TaskFailed

TOKENS = 32


def body(question: str) -> dict[str, Any]:
    """Return a request that is answered with exactly `TOKENS` tokens."""
    messages = [{"role": "user", "content": question}]
    return {"messages": messages, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}


def next_question(question: str, step: int, answer: str) -> str:
    """Return what is asked after an answer."""
    return f"{question} ({step}) {answer[:40]}"


class ChainTask(GeneratorTask):
    """`--task-arg steps=N`; the result tells when the line's first request was made, and its end.

    The times are those of the wall clock, so that lines of one run can be compared.
    """

    def task_generator(self) -> Generator[Request, Response, dict[str, Any]]:
        """Ask one after the other."""
        began_at = time.time()
        question = self.data["question"]
        for step in range(int(self.args["steps"])):
            response = yield Request(body(question))
            if not response.is_success:
                raise TaskFailed(str(response.error), "model_error")
            question = next_question(self.data["question"], step, response.get_text())
        return {"began_at": began_at, "ended_at": time.time()}
