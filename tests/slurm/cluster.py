"""A real, throw-away Slurm on this machine: munged, slurmctld and one slurmd for each virtual node, all on loopback.

The nodes are named 127.0.1.1, 127.0.1.2, ...: such a name is its own address, so nothing has to be written into /etc/hosts. Each slurmd
lives in a UTS namespace of its own, which gives its ranks that hostname and marks the processes of one node, so that a node can crash.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.runs import wait_for

PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client", "faketime")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "faketime")
SBIN = "/usr/sbin:/sbin"
CONFIG = """\
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits this long before it starts again: 120 by default, 5 is the least
AuthInfo=socket={root}/munge/socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
# the CPUs and the memory written below are believed, not the machine's
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=5
SlurmdTimeout=10
# on a busy machine an answer may take longer than the 10 seconds by default
MessageTimeout=30
MinJobAge=7200
# a second cluster must not hand out the job ids of the first: results are found by id
FirstJobId={first}
NodeName={nodes} NodeAddr=127.0.0.1 NodeHostname=localhost Port={ports} CPUs=8 RealMemory=64000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=30 State=UP PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE DefaultTime=30 State=UP PriorityTier=10 PreemptMode=OFF
"""


def install() -> str | None:
    """Installs Debian's packages where they are missing; a reason in words where that cannot be, else None."""
    os.environ["PATH"] = f"{os.environ['PATH']}:{SBIN}" if SBIN not in os.environ["PATH"] else os.environ["PATH"]
    if os.geteuid() != 0:
        return "the Slurm tests start daemons and namespaces of their own and need root"
    if not shutil.which("unshare"):
        return "the Slurm tests need unshare (package util-linux)"
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if not missing:
        return None
    if not shutil.which("apt-get"):
        return f"{', '.join(missing)} not found, and there is no apt-get to install {' '.join(PACKAGES)} with"
    policy = Path("/usr/sbin/policy-rc.d")  # keeps the packages from starting daemons of their own
    made = not policy.exists()
    if made:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        quiet = {"env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, "capture_output": True, "text": True, "check": False}
        subprocess.run(["apt-get", "update", "-qq"], timeout=300, **quiet)
        done = subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES], timeout=600, **quiet)
    finally:
        if made:
            policy.unlink()
    return None if done.returncode == 0 else f"apt-get could not install {' '.join(PACKAGES)}: {done.stderr.strip()[-400:]}"


