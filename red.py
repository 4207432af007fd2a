"""RED: Reasoning-preserved Efficient Distillation, in one file to read beside the paper.

He et al., "Reasoning-preserved Efficient Distillation of Large Language Models via
Activation-aware Initialization", ICML 2026, arXiv 2605.29327, as read in v1. What a run does:

    calibrate          a few sequences show which channels the frozen teacher uses (§5)
    new_student        every weight is the teacher's, seen through a projection (§3, App. C),
                       and RED starts all projections as one selection of channels (§5)
    distill            Adam trains the projections (App. F.1), and in each training_step
      merge              the student's weights are made from the projections,
      alignment_error    its activations are compared with the teacher's (App. B),
      distillation_loss  and its predictions, by KL and cross-entropy (App. B)
    export_student     the merged student is an ordinary checkpoint, only narrower (App. C)
    measure_model      held-out loss, effective rank, reasoning (§4, §6)

Marks in the comments: [reading], the paper's text leaves it to us; [differs], our default is not
what the paper or LRC has; [new], neither has it.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import glob
import itertools
import json
import logging
import math
import os
import random
import re
import signal
import string
import sys
import textwrap
import time
import zipfile
import zlib
from pathlib import Path
from statistics import fmean

import pyarrow.parquet
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

# ==== Settings ================================================================================
# Every choice of a run is one field of one dataclass, with its help text.

METHODS = {  # by where all projections start
    "red": "the most active channels, one set for all matrices: the paper's",
    "red-variance": "the channels that vary most in what the norms put out [new]",
    "random-selection": "one set of random channels",
    "pca": "the principal directions of the teacher's stream [new, after SliceGPT]",
    "shared-orthogonal": "one random orthonormal basis [new]",
    "orthogonal": "a random orthonormal basis for each matrix: the paper's ablation",
    "lrc": "random numbers for each matrix: Low-Rank Clone",
}
MUON_RATE, TINY_MUON_RATE = 1e-3, 3e-2  # the learning rates of --optimizer muon


def setting(default, help, **options):
    """One field of Config: its default and its line in --help."""
    help = help if default is None else f"{help} (default: {default})"
    return dataclasses.field(default=default, metadata={"help": help} | options)


@dataclasses.dataclass
class Config:
    """All settings of a run."""

    model: str | None = setting(None, "teacher: a folder or hub name; without it, the tiny world")
    ratio: float = setting(0.5, "width of a student as a share of the teacher's")
    methods: tuple[str, ...] = setting(("red",), "of the methods below", nargs="+", choices=METHODS)
    data: str | None = setting(None, "text to train on; unset: FineWeb-Edu, or the tiny world's")
    calibration_samples: int = setting(15, "sequences to calibrate on")
    seq_len: int = setting(512, "tokens per sequence")
    steps: int = setting(1000, "optimiser steps; 0: export and measure the start")
    batch_size: int = setting(8, "sequences per micro-batch and process")
    grad_accum: int = setting(1, "micro-batches per optimiser step and process")
    optimizer: str = setting("adam", "adam, or muon [new]", choices=("adam", "muon"))
    learning_rate: float = setting(3e-4, "its peak; muon has defaults of its own")
    temperature: float = setting(1.0, "softens both distributions in KL")
    alpha: float = setting(0.2, "weight of the alignment loss")
    seed: int = setting(0, "seed of everything random")
    eval_data: str | None = setting(None, "problems, or none; unset: GSM8K if nothing is local")
    eval_problems: int = setting(200, "how many of --eval-data's problems to measure")
    measure_every: int = setting(250, "steps between measurements; 0: at the start only")
    out: str | None = setting(None, "results folder; unset: one in runs/, named by the settings")
    save_every: int = setting(250, "steps between checkpoints; 0: at the end only")


# ==== Effective rank (§4) =====================================================================
# The paper's account: hidden states of low effective rank are hard to tell apart, so a chain of
# reasoning, which must keep its steps apart, breaks first. To copy it: torch, F.


def effective_rank(hidden):
    """eRank = exp(-sum r ln r), r = eigenvalues of the covariance / their sum (§4).

    hidden: (..., d), all leading dimensions are tokens: centred, then each scaled to norm 1. A
    float from 1 to min(tokens - 1, d), or 0.0 where all tokens are equal: they have no spectrum.
    ValueError: values not finite. Roy and Vetterli's own takes singular values, uncentred: larger.
    """
    tokens = hidden.detach().reshape(-1, hidden.shape[-1]).double()
    if not torch.isfinite(tokens).all():
        raise ValueError("effective_rank needs finite values")
    centred = tokens - tokens.mean(0)
    # What is left of a token at the mean is rounding, and must not be scaled up to norm 1.
    rounding = 1e-10 * tokens.abs().max().item() + 1e-300
    unit = F.normalize(centred, dim=-1, eps=rounding)

    values = torch.linalg.eigvalsh(unit.T @ unit).clamp_min(0)
    if values.sum() < 0.5:  # no token has norm 1
        return 0.0
    r = values / values.sum()
    return torch.special.entr(r).sum().exp().item()  # entr(r) = -r ln r, and 0 at 0


# ==== Looking inside a model ==================================================================
# A Llama-like block has seven linear modules and two norms; these names are all that this file
# knows of them, and forward hooks are its only way to look inside. A batch is a dict of input_ids
# and labels, (batch, tokens) each; -100 is ignored. To copy it: torch, F, contextlib, functools.

READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
WRITERS = ("o_proj", "down_proj")
ALIGNED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm", "model.norm")  # those of the stream


def modules_of(model, kinds):
    """Names of all modules of the given kinds, in order; for NORMS these are 2L + 1."""
    return [name for name, _ in model.named_modules() if name.endswith(kinds)]


def projected_matrices(model):
    """Names of the modules with a projection of their own (App. C): all but a tied head."""
    readers = READERS[:-1] if model.config.tie_word_embeddings else READERS
    return modules_of(model, readers + WRITERS)


def feeding_norm(name):
    """The norm layer whose output a matrix reads, by name; None for the embedding and writers."""
    block = ".".join(name.split(".")[:3])  # model.layers.N
    if name.endswith(("q_proj", "k_proj", "v_proj")):
        return f"{block}.input_layernorm"
    if name.endswith(("gate_proj", "up_proj")):
        return f"{block}.post_attention_layernorm"
    return "model.norm" if name == "lm_head" else None


@contextlib.contextmanager
def watch(model, names, look):
    """Within `with`, look(name, input, output) is called whenever one of the modules runs."""
    with contextlib.ExitStack() as hooks:
        for name in names:

            def hook(module, inputs, output, name=name):
                look(name, inputs[0], output)

            hooks.enter_context(model.get_submodule(name).register_forward_hook(hook))
        yield


def last_hidden(model, ids):
    """A causal model's last normed hidden states, (batch, tokens, d), without any logits."""
    return model.model(ids.to(model.device), use_cache=False).last_hidden_state


def fuse_norms(model):
    """Let each norm of a model run as one kernel, not as eight; it rounds once, not twice [new]."""
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            options = {"weight": module.weight, "eps": module.variance_epsilon}
            shape = module.weight.shape
            module.forward = functools.partial(F.rms_norm, normalized_shape=shape, **options)


@torch.no_grad()
def look_inside(model, ids, names):
    """Run a model: its last hidden states, and (input, output) of the named modules, by name."""
    seen = {}

    def keep(name, before, after):
        seen[name] = (before, after)

    with watch(model, names, keep):
        hidden = last_hidden(model, ids)
    return hidden, seen


# ==== Calibration and selection (§5) ==========================================================
# The contribution of RED. A few sequences through the teacher score each channel of its residual
# stream; the best become the student's. The stream is one space, so one set of channels serves
# every matrix. To copy it: torch, dataclasses, and the section above.


def channel_importance(means):
    """How much the teacher uses each channel of its residual stream (Eqs. 9-10): (d_t,).

    means: (layers + 1, sequences, d_t), the mean absolute activations over a sequence's tokens, of
    the embedding's output and of each block's.
    """
    over_sequences = torch.linalg.vector_norm(means, dim=1)
    return over_sequences.mean(0)  # over the layers


def select_channels(importance, hidden_size):
    """Indices of the best channels, ascending, (d_s,) int64 (§5). ValueError: no such width."""
    if not 0 < hidden_size <= len(importance):
        raise ValueError(f"cannot keep {hidden_size} of {len(importance)} channels")
    order = torch.sort(importance, descending=True, stable=True).indices  # of equals the lower
    return order[:hidden_size].sort().values


