"""The method as its tests state it, on tiny models built here, in the order of red.py.

    python -m pytest -q test_red.py

What is expected is written out here by hand: no oracle takes a name or a formula from red.py.
"""

import contextlib
import fcntl
import itertools
import json
import math
import multiprocessing
import os
import pty
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
import types
from pathlib import Path

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
    "llama-odd-head": dict(head_dim=10),
    "llama-rope": dict(rope_parameters=LLAMA3),
    "mistral": dict(sliding_window=6),
    "qwen2": {},
    "qwen2-tied": dict(tie_word_embeddings=True),
    "qwen2-windows": dict(use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": dict(head_dim=12, attention_bias=True),
}
SELECTIONS = ["red", "red-variance", "random-selection"]
ROTATIONS = ["pca", "orthogonal", "shared-orthogonal"]
METHODS = [*SELECTIONS, *ROTATIONS, "lrc"]
TWO = ("input_layernorm", "post_attention_layernorm")
NORMS = [f"model.layers.{i}.{name}" for i in (0, 1) for name in TWO] + ["model.norm"]
SEVEN = [f"self_attn.{name}_proj" for name in "qkvo"]
SEVEN += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
LINEAR = [f"model.layers.{i}.{name}" for i in (0, 1) for name in SEVEN]
WRITERS = ("o_proj", "down_proj")
every_family = pytest.mark.parametrize("family", FAMILIES)
MUON = dict(weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
both_optimizers = pytest.mark.parametrize("optimizer", ["adam", "muon"])


def make_teacher(family="llama", dtype=torch.float32):
    """A random teacher in which every norm gain and bias differs from its usual 1 or 0."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.split("-")[0], **SHAPE, **FAMILIES[family])
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
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(least, most, (rows, tokens), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


def uneven_batches():
    """Four batches with different numbers of labels and, in one, of tokens."""
    batches = [make_batch(2, seed=seed) for seed in range(3)] + [make_batch(1, 9)]
    batches[0]["labels"][0, :9] = -100
    batches[1]["labels"][1, 5] = -100
    return batches


# To calibrate on: sequences of several lengths and sizes, and a batch of two.
SAMPLES = [make_batch(1, 12, 0, 2, 30), make_batch(1, 7, 1, 30), make_batch(2, 9, 2, 2)]


def make_student(teacher, method="red", hidden_size=16, seed=0):
    calibration = red.calibrate(teacher, SAMPLES, hidden_size)
    return red.new_student(method, teacher, hidden_size, calibration, seed), calibration


def shaken(student):
    """The student as after some training: no longer a selection, nor orthonormal."""
    generator = torch.Generator().manual_seed(5)
    for parameter in student.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    student.merge()
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
    model(batch["input_ids"])
    for handle in hooks:
        handle.remove()
    return seen


def config_of(**settings):
    return red.Config(**{"steps": 100, "learning_rate": 1e-2} | settings)


def train(teacher, student, batches, config, scales=None, **options):
    return list(red.distill(teacher, student, iter(batches), config, scales, **options))


# Effective rank ---------------------------------------------------------------------------------


def effective_rank_by_hand(hidden):
    """Centre, scale each row to norm 1, squares of the singular values, their entropy."""
    rows = hidden.double() - hidden.double().mean(0)
    rows = rows / rows.norm(dim=1, keepdim=True)
    squares = torch.linalg.svdvals(rows).square()
    shares = (squares / squares.sum()).tolist()
    return math.exp(-sum(share * math.log(share) for share in shares if share > 0))


def test_effective_rank_closed_forms():
    for n in (2, 3, 8):  # the vertices of a regular simplex
        for simplex in (torch.eye(n), 7 + 3 * torch.eye(n).repeat(2, 1)):
            assert red.effective_rank(simplex) == pytest.approx(n - 1)
    clusters = torch.tensor([[1.0, 2, 3]] * 5 + [[-4.0, 0, 9]] * 2)
    assert red.effective_rank(clusters) == pytest.approx(1)
    for equal in (0.0, 0.1, 1e6, torch.tensor([0.1, 1e6, 3e-5])):  # no spectrum at all
        assert red.effective_rank(torch.ones(7, 3) * equal) == 0.0
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError):
            red.effective_rank(torch.tensor([[wrong, 1.0], [1.0, 2.0]]))


@pytest.mark.parametrize("tokens, width", [(300, 48), (20, 48)])
def test_effective_rank_agrees_with_an_svd_wherever_the_cloud_lies(tokens, width):
    """A skewed cloud far from 0: the order of centring and scaling matters."""
    generator = torch.Generator().manual_seed(0)
    skewed = torch.rand(tokens, width, generator=generator, dtype=torch.float64) ** 4
    hidden = skewed * torch.logspace(0, -2, width) + torch.linspace(-1, 1, width)
    expected = effective_rank_by_hand(hidden)
    assert 2 < expected < min(tokens, width) - 2
    moved = hidden + 100 * torch.randn(width, generator=generator, dtype=torch.float64)
    for same in (hidden, moved, 1e-9 * hidden, -1e9 * hidden, hidden.view(4, -1, width)):
        assert red.effective_rank(same) == pytest.approx(expected, rel=1e-6)
    assert red.effective_rank(hidden.float()) == pytest.approx(expected, rel=1e-4)


# Calibration and selection ----------------------------------------------------------------------


def importance_by_hand(teacher):
    """Eqs. 9-10: mean of |activation| over tokens, L2 norm over sequences, mean over layers."""
    layers = ["model.embed_tokens", "model.layers.0", "model.layers.1"]
    squares = {name: 0.0 for name in layers}
    for batch in SAMPLES:
        for sequence in batch["input_ids"]:
            seen = seen_by(teacher, layers, {"input_ids": sequence[None]})
            for name, (_, output) in seen.items():
                absolute = output[0].double().abs()
                squares[name] = squares[name] + (absolute.sum(0) / len(sequence)) ** 2
    return sum(square.sqrt() for square in squares.values()) / len(layers)


def best_channels(scores):
    return sorted(sorted(range(32), key=lambda channel: -scores[channel])[:16])


@every_family
def test_scores_and_scales_by_brute_force(family):
    """Of `red`; of `red-variance`, one channel at a time, in Python's own numbers; and the mean
    squares of the seven modules' outputs."""
    teacher = make_teacher(family)
    calibration, expected = red.calibrate(teacher, SAMPLES, 16), importance_by_hand(teacher)
    torch.testing.assert_close(calibration.importance.double(), expected, rtol=1e-5, atol=1e-6)
    assert calibration.bases["red"].argmax(0).tolist() == best_channels(expected.tolist())
    seen, total = [seen_by(teacher, NORMS + LINEAR, batch) for batch in SAMPLES], [0.0] * 32
    outputs = {name: torch.cat([part[name][1].flatten(0, 1) for part in seen]) for name in seen[0]}
    for name in NORMS:
        columns = [outputs[name][:, channel].double().tolist() for channel in range(32)]
        means = [sum(column) / len(column) for column in columns]
        variances = [sum((x - m) ** 2 for x in column) for column, m in zip(columns, means)]
        total = [old + new / sum(variances) for old, new in zip(total, variances)]
    assert calibration.bases["red-variance"].argmax(0).tolist() == best_channels(total)
    scales = {name: outputs[name].square().mean().item() for name in LINEAR}
    assert calibration.scales == pytest.approx(scales, rel=1e-5)


@every_family
def test_pca_takes_the_leading_eigenvectors_of_the_stream(family):
    """Of the sum of h h.T over tokens and norms, each token h at RMS 1."""
    teacher = make_teacher(family)
    basis = red.calibrate(teacher, SAMPLES, 16).bases["pca"].double()
    moment = torch.zeros(32, 32, dtype=torch.float64)
    for batch in SAMPLES:
        for stream, _ in seen_by(teacher, NORMS, batch).values():
            for h in stream.flatten(0, 1).double():
                h = h / (h.square().sum() / 32).sqrt()
                moment += torch.outer(h, h)
    torch.testing.assert_close(basis.T @ basis, torch.eye(16).double(), rtol=0, atol=1e-5)
    values, kept = torch.linalg.eigvalsh(moment), (basis.T @ moment @ basis).diagonal()
    torch.testing.assert_close(kept, values.flip(0)[:16], rtol=1e-4, atol=1e-3)


def test_selection():
    channels = red.select_channels(torch.tensor([3.0, 1.0, 2.0, 3.0, 2.0]), 3)
    selection = red.selection_matrix(channels, 5)  # of channels 0, 2 and 3: see its product
    assert torch.equal(torch.arange(5.0) @ selection, torch.tensor([0.0, 2.0, 3.0]))
    for wrong in (0, 5):
        with pytest.raises(ValueError):
            red.select_channels(torch.ones(4), wrong)


# The student ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*SELECTIONS, "pca", "shared-orthogonal"])
@every_family
def test_at_full_width_the_student_is_the_teacher(family, method):
    """Also with tied heads, biases and gains, and in the Llama that a Qwen2's student is."""
    teacher = make_teacher(family, torch.float64)
    student, _ = make_student(teacher, method, 32)
    got, expected = logits(student.model, make_batch()), logits(teacher, make_batch())
    near = dict(rtol=1e-6, atol=1e-5) if method in SELECTIONS else dict(rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(got, expected, **near)


@pytest.mark.parametrize("method", SELECTIONS)
@every_family
def test_at_the_start_a_selections_weights_are_the_teachers_cut_out(family, method):
    teacher = make_teacher(family)
    student, _ = make_student(teacher, method)
    kept = student.projections["model.embed_tokens"].argmax(0)
    original = dict(teacher.named_parameters())
    for name, weight in student.model.named_parameters():
        if name.removesuffix(".weight") in NORMS:
            continue  # see below
        expected = original.get(name)
        if expected is None:  # a Qwen2's student is a Llama
            assert name.endswith("o_proj.bias") and family in ("qwen2", "qwen2-tied")
            expected = torch.zeros(16)
        elif name.rpartition(".")[0].endswith(WRITERS):
            expected = expected[kept]
        elif expected.dim() == 2:
            expected = expected[:, kept]
        assert torch.equal(weight, expected), name


@pytest.mark.parametrize("method", METHODS)
def test_initial_gains_of_every_norm(method):
    """The teacher's on kept channels, 1 for rotations, times rms(kept) / rms(all); LRC has ones."""
    teacher = make_teacher("qwen2-tied")
    student, _ = make_student(teacher, method)
    basis = student.projections["model.embed_tokens"].detach()
    streams = [seen_by(teacher, NORMS, batch) for batch in SAMPLES]
    for name in NORMS:
        expected = torch.ones(16)
        if method not in ("lrc", "orthogonal"):
            h = torch.cat([seen[name][0].flatten(0, 1) for seen in streams])
            factor = (h @ basis).square().mean(-1).sqrt() / h.square().mean(-1).sqrt()
            if method in SELECTIONS:
                expected = teacher.get_submodule(name).weight[basis.argmax(0)]
            expected = factor.mean() * expected
            assert not 0.999 < factor.mean() < 1.001
        torch.testing.assert_close(student.gains[name].detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_where_projections_start(method):
    teacher = make_teacher()
    student, calibration = make_student(teacher, method)
    first, *others = student.projections.values()
    shared = all(torch.equal(first, other) for other in others)
    assert shared == (method not in ("lrc", "orthogonal"))
    if method == "lrc":  # N(0, 0.02) at a width of 3,072, and at any other of the same size
        entries = torch.cat([first, *others])
        size = 3072 * 0.02**2 / 32
        assert entries.square().mean().item() == pytest.approx(size, rel=0.06)
    else:
        for projection in (first, *others):
            gram = projection.T @ projection
            torch.testing.assert_close(gram, torch.eye(16), rtol=0, atol=1e-5)
    assert bool(((first == 0) | (first == 1)).all()) == (method in SELECTIONS)
    positive = 0
    for seed in range(30):
        again = red.new_student(method, teacher, 16, calibration, seed)
        again = again.projections["model.embed_tokens"]
        chosen = seed == 0 or method in ("red", "red-variance", "pca")
        assert torch.equal(again, first) == chosen
        positive += (again[0, 0] > 0).item()
    if method in ("orthogonal", "shared-orthogonal", "lrc"):  # no entry has a sign of its own
        assert 5 < positive < 25


class Projected(torch.nn.Module):
    """One matrix applied as the paper writes it: the teacher's, with its projection around it."""

    def __init__(self, layer, projection, writes=False, gain=1.0):
        super().__init__()
        self.layer, self.projection, self.writes, self.gain = layer, projection, writes, gain

    def forward(self, x):
        if self.writes:
            return self.layer(x) @ self.projection
        return self.layer(x @ self.projection.T * self.gain)


def wrap_in_projections(student, teacher, method):
    """Put the teacher's modules, each in its projection, and the gains into the student's model:
    plain autograd then reaches all that learns, and there is nothing to merge."""

    def gain_of(norm):
        return teacher.get_submodule(norm).weight if method in ROTATIONS else 1.0

    embedding = student.projections["model.embed_tokens"]
    head = student.projections.get("lm_head", embedding)
    parts = {"lm_head": Projected(teacher.lm_head, head, gain=gain_of("model.norm"))}
    parts["model.embed_tokens"] = Projected(teacher.model.embed_tokens, embedding, True)
    for name in LINEAR:
        gain = gain_of(f"{name[:14]}.{TWO['mlp' in name]}")
        layer, writes = teacher.get_submodule(name), name.endswith(WRITERS)
        parts[name] = Projected(layer, student.projections[name], writes, gain)
    for name, module in parts.items():
        student.model.set_submodule(name, module)
    for name in NORMS:
        student.model.get_submodule(name).weight = student.gains[name]


@pytest.mark.parametrize("method", METHODS)
@every_family
def test_merged_is_projected_and_exported_is_merged(family, method, tmp_path):
    teacher = make_teacher(family, torch.float64)
    student, batch = shaken(make_student(teacher, method)[0]), make_batch()
    merged = logits(student.model, batch)
    red.export_student(student, red.Task(teacher, red.tiny_tokenizer()), tmp_path)
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    torch.testing.assert_close(logits(reopened, batch), merged, rtol=0, atol=0)
    tied = "tied" in family and method not in ROTATIONS
    assert reopened.config.tie_word_embeddings == tied == ("lm_head" not in student.projections)
    wrap_in_projections(student, teacher, method)
    torch.testing.assert_close(logits(student.model, batch), merged, rtol=1e-5, atol=1e-5)


@every_family
def test_a_student_has_an_ordinary_config_that_older_programs_read(family, tmp_path):
    teacher = make_teacher(family)
    teacher.config.quantization_config = {"quant_method": "gguf"}  # what it was read from
    student, _ = make_student(teacher)
    tokens = red.tiny_tokenizer()
    tokens.add_special_tokens({"extra_special_tokens": ["#"]})
    red.export_student(student, red.Task(teacher, tokens), tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    expected = teacher.config.to_dict() | {"hidden_size": 16, "quantization_config": None}
    expected["rope_theta"] = 5e3 if family == "llama-rope" else 1e4  # for transformers 4 and MLX
    expected["head_dim"] = {"llama-odd-head": 10, "qwen3": 12}.get(family, 8)
    if family == "llama-rope":
        expected["rope_scaling"] = LLAMA3
    if family in ("qwen2", "qwen2-tied"):
        expected |= dict(model_type="llama", attention_bias=True, mlp_bias=False)
        expected |= dict(architectures=["LlamaForCausalLM"], pretraining_tp=1)
    assert stored.pop("architectures") == [type(student.model).__name__] and stored.pop("dtype")
    assert {key for key, value in stored.items() if value != expected.get(key)} == set()
    assert {"rope_theta", "head_dim"} <= stored.keys() and "quantization_config" not in stored
    assert ("rope_scaling" in stored) == (family == "llama-rope")
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    names = (tokenizer["tokenizer_class"], tokenizer["additional_special_tokens"])
    assert names == ("PreTrainedTokenizerFast", ["#"]) and "extra_special_tokens" not in tokenizer
    reopened = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert reopened("7+")["input_ids"] == [7, 10] and not list(tmp_path.glob("*.py"))


def test_the_width_nearest_to_a_ratio_obeys_the_family():
    """A Llama's is a multiple of its heads, of which these teachers have four."""
    for family in FAMILIES:
        config = make_teacher(family).config
        free = family in ("mistral", "qwen2-windows", "qwen3")
        for wanted, given in {14: 16, 15: 16, 17: 16, 32: 32}.items():
            assert red.student_width(wanted / 32, config) == (wanted if free else given), family
        assert red.student_width(0.01, config) == (1 if free else 4)  # never none


# Losses -----------------------------------------------------------------------------------------


def losses_by_hand(student_logits, teacher_logits, labels, temperature):
    """KL and cross-entropy written out, one token at a time: two sums."""
    kl, cross_entropy = 0.0, 0.0
    for row in range(labels.shape[0]):
        for position in range(labels.shape[1] - 1):
            label = labels[row, position + 1]
            if label == -100:
                continue
            q, p = student_logits[row, position].double(), teacher_logits[row, position].double()
            log_q, log_p = (q / temperature).log_softmax(-1), (p / temperature).log_softmax(-1)
            kl = kl + temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
            cross_entropy = cross_entropy - q.log_softmax(-1)[label]
    return kl, cross_entropy


def random_tensors(*sizes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 40.0])
@pytest.mark.parametrize("tokens_at_once", [1, 8, 1000])
def test_distillation_loss_and_its_gradients(tokens_at_once, temperature, dtype, monkeypatch):
    """Against plain autograd in float64, where some tokens have no label, and where none has."""
    monkeypatch.setattr(red, "LOGITS_AT_ONCE", 30 * tokens_at_once)
    tensors = random_tensors((2, 33, 8), (30, 8), (2, 33, 16), (30, 16), dtype=dtype)
    labels = torch.randint(0, 30, (2, 33), generator=torch.Generator().manual_seed(0))
    labels[0, :3] = labels[1, 5] = -100
    got = red.distillation_loss(*tensors, labels, temperature)
    none = red.distillation_loss(*tensors, torch.full_like(labels, -100), temperature)
    assert all(value.abs().max() == 0 for value in none)
    hidden, head, *teachers = [tensor.double() for tensor in tensors]
    hidden.requires_grad_()
    head.requires_grad_()
    terms = losses_by_hand(hidden @ head.T, teachers[0] @ teachers[1].T, labels, temperature)
    gradients = torch.autograd.grad(sum(terms), (hidden, head))
    for value, expected in zip(got, [*terms, *gradients], strict=True):
        tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        assert (value.double() - expected).norm() < tolerance * expected.norm()


def test_alignment_is_half_the_squared_distance():
    student, narrow, wide, projection = random_tensors((2, 5, 6), (2, 5, 6), (2, 5, 9), (9, 6))
    both = student.requires_grad_(), projection.requires_grad_()  # which learn, both
    for error, target, learning in (
        (red.alignment_error(student, narrow), narrow, both[:1]),
        (red.alignment_error(student, wide, projection), wide @ projection, both),
    ):
        expected = (student - target).square().sum() / 2
        assert error.item() == pytest.approx(expected.item())
        got = torch.autograd.grad(3 * error, learning)
        torch.testing.assert_close(got, torch.autograd.grad(3 * expected, learning))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alignment_of_many_millions_of_numbers_is_right_to_a_ten_thousandth(dtype):
    student = torch.randn(2, 2048, 4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = sum(row.double().square().sum().item() for row in student.flatten(0, 1)) / 2
    error = red.alignment_error(student, torch.zeros(1, dtype=dtype).expand_as(student))
    assert error.item() == pytest.approx(exact, rel=1e-4)


# One step, and the loop -------------------------------------------------------------------------


def step_by_hand(teacher, student, batches, config, scales):
    """The terms of a step's loss and its gradients, by plain autograd in a wrapped student."""
    terms, count = dict.fromkeys(("kl", "cross_entropy", "alignment"), 0.0), 0
    for batch in batches:
        wanted = seen_by(teacher, [*LINEAR, "lm_head"], batch)
        seen = seen_by(student.model, [*LINEAR, "lm_head"], batch)
        both = seen["lm_head"][1], wanted["lm_head"][1]
        kl, cross_entropy = losses_by_hand(*both, batch["labels"], config.temperature)
        labels = int((batch["labels"][:, 1:] != -100).sum())
        for name in LINEAR:
            target = wanted[name][1]
            if name.endswith(WRITERS):
                target = target @ student.projections[name]  # which learns here, too
            error = (seen[name][1] - target).square().mean() / (scales[name] if scales else 1)
            terms["alignment"] = terms["alignment"] + labels * error
        terms["kl"] = terms["kl"] + kl
        terms["cross_entropy"] = terms["cross_entropy"] + cross_entropy
        count += labels
    terms = {name: total / count for name, total in terms.items()}
    terms["loss"] = terms["kl"] + terms["cross_entropy"] + config.alpha * terms["alignment"]
    gradients = torch.autograd.grad(terms["loss"], student.parameters())
    return {name: value.item() for name, value in terms.items()}, gradients


@pytest.mark.parametrize("method", ["red", "pca", "orthogonal"])
@every_family
def test_the_gradients_of_a_step_are_those_of_the_formulas(family, method):
    """Over micro-batches of different sizes, each of which counts as its labels do, in float64."""
    teacher = make_teacher(family, torch.float64)
    student, calibration = make_student(teacher, method)
    scales = calibration.scales if method == "red" else None
    config, batches = config_of(temperature=2.0, alpha=0.3), uneven_batches()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    totals = red.training_step(teacher, shaken(student), iter(batches), config, scales)
    got = [parameter.grad for parameter in student.parameters()]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    matrices = 1 + len(LINEAR) + ("tied" not in family or method != "red")
    assert len(got) == matrices + len(NORMS) and totals["tokens"] == 3 * 24 + 9
    wrap_in_projections(student, teacher, method)
    terms, gradients = step_by_hand(teacher, student, batches, config, scales)
    for name, value in terms.items():
        assert totals[name].item() == pytest.approx(value), name
    for gradient, expected in zip(got, gradients, strict=True):
        assert expected.abs().max() > 0
        # The norms of transformers compute in float32, whatever comes in.
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


@every_family
def test_fused_norms_compute_what_those_of_transformers_do(family):
    teacher, ids = make_teacher(family), make_batch()["input_ids"]
    expected = teacher(ids).logits
    red.fuse_norms(teacher)
    assert torch.allclose(teacher(ids).logits, expected, atol=1e-4, rtol=1e-4)
    teacher.model.norm.weight.data *= 2  # as merging changes them
    torch.testing.assert_close(teacher(ids).logits, 2 * expected, atol=1e-4, rtol=1e-4)


def test_no_micro_batch_is_read_before_it_is_needed():
    teacher, seen = make_teacher(), []
    student, _ = make_student(teacher)
    teacher.model.register_forward_hook(lambda *_: seen.append("a batch"))

    def batches():
        for number in itertools.count():
            assert len(seen) == number
            yield make_batch(seed=number)

    for _ in red.distill(teacher, student, batches(), config_of(steps=2, grad_accum=3)):
        assert len(seen) in (3, 6)
    with pytest.raises(ValueError, match="no batch"):  # those that end early are no training
        train(teacher, student, [make_batch()], config_of(steps=3))


def adam_step(parameter, gradient, state, number, rate):
    first, second = state.setdefault(parameter, [torch.zeros_like(gradient) for _ in range(2)])
    first.copy_(0.9 * first + 0.1 * gradient)
    second.copy_(0.999 * second + 0.001 * gradient**2)
    unbiased = second / (1 - 0.999**number)
    parameter.data -= rate * first / (1 - 0.9**number) / (unbiased.sqrt() + 1e-8)


def muon_step(parameter, gradient, state, number, rate):
    muon = state.setdefault(parameter, torch.optim.Muon([parameter], **MUON))
    parameter.grad, muon.param_groups[0]["lr"] = gradient.clone(), rate
    muon.step()


@both_optimizers
@pytest.mark.parametrize("method", ["red", "pca"])
def test_training_is_a_reference_written_out(method, optimizer):
    """Three steps of a student that is never merged: autograd through the projections, clipping at
    1, warm-up and decay, then Adam or Muon written out, without any weight decay."""
    teacher = make_teacher("llama-biases", torch.float64)
    config = config_of(steps=400, learning_rate=0.02, grad_accum=2, alpha=4.0, optimizer=optimizer)
    batches = [*uneven_batches(), make_batch(2, seed=7), make_batch(1, seed=8)]
    student, calibration = make_student(teacher, method)
    steps = red.distill(teacher, student, iter(batches), config, calibration.scales)
    other, _ = make_student(teacher, method)
    wrap_in_projections(other, teacher, method)
    state, rates = {}, [0.5 * 0.02, 0.02 * 399 / 400, 0.02 * 398 / 400]
    for number, (rate, record) in enumerate(zip(rates, steps), 1):
        pair = batches[2 * number - 2 : 2 * number]
        terms, gradients = step_by_hand(teacher, other, pair, config, calibration.scales)
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
        assert 1.5 < norm < 90
        expected = terms | {"gradient_norm": norm, "learning_rate": rate, "step": number}
        for name, value in expected.items():
            assert record[name] == pytest.approx(value, rel=1e-5), name
        errors = []
        for parameter, got, gradient in zip(other.parameters(), student.parameters(), gradients):
            old = parameter.detach().clone()
            step = muon_step if optimizer == "muon" and parameter.dim() == 2 else adam_step
            step(parameter, gradient / norm, state, number, rate)
            errors.append(((got - parameter).norm() / (parameter - old).norm()).item())
            parameter.data.copy_(got)
        # Now and then a bfloat16 of Muon's is rounded the other way.
        assert sum(errors) / len(errors) < (5e-3 if optimizer == "muon" else 1e-5)


def test_muon_is_that_of_torch_for_any_number_of_matrices():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(24, 10)) for _ in range(33)]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    optimizers = [red.Muon(ours), torch.optim.Muon(theirs, **MUON)]
    for rate in (0.3, 0.2, 0.1):
        for one, other in zip(ours, theirs):
            one.grad = other.grad = torch.randn(24, 10)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=1e-2, rtol=0)


@both_optimizers
def test_steps_that_are_not_finite_change_nothing_and_ten_in_a_row_end_the_run(optimizer):
    teacher = make_teacher()
    student, _ = make_student(teacher)
    bad, records, seen = {1, 2, *range(5, 16)}, [], []
    gain, config = teacher.model.norm.weight[0].item(), config_of(steps=20, optimizer=optimizer)

    def batches():
        for number in itertools.count():
            teacher.model.norm.weight[0] = math.nan if number in bad else gain
            seen.append([parameter.detach().clone() for parameter in student.parameters()])
            yield make_batch(seed=number)

    with pytest.raises(FloatingPointError, match="learning-rate"):
        for record in red.distill(teacher, student, batches(), config):
            records.append(json.loads(json.dumps(record)))
    assert [record["skipped"] for record in records] == [i in bad for i in range(14)]
    assert records[1]["loss"] is None and "NaN" not in json.dumps(records)
    for number, (before, after) in enumerate(itertools.pairwise(seen)):
        for old, new in zip(before, after):
            assert torch.equal(old, new) == (number in bad)


@every_family
def test_no_types_are_mixed_in_bfloat16(family):
    """On the CPU, which refuses a product of two types."""
    teacher = make_teacher(family, torch.bfloat16)
    for method in ("red", "pca", "lrc"):
        student, calibration = make_student(teacher, method)
        optimizer = "muon" if method == "pca" else "adam"
        config = config_of(steps=2, temperature=2.0, optimizer=optimizer)
        records = train(teacher, student, [make_batch()] * 2, config, calibration.scales)
        assert all(not record["skipped"] for record in records)
        assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
        assert {parameter.dtype for parameter in student.model.parameters()} == {torch.bfloat16}
        assert math.isfinite(red.evaluate(student.model, [make_batch()])["loss"])
        final = [weight.clone() for weight in student.model.parameters()]
        student.merge()  # which changes nothing at the end of a loop
        assert all(map(torch.equal, student.model.parameters(), final))


def two_steps(optimizer, batches, each, rank=None, folder=None):
    """(records, parameters) of two steps on the same batches; or one of two processes does so."""
    if rank is not None:
        meet = f"file://{folder}/meet"
        torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    teacher = make_teacher(dtype=torch.float64)
    student, calibration = make_student(teacher)
    options = {"steps": 2, "temperature": 2.0, "alpha": 0.3, "grad_accum": each}
    config = config_of(optimizer=optimizer, **options)
    records = train(teacher, student, batches, config, calibration.scales)
    records = [{k: record[k] for k in record if "second" not in k} for record in records]
    result = records, [parameter.detach() for parameter in student.parameters()]
    if rank is not None:
        torch.save(result, folder / f"{rank}.pt")
    return result


@both_optimizers
def test_two_processes_are_one_on_the_whole_batch(optimizer, tmp_path):
    context, batches = multiprocessing.get_context("fork"), uneven_batches()
    halves = [(optimizer, batches[rank::2], 1, rank, tmp_path) for rank in (0, 1)]
    processes = [context.Process(target=two_steps, args=half) for half in halves]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    records, parameters = two_steps(optimizer, batches, 2)
    for rank in (0, 1):
        theirs, others = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(one == pytest.approx(two, rel=1e-6) for one, two in zip(records, theirs))
        torch.testing.assert_close(parameters, others, rtol=1e-6, atol=1e-7)


# The tiny world ---------------------------------------------------------------------------------

ALPHABET = "0123456789+-*=?;#:abcdefghijklmnopqrstuvwxyz\n"


def tiny_config(**changes):
    values = json.loads((HERE / "tiny_config.json").read_text()) | changes
    return AutoConfig.for_model(**values)


def solved(prompt):
    """The answer to `7+5-3=?`, as (parts, last digit)."""
    value, parts = int(prompt[0]), []
    for sign, digit in zip(prompt[1:-2:2], prompt[2:-2:2]):
        result = eval(f"({value}{sign}{digit})") % 10
        parts.append(f"{value}{sign}{digit}={result}")
        value = result
    return parts, value


def test_chains_are_right_and_a_slip_goes_on_consistently():
    for length in (1, 2, 3, 4, 5):
        prompt, answer = red.chain_text(*red.random_chain(length, random.Random(length)))
        parts, last = solved(prompt)
        assert len(parts) == length and answer == f"{';'.join(parts)}#{last}\n"
    chain = 7, [("+", 5), ("-", 3)]
    assert red.chain_text(*chain) == ("7+5-3=?", "7+5=2;2-3=9#9\n")
    assert red.chain_text(*chain, slip=0, amount=4)[1] == "7+5=6;6-3=3#3\n"
    assert red.chain_text(*chain, slip=1, amount=9)[1] == "7+5=2;2-3=8#8\n"


def test_tiny_batches_label_answers_only_and_repeat_with_the_seed():
    batch = next(red.tiny_batches(4, 96, "a"))
    assert torch.equal(next(red.tiny_batches(4, 96, "a"))["input_ids"], batch["input_ids"])
    assert not torch.equal(next(red.tiny_batches(4, 96, "b"))["input_ids"], batch["input_ids"])
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist()):
        text = "".join(ALPHABET[i] for i in ids)
        marks = "".join("." if label == -100 else ALPHABET[label] for label in labels)
        lines = text.splitlines()[:-1]  # the last is perhaps cut off
        expected = [re.sub(r"^[^?:]*[?:]", lambda m: "." * len(m[0]), line) for line in lines]
        assert marks.splitlines()[: len(lines)] == expected and len(lines) > 2


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_tiny_world_in_every_family(family, tmp_path):
    config = tiny_config(model_type=family, hidden_size=32, head_dim=8)
    red.tiny_teacher(config, 0, steps=2).save_pretrained(tmp_path)
    red.tiny_tokenizer().save_pretrained(tmp_path)
    teacher, tokenizer = red.load_teacher(str(tmp_path))
    assert teacher.config.model_type == family
    assert len(red.tiny_scores(teacher, tokenizer, count=2)["chains"]["written"]) == 5
    assert tokenizer(ALPHABET)["input_ids"] == [*range(45)]
    assert tokenizer.decode(range(45)) == ALPHABET


