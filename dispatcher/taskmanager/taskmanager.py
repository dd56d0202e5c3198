"""The synchronous TaskManager that existing programs construct."""

from __future__ import annotations

import asyncio

from dispatcher.taskmanager.backend.base import BackendManager
from dispatcher.taskmanager.compat import SyncBackend, SyncSource
from dispatcher.taskmanager.manager import Manager
from dispatcher.taskmanager.tasksource.base import TaskSource


class TaskManager:
    """Runs the tasks of a synchronous source against a synchronous backend.

    `num_workers` is the number of model requests in flight at most, `max_active_tasks` the
    number of tasks begun and not finished.
    """

    def __init__(self, num_workers: int = 4, max_active_tasks: int = 10) -> None:
        self.num_workers = num_workers
        self.max_active_tasks = max_active_tasks

    def process_tasks(self, task_source: TaskSource, backend_manager: BackendManager) -> None:
        """Return when the source is exhausted and every result is saved."""
        asyncio.run(self._process(task_source, backend_manager))

    async def _process(self, task_source: TaskSource, backend_manager: BackendManager) -> None:
        backend = SyncBackend(backend_manager, self.num_workers)
        manager = Manager(SyncSource(task_source), backend, max_active=self.max_active_tasks)
        try:
            await manager.run()
        finally:
            await backend.close()
