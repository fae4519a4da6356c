"""The model card: what it repeats of the model's own, what its numbers are of, and its header for the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import tiny_hub
from support.tiny_artifact import fill
from support.tiny_hub import TinyHub
from support.tiny_report import manifest as tiny_manifest

from kvslim.caches import FullCache
from kvslim.export.manifest import read_manifest
from kvslim.loading.origin import of_gguf, source_of
from kvslim.loading.snapshot import Snapshot
from kvslim.loading.source import resolve
from kvslim.measures import Measures
from kvslim.report.card import model_card
from kvslim.types import LayerPlan, Manifest, Plan, Source

ID = "someone/model"
CONFIG = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
HEADER = "---\nlicense: apache-2.0\nbase_model: someone/older\n---\n# A model\n"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyHub:
    return tiny_hub.install(tmp_path, monkeypatch)


def save(folder: Path, card: str | None, **config: Any) -> Path:
    """A model of two files, with a card or without."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "model.safetensors").write_text("x")
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def told(snapshot: Snapshot) -> dict[str, Any]:
    """What is known of a model beside its name and digest."""
    return source_of(snapshot, "0").model_dump(exclude={"model", "revision", "sha256"})


def test_model_on_the_hub_is_the_base_and_keeps_its_license(hub: TinyHub) -> None:
    save(hub.root / ID, HEADER)
    assert told(resolve(ID)) == {"base_model": ID, "license": "apache-2.0"}
    assert told(resolve(f"{ID}@v2")) == {"base_model": ID, "license": "apache-2.0"}


def test_card_that_lies_on_disk_gives_the_license_and_no_base(tmp_path: Path) -> None:
    assert told(resolve(str(save(tmp_path / "model", HEADER)))) == {"license": "apache-2.0"}


def test_adapter_has_the_license_of_its_base(hub: TinyHub) -> None:
    save(hub.root / "org/base", HEADER)
    adapter = hub.root / ID
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    (adapter / "adapter_model.safetensors").write_text("x")
    (adapter / "README.md").write_text("---\nlicense: mit\n---\n")
    assert told(resolve(ID)) == {"base_model": ID, "license": "apache-2.0"}
    assert told(resolve(str(adapter))) == {"base_model": "org/base", "license": "apache-2.0"}


@pytest.mark.parametrize(
    ("link", "url"),
    [("LICENSE.md", f"https://huggingface.co/{ID}/blob/main/LICENSE.md"), ("https://a.b/c", "https://a.b/c")],
)
def test_link_to_a_license_leads_there_from_elsewhere(hub: TinyHub, link: str, url: str) -> None:
    save(hub.root / ID, f"---\nlicense: other\nlicense_name: own\nlicense_link: {link}\n---\n")
    names = {"license": "other", "license_name": "own"}
    assert told(resolve(ID)) == {"base_model": ID, **names, "license_link": url}
    local = {"license_link": url} if "://" in link else {}
    assert told(resolve(str(hub.root / ID))) == {**names, **local}


@pytest.mark.parametrize(
    "card",
    [
        None,
        "",
        "# no header",
        "---\n- a\n---\n",
        "---\na: [\n---\n",
        "---\nlicense: [mit]\n---\n",
        '---\nlicense: "a\\nb"\n---\n',
        f"---\nlicense: {'a' * 999}\n---\n",
        "---\nlicense: ''\n---\n",
    ],
)
def test_card_that_says_no_license_says_nothing(card: str | None, tmp_path: Path) -> None:
    assert told(resolve(str(save(tmp_path / "model", card)))) == {}


