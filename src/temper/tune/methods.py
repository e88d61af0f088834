"""Published ways to tune, one entry each."""

from __future__ import annotations

from temper.models.deltas import delta as deltas
from temper.models.deltas.base import NF4
from temper.models.deltas.budget import ExplainedVariance, SensitivityCubic, StructuredIfDense
from temper.models.deltas.delta import Entries, Full, Lora, LowRankExperts, SideLadder, SvdTriplet, TriFactor
from temper.models.deltas.init import Corda, Eva, FirstUpdate, LoraGa, Olora, Pissa, PrunedCopy, Vocabulary
from temper.models.deltas.where import SensitiveWeights
from temper.train.anchors import Fisher, Orthogonal
from temper.train.objectives.balance import LoadBalance
from temper.train.optimizers import AdamW, LayerwiseDecay
from temper.tune.engine import Tune
from temper.tune.head import Linear, TokenLinear
from temper.tune.loss import Causal, Label, Rationale
from temper.tune.surgery import Bidirectional

# All weights
FULL = Tune(delta=Full(), optimizer=AdamW(lr=1e-4, weight_decay=0.0))
LAYERWISE_DECAY = Tune(
    delta=Full(),
    optimizer=LayerwiseDecay(base=AdamW(lr=1e-4, weight_decay=0.0)),
    paper="Fine-Tuning Large Neural Language Models for Biomedical Natural Language Processing",
)

# Low-rank changes
LORA = Tune(delta=Lora(), paper="LoRA: Low-Rank Adaptation of Large Language Models")
RSLORA = Tune(delta=Lora(rank_stabilized=True), paper="A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA")
DORA = Tune(delta=Lora(dora=True), paper="DoRA: Weight-Decomposed Low-Rank Adaptation")
ADALORA = Tune(
    delta=SvdTriplet(rank=12),
    budget=SensitivityCubic(target=8),
    penalty=Orthogonal(),
    paper="Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
)
LORA_XS = Tune(delta=TriFactor(rank=32), paper="LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters")
LORA_MOLE = Tune(
    delta=LowRankExperts(),
    loss=(Causal(), LoadBalance()),
    paper="LLaVA-MoLE: Sparse Mixture of LoRA Experts for Mitigating Data Conflicts in Instruction Finetuning MLLMs",
)

# Where they start
OLORA = Tune(init=Olora(), paper="OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models")
PISSA = Tune(
    delta=Lora(rank=16, alpha=16.0),
    init=Pissa(),
    paper="PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
)
CORDA = Tune(init=Corda(), paper="CorDA: Context-Oriented Decomposition Adaptation of Large Language Models")
EVA = Tune(
    init=Eva(), budget=ExplainedVariance(), paper="One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation"
)
LORA_GA = Tune(init=LoraGa(), paper="LoRA-GA: Low-Rank Adaptation with Gradient Approximation")
LORA_SB = Tune(
    delta=TriFactor(rank=32),
    init=FirstUpdate(),
    paper="Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning",
)

# Other changes
SPT = Tune(
    where=SensitiveWeights(),
    delta=Entries(),
    budget=StructuredIfDense(),
    paper="Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning",
)
PROMPT_TUNING = Tune(
    delta=deltas.PromptTuning(num_virtual_tokens=20),  # type: ignore[attr-defined]  # made from peft's table
    init=Vocabulary(),
    optimizer=AdamW(lr=0.1, weight_decay=0.0),
    paper="The Power of Scale for Parameter-Efficient Prompt Tuning",
)
LST = Tune(
    delta=SideLadder(),
    init=PrunedCopy(score="fisher"),
    optimizer=AdamW(lr=3e-3, weight_decay=0.0),
    paper="LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning",
)

# On what, and with what in mind
QLORA = Tune(delta=Lora(rank=64, alpha=16.0), base=NF4(), paper="QLoRA: Efficient Finetuning of Quantized LLMs")
EWC_LORA = Tune(penalty=Fisher(), paper="Language Models Meet World Models: Embodied Experiences Enhance Language Models")
LS_LLAMA = Tune(head=Linear(), loss=Label(), paper="Label Supervised LLaMA Finetuning")
LS_UNLLAMA = Tune(head=TokenLinear(), surgery=Bidirectional(), loss=Label(), paper="Label Supervised LLaMA Finetuning")
DISTILLING_STEP_BY_STEP = Tune(
    delta=Full(),
    loss=Rationale(),
    optimizer=AdamW(lr=1e-4, weight_decay=0.0),
    paper="Distilling Step-by-Step! Outperforming Larger Language Models with Less Training Data and Smaller Model Sizes",
)
