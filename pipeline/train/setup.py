"""Checks a configuration before any process group starts; chooses kernels and the data reader."""

import logging
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import GPT2Config

from pipeline.checkpoint.format import CheckpointRecord
from pipeline.checkpoint.probe import HeldOutImages
from pipeline.checkpoint.run_folder import RunFolder
from pipeline.config import TrainConfig
from pipeline.distributed import Ranks, from_first, ranks_per_node
from pipeline.model import attention
from pipeline.model.augmentation import Augmentation
from pipeline.model.gpt_config import gpt2_config
from pipeline.model.masks import Masks
from pipeline.model.numerics import bf16_is_slow, use_deterministic_kernels
from pipeline.probe_images import ProbeImages, open_probe_images
from pipeline.train.data.batches import Batches, ImageOrder, Order, TrainingBatches
from pipeline.train.data.masking import MaskedBatches
from pipeline.train.data.mixture import MixtureBatches, MixtureOrder
from pipeline.train.data.mixture_history import History, continued, describe_change, history_of
from pipeline.train.data.stream_order import StreamOrder
from pipeline.train.data.streaming import StreamedBatches
from pipeline.train.engine.base import Engine
from pipeline.train.engine.build import check_machine
from pipeline.training_set import TrainingSets, open_training_sets

logger = logging.getLogger(__name__)

ATTENTION = "attention"


@dataclass(frozen=True)
class Inputs:
    """A configuration, checked against its shard sets and the number of ranks."""

    config: TrainConfig
    model_config: GPT2Config
    sets: TrainingSets
    ranks: Ranks
    probe: ProbeImages | None = None
    """The labelled images of the probe, if the run has one."""

    @cached_property
    def held_out(self) -> list[HeldOutImages]:
        """The held-out images of each set as batches of the engine; with masks under the masked objective."""
        return [HeldOutImages(one.shards.split("valid"), self.masks) for one in self.sets.sets]

    @cached_property
    def masks(self) -> Masks | None:
        """The masks of the masked objective; None for next_color."""
        objective = self.config.objective
        return Masks(self.config.seed, objective.mask_probability) if objective.kind == "masked_color" else None


def check_inputs(config: TrainConfig, ranks: Ranks) -> Inputs:
    """Opens the shard sets; checks the configuration against them and the ranks. Raises ValueError naming the key."""
    sets = open_training_sets(config)
    for number, one in enumerate(sets.sets):
        shards, key = one.shards, f"data.mixture[{number}].shards: " * sets.is_mixture
        if shards.address is not None and shards.split("train").images < config.parallel.data_ranks(ranks.count):
            raise ValueError(
                f"{key}{shards.path} has {shards.split('train').images} images in its split 'train'; streamed to "
                f"{ranks.count} ranks it must have at least one image for each."
            )
    config.batch.accumulation_steps(config.parallel.data_ranks(ranks.count))
    check_machine(config, ranks.device)
    if ranks.is_first:
        warn_of_slow_precision(config, ranks.device)
        warn_of_slow_groups(config, ranks)
    model_config = gpt2_config(config.model, sets.colors, config.objective.kind)
    config.parallel.check_model(model_config.n_layer, model_config.n_head, model_config.n_positions)
    return Inputs(config, model_config, sets, ranks, open_probe_images(config, sets))


def warn_of_slow_precision(config: TrainConfig, device: torch.device) -> None:
    """Logs a warning if the precision is one that torch has no fast kernels for on this processor."""
    if config.precision != "fp32" and bf16_is_slow(device):
        logger.warning(
            f"precision is {config.precision}, for which torch has no fast kernels on this processor; with precision "
            f"fp32 a step would be several times faster"
        )


def warn_of_slow_groups(config: TrainConfig, ranks: Ranks) -> None:
    """Logs a warning if ranks of a tensor-parallel group are on different nodes."""
    parts, here = config.parallel.tensor_parallel, ranks_per_node() or ranks.count
    if parts > 1 and here % parts:
        logger.warning(
            f"parallel.tensor_parallel is {parts}, which does not divide the {here} ranks of a node: some "
            f"groups send the activations of every block between nodes; a divisor of {here} would be faster"
        )