def test_card_that_is_no_text_says_nothing(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", None)
    (folder / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert told(resolve(str(folder))) == {}


def test_gguf_file_names_license_and_base() -> None:
    metadata = {
        "general.license": "other",
        "general.license.name": "own",
        "general.license.link": "https://a.b/c",
        "general.base_model.0.repo_url": "https://huggingface.co/org/base",
    }
    names = {"license": "other", "license_name": "own", "license_link": "https://a.b/c"}
    assert of_gguf(metadata) == {"base_model": "org/base", **names}
    assert of_gguf({"general.base_model.0.repo_url": "https://elsewhere.org/a"})["base_model"] is None


def header(manifest: Manifest, **source: str) -> dict[str, Any]:
    """The header of the card of a manifest that knows this of its source."""
    known = Source(**{**manifest.source.model_dump(), **source})
    front = model_card(manifest.model_copy(update={"source": known})).split("---\n", 2)[1]
    return dict(yaml.safe_load(front))


def test_header_has_what_the_hub_asks_for(tmp_path: Path) -> None:
    fill(tmp_path)
    found = header(read_manifest(tmp_path), model=ID, base_model=ID, license="llama3.2")
    assert found == {
        "license": "llama3.2",
        "base_model": ID,
        "base_model_relation": "quantized",
        "library_name": "onnxruntime",
        "pipeline_tag": "text-generation",
        "tags": ["onnx", "kvslim", "kv-cache", "onnxruntime-genai", "transformers.js", "llama"],
    }


def test_header_leaves_out_what_is_not_known_and_keeps_folders_private(tmp_path: Path) -> None:
    fill(tmp_path)
    manifest = read_manifest(tmp_path)
    found = header(manifest, model="/home/someone/secret/mine")
    assert not {"license", "base_model", "base_model_relation"} & found.keys()
    gguf = {"model": "/home/someone/secret/mine.gguf", "base_model": "org/base"}
    card = model_card(manifest.model_copy(update={"source": Source(**{**manifest.source.model_dump(), **gguf})}))
    assert "secret" not in card
    assert "# mine.gguf, balanced" in card
    assert "- Its base on the hub: `org/base`" in card


def test_manifest_without_a_base_keeps_its_bytes(tmp_path: Path) -> None:
    fill(tmp_path)
    assert set(json.loads((tmp_path / "kvslim.json").read_text())["source"]) == {"model", "revision", "sha256"}


def test_card_names_no_client_that_cannot_run_the_graph(tmp_path: Path) -> None:
    fill(tmp_path)
    manifest = read_manifest(tmp_path)
    plan = manifest.plan.model_copy(update={"layout": "attention24"})
    layout = manifest.kv_layout.model_copy(update={"layout": "attention24"})
    card = model_card(manifest.model_copy(update={"plan": plan, "kv_layout": layout}))
    assert "onnxruntime_genai" in model_card(manifest)
    assert not re.search("genai|transformers.js", card)
    assert "a cache that the caller allocates" in card


def test_card_says_whose_activations_are_rounded_where_weights_are_quantised() -> None:
    made, words = tiny_manifest(), "KL and perplexity have activations in float32"
    assert made.report is not None
    assert words not in model_card(made)
    report = made.report.model_copy(update={"original": Measures(perplexity=9.0)})
    assert words in model_card(made.model_copy(update={"report": report}))


def test_card_counts_the_formats_of_matrices() -> None:
    assert "\n- Weights: int4 (k_quant)\n" in model_card(tiny_manifest())
    stored = {"a": "int4, blocks of 128", "b": "int8, blocks of 128", "c": "int4, blocks of 128"}
    counted = (
        "\n- Weights: int4 (k_quant): 2 matrices in int4, blocks of 128; 1 matrix in int8, blocks of 128\n- kvslim"
    )
    assert counted in model_card(tiny_manifest().model_copy(update={"matrices": stored}))


def test_card_tells_ratios_quartiles_and_doubts() -> None:
    card = model_card(tiny_manifest(busy=True))
    assert "446 bytes of cache per token, 5.7x smaller than fp32, 2.9x than fp16, 1.5x than q8_0." in card
    assert "| 12.00 (11.00 to 13.50) | 5.00 (4.80 to 5.60) | 0.417x |" in card
    assert "**timings uncertain: the machine was busy.**" in card
    assert "uncertain" not in model_card(tiny_manifest())


def test_card_says_once_what_layers_share() -> None:
    shown = tiny_manifest()
    alike = tuple(LayerPlan(layer=index, cache=FullCache(stored="int8")) for index in range(5))
    card = model_card(shown.model_copy(update={"plan": Plan(layers=alike)}))
    assert card.count("8-bit integers") == 1
    assert "| 4 | 2-bit codes |" in model_card(shown)
