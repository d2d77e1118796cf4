# SPDX-License-Identifier: Apache-2.0
import math
import threading
import time
from collections import Counter

import pytest

from embedrl_verl.errors import EmbedRLError, MediaError
from embedrl_verl.judge.listwise import IMAGE_LOADS
from tests.judge.fake_judge import chats, reading, run, says


@pytest.mark.parametrize("wanted", [True, False])
def test_images_are_asked_for_once_a_list_and_outside_of_the_loop(wanted):
    asked, threads = [], set()

    def images(row):
        asked.append(row)
        threads.add(threading.current_thread())
        return [f"data:image/png;base64,{row:04d}"] if row % 2 == 0 else None

    found, server = run(says(lambda body: "1"), images=wanted, call={"images": images})
    if not wanted:
        assert not asked
        return
    assert sorted(asked) == sorted(x.rows[0] for x in found.lists) and threading.main_thread() not in threads
    shown = Counter(
        body["messages"][0]["content"][0]["image_url"]["url"]
        for body in chats(server)
        if isinstance(body["messages"][0]["content"], list)
    )
    assert shown == {f"data:image/png;base64,{x.rows[0]:04d}": 4 for x in found.lists}


def test_images_of_some_lists_are_loaded_at_the_same_time():
    now, most, lock = [0], [0], threading.Lock()

    def images(row):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        until = time.monotonic() + 20
        while most[0] < IMAGE_LOADS and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return ["data:image/png;base64,AA"]

    run(says(lambda body: "1"), images=True, call={"images": images})
    assert most[0] == IMAGE_LOADS


def test_an_unreadable_image_makes_its_list_unknown_and_no_other():
    def images(row):
        if row == 0:
            raise MediaError("a.png must be an image; got 3 bytes. Replace the file")
        return None

    found, _ = run(says(reading), images=True, call={"images": images}, max_unknown_share=0.5)
    (unknown,) = [listed for listed in found.lists if listed.rows[0] == 0]
    assert dict(found.causes) == {"image unreadable": len(unknown.rows)}
    assert {row for row in range(48) if math.isnan(found.scores[row])} == set(unknown.rows)
    with pytest.raises(EmbedRLError, match=r"4 x image unreadable.*The first failure: a\.png must be"):
        run(says(reading), images=True, call={"images": images}, max_unknown_share=0.0)
