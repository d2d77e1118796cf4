# SPDX-License-Identifier: Apache-2.0
"""A backend without a model, pairs to ask about, and small jobs."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from embedrl_verl.annotate.annotated import AnnotateJob
from embedrl_verl.annotate.backends import Refused, Reply, encode
from embedrl_verl.annotate.prompts import TcotPrompts
from embedrl_verl.annotate.runner import RunnerSettings
from embedrl_verl.annotate.tcots import TcotQuestions, TcotSettings
from embedrl_verl.data.media import MediaLimits
from embedrl_verl.data.schema import Item, PairRecord, Video
from embedrl_verl.data.writer import write_pairs

LIMITS = MediaLimits(token_side=28, image_min_tokens=1, image_max_tokens=16, frame_min_tokens=1, frame_max_tokens=16)
PROMPTS = TcotPrompts("qwen2_vl", "compact", False, LIMITS)
EVIDENCE = {"text_keywords": '{"text_keywords":["red"]}', "bbox_2d": '{"bbox_2d":[0,0,1000,1000]}'}
EVIDENCE["key_frames"] = '{"key_frames":[1]}'


def picture(number: int, size: tuple[int, int] = (56, 28)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def pairs(count: int) -> list[PairRecord]:
    """Pairs of three sources: text to text, image to text, text to video."""
    found = []
    for number in range(count):
        text = Item(text=f"red {number}")
        query = Item(text="red?", images=(picture(number),)) if number % 3 == 1 else text
        clip = Item(video=Video(frames=(picture(number), picture(number + 1), picture(number + 2)), fps=1.0))
        target = clip if number % 3 == 2 else text
        found.append(PairRecord(f"p{number}", f"source{number % 3}", "find red", query, target, ""))
    return found


def tcot(key: str = "text_keywords", answer: str = "a") -> str:
    return f"<thinking>{EVIDENCE[key]}</thinking><rethink>ok</rethink><answer>{answer}</answer>"


def key_in(prompt_text: str) -> str:
    """The evidence key that a compact prompt asks for."""
    return next(key for key in EVIDENCE if key in prompt_text)


class FakeBackend:
    """Answers by a digest of the whole request. `spoil(text, digest)` may give another reply."""

    def __init__(self, spoil: Callable[[str, int], Reply | Refused | None] = lambda text, digest: None) -> None:
        self.spoil = spoil
        self.asked: list[str] = []
        self.now = self.most = 0
        self.delay = 0.0

    def wanted(self) -> dict[str, Any]:
        return {}

    async def connect(self) -> dict[str, Any]:
        return {"model": "fake"}

    def prepare(self, prompt, sampling):
        body = json.dumps([encode(prompt.messages, videos="video_url"), repr(sampling)])
        last = prompt.messages[0]["content"]
        return (last if isinstance(last, str) else last[-1]["text"], body), len(body)

    async def complete(self, request):
        text, body = request
        self.asked.append(body)
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self.delay)
        self.now -= 1
        digest = int(hashlib.sha256(body.encode()).hexdigest()[:8], 16)
        return self.spoil(text, digest) or Reply(tcot(key_in(text), f"{digest:x}"), False, len(text), 9)

    async def aclose(self) -> None:
        pass


def some_bad(text: str, digest: int) -> Reply | Refused | None:
    """A third of the replies is no T-CoT, some requests are refused."""
    if digest % 3 == 0:
        return Reply(f"no T-CoT {digest:x}", False, len(text), 3)
    return Refused("HTTP 400", "too long") if digest % 17 == 1 else None


def job(files: list[Path], out: Path, backend: Any = None, *, settings: TcotSettings | None = None, **changes: Any):
    """A job with small parts; `changes` are of `AnnotateJob` and `RunnerSettings`."""
    runner = {"limit": 8, "threads": 2, "max_failed_share": 1.0, "max_rejected_share": 1.0}
    runner |= {name: changes.pop(name) for name in list(changes) if name in RunnerSettings.__dataclass_fields__}
    return AnnotateJob(
        files=files,
        out=out,
        questions=TcotQuestions(settings or TcotSettings(reask="resample"), changes.pop("prompts", PROMPTS)),
        backend=backend or FakeBackend(),
        runner=RunnerSettings(**runner),
        **{"rows_per_part": 4, "command": ["embedrl", "data", "annotate"], **changes},
    )


def pair_file(path: Path, count: int) -> Path:
    """Row groups of 4, so that a job has parts of 4 rows."""
    write_pairs(pairs(count), path)
    pq.write_table(pq.read_table(path), path, row_group_size=4)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
