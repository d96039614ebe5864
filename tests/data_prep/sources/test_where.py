"""source.where: what an expression accepts, how records are judged, and what is refused."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from data_prep.config import SourceConfig
from data_prep.shards.reader import open_shard_set
from data_prep.sources.open import open_source
from data_prep.sources.where import FILTERED, NO_VALUE, Where
from tests.data_prep.tar_files import encode_image, tar_bytes
from tests.data_prep.test_errors import assert_one_sentence
from tests.launch import files_of

Small = tuple[np.ndarray, np.ndarray]
Run = Callable[..., Any]
ROW = {"width": 64, "height": 48, "punsafe": 0.25, "license": "cc0", "nsfw": False, "caption": "a cat", "hash": None}


@pytest.mark.parametrize(
    ("expression", "outcome"),
    [
        ("width >= 64 and punsafe < 0.5", None),
        ("width > 64 or punsafe < .1", FILTERED),
        ("32 <= height <= 48", None),
        ("32 <= height < 48", FILTERED),
        ("width / height < 1.4 and width * height == 3072", None),
        ("-width + height == -16", None),
        ("height in (+48, - -3)", None),
        ("-absent > 3", NO_VALUE),
        ("not (width == 64)", FILTERED),
        ("license in ('cc0', 'cc-by')", None),
        ("height not in [48, -5]", FILTERED),
        ("'cat' in caption and 'dog' not in caption", None),
        ("not nsfw and nsfw == False", None),
        ("license == 'cc0'", None),
        ("hash == None and width != None", None),
        ("hash > 3", NO_VALUE),
        ("absent > 3", NO_VALUE),
        ("absent > 3 or width == 64", None),
        ("width == 64 or absent > 3", None),
        ("absent > 3 and width == 65", FILTERED),
        ("not absent > 3", NO_VALUE),
        ("width / (height - 48) > 0", NO_VALUE),
        ("  width\t== 64 ", None),
    ],
)
def test_records_are_judged(expression: str, outcome: str | None) -> None:
    assert Where(expression).refusal(ROW) == outcome


def test_a_value_that_is_not_a_number_is_missing() -> None:
    assert Where("punsafe < 0.5").refusal({"punsafe": math.nan}) == NO_VALUE
    assert Where("punsafe == None").refusal({"punsafe": math.nan}) is None


def test_random_expressions_agree_with_python() -> None:
    """On records that have all columns, the result is Python's own."""
    draw = random.Random(0)
    row = {"a": 3, "b": -2.5, "c": 7}

    def value(depth: int) -> str:
        if depth == 0:
            return draw.choice(["a", "b", "c", "2", "-1.5"])
        return f"({value(depth - 1)} {draw.choice('+-*')} {value(depth - 1)})"

    def condition(depth: int) -> str:
        if depth == 0:
            sign = draw.choice(["<", "<=", "==", "!=", ">", ">="])
            return f"{value(1)} {sign} {value(1)} < {value(0)}"
        if draw.random() < 0.2:
            return f"not ({condition(depth - 1)})"
        return f"({condition(depth - 1)} {draw.choice(['and', 'or'])} {condition(depth - 1)})"

    outcomes = []
    for _ in range(200):
        expression = f"a != 99 and {condition(3)}"
        expected = eval(expression, {}, row)
        assert (Where(expression).refusal(row) is None) == expected, expression
        outcomes.append(expected)
    assert 20 < sum(outcomes) < 180


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("width >=", ["'width >='", "is not an expression (invalid syntax)"]),
        ("width = 64", ["is not an expression"]),
        ("len(caption) > 3", ["'len(caption)': this is not allowed"]),
        ("caption.lower() == 'a'", ["'caption.lower()': this is not allowed"]),
        ("width.real > 3", ["'width.real': this is not allowed"]),
        ("rows[0] > 3", ["'rows[0]': this is not allowed"]),
        ("(lambda: 3) == width", ["'lambda: 3': this is not allowed"]),
        ("[x for x in y] == width", ["this is not allowed"]),
        ("f'{width}' == '3'", ["this is not allowed"]),
        ("width ** 9 > 3", ["'width ** 9': this is not allowed"]),
        ("width % 2 == 0", ["'width % 2': this is not allowed"]),
        ("width is None", ["'width is None': use == and != in place of is"]),
        ("width < None", ["None is compared by <; use == or !="]),
        ("width", None),
        ("width + 3", ["'width + 3': a condition is needed"]),
        ("True", ["'True': a condition is needed"]),
        ("1 < 2", ["'1 < 2': it names no column"]),
        ("(width > 3) == True", ["'width > 3': a value is needed, not a comparison"]),
        ("width in (1, 'a')", ["\"(1, 'a')\": a list must have numbers alone, or strings alone"]),
        ("width in ()", ["'()': a list must have"]),
        ("width in (height, 3)", ["'(height, 3)': a list must have"]),
        ("width in (1 + 2j, 3)", ["a list must have"]),
        ("width in ({[1]},)", ["'({[1]},)': a list must have"]),
        ("width in (-'a',)", ["a list must have"]),
        (
            "license in ('cc-by-nc')",
            ["\"'cc-by-nc'\": in needs a list", "write ['cc-by-nc'] or ('cc-by-nc',), or 'part' in"],
        ),
        ("license not in 'cc0'", ["not in needs a list", "or 'part' not in column"]),
        ("width > 3j", ["'3j': this is not allowed"]),
        ("width > 3; height", ["is not an expression"]),
        ("not " * 200 + "nsfw", None),
        ("(" * 300 + "width > 3" + ")" * 300, ["is not an expression"]),
        ("width > 3 " + "and width > 3 " * 100, ["1,410 characters; it must have at most 1,000"]),
        ("", ["is not an expression"]),
        ("width > 3\0", ["is not an expression"]),
    ],
)
def test_expressions_that_are_refused(expression: str, words: list[str] | None) -> None:
    if words is None:
        assert Where(expression).columns
        return
    with pytest.raises(ValueError, match=r"source\.where .*\.$") as caught:
        SourceConfig(kind="webdataset", path="tars", where=expression)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "characters" in str(caught.value) or "names of columns, numbers, strings" in str(caught.value)


