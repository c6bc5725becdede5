"""Data, losses and loops that nobody here made, on several ranks: what one process trains, or one refusal on all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from torchmetrics.classification import MulticlassAccuracy

from danling_conf import ConfigRefused, Runner
from danling_conf.groups.layout_names import parse_layout
from examples.models.decoder import Decoder, DecoderConfig
from tests.support.resumed_runs import Killed, settings_of, whole_weights
from tests.support.small import CLASSES, Net, Pairs, equal, loss, runner
from tests.support.spawn import run

pytestmark = pytest.mark.slow

DATA_LAYOUTS = ("ddp2", "fsdp2")
LENGTH, VOCABULARY = 8, 16


def layout_settings(name: str) -> dict[str, Any]:
    layout = parse_layout(name)
    return {"parallel": {"axes": layout.degrees()}, "fsdp": {"enabled": layout.fsdp}}


def model() -> Net:
    torch.manual_seed(5)
    return Net()


def by_hand(steps: list[list[Any]]) -> dict[str, Tensor]:
    """Weights after optimizer steps on the means of these batches."""
    trained = model()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    for batches in steps:
        for batch in batches:
            (loss(trained(batch[0]), batch) / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return trained.state_dict()


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.allclose(found[name], value, atol=1e-6) for name, value in expected.items()
    )


# Exceptions that are survived


class Breaks(torch.autograd.Function):
    """Raises in the backward pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise torch.OutOfMemoryError("as if")


PLACES = ("forward", "loss", "backward", "middle of the backward")


class Failing(Net):
    """Raises where it is asked to."""

    place: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if self.place == "forward":
            raise torch.OutOfMemoryError("as if")
        if self.place == "middle of the backward":
            hidden = Breaks.apply(hidden)
        return self.second(hidden)


def survive(root: str, layout: str) -> dict[str, dict[str, Tensor]]:
    """Train six batches of which the fourth fails, two an optimizer step; weights by place of the failure."""
    rank, pairs, found = dist.get_rank(), Pairs(48), {}
    for place in PLACES:
        torch.manual_seed(5)
        trained = Failing()
        ours = runner(root, {"steps": 99, "accum_steps": 2, **layout_settings(layout)})

        def of(output: Tensor, batch: Any, trained: Failing = trained) -> Tensor:
            if trained.place == "loss":
                raise torch.OutOfMemoryError("as if")
            value = loss(output, batch)
            return Breaks.apply(value) if trained.place == "backward" else value

        ours.prepare(trained, {"train": pairs}, loss=of)
        raised = 0
        for number in range(6):
            rows = slice(number * 8 + rank, number * 8 + 8, 2)
            trained.place = place if number == 3 else None
            try:
                ours.step((pairs.inputs[rows], pairs.targets[rows]))
            except torch.OutOfMemoryError:
                raised += 1
        assert (raised, ours.global_step) == (1, 2)
        found[place] = whole_weights(ours.model)
        ours.close()
    return found


@pytest.mark.parametrize("layout", DATA_LAYOUTS)
def test_a_step_that_all_ranks_survive_leaves_nothing_behind(tmp_path: Any, layout: str) -> None:
    pairs = Pairs(48)
    batches = [(pairs.inputs[at : at + 8], pairs.targets[at : at + 8]) for at in range(0, 48, 8)]
    # The third was accumulated when the fourth failed: both are left out.
    expected = by_hand([batches[:2], batches[4:]])
    first = run(survive, 2, str(tmp_path), layout)[0]
    for place in PLACES:
        assert close(first[place], expected), place


# Iterable data


class Stream(IterableDataset[Any]):
    """Samples of `Pairs` without a length; a rank has every `num_shards`-th of them."""

    def __init__(self, size: int, num_shards: int = 1, index: int = 0) -> None:
        self.size, self.num_shards, self.index = size, num_shards, index

    def shard(self, num_shards: int, index: int) -> Stream:
        return Stream(self.size, num_shards, index)

    def __iter__(self) -> Iterator[Any]:
        pairs = Pairs(max(self.size, 1))
        return iter([pairs[index] for index in range(self.index, self.size, self.num_shards)])


