"""`import temper.peft`: after it, `peft` loads adapters of Temper's own types (`peft.PeftModel.from_pretrained`)."""

from temper.models.deltas.tuners import register

register()
