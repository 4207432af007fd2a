"""The method as its tests state it, on tiny models built here, in the order of red.py.

    python -m pytest -q test_red.py

What is expected is written out here by hand: no oracle takes a name or a formula from red.py.
"""

import contextlib
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
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # the hub out of reach, at once and everywhere
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # float32 on the CPU, also where there is a GPU

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import red

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)  # these models are too small to share

HERE = Path(red.__file__).parent
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
METHODS = ["red", "pca", "lrc", "orthogonal", "shared-orthogonal", "random-selection"]
ROTATED = ["pca", "orthogonal", "shared-orthogonal"]
NORMS = [
    "model.layers.0.input_layernorm",
    "model.layers.0.post_attention_layernorm",
    "model.layers.1.input_layernorm",
    "model.layers.1.post_attention_layernorm",
    "model.norm",
]
ATTENTION, FFN = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
SEVEN = [f"self_attn.{name}" for name in ATTENTION] + [f"mlp.{name}" for name in FFN]
LINEAR = [f"model.layers.{i}.{name}" for i in (0, 1) for name in SEVEN]


def make_teacher(family="llama", dtype=torch.float32, seed=0):
    """A random teacher in which every norm gain and bias differs from its usual 1 or 0."""
    torch.manual_seed(seed)
    kind, options = FAMILIES[family]
    teacher = AutoModelForCausalLM.from_config(kind(**SHAPE, **options), dtype=dtype)
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


SAMPLES = [make_batch(1, seed=s) for s in range(4)]


def make_student(teacher, hidden_size=16, method="red", seed=0):
    calibration = red.calibrate(teacher, SAMPLES, hidden_size)
    return red.new_student(method, teacher, hidden_size, calibration, seed), calibration


def shaken(student, size=0.05):
    """The student as after some training: no longer a selection, nor orthonormal."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
        student.make_weights()
    return student


def logits(model, batch):
    with torch.no_grad():
        return model(batch["input_ids"]).logits


def seen_by(model, names, batch):
    """(input, output) of the named modules, by name, from hooks of this file's own."""
    seen = {}

    def hook(name):
        return lambda module, inputs, output: seen.update({name: (inputs[0], output)})

    hooks = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    model(batch["input_ids"], attention_mask=batch.get("attention_mask"))
    for handle in hooks:
        handle.remove()
    return seen


def config_of(**settings):
    return red.Config(**{"steps": 100, "learning_rate": 1e-2} | settings)


def train(teacher, student, batches, config, scales=None, **options):
    return list(red.distill(teacher, student, iter(batches), config, scales, **options))


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
    for same in (hidden, 1e-20 * hidden, 1e20 * hidden, hidden.T, hidden.reshape(5, 8, 6)):
        assert red.effective_rank(same) == pytest.approx(expected, abs=1e-3)
    assert red.effective_rank(hidden.bfloat16()) == pytest.approx(expected, abs=0.2)
    with pytest.raises(ValueError):
        red.effective_rank(torch.tensor([[math.nan, 1.0]]))


def test_effective_rank_agrees_with_an_svd():
    hidden = torch.randn(300, 48) * torch.logspace(0, -6, 48)
    values = torch.linalg.svdvals(hidden.double())
    p = values / values.sum()
    expected = torch.exp(-(p * p.log()).sum()).item()
    assert red.effective_rank(hidden) == pytest.approx(expected, abs=1e-6)


# Looking inside a model -------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_modules_of_a_block_by_name(family):
    teacher = make_teacher(family)
    assert red.modules_of(teacher, red.NORMS) == NORMS
    assert sorted(red.modules_of(teacher, red.ALIGNED)) == sorted(LINEAR)
    heads = [] if "tied" in family else ["lm_head"]
    assert sorted(red.projected_matrices(teacher)) == sorted(
        ["model.embed_tokens", *LINEAR, *heads]
    )


def test_sums_over_tokens_stream():
    teacher, alive = make_teacher(), []

    def measure(name, before, after):
        return {name: before.sum(0), "all": after.sum()}

    def batches():
        for batch in SAMPLES:
            alive.append(batch)
            yield batch

    sums = red.token_sums(teacher, batches(), NORMS[:2], measure)
    assert len(alive) == 4 and sums["tokens"] == 48
    expected = [seen_by(teacher, NORMS[:2], batch) for batch in SAMPLES]
    total = sum(seen[NORMS[0]][0].double().flatten(0, 1).sum(0) for seen in expected)
    torch.testing.assert_close(sums[NORMS[0]], total, rtol=1e-5, atol=1e-6)
    everything = sum(seen[name][1].double().sum() for seen in expected for name in NORMS[:2])
    torch.testing.assert_close(sums["all"], everything, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError):
        red.token_sums(teacher, [], NORMS, measure)


# Calibration and selection ----------------------------------------------------------------------


def importance_by_hand(teacher, batch):
    """One channel at a time, in Python's own numbers."""
    total = [0.0] * 32
    for _, normed in seen_by(teacher, NORMS, batch).values():
        scores = []
        for channel in range(32):
            column = normed.flatten(0, 1).double()[:, channel].tolist()
            mean = sum(column) / len(column)
            scores.append(sum((x - mean) ** 2 for x in column) / len(column))
        total = [old + new / sum(scores) for old, new in zip(total, scores)]
    return torch.tensor(total, dtype=torch.float64)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_channel_importance_by_brute_force(family):
    teacher, batch = make_teacher(family), make_batch(4)
    rows = [{"input_ids": row[None]} for row in batch["input_ids"]]
    importance = red.calibrate(teacher, rows, 16).importance
    expected = importance_by_hand(teacher, batch)
    torch.testing.assert_close(importance, expected, rtol=1e-5, atol=1e-6)
    assert importance.sum().item() == pytest.approx(5)


def test_selection():
    channels = red.select_channels(torch.tensor([3.0, 1.0, 2.0, 3.0]), 3)
    assert channels.tolist() == [0, 2, 3]
    assert red.select_channels(torch.ones(5), 2).tolist() == [0, 1]
    selection = red.selection_matrix(channels, 4)
    assert torch.equal(torch.arange(4.0) @ selection, torch.tensor([0.0, 2.0, 3.0]))
    assert torch.equal(selection.T @ selection, torch.eye(3))
    for wrong in (0, 5):
        with pytest.raises(ValueError):
            red.select_channels(torch.ones(4), wrong)


def moment_by_hand(teacher, batches):
    """E[h h.T] over tokens and norm layers, each token h at RMS 1."""
    moment = torch.zeros(32, 32, dtype=torch.float64)
    for batch in batches:
        for stream, _ in seen_by(teacher, NORMS, batch).values():
            for h in stream.flatten(0, 1).double():
                h = h / (h.square().sum() / 32).sqrt()
                moment += torch.outer(h, h)
    return moment


def test_the_directions_of_pca_are_the_leading_eigenvectors_of_the_stream():
    teacher = make_teacher()
    calibration = red.calibrate(teacher, SAMPLES, 16)
    moment = moment_by_hand(teacher, SAMPLES)
    basis = calibration.bases["directions"].double()
    torch.testing.assert_close(basis.T @ basis, torch.eye(16).double(), rtol=0, atol=1e-5)
    values = torch.linalg.eigvalsh(moment).flip(0)
    torch.testing.assert_close(
        (basis.T @ moment @ basis).diagonal(), values[:16], rtol=1e-4, atol=1e-3
    )
    assert calibration.energy["directions"] == pytest.approx(
        (values[:16].sum() / values.sum()).item()
    )
    kept = red.select_channels(calibration.importance, 16)
    share = moment.diagonal()[kept].sum() / moment.trace()
    assert calibration.energy["channels"] == pytest.approx(share.item(), rel=1e-5)


def test_agreement_is_that_of_what_two_halves_choose():
    teacher = make_teacher()
    halves = [red.calibrate(teacher, SAMPLES[i : i + 2], 16) for i in (0, 2)]
    agreement = red.calibrate(teacher, SAMPLES, 16).agreement
    kept = [set(red.select_channels(half.importance, 16).tolist()) for half in halves]
    assert agreement["channels"] == pytest.approx(len(kept[0] & kept[1]) / 16)
    assert 0.3 < agreement["channels"] < 1
    bases = [half.bases["directions"].double() for half in halves]
    cosines = torch.linalg.svdvals(bases[0].T @ bases[1])  # of the principal angles
    assert agreement["directions"] == pytest.approx(cosines.square().mean().item(), rel=1e-4)
    same = red.calibrate(teacher, [SAMPLES[0], SAMPLES[0]], 16).agreement
    assert same == pytest.approx({"channels": 1.0, "directions": 1.0}, abs=1e-5)


def test_scales_are_the_mean_squares_of_the_seven_modules():
    teacher = make_teacher("llama-biases")
    scales = red.calibrate(teacher, SAMPLES, 16).scales
    outputs = [seen_by(teacher, LINEAR, batch) for batch in SAMPLES]
    for name in LINEAR:
        whole = torch.cat([seen[name][1] for seen in outputs])
        assert scales[name] == pytest.approx(whole.square().mean().item(), rel=1e-5), name
    assert set(scales) == set(LINEAR)


# The student ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["red", "pca", "shared-orthogonal", "random-selection"])
@pytest.mark.parametrize("family", FAMILIES)
def test_at_full_width_the_student_is_the_teacher(family, method):
    """A selection to the last bit, a rotation to rounding: tied heads, biases and gains too."""
    teacher = make_teacher(family, torch.float32 if method == "red" else torch.float64)
    student, _ = make_student(teacher, 32, method)
    batch = make_batch()
    tolerance = 1e-5 if method == "red" else 1e-4  # bases are of float32
    torch.testing.assert_close(
        logits(student.model, batch), logits(teacher, batch), rtol=tolerance, atol=10 * tolerance
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_start_the_weights_of_red_are_the_teachers_cut_out(family):
    teacher = make_teacher(family)
    student, calibration = make_student(teacher)
    kept = red.select_channels(calibration.importance, 16)
    original = dict(teacher.named_parameters())
    for name, weight in student.model.named_parameters():
        expected = original[name]
        if name.removesuffix(".weight") in NORMS:
            continue  # see below
        if name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias")):
            expected = expected[kept]
        elif expected.dim() == 2:
            expected = expected[:, kept]
        assert torch.equal(weight, expected), name
    for projection in student.projections.values():
        assert torch.equal(torch.linalg.svdvals(projection), torch.ones(16))


@pytest.mark.parametrize("method", METHODS)
def test_initial_gains_of_every_norm(method):
    """The teacher's on kept channels, 1 for rotations, times rms(kept) / rms(all); LRC has ones."""
    teacher = make_teacher("qwen2-tied")
    student, _ = make_student(teacher, method=method)
    basis = student.projections["model.embed_tokens"].detach()
    streams = [seen_by(teacher, NORMS, batch) for batch in SAMPLES]
    for name in NORMS:
        expected = torch.ones(16)
        if method not in ("lrc", "orthogonal"):
            h = torch.cat([seen[name][0].flatten(0, 1) for seen in streams])
            factor = (h @ basis).square().mean(-1).sqrt() / h.square().mean(-1).sqrt()
            if method not in ROTATED:
                expected = teacher.get_submodule(name).weight[basis.argmax(0)]
            expected = factor.mean() * expected
            assert not 0.999 < factor.mean() < 1.001
        torch.testing.assert_close(student.gains[name].detach(), expected, rtol=1e-4, atol=1e-5)


def test_where_projections_start():
    teacher = make_teacher()
    for method in METHODS:
        student, calibration = make_student(teacher, method=method)
        first, *others = student.projections.values()
        shared = all(torch.equal(first, other) for other in others)
        assert shared == (method not in ("lrc", "orthogonal")), method
        if method != "lrc":
            torch.testing.assert_close(first.T @ first, torch.eye(16), rtol=0, atol=1e-5)
        selects = bool(((first == 0) | (first == 1)).all())
        assert selects == (method in ("red", "random-selection")), method
        again, _ = make_student(teacher, method=method)
        assert torch.equal(again.projections["model.embed_tokens"], first)
        other, _ = make_student(teacher, method=method, seed=1)
        same = torch.equal(other.projections["model.embed_tokens"], first)
        assert same == (method in ("red", "pca")), method
    corners = []
    for seed in range(20):  # uniform over all bases: no entry has a sign of its own
        student, _ = make_student(teacher, method="shared-orthogonal", seed=seed)
        corners.append(student.projections["lm_head"][0, 0].item() > 0)
    assert 3 < sum(corners) < 17


def test_lrc_starts_at_the_scale_that_it_has_at_its_own_width():
    kind = LlamaConfig(**SHAPE | dict(hidden_size=512, num_hidden_layers=1))
    teacher = AutoModelForCausalLM.from_config(kind).eval().requires_grad_(False)
    student, _ = make_student(teacher, 256, "lrc")
    for projection in student.projections.values():
        diagonal = (projection.T @ projection).diagonal().mean()
        assert diagonal.item() == pytest.approx(3072 * 0.02**2, rel=0.02)
        assert projection.mean().abs() < 0.001


class Projected(torch.nn.Module):
    """One matrix applied as the paper writes it: the teacher's, with its projection around it."""

    def __init__(self, layer, projection, writes=False, gain=None):
        super().__init__()
        self.layer, self.projection, self.writes, self.gain = layer, projection, writes, gain

    def forward(self, x):
        if self.writes:
            return self.layer(x) @ self.projection
        wide = x @ self.projection.T
        return self.layer(wide if self.gain is None else wide * self.gain)


def wrap_in_projections(student, teacher, rotated):
    """Put the teacher's modules, each in its projection, into the student's model."""
    embedding = student.projections["model.embed_tokens"]
    parts = {"model.embed_tokens": Projected(teacher.model.embed_tokens, embedding, True)}
    head = student.projections.get("lm_head", embedding)
    parts["lm_head"] = Projected(
        teacher.lm_head, head, gain=teacher.model.norm.weight if rotated else None
    )
    for name in LINEAR:
        block, kind = ".".join(name.split(".")[:3]), name.split(".")[-1]
        norm = "input_layernorm" if kind in ATTENTION else "post_attention_layernorm"
        gain = teacher.get_submodule(f"{block}.{norm}").weight if rotated else None
        writes = kind in ("o_proj", "down_proj")
        layer = teacher.get_submodule(name)
        parts[name] = Projected(layer, student.projections[name], writes, None if writes else gain)
    for name, module in parts.items():
        student.model.set_submodule(name, module)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_merged_equals_projected_and_exported_equals_merged(family, method, tmp_path):
    teacher = make_teacher(family)
    student = shaken(make_student(teacher, method=method)[0])
    batch = make_batch()
    merged = logits(student.model, batch)
    student.model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(reloaded, batch), merged, rtol=0, atol=0)
    tied = "tied" in family and method not in ROTATED
    assert reloaded.config.tie_word_embeddings == tied == ("lm_head" not in student.projections)

    wrap_in_projections(student, teacher, method in ROTATED)
    torch.testing.assert_close(logits(student.model, batch), merged, rtol=1e-4, atol=1e-4)


