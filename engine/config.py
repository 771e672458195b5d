"""What a run is: one frozen dataclass per concern; `engine/recipe.py` reads them from TOML.

Fields marked `execution` say how a run is carried out (micro-batch, threads, logging), not what it computes up to
rounding: they may differ when a run is resumed. All other fields are the run's identity.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def _execution(default: Any) -> Any:
    return field(default=default, metadata={"execution": True})


@dataclass(frozen=True)
class SourceConfig:
    path: str = ""
    """Folder that `hotloop prepare` wrote."""
    weight: float = 1.0
    """Its share of the sequences is this over the sum of all weights."""


@dataclass(frozen=True)
class DataConfig:
    path: str = ""
    """Folder that `hotloop prepare` wrote; its held-out documents judge the run."""
    sources: tuple[SourceConfig, ...] = ()
    """Corpora to mix, each a table [[data.sources]] of path and weight; none: path alone. path may then be left out:
    it is the first one's."""
    general: str = ""
    """Folder of a corpus of general text: the loss on its held-out documents is reported before, during and after the
    run as what it forgets."""
    context: int | None = None
    """Tokens per packed sequence; none: the model's context."""
    workers: int = _execution(1)
    """Threads that assemble batches ahead of the step; 0 assembles them in the loop."""


@dataclass(frozen=True)
class ModelConfig:
    context: int = 1024
    """Longest sequence in tokens."""
    vocab_size: int | None = None
    """Entries of the vocabulary; none: the tokenizer's. Stored padded to a multiple of 64; padding never wins."""
    n_layers: int = 6
    """Blocks of attention and feed-forward."""
    d_model: int = 384
    """Width; a multiple of 8 n_heads where head_dim is none."""
    n_heads: int = 6
    """Heads of q."""
    n_kv_heads: int | None = None
    """Heads of k and v (grouped-query attention); none: n_heads."""
    d_ff: int | None = None
    """Width of the feed-forward layer; none: 4 d_model for gelu, 8/3 d_model rounded up to 64 for swiglu and geglu."""
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    """Added to a norm's variance."""
    activation: Literal["swiglu", "geglu", "gelu", "gelu_tanh"] = "swiglu"
    bias: bool = False
    """Biases in linear layers and layer norms."""
    tied_head: bool = True
    """One matrix embeds tokens and projects to the vocabulary."""
    causal: bool = True
    """A position sees itself and what is before it; false: an encoder."""
    dropout: float = 0.0
    """Share of activations set to 0 in training."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; output projections get init_std / sqrt(2 n_layers) where norms come
    first."""
    head_dim: int | None = None
    """Width of a head, a multiple of 8; none: d_model / n_heads."""
    norm_position: Literal["pre", "post"] = "pre"
    """pre: x + f(norm(x)) and a norm after the last layer; post: norm(x + f(x)), as in BERT."""
    embedding_norm: bool = False
    """A norm after the embedding (BERT, ModernBERT); with norms first it is the first layer's attention norm too."""
    norm_bias: bool | None = None
    """Biases in layer norms; none: bias."""
    qkv_bias: bool | None = None
    """Biases of q, k and v; none: bias."""
    qk_norm: bool = False
    """RMS norm over each head of q and k, before positions (Qwen3)."""
    token_types: int = 0
    """Rows of an embedding of token types (BERT's segments), row 0 for every token unless given; 0: none."""
    local_window: int | None = None
    """Local layers see this many positions to each side; none: every layer is global."""
    global_every: int = 1
    """With local_window, layer i (from 0) is global where i is a multiple of this."""
    local_rope_theta: float | None = None
    """Base of the rotary frequencies of local layers; none: rope_theta."""
    head: Literal["linear", "masked"] = "linear"
    """Before the projection to the vocabulary, masked: dense, gelu, norm; and a bias after it (BERT, ModernBERT)."""
    n_labels: int = 0
    """Classes of a classifier; 0: none."""
    pooling: Literal["cls", "mean", "last"] = "cls"
    """What of a text the classifier reads: its first position, the mean over it, or its last position."""
    classifier_head: Literal["linear", "bert", "modernbert"] = "linear"
    """linear: dropout, linear; bert: dense, tanh before; modernbert: dense, gelu, norm before."""
    classifier_bias: bool = True
    """A bias in the classifier's last layer."""


