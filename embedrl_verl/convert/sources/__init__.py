# SPDX-License-Identifier: Apache-2.0
"""The public sources, one converter each; their facts are those of docs/data.md. Here are the names of the data sources
that they write, and nowhere else.

A batch of training holds one data source, caps and weights are by data source, and metrics are reported by it.
"""

from types import MappingProxyType

MMEB_SOURCES = MappingProxyType(
    {
        "ImageNet_1K": "mmeb_imagenet_1k",
        "N24News": "mmeb_n24news",
        "HatefulMemes": "mmeb_hatefulmemes",
        "VOC2007": "mmeb_voc2007",
        "SUN397": "mmeb_sun397",
        "OK-VQA": "mmeb_okvqa",
        "A-OKVQA": "mmeb_aokvqa",
        "DocVQA": "mmeb_docvqa",
        "InfographicsVQA": "mmeb_infographicsvqa",
        "ChartQA": "mmeb_chartqa",
        "Visual7W": "mmeb_visual7w",
        "VisDial": "mmeb_visdial",
        "CIRR": "mmeb_cirr",
        "VisualNews_t2i": "mmeb_visualnews_t2i",
        "VisualNews_i2t": "mmeb_visualnews_i2t",
        "MSCOCO_t2i": "mmeb_mscoco_t2i",
        "MSCOCO_i2t": "mmeb_mscoco_i2t",
        "NIGHTS": "mmeb_nights",
        "WebQA": "mmeb_webqa",
        "MSCOCO": "mmeb_mscoco",
    }
)
"""MMEB-train: name of the set (a folder of the hub repository) to data source. MSCOCO is visual grounding."""

LLAVAHOUND_CAPTION_RETRIEVAL = "llavahound_caption_retrieval"
LLAVAHOUND_QA = "llavahound_qa"
LLAVAHOUND_VIDEO_RETRIEVAL = "llavahound_video_retrieval"
LLAVAHOUND_SOURCES = (LLAVAHOUND_CAPTION_RETRIEVAL, LLAVAHOUND_QA, LLAVAHOUND_VIDEO_RETRIEVAL)

COLPALI = "vidore_colpali"
"""Page and question to answer, the reading of the reference mixture."""
COLPALI_PAGES = "vidore_colpali_pages"
"""Question to page, the reading of the retrieval tests; the rows are the same, the data source is not."""

VISRAG = "visrag"

ALL_SOURCES = (*MMEB_SOURCES.values(), *LLAVAHOUND_SOURCES, COLPALI, COLPALI_PAGES, VISRAG)
