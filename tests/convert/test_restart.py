# SPDX-License-Identifier: Apache-2.0
"""`--restart` removes what a conversion wrote, all of that, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from embedrl_verl.convert import restart as restart_module
from embedrl_verl.convert.command import convert_main
from embedrl_verl.convert.generic import add_generic_options, make_generic
from embedrl_verl.errors import ConfigError, DataError, ResourceError
from tests.convert.conftest import Convert, Draw, files_below, question, write_lines


@pytest.fixture
def source(tmp_path: Path, draw: Draw) -> Path:
    """A jsonl file, with an image of its own folder in each row."""
    for index in range(12):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{index}.png").write_bytes(draw(index))
    return write_lines(tmp_path / "in" / "f.jsonl", [question(index, image=f"{index}.png") for index in range(12)])


def stop_half_way(source: Path, convert: Convert, **options: Any) -> None:
    """Leave an unfinished folder: a part is made, then there are too many bad rows."""
    write_lines(source, [question(0, image="0.png"), *[question(index, answer=None) for index in range(1, 12)]])
    with pytest.raises(DataError, match="cannot be used"):
        convert(source, max_bad_share=0.5, **options)
    write_lines(source, [question(index, image=f"{index}.png") for index in range(12)])


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(
    "name", ["part-foreign.parquet", "part-00000.parquet", "_work/state.json", "rejected.jsonl", "data_card.md"]
)
def test_a_folder_that_no_conversion_made_is_refused_and_left_as_it_is(
    tmp_path: Path, source: Path, convert: Convert, name: str, restart: bool
) -> None:
    for own in (name, "media/photo.jpg", "media/ab/.photo.tmp"):
        (tmp_path / "out" / own).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / own).write_text("mine")
    before = files_below(tmp_path / "out")
    with pytest.raises(ConfigError, match=f"{name.split('/')[-1]}.*name another folder"):
        convert(source, restart=restart)
    assert files_below(tmp_path / "out") == before


def test_own_media_beside_the_output_outlive_a_restart(tmp_path: Path, draw: Draw, capsys: Any) -> None:
    own = tmp_path / "own"
    (own / "media" / "ab").mkdir(parents=True)
    (own / "media" / "0.png").write_bytes(draw(0))
    (own / "media" / "ab" / ".half.tmp").write_bytes(b"mine")
    (own / ".draft.tmp").write_bytes(b"mine")
    write_lines(own / "photos.jsonl", [question(0, image="media/0.png")])
    before = files_below(own)
    columns = ["query.text=question", "query.images=image", "target.text=answer"]
    given = ["--input", str(own / "photos.jsonl"), "--out", str(own), "--workers", "1"]
    given += [f"--column={column}" for column in columns]

    def run(*options: str) -> int:
        return convert_main(make_generic, "generic", add_generic_options, [*given, *options])

    assert run() == 0
    assert run("--shard-rows", "5") == 2
    assert "--restart" in capsys.readouterr().err
    assert run("--shard-rows", "5", "--restart", "--media", "files") == 2
    assert "media was not written by a conversion, and --media files would mix" in capsys.readouterr().err
    assert run("--shard-rows", "5", "--restart") == 0
    assert before.items() <= files_below(own).items()
    assert '"shard_rows": 5' in (own / "data_card.json").read_text()


@pytest.mark.parametrize("is_finished", [True, False])
def test_all_that_a_conversion_wrote_is_removed(
    tmp_path: Path, source: Path, convert: Convert, is_finished: bool
) -> None:
    if is_finished:
        convert(source, place="files", shard_rows=3)
    else:
        stop_half_way(source, convert, place="files", shard_rows=1)
        assert list((tmp_path / "out" / "media").iterdir())
    (tmp_path / "out" / "notes.txt").write_text("mine")
    convert(source, place="embed", restart=True)
    convert(source, "new", place="embed")
    assert files_below(tmp_path / "out") == {**files_below(tmp_path / "new"), "notes.txt": b"mine"}


@pytest.mark.parametrize("name", ["media/photo.jpg", "media/ab/photo.jpg", "part-foreign.parquet"])
def test_a_file_of_the_user_among_ours_is_named_and_nothing_goes(
    tmp_path: Path, source: Path, convert: Convert, name: str
) -> None:
    convert(source, place="files")
    (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / name).write_text("mine")
    before = files_below(tmp_path / "out")
    with pytest.raises(ConfigError, match=f"{name}, which no conversion wrote; move it away"):
        convert(source, place="embed", restart=True)
    assert files_below(tmp_path / "out") == before


def test_input_and_media_root_that_would_go_are_named_and_nothing_goes(
    tmp_path: Path, source: Path, convert: Convert
) -> None:
    convert(source, place="files")
    before = files_below(tmp_path / "out")
    media, part = tmp_path / "out" / "media", tmp_path / "out" / "part-00000.parquet"
    with pytest.raises(ConfigError, match=f"--restart would remove {media}, which this conversion reads"):
        convert(source, media_root=str(media), restart=True)
    with pytest.raises(ConfigError, match=f"--restart would remove {part}, which this conversion reads"):
        convert(part, restart=True)
    assert files_below(tmp_path / "out") == before


def test_media_are_not_stored_into_a_folder_of_the_user(tmp_path: Path, source: Path, convert: Convert) -> None:
    photo = tmp_path / "out" / "media" / "photo.jpg"
    photo.parent.mkdir(parents=True)
    photo.write_text("mine")
    with pytest.raises(ConfigError, match="media was not written by a conversion"):
        convert(source, place="files")
    assert files_below(tmp_path / "out") == {"media/photo.jpg": b"mine"}
    photo.unlink()
    convert(source, place="files")  # an empty folder may be there


def test_a_link_for_the_media_stays(tmp_path: Path, source: Path, convert: Convert) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "media").symlink_to(tmp_path / "big")
    convert(source, place="files")
    assert files_below(tmp_path / "big")
    convert(source, place="embed", restart=True)
    assert (tmp_path / "out" / "media").is_symlink()
    assert not list((tmp_path / "big").iterdir())


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("number", range(5))
def test_a_removal_that_is_cut_short_is_ended_by_the_next_run(
    tmp_path: Path,
    source: Path,
    convert: Convert,
    monkeypatch: pytest.MonkeyPatch,
    is_finished: bool,
    number: int,
) -> None:
    if is_finished:
        convert(source, place="files", shard_rows=5)
    else:
        stop_half_way(source, convert, place="files", shard_rows=1)
    unlink, done = Path.unlink, [0]

    def failing(path: Path, missing_ok: bool = False) -> None:
        done[0] += 1
        if done[0] > number:
            raise OSError("cut short")
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(restart_module.Path, "unlink", failing)
        with pytest.raises(ResourceError, match="cut short"):
            convert(source, place="embed", restart=True)
    convert(source, place="embed")  # the command that `_work/` notes does not have --restart
    convert(source, "new", place="embed")
    assert files_below(tmp_path / "out") == files_below(tmp_path / "new")
