"""The simulator against DeepSpeed's own schedule, closed forms, rings in which each rank sends, and published runs."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Literal

import pytest

from pipeline import costs
from pipeline.config import BatchConfig, ModelConfig, ParallelConfig, TrainConfig
from pipeline.model.gpt_config import gpt2_config
from pipeline.plan.block_times import BlockTimes, estimated, measured, read_block_times
from pipeline.plan.collectives import Group, all_reduce_seconds, gather_seconds
from pipeline.plan.hardware import HARDWARE, Links, hardware_of
from pipeline.plan.layouts import Cluster, alternatives, lay_out
from pipeline.plan.simulator import Stream, Work, pipeline_seconds, simulate
from tests.benchmarks.scale import PUBLISHED, held_out_errors, layouts_table, scale_table
from tests.pipeline.plan.test_plan import XL, plan

H100 = costs.ACCELERATORS["h100-80gb"]
FREE = Links(float("inf"), float("inf"), 0.0, 0.0)
REAL = HARDWARE[H100.name].links
WORK = Work(
    layers=24,
    micro_batches=8,
    forward=0.001,
    backward=0.0021,
    head_forward=0.0004,
    head_backward=0.0008,
    block_parameters=50e6,
    outer_parameters=2e6,
    update=1e-11,
    stream_bytes=64e6,
)
ROW = {
    "width": 3072,
    "heads": 24,
    "positions": 4096,
    "images": 1,
    "forward_seconds": 0.004,
    "backward_seconds": 0.008,
    "head_forward_seconds": 0.0002,
    "head_backward_seconds": 0.0004,
    "update_seconds_per_parameter": 1e-11,
}


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 4), (3, 9), (8, 4), (5, 1), (12, 40)])
@pytest.mark.parametrize("backward", [1.0, 2.0, 0.5])
def test_equal_stages_wait_for_the_bubble_and_no_longer(stages: int, micro_batches: int, backward: float) -> None:
    seconds = pipeline_seconds([(1.0, backward)] * stages, (0.0,) * (stages - 1), micro_batches)
    assert seconds == pytest.approx((micro_batches + stages - 1) * (1 + backward))
    work = replace(WORK, micro_batches=micro_batches, stages=stages, head_forward=0, head_backward=0, layers=120)
    step = simulate(work, FREE)
    assert step.bubble / (step.bubble + step.computing) == pytest.approx(costs.bubble(stages, micro_batches))
    assert step.imbalance == pytest.approx(0, abs=1e-9)


def commands_of_deepspeed(passes: list[tuple[float, float]], hops: list[float], micro_batches: int) -> float:
    """The same seconds from the commands that DeepSpeed's TrainSchedule gives, run one by one."""
    from deepspeed.runtime.pipe import schedule

    stages = len(passes)
    queues = [
        [command for step in schedule.TrainSchedule(micro_batches, stages, stage).steps() for command in step]
        for stage in range(stages)
    ]
    clocks, places = [0.0] * stages, [0] * stages
    partner = {schedule.SendActivation: 1, schedule.SendGrad: -1, schedule.RecvActivation: -1, schedule.RecvGrad: 1}
    while any(place < len(queue) for place, queue in zip(places, queues, strict=True)):
        before = list(places)
        for stage in range(stages):
            if places[stage] == len(queues[stage]):
                continue
            command = queues[stage][places[stage]]
            if isinstance(command, schedule.ForwardPass | schedule.BackwardPass):
                clocks[stage] += passes[stage][isinstance(command, schedule.BackwardPass)]
            elif type(command) in partner:
                other = stage + partner[type(command)]
                theirs = queues[other][places[other]]
                pair = {type(command), type(theirs)}
                if (
                    pair
                    not in (
                        {schedule.SendActivation, schedule.RecvActivation},
                        {schedule.SendGrad, schedule.RecvGrad},
                    )
                    or other + partner[type(theirs)] != stage
                ):
                    continue
                clocks[stage] = clocks[other] = max(clocks[stage], clocks[other]) + hops[min(stage, other)]
                places[other] += 1
            places[stage] += 1
        assert places != before, "a deadlock"
    return max(clocks)


