"""How peers are installed and measured, with scripts that stand in for them."""

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.peers import install, measure, mixing, reading, resuming
from tests.benchmarks.peers.formats import format_of
from tests.benchmarks.peers.measure import Script, compare
from tests.benchmarks.peers.token_images import numbers_of, token_images

WORKS = """
import os, subprocess, sys, time
from tests.benchmarks.peers.turn import serve

print("chatter at the start")
turns = 0
def turn():
    global turns
    turns += 1
    print("a library's chatter")
    os.system("echo more of it")
    with open(sys.argv[1], "a") as log:
        log.write(sys.argv[2])
    if sys.argv[2] == "b":  # CPU time of a child process that has ended, and of one that still runs
        subprocess.run([sys.executable, "-c", "sum(range(10**7))"])
    return {"work": 100.0 * turns, "threads": os.environ["OMP_NUM_THREADS"]}

serve(turn)
"""
FAILS = """
from tests.benchmarks.peers.turn import serve
turns = 0
def turn():
    global turns
    turns += 1
    if turns == 3:
        raise ValueError("no third | turn")
    return 1.0
serve(turn)
"""


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules can be run: works, fails, hangs, and one that needs a package that is not there."""
    (tmp_path / "works.py").write_text(WORKS)
    (tmp_path / "fails.py").write_text(FAILS)
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(60)\n")
    (tmp_path / "lacks.py").write_text("import a_package_that_does_not_exist\n")
    return tmp_path


def script(folder: Path, module: str, *arguments: object, environment: str | None = None) -> Script:
    """One whose module lies in `folder`."""
    path = (("PYTHONPATH", f"{measure.ROOT}:{folder}"),)
    return Script(f"the {module}", module, arguments, environment, path)


def test_scripts_take_turns_alternately_and_the_first_is_not_counted(scripts: Path) -> None:
    """Two scripts: the order of their turns, their figures, threads, and the CPU time of a child."""
    log = scripts / "log"
    a, b = compare(script(scripts, "works", log, "a"), script(scripts, "works", log, "b"), turns=2, threads=1)
    order = log.read_text()
    assert sorted(order[:2]) == ["a", "b"] and order[2:] == "abab"
    assert a.error is None and a.turns["work"] == [200.0, 300.0] and a.turns["threads"] == ["1", "1"]
    assert a.rates() == [200.0 / a.turns["seconds"][0], 300.0 / a.turns["seconds"][1]]
    assert min(b.turns["cpu_seconds"]) > 5 * max(a.turns["cpu_seconds"])


@pytest.mark.slow  # starts scripts twelve times
def test_a_script_that_fails_is_named_with_its_error_and_the_others_are_measured(scripts: Path) -> None:
    """Failing at start, in a turn, by hanging, and for want of an environment."""
    ours = script(scripts, "works", scripts / "log", "a")
    peers = [script(scripts, name) for name in ("fails", "lacks")]
    missing = script(scripts, "works", scripts / "log", "c", environment="nobody")
    measured = compare(ours, *peers, missing, turns=3)
    table = list(measure.lines("reading", "images/s", measured))
    assert [line.split(" | ")[3:5] for line in table] == [
        ["the fails", "fails: ValueError: no third / turn"],
        ["the lacks", "fails: ModuleNotFoundError: No module named 'a_package_that_does_not_exist'"],
        ["the works", "fails: .venv-peers/nobody does not exist; `make peers` creates it"],
    ]
    assert len(measured[0].turns["work"]) == 3
    (hanging,) = compare(script(scripts, "hangs"), seconds=0.5)
    assert hanging.error == "it took more than 0.5 s"


def test_an_environment_sees_ours_and_keeps_torch(tmp_path: Path) -> None:
    """A peer made of nothing runs with our torch; one that wants another torch is refused, and says so.

    One that is installed is known to be; with other packages, or after a failure, it is not.
    """
    assert not install.is_installed("nothing", ["--no-index", "numpy"], tmp_path)
    assert install.install("nothing", ["--no-index", "numpy"], tmp_path) is None
    assert install.is_installed("nothing", ["--no-index", "numpy"], tmp_path)
    assert not install.is_installed("nothing", ["--no-index", "scipy"], tmp_path)
    assert not (tmp_path / "nothing" / install.ERROR).exists()
    reason = install.install("other", ["--no-index", "torch==1.0.0"], tmp_path)
    assert reason is not None and reason.startswith("ERROR: ") and "torch" in reason
    assert not install.is_installed("other", ["--no-index", "torch==1.0.0"], tmp_path)
    assert (tmp_path / "other" / install.ERROR).read_text().strip() == reason
    assert install.install("nothing", ["--no-index", "numpy"], tmp_path) is None


def test_requirements_are_a_peer_a_line(tmp_path: Path) -> None:
    """Comments and empty lines are skipped; a peer may ask for several packages."""
    file = tmp_path / "requirements.txt"
    file.write_text("# peers\n\na: a==1\nb: b[extra]==2 c<3\n")
    assert install.wanted(file) == {"a": ["a==1"], "b": ["b[extra]==2", "c<3"]}
    assert sys.version_info >= (3, 11) and all(install.wanted().values())


def test_tables_say_where_ours_is_behind() -> None:
    """Rates: less is behind. Seconds: more is."""
    ours, peer = (
        measure.Measured(Script(name, "x"), {"work": [1.0] * 3, "seconds": [2.0, 3.0, 1.0], "first": [first] * 3})
        for name, first in (("ours", 4.0), ("peer", 2.0))
    )
    peer.turns["seconds"] = [4.0, 8.0, 5.0]
    assert list(measure.lines("reading", "images/s", [ours, peer])) == [
        "| reading | images/s | 0.5 (0.3333 to 1) | peer | 0.2 (0.125 to 0.25) | 2.50 |"
    ]
    assert next(measure.lines("reading", "images/s", [peer, ours])).endswith("| 0.40, behind |")
    assert next(measure.lines_of("first batch", "s", [ours, peer], "first")).endswith("| 0.50, behind |")
    assert next(measure.lines_of("first batch", "s", [peer, ours], "first")).endswith("| 2.00 |")
    reference = measure.Measured(Script("by hand", "x", is_reference=True), peer.turns)
    assert next(measure.lines_of("a", "s", [ours, reference], "first")).endswith(
        "| by hand (reference) | 2 (2 to 2) | 0.50 |"
    )
    peer.error = "two\nlines | of it"
    assert next(measure.lines_of("a", "s", [ours, peer], "first")).endswith("| peer | fails: two lines / of it | |")
    assert measure.shown(30204.0) == "30,200" and measure.shown(0.0094921) == "0.009492"


@pytest.mark.parametrize("form", ["ours", "memmap"])
def test_a_format_reads_each_image_once_and_resumes_on_other_ranks(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three epochs, and the batches after a resume in the second half of the first, on one and on two ranks."""
    stored, count = format_of(form), reading.BATCH * 6 + 5
    tokens = token_images(count, 16, first=7)
    assert numbers_of(tokens).tolist() == list(range(7, 7 + count))
    stored.write(token_images(count, 16), tmp_path / "set")
    loader = stored.loader(tmp_path / "set", reading.BATCH, 1)
    epochs = [[numbers_of(batch) for batch in loader] for _ in range(3)]
    for epoch in epochs:
        reading.check_epoch(epoch, count)
    assert not np.array_equal(epochs[0][0], epochs[1][0])
    state, size = stored.state_of(loader, 4), reading.BATCH // 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        shares.append([numbers_of(batch) for batch in stored.loader(tmp_path / "set", size, 1, state)])
    assert np.array_equal(np.concatenate([share[0] for share in shares]), epochs[0][4])


