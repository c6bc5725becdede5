"""A private Slurm for tests: munge, a controller and some nodes, all on this machine, in one folder, as any user.

Nothing under /etc, /run or /var is read or written. Needs Debian's munge, slurmctld, slurmd and slurm-client; with
accounting also slurmdbd, slurm-wlm-mysql-plugin, mariadb-server-core and mariadb-client-core.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SEARCHED = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")
ACCOUNTING_PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "sacct")
_PARTITIONS = "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP"


def missing(programs: tuple[str, ...] = PROGRAMS) -> list[str]:
    """Programs that are not installed."""
    return [name for name in programs if shutil.which(name, path=SEARCHED) is None]


class Cluster:
    """A Slurm of `nodes` nodes, n1, n2, ...; all are this machine.

    Args:
        root: folder of everything; its path must be short, since it holds sockets.
        cpus, gpus: of each node, whatever this machine has; GPUs are character devices that nothing opens.
        partitions, extra: lines of slurm.conf.
        accounting: with a database, so that sacct answers.
        min_job_age: seconds for which the queue knows jobs that have ended.
    """

    def __init__(
        self, root: Path, *, nodes: int = 2, cpus: int = 8, gpus: int = 0, partitions: str = _PARTITIONS,
        extra: str = "", accounting: bool = False, min_job_age: int = 300,
    ) -> None:  # fmt: skip
        root.mkdir(exist_ok=True)
        self.root = root.resolve()
        if len(str(self.root / "munge.sock")) > 100:
            raise ValueError(f"{self.root} is too long a path for a socket")
        self.nodes, self.cpus, self.gpus = nodes, cpus, gpus
        self.partitions, self.extra, self.accounting = partitions, extra, accounting
        self.min_job_age = min_job_age
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {"SLURM_CONF": str(self.root / "slurm.conf"), "PATH": SEARCHED}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def run(self, *command: str | Path, check: bool = True) -> str:
        """Output of a command of Slurm's on this cluster."""
        environment = {**os.environ, **self.environment}
        done = subprocess.run([str(word) for word in command], env=environment, text=True, capture_output=True,
                              timeout=60, check=False)  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"{command}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol` says of a job."""
        shown = self.run("scontrol", "-o", "show", "job", job_id)
        return dict(item.split("=", 1) for item in shown.split() if "=" in item)

    def start_node(self, number: int) -> None:
        self._spawn(f"slurmd-n{number}", "slurmd", "-D", "-N", f"n{number}")

    def kill_node(self, number: int) -> None:
        """Kill a node's daemon; what runs there runs on, as on a machine that has lost its network."""
        process = self._processes.pop(f"slurmd-n{number}")
        process.kill()
        process.wait()

    def stop(self) -> None:
        """End every process of the cluster, jobs included."""
        controller = self._processes.get("slurmctld")
        if controller is not None and controller.poll() is None:
            self.run("scancel", "--signal=KILL", "--full", "--user", getpass.getuser(), check=False)
        daemons = [name for name in self._processes if name.startswith("slurmd-")]
        for name in [*daemons, "slurmctld", "slurmdbd", "mariadbd", "munged"]:
            process = self._processes.pop(name, None)
            if process is None:
                continue
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._end_strays()

    def _end_strays(self) -> None:
        """Steps and tasks outlive a node's daemon that was killed; they carry the cluster's SLURM_CONF."""
        mark = f"SLURM_CONF={self.root}/slurm.conf".encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if int(process.name) != os.getpid() and mark in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
            except OSError:
                continue  # it has ended, or is somebody else's

    def _start(self) -> None:
        root = self.root
        ports = _free_ports(3 + self.nodes)
        self._write(ports)
        socket_path = root / "munge.sock"
        # pytest's folders are closed to others, which munge minds unless forced.
        self._spawn("munged", "munged", "--foreground", "--force", f"--socket={socket_path}",
                    f"--key-file={root}/munge.key", f"--pid-file={root}/munged.pid", f"--log-file={root}/munged.log",
                    f"--seed-file={root}/munged.seed", "--num-threads=2")  # fmt: skip
        munge = shutil.which("munge", path=SEARCHED) or "munge"
        self._until("munge", lambda: socket_path.exists() and subprocess.run(
            [munge, "-n", "-S", str(socket_path)], capture_output=True, check=False).returncode == 0)  # fmt: skip
        if self.accounting:
            self._start_accounting(sql_port=ports[2], port=ports[1])
        self._spawn("slurmctld", "slurmctld", "-D", "-i")
        for number in range(1, self.nodes + 1):
            self.start_node(number)
        self._until("nodes", lambda: self.run("sinfo", "-h", "-N", "-o", "%N %t", check=False).count(" idle")
                    >= self.nodes)  # fmt: skip

    def _start_accounting(self, *, sql_port: int, port: int) -> None:
        root, user = self.root, getpass.getuser()
        # A temporary folder of its own: installations side by side clash in a shared one.
        subprocess.run(
            ["mariadb-install-db", "--no-defaults", f"--datadir={root}/mysql", f"--user={user}", "--skip-test-db",
             "--auth-root-authentication-method=normal", "--skip-name-resolve"],
            check=True, capture_output=True, env={**os.environ, **self.environment, "TMPDIR": str(root)},
        )  # fmt: skip
        (root / "init.sql").write_text(
            f"CREATE OR REPLACE USER slurm@'127.0.0.1' IDENTIFIED BY '{self._password}';\n"
            "GRANT ALL ON slurm_acct_db.* TO slurm@'127.0.0.1';\n"
        )
        self._spawn("mariadbd", "mariadbd", "--no-defaults", f"--datadir={root}/mysql", f"--user={user}",
                    f"--socket={root}/mysql.sock", f"--port={sql_port}", "--bind-address=127.0.0.1",
                    f"--pid-file={root}/mariadbd.pid", f"--tmpdir={root}", f"--init-file={root}/init.sql",
                    "--skip-name-resolve", "--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900",
                    "--innodb-flush-log-at-trx-commit=0")  # fmt: skip
        self._until("mariadbd", lambda: _open(sql_port))
        self._spawn("slurmdbd", "slurmdbd", "-D")
        self._until("slurmdbd", lambda: _open(port))

    def _write(self, ports: list[int]) -> None:
        root, user = self.root, getpass.getuser()
        for name in ("state", *(f"spool-n{number}" for number in range(1, self.nodes + 1))):
            (root / name).mkdir(parents=True, exist_ok=True)
        root.chmod(0o755)
        _write_closed(root / "munge.key", secrets.token_bytes(128))
        gres = f" Gres=gpu:{self.gpus}" if self.gpus else ""
        nodes = "\n".join(
            f"NodeName=n{number} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2 + number]} "
            f"CPUs={self.cpus} RealMemory=8000{gres} State=UNKNOWN"
            for number in range(1, self.nodes + 1)
        )
        accounting = "AccountingStorageType=accounting_storage/none\nJobAcctGatherType=jobacct_gather/none"
        if self.accounting:
            # The storage's password is the socket of this cluster's own munge.
            accounting = (
                f"AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=localhost\n"
                f"AccountingStoragePort={ports[1]}\nAccountingStoragePass={root}/munge.sock\n"
                "JobAcctGatherType=jobacct_gather/linux\nJobAcctGatherFrequency=5"
            )
        (root / "slurm.conf").write_text(f"""\
ClusterName=private
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
CredType=cred/munge
MpiDefault=none
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldPort={ports[0]}
SlurmdSpoolDir={root}/spool-%n
StateSaveLocation={root}/state
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
JobRequeue=1
MinJobAge={self.min_job_age}
KillWait=5
SlurmdTimeout=10
MaxArraySize=1001
{accounting}
{self.extra}
{nodes}
{self.partitions}
""")
        devices = f"NodeName=n[1-{self.nodes}] Name=gpu File=/dev/tty[0-{self.gpus - 1}]\n" if self.gpus else ""
        (root / "gres.conf").write_text(devices)
        (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        if self.accounting:
            self._password = secrets.token_hex(8)
            content = (
                f"AuthType=auth/munge\nAuthInfo=socket={root}/munge.sock\nDbdHost=localhost\nDbdPort={ports[1]}\n"
                f"SlurmUser={user}\nPidFile={root}/slurmdbd.pid\nLogFile={root}/slurmdbd.log\n"
                f"StorageType=accounting_storage/mysql\nStorageHost=127.0.0.1\nStoragePort={ports[2]}\n"
                f"StorageUser=slurm\nStoragePass={self._password}\nStorageLoc=slurm_acct_db\n"
            )
            _write_closed(root / "slurmdbd.conf", content.encode())

    def _spawn(self, name: str, *command: str) -> None:
        with open(self.root / f"{name}.out", "ab") as output:
            self._processes[name] = subprocess.Popen(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, cwd=self.root,
                env={**os.environ, **self.environment}, start_new_session=True,
            )  # fmt: skip

    def _until(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            dead = [name for name, process in self._processes.items() if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                outputs = {path.name: path.read_text(errors="replace")[-1500:] for path in self.root.glob("*.out")}
                raise RuntimeError(f"{what} did not come up; ended: {dead}; {outputs}")
            time.sleep(0.02)


def _write_closed(path: Path, content: bytes) -> None:
    """Write a file that its user alone may read: munge and slurmdbd refuse others."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(content)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [int(item.getsockname()[1]) for item in sockets]
    finally:
        for item in sockets:
            item.close()


def _open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
