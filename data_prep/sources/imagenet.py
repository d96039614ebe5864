"""ImageNet (ILSVRC2012, Russakovsky et al. 2015) as it is handed out: extracted, in its tars, or from Kaggle.

    PATH/train/<wnid>/*.JPEG                        or   PATH/ILSVRC2012_img_train.tar, a tar of a tar a class
    PATH/val/ILSVRC2012_val_00000001.JPEG ...       or   PATH/val/<wnid>/*.JPEG   or   PATH/ILSVRC2012_img_val.tar
    PATH/ILSVRC2012_devkit_t12[.tar.gz]             or   PATH/LOC_val_solution.csv and PATH/LOC_synset_mapping.txt

Labels are the field's: the rank of a class's WordNet id in sorted order. The ground truth of the devkit counts
otherwise, by ILSVRC2012_ID, so it is read together with meta.mat. The official validation set is our split `test`:
the test pictures were published without classes.
"""

import csv
import io
import os
import re
import tarfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from data_prep.config import SourceConfig
from data_prep.sources.archives import Member, PlacedFile, TarPictures, open_placed, tar_members
from data_prep.sources.base import FilePictures, Names, Source, fingerprint

TRAIN_TAR, VAL_TAR, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12"
TRUTH, META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
SOLUTION, SYNSETS = "LOC_val_solution.csv", "LOC_synset_mapping.txt"
KAGGLE_FOLDER = "ILSVRC/Data/CLS-LOC"
WNID = re.compile(r"n\d{8}")
VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


class Layout:
    """What lies where below the path."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pictures = root / KAGGLE_FOLDER if (root / KAGGLE_FOLDER).is_dir() else root

    def content(self, name: str) -> bytes | None:
        """A file of the development kit, from its folder or its archive."""
        for file in (self.root / DEVKIT / name, self.root / name):
            if file.is_file():
                return file.read_bytes()
        archive = self.root / f"{DEVKIT}.tar.gz"
        if not archive.is_file():
            return None
        try:
            with tarfile.open(archive) as tar:
                found = tar.extractfile(f"{DEVKIT}/{name}")
                return found.read() if found is not None else None
        except (tarfile.TarError, EOFError, OSError, KeyError) as error:
            raise ValueError(f"{archive} is damaged or lacks {name} ({error}); fetch it again.") from error


def open_source(config: SourceConfig) -> Source:
    """Lists the pictures. Raises ValueError naming the file that is missing, damaged or at odds with another."""
    assert config.path is not None
    layout = Layout(Path(config.path))
    train: FilePictures | TarPictures
    tar = layout.root / TRAIN_TAR
    if (layout.pictures / "train").is_dir():
        train, wnids = _folder_pictures(layout.pictures / "train")
    elif tar.is_file():
        train, wnids = _train_tar(tar)
    else:
        raise ValueError(f"source.path {layout.root} holds neither train/<wnid>/ nor {TRAIN_TAR}; it must hold one.")
    splits: dict[str, FilePictures | TarPictures] = {"train": train}
    test = _validation(layout, wnids)
    if test is not None:
        splits["test"] = test
    words = _words(layout)
    lines = (
        f"{split}/{name} {label}"
        for split, found in splits.items()
        for name, label in zip(found.names, found.labels, strict=True)
    )
    return Source(
        "ImageNet (ILSVRC2012)",
        [words.get(wnid, wnid) for wnid in wnids],
        {**splits},
        {},
        fingerprint(lines),
        facts={"wnids": wnids},
    )


def _folder_pictures(folder: Path, wnids: list[str] | None = None) -> tuple[FilePictures, list[str]]:
    """The pictures in folder/<wnid>/, and the wnids: those given, which others may not be added to."""
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and WNID.fullmatch(entry.name))
    if not found:
        raise ValueError(f"{folder} holds no folders named like n01440764; extract the pictures again.")
    wnids = wnids or found
    names: list[str] = []
    labels = array("i")
    for wnid in found:
        if wnid not in wnids:
            raise ValueError(f"{folder / wnid} is a class that the training pictures do not have.")
        pictures = sorted(entry.name for entry in os.scandir(folder / wnid) if entry.name.endswith(".JPEG"))
        if not pictures:
            raise ValueError(f"{folder / wnid} holds no .JPEG pictures; extract it again.")
        names += (f"{wnid}/{name}" for name in pictures)
        labels.extend([wnids.index(wnid)] * len(pictures))
    return FilePictures(str(folder), names, np.array(labels)), wnids


def _train_tar(path: Path) -> tuple[TarPictures, list[str]]:
    """The pictures of the tar of tars; the inner ones are named after their wnid."""
    file = open_placed(path)
    inner = sorted(tar_members(file), key=lambda member: member.name)
    wnids = [member.name.removesuffix(".tar") for member in inner]
    odd = next((wnid for wnid in wnids if not WNID.fullmatch(wnid)), None)
    if odd is not None or not inner:
        raise ValueError(f"{path} holds {odd or 'nothing'}, not class tars like n01440764.tar; fetch it again.")
    members = ((member, label) for label, tar in enumerate(inner) for member in tar_members(file, tar))
    return _tar_pictures(file, members), wnids


def _tar_pictures(file: PlacedFile, members: Iterable[tuple[Member, int]]) -> TarPictures:
    """Pictures by place; what is kept of a member is a few bytes."""
    offsets, sizes, labels = array("q"), array("q"), array("i")

    def names() -> Iterator[str]:
        for member, label in members:
            offsets.append(member.offset)
            sizes.append(member.size)
            labels.append(label)
            yield member.name

    packed = Names(names())
    return TarPictures(file, packed, np.array(offsets), np.array(sizes), np.array(labels))


def _validation(layout: Layout, wnids: list[str]) -> FilePictures | TarPictures | None:
    """The validation pictures in whichever form they are there, None without them."""
    folder, tar = layout.pictures / "val", layout.root / VAL_TAR
    if folder.is_dir():
        if any(entry.is_dir() for entry in os.scandir(folder)):
            return _folder_pictures(folder, wnids)[0]
        names = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(".JPEG"))
        return FilePictures(str(folder), names, np.array(_truth(layout, names, wnids)))
    if tar.is_file():
        file = open_placed(tar)
        members = sorted(tar_members(file), key=lambda member: member.name)
        labels = _truth(layout, [member.name for member in members], wnids)
        return _tar_pictures(file, zip(members, labels, strict=True))
    return None


def _truth(layout: Layout, names: list[str], wnids: list[str]) -> list[int]:
    """The labels of the flat validation set's pictures, of these names."""
    solution = layout.root / SOLUTION
    truth, source = (_solution(solution), str(solution)) if solution.is_file() else (_devkit_truth(layout), TRUTH)
    if len(truth) != len(names):
        raise ValueError(f"{source} labels {len(truth)} pictures, but the validation set has {len(names)}.")
    labels = []
    for name in names:
        match = VAL_NAME.fullmatch(name)
        wnid = truth.get(int(match[1])) if match else None
        if wnid is None:
            raise ValueError(f"the validation picture {name} is none of those that {source} labels.")
        if wnid not in wnids:
            raise ValueError(f"the validation picture {name} is of class {wnid}, which the training pictures lack.")
        labels.append(wnids.index(wnid))
    return labels


