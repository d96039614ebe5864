"""What a run that ran out of memory is advised to change."""

import pytest

from pipeline.command_line import parse_training
from pipeline.memory_errors import is_out_of_memory
from pipeline.model.gpt_config import gpt2_config
from pipeline.plan.advice import cluster_of, memory_advice, smaller_layout
from pipeline.plan.layouts import lay_out

H100 = "NVIDIA H100 80GB HBM3"


def advice(size: str, ranks: int, device: str | None, memory: float = 0.0, *options: str) -> str:
    config, _ = parse_training(["--config", f"configs/igpt_{size}.yaml", "--run", "RUN", *options])
    return memory_advice(config, gpt2_config(config.model), cluster_of(device, memory, ranks))


def test_the_planned_peak_and_a_layout_that_needs_less_are_named() -> None:
    text = advice("xl", 8, H100, 0.0, "--parallel.zero_stage=1")
    assert text.startswith("by plan's estimate ZeRO-1, micro 1 needs 87.48 GB of NVIDIA H100 SXM's 80 GB per rank")
    assert "the fastest that needs less is --parallel.tensor_parallel 2 --batch.micro_size 2: 66.14 GB." in text


def test_without_a_smaller_layout_more_ranks_are_advised() -> None:
    text = advice(
        "xl", 1, H100, 0.0, "--parallel.zero_stage=3", "--parallel.recompute=true", "--parallel.offload=optimizer"
    )
    assert text.endswith("and no layout on 1 ranks needs clearly less; use more ranks.")


def test_an_unknown_accelerator_has_the_memory_that_its_driver_reports() -> None:
    assert "of NVIDIA Next's 20 GB per rank" in advice("s", 2, "NVIDIA Next", 20e9)
    assert "of NVIDIA H100 SXM's 10 GB per rank" in advice("s", 2, f"{H100} MIG 1g.10gb", 10e9)
    assert "needs 11.60 GB per rank" in advice("s", 2, None), "the memory of a CPU's rank is not known"


def test_the_advised_layout_is_clearly_smaller_and_as_fast_as_possible() -> None:
    config, _ = parse_training(["--config", "configs/igpt_l.yaml", "--run", "RUN", "--batch.micro_size=16"])
    model, cluster = gpt2_config(config.model), cluster_of(H100, 0.0, 8)
    planned = lay_out(config, model, cluster)
    smaller = smaller_layout(planned, model, cluster)
    assert smaller
    assert smaller.memory.peak < 0.9 * planned.memory.peak
    assert smaller.config.batch.micro_size == 8
    assert not smaller.config.parallel.recompute


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
            True,
        ),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("NCCL error: unhandled cuda error, Cuda failure 'out of memory'"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Connection closed by peer"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_allocation_are_recognized(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