def selection_matrix(channels, teacher_width):
    """S in {0,1}, (d_t, d_s) float32: S[channels[j], j] = 1 (§5)."""
    return torch.eye(teacher_width)[:, channels.cpu()]  # all singular values are 1 (Thm. 5.1)


@dataclasses.dataclass
class Calibration:
    """What a few sequences show of the teacher (§5)."""

    batches: list  # the sequences
    importance: torch.Tensor  # (d_t,), Eqs. 9-10
    bases: dict  # (d_t, d_s) each, where "red", "red-variance" and "pca" start
    scales: dict  # aligned module -> mean square of its output, to divide its error by


def calibrate(teacher, batches, hidden_size):
    """What a list of batches shows of the teacher (§5). FloatingPointError: it is not finite."""
    norms, aligned = modules_of(teacher, NORMS), modules_of(teacher, ALIGNED)
    # The embedding's output and each block's are what the next of these norms takes in [reading].
    layers = modules_of(teacher, ("input_layernorm", "model.norm"))
    means = {name: [] for name in layers}
    sums, squares = dict.fromkeys(norms, 0.0), dict.fromkeys(aligned, 0.0)
    moment, tokens = 0.0, 0
    for batch in batches:
        tokens += batch["input_ids"].numel()
        _, seen = look_inside(teacher, batch["input_ids"], norms + aligned)
        for name in layers:  # Eq. 9's mean over a sequence's tokens: (batch, d_t)
            means[name].append(seen[name][0].float().abs().mean(1).double())
        for name in norms:
            stream, normed = [tensor.flatten(0, 1).float() for tensor in seen[name]]
            sums[name] += torch.stack([normed.sum(0), normed.square().sum(0)]).double()
            unit = stream / stream.square().mean(-1, keepdim=True).clamp_min(1e-12).sqrt()
            moment += (unit.T @ unit).double()
        for name in aligned:
            squares[name] += seen[name][1].float().square().mean(-1).sum().double()

    importance = channel_importance(torch.stack([torch.cat(parts) for parts in means.values()]))
    if not torch.isfinite(importance).all():
        raise FloatingPointError("the teacher's activations are not finite")
    moments = torch.stack(list(sums.values())) / tokens
    bases = choose_bases(importance, moments, moment, hidden_size)
    scales = {name: max(total.item() / tokens, 1e-12) for name, total in squares.items()}
    return Calibration(batches, importance.cpu(), bases, scales)


def choose_bases(importance, moments, moment, hidden_size):
    """Where the starts that look at activations begin: method -> (d_t, d_s) float32 (§5).

    moments: (2L + 1, 2, d_t), means of the norms' outputs and of their squares. moment: (d_t, d_t),
    the sum of h h.T over the tokens of the stream before all norms, each h at RMS 1.
    """
    mean, mean_square = moments.unbind(1)
    variance = (mean_square - mean.square()).clamp_min(0)
    # Each norm's variances get sum 1, or the largest activations would choose alone.
    variance = (variance / variance.sum(-1, keepdim=True).clamp_min(1e-30)).sum(0)
    bases = {}
    for method, score in (("red", importance), ("red-variance", variance)):
        bases[method] = selection_matrix(select_channels(score, hidden_size), len(score))
    directions = torch.linalg.eigh(moment).eigenvectors.flip(1)  # the leading ones first
    return bases | {"pca": directions[:, :hidden_size].float().cpu()}


# ==== The projected student and its merge (§3, App. C) ========================================
# An ordinary, narrower model, whose weights are W @ P where a matrix reads the stream and P.T @ W
# where it writes to it. Selections take the norms' gains along. Rotations cannot: gains go into the
# matrices that read, W @ diag(gain) @ P, and a tied head is untied, as the embedding follows no
# norm [reading]. To copy it: torch, math, transformers and the sections above.

ROTATIONS = ("pca", "orthogonal", "shared-orthogonal")


class ProjectedStudent:
    """A student whose every weight is a function of the frozen teacher's (§3, App. C).

    teacher       a causal language model, d_t wide; never changed
    model         the same, d_s wide, perhaps on the meta device: the student, an ordinary model
    projections   name -> (d_t, d_s), where all `projected_matrices(model)` start
    gains         name -> (d_s,), where all the norms of the stream start
    fold          True for rotations: the teacher's gains become part of the matrices that read
    """

    def __init__(self, teacher, model, projections, gains, fold=False):
        self.teacher, self.model, self.fold = teacher, model, fold
        # What learns is float32, or better, and a copy: many names may share a start.
        options = {"device": teacher.device, "memory_format": torch.contiguous_format, "copy": True}
        options["dtype"] = torch.promote_types(teacher.dtype, torch.float32)
        self.projections = {n: torch.nn.Parameter(p.to(**options)) for n, p in projections.items()}
        self.gains = {n: torch.nn.Parameter(g.to(**options)) for n, g in gains.items()}
        self.teacher_weights = {n: p.detach() for n, p in teacher.named_parameters()}
        # A tied head has no weight of its own.
        self.teacher_weights["lm_head.weight"] = teacher.lm_head.weight.detach()

        model.to_empty(device=teacher.device).eval().tie_weights()
        # Rotary tables live in head space, the same in both, and in no state dict: share them.
        model.model.rotary_emb = teacher.model.rotary_emb
        # transformers would keep the padding token's row from any gradient.
        model.model.embed_tokens.padding_idx = None
        if teacher.device.type == "cuda":
            fuse_norms(model)
        self.merge()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.merged[name].requires_grad)

    def parameters(self):
        """Everything that learns, a list: the projections, then the gains."""
        return [*self.projections.values(), *self.gains.values()]

    def project(self, name, weight):
        """The student's tensor in place of a weight or bias of the teacher's (App. C)."""
        module = name.rpartition(".")[0]
        if module in self.gains:
            return self.gains[module].to(weight.dtype)
        if module not in self.projections:  # q_norm, k_norm: in head space, as they are [reading]
            return weight
        projection, norm = self.projections[module], feeding_norm(module)
        # P is kept in float32, where small steps add up, and rounded for each product.
        if module.endswith(WRITERS):  # their biases, too, are in the stream [reading]
            return projection.to(weight.dtype).T @ weight
        if weight.dim() == 1:  # a bias of q, k, v, gate or up: in head or FFN space
            return weight
        if self.fold and norm:  # the gain scales the rows of P
            projection = self.teacher_weights[f"{norm}.weight"][:, None] * projection
        return weight @ projection.to(weight.dtype)

    def merge(self):
        """Make all the student's weights from the projections, and let the model use them."""
        # Once per step, not in each forward pass: all micro-batches share the products.
        self.merged = {}
        for name, parameter in self.model.named_parameters():
            if name in self.teacher_weights:
                weight = self.project(name, self.teacher_weights[name])
            else:  # o_proj.bias, where a Qwen2's student is a Llama: see `student_config`
                weight = torch.zeros_like(parameter)
            self.merged[name] = weight
            parameter.data = weight.detach()

    def carry_back(self):
        """From the gradients of the merged weights to those of the projections and gains."""
        learned = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        torch.autograd.backward([self.merged[name] for name in learned], list(learned.values()))
        self.model.zero_grad()
        self.merged = None  # the graph of these products goes with them


def serves_as_llama(config):
    """True for a Qwen2 without windows, whose student is a Llama with biases [differs]."""
    # It computes just the same, and other programs know only a Llama's `head_dim`.
    return config.model_type == "qwen2" and not config.use_sliding_window


def student_width(ratio, teacher_config):
    """The width nearest to a share of the teacher's; a Llama's is a multiple of its heads."""
    llama = teacher_config.model_type == "llama" or serves_as_llama(teacher_config)
    unit = teacher_config.num_attention_heads if llama else 1
    return unit * max(1, math.floor(ratio * teacher_config.hidden_size / unit + 0.5))


def student_config(teacher_config, hidden_size, untie=False):
    """The teacher's config at another width, with `head_dim` pinned; untie: with its own head."""
    values = teacher_config.to_dict()
    values.pop("quantization_config", None)  # of a teacher read from GGUF
    if not values.get("head_dim"):
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    tied = values["tie_word_embeddings"] and not untie
    values |= {"hidden_size": hidden_size, "tie_word_embeddings": tied}
    if not serves_as_llama(teacher_config):
        return type(teacher_config)(**values)
    values |= {"model_type": "llama", "attention_bias": True, "mlp_bias": False}
    known = transformers.LlamaConfig().to_dict()
    return transformers.LlamaConfig(**{k: v for k, v in values.items() if k in known})


