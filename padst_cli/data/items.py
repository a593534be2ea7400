"""Items: token windows and preprocessed images, and which of them an optimizer step sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from padst_cli.data.corpus import ImageCorpus, TextCorpus
from padst_cli.errors import PadstError

_DOCUMENTS_PER_CALL = 256


def separator_id(tokenizer: Any) -> int | None:
    """The token that stands between documents, None where the tokenizer has none.

    The begin id where the tokenizer puts one before every text (Llama: its models saw each text begin so), else the
    end-of-text id, else the begin id.
    """
    begin = tokenizer.bos_token_id
    if begin is not None and token_frame(tokenizer)[0][:1] == [begin]:
        return begin
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id


def token_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that this tokenizer puts before and after one text: Llama's begin token, BERT's [CLS] and
    [SEP].

    A model that was pretrained with them does worse on windows that start without.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return list(framed[:start]), list(framed[start + len(plain) :])
    return [], []


def vocabulary_size(model: Any) -> int | None:
    """How many token ids a model (or what else has its `config`) takes, None where the configuration does not say."""
    return getattr(model.config.get_text_config(), "vocab_size", None)


def check_vocabulary(highest: int, vocabulary: int | None, where: str) -> None:
    """Raise `PadstError` where the `highest` token id is none of a model's `vocabulary` (None: not known)."""
    if vocabulary is not None and highest >= vocabulary:
        raise PadstError(
            f"the tokenizer gives {where} the token {highest}, and the model's vocabulary ends at "
            f"{vocabulary - 1}; tokenizer and model do not belong together"
        )


def token_stream(corpus: TextCorpus, tokenizer: Any, vocabulary: int | None = None) -> Tensor:
    """All documents of a corpus as one int64 tensor `[tokens]`, with the separator (where there is one) between
    documents.

    Documents are tokenised without the special tokens that frame a single text, so joining adds nothing but the
    separator. Raises `PadstError` where the tokenizer finds no token, or one (the frame's too) outside the model's
    `vocabulary`.
    """
    separator = separator_id(tokenizer)
    pieces: list[Tensor] = []
    for start in range(0, len(corpus.documents), _DOCUMENTS_PER_CALL):
        batch = list(corpus.documents[start : start + _DOCUMENTS_PER_CALL])
        # verbose=False: a document longer than the model's context is expected here, because windows are cut from it.
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for ids in encoded["input_ids"]:
            if pieces and separator is not None:
                pieces.append(torch.tensor([separator], dtype=torch.int64))
            pieces.append(torch.tensor(ids, dtype=torch.int64))
    stream = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)
    if not stream.numel():
        raise PadstError(f"the tokenizer finds no token in '{corpus.name}'; give more text")
    before, after = token_frame(tokenizer)
    check_vocabulary(max([int(stream.max()), *before, *after]), vocabulary, f"'{corpus.name}'")
    return stream


