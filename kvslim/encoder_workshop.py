"""One encoder in memory, and all that the pipeline makes of it."""

from __future__ import annotations

import shutil
from pathlib import Path

from kvslim.calibrate.sentences import sentences, tokenised
from kvslim.errors import ModelError
from kvslim.export.encoder import build_encoder_graph
from kvslim.export.encoder_weights import quantise_encoder
from kvslim.export.graph import save_graph
from kvslim.load.model import load_encoder, load_tokenizer
from kvslim.load.source import Snapshot
from kvslim.recipe import Recipe
from kvslim.types import ModelSpec
from kvslim.validate.encoder import HeldOut, mask_tokens


class EncoderWorkshop:
    """Holds an encoder; see the methods for what is made from it.

    Attributes:
        snapshot: The model's files.
        spec: Its shape.
        recipe: What is to be made.
        digest: SHA-256 of the model's files.
    """

    def __init__(self, snapshot: Snapshot, spec: ModelSpec, recipe: Recipe) -> None:
        self.snapshot, self.spec, self.recipe = snapshot, spec, recipe
        self.tokenizer = load_tokenizer(snapshot)
        self.digest = snapshot.sha256()
        self.model = load_encoder(snapshot, spec)

    def export(self, plain: Path, folder: Path | None = None) -> None:
        """Writes the graph in fp32 to `plain`, and with the recipe's weights to `folder` where one is given."""
        graph = build_encoder_graph(self.model, self.spec)
        save_graph(graph, plain)
        if folder:
            save_graph(quantise_encoder(graph, self.recipe.weights), folder)

    def write_companions(self, folder: Path) -> None:
        """Writes the tokenizer and the config."""
        self.tokenizer.save_pretrained(folder)
        shutil.copyfile(self.snapshot.path / "config.json", folder / "config.json")

    def held_out(self) -> HeldOut:
        """Held-out sentences, masked too where the model fills masks.

        Raises:
            KvslimError: The source cannot be read, or the tokenizer of a model that fills masks has no mask token.
        """
        settings = self.recipe.validation
        texts = tokenised(sentences(settings.source, samples=settings.samples), self.tokenizer, settings.length)
        if self.spec.task != "fill-mask":
            return HeldOut(texts, (), ())
        if self.tokenizer.mask_token_id is None:
            raise ModelError(
                "the tokenizer has no mask token", where=str(self.snapshot.path), fix="add mask_token to its config"
            )
        return mask_tokens(texts, self.tokenizer.mask_token_id, set(self.tokenizer.all_special_ids), settings.seed)