def test_long_expressions_are_shortened_in_messages() -> None:
    for expression in ("width > 3 and " * 60 + "len(caption)", "width in (" + "1, " * 300 + "'a')", "width >" * 140):
        with pytest.raises(ValueError, match=r" \.\.\.['\"]") as caught:
            Where(expression)
        assert len(str(caught.value)) < 500
    with pytest.raises(ValueError, match=r" \.\.\. \(a number\) with 'a' \(a string\)") as caught:
        Where("width + 1" * 1 + " + width" * 100 + " > 'a'").check({"width": 1}, "1.jpg")
    assert len(str(caught.value)) < 400


@pytest.fixture
def tars(tmp_path: Path, small: Small) -> Path:
    """Three tars of 20 images as img2dataset writes them: number i is i pixels wide, each tenth has no punsafe, image 7
    has no .json, and the .json of image 8 is damaged."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for tar in range(3):
        members = []
        for index in range(20 * tar, 20 * tar + 20):
            row = {"width": index, "caption": f"image {index}"} | (
                {"punsafe": 0.5} if index % 10 else {"punsafe": None}
            )
            members.append((f"{index:03d}.png", encode_image(small[0][index])))
            if index != 7:
                members.append((f"{index:03d}.json", b"{" if index == 8 else json.dumps(row).encode()))
        (folder / f"{tar:05d}.tar").write_bytes(tar_bytes(members))
    return folder


@pytest.fixture
def options(tars: Path) -> list[Any]:
    quick = ["--resolution", 8, "--palette.colors", 16, "--valid_fraction", 0, "--max_skipped", 0.05, "--workers", 1]
    return ["--source.kind", "webdataset", "--source.path", tars, *quick]


def test_tars_keep_what_fits(options: list[Any], tmp_path: Path, run: Run, small: Small) -> None:
    out = tmp_path / "out"
    result = run("shards", *options, "--source.where", "width < 40 and punsafe <= 0.5", "--out", out)
    assert result.code == 0, result.err
    assert "35 source images, after 25 that source.where excludes, 1 skipped; 34 images stored" in result.err
    assert "train filtered: 20 filtered, 5 no value" in result.err  # 0, 7, 10, 20, 30; the others are not below 40
    manifest = json.loads((out / "shards.json").read_text())
    assert manifest["filtered"] == {"train": {"filtered": 20, "no value": 5}}
    assert manifest["skipped"] == {"train": {"damaged": 1}}
    assert manifest["config"]["source"]["where"] == "width < 40 and punsafe <= 0.5"
    assert len((out / "skipped.jsonl").read_text().splitlines()) == 1
    assert open_shard_set(out).split("train").images == 34


def test_another_expression_is_another_set(options: list[Any], tmp_path: Path, run: Run) -> None:
    assert run("shards", *options, "--source.where", "width < 40", "--out", tmp_path / "out").code == 0
    same = run("shards", *options, "--source.where", "width < 40", "--out", tmp_path / "out")
    assert "is finished" in same.err
    other = run("shards", *options, "--source.where", "width < 41", "--out", tmp_path / "out")
    assert_one_sentence(other, "source.where width < 40, but it is now width < 41; choose another folder")
    assert_one_sentence(
        run("shards", *options, "--out", tmp_path / "out"), "source.where width < 40, but it is now its default"
    )


@pytest.mark.slow
def test_workers_and_parts_give_the_same_bytes(options: list[Any], tmp_path: Path, run: Run) -> None:
    options += ["--source.where", "width != 13"]
    assert run("palette", *options, "--out", tmp_path / "palette.npy").code == 0
    options += ["--palette.file", tmp_path / "palette.npy"]
    assert run("shards", *options, "--out", tmp_path / "one").code == 0
    assert run("shards", *options, "--out", tmp_path / "two", "--workers", 2).code == 0
    for part in (2, 1):
        assert run("shards", *options, "--out", tmp_path / "parts", "--part", part, "--parts", 2).code == 0
    assert run("join", tmp_path / "parts").code == 0
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two") == files_of(tmp_path / "parts")


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("wdth > 3", ["no image in", "00000.tar has 'wdth'; its images have the fields caption, punsafe, width."]),
        ("width > '3'", ["it compares width (a number) with '3' (a string)"]),
        ("caption + 3 > 3", ["it calculates with caption (a string) and 3 (a number)"]),
        ("-caption > 3", ["it puts a sign before caption (a string)"]),
        ("caption", ["caption is a string where a condition is needed"]),
        ("width in ('a', 'b')", ["it compares width (a number) with 'a' (a string)"]),
        ("'a' in width", ["it compares 'a' (a string) with width (a number)"]),
        ("width > 60", ["no usable training image", "58 filtered, 1 no value"]),
    ],
)
def test_expressions_that_do_not_fit_the_tars(
    expression: str, words: list[str], options: list[Any], tmp_path: Path, run: Run
) -> None:
    assert_one_sentence(run("shards", *options, "--source.where", expression, "--out", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists() or "width > 60" in expression


def test_each_split_has_the_columns_and_images(options: list[Any], tars: Path, tmp_path: Path, run: Run) -> None:
    """A test whose images all lack a column, or are all excluded, would vanish from the set."""
    for split, number in (("train", 0), ("test", 2)):
        (tars / split).mkdir()
        (tars / f"0000{number}.tar").rename(tars / split / "0.tar")
    (tars / "00001.tar").unlink()
    options += ["--max_skipped", 0.5]
    refused = run("shards", *options, "--source.where", "width < 40", "--out", tmp_path / "out")
    assert_one_sentence(refused, "'width < 40' leaves no image of test that can be used (20 filtered); change it.")
    assert not (tmp_path / "out/shards.json").exists()
    png = next(tars.parent.rglob("0.tar")).read_bytes()[512:1024]
    (tars / "test/0.tar").write_bytes(tar_bytes([("040.png", png), ("040.json", b'{"height": 3}')]))
    refused = run("shards", *options, "--source.where", "width < 50", "--out", tmp_path / "other")
    assert_one_sentence(refused, "no image in", "test/0.tar has 'width'; its images have the fields height.")


def test_the_image_of_the_compared_record_is_named(options: list[Any], tars: Path, tmp_path: Path, run: Run) -> None:
    """No image has both columns, and the last .json is damaged: the last record that was read is compared."""
    records = [b'{"height": 5}', b'{"width": "a"}', b"{"]
    members = [
        (f"{n}.{kind}", data) for n, text in enumerate(records) for kind, data in (("png", b"x"), ("json", text))
    ]
    (tars / "00000.tar").write_bytes(tar_bytes(members))
    result = run("shards", *options, "--source.where", "width > 3 or height > 9", "--out", tmp_path / "out")
    assert_one_sentence(result, "but for 1.png in", "it compares width (a string) with 3 (a number)")


def test_other_sources_have_no_columns(folder: Path, tmp_path: Path, run: Run) -> None:
    options = ["--source.kind", "image_folder", "--source.path", folder, "--source.where", "width > 3"]
    result = run("shards", *options, "--out", tmp_path / "out")
    assert_one_sentence(
        result, "source.where belongs to source.kind webdataset or hf_dataset, not image_folder; remove"
    )


@pytest.fixture
def parquet(tmp_path: Path, small: Small, monkeypatch: pytest.MonkeyPatch) -> Path:
    """40 training and 20 test images with their class, a width that is their number, and a score that each fifth
    lacks."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    (tmp_path / "data").mkdir()
    for split, part in (("train", range(40)), ("test", range(40, 60))):
        table = datasets.Dataset.from_dict(
            {
                "img": [{"bytes": encode_image(small[0][index]), "path": None} for index in part],
                "label": small[1][list(part)].tolist(),
                "width": list(part),
                "score": [None if index % 5 == 0 else index / 10 for index in part],
            },
            features=datasets.Features(
                {
                    "img": datasets.Image(),
                    "label": datasets.ClassLabel(names=["astronaut", "cat", "coffee"]),
                    "width": datasets.Value("int32"),
                    "score": datasets.Value("float32"),
                }
            ),
        )
        table.to_parquet(tmp_path / f"data/{split}.parquet")
    return tmp_path / "data"