class Items(Protocol):
    """A data set: a length and items by number, each a dict of tensors."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...


class TokenWindows(Dataset[dict[str, Tensor]]):
    """Back-to-back windows of `length` tokens cut from a stream `[tokens]`; what is left over at the end is not used.

    Each window begins with `prefix` and ends with `suffix`, which count towards its length. Item `i` is
    `{"input_ids": int64 [length]}`. Raises `PadstError` where the stream is shorter than one window.
    """

    def __init__(
        self,
        stream: Tensor,
        length: int,
        name: str = "the text",
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
    ) -> None:
        self.stride = length - len(prefix) - len(suffix)
        if length < 2 or self.stride < 1:
            raise PadstError(f"a window of {length} tokens leaves nothing to predict; use a longer sequence")
        if stream.numel() < self.stride:
            raise PadstError(
                f"{name} is too short: {stream.numel()} tokens, and one window takes {self.stride}; "
                "give more text or a shorter sequence length"
            )
        self.stream = stream
        self.length = length
        self._prefix = torch.tensor(list(prefix), dtype=torch.int64)
        self._suffix = torch.tensor(list(suffix), dtype=torch.int64)

    @classmethod
    def from_corpus(
        cls, corpus: TextCorpus, tokenizer: Any, length: int, vocabulary: int | None = None
    ) -> TokenWindows:
        """Tokenise a corpus and cut it into windows of `length`, each framed as the tokenizer frames a text; the
        model's `vocabulary` bounds its tokens.
        """
        prefix, suffix = token_frame(tokenizer)
        return cls(token_stream(corpus, tokenizer, vocabulary), length, f"'{corpus.name}'", prefix, suffix)

    def __len__(self) -> int:
        return self.stream.numel() // self.stride

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        window = self.stream[index * self.stride : (index + 1) * self.stride]
        return {"input_ids": torch.cat([self._prefix, window, self._suffix])}


class ImageItems(Dataset[dict[str, Any]]):
    """Images as the model's image processor wants them, each read when it is asked for.

    Item `i` is `{"pixel_values": float32 [3, height, width]}` with `"labels": int` where the corpus has labels.
    Raises `PadstError` on access for a file that is no readable image.
    """

    def __init__(self, corpus: ImageCorpus, image_processor: Any) -> None:
        self.corpus = corpus
        self.image_processor = image_processor

    def __len__(self) -> int:
        return len(self.corpus.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = open_image(self.corpus, index)
        pixels = self.image_processor(images=image, return_tensors="pt")["pixel_values"][0]
        item: dict[str, Any] = {"pixel_values": pixels.to(torch.float32)}
        if self.corpus.labels is not None:
            item["labels"] = self.corpus.labels[index]
        return item


def open_image(corpus: ImageCorpus, index: int) -> Image.Image:
    """Image `index` of a corpus in RGB; raises `PadstError` that names the file where it cannot be read."""
    file = corpus.files[index]
    try:
        if isinstance(file, Path):
            with Image.open(file) as image:
                return image.convert("RGB")
        return file.load().convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        # Pillow raises SyntaxError for some broken PNG files.
        raise PadstError(
            f"'{file}' of '{corpus.name}' is not a readable image ({error}); replace or remove it"
        ) from None


def step_indices(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The `batch_size` items, out of `count`, that the whole world sees in optimizer step `step` (from 0).

    A pure function of its arguments: a resumed run and every process compute the same batch. Steps walk through epochs,
    each a permutation of all items seeded by (seed, epoch). A batch that reaches the end of an epoch goes on in the
    next, whose first items are chosen such that none comes twice in that batch (unless there are fewer items than the
    batch holds).
    """
    if count < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"need items, a batch and a step, not count={count}, batch_size={batch_size}, step={step}")
    indices: list[int] = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, count)
        indices.append(_epoch_order(count, batch_size, seed, epoch)[offset])
    return indices


@lru_cache(maxsize=4)
def _epoch_order(count: int, batch_size: int, seed: int, epoch: int) -> tuple[int, ...]:
    if count < batch_size:
        return tuple(_shuffled(count, seed, epoch))
    # An epoch's head depends on the tail of the one before. Moving items about in a head reaches no further than one
    # batch, so with two batches or more the tail is as shuffled; with fewer, go back to an epoch that began together
    # with a batch.
    first = max(epoch - 1, 0)
    while count < 2 * batch_size and (first * count) % batch_size:
        first -= 1
    order = _shuffled(count, seed, first)
    for current in range(first + 1, epoch + 1):
        carried = (current * count) % batch_size
        tail = set(order[count - carried :])
        order = _repeats_moved_back(_shuffled(count, seed, current), tail, batch_size - carried)
    return tuple(order)


def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    # Odd multipliers keep (seed, epoch) pairs apart; a CPU generator gives the same permutation on every machine.
    mixed = (seed * 0x9E3779B97F4A7C15 + epoch * 0xC2B2AE3D27D4EB4F) % 2**63
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed)).tolist()


def _repeats_moved_back(order: list[int], tail: set[int], head: int) -> list[int]:
    """Exchange the items of `tail` among the first `head` with the next ones that are not of it."""
    later = (position for position in range(head, len(order)) if order[position] not in tail)
    for position in [position for position in range(head) if order[position] in tail]:
        other = next(later)
        order[position], order[other] = order[other], order[position]
    return order


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stack items key by key into tensors `[batch, ...]`; integer labels become int64 `[batch]`."""
    return {key: torch.stack([torch.as_tensor(item[key]) for item in items]) for key in items[0]}