@pytest.mark.parametrize(
    ("passes", "hops", "micro_batches"),
    [
        ([(1.0, 2.0), (1.0, 2.0)], [0.1], 4),
        ([(2.0, 3.5), (1.0, 2.0), (1.5, 4.0)], [0.1, 0.4], 7),
        ([(1.0, 2.0), (3.0, 5.0), (1.0, 2.0), (2.0, 2.0), (1.0, 1.0)], [0.3, 0.0, 0.2, 1.0], 3),
    ],
)
def test_stages_run_the_commands_that_deepspeed_gives(
    passes: list[tuple[float, float]], hops: list[float], micro_batches: int
) -> None:
    expected = commands_of_deepspeed(passes, hops, micro_batches)
    assert pipeline_seconds(passes, tuple(hops), micro_batches) == pytest.approx(expected)


def ring_by_hand(size: float, in_nodes: list[int], links: Links) -> float:
    """Seconds until every rank of a ring has all parts, each hop at its own speed; one part goes round a step."""
    ranks = sum(in_nodes)
    node = [number for number, members in enumerate(in_nodes) for _ in range(members)]
    ports = min(in_nodes)
    clocks = [0.0] * ranks
    for _ in range(ranks - 1):
        arrived = []
        for rank in range(ranks):
            crosses = node[rank] != node[(rank + 1) % ranks]
            speed = min(links.node_bytes, ports * links.network_bytes) if crosses else links.node_bytes
            latency = links.network_latency if crosses else links.node_latency
            arrived.append(clocks[rank] + size / ranks / speed + latency)
        # A part is passed on when it has come and the rank's own has been sent.
        clocks = [max(arrived[rank], arrived[rank - 1]) for rank in range(ranks)]
    return max(clocks)


def test_a_ring_takes_what_its_hops_take() -> None:
    links = Links(300e9, 20e9, 2e-6, 10e-6)
    for size in (1e3, 1e9):
        assert gather_seconds(size, Group(8, 8), links) == pytest.approx(ring_by_hand(size, [8], links))
        assert gather_seconds(size, Group(4, 1), links) == pytest.approx(ring_by_hand(size, [1] * 4, links))
        assert gather_seconds(size, Group(12, 4), links) == pytest.approx(ring_by_hand(size, [4] * 3, links))
    # 2 (n - 1) / n of the bytes leave each rank.
    assert all_reduce_seconds(1e9, Group(8, 8), replace(links, node_latency=0.0)) == pytest.approx(1.75e9 / 300e9)
    assert all_reduce_seconds(1e3, Group(512, 8), links) < 2 * gather_seconds(1e3, Group(512, 8), links)
    assert gather_seconds(1e9, Group(1, 1), links) == all_reduce_seconds(1e9, Group(1, 1), links) == 0


def test_messages_behind_computing_are_waited_for_as_counted_by_hand() -> None:
    stream = Stream()
    stream.compute(3.0)
    stream.send(2.0)  # until 5
    stream.compute(1.0)  # 1 and 0.14 of it
    assert (stream.clock, stream.slowed) == pytest.approx((4.14, 0.14))
    stream.wait()
    stream.compute(1.0)
    assert stream.clock == pytest.approx(6.0)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_one_rank_waits_for_nothing(zero_stage: int) -> None:
    step = simulate(replace(WORK, zero_stage=zero_stage), REAL)
    waits = (step.gradients, step.weights, step.contention, step.stage_messages, step.tensor_messages, step.bubble)
    assert waits == pytest.approx((0.0,) * 6, abs=1e-12)
    once = 24 * (0.001 + 0.0021) + 0.0012
    assert step.seconds == pytest.approx(8 * once + WORK.held(0) * 1e-11)


