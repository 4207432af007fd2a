"""RED: Reasoning-preserved Efficient Distillation, in one file to read beside the paper.

He, Tang, Nie, Li, Yang, Du, Sun, Ma: "Reasoning-preserved Efficient Distillation of Large
Language Models via Activation-aware Initialization", ICML 2026, arXiv 2605.29327. What is marked
[ours] is our own reading, where the paper is silent to us. What a run does:

    Config             the settings: python red.py --help
    calibrate          a few sequences show which channels the frozen teacher uses (§5)
    initial_student    every weight is the teacher's, seen through a projection (§3, App. C),
                       and RED starts all projections as one selection of channels (§5)
    distill            Adam trains the projections (App. F.1), and in each training_step
      merge              the student's weights are made from the projections,
      alignment_loss     its activations are compared with the teacher's (App. B),
      distillation_loss  and its predictions, by KL and cross-entropy (App. B)
    make_student       the merged student is an ordinary checkpoint, only narrower (App. C)
    measure_model      held-out loss, effective rank, reasoning (§4, §6)
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import random
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path
from typing import Literal

import safetensors
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

# ==== Settings ================================================================================
# Every choice of a run is one field of one dataclass, with its help text. This is only what there
# is to choose; the end of the file reads and checks it.

METHODS = ("red", "pca", "lrc", "orthogonal", "shared-orthogonal", "random-selection")


def setting(default, help):
    """One field of Config: its default and its line in --help."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class Config:
    """All settings of a run; the tiny world has defaults of its own, TINY_DEFAULTS below."""

    # The teacher, and the students to make of it
    model: str | None = setting(None, "teacher: a folder or hub name; without it, the tiny world")
    revision: str | None = setting(None, "hub revision of --model and --eval-only")
    ratio: float | None = setting(None, "student width as a share of the teacher's; unset: 0.5")
    hidden_size: int | None = setting(None, "student width itself, instead of --ratio")
    methods: list[str] = setting(["red"], f"{', '.join(METHODS)}; lrc-T40: at temperature 40")
    # Text: a .txt, .jsonl or .parquet file, or a hub dataset as NAME[:CONFIG[:SPLIT]]
    data: str | None = setting(None, "text to train on; unset: FineWeb-Edu, or the tiny world's")
    calibration_data: str | None = setting(None, "text to calibrate on; unset: --data's")
    calibration_samples: int = setting(15, "sequences to calibrate on")
    importance: Literal["variance", "norm-output"] = setting("variance", "what scores a channel")
    # Training
    steps: int = setting(1000, "optimiser steps; 0: export and measure the start")
    batch_size: int = setting(8, "sequences per micro-batch and process")
    grad_accum: int = setting(1, "micro-batches per optimiser step and process")
    seq_len: int = setting(512, "tokens per sequence")
    learning_rate: float = setting(3e-4, "Adam's learning rate, at its peak")
    temperature: float = setting(1.0, "of KL, for methods that do not name their own")
    alpha: float = setting(0.2, "weight of the alignment loss")
    alignment: Literal["relative", "plain"] = setting("relative", "over mean squares, or LRC's")
    orthogonality: float = setting(0.0, "weight of the penalty on |P.T @ P - I|^2")
    seed: int = setting(0, "seed of everything random")
    # Evaluation, machine, output
    eval: Literal["none", "chains"] = setting("none", "chains: the tiny world's reasoning")
    eval_only: str | None = setting(None, "train nothing, measure this checkpoint (and --model)")
    measure_every: int = setting(250, "steps between measures during training; 0: none")
    save_every: int = setting(250, "steps between checkpoints; 0: on a signal only")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "auto: bfloat16 on cuda only")
    out: str | None = setting(None, "folder for the results; unset: runs/tiny or runs/MODEL-WIDTH")
    overwrite: bool = setting(False, "replace an earlier run's results in --out")


# ==== Effective rank (§4) =====================================================================
# The paper's instrument. Hidden states of low effective rank are hard to tell apart, and a chain
# of reasoning that has to tell its steps apart breaks first. To copy it: torch.


def effective_rank(hidden):
    """eRank(H) = exp(-sum p ln p), p = singular values / their sum (§4; Roy & Vetterli 2007).

    hidden: (..., d), all leading dimensions are rows. Returns a float from 1 to min(rows, d), and
    0.0 for a zero matrix. ValueError: values are not finite.
    """
    rows = hidden.detach().reshape(-1, hidden.shape[-1])
    rows = (rows.cpu() if rows.device.type == "mps" else rows).double()  # mps has no float64
    if not torch.isfinite(rows).all():
        raise ValueError("effective_rank needs finite values")
    rows = rows / rows.abs().max().clamp_min(1e-300)  # so that squares cannot overflow
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
    """A batch on the model's device: a dict of (batch, tokens) tensors.

    batch: `input_ids`, perhaps `labels` (else the ids; -100 is ignored) and `attention_mask`.
    Adds `real`, bool: False at padding, which is then no label either.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    labels = batch.get("labels", ids).masked_fill(~real, -100)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask, "real": real}
    return {k: None if v is None else v.to(model.device) for k, v in batch.items()}


def last_hidden(model, batch):
    """A causal model's last normed hidden states, (batch, tokens, d), without any logits."""
    mask = batch["attention_mask"]
    return model.model(batch["input_ids"], attention_mask=mask, use_cache=False).last_hidden_state


@torch.no_grad()
def token_sums(model, batches, names, measure):
    """Run the model, and add up in float64 what `measure` makes of the named modules.

    measure(name, input, output) gets the real tokens, (tokens, width) float32 each, and returns a
    dict of sums over them. Returns such a dict, with the number of "tokens". ValueError: none.
    """
    sums = {"tokens": 0}
    for batch in batches:
        batch = on_device(batch, model)
        real = batch["real"]
        sums["tokens"] += int(real.sum())

        def see(name, before, after, real=real):
            for key, value in measure(name, before[real].float(), after[real].float()).items():
                value = value.cpu() if value.device.type == "mps" else value  # no float64 there
                sums[key] = sums.get(key, 0.0) + value.double()

        with watch(model, names, see):
            last_hidden(model, batch)
    if sums["tokens"] == 0:
        raise ValueError("there are no tokens to measure on")
    return sums


# ==== Calibration and selection (§5) ==========================================================
# The contribution of RED. A few sequences through the teacher score each channel of its residual
# stream; the best become the student's. The stream is one space, so one set of channels serves
# every matrix [ours]. To copy it: torch, dataclasses, and the section above.


def calibration_sums(name, before, after):
    """What one module adds to `token_sums` in the pass of calibration: a dict.

    Of a norm layer the sums over tokens of |y|, y and y**2 of its output y, (3, d_t), and of h h.T
    for the stream h, each token at RMS 1, all norms in one; else the output's mean square.
    """
    if not name.endswith(NORMS):
        return {name: after.square().mean(-1).sum()}
    unit = before / before.square().mean(-1, keepdim=True).clamp_min(1e-12).sqrt()
    outputs = torch.stack([after.abs().sum(0), after.sum(0), after.square().sum(0)])
    return {name: outputs, "moment": unit.T @ unit}


def channel_importance(sums, norms, statistic="norm-output"):
    """How much the teacher uses each channel of its residual stream, (d_t,) float64 (§5).

    sums: by `calibration_sums`; norms: names of the norm layers. Each layer's scores are scaled
    to sum 1, and added [ours]. statistic: `norm-output`, the mean absolute output of the norm,
    its gain included, or `variance`, that output's variance over the tokens (else KeyError).
    FloatingPointError: values are not finite.
    """
    total = 0.0
    for name in norms:
        mean_absolute, mean, mean_square = sums[name] / sums["tokens"]
        variance = (mean_square - mean.square()).clamp_min(0)
        score = {"norm-output": mean_absolute, "variance": variance}[statistic]
        total = total + score / score.sum()
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
    """S in {0,1}, (width, d_s) float32: S[channels[j], j] = 1 (§5). ValueError: one is repeated."""
    if len(set(channels.tolist())) < len(channels):
        raise ValueError("a channel is selected twice")
    return torch.eye(width)[:, channels.cpu()]  # S.T @ S = I: all singular values are 1 (Thm. 5.1)


