"""One rank of a training job, under submitit on Slurm, on this machine, or in the debugger; and what the batch script asks at its end.

Instead of submitit's own handler, which saves on rank 0 in the middle of a step: a signal is remembered, at the step's end all ranks
agree, they save together, rank 0 has Slurm queue the job again, and all wait for their end. Nobody returns a result before the last step.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

from slurm.notes import committed_step, note, notes

USAGE = 2  # exit code of what a user has to mend; starting again would not help
PATIENCE = 300.0  # seconds that a rank waits for rank 0's address, and for its end after the requeue
PORTS = range(20000, 32000)  # below Linux's range for outgoing connections


class TrainJob:
    """Trains the configuration that lies in a run folder; picklable, holds nothing else."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def __call__(self) -> None:
        """Returns when training is complete. Any other end is an exit code, never a result."""
        env = JobEnvironment()
        if env.cluster == "debug":
            self._train(env)
            return
        try:
            self._train(env)
        except Exception as error:  # submitit would store it as the result, where the next start of this job finds it
            import traceback

            traceback.print_exc()
            print(f"rank {env.global_rank}: {type(error).__name__}: {error}", flush=True)
            leave(1)

    def _train(self, env: JobEnvironment) -> None:
        from pipeline.__main__ import main
        from pipeline.distributed.stop import ignore, listen

        inbox = listen()
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # comes with every other signal; submitit would say so in each process
        if env.global_rank == 0:
            for path in (self.run / "launch").glob(f"{env.job_id}_*_result.pkl"):  # of another machine's process of the same number
                path.unlink(missing_ok=True)
            note(
                self.run,
                "start",
                job=env.job_id,
                start=restarts(),
                nodes=list(env.hostnames),
                world=env.num_tasks,
                step=committed_step(self.run),
            )
        with Meeting(self.run, env) as place:
            os.environ.update(place)
            code = main(["train", str(self.run / "resolved.yaml")])
        if code == USAGE:
            with suppress(OSError):  # a full disk may be the very reason
                note(self.run, "refused", job=env.job_id, start=restarts(), rank=env.global_rank)
        if code:
            leave(code)
        if inbox.agreed:
            hand_over(env, self.run, inbox.received)
        if env.cluster != "debug":
            ignore()

    def checkpoint(self) -> DelayedSubmission:
        """For submitit's own handler, which is in force until `_train` has replaced it: nothing has been done yet, start again."""
        return DelayedSubmission(TrainJob(self.run))


