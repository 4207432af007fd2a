"""RED: Reasoning-preserved Efficient Distillation, in one file to read beside the paper.

He, Tang, Nie, Li, Yang, Du, Sun, Ma: "Reasoning-preserved Efficient Distillation of Large
Language Models via Activation-aware Initialization", ICML 2026, arXiv 2605.29327. What is marked
[ours] is our own reading, where the paper is silent to us. What a run does:

    calibrate          a few sequences show which channels the frozen teacher uses (§5)
    initial_student    every weight is the teacher's, seen through a projection (§3, App. C),
                       and RED starts all projections as one selection of channels (§5)
    distill            Adam trains the projections (App. F.1), and in each training_step
      merge              the student's weights are made from the projections,
      alignment_loss     its activations are compared with the teacher's (App. B),
      distillation_loss  and its predictions, by KL and cross-entropy (App. B)
    save_pretrained    the merged student is an ordinary checkpoint, only narrower (App. C)
    measure_model      held-out loss, effective rank, reasoning (§4, §6)

    python red.py                                          the tiny world, nothing to download
    python red.py --ratio 0.25 --methods red pca lrc       narrower students of it, compared
    python red.py --model Qwen/Qwen2-0.5B --ratio 0.5      a real teacher from the hub
    torchrun --nproc_per_node 8 red.py --model FOLDER --data FILE.jsonl
"""

import argparse
import contextlib
import dataclasses
import difflib
import fcntl
import glob
import itertools
import json
import logging
import math
import os
import random
import re
import signal
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import HfApi
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

# ==== Settings ================================================================================
# Every choice of a run is one field of one dataclass, with its help text.

METHODS = {  # by where all projections start
    "red": "one selection of the teacher's most active channels: the paper's",
    "random-selection": "one selection of random channels",
    "pca": "the principal directions of the teacher's stream [ours, after SliceGPT]",
    "shared-orthogonal": "one random orthonormal basis [ours]",
    "orthogonal": "a random orthonormal basis for each matrix: the paper's ablation",
    "lrc": "random numbers for each matrix: Low-Rank Clone",
}


def setting(default, help):
    """One field of Config: its default and its line in --help."""
    help = help if default is None else f"{help} (default: {default})"
    given = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**given, metadata={"help": help})


@dataclasses.dataclass
class Config:
    """All settings of a run; the tiny world has defaults of its own, TINY_DEFAULTS below."""

    model: str | None = setting(None, "teacher: a folder or hub name; without it, the tiny world")
    ratio: float = setting(0.5, "width of a student as a share of the teacher's")
    methods: list[str] = setting(["red"], "one or more of the methods below")
    data: str | None = setting(None, "text to train on; unset: FineWeb-Edu, or the tiny world's")
    calibration_samples: int = setting(15, "sequences to calibrate on, from --data [ours]")
    seq_len: int = setting(512, "tokens per sequence")
    steps: int = setting(1000, "optimiser steps; 0: export and measure the start")
    batch_size: int = setting(8, "sequences per micro-batch and process")
    grad_accum: int = setting(1, "micro-batches per optimiser step and process")
    learning_rate: float = setting(3e-4, "Adam's learning rate, at its peak")
    temperature: float = setting(1.0, "softens both distributions in KL")
    alpha: float = setting(0.2, "weight of the alignment loss")
    seed: int = setting(0, "seed of everything random")
    eval_data: str | None = setting(None, "problems, or none; unset: GSM8K if nothing is local")
    eval_problems: int = setting(200, "how many of --eval-data's problems to measure")
    measure_every: int = setting(250, "steps between measurements; 0: at the start only")
    out: str | None = setting(None, "results folder; unset: runs/, named by non-default settings")
    save_every: int = setting(250, "steps between checkpoints; 0: on a signal only")


# ==== Effective rank (§4) =====================================================================
# The paper's account: hidden states of low effective rank are hard to tell apart, so a chain of
# reasoning, which must keep its steps apart, breaks first. To copy it: torch.


def effective_rank(hidden):
    """eRank(H) = exp(-sum p ln p), p = singular values / their sum (§4; Roy & Vetterli 2007).

    hidden: (..., d), all leading dimensions are rows. Returns a float from 1 to min(rows, d), and
    0.0 for a zero matrix. ValueError: values are not finite.
    """
    rows = hidden.detach().reshape(-1, hidden.shape[-1]).double()
    if not torch.isfinite(rows).all():
        raise ValueError("effective_rank needs finite values")
    # Eigenvalues of the smaller Gram matrix are squared singular values, found much faster.
    squares = torch.linalg.eigvalsh(rows @ rows.T if len(rows) < len(rows.T) else rows.T @ rows)
    rounding = squares[-1] * len(squares) * torch.finfo(torch.float64).eps
    values = squares[squares > rounding].sqrt()
    p = values / values.sum()
    return torch.exp(-(p * p.log()).sum()).item() if len(p) else 0.0


# ==== Looking inside a model ==================================================================
# A Llama-like block has seven linear modules and two norms; these names are all that this file
# knows of them, and forward hooks are its only way to look inside. To copy it: torch, contextlib.

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
def watch(model, names, see):
    """Within `with`, see(name, input, output) is called whenever one of the modules runs."""
    with contextlib.ExitStack() as hooks:
        for name in names:

            def hook(module, inputs, output, name=name):
                see(name, inputs[0], output)

            hooks.enter_context(model.get_submodule(name).register_forward_hook(hook))
        yield


def on_device(batch, model):
    """A batch, a dict, as (input_ids, labels) on the model's device: (batch, tokens) each.

    All tokens are real: there is no padding. Without `labels` they are the ids; -100 is ignored.
    """
    ids, labels = batch["input_ids"], batch.get("labels", batch["input_ids"])
    return ids.to(model.device), labels.to(model.device)


def last_hidden(model, ids):
    """A causal model's last normed hidden states, (batch, tokens, d), without any logits."""
    return model.model(ids, use_cache=False).last_hidden_state


@torch.no_grad()
def token_sums(model, batches, names, measure):
    """Run the model, and add up in float64 what `measure` makes of the named modules.

    measure(name, input, output) gets (tokens, width) float32 twice, and returns a dict of sums
    over tokens. Returns such a dict, with the number of "tokens". ValueError: there are none.
    """
    sums = {"tokens": 0}

    def see(name, before, after):
        before, after = before.flatten(0, 1).float(), after.flatten(0, 1).float()
        for key, value in measure(name, before, after).items():
            sums[key] = sums.get(key, 0.0) + value.double()

    with watch(model, names, see):
        for batch in batches:
            ids, _ = on_device(batch, model)
            sums["tokens"] += ids.numel()
            last_hidden(model, ids)
    if sums["tokens"] == 0:
        raise ValueError("there are no tokens to measure on")
    return sums


# ==== Calibration and selection (§5) ==========================================================
# The contribution of RED. A few sequences through the teacher score each channel of its residual
# stream; the best become the student's. The stream is one space, so one set of channels serves
# every matrix [ours]. To copy it: torch, dataclasses, and the section above.


def calibration_sums(name, before, after):
    """What one module adds to `token_sums` in the pass of calibration: a dict.

    Of a norm layer: the sums over tokens of its output y and of y**2, (2, d_t), and of h h.T for
    the stream h, each token at RMS 1, all norms in one. Else: the sum of the output's mean square.
    """
    if not name.endswith(NORMS):
        return {name: after.square().mean(-1).sum()}
    unit = before / before.square().mean(-1, keepdim=True).clamp_min(1e-12).sqrt()
    return {name: torch.stack([after.sum(0), after.square().sum(0)]), "moment": unit.T @ unit}


def channel_importance(sums, norms):
    """How much the teacher uses each channel of its residual stream, (d_t,) float64 (§5).

    sums: by `calibration_sums`; norms: names of the norm layers. The score is the variance of the
    layer's output over the tokens, scaled to sum 1, and added up over the layers [ours].
    FloatingPointError: values are not finite.
    """
    total = 0.0
    for name in norms:
        mean, mean_square = sums[name] / sums["tokens"]
        variance = (mean_square - mean.square()).clamp_min(0)
        total = total + variance / variance.sum()
    if not torch.isfinite(total).all():
        raise FloatingPointError("the teacher's activations are not finite")
    return total


def select_channels(importance, hidden_size):
    """Indices of the most important channels, ascending, (d_s,) int64 (§5).

    Equal scores go to the lower index. ValueError: not 0 < hidden_size <= d_t.
    """
    if not 0 < hidden_size <= len(importance):
        raise ValueError(f"cannot keep {hidden_size} of {len(importance)} channels")
    order = torch.sort(importance, descending=True, stable=True).indices
    return order[:hidden_size].sort().values


def selection_matrix(channels, width):
    """S in {0,1}, (width, d_s) float32: S[channels[j], j] = 1 (§5)."""
    return torch.eye(width)[:, channels.cpu()]  # S.T @ S = I: all singular values are 1 (Thm. 5.1)


def principal_directions(moment, hidden_size):
    """The leading eigenvectors of a sum of h h.T, (d_t, d_t) -> (d_t, d_s), for `pca` [ours]."""
    return torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :hidden_size].float().cpu()


