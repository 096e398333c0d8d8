"""Small random models, and the judge of the engine: plain transformers, full prompts, explicit masks, no cache.

Nothing here is shared with the engine but the weights and the layout's numbers.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaForCausalLM

from speeder_engine.catalogue import Catalogue, ItemTable
from speeder_engine.config import CompressorConfig, HeadsConfig, ModelConfig, PromptConfig
from speeder_engine.data.splits import Histories
from speeder_engine.models.families import decoder_config
from speeder_engine.models.recommender import Recommender, ServingModel
from speeder_engine.parts import EngineParts
from speeder_engine.training.follower_counts import follower_table


@dataclass
class Tiny:
    """A random model over `num_items` items called "0000", "0001", ..."""

    model: Recommender
    tokens: torch.Tensor
    prior: torch.Tensor
    item_ids: list[str]
    window: int
    step: int
    titles: list[str] = field(default_factory=list)
    tokenizer: Tokenizer | None = None
    lm: LlamaForCausalLM | None = None  # the backbone with its vocabulary head

    def parts(self) -> EngineParts:
        """Fresh each time: an engine moves the tensors it is given."""
        table = ItemTable.fresh(self.item_ids, self.titles, self.prior.numpy())
        served = ServingModel.from_recommender(self.model)
        compressor = {name: value.clone() for name, value in self.model.compressor.state_dict().items()}
        return EngineParts(self.model.config, served, Catalogue(table, self.tokens.clone()), compressor, self.tokenizer)

    def ids(self, rows) -> list[str]:
        return [self.item_ids[int(row)] for row in rows]


def make_tiny(
    num_items=120,
    window=12,
    step=4,
    seed=0,
    instruction_len=19,
    scale=0.02,
    family="llama",
    calendar=None,
    num_layers=3,
    kv_heads=2,
    followers=None,
    mixing="experts",
    head_dim=8,
) -> Tiny:
    torch.manual_seed(seed)
    table = None
    if followers is not None:
        histories = np.random.default_rng(seed).integers(0, num_items, 600).astype(np.int32)
        table = follower_table(followers, Histories(np.arange(0, 601, 10), histories), num_items)
    shape = AutoConfig.for_model(
        family,
        vocab_size=64,
        hidden_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=6,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=80,
    )
    backbone = AutoModel.from_config(shape).eval()
    compressor = CompressorConfig({"text": 8, "image": 5}, 48, scale=scale, mixing=mixing)
    prompt = PromptConfig("instruction", tuple(range(1, instruction_len + 1)), window, step, calendar=calendar)
    counted = None if table is None else table.config
    model = Recommender(ModelConfig(decoder_config(shape), compressor, prompt, followers=counted), backbone).eval()
    model.followers = table
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    item_ids = [f"{i:04d}" for i in range(num_items)]
    titles = [f"Title {i}" for i in item_ids]
    return Tiny(model, torch.randn(num_items, 48) * scale, torch.randn(num_items), item_ids, window, step, titles)


WORDS = ["the", "old", "man", "and", "sea", "of", "a", "Ünïcode", "日本", "café", "lord", "two", "king", "☕", "2nd"]
QUESTION = "Its title:"
END_ID = 2


def make_titled(
    num_items=120, window=12, step=4, seed=0, tied=False, title_score="sum", calendar=None, head_dim=8
) -> Tiny:
    """The same with a title head: a causal LM whose words are the titles'. Some titles are nested, equal or empty."""
    rng = np.random.default_rng(seed)
    titles = [" ".join(rng.choice(WORDS, rng.integers(1, 7))) for _ in range(num_items)]
    titles[10:16] = ["the old", "the old man", "the old man and the sea", "the old man", "", "the old\nman"]
    tokenizer = make_tokenizer(titles)
    tiny = make_tiny(num_items, window, step, seed, calendar=calendar, head_dim=head_dim)
    torch.manual_seed(seed)
    shape = LlamaConfig(**{**tiny.model.backbone.config.to_dict(), "vocab_size": 400, "tie_word_embeddings": tied})
    lm = LlamaForCausalLM(shape).eval()
    old = tiny.model.config
    question_ids = tuple(tokenizer.encode(QUESTION).ids)
    prompt = PromptConfig("i", old.prompt.instruction_ids, window, step, QUESTION, question_ids, (END_ID,), calendar)
    heads = HeadsConfig(title=True, title_score=title_score)
    config = ModelConfig(decoder_config(shape), old.compressor, prompt, heads, vocabulary_tied=tied)
    model = Recommender(config, lm.model).eval()
    model.load_state_dict(tiny.model.own_state(), strict=False)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        if model.vocabulary_head is not None:
            lm.lm_head.weight.mul_(4)  # a head whose first choice is clear, and that comes to an end
            lm.lm_head.weight[[END_ID, *tokenizer.encode("\n").ids]] *= 2.5
            model.vocabulary_head.copy_(lm.lm_head.weight)
    return Tiny(model, tiny.tokens, tiny.prior, tiny.item_ids, window, step, titles, tokenizer, lm)


