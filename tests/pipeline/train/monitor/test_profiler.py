"""The summary of a profile of an accelerator, from events as torch's profiler makes them (torch.autograd.profiler).

Each kernel is there three times: as itself, in the operation that started it, and in the annotation around it.
"""

from typing import Any

from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from pipeline.train.monitor.profiler import NAME_LENGTH, describe

NCCL = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
PRODUCT = "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off"
STEP_MICROSECONDS = 1000


def event(name: str, start: int, end: int, on_device: bool = False, annotation: bool = False) -> FunctionEvent:
    device = DeviceType.CUDA if on_device else DeviceType.CPU
    thread = 7 if on_device else 1
    made: Any = FunctionEvent
    return made(
        *(0, name, thread, start, end), stack=[], use_device="cuda", device_type=device, is_user_annotation=annotation
    )


def profiled() -> EventList:
    """A step of 1 ms: a matrix product of 400 us and a copy of 100 us, an all-reduce of 300 us."""
    linear, product = event("aten::linear", 0, 50), event("aten::mm", 10, 40)
    product.append_kernel(PRODUCT, 0, 400)
    reduction, record = event("c10d::allreduce_", 60, 100), event("nccl:all_reduce", 70, 90, annotation=True)
    record.append_kernel(NCCL, 0, 300)
    on_device = [
        event("ProfilerStep#5", 20, 1000, on_device=True, annotation=True),
        event("nccl:all_reduce", 500, 800, on_device=True, annotation=True),
        event(PRODUCT, 50, 450, on_device=True),
        event("Memcpy DtoD (Device -> Device)", 450, 550, on_device=True),
        event(NCCL, 500, 800, on_device=True),
    ]
    events = EventList([linear, product, reduction, record, *on_device], use_device="cuda")
    events._build_tree()
    return events.key_averages()


def test_each_kernel_of_an_accelerator_counts_once() -> None:
    assert describe(profiled(), STEP_MICROSECONDS / 1e6) == (
        f"30.0% in communication; longest: {PRODUCT[:NAME_LENGTH]} 40.0%, Memcpy DtoD (Device -> Device) 10.0%"
    )