def choose_kernels(inputs: Inputs, folder: RunFolder) -> dict[str, float]:
    """Deterministic kernels if configured; with bf16 or fp8, the fastest attention kernel: returns seconds by kernel.

    Call before CUDA computes. Rank 0 measures for all ranks. Empty if only one kernel can be used: with fp32, and on
    CPU for few positions and with dropout.
    """
    config, model, ranks = inputs.config, inputs.model_config, inputs.ranks
    if config.deterministic:
        use_deterministic_kernels()
    shape = attention.AttentionShape(
        images=config.batch.micro_size,
        heads=model.n_head // config.parallel.tensor_parallel,
        positions=model.n_positions,
        head_width=model.n_embd // model.n_head,
        causal=getattr(model, "is_causal", True),
    )
    kernels: tuple[str, ...] = ()
    if config.precision != "fp32" and not (config.model.dropout and ranks.device.type == "cpu"):
        cudnn = torch.backends.cudnn.version()
        kernels = attention.candidates(shape, ranks.device.type, cudnn, config.deterministic)
    seconds = from_first(lambda: attention_seconds(folder, shape, kernels, ranks.device)) if kernels else {}
    attention.use_fastest(seconds)
    return seconds


def attention_seconds(
    folder: RunFolder, shape: attention.AttentionShape, kernels: tuple[str, ...], device: torch.device
) -> dict[str, float]:
    """Seconds by kernel: those recorded in run.json by an earlier start on the same device, else measured and recorded.

    So a resumed run uses the same kernel. A recorded kernel that is no longer among `kernels` is excluded. Empty for a
    run on CPU that was started without a measurement, by an earlier version or in fp32: it continues with torch's.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts: dict[str, Any] = {"device": name, "shape": asdict(shape)}
    known = folder.recall(ATTENTION) or {}
    if facts.items() <= known.items():
        recorded = {kernel: second for kernel, second in known["seconds"].items() if kernel in kernels}
        if recorded:
            return recorded
    if not known and device.type == "cpu" and len(folder.recall("starts") or []) > 1:
        return {}
    seconds = attention.measure_named(shape, kernels, device)
    folder.note("running", **{ATTENTION: facts | {"seconds": seconds}})
    return seconds


def data_order(inputs: Inputs, record: CheckpointRecord | None) -> Order:
    """The order in which the images are read: by index from a folder, streamed from an address, or of a mixture.

    record: of the checkpoint whose data position the run continues. After a mixture, a single set continues as a
    mixture of one.
    """
    config, shards = inputs.config, inputs.sets.first
    data_ranks, augmentation = config.parallel.data_ranks(inputs.ranks.count), augmentation_of(config)
    if inputs.sets.is_mixture or (record and record.mixture):
        recorded = () if record is None else recorded_history(record)
        history = continued(recorded, inputs.sets, data_ranks, record.images if record else 0, config.seed)
        return MixtureOrder(history, inputs.sets, config.seed, augmentation, recorded or None)
    split = shards.split("train")
    if shards.address is None:
        return ImageOrder(split.record_images, config.seed, augmentation)
    record_images = [shard["record_images"] for shard in split.shards]
    return StreamOrder(record_images, config.seed, data_ranks, augmentation)


def augmentation_of(config: TrainConfig) -> Augmentation:
    """The random changes of the training images."""
    return Augmentation(config.data.flip, config.data.reflect_crop)


def recorded_history(record: CheckpointRecord) -> History:
    """The history of the sets that a checkpoint's run had read."""
    return history_of(record.mixture, record.shards_digest, record.order_fingerprint)


def choose_reader(inputs: Inputs, engine: Engine, record: CheckpointRecord | None) -> tuple[Order, Batches]:
    """The data order, as `data_order`, and its reader; with masks if masked. Rank 0 logs how a mixture changes."""
    order, resolution = data_order(inputs, record), inputs.sets.resolution
    split = inputs.sets.first.split("train")
    batches: Batches
    if isinstance(order, MixtureOrder):
        batches = MixtureBatches(order, resolution, engine.data_rank, engine.data_ranks)
        if record is not None and inputs.ranks.is_first and recorded_history(record) != order.history:
            logger.info(describe_change(recorded_history(record)[-1], order.history[-1]))
    elif isinstance(order, ImageOrder):
        batches = TrainingBatches(split, resolution, order, engine.data_rank, engine.data_ranks)
    else:
        assert isinstance(order, StreamOrder)
        batches = StreamedBatches(split, resolution, order, engine.data_rank)
    if inputs.masks is not None:
        interleaved_ranks = engine.data_ranks if isinstance(order, MixtureOrder) else None
        batches = MaskedBatches(batches, inputs.masks, engine.data_rank, interleaved_ranks)
    return order, batches