def principal_directions(moment, hidden_size):
    """The leading eigenvectors of h h.T, (d_t, d_t) -> (d_t, d_s) float32, for `pca` [ours].

    SliceGPT (arXiv 2401.15024) takes a basis a layer; here one serves all, as channels do.
    """
    vectors = torch.linalg.eigh(moment).eigenvectors.cpu().flip(1)[:, :hidden_size]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * largest.sign()).float()  # a sign that all machines agree on


def chosen_bases(sums, norms, hidden_size, statistic):
    """The two bases that a calibration suggests, (d_t, d_s) each: of channels, of directions."""
    importance = channel_importance(sums, norms, statistic)
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
    scales: dict  # aligned module -> mean square of its output


def calibrate(teacher, batches, hidden_size, statistic="norm-output"):
    """Measure the teacher on a list of batches, in one pass: a Calibration (§5)."""
    norms, aligned = modules_of(teacher, NORMS), modules_of(teacher, ALIGNED)
    half = len(batches) // 2
    first = token_sums(teacher, batches[:half], norms + aligned, calibration_sums)
    second = token_sums(teacher, batches[half:], norms + aligned, calibration_sums)
    whole = {key: first[key] + second[key] for key in first}

    bases = chosen_bases(whole, norms, hidden_size, statistic)
    of_first = chosen_bases(first, norms, hidden_size, statistic)
    of_second = chosen_bases(second, norms, hidden_size, statistic)
    moment, same, energy = whole["moment"].float().cpu(), {}, {}
    for kind, basis in bases.items():
        # The mean squared cosine between two spaces; of two selections, the share in common.
        same[kind] = (of_first[kind].T @ of_second[kind]).square().sum().item() / hidden_size
        energy[kind] = ((basis.T @ moment @ basis).trace() / moment.trace()).item()

    importance = channel_importance(whole, norms, statistic).cpu()
    scales = {name: max(whole[name].item() / whole["tokens"], 1e-12) for name in aligned}
    return Calibration(batches, importance, bases, same, energy, scales)