def test_the_tiny_worlds_questions_have_one_right_answer_and_three_wrong_ones():
    pairs, *chains = red.tiny_questions(20)
    assert len(pairs) == 60 and [len(group) for group in chains] == [20] * 5
    known = dict(red.TINY_PAIRS)
    for prompt, answers in pairs:
        assert answers[0] == known[prompt] and len(set(answers) & set(known.values())) == 4
    for prompt, (truth, *wrong) in sum(chains, []):
        parts, last = solved(prompt)
        assert truth == f"{';'.join(parts)}#{last}\n" and len({truth, *wrong}) == 4
        for answer in wrong:  # one result is wrong, and each goes on from the one before
            results = re.findall(r"(\d)(.)(\d)=(\d)", answer)
            right = [eval(f"({a}{sign}{b})") % 10 == int(c) for a, sign, b, c in results]
            assert len(results) == len(parts) and right.count(False) == 1
            assert all(left[3] == part[0] for left, part in itertools.pairwise(results))
            assert answer.endswith(f"#{results[-1][3]}\n") and len(answer) == len(truth)


def test_tiny_scores_are_of_exact_answers(monkeypatch):
    """A solver that errs in every fourth answer."""

    def solve(model, tokenizer, prompts, new_tokens):
        pairs = dict(red.TINY_PAIRS)
        answers = [pairs.get(prompt) or f"any#{solved(prompt)[1]}" for prompt in prompts]
        return [answer if i % 4 else f"{answer}?" for i, answer in enumerate(answers)]

    monkeypatch.setattr(red, "generate", solve)
    monkeypatch.setattr(red, "share_chosen", lambda model, tokenizer, group: len(group))
    scores = red.tiny_scores(None, red.tiny_tokenizer(), count=8)
    assert scores["pairs"] == {"chosen": 60, "written": 0.75}
    assert scores["chains"] == {"chosen": [8] * 5, "written": [0.75] * 5}


