"""Properties of accelerators for the simulator, in addition to their peak: efficiency, memory and link bandwidth.

Link rates are the vendors'. The fraction that NCCL reaches is NVIDIA's: 370 of NVLink 4's 450 GB/s "with the protocol
overhead" (NVIDIA/nccl-tests#212), 46 to 48 of a 400 Gbit/s port's 50 GB/s (NVIDIA/nccl-tests#290). The fraction of the
peak that matrix products reach was fitted to one published run each on H100 and A100 (all are in
tests/benchmarks/published_runs.py). Other accelerators use the value of a similar one, which was not verified.
"""

from dataclasses import dataclass, replace

from pipeline.costs import Accelerator

GIGA = 1e9
CPU = Accelerator("CPU", 1e12, float("inf"), "", "nominal values for a rank on CPU")
NODE_SHARE, NETWORK_SHARE = 370 / 450, 47 / 50
"""The fraction of a link's rate that a collective reaches, inside a node and between nodes."""
NODE_LATENCY = 5e-6
"""Seconds of a step of a ring inside a node: small messages of NCCL take about 30 us among 8 H100."""
NETWORK_LATENCY = 15e-6
"""Effective seconds of a step of a ring over nodes, in addition to the bytes' time. An all-gather of 2 GB among 256
H100 at 200 GB/s (NVIDIA/nccl#1218) takes 19 us a step. The all-reduce of 256 MB of "The Ultra-Scale Playbook" (Hugging
Face, 2025), 64.9 and 32.9 GB/s on 32 and 64 nodes of 8 H100, takes 13 and 14 us a step if it was a ring."""
HOST_BYTES = 25 * GIGA
"""Bytes a second between an accelerator and its host: PCIe 4 x16, one direction."""


@dataclass(frozen=True)
class Links:
    """Bytes per second of one accelerator in one direction, and the latency of a message in seconds."""

    node_bytes: float
    network_bytes: float
    node_latency: float = NODE_LATENCY
    network_latency: float = NETWORK_LATENCY


@dataclass(frozen=True)
class Hardware:
    """Properties of one accelerator."""

    efficiency: float
    """The fraction of the dense bf16 peak that the matrix products of a training step reach."""
    memory_bytes: float
    """Memory bandwidth, bytes per second."""
    links: Links

    def with_links(self, node_gb: float | None, network_gb: float | None) -> "Hardware":
        """A copy with measured link rates, GB/s of one accelerator; None leaves a rate as it is."""
        node = self.links.node_bytes if node_gb is None else node_gb * GIGA
        network = self.links.network_bytes if network_gb is None else network_gb * GIGA
        return replace(self, links=replace(self.links, node_bytes=node, network_bytes=network))


def _of(efficiency: float, memory_gb: float, node_gb: float, port_gbit: float) -> Hardware:
    links = Links(node_gb * GIGA * NODE_SHARE, port_gbit / 8 * GIGA * NETWORK_SHARE)
    return Hardware(efficiency, memory_gb * GIGA, links)


HOPPER, AMPERE = 0.628, 0.785
"""Fitted to 1.3B on 8 H100, and 6.7B on 8 A100, llm-foundry."""

HARDWARE = {
    "NVIDIA A100 40GB": _of(AMPERE, 1555, 300, 200),
    "NVIDIA A100 80GB": _of(AMPERE, 2039, 300, 200),
    "NVIDIA H100 PCIe": _of(HOPPER, 2000, 64, 200),
    "NVIDIA H100 SXM": _of(HOPPER, 3350, 450, 400),
    "NVIDIA H200 SXM": _of(HOPPER, 4800, 450, 400),
    "NVIDIA B200": _of(HOPPER, 8000, 900, 400),
    "NVIDIA L40S": _of(AMPERE, 864, 32, 100),
    "NVIDIA L4": _of(AMPERE, 300, 32, 100),
    "NVIDIA A10": _of(AMPERE, 600, 32, 100),
    "AMD MI300X": _of(HOPPER, 5300, 448, 400),
    "CPU": _of(0.4, 50, 10, 10),
}
"""By the name in costs.ACCELERATORS: efficiency, memory GB/s, link GB/s inside a node, and network port Gbit/s. Memory
and links (NVLink, PCIe or Infinity Fabric) are from data sheets; the port is a usual one for each accelerator. CPU:
nominal."""


def hardware_of(accelerator: Accelerator) -> Hardware:
    """The properties of an accelerator."""
    return HARDWARE[accelerator.name]
