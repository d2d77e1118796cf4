# SPDX-License-Identifier: Apache-2.0
"""The parser is strict about form, keeps what is readable, never raises and takes linear time."""

import json
import random
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from embedrl_verl.errors import ConfigError
from embedrl_verl.tcot import Box, TCoT, format_reward, json_objects, parse_tcot


def tcot(evidence, *, rethink="It holds.", answer="A bus."):
    written = evidence if isinstance(evidence, str) else json.dumps(evidence)
    return f"<thinking>See {written} there.</thinking>\n<rethink>{rethink}</rethink>\n<answer>{answer}</answer>"


GOOD = tcot({"bbox_2d": [228, 320, 961, 970]})
BOX = Box(1, 2, 3, 4)


def test_reads_every_part_of_a_well_formed_tcot():
    read = parse_tcot(f"\n {GOOD} \n", num_images=1)
    assert read.is_well_formed and read.problems == ()
    assert read.thinking == 'See {"bbox_2d": [228, 320, 961, 970]} there.'
    assert (read.rethink, read.answer) == ("It holds.", "A bus.")
    assert read.boxes == (Box(228, 320, 961, 970, image=1),)
    assert (read.text_keywords, read.key_frames) == ((), ())


@pytest.mark.parametrize(
    ("value", "boxes"),
    [
        ("[1,2,3,4]", (BOX,)),
        ("[[1,2,3,4]]", (BOX,)),
        ("[[1,2,3,4],[5,6.5,7,8]]", (BOX, Box(5, 6.5, 7, 8))),
        ('{"image":2,"box":[1,2,3,4]}', (Box(1, 2, 3, 4, 2),)),
        ('[{"image":2,"bbox_2d":[1,2,3,4]},[1,2,3,4]]', (Box(1, 2, 3, 4, 2), BOX)),
        ('[{"bbox":[[1,2,3,4],[5,6,7,8]],"image":3,"label":"bus"}]', (Box(1, 2, 3, 4, 3), Box(5, 6, 7, 8, 3))),
        ("[9,2,3,4]", (Box(9, 2, 3, 4),)),  # corners in the wrong order are no matter of form
    ],
)
def test_every_strict_form_of_boxes_is_well_formed(value, boxes):
    read = parse_tcot(tcot(f'{{"bbox_2d": {value}}}'), num_images=3)
    assert read.boxes == boxes
    assert read.is_well_formed, read.problems


def test_an_object_may_name_the_image_of_all_its_boxes():
    read = parse_tcot(tcot({"image": 2, "bbox_2d": [[1, 2, 3, 4], {"image": 1, "box": [1, 2, 3, 4]}]}))
    assert read.is_well_formed and [box.image for box in read.boxes] == [2, 1]


def test_a_key_written_twice_counts_with_all_its_values():
    read = parse_tcot(tcot('{"bbox_2d": [1,2,3,4], "text_keywords": ["a"], "bbox_2d": [[5,6,7,8]]}'))
    assert read.is_well_formed
    assert read.boxes == (BOX, Box(5, 6, 7, 8)) and read.text_keywords == ("a",)


def test_keys_that_are_no_evidence_are_ignored():
    assert parse_tcot(tcot({"text_keywords": ["a"], "image": "a bus", "note": {"x": [1]}})).is_well_formed


@pytest.mark.parametrize("fence", ["```json\n{}\n```", "```\n{}\n```", "evidence={}!", "{}"])
def test_the_object_may_stand_in_a_fence_or_in_a_sentence(fence):
    read = parse_tcot(tcot(fence.replace("{}", '{"key_frames": [1, 3]}')), num_frames=3)
    assert read.is_well_formed and read.key_frames == (1, 3)


@pytest.mark.parametrize("prose", ["a {set} of", "{ open", "close }", '5" wide', "{'a': 1}", "[1, 2, 3, 4]", "{ {"])
def test_braces_and_quotes_in_prose_are_not_objects(prose):
    read = parse_tcot(tcot(f'{prose} {{"text_keywords": ["bus"]}}'))
    assert read.is_well_formed and read.text_keywords == ("bus",)


