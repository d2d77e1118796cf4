# SPDX-License-Identifier: Apache-2.0
"""The data set that verl trains on: two prompts a pair, `data.custom_cls=TCoTDataset`.

Prompt 2k asks for the T-CoT of pair k's query, prompt 2k + 1 for its target's. Before the first step all media are
loaded once, and a pair with a side over `data.max_prompt_length` is left out as a whole and reported. Other than verl's
own data set it keeps media as references (see `embedrl_verl.data.prompts`) and never takes an error for "too long".

Columns of a row: `raw_prompt`, `index`, `data_source`, `reward_model` and `extra_info` as verl wants them, and

| column | content |
|---|---|
| embedrl_pair_id | str, links the two sides |
| embedrl_side | "query" or "target" |
| embedrl_query_content, embedrl_target_content | int in int64 each, the pair's `ContentId` |
| embedrl_kind | `InputKind`, as "query_image" |
| embedrl_required | evidence key that the T-CoT must hold |
| embedrl_row | "FILE:ROW", where the pair was read |
| embedrl_item | dict, the side's item with media references; `row_item` reads it |
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Dataset
from verl.utils.fs import copy_to_local

from embedrl_verl.config.schema import MediaConfig
from embedrl_verl.data.identity import ContentId
from embedrl_verl.data.inspection import Facts, PairInspector, inspect_rows, raise_if_any
from embedrl_verl.data.lengths import PromptMeter
from embedrl_verl.data.media import MediaLimits
from embedrl_verl.data.prompts import load_prompt_media, prompt_messages
from embedrl_verl.data.schema import SIDES, Item, PairRecord, Video, input_kind
from embedrl_verl.data.table import LocatedPair, PairTable
from embedrl_verl.data.threads import default_threads
from embedrl_verl.errors import ConfigError, DataError
from embedrl_verl.families import Family, resolve_family, token_side
from embedrl_verl.kinds import EVIDENCE_KEY_OF_KIND

logger = logging.getLogger(__name__)
SHOWN = 10


class TCoTDataset(Dataset[dict[str, Any]]):
    """Pair records as prompts for T-CoTs.

    Args:
        data_files: parquet file(s) of pair records.
        tokenizer, processor: the Reasoner's.
        config: verl's `data` section; used keys are `media_root`, `embedrl`, `max_prompt_length`,
            `filter_overlong_prompts`, `apply_chat_template_kwargs`, `mm_processor_kwargs`, `cache_dir`, `shuffle`,
            `seed`.
        max_samples: prompts to use (two a pair), drawn by `seed` if `shuffle` is on (of `val_files` also by
            `validation_shuffle`), else the first; -1 for all.

    Attributes:
        pair_sources, pair_ids, contents: data source, id and `ContentId` of each pair.
        overlong: pairs left out, with the tokens of the sides that are too long; left_out: their number by source.
        fingerprint: hash of the pairs and their content, in order.
    """

    def __init__(
        self,
        data_files: str | Sequence[str],
        tokenizer: Any,
        config: Any,
        processor: Any = None,
        max_samples: int = -1,
    ) -> None:
        self.settings = MediaConfig.from_config(config)
        self.family = resolve_family(self.settings.family, processor)
        _check_token_side(self.family, processor)
        self.media_root = media_root_of(config)
        files = [data_files] if isinstance(data_files, str) else list(data_files)
        local_files = [copy_to_local(src=file, cache_dir=config.get("cache_dir")) for file in files]
        self._table = PairTable(local_files)
        raise_if_any([problem.message for problem in self._table.problems().values()], local_files[0])
        if not len(self._table):
            raise DataError(f"no pair records in {', '.join(local_files)}")
        numbers = _select(len(self._table), max_samples, config, shuffle=_is_shuffled(files, config))
        facts = self._inspect(numbers, PromptMeter(tokenizer, processor, self.family, config), config)
        self._facts = facts = self._without_overlong(facts, int(config.get("max_prompt_length", 1024)))
        self.contents = [ContentId(*content) for content in facts["content"].tolist()]
        self.pair_sources = self._column("data_source", facts["row"])
        self.pair_ids = self._column("pair_id", facts["row"])
        self.fingerprint = hashlib.sha256(facts["digest"].tobytes()).hexdigest()[:16]

    def _column(self, name: str, numbers: Sequence[int] | npt.NDArray[np.int64]) -> list[str]:
        found: list[str] = self._table.column(name).take(pa.array(numbers, pa.int64())).to_pylist()
        return found

    def _inspect(self, numbers: Sequence[int], meter: PromptMeter, config: Any) -> Facts:
        count_all = config.get("filter_overlong_prompts", True)
        inspector = PairInspector(self.settings, self.family, self.media_root, meter if count_all else None)
        facts, errors = inspect_rows(self._table, numbers, inspector, default_threads())
        raise_if_any(errors, self._table.files[0])
        if not count_all:  # the processor is still proved to take fitted media as they are
            PairInspector(self.settings, self.family, self.media_root, meter).inspect(self._pair(numbers[0]))
        return facts

    def _pair(self, number: int) -> LocatedPair:
        pair = self._table[int(number)]
        assert isinstance(pair, LocatedPair)
        return pair

    def record(self, pair: int) -> PairRecord:
        """The record of a pair, by its place among those that are left."""
        return self._pair(self._facts["row"][pair]).record

    def _without_overlong(self, facts: Facts, limit: int) -> Facts:
        """The pairs whose prompts fit; the others are reported, and a source of which none is left is an error."""
        fits = (facts["tokens"] <= limit).all(axis=1)
        self.overlong = {
            str(self._pair(row)): {side: count for side, count in zip(SIDES, tokens, strict=True) if count > limit}
            for row, tokens in zip(facts["row"][~fits], facts["tokens"][~fits].tolist(), strict=True)
        }
        self.left_out = dict(Counter(self._column("data_source", facts["row"][~fits])))
        if self.overlong:
            listed = [
                f"{name} ({', '.join(f'{side} {tokens}' for side, tokens in sides.items())})"
                for name, sides in list(self.overlong.items())[:SHOWN]
            ]
            message = (
                f"{len(self.overlong)} of {len(facts)} pairs have a prompt over data.max_prompt_length={limit} tokens "
                f"and are left out: {'; '.join(listed)}{'; ...' if len(self.overlong) > SHOWN else ''}"
            )
            total = Counter(self._column("data_source", facts["row"]))
            gone = sorted(source for source, count in self.left_out.items() if count == total[source])
            if gone:
                raise DataError(
                    f"{message}. Nothing is left of {', '.join(gone)}: raise data.max_prompt_length, lower "
                    "data.embedrl.*_max_tokens, or leave the source out"
                )
            logger.warning(message)
        return facts[fits]

    @property
    def first_video(self) -> str | None:
        """Name of the first pair with a video; None without one."""
        rows = pa.array(self._facts["row"])
        videos = [pc.is_valid(pc.struct_field(self._table.column(side).take(rows), "video")) for side in SIDES]
        place = pc.index(pc.or_(*videos), True).as_py()
        return None if place < 0 else str(self._pair(self._facts["row"][place]))

    def __len__(self) -> int:
        """Prompts: two a pair."""
        return 2 * len(self._facts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        facts, side = self._facts[index // 2], SIDES[index % 2]
        pair = self._pair(facts["row"])
        record, content = pair.record, self.contents[index // 2]
        kind = input_kind(record, side)
        partner = record.target if side == "query" else record.query
        messages = prompt_messages(
            record,
            side,
            family=self.family,
            style=self.settings.prompt_style,
            few_shot=self.settings.few_shot,
            max_frames=self.settings.max_frames,
            file_frames=int(facts["frames"][index % 2]),
        )
        return {
            "raw_prompt": messages,
            "index": index,
            "data_source": record.data_source,
            "reward_model": {"style": "rule", "ground_truth": partner.text or record.target_id or record.pair_id},
            "extra_info": {"index": index, "pair_id": record.pair_id, "side": side},
            "embedrl_pair_id": record.pair_id,
            "embedrl_side": side,
            "embedrl_query_content": content.query,
            "embedrl_target_content": content.target,
            "embedrl_kind": kind,
            "embedrl_required": EVIDENCE_KEY_OF_KIND[kind],
            "embedrl_row": f"{pair.file}:{pair.row}",
            "embedrl_item": asdict(record.item(side)),
        }

    @classmethod
    async def process_multi_modal_info(
        cls, messages: list[dict[str, Any]], image_patch_size: int, config: Any
    ) -> tuple[list[Any] | None, list[Any] | None, None]:
        """For verl's agent loops: (images, videos, audios) of a prompt, fitted to the limits of `data.embedrl`."""
        media = MediaConfig.from_config(config)
        limits = MediaLimits.of(media, 2 * image_patch_size, media.max_frames)
        loop = asyncio.get_running_loop()
        images, videos = await loop.run_in_executor(None, load_prompt_media, messages, limits, media_root_of(config))
        return images, videos, None


