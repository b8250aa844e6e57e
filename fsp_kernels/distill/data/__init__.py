"""The images: which ones each network sees, and the batches they come in."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from fsp_kernels.distill.config import Data
from fsp_kernels.distill.data.batches import (
    Batch,
    EvaluationBatches,
    Split,
    Splits,
    check_batch_size,
    training_batches,
)
from fsp_kernels.distill.data.images import Say
from fsp_kernels.distill.data.sources import SOURCES, Collection, Labelled, draw, own
from fsp_kernels.errors import DistillError

__all__ = [
    "Batch",
    "EvaluationBatches",
    "Split",
    "Splits",
    "check_batch_size",
    "load_splits",
    "own",
    "training_batches",
]


def load_splits(
    data: Data,
    where: str = "data",
    like: Splits | None = None,
    say: Say = lambda _: None,
) -> Splits:
    """The images to train on, to validate with (``None`` if there are none) and to test with.

    All processes of a group must call this, and all get the same. Draws are stratified and always
    the same. Bundled images are standardised by the mean and deviation of the student's, others by
    published ones.

    Args:
        data: the recipe's section.
        where: its dotted key, for messages.
        like: the images must have the shape of these splits, which networks are trained on later.
        say: gets a message about what takes long, and about images that are left out.

    Raises:
        DistillError: the images are missing, too few, cannot be read, or have another shape.
    """
    collection = SOURCES.get(data.dataset, own)(data, where, say)
    shape = collection.image_shape
    if like is not None and shape != like.image_shape:
        raise DistillError(
            f"{where}: {data.dataset} has images of the shape {shape} (channels, height, width), "
            f"must be {like.image_shape}, as those that the networks are trained on afterwards; "
            f"{where}.image_size sets height and width"
        )
    pool, validation = _hold_out(collection, data, where)
    teacher = _draw_up_to(data.teacher_images, pool, f"{where}.teacher_images")
    train = _draw_up_to(data.train_images, teacher, f"{where}.train_images")
    moments = collection.moments
    if moments is None:
        assert isinstance(train.source, Tensor)
        pixels = train.source[train.numbers].numpy()
        moments = (float(pixels.mean()),), (float(pixels.std()),)
    split = partial(Split, collection=collection, moments=moments)
    return Splits(
        train=split(train, augments=data.augment),
        teacher_train=split(teacher, augments=data.augment),
        validation=split(validation) if len(validation.labels) else None,
        test=split(collection.test),
    )


def _hold_out(collection: Collection, data: Data, where: str) -> tuple[Labelled, Labelled]:
    """The images to train on and to validate with."""
    pool, own_set, count = collection.pool, collection.validation, data.validation_images
    if own_set is not None:
        if count is not None:
            raise DistillError(
                f"{where}.validation_images: is {count}, must be left out: {data.dataset} has "
                f"{len(own_set.labels)} of its own"
            )
        return pool, own_set
    if count is None:
        count = collection.validation_images
    size = len(pool.labels)
    _require_at_most(count, max(0, size - collection.classes), f"{where}.validation_images")
    return draw(pool, size - count)


def _draw_up_to(count: int | None, labelled: Labelled, key: str) -> Labelled:
    if count is None:
        return labelled
    _require_at_most(count, len(labelled.labels), key)
    return draw(labelled, count)[0]


def _require_at_most(count: int, limit: int, key: str) -> None:
    if count > limit:
        raise DistillError(f"{key}: is {count}, must be at most {limit}")
