"""Resuming, help and imports beside other libraries: make bench PARTS=starts

iGPT-S (76M parameters) at 16x16, batch 1, fp32, resumed from a checkpoint of its first step: seconds from the command
to the end of the next step. `litgpt pretrain` has no option against compiling its model at every start; torch's
variable TORCH_COMPILE_DISABLE keeps it from that, so that its first step comes sooner.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from pipeline.config import SIZES
from tests.benchmarks.marks import Result, result
from tests.benchmarks.peers.measure import HEAD, SLOW_TURNS, Script, compare, lines_of
from tests.benchmarks.training_peers import shard_set

RESOLUTION, STEPS = 16, 1_000
COMMAND = "tests.benchmarks.peers.starting.command"
HF_SCRIPT = "tests.benchmarks.peers.starting.hf_script"


def script(
    name: str,
    command: Sequence[object],
    first: Sequence[Sequence[object]] = (),
    until: str | None = None,
    environment: str | None = None,
    variables: tuple[tuple[str, str], ...] = (),
    is_reference: bool = False,
) -> Script:
    """One whose turns start a command; see starting/command.py."""
    words = {"command": list(map(str, command)), "first": [list(map(str, each)) for each in first], "until": until}
    return Script(name, COMMAND, (json.dumps(words),), environment, variables, is_reference)


def resumes(folder: Path) -> list[Script]:
    """Ours first; each trains one step and saves before its first turn."""
    shards, tokens = shard_set(folder, RESOLUTION)
    return [our_resume(folder, shards), trainer_resume(folder, tokens), litgpt_resume(folder, tokens)]


def our_resume(folder: Path, shards: Path) -> Script:
    """`pipeline train` on the same run."""
    keys = {
        "model.resolution": RESOLUTION, "schedule.warmup_steps": 0, "batch.global_size": 1, "batch.micro_size": 1,
        "precision": "fp32", "checkpoint.every_steps": STEPS, "validation.every_steps": STEPS, "validation.images": 1,
        "samples.every_steps": 0,
    }  # fmt: skip
    options = ["--config", "configs/igpt_s.yaml", "--run", folder / "ours", "--data.shards", shards]
    command = ["{python}", "-m", "pipeline", "train", *options, *(f"--{key}={value}" for key, value in keys.items())]
    first, later = ([*command, f"--schedule.steps={steps}"] for steps in (1, STEPS))
    return script("ours", later, [first], until=r"the first step ended")


def trainer_resume(folder: Path, tokens: Path) -> Script:
    """A script with transformers' Trainer."""
    options = {
        "tokens": tokens, **SIZES["s"]._asdict(), "positions": RESOLUTION**2, "output_dir": folder / "trainer",
        "per_device_train_batch_size": 1, "save_steps": 1, "save_total_limit": 1, "report_to": "tensorboard",
        "optim": "adamw_torch_fused", "use_cpu": True, "logging_steps": 1,
    }  # fmt: skip
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    command = ["{python}", "-m", HF_SCRIPT, *words]
    checkpoint = folder / "trainer" / "checkpoint-1"
    resumed = [*command, "--max_steps", STEPS, "--resume_from_checkpoint", checkpoint]
    return script("HF Trainer", resumed, [[*command, "--max_steps", 1]], until=r"ended step 2")


def litgpt_resume(folder: Path, tokens: Path) -> Script:
    """`litgpt pretrain --resume`."""
    size = SIZES["s"]
    options = {
        "model_config.name": "image-gpt", "model_config.block_size": RESOLUTION**2,
        "model_config.n_layer": size.layers, "model_config.n_embd": size.width, "model_config.n_head": size.heads,
        "model_config.padded_vocab_size": 520, "out_dir": folder / "litgpt", "precision": "32-true",
        "data": "tests.benchmarks.peers.training.litgpt_data.Images", "data.file": tokens,
        "train.global_batch_size": 1, "train.micro_batch_size": 1, "train.save_interval": 1, "train.max_norm": 1.0,
        "train.log_interval": 1, "train.lr_warmup_steps": 0, "eval.final_validation": False, "eval.interval": STEPS,
    }  # fmt: skip
    words = [f"--{key}={value}" for key, value in options.items()]
    command = ["{python}", "-m", "litgpt", "pretrain", "image-gpt", *words]
    first = [*command, f"--train.max_tokens={RESOLUTION**2}"]
    resumed = [*command, f"--train.max_tokens={STEPS * RESOLUTION**2}", "--resume=auto"]
    eager = (("TORCH_COMPILE_DISABLE", "1"),)
    return script("litgpt pretrain", resumed, [first], until=r"iter 2 step 2", environment="litgpt", variables=eager)


def helps() -> list[Script]:
    """The help of each training command."""
    return [
        script("ours", ["{python}", "-m", "pipeline", "train", "--help"]),
        script("HF Trainer", ["{python}", "-m", HF_SCRIPT, "--help"]),
        script("litgpt pretrain", ["{python}", "-m", "litgpt", "pretrain", "--help"], environment="litgpt"),
    ]


def imports() -> list[Script]:
    """What a training command imports before it does anything."""
    trainer = "from transformers import ImageGPTForCausalImageModeling, Trainer, TrainingArguments"
    return [
        script("ours", ["{python}", "-c", "import pipeline.train.loop"]),
        script("HF Trainer", ["{python}", "-c", trainer]),
        script("litgpt pretrain", ["{python}", "-c", "import litgpt.pretrain"], environment="litgpt"),
    ]


def table(folder: Path) -> Iterator[str | Result]:
    """A line for each peer and command, in seconds; beside them what importing torch takes, or Python alone."""
    torch_alone = script("import torch alone", ["{python}", "-c", "import torch"], is_reference=True)
    python_alone = script("Python alone", ["{python}", "-c", "pass"], is_reference=True)
    kinds = {
        "resume of 76M parameters to its first step": (resumes(folder), torch_alone),
        "train --help": (helps(), python_alone),
        "import of what trains": (imports(), torch_alone),
    }
    yield HEAD
    results = []
    for what, (scripts, alone) in kinds.items():
        *rivals, limit = compare(*scripts, alone, turns=SLOW_TURNS, warm_up=False)
        yield from lines_of(what, "s", [*rivals, limit], "first_step")
        limits = {"limit": median(limit.turns["first_step"]), "limited_by": alone.name} if limit.error is None else {}
        results.append(result(what, "s", rivals, "first_step", mark=1, more_is_better=False, **limits))
    yield "\nIn seconds less is better."
    yield from results
