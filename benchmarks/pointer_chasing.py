"""Pointer chasing: where a cycle leads from a start in so many hops, a task whose depth is known."""

from __future__ import annotations

import torch

ELEMENTS = 8
HOPS = 4  #: at most: from there on the way back is the shorter one
PAIRS, QUERIES = ELEMENTS, HOPS * ELEMENTS  #: tokens of a row
LENGTH = PAIRS + QUERIES + 1
FIRST_QUERY = ELEMENTS + ELEMENTS**2  #: token of the query (1 hop, start 0); before: answers, then pairs
VOCABULARY = FIRST_QUERY + QUERIES


class PointerChasing(torch.utils.data.Dataset):
    """A random cycle through all elements as its pairs (a, next of a), a token each in random order, then a query token for
    each number of hops and each start. Its answer, the element that many hops on, is the label; nothing else has one.

    A query sees the pairs and itself, and all queries stand at the position after the pairs, so that a row is that many
    sequences [pairs, query] which share their pairs. One cycle, since in a permutation of several the answer to many
    hops is often near, or the start itself. (The last token is there for the shift of labels alone.)

    Args:
        first: number of the first row; rows are drawn from their numbers.
        size: how many rows.
    """

    def __init__(self, first: int, size: int):
        self.first, self.size = first, size
        visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        visible[PAIRS:, PAIRS:] = torch.eye(LENGTH - PAIRS, dtype=torch.bool)
        self._common = {
            "attention_mask": visible[None],
            "position_ids": torch.arange(LENGTH).clamp(max=PAIRS),
        }

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(self.first + index)
        cycle = torch.randperm(ELEMENTS, generator=generator)
        after = torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(-1))
        order = torch.randperm(ELEMENTS, generator=generator)
        pairs = ELEMENTS + order * ELEMENTS + after[order]
        answers = [after]
        while len(answers) < HOPS:
            answers.append(after[answers[-1]])
        labels = torch.full((LENGTH,), -100)
        labels[PAIRS + 1 :] = torch.cat(answers)
        queries = FIRST_QUERY + torch.arange(QUERIES)
        return {"input_ids": torch.cat([pairs, queries, torch.zeros(1, dtype=torch.long)]), "labels": labels, **self._common}


def by_hops(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether answers are right, of logits `[N, S, V]`: the share for each number of hops, `[HOPS]`."""
    right = logits[:, PAIRS:-1].argmax(-1) == labels[:, PAIRS + 1 :]
    return right.view(-1, HOPS, ELEMENTS).float().mean((0, 2))