def faketime() -> str:
    """The library that gives a process another clock; for LD_PRELOAD."""
    return str(next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")))


def free_ports(count: int) -> int:
    """The first of `count` free neighbouring ports on loopback."""
    for first in range(17000 + os.getpid() % 10000, 60000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, one in enumerate(sockets):
                one.bind(("127.0.0.1", first + offset))
            return first
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise OSError("no free ports on loopback")


class Cluster:
    """Starts at once; `stop` ends everything that it started."""

    def __init__(self, root: Path, nodes: int = 4) -> None:
        self.root, self.nodes = root, [f"127.0.1.{n + 1}" for n in range(nodes)]
        self._namespaces: dict[str, str] = {}
        for name in ("state", "spool", "log", "run", "munge"):
            (root / name).mkdir(parents=True, mode=0o755)
        first = free_ports(nodes + 1)
        text = CONFIG.format(
            root=root,
            port=first,
            first=1000 + int(time.time()) % 6_000_000 * 10,
            nodes=f"127.0.1.[1-{nodes}]",
            ports=f"[{first + 1}-{first + nodes}]",
        )
        (root / "slurm.conf").write_text(text)
        (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # keeps slurmd from looking for a mount that nothing uses
        key = root / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        os.environ["SLURM_CONF"] = str(root / "slurm.conf")
        self._start()

    def _start(self) -> None:
        munge, run, log = self.root / "munge", self.root / "run", self.root / "log"
        places = {"key-file": munge / "key", "socket": munge / "socket", "seed-file": munge / "seed"}
        places |= {"pid-file": run / "munged.pid", "log-file": log / "munged.log"}
        subprocess.run(["munged", "--force", *(f"--{name}={path}" for name, path in places.items())], check=True, timeout=60)
        subprocess.run(["slurmctld", "-c"], check=True, timeout=60)
        for node in self.nodes:
            self.boot(node)
        wait_for(lambda: self.idle() == len(self.nodes), f"idle nodes; see {log}", every=0.1)

    def boot(self, node: str) -> None:
        """Starts a node, or starts it again after `crash`."""
        where = self.root / "run" / f"{node}.uts"
        script = 'hostname localhost && readlink /proc/self/ns/uts > "$2" && exec slurmd -N "$1"'
        subprocess.run(["unshare", "--uts", "sh", "-c", script, "sh", node, str(where)], check=True, timeout=60)
        self._namespaces[node] = where.read_text().strip()

    def processes(self, node: str) -> list[int]:
        """Every living process of a node."""
        assert self._namespaces[node] != os.readlink("/proc/self/ns/uts")
        return [pid for pid in _pids() if _namespace(pid) == self._namespaces[node] and _state(pid) not in "ZX"]

    def ranks(self, node: str) -> list[int]:
        """The processes of a node that run a job's Python, not what they forked."""
        own = {pid: _command(pid) for pid in self.processes(node)}
        ours = {pid for pid, command in own.items() if "submitit.core._submit" in command and "python" in command.split("\0")[0]}
        return [pid for pid in ours if _parent(pid) not in ours]

    def crash(self, node: str) -> None:
        """A power cut: SIGKILL to everything on the node."""
        for _ in range(5):  # again, for what was forked meanwhile
            for pid in self.processes(node):
                _kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def kill(self, pid: int, number: int) -> None:
        """A signal to one process of a node; one that has ended is no error."""
        _kill(pid, number)

    def daemon(self, node: str) -> int:
        """The pid of a node's slurmd."""
        return int((self.root / "run" / f"slurmd.{node}.pid").read_text())

    def idle(self) -> int:
        """How many nodes can take a job."""
        found = self.ask("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D", check=False)
        return sum(map(int, found.split()))

    def ask(self, *command: str, check: bool = True) -> str:
        """What a Slurm command prints; with a time limit, as a client that gets no answer waits for ever."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self.ask("squeue", "-h", "-t", "all", "-j", job, "-o", "%T", check=False)

    def restarts(self, job: str) -> int:
        """How often Slurm has started a job again."""
        fields = dict(part.split("=", 1) for part in self.ask("scontrol", "-o", "show", "job", job).split() if "=" in part)
        return int(fields["Restarts"])

    def clear(self) -> None:
        """Cancels every job and waits until the nodes are free."""
        self.ask("scancel", "--user", "root", check=False)
        wait_for(lambda: not self.ask("squeue", "-h", "-o", "%i", check=False), "an empty queue", every=0.1)

    def stop(self) -> None:
        """Ends the jobs, then the daemons, then whatever is left in the nodes' namespaces."""
        self.ask("scancel", "--user", "root", check=False)
        for name in (*(f"slurmd.{node}" for node in self.nodes), "slurmctld", "munged"):
            if (path := self.root / "run" / f"{name}.pid").is_file():
                _kill(int(path.read_text()), signal.SIGTERM)
        for node in self.nodes:
            self.crash(node)
        os.environ.pop("SLURM_CONF", None)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/uts")
    except OSError:
        return ""


def _command(pid: int) -> str:
    return _read(pid, "cmdline")


def _state(pid: int) -> str:
    return _read(pid, "stat").rpartition(") ")[2][:1] or "X"


def _parent(pid: int) -> int:
    return int((_read(pid, "stat").rpartition(") ")[2].split() or [0, 0])[1])


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
