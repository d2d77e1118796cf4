# SPDX-License-Identifier: Apache-2.0
"""Published scores by task give the published averages (arXiv 2602.13823, 2510.27571, and VLM2Vec's score files)."""

from __future__ import annotations

import pytest

from embedrl_verl.errors import DataError
from embedrl_verl.evaluation.benchmarks import mmeb_v2, uvrb

MODELS = ("Embed-RL-2B", "Embed-RL-4B", "VLM2Vec-V2", "GME-2B", "GME-7B")
# name, queries, and the score of each model
SCORES = """
ImageNet-1K 1000 78.00 79.50 80.80 58.10 64.70
N24News 1000 44.90 48.30 73.00 50.30 50.30
HatefulMemes 1000 65.00 66.20 55.80 53.70 53.90
VOC2007 1000 78.70 79.50 84.90 75.80 80.10
SUN397 1000 75.40 79.20 70.90 67.00 69.40
Place365 1000 43.90 43.10 36.10 36.10 39.10
ImageNet-A 1000 59.20 58.10 47.60 28.40 40.60
ImageNet-R 1000 88.50 88.20 89.30 78.50 83.90
ObjectNet 1000 74.80 75.40 65.10 71.20 69.00
Country211 1000 20.00 19.40 25.80 26.40 24.60
OK-VQA 1000 61.40 67.30 51.70 30.10 33.10
A-OKVQA 1000 54.70 59.30 44.00 18.60 20.80
DocVQA 1000 92.40 94.30 90.10 30.00 41.10
InfographicsVQA 1000 76.70 77.50 59.10 11.80 20.50
ChartQA 1000 80.70 80.90 48.10 13.30 17.70
Visual7W 1000 52.70 55.30 52.80 15.60 22.20
ScienceQA 1000 57.30 61.60 38.10 27.10 28.20
VizWiz 1000 54.50 56.20 43.30 37.10 38.90
GQA 1000 64.90 68.50 65.40 75.30 76.80
TextVQA 1000 83.80 84.30 71.60 39.50 46.40
VisDial 1000 81.50 84.90 82.70 47.70 60.90
CIRR 1000 47.60 61.20 57.30 43.10 54.90
VisualNews_t2i 1000 71.90 73.70 74.70 74.80 79.50
VisualNews_i2t 1000 73.60 73.90 78.30 77.70 83.60
MSCOCO_t2i 1000 79.40 78.90 75.90 68.30 71.50
MSCOCO_i2t 1000 75.30 76.30 71.10 63.20 57.40
NIGHTS 1000 66.30 66.40 68.40 67.60 67.60
WebQA 1000 89.30 90.50 90.60 88.80 91.30
FashionIQ 1000 24.00 31.90 19.60 32.20 37.60
Wiki-SS-NQ 1000 68.90 69.60 67.60 73.80 78.40
OVEN 1000 61.40 60.70 64.80 72.10 75.60
EDIS 1000 84.50 87.40 84.20 91.70 96.10
MSCOCO 1000 92.90 93.60 66.20 28.40 31.40
RefCOCO 1000 94.90 95.90 87.00 55.80 61.20
RefCOCO-Matching 1000 85.80 88.00 86.30 73.70 78.70
Visual7W-Pointing 1000 88.00 87.90 69.00 64.60 66.50
K700 1000 55.80 56.80 38.20 34.90 39.60
SmthSmthV2 1000 56.70 59.50 43.00 30.10 30.50
HMDB51 1000 56.70 60.10 40.20 43.00 48.00
UCF101 1000 79.30 78.50 60.00 52.10 54.40
Breakfast 433 36.72 33.03 14.78 13.63 13.86
MVBench 4000 50.82 55.93 33.62 37.57 46.30
Video-MME 2700 47.11 50.48 30.81 33.96 39.19
NExTQA 8564 53.92 58.22 20.88 39.40 53.51
EgoSchema 500 53.00 52.80 35.00 40.60 46.40
ActivityNetQA 1000 74.80 74.40 53.00 57.20 66.00
DiDeMo 1004 45.32 46.81 29.98 21.51 26.29
MSR-VTT 1000 45.70 46.20 27.80 27.00 31.80
MSVD 670 67.16 65.82 47.31 47.31 49.55
VATEX 4478 43.64 43.39 26.15 23.05 24.74
YouCook2 3179 23.50 23.31 10.63 7.90 8.93
QVHighlight 1083 70.73 73.59 49.68 43.95 59.37
Charades-STA 727 26.41 25.03 20.08 14.31 13.89
MomentSeeker 1602 50.94 49.94 42.88 37.14 39.33
ViDoRe_arxivqa 500 86.12 88.74 78.87 82.53 87.53
ViDoRe_docvqa 451 45.74 47.54 37.06 55.16 56.59
ViDoRe_infovqa 494 86.83 86.89 82.71 90.69 92.17
ViDoRe_tabfquad 280 94.53 94.68 87.77 93.31 92.71
ViDoRe_tatdqa 1646 54.62 54.81 44.29 70.26 76.58
ViDoRe_shiftproject 100 70.72 69.01 61.04 92.85 95.64
ViDoRe_syntheticDocQA_artificial_intelligence 100 94.02 91.56 89.12 98.13 99.63
ViDoRe_syntheticDocQA_energy 100 86.73 88.12 86.29 92.56 95.69
ViDoRe_syntheticDocQA_government_reports 100 89.03 90.73 85.58 97.15 99.50
ViDoRe_syntheticDocQA_healthcare_industry 100 91.11 90.36 91.13 98.52 99.50
ViDoRe_esg_reports_human_labeled_v2 52 56.87 59.75 45.79 60.29 62.76
ViDoRe_biomedical_lectures_v2_multilingual 640 51.01 50.12 44.59 53.99 49.78
ViDoRe_economics_reports_v2_multilingual 232 53.01 53.90 42.33 50.80 53.91
ViDoRe_esg_reports_v2_multilingual 228 46.93 49.69 45.74 50.43 55.43
VisRAG_ArxivQA 816 84.91 86.88 76.74 81.95 87.69
VisRAG_ChartQA 63 88.34 88.53 84.20 79.09 81.29
VisRAG_MP-DocVQA 591 79.12 79.31 71.80 84.34 89.08
VisRAG_SlideVQA 556 92.26 92.62 91.44 93.68 94.72
VisRAG_InfoVQA 718 89.97 89.59 85.88 91.41 93.49
VisRAG_PlotQA 863 73.04 72.37 65.91 64.12 63.44
ViDoSeek-page-fixed 1142 82.04 84.42 80.30 79.81 83.57
ViDoSeek-doc 1142 82.59 82.44 80.34 82.49 82.99
MMLongBench-page-fixed 838 47.67 50.95 44.70 51.32 55.32
MMLongBench-doc 838 50.33 50.73 42.85 51.90 53.40
"""
COLUMNS = (
    "image/CLS image/QA image/RET image/VG video/CLS video/QA video/RET video/MRET visdoc/V1 visdoc/V2 visdoc/VisRAG"
    " visdoc/OOD image video visdoc All IND OOD"
)
AVERAGES = """
62.84 67.91 68.64 90.40 57.04 55.93 45.06 49.36 79.95 51.95 84.61 65.66 69.24 52.13 74.06 66.78 71.92 65.90
63.69 70.52 71.28 91.35 57.59 58.37 45.11 49.52 80.24 53.37 84.88 67.14 71.19 52.99 74.74 68.08 74.33 67.26
62.93 56.42 69.60 77.12 39.24 34.66 28.37 37.55 74.39 44.61 79.33 62.05 64.92 34.67 68.60 59.07 68.82 60.05
54.55 29.84 66.75 55.62 34.75 41.75 25.35 31.80 87.12 53.88 82.43 66.38 51.87 33.59 76.95 55.37 49.20 55.22
57.56 34.57 71.20 59.45 37.27 50.28 28.26 37.53 89.55 55.47 84.95 68.82 55.93 38.43 79.27 59.07 53.60 58.85
"""
ROWS = [line.split() for line in SCORES.strip().splitlines()]