def test_red_keeps_more_effective_rank_than_lrc_and_pca_starts_lower():
    teacher = red.tiny_teacher(tiny_config(), 0, steps=200)
    samples = red.tiny_batches(16, 48, "samples")
    calibration = red.calibrate(teacher, list(itertools.islice(samples, 4)), 48)
    held_out, losses, kept = [next(samples)], {}, {}
    for method in ("red", "pca", "lrc"):
        student = red.new_student(method, teacher, 48, calibration)
        start = red.evaluate(student.model, held_out)
        batches = itertools.islice(red.tiny_batches(16, 48, "training"), 12)
        train(teacher, student, batches, config_of(steps=12), calibration.scales)
        end = red.evaluate(student.model, held_out)
        losses[method] = start["loss"], end["loss"]
        kept[method] = sum(end["erank"]) / sum(start["erank"])
    assert kept["lrc"] < kept["red"] and losses["red"][1] < losses["lrc"][1] - 0.3
    assert losses["pca"][0] < losses["red"][0] - 0.5


# Evaluation -------------------------------------------------------------------------------------


def test_evaluate_against_plain_formulas():
    teacher, batch = make_teacher(), make_batch()
    batch["labels"][0, :6] = -100
    result = red.evaluate(teacher, [batch])
    output = teacher(batch["input_ids"], output_hidden_states=True)
    targets = batch["labels"][:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), targets)
    first = output.hidden_states[1].flatten(0, 1)
    cosines = torch.nn.functional.cosine_similarity(first[:, None], first[None], dim=-1)
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert result["erank"][0] == pytest.approx(effective_rank_by_hand(first), rel=1e-5)
    assert result["similarity"][0] == pytest.approx(cosines.mean().item(), abs=1e-5)
    few = red.evaluate(teacher, [batch] * 3, tokens=10)  # for the ranks
    assert few["erank"][0] == pytest.approx(effective_rank_by_hand(first[:10]), rel=1e-5)


