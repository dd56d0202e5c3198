"""A directory in which the documentation's commands can be typed: its files, a model, a key."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.docs.blocks import commands_of, yaml_block
from tests.slurm.cluster import free_ports
from tests.support.kinds import write_gzip, write_parquet, write_zstd
from tests.support.processes import ROOT, Process, running, wait_until

LINES = 24
LIMIT_S = 240

# What stands for a user's own, or for a larger machine, and what stands for it here.
REPLACED = {
    "--host 0.0.0.0": "--host 127.0.0.1",
    "--task-managers 8": "--task-managers 2",
    "--ntasks-per-node=8 --gpus-per-node=8": "--ntasks-per-node=2 --gpus-per-node=2",
    "--gpus-per-node 8 --nodes 4 --tasks-per-node 8": "--nodes 2",
    "--gpus-per-node 8 --worker-jobs 16": "--worker-jobs 2",
    "--gpus-per-node 1 --server-partition cpu --worker-jobs 16": "--server-partition cpu",
    "--array=1-16": "--array=1-2",
    "/data/runs": ".",
}

QUICK_START = (
    "dispatcher run --task examples/chat_task.py:ChatTask --input examples/data/prompts.jsonl "
    "--output output.jsonl --backend local --task-arg temperature=0"
)
# What something else runs, and where; the last is the quick start itself.
ELSEWHERE = {
    "bash scripts/quickstart.sh": "tests/test_runs.py",
    "bash scripts/test.sh": ".ci/run",
    QUICK_START: "scripts/quickstart.sh",
    "sbatch slurm/run.sbatch": "tests/slurm/test_run.py",
}

MY_TASKS = """\
from dispatcher.taskmanager.backend.request import Request
from dispatcher.taskmanager.task import GeneratorTask, TaskFailed


class MyTask(GeneratorTask):
    def task_generator(self):
        response = yield Request({"messages": self.data["messages"], "max_tokens": 8})
        if not response.is_success:
            raise TaskFailed(str(response.error), "model_error")
        return {"id": self.data["id"], "answer": response.get_text()}
"""

# Options of `dispatcher run`.
RUN_YAML = """\
task: my_tasks.py:MyTask
input: prompts.jsonl
output: answers.jsonl
model: org/model
"""

# Plays `vllm serve MODEL --host H --port P ...`.
VLLM = f"""\
#!{sys.executable}
import sys
from dispatcher.fakellm import main

