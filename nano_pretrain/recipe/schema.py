"""Every recipe field: its type, unit, default, one sentence, and what may happen to it on resume.

The dataclasses are OmegaConf structured configs: Hydra checks the type of each value when it composes a recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Optional

MISSING: Any = "???"
"""OmegaConf's mark of a value that the recipe must give."""

RETRIEVAL_TASKS = ("niah_single", "niah_multikey", "vt", "cwe")
"""Of RULER: a needle in a haystack, one among needles with other keys, variable tracking, common words extraction."""


class Resume(StrEnum):
    """What a resumed run may do with a field."""

    FREE = "free"
    """May differ: it does not change what is learned."""
    RECORDED = "recorded"
    """May be changed only by naming it on the command line; written to recipe_history.jsonl."""
    FIXED = "fixed"
    """Must be equal."""


def option(default: Any, doc: str, resume: Resume = Resume.FREE) -> Any:
    """A dataclass field with its one-sentence documentation and its resume class."""
    metadata = {"doc": doc, "resume": resume}
    if isinstance(default, type) or callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


FIXED, RECORDED = Resume.FIXED, Resume.RECORDED


@dataclass
class ModelConfig:
    """The hybrid: one symbol of `pattern` a layer, M Mamba-2, - feed-forward, * attention."""

    pattern: str = option(MISSING, "Layer pattern; its length is the number of layers.", FIXED)
    hidden_size: int = option(MISSING, "Width of the residual stream.", FIXED)
    ffn_hidden_size: int = option(MISSING, "Width of the squared-ReLU feed-forward layer.", FIXED)
    num_attention_heads: int = option(MISSING, "Query heads of an attention layer.", FIXED)
    num_query_groups: int = option(MISSING, "Key/value heads of an attention layer.", FIXED)
    head_dim: int = option(MISSING, "Channels of one attention head.", FIXED)
    mamba_num_heads: int = option(MISSING, "Heads of a Mamba-2 layer.", FIXED)
    mamba_head_dim: int = option(MISSING, "Channels of one Mamba-2 head; d_inner = heads x head dim.", FIXED)
    mamba_num_groups: int = option(MISSING, "Groups that share B and C, and groups of the gated norm.", FIXED)
    mamba_state_dim: int = option(MISSING, "Size of the state of one Mamba-2 channel.", FIXED)
    mamba_conv_width: int = option(4, "Width of the causal convolution, in tokens.", FIXED)
    vocab_size: int = option(MISSING, "Entries of the tokenizer; padded to a multiple of 1,024.", FIXED)
    norm_epsilon: float = option(1e-5, "Epsilon of every RMSNorm.", FIXED)
    init_std: float = option(
        MISSING, "Std of the normal initialisation; residual outputs use it / sqrt(layers).", FIXED
    )


@dataclass
class ParallelConfig:
    """Layout of the ranks; data parallelism is what is left of the world."""

    tensor: int = option(1, "Tensor-parallel ranks.")
    pipeline: int = option(1, "Pipeline stages.")
    context: int = option(1, "Context-parallel ranks.")
    pipeline_layers: Optional[list[int]] = option(
        None, "Layers of each pipeline stage, for example [15, 16, 16, 15]; null balances their FLOPs."
    )
    sequence: bool = option(False, "Shard activations between tensor-parallel regions along the sequence.")
    overlap: bool = option(
        True, "Reduce gradients during the backward pass, and gather updated parameters during the forward pass."
    )
    bucket_size: Optional[int] = option(
        None, "Parameters whose gradients are reduced together; null is 40M, or 1M for each data-parallel rank if more."
    )
    tensor_overlap: bool = option(
        False, "Send between tensor-parallel GPUs during matrix products, by Transformer Engine's user buffers."
    )
    cuda_graphs: bool = option(
        False, "Launch each layer's forward and backward pass as one CUDA graph, captured in the first step."
    )
    distributed_optimizer: bool = option(
        True, "Shard optimizer state over the data-parallel ranks (ZeRO-1); false is for fp32 only.", FIXED
    )


@dataclass
class PrecisionConfig:
    """Number formats of the step."""

    name: str = option("bf16", "fp32 | bf16 | fp8_blockwise | fp8_current_scaling.", FIXED)
    bf16_first_linears: int = option(0, "Linears at the start of the model that stay BF16 under FP8.", FIXED)
    bf16_last_linears: int = option(0, "Linears at the end of the model that stay BF16 under FP8.", FIXED)


