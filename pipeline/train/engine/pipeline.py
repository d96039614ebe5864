"""Pipeline parallelism over DeepSpeed's PipelineModule, combined with data parallelism and ZeRO-1.

Parameters have the same names as in the complete model: the model is built on the meta device, and each stage allocates
memory for its own layers.
"""

from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.config import TrainConfig
from pipeline.distributed import Ranks
from pipeline.model.gpt import build_model
from pipeline.model.masks import Batch
from pipeline.model.recompute import recompute_blocks
from pipeline.model.sampling import complete_halves_by
from pipeline.train.engine import compilation, float8, tensor_parallel
from pipeline.train.engine import deepspeed_internals as internals
from pipeline.train.engine.base import Check, checked, unchecked
from pipeline.train.engine.deepspeed_config import deepspeed_config
from pipeline.train.engine.deepspeed_engine import DeepSpeedEngine, weights_checksum
from pipeline.train.engine.initial_weights import initialize_parts


class EmbeddingLayer(nn.Module):
    """The embeddings: tokens long (B, T) to (B, T, D)."""

    def __init__(self, model: GPT2LMHeadModel, device: torch.device) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop = model.transformer.wte, model.transformer.wpe, model.transformer.drop
        self.to_empty(device=device)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        return self.drop(self.wte(inputs) + self.wpe(positions))


class BlockLayer(nn.Module):
    """One block: (B, T, D) to (B, T, D)."""

    def __init__(self, model: GPT2LMHeadModel, device: torch.device, number: int, config: TrainConfig) -> None:
        super().__init__()
        self.block = model.transformer.h[number]
        self.to_empty(device=device)
        if compilation.is_on(config, device):
            compilation.compile_block(self.block)
        if config.parallel.recompute:
            recompute_blocks([self.block])

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.block(states)


class HeadLayer(nn.Module):
    """The last norm and the head: (B, T, D) to logits (B, T, V)."""

    def __init__(self, model: GPT2LMHeadModel, device: torch.device) -> None:
        super().__init__()
        self.ln_f, self.lm_head = model.transformer.ln_f, model.lm_head
        self.to_empty(device=device)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.ln_f(states))


class PipelineEngine(DeepSpeedEngine):
    """Each stage runs its blocks on the micro-batches of its data-parallel rank, one after the other."""

    def __init__(self, config: TrainConfig, model_config: GPT2Config, ranks: Ranks, initial: bool) -> None:
        super().__init__(config, model_config, ranks)
        with torch.device("meta"):
            self._model = build_model(model_config)
        if self._tensor:
            tensor_parallel.split(self._model, self._tensor)
        if config.precision == "fp8":
            float8.convert(self._model.transformer.h, ranks.device)
        if compilation.is_on(config, ranks.device):
            compilation.start_workers(ranks.device)
        with redirect_stdout(StringIO()):  # DeepSpeed prints its layers and seeds
            module = PipelineModule(
                _layers(self._model, config, ranks.device),
                topology=tensor_parallel.topology_of(config, ranks),
                loss_fn=self._mean_nats,
                partition_method=f"type:{BlockLayer.__name__}",
            )
        parts = tensor_parallel.parts_of(self._model, config.model.block, self._tensor)
        if initial:
            initialize_parts(self._model, model_config, config.seed, parts)
        self.data_rank = module.mpu().get_data_parallel_rank()
        self._coordinates = internals.RankCoordinates(self.data_rank, self.data_ranks, parts)
        self._start(module, self._own_parameters(), deepspeed_config(config, ranks))
        self._stage = f"stage {self._engine.stage_id}"
        self.work = f"{self._stage}, part {self._tensor.rank}" if self._tensor else self._stage
        self._start_average()

    def evaluate(self, batch: Batch) -> np.ndarray:
        return self._evaluate(batch, self._image_nats, ()).double().cpu().numpy()

    def complete(self, tokens: np.ndarray, samples: int, seed: int, check: Check = unchecked) -> np.ndarray:
        """Without a key-value cache: each color costs a forward pass of complete images through all stages."""
        colors, positions = self._model_config.colors, self._model_config.n_positions

        def next_scores(so_far: torch.Tensor) -> torch.Tensor:
            known = so_far.shape[1] - 1
            images = np.zeros((len(so_far), positions), np.uint16)
            images[:, :known] = so_far[:, 1:].cpu().numpy()
            return self._evaluate(Batch(images), lambda logits, _: logits[:, known, :colors].float(), (colors,))

        device = self._ranks.device
        scores = checked(next_scores, check)
        return complete_halves_by(scores, tokens, colors=colors, samples=samples, seed=seed, device=device)

    def replica_checksums(self) -> dict[str, str]:
        held: dict[str, list[torch.Tensor]] = {self._stage: []}
        for name, parameter in self._own_parameters():
            held.setdefault(self.work if name in self._coordinates.parts else self._stage, []).append(parameter)
        return {name: weights_checksum(parameters) for name, parameters in held.items()}

    def _own_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters of this stage's layers, with their names in the complete model."""
        return [(name, parameter) for name, parameter in self._model.named_parameters() if not parameter.is_meta]

    def _train(self, batch: Batch) -> torch.Tensor:
        return self._engine.train_batch(self._micro_batches(batch))

    def _loss_and_norm(self) -> tuple[float, float]:
        return internals.mean_loss_of_stages(self._engine), float(internals.gradient_norm(self._engine))

    def _mean_nats(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self._image_nats(logits, targets).mean()

    def _evaluate(self, batch: Batch, output: internals.Output, shape: tuple[int, ...]) -> torch.Tensor:
        """`output` of the batch's logits and targets, fp32 (B, *shape), on every stage.

        The stages exchange micro-batches of one size, so the last one is padded with its last image.
        """
        size = self._config.batch.micro_size
        count = -(-len(batch) // size)
        padded = batch[np.minimum(np.arange(count * size), len(batch) - 1)]
        with compilation.eagerly(), self._divided(batch.tokens.shape[1]):
            outputs = internals.evaluate_stages(self._engine, self._micro_batches(padded), count, output)
        result = torch.empty(count * size, *shape, device=self._ranks.device)
        if self._engine.is_last_stage():
            result.copy_(torch.cat(outputs))
        return internals.from_last_stage(self._engine, result)[: len(batch)]


def _layers(model: GPT2LMHeadModel, config: TrainConfig, device: torch.device) -> list[LayerSpec]:
    blocks = [LayerSpec(BlockLayer, model, device, number, config) for number in range(len(model.transformer.h))]
    return [LayerSpec(EmbeddingLayer, model, device), *blocks, LayerSpec(HeadLayer, model, device)]
