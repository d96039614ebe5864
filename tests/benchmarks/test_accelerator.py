"""The accelerator's script: its mechanics with parts that go wrong, and all its parts at toy size on the CPU."""

import os
import re
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, requires
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.config import ModelConfig
from pipeline.model.attention import CUDNN, FLASH
from pipeline.plan.block_times import read_block_times
from tests.benchmarks import fake_parts, models
from tests.benchmarks.accelerator import __main__ as script
from tests.benchmarks.accelerator import common, engines, numbers, processes
from tests.benchmarks.accelerator.numbers import kernel_kind
from tests.benchmarks.accelerator.pack import first_shards, pack
from tests.benchmarks.accelerator.parts import CHECKS, PARTS, Part
from tests.benchmarks.accelerator.speed import fit, rates
from tests.benchmarks.accelerator.step_profile import kind_of, shares
from tests.benchmarks.accelerator.supervisor import Supervisor
from tests.benchmarks.models import Case, Step
from tests.launch import ROOT

LINE = re.compile(r"(?:ok  |FAIL|info)  (\S.*?)  +(\S.*?)  +(-|[<=>]+ \S.*?)  +\d+\.\d")
SMALL = Case(ModelConfig(layers=1, width=8, heads=1, resolution=4), 8, "fp32", torch.device("cpu"))


def supervise(parts: Sequence[Part], out: Path, seconds: float = 60.0) -> tuple[bool, list[str]]:
    """Runs fake parts. Returns whether all are ok, and the lines."""
    worker = [sys.executable, "-m", "tests.benchmarks.fake_parts"]
    good = Supervisor(parts, worker, out, time.monotonic() + seconds).run()
    return good, (out / "results.txt").read_text().splitlines()


def fakes(*names: str) -> list[Part]:
    return [fake_parts.PARTS[name] for name in names]


def test_one_line_a_check_and_a_table_beside_them(tmp_path: Path) -> None:
    good, lines = supervise(fakes("good"), tmp_path)
    assert good
    assert [LINE.fullmatch(line).groups() for line in lines[:-1]] == [  # type: ignore[union-attr]
        ("good: error", "0.25", "<= 0.5"),
        ("good: words", "as they are", "-"),
    ]
    assert [line.split()[0] for line in lines[:-1]] == ["ok", "info"]
    assert lines[-1] == "1 ok, 0 FAIL"
    assert (tmp_path / "tables.md").read_text() == "| a | table |\n"


def test_what_raises_dies_hangs_or_loses_the_device_costs_its_own_line(tmp_path: Path) -> None:
    names = ("wrong", "raises", "dies", "stuck", "loses_the_device", "good")
    good, lines = supervise(fakes(*names), tmp_path)
    assert not good
    found = [line.split("  ")[0] + " " + LINE.fullmatch(line).group(1) for line in lines[:-1]]  # type: ignore[union-attr]
    assert [" ".join(line.split()) for line in found] == [
        *("FAIL wrong: sum", "FAIL wrong: loss"),
        *("ok raises: before", "FAIL raises"),
        *("ok dies: before", "FAIL dies"),
        *("ok stuck: before", "FAIL stuck"),
        *("ok loses_the_device: before", "FAIL loses_the_device"),
        *("ok good: error", "info good: words"),
    ]
    text = "\n".join(lines)
    for reason in ("RuntimeError: no kernel", "ended with code 9", "took more than its 1 s", "illegal memory access"):
        assert reason in text
    log = (tmp_path / "worker.log").read_text()
    assert "in stuck" in log  # its stack, though it held the GIL
    assert len(set(re.findall(r"process (\d+)", log))) == 4  # one for all parts, and one after each that ended it
    assert lines[-1] == "5 ok, 6 FAIL"


def test_a_measurement_without_the_seconds_that_it_needs_is_named_and_not_begun(tmp_path: Path) -> None:
    good, lines = supervise(fakes("measured", "good"), tmp_path)
    assert good
    assert lines[-1] == "1 ok, 0 FAIL; not run for lack of time: measured"
    assert re.findall(r"== (\w+),", (tmp_path / "worker.log").read_text()) == ["good"]


def test_it_ends_itself_when_the_time_is_over(tmp_path: Path) -> None:
    began = time.monotonic()
    good, lines = supervise(fakes("measured", "slow", "good", "later"), tmp_path, seconds=12.0)
    assert time.monotonic() - began < 13.0
    assert not good
    text = "\n".join(lines)
    assert re.search("FAIL  slow +the time was over", text)
    assert re.search("FAIL  good +not run for lack of time", text)
    assert lines[-1] == "0 ok, 2 FAIL; not run for lack of time: measured, later"


