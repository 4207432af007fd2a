"""The method and the program as their tests state them, on tiny models, in the order of red.py.

What is expected is written out by hand, or by a function of red.py that an earlier test has
checked so: plain autograd checks `red.reference_step`, which then checks the fast step.
"""

import copy
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import types
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import pyarrow.parquet
import pytest
import torch

OUTSIDE = dict(os.environ)  # where a GPU is seen, if there is one
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # float32 on the CPU, also where there is a GPU
os.environ["HF_HUB_OFFLINE"] = "1"  # the hub out of reach, at once and everywhere

import datasets
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import red

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)  # these models are too small to share

HERE = Path(red.__file__).parent
SHAPE = dict(vocab_size=60, hidden_size=32, intermediate_size=40, num_hidden_layers=2)
SHAPE |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
SHAPE |= dict(bos_token_id=None, eos_token_id=1, pad_token_id=0)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e3, factor=8.0, low_freq_factor=1.0)
LLAMA3 |= dict(high_freq_factor=4.0, original_max_position_embeddings=16)
FAMILIES = {  # what their configs have besides; the name begins with the model_type
    "llama": {},
    "llama-tied": dict(tie_word_embeddings=True),
    "llama-biases": dict(attention_bias=True, mlp_bias=True),
    "llama-rope": dict(head_dim=10, rope_parameters=LLAMA3),
    "mistral": dict(sliding_window=6),
    "qwen2": {},
    "qwen2-tied": dict(tie_word_embeddings=True),
    "qwen2-windows": dict(use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": dict(head_dim=12, attention_bias=True),
}
SELECTIONS = ["red", "random-selection"]
ROTATIONS = ["pca", "shared-orthogonal", "orthogonal"]
METHODS = [*SELECTIONS, *ROTATIONS, "lrc"]
TWO = ("input_layernorm", "post_attention_layernorm")
NORMS = [f"model.layers.{i}.{name}" for i in (0, 1) for name in TWO] + ["model.norm"]
SEVEN = [f"self_attn.{name}_proj" for name in "qkvo"]
SEVEN += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
LINEAR = [f"model.layers.{i}.{name}" for i in (0, 1) for name in SEVEN]
WRITERS = ("o_proj", "down_proj")
ALPHABET = "0123456789+-*=?;#:abcdefghijklmnopqrstuvwxyz\n"
every_family = pytest.mark.parametrize("family", FAMILIES)
PROBLEMS = [  # prompt, answer
    ("Question: two and 40?\nAnswer: ", "So 40+2 = <<40+2=42>>42 it is <<42*2=84>>84.\n#### 84"),
    ("Question: one?\nAnswer: ", "It is <<1=1>>1."),
    ("Question: a <<1+1=2>> in the question?\nAnswer: ", "No <<2*2=4>>4 <<4-1=3>>3 <<3+9=12>>12"),
]
both_optimizers = pytest.mark.parametrize("optimizer", ["adam", "muon"])


def make_teacher(family="llama", dtype=torch.float32):
    """A random teacher in which every norm gain and bias differs from its usual 1 or 0."""
    torch.manual_seed(0)
    values = SHAPE | FAMILIES[family] | {"attention_dropout": 0.5}  # which nothing may switch on
    config = AutoConfig.for_model(family.split("-")[0], **values)
    teacher = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in teacher.requires_grad_(False).parameters():
        if parameter.dim() == 1:
            parameter += 0.3 * torch.randn(parameter.shape)
        else:
            parameter *= 4
    teacher.model.embed_tokens.weight[30:] *= 3  # so that sequences differ in size
    teacher.model.embed_tokens.weight[0].normal_()  # the padding token's, or it would be 0
    return teacher.eval()


def make_batch(rows=3, tokens=12, seed=1, least=0, most=60):
    """Random tokens, all of them labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(least, most, (rows, tokens), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


# To calibrate on: two sequences at a time, which differ in the size of their activations.
SAMPLES = [make_batch(2, 9, 0, 2, 30), make_batch(2, 9, 1, 30), make_batch(2, 9, 2, 2)]


def uneven_batches():
    """With different numbers of labels, none in the last, and of tokens; one has padding."""
    batches = [make_batch(2, seed=0), make_batch(2), make_batch(1, 9), make_batch(2, seed=3)]
    batches[0]["labels"][0, :9] = batches[1]["labels"][1, 5] = batches[3]["labels"][:] = -100
    batches[0]["input_ids"][0, 2:4] = 0
    return batches


def make_student(teacher, method="red", width=16, shaken=False):
    """A student, and what it was calibrated by; shaken: as after training."""
    calibration, generator = red.calibrate(teacher, SAMPLES), torch.Generator().manual_seed(5)
    student = red.new_student(method, teacher, width, calibration)
    for parameter in student.parameters() if shaken else ():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    student.merge()
    return student, calibration


def logits(model, batch):
    with torch.no_grad():
        return model(batch["input_ids"]).logits


def seen_by(model, names, batch):
    """(input, output) of the named modules, by name, from a hook of this file's own."""
    names, seen = {model.get_submodule(name): name for name in names}, {}

    def look(module, inputs, output):
        if module in names:
            seen[names[module]] = inputs[0], output

    with torch.nn.modules.module.register_module_forward_hook(look):
        model(batch["input_ids"])
    return seen


def tiny_config(**changes):
    """The config of the tiny world's teacher, with changes."""
    return AutoConfig.for_model(**json.loads((HERE / "tiny_config.json").read_text()) | changes)


def tokenizer_of(kind, text):
    """Of characters; or of bytes, with tokens that straddle `=` and `>>`, prompt and answer."""
    vocabulary = {character: i for i, character in enumerate(sorted(set(text)))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=290, initial_alphabet=alphabet, show_progress=False
        )
        texts = ["=42>>42", "=84>>84", "2=8", *text.split("Question")]
        tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


# ==== The method ==============================================================================


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_family
def test_what_calibration_keeps_by_brute_force(family, dtype):
    """Also of a teacher in bfloat16, whose statistics are made in float32 or better."""
    teacher, near = make_teacher(family, dtype), dict(rtol=1e-5, atol=1e-6)
    calibration, importance = red.calibrate(teacher, iter(SAMPLES)), 0.0
    layers = ["model.embed_tokens", "model.layers.0", "model.layers.1"]
    seen = [seen_by(teacher, layers + NORMS + LINEAR, batch) for batch in SAMPLES]
    for name in layers:  # mean of |activation| over tokens, L2 norm over sequences, mean over these
        sequences = [sequence.double() for part in seen for sequence in part[name][1]]
        squares = [(sequence.abs().sum(0) / len(sequence)) ** 2 for sequence in sequences]
        importance = importance + sum(squares).sqrt() / 3
    assert calibration.importance.dtype == torch.float32 and list(calibration.moments) == NORMS
    torch.testing.assert_close(calibration.importance.double(), importance, **near)
    for name in NORMS:
        tokens = torch.cat([part[name][0].flatten(0, 1) for part in seen]).double()
        expected = sum(torch.outer(u, u) / u.square().sum() for u in tokens) / len(tokens)
        torch.testing.assert_close(calibration.moments[name].double(), expected, **near)
    for name in LINEAR:
        expected = torch.cat([part[name][1].flatten() for part in seen]).double().square().mean()
        assert calibration.teacher_mean_squares[name] == pytest.approx(expected.item(), rel=1e-5)


def test_the_width_is_near_a_ratio_and_the_best_channels_are_kept_in_order():
    config = make_teacher().config  # it has four heads, of which the width is a multiple
    for wanted, given in {0.3: 4, 5: 4, 7: 8, 14: 16, 17: 16, 32: 32}.items():
        assert red.choose_width(wanted / 32, config) == given
    channels = red.select_channels(torch.tensor([3.0, 1.0, 2.0, 3.0, 2.0]), 3)
    assert (torch.arange(5.0) @ red.selection_matrix(channels, 5)).tolist() == [0, 2, 3]
    for wrong in (0, 5):
        with pytest.raises(ValueError):
            red.select_channels(torch.ones(4), wrong)


@pytest.mark.parametrize("method", [*SELECTIONS, "pca", "shared-orthogonal"])
@every_family
def test_at_full_width_the_student_is_the_teacher_and_shares_nothing_with_it(family, method):
    """Also with tied heads, biases, windows, gains, and dropout in the config."""
    student, _ = make_student(teacher := make_teacher(family, torch.float64), method, 32)
    got, expected = logits(student.model, make_batch()), logits(teacher, make_batch())
    near = dict(rtol=1e-6, atol=1e-5) if method in SELECTIONS else dict(rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(got, expected, **near)
    for tensor in [*student.model.parameters(), *student.model.buffers()]:
        tensor.data.zero_()
    student.model.to(torch.bfloat16)
    assert torch.equal(logits(teacher, make_batch()), expected)


@pytest.mark.parametrize("method", METHODS)
def test_where_projections_start(method):
    student, calibration = make_student(teacher := make_teacher(), method)
    first, *_ = projections = [*student.projections.values()]
    different = len({str(projection.tolist()) for projection in projections})
    assert different == (len(projections) if method in ("lrc", "orthogonal") else 1)
    assert bool(((first == 0) | (first == 1)).all()) == (method in SELECTIONS)
    if method == "red":
        order = sorted(range(32), key=lambda channel: -calibration.importance[channel])
        assert first.argmax(0).tolist() == sorted(order[:16])
    if method == "pca":  # the leading eigenvectors of what is the same at all norms
        moment = sum(calibration.moments.values())
        kept, values = (first.T @ moment @ first).diagonal(), torch.linalg.eigvalsh(moment)
        torch.testing.assert_close(kept, values.flip(0)[:16], rtol=1e-4, atol=1e-5)
    if method == "lrc":  # N(0, 0.02) at a width of 3,072, and at any other of the same size
        size = torch.cat(projections).square().mean().item()
        assert size == pytest.approx(3072 * 0.02**2 / 32, rel=0.06)
    for projection in projections if method != "lrc" else ():
        torch.testing.assert_close(projection.T @ projection, torch.eye(16), rtol=0, atol=1e-5)
    positive = 0
    for seed in range(30):
        again, *_ = red.new_student(method, teacher, 16, calibration, seed).projections.values()
        assert torch.equal(again, first) == (seed == 0 or method in ("red", "pca"))
        positive += (again[0, 0] > 0).item()
    assert 5 < positive < 25 or method in (*SELECTIONS, "pca")  # no entry has a sign of its own
    with pytest.raises(ValueError, match="no method"):
        red.new_student(method.upper(), teacher, 16, calibration)


@pytest.mark.parametrize("method", METHODS)
def test_where_the_gains_start(method):
    """At rms(kept) / rms(all), root mean square over tokens, times the channels' gains; or at 1."""
    student, _ = make_student(teacher := make_teacher("qwen2-tied"), method)
    basis = student.projections["model.embed_tokens"].detach()
    seen = [seen_by(teacher, NORMS, batch) for batch in SAMPLES]
    for name in NORMS:
        tokens = torch.cat([part[name][0].flatten(0, 1) for part in seen])
        kept = (tokens @ basis).square().mean(1) / tokens.square().mean(1)
        expected = torch.ones(16) * (1 if method in ("lrc", "orthogonal") else kept.mean().sqrt())
        if method in SELECTIONS:
            expected = expected * teacher.get_submodule(name).weight[basis.argmax(0)]
        torch.testing.assert_close(student.gains[name].detach(), expected, rtol=1e-4, atol=1e-5)


def wrap_in_projections(student, teacher, method):
    """Compute as the paper writes it, each projection around the teacher's module: no merging."""

    def projected(layer, projection, writes, gain, x):
        return layer(x) @ projection if writes else layer(x @ projection.T * gain)

    for name in ["lm_head", "model.embed_tokens", *LINEAR]:
        block = name[: len("model.layers.N")]
        norm = "model.norm" if name == "lm_head" else f"{block}.{TWO['mlp' in name]}"
        projection = student.projections.get(name, student.projections["model.embed_tokens"])
        writes = name.endswith((*WRITERS, "embed_tokens"))  # for the latter, rows are its output
        gain = teacher.get_submodule(norm).weight if method in ROTATIONS and not writes else 1.0
        parts = (teacher.get_submodule(name), projection, writes, gain)
        student.model.get_submodule(name).forward = functools.partial(projected, *parts)
    for name in NORMS:
        student.model.get_submodule(name).weight = student.gains[name]


@pytest.mark.parametrize("method", METHODS)
@every_family
def test_merged_is_projected_and_exported_is_merged_for_anyone_to_read(family, method, tmp_path):
    """By stock transformers, and by older programs, which know no Qwen2 with a head_dim."""
    teacher, batch = make_teacher(family, torch.float64), make_batch()
    teacher.config.quantization_config = {"quant_method": "gguf"}  # what it was read from
    student, _ = make_student(teacher, method, shaken=True)
    (tokenizer := red.tiny_tokenizer()).add_special_tokens({"extra_special_tokens": ["#"]})
    red.export_student(student, red.Task(teacher, tokenizer, held_out=[batch]), tmp_path)
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    merged = logits(student.model, batch)
    assert torch.equal(logits(reopened, batch), merged)
    wrap_in_projections(student, teacher, method)
    torch.testing.assert_close(logits(student.model, batch), merged, rtol=1e-5, atol=1e-5)
    tied = "tied" in family and method not in ROTATIONS
    assert tied == ("lm_head" not in student.projections)
    expected = teacher.config.to_dict() | {"hidden_size": 16, "tie_word_embeddings": tied}
    expected |= {"rope_theta": 1e4, "architectures": [type(teacher).__name__], "dtype": "float64"}
    expected["head_dim"] = {"llama-rope": 10, "qwen3": 12}.get(family, 8)
    if family == "llama-rope":
        expected |= {"rope_theta": 5e3, "rope_scaling": LLAMA3}  # for transformers 4 and MLX
    if family in ("qwen2", "qwen2-tied"):
        expected |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        expected |= {"attention_bias": True}
    stored = json.loads((tmp_path / "config.json").read_text())
    assert {key for key, value in stored.items() if value != expected.get(key, ...)} == set()
    assert {"rope_theta", "head_dim"} <= stored.keys() and "quantization_config" not in stored
    assert ("rope_scaling" in stored) == (family == "llama-rope")
    stored = json.loads((tmp_path / "tokenizer_config.json").read_text())
    names = (stored["tokenizer_class"], stored["additional_special_tokens"])
    assert names == ("PreTrainedTokenizerFast", ["#"]) and "extra_special_tokens" not in stored


def losses_by_hand(student_logits, teacher_logits, labels, temperature):
    """KL and cross-entropy written out: two sums over labels."""
    labelled = labels[:, 1:] != -100
    q, p = [logits[:, :-1][labelled].double() for logits in (student_logits, teacher_logits)]
    log_q, log_p = (q / temperature).log_softmax(-1), (p / temperature).log_softmax(-1)
    kl = temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
    return kl, -q.log_softmax(-1)[torch.arange(len(q)), labels[:, 1:][labelled]].sum()


def step_by_hand(teacher, student, batches, config, squares):
    """The terms of a step's loss and its gradients, by plain autograd in a wrapped student."""
    terms, labels = torch.zeros(3), 0
    for batch in batches:
        both = [seen_by(model, [*LINEAR, "lm_head"], batch) for model in (student.model, teacher)]
        count, alignment = (batch["labels"][:, 1:] != -100).sum(), 0.0
        for name in LINEAR:
            value, target = [seen[name][1] for seen in both]
            if name.endswith(WRITERS):  # is compared through P, which learns here, too
                target = target @ student.projections[name].to(target.dtype)
            alignment = alignment + (value - target).square().mean() / squares[name]
        pair = [seen["lm_head"][1] for seen in both]
        losses = losses_by_hand(*pair, batch["labels"], config.temperature)
        terms, labels = terms + torch.stack([*losses, count * alignment]), labels + count
    kl, cross_entropy, alignment = terms / labels
    loss = kl + cross_entropy + config.alpha * alignment
    gradients = torch.autograd.grad(loss, student.parameters())
    terms = {"kl": kl, "cross_entropy": cross_entropy, "alignment": alignment, "loss": loss}
    return {name: value.item() for name, value in terms.items()}, gradients


def gradients_of(student):
    """The gradients that are there, taken away."""
    gradients = [parameter.grad for parameter in student.parameters()]
    for parameter in student.parameters():
        parameter.grad = None
    return gradients


@pytest.mark.parametrize("method", ["red", "pca", "orthogonal", "lrc"])
@every_family
def test_reference_step_equals_plain_autograd_and_training_step_equals_it(
    family, method, monkeypatch
):
    """The first in a student that is never merged; the last over uneven micro-batches."""
    monkeypatch.setattr(red, "LOGITS_AT_ONCE", 300)  # those of five tokens
    teacher, batches = make_teacher(family, torch.float64), uneven_batches()
    student, calibration = make_student(teacher, method, shaken=True)
    squares = calibration.teacher_mean_squares if method == "red" else dict.fromkeys(LINEAR, 1.0)
    config, before = red.Config(temperature=2.0, alpha=0.3, grad_accum=4), copy.deepcopy(teacher)
    totals = red.training_step(teacher, student, iter(batches), config, squares)
    fast, loss, reference = gradients_of(student), 0.0, [0.0] * len(student.parameters())
    assert all(map(torch.equal, teacher.parameters(), before.parameters()))
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    assert totals["tokens"] == 3 * 24 + 9 and counts[3] == 0
    for batch, count in zip(batches[:3], counts):
        share = count / sum(counts)
        loss += share * red.reference_step(teacher, student, batch, config, squares).item()
        reference = [total + share * one for total, one in zip(reference, gradients_of(student))]
    nothing = red.training_step(teacher, student, iter(batches[3:] * 4), config, squares)
    assert nothing["loss"] == 0 and all(one.abs().max() == 0 for one in gradients_of(student))
    wrap_in_projections(student, teacher, method)
    terms, gradients = step_by_hand(teacher, student, batches, config, squares)
    assert loss == pytest.approx(terms["loss"], rel=1e-6)
    assert totals["loss"].item() == pytest.approx(loss, rel=1e-6)
    near = dict(rtol=1e-5, atol=1e-6)  # the norms of transformers compute in float32 in any case
    torch.testing.assert_close(reference, [*gradients], **near)
    torch.testing.assert_close(fast, reference, **near)
    matrices = 15 + ("tied" not in family or method in ROTATIONS)
    assert len(fast) == matrices + len(NORMS) and all(one.abs().max() > 0 for one in fast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_added_up_in_float32(dtype):
    torch.manual_seed(0)
    q, p = torch.randn(2, 3, 500, 60).to(dtype)
    labels = torch.randint(0, 60, (3, 500))
    for temperature in (1.0, 40.0):
        expected = losses_by_hand(q, p, labels, temperature)
        flat = (one[:, :-1].flatten(0, 1) for one in (q, p))
        got = red.kl_and_cross_entropy(*flat, labels[:, 1:].flatten(), temperature)
        assert torch.stack(got).tolist() == pytest.approx(torch.stack(expected).tolist(), rel=1e-4)
    errors = list(torch.randn(2, 3, 500, 60).to(dtype))
    expected = 0.25 * errors[0].double().square().sum() + 2 * errors[1].double().square().sum()
    wanted = [(1.5 * error).to(dtype) for error in (errors[0] * 1, errors[1] * 8)]
    got, gradients = red.alignment_loss(errors, [0.25, 2.0], 3.0)
    assert got.item() == pytest.approx(expected.item(), rel=1e-3)  # squares in this type
    torch.testing.assert_close(gradients, wanted)


@both_optimizers
@pytest.mark.parametrize("method", ["red", "pca"])
def test_training_is_a_reference_written_out(method, optimizer):
    """Of a student that is never merged: autograd through the projections, clipping at 1, warm-up
    and decay from a given peak or the optimizer's own, then torch's own Adam or Muon."""
    teacher, rate = make_teacher("llama-biases", torch.float64), {"red": 0.02, "pca": None}[method]
    config = red.Config(steps=400, learning_rate=rate, grad_accum=2, alpha=4.0, optimizer=optimizer)
    batches = [*uneven_batches(), *[make_batch(2, seed=seed) for seed in (7, 8, 9)]]
    (student, calibration), (other, _) = [make_student(teacher, method) for _ in range(2)]
    unread, peak = iter(batches), rate or {"adam": 3e-4, "muon": 1e-3}[optimizer]
    squares = calibration.teacher_mean_squares
    steps = red.distill(teacher, student, unread, config, squares)
    wrap_in_projections(other, teacher, method)
    optimizers = [torch.optim.Adam(other.parameters(), betas=(0.9, 0.999), eps=1e-8)]
    if optimizer == "muon":
        options = dict(momentum=0.95, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        optimizers = [torch.optim.Muon(other.projections.values(), **options)]
        optimizers.append(torch.optim.Adam(other.gains.values()))
    start = [parameter.detach().clone() for parameter in other.parameters()]
    for number, share in enumerate([1 / 2, 399 / 400, 398 / 400]):
        record, pair = next(steps), batches[2 * number : 2 * number + 2]
        terms, gradients = step_by_hand(teacher, other, pair, config, squares)
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
        expected = terms | {"gradient_norm": norm, "learning_rate": share * peak}
        assert {name: record[name] for name in expected} == pytest.approx(expected, rel=1e-5)
        assert norm > 1.5 and record["step"] == number + 1
        assert unread.__length_hint__() == 7 - 2 * (number + 1)  # none is read too early
        for parameter, gradient in zip(other.parameters(), gradients):
            parameter.grad = gradient / norm
        for one in optimizers:
            one.param_groups[0]["lr"] = share * peak
            one.step()
    ends = zip(other.parameters(), start, student.parameters())
    errors = [((got - one).norm() / (one - before).norm()).item() for one, before, got in ends]
    assert sum(errors) / len(errors) < (5e-3 if optimizer == "muon" else 1e-5)  # Muon's bfloat16
    with pytest.raises(ValueError, match="ended"):
        next(steps)


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
@both_optimizers
def test_steps_that_are_not_finite_change_nothing_and_ten_in_a_row_end_the_run(optimizer, wrong):
    """Where the loss is not, or only a gradient."""
    student, calibration = make_student(teacher := make_teacher())
    squares = calibration.teacher_mean_squares
    bad, records, seen = {1, 2, *range(5, 16)}, [], []
    gain, config = teacher.model.norm.weight[0].item(), red.Config(steps=20, optimizer=optimizer)

    def batches():
        for number in itertools.count():
            if wrong == "loss":
                teacher.model.norm.weight[0] = math.nan if number in bad else gain
            seen.append([parameter.detach().clone() for parameter in student.parameters()])
            yield make_batch(seed=number)

    def explode(gradient):
        return gradient * (math.inf if wrong == "gradient" and len(seen) - 1 in bad else 1)

    student.gains["model.norm"].register_hook(explode)
    with pytest.raises(FloatingPointError):
        for record in red.distill(teacher, student, batches(), config, squares):
            records.append(json.loads(json.dumps(record)))
    assert [record["skipped"] for record in records] == [i in bad for i in range(14)]
    assert (records[1]["loss"] is None) == (wrong == "loss") and "NaN" not in json.dumps(records)
    for number, (before, after) in enumerate(itertools.pairwise(seen)):
        assert {*map(torch.equal, before, after)} == {number in bad}
    few, bad = red.Config(steps=4, optimizer=optimizer), range(4)
    for done in (0, 2):  # at the last of fewer steps, or of those that are left
        seen.clear()
        with pytest.raises(FloatingPointError):
            list(red.distill(teacher, student, batches(), few, squares, done=done))
        assert len(seen) == 4 - done


@every_family
def test_no_types_are_mixed_in_bfloat16(family):
    """On the CPU, which refuses a product of two types. Gradients add up in float32."""
    teacher, batches = make_teacher(family, torch.bfloat16), itertools.repeat(make_batch())
    for method, optimizer in {"red": "adam", "pca": "muon", "lrc": "adam"}.items():
        student, calibration = make_student(teacher, method)
        config = red.Config(steps=2, temperature=2.0, optimizer=optimizer)
        squares = calibration.teacher_mean_squares
        for record in red.distill(teacher, student, batches, config, squares):
            assert not record["skipped"]
        assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
        assert {parameter.dtype for parameter in student.model.parameters()} == {torch.bfloat16}
        assert {parameter.grad_dtype for parameter in student.model.parameters()} == {torch.float32}
        assert math.isfinite(red.evaluate(student.model, [make_batch()])["loss"])
        final = copy.deepcopy(student.model.state_dict())
        student.merge()  # which changes nothing at the end of a loop
        assert all(map(torch.equal, student.model.state_dict().values(), final.values()))


def effective_rank_by_hand(hidden):
    """Centre, scale each row to norm 1, squares of the singular values, their entropy."""
    rows = hidden.double() - hidden.double().mean(0)
    squares = torch.linalg.svdvals(rows / rows.norm(dim=1, keepdim=True)).square()
    shares = (squares / squares.sum()).tolist()
    return math.exp(-sum(share * math.log(share) for share in shares if share > 0))


def test_effective_rank_closed_forms():
    for n in (2, 3, 8):  # the vertices of a regular simplex; their centre has no direction
        one = torch.eye(n)
        for cloud in (one, 7 + 3 * one.repeat(2, 1), torch.cat([one, 1 / n + 0 * one])):
            assert red.effective_rank(cloud) == pytest.approx(n - 1)
    torch.manual_seed(0)
    for size in (0.0, 0.1, 1e6):  # equal up to rounding: no token has a direction
        one = size * torch.randn(48)
        noise = one * torch.randn(500, 48).clamp(-1, 1)
        for equal in (one.expand(7, 48), one + 1e-7 * noise, (one + 2e-3 * noise).bfloat16()):
            assert red.effective_rank(equal) == 0.0
        assert red.effective_rank(one + 1e-4 * noise) > 20 or size == 0
    with pytest.raises(ValueError):
        red.effective_rank(torch.tensor([[math.nan, 1.0], [1.0, 2.0]]))


@pytest.mark.parametrize("tokens", [300, 20])
def test_effective_rank_agrees_with_an_svd_wherever_the_cloud_lies(tokens):
    """A skewed cloud far from 0: the order of centring and scaling matters."""
    torch.manual_seed(0)
    skewed = torch.rand(tokens, 48, dtype=torch.float64) ** 4
    hidden = skewed * torch.logspace(0, -2, 48) + torch.linspace(-1, 1, 48)
    expected, moved = effective_rank_by_hand(hidden), hidden + 100 * torch.randn(48)
    for same in (hidden, moved, 1e-9 * hidden, -1e9 * hidden, hidden.view(4, -1, 48)):
        assert red.effective_rank(same) == pytest.approx(expected, rel=1e-6)
    assert red.effective_rank(hidden.float()) == pytest.approx(expected, rel=1e-4)


def test_evaluate_against_plain_formulas():
    teacher, batch = make_teacher(), make_batch()
    batch["labels"][0, :6] = -100
    output, targets = logits(teacher, batch)[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(output, targets).item()
    seen = seen_by(teacher, ["model.layers.0", "model.layers.1"], batch)
    streams = [output.flatten(0, 1) for _, output in seen.values()]
    for tokens, copies in {4096: 1, 10: 3}.items():  # so many are for the ranks
        ranks = [effective_rank_by_hand(stream[:tokens]) for stream in streams]
        got = red.evaluate(teacher, iter([batch] * copies), tokens)
        assert got == {"loss": pytest.approx(loss), "erank": pytest.approx(ranks, rel=1e-5)}
    with pytest.raises(ValueError):
        red.evaluate(teacher, [make_batch(tokens=1)])
    for wrong, read in itertools.product((math.nan, math.inf), (red.calibrate, red.evaluate)):
        teacher.model.layers[0].mlp.up_proj.weight[3, 4] = wrong
        with pytest.raises(FloatingPointError):
            read(teacher, SAMPLES)


@torch.no_grad()
def greedy(model, ids, count):
    """So many tokens, one by one, without a cache."""
    for _ in range(count):
        ids = [*ids, model(torch.tensor([ids])).logits[0, -1].argmax().item()]
    return ids[len(ids) - count :]


@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_results_against_a_loop_that_lets_the_model_write_each(kind):
    """A result with the `>` after it, as who writes 42 for 4 is wrong; and every other token."""
    texts = ["".join(problem) for problem in PROBLEMS]
    tokenizer = tokenizer_of(kind, "".join(texts))
    shape = SHAPE | dict(vocab_size=len(tokenizer), max_position_embeddings=256)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape)).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for text in texts * 20:  # some of which it will know
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    problems = [red.encode_answer(*problem, tokenizer) for problem in PROBLEMS]
    results, others, straddling = [], [], 0
    for prompt, answer in PROBLEMS:
        ids, _, places = tokenizer(prompt + answer, return_offsets_mapping=True).values()
        rest = {i for i, (_, end) in enumerate(places) if end > len(prompt)}
        for match in re.finditer(r"=(\d+)>>", answer):
            start, end = len(prompt) + match.start(1), len(prompt) + match.end(1) + 1
            tokens = [i for i, (a, b) in enumerate(places) if a < end and b > start]
            straddling += places[tokens[0]][0] < start or places[tokens[-1]][1] > end
            asked = ids[tokens[0] : tokens[-1] + 1]
            results.append(greedy(model, ids[: tokens[0]], len(tokens)) == asked)
            rest -= set(tokens)
        others += [greedy(model, ids[:i], 1) == [ids[i]] for i in rest]
    assert (straddling > 0) == (kind == "bytes") and len(results) == 6
    expected = {"results": sum(results) / 6, "other_tokens": sum(others) / len(others)}
    assert all(0 < share < 1 for share in expected.values())
    for size in (1, 2, 3):
        groups = (problems[start : start + size] for start in range(0, 3, size))
        assert red.result_scores(model, groups) == pytest.approx(expected)


def text_of(ids):
    return "".join(ALPHABET[i] for i in ids)


def solved(prompt):
    """The line that answers `7+5-3=?`: `7+5=2;2-3=9#9`."""
    value, parts = int(prompt[0]), []
    for sign, digit in zip(prompt[1:-2:2], prompt[2:-2:2]):
        result = eval(f"({value}{sign}{digit})") % 10
        parts.append(f"{value}{sign}{digit}={result}")
        value = result
    return f"{';'.join(parts)}#{value}\n"


def test_tiny_batches_have_right_lines_label_answers_only_and_repeat_with_the_seed():
    batch, pairs, prompts = next(red.tiny_batches(24, 96, "a")), dict(red.TINY_PAIRS), []
    assert len(pairs) == len(set(pairs.values())) == 24 and solved("7+5-3=?") == "7+5=2;2-3=9#9\n"
    assert torch.equal(next(red.tiny_batches(24, 96, "a"))["input_ids"], batch["input_ids"])
    assert not torch.equal(next(red.tiny_batches(24, 96, "b"))["input_ids"], batch["input_ids"])
    for ids, labels in zip(batch["input_ids"], batch["labels"].tolist()):
        marks = "".join("." if label == -100 else ALPHABET[label] for label in labels)
        for line, marked in zip(text_of(ids).splitlines()[:-1], marks.splitlines()):
            prompts += re.findall(r"^[^?:]+[?:]", line)
            answer = pairs.get(prompts[-1]) or solved(prompts[-1])
            assert f"{line}\n" == prompts[-1] + answer
            assert f"{marked}\n" == "." * len(prompts[-1]) + answer
    chains = {len(prompt) // 2 - 1 for prompt in prompts if prompt not in pairs}
    assert chains == {1, 2, 3, 4, 5} and any(prompt in pairs for prompt in prompts)


class Solver:
    """Errs in every fourth line that it writes, and finds every fourth pair's third answer best."""

    device, known, sure = "cpu", dict(red.TINY_PAIRS), 9.0

    def generate(self, ids, max_new_tokens, do_sample, **options):
        rows = []
        for number, prompt in enumerate(map(text_of, ids)):
            answer = self.known.get(prompt) or solved(prompt)
            answer = answer if number % 4 or do_sample else re.sub(*self.spoiled, answer, count=1)
            rows.append([*map(ALPHABET.index, f"{prompt}{answer[:max_new_tokens]:\n<40}")])
        return torch.tensor([row[: min(map(len, rows))] for row in rows])

    def __call__(self, ids):
        self.lines = [*map(text_of, ids)]
        logits = torch.zeros(*ids.shape, 45)
        for row in range(0, len(ids), 4):
            best = row + (0 if row % 16 else 2)
            letters = torch.nn.functional.one_hot(ids[best, 6:8], 45)  # two in the answer's middle
            logits[best, 5:7] = self.sure * letters
        return types.SimpleNamespace(logits=logits)


# What is replaced in an answer: a character more; a wrong result, the last digit right; no answer.
@pytest.mark.parametrize("spoiled", [("\n", "?\n"), ("=.|^[a-z]", "=?"), (".+", "")])
def test_tiny_scores_are_of_whole_lines(spoiled):
    """And of pairs that are chosen from four: its own answer, and those of three others."""
    (solver := Solver()).spoiled, tokenizer = spoiled, red.tiny_tokenizer()
    assert tokenizer(ALPHABET)["input_ids"] == [*range(45)]
    assert tokenizer.decode(range(45)) == ALPHABET and tokenizer.eos_token == "\n"
    scores = red.tiny_scores(solver, tokenizer, count=8)
    assert scores["pairs"] == {"chosen": 0.75, "written": 0.75} and scores["chains"] == [0.75] * 5
    prompt, _, answer = scores["example"].partition("=?")  # the first, in which it errs
    assert len(prompt) == 11 and f"{answer}\n" != solved(f"{prompt}=?")
    for number, (prompt, answer) in enumerate(red.TINY_PAIRS):
        four = [line.removeprefix(prompt) for line in solver.lines[4 * number : 4 * number + 4]]
        assert four[0] == answer and len({*four} & {*solver.known.values()}) == 4
    solver.sure = 0.0  # a model that knows nothing is not right
    assert red.tiny_scores(solver, tokenizer, count=1)["pairs"]["chosen"] == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_a_selection_of_channels_keeps_more_effective_rank_than_lrc_and_writes_more(seed):
    """Active channels or random ones; and before training pca is below red below lrc."""
    shape = dict(hidden_size=64, head_dim=16, num_hidden_layers=2, intermediate_size=128)
    teacher = red.tiny_teacher(tiny_config(**shape), seed, steps=400)
    samples, held_out = red.tiny_batches(32, 48, seed), [next(red.tiny_batches(64, 48, "held out"))]
    calibration = red.calibrate(teacher, [next(samples)])
    config = red.Config(steps=60, learning_rate=1e-2)
    starts, ends, chains = {}, {}, {}
    for method in ("lrc", "random-selection", "red", "pca"):
        student = red.new_student(method, teacher, 32, calibration, seed)
        starts[method] = red.evaluate(student.model, held_out)["loss"]
        if method != "pca":
            batches = red.tiny_batches(16, 48, "training")
            list(red.distill(teacher, student, batches, config, calibration.teacher_mean_squares))
            ends[method] = red.evaluate(student.model, held_out)
            scores = red.tiny_scores(student.model, red.tiny_tokenizer(), count=50)
            chains[method] = scores["chains"][0]  # the teacher writes three quarters of them
    for method in ("red", "random-selection"):
        assert sum(ends[method]["erank"]) > sum(ends["lrc"]["erank"]) + 6
        assert chains[method] > chains["lrc"] + 0.15
        assert ends[method]["loss"] < ends["lrc"]["loss"] - 0.3
    assert starts["pca"] + 0.5 < starts["red"] < starts["lrc"] - 0.5


@every_family
def test_fused_norms_compute_what_those_of_transformers_do(family):
    """Each with its own eps; with weights that change, and are a copy's."""
    (teacher := make_teacher(family)).model.norm.variance_epsilon, batch = 2.0, make_batch()
    expected = logits(teacher, batch)
    red.fuse_norms(teacher)
    assert "forward" in vars(teacher.model.norm)
    (changed := copy.deepcopy(teacher)).model.norm.weight *= 2  # as merging changes them
    for factor, model in {1: teacher, 2: changed}.items():
        torch.testing.assert_close(logits(model, batch), factor * expected, rtol=1e-4, atol=1e-4)


def two_steps(optimizer, batches, each, rank=None, meet=None):
    """(records, what was learned) of two steps; or of one process of two."""
    if rank is not None:
        torch.distributed.init_process_group("gloo", f"file://{meet}", rank=rank, world_size=2)
    student, calibration = make_student(teacher := make_teacher(dtype=torch.float64))
    config = red.Config(steps=2, learning_rate=1e-2, grad_accum=each, optimizer=optimizer)
    steps = red.distill(teacher, student, iter(batches), config, calibration.teacher_mean_squares)
    return list(steps), torch.cat([p.detach().flatten() for p in student.parameters()]).tolist()


@both_optimizers
def test_two_processes_are_one_on_the_whole_batch(optimizer, tmp_path):
    batches = uneven_batches()
    halves = [(optimizer, batches[rank::2], 1, rank, tmp_path / "meet") for rank in (0, 1)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        ends = pool.starmap_async(two_steps, halves, chunksize=1).get(60)
    records, learned = two_steps(optimizer, batches, 2)
    for theirs, others in ends:
        assert len(theirs) == 2 and theirs == [pytest.approx(one, rel=1e-6) for one in records]
        assert learned == pytest.approx(others, rel=1e-6, abs=1e-7)


def space_of(comment, whole):
    """What a comment's `To copy` names: modules, and the sections whose names are in `whole`."""
    words = re.search(r"To copy[^:]*: (.*?)\.(\s|$)", comment.replace("\n# ", " "))[1]
    space = {word: getattr(red, word) for word in re.findall(r"\w+", words) if hasattr(red, word)}
    return (whole if "section" in words else {}) | space


@both_optimizers
def test_the_method_runs_alone_with_what_its_comments_name(optimizer):
    """Each section with the imports of its banner, and the sections that it names."""
    source = Path(red.__file__).read_text()
    sections, whole = source.split("\n# ==== ")[1:], {}
    order = ["Calib", "The projected", "Losses", "Faster", "The fast"]
    for section in [text for name in order for text in sections if text.startswith(name)]:
        space = space_of(section.split("\n\n")[0], whole)
        assert {*re.findall(r"\b(\w+)\.\w", section)} & {*vars(red)} <= {*space}
        exec(section.partition("\n")[2], space)
        whole |= space
    calibration = whole["calibrate"](teacher := make_teacher(), SAMPLES)
    squares = calibration.teacher_mean_squares
    student = whole["new_student"]("red", teacher, 16, calibration)
    config = types.SimpleNamespace(**vars(red.Config(steps=3, optimizer=optimizer)))
    batches = itertools.repeat(make_batch())
    records = list(whole["distill"](teacher, student, batches, config, squares))
    assert len(records) == 3 and all(math.isfinite(record["loss"]) for record in records)
    function = re.search(r"^def effective_rank.*?\n\n\n", source, re.DOTALL | re.MULTILINE)[0]
    space = space_of(source[source.index("To copy `effective_rank`") :].split("\n\n")[0], {})
    exec(function, space)
    assert space["effective_rank"](torch.eye(3)) == pytest.approx(2)


# ==== The program =============================================================================


def make_files(folder, files):
    """Write name -> text, JSON rows, or columns of parquet. Returns the one file, or the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            pyarrow.parquet.write_table(pyarrow.table(content), path, row_group_size=9)
        else:
            text = content if isinstance(content, str) else "\n".join(map(json.dumps, content))
            path.write_text(text, "utf-8")
    return str(path if len(files) == 1 else folder)


def program(*words, folder):
    """A program of its own on one thread, ended, with its output."""
    options = {"env": os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}, "text": True}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, cwd=folder, timeout=300, **options)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A folder with a small 'real' teacher and its tokenizer, and data."""
    folder, generator = tmp_path_factory.mktemp("real"), random.Random(0)
    red.tiny_teacher(tiny_config(), 0, steps=1).save_pretrained(folder / "teacher")
    red.tiny_tokenizer().save_pretrained(folder / "teacher")
    lines = ["".join(red.random_chain(3, generator)).strip() for _ in range(300)]
    rows = [{"question": line, "answer": "#### 7"} for line in lines]
    files = {"data.txt": "\n\n".join(lines), "few.txt": "\n\n".join(lines[:40])}
    files |= {f"twelve/{i:02}.jsonl": rows[25 * i : 25 * i + 25] for i in range(12)}
    make_files(folder, files | {"data.jsonl": rows})
    return folder


@pytest.fixture
def teacher(real, tmp_path):
    """A teacher's folder that a test may change."""
    return shutil.copytree(real / "teacher", tmp_path / "teacher")


def edit(path, **changes):
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weight(folder, module, value):
    """Put another matrix, or none, into a checkpoint."""
    weights = load_file(folder / "model.safetensors") | {f"{module}.weight": value}
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def watched(monkeypatch, name, act=lambda *_: None):
    """Let act(values) run before each call of a function of red.py. Returns its mock."""
    mock = Mock(side_effect=lambda *v, **_: act(*v) or DEFAULT, wraps=getattr(red, name))
    monkeypatch.setattr(red, name, mock)
    return mock


# Documents of several files come in turns: each one's first, then each one's second.
MIXED = {"a.jsonl": '{"text": "A", "meta": 1}', "b.txt": "B\n\nC\nc", "c.txt": "D\n\nE"}
MIXED |= {"d.parquet": {"text": ["F"], "meta": [[1]]}, "e.jsonl": '{"text": "G", "meta": {}}'}
MIXED |= {"f/g.json": '[{"text": "H", "meta": "x"}]', "readme-texts/x.txt": "I", "readmes.txt": "J"}
SET_ASIDE = ["README.md", "LICENSE", "License.txt", "readme.txt", "f/README", "f/licence.md"]
SET_ASIDE += [".hidden.txt", ".cache/x.csv", "f/.cache/x.txt"]
NUMBERS = '\ufeff{"text": 12345678901234567890123}\n{"text": 2.5}\n{"text": "\\ud83d"}'
HALF = '{"question": null, "answer": "b"}\n{"question": "a", "answer": 0}'
ASKED = {"question": ["a", "b"], "answer": [7, None], "text": [None, 2.5]}
UNUSED = '{"text": "a", "question": ["x"]}\n{"text": [1], "question": "b", "answer": "c"}'
TEXTS = {  # name -> (files: content, or columns of a parquet; the texts of their documents)
    "paragraphs": ({"a.txt": "one\n  half\n\ntwo\n \t\n3"}, ["one\n  half", "two", "3"]),
    "blank lines at both ends": ({"a.txt": "\n\none\ntwo\n\n"}, ["one\ntwo"]),
    "a folder": (MIXED | dict.fromkeys(SET_ASIDE, "no"), list("ABDFGHIJ") + ["C\nc", "E"]),
    "a name like a pattern": ({"a[1].jsonl": '{"text": "one"}'}, ["one"]),
    "an array": ({"a.json": '[{"text": "one"}, {"text": null}, {"text": 2.5}]'}, ["one", "2.5"]),
    "rows in a .json": ({"a.json": '{"text": "1"}\n{"text": " "}\n\n{"text": "2"}'}, ["1", "2"]),
    "numbers, half an emoji": ({"a.jsonl": NUMBERS}, ["12345678901234567890123", "2.5", "?"]),
    "half a question": ({"a.jsonl": HALF}, ["Question: a\nAnswer: 0"]),
    "fields that are not needed": ({"a.jsonl": UNUSED}, ["a", "Question: b\nAnswer: c"]),
    "columns of a parquet": ({"a.parquet": ASKED}, ["Question: a\nAnswer: 7", "2.5"]),
    "no rows": ({"a.parquet": {"text": []}, "b.txt": "one"}, ["one"]),
}
REFUSED = {  # name -> (files, what the sentence says)
    "a list": ({"a.jsonl": '{"text": "a"}\n{"text": ["a", "b"]}'}, r"row 2 of .*a\.jsonl.* text"),
    "an object": ({"a.jsonl": '{"question": "a", "answer": {"b": 1}}'}, "row 1 of .* or answer"),
    "chats": ({"a.jsonl": '{"text": "a"}\n{"messages": []}'}, "row 2 of .*it has messages"),
    "no objects": ({"a.json": '["one"]'}, "row 1 of .*no object"),
    "broken rows": ({"a.jsonl": '{"text": "a"}\n{"text": \n'}, r"cannot read .*a\.jsonl"),
    "a broken parquet": ({"a.parquet": "PAR1 nonsense PAR1"}, r"cannot read .*a\.parquet"),
    "another kind": ({"a.txt": "one", "b.csv": "text\ntwo"}, r"cannot read .*b\.csv; --data takes"),
}


def texts_of(source):
    return [row["prompt"] + row["answer"] for row in red.open_documents(str(source), "--data")]


@pytest.mark.parametrize("name", [*TEXTS, *REFUSED])
def test_text_as_people_have_it_is_read_or_refused_by_row_and_type(name, tmp_path, capsys):
    files, expected = (TEXTS | REFUSED)[name]
    source = make_files(tmp_path, files)
    if name in TEXTS:
        assert texts_of(source) == expected
        count = len(set(files) - set(SET_ASIDE))
        assert re.match(rf"reading +{count} files? of ", capsys.readouterr().out)
    else:
        with pytest.raises(red.UserError, match=expected):
            texts_of(source)


def test_links_are_followed_once_and_patterns_reach_any_depth(tmp_path):
    for place in ("text", "elsewhere"):
        for name in ("A", "b/C", "b/d/E", "b/d/f/G"):
            make_files(tmp_path / place, {f"{name}.jsonl": [{"text": place[0] + name[-1]}]})
    folder, expected = tmp_path / "text", ["tA", "tC", "tE", "tG"]
    assert sorted(texts_of(f"{folder}/**/*.jsonl")) == expected
    assert sorted(texts_of(f"{folder}/*.jsonl")) == ["tA"]
    for name in ("up", "b/up", "b/d/up"):  # cycles
        (folder / name).symlink_to(folder)
    (folder / "again.jsonl").symlink_to(folder / "A.jsonl")
    assert sorted(texts_of(folder)) == expected
    (folder / "away").symlink_to(tmp_path / "elsewhere/b")
    (folder / "b/away, too").symlink_to(tmp_path / "elsewhere/b/d")
    assert sorted(texts_of(folder)) == ["eC", "eE", "eG", *expected]


def test_a_text_file_is_streamed(tmp_path):
    """At no time is much of it in memory."""
    (tmp_path / "a.txt").write_text("\n\n".join(f"document {i} " * 20 for i in range(4000)))
    tracemalloc.start()
    assert sum(bool(row["text"]) for row in red.rows_of(tmp_path / "a.txt")) == 4000
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 200_000 < os.path.getsize(tmp_path / "a.txt") / 5


WORLD = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=45))  # a teacher's size


def text_in(batches):
    return "".join(ALPHABET[i] for batch in batches for i in batch["input_ids"].flatten())


def training_text(source, **settings):
    config = red.Config(model="x", data=source, **{"batch_size": 2, "seq_len": 16} | settings)
    return red.TrainingText(config, red.Task(WORLD, red.tiny_tokenizer()))


@pytest.mark.parametrize("files", [1, 20])
def test_a_short_run_on_three_sources_sees_all_three(tmp_path, monkeypatch, files):
    monkeypatch.setattr(red, "BLOCK", 40)
    for source in "xyz":  # each of one file, or a folder of many
        for number in range(files):
            rows = [{"text": f"{source}{number:02}{i:03}"} for i in range(600 // files)]
            make_files(tmp_path, {f"{source}/{number}.jsonl": rows})
    batches = training_text(str(tmp_path)).batches_from(None)
    sources = re.findall(r"[xyz](?=\d{5})", text_in(itertools.islice(batches, 12)))
    assert min(sources.count(source) for source in "xyz") > len(sources) / 6 > 5


def test_the_hub_is_asked_for_what_a_name_says_and_other_columns_do_no_harm(monkeypatch):
    rows = [{"question": "1", "answer": "2", "id": 3}, {"question": "4", "answer": "", "id": 5}]
    hub = Mock(side_effect=lambda *_, **__: datasets.Dataset.from_list(rows).to_iterable_dataset())
    monkeypatch.setattr(datasets, "load_dataset", hub)
    names = {"": (None, "train"), "::test": (None, "test")}  # name:CONFIG:SPLIT
    names[":main:train[:500]"] = ("main", "train[:500]")
    for name, (config, split) in names.items():
        assert texts_of(f"a/b{name}") == ["Question: 1\nAnswer: 2"]
        hub.assert_called_with("a/b", config, split=split, streaming=True)


NAMES = [f"a{number:03}" + "z" * (number % 5) for number in range(130)]  # 130 documents


def source_of(kind, folder, monkeypatch):
    """These documents, in this order: in files of three kinds, or on the hub."""
    if kind == "folder":
        files = {"a.jsonl": [{"text": name} for name in NAMES[::3]]}
        files |= {"b.txt": "\n\n".join(NAMES[1::3]), "c.parquet": {"text": NAMES[2::3]}}
        return make_files(folder, files)
    columns = {"text": NAMES, "when": pyarrow.array([0] * 130, "timestamp[s]")}  # no JSON
    files = make_files(folder, {"a.parquet": columns})
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: copy.deepcopy(stream))
    return "a/b"


@pytest.mark.parametrize("processes, block", [(1, 40), (2, 40), (1, 2000)])
@pytest.mark.parametrize("kind", ["folder", "hub"])
def test_epochs_are_whole_and_go_on_from_any_place(kind, processes, block, tmp_path, monkeypatch):
    """In new orders, without what is held out. From the hub, going on reads one block at most."""
    monkeypatch.setattr(red, "BLOCK", block)
    source, aside = source_of(kind, tmp_path / "text", monkeypatch), min(block, 130) // 10
    fetched, used = watched(monkeypatch, "document_of"), watched(monkeypatch, "tokens_of")
    share, epochs = (130 - aside) // processes, [[], [], [], []]  # two of each seed
    for seed, rank in itertools.product((0, 1), range(processes)):
        monkeypatch.setattr(red, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(red, "world_size", lambda: processes)
        text, batches, places = training_text(source, seed=seed), [], []
        reader = text.batches_from(None)
        used.reset_mock()
        while used.call_count < 2 * share:
            places.append(copy.deepcopy(text.place))
            batches.append(text_in([next(reader)]))
        order = [call.args[0]["answer"] for call in used.call_args_list]
        epochs[2 * seed] += order[:share]
        epochs[2 * seed + 1] += order[share : 2 * share]
        assert [row["answer"] for row in text.held_out] == NAMES[:aside]
        torch.save(places, tmp_path / "places.pt")
        places = torch.load(tmp_path / "places.pt", weights_only=True)
        for number in range(1, len(places), 4):
            text = training_text(source, seed=seed)
            fetched.reset_mock()
            reader = text.batches_from(places[number])
            again = [text_in([next(reader)])]
            if (kind, block) == ("hub", 40):  # one block, and two row groups of 9 around its place
                assert fetched.call_count <= 40 * processes + 18
            again += [text_in([batch]) for batch in itertools.islice(reader, 8)]
            assert again[: len(places) - number] == batches[number : number + 9], number
    assert all(sorted(epoch) == NAMES[aside:] for epoch in epochs)
    assert len(set(map(tuple, [*epochs, NAMES[aside:]]))) == 5
    early = [len({*NAMES[4:22]} & {*epoch[:18]}) for epoch in epochs]  # of the first block
    if (block, processes) == (40, 1):  # about eight by chance
        assert 4 < early[0] < 14 and 4 < early[2] < 14


def test_held_out_text_is_neither_trained_nor_calibrated_on(real):
    """Over more than an epoch, in which all the rest is; in rows of as many tokens as can be."""
    lines = (real / "data.txt").read_text().split()
    lines = [lines[25 * file + row] for row in range(25) for file in range(12)]  # in turns
    words = f"--model {real}/teacher --data {real}/twelve --seq-len 256 --batch-size 2"
    config = red.parse_arguments(words.split())
    task = red.open_task(config)
    trained = text_in(itertools.islice(red.training_batches(config, task, 0, None), 45))
    calibrated, held_out = text_in(task.samples), text_in(task.held_out)
    assert lines[0] in held_out and lines[30] not in held_out
    assert not any(line in trained or line in calibrated for line in lines[:30])
    assert all(line in trained for line in lines[30:]) and lines[30] in calibrated
    assert sum(trained.count(line) >= 2 for line in lines[30:]) > 50  # the data begins again


# ---- Runs and their folders ------------------------------------------------------------------


def run_of(real, out, words=""):
    """A short run's command line; later words win."""
    small = "--steps 2 --batch-size 2 --seq-len 32 --calibration-samples 4"
    model = ["--model", f"{real}/teacher", "--data", f"{real}/few.txt", "--out", f"{out}"]
    return [*model, *small.split(), *words.split()]


def main_of(*values):
    return red.main(run_of(*values))


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


def records_of(out, method="red"):
    path = out / method / "metrics.jsonl"
    return [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []


def sentence(capsys):
    """The one sentence of a run that failed."""
    said = capsys.readouterr().err
    assert re.fullmatch(r"red\.py: [^\n\r]+[.?]\n", said), said
    return said


def test_a_run_writes_metrics_summary_and_student_and_is_not_repeated(
    real, tmp_path, capsys, monkeypatch
):
    """And what is finished is not done again."""
    out, measured = tmp_path / "run", watched(monkeypatch, "evaluate")
    words = run_of(real, out)
    assert (red.main(words), measured.call_count) == (0, 3)  # the teacher, the start and the end
    said, steps, rows = capsys.readouterr().out, records_of(out), summary_of(out)
    assert [(step["step"], step["tokens_seen"]) for step in steps] == [(0, 0), (1, 64), (2, 128)]
    assert all(step["loss"] > 0 and step["tokens"] == 64 for step in steps[1:])
    assert [len(step.get("held_out", {}).get("erank", [])) for step in steps] == [3, 0, 3]
    student, tokenizer = red.load_teacher(str(out / "red/student"))
    lines = [{"prompt": "", "answer": line} for line in (real / "few.txt").read_text().split()[:4]]
    held_out = red.packed(lines, red.Task(student, tokenizer), 1, 32, [])
    assert red.evaluate(student, held_out)["loss"] == pytest.approx(rows["red"]["loss"], rel=1e-5)
    assert (student.config.hidden_size, student.num_parameters()) == (48, rows["red"]["parameters"])
    assert rows["red"]["curve"] == [steps[0], steps[2]]
    assert rows["red"]["loss"] == steps[2]["held_out"]["loss"] != steps[0]["held_out"]["loss"]
    assert "width 48 of 96" in said and "float32" in said and str(out) in said
    with monkeypatch.context() as patch:
        patch.setattr(red, "training_step", None)
        weights = (out / "red/student/model.safetensors").read_bytes()
        shutil.rmtree(out / "red/student")  # is exported again from the last checkpoint
        (out / "red/metrics.jsonl").write_text("{")  # a damaged record
        assert red.main(words) == 0 and records_of(out) == steps
        assert (out / "red/student/model.safetensors").read_bytes() == weights
        for name in ("distill", "measure_model", "calibrate", "load_teacher"):
            patch.setattr(red, name, None)
        shutil.rmtree(out / "red/checkpoints")
        assert red.main(words) == 0 and summary_of(out) == rows
    whole = (out / "summary.json").read_text()
    (out / "summary.json").write_text(whole[:-9])
    assert red.main(words) == 2 and "summary.json is damaged" in sentence(capsys)
    (out / "summary.json").write_text(whole)
    measured.reset_mock()
    assert red.main([*words, *"--methods pca --save-every 1".split()]) == 0
    assert measured.call_count == 3  # the start, and both steps; not the teacher again
    more, said = summary_of(out), capsys.readouterr().out
    assert more == rows | {"pca": more["pca"]} and list(more) == ["teacher", "red", "pca"]
    assert all(re.search(f"^{name} .*M", said, re.MULTILINE) for name in more)


def test_several_methods_share_one_table_and_batches_may_be_cut(real, tmp_path, capsys):
    assert main_of(real, tmp_path / "a", f"--methods {' '.join(METHODS)}") == 0
    rows, said = summary_of(tmp_path / "a"), capsys.readouterr().out.splitlines()
    table = [line for line in said if line.split()[:1] and line.split()[0] in rows]
    assert [line.split()[0] for line in table[:7]] == ["teacher", *METHODS] == list(rows)
    assert all(f"{row['loss']:.3f}" in line for row, line in zip(rows.values(), table))
    assert len({row["loss"] for row in rows.values()}) == 7 and max(map(len, table)) <= 100
    points = [dict(rows["red"]["curve"][0], step=step) for step in range(990, 1014)]
    shown = red.table({"red": rows["red"] | {"curve": points}})
    assert "990" in shown and "991" not in shown and len(shown.splitlines()[3]) <= 100
    assert main_of(real, tmp_path / "halves", "--grad-accum 2 --batch-size 1") == 0
    halves, whole = records_of(tmp_path / "halves"), records_of(tmp_path / "a")
    for name in ("loss", "kl", "alignment", "gradient_norm"):  # of the same tokens
        assert halves[1][name] == pytest.approx(whole[1][name], rel=1e-4)


def test_results_of_worked_problems_are_measured(real, teacher, tmp_path, capsys):
    """Of rows with a question, and with an answer of which a tokenizer leaves something."""
    rows = [{"question": "q", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}"} for i in range(9)]
    rows.insert(3, {"question": None, "answer": "nothing was asked", "text": "1+1"})
    rows.insert(2, {"question": "q", "answer": "ÄÖÜ"})  # its tokenizer knows none of these
    rows.append({"question": "q" * 300, "answer": "<<1+1=2>>"})  # beyond its positions
    letters = (teacher / "tokenizer.json").read_text()
    letters = letters.replace('"x":', '"<":').replace('"y":', '">":')
    make_files(tmp_path, {"problems.jsonl": rows, "teacher/tokenizer.json": letters})
    more = f"--model {teacher} --eval-data {tmp_path}/problems.jsonl --eval-problems"
    for asked, left in ((2, [2]), (7, [2, 2, 2]), (200, [2, 2, 2, 2, 1])):  # in batches of two
        config = red.parse_arguments(run_of(real, tmp_path / "out", f"{more} {asked}"))
        assert list(map(len, red.open_task(config).problems)) == left
    assert main_of(real, tmp_path / "out", f"{more} 7") == 0
    said, rows = capsys.readouterr().out, summary_of(tmp_path / "out")
    assert "results right" in said and max(map(len, red.table(rows).splitlines())) <= 100
    assert all("results" in point["held_out"] for point in rows["red"]["curve"])
    expected = red.result_scores(red.load_teacher(str(teacher))[0], red.open_task(config).problems)
    assert expected != {} and main_of(real, tmp_path / "all", f"{more} 200") == 0
    assert summary_of(tmp_path / "all")["teacher"].items() >= expected.items()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The tiny world with a teacher of three steps and a few questions, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(red, "tiny_teacher", functools.partial(red.tiny_teacher, steps=3))
    monkeypatch.setattr(red, "tiny_scores", functools.partial(red.tiny_scores, count=3))
    monkeypatch.setattr(red, "TINY_PAIRS", red.TINY_PAIRS[:5])
    words = "--batch-size 2 --calibration-samples 2 --methods red --seq-len 24"
    return lambda change: red.main([*words.split(), *change.split()])


def test_the_tiny_world_shares_a_teacher_by_seed_and_refuses_what_cannot_be(
    tiny, monkeypatch, capsys
):
    # What a person tries first is never refused: each goes to a folder of its own.
    assert tiny("--steps 1") == 0
    with monkeypatch.context() as patch:
        patch.setattr(red, "tiny_teacher", None)  # not needed again
        assert tiny("--steps 1 --optimizer muon") == 0
    assert tiny("--steps 1 --seed 1") == 0  # trains another
    teachers = sorted(path.parent for path in Path("runs").glob("*/tokenizer.json"))
    assert len(list(Path("runs").glob("*/summary.json"))) == capsys.readouterr().out.count("chains")
    assert len(teachers) == 2 and len(list(Path("runs").iterdir())) == 5
    assert tiny("--seq-len 5 --out runs/five") == 2  # prompts alone are as long
    assert "--seq-len" in sentence(capsys) and not Path("runs/five/settings.json").exists()
    assert tiny(f"--out {teachers[0]}") == 2  # the teacher's own folder
    assert "no run of RED" in sentence(capsys)


def test_what_identifies_a_run_is_known_and_a_change_is_named(real, teacher, tmp_path, capsys):
    shutil.copy(real / "few.txt", tmp_path)
    out = teacher / "run"  # in the teacher's own folder
    words = run_of(tmp_path, out)
    assert red.main(words) == 0
    make_files(teacher, {"x.gguf": "new", "notes.txt": "new"})
    assert red.main([*words, *"--save-every 1".split()]) == 0
    for changed in ("few.txt", "teacher/config.json", "teacher/tokenizer_config.json"):
        path, content = tmp_path / changed, (tmp_path / changed).read_text()
        path.write_text(content + "\n")
        capsys.readouterr()
        assert red.main(words) == 2 and path.name in sentence(capsys)
        path.write_text(content)
    edit_weight(teacher, "more", torch.ones(1))
    assert red.main(words) == 2 and "model.safetensors" in sentence(capsys)
    (tmp_path / "few.txt").unlink()
    assert red.main(words) == 2 and "not nothing" in sentence(capsys)


def test_the_type_is_what_the_processor_is_fast_in_and_part_of_a_runs_identity(monkeypatch, real):
    config, half, full = red.parse_arguments(run_of(real, "out")), torch.bfloat16, torch.float32
    changed, settings = functools.partial(dataclasses.replace, config), []  # that differ
    for cpu, gpu in ((True, None), (True, False), (False, True), (False, None)):  # None: no GPU
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda cpu=cpu: {"amx_bf16": cpu})
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu is not None)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated, gpu=gpu: bool(gpu))
        expected = [half if (cpu if gpu is None else gpu) else full, full]
        assert [red.choose_dtype(config), red.choose_dtype(red.Config())] == expected
        assert [red.choose_dtype(changed(dtype=str(t)[6:])) for t in (half, full)] == [half, full]
        settings.append(red.settings_of(config))
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in an old torch
    for change in (dict(save_every=1), dict(methods=["pca"])):
        assert red.settings_of(changed(**change)) == settings[-1]
    settings += [red.settings_of(changed(**{name: 3})) for name in ("grad_accum", "eval_problems")]
    monkeypatch.setattr(red, "world_size", lambda: 2)
    settings.append(red.settings_of(config))
    assert all(one != other for one, other in itertools.combinations(settings[2:], 2))
    tiny = red.settings_of(red.Config())
    assert tiny["model"] == red.TINY_CONFIG.read_text() and "size of" not in " ".join(tiny)


def qwen2(folder, **values):
    """Another model in a teacher's folder."""
    config = AutoConfig.for_model("qwen2", **SHAPE | dict(vocab_size=45) | values)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


ODD = {  # what is done to a teacher's folder
    "zeros to embed": lambda at: edit_weight(at, "model.embed_tokens", torch.zeros(45, 96)),
    "zero gains": lambda at: edit_weight(at, NORMS[0], torch.zeros(96)),
    "a tie that is none": lambda at: edit(at / "config.json", tie_word_embeddings=True),
    "dropout": lambda at: edit(at / "config.json", attention_dropout=0.5),
    "no multiple of its heads": lambda at: qwen2(at, hidden_size=30, head_dim=8),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_teachers_run(real, teacher, tmp_path, name):
    ODD[name](teacher)
    words = f"--model {teacher} --methods red pca --ratio 1 --steps 1"
    assert main_of(real, tmp_path / "out", words) == 0
    rows = summary_of(tmp_path / "out")
    assert all(math.isfinite(row["loss"]) for row in rows.values())
    start = rows["red"]["curve"][0]["held_out"]["loss"]  # at full width, or nearly
    assert start == pytest.approx(rows["teacher"]["loss"], rel=0.2 if "heads" in name else 1e-5)


def test_what_stays_behind_and_what_goes_along_with_a_student(real, teacher, tmp_path):
    """Code that is named beside a teacher stays; several ends of a text go."""
    edit(teacher / "config.json", auto_map={"AutoConfig": "own.Own"})
    ends = {"eos_token_id": [44, 3], "do_sample": True, "temperature": 0.7}
    (teacher / "generation_config.json").write_text(json.dumps(ends))
    words = f"--model {teacher} --steps 0 --dtype bfloat16"
    assert main_of(real, tmp_path / "out", words) == 0
    student = tmp_path / "out/red/student"
    assert "own.Own" not in "".join(path.read_text() for path in student.glob("*.json"))
    for kind in (AutoModelForCausalLM, AutoTokenizer):  # it opens where people allow such code
        kind.from_pretrained(student, trust_remote_code=True)
    assert AutoConfig.from_pretrained(student).dtype == torch.bfloat16
    assert json.loads((student / "generation_config.json").read_text()).items() >= ends.items()


BREAKS = {  # name -> (error; raised at this document, or in a step if None; the sentence)
    "a timeout": (RuntimeError("The read operation timed out"), 5, "timed out.*resumes"),
    "other columns": (TypeError("Couldn't cast"), 30, "Couldn't cast.*resumes"),
    "a file cut off": (pyarrow.lib.ArrowInvalid("Parquet file size is 3"), 30, "is 3.*resumes"),
    "a GPU's memory": (torch.OutOfMemoryError("CUDA out of memory"), None, "out of.*--batch-size"),
    "Python's memory": (MemoryError(), None, "out of.*--batch-size"),
    "a library's memory": (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), None, "out of.*--batch"),
    "too few GPUs": (RuntimeError("CUDA error: invalid ordinal"), None, "ordinal.*resumes"),
    "a CPU's memory": (RuntimeError("can't allocate memory: 9 bytes"), None, "memory.*--seq-len"),
    "a process gone": (RuntimeError("Connection reset by peer"), None, "reset by peer.*resumes"),
    "a process silent": (torch.distributed.DistError("time"), None, "time.*resumes"),
    "a disk": (OSError(28, "No space left on device"), None, "No space left.*resumes"),
    "a mistake in red.py": (RuntimeError("mat1 and mat2 differ"), None, None),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_breaks_a_run_off_is_one_sentence(real, tmp_path, monkeypatch, capsys, name):
    """And the same command goes on once that is mended, and does not measure the teacher again."""
    (error, place, expected), read = BREAKS[name], red.interleaved

    def reading(paths):
        for number, document in enumerate(read(paths)):
            if number == place:
                raise error
            yield document

    monkeypatch.setattr(red, "BLOCK", 20)
    measured = watched(monkeypatch, "evaluate")
    words = run_of(real, tmp_path / "out", "--save-every 1 --steps 12")
    with monkeypatch.context() as patch:
        patch.setattr(red, "interleaved", reading)
        if place is None:
            patch.setattr(red, "training_step", Mock(side_effect=error))
        if expected:
            assert red.main(words) == 1 and re.search(expected, sentence(capsys))
        else:  # it is shown as it is
            pytest.raises(RuntimeError, red.main, words).match("mat1")
    assert (len(records_of(tmp_path / "out")) > 2) == (place == 30)
    assert red.main(words) == 0
    widths = [call.args[0].config.hidden_size for call in measured.call_args_list]
    assert widths.count(96) == 1  # the teacher's
    assert ("going on from" in capsys.readouterr().out) == (place == 30)


@pytest.mark.parametrize("steps", [14, 3])
def test_a_run_of_steps_that_are_not_finite_exits_with_1_and_exports_nothing(
    real, tmp_path, capsys, monkeypatch, steps
):
    step, nan = red.training_step, {"loss": torch.tensor(math.nan)}
    monkeypatch.setattr(red, "training_step", lambda *v: step(*v) | nan)
    for _ in range(2):
        assert main_of(real, tmp_path / "out", f"--steps {steps}") == 1
        assert re.search("finite.* --learning-rate.* --out", sentence(capsys))
    assert not (tmp_path / "out/red/student").exists()


def fork(words, prepare=lambda: None):
    """Run a command line in a process of its own."""

    def work():
        # By default all forks share tqdm's lock: one killed inside it would stop the others.
        red.tqdm.set_lock(threading.RLock())
        prepare()
        sys.exit(red.main(words))

    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    return process


def end_of(process, until=None, number=signal.SIGKILL):
    """Its exit code, if it gets a signal once `until()` holds; None: it does not end."""
    while until and process.is_alive() and not until():
        time.sleep(0.002)
    if until:
        os.kill(process.pid, number)
    process.join(40)
    code = process.exitcode
    process.kill()
    return code


@pytest.fixture(scope="module", params=["adam", "muon"])
def uninterrupted(request, real, tmp_path_factory):
    """The words of a run without --out, over the end of its short data, and its finished folder."""
    folder = tmp_path_factory.mktemp("long")
    make_files(folder, {"a.txt": "\n\n".join((real / "few.txt").read_text().split()[:20])})
    words = f"--data {folder}/a.txt --methods lrc --optimizer {request.param} --grad-accum 2"
    words = f"{words} --steps 12 --batch-size 1 --save-every 3"
    words = run_of(real, folder / "whole", words)
    assert red.main(words) == 0
    return words, folder / "whole"


STOPPED = [(signal.SIGKILL, "flipped"), (signal.SIGTERM, "cut"), (signal.SIGINT, "full")]


@pytest.mark.parametrize("number, fault", STOPPED)
def test_broken_off_it_goes_on_to_the_same_bits(uninterrupted, tmp_path, capfd, number, fault):
    """SIGTERM and SIGINT save the very step. A damaged checkpoint or a full disk loses nothing."""
    words, whole = uninterrupted
    words, out = [*words, "--out", f"{tmp_path}/out"], tmp_path / "out"
    folder = out / "lrc/checkpoints"
    for least in (2, 7):
        code = end_of(fork(words), lambda n=least: len(records_of(out, "lrc")) > n, number)
        assert code == (-number if number == signal.SIGKILL else 130)
        newest = max(folder.glob("step-*.pt"), default=None)
        if code == 130:
            assert newest.name == f"step-{records_of(out, 'lrc')[-1]['step']:07}.pt"
    size, told = 10**9, f"{newest} is damaged"
    if fault == "full":
        size, told = 200_000, "cannot write"
    else:
        content = bytearray(newest.read_bytes())
        content[len(content) // 2] ^= 1
        newest.write_bytes(content[: 5000 if fault == "cut" else None])
    before = {path: path.read_bytes() for path in folder.glob("step-*.pt")}
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    capfd.readouterr()
    assert end_of(fork(words, limit)) == 2
    said = sentence(capfd)
    assert said.startswith(f"red.py: {told}") and "delete" not in said
    assert before == {path: path.read_bytes() for path in folder.glob("step-*.pt")}
    if fault != "full":
        newest.unlink()
    assert end_of(fork(words)) == 0 and list(out.rglob("*.partial")) == []
    assert capfd.readouterr().out.count("going on from") == 1 and len(list(folder.iterdir())) == 2
    weights = [(at / "lrc/student/model.safetensors").read_bytes() for at in (whole, out)]
    assert weights[0] == weights[1]
    last = [torch.load(at / "lrc/checkpoints/step-0000012.pt") for at in (whole, out)]
    one, two = [[at["student"], [o["state"] for o in at["optimizers"]]] for at in last]
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    both = [records_of(at, "lrc") for at in (whole, out)]
    assert both[0] == both[1] and [record["step"] for record in both[0]] == list(range(13))


def stop_myself(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(100):  # Python runs a handler between two of its own instructions
        pass


SIGNAL_AT = {  # a function of red.py -> (the call at which signals come, seconds apart, saved)
    "calibrate": (lambda *_: True, 0, False),  # not in training: the run ends at once
    "training_step": (lambda *_: True, 3, False),  # and so it does at a second one
    "learning_rate_at": (lambda step, config: step == 1, 0, True),  # one, in the last step, twice
}


@pytest.mark.parametrize("place", SIGNAL_AT)
def test_no_signal_is_lost(real, tmp_path, monkeypatch, capsys, place):
    """At the last step the run ends behind it, and the next method is not begun."""
    now, apart, saved = SIGNAL_AT[place]
    monkeypatch.setattr(time, "monotonic", itertools.count(1, apart).__next__)

    def act(*values):
        for _ in range(2 if now(*values) else 0):
            stop_myself()

    watched(monkeypatch, place, act)
    assert main_of(real, tmp_path / "out", "--methods red pca") == 130
    assert sentence(capsys) == "red.py: interrupted; the same command resumes.\n"
    checkpoints = [path.name for path in (tmp_path / "out").rglob("step-*.pt")]
    assert checkpoints == ["step-0000002.pt"] * saved and not (tmp_path / "out/pca").exists()


# red.py with a teacher of three steps and a few questions, for torchrun.
FEW = """import functools, sys, red
red.tiny_teacher = functools.partial(red.tiny_teacher, steps=3)
red.tiny_scores = functools.partial(red.tiny_scores, count=3)
red.TINY_PAIRS = red.TINY_PAIRS[:5]
sys.exit(red.main())
"""


def no_writing(event, values):
    """In the second process: nothing is written, moved or deleted in a run's folder."""
    writes = event == "open" and isinstance(values[0], str) and values[2] & 3
    if (writes or event in ("os.rename", "os.remove")) and "runs/" in str(values[0]):
        os._exit(9)


def test_two_processes_train_stop_and_go_on_like_one(tiny, tmp_path, monkeypatch):
    """Tiny-world lines, where two processes read just what one with twice the batch reads."""
    words = "--steps 4 --methods red --calibration-samples 4 --batch-size 2 --save-every 2"
    words += " --learning-rate 1e-3 --seq-len 24 --out runs/"
    assert red.main(f"{words}one --grad-accum 4".split()) == 0

    def join(rank):
        os.environ["RANK"] = str(rank)
        group = dict(init_method=f"file://{tmp_path}/group", rank=rank, world_size=2)
        torch.distributed.init_process_group("gloo", **group)
        if rank == 1:  # a signal in its second step, and to it alone
            steps, time.sleep = itertools.count(), lambda seconds: None
            watched(monkeypatch, "training_step", lambda *_: next(steps) == 1 and stop_myself())
            sys.addaudithook(no_writing)

    two = f"{words}two --grad-accum 2".split()
    pair = [fork(two, functools.partial(join, rank)) for rank in (0, 1)]
    assert list(map(end_of, pair)) == [130, 130]
    assert [path.name for path in Path("runs/two/red/checkpoints").iterdir()] == ["step-0000002.pt"]
    (tmp_path / "few.py").write_text(FEW)
    torchrun = "-m torch.distributed.run --nproc_per_node 2 --standalone few.py".split()
    ended = program(*torchrun, *two, folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count(" x cpu") == ended.stdout.count("step-0000002.pt") == 1  # one speaks
    for one, other in zip(*[records_of(Path(f"runs/{name}")) for name in ("one", "two")]):
        assert ("held_out" in one) == (one["step"] % 2 == 0)
        one, other = one.pop("held_out", {}) | one, other.pop("held_out", {}) | other
        for key in {"step", "tokens", "loss", "kl", "gradient_norm", "erank"} & one.keys():
            assert one[key] == pytest.approx(other[key], rel=1e-4), key
    assert other["step"] == 4


# ---- The command line ------------------------------------------------------------------------

# Flags with their values; the sentence must name the flag.
WRONG = "ratio 0,ratio nan,ratio half,ratio,steps -1,batch-size 0,seq-len 1,learning-rate inf,"
WRONG += "calibration-samples 0,temperature 1e300,alpha -0.1,frobnicate,rat 0.5,methods magic,"
WRONG += "learning-rate 0,dtype float16,eval-problems 0"
COMMANDS = [(f"--{words}", words.split()[0]) for words in WRONG.split(",")]
BAD = """  # words | what the sentence says; MODEL: a teacher and its text, DIR: their folder
--optimizer sgd | 'muon'
--learning-rate=-1e-3 | must be from
--data x.txt | --model
--model '' | --model is empty
MODEL --data DIR/data.txt DIR/short.txt | short.txt
MODEL --seq-len 257 | 256 positions
MODEL --eval-data DIR/link.txt | part of --data
MODEL --data DIR/mine --eval-data DIR/mine/texts/a.txt | part of --data
MODEL --data X/Y:main --eval-data X/Y:main | part of --data
MODEL --data here/set --eval-data here/set/a.txt | part of --data
MODEL --eval-data DIR/short.txt | <<48/2=24>>
MODEL --data DIR/short.txt | too little
MODEL --data DIR/one.txt | too few
MODEL --data DIR/binary.txt | binary.txt
MODEL --data nobody/nothing | nobody/nothing
MODEL --data text | OWNER/NAME
MODEL --out DIR/dangling | cannot be made
MODEL --out DIR/mine | no run of RED
MODEL --data DIR/mine --out DIR/mine/texts/run | lies inside
MODEL --eval-data DIR/mine --out DIR/mine/texts/run | lies inside
--model nobody/nothing | nobody/nothing"""
COMMANDS += [tuple(line.split(" | ")) for line in BAD.splitlines()[1:]]
PARTIAL = dict(rope_type="linear", rope_theta=1e4, factor=2.0, partial_rotary_factor=0.5)
OWN = dict(model_type="own", auto_map={"AutoConfig": "own.Own"})
BAD_TEACHERS = {  # what is done to a teacher's folder; the sentence has this name
    "gpt2": lambda at: edit(at / "config.json", model_type="gpt2"),
    "quantised": lambda at: edit(at / "config.json", quantization_config={"bits": 4}),
    "partial": lambda at: edit(at / "config.json", rope_parameters=PARTIAL),
    "windows": lambda at: qwen2(at, layer_types=["sliding_attention", "full_attention"]),
    "code": lambda at: edit(at / "config.json", **OWN),
    "unsaved": lambda at: edit(at / "generation_config.json", do_sample=False, temperature=0.7),
    "down_proj": lambda at: edit_weight(at, LINEAR[-1], None),
    "up_proj": lambda at: edit_weight(at, LINEAR[-2], torch.ones(8)),
    "finite": lambda at: edit_weight(at, NORMS[2], torch.full((96,), math.nan)),
    "tokenless": lambda at: [path.unlink() for path in at.glob("tokenizer*")],
    "oversized": lambda at: tokenizer_of("characters", f"{ALPHABET}A").save_pretrained(at),
    "truncated": lambda at: os.truncate(at / "model.safetensors", 5000),
    "pickled": lambda at: (at / "model.safetensors").rename(at / "pytorch_model.bin"),
}
COMMANDS += [(f"MODEL --model DIR/{name}", name) for name in BAD_TEACHERS]


@pytest.fixture(scope="module")
def bad(tmp_path_factory, real):
    folder = tmp_path_factory.mktemp("parent") / "bad"
    text = "1+2=3\n\n" * 199
    texts = {"short.txt": "1\n\n2", "one.txt": "1\n2", "data.txt": text, "mine/texts/a.txt": text}
    make_files(folder, texts)
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "link.txt").symlink_to(folder / "data.txt")
    for name, change in {"teacher": bool, **BAD_TEACHERS}.items():
        shutil.copytree(real / "teacher", folder / name)
        change(folder / name)
    make_files(folder, {"code/own.py": "open('ran', 'w')"})
    return folder


@pytest.mark.parametrize("words, expected", COMMANDS)
def test_bad_input_gets_one_sentence(bad, words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path, {"here/set/a.txt": "1+2=3"})  # named as a data set of the hub may be
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # where transformers asks to run code
    before = sorted(bad.rglob("*"))
    words = words.replace("MODEL", "--model DIR/teacher --data DIR/data.txt --seq-len 64")
    if "--out" in words or "part of" in expected:  # looked at before anything is loaded
        monkeypatch.setattr(red, "load_teacher", None)
    assert red.main(shlex.split(words.replace("DIR", str(bad)))) == 2
    said = sentence(capsys)
    assert expected in said and not re.search("Traceback|delete|weights_only", said)
    assert sorted(bad.rglob("*")) == before
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "here/set/a.txt"]


def test_the_program_itself_ends_without_a_traceback(real, tmp_path):
    """Well, or after a mistake. It speaks at once."""
    ended = program(HERE / "red.py", *run_of(real, tmp_path / "out"), folder=tmp_path)
    assert ended.returncode == 0 and (tmp_path / "out/summary.json").is_file()
    assert "Traceback" not in ended.stderr and "\r" not in ended.stderr, ended.stderr
    ended = program(HERE / "red.py", "--ratio", "7", folder=tmp_path)
    assert (ended.returncode, ended.stderr) == (2, "red.py: --ratio must be from 1e-09 to 1.\n")
    make_files(tmp_path, {"torch.py": "raise SystemExit(7)"})  # what takes long to import
    shutil.copy(HERE / "red.py", tmp_path)
    ended = program(tmp_path / "red.py", folder=tmp_path)
    assert ended.returncode == 7 and "red.py" in ended.stdout


def test_without_a_terminal_progress_is_a_few_whole_lines(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    for seconds, least, most in ((1.0, 5, 11), (0.001, 0, 0)):
        for _ in red.progress(iter(range(200)), "reading", 200):
            clock[0] += seconds
        said = "".join(capsys.readouterr())
        lines = re.findall(r"reading .*\d+.* of .*200", said)
        assert least <= len(lines) <= most and "\r" not in said


def test_the_tiny_world_and_real_text_have_their_own_defaults(real):
    tiny, text = red.parse_arguments([]), red.parse_arguments(["--model", "x"])
    assert [*tiny.methods, *text.methods] == ["red", "lrc", "red"]
    assert (tiny.out, text.out, text.steps) == ("runs/tiny", "runs/x", 1000) and tiny.steps <= 100
    assert (tiny.data, text.data) == (None, "HuggingFaceFW/fineweb-edu:sample-10BT")
    assert (tiny.eval_data, text.eval_data) == (None, "openai/gsm8k:main:test")
    muon = [red.parse_arguments([*w, "--optimizer", "muon"]) for w in ([], ["--model", "x"])]
    rates = [config.learning_rate for config in (tiny, text, *muon)]
    assert rates == [1e-2, 3e-4, 3e-2, 1e-3]
    words = ["--model", f"{real}/teacher", "--data", f"{real}/data.txt", "--alpha", "0.2"]
    local = red.parse_arguments([*words, "--steps", "3", "--seed", "4", "--optimizer", "muon"])
    apart = ["--model", "x", "--data", "X/Y:main", "--eval-data", "X/Y:main:test"]  # another part
    assert red.parse_arguments(apart).eval_data == "X/Y:main:test"
    data = f"{real}/data.txt".replace("/", "-")
    assert local.out == f"runs/teacher-data-{data}-steps-3-optimizer-muon-seed-4"
    assert local.eval_data is None


def test_help_says_what_there_is(capsys):
    with pytest.raises(SystemExit):
        red.parse_arguments(["--help"])
    said = capsys.readouterr().out
    assert all(re.search(rf"^  {method}  ", said, re.MULTILINE) for method in METHODS)
    assert all(f"--{name.replace('_', '-')} " in said for name in vars(red.Config()))
    for value in ("0.5", "512", "1000", "200", "0.2", "3e-4|0.0003"):  # defaults
        assert re.search(rf"(?<![\d.])({value})(?![\d.])", said), value


TEXT = "\n".join((HERE / name).read_text() for name in ("README.md", ".github/study.md"))
TEXT = TEXT.replace("\\\n", " ")
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_every_command_and_snippet_of_the_pages_is_one_that_red_understands():
    commands = re.findall(r"(?:python|torchrun)\b[^\n`]*? red\.py\b([^\n`#;|>&]*)", TEXT)
    assert len(commands) > 4
    for command in commands:
        words = shlex.split(command.replace("$seed", "1").replace("...", ""))
        if "--help" not in words:
            red.parse_arguments(words)  # raises, if one is not understood
    for text in SNIPPETS:
        compile(text, "README.md", "exec")
        names = set(re.findall(r"\bred\.(\w+)", text)) - {"py"}
        assert not names or re.search(r"^(import|from) .*\bred\b", text, re.MULTILINE)
        assert all(hasattr(red, name) for name in names), names


def test_the_snippet_to_copy_runs_as_it_stands(real, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # with a teacher and text in the places that it names
    (text,) = [text for text in SNIPPETS if ".save_pretrained(" in text]
    teacher = re.search(r"""(?:load_teacher|from_pretrained)\(["'](.*?)["']""", text)[1]
    shutil.copytree(real / "teacher", tmp_path / teacher)
    for name in re.findall(r"""["']([^"'\n]+\.(?:txt|jsonl))["']""", text):
        make_files(tmp_path, {name: (real / f"data{Path(name).suffix}").read_text()})
    exec(text, {})
    places = re.findall(r"""\.save_pretrained\(["'](.*?)["']""", text)
    assert AutoModelForCausalLM.from_pretrained(places[0]).config.hidden_size < 96
