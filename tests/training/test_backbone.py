"""A decoder from scratch: how large it may be, and dropout of what blocks add to their rows, which Llama has not."""

from dataclasses import replace

import pytest
import torch

from speeder_engine.errors import ConfigError
from speeder_engine.training import backbone
from speeder_engine.training.backbone import drop_residuals, small_llama
from speeder_engine.training.config import BackboneConfig

CONFIG = BackboneConfig(vocab_size=260, hidden_size=32, num_heads=2, intermediate_size=48, dropout=0.0)


@pytest.mark.parametrize("huge", [{"hidden_size": 2_000_000}, {"num_layers": 10**9}, {"intermediate_size": 2**31 - 1}])
def test_one_beyond_the_machines_memory_is_refused_before_it_is_made(huge):
    with pytest.raises(ConfigError, match=r"backbone: [\d,]+ parameters take [\d,]+ bytes in training, there are"):
        small_llama(replace(CONFIG, **huge), 260)


def test_its_size_is_counted_before_it_is_made(monkeypatch):
    made = sum(weight.numel() for weight in small_llama(CONFIG, 260).parameters())
    norms = (2 * CONFIG.num_layers + 1) * CONFIG.hidden_size
    monkeypatch.setattr(backbone, "host_memory", lambda: (made - norms) * backbone.BYTES_A_PARAMETER)
    small_llama(CONFIG, 260)
    with pytest.raises(ConfigError, match="make it smaller"):
        small_llama(CONFIG, 261)


def outputs(body, rows):
    with torch.no_grad():
        return body(inputs_embeds=rows).last_hidden_state


def bodies():
    torch.manual_seed(0)
    plain = small_llama(CONFIG, 260)
    dropping = small_llama(CONFIG, 260)
    dropping.load_state_dict(plain.state_dict())
    return plain.train(), dropping.train(), torch.randn(3, 7, 32)


def test_rows_alone_are_left_where_everything_added_is_dropped():
    _, dropping, rows = bodies()
    with torch.no_grad(), drop_residuals(dropping, 1.0):
        assert torch.equal(outputs(dropping, rows), dropping.norm(rows))


def test_answers_are_not_touched():
    plain, dropping, rows = bodies()
    with drop_residuals(dropping, 0.5):
        assert not torch.equal(outputs(plain, rows), outputs(dropping, rows))
        assert torch.equal(outputs(plain.eval(), rows), outputs(dropping.eval(), rows))


def test_nothing_is_dropped_any_more_once_it_is_trained():
    plain, dropping, rows = bodies()
    with drop_residuals(dropping, 0.5):
        pass
    assert torch.equal(outputs(plain, rows), outputs(dropping, rows))


def test_what_is_added_keeps_its_mean():
    """Of one block's attention: its perceptron adds nothing, and the last norm's scale is taken out."""
    plain, dropping, rows = bodies()
    for body in (plain, dropping):
        body.layers = body.layers[:1]
        body.norm = torch.nn.Identity()
        torch.nn.init.zeros_(body.layers[0].mlp.down_proj.weight)
        body.layers[0].self_attn.o_proj.weight.data.mul_(50)
    with drop_residuals(dropping, 0.3):
        found = torch.stack([outputs(dropping, rows) for _ in range(3000)]).mean(0)
    assert (found - rows).abs().max() > 0.5  # something is added
    torch.testing.assert_close(found - rows, outputs(plain, rows) - rows, rtol=0.1, atol=0.05)


def test_a_pretrained_backbone_has_adapters_for_it():
    with pytest.raises(ConfigError, match=r"residual_dropout is of a decoder from scratch; .* use lora_dropout"):
        BackboneConfig(source="somewhere", residual_dropout=0.1)