def test_key_frames_are_counted_from_one_and_end_at_the_number_of_frames():
    text = tcot({"key_frames": [0, 1, 8, 9]})
    read = parse_tcot(text, num_frames=8)
    assert read.key_frames == (1, 8) and not read.is_well_formed
    assert read.problems == (
        "key frames are counted from 1; got 0",
        "key frames must not be above the number of frames, 8; got 9",
    )
    assert parse_tcot(text).key_frames == (1, 8, 9)


@pytest.mark.parametrize(
    ("evidence", "kept", "problem"),
    [
        ('{"key_frames": 3}', (3,), "must be a list"),
        ('{"key_frames": [1, 2.0]}', (1,), "must be an integer"),
        ('{"key_frames": [true, 2]}', (2,), "must be an integer"),
        ('{"key_frames": ["1", 2]}', (2,), "must be an integer"),
        (f'{{"key_frames": [1, {"9" * 5000}]}}', (1,), "must be an integer"),
        ('{"key_frames": []}', (), "must not be empty"),
        ('{"text_keywords": "bus"}', ("bus",), "must be a list"),
        ('{"text_keywords": ["bus", " ", 3]}', ("bus",), "non-empty string"),
        ('{"text_keywords": ["bus", "\\ud800"]}', ("bus",), "valid Unicode"),
        ('{"bbox_2d": [1, 2, 3]}', (), "four finite numbers"),
        ('{"bbox_2d": [[1, 2, 3, 4], [1, 2, 3, "4"]]}', (BOX,), "four finite numbers"),
        ('{"bbox_2d": [[1, 2, 3, NaN], [1, 2, 3, 1e999], [1, 2, 3, true]]}', (), "four finite numbers"),
        ('{"bbox_2d": [[[1, 2, 3, 4]]]}', (BOX,), "without lists in between"),
        ('{"bbox_2d": []}', (), "must not be empty"),
        ('{"bbox_2d": {"image": 1}}', (), "must have one of box"),
        ('{"bbox_2d": {"image": 0, "box": [1, 2, 3, 4]}}', (), "integer from 1"),
        ('{"bbox_2d": {"image": 3, "box": [1, 2, 3, 4]}}', (), "number of images, 2"),
        ('{"bbox_2d": {"image": 1, "image": 2, "box": [1, 2, 3, 4]}}', (), "must name one image"),
        ('{"boxes": [1, 2, 3, 4]}', (), "must have one of the keys"),
        ("no evidence", (), "exactly one JSON object; got 0"),
        ('{"key_frames": [1]} {"key_frames": [2]}', (1, 2), "exactly one JSON object; got 2"),
        ('[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [1, 2, 3, 4]}]', (BOX, BOX), "exactly one JSON object; got 2"),
    ],
)
def test_what_is_not_strict_is_a_problem_and_the_rest_is_kept(evidence, kept, problem):
    read = parse_tcot(tcot(evidence), num_images=2)
    assert read.text_keywords + read.boxes + read.key_frames == kept
    assert any(problem in line for line in read.problems), read.problems
    assert format_reward(read) == 0.0


PARTS = ("<thinking>See {}.</thinking>", "<rethink>Yes.</rethink>", "<answer>No.</answer>")
EVIDENCE = '{"text_keywords": ["a"]}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain words",
        "".join(PARTS[:2]),
        "".join(PARTS[1:]),
        PARTS[1] + PARTS[0] + PARTS[2],
        "".join(PARTS) + PARTS[2],
        PARTS[0] + "".join(PARTS),
        "Sure! " + "".join(PARTS),
        "".join(PARTS) + " Done.",
        PARTS[0] + "and" + "".join(PARTS[1:]),
        "".join(PARTS[:2]) + "so" + PARTS[2],
        "".join(PARTS).replace("</rethink>", ""),
        "".join(PARTS).replace("Yes.", " \n"),
        "".join(PARTS).replace("No.", ""),
        "".join(PARTS).replace("Yes.", "{}"),
        "".join(PARTS).replace("thinking", "THINKING"),
        PARTS[0].replace("{}", "") + PARTS[1].replace("Yes.", "{}") + PARTS[2],
        "<thinking>a<rethink>{}</rethink></thinking>" + "".join(PARTS[1:]),
    ],
)
def test_tags_stand_once_in_order_with_nothing_outside_and_nothing_empty(text):
    broken = parse_tcot(text.replace("{}", EVIDENCE))
    assert not broken.is_well_formed and format_reward(broken, "text_keywords") == 0.0
    assert parse_tcot("\n".join(PARTS).replace("{}", EVIDENCE)).is_well_formed  # the same parts, put right


