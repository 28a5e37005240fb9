"""What squeue says of jobs, with its reasons in words. A cluster without squeue, or a slow one, gives nothing instead of an error."""

import shutil
import subprocess
from typing import NamedTuple

ACTIVE = ("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED")
REASONS = {
    "None": "Slurm has not looked at it yet",
    "Priority": "jobs of a higher priority are before it",
    "Resources": "it is the next one, and waits for free nodes",
    "Dependency": "it waits for another job to be complete",
    "DependencyNeverSatisfied": "the job that it waits for has failed, so it can never start; cancel it",
    "BeginTime": "it was put back into the queue, and Slurm lets it start a little later",
    "JobHeldUser": "its owner holds it; `scontrol release JOB` lets it go",
    "JobHeldAdmin": "an administrator holds it; ask why",
    "JobHoldMaxRequeue": "Slurm holds it after too many failed launches; look at the nodes, then `scontrol release JOB`",
    "launch failed requeued held": "its launch failed on a node and Slurm holds it; look at that node, then `scontrol release JOB`",
    "ReqNodeNotAvail": "a node that it needs is down, drained or reserved",
    "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions": "nodes that it needs are down, drained or reserved",
    "PartitionNodeLimit": "it asks for more nodes than the partition has; lower nodes, it will never start like this",
    "PartitionTimeLimit": "it asks for more time than the partition allows; lower minutes, it will never start like this",
    "PartitionConfig": "the partition cannot give what it asks for",
    "PartitionDown": "the partition takes no jobs at present",
    "BadConstraints": "no node has what it asks for; look at constraint and gpus_per_node",
    "Licenses": "it waits for a licence",
    "Reservation": "it waits for its reservation",
    "JobArrayTaskLimit": "as many points of its sweep run as array_parallelism allows",
    "AssocGrpGRES": "the account's GPUs are all in use",
    "QOSMaxJobsPerUserLimit": "as many of your jobs run as the QOS allows",
    "AssociationJobLimit": "as many of the account's jobs run as it is allowed",
    "TimeLimit": "it reached its time limit",
    "NodeDown": "a node went down; Slurm starts it again elsewhere",
    "NonZeroExitCode": "its script ended with an error; see the log",
}


class Queued(NamedTuple):
    """One job as squeue lists it."""

    job: str  # as submitit writes it: 123, or 123_4 for a task of an array
    state: str
    reason: str
    nodes: str
    start: str  # expected, where Slurm has a guess

    @property
    def waits_or_runs(self) -> bool:
        """Whether Slurm has not finished with it."""
        return self.state in ACTIVE

    def in_words(self) -> str:
        """Why it is not running; empty when it is."""
        if self.state != "PENDING":
            return ""
        known = REASONS.get(self.reason) or next(
            (words for key, words in REASONS.items() if len(key) > 8 and self.reason.startswith(key)), None
        )
        if known is None and self.reason.startswith(("QOS", "Assoc", "MaxCpu", "MaxMem")):
            known = "a limit of the account or the QOS is reached"
        guess = f"; expected to start at {self.start}" if self.start not in ("", "N/A") else ""
        return f"{known} ({self.reason}){guess}" if known else f"Slurm's reason: {self.reason}{guess}"


def look(jobs: list[str], seconds: float = 20) -> dict[str, Queued] | None:
    """Job -> what squeue knows of it, also when it ended some minutes ago; None where squeue is absent or Slurm does not answer."""
    if not jobs:
        return {}
    if not shutil.which("squeue"):
        return None
    found = {}
    for job in sorted({job.split("_")[0] for job in jobs}):  # a call for each: of several ids one that is too old spoils the answer
        command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%i|%T|%r|%N|%S"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return None
        if done.returncode and "Invalid job id" not in done.stderr:
            return None
        for line in done.stdout.splitlines():
            queued = Queued(*line.split("|", 4))
            found[queued.job] = queued
    return found
