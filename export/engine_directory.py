"""A training checkpoint -> an engine directory: adapters merged, weights fused, every item compressed once."""

from dataclasses import replace
from pathlib import Path

from speeder_engine.catalogue import Catalogue
from speeder_engine.checkpoint import Checkpoint
from speeder_engine.checks import given_path
from speeder_engine.models.families import decoder_config
from speeder_engine.models.recommender import ServingModel
from speeder_engine.parts import EngineParts


def export_engine(checkpoint: str | Path, out: str | Path) -> EngineParts:
    """Writes `out` in one step; a killed export leaves nothing that loads. Raises ArtifactError."""
    out = given_path(out, "export", "an engine directory")
    parts = engine_parts(Checkpoint.load(checkpoint))
    parts.save(out)
    return EngineParts.load(out)


def engine_parts(checkpoint: Checkpoint) -> EngineParts:
    """The same model and catalogue as an engine holds them, in fp32."""
    model = checkpoint.merged_model().float().eval()
    config = replace(model.config, decoder=decoder_config(model.backbone.config))

    def write_more(folder: Path) -> None:
        checkpoint.tokenizer.save_pretrained(folder / "tokenizer")
        for name, encoder in checkpoint.encoders.items():
            encoder.save(folder / "encoders" / name)

    return EngineParts(
        config=config,
        model=ServingModel.from_recommender(model),
        catalogue=Catalogue(checkpoint.table, checkpoint.item_tokens()),
        tokenizer=checkpoint.tokenizer.backend_tokenizer if config.heads.title else None,
        compressor={name: value.clone() for name, value in model.compressor.state_dict().items()},
        write_more=write_more,
    )
