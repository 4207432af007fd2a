"""Properties that would break if the method were implemented wrongly, on tiny models built here.

    python -m pytest -q test_red.py
"""

import inspect
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the hub out of reach, at once and everywhere

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import red

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)  # these models are too small to share

SHAPE = dict(vocab_size=60, hidden_size=32, intermediate_size=40, num_hidden_layers=2)
SHAPE |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
SHAPE |= dict(bos_token_id=None, eos_token_id=1, pad_token_id=0)
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0)
LLAMA3 |= dict(high_freq_factor=4.0, original_max_position_embeddings=16)
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "llama-tied": (LlamaConfig, dict(tie_word_embeddings=True)),
    "llama-biases": (LlamaConfig, dict(attention_bias=True, mlp_bias=True)),
    "llama-odd-head": (LlamaConfig, dict(head_dim=10)),
    "llama3-rope": (LlamaConfig, dict(rope_parameters=LLAMA3)),
    "mistral": (MistralConfig, dict(sliding_window=6)),
    "qwen2": (Qwen2Config, {}),
    "qwen2-tied": (Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen3": (Qwen3Config, dict(head_dim=12, attention_bias=True)),
}


def make_teacher(family="llama", dtype=torch.float32, seed=0):
    """A random teacher in which every norm gain and bias differs from its usual 1 or 0."""
    torch.manual_seed(seed)
    kind, words = FAMILIES[family]
    teacher = AutoModelForCausalLM.from_config(kind(**SHAPE, **words), dtype=dtype)
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
            else:
                parameter.mul_(4)
    return teacher.eval().requires_grad_(False)