def test_the_padding_token_is_a_token_like_any_other():
    """transformers would keep its row of the embedding from any gradient."""
    student, _ = make_student(make_teacher())
    ids = torch.full((1, 4), SHAPE["pad_token_id"])
    student.model(ids).logits.sum().backward()
    assert student.model.model.embed_tokens.weight.grad[ids[0, 0]].abs().min() > 0


def test_a_rotated_student_with_a_tied_head_is_refused():
    teacher = make_teacher("llama-tied")
    student, calibration = make_student(teacher)
    with pytest.raises(ValueError, match="head of its own"):
        red.initial_student("pca", teacher, student.model, calibration)


def test_a_student_has_an_ordinary_config(tmp_path):
    teacher = make_teacher("llama-odd-head")
    teacher.config.quantization_config = {"quant_method": "gguf"}
    student, _ = make_student(teacher)
    student.model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    original = teacher.config.to_dict()
    assert stored["hidden_size"] == 16 and stored["head_dim"] == 10
    assert "quantization_config" not in stored and not set(stored) - set(original)
    changed = {key for key in stored if stored[key] != original[key]}
    assert changed <= {"hidden_size", "architectures", "dtype"}
    assert not list(tmp_path.glob("*.py"))


def test_a_student_of_wrong_shapes_is_refused():
    teacher = make_teacher()
    student, _ = make_student(teacher)
    gains = {name: gain[:-1] for name, gain in student.gains.items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        red.ProjectedStudent(teacher, student.model, student.projections, gains)


def test_nearest_width_obeys_the_family():
    llama, mistral = make_teacher().config, make_teacher("mistral").config
    for family, wanted, given in ((llama, 15, 16), (llama, 14, 16), (mistral, 15, 15)):
        assert red.student_width(wanted / 32, family) == given
    assert red.student_width(1.0, llama) == 32
    with pytest.raises(red.UserError):
        red.student_width(0.01, llama)


# Losses -----------------------------------------------------------------------------------------


def losses_by_hand(hidden, head, teacher_hidden, teacher_head, labels, temperature):
    """KL and cross-entropy written out in float64, one token at a time."""
    kl, cross_entropy, count = 0.0, 0.0, 0
    for row in range(labels.shape[0]):
        for position in range(labels.shape[1] - 1):
            label = labels[row, position + 1]
            if label == -100:
                continue
            q = hidden[row, position].double() @ head.double().T
            p = teacher_hidden[row, position].double() @ teacher_head.double().T
            log_q, log_p = (q / temperature).log_softmax(-1), (p / temperature).log_softmax(-1)
            kl = kl + temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
            cross_entropy = cross_entropy - q.log_softmax(-1)[label]
            count += 1
    return kl / count, cross_entropy / count


def random_tensors(*sizes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]


@pytest.mark.parametrize("temperature", [1.0, 40.0])
@pytest.mark.parametrize("chunk", [2, 1000])
def test_distillation_loss_and_its_gradient(temperature, chunk, monkeypatch):
    tensors = random_tensors((2, 7, 8), (30, 8), (2, 7, 16), (30, 16))
    labels = torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(0))
    labels[0, :3] = -100
    labels[1, 5] = -100
    monkeypatch.setattr(red.ChunkedDistillation, "logits_at_once", 30 * chunk)
    hidden, head = tensors[0].requires_grad_(), tensors[1].requires_grad_()
    loss, kl, cross_entropy = red.distillation_loss(*tensors, labels, temperature)
    expected = losses_by_hand(*tensors, labels, temperature)
    torch.testing.assert_close((kl, cross_entropy), tuple(term.detach() for term in expected))
    torch.testing.assert_close(loss, kl + cross_entropy)
    got = torch.autograd.grad(3 * loss, (hidden, head))
    torch.testing.assert_close(got, torch.autograd.grad(3 * sum(expected), (hidden, head)))


def test_distillation_loss_without_any_label_is_zero():
    hidden, head = torch.randn(1, 4, 8, requires_grad=True), torch.randn(30, 8)
    nothing = torch.full((1, 4), -100)
    loss, *_ = red.distillation_loss(hidden, head, hidden.detach(), head, nothing, 1.0)
    loss.backward()
    assert loss.item() == 0 and hidden.grad.abs().max() == 0


def test_alignment_loss():
    student, narrow, wide, projection = random_tensors((2, 5, 6), (2, 5, 6), (2, 5, 9), (9, 6))
    plain = sum((student[0] - narrow[0]).square().flatten().tolist()) / 30
    assert red.alignment_loss(student[:1], narrow[:1]).item() == pytest.approx(plain)
    projection.requires_grad_()
    loss = red.alignment_loss(student, wide, projection)
    assert loss.item() == pytest.approx((student - wide @ projection).square().mean().item())
    loss.backward()
    assert projection.grad.abs().min() > 0  # the projection itself learns from its own target
    same = narrow.clone().requires_grad_()
    red.alignment_loss(same, narrow).backward()
    assert (same.grad == 0).all()  # where student and teacher agree, as they do at ratio 1


def test_alignment_of_many_millions_of_numbers_is_right_to_a_ten_thousandth():
    student = torch.randn(2, 2048, 8192, generator=torch.Generator().manual_seed(0))
    exact = (
        sum(row.double().square().sum().item() for row in student.flatten(0, 1)) / student.numel()
    )
    loss = red.alignment_loss(student, torch.zeros(1).expand_as(student))
    assert loss.item() == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_losses_of_low_precision_are_those_of_high_precision(dtype, tolerance, monkeypatch):
    """Over many chunks, too, of which the head's gradient is the sum."""
    monkeypatch.setattr(red.ChunkedDistillation, "logits_at_once", 30 * 8)
    sizes = (2, 65, 16), (30, 16), (2, 65, 32), (30, 32)
    tensors = random_tensors(*sizes, dtype=torch.float32)
    labels = torch.randint(0, 30, (2, 65), generator=torch.Generator().manual_seed(0))
    found = []
    for precision in (dtype, torch.float64):
        inputs = [tensor.to(dtype).detach().to(precision).requires_grad_() for tensor in tensors]
        hidden, head, *others = inputs
        loss, *_ = red.distillation_loss(hidden, head, *others, labels, 2.0)
        loss = loss + red.alignment_loss(hidden, others[0][..., :16])
        found.append([loss, *torch.autograd.grad(loss, (hidden, head))])
    for got, expected in zip(*found):
        assert (got.double() - expected).norm() < tolerance * expected.norm()


# One step, and the loop -------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["red", "pca"])
def test_gradients_reach_every_projection_and_gain_and_nothing_else(family, method):
    teacher = make_teacher(family)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student, calibration = make_student(teacher, method=method)
    start = [parameter.detach().clone() for parameter in student.parameters()]
    batches = [make_batch(seed=s) for s in range(3)]
    train(teacher, student, batches, config_of(steps=3), calibration.scales)
    matrices = 1 + len(LINEAR) + ("tied" not in family or method == "pca")
    assert len(start) == matrices + len(NORMS)
    for old, new in zip(start, student.parameters()):
        assert (old != new).any()
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in teacher.parameters())


def merged_by_hand(teacher, student, rotated):
    """The student's weights written out name by name, differentiable in what it trains."""
    old, made = dict(teacher.named_parameters()), {}
    for name in LINEAR:
        block, kind = ".".join(name.split(".")[:3]), name.split(".")[-1]
        weight, bias = old[f"{name}.weight"], old.get(f"{name}.bias")
        projection = student.projections[name]
        if kind in ("o_proj", "down_proj"):
            made[f"{name}.weight"] = projection.T @ weight
            bias = None if bias is None else projection.T @ bias
        else:
            norm = "input_layernorm" if kind in ATTENTION else "post_attention_layernorm"
            gain = old[f"{block}.{norm}.weight"] if rotated else torch.ones(32)
            made[f"{name}.weight"] = (weight * gain) @ projection
        if bias is not None:
            made[f"{name}.bias"] = bias
    for name in NORMS:
        made[f"{name}.weight"] = student.gains[name]
    for name in old:
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            made[name] = old[name]
    embedding = teacher.model.embed_tokens.weight
    made["model.embed_tokens.weight"] = embedding @ student.projections["model.embed_tokens"]
    if "lm_head" in student.projections:
        gain = teacher.model.norm.weight if rotated else torch.ones(32)
        head = teacher.lm_head.weight * gain
        made["lm_head.weight"] = head @ student.projections["lm_head"]
    return made


def loss_by_hand(teacher, student, batch, temperature, alpha, scales, rotated):
    """The whole loss of a step by plain autograd, through weights merged by hand."""
    inputs = {"input_ids": batch["input_ids"]}
    goal = teacher(**inputs).logits
    wanted = seen_by(teacher, LINEAR, batch)
    seen, hooks = {}, []

    def hook(name):
        return lambda module, inputs, output: seen.update({name: output})

    for name in LINEAR:
        hooks.append(student.model.get_submodule(name).register_forward_hook(hook(name)))
    weights = merged_by_hand(teacher, student, rotated)
    assert set(weights) == set(dict(student.model.named_parameters()))
    output = torch.func.functional_call(student.model, weights, kwargs=inputs).logits
    for handle in hooks:
        handle.remove()
    one = torch.eye(60, dtype=torch.float64)
    kl, cross_entropy = losses_by_hand(output, one, goal, one, batch["labels"], temperature)
    alignment = 0.0
    for name in LINEAR:
        target = wanted[name][1]
        if name.endswith(("o_proj", "down_proj")):
            target = target @ student.projections[name]
        error = (seen[name] - target).square().mean()
        alignment = alignment + error / (scales[name] if scales else 1)
    loss = kl + cross_entropy + alpha * alignment
    return {"loss": loss, "kl": kl, "cross_entropy": cross_entropy, "alignment": alignment}


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("family", ["llama-biases", "qwen3", "qwen2-tied"])
@pytest.mark.parametrize("method", ["red", "pca", "orthogonal"])
def test_the_steps_gradients_are_those_of_the_formulas(family, method, relative):
    """One step against plain autograd, in float64."""
    teacher = make_teacher(family, torch.float64)
    student, calibration = make_student(teacher, method=method)
    scales = calibration.scales if relative else None
    batch = make_batch()
    batch["labels"][1, 9:] = -100
    config = config_of(temperature=2.0, alpha=0.3)
    totals = red.training_step(teacher, student, [batch], config, scales)
    got = [parameter.grad.clone() for parameter in student.parameters()]
    expected = loss_by_hand(teacher, student, batch, 2.0, 0.3, scales, method in ROTATED)
    for name, value in expected.items():
        assert totals[name].item() == pytest.approx(value.item()), name
    assert totals["tokens"] == 36
    gradients = torch.autograd.grad(expected["loss"], student.parameters())
    for gradient, wanted in zip(got, gradients, strict=True):
        # The norms of transformers compute in float32, whatever comes in.
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)


