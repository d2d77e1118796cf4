# SPDX-License-Identifier: Apache-2.0
"""The trained pair as a tool: `embedrl embed`, `search`, `serve` and `gate fit`."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option, Typer

from embedrl_verl.cli import options as opt
from embedrl_verl.cli.options import command
from embedrl_verl.errors import ConfigError

pair = Typer()
gate = Typer(help="Thinking only where it is needed.")
Always = Annotated[
    Literal["always", "never"] | None, Option(help="Embed with a T-CoT; none: always with a Reasoner, else never.")
]

Limit = Annotated[int | None, Option(min=1, help="Pairs of each data source, the first.")]


@command(pair)
def embed(
    *,
    inputs: Annotated[
        list[str],
        Argument(metavar="INPUT...", help="*.jsonl; parquet file or folder of pair records; or folder of pictures."),
    ],
    embedder: opt.Embedder,
    out: opt.Out,
    reasoned: opt.Reasoned,
    placed: opt.Placed,
    think: Always = None,
    with_plain: Annotated[
        bool, Option("--with-plain", help="Also vectors without T-CoTs, which --think when_needed of a search needs.")
    ] = False,
    side: Annotated[
        Literal["query", "target"], Option(help="What inputs are: of pair records, this side is taken.")
    ] = "target",
    instruction: opt.Instruction = "",
    media_root: Annotated[
        str | None, Option(metavar="DIR", help="Of paths; none: the folder of the *.jsonl, or as data cards say.")
    ] = None,
    max_failed_share: Annotated[
        float, Option(min=0, max=1, help="Stop above this fraction of rows without a vector.")
    ] = 0.01,
    retry_failed: Annotated[
        bool, Option("--retry-failed", help="Make parts of an unfinished folder again that lack vectors.")
    ] = False,
    batch_size: Annotated[int, Option(min=1, help="Inputs at a time.")] = 64,
    rows_per_part: Annotated[
        int, Option(min=1, help="Rows of a written file, and lost at most, of each worker, when killed.")
    ] = 1024,
) -> int:
    """Vectors of many inputs, as parquet parts; resumable.

    Killed and started again with the same command it goes on where it was. Rows without a vector are counted, and
    named in rejected.jsonl; exit code 3 above --max-failed-share.
    """
    from embedrl_verl.retrieval.embed import embed_inputs
    from embedrl_verl.retrieval.inputs import Reading

    options = reasoned.pair(embedder)
    lines = embed_inputs(
        inputs,
        out,
        options,
        Reading(side, instruction, media_root),
        think=options.think(think),
        with_plain=with_plain,
        rows_per_part=rows_per_part,
        batch_size=batch_size,
        max_failed_share=max_failed_share,
        retry_failed=retry_failed,
        command=["embedrl", *sys.argv[1:]],
        cluster=placed.cluster,
    )
    print("\n".join(lines))
    return 0


@command(pair)
def search(
    *,
    folder: Annotated[str, Argument(metavar="DIR", help="Folder that embedrl embed wrote.")],
    query: Annotated[str, Option(metavar="TEXT", help="Text of the query.")] = "",
    image: Annotated[list[str] | None, Option(metavar="FILE", help="Picture of the query; repeat for several.")] = None,
    instruction: Annotated[str, Option(help="Said to the query; none: as the folder was embedded.")] = "",
    top: Annotated[int, Option(min=1, help="Rows to print.")] = 10,
    think: Annotated[
        Literal["always", "never", "when_needed"] | None, Option(help="Of the query; none: as the folder.")
    ] = None,
    gate_file: Annotated[
        str | None, Option("--gate", metavar="FILE", help="Of when_needed; none: DIR/gate.json.")
    ] = None,
    index: Annotated[Literal["exact", "hnsw"], Option(help="Compare with every vector, or by a graph (FAISS).")] = (
        "exact"
    ),
    embedder: Annotated[str | None, Option(metavar="DIR", help="None: the folder's.")] = None,
    reasoned: opt.Reasoned,
) -> int:
    """The rows of a folder that are closest to a query: cosine and id, a line each.

    The T-CoT of the query, if it has one, goes to standard error.
    """
    if not query and not image:
        raise ConfigError("name what is searched for: --query TEXT, --image FILE, or both")
    if missing := [file for file in image or () if not Path(file).is_file()]:
        raise ConfigError(f"--image must name files; there is no {', '.join(missing)}")
    from embedrl_verl.retrieval.search import search_folder

    found, hits = search_folder(
        folder,
        {"text": query, "images": image or (), "instruction": instruction},
        top=top,
        think=think,
        gate=gate_file,
        kind=index,
        pair={**reasoned.named, "embedder": embedder},
    )
    if found.tcot is not None:
        print(f"thought: {found.tcot}", file=sys.stderr)
    for hit in hits:
        print(f"{hit.score:.4f}\t{hit.id}")
    return 0


@command(gate)
def fit(
    *,
    files: opt.Files,
    embedder: opt.Embedder,
    reasoned: opt.Reasoned,
    out: Annotated[str, Option(metavar="FILE", help="File to write.")] = "gate.json",
    media_root: opt.MediaRoot = None,
    limit: Limit = None,
) -> int:
    """Find out on validation pairs which queries are worth a T-CoT.

    Writes the margin of the two best plain candidates below which a query thinks, and Hit@1 and seconds a query of
    never, always and gated thinking.
    """
    from embedrl_verl.retrieval.gate_file import fit_gate

    options = reasoned.pair(embedder)
    options.think("when_needed")
    found = fit_gate(files, out, options, media_root=media_root, limit=limit)
    print(_gate_lines(found))
    print(f"wrote {out}")
    return 0


@command(gate)
def score(
    *,
    files: opt.Files,
    embedder: opt.Embedder,
    reasoned: opt.Reasoned,
    gate_file: Annotated[str, Option("--gate", metavar="FILE", help="That embedrl gate fit wrote.")] = "gate.json",
    media_root: opt.MediaRoot = None,
    limit: Limit = None,
) -> int:
    """What a fitted gate does to other pairs: Hit@1 and seconds a query of never, always and gated thinking."""
    from embedrl_verl.retrieval.gate_file import measure_gate, read_gate

    options = reasoned.pair(embedder)
    options.think("when_needed")
    print(
        _gate_lines(
            measure_gate(files, options, read_gate(Path(gate_file), options), media_root=media_root, limit=limit)
        )
    )
    return 0


@command(pair)
def serve(
    *,
    embedder: opt.Embedder,
    reasoned: opt.Reasoned,
    think: Always = None,
    instruction: opt.Instruction = "",
    name: Annotated[str | None, Option(help="Model's name in requests; none: the Embedder's folder.")] = None,
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8000,
    batch_size: Annotated[int, Option(min=1, help="Inputs at a time.")] = 64,
    max_inputs: Annotated[int, Option(min=1, help="Inputs of a request.")] = 256,
    max_body_mib: Annotated[float, Option(min=0.01, help="Size of a request.")] = 16.0,
    max_waiting: Annotated[int, Option(min=1, help="Inputs that wait; above it requests are refused.")] = 1024,
    page: Annotated[bool, Option("--page", help="Also a page at / that searches --vectors.")] = False,
    vectors: Annotated[str | None, Option(metavar="DIR", help="Of --page: folder that embedrl embed wrote.")] = None,
    gate_file: Annotated[
        str | None, Option("--gate", metavar="FILE", help="Of --page; none: DIR/gate.json, if it is there.")
    ] = None,
    api_key: Annotated[
        str | None, Option(envvar="EMBEDRL_API_KEY", metavar="KEY", help="Asked of clients, as OpenAI's; none: open.")
    ] = None,
) -> int:
    """The pair behind OpenAI's /v1/embeddings: thinks, then embeds.

    Texts and chat messages with pictures as data: URLs; nothing is fetched. Beside it /v1/models, /health, /metrics.
    """
    if page != (vectors is not None):
        raise ConfigError("--page and --vectors DIR (what it searches) belong together; name both or none")
    if api_key == "":
        raise ConfigError("--api-key (or EMBEDRL_API_KEY) must not be empty; leave it out for a server without a key")
    from embedrl_verl.retrieval.service import Limits, Service, application, run_service

    options = reasoned.pair(embedder)
    service = Service(
        options.load(options.think(think)),
        name or Path(embedder).resolve().name,
        Limits(batch_size, max_inputs, int(max_body_mib * 2**20), max_waiting),
        instruction,
        options.cut_to(),
    )
    app = application(service, api_key)
    if vectors is not None:
        from embedrl_verl.retrieval.page import open_page

        open_page(service, vectors, options, gate_file).add_to(app)
    run_service(app, service.name, host=host, port=port)
    return 0


def _gate_lines(found: dict[str, Any]) -> str:
    lines = [f"{name:7} Hit@1 {hit:.3f}, {found['seconds'][name]:.3f} s a query" for name, hit in found["hit1"].items()]
    lines.append(f"{found['share']:.1%} of {found['queries']} queries think (margin below {found['threshold']:.4f})")
    if found["failed"]:
        lines.append(f"ATTENTION: {found['failed']} inputs without a vector, counted as misses")
    return "\n".join(lines)