def initial_projection(method, calibration, generator):
    """Where a projection starts, by any of METHODS: (d_t, d_s) float32 (§5, §6)."""
    if method in calibration.bases:
        return calibration.bases[method]
    teacher_width, hidden_size = calibration.bases["red"].shape
    if method == "random-selection":
        chosen = torch.randperm(teacher_width, generator=generator)[:hidden_size]
        return selection_matrix(chosen.sort().values, teacher_width)
    gaussian = torch.randn(teacher_width, hidden_size, generator=generator)
    if method == "lrc":
        # N(0, 0.02) belongs to LRC's own width; a narrower one would lose the signal [differs].
        return 0.02 * (3072 / teacher_width) ** 0.5 * gaussian
    q, r = torch.linalg.qr(gaussian.double())
    return (q * r.diagonal().sign()).float()  # uniform over all orthonormal bases


def initial_gains(method, teacher, basis, batches):
    """Where the norm gains start, if all projections start as `basis`: name -> (d_s,) [differs].

    Kept channels keep the teacher's, rotations start at 1; either times the mean of rms(h @ basis)
    / rms(h), as the student divides by the RMS of only what it keeps of h.
    """
    norms = modules_of(teacher, NORMS)
    ratios, gains = {name: [] for name in norms}, {}
    for batch in batches:
        for name, (stream, _) in look_inside(teacher, batch["input_ids"], norms)[1].items():
            kept = (stream.float() @ basis.to(stream.device)).square().mean(-1)
            whole = stream.float().square().mean(-1)  # 0 for a padding token: its ratio is 1
            ratios[name].append(((kept + 1e-12) / (whole + 1e-12)).sqrt().flatten())
    for name in norms:
        gain = teacher.get_submodule(name).weight.detach().float().cpu() @ basis
        start = torch.ones_like(gain) if method in ROTATIONS else gain
        gains[name] = start * torch.cat(ratios[name]).double().mean().item()
    return gains


def new_student(method, teacher, hidden_size, calibration, seed=0):
    """A ProjectedStudent at the start of training, by any of METHODS (§3, §5)."""
    rotated = method in ROTATIONS
    config = student_config(teacher.config, hidden_size, untie=rotated)
    options = {"dtype": teacher.dtype, "attn_implementation": teacher.config._attn_implementation}
    with torch.device("meta"):  # no memory and no random numbers: merging makes the weights
        model = transformers.AutoModelForCausalLM.from_config(config, **options)
    names, generator = projected_matrices(model), torch.Generator().manual_seed(seed)
    if method in ("orthogonal", "lrc"):  # every matrix has a start of its own
        projections = {name: initial_projection(method, calibration, generator) for name in names}
        gains = {norm: torch.ones(hidden_size) for norm in modules_of(model, NORMS)}
    else:
        basis = initial_projection(method, calibration, generator)
        projections = dict.fromkeys(names, basis)
        gains = initial_gains(method, teacher, basis, calibration.batches)
    return ProjectedStudent(teacher, model, projections, gains, fold=rotated)


# ==== Losses (App. B) =========================================================================
# KL from the teacher, cross-entropy of the next token, and alignment of activations. All are sums
# over tokens, until a step is complete. Logits are the largest tensors of a step, so they are
# made and differentiated for a few tokens at a time. To copy it: torch, F.

LOGITS_AT_ONCE = 2**24  # 64 MiB of float32


class HalfSquaredNorm(torch.autograd.Function):
    """|error|^2 / 2, a float32 scalar, whose gradient is the error itself: four small kernels."""

    @staticmethod
    def forward(ctx, error):
        ctx.save_for_backward(error)
        precise = torch.promote_types(error.dtype, torch.float32)
        # By tokens: on a CPU the norm of many millions of numbers at once comes out too low.
        norms = torch.linalg.vector_norm(error, dim=-1, dtype=precise).flatten()
        return norms.dot(norms) / 2

    @staticmethod
    def backward(ctx, gradient):
        (error,) = ctx.saved_tensors
        return error * gradient


def alignment_error(student, teacher, projection=None):
    """Half the squared distance between two activations, over all tokens: a scalar (App. B).

    student: (batch, tokens, n). teacher: the same for q, k, v, gate and up; for o and down, which
    write to the stream, (batch, tokens, d_t), with projection (d_t, n), which learns here, too.
    """
    if projection is None:
        return HalfSquaredNorm.apply(student - teacher)
    # student - teacher @ projection, in one operation.
    student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    error = torch.addmm(student, teacher, projection.to(teacher.dtype), alpha=-1)
    return HalfSquaredNorm.apply(error)


def kl_and_cross_entropy(student_logits, teacher_logits, targets, temperature):
    """Both losses, each a sum over tokens, in nats (App. B).

    logits: (tokens, vocabulary); targets: (tokens,). KL(teacher || student) is of distributions
    softened by the temperature, and weighted by its square [differs; LRC has no square].
    """
    precise = torch.promote_types(student_logits.dtype, torch.float32)
    log_q = torch.log_softmax(student_logits, -1, dtype=precise)
    cross_entropy = F.nll_loss(log_q, targets, reduction="sum")
    if temperature != 1:
        log_q = torch.log_softmax(log_q / temperature, -1)
        teacher_logits = teacher_logits / temperature
    log_p = torch.log_softmax(teacher_logits, -1, dtype=precise)
    kl = torch.linalg.vecdot(log_p.exp(), log_p - log_q).sum()  # sum of p (log p - log q)
    return temperature**2 * kl, cross_entropy


