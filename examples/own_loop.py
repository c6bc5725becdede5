"""The builders in a loop of your own, without the Runner: digits, in one process or in several.

    python examples/own_loop.py
    torchrun --nproc-per-node 2 examples/own_loop.py parallel=fsdp

What only the Runner does (checkpoints, accumulation, loss scaling for fp16, ...) has no effect here.
"""

from __future__ import annotations

import danling_conf


@danling_conf.main(config_path="../conf", config_name="own_loop")
def train(config: danling_conf.RunnerConfig) -> float:
    """Train; returns the accuracy."""
    from itertools import islice

    import torch
    import torch.nn.functional as F

    from danling_conf import builders
    from danling_conf.topology.rank_environment import SINGLE
    from models.mlp import MLP, MLPConfig
    from tasks.digits import digits

    # Where this process stands: `hydra.utils.instantiate(config.parallel)()` makes the mesh as well.
    ranks, layout = builders.started_rank() or SINGLE, builders.layout_of(config)
    kind = builders.device_type(config.parallel.mesh_device_type)
    here = builders.local_device(kind, ranks.local_rank)
    if layout.world_size > 1 or layout.fsdp:
        builders.start_process_group(config.comm, kind)
    world = builders.make_mesh(layout, kind)
    data_rank, data_degree = builders.data_rank_and_degree(world)

    # Built on the meta device, compiled, under FSDP2 or DDP, with the weights of a plain call. Parts of it
    # can be had alone: `builders.shard(net, config.fsdp, world)`, or `instantiate(config.fsdp)(net, mesh=world)`.
    assembled = builders.assemble(
        lambda: MLP(MLPConfig()),
        layout=layout,
        mesh=world,
        device=here,
        seed=config.seed,
        precision=config.precision,
        fsdp=config.fsdp,
        compile=config.compile,
        activation_checkpointing=config.activation_checkpointing,
    )
    net = assembled.module
    data = digits(val_fraction=0.2)
    shares = {"data_rank": data_rank, "data_degree": data_degree, "seed": config.seed}
    loader = builders.make_dataloader(data["train"], config.dataloader, "train", **shares)
    steps = config.steps or config.epochs * len(loader)
    optim = builders.make_optimizer(net, config.optim)  # or hydra.utils.instantiate(config.optim)(net)
    by_step = builders.scheduler_interval(config.scheduler) == "step"
    advances = steps if by_step else -(-steps // len(loader))
    schedule = builders.make_scheduler(optim, config.scheduler, advances, metric_mode="max")

    step = 0
    while step < steps:
        net.train()
        builders.set_epoch(loader, step // len(loader))
        for images, labels in islice(loader, steps - step):
            with builders.autocast(None if config.fsdp.enabled else config.precision, kind):
                loss = F.cross_entropy(net(images.to(here)), labels.to(here))
            loss.backward()
            if config.max_grad_norm is not None:
                builders.clip(net.parameters(), config.max_grad_norm)
            optim.step()
            optim.zero_grad()
            if schedule is not None and by_step:
                schedule.step()
            step += 1
        net.eval()
        with torch.no_grad():
            images, labels = (item.to(here) for item in data["val"].tensors)  # all of them on every rank
            accuracy = (net(images).argmax(dim=1) == labels).float().mean().item()
        if schedule is not None and not by_step:
            schedule.step(*([accuracy] if builders.is_metric_driven(config.scheduler) else []))
        if ranks.main:
            print(f"step={step} lr={optim.param_groups[0]['lr']:.2e} val.accuracy={accuracy:.4f}")
    return accuracy


if __name__ == "__main__":
    train()