# ==== The projected student and its merge (§3, App. C) ========================================
# The student is an ordinary, narrower model. Its weights are W @ P where a matrix reads the
# stream and P.T @ W where it writes to it, made once per optimiser step; it then runs as it is
# through any number of micro-batches, and its gradients are carried back to the projections once.
# Selections take the norms' gains along. Rotations cannot: gains become part of the matrices that
# read, W @ diag(gain) @ P, and a tied head is untied, for the embedding reads no norm [ours]. To
# copy it: torch and the sections above.

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
        self.projections = {name: self.trained(start) for name, start in projections.items()}
        self.gains = {name: self.trained(start) for name, start in gains.items()}

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

    def trained(self, start):
        """A parameter, float32 or better, that starts as a copy: many names may share a start."""
        precise = torch.promote_types(self.teacher.dtype, torch.float32)
        return torch.nn.Parameter(start.to(self.teacher.device, precise).clone().contiguous())

    def parameters(self):
        """Everything that learns, a list: the projections, then the gains."""
        return [*self.projections.values(), *self.gains.values()]

    def merged(self, name, weight):
        """The student's tensor in place of a weight or bias of the teacher's (App. C).

        Biases of o and down live in the stream and are projected like their weights; what lives
        in head space (q/k/v biases, q_norm, k_norm) is the teacher's own [ours].
        """
        module = name.rpartition(".")[0]
        if module in self.gains:
            return self.gains[module].to(weight.dtype)
        if module not in self.projections:  # q_norm, k_norm
            return weight
        projection, norm = self.projections[module], feeding_norm(module)
        if module.endswith(WRITERS):
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
        """Merge, let the model use the result, and clear its gradients. Once per step."""
        self.weights = self.merge()
        for name, parameter in self.model.named_parameters():
            parameter.data = self.weights[name].detach()
            parameter.grad = None

    def carry_back(self):
        """From the gradients of the merged weights to those of the projections and gains."""
        learned = [(n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None]
        weights = [self.weights[name] for name, _ in learned]
        torch.autograd.backward(weights, [gradient for _, gradient in learned])
        self.model.zero_grad()
        self.weights = None


def initial_projection(method, calibration, generator):
    """Where a projection starts, by any of METHODS: (d_t, d_s) float32 (§5, §6).

    `pca` and `shared-orthogonal` are ours; the latter and `orthogonal` differ in `initial_student`.
    """
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

    Kept channels keep the teacher's gains, rotations start at 1; both times the mean over tokens
    of rms(h @ basis) / rms(h), because a student divides by the RMS of what it keeps of h.
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
        if method in ROTATIONS:
            gain = torch.ones_like(gain)
        gains[name] = gain * (sums[name] / sums["tokens"]).item()
    return gains


def initial_student(method, teacher, model, calibration, seed=0):
    """A ProjectedStudent at the start of training, by any of METHODS (§3, §5).

    model: of the student's shape, on any device. ValueError: a rotation's has a tied head.
    """
    if method in ROTATIONS and model.config.tie_word_embeddings:
        raise ValueError(f"a student of {method} needs a head of its own")
    generator = torch.Generator().manual_seed(seed)
    one_each = method in ("lrc", "orthogonal")  # all others: one start that every matrix shares
    projections, basis = {}, None
    for name in projected_matrices(model):
        if basis is None or one_each:
            basis = initial_projection(method, calibration, generator)
        projections[name] = basis
    if one_each:
        gains = {name: torch.ones(basis.shape[1]) for name in modules_of(model, NORMS)}
    else:
        gains = initial_gains(method, teacher, basis, calibration.batches)
    return ProjectedStudent(teacher, model, projections, gains, fold=method in ROTATIONS)


# ==== Losses (App. B) =========================================================================
# KL from the teacher, cross-entropy of the next token, and alignment of activations. The logits
# would be the largest tensors of a step, so KL and cross-entropy are computed in chunks of
# tokens, and their gradient with them: no two full logit tensors ever exist. To copy it: torch, F.


def alignment_loss(student, teacher, projection=None, mask=None):
    """Mean squared error between activations, over real tokens and features: a scalar (App. B).

    student: (batch, tokens, n). teacher: the same for q, k, v, gate and up; for o and down, which
    write to the stream, (batch, tokens, d_t), with projection (d_t, n), which learns from here,
    too. mask: (batch, tokens), True for real tokens.
    """
    error = student - (teacher if projection is None else teacher @ projection.to(teacher.dtype))
    if mask is not None:
        error = error[mask]
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


def tokens_at_once(head):
    """How many tokens' logits exist at a time: GPUs need larger matrix products."""
    return max(128, 2**22 // len(head)) * (8 if head.is_cuda else 1)


class ChunkedDistillation(torch.autograd.Function):
    """The work of `distillation_loss`: forward also forms the gradients, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden, head, teacher_hidden, teacher_head, targets, temperature, count):
        totals, size = torch.zeros(2, device=hidden.device), tokens_at_once(head)
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
        return grad_hidden, grad_head, None, None, None, None, None


def distillation_loss(hidden, head, teacher_hidden, teacher_head, labels, temperature, count=None):
    """KL(teacher || student) and next-token cross-entropy (App. B).

    hidden (batch, tokens, d_s) and head (vocabulary, d_s) make the student's logits, and the
    teacher's likewise, d_t wide. labels: (batch, tokens); they are shifted by one here, and -100
    is ignored. Both losses are means over the labels [ours; LRC sums KL over a sequence], or sums
    over `count`. Returns (KL + cross-entropy, KL, cross-entropy) in nats per token, of which the
    first carries the gradient.
    """
    targets = labels[:, 1:]
    labelled = targets != -100
    count = max(1, int(labelled.sum()) if count is None else count)
    rows, teacher_rows = hidden[:, :-1][labelled], teacher_hidden[:, :-1][labelled]
    inputs = (rows, head, teacher_rows, teacher_head, targets[labelled])
    return ChunkedDistillation.apply(*inputs, temperature, count)


def orthogonality_penalty(projections):
    """|P.T @ P - I|^2, summed over the projections: the paper's other baseline (§6)."""
    grams = [projection.T @ projection for projection in projections]
    return sum((gram - torch.eye(len(gram)).to(gram)).square().sum() for gram in grams)


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


def teacher_forward(teacher, batch):
    """The teacher's last hidden states, and its aligned modules' outputs by name."""
    activations = {}

    def keep(name, before, after):
        activations[name] = after

    with torch.no_grad(), watch(teacher, modules_of(teacher, ALIGNED), keep):
        return last_hidden(teacher, batch), activations


def student_forward(student, batch, activations, scales):
    """The student's last hidden states, and its alignment with the teacher's activations."""
    terms = []
    mask = None if batch["attention_mask"] is None else batch["real"]

    def compare(name, before, after):  # at once, so that the teacher's activations can go
        projection = student.projections[name] if name.endswith(WRITERS) else None
        term = alignment_loss(after, activations.pop(name), projection, mask)
        terms.append(term / scales[name] if scales else term)

    with watch(student.model, modules_of(student.model, ALIGNED), compare):
        hidden = last_hidden(student.model, batch)
    return hidden, torch.stack(terms).sum()


def training_step(teacher, student, micro_batches, config, scales=None):
    """The gradients of one optimiser step, left in the student's projections and gains.

    micro_batches: a list, as for `on_device`. scales: aligned module -> what its term is divided
    by (None: nothing, as in LRC). The loss is KL + cross-entropy + alpha * alignment (App. B),
    means over all micro-batches, and over those of all processes. Returns scalars: "loss" and its
    terms, and the number of "tokens".
    """
    # 1. All losses are means over the whole step: count its labels and tokens.
    micro_batches = [on_device(batch, teacher) for batch in micro_batches]
    label_count = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro_batches)
    sizes = torch.stack([batch["real"].sum() for batch in micro_batches])
    tokens = sizes.sum()
    add_up([label_count, tokens])
    label_count, tokens, sizes = label_count.item(), tokens.item(), sizes.tolist()

    # 2. Make the student's weights from the projections: once.
    student.make_weights()
    head, teacher_head = student.model.lm_head.weight, teacher.lm_head.weight

    totals = torch.zeros(4, device=head.device)
    for batch, size in zip(micro_batches, sizes):
        # 3. The teacher, then the student, compared with it module by module.
        goal, activations = teacher_forward(teacher, batch)
        hidden, alignment = student_forward(student, batch, activations, scales)
        alignment = alignment * (size / tokens)

        # 4. KL and cross-entropy, and the gradients of the student's weights.
        inputs = (hidden, head, goal, teacher_head, batch["labels"])
        likelihood, kl, cross_entropy = distillation_loss(*inputs, config.temperature, label_count)
        loss = likelihood + config.alpha * alignment
        loss.backward()
        totals = totals + torch.stack([loss, kl, cross_entropy, alignment]).detach()

    # 5. Carry these gradients back to the projections and gains: once.
    student.carry_back()
    add_up([totals, *(parameter.grad for parameter in student.parameters())])
    if config.orthogonality:
        penalty = config.orthogonality * orthogonality_penalty(student.projections.values())
        penalty.backward()
        totals[0] += penalty.detach()
    return dict(zip(("loss", "kl", "cross_entropy", "alignment"), totals)) | {"tokens": tokens}


def learning_rate_at(step, config):
    """LRC's schedule: warm-up over half a percent of the steps, and linear decay to 0."""
    warm_up = max(1, round(0.005 * config.steps))
    return config.learning_rate * (1 - step / config.steps) * min(1.0, (step + 1) / warm_up)


def distill(teacher, student, batches, config, scales=None, optimizer=None, first=0):
    """Train the student in place (App. F.1). A generator: each iteration is one step.

    batches: an iterator. optimizer, first: of a run that goes on after `first` steps. Yields a
    record of each step, a dict. A step that is not finite changes nothing; ten in a row raise
    FloatingPointError, batches that end ValueError. At the end student.model has the final
    weights; within the loop, call student.make_weights() before you use it.
    """
    optimizer = optimizer or torch.optim.Adam(student.parameters(), fused=True)
    failures = 0
    for step in range(first, config.steps):
        started = time.perf_counter()
        micro_batches = list(itertools.islice(batches, config.grad_accum))
        if len(micro_batches) < config.grad_accum:
            raise ValueError(f"the batches ended at step {step + 1}")

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
        seconds, position = time.perf_counter() - started, micro_batches[-1].get("position")
        record |= {"step": step + 1, "skipped": not finite, "seconds": seconds}
        yield record | {"position": position}  # of the last batch in its source

    with torch.no_grad():
        student.make_weights()


# ==== The tiny world ==========================================================================
# A teacher in half a minute, with the paper's contrast in it: arithmetic modulo 10 that needs a
# chain of steps (reasoning), `7+5-3=?7+5=2;2-3=9#9`, and 60 fixed pairs that need none (recall),
# `abcd:wxyz`. Characters are tokens, and only answers are labels.

TINY_DEFAULTS = {
    "methods": ["red", "lrc", "lrc-T40"],
    "importance": "norm-output",
    "steps": 100,
    "batch_size": 64,
    "seq_len": 48,
    "learning_rate": 1e-2,
    "eval": "chains",
    "measure_every": 10,
    "save_every": 0,
}
TINY_CONFIG = Path(__file__).with_name("tiny_config.json")
TINY_TEACHER_STEPS = 1500
TINY_ALPHABET = "0123456789+-*=?;#:abcdefghijklmnopqrstuvwxyz\n"
TINY_WORDS = ["".join(random.Random(i).choices(TINY_ALPHABET[18:44], k=4)) for i in range(120)]
TINY_PAIRS = [(f"{a}:", f"{b}\n") for a, b in zip(TINY_WORDS[::2], TINY_WORDS[1::2])]
TINY_STEPS = (1, 2, 3, 4, 5)


def arithmetic_problem(steps, generator):
    """A random problem of `steps` operations modulo 10, as (prompt, answer) text."""
    value = generator.randrange(10)
    prompt, chain = str(value), []
    for _ in range(steps):
        sign, operand = generator.choice("+-*"), generator.randrange(10)
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[sign] % 10
        chain.append(f"{value}{sign}{operand}={result}")
        prompt, value = f"{prompt}{sign}{operand}", result
    return f"{prompt}=?", f"{';'.join(chain)}#{value}\n"


def tiny_row(seq_len, generator):
    """Random lines of the tiny world, a quarter of them pairs: (token ids, labels), two lists."""
    ids, labels = [], []
    while len(ids) < seq_len:
        if generator.random() < 0.25:
            prompt, answer = generator.choice(TINY_PAIRS)
        else:
            prompt, answer = arithmetic_problem(generator.choice(TINY_STEPS), generator)
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
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {character: i for i, character in enumerate(TINY_ALPHABET)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))  # nothing merged: characters
    tokenizer.decoder = decoders.Fuse()
    options = {"eos_token": "\n", "pad_token": "\n", "clean_up_tokenization_spaces": False}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def read_tiny_config():
    """The content of tiny_config.json, a dict. UserError: it makes no teacher of this world."""
    with as_user_error(f"{TINY_CONFIG.name} makes no teacher ({{}})."), torch.device("meta"):
        values = json.loads(TINY_CONFIG.read_text())
        family, size = values["model_type"], len(TINY_ALPHABET)
        refuse(family not in FAMILIES, f"{TINY_CONFIG.name}: model_type is none of {FAMILIES}.")
        refuse(values["vocab_size"] != size, f"{TINY_CONFIG.name}: vocab_size must be {size}.")
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    return values


