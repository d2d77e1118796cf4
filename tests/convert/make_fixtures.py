# SPDX-License-Identifier: Apache-2.0
"""Small copies of the public sources in their real schemas, with content of our own: scans of handwritten digits.

File names, columns, nesting, odd spellings and trailing blanks are those of the real files; every picture, text and
video is drawn or written here. `python tests/convert/make_fixtures.py OUT [PAIRS]` writes all of them, always the same.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_preprocess.mmeb_train import TASKS
from recipes.tiny_digits.canvas import TRAIN_SCANS, Grid, ScanBox, Strip, draw_canvas

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
MMEB_COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
COLPALI_TEXTS = ("image_filename", "query", "answer", "source", "options", "page", "model", "prompt", "answer_type")
VISRAG_SOURCES = ("ArxivQA", "ChartQA", "MP-DocVQA", "InfoVQA", "PlotQA", "SlideVQA")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MARK = "<|image_1|>\n"
ASKED = (" {question}\n", "Answer by the image: ")
# Set of MMEB-train: how qry goes on after the instruction, its start in the split diverse_instruction, and pos_text (of
# image targets: how it goes on).
MMEB_STRINGS = {
    "ImageNet_1K": ("\n", "Say what it is\n", "{label}"),
    "N24News": (" {caption}\n", "To which section of a paper does this belong? ", "{section}"),
    "HatefulMemes": ("\n", "Is this meme hateful\n", "{yes_no}"),
    "VOC2007": ("\n", "Name the thing\n", "{label}"),
    "SUN397": ("\n", "Name the place\n", "{label}"),
    "OK-VQA": (*ASKED, "{answer}"),
    "A-OKVQA": (*ASKED, "{answer}"),
    "DocVQA": (*ASKED, "{answer}"),
    "InfographicsVQA": (*ASKED, "{answer}"),
    "ChartQA": (*ASKED, "{answer} "),
    "Visual7W": (*ASKED, "{answer}."),
    "VisDial": (" {dialogue}\n\n", "Which image do these two talk about? ", "\n"),
    "CIRR": (" {change}\n", "Now look for this one: ", "\n"),
    "VisualNews_t2i": (" {caption}\n", "News photo wanted: ", "\n"),
    "VisualNews_i2t": ("\n", "Caption this press photo.\n", "{caption}"),
    "MSCOCO_t2i": (" {caption}\n", "Image wanted: ", "\n"),
    "MSCOCO_i2t": ("\n", "What would one write under this image?\n", "{caption}"),
    "NIGHTS": ("\n", "Show me one like this.\n", "\n"),
    "WebQA": (" {question}\n", "Which image of an encyclopaedia knows this: ", " {caption}\n"),
    "MSCOCO": (' "{label}"\n', 'Cut out the "', ""),
}


class Pen:
    """Draws pictures of numbers; the same sequence of calls gives the same pictures."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)
        self._scans = ScanBox(TRAIN_SCANS, self._rng)

    def code(self, length: int = 4) -> str:
        """A new random number, as digits."""
        return "".join(str(digit) for digit in self._rng.integers(10, size=length))

    def picture(self, code: str, *, printed: str = "", rows: int = 3) -> Image.Image:
        """A canvas that shows a number in its middle row, and a printed line above it."""
        strip = Strip(rows // 2, 0, tuple(self._scans.draw(code)))
        return draw_canvas(Grid(rows, max(4, len(code))), [strip], printed=printed)


def encoded(image: Image.Image, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def write_all(out: str | Path, pairs: int = 8) -> dict[str, Path]:
    """Write the fixture of each source; name -> folder (the root that its converter reads)."""
    roots = {write.__name__.removeprefix("write_"): write for write in WRITERS}
    for name, write in roots.items():
        write(Path(out) / name, pairs, Pen())
    return {name: Path(out) / name for name in roots}


def write_mmeb(root: Path, pairs: int, pen: Pen) -> None:
    """All 20 sets in the splits `original` and `diverse_instruction`, and their images."""
    schema = pa.schema([(column, pa.string()) for column in MMEB_COLUMNS])
    for name, (tail, paraphrase, pos_text) in MMEB_STRINGS.items():
        task, mark = TASKS[name], MARK if TASKS[name].query_image or name == "WebQA" else ""
        query = mark + task.query + tail
        pos_text = MARK + task.target + pos_text if task.target_image else pos_text
        rows = [_mmeb_row(root, name, index, query, pos_text, pen) for index in range(pairs)]
        diverse = [{**row, "qry": row["qry"].replace(query.partition("{")[0], mark + paraphrase)} for row in rows]
        for split, content in (("original", rows), ("diverse_instruction", diverse)):
            _write_table(root / name / f"{split}-00000-of-00001.parquet", content, schema)


def _mmeb_row(root: Path, name: str, index: int, query: str, pos_text: str, pen: Pen) -> dict[str, str]:
    code, task = pen.code(), TASKS[name]
    last = WORDS[int(code[-1])]
    words = {
        "question": f"Which digit is the last of {code[:3]}?",
        "caption": f"The number {code} on white paper.",
        "change": f"The last digit is {last}.",
        "dialogue": f"Q:is it a number\nA:yes\nQ:which one\nA:{code}",
        "answer": last,
        "label": f"{last}, digit {code[-1]}" if name == "ImageNet_1K" else last,
        "section": ("Sports", "Science", "Travel")[index % 3],
        "yes_no": ("Yes", "No")[index % 2],
    }
    row = dict.fromkeys(MMEB_COLUMNS, "") | {"qry": query.format_map(words), "pos_text": pos_text.format_map(words)}
    folder = f"images/{name}/Train"
    if task.query_image:
        row["qry_image_path"] = _write_image(root, f"{folder}/{name}_image_{index}.jpg", pen.picture(code))
    if task.target_image:
        file = f"{index}_object_{last}.jpg" if name == "MSCOCO" else f"{name}_target_{index}.jpg"
        row["pos_image_path"] = _write_image(root, f"{folder}/{file}", pen.picture(code))
    if task.answers and name not in ("ImageNet_1K", "VOC2007", "SUN397"):
        row["neg_text"] = {"HatefulMemes": ("No", "Yes")[index % 2], "N24News": "Music"}.get(name, "a dog")
    if name == "VisDial":
        row["neg_image_path"] = _write_image(root, f"{folder}/{name}_negative_{index}.jpg", pen.picture(pen.code()))
    return row


def write_llava_hound(root: Path, pairs: int, pen: Pen) -> None:
    """Both annotation files and the frames of their videos. The first `pairs` lines of the second file are questions.

    Clip 0 has one frame, clip 1 has 16 whose numbers are not padded (10 after 9), clip 2 is a video file.
    """
    names = [f"v_{pen.code()}-Scene-{index:03d}" if index % 2 else pen.code(11) for index in range(pairs)]
    captions, questions = [], []
    for index, name in enumerate(names):
        code = pen.code(8)
        shown = [code[number % 8] for number in range({0: 1, 1: 16}.get(index, 4 + index))]
        pictures = [pen.picture(digit, rows=2) for digit in shown]
        if index == 2:
            write_video(root / f"train_300k/{name}.mp4", pictures)
        for number, picture in enumerate(pictures if index != 2 else (), start=1):
            file = f"c01_{number}.jpeg" if index == 1 else f"c01_{number:04d}.jpeg"
            _write_image(root / "train_300k", f"{name}/{file}", picture)
        caption = f"The clip shows the digits {' '.join(code)} one by one."
        captions.append(_conversation(name, name, "<video>\nWrite down all that the clip shows.", caption))
        ask = "What is the first digit of the clip?"
        human = f"{ask}\n<video>" if index % 2 else f"<video>\n{ask}"  # the mark may come first or last
        answer = f"The first digit is {WORDS[int(code[0])]}."
        questions.append(_conversation(f"{name}_{index % 3}", name, human, answer))
    folder = root / "video_instruction/train/sft"
    _write_lines(folder / "video_caption_300k.jsonl", captions)
    _write_lines(folder / "video_240k_caption_15k.jsonl", questions + captions[: max(1, pairs // 4)])


def write_video(path: Path, frames: Sequence[Image.Image]) -> None:
    """An MPEG-4 file of RGB frames, two a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        for frame in (*(av.VideoFrame.from_image(frame.convert("RGB")) for frame in frames), None):
            container.mux(stream.encode(frame))


def _conversation(row_id: str, video: str, human: str, gpt: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    return {"id": row_id, "video": video, "conversations": turns}


def write_embed_rl(root: Path, pairs: int, pen: Pen) -> None:
    """Embed-RL's copies of the three modes with T-CoTs, as one JSON object a line."""
    for mode in ("caption_retrieval", "qa", "video_retrieval"):
        rows, swapped = [], mode == "video_retrieval"
        for index in range(pairs):
            code = pen.code(3)
            files = [f"video/{mode}_{index}/c01_{number:04d}.jpeg" for number in (1, 2, 3)]
            shown = zip(files, code, strict=True)
            frames = [_write_image(root, file, pen.picture(digit, rows=2)) for file, digit in shown]
            asks = "Understand the content of the provided video:" if swapped else "What is shown?"
            human = {"conversations": [{"from": "human", "value": f"<video>\n{asks}"}], "video": frames}
            gpt = {"conversations": [{"from": "gpt", "value": f"The digits {' '.join(code)}."}]}
            gpt["video"] = ["images/blank.jpg"]
            evidence: list[Any] = [{"key_frames": [1]}, {"text_keywords": [code[0]]}]
            query, target = (gpt, human) if swapped else (human, gpt)
            cots = [
                f"<thinking>{json.dumps(one)}</thinking><rethink>ok</rethink><answer>{code}</answer>"
                for one in (reversed(evidence) if swapped else evidence)
            ]
            row = {"dataset_name": f"llavahound_{mode}", "qry": query, "pos": target}
            rows.append({**row, "query_cot": cots[0], "pos_cot": cots[1], "error": ""})
        _write_lines(root / f"llavahound_{mode}.jsonl", rows)


def write_colpali(root: Path, pairs: int, pen: Pen) -> None:
    """Two training files with rows of all five sources in turn, and the split `test` that nobody may read."""
    schema = pa.schema([("image", IMAGE), *[(name, pa.string()) for name in COLPALI_TEXTS]])
    rows = [_colpali_row(index, pen) for index in range(pairs)]
    half = (pairs + 1) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        _write_table(root / f"data/train-{number:05d}-of-00002.parquet", part, schema)
    _write_table(root / "data/test-00000-of-00001.parquet", [_colpali_row(0, pen)], schema)


def _colpali_row(index: int, pen: Pen) -> dict[str, Any]:
    source = ("pdf", "docvqa", "tatdqa", "Infographic-VQA", "arxiv_qa")[index % 5]
    code = pen.code()
    picture = encoded(
        pen.picture(code, printed=f"{source[:4]} {index}", rows=4), "PNG" if source == "tatdqa" else "JPEG"
    )
    # the path of the image is the same in many rows
    row: dict[str, Any] = {"source": source, "query": "Which number is on the page?", "answer": code}
    row["image"] = {"bytes": picture, "path": "page_9.jpg" if source == "pdf" else None}
    if source == "pdf":
        row |= {"answer": f"['{code[:2]}', '{code[2:]}']", "page": "9", "model": "sonnet", "prompt": "Ask.\n"}
        return row | {"image_filename": f"data/pages/{index}.pdf/page_9.jpg"}
    if source == "arxiv_qa":
        letter = "ABCD"[index % 4]
        options = [f"{one}. {code if one == letter else WORDS[number]}" for number, one in enumerate("ABCD")]
        row |= {"answer": letter, "options": str([*options, "-"]), "page": "", "model": "gpt4V", "prompt": ""}
        return row | {"image_filename": f"images/1810.{index:05d}_2.jpg"}
    if source == "tatdqa":
        row |= {"page": "1", "model": "", "prompt": "", "answer_type": "span", "answer": f"['{code}']"}
        return row | {"image_filename": f"data/tatdqa/{index}.pdf"}
    query = f"{row['query']}\nAnswer briefly."
    return row | {"query": query, "answer": f"{code}.", "image_filename": f"{index:064x}"}


def write_visrag(root: Path, pairs: int, pen: Pen) -> None:
    """Rows of all six sources in turn; the last two ask about the same page."""
    rows: list[dict[str, Any]] = []
    for index in range(pairs):
        code, source = pen.code(), VISRAG_SOURCES[index % 6]
        png = encoded(pen.picture(code, printed=f"{source[:5]} {index}", rows=4), "PNG")
        query = f"On which page is the number {code} ?"
        if index and index == pairs - 1:
            png, source, query = rows[-1]["image"]["bytes"], rows[-1]["source"], "Which page has four digits ?"
        rows.append({"query": query, "image": {"bytes": png, "path": f"{2 * index + 1}.png"}, "source": source})
    schema = pa.schema([("query", pa.string()), ("image", IMAGE), ("source", pa.string())])
    _write_table(root / "data/train-00000-of-00001.parquet", rows, schema)


def _write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=4)


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _write_image(root: Path, path: str, image: Image.Image) -> str:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(encoded(image))
    return path


WRITERS = (write_mmeb, write_llava_hound, write_embed_rl, write_colpali, write_visrag)

if __name__ == "__main__":
    for name, root in write_all(sys.argv[1], *map(int, sys.argv[2:])).items():
        print(f"{name}: {root}")