@dataclass
class RecomputeConfig:
    """What the backward pass computes again instead of keeping it from the forward pass."""

    granularity: str = option(
        "none",
        "none: nothing; selective: convolution, scan, gate and norm of Mamba-2 layers and the squared ReLU; "
        "full: whole layers.",
    )


@dataclass
class OptimizerConfig:
    """AdamW with decoupled weight decay; one-dimensional parameters and biases are not decayed."""

    beta1: float = option(0.9, "Decay of the first moment.", FIXED)
    beta2: float = option(0.95, "Decay of the second moment.", FIXED)
    eps: float = option(1e-8, "Added to the square root of the second moment.", FIXED)
    weight_decay: float = option(0.1, "Decoupled weight decay, constant over the run.", FIXED)
    clip_grad: float = option(1.0, "Global gradient norm above which gradients are scaled down.", FIXED)


@dataclass
class ScheduleConfig:
    """Learning rate as a function of the tokens consumed since the stage began."""

    kind: str = option("wsd", "wsd | cosine | constant.", FIXED)
    lr: float = option(MISSING, "Peak learning rate.", FIXED)
    min_lr: float = option(0.0, "Learning rate at the end of the stage.", FIXED)
    warmup_tokens: int = option(0, "Tokens of linear warm-up from zero.", FIXED)
    decay_tokens: int = option(0, "Tokens of the final decay of WSD.", FIXED)
    decay_shape: str = option("minus_sqrt", "Shape of the decay of WSD: linear | cosine | minus_sqrt.", FIXED)
    extend_to: Optional[int] = option(
        None,
        "Tokens at which the stage ends instead of `tokens`: a longer stable part or, with fewer, an earlier decay; "
        "phases keep their shares of it.",
        RECORDED,
    )


@dataclass
class PhaseConfig:
    """One part of a stage with a blend of its own."""

    share: Optional[float] = option(None, "Fraction of the stage's tokens.", FIXED)
    tokens: Optional[int] = option(None, "Tokens of the phase, instead of a share.", FIXED)
    ramp_tokens: int = option(
        0, "Tokens over which the blend moves from that of the phase before to its own; 0 switches at once.", FIXED
    )
    blend: Any = option(MISSING, "Mapping source -> weight, or the name of a file in data_blend/blends/.", RECORDED)


@dataclass
class BatchRampConfig:
    """A global batch that grows in equal steps."""

    start: int = option(0, "Samples of the first optimizer steps; 0: the batch does not grow.", FIXED)
    increment: int = option(0, "Samples by which a step grows each time.", FIXED)
    ramp_tokens: int = option(0, "Tokens after which a step has `global_batch_size` samples.", FIXED)


@dataclass
class StageConfig:
    """A span of tokens with one sequence length, batch and layout."""

    tokens: int = option(MISSING, "Tokens of the stage.", FIXED)
    sequence_length: int = option(MISSING, "Tokens of a sample.", FIXED)
    micro_batch_size: int = option(1, "Samples a rank holds in one forward pass.")
    global_batch_size: int = option(MISSING, "Samples of an optimizer step over all ranks.", RECORDED)
    batch_ramp: BatchRampConfig = option(BatchRampConfig, "How the batch grows at the beginning.")
    schedule: ScheduleConfig = option(ScheduleConfig, "Learning-rate schedule.")
    phases: dict[str, PhaseConfig] = option(dict, "Phases in order: name -> share or tokens, and blend.")
    parallel: Optional[ParallelConfig] = option(None, "Layout of this stage; null means the recipe's `parallel`.")
    gpus: Optional[int] = option(None, "Ranks of this stage; null means `cluster.gpus`.")


@dataclass
class TokenizerConfig:
    """Where token ids come from."""

    kind: str = option(
        "bpe",
        "bpe: trained by `prepare` on the corpus | tekken: the 131,072-entry Tekken | file: the one in `file`.",
        FIXED,
    )
    file: Optional[str] = option(None, "A byte-level tokenizer.json, for example of a model that is imported.")
    train_bytes: int = option(8_000_000, "Bytes of corpus text a bpe tokenizer is trained on.", FIXED)


@dataclass
class LongQaConfig:
    """Who writes the questions about long documents, where a corpus file has derived sources."""

    writer: str = option(
        "extractive",
        "extractive: gaps in sentences of the text, no model | openai: a model behind an OpenAI-compatible endpoint.",
        FIXED,
    )
    model: Optional[str] = option(None, "Name of the model; for openai.", FIXED)
    url: Optional[str] = option(
        None, "Base URL, for example http://localhost:8000/v1; for openai, whose key is read from OPENAI_API_KEY."
    )
    concurrency: int = option(8, "Requests at a time.")
    timeout_seconds: int = option(120, "Longest silence of the endpoint before a request is made again.")


