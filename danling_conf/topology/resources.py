"""What a layout needs of a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from danling_conf.schema.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Nodes and tasks of one job; one task a device."""

    nodes: int
    tasks_per_node: int


def resources_for(layout: Layout, devices_per_node: int) -> Resources:
    """Nodes and tasks for a layout on nodes of `devices_per_node` devices.

    Raises ValueError when the layout's ranks cannot fill nodes evenly.
    """
    if devices_per_node < 1:
        raise ValueError(f"a node has at least one device, not {devices_per_node}")
    nodes = -(-layout.world_size // devices_per_node)
    if layout.world_size % nodes:
        raise ValueError(f"{layout.world_size} ranks do not divide evenly over {nodes} nodes of {devices_per_node}")
    return Resources(nodes=nodes, tasks_per_node=layout.world_size // nodes)
