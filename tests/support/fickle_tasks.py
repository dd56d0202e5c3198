"""A task that fails where its line says so."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

from dispatcher.taskmanager.backend.request import Request
from dispatcher.taskmanager.task import GeneratorTask, TaskFailed, TaskRetry


class FickleTask(GeneratorTask):
    """`how`: fine, fail, raise, retry (until it was tried three times), twice (asks two at once).

    With the variable FICKLE_IS_MENDED, or the argument `mended`, nothing fails.
    """

    def task_generator(self) -> Generator[Any, Any, dict[str, Any]]:
        how = self.data.get("how", "fine")
        if "FICKLE_IS_MENDED" in os.environ or self.args.get("mended"):
            how = "fine"
        ask = Request({"messages": [{"role": "user", "content": str(self.data["q"])}]})
        if how == "twice":
            one, other = yield [ask, Request({"prompt": "and you?", "max_tokens": 3})]
            return {**self.data, "one": one.get_text(), "other": other.get_text()}
        response = yield ask
        if how == "fail":
            raise TaskFailed("it is no good", "no_good")
        if how == "raise":
            return {"q": self.data["nowhere"]}
        if how == "retry" and not self.is_last_retry_attempt():
            raise TaskRetry("not this time")
        return {**self.data, "answer": response.get_text()}
