"""Preflight: the diagnosis from the nodes' reports; checks by real processes, one loopback address a node; options."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.operate.preflight.all_reduce import AllReduceCheck
from pipeline.operate.preflight.all_reduce_rank import memory_errors
from pipeline.operate.preflight.diagnosis import diagnose
from pipeline.operate.preflight.node_checks import pair_checks
from pipeline.operate.preflight.report import Report, read_line
from tests.launch import ROOT, Finished, free_port, run
from tests.pipeline.conftest import Runner

THREE = ["node1", "node2", "node3"]
HEALTHY = {"all_reduce_ok": True, "free_bytes": 10**12, "digest": "a" * 64}


def reports(nodes: list[str], **different: dict[str, Any]) -> list[Report]:
    """Reports of healthy nodes, with differences on some."""
    return [Report(node, **HEALTHY | different.get(node, {})) for node in nodes]


def disconnected(nodes: list[str], *broken: str) -> list[Report]:
    """Reports of nodes whose all-reduces with the broken ones fail."""
    return [
        Report(
            node,
            **HEALTHY | {"all_reduce_ok": False},
            pairs_ok={other: not {node, other} & set(broken) for _, other, _ in pair_checks(nodes, node, 1, 0, 1)},
        )
        for node in nodes
    ]


def test_healthy_nodes_are_ok() -> None:
    assert diagnose(reports(THREE), THREE, 1e9, "a" * 64).result == "ok"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"faults": {"accelerators": "accelerator 3 computes a wrong matrix product"}}, "a wrong matrix product"),
        ({"faults": {"shards": "X is missing"}}, "X is missing"),
        ({"free_bytes": 10**8}, "0.1 GB are free for the run, and its checkpoints need 1.0 GB"),
        ({"digest": "b" * 64}, "reads the shard set bbbbbbbbbbbb, but most nodes read aaaaaaaaaaaa"),
    ],
)
def test_a_faulty_node_is_excluded(fault: dict[str, Any], words: str) -> None:
    diagnosis = diagnose(reports(THREE, node2=fault), THREE, 1e9, None)
    assert diagnosis.result == "exclude node2"
    assert words in diagnosis.bad["node2"]


def test_nodes_that_do_not_answer_are_excluded_unless_none_answers() -> None:
    assert diagnose(reports(["node1", "node2"]), THREE, 1e9, None).result == "exclude node3"
    assert diagnose([], THREE, 1e9, None).result == "retry"


@pytest.mark.parametrize("kind", ["accelerators", "shards", "run"])
def test_a_fault_of_all_nodes_is_a_user_error(kind: str) -> None:
    same = {"faults": {kind: "it does not exist"}}
    with pytest.raises(ValueError, match=r"it does not exist \(on all of node1, node2\)\.$"):
        diagnose(reports(["node2", "node1"], node1=same, node2=same), THREE[:2], 1e9, None)


def test_a_single_node_is_excluded_for_its_accelerators_but_not_for_the_shard_set() -> None:
    broken = {"faults": {"accelerators": "accelerator 0 computes a wrong matrix product"}}
    assert diagnose(reports(["node1"], node1=broken), ["node1"], 1e9, None).result == "exclude node1"
    with pytest.raises(ValueError, match=r"^it is truncated\.$"):
        diagnose(reports(["node1"], node1={"faults": {"shards": "it is truncated"}}), ["node1"], 1e9, None)


def test_the_expected_shard_set_is_the_one_that_the_run_was_started_with() -> None:
    with pytest.raises(ValueError, match="reads the shard set aaaaaaaaaaaa, but the run was started with cccccccccccc"):
        diagnose(reports(THREE), THREE, 1e9, "c" * 64)


@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_a_node_that_fails_with_each_neighbor_is_excluded(count: int) -> None:
    nodes = [f"node{number}" for number in range(count)]
    for broken in (nodes[0], nodes[2], nodes[-1]):
        assert diagnose(disconnected(nodes, broken), nodes, 1e9, None).result == f"exclude {broken}"


def test_a_failure_between_two_nodes_is_inconclusive() -> None:
    assert diagnose(disconnected(THREE[:2], "node1"), THREE[:2], 1e9, None).result == "inconclusive node1,node2"


def test_if_all_are_cut_off_only_nodes_with_other_faults_are_excluded() -> None:
    found = disconnected(THREE, *THREE)
    found[0].faults["accelerators"] = "accelerator 0 computes a wrong matrix product"
    assert diagnose(found, THREE, 1e9, None).result == "exclude node1"


def test_of_two_disconnected_nodes_the_one_with_another_fault_is_excluded() -> None:
    found = disconnected(THREE[:2], "node1")
    found[0].faults["accelerators"] = "accelerator 0 computes a wrong matrix product"
    assert diagnose(found, THREE[:2], 1e9, None).result == "exclude node1"


def test_a_node_between_faulty_ones_is_not_excluded() -> None:
    nodes = [f"node{number}" for number in range(5)]
    found = [report for report in disconnected(nodes, "node0", "node2") if report.node not in ("node0", "node2")]
    assert diagnose(found, nodes, 1e9, None).result == "exclude node0,node2"


def test_no_working_pair_is_a_user_error_and_a_failure_between_all_alone_is_retried() -> None:
    with pytest.raises(ValueError, match=r"between any two of the nodes node1, node2, node3.*GLOO_SOCKET_IFNAME"):
        diagnose(disconnected(THREE, *THREE), THREE, 1e9, None)
    assert diagnose(disconnected(THREE), THREE, 1e9, None).result == "retry"


@pytest.mark.parametrize("count", [2, 3, 4, 5, 9])
def test_each_pair_has_its_own_round_and_port(count: int) -> None:
    nodes = [f"node{number}" for number in range(count)]
    ranks_of: dict[tuple[int, str], set[int]] = {}
    for node in nodes:
        rounds = [number for number, _, _ in pair_checks(nodes, node, 100, 0, 1)]
        assert len(set(rounds)) == len(rounds) == (0 if count == 2 else 2)
        for number, _, check in pair_checks(nodes, node, 100, 0, 1):
            assert check.port == 100 + number
            ranks_of.setdefault((check.port, check.address), set()).add(check.rank)
    assert all(ranks == {0, 1} for ranks in ranks_of.values())


TWO_NODES_OF_TWO = """
import os, sys
from pipeline.operate.preflight import all_reduce_rank as rank
from pipeline.operate.preflight.all_reduce import AllReduceCheck

