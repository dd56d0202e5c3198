"""What a start finds on disk: nothing, a run to go on with, or a complete one."""

from __future__ import annotations

import datetime
import logging
import secrets
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from dispatcher import __version__
from dispatcher.config import RunSettings
from dispatcher.core.events import Counters, QueueState
from dispatcher.core.work_queue import WorkQueue
from dispatcher.errors import StateError
from dispatcher.input_options import is_standard_input
from dispatcher.storage.files import Files
from dispatcher.storage.inputs.copying import Copying, origin_now
from dispatcher.storage.inputs.growing import Begun, fingerprint_of_grown
from dispatcher.storage.inputs.opening import input_kind, is_there, open_source, reader_of
from dispatcher.storage.inputs.reader import CopyStop
from dispatcher.storage.journal import JOURNAL_DIR
from dispatcher.storage.records import RunHeader
from dispatcher.storage.recovery import Recovered
from dispatcher.storage.run_state import STARTING, load_run_file, save_run_file
from dispatcher.storage.same_run import check_command, check_input, check_output, going_on, shown
from dispatcher.storage.source import LineSource
from dispatcher.storage.writer import SOLE_OWNER, Owner, RunWriter

log = logging.getLogger(__name__)


@dataclass(slots=True)
class OpenRun:
    """A run that is ready to go on. `run_file` is what run.yaml holds.

    `source` is None when the run is complete.
    """

    run_id: str
    epoch: int
    queue: WorkQueue
    source: LineSource | None
    writer: RunWriter
    run_file: dict[str, Any]
    is_complete: bool = False

    def close(self) -> None:
        """Close its files; nothing is written."""
        self.writer.close()
        if self.source is not None:
            self.source.close()


def open_run(
    settings: RunSettings,
    files: Files,
    epoch: int,
    now: float,
    owner: Owner = SOLE_OWNER,
    stop: CopyStop | None = None,
) -> OpenRun:
    """Open the run that the settings describe; it is `owner`'s, with this epoch.

    An input that has to be copied is, or its source is one that grows; `stop` ends that.

    Raises UsageError, StateError or StorageError with what was found and what to do about it.
    """
    run_file = load_run_file(settings.state_dir, files) or {}
    if run_file.get("state") == STARTING:
        # Nobody came to have that run; until this one has begun, --resume is to go on with it.
        if settings.command and run_file.get("command") != settings.command:
            owner.confirm()
            begun = run_file | {"command": dict(settings.command)}
            save_run_file(settings.state_dir, begun, files)
        run_file = {}
    writer = RunWriter(settings.state_dir / JOURNAL_DIR, settings.outfile, files, owner)
    if run_file.get("state") == "complete":
        return _open_complete(settings, writer, run_file, epoch, now)
    recovered = writer.read_journal(settings.policy, now)
    if recovered is None:  # before an input is copied, which may take hours
        _check_nothing_is_missing(settings, run_file)
        _check_no_output(settings)
    source = open_source(
        settings.infile,
        settings.state_dir,
        settings.max_line_bytes,
        settings.input_options,
        Copying(stop or CopyStop(), owner.confirm, files),
        is_begun=recovered is not None,
        begun=_begun(settings, recovered),
    )
    try:
        fingerprint = source.fingerprint()
        accepted: list[str] = []
        if recovered is not None:
            header = recovered.header
            before = header.fingerprint
            if source.is_whole and "size" not in before:
                before = before | fingerprint_of_grown(settings.state_dir, files)
            check_input(settings, before, fingerprint)
            positions = recovered.retention.newest_first()
            written = positions[0].size_bytes if positions else 0
            check_output(settings, header.settings.get("output"), written)
            accepted = check_command(
                run_file.get("command"), settings.command, settings.accept_changes
            )
            queue = recovered.queue
            run_id = header.run_id
        else:
            queue = WorkQueue(settings.policy)
            run_id = secrets.token_hex(8)
        described = describe(settings)
        header = RunHeader(run_id, epoch, fingerprint, described)
        writer.begin(header, queue.checkpoint(), recovered)
        queue.note_written(writer.output.written)
        run_file = {
            "run": run_id,
            "state": "running",
            "version": __version__,
            "started_at": run_file.get("started_at", utc_now()),
            "input_kind": input_kind(settings.infile, fingerprint),
            "fingerprint": fingerprint,
            "settings": described,
            "command": going_on(run_file.get("command"), settings.command),
            "accepted_changes": [
                *run_file.get("accepted_changes", []),
                *({"at": utc_now(), "change": change} for change in accepted),
            ],
        }
        owner.confirm()
        save_run_file(
            settings.state_dir, {key: part for key, part in run_file.items() if part}, files
        )
        return OpenRun(run_id, epoch, queue, source, writer, run_file)
    except BaseException:  # whatever it was, a copy must not go on
        source.close()
        raise


