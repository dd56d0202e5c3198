"""What slurm/launcher.sh makes of its settings, and how slurm/worker.sh minds its command."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.processes import ROOT, Process, running, wait_until

SLURM = ROOT / "slurm"
SCRIPTS = sorted(path for path in SLURM.iterdir() if path.suffix in (".sh", ".sbatch"))
LAUNCHER, WORKER = SLURM / "launcher.sh", SLURM / "worker.sh"
VISIBLE = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
ROCR, HIP, CUDA = VISIBLE


@pytest.fixture
def devices(tmp_path: Path) -> Path:
    """Return what stands for /dev: a node without GPUs."""
    (tmp_path / "dev").mkdir()
    return tmp_path / "dev"


def launch(
    *command: str, devices: Path, cwd: Path = ROOT, **settings: str
) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in VISIBLE}
    return subprocess.run(
        [str(LAUNCHER), *command],
        env={**env, "DEVICES_DIR": str(devices), **settings},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def gpus_of_task(devices: Path, **settings: str) -> dict[str, str]:
    """Return what a task is shown."""
    done = launch("--worker", "env", devices=devices, **settings)
    assert done.returncode == 0, done.stderr
    lines = (line.partition("=") for line in done.stdout.splitlines())
    return {name: value for name, _, value in lines if name in VISIBLE}


# -------------------------------------------------------------------- the scripts


@pytest.mark.shellcheck
def test_the_scripts_pass_shellcheck() -> None:
    assert len(SCRIPTS) == 7
    command = ["shellcheck", "--external-sources", *map(str, SCRIPTS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_settings_of_a_script_are_those_of_its_environment() -> None:
    """Each setting can be given to sbatch; none is written twice."""
    for script in SLURM.glob("*.sbatch"):
        block = script.read_text().split("# ---- Settings", 1)[1].split("\n\n", 1)[0]
        names = re.findall(r"^(?:export )?(\w+)=", block, re.MULTILINE)
        assert len(names) == len(set(names)) > 5
        for name in names:
            assert re.search(rf"\b{name}=\$\{{{name}:[-?]", block), f"{script.name}: {name}"


# -------------------------------------------------------------------- GPUs


@pytest.mark.parametrize(
    ("shown", "place", "count", "expected"),
    [
        ({CUDA: "0,1,2,3"}, 0, 2, {CUDA: "0,1"}),
        ({CUDA: "0,1,2,3"}, 1, 2, {CUDA: "2,3"}),
        ({CUDA: "4,5,6,7"}, 3, 1, {CUDA: "7"}),
        ({CUDA: "GPU-aa,GPU-bb"}, 1, 1, {CUDA: "GPU-bb"}),
        ({CUDA: "2,3"}, 1, 2, {CUDA: "2,3"}),  # Slurm has bound them
        ({HIP: "0,1"}, 1, 1, {HIP: "1"}),
        ({ROCR: "4,5,6,7"}, 1, 2, {ROCR: "6,7"}),
        ({ROCR: "4,5,6,7", HIP: "0,1,2,3"}, 1, 2, {ROCR: "6,7", HIP: "0,1"}),
        ({HIP: "0,1,2,3", CUDA: "0,1,2,3"}, 1, 2, {HIP: "2,3", CUDA: "2,3"}),
        ({CUDA: "0,1"}, 0, 0, {CUDA: "0,1"}),
        ({CUDA: ""}, 1, 1, {CUDA: ""}),
        ({CUDA: "NoDevFiles"}, 1, 1, {CUDA: "NoDevFiles"}),
        ({}, 1, 1, {}),
    ],
)
def test_a_task_has_its_own_of_the_nodes_gpus(
    devices: Path, shown: dict[str, str], place: int, count: int, expected: dict[str, str]
) -> None:
    settings = {"SLURM_LOCALID": str(place), "GPUS_PER_TASK": str(count), **shown}
    assert gpus_of_task(devices, **settings) == expected


def test_where_slurm_says_nothing_the_nodes_gpus_are_counted(devices: Path) -> None:
    for name in ("nvidiactl", "nvidia0", "nvidia1", "nvidia2", "nvidia3"):
        (devices / name).touch()
    shown = gpus_of_task(devices, SLURM_LOCALID="1", GPUS_PER_TASK="2")
    assert shown == {CUDA: "2,3"}


def test_amd_gpus_are_counted_by_their_render_nodes(devices: Path) -> None:
    (devices / "dri").mkdir()
    for name in ("kfd", "dri/card0", "dri/renderD128", "dri/renderD129"):
        (devices / name).touch()
    assert gpus_of_task(devices, SLURM_LOCALID="1", GPUS_PER_TASK="1") == {HIP: "1"}


def test_too_few_gpus_are_told_in_one_sentence(devices: Path) -> None:
    done = launch(
        *("--worker", "env"),
        devices=devices,
        SLURM_LOCALID="1",
        GPUS_PER_TASK="2",
        **{CUDA: "0,1,2"},
    )
    assert done.returncode == 2
    assert done.stderr == (
        "launcher.sh: task 2 of this node needs the GPUs 3 to 4, but the job has 3 here "
        "(CUDA_VISIBLE_DEVICES); ask for more GPUs a node, start fewer tasks on it, or lower "
        "GPUS_PER_TASK\n"
    )


def test_the_server_is_shown_what_the_job_is_shown(devices: Path) -> None:
    done = launch("env", devices=devices, SLURM_LOCALID="0", GPUS_PER_TASK="1", **{CUDA: "0,1"})
    assert f"{CUDA}=0,1" in done.stdout.splitlines()


# -------------------------------------------------------------------- container, modules, caches


@pytest.fixture
def runtime(tmp_path: Path) -> str:
    """Return a PATH with an `apptainer` that tells its arguments and becomes the command."""
    script = tmp_path / "bin" / "apptainer"
    script.parent.mkdir()
    script.write_text(
        '#!/bin/bash\nprintf "%s\\n" "$@" >"$ASKED"\n'
        'until [ "$1" = image.sif ]; do shift; done\nshift\nexec "$@"\n'
    )
    script.chmod(0o755)
    return f"{script.parent}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("device", "flag"), [("nvidia0", ["--nv"]), ("kfd", ["--rocm"]), (None, [])]
)
def test_a_container_sees_the_files_of_the_run_and_the_gpus(
    tmp_path: Path, devices: Path, runtime: str, device: str | None, flag: list[str]
) -> None:
    if device is not None:
        (devices / device).touch()
    places = {name: tmp_path / name for name in ("in", "out", "model", "hub", "cwd")}
    for place in places.values():
        place.mkdir()
    done = launch(
        *("--worker", "python3", "-c", "print('inside')"),
        devices=devices,
        cwd=places["cwd"],
        PATH=runtime,
        ASKED=str(tmp_path / "asked"),
        CONTAINER="image.sif",
        CONTAINER_BINDS="/data:/data",
        CONTAINER_ARGS="--no-home --writable-tmpfs",
        INPUT=f"{places['in']}/in.jsonl",
        OUTPUT="../out/out.jsonl",
        STATE="../out/out.jsonl.dispatch",
        MODEL=str(places["model"]),
        HF_HOME=str(places["hub"]),
    )
    assert (done.returncode, done.stdout) == (0, "inside\n"), done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[: 1 + len(flag)] == ["exec", *flag]
    bound = {asked[n + 1] for n, word in enumerate(asked) if word == "--bind"}
    assert bound == {*map(str, places.values()), str(ROOT), "/data:/data"}
    assert asked[asked.index("--pwd") :] == (
        [
            "--pwd",
            str(places["cwd"]),
            "--no-home",
            "--writable-tmpfs",
            "image.sif",
            "python3",
            "-c",
            "print('inside')",
        ]
    )


def test_no_shell_is_left_between_a_signal_and_the_command(
    tmp_path: Path, devices: Path, runtime: str
) -> None:
    env = {
        "DEVICES_DIR": str(devices),
        "PATH": runtime,
        "ASKED": str(tmp_path / "asked"),
        "CONTAINER": "image.sif",
    }
    with running(LAUNCHER, "python3", "-c", "import os; print(os.getpid())", env=env) as process:
        assert process.wait_for_line(re.compile(r"(\d+)"))[1] == str(process.pid)


def test_a_container_without_a_runtime_is_told(devices: Path, tmp_path: Path) -> None:
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    done = launch("true", devices=devices, PATH=str(tmp_path), CONTAINER="image.sif")
    assert done.returncode == 2
    assert "neither apptainer nor singularity is on PATH" in done.stderr


def test_modules_are_loaded_first(devices: Path) -> None:
    module = '() { MODULES_LOADED="${MODULES_LOADED-} $*"; export MODULES_LOADED; }'
    done = launch(
        *("sh", "-c", "echo $MODULES_LOADED"),
        devices=devices,
        MODULES="cuda/12 apptainer",
        **{"BASH_FUNC_module%%": module},
    )
    assert done.stdout == "load cuda/12 load apptainer\n", done.stderr


def test_a_virtual_environment_comes_first_on_the_path(devices: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text("#!/bin/sh\necho mine\n")
    (tmp_path / "bin" / "python3").chmod(0o755)
    assert launch("python3", devices=devices, VENV=str(tmp_path)).stdout == "mine\n"
    done = launch("python3", devices=devices, VENV="/nowhere")
    assert (done.returncode, done.stderr) == (
        2,
        "launcher.sh: VENV=/nowhere is no virtual environment on this node\n",
    )


@pytest.mark.parametrize(
    ("model", "expected"), [("org/here", "1"), ("org/elsewhere", "unset"), ("DIRECTORY", "1")]
)
def test_a_model_that_is_here_is_not_asked_for_at_the_hub(
    devices: Path, tmp_path: Path, model: str, expected: str
) -> None:
    (tmp_path / "hub" / "models--org--here" / "snapshots").mkdir(parents=True)
    done = launch(
        *("--worker", "sh", "-c", "echo ${HF_HUB_OFFLINE:-unset}"),
        devices=devices,
        HF_HOME=str(tmp_path),
        MODEL=str(tmp_path) if model == "DIRECTORY" else model,
    )
    assert done.stdout == f"{expected}\n", done.stderr


# -------------------------------------------------------------------- the worker


@pytest.fixture
def worker_env(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "caches").mkdir()
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": "3",
        "LOCAL_SCRATCH": str(tmp_path / "caches"),
        "WORKER_PAUSE_S": "0.1",
        "PLACE": str(tmp_path),
    }


@pytest.fixture
def leftovers(tmp_path: Path) -> Iterator[None]:
    """End the command of a worker that was killed itself."""
    yield
    with suppress(FileNotFoundError, ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def work(code: str, env: dict[str, str]) -> Process:
    return Process(WORKER, "python3", "-c", code, env=env)


@pytest.mark.parametrize("code", [0, 2, 3, 5])
def test_a_command_that_ended_by_itself_is_not_started_again(
    worker_env: dict[str, str], code: int
) -> None:
    process = work(f"import sys; print('once'); sys.exit({code})", worker_env)
    assert process.wait() == code
    assert process.output == "once\n"


def test_a_command_that_keeps_dying_is_given_up(worker_env: dict[str, str]) -> None:
    process = work("import os; print('began'); os.abort()", {**worker_env, "WORKER_RESTARTS": "2"})
    assert process.wait() == 1
    assert process.output.count("began") == 3
    assert "task 3: ended with code 134 after 2 restarts; giving up" in process.output


def test_a_killed_command_is_started_again_with_its_caches(
    worker_env: dict[str, str], tmp_path: Path
) -> None:
    code = (
        "import os, pathlib as p\n"
        "cache = p.Path(os.environ['VLLM_CACHE_ROOT'])\n"
        "if cache.exists(): raise SystemExit(0)\n"
        "cache.mkdir(); os.kill(os.getpid(), 9)\n"
    )
    process = work(code, worker_env)
    assert process.wait() == 0, process.output
    assert "ended with code 137; starting it again" in process.output
    assert list((tmp_path / "caches").iterdir()) == []


@pytest.mark.usefixtures("leftovers")
def test_sigterm_is_passed_on_and_told_by_the_exit_code(
    worker_env: dict[str, str], tmp_path: Path
) -> None:
    code = (
        "import os, pathlib, signal, sys, time\n"
        "def end(*_): print('gave back'); sys.exit(3)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "(pathlib.Path(os.environ['PLACE']) / 'pid').write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    process = work(code, worker_env)
    wait_until((tmp_path / "pid").exists, "the command")
    process.stop()
    assert process.wait() == 143
    assert process.output == "gave back\n"


@pytest.mark.usefixtures("leftovers")
def test_an_end_by_a_signal_that_reaches_the_command_first_is_told_as_one(
    worker_env: dict[str, str], tmp_path: Path
) -> None:
    code = (
        "import os, pathlib, signal, time\n"
        "(pathlib.Path(os.environ['PLACE']) / 'pid').write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    process = work(code, worker_env)
    wait_until((tmp_path / "pid").exists, "the command")
    wait_until(lambda: (tmp_path / "pid").read_text(), "the command's id")
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    process.stop()
    assert process.wait() == 143