def test_tables_keep_what_fits(parquet: Path, small: Small) -> None:
    def opened(**options: Any) -> Any:
        return open_source(SourceConfig(kind="hf_dataset", path=str(parquet), **options))

    table = opened(where="score > 1 and width != 33")
    kept = [index for index in range(60) if index % 5 and index > 10 and index != 33]
    assert table.splits["train"].labels.tolist() == small[1][[index for index in kept if index < 40]].tolist()
    assert table.filtered["train"] == {"filtered": 9, "no value": 8}
    assert table.filtered["test"] == {"no value": 4}
    stream = opened(where="score > 1 and width != 33", streaming=True)
    items = list(stream.streams["train"][0])
    assert [item.label for item in items if hasattr(item, "label")] == table.splits["train"].labels.tolist()
    refused = [item.reason for item in items if hasattr(item, "reason")]
    assert (refused.count("filtered"), refused.count("no value")) == (9, 8)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("wdth > 3", r"has no column 'wdth' in train; it has img \(Image\), label \(ClassLabel\), width \(int32\)"),
        ("img == 3", r"the column 'img' of .* has the type Image; it must have numbers, strings or booleans"),
        ("width == '3'", r"it compares width \(a number\) with '3' \(a string\)"),
    ],
)
def test_expressions_that_do_not_fit_the_table(parquet: Path, expression: str, message: str, streaming: bool) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(SourceConfig(kind="hf_dataset", path=str(parquet), where=expression, streaming=streaming))


