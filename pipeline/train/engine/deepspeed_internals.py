"""All uses of undocumented parts of DeepSpeed 0.19.8: only this file may need changes for another version."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.checkpoint.fragments import MOMENTS, Fragment, Part

DISTANT_STEP = 1 << 40
"""A step number that no run reaches."""
Output = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""What the last pipeline stage computes from logits (B, T, V) and targets long (B, T)."""


def skip_shared_memory_collective() -> None:
    """Disables an optional optimization of DeepSpeed on CPU that needs a C++ compiler when the process group starts.

    The first access to `__compatible_ops__` would try the compilers of all ops; no other part of DeepSpeed reads it.
    """
    from deepspeed import ops

    ops.__dict__.setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


def stop_timers(engine: Any) -> None:
    """Replaces DeepSpeed's timers: the pipeline engine's records two CUDA events a step and never deletes them."""
    from deepspeed.utils.timer import NoopTimer

    engine.timers = NoopTimer()


def remove_repeated_passes(engine: Any) -> None:
    """Removes passes over all gradients that change nothing.

    With one data-parallel rank nothing is reduced. In bf16 with ZeRO-1 (BF16_Optimizer) the gradients are one flat fp32
    tensor per parameter group, which is reduced in place, and cleared once: DeepSpeed concatenates these tensors,
    copies the sum back and clears it twice, 28 bytes a parameter and step.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    reduce_and_copy, optimizer = engine.allreduce_and_copy, engine.optimizer
    is_flat = isinstance(optimizer, BF16_Optimizer)

    def reduce(bucket: list[torch.Tensor], group: Any, ranks: float | None = None) -> None:
        if dist.get_world_size(group) == 1:
            return
        if not is_flat:
            reduce_and_copy(bucket, group, ranks)
            return
        for gradients in bucket:
            message = gradients.to(engine.communication_data_type)  # the same tensor if it has this type
            dist.all_reduce(message, group=group)
            message.mul_(1 / (ranks or dist.get_world_size(group)))
            if message is not gradients:
                gradients.copy_(message)

    engine.allreduce_and_copy = reduce
    if is_flat:  # its `step` has cleared the gradients in fp32
        optimizer.zero_grad = lambda set_to_none=True: optimizer.clear_lp_grads(set_to_none)


def reduce_without_waiting(optimizer: Any) -> None:
    """Makes a ZeRO-1 or 2 optimizer reduce gradients to their owners without waiting for the device before each.

    DeepSpeed waits there in order to free gradients that were reduced before, which it only collects without
    contiguous_gradients; its all-reduce of a bucket, in the same stream and into the same buffers, does not wait.
    """
    if not getattr(optimizer, "overlap_comm", False) or not getattr(optimizer, "contiguous_gradients", False):
        return
    reduce_and_copy = optimizer.allreduce_and_copy

    def in_current_stream(*arguments: Any, **options: Any) -> None:
        optimizer.overlap_comm = False  # the caller has made the reduction's stream the current one
        try:
            reduce_and_copy(*arguments, **options)
        finally:
            optimizer.overlap_comm = True

    optimizer.allreduce_and_copy = in_current_stream


def import_muon_uncompiled() -> None:
    """Imports DeepSpeed's Muon optimizer, which no run uses, without torch.compile.

    DeepSpeed imports it to check an optimizer's type, and its functions are decorated with torch.compile, which imports
    Inductor: more than a second of each rank's start.
    """
    from deepspeed.runtime import compiler

    compile_function = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile_function


def read_free_memory_from_cuda() -> None:
    """Makes DeepSpeed ask CUDA for the free memory of a device.

    Where pynvml is installed, DeepSpeed asks that, and takes each entry of CUDA_VISIBLE_DEVICES for an index: ZeRO 1
    and 2 would not start with UUIDs.
    """
    from deepspeed.accelerator import get_accelerator

    get_accelerator().available_memory = lambda device_index=None: torch.cuda.mem_get_info(device_index)[0]


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """A parameter's shape before ZeRO-3 partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def set_progress(engine: Any, steps: int, images: int) -> None:
    """Sets the number of steps and images that an engine has trained on."""
    engine.global_steps, engine.global_samples = steps, images