number = int(os.environ["RANK"])
os.environ["CUDA_VISIBLE_DEVICES"] = "MIG-a,MIG-b"
rank.torch.cuda.is_available = lambda: True
rank.torch.cuda.device_count = lambda: 1
rank.torch.cuda.set_device = lambda device: None
rank.check_accelerator = lambda device, number: print(device, os.environ["CUDA_VISIBLE_DEVICES"])
check_sum = rank.check_sum
rank.check_sum = lambda check, number, device: check_sum(check, number, rank.torch.device("cpu"))
port = int(os.environ["MASTER_PORT"])
rank.take_part(AllReduceCheck("127.0.0.1", port, number // 2, 2, 2, 60.0), number % 2)
print("ranks", rank.dist.get_world_size())
"""


def test_each_accelerator_of_a_node_has_a_rank_of_the_all_reduce(tmp_path: Path) -> None:
    """With a MIG instance each. CUDA is replaced; the all-reduce is gloo's."""
    finished = run(4, "-c", TWO_NODES_OF_TWO, logs=tmp_path)
    for rank, output in enumerate(finished.outputs):
        instance = "MIG-b" if rank % 2 else "MIG-a"
        lines = [line for line in output.splitlines() if "Gloo" not in line]
        assert lines == [f"cuda:0 {instance}", "accelerator ok", "all-reduce ok", "ranks 4"]


PASSES, WAITS = "echo accelerator ok; echo all-reduce ok", "echo accelerator ok; exec sleep 60"


@pytest.mark.parametrize(
    ("third", "others", "seconds", "fault"),
    [
        (PASSES, PASSES, 60.0, None),
        ("echo accelerator ok; echo NCCL error; exit 1", WAITS, 60.0, None),
        (WAITS, WAITS, 3.0, None),
        ("echo accelerator 2 is in use; exit 1", WAITS, 60.0, "accelerator 2 is in use"),
        ("exit 1", WAITS, 60.0, "the check of accelerator 2 crashed"),
        ("exec sleep 60", WAITS, 3.0, "accelerator 2 does not answer within 3 s"),
    ],
    ids=["healthy", "a failing all-reduce", "a hanging one", "a fault", "a crash", "no answer"],
)
def test_one_accelerator_of_a_node_shows_in_its_outcome(
    third: str, others: str, seconds: float, fault: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The four processes are replaced."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nfor last; do :; done\nif [ "$last" = 2 ]; then {third}; else {others}; fi\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    outcome = AllReduceCheck("127.0.0.1", 1, 0, 1, 4, seconds).run()
    assert (outcome.succeeded, outcome.accelerator_fault) == (third == PASSES, fault)
    assert outcome.message == ("NCCL error" if "NCCL" in third else fault if "in use" in third else None)


def test_memory_errors_are_those_of_the_gpu_at_its_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another job may use a GPU with errors on the same node."""
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ncase "$*" in *--id=0000:3b:00.0) echo 2;; *) echo "[N/A]";; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert [memory_errors(f"0000:{bus}:00.0") for bus in ("3b", "3c")] == [2, 0]


def check_nodes(nodes: list[str], options: list[str], environment: dict[str, str] | None = None) -> list[Report]:
    """Starts the command once a node, as srun does. A node's name is a loopback address."""
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


def aggregate(nodes: list[str], options: list[str], found: list[Report]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", "preflight", "--aggregate", "--nodes", ",".join(nodes), *options]
    lines = "srun: a line of its own\n" + "".join(f"{report.line()}\n" for report in found)
    return subprocess.run(
        command, input=lines, text=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


@pytest.fixture
def options(shards: Path, tmp_path: Path) -> list[str]:
    """Options of train."""
    (tmp_path / "run").mkdir()
    sizes = ["--model.layers=2", "--model.width=32", "--model.heads=2", "--model.resolution=8"]
    return ["--run", str(tmp_path / "run"), f"--data.shards={shards}", *sizes]


def test_real_nodes_pass_all_checks(options: list[str]) -> None:
    nodes = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    found = check_nodes(nodes, options)
    assert [report.node for report in found] == nodes
    assert all(report.all_reduce_ok and not report.faults and report.digest for report in found)
    finished = aggregate(nodes, options, found)
    assert (finished.returncode, finished.stdout) == (0, "ok\n"), finished.stderr
    assert "preflight: 3 nodes in" in finished.stderr


def test_a_damaged_record_and_missing_accelerators_are_found(options: list[str], shards: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "shards"
    shutil.copytree(shards, damaged)
    shard = json.loads((damaged / "shards.json").read_text())["splits"]["train"]["shards"][0]
    content = bytearray((damaged / shard["file"]).read_bytes())
    content[shard["pixels_offsets"][0]] ^= 1
    (damaged / shard["file"]).write_bytes(content)
    [found] = check_nodes(["127.0.0.1"], [*options, f"--data.shards={damaged}", "--accelerators=2", "--seconds=60"])
    assert "train-000000.tar does not match its checksums" in found.faults["shards"]
    assert found.faults["accelerators"] == "0 of 2 accelerators can be used"


def test_an_invalid_option_is_reported_once_with_the_help_of_train(options: list[str]) -> None:
    assert check_nodes(["127.0.0.1"], [*options, "--modle.size=s"]) == []
    finished = aggregate(["127.0.0.1"], [*options, "--modle.size=s"], [])
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: modle.size is not a known key")
    assert finished.stderr.rstrip().endswith("(see python -m pipeline train --help)")


def test_the_earlier_name_of_aggregate_is_accepted(options: list[str]) -> None:
    report = Report("node1", **HEALTHY)
    command = [sys.executable, "-m", "pipeline", "preflight", "--judge", "--nodes", "node1", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, input=f"{report.line()}\n", text=True, capture_output=True, env=environment)
    assert finished.stdout.startswith(("ok", "exclude")), finished.stderr


CheckOptions = Callable[..., Finished]


@pytest.fixture
def check_options(tmp_path: Path) -> CheckOptions:
    """Runs the command without --nodes, as on a login node."""
    return lambda *options: run(1, "-m", "pipeline", "preflight", *options, logs=tmp_path / "logs")


def test_options_of_a_run_that_can_start_are_accepted(
    options: list[str], finished_run: Runner, check_options: CheckOptions
) -> None:
    assert check_options(*options).codes == [0]
    arguments = finished_run.arguments("reference", batch__micro_size=2, checkpoint__keep_last=3)[3:]
    assert check_options(*arguments).codes == [0], "a run that exists"


@pytest.mark.parametrize(
    ("invalid", "message"),
    [
        (
            ["--modle.size=s"],
            "modle.size is not a known key; did you mean model.size? (see python -m pipeline train",
        ),
        (["--data.shards=null"], "data.shards is not set"),
        (["--data.shards=/nowhere"], "/nowhere does not exist"),
        (["--data.shards=/tmp"], "/tmp has no shards.json"),
        (["--model.resolution=16"], "model.resolution is 16; it must be 8, the resolution of the shard set"),
        (["--run=/dev/null"], "--run is /dev/null, which is a file"),
    ],
    ids=["misspelt key", "no shard set", "missing folder", "another folder", "resolution", "run"],
)
def test_invalid_options_are_reported_in_one_sentence(
    invalid: list[str], message: str, options: list[str], check_options: CheckOptions
) -> None:
    finished = check_options(*options, *invalid)
    assert finished.codes == [2]
    [line] = finished.output.splitlines()
    assert line.startswith(f"error: {message}")
    assert "preflight --help" not in line, "the help of train lists the options"


def test_a_shard_set_with_another_palette_than_the_runs_is_reported(
    finished_run: Runner, check_options: CheckOptions, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.yaml", "run.json"):
        shutil.copy(finished_run.folder / "reference" / name, folder)
    record = json.loads((folder / "run.json").read_text())
    record["shards"]["palette_sha256"] = "f" * 64
    (folder / "run.json").write_text(json.dumps(record))
    finished = check_options("--run", folder)
    assert finished.codes == [2]
    assert "has the palette" in finished.output
    assert "was made with the palette ffffffffffff" in finished.output