@pytest.mark.slow
def test_it_passes_at_toy_size(tmp_path: Path) -> None:
    command = ["make", "--no-print-directory", "check-accelerator", "TOY=--toy", "SECONDS=400", f"OUT={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "results.txt").read_text().splitlines()
    assert all(LINE.fullmatch(line) for line in lines[:-1])
    ran = {LINE.fullmatch(line).group(1).split(":")[0] for line in lines[:-1]}  # type: ignore[union-attr]
    assert {part.name for part in CHECKS} <= ran
    if "not run" not in lines[-1]:
        assert len(read_block_times(str(tmp_path / "block_times.json")).rows) == 4
        assert "ZeroStage3" not in (tmp_path / "profile.txt").read_text(), "the engines before left their products"


IMPORTS = """
import sys
from importlib.metadata import packages_distributions
names = packages_distributions()  # before setuptools adds its own copies of some
from torch.utils.tensorboard import SummaryWriter
import pipeline.command_line, pipeline.operate.preflight.command, pipeline.train.loop, torchao.float8
from pipeline.train.engine import pipeline, zero
from tests.benchmarks.accelerator import block_times, cifar, collectives, engines, step_profile
print(*sorted({name for module in sys.modules for name in names.get(module, ())}))
"""
PRESENT = ("torch", "transformers", "tensorboard", "accelerate", "scipy", "dill")
"""Packages of the accelerator's machine; the last three are optional ones that the first three import."""


@pytest.mark.slow
def test_the_wheels_are_all_that_is_missing_beside_torch_and_transformers() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, cwd=ROOT, check=True)
    [carried] = re.findall(r"\^\((.+)\)==", recipe("accelerator-wheels"))
    there = closure(PRESENT)
    missing = [
        name
        for name in done.stdout.splitlines()[-1].split()
        if re.sub("[-_.]+", "-", name).lower() not in there and not re.fullmatch(f"deepspeed|{carried}", name)
    ]
    assert not missing, missing


