# SPDX-License-Identifier: Apache-2.0
"""A backend without a model, pairs to ask about, and small jobs."""

import asyncio
import hashlib
import io
import json
from dataclasses import fields

import pyarrow.parquet as pq
from PIL import Image

from embedrl_verl.annotate.backends import Refused, Reply, encode
from embedrl_verl.annotate.job import RunSettings
from embedrl_verl.annotate.prompts import TcotPrompts
from embedrl_verl.annotate.tcots import AnnotateJob, TcotSettings
from embedrl_verl.data.media import MediaLimits
from embedrl_verl.data.schema import Item, PairRecord, Video
from embedrl_verl.data.writer import write_pairs

LIMITS = MediaLimits(token_side=28, image_min_tokens=1, image_max_tokens=16, frame_min_tokens=1, frame_max_tokens=16)
PROMPTS = TcotPrompts("qwen2_vl", "compact", False, LIMITS)
EVIDENCE = {"text_keywords": '["red"]', "bbox_2d": "[0,0,1000,1000]", "key_frames": "[1]"}


def picture(number, size=(56, 28)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def pairs(count):
    """Pairs of three sources: text to text, image to text, text to video."""
    found = []
    for number in range(count):
        text = Item(text=f"red {number}")
        query = Item(text="red?", images=(picture(number),)) if number % 3 == 1 else text
        clip = Item(video=Video(frames=(picture(number), picture(number + 1), picture(number + 2)), fps=1.0))
        target = clip if number % 3 == 2 else text
        found.append(PairRecord(f"p{number}", f"source{number % 3}", "find red", query, target, ""))
    return found


def tcot(prompt_text="text_keywords", answer="a"):
    """A T-CoT with the evidence that a compact prompt asks for."""
    key = next(key for key in EVIDENCE if key in prompt_text)
    return f'<thinking>{{"{key}":{EVIDENCE[key]}}}</thinking><rethink>ok</rethink><answer>{answer}</answer>'


class FakeBackend:
    """Answers by a digest of the whole request. `spoil(text, digest)` may give another reply."""

    delay, size = 0.0, 1000

    def __init__(self, spoil=lambda text, digest: None):
        self.spoil, self.asked, self.replies, self.now, self.most = spoil, [], [], 0, 0

    def named(self):
        return {}

    async def connect(self):
        return {"model": "fake"}

    def prepare(self, prompt, sampling):
        last = prompt.messages[0]["content"]
        body = json.dumps([encode(prompt.messages, videos="video_url"), repr(sampling)])
        return (last if isinstance(last, str) else last[-1]["text"], body), self.size

    async def complete(self, request):
        text, body = request
        self.asked.append(body)
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self.delay)
        self.now -= 1
        digest = int(hashlib.sha256(body.encode()).hexdigest()[:8], 16)
        self.replies.append(self.spoil(text, digest) or Reply(tcot(text, f"{digest:x}"), False, len(text), 9))
        return self.replies[-1]

    async def aclose(self):
        pass


def some_bad(text, digest):
    """A third of the replies is no T-CoT, some requests are refused."""
    if digest % 3 == 0:
        return Reply(f"no T-CoT {digest:x}", False, len(text), 3)
    return Refused("HTTP 400", "too long") if digest % 17 == 1 else None


def bad(text, digest):
    return Reply("no T-CoT", False, 1, 1)


def job(files, out, backend=None, *, settings=None, **changes):
    """A job with small parts; `changes` are of `AnnotateJob` and `RunSettings`."""
    how = {"limit": 8, "threads": 2, "max_failed_share": 1.0, "max_rejected_share": 1.0}
    how |= {one.name: changes.pop(one.name) for one in fields(RunSettings) if one.name in changes}
    return AnnotateJob(
        files=files,
        out=out,
        settings=settings or TcotSettings(reask="resample"),
        prompts=PROMPTS,
        backend=backend or FakeBackend(),
        how=RunSettings(**how),
        **{"rows_per_part": 4, "command": ["embedrl", "data", "annotate"], **changes},
    )


def pair_file(path, count):
    """Row groups of 4, so that a job has parts of 4 rows."""
    write_pairs(pairs(count), path)
    pq.write_table(pq.read_table(path), path, row_group_size=4)
    return path


def contents(folder):
    """Every file of a folder, by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
