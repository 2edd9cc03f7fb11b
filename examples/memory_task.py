"""The task of ``working_memory.py``: histories drawn from real text and code, questions about them, and the answers."""

from __future__ import annotations

import hashlib
import re
import zlib
from dataclasses import dataclass

import shipped
import torch
from torch import Tensor

MODULES = ("argparse", "ast", "difflib", "doctest", "inspect", "subprocess", "tarfile", "turtle")
KEYS, VALUES, HASH_BITS = 32, 8, 64
WORDS = 4096
"""Buckets into which words are hashed; 0 is no word."""
SENTENCE, SNIPPET, WRITES = 16, 44, 4
"""Tokens of an episode: words of a sentence, of a snippet, writes."""
EPISODE = SENTENCE + SNIPPET + WRITES
TOKEN = r"\w+|[^\w\s]"
"""A word or a sign."""
KINDS = ("value", "occurred", "module")
CHANCE = {"value": 1 / VALUES, "occurred": 1 / 2, "module": 1 / len(MODULES)}
ANSWERS = VALUES + 2 + len(MODULES)
"""Classes of the head: values, no, yes, modules."""


def word_ids(text: str, count: int) -> list[int]:
    """The first words and signs of a text, hashed into 1..WORDS-1, filled up with 0."""
    ids = [1 + zlib.crc32(word.encode()) % (WORDS - 1) for word in re.findall(TOKEN, text)[:count]]
    return ids + [0] * (count - len(ids))


def hash_bits(text: str) -> tuple[float, ...]:
    """Bits of a hash as -1 and 1."""
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=HASH_BITS // 8).digest(), "little")
    return tuple(2.0 * (number >> bit & 1) - 1 for bit in range(HASH_BITS))


def sentences_of(topics: dict[str, str]) -> dict[tuple[float, ...], str]:
    """Sentences by their hashes."""
    return {hash_bits(sentence): sentence for sentence in shipped.sentences("".join(topics.values()))}


def parts_of(lines: list[str]) -> tuple[list[list[int]], list[list[int]]]:
    """The snippets of the first four fifths of a module's lines, and of the rest."""
    border = len(lines) * 4 // 5
    parts = []
    for part in (lines[:border], lines[border:]):
        words = re.findall(TOKEN, "\n".join(part))
        starts = range(0, len(words) - SNIPPET + 1, SNIPPET)
        parts.append([word_ids(" ".join(words[start : start + SNIPPET]), SNIPPET) for start in starts])
    return parts[0], parts[1]


@dataclass(frozen=True)
class Records:
    """Text and code from which histories are drawn.

    Args:
        sentences, hashes: int64 [S, SENTENCE] and float [S, HASH_BITS].
        snippets, modules: int64 [P, SNIPPET] and, of which module they are, int64 [P].
    """

    sentences: Tensor
    hashes: Tensor
    snippets: Tensor
    modules: Tensor

    @classmethod
    def read(cls, held_out: bool, device: torch.device) -> Records:
        """Sentences of the topics for training or of the others; snippets of the first four fifths of every module or the rest.

        What is held out is left out where it was in the other part too: documentation and modules repeat themselves. No two
        sentences have one hash.
        """
        first, rest = (sentences_of(topics) for topics in shipped.english())
        text = {bits: sentence for bits, sentence in rest.items() if bits not in first} if held_out else first
        snippets, modules = [], []
        for index, module in enumerate(MODULES):
            known, new = parts_of(shipped.source_lines(module))
            kept = [ids for ids in new if ids not in known] if held_out else known
            snippets += kept
            modules += [index] * len(kept)
        return cls(
            torch.tensor([word_ids(sentence, SENTENCE) for sentence in text.values()], device=device),
            torch.tensor(list(text), device=device),
            torch.tensor(snippets, device=device), torch.tensor(modules, device=device),
        )  # fmt: skip


def draw(records: Records, batch: int, episodes: int, asked: int, generator: torch.Generator) -> tuple[dict, dict, Tensor]:
    """A batch of histories, ``asked`` questions of each kind about each, and their answers.

    Returns:
        Histories: of each modality its tokens and their times [B, M]; times count episodes and are negative, now is 0.
        Queries: "kind", "key" int64 and "time", "hash" [B, O], O = 3 * asked. Answers int64 [B, O], of the head's classes.
    """
    device = records.hashes.device

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, device=device)

    def times(*shape: int) -> Tensor:
        """[B, episodes, ...], each within its episode."""
        begun = torch.arange(-episodes, 0, device=device).view(1, episodes, *(1 for _ in shape))
        return begun + torch.rand(batch, episodes, *shape, generator=generator, device=device)

    rows = torch.arange(batch, device=device)[:, None]
    # Without replacement, so that those after the first `episodes` did not occur.
    order = torch.rand(batch, len(records.hashes), generator=generator, device=device).argsort(1)
    shown, snippet = order[:, :episodes], integers(len(records.modules), batch, episodes)
    keys, values = integers(KEYS, batch, episodes * WRITES), integers(VALUES, batch, episodes * WRITES)
    text_time, code_time, write_time = times(), times(), times(WRITES).sort(2).values.flatten(1)
    history = {
        "text": (records.sentences[shown], records.hashes[shown], text_time),
        "code": (records.snippets[snippet], code_time),
        "metadata": (keys, values, write_time),
    }
    # Keys that were written, each as often as it was, and their last writes.
    key = keys.gather(1, integers(episodes * WRITES, batch, asked))
    written = keys[:, None] == key[:, :, None]  # [B, asked, writes]
    last = (written * torch.arange(1, keys.shape[1] + 1, device=device)).argmax(2)
    occurred = integers(2, batch, asked)
    present, absent = integers(episodes, batch, asked), episodes + integers(order.shape[1] - episodes, batch, asked)
    sentence = order.gather(1, torch.where(occurred == 1, present, absent))
    which = integers(episodes, batch, asked)
    zero, none = torch.zeros_like(key), torch.zeros(batch, asked, HASH_BITS, device=device)
    queries = {
        "kind": torch.arange(3, device=device).repeat_interleave(asked).expand(batch, -1),
        "key": torch.cat((key, zero, zero), 1),
        "hash": torch.cat((none, records.hashes[sentence], none), 1),
        # The first two are asked now.
        "time": torch.cat((zero, zero, code_time[rows, which]), 1),
    }
    modules = records.modules[snippet[rows, which]]
    return history, queries, torch.cat((values.gather(1, last), VALUES + occurred, VALUES + 2 + modules), 1)