def tiny_teacher(values, seed, device, steps=TINY_TEACHER_STEPS):
    """Train the tiny world's teacher, a frozen model, from random weights; values: its config's."""
    torch.manual_seed(seed)
    teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).float().to(device)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    batches = tiny_batches(16, 48, seed)  # 48 characters hold any one line
    for _ in progress(range(steps), "train teacher", delay=0):
        batch = on_device(next(batches), teacher)
        targets = batch["labels"][:, 1:]
        hidden = last_hidden(teacher, batch)[:, :-1][targets != -100]
        F.cross_entropy(teacher.lm_head(hidden), targets[targets != -100]).backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    return teacher.eval().requires_grad_(False)


# ==== Evaluation (§6) =========================================================================
# Held-out loss and effective rank of any causal language model, teacher or student alike, and the
# tiny world's two tests: recall of its pairs, and chains of reasoning.


@torch.no_grad()
def held_out_loss(model, batches):
    """Mean cross-entropy of the next token in nats, over the labels of all batches (§6)."""
    total, count = 0.0, 0
    for batch in progress(batches, "evaluate"):
        batch = on_device(batch, model)
        targets = batch["labels"][:, 1:]
        labelled = targets != -100
        hidden = last_hidden(model, batch)[:, :-1][labelled]
        for rows, wanted in zip(hidden.split(512), targets[labelled].split(512)):
            logits = model.lm_head(rows).float()
            total += F.cross_entropy(logits, wanted, reduction="sum").item()
        count += int(labelled.sum())
    return total / max(1, count)


@torch.no_grad()
def block_outputs(model, batches, tokens=4096):
    """The stream after each block, at the first real tokens: a list of (tokens, d) float32."""
    states = {f"model.layers.{i}": [] for i in range(len(model.model.layers))}
    for batch in batches:
        batch = on_device(batch, model)

        def see(name, before, after, real=batch["real"]):
            states[name].append(after[real].float())

        if sum(map(len, states["model.layers.0"])) < tokens:
            with watch(model, states, see):
                last_hidden(model, batch)
    return [torch.cat(parts)[:tokens] for parts in states.values()]


def evaluate(model, batches):
    """Held-out `loss` in nats per label and `perplexity`, and three lists by block (§4, §6).

    `erank` of the raw stream, which massive activations rule; `erank_normalised` with each token
    at RMS 1; `similarity`, the mean cosine of tokens. FloatingPointError: the loss is not finite.
    """
    loss = held_out_loss(model, batches)
    if not math.isfinite(loss):
        raise FloatingPointError("the held-out loss is not finite: try a lower --learning-rate")
    measures = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "similarity": []}
    measures |= {"erank": [], "erank_normalised": []}
    for rows in block_outputs(model, batches):
        unit, count = F.normalize(rows, dim=-1), len(rows)
        cosines = unit.sum(0).square().sum().item() - count  # of all pairs of different tokens
        measures["erank"].append(effective_rank(rows))
        measures["erank_normalised"].append(effective_rank(unit))
        measures["similarity"].append(cosines / (count * (count - 1)))
    return measures