@dataclass(frozen=True)
class InitialConfig:
    """What a run starts from. With a path the model is the checkpoint's, and the section [model] stays as it is."""

    path: str = ""
    """Folder of a checkpoint (config.json + safetensors) or of a run; empty: [model], drawn by the seed."""
    context: int | None = None
    """Longest sequence in tokens, at most the checkpoint's; none: the checkpoint's."""
    dropout: float | None = None
    """Share of activations set to 0 in training; none: the checkpoint's."""
    pooling: Literal["cls", "mean", "last"] | None = None
    """What of a text a classifier reads: as model.pooling; none: as the checkpoint's family has it."""
    classifier_head: Literal["linear", "bert", "modernbert"] | None = None
    """As model.classifier_head; none: as the checkpoint's family has it."""


@dataclass(frozen=True)
class MaskingConfig:
    rate: float = 0.15
    """Share of the tokens that are hidden and predicted; special tokens never are. Classic 0.15, modern 0.3."""
    whole_words: bool = False
    """Hide all tokens of a word or none; words longer than a row's share are passed over."""
    mask_share: float = 0.8
    """Share of the hidden tokens that become the mask token."""
    random_share: float = 0.1
    """Share that becomes a random token; the rest stays as it is."""


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 1e-3
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    beta2: float = 0.95
    """Decay of its mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of that mean."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms and biases are never decayed."""
    decay_embeddings: bool = False
    """Decay embeddings too, and with them a tied head."""
    max_grad_norm: float | None = 1.0
    """Global gradient norm is clipped to this; none: no clipping."""
    moments: Literal["float32", "bfloat16", "int8"] = "float32"
    """How AdamW's two means are stored: 8, 4 or 2 bytes a parameter. The narrow ones are rounded stochastically."""