def chosen_bases(sums, norms, hidden_size):
    """The two bases that a calibration suggests, (d_t, d_s) each: of channels, of directions."""
    importance = channel_importance(sums, norms)
    selection = selection_matrix(select_channels(importance, hidden_size), len(importance))
    return {"channels": selection, "directions": principal_directions(sums["moment"], hidden_size)}


@dataclasses.dataclass
class Calibration:
    """What is measured on the teacher before training (§5)."""

    batches: list  # the samples
    importance: torch.Tensor  # (d_t,), the score of each channel
    bases: dict  # "channels" and "directions": see `chosen_bases`
    agreement: dict  # of each basis between two halves of the samples: from d_s / d_t (chance) to 1
    energy: dict  # the share of the stream's energy that each basis keeps
    scales: dict  # aligned module -> mean square of its output, to divide its loss by [ours]


def calibrate(teacher, batches, hidden_size):
    """Measure the teacher on a list of two or more batches, each once: a Calibration (§5)."""
    norms, aligned = modules_of(teacher, NORMS), modules_of(teacher, ALIGNED)
    half = len(batches) // 2
    front = token_sums(teacher, batches[:half], norms + aligned, calibration_sums)
    back = token_sums(teacher, batches[half:], norms + aligned, calibration_sums)
    whole = {key: front[key] + back[key] for key in front}

    bases = chosen_bases(whole, norms, hidden_size)
    of_front = chosen_bases(front, norms, hidden_size)
    of_back = chosen_bases(back, norms, hidden_size)
    moment = whole["moment"].float().cpu()
    energy = {k: ((b.T @ moment @ b).trace() / moment.trace()).item() for k, b in bases.items()}
    # The mean squared cosine between two spaces; of two selections, the share in common.
    shared = {kind: (of_front[kind].T @ of_back[kind]).square().sum().item() for kind in bases}
    agreement = {kind: total / hidden_size for kind, total in shared.items()}

    scales = {name: max(whole[name].item() / whole["tokens"], 1e-12) for name in aligned}
    scores = channel_importance(whole, norms).cpu()
    return Calibration(batches, scores, bases, agreement, energy, scales)


# ==== The projected student and its merge (§3, App. C) ========================================
# The student is an ordinary, narrower model. Its weights are W @ P where a matrix reads the stream
# and P.T @ W where it writes to it, made once per step; gradients are carried back to P once.
# Selections take the norms' gains along. Rotations cannot: gains become part of the matrices that
# read, W @ diag(gain) @ P, and a tied head is untied, as the embedding follows no norm [ours].
# To copy it: torch and the sections above.

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
        self.projections = {name: self.trainable(start) for name, start in projections.items()}
        self.gains = {name: self.trainable(start) for name, start in gains.items()}

        # The teacher's weights by the student's names: a tied head has none of its own.
        self.frozen = {name: weight.detach() for name, weight in teacher.named_parameters()}
        if not model.config.tie_word_embeddings:
            self.frozen["lm_head.weight"] = teacher.lm_head.weight.detach()

        # Rotary tables live in head space, the same in both, and in no state dict: share them.
        model.model.rotary_emb = teacher.model.rotary_emb
        self.weights = self.merge()
        detached = {name: weight.detach() for name, weight in self.weights.items()}
        model.load_state_dict(detached, strict=False, assign=True)
        model.eval().tie_weights()
        model.model.embed_tokens.padding_idx = None  # or padding's row would get no gradient
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.weights[name].requires_grad)

    def trainable(self, start):
        """A parameter, float32 or better, that starts as a copy: many names may share a start."""
        precise = torch.promote_types(self.teacher.dtype, torch.float32)
        return torch.nn.Parameter(start.to(self.teacher.device, precise).clone().contiguous())

    def parameters(self):
        """Everything that learns, a list: the projections, then the gains."""
        return [*self.projections.values(), *self.gains.values()]

    def merged(self, name, weight):
        """The student's tensor in place of a weight or bias of the teacher's (App. C)."""
        module = name.rpartition(".")[0]
        if module in self.gains:
            return self.gains[module].to(weight.dtype)
        if module not in self.projections:  # q_norm, k_norm: in head space, as they are [ours]
            return weight
        projection, norm = self.projections[module], feeding_norm(module)
        if module.endswith(WRITERS):  # their biases, too, are in the stream
            return projection.to(weight.dtype).T @ weight
        if weight.dim() == 1:  # a bias of q, k, v, gate or up
            return weight
        if self.fold and norm:  # the gain scales the rows of P
            projection = self.frozen[f"{norm}.weight"][:, None] * projection
        return weight @ projection.to(weight.dtype)

    def merge(self):
        """All the student's weights, name -> tensor: differentiable in the projections."""
        return {name: self.merged(name, weight) for name, weight in self.frozen.items()}

    def make_weights(self):
        """Merge, and let the model use the result. Once per step."""
        self.weights = self.merge()
        for name, parameter in self.model.named_parameters():
            parameter.data = self.weights[name].detach()

    def carry_back(self):
        """From the gradients of the merged weights to those of the projections and gains."""
        grads = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        torch.autograd.backward([self.weights[name] for name in grads], list(grads.values()))
        self.model.zero_grad()
        self.weights = None


def initial_projection(method, calibration, generator):
    """Where a projection starts, by any of METHODS: (d_t, d_s) float32 (§5, §6)."""
    width, hidden_size = calibration.bases["channels"].shape
    if method == "red":
        return calibration.bases["channels"]
    if method == "pca":
        return calibration.bases["directions"]
    if method == "random-selection":
        channels = torch.randperm(width, generator=generator)[:hidden_size]
        return selection_matrix(channels.sort().values, width)
    gaussian = torch.randn(width, hidden_size, generator=generator)
    if method == "lrc":
        # N(0, 0.02) belongs to LRC's own width; a narrower one would lose the signal [ours].
        return 0.02 * (3072 / width) ** 0.5 * gaussian
    q, r = torch.linalg.qr(gaussian.double())
    return (q * r.diagonal().sign()).float()  # uniform over all orthonormal bases


def initial_gains(method, teacher, basis, batches):
    """Where the norm gains start, if all projections start as `basis`: name -> (d_s,) [ours].

    Kept channels keep the teacher's gains, rotations start at 1; either is multiplied by the mean
    of rms(h @ basis) / rms(h), as the student divides by the RMS of only what it keeps of h.
    """

    def kept_rms(name, before, after):
        kept = before @ basis.to(before.device)
        whole = before.square().mean(-1).clamp_min(1e-12)
        return {name: (kept.square().mean(-1) / whole).sqrt().sum()}

    norms = modules_of(teacher, NORMS)
    sums = token_sums(teacher, batches, norms, kept_rms)
    gains = {}
    for name in norms:
        gain = teacher.get_submodule(name).weight.detach().float().cpu() @ basis
        start = torch.ones_like(gain) if method in ROTATIONS else gain
        gains[name] = start * (sums[name] / sums["tokens"]).item()
    return gains


def initial_student(method, teacher, model, calibration, seed=0):
    """A ProjectedStudent at the start of training, by any of METHODS (§3, §5).

    model: of the student's shape, on any device. ValueError: a rotation's has a tied head.
    """
    if method in ROTATIONS and model.config.tie_word_embeddings:
        raise ValueError(f"a student of {method} needs a head of its own")
    names, generator = projected_matrices(model), torch.Generator().manual_seed(seed)
    if method in ("lrc", "orthogonal"):  # every matrix has a start of its own
        starts = [initial_projection(method, calibration, generator) for _ in names]
        gains = {norm: torch.ones(starts[0].shape[1]) for norm in modules_of(model, NORMS)}
    else:  # all matrices share one start
        starts = [initial_projection(method, calibration, generator)] * len(names)
        gains = initial_gains(method, teacher, starts[0], calibration.batches)
    projections = dict(zip(names, starts))
    return ProjectedStudent(teacher, model, projections, gains, fold=method in ROTATIONS)


# ==== Losses (App. B) =========================================================================
# KL from the teacher, cross-entropy of the next token, and alignment of activations. Logits are the
# largest tensors of a step, so KL, cross-entropy and their gradients are computed together, in
# chunks of tokens, and only one chunk's logits exist at a time. To copy it: torch, F.


def alignment_loss(student, teacher, projection=None):
    """Mean squared error between activations, over tokens and features: a scalar (App. B).

    student: (batch, tokens, n). teacher: the same for q, k, v, gate and up; for o and down, which
    write to the stream, (batch, tokens, d_t), with projection (d_t, n), which learns here, too.
    """
    error = student - (teacher if projection is None else teacher @ projection.to(teacher.dtype))
    # Not mse_loss: this keeps one tensor until backward, not two, and in bfloat16 no float32 copy.
    # By rows: on a CPU the norm of many millions of numbers at once comes out too low.
    precise = torch.promote_types(error.dtype, torch.float32)
    norms = torch.linalg.vector_norm(error, dim=-1, dtype=precise)
    return norms.square().sum() / error.numel()


