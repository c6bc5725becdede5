"""Time of a collective: latency of its steps, and bytes over the bandwidth of the slowest link.

The volumes are those of Thakur, Rabenseifner and Gropp (Optimization of Collective Communication Operations in MPICH,
2005), as NCCL's tests state them (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md): of n ranks and
S bytes, (n - 1) / n of S for a gather, a scatter and an exchange, twice that for a sum by a ring. Latencies, and what
each protocol leaves of the bandwidth, are those by which NCCL itself chooses (https://github.com/NVIDIA/nccl,
src/graph/tuning.cc). A call takes the protocol that is fastest for its size, as NCCL does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from danling_conf.plan.figures import Collective
from danling_conf.topology.hardware import Cluster

_US = 1e-6


@dataclass(frozen=True)
class _Protocol:
    """Latencies in microseconds, and the share of the bandwidth that is left."""

    ring_base: float
    ring: tuple[float, float, float]
    """Of a step over NVLink, PCIe and the network."""
    ring_share: float
    tree_base: float
    tree: tuple[float, float, float]
    tree_share: float


_PROTOCOLS = (
    _Protocol(3.6, (0.47, 1.0, 2.7), 0.25, 4.4, (0.52, 1.0, 5.0), 0.9 / 3.8),
    _Protocol(10.0, (1.9, 2.5, 4.0), 0.92, 4.4, (1.2, 1.9, 8.5), 0.9 * 0.915),
    _Protocol(8.4, (3.4, 5.7, 9.6), 1.0, 0.0, (28.0, 28.0, 50.0), 0.9),
)
"""LL, LL128 and Simple."""
_NVLINK, _PCIE, _NETWORK = range(3)


def seconds(collective: Collective, cluster: Cluster) -> float:
    """Seconds of all calls of a collective in a step, one after another and with nothing beside them."""
    if not collective.count or collective.group_size <= 1:
        return 0.0
    size = collective.bytes / collective.count
    return collective.count * _call(collective.kind, size, collective.group_size, collective.stride, cluster)


def _call(kind: str, size: float, ranks: int, stride: int, cluster: Cluster) -> float:
    inside = cluster.in_node(ranks, stride)
    nodes = math.ceil(ranks / inside)
    bandwidth = bus_bandwidth(ranks, stride, cluster)
    near = _NVLINK if cluster.gpu.link_kind == "nvlink" else _PCIE
    if kind in ("send_recv", "broadcast"):
        protocol = _PROTOCOLS[2]
        return (protocol.ring_base + protocol.ring[_NETWORK if nodes > 1 else near]) * _US + size / bandwidth
    steps, across = (ranks - 1, nodes - 1) if kind != "all_reduce" else (2 * (ranks - 1), 2 * (nodes - 1))
    volume = size * steps / ranks
    times = []
    for protocol in _PROTOCOLS:
        latency = protocol.ring_base + (steps - across) * protocol.ring[near] + across * protocol.ring[_NETWORK]
        times.append(latency * _US + volume / (bandwidth * protocol.ring_share))
        if kind == "all_reduce":
            hops = (inside - 1) * protocol.tree[near] + math.log2(nodes) * protocol.tree[_NETWORK]
            times.append((protocol.tree_base + 2 * hops) * _US + 2 * size / (bandwidth * protocol.tree_share))
    if kind == "all_to_all" and nodes > 1:
        # No ring: every pair exchanges, and what leaves the node goes through the rank's own adapter.
        outside = size * (ranks - inside) / ranks
        direct = _PROTOCOLS[2].ring_base + across * _PROTOCOLS[2].ring[_NETWORK]
        return direct * _US + outside / (cluster.gpu.network * cluster.gpu.link_efficiency)
    return min(times)


def bus_bandwidth(ranks: int, stride: int, cluster: Cluster) -> float:
    """Bytes a second that each rank of a group can pass on.

    Over nodes, a ring enters and leaves a node through the adapters of all of the group's ranks there: eight neighbours
    in a node have eight times what one rank alone has.
    """
    gpu, inside = cluster.gpu, cluster.in_node(ranks, stride)
    if not cluster.crosses(ranks, stride):
        return gpu.link * gpu.link_efficiency
    across = gpu.network * inside
    return (across if inside == 1 else min(gpu.link, across)) * gpu.link_efficiency