def tokenizer_of(kind, text):
    """Of characters; or of bytes, with tokens that straddle `=` and `>>`, prompt and answer."""
    if kind == "characters":
        vocabulary = {character: i for i, character in enumerate(sorted(set(text)))}
        tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        options = dict(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
        texts = ["=42>>42", "=84>>84", "2=8", *text.split("Question")]
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**options))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@torch.no_grad()
def greedy(model, ids, count):
    """Token by token, without a cache."""
    for _ in range(count):
        ids = [*ids, model(torch.tensor([ids])).logits[0, -1].argmax().item()]
    return ids[len(ids) - count :]


PROBLEMS = {
    "Question: two and 40?\nAnswer: ": "So 40+2 = <<40+2=42>>42 it is <<42*2=84>>84.\n#### 84",
    "Question: one?\nAnswer: ": "It is <<1=1>>1.",
    "Question: a <<1+1=2>> in the question?\nAnswer: ": "No <<2*2=4>>4 <<4-1=3>>3 <<3+9=12>>12",
}
CHOICES = {  # prompt: answers, the right one first
    "So 4": ["0+2 = 4", "0+2 = 84", "2=8"],
    "it is <<42*2": ["=84>>84", "=42>>42"],
    "two and 40?\nA": ["nswer: So", "84", ">>"],
    "is 4": ["2>>4", "0>>84", "+"],
}


def knowing(kind, epochs):
    """A tokenizer, and a model that knows some of the texts above."""
    texts = ["".join(problem) for problem in PROBLEMS.items()]
    tokenizer = tokenizer_of(kind, "".join(texts))
    torch.manual_seed(3)
    shape = SHAPE | dict(vocab_size=len(tokenizer), max_position_embeddings=256)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape)).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for text in texts * epochs:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tokenizer, model