def distillation_loss(hidden, head, teacher_hidden, teacher_head, labels, temperature):
    """KL(teacher || student), next-token cross-entropy, and their gradients at once (App. B).

    hidden (batch, tokens, d_s) and head (vocabulary, d_s) make logits, and the teacher's likewise.
    labels: (batch, tokens), shifted by one here. Returns KL and cross-entropy, sums over labels in
    nats, and the gradients of their sum in hidden and head, for autograd to go on from.
    """
    labelled = labels[:, 1:] != -100
    targets = labels[:, 1:][labelled].to(hidden.device)
    states = hidden.detach()[:, :-1][labelled]
    teacher_states = teacher_hidden[:, :-1][labelled]
    head = head.detach().requires_grad_()

    # A GPU needs larger matrix products to be busy.
    size = max(1, LOGITS_AT_ONCE * (8 if head.is_cuda else 1) // len(head))
    totals, gradients = torch.zeros(2, device=hidden.device), []
    parts = [tensor.split(size) for tensor in (states, teacher_states, targets)]
    for part, teacher_part, wanted in zip(*parts):
        # Each part is a leaf: its backward pass ends here, and its logits are gone after it.
        part.requires_grad_()
        logits, teacher_logits = part @ head.T, teacher_part @ teacher_head.T
        kl, cross_entropy = kl_and_cross_entropy(logits, teacher_logits, wanted, temperature)
        (kl + cross_entropy).backward()
        gradients.append(part.grad)
        totals = totals + torch.stack([kl, cross_entropy]).detach()

    of_hidden = torch.zeros_like(hidden)
    of_hidden[:, :-1][labelled] = torch.cat(gradients)
    return *totals, of_hidden, head.grad


# ==== One step, and the loop (App. F.1) =======================================================
# Warm-up and linear decay are the paper's, clipping is LRC's. Under torchrun N processes compute
# one process's step on all N batches. `config` is a Config, or anything with its fields. To copy
# it: torch, itertools, math, time and the sections above.


def process():
    """(This process's number, from 0, and how many train together: torchrun's, or 1)."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def add_up(tensors):
    """Sum each tensor over torchrun's processes, in place."""
    if torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def student_forward(student, ids, seen, scales=None):
    """The student's last hidden states, and its alignment with the teacher's: a mean, added up.

    seen: by `look_inside` at the teacher; it is emptied one by one, so that its memory can go.
    """
    errors, weights = [], []

    def compare(name, before, after):
        projection = student.projections[name] if name.endswith(WRITERS) else None
        errors.append(alignment_error(after, seen.pop(name)[1], projection))
        # A mean over tokens and features, relative to the teacher's activation [differs].
        scale = scales[name] if scales else 1.0
        weights.append(2 / (after.numel() * scale))

    with watch(student.model, modules_of(student.model, ALIGNED), compare):
        hidden = last_hidden(student.model, ids)
    errors = torch.stack(errors)
    return hidden, errors @ errors.new_tensor(weights)


def training_step(teacher, student, micro_batches, config, scales=None):
    """The gradients of one optimiser step, left in the student's projections and gains.

    micro_batches: an iterable; each is read when it is needed. scales: aligned module -> what its
    error is divided by (None: 1, as in LRC). The loss is KL + cross-entropy + alpha * alignment
    (App. B), a mean over the labels of all processes [differs]. Returns it, its terms, "tokens".
    """
    # 1. Make the student's weights from the projections: once.
    student.merge()
    head, teacher_head = student.model.lm_head.weight, teacher.lm_head.weight
    sums, label_count, tokens = torch.zeros(3, device=head.device), 0, 0
    for batch in micro_batches:
        # 2. The teacher, then the student, compared with it module by module.
        ids, labels = batch["input_ids"], batch["labels"]
        count = int((labels[:, 1:] != -100).sum())  # on the CPU: no GPU is waited for
        teacher_hidden, seen = look_inside(teacher, ids, modules_of(teacher, ALIGNED))
        hidden, alignment = student_forward(student, ids, seen, scales)

        # 3. KL and cross-entropy, then the gradients of the student's weights.
        inputs = (hidden, head, teacher_hidden, teacher_head, labels)
        kl, cross_entropy, *gradients = distillation_loss(*inputs, config.temperature)
        ends = [hidden, head, config.alpha * count * alignment]
        torch.autograd.backward(ends, [*gradients, None])
        sums = sums + torch.stack([kl, cross_entropy, count * alignment.detach()])
        label_count, tokens = label_count + count, tokens + ids.numel()
    if tokens == 0:
        raise ValueError("there is no batch for this step")

    # 4. Carry the gradients back to the projections and gains: once. Sums become means.
    student.carry_back()
    gradients = [parameter.grad for parameter in student.parameters()]
    counts = torch.tensor([label_count, tokens], device=head.device)
    add_up([*gradients, sums, counts])
    label_count, tokens = counts.clamp_min(1)
    torch._foreach_div_(gradients, label_count)
    kl, cross_entropy, alignment = sums / label_count
    terms = {"kl": kl, "cross_entropy": cross_entropy, "alignment": alignment, "tokens": tokens}
    return {"loss": kl + cross_entropy + config.alpha * alignment} | terms


def learning_rate_at(step, config):
    """The schedule: warm-up over half a percent of the steps, and linear decay to 0 (App. F.1)."""
    warm_up = max(1, round(0.005 * config.steps))
    return config.learning_rate * (1 - step / config.steps) * min(1.0, (step + 1) / warm_up)


def orthogonalise(matrices):
    """A stack, (n, d_t, d_s), with all singular values brought near 1: Newton-Schulz [new]."""
    x = matrices.bfloat16()  # precise enough for this
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = x.mT @ x
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, x, polynomial, beta=3.4445)
    return x.to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon [new], for matrices of one shape: they move in all their directions alike.

    It is torch.optim.Muon with adjust_lr_fn="match_rms_adamw" and no weight decay, but faster.
    """

    def __init__(self, matrices):
        super().__init__(matrices, {"lr": 1e-3})
        for matrix in self.param_groups[0]["params"]:
            self.state[matrix]["momentum"] = torch.zeros_like(matrix)

    @torch.no_grad()
    def step(self):
        """One step: 16 matrices at once keep a GPU busy, and every process does its share."""
        group, (rank, count) = self.param_groups[0], process()
        for first in range(0, len(group["params"]), 16):
            matrices = group["params"][first : first + 16]
            gradients = torch.stack([matrix.grad for matrix in matrices])
            momenta = [self.state[matrix]["momentum"] for matrix in matrices]
            torch._foreach_lerp_(momenta, gradients.unbind(), 0.05)
            ahead = gradients.lerp(torch.stack(momenta), 0.95)  # Nesterov's
            updates = torch.zeros_like(ahead)
            updates[rank::count] = orthogonalise(ahead[rank::count])
            add_up([updates])
            size = 0.2 * max(ahead.shape[1:]) ** 0.5  # RMS 0.2, as Adam's steps usually have
            torch._foreach_add_(matrices, updates.unbind(), alpha=-size * group["lr"])


def make_optimizers(student, config):
    """Optimisers, a list: Adam, the paper's, or Muon for the projections and Adam for the gains."""
    if config.optimizer == "adam":
        return [torch.optim.Adam(student.parameters(), fused=True)]
    muon = Muon(student.projections.values())
    return [muon, torch.optim.Adam(student.gains.values(), fused=True)]


def distill(teacher, student, batches, config, scales=None, optimizers=None, done=0):
    """Train the student in place (App. F.1). A generator: each iteration is one step.

    batches: an iterator. optimizers, done: of a run that goes on after `done` steps. Yields a dict.
    A step that is not finite changes nothing; ten in a row raise FloatingPointError, and batches
    that have ended ValueError. Within the loop, call student.merge() before you use student.model.
    """
    optimizers, failures = optimizers or make_optimizers(student, config), 0
    for step in range(done, config.steps):
        started = time.perf_counter()
        micro_batches = itertools.islice(batches, config.grad_accum)
        record = training_step(teacher, student, micro_batches, config, scales)
        record["gradient_norm"] = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        record["learning_rate"] = learning_rate_at(step, config)
        finite = math.isfinite(record["loss"] + record["gradient_norm"])
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = record["learning_rate"]
            if finite:
                optimizer.step()
            optimizer.zero_grad()

        failures = 0 if finite else failures + 1
        if failures == 10:
            raise FloatingPointError("ten steps in a row are not finite; lower --learning-rate")
        record = {k: float(v) if math.isfinite(v) else None for k, v in record.items()}
        record["tokens_per_second"] = record["tokens"] / (time.perf_counter() - started)
        yield record | {"step": step + 1, "skipped": not finite}
    with torch.no_grad():
        student.merge()


# ==== Small tools =============================================================================
# One sentence for every fault that a user can mend, and one voice where many processes train.


class UserError(Exception):
    """An error the user can mend: one sentence for stderr, exit code 2, no traceback."""


def require(condition, sentence):
    """UserError with the sentence, unless the condition holds."""
    if not condition:
        raise UserError(sentence)


@contextlib.contextmanager
def as_user_error(sentence):
    """Re-raise errors in the block as UserError: `sentence`, with the error's text for {}."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError):
            raise
        text = textwrap.shorten(str(error) or type(error).__name__, 250).rstrip(".")
        raise UserError(sentence.replace("{}", text)) from error


def gather(value=None):
    """[every process's value]; also the point where all processes wait for each other."""
    values = [value] * process()[1]
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def announce(what, text):
    """One line of what is being done, from the first process."""
    if process()[0] == 0:
        tqdm.write(f"{what:<12} {text}")


def write(path, value):
    """Write text, tensors (a .pt file), or any other value as JSON: whole, or not at all."""
    if process()[0] > 0:
        return
    partial = path.with_name(path.name + ".partial")
    with as_user_error(f"cannot write {path} ({{}}): disk full? The same command goes on."):
        if path.suffix == ".pt":
            torch.save(value, partial)
        else:
            content = value if isinstance(value, str) else json.dumps(value, indent=1)
            partial.write_text(content, "utf-8", "replace")
        os.replace(partial, path)


# ==== The tiny world ==========================================================================
# A teacher in half a minute, with the paper's contrast in it: arithmetic modulo 10 that needs a
# chain of operations (reasoning), `7+5-3=?7+5=2;2-3=9#9`, and 60 fixed pairs that need none
# (knowledge), `abcd:wxyz`. Characters are tokens, and only answers are labels.

TINY_DEFAULTS = dict(methods=("red", "lrc"), steps=100, batch_size=64, seq_len=48)
TINY_DEFAULTS.update(learning_rate=1e-2, measure_every=10, save_every=0)
TINY_CONFIG = Path(__file__).with_name("tiny_config.json")
TINY_ALPHABET = "0123456789+-*=?;#:" + string.ascii_lowercase + "\n"
TINY_WORDS = ["".join(random.Random(i).choices(string.ascii_lowercase, k=4)) for i in range(120)]
TINY_PAIRS = [(f"{a}:", f"{b}\n") for a, b in zip(TINY_WORDS[::2], TINY_WORDS[1::2])]


def random_chain(length, generator):
    """A digit and operations on it: (7, [("+", 5), ("-", 3)])."""
    first = generator.randrange(10)
    operations = [(generator.choice("+-*"), generator.randrange(10)) for _ in range(length)]
    return first, operations


def chain_text(first, operations, slip=None, amount=0):
    """A chain as (prompt, answer): `7+5-3=?` and `7+5=2;2-3=9#9`; slip: the place of an error."""
    prompt, results, value = str(first), [], first
    for place, (sign, operand) in enumerate(operations):
        prompt += f"{sign}{operand}"
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[sign]
        if place == slip:
            result += amount
        results.append(f"{value}{sign}{operand}={result % 10}")
        value = result % 10
    return f"{prompt}=?", f"{';'.join(results)}#{value}\n"


def tiny_line(generator):
    """A line of the tiny world, in a quarter of the cases a pair: (prompt, answer)."""
    if generator.random() < 0.25:
        return generator.choice(TINY_PAIRS)
    return chain_text(*random_chain(generator.choice((1, 2, 3, 4, 5)), generator))


def tiny_batches(batch_size, seq_len, seed):
    """An endless iterator of batches of tiny-world lines; only answers are labels."""
    generator = random.Random(seed)
    while True:
        sequences = []
        while len(sequences) < batch_size:
            ids, labels = [], []
            while len(ids) < seq_len:
                prompt, answer = tiny_line(generator)
                ids += [TINY_ALPHABET.index(character) for character in prompt + answer]
                labels += [-100] * len(prompt) + ids[-len(answer) :]
            sequences.append((ids[:seq_len], labels[:seq_len]))
        both = torch.tensor(sequences)
        yield {"input_ids": both[:, 0], "labels": both[:, 1]}


def tiny_tokenizer():
    """The tiny world's characters as an ordinary transformers tokenizer, which saves and loads."""
    vocabulary = {character: i for i, character in enumerate(TINY_ALPHABET)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))  # characters
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="\n")


