"""A real Slurm of four nodes on this machine, in a directory and on ports of its own.

One munged, one slurmctld and four slurmd, which play the nodes n1 to n4 with two CPUs and four
GPUs each. Jobs in the partition `high` preempt those in `main`, after a grace period; `cpu` and
`preempt` are two more names for the nodes.
"""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import ROOT, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")
NODES = ("n1", "n2", "n3", "n4")
GRACE_S = 20
REQUEUE_S = 10
"""What Slurm waits before it starts a requeued job again; usually 120."""

_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_START_S = 60.0
_COMMAND_S = 60.0

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire={requeue_s}
StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdSpoolDir={directory}/spool-%n
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
KillWait=10
SlurmdTimeout=30
MinJobAge=900
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
GresTypes=gpu
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s} \
MaxTime=INFINITE State=UP
PartitionName=cpu Nodes=ALL PriorityTier=1 MaxTime=INFINITE State=UP
PartitionName=preempt Nodes=ALL PriorityTier=1 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 Boards=1 "
    "SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=1000 Gres=gpu:4"
)


def missing() -> str | None:
    """Return what this machine lacks to run a Slurm."""
    lacks = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if lacks:
        return f"{', '.join(lacks)} (apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "the rights of root, under which it starts its nodes"


class Cluster:
    """The cluster, from `start` to `stop`. Jobs are submitted from `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "slurm.conf"
        self.env = {**os.environ, "SLURM_CONF": str(self.config), "PATH": _PATH}
        # pytest's own settings are not for jobs.
        self.env.pop("PYTEST_CURRENT_TEST", None)
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    # ---------------------------------------------------------------- life

    def start(self) -> None:
        """Start everything; return when all nodes are idle."""
        self._write_config()
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        munge = ["--foreground", "--force", f"--key-file={key}"]
        for name in ("socket", "pid-file", "log-file", "seed-file"):
            munge.append(f"--{name}={self.directory}/munge.{name.removesuffix('-file')}")
        self._launch("munged", *munge)
        socket_path = self.directory / "munge.socket"
        wait_until(socket_path.exists, "munged's socket", _START_S)
        self._launch("slurmctld", "-D", "-f", str(self.config))
        for name in NODES:
            self.start_node(name)
        wait_until(lambda: self.idle_nodes() == set(NODES), "four idle nodes", _START_S)

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node."""
        self._launch(name, "-D", "-N", name, "-f", str(self.config), program="slurmd")

    def kill_node(self, name: str) -> None:
        """Kill everything that runs on a node."""
        daemon = self._daemons.pop(name)
        daemon.kill()
        daemon.wait(15)
        for pid in [*self._step_daemons(name), *self.processes(SLURMD_NODENAME=name)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _step_daemons(self, name: str) -> list[int]:
        """Return the slurmstepd processes of a node: those that started what runs there."""
        found = set()
        for pid in self.processes(SLURMD_NODENAME=name):
            with suppress(OSError):
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                if Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd"):
                    found.add(parent)
        return sorted(found)

    def stop(self) -> None:
        """End the jobs, the daemons, and whatever of them is left, by process id."""
        with suppress(AssertionError, subprocess.SubprocessError):
            self.cancel_all()
        for name in (*NODES, "slurmctld", "munged"):
            if (daemon := self._daemons.pop(name, None)) is not None:
                daemon.terminate()
                try:
                    daemon.wait(15)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait(15)
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cancel_all(self) -> None:
        """End all jobs, and give every node back."""
        self.run("scancel", "--quiet", "--user=root")
        for name in NODES:
            with suppress(AssertionError):  # it was not drained
                self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")
        wait_until(lambda: not self.run("squeue", "--noheader"), "an empty queue", 60)

    def _launch(self, name: str, *arguments: str, program: str | None = None) -> None:
        path = shutil.which(program or name, path=_PATH)
        assert path is not None
        with (self.directory / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                [path, *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self.env
            )

    def _write_config(self) -> None:
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.directory / name).mkdir()
        host = socket.gethostname().partition(".")[0]
        ports = free_ports(1 + len(NODES))
        nodes = "\n".join(
            NODE.format(name=name, host=host, port=port)
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        self.config.write_text(
            CONFIG.format(
                directory=self.directory,
                host=host,
                ports=ports,
                nodes=nodes,
                grace_s=GRACE_S,
                requeue_s=REQUEUE_S,
            )
        )
        # Slurm names the devices in CUDA_VISIBLE_DEVICES; it wants real ones, here of /dev/null.
        for number in range(4):
            null = os.makedev(1, 3)
            os.mknod(self.directory / f"nvidia{number}", stat.S_IFCHR | 0o600, null)
        (self.directory / "gres.conf").write_text(
            f"Name=gpu File={self.directory}/nvidia[0-3] Flags=nvidia_gpu_env\n"
        )

    # ---------------------------------------------------------------- what a user does

    def run(self, *command: str, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> str:
        """Run one of Slurm's commands; return what it printed."""
        done = subprocess.run(
            command,
            env={**self.env, **(env or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=_COMMAND_S,
            check=False,
        )
        assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def sbatch(self, script: str, *options: str, cwd: Path, **settings: str) -> Job:
        """Submit one of slurm/'s scripts from the directory `cwd`."""
        path = str(ROOT / "slurm" / script)
        command = ["sbatch", "--parsable", "--time=30", *options, path]
        return Job(self, self.run(*command, env=settings, cwd=cwd), cwd)

    def idle_nodes(self) -> set[str]:
        """Return the nodes without jobs."""
        with suppress(AssertionError, subprocess.SubprocessError):  # it is still starting
            lines = self.run("sinfo", "--Node", "--noheader", "--format=%N %t").splitlines()
            return {name for name, state in map(str.split, lines) if state == "idle"}
        return set()

    # ---------------------------------------------------------------- what an onlooker sees

    def processes(self, **environment: str) -> list[int]:
        """Return the processes of this cluster whose environment has these values."""
        wanted = {f"SLURM_CONF={self.config}", *(f"{k}={v}" for k, v in environment.items())}
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                has = set((entry / "environ").read_bytes().decode(errors="replace").split("\0"))
                if wanted <= has and int(entry.name) != os.getpid():
                    found.append(int(entry.name))
        return found


@dataclass
class Job:
    """A job, by its number; of an array, all of it."""

    cluster: Cluster
    id: str
    directory: Path

    def show(self) -> dict[str, str]:
        """Return what Slurm says of it."""
        words = self.cluster.run("scontrol", "--oneliner", "show", "job", self.id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def elements(self) -> list[Job]:
        """Return those of an array that run, by their number."""
        listing = ("--noheader", "--array", f"--jobs={self.id}", "--states=RUNNING")
        names = self.cluster.run("squeue", *listing, "--format=%F_%K").split()
        return [Job(self.cluster, name, self.directory) for name in sorted(names)]

    @property
    def state(self) -> str:
        """Return RUNNING, PENDING, COMPLETED, ...; COMPLETING while it is being ended."""
        shown = self.cluster.run("scontrol", "--oneliner", "show", "job", self.id)
        return shown.split("JobState=")[1].split()[0]

    @property
    def exit_code(self) -> int:
        """Return the exit code of its script."""
        return int(self.show()["ExitCode"].partition(":")[0])

    @property
    def restarts(self) -> int:
        """Return how often it was requeued."""
        return int(self.show()["Restarts"])

    @property
    def log(self) -> str:
        """Return what it has written."""
        paths = sorted(self.directory.glob(f"*-{self.show()['JobId']}.log"))
        return "".join(path.read_text(errors="replace") for path in paths)

    def wait_for(self, *states: str, deadline_s: float = 120.0) -> str:
        """Return its state once it is one of these."""
        self._until(lambda: self.state in states, f"job {self.id} to be {states}", deadline_s)
        return self.state

    def wait(self, deadline_s: float = 180.0) -> int:
        """Return its exit code once it has ended for good."""
        self.wait_for("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", deadline_s=deadline_s)
        return self.exit_code

    def wait_for_log(self, text: str, deadline_s: float = 120.0) -> None:
        """Return once this stands in its log."""
        self._until(lambda: text in self.log, f"{text!r} in the log", deadline_s)

    def task_managers(self) -> dict[int, int]:
        """Return the process id of each task manager, by the number of its task."""
        found = {}
        for pid in self.cluster.processes(SLURM_JOB_ID=self.id):
            with suppress(OSError):
                argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if argv[1:3] == [b"-m", b"dispatcher.taskmanager.cli"]:
                    task = next(e for e in environ if e.startswith(b"SLURM_PROCID="))
                    found[int(task.partition(b"=")[2])] = pid
        return found

    def _until(self, condition: Callable[[], bool], what: str, deadline_s: float) -> None:
        end = time.monotonic() + deadline_s
        while not condition():
            assert time.monotonic() < end, f"not within {deadline_s:g} s: {what}:\n{self.log}"
            time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Return ports below those that the system gives to outgoing connections."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in found:
                found.append(port)
    return found


def main() -> None:
    """Keep a cluster in the directory that is named, for a look by hand, until Ctrl-C."""
    directory = Path(sys.argv[1]).absolute()
    directory.mkdir(parents=True)
    cluster = Cluster(directory)
    try:
        cluster.start()
        print(f"export SLURM_CONF={cluster.config}", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        cluster.stop()


if __name__ == "__main__":
    main()
