"""The time of collectives with NCCL's algorithms.

All-gathers and reduce-scatters are rings: every rank sends to the next one, in n - 1 steps. A ring over several nodes
uses the ports of all its ranks in a node. So it runs at the slower of two rates: these ports together, and the link
inside a node. Each of its steps has the latency of a hop between nodes. An all-reduce is two such rings, or over nodes
a tree if that is faster: the same bytes, but a number of steps that grows with the logarithm of the nodes.
"""

from dataclasses import dataclass
from math import ceil, log2

from pipeline.plan.hardware import Links


@dataclass(frozen=True)
class Group:
    """The ranks of a collective, and how many of them share a node."""

    ranks: int
    in_a_node: int

    @property
    def spans_nodes(self) -> bool:
        """Whether the ranks are on more than one node."""
        return self.ranks > self.in_a_node


def gather_seconds(size: float, group: Group, links: Links) -> float:
    """Seconds of an all-gather of `size` bytes in total, or of a reduce-scatter of `size` bytes on each rank."""
    if group.ranks == 1:
        return 0.0
    latency = links.network_latency if group.spans_nodes else links.node_latency
    return (group.ranks - 1) * (size / group.ranks / _ring_speed(group, links) + latency)


def all_reduce_seconds(size: float, group: Group, links: Links) -> float:
    """Seconds of an all-reduce of `size` bytes on each rank."""
    rings = 2 * gather_seconds(size, group, links)
    if not group.spans_nodes:
        return rings
    depth = ceil(log2(group.ranks / group.in_a_node)) * links.network_latency + group.in_a_node * links.node_latency
    return min(rings, 2 * (size / _ring_speed(group, links) + depth))


def _ring_speed(group: Group, links: Links) -> float:
    if group.spans_nodes:
        return min(links.node_bytes, group.in_a_node * links.network_bytes)
    return links.node_bytes


def send_seconds(size: float, leaves_node: bool, links: Links) -> float:
    """Seconds to send `size` bytes from one rank to another."""
    if leaves_node:
        return size / links.network_bytes + links.network_latency
    return size / links.node_bytes + links.node_latency
