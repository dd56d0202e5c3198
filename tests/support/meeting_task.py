"""A task that asks nothing before all workers of the run have begun an item."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from dispatcher.taskmanager.backend.request import Request, Response
from dispatcher.taskmanager.task import GeneratorTask, TaskFailed

_LONGEST_S = 240.0


class MeetingTask(GeneratorTask):
    """`place` is a directory where each worker leaves a file; `workers` is how many there are."""

    def task_generator(self) -> Generator[Request, Response, dict[str, Any]]:
        """Wait for the others, then ask once."""
        place = Path(self.args["place"])
        (place / str(os.getpid())).touch()
        end = time.monotonic() + _LONGEST_S
        while len(list(place.iterdir())) < int(self.args["workers"]) and time.monotonic() < end:
            time.sleep(0.1)
        response = yield Request({"messages": self.data["messages"], "max_tokens": 100})
        if not response.is_success:
            raise TaskFailed(str(response.error), "model_error")
        return {"id": self.data["id"], "response": response.get_text()}