def singular_values(student):
    """Singular values of projections, over their mean: (matrices, d_s), largest first (§4)."""
    last = len(student.model.model.layers) - 1  # all kinds of matrix, in three blocks
    blocks = tuple(f"model.layers.{i}." for i in (0, last // 2, last))
    chosen = (*blocks, "model.embed_tokens", "lm_head")
    projections = [p for name, p in student.projections.items() if name.startswith(chosen)]
    values = torch.stack([torch.linalg.svdvals(projection.detach()) for projection in projections])
    return values / values.mean(1, keepdim=True)


def generate(model, tokenizer, prompts, new_tokens):
    """Greedy continuations of a list of prompts, as texts."""
    end = tokenizer.eos_token_id
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": end}
    greedy = transformers.GenerationConfig(eos_token_id=end, **options)
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    output = model.generate(**batch.to(model.device), generation_config=greedy)
    new = output[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def chain_scores(model, tokenizer, problems=200):
    """Exact answers, from 0 to 1: `recall`, `chains` over TINY_STEPS (by the digit after `#`)."""
    generator = random.Random(12345)  # the same problems for every model, whatever the run's seed
    groups, scores = [TINY_PAIRS], []
    for steps in TINY_STEPS:
        groups.append([arithmetic_problem(steps, generator) for _ in range(problems)])
    for group in progress(groups, "generate"):
        prompts, truths = [prompt for prompt, _ in group], [truth for _, truth in group]
        answers = generate(model, tokenizer, prompts, max(map(len, truths)))
        results = [text.strip().rpartition("#")[2] for text in answers]
        wanted = [text.strip().rpartition("#")[2] for text in truths]
        scores.append(sum(map(str.__eq__, results, wanted)) / len(group))
    example = {"prompt": prompts[0], "truth": truths[0].strip(), "answer": answers[0].strip()}
    return {"recall": scores[0], "chains": scores[1:], "example": example}


# ==== Teachers and text (App. F) ==============================================================
# A frozen teacher, and batches of text: streamed, packed into sequences, shared out over
# processes, and read again from any position. The first documents are held out.

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclasses.dataclass
class Task:
    """What a distillation needs besides a method."""

    teacher: torch.nn.Module
    tokenizer: object
    calibration: list  # batches
    held_out: list  # batches
    documents: object = None  # to train on; None: the tiny world's lines


def load_teacher(name, revision=None, dtype=torch.float32, device="cpu"):
    """A frozen teacher and its tokenizer, from a folder or the hub (§3).

    UserError: missing, broken, quantised, or of another family (its weights are not fetched).
    """
    advice = "pass a folder with config.json, all weights and tokenizer, or a hub model in reach."
    options = {"revision": revision, "trust_remote_code": False}
    with as_user_error(f"cannot load {name!r} ({{}}); {advice}"):
        config = AutoConfig.from_pretrained(name, **options)
        kind, quantised = config.model_type, getattr(config, "quantization_config", None)
        refuse(kind not in FAMILIES, f"{name} is {kind!r}; supported: {', '.join(FAMILIES)}.")
        refuse(quantised, f"{name} is quantised; pass the full-precision checkpoint behind it.")
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        options |= {"config": config, "dtype": dtype, "output_loading_info": True}
        teacher, loading = AutoModelForCausalLM.from_pretrained(name, **options)
        missing = sorted(loading["missing_keys"])
        refuse(missing, f"the weights of {name} lack {', '.join(missing[:1])}; {advice}")
    # A file may hold two different matrices where its config calls them tied: believe the file.
    teacher.config.tie_word_embeddings = teacher.lm_head.weight is teacher.model.embed_tokens.weight
    return teacher.to(device).eval().requires_grad_(False), tokenizer


def open_documents(source, flag):
    """What a flag names -> a streaming datasets.IterableDataset. UserError: it cannot be read."""
    import datasets  # here, because it takes seconds and the tiny world needs none of it

    datasets.disable_progress_bars()
    path, options = Path(source), {"split": "train"}
    reader = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}.get(path.suffix)
    if reader or path.exists():
        usable = path.is_file() and reader and path.stat().st_size > 0
        refuse(not usable, f"{source} is no file with text; pass a .txt, .jsonl or .parquet file.")
        options |= {"path": reader, "data_files": source}
    else:
        parts = source.split(":")  # of the hub: name[:config[:split]]
        options |= dict(zip(("path", "name", "split"), parts))
    if reader == "text":
        options["sample_by"] = "paragraph"  # a blank line separates documents
    advice = f"pass {flag} a .txt, .jsonl or .parquet file, or a hub dataset in reach."
    with as_user_error(f"cannot read the data {source!r} ({{}}); {advice}"):
        return datasets.load_dataset(streaming=True, **options)


def readable(items, source):
    """The items of a source; what breaks while reading them becomes a UserError."""
    with as_user_error(f"cannot read the data {source!r} ({{}})."):
        yield from items


def document_tokens(document, tokenizer):
    """The token ids of a document's `messages`, `question` with `answer`, or `text`, and an end."""
    chat, text = document.get("messages"), document.get("text")
    if chat:
        sentence = "the data holds chats, but the teacher's tokenizer has no template."
        refuse(not tokenizer.chat_template, sentence)
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    elif document.get("question") and document.get("answer"):
        text = f"Question: {document['question']}\nAnswer: {document['answer']}"
    wanted = "the data needs one of the fields `text`, `messages`, `question` with `answer`"
    refuse(text is None, f"{wanted}; it has {', '.join(map(str, document)) or 'nothing'}.")
    # A chat template adds the special tokens itself.
    tokens = tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id  # it may be there: from the tokenizer, or a template and a newline
    return tokens if end is None or end in tokens[-2:] else tokens + [end]


def packed(documents, tokenizer, batch_size, seq_len, carried=()):
    """Batches cut from one long string of tokens; documents come as (place, document).

    A batch's `position`: the place of its last document, and the tokens carried to the next batch.
    """
    tokens, size = list(carried), batch_size * seq_len
    for place, document in documents:
        tokens += document_tokens(document, tokenizer)
        while len(tokens) >= size:
            ids = torch.tensor(tokens[:size]).view(batch_size, seq_len)
            del tokens[:size]
            position = {"place": place, "carried": tokens.copy()}
            yield {"input_ids": ids, "labels": ids, "position": position}


def numbered_documents(documents, config, epoch, skip):
    """Endless ((epoch, number), document) pairs for this process: its share of each epoch.

    datasets resumes with an empty shuffle buffer, so the first `skip` are read again instead.
    """
    from datasets.distributed import split_dataset_by_node

    share = {"rank": process_number(), "world_size": process_count(), "strategy": "examples"}
    while True:
        shuffled, number = documents.shuffle(seed=config.seed + epoch, buffer_size=2000), 0
        for number, document in enumerate(split_dataset_by_node(shuffled, **share), 1):
            if number > skip:
                yield (epoch, number), document
        refuse(number == 0, f"{config.data} has fewer training documents than processes.")
        epoch, skip = epoch + 1, 0  # used up: again, shuffled anew


def training_batches(config, task, position=None):
    """Endless training batches for this process, from a `position` on (App. F.2)."""
    if task.documents is None:
        lines = tiny_batches(config.batch_size, config.seq_len, f"training {config.seed}")
        share = itertools.islice(lines, process_number(), None, process_count())
        for number, batch in enumerate(share, 1):
            if number > (position or 0):
                yield batch | {"position": number}
    else:
        position = position or {"place": (0, 0), "carried": ()}
        documents = numbered_documents(task.documents, config, *position["place"])
        size = (config.batch_size, config.seq_len)
        batches = packed(documents, task.tokenizer, *size, position["carried"])
        yield from readable(batches, config.data)


def text_task(config, teacher, tokenizer):
    """The Task of real text, streamed (App. F.2). UserError: unreadable, too short.

    Held out are the first 200 documents, or a tenth of a smaller source, at most 32 sequences.
    """

    def sequences(documents, source, count):
        batches = packed(enumerate(documents), tokenizer, 1, config.seq_len)
        return list(itertools.islice(readable(batches, source), count))

    documents = open_documents(config.data, "--data")
    available = sum(1 for _ in readable(documents.take(2000), config.data))
    first = max(1, min(200, available // 10))
    training, source = documents.skip(first), config.calibration_data or config.data
    others = training if source == config.data else open_documents(source, "--calibration-data")
    held_out = sequences(documents.take(first), config.data, 32)
    calibration = sequences(others, source, config.calibration_samples)
    advice = "give more text (in a .txt, a blank line ends a document) or a smaller --seq-len."
    short = not held_out or not sequences(training, config.data, 1)
    refuse(short, f"{config.data} is too short: {advice}")
    refuse(len(calibration) < 2, f"{source} is too short to calibrate on: {advice}")
    return Task(teacher, tokenizer, calibration, held_out, training)


def open_task(config, name):
    """The Task of a teacher, or of whatever model is to be measured: a folder or a hub name."""
    dtype = getattr(torch, config.dtype)
    teacher, tokenizer = load_teacher(str(name), config.revision, dtype, config.device)
    strange = config.eval == "chains" and set(TINY_ALPHABET) - set(tokenizer.get_vocab())
    refuse(strange, "--eval chains needs a teacher of the tiny world, such as runs/tiny-llama-0.")
    if config.data is not None:
        return text_task(config, teacher, tokenizer)
    samples = tiny_batches(1, config.seq_len, f"calibration {config.seed}")
    held_out = tiny_batches(64, config.seq_len, f"held out {config.seed}")
    calibration = list(itertools.islice(samples, config.calibration_samples))
    return Task(teacher, tokenizer, calibration, list(itertools.islice(held_out, 2)))


# ==== Folders and checkpoints =================================================================
# A folder holds one run: its settings say which. What is finished is reused, what is not goes on,
# a stranger's is not touched. The first process alone writes, checkpoints and JSON beside and
# renamed; without its summary.json, written last, nothing counts as finished.

RUN_FILES = ("summary.json", "student", "checkpoints", "metrics.jsonl", "selection.json")
NOT_IDENTITY = ("out", "overwrite", "device", "save_every", "measure_every")


def write(path, value):
    """Write text, or any other value as JSON."""
    if process_number() == 0:
        beside = path.with_name(path.name + ".partial")
        beside.write_text(value if isinstance(value, str) else json.dumps(value, indent=1))
        os.replace(beside, path)


def settings_of(config):
    """What makes a run this one and no other, a dict."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_IDENTITY}
    if config.model is None and config.eval_only is None:
        settings["tiny_config"] = read_tiny_config()
    return settings | {"program": "red.py", "processes": process_count()}


def is_finished(folder, settings, overwrite=False):
    """True if the folder holds this very run, finished. UserError: it holds anything else."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    usable = there.is_dir() and os.access(there, os.W_OK)
    refuse(not usable, f"--out {folder} cannot be made: {there} is a file, or not yours to write.")
    if not folder.exists() or all(path.suffix == ".partial" for path in folder.iterdir()):
        return False

    with as_user_error(f"{folder} holds files of no run of RED; name another --out."):
        stored = json.loads((folder / "settings.json").read_text())
        refuse(stored["program"] != "red.py", f"{folder} is another program's; name another --out.")
    finished = (folder / "summary.json").is_file()
    names = sorted(name for name in settings | stored if stored.get(name) != settings.get(name))
    different = "; ".join(f"{n}: {stored.get(n)} there, {settings.get(n)} here" for n in names)
    # A measurement replaces no student, nor the other way round.
    other_kind = bool(stored.get("eval_only")) != bool(settings.get("eval_only"))
    advice = "name another --out" + ("" if other_kind else ", or pass --overwrite to replace it")
    sentence = f"{folder} holds a run with other settings ({different}); {advice}."
    refuse(different and (other_kind or not overwrite), sentence)
    return finished and not overwrite


def begin(folder, settings, overwrite=False):
    """Make a folder this run's; overwrite: remove the results that are there."""
    gather()  # all processes have looked at what is there
    if process_number() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for name in RUN_FILES if overwrite else ():  # summary first: without it, none is finished
            shutil.rmtree(folder / name, ignore_errors=True)  # does nothing to a file or a link
            (folder / name).unlink(missing_ok=True)
        write(folder / "settings.json", settings)
    gather()


def save_checkpoint(folder, step, student, optimizer, position):
    """Write all that is needed to go on after `step`; the one before is kept, too. OSError."""
    state = {"step": step, "positions": gather(position), "optimizer": optimizer.state_dict()}
    state["student"] = [parameter.detach() for parameter in student.parameters()]
    if process_number() == 0:
        folder.mkdir(exist_ok=True)
        fresh = folder / f"step-{step:07}.pt"
        beside = fresh.with_suffix(".partial")
        try:
            torch.save(state, beside)
        except RuntimeError as error:  # torch.save reports a full disk as RuntimeError
            beside.unlink()
            raise OSError(f"cannot write {fresh}; is the disk full?") from error
        os.replace(beside, fresh)
        earlier = [path for path in sorted(folder.glob("step-*.pt")) if path.name < fresh.name]
        for path in earlier[:-1]:
            path.unlink()
    gather()


def newest_checkpoint(folder):
    """Path of the newest whole checkpoint, or None. A damaged one is named and passed over."""
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        with contextlib.suppress(Exception):  # whatever a damaged file may raise
            if zipfile.ZipFile(path).testzip() is None:  # reads it all, against its checksums
                return path
        announce("checkpoint", f"{path} is damaged; trying the one before it")
    return None


def load_checkpoint(folder, student, optimizer):
    """Take up the newest whole checkpoint: (its step, this process's position), or (0, None)."""
    path = gather(newest_checkpoint(folder) if process_number() == 0 else None)[0]  # one for all
    if path is None:
        return 0, None
    state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code of the file's
    for parameter, saved in zip(student.parameters(), state["student"], strict=True):
        parameter.data.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    announce("checkpoint", f"going on from {path}")
    return state["step"], state["positions"][process_number()]


# ==== Making the students =====================================================================
# Students of one teacher differ in how their projections start, and in nothing else. Each has
# settings, a folder and a summary of its own.


def student_config(teacher_config, hidden_size, untie=False):
    """The teacher's config at another width, with `head_dim` pinned; untie: with its own head."""
    values = teacher_config.to_dict()
    for trace in ("quantization_config", "_name_or_path", "dtype", "transformers_version"):
        values.pop(trace, None)
    if not values.get("head_dim"):
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    tied = values["tie_word_embeddings"] and not untie
    values |= {"hidden_size": hidden_size, "tie_word_embeddings": tied}
    return type(teacher_config)(**values)


def student_width(config, teacher_config):
    """--ratio or --hidden-size -> the nearest accepted width. UserError: zero, or too wide."""
    most = teacher_config.hidden_size
    wanted = config.hidden_size or config.ratio * most
    # transformers insists on multiples of a Llama's heads.
    step = teacher_config.num_attention_heads if teacher_config.model_type == "llama" else 1
    width, limits = step * math.floor(wanted / step + 0.5), f"from {step} to {most}"
    refuse(width == 0 or wanted > most, f"--hidden-size must lie {limits} here, got {wanted:g}.")
    return width


def new_student(method, teacher, hidden_size, calibration, seed=0):
    """The `initial_student` of a width, with a model of its own."""
    config = student_config(teacher.config, hidden_size, untie=method in ROTATIONS)
    options = {"dtype": teacher.dtype, "attn_implementation": teacher.config._attn_implementation}
    with torch.device("meta"):  # no memory and no random numbers: merging makes the weights
        model = AutoModelForCausalLM.from_config(config, **options)
    return initial_student(method, teacher, model, calibration, seed)


def planned_runs(config):
    """Label -> settings of one student: one method, one temperature, one folder."""
    runs = {}
    for label in config.methods:
        method, _, temperature = label.partition("-T")
        temperature = float(temperature or config.temperature)
        runs[label] = dataclasses.replace(config, methods=[method], temperature=temperature)
        if len(config.methods) > 1:
            runs[label].out = f"{config.out}/{label}"
    return runs


def tiny_teacher_folder(config):
    """Where the tiny world's teacher lies, for all runs beside each other: trained if it is not."""
    values = read_tiny_config()
    folder = Path(config.out).parent / f"tiny-{values['model_type']}-{config.seed}"
    settings = {"program": "red.py", "tiny_config": values, "seed": config.seed}
    if not is_finished(folder, settings, config.overwrite):
        announce("teacher", f"training one from {TINY_CONFIG.name}, {TINY_TEACHER_STEPS} steps")
        begin(folder, settings, config.overwrite)
        if process_number() == 0:
            tiny_teacher(values, config.seed, config.device).save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
        write(folder / "summary.json", {"steps": TINY_TEACHER_STEPS})
    gather()
    return folder


def set_up(config):
    """The task of a command's teacher, and its calibration; says what is to be done."""
    name = config.model or tiny_teacher_folder(config)
    task = open_task(config, name)
    teacher, text = task.teacher, config.data or "the tiny world's lines"
    width, hidden_size = teacher.config.hidden_size, student_width(config, teacher.config)
    tokens = config.batch_size * config.seq_len * config.grad_accum * process_count()
    about = f"{teacher.config.model_type}, {teacher.num_parameters():,} parameters"
    announce("teacher", f"{name}: {about}, width {width}")
    announce("students", f"{', '.join(config.methods)}: width {hidden_size}, in {config.out}")
    announce("training", f"{config.steps:,} steps, {config.steps * tokens:,} tokens of {text}")
    announce("machine", f"{process_count()} x {config.device}, {config.dtype}")

    calibration = calibrate(teacher, task.calibration, hidden_size, config.importance)
    for kind, energy in calibration.energy.items():
        kept = f"{hidden_size} {kind} hold {energy:.0%} of the stream's energy, and two halves of"
        same = f"{calibration.agreement[kind]:.0%} (chance: {hidden_size / width:.0%})"
        announce("calibration", f"{kept} {len(task.calibration)} samples agree on {same}")
    return task, calibration


def measure_progress(student, task):
    """What is measured during training: a dict. Singular values: largest, middle, smallest."""
    with torch.no_grad():
        student.make_weights()
    values = singular_values(student).mean(0)
    chosen = [values[i].item() for i in (0, len(values) // 2, -1)]
    return {"held_out": evaluate(student.model, task.held_out), "singular_values": chosen}


def train_student(label, config, student, task, scales):
    """Train one student, from its start or its last checkpoint. Returns a record of each step."""
    metrics, checkpoints = Path(config.out) / "metrics.jsonl", Path(config.out) / "checkpoints"
    optimizer = torch.optim.Adam(student.parameters(), fused=True)
    first, position = load_checkpoint(checkpoints, student, optimizer)
    if first == 0:
        records = [{"step": 0, "tokens": 0} | measure_progress(student, task)]
    else:  # what came after the checkpoint will come again
        with as_user_error(f"{metrics} is damaged ({{}}); start anew with --overwrite."):
            records = [json.loads(line) for line in metrics.read_text().splitlines()[: first + 1]]
    write(metrics, "".join(json.dumps(record) + "\n" for record in records))

    measure_every, save_every = config.measure_every, config.save_every
    batches = training_batches(config, task, position)
    steps = distill(task.teacher, student, batches, config, scales, optimizer, first)
    bar = progress(steps, label, delay=0, initial=first, total=config.steps)
    SIGNALS.update(wait=True)
    with open(metrics, "a") as file:
        for record in bar:
            step, position, tokens = record["step"], record.pop("position"), int(record["tokens"])
            record["tokens_per_second"] = tokens / record.pop("seconds")
            record["tokens"] = step * tokens
            bar.set_postfix(loss=record["loss"], refresh=False)
            if measure_every and (step % measure_every == 0 or step == config.steps):
                record |= measure_progress(student, task)
            records.append(record)
            if process_number() == 0:
                file.write(json.dumps(record) + "\n")
                file.flush()
            stopping = any(gather(SIGNALS["came"]))  # all processes stop together
            if stopping or save_every and (step % save_every == 0 or step == config.steps):
                save_checkpoint(checkpoints, step, student, optimizer, position)
            if stopping:
                raise KeyboardInterrupt
    SIGNALS.update(wait=False)
    if any(gather(SIGNALS["came"])):  # during the last checkpoint
        raise KeyboardInterrupt
    return records


def make_student(label, config, task, calibration, teacher_row):
    """One student, trained, exported and measured: its summary, a dict; all in config.out."""
    folder, teacher, method = Path(config.out), task.teacher, config.methods[0]
    selection = calibration.bases["channels"]
    student = new_student(method, teacher, selection.shape[1], calibration, config.seed)
    if process_count() > 1:  # GPUs may differ in the last digit
        for parameter in student.parameters():
            torch.distributed.broadcast(parameter.data, 0)
    if method == "red":
        chosen = {"statistic": config.importance, "channels": selection.argmax(0).tolist()}
        write(folder / "selection.json", chosen | {"importance": calibration.importance.tolist()})

    scales = calibration.scales if config.alignment == "relative" else None
    records = train_student(label, config, student, task, scales)
    if process_number() == 0:  # the merged student is a standard checkpoint (App. C)
        student.model.generation_config = teacher.generation_config
        student.model.save_pretrained(folder / "student")
        task.tokenizer.save_pretrained(folder / "student")
        name, text = config.model or "the tiny world", config.data or "its own lines"
        card = f"---\nbase_model: {name}\n---\nA narrower {name}, distilled on {text} by `{method}`"
        (folder / "student/README.md").write_text(f"{card}; its licence is the teacher's.\n")
    gather()

    # What is measured is what was written: the checkpoint, opened as anyone would open it.
    exported, _ = load_teacher(str(folder / "student"), None, teacher.dtype, teacher.device)
    summary = {"method": method, "teacher": teacher_row, "tokens": records[-1]["tokens"]}
    summary["singular_spread"] = singular_values(student).std(1, correction=0).mean().item()
    summary["curve"] = [record for record in records if "held_out" in record]
    summary |= measure_model(exported, task, config)
    write(folder / "summary.json", summary)
    announce("student", f"{label}: held-out loss {summary['loss']:.3f} -> {folder / 'student'}")
    return summary


def measure_model(model, task, config):
    """Everything that is measured on a finished model: a dict."""
    result = evaluate(model, task.held_out)
    result |= {"hidden_size": model.config.hidden_size, "parameters": model.num_parameters()}
    return result | (chain_scores(model, task.tokenizer) if config.eval == "chains" else {})


def make_students(config):
    """All the students of a command: label -> summary, the teacher's first."""
    out, runs, done = Path(config.out), planned_runs(config), {}
    shared = settings_of(config)
    del shared["methods"], shared["temperature"]
    if len(runs) > 1:
        is_finished(out, shared, config.overwrite)
    for label, run in runs.items():
        if is_finished(Path(run.out), settings_of(run), config.overwrite):
            done[label] = json.loads((Path(run.out) / "summary.json").read_text())

    if len(done) < len(runs):
        task, calibration = set_up(config)
        teacher_row = measure_model(task.teacher, task, config)
        # Nothing is replaced before the input is known to be good, and then all of it at once.
        if len(runs) > 1:
            begin(out, shared, config.overwrite)
        todo = {label: run for label, run in runs.items() if label not in done}
        for run in todo.values():
            begin(Path(run.out), settings_of(run), config.overwrite)
        for label, run in todo.items():
            done[label] = make_student(label, run, task, calibration, teacher_row)
    rows = {"teacher": done[config.methods[0]]["teacher"]} | {label: done[label] for label in runs}
    if len(runs) > 1:
        write(out / "summary.json", rows)
    return rows


def measure_checkpoints(config):
    """--eval-only: the checkpoint, and before it --model where that is given: name -> summary."""
    folder, settings, rows = Path(config.out), settings_of(config), {}
    is_finished(folder, settings, config.overwrite)
    for name in (config.model, config.eval_only):
        if name is not None:
            task = open_task(config, name)
            rows[name] = measure_model(task.teacher, task, config)
            task = None  # one model at a time
    begin(folder, settings)
    write(folder / "summary.json", rows)
    return rows


# ==== Table and picture =======================================================================
# What a command ends with: the teacher and its students, side by side.


def table(rows):
    """Label -> summary, as text with one line for each."""
    width, lines = max(map(len, rows)), []
    for label, row in rows.items():
        columns = {"parameters": f"{row['parameters'] / 1e6:,.2f}M"}
        columns["held-out loss"] = f"{row['loss']:.3f}"
        if "chains" in row:
            columns["recall"] = f"{row['recall']:.0%}"
            for steps, score in zip(TINY_STEPS, row["chains"]):
                columns[f"{steps} step" if steps == 1 else f"{steps} steps"] = f"{score:.0%}"
        columns["spread"] = f"{row.get('singular_spread', 0):.2f}"
        columns["similarity"] = f"{sum(row['similarity']) / len(row['similarity']):.2f}"
        blocks = len(row["erank"])
        for block in sorted({max(1, round(blocks * part / 6)) for part in range(1, 7)}):
            columns[f"eRank {block}"] = f"{row['erank'][block - 1]:.0f}"
        cells = [cell.rjust(len(heading)) for heading, cell in columns.items()]
        lines.append("  ".join([label.ljust(width), *cells]))
    return "\n".join(["  ".join([" " * width, *columns]), *lines])


STYLES = dict(zip(("teacher", *METHODS), ("k*", "C0o", "C5P", "C3s", "C2^", "C4D", "C1v")))


def picture(rows, path):
    """Draw label -> summary to a file (§4, Tables 6, 7)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        announce("picture", f"{path} needs matplotlib: pip install matplotlib, and this again")
        return
    figure = Figure(figsize=(12, 9), layout="constrained")
    ability, layers, training, spectrum = figure.subplots(2, 2).flat
    for label, row in reversed(rows.items()):  # the teacher last, on top
        style = STYLES[label.partition("-T")[0]] + (":" if "-T" in label else "-")
        curve = row.get("curve", [])  # the teacher has none
        steps, held_out = [p["step"] for p in curve], [p["held_out"] for p in curve]
        erank = [sum(p["erank_normalised"]) / len(p["erank_normalised"]) for p in held_out]
        layers.plot(range(1, len(row["erank"]) + 1), row["erank_normalised"], style, label=label)
        training.plot(steps, erank, style)
        spectrum.plot(steps, [p["singular_values"][0] for p in curve], style)
        spectrum.plot(steps, [p["singular_values"][2] for p in curve], style)
        if "chains" in row:
            ability.plot(range(len(row["chains"]) + 1), [row["recall"], *row["chains"]], style)
            ability.set(title="accuracy", xlabel="steps of reasoning (0: recall)")
        else:
            ability.plot(steps, [p["loss"] for p in held_out], style)
            ability.set(title="held-out loss, nats per token", xlabel="training step")

    layers.set(title="effective rank", xlabel="layer")
    training.set(title="effective rank, mean of the layers", xlabel="training step")
    ends = "largest and smallest singular value of projections, over the mean"
    spectrum.set(title=ends, xlabel="training step")
    for axes in figure.axes:
        axes.xaxis.get_major_locator().set_params(integer=True)
    names = layers.get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=len(rows), reverse=True)
    figure.savefig(path)


# ==== Command line ============================================================================
# Errors that the user can fix get one sentence on stderr and exit code 2; a run that breaks off
# gets one and exit code 1.


class UserError(Exception):
    """An error the user can fix: one sentence for stderr, exit code 2, no traceback."""


def refuse(problem, sentence):
    """UserError with the sentence, if there is the problem."""
    if problem:
        raise UserError(sentence)


@contextlib.contextmanager
def as_user_error(sentence):
    """Re-raise errors in the block as UserError: `sentence`, with the error's first line for {}."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(sentence.replace("{}", first_line(error))) from error


def first_line(error):
    """The first line of an exception's text (and the next, if it only leads to it)."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")


SIGNALS = {"wait": False, "came": False}


def note_signal(number, frame):
    """A first SIGTERM or SIGINT in training waits for the end of the step; others end the run."""
    if SIGNALS["came"] or not SIGNALS["wait"]:
        raise KeyboardInterrupt
    SIGNALS["came"] = True


def process_count():
    """How many processes train together: torchrun's, or 1."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if several else 1


def process_number():
    """Which of them this is, from 0; the first one speaks and writes."""
    return torch.distributed.get_rank() if process_count() > 1 else 0


def gather(value=None):
    """[every process's value]; also the point where all processes wait for each other."""
    values = [value] * process_count()
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def announce(what, text):
    """One line of what is being done, from the first process."""
    if process_number() == 0:
        tqdm.write(f"{what:<12} {text}")


def progress(items, what, delay=2, **options):
    """The items behind a progress bar, which the first process shows if they take a while."""
    quiet = process_number() > 0
    return tqdm(items, desc=what, leave=False, delay=delay, disable=quiet, **options)


def parse_arguments(arguments=None):
    """Command line (list of words; None: sys.argv) -> Config. A mistake raises UserError."""
    tiny = "; ".join(f"{name} {value}" for name, value in TINY_DEFAULTS.items())
    about = f"{__doc__.splitlines()[0]} Without --model, the tiny world has other defaults: {tiny}."
    options = {"prog": "red.py", "description": about, "allow_abbrev": False}
    parser = transformers.HfArgumentParser(Config, exit_on_error=False, **options)
    with as_user_error("{}; python red.py --help lists every flag."):
        (config,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
        if is_tiny(config):
            parser.set_defaults(**TINY_DEFAULTS)
            (config,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    fill_in(config)
    check(config)
    return config


def is_tiny(config):
    """True if a run's text is the tiny world's: it names no other, and no real teacher."""
    named = config.model is not None or config.eval_only is not None
    return config.data is None and (not named or config.eval == "chains")


def fill_in(config):
    """Fill in what was not given."""
    if config.data is None and not is_tiny(config):
        config.data = "HuggingFaceFW/fineweb-edu:sample-10BT"
    if config.ratio is None and config.hidden_size is None:
        config.ratio = 0.5
    if config.out is None:
        config.out = "runs/tiny"
        if config.model is not None:
            config.out = f"runs/{Path(config.model).name}-{config.hidden_size or config.ratio}"
        if config.eval_only is not None:
            config.out = f"runs/eval-{Path(config.eval_only).name}"


def check(config):
    """Reject impossible settings (UserError). Loads nothing."""
    least = {"calibration_samples": 2, "seq_len": 2, "hidden_size": 1, "batch_size": 1}
    least |= {"grad_accum": 1, "steps": 0, "seed": 0, "alpha": 0, "orthogonality": 0}
    least |= {"measure_every": 0, "save_every": 0}
    out = Path(config.out).resolve()
    for name, value in vars(config).items():
        flag = "--" + name.replace("_", "-")
        refuse(value == "", f"{flag} is empty; name something, or leave it out.")
        if name in least and value is not None:
            wrong = not least[name] <= value < 2**63
            refuse(wrong, f"{flag} must be a number of at least {least[name]}, got {value}.")
        if name in ("temperature", "learning_rate"):
            refuse(not 0 < value < math.inf, f"{flag} must be a positive number, got {value}.")
        if name in ("data", "calibration_data", "revision") and value is not None:
            no_model = config.model is None and config.eval_only is None
            refuse(no_model, f"{flag} needs --model, the teacher to use.")
        if name in ("model", "eval_only", "data", "calibration_data") and value is not None:
            path = Path(value).resolve()
            inside = os.path.exists(value) and out in (path, *path.parents)
            refuse(inside, f"{value} lies in --out {config.out}; name another --out.")

    given, sentence = config.ratio is not None, "--ratio and --hidden-size both give the width;"
    refuse(given and config.hidden_size is not None, f"{sentence} name one of them.")
    refuse(given and not 0 < config.ratio <= 1, f"--ratio must lie in (0, 1], got {config.ratio}.")
    for label in config.methods:
        method, marked, temperature = label.partition("-T")
        known = ", ".join(METHODS)
        refuse(method not in METHODS, f"--methods knows no {label!r}; it takes {known}.")
        sentence = f"--methods {label!r} must end in a positive temperature, as lrc-T40 does."
        with as_user_error(sentence):
            refuse(marked and not 0 < float(temperature) < math.inf, sentence)
    runs = {(run.methods[0], run.temperature) for run in planned_runs(config).values()}
    sentence = "--methods names the same method twice at one temperature; name it once."
    refuse(len(runs) < len(config.methods), sentence)


def resolve_device(config):
    """Fill in --device and --dtype, and join torchrun's processes. UserError: no such device."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if config.device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        config.device = "cpu" if accelerator is None else accelerator.type
    if several and config.device == "cuda":
        config.device = f"cuda:{os.environ['LOCAL_RANK']}"
    sentence = f"there is no device {config.device!r} on this machine; --device cpu always works."
    with as_user_error(sentence):
        kind = torch.empty(0, device=config.device).device.type
    refuse(kind not in ("cpu", "cuda", "mps"), sentence)
    if config.dtype == "auto":
        config.dtype = "bfloat16" if kind == "cuda" else "float32"
    if kind == "cuda":
        torch.cuda.set_device(config.device)
    if several and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")


def carry_out(config):
    """Everything that one command line asks for (§6)."""
    resolve_device(config)
    make = make_students if config.eval_only is None else measure_checkpoints
    rows = make(config)
    if process_number() == 0:
        print("\n" + table(rows))
        if len(rows) > 2:
            picture(rows, Path(config.out) / "compare.png")
        for label, row in rows.items():
            if "example" in row:
                announce(label, row["example"]["prompt"] + row["example"]["answer"])
    if process_count() > 1:  # its threads must not outlive Python
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
        code, text = 130, "interrupted; the same command goes on (without --overwrite)."
    except UserError as error:
        code, text = 2, str(error)
    except FloatingPointError as error:
        code, text = 1, f"{error}."
    except torch.OutOfMemoryError:
        code, text = 1, "out of memory; try a smaller --batch-size or --seq-len."
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and process_count() == 1:
            raise  # with several, it is how torch.distributed says that another process is gone
        code, text = 1, f"{first_line(error)}; what was saved is kept, the same command goes on."
    if os.environ.get("RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)  # the first process says it, and torchrun then ends this one
    print(f"red.py: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