def tiny_teacher(config, seed, steps=1500):
    """Train the tiny world's teacher, of a transformers config: a frozen model."""
    torch.manual_seed(seed)
    teacher = AutoModelForCausalLM.from_config(config).float()
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    batches = itertools.islice(tiny_batches(16, 48, seed), steps)  # 48 characters hold any line
    for batch in tqdm(batches, "teacher", steps, leave=False):
        teacher(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    return teacher.eval().requires_grad_(False)


# ==== Evaluation (§6) =========================================================================
# The paper's general benchmarks choose answers by likelihood, its reasoning benchmarks generate
# them: the tiny world does both. On real text, single results of worked solutions are scored.


@torch.no_grad()
def evaluate(model, batches, tokens=4096):
    """Held-out `loss` in nats per label (FloatingPointError: not finite), and by block (§4, §6), of
    the first `tokens` tokens, `erank` and `similarity`, the mean cosine of two of them.
    """
    streams = {f"model.layers.{i}": [] for i in range(len(model.model.layers))}
    total, count, looked_at = 0.0, 0, 0
    for batch in batches:
        labels = batch["labels"]
        names = streams if looked_at < tokens else []
        hidden, seen = look_inside(model, batch["input_ids"], names)
        looked_at += labels.numel()
        for name, (_, stream) in seen.items():
            streams[name].append(stream.flatten(0, 1).float())
        labelled = labels[:, 1:] != -100
        targets = labels[:, 1:][labelled].to(model.device)
        count += len(targets)
        # A few tokens at a time: logits are large.
        for part, target in zip(hidden[:, :-1][labelled].split(512), targets.split(512)):
            logits = model.lm_head(part).float()
            total += F.cross_entropy(logits, target, reduction="sum").item()
    if not math.isfinite(total):
        raise FloatingPointError("the held-out loss is not finite")
    measures = {"loss": total / max(1, count), "erank": [], "similarity": []}
    for parts in streams.values():
        stream = torch.cat(parts)[:tokens]
        mean_direction = F.normalize(stream, dim=-1).mean(0)
        measures["erank"].append(effective_rank(stream))
        measures["similarity"].append(mean_direction.square().sum().item())
    return measures


def generate(model, tokenizer, prompts, new_tokens):
    """Greedy continuations, as texts, of prompts that are equally many tokens long (§6)."""
    end, ids = tokenizer.eos_token_id, torch.tensor(tokenizer(prompts)["input_ids"])
    options = {"eos_token_id": end, "pad_token_id": end, "max_new_tokens": new_tokens}
    output = model.generate(ids.to(model.device), do_sample=False, **options)
    return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)


def encode_answer(prompt, answer, tokenizer):
    """A prompt and its answer in tokens: `ids`; `answer_at`, where the answer starts in them; and
    `results`, (start, end) of each result with the `>` after it, such as `24>` in `<<48/2=24>>`.
    """
    encoded = tokenizer(prompt + answer, return_offsets_mapping=True, verbose=False)
    places, results = encoded["offset_mapping"], []
    answer_at = next(i for i, (_, end) in enumerate(places) if end > len(prompt))
    for match in re.compile(r"=([^<>=]+>)>").finditer(prompt + answer, len(prompt)):
        start, end = match.span(1)
        inside = [i for i, (a, b) in enumerate(places) if a < end and b > start]
        if inside:
            results.append((inside[0], inside[-1] + 1))
    return {"ids": encoded["input_ids"], "answer_at": answer_at, "results": results}


@torch.no_grad()
def answer_logits(model, encoded):
    """Yields for each of `encode_answer`'s the logits that predict its answer's tokens."""
    sequences = [torch.tensor(one["ids"]) for one in encoded]
    # Padded on the right, where a causal model does not look: no mask is needed.
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    for states, one in zip(last_hidden(model, padded), encoded):
        yield model.lm_head(states[one["answer_at"] - 1 : len(one["ids"]) - 1])


def share_chosen(model, tokenizer, questions):
    """The share of (prompt, [right answer, wrong answers]) whose right answer is likeliest (§6)."""
    encoded, losses = [], []
    for prompt, answers in questions:
        encoded += [encode_answer(prompt, answer, tokenizer) for answer in answers]
    for one, logits in zip(encoded, answer_logits(model, encoded)):
        answer = torch.tensor(one["ids"][one["answer_at"] :], device=model.device)
        losses.append(F.cross_entropy(logits.float(), answer, reduction="sum"))
    losses = torch.stack(losses).view(len(questions), -1)
    right = losses[:, 0] < losses[:, 1:].amin(1)
    return fmean(right.tolist())


def tiny_questions(count):
    """TINY_PAIRS, then chains by length: lists of (prompt, [right answer, three wrong ones])."""
    generator, wrong = random.Random(12345), random.Random(54321)  # for every model the same
    groups = [[]]
    for prompt, truth in TINY_PAIRS:
        others = [answer for _, answer in TINY_PAIRS if answer != truth]
        groups[0].append((prompt, [truth, *wrong.sample(others, 3)]))
    for length in (1, 2, 3, 4, 5):
        slips = list(itertools.product(range(length), range(1, 10)))  # (place, amount)
        groups.append([])
        for _ in range(count):
            chain = random_chain(length, generator)
            prompt, truth = chain_text(*chain)
            slipped = [chain_text(*chain, *slip)[1] for slip in wrong.sample(slips, 3)]
            groups[-1].append((prompt, [truth, *slipped]))
    return groups


def tiny_scores(model, tokenizer, count=200):
    """The shares of `pairs` and, by length, `chains` that are `chosen` and `written` right (§6)."""
    chosen, written = [], []
    for questions in tiny_questions(count):
        chosen.append(share_chosen(model, tokenizer, questions))
        prompts, truths = zip(*[(prompt, answers[0]) for prompt, answers in questions])
        longest = max(map(len, tokenizer(list(truths))["input_ids"]))
        answers = generate(model, tokenizer, list(prompts), longest)
        right = []
        for answer, truth in zip(answers, truths):
            right.append(answer.strip().split("#")[-1] == truth.strip().split("#")[-1])
        written.append(fmean(right))
    scores = {"pairs": {"chosen": chosen[0], "written": written[0]}}
    scores["chains"] = {"chosen": chosen[1:], "written": written[1:]}
    return scores | {"example": prompts[0] + answers[0].strip()}


def result_scores(model, problems, batch_size):
    """Shares right of problems' `results`, and of `other_tokens`, general ability (§6) [new]."""
    results, others = [], []
    for first in range(0, len(problems), batch_size):
        few = problems[first : first + batch_size]
        for problem, logits in zip(few, answer_logits(model, few)):
            start, written = problem["answer_at"], logits.argmax(-1).tolist()
            right = [a == b for a, b in zip(problem["ids"][start:], written, strict=True)]
            for begin, end in reversed(problem["results"]):
                span = slice(begin - start, end - start)
                results.append(all(right[span]))
                del right[span]
            others += right
    return {"results": fmean(results), "other_tokens": fmean(others)}