def test_a_reply_cut_at_the_length_limit_keeps_its_evidence():
    read = parse_tcot(GOOD[: GOOD.index("holds")])
    assert read.boxes and read.thinking.startswith("See") and read.rethink == "It" and read.answer == ""


def test_a_reply_that_starts_inside_thinking_is_read():
    read = parse_tcot(GOOD.removeprefix("<thinking>"))
    assert read.thinking.startswith("See {") and read.answer == "A bus." and read.boxes and not read.is_well_formed


def test_evidence_outside_thinking_is_read_only_where_thinking_has_none():
    outside = '<answer>{"key_frames": [2]}</answer>'
    assert parse_tcot(outside).key_frames == (2,)
    assert parse_tcot(tcot({"key_frames": [1]}, answer='{"key_frames": [2]}')).key_frames == (1,)


def test_sections_cut_after_thinking_and_lose_no_character():
    thinking, rest = parse_tcot(f" {GOOD}").sections()
    assert thinking.startswith(" <thinking>") and thinking.endswith("</thinking>") and rest.startswith("\n<rethink>")
    assert parse_tcot("no tags").sections() == ("no tags", "")


def test_problems_stay_short_however_much_is_wrong():
    read = parse_tcot(tcot({"key_frames": [0] * 10_000, "text_keywords": ["x" * 10_000, 1]}) + "<answer>" * 10_000)
    assert len(read.problems) < 6 and all(len(line) < 400 for line in read.problems)
    assert any("(and 9999 more)" in line for line in read.problems)


def test_format_reward_asks_for_the_required_evidence():
    read = parse_tcot(GOOD)
    assert format_reward(read) == format_reward(read, "bbox_2d") == 1.0
    assert format_reward(read, "key_frames") == format_reward(read, "text_keywords") == 0.0
    with pytest.raises(ConfigError, match="evidence key must be one of"):
        format_reward(read, "boxes")


PIECES = [
    *("<thinking>", "</thinking>", "<rethink>", "</rethink>", "<answer>", "</answer>", "{", "}", "[", "]", '"', "\\"),
    *(",", ":", "\n", " ", "```json", "1", "-3", "0.5", "1e999", "NaN", "null", "true", '"image": 2'),
    *('"box": [1,2,3,4]', '"bbox_2d":', '"key_frames":', '"text_keywords":', "[1,2,3,4]", "\\ud800", "\u2028", "\x00"),
    *("\ud800", "é", "word"),
]  # fmt: skip


def checked(text):
    """Parse, and hold what is true of every T-CoT."""
    read = parse_tcot(text, num_frames=8, num_images=2)
    assert "".join(read.sections()) == text
    assert all(1 <= frame <= 8 for frame in read.key_frames) and all(1 <= box.image <= 2 for box in read.boxes)
    assert not read.is_well_formed or (read.thinking and read.rethink and read.answer)
    return read


def mutated(rng):
    """A well-formed T-CoT with one to four pieces put in, cut out, moved or broken."""
    key, value = rng.choice([("bbox_2d", [[1, 2, 3, 4]]), ("key_frames", [1, 2]), ("text_keywords", ["a"])])
    text = tcot({key: value})
    for _ in range(rng.randint(1, 4)):
        i, j = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        text = rng.choice(
            (text[:i] + rng.choice(PIECES) + text[i:], text[:i] + text[j:], text[:j] + text[i:], text[j:] + text[:i])
        )[:600]
    return text


