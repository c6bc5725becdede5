"""Seconds from process start to a refused and to an accepted configuration: our `main` compared with a bare Hydra app.

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

from benchmarks.bare_app import count_choices, count_settings, write_bare_app
from benchmarks.ratios import HEADER, Times, table

GOAL = 1.2
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
ACCEPTED = ["steps=100", "optim.lr=0.5"]
REFUSED = ["stepz=100", "optim.lr=0.5"]


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
        bare, ours = write_bare_app(folder), write_our_app(folder)
        make_repository(folder)
        cases = {"refused": (REFUSED, 1, 2), "accepted": (ACCEPTED, 0, 0)}
        times: dict[str, list[tuple[Times, Times]]] = {case: [] for case in cases}
        for number in range(-1, runs):
            for case, (overrides, bare_code, our_code) in cases.items():
                # Alternate the order, so that drift of the machine hits both. The first pair warms the caches.
                order = (False, True) if number % 2 else (True, False)
                pair = {
                    is_ours: once(
                        ours if is_ours else bare, overrides, ours=is_ours, exit_code=our_code if is_ours else bare_code
                    )
                    for is_ours in order
                }
                if number >= 0:
                    times[case].append((pair[False], pair[True]))
    groups, choices = count_choices()
    print(f"{count_settings()} settings, {groups} groups of {choices} choices; medians of {runs} alternating runs")
    for case, pairs in times.items():
        print(f"seconds to {case}", HEADER, *table(pairs), sep="\n")
    print(f"goal: at most {GOAL}")


if __name__ == "__main__":
    main()