_, serve, model, *options = sys.argv
assert serve == "serve"
place = [f"{{name}}={{options[options.index(name) + 1]}}" for name in ("--host", "--port")]
sys.exit(main(["--model", model, "--api-key-env", "VLLM_API_KEY", *place]))
"""

# Plays `apptainer exec OPTIONS IMAGE COMMAND...` where the image is the environment of the tests.
APPTAINER = """\
#!/usr/bin/env bash
while [ "$#" -gt 0 ] && [ "$1" != /images/vllm-openai.sif ]; do shift; done
shift
exec "$@"
"""

_SERVER_FILE = "answers.jsonl.dispatch/server.json"
_WORKER = (
    f"dispatcher-task-run --dispatcher @{_SERVER_FILE} --task my_tasks.py:MyTask --model org/model"
)
_SERVER = "dispatcher-server --infile prompts.jsonl --outfile answers.jsonl"
_UNTIL_IT_SERVES = f"for _ in $(seq 300); do [ ! -s {_SERVER_FILE} ] || break; sleep 0.1; done"
_WATCHES = re.compile("dispatcher watch ")
_TELLS = re.compile("dispatcher (pause|unpause|set|drain) ")
_MAKES_ANSWERS = re.compile(r"(?:--output |--outfile |OUTPUT=)answers\.jsonl|^dispatcher-task-run")


@dataclass
class Stage:
    """`type` types a block's commands in `directory`."""

    directory: Path
    environ: dict[str, str]

    def type(self, text: str) -> str:
        """Type commands, one after the other; return what they wrote.

        Who else must be there for a command, is: a run that was stopped, a server, a worker. All
        must end well; a server, which runs as in a terminal of its own, when its run is complete.
        """
        commands = [re.split(r"\s+# ", command)[0] for command in commands_of(text)]
        commands = [each for each in commands if not each.startswith(tuple(ELSEWHERE))]
        has_run = "answers.jsonl" in text and not any(map(_MAKES_ANSWERS.search, commands))
        is_told = any(map(_TELLS.match, commands))
        if has_run and not is_told and not re.search("slurm|dispatcher watch", text):
            self.leave_run(
                is_complete=bool(re.search("--failed-to|dispatcher export", text)),
                has_failures="--failed-to" in text,
                is_served="dispatcher-server" in text,
            )
        ports = dict(zip(("8000", "8001"), map(str, free_ports(2)), strict=True))
        with ExitStack() as others:
            is_served = any(each.startswith("dispatcher-server ") for each in commands)
            is_watched = any(map(_WATCHES.match, commands))
            if not is_served and (is_watched or any("--dispatcher " in each for each in commands)):
                options = ["--no-auth", "--port", ports["8000"]]
                others.enter_context(self.process(*_SERVER.split(), *options))
                wait_until(self._serves, "a server", 30)
            elif is_told:
                others.enter_context(self.process(*_SERVER.split(), "--port", "0"))
                wait_until(self._serves, "a server", 30)
            if is_watched:
                others.enter_context(self.process(*_WORKER.split()))
            if "--no-launch" in text:
                fake = [sys.executable, "-m", "dispatcher.fakellm", "--model", "org/model"]
                model = others.enter_context(self.process(*fake, "--port", ports["8001"]))
                model.wait_for_line(re.compile("fakellm ready"))
            if is_served and not any(each.startswith("dispatcher-task-run") for each in commands):
                commands.append(_WORKER)
            with self.process("bash", "-c", "\n".join(_script(commands, ports))) as shell:
                code = shell.wait(LIMIT_S)
        # 4: the model's answers did not pass the task's own checks, everywhere.
        assert code in (0, 4), f"{code}\n{shell.output}"
        return shell.output

    def leave_run(
        self, *, is_complete: bool = False, has_failures: bool = False, is_served: bool = False
    ) -> None:
        """Have a run over the prompts, stopped halfway, or complete, with lines that failed or not.

        It was begun by `dispatcher run`, or by a server and a worker apart.
        """
        share = 0.2 if has_failures else 0
        (self.directory / "faults.yaml").write_text(f"- {{share: {share}, status: 400}}\n")
        fake = "--task my_tasks.py:MyTask --backend fake --workers 2 "
        fake += "--fakellm-args='--rules faults.yaml --latency-s 0.1'"
        whole = f"exec dispatcher run --input prompts.jsonl --output answers.jsonl {fake}"
        worker = f"exec dispatcher-task-run --dispatcher @{_SERVER_FILE} {fake}"
        with ExitStack() as others:
            if is_served:
                server = others.enter_context(self.process(*_SERVER.split(), "--port", "0"))
                wait_until(self._serves, "a server", 30)
            run = others.enter_context(self.process("bash", "-c", worker if is_served else whole))
            if is_complete:
                assert run.wait(60) == (4 if has_failures else 0), run.output
                return
            wait_until(lambda: self._lines_written() >= 4, "a few answers", 60)
            run.stop()
            assert run.wait(60) == 3, run.output
            if is_served:
                server.stop()
                assert server.wait(30) == 3, server.output

    def process(self, *command: str) -> AbstractContextManager[Process]:
        """Run a command meanwhile."""
        return running(*command, cwd=self.directory, env=self.environ)

    def answers(self) -> list[dict[str, object]]:
        """Return the output that most commands name."""
        text = (self.directory / "answers.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def _lines_written(self) -> int:
        path = self.directory / "answers.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def _serves(self) -> bool:
        return (self.directory / _SERVER_FILE).exists()


def _script(commands: Iterable[str], ports: Mapping[str, str]) -> list[str]:
    script = ["set -euo pipefail"]
    for command in commands:
        for shown, here in REPLACED.items():
            command = command.replace(shown, here)
        command = command.replace("HOST:8000", f"127.0.0.1:{ports['8000']}")
        command = command.replace("127.0.0.1:8000", f"127.0.0.1:{ports['8000']}")
        command = re.sub(r"(?<=--port )(8000|8001)\b", lambda port: ports[port[1]], command)
        if command.startswith("dispatcher-server "):
            script += [f"{command} & server=$!", _UNTIL_IT_SERVES]
        else:
            script.append(command)
    return [*script, '[ -z "${server:-}" ] || wait "$server"']


def make_stage(directory: Path, cerebras_url: str, environ: Mapping[str, str]) -> Stage:
    """Fill a directory as a user's: the checkout, a task, prompts, files of options.

    `environ` is what the commands find beside PATH, which it may name.
    """
    for path in ROOT.iterdir():
        if path.name[0] != "." and not path.name.endswith((".jsonl", ".dispatch")):
            (directory / path.name).symlink_to(path)
    (directory / ".venv").symlink_to(sys.prefix)
    (directory / "my_tasks.py").write_text(MY_TASKS)
    (directory / "prompts.jsonl").write_text("".join(map(_prompt, range(LINES))))
    _write_inputs(directory, (directory / "prompts.jsonl").read_bytes())
    (directory / "run.yaml").write_text(RUN_YAML)
    (directory / "limits.yaml").write_text(yaml_block("README.md", "models_to_run"))
    submitted = yaml_block("slurm/README.md", "# answers.yaml")
    (directory / "answers.yaml").write_text(submitted)
    (directory / "job.yaml").write_text(submitted.replace("server_partition: cpu\n", ""))
    programs = directory / "bin"
    programs.mkdir()
    for name, text in (("vllm", VLLM), ("apptainer", APPTAINER)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{environ['PATH']}"
    own = {"PATH": path, "CEREBRAS_BASE_URL": cerebras_url, "PYTHONPATH": str(ROOT)}
    own |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(directory / "hf-home")}
    return Stage(directory, {**environ, **own})


def _write_inputs(directory: Path, prompts: bytes) -> None:
    """Write the prompts as every kind of input."""
    write_gzip(directory, prompts).rename(directory / "prompts.jsonl.gz")
    write_zstd(directory, prompts).rename(directory / "prompts.jsonl.zst")
    rows = [json.loads(line) for line in prompts.splitlines()]
    write_parquet(directory / "prompts.parquet", rows)
    (directory / "questions").mkdir()
    for split in ("train", "test"):
        (directory / "questions" / f"{split}.jsonl").write_bytes(prompts)


def _prompt(number: int) -> str:
    messages = [{"role": "user", "content": f"Say the number {number} in words."}]
    return json.dumps({"id": number, "messages": messages}) + "\n"