@dataclass
class DataConfig:
    """The corpus, where it lies, and how samples are cut from it."""

    corpus: str = option(MISSING, "Name of a corpus file in data_blend/corpora/.", FIXED)
    path: str = option(MISSING, "Directory of the prepared shards.")
    add: bool = option(
        False, "prepare: write what a corpus of other settings at data.path lacks as a new generation of its shards."
    )
    cache_dir: str = option("data/packages", "Directory of the downloaded, hash-checked packages.")
    tokenizer: TokenizerConfig = option(TokenizerConfig, "Tokenizer.")
    max_bytes_per_source: Optional[int] = option(None, "Text kept of each source, in bytes; null keeps all.", FIXED)
    heldout_share: float = option(0.01, "Share of the documents of a source that is held out, by document hash.", FIXED)
    long_qa: LongQaConfig = option(LongQaConfig, "Questions about long documents.")
    document_boundaries: str = option(
        "ignore", "ignore: plain concatenation | reset: state and attention restart.", FIXED
    )
    max_epochs: float = option(4.0, "How often a source may be read before the recipe is refused.")
    quota_window: int = option(1024, "Samples after which every source has had exactly its share.", FIXED)
    seed: int = option(1234, "Seed of the data order.", FIXED)


@dataclass
class ValidationConfig:
    """Loss on held-out text."""

    every: int = option(100, "Steps between two evaluations; 0 evaluates only at the start and the end.")
    tokens_per_source: int = option(16_384, "Held-out tokens read of each source.")
    prompts: list[str] = option(
        list, "Prompts that are continued when the run is finished, with the options of `generate`."
    )
    baselines: bool = option(
        False, "Train bigram and trigram models on the consumed tokens at the end, to compare with."
    )


@dataclass
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    every: int = option(100, "Steps between two checkpoints; 0 writes only at the end.")
    keep: int = option(2, "Newest checkpoints kept.")


@dataclass
class LogConfig:
    """Where a run reports to; metrics.jsonl always has every step."""

    every: int = option(1, "Steps between two updates of the progress bar, TensorBoard and wandb.")
    tensorboard: bool = option(True, "Write TensorBoard events to logs/.")
    wandb: str = option("offline", "offline | online | disabled; never asks for a login.")
    wandb_project: str = option("nano_pretrain", "Project of the wandb run.")
    fp8_every: int = option(
        100, "Steps between two lines of fp8.jsonl, besides step 1: what each FP8 linear loses on a CPU; 0 writes none."
    )
    profile: Optional[list[int]] = option(
        None, "First and last step to profile, for example [10,12]: logs/trace-rank-*.json for chrome://tracing."
    )


@dataclass
class ClusterConfig:
    """The machine."""

    gpus: int = option(1, "Ranks: GPUs, or CPU processes where there is no GPU.")
    peak_tflops: Optional[float] = option(
        None, "Dense peak of one rank in TFLOP/s; null measures (CPU) or looks up (GPU)."
    )
    threads_per_rank: Optional[int] = option(None, "CPU threads of a rank; null divides the machine's cores.")
    cpu_kernels: str = option(
        "auto",
        "auto: C++ kernels, compiled once for this CPU, where GCC is found, else plain; native: nothing but those; "
        "plain: PyTorch. Without effect on a GPU.",
    )
    timeout_seconds: int = option(600, "Longest wait of a rank for the others.")


@dataclass
class LaunchConfig:
    """How `launch` starts the ranks."""

    kind: str = option("local", "local: on this machine.")
    grace_seconds: float = option(60.0, "Time for a checkpoint between a stop signal and the end of the ranks.")


@dataclass
class RunConfig:
    """Identity of a run."""

    name: Optional[str] = option(
        None, "Name of the run; null means the recipe's name, and the overrides under --multirun."
    )
    dir: str = option("runs", "Directory that holds the runs.")
    seed: int = option(1234, "Seed of the initial weights.", FIXED)


@dataclass
class GenerateConfig:
    """Text generation."""

    prompt: str = option("The", "Text to continue.")
    max_new_tokens: int = option(100, "Tokens to add.")
    temperature: float = option(0.8, "0 is greedy.")
    top_p: float = option(0.95, "Smallest set of tokens with this probability is sampled from.")
    seed: int = option(0, "Seed of the sampling.")
    checkpoint: Optional[int] = option(None, "Consumed tokens of the checkpoint; null means the newest whole one.")


