"""Published numbers of the paper, its authors and related systems, for comparison with measured results."""

from typing import Any, NamedTuple

from pipeline.results.claims import ACCURACY_BASELINES, COUNT_BASELINES, value_of
from pipeline.results.headline import Headline, headlines_of, measured_split
from pipeline.results.text import percent

PAPER = "Chen et al., ICML 2020"
CODE = "github.com/openai/image-gpt"
BLOG = "openai.com/research/image-gpt"
LATER = "a later table of the authors"


class Published(NamedTuple):
    """One published number; accuracies in percent."""

    measure: str
    dataset: str
    system: str
    value: str
    source: str


NATS = "Test loss, nats per color"
PROBE = "Linear probe, test accuracy"
FINE_TUNING = "Fine-tuned, test accuracy"
LOW_DATA = "With 4 / 25 / 400 labels a class, test accuracy"
LOWER_IS_BETTER = (NATS,)
"""Of the other measures, higher numbers are better."""
RELATED = "Related systems on ImageNet, top-1 (each by its own protocol)"

PUBLISHED = (
    Published(NATS, "ImageNet 32x32", "iGPT-S (76M)", "2.0895", CODE),
    Published(NATS, "ImageNet 32x32", "iGPT-M (455M)", "2.0614", CODE),
    Published(NATS, "ImageNet 32x32", "iGPT-L (1.4B)", "2.0466", CODE),
    Published(PROBE, "CIFAR-10", "iGPT-L, from ImageNet", "96.3 %", PAPER),
    Published(PROBE, "CIFAR-10", "iGPT-S, from ImageNet", "above 90 %", PAPER),
    Published(PROBE, "CIFAR-10", "SimCLR", "95.3 %", PAPER),
    Published(PROBE, "CIFAR-10", "ResNet-152, supervised on ImageNet", "94.0 %", PAPER),
    Published(PROBE, "CIFAR-100", "iGPT-L, from ImageNet", "82.8 %", PAPER),
    Published(PROBE, "CIFAR-100", "SimCLR", "80.2 %", PAPER),
    Published(PROBE, "CIFAR-100", "ResNet-152, supervised on ImageNet", "78.0 %", PAPER),
    Published(PROBE, "STL-10", "iGPT-L, from ImageNet", "95.5 %", BLOG),
    Published(PROBE, "STL-10", "iGPT-L, from ImageNet", "97.1 %", LATER),
    Published(PROBE, "STL-10", "AMDIM-L", "94.2 %", PAPER),
    Published(PROBE, "ImageNet 32x32", "iGPT-S / M / L", "41.9 / 54.5 / 60.3 %", PAPER),
    Published(PROBE, "ImageNet 48x48", "iGPT-L", "65.2 %", PAPER),
    Published(PROBE, "ImageNet 64x64", "iGPT-XL (6.8B)", "68.7 %", PAPER),
    Published(PROBE, "ImageNet 64x64", "iGPT-XL, 15,360 features of 5 layers", "72.0 %", PAPER),
    Published(PROBE, "ImageNet", "MoCo", "68.6 %", PAPER),
    Published(PROBE, "ImageNet", "SimCLR", "76.5 %", PAPER),
    Published(LOW_DATA, "CIFAR-10", "iGPT-L, linear probe", "73.2 ± 1.5 / 87.6 ± 0.6 / 94.3 ± 0.1 %", PAPER),
    Published(LOW_DATA, "CIFAR-10", "FixMatch (CTA)", "88.6 / 94.9 / 95.7 %", PAPER),
    Published(LOW_DATA, "CIFAR-10", "MixMatch", "52.5 / 89.0 / 93.6 %", PAPER),
    Published(FINE_TUNING, "CIFAR-10", "iGPT-L", "99.0 %", PAPER),
    Published(FINE_TUNING, "CIFAR-10", "iGPT-L, BERT objective", "98.6 %", PAPER),
    Published(FINE_TUNING, "CIFAR-10", "GPipe", "99.0 %", PAPER),
    Published(FINE_TUNING, "CIFAR-10", "SimCLR", "98.6 %", PAPER),
    Published(FINE_TUNING, "CIFAR-10", "AutoAugment", "98.5 %", PAPER),
    Published(FINE_TUNING, "CIFAR-100", "iGPT-L", "88.5 %", PAPER),
    Published(FINE_TUNING, "CIFAR-100", "EfficientNet", "91.7 %", PAPER),
    Published(FINE_TUNING, "CIFAR-100", "AutoAugment", "89.3 %", PAPER),
    Published(FINE_TUNING, "CIFAR-100", "SimCLR", "89.0 %", PAPER),
    Published(FINE_TUNING, "ImageNet 32x32", "iGPT-L", "66.3 %", PAPER),
    Published(FINE_TUNING, "ImageNet", "iGPT-L, BERT objective", "66.5 %", PAPER),
    Published(FINE_TUNING, "ImageNet 48x48", "iGPT-L", "72.6 %", PAPER),
    Published(FINE_TUNING, "ImageNet 48x48", "iGPT-L, from scratch", "53.2 %", PAPER),
    Published(RELATED, "ImageNet", "EsViT, Swin-B", "81.3 %", "Li et al. 2021 (EsViT)"),
    Published(RELATED, "ImageNet", "SwAV, ResNet-50", "75.3 %", "Caron et al. 2020 (SwAV)"),
    Published(RELATED, "ImageNet", "SimCLRv2, ResNet-152 3x SK", "79.8 %", "Chen et al. 2020 (SimCLRv2), table 1"),
    Published(RELATED, "ImageNet", "SeLa, ResNet-50", "61.5 %", "Asano et al. 2020 (SeLa)"),
    Published(RELATED, "ImageNet", "SEER, RegNetY-256", "84.2 %", "Goyal et al. 2021 (SEER)"),
)


