"""The fault tests are tested: each deliberately broken variant of the product must be caught.

A variant is a copy of the package with one replacement in one file. A checker, one or more of the
tests, must fail on it and tell of the damage that was done; on the unbroken package it passes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from dispatcher.config import RunSettings
from tests.faults.simulation import run_seed
from tests.storage.test_crash_states import Judge, lived, settings  # noqa: F401

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SEED_COUNT = 30
IMAGES_PER_OPERATION = 4
TIMEOUT_S = 150.0

CLIENT = "client.py"
QUEUE = "core/work_queue.py"
PAUSING = "core/pausing.py"
FEED = "line_feed.py"
LEASED = "taskmanager/tasksource/leased.py"
MANAGER = "taskmanager/manager.py"
SERVICE = "service.py"
GROWING = "storage/inputs/growing.py"
JOURNAL = "storage/journal.py"
OUTPUT = "storage/output.py"
OWNERSHIP = "storage/ownership.py"
RECOVERY = "storage/recovery.py"
WAITING = "storage/waiting.py"
WRITER = "storage/writer.py"

SEEDS = "tests/faults/test_mutants.py::test_a_few_whole_runs_keep_every_promise"
CRASHES = "tests/faults/test_mutants.py::test_a_few_crash_states_hold_what_was_acknowledged"
IN_STORAGE = "tests/storage/"
IN_CORE = "tests/core/test_work_queue.py::"
PAUSES = "tests/core/test_pausing.py::"
PAUSES_FOR_FAILURES = "tests/core/test_failures.py::"
OPERATOR = "tests/service/test_operator_pause.py::"
IN_SOURCE = "tests/taskmanager/test_leased.py::"
IN_MANAGER = "tests/taskmanager/test_manager.py::"
TAKING = "tests/service/test_taking_and_giving.py::"
GOING_ON = "tests/service/test_going_on.py::"
GROWS = "tests/service/test_growing_input.py::"


@dataclass(frozen=True)
class Mutant:
    """A way to break the product: in `file`, `old` becomes `new`.

    `checker` is the test that must fail on it, and `tells` a pattern of what it says then.
    """

    sentence: str
    file: str
    old: str
    new: str
    checker: str
    tells: str


MUTANTS = [
    # ---------------------------------------------------------------- what is acknowledged
    Mutant(
        "replies leave before the journal is written",
        SERVICE,
        "            self._writing = done\n",
        "            self._writing = done\n            done.give()\n",
        SEEDS,
        "was given twice|was done and was handed out again|two different results",
    ),
    Mutant(
        "the journal is not synced",
        JOURNAL,
        "            self._files.sync(fd)\n",
        "            pass\n",
        CRASHES,
        "behind operation",
    ),
    Mutant(
        "the directory of a new segment is not synced",
        JOURNAL,
        "            self._files.sync_dir(self._directory)\n",
        "            pass\n",
        CRASHES,
        "behind operation",
    ),
    Mutant(
        "what a dead process wrote is not synced at a restart",
        JOURNAL,
        "self._sync(fd, segment.path)",
        "pass",
        IN_STORAGE + "test_journal.py::"
        "test_what_a_dead_process_wrote_is_synced_before_the_journal_goes_on",
        r"assert \[\] == \['sync ",
    ),
    Mutant(
        "a batch that could not be written is not undone",
        SERVICE,
        "        self.queue = recovered.queue\n",
        "        pass\n",
        SEEDS,
        "is in no segment|is lost",
    ),
    # ---------------------------------------------------------------- pauses
    Mutant(
        "good lines that come in later end a pause for failures at the next start",
        QUEUE,
        "        if paused is not None and paused.limit != limit:",
        "        if paused is not None:",
        PAUSES_FOR_FAILURES
        + "test_a_share_that_fell_below_the_limit_meanwhile_does_not_end_a_pause_at_a_restart",
        "assert None is not None",
    ),
    Mutant(
        "a checkpoint forgets that an operator paused the run",
        QUEUE,
        "            operator=self.pauses.operator,\n",
        "",
        PAUSES + "test_an_operators_pause_survives_a_restart_and_a_checkpoint",
        "assert 'None' == 'paused by",
    ),
    Mutant(
        "a checkpoint forgets which start was heard",
        QUEUE,
        "            heard=self.pauses.heard,\n",
        "",
        PAUSES + "test_a_start_of_the_same_name_is_heard_once",
        "assert not True",
    ),
    Mutant(
        "a job that is started again accepts failures again",
        QUEUE,
        "        if start and start == self.pauses.heard:\n",
        "        if start and not self.pauses.heard:\n",
        PAUSES + "test_a_start_of_the_same_name_is_heard_once",
        "assert not True|assert False",
    ),
    Mutant(
        "a named limit ends an operator's pause, too",
        PAUSING,
        "        if isinstance(event, FailureLimitSet):\n",
        "        if isinstance(event, FailureLimitSet):\n            self.operator = None\n",
        PAUSES + "test_a_limit_that_is_named_does_not_lift_an_operators_pause",
        "assert None == Pause",
    ),
    Mutant(
        "a pause is answered before it is on disk",
        SERVICE,
        "        self._notify()\n        await self._barrier(queue)\n\n    @property",
        "        self._notify()\n\n    @property",
        OPERATOR + "test_a_pause_that_cannot_be_written_is_refused_and_is_none",
        "DID NOT RAISE",
    ),
    # ---------------------------------------------------------------- engines that die
    Mutant(
        "an item that must run alone stays with the worker whose engine it killed",
        QUEUE,
        "            and item.crashes < self.policy.crashes_before_solo\n",
        "",
        IN_CORE + "test_the_second_crash_of_an_item_sends_it_back_to_run_alone",
        "assert Renewal",
    ),
    Mutant(
        "a renewed item counts as not started",
        QUEUE,
        "        young.progress = max(1, lease.progress)\n",
        "",
        IN_CORE + "test_a_worker_that_vanishes_right_after_a_renewal_crashed_with_the_item_running",
        "assert 1 == 2",
    ),
    Mutant(
        "a renewal is not told again when its reply was lost",
        SERVICE,
        "                if renewal.lease is not None:\n",
        "                if renewal.lease is not None and renewal.ended:\n",
        TAKING + "test_a_renewed_lease_is_on_disk_when_the_reply_leaves_and_survives_a_restart",
        "assert .0, UNSET. == ",
    ),
    Mutant(
        "an item that ends while its lease is renewed ends under the old one",
        LEASED,
        "                release.lease = renewed.renewed\n",
        "",
        IN_SOURCE + "test_an_item_that_ends_while_its_crash_is_told_ends_under_its_new_lease",
        "assert .'0.1'. == .'0.2'.",
    ),
    Mutant(
        "a step that comes while its lease is renewed stays under the old one",
        LEASED,
        "        self._recorder.rename(old, item)\n",
        "",
        IN_SOURCE
        + "test_a_step_that_comes_while_its_lease_is_renewed_is_recorded_under_the_new_one",
        "the step arrives",
    ),
    Mutant(
        "a worker that stops does not say which of its items crashed",
        LEASED,
        "                why = CRASH if id(assignment) in crashed else why\n",
        "",
        IN_SOURCE + "test_stopping_says_crash_of_items_whose_crash_could_not_be_told",
        "'0.1', 'stopped', False.* != .*'0.1', 'crash', False",
    ),
    Mutant(
        "what a crash takes away is cancelled although the manager is about to do so",
        LEASED,
        "if not report.is_awaited and assignment.cancel is not None:",
        "if assignment.cancel is not None:",
        IN_SOURCE + "test_what_a_crash_takes_away_is_not_cancelled_behind_the_managers_back",
        r"assert \['0.1'\] == \[\]",
    ),
    Mutant(
        "a report holds up the question for a lease whose news got lost",
        LEASED,
        "retold = not self._told or await self._send_crashes()",
        "retold = True",
        IN_SOURCE + "test_a_crash_whose_reply_was_lost_is_told_again_before_anything_else",
        r"assert \['crash', 'results'",
    ),
    Mutant(
        "a lost reply to a renewal is waited for until the new lease ended",
        CLIENT,
        "timeout_s = min(timeout_s, RENEW_TIMEOUT_S)",
        "pass",
        "tests/test_client.py::test_a_release_that_renews_leases_waits_less_long_for_its_reply",
        r"assert \(.*OK.*, False\) == ",
    ),
    Mutant(
        "an item that must run alone waits for a task that never ends",
        MANAGER,
        "if running.assignment.is_lost:",
        "if False:",
        IN_MANAGER + "test_a_solo_item_does_not_wait_for_a_task_that_never_ends_once_it_is_lost",
        "Timeout|not within",
    ),
    # ---------------------------------------------------------------- the journal
    Mutant(
        "a torn last frame is not cut off",
        JOURNAL,
        "self._files.truncate(fd, end)",
        "pass",
        IN_STORAGE + "test_journal.py::"
        "test_a_last_frame_torn_at_any_byte_is_cut_off_and_the_rest_comes_back",
        r"assert \d+ == \d+",
    ),
    Mutant(
        "a failed write is not cut back",
        JOURNAL,
        "self._files.truncate(self._fd, self._size)",
        "pass",
        IN_STORAGE + "test_journal.py::"
        "test_a_failed_write_leaves_the_file_as_it_was_and_the_next_one_succeeds",
        r"assert b'@\d+",
    ),
    Mutant(
        "frames need not form a chain",
        JOURNAL,
        "(frame.seq, frame.previous_crc) != (before.seq + 1, before.crc)",
        "False",
        IN_STORAGE + "test_crash_states.py::"
        "test_whole_frames_that_do_not_follow_each_other_are_refused",
        "DID NOT RAISE",
    ),
    Mutant(
        "segments are dropped one too early",
        RECOVERY,
        "needed = min([current, *holding])",
        "needed = min([current, *(segment + 1 for segment in holding)])",
        SEEDS,
        "is in no segment|KeyError",
    ),
    Mutant(
        "the places of waiting results are trusted without their checksum",
        WAITING,
        'if crc != b"%08x" % zlib.crc32(body):',
        "if not crc:",
        IN_STORAGE + "test_waiting.py::"
        "test_places_with_any_flipped_bit_are_not_used_or_say_the_same",
        "JSON is malformed",
    ),
    # ---------------------------------------------------------------- what a restart restores
    Mutant(
        "the retries of an item are not restored",
        QUEUE,
        "                retries=saved.retries,\n",
        "",
        CRASHES,
        r"False = same\(QueueState",
    ),
    Mutant(
        "the attempt of an item is not restored",
        QUEUE,
        "                attempt=saved.attempt,\n",
        "",
        CRASHES,
        r"False = same\(QueueState",
    ),
    Mutant(
        "a restart forgets which worker has the lines that went out as they were read",
        QUEUE,
        "            lease = Lease(serial, work_id, worker, beats, False, now, now, now)\n",
        '            lease = Lease(serial, work_id, "", False, False, now, now, now)\n',
        IN_CORE + "test_lines_leased_as_they_are_read_are_as_lines_read_first_and_leased_then",
        "assert QueueState",
    ),
    Mutant(
        "a lease of lines that went out as they were read has the number of another one",
        QUEUE,
        "        self.counters.issued += len(event.sizes)\n"
        "        self.next_serial = max(self.next_serial, serial)\n",
        "        self.counters.issued += len(event.sizes)\n",
        IN_CORE + "test_lines_leased_as_they_are_read_are_as_lines_read_first_and_leased_then",
        "assert QueueState",
    ),
    Mutant(
        "leases are not restored",
        QUEUE,
        "for was in saved.leases:",
        "for was in saved.leases[:0]:",
        CRASHES,
        r"False = same\(QueueState",
    ),
    # ---------------------------------------------------------------- the output
    Mutant(
        "the output is not cut at a restart",
        OUTPUT,
        "self._files.truncate(self._fd, self.size_bytes)",
        "pass",
        CRASHES,
        "behind operation",
    ),
    Mutant(
        "a position is noted before the output is synced",
        WRITER,
        "        self.output.sync()\n        return self.output.position",
        "        return self.output.position",
        CRASHES,
        "behind operation",
    ),
    Mutant(
        "one position of the output is kept instead of two",
        RECOVERY,
        "_POSITIONS_KEPT = 2",
        "_POSITIONS_KEPT = 1",
        IN_STORAGE + "test_crash_states.py::"
        "test_an_output_that_lost_its_end_goes_on_from_the_position_before",
        "is not what this run wrote",
    ),
    Mutant(
        "results stand in the output in the order they came",
        WRITER,
        "fresh.get(work_id) or self._read(work_id)",
        "fresh.pop(next(iter(fresh))) if fresh else self._read(work_id)",
        SEEDS,
        "of the output answers line|is lost|is in no segment",
    ),
    # ---------------------------------------------------------------- whose result counts
    Mutant(
        "a late result is acknowledged and dropped",
        QUEUE,
        "        work_ids, serials, results, kinds = taken\n",
        "        live = [n for n, s in enumerate(taken.serials) if s in (None, *self.leases)]\n"
        "        work_ids, serials, results, kinds = taken.at(live)\n",
        SEEDS,
        "two different results|was done and was handed out again|is lost",
    ),
    Mutant(
        "a second result replaces the first",
        "core/line_states.py",
        "            and self._states[line - self._base] == _TOMBSTONE\n",
        "            and self._states[line - self._base] != _OPEN\n",
        SEEDS,
        "two different results|the counters say",
    ),
    Mutant(
        "results of another run are taken",
        SERVICE,
        "{item.run for item in items} <= {None, run_id}",
        "run_id",
        TAKING + "test_an_item_of_another_run_changes_nothing",
        "wrong_run",
    ),
    # ---------------------------------------------------------------- who pays
    Mutant(
        "the item that a vanished worker was running is charged",
        QUEUE,
        'self._end(lease, "crashed", VANISHED, now)',
        'self._end(lease, "charged", VANISHED, now)',
        IN_CORE + "test_a_worker_that_vanished_costs_its_running_item_a_crash_and_no_charge",
        r"assert \(1, 0, 0\) == \(0, 1, 0\)",
    ),
    Mutant(
        "the work timeout charges nobody",
        QUEUE,
        'self._end(lease, "charged", WORK_TIMEOUT, now)',
        'self._end(lease, "returned", WORK_TIMEOUT, now)',
        "tests/core/test_work_queue.py::"
        "test_the_work_timeout_is_charged_to_a_client_without_heartbeats_from_hand_out_on",
        r"assert \(0, 0, 0\) ==",
    ),
    Mutant(
        "an item becomes a tombstone one attempt too early",
        QUEUE,
        "counters.charged += 1\n            if 0 <= self.policy.max_retries <= item.retries:",
        "counters.charged += 1\n"
        "            if 0 <= self.policy.max_retries <= item.retries + 1:\n"
        "                item.retries = self.policy.max_retries",
        SEEDS,
        "the tombstone of item",
    ),
    # ---------------------------------------------------------------- whose run it is
    Mutant(
        "an owner that stood still does not look whether it still is one",
        OWNERSHIP,
        "return self._clock() - self._confirmed_at <= CONFIRM_WITHIN_S",
        "return True",
        GOING_ON
        + "test_a_result_that_was_being_written_when_another_took_over_is_not_acknowledged",
        "DID NOT RAISE",
    ),
    Mutant(
        "the output is written without a look at whose run it is",
        WRITER,
        "        if not self._owner.is_confirmed:\n",
        "        if False:\n",
        GOING_ON + "test_a_service_that_hung_in_its_journal_leaves_the_winners_output_alone",
        "assert .* == .*the winner",
    ),
    Mutant(
        "a takeover leaves the owner no time to notice",
        OWNERSHIP,
        "SETTLE_S = CONFIRM_WITHIN_S + 1.0",
        "SETTLE_S = 0.0",
        IN_STORAGE
        + "test_ownership.py::test_a_takeover_waits_until_the_owner_may_acknowledge_nothing_more",
        r"assert [\d.]+ < 0\.0",
    ),
    # ---------------------------------------------------------------- an input that is copied
    Mutant(
        "a copy is read before it is on disk",
        GROWING,
        "self._copying.files.sync(self._fd)",
        "pass",
        IN_STORAGE + "test_growing_inputs.py::"
        "test_only_whole_lines_that_are_on_disk_with_their_sum_can_be_read",
        "cannot be copied: KeyError: 'input.partial'",
    ),
    Mutant(
        "half a line is read",
        GROWING,
        "self._source.available_bytes = self._line_end",
        "self._source.available_bytes = self.progress.bytes",
        IN_STORAGE + "test_growing_inputs.py::"
        "test_only_whole_lines_that_are_on_disk_with_their_sum_can_be_read",
        "cannot be copied: AssertionError",
    ),
    Mutant(
        "a copy is read again without its sum",
        GROWING,
        "if self._hash.hexdigest() != self._owed.blake2b:",
        "if False:",
        IN_STORAGE + "test_growing_inputs.py::"
        "test_every_other_byte_before_what_was_handed_out_is_refused",
        "DID NOT RAISE",
    ),
    Mutant(
        "the end of what was copied is taken for that of the input",
        FEED,
        "return self._source.is_whole and not self.has_more",
        "return not self.has_more",
        GROWS + "test_lines_are_handed_out_as_the_copy_grows_and_the_end_is_the_true_one",
        "all_work_complete",
    ),
    Mutant(
        "lines run twice because the copy of the input is behind",
        SERVICE,
        "        if not (grants or fresh or self._draining or queue.may_open()):\n",
        "        if not (grants or fresh or self._draining):\n",
        GROWS + "test_copies_of_long_running_lines_are_not_given_because_the_copy_is_behind",
        r"\['idle'\] == \[\]",
    ),
    Mutant(
        "a run that ends does not wait for who copies its input",
        SERVICE,
        "            await asyncio.to_thread(self._source.copy.end)",
        "            pass",
        GROWS + "test_who_closes_a_service_waits_until_nothing_writes_the_copy",
        r"\[False\] == \[True\]",
    ),
]


# -------------------------------------------------------------------- two quick checkers


def test_a_few_whole_runs_keep_every_promise() -> None:
    for seed in range(1, SEED_COUNT + 1):
        problems = run_seed(seed).problems
        assert not problems, f"seed {seed}: {'; '.join(problems[:3])}"
    print(f"{SEED_COUNT} runs in virtual time, 0 with problems")


def test_a_few_crash_states_hold_what_was_acknowledged(
    settings: RunSettings,  # noqa: F811
) -> None:
    scenario = lived(settings)
    judge = Judge(settings, scenario.history)
    for count, image in scenario.disk.crashes(Random(1), most=IMAGES_PER_OPERATION):
        problem = judge.problem(count, image)
        assert problem is None, f"behind operation {count}: {problem}"
    print(f"{judge.states} crash states reopened, 0 problems")


# -------------------------------------------------------------------- the mutants


def copy_of_the_product(directory: Path) -> Path:
    """Put a copy of the package, and these tests, into a directory that tests can run in."""
    half_written = shutil.ignore_patterns("*.pyc.*")
    shutil.copytree(ROOT / "dispatcher", directory / "dispatcher", ignore=half_written)
    (directory / "tests").symlink_to(ROOT / "tests")
    shutil.copy(ROOT / "pyproject.toml", directory)
    return directory


def break_it(directory: Path, mutant: Mutant) -> None:
    path = directory / "dispatcher" / mutant.file
    text = path.read_text()
    found = text.count(mutant.old)
    assert found == 1, (
        f"this mutant is out of date: {mutant.old!r} stands {found} times in {mutant.file}; "
        "find what the code says there now"
    )
    path.write_text(text.replace(mutant.old, mutant.new))


def check(directory: Path, *nodes: str) -> subprocess.CompletedProcess[str]:
    """Run tests against the package in a directory, up to the first that fails."""
    script = (
        "import sys, dispatcher, pytest\n"
        "print(dispatcher.__file__, flush=True)\n"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=short", f"--basetemp={directory}/tmp"]
    varying = ("DISPATCHER_TEST_SEED", "PYTEST_ADDOPTS")
    env = {name: value for name, value in os.environ.items() if name not in varying}
    # These tests need no plugin, and loading them takes longer than most of the checkers.
    env |= {"PYTHONPATH": str(directory), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *options, *nodes],
        cwd=directory,
        env=env,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    used = Path(done.stdout.partition("\n")[0])
    assert used.is_relative_to(directory), f"{used} was tested: {done.stdout}{done.stderr}"
    return done


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.sentence)
def test_it_is_noticed_when(mutant: Mutant, tmp_path: Path) -> None:
    # given
    broken = copy_of_the_product(tmp_path.resolve())
    break_it(broken, mutant)

    # when
    done = check(broken, mutant.checker)

    # then
    said = done.stdout + done.stderr
    assert done.returncode != pytest.ExitCode.OK, f"nothing was noticed:\n{said}"
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, f"no test could run:\n{said}"
    assert f"FAILED {mutant.checker}" in said, f"the checker itself broke:\n{said}"
    told = [line for line in said.split("\n") if line.startswith("E ")]
    because = [line for line in told if re.search(mutant.tells, line)]
    assert because, f"it failed for another reason:\n{said}"
    print(f"{mutant.checker.rpartition('::')[2]}:\n{because[0][:300]}")


def test_the_unbroken_product_passes_the_same_checkers(tmp_path: Path) -> None:
    """All but the two above, which are run as they stand."""
    unbroken = copy_of_the_product(tmp_path.resolve())
    checkers = {mutant.checker for mutant in MUTANTS} - {SEEDS, CRASHES}

    done = check(unbroken, *sorted(checkers))

    assert done.returncode == pytest.ExitCode.OK, done.stdout + done.stderr
    print(f"{len(MUTANTS)} mutants, {len(checkers) + 2} checkers")