def row_item(row: Mapping[str, Any]) -> Item:
    """The item of a row (column `embedrl_item`: the queue makes dicts and lists of data classes and tuples)."""
    values = dict(row["embedrl_item"])
    video = values["video"]
    values["images"] = tuple(values["images"])
    if video is not None:
        values["video"] = Video(**{**video, "frames": tuple(video["frames"])})
    return Item(**values)


def media_root_of(config: Any) -> str | None:
    """`data.media_root`; None if unset or empty."""
    return str(config.get("media_root") or "") or None


def _check_token_side(family: Family, processor: Any) -> None:
    found = processor.image_processor.patch_size * processor.image_processor.merge_size
    if found != token_side(family):
        raise ConfigError(
            f"data.embedrl.family={family} has visual tokens of {token_side(family)} px a side, but the processor's "
            f"have {found} px; set the model's own family, or auto"
        )


def _is_shuffled(files: Sequence[str], config: Any) -> bool:
    """As in verl `data.shuffle` draws both subsets, so that no source is lost; `validation_shuffle` that of `val_files`
    by itself. (verl gives a data set the section `data` and not what it is for.)"""
    validation = config.get("val_files")
    named = [validation] if isinstance(validation, str) else list(validation or ())
    return bool(config.get("shuffle") or (files == named and config.get("validation_shuffle")))


def _select(total: int, max_samples: int, config: Any, *, shuffle: bool) -> Sequence[int]:
    """Numbers of rows, the same in every process and at every start, without a `data.seed` too."""
    wanted = max_samples // 2
    if max_samples < 0 or wanted >= total:
        return range(total)
    if wanted == 0:
        raise ConfigError(f"max_samples counts prompts, two a pair, so it must be at least 2 or -1; got {max_samples}")
    if not shuffle:
        return range(wanted)
    if (config.get("seed") or 0) < 0:
        raise ConfigError(f"data.seed must not be negative; got {config.seed}")
    chosen = np.random.default_rng(config.get("seed") or 0).choice(total, size=wanted, replace=False)
    return [int(number) for number in sorted(chosen)]