def closure(names: Sequence[str]) -> set[str]:
    """Packages, and all that they need."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = re.sub("[-_.]+", "-", left.pop()).lower()
        if name not in found:
            found.add(name)
            with suppress(PackageNotFoundError):
                left += [re.split(r"[^\w.-]", need)[0] for need in requires(name) or () if "extra ==" not in need]
    return found


def recipe(target: str, *options: str) -> str:
    """The commands of a target of the Makefile."""
    command = ["make", "--dry-run", target, *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
def test_without_an_accelerator_it_says_so() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.accelerator"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    message = "error: this machine has no CUDA device; --toy tries the script on a CPU.\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_a_driver_that_hangs_is_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "HAS_CUDA", "import time; time.sleep(60)")
    monkeypatch.setattr(script, "DRIVER_SECONDS", 0.1, raising=False)
    monkeypatch.setattr(sys, "argv", ["accelerator"])
    assert script.main() == 2


@pytest.mark.parametrize(
    ("after", "seconds", "message"),
    [("exit(3)", 60.0, "the process ended with code 3 before that"), ("time.sleep(60)", 0.2, "took more than 0.2 s")],
)
def test_a_process_that_does_not_come_so_far_is_ended_and_its_log_printed(
    after: str, seconds: float, message: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    log, code = tmp_path / "log", f"import time; print('said', flush=True); {after}"
    with (
        pytest.raises(RuntimeError, match=message),
        processes.running(["-c", code], dict(os.environ), log) as process,
    ):
        processes.wait_for(lambda: "said" in log.read_text(), process)
        monkeypatch.setattr(processes, "SECONDS", seconds)
        processes.wait_for(lambda: False, process)
    assert process.returncode is not None
    assert capsys.readouterr().out.endswith("-- log\nsaid\n\n")


def test_every_part_names_a_function() -> None:
    from pkgutil import resolve_name

    assert all(callable(resolve_name(part.function)) for part in PARTS)
    assert len({part.name for part in PARTS}) == len(PARTS)


def test_what_does_not_fit_is_gone_before_half_of_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        def __init__(self) -> None:
            self.own = self  # a cycle

    tried: list[tuple[int, weakref.ref[Engine]]] = []
    resets: list[None] = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(None))

    def make(case: Case) -> Step:
        assert all(engine() is None for _, engine in tried)
        assert len(resets) == len(tried) + 1  # code that was compiled for the larger batch is gone too
        engine = Engine()
        tried.append((case.images, weakref.ref(engine)))
        if case.images > 2:
            raise torch.OutOfMemoryError("too large")
        return lambda: sum(range(10_000))

    found = SMALL
    for _ in range(2):  # the second time after one that fitted
        found, rate = rates(found, make)
        assert (found.images, rate > 0) == (2, True)
    assert [images for images, _ in tried] == [8, 4, 2, 2]


def test_a_step_that_runs_out_of_memory_is_closed_and_halved_too() -> None:
    closed: list[int] = []

    class Step:
        def __init__(self, case: Case) -> None:
            self.images = case.images

        def __call__(self) -> None:
            if self.images > 4:
                raise torch.OutOfMemoryError("too large")

        def close(self) -> None:
            closed.append(self.images)

    case, step = fit(SMALL, Step)
    assert (case.images, step.images, closed) == (4, 4, [8])  # type: ignore[attr-defined]


def test_weights_are_drawn_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.model.gpt.torch_generator", lambda name: pytest.fail("drawn on the CPU, by name"))
    meta = models.drawn_model(replace(SMALL, device=torch.device("meta")))
    assert all(parameter.is_meta for parameter in meta.parameters())
    weights = dict(models.drawn_model(SMALL).named_parameters())
    assert weights["transformer.h.0.ln_1.weight"].eq(1).all()
    assert 0.01 < weights["transformer.h.0.attn.c_attn.weight"].std() < 0.03


@pytest.mark.parametrize(("size", "images"), [("s", 16), ("m", 8), ("l", 2)])
def test_hf_image_gpt_starts_at_a_batch_that_fits(size: str, images: int) -> None:
    case = Case(ModelConfig(size=size), 64, "bf16", torch.device("cpu"))  # type: ignore[arg-type]
    assert models.images_that_fit(case, 80e9) == images


@pytest.mark.parametrize(
    ("kernel", "kind", "part"),
    [
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>", "FLASH_ATTENTION", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_128x128", "CUDNN_ATTENTION", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention)", "EFFICIENT_ATTENTION", "attention"),
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTT", None, "matrix products"),
        ("triton_red_fused_add_native_layer_norm_3", None, "Triton"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_view_5", None, "Triton"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", None, "optimizer"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", None, "communication"),
        ("Memcpy DtoH (Device -> Pinned)", None, "copies"),
        ("void at::native::vectorized_elementwise_kernel<4>", None, "other"),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel: str, kind: str | None, part: str) -> None:
    assert (kernel_kind(kernel), kind_of(kernel)) == (kind, part)


def test_attention_that_raises_leaves_torchs_choice_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "TOY", True)
    monkeypatch.setattr(numbers, "attention_seconds", lambda case: {CUDNN: 1.0, FLASH: 2.0})
    monkeypatch.setattr(numbers, "used_kernels", lambda run: 1 / 0)
    before = numbers.sdpa_order(), torch.backends.cuda.cudnn_sdp_enabled()
    with pytest.raises(ZeroDivisionError):
        list(numbers.check_attention())
    assert (numbers.sdpa_order(), torch.backends.cuda.cudnn_sdp_enabled()) == before


def test_graphs_that_were_compiled_before_an_engine_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    engine = SimpleNamespace(step=lambda batch, learning_rate: SimpleNamespace(loss=1.0))
    for name, made in {"start_alone": None, "build_engine": engine, "reference": [1.0] * engines.STEPS}.items():
        monkeypatch.setattr(engines, name, lambda *_, made=made: made)
    monkeypatch.setitem(counters["stats"], "unique_graphs", 7)
    [_, graphs] = islice(engines.check_engine(compiled=True), 2)
    assert (graphs.good, graphs.value) == (False, "0")


def test_kernels_that_overlap_leave_no_idle_time() -> None:
    found = shares([("nvjet_a", 0.0, 4.0), ("flash", 1.0, 3.0), ("Memcpy", 5.0, 6.0)], wall=10.0)
    assert (found["matrix products"], found["attention"], found["copies"], found["idle"]) == (4.0, 2.0, 1.0, 5.0)


def test_a_part_of_a_shard_set_travels_as_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_prep.shards.reader import open_shard_set
    from tests.benchmarks.accelerator import cifar

    shards = common.write_shards(tmp_path / "shards", 20, 4)
    pack(shards, tmp_path / "carried/set.tar.xz", images=10)
    monkeypatch.setattr(cifar, "ARCHIVE", tmp_path / "carried/set.tar.xz")
    opened = open_shard_set(cifar.unpacked(tmp_path / "there"))
    opened.verify()
    assert (opened.split("train").images, opened.split("valid").images) == (20, 20)


@pytest.mark.parametrize(("images", "taken"), [(1, 1), (20, 1), (30, 2), (100, 3)])
def test_as_many_shards_travel_as_have_the_images(images: int, taken: int) -> None:
    shards: list[dict[str, object]] = [{"file": f"train-{number}", "images": 20} for number in range(3)]
    assert first_shards(shards, images) == shards[:taken]


@pytest.mark.parametrize(("options", "wanted"), [([], "3.12"), (["WHEELS_PYTHON=3.13"], "3.13")])
def test_wheels_are_for_the_python_of_the_machine_at_hand(options: list[str], wanted: str) -> None:
    assert f"--python-version {wanted} " in recipe("accelerator-wheels", *options)


def test_toy_sizes_use_the_packages_of_the_environment_alone() -> None:
    assert "accelerator-packages" not in recipe("check-accelerator", "TOY=--toy")
    assert "PYTHONPATH=.:out/accelerator-packages " in recipe("check-accelerator")
