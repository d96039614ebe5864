"""The model card: README.md of a model folder, written from the folder's content only.

It reads neither the network nor the run, so the same folder gives the same card on every machine.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Template
from safetensors import safe_open

from data_prep.common.files import read_json
from pipeline.checkpoint.metrics_table import MetricsTable
from pipeline.checkpoint.mixture_record import describe_weights
from pipeline.hub import HUB
from pipeline.model_folder.licenses import check_license
from pipeline.model_folder.training_record import TrainingRecord, averaged_text, read_training_record, unfinished

CARD = "README.md"

CLASSES = {"imagegpt": "ImageGPTForCausalImageModeling", "gpt2": "GPT2LMHeadModel"}
HUB_DATASETS = {
    "CIFAR-10": "uoft-cs/cifar10",
    "CIFAR-100": "uoft-cs/cifar100",
    "ImageNet": "ILSVRC/imagenet-1k",
}
"""The hub's names of the data sources that it has."""
TAKEN = {"moments": "Adam's moments", "position": "data position"}
"""What a run may take beside the weights, by the option in `start`."""
PAPER = "https://cdn.openai.com/papers/Generative_Pretraining_from_Pixels_V2.pdf"


def write_card(
    folder: Path,
    name: str,
    license_id: str | None = None,
    dataset: str | None = None,
    *,
    measured: Sequence[EvalResult] = (),
    sections: Sequence[str] = (),
    layer: int | None = None,
) -> None:
    """Writes README.md of a model folder.

    name: the argument of from_pretrained in the card. license_id, dataset: the hub's identifiers of the license and of
    the training data; if not given, the identifiers in the existing card are kept. measured, sections: results for the
    hub's model-index, and Markdown sections about them, which follow the section on the training. layer: the layer that
    a probe chose, for the code that computes features; the middle one if None. Raises ValueError that names a damaged
    file, or a license that the hub does not list.
    """
    config, record = read_json(folder / "config.json"), read_training_record(folder)
    masked = _is_masked(config)
    earlier = _earlier_metadata(folder)
    license_id = license_id or earlier.license
    check_license(license_id, f"the license in the model's {CARD}")
    known = [HUB_DATASETS[source] for source in record.sources if source in HUB_DATASETS] or None
    metadata = ModelCardData(
        license=license_id,
        library_name=None if masked else "transformers",
        pipeline_tag="image-feature-extraction" if masked else "unconditional-image-generation",
        tags=["image-gpt", "generative-pretraining"],
        datasets=[dataset] if dataset else earlier.datasets or known,
        metrics=sorted({result.metric_type for result in measured}) or None,
        model_name=name.rpartition("/")[2],
        eval_results=list(measured) or None,
    )
    parts = [
        _what_it_is(config, _parameters(folder, config), record),
        _loading_masked(name) if masked else _loading(config, name, layer),
        _training(record),
        *sections,
        _limits(config),
        _license(license_id),
        _contents(folder),
    ]
    text = "\n\n".join(part for part in parts if part)
    (folder / CARD).write_text(f"---\n{metadata.to_yaml()}\n---\n\n{text}\n")


def _earlier_metadata(folder: Path) -> ModelCardData:
    path = folder / CARD
    try:
        return ModelCard.load(path).data if path.is_file() else ModelCardData()
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} has invalid metadata at its head; fix the YAML, or delete the file.") from error


def _is_masked(config: dict[str, Any]) -> bool:
    """Whether the model predicts masked pixels, for which transformers has no class."""
    return config["model_type"] not in CLASSES


def _parameters(folder: Path, config: dict[str, Any]) -> int:
    """The number of parameters, from the headers of the weights' files; ImageGPT's biases, all zero, are excluded."""
    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="np") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a mapping)
                if config["model_type"] != "imagegpt" or not name.endswith(".bias"):
                    count += math.prod(weights.get_slice(name).get_shape())
    return count


def _what_it_is(config: dict[str, Any], parameters: int, record: TrainingRecord) -> str:
    side, colors = math.isqrt(config["n_positions"]), config["vocab_size"] - 1
    step = f", step {record.step:,}" if record.step is not None else ""
    data = f" Training data: {record.source}." if record.source else ""
    short = unfinished(record.step, record.planned_steps)
    block = "stock GPT-2 blocks" if config["model_type"] == "gpt2" else "the paper's block"
    task = "predicts masked pixels from all others" if _is_masked(config) else "predicts the next color"
    return (
        f"# Image GPT{step}\n\n"
        f"A transformer that reads an image as a sequence of palette colors and {task}, as in "
        f"[Generative Pretraining from Pixels]({PAPER}) (Chen et al., 2020): {side}x{side} images, {colors} colors, "
        f"{config['n_layer']} layers of {block}, width {config['n_embd']}, {config['n_head']} heads, "
        f"{parameters:,} parameters.{data}" + (f"\n\n**{short}**" if short else "")
    )


