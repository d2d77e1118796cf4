# SPDX-License-Identifier: Apache-2.0
"""TransferQueue's tags without its processes."""


class FakeQueue:
    """Tags are written by merging and listed in the order of first writing, as in TransferQueue (see
    `async_queue_checkpoint.py`, which asks the real one)."""

    def __init__(self):
        self.partitions = {"train": {}, "embed": {}, "val": {}}

    def kv_list(self, partition_id=None):
        names = [partition_id] if partition_id else list(self.partitions)
        return {name: {key: dict(tag) for key, tag in self.partitions[name].items()} for name in names}

    def kv_batch_put(self, keys, partition_id, tags, fields=None):
        for key, tag in zip(keys, tags, strict=True):
            self.partitions[partition_id].setdefault(key, {}).update(tag)

    def put(self, partition_id, key, **tag):
        self.kv_batch_put([key], partition_id, [tag])

    def kv_clear(self, keys, partition_id):
        for key in keys:
            self.partitions[partition_id].pop(key, None)
