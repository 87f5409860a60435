"""Read images from folders, a folder for each class, and make batches of them for a model. Needs Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageRow:
    """One example: the file, and its label (the name of its folder) or None."""

    path: Path
    label: str | None = None


def read_images(folder: str | Path, most: int | None = None) -> list[ImageRow]:
    """Images below a folder: `folder/CLASS/....png`, or without classes where they lie in the folder itself.

    Args:
        most: no more than that, the classes in turn.

    Raises:
        ImportError: Pillow is not installed. FileNotFoundError: no such folder.
        ValueError: no image, or one that does not open; the message names it.
    """
    check_pillow()
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    classes = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    by_class = {p.name: _images_in(p) for p in classes}
    by_class = {name: files for name, files in by_class.items() if files}
    if not by_class:
        rows = [ImageRow(path) for path in _images_in(root)]
    else:
        longest = max(map(len, by_class.values()))
        rows = [ImageRow(files[i], name) for i in range(longest) for name, files in by_class.items() if i < len(files)]
    if not rows:
        raise ValueError(
            f"{folder} holds no images ({', '.join(ENDINGS)}), neither in it nor in a folder for each class"
        )
    rows = rows[:most]
    check_images(rows)
    return rows


def check_pillow() -> None:
    """Raises ImportError, which says how to install it, if Pillow is missing."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError("images need Pillow: pip install hf-cuttlefish[images]") from error


def check_images(rows: Sequence[ImageRow]) -> None:
    """Raises ValueError for images that do not open, with the first of them; only the headers are read."""
    from PIL import Image

    broken = []
    for row in rows:
        try:
            with Image.open(row.path) as image:
                image.verify()
        except Exception as error:  # of whatever format it is
            broken.append(f"{row.path} ({error!s:.80})")
    if broken:
        raise ValueError(f"{len(broken)} of {len(rows)} images do not open: {broken[0]}; mend or remove them")


def open_picture(path: Path) -> Any:
    """A PIL image in RGB."""
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def image_processor(name: str, model: Any) -> Any:
    """The image processor of a model.

    Raises ValueError where the folder or hub name holds none.
    """
    import transformers

    try:
        return transformers.AutoImageProcessor.from_pretrained(name, backend="pil")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} has no image processor (preprocessor_config.json), so images cannot be prepared for {type(model).__name__}: "
            "save the one that the model was trained with beside it"
        ) from error


def image_batches(model: Any, processor: Any, rows: Sequence[ImageRow], batch_size: int) -> list[dict[str, Any]]:
    """Batches of pixel values, with labels where all rows have one that the model knows.

    Raises ValueError for a label that the model does not know.
    """
    known = {str(k): int(v) for k, v in (model.config.label2id or {}).items()}
    labelled = all(row.label is not None for row in rows) and "ImageClassification" in type(model).__name__
    unknown = sorted({row.label for row in rows if row.label is not None} - set(known)) if labelled else []
    if unknown:
        raise ValueError(
            f"the folder {unknown[0]!r} is no class that the model knows: {', '.join(sorted(known)[:12])}; name the folders so"
        )
    batches = []
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        batch = dict(processor([open_picture(row.path) for row in chunk], return_tensors="pt"))
        if labelled:
            batch["labels"] = torch.tensor([known[str(row.label)] for row in chunk])
        batches.append(batch)
    return batches


def _images_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