@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_results_against_a_loop_that_lets_the_model_write_each(kind):
    """A result with the `>` after it, as who writes 42 for 4 is wrong; and every other token."""
    tokenizer, model = knowing(kind, 20)
    problems = [red.encode_answer(*problem, tokenizer) for problem in PROBLEMS.items()]
    results, others, straddling = [], [], 0
    for prompt, answer in PROBLEMS.items():
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
    assert (straddling > 0) == (kind != "characters") and len(results) == 6
    for batch_size in (1, 2, 3):
        scores = red.result_scores(model, problems, batch_size)
        assert scores["results"] == pytest.approx(sum(results) / len(results))
        assert scores["other_tokens"] == pytest.approx(sum(others) / len(others))
    assert 0 < scores["results"] < 1 and 0 < scores["other_tokens"] < 1


@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_what_is_chosen_is_the_likeliest_answer(kind):
    """A token that straddles prompt and answer is the answer's; a tie is not right."""
    tokenizer, model = knowing(kind, 2)
    right, straddling = [], 0
    for prompt, answers in CHOICES.items():
        scores = []
        for answer in answers:
            ids, _, places = tokenizer(prompt + answer, return_offsets_mapping=True).values()
            inside = [i for i, (_, end) in enumerate(places) if end > len(prompt)]
            straddling += places[inside[0]][0] < len(prompt)
            table = logits(model, {"input_ids": torch.tensor([ids])})[0].double().log_softmax(-1)
            scores.append(sum(table[i - 1, ids[i]].item() for i in inside))
        right.append(scores[0] == max(scores))
        assert red.share_chosen(model, tokenizer, [(prompt, answers)]) == right[-1]
    assert (straddling > 2) == (kind != "characters") and len(set(right)) == 2
    model.lm_head.weight.data.zero_()  # now every answer of a length is as likely
    assert red.share_chosen(model, tokenizer, [("So 4", ["0", "2"])] * 2) == 0


def test_generation_is_greedy_whatever_the_teachers_files_say():
    model, tokenizer = make_teacher("qwen3"), red.tiny_tokenizer()
    model.generation_config = transformers.GenerationConfig(do_sample=True, temperature=9.0)
    prompts, expected = ["1+2=?", "3*4=?", "7-7=?"], []
    for prompt in prompts:
        ids = greedy(model, [ALPHABET.index(character) for character in prompt], 12)
        expected.append("".join(ALPHABET[i] for i in ids[: [*ids, 44].index(44)] if i < 45))
    assert red.generate(model, tokenizer, prompts, 12) == expected


# Teachers and text ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A folder with a small 'real' teacher and its tokenizer, and data."""
    folder = tmp_path_factory.mktemp("real")
    red.tiny_teacher(tiny_config(), 0, steps=1).save_pretrained(folder / "teacher")
    red.tiny_tokenizer().save_pretrained(folder / "teacher")
    generator = random.Random(0)
    lines = ["".join(red.chain_text(*red.random_chain(3, generator))).strip() for _ in range(300)]
    (folder / "data.txt").write_text("\n\n".join(lines))
    rows = [json.dumps({"question": line, "answer": "#### 7"}) for line in lines]
    (folder / "data.jsonl").write_text("\n".join(rows))
    for number in range(12):  # the same in twelve files
        part = "\n".join(rows[25 * number : 25 * number + 25])
        make_files(folder, {f"twelve/{number:02}.jsonl": part})
    return folder


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weight(folder, module, value):
    """Put another matrix, or none, into a checkpoint."""
    weights = load_file(folder / "model.safetensors")
    weights[f"{module}.weight"] = value
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


LONG_ONE = "a line\n" * 200_000
LATE = '{"text": "a", "meta": null}\n' * 11_500 + '{"text": "b", "meta": "now a string"}'
MIXED = {"a.jsonl": '{"text": "A", "meta": 1}', "b.txt": "B\n\nC\nc", "c.txt": "D\nE"}
MIXED |= {"d.parquet": {"text": ["F"], "meta": [[1]]}, "e.jsonl": '{"text": "G", "meta": {}}'}
MIXED |= {"f/g.json": '[{"text": "H", "meta": "x"}]', "README.md": "no", "LICENSE": "no"}
MIXED |= {"License.txt": "no", ".cache/x.csv": "no", "readme.txt": "no"}
NUMBERS = '{"text": 12345678901234567890123}\n{"text": 2.50}\n{"text": 0}\n{"text": 1e3}'
BOOLQ, NO = '{"question": "is it so", "answer": false}', "Question: is it so\nAnswer: false"
HALF = '{"question": null, "answer": "b"}\n{"question": "a", "answer": 0}'
ASKED = {"question": ["a", "b"], "answer": [True, None]}
TEXTS = {  # name -> (files: content, or columns of a parquet; the texts of their documents)
    "paragraphs": ({"a.txt": "one\nand a half\n\ntwo\n"}, ["one\nand a half", "two"]),
    "lines": ({"a.txt": "one\ntwo\nthree\n"}, ["one", "two", "three"]),
    "a blank line with spaces": ({"a.txt": "one\n  half\n \t\ntwo"}, ["one\n  half", "two"]),
    "a byte order mark": ({"a.txt": "\ufeffone\n\ntwo"}, ["one", "two"]),
    "a mark in rows": ({"a.jsonl": '\ufeff{"text": "one"}'}, ["one"]),
    "a long first document": ({"a.txt": f"{LONG_ONE}\ntwo"}, [LONG_ONE.strip(), "two"]),
    "a folder": (MIXED, ["A", "B", "C\nc", "D", "E", "F", "G", "H"]),
    "a name like a pattern": ({"a[1].jsonl": '{"text": "one"}'}, ["one"]),
    "an array": ({"a.json": '[{"text": "one"}, {"text": null}, {"text": 2.50}]'}, ["one", "2.50"]),
    "no": ({"a.jsonl": BOOLQ}, [NO]),
    "numbers as written": ({"a.jsonl": NUMBERS}, ["12345678901234567890123", "2.50", "0", "1e3"]),
    "a date is a string": ({"a.jsonl": '{"text": "1910-07-01"}'}, ["1910-07-01"]),
    "null is empty": ({"a.jsonl": '{"text": null}\n{"text": " "}\n\n{"text": "b"}'}, ["b"]),
    "half a question": ({"a.jsonl": HALF}, ["Question: a\nAnswer: 0"]),
    "numbers of a parquet": ({"a.parquet": {"text": [0.0, 2.5, None]}}, ["0.0", "2.5"]),
    "answers of a parquet": ({"a.parquet": ASKED}, ["Question: a\nAnswer: true"]),
    "no rows": ({"a.parquet": {"text": []}, "b.txt": "one"}, ["one"]),
    "a needless column changes its type": ({"a.jsonl": LATE}, ["a"] * 11_500 + ["b"]),
}


