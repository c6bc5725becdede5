"""What submitit runs in every task of a job: the app's script, told which job it is a rank of."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from danling_conf.records.job_file import CLUSTER_VARIABLE, JOB_VARIABLE, JobFile
from danling_conf.records.stopped import note_early_signals


def run_task(job_file: str) -> None:
    """Run one rank of a job; submitit pickles the call when the job is submitted."""
    # In place of submitit's handlers, which requeue on one signal only and save nothing.
    note_early_signals()
    job = JobFile.read(Path(job_file))
    os.chdir(job.directory)
    os.environ[JOB_VARIABLE], os.environ[CLUSTER_VARIABLE] = job_file, "slurm"
    see_own_devices(job.content["shape"], job.content["launcher"])
    words = job.words
    if words[0] == "-m":
        sys.path[0] = job.directory
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(words[0]).parent)
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def see_own_devices(shape: Mapping[str, Any], launcher: Mapping[str, Any]) -> None:
    """A job without GPUs must not take those of others, which it may see; and a rank uses one device, the first of its
    own."""
    if launcher["gpus_per_task"]:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.partition(",")[0]
    elif not shape["gpus_per_node"] and launcher["gres"] is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
