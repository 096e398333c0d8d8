"""GRU4Rec (Hidasi et al., arXiv 1511.06939): a recurrent network over item ids."""

from dataclasses import dataclass

from torch import Tensor, nn

from speeder_engine.encoders.sequence import SequenceConfig, SequenceModel


@dataclass(frozen=True)
class GRU4RecConfig(SequenceConfig):
    """`hidden_size` is the recurrent state's, `dim` the item embeddings'."""

    num_layers: int = 1
    hidden_size: int = 128


class GRU4Rec(SequenceModel):
    def __init__(self, num_items: int, config: GRU4RecConfig) -> None:
        super().__init__(num_items, config)
        self.gru = nn.GRU(config.dim, config.hidden_size, config.num_layers, batch_first=True)
        self.out = nn.Linear(config.hidden_size, config.dim)
        self.norm = nn.LayerNorm(config.dim)
        nn.init.normal_(self.items.weight, std=config.dim**-0.5)

    def forward(self, rows: Tensor) -> Tensor:
        states, _ = self.gru(self.dropout(self.items(rows)))
        return self.norm(self.out(self.dropout(states)))  # type: ignore[no-any-return]