def make_tokenizer(texts) -> Tokenizer:
    """Byte-level BPE with an unknown, a beginning and an end."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def reference_start(length: int, window: int, step: int) -> int:
    """The sliding window by simulation: drop `step` items whenever the window overflows."""
    start = 0
    while length - start > window:
        start += step
    return start


@torch.no_grad()
def reference_scores(tiny: Tiny, rows, candidates=None, buckets=None):
    """(retrieve scores [I], rank scores [C] or None) of one history by one full forward pass each.

    buckets: the calendar bucket of every interaction, for a model that reads times.
    """
    model, prompt = tiny.model, tiny.model.config.prompt
    rows = np.asarray(rows, dtype=np.int64)
    start = reference_start(len(rows), tiny.window, tiny.step)
    rows = rows[start:]
    instruction = model.backbone.embed_tokens(torch.tensor(prompt.instruction_ids))
    history = tiny.tokens[torch.from_numpy(rows)] + model.prompts.weight[: len(rows)]
    if buckets is not None:
        history = history + model.times.weight[torch.tensor(buckets[start:], dtype=torch.int64)]
    prefix = torch.cat([instruction, history])
    hidden = model.backbone(inputs_embeds=prefix[None]).last_hidden_state[0]
    vector = model.retrieve.project(hidden[-1]) / (model.config.compressor.scale * 48**0.5)
    retrieve = tiny.tokens @ vector + model.retrieve.beta * tiny.prior
    if candidates is None:
        return retrieve, None
    ranked = []
    for row in candidates:  # one prompt each: nothing can leak between candidates
        own = tiny.tokens[row] + model.prompts.weight[len(rows)] + model.rank.role
        last = model.backbone(inputs_embeds=torch.cat([prefix, own[None]])[None]).last_hidden_state[0, -1]
        score = last @ model.rank.weight + model.rank.bias + model.rank.alpha * (tiny.tokens[row] @ vector)
        ranked.append(score + model.rank.beta * tiny.prior[row])
    return retrieve, torch.stack(ranked)


def reference_prompt(tiny: Tiny, rows, buckets=None) -> torch.Tensor:
    """Instruction, history and question [T, d]."""
    model, prompt = tiny.model, tiny.model.config.prompt
    rows = np.asarray(rows, dtype=np.int64)
    start = reference_start(len(rows), tiny.window, tiny.step)
    rows = rows[start:]
    instruction, question = (
        model.backbone.embed_tokens(torch.tensor(ids)) for ids in (prompt.instruction_ids, prompt.question_ids)
    )
    history = tiny.tokens[torch.from_numpy(rows)] + model.prompts.weight[: len(rows)]
    if buckets is not None:
        history = history + model.times.weight[torch.tensor(buckets[start:], dtype=torch.int64)]
    return torch.cat([instruction, history, question])


@torch.no_grad()
def reference_title_scores(tiny: Tiny, rows, candidates, mean=False, buckets=None) -> torch.Tensor:
    """Log-likelihood [C] of each candidate's title, by one full prompt each; -inf of one without a title."""
    prompt, scores = reference_prompt(tiny, rows, buckets), []
    for row in candidates:
        if not tiny.titles[row]:
            scores.append(torch.tensor(float("-inf")))
            continue
        ids = torch.tensor(tiny.tokenizer.encode(" ".join(tiny.titles[row].split()) + "\n").ids)
        inputs = torch.cat([prompt, tiny.model.backbone.embed_tokens(ids)])[None]
        logits = tiny.lm(inputs_embeds=inputs).logits[0, len(prompt) - 1 : -1]
        found = logits.log_softmax(-1)[torch.arange(len(ids)), ids]
        scores.append(found.mean() if mean else found.sum())
    return torch.stack(scores)


@torch.no_grad()
def reference_generation(tiny: Tiny, rows, max_tokens=64) -> str:
    """transformers' own greedy decoding, cut at the newline."""
    ids = tiny.lm.generate(
        inputs_embeds=reference_prompt(tiny, rows)[None],
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
    )
    return tiny.tokenizer.decode(ids[0].tolist(), skip_special_tokens=True).split("\n")[0].strip()
