"""Every kind of artifact in every client: the greedy tokens are those of our own runtime, or the refusal is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from clients import runners
from clients.conftest import ArtifactOf
from clients.kinds import KINDS, STANDARD
from clients.runners import Answer, RefusedError, our_tokens
from kvslim.runtime.generate import load_tokenizer
from kvslim.runtime.opening import layout_of, open_session

Client = Callable[[Path, str], Answer]
Record = Callable[[str, object], None]

TEXT = "Here is a story of Mira and Oren. Mira's lamp is red. Oren"
CASES = [(model, kind) for model in ("llama", "demo") for kind in KINDS]
OTHERS = [(family, kind) for family in ("mistral", "qwen3", "gpt2") for kind in ("plain", "kv_pca + kv_quant")]
QUICK = [("llama", kind) for kind in ("plain", "kv_pca", "kv_pca + kv_quant")]
GENAI, WEB = "onnxruntime-genai", "transformers.js, browser build"
PYTHON_CLIENTS: dict[str, Client] = {
    "onnxruntime": runners.onnxruntime,
    GENAI: runners.onnxruntime_genai,
}
CLIENTS: dict[str, Client] = {
    **PYTHON_CLIENTS,
    "transformers.js, Node": runners.transformers_js,
    WEB: runners.transformers_js_web,
}
OPTIMUM: dict[str, Client] = {
    "optimum-onnx": runners.optimum,
    "optimum-onnx, told the width": runners.optimum_with_rank,
}
REFUSED = {(WEB, "int4 weights"): "Could not find an implementation for GatherBlockQuantized"}
WIDTHS = "Got invalid dimensions for input"
ROWS = "TensorScatter"


def case(client: str, model: str, kind: str) -> object:
    quick = client in PYTHON_CLIENTS and (model, kind) in QUICK
    return pytest.param(client, model, kind, marks=() if quick else pytest.mark.clients)


@pytest.mark.parametrize(
    ("client", "model", "kind"), [case(client, *made) for made in CASES + OTHERS for client in CLIENTS]
)
def test_greedy_tokens_are_ours_or_the_refusal_is_known(
    artifact: ArtifactOf, record_property: Record, client: str, model: str, kind: str
) -> None:
    if (client, kind) in REFUSED:
        with pytest.raises(RefusedError, match=REFUSED[client, kind]):
            CLIENTS[client](artifact(model, kind), TEXT)
        record(record_property, model, kind, client, f"refused: *{REFUSED[client, kind]}*")
        return
    version = check(CLIENTS[client], artifact(model, kind))
    record(record_property, model, kind, client, "same tokens", version)


@pytest.mark.clients
@pytest.mark.parametrize("client", [*CLIENTS, *OPTIMUM])
def test_layout_attention24_runs_where_the_caller_allocates_the_cache(
    artifact: ArtifactOf, record_property: Record, client: str
) -> None:
    folder = artifact("llama", STANDARD)
    if client == "onnxruntime":
        record(record_property, "llama", STANDARD, client, "same tokens", check(CLIENTS[client], folder))
        return
    with pytest.raises((RefusedError, RuntimeError), match=WIDTHS if client in (*OPTIMUM, GENAI) else ROWS):
        {**CLIENTS, **OPTIMUM}[client](folder, TEXT)
    record(record_property, "llama", STANDARD, client, f"refused: *{WIDTHS if client in (*OPTIMUM, GENAI) else ROWS}*")


@pytest.mark.clients
@pytest.mark.parametrize("client", OPTIMUM)
@pytest.mark.parametrize(("model", "kind"), [("demo", "plain"), *(case for case in CASES if case[0] == "llama")])
def test_optimum_runs_one_shape_for_all_and_refuses_others(
    artifact: ArtifactOf, record_property: Record, client: str, model: str, kind: str
) -> None:
    folder = artifact(model, kind)
    if shapes(folder) == {taken_shape(client, folder)}:
        version = check(OPTIMUM[client], folder)
        record(record_property, model, kind, client, "same tokens", version)
        return
    with pytest.raises(RefusedError, match=WIDTHS):
        OPTIMUM[client](folder, TEXT)
    record(record_property, model, kind, client, f"refused: *{WIDTHS}*")


def check(client: Client, folder: Path) -> str:
    """The client's version, once it has said what we say."""
    ours = our_tokens(folder, load_tokenizer(folder).encode(TEXT).ids)
    assert len(ours) > 8
    answer = client(folder, TEXT)
    assert answer.tokens == ours
    return answer.version


def shapes(folder: Path) -> set[tuple[int, int, int | None]]:
    """Heads, width and fixed rows of the caches."""
    return {(tensor.heads, tensor.columns, tensor.kept) for tensor in layout_of(open_session(folder)).tensors}


def taken_shape(client: str, folder: Path) -> tuple[int, int, None]:
    """What optimum takes all caches to be: heads from the config, and the width too unless it was told that."""
    config = json.loads((folder / "config.json").read_text())
    width = config["hidden_size"] // config["num_attention_heads"]
    if OPTIMUM[client] is runners.optimum_with_rank:
        width = layout_of(open_session(folder)).tensors[0].columns
    return config["num_key_value_heads"], width, None


def record(record_property: Record, model: str, kind: str, client: str, outcome: str, version: str = "") -> None:
    """For the table in docs/clients.md."""
    values = {"model": model, "kind": kind, "client": client, "outcome": outcome, "version": version}
    for name, value in values.items():
        record_property(name, value)
