# SPDX-License-Identifier: Apache-2.0
"""MMEB-V2 (arXiv 2507.04590): 78 tasks as one table, and its averages.

Image and video tasks are scored by Hit@1, document pages by nDCG@5 with linear gain. A group's, a modality's and the
whole score are each the plain mean over their tasks. The `-page` sets are the fixed ones of 2025-11-03.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping

from embedrl_verl.errors import DataError
from embedrl_verl.evaluation.benchmarks.task import Task

NAME = "mmeb_v2"
MODALITIES = ("image", "video", "visdoc")
IMAGE_COLUMNS = ("qry_inst", "qry_text", "qry_img_path", "tgt_inst", "tgt_text", "tgt_img_path")
PAGE_FIXED = ("ViDoSeek-page", "MMLongBench-page")
"""Tasks whose official name ends in -fixed too."""
RETIRED = "MomentSeeker_1k8"
"""A 19th video entry of old score files."""

# name, group, in or out of the training mixture's domain, query -> target, candidates of a query. Instructions are in
# the rows.
_IMAGE = """
ImageNet-1K CLS IND I T 1000
N24News CLS IND IT T 24
HatefulMemes CLS IND I T 2
VOC2007 CLS IND I T 20
SUN397 CLS IND I T 397
Place365 CLS OOD I T 365
ImageNet-A CLS OOD I T 1000
ImageNet-R CLS OOD I T 200
ObjectNet CLS OOD I T 313
Country211 CLS OOD I T 211
OK-VQA QA IND IT T 1000
A-OKVQA QA IND IT T 1000
DocVQA QA IND IT T 1000
InfographicsVQA QA IND IT T 1000
ChartQA QA IND IT T 1000
Visual7W QA IND IT T 1000
ScienceQA QA OOD IT T 1000
VizWiz QA OOD IT T 1000
GQA QA OOD IT T 1000
TextVQA QA OOD IT T 1000
VisDial RET IND T I 1000
CIRR RET IND IT I 1000
VisualNews_t2i RET IND T I 1000
VisualNews_i2t RET IND I T 1000
MSCOCO_t2i RET IND T I 1000
MSCOCO_i2t RET IND I T 1000
NIGHTS RET IND I I 1000
WebQA RET IND T IT 1000
FashionIQ RET OOD IT I 1000
Wiki-SS-NQ RET OOD T I 1000
OVEN RET OOD IT IT 1000
EDIS RET OOD T IT 1000
MSCOCO VG IND IT I 1000
RefCOCO VG OOD IT I 1000
RefCOCO-Matching VG OOD IT IT 1000
Visual7W-Pointing VG OOD IT I 1000
"""

# name, group, reader, repository, config, split, columns, l(ocal) or g(lobal), queries, candidates, folder of frames,
# instruction
_VIDEO = """
K700|CLS|labels|VLM2Vec/Kinetics-700||test|video_id pos_text|g|1000|700|video_cls/K700|Recognize the category of the video content.
SmthSmthV2|CLS|labels|VLM2Vec/SmthSmthV2||test|video_id pos_text neg_text|l|1000|174|video_cls/SSv2|What actions or object interactions are being performed by the person in the video?
HMDB51|CLS|labels|VLM2Vec/HMDB51||test|video_id pos_text|g|1000|51|video_cls/HMDB51|What actions or objects interactions are the person in the video doing?
UCF101|CLS|labels|VLM2Vec/UCF101||test|video_id pos_text|g|1000|101|video_cls/UCF101|What activities or sports are being performed by the person in the video?
Breakfast|CLS|labels|VLM2Vec/Breakfast||test|video_id pos_text|g|433|10|video_cls/Breakfast|Recognize the breakfast type that the person is cooking in the video.
MVBench|QA|questions|VLM2Vec/MVBench|{mvbench}|train|video question answer candidates|l|4000|0|video_qa/MVBench|{question}
Video-MME|QA|questions|VLM2Vec/Video-MME||test|videoID question options answer|l|2700|4|video_qa/Video-MME|{question}
NExTQA|QA|questions|VLM2Vec/NExTQA|MC|test|video question answer a0 a1 a2 a3 a4|l|8564|5|video_qa/NExTQA|{question}
EgoSchema|QA|questions|VLM2Vec/EgoSchema|Subset|test|video_idx question answer option|l|500|5|video_qa/EgoSchema|{question}
ActivityNetQA|QA|questions|VLM2Vec/ActivityNetQA||test|video_name question answer|l|1000|2|video_qa/ActivityNetQA|{question}
DiDeMo|RET|captions|VLM2Vec/DiDeMo||test|video caption|g|1004|1004|video_ret/DiDeMo|Find a video that includes the following described scenes:
MSR-VTT|RET|captions|VLM2Vec/MSR-VTT|test_1k|test|video_id caption|g|1000|1000|video_ret/MSR-VTT|Find a video that contains the following visual content:
MSVD|RET|captions|VLM2Vec/MSVD||test|video_id caption|g|670|670|video_ret/MSVD|Find the video snippet that corresponds to the given summary:
VATEX|RET|captions|VLM2Vec/VATEX||test|videoID enCap|g|4478|4478|video_ret/VATEX|Select a video that fits the description provided:
YouCook2|RET|captions|lmms-lab/YouCook2||val|id sentence|g|3179|3179|video_ret/YouCook2|Find a video that demonstrates the following action while making a recipe:
QVHighlight|MRET|moments|VLM2Vec/QVHighlight||test|query video_path|l|1083|10|video_mret/QVHighlight|Find the clip that corresponds to the described scene in the given video:
Charades-STA|MRET|moments|VLM2Vec/Charades-STA||test|query video_path|l|727|10|video_mret/Charades_STA|Find the clip that corresponds to the described scene in the given video:
MomentSeeker|MRET|moment_seeker|VLM2Vec/MomentSeeker||test|query input_frames positive_frames negative_frames|l|1602|0|video_mret/MomentSeeker|
"""  # noqa: E501
MVBENCH = (
    "episodic_reasoning,action_sequence,action_prediction,action_antonym,fine_grained_action,unexpected_action,"
    "object_existence,object_interaction,object_shuffle,moving_direction,action_localization,scene_transition,"
    "action_count,moving_count,moving_attribute,state_change,fine_grained_pose,character_order,egocentric_navigation,"
    "counterfactual_inference"
)
_QUESTION = (
    "Given a video and a question, select the most accurate answer from the provided candidates. Return only the exact "
    "text of your chosen answer. Question:"
)
_TARGETS = {
    "captions": "Understand the content of the provided video.",
    "moments": "Understand the content of the provided video.",
    "moment_seeker": "Understand the content of the provided video clip.",
}

# name, group, repository, split, queries, pages (0: not known)
_PAGES = """
ViDoRe_arxivqa V1 vidore/arxivqa_test_subsampled_beir test 500 500
ViDoRe_docvqa V1 vidore/docvqa_test_subsampled_beir test 451 500
ViDoRe_infovqa V1 vidore/infovqa_test_subsampled_beir test 494 500
ViDoRe_tabfquad V1 vidore/tabfquad_test_subsampled_beir test 280 70
ViDoRe_tatdqa V1 vidore/tatdqa_test_beir test 1646 277
ViDoRe_shiftproject V1 vidore/shiftproject_test_beir test 100 1000
ViDoRe_syntheticDocQA_artificial_intelligence V1 vidore/syntheticDocQA_artificial_intelligence_test_beir test 100 968
ViDoRe_syntheticDocQA_energy V1 vidore/syntheticDocQA_energy_test_beir test 100 977
ViDoRe_syntheticDocQA_government_reports V1 vidore/syntheticDocQA_government_reports_test_beir test 100 972
ViDoRe_syntheticDocQA_healthcare_industry V1 vidore/syntheticDocQA_healthcare_industry_test_beir test 100 965
ViDoRe_esg_reports_human_labeled_v2 V2 vidore/esg_reports_human_labeled_v2 test 52 1538
ViDoRe_biomedical_lectures_v2_multilingual V2 vidore/biomedical_lectures_v2 test 640 1016
ViDoRe_economics_reports_v2_multilingual V2 vidore/economics_reports_v2 test 232 452
ViDoRe_esg_reports_v2_multilingual V2 vidore/esg_reports_v2 test 228 1538
VisRAG_ArxivQA VisRAG openbmb/VisRAG-Ret-Test-ArxivQA train 816 8066
VisRAG_ChartQA VisRAG openbmb/VisRAG-Ret-Test-ChartQA train 63 500
VisRAG_MP-DocVQA VisRAG openbmb/VisRAG-Ret-Test-MP-DocVQA train 591 741
VisRAG_SlideVQA VisRAG openbmb/VisRAG-Ret-Test-SlideVQA train 556 1284
VisRAG_InfoVQA VisRAG openbmb/VisRAG-Ret-Test-InfoVQA train 718 459
VisRAG_PlotQA VisRAG openbmb/VisRAG-Ret-Test-PlotQA train 863 9593
ViDoSeek-page OOD VLM2Vec/ViDoSeek-page-fixed test 1142 0
ViDoSeek-doc OOD VLM2Vec/ViDoSeek test 1142 0
MMLongBench-page OOD VLM2Vec/MMLongBench-page-fixed test 838 0
MMLongBench-doc OOD VLM2Vec/MMLongBench-doc test 838 0
"""


def _tasks() -> Iterator[Task]:
    for line in _IMAGE.strip().splitlines():
        name, group, domain, query, target, candidates = line.split()
        yield Task(
            name,
            "image",
            group,
            "image",
            "ziyjiang/MMEB_Test_Instruct",
            config=name,
            columns=IMAGE_COLUMNS,
            is_local=True,
            queries=1000,
            candidates=int(candidates),
            media="TIGER-Lab/MMEB-V2/image-tasks",
            form=(query, target),
            in_domain=domain == "IND",
        )
    for line in _VIDEO.format(mvbench=MVBENCH, question=_QUESTION).strip().splitlines():
        name, group, reader, repo, config, split, named, where, queries, candidates, frames, said = line.split("|")
        yield Task(
            name,
            "video",
            group,
            reader,
            repo,
            config=config or None,
            split=split,
            columns=tuple(named.split()),
            is_local=where == "l",
            queries=int(queries),
            candidates=int(candidates),
            media=f"TIGER-Lab/MMEB-V2/video-tasks/frames/{frames}",
            instruction=said,
            target_instruction=_TARGETS.get(reader, ""),
            finds_video=reader in _TARGETS,
            file="momentseeker_1k6.jsonl" if reader == "moment_seeker" else "",
        )
    for line in _PAGES.strip().splitlines():
        name, group, repo, split, queries, pages = line.split()
        yield Task(
            name,
            "visdoc",
            group,
            "pages",
            repo,
            split=split,
            queries=int(queries),
            candidates=int(pages),
            instruction="Find a document image that matches the given query:",
            target_instruction="Understand the content of the provided document image.",
            metric="ndcg_linear@5",
        )


TASKS: Mapping[str, Task] = {task.name: task for task in _tasks()}


def official_name(task: str) -> str:
    """As the leaderboard has it."""
    return f"{task}-fixed" if task in PAGE_FIXED else task


def averages(scores: Mapping[str, float]) -> dict[str, float]:
    """The averages of which all tasks are there, in the unit of the scores: "image/CLS" ..., "image" ..., "image IND"
    and "image OOD", "All".

    Args:
        scores: by task, under its own or its official name; the retired MomentSeeker_1k8 is left out.

    Raises:
        DataError: a name is no task.
    """
    own = {official_name(name): name for name in TASKS} | {name: name for name in TASKS}
    if unknown := sorted(set(scores) - set(own) - {RETIRED}):
        raise DataError(f"scores must be of tasks of MMEB-V2; {', '.join(unknown)} are none")
    known = {own[name]: score for name, score in scores.items() if name != RETIRED}
    columns: dict[str, list[str]] = {}
    for task in TASKS.values():
        names = [f"{task.modality}/{task.group}", task.modality, "All"]
        if task.modality == "image":
            names.append("image IND" if task.in_domain else "image OOD")
        for name in names:
            columns.setdefault(name, []).append(task.name)
    return {
        name: statistics.fmean(known[task] for task in tasks)
        for name, tasks in columns.items()
        if all(task in known for task in tasks)
    }
