"""From what the nodes say to whose fault it is: a node's, which is left out, or everyone's, which is a mistake."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.operate.preflight.report import Report

KINDS = ("shards", "run", "accelerators")


@dataclass(frozen=True)
class Verdict:
    """What was found."""

    bad: dict[str, str] = field(default_factory=dict)
    """A sentence for each node that is to be left out."""
    doubtful: tuple[str, ...] = ()
    """Two nodes that do not meet, and no third that would show whose fault it is."""
    again: str = ""
    """Why the nodes should be tried once more, though none is to blame."""

    @property
    def word(self) -> str:
        """For the job script."""
        if self.bad:
            return "exclude " + ",".join(self.bad)
        if self.doubtful:
            return "doubt " + ",".join(self.doubtful)
        return "again" if self.again else "sound"


def judge(reports: Sequence[Report], nodes: Sequence[str], needed_bytes: float, digest: str | None) -> Verdict:
    """Whose fault it is.

    needed_bytes: free disk that the run wants. digest: of the shard set that the run began with, None for a new run.
    Raises ValueError with one sentence for a fault that all nodes share: no other nodes would do better.
    """
    heard = {report.node: report for report in reports}  # in the order in which they came
    said = {node: heard[node] for node in nodes if node in heard}
    if not said:
        return Verdict(again=f"none of the nodes {', '.join(nodes)} could be looked at; srun says why in the job's log")
    for report in said.values():
        _add_disk(report, needed_bytes)
    _add_digests(list(said.values()), digest)
    for kind in KINDS:
        _raise_if_shared(kind, list(said.values()))
    bad = {node: "does not answer" for node in nodes if node not in said}
    for report in said.values():
        if report.faults:
            bad[report.node] = "; ".join(report.faults.values())
    cut_off = [node for node, report in said.items() if node not in bad and _is_cut_off(report, bad)]
    if cut_off and len(cut_off) + len(bad) == len(nodes):
        if bad:
            return Verdict(bad)  # what the others are worth is seen without them
        if len(nodes) == 2:
            return Verdict(doubtful=tuple(cut_off))
        raise ValueError(
            f"no two of the nodes {', '.join(cut_off)} add numbers together; name their network interface in "
            f"slurm/site.sh (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), or give them longer (PREFLIGHT_SECONDS)."
        )
    bad |= dict.fromkeys(cut_off, "adds no numbers together with any other node")
    if not bad and not all(report.met_all for report in said.values()):
        return Verdict(again="the nodes add numbers together by twos, but all of them did not")
    return Verdict(bad)


def _add_disk(report: Report, needed_bytes: float) -> None:
    if report.free_bytes is not None and report.free_bytes < needed_bytes:
        report.faults["run"] = (
            f"{report.free_bytes / 1e9:.1f} GB are free for the run, and its checkpoints need {needed_bytes / 1e9:.1f} "
            f"GB (checkpoint.keep_last and one being written)"
        )


def _add_digests(reports: list[Report], digest: str | None) -> None:
    """The right digest is the run's; that of most nodes in a new run."""
    read = Counter(report.digest for report in reports if report.digest is not None)
    if not read:
        return
    wanted = digest or read.most_common(1)[0][0]
    whose = "the run began with" if digest else "most nodes read"
    for report in reports:
        if report.digest not in (None, wanted):
            report.faults["shards"] = f"reads the shard set {report.digest[:12]}, and {whose} {wanted[:12]}"


def _raise_if_shared(kind: str, reports: list[Report]) -> None:
    """A single node's shard set and run are those of all; its accelerators are its own."""
    sentences = [report.faults[kind] for report in reports if kind in report.faults]
    if len(sentences) == len(reports) and (len(reports) > 1 or kind != "accelerators"):
        where = f" (on all of {', '.join(report.node for report in reports)})" if len(reports) > 1 else ""
        raise ValueError(f"{sentences[0].rstrip('.')}{where}.")


def _is_cut_off(report: Report, bad: dict[str, str]) -> bool:
    """It met none of those neighbours that are not to blame themselves; of two nodes both are in doubt."""
    neighbours = [met for other, met in report.met.items() if other not in bad]
    if report.met_all or any(neighbours):
        return False
    return bool(neighbours) or (not report.met and not bad)
