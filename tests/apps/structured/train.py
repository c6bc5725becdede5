"""An app of structured configs: dataclasses in Hydra's ConfigStore, and one that derives from ours."""

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore

import danling_conf


@dataclass
class NetConfig:
    depth: int = 2


@dataclass
class MyModelConfig:
    width: int = 8
    name: str = "mlp"
    net: NetConfig = field(default_factory=NetConfig)


@dataclass
class WideConfig(MyModelConfig):
    width: int = 64


@dataclass
class TrainerConfig:
    max_epochs: int = 3


@danling_conf.register
@dataclass(kw_only=True)
class AppConfig(danling_conf.RunnerConfig):
    """Ours, with a model and a trainer of the app's own."""

    model: MyModelConfig = field(default_factory=MyModelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


store = ConfigStore.instance()
store.store(group="model", name="wide", node=WideConfig)
store.store(group="trainer", name="short", node=TrainerConfig(max_epochs=1))