def _solution(file: Path) -> dict[int, str]:
    """Kaggle's form: the wnid of each validation picture by its number."""
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    try:
        return {int(row["ImageId"].rpartition("_")[2]): row["PredictionString"].split()[0] for row in rows}
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"{file} is not as Kaggle hands it out ({error!r}); fetch it again.") from error


def _devkit_truth(layout: Layout) -> dict[int, str]:
    """The development kit's form: the wnid of each validation picture by its number."""
    truth, synsets = layout.content(TRUTH), _devkit_synsets(layout)
    if truth is None or not synsets:
        raise ValueError(
            f"{layout.root} has validation pictures but no ground truth; put {DEVKIT}.tar.gz there, or "
            f"Kaggle's {SOLUTION}."
        )
    numbers = truth.split()
    unknown = next((number for number in numbers if not number.isdigit() or int(number) not in synsets), None)
    if unknown is not None:
        raise ValueError(f"{TRUTH} holds {unknown.decode(errors='replace')!r}, no ILSVRC2012_ID of {META}.")
    return {place: synsets[int(number)][0] for place, number in enumerate(numbers, 1)}


def _devkit_synsets(layout: Layout) -> dict[int, tuple[str, str]]:
    """{ILSVRC2012_ID: (wnid, words)} of the classes; the inner nodes of the hierarchy are none."""
    content = layout.content(META)
    if content is None:
        return {}
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(content), squeeze_me=True)["synsets"]
        leaves = [entry for entry in synsets if int(entry["num_children"]) == 0]
        return {int(leaf["ILSVRC2012_ID"]): (str(leaf["WNID"]), str(leaf["words"])) for leaf in leaves}
    except Exception as error:  # scipy raises nearly anything on damaged files
        raise ValueError(f"{META} of the development kit can't be read ({error!r}); fetch it again.") from error


def _words(layout: Layout) -> dict[str, str]:
    """The names of the classes by wnid; empty where no file has them. Two classes may share a name."""
    mapping = layout.root / SYNSETS
    if mapping.is_file():
        lines = mapping.read_text().splitlines()
        return {wnid: words for wnid, _, words in (line.partition(" ") for line in lines if line)}
    return dict(_devkit_synsets(layout).values())
