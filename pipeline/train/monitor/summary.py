"""What a run logs before its first step and at its end; and the throughput that every step reports."""

import logging
import os
import sys
from dataclasses import dataclass
from math import log
from pathlib import Path

import torch
from transformers import GPT2Config

from data_prep.common.command_line import value_of
from data_prep.common.exit_codes import STOPPED
from pipeline import costs
from pipeline.checkpoint.run_folder import RunFolder
from pipeline.config import TrainConfig
from pipeline.distributed import Ranks, from_first
from pipeline.model import attention
from pipeline.train.data.batches import Order
from pipeline.train.data.streaming import GUARANTEES, GUARANTEES_IN_MIXTURE
from pipeline.train.engine import compilation, float8
from pipeline.train.probe.report import cost
from pipeline.train.setup import Inputs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Throughput:
    """Converts seconds of a step to images/s, tokens/s and MFU."""

    tokens_per_image: int
    flops_per_token: float
    peak_flops: float
    """Peak FLOP/s of all ranks together."""
    peak_source: str

    @classmethod
    def measure(cls, model_config: GPT2Config, precision: str, ranks: Ranks) -> "Throughput":
        """With the accelerator's published peak; on other devices, measured by rank 0 with a matrix product.

        Every rank calls it.
        """
        peak = from_first(lambda: costs.device_peak(ranks.device, precision))
        flops = costs.flops_per_token(model_config)
        return cls(model_config.n_positions, flops, peak.flops * ranks.count, peak.source)

    def rates(self, images: int, seconds: float) -> dict[str, float]:
        """The throughput of a step of `images` over all ranks in `seconds`."""
        tokens = images * self.tokens_per_image / seconds
        return {
            "images_per_second": images / seconds,
            "tokens_per_second": tokens,
            "mfu": tokens * self.flops_per_token / self.peak_flops,
        }


def describe(inputs: Inputs, throughput: Throughput, kernels: dict[str, float], order: Order, end: int) -> str:
    """The derived quantities, one per line; kernels: measured seconds of each; end: position after the last step."""
    config, model_config, ranks = inputs.config, inputs.model_config, inputs.ranks
    train_images = inputs.sets.train_images
    batch, schedule, parallel = config.batch, config.schedule, config.parallel
    data_ranks = parallel.data_ranks(ranks.count)
    accumulation = batch.accumulation_steps(data_ranks)
    parameters = costs.parameter_count(model_config)
    images = batch.images_after(schedule.steps)
    total_flops = images * throughput.tokens_per_image * throughput.flops_per_token
    state = "weights, moments and average" if config.ema.decay else "weights and moments"
    lines = {
        "model": f"{parameters:,} parameters: {model_config.n_layer} layers, width {model_config.n_embd}, "
        f"{model_config.n_head} heads, block {model_config.block}, {config.precision}",
        "sequence": f"{throughput.tokens_per_image} tokens of {model_config.colors} colors "
        f"({config.model.resolution} x {config.model.resolution})",
        "ranks": parallel.describe(ranks.count),
        "batch": f"{batch.global_size} images = {data_ranks} data-parallel ranks x {batch.micro_size} "
        f"x {accumulation} accumulated"
        + (f", growing from {batch.first_size} over {batch.warmup_steps:,} steps" if batch.first_size else ""),
        "schedule": f"{schedule.steps:,} steps, {images:,} images, {images / train_images:.2f} epochs of "
        f"{train_images:,}; learning rate {config.optimizer.learning_rate:g}, {schedule.warmup_steps:,} steps of "
        f"warm-up, {schedule.describe_decay()}",
        "loss": f"in nats per token; a uniform guess costs ln {model_config.colors} = {log(model_config.colors):.4f}",
        "compute": f"{total_flops:.3g} FLOP; {throughput.flops_per_token / 1e9:.4g} GFLOP a token",
        "MFU": f"(6 x matmul parameters + 12 x layers x tokens x width) FLOP a token, full attention, over "
        f"{throughput.peak_flops / 1e12:.3g} TFLOP/s of {ranks.count} ranks ({throughput.peak_source})",
        "memory": f"ZeRO stage {parallel.zero_stage} over {data_ranks} data-parallel ranks on {ranks.device.type}; "
        f"{state} {parameters * costs.state_bytes(config.ema.decay) / 1e9:.3g} GB in total, the size of a checkpoint",
        "health": f"the run ends after {config.health.max_skipped} skipped steps in a row, or "
        f"{config.health.hang_minutes:g} minutes without progress; loss spikes beyond "
        f"{config.health.spike_sigmas:g} sigma are {'skipped' if config.health.skip_spikes else 'applied and logged'}",
        "compile": compilation.describe(config, ranks.device),
        "threads": f"{torch.get_num_threads()} per rank, on {len(os.sched_getaffinity(0))} CPUs",
    }
    epochs = order.epochs(end)
    lines |= _options_in_use(inputs, epochs)
    width = max(map(len, lines))
    summary = [f"  {key:<{width}}  {text}" for key, text in lines.items()]
    summary += [f"  attention: {attention.describe(kernels)}"] if kernels else []
    if inputs.sets.streamed:
        summary.append(GUARANTEES_IN_MIXTURE if epochs else GUARANTEES)
    return "\n".join(summary)