@dataclass
class EvaluateConfig:
    """Evaluation for length: retrieval tasks after RULER, and held-out loss by position; lm-evaluation-harness."""

    lengths: list[int] = option(list, "Tokens of a prompt, and of a sample of the loss by position; [] for neither.")
    tasks: list[str] = option(
        lambda: list(RETRIEVAL_TASKS), "Retrieval tasks: niah_single, niah_multikey, vt, cwe; [] for none."
    )
    examples: int = option(32, "Prompts of a task at a length, and samples of the loss by position.")
    seed: int = option(0, "Seed of the prompts.")
    harness_tasks: list[str] = option(
        list, "Tasks of lm-evaluation-harness, which the extra `eval` installs, for example [arc_easy]; [] for none."
    )
    harness_path: Optional[str] = option(None, "Directory of further tasks, as YAML files; null: those of the package.")
    harness_limit: Optional[int] = option(None, "Examples of a task of the harness, at most; null takes all.")
    at_stage_end: bool = option(True, "Evaluate at the end of each stage, too; the verb `evaluate` takes a checkpoint.")
    checkpoint: Optional[int] = option(None, "Consumed tokens of the checkpoint; null means the newest whole one.")


@dataclass
class HfConfig:
    """Conversion from and to Hugging Face checkpoints; a run knows nothing of it."""

    path: Optional[str] = option(None, "Directory of the Hugging Face checkpoint; null is the run's hf for `export`.")
    checkpoint: Optional[int] = option(
        None, "Consumed tokens of the checkpoint to export; null means the newest whole one."
    )
    dtype: str = option(
        "stored",
        "stored: as the checkpoint has it, on export the dtype of each tensor in the model; bf16 | fp32: every tensor.",
    )
    file_gigabytes: float = option(5.0, "Most gigabytes of a safetensors file.")
    verify: bool = option(True, "Compare what was converted with transformers' own model: weights and logits.")


@dataclass
class PlanConfig:
    """What the verb `plan` answers and assumes; a run knows nothing of it."""

    search: bool = option(
        False, "Look for layouts that fit each stage's ranks instead of planning the recipe's own; only for `plan`."
    )
    format: str = option("text", "text: tables for people | json: one object for programs, described in docs/plan.md.")
    hardware: str = option("h100", "a100 | b200 | cpu | h100 | h200, or the path of a file like theirs.")
    metrics: Optional[str] = option(
        None, "A metrics.jsonl whose measured tokens_per_second scales all speeds; null trusts the hardware's file."
    )
    storage_gigabytes_per_second: float = option(10.0, "Speed at which all ranks together write a checkpoint.")
    dir: Optional[str] = option(None, "Directory of plan.png, schedule and phases as a picture; null means the run's.")


@dataclass
class Recipe:
    """Everything a run depends on."""

    model: ModelConfig = option(ModelConfig, "Architecture.")
    parallel: ParallelConfig = option(ParallelConfig, "Layout.")
    precision: PrecisionConfig = option(PrecisionConfig, "Number formats.")
    recompute: RecomputeConfig = option(RecomputeConfig, "Recomputation.")
    optimizer: OptimizerConfig = option(OptimizerConfig, "AdamW.")
    data: DataConfig = option(DataConfig, "Corpus.")
    stages: dict[str, StageConfig] = option(dict, "Stages in order: name -> stage.")
    validation: ValidationConfig = option(ValidationConfig, "Held-out loss.")
    checkpoint: CheckpointConfig = option(CheckpointConfig, "Checkpoints.")
    log: LogConfig = option(LogConfig, "Logging.")
    cluster: ClusterConfig = option(ClusterConfig, "Machine.")
    launch: LaunchConfig = option(LaunchConfig, "Launcher.")
    run: RunConfig = option(RunConfig, "Identity.")
    generate: GenerateConfig = option(GenerateConfig, "Generation.")
    evaluate: EvaluateConfig = option(EvaluateConfig, "Evaluation for length, and by tasks.")
    hf: HfConfig = option(HfConfig, "Hugging Face checkpoints.")
    plan: PlanConfig = option(PlanConfig, "Planning.")
    stand_ins: dict[str, str] = option(
        dict,
        "Values that nothing published gives: field=value -> what stands in for what; an entry whose field has another "
        "value is dropped.",
    )
    pretraining_of: Optional[str] = option(
        None, "Recipe whose pretraining this one takes, because none of its pruned model is published; null: its own."
    )
    dry_run: bool = option(False, "Check everything, say what would happen, and stop.")
