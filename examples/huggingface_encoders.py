"""FSP distillation of padded sequences: a BERT of four layers into one of two, on real text.

The task is to tell the category of a Unicode character, such as upper-case letter or digit, from
its name, such as LATIN SMALL LETTER A WITH GRAVE. Names differ in length, so batches are padded.
The attention mask keeps the padded positions out of the FSP loss. Stage 1 trains the student on the
FSP loss alone, without labels. Stage 2 trains the student on the task. It takes half a minute on a
CPU. The names come with Python, and nothing is downloaded.
"""

import argparse
import random
import sys
import unicodedata
from collections.abc import Iterator, Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    set_seed,
)

from fsp_kernels import fsp_loss, pairs_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Upper-case, lower-case and other letters; accents and other marks; digits and other numbers;
# mathematical and other symbols.
CATEGORIES = ["Lu", "Ll", "Lo", "Mn", "Nd", "No", "Sm", "So"]
EACH = 600  # names of each category

Batch = dict[str, Tensor]  # input_ids and attention_mask (B, T), labels (B,)


def named_characters() -> list[tuple[str, int]]:
    """Names of characters, each with the number of its category, in random order."""
    names: dict[str, list[str]] = {category: [] for category in CATEGORIES}
    for character in map(chr, range(sys.maxunicode + 1)):
        name, category = unicodedata.name(character, ""), unicodedata.category(character)
        # The ideographs' names are numbers, the Hangul syllables' names are their sounds.
        if name and category in names and not name.startswith(("CJK", "HANGUL")):
            names[category].append(name)
    chosen = [
        (name, CATEGORIES.index(category))
        for category, all_names in names.items()
        for name in random.sample(all_names, EACH)
    ]
    return random.sample(chosen, len(chosen))


def tokenizer_of(names: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of words, trained on some names."""
    special = ["[PAD]", "[CLS]", "[UNK]"]
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(names, trainers.WordLevelTrainer(special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A", special_tokens=[("[CLS]", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")


def encoder(layers: int, words: int) -> BertForSequenceClassification:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    config = BertConfig(
        vocab_size=words, num_hidden_layers=layers, num_labels=len(CATEGORIES), **sizes
    )
    return BertForSequenceClassification(config).to(DEVICE)


class Names:
    """Named characters in batches, each padded to the batch's longest name."""

    def __init__(self, characters: Sequence[tuple[str, int]], tokenizer: PreTrainedTokenizerFast):
        self.characters, self.tokenizer = characters, tokenizer

    def batch(self, size: int) -> Batch:
        """Some characters, chosen at random."""
        names, labels = zip(*random.sample(self.characters, size), strict=True)
        tokens = self.tokenizer(
            names, padding=True, return_tensors="pt", return_token_type_ids=False
        )
        return {**tokens.to(DEVICE), "labels": torch.tensor(labels, device=DEVICE)}

    def batches(self, steps: int) -> Iterator[Batch]:
        return (self.batch(64) for _ in range(steps))


def fsp_of(student: nn.Module, teacher: nn.Module, batch: Batch) -> Tensor:
    """The FSP loss of the hidden states, whose channels are last, over the words of each name."""
    tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ours = student(**tokens, output_hidden_states=True).hidden_states  # three maps (B, T, 64)
    with torch.no_grad():
        theirs = teacher(**tokens, output_hidden_states=True).hidden_states[::2]
    mask = batch["attention_mask"].bool()
    return fsp_loss(
        pairs_of(ours), pairs_of(theirs), student_mask=mask, teacher_mask=mask, channel_dim=-1
    )


def distil(student: nn.Module, teacher: nn.Module, names: Names, steps: int) -> list[float]:
    """Stage 1: train on the FSP loss alone. Returns the loss of each step."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    student.train()
    teacher.eval()
    for batch in names.batches(steps):
        optimizer.zero_grad()
        loss = fsp_of(student, teacher, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(network: nn.Module, names: Names, steps: int) -> None:
    """Train on the task, by cross-entropy: the teacher, and the student in stage 2."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    network.train()
    for batch in names.batches(steps):
        optimizer.zero_grad()
        network(**batch).loss.backward()
        optimizer.step()


@torch.inference_mode()
def accuracy(network: nn.Module, names: Names) -> float:
    batch = names.batch(len(names.characters))
    return (network.eval()(**batch).logits.argmax(1) == batch["labels"]).float().mean().item()


def main(steps: int) -> None:
    set_seed(0)
    characters = named_characters()
    tokenizer = tokenizer_of([name for name, _ in characters[1000:]])
    test, training = Names(characters[:1000], tokenizer), Names(characters[1000:], tokenizer)
    teacher, student = (encoder(layers, len(tokenizer)) for layers in (4, 2))
    train(teacher, training, steps)
    before = accuracy(student, test)
    losses = distil(student, teacher, training, steps)
    train(student, training, steps)
    print(f"FSP loss: {losses[0]:.4g} -> {losses[-1]:.4g}")
    print(f"accuracy of the teacher: {accuracy(teacher, test):.3f}")
    print(f"accuracy of the student: {before:.3f} -> {accuracy(student, test):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=100, help="steps of each training (%(default)s)"
    )
    main(parser.parse_args().steps)