def restart_accumulation(engine: Any) -> None:
    """Makes the next micro-batch the first of its batch.

    The engine finds the last micro-batch by division, which is wrong after the batch size changed.
    """
    engine.micro_steps = 0


def gradient_norm(engine: Any) -> torch.Tensor:
    """Global norm of the step's gradient before clipping, (), as computed by ZeRO's optimizer."""
    return torch.as_tensor(engine.optimizer._global_grad_norm)


def mean_loss_of_stages(engine: Any) -> float:
    """The mean loss of the step's micro-batches, on all stages; a collective after the last micro-batch."""
    return float(engine._aggregate_total_loss())


def evaluate_stages(engine: Any, micro_batches: Iterator[Any], count: int, output: Output) -> list[torch.Tensor]:
    """`output` of each of `count` micro-batches instead of the loss, on the last stage; [] or None on others."""
    module, loss = engine.module, engine.module.loss_fn
    module.loss_fn, engine.total_loss = output, None
    engine.reset_activation_shape()  # these images may be shorter than in training
    try:
        return engine.eval_batch(micro_batches, reduce_output=None, bcast_loss=False, num_micro_batches=count)
    finally:
        module.loss_fn = loss
        engine.reset_activation_shape()


def from_last_stage(engine: Any, values: torch.Tensor) -> torch.Tensor:
    """Broadcasts the last stage's values to every stage, in place."""
    last = engine.grid.stage_to_global(engine.num_stages - 1)
    dist.broadcast(values, src=last, group=engine.grid.get_pipe_parallel_group())
    return values


@dataclass(frozen=True)
class Partition:
    """A flat fp32 tensor of this rank, its optimizer state, and the fragments it consists of."""

    weight: torch.Tensor
    state: dict[str, torch.Tensor]
    fragments: list[Fragment]

    def flat(self, state: str) -> torch.Tensor:
        """The flat tensor of one state, on the device; zeros for Adam's moments before its first update."""
        if state == "weight":
            return self.weight
        return self.state[state] if state in self.state else torch.zeros_like(self.weight)

    def make_state(self, step: Any) -> None:
        """Sets Adam's step count, and creates moments (zero) that do not exist yet."""
        for moment in MOMENTS:
            if moment not in self.state:
                self.state[moment] = torch.zeros_like(self.weight)
        self.state["step"] = step


@dataclass(frozen=True)
class RankCoordinates:
    """A rank's position among the ranks that share the model's state."""

    rank: int
    """The data-parallel rank."""
    ranks: int
    """The number of data-parallel ranks."""
    parts: dict[str, Part]
    """This rank's part of each parameter that tensor parallelism splits."""

    @property
    def writes_replicated(self) -> bool:
        """Whether this rank writes the parameters that a tensor-parallel group replicates."""
        return all(part.rank == 0 for part in self.parts.values())


class ParameterNames:
    """Maps an engine's parameters to their names and fragments."""

    def __init__(self, model: nn.Module, parts: dict[str, Part]) -> None:
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._parts = parts

    def fragment(
        self, parameter: nn.Parameter, shape: tuple[int, ...], start: int, length: int, offset: int
    ) -> Fragment:
        """shape: the shape of this rank's part of the parameter, before ZeRO partitions it."""
        name = self._names[id(parameter)]
        part = self._parts.get(name)
        return Fragment(name, part.full_shape(shape) if part else shape, start, length, offset, part)


def partitions_of(optimizer: Any, model: nn.Module, coordinates: RankCoordinates) -> Iterator[Partition]:
    """The partitions of a DeepSpeed optimizer that this rank owns.

    model: the complete model, which names the parameters; layers of other stages may be on the meta device.
    """
    names = ParameterNames(model, coordinates.parts)
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _stage_3(optimizer, names)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return _linked(optimizer, optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, names)
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        return _linked(optimizer, optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, names)
    return _unpartitioned(optimizer, names, coordinates.rank, coordinates.ranks)


def _stage_3(optimizer: Any, names: ParameterNames) -> Iterator[Partition]:
    """ZeRO-3: each parameter is partitioned over the ranks, with padding on the last rank."""
    for number, (group, flat) in enumerate(
        zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    ):
        fragments = []
        for parameter in group:
            _, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = size * optimizer._get_param_partition_rank(parameter)
            length = min(size, parameter.ds_numel - start)
            if length > 0:
                fragments.append(names.fragment(parameter, tuple(parameter.ds_shape), start, length, offset))
        with _in_memory(optimizer, number):
            yield Partition(flat.data, optimizer.optimizer.state[flat], fragments)


