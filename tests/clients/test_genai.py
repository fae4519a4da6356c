"""What onnxruntime-genai reads beside the graph: first token, end tokens, and none of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from clients.conftest import ArtifactOf
from clients.kinds import KINDS, Kind, make_artifact
from clients.runners import genai_tokens, our_tokens
from kvslim.methods import ClusterHeads, KvWindow
from kvslim.runtime.generate import eos_ids, load_tokenizer

PLAIN = KINDS["plain"]
PROMPT = [5, 17, 99, 3, 42]
ModelOf = Callable[[str], Path]


def change(path: Path, values: dict[str, Any]) -> None:
    """Sets keys of a JSON file; None removes one."""
    data = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


@pytest.mark.clients
def test_genai_stops_at_the_tokenizers_end_token_when_the_config_names_another(
    tiny_model: ModelOf, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    free = our_tokens(make_artifact(model, PLAIN, tmp_path / "free"), PROMPT)
    end = free[6]
    symbol = load_tokenizer(model).id_to_token(end)
    assert symbol is not None
    change(model / "config.json", {"eos_token_id": 256})
    (model / "generation_config.json").unlink()
    change(model / "tokenizer_config.json", {"eos_token": symbol})
    chat = make_artifact(model, PLAIN, tmp_path / "chat")
    assert eos_ids(chat) == {256, end}
    expected = list(takewhile(lambda token: token != end, free))
    assert genai_tokens(chat, [PROMPT]) == [our_tokens(chat, PROMPT)] == [expected]


@pytest.mark.clients
def test_genai_opens_a_model_without_any_special_token(tiny_model: ModelOf, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    nothing = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **nothing}))
    (model / "generation_config.json").unlink()
    change(model / "tokenizer_config.json", {"eos_token": None, "pad_token": None})
    folder = make_artifact(model, PLAIN, tmp_path / "out")
    assert eos_ids(folder) == frozenset()
    ours = our_tokens(folder, PROMPT)
    assert 0 not in ours  # where genai would stop
    assert genai_tokens(folder, [PROMPT]) == [ours]


@pytest.mark.clients
def test_genai_tokenizer_gives_our_ids_when_asked_for_special_tokens(artifact: ArtifactOf) -> None:
    import onnxruntime_genai as genai

    folder, text = artifact("demo", "plain"), "Mira's lamp is red."
    tokenizer = genai.Tokenizer(genai.Model(str(folder)))
    tokenizer.update_options(add_special_tokens=True)
    assert tokenizer.encode(text).tolist() == load_tokenizer(folder).encode(text).ids


@pytest.mark.clients
@pytest.mark.parametrize("shared_buffer", [True, False])
@pytest.mark.parametrize("kind", ["kv_quant", "kv_hdc, int4, residual", "kv_pca + kv_window + kv_quant"])
def test_genai_reads_a_prompt_in_chunks_over_integers(artifact: ArtifactOf, kind: str, shared_buffer: bool) -> None:
    folder, prompt = artifact("llama", kind), list(range(5, 105))
    expected = [our_tokens(folder, prompt)]
    for chunk in (40, 16):  # the branch for prompts, and the operator
        assert genai_tokens(folder, [prompt], shared_buffer, chunk) == expected


@pytest.mark.clients
def test_genai_runs_rings_beside_full_caches_when_buffers_are_shared(tiny_llama: Path, tmp_path: Path) -> None:
    kind = Kind((KvWindow(window=21, sinks=2, layers=(1,)),))
    folder = make_artifact(tiny_llama, kind, tmp_path / "mixed")
    prompt = list(range(5, 45))
    prompts = [prompt, prompt[::-1]]
    assert genai_tokens(folder, prompts) == [our_tokens(folder, ids) for ids in prompts]
    with pytest.raises(RuntimeError, match="invalid dimensions"):
        genai_tokens(folder, prompts, shared_buffer=False)


@pytest.mark.clients
def test_genai_runs_a_model_with_windows_in_some_layers(tiny_model: ModelOf, tmp_path: Path) -> None:
    folder = make_artifact(tiny_model("gemma3_text"), PLAIN, tmp_path / "plain")
    prompt = list(range(5, 45))
    assert genai_tokens(folder, [prompt]) == [our_tokens(folder, prompt)]


@pytest.mark.clients
def test_genai_runs_clusters_of_heads_when_they_share_kv_heads(tiny_llama: Path, tmp_path: Path) -> None:
    folder = make_artifact(tiny_llama, Kind((ClusterHeads(clusters={1: 2}),)), tmp_path / "clusters")
    prompt = list(range(5, 45))
    prompts = [prompt, prompt[::-1]]
    assert genai_tokens(folder, prompts) == [our_tokens(folder, ids) for ids in prompts]
    with pytest.raises(RuntimeError, match="ScatterElements"):
        genai_tokens(folder, prompts, shared_buffer=False)
