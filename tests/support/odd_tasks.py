"""A task that misbehaves as its line asks it to."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

from dispatcher.taskmanager.backend.request import Request
from dispatcher.taskmanager.task import GeneratorTask


class OddTask(GeneratorTask):
    """`kind` says how; `seconds` how long it blocks."""

    def task_generator(self) -> Generator[Any, Any, Any]:
        kind = self.data["kind"]
        ask = Request({"messages": [{"role": "user", "content": f"line {self.data['id']}"}]})
        if kind == "nothing":
            return {"id": self.data["id"], "text": "no question asked"}
        if kind == "one":
            answers = yield [ask]
            return {"id": self.data["id"], "text": answers.get_text(), "count": len(answers)}
        response = yield ask
        if kind == "key_error":
            return {"id": self.data["missing"]}
        if kind == "none":
            return None
        if kind in ("slow", "blocking"):
            time.sleep(self.data["seconds"])
            response = yield ask
        return {"id": self.data["id"], "text": response.get_text()}
