"""Wrong recipes: one line that names the field first, then the fix, exit code 2, the same from `plan` and `train`."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nano_pretrain.compose import compose
from nano_pretrain.plan.whole import make_plan
from nano_pretrain.recipe.errors import UserError

PRETRAIN, LONG = "stages.pretrain", "stages.long_context"
P1 = f"{PRETRAIN}.phases.p1"
HUGE = "1" + 30 * "0"
AS_BF16 = r"precision\.name=bf16 precision\.bf16_first_linears=0 precision\.bf16_last_linears=0"

# Overrides, field, problem, fix; the last two are regular expressions.
FORM = [
    ("recipe=nano_13b", "recipe", "no recipe 'nano_13b'", "choose one of .*nano_12b_v2"),
    ("recipe=null", "recipe", "is not the name of a file", "recipe=tiny"),
    ("recipe=nano_12b_v2 model=nano_13b", "model", "no model 'nano_13b'", "choose one of .*nano_12b_v2"),
    ("recipe=nano_12b_v2 model=[1,2]", "model", "is not the name of a file", "model=tiny"),
    ("recipe=nano_12b_v2 layout=tp9", "layout", "no layout 'tp9'", "tp2, tp4, tp8"),
    ("recipe=nano_12b_v2 extension=long", "extension", "no extension 'long'", "choose one of .*none"),
    ("recipe=nano_12b_v2 model.hiden_size=1", "model.hiden_size", "no such field", r"model\.hidden_size\?"),
    ("recipe=nano_12b_v2 paralel.tensor=1", "paralel", "no such field", r"did you mean parallel\?"),
    (f"recipe=nano_12b_v2 {LONG}.parallel.tensr=1", f"{LONG}.parallel.tensr", "no such field", r"tensor\?"),
    (f"recipe=nano_12b_v2 +{LONG}.warmup=1", f"{LONG}.warmup", "no such field", "choose from tokens"),
    ("recipe=nano_12b_v2 ~model", r"model.ffn_hidden_size", "has no value", r"model\.ffn_hidden_size=VALUE"),
    ("recipe=nano_12b_v2 ~schedule", f"{PRETRAIN}.schedule.lr", "has no value", r"schedule\.lr=VALUE"),
    ("recipe=nano_12b_v2 ~curriculum", f"{PRETRAIN}.phases", "is empty", "at least one phase"),
    ("recipe=nano_12b_v2 ~data", "data.corpus", "has no value", r"data\.corpus=VALUE"),
    ("recipe=tiny extension=none ~stages.pretrain", "stages", "the recipe has no stage", "add stages.NAME"),
    ("recipe=nano_12b_v2 model=null", "model", "is not the name of a file", "model=tiny"),
]
TYPES = [
    ("recipe=nano_12b_v2 model.hidden_size=wide", "model.hidden_size", "'wide' is not a whole number", "digits only"),
    ("recipe=nano_12b_v2 model.hidden_size=5120.5", "model.hidden_size", "is not a whole number", "digits only"),
    ("recipe=nano_12b_v2 model.init_std=small", "model.init_std", "'small' is not a number", "3.0e-4"),
    ("recipe=nano_12b_v2 parallel.sequence=often", "parallel.sequence", "neither true nor false", "one of them"),
    (f"recipe=nano_12b_v2 {PRETRAIN}.tokens=20T", f"{PRETRAIN}.tokens", "'20T' is not a whole number", "1000000"),
    ("recipe=nano_12b_v2 stages=[1]", "stages", "has another shape", "a mapping"),
    (f"recipe=nano_12b_v2 {PRETRAIN}.phases=[]", f"{PRETRAIN}.phases", "has another shape", "a mapping"),
    (f"recipe=nano_12b_v2 {P1}.blend=[a]", f"{P1}.blend", "is not a mapping", "name of a blend"),
    (f"recipe=nano_12b_v2 {P1}.blend={{a:many}}", f"{P1}.blend.a", "weight 'many' is not a number", "a number >= 0"),
    ("recipe=nano_12b_v2 stages=null", "stages", "cannot be null", "write a value"),
    (f"recipe=nano_12b_v2 {PRETRAIN}.tokens=null", f"{PRETRAIN}.tokens", "cannot be null", "write a value"),
    (f"recipe=nano_12b_v2 {PRETRAIN}.schedule=null", f"{PRETRAIN}.schedule", "cannot be null", "write a value"),
    ("recipe=nano_12b_v2 parallel=tp8", "parallel", "but a group of fields", r"parallel\.NAME=VALUE"),
]
NUMBERS = [
    ("recipe=nano_12b_v2 model.mamba_num_heads=0", "model.mamba_num_heads", "0 is not positive", "above 0"),
    ("recipe=nano_12b_v2 model.mamba_state_dim=-1", "model.mamba_state_dim", "-1 is not positive", "above 0"),
    ("recipe=nano_12b_v2 parallel.tensor=0", "parallel.tensor", "0 is not positive", "above 0"),
    ("recipe=nano_12b_v2 parallel.context=-2", "parallel.context", "-2 is not positive", "above 0"),
    ("recipe=nano_12b_v2 optimizer.eps=nan", "optimizer.eps", "nan is not a finite number", "a number"),
    ("recipe=nano_12b_v2 optimizer.beta2=1", "optimizer.beta2", "outside", "0.9"),
    *(
        (f"recipe=nano_12b_v2 {field}={value}", field, f"{value} is {problem}", fix)
        for field, value, problem, fix in (
            (f"{PRETRAIN}.tokens", 0, "not positive", "above 0"),
            (f"{PRETRAIN}.sequence_length", 0, "not positive", "above 0"),
            (f"{PRETRAIN}.global_batch_size", 0, "not positive", "above 0"),
            (f"{PRETRAIN}.schedule.lr", -1e-4, "not positive", "above 0"),
            (f"{PRETRAIN}.schedule.min_lr", "inf", "not a finite number", "a number"),
            (f"{PRETRAIN}.schedule.warmup_tokens", -1, "negative", "0 or more"),
            (f"{PRETRAIN}.schedule.decay_tokens", -1, "negative", "0 or more"),
            (f"{P1}.share", -1.0, "not positive", "above 0"),
            (f"{P1}.share", "nan", "not a finite number", "a number"),
            (f"{P1}.tokens", -3, "not positive", "above 0"),
            (f"{P1}.ramp_tokens", -1, "negative", "0 or more"),
            ("data.quota_window", 0, "not positive", "above 0"),
            ("data.quota_window", 2**20 + 1, "too large", f"at most {2**20}"),
        )
    ),
    (f"recipe=nano_12b_v2 {PRETRAIN}.schedule.lr=inf", f"{PRETRAIN}.schedule.lr", "inf is not a finite", "a number"),
    (f"recipe=nano_12b_v2 {PRETRAIN}.schedule.lr=1e30", f"{PRETRAIN}.schedule.lr", "is too large", "at most 100"),
    (f"recipe=nano_12b_v2 model.hidden_size={HUGE}", "model.hidden_size", "is too large", "at most 100000000"),
    (f"recipe=nano_12b_v2 {PRETRAIN}.global_batch_size={HUGE}", f"{PRETRAIN}.global_batch_size", "is too", "at most"),
    (f"recipe=nano_12b_v2 cluster.gpus={HUGE}", "cluster.gpus", "is too large", "at most"),
    ("recipe=tiny data.heldout_share=1", "data.heldout_share", "outside", "0.01"),
    ("recipe=tiny log.wandb=maybe", "log.wandb", "'maybe' is unknown", "offline, online, disabled"),
    ("recipe=tiny recompute.granularity=some", "recompute.granularity", "'some' is unknown", "none, selective, full"),
    ("recipe=tiny data.path=", "data.path", "is empty", "write a directory"),
    ("recipe=tiny data.corpus=", "data.corpus", "is empty", "data_blend/corpora"),
    ("recipe=tiny run.name=a/b", "run.name", "is not a directory name", "letters, digits"),
    ("recipe=tiny precision.name=fp4", "precision.name", "'fp4' is unknown", "choose one of fp32, bf16"),
]
SHAPES = [
    ("recipe=nano_12b_v2 model.pattern=M-A", "model.pattern", "unknown letter 'A' at position 3", r"\* \(attention\)"),
    ("recipe=nano_12b_v2 parallel.tensor=3", "parallel.tensor", r"3 does not divide model\.num_attention_heads = 40",
     "write 2, 4 or 8$"),
    ("recipe=nano_12b_v2 model.num_query_groups=4", "parallel.tensor",
     r"8 does not divide model\.num_query_groups = 4", "write 2 or 4$"),
    ("recipe=nano_12b_v2 model.mamba_num_groups=4", "parallel.tensor", r"8 does .*\.mamba_num_groups = 4", "2 or 4$"),
    ("recipe=tiny precision=bf16 parallel.tensor=2048 model.pattern=M- model.mamba_num_groups=2048 "
     "model.mamba_num_heads=2048 model.ffn_hidden_size=2048", "parallel.tensor",
     "2048 does not divide the padding of the vocabulary = 1024",
     "write 1, 2, .*, 512 or 1024$"),
    (f"recipe=nano_12b_v2 {LONG}.parallel.context=3", f"{LONG}.parallel.context",
     r"tensor x context = 24 does not divide model\.mamba_num_heads = 128", "write 1, 2, 4, 8 or 16$"),
    ("recipe=nano_12b_v2_paper extension=nano_v2_512k", f"{LONG}.parallel.context", "= 128 .* = 160", "1, 2 or 4$"),
    ("recipe=tiny model.mamba_num_groups=8 model.mamba_num_heads=48 parallel.context=3 cluster.gpus=6 "
     f"{PRETRAIN}.sequence_length=3072", "parallel.context", "3 neither divides .* 8 Mamba groups",
     "write 1, 2, 4, 8, 16, 24 or 48$"),
    ("recipe=nano_12b_v2 parallel.pipeline=63", "parallel.pipeline", "63 is more than the 62 layers", "62 or less$"),
    ("recipe=nano_12b_v2 cluster.gpus=6144", f"{PRETRAIN}.global_batch_size", "736 .* 768", r"gpus=\d+ or 5888"),
    ("recipe=nano_12b_v2 cluster.gpus=5889", "parallel", "= 8 does not divide the 5889 ranks", r"gpus=.*5888"),
    (f"recipe=nano_12b_v2 {LONG}.gpus=1500", f"{LONG}.parallel", "128 does not divide the 1500", r"gpus=\d+ or 1536"),
    (f"recipe=nano_12b_v2 {PRETRAIN}.micro_batch_size=5", f"{PRETRAIN}.global_batch_size", "size 5", "multiple of"),
    (f"recipe=nano_12b_v2 {LONG}.sequence_length=500000", f"{LONG}.sequence_length", "by tensor x 2 x context = 256",
     rf"499968 or 500224, or change {LONG}\.parallel$"),
    ("recipe=nano_12b_v2 layout=dp parallel.sequence=true", "parallel.sequence", "needs tensor", "sequence=false"),
    ("recipe=nano_12b_v2 parallel.distributed_optimizer=false precision=bf16", "parallel.distributed_optimizer",
     "cannot be checkpointed", "distributed_optimizer=true"),
    ("recipe=nano_12b_v2 model.vocab_size=100000", "model.vocab_size", "Tekken has 131072", "vocab_size=131072"),
]  # fmt: skip
PRECISION = [
    ("recipe=nano_12b_v2_paper parallel.tensor=3", "parallel.tensor", "3 does not divide", "write 2$"),
    ("recipe=nano_12b_v2_paper layout=tp8 cluster.gpus=6144", "parallel.tensor", "22688 rows .* 2836",
     "tensor=2 cluster.gpus=1536, or"),
    ("recipe=nano_9b_v2 layout=tp8", "parallel.tensor", "15680 channels .* 1960", "tensor=4, or"),
    ("recipe=tiny layout=tp2 model.mamba_num_heads=16", "parallel.tensor", "784 rows .* 392",
     r"parallel\.tensor=1 parallel\.sequence=false, or"),
    ("recipe=tiny layout=tp4 model.ffn_hidden_size=1008 model.mamba_num_groups=8 cluster.gpus=4", "parallel.tensor",
     "1568 rows .* 392", r"parallel\.tensor=1 parallel\.sequence=false cluster\.gpus=2, or"),
    ("recipe=tiny parallel.sequence=true model.mamba_num_heads=16", "parallel.sequence", "needs tensor",
     "sequence=false$"),
    ("recipe=tiny precision=fp8_blockwise model.hidden_size=250", "model.hidden_size", "250 is no", "240 or 256"),
    ("recipe=tiny precision=fp8_blockwise model.hidden_size=8", "model.hidden_size", "8 is no", "write 16, or"),
    ("recipe=tiny precision=fp8_blockwise model.ffn_hidden_size=770", "model.ffn_hidden_size",
     "770 channels of a feed-forward layer are no multiple of 16", "write 768 or 784, or precision.name=bf16 "),
    ("recipe=tiny layout=tp2 model.ffn_hidden_size=1000", "model.ffn_hidden_size", "over 2 .* are 500 on each",
     "write 992 or 1024, or"),
    ("recipe=tiny precision=fp8_blockwise model.mamba_num_heads=20", "model.mamba_num_heads", "916", "16 or 32, or"),
    ("recipe=tiny precision=fp8_current_scaling model.head_dim=7", "model.head_dim", "56", "write 6 or 8, or"),
    ("recipe=tiny model.mamba_num_heads=12 model.pattern=-M-M- precision.bf16_first_linears=8 "
     "precision.bf16_last_linears=0", "model.mamba_num_heads", "652 rows .* 16, which FP8 needs of layers in BF16 too",
     "write 16, or"),
    ("recipe=nano_12b_v2 model.hidden_size=5136", "model.hidden_size", "5136 is no multiple of 128, which fp8_b",
     r"write 5120 or 5248, parallel\.sequence=false or precision\.name=bf16 [^,]*$"),
    (f"recipe=nano_12b_v2 {PRETRAIN}.sequence_length=8064", f"{PRETRAIN}.sequence_length",
     "8064 leave 1008 tokens on a rank, no multiple of 128", "write 7168 or 8192, parallel.sequence=false or"),
    (f"recipe=tiny precision=fp8_blockwise {PRETRAIN}.sequence_length=513", f"{PRETRAIN}.sequence_length",
     "8 x 513 leave 4104 tokens", f"write 512 or 514, or {AS_BF16}$"),
    ("recipe=tiny precision.name=bf16", "precision.bf16_first_linears", "4 .* precision is bf16",
     rf"write {AS_BF16}, or precision\.name=fp8_blockwise$"),
    ("recipe=tiny precision=fp32 precision.bf16_last_linears=4", "precision.bf16_last_linears", "precision is fp32",
     r"write precision\.name=fp32 precision\.bf16_last_linears=0, or precision\.name=fp8_blockwise$"),
    ("recipe=nano_12b_v2 precision.bf16_first_linears=3", "precision.bf16_first_linears", "inside a layer", "2 or 4"),
    ("recipe=nano_12b_v2 precision.bf16_last_linears=126", "precision.bf16_last_linears", "none of the 124", "=118 or"),
    ("recipe=nano_12b_v2 precision.bf16_last_linears=120", "precision.bf16_last_linears",
     "120 and the first 4 leave none of the 124 linears of the model in FP8",
     rf"write precision\.bf16_last_linears=118 or less, or {AS_BF16}$"),
    ("recipe=tiny precision.bf16_first_linears=22 precision.bf16_last_linears=0", "precision.bf16_first_linears",
     "22 leaves none of the 22", r"=20 or less, or precision\.name=bf16 precision\.bf16_first_linears=0$"),
    ("recipe=tiny precision.bf16_first_linears=25", "precision.bf16_first_linears", "25 and .* leave none", "=16 or"),
    ("recipe=tiny precision.bf16_first_linears=17", "precision.bf16_first_linears", "inside a layer", "write 16$"),
    ("recipe=tiny precision.bf16_first_linears=3 precision.bf16_last_linears=15", "precision.bf16_first_linears",
     "inside a layer", "write 2 or 4$"),
    ("recipe=tiny precision.bf16_first_linears=5 precision.bf16_last_linears=15", "precision.bf16_first_linears",
     "inside a layer", "write 4$"),
    ("recipe=tiny precision.bf16_first_linears=3 precision.bf16_last_linears=22", "precision.bf16_last_linears",
     "22 and the first 3 leave none of the 22", "=16 or less"),
    ("recipe=tiny model.pattern=M*M-", "precision.bf16_first_linears", "4 and the last 4 leave none of the 8 linears",
     rf"write precision\.bf16_first_linears=2 or less, or {AS_BF16}$"),
    *(
        (f"recipe=tiny model.pattern=M {end}", f"precision.bf16_{larger}_linears", "none of the 2 linears of the model",
         rf"write precision\.bf16_{larger}_linears=0 precision\.bf16_{other}_linears=0, or {AS_BF16}$")
        for end, larger, other in (
            ("", "first", "last"), ("precision.bf16_first_linears=3", "last", "first"),
            ("precision.bf16_last_linears=5", "last", "first"),
        )
    ),
]  # fmt: skip
LENGTHS = [
    (f"recipe=nano_12b_v2 {PRETRAIN}.tokens=6000000", f"{PRETRAIN}.tokens", "less than a step", "at least 6029312"),
    (f"recipe=nano_12b_v2 {PRETRAIN}.schedule.kind=step", f"{PRETRAIN}.schedule.kind", "'step'", "wsd, cosine"),
    (f"recipe=nano_12b_v2 {PRETRAIN}.schedule.decay_shape=x", f"{PRETRAIN}.schedule.decay_shape", "'x'", "minus_sqrt"),
    (f"recipe=nano_12b_v2 {PRETRAIN}.schedule.min_lr=1e-3", f"{PRETRAIN}.schedule.min_lr", "above the peak", "lower"),
    (f"recipe=nano_12b_v2 {PRETRAIN}.schedule.warmup_tokens=21000000000000", f"{PRETRAIN}.schedule.warmup_tokens",
     "more than the", "at most 20000000000000"),
    (f"recipe=nano_12b_v2 {PRETRAIN}.schedule.decay_tokens=19999000000000", f"{PRETRAIN}.schedule.decay_tokens",
     "more than the stage's", "at most 19992000000000"),
    (f"recipe=nano_12b_v2 {PRETRAIN}.schedule.kind=cosine", f"{PRETRAIN}.schedule.decay_tokens",
     "3600000000000 does nothing with .*kind=cosine", r"schedule\.decay_tokens=0, or another kind"),
    (f"recipe=nano_12b_v2 {PRETRAIN}.schedule.kind=constant {PRETRAIN}.schedule.decay_tokens=0",
     f"{PRETRAIN}.schedule.min_lr", "4.5e-06 does nothing with .*kind=constant", r"schedule\.min_lr=0, or another"),
    (f"recipe=nano_12b_v2 {PRETRAIN}.batch_ramp.increment=184", f"{PRETRAIN}.batch_ramp.increment",
     r"184 does nothing while .*batch_ramp\.start=0", r"batch_ramp\.start=SAMPLES, or .*\.increment=0"),
    (f"recipe=nano_12b_v2 {PRETRAIN}.batch_ramp.ramp_tokens=184", f"{PRETRAIN}.batch_ramp.ramp_tokens",
     r"184 does nothing while .*batch_ramp\.start=0", r"batch_ramp\.start=SAMPLES, or .*\.ramp_tokens=0"),
    (f"recipe=nano_12b_v2 {P1}.share=0.7", f"{PRETRAIN}.phases", "shares add up to 1.1", "add up to 1"),
    (f"recipe=nano_12b_v2 {P1}.share=1.7", f"{P1}.share", "1.7 is too large", "at most 1$"),
    (f"recipe=nano_12b_v2 {P1}.tokens=5", f"{P1}", "both share and tokens", "give one"),
    (f"recipe=nano_12b_v2 {P1}.share=null", f"{P1}", "neither share nor tokens", "give one"),
    (f"recipe=nano_12b_v2 {P1}.share=null {P1}.tokens=5", f"{PRETRAIN}.phases", "lengths add up", "20000000000000"),
    (f"recipe=nano_12b_v2 {P1}.blend={{a:0}}", f"{P1}.blend", "all weights are 0", "positive weight"),
    (f"recipe=nano_12b_v2 {P1}.blend={{a:nan}}", f"{P1}.blend.a", "weight is nan", "finite"),
    (f"recipe=nano_12b_v2 {P1}.blend={{a:-1}}", f"{P1}.blend.a", "weight is -1", "not negative"),
    (f"recipe=nano_12b_v2 {P1}.blend=nemotron_h_p9", f"{P1}.blend", "no blend 'nemotron_h_p9'", "nemotron_h_p1"),
    ("recipe=nano_12b_v2 validation.tokens_per_source=8", "validation.tokens_per_source", "sample of 524288", "least"),
]  # fmt: skip
WRONG = [*FORM, *TYPES, *NUMBERS, *SHAPES, *PRECISION, *LENGTHS]
SECONDS = 1.0
"""What a refusal may take, the import of Hydra included; processor time, because the machine has other work."""


def test_there_are_at_least_sixty() -> None:
    assert len({overrides for overrides, *_ in WRONG}) == len(WRONG) >= 60


@pytest.mark.parametrize(("overrides", "field", "problem", "fix"), WRONG, ids=[case[0] for case in WRONG])
def test_wrong_recipe_is_answered_with_field_and_fix(overrides: str, field: str, problem: str, fix: str) -> None:
    started = time.process_time()
    with pytest.raises(UserError) as refusal:
        compose(overrides.split())
    assert time.process_time() - started < SECONDS
    line = str(refusal.value)
    assert "\n" not in line
    assert re.match(rf"{re.escape(field)}: .*{problem}.*; .*{fix}", line), line


@pytest.mark.parametrize("case", [FORM[6], TYPES[0], NUMBERS[9], SHAPES[8], PRECISION[0], LENGTHS[6]])
def test_train_refuses_in_the_words_of_plan(case: tuple[str, str, str, str], tmp_path: Path) -> None:
    answers = [
        subprocess.run(
            [sys.executable, "-m", "nano_pretrain", verb, *case[0].split()],
            cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
        )
        for verb in ("plan", "train")
    ]  # fmt: skip
    plan, train = answers
    assert (plan.returncode, plan.stdout, plan.stderr) == (train.returncode, train.stdout, train.stderr)
    assert plan.returncode == 2
    assert re.fullmatch(rf"nano-pretrain: {re.escape(case[1])}: .*{case[2]}.*; .*{case[3]}.*\n", plan.stderr)
    assert list(tmp_path.iterdir()) == []


def test_plan_refuses_what_the_scan_cannot_address_on_gpus_and_only_there() -> None:
    layout = [f"{LONG}.parallel.tensor=4", f"{LONG}.parallel.context=1", f"{LONG}.gpus=48"]
    with pytest.raises(UserError, match=rf"^{LONG}\.sequence_length: in_proj's output .*; raise parallel\.context"):
        make_plan(compose(["recipe=nano_12b_v2", *layout]).recipe)
    make_plan(compose(["recipe=nano_12b_v2", "precision=bf16", "plan.hardware=cpu", *layout]).recipe)


def test_plan_refuses_bf16_layers_that_a_pipeline_cannot_have_on_gpus_and_only_there() -> None:
    overrides = ["recipe=tiny", "parallel.pipeline=8", "cluster.gpus=8", "data.path=nowhere"]
    with pytest.raises(UserError, match=r"^precision\.bf16_first_linears: 4 linears are 2 layers, and on GPUs "):
        make_plan(compose([*overrides, "plan.hardware=h100"]).recipe)
    make_plan(compose(overrides).recipe)