def step_of(teacher, student, batches, config, scales):
    """The losses and gradients of one step, as floats and tensors."""
    totals = red.training_step(teacher, student, batches, config, scales)
    gradients = [parameter.grad.clone() for parameter in student.parameters()]
    for parameter in student.parameters():
        parameter.grad = None
    return {name: float(value) for name, value in totals.items()}, gradients


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    teacher = make_teacher(dtype=torch.float64)
    student, calibration = make_student(teacher)
    whole = make_batch(6)
    parts = [{key: value[i:j] for key, value in whole.items()} for i, j in ((0, 1), (1, 4), (4, 6))]
    one, of_one = step_of(teacher, student, [whole], config_of(), calibration.scales)
    many, of_many = step_of(teacher, student, parts, config_of(), calibration.scales)
    assert one == pytest.approx(many, rel=1e-6) and one["tokens"] == 72
    torch.testing.assert_close(of_one, of_many, rtol=1e-5, atol=1e-7)


def test_a_micro_batch_counts_as_its_labels_do():
    """So the mean is one over labels; the mean of the parts' means would be another."""
    teacher = make_teacher(dtype=torch.float64)
    student, calibration = make_student(teacher)
    parts, config = uneven_batches(), config_of(alpha=0.3)
    labels = [int((part["labels"][:, 1:] != -100).sum()) for part in parts]
    single = [step_of(teacher, student, [part], config, calibration.scales) for part in parts]
    losses, gradients = step_of(teacher, student, iter(parts), config, calibration.scales)
    for name in ("loss", "kl", "cross_entropy", "alignment"):
        expected = sum(n * terms[name] for n, (terms, _) in zip(labels, single)) / sum(labels)
        assert losses[name] == pytest.approx(expected, rel=1e-6)
        assert abs(losses[name] - sum(terms[name] for terms, _ in single) / 4) > 1e-4
    for i, gradient in enumerate(gradients):
        expected = sum(n * parts[i] for n, (_, parts) in zip(labels, single)) / sum(labels)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def test_no_micro_batch_is_read_before_it_is_needed(monkeypatch):
    teacher = make_teacher()
    student, _ = make_student(teacher)
    read, seen, honest = [], [], red.teacher_forward
    batches = (read.append(seed) or make_batch(seed=seed) for seed in itertools.count())
    look = lambda *inputs: seen.append(len(read)) or honest(*inputs)  # noqa: E731
    monkeypatch.setattr(red, "teacher_forward", look)
    next(red.distill(teacher, student, batches, config_of(steps=2, grad_accum=5)))
    assert seen == [1, 2, 3, 4, 5]


def test_learning_rate_warms_up_over_half_a_percent_and_decays_to_nothing():
    config = config_of(steps=1000, learning_rate=2.0)
    rates = [red.learning_rate_at(step, config) for step in range(1000)]
    warm = [2 * (1 - step / 1000) * (step + 1) / 5 for step in range(5)]
    assert rates[:5] == pytest.approx(warm)
    assert rates[5:] == pytest.approx([2 * (1 - step / 1000) for step in range(5, 1000)])
    assert red.learning_rate_at(0, config_of(steps=3, learning_rate=2.0)) == pytest.approx(2.0)


def test_the_loop_is_adam_with_clipping_at_one_and_no_weight_decay():
    """Parameter by parameter against Adam written out, at the rates of the schedule."""
    teacher = make_teacher(dtype=torch.float64)
    config = config_of(steps=400, learning_rate=0.01, grad_accum=2)
    student, calibration = make_student(teacher)
    batches = [make_batch(seed=s) for s in range(6)]
    steps = red.distill(teacher, student, iter(batches), config, calibration.scales)
    norms = [next(steps)["gradient_norm"] for _ in range(3)]

    other, _ = make_student(teacher)
    first = [torch.zeros_like(parameter) for parameter in other.parameters()]
    second = [torch.zeros_like(parameter) for parameter in other.parameters()]
    for step, rate in enumerate([0.5 * 0.01, 0.01 * 399 / 400, 0.01 * 398 / 400]):
        pair = batches[2 * step : 2 * step + 2]
        red.training_step(teacher, other, pair, config, calibration.scales)
        squares = sum(parameter.grad.square().sum() for parameter in other.parameters())
        norm = squares.sqrt().item()
        assert norms[step] == pytest.approx(norm) and 1.5 < norm < 90
        for parameter, m, v in zip(other.parameters(), first, second):
            gradient = parameter.grad / norm
            m.copy_(0.9 * m + 0.1 * gradient)
            v.copy_(0.999 * v + 0.001 * gradient**2)
            m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            parameter.data -= rate * m_hat / (v_hat.sqrt() + 1e-8)
            parameter.grad = None
    for got, expected in zip(student.parameters(), other.parameters()):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_the_loop_leaves_the_model_with_its_final_weights():
    teacher = make_teacher()
    student, _ = make_student(teacher)
    records = train(teacher, student, [make_batch(seed=s) for s in range(4)], config_of(steps=4))
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for name, weight in student.merge().items():
        assert torch.equal(student.model.get_parameter(name), weight), name


def test_steps_that_are_not_finite_are_skipped_and_ten_in_a_row_end_the_run(monkeypatch):
    teacher = make_teacher()
    student, _ = make_student(teacher)
    start = [parameter.detach().clone() for parameter in student.parameters()]
    honest, bad, records = red.distillation_loss, {1, 2, *range(5, 16)}, []

    def sometimes(*arguments):
        loss, *terms = honest(*arguments)
        return (loss * math.nan if len(records) in bad else loss), *terms

    monkeypatch.setattr(red, "distillation_loss", sometimes)
    with pytest.raises(FloatingPointError, match="learning-rate"):
        batches = itertools.repeat(make_batch())
        for record in red.distill(teacher, student, batches, config_of(steps=20)):
            records.append(json.loads(json.dumps(record)))
    assert [record["skipped"] for record in records] == [i in bad for i in range(14)]
    assert records[1]["loss"] is None and "NaN" not in json.dumps(records)
    for old, new in zip(start, student.parameters()):
        assert torch.isfinite(new).all() and (old != new).any()


def test_batches_that_end_early_are_no_training():
    teacher = make_teacher()
    student, _ = make_student(teacher)
    with pytest.raises(ValueError, match="no batch"):
        train(teacher, student, [make_batch()], config_of(steps=3))


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
    checked = 0
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist()):
        text = "".join(red.TINY_ALPHABET[i] for i in ids)
        marks = "".join("." if label == -100 else red.TINY_ALPHABET[label] for label in labels)
        for line, mark in zip(text.splitlines(), marks.splitlines()):
            sign = "?" if "?" in line else ":"
            prompt, _, answer = line.partition(sign)
            if sign in line:
                assert mark == "." * (len(prompt) + 1) + answer
                checked += 1
    assert checked > 8


def test_tiny_tokenizer_round_trip(tmp_path):
    tokenizer = red.tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "7+5-3=?7+5=2;2-3=9#9\nabcd:wxyz\n"
    ids = loaded(text)["input_ids"]
    assert ids == [red.TINY_ALPHABET.index(character) for character in text]
    assert loaded.decode(ids) == text


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_tiny_world_in_every_family(family, tmp_path):
    """Also with prompts of two lengths: the saved tokenizer has a pad token that it knows."""
    values = red.read_tiny_config() | {"model_type": family, "hidden_size": 32, "head_dim": 8}
    teacher = red.tiny_teacher(values, 0, steps=2)
    teacher.save_pretrained(tmp_path)
    red.tiny_tokenizer().save_pretrained(tmp_path)
    teacher, tokenizer = red.load_teacher(str(tmp_path))
    assert teacher.config.model_type == family
    assert len(red.tiny_scores(teacher, tokenizer, count=2)["chains"]["written"]) == 5
    together = red.generate(teacher, tokenizer, ["1+2-3*4=?", "7"], 4)
    alone = [red.generate(teacher, tokenizer, [prompt], 4)[0] for prompt in ("1+2-3*4=?", "7")]
    assert together == alone


def test_a_slip_goes_on_consistently():
    assert red.solution("7+5-3=?") == "7+5=2;2-3=9#9\n"
    assert red.solution("7+5-3=?", slip=0, amount=4) == "7+5=6;6-3=3#3\n"
    assert red.solution("7+5-3=?", slip=1, amount=9) == "7+5=2;2-3=8#8\n"


def test_the_tiny_worlds_questions_have_one_right_answer_and_three_wrong_ones():
    pairs, *chains = red.tiny_questions(20)
    assert len(pairs) == 60 and [len(group) for group in chains] == [20] * 5
    known = dict(red.TINY_PAIRS)
    for prompt, answers in pairs:
        assert answers[0] == known[prompt] and len(set(answers)) == 4
        assert set(answers) <= set(known.values())
    for steps, group in enumerate(chains, 1):
        for prompt, (truth, *wrong) in group:
            assert truth == red.solution(prompt) and len({truth, *wrong}) == 4
            assert {len(answer) for answer in wrong} == {len(truth)}
            for answer in wrong:  # one step is wrong, and each goes on from the one before
                parts = re.findall(r"(\d)(.)(\d)=(\d)", answer)
                right = [eval(f"({a}{sign}{b})") % 10 == int(c) for a, sign, b, c in parts]
                assert len(parts) == steps and right.count(False) == 1
                assert all(left[3] == part[0] for left, part in zip(parts, parts[1:]))
                assert answer == f"{answer.split('#')[0]}#{parts[-1][3]}\n"
    assert red.tiny_questions(20) == [pairs, *chains]


def test_tiny_scores_are_of_exact_answers(monkeypatch):
    """A solver that knows the pairs, and errs in every second chain of three steps or more."""
    pairs = dict(red.TINY_PAIRS)

    def solve(model, tokenizer, prompts, new_tokens):
        answers = []
        for number, prompt in enumerate(prompts):
            if ":" in prompt:
                answers.append(pairs[prompt].strip() if number % 4 else "none")
                continue
            value = int(prompt[0])
            for sign, digit in zip(prompt[1:-2:2], prompt[2:-2:2]):
                value = eval(f"({value}{sign}{digit})") % 10
            wrong = len(prompt) >= 9 and number % 2
            answers.append(f"whatever#{(value + wrong) % 10}")
        return answers

    monkeypatch.setattr(red, "generate", solve)
    monkeypatch.setattr(red, "share_chosen", lambda model, tokenizer, group: len(group))
    scores = red.tiny_scores(None, None, count=10)
    assert scores["pairs"] == {"chosen": 60, "written": 0.75}
    assert scores["chains"] == {"chosen": [10] * 5, "written": [1, 1, 0.5, 0.5, 0.5]}


def test_what_is_chosen_is_the_likeliest_answer():
    """Against the likelihood of each answer alone, one token at a time; a tie is not right."""
    values = red.read_tiny_config() | {"hidden_size": 32, "head_dim": 8}
    teacher, tokenizer = red.tiny_teacher(values, 0, steps=30), red.tiny_tokenizer()
    questions = [*red.tiny_questions(12)[3], *red.tiny_questions(12)[0]]

    def likelihood(prompt, answer):
        ids, total = tokenizer(prompt + answer, return_tensors="pt")["input_ids"], 0.0
        with torch.no_grad():
            table = teacher(ids).logits[0].double().log_softmax(-1)
        for place in range(len(prompt), ids.shape[1]):
            total += table[place - 1, ids[0, place]].item()
        return total

    right = []
    for prompt, answers in questions:
        scores = [likelihood(prompt, answer) for answer in answers]
        right.append(scores[0] == max(scores))
    assert red.share_chosen(teacher, tokenizer, questions) == pytest.approx(sum(right) / len(right))
    assert 0.1 < sum(right) / len(right) < 0.9
    with torch.no_grad():
        teacher.lm_head.weight.zero_()  # now every answer of a length is as likely
    assert red.share_chosen(teacher, tokenizer, questions) == 0


def test_red_keeps_more_effective_rank_than_lrc_and_pca_starts_lower():
    teacher = red.tiny_teacher(red.read_tiny_config(), 0, steps=300)
    samples = red.tiny_batches(16, 48, "calibration")
    calibration = red.calibrate(teacher, [next(samples) for _ in range(4)], 48)
    held_out, starts, ends, kept = [next(samples)], {}, {}, {}
    for method in ("red", "pca", "lrc"):
        student = red.new_student(method, teacher, 48, calibration)
        starts[method] = red.evaluate(student.model, held_out)
        batches = red.tiny_batches(16, 48, "training")
        config = config_of(steps=12, learning_rate=1e-2)
        for _ in red.distill(teacher, student, batches, config, calibration.scales):
            pass
        ends[method] = red.evaluate(student.model, held_out)
        kept[method] = sum(ends[method]["erank"]) / sum(starts[method]["erank"])
    assert kept["lrc"] < kept["red"]  # by 0.09 to 0.21 with seeds 0 to 2
    assert ends["red"]["loss"] < ends["lrc"]["loss"] - 0.3
    assert starts["pca"]["loss"] < starts["red"]["loss"] - 0.5
    assert calibration.energy["directions"] > calibration.energy["channels"]