class Meeting:
    """Where the ranks find rank 0: it looks for a free port, beginning with one that follows from the job, and leaves address and port in
    the run folder, which all ranks see. So a port in use costs nothing, and two starts of one job cannot meet."""

    def __init__(self, run: Path, env: JobEnvironment) -> None:
        self.env, self.path = env, run / f"meeting-{env.job_id}-{restarts()}.json"

    def __enter__(self) -> dict[str, str]:
        """The variables that torch.distributed and accelerate read."""
        env = self.env
        if env.num_tasks == 1:
            return {}
        if env.global_rank == 0:
            address = env.hostnames[0] if env.cluster == "slurm" else "127.0.0.1"
            partial = self.path.with_suffix(".part")
            partial.write_text(json.dumps([address, free_port(env.raw_job_id)]), encoding="utf-8")
            partial.replace(self.path)
        address, port = self._read()
        local = env.num_tasks // env.num_nodes
        values = {"RANK": env.global_rank, "WORLD_SIZE": env.num_tasks, "LOCAL_RANK": env.local_rank, "LOCAL_WORLD_SIZE": local}
        return {key: str(value) for key, value in values.items()} | {"MASTER_ADDR": address, "MASTER_PORT": str(port)}

    def _read(self) -> tuple[str, int]:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return json.loads(self.path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{self.path}: rank 0 did not say where it is within {PATIENCE:.0f} s") from None
                time.sleep(0.05)

    def __exit__(self, *error: object) -> None:
        if self.env.global_rank == 0:
            self.path.unlink(missing_ok=True)


def free_port(job: str) -> int:
    """The first free port at or after the one that follows from the job's number."""
    digits = int("".join(c for c in job if c.isdigit()) or 0)
    for offset in range(len(PORTS)):
        port = PORTS[(digits * 7 + offset) % len(PORTS)]
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
                return port
            except OSError:
                continue
    raise OSError(f"no free port from {PORTS.start} to {PORTS.stop}")


def restarts() -> int:
    """How often Slurm has started this job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def hand_over(env: JobEnvironment, run: Path, signalled: str | None) -> None:
    """All ranks, after they saved together: the job goes back into the queue. Does not return."""
    if env.global_rank == 0:
        note(run, "saved", job=env.job_id, start=restarts(), signal=signalled, step=committed_step(run))
    if env.cluster != "slurm":  # submitit's local controller starts ranks again that were stopped by its own time limit, and no others
        leave(LOCAL_REQUEUE_RETURN_CODE if signalled == "SIGUSR2" and env.cluster == "local" else 128 + signal.SIGTERM)
    end_workers()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if env.global_rank == 0:
        time.sleep(0.5)  # the others come here at about the same time; the requeue's SIGTERM should find them ready to die of it
        if not requeue(env.job_id):
            leave(128 + signal.SIGTERM)
    time.sleep(PATIENCE)
    leave(1)


def end_workers() -> None:
    """The loader's workers ignore the signals that are meant for the trainer."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each worker that ends here
    for child in multiprocessing.active_children():
        child.kill()


def leave(code: int) -> None:
    """Ends this rank by an exit code, which submitit does not take for a result."""
    sys.stdout.flush()
    end_workers()
    raise SystemExit(code)


def requeue(job: str) -> bool:
    """Puts this start of a job back into the queue; False when it is no longer this start that Slurm runs, or somebody cancelled it."""
    for attempt in range(5):
        if not is_running(job):
            print(f"job {job}: Slurm ends or restarts it by itself, it is not queued again from here", flush=True)
            return False
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
        if done.returncode == 0:
            return True
        print(f"job {job}: scontrol requeue: {done.stderr.strip()}", flush=True)
        time.sleep(2**attempt)
    raise OSError(f"job {job}: was saved, but Slurm does not queue it again; start the same command again")


def is_running(job: str) -> bool:
    """Whether Slurm takes this job for running, in the start that this process belongs to."""
    done = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True, timeout=60, check=False)
    fields = dict(part.split("=", 1) for part in done.stdout.split() if "=" in part)
    return fields.get("JobState") == "RUNNING" and fields.get("Restarts") == str(restarts())


def ended(submissions: Path, code: int) -> None:
    """What the batch script calls when its ranks have ended: starts a job again whose process was killed, while it gets further."""
    job, task = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"
    told = json.loads((submissions / "runs.json").read_text(encoding="utf-8"))
    run, crashes = Path(told["runs"][task]), told["crashes"]
    step = committed_step(run)
    mine = [line for line in notes(run) if line["job"] == job]
    again = [line for line in mine if line["event"] == "crash" and line["step"] >= step]
    # srun kills the other ranks as soon as one has left, and gives the highest of their codes
    if any(line["event"] == "refused" and line["start"] == restarts() for line in mine):
        code = USAGE
    if code in (0, USAGE) or not is_running(job):
        note(run, "end", job=job, start=restarts(), code=code, step=step)
    elif len(again) >= crashes:
        note(run, "end", job=job, start=restarts(), code=code, step=step)
        print(
            f"{run}: ended by exit code {code}, {crashes + 1} times in a row without a checkpoint later than step {step}; not started again",
            flush=True,
        )
    else:
        note(run, "crash", job=job, start=restarts(), code=code, step=step)
        print(f"{run}: ended by exit code {code} after the checkpoint of step {step}; queued again", flush=True)
        requeue(job)


if __name__ == "__main__":
    ended(Path(sys.argv[1]), int(sys.argv[2]))