# ==== Teachers and text (App. F) ==============================================================
# A frozen teacher, and batches of text, streamed; the first documents are held out.

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
FIELDS = {"text", "question", "answer"}
AS_WRITTEN = {"parse_int": str, "parse_float": str, "parse_constant": str}  # JSON's numbers


@dataclasses.dataclass
class Task:
    """What a distillation needs besides a method."""

    teacher: torch.nn.Module
    tokenizer: object
    samples: list = None  # batches to calibrate on
    held_out: list = None  # batches
    documents: object = None  # to train on; None: the tiny world's lines
    problems: list = None  # by `encode_answer`, for `result_scores`


def load_teacher(name):
    """A frozen teacher and its tokenizer, from a folder or the hub (§3). UserError: unusable."""
    how = {"trust_remote_code": False}  # nor is anybody asked whether to
    with as_user_error(f"cannot load {name} ({{}}): is a file missing, or sentencepiece?"):
        # A checkpoint's config can change what its forward pass returns.
        config = AutoConfig.from_pretrained(name, return_dict=True, output_attentions=False, **how)
        kind = "quantised" if hasattr(config, "quantization_config") else config.model_type
        require(kind in FAMILIES, f"{name} is {kind}; supported: {', '.join(FAMILIES)}.")
        tokenizer = AutoTokenizer.from_pretrained(name, **how)
        how |= {"config": config, "attn_implementation": "sdpa", "output_loading_info": True}
        how["dtype"] = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        how["use_safetensors"] = True  # no pickle, which could run code
        teacher, loading = AutoModelForCausalLM.from_pretrained(name, **how)
        teacher.generation_config.validate(strict=True)  # or a student could not be saved
    keys = sorted(map(str, [*loading["missing_keys"], *loading["unexpected_keys"]]))
    require(not keys, f"{name} does not fit its config: missing or not known: {keys[:3]}.")
    ids = [*tokenizer("1 a.")["input_ids"], tokenizer.eos_token_id or 0, tokenizer.vocab_size - 1]
    usable = tokenizer.is_fast and len(ids) > 2 and max(ids) < teacher.config.vocab_size
    require(usable, f"{name} lacks its tokenizer's files, or has another model's.")
    # A file may hold two different matrices where its config calls them tied: believe the file.
    teacher.config.tie_word_embeddings = teacher.lm_head.weight is teacher.model.embed_tokens.weight
    if torch.cuda.is_available():
        fuse_norms(teacher.to("cuda"))
    return teacher.eval().requires_grad_(False), tokenizer


def files_of(source):
    """The files that a name stands for: itself, a pattern's, or a folder's; none: of the hub."""
    source = source or ""
    if not os.path.isdir(source):
        paths = [source] if os.path.isfile(source) else glob.glob(source)
        return sorted(Path(path) for path in paths if os.path.isfile(path))
    # Of a folder all but what is hidden, a README, or a licence.
    aside = re.compile(r"\.|readme|licen[cs]e", re.IGNORECASE)
    inside = [(path, path.relative_to(source).parts) for path in Path(source).rglob("*")]
    return sorted(p for p, names in inside if p.is_file() and not any(map(aside.match, names)))


def rows_of(path):
    """The rows of a file as dicts: only the columns needed, and JSON's numbers as written."""
    if path.suffix == ".parquet":
        file = pyarrow.parquet.ParquetFile(path)
        wanted = FIELDS.intersection(file.schema_arrow.names) or None
        for batch in file.iter_batches(1000, columns=wanted and sorted(wanted)):
            yield from batch.to_pylist()
        return
    with open(path, encoding="utf-8-sig") as file:  # a byte order mark is no text
        if path.suffix == ".txt":  # blank lines separate documents; without any, each line is one
            text = file.read().strip()
            documents = re.split(r"\n\s*\n", text)
            if len(documents) == 1:
                documents = text.split("\n")
            yield from ({"text": document} for document in documents)
        elif path.suffix == ".json":
            yield from json.load(file, **AS_WRITTEN)
        else:
            for line in filter(str.strip, file):
                yield json.loads(line, **AS_WRITTEN)


def document_of(row, where):
    """A row's {"prompt", "answer"}: `question`, `answer`, or "" and `text`. UserError: neither."""
    row = row if isinstance(row, dict) else {"no object": row}
    known = "text" in row or {"question", "answer"} <= row.keys()
    held = ", ".join(row)
    require(known, f"{where} lacks a `text`, or `question` and `answer`; it has {held}.")
    text = dict.fromkeys(FIELDS, "")
    for name in FIELDS & row.keys():
        value = "" if row[name] is None else row[name]
        usable = isinstance(value, str | int | float)
        require(usable, f"{where} has a {type(value).__name__} as its {name}, not a string.")
        text[name] = str(value).lower() if isinstance(value, bool) else str(value)
    if text["question"] and text["answer"]:
        return {"prompt": f"Question: {text['question']}\nAnswer: ", "answer": text["answer"]}
    return {"prompt": "", "answer": text["text"]}


def local_documents(files):
    """Yields `document_of` every row of these files, by name, that is not empty."""
    for path in files:
        with as_user_error(f"cannot read {path} ({{}})."):
            for number, row in enumerate(rows_of(Path(path)), 1):
                document = document_of(row, f"row {number:,} of {path}")
                if document["answer"].strip():
                    yield document


def open_documents(source, flag):
    """A streaming dataset of `document_of` every row: of files, or of a hub's NAME:CONFIG:SPLIT."""
    import datasets  # here, because it takes seconds and the tiny world needs none of it

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # its errors become our one sentence
    files = [str(path) for path in files_of(source)]
    for path in files:
        require(path.endswith(SUFFIXES), f"cannot read {path}; {flag} takes {SUFFIXES} files.")
    if files:
        return datasets.IterableDataset.from_generator(local_documents, gen_kwargs={"files": files})
    with as_user_error(f"{flag} {source} is no file, nor a hub dataset in reach ({{}})."):
        name, config, split = [*source.split(":"), None, None][:3]
        rows = datasets.load_dataset(name, config, split=split or "train", streaming=True)
    rows = rows.map(document_of, fn_kwargs={"where": f"a row of {source}"})
    return rows.filter(lambda document: bool(document["answer"].strip()))


def packed(documents, task, batch_size, seq_len):
    """Batches cut from one string of tokens. UserError: one has no row in the embedding."""
    tokens, size, tokenizer = [], batch_size * seq_len, task.tokenizer
    end, vocabulary = tokenizer.eos_token_id, task.teacher.config.vocab_size
    for document in documents:
        ids = tokenizer(document["prompt"] + document["answer"], verbose=False)["input_ids"]
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
        most = max(ids, default=0)
        require(
            most < vocabulary, f"the teacher's embedding has no row for token {most} of the text."
        )
        tokens += ids
        while len(tokens) >= size:
            ids = torch.tensor(tokens[:size]).view(batch_size, seq_len)
            yield {"input_ids": ids, "labels": ids}
            del tokens[:size]


def training_batches(config, task):
    """Endless training batches for this process (App. F.2), each time the same."""
    number, count = process()
    if task.documents is None:
        lines = tiny_batches(config.batch_size, config.seq_len, f"training {config.seed}")
        return itertools.islice(lines, number, None, count)
    from datasets.distributed import split_dataset_by_node

    shuffled = task.documents.shuffle(seed=config.seed, buffer_size=2000)
    mine = split_dataset_by_node(shuffled, number, count, strategy="examples").repeat(None)
    return packed(mine, task, config.batch_size, config.seq_len)