LAYOUTS = [
    {"zero_stage": 1, "data": 64},
    {"zero_stage": 2, "data": 64},
    {"zero_stage": 3, "data": 64},
    {"zero_stage": 1, "data": 8, "stages": 8},
    {"zero_stage": 2, "data": 16, "tensor": 4},
    {"zero_stage": 1, "data": 2, "stages": 5},
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_faster_links_are_never_slower_and_free_ones_cost_nothing(layout: dict[str, int]) -> None:
    work = replace(WORK, **layout)  # type: ignore[arg-type]
    for node, network in product((1.5, 1.0), (4.0, 1.0)):
        faster = replace(REAL, node_bytes=node * REAL.node_bytes, network_bytes=network * REAL.network_bytes)
        assert simulate(work, faster).seconds <= simulate(work, REAL).seconds * (1 + 1e-9)
        assert simulate(work, replace(faster, network_latency=0)).seconds <= simulate(work, faster).seconds + 1e-9
    free = simulate(work, FREE)
    assert free.seconds == pytest.approx(free.computing + free.bubble + free.imbalance + free.update)


def test_computing_again_takes_one_more_forward_pass() -> None:
    once, again = (simulate(replace(WORK, recompute=value), FREE).computing for value in (False, True))
    assert again - once == pytest.approx(8 * 24 * 0.001)


def test_hops_leave_a_node_where_the_ranks_of_a_stage_end_in_it() -> None:
    """8 ranks a node: 2 a stage leave it after every fourth stage, 8 after each, 3 within the second and third."""
    inside, between = 64e6 / REAL.node_bytes + 5e-6, 64e6 / REAL.network_bytes + 15e-6

    def last_hops(data: int, stages: int) -> float:
        alone = replace(WORK, micro_batches=1, data=data, stages=stages, head_forward=0.0, head_backward=0.0)
        return simulate(alone, REAL).stage_messages

    assert last_hops(2, 4) == pytest.approx(2 * 3 * inside)
    assert last_hops(2, 5) == pytest.approx(2 * (3 * inside + between))
    assert last_hops(8, 3) == pytest.approx(2 * 2 * between)
    assert last_hops(3, 4) == pytest.approx(2 * (inside + 2 * between))


def test_zero_sends_as_many_bytes_as_deepspeed() -> None:
    """16 ranks of one node, so that all is at one speed: bytes over it are what is waited for without computing."""
    links = Links(100e9, 100e9, 0.0, 0.0)
    idle = replace(
        WORK, data=16, ranks_per_node=16, forward=0.0, backward=0.0, head_forward=0.0, head_backward=0.0, layers=10
    )
    parameters, spread = idle.held(0), 15 / 16
    one = simulate(replace(idle, zero_stage=1), links)
    assert one.gradients == pytest.approx(2 * 4 * parameters * spread / 100e9)
    assert one.weights == pytest.approx(2 * parameters * spread / 100e9)
    two = simulate(replace(idle, zero_stage=2), links)
    assert two.gradients == pytest.approx(8 * one.gradients)
    three = simulate(replace(idle, zero_stage=3, outer_parameters=0.0), links)
    assert three.gradients == pytest.approx(8 * (2 + 2 + 4) * 500e6 * spread / 100e9)
    assert three.weights == 0


def test_published_runs_that_nothing_was_fitted_to_are_met() -> None:
    errors = held_out_errors(is_3d=False)
    assert len(errors) > 30
    assert sum(map(abs, errors)) / len(errors) < 0.08
    assert sum(abs(error) <= 0.20 for error in errors) >= len(errors) - 2  # two of nanotron's, 8.9B with TP
    assert max(map(abs, errors)) < 0.25
    fitted = [run for run in PUBLISHED if run.fitted]
    assert len(fitted) == 5
    assert all(run.simulated()[0] == pytest.approx(run.mfu, rel=0.01) for run in fitted)
    assert len(scale_table()) == len(PUBLISHED) + 5


def test_published_runs_with_stages_and_tensor_parallelism_are_met() -> None:
    """All are slower than simulated: software of 2021, which materializes attention."""
    errors = held_out_errors(is_3d=True)
    assert len(errors) > 20
    assert sum(map(abs, errors)) / len(errors) < 0.22
    assert sorted(errors)[-2] < 0.36
    assert min(errors) > 0


def test_the_speed_of_published_runs_falls_with_their_number_of_gpus_as_simulated() -> None:
    """Megatron-LM's two models on three numbers of GPUs each: the error changes by less than two points."""
    for model in ("175B", "530B"):
        runs = [run for run in PUBLISHED if run.source == "Megatron-LM" and run.model == model]
        errors = [run.simulated()[0] / run.mfu - 1 for run in runs]
        assert len(runs) == 3
        assert max(errors) - min(errors) < 0.02


def tensor_parallel_step(sequence: bool, products: tuple[float, float]) -> float:
    """Seconds of tensor messages for one block, of 8 GB between blocks, on two ranks with links of 1 GB/s."""
    links = Links(1e9, 1e9, 0.0, 0.0)
    work = Work(
        layers=1, micro_batches=1, forward=100.0, backward=200.0, head_forward=0.0, head_backward=0.0,
        block_parameters=2.0, outer_parameters=0.0, update=0.0, stream_bytes=8e9, tensor=2,
        sequence_parallel=sequence, product_seconds=products,
    )  # fmt: skip
    return simulate(work, links).tensor_messages


def test_tensor_messages_are_those_of_the_engine_and_overlap_with_products() -> None:
    """A gather or a scatter takes 4 s, an all-reduce 8 s. The message that a product hides slows it by 14%."""
    assert tensor_parallel_step(False, (0.0, 0.0)) == pytest.approx(2 * 8 + 2 * 8)
    assert tensor_parallel_step(True, (0.0, 0.0)) == pytest.approx(4 * 4 + 2 * 4 + 4 * 4)
    assert tensor_parallel_step(False, (20.0, 6.0)) == pytest.approx(2 * 8 + 0.14 * 8 + 2 + 0.14 * 6)
    assert tensor_parallel_step(True, (20.0, 3.0)) == pytest.approx(6 * 4 + 2 * 0.14 * 4 + 2 * (1 + 0.14 * 3))


def xl(ranks: int, **parallel: object) -> tuple[TrainConfig, Cluster]:
    config = TrainConfig(
        model=ModelConfig(size="xl", resolution=64),
        batch=BatchConfig(global_size=ranks, micro_size=1),
        parallel=ParallelConfig(**parallel),  # type: ignore[arg-type]
        precision="bf16",
    )
    return config, Cluster(H100, ranks, 8, hardware_of(H100))


def test_layouts_of_xl_are_listed_for_the_batch_of_the_paper_and_larger_ones() -> None:
    lines = layouts_table(((1024, 64), (1024, 1024)))
    assert len(lines) == 4
    rows = [[cell.strip() for cell in line.split("|")] for line in lines[2:]]
    assert "stages" in rows[0][3]  # because only every sixteenth rank has an image
    assert "stages" in rows[0][5] and "tensor" in rows[0][5]
    (paper, combined), (larger, _) = ([float(row[number].strip("%")) for number in (4, 6)] for row in rows)
    assert paper < combined < 10 < 25 < larger


def test_a_stated_mfu_is_what_computing_reaches() -> None:
    config, cluster = xl(64, zero_stage=1)
    model = gpt2_config(config.model)
    layout = lay_out(config, model, replace(cluster, mfu=0.5))
    flops = 64 * 4096 * costs.flops_per_token(model)
    assert layout.step.computing == pytest.approx(flops / (64 * 0.5 * H100.bf16_flops))


def test_float8_is_planned_as_bf16_with_its_copies_and_only_where_it_can_be_trained() -> None:
    bf16, cluster = xl(64, zero_stage=1)
    config = replace(bf16, precision="fp8")
    model = gpt2_config(config.model)
    as_bf16, layout = (lay_out(each, model, cluster) for each in (bf16, config))
    assert layout.step == as_bf16.step
    copies = 2 * (5 * 4096 * 3072 + 4 * 3072**2)
    assert layout.memory.peak - as_bf16.memory.peak == pytest.approx(copies * layout.memory.fragmentation)
    found = [each.config.parallel for each in alternatives(config, model, cluster)]
    assert {(each.zero_stage, each.tensor_parallel) for each in found} == {(1, 1), (2, 1)}


def test_an_estimated_block_reaches_more_of_the_peak_in_wider_models_and_larger_micro_batches() -> None:
    def reached(size: Literal["s", "m", "l", "xl"], images: int) -> float:
        config = TrainConfig(model=ModelConfig(size=size), batch=BatchConfig(micro_size=images), precision="bf16")
        model = gpt2_config(config.model)
        seconds = estimated(config, model, H100.bf16_flops, hardware_of(H100))
        passes = model.n_layer * (seconds.forward + seconds.backward) + seconds.head_forward + seconds.head_backward
        return images * model.n_positions * costs.flops_per_token(model) / passes / H100.bf16_flops

    assert reached("s", 1) < reached("s", 16) < reached("m", 16) < reached("l", 16) < reached("xl", 16) < 0.628
    assert reached("xl", 1) == pytest.approx(reached("xl", 16))


def test_measured_blocks_are_taken_over_and_scaled_by_flops(tmp_path: Path) -> None:
    path = tmp_path / "blocks.json"
    small = ROW | {"width": 512, "heads": 8, "positions": 1024, "images": 16, "forward_seconds": 1.0}
    path.write_text(json.dumps({"device": "NVIDIA H100 80GB HBM3", "rows": [small, ROW]}))
    times = read_block_times(str(path))
    config, cluster = xl(64, zero_stage=1)
    model = gpt2_config(config.model)
    seconds = measured(times, config, model)
    assert vars(seconds) == pytest.approx(
        {"forward": 0.004, "backward": 0.008, "head_forward": 0.0002, "head_backward": 0.0004, "byte": 1e-11 / 40}
    )
    four = replace(config, batch=BatchConfig(global_size=256, micro_size=4))
    assert measured(times, four, model).forward == pytest.approx(4 * 0.004)
    # Half as many positions: half the tokens, and attention's half of them.
    shorter = gpt2_config(ModelConfig(layers=60, width=3072, heads=24, resolution=32))
    wide, attention = 72 * 3072**2, 12 * 3072
    scale = 1024 * (wide + attention * 1024) / (4096 * (wide + attention * 4096))
    assert measured(BlockTimes("", (times.rows[1],)), config, shorter).forward == pytest.approx(0.004 * scale)
    layout = lay_out(config, model, replace(cluster, block_times=times))
    assert layout.step.computing == pytest.approx(60 * 0.012 + 0.0006)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a readable JSON file"),
        ({"rows": [ROW]}, "has no `device`"),
        ({"device": "NVIDIA H100 80GB HBM3", "rows": []}, "has no `rows`"),
        ({"device": "NVIDIA H100 80GB HBM3", "rows": [{"width": 3}]}, "rows[0] has width; it must have backward_sec"),
        (
            {"device": "NVIDIA H100 80GB HBM3", "rows": [ROW, ROW | {"images": 0}]},
            "rows[1]: images is 0; it must be a number above 0.",
        ),
        ({"device": "NVIDIA A100-SXM4-80GB", "rows": [ROW]}, "was measured on 'NVIDIA A100-SXM4-80GB'; it must"),
    ],
)
def test_a_bad_file_of_block_times_is_an_error_of_one_sentence(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "blocks.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    finished = plan(tmp_path, *XL, "--block_times", path)
    assert finished.codes == [2]
    assert message in finished.output
    assert finished.output.count("\n") == 1


def test_blocks_measured_in_bf16_are_not_taken_for_others(tmp_path: Path) -> None:
    path = tmp_path / "blocks.json"
    path.write_text(json.dumps({"device": "NVIDIA H100 80GB HBM3", "rows": [ROW]}))
    finished = plan(tmp_path, *XL, "--block_times", path, "--precision", "fp32")
    assert finished.codes == [2]
    assert finished.output.startswith("error: --block_times has blocks measured in bf16, but precision is fp32")


@pytest.mark.parametrize("device", ["CPU", "NVIDIA A100-SXM4-80GB"])
def test_blocks_measured_on_another_device_are_not_taken_over(tmp_path: Path, device: str) -> None:
    path = tmp_path / "blocks.json"
    path.write_text(json.dumps({"device": device, "rows": [ROW]}))
    finished = plan(tmp_path, *XL, "--block_times", path)
    assert finished.codes == [2]
    assert f"was measured on {device!r}; it must be measured on --accelerator, NVIDIA H100 SXM." in finished.output


def test_no_layout_takes_less_than_its_flops() -> None:
    config, cluster = xl(64, zero_stage=2)
    model = gpt2_config(config.model)
    least = 64 * 4096 * costs.flops_per_token(model) / (64 * H100.bf16_flops)
    layouts = list(alternatives(config, model, cluster))
    assert len(layouts) > 50
    assert all(layout.seconds > least for layout in layouts)
    for step in (layout.step for layout in layouts):
        assert all(part > -1e-9 for name, part in vars(step).items() if name != "imbalance")
        assert abs(step.imbalance) <= step.bubble + 1e-9
