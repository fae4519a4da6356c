"""The model card of an artifact: README.md with YAML front matter, written from its manifest alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from kvslim.kv_ratios import smaller
from kvslim.report.decisions import decisions
from kvslim.report.draft import draft_note
from kvslim.report.healing import healing_note
from kvslim.report.matrices import formats_line, rounded_again
from kvslim.report.tables import gates_table, removals_table, report_table, timing_note
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
{%- if manifest.report.original %}
KL and perplexity have activations in float32; `floor` and the KL with activations rounded are as it runs; `fp32` is the
model before its weights were quantised.
{%- endif %}
{%- endif %}
Times are medians, with the first and third quartile in brackets.
{% if timings %}
**{{ timings }}.**

{% endif -%}
{% if draft %}
{{ draft[0] | upper }}{{ draft[1:] }}.

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
In this folder (`hf download USER/REPOSITORY --local-dir DIR`) with KVSlim, from the command line or in Python:

```
kvslim generate . --prompt "Once upon a time"
kvslim verify .
```

```python
import kvslim

text = kvslim.load(".")
print("".join(text.generate("Once upon a time", max_new_tokens=64)))
```

{% if runs_elsewhere -%}
With onnxruntime-genai (`pip install onnxruntime-genai`):

```python
import onnxruntime_genai as og

model = og.Model(".")
tokenizer = og.Tokenizer(model)
tokenizer.update_options(add_special_tokens=True)
prompt = tokenizer.encode("Once upon a time")
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=len(prompt) + 64)
generator = og.Generator(model, parameters)
generator.append_tokens(prompt)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```

With transformers.js, from the repository on the hub that holds this folder{{ node_only }}:

```js
import { pipeline } from "@huggingface/transformers";

const generate = await pipeline("text-generation", "USER/REPOSITORY", { subfolder: "" });
const [answer] = await generate("Once upon a time", { max_new_tokens: 64, add_special_tokens: true });
console.log(answer.generated_text);
```
{%- elif manifest.plan.layout == "gqa" -%}
Other runtimes do not know this kind of cache.
{%- else -%}
The graph appends to a cache that the caller allocates for the whole context, filled with zeros.
{%- endif %}
{%- endif %}

## Made from

- Model: `{{ name }}`{% if manifest.source.revision %}, revision `{{ manifest.source.revision }}`{% endif %},\
 SHA-256 of its files `{{ manifest.source.sha256 }}`
{% if manifest.source.base_model and manifest.source.base_model != name -%}
- Its base on the hub: `{{ manifest.source.base_model }}`
{% endif -%}
- Weights: {{ manifest.weights }}{% if stored_as %}: {{ stored_as }}{% endif %}{% if again %}; {{ again }}{% endif %}
{% if healing -%}
- Training: {{ healing }}
{% endif -%}
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
    spec, report, layout = manifest.spec, manifest.report, manifest.kv_layout
    slim = layout.bytes_per_token(manifest.context)
    plain = KVLayout.of(spec, Plan.identity(spec)).bytes_per_token(manifest.context)
    shared, table = ("", removals_table(manifest.plan)) if spec.is_encoder else decisions(spec, manifest.plan)
    # Markdown, not HTML: escaping would break the tables.
    environment = Environment(autoescape=False, undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE).render(
        manifest=manifest,
        encoder=spec.is_encoder,
        runs_elsewhere=_runs_elsewhere(layout),
        node_only=" (on Node: WASM has no kernel for quantised embeddings)" if manifest.weights.is_quantised else "",
        front=yaml.safe_dump(_front_matter(manifest), sort_keys=False, allow_unicode=True),
        name=name_of(manifest),
        recipe=manifest.recipe.get("name", "custom"),
        version=manifest.versions.get("kvslim", ""),
        stored_as=formats_line(manifest.matrices),
        again=rounded_again(manifest),
        healing=healing_note(manifest),
        slim=slim,
        smaller="" if spec.is_encoder else smaller(slim, plain),
        timings=(timing_note(report) if report else None) or "",
        draft=(draft_note(report.speculation) if report else None) or "",
        report=report_table(report).markdown() if report else "",
        gates=gates_table(report.gates).markdown() if report else "",
        shared=shared,
        plan=table.markdown() if table.rows else "",
        removed=manifest.plan != Plan.identity(spec),
    )


def _front_matter(manifest: Manifest) -> dict[str, Any]:
    """The header by the hub's names; what the source does not tell is left out."""
    spec, source = manifest.spec, manifest.source
    clients = ["onnxruntime-genai", "transformers.js"] if _runs_elsewhere(manifest.kv_layout) else []
    tags = ["onnx", "kvslim", *([] if spec.is_encoder else ["kv-cache", *clients]), spec.model_type]
    licence = {"license": source.license, "license_name": source.license_name, "license_link": source.license_link}
    base = {"base_model": source.base_model, "base_model_relation": "quantized"} if source.base_model else {}
    return {
        **{name: value for name, value in licence.items() if value},
        **base,
        "library_name": "onnxruntime",
        "pipeline_tag": spec.task,
        "tags": tags,
    }


def _runs_elsewhere(layout: KVLayout) -> bool:
    """Whether onnxruntime-genai and transformers.js know such a cache."""
    return layout.layout == "gqa" and layout.is_even and not layout.needs_own_runtime


def name_of(manifest: Manifest) -> str:
    """The hub id, or the last part of a local path: the card should not reveal folders on the author's disk."""
    source = manifest.source
    on_hub = source.revision or (source.base_model and source.model.partition(":")[0] == source.base_model)
    return source.model if on_hub else Path(source.model).name
