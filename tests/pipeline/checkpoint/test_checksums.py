"""How a load is verified: checksums that do not depend on the layout, and a check image that is part of an image."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.checkpoint.checksums import add_up, checksums
from pipeline.checkpoint.fragments import EMA, STATES, Fragment, Part
from pipeline.checkpoint.probe import PROBE_TOKENS, HeldOutImages, probe_batch
from pipeline.model.masks import Batch
from tests.launch import run
from tests.pipeline.conftest import Runner
from tests.pipeline.train.engine.test_topologies import FP32_TOLERANCE

SHAPES = {"transformer.h.0.attn.c_attn.weight": (6, 36), "transformer.wte.weight": (11, 6), "norm": (7,)}
State = dict[tuple[str, str], torch.Tensor]
"""A model's state, by parameter and state."""


@pytest.fixture
def state_dict() -> State:
    torch.manual_seed(0)
    return {(name, state): torch.randn(shape) for name, shape in SHAPES.items() for state in STATES}


def of_ranks(state_dict: State, ranks: list[list[Fragment]]) -> dict[str, str]:
    """The checksums of a state that is divided over ranks like this."""
    parts = []
    for fragments in ranks:
        tensors, index = {}, []
        for fragment in fragments:
            for state in STATES:
                values = state_dict[fragment.name, state]
                held = (fragment.part.of(values) if fragment.part else values).reshape(-1)
                cut = held[fragment.start : fragment.start + fragment.length]
                tensors[fragment.key(state)] = cut.clone()
            part = vars(fragment.part) if fragment.part else None
            entry = {"name": fragment.name, "shape": fragment.shape, "start": fragment.start}
            index.append(entry | {"length": fragment.length, "part": part})
        parts.append(checksums(tensors, index))
    return add_up(parts)


def end_to_end(names: list[str], ranks: int) -> list[list[Fragment]]:
    """All parameters laid end to end, and cut: as ZeRO does it."""
    sizes = {name: int(np.prod(SHAPES[name])) for name in names}
    total, shares, begin = sum(sizes.values()), [], 0
    spans = {}
    for name in names:
        spans[name] = begin
        begin += sizes[name]
    for rank in range(ranks):
        first, last = total * rank // ranks, total * (rank + 1) // ranks
        share = []
        for name, offset in spans.items():
            low, high = max(first, offset), min(last, offset + sizes[name])
            if low < high:
                share.append(Fragment(name, SHAPES[name], low - offset, high - low, 0))
        shares.append(share)
    return shares


def computed_plainly(state_dict: State, state: str) -> int:
    """In Python's integers, which know no overflow, element by element."""
    from hashlib import sha256

    total = 0
    for name in SHAPES:
        bits = state_dict[name, state].reshape(-1).numpy().view(np.uint32).tolist()
        factor = int.from_bytes(sha256(name.encode()).digest()[:8], "big") | 1
        total += factor * sum(value * (2 * place + 1) for place, value in enumerate(bits))
    return total % (1 << 64)


def test_checksums_are_the_same_on_any_layout(state_dict: State) -> None:
    expected = {state: f"{computed_plainly(state_dict, state):016x}" for state in STATES}
    names = list(SHAPES)
    for ranks in (1, 2, 3, 7):
        assert of_ranks(state_dict, end_to_end(names, ranks)) == expected
        assert of_ranks(state_dict, end_to_end(names[::-1], ranks)) == expected
    matrix, *others = names
    rest = end_to_end(others, 1)[0]
    for transposed, dimension, matrices in ((False, 1, 3), (True, 0, 3), (False, 0, 1)):
        parts = [Part(dimension, matrices, rank, 2, transposed) for rank in (0, 1)]
        cut = [
            [Fragment(matrix, SHAPES[matrix], 0, 50, 0, part), Fragment(matrix, SHAPES[matrix], 50, 58, 0, part)]
            for part in parts
        ]
        assert of_ranks(state_dict, [[*cut[0], *rest], cut[1]]) == expected


