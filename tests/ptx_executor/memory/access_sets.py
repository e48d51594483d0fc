"""Sets of accesses to global memory that many granules share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


class AccessSets:
    """Sets as chains of nodes (parent, warps, time); a table holds the last node of each granule.

    Node 0 is the empty set. Granules that were accessed alike have one chain.
    """

    def __init__(self) -> None:
        self._parent, self._hash, self._times = [0], [0], [0]
        self._warps: list[np.ndarray] = [np.zeros(0, np.int64)]
        self._nodes: dict[tuple[int, int, int], int] = {}
        self._random = np.random.default_rng(1).integers(0, 2**63, 4096, dtype=np.uint64)

    def chain(self, node: int) -> Iterator[tuple[np.ndarray, int]]:
        """(warps, time) of every node, the last first."""
        while node:
            yield self._warps[node], self._times[node]
            node = self._parent[node]

    def add(self, table: np.ndarray, g: np.ndarray, warps: np.ndarray, time: int) -> None:
        """Add an access to granules g[i, :] by warps[i] of the launch, at `time`."""
        old = table[g]
        width = g.shape[1]
        if width > 1 and (old != old[:, :1]).any():
            warps, g, width = np.repeat(warps, width), g.reshape(-1, 1), 1
        top = int(warps.max()) + 1
        self._know(top)
        # What each granule got: segments of equal granules in the sorted pairs.
        key = g[:, 0] * np.int64(top) + warps
        if not (key[1:] >= key[:-1]).all():
            key = np.sort(key)
        key = key[np.concatenate([[True], key[1:] != key[:-1]])]
        granule, warps = key // top, key % top
        start = np.flatnonzero(np.concatenate([[True], granule[1:] != granule[:-1]]))
        end = np.append(start[1:], granule.size)
        digest = np.add.reduceat(self._random[warps], start)
        parent = table[granule[start]]
        # One node for all granules with the same past and the same warps.
        both = digest ^ (parent.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        _, at, inverse = np.unique(both, return_index=True, return_inverse=True)
        nodes = [
            self._node(int(parent[i]), int(digest[i]), warps[start[i] : end[i]], time) for i in at
        ]
        table[granule[start][:, None] + np.arange(width)] = np.array(nodes, np.int32)[inverse][
            :, None
        ]

    def _know(self, warps: int) -> None:
        """A random number for each of so many warps."""
        size = self._random.size
        if warps > size:
            more = np.random.default_rng(warps).integers(
                0, 2**63, 2 * warps - size, dtype=np.uint64
            )
            self._random = np.concatenate([self._random, more])

    def _node(self, parent: int, digest: int, warps: np.ndarray, time: int) -> int:
        if parent and self._hash[parent] == digest:
            if self._times[parent] == time:
                return parent
            parent = self._parent[parent]  # the same warps again, later
        key = (parent, digest, time)
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = len(self._parent)
            self._parent.append(parent)
            self._hash.append(digest)
            self._times.append(time)
            self._warps.append(warps)
        return node
