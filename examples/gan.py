"""Two models and two optimizers in a loop of your own: a GAN that learns to draw digits, in one process or in several.

    python examples/gan.py
    python examples/gan.py parallel=fsdp2 dataloader.batch_size=32 accum_steps=2
    python examples/gan.py resume=experiments/lin/exp/<run id> steps=600

A run that a signal stops saves first and says how to resume it; a resumed run continues bit by bit. The training does
not depend on the layout: the same global batch under `ddp2` or `fsdp2` leads to the same weights as in one process.
What only the Runner does (evaluation, trackers, loss scaling for fp16, ...) has no effect here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import danling_conf
from danling_conf.schema.optim import OptimConfig


@danling_conf.register
@dataclass(kw_only=True)
class GanConfig(danling_conf.RunnerConfig):
    """Settings of a run, and of the pair of models."""

    noise: int = 16
    """Width of the generator's input."""
    width: int = 128
    """Width of both models."""
    discriminator_optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer of the discriminator; `optim` is the generator's."""


@danling_conf.main(config_path="../conf", config_name="gan")
def train(config: GanConfig) -> float:
    """Train; returns the discriminator's last loss, which is 1.39 where it can only guess."""
    import torch
    from torch import Tensor, nn
    from torch.nn.functional import softplus

    from danling_conf import builders
    from models.mlp import MLP, MLPConfig
    from tasks.digits import PIXELS, digits

    world = builders.join(config)  # the ranks, their mesh, and the run's directory

    def build(inputs: int, outputs: int, seed: int) -> nn.Module:
        """A model under the layout, with weights that depend on the seed alone."""
        settings = MLPConfig(inputs=inputs, classes=outputs, width=config.width)
        return builders.assemble(
            lambda: MLP(settings), layout=world.layout, mesh=world.mesh, device=world.device, seed=seed,
            precision=config.precision, fsdp=config.fsdp, compile=config.compile,
            activation_checkpointing=config.activation_checkpointing,
        ).module  # fmt: skip

    seed, shares = world.attempt.seed, {"data_rank": world.data_rank, "data_degree": world.data_degree}
    generator, discriminator = build(config.noise, PIXELS, seed), build(PIXELS, 1, seed + 1)
    of_generator = builders.make_optimizer(generator, config.optim)
    of_discriminator = builders.make_optimizer(discriminator, config.discriminator_optim)
    loader = builders.make_dataloader(digits(0.2)["train"], config.dataloader, "train", seed=seed, **shares)
    batches = builders.Batches(loader, world.device)

    def noise(count: int, number: int) -> Tensor:
        """This rank's share of a batch's noise. The number decides all of it, so that every layout draws the same."""
        source = torch.Generator().manual_seed(seed + number)
        whole = torch.randn(count * world.data_degree, config.noise, generator=source)
        return whole[world.data_rank :: world.data_degree].to(world.device)

    def autocast():
        return builders.autocast(None if config.fsdp.enabled else config.precision, world.device.type)

    with builders.Checkpoints(
        config, world, batches=batches,
        models={"generator": generator, "discriminator": discriminator},
        optimizers={"generator": of_generator, "discriminator": of_discriminator},
    ) as checkpoints:  # fmt: skip
        loss = torch.tensor(float("nan"))
        for step in range(checkpoints.restore(), config.steps):
            reals = [next(batches)[0] for _ in range(config.accum_steps)]
            first = 2 * step * config.accum_steps  # number of the first noise of this step

            # The discriminator tells digits from drawings. It sees both in one call: DDP takes one for each backward.
            for index, real in enumerate(reals):
                with builders.accumulate(discriminator, last=real is reals[-1]), autocast():
                    with torch.no_grad():
                        drawn = generator(noise(len(real), first + 2 * index))
                    judged_real, judged_drawn = discriminator(torch.cat([real, drawn])).float().chunk(2)
                    loss = softplus(-judged_real).mean() + softplus(judged_drawn).mean()
                    (loss / config.accum_steps).backward()
            of_discriminator.step()
            of_discriminator.zero_grad()

            # The generator makes drawings that the discriminator takes for digits.
            for index, real in enumerate(reals):
                last = real is reals[-1]
                with builders.accumulate(generator, last=last), builders.accumulate(discriminator, last=last):
                    with autocast():
                        drawn = generator(noise(len(real), first + 2 * index + 1))
                        fooled = softplus(-discriminator(drawn).float()).mean()
                    (fooled / config.accum_steps).backward()
            of_generator.step()
            of_generator.zero_grad()
            of_discriminator.zero_grad()  # the generator's loss left gradients there as well

            checkpoints.after_step(step + 1)
            if world.ranks.main and (step + 1) % (config.log_interval or 20) == 0:
                print(f"step={step + 1} discriminator={loss.item():.4f} generator={fooled.item():.4f}")
    if world.ranks.main:
        print(f"run={world.attempt.run_directory}")
    return loss.item()


if __name__ == "__main__":
    train()