@pytest.mark.parametrize("form", ["ours", "memmap"])
def test_a_mixture_has_whole_batches_in_each_pass(form: str, tmp_path: Path) -> None:
    """Two passes; ours has the exact share in any 1,000 consecutive images, across the passes too."""
    stored, count, images = format_of(form), 1500, 2000
    for number, name in enumerate("ab"):
        stored.write(token_images(count, 16, first=number * count), tmp_path / name)
    loader = stored.mixture([tmp_path / "a", tmp_path / "b"], [0.7, 0.3], reading.BATCH, images, 0)
    passes = [[numbers_of(batch) for batch in loader] for _ in range(2)]
    whole = images // reading.BATCH
    assert [[len(batch) for batch in batches] for batches in passes] == [[reading.BATCH] * whole] * 2
    numbers = np.concatenate([*passes[0], *passes[1]])
    assert len(np.unique(numbers)) > 2_300
    found = mixing.differences(numbers < count, 0.7, 2 * whole * reading.BATCH)
    assert found["off_thousand"] < (1 if form == "ours" else 100)


def test_batches_of_several_ranks_are_compared_as_a_whole() -> None:
    """Shares one after the other, images of each rank in turn, the same images in another order, and others."""
    batches = [np.arange(first, first + 4) for first in range(0, 4 * resuming.FOLLOWING, 4)]
    joined = [(batch[:2], batch[2:]) for batch in batches]
    in_turn = [(batch[::2], batch[1::2]) for batch in batches]
    mixed = [(batch[[2, 1]], batch[[0, 3]]) for batch in batches]
    for shares, images, order in (
        (joined, 1, 1),
        (in_turn, 1, 1),
        (mixed, 1, 0),
        (joined[1:], 0, 0),
        (joined[:5], 0.25, 0.25),
    ):
        assert resuming._same(shares, batches) == {"same_images_2": images, "same_order_2": order}


def test_what_an_epoch_and_a_mixture_must_be() -> None:
    """An epoch that repeats an image, lacks some, or is in order is refused; differences from a share are counted."""
    order, size = np.random.default_rng(0).permutation(640), reading.BATCH
    batches = np.split(order, 5)
    reading.check_epoch(batches, 650)
    for wrong in ([*batches[:4], batches[0]], batches[:3], np.split(np.arange(640), 5), [*batches[:4], order[:5]]):
        with pytest.raises(ValueError, match=r"an epoch|not shuffled"):
            reading.check_epoch(list(wrong), 640)
    assert len(batches[0]) == size
    exact = np.tile(np.arange(10) < 7, 200)
    assert mixing.differences(exact, 0.7, 2000) == {"images": 2000, "off_total": 0.0, "off_thousand": 0.0}
    late = np.sort(exact)
    assert mixing.differences(late, 0.7, 1000) == {"images": 2000, "off_total": 300.0, "off_thousand": 300}
