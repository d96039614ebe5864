"""What ILSVRC2012's classes are called, and the classes of its validation pictures: the devkit, or Kaggle's lists.

The devkit numbers the 1000 classes 1 to 1000 in an order of its own (ILSVRC2012_ID), which is not that of the
sorted WordNet ids; so everything here speaks of WordNet ids ("wnids"), and numbers do not leave this module.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from data_prep.sources.base import opened_archive

DEVKIT = "ILSVRC2012_devkit_t12"
TRUTH, META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
SOLUTION, MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"
VAL_NAME = "ILSVRC2012_val_{:08d}"


@dataclass(frozen=True)
class Classes:
    """What the files beside the pictures say; empty where there are none."""

    words: dict[str, str]
    """The words of a synset by its wnid, such as "tench, Tinca tinca"."""
    words_file: str
    truth: dict[str, str]
    """The wnid of each validation picture by its name, without its ending."""
    truth_file: str

    def names(self, wnids: list[str]) -> list[str]:
        """The classes' names. Two pairs of classes share theirs ("crane", "maillot"): labels tell them apart."""
        if not self.words:
            return list(wnids)
        unknown = [wnid for wnid in wnids if wnid not in self.words]
        if unknown:
            raise ValueError(f"the training set has a class {unknown[0]} that {self.words_file} lacks; remove it.")
        return [self.words[wnid] for wnid in wnids]

    def of_pictures(self, names: list[str], place: Path, root: Path) -> list[str]:
        """The wnids of the validation pictures, which lie in `place`.

        Raises ValueError if no file tells, or the file is about other pictures.
        """
        if not self.truth:
            raise ValueError(
                f"{place} does not tell the classes of its pictures; put {DEVKIT}.tar.gz (or {SOLUTION}) into {root}."
            )
        if len(self.truth) != len(names):
            raise ValueError(
                f"{place} holds {len(names)} pictures, {self.truth_file} has the classes of {len(self.truth)}; "
                "complete the one or the other."
            )
        stems = [name.rpartition(".")[0] for name in names]
        strange = [stem for stem in stems if stem not in self.truth]
        if strange:
            raise ValueError(f"{self.truth_file} has no class for {strange[0]} in {place}; rename or remove it.")
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
        with opened_archive(archive, str(archive)) as tar:
            for member in tar:
                wanted = [name for name in (TRUTH, META) if member.name.endswith(name)]
                file = tar.extractfile(member) if wanted else None
                if file is not None:
                    contents[wanted[0]] = file.read()
    else:
        return None
    for name in (TRUTH, META):
        if name not in contents:
            raise ValueError(f"{folder if folder.is_dir() else archive} lacks {name}; fetch {archive.name} again.")
    return contents


def _read_meta(content: bytes) -> tuple[dict[int, str], dict[str, str]]:
    """meta.mat: wnids by ILSVRC2012_ID, and words by wnid, of the classes: synsets with others below are none."""
    from scipy.io import loadmat

    numbers, words = {}, {}
    try:
        for synset in loadmat(io.BytesIO(content))["synsets"].ravel():
            if int(synset["num_children"].item()) == 0:
                wnid = str(synset["WNID"].item())
                numbers[int(synset["ILSVRC2012_ID"].item())] = wnid
                words[wnid] = str(synset["words"].item())
    except Exception as error:  # a damaged file makes scipy raise nearly anything
        raise ValueError(f"{DEVKIT}/{META} is not the devkit's ({error}); fetch {DEVKIT}.tar.gz again.") from error
    return numbers, words


def _read_truth(content: bytes, numbers: dict[int, str]) -> dict[str, str]:
    """The wnids of the validation pictures: line n is about picture n."""
    truth = {}
    for line, word in enumerate(content.decode("ascii", "replace").split(), 1):
        if not word.isdecimal() or int(word) not in numbers:
            raise ValueError(f"{DEVKIT}/{TRUTH} has {word!r} in line {line}; it must be an ILSVRC2012_ID of {META}.")
        truth[VAL_NAME.format(line)] = numbers[int(word)]
    return truth


def _read_mapping(file: Path) -> dict[str, str]:
    """Lines "n01440764 tench, Tinca tinca"."""
    lines = (line.partition(" ") for line in file.read_text(encoding="utf-8", errors="replace").splitlines())
    return {wnid: words.strip() for wnid, _, words in lines if wnid}


def _read_solution(file: Path) -> dict[str, str]:
    """Rows "ILSVRC2012_val_00048981,n03995372 85 1 499 272 ": a picture, then its class and box, repeated."""
    solved = {}
    with file.open(encoding="utf-8", errors="replace", newline="") as text:
        for row in csv.DictReader(text):
            name, boxes = row.get("ImageId"), (row.get("PredictionString") or "").split()
            if not name or not boxes:
                raise ValueError(f"{file} is not Kaggle's: a row must be ImageId and PredictionString; fetch it again.")
            solved[name] = boxes[0]
    return solved
