"""Preflight: whose fault it is, by what the nodes say; and real nodes' processes, each on an address of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.operate.preflight.node_checks import pairs
from pipeline.operate.preflight.report import Report, read_line
from pipeline.operate.preflight.verdict import judge
from tests.launch import ROOT, free_port

THREE = ["node1", "node2", "node3"]
MET = {"met_all": True, "free_bytes": 10**12, "digest": "a" * 64}


def reports(nodes: list[str], **different: dict[str, Any]) -> list[Report]:
    """Sound nodes, but for what is different on some."""
    return [Report(node, **MET | different.get(node, {})) for node in nodes]


def apart(nodes: list[str], *broken: str) -> list[Report]:
    """Nodes of which all meetings with the broken ones fail."""
    return [
        Report(
            node,
            **MET | {"met_all": False},
            met={other: not {node, other} & set(broken) for _, other, _ in pairs(nodes, node, 1, 0, 1)},
        )
        for node in nodes
    ]


def test_sound_nodes_are_sound() -> None:
    assert judge(reports(THREE), THREE, 1e9, "a" * 64).word == "sound"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"faults": {"accelerators": "accelerator 3 multiplies wrongly"}}, "multiplies wrongly"),
        ({"faults": {"shards": "X is missing"}}, "X is missing"),
        ({"free_bytes": 10**8}, "0.1 GB are free for the run, and its checkpoints need 1.0 GB"),
        ({"digest": "b" * 64}, "reads the shard set bbbbbbbbbbbb, and most nodes read aaaaaaaaaaaa"),
    ],
)
def test_a_node_with_a_fault_of_its_own_is_left_out(fault: dict[str, Any], words: str) -> None:
    verdict = judge(reports(THREE, node2=fault), THREE, 1e9, None)
    assert verdict.word == "exclude node2"
    assert words in verdict.bad["node2"]


def test_silent_nodes_are_left_out_and_all_of_them_tried_again() -> None:
    assert judge(reports(["node1", "node2"]), THREE, 1e9, None).word == "exclude node3"
    assert judge([], THREE, 1e9, None).word == "again"


@pytest.mark.parametrize("kind", ["accelerators", "shards", "run"])
def test_a_fault_of_all_nodes_is_a_mistake(kind: str) -> None:
    same = {"faults": {kind: "it is not there"}}
    with pytest.raises(ValueError, match=r"it is not there \(on all of node1, node2\)\.$"):
        judge(reports(["node2", "node1"], node1=same, node2=same), THREE[:2], 1e9, None)


def test_a_single_node_has_accelerators_of_its_own_and_the_shard_set_of_all() -> None:
    broken = {"faults": {"accelerators": "accelerator 0 multiplies wrongly"}}
    assert judge(reports(["node1"], node1=broken), ["node1"], 1e9, None).word == "exclude node1"
    with pytest.raises(ValueError, match=r"^it is truncated\.$"):
        judge(reports(["node1"], node1={"faults": {"shards": "it is truncated"}}), ["node1"], 1e9, None)


def test_the_set_that_the_run_began_with_is_the_right_one() -> None:
    with pytest.raises(ValueError, match="reads the shard set aaaaaaaaaaaa, and the run began with cccccccccccc"):
        judge(reports(THREE), THREE, 1e9, "c" * 64)


@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_a_node_that_no_neighbour_meets_is_found(count: int) -> None:
    nodes = [f"node{number}" for number in range(count)]
    for broken in (nodes[0], nodes[2], nodes[-1]):
        assert judge(apart(nodes, broken), nodes, 1e9, None).word == f"exclude {broken}"


def test_two_nodes_that_do_not_meet_are_both_in_doubt() -> None:
    assert judge(apart(THREE[:2], "node1"), THREE[:2], 1e9, None).word == "doubt node1,node2"


def test_without_a_sound_node_to_compare_only_those_with_faults_of_their_own_are_left_out() -> None:
    said = apart(THREE, *THREE)
    said[0].faults["accelerators"] = "accelerator 0 multiplies wrongly"
    assert judge(said, THREE, 1e9, None).word == "exclude node1"


def test_of_two_nodes_that_do_not_meet_the_one_with_a_fault_is_left_out() -> None:
    said = apart(THREE[:2], "node1")
    said[0].faults["accelerators"] = "accelerator 0 multiplies wrongly"
    assert judge(said, THREE[:2], 1e9, None).word == "exclude node1"


def test_a_node_between_bad_ones_is_not_blamed() -> None:
    nodes = [f"node{number}" for number in range(5)]
    said = [report for report in apart(nodes, "node0", "node2") if report.node not in ("node0", "node2")]
    assert judge(said, nodes, 1e9, None).word == "exclude node0,node2"


def test_no_meeting_at_all_is_a_mistake_and_one_that_failed_once_is_tried_again() -> None:
    with pytest.raises(ValueError, match=r"no two of the nodes node1, node2, node3.*GLOO_SOCKET_IFNAME"):
        judge(apart(THREE, *THREE), THREE, 1e9, None)
    assert judge(apart(THREE), THREE, 1e9, None).word == "again"


@pytest.mark.parametrize("count", [2, 3, 4, 5, 9])
def test_every_neighbour_is_met_in_a_round_and_at_a_port_of_its_own(count: int) -> None:
    nodes = [f"node{number}" for number in range(count)]
    held: dict[tuple[int, str], set[int]] = {}
    for node in nodes:
        rounds = [number for number, _, _ in pairs(nodes, node, 100, 0, 1)]
        assert len(set(rounds)) == len(rounds) == (0 if count == 2 else 2)
        for number, _, meeting in pairs(nodes, node, 100, 0, 1):
            assert meeting.port == 100 + number
            held.setdefault((meeting.port, meeting.address), set()).add(meeting.rank)
    assert all(ranks == {0, 1} for ranks in held.values())


def look_from(nodes: list[str], options: list[str], environment: dict[str, str] | None = None) -> list[Report]:
    """Starts the command as srun would, once a node. A node's name is a loopback address."""
    command = [sys.executable, "-m", "pipeline", "preflight", "--nodes", ",".join(nodes), *options]
    shared = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            command, env={**shared, **(environment or {}), "SLURMD_NODENAME": node}, text=True, stdout=subprocess.PIPE
        )
        for node in nodes
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    return [report for output in outputs for line in output.splitlines() if (report := read_line(line))]