def kl_and_cross_entropy(student_logits, teacher_logits, targets, temperature):
    """Both losses, each a sum over tokens, in nats (App. B).

    logits: (tokens, vocabulary); targets: (tokens,). KL(teacher || student) is of distributions
    softened by the temperature, and weighted by its square [ours; LRC has no square].
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


class ChunkedDistillation(torch.autograd.Function):
    """The work of `distillation_loss`: forward also forms the gradients, chunk by chunk."""

    logits_at_once = 2**24  # times 8 on a GPU, which needs larger matrix products

    @staticmethod
    def forward(ctx, hidden, head, teacher_hidden, teacher_head, targets, temperature):
        totals, count = torch.zeros(2, device=hidden.device), max(1, len(targets))
        size = max(1, ChunkedDistillation.logits_at_once * (8 if head.is_cuda else 1) // len(head))
        grad_hidden, grad_head = torch.zeros_like(hidden), torch.zeros_like(head)
        for start in range(0, len(targets), size):
            chunk = slice(start, start + size)
            logits = (hidden[chunk] @ head.T).requires_grad_()
            teacher_logits = teacher_hidden[chunk] @ teacher_head.T
            with torch.enable_grad():
                losses = kl_and_cross_entropy(logits, teacher_logits, targets[chunk], temperature)
                (gradient,) = torch.autograd.grad(sum(losses) / count, logits)
            grad_hidden[chunk] = gradient @ head
            grad_head.addmm_(gradient.T, hidden[chunk])
            totals = totals + torch.stack(losses).detach() / count
        ctx.save_for_backward(grad_hidden, grad_head)
        kl, cross_entropy = totals
        ctx.mark_non_differentiable(kl, cross_entropy)
        return totals.sum(), kl, cross_entropy

    @staticmethod
    def backward(ctx, grad_loss, *unused):
        grad_hidden, grad_head = (saved.mul_(grad_loss) for saved in ctx.saved_tensors)
        return grad_hidden, grad_head, None, None, None, None


def distillation_loss(hidden, head, teacher_hidden, teacher_head, labels, temperature):
    """KL(teacher || student) and next-token cross-entropy (App. B).

    hidden (batch, tokens, d_s) and head (vocabulary, d_s) make the student's logits, and the
    teacher's likewise, d_t wide. labels: (batch, tokens); they are shifted by one here, and -100
    is ignored. Both losses are means over the labels [ours; LRC sums KL over a sequence]. Returns
    (KL + cross-entropy, KL, cross-entropy) in nats per token; the first carries the gradient.
    """
    targets = labels[:, 1:]
    labelled = targets != -100
    rows, teacher_rows = hidden[:, :-1][labelled], teacher_hidden[:, :-1][labelled]
    inputs = (rows, head, teacher_rows, teacher_head, targets[labelled])
    return ChunkedDistillation.apply(*inputs, temperature)


# ==== One step, and the loop (App. F.1) =======================================================
# Frozen teacher, projected student, three losses, Adam. Weight decay is 0, because it would
# shrink the projections; warm-up, linear decay and clipping are LRC's. Under torchrun N processes
# compute one process's step on all N batches. `config` is a Config, or anything with its fields.
# To copy it: torch, itertools, math, time and the sections above.


def add_up(tensors):
    """Sum each tensor over torchrun's processes, in place."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def teacher_forward(teacher, ids):
    """The teacher's last hidden states, and its aligned modules' outputs by name."""
    activations = {}

    def keep(name, before, after):
        activations[name] = after

    with torch.no_grad(), watch(teacher, modules_of(teacher, ALIGNED), keep):
        return last_hidden(teacher, ids), activations


def student_forward(student, ids, activations, scales):
    """The student's last hidden states, and its alignment with the teacher's activations."""
    terms = []

    def compare(name, before, after):  # at once, so that the teacher's activations can go
        projection = student.projections[name] if name.endswith(WRITERS) else None
        term = alignment_loss(after, activations.pop(name), projection)
        terms.append(term / scales[name] if scales else term)

    with watch(student.model, modules_of(student.model, ALIGNED), compare):
        hidden = last_hidden(student.model, ids)
    return hidden, torch.stack(terms).sum()


def training_step(teacher, student, micro_batches, config, scales=None):
    """The gradients of one optimiser step, left in the student's projections and gains.

    micro_batches: an iterable, as for `on_device`; each is read when it is needed. scales: aligned
    module -> what its term is divided by [ours] (None: nothing, as in LRC). The loss is KL +
    cross-entropy + alpha * alignment (App. B), each micro-batch, of any process, weighted by its
    number of labels. Returns scalars: "loss", its terms, "tokens". ValueError: no batch.
    """
    # 1. Make the student's weights from the projections: once.
    student.make_weights()
    head, teacher_head = student.model.lm_head.weight, teacher.lm_head.weight

    totals, label_count, tokens = torch.zeros(4, device=head.device), 0, 0
    for batch in micro_batches:
        # 2. The teacher, then the student, compared with it module by module.
        ids, labels = on_device(batch, teacher)
        teacher_hidden, activations = teacher_forward(teacher, ids)
        hidden, alignment = student_forward(student, ids, activations, scales)

        # 3. KL and cross-entropy, and the gradients of the student's weights.
        inputs = (hidden, head, teacher_hidden, teacher_head, labels)
        prediction, kl, cross_entropy = distillation_loss(*inputs, config.temperature)
        loss = prediction + config.alpha * alignment
        count = int((labels[:, 1:] != -100).sum())
        (loss * count).backward()

        totals = totals + count * torch.stack([loss, kl, cross_entropy, alignment]).detach()
        label_count, tokens = label_count + count, tokens + ids.numel()
    if tokens == 0:
        raise ValueError("there is no batch for this step")

    # 4. Sums become means, and are carried back to the projections and gains: once.
    counts = torch.tensor([label_count, tokens], device=head.device)
    add_up([totals, counts])
    label_count, tokens = counts.clamp_min(1)
    for parameter in (*student.model.parameters(), *student.parameters()):
        if parameter.grad is not None:
            parameter.grad /= label_count
    student.carry_back()
    add_up([parameter.grad for parameter in student.parameters()])
    terms = zip(("loss", "kl", "cross_entropy", "alignment"), totals / label_count)
    return dict(terms) | {"tokens": tokens}


def learning_rate_at(step, config):
    """LRC's schedule: warm-up over half a percent of the steps, and linear decay to 0."""
    warm_up = max(1, round(0.005 * config.steps))
    return config.learning_rate * (1 - step / config.steps) * min(1.0, (step + 1) / warm_up)


def distill(teacher, student, batches, config, scales=None, optimizer=None, done=0):
    """Train the student in place (App. F.1). A generator: each iteration is one step.

    batches: an iterator. optimizer, done: of a run that goes on after `done` steps. Yields a
    record of each step, a dict. A step that is not finite changes nothing; ten in a row raise
    FloatingPointError, and batches that have ended ValueError. At the end student.model has the
    final weights; within the loop, call student.make_weights() before you use it.
    """
    optimizer = optimizer or torch.optim.Adam(student.parameters(), fused=True)
    failures = 0
    for step in range(done, config.steps):
        started = time.perf_counter()
        micro_batches = itertools.islice(batches, config.grad_accum)
        record = training_step(teacher, student, micro_batches, config, scales)
        record["gradient_norm"] = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        record["learning_rate"] = learning_rate_at(step, config)
        finite = math.isfinite(record["loss"] + record["gradient_norm"])
        if finite:
            optimizer.param_groups[0]["lr"] = record["learning_rate"]
            optimizer.step()
        optimizer.zero_grad()
        failures = 0 if finite else failures + 1
        if failures == 10:
            raise FloatingPointError("ten steps in a row are not finite; lower --learning-rate")

        record = {k: float(v) if math.isfinite(v) else None for k, v in record.items()}
        record["seconds"] = time.perf_counter() - started
        yield record | {"step": step + 1, "skipped": not finite}

    with torch.no_grad():
        student.make_weights()


# ==== The tiny world ==========================================================================
# A teacher in half a minute, with the paper's contrast in it: arithmetic modulo 10 that needs a
# chain of steps (reasoning), `7+5-3=?7+5=2;2-3=9#9`, and 60 fixed pairs that need none
# (knowledge), `abcd:wxyz`. Characters are tokens, and only answers are labels.

TINY_DEFAULTS = {"methods": ["red", "lrc"], "steps": 100, "batch_size": 64, "seq_len": 48}
TINY_DEFAULTS |= {"learning_rate": 1e-2, "measure_every": 10, "save_every": 0}
TINY_CONFIG = Path(__file__).with_name("tiny_config.json")
TINY_TEACHER_STEPS = 1500
TINY_ALPHABET = "0123456789+-*=?;#:abcdefghijklmnopqrstuvwxyz\n"
TINY_WORDS = ["".join(random.Random(i).choices(TINY_ALPHABET[18:44], k=4)) for i in range(120)]
TINY_PAIRS = [(f"{a}:", f"{b}\n") for a, b in zip(TINY_WORDS[::2], TINY_WORDS[1::2])]
TINY_LENGTHS = (1, 2, 3, 4, 5)


