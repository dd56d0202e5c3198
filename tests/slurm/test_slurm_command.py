"""`dispatcher slurm` against commands that play Slurm's: what it submits, tells, ends, refuses."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from dispatcher.slurm import cli, commands
from dispatcher.slurm.cli import main
from dispatcher.slurm.jobs import Job, Submission, parse_job_id, parse_squeue, to_remove, to_stop
from dispatcher.slurm.settings import RUN, SERVER, WORKERS
from dispatcher.slurm.show import ids_text, table_text
from dispatcher.storage.files import Files
from tests.support.processes import ROOT, dispatcher_server

FAKE = Path(__file__).with_name("fake_slurm.py")
COMMANDS = ("sbatch", "squeue", "scancel", "sacct")
SETTINGS = (
    *("TASK", "INPUT", "INPUT_SUBSET", "INPUT_SPLIT", "OUTPUT", "STATE", "MODEL", "BACKEND"),
    *("CONFIG", "VENV", "CONTAINER"),
)


@dataclass
class Fake:
    """The commands' directory, and what a test makes of the jobs in it."""

    directory: Path
    bin: Path

    def calls(self, name: str) -> list[list[str]]:
        path = self.directory / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call[1:] for call in map(json.loads, lines) if call[0] == name]

    def change(self, *ids: str, **fields: Any) -> None:
        path = self.directory / "jobs.json"
        jobs = json.loads(path.read_text())
        for job in jobs:
            if not ids or job["id"] in ids:
                job.update(fields)
        path.write_text(json.dumps(jobs))

    def states(self) -> dict[str, str]:
        jobs = json.loads((self.directory / "jobs.json").read_text())
        return {job["id"]: job["state"] for job in jobs}

    def refuse(self, name: str, words: str) -> None:
        (self.directory / f"{name}.refuses").write_text(words)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put the commands on PATH, and nothing else; work in a directory with an input and a task."""
    for name in ("fake", "bin", "work"):
        (tmp_path / name).mkdir()
    for name in COMMANDS:
        script = tmp_path / "bin" / name
        script.write_text(f"#!{sys.executable}\n" + FAKE.read_text().split("\n", 1)[1])
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path / "fake"))
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cli, "_POLL_S", 0.01)
    monkeypatch.chdir(tmp_path / "work")
    Path("in.jsonl").write_text('{"n": 1}\n')
    Path("my_tasks.py").write_text("")
    return Fake(tmp_path / "fake", tmp_path / "bin")


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs the command, which must succeed, and returns what it printed."""

    def call(*words: str | Path) -> str:
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert (code, err) == (0, ""), err
        return out

    return call


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs the command, which must fail with one sentence."""

    def call(*words: str | Path) -> tuple[int, str]:
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        assert out.count("\n") <= 1
        assert err.startswith("dispatcher slurm")
        assert err.count("\n") == 1
        return code, err

    return call


def test_a_name_that_no_run_can_have_is_refused(refused: Any) -> None:
    for command in (["status"], ["stop"], ["add-workers", "2"]):
        assert refused(command[0], "x" * 300, *command[1:])[0] == 2
        assert refused(command[0], "", *command[1:])[0] == 2


FILES = ("--infile", "in.jsonl", "--outfile", "out.jsonl", "--task", "my_tasks.py:MyTask")
STATE = Path("out.jsonl.dispatch")


def script(name: str) -> str:
    return (STATE / "slurm" / f"{name}.sbatch").read_text()


def submitted() -> list[dict[str, Any]]:
    lines = (STATE / "slurm" / "jobs.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# -------------------------------------------------------------------- submitting


def test_a_run_is_written_submitted_and_noted(fake: Fake, said: Any) -> None:
    text = said("run", *FILES, "--model", "org/model", "--nodes", "4")
    path = (STATE / "slurm" / "run.sbatch").absolute()
    assert fake.calls("sbatch") == [["--parsable", str(path)]]
    here = Path.cwd()
    lines = script("run").splitlines()
    for line in (
        "#SBATCH --nodes=4",
        f"#SBATCH --chdir={here}",
        f"DISPATCHER_SLURM_DIR={ROOT / 'slurm'} # the other scripts",
    ):
        assert line in lines
    for setting in (
        f"INPUT={here}/in.jsonl",
        f"OUTPUT={here}/out.jsonl",
        f"STATE={here}/out.jsonl.dispatch",
        f"TASK={here}/my_tasks.py:MyTask",
        "MODEL=org/model",
    ):
        assert any(line.startswith(f"{setting} ") for line in lines), setting
    assert f"VENV={sys.prefix}" in script("run")
    (noted,) = submitted()
    assert (noted["job"], noted["role"], noted["script"]) == ("11", "run", str(path))
    assert f"submitted job 11: the run, log {here}/dispatcher-11.log" in text
    assert f"dispatcher slurm stop {here}/out.jsonl" in text


def test_server_and_workers_are_submitted_in_this_order(fake: Fake, said: Any) -> None:
    text = said("start", *FILES, "--worker-jobs", "3")
    directory = (STATE / "slurm").absolute()
    assert fake.calls("sbatch") == [
        ["--parsable", f"{directory}/server.sbatch"],
        ["--parsable", "--array=1-3", f"{directory}/workers.sbatch"],
    ]
    assert [(job["job"], job["role"], job.get("count", 1)) for job in submitted()] == [
        ("11", "server", 1),
        ("12", "workers", 3),
    ]
    assert "submitted job 12: 3 worker jobs, log" in text


def test_a_model_or_image_that_is_a_path_is_named_by_it(fake: Fake, said: Any) -> None:
    Path("org/model").mkdir(parents=True)
    said("run", *FILES, "--model", "org/model", "--container", "docker://org/image")
    assert f"\nMODEL={Path.cwd()}/org/model " in script("run")
    assert "export CONTAINER=docker://org/image " in script("run")


def test_a_dry_run_prints_the_scripts_and_changes_nothing(
    tmp_path: Path, fake: Fake, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # it needs no Slurm
    before = sorted(tmp_path.rglob("*"))
    text = said("start", *FILES, "--dry-run")
    assert sorted(tmp_path.rglob("*")) == before
    directory = (STATE / "slurm").absolute()
    first, second = text.split("# ==== ")[1:]
    assert first.startswith(f"sbatch --parsable {directory}/server.sbatch\n#!/usr/bin/env bash\n")
    assert second.startswith(f"sbatch --parsable --array=1-1 {directory}/workers.sbatch\n#!")

    monkeypatch.setenv("PATH", str(fake.bin))
    said("start", *FILES)
    assert first.split("\n", 1)[1] == script("server")
    assert second.split("\n", 1)[1] == script("workers")


def test_a_part_of_a_data_set_is_named_by_flag_yaml_or_environment_and_gone_on_with(
    fake: Fake, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("run.yaml").write_text("infile: hf:org/name\ninput_split: validation\n")
    monkeypatch.setenv("INPUT_SUBSET", "en")
    monkeypatch.setenv("INPUT_SPLIT", "train")
    said("run", "--config", "run.yaml", *FILES[2:])
    given = ("INPUT=hf:org/name ", "INPUT_SUBSET=en ", "INPUT_SPLIT=validation ")
    assert all(f"\n{setting}" in script("run") for setting in given)
    fake.change("11", state="CANCELLED")
    monkeypatch.delenv("INPUT_SUBSET")
    said("run", "--resume", STATE)
    assert all(f"\n{setting}" in script("run") for setting in given)


@pytest.mark.parametrize("words", [("--infile", "in.jsonl"), ()])
def test_a_part_of_what_is_no_data_set_is_refused_before_a_job_waits(
    words: tuple[str, ...], fake: Fake, refused: Any
) -> None:
    code, text = refused("run", *words, "--task", "my_tasks.py:MyTask", "--input-split", "test")
    assert code == 2
    assert "--input-split goes with a data set" in text
    assert fake.calls("sbatch") == []


@pytest.mark.parametrize(
    ("name", "value"), [("WORK_TIMEOUT", "inf"), ("MAX_RETRIES", "few"), ("BACKEND", "vlm")]
)
def test_a_variable_has_the_bounds_of_its_option(
    name: str, value: str, fake: Fake, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    code, text = refused("run", *FILES)
    assert code == 2
    assert f"the variable {name}" in text
    assert value in text
    assert fake.calls("sbatch") == []


def test_flags_win_over_yaml_and_yaml_over_the_environment(
    fake: Fake, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {"model": "of/yaml", "backend": "fake", "max_retries": 7, "sbatch-arg": ["--mem=0"]}
    # As people write it, without quotes.
    Path("run.yaml").write_text(yaml.safe_dump(content) + "time: 12:00:00\n")
    monkeypatch.setenv("MODEL", "of/environment")
    monkeypatch.setenv("CONTAINER", "/images/of environment.sif")
    said("run", *FILES, "--config", "run.yaml", "--max-retries", "8")
    text = script("run")
    assert "\nMODEL=of/yaml " in text
    assert "\nBACKEND=fake " in text
    assert "\nMAX_RETRIES=8 " in text
    assert "CONTAINER='/images/of environment.sif' MODULES='' VENV=''" in text
    assert "\n#SBATCH --time=12:00:00\n" in text
    assert "\n#SBATCH --mem=0\n" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("modle: org/model\n", "unknown option 'modle'"),
        ("worker_jobs: 2\n", "unknown option 'worker_jobs'"),  # of start
        ("modules: [cuda]\n", "modules needs a value"),
        ("backend: vlm\n", "must be one of vllm"),
        ("- a\n", "must hold `option: value` lines"),
    ],
)
def test_a_wrong_file_is_told(fake: Fake, refused: Any, content: str, words: str) -> None:
    Path("run.yaml").write_text(content)
    code, text = refused("run", *FILES, "--config", "run.yaml")
    assert code == 2
    assert "--config run.yaml" in text
    assert words in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--infile", "nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
        (["--infile", "hf:./nowhere"], "nowhere: there is no such file"),
        (["--infile", "-"], "a job has no standard input"),
        (["--task", "nowhere.py:Task"], "nowhere.py:Task: there is no file"),
        (["--outfile", "nowhere/out.jsonl"], "there is no directory"),
        (["--worker-config", "nowhere.yaml"], "--worker-config"),
        (["--worker-args", "--task-arg 'a"], "--worker-args has a quote that is not closed"),
        (["--workers", "many"], "'many' is not a whole number"),
        (["--tensor-parallel", "0"], "--tensor-parallel: 0 is out of range"),
        (["--env", "=x"], "--env =x: give NAME=VALUE"),
        (["--sbatch-arg=mem=0"], "--sbatch-arg mem=0: give an option of sbatch"),
        (["--sbatch-arg=--array=1-4"], "--worker-jobs and add-workers say how many"),
        (["--partition", "a\n#b"], "it is more than one line"),
        (["--state", "in.jsonl"], "in.jsonl is a file, but the state of a run is a directory"),
        (["--resume", "nowhere"], "nothing was submitted for it"),
    ],
)
def test_what_cannot_be_right_is_told_before_a_job_waits(
    fake: Fake, refused: Any, flags: list[str], words: str
) -> None:
    code, text = refused("run", *FILES, *flags)
    assert code == 2
    assert words in text
    assert fake.calls("sbatch") == []


def test_an_installed_package_has_no_examples_to_fall_back_on(
    fake: Fake, refused: Any, said: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site-packages" / "dispatcher" / "slurm" / "scripts"
    installed.mkdir(parents=True)
    for path in (ROOT / "slurm").iterdir():
        (installed / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(cli, "_scripts_dir", lambda: installed)
    assert "give --infile: its default is an example" in refused("run")[1]
    assert "give --task: its default is an example" in refused("run", "--infile", "in.jsonl")[1]
    Path("worker.yaml").write_text("")
    said("run", "--infile", "in.jsonl", "--worker-config", "worker.yaml")
    assert (
        f"\nDISPATCHER_SLURM_DIR={installed} #"
        in Path("output-slurm.jsonl.dispatch/slurm/run.sbatch").read_text()
    )


def test_a_run_has_one_server(fake: Fake, said: Any, refused: Any) -> None:
    said("start", *FILES)
    for state in ("PENDING", "RUNNING", "COMPLETING"):
        fake.change("11", state=state)
        for command in ("start", "run"):
            code, text = refused(command, *FILES)
            assert code == 1
            assert f"has job 11 (server), which is {state}; look at it with" in text
            assert "dispatcher slurm stop" in text
    fake.change("11", state="FAILED")
    assert "worker jobs from before go on beside them: 12_1\n" in said("start", *FILES)
    assert [job["job"] for job in submitted()] == ["11", "12", "13", "14"]


def test_a_job_of_the_same_number_from_another_script_is_none_of_the_runs(
    fake: Fake, said: Any
) -> None:
    said("start", *FILES)
    fake.change(state="RUNNING", command="/somebody/elses.sh")
    assert "no job of the run is waiting or running" in said("stop", "out.jsonl")
    assert fake.calls("scancel") == []


def test_a_complete_run_is_not_submitted_again(fake: Fake, said: Any) -> None:
    STATE.mkdir()
    run = {"run": "r", "state": "complete", "settings": {"output": "out.jsonl"}}
    (STATE / "run.yaml").write_text(yaml.safe_dump(run))
    assert "is complete: out.jsonl; nothing was submitted" in said("start", *FILES)
    assert fake.calls("sbatch") == []


def test_a_run_without_workers_has_its_server_first(fake: Fake, said: Any) -> None:
    said("start", *FILES, "--worker-jobs", "0")
    assert len(fake.calls("sbatch")) == 1
    said("add-workers", "out.jsonl", "2")
    assert fake.calls("sbatch")[1][1] == "--array=1-2"


def test_a_resumed_run_is_what_it_was(
    fake: Fake, said: Any, refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKEND", "fake")
    said("start", *FILES, "--worker-jobs", "3", "--sbatch-arg=--mem=0", "--env", "HF_HOME=/hf")
    before = script("server"), script("workers")
    said("stop", "out.jsonl")
    state_dir = STATE.absolute()
    code, text = refused("run", "--resume", state_dir)
    assert code == 2
    assert f"go on with: dispatcher slurm start --resume {state_dir}" in text

    monkeypatch.setenv("BACKEND", "vllm")
    monkeypatch.setenv("MODEL", "another")
    monkeypatch.chdir(tmp_path)
    said("start", "--resume", state_dir)
    monkeypatch.chdir(state_dir.parent)
    assert (script("server"), script("workers")) == before
    assert fake.calls("sbatch")[-1][1] == "--array=1-3"
    said("stop", "out.jsonl")
    said("start", "--resume", "out.jsonl", "--worker-jobs", "1", "--max-retries", "9")
    assert fake.calls("sbatch")[-1][1] == "--array=1-1"
    assert "\nMAX_RETRIES=9 " in script("server")


@pytest.mark.parametrize("other", ["", "--max-failures 5%"])
def test_a_resumed_run_accepts_no_failures_and_lifts_no_pause_that_it_was_not_told_of(
    fake: Fake, said: Any, other: str
) -> None:
    words = f"{other} --accept-failures --unpause".strip()
    said("start", *FILES, f"--server-args={words}")
    assert f"\nSERVER_ARGS='{words}' " in script("server")
    said("stop", "out.jsonl")
    said("start", "--resume", "out.jsonl")
    assert f"\nSERVER_ARGS='{other}' " in script("server")


# -------------------------------------------------------------------- when Slurm refuses


def test_a_missing_command_is_told(
    fake: Fake, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    code, text = refused("run", *FILES)
    assert code == 1
    assert "there is no `sbatch` on PATH; call this where Slurm's commands are" in text


def test_a_refusal_of_sbatch_is_told_and_noted_nowhere(fake: Fake, refused: Any) -> None:
    fake.refuse("sbatch", "sbatch: error: Batch job submission failed: Invalid account\n")
    code, text = refused("run", *FILES)
    assert code == 1
    assert "sbatch refused: sbatch: error: Batch job submission failed: Invalid account" in text
    assert not (STATE / "slurm" / "jobs.jsonl").exists()


def test_a_server_is_cancelled_when_its_workers_are_refused(
    fake: Fake, refused: Any, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = commands.submit

    def submit_and_break(*args: Any) -> Submission:
        done = submit(*args)
        fake.refuse("sbatch", "Invalid generic resource (gres) specification")
        return done

    monkeypatch.setattr(commands, "submit", submit_and_break)
    code, text = refused("start", *FILES)
    assert code == 1
    assert "Invalid generic resource" in text
    assert "; job 11 was cancelled" in text
    assert fake.calls("scancel") == [["--quiet", "11"]]
    (fake.directory / "sbatch.refuses").unlink()
    monkeypatch.setattr(commands, "submit", submit)
    said("start", *FILES)


def test_a_job_that_cannot_be_noted_is_cancelled(
    fake: Fake, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole = Files.write_whole

    def write_no_jobs(self: Files, path: Path, *args: Any) -> None:
        if path.name == "jobs.jsonl":
            raise OSError(28, os.strerror(28))
        write_whole(self, path, *args)

    monkeypatch.setattr(Files, "write_whole", write_no_jobs)
    code, text = refused("run", *FILES)
    assert code == 1
    assert "jobs.jsonl: No space left on device; job 11 was cancelled" in text
    assert fake.states() == {"11": "CANCELLED"}


def test_a_controller_that_does_not_answer_is_told(fake: Fake, said: Any, refused: Any) -> None:
    said("start", *FILES)
    fake.refuse("squeue", "slurm_load_jobs error: Unable to contact slurm controller")
    for command in (["status", "out.jsonl"], ["stop", "out.jsonl"], ["start", *FILES]):
        code, text = refused(*command)
        assert code == 1
        assert "squeue refused: slurm_load_jobs error: Unable to contact slurm controller" in text
    assert len(fake.calls("sbatch")) == 2


@pytest.mark.parametrize("command", ["status", "add-workers", "remove-workers", "stop"])
def test_an_output_without_jobs_is_told(fake: Fake, refused: Any, command: str) -> None:
    count = ["2"] if command.endswith("-workers") else []
    code, text = refused(command, "out.jsonl", *count)
    assert code == 2
    assert "out.jsonl has no jobs: nothing was submitted for it" in text


# -------------------------------------------------------------------- status


def test_status_shows_the_jobs_and_how_far_the_run_is(fake: Fake, said: Any) -> None:
    said("start", *FILES, "--worker-jobs", "5")
    assert "not begun: no server has started yet" in said("status", "out.jsonl")
    fake.change("11", state="RUNNING", elapsed="1:02:03", left="22:57:57", node="n1", restarts=2)
    fake.change("12_1", state="RUNNING", elapsed="5:00", left="3:55:00", node="n2")
    fake.change("11", "12_1", reason="None")
    with dispatcher_server(
        "--infile", Path("in.jsonl").absolute(), "--outfile", STATE.parent.absolute() / "out.jsonl"
    ) as server:
        text = said("status", STATE)
        assert f"process {server.process.pid} on" in text
        assert "\n  done      0 lines; how many there are is not known yet" in text
    assert [line.split() for line in text.split("\n\n")[1].splitlines()] == [
        ["JOB", "ROLE", "STATE", "NODE", "ELAPSED", "LEFT", "RESTARTS", "REASON"],
        ["11", "server", "RUNNING", "n1", "1:02:03", "22:57:57", "2"],
        ["12_1", "workers", "RUNNING", "n2", "5:00", "3:55:00", "0"],
        ["12_[2-5]", "workers", "PENDING", "0", "Priority"],
    ]
    assert "--resume" not in text


def test_status_tells_of_jobs_that_are_over_and_of_those_that_slurm_forgot(
    fake: Fake, said: Any
) -> None:
    said("start", *FILES, "--worker-jobs", "2")
    fake.change("11", state="FAILED", reason="NonZeroExitCode", node="n1")
    fake.change("12_1", "12_2", state="CANCELLED", forgotten=True)
    text = said("status", "out.jsonl")
    assert "NonZeroExitCode" in text
    assert "12_[1-2]  workers  CANCELLED" in text  # sacct knows them
    assert "exit code 3" in text
    assert "n9" not in text  # a step's
    assert "no job of the run is waiting or running" in text
    assert f"go on with: dispatcher slurm start --resume {STATE.absolute()}" in text

    fake.refuse("sacct", "Slurm accounting storage is disabled")
    text = said("status", "out.jsonl")
    assert "12 (workers, 2 jobs, submitted 20" in text
    assert "is over: Slurm no longer knows it" in text


# -------------------------------------------------------------------- workers come and go


def test_workers_are_added_with_the_script_of_the_others(
    fake: Fake, said: Any, refused: Any
) -> None:
    said("start", *FILES, "--worker-jobs", "2")
    text = said("add-workers", "out.jsonl", "4", "--sbatch-arg=--partition=preempt")
    path = (STATE / "slurm" / "workers.sbatch").absolute()
    command = ["--parsable", "--partition=preempt", "--array=1-4", str(path)]
    assert fake.calls("sbatch")[-1] == command
    assert "submitted job 13: 4 worker jobs" in text
    assert submitted()[-1]["count"] == 4

    fake.change("11", state="COMPLETED")
    code, text = refused("add-workers", "out.jsonl", "4")
    assert code == 1
    assert (
        "has no server job that is waiting or running; go on with: dispatcher slurm start" in text
    )


def test_a_run_of_one_job_takes_no_more_workers(fake: Fake, said: Any, refused: Any) -> None:
    said("run", *FILES)
    code, text = refused("add-workers", "out.jsonl", "1")
    assert code == 1
    assert "was submitted as one job" in text


def test_workers_that_wait_are_removed_first_then_the_youngest(
    fake: Fake, said: Any, refused: Any
) -> None:
    said("start", *FILES, "--worker-jobs", "5")
    fake.change("11", "12_1", "12_2", "12_3", state="RUNNING", elapsed="1:00:00")
    fake.change("12_2", elapsed="59:59")
    text = said("remove-workers", "out.jsonl", "3")
    assert fake.calls("scancel") == [["--quiet", "12_5", "12_4", "12_2"]]
    assert "cancelled before they ran: 12_[4-5]" in text
    assert "ending, giving back what they have begun: 12_2" in text
    text = said("remove-workers", "out.jsonl", "9")
    assert "there were no more than 2" in text
    assert fake.states()["11"] == "RUNNING"
    code, text = refused("remove-workers", "out.jsonl", "1")
    assert code == 1
    assert "has no worker job to remove" in text


def test_the_youngest_is_told_by_its_time_and_then_by_its_number() -> None:
    times = {"9_1": "1-00:00:00", "9_2": "3:00", "9_3": "0:59", "10_1": "3:00", "10_2": "INVALID"}
    jobs = [Job(name, WORKERS, "RUNNING", elapsed) for name, elapsed in times.items()]
    jobs += [Job("8", SERVER, "RUNNING", "0:01"), Job("10_3", WORKERS, "COMPLETING", "0:01")]
    order = [job.id for job in to_remove(jobs, 99)]
    assert order == ["10_2", "9_3", "10_1", "9_2", "9_1"]


# -------------------------------------------------------------------- stop


def test_stop_ends_the_workers_before_the_server(fake: Fake, said: Any) -> None:
    said("start", *FILES, "--worker-jobs", "3")
    fake.change("11", "12_1", "12_2", state="RUNNING")
    text = said("stop", "out.jsonl")
    assert fake.calls("scancel") == [
        ["--quiet", "12_3", "12_1", "12_2"],
        ["--quiet", "--batch", "--signal=INT", "11"],
    ]
    assert "ending 11, 12_[1-3]" in text
    assert f"go on with: dispatcher slurm start --resume {STATE.absolute()}" in text
    assert "no job of the run is waiting or running" in said("stop", "out.jsonl")


def test_stop_of_a_run_in_one_job_lets_its_script_end_it(fake: Fake, said: Any) -> None:
    said("run", *FILES)
    fake.change(state="RUNNING")
    said("stop", "out.jsonl")
    assert fake.calls("scancel") == [["--quiet", "--batch", "--signal=INT", "11"]]


def test_stop_tells_of_jobs_that_do_not_end(fake: Fake, said: Any, refused: Any) -> None:
    said("start", *FILES)
    fake.change(state="RUNNING")
    fake.refuse("scancel", "scancel: error: Kill job error on job id 12: Unexpected message")
    code, text = refused("stop", "out.jsonl", "--timeout", "3")
    assert code == 1
    assert "11, 12_1 did not end within 3 s" in text
    assert "Unexpected message" in text
    assert len(fake.calls("scancel")) > 1  # it is tried again


def test_a_job_that_is_requeued_while_it_is_stopped_is_cancelled() -> None:
    server, worker = Job("1", SERVER, "RUNNING"), Job("2_1", WORKERS, "RUNNING")
    told: set[str] = set()
    assert to_stop([server, worker], told) == ([worker], [])
    told.add("2_1")
    assert to_stop([server, worker], told) == ([], [])
    requeued = Job("2_1", WORKERS, "PENDING")
    assert to_stop([server, requeued], told) == ([requeued], [])
    over = Job("2_1", WORKERS, "CANCELLED")
    assert to_stop([server, over], told) == ([], [server])
    told.add("1")
    assert to_stop([server, over], told) == ([], [])
    preempted = Job("1", SERVER, "PENDING")
    assert to_stop([preempted, over], told) == ([preempted], [])
    ending = Job("1", RUN, "COMPLETING")
    assert to_stop([ending], set()) == ([], [])


# -------------------------------------------------------------------- reading and showing


@pytest.mark.parametrize(
    ("text", "expected"),
    [("12\n", ("12", None)), ("12;east\n", ("12", "east")), ("a note\n12\n", ("12", None))],
)
def test_the_number_of_a_job_is_what_sbatch_says_last(text: str, expected: object) -> None:
    assert parse_job_id(text) == expected
    for nothing in ("", "Submitted batch job\n"):
        with pytest.raises(ValueError):  # noqa: PT011
            parse_job_id(nothing)


def test_the_cluster_that_sbatch_names_is_asked(fake: Fake, said: Any) -> None:
    (fake.directory / "cluster").write_text("east")
    said("run", *FILES, "--sbatch-arg=--clusters=east,west")
    said("stop", "out.jsonl")
    assert all("--clusters=east" in call for call in fake.calls("squeue")[1:])
    assert fake.calls("scancel") == [["--clusters=east", "--quiet", "11"]]


def test_what_squeue_says_is_read_whatever_a_path_holds() -> None:
    submission = Submission("12", WORKERS, "/a|b c/workers.sbatch", "now")
    line = "12_3|RUNNING|1-02:03:04|2:00|None|n[1-2]|/a|b c/workers.sbatch\n"
    others = "CLUSTER: east\n13|RUNNING|0:01|1:00|None|n1|/a|b c/workers.sbatch\n\n"
    (job,) = parse_squeue(others + line, [submission])
    assert (job.id, job.array, job.element, job.node, job.reason) == ("12_3", "12", 3, "n[1-2]", "")
    assert job.elapsed_s == ((24 + 2) * 60 + 3) * 60 + 4


def test_elements_that_wait_alike_take_one_line() -> None:
    jobs = [Job(f"7_{n}", WORKERS, "PENDING", "0:00", "4:00:00", "Resources") for n in (1, 2, 3, 7)]
    jobs.append(Job("7_9", WORKERS, "PENDING", reason="JobHeldUser"))
    lines = table_text(jobs).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["7_[1-3,7]", "7_9"]
    assert "4:00:00" not in lines[1]
    assert ids_text([*jobs, Job("3", SERVER, "RUNNING")]) == "3, 7_[1-3,7,9]"


def test_every_command_has_help_and_every_option_its_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for command in ("run", "start", "status", "add-workers", "remove-workers", "stop"):
        assert f"\n  {command} " in overview
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        options = capsys.readouterr().out.split("\n  -")[1:]
        without = [text for text in options if "default:" not in text]
        assert [text.split()[0] for text in without if not text.startswith(("h", "-config"))] == []
    assert main([]) == 2
    assert main(["begin"]) == 2
    assert "there is no command 'begin'; there are run, start" in capsys.readouterr().err
