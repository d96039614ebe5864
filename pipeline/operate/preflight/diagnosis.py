"""From the nodes' reports to the cause: faulty nodes, which the job excludes, or a fault of all, a user error."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.operate.preflight.report import Report

KINDS = ("shards", "run", "accelerators")


@dataclass(frozen=True)
class Diagnosis:
    """The result of the checks on all nodes."""

    bad: dict[str, str] = field(default_factory=dict)
    """A sentence for each node to exclude."""
    inconclusive: tuple[str, ...] = ()
    """Two nodes between which the all-reduce fails, without a third that would show which is faulty."""
    retry: str = ""
    """Why the checks should be retried, though no node is known to be faulty."""

    @property
    def result(self) -> str:
        """What the job script reads: ok, retry, exclude NODES or inconclusive NODES."""
        if self.bad:
            return "exclude " + ",".join(self.bad)
        if self.inconclusive:
            return "inconclusive " + ",".join(self.inconclusive)
        return "retry" if self.retry else "ok"


def diagnose(reports: Sequence[Report], nodes: Sequence[str], needed_bytes: float, digest: str | None) -> Diagnosis:
    """Finds the faulty nodes.

    needed_bytes: free disk space that the run needs. digest: that of the shard set the run was started with, None for
    a new run. Raises ValueError with one sentence for a fault that all nodes share: other nodes would have it too.
    """
    by_node = {report.node: report for report in reports}  # in the order of their arrival
    answered = {node: by_node[node] for node in nodes if node in by_node}
    if not answered:
        return Diagnosis(
            retry=f"none of the nodes {', '.join(nodes)} could be checked; srun's message in the job's log names the "
            f"reason"
        )
    for report in answered.values():
        _add_disk_fault(report, needed_bytes)
    _add_digest_faults(list(answered.values()), digest)
    for kind in KINDS:
        _raise_if_shared(kind, list(answered.values()))
    bad = {node: "does not answer" for node in nodes if node not in answered}
    for report in answered.values():
        if report.faults:
            bad[report.node] = "; ".join(report.faults.values())
    cut_off = [node for node, report in answered.items() if node not in bad and _is_cut_off(report, bad)]
    if cut_off and len(cut_off) + len(bad) == len(nodes):
        if bad:
            return Diagnosis(bad)  # the next start checks the others without them
        if len(nodes) == 2:
            return Diagnosis(inconclusive=tuple(cut_off))
        raise ValueError(
            f"the all-reduce fails between any two of the nodes {', '.join(cut_off)}; set their network interface in "
            f"slurm/site.sh (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), or a longer PREFLIGHT_SECONDS."
        )
    bad |= dict.fromkeys(cut_off, "the all-reduce fails with each of its neighbors")
    if not bad and not all(report.all_reduce_ok for report in answered.values()):
        return Diagnosis(retry="the all-reduce succeeds between pairs of nodes, but failed between all")
    return Diagnosis(bad)


def _add_disk_fault(report: Report, needed_bytes: float) -> None:
    if report.free_bytes is not None and report.free_bytes < needed_bytes:
        report.faults["run"] = (
            f"{report.free_bytes / 1e9:.1f} GB are free for the run, and its checkpoints need {needed_bytes / 1e9:.1f} "
            f"GB (checkpoint.keep_last and one being written)"
        )


def _add_digest_faults(reports: list[Report], digest: str | None) -> None:
    """The expected digest is the run's; in a new run it is the one that most nodes read."""
    read = Counter(report.digest for report in reports if report.digest is not None)
    if not read:
        return
    expected = digest or read.most_common(1)[0][0]
    source = "the run was started with" if digest else "most nodes read"
    for report in reports:
        if report.digest not in (None, expected):
            report.faults["shards"] = f"reads the shard set {report.digest[:12]}, but {source} {expected[:12]}"


def _raise_if_shared(kind: str, reports: list[Report]) -> None:
    """A single node's shard set and run are those of all nodes; its accelerators are its own."""
    sentences = [report.faults[kind] for report in reports if kind in report.faults]
    if len(sentences) == len(reports) and (len(reports) > 1 or kind != "accelerators"):
        where = f" (on all of {', '.join(report.node for report in reports)})" if len(reports) > 1 else ""
        raise ValueError(f"{sentences[0].rstrip('.')}{where}.")


def _is_cut_off(report: Report, bad: dict[str, str]) -> bool:
    """Whether the all-reduce fails with every neighbor that is not faulty; of two nodes, both count as cut off."""
    neighbors = [succeeded for other, succeeded in report.pairs_ok.items() if other not in bad]
    if report.all_reduce_ok or any(neighbors):
        return False
    return bool(neighbors) or (not report.pairs_ok and not bad)
