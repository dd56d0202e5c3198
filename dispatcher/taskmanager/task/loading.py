"""From `--task` and its arguments to a task class that is ready to run."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import yaml

from dispatcher.config import absolute_spec
from dispatcher.errors import TaskLoadError
from dispatcher.taskmanager.task.base import Task


def load_task(spec: str, args: Mapping[str, Any]) -> type[Task]:
    """Find the task class, give it its arguments and run its `setup`, once a process.

    Raises TaskLoadError with what is wrong.
    """
    task_class = find_task(spec)
    task_class.args = MappingProxyType(dict(args))
    try:
        task_class.setup(task_class.args)
    except Exception as error:
        # The author's code may raise anything; the author needs to see where.
        raise TaskLoadError(f"--task {spec!r}: setup failed: {_where(error)}") from error
    return task_class


def find_task(spec: str) -> type[Task]:
    """Import `module:Class`, `module.Class` or `path/file.py:Class`.

    The current directory is importable. Raises TaskLoadError with what is wrong.
    """
    module_name, colon, class_name = spec.rpartition(":")
    if not colon:
        module_name, _, class_name = spec.rpartition(".")
    if not module_name or not class_name:
        raise TaskLoadError(
            f"--task {spec!r} names no class; give module:Class or path/file.py:Class"
        )
    module = _import(module_name, spec)
    task_class = getattr(module, class_name, None)
    if task_class is None:
        known = sorted(name for name, value in vars(module).items() if _is_task(value))
        hint = f"; it has {', '.join(known)}" if known else ""
        raise TaskLoadError(f"--task {spec!r}: {module_name} has no class {class_name}{hint}")
    if not _is_task(task_class):
        raise TaskLoadError(f"--task {spec!r}: {class_name} is not a subclass of Task")
    missing = sorted(getattr(task_class, "__abstractmethods__", ()))
    if missing:
        raise TaskLoadError(f"--task {spec!r}: {class_name} does not define {', '.join(missing)}")
    found: type[Task] = task_class
    return found


def describe_task(spec: str, task_class: type[Task], args: Mapping[str, Any]) -> dict[str, Any]:
    """Return what run.yaml keeps of a task, by which a changed one is told.

    `sha256` is that of the file which defines the class; None where there is no such file.
    """
    file = getattr(sys.modules.get(task_class.__module__), "__file__", None)
    path = Path(file).absolute() if file else None
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path is not None else None
    except OSError:
        digest = None
    return {
        "spec": absolute_spec(spec),
        "class": task_class.__qualname__,
        "file": str(path) if path is not None else None,
        "sha256": digest,
        "args": dict(args),
    }


def parse_task_args(
    pairs: Sequence[str], file: Path | None, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Read `--task-args FILE` (YAML or JSON), then `--task-arg KEY=VALUE`, which wins.

    Values are read as YAML: `3` is a number, `true` a truth value, `abc` a string. `before` are
    those that a resumed run has, over which these win.
    """
    args: dict[str, Any] = dict(before or {})
    if file is not None:
        try:
            content = yaml.safe_load(file.read_text("utf-8"))
        except OSError as error:
            raise TaskLoadError(f"cannot read --task-args {file}: {error.strerror}") from error
        except (yaml.YAMLError, ValueError) as error:
            raise TaskLoadError(f"--task-args {file} is not YAML: {error}") from error
        if not isinstance(content, dict):
            raise TaskLoadError(f"--task-args {file} must hold `name: value` lines")
        args |= {str(key): value for key, value in content.items()}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise TaskLoadError(f"--task-arg {pair!r} is not KEY=VALUE")
        try:
            args[key] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):
            args[key] = text
    return args


def _import(name: str, spec: str) -> ModuleType:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return _import_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and name.split(".")[0] == error.name.split(".")[0]:
            raise TaskLoadError(
                f"--task {spec!r}: there is no module {error.name}; give the path of its file, or "
                "start from the directory it is in"
            ) from error
        raise TaskLoadError(f"--task {spec!r}: importing it failed: {_where(error)}") from error
    except (Exception, SystemExit) as error:
        # Importing runs the author's code, which may raise anything.
        raise TaskLoadError(f"--task {spec!r}: importing it failed: {_where(error)}") from error


def _import_file(path: Path) -> ModuleType:
    path = path.absolute()
    if not path.is_file():
        raise TaskLoadError(f"--task: there is no file {path}")
    # A name of its own: two files called tasks.py must not be taken for each other.
    name = f"{path.stem}_{hashlib.blake2b(bytes(path), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if (beside := str(path.parent)) not in sys.path:
        sys.path.append(beside)
    spec.loader.exec_module(module)
    return module


def _is_task(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Task)


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
