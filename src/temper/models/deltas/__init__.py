"""Deltas: what is trained on a model, where, from which start, and on what base."""

from temper.models.deltas.attach import attach, continue_adapter, is_adapted, merge, prepare, to_plain_lora, trainable_parameters

__all__ = ["attach", "continue_adapter", "is_adapted", "merge", "prepare", "to_plain_lora", "trainable_parameters"]