def test_generated_and_mutated_strings_parse_without_an_exception():
    """No exception; some are well formed and many keep evidence, so the check is not vacuous."""
    rng = random.Random(0)
    well_formed = with_evidence = 0
    for index in range(10_000):
        text = mutated(rng) if index % 2 else "".join(rng.choices(PIECES, k=rng.randrange(30)))
        read = checked(text)
        well_formed += read.is_well_formed
        with_evidence += bool(read.boxes or read.key_frames or read.text_keywords)
    assert well_formed > 50 and with_evidence > 1_000


@settings(max_examples=100)
@given(st.text() | st.lists(st.sampled_from(PIECES)).map("".join))
@example('{"a":' * 30)
def test_any_text_parses(text):
    checked(text)


NUMBERS = st.integers(-2000, 2000) | st.floats(allow_nan=False, allow_infinity=False)
EVIDENCE_VALUES = st.fixed_dictionaries(
    {},
    optional={
        "text_keywords": st.lists(st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip), min_size=1),
        "bbox_2d": st.lists(st.lists(NUMBERS, min_size=4, max_size=4), min_size=1),
        "key_frames": st.lists(st.integers(1, 8), min_size=1),
    },
).filter(bool)


@settings(max_examples=200)
@given(EVIDENCE_VALUES, st.booleans())
def test_valid_evidence_comes_back_as_it_was_written(evidence, ascii_only):
    read = parse_tcot(tcot(json.dumps(evidence, ensure_ascii=ascii_only).replace("<", "\\u003c")), num_frames=8)
    assert read.is_well_formed, read.problems
    assert list(read.text_keywords) == evidence.get("text_keywords", [])
    assert list(read.key_frames) == evidence.get("key_frames", [])
    assert [[box.x1, box.y1, box.x2, box.y2] for box in read.boxes] == evidence.get("bbox_2d", [])


N = 40_000


UNITS = [
    *("{", "[", "<thinking>", '{"', '{"a":', '{"a":[', '{"{":', '{"a":{"a":1},', "{{{{{{}", "{}", '{"\\', "{ ", "\\"),
    *('{"x":[{', '{"a":"b",', "{ \t", '"', "</answer>", '{"bbox_2d":[[1,2,3,4]]}'),
]


@pytest.mark.parametrize("unit", UNITS)
def test_work_is_linear_on_adversarial_strings(unit, monkeypatch):
    """Eight times the text is about eight times the calls and the characters read; a look-out from every brace to the
    end would be 64 times. Counted, not timed: a busy machine says nothing here."""
    tokens = json_objects._TOKEN
    calls = characters = 0

    def call(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    class Reading:
        def finditer(self, text, start):
            nonlocal characters
            for match in tokens.finditer(text, start):
                # A quote alone: its end was looked for up to the end of the text.
                characters += (len(text) if match.group() == '"' else match.end()) - start
                start = match.end()
                yield match
            characters += len(text) - start

    monkeypatch.setattr(json_objects, "_TOKEN", Reading())

    def work(count):
        nonlocal calls, characters
        calls = characters = 0
        sys.setprofile(call)
        try:
            checked(unit * count)
        finally:
            sys.setprofile(None)
        return calls, characters

    for short, long in zip(work(200), work(1600), strict=True):
        assert long < 9 * short + 100


@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_deep_nesting_is_no_recursion_error(brackets):
    opened, closed = ("[", "]") if brackets == "[]" else ('{"a":', "}")
    read = checked(tcot('{"bbox_2d":' + opened * N + "1" + closed * N + "}"))
    assert not read.is_well_formed and read.boxes == ()


def test_a_tcot_survives_a_queue_that_knows_plain_values_alone() -> None:
    text = (
        '<thinking>{"text_keywords": ["red bus"], "bbox_2d": [[0, 1.5, 3, 4], {"image": 2, "box": [5, 6, 7, 8]}], '
        '"key_frames": [2, 1]}</thinking><rethink>no</rethink><answer></answer>'
    )
    tcot = parse_tcot(text, num_frames=2, num_images=2)
    assert tcot.problems and len(tcot.boxes) == 2
    assert TCoT.from_plain(json.loads(json.dumps(tcot.to_plain()))) == tcot
