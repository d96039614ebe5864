"""Simulates the time of a training step from blocks, micro-batches, stages and communication.

Stages run DeepSpeed's 1F1B schedule (deepspeed/runtime/pipe/schedule.py, TrainSchedule): of two neighboring stages, one
is in a forward pass and one in a backward pass. Between passes they synchronize, and both wait until gradients and
activations are sent (deepspeed/runtime/pipe/p2p.py sends on the computing stream).

The communication of ZeRO follows DeepSpeed 0.19.8 with the settings of deepspeed_config.py. ZeRO-0 and 1 all-reduce
gradients after the last backward pass. ZeRO-2 reduces them to their owners, bucket by bucket, during every backward
pass; these messages take as long as a reduce-scatter. ZeRO-3 gathers the weights of a block while
the block before it computes, in the forward and in the backward pass, and scatters its gradients. ZeRO-1 and 2 gather
the weights after the update.

Not simulated: reading data, saves, validation, slow and failing ranks, limits of host memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from pipeline.plan.collectives import Group, all_reduce_seconds, gather_seconds, send_seconds
from pipeline.plan.hardware import HOST_BYTES, Links
from pipeline.plan.memory import GATHER_BUCKET, REDUCE_BUCKET, blocks_of_stage

CONTENTION = 0.14
"""The fraction of its rate that computing loses during communication, whose kernels occupy multiprocessors. Fitted to
one published run, see tests/benchmarks/published_runs.py."""


@dataclass(frozen=True)
class Work:
    """A step of one rank of each stage: seconds per rank, and numbers of unpartitioned parameters."""

    layers: int
    micro_batches: int
    forward: float
    """Seconds of a block's forward pass over a micro-batch, split by tensor parallelism, without communication."""
    backward: float
    """Seconds of a block's backward pass, without recomputation."""
    head_forward: float
    """Seconds of the forward pass of head and loss, on the last stage."""
    head_backward: float
    block_parameters: float
    outer_parameters: float
    """Parameters of embeddings and head, which are on the first and the last stage."""
    update: float
    """Seconds in a step for one parameter whose optimizer state the rank owns: passes over gradients, optimizer."""
    stream_bytes: float
    """Bytes of the activations between two blocks, for a micro-batch."""
    update_replicated: float = 0.0
    """Seconds in a step for one parameter that the rank computes with: passes over all gradients."""
    weight_bytes: float = 2.0
    gradient_bytes: float = 4.0
    """Bytes of a parameter's gradient when it is sent."""
    recompute: bool = False
    zero_stage: int = 1
    stages: int = 1
    tensor: int = 1
    data: int = 1
    ranks_per_node: int = 8
    offloads: bool = False
    sequence_parallel: bool = False
    splits_stage_messages: bool = False
    """Whether tensor-parallel ranks send a part each to the next stage, which gathers them; so they always do under
    sequence parallelism, without a gather."""
    product_seconds: tuple[float, float] = (0.0, 0.0)
    """Seconds of one backward product with c_attn and one with c_fc: that for the weight and that for the input take
    equally long. A message of tensor parallelism overlaps with one of them; 0: with nothing."""
    norm_bytes: float = 0.0
    """Bytes of the gradient of one parameter of a norm."""
    norm_parameters: int = 2
    """Of a block."""
    sums_everywhere: bool = True
    """Whether ZeRO-1 and 2 all-reduce gradients, as DeepSpeed's BF16_Optimizer does, instead of reducing them to their
    owners."""
    gathers: int = 2
    """How many times ZeRO-3 gathers a block's weights for a micro-batch."""

    @property
    def data_group(self) -> Group:
        """The data-parallel ranks of a stage: DeepSpeed numbers ranks by stage, then data, then tensor."""
        return Group(self.data, min(self.data, max(1, self.ranks_per_node // self.tensor)))

    def blocks(self, stage: int) -> int:
        """Number of blocks of a stage."""
        return blocks_of_stage(self.layers, self.stages, stage)

    def held(self, stage: int) -> float:
        """Number of parameters of a rank of a stage."""
        outer = self.outer_parameters * ((stage == 0) + (stage == self.stages - 1)) / 2
        return self.blocks(stage) * self.block_parameters / self.tensor + outer


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, divided into parts that add up to it."""

    computing: float
    """Computing, mean over ranks."""
    bubble: float
    """The pipeline bubble, if all stages took equally long."""
    imbalance: float
    """Added by uneven stages; slightly negative with few micro-batches and light last stages."""
    stage_messages: float
    tensor_messages: float
    gradients: float
    """Gradient communication that computing does not hide; under ZeRO-3 also of weights, in all micro-batches."""
    contention: float
    """Added to computing by overlapping communication."""
    weights: float
    """Gathering the weights after the update."""
    update: float
    """The optimizer, and DeepSpeed's passes over gradients and weights in all micro-batches (passes.py)."""

    @property
    def seconds(self) -> float:
        """Seconds of the complete step."""
        return sum(vars(self).values())

    def parts(self) -> dict[str, float]:
        """The parts that take at least a thousandth of the step."""
        return {name: part for name, part in vars(self).items() if abs(part) >= self.seconds / 1000}


def simulate(work: Work, links: Links) -> StepTime:
    """The time of a step after the first few, without failures."""
    passes = [_passes(work, stage, NO_MESSAGES) for stage in range(work.stages)]
    mean = sum(map(sum, passes)) / work.stages
    messages = _tensor_seconds(work, links)
    with_messages = [_passes(work, stage, messages) for stage in range(work.stages)]
    free = pipeline_seconds(passes, (0.0,) * (work.stages - 1), work.micro_batches)
    tensor = pipeline_seconds(with_messages, (0.0,) * (work.stages - 1), work.micro_batches)
    hops = tuple(_hop_seconds(work, stage, links) for stage in range(work.stages - 1))
    staged = pipeline_seconds(with_messages, hops, work.micro_batches) if hops else tensor
    computing, bubble = mean * work.micro_batches, mean * (work.stages - 1)
    waits, slowed = _gradient_seconds(work, with_messages, links)
    held = max(map(work.held, range(work.stages)))
    owners = work.data if work.zero_stage else 1
    host = 16 * held / owners / HOST_BYTES if work.offloads else 0.0
    gathers, gathered = work.zero_stage in (1, 2), ceil(held / GATHER_BUCKET)
    return StepTime(
        computing=computing,
        bubble=bubble,
        imbalance=free - computing - bubble,
        stage_messages=staged - tensor,
        tensor_messages=tensor - free,
        gradients=waits,
        contention=slowed,
        weights=_in_buckets(gather_seconds, work.weight_bytes * held, gathered, work, links) if gathers else 0.0,
        update=held * work.update_replicated + held / owners * work.update + host,
    )


Pass = tuple[float, float]
"""Seconds of a forward and of a backward pass over a micro-batch."""
NO_MESSAGES: Pass = (0.0, 0.0)


def _passes(work: Work, stage: int, messages: Pass) -> Pass:
    """messages: seconds that a block's passes wait for tensor parallelism."""
    forward = work.blocks(stage) * (work.forward + messages[0])
    backward = work.blocks(stage) * (work.backward + messages[1]) + (forward if work.recompute else 0.0)
    last = stage == work.stages - 1
    return forward + last * work.head_forward, backward + last * work.head_backward


def _tensor_seconds(work: Work, links: Links) -> Pass:
    """What a block's passes wait for tensor parallelism, as train/engine/tensor_group.py communicates.

    Not counted: the two gathers outside the blocks, and the sum of the last norm's gradient.

    With complete positions each pass has two all-reduces. With sequence parallelism the forward pass has two gathers
    and two scatters of positions, and the backward pass two gathers more. The messages of the backward pass overlap
    with a product, except for the gathers of the outputs' gradients.
    """
    group = _tensor_group(work)
    if not work.sequence_parallel:
        message = all_reduce_seconds(work.stream_bytes, group, links)
        return 2 * message, sum(_behind(message, product) for product in work.product_seconds)
    message = gather_seconds(work.stream_bytes, group, links)
    behind = 2 * sum(_behind(message, product) for product in work.product_seconds)
    norms = work.norm_parameters * all_reduce_seconds(work.norm_bytes, group, links)
    return 4 * message, 2 * message + behind + norms


def _tensor_group(work: Work) -> Group:
    return Group(work.tensor, min(work.tensor, work.ranks_per_node))


def _behind(message: float, product: float) -> float:
    """Seconds that a message adds to a product that it overlaps with."""
    return max(0.0, message - product) + CONTENTION * min(message, product)


def _hop_seconds(work: Work, stage: int, links: Links) -> float:
    """Seconds of a message to the next stage."""
    parts = work.tensor if work.sequence_parallel or work.splits_stage_messages else 1
    sent = send_seconds(work.stream_bytes / parts, _leaves_node(work, stage), links)
    if work.sequence_parallel or parts == 1:
        return sent
    return sent + gather_seconds(work.stream_bytes, _tensor_group(work), links)


def _leaves_node(work: Work, stage: int) -> bool:
    """Whether any rank sends to the next stage in another node."""
    ranks, node = work.data * work.tensor, work.ranks_per_node
    own = range(stage * ranks, (stage + 1) * ranks)
    return ranks >= node or any(rank // node != (rank + ranks) // node for rank in own)


def pipeline_seconds(passes: list[Pass], hops: tuple[float, ...], micro_batches: int) -> float:
    """Seconds until all stages of a pipeline have finished all forward and backward passes.

    passes: of each stage; hops: seconds of one message between each two neighboring stages.
    """
    if len(passes) == 1:
        return micro_batches * sum(passes[0])
    return _one_forward_one_backward(tuple(passes), hops, micro_batches)


@lru_cache(maxsize=4096)
def _one_forward_one_backward(passes: tuple[Pass, ...], hops: tuple[float, ...], micro_batches: int) -> float:
    stages = len(passes)
    clocks = [0.0] * stages
    for step in range(2 * (micro_batches + stages - 1)):
        for stage in range(1, stages):
            if (step - stage) % 2 == 0:  # this stage is in a forward pass, the one before in a backward pass
                receives = 0 <= _forward_number(step, stage) < micro_batches
                sends = 0 <= _backward_number(step - 1, stage, stages) < micro_batches
                if receives or sends:
                    both_ready = max(clocks[stage - 1], clocks[stage])
                    clocks[stage - 1] = clocks[stage] = both_ready + (receives + sends) * hops[stage - 1]
        for stage, (forward, backward) in enumerate(passes):
            is_forward = (step - stage) % 2 == 0
            number = _forward_number(step, stage) if is_forward else _backward_number(step, stage, stages)
            if 0 <= number < micro_batches:
                clocks[stage] += forward if is_forward else backward
    return max(clocks)


def _forward_number(step: int, stage: int) -> int:
    """Number of the micro-batch in a stage's forward pass; step and stage are both even or both odd."""
    return (step - stage) // 2


def _backward_number(step: int, stage: int, stages: int) -> int:
    """Number of the micro-batch in a stage's backward pass; one of step and stage is odd."""
    return (step + stage + 1) // 2 - stages


def _gradient_seconds(work: Work, passes: list[Pass], links: Links) -> tuple[float, float]:
    """Seconds that computing waits for gradients (and ZeRO-3's weights), and seconds that it is slowed down by."""
    if work.zero_stage == 3:
        return _stage_3_seconds(work, links)
    held = max(map(work.held, range(work.stages)))
    summed = work.sums_everywhere or work.zero_stage == 0
    buckets = ceil(held / REDUCE_BUCKET)
    collective, messages = (all_reduce_seconds, 1) if summed else (gather_seconds, buckets)
    once = _in_buckets(collective, work.gradient_bytes * held, messages, work, links)
    if work.zero_stage < 2:
        return once, 0.0
    backward = Stream()
    for _ in range(buckets):
        backward.compute(passes[0][1] / buckets)
        backward.wait()
        backward.send(once / buckets)
    backward.wait()
    slowed = backward.slowed
    return work.micro_batches * (backward.clock - passes[0][1] - slowed), work.micro_batches * slowed


Collective = Callable[[float, Group, Links], float]


def _in_buckets(collective: Collective, size: float, buckets: int, work: Work, links: Links) -> float:
    """Seconds to communicate `size` bytes in equal buckets."""
    return buckets * collective(size / buckets, work.data_group, links)


class Stream:
    """The timeline of a rank that computes while it communicates; messages are sent one after the other."""

    def __init__(self) -> None:
        self.clock, self.free, self.slowed = 0.0, 0.0, 0.0

    def compute(self, seconds: float) -> None:
        """Computes; slower while a message is being sent."""
        loss = CONTENTION * min(seconds, max(0.0, self.free - self.clock))
        self.clock += seconds + loss
        self.slowed += loss

    def send(self, seconds: float) -> float:
        """Sends a message after the previous ones; returns the time of its arrival."""
        self.free = max(self.clock, self.free) + seconds
        return self.free

    def wait(self, until: float | None = None) -> None:
        """Waits until a message arrives, or for all messages."""
        self.clock = max(self.clock, self.free if until is None else until)


def _stage_3_seconds(work: Work, links: Links) -> tuple[float, float]:
    """The same for ZeRO-3: the weights of the next block are gathered while a block computes."""
    gather = gather_seconds(work.weight_bytes * work.block_parameters, work.data_group, links)
    scatter = gather_seconds(work.gradient_bytes * work.block_parameters, work.data_group, links)
    outer = work.outer_parameters / 2
    stream, again = Stream(), work.gathers > 1
    stream.send(gather_seconds(work.weight_bytes * outer, work.data_group, links))
    arrival = stream.send(gather)
    for block in range(work.layers):
        stream.wait(arrival)
        arrival = stream.send(gather) if block < work.layers - 1 else stream.clock
        stream.compute(work.forward)
    arrival = stream.send(gather) if again else stream.clock
    stream.compute(work.head_forward + work.head_backward)
    for block in range(work.layers):
        stream.wait(arrival)
        arrival = stream.send(gather) if again and block < work.layers - 1 else stream.clock
        stream.compute(work.backward + (work.forward if work.recompute else 0.0))
        stream.send(scatter)
    stream.send(gather_seconds(work.gradient_bytes * outer, work.data_group, links))
    stream.wait()
    waits = stream.clock - stream.slowed - sum(_passes(work, 0, NO_MESSAGES))
    return work.micro_batches * waits, work.micro_batches * stream.slowed
