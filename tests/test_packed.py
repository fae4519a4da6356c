"""A copy with packed weights answers as the artifact does, and maps the weights that the artifact packs in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.models import export_slim, in_chunks, open_prepared, recipe_of
from support.tiny_decoders import save_decoder
from support.tiny_writer import writer_artifact

from kvslim.errors import OutputError
from kvslim.export.manifest import verify
from kvslim.methods import KvQuant
from kvslim.runtime.packed import main, write_packed, write_packed_graph
from kvslim.runtime.session import DecodeSession

TOKENS = np.random.default_rng(0).integers(0, 256, 48)
WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 64}
PRIVATE = """
import re, sys
from pathlib import Path
from kvslim.runtime.opening import open_session
session = open_session(Path(sys.argv[1]), 1)
print(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A graph with int4 weights and an int8 cache, and its packed copy."""
    folder = tmp_path_factory.mktemp("packed")
    model = save_decoder("llama", folder / "model", **WIDE)
    export_slim(open_prepared(model, recipe_of((KvQuant(),), "int4")), folder / "plain")
    (folder / "packed").mkdir()
    write_packed_graph(folder / "plain" / "model.onnx", folder / "packed" / "model.onnx")
    return folder / "plain", folder / "packed"


@pytest.mark.parametrize("evaluated", [False, True])
def test_logits_and_the_graphs_contract_stay(graphs: tuple[Path, Path], evaluated: bool) -> None:
    options = {"all_positions": evaluated, "float_activations": evaluated}
    plain, packed = (DecodeSession(graph, capacity=len(TOKENS), **options) for graph in graphs)
    assert packed.layout == plain.layout
    for chunks in ([40, *[1] * 8], [8]):
        found = [in_chunks(session, TOKENS, chunks) for session in (plain, packed)]
        assert np.abs(found[0]).max() > 0.1
        np.testing.assert_array_equal(*found)
        plain.reset()
        packed.reset()


def test_packed_weights_are_mapped(graphs: tuple[Path, Path]) -> None:
    private = [int(subprocess.check_output([sys.executable, "-c", PRIVATE, str(graph)], text=True)) for graph in graphs]
    weights = (graphs[0] / "model.onnx_data").stat().st_size / 2**10
    assert private[0] - private[1] > 0.6 * weights


def test_copy_is_whole_and_replaces_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact, out = writer_artifact(tmp_path), tmp_path / "packed"
    write_packed(artifact, out)
    assert verify(out) == ()
    assert {path.name for path in out.iterdir()} >= {path.name for path in artifact.iterdir()}
    with pytest.raises(OutputError):
        write_packed(artifact, out)
    assert main([str(artifact), str(out)]) == OutputError.exit_code
    assert "fix: " in capsys.readouterr().err
    assert main([str(tmp_path / "none"), str(tmp_path / "new")]) == 5
