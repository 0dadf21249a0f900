"""A Slurm of two nodes on loopback, with configuration, keys and processes of its own (Debian: slurm-wlm, munge)."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "sinfo", "squeue", "scancel")
NODES = ("one", "two")

_CONFIGURATION = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=1
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=8192 State=UNKNOWN
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=8192 Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The programs that a cluster needs and this machine does not have."""
    return [name for name in PROGRAMS if _program(name) is None]


@contextmanager
def slurm(folder: Path) -> Iterator[None]:
    """Run a cluster while the block runs, with `SLURM_CONF` set so that `sbatch` and its like talk to it.

    Args:
        folder: of its configuration, keys, logs and state; short, since a socket's path is limited to 107 bytes.
    """
    host, user = socket.gethostname().partition(".")[0], pwd.getpwuid(os.getuid()).pw_name
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    configuration = folder / "slurm.conf"
    configuration.write_text(_CONFIGURATION.format(folder=folder, host=host, user=user, ports=_free_ports(3)))
    # A GPU in name only, so that Slurm takes jobs that ask for one.
    (folder / "gres.conf").write_text("NodeName=two Name=gpu File=/dev/null\n")
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(configuration)
    with ExitStack() as stack:
        stack.callback(_restore, before)

        def start(*command: str) -> subprocess.Popen[bytes]:
            program = _program(command[0])
            assert program is not None
            log = stack.enter_context((folder / f"{'-'.join(command[:3:2])}.out").open("wb"))
            process = subprocess.Popen([program, *command[1:]], stdout=log, stderr=subprocess.STDOUT)
            stack.callback(_end, process)
            return process

        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        start(
            "munged", "--foreground", "--force", f"--key-file={key}", "--num-threads=2",
            *(f"--{option}={folder}/munge.{ending}" for option, ending in files.items()),
        )  # fmt: skip
        _wait(lambda: (folder / "munge.socket").exists(), folder)
        start("slurmctld", "-D", "-i")
        for node in NODES:
            start("slurmd", "-D", "-N", node)
        _wait(lambda: _ask("sinfo", "--noheader", "--format=%t", "--Node").split() == ["idle"] * len(NODES), folder)
        stack.callback(_cancel_all)
        yield


def wait_for_jobs(folder: Path, seconds: float = 120.0) -> None:
    """Wait until no job is waiting or running.

    Raises:
        TimeoutError: some still are.
    """
    _wait(lambda: _ask("squeue", "--noheader") == "", folder, seconds)


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _ask(*command: str) -> str:
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return answer.stdout.strip() if answer.returncode == 0 else "no answer"


def _wait(holds: Callable[[], bool], folder: Path, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            logs = {path.name: path.read_text(errors="replace")[-2000:] for path in folder.glob("*.[ol][uo][tg]")}
            raise TimeoutError(
                "Slurm does not come to where it should:\n" + "\n".join(f"{k}:\n{v}" for k, v in logs.items())
            )
        time.sleep(0.2)


def _cancel_all() -> None:
    _ask("scancel", "--state=PENDING")
    _ask("scancel", "--state=RUNNING")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _restore(before: str | None) -> None:
    if before is None:
        del os.environ["SLURM_CONF"]
    else:
        os.environ["SLURM_CONF"] = before


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
