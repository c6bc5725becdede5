"""Commands on a disk that becomes full: `unshare -rm python -m tests.crash.full FOLDER` prints JSON.

In a mount namespace of its own, where a small tmpfs is the workspace.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from danling_conf.records.state import state_of
from tests.crash.disks import mount
from tests.support.commands import REPOSITORY, run, runs

APP = REPOSITORY / "tests" / "support" / "filling_app.py"
CASES = {
    "without checkpoints": ["checkpoint.load_only=true"],
    "with checkpoints": ["checkpoint.interval=1"],
}


def main(folder: Path) -> None:
    for name, settings in CASES.items():
        workspace = folder / name
        workspace.mkdir()
        mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(workspace))
        command = [APP, "steps=60", "dataloader.batch_size=4", "log_interval=1", "heartbeat.interval_seconds=0.1",
                   f"workspace_root={workspace}", *settings]  # fmt: skip
        done = run(command, cwd=folder, env={"PYTHONPATH": str(REPOSITORY)})
        (made,) = runs(workspace)
        state = state_of(made)
        print(
            json.dumps(
                {"case": name, "code": done.code, "out": done.out, "err": done.err, "state": asdict(state)},
            ),
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
