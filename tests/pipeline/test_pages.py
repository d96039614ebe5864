"""The pages (README.md of each folder, CONTRIBUTING.md): their links, commands and code are right.

Blocks that open with "bash run" are executed, page after page, in one folder; in plain bash blocks the files and
options must exist.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from PIL import Image
from skimage import data

from data_prep.shards.reader import open_shard_set
from pipeline.model_folder.export import export, find_checkpoint
from tests.launch import ROOT, run
from tests.pipeline.conftest import Runner

README = "README.md"
RUN_PAGES = [
    README,
    "data_prep/README.md",
    "pipeline/train/README.md",
    "pipeline/plan/README.md",
    "pipeline/evaluate/README.md",
    "pipeline/publish/README.md",
    "pipeline/operate/README.md",
    "slurm/README.md",
]
"""In this order: later pages use what the earlier ones wrote."""
PAGES = [*RUN_PAGES, "pipeline/scaling/README.md", "configs/README.md", "tests/README.md", "tests/golden/README.md"]
PAGES += ["CONTRIBUTING.md"]
README_LINES = 150
OWN_OPTIONS = {"--help"}
SCRIPT_COMMANDS = {
    "slurm/evaluate.sh": (("pipeline", "evaluate"), {"--run", "--shards", "--out", "--tasks"}),
    "slurm/publish.sh": (("pipeline", "publish"), {"--run", "--results", "--to"}),
    "slurm/prepare_shards.sh": (("data_prep", "shards"), set[str]()),
    "slurm/status.sh": (("pipeline", "status"), set[str]()),
}
"""The command that takes a job script's options, and the script's own options; else `train`."""
SCRIPT_OPTIONS = {"--dry-run"}
Command = tuple[str, str]
"""A program (pipeline or data_prep) and its command."""


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def blocks_of(page: str, info: str) -> list[str]:
    """The fenced blocks of a page whose opening line names exactly this."""
    return re.findall(rf"^```{info}\n(.*?)^```", text_of(page), re.M | re.S)


def commands_of(page: str) -> Iterator[list[str]]:
    """The words of every command in the bash blocks of a page."""
    for block in [*blocks_of(page, "bash run"), *blocks_of(page, "bash")]:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


@cache
def help_of(program: str, command: str) -> str:
    with TemporaryDirectory() as logs:
        finished = run(1, "-m", program, command, "--help", logs=Path(logs))
    assert finished.codes == [0], finished.output
    return finished.output + (help_of(program, "train") if command == "search" else "")  # which takes train's options


def command_in(words: list[str]) -> tuple[Command, list[str]] | None:
    """The command of this project in a command line, and the words after it."""
    for place, word in enumerate(words):
        if word in ("pipeline", "data_prep") and place and words[place - 1] in ("-m", "--"):
            return (word, words[place + 1]), words[place + 2 :]
        if re.fullmatch(r"(\./)?slurm/\w+\.sh", word) and words[0] != "source":
            command, own = SCRIPT_COMMANDS.get(word, (("pipeline", "train"), set[str]()))
            return command, [rest for rest in words[place + 1 :] if rest.split("=")[0] not in own | SCRIPT_OPTIONS]
    return None


def test_readme_is_short() -> None:
    assert len(text_of(README).splitlines()) <= README_LINES


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", text_of(page)):
        path, _, heading = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_files_and_options_that_exist(page: str) -> None:
    for words in commands_of(page):
        for word in words:
            if re.match(r"(configs|slurm|tests|data_prep|pipeline)/[\w/]+\.\w+$", word):
                assert (ROOT / word).is_file(), f"{page}: {word}"
        found = command_in(words)
        if found is None:
            continue
        (program, command), rest = found
        for option in (word.split("=")[0] for word in rest if re.match(r"--\w", word)):
            known = re.search(rf"(^|[\s,]){re.escape(option)}\b", help_of(program, command))
            assert known or option in OWN_OPTIONS, f"{page}: {program} {command} has no {option}"


@pytest.fixture
def workspace(shards: Path, finished_run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in which what the Python blocks name exists."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/shards").symlink_to(shards)
    export(find_checkpoint(finished_run.folder / "reference"), tmp_path / "out/model")
    monkeypatch.chdir(tmp_path)


def python_block(page: str, containing: str) -> str:
    return next(block for block in blocks_of(page, "python") if containing in block)


@pytest.mark.usefixtures("workspace")
def test_plain_webdataset_reads_a_shard(shards: Path) -> None:
    names: dict[str, object] = {}
    exec(python_block("data_prep/README.md", "wds."), names)
    pixels, labels = open_shard_set(shards).split("train").record(0)
    assert np.array_equal(names["tokens"], pixels[0])  # type: ignore[arg-type]
    assert names["label"] == labels[0]


@pytest.mark.usefixtures("workspace")
def test_transformers_generates_an_image_from_an_exported_model() -> None:
    names: dict[str, object] = {}
    exec(python_block("pipeline/publish/README.md", "generate("), names)
    tokens = names["tokens"]
    assert tuple(tokens.shape) == (64,)  # type: ignore[attr-defined]
    assert int(tokens.max()) < 512  # type: ignore[attr-defined]


@pytest.mark.usefixtures("workspace")
def test_the_page_has_the_code_of_the_card() -> None:
    card = re.findall(r"^```python\n(.*?)^```", Path("out/model/README.md").read_text(), re.M | re.S)
    page = blocks_of("pipeline/publish/README.md", "python")
    spelled = [block.replace('"model"', '"out/model"').replace("layer = 1\n", "layer = 12\n") for block in card]
    assert page == spelled


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows of three photographs as train/<class>/*.png and test/<class>/*.png."""
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in ("astronaut", "coffee", "cat"):
        photograph = getattr(data, name)()
        for split, count in (("train", 120), ("test", 20)):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                top, left = (int(draw.integers(0, size - 64)) for size in photograph.shape[:2])
                window = Image.fromarray(photograph[top : top + 64, left : left + 64])
                window.save(folder / split / name / f"{number:04}.png")
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pages' commands are executed: it sees the repository's folders, and keeps what the commands write."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("configs", "slurm", "data_prep", "pipeline", "tests", "requirements.txt"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_PAGES)
def test_the_commands_of_a_page_run(page: str, images: Path, run_folder: Path) -> None:
    script = "\n".join(blocks_of(page, "bash run")).replace("/data/images", str(images))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script],
        cwd=run_folder,
        env=os.environ | {"PATH": path, "IMAGES": str(images), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
