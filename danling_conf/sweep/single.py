"""Sweep of one job, made from a run that was started by itself, so that `resume` has one way to start runs and jobs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from danling_conf.config.identity import layout_name
from danling_conf.records.code import CodeIdentity, code_identity
from danling_conf.records.job_file import JobFile, Program
from danling_conf.records.reading import Fields, read_fields
from danling_conf.records.run_directory import newest_attempt
from danling_conf.records.state import state_of
from danling_conf.records.status import Status
from danling_conf.records.sweep_directory import SweepDirectory
from danling_conf.schema import Layout
from danling_conf.schema.files import FROZEN, JOB_FILE, RUN_FILE
from danling_conf.schema.printable import override, shell_line
from danling_conf.topology.violation import ConfigRefused, Violation


def sweep_for_run(run: Path) -> SweepDirectory:
    """A new sweep of one job on this machine: the run, as its newest attempt was configured.

    Raises:
        ConfigRefused: the run is live, or its records do not tell how it was started.
    """
    if state_of(run).status is Status.RUNNING:
        fix = f"see how it goes: {shell_line('danling-conf', 'runs', run)}"
        raise ConfigRefused([Violation("DIR", str(run), "the run is live", fix)])
    by_hand = f"start it with its own command and {shell_line(override('resume', run))}"
    attempt = newest_attempt(run)
    frozen = read_fields(attempt / FROZEN) if attempt is not None else Fields(run)
    argv, hydra = frozen.table("attempt").texts("command"), frozen.table("hydra")
    if not argv or not hydra or not _is_whole(frozen):
        rule = "its newest attempt has no record of how it was started"
        raise ConfigRefused([Violation("DIR", str(run), rule, by_hand)])
    directory = Path((hydra.table("runtime").text("cwd") or os.getcwd()).replace("\0", ""))
    script = directory / argv[0].replace("\0", "")
    if not script.is_file():
        rule = f"it was started by {script}, which no longer exists"
        raise ConfigRefused([Violation("DIR", str(run), rule, by_hand)])
    code = code_identity(script.parent)
    program = Program(argv=(str(script),), directory=directory, code_id=code.code_id)
    sweep = SweepDirectory(path=run.parent / "sweeps" / datetime.now().strftime("%Y%m%d-%H%M%S-%f"))
    try:
        _write(sweep, run, frozen.values, argv[1:], program, code)
    except OSError as error:
        fix = "resume as a user who may write there"
        raise ConfigRefused([Violation("DIR", str(run), f"it cannot be written: {error}", fix)]) from error
    return sweep


def _is_whole(frozen: Fields) -> bool:
    """Whether a frozen configuration has every value that `_write` reads."""
    config = frozen.table("config")
    axes = config.table("parallel").table("axes")
    degrees = [axes.integer(name) for name in Layout().degrees()]
    needed = (frozen.text("job_id"), config.table("checkpoint").text("dir_name"), frozen.texts("class"))
    known = {"steps", "epochs"} <= config.values.keys() and "enabled" in config.table("fsdp").values
    return known and all(needed) and all(degree is not None and degree > 0 for degree in degrees)


def _write(
    sweep: SweepDirectory,
    run: Path,
    frozen: Mapping[str, Any],
    overrides: list[str],
    program: Program,
    code: CodeIdentity,
) -> None:
    config, key = frozen["config"], str(frozen["job_id"])
    axes = config["parallel"]["axes"]
    layout = Layout(**{name: axes[name] for name in Layout().degrees()}, fsdp=bool(config["fsdp"]["enabled"]))
    saved = any((run / config["checkpoint"]["dir_name"]).glob("ckpt-*"))
    launcher = {"on_failure": "continue", "skip_refused": False, "parallel_jobs": None}
    content = {
        "key": key,
        "job": 0,
        "overrides": overrides,
        "program": program.to_json(),
        "binding": {"run_directory": str(run), "restore": str(run) if saved else None, "notes": []},
        "world_size": layout.world_size,
        "launcher": launcher,
        "shape": None,
        **{name: frozen[name] for name in ("job_id", "class", "config", "hydra")},
    }
    job = JobFile(path=sweep.path / "jobs" / key / JOB_FILE, content=content)
    job.folder.mkdir(parents=True)
    job.path.write_text(json.dumps(content, indent=1) + "\n")
    command = ["danling-conf", "resume", str(run)]
    sweep.write_request(command=command, program=program, code=code, cluster="local", launcher=launcher)
    sweep.ledger.add(
        key,
        job=0,
        job_id=key,
        config_id=read_fields(run / RUN_FILE).text("config_id") or "",
        status=Status.PLANNED,
        overrides=overrides,
        run=str(run),
        layout=layout_name(layout),
        steps=config["steps"],
        epochs=config["epochs"],
    )