@contextmanager
def _in_memory(optimizer: Any, number: int) -> Iterator[None]:
    """Swaps a partition of ZeRO-3 in if it is on NVMe, and out again afterwards."""
    on_nvme = optimizer._swappable_optimizer_subgroup(number)
    if on_nvme:
        optimizer._optimizer_states_and_gradient_swap_in(number)
    yield
    if on_nvme:
        optimizer._optimizer_states_and_gradient_swap_out(number)


def _linked(optimizer: Any, groups: Any, flats: Any, names: ParameterNames) -> Iterator[Partition]:
    """ZeRO-1 and 2: a group's parameters are concatenated, and the result is partitioned over the ranks."""
    for group, flat in zip(groups, flats, strict=True):
        fragments = []
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                inside, here = mapping.lp_fragment_address, mapping.hp_fragment_address
                shape = tuple(parameter.shape)
                fragments.append(names.fragment(parameter, shape, inside.start, here.numel, here.start))
        yield Partition(flat.data, optimizer.optimizer.state[flat], fragments)


def _unpartitioned(optimizer: Any, names: ParameterNames, rank: int, ranks: int) -> Iterator[Partition]:
    """ZeRO-0: every rank holds all parameters and writes its share of each."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            first, last = parameter.numel() * rank // ranks, parameter.numel() * (rank + 1) // ranks
            share = names.fragment(parameter, tuple(parameter.shape), first, last - first, first)
            state = _Flattened(optimizer.state[parameter], parameter.shape)
            yield Partition(parameter.data.view(-1), state, [share] if last > first else [])


class _Flattened(dict[str, torch.Tensor]):
    """A flat view of a parameter's optimizer state; setting an item sets it in the optimizer too."""

    def __init__(self, state: dict[str, torch.Tensor], shape: torch.Size) -> None:
        super().__init__({key: value.view(-1) if value.dim() else value for key, value in state.items()})
        self._state, self._shape = state, shape

    def __setitem__(self, key: str, value: torch.Tensor) -> None:
        super().__setitem__(key, value)
        self._state[key] = value.view(self._shape) if value.dim() else value


def step_count(optimizer: Any, step: float, device: torch.device) -> Any:
    """Adam's step count in the optimizer's own type: int for DeepSpeed's CPU Adam, a tensor for torch's."""
    if hasattr(getattr(optimizer, "optimizer", optimizer), "ds_opt_adam"):
        return int(step)
    return torch.tensor(step, dtype=torch.float32, device=device)


def refresh_low_precision(optimizer: Any) -> None:
    """Recomputes the weights of the forward pass from the fp32 weights."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        # A forward pass without a backward pass leaves weights gathered, which would stay as they are.
        optimizer.parameter_offload.partition_all_parameters()
        for number in range(len(optimizer.fp32_partitioned_groups_flat)):
            with _in_memory(optimizer, number):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()


def new_cpu_adam(groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float], epsilon: float) -> Any:
    """DeepSpeed's vectorized CPU Adam with decoupled weight decay; its first use compiles it in about a minute."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    class HistoryFreeAdam(DeepSpeedCPUAdam):
        """CPU Adam with bias corrections that do not depend on restarts.

        DeepSpeed's Adam updates the powers of its betas from step to step, and computes them from scratch when a step
        does not follow the last one. A resumed run would therefore round differently. An update of nothing at a distant
        step, before each step, makes it always compute them from scratch.
        """

        def step(self, closure: None = None) -> None:
            nothing = [torch.zeros(1) for _ in range(4)]
            group = self.param_groups[0]
            moments = (group["lr"], *group["betas"], group["eps"], group["weight_decay"], group["bias_correction"])
            self.ds_opt_adam.adam_update(self.opt_id, DISTANT_STEP, *moments, *nothing)
            super().step(closure)

    return HistoryFreeAdam(groups, lr=learning_rate, betas=betas, eps=epsilon, adamw_mode=True)
