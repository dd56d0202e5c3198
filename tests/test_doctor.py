"""The doctor finds what would go wrong, and says what to mend; a sound set-up has no problems."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dispatcher.doctor import machine, models, places
from dispatcher.doctor.command import main
from dispatcher.doctor.finding import Finding, size_text
from dispatcher.doctor.lines import Sample, check_input
from dispatcher.doctor.places import (
    Places,
    Probe,
    check_clock,
    check_file_system,
    check_locks,
    check_output,
    check_space,
    check_writing,
    judge_syncs,
    mount_of,
)
from dispatcher.doctor.task import check_task
from dispatcher.errors import StateError
from dispatcher.storage.lines import InputLine
from tests.support.kinds import save_data_set, write_gzip, write_parquet
from tests.support.processes import dispatcher_server, run_python
from tests.support.scripted import Script, scripted

FICKLE = "tests/support/fickle_tasks.py:FickleTask"
LIMIT = 1 << 20
Usage = namedtuple("Usage", "total used free")


def doctor(*words: str | Path) -> tuple[int, dict[str, Any]]:
    """Run the command as a program does; return its code and what it printed as JSON."""
    code, output = run_python("-m", "dispatcher.cli", "doctor", "--json", *words)
    return code, json.loads(output)


def of(report: dict[str, Any], check: str) -> dict[str, Any]:
    (found,) = [each for each in report["checks"] if each["check"].startswith(check)]
    return dict(found)


def write_lines(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


# --- the command ----------------------------------------------------------------------------


def test_a_sound_set_up_has_no_problem_and_nothing_is_left_behind(tmp_path: Path) -> None:
    infile = write_lines(tmp_path / "in.jsonl", *({"q": f"question {n}"} for n in range(20)))
    code, report = doctor(
        *("--task", FICKLE, "--input", infile, "--output", tmp_path / "out.jsonl"),
        *("--backend", "fake"),
    )
    assert (code, report["ok"]) == (0, True), report
    assert "20 lines" in of(report, "input")["found"]
    assert "question 0" in of(report, "task")["found"]
    assert "a sync takes" in of(report, "writing to")["found"]
    assert of(report, "locks in")["status"] == "ok"
    assert of(report, "model server")["status"] == "ok"
    for check in ("Python", "open files", "GPUs", "clock", "space", "file system of", "output"):
        assert of(report, check)["status"] in ("ok", "warning")
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_each_check_is_one_line_that_begins_with_how_it_went(tmp_path: Path) -> None:
    infile = write_lines(tmp_path / "in.jsonl", "", "no JSON")
    code, output = run_python(
        *("-m", "dispatcher.cli", "doctor", "--input", infile, "--output", tmp_path / "x" / "out"),
        *("--task", "nowhere:Task", "--backend", "openai"),
    )
    *lines, last = output.splitlines()
    assert code == 1
    assert all(line.split()[0] in ("ok", "warning", "problem") for line in lines), output
    problems = sum(line.startswith("problem") for line in lines)
    assert problems >= 3
    assert last.startswith(f"{problems} problems, ")
    assert last.endswith(f"{len(lines)} checks")


def test_the_doctor_takes_the_file_of_options_of_a_run(tmp_path: Path) -> None:
    infile = write_lines(tmp_path / "in.jsonl", {"q": "a"})
    config = tmp_path / "run.yaml"
    options = {
        "task": FICKLE,
        "input": str(infile),
        "output": str(tmp_path / "out"),
        "backends": {"one": {"kind": "fake"}, "two": {"kind": "fake"}},
        "max_failures": "5%",
        "task_managers": 2,
    }
    config.write_text(yaml.safe_dump(options))
    code, report = doctor("--config", config)
    assert code == 0, report
    assert of(report, "model server one")["status"] == "ok"
    assert of(report, "model server two")["status"] == "ok"


def test_the_names_of_the_servers_options_are_understood(tmp_path: Path) -> None:
    infile = write_lines(tmp_path / "in.jsonl", {"q": "a"})
    _, report = doctor("--infile", infile, "--outfile", tmp_path / "out")
    assert of(report, "input")["status"] == "ok"
    assert of(report, "output")["status"] == "ok"


@pytest.mark.parametrize(
    ("words", "check", "said"),
    [
        (["--backend", "vllm"], "model server", "needs --model"),
        (["--backend", "openai", "--model", "m"], "model server", "OPENAI_API_KEY"),
        (["--input", "/nowhere/in.jsonl"], "input", "No such file"),
        (["--input", "/"], "input", "directory"),
        (["--task", "nowhere:Task"], "task", "no module nowhere"),
        (["--task", FICKLE, "--task-arg", "x"], "task", "KEY=VALUE"),
    ],
)
def test_what_cannot_work_is_a_problem_and_not_the_end_of_the_checks(
    words: list[str], check: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    code, report = doctor(*words)
    assert (code, report["ok"]) == (1, False)
    assert of(report, check)["status"] == "problem"
    assert said in of(report, check)["found"]
    assert of(report, "GPUs")


def test_an_option_that_nobody_knows_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--no-such-option"])
    assert ended.value.code == 2
    assert main(["--config", "/nowhere.yaml"]) == 2
    assert "cannot read --config" in capsys.readouterr().err


# --- the input ------------------------------------------------------------------------------


def test_lines_that_cannot_be_used_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    good = [{"q": n} for n in range(40)]
    path = write_lines(tmp_path / "in", *good, "", "[1]", '{"half": ')
    finding, sample = check_input(path, LIMIT)
    assert finding.status == "warning"
    assert "3 of all of them cannot be used" in finding.found
    assert "blank line" in finding.found
    blank_at = path.read_bytes().index(b"\n\n") + 1
    assert f"byte {blank_at:,}" in finding.found
    assert sample is not None
    assert sample.first is not None
    assert sample.first.text == '{"q": 0}'


def test_an_input_most_of_whose_lines_are_bad_is_a_problem(tmp_path: Path) -> None:
    finding, sample = check_input(write_lines(tmp_path / "in", "id,text", "1,a", "2,b"), LIMIT)
    assert finding.status == "problem"
    assert "the first line" in finding.found
    assert sample is not None
    assert sample.first is None


def test_an_empty_input_is_a_problem(tmp_path: Path) -> None:
    finding, sample = check_input(write_lines(tmp_path / "in"), LIMIT)
    assert (finding.status, sample) == ("problem", None)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.999])
def test_of_a_large_input_beginning_middle_and_end_are_looked_at(
    place: float, tmp_path: Path
) -> None:
    path = tmp_path / "in"
    lines = [b'{"q": "%s"}\n' % (b"x" * 1000)] * 9000
    broken = {0.1: 3, 0.5: 4510, 0.999: 8998}[place]
    lines[broken] = b"broken\n"
    path.write_bytes(b"".join(lines))
    finding, sample = check_input(path, LIMIT)
    assert finding.status == "warning"
    assert "cannot be used" in finding.found
    assert f"byte {broken * 1010:,}" in finding.found
    assert sample is not None
    assert not sample.is_whole
    assert sample.lines_in_all == pytest.approx(9000, rel=0.02)


def test_a_compressed_input_that_is_not_named_so_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(gzip.compress(b'{"a": 1}\n'))
    finding, sample = check_input(path, LIMIT)
    assert (finding.status, sample) == ("problem", None)
    assert "gzip" in finding.found
    assert ".gz" in finding.fix


def test_the_beginning_of_a_compressed_input_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    line = json.dumps({"word": "x" * 100}).encode() + b"\n"
    path.write_bytes(gzip.compress(line * 200 + b"broken\n"))
    finding, sample = check_input(path, LIMIT)
    assert finding.status == "warning"
    assert "(gzip), 201 lines" in finding.found
    assert sample is not None
    assert sample.first is not None
    assert sample.copied_bytes == len(line) * 200 + 7
    assert list(tmp_path.iterdir()) == [path]


def test_lines_that_are_estimated_are_not_said_to_be_counted(tmp_path: Path) -> None:
    lines = [json.dumps({"q": "x" * (number // 10)}).encode() + b"\n" for number in range(3000)]
    finding, _ = check_input(write_gzip(tmp_path, b"".join(lines)), 1 << 20)
    assert "(gzip), about " in finding.found
    finding, _ = check_input(write_gzip(tmp_path, b"".join(lines[:400])), 1 << 20)
    assert "(gzip), 400 lines" in finding.found


def test_rows_that_a_file_counts_itself_are_told_exactly(tmp_path: Path) -> None:
    rows = [{"q": "x" * (number // 10)} for number in range(3000)]
    for infile in (
        write_parquet(tmp_path / "a.parquet", rows),
        save_data_set(tmp_path / "s", alone=rows),
    ):
        finding, _ = check_input(infile, 1 << 20)
        assert "), 3,000 lines, " in finding.found


def test_standard_input_is_not_looked_at(tmp_path: Path) -> None:
    finding, sample = check_input(Path("-"), LIMIT)
    assert (finding.status, sample) == ("ok", None)
    assert "not looked at" in finding.found


# --- where it writes ------------------------------------------------------------------------


def test_an_output_that_no_run_here_wrote_is_a_problem(tmp_path: Path) -> None:
    out = write_lines(tmp_path / "out", "somebody else's")
    finding = check_output(Places(out, tmp_path / "out.dispatch"))
    assert finding.status == "problem"
    assert "--state" in finding.fix


def test_a_run_that_can_be_gone_on_with_is_recognised(tmp_path: Path) -> None:
    state = tmp_path / "out.dispatch"
    state.mkdir()
    out = write_lines(tmp_path / "out", "{}")
    (state / "run.yaml").write_text("state: running\n")
    assert "goes on" in check_output(Places(out, state)).found
    (state / "run.yaml").write_text("state: complete\n")
    assert "is complete" in check_output(Places(out, state)).found
    (state / "run.yaml").write_text("[")
    with pytest.raises(StateError, match="damaged"):
        check_output(Places(out, state))


def test_an_output_that_is_a_directory_is_a_problem(tmp_path: Path) -> None:
    assert check_output(Places(tmp_path, tmp_path / "s")).status == "problem"


def test_a_directory_that_is_not_there_yet_is_judged_by_the_one_above(tmp_path: Path) -> None:
    found = Places(tmp_path / "a" / "b" / "out", tmp_path / "a" / "b" / "out.dispatch")
    assert found.directories == [tmp_path]


def test_writing_is_tried_for_real(tmp_path: Path) -> None:
    probe = Probe(tmp_path)
    finding = check_writing(probe)
    assert finding.status in ("ok", "warning")
    assert len(probe.sync_s) == 5
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_to_is_a_problem() -> None:
    finding = check_writing(Probe(Path("/proc")))
    assert finding.status == "problem"
    assert "places you may write to" in finding.fix


@pytest.mark.parametrize(("sync_s", "status"), [(0.001, "ok"), (0.3, "warning"), (3.0, "problem")])
def test_a_slow_sync_is_told_of(sync_s: float, status: str) -> None:
    finding = judge_syncs("writing", [sync_s] * 4 + [10 * sync_s])
    assert finding.status == status
    assert f"a sync takes {1000 * sync_s:.1f} ms" in finding.found
    assert f"the slowest of 5: {10_000 * sync_s:.1f} ms" in finding.found


def test_a_lock_is_tried_by_another_process(tmp_path: Path) -> None:
    assert check_locks(tmp_path).status == "ok"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("answers", [["got", "got"], ["held", "held"], ["could not try"] * 2])
def test_locks_that_do_not_hold_are_told_of(
    answers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_tried_by_another", lambda _: answers.pop(0))
    finding = check_locks(tmp_path)
    assert finding.status == "warning"
    assert "claim" in finding.fix


MOUNTS = """\
overlay / overlay rw,relatime 0 0
tmpfs /dev/shm tmpfs rw 0 0
fs1:/home /home nfs4 rw,vers=4.2 0 0
10.0.0.1@tcp:/scratch /scratch lustre rw,flock 0 0
/dev/sda1 /data\\040sets ext4 rw 0 0
old:/x /mnt nfs rw,nolock 0 0
none /odd weirdfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind", "status"),
    [
        ("/somewhere", "overlay", "warning"),
        ("/dev/shm/run", "tmpfs", "warning"),
        ("/home/me", "nfs4", "ok"),
        ("/homes", "overlay", "warning"),
        ("/scratch/run", "lustre", "ok"),
        ("/data sets/run", "ext4", "ok"),
        ("/mnt/run", "nfs", "warning"),
        ("/odd", "weirdfs", "ok"),
    ],
)
def test_the_kind_of_a_file_system_says_what_to_expect(
    path: str, kind: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mount_of(Path(path), MOUNTS)[0] == kind
    monkeypatch.setattr(Path, "resolve", lambda self: self)
    assert check_file_system(Path(path), MOUNTS).status == status


def test_a_mount_that_hides_another_counts() -> None:
    assert mount_of(Path("/a/b"), "x /a ext4 rw 0 0\ny /a nfs rw 0 0\n")[0] == "nfs"
    assert mount_of(Path("/a"), "") == ("", "")


GIB = 1 << 30


@pytest.mark.parametrize(
    ("free", "per_line", "status"),
    [
        (100 * GIB, None, "ok"),
        (30 * GIB, None, "warning"),
        (10 * GIB, None, "problem"),
        (10 * GIB, 1000.0, "ok"),
        (10 * GIB, 20_000.0, "problem"),
    ],
)
def test_the_free_space_is_compared_with_what_the_output_will_take(
    free: int,
    per_line: float | None,
    status: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free))
    sample = Sample(10 * GIB, 1e6, False, None)
    finding = check_space(Places(tmp_path / "out", tmp_path / "state"), sample, per_line)
    assert finding.status == status


