"""What a task author imports: light, without any network library behind it."""

from dispatcher.errors import TaskFailed, TaskRetry
from dispatcher.taskmanager.task.base import Task
from dispatcher.taskmanager.task.generator import GeneratorTask

__all__ = ["GeneratorTask", "Task", "TaskFailed", "TaskRetry"]