@dataclass(frozen=True)
class ScheduleConfig:
    kind: Literal["cosine", "trapezoid", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0."""
    decay_fraction: float = 0.4
    """Share of the steps in which a trapezoid falls; cosine and linear fall from the end of the warm-up."""
    final_lr_ratio: float = 0.0
    """Learning rate at the last step over the peak."""


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    """Optimizer steps of the whole run."""
    global_batch: int = 32
    """Packed sequences per optimizer step, over all ranks and accumulation."""
    micro_batch: int = _execution(8)
    """Packed sequences per forward pass of one rank."""
    seed: int = 0
    """Decides the initial weights, the order of the data, dropout and stochastic rounding."""
    precision: Literal["auto", "fp32", "bf16", "bf16_stochastic"] = "auto"
    """bf16: parameters in bf16 with an fp32 master copy; bf16_stochastic: stochastic rounding instead of the master;
    auto: bf16 where the device multiplies it natively, else fp32."""
    compile: bool = False
    """torch.compile the forward and backward pass (needs torch 2.13)."""
    activation_checkpointing: bool = False
    """Keep each layer's input only and compute the rest again in the backward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    threads: int | None = _execution(None)
    """CPU threads; none: torch's own choice."""


@dataclass(frozen=True)
class EvaluationConfig:
    every: int = _execution(200)
    """Steps between evaluations on held-out documents; 0: never."""
    max_bytes: int = _execution(65_536)
    """Held-out text of an evaluation during the run: whole documents, drawn once by the seed."""
    patience: int | None = None
    """Stop after this many evaluations without improvement; none: never."""


@dataclass(frozen=True)
class LabelsConfig:
    """Labelled texts of a classification."""

    train: tuple[str, ...] = ()
    """Files of labelled rows (CSV, JSONL, Parquet, also .gz or .zst) or folders of them."""
    validation: tuple[str, ...] = ()
    """The same; none: drawn from `train`. Every choice is made on validation."""
    test: tuple[str, ...] = ()
    """The same; none: drawn from `train`. The model sees it once, at the end."""
    split_field: str | None = None
    """Field of the rows of `train` that says train, validation or test; none: `train` is what its name says."""
    text: str = "text"
    """Field that holds the text."""
    label: str = "label"
    """Field that holds the label's name, or the names where multi_label is set."""
    classes: tuple[str, ...] = ()
    """Names of all labels; none: those of the training rows, sorted."""
    multi_label: bool = False
    """Any number of labels for a text: a list, or in CSV names with `separator` between them; an empty one is none."""
    separator: str = ","
    """Between the names of a multi-label text in CSV."""
    budget: int | None = None
    """Labelled texts to use, training and validation together, drawn by split_seed; none: all."""
    validation_fraction: float = 0.1
    """Share of the labelled texts drawn for validation where it has no files."""
    test_fraction: float | None = None
    """Share of all texts drawn for testing where it has no files; none: 0.2, or all that `budget` leaves."""
    split_seed: int = 0
    """Decides what is drawn. Draws are stratified, and a larger budget holds the smaller one."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: weight n / (K n_c) for the K classes; with multi_label, positives weigh negatives / positives."""
    weights: tuple[float, ...] = ()
    """Weights of the classes in the order of `classes`, which they need; instead of class_weights."""
    on_long: Literal["error", "truncate", "window"] = "error"
    """Texts longer than the model: refuse; keep their beginning; or overlapping windows whose probabilities are
    averaged (an epoch of training sees one window of each text, drawn anew)."""
    threshold: Literal["half", "validation"] = "half"
    """Multi-label: probability from which a label is given: 0.5, or the one of the best micro-F1 on validation."""
    best: Literal["macro_f1", "accuracy", "loss"] = "macro_f1"
    """What of the validation split the best checkpoint is best by, and early stopping looks at."""
    baselines: bool = _execution(True)
    """Fit the TF-IDF baseline beside the model."""


@dataclass(frozen=True)
class FinetuneConfig:
    """How far a checkpoint moves."""

    layer_decay: float = 1.0
    """Learning rate of a layer over that of the layer above it; the embeddings are below the first, the new head has
    the full rate."""
    frozen_layers: int = 0
    """Layers from the bottom that stay as they are, and with them the embeddings."""
    freeze_embeddings: bool = False
    """Leave the embeddings as they are where no layer is frozen."""
    epochs: float | None = None
    """Passes over the training texts; none: train.steps."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = _execution(200)
    """Steps between checkpoints; the last step always has one."""
    keep_last: int = _execution(2)
    """Newest checkpoints that are kept."""
    keep_best: int = _execution(1)
    """Checkpoints of the lowest held-out loss that are kept besides."""


@dataclass(frozen=True)
class GuardConfig:
    outlier_z: float | None = 8.0
    """Skip a step whose loss is this many standard deviations above its recent mean; none: never."""
    window: int = 128
    """Steps of the recent mean; nothing is an outlier in the first quarter of it."""
    skip_budget: int = 5
    """Skipped steps, non-finite or outliers, among the last `budget_window`; beyond it the run rewinds to the last good
    checkpoint and goes on with the data after the range."""
    budget_window: int = 50
    """Steps over which skips are counted."""
    max_rewinds: int = 3
    """Rewinds after which the run gives up."""


@dataclass(frozen=True)
class LogConfig:
    every: int = _execution(10)
    """Steps between lines of progress; metrics of every step are in metrics.jsonl."""
    tensorboard: bool = _execution(True)
    """Write event files for TensorBoard too."""


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    objective: Literal["causal", "masked", "classification"] = "causal"
    data: DataConfig = DataConfig()
    labels: LabelsConfig = LabelsConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    model: ModelConfig = ModelConfig()
    initial: InitialConfig = InitialConfig()
    masking: MaskingConfig = MaskingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guards: GuardConfig = GuardConfig()
    log: LogConfig = LogConfig()
