"""A key-value cache in buffers of fixed length, for the sampler: no copy when it grows, rows that can be chosen."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, DynamicLayer


class BufferedLayer(DynamicLayer):
    """Keys and values of one layer, [B, heads, length, head width], as the filled part of buffers made once.

    Attention sees the filled part alone, so a long buffer costs memory and no time.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._keys = self._room(key_states)
        self._values = self._room(value_states)
        self._show(0)
        self.is_initialized = True

    def _room(self, states: torch.Tensor) -> torch.Tensor:
        batch, heads, _, width = states.shape
        return states.new_empty(batch, heads, self.capacity, width)

    def _show(self, length: int) -> None:
        self.filled = length
        self.keys, self.values = self._keys[:, :, :length], self._values[:, :, :length]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.filled + key_states.shape[2]
        self._keys[:, :, self.filled : end] = key_states
        self._values[:, :, self.filled : end] = value_states
        self._show(end)
        return self._keys[:, :, :end], self._values[:, :, :end]

    def select(self, rows: torch.Tensor) -> None:
        """Keeps `rows` (indices, repeats allowed) of the batch."""
        self._keys, self._values = self._chosen(self._keys, rows), self._chosen(self._values, rows)
        self._show(self.filled)

    def _chosen(self, old: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        new = old.new_empty(len(rows), *old.shape[1:])
        new[:, :, : self.filled] = old[:, :, : self.filled].index_select(0, rows)
        return new


class BufferedCache(Cache):
    """A cache of `layers` layers, each with room for `capacity` tokens a row."""

    layers: list[BufferedLayer]

    def __init__(self, layers: int, capacity: int):
        super().__init__(layers=[BufferedLayer(capacity) for _ in range(layers)])

    def select(self, rows: torch.Tensor) -> None:
        """Keeps `rows` (indices into the batch, repeats allowed) in every layer."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.select(rows)