@pytest.mark.parametrize("named", [True, False])
def test_classes_do_not_depend_on_streaming(parquet: Path, small: Small, named: bool) -> None:
    """Also if source.where drops a class."""
    if not named:
        table = datasets.Dataset.from_parquet(str(parquet / "train.parquet"), cache_dir=str(parquet.parent))
        values = [["a", "b", "c"][number] for number in table["label"]]
        table.remove_columns("label").add_column("label", values).to_parquet(parquet / "train.parquet")
        (parquet / "test.parquet").unlink()
    kept = [index for index in range(40) if small[1][index] != 0]
    where = f"width in {[*kept, 41, 42]}"
    options: dict[str, Any] = {"kind": "hf_dataset", "path": str(parquet), "where": where, "label_column": "label"}
    table, stream = (open_source(SourceConfig(**options, streaming=streaming)) for streaming in (False, True))
    labels = [item.label for item in stream.streams["train"][0] if hasattr(item, "label")]
    assert table.splits["train"].labels.tolist() == labels == small[1][kept].tolist()
    assert table.classes == stream.classes
    assert len(table.splits["train"]) == len(kept) and table.splits["train"].name(0).endswith("train[0]")


def test_a_table_of_which_nothing_is_kept(parquet: Path) -> None:
    with pytest.raises(ValueError, match=r"keeps none of the 20 images in test .*\(20 filtered\); change it"):
        open_source(SourceConfig(kind="hf_dataset", path=str(parquet), where="width < 40"))