def _begun(settings: RunSettings, recovered: Recovered | None) -> Begun | None:
    """Return from where the copy of an input may grow; None when it has to be whole."""
    if recovered is None:
        return Begun()
    before = recovered.header.fingerprint
    if "size" in before:  # it was whole when the run began, and is compared as a whole
        return None
    return Begun(recovered.queue.next_offset, lambda now: check_input(settings, before, now))


def describe(settings: RunSettings) -> dict[str, Any]:
    """Return the settings as run.yaml and the journal keep them."""
    return {
        "input": shown(settings.infile),
        **{f"input_{name}": value for name, value in settings.input_options.given().items()},
        "output": shown(settings.outfile),
        "state": shown(settings.state_dir),
        "retry_s": settings.retry_s,
        "max_line_bytes": settings.max_line_bytes,
        **asdict(settings.policy),
    }


def utc_now() -> str:
    """Return the time of day for run.yaml."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _open_complete(
    settings: RunSettings, writer: RunWriter, run_file: dict[str, Any], epoch: int, now: float
) -> OpenRun:
    """There is nothing to hand out, and the output is not touched."""
    size = settings.outfile.stat().st_size if settings.outfile.exists() else None
    sizes = [run_file.get("output_bytes")]
    if isinstance(merged := run_file.get("merged"), dict):
        sizes.append(merged.get("output_bytes"))  # a merge was stopped (dispatcher/runs/merge.py)
    if size is None or size not in sizes:
        raise StateError(
            f"{settings.state_dir} says that its run is complete, but {settings.outfile} is not "
            "the output it wrote; restore the output, or remove the state directory to start anew"
        )
    _check_complete_input(settings, run_file.get("fingerprint", {}))
    writer.remove_journal()  # a process that died after writing run.yaml left it behind
    queue = WorkQueue(settings.policy)
    counters = msgspec.convert(run_file.get("summary", {}), Counters)
    total = counters.done
    queue.restore(QueueState(total, total, 0, 1, counters, []), now)
    queue.end_of_input()
    run_id = str(run_file.get("run", ""))
    return OpenRun(run_id, epoch, queue, None, writer, run_file, is_complete=True)


def _check_complete_input(settings: RunSettings, before: dict[str, Any]) -> None:
    """Compare the input with the one that was answered, where that can be done by a look."""
    if not is_there(settings.infile):
        # What is read once is not read a second time.
        if is_standard_input(settings.infile):
            log.warning("the run is complete: standard input was not read")
        return
    reader = reader_of(settings.infile, settings.input_options)
    if reader is None:
        source = LineSource(settings.infile, settings.max_line_bytes)
        check_input(settings, before, source.fingerprint())
        source.close()
    else:
        origin = origin_now(reader, {"original": before.get("original", {})}) or {}
        check_input(settings, before, {**before, **origin})


def _check_nothing_is_missing(settings: RunSettings, run_file: dict[str, Any]) -> None:
    if run_file:
        raise StateError(
            f"the journal of run {run_file.get('run')} is gone from {settings.state_dir}; restore "
            "it from a backup, or remove the state directory and the output to start anew"
        )


def _check_no_output(settings: RunSettings) -> None:
    outfile = settings.outfile
    try:
        occupied = outfile.exists() and (not outfile.is_file() or outfile.stat().st_size > 0)
    except OSError as error:
        raise StateError(f"cannot look at the output {outfile}: {error.strerror}") from error
    if occupied:
        raise StateError(
            f"the output {outfile} exists, but {settings.state_dir} holds no run that wrote it; "
            "name the state directory of its run with --state, or another output"
        )