def streamed(root: str, layout: str) -> dict[str, Any]:
    """Train on eleven samples, one a rank and micro-batch, and evaluate one; by remainder, whole and resumed."""
    found: dict[str, Any] = {}
    for remainder in ("drop", "step"):
        settings = {"epochs": 3, "accum_steps": 2, "accum_remainder": remainder, "checkpoint": {"interval": 1},
                    "scheduler": {"type": "constant"}, "optim": {"type": "sgd", "lr": 0.1},
                    "dataloader": {"batch_size": 1}, **layout_settings(layout)}  # fmt: skip
        whole = stream_run(f"{root}/{remainder}", settings)
        part = stream_run(f"{root}/{remainder}", settings, kill_at=4)
        resumed = stream_run(f"{root}/{remainder}", {**settings, "resume": part["run"]})
        found[remainder] = {"whole": whole, "resumed": resumed}
    return found


def stream_run(root: str, settings: dict[str, Any], kill_at: int | None = None) -> dict[str, Any]:
    ours = Runner(settings_of(root, settings))
    metrics = {"accuracy": MulticlassAccuracy(CLASSES, average="micro")}
    try:
        ours.prepare(model(), {"train": Stream(11), "val": Stream(1)}, loss=loss, metrics=metrics)
        began = ours.global_step
        for batch in ours.batches("train"):
            ours.step(batch)
            if ours.global_step == kill_at:
                raise Killed
        ours.finish()
    except Killed:
        pass
    finally:
        ours.close()
    return {"weights": whole_weights(ours.model), "results": ours.results, "step": ours.global_step, "began": began,
            "run": str(ours.world.attempt.run_directory)}  # fmt: skip


@pytest.mark.parametrize("layout", DATA_LAYOUTS)
def test_iterable_data_of_uneven_shares_trains_as_one_process_and_resumes_exactly(tmp_path: Any, layout: str) -> None:
    """Six samples on rank 0, five on rank 1: five micro-batches, two a step; the only held-out sample is rank 0's."""
    pairs = Pairs(11)
    micro = [(pairs.inputs[at : at + 2], pairs.targets[at : at + 2]) for at in range(0, 10, 2)]
    epochs = {"drop": [micro[:2], micro[2:4]], "step": [micro[:2], micro[2:4], micro[4:]]}
    ranks = run(streamed, 2, str(tmp_path), layout)
    for remainder, steps in epochs.items():
        whole, resumed = (ranks[0][remainder][name] for name in ("whole", "resumed"))
        expected = by_hand(steps * 3)
        assert close(whole["weights"], expected)
        assert whole["step"] == resumed["step"] == 3 * len(steps)
        assert resumed["began"] == len(steps)
        assert equal(resumed["weights"], whole["weights"])
        only = Pairs(1)
        trained = model()
        trained.load_state_dict(expected)
        value = loss(trained(only.inputs), (only.inputs, only.targets)).item()
        for rank in ranks:
            assert rank[remainder]["whole"]["results"]["val.loss"] == pytest.approx(value, rel=1e-4)


# Refusals


def unequal(rank: int) -> dict[str, Any]:
    return {"datasets": {"train": Pairs(24 + rank)}, "loss": loss}


def other_splits(rank: int) -> dict[str, Any]:
    return {"datasets": {"train": Pairs(), **({"val": Pairs()} if rank else {})}, "loss": loss}


def empty_on_one(rank: int) -> dict[str, Any]:
    return {"datasets": {"train": Pairs(), "val": [] if rank else Pairs()}, "loss": loss}


