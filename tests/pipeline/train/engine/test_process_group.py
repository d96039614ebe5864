"""What a rank sets before its NCCL group starts; CUDA itself is replaced."""

from pathlib import Path

from tests.launch import run

ONE_RANK = """
import os
from datetime import timedelta
from types import SimpleNamespace
import deepspeed, torch
from deepspeed.accelerator import cuda_accelerator, real_accelerator
from data_prep.common.logs import configure_logging
from pipeline.distributed import Ranks
from pipeline.train.engine.process_group import set_heartbeat_timeout, start_group

configure_logging()
HEARTBEAT = "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"
os.environ["CUDA_VISIBLE_DEVICES"] = "GPU-8e3f,GPU-77ab"
memory = SimpleNamespace(free=1)
cuda_accelerator.pynvml = SimpleNamespace(
    nvmlDeviceGetHandleByIndex=lambda index: index, nvmlDeviceGetMemoryInfo=lambda handle: memory
)
real_accelerator.ds_accelerator = cuda_accelerator.CUDA_Accelerator()
torch.cuda.set_device = lambda device: None
torch.cuda.current_device = lambda: 0
torch.cuda.mem_get_info = lambda device: (1, 2)
torch.cuda.get_device_properties = lambda device: SimpleNamespace(pci_domain_id=0, pci_bus_id=0, pci_device_id=0)

class Starts(Exception):
    pass

def init_process_group(*backend, **options):
    raise Starts

torch.distributed.init_process_group = init_process_group
for minutes, own in ((65, None), (525600, None), (65, "600"), (65, "7200"), (65, "never")):
    os.environ.pop(HEARTBEAT, None)
    if own:
        os.environ[HEARTBEAT] = own
    try:
        set_heartbeat_timeout(timedelta(minutes=minutes), Ranks(0, 1, 0, torch.device("cuda", 0)))
        start_group(Ranks(0, 1, 0, torch.device("cuda", 0)))
    except Starts:
        print(minutes, own, os.environ.get(HEARTBEAT, "480"), flush=True)
    except ValueError as error:
        print(error, flush=True)
print(real_accelerator.get_accelerator().available_memory(), "byte free")
"""


def test_nccls_monitor_waits_longer_than_the_watchdog_and_deepspeed_accepts_uuids(tmp_path: Path) -> None:
    """65 minutes follow from the default of health.hang_minutes. torch takes milliseconds that fit into 32 bits."""
    finished = run(1, "-c", ONE_RANK, logs=tmp_path)
    *lines, memory = finished.output.splitlines()
    warnings = [line for line in lines if "WARNING" in line]
    assert [line for line in lines if line not in warnings] == [
        "65 None 3900",
        "525600 None 2000000",
        "65 600 600",
        "65 7200 7200",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC is 'never'; it must be an integer of 0 or more.",
    ]
    [warning] = [line for line in warnings if "TORCH_NCCL" in line]  # a fresh interpreter logs DeepSpeed's too
    assert "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC is 600; torch may end a rank that hangs before the watchdog" in warning
    assert memory == "1 byte free"


TIMEOUTS = """
from datetime import timedelta
import torch
import torch.distributed as dist
from pipeline import distributed
from pipeline.train.engine.process_group import start_group

def timeout(group):
    return group._get_backend(torch.device("cpu")).options._timeout.days

start_group(distributed.Ranks(0, 1, 0, torch.device("cpu")), timedelta(3), timedelta(14))
for days in (None, 14):
    if days:
        distributed.set_group_timeout(timedelta(days))
    ours = timeout(dist.group.WORLD), timeout(distributed._host_group)
    print(*ours, timeout(dist.new_group(backend="gloo")), flush=True)
"""


def test_the_timeout_of_groups_is_raised_once_the_watchdog_runs(tmp_path: Path) -> None:
    """The groups of DeepSpeed, which are created later, have the longer one from the start."""
    finished = run(1, "-c", TIMEOUTS, logs=tmp_path)
    assert finished.codes == [0], finished.output
    assert finished.output.splitlines()[-2:] == ["3 3 14", "14 14 14"]
