"""The model card says what its numbers are of."""

from __future__ import annotations

import pytest
from support.tiny_report import PLAIN, manifest

from kvslim.report.card import model_card
from kvslim.types import Manifest, Measures


@pytest.fixture
def made() -> Manifest:
    return manifest()


def test_card_says_whose_activations_are_rounded_where_weights_are_quantised(made: Manifest) -> None:
    words = "KL and perplexity have activations in float32"
    assert made.report is not None
    assert words not in model_card(made)
    report = made.report.model_copy(update={"original": Measures(perplexity=PLAIN.perplexity)})
    assert words in model_card(made.model_copy(update={"report": report}))
