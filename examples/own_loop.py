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

    from danling_conf.components import dataloader, gradients, optimizer, precision, scheduler
    from danling_conf.parallel import device, mesh, model
    from danling_conf.parallel import process_group as processes
    from danling_conf.topology.layout import layout_of
    from danling_conf.topology.rank_environment import SINGLE, started_rank
    from models.mlp import MLP, MLPConfig
    from tasks.digits import digits

    # Where this process stands: `hydra.utils.instantiate(config.parallel)()` makes the mesh as well.
    ranks, layout = started_rank() or SINGLE, layout_of(config.parallel.axes, config.fsdp.enabled)
    kind = device.device_type(config.parallel.mesh_device_type)
    here = device.local_device(kind, ranks.local_rank)
    if layout.world_size > 1 or layout.fsdp:
        processes.start(config.comm, kind)
    world = mesh.make(layout, kind)
    data_rank, data_degree = mesh.data_rank_and_degree(world)

    # Built on the meta device, compiled, under FSDP2 or DDP, with weights that do not depend on the layout. Parts of it
    # can be had alone: `fsdp.shard(net, config.fsdp, world)`, or `instantiate(config.fsdp)(net, mesh=world)`.
    assembled = model.assemble(
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
    loader = dataloader.make(data["train"], config.dataloader, "train", **shares)
    steps = config.steps or config.epochs * len(loader)
    optim = optimizer.make(net, config.optim)  # or hydra.utils.instantiate(config.optim)(net)
    by_step = scheduler.interval_of(config.scheduler) == "step"
    advances = steps if by_step else -(-steps // len(loader))
    schedule = scheduler.make(optim, config.scheduler, advances, metric_mode="max")

    step = 0
    while step < steps:
        net.train()
        dataloader.set_epoch(loader, step // len(loader))
        for images, labels in islice(loader, steps - step):
            with precision.autocast(None if config.fsdp.enabled else config.precision, kind):
                loss = F.cross_entropy(net(images.to(here)), labels.to(here))
            loss.backward()
            if config.max_grad_norm is not None:
                gradients.clip(net.parameters(), config.max_grad_norm)
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
            schedule.step(*([accuracy] if scheduler.is_metric_driven(config.scheduler) else []))
        if ranks.main:
            print(f"step={step} lr={optim.param_groups[0]['lr']:.2e} val.accuracy={accuracy:.4f}")
    return accuracy


if __name__ == "__main__":
    train()
