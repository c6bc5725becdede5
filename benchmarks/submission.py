"""Seconds from the command to the last job in the queue: hydra/launcher=danling_slurm beside hydra-submitit-launcher.

Run it as `python benchmarks/submission.py`, where slurmctld, slurmd and munge are installed: it starts a private Slurm.
Jobs are held, so that none starts. See benchmarks/README.md for what is compared, and how.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.slurm_cluster import Cluster

OURS = """
import danling_conf

@danling_conf.main()
def train(config):
    pass

train()
"""
THEIRS = """
import hydra

@hydra.main(version_base=None, config_name="danling")
def train(config):
    pass

train()
"""
HOLD = "+hydra.launcher.additional_parameters.hold=true"


def seconds(cluster: Cluster, script: Path, launcher: str, count: int) -> float:
    """Seconds until Slurm has all jobs of a sweep over learning rates; they are removed again."""
    rates = ",".join(f"{index + 1}e-5" for index in range(count))
    command = [sys.executable, str(script), "-m", f"hydra/launcher={launcher}", HOLD, "steps=10", f"optim.lr={rates}"]
    began = time.monotonic()
    with open(script.with_suffix(".out"), "w") as output:
        client = subprocess.Popen(
            command, cwd=script.parent, stdout=output, stderr=output, env={**os.environ, **cluster.environment}
        )
    try:
        while cluster.run("squeue", "-h", "-r", "--states=PENDING", "-o", "%i").count("\n") < count:
            if client.poll() is not None:
                raise RuntimeError(f"{launcher} ended: {script.with_suffix('.out').read_text()[-2000:]}")
            time.sleep(0.02)
        return time.monotonic() - began
    finally:
        client.kill()
        client.wait()
        cluster.run("scancel", "--user", str(os.getuid()))
        while cluster.run("squeue", "-h", "--states=PENDING") != "":
            time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, nargs="+", default=[100, 1000], help="sizes of the sweep")
    arguments = parser.parse_args()
    print("| jobs | hydra-submitit-launcher | ours | ratio | ours, ms a job |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        for name, content in (("ours.py", OURS), ("theirs.py", THEIRS)):
            (root / name).write_text(content)
        with Cluster(root / "cluster") as cluster:
            for count in arguments.jobs:
                theirs = seconds(cluster, root / "theirs.py", "submitit_slurm", count)
                ours = seconds(cluster, root / "ours.py", "danling_slurm", count)
                print(
                    f"| {count} | {theirs:.1f} s | {ours:.1f} s | {ours / theirs:.2f} | {1000 * ours / count:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