def vector_on_one(rank: int) -> dict[str, Any]:
    def of(output: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(output, batch[1], reduction="none" if rank else "mean")

    return {"datasets": {"train": Pairs()}, "loss": of}


def without_a_batch(rank: int) -> dict[str, Any]:
    return {"datasets": {"train": Stream(1)}, "loss": loss}


def metric_on_one(rank: int) -> dict[str, Any]:
    def inputs(output: Tensor, batch: Any) -> tuple[Any, ...]:
        return output, (batch[0] if rank else batch[1])

    return {"datasets": {"train": Pairs(), "val": Pairs(9)}, "loss": loss, "metric_inputs": inputs,
            "metrics": {"accuracy": MulticlassAccuracy(CLASSES)}}  # fmt: skip


def numpy_inputs(rank: int) -> dict[str, Any]:
    return {"datasets": {"train": [(x.double(), y) for x, y in Pairs()]}, "loss": loss}


def labels_of_one(rank: int) -> dict[str, Any]:
    wrong = [(x, y + CLASSES * rank) for x, y in Pairs()]
    return {"datasets": {"train": Pairs(), "val": wrong}, "loss": loss}


def gathering(output: Tensor, batch: Any) -> Tensor:
    """Each output is to be more like itself than like any other of any rank."""
    ranks = [torch.empty_like(output) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, output.detach())
    ranks[dist.get_rank()] = output
    every = torch.cat(ranks)
    mine = torch.arange(len(output)) + dist.get_rank() * len(output)
    return nn.functional.cross_entropy(output @ every.T, mine)


def uneven_val(rank: int) -> dict[str, Any]:
    return {"datasets": {"train": Pairs(), "val": Pairs(9)}, "loss": gathering}


def one_for_two(rank: int) -> dict[str, Any]:
    return {"datasets": {"train": Pairs(), "val": Pairs(1)}, "loss": gathering}


GATHERS = "dataloader.val.drop_last: the loss communicates over the ranks"

REFUSED: dict[str, tuple[Callable[[int], dict[str, Any]], str]] = {
    "sizes": (unequal, "datasets.train: it has 24 samples on rank 0 and 25 samples on rank 1"),
    "splits": (other_splits, "datasets: rank 1 has the splits train, val, and rank 0 has train"),
    "empty": (empty_on_one, "datasets.val: the split has no samples"),
    "loss": (vector_on_one, "loss: it returned a tensor of shape (4,) and torch.float32"),
    "no batch": (without_a_batch, "datasets.train: it returned no batch on some rank"),
    "metric": (metric_on_one, "metrics.accuracy: its update cannot take (a tensor of shape (4, 3)"),
    "float64": (numpy_inputs, "datasets.train: in first (Linear), small.py"),
    "labels": (labels_of_one, "loss: in small.py"),
    "uneven": (uneven_val, GATHERS),
    "one for two": (one_for_two, GATHERS),
}


def refusals(root: str) -> dict[str, str]:
    found = {}
    for name, (make, _) in REFUSED.items():
        ours = runner(root, layout_settings("ddp2"))
        with pytest.raises(ConfigRefused) as refused:
            ours.fit(Net, **make(dist.get_rank()))
        assert ours.global_step == 0
        (violation,) = refused.value.violations
        found[name] = f"{violation.path}: {violation.rule}"
        dist.barrier()  # nobody is left behind
    ours = runner(root, layout_settings("ddp2"))
    with pytest.raises(ConfigRefused, match="the loss communicates"):  # how much there is shows at its end
        ours.fit(Net, {"train": Pairs(), "val": Stream(13)}, loss=gathering)
    for size, drop_last in ((8, False), (9, True)):
        ours = runner(
            root, {**layout_settings("ddp2"), "dataloader": {"batch_size": 4, "val": {"drop_last": drop_last}}}
        )
        ours.fit(Net, {"train": Pairs(), "val": Pairs(size)}, loss=gathering)
        assert ours.results["val.loss"] > 0
    return found


def test_what_one_rank_finds_all_ranks_refuse(tmp_path: Any) -> None:
    ranks = run(refusals, 2, str(tmp_path))
    for found in ranks:
        for name, (_, said) in REFUSED.items():
            assert found[name].startswith(said)


# Layouts that share a model


def tokens(index: int) -> dict[str, Any]:
    drawn = torch.randint(VOCABULARY, (LENGTH + 1,), generator=torch.Generator().manual_seed(index))
    return {"id": f"sequence-{index}", "scale": torch.tensor(1.0), "tokens": drawn[:-1], "labels": drawn[1:]}


class TokenStream(IterableDataset[Any]):
    def __init__(self, size: int, num_shards: int = 1, index: int = 0) -> None:
        self.indices = range(index, size, num_shards)

    def shard(self, num_shards: int, index: int) -> TokenStream:
        return TokenStream(self.indices.stop, num_shards, index)

    def __iter__(self) -> Iterator[Any]:
        return map(tokens, self.indices)


class Tokens(Dataset[Any]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return tokens(index)


def of_tokens(output: Tensor, batch: Any) -> Tensor:
    assert len(batch["id"]) == len(output)  # cut with the tensors
    return nn.functional.cross_entropy(output.flatten(0, 1), batch["labels"].flatten())


class PerToken(MulticlassAccuracy):
    def update(self, output: Tensor, targets: Tensor) -> None:
        super().update(output.flatten(0, 1), targets.flatten())


def shared(root: str, name: str, train: type, val: type) -> dict[str, Any]:
    """Train a decoder on batches that begin with strings."""
    degree = parse_layout(name).data_degree
    settings = {"steps": 3, "dataloader": {"batch_size": 4 // degree, "train": {"shuffle": None}},
                "batch": {"inputs": {"tokens": "tokens"}, "targets": ["labels"]}}  # fmt: skip
    if train is Tokens:
        settings["dataloader"]["train"]["shuffle"] = False  # type: ignore[index]
    ours = runner(root, {**settings, **layout_settings(name)})
    config = DecoderConfig(width=16, depth=2, heads=2, hidden=16, context=LENGTH, vocab_size=VOCABULARY)
    metrics = {"accuracy": PerToken(VOCABULARY, average="micro")}
    ours.fit(lambda: Decoder(config), {"train": train(64), "val": val(5)}, loss=of_tokens, metrics=metrics)
    return ours.results


@pytest.mark.parametrize("layout", ["cp2", "pp2", "fsdp2_tp2"])
def test_batches_of_any_container_and_iterable_data_under_axes_that_share_a_model(tmp_path: Any, layout: str) -> None:
    expected = shared(str(tmp_path), "single", Tokens, Tokens)
    world = parse_layout(layout).world_size
    for found in run(shared, world, str(tmp_path), layout, TokenStream, TokenStream):
        assert found == pytest.approx(expected, rel=1e-5)


def pipelined_refusal(root: str, detached: bool) -> str:
    def of(output: Tensor, batch: Any) -> Any:
        value = nn.functional.cross_entropy(output.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        return value.mean().detach() if detached else value

    settings = {"steps": 3, "dataloader": {"batch_size": 4}, "batch": {"inputs": ["tokens"]}}
    ours = runner(root, {**settings, **layout_settings("pp2")})
    config = DecoderConfig(width=16, depth=2, heads=2, hidden=16, context=LENGTH, vocab_size=VOCABULARY)
    with pytest.raises(ConfigRefused) as refused:
        ours.fit(lambda: Decoder(config), {"train": Tokens(64)}, loss=of)
    dist.barrier()
    return refused.value.report()


@pytest.mark.parametrize(("detached", "said"), [(False, "a tensor of shape (8,)"), (True, "without a gradient")])
def test_a_loss_that_only_the_last_stage_sees_is_refused_by_all(tmp_path: Any, detached: bool, said: str) -> None:
    for report in run(pipelined_refusal, 2, str(tmp_path), detached):
        assert said in report