def _loading(config: dict[str, Any], name: str, best: int | None) -> str:
    layers = config["n_layer"]
    layer, why = (layers // 2, "the middle one") if best is None else (best, "the one that the linear probe chose")
    scales = config["model_type"] == "imagegpt" and config.get("scale_attn_weights", True)
    rounded = scales and math.isqrt(width := config["n_embd"] // config["n_head"]) ** 2 != width
    kind = CLASSES[config["model_type"]]
    return _render("use.md", kind=kind, name=name, layer=layer, layers=layers, why=why, rounded=rounded)


def _loading_masked(name: str) -> str:
    return _render("use_masked.md", where=f"hub:{name}" if "/" in name else name)


def _training(record: TrainingRecord) -> str:
    if not record.checkpoint:
        return ""
    checkpoint, settings, starts, table = record.checkpoint, record.settings, record.run.get("starts", []), record.table
    packages = starts[-1]["packages"] if starts else {}
    averaged = averaged_text(record.averaged_steps, record.weights)
    of_run, is_ema = " of the run, not of the averaged weights" if averaged else "", record.weights == "ema"
    origin = record.run.get("origin") or {}
    before = origin["images"] if origin.get("position") else 0
    lines = {
        "Data": record.source,
        "Shard set": None if record.mixture else _short(checkpoint.get("shards_digest")),
        "Shard sets": _sets(record),
        "Shares of the sets": _changes(record),
        "Palette": _short(checkpoint.get("palette_sha256")),
        "Objective": _chosen(settings, "objective", "kind"),
        "Started from": _started_from(origin),
        "Steps": f"{record.step:,}" + (f" of {record.planned_steps:,}" if record.planned_steps else ""),
        "Weights": averaged,
        "EMA decay": _chosen(settings, "ema", "decay") if is_ema else None,
        "Images seen": f"{checkpoint['images']:,}" + (f", {before:,} of them before it started" if before else ""),
        "Batch": _chosen(settings, "batch", "global_size"),
        "Optimizer": _optimizer(settings),
        "Schedule": _schedule(settings),
        "Augmentation": _augmentation(settings),
        "Precision": settings.get("precision"),
        f"Last training loss{of_run}": _last(table, "loss"),
        f"Last validation loss{of_run}": _last(table, "valid_loss"),
        "Mean of the sets": "with the weights of that time; another change of them changes it"
        if record.mixture
        else None,
        "Last validation loss of the averaged weights": _last(table, "valid_loss_ema") if is_ema else None,
        f"Last validation loss of each set{of_run}": _last_by_set(table),
        "Training time (steps only)": _duration(table, before),
        "Hardware": "; ".join(dict.fromkeys(_hardware(start) for start in starts)),
        "Layout": _layout(settings),
        "Code": starts[-1]["code"] if starts else None,
        "Packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
    }
    shown = "\n".join(f"| {name} | {value} |" for name, value in lines.items() if value)
    return f"## Training\n\n| | |\n|---|---|\n{shown}"


def _sets(record: TrainingRecord) -> str | None:
    """The shard sets of a mixture with their last weights, the images that were read, and their digests."""
    read = record.images_of_sets
    return "; ".join(
        f"{one['name']}, weight {one['weight']:g}, {read.get(one['digest'], 0):,} images read, {_short(one['digest'])}"
        for one in record.mixture
    )


def _changes(record: TrainingRecord) -> str | None:
    """From which image on which shares held, if they changed."""
    changes = [f"{describe_weights(c['sets'])} from image {c['images']:,} on" for c in record.mixture_changes]
    return "; ".join(changes) if len(changes) > 1 else None


def _short(digest: str | None) -> str | None:
    return f"sha256 {digest[:12]}" if digest else None


def _chosen(settings: dict[str, Any], section: str, key: str) -> Any:
    return settings.get(section, {}).get(key)


def _started_from(origin: dict[str, Any]) -> str | None:
    """The model of start.path by its name, not by its path on the disk of the training."""
    if not origin:
        return None
    path, step = str(origin["path"]), origin.get("step")
    name = path if path.startswith(HUB) else Path(origin.get("run") or origin["folder"]).name
    also = "".join(f", {what}" for key, what in TAKEN.items() if origin.get(key))
    resolution = f", {origin['resolution']}x{origin['resolution']} images"
    return f"{name}{'' if step is None else f', step {step:,}'}{resolution} ({_short(origin['digest'])}): weights{also}"


def _optimizer(settings: dict[str, Any]) -> str | None:
    if "optimizer" not in settings:
        return None
    chosen = settings["optimizer"]
    betas = ", ".join(f"{beta:g}" for beta in chosen["betas"])
    return (
        f"Adam, peak learning rate {chosen['learning_rate']:g}, betas {betas}, "
        f"weight decay {chosen['weight_decay']:g}, gradients clipped at {chosen['clip_norm']:g}"
    )


def _schedule(settings: dict[str, Any]) -> str | None:
    chosen = settings.get("schedule")
    if not chosen:
        return None
    wsd = chosen["decay"] == "wsd"
    last = f" over the last {chosen['decay_steps']:,} steps ({chosen['decay_shape']})" if wsd else ""
    return f"{chosen['warmup_steps']:,} steps of warm-up, then {chosen['decay']}{last}"


def _augmentation(settings: dict[str, Any]) -> str | None:
    chosen = settings.get("data", {})
    flip = ["random flips"] if chosen.get("flip") else []
    crop = [f"random crops of images padded by {chosen['reflect_crop']} pixels"] if chosen.get("reflect_crop") else []
    return ", ".join(flip + crop) or ("none" if chosen else None)


def _layout(settings: dict[str, Any]) -> str | None:
    chosen = settings.get("parallel")
    if not chosen:
        return None
    parts = [f"ZeRO-{chosen['zero_stage']}"]
    parts += [f"{chosen['pipeline_stages']} pipeline stages"] if chosen.get("pipeline_stages", 1) > 1 else []
    parts += [f"tensor parallelism {chosen['tensor_parallel']}"] if chosen.get("tensor_parallel", 1) > 1 else []
    return ", ".join(parts)


def _last(table: MetricsTable, key: str) -> str | None:
    loss = table.last(key)
    return None if loss is None else f"{loss:.4f} nats per token"


def _last_by_set(table: MetricsTable) -> str:
    """Of a mixture."""
    found = [row["valid_loss_by_set"] for row in table.others if row.get("valid_loss_by_set")]
    each = {name: "NaN or Inf" if loss is None else f"{loss:.4f}" for name, loss in found[-1].items()} if found else {}
    return ", ".join(f"{name} {loss}" for name, loss in each.items())


def _duration(table: MetricsTable, images: int) -> str | None:
    """The total time of the steps, without saving and validation; images: seen before the first one."""
    seen, speeds = table.column("images"), table.column("images_per_second")
    known = np.isfinite(speeds) & (speeds > 0)
    seconds = float((np.diff(seen[known], prepend=images) / speeds[known]).sum())
    if not seconds:
        return None
    if seconds < 60:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def _hardware(start: dict[str, Any]) -> str:
    device = start["hardware"]["accelerator"] or f"CPU ({start['hardware']['cpu']})"
    return f"{start['ranks']} {'rank' if start['ranks'] == 1 else 'ranks'} on {device}"


def _limits(config: dict[str, Any]) -> str:
    return _render("limits.md", side=math.isqrt(config["n_positions"]), colors=config["vocab_size"] - 1)


def _render(template: str, **values: Any) -> str:
    """Renders a file in templates/ to Markdown."""
    return Template(Path(__file__).with_name("templates").joinpath(template).read_text()).render(values)


def _license(license_id: str | None) -> str:
    return "" if license_id else "## License\n\nThe publisher named no license; ask before you use the model."


def _contents(folder: Path) -> str:
    known = {
        "training/config.yaml": "the run's configuration as resolved",
        "training/run.json": "the record of the run: commands, code, packages, hardware",
        "training/metrics.jsonl": "every step: loss in nats per token, learning rate, gradient norm, throughput",
        "training/tensorboard": "the same as TensorBoard events",
        "results": "the evaluation results, one JSON per task, with figures and report.html",
    }
    model = "- the model (safetensors), its configuration, and an image processor with the palette"
    lines = [f"- `{path}`: {meaning}" for path, meaning in known.items() if (folder / path).exists()]
    return "\n".join(["## Files", "", model, *lines])