def test_what_is_written_already_needs_no_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with out.open("wb") as file:
        file.truncate(20 * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, GIB))
    sample = Sample(10 * GIB, 1e6, False, None)
    assert check_space(Places(out, tmp_path / "state"), sample, None).status == "ok"


def test_a_clock_that_differs_from_the_file_systems_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_clock([Probe(tmp_path, [0.1], 1.0)]).status == "ok"
    assert check_clock([Probe(tmp_path, [0.1], -90.0)]).status == "warning"
    assert "-90 s" in check_clock([Probe(tmp_path, [0.1], -90.0)]).found
    assert check_clock([]).status == "ok"
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    assert check_clock([]).status == "problem"


# --- the task -------------------------------------------------------------------------------


def task_finding(line: dict[str, Any] | str | None, spec: str = FICKLE) -> Finding:
    text = line if isinstance(line, str) else json.dumps(line)
    return check_task(spec, {}, InputLine(0, 1, text) if line is not None else None, 3)


def test_the_first_request_of_a_task_is_shown() -> None:
    finding = task_finding({"q": "what is it?"})
    assert finding.status == "ok"
    assert '"content": "what is it?"' in finding.found
    assert "and 1 more at once" in task_finding({"q": "a", "how": "twice"}).found


def test_a_task_that_raises_for_the_first_line_is_a_problem_with_its_place() -> None:
    finding = task_finding({"no q": 1})
    assert finding.status == "problem"
    assert "KeyError: 'q'" in finding.found
    assert "fickle_tasks.py" in finding.found


