"""Facts of the family table against the modules and configs of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny_decoders import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

from kvslim.loading.architecture import architecture_of


@pytest.mark.parametrize("family", FAMILIES)
def test_table_names_norms_of_queries_and_factors_of_residuals(tiny_model: Callable[[str], Path], family: str) -> None:
    config = AutoConfig.from_pretrained(tiny_model(family))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    architecture = architecture_of(config.model_type)
    attention = model.get_submodule(architecture.layers).get_submodule("0").get_submodule(architecture.attention)
    norms = {name for name, _ in attention.named_children() if name.startswith("q_") and "norm" in name}
    assert norms == ({architecture.query_norm} if architecture.norms_query(config) else set())
    assert architecture.multiplier(config) == getattr(config, "residual_multiplier", 1.0)


@pytest.mark.parametrize("family", ["phi", "stablelm"])
def test_norm_of_queries_is_there_when_the_config_says_so(family: str) -> None:
    architecture = architecture_of(family)
    assert architecture.norms_query(AutoConfig.for_model(family, qk_layernorm=True))
    assert not architecture.norms_query(AutoConfig.for_model(family))
