"""`kvslim bench`: times artifacts against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvslim.cli import console
from kvslim.cli.options import Json
from kvslim.cli.progress import Terminal
from kvslim.cli.writing import Speculative


def bench(
    artifacts: Annotated[list[Path], typer.Argument(metavar="ARTIFACT...", help="folders to time, in turns")],
    contexts: Annotated[
        str | None,
        typer.Option(
            "--context",
            help="context lengths for time per token; default: 128,1k and the context that the artifacts are for; "
            "all positions of a model mean its last token",
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option("--prompt", help="prompt lengths for time to first token; default: 128,512 and that context"),
    ] = None,
    threads: Annotated[
        str | None, typer.Option(metavar="N,...", help="threads of one operator; default: onnxruntime's choice")
    ] = None,
    batches: Annotated[str, typer.Option("--batch", metavar="N,...", help="sequences per batch")] = "1",
    repeats: Annotated[int, typer.Option(min=3, help="timings per combination")] = 16,
    speculative: Speculative = "auto",
    text: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="what drafts are timed on: self (what the artifacts write), a .txt or .jsonl file, or "
            "hub:DATASET[:SPLIT]",
        ),
    ] = "self",
    csv: Annotated[Path | None, typer.Option(help="write one row per timing and draft to this file")] = None,
    markdown: Annotated[Path | None, typer.Option(help="write the tables to this file")] = None,
    as_json: Json = False,
) -> None:
    """Time artifacts against each other, over a grid of lengths, threads and batches.

    They take turns in one run, so that load on the machine slows all of them alike. Of an artifact with a draft, texts
    are written with and without it, up to each context of 128 tokens or more.
    """
    from kvslim.cli.inputs import check_target, write_text
    from kvslim.cli.lengths import read_counts, read_lengths

    for path, option in ((csv, "--csv"), (markdown, "--markdown")):
        check_target(path, option)
    prompt_lengths = None if prompts is None else read_lengths(prompts, "--prompt")
    context_lengths = None if contexts is None else read_lengths(contexts, "--context")
    thread_counts = None if threads is None else read_counts(threads, "--threads")
    batch_sizes = read_counts(batches, "--batch")
    from kvslim import api
    from kvslim.report.bench import bench_csv, tables_of, uncertain_timings

    with console.libraries_apart(), Terminal(quiet=True) as progress:
        results = api.bench(
            artifacts,
            prompts=prompt_lengths,
            contexts=context_lengths,
            threads=thread_counts,
            batches=batch_sizes,
            repeats=repeats,
            speculative=speculative,
            text=text,
            progress=progress,
        )
    tables, doubts = tables_of(results), uncertain_timings(results)
    if csv:
        write_text(csv, bench_csv(results), "--csv")
    if markdown:
        write_text(markdown, "\n".join([*(table.markdown() for table in tables), *doubts]), "--markdown")
    if as_json:
        columns = {name: result.model_dump(mode="json") for name, result in results.items()}
        console.print_json("bench", {"artifacts": columns})
    else:
        console.print_tables(*tables)
    for line in doubts:
        console.hint(line)
