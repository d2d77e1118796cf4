# SPDX-License-Identifier: Apache-2.0
"""The data set with real tokenizers and processors of the three families (tiny models made on the spot)."""

import asyncio
import pickle

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from torchdata.stateful_dataloader import StatefulDataLoader
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.rl_dataset import collate_fn, get_dataset_class
from verl.utils.tokenizer import hf_processor, hf_tokenizer
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder
from verl.workers.rollout.utils import qwen2_5_vl_dedup_image_tokens

from embedrl_verl.data.dataset import TCoTDataset, row_item
from embedrl_verl.data.lengths import served_prompt_ids
from embedrl_verl.data.media import load_item
from embedrl_verl.data.sampler import PairBatchSampler
from embedrl_verl.data.schema import Item, Video
from embedrl_verl.data.writer import write_pairs
from embedrl_verl.errors import ConfigError, DataError
from recipes.tiny_digits.models import build_tiny_model
from tests.data.clips import write_clip

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SMALL = {"image_min_tokens": 1, "image_max_tokens": 16, "frame_min_tokens": 1, "frame_max_tokens": 8}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tokenizer and processor of each family."""
    found = {}
    for family in FAMILIES:
        folder = build_tiny_model(tmp_path_factory.mktemp("models") / family, family=family)
        found[family] = (hf_tokenizer(str(folder)), hf_processor(str(folder)))
    return found


@pytest.fixture
def records(root, png, pair):
    """One pair for every combination of media that a data set may hold."""
    for index in range(3):
        Image.new("RGB", (60, 90), (80 * index, 0, 0)).save(root / f"{index}.png")
    clip = Video(frames=("0.png", "1.png", "2.png"), fps=1.0)
    return [
        pair("text", target=Item(text="a cat"), target_id="cat"),
        pair("image", query=Item(text="who", images=("a.png",)), target=Item(text="other words"), target_id="cat"),
        pair("images", query=Item(images=("sub/b.png", png(9))), target=Item(images=(png(8, 200, 90),))),
        pair("video", query=Item(text="when", video=clip), target=Item(images=("a.png",), kind="page")),
        pair("to-video", target=Item(video=clip), source="v"),
    ]


def config_of(root, **values):
    base = {"media_root": str(root), "max_prompt_length": 4000, "embedrl": {"prompt_style": "compact", **SMALL}}
    return OmegaConf.create(base | values)


@pytest.fixture
def make(tmp_path, root, records, models):
    """`make(records=..., family=..., max_samples=..., **data_keys)`: a data set over a file of these records."""

    def build(records=records, family="qwen2_vl", max_samples=-1, **keys):
        write_pairs(records, tmp_path / "pairs.parquet")
        tokenizer, processor = models[family]
        return TCoTDataset(
            [str(tmp_path / "pairs.parquet")], tokenizer, config_of(root, **keys), processor, max_samples
        )

    return build


def rollout_prompt(data, row, config, model):
    """Token ids of a row's prompt, by the steps of verl's single-turn agent loop."""
    tokenizer, processor = model
    media = type(data).process_multi_modal_info(
        row["raw_prompt"], image_patch_size=processor.image_processor.patch_size, config=config
    )
    images, videos, audios = asyncio.run(media)
    builder = create_continuous_token_builder(tokenizer, hf_model_type=data.family, processor=processor)
    ids: list[int] = builder.build_initial_tokens(row["raw_prompt"], images=images, videos=videos, audios=audios)
    return ids


def test_two_prompts_a_pair_query_first(make, records):
    data = make()
    assert len(data) == 2 * len(records)
    assert data.pair_sources == [record.data_source for record in records]
    for index in range(len(data)):
        row, record = data[index], records[index // 2]
        side = ("query", "target")[index % 2]
        assert (row["index"], row["embedrl_pair_id"], row["embedrl_side"]) == (index, record.pair_id, side)
        assert row["data_source"] == record.data_source
        assert row["embedrl_row"].endswith(f"pairs.parquet:{index // 2}")
        assert row["extra_info"] == {"index": index, "pair_id": record.pair_id, "side": side}
    assert [data[index]["embedrl_required"] for index in range(0, 10, 2)] == [
        "text_keywords", "bbox_2d", "bbox_2d", "key_frames", "text_keywords",
    ]  # fmt: skip
    assert [data[index]["embedrl_kind"] for index in (7, 8, 9)] == [
        "target_page",
        "query_text_to_video",
        "target_video",
    ]
    assert data[2]["reward_model"]["ground_truth"] == "other words"
    with pytest.raises(IndexError, match="prompt 10 of 10"):
        data[10]


def test_content_tells_which_queries_and_which_targets_are_the_same(make):
    data = make()
    for side, known in (("query", 5), ("target", 4)):
        contents = [data[index][f"embedrl_{side}_content"] for index in range(10)]
        assert contents[::2] == contents[1::2] == [getattr(one, side) for one in data.contents]
        assert (contents[0] == contents[2]) == (side == "target")
        assert len(set(contents)) == known


def test_original_media_can_be_loaded_from_a_row(make, records, root):
    data = make()
    for index in range(len(data)):
        item = row_item(data[index])
        assert item == records[index // 2].item(("query", "target")[index % 2])
        load_item(item, root)
    assert hash(row_item(data[4])) == hash(row_item(data[4]))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_that_is_counted_is_the_prompt_that_runs(make, root, models, family):
    data = make(family=family)
    lengths = [len(rollout_prompt(data, data[index], config_of(root), models[family])) for index in range(len(data))]
    by_pair = [max(lengths[index : index + 2]) for index in range(0, len(data), 2)]
    shortest: dict[str, int] = {}
    for source, length in zip(data.pair_sources, by_pair, strict=True):
        shortest[source] = min(shortest.get(source, length), length)
    for limit in sorted(set(by_pair)):
        gone = sorted(source for source, least in shortest.items() if least > limit)
        if gone:
            with pytest.raises(DataError, match=f"Nothing is left of {', '.join(gone)}:"):
                make(family=family, max_prompt_length=limit)
            continue
        if limit == max(by_pair):
            assert make(family=family, max_prompt_length=limit).overlong == {}
            continue
        kept = make(family=family, max_prompt_length=limit)
        names = {name.split("pair ")[1].strip("'") for name in kept.overlong}
        ids = [data[index]["embedrl_pair_id"] for index in range(0, len(data), 2)]
        assert names == {name for name, length in zip(ids, by_pair, strict=True) if length > limit}
        assert len(kept) == 2 * sum(length <= limit for length in by_pair)
        counted = {tokens for sides in kept.overlong.values() for tokens in sides.values()}
        assert counted <= set(lengths) and min(counted) > limit


@pytest.mark.parametrize("family", FAMILIES)
def test_the_served_prompt_has_one_placeholder_a_medium(make, root, models, family):
    data, processor = make(family=family), models[family][1]
    for index in range(len(data)):
        row = data[index]
        served = served_prompt_ids(row["raw_prompt"], processor)
        item = row_item(row)
        assert served.count(processor.image_token_id) == len(item.images)
        assert served.count(processor.video_token_id) == (item.video is not None)
        # verl's own way agrees, except for the time stamps that Qwen3-VL puts between the frames of a video.
        expanded = rollout_prompt(data, row, config_of(root), models[family])
        agrees = served == qwen2_5_vl_dedup_image_tokens(expanded, processor)
        assert agrees == (family != "qwen3_vl" or item.video is None)


def test_an_overlong_side_drops_the_pair_and_says_so(make, pair, caplog):
    long = pair("long", target=Item(text="word " * 500))
    with caplog.at_level("WARNING"):
        data = make(records=[pair("a"), long, pair("b")], max_prompt_length=400)
    assert [data[index]["embedrl_pair_id"] for index in range(len(data))] == ["a", "a", "b", "b"]
    (message,) = [record.message for record in caplog.records if "left out" in record.message]
    assert data.left_out == {long.data_source: 1}
    assert "1 of 3 pairs have a prompt over data.max_prompt_length=400 tokens" in message
    assert "row 1, pair 'long' (target " in message and "query" not in message.split("(")[-1]
    with pytest.raises(DataError, match=r"1 of 1 pairs have a prompt over .*Nothing is left"):
        make(records=[long], max_prompt_length=400)
    assert len(make(records=[long], max_prompt_length=400, filter_overlong_prompts=False)) == 2


def test_bad_media_stop_the_run_before_it_starts(make, pair, root):
    bad = [pair("ok")] + [pair(name, query=Item(images=(name,))) for name in ("gone.png", "truncated.png")]
    clip = write_clip(root / "strange.mp4").read_bytes()
    (root / "strange.mp4").write_bytes(clip.replace(b"avc1", b"zz99"))
    bad += [pair("strange", target=Item(video=Video(path="strange.mp4")))]
    with pytest.raises(DataError) as error:
        make(records=bad)
    assert "row 3, pair 'strange', field target: media path 'strange.mp4': its codec is unknown" in str(error.value)
    assert "3 row(s) cannot be used; `embedrl data check" in str(error.value)
    assert "row 1, pair 'gone.png', field query: media path 'gone.png': no such file" in str(error.value)
    assert "row 2, pair 'truncated.png', field query: media path 'truncated.png': not a readable" in str(error.value)
    with pytest.raises(DataError, match="gone.png"):
        make(records=bad, filter_overlong_prompts=False)


def test_a_frame_that_no_prompt_draws_must_exist_too(make, pair):
    frames = ("a.png",) * 4 + ("gone.png",) + ("a.png",) * 5
    with pytest.raises(DataError, match=r"field target: media path 'gone\.png'"):
        make(records=[pair("p", target=Item(video=Video(frames=frames)))])


def test_duplicate_pair_id_is_refused_across_files(make, tmp_path, pair, models, root):
    write_pairs([pair("a"), pair("b")], tmp_path / "one.parquet")
    write_pairs([pair("c"), pair("b")], tmp_path / "two.parquet")
    tokenizer, processor = models["qwen2_vl"]
    files = OmegaConf.create([str(tmp_path / "one.parquet"), str(tmp_path / "two.parquet")])
    with pytest.raises(
        DataError, match=r"two\.parquet, row 1, pair 'b': pair_id must be unique; .*one\.parquet, row 1"
    ):
        TCoTDataset(files, tokenizer, config_of(root), processor)


def test_a_data_set_folder_stands_for_its_parts_and_an_unfinished_one_is_refused(tmp_path, pair, models, root):
    folder = tmp_path / "photos"
    for number, names in enumerate(("ab", "cd")):
        write_pairs([pair(name) for name in names], folder / f"part-0000{number}.parquet")
    tokenizer, processor = models["qwen2_vl"]
    data = TCoTDataset(str(folder), tokenizer, config_of(root), processor)
    assert [data[row]["embedrl_pair_id"] for row in range(0, len(data), 2)] == list("abcd")
    (folder / "_work").mkdir()
    with pytest.raises(DataError, match=r"photos is unfinished"):
        TCoTDataset(str(folder), tokenizer, config_of(root), processor)


def test_max_samples_counts_prompts(make):
    assert [make(max_samples=5)[index]["embedrl_pair_id"] for index in range(4)] == ["text", "text", "image", "image"]
    drawn = [make(max_samples=4, shuffle=True, seed=seed).fingerprint for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1
    with pytest.raises(ConfigError, match="at least 2 or -1; got 1"):
        make(max_samples=1)


def test_a_subset_is_the_same_in_every_process_without_a_seed(make):
    drawn = {make(max_samples=4, shuffle=True, seed=None).fingerprint for _ in range(3)}
    assert drawn == {make(max_samples=4, shuffle=True, seed=0).fingerprint}


def test_a_validation_subset_heeds_its_own_key(make, tmp_path):
    files = [str(tmp_path / "pairs.parquet")]
    first = make(max_samples=4, shuffle=False).fingerprint
    drawn = make(max_samples=4, shuffle=True, seed=3).fingerprint
    assert first != drawn
    keys = {"val_files": files, "seed": 3, "max_samples": 4}
    assert make(**keys, shuffle=True, validation_shuffle=False).fingerprint == drawn
    assert make(**keys, shuffle=False, validation_shuffle=False).fingerprint == first
    assert make(**keys, shuffle=False, validation_shuffle=True).fingerprint == drawn
    keys["val_files"] = ["other.parquet"]
    assert make(**keys, shuffle=False, validation_shuffle=True).fingerprint == first


def test_wrong_family_is_refused(make, models, root):
    assert make(family="qwen3_vl").family == "qwen3_vl"
    with pytest.raises(
        ConfigError, match="family=qwen2_vl has visual tokens of 28 px a side, but the processor's have 32"
    ):
        make(family="qwen3_vl", embedrl={"family": "qwen2_vl", "prompt_style": "compact"})
    with pytest.raises(ConfigError, match="got NoneType"):
        TCoTDataset([], models["qwen2_vl"][0], config_of(root))


def test_processor_with_narrower_limits_is_refused(make, pair, root):
    Image.new("RGB", (3000, 2000)).save(root / "large.png")
    large = [pair("large", query=Item(images=("large.png",)))]
    section = {"prompt_style": "compact", "image_max_tokens": 2000}
    with pytest.raises(
        ConfigError, match=r"processor resizes a image from 1512x1008 .*data\.embedrl\.image_min_tokens"
    ):
        make(records=large, embedrl=section, max_prompt_length=4000)
    with pytest.raises(ConfigError, match="processor resizes a image"):
        make(records=large, embedrl=section, filter_overlong_prompts=False)


def test_rows_pass_verls_collation_and_tensordict(make, records):
    data = make()
    sampler = PairBatchSampler(data, batch_size=2)
    loader = StatefulDataLoader(
        data, batch_size=2, num_workers=2, drop_last=True, sampler=sampler, collate_fn=collate_fn
    )
    seen = []
    for batch in loader:
        uids = np.array(["u0", "u1"], dtype=object)
        batch = tu.get_tensordict({**batch, "uid": uids})
        ids = list(batch["embedrl_pair_id"])
        assert ids[0] == ids[1] and list(batch["embedrl_side"]) == ["query", "target"]
        record = next(record for record in records if record.pair_id == ids[0])
        assert row_item({"embedrl_item": next(iter(batch["embedrl_item"]))}) == record.item("query")
        assert list(batch["raw_prompt"])[1] == data[2 * records.index(record) + 1]["raw_prompt"]
        seen += ids
    assert sorted(set(seen)) == sorted(record.pair_id for record in records)


def test_a_row_carries_no_pixels(make, pair, root):
    Image.new("RGB", (1000, 1000)).save(root / "large.png")
    row = make(records=[pair("p", query=Item(images=("large.png",)))])[0]
    assert len(pickle.dumps(row)) < 10_000


def test_verl_finds_the_class_by_its_config_keys():
    keys = {"custom_cls": {"path": "pkg://embedrl_verl.data.dataset", "name": "TCoTDataset"}}
    assert get_dataset_class(OmegaConf.create(keys)) is TCoTDataset