def solution(prompt, slip=None, amount=0):
    """The chain of steps that answers `7+5-3=?`, as text: `7+5=2;2-3=9#9` and a line's end.

    slip: the step (from 0) whose result is wrong by an amount; what follows goes on from there.
    """
    value, chain = int(prompt[0]), []
    for step, (sign, operand) in enumerate(zip(prompt[1:-2:2], map(int, prompt[2:-2:2]))):
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[sign]
        result = (result + (amount if step == slip else 0)) % 10
        chain.append(f"{value}{sign}{operand}={result}")
        value = result
    return f"{';'.join(chain)}#{value}\n"


def arithmetic_problem(length, generator):
    """A random problem of `length` operations modulo 10, as (prompt, answer) text."""
    prompt = str(generator.randrange(10))
    for _ in range(length):
        prompt += f"{generator.choice('+-*')}{generator.randrange(10)}"
    return f"{prompt}=?", solution(f"{prompt}=?")


def tiny_row(seq_len, generator):
    """Random lines of the tiny world, a quarter of them pairs: (token ids, labels), two lists."""
    ids, labels = [], []
    while len(ids) < seq_len:
        if generator.random() < 0.25:
            prompt, answer = generator.choice(TINY_PAIRS)
        else:
            prompt, answer = arithmetic_problem(generator.choice(TINY_LENGTHS), generator)
        tokens = [TINY_ALPHABET.index(character) for character in prompt + answer]
        ids += tokens
        labels += [-100] * len(prompt) + tokens[len(prompt) :]
    return ids[:seq_len], labels[:seq_len]


def tiny_batches(batch_size, seq_len, seed):
    """An endless iterator of batches of tiny-world lines; only answers are labels."""
    generator = random.Random(seed)
    while True:
        rows = torch.tensor([tiny_row(seq_len, generator) for _ in range(batch_size)])
        yield {"input_ids": rows[:, 0], "labels": rows[:, 1]}


def tiny_tokenizer():
    """The tiny world's characters as an ordinary transformers tokenizer, which saves and loads."""
    vocabulary = {character: i for i, character in enumerate(TINY_ALPHABET)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))  # characters
    tokenizer.decoder = tokenizers.decoders.Fuse()
    ends = {"eos_token": "\n", "pad_token": "\n"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)


def read_tiny_config():
    """The content of tiny_config.json, a dict. UserError: it makes no teacher of this world."""
    with as_user_error(f"{TINY_CONFIG.name} makes no teacher ({{}})."), torch.device("meta"):
        values = json.loads(TINY_CONFIG.read_text())
        fits = values["model_type"] in FAMILIES and values["vocab_size"] == len(TINY_ALPHABET)
        refuse(not fits, f"{TINY_CONFIG.name} needs vocab_size 45, model_type one of {FAMILIES}.")
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    return values


def tiny_teacher(values, seed, steps=TINY_TEACHER_STEPS):
    """Train the tiny world's teacher from random weights: a frozen model. values: of its config."""
    torch.manual_seed(seed)
    teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).float()
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    batches = tiny_batches(16, 48, seed)  # 48 characters hold any one line
    for _ in progress(range(steps), "train teacher", delay=0):
        ids, labels = on_device(next(batches), teacher)
        targets = labels[:, 1:]
        hidden = last_hidden(teacher, ids)[:, :-1][targets != -100]
        F.cross_entropy(teacher.lm_head(hidden), targets[targets != -100]).backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    return teacher.eval().requires_grad_(False)


# ==== Evaluation (§6) =========================================================================
# The paper's general benchmarks choose answers by likelihood, its reasoning benchmarks generate
# them: the tiny world does both. On real text, single steps of worked solutions are scored.


@torch.no_grad()
def evaluate(model, batches, tokens=4096):
    """Held-out `loss` in nats per label and `perplexity`, and three lists by block (§4, §6).

    Of the stream after it, the first `tokens` tokens: `erank`, each at RMS 1; `erank_raw` unscaled,
    ruled by massive activations; `similarity`, their mean cosine. FloatingPointError: not finite.
    """
    states = {f"model.layers.{i}": [] for i in range(len(model.model.layers))}
    total, count, seen = 0.0, 0, 0

    def see(name, before, after):
        states[name].append(after.flatten(0, 1).float())

    for batch in progress(batches, "evaluate"):
        ids, labels = on_device(batch, model)
        labelled = labels[:, 1:] != -100
        with watch(model, states if seen < tokens else (), see):
            hidden = last_hidden(model, ids)[:, :-1][labelled]
        seen, count = seen + ids.numel(), count + int(labelled.sum())
        for rows, wanted in zip(hidden.split(512), labels[:, 1:][labelled].split(512)):
            logits = model.lm_head(rows).float()
            total += F.cross_entropy(logits, wanted, reduction="sum").item()

    loss = total / max(1, count)
    if not math.isfinite(loss):
        raise FloatingPointError("the held-out loss is not finite; lower --learning-rate")
    measures = {"loss": loss, "perplexity": math.exp(min(loss, 700))}
    measures |= {"erank": [], "erank_raw": [], "similarity": []}
    for parts in states.values():
        rows = torch.cat(parts)[:tokens]
        unit, pairs = F.normalize(rows, dim=-1), len(rows) * (len(rows) - 1)
        cosines = unit.sum(0).square().sum().item() - len(rows)  # of pairs of different tokens
        measures["erank"].append(effective_rank(unit))
        measures["erank_raw"].append(effective_rank(rows))
        measures["similarity"].append(cosines / pairs)
    return measures


def generate(model, tokenizer, prompts, new_tokens):
    """Greedy continuations of a list of prompts, as texts of at most `new_tokens` tokens (§6)."""
    end = tokenizer.eos_token_id
    options = {"max_new_tokens": new_tokens, "do_sample": False, "repetition_penalty": 1.0}
    greedy = transformers.GenerationConfig(eos_token_id=end, pad_token_id=end, **options)
    batch = tokenizer(prompts, padding=len(prompts) > 1, padding_side="left", return_tensors="pt")
    output = model.generate(**batch.to(model.device), generation_config=greedy)
    start = batch["input_ids"].shape[1]
    return tokenizer.batch_decode(output[:, start:], skip_special_tokens=True)


@torch.no_grad()
def answer_logits(model, problems):
    """Yields for each problem the logits that predict its `ids` from its `answer_at` on."""
    rows = [torch.tensor(problem["ids"]) for problem in problems]
    # Padded on the right, where a causal model does not look: no mask is needed.
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    for states, problem in zip(last_hidden(model, padded.to(model.device)), problems):
        yield model.lm_head(states[problem["answer_at"] - 1 : len(problem["ids"]) - 1])


def share_chosen(model, tokenizer, questions):
    """The share of (prompt, [right answer, wrong answers]) whose right answer is likeliest (§6)."""
    problems, losses = [], []
    for prompt, answers in questions:
        rows = tokenizer([prompt + answer for answer in answers])["input_ids"]
        problems += [{"ids": row, "answer_at": len(prompt)} for row in rows]
    for problem, logits in zip(problems, answer_logits(model, problems)):
        answer = torch.tensor(problem["ids"][problem["answer_at"] :], device=model.device)
        losses.append(F.cross_entropy(logits.float(), answer, reduction="sum"))
    losses = torch.stack(losses).view(len(questions), -1)
    return share((losses[:, 0] < losses[:, 1:].amin(1)).tolist())


def tiny_questions(count):
    """TINY_PAIRS, then chains by length: (prompt, [right answer, three wrong ones]) each."""
    generator, wrong = random.Random(12345), random.Random(54321)  # for every model the same
    groups = [[]]
    for prompt, truth in TINY_PAIRS:
        others = [answer for _, answer in TINY_PAIRS if answer != truth]
        groups[0].append((prompt, [truth, *wrong.sample(others, 3)]))
    for length in TINY_LENGTHS:
        groups.append([])
        for _ in range(count):
            prompt, truth = arithmetic_problem(length, generator)
            slips = [divmod(i, 9) for i in wrong.sample(range(9 * length), 3)]
            slipped = [solution(prompt, step, amount + 1) for step, amount in slips]
            groups[-1].append((prompt, [truth, *slipped]))
    return groups


def share(answers):
    """The share of answers that are right, from 0 to 1; 0 if there are none."""
    return sum(answers) / max(1, len(answers))


def tiny_scores(model, tokenizer, count=200):
    """The shares of `pairs` and, by length, `chains` that are `chosen` and `written` right (§6).

    Chosen among four by likelihood; written by the model: all of a pair, a chain's last digit.
    """
    chosen, written = [], []
    for group in progress(tiny_questions(count), "questions"):
        prompts, truths = [prompt for prompt, _ in group], [answers[0] for _, answers in group]
        chosen.append(share_chosen(model, tokenizer, group))
        answers = generate(model, tokenizer, prompts, max(map(len, truths)))
        ends = [[text.strip().split("#")[-1] for text in texts] for texts in (answers, truths)]
        written.append(share([said == true for said, true in zip(*ends)]))
    scores = {"pairs": {"chosen": chosen[0], "written": written[0]}}
    scores["chains"] = {"chosen": chosen[1:], "written": written[1:]}
    return scores | {"example": {"prompt": prompts[0], "answer": answers[0].strip()}}