def by_task(model: int) -> dict[str, float]:
    return {row[0]: float(row[2 + model]) for row in ROWS}


@pytest.mark.parametrize("model", range(5), ids=MODELS)
def test_published_scores_of_mmeb_v2_give_the_published_averages(model: int) -> None:
    published = dict(zip(COLUMNS.split(), map(float, AVERAGES.strip().splitlines()[model].split()), strict=True))
    published |= {f"image {domain}": published.pop(domain) for domain in ("IND", "OOD")}
    found = mmeb_v2.averages(by_task(model) | {"MomentSeeker_1k8": 0.0})
    assert found.keys() == published.keys()
    assert found == pytest.approx(published, abs=0.0051)


def test_an_average_is_there_only_if_all_its_tasks_are_and_unknown_names_are_refused() -> None:
    scores = by_task(0)
    del scores["ViDoSeek-page-fixed"]
    found = mmeb_v2.averages(scores)
    assert not {"visdoc/OOD", "visdoc", "All"} & found.keys() and {"visdoc/V1", "image", "video"} <= found.keys()
    with pytest.raises(DataError, match=r"tasks of MMEB-V2; MSRVTT are none"):
        mmeb_v2.averages({"MSRVTT": 1.0})
    with pytest.raises(DataError, match=r"sets of UVRB; K700 are none"):
        uvrb.averages({"K700": 1.0})


