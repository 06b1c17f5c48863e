"""Class names: ImageNet's, a folder's, a file's; unknown and ambiguous ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ditfast.sampling.labels import ClassNames, choose, class_names


@pytest.fixture(scope="module")
def imagenet() -> ClassNames:
    names = class_names(1000, Path("DiT-XL-2-256x256.pt"))
    assert names is not None and len(names) == 1000
    return names


@pytest.mark.parametrize(
    ("label", "name"),
    [
        (207, "golden retriever"),
        (360, "otter"),
        (387, "lesser panda"),
        (387, "red panda"),
        (974, "geyser"),
        (88, "macaw"),
        (979, "valley"),
        (979, "vale"),
        (417, "balloon"),
        (279, "Arctic fox"),
        (279, "arctic_fox"),
        (279, " ARCTIC  fox "),
        (279, "Alopex lagopus"),
        (0, "tench"),
        (999, "toilet tissue"),
    ],
)
def test_imagenet(imagenet: ClassNames, label: int, name: str) -> None:
    assert imagenet.label(name) == label


def test_the_first_name_is_the_name(imagenet: ClassNames) -> None:
    assert imagenet.name(387) == "lesser panda"
    assert all(imagenet.name(label) for label in range(1000))


@pytest.mark.parametrize(("name", "labels"), [("crane", (134, 517)), ("maillot", (638, 639))])
def test_an_ambiguous_name_lists_the_labels(imagenet: ClassNames, name: str, labels: tuple[int, int]) -> None:
    listed = f"{labels[0]} .* and {labels[1]} .*--classes"
    with pytest.raises(ValueError, match=f"'{name}' is ambiguous in ImageNet: {listed}"):
        imagenet.label(name)


def test_whole_lines_are_labels_but_for_those_that_name_another_class_too(imagenet: ClassNames) -> None:
    assert imagenet.label("maillot, tank suit") == 639
    ambiguous = []
    for label, line in enumerate(imagenet.lines):
        try:
            assert imagenet.label(line) == label
        except ValueError:
            ambiguous.append((label, line))
    assert ambiguous == [
        (86, "partridge"), (134, "crane"), (474, "cardigan"), (517, "crane"), (594, "harp"), (638, "maillot"),
        (657, "missile"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("goldn retriever", "golden retriever (207)"), ("geyzer", "geyser (974)"), ("retriever", "(207)")],
)
def test_an_unknown_name_gets_the_nearest(imagenet: ClassNames, name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"unknown class name '{name}' in ImageNet; the nearest: ") as raised:
        imagenet.label(name)
    assert nearest in str(raised.value)


def test_without_a_near_name_there_is_no_hint(imagenet: ClassNames) -> None:
    with pytest.raises(ValueError, match="unknown class name 'xqzw' in ImageNet$"):
        imagenet.label("xqzw")


def test_labels_and_names_in_their_order(imagenet: ClassNames) -> None:
    assert choose("207, 360,0", None, 1000, imagenet) == [207, 360, 0]
    assert choose(None, ["golden retriever"], 1000, imagenet) == [207]
    assert choose(None, ["otter, geyser", "macaw"], 1000, imagenet) == [360, 974, 88]
    assert choose("1", ["otter"], 1000, imagenet) == [1, 360]
    assert choose(None, None, 1000, imagenet) is None


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("1000", "--classes must be in 0..999 for this checkpoint, got 1000"),
        ("-1", "--classes must be labels between commas, such as 207,360, got '-1'"),
        ("1,,2", "--classes must be labels between commas, such as 207,360, got ''"),
        ("otter", "--classes must be labels between commas, such as 207,360, got 'otter'"),
    ],
)
def test_bad_labels(imagenet: ClassNames, labels: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        choose(labels, None, 1000, imagenet)
    assert str(raised.value) == message


def test_a_class_file(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("cat, house cat\ndog\n\u00e9p\u00e9e\n\n", encoding="utf-8")
    names = class_names(3, tmp_path / "model.pt", path)
    assert names is not None
    assert [names.label(name) for name in ("House Cat", "cat, house cat", "dog", "\u00c9P\u00c9E")] == [0, 0, 1, 2]
    assert choose(None, ["cat, house cat"], 3, names) == [0]
    with pytest.raises(ValueError, match="--class-file must have 4 lines, one name a class, got 3"):
        class_names(4, tmp_path / "model.pt", path)
    with pytest.raises(ValueError, match="--class-file must be a text file, got .*absent.txt"):
        class_names(3, tmp_path / "model.pt", tmp_path / "absent.txt")


def test_a_pipelines_names_win_over_imagenets(tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    (pipeline / "transformer").mkdir(parents=True)
    index = pipeline / "model_index.json"
    index.write_text(json.dumps({"id2label": {str(label): f"thing {label}, object {label}" for label in range(1000)}}))
    for path in (pipeline, pipeline / "transformer"):
        names = class_names(1000, path)
        assert names is not None
        assert names.label("object 17") == 17 and names.name(17) == "thing 17"
    index.write_text(json.dumps({"_class_name": "DiTPipeline"}))
    labels = class_names(1000, pipeline)
    assert labels is not None and labels.source == "ImageNet"
    index.write_text(json.dumps({"id2label": ["cat"]}))
    with pytest.raises(ValueError, match="model_index.json: its id2label cannot be read"):
        class_names(1000, pipeline)


def test_other_class_counts_have_no_names() -> None:
    assert class_names(10, Path("model.pt")) is None
    with pytest.raises(ValueError, match="--class-names needs the names of the 10 classes: give --class-file"):
        choose(None, ["cat"], 10, None)
