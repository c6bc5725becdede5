"""Seconds from process start to a refused and an accepted configuration and to the help: our `main` beside plain Hydra.

Run it as `python benchmarks/startup.py`. See benchmarks/README.md for what is compared, and how.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bare_app import count_choices, count_settings, write_bare_app, write_smallest_app
from benchmarks.ratios import HEADER, Times, table

GOAL = "at most 1.15"
PACKAGES = sysconfig.get_path("purelib")
REPOSITORY = str(Path(__file__).resolve().parents[1])

OURS = """
import os
import danling_conf

@danling_conf.main(config_path="our_conf", config_name="app")
def train(config):
    assert config.steps == 100 and config.optim.lr == 0.5 and config.parallel.axes.replicate == 1
    os._exit(0)

train()
"""
CASES = {
    "refused": (["stepz=100", "optim.lr=0.5"], 1, 2),
    "accepted": (["steps=100", "optim.lr=0.5"], 0, 0),
    "help": (["--help"], 0, 0),
}
"""Command lines, and the exit codes of Hydra and of ours."""


def write_our_app(folder: Path) -> Path:
    """An app of ours that starts from the base config, as a user's does."""
    (folder / "our_conf").mkdir()
    (folder / "our_conf" / "app.yaml").write_text("defaults:\n  - danling\n  - _self_\n")
    script = folder / "ours.py"
    script.write_text(OURS)
    return script


def make_repository(folder: Path) -> None:
    """Scripts live in repositories, and ours records their state: a part of its start."""
    if shutil.which("git"):
        who = ["-c", "user.name=benchmark", "-c", "user.email=benchmark@localhost"]
        for command in (["init", "--quiet"], ["add", "."], [*who, "commit", "--quiet", "--message", "benchmark"]):
            subprocess.run(["git", "-C", str(folder), *command], check=True)


def once(script: Path, overrides: list[str], *, ours: bool, exit_code: int) -> Times:
    """Wall-clock and CPU seconds of one process, its children's included."""
    # -S ignores the .pth file of our editable install, so that the bare app's Hydra does not find our plugin.
    path = [REPOSITORY, PACKAGES] if ours else [PACKAGES]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-S", str(script), *overrides],
        cwd=script.parent,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != exit_code:
        raise RuntimeError(f"{script.name} {overrides} ended with {process.returncode}:\n{errors.decode()}")
    return seconds, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="runs of each app and outcome")
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        apps = {"smallest": write_smallest_app(folder), "bare": write_bare_app(folder), "ours": write_our_app(folder)}
        make_repository(folder)
        times: dict[str, list[dict[str, Times]]] = {case: [] for case in CASES}
        for number in range(-1, runs):
            for case, (overrides, their_code, our_code) in CASES.items():
                # Alternate the order, so that drift of the machine hits all. The first round warms the caches.
                order = list(apps) if number % 2 else list(reversed(apps))
                seen = {
                    app: once(
                        apps[app], overrides, ours=app == "ours", exit_code=our_code if app == "ours" else their_code
                    )
                    for app in order
                }
                if number >= 0:
                    times[case].append(seen)
    groups, choices = count_choices()
    print(f"{count_settings()} settings, {groups} groups of {choices} choices; medians of {runs} alternating runs")
    for case, rounds in times.items():
        for other in ("smallest", "bare"):
            pairs = [(seen[other], seen["ours"]) for seen in rounds]
            print(f"seconds to {case}, beside the {other} app", HEADER, *table(pairs), sep="\n")
    print(f"goal: {GOAL} beside the smallest app")


if __name__ == "__main__":
    main()
