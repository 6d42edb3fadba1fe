"""A SLURM of two nodes on this machine: munged, slurmctld and two slurmd, with all their files in one folder."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tests.ports import free_port

from .runs import variables

# cred_expire is also the time that a requeued job waits (120 s by default), and sched_interval how soon it is
# considered then.
CONFIGURATION = """
ClusterName=am
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=2
CompleteWait=0
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node1_port} CPUs=1 RealMemory=1000 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={node2_port} CPUs=1 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")


def missing() -> str | None:
    """Return why SLURM cannot run here, or None if it can."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"{', '.join(absent)} missing (Debian: slurm-wlm, munge)" if absent else None


class Slurm:
    """A running cluster.

    Attributes:
        env: environment variables that a client needs.
    """

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self.folder = folder
        self.env = dict(env)

    def call(self, *command: str, env: Mapping[str, str] | None = None) -> str:
        """Return what a client program prints."""
        done = subprocess.run(command, env=self.env if env is None else env, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, command: Sequence[str], root: Path, **others: str) -> str:
        """Submit a command that ends in sbatch, for a run in the folder `root`; return the job's number."""
        printed = self.call(*command, env={**variables(root, **others), "SLURM_CONF": self.env["SLURM_CONF"]})
        found = re.search(r"Submitted batch job (\d+)", printed)
        assert found, printed
        return found[1]

    def job(self, number: str) -> dict[str, str]:
        """Return scontrol's fields of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", number)))

    def wait(self, number: str, timeout: float) -> str:
        """Wait for a job's end and return its state."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            job = self.job(number)
            if job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
                return job["JobState"]
            time.sleep(0.5)
        raise TimeoutError(f"job {number} is {self.job(number)}")


@contextlib.contextmanager
def two_node_slurm() -> Iterator[Slurm]:
    """Yield the cluster; then remove its jobs and its daemons."""
    # munged's socket needs a short path. pytest's folders have parents that only their owner may enter.
    folder = Path(tempfile.mkdtemp(prefix="am-slurm-"))
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        folder.chmod(0o755)
        for name in ("state", "spool.node1", "spool.node2"):
            (folder / name).mkdir()
        env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        ports = {f"{name}_port": free_port() for name in ("controller", "node1", "node2")}
        text = CONFIGURATION.format(folder=folder, host=socket.gethostname().split(".")[0], **ports)
        (folder / "slurm.conf").write_text(text)
        daemons.append(_munged(folder))
        _until(lambda: (folder / "munge.socket").exists(), folder, daemons)
        daemons.append(_daemon(folder, env, "slurmctld", "-D", "-i"))
        daemons += [_daemon(folder, env, "slurmd", "-D", "-N", node) for node in ("node1", "node2")]
        slurm = Slurm(folder, env)
        _until(lambda: _idle(slurm) == 2, folder, daemons)
        yield slurm
    finally:
        _stop(folder, daemons)
        shutil.rmtree(folder, ignore_errors=True)


def _munged(folder: Path) -> subprocess.Popen[bytes]:
    """Start munged with a key and a socket of its own, independent of the machine's."""
    owner = pwd.getpwnam("munge")
    private = folder / "munge"
    private.mkdir(mode=0o700)
    key = private / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    for path in (key, private):
        os.chown(path, owner.pw_uid, owner.pw_gid)
    os.chown(folder, owner.pw_uid, owner.pw_gid)
    command = ["munged", "--foreground", f"--key-file={key}", f"--socket={folder / 'munge.socket'}"]
    command += [f"--pid-file={private / 'pid'}", f"--seed-file={private / 'seed'}", f"--log-file={private / 'log'}"]
    with (folder / "munged.out").open("ab") as out:
        return subprocess.Popen(
            command, user=owner.pw_uid, group=owner.pw_gid, stdout=out, stderr=out, start_new_session=True
        )


def _daemon(folder: Path, env: Mapping[str, str], *command: str) -> subprocess.Popen[bytes]:
    with (folder / f"{command[0]}.out").open("ab") as out:
        return subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)


def _idle(slurm: Slurm) -> int:
    with contextlib.suppress(RuntimeError):
        return slurm.call("sinfo", "--noheader", "--Node", "--format=%t").split().count("idle")
    return 0


def _until(ready: Callable[[], bool], folder: Path, daemons: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        dead = [daemon.args for daemon in daemons if daemon.poll() is not None]
        if dead or time.monotonic() > deadline:
            said = "\n".join(f"{p.name}: {p.read_text()[-1500:]}" for p in folder.glob("*.out"))
            raise RuntimeError(f"SLURM did not start ({dead or 'timeout'}):\n{said}")
        time.sleep(0.1)


def _stop(folder: Path, daemons: list[subprocess.Popen[bytes]]) -> None:
    """Kill also slurmstepd and the jobs' processes, which are no children of the daemons; all have SLURM_CONF."""
    for daemon in reversed(daemons):
        daemon.terminate()
    for daemon in daemons:
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    mark = f"SLURM_CONF={folder}/slurm.conf".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