def judged(nodes: list[str], options: list[str], said: list[Report]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", "preflight", "--judge", "--nodes", ",".join(nodes), *options]
    lines = "srun: a line of its own\n" + "".join(f"{report.line()}\n" for report in said)
    return subprocess.run(
        command, input=lines, text=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


@pytest.fixture
def options(shards: Path, tmp_path: Path) -> list[str]:
    """Of train."""
    (tmp_path / "run").mkdir()
    sizes = ["--model.layers=2", "--model.width=32", "--model.heads=2", "--model.resolution=8"]
    return ["--run", str(tmp_path / "run"), f"--data.shards={shards}", *sizes]


def test_real_nodes_add_numbers_together_read_the_set_and_are_sound(options: list[str]) -> None:
    nodes = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    said = look_from(nodes, options)
    assert [report.node for report in said] == nodes
    assert all(report.met_all and not report.faults and report.digest for report in said)
    finished = judged(nodes, options, said)
    assert (finished.returncode, finished.stdout) == (0, "sound\n"), finished.stderr
    assert "preflight: 3 nodes in" in finished.stderr


def test_a_damaged_record_and_missing_accelerators_are_found(options: list[str], shards: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "shards"
    shutil.copytree(shards, damaged)
    shard = json.loads((damaged / "shards.json").read_text())["splits"]["train"]["shards"][0]
    content = bytearray((damaged / shard["file"]).read_bytes())
    content[shard["pixels_offsets"][0]] ^= 1
    (damaged / shard["file"]).write_bytes(content)
    [said] = look_from(["127.0.0.1"], [*options, f"--data.shards={damaged}", "--accelerators=2", "--seconds=60"])
    assert "train-000000.tar does not hold what was written" in said.faults["shards"]
    assert said.faults["accelerators"] == "0 of 2 accelerators can be used"


def test_a_mistake_in_the_options_is_said_once_by_the_judge(options: list[str]) -> None:
    assert look_from(["127.0.0.1"], [*options, "--modle.size=s"]) == []
    finished = judged(["127.0.0.1"], [*options, "--modle.size=s"], [])
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: modle.size is not a known key")
