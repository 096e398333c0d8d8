"""Words in and out: the token embeddings and the vocabulary head of a language model. Only titles need them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Vocabulary(nn.Module):
    """Embedding rows [V, d] and the head that scores the next token; tied (`head` None), one matrix is both."""

    def __init__(self, embedding: nn.Parameter, head: nn.Parameter | None) -> None:
        super().__init__()
        self.embedding = embedding
        self.head = head

    @classmethod
    def empty(cls, vocab_size: int, hidden_size: int, tied: bool) -> "Vocabulary":
        """Zeros of the right shape, to load weights into."""
        embedding, head = (nn.Parameter(torch.zeros(vocab_size, hidden_size)) for _ in range(2))
        return cls(embedding, None if tied else head)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> rows [..., d]."""
        return self.embedding[ids]

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states [..., d] -> [..., V]."""
        return F.linear(hidden, self.embedding if self.head is None else self.head)