def make_batch(rows=3, tokens=12, seed=1):
    ids = torch.randint(2, 60, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def make_student(teacher, hidden_size=16, method="red", seed=0):
    calibration = red.calibrate(teacher, [make_batch(1, seed=s) for s in range(4)], hidden_size)
    return red.new_student(method, teacher, hidden_size, calibration, seed), calibration


def logits(model, batch):
    with torch.no_grad():
        return model(batch["input_ids"]).logits


# The student ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_at_full_width_the_student_is_the_teacher(family):
    teacher = make_teacher(family)
    student, _ = make_student(teacher, 32)
    batch = make_batch()
    torch.testing.assert_close(logits(student.model, batch), logits(teacher, batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_start_the_students_weights_are_the_teachers_cut_out(family):
    teacher = make_teacher(family)
    student, calibration = make_student(teacher)
    kept = calibration.channels
    original = dict(teacher.named_parameters())
    for name, weight in student.model.named_parameters():
        expected = original[name]
        if name.endswith(("norm.weight",)) and expected.shape == (32,):
            ratio = weight / expected[kept]  # gains may be rescaled, by one number for the layer
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
            continue
        if name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias")):
            expected = expected[kept]
        elif expected.dim() == 2:
            expected = expected[:, kept]
        assert torch.equal(weight, expected), name
    for projection in student.projections.values():
        assert torch.equal(torch.linalg.svdvals(projection), torch.ones(16))


class Projected(torch.nn.Module):
    """One matrix applied as the paper writes it: the teacher's, with its projection around it."""

    def __init__(self, student, name, layer):
        super().__init__()
        self.student, self.name, self.layer = [student], name, layer

    def forward(self, x):
        student, layer = self.student[0], self.layer
        projection = student.projections.get(self.name, student.projections["model.embed_tokens"])
        if isinstance(layer, torch.nn.Embedding):
            return layer(x) @ projection
        if self.name.endswith(("o_proj", "down_proj")):
            return layer(x) @ projection
        wide = x @ projection.T
        norm = red.feeding_norm(self.name)
        if student.fold and self.name in student.projections:
            wide = wide * student.teacher.get_submodule(norm).weight
        return layer(wide)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", red.METHODS)
def test_merged_equals_projected_and_exported_equals_merged(family, method, tmp_path):
    teacher = make_teacher(family)
    student, _ = make_student(teacher, method=method)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # as after training: no longer a selection, nor orthonormal
        for parameter in student.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        student.make_weights()
    batch = make_batch()
    merged = logits(student.model, batch)
    student.export(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(reloaded, batch), merged, rtol=0, atol=0)

    for name in [*student.projections, "lm_head"]:
        student.model.set_submodule(name, Projected(student, name, teacher.get_submodule(name)))
    torch.testing.assert_close(logits(student.model, batch), merged, rtol=1e-4, atol=1e-4)


def test_export_leaves_an_ordinary_config(tmp_path):
    teacher = make_teacher("llama-odd-head")
    teacher.config.quantization_config = {"quant_method": "gguf"}
    student, _ = make_student(teacher)
    student.export(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    original = teacher.config.to_dict()
    assert stored["hidden_size"] == 16 and stored["head_dim"] == 10
    assert "quantization_config" not in stored and not set(stored) - set(original)
    assert stored["architectures"] == ["LlamaForCausalLM"]
    changed = {key for key in stored if stored[key] != original[key]}
    assert changed <= {"hidden_size", "architectures", "dtype"}
    assert not list(tmp_path.glob("*.py"))


def test_a_student_of_wrong_shapes_is_refused():
    teacher = make_teacher()
    student, _ = make_student(teacher)
    gains = {name: gain[:-1] for name, gain in student.gains.items()}
    with pytest.raises(ValueError, match="wrong shape"):
        red.ProjectedStudent(teacher, student.model, student.projections, gains)


def test_nearest_width_obeys_the_family():
    llama, mistral = make_teacher().config, make_teacher("mistral").config
    for teacher_config, wanted, given in ((llama, 15, 16), (llama, 14, 16), (mistral, 15, 15)):
        config = red.Config(hidden_size=wanted)
        assert red.student_width(config, teacher_config) == given
    assert red.student_width(red.Config(ratio=0.5), llama) == 16
    for wrong in (red.Config(hidden_size=33), red.Config(ratio=0.01), red.Config(hidden_size=1)):
        with pytest.raises(red.UserError):
            red.student_width(wrong, llama)


def test_lrc_start_has_the_scale_it_has_at_its_own_width():
    generator = torch.Generator().manual_seed(0)
    start = red.initial_projections("lrc", ["a", "b"], 512, 256, None, generator)
    for projection in start.values():
        diagonal = (projection.T @ projection).diagonal().mean()
        assert diagonal == pytest.approx(3072 * 0.02**2, rel=0.02)
    assert not torch.equal(start["a"], start["b"])


def test_orthogonal_starts_and_folded_gains():
    generator = torch.Generator().manual_seed(0)
    for method, shared in (("orthogonal", False), ("shared-orthogonal", True)):
        start = red.initial_projections(method, ["a", "b"], 32, 16, None, generator)
        torch.testing.assert_close(start["a"].T @ start["a"], torch.eye(16))
        assert torch.equal(start["a"], start["b"]) == shared
    for family in ("qwen2", "llama-biases"):  # a full-width rotation loses nothing either
        teacher = make_teacher(family)
        student, _ = make_student(teacher, 32, "shared-orthogonal")
        torch.testing.assert_close(
            logits(student.model, make_batch()), logits(teacher, make_batch()), rtol=1e-3, atol=1e-3
        )


# Effective rank ---------------------------------------------------------------------------------


def test_effective_rank_closed_forms():
    assert red.effective_rank(torch.eye(7)) == pytest.approx(7)
    rank_one = torch.outer(torch.arange(1.0, 50), torch.arange(1.0, 9))
    assert red.effective_rank(rank_one) == pytest.approx(1, abs=1e-4)
    assert red.effective_rank(torch.zeros(5, 3)) == 0.0
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(40, 3, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(6, 3, generator=generator)).Q
    hidden = left @ torch.diag(torch.tensor([4.0, 2.0, 2.0])) @ right.T
    expected = math.exp(0.5 * math.log(2) + 2 * 0.25 * math.log(4))
    assert red.effective_rank(hidden) == pytest.approx(expected, abs=1e-3)
    assert red.effective_rank(1e-20 * hidden) == pytest.approx(expected, abs=1e-3)
    assert red.effective_rank(1e20 * hidden) == pytest.approx(expected, abs=1e-3)
    assert red.effective_rank(hidden.T) == pytest.approx(expected, abs=1e-3)
    assert red.effective_rank(hidden.reshape(5, 8, 6)) == pytest.approx(expected, abs=1e-3)
    assert red.effective_rank(hidden.bfloat16()) == pytest.approx(expected, abs=0.2)
    with pytest.raises(ValueError):
        red.effective_rank(torch.tensor([[math.nan, 1.0]]))


def test_effective_rank_agrees_with_an_svd():
    hidden = torch.randn(300, 48) * torch.logspace(0, -6, 48)
    values = torch.linalg.svdvals(hidden.double())
    p = values / values.sum()
    assert red.effective_rank(hidden) == pytest.approx(torch.exp(-(p * p.log()).sum()).item(), abs=1e-6)


# Calibration ------------------------------------------------------------------------------------


def brute_force_importance(teacher, batch, statistic):
    """By hand, from `output_hidden_states`-like recomputation: one token and channel at a time."""
    seen = {}
    hooks = [
        module.register_forward_hook(
            lambda m, inputs, output, name=name: seen.update({name: (inputs[0], output)})
        )
        for name, module in teacher.named_modules()
        if name == "model.norm" or name.endswith("layernorm")
    ]
    logits(teacher, batch)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2 * 2 + 1
    total = [0.0] * 32
    for stream, normed in seen.values():
        stream, normed = stream.flatten(0, 1).double(), normed.flatten(0, 1).double()
        scores = []
        for channel in range(32):
            column = normed[:, channel].tolist()
            if statistic == "norm-output":
                scores.append(sum(abs(x) for x in column) / len(column))
            elif statistic == "variance":
                mean = sum(column) / len(column)
                scores.append(sum((x - mean) ** 2 for x in column) / len(column))
            else:
                squares = [
                    row[channel].item() ** 2 / (sum(x * x for x in row.tolist()) / 32)
                    for row in stream
                ]
                scores.append(math.sqrt(sum(squares) / len(squares)))
        total = [old + new / sum(scores) for old, new in zip(total, scores)]
    return torch.tensor(total, dtype=torch.float64)


@pytest.mark.parametrize("statistic", red.STATISTICS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_channel_importance_by_brute_force(family, statistic):
    teacher, batch = make_teacher(family), make_batch()
    importance = red.channel_importance(teacher, [batch], statistic)
    expected = brute_force_importance(teacher, batch, statistic)
    torch.testing.assert_close(importance, expected, rtol=1e-5, atol=1e-6)
    assert importance.sum().item() == pytest.approx(5)


@pytest.mark.parametrize("statistic", red.STATISTICS)
def test_channel_importance_ignores_batch_split_and_padding(statistic):
    teacher, batch = make_teacher("qwen3"), make_batch(4)
    whole = red.channel_importance(teacher, [batch], statistic)
    split = [{"input_ids": row[None]} for row in batch["input_ids"]]
    torch.testing.assert_close(red.channel_importance(teacher, split, statistic), whole)
    for side in ("left", "right"):
        blank = torch.zeros(4, 5, dtype=torch.long)
        ids, real = batch["input_ids"], torch.ones(4, 12, dtype=torch.long)
        order = (blank, ids) if side == "left" else (ids, blank)
        mask = (blank, real) if side == "left" else (real, blank)
        padded = {"input_ids": torch.cat(order, 1), "attention_mask": torch.cat(mask, 1)}
        padded = red.channel_importance(teacher, [padded], statistic)
        torch.testing.assert_close(padded, whole, rtol=1e-4, atol=1e-5)


def test_channel_importance_streams():
    """It takes a generator, and never holds more than one batch's activations."""
    teacher, alive = make_teacher(), []

    def batches():
        for seed in range(6):
            batch = make_batch(1, seed=seed)
            alive.append(batch["input_ids"].data_ptr())
            yield batch

    streamed = red.channel_importance(teacher, batches())
    listed = red.channel_importance(teacher, [make_batch(1, seed=s) for s in range(6)])
    assert len(alive) == 6 and torch.equal(streamed, listed)
    with pytest.raises(ValueError):
        red.channel_importance(teacher, [])
    with pytest.raises(KeyError):
        red.channel_importance(teacher, [make_batch()], "entropy")


def test_selection():
    channels = red.select_channels(torch.tensor([3.0, 1.0, 2.0, 3.0]), 3)
    assert channels.tolist() == [0, 2, 3]
    selection = red.selection_matrix(channels, 4)
    assert torch.equal(torch.arange(4.0) @ selection, torch.tensor([0.0, 2.0, 3.0]))
    assert torch.equal(selection.T @ selection, torch.eye(3))
    for wrong in (0, 5):
        with pytest.raises(ValueError):
            red.select_channels(torch.ones(4), wrong)
    with pytest.raises(ValueError):
        red.selection_matrix(torch.tensor([1, 1]), 4)


def test_rescaled_gains_restore_the_size_of_the_teachers_norm_outputs():
    teacher, batch = make_teacher(), make_batch()
    kept = torch.arange(0, 32, 2)
    factors = red.gain_rescaling(teacher, [batch], kept)
    stream = teacher.model.embed_tokens(batch["input_ids"])
    ratio = stream[..., kept].square().mean(-1).sqrt() / stream.square().mean(-1).sqrt()
    assert factors["model.layers.0.input_layernorm"] == pytest.approx(ratio.mean().item(), rel=1e-5)
    assert set(red.gain_rescaling(teacher, [batch], torch.arange(32)).values()) == {1.0}


# Losses and the step ----------------------------------------------------------------------------


def plain_losses(student_hidden, student_head, teacher_hidden, teacher_head, labels, temperature):
    """KL and cross-entropy written out in float64, one token at a time."""
    kl, cross_entropy, count = 0.0, 0.0, 0
    for row in range(labels.shape[0]):
        for position in range(labels.shape[1] - 1):
            label = labels[row, position + 1]
            if label == -100:
                continue
            q = student_hidden[row, position].double() @ student_head.double().T
            p = teacher_hidden[row, position].double() @ teacher_head.double().T
            log_q, log_p = (q / temperature).log_softmax(-1), (p / temperature).log_softmax(-1)
            kl = kl + temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
            cross_entropy = cross_entropy - q.log_softmax(-1)[label]
            count += 1
    return kl / count, cross_entropy / count


@pytest.mark.parametrize("temperature", [1.0, 40.0])
@pytest.mark.parametrize("chunk_rows", [2, 1000])
def test_distillation_loss_and_its_gradient(temperature, chunk_rows, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 7, 8), (30, 8), (2, 7, 16), (30, 16)
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    labels = torch.randint(0, 30, (2, 7), generator=generator)
    labels[0, :3] = -100
    labels[1, 5] = -100
    monkeypatch.setattr(red, "tokens_at_once", lambda head: chunk_rows)
    hidden, head = tensors[0].requires_grad_(), tensors[1].requires_grad_()
    loss, kl, cross_entropy = red.distillation_loss(*tensors, labels, temperature)
    expected = plain_losses(*tensors, labels, temperature)
    torch.testing.assert_close((kl, cross_entropy), tuple(term.detach() for term in expected))
    torch.testing.assert_close(loss, kl + cross_entropy)
    got = torch.autograd.grad(3 * loss, (hidden, head))
    torch.testing.assert_close(got, torch.autograd.grad(3 * sum(expected), (hidden, head)))


def test_distillation_loss_without_any_label_is_zero():
    hidden, head = torch.randn(1, 4, 8, requires_grad=True), torch.randn(30, 8)
    nothing = torch.full((1, 4), -100)
    loss, *_ = red.distillation_loss(hidden, head, hidden.detach(), head, nothing)
    loss.backward()
    assert loss.item() == 0 and hidden.grad.abs().max() == 0


def test_alignment_loss():
    generator = torch.Generator().manual_seed(0)
    student, narrow, wide, projection = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((2, 5, 6), (2, 5, 6), (2, 5, 9), (9, 6))
    )
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    plain = sum((student[0] - narrow[0]).square().flatten().tolist()) / 30
    assert red.alignment_loss(student[:1], narrow[:1]).item() == pytest.approx(plain)
    projection.requires_grad_()
    loss = red.alignment_loss(student, wide, projection, mask)
    rows = torch.cat([student[0] - wide[0] @ projection, (student[1] - wide[1] @ projection)[:3]])
    assert loss.item() == pytest.approx(rows.square().mean().item())
    loss.backward()
    assert projection.grad.abs().min() > 0  # the projection itself learns from its own target
    same = narrow.clone().requires_grad_()
    red.alignment_loss(same, narrow).backward()
    assert (same.grad == 0).all()  # where student and teacher agree, as they do at ratio 1


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_losses_of_low_precision_are_those_of_high_precision(dtype, tolerance, monkeypatch):
    """Over many chunks, too, of which the head's gradient is the sum."""
    monkeypatch.setattr(red, "tokens_at_once", lambda head: 8)
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 65, 16), (30, 16), (2, 65, 32), (30, 32)
    tensors = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    labels = torch.randint(0, 30, (2, 65), generator=generator)
    found = []
    for precision in (dtype, torch.float64):
        hidden, head, *others = [each.detach().to(precision).requires_grad_() for each in tensors]
        loss, *_ = red.distillation_loss(hidden, head, *others, labels, 2.0)
        loss = loss + red.alignment_loss(hidden, others[0][..., :16])
        found.append([each.double() for each in (loss, *torch.autograd.grad(loss, (hidden, head)))])
    for got, expected in zip(*found):
        assert (got - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_projection_and_gain_and_nothing_else(family):
    teacher = make_teacher(family)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student, calibration = make_student(teacher)
    stream = iter([make_batch(seed=s) for s in range(3)])
    start = [parameter.detach().clone() for parameter in student.parameters()]
    red.distill(teacher, student, stream, 3, 1e-2, scales=calibration.scales)
    assert len(start) == len(red.projected_matrices(teacher)) + 5
    for old, new in zip(start, student.parameters()):
        assert (old != new).any()
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("family", ["llama-biases", "qwen3", "qwen2-tied"])
@pytest.mark.parametrize("method", ["red", "orthogonal"])
def test_the_steps_gradients_are_those_of_the_formulas(family, method):
    """One step against plain autograd through functional_call, in float64, with padding."""
    teacher = make_teacher(family, torch.float64)
    student, calibration = make_student(teacher, method=method)
    batch = make_batch()
    batch["attention_mask"] = torch.ones(3, 12, dtype=torch.long)
    batch["attention_mask"][1, 9:] = 0
    batch["labels"][1, 9:] = -100
    totals = red.training_step(teacher, student, [batch], 2.0, 0.3, calibration.scales)
    got = [parameter.grad.clone() for parameter in student.parameters()]

    names, seen = red.aligned_modules(teacher), {}

    def see(which):
        return lambda name, before, after: seen.update({(which, name): after})

    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    inputs |= {"use_cache": False}
    with red.watch(teacher, names, see("t")), red.watch(student.model, names, see("s")):
        goal = teacher(**inputs).logits
        made = student.merge()
        output = torch.func.functional_call(student.model, made, kwargs=inputs).logits
    one = torch.eye(60, dtype=torch.float64)
    loss = sum(plain_losses(output, one, goal, one, batch["labels"], 2.0))
    real = batch["attention_mask"].bool()
    for name in names:
        target = seen["t", name]
        if name.endswith(("o_proj", "down_proj")):
            target = target @ student.projections[name]
        error = (seen["s", name] - target)[real].square().mean()
        loss = loss + 0.3 * error / calibration.scales[name]
    assert totals["loss"].item() == pytest.approx(loss.item())
    for gradient, expected in zip(got, torch.autograd.grad(loss, student.parameters())):
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    teacher = make_teacher(dtype=torch.float64)
    student, calibration = make_student(teacher)
    whole = make_batch(4)
    whole["labels"][0, :9] = -100  # so that the mean of means would be wrong
    parts = [{key: value[i : i + 2] for key, value in whole.items()} for i in (0, 2)]
    gradients = []
    for batches in ([whole], parts):
        red.training_step(teacher, student, batches, scales=calibration.scales)
        gradients.append([parameter.grad.clone() for parameter in student.parameters()])
        for parameter in student.parameters():
            parameter.grad = None
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_steps_that_are_not_finite_are_skipped_and_ten_in_a_row_end_the_run(monkeypatch):
    teacher = make_teacher()
    student, calibration = make_student(teacher)
    start = [parameter.detach().clone() for parameter in student.parameters()]
    honest, bad, records = red.distillation_loss, {1, 2, *range(5, 16)}, []

    def sometimes(*words):
        loss, *terms = honest(*words)
        return (loss * math.nan if len(records) in bad else loss), *terms

    monkeypatch.setattr(red, "distillation_loss", sometimes)
    with pytest.raises(FloatingPointError, match="learning-rate"):
        red.distill(teacher, student, itertools.repeat(make_batch()), 20, 1e-3,
                    after_step=lambda record, _: records.append(json.loads(json.dumps(record))))  # fmt: skip
    assert [record["skipped"] for record in records] == [i in bad for i in range(14)]
    assert records[1]["loss"] is None and "NaN" not in json.dumps(records)
    for old, new in zip(start, student.parameters()):
        assert torch.isfinite(new).all() and (old != new).any()


# The tiny world ---------------------------------------------------------------------------------


def test_arithmetic_problems_are_right():
    generator = random.Random(0)
    for steps in range(1, 6):
        prompt, answer = red.arithmetic_problem(steps, generator)
        first, *rest = prompt.removesuffix("=?")[0], *zip(prompt[1:-2:2], prompt[2:-2:2])
        value = int(first)
        for part, (sign, digit) in zip(answer.strip().split("#")[0].split(";"), rest, strict=True):
            result = eval(f"({value}{sign}{digit})") % 10
            assert part == f"{value}{sign}{digit}={result}"
            value = result
        assert answer == f"{answer.split('#')[0]}#{value}\n"


def test_tiny_batches_label_answers_only_and_repeat_with_the_seed():
    batch = next(red.tiny_batches(4, 96, "a"))
    assert torch.equal(next(red.tiny_batches(4, 96, "a"))["input_ids"], batch["input_ids"])
    assert not torch.equal(next(red.tiny_batches(4, 96, "b"))["input_ids"], batch["input_ids"])
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist()):
        text = "".join(red.TINY_ALPHABET[i] for i in ids)
        marks = "".join("." if label == -100 else red.TINY_ALPHABET[label] for label in labels)
        for line, mark in zip(text.splitlines(), marks.splitlines()):
            sign = "?" if "?" in line else ":"
            prompt, _, answer = line.partition(sign)
            if sign in line:
                assert mark == "." * (len(prompt) + 1) + answer


def test_tiny_tokenizer_round_trip(tmp_path):
    tokenizer = red.tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "7+5-3=?7+5=2;2-3=9#9\nabcd:wxyz\n"
    ids = loaded(text)["input_ids"]
    assert ids == [red.TINY_ALPHABET.index(character) for character in text]
    assert loaded.decode(ids) == text


@pytest.mark.parametrize("family", red.FAMILIES)
def test_the_tiny_world_trains_in_every_family(family):
    values = red.read_config() | {"model_type": family, "hidden_size": 32, "head_dim": 8}
    teacher = red.tiny_teacher(values, 0, "cpu", steps=2)
    scores = red.chain_scores(teacher, red.tiny_tokenizer(), problems=2)
    assert teacher.config.model_type == family and len(scores["chains"]) == 5


@pytest.mark.parametrize("family", red.FAMILIES)
def test_prompts_of_two_lengths_are_padded_within_the_vocabulary(family, tmp_path):
    """Saved beside a qwen2 model, a tokenizer without a pad token comes back with one of its own."""
    teacher = red.tiny_teacher(red.read_config() | {"model_type": family}, 0, "cpu", steps=1)
    teacher.save_pretrained(tmp_path)
    red.tiny_tokenizer().save_pretrained(tmp_path)
    teacher, tokenizer = red.load_teacher(str(tmp_path))
    together = red.generate(teacher, tokenizer, ["1+2-3*4=?", "7"], 4)
    assert together == [red.generate(teacher, tokenizer, [each], 4)[0] for each in ("1+2-3*4=?", "7")]


def proxy_parts():
    """A frozen weight, white and coloured covariances, and two orthonormal bases, (12, 12)."""
    torch.manual_seed(0)
    weight, white = torch.randn(12, 12).double(), torch.eye(12).double()
    coloured = torch.logspace(0, -2, 12).double().diag()
    bases = [torch.linalg.qr(torch.randn(12, 12).double()).Q[:, :6] for _ in range(2)]
    return weight, white, coloured, *bases


def derivative(read, write, weight, covariance):
    """The largest derivative of a singular value at the start of the linear proxy."""
    values = red.linear_proxy(read, write, weight, covariance, 1, rate=1e-7)
    return ((values[1] - values[0]).abs().max() / 1e-7).item()


def test_the_proxys_singular_values_stand_still_where_theory_says_so():
    weight, white, coloured, basis, other = proxy_parts()
    selection = red.selection_matrix(torch.tensor([0, 2, 3, 7, 8, 11]), 12).double()
    assert derivative(basis, basis, weight, white) < 1e-4
    assert derivative(selection, selection, weight, white) < 1e-4
    # Channels that are not correlated: selection is at rest for coloured inputs too.
    assert derivative(selection, selection, weight, coloured) < 1e-4
    assert derivative(basis, basis, weight, coloured) > 1e-2
    assert derivative(basis, other, weight, white) > 1e-2
    assert derivative(basis, other, weight, coloured) > 1e-2


def test_the_proxy_descends_its_loss():
    weight, _, coloured, basis, other = proxy_parts()
    factors = [basis.clone().requires_grad_(), other.clone().requires_grad_()]
    root = coloured.sqrt()  # E|A h|^2 = |A @ root|^2
    error = weight @ (factors[0] @ factors[1].T - torch.eye(12)) @ root
    gradients = torch.autograd.grad(error.square().sum() / 2, factors)
    stepped = [factor - 0.01 * gradient for factor, gradient in zip(factors, gradients)]
    expected = torch.stack([torch.linalg.svdvals(each) for each in stepped])
    values = red.linear_proxy(basis, other, weight, coloured, 1, rate=0.01)
    assert torch.allclose(values[1], expected, atol=1e-12)


def test_the_proxys_random_start_fans_out_and_selection_stays_together():
    weight, _, coloured, *_ = proxy_parts()
    small = [0.02 * torch.randn(12, 6).double() for _ in range(2)]
    selection = red.selection_matrix(torch.arange(6), 12).double()
    random_start = red.linear_proxy(*small, weight / 12**0.5, coloured, 100, 0.05)
    red_start = red.linear_proxy(selection, selection, weight / 12**0.5, coloured, 100, 0.05)
    spread = [(v.std(-1) / v.mean(-1)).amax(-1) for v in (random_start, red_start)]
    assert spread[0].max() > 1.5 * spread[0][0] and spread[1].max() < 0.1


def test_red_keeps_more_effective_rank_than_lrc_after_50_steps():
    teacher = red.tiny_teacher(red.read_config(), 0, "cpu", steps=400)
    stream = red.tiny_batches(16, 64, "calibration")
    calibration = red.calibrate(teacher, [next(stream) for _ in range(4)], 24)
    held_out, results = [next(stream)], {}
    for method in ("red", "lrc"):
        student = red.new_student(method, teacher, 24, calibration)
        batches = red.tiny_batches(16, 64, "training")
        red.distill(teacher, student, batches, 50, 3e-3, scales=calibration.scales)
        results[method] = red.evaluate(student.model, held_out)
    assert sum(results["red"]["erank"]) > sum(results["lrc"]["erank"]) + 1
    assert results["red"]["loss"] < results["lrc"]["loss"]


def test_evaluate_against_plain_formulas():
    teacher, batch = make_teacher(), make_batch()
    batch["labels"][0, :6] = -100
    result = red.evaluate(teacher, [batch])
    output = teacher(batch["input_ids"], output_hidden_states=True)
    targets = batch["labels"][:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), targets)
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(loss.item()), rel=1e-4)
    first = output.hidden_states[1].flatten(0, 1)
    assert result["erank"][0] == pytest.approx(red.effective_rank(first), rel=1e-5)
    first = first / first.square().mean(-1, keepdim=True).sqrt()
    assert result["erank_normalised"][0] == pytest.approx(red.effective_rank(first), rel=1e-5)


# GSM8K ------------------------------------------------------------------------------------------


def test_gsm8k_is_scored_like_the_harness(monkeypatch):
    answers = {
        "right": " 6 * 7 = 42\n#### 42",
        "dollars": " It costs #### $1,042.",
        "flexible": " so the answer is 1,042.",
        "runs on": " #### 42\n\nQuestion: next? #### 7",
        "nothing": " I do not know",
    }
    targets = {"right": "42", "dollars": "1042", "flexible": "1,042", "runs on": "42", "nothing": "1"}
    prompts = []

    def answer(model, tokenizer, asked, new_tokens, stop, batch_size):
        prompts.extend(asked)
        return [answers[each.rpartition("Question: ")[2].removesuffix("\nAnswer:")] for each in asked]

    monkeypatch.setattr(red, "generate", answer)
    problems = [{"question": q, "answer": f"because #### {targets[q]}"} for q in answers]
    shots = [{"question": "1+1?", "answer": "two #### 2"}]
    scores = red.gsm8k_scores(None, None, problems, shots)
    strict = [verdict["strict_correct"] for verdict in scores["problems"]]
    flexible = [verdict["flexible_correct"] for verdict in scores["problems"]]
    assert strict == [True, False, False, True, False]  # `#### $1` has no digit after the marks
    assert flexible == [True, True, True, True, False]
    assert scores["strict"] == 0.4 and scores["flexible"] == 0.8
    assert prompts[0] == "Question: 1+1?\nAnswer: two #### 2\n\nQuestion: right\nAnswer:"


# Pieces to copy ---------------------------------------------------------------------------------

CORE = """rank_and_world add_up effective_rank linear_proxy watch placed last_hidden token_means stream_norms channel_importance select_channels
selection_matrix gain_rescaling mean_squares aligned_modules READERS WRITERS projected_matrices
feeding_norm ProjectedStudent initial_projections initial_gains alignment_loss
tokens_at_once ChunkedDistillation distillation_loss training_step""".split()


def test_the_core_runs_where_there_is_only_torch():
    space = {"torch": torch}
    for name in CORE:
        thing = getattr(red, name)
        code = f"{name} = {thing!r}" if name.isupper() else inspect.getsource(thing)
        exec(code, space)
    teacher, batch = make_teacher(), make_batch()
    importance = space["channel_importance"](teacher, [batch])
    channels = space["select_channels"](importance, 16)
    names = space["projected_matrices"](teacher)
    projections = space["initial_projections"]("red", names, 32, 16, channels, None)
    rescaling = space["gain_rescaling"](teacher, [batch], channels)
    gains = space["initial_gains"]("red", teacher, projections, channels, rescaling)
    model = AutoModelForCausalLM.from_config(red.student_config(teacher.config, 16))
    student = space["ProjectedStudent"](teacher, model, projections, gains)
    scales = space["mean_squares"](teacher, [batch])
    totals = space["training_step"](teacher, student, [batch], scales=scales)
    expected, calibration = make_student(teacher)
    assert math.isfinite(totals["loss"]) and len(student.parameters()) == len(expected.parameters())
    assert space["effective_rank"](torch.eye(3)) == pytest.approx(3)


@pytest.mark.parametrize("name", ["effective_rank", "select_channels", "selection_matrix",
                                  "alignment_loss", "initial_projections", "linear_proxy"])  # fmt: skip
def test_plain_tensor_functions_stand_alone(name):
    space = {"torch": torch}
    exec(inspect.getsource(getattr(red, name)), space)
    x = torch.rand(4, 3)
    words = {"effective_rank": (x,), "select_channels": (x[:, 0], 2), "alignment_loss": (x, x)}
    words |= {"selection_matrix": (torch.tensor([0, 2]), 4)}
    words |= {"linear_proxy": (x, x, torch.eye(4), torch.eye(4), 2)}
    words |= {"initial_projections": ("orthogonal", ["a"], 4, 3, None, torch.Generator())}
    space[name](*words[name])


# The command line -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A folder with a small 'real' teacher and its tokenizer, and data in each format."""
    import datasets

    folder = tmp_path_factory.mktemp("real")
    teacher = red.tiny_teacher(red.read_config(), 0, "cpu", steps=1)
    teacher.save_pretrained(folder / "teacher")
    red.tiny_tokenizer().save_pretrained(folder / "teacher")
    (folder / "teacher/README.md").write_text("---\nlicense: apache-2.0\n---\n")
    generator = random.Random(0)
    lines = ["".join(red.arithmetic_problem(3, generator)).strip() for _ in range(300)]
    (folder / "data.txt").write_text("\n\n".join(lines))
    rows = [json.dumps({"question": line, "answer": "#### 7"}) for line in lines]
    (folder / "data.jsonl").write_text("\n".join(rows))
    datasets.Dataset.from_dict({"text": lines}).to_parquet(folder / "data.parquet")
    return folder


SMALL = "--steps 2 --batch-size 2 --seq-len 32 --calibration-samples 4 --device cpu".split()


@pytest.mark.parametrize("data", ["data.txt", "data.jsonl", "data.parquet"])
def test_a_run_on_a_folder_leaves_what_it_promises(real, data, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["--model", f"{real}/teacher", "--data", f"{real}/{data}", "--out", str(out), *SMALL]
    assert red.main(words) == 0
    assert {path.name for path in out.iterdir()} == {
        "settings.json", "metrics.jsonl", "summary.json", "selection.json", "student", "checkpoints",
    }  # fmt: skip
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [0, 1, 2]
    assert [step["tokens"] for step in steps] == [0, 64, 128] and all(s["loss"] > 0 for s in steps[1:])
    assert all(len(steps[i]["held_out"]["erank"]) == 3 for i in (0, 2)) and "held_out" not in steps[1]
    selection = json.loads((out / "selection.json").read_text())
    assert len(selection["channels"]) == 48 and len(selection["importance"]) == 96
    summary = json.loads((out / "summary.json").read_text())
    student = AutoModelForCausalLM.from_pretrained(out / "student")
    assert student.config.hidden_size == 48 == summary["hidden_size"]
    assert student.num_parameters() == summary["parameters"]
    assert transformers.AutoTokenizer.from_pretrained(out / "student")("7+")["input_ids"] == [7, 10]
    assert (out / "student/generation_config.json").is_file()
    assert "license: apache-2.0" in (out / "student/README.md").read_text()
    said = capsys.readouterr().out
    assert "width 96 -> 48" in said and "GiB" in said and "held-out loss" in said

    written = (out / "summary.json").stat().st_mtime_ns
    assert red.main(words) == 0  # the same command again: reused, not done again
    assert (out / "summary.json").stat().st_mtime_ns == written
    assert red.main([*words, "--seed", "1", "--alpha", "0.5"]) == 2
    error = capsys.readouterr().err
    assert "alpha" in error and "seed" in error and error.count("\n") == 1
    assert (out / "summary.json").stat().st_mtime_ns == written
    assert red.main([*words, "--seed", "1", "--overwrite", "--steps", "0"]) == 0
    assert json.loads((out / "summary.json").read_text())["tokens"] == 0


def test_several_methods_share_one_summary_and_the_seed_decides(real, tmp_path):
    words = ["--model", f"{real}/teacher", "--data", f"{real}/data.txt", *SMALL]
    words += ["--methods", *red.METHODS, "lrc", "--temperature", *"111114"]
    results = []
    for out in (tmp_path / "a", tmp_path / "b"):
        assert red.main([*words, "--out", str(out)]) == 0
        results.append(json.loads((out / "summary.json").read_text()))
        results[-1] = {label: rows[0] for label, rows in results[-1].items()}
        for row in results[-1].values():
            row.pop("seconds", None)
            row.pop("teacher", None)
    assert results[0] == results[1]
    assert set(results[0]) == {"teacher", *red.METHODS, "lrc-T4"}
    assert (tmp_path / "a/lrc-T4/student/config.json").is_file()
    assert results[0]["red"]["singular_spread"] < results[0]["lrc"]["singular_spread"]


def compared(label, seed):
    """A row as `train_student` makes it, with numbers that tell where each is drawn."""
    offset = seed + 10 * red.METHODS.index(label.partition("-T")[0])
    curve = [{"step": step, "singular_values": [2 + offset, 1, 0.5],
              "held_out": {"loss": 3 + offset, "erank_normalised": [step, step + 2 * offset]}}
             for step in (0, 5, 10)]
    return {"recall": 0.5, "chains": [0.4 + seed] * 5, "erank_normalised": [7, 8], "curve": curve}


def test_the_picture_draws_each_seed_of_each_method_in_its_own_style(tmp_path, monkeypatch):
    drawn, written, named = [[] for _ in range(4)], [], []

    class Axes:
        def __init__(self, lines):
            self.lines, self.xaxis = lines, self

        def plot(self, x, y, style, label):
            self.lines.append((list(x), list(y), style, label))

        def __getattr__(self, name):  # set, get_major_locator, set_params
            return lambda *words, **more: self

        def get_legend_handles_labels(self):
            named.extend(label for *_, label in self.lines if label)
            return ()

    class Figure:
        def __init__(self, **words):
            self.axes = [Axes(lines) for lines in drawn]

        def subplots(self, *shape):
            return type("Grid", (), {"flat": self.axes})

        def legend(self, **words):
            pass

        def savefig(self, path):
            written.append(path)

    fake = type(sys)("matplotlib.figure")
    fake.Figure = Figure
    monkeypatch.setitem(sys.modules, "matplotlib", type(sys)("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", fake)
    teacher = {"recall": 1.0, "chains": [1.0] * 5, "erank_normalised": [9, 9]}
    rows = {"teacher": [teacher] * 2}
    rows |= {label: [compared(label, seed) for seed in (0, 1)] for label in ("red", "lrc", "lrc-T40")}
    red.picture(rows, tmp_path / "compare.png")
    assert written == [tmp_path / "compare.png"]
    accuracy, layers, ranks, values = drawn
    assert [len(panel) for panel in drawn] == [8, 8, 6, 6]  # the teacher is not in training
    assert named == ["lrc-T40", "lrc", "red", "teacher"]  # from the bottom to the top
    assert accuracy[4] == ([0, 1, 2, 3, 4, 5], [0.5] + [0.4] * 5, red.STYLES["red"] + "-", "red")
    assert accuracy[5][1] == [0.5] + [1.4] * 5 and accuracy[5][3] == ""  # a name once
    assert layers[2][:2] == ([1, 2], [7, 8])
    assert ranks[2] == ([0, 5, 10], [10, 15, 20], red.STYLES["lrc"] + "-", "lrc")
    assert values[0][1] == [[12, 0.5]] * 3 and values[0][2] == red.STYLES["lrc"] + ":"
    assert len({style[:2] for style in red.STYLES.values()}) == len(red.STYLES) == 6
    assert len({style[-1] for style in red.STYLES.values()}) == 6  # markers, for black and white
    for several in rows.values():
        for row in several:
            row.pop("chains", None)
    for panel in drawn:
        panel.clear()
    red.picture(rows, tmp_path / "compare.png")
    assert drawn[0][2][:2] == ([0, 5, 10], [13, 13, 13])  # the held-out loss instead


def test_without_matplotlib_one_line_says_so_and_the_text_remains(
    real, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words = ["--model", f"{real}/teacher", "--data", f"{real}/data.txt", *SMALL]
    words += ["--methods", "red", "lrc", "--measure-every", "1", "--out", f"{tmp_path}/run"]
    assert red.main(words) == 0
    said = capsys.readouterr().out
    assert said.count("pip install matplotlib") == 1
    assert not (tmp_path / "run/compare.png").exists()
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    for label in ("red", "lrc"):
        lines = (tmp_path / f"run/{label}/metrics.jsonl").read_text().splitlines()
        measured = [each for each in map(json.loads, lines) if "held_out" in each]
        assert [each["step"] for each in measured] == [0, 1, 2]
        for point, record in zip(summary[label][0]["curve"], measured, strict=True):
            assert point == {name: record[name] for name in point} and len(point) == 3
            rank = sum(record["held_out"]["erank_normalised"]) / 3
            values = record["singular_values"]
            text = f"step {record['step']}: mean eRank {rank:.0f}, singular values"
            assert f"{label:<12} {text} {values[2]:.2f} to {values[0]:.2f}" in said


def test_importance_and_calibration_data(real, tmp_path):
    words = ["--model", f"{real}/teacher", "--data", f"{real}/data.txt", *SMALL]
    words += ["--calibration_data", f"{real}/data.jsonl", "--importance", "variance"]
    assert red.main([*words, "--alignment", "plain", "--out", str(tmp_path / "a")]) == 0
    assert json.loads((tmp_path / "a/selection.json").read_text())["statistic"] == "variance"


def test_chat_data_goes_through_the_template():
    tokenizer = red.tiny_tokenizer()
    chat = {"messages": [{"role": "user", "content": "1+1=?"}]}
    with pytest.raises(red.UserError, match="template"):
        red.document_tokens(chat, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }};{% endfor %}"
    text = "".join(red.TINY_ALPHABET[i] for i in red.document_tokens(chat, tokenizer))
    assert text == "1+1=?;\n"


def test_packing_loses_nothing_but_the_last_row():
    tokenizer = red.tiny_tokenizer()
    documents = enumerate([{"text": "abc"}, {"text": "d"}, {"text": "efgh"}])
    batches = list(red.packed(documents, tokenizer, 1, 5))
    texts = ["".join(red.TINY_ALPHABET[i] for i in batch["input_ids"][0]) for batch in batches]
    assert texts == ["abc\nd", "\nefgh"] and batches[0]["position"] == {"place": 1, "held": [44]}


def bad_inputs():
    """name -> (arguments, with {dir} for a folder of bad files; a word of the sentence)."""
    model = ["--model", "{dir}/teacher", "--data", "{dir}/data.txt", "--out", "{dir}/out"]
    yield "ratio of zero", ["--ratio", "0"], "ratio"
    yield "ratio above one", ["--ratio", "1.5"], "ratio"
    yield "ratio not a number", ["--ratio", "half"], "ratio"
    yield "ratio nan", ["--ratio", "nan"], "ratio"
    yield "zero width", ["--hidden-size", "0"], "hidden-size"
    yield "both widths", ["--hidden-size", "8", "--ratio", "0.5"], "hidden-size"
    yield "wider than the teacher", [*model, "--hidden-size", "97"], "hidden-size"
    yield "negative steps", ["--steps", "-1"], "steps"
    yield "zero batch", ["--batch-size", "0"], "batch-size"
    yield "short sequence", ["--seq-len", "1"], "seq-len"
    yield "learning rate", ["--learning-rate", "-1"], "learning-rate"
    yield "infinite learning rate", ["--learning-rate", "inf"], "learning-rate"
    yield "temperature", ["--temperature", "0"], "temperature"
    yield "temperatures", ["--methods", "red", "--temperature", "1", "2"], "temperature"
    yield "alpha", ["--alpha", "-0.1"], "alpha"
    yield "one calibration sample", ["--calibration-samples", "1"], "calibration-samples"
    yield "unknown flag", ["--frobnicate"], "frobnicate"
    yield "abbreviated flag", ["--rat", "0.5"], "--rat"
    yield "stray word", ["train"], "train"
    yield "unknown method", ["--methods", "magic"], "magic"
    yield "twice the same method", ["--methods", "lrc", "lrc"], "twice"
    yield "data without a model", ["--data", "x.txt"], "--model"
    yield "gsm8k without a model", ["--eval", "gsm8k"], "--model"
    yield "unknown device", ["--device", "abacus"], "abacus"
    yield "device not there", ["--device", "cuda:99"], "cuda:99"
    yield "no folder", ["--model", "{dir}/nothing"], "nothing"
    yield "hub out of reach", ["--model", "nobody/nothing"], "nobody/nothing"
    yield "folder without config", ["--model", "{dir}"], "config.json"
    yield "unsupported model", ["--model", "{dir}/gpt2"], "gpt2"
    yield "mixture of experts", ["--model", "{dir}/mixtral"], "mixtral"
    yield "quantised model", ["--model", "{dir}/quantised"], "quantised"
    yield "broken config", ["--model", "{dir}/broken"], "config"
    yield "truncated weights", [*model, "--model", "{dir}/truncated"], "weights"
    yield "no weights", [*model, "--model", "{dir}/weightless"], "weights"
    for name, word in {
        "missing.txt": "no file", "empty.txt": "empty", "binary.txt": "binary.txt",
        "broken.jsonl": "broken.jsonl", "broken.parquet": "broken.parquet",
        "fields.jsonl": "fields", "short.txt": "short", "data.csv": ".jsonl",
        "numbers.jsonl": "numbers.jsonl",
    }.items():  # fmt: skip
        yield f"data {name}", [*model, "--data", "{dir}/" + name], word
    yield "data out of reach", [*model, "--data", "nobody/nothing"], "--data"
    yield "calibration too short", [*model, "--calibration-data", "{dir}/short.txt"], "short"
    gsm8k = [*model, "--eval", "gsm8k", "--eval-shots-data", "{dir}/numbers.jsonl"]
    yield "no GSM8K", [*gsm8k, "--eval-data", "{dir}/numbers.jsonl"], "question"
    yield "benchmark of nothing", ["--benchmark"], "--model"
    yield "benchmark of gpt2", ["--benchmark-config", "{dir}/gpt2/config.json"], "gpt2"
    yield "chains need digits", [*model, "--model", "{dir}/words", "--eval", "chains"], "chains"
    yield "out is a file", [*model, "--out", "{dir}/data.txt"], "is a file"
    yield "out is a stranger's", [*model, "--out", "{dir}", "--overwrite"], "RED"


@pytest.fixture(scope="module")
def bad(tmp_path_factory, real):
    folder = tmp_path_factory.mktemp("bad")
    for name in ("teacher", "truncated", "weightless", "words"):
        shutil.copytree(real / "teacher", folder / name)
    weights = folder / "truncated/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (folder / "weightless/model.safetensors").unlink()
    vocabulary = (folder / "words/tokenizer.json").read_text().replace('"7"', '"seven"')
    (folder / "words/tokenizer.json").write_text(vocabulary)
    config = json.loads((folder / "teacher/config.json").read_text())
    for name, change in {
        "gpt2": {"model_type": "gpt2"},
        "mixtral": {"model_type": "mixtral"},
        "quantised": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    }.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config | change))
    (folder / "broken").mkdir()
    (folder / "broken/config.json").write_text("{")
    (folder / "data.txt").write_bytes((real / "data.txt").read_bytes())
    (folder / "data.csv").write_text("text\nhello\n")
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 40)
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n' * 30)
    (folder / "broken.parquet").write_bytes(b"PAR1 nonsense PAR1")
    (folder / "numbers.jsonl").write_text('{"text": 123}\n' * 30)
    (folder / "fields.jsonl").write_text('{"body": "1+1"}\n' * 30)
    (folder / "short.txt").write_text("1+1\n\n2+2")
    return folder


