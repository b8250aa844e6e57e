"""Which images each network sees."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from fsp_kernels.distill.config import Data
from fsp_kernels.distill.data.bundled import bundled
from fsp_kernels.distill.data.collection import Collection, Labelled, Scale, Transform
from fsp_kernels.distill.data.draws import draw
from fsp_kernels.distill.data.folders import cifar, image_folder
from fsp_kernels.distill.data.own import own
from fsp_kernels.distill.data.split import Split, Splits
from fsp_kernels.distill.data.survey import Say
from fsp_kernels.distill.errors import DistillError

_COLLECTIONS: dict[str, Callable[[Data, str, Say], Collection]] = {
    "digits": bundled,
    "mnist5k": bundled,
    "cifar10": cifar,
    "cifar100": cifar,
    "imagefolder": image_folder,
}


def load_splits(
    data: Data,
    where: str = "data",
    like: Splits | None = None,
    say: Say = lambda _: None,
) -> Splits:
    """The images to train on, to validate with (none: ``None``) and to test with.

    Of a group of processes all must call this, and all get the same.
    Draws are stratified and always the same. Bundled images are standardised by the mean and
    deviation of the student's, others by their set's published ones.

    Args:
        data: the recipe's section.
        where: its dotted key, for messages.
        like: splits whose networks are trained on these first: the images must be of one shape.
        say: is told what takes long, and of images that are left out.

    Raises:
        DistillError: the images are not there, are fewer than asked for, not to be read, or unlike
            ``like``'s.
    """
    collection = _COLLECTIONS.get(data.dataset, own)(data, where, say)
    if like is not None:
        _require_same_shape(collection.image_shape, like.image_shape, data, where)
    pool, validation = _hold_out(collection, data, where)
    teacher = _draw_up_to(pool, "teacher_images", collection, data, where)
    train = _draw_up_to(teacher, "train_images", collection, data, where)
    scale = _scale(collection, train)

    def take(
        source: Labelled, positions: np.ndarray, augmentation: Transform | None = None
    ) -> Split:
        return Split(
            source,
            positions,
            scale,
            collection.image_shape,
            collection.classes,
            evaluation=collection.evaluation,
            augmentation=augmentation,
        )

    augmentation = collection.augmentation if data.augment else None
    held_out = collection.pool if collection.validation is None else collection.validation
    return Splits(
        train=take(collection.pool, train, augmentation),
        teacher_train=take(collection.pool, teacher, augmentation),
        validation=take(held_out, validation) if len(validation) else None,
        test=take(collection.test, np.arange(len(collection.test.labels))),
    )


def _hold_out(collection: Collection, data: Data, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training pool, and of the validation images in it or in their own set."""
    labels = collection.pool.labels
    count = data.validation_images
    if collection.validation is not None:
        if count is not None:
            raise DistillError(
                f"{where}.validation_images: is {count}, must be left out: {data.dataset} has "
                f"{len(collection.validation.labels)} of its own"
            )
        return np.arange(len(labels)), np.arange(len(collection.validation.labels))
    if count is None:
        count = collection.validation_images
    most = max(0, len(labels) - collection.classes)
    _require_at_most(count, most, f"{where}.validation_images")
    return draw(np.arange(len(labels)), len(labels) - count, labels)


def _draw_up_to(
    indices: np.ndarray, key: str, collection: Collection, data: Data, where: str
) -> np.ndarray:
    """As many of ``indices`` as the recipe has under ``key``, or all."""
    count = getattr(data, key)
    if count is None:
        return indices
    _require_at_most(count, len(indices), f"{where}.{key}")
    return draw(indices, count, collection.pool.labels)[0]


def _scale(collection: Collection, train: np.ndarray) -> Scale:
    if collection.moments is not None:
        return Scale(*collection.moments, collection.pixel_range)
    assert isinstance(collection.pool.images, Tensor)
    pixels = collection.pool.images[train].numpy()
    return Scale((float(pixels.mean()),), (float(pixels.std()),), collection.pixel_range)


def _require_at_most(count: int, limit: int, key: str) -> None:
    if count > limit:
        raise DistillError(f"{key}: is {count}, must be at most {limit}")


def _require_same_shape(
    shape: tuple[int, int, int], wanted: tuple[int, int, int], data: Data, where: str
) -> None:
    because = "as the images that the networks are trained on afterwards"
    if shape[0] != wanted[0]:
        raise DistillError(
            f"{where}.dataset: is {data.dataset!r}, of {shape[0]} channels, must be one of "
            f"{wanted[0]}, {because}"
        )
    if shape != wanted:
        raise DistillError(f"{where}.image_size: is {shape[1]}, must be {wanted[1]}, {because}")