def compared_with_published(
    results: dict[str, dict[str, Any]],
) -> dict[str, tuple[list[tuple[dict[str, Any], Headline]], list[Published]]]:
    """By published measure: our results with their headlines, and the published rows.

    Only measures with a result of ours are included, followed by the related systems; empty if there are none. A
    headline that was measured in another way than the published numbers is excluded, whatever measure it names.
    """
    ours: dict[str, list[tuple[dict[str, Any], Headline]]] = {}
    for result in results.values():
        for headline in headlines_of(result):
            if measured_split(result) == "test" and (headline.measure != LOW_DATA or _is_per_class(headline)):
                ours.setdefault(headline.measure, []).append((result, headline))
    measures = [measure for measure in dict.fromkeys(row.measure for row in PUBLISHED) if measure in ours]
    return {
        measure: (ours.get(measure, []), [row for row in PUBLISHED if row.measure == measure])
        for measure in (measures and [*measures, RELATED])
    }


def our_rows(ours: list[tuple[dict[str, Any], Headline]]) -> list[tuple[dict[str, Any], str, str, bool]]:
    """(result, name, number, whether it is the model's) of our rows beside the published numbers: the model's
    headlines, and after each task's the baselines that were measured with it."""
    rows = []
    for number, (result, headline) in enumerate(ours):
        rows.append((result, f"this model: {headline.name}", headline.text, True))
        if number + 1 == len(ours) or ours[number + 1][0] is not result:
            accuracy = headline.unit == "accuracy"
            keys = ACCURACY_BASELINES if accuracy else COUNT_BASELINES
            found = {name: value_of(result, key) for name, key in keys.items()}
            baselines = [(name, value) for name, value in found.items() if value is not None]
            rows += [(result, name.lower(), percent(v) if accuracy else f"{v:.4f}", False) for name, v in baselines]
    return rows


def _is_per_class(headline: Headline) -> bool:
    """Whether a headline of few labels is of one of the published settings: 4, 25 or 400 labels per class."""
    return headline.name.endswith((" 4 per class", " 25 per class", " 400 per class"))
