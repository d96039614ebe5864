"""The network interface that gloo is told to use."""

import os
import socket
from types import SimpleNamespace

import psutil
import pytest

from pipeline.train.engine import process_group


def test_gloo_uses_the_interface_towards_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = {"lo": "127.0.0.1", "eth0": "10.0.0.7", "ib0": "10.1.0.7"}
    routes = {"node-1": "10.1.0.7", "myself": "127.0.1.1", process_group.DOCUMENTATION_ADDRESS: "10.0.0.7"}

    class Probe:
        def __init__(self, *arguments: object) -> None:
            pass

        def __enter__(self) -> "Probe":
            return self

        def __exit__(self, *arguments: object) -> None:
            pass

        def connect(self, address: tuple[str, int]) -> None:
            self.own = routes[address[0]]

        def getsockname(self) -> tuple[str, int]:
            return self.own, 1

    monkeypatch.setattr(socket, "socket", Probe)
    monkeypatch.setattr(
        psutil, "net_if_addrs", lambda: {name: [SimpleNamespace(address=a)] for name, a in addresses.items()}
    )
    for master, expected in (("node-1", "ib0"), ("myself", "eth0"), ("127.0.0.1", None), ("localhost", None)):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # recorded, so that it is restored
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
        process_group.choose_gloo_interface(master)
        assert os.environ.get("GLOO_SOCKET_IFNAME") == expected
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1")
    process_group.choose_gloo_interface("node-1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth1"