@pytest.mark.parametrize("name, words, expected", [pytest.param(*c, id=c[0]) for c in bad_inputs()])
def test_bad_input_gets_one_sentence(bad, name, words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(bad.rglob("*"))
    words = [word.replace("{dir}", str(bad)) for word in words]
    assert red.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("red.py: ") and said.count("\n") == 1 and said.endswith(".\n"), said
    assert expected in said and "Traceback" not in said
    assert sorted(bad.rglob("*")) == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize("text, word", [("{", "tiny_config"), ('{"model_type": "gpt2"}', "model_type"),
    ('{"model_type": "llama", "vocab_size": 7}', "vocab_size"), ("[]", "tiny_config"),
    ('{"model_type": "llama", "vocab_size": 45, "hidden_size": "x"}', "tiny_config")])  # fmt: skip
def test_a_broken_tiny_config_gets_one_sentence(text, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(red, "TINY_CONFIG", tmp_path / "tiny_config.json")
    red.TINY_CONFIG.write_text(text)
    assert red.main([]) == 2
    said = capsys.readouterr().err
    assert word in said and said.count("\n") == 1


def test_the_program_itself_exits_with_2_and_no_traceback(tmp_path):
    command = [sys.executable, str(Path(red.__file__)), "--ratio", "7"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr == "red.py: --ratio must lie in (0, 1], got 7.\n"


# What a careful reader found ----------------------------------------------------------------------


def test_padding_counts_in_no_loss_even_where_it_is_labelled():
    teacher = make_teacher()
    results = []
    for filler in (5, 6):
        batch = make_batch()
        batch["attention_mask"] = torch.ones(3, 12, dtype=torch.long)
        batch["attention_mask"][:, 8:] = 0
        batch["input_ids"][:, 8:] = filler
        batch["labels"] = batch["input_ids"].clone()
        student, _ = make_student(teacher)
        totals = red.training_step(teacher, student, [batch])
        results.append([*map(float, totals.values()), red.evaluate(teacher, [batch])["loss"]])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_a_stream_that_ends_early_is_no_training():
    teacher = make_teacher()
    student, _ = make_student(teacher)
    with pytest.raises(ValueError, match="ended"):
        red.distill(teacher, student, iter([make_batch()]), 3, 1e-3)


def edit_weights(folder, change):
    """Rewrite a checkpoint's tensors by `change`, a function of the dict of them."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_checkpoint_without_one_matrix_is_refused(real, tmp_path, capsys):
    shutil.copytree(real / "teacher", tmp_path, dirs_exist_ok=True)
    edit_weights(tmp_path, lambda w: w.pop("model.layers.1.mlp.down_proj.weight"))
    words = ["--model", str(tmp_path), "--data", f"{real}/data.txt"]
    assert red.main(words) == 2
    assert "down_proj" in capsys.readouterr().err


def test_a_file_with_two_matrices_is_not_tied_whatever_its_config_says(real, tmp_path):
    shutil.copytree(real / "teacher", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    teacher, _ = red.load_teacher(str(tmp_path))
    batch = make_batch()
    batch["input_ids"] %= 45
    batches = [{"input_ids": batch["input_ids"]}] * 2
    student = red.new_student("red", teacher, 96, red.calibrate(teacher, batches, 96))
    torch.testing.assert_close(logits(student.model, batch), logits(teacher, batch))


def task_of(real, *words):
    config = red.parse_arguments(["--model", f"{real}/teacher", *words])
    return red.text_task(config, *red.load_teacher(config.model))


def test_held_out_calibration_and_training_text(real):
    """Calibration on the training data itself never sees the held-out part; batches are full."""
    data = f"{real}/data.jsonl"
    words = ["--data", data, "--calibration-data", data, "--seq-len", "64", "--batch-size", "7"]
    task = task_of(real, *words)
    assert task.calibration and task.held_out
    held_out = {tuple(row) for batch in task.held_out for row in batch["input_ids"].tolist()}
    calibration = {tuple(row) for batch in task.calibration for row in batch["input_ids"].tolist()}
    assert not held_out & calibration
    batches = [batch["input_ids"] for _, batch in zip(range(80), task.stream())]  # over an epoch
    assert {batch.shape for batch in batches} == {(7, 64)}
    again = [batch["input_ids"] for _, batch in zip(range(80), task.stream())]
    assert all(torch.equal(*pair) for pair in zip(batches, again))


def test_data_that_breaks_halfway_gets_one_sentence(real, tmp_path):
    class Breaks:
        def __iter__(self):
            yield {"text": "1+1"}
            raise ConnectionError("the hub went away\nwith a long story")

    with pytest.raises(red.UserError, match="the hub went away"):
        list(red.readable(Breaks(), "somewhere"))


def test_a_strangers_teacher_folder_is_never_touched(tmp_path, capsys):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/precious.txt").write_text("mine")
    assert red.main(["--out", str(tmp_path), "--overwrite"]) == 2
    assert (tmp_path / "teacher/precious.txt").read_text() == "mine"
    assert red.main(["--out", str(tmp_path / "teacher/precious.txt/below")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_an_interrupted_overwrite_never_passes_for_finished(tmp_path, monkeypatch):
    words = ["--methods", "red", "--out", str(tmp_path / "out")]
    before = red.parse_arguments(words)
    red.prepare(before)
    (tmp_path / "out/summary.json").write_text("{}")
    assert red.claim(before)
    monkeypatch.setattr(red, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        red.prepare(red.parse_arguments([*words, "--seed", "1", "--overwrite"]))
    assert not red.claim(before)


def test_temperature_alone_compares_the_two_methods():
    config = red.parse_arguments(["--temperature", "2"])
    assert config.methods == ["red", "lrc"] and config.temperature == [2, 2]


# Long runs ----------------------------------------------------------------------------------------


def forked(words, until=None, number=signal.SIGKILL):
    """Run a command line in a process of its own; send it a signal once `until()` holds."""

    def work():
        # By default all forks share tqdm's lock: one that is killed inside it would stop the others.
        red.tqdm.set_lock(threading.RLock())
        sys.exit(red.main(words))

    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    while until and process.is_alive() and not until():
        time.sleep(0.002)
    if until:
        os.kill(process.pid, number)
    process.join(60)
    return process.exitcode


LONG = "--steps 24 --batch-size 2 --seq-len 32 --calibration-samples 4 --device cpu".split()
LONG += "--save-every 5 --measure-every 8".split()


def same_finish(a, b):
    for name in ("student/model.safetensors", "checkpoints/step-0000024/student.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    results = [[json.loads(line) for line in open(each / "metrics.jsonl")] for each in (a, b)]
    for record in itertools.chain(*results):
        for key in ("seconds", "tokens_per_second", "memory"):
            record.pop(key, None)
    assert results[0] == results[1] and [each["step"] for each in results[0]] == list(range(25))


@pytest.fixture(scope="module")
def uninterrupted(real, tmp_path_factory):
    """The words of a run without --out, over the end of its short data, and its finished folder."""
    data = tmp_path_factory.mktemp("long") / "data.jsonl"
    data.write_text("\n".join((real / "data.jsonl").read_text().splitlines()[:20]))
    words = ["--model", f"{real}/teacher", "--data", str(data), "--methods", "lrc", *LONG]
    assert red.main([*words, "--out", str(data.parent / "whole")]) == 0
    return words, data.parent / "whole"


def steps_written(out):
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") - 1 if path.exists() else -1


def test_killed_at_any_point_it_goes_on_to_the_same_bits(uninterrupted, tmp_path):
    words, whole = uninterrupted
    words = [*words, "--out", str(tmp_path / "out")]
    for kill_after in (3, 7, 16):
        code = forked(words, lambda: steps_written(tmp_path / "out") >= kill_after)
        assert code == -signal.SIGKILL
        for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines():
            json.loads(line)
    assert forked(words) == 0
    same_finish(whole, tmp_path / "out")
    kept = sorted(path.name for path in (tmp_path / "out/checkpoints").iterdir())
    assert kept == ["step-0000020", "step-0000024"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_of_the_very_step(uninterrupted, tmp_path, number):
    words, whole = uninterrupted
    words = [*words, "--out", str(tmp_path / "out")]
    assert forked(words, lambda: steps_written(tmp_path / "out") >= 2, number) == 130
    (checkpoint,) = (tmp_path / "out/checkpoints").iterdir()
    last = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert checkpoint.name == f"step-{last:07}"
    assert forked(words) == 0
    same_finish(whole, tmp_path / "out")


@pytest.mark.parametrize("file", ["student.safetensors", "state.pt", "digests.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    uninterrupted, tmp_path, file, capfd
):
    words, whole = uninterrupted
    out = tmp_path / "out"
    words = [*words, "--out", str(out)]
    assert forked(words, lambda: (out / "checkpoints/step-0000010").exists(), signal.SIGKILL)
    newest = max((out / "checkpoints").glob("step-*[0-9]"))
    content = bytearray((newest / file).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / file).write_bytes(content)
    assert forked(words) == 0
    said = capfd.readouterr().out
    assert f"{newest} is damaged" in said and said.count("going on from") == 1
    same_finish(whole, out)


def test_a_checkpoint_of_other_settings_is_refused_by_name(uninterrupted, tmp_path, capsys):
    words, _ = uninterrupted
    out = tmp_path / "out"
    forked([*words, "--out", str(out)], lambda: steps_written(out) >= 6)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert red.main([*words, "--out", str(out), "--alpha", "0.5", "--learning-rate", "0.1"]) == 2
    said = capsys.readouterr().err
    assert "alpha" in said and "learning_rate" in said and said.count("\n") == 1
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_full_disk_is_one_sentence_and_loses_nothing(uninterrupted, tmp_path):
    words, whole = uninterrupted
    out = tmp_path / "out"
    forked([*words, "--out", str(out)], lambda: (out / "checkpoints/step-0000005").exists())
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
    command = [sys.executable, "-c", f"{limit} import red; sys.exit(red.main(sys.argv[1:]))"]
    ended = subprocess.run([*command, *words, "--out", str(out)], capture_output=True, text=True,
                           cwd=Path(red.__file__).parent)  # fmt: skip
    said = ended.stderr.replace("\r", "\n").splitlines()[-1].strip()
    assert ended.returncode == 1 and said.startswith("red.py: ") and "Traceback" not in ended.stderr
    assert not list(out.rglob("*.partial"))
    assert forked([*words, "--out", str(out)]) == 0
    same_finish(whole, out)


def uneven_batches():
    """Four batches with different numbers of labels and, in one, padding."""
    batches = [make_batch(2, seed=seed) for seed in range(4)]
    batches[0]["labels"][0, :9] = -100
    batches[3]["attention_mask"] = torch.ones(2, 12, dtype=torch.long)
    batches[3]["attention_mask"][1, 6:] = 0
    return batches


def one_of_two(rank, folder):
    """What each of two processes does: half of the batches, and its share of every measure."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    teacher = make_teacher(dtype=torch.float64)
    student, calibration = make_student(teacher)
    batches = uneven_batches()
    losses = red.training_step(teacher, student, batches[rank::2], 2.0, 0.3, calibration.scales, 0.1)
    words = red.generate(make_world_model(), red.tiny_tokenizer(), ["1+1=?", "2", "abcd:"], 4)
    result = {"losses": losses, "gradients": [p.grad for p in student.parameters()], "words": words}
    torch.save(result | {"measures": red.evaluate(teacher, batches)}, folder / f"{rank}.pt")


def make_world_model():
    return red.tiny_teacher(red.read_config() | {"hidden_size": 32, "head_dim": 8}, 0, "cpu", steps=3)


def test_two_processes_are_one_on_the_whole_batch(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=one_of_two, args=(rank, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    teacher = make_teacher(dtype=torch.float64)
    student, calibration = make_student(teacher)
    losses = red.training_step(teacher, student, uneven_batches(), 2.0, 0.3, calibration.scales, 0.1)
    words = red.generate(make_world_model(), red.tiny_tokenizer(), ["1+1=?", "2", "abcd:"], 4)
    for rank in (0, 1):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert result["words"] == words
        for name, value in losses.items():
            torch.testing.assert_close(result["losses"][name], value)
        for got, parameter in zip(result["gradients"], student.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad, rtol=1e-9, atol=1e-12)
        for name, value in red.evaluate(teacher, uneven_batches()).items():
            assert result["measures"][name] == pytest.approx(value, rel=1e-9)


def test_torchrun_trains_resumes_and_measures_like_one_process(real, tmp_path):
    """Tiny-world lines, where two processes read just what one with twice the batch reads."""
    words = ["--model", f"{real}/teacher", "--eval", "chains", "--steps", "4", "--seq-len", "32"]
    words += ["--calibration-samples", "4", "--device", "cpu", "--methods", "red"]
    assert red.main([*words, "--batch-size", "2", "--grad-accum", "2", "--out", f"{tmp_path}/one"]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(random.SystemRandom().randrange(20000, 60000)), red.__file__]
    command += [*words, "--batch-size", "2", "--out", f"{tmp_path}/two"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("training ") == 1  # one process speaks
    one, two = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "two"))
    for key in ("loss", "erank", "recall", "chains", "tokens", "labels"):
        assert one[key] == pytest.approx(two[key], rel=1e-4), key
    lines = [(tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("one", "two")]
    for left, right in zip(*[map(json.loads, each) for each in lines], strict=True):
        for key in {"step", "tokens", "loss", "kl", "alignment", "gradient_norm"} & left.keys():
            assert left[key] == pytest.approx(right[key], rel=1e-4), key


def test_each_process_reads_its_own_documents_and_together_all(real, monkeypatch):
    task = task_of(real, "--data", f"{real}/data.jsonl", "--seq-len", "40", "--batch-size", "1")
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr(red, "rank_and_world", lambda: (rank, 2))
        batches = list(itertools.takewhile(lambda b: b["position"]["place"][0] == 0, task.stream()))
        tail = batches[-1]["position"]["held"]
        tokens = [token for batch in batches for token in batch["input_ids"][0].tolist()] + tail
        text = "".join(red.TINY_ALPHABET[i] for i in tokens)
        seen.append(set(re.findall(r"[^: ]*#\d", text)))
    assert seen[0] and seen[1] and len(seen[0] & seen[1]) < 10


@pytest.mark.parametrize("tiny", [True, False])
def test_a_stream_goes_on_from_any_of_its_positions(real, tiny):
    words = ["--seq-len", "40", "--batch-size", "3", *(["--eval", "chains"] if tiny else [])]
    config = red.parse_arguments(["--model", f"{real}/teacher", *words, *(
        [] if tiny else ["--data", f"{real}/data.parquet"])])  # fmt: skip
    task = (red.tiny_task if tiny else red.text_task)(config, *red.load_teacher(config.model))
    whole = list(itertools.islice(task.stream(), 150))
    for i in (0, 3, 80, 148):
        position = json.loads(json.dumps(whole[i]["position"]))
        rest = list(itertools.islice(red.ahead(task.stream(position)), 149 - i))
        for a, b in zip(whole[i + 1 :], rest, strict=True):
            assert torch.equal(a["input_ids"], b["input_ids"]) and a["position"] == b["position"]


# Many seeds, finished checkpoints, the benchmark --------------------------------------------------


def test_seeds_are_compared_by_mean_and_deviation(real, tmp_path, capsys):
    words = ["--model", f"{real}/teacher", "--data", f"{real}/data.txt", *SMALL, "--seeds", "2"]
    words += ["--methods", "red", "lrc", "--learning-rate", "1e-3", "1e-2", "--out", str(tmp_path)]
    assert red.main(words) == 0
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert [len(each) for each in rows.values()] == [2, 2, 2]
    assert [row["learning_rate"] for row in rows["red"] + rows["lrc"]] == [1e-3, 1e-3, 1e-2, 1e-2]
    losses = [row["loss"] for row in rows["lrc"]]
    mean, deviation = sum(losses) / 2, abs(losses[0] - losses[1]) / math.sqrt(2)
    assert losses[0] != losses[1] and f"{mean:.3f}±{deviation:.3f}" in capsys.readouterr().out
    first = (tmp_path / "seed-1/lrc/summary.json").stat().st_mtime_ns
    assert red.main([*words, "--seeds", "3"]) == 0  # one more seed: two are reused
    assert (tmp_path / "seed-1/lrc/summary.json").stat().st_mtime_ns == first
    assert len(json.loads((tmp_path / "summary.json").read_text())["red"]) == 3


def test_an_overwrite_readies_every_folder_before_the_first_student(real, tmp_path, monkeypatch):
    words = ["--model", f"{real}/teacher", "--data", f"{real}/data.txt", *SMALL, "--seeds", "2"]
    words += ["--out", str(tmp_path)]
    assert red.main(words) == 0
    monkeypatch.setattr(red, "train_student", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert red.main([*words, "--alpha", "0.5", "--overwrite"]) == 130
    assert not list(tmp_path.rglob("summary.json")) and not list(tmp_path.rglob("checkpoints"))


def test_eval_only_measures_what_the_run_measured(real, tmp_path):
    data = ["--data", f"{real}/data.txt", *SMALL]
    words = ["--model", f"{real}/teacher", *data, "--out", f"{tmp_path}/run"]
    assert red.main(words) == 0
    run = json.loads((tmp_path / "run/summary.json").read_text())
    words = ["--eval-only", f"{tmp_path}/run/student", "--model", f"{real}/teacher", *data]
    assert red.main([*words, "--out", f"{tmp_path}/eval"]) == 0
    rows = json.loads((tmp_path / "eval/summary.json").read_text())
    for row, expected in zip(rows.values(), (run["teacher"], run), strict=True):
        for key in ("loss", "erank", "parameters", "similarity"):
            assert row[0][key] == expected[key]


def test_similarity_of_tokens_by_hand():
    teacher, batch = make_teacher(), make_batch(1, 6)
    states = teacher(batch["input_ids"], output_hidden_states=True).hidden_states[1][0]
    cosines = torch.nn.functional.cosine_similarity(states[:, None], states[None], dim=-1)
    expected = (cosines.sum() - 6).item() / 30
    assert red.evaluate(teacher, [batch])["similarity"][0] == pytest.approx(expected, abs=1e-5)


def test_orthogonality_penalty_and_its_gradient():
    teacher = make_teacher(dtype=torch.float64)
    gradients, losses = [], []
    for weight in (0.0, 0.7):
        student, _ = make_student(teacher, method="lrc")
        losses.append(red.training_step(teacher, student, [make_batch()], orthogonality=weight)["loss"])
        gradients.append([each.grad for each in student.projections.values()])
    penalty = 0.0
    for plain, more, each in zip(*gradients, student.projections.values()):
        error = each.T @ each - torch.eye(16)
        penalty += error.square().sum().item()
        torch.testing.assert_close(more - plain, 0.7 * 4 * each @ error)
    assert (losses[1] - losses[0]).item() == pytest.approx(0.7 * penalty)


def test_the_benchmark_refuses_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert red.main(["--benchmark-config", str(red.TINY_CONFIG)]) == 2
    assert "torchrun" in capsys.readouterr().err


def test_the_benchmark_runs_and_ends_with_the_ratios(capsys):
    words = ["--benchmark-config", str(red.TINY_CONFIG), "--batch-size", "1", "--seq-len", "16"]
    assert red.main([*words, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "teacher forward" in said and "step / floor: " in said and "tokens a second" in said
