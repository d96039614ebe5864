"""The names of ILSVRC2012's classes, and the classes of its validation images, from the devkit or Kaggle's lists.

The devkit numbers the classes from 1 to 1000 in an order of its own (ILSVRC2012_ID), not in the order of the sorted
WordNet ids. Therefore all functions here return WordNet ids ("wnids"), never these numbers.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from data_prep.sources.base import open_archive

DEVKIT = "ILSVRC2012_devkit_t12"
TRUTH, META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
SOLUTION, MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"
VAL_NAME = "ILSVRC2012_val_{:08d}"


@dataclass(frozen=True)
class Classes:
    """Names and ground truth from the files of the devkit or of Kaggle; empty if there are none."""

    words: dict[str, str]
    """The words of a synset by its wnid, such as "tench, Tinca tinca"."""
    words_file: str
    truth: dict[str, str]
    """The wnid of each validation image, by its name without extension."""
    truth_file: str

    def names(self, wnids: list[str]) -> list[str]:
        """The names of the classes. Two pairs share a name ("crane", "maillot"); their labels differ."""
        if not self.words:
            return list(wnids)
        unknown = [wnid for wnid in wnids if wnid not in self.words]
        if unknown:
            raise ValueError(
                f"the training set has the class {unknown[0]}, which is not in {self.words_file}; remove it."
            )
        return [self.words[wnid] for wnid in wnids]

    def of_images(self, names: list[str], parent: Path, root: Path) -> list[str]:
        """The wnids of the validation images in `parent`.

        Raises ValueError if there is no ground truth, or if it is for other images.
        """
        if not self.truth:
            raise ValueError(
                f"{parent} does not give the classes of its images; put {DEVKIT}.tar.gz (or {SOLUTION}) into {root}."
            )
        if len(self.truth) != len(names):
            raise ValueError(
                f"{parent} has {len(names)} images, but {self.truth_file} has classes for {len(self.truth)}; download "
                f"the incomplete one again."
            )
        stems = [name.rpartition(".")[0] for name in names]
        unknown = [stem for stem in stems if stem not in self.truth]
        if unknown:
            raise ValueError(f"{self.truth_file} has no class for {unknown[0]} in {parent}; rename or remove it.")
        return [self.truth[stem] for stem in stems]


def read_classes(root: Path) -> Classes:
    """Reads the devkit (its folder or archive) or Kaggle's lists in `root`.

    Raises ValueError naming a file that is damaged.
    """
    devkit = _devkit_files(root)
    if devkit is not None:
        numbers, words = _read_meta(devkit[META])
        return Classes(words, f"{DEVKIT}/{META}", _read_truth(devkit[TRUTH], numbers), f"{DEVKIT}/{TRUTH}")
    words = _read_mapping(root / MAPPING) if (root / MAPPING).is_file() else {}
    solved = _read_solution(root / SOLUTION) if (root / SOLUTION).is_file() else {}
    return Classes(words, MAPPING, solved, SOLUTION)


def _devkit_files(root: Path) -> dict[str, bytes] | None:
    """The contents of the devkit's two files."""
    folder, archive = root / DEVKIT, root / f"{DEVKIT}.tar.gz"
    contents = {}
    if folder.is_dir():
        contents = {name: (folder / name).read_bytes() for name in (TRUTH, META) if (folder / name).is_file()}
    elif archive.is_file():
        with open_archive(archive, str(archive)) as tar:
            for member in tar:
                wanted = [name for name in (TRUTH, META) if member.name.endswith(name)]
                file = tar.extractfile(member) if wanted else None
                if file is not None:
                    contents[wanted[0]] = file.read()
    else:
        return None
    for name in (TRUTH, META):
        if name not in contents:
            raise ValueError(f"{folder if folder.is_dir() else archive} has no {name}; download {archive.name} again.")
    return contents


def _read_meta(content: bytes) -> tuple[dict[int, str], dict[str, str]]:
    """From meta.mat: wnids by ILSVRC2012_ID, and words by wnid. Synsets with children are not classes."""
    from scipy.io import loadmat

    numbers, words = {}, {}
    try:
        for synset in loadmat(io.BytesIO(content))["synsets"].ravel():
            if int(synset["num_children"].item()) == 0:
                wnid = str(synset["WNID"].item())
                numbers[int(synset["ILSVRC2012_ID"].item())] = wnid
                words[wnid] = str(synset["words"].item())
    except Exception as error:  # scipy may raise any exception for a damaged file
        raise ValueError(f"{DEVKIT}/{META} can't be read ({error}); download {DEVKIT}.tar.gz again.") from error
    return numbers, words


def _read_truth(content: bytes, numbers: dict[int, str]) -> dict[str, str]:
    """The wnids of the validation images; line n is for image n."""
    truth = {}
    for line, word in enumerate(content.decode("utf-8-sig", "replace").split(), 1):
        if not word.isdecimal() or int(word) not in numbers:
            raise ValueError(f"{DEVKIT}/{TRUTH} has {word!r} in line {line}; it must be an ILSVRC2012_ID of {META}.")
        truth[VAL_NAME.format(line)] = numbers[int(word)]
    return truth


def _read_mapping(file: Path) -> dict[str, str]:
    """Lines "n01440764 tench, Tinca tinca"."""
    lines = (line.partition(" ") for line in file.read_text(encoding="utf-8-sig", errors="replace").splitlines())
    return {wnid: words.strip() for wnid, _, words in lines if wnid}


def _read_solution(file: Path) -> dict[str, str]:
    """Rows "ILSVRC2012_val_00048981,n03995372 85 1 499 272 ": an image, then class and box of each of its objects."""
    solved = {}
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as text:
        for row in csv.DictReader(text):
            name, boxes = row.get("ImageId"), (row.get("PredictionString") or "").split()
            if not name or not boxes:
                raise ValueError(
                    f"{file} has a row without ImageId or PredictionString; download it from Kaggle again."
                )
            solved[name] = boxes[0]
    return solved