def _options_in_use(inputs: Inputs, epochs: dict[str, float]) -> dict[str, str]:
    """The lines of options that are off by default; epochs: of each set of a mixture, at the end of the run."""
    config, ranks, parallel, lines = inputs.config, inputs.ranks, inputs.config.parallel, {}
    accumulation = config.batch.accumulation_steps(parallel.data_ranks(ranks.count))
    if epochs:
        weights = {one.name: one.weight for one in inputs.sets.sets}
        each = (f"{name} {epoch:.2f} (weight {weights[name]:g})" for name, epoch in epochs.items())
        lines["mixture"] = f"epochs of each set at the end of the run: {', '.join(each)}"
    if config.ema.decay:
        lines["average"] = (
            f"exponential moving average of the weights, decay {config.ema.decay:g}: over about the last "
            f"{1 / (1 - config.ema.decay):,.0f} steps, 4 bytes a parameter over the data-parallel ranks"
        )
    if inputs.probe is not None:
        lines["probe"] = cost(inputs)
    if config.precision == "fp8":
        lines["float8"] = float8.describe(config, ranks.device)
    if parallel.pipeline_stages > 1:
        lines["pipeline"] = (
            f"{parallel.pipeline_stages} stages, bubble {costs.bubble(parallel.pipeline_stages, accumulation):.1%} of "
            f"a step: (stages - 1) / (micro-batches + stages - 1)"
        )
    if parallel.communication != "fp32":
        lines["messages"] = f"gradients are summed over the data-parallel ranks in {parallel.communication}"
    if config.deterministic:
        lines["deterministic"] = "torch's deterministic kernels only; cuDNN's attention is excluded"
    return lines


def log_end(run: Path, step: int, finished: bool) -> None:
    """The last line of a run that ended as it should."""
    if finished:
        logger.info(f"finished at step {step}: {run}")
        return
    code = f"exit code {STOPPED}" + (", which torchrun calls FAILED" if "TORCHELASTIC_RUN_ID" in os.environ else "")
    saved = f"step {step} is saved" if step else "nothing is trained yet"
    same = "the same command" + (" without --resume_from" if value_of("--resume_from", sys.argv) is not None else "")
    logger.warning(f"stopped on request at step {step}: {run}; {saved}, {same} resumes the run ({code})")


def print_finished(folder: RunFolder, config: TrainConfig) -> None:
    """Logs that a run has nothing left to train, and which changes of its configuration have no effect."""
    logger.info(f"{folder.path} has finished its {folder.finished_steps()} steps; nothing is left to train")
    for key, (old, new) in folder.changes(config).items():
        logger.warning(f"{key} was {old} and is now {new}, without effect on a finished run")