def make_files(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            pyarrow.parquet.write_table(pyarrow.table(content), path)
        else:
            path.write_text(content, "utf-8")
    return str(path if len(files) == 1 else folder)


@pytest.mark.parametrize("name", TEXTS)
def test_text_as_people_have_it(name, tmp_path):
    files, expected = TEXTS[name]
    source = make_files(tmp_path, files)
    documents = list(red.open_documents(source, "--data"))
    assert [row["prompt"] + row["answer"] for row in documents] == expected
    assert all(set(row) == {"prompt", "answer"} for row in documents)
    if name == "a folder":
        pattern = list(red.open_documents(f"{source}/*.jsonl", "--data"))
        assert [row["answer"] for row in pattern] == ["A", "G"]


REFUSED = {  # name -> (files, what the sentence says)
    "a list": ({"a.jsonl": '{"text": "a"}\n{"text": ["a", "b"]}'}, r"row 2 of .*a\.jsonl.* list"),
    "an object": ({"a.jsonl": '{"question": "a", "answer": {"b": 1}}'}, "row 1 of .* dict"),
    "lists of a parquet": ({"a.parquet": {"text": [["a"]]}}, r"row 1 of .*a\.parquet.* list"),
    "chats": ({"a.jsonl": '{"text": "a"}\n{"messages": []}'}, "row 2 of .*it has messages"),
    "other columns": ({"a.parquet": {"body": ["a"], "id": [1]}}, "row 1 of .*it has body, id"),
    "no objects": ({"a.json": '["one"]'}, "row 1 of .*lacks a `text`"),
    "broken rows": ({"a.jsonl": '{"text": "a"}\n{"text": \n'}, r"cannot read .*a\.jsonl"),
    "a broken parquet": ({"a.parquet": "PAR1 nonsense PAR1"}, r"cannot read .*a\.parquet"),
    "another kind": ({"a.txt": "one", "b.csv": "text\ntwo"}, r"cannot read .*b\.csv; --data takes"),
    "a packed file": ({"a.jsonl.gz": "one"}, r"cannot read .*a\.jsonl\.gz; --data takes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_text_that_is_refused_by_row_and_type(name, tmp_path):
    files, expected = REFUSED[name]
    with pytest.raises(red.UserError, match=expected):
        list(red.open_documents(make_files(tmp_path, files), "--data"))


def text_of(batches):
    return "".join(ALPHABET[i] for batch in batches for i in batch["input_ids"].flatten())


def test_packing_loses_nothing_but_the_last_row_and_names_unknown_tokens():
    documents = [{"prompt": "ab", "answer": text} for text in ("c", "d\n", "efgh")]
    task = red.Task(make_teacher(), red.tiny_tokenizer())
    batches = list(red.packed(documents, task, 1, 6))
    assert [text_of([batch]) for batch in batches] == ["abc\nab", "d\nabef"]
    assert text_of(red.packed(documents, task, 2, 6)) == "abc\nabd\nabef"
    # Tokens that have no row in the embedding are no trouble until one is met.
    added = {"additional_special_tokens": ["<|user|>"], "pad_token": "<pad>"}
    task.tokenizer.add_special_tokens(added)
    task.teacher.config.vocab_size = 45  # as many as the alphabet has
    assert text_of(red.packed(documents, task, 2, 6)) == "abc\nabd\nabef"
    with pytest.raises(red.UserError, match="no row for token 46"):
        list(red.packed([{"prompt": "", "answer": "a<|user|>b"}], task, 1, 4))


def test_held_out_text_is_neither_trained_nor_calibrated_on(real, monkeypatch):
    """Over more than an epoch, in which all the rest is trained on."""
    twelve = (real / "data.txt").read_text().split()
    words = f"--model {real}/teacher --data {real}/twelve --seq-len 64 --batch-size 7"
    config = red.parse_arguments(words.split())
    task = red.open_task(config, config.model)
    batches = list(itertools.islice(red.training_batches(config, task), 50))
    trained, calibrated = text_of(batches), text_of(task.samples)
    assert sum(trained.count(line) >= 2 for line in twelve[30:]) > 50  # the data begins again
    assert twelve[0] in text_of(task.held_out) and twelve[30] not in text_of(task.held_out)
    assert not any(line in trained or line in calibrated for line in twelve[:30])
    assert all(line in trained for line in twelve[30:]) and twelve[30] in calibrated
    again = list(itertools.islice(red.training_batches(config, task), len(batches)))
    assert text_of(again) == trained
    seen = []  # each of two processes reads documents of its own, and together they read all
    for number in (0, 1):
        monkeypatch.setattr(red, "process", lambda number=number: (number, 2))
        text = text_of(itertools.islice(red.training_batches(config, task), 16))
        seen.append({line for line in twelve if line in text})
    assert len(seen[0] & seen[1]) < 10 and len(set(twelve[30:]) - seen[0] - seen[1]) < 9
    assert not (seen[0] | seen[1]) & set(twelve[:30])


# Runs and their folders -------------------------------------------------------------------------


def program(*words, folder=HERE, environment=os.environ):
    """A program of its own, ended, with its output."""
    options = {"capture_output": True, "text": True, "cwd": folder}
    options["env"] = environment | {"PYTHONPATH": str(HERE)}
    return subprocess.run([sys.executable, *map(str, words)], **options)


def run_of(real, out, words="", data="data.txt"):
    """A short run's command line; later words win."""
    small = "--steps 2 --batch-size 2 --seq-len 32 --calibration-samples 4"
    model = ["--model", f"{real}/teacher", "--data", f"{real}/{data}", "--out", f"{out}"]
    return [*model, *small.split(), *words.split()]


def test_rows_of_the_hub_keep_their_other_columns(real, monkeypatch):
    rows = datasets.Dataset.from_list([{"question": "7", "answer": "<<1=1>>11111111", "id": 3}] * 9)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows.to_iterable_dataset())
    words = "--data a/b --eval-data c/d --seq-len 16"
    config = red.parse_arguments(run_of(real, "out", words))
    assert len(red.open_task(config, config.model).problems) == 9


def rows_of(out):
    return json.loads((out / "summary.json").read_text())


def records_of(out, method="lrc"):
    path = out / method / "metrics.jsonl"
    return [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []


def test_a_run_leaves_what_it_promises(real, tmp_path, capsys):
    out = tmp_path / "run"
    assert red.main(run_of(real, out)) == 0
    names = {path.name for path in out.rglob("*")}
    assert names >= {*"settings.json summary.json red metrics.jsonl student checkpoints".split()}
    steps, rows = records_of(out, "red"), rows_of(out)
    assert [(step["step"], step["tokens"]) for step in steps] == [(0, 0), (1, 64), (2, 128)]
    assert all(step["loss"] > 0 for step in steps[1:])
    assert [len(step.get("held_out", {}).get("erank", [])) for step in steps] == [3, 0, 3]
    student = AutoModelForCausalLM.from_pretrained(out / "red/student")
    assert student.config.hidden_size == 48
    assert student.num_parameters() == rows["red"]["parameters"]
    assert rows["red"]["curve"] == [steps[0], steps[2]]
    card = (out / "red/student/README.md").read_text()
    assert f"{real}/teacher" in card and f"{rows['red']['loss']:.3f}" in card
    said = capsys.readouterr().out
    assert "width 48 of 96" in said and str(out) in said
    # The same command again; one more method; a damaged record; other settings.
    assert red.main(run_of(real, out)) == 0 and rows_of(out) == rows
    assert red.main(run_of(real, out, "--methods red lrc")) == 0
    assert list(rows_of(out)) == ["teacher", "red", "lrc"] and rows_of(out)["red"] == rows["red"]
    (out / "lrc/metrics.jsonl").write_text("{")
    assert red.main(run_of(real, out, "--methods lrc")) == 0 and len(records_of(out, "lrc")) == 3
    assert red.main(run_of(real, out, "--seed 1")) == 2
    assert "seed: 0 there, 1 here" in capsys.readouterr().err


def test_several_methods_share_one_table_and_the_seed_decides(real, tmp_path, capsys):
    """And so do other settings."""
    tables, losses = [], set()
    for out in ("a", "b"):
        assert red.main(run_of(real, tmp_path / out, f"--methods {' '.join(METHODS)}")) == 0
        rows, said = rows_of(tmp_path / "a"), capsys.readouterr().out.splitlines()
        tables.append([line for line in said if line.split()[:1] and line.split()[0] in rows])
    assert tables[0] == tables[1] and max(map(len, tables[0])) <= 100
    assert [line.split()[0] for line in tables[0][:8]] == ["teacher", *METHODS] == list(rows)
    assert all(f"{row['loss']:.3f}" in line for row, line in zip(rows.values(), tables[0]))
    changes = ["--alpha 0.9", "--seed 3", "--temperature 9", "--learning-rate 1e-2", "--ratio 0.33"]
    for change in (*changes, "--grad-accum 3", "--calibration-samples 2", "--optimizer muon"):
        assert red.main(run_of(real, tmp_path / change, change)) == 0
        losses.add(rows_of(tmp_path / change)["red"]["loss"])
    assert len(losses | {rows["red"]["loss"]}) == 9


def test_results_of_worked_problems_are_measured(real, tmp_path, capsys):
    rows = [{"question": "q", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}"} for i in range(9)]
    rows.insert(3, {"question": None, "answer": "nothing was asked"})  # left out
    make_files(tmp_path, {"problems.jsonl": "\n".join(map(json.dumps, rows))})
    shutil.copytree(real / "teacher", tmp_path / "teacher")
    letters = (real / "teacher/tokenizer.json").read_text()
    letters = letters.replace('"x":', '"<":').replace('"y":', '">":')
    make_files(tmp_path, {"teacher/tokenizer.json": letters})
    more = f"--model {tmp_path}/teacher --eval-data {tmp_path}/problems.jsonl --eval-problems 7"
    assert red.main(run_of(real, tmp_path / "out", more)) == 0
    said, rows = capsys.readouterr().out, rows_of(tmp_path / "out")
    assert "results right" in said and max(map(len, red.table(rows).splitlines())) <= 100
    for row in (*rows.values(), *[point["held_out"] for point in rows["red"]["curve"]]):
        assert 0 <= row["results"] <= 1 and 0 <= row["other_tokens"] <= 1


def test_the_tiny_worlds_teacher_is_shared_by_runs_side_by_side(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    honest, score = red.tiny_teacher, red.tiny_scores
    monkeypatch.setattr(red, "tiny_teacher", lambda config, seed: honest(config, seed, steps=3))
    monkeypatch.setattr(red, "tiny_scores", lambda model, words: score(model, words, count=3))
    monkeypatch.setattr(red, "TINY_PAIRS", red.TINY_PAIRS[:5])
    words = "--batch-size 2 --calibration-samples 2 --measure-every 0 --methods red --steps"
    # What a person tries first is never refused: each goes to a folder of its own.
    for change in ("1", "2", "1 --ratio 0.25", "1 --optimizer muon"):
        assert red.main([*words.split(), *change.split()]) == 0
        monkeypatch.setattr(red, "tiny_teacher", None)  # not needed again
    table = red.table(rows_of(*Path("runs").glob("tiny-*-steps-1")))
    assert "chains" in table and max(map(len, table.splitlines())) <= 100
    (teacher,) = [path.parent for path in Path("runs").glob("*/tokenizer.json")]
    assert len(list(Path("runs").iterdir())) == 5
    assert red.main([*words.split(), "1", "--out", str(teacher)]) == 2  # the teacher's own


def test_what_was_read_is_known_and_what_changed_or_is_missing_is_named(real, tmp_path, capsys):
    shutil.copytree(real / "teacher", tmp_path / "teacher")
    shutil.copy(real / "data.txt", tmp_path)
    words = run_of(tmp_path, tmp_path / "out")
    for name, flag in (("data.txt", "data"), ("teacher/config.json", "model")):
        path, content = tmp_path / name, (tmp_path / name).read_text()
        assert red.main(words) == 0
        path.write_text(content + "\n")
        assert red.main(words) == 2 and f"{flag} on disk" in capsys.readouterr().err
        path.write_text(content)
    (tmp_path / "data.txt").unlink()
    assert red.main(words) == 2 and "there, nothing here" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["embedding", "row", "gain", "outputs", "tied"])
def test_odd_teachers_are_no_trouble(real, tmp_path, change):
    """Zeros among the weights; a config of what to return, or of a tie that is none."""
    teacher = shutil.copytree(real / "teacher", tmp_path / "teacher")
    if change == "tied":
        edit_config(teacher, tie_word_embeddings=True)
    elif change == "outputs":
        edit_config(teacher, return_dict=False, output_hidden_states=True, output_attentions=True)
    else:
        value = {"gain": torch.zeros(96), "embedding": torch.zeros(45, 96)}
        value["row"] = torch.eye(45, 96).index_fill(0, torch.tensor(7), 0.0)
        name = NORMS[0] if change == "gain" else "model.embed_tokens"
        edit_weight(teacher, name, value[change])
    words = f"--model {teacher} --methods red red-variance pca --ratio 1 --steps 1"
    assert red.main(run_of(real, tmp_path / "out", words)) == 0
    rows = rows_of(tmp_path / "out")
    assert all(math.isfinite(row["loss"]) for row in rows.values())
    start = rows["red"]["curve"][0]["held_out"]["loss"]
    assert start == pytest.approx(rows["teacher"]["loss"], rel=1e-5)  # at full width


def test_the_curves_of_a_run_are_drawn(real, tmp_path):
    pytest.importorskip("matplotlib")
    script = str(HERE / ".github/draw.py")
    assert red.main(run_of(real, tmp_path / "out", "--methods red lrc")) == 0
    ended = program(script, tmp_path / "out", folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert [path.read_bytes()[:4] for path in tmp_path.rglob("*.png")] == [b"\x89PNG"]
    hidden = "import runpy, sys; sys.modules['matplotlib.figure'] = None; runpy.run_path"
    ended = program("-c", f"{hidden}({script!r})", folder=tmp_path)
    assert ended.returncode == 2 and ended.stderr.count("pip install matplotlib") == 1


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


def same_finish(a, b):
    weights = [(folder / "lrc/student/model.safetensors").read_bytes() for folder in (a, b)]
    assert weights[0] == weights[1]
    states = [torch.load(folder / "lrc/checkpoints/step-0000024.pt") for folder in (a, b)]
    for left, right in zip(*[state["student"] for state in states], strict=True):
        assert torch.equal(left, right)
    assert str(states[0]["optimizers"]) == str(states[1]["optimizers"])
    results = [records_of(folder) for folder in (a, b)]
    for record in itertools.chain(*results):
        record.pop("tokens_per_second", None)
    assert results[0] == results[1]
    assert [record["step"] for record in results[0]] == list(range(25))


@pytest.fixture(scope="module", params=["adam", "muon"])
def uninterrupted(request, real, tmp_path_factory):
    """The words of a run without --out, over the end of its short data, and its finished folder."""
    folder = tmp_path_factory.mktemp("long")
    make_files(folder, {"a.txt": "\n\n".join((real / "data.txt").read_text().split()[:20])})
    words = f"--data {folder}/a.txt --methods lrc --optimizer {request.param} --steps 24"
    words = run_of(real, folder / "whole", f"{words} --save-every 5 --measure-every 8")
    assert red.main(words) == 0
    return words, folder / "whole"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_broken_off_at_any_point_it_goes_on_to_the_same_bits(uninterrupted, tmp_path, number):
    """SIGTERM and SIGINT leave a checkpoint of the very step."""
    words, whole = uninterrupted
    words, out = [*words, "--out", f"{tmp_path}/out"], tmp_path / "out"
    for least in (3, 7, 16):
        code = forked(words, lambda least=least: len(records_of(out)) > least, number)
        assert code == (-number if number == signal.SIGKILL else 130)
        if code == 130:
            newest = max((out / "lrc/checkpoints").iterdir())
            assert newest.name == f"step-{records_of(out)[-1]['step']:07}.pt"
    assert forked(words) == 0
    same_finish(whole, out)
    assert len(list((out / "lrc/checkpoints").iterdir())) == 2


@pytest.mark.parametrize("uninterrupted", ["adam"], indirect=True)
@pytest.mark.parametrize("fault", ["flipped", "cut", "emptied", "full", "locked"])
def test_a_fault_is_one_sentence_and_loses_nothing(uninterrupted, tmp_path, fault, capfd):
    """A damaged checkpoint, a full disk, a second command at once."""
    words, whole = uninterrupted
    words, out = [*words, "--out", f"{tmp_path}/out"], tmp_path / "out"
    forked(words, (out / "lrc/checkpoints/step-0000010.pt").exists)
    newest = max((out / "lrc/checkpoints").glob("step-*.pt"))
    content, lock = bytearray(newest.read_bytes()), os.open(out, os.O_RDONLY)
    content[len(content) // 2] ^= 1
    damaged = {"flipped": content, "cut": content[:5000], "emptied": b""}.get(fault)
    told, options = f"{newest} is damaged", {}
    if damaged is not None:
        newest.write_bytes(damaged)
    elif fault == "full":
        told, options = "cannot write", {"largest_file": 200_000}
    else:
        told = f"another command works in {out}"
        fcntl.flock(lock, fcntl.LOCK_EX)
    before = {path: path.read_bytes() for path in out.rglob("step-*.pt")}
    capfd.readouterr()
    assert forked(words, **options) == 2
    said = capfd.readouterr().err.replace("\r", "\n")
    assert said.strip().splitlines()[-1].strip().startswith(f"red.py: {told}")
    assert "delete" not in said and "Traceback" not in said
    assert before == {path: path.read_bytes() for path in out.rglob("step-*.pt")}
    os.close(lock)
    if damaged is not None:
        newest.unlink()
    assert forked(words) == 0 and list(out.rglob("*.partial")) == []
    assert capfd.readouterr().out.count("going on from") == 1
    same_finish(whole, out)


FEW = """import functools, sys, red
red.tiny_teacher = functools.partial(red.tiny_teacher, steps=3)
red.tiny_scores = functools.partial(red.tiny_scores, count=3)
red.TINY_PAIRS = red.TINY_PAIRS[:5]
sys.exit(red.main())
"""


def test_torchrun_trains_resumes_and_measures_like_one_process(tmp_path):
    """Tiny-world lines, where two processes read just what one with twice the batch reads."""
    make_files(tmp_path, {"few.py": FEW})
    words = "few.py --steps 4 --methods red --calibration-samples 4 --batch-size 2 --save-every 2"
    words += " --measure-every 2 --learning-rate 1e-3"
    port = random.SystemRandom().randrange(20000, 60000)
    two = f"-m torch.distributed.run --nproc_per_node 2 --master_port {port} {words} --out runs/two"
    one = f"{words} --grad-accum 2 --out runs/one"
    for number, command in enumerate((one, two, two)):
        ended = program(*command.split(), folder=tmp_path)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count(" x cpu") == 1  # one process speaks
        assert ended.stdout.count("step-0000002.pt") == (number == 2)
        if number == 0:
            continue
        results = [rows_of(tmp_path / f"runs/{name}")["red"] for name in ("one", "two")]
        for key in ("loss", "erank"):
            assert results[0][key] == pytest.approx(results[1][key], rel=1e-4), key
        lines = [records_of(tmp_path / f"runs/{name}", "red") for name in ("one", "two")]
        for left, right in zip(*lines, strict=True):
            for key in {"step", "tokens", "loss", "kl", "alignment", "gradient_norm"} & left.keys():
                assert left[key] == pytest.approx(right[key], rel=1e-4), key
        (tmp_path / "runs/two/red/checkpoints/step-0000004.pt").unlink()


# The command line -------------------------------------------------------------------------------

WRONG = "ratio 0,ratio nan,ratio half,ratio,steps -1,batch-size 0,seq-len 1,learning-rate inf,"
WRONG += "calibration-samples 0,temperature 1e300,alpha -0.1,frobnicate,rat 0.5,methods magic"
BAD = """  # words | what the sentence says; MODEL: a teacher and its text, DIR: their folder
train | train
--optimizer sgd | 'muon'
--data x.txt | --model
--model '' | --model is empty
MODEL --data '' | --data is empty
MODEL --data DIR/data.txt DIR/short.txt | short.txt
MODEL --seq-len 257 | 256 positions
MODEL --eval-data DIR/data.txt | part of --data
MODEL --eval-data DIR/short.txt | <<48/2=24>>
MODEL --data DIR/short.txt | too short
MODEL --data DIR/binary.txt | binary.txt
MODEL --data nobody/nothing | nobody/nothing
MODEL --out DIR/dangling | cannot be made
MODEL --out DIR/short.txt/below | cannot be made
MODEL --out DIR/LONG | cannot be made
MODEL --out DIR/mine | no run of RED
MODEL --data DIR/mine/texts --out DIR/mine/texts | no run of RED
--model nobody/nothing | nobody/nothing
--model DIR | config.json"""
BAD_TEACHERS = {  # what is done to a copied teacher; the sentence has this name
    "gpt2": lambda folder: edit_config(folder, model_type="gpt2"),
    "quantised": lambda folder: edit_config(folder, quantization_config={"quant_method": "gptq"}),
    "down_proj": lambda folder: edit_weight(folder, LINEAR[-1], None),
    "up_proj": lambda folder: edit_weight(folder, LINEAR[-2], torch.ones(8)),
    "finite": lambda folder: edit_weight(folder, NORMS[2], torch.full((96,), math.nan)),
    "tokenless": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "oversized": lambda folder: tokenizer_of("characters", f"{ALPHABET}A").save_pretrained(folder),
    "truncated": lambda folder: os.truncate(folder / "model.safetensors", 5000),
    "pickled": lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory, real):
    folder = tmp_path_factory.mktemp("bad")
    files = {"empty.txt": "", "short.txt": "1+1\n\n2+2", "data.txt": "1+2=3\n" * 199}
    make_files(folder, files | {"mine/texts/a.txt": "1+2=3\n" * 199})
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    (folder / "dangling").symlink_to(folder / "nowhere")
    for name, change in {"teacher": bool, **BAD_TEACHERS}.items():
        shutil.copytree(real / "teacher", folder / name)
        change(folder / name)
    return folder


COMMANDS = [(f"--{words}", words.split()[0]) for words in WRONG.split(",")]
COMMANDS += [tuple(line.split(" | ")) for line in BAD.splitlines()[1:]]
COMMANDS += [(f"MODEL --model DIR/{name}", name) for name in BAD_TEACHERS]


@pytest.mark.parametrize("words, expected", COMMANDS)
def test_bad_input_gets_one_sentence(bad, words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(bad.rglob("*"))
    words = words.replace("MODEL", "--model DIR/teacher --data DIR/data.txt --seq-len 64")
    words = words.replace("LONG", "a" * 300)
    if "--out" in words:  # a folder is looked at before anything is loaded
        monkeypatch.setattr(red, "load_teacher", None)
    code = red.main(shlex.split(words.replace("DIR", str(bad))))
    said = capsys.readouterr().err
    assert re.fullmatch(r"red\.py: [^\n]+[.?]\n", said), said
    assert code == (1 if expected == "finite" else 2) and expected in said
    assert not re.search("Traceback|delete|weights_only", said) and sorted(bad.rglob("*")) == before
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_program_itself_ends_without_a_traceback(real, tmp_path):
    """After a mistake; and where stdout is closed, as some schedulers have it."""
    ended = program(HERE / "red.py", "--ratio", "7", folder=tmp_path)
    assert ended.stderr == "red.py: --ratio must lie in (0, 1], got 7.0.\n"
    assert (ended.returncode, ended.stdout) == (2, "")
    line = shlex.join([sys.executable, f"{HERE}/red.py", *run_of(real, tmp_path / "out")])
    ended = subprocess.run(["sh", "-c", f"exec {line} >&-"], stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    assert (tmp_path / "out/summary.json").is_file()


def test_a_models_own_code_never_runs_though_a_person_would_let_it(real, tmp_path):
    """At a terminal, where transformers would ask whether to."""
    shutil.copytree(real / "teacher", tmp_path / "teacher")
    edit_config(tmp_path / "teacher", model_type="own", auto_map={"AutoConfig": "own.Own"})
    make_files(tmp_path, {"teacher/own.py": f"open({str(tmp_path / 'ran')!r}, 'w')"})
    child, terminal = pty.fork()
    if child == 0:
        for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
            setattr(sys, name, open(number, "w" if number else "r", buffering=1))
        os._exit(red.main(run_of(tmp_path, tmp_path / "out")))
    os.write(terminal, b"y\ny\ny\n")
    said = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while True:
            said += os.read(terminal, 1000)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2, said
    assert b"red.py: cannot load" in said and b"[y/N]" not in said
    assert not (tmp_path / "ran").exists()


def test_the_tiny_world_and_real_text_have_their_own_defaults(real):
    tiny, text = red.parse_arguments([]), red.parse_arguments(["--model", "x"])
    assert [*tiny.methods, *text.methods] == ["red", "lrc", "red"]
    assert (tiny.steps, text.steps, tiny.out, text.out) == (100, 1000, "runs/tiny", "runs/x")
    assert (tiny.data, text.data) == (None, "HuggingFaceFW/fineweb-edu:sample-10BT")
    assert (tiny.eval_data, text.eval_data) == (None, "openai/gsm8k:main:test")
    assert (tiny.learning_rate, text.learning_rate) == (1e-2, 3e-4)
    words = ["--model", f"{real}/teacher", "--data", f"{real}/data.txt", "--alpha", "0.2"]
    local = red.parse_arguments([*words, "--optimizer", "muon"])
    assert local.eval_data is None and local.learning_rate > 3e-4
    data = f"{real}/data.txt".replace("/", "-")
    assert local.out == f"runs/teacher-data-{data}-optimizer-muon"


def test_help_says_what_there_is(capsys):
    with pytest.raises(SystemExit):
        red.parse_arguments(["--help"])
    said = capsys.readouterr().out
    assert all(re.search(rf"^  {method}  ", said, re.MULTILINE) for method in METHODS)
    assert all(f"--{name.replace('_', '-')} " in said for name in vars(red.Config()))


# Pieces to copy, and the README -----------------------------------------------------------------

SOURCE = (HERE / "red.py").read_text()
PAGES = [path for path in (HERE / "README.md", HERE / ".github/study.md") if path.exists()]
TEXT = "\n".join(path.read_text() for path in PAGES).replace("\\\n", " ")
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
WORDS = {"F": "import torch.nn.functional as F"}


def test_the_method_runs_alone_with_what_its_comments_name():
    """Six sections, from the effective rank to the loop, each with the imports of its banner."""
    whole, sections = {}, SOURCE.split("# ==== ")[2:8]
    assert [sections[0][:14], sections[-1][:8]] == ["Effective rank", "One step"]
    for section in sections:
        comment = " ".join(re.findall(r"^# (.*)$", section.split("\n\n")[0], re.MULTILINE))
        needs = re.search(r"To copy it: (.*?)\.$", comment).group(1)
        space = whole.copy() if "above" in needs else {}
        for word in re.findall(r"\w+", needs.partition("the section")[0].replace(" and ", " ")):
            exec(WORDS.get(word, f"import {word}"), space)
        exec(section.partition("\n")[2], space)
        whole |= space
    teacher = make_teacher()
    calibration = whole["calibrate"](teacher, SAMPLES, 16)
    student = whole["new_student"]("red", teacher, 16, calibration)
    config = types.SimpleNamespace(**vars(config_of(steps=3)))
    batches = itertools.repeat(make_batch())
    records = list(whole["distill"](teacher, student, batches, config, calibration.scales))
    assert len(records) == 3 and all(math.isfinite(record["loss"]) for record in records)
    assert whole["effective_rank"](torch.eye(3)) == pytest.approx(2)


def test_every_command_and_snippet_of_the_pages_is_one_that_red_understands():
    commands = re.findall(r"(?:python|torchrun)\b[^\n`]*? red\.py\b([^\n`#;|>&]*)", TEXT)
    assert len(commands) > 4
    for command in commands:
        words = shlex.split(command.replace("$seed", "1").replace("...", ""))
        assert "--help" in words or red.parse_arguments(words).out
    for text in SNIPPETS:
        compile(text, "README.md", "exec")
        names = set(re.findall(r"\bred\.(\w+)", text)) - {"py"}
        assert not names or re.search(r"^(import|from) .*\bred\b", text, re.MULTILINE)
        assert all(hasattr(red, name) for name in names), names


def test_the_snippet_to_copy_runs_as_it_stands(real, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # with a teacher and text in the places that it names
    (text,) = [text for text in SNIPPETS if "student.model.save_pretrained" in text]
    teacher = re.search(r"""(?:load_teacher|from_pretrained)\(["'](.*?)["']""", text)[1]
    shutil.copytree(real / "teacher", tmp_path / teacher)
    for name in re.findall(r"""["']([^"'\n]+\.(?:txt|jsonl))["']""", text):
        make_files(tmp_path, {name: (real / f"data{Path(name).suffix}").read_text()})
    exec(text, {})
    place = re.search(r"""student\.model\.save_pretrained\(["'](.*?)["']""", text)[1]
    assert AutoModelForCausalLM.from_pretrained(place).config.hidden_size < 96


def test_the_benchmark_takes_a_step_and_its_floor_in_turns():
    """Both optimisers; on a GPU, in bfloat16, where there is one."""
    script, names = HERE / ".github/bench.py", ["step", "muon", "floor"]
    ended = program(script, "tiny_config.json", 2, 32, *names, environment=OUTSIDE)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == names
    assert all(re.search(r": \d+\.\d+ s, .*GiB$", line) for line in lines)


def proxy_gradients(states, down, up):
    """Of |X - X Q O|^2 / 2n: that of Q is S (Q O - I) O.T, that of O is Q.T S (Q O - I)."""
    error = states.T @ states / len(states) @ (down @ up - torch.eye(len(down)).to(states))
    return error @ up.T, down.T @ error


def moving(states, *factors):
    """The largest derivative of a singular value of Q or O, under gradient flow."""
    values = torch.cat([torch.linalg.svdvals(factor) for factor in factors])
    pairs = zip(factors, proxy_gradients(states, *factors))
    stepped = torch.cat([torch.linalg.svdvals(factor - 1e-7 * step) for factor, step in pairs])
    return (stepped - values).abs().max().item() / 1e-7


def test_the_proxy_descends_and_its_singular_values_stand_still_where_theory_says_so(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / ".github"))
    import proxy

    generator = torch.Generator().manual_seed(0)
    white = torch.linalg.qr(torch.randn(64, 12, generator=generator).double()).Q * 8
    coloured = white @ torch.randn(12, 12, generator=generator).double()
    starts = proxy.starts_of(coloured, {"red": coloured.abs().mean(0)}, 6, generator)
    starts = {name: [part.double() for part in parts] for name, parts in starts.items()}
    for name in ("red", "random orthogonal", "pca"):  # one orthonormal basis for both
        assert moving(white, *starts[name]) < 1e-4 and moving(coloured, *starts[name]) < 1e-4
    two = starts["random orthogonal"][0], starts["red"][1]
    assert moving(white, *two) > 1e-2 and moving(coloured, *two) > 1e-2
    optimum = torch.linalg.svdvals(coloured)[6:].square().sum().item() / 128
    for name, (down, up) in starts.items():
        (first, rank, _), (later, _, _) = proxy.train_proxy(coloured, down, up, 1, batch=64)
        rebuilt = coloured @ down @ up
        assert first == pytest.approx((coloured - rebuilt).square().sum().item() / 128)
        assert rank == pytest.approx(effective_rank_by_hand(rebuilt), rel=1e-4)
        assert first == pytest.approx(optimum, rel=1e-4) if name == "pca" else later < first
