"""The model card of an artifact: README.md with YAML front matter, written from its manifest alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from kvslim.kv_ratios import smaller
from kvslim.report.decisions import decisions
from kvslim.report.tables import decisions_table, gates_table, report_table, timing_note
from kvslim.types import KVLayout, Manifest, Plan

CARD = "README.md"
TEMPLATE = """\
---
{{ front }}---

# {{ name }}, {{ recipe }}

{% if encoder -%}
`{{ name }}` as an ONNX graph, made by KVSlim {{ version }} with the recipe `{{ recipe }}`.
{%- else -%}
`{{ name }}` as an ONNX graph with a slim KV cache, made by KVSlim {{ version }} with the recipe `{{ recipe }}`:
{{ "{:,.0f}".format(slim) }} bytes of cache per token, {{ smaller }}.
{%- endif %}
{%- if manifest.passed is false %}

**A gate failed: this artifact is not what its recipe asked for.**
{%- endif %}
{% if manifest.report %}
## Measured

{{ report }}
{% if encoder -%}
`plain` is the same model, exported the same way, with its weights in fp32, on one sentence at a time; `artifact` and
`floor`, which is that export again, run padded batches. Speed is interleaved in one run, on the machine that made this
folder.
{%- else -%}
`plain` is the same model, exported the same way, with its cache in fp32. `floor` is that export against itself.
Quality is measured through the cache; speed is interleaved in one run, on the machine that made this folder.
{%- endif %}
Times are medians, with the first and third quartile in brackets.
{% if timings %}
**{{ timings }}.**

{% endif -%}
[report.html](report.html) shows all of it as figures.
{% if manifest.report.gates %}
{{ gates }}{% endif %}{% endif %}
## Use

{% if manifest.least_onnxruntime %}The graph needs onnxruntime {{ manifest.least_onnxruntime }} or newer.

{% endif -%}
{% if encoder -%}
```python
from pathlib import Path
from kvslim.runtime.encoder import EncoderSession

embeddings = EncoderSession(Path(".")).encode(["one sentence", "and another"])  # [2, hidden], mean-pooled
```
{%- else -%}
```
kvslim generate . --prompt "Once upon a time"
kvslim verify .
```

{% if manifest.plan.layout == "gqa" -%}
onnxruntime-genai opens this folder as it is (`onnxruntime_genai.Model(".")`), and so does transformers.js
(with `subfolder: ""`).
{%- else -%}
The graph appends to a cache that the caller allocates for the whole context, filled with zeros.
{%- endif %}
{%- endif %}

## Made from

- Model: `{{ name }}`{% if manifest.source.revision %}, revision `{{ manifest.source.revision }}`{% endif %},\
 SHA-256 of its files `{{ manifest.source.sha256 }}`
- Weights: {{ manifest.weights }}
{% for package, number in manifest.versions.items() -%}
- {{ package }} {{ number }}
{% endfor %}
{%- if not encoder or removed %}
## {{ "Removed" if encoder else "The cache, layer by layer" }}

{% if shared %}{{ shared }}

{% endif %}{{ plan }}{% endif %}"""


def write_card(folder: Path, manifest: Manifest) -> None:
    """Writes README.md into an artifact's folder."""
    (folder / CARD).write_text(model_card(manifest), encoding="utf-8")


def model_card(manifest: Manifest) -> str:
    """The card's text; the same manifest gives the same text.

    Args:
        manifest: The artifact's manifest; its file digests are not used, because the card is one of the files.
    """
    spec, report = manifest.spec, manifest.report
    slim, plain = (
        layout.bytes_per_token(manifest.context)
        for layout in (manifest.kv_layout, KVLayout.of(spec, Plan.identity(spec)))
    )
    shared, table = ("", decisions_table(spec, manifest.plan)) if spec.is_encoder else decisions(spec, manifest.plan)
    # Markdown, not HTML: escaping would break the tables.
    environment = Environment(autoescape=False, undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE).render(
        manifest=manifest,
        encoder=spec.is_encoder,
        front=yaml.safe_dump(_front_matter(manifest), sort_keys=False, allow_unicode=True),
        name=name_of(manifest),
        recipe=manifest.recipe.get("name", "custom"),
        version=manifest.versions.get("kvslim", ""),
        slim=slim,
        smaller="" if spec.is_encoder else smaller(slim, plain),
        timings=(timing_note(report) if report else None) or "",
        report=report_table(report).markdown() if report else "",
        gates=gates_table(report.gates).markdown() if report else "",
        shared=shared,
        plan=table.markdown() if table.rows else "",
        removed=manifest.plan != Plan.identity(spec),
    )


def _front_matter(manifest: Manifest) -> dict[str, Any]:
    spec = manifest.spec
    tags = ["onnx", "kvslim", *([] if spec.is_encoder else ["kv-cache", "onnxruntime-genai"]), spec.model_type]
    base = {"base_model": manifest.source.model} if manifest.source.revision else {}
    return {
        "library_name": "onnxruntime",
        "pipeline_tag": spec.task,
        **base,
        "tags": tags,
    }


def name_of(manifest: Manifest) -> str:
    """The hub id, or the last part of a local path: the card should not reveal folders on the author's disk."""
    return manifest.source.model if manifest.source.revision else Path(manifest.source.model).name