def open_task(config, name):
    """The Task of a teacher and of its text (App. F.2). UserError: they cannot be used.
    Held out are the first 200 documents, or a tenth of a smaller source, at most 32 sequences.
    """
    task, length = Task(*load_teacher(str(name))), config.seq_len
    places = task.teacher.config.max_position_embeddings
    require(length <= places, f"--seq-len is beyond the {places:,} positions of {name}.")
    if config.data is None:
        lines = tiny_batches(1, length, f"calibration {config.seed}")
        task.samples = list(itertools.islice(lines, config.calibration_samples))
        task.held_out = [next(tiny_batches(128, length, f"held out {config.seed}"))]
        return task
    documents = open_documents(config.data, "--data")
    count = sum(1 for _ in documents.take(2000))
    aside = max(1, min(200, count // 10))
    task.documents = documents.skip(aside)
    held_out = packed(documents.take(aside), task, 1, length)
    task.held_out = list(itertools.islice(held_out, 32))
    samples = packed(task.documents, task, 1, length)
    task.samples = list(itertools.islice(samples, config.calibration_samples))
    enough = task.held_out and task.samples and count - aside >= process()[1]
    require(enough, f"{config.data} is too short: give more text, or a smaller --seq-len.")
    if config.eval_data not in (None, "none"):
        asked = open_documents(config.eval_data, "--eval-data")
        asked = asked.filter(lambda row: row["prompt"]).take(config.eval_problems)
        list(packed(asked, task, 1, length))  # their tokens are known to the teacher
        task.problems = [encode_answer(r["prompt"], r["answer"], task.tokenizer) for r in asked]
        annotated = any(problem["results"] for problem in task.problems)
        require(annotated, f"--eval-data {config.eval_data} has no results as in <<48/2=24>>.")
    return task


# ==== Folders and checkpoints =================================================================
# OUT holds the students of one teacher under one set of settings, each in a folder of its own. Only
# the first process writes, and nothing is deleted but checkpoints that newer ones replace.

NOT_IDENTITY = ("out", "save_every", "measure_every", "methods")
LOCKS = []  # the folder that this command works in, open


def settings_of(config):
    """What identifies a run: its settings, and the names and sizes of its local files."""
    settings = {k: v for k, v in vars(config).items() if k not in NOT_IDENTITY}
    settings |= {"program": "red.py", "processes": process()[1]}
    sources = {"model": config.model or TINY_CONFIG, "data": config.data}
    for name, source in (sources | {"eval_data": config.eval_data}).items():
        sizes = [f"{path.name}: {path.stat().st_size:,} bytes" for path in files_of(source)]
        if sizes:
            settings[f"{name} on disk"] = ", ".join(sizes)
    return settings


def open_folder(folder, settings):
    """Make a folder, and lock it; UserError: it is locked, or holds anything but these settings."""
    with as_user_error(f"--out {folder} cannot be made ({{}}); name another."):
        folder.mkdir(parents=True, exist_ok=True)
        LOCKS.append(os.open(folder, os.O_RDONLY))
    with as_user_error(f"another command works in {folder} ({{}}); name another --out."):
        fcntl.flock(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    if all(path.suffix == ".partial" for path in folder.iterdir()):
        return
    sentence = f"{folder} holds files of no run of RED; name another --out."
    with as_user_error(sentence):
        stored = json.loads((folder / "settings.json").read_text("utf-8"))
        require(stored["program"] == "red.py", sentence)
    for name in sorted(stored | settings):
        there, here = stored.get(name, "nothing"), settings.get(name, "nothing")
        sentence = f"{folder} was made with another {name}: {there} there, {here} here"
        require(there == here, f"{textwrap.shorten(sentence, 300)}; name another --out.")


def save_checkpoint(folder, records, student, optimizers):
    """Save what going on needs, with the records of all steps. UserError: cannot write."""
    folder.mkdir(exist_ok=True)
    states = [optimizer.state_dict() for optimizer in optimizers]
    state = {"records": records, "student": student.parameters(), "optimizers": states}
    write(folder / f"step-{records[-1]['step']:07}.pt", state)
    for path in [*folder.glob("*.partial"), *sorted(folder.glob("step-*.pt"))[:-2]]:
        path.unlink()


def load_checkpoint(folder, student, optimizers):
    """Load the newest checkpoint and return its records; without one, []. UserError: damaged."""
    paths = gather(sorted(folder.glob("step-*.pt")))[0]  # the first process chooses for all
    if not paths:
        return []
    sentence = f"{paths[-1]} is damaged; move it away, and the run goes on from the one before."
    with as_user_error(sentence):
        require(zipfile.ZipFile(paths[-1]).testzip() is None, sentence)
        state = torch.load(paths[-1], "cpu", weights_only=True, mmap=True)  # runs no code from it
        for parameter, saved in zip(student.parameters(), state["student"], strict=True):
            parameter.data.copy_(saved)
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    announce("checkpoint", f"going on from {paths[-1]}")
    return state["records"]


def export_student(student, task, folder):
    """Save the merged student as a standard checkpoint, for this and other programs (App. C)."""
    with as_user_error(f"cannot write {folder} ({{}}); the same command goes on."):
        student.model.generation_config = task.teacher.generation_config
        student.model.save_pretrained(folder)
        task.tokenizer.save_pretrained(folder)
        # transformers 4 and MLX read the rotary base at the top level only, and transformers 4 and
        # llama.cpp's converter know neither of two names in a tokenizer's file.
        path = folder / "config.json"
        values = json.loads(path.read_text("utf-8"))
        rope = values["rope_parameters"]
        values["rope_theta"] = rope["rope_theta"]
        if rope["rope_type"] != "default":
            values["rope_scaling"] = rope
        write(path, values)
        path = folder / "tokenizer_config.json"
        text = path.read_text("utf-8").replace("TokenizersBackend", "PreTrainedTokenizerFast")
        write(path, text.replace('"extra_special_tokens": [', '"additional_special_tokens": ['))


# ==== A run ===================================================================================
# The students of a run differ in how their projections start, and in nothing else.


def tiny_teacher_folder(config):
    """The folder of the tiny world's teacher, shared by all runs beside it; trained if missing."""
    name = f"tiny-{config.seed}-{zlib.crc32(TINY_CONFIG.read_bytes()):08x}"
    folder = Path(config.out).parent / name
    if process()[0] == 0 and not folder.is_dir():
        announce("teacher", "training one, all anew if interrupted")
        partial = f"{folder}-{os.getpid()}.partial"
        with as_user_error(f"{TINY_CONFIG.name} makes no teacher in {partial} ({{}})."):
            teacher_config = AutoConfig.from_pretrained(TINY_CONFIG, trust_remote_code=False)
            tiny_teacher(teacher_config, config.seed).save_pretrained(partial)
            tiny_tokenizer().save_pretrained(partial)
        with contextlib.suppress(OSError):  # another command was faster, with the same teacher
            os.rename(partial, folder)
    gather()
    return folder


def measure_model(model, task, config, finished=False):
    """All that is measured on a model, a dict; finished: with the tiny world's questions, too."""
    result = {"parameters": model.num_parameters()} | evaluate(model, task.held_out)
    if task.problems is not None:
        result |= result_scores(model, task.problems, config.batch_size)
    if finished and task.documents is None:
        result |= tiny_scores(model, task.tokenizer)
    return result


def train_student(method, config, student, task, scales):
    """Train one student, from its start or its last checkpoint. Returns a record of each step."""
    folder, first = Path(config.out) / method, process()[0] == 0
    optimizers = make_optimizers(student, config)
    folder.mkdir(exist_ok=True)
    records = load_checkpoint(folder / "checkpoints", student, optimizers)
    if not records:
        records = [{"step": 0, "tokens": 0, "held_out": measure_model(student.model, task, config)}]
    # The file goes back to the checkpoint, too: what came after it will come again.
    done, metrics = records[-1]["step"], folder / "metrics.jsonl"
    write(metrics, "".join(json.dumps(record) + "\n" for record in records))
    # A resumed run rereads all data up to where it stopped: a shuffled stream cannot skip.
    batches = itertools.islice(training_batches(config, task), done * config.grad_accum, None)
    loop = distill(task.teacher, student, batches, config, scales, optimizers, done)
    signals = []  # they wait for the end of a step, and then end the run
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    bar = tqdm(loop, method, config.steps, leave=False, disable=not first, initial=done)
    for record in bar:
        step, last = record["step"], record["step"] == config.steps
        record["tokens"] *= step
        if config.measure_every and (last or step % config.measure_every == 0):
            student.merge()
            record["held_out"] = measure_model(student.model, task, config)
        records.append(record)
        if first:
            with open(metrics, "a") as file:
                print(json.dumps(record), file=file)
        stopping = any(gather(signals))  # all processes stop together
        if first and (last or stopping or config.save_every and step % config.save_every == 0):
            save_checkpoint(folder / "checkpoints", records, student, optimizers)
        if stopping:
            gather()  # nobody leaves before the first has written
            raise KeyboardInterrupt
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    return records


def make_student(method, config, task, calibration, teacher_row):
    """One student, trained, exported and measured: its summary, a dict; all in OUT/method."""
    folder, hidden_size = Path(config.out) / method, calibration.bases["red"].shape[1]
    student = new_student(method, task.teacher, hidden_size, calibration, config.seed)
    if process()[1] > 1:  # GPUs may differ in the last digit
        for parameter in student.parameters():
            torch.distributed.broadcast(parameter.data, 0)
    records = train_student(method, config, student, task, calibration.scales)
    if process()[0] == 0:
        export_student(student, task, folder / "student")
    gather()  # the others wait for it
    exported, _ = load_teacher(str(folder / "student"))  # as anyone would reopen it
    summary = measure_model(exported, task, config, finished=True)
    summary["curve"] = [record for record in records if "held_out" in record]
    about = f"A {type(exported).__name__} by {method} of red.py, under its teacher's licence."
    text = table({"teacher": teacher_row, method: summary})
    write(folder / "student" / "README.md", f"{about}\n\n```\n{config}\n\n{text}\n```\n")
    return summary


def run(config):
    """All the students of a command: label -> summary, the teacher's first."""
    out, settings = Path(config.out), settings_of(config)
    if process()[0] == 0:
        open_folder(out, settings)
    gather()
    name = config.model or tiny_teacher_folder(config)
    task = open_task(config, name)
    hidden_size = student_width(config.ratio, task.teacher.config)
    wide, place = task.teacher.config, f"{process()[1]} x {task.teacher.device}"
    announce("students", f"width {hidden_size} of {wide.hidden_size} of {name}, on {place}")
    if config.model and hidden_size % 32:
        announce("note", "no multiple of 32: slow on GPUs; llama.cpp cannot quantise all of it")
    calibration = calibrate(task.teacher, task.samples, hidden_size)
    rows = {"teacher": measure_model(task.teacher, task, config, finished=True)}
    write(out / "settings.json", settings)  # only now, when the input is known to be good
    for method in dict.fromkeys(config.methods):  # each once
        rows[method] = make_student(method, config, task, calibration, rows["teacher"])
    write(out / "summary.json", rows)
    return rows


# ==== Command line ============================================================================
# One sentence on stderr. Exit code 2: the user can mend it; 1: a run broke off; 130: interrupted.


def table(rows):
    """Label -> summary, as text: a line for each, and a legend."""
    lines, tiny = {}, "pairs" in rows["teacher"]
    for label, row in rows.items():
        cells = {"parameters": f"{row['parameters'] / 1e6:,.2f}M", "  loss": f"{row['loss']:.3f}"}
        shares = {}
        if tiny:
            shares["pairs: chosen"] = row["pairs"]["chosen"]
            shares["written"] = row["pairs"]["written"]
            shares["chains: chosen"] = row["chains"]["chosen"][-1]
            for length in (1, 3, 5):
                shares[f"of {length}"] = row["chains"]["written"][length - 1]
        if "results" in row:
            shares["results right"] = row["results"]
            shares["other tokens right"] = row["other_tokens"]
        cells |= {heading: f"{share:.0%}" for heading, share in shares.items()}
        cells["eRank"] = f"{fmean(row['erank']):.1f}"
        lines[label] = cells
    width = max(map(len, lines))
    told = ["  ".join([" " * width, *lines["teacher"]])]
    for label, cells in lines.items():
        padded = [text.rjust(len(heading)) for heading, text in cells.items()]
        told.append("  ".join([label.ljust(width), *padded]))
    told.append("loss: held out, nats per token. eRank: effective rank, the mean of the blocks.")
    if tiny:
        told.append(
            "pairs: knowledge. chains: reasoning. chosen: the likeliest of four answers, for"
        )
        told.append("chains of 5 operations; written, and of 1, 3, 5: by the model itself.")
    return "\n".join(told)


def make_parser():
    """The parser of all flags, one for each field of Config; it returns only what was typed."""
    after = f"tiny world: {TINY_DEFAULTS}\nmuon: learning_rate {MUON_RATE}, tiny {TINY_MUON_RATE}"
    for name, start in METHODS.items():
        after += f"\n  {name:<17}  {start}"
    options = {"description": __doc__, "epilog": after, "usage": "python red.py [flags]"}
    options |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "exit_on_error": False}
    options |= {"argument_default": argparse.SUPPRESS, "allow_abbrev": False}
    parser = argparse.ArgumentParser(**options)
    for field in dataclasses.fields(Config):
        kind = field.type if field.type in (int, float) else str
        options = {"type": kind, "metavar": field.name.rpartition("_")[2].upper()}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **options, **field.metadata)
    return parser


def parse_arguments(arguments=None):
    """Command line (list of words; None: sys.argv) -> Config. A mistake raises UserError."""
    with as_user_error("{}; python red.py --help lists every flag."):
        typed, rest = make_parser().parse_known_args(arguments)
        require(not rest, f"{' '.join(rest)} is not understood; see python red.py --help.")
    typed = vars(typed)
    tiny = "model" not in typed
    defaults = Config(**TINY_DEFAULTS) if tiny else Config()
    if typed.get("optimizer") == "muon":
        defaults.learning_rate = TINY_MUON_RATE if tiny else MUON_RATE
    config = dataclasses.replace(defaults, **typed)
    # Runs that differ get different folders.
    name = os.path.basename(os.path.abspath(config.model or "tiny"))
    for field, value in typed.items():
        if field not in (*NOT_IDENTITY, "model") and value != getattr(defaults, field):
            name += f"-{field.replace('_', '-')}-{value}".replace("/", "-")
    config.out = f"runs/{name[:200]}" if config.out is None else config.out
    if not tiny:
        local = files_of(config.model) or files_of(config.data)
        config.eval_data = config.eval_data or (None if local else "openai/gsm8k:main:test")
        config.data = config.data or "HuggingFaceFW/fineweb-edu:sample-10BT"
    check(config, typed)
    return config


def check(config, typed):
    """Reject impossible settings (UserError). Loads nothing."""
    least = dict(seq_len=2, calibration_samples=1, batch_size=1, grad_accum=1, eval_problems=1)
    least |= dict(temperature=1e-9, learning_rate=1e-9)
    for name, value in typed.items():
        flag, lowest = "--" + name.replace("_", "-"), least.get(name, 0)
        require(value != "", f"{flag} is empty; name something, or leave it out.")
        fits = not isinstance(value, int | float) or lowest <= value < 2**63
        require(fits, f"{flag} must be a number of at least {lowest}, got {value}.")
        require(config.model or "data" not in name, f"{flag} needs --model, the teacher.")
    require(0 < config.ratio <= 1, f"--ratio must lie in (0, 1], got {config.ratio}.")
    trained = {path.resolve() for path in files_of(config.data)} or {config.data}
    asked = {path.resolve() for path in files_of(config.eval_data)} or {config.eval_data}
    apart = config.data is None or not trained & asked
    require(apart, "--eval-data is part of --data; name another.")


def carry_out(config):
    """Everything that one command line asks for."""
    if torch.distributed.is_torchelastic_launched() and not torch.distributed.is_initialized():
        torch.distributed.init_process_group()  # nccl for GPUs, gloo for CPUs
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    rows = run(config)
    if process()[0] == 0:
        print(f"\n{table(rows)}\n")
        for label in rows if "example" in rows["teacher"] else []:
            print(f"{label:<17}  {rows[label]['example']}")
        print(f"\nstudents in {config.out}; python .github/draw.py {config.out} draws their curves")
    if torch.distributed.is_initialized():  # its threads must not outlive Python
        torch.distributed.destroy_process_group()


def main(arguments=None):
    """Run one command line (a list of words; None: sys.argv) and return its exit code."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel("ERROR")  # it would report each retry
    for number in (signal.SIGINT, signal.SIGTERM):  # a training that failed may have left others
        signal.signal(number, signal.default_int_handler)
    again, lost = "run the same command to resume.", False
    try:
        carry_out(parse_arguments(arguments))
        return 0
    except KeyboardInterrupt:
        code, text = 130, f"interrupted; {again}"
    except UserError as error:
        code, text = 2, str(error)
    except (FloatingPointError, OSError) as error:
        code, text = 1, f"{error}; once that is mended, {again}"
    except RuntimeError as error:
        code, text = 1, "out of memory; try a smaller --batch-size or --seq-len."
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            if process()[1] == 1:
                raise
            text, lost = f"another process has ended ({error}); {again}", True
    finally:
        while LOCKS:
            os.close(LOCKS.pop())
    if os.environ.get("RANK", "0") != "0" and not lost:  # the first process speaks for all
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    print(f"red.py: {' '.join(text.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")  # some schedulers close them
    sys.stderr = sys.stderr or sys.stdout
    sys.stdout.reconfigure(errors="replace")  # a terminal may not know every letter
    sys.exit(main())