# Evaluation -------------------------------------------------------------------------------------


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
    assert result["erank_raw"][0] == pytest.approx(red.effective_rank(first), rel=1e-5)
    unit = first / first.square().mean(-1, keepdim=True).sqrt()
    assert result["erank"][0] == pytest.approx(red.effective_rank(unit), rel=1e-5)
    cosines = torch.nn.functional.cosine_similarity(first[:, None], first[None], dim=-1)
    expected = (cosines.sum() - len(first)).item() / (len(first) * (len(first) - 1))
    assert result["similarity"][0] == pytest.approx(expected, abs=1e-5)
    few = red.evaluate(teacher, [batch] * 3, tokens=10)  # of the loss all, of the ranks these
    assert few["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert few["erank_raw"][0] == pytest.approx(red.effective_rank(first[:10]), rel=1e-5)


def pieces(kind):
    """A small real tokenizer in which tokens straddle `=` and `>>`, and all words are known."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    text = ["Question: two and 40?\nAnswer: So 40+2 = <<40+2=42>>42 it is <<42*2=84>>84.\n#### 84"]
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=290, initial_alphabet=alphabet, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
        tokenizer.decoder = decoders.Metaspace()
        characters = sorted(set("".join(text) + "0123456789abcdefghijklmnopqrstuvwxyz"))
        trainer = trainers.BpeTrainer(
            vocab_size=80,
            initial_alphabet=characters,
            show_progress=False,
            special_tokens=["<unk>"],
        )
    tokenizer.train_from_iterator(["=42>>42", "=84>>84", "2=8", *text], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


PROBLEMS = [
    ("two and 40?", "So 40+2 = <<40+2=42>>42 it is <<42*2=84>>84.\n#### 84"),
    ("one?", "It is <<1=1>>1."),
    ("a <<1+1=2>> in the question?", "No <<2*2=4>>4 <<4-1=3>>3 <<3+9=12>>12 <<12/3=4>>4"),
]


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_steps_against_a_loop_that_lets_the_model_write_each_result(kind):
    """Each result is written by the model token by token; every other token likewise."""
    tokenizer = pieces(kind)
    torch.manual_seed(3)
    shape = SHAPE | dict(vocab_size=len(tokenizer), max_position_embeddings=256)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape)).eval()
    rows = [{"question": question, "answer": answer} for question, answer in PROBLEMS]
    problems = [red.worked_problem(row, tokenizer) for row in rows]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(14):  # a model that knows some of the answers
        for problem in problems:
            ids = torch.tensor([problem["ids"]])
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    by_step, others, straddling = [[], [], []], [], 0
    for question, answer in PROBLEMS:
        text = f"Question: {question}\nAnswer: {answer}"
        encoded = tokenizer(text, return_offsets_mapping=True)
        ids, places = encoded["input_ids"], encoded["offset_mapping"]
        begins, of_results = len(text) - len(answer), set()
        for step, match in enumerate(re.finditer(r"=(\d+)>>", answer)):
            start, end = begins + match.start(1), begins + match.end(1) + 1
            tokens = [i for i, (a, b) in enumerate(places) if a < end and b > start]
            straddling += places[tokens[0]][0] < start or places[tokens[-1]][1] > end
            context = ids[: tokens[0]]
            for _ in tokens:
                with torch.no_grad():
                    context = [
                        *context,
                        model(torch.tensor([context])).logits[0, -1].argmax().item(),
                    ]
            by_step[min(step, 2)].append(context[tokens[0] :] == [ids[i] for i in tokens])
            of_results |= set(tokens)
        for i, (_, end) in enumerate(places):
            if end > begins and i not in of_results:
                with torch.no_grad():
                    others.append(model(torch.tensor([ids[:i]])).logits[0, -1].argmax() == ids[i])
    assert straddling > 0 and [len(step) for step in by_step] == [3, 2, 2]

    def share(answers):
        return sum(map(float, answers)) / len(answers)

    for batch_size in (1, 2, 3):
        scores = red.step_scores(model, problems, batch_size)
        assert scores["by_step"] == pytest.approx([share(step) for step in by_step])
        assert scores["results"] == pytest.approx(share(sum(by_step, [])))
        assert scores["other_tokens"] == pytest.approx(share(others))
    assert 0 < scores["results"] < 1 and 0 < scores["other_tokens"] < 1


def test_a_result_is_right_only_if_it_ends_where_it_should():
    """A model that writes 42 where 4 is the result is wrong: the `>` belongs to what is asked."""
    row = {"question": "q", "answer": "x<<2*2=4>>4"}
    from tokenizers import Tokenizer, models

    text = f"Question: {row['question']}\nAnswer: {row['answer']}"
    vocabulary = {character: i for i, character in enumerate(sorted(set(text) | set("2")))}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, merges=[]))
    )
    assert "".join(tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])) == text
    problem = red.worked_problem(row, tokenizer)
    ((start, end),) = problem["results"]
    assert tokenizer.convert_ids_to_tokens(problem["ids"][start:end]) == ["4", ">"]
    first = tokenizer.convert_ids_to_tokens(problem["ids"][problem["answer_at"] :])
    assert "".join(first) == row["answer"]


# Teachers and text ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A folder with a small 'real' teacher and its tokenizer, and data in each format."""
    import datasets

    folder = tmp_path_factory.mktemp("real")
    teacher = red.tiny_teacher(red.read_tiny_config(), 0, steps=1)
    teacher.save_pretrained(folder / "teacher")
    red.tiny_tokenizer().save_pretrained(folder / "teacher")
    generator = random.Random(0)
    lines = ["".join(red.arithmetic_problem(3, generator)).strip() for _ in range(300)]
    (folder / "data.txt").write_text("\n\n".join(lines))
    rows = [json.dumps({"question": line, "answer": "#### 7"}) for line in lines]
    (folder / "data.jsonl").write_text("\n".join(rows))
    datasets.Dataset.from_dict({"text": lines}).to_parquet(folder / "data.parquet")
    return folder


def parsed(*arguments):
    return red.parse_arguments(arguments)


def edit_weights(folder, change):
    """Rewrite a checkpoint's tensors by `change`, a function of the dict of them."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_checkpoint_without_one_matrix_is_refused(real, tmp_path, capsys):
    shutil.copytree(real / "teacher", tmp_path, dirs_exist_ok=True)
    edit_weights(tmp_path, lambda weights: weights.pop("model.layers.1.mlp.down_proj.weight"))
    assert red.main(["--model", str(tmp_path), "--data", f"{real}/data.txt"]) == 2
    assert "down_proj" in capsys.readouterr().err


def test_a_file_with_two_matrices_is_not_tied_whatever_its_config_says(real, tmp_path):
    shutil.copytree(real / "teacher", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    teacher, _ = red.load_teacher(str(tmp_path))
    batch = make_batch()
    batch["input_ids"] %= 45
    calibration = red.calibrate(teacher, [batch, batch], 96)
    student = red.new_student("red", teacher, 96, calibration)
    torch.testing.assert_close(logits(student.model, batch), logits(teacher, batch))


def test_packing_loses_nothing_but_the_last_row():
    tokenizer = red.tiny_tokenizer()
    documents = [{"text": "abc"}, {"text": "d"}, {"text": "efgh"}]
    batches = list(red.packed(documents, tokenizer, 1, 5))
    texts = ["".join(red.TINY_ALPHABET[i] for i in batch["input_ids"][0]) for batch in batches]
    assert texts == ["abc\nd", "\nefgh"]


def text_of(batches):
    return "".join(red.TINY_ALPHABET[i] for batch in batches for i in batch["input_ids"].flatten())


def test_held_out_text_is_neither_trained_nor_calibrated_on(real):
    """Problem by problem, over more than an epoch; the whole of the rest is trained on."""
    lines = [
        json.loads(line)["question"] for line in (real / "data.jsonl").read_text().splitlines()
    ]
    config = parsed("--model", f"{real}/teacher", "--data", f"{real}/data.jsonl",
                    "--seq-len", "64", "--batch-size", "7")  # fmt: skip
    task = red.open_task(config, config.model)
    batches = list(itertools.islice(red.training_batches(config, task), 50))
    assert {batch["input_ids"].shape for batch in batches} == {(7, 64)}
    trained, calibrated = text_of(batches), text_of(task.calibration)
    assert trained.count(lines[40]) >= 2  # the data begins again
    assert lines[0] in text_of(task.held_out) and lines[30] not in text_of(task.held_out)
    assert not any(line in trained or line in calibrated for line in lines[:30])
    assert all(line in trained for line in lines[30:]) and lines[30] in calibrated
    again = list(itertools.islice(red.training_batches(config, task), len(batches)))
    assert text_of(again) == trained


def test_data_as_people_have_it(tmp_path):
    """Each with the texts that are in it; null is an empty text, and a name is no pattern."""
    rows = [{"text": "one"}, {"text": None}, {"text": "three"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "blank.txt").write_text("one\nand a half\n\ntwo\n")
    (tmp_path / "lines.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "array.json").write_text(json.dumps(rows))
    (tmp_path / "a[1].jsonl").write_text(json.dumps({"text": "right"}))
    (tmp_path / "a1.jsonl").write_text(json.dumps({"text": "wrong"}))
    (tmp_path / "many").mkdir()
    (tmp_path / "many/x.jsonl").write_text(json.dumps({"text": "x"}))
    (tmp_path / "many/y.jsonl").write_text(json.dumps({"text": "y"}))
    wanted = {"blank.txt": ["one\nand a half", "two"], "lines.txt": ["one", "two", "three"]}
    wanted |= dict.fromkeys(["rows.jsonl", "array.json"], ["one", "", "three"])
    wanted |= {"a[1].jsonl": ["right"], "many": ["x", "y"], "many/*.jsonl": ["x", "y"]}
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/x.txt").write_text("one\nand a half\n\ntwo")
    wanted |= dict.fromkeys(["texts", "texts/*.txt"], ["one\nand a half", "two"])
    for name, expected in wanted.items():
        documents = red.open_documents(str(tmp_path / name), "--data")
        texts = [row["text"].strip() for row in documents]
        assert texts == expected, name


def test_empty_documents_are_left_out_and_counted_once(real, tmp_path, capsys):
    rows = (real / "data.jsonl").read_text().splitlines()
    rows[40:40] = [json.dumps({"question": None, "answer": None})] * 7
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    losses = []
    for folder in (real, tmp_path):
        out = tmp_path / f"out-{len(losses)}"
        assert red.main(run_of(real, out, "--data", f"{folder}/data.jsonl")) == 0
        losses.append(summary_of(out)["red"]["loss"])
    assert losses[0] == losses[1]
    assert capsys.readouterr().out.count("7 of the first 307 documents are empty") == 1


def test_data_that_breaks_halfway_gets_one_sentence():
    def breaks():
        yield {"text": "1+1"}
        raise ConnectionError("the hub went away\nwith a long story")

    with pytest.raises(red.UserError, match="the hub went away"):
        list(red.readable(breaks(), "somewhere"))


def as_process(monkeypatch, number, count):
    monkeypatch.setattr(red, "process", lambda: (number, count))


def test_each_process_reads_its_own_documents_and_together_all(real, monkeypatch):
    config = parsed("--model", f"{real}/teacher", "--data", f"{real}/data.jsonl",
                    "--seq-len", "40", "--batch-size", "1")  # fmt: skip
    task, seen = red.open_task(config, config.model), []
    for number in (0, 1):
        as_process(monkeypatch, number, 2)
        text = text_of(itertools.islice(red.training_batches(config, task), 180))
        seen.append(set(re.findall(r"[^: ]*#\d", text)))
    lines = (real / "data.jsonl").read_text().splitlines()[30:]
    wanted = {re.search(r"[^: ]*#\d", json.loads(line)["question"])[0] for line in lines}
    assert len(seen[0] & seen[1] & wanted) < 10 and len(wanted - (seen[0] | seen[1])) < 3


# Runs and their folders -------------------------------------------------------------------------

SMALL = "--steps 2 --batch-size 2 --seq-len 32 --calibration-samples 4".split()


def run_of(real, out, *arguments, data="data.txt"):
    model = ["--model", f"{real}/teacher", "--data", f"{real}/{data}", "--out", str(out)]
    return [*model, *SMALL, *arguments]


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


@pytest.mark.parametrize("data", ["data.txt", "data.jsonl", "data.parquet"])
def test_a_run_on_a_folder_leaves_what_it_promises(real, data, tmp_path, capsys):
    out = tmp_path / "run"
    words = run_of(real, out, data=data)
    assert red.main(words) == 0
    names = {"settings.json", "summary.json", "teacher.json", "calibration.pt", "red"}
    assert {path.name for path in out.iterdir()} - {"curves.png"} == names
    files = {"metrics.jsonl", "summary.json", "student", "checkpoints"}
    assert {path.name for path in (out / "red").iterdir()} == files
    lines = (out / "red/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [step["step"] for step in steps] == [0, 1, 2]
    assert [step["tokens"] for step in steps] == [0, 64, 128]
    assert all(step["loss"] > 0 and step["tokens_per_second"] > 0 for step in steps[1:])
    assert all(len(steps[i]["held_out"]["erank"]) == 3 for i in (0, 2))
    assert "held_out" not in steps[1]
    summary = summary_of(out / "red")
    student = AutoModelForCausalLM.from_pretrained(out / "red/student")
    assert student.config.hidden_size == 48 == summary["hidden_size"] == len(summary["channels"])
    assert student.num_parameters() == summary["parameters"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "red/student")
    assert tokenizer("7+")["input_ids"] == [7, 10]
    assert (out / "red/student/generation_config.json").is_file()
    card = (out / "red/student/README.md").read_text()
    assert f"{real}/teacher, made narrower" in card and f"{summary['loss']:.3f}" in card
    assert "base_model" not in card  # which has to be a name on the hub
    assert '"seq_len": 32' in card
    said = capsys.readouterr().out
    assert "width 48" in said and "energy" in said and f"{out}/red/student, for" in said
    answers = [summary["teacher"]["example"], summary["example"]]
    assert answers[0]["prompt"] == answers[1]["prompt"]

    written = (out / "red/summary.json").stat().st_mtime_ns
    assert red.main(words) == 0  # the same command again: reused, not done again, and said
    assert "finished before" in capsys.readouterr().out
    assert (out / "red/summary.json").stat().st_mtime_ns == written
    assert red.main([*words, "--seed", "1", "--alpha", "0.5"]) == 2
    error = capsys.readouterr().err
    assert "alpha: 0.2 there, 0.5 here" in error and "seed" in error and error.count("\n") == 1
    assert (out / "red/summary.json").stat().st_mtime_ns == written
    words = run_of(real, tmp_path / "start", "--steps", "0", data=data)
    assert red.main(words) == 0 and summary_of(tmp_path / "start/red")["tokens"] == 0


def test_several_methods_share_one_table_and_the_seed_decides(real, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(red, "generate", lambda *_: ["42"])  # to save time
    results = []
    for out in (tmp_path / "a", tmp_path / "b"):
        assert red.main(run_of(real, out, "--methods", *METHODS)) == 0
        results.append(summary_of(out))
        for row in results[-1].values():
            for record in row.pop("curve", []):
                assert record.pop("tokens_per_second", 1) > 0
    assert results[0] == results[1]
    assert list(results[0]) == ["teacher", *METHODS]
    assert [label for label, row in results[0].items() if "channels" in row] == ["red"]
    said = capsys.readouterr().out
    table = said.split("\n\n")[-2].splitlines()
    assert [line.split()[0] for line in table[2:9]] == ["teacher", *METHODS]
    assert f"{results[0]['lrc']['loss']:.3f}" in table[5]
    assert len({len(line) for line in table[:9]}) == 1 and len(table[0]) <= 100
    weights = tmp_path / "a/red/student/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    assert red.main(run_of(real, tmp_path / "a")) == 2  # finished, but damaged
    assert "a/red/student" in capsys.readouterr().err
    finished = (tmp_path / "a/lrc/summary.json").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "a/pca/student")  # finished, but gone: made again
    assert red.main(run_of(real, tmp_path / "a", "--methods", "lrc", "pca")) == 0
    assert (tmp_path / "a/lrc/summary.json").stat().st_mtime_ns == finished
    assert (tmp_path / "a/pca/student/config.json").is_file()
    assert list(summary_of(tmp_path / "a")) == ["teacher", "lrc", "pca"]


def test_what_a_head_of_their_own_costs_is_said(tmp_path, real, capsys):
    values = red.read_tiny_config() | {"tie_word_embeddings": True}
    red.tiny_teacher(values, 0, steps=1).save_pretrained(tmp_path / "teacher")
    red.tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    shutil.copy(real / "data.txt", tmp_path)
    assert red.main(run_of(tmp_path, tmp_path / "out", "--methods", "red", "pca")) == 0
    assert f"a head of their own, {45 * 48:,} parameters" in capsys.readouterr().out
    rows = summary_of(tmp_path / "out")
    assert rows["pca"]["parameters"] - rows["red"]["parameters"] == 45 * 48


def test_reasoning_is_measured_on_worked_problems(real, tmp_path, capsys):
    """At the end and during training, and what is asked is what the file says."""
    rows = [{"question": "q", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}"} for i in range(9)]
    rows.insert(3, {"question": None, "answer": "nothing was asked"})  # left out
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shutil.copytree(real / "teacher", tmp_path / "teacher")
    letters = json.loads((tmp_path / "teacher/tokenizer.json").read_text())
    for old, new in (("x", "<"), ("y", ">")):
        letters["model"]["vocab"][new] = letters["model"]["vocab"].pop(old)
    (tmp_path / "teacher/tokenizer.json").write_text(json.dumps(letters))
    shutil.copy(real / "data.txt", tmp_path)
    words = run_of(tmp_path, tmp_path / "out", "--eval-data", f"{tmp_path}/problems.jsonl")
    assert red.main([*words, "--eval-problems", "7"]) == 0
    said = capsys.readouterr().out
    assert "7 worked problems of" in said and "right" in said.split("\n\n")[-2]
    for folder, row in (("out", "teacher"), ("out/red", "red")):
        lines = (tmp_path / folder / "problems.jsonl").read_text().splitlines()
        problems = [json.loads(line) for line in lines]
        assert len(problems) == 7 and problems[0]["prompt"] == "Question: q\nAnswer:"
        right = sum([problem["right"] for problem in problems], [])
        assert summary_of(tmp_path / "out")[row]["results"] == sum(right) / len(right)
    rows = summary_of(tmp_path / "out")
    for row in (*rows.values(), *[point["held_out"] for point in rows["red"]["curve"]]):
        assert 0 <= row["results"] <= 1 and len(row["by_step"]) == 3
    assert rows["red"]["example"]["prompt"].endswith("Answer:")
    assert red.main(run_of(tmp_path, tmp_path / "other")) == 0
    assert "not measured; --eval-data" in capsys.readouterr().out
    assert "right" not in table_of(summary_of(tmp_path / "other"))


def table_of(rows):
    return red.table(rows)


def test_once_five_steps_are_timed_it_is_said_how_long_the_rest_takes(real, tmp_path, capsys):
    assert red.main(run_of(real, tmp_path, "--steps", "9", "--measure-every", "0")) == 0
    (said,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("time")]
    assert re.search(r"red: about 00:[0-5]\d of training remain$", said)


def test_a_run_draws_its_curves_or_says_what_is_missing(real, tmp_path, monkeypatch, capsys):
    library, panels = mock.MagicMock(), [mock.MagicMock(), mock.MagicMock()]
    figure = library.figure.Figure.return_value
    figure.subplots.return_value = panels
    monkeypatch.setitem(sys.modules, "matplotlib", library)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", library.figure)
    words = run_of(real, tmp_path, "--methods", "red", "lrc")
    assert red.main(words) == 0
    assert f"picture      {tmp_path}/curves.png" in capsys.readouterr().out
    figure.savefig.assert_called_once_with(f"{tmp_path}/curves.png")
    for panel, name in zip(panels, ("loss", "erank")):
        assert [call.kwargs["label"] for call in panel.plot.call_args_list] == ["red", "lrc"]
        for call in panel.plot.call_args_list:
            curve = summary_of(tmp_path)[call.kwargs["label"]]["curve"]
            values = torch.tensor([point["held_out"][name] for point in curve]).view(2, -1)
            assert call.args[0] == [0, 2]
            torch.testing.assert_close(torch.stack(call.args[1]), values.mean(1))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert red.main(words) == 0 and "it needs matplotlib" in capsys.readouterr().out


def test_the_table_has_at_most_100_columns_and_only_what_is_measured():
    row = {"parameters": 134e6, "loss": 12.3456, "perplexity": 1234567.8, "erank": [250.0] * 30}
    row |= {"results": 1.0, "by_step": [1.0] * 3, "other_tokens": 1.0}
    wide = red.table({"teacher": row, "random-selection": row}).splitlines()
    assert max(map(len, wide)) <= 100 and wide[3].startswith("random-selection")
    assert " 12.346 " in wide[3] and " 15  " in wide[1]
    tiny = {
        "pairs": {"chosen": 1.0, "written": 1.0},
        "chains": dict.fromkeys(("chosen", "written")),
    }
    tiny["chains"] = {"chosen": [0.81] * 5, "written": [0.11, 0.22, 0.33, 0.44, 0.55]}
    tiny |= {"parameters": 1e5, "loss": 0.1, "perplexity": 1.1, "erank": [50.0] * 3}
    lines = red.table({"teacher": tiny, "shared-orthogonal": tiny}).splitlines()
    assert max(map(len, lines)) <= 100 and "chance 25%" in "".join(lines)
    assert lines[2].split()[4:9] == ["11%", "33%", "55%", "100%", "81%"]


def test_settings_reach_what_they_are_for(real, tmp_path, monkeypatch):
    """Each changes the result."""
    monkeypatch.setattr(red, "generate", lambda *_: ["42"])  # to save time
    losses = []
    changes = ["", "--alpha 0.9", "--seed 3", "--temperature 9", "--learning-rate 1e-2",
               "--grad-accum 3", "--calibration-samples 2", "--ratio 0.33"]  # fmt: skip
    for i, change in enumerate(changes):
        words = run_of(real, tmp_path / str(i), *change.split())
        assert red.main(words) == 0
        losses.append(summary_of(tmp_path / str(i))["red"]["loss"])
    assert len(set(losses)) == len(changes)


def test_the_tiny_worlds_teacher_is_shared_by_the_runs_beside_each_other(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    honest, score = red.tiny_teacher, red.tiny_scores
    monkeypatch.setattr(red, "tiny_teacher", lambda values, *rest: honest(values, *rest, steps=3))
    monkeypatch.setattr(red, "tiny_scores", lambda model, words: score(model, words, count=3))
    monkeypatch.setattr(red, "TINY_PAIRS", red.TINY_PAIRS[:5])
    words = "--batch-size 2 --calibration-samples 2 --measure-every 0 --methods red".split()
    assert red.main([*words, "--steps", "1"]) == 0
    assert (tmp_path / "runs/tiny-llama-0/model.safetensors").is_file()
    monkeypatch.setattr(red, "tiny_teacher", None)  # not needed again
    # What a person tries first is never refused: each goes to a folder of its own.
    for change in ("--steps 2", "--steps 1 --ratio 0.25", "--steps 1 --alpha 0.5"):
        assert red.main([*words, *change.split()]) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 5
    # A teacher of the tiny world is known as one.
    known = ["--model", "runs/tiny-llama-0"]  # its folder is no place for a student
    assert red.main([*words, "--steps", "1", *known, "--out", "runs/tiny-llama-0"]) == 2
    teacher = [*known, "--out", "runs/again"]
    assert red.main([*words, "--steps", "1", *teacher]) == 0
    assert "pairs" in summary_of(tmp_path / "runs/again")["red"]
    assert red.main([*words, "--steps", "1", "--ratio", "0.25", "--out", "runs/again"]) == 2
    assert "ratio: 0.5 there, 0.25 here" in capsys.readouterr().err


def test_results_do_not_lie_in_what_is_read(real, tmp_path, capsys):
    shutil.copytree(real / "teacher", tmp_path / "teacher")
    (tmp_path / "texts").mkdir()
    shutil.copy(real / "data.txt", tmp_path / "texts")
    before = sorted(tmp_path.rglob("*"))
    for out in (tmp_path / "teacher", tmp_path / "teacher/runs"):
        assert red.main(run_of(tmp_path, out, data="texts")) == 2
        assert "lies in" in capsys.readouterr().err
    assert red.main(run_of(real, tmp_path / "texts/runs", "--data", f"{tmp_path}/texts")) == 2
    assert "lies in" in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before


def test_a_method_can_be_added_and_no_two_widths_are_in_one_table(real, tmp_path, capsys):
    one, two = run_of(real, tmp_path), run_of(real, tmp_path, "--methods", "red", "lrc")
    assert red.main(one) == 0
    written = (tmp_path / "red/summary.json").stat().st_mtime_ns
    teacher = (tmp_path / "teacher.json").stat().st_mtime_ns
    assert red.main(two) == 0
    assert (tmp_path / "red/summary.json").stat().st_mtime_ns == written
    assert (tmp_path / "teacher.json").stat().st_mtime_ns == teacher  # measured once
    assert list(summary_of(tmp_path)) == ["teacher", "red", "lrc"]
    capsys.readouterr()
    assert red.main([*two, "--ratio", "0.25"]) == 2
    assert "ratio: 0.5 there, 0.25 here" in capsys.readouterr().err


def test_the_calibration_is_made_once_and_kept(real, tmp_path, monkeypatch, capsys):
    words = run_of(real, tmp_path / "out", "--methods", "red")
    assert red.main(words) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(red, "calibrate", None)  # and never again
    assert red.main([*words, "pca"]) == 0
    again = capsys.readouterr().out
    told = [line for line in first.splitlines() if line.startswith("calibration")]
    assert len(told) == 2 and told == [x for x in again.splitlines() if x.startswith("calibration")]
    monkeypatch.undo()
    assert red.main(run_of(real, tmp_path / "whole", "--methods", "red", "pca")) == 0
    for method in ("red", "pca"):
        losses = [summary_of(tmp_path / out)[method]["loss"] for out in ("out", "whole")]
        assert losses[0] == losses[1]


def test_what_was_read_is_known_and_what_changed_is_named(real, tmp_path, capsys):
    """Data, teacher: the file behind the same name is another one."""
    shutil.copytree(real / "teacher", tmp_path / "teacher")
    shutil.copy(real / "data.txt", tmp_path)
    words = run_of(tmp_path, tmp_path / "out")
    assert red.main(words) == 0 and red.main(words) == 0
    for name, flag in (("data.txt", "data"), ("teacher/config.json", "model")):
        path, before = tmp_path / name, (tmp_path / name).stat()
        path.write_text(path.read_text() + "\n")
        capsys.readouterr()
        assert red.main(words) == 2
        said = capsys.readouterr().err
        assert f"{flag} on disk" in said and "bytes, dates" in said
        path.write_text(path.read_text()[:-1])
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert red.main(words) == 0
    os.utime(path, (0, 0))  # one of a folder's files is replaced by an older one
    assert red.main(words) == 2


def test_a_newer_commit_on_the_hub_is_named_and_an_older_copy_goes_on(tmp_path, monkeypatch):
    """What is not here is of the hub; where that is out of reach, its cache is what it was."""
    monkeypatch.chdir(tmp_path)
    commits, asked = {"some/teacher": "c1", "some/text": "c2", "openai/gsm8k": "c3"}, []

    def repo_info(self, name, repo_type, timeout):
        asked.append((name, repo_type))
        return mock.Mock(sha=commits[name])

    monkeypatch.setattr(red.HfApi, "repo_info", repo_info)
    config = red.parse_arguments("--model some/teacher --data some/text:a:train".split())
    stored = red.settings_of(config)
    assert asked == [*zip(commits, ("model", "dataset", "dataset"))]
    assert stored["model on the hub"] == "c1" and stored["data on the hub"] == "c2"
    red.begin(tmp_path / "run", stored)
    red.open_folder(tmp_path / "run", red.settings_of(config))
    commits["some/text"] = "c4"
    with pytest.raises(red.UserError, match="data on the hub: c2 there, c4 here"):
        red.open_folder(tmp_path / "run", red.settings_of(config))
    commits.clear()
    offline = red.settings_of(config)
    red.open_folder(tmp_path / "run", offline)
    red.begin(tmp_path / "run", offline)  # and the commit is still known
    commits |= {"some/teacher": "c5", "some/text": "c2"}
    with pytest.raises(red.UserError, match="model on the hub: c1 there, c5 here"):
        red.open_folder(tmp_path / "run", red.settings_of(config))


def test_settings_are_compared_on_both_sides(real, tmp_path, monkeypatch, capsys):
    first = {"program": "red.py", "model": "a", "data": "b"}
    differences = [{"model on disk": "1 byte"}, {"processes": 2}, {"alpha": 0}]
    for number, more in enumerate(differences):
        for there, here in ((first, first | more), (first | more, first)):
            folder = tmp_path / f"{number}-{len(there)}"
            red.begin(folder, dict(there))
            with pytest.raises(red.UserError, match="other settings"):
                red.open_folder(folder, dict(here))
    folder, commit = tmp_path / "hub", {"model on the hub": "c1"}
    red.begin(folder, dict(first))  # offline: its commit is not known
    red.open_folder(folder, first | commit)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(real / "teacher", tmp_path / "runs/tiny-llama-0")
    values = {"program": "red.py", "tiny_config": red.read_tiny_config(), "seed": 0}
    red.write(tmp_path / "runs/tiny-llama-0/settings.json", values)
    red.write(tmp_path / "runs/tiny-llama-0/summary.json", {"steps": 1500})
    before = sorted(tmp_path.rglob("*"))
    assert red.main(["--steps", "1", "--out", "runs/tiny-llama-0"]) == 2  # the teacher's own
    assert "other settings" in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before


def test_one_command_at_a_time_in_a_folder(real, tmp_path, capfd):
    out = tmp_path / "out"
    words = run_of(real, out, "--steps", "500")
    context = multiprocessing.get_context("fork")
    first = context.Process(target=lambda: sys.exit(red.main(words)), daemon=True)
    first.start()
    while not (out / "red/metrics.jsonl").exists():
        time.sleep(0.01)
    capfd.readouterr()
    assert forked(words) == 2
    assert "another command works in" in capfd.readouterr().err
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    shutil.rmtree(out)
    assert forked(run_of(real, out)) == 0  # the lock has died with its process


def test_a_token_whose_embedding_is_zero_is_no_trouble(real, tmp_path):
    shutil.copytree(real / "teacher", tmp_path / "teacher")
    edit_weights(tmp_path / "teacher", lambda w: w["model.embed_tokens.weight"][44].zero_())
    shutil.copy(real / "data.txt", tmp_path)
    for method in ("red", "pca"):
        assert red.main(run_of(tmp_path, tmp_path / method, "--methods", method)) == 0
        assert math.isfinite(summary_of(tmp_path / method)[method]["loss"])


def test_a_teachers_output_settings_are_no_trouble(real, tmp_path):
    """They are part of a checkpoint's config, and change what its forward returns."""
    shutil.copytree(real / "teacher", tmp_path / "teacher")
    config = json.loads((tmp_path / "teacher/config.json").read_text())
    config |= {"return_dict": False, "output_hidden_states": True, "output_attentions": True}
    (tmp_path / "teacher/config.json").write_text(json.dumps(config))
    changed = ["--model", str(tmp_path / "teacher")]
    assert red.main(run_of(real, tmp_path / "changed", *changed)) == 0
    assert red.main(run_of(real, tmp_path / "plain")) == 0
    losses = [summary_of(tmp_path / name)["red"]["loss"] for name in ("changed", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("content", ["[]", "{}", "{", "[1]\n"])
@pytest.mark.parametrize(
    "name", ["lrc/summary.json", "lrc/metrics.jsonl", "teacher.json", "calibration.pt"]
)
def test_a_damaged_result_is_named_and_nothing_is_lost(
    uninterrupted, tmp_path, name, content, capsys
):
    words, whole = uninterrupted
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out/lrc/summary.json").unlink()
    (tmp_path / "out" / name).write_text(content)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("step-*.pt")}
    assert red.main([*words, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"out/{name} " in said and "; delete " in said and "Traceback" not in said
    assert len(before) == 2 and before == {path: path.read_bytes() for path in before}


def test_a_bad_teacher_harms_no_finished_run(real, tmp_path, capsys):
    out = tmp_path / "run"
    assert red.main(run_of(real, out, "--steps", "1")) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    shutil.copytree(real / "teacher", tmp_path / "bad")
    edit_weights(tmp_path / "bad", lambda w: w["model.norm.weight"].fill_(math.nan))
    words = run_of(real, out, "--steps", "1", "--model", f"{tmp_path}/bad")
    assert red.main(words) != 0
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_strangers_folder_is_never_touched(tmp_path, capsys):
    (tmp_path / "red").mkdir()
    (tmp_path / "red/precious.txt").write_text("mine")
    assert red.main(["--out", str(tmp_path)]) == 2
    assert red.main(["--methods", "red", "--out", str(tmp_path / "red")]) == 2
    assert red.main(["--out", str(tmp_path / "red/precious.txt/below")]) == 2
    assert capsys.readouterr().err.count("\n") == 3
    assert (tmp_path / "red/precious.txt").read_text() == "mine"
    assert len(list(tmp_path.rglob("*"))) == 2


# Long runs --------------------------------------------------------------------------------------


def forked(words, until=None, number=signal.SIGKILL, largest_file=None):
    """Run a command line in a process of its own; send it a signal once `until()` holds."""

    def work():
        if largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        # By default all forks share tqdm's lock: one killed inside it would stop the others.
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


LONG = "--steps 24 --batch-size 2 --seq-len 32 --calibration-samples 4".split()
LONG += "--save-every 5 --measure-every 8".split()


def same_finish(a, b):
    weights = [(folder / "lrc/student/model.safetensors").read_bytes() for folder in (a, b)]
    assert weights[0] == weights[1]
    states = [torch.load(folder / "lrc/checkpoints/step-0000024.pt") for folder in (a, b)]
    for left, right in zip(*[state["student"] for state in states], strict=True):
        assert torch.equal(left, right)
    assert str(states[0]["optimizer"]) == str(states[1]["optimizer"])
    results = [
        [json.loads(line) for line in open(folder / "lrc/metrics.jsonl")] for folder in (a, b)
    ]
    for record in itertools.chain(*results):
        record.pop("tokens_per_second", None)
    assert results[0] == results[1]
    assert [record["step"] for record in results[0]] == list(range(25))


@pytest.fixture(scope="module")
def uninterrupted(real, tmp_path_factory):
    """The words of a run without --out, over the end of its short data, and its finished folder."""
    data = tmp_path_factory.mktemp("long") / "data.jsonl"
    data.write_text("\n".join((real / "data.jsonl").read_text().splitlines()[:20]))
    words = ["--model", f"{real}/teacher", "--data", str(data), "--methods", "lrc", *LONG]
    assert red.main([*words, "--out", str(data.parent / "whole")]) == 0
    return words, data.parent / "whole"


def steps_written(out):
    path = out / "lrc/metrics.jsonl"
    return path.read_text().count("\n") - 1 if path.exists() else -1


def test_killed_at_any_point_it_goes_on_to_the_same_bits(uninterrupted, tmp_path):
    words, whole = uninterrupted
    words = [*words, "--out", str(tmp_path / "out")]
    for kill_after in (3, 7, 16):
        code = forked(words, lambda least=kill_after: steps_written(tmp_path / "out") >= least)
        assert code == -signal.SIGKILL
    assert forked(words) == 0
    same_finish(whole, tmp_path / "out")
    kept = sorted(path.name for path in (tmp_path / "out/lrc/checkpoints").iterdir())
    assert kept == ["step-0000020.pt", "step-0000024.pt"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_of_the_very_step(uninterrupted, tmp_path, number):
    words, whole = uninterrupted
    words = [*words, "--out", str(tmp_path / "out")]
    assert forked(words, lambda: steps_written(tmp_path / "out") >= 2, number) == 130
    (checkpoint,) = (tmp_path / "out/lrc/checkpoints").iterdir()
    last = json.loads((tmp_path / "out/lrc/metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert checkpoint.name == f"step-{last:07}.pt"
    assert forked(words) == 0
    same_finish(whole, tmp_path / "out")


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied"])
def test_a_damaged_checkpoint_is_named_and_without_it_the_one_before_is_used(
    uninterrupted, tmp_path, damage, capfd
):
    words, whole = uninterrupted
    out = tmp_path / "out"
    words = [*words, "--out", str(out)]
    assert forked(words, lambda: (out / "lrc/checkpoints/step-0000010.pt").exists(), signal.SIGKILL)
    newest = max((out / "lrc/checkpoints").glob("step-*.pt"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    if damage != "flipped":
        del content[0 if damage == "emptied" else len(content) // 2 :]
    newest.write_bytes(content)
    capfd.readouterr()
    assert forked(words) == 2
    said = capfd.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert said.strip().startswith(f"red.py: {newest} is damaged") and "delete it" in said
    newest.unlink()
    assert forked(words) == 0
    assert capfd.readouterr().out.count("going on from") == 1
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


@pytest.mark.parametrize("moment", ["checkpoint", "export"])
def test_a_full_disk_is_one_sentence_and_loses_nothing(uninterrupted, tmp_path, moment, capfd):
    words, whole = uninterrupted
    out = tmp_path / "out"
    forked([*words, "--out", str(out)], lambda: (out / "lrc/checkpoints/step-0000005.pt").exists())
    capfd.readouterr()
    more = ["--save-every", "0"] if moment == "export" else []
    assert forked([*words, "--out", str(out), *more], largest_file=200_000) == 2
    said = capfd.readouterr().err
    assert said.replace("\r", "\n").strip().splitlines()[-1].strip().startswith("red.py: ")
    assert moment == "export" or "disk full" in said
    assert "Traceback" not in said
    assert forked([*words, "--out", str(out)]) == 0
    assert list(out.rglob("*.partial")) == []
    same_finish(whole, out)


# A GPU without a GPU -----------------------------------------------------------------------------


@contextlib.contextmanager
def fake(device):
    """Tensors that have shapes, types and devices but no values, on a device that need not exist.

    What would depend on values is settled: numbers are 1, and masks choose everything.
    """
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    honest = torch.Tensor.__getitem__

    def getitem(self, index):
        if isinstance(index, torch.Tensor) and index.dtype == torch.bool:
            return self.flatten(0, index.dim() - 1)
        return honest(self, index)

    with FakeTensorMode(allow_non_fake_inputs=True), contextlib.ExitStack() as stack:
        for name, value in {"item": 1.0, "__float__": 1.0, "__int__": 1, "__bool__": True}.items():
            some = mock.patch.object(torch.Tensor, name, lambda self, value=value: value)
            stack.enter_context(some)
        numbers = mock.patch.object(FakeTensor, "tolist", lambda self: list(range(self.numel())))
        stack.enter_context(numbers)
        stack.enter_context(mock.patch.object(torch.Tensor, "__getitem__", getitem))
        yield torch.device(device)


def fake_teacher(device, family, dtype):
    kind, options = FAMILIES[family]
    with device:
        teacher = AutoModelForCausalLM.from_config(kind(**SHAPE, **options), dtype=dtype)
    return teacher.eval().requires_grad_(False)


knows_cuda = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch without CUDA")


@knows_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama-biases", "mistral", "qwen2-tied", "qwen3"])
def test_no_devices_are_mixed_on_a_gpu(family, dtype, monkeypatch):
    """All but the backward pass, whose engine needs a driver: that is in the test below."""
    batch = {"input_ids": torch.zeros(2, 12, dtype=torch.long)}
    with fake("cuda") as device:
        teacher = fake_teacher(device, family, dtype)
        calibration = red.calibrate(teacher, [batch, batch], 16)
        for method in ("red", "pca"):
            student = red.new_student(method, teacher, 16, calibration)
            student.make_weights()
            ids, labels = red.on_device(batch, teacher)
            goal, activations = red.teacher_forward(teacher, ids)
            hidden, alignment = red.student_forward(student, ids, activations, calibration.scales)
            monkeypatch.setattr(torch.autograd, "grad", lambda loss, logits: (logits * 0,))
            heads = student.model.lm_head.weight, teacher.lm_head.weight
            loss, *_ = red.distillation_loss(hidden, heads[0], goal, heads[1], labels, 2.0)
            assert {loss.device.type, alignment.device.type} == {"cuda"}
            assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
            assert {p.dtype for p in student.model.parameters()} == {dtype}
            assert len(red.evaluate(student.model, [batch])["erank"]) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize("family", ["llama-biases", "mistral", "qwen2-tied", "qwen3"])
def test_no_devices_are_mixed_in_a_step_forward_and_backward(family, dtype):
    batch = {"input_ids": torch.zeros(2, 12, dtype=torch.long)}
    with fake("meta") as device:
        teacher = fake_teacher(device, family, dtype)
        calibration = red.calibrate(teacher, [batch, batch], 16)
        student = red.new_student("pca", teacher, 16, calibration)
        optimizer = torch.optim.Adam(student.parameters(), foreach=False)
        config = config_of(steps=1, grad_accum=2, temperature=2.0)
        batches = itertools.repeat(batch)
        steps = red.distill(teacher, student, batches, config, calibration.scales, optimizer)
        assert [record["step"] for record in steps] == [1]
        assert {parameter.device.type for parameter in student.parameters()} == {"meta"}


@knows_cuda
def test_a_mixture_of_devices_is_found():
    """The control: what the two tests above would see."""
    batch = {"input_ids": torch.zeros(2, 12, dtype=torch.long)}
    with fake("cuda") as device:
        teacher = fake_teacher(device, "llama", torch.bfloat16)
        calibration = red.calibrate(teacher, [batch, batch], 16)
        student = red.new_student("red", teacher, 16, calibration)
        head = student.model.lm_head.weight.detach().to("cpu")
        student.model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
        with pytest.raises(RuntimeError, match="same device"):
            red.evaluate(student.model, [batch])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_types_are_mixed_in_bfloat16(family):
    """With values, on the CPU, which refuses a product of two types."""
    teacher = make_teacher(family, torch.bfloat16)
    for method in ("red", "pca", "lrc"):
        student, calibration = make_student(teacher, method=method)
        config = config_of(steps=2, temperature=2.0)
        records = train(teacher, student, [make_batch()] * 2, config, calibration.scales)
        assert all(not record["skipped"] for record in records)
        assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
        assert {parameter.dtype for parameter in student.model.parameters()} == {torch.bfloat16}
        assert math.isfinite(red.evaluate(student.model, [make_batch()])["loss"])


# Several processes ------------------------------------------------------------------------------


def uneven_batches():
    """Four batches with different numbers of labels and, in one, of tokens."""
    batches = [make_batch(2, seed=seed) for seed in range(3)] + [make_batch(1, 9)]
    batches[0]["labels"][0, :9] = -100
    return batches


def one_of_two(rank, folder):
    """What each of two processes does: a step on half of the batches."""
    meet = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    teacher = make_teacher(dtype=torch.float64)
    student, calibration = make_student(teacher)
    config = config_of(temperature=2.0, alpha=0.3)
    batches = uneven_batches()[rank::2]
    losses = red.training_step(teacher, student, batches, config, calibration.scales)
    gradients = [parameter.grad for parameter in student.parameters()]
    torch.save({"losses": losses, "gradients": gradients}, folder / f"{rank}.pt")


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
    config = config_of(temperature=2.0, alpha=0.3)
    losses = red.training_step(teacher, student, uneven_batches(), config, calibration.scales)
    for rank in (0, 1):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in losses.items():
            torch.testing.assert_close(result["losses"][name], value)
        for got, parameter in zip(result["gradients"], student.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad, rtol=1e-9, atol=1e-12)


def test_torchrun_trains_resumes_and_measures_like_one_process(real, tmp_path, monkeypatch):
    """Tiny-world lines, where two processes read just what one with twice the batch reads."""
    words = ["--model", f"{real}/teacher", "--steps", "4", "--seq-len", "32", "--methods", "red"]
    words += ["--calibration-samples", "4", "--save-every", "2", "--learning-rate", "1e-3"]
    few = functools.partial(red.tiny_scores, count=3)  # the whole takes a minute
    monkeypatch.setattr(red, "tiny_scores", few)
    monkeypatch.setattr(red, "TINY_PAIRS", red.TINY_PAIRS[:5])
    script = f"import sys, functools; sys.path.insert(0, {str(HERE)!r}); import red\n"
    script += "red.tiny_scores = functools.partial(red.tiny_scores, count=3)\n"
    script += "red.TINY_PAIRS = red.TINY_PAIRS[:5]\n"
    (tmp_path / "few.py").write_text(f"{script}sys.exit(red.main())\n")
    one = [*words, "--batch-size", "2", "--grad-accum", "2", "--out", f"{tmp_path}/one"]
    assert red.main(one) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += [
        "--master_port",
        str(random.SystemRandom().randrange(20000, 60000)),
        str(tmp_path / "few.py"),
    ]
    command += [*words, "--batch-size", "2", "--out", f"{tmp_path}/two"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("training ") == 1  # one process speaks

    def compare():
        results = [summary_of(tmp_path / name)["red"] for name in ("one", "two")]
        for key in ("loss", "erank", "tokens"):
            assert results[0][key] == pytest.approx(results[1][key], rel=1e-4), key
        for key in ("pairs", "chains"):
            assert results[0][key] == results[1][key]
        lines = [(tmp_path / name / "red/metrics.jsonl").read_text() for name in ("one", "two")]
        for left, right in zip(
            *[map(json.loads, text.splitlines()) for text in lines], strict=True
        ):
            for key in {"step", "tokens", "loss", "kl", "alignment", "gradient_norm"} & left.keys():
                assert left[key] == pytest.approx(right[key], rel=1e-4), key

    compare()
    (tmp_path / "two/red/summary.json").unlink()
    (tmp_path / "two/red/checkpoints/step-0000004.pt").unlink()
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "step-0000002.pt" in ended.stdout and ended.stdout.count("going on") == 1
    compare()


# The command line -------------------------------------------------------------------------------


def bad_inputs():
    """(arguments, with {dir} for a folder of bad files; a word of the sentence), by name."""
    model = ["--model", "{dir}/teacher", "--data", "{dir}/data.txt", "--out", "{dir}/out"]
    model += ["--seq-len", "256"]
    yield "ratio of zero", ["--ratio", "0"], "ratio"
    yield "ratio above one", ["--ratio", "1.5"], "ratio"
    yield "ratio not a number", ["--ratio", "half"], "ratio"
    yield "ratio nan", ["--ratio", "nan"], "ratio"
    yield "no width at all", [*model, "--ratio", "0.01"], "ratio"
    yield "negative steps", ["--steps", "-1"], "steps"
    yield "zero batch", ["--batch-size", "0"], "batch-size"
    yield "short sequence", ["--seq-len", "1"], "seq-len"
    yield "learning rate", ["--learning-rate", "-1"], "learning-rate"
    yield "infinite learning rate", ["--learning-rate", "inf"], "learning-rate"
    yield "temperature", ["--temperature", "0"], "temperature"
    yield "temperature whose square is no number", ["--temperature", "1e300"], "temperature"
    yield "more than the teacher's positions", [*model, "--seq-len", "257"], "256 positions"
    yield "two temperatures", ["--temperature", "1", "2"], "2"
    yield "alpha", ["--alpha", "-0.1"], "alpha"
    yield "one calibration sample", ["--calibration-samples", "1"], "calibration-samples"
    yield "unknown flag", ["--frobnicate"], "frobnicate"
    yield "misspelt flag", ["--learning-rat", "1"], "--learning-rate"
    yield "abbreviated flag", ["--rat", "0.5"], "--ratio"
    yield "beginning of a flag", ["--eval", "x.jsonl"], "--eval-data"
    yield "stray word", ["train"], "train"
    yield "unknown method", ["--methods", "magic"], "magic"
    yield "twice the same method", ["--methods", "lrc", "lrc"], "once each"
    yield "data without a model", ["--data", "x.txt"], "--model"
    yield "empty model", ["--model", ""], "--model"
    yield "empty data", [*model, "--data", ""], "is empty"
    yield "a folder like a pattern", [*model, "--data", "{dir}/a[1]"], "rename"
    yield "empty out", [*model, "--out", ""], "--out"
    yield "questions for the tiny world", ["--eval-data", "x.jsonl"], "--eval-data"
    given = ["--eval-data", "{dir}/broken/../data.txt"]
    yield "problems for a tiny teacher", ["--model", "{dir}/teacher", *given], "tiny world"
    yield "an evaluation of nothing", [*model, "--eval-problems", "0"], "eval-problems"
    yield "problems that are trained on", [*model, *given], "trained on"
    yield "no folder", ["--model", "{dir}/nothing"], "nothing"
    yield "hub out of reach", ["--model", "nobody/nothing"], "nobody/nothing"
    yield "folder without config", ["--model", "{dir}"], "config.json"
    yield "unsupported model", ["--model", "{dir}/gpt2"], "gpt2"
    yield "mixture of experts", ["--model", "{dir}/mixtral"], "mixtral"
    yield "quantised model", ["--model", "{dir}/quantised"], "quantised"
    yield "broken config", ["--model", "{dir}/broken"], "config"
    yield "truncated weights", [*model, "--model", "{dir}/truncated"], "truncated"
    yield "no weights", [*model, "--model", "{dir}/weightless"], "model.safetensors"
    sources = {"missing.txt": "no file", "empty.txt": "empty", "binary.txt": "binary.txt"}
    sources |= {"broken.jsonl": "broken.jsonl", "broken.parquet": "broken.parquet"}
    sources |= {"fields.jsonl": "body", "short.txt": "short", "data.csv": ".jsonl"}
    sources |= {"numbers.jsonl": "row 1", "nulls.jsonl": "short", "packed.jsonl.gz": "no file"}
    for name, word in sources.items():
        yield f"data {name}", [*model, "--data", "{dir}/" + name], word
    yield "data out of reach", [*model, "--data", "nobody/nothing"], "--data"
    yield "no problems", [*model, "--eval-data", "{dir}/short.txt"], "<<48/2=24>>"
    made = ["toothless", "tokenless", "oversized", "nan", "adapter", "deeper", "pickled"]
    for name in (*made, "beyond", "reshaped"):
        yield f"teacher {name}", [*model, "--model", "{dir}/" + name], name
    yield "out is a link to nothing", [*model, "--out", "{dir}/dangling"], "cannot be made"
    yield "out is a file", [*model, "--out", "{dir}/data.csv"], "is a file"
    yield "out is a stranger's", [*model, "--out", "{dir}/broken"], "RED"


@pytest.fixture(scope="module")
def bad(tmp_path_factory, real):
    folder = tmp_path_factory.mktemp("bad")
    names = ["teacher", "truncated", "weightless", "tokenless", "toothless", "oversized", "nan"]
    for name in (*names, "adapter", "deeper", "pickled", "beyond", "reshaped"):
        shutil.copytree(real / "teacher", folder / name)
    weights = folder / "truncated/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (folder / "weightless/model.safetensors").unlink()
    weights = folder / "pickled/pytorch_model.bin"
    edit_weights(folder / "pickled", lambda tensors: torch.save(tensors, weights))
    (folder / "pickled/model.safetensors").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "tokenless" / name).unlink()
    vocabulary = json.loads((folder / "teacher/tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["A"] = 45
    (folder / "oversized/tokenizer.json").write_text(json.dumps(vocabulary))
    vocabulary["model"]["vocab"] = {"\n": 0}
    (folder / "toothless/tokenizer.json").write_text(json.dumps(vocabulary))
    edit_weights(folder / "nan", lambda weights: weights["model.norm.weight"].fill_(math.nan))
    (folder / "adapter/adapter_config.json").write_text("{}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "beyond")
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(folder / "beyond")
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder / "reshaped", lambda w: w.update({name: w[name][:8].clone()}))
    copied = "model.layers.7.mlp.up_proj.weight"
    edit_weights(folder / "deeper", lambda w: w.update({copied: w[copied.replace("7", "1")] + 0}))
    config = json.loads((folder / "teacher/config.json").read_text())
    changes = {"gpt2": {"model_type": "gpt2"}, "mixtral": {"model_type": "mixtral"}}
    changes["quantised"] = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    for name, change in changes.items():
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
    (folder / "nulls.jsonl").write_text('{"text": null}\n' * 30)
    (folder / "fields.jsonl").write_text('{"body": "1+1"}\n' * 30)
    (folder / "packed.jsonl.gz").write_bytes(b"1+1")
    (folder / "short.txt").write_text("1+1\n\n2+2")
    (folder / "a[1]").mkdir()
    (folder / "a[1]/data.txt").write_text("1+1\n" * 99)
    (folder / "dangling").symlink_to(folder / "nowhere")
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


BAD_CONFIGS = ["{", "[]", '{"model_type": "gpt2", "vocab_size": 45}']
BAD_CONFIGS += ['{"model_type": "llama", "vocab_size": 7}']
BAD_CONFIGS += ['{"model_type": "llama", "vocab_size": 45, "hidden_size": "x"}']


@pytest.mark.parametrize("text", BAD_CONFIGS)
def test_a_broken_tiny_config_gets_one_sentence(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(red, "TINY_CONFIG", tmp_path / "tiny_config.json")
    red.TINY_CONFIG.write_text(text)
    assert red.main([]) == 2
    said = capsys.readouterr().err
    assert "tiny_config" in said and said.count("\n") == 1
    assert "gpt2" not in text or "model_type" in said
    assert '"vocab_size": 7' not in text or "vocab_size" in said


def test_the_program_itself_exits_with_2_and_no_traceback(tmp_path):
    command = [sys.executable, str(Path(red.__file__)), "--ratio", "7"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr == "red.py: --ratio must lie in (0, 1], got 7.0.\n"


def test_the_tiny_world_and_real_text_have_their_own_defaults(real):
    tiny, text = red.parse_arguments([]), red.parse_arguments(["--model", "x"])
    assert tiny.methods == ["red", "lrc"] and text.methods == ["red"]
    assert (tiny.steps, text.steps) == (100, 1000)
    assert (tiny.data, text.data) == (None, "HuggingFaceFW/fineweb-edu:sample-10BT")
    assert (tiny.out, text.out) == ("runs/tiny", "runs/x")
    assert (tiny.eval_data, text.eval_data) == (None, "openai/gsm8k:main:test")
    local = red.parse_arguments(["--model", f"{real}/teacher", "--data", f"{real}/data.txt"])
    assert (
        local.eval_data is None
        and local.out == "runs/teacher-data-" + str(real).replace("/", "-") + "-data.txt"
    )
    assert red.parse_arguments(["--steps", "1000"]).steps == 1000  # given, if it is a default
    lines = red.parse_arguments(["--model", f"{real}/teacher"])
    assert lines.data is None and lines.steps == 100 and lines.out == "runs/teacher"


def test_help_says_what_there_is(capsys):
    with pytest.raises(SystemExit):
        red.parse_arguments(["--help"])
    said = capsys.readouterr().out
    assert all(re.search(rf"^  {method}  ", said, re.MULTILINE) for method in METHODS)
    assert "--batch-size" in said and "--batch_size" not in said and "(default: 0.0003)" in said
    assert said.count("python red.py") > 3 and "learning_rate 0.01" in said
    groups = ["teacher and students:", "text:", "training:", "evaluation:", "output:"]
    assert [line for line in said.splitlines() if line in groups] == groups
    flags = re.findall(r"^  --([a-z-]+) ", said, re.MULTILINE)
    assert sorted(flags) == sorted(name.replace("_", "-") for name in vars(red.Config()))


def test_the_readmes_picture_is_drawn_from_what_a_run_leaves(tmp_path):
    """Two seeds: the band goes from the least to the most; the axes say what is asked how."""
    pytest.importorskip("matplotlib")
    for seed, share in enumerate((0.2, 0.4)):
        erank = {"held_out": {"erank": [1.0, 2.0, 3.0 + seed]}}
        row = {"pairs": {"chosen": share, "written": 0}, "chains": {"written": [share] * 5}}
        row |= {
            "hidden_size": 48,
            "parameters": 1000,
            "curve": [{"step": s} | erank for s in (0, 5)],
        }
        (tmp_path / f"{seed}").mkdir()
        rows = {"teacher": row, "red": row, "lrc": row}
        (tmp_path / f"{seed}/summary.json").write_text(json.dumps(rows))
    command = [sys.executable, str(HERE / ".github/draw.py"), "0", "1"]
    subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | {"MPLBACKEND": "agg"})
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"


# Pieces to copy, and the README -----------------------------------------------------------------

SOURCE = Path(red.__file__).read_text()
README = (HERE / "README.md").read_text()
SECTIONS = {
    part.partition(" =")[0].partition(" (")[0]: f"# {part}" for part in SOURCE.split("# ==== ")[1:]
}
MODULES = {name: getattr(red, name) for name in ("contextlib", "dataclasses", "itertools", "math")}
MODULES |= {"torch": torch, "time": time, "F": torch.nn.functional}


def copied():
    """A namespace with the method alone, and in each section no more than its comment names."""
    space = {}
    names = ["Effective rank", "Looking inside a model", "Calibration and selection"]
    names += ["The projected student and its merge", "Losses", "One step, and the loop"]
    for name in names:
        comment = " ".join(re.findall(r"^# (.*)$", SECTIONS[name].split("\n\n")[0], re.MULTILINE))
        needs = re.search(r"To copy it: (.*?)\.$", comment).group(1)
        wanted = {key: MODULES[key] for key in re.findall(r"\w+", needs) if key in MODULES}
        own = wanted if "above" not in needs else space | wanted
        exec(SECTIONS[name], own)
        space |= own
    return space


def test_the_method_runs_alone_with_what_its_comments_name():
    space = copied()
    teacher = make_teacher()
    calibration = space["calibrate"](teacher, SAMPLES, 16)
    model = AutoModelForCausalLM.from_config(red.student_config(teacher.config, 16))
    student = space["initial_student"]("red", teacher, model, calibration)
    config = config_of(steps=3)
    batches = iter([make_batch(seed=s) for s in range(3)])
    records = list(space["distill"](teacher, student, batches, config, calibration.scales))
    assert len(records) == 3 and all(math.isfinite(record["loss"]) for record in records)
    assert space["effective_rank"](torch.eye(3)) == pytest.approx(3)


def test_the_method_is_whole_within_700_lines():
    assert SOURCE.index("# ==== The tiny world") > SOURCE.index("def distill(")
    assert SOURCE[: SOURCE.index("# ==== The tiny world")].count("\n") <= 700
    assert SOURCE.count("\n") <= 1650


@pytest.mark.parametrize("name", ["effective_rank", "select_channels", "selection_matrix",
    "principal_directions", "alignment_loss", "kl_and_cross_entropy",
    "learning_rate_at"])  # fmt: skip
def test_plain_functions_stand_alone(name):
    start = SOURCE.index(f"\ndef {name}(")
    space = {"torch": torch, "F": torch.nn.functional}
    exec(re.split(r"\n\n\n", SOURCE[start:])[0], space)
    x = torch.rand(4, 3)
    arguments = {"effective_rank": (x,), "select_channels": (x[:, 0], 2), "alignment_loss": (x, x)}
    arguments |= {"selection_matrix": (torch.tensor([0, 2]), 4)}
    arguments |= {"principal_directions": (x @ x.T, 2), "learning_rate_at": (0, config_of())}
    arguments |= {"kl_and_cross_entropy": (x, x, torch.zeros(4, dtype=torch.long), 2.0)}
    space[name](*arguments[name])


def snippets():
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_every_command_of_the_readme_is_one_that_red_understands():
    commands = [line for line in README.splitlines() if "red.py " in line and "--" in line]
    commands = [
        line for line in commands if re.match(r"(python|torchrun|for .*; do python) ", line)
    ]
    assert len(commands) > 6
    for line in commands:
        words = line.split("red.py ")[1].split("; done")[0].replace("$seed", "1").replace("...", "")
        config = red.parse_arguments(shlex.split(words.split("#")[0]))
        assert config.out


def test_every_snippet_of_the_readme_is_python_with_its_imports():
    assert len(snippets()) >= 3
    for text in snippets():
        compile(text, "README.md", "exec")
        names = set(re.findall(r"\bred\.(\w+)", text))
        assert not names or "import red" in text or ", red" in text
        assert all(hasattr(red, name) for name in names - {"py"}), names


def snippet_with(words):
    (text,) = [text for text in snippets() if words in text]
    return text


def test_the_snippet_to_copy_runs_as_it_stands(real, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(real / "teacher", tmp_path / "runs/tiny-llama-0")
    exec(snippet_with("student.model.save_pretrained"), {})
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").config.hidden_size == 48


def test_the_benchmark_measures_step_and_floor(tmp_path):
    """Its lines, on the tiny world's shape: the figures are the machine's."""
    (tmp_path / "bench.py").write_text(snippet_with("def floor"))
    command = [sys.executable, "bench.py", str(HERE / "tiny_config.json"), "2", "32"]
    where = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(HERE)}}
    ended = subprocess.run([*command, "step", "floor"], capture_output=True, text=True, **where)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step", "floor"]
    assert all(re.search(r": \d+\.\d\d s, peak of all \d+\.\d\d GiB$", line) for line in lines)


def test_the_penalty_for_projections_that_are_not_orthonormal(monkeypatch):
    """The README's subclass, the paper's other baseline: its gradient written out."""
    teacher = make_teacher(dtype=torch.float64)
    gradients = []
    for penalised in (False, True):
        if penalised:
            monkeypatch.setattr(red, "ProjectedStudent", red.ProjectedStudent)  # and back
            exec(snippet_with("class Penalised"), {})
        student, _ = make_student(teacher, method="lrc")
        red.training_step(teacher, student, [make_batch()], config_of())
        gradients.append([projection.grad for projection in student.projections.values()])
    for plain, more, projection in zip(*gradients, student.projections.values()):
        error = projection.T @ projection - torch.eye(16)
        torch.testing.assert_close(more - plain, 0.01 * 4 * projection @ error)


def proxy():
    """The linear model of section 4, from the README."""
    space = {}
    exec(snippet_with("def linear_proxy"), space)
    assert space["basis"].shape == (32, 16)  # with the parts of the table
    return space["linear_proxy"]


def proxy_parts():
    """A frozen weight, white and coloured covariances, and two orthonormal bases, (12, 12)."""
    torch.manual_seed(0)
    weight, white = torch.randn(12, 12).double(), torch.eye(12).double()
    coloured = torch.logspace(0, -2, 12).double().diag()
    bases = [torch.linalg.qr(torch.randn(12, 12).double()).Q[:, :6] for _ in range(2)]
    return weight, white, coloured, *bases


def derivative(read, write, weight, covariance):
    """The largest derivative of a singular value at the start of the linear proxy."""
    values = proxy()(read, write, weight, covariance, 1, rate=1e-7)
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
    expected = torch.stack([torch.linalg.svdvals(factor) for factor in stepped])
    values = proxy()(basis, other, weight, coloured, 1, rate=0.01)
    assert torch.allclose(values[1], expected, atol=1e-12)
