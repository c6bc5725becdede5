"""The GPU script: what is promised of accelerators, tried on one card within eight minutes.

make gpu                                            # everything, on this machine's GPU
python -m tests.gpu --device cpu --size tiny    # the script itself, where there is no GPU
python -m tests.gpu main two_ranks              # some parts

Each part runs in a process of its own, under a time limit of its own, and stops no other. Parts are ordered by
importance. Each leaves a line of JSON in `results.jsonl` as soon as it ends, so that a script that is cut off loses
nothing; the exit code is 1 where one has failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.gpu.process import FAILED, NOT_RUN, PARTS, PASSED, Part, in_process

LIMIT_SECONDS = 8 * 60


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(part.name for part in PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of results and output")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds for all parts together")
    given = parser.parse_args(arguments)
    unknown = set(given.parts) - {part.name for part in PARTS}
    if unknown:
        parser.error(f"no part is named {', '.join(sorted(unknown))}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device; `--device cpu --size tiny` tries the script itself")
    given.out.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in PARTS if not given.parts or part.name in given.parts]
    deadline = time.monotonic() + given.limit
    print(f"{platform.node()}: {devices(given.device)}, torch {torch.__version__}, Python {platform.python_version()}")
    results = [one(part, given.device, given.size == "tiny", given.out, deadline) for part in chosen]
    counts = {word: sum(result["outcome"] == word for result in results) for word in (PASSED, FAILED, NOT_RUN)}
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    return 1 if counts[FAILED] else 0


def devices(kind: str) -> str:
    return torch.cuda.get_device_name() if kind == "cuda" else "CPU"


def one(part: Part, device: str, tiny: bool, out: Path, deadline: float) -> dict[str, Any]:
    """Run a part, append its result to `results.jsonl`, print its row."""
    began = time.monotonic()
    limit = min(part.seconds, deadline - began)
    if limit <= 0:
        outcome, figures = NOT_RUN, {"why": "the time for all parts is used up"}
    else:
        outcome, figures = in_process(part, device, tiny, out / f"{part.name}.txt", limit)
    result = {"part": part.name, "outcome": outcome, "seconds": round(time.monotonic() - began, 1), **figures}
    with open(out / "results.jsonl", "a") as file:
        file.write(json.dumps(result) + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(f"{part.name:<24} {outcome:<8} {result['seconds']:6.1f} s  {json.dumps(figures)}", flush=True)
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
