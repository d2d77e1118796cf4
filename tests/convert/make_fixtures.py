# SPDX-License-Identifier: Apache-2.0
"""Small copies of the public sources in their real schemas, with content of our own: scans of handwritten digits.

File names, columns, nesting, odd spellings and trailing blanks are those of the real files; every picture, text and
video is drawn or written here. `python tests/convert/make_fixtures.py OUT [--pairs 8]` writes all of them; the same
arguments give the same files.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from recipes.tiny_digits.canvas import TRAIN_SCANS, Grid, ScanBox, Strip, draw_canvas

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
MMEB_COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Pen:
    """Draws pictures of numbers; the same sequence of calls gives the same pictures."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._scans = ScanBox(TRAIN_SCANS, self._rng)

    def code(self, length: int = 4) -> str:
        """A new random number, as digits."""
        return "".join(str(digit) for digit in self._rng.integers(10, size=length))

    def picture(self, code: str, *, printed: str = "", rows: int = 3) -> Image.Image:
        """A canvas that shows a number in its middle row, and a printed line above it."""
        grid = Grid(rows, max(4, len(code)))
        strips = [Strip(rows // 2, 0, tuple(self._scans.draw(code)))] if code else []
        return draw_canvas(grid, strips, printed=printed)


def encoded(image: Image.Image, kind: str = "JPEG") -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def write_all(out: str | Path, *, pairs: int = 8, seed: int = 0) -> dict[str, Path]:
    """Write the fixture of each source; name -> folder (the root that its converter reads)."""
    writers = {
        "mmeb": write_mmeb,
        "llava_hound": write_llava_hound,
        "embed_rl": write_embed_rl,
        "colpali": write_colpali,
        "visrag": write_visrag,
    }
    roots = {name: Path(out) / name for name in writers}
    for name, write in writers.items():
        write(roots[name], pairs=pairs, pen=Pen(seed))
    return roots


# MMEB-train ---------------------------------------------------------------------------------------------------------


def write_mmeb(root: Path, *, pairs: int, pen: Pen) -> None:
    """All 20 sets in the splits `original` and `diverse_instruction`, and their images."""
    for name, (query, paraphrase, pos_text) in MMEB_STRINGS.items():
        rows = [_mmeb_row(root, name, index, query, pos_text, pen) for index in range(pairs)]
        diverse = [{**row, "qry": row["qry"].replace(query.partition("{")[0], paraphrase)} for row in rows]
        for split, content in (("original", rows), ("diverse_instruction", diverse)):
            schema = pa.schema([(column, pa.string()) for column in MMEB_COLUMNS])
            _write_table(root / name / f"{split}-00000-of-00001.parquet", content, schema)


MARK = "<|image_1|>\n"
QUESTION = (
    MARK + "Represent the given image with the following question: {question}\n",
    MARK + "Answer by the image: ",
)
IMAGE_TARGET = MARK + "Represent the given image.\n"

# set: (qry, start of qry in the split diverse_instruction, pos_text of image targets or "{answer}")
MMEB_STRINGS: dict[str, tuple[str, str, str]] = {
    "ImageNet_1K": (MARK + "Represent the given image for classification\n", MARK + "Say what it is\n", "{label}"),
    "N24News": (
        MARK + "Represent the given news image with the following caption for domain classification: {caption}\n",
        MARK + "To which section of a paper does this belong? ",
        "{section}",
    ),
    "HatefulMemes": (
        MARK + "Represent the given image for binary classification to determine whether it constitutes hateful "
        "speech or not\n",
        MARK + "Is this meme hateful\n",
        "{yes_no}",
    ),
    "VOC2007": (MARK + "Identify the object shown in the image\n", MARK + "Name the thing\n", "{label}"),
    "SUN397": (MARK + "Identify the scene shown in the image\n", MARK + "Name the place\n", "{label}"),
    "OK-VQA": (*QUESTION, "{answer}"),
    "A-OKVQA": (*QUESTION, "{answer}"),
    "DocVQA": (*QUESTION, "{answer}"),
    "InfographicsVQA": (*QUESTION, "{answer}"),
    "ChartQA": (*QUESTION, "{answer} "),
    "Visual7W": (*QUESTION, "{answer}."),
    "VisDial": (
        "Represent the given dialogue about an image, which is used for image retrieval: {dialogue}\n\n",
        "Which image do these two talk about? ",
        MARK + "Represent the given image\n",
    ),
    "CIRR": (
        MARK + "Given an image, find a similar everyday image with the described changes: {change}\n",
        MARK + "Now look for this one: ",
        IMAGE_TARGET,
    ),
    "VisualNews_t2i": ("Retrieve an image of this news caption. {caption}\n", "News photo wanted: ", IMAGE_TARGET),
    "VisualNews_i2t": (
        MARK + "Find a caption for the news in the given photo.\n",
        MARK + "Caption this press photo.\n",
        "{caption}",
    ),
    "MSCOCO_t2i": (
        "Find me an everyday image that matches the given caption: {caption}\n",
        "Image wanted: ",
        IMAGE_TARGET,
    ),
    "MSCOCO_i2t": (
        MARK + "Find an image caption describing the given everyday image.\n",
        MARK + "What would one write under this image?\n",
        "{caption}",
    ),
    "NIGHTS": (
        MARK + "Find a day-to-day image that looks similar to the provided image.\n",
        MARK + "Show me one like this.\n",
        IMAGE_TARGET,
    ),
    "WebQA": (
        MARK + "Find a Wikipedia image that answers this question: {question}\n",
        MARK + "Which image of an encyclopaedia knows this: ",
        MARK + "Represent the given Wikipedia image with related text information: {caption}\n",
    ),
    "MSCOCO": (
        MARK + 'Select the portion of the image that isolates the object labeled as "{label}"\n',
        MARK + 'Cut out the "',
        MARK + "Represent the given cropped image of the object",
    ),
}
WITHOUT_QUERY_IMAGE = ("VisDial", "VisualNews_t2i", "MSCOCO_t2i", "WebQA")
WITH_NEGATIVE_TEXT = (
    "N24News",
    "HatefulMemes",
    "OK-VQA",
    "A-OKVQA",
    "DocVQA",
    "InfographicsVQA",
    "ChartQA",
    "Visual7W",
)


def _mmeb_row(root: Path, name: str, index: int, query: str, pos_text: str, pen: Pen) -> dict[str, str]:
    code = pen.code()
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
    row = dict.fromkeys(MMEB_COLUMNS, "")
    row["qry"], row["pos_text"] = query.format_map(words), pos_text.format_map(words)
    if name not in WITHOUT_QUERY_IMAGE:
        row["qry_image_path"] = _mmeb_image(root, name, f"{name}_image_{index}.jpg", pen.picture(code))
    if pos_text.startswith(MARK):
        suffix = f"{index}_object_{last}.jpg" if name == "MSCOCO" else f"{name}_target_{index}.jpg"
        row["pos_image_path"] = _mmeb_image(root, name, suffix, pen.picture(code))
    if name in WITH_NEGATIVE_TEXT:
        row["neg_text"] = {"HatefulMemes": ("No", "Yes")[index % 2], "N24News": "Music"}.get(name, "a dog")
    if name == "VisDial":
        row["neg_image_path"] = _mmeb_image(root, name, f"{name}_negative_{index}.jpg", pen.picture(pen.code()))
    return row


def _mmeb_image(root: Path, name: str, file: str, image: Image.Image) -> str:
    path = f"images/{name}/Train/{file}"
    return _write_image(root, path, image)


# LLaVA-Hound --------------------------------------------------------------------------------------------------------


def write_llava_hound(root: Path, *, pairs: int, pen: Pen) -> None:
    """Both annotation files and the frames of their videos. The first `pairs` lines of the second file are questions.

    Clip 0 has one frame, clip 1 has 16 whose numbers are not padded (10 after 9), clip 2 is a video file.
    """
    names = [f"v_{pen.code()}-Scene-{index:03d}" if index % 2 else pen.code(11) for index in range(pairs)]
    captions, questions = [], []
    for index, name in enumerate(names):
        code = pen.code(8)
        _write_clip(root / "train_300k", name, index, code, pen)
        captions.append(
            _conversation(
                name,
                name,
                "<video>\nWrite down all that the clip shows.",
                f"The clip shows the digits {' '.join(code)} one by one.",
            )
        )
        ask = "What is the first digit of the clip?"
        human = f"{ask}\n<video>" if index % 2 else f"<video>\n{ask}"  # the mark may come first or last
        answer = f"The first digit is {WORDS[int(code[0])]}."
        questions.append(_conversation(f"{name}_{index % 3}", name, human, answer))
    folder = root / "video_instruction/train/sft"
    _write_lines(folder / "video_caption_300k.jsonl", captions)
    _write_lines(folder / "video_240k_caption_15k.jsonl", questions + captions[: max(1, pairs // 4)])


def _write_clip(folder: Path, name: str, index: int, code: str, pen: Pen) -> None:
    frames = {0: 1, 1: 16}.get(index, 4 + index)
    pictures = [pen.picture(code[number % len(code)], rows=2) for number in range(frames)]
    if index == 2:
        write_video(folder / f"{name}.mp4", pictures)
        return
    for number, picture in enumerate(pictures, start=1):
        file = f"c01_{number}.jpeg" if index == 1 else f"c01_{number:04d}.jpeg"
        _write_image(folder, f"{name}/{file}", picture)


def write_video(path: Path, frames: Sequence[Image.Image], *, fps: int = 2) -> None:
    """An MPEG-4 file of RGB frames."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame.convert("RGB"))))
        container.mux(stream.encode())


def _conversation(row_id: str, video: str, human: str, gpt: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    return {"id": row_id, "video": video, "conversations": turns}


def write_embed_rl(root: Path, *, pairs: int, pen: Pen) -> None:
    """Embed-RL's copies of the three modes with T-CoTs, as one JSON object a line."""
    blank = ["images/blank.jpg"]
    for mode in ("caption_retrieval", "qa", "video_retrieval"):
        rows = []
        for index in range(pairs):
            code = pen.code(3)
            paths = [f"video/{mode}_{index}/c01_{number:04d}.jpeg" for number in (1, 2, 3)]
            frames = [
                _write_image(root, path, pen.picture(digit, rows=2)) for path, digit in zip(paths, code, strict=True)
            ]
            says, shows = f"The digits {' '.join(code)}.", "Understand the content of the provided video:"
            query = {"conversations": [{"from": "human", "value": "<video>\nWhat is shown?"}], "video": frames}
            target = {"conversations": [{"from": "gpt", "value": says}], "video": blank}
            if mode == "video_retrieval":
                query = {"conversations": [{"from": "gpt", "value": says}], "video": blank}
                target = {"conversations": [{"from": "human", "value": f"<video>\n{shows}"}], "video": frames}
            tcots = {
                "query_cot": _tcot(mode != "video_retrieval", code),
                "pos_cot": _tcot(mode == "video_retrieval", code),
            }
            rows.append({"dataset_name": f"llavahound_{mode}", "qry": query, "pos": target, **tcots, "error": ""})
        _write_lines(root / f"llavahound_{mode}.jsonl", rows)


def _tcot(has_video: bool, code: str) -> str:
    evidence = {"key_frames": [1]} if has_video else {"text_keywords": [code[0]]}
    return f"<thinking>{json.dumps(evidence)}</thinking><rethink>ok</rethink><answer>{code}</answer>"


# Documents ----------------------------------------------------------------------------------------------------------

COLPALI_SCHEMA = pa.schema(
    [
        ("image", IMAGE),
        *[
            (name, pa.string())
            for name in (
                "image_filename",
                "query",
                "answer",
                "source",
                "options",
                "page",
                "model",
                "prompt",
                "answer_type",
            )
        ],
    ]
)


def write_colpali(root: Path, *, pairs: int, pen: Pen) -> None:
    """Two training files with rows of all five sources in turn, and the split `test` that nobody may read."""
    rows = [_colpali_row(index, pen) for index in range(pairs)]
    half = (pairs + 1) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        _write_table(root / f"data/train-{number:05d}-of-00002.parquet", part, COLPALI_SCHEMA)
    _write_table(root / "data/test-00000-of-00001.parquet", [_colpali_row(0, pen)], COLPALI_SCHEMA)


def _colpali_row(index: int, pen: Pen) -> dict[str, Any]:
    source = ("pdf", "docvqa", "tatdqa", "Infographic-VQA", "arxiv_qa")[index % 5]
    code = pen.code()
    picture = pen.picture(code, printed=f"{source[:4]} {index}", rows=4)
    row: dict[str, Any] = dict.fromkeys(COLPALI_SCHEMA.names)
    row |= {"source": source, "query": "Which number is on the page?", "answer": code}
    row["image"] = {"bytes": encoded(picture, "PNG" if source == "tatdqa" else "JPEG"), "path": None}
    if source == "pdf":
        row["image"]["path"] = "page_9.jpg"  # the same in many rows
        row |= {"answer": f"['{code[:2]}', '{code[2:]}']", "page": "9", "model": "sonnet", "prompt": "Ask.\n"}
        row["image_filename"] = f"data/pages/{index}.pdf/page_9.jpg"
    elif source == "arxiv_qa":
        letter = "ABCD"[index % 4]
        options = [f"{one}. {code if one == letter else WORDS[number]}" for number, one in enumerate("ABCD")]
        row |= {"answer": letter, "options": str([*options, "-"]), "page": "", "model": "gpt4V", "prompt": ""}
        row["image_filename"] = f"images/1810.{index:05d}_2.jpg"
    elif source == "tatdqa":
        row |= {"page": "1", "model": "", "prompt": "", "answer_type": "span", "answer": f"['{code}']"}
        row["image_filename"] = f"data/tatdqa/{index}.pdf"
    else:
        row |= {"query": f"{row['query']}\nAnswer briefly.", "answer": f"{code}."}
        row["image_filename"] = f"{index:064x}"
    return row


VISRAG_SCHEMA = pa.schema([("query", pa.string()), ("image", IMAGE), ("source", pa.string())])


def write_visrag(root: Path, *, pairs: int, pen: Pen) -> None:
    """Rows of all six sources in turn; the last two ask about the same page."""
    sources = ("ArxivQA", "ChartQA", "MP-DocVQA", "InfoVQA", "PlotQA", "SlideVQA")
    rows: list[dict[str, Any]] = []
    for index in range(pairs):
        code, source = pen.code(), sources[index % len(sources)]
        png = encoded(pen.picture(code, printed=f"{source[:5]} {index}", rows=4), "PNG")
        query = f"On which page is the number {code} ?"
        if index and index == pairs - 1:
            png, source, query = rows[-1]["image"]["bytes"], rows[-1]["source"], "Which page has four digits ?"
        rows.append({"query": query, "image": {"bytes": png, "path": f"{2 * index + 1}.png"}, "source": source})
    _write_table(root / "data/train-00000-of-00001.parquet", rows, VISRAG_SCHEMA)


def _write_table(path: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path, row_group_size=4)


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _write_image(root: Path, path: str, image: Image.Image) -> str:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(encoded(image, "PNG" if path.endswith(".png") else "JPEG"))
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, default=8, help="rows of each file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name, root in write_all(args.out, pairs=args.pairs, seed=args.seed).items():
        print(f"{name}: {root}")


if __name__ == "__main__":
    main()