def test_the_tables_have_the_published_numbers_of_tasks() -> None:
    counts = [sum(task.modality == modality for task in mmeb_v2.TASKS.values()) for modality in mmeb_v2.MODALITIES]
    assert counts == [36, 18, 24] and len(uvrb.TASKS) == 16
    assert sum(task.in_domain for task in mmeb_v2.TASKS.values()) == 20
    assert {mmeb_v2.official_name(task.name): task.queries for task in mmeb_v2.TASKS.values()} == {
        row[0]: int(row[1]) for row in ROWS
    }
    assert [task.name for task in mmeb_v2.TASKS.values() if task.modality == "video" and task.is_local] == [
        *("SmthSmthV2", "MVBench", "Video-MME", "NExTQA", "EgoSchema", "ActivityNetQA"),
        *("QVHighlight", "Charades-STA", "MomentSeeker"),
    ]


UVRB_SCORES = {
    "Embed-RL-2B": "43.7 42.2 91.4 89.7 84.6 49.4 36.5 31.8 56.5 33.6 80.0 93.8 19.3 21.0 89.1 51.4",
    "Embed-RL-4B": "44.0 46.1 92.1 89.9 85.9 53.8 38.2 32.0 57.9 31.9 77.0 95.2 15.8 21.0 87.9 49.0",
    "GVE-3B": "43.1 37.6 85.0 84.6 78.6 49.6 36.3 28.0 52.2 33.0 61.0 91.8 34.0 26.8 89.1 40.3",
    "GVE-7B": "46.4 43.3 86.5 84.7 79.4 53.9 39.8 30.2 54.2 41.3 68.0 94.8 34.3 28.0 89.9 41.5",
    "GME-2B": "39.0 30.3 69.0 71.8 71.5 40.0 29.8 24.0 44.6 35.4 53.0 83.9 35.0 34.0 82.7 36.6",
}
UVRB_COLUMNS = "D-AVG;A-AVG;A-AVG (flat);TXT;TXT (flat);CMP;VIS;CG;FG;FG (flat);LC;S;T;PR"
UVRB_AVERAGES = {
    "Embed-RL-2B": "57.12 60.16 58.68 67.64 61.10 20.15 70.25 59.10 56.91 54.59 86.90 87.15 42.95 40.63",
    "Embed-RL-4B": "57.36 60.03 58.56 68.33 62.00 18.40 68.45 60.73 58.17 55.66 86.10 87.90 46.00 40.60",
    "GVE-3B": "54.44 57.12 55.87 61.91 56.73 30.40 64.70 55.23 54.09 51.76 76.40 81.60 42.95 37.73",
    "GVE-7B": "57.26 59.93 58.66 65.69 60.21 31.15 65.70 58.73 56.93 54.79 81.40 82.05 46.85 41.90",
    "GME-2B": "48.79 51.61 50.56 53.87 49.36 34.50 59.65 46.10 47.07 45.30 68.45 71.65 34.90 34.67",
}


@pytest.mark.parametrize("model", UVRB_SCORES)
def test_published_scores_of_uvrb_give_both_averages(model: str) -> None:
    names = [name.replace("-", "_") for name in uvrb.TASKS]  # as its folders are named
    found = uvrb.averages(dict(zip(names, map(float, UVRB_SCORES[model].split()), strict=True)))
    published = dict(zip(UVRB_COLUMNS.split(";"), map(float, UVRB_AVERAGES[model].split()), strict=True))
    assert found.keys() == published.keys()
    assert found == pytest.approx(published, abs=0.0051)
