# SPDX-License-Identifier: Apache-2.0
"""`embedrl data annotate` against the server's own benchmark: the same requests to the same server, as many at once.

    python benchmarks/bench_annotate.py --model DIR PAIRS.parquet [--limit 64] [--requests 600] [--rounds 3]

starts stock vLLM on the model (or takes --url) and in turn runs `vllm bench serve` on the requests that annotation
would send, as JSON lines, and the annotation itself: reading, decoding, encoding, checking, writing. It
prints a markdown table; the target is that annotating takes at most 1.2 times the benchmark's duration. Pairs with
clips are left out, since that benchmark sends none; caches of the server are off, so that the second to come has no
advantage.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from embedrl_verl.annotate.backends import ServerBackend, encode
from embedrl_verl.annotate.job import RunSettings
from embedrl_verl.annotate.prompts import TcotPrompts
from embedrl_verl.annotate.tcots import AnnotateJob, TcotSettings
from embedrl_verl.data.media import MediaLimits
from embedrl_verl.data.parquet import read_pairs
from embedrl_verl.data.schema import SIDES
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.embedder.served.servers import ServerProcess
from embedrl_verl.families import token_side
from embedrl_verl.platforms.ports import free_port
from embedrl_verl.serving import PoolSettings, ServerPool

TARGET = 1.2
BENCH = (
    "import argparse; from vllm.benchmarks import serve; parser = argparse.ArgumentParser(); "
    "serve.add_cli_args(parser); serve.main(parser.parse_args())"
)


def write_requests(files: Path, prompts: TcotPrompts, out: Path) -> int:
    """What annotation sends, in the form of the benchmark's data set."""
    count = 0
    with open(out, "w", encoding="utf-8") as lines:
        for record in read_pairs(files):
            for side in SIDES:
                (message,) = encode(prompts.prompt(record, side).messages, videos="images")
                lines.write(json.dumps({"content": message["content"]}) + "\n")
                count += 1
    return count


def bench(url: str, model: str, requests: Path, count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The server's own benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--base-url", url]
        words += ["--model", model, "--tokenizer", arguments.model, "--dataset-name", "custom_image"]
        words += ["--dataset-path", str(requests), "--num-prompts", str(count), "--disable-shuffle"]
        words += ["--custom-output-len", str(arguments.max_tokens), "--temperature", "0"]
        words += ["--max-concurrency", str(arguments.limit), "--disable-tqdm", "--num-warmups", str(arguments.limit)]
        words += ["--save-result", "--result-dir", folder, "--result-filename", "result.json"]
        subprocess.run([sys.executable, "-c", BENCH, *words], check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
    return found


def annotate(url: str, file: Path, prompts: TcotPrompts, arguments: argparse.Namespace) -> tuple[float, dict[str, Any]]:
    """Seconds of an annotation with one try a side, and its counts."""
    with tempfile.TemporaryDirectory() as folder:
        pool = ServerPool([url], PoolSettings(limit=arguments.limit, timeout_s=600.0))
        settings = TcotSettings(tries=1, reask="resample", max_tokens=arguments.max_tokens, overwrite=True)
        job = AnnotateJob(
            files=[file],
            out=Path(folder) / "out",
            settings=settings,
            prompts=prompts,
            backend=ServerBackend(pool, arguments.family),
            how=RunSettings(arguments.limit, arguments.threads, max_failed_share=1.0),
            keep_failed=True,
        )
        start = time.monotonic()
        job.run(say=lambda line: None)
        seconds = time.monotonic() - start
        card = json.loads((job.out / "data_card.json").read_text())
    return seconds, card["annotation"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--model", required=True, help="folder, for the server and the benchmark's tokenizer")
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--served-name", default="bench", help="its model's name")
    parser.add_argument("--family", default="qwen2_vl")
    parser.add_argument("--style", default="compact")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--log", type=Path, default=Path("vllm.log"))
    arguments = parser.parse_args()
    limits = MediaLimits(token_side(arguments.family), image_min_tokens=4, frame_min_tokens=4)
    prompts = TcotPrompts(arguments.family, arguments.style, False, limits)
    server = None
    if arguments.url is None:
        port = free_port()
        arguments.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", arguments.model]
        command += [
            "--served-model-name",
            arguments.served_name,
            "--dtype",
            "float32",
            "--enforce-eager",
            "--port",
            str(port),
        ]
        command += ["--max-model-len", str(arguments.max_model_len), "--disable-uvicorn-access-log"]
        command += ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"]
        server = ServerProcess(command, os.environ, arguments.url, arguments.log, startup_s=600, name="vLLM server")
        server.wait_ready()
    try:
        with tempfile.TemporaryDirectory() as folder:
            file, requests = Path(folder) / "pairs.parquet", Path(folder) / "requests.jsonl"
            kept = [p for p in read_pairs(arguments.pairs) if p.query.video is None and p.target.video is None]
            step = max(1, len(kept) // (arguments.requests // 2))
            write_pairs(kept[::step][: arguments.requests // 2], file)
            count = write_requests(file, prompts, requests)
            print(f"{count} requests, {arguments.limit} at once\n")
            columns = [
                "round",
                "bench s",
                "requests/s",
                "tokens",
                "annotate s",
                "requests/s",
                "tokens",
                "ratio (target)",
            ]
            print("|".join(["", *columns, ""]))
            print("|" + "---|" * len(columns), flush=True)
            for number in range(arguments.rounds):
                order = ["bench", "annotate"] if number % 2 == 0 else ["annotate", "bench"]
                for what in order:
                    if what == "bench":
                        found = bench(arguments.url, arguments.served_name, requests, count, arguments)
                    else:
                        seconds, counts = annotate(arguments.url, file, prompts, arguments)
                base = found["duration"]
                numbers = [f"{base:.1f}", f"{count / base:.1f}", str(found["total_output_tokens"])]
                numbers += [f"{seconds:.1f}", f"{counts['replies'] / seconds:.1f}", str(counts["completion_tokens"])]
                print("|".join(["", str(number), *numbers, f"{seconds / base:.2f} ({TARGET})", ""]), flush=True)
                if found["completed"] != count or counts["replies"] != count:
                    raise SystemExit(f"not all of {count} requests were answered: {found['completed']}, {counts}")
    finally:
        if server is not None:
            server.stop()


if __name__ == "__main__":
    main()