def test_a_rank_without_fragments_does_not_hide_the_average() -> None:
    """And without an average there is no checksum of one."""
    fragment = Fragment("norm", (7,), 0, 7, 0)
    entry = {"name": "norm", "shape": [7], "start": 0, "length": 7, "part": None}
    tensors = {fragment.key(state): torch.arange(7.0) for state in (*STATES, EMA)}
    whole, nothing = checksums(tensors, [entry]), checksums({}, [])
    assert add_up([whole, nothing]) == whole
    assert set(whole) == {*STATES, EMA} and len(set(whole.values())) == 1
    assert set(add_up([nothing])) == set(STATES)


def test_a_changed_a_swapped_and_a_lost_element_change_the_checksum(state_dict: State) -> None:
    layout = end_to_end(list(SHAPES), 2)
    before = of_ranks(state_dict, layout)

    def differ(change: State) -> set[str]:
        after = of_ranks({**state_dict, **change}, layout)
        return {state for state in STATES if after[state] != before[state]}

    key = ("transformer.wte.weight", "exp_avg")
    bit, swapped, lost, shifted = (state_dict[key].clone() for _ in range(4))
    bit.view(-1).numpy().view(np.uint32)[65] ^= 1
    swapped.view(-1)[[3, 64]] = state_dict[key].view(-1)[[64, 3]]
    lost.view(-1)[60:] = 0
    shifted.view(-1)[1:] = state_dict[key].view(-1)[:-1]
    for values in (bit, swapped, lost, shifted):
        assert differ({key: values}) == {"exp_avg"}
    norms = {("norm", "weight"): state_dict["norm", "exp_avg"], ("norm", "exp_avg"): state_dict["norm", "weight"]}
    assert differ(norms) == {"weight", "exp_avg"}


class OneImage(HeldOutImages):
    """Held-out images, of which the first is this batch."""

    def __init__(self, image: Batch) -> None:
        self.image = image

    def batch(self, numbers: np.ndarray) -> Batch:
        assert numbers.tolist() == [0]
        return self.image


def test_the_probe_predicts_something() -> None:
    tokens = np.arange(256, dtype=np.uint16)[None]
    assert probe_batch(OneImage(Batch(tokens))).tokens.tolist() == tokens[:, :PROBE_TOKENS].tolist()
    assert probe_batch(OneImage(Batch(tokens)), None).tokens.tolist() == tokens.tolist()
    for pixel, length in [(3, PROBE_TOKENS), (200, 256)]:
        masked = np.arange(256)[None] == pixel
        probe = probe_batch(OneImage(Batch(tokens, masked)))
        assert probe.tokens.shape == (1, length)
        assert probe.masked is not None and probe.masked.tolist() == masked[:, :length].tolist()


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of 16x16, longer than the probe."""
    path = tmp_path_factory.mktemp("larger") / "shards"
    options = ["--source.kind=photographs", "--source.train_per_class=3", "--source.test_per_class=1"]
    command = ["-m", "data_prep", "shards", *options, "--resolution=16", "--palette.colors=64", f"--out={path}"]
    finished = run(1, *command, logs=path.parent / "logs")
    assert finished.codes == [0], finished.output
    return path


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, {"parallel__pipeline_stages": 2}),
        pytest.param(2, {"parallel__tensor_parallel": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"parallel__zero_stage": 3, "objective__kind": "masked_color"}, marks=pytest.mark.slow),
    ],
)
def test_a_probe_shorter_than_a_picture_leaves_training_as_it_was(
    larger: Path, tmp_path: Path, ranks: int, settings: dict[str, object]
) -> None:
    """Stages exchange tensors of another size for it, between steps; the next process meets its loss again."""
    runner = Runner(larger, tmp_path)
    common = {"model__resolution": 16, "batch__micro_size": 2, "schedule__decay": "constant", **settings}
    common |= {"checkpoint__every_steps": 2, "validation__every_steps": 3, "validation__images": 2}
    alone = {**common, "parallel__pipeline_stages": 1, "parallel__tensor_parallel": 1, "parallel__zero_stage": 1}
    runner.check_trains("one", 1, **alone, schedule__steps=8)
    runner.check_trains("run", ranks, **common, schedule__steps=5)
    runner.check_trains("run", ranks, **common, schedule__steps=8)
    assert runner.losses("run") == pytest.approx(runner.losses("one"), abs=FP32_TOLERANCE)
