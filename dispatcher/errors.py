"""Every error this project raises on purpose.

DispatcherError                 exit code 1
├── UsageError                  exit code 2: what was typed cannot be right
│   └── TaskLoadError           the task class cannot be found or set up
├── StateError                  the run on disk is not what this command expects
│   ├── CorruptJournalError     a damaged frame with good ones behind it
│   ├── RunLockedError          another process works on the same run
│   └── SpoolFileError          a worker's spooled results cannot be used; the run goes on
│       └── SpoolUnreadableError  not now: the file system failed
├── StorageError                a file operation failed
│   ├── TooFarError             a line of a large file was not found in the time there is
│   ├── StorageFullError        nothing was changed; the same call may succeed later (507)
│   └── SyncFailedError         a sync failed: what is on disk is unknown, the process must end
├── BadRequestError             a client sent something the protocol does not allow (400)
├── BodyTooLargeError           a call's body has more bytes than a server takes (413)
├── UnsupportedTypeError        a call's body is not said to be JSON (415)
├── AccessDeniedError           a server wants another token, or TLS (401, 403, 426)
├── BackendError                a model server cannot be started or used
│   ├── BackendRefusalError     it refuses whatever this run asks: starting again is in vain
│   │   └── AuthenticationError   it refused the API key (401)
│   └── QuotaExhaustedError     exit code 3: its quota is used up; go on when there is more
├── RunPausedError              exit code 3: more lines failed than --max-failures allows
├── StartStoppedError           exit code 3: a signal came before the run was open
├── ServerLostError             exit code 5: the dispatcher server stayed away too long
├── SlurmError                  one of Slurm's commands is missing, refused or did not answer
└── TaskError                   raised by tasks, caught where a task is run
    ├── TaskFailed              this item's result is an `__ERROR__` line
    └── TaskRetry               this item should be tried again from the beginning

A message tells what was wrong, where, and what to do about it, in one sentence or two.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What every command of this project ends with."""

    COMPLETE = 0
    ERROR = 1
    USAGE = 2
    STOPPED = 3
    COMPLETE_WITH_ERRORS = 4
    SERVER_LOST = 5


class DispatcherError(Exception):
    """Base of all errors whose message is meant for the user."""

    exit_code: ExitCode = ExitCode.ERROR


class UsageError(DispatcherError):
    """What was typed, or stands in a configuration file, cannot be right."""

    exit_code = ExitCode.USAGE


class TaskLoadError(UsageError):
    """The task class cannot be imported, found or set up."""


class StateError(DispatcherError):
    """The run on disk is not what this command expects."""


class CorruptJournalError(StateError):
    """A journal frame is damaged although good frames follow it."""


class RunLockedError(StateError):
    """Another process works on the same run."""


class SpoolFileError(StateError):
    """What a worker left in the spool cannot be trusted, read or used; nothing else is touched."""


class SpoolUnreadableError(SpoolFileError):
    """The file system failed where the spool is; a later call may succeed."""


class StorageError(DispatcherError):
    """A file operation failed."""


class StorageFullError(StorageError):
    """A write failed and was undone; nothing changed and the same call may succeed later."""


class SyncFailedError(StorageError):
    """A sync failed, so what is on disk is unknown; it is never retried."""


class TooFarError(StorageError):
    """A place in a large file was not found in the time that there is for it."""


class BodyTooLargeError(DispatcherError):
    """A call's body has more bytes than a server takes."""


class UnsupportedTypeError(DispatcherError):
    """A call's body is not said to be JSON."""


class BadRequestError(DispatcherError):
    """A client sent something the protocol does not allow."""


class AccessDeniedError(DispatcherError):
    """A server was shown no token, or not the one that it wants, or was not spoken TLS to."""


class BackendError(DispatcherError):
    """A model server cannot be started or used."""


class BackendRefusalError(BackendError):
    """A model server refuses everything that this run asks of it, the model's name say.

    Only another command, or another environment, helps.
    """


class AuthenticationError(BackendRefusalError):
    """A model server refused the API key, so every further request would be refused as well.

    The message names the server's URL and the variable that should hold the key, never the key.
    """


class QuotaExhaustedError(BackendError):
    """A hosted model server answers nothing more until its quota, of a day say, is renewed.

    Nothing is wrong with the items: the worker gives them back uncharged and stops. The message
    says when to go on, where the server told.
    """

    exit_code = ExitCode.STOPPED


class RunPausedError(DispatcherError):
    """More lines failed than may, and nobody is there to be asked: what is done stays."""

    exit_code = ExitCode.STOPPED


class StartStoppedError(DispatcherError):
    """A signal ended the command before its run was open, while its input was copied say."""

    exit_code = ExitCode.STOPPED


class ServerLostError(DispatcherError):
    """The dispatcher server did not answer for longer than the worker may wait."""

    exit_code = ExitCode.SERVER_LOST


class SlurmError(DispatcherError):
    """One of Slurm's commands is missing, refused what it was asked, or did not answer."""


class TaskError(DispatcherError):
    """Base of what a task raises to say how its item ends."""


class TaskFailed(TaskError):
    """The item cannot be answered; its output line says so.

    The line is `{"__ERROR__": {"error": error_type, "message": message, "task_data": data}}`.
    """

    def __init__(self, message: str = "", error_type: str = "task_logic_error") -> None:
        super().__init__(message)
        self.message = message
        self.error_type = error_type


class TaskRetry(TaskError):
    """The item should be tried again from the beginning, as one of its charged reissues.

    Every request is asked anew then. With `keep_steps`, only those of the last yield are: the
    answers to the yields before it are kept and given again.
    """

    def __init__(self, message: str = "", *, keep_steps: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.keep_steps = keep_steps
