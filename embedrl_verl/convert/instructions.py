# SPDX-License-Identifier: Apache-2.0
"""Instructions of the training sources: what they say to queries and targets, and where one ends in a string.

MMEB-train keeps instruction and text in one string, `{instruction} {text}`. A known instruction is split off as the row
spells it, so that instruction, one blank and text give the row's string again. In two cases nothing is guessed:

- Where a set's queries (or targets) have no text of their own, the whole string is the instruction, whatever its words.
- Where they have text and the string does not begin with a known instruction (the split `diverse_instruction`
  paraphrases them), the whole string stays the text and the instruction is empty. The data card counts such pairs.

The strings of MMEB, LLaVA-Hound and the document benchmarks are the public ones. Those of VisRAG's sources are our own
wording: the reference says in other words what kind of page to look for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from embedrl_verl.convert.sources import MMEB_SOURCES

QUESTION = "Represent the given image with the following question:"
CLASSIFY = "Represent the given image for classification"
THE_IMAGE = "Represent the given image."

FIND_PAGE = "Find a document image that matches the given query:"
UNDERSTAND_PAGE = "Understand the content of the provided document image."

VIDEO_QUESTION = "Answer a question based on the content of a video."
FIND_VIDEO = "Find a video that contains the following visual content:"
UNDERSTAND_VIDEO = "Understand the content of the provided video:"


@dataclass(frozen=True)
class MmebTask:
    """What the rows of one set of MMEB-train hold.

    Attributes:
        query: instruction of the queries.
        query_image, query_text: whether queries have an image, and text of their own.
        target: instruction of the targets; "" for plain text.
        target_image, target_text: whether targets have an image, and text of their own.
        answers: targets are short answers or labels, the same for many queries.
        pages: the images are document pages.
    """

    query: str
    query_image: bool = True
    query_text: bool = False
    target: str = ""
    target_image: bool = False
    target_text: bool = True
    answers: bool = False
    pages: bool = False


def _labels(query: str, *, text: bool = False) -> MmebTask:
    return MmebTask(query, query_text=text, answers=True)


def _questions(*, pages: bool = False) -> MmebTask:
    return MmebTask(QUESTION, query_text=True, answers=True, pages=pages)


def _captions(query: str) -> MmebTask:
    return MmebTask(query)


def _images(query: str, *, image: bool, text: bool = True, target: str = THE_IMAGE) -> MmebTask:
    return MmebTask(query, query_image=image, query_text=text, target=target, target_image=True, target_text=False)


MMEB_TASKS = MappingProxyType(
    {
        "ImageNet_1K": _labels(CLASSIFY),
        "N24News": _labels(
            "Represent the given news image with the following caption for domain classification:", text=True
        ),
        "HatefulMemes": _labels(
            "Represent the given image for binary classification to determine whether it constitutes hateful speech "
            "or not"
        ),
        "VOC2007": _labels("Identify the object shown in the image"),
        "SUN397": _labels("Identify the scene shown in the image"),
        "OK-VQA": _questions(),
        "A-OKVQA": _questions(),
        "DocVQA": _questions(pages=True),
        "InfographicsVQA": _questions(pages=True),
        "ChartQA": _questions(),
        "Visual7W": _questions(),
        "VisDial": _images(
            "Represent the given dialogue about an image, which is used for image retrieval:",
            image=False,
            target="Represent the given image",
        ),
        "CIRR": _images("Given an image, find a similar everyday image with the described changes:", image=True),
        "VisualNews_t2i": _images("Retrieve an image of this news caption.", image=False),
        "VisualNews_i2t": _captions("Find a caption for the news in the given photo."),
        "MSCOCO_t2i": _images("Find me an everyday image that matches the given caption:", image=False),
        "MSCOCO_i2t": _captions("Find an image caption describing the given everyday image."),
        "NIGHTS": _images("Find a day-to-day image that looks similar to the provided image.", image=True, text=False),
        "WebQA": MmebTask(
            "Find a Wikipedia image that answers this question:",
            query_image=False,
            query_text=True,
            target="Represent the given Wikipedia image with related text information:",
            target_image=True,
        ),
        "MSCOCO": _images(
            "Select the portion of the image that isolates the object labeled as",
            image=True,
            target="Represent the given cropped image of the object",
        ),
    }
)
if MMEB_TASKS.keys() != MMEB_SOURCES.keys():
    raise RuntimeError("every set of MMEB-train needs a task and a data source")


@dataclass(frozen=True)
class VisRagWords:
    """Our wording for one source of VisRAG: said to the query, and to the page."""

    query: str
    page: str


VISRAG_WORDS = MappingProxyType(
    {
        "ArxivQA": VisRagWords(
            "Find the figure of a scientific paper that answers this question:",
            "Represent this figure of a scientific paper.",
        ),
        "ChartQA": VisRagWords(
            "Find the chart whose numbers or categories answer this question:",
            "Represent this chart of numbers or categories.",
        ),
        "MP-DocVQA": VisRagWords(
            "Find the page of a longer document that answers this question:",
            "Represent this page of a longer document.",
        ),
        "InfoVQA": VisRagWords(
            "Find the infographic that answers this question:",
            "Represent this infographic.",
        ),
        "PlotQA": VisRagWords(
            "Find the plot whose data answer this question:",
            "Represent this plot of data.",
        ),
        "SlideVQA": VisRagWords(
            "Find the presentation slide that answers this question:",
            "Represent this presentation slide.",
        ),
    }
)


def split_instruction(text: str, instruction: str) -> tuple[str, str]:
    """(instruction as the text spells it, rest); ("", text) if the text does not begin with it.

    A final stop or colon may be there or not. What follows must be set off by white space.

    Args:
        text: without placeholders, stripped.
        instruction: the known wording.
    """
    found = _pattern(instruction).fullmatch(text)
    return (found["instruction"], (found["rest"] or "").strip()) if found else ("", text)


@cache
def _pattern(instruction: str) -> re.Pattern[str]:
    words = re.escape(instruction.rstrip(".:"))
    return re.compile(rf"(?P<instruction>{words}[.:]?)(?:\s+(?P<rest>.*))?", re.DOTALL)
