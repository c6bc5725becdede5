"""Cost of checkpoints: the pause of a save, throughput compared with torch's own, and the data loader, in one run.

Run it as `python benchmarks/checkpoints.py [FOLDER]`; FOLDER is on the disk that is measured. See benchmarks/README.md
for what is compared, and how.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import danling_conf
from danling_conf.checkpoint import sources, state
from danling_conf.checkpoint.manager import CheckpointManager
from danling_conf.components import dataloader
from danling_conf.schema import Layout
from danling_conf.schema.checkpoint import CheckpointConfig

GOAL = 0.1
ROUNDS = 7
WIDTH, DEPTH = 2048, 6
_OWN: dict[str, Any] = {"loader": None, "generators": {}}
_SHARED: dict[str, Any] = {"scheduler": None, "scaler": None, "runner": {}, "settings": {}}


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    """About 25 million parameters; with AdamW's moments 300 MB."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(16, WIDTH)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def timed(do: Callable[[], object]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def manager(folder: Path, backend: str, mode: str) -> CheckpointManager:
    section = CheckpointConfig(backend=backend, async_mode=mode)
    return CheckpointManager(section, folder / f"{backend}-{mode}", rank=0, layout=Layout(), layout_name="single")


def pauses(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """How long a save pauses training, and how much slower steps are while it is written."""
    print("pause of a save: seconds for which training stands still, and step time while it is written")
    print(
        f"{'':6}{'sync':>9}{'async':>9}{'ratio':>8}   {'quartiles of the pairs':24}{'step':>9}{'beside':>9}{'ratio':>8}"
    )
    for backend in ("file", "dcp"):
        managers = {mode: manager(folder, backend, mode) for mode in ("disabled", "async")}

        def save(mode: str, number: int, managers: dict[str, CheckpointManager] = managers) -> None:
            managers[mode].save(
                parts=[model],
                optimizer=optimizer,
                shared=dict(_SHARED),
                own=dict(_OWN),
                step=number,
                epoch=0,
                history=False,
            )

        found: dict[str, list[float]] = {"disabled": [], "async": [], "idle": [], "beside": []}
        save("async", 0)  # allocates the staging memory, once
        managers["async"].drain()
        for number in range(1, ROUNDS + 1):
            order = ["disabled", "async"] if number % 2 else ["async", "disabled"]
            for mode in order:
                found[mode].append(timed(lambda mode=mode, number=number: save(mode, number)))
                if mode == "async":
                    steps = []
                    while managers[mode].busy:
                        steps.append(timed(lambda: step(model, optimizer)))
                    managers[mode].drain()
                    found["beside"].append(statistics.median(steps) if steps else float("nan"))
                found["idle"].append(statistics.median(timed(lambda: step(model, optimizer)) for _ in range(5)))
        ratios = [mine / theirs for mine, theirs in zip(found["async"], found["disabled"], strict=True)]
        middle = {name: statistics.median(values) for name, values in found.items()}
        quartiles = "  ".join(f"{item:.3f}" for item in statistics.quantiles(ratios, n=4))
        print(
            f"{backend:6}{middle['disabled']:9.3f}{middle['async']:9.3f}{middle['async'] / middle['disabled']:8.3f}"
            f"   {quartiles:24}{middle['idle']:9.4f}{middle['beside']:9.4f}{middle['beside'] / middle['idle']:8.2f}"
        )
    print(f"goal: at most {GOAL} of the pause of a sync save blocks the loop\n")


def throughput(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """MB/s of saving and loading, compared with torch's own functions on the same tensors."""
    tensors = state.model_tensors([model]) | state.optimizer_tensors([model], optimizer)
    size = sum(item.nbytes for item in tensors.values()) / 1e6
    place = folder / "plain"

    def replaced(new: Path) -> None:
        """Remove the previous checkpoint after the new one is written, as ours does."""
        shutil.rmtree(place, ignore_errors=True)
        new.rename(place)

    def torch_save() -> None:
        new = folder / "new"
        new.mkdir()
        with open(new / "state.pt", "wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())
        replaced(new)

    def torch_load() -> None:
        found, targets = torch.load(place / "state.pt", weights_only=True), into()
        for name, item in found.items():
            targets[name].copy_(item)

    def dcp_save() -> None:
        dcp.save(tensors, checkpoint_id=folder / "new", no_dist=True)
        replaced(folder / "new")

    def into() -> dict[str, torch.Tensor]:
        return {name: torch.empty_like(item) for name, item in tensors.items()}

    theirs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "file": (torch_save, torch_load),
        "dcp": (dcp_save, lambda: dcp.load(into(), checkpoint_id=place, no_dist=True)),
    }
    print(f"throughput, MB/s, of {size:.0f} MB: torch.save with fsync and torch.load; dcp.save and dcp.load")
    print(f"{'':19}{'torch':>9}{'ours':>9}{'ratio':>8}   quartiles of the pairs' ratios")
    for backend in ("file", "dcp"):
        mine = manager(folder, backend, "disabled")
        found: dict[str, list[tuple[float, float]]] = {"save": [], "load": [], "verified load": []}
        for number in range(1, ROUNDS + 1):

            def save(number: int = number, mine: CheckpointManager = mine) -> None:
                mine.save(
                    parts=[model],
                    optimizer=optimizer,
                    shared=dict(_SHARED),
                    own=dict(_OWN),
                    step=number,
                    epoch=0,
                    history=False,
                )

            def load(mine: CheckpointManager = mine, backend: str = backend) -> None:
                path = mine.folder.path / "latest"
                source = sources.shards(path) if backend == "dcp" else sources.one_file(path / sources.STATE)
                source.load(into())

            def restore(mine: CheckpointManager = mine) -> None:
                mine.loader.restore(mine.folder.path / "latest", parts=[model], optimizer=optimizer, choose=False)

            their_save, their_load = theirs[backend]
            for name, ours, other in (
                ("save", save, their_save),
                ("load", load, their_load),
                ("verified load", restore, their_load),
            ):
                pair = (timed(other), timed(ours)) if number % 2 else (timed(ours), timed(other))[::-1]
                found[name].append(pair)
        for name, pairs in found.items():
            rates = [statistics.median(size / pair[which] for pair in pairs) for which in (0, 1)]
            quartiles = statistics.quantiles([other / mine_ for other, mine_ in pairs], n=4)
            shown = "  ".join(f"{item:.3f}" for item in quartiles)
            ratio = rates[1] / rates[0]
            print(f"{backend} {name:14}{rates[0]:9.0f}{rates[1]:9.0f}{ratio:8.2f}   {shown}")
    print("a load of ours is verified: every file's checksum is compared before anything is read\n")


def loading() -> None:
    """Microseconds per batch of our loader, compared with a plain StatefulDataLoader over the same data."""
    data = TensorDataset(torch.randn(6400, 16))
    config = danling_conf.compose(["steps=1", "dataloader.batch_size=32"])
    ours = dataloader.make(data, config.dataloader, "train")
    plain = StatefulDataLoader(data, batch_size=32, shuffle=True, drop_last=True)

    def epoch(loader: Any) -> None:
        for _ in loader:
            pass

    pairs = []
    for number in range(4 * ROUNDS):
        dataloader.set_epoch(ours, number)
        pair = (timed(lambda: epoch(plain)), timed(lambda: epoch(ours)))
        if number >= 2:
            pairs.append(pair)
    theirs, mine = (statistics.median(pair[which] for pair in pairs) / 200 * 1e6 for which in (0, 1))
    quartiles = "  ".join(f"{item:.3f}" for item in statistics.quantiles([b / a for a, b in pairs], n=4))
    print("loader, microseconds a batch of 32, no workers: plain StatefulDataLoader beside ours")
    print(f"{'':12}{theirs:9.0f}{mine:9.0f}{mine / theirs:8.2f}   {quartiles}")


def main() -> None:
    warnings.filterwarnings("ignore", message="torch.distributed is disabled|'set_vital' is deprecated")
    root = sys.argv[1] if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory(dir=root) as folder:
        model, optimizer = make()
        pauses(Path(folder), model, optimizer)
        throughput(Path(folder), model, optimizer)
    loading()


if __name__ == "__main__":
    main()