def test_a_task_is_only_loaded_where_there_is_no_line() -> None:
    assert task_finding(None).status == "ok"


def test_a_first_line_that_is_no_object_is_a_problem() -> None:
    assert task_finding("[1]").status == "problem"


def test_what_a_task_prints_does_not_get_into_the_json(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text(
        "from dispatcher.taskmanager.task import GeneratorTask\n"
        "print('imported')\n"
        "class Loud(GeneratorTask):\n"
        "    def task_generator(self):\n"
        "        print('asked')\n"
        "        return {}\n"
        "        yield\n"
    )
    infile = write_lines(tmp_path / "in", {"q": 1})
    words = ["-c", "import sys; sys.stderr = open('/dev/null', 'w'); "
             "from dispatcher.doctor.command import main; sys.exit(main())"]  # fmt: skip
    code, output = run_python(
        *words, "--json", "--task", f"{tmp_path / 'loud.py'}:Loud", "--input", infile
    )
    assert code == 0
    assert "answers without a model" in of(json.loads(output), "task")["found"]


# --- model servers --------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    monkeypatch.setenv("MY_KEY", "sesame")
    with scripted() as script:
        script.replies = [(200, b'{"object": "list", "data": [{"id": "small"}, {"id": "big"}]}')]
        yield script


def model_finding(server: Script, model: str = "big") -> dict[str, Any]:
    url = f"http://{server.address}/v1"
    _, report = doctor(
        *("--backend", "openai", "--base-url", url, "--model", model, "--api-key-env", "MY_KEY")
    )
    return of(report, "model server")


def test_a_server_that_has_the_model_and_takes_the_key_is_fine(server: Script) -> None:
    server.wants = "sesame"
    found = model_finding(server)
    assert found["status"] == "ok"
    assert "small, big" in found["found"]
    assert "MY_KEY" in found["found"]
    assert "sesame" not in str(found)
    assert server.calls[0][:2] == ("GET", "/v1/models")


def test_a_model_that_is_not_served_is_a_problem_that_names_those_that_are(server: Script) -> None:
    found = model_finding(server, "huge")
    assert found["status"] == "problem"
    assert "serves small, big, not huge" in found["found"]


def test_a_key_that_is_refused_is_a_problem_that_names_the_variable(server: Script) -> None:
    server.wants = "another"
    found = model_finding(server)
    assert found["status"] == "problem"
    assert "MY_KEY" in found["fix"]


@pytest.mark.parametrize("reply", [(404, b"{}"), (200, b"<html>"), (200, b'{"data": [1]}')])
def test_a_server_that_lists_no_models_is_a_warning(
    reply: tuple[int, bytes], server: Script
) -> None:
    server.replies = [reply]
    assert model_finding(server)["status"] == "warning"


def test_a_server_that_does_not_answer_is_a_problem() -> None:
    with scripted() as script:
        address = script.address
    _, report = doctor("--no-launch", "--port", address.rpartition(":")[2])
    assert of(report, "model server")["status"] == "problem"
    assert "no answer" in of(report, "model server")["found"]


def look_for(model: str, **environ: str) -> Finding:
    return models._look_for_model("m", model, environ)


def test_a_model_is_looked_for_where_the_engine_will(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    (hub / "models--org--here" / "snapshots" / "abc").mkdir(parents=True)
    environ = {"HF_HUB_CACHE": str(hub)}
    assert look_for("org/here", **environ).status == "ok"
    assert look_for("org/gone", **environ).status == "warning"
    offline = {**environ, "HF_HUB_OFFLINE": "1"}
    assert look_for("org/gone", **offline).status == "problem"
    assert look_for("./gone", **environ).status == "problem"
    directory = tmp_path / "model"
    directory.mkdir()
    assert look_for(str(directory), **environ).status == "problem"
    (directory / "config.json").write_text("{}")
    assert look_for(str(directory), **environ).status == "ok"


def test_an_engine_that_is_not_installed_is_a_problem() -> None:
    _, report = doctor("--model", "org/model", "--vllm-command", "/nowhere/vllm serve")
    assert of(report, "model server")["status"] == "problem"
    assert "--vllm-command" in of(report, "model server")["fix"]


# --- the dispatcher server ------------------------------------------------------------------


def test_a_server_that_a_worker_would_reach_says_how_its_run_is(tmp_path: Path) -> None:
    infile = write_lines(tmp_path / "in", *({"q": n} for n in range(5)))
    with dispatcher_server("--infile", infile, "--outfile", tmp_path / "out") as server:
        code, report = doctor("--dispatcher", server.at)
        assert code == 0
        assert "running, 0 of" in of(report, "dispatcher server")["found"]

        wrong = tmp_path / "token"
        wrong.write_text("x" * 40)
        wrong.chmod(0o600)
        code, report = doctor("--dispatcher", server.address, "--token-file", wrong)
        assert code == 1
        assert "token" in of(report, "dispatcher server")["found"]


def test_a_server_that_is_away_is_a_problem() -> None:
    with scripted() as script:
        address = script.address
    code, report = doctor("--dispatcher", address)
    assert code == 1
    assert "no answer" in of(report, "dispatcher server")["found"]


# --- the machine ----------------------------------------------------------------------------


def test_gpus_are_counted_against_what_the_engines_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_gpu_names", lambda: ["H100, 80 GiB"] * 2)
    assert machine.check_gpus({}, 2).status == "ok"
    assert "2 x H100, 80 GiB" in machine.check_gpus({}, 2).found
    assert machine.check_gpus({}, 3).status == "problem"
    assert machine.check_gpus({"CUDA_VISIBLE_DEVICES": "1"}, 2).status == "problem"
    monkeypatch.setattr(machine, "_gpu_names", list)
    assert machine.check_gpus({}, 0).status == "ok"
    assert machine.check_gpus({}, 1).status == "warning"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.check_versions().status == "ok"
    monkeypatch.setattr(machine, "_NEEDED", ("aiohttp", "no-such-package"))
    finding = machine.check_versions()
    assert finding.status == "problem"
    assert "pip install no-such-package" in finding.fix


def test_a_low_limit_of_open_files_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (256, 1024))
    assert machine.check_open_files().status == "warning"
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (1024, 1 << 20))
    assert machine.check_open_files().status == "ok"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * GIB, "3.0 GiB"), (1 << 41, "2.0 TiB")],
)
def test_sizes_are_shown_for_people(size: int, text: str) -> None:
    assert size_text(size) == text
