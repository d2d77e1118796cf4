# SPDX-License-Identifier: Apache-2.0
import asyncio
import random

from embedrl_verl.serving.waiting import Signal, Slots


def test_slots_are_never_lost_whoever_is_cancelled_or_late():
    async def run():
        slots, held, most = Slots(3), 0, 0
        choices = random.Random(0)

        async def use():
            nonlocal held, most
            if await slots.acquire(choices.choice([None, 0.0, 0.001, 0.01])):
                try:
                    held += 1
                    most = max(most, held)
                    await asyncio.sleep(choices.random() * 0.005)
                finally:
                    held -= 1
                    slots.release()

        tasks = [asyncio.create_task(use()) for _ in range(300)]
        for task in choices.sample(tasks, 150):
            await asyncio.sleep(choices.random() * 0.001)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert most == 3 and held == 0
        assert [await slots.acquire(0.0) for _ in range(4)] == [True, True, True, False]

    asyncio.run(run())


def test_a_slot_handed_to_a_task_that_is_cancelled_at_that_moment_goes_to_the_next():
    async def run():
        slots = Slots(1)
        await slots.acquire(None)
        first, second = (asyncio.create_task(slots.acquire(None)) for _ in range(2))
        await asyncio.sleep(0)
        slots.release()
        first.cancel()
        assert await asyncio.wait_for(second, 30) is True and first.cancelled()

    asyncio.run(run())


def test_slots_go_out_in_the_order_of_asking():
    async def run():
        slots, order = Slots(1), []

        async def use(number):
            await slots.acquire(None)
            order.append(number)
            await asyncio.sleep(0)
            slots.release()

        await asyncio.gather(*(use(i) for i in range(10)))
        assert order == list(range(10))

    asyncio.run(run())


def test_a_signal_wakes_those_who_wait_and_nobody_later():
    async def run():
        signal = Signal()
        waiting = [asyncio.create_task(signal.wait(1.0)) for _ in range(3)]
        await asyncio.sleep(0)
        signal.fire()
        assert await asyncio.gather(*waiting) == [True] * 3
        assert await signal.wait(0.01) is False

    asyncio.run(run())
