"""A Hugging Face data set for the trainer: scikit-learn's digits as a ``datasets.Dataset``.

To distill a ResNet-14 into a ResNet-8, run in the folder of this file

    fsp-distill train huggingface_dataset.yaml

where huggingface_dataset.yaml is

    data: {dataset: "huggingface_dataset:splits", batch_size: 32, augment: false}
    teacher: {model: cifar/resnet14}
    teacher_training: {steps: 100, learning_rate: 0.05}
    student: {model: cifar/resnet8}
    stage1: {steps: 50, learning_rate: 1.0e-4}
    stage2: {steps: 100, learning_rate: 0.05}
    execution: {threads: 1}
    evaluation: {every: 50}

To use a data set of the Hub instead, return ``datasets.load_dataset(NAME, split=...)`` and rename
its columns to ``image`` and ``label``.
"""

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL.Image import fromarray
from sklearn.datasets import load_digits


def splits(test_images: int = 360, seed: int = 0) -> tuple[Dataset, None, Dataset]:
    """The training, validation and test sets.

    The validation set is ``None``: the trainer takes ``data.validation_images`` from the training
    set. Set the arguments in the recipe, e.g. ``data.arguments={test_images: 500}``.
    """
    digits = load_digits()
    pixels = (digits.images * 255 / 16).round().astype(np.uint8)  # (1797, 8, 8)
    features = Features({"image": Image(), "label": ClassLabel(names=[*"0123456789"])})
    columns = {"image": [*map(fromarray, pixels)], "label": digits.target}
    parts = Dataset.from_dict(columns, features).train_test_split(
        test_images, stratify_by_column="label", seed=seed
    )
    return parts["train"], None, parts["test"]