def worked_problem(row, tokenizer):
    """A `question` with a worked `answer`, as GSM8K has them, in tokens: for `step_scores`.

    `answer_at`: the index in `ids` where the answer starts. `results`: (start, end) in `ids` of the
    tokens with any character of a result or the `>` after it, such as `24>` in `<<48/2=24>>`.
    """
    text = document_text(row)
    prompt = text[: -len(str(row["answer"]))]
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    offsets, results = encoded["offset_mapping"], []
    for match in re.compile(r"=([^<>=]+>)>").finditer(text, len(prompt)):
        start, end = match.span(1)
        inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
        if inside:
            results.append((inside[0], inside[-1] + 1))
    answer_at = next(i for i, (_, end) in enumerate(offsets) if end > len(prompt))
    ids, prompt = encoded["input_ids"], prompt.strip()
    return {"prompt": prompt, "ids": ids, "answer_at": answer_at, "results": results}


def step_scores(model, problems, batch_size):
    """Which results of worked problems a model gets right, given the text before (§6) [ours].

    Shares right, 0 to 1: `results`; `by_step`, the first, second and later; `other_tokens` of the
    answers, for general ability. Also `by_problem`: for each, which results are right.
    """
    by_step, others, rows = [[], [], []], [], []
    for first in progress(range(0, len(problems), batch_size), "steps"):
        some = problems[first : first + batch_size]
        for problem, logits in zip(some, answer_logits(model, some)):
            start, said = problem["answer_at"], logits.argmax(-1).tolist()
            right = [a == b for a, b in zip(problem["ids"][start:], said, strict=True)]
            spans = [range(a - start, b - start) for a, b in problem["results"]]
            results = [all(right[i] for i in span) for span in spans]
            others += [right[i] for i in set(range(len(right))).difference(*spans)]
            rows.append({"prompt": problem["prompt"], "right": results})
            for step, result in enumerate(results):
                by_step[min(step, 2)].append(result)
    scores = {"results": share(sum(by_step, [])), "by_step": [share(step) for step in by_step]}
    return scores | {"other_tokens": share(others), "by_problem": rows}


# ==== Teachers and text (App. F) ==============================================================
# A frozen teacher, and batches of text, streamed; the first documents are held out.

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
FILE_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclasses.dataclass
class Task:
    """What a distillation needs besides a method."""

    teacher: torch.nn.Module
    tokenizer: object
    calibration: list  # batches
    held_out: list  # batches
    documents: object = None  # to train on; None: the tiny world's lines
    problems: list = None  # with worked solutions, for `step_scores`


def load_teacher(name):
    """A frozen teacher and its tokenizer, from a folder or the hub (§3). UserError: unusable."""
    advice = "pass a folder with config, safetensors and tokenizer, or a hub model in reach."
    with as_user_error(f"cannot load {name!r} ({{}}); {advice}"):
        config = AutoConfig.from_pretrained(name)
        config.return_dict, config.output_attentions = True, False
        kind, quantised = config.model_type, getattr(config, "quantization_config", None)
        refuse(kind not in FAMILIES, f"{name} is {kind!r}; supported: {', '.join(FAMILIES)}.")
        refuse(quantised, f"{name} is quantised; pass the full-precision checkpoint behind it.")
        adapter = os.path.exists(os.path.join(name, "adapter_config.json"))
        refuse(adapter, f"{name} has an adapter beside its weights; merge it into them first.")
        tokenizer = AutoTokenizer.from_pretrained(name)
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        options = {"config": config, "dtype": dtype, "output_loading_info": True}
        options |= {"use_safetensors": True, "ignore_mismatched_sizes": True}  # see below
        teacher, loading = AutoModelForCausalLM.from_pretrained(name, **options)

    for problem in ("missing", "unexpected", "mismatched"):
        keys = sorted(map(str, loading[f"{problem}_keys"]))
        refuse(keys, f"{name} does not fit its config: {problem} weights {', '.join(keys[:3])}.")
    finite = all(torch.isfinite(parameter).all() for parameter in teacher.parameters())
    refuse(not finite, f"the weights of {name} are not all finite numbers.")
    ids = [*tokenizer("1 a.")["input_ids"], tokenizer.eos_token_id or 0, tokenizer.vocab_size - 1]
    usable = len(ids) > 2 and max(ids) < teacher.config.vocab_size
    refuse(not usable, f"{name} lacks its tokenizer's files, or has another model's.")
    # A file may hold two different matrices where its config calls them tied: believe the file.
    teacher.config.tie_word_embeddings = teacher.lm_head.weight is teacher.model.embed_tokens.weight
    teacher.to("cuda" if torch.cuda.is_available() else "cpu")
    return teacher.eval().requires_grad_(False), tokenizer


def open_documents(source, flag):
    """A streaming dataset whose rows have a `text`, "" where it is null. UserError: unreadable.

    source: a file, a pattern of files, a folder, or of the hub NAME[:CONFIG[:SPLIT]].
    """
    import datasets  # here, because it takes seconds and the tiny world needs none of it

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # its errors become our one sentence
    advice = f"pass {flag} a .txt, .jsonl or .parquet file, or a hub dataset in reach."
    files, options = files_of(source), {"path": source, "split": "train"}
    reader = FILE_READERS.get(Path(source).suffix)
    with as_user_error(f"cannot read the data {source!r} ({{}}); {advice}"):
        refuse(os.path.isdir(source) and glob.has_magic(source), f"rename {source}, without *?[.")
        if os.path.isfile(source) or reader and not os.path.isdir(source):
            usable = reader and files and all(path.stat().st_size > 0 for path in files)
            refuse(not usable, f"{source} is no file with text; {advice}")
            options |= {"path": reader, "data_files": [glob.escape(str(path)) for path in files]}
        elif not files:
            options |= dict(zip(("path", "name", "split"), source.split(":")))
        blank = [re.search(rb"\n\r?\n\s*\S", open(path, "rb").read(10**6)) for path in files]
        if any(blank) and all(path.suffix == ".txt" for path in files):
            options["sample_by"] = "paragraph"  # blank lines separate documents, if any do
        documents = datasets.load_dataset(streaming=True, **options)
    return documents.map(lambda row, i: {"text": document_text(row, i + 1)}, with_indices=True)


def files_of(source):
    """The files that a name stands for, itself, a folder's or a pattern's; none: of the hub."""
    paths = [source] if os.path.exists(source or "") else glob.glob(source or "")
    if os.path.isdir(source or ""):
        paths = Path(source).rglob("*")
    return sorted(Path(path).resolve() for path in paths if os.path.isfile(path))


def document_text(row, number=1):
    """A row's `question` with `answer`, or its `text`; "" where it is null. UserError: none."""
    question, answer, text = row.get("question"), row.get("answer"), row.get("text")
    if question and answer:
        return f"Question: {question}\nAnswer: {answer}"
    known = "text" in row or ("question" in row and "answer" in row)
    usable, held = known and isinstance(text or "", str), ", ".join(row)
    refuse(not usable, f"row {number:,} lacks a `text`, or `question` and `answer`; it has {held}.")
    return text or ""


def readable(items, source):
    """The items of a source; what breaks while reading them becomes a UserError."""
    with as_user_error(f"cannot read the data {source!r} ({{}})."):
        yield from items


def packed(documents, tokenizer, batch_size, seq_len):
    """Batches cut from one long string of tokens, each document's with an end."""
    tokens, size, end = [], batch_size * seq_len, tokenizer.eos_token_id
    for document in documents:
        tokens += tokenizer(document["text"], verbose=False)["input_ids"]
        if end is not None and tokens[-1:] != [end]:
            tokens.append(end)
        while len(tokens) >= size:
            yield {"input_ids": torch.tensor(tokens[:size]).view(batch_size, seq_len)}
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
    batches = packed(mine, task.tokenizer, config.batch_size, config.seq_len)
    return readable(batches, config.data)


