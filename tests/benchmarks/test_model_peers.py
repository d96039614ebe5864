"""What the scripts of the model's peers share: loops that take turns, starts of commands, votes, budgets of time."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.evaluate.features.labelled import Labelled
from pipeline.evaluate.tasks.knn import predictions
from tests.benchmarks import training_peers
from tests.benchmarks.peers import measure
from tests.benchmarks.peers.classifying.work import NEIGHBORS, TEMPERATURE, Given, vote, write
from tests.benchmarks.peers.measure import Measured, Script, compare
from tests.benchmarks.peers.representation import budget
from tests.benchmarks.peers.starting.command import turn

LOOP = """
import sys
from tests.benchmarks.peers.paused import serve_loop
from tests.benchmarks.peers.training.work import Turns, Work

work = Work(1, 8, 1, 4, 3, "fp32", False, 2, "", "", "")

def run(loop):
    turns = Turns(work, loop)
    for step in range(int(sys.argv[1])):
        turns.loss = float(step)
        turns.after_step(lambda: turns.save(lambda: None))
    raise ValueError("no more steps")

serve_loop(run)
"""


def loop_script(folder: Path, steps: int) -> Script:
    """A loop of some steps, two a turn, in a process."""
    (folder / "loop.py").write_text(LOOP)
    return Script("loop", "loop", (steps,), None, (("PYTHONPATH", f"{measure.ROOT}:{folder}"),))


def test_a_loop_stops_after_each_turn_and_goes_on_in_the_next(tmp_path: Path) -> None:
    """The turns' last steps, with the warm-up's before them; a loop that fails is named with its error."""
    [lasting] = compare(loop_script(tmp_path, 100), turns=3)
    assert lasting.error is None and lasting.turns["loss"] == [3.0, 5.0, 7.0] and lasting.turns["work"] == [6, 6, 6]
    [failing] = compare(loop_script(tmp_path, 4), turns=3)
    assert failing.error == "ValueError: no more steps"


def test_a_save_counts_as_one_in_500_steps() -> None:
    """A turn of 16 images in 2 s, and a save of 5 s."""
    measured = Measured(Script("ours", ""), {"work": [16.0], "seconds": [7.0], "saving": [5.0]})
    training_peers.add_rates([measured])
    assert measured.turns["rate"] == pytest.approx([16 / (2 + 5 * training_peers.STEPS / 500)])


def test_a_command_is_timed_to_its_line_and_killed() -> None:
    """A command that would run for a minute; one that ends before the line raises its last line."""
    code = "import time; print('starts', flush=True); time.sleep(0.3); print('step 1', flush=True); time.sleep(60)"
    began = time.monotonic()
    assert 0.3 < turn(["{python}", "-c", code], r"step \d")["first_step"] < 20
    assert time.monotonic() - began < 30
    with pytest.raises(RuntimeError, match=r"^ValueError: nothing$"):
        turn([sys.executable, "-c", "raise ValueError('nothing')"], "step")
    assert turn(["{python}", "-c", "pass"], None)["work"] == 1.0


def test_the_vote_of_peers_that_only_search_is_ours(tmp_path: Path) -> None:
    """Brute force in float64 and the shared vote against `evaluate`'s k-NN; accuracy above chance, below 1."""
    write(tmp_path, bank=4_000, queries=400, width=256)
    given = Given(tmp_path)
    bank, queries = (each.astype(np.float64) for each in (given.bank, given.queries))
    bank, queries = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (bank, queries))
    similarity = queries @ bank.T
    rows = np.argsort(-similarity, axis=1)[:, :NEIGHBORS]
    theirs = vote(np.take_along_axis(similarity, rows, axis=1), given.bank_labels[rows])
    train = Labelled(given.bank, given.bank_labels)
    [ours] = predictions(train, given.queries, [NEIGHBORS], TEMPERATURE, torch.device("cpu"))
    np.testing.assert_array_equal(ours, theirs)
    assert 0.15 < (ours == given.query_labels).mean() < 0.9


def test_pretraining_ends_with_its_budget_and_resumes(tmp_path: Path) -> None:
    """The learning rate rises and falls to 0; a second call with the budget used up trains no further."""
    np.save(tmp_path / "train.npy", np.zeros((2 * budget.BATCH, 4, 4, 3), np.uint8))
    views = budget.Views(tmp_path, lambda image: [torch.ones(2)])
    model, rates = torch.nn.Linear(2, 1), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(batch: list[torch.Tensor]) -> torch.Tensor:
        rates.append(optimizer.param_groups[0]["lr"])
        return model(batch[0]).square().mean()

    budget.pretrain(model, optimizer, views, loss, 0.5, tmp_path)
    assert 0 <= rates[-1] < 0.03 < max(rates) <= 0.1
    trained, steps = model.weight.detach().clone(), len(rates)
    fresh = torch.nn.Linear(2, 1)
    budget.pretrain(fresh, torch.optim.SGD(fresh.parameters(), lr=0.1), views, loss, 0.5, tmp_path)
    assert len(rates) == steps and torch.equal(fresh.weight, trained)