def open_task(config, name):
    """The Task of a teacher, a folder or hub name, and of its text (App. F.2).

    Held out are the first 200 documents, or a tenth of a smaller source, at most 32 sequences.
    UserError: the teacher or the text is unusable.
    """
    teacher, tokenizer = load_teacher(str(name))
    places = teacher.config.max_position_embeddings
    refuse(config.seq_len > places, f"--seq-len is beyond the {places:,} positions of {name}.")
    if config.data is None:
        samples = tiny_batches(1, config.seq_len, f"calibration {config.seed}")
        calibration = list(itertools.islice(samples, config.calibration_samples))
        held_out = tiny_batches(64, config.seq_len, f"held out {config.seed}")
        return Task(teacher, tokenizer, calibration, list(itertools.islice(held_out, 2)))

    documents = open_documents(config.data, "--data")
    texts = [row["text"] for row in readable(documents.take(2000), config.data)]
    empty = texts.count("")
    if empty:
        announce("data", f"{empty:,} of the first {len(texts):,} documents are empty: left out")
    documents = documents.filter(lambda row: row["text"] != "")
    aside = max(1, min(200, (len(texts) - empty) // 10))
    training, batches = documents.skip(aside), []
    for some, most in ((documents.take(aside), 32), (training, config.calibration_samples)):
        sequences = readable(packed(some, tokenizer, 1, config.seq_len), config.data)
        batches.append(list(itertools.islice(sequences, most)))
    held_out, calibration = batches
    short = not held_out or len(calibration) < 2 or len(texts) - empty - aside < process()[1]
    refuse(short, f"{config.data} is too short: give more text, or a smaller --seq-len.")
    task = Task(teacher, tokenizer, calibration, held_out, training)
    if config.eval_data not in (None, "none"):
        rows = readable(open_documents(config.eval_data, "--eval-data"), config.eval_data)
        rows = (row for row in rows if row.get("question") and row.get("answer"))
        rows = itertools.islice(rows, config.eval_problems)
        task.problems = [worked_problem(row, tokenizer) for row in rows]
        annotated = any(problem["results"] for problem in task.problems)
        refuse(not annotated, f"--eval-data {config.eval_data} has no results as in <<48/2=24>>.")
    return task


# ==== Folders and checkpoints =================================================================
# OUT holds the students of one teacher under one set of settings, each in a folder of its own.
# Finished students are reused, unfinished ones resumed; summary.json is written last. Only the
# first process writes.

NOT_IDENTITY = ("out", "save_every", "measure_every", "methods")
DAMAGED = "is damaged ({}); delete it, and the same command makes it again."
LOCKS = []  # folders locked by this process until it exits


def write(path, value):
    """Write text, tensors (a .pt file), or any other value as JSON. UserError: it cannot be."""
    if process()[0] == 0:
        beside = path.with_name(path.name + ".partial")
        with as_user_error(f"cannot write {path} ({{}}): disk full? The same command goes on."):
            if path.suffix == ".pt":
                torch.save(value, beside)
            else:
                text = value if isinstance(value, str) else json.dumps(value, indent=1)
                beside.write_text(text, "utf-8", "replace")
            os.replace(beside, path)


def settings_of(config):
    """What identifies a run: settings, size and dates of its files, commits of hub sources."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_IDENTITY}
    if config.model is None:
        settings["tiny_config"] = read_tiny_config()
    for name in ("model", "data", "eval_data"):
        stats = [path.stat() for path in files_of(settings[name])]
        if stats:
            dates = sum(int(stat.st_mtime) for stat in stats)  # another file or date, another sum
            settings[f"{name} on disk"] = f"{sum(s.st_size for s in stats):,} bytes, dates {dates}"
        elif settings[name] not in (None, "none"):
            kind = "model" if name == "model" else "dataset"
            with contextlib.suppress(Exception):  # out of reach, it may be in the cache
                where = settings[name].partition(":")[0]
                commit = HfApi().repo_info(where, repo_type=kind, timeout=10).sha
                settings[f"{name} on the hub"] = commit
    return gather(settings | {"program": "red.py", "processes": process()[1]})[0]


def open_folder(folder, settings):
    """Check that a folder is free or holds these settings. UserError: it holds anything else."""
    base = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    usable = base.is_dir() and os.access(base, os.W_OK)
    refuse(not usable, f"--out {folder} cannot be made: {base} is a file, or not yours to write.")
    if not folder.exists() or all(path.suffix == ".partial" for path in folder.iterdir()):
        return
    sentence = f"{folder} holds files of no run of RED; name another --out."
    with as_user_error(sentence):
        stored = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        refuse(stored["program"] != "red.py", sentence)
    settings |= {k: v for k, v in stored.items() if "on the hub" in k} | settings  # out of reach
    pairs = [(k, stored.get(k), settings.get(k)) for k in sorted(stored | settings)]
    pairs = [(k, a, b) for k, a, b in pairs if a != b and (a or "on the hub" not in k)]
    different = "; ".join(f"{name}: {there} there, {here} here" for name, there, here in pairs)
    refuse(pairs, f"{folder} holds other settings ({different}); delete it, or name another --out.")


def begin(folder, settings):
    """Make a folder, and lock it for this command until it ends. UserError: it is locked."""
    gather()  # all processes have looked at what is there
    if process()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if str(folder) not in LOCKS:
            with as_user_error(f"another command works in {folder} ({{}}); name another --out."):
                fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
            LOCKS.append(str(folder))
        write(folder / "settings.json", settings)
    gather()


def save_checkpoint(folder, step, student, optimizer):
    """Save what resuming after `step` needs; the previous one is kept. UserError: cannot write."""
    state = {"step": step, "student": student.parameters(), "optimizer": optimizer.state_dict()}
    if process()[0] == 0:
        folder.mkdir(exist_ok=True)
        write(folder / f"step-{step:07}.pt", state)
        for path in [*folder.glob("*.partial"), *sorted(folder.glob("step-*.pt"))[:-2]]:
            path.unlink()
    gather()


def load_checkpoint(folder, student, optimizer):
    """Load the newest checkpoint and return its step; 0 if there is none. UserError: damaged."""
    paths = gather(sorted(folder.glob("step-*.pt")))[0]  # the first process chooses for all
    if not paths:
        return 0
    with as_user_error(f"{paths[-1]} is damaged ({{}}); delete it to go on from the one before."):
        refuse(zipfile.ZipFile(paths[-1]).testzip(), f"{paths[-1]} is damaged; delete it.")
        state = torch.load(paths[-1], "cpu", weights_only=True, mmap=True)  # runs no code from it
        for parameter, saved in zip(student.parameters(), state["student"], strict=True):
            parameter.data.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
    announce("checkpoint", f"going on from {paths[-1]}")
    return state["step"]


# ==== Making the students =====================================================================
# They differ in how their projections start, and in nothing else.


def student_config(teacher_config, hidden_size, untie=False):
    """The teacher's config at another width, with `head_dim` pinned; untie: with its own head."""
    values = teacher_config.to_dict()
    values.pop("quantization_config", None)  # of weights that are in full precision by now
    if not values.get("head_dim"):
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    tied = values["tie_word_embeddings"] and not untie
    values |= {"hidden_size": hidden_size, "tie_word_embeddings": tied}
    return type(teacher_config)(**values)


def student_width(ratio, teacher_config):
    """The width that is nearest to a share of the teacher's. UserError: that is 0."""
    llama = teacher_config.model_type == "llama"  # its width must be a multiple of its heads
    unit = teacher_config.num_attention_heads if llama else 1
    width = unit * math.floor(ratio * teacher_config.hidden_size / unit + 0.5)
    refuse(width == 0, f"--ratio {ratio} leaves no width; the least is {unit}.")
    return width


def new_student(method, teacher, hidden_size, calibration, seed=0):
    """The `initial_student` of a width, with a model of its own."""
    config = student_config(teacher.config, hidden_size, untie=method in ROTATIONS)
    options = {"dtype": teacher.dtype, "attn_implementation": teacher.config._attn_implementation}
    with torch.device("meta"):  # no memory and no random numbers: merging makes the weights
        model = AutoModelForCausalLM.from_config(config, **options)
    return initial_student(method, teacher, model, calibration, seed)


def tiny_teacher_folder(config):
    """The folder of the tiny world's teacher, shared by all runs beside it; trained if missing."""
    values = read_tiny_config()
    folder = Path(config.out).parent / f"tiny-{values['model_type']}-{config.seed}"
    settings = {"program": "red.py", "tiny_config": values, "seed": config.seed}
    open_folder(folder, settings)
    if not (folder / "summary.json").is_file():
        announce("teacher", f"training one, {TINY_TEACHER_STEPS} steps, all anew if interrupted")
        begin(folder, settings)
        if process()[0] == 0:
            tiny_teacher(values, config.seed).save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
        write(folder / "summary.json", {"steps": TINY_TEACHER_STEPS})
    gather()
    return folder


def set_up(config):
    """The task of a command's teacher, and the students' width; announces the plan."""
    name = config.model or tiny_teacher_folder(config)
    task = open_task(config, name)
    teacher, methods = task.teacher, ", ".join(config.methods)
    width, hidden_size = teacher.config.hidden_size, student_width(config.ratio, teacher.config)
    tokens = config.batch_size * config.seq_len * config.grad_accum * config.steps * process()[1]
    announce("teacher", f"{name}, width {width}, {teacher.num_parameters():,} parameters")
    announce("students", f"{methods}: width {hidden_size}, in {config.out}")
    untied = [method for method in config.methods if method in ROTATIONS]
    if teacher.config.tie_word_embeddings and untied:
        more = f"{teacher.config.vocab_size * hidden_size:,} parameters"
        announce("students", f"{', '.join(untied)}: a head of their own, {more}")
    text = f"{config.data or 'the tiny world'}, on {process()[1]} x {teacher.device}"
    announce("training", f"{tokens:,} tokens of {text}")
    if task.problems is not None:
        announce("reasoning", f"{len(task.problems)} worked problems of {config.eval_data}")
    elif config.data is not None:
        announce("reasoning", "not measured; --eval-data openai/gsm8k:main:test would")
    return task, hidden_size


def calibration_in(path, task, hidden_size):
    """The calibration that a file holds; if there is none, it is made. UserError: damaged."""
    if gather(path.is_file())[0]:
        with as_user_error(f"{path} {DAMAGED}"):
            calibration = Calibration(**torch.load(path, "cpu", weights_only=True))
    else:
        calibration = calibrate(task.teacher, task.calibration, hidden_size)
        write(path, vars(calibration))
    for kind, energy in calibration.energy.items():
        same, chance = calibration.agreement[kind], hidden_size / len(calibration.importance)
        text = f"{hidden_size} {kind} hold {energy:.0%} of the stream's energy, and two halves of"
        announce("calibration", f"{text} the samples agree on {same:.0%} (chance: {chance:.0%})")
    return calibration


def train_student(method, config, folder, student, task, scales):
    """Train one student, from its start or its last checkpoint. Returns a record of each step."""
    metrics, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    folder.mkdir(exist_ok=True)
    optimizer = torch.optim.Adam(student.parameters(), fused=True)
    done = load_checkpoint(checkpoints, student, optimizer)
    if done == 0:
        records = [{"step": 0, "tokens": 0, "held_out": measure_model(student.model, task, config)}]
    else:  # what came after the checkpoint will come again
        with as_user_error(f"{metrics} is damaged ({{}}); delete {folder} to train anew."):
            records = [json.loads(line) for line in metrics.read_text().splitlines()[: done + 1]]
            refuse(records[done]["step"] != done, f"{metrics} lacks steps; delete {folder}.")
    write(metrics, "".join(json.dumps(record) + "\n" for record in records))

    measure_every, save_every = config.measure_every, config.save_every
    # A resumed run rereads all data up to where it stopped: a shuffled stream cannot skip.
    batches = itertools.islice(training_batches(config, task), done * config.grad_accum, None)
    loop = distill(task.teacher, student, batches, config, scales, optimizer, done)
    bar = progress(loop, method, delay=0, initial=done, total=config.steps)
    SIGNALS.update(wait=True)
    with open(metrics, "a") as file:
        for record in bar:
            step, tokens = record["step"], int(record["tokens"])
            if step == done + 5:  # enough to tell how long the rest will take
                rest = record["seconds"] * (config.steps - step)
                announce("time", f"{method}: about {tqdm.format_interval(rest)} of training remain")
            record["tokens_per_second"] = tokens / record.pop("seconds")
            record["tokens"] = step * tokens
            bar.set_postfix(nats=record["cross_entropy"], refresh=False)
            if measure_every and (step % measure_every == 0 or step == config.steps):
                student.make_weights()
                record["held_out"] = measure_model(student.model, task, config)
            records.append(record)
            if process()[0] == 0:
                print(json.dumps(record), file=file, flush=True)
            stopping = any(gather(SIGNALS["came"]))  # all processes stop together
            if stopping or save_every and (step % save_every == 0 or step == config.steps):
                save_checkpoint(checkpoints, step, student, optimizer)
            if stopping:
                raise KeyboardInterrupt
    SIGNALS.update(wait=False)
    return records


def make_student(method, config, task, calibration, teacher_row):
    """One student, trained, exported and measured: its summary, a dict; all in OUT/method."""
    folder, teacher = Path(config.out) / method, task.teacher
    hidden_size = calibration.bases["channels"].shape[1]
    student = new_student(method, teacher, hidden_size, calibration, config.seed)
    if process()[1] > 1:  # GPUs may differ in the last digit
        for parameter in student.parameters():
            torch.distributed.broadcast(parameter.data, 0)
    records = train_student(method, config, folder, student, task, calibration.scales)
    if process()[0] == 0:  # the merged student is a standard checkpoint (App. C)
        student.model.generation_config = teacher.generation_config
        with as_user_error(f"cannot write {folder}/student ({{}}); the same command goes on."):
            student.model.save_pretrained(folder / "student")
            task.tokenizer.save_pretrained(folder / "student")
    gather()

    # The merged model is measured as anyone would load it: reopened from the checkpoint.
    exported, _ = load_teacher(str(folder / "student"))
    summary = {"method": method, "teacher": teacher_row, "tokens": records[-1]["tokens"]}
    if method == "red":
        summary["channels"] = calibration.bases["channels"].argmax(0).tolist()
    summary["curve"] = [record for record in records if "held_out" in record]
    summary |= measure_model(exported, task, config, folder)
    write(folder / "student" / "README.md", model_card(config, summary))
    write(folder / "summary.json", summary)
    return summary


def model_card(config, summary):
    """What a student's folder says of it, in Markdown: its teacher, data, results and settings."""
    name, text = config.model or "the tiny world's teacher", config.data or "the tiny world's lines"
    results = table({"teacher": summary["teacher"], summary["method"]: summary})
    settings = (Path(config.out) / "settings.json").read_text(encoding="utf-8")
    about = f"{name}, made narrower by `{summary['method']}` of red.py (arXiv 2605.29327) on {text}"
    head = "" if files_of(name) or config.model is None else f"---\nbase_model: {name}\n---\n"
    return f"{head}{about}; its licence is the same.\n\n```\n{results}\n\n{settings}\n```\n"


def measure_model(model, task, config, folder=None):
    """All that is measured on a model, a dict; with more, and a file, if it is finished."""
    result = evaluate(model, task.held_out)
    result |= {"hidden_size": model.config.hidden_size, "parameters": model.num_parameters()}
    prompt = task.tokenizer.decode(task.held_out[0]["input_ids"][0, :32])
    if task.problems is not None:
        result |= step_scores(model, task.problems, config.batch_size)
        lines, prompt = result.pop("by_problem"), task.problems[0]["prompt"]
        if folder is not None:
            write(folder / "problems.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    if folder is not None and task.documents is None:
        result |= tiny_scores(model, task.tokenizer)
    elif folder is not None:
        (answer,) = generate(model, task.tokenizer, [prompt], 80)
        result["example"] = {"prompt": prompt, "answer": answer}
    return result


def make_students(config):
    """All the students of a command: label -> summary, the teacher's first."""
    out, settings, rows = Path(config.out), settings_of(config), {}
    open_folder(out, settings)
    for method in config.methods:
        finished, exported = out / method / "summary.json", out / method / "student" / "config.json"
        if finished.is_file() and exported.is_file():
            load_teacher(str(exported.parent))  # says if it is damaged
            announce("student", f"{method}: finished before, in {out / method}")
            with as_user_error(f"{finished} {DAMAGED}"):
                rows[method] = json.loads(finished.read_text())
                table(rows | {"teacher": rows[method]["teacher"]})  # or something is missing
    if len(rows) < len(config.methods):
        task, hidden_size = set_up(config)
        begin(out, settings)  # only now, when the input is known to be good
        calibration = calibration_in(out / "calibration.pt", task, hidden_size)
        measured = out / "teacher.json"
        if not measured.is_file():
            write(measured, measure_model(task.teacher, task, config, out))
        with as_user_error(f"{measured} {DAMAGED}"):
            teacher_row = json.loads(gather(measured.read_text() if process()[0] == 0 else None)[0])
            table({"teacher": teacher_row})  # or something is missing
        for method in config.methods:
            if method not in rows:
                rows[method] = make_student(method, config, task, calibration, teacher_row)
    rows = {"teacher": rows[config.methods[0]]["teacher"]} | {m: rows[m] for m in config.methods}
    write(out / "summary.json", rows)
    return rows


# ==== Table and picture =======================================================================


def table_cells(row):
    """A summary's cells for `table`, by their headings: an upper and a lower word."""
    cells = {"|params": f"{row['parameters'] / 1e6:,.2f}M", "|loss": f"{row['loss']:.3f}"}
    if "pairs" in row:
        cells["pairs|chosen"] = f"{row['pairs']['chosen']:.0%}"
        for length, name in ((1, "1 step"), (3, "3 steps"), (5, "5 steps")):
            cells[f"{name}|written"] = f"{row['chains']['written'][length - 1]:.0%}"
        cells["pairs|written"] = f"{row['pairs']['written']:.0%}"
        cells["5 steps|chosen"] = f"{row['chains']['chosen'][4]:.0%}"
    if "results" in row:
        cells["results|right"] = f"{row['results']:.0%}"
        for heading, right in zip(("|1st", "|2nd", "|3rd+"), row["by_step"]):
            cells[heading] = f"{right:.0%}"
        cells["other|tokens"] = f"{row['other_tokens']:.0%}"
    blocks = len(row["erank"])
    for block in sorted({1, (blocks + 1) // 2, blocks}):
        cells[f"|{block}" if block > 1 else "eRank|at 1"] = f"{row['erank'][block - 1]:.0f}"
    return cells


def table(rows):
    """Label -> summary, as text: headings in two lines, a line for each, and a legend."""
    cells = {label: table_cells(row) for label, row in rows.items()}
    upper, lower = zip(*[heading.split("|") for heading in cells["teacher"]])
    lines = [("", *upper), ("", *lower), *[(label, *row.values()) for label, row in cells.items()]]
    name, *widths = [max(map(len, column)) for column in zip(*lines)]
    text = []
    for label, *values in lines:
        padded = [value.rjust(width) for value, width in zip(values, widths)]
        text.append("  ".join([label.ljust(name), *padded]))
    if "pairs" in rows["teacher"]:
        text.append("pairs: knowledge; steps of a chain: reasoning. chosen: the likeliest of four,")
        text.append("chance 25%; written: by the model itself (ending every chain in 0: 16-18%).")
    if "results" in rows["teacher"]:
        text.append("results of the 1st, 2nd, later steps of worked problems, right if all before")
        text.append("is given: reasoning. other tokens of these solutions: general ability.")
    text.append("loss: held out, nats per token. eRank: after a block, each token at RMS 1.")
    return "\n".join(text)


def draw(rows, path):
    """Held-out loss and effective rank (§4) over training, drawn. ImportError: no matplotlib."""
    from matplotlib.figure import Figure  # optional: nothing else needs it

    panels = {"loss": "held-out loss in nats", "erank": "effective rank, mean of the blocks"}
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, 2), panels.items()):
        for marker, (label, row) in zip("oDv^sP", list(rows.items())[1:]):
            curve = {at["step"]: torch.tensor(at["held_out"][name]).mean() for at in row["curve"]}
            axes.plot(list(curve), list(curve.values()), f"{marker}-", mfc="none", label=label)
        axes.set(title=title, xlabel="training step")
    axes.legend()
    figure.savefig(path)


# ==== Command line ============================================================================
# One sentence on stderr. Exit code 2: the user can fix it; 1: a run broke off; 130: interrupted.


class UserError(Exception):
    """An error the user can fix: one sentence for stderr, exit code 2, no traceback."""


def refuse(problem, sentence):
    """UserError with the sentence, if there is the problem."""
    if problem:
        raise UserError(sentence)


@contextlib.contextmanager
def as_user_error(sentence):
    """Re-raise errors in the block as UserError: `sentence`, with the error's text for {}."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = textwrap.shorten(str(error) or type(error).__name__, 250).rstrip(".")
        raise UserError(sentence.replace("{}", text)) from error


SIGNALS = {"wait": False, "came": False}


def note_signal(number, frame):
    """A first SIGTERM or SIGINT in training waits for the end of the step; others end the run."""
    if SIGNALS["came"] or not SIGNALS["wait"]:
        raise KeyboardInterrupt
    SIGNALS["came"] = True


def process():
    """(This process's number, from 0, and how many train together: torchrun's, or 1)."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


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


def progress(items, what, delay=2, **options):
    """The items behind a progress bar, which the first process shows if they take a while."""
    return tqdm(items, what, leave=False, delay=delay, disable=process()[0] > 0, **options)


def make_parser():
    """The parser of all flags: one for each field of Config."""
    tiny = [f"  {name} {value}" for name, value in TINY_DEFAULTS.items()]
    methods = [f"  {name:<17}  {start}" for name, start in METHODS.items()]
    after = ["defaults of the tiny world:", *tiny, "methods, by where projections start:", *methods]
    options = {"description": __doc__, "epilog": "\n".join(after), "usage": "python red.py [flags]"}
    options |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "exit_on_error": False}
    parser = transformers.HfArgumentParser(Config, allow_abbrev=False, **options)
    groups = {"model": "teacher and students", "data": "text", "steps": "training"}
    groups |= {"eval_data": "evaluation", "out": "output"}  # by their first flags
    for action in parser._optionals._group_actions[1:]:
        action.option_strings = action.option_strings[-1:]  # --batch_size is understood, too
        if action.choices is None:
            action.metavar = action.dest.rpartition("_")[2].upper()
        if action.dest in groups:
            group = parser.add_argument_group(groups[action.dest])
        group._group_actions.append(action)
    del parser._optionals._group_actions[1:]
    return parser


def parse_words(parser, arguments):
    """The words as a Config. UserError: a word is no flag of ours, or no value of its flag."""
    with as_user_error("{}; python red.py --help lists every flag."):
        options = {"look_for_args_file": False, "return_remaining_strings": True}
        config, rest = parser.parse_args_into_dataclasses(arguments, **options)
    (near,) = difflib.get_close_matches(str(rest[:1]), parser._option_string_actions, 1, 0)
    refuse(rest, f"there is no flag {' '.join(rest)}; the nearest is {near.replace('_', '-')}.")
    return config


def parse_arguments(arguments=None):
    """Command line (list of words; None: sys.argv) -> Config. A mistake raises UserError."""
    parser = make_parser()
    config = parse_words(parser, arguments)
    if is_tiny(config):
        parser.set_defaults(**TINY_DEFAULTS)
        config = parse_words(parser, arguments)
    fill_in(config, parser)
    check(config)
    return config


def is_tiny(config):
    """True if a run's text is the tiny world's: no --data, and no --model but of its alphabet."""
    if config.data is not None or config.model is None:
        return config.data is None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        values = json.loads(Path(config.model, "config.json").read_text())
        return values["vocab_size"] == len(TINY_ALPHABET)


def fill_in(config, parser):
    """Fill in what was not given. Runs that differ get different folders."""
    name = [f"runs/{os.path.basename(os.path.abspath(config.model or 'tiny'))}"]
    for field, value in vars(config).items():
        if value != parser.get_default(field) and field not in (*NOT_IDENTITY, "model"):
            name.append(f"{field.replace('_', '-')}-{value}".replace("/", "-"))
    config.out = "-".join(name)[:200] if config.out is None else config.out
    if is_tiny(config):
        return
    if config.eval_data is None and not (files_of(config.model) or files_of(config.data)):
        config.eval_data = "openai/gsm8k:main:test"
    if config.data is None:
        config.data = "HuggingFaceFW/fineweb-edu:sample-10BT"


def check(config):
    """Reject impossible settings (UserError). Loads nothing."""
    least = dict(calibration_samples=2, seq_len=2, batch_size=1, grad_accum=1, eval_problems=1)
    for name, value in vars(config).items():
        flag = "--" + name.replace("_", "-")
        refuse(value == "", f"{flag} is empty; name something, or leave it out.")
        if name in ("temperature", "learning_rate"):
            refuse(not 1e-9 <= value <= 1e9, f"{flag} must lie in [1e-9, 1e9], got {value}.")
        elif isinstance(value, int | float):
            wrong = not least.get(name, 0) <= value < 2**63
            refuse(wrong, f"{flag} must be a number of at least {least.get(name, 0)}, got {value}.")
        refuse("data" in name and value and not config.model, f"{flag} needs --model, the teacher.")
        if name in ("model", "data", "eval_data") and value is not None and config.out:
            path, out = Path(value).resolve(), Path(config.out).resolve()
            refuse(path in (out, *out.parents), f"--out {out} lies in {value}; name another --out.")
    refuse(not 0 < config.ratio <= 1, f"--ratio must lie in (0, 1], got {config.ratio}.")
    wrong = sorted(set(config.methods) & set(METHODS)) != sorted(config.methods)
    refuse(wrong, f"--methods takes {', '.join(METHODS)}, once each; got {config.methods}.")
    refuse(config.eval_data and is_tiny(config), "--eval-data is not for the tiny world.")
    trained = {config.data, *files_of(config.data)} - {None}
    seen = trained & {config.eval_data, *files_of(config.eval_data)}
    refuse(seen, "--eval-data is part of --data, and would be trained on; name another.")


def carry_out(config):
    """Everything that one command line asks for."""
    if torch.distributed.is_torchelastic_launched() and not torch.distributed.is_initialized():
        torch.distributed.init_process_group()  # nccl for GPUs, gloo for CPUs
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    rows = make_students(config)
    answers = {"": rows["teacher"]["example"]["prompt"]}
    answers |= {label: row["example"]["answer"] for label, row in rows.items()}
    if process()[0] == 0:
        print("\n" + table(rows) + "\n")
        for label, text in answers.items():  # the same prompt, answered by all
            text = f"{label:<17}  {' '.join(text.split())[:400]}"
            print(textwrap.fill(text, 100, subsequent_indent=" " * 19))
        for method in config.methods:
            announce("student", f"{config.out}/{method}/student, for AutoModelForCausalLM")
        try:
            draw(rows, f"{config.out}/curves.png")
            announce("picture", f"{config.out}/curves.png")
        except Exception as error:  # whatever is wrong with matplotlib, the run is finished
            announce("picture", f"none ({error}); it needs matplotlib: pip install matplotlib")
    if torch.distributed.is_initialized():  # its threads must not outlive Python
        torch.distributed.destroy_process_group()


def main(arguments=None):
    """Run one command line (a list of words; None: sys.argv) and return its exit code."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel("ERROR")  # it would report each retry
    SIGNALS.update(wait=False, came=False)
    signal.signal(signal.SIGINT, note_signal)
    signal.signal(signal.SIGTERM, note_signal)
    try:
        carry_out(parse_arguments(arguments))
        return 0
    except KeyboardInterrupt:
        code, text = 130, "interrupted; run the same command to resume."
    except UserError as error:
        code, text = 2, str(error)
    except FloatingPointError as error:
        code, text = 1, f"{error}."
    except (OSError, RuntimeError) as error:
        code, text = 1, textwrap.shorten(str(error) or type(error).__name__, 250).rstrip(".")
        text += "; once that is fixed, run the same command to resume."
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            text = "out of memory; try a smaller --batch-size or --seq-len."
        elif isinstance(error, RuntimeError) and process()[1] == 1:
            raise  # with several, it is how torch.distributed says that another process is gone
    if os.environ.get("RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)  # the first process says it, and torchrun then ends this one
    print(f"red.py: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may not know every letter
    sys.exit(main())
