"""RED: Reasoning-preserved Efficient Distillation, in one file to be read beside the paper.

He et al., "Reasoning-preserved Efficient Distillation of Large Language Models via
Activation-aware Initialization", ICML 2026, arXiv 2605.29327, as read in v1. What a run does:

    calibrate             a few sequences show which channels the frozen teacher uses (§5)
    new_student           every weight is the teacher's, seen through a projection (§3, App. C);
                          RED starts all projections as one selection of channels (§5)
    distill               Adam trains projections and gains (App. F.1); training_step adds up
      alignment_loss        how far the student's activations are from the teacher's (App. B),
      token_losses          and how far its predictions are: KL and cross-entropy (App. B)
    measure_model         held-out loss, effective rank, reasoning (§4, §6)
    export_student        the merged student is an ordinary checkpoint, only narrower (App. C)

Marks in the comments: [reading] where the paper's text leaves the choice to us, [differs] where
our default is not what the paper or LRC has, [new] for what neither of them has.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import glob
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import time
import traceback
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import fmean

if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":
    print("red.py is loading torch and transformers", flush=True)

import huggingface_hub
import pyarrow.parquet
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

# ==== Settings ================================================================================
# Every choice of a run is one field of one dataclass, with its help text. The defaults suit a small
# machine; RED-1.5B has 2,048 tokens a sequence, 49,152 a step, a learning rate of 1e-4 [differs].
METHODS = {  # by where the projections start
    "red": "the most active channels for all matrices: the paper's method",
    "random-selection": "random channels for all matrices [new]",
    "pca": "principal directions of the stream for all [new, after SliceGPT]",
    "shared-orthogonal": "one random basis for all matrices [new]",
    "orthogonal": "a random basis for each matrix: the paper's ablation",
    "lrc": "random numbers for each matrix: Low-Rank Clone, the baseline",
}
LEARNING_RATES = {"adam": 3e-4, "muon": 1e-3}  # of a real teacher's students
TINY_LEARNING_RATES = {"adam": 1e-2, "muon": 3e-2}


def setting(default, help: str, **options):
    """One field of Config: its default and its line in --help."""
    options |= {"help": help if default is None else f"{help} (default: {default})"}
    # A factory, because Configs must not share a list.
    return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=options)


@dataclasses.dataclass
class Config:
    """All settings of a run."""

    model: str | None = setting(None, "teacher: folder or hub name; unset: the tiny world")
    ratio: float = setting(0.5, "width of a student as a share of the teacher's")
    methods: list[str] = setting(["red"], "of the methods below", choices=METHODS, metavar="METHOD")
    data: str | None = setting(None, "text to train on; unset: FineWeb-Edu or the tiny world")
    calibration_samples: int = setting(15, "sequences to calibrate on")
    seq_len: int = setting(512, "tokens per sequence")
    steps: int = setting(1000, "optimiser steps; 0: export and measure the start")
    batch_size: int = setting(8, "sequences per micro-batch and process")
    grad_accum: int = setting(1, "micro-batches per optimiser step and process")
    optimizer: str = setting("adam", "adam, or muon [new]", choices=("adam", "muon"))
    learning_rate: float | None = setting(None, f"its peak; unset: {LEARNING_RATES}")
    temperature: float = setting(1.0, "softens both distributions in KL; LRC's is 40 [differs]")
    alpha: float = setting(0.2, "weight of the alignment loss, as LRC's")
    dtype: str = setting("auto", "of the teacher", choices=("auto", "float32", "bfloat16"))
    seed: int = setting(0, "seed of everything random")
    eval_data: str | None = setting(None, "problems, or none; unset: GSM8K without --data")
    eval_problems: int = setting(200, "how many problems to measure")
    out: str | None = setting(None, "results folder; unset: in runs/, named by settings")
    save_every: int = setting(250, "steps between measured checkpoints; 0: at the end")


# ==== Calibration and selection (§5) ==========================================================
# RED's contribution. The frozen teacher reads a few sequences, and each channel of its residual
# stream is scored by its activations. The best d_s of the d_t channels become the student's. The
# stream is one space from the embedding to the head, so one set of channels serves every matrix.
# A block of a Llama-like model has seven linear modules and two norms, known by their names and
# seen by forward hooks. A batch is a dict of input_ids and labels, (batch, tokens) each. A label of
# -100 is left out of KL and cross-entropy; calibration and alignment use every token [reading].
# To copy it: torch, F, nn, Tensor, Iterable, contextlib, dataclasses, functools.
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
WRITERS = ("o_proj", "down_proj")  # W_s = P.T @ W_t; the READERS: W_s = W_t @ P
ALIGNED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm", "model.norm")  # those of the stream
NORM_BEFORE = {"self_attn": NORMS[0], "mlp": NORMS[1]}


def modules_of(model: nn.Module, kinds: tuple[str, ...]) -> list[str]:
    """Names of all modules of the given kinds, in order; for NORMS these are 2L + 1."""
    return [name for name, _ in model.named_modules() if name.endswith(kinds)]


@contextlib.contextmanager
def watch(model: nn.Module, names: Iterable[str], look):
    """Within `with`, look(name, module, inputs, output) is called after each named module."""
    with contextlib.ExitStack() as hooks:
        for name in names:
            hook = functools.partial(look, name)
            hooks.enter_context(model.get_submodule(name).register_forward_hook(hook))
        yield


def last_hidden(model: nn.Module, ids: Tensor) -> Tensor:
    """A causal model's last hidden states, normed, (batch, tokens, d); makes no logits."""
    return model.model(ids.to(model.device), use_cache=False).last_hidden_state


@torch.no_grad()
def look_inside(model: nn.Module, ids: Tensor, names: Iterable[str]) -> tuple[Tensor, dict]:
    """Run a model. Returns its last hidden states, and modules' outputs (a norm's: its input)."""
    seen = {}

    def look(name, module, inputs, output):
        seen[name] = inputs[0] if name.endswith(NORMS) else output

    with watch(model, names, look):
        hidden = last_hidden(model, ids)
    return hidden, seen


def channel_importance(means: Tensor) -> Tensor:
    """How much the teacher uses each channel of its stream (Eqs. 9-10): (d_t,). means: (layers + 1,
    sequences, d_t), of |activation| over tokens, after the embedding and after each block."""
    over_sequences = torch.linalg.vector_norm(means, dim=1)  # (layers + 1, d_t)
    return over_sequences.mean(0)


def select_channels(importance: Tensor, student_width: int) -> Tensor:
    """Indices of the best channels, ascending, (d_s,) int64 (§5). ValueError: no such width."""
    if not 0 < student_width <= len(importance):
        raise ValueError(f"cannot keep {student_width} of {len(importance)} channels")
    order = torch.sort(importance, descending=True, stable=True).indices  # ties: lower first
    return order[:student_width].sort().values


def selection_matrix(channels: Tensor, teacher_width: int) -> Tensor:
    """S in {0,1}, (d_t, d_s) float32, with S[channels[j], j] = 1 (§5)."""
    return torch.eye(teacher_width)[:, channels.cpu()]  # S.T @ S = I: all singular values are 1


@dataclasses.dataclass
class Calibration:
    """What the teacher shows on a few sequences (§5). The first is the paper's, two are [new]."""

    importance: Tensor  # (d_t,), by Eqs. 9-10
    moments: dict[str, Tensor]  # norm -> (d_t, d_t): mean of u u.T over tokens h, u = h / |h|
    teacher_mean_squares: dict[str, float]  # aligned module -> mean square of its output, before P


def calibrate(teacher: nn.Module, batches: Iterable[dict]) -> Calibration:
    """What the teacher shows on a few batches of one size (§5). FloatingPointError: not finite."""
    norms, aligned = modules_of(teacher, NORMS), modules_of(teacher, ALIGNED)
    # What these norms take in is the stream after the embedding and after each block [reading].
    layers = modules_of(teacher, ("input_layernorm", "model.norm"))
    means, count = {name: [] for name in layers}, 0
    moments, squares = dict.fromkeys(norms, 0.0), dict.fromkeys(aligned, 0.0)
    for batch in batches:
        count += 1
        _, seen = look_inside(teacher, batch["input_ids"], norms + aligned)
        for name in layers:  # the paper's statistic, Eq. 9
            means[name].append(seen[name].float().abs().mean(1))  # (batch, d_t)
        for name in norms:  # ours, for `pca` and for the gains at the start
            unit = F.normalize(seen[name].float().flatten(0, 1), dim=-1)  # (tokens, d_t)
            moments[name] = moments[name] + unit.T @ unit / len(unit)
        for name in aligned:  # ours, to weigh the alignment by
            squares[name] += seen[name].float().square().mean().item()

    importance = channel_importance(torch.stack([torch.cat(parts) for parts in means.values()]))
    if not torch.isfinite(importance).all():
        raise FloatingPointError("the teacher's activations are not finite")
    moments = {name: total / count for name, total in moments.items()}
    teacher_mean_squares = {name: max(total / count, 1e-12) for name, total in squares.items()}
    return Calibration(importance, moments, teacher_mean_squares)


# ==== The projected student and its merge (§3, App. C) ========================================
# The student is an ordinary, narrower model. Each of its matrices is a frozen one of the teacher's,
# seen through a projection P, (d_t, d_s), of its own. Only the projections and the gains of the
# norms learn. After training P is multiplied in and gone.
#     rows lie in the stream       q k v gate up, head, embedding   W_s = W_t @ P     (out, d_s)
#     columns lie in the stream    o down                           W_s = P.T @ W_t   (d_s, in)
# To copy it: torch, nn, Tensor, copy, math, transformers and the section above.


class ProjectedStudent:
    """A student whose matrices are the frozen teacher's, seen through projections (§3, App. C).

    teacher       a causal language model, d_t wide; never changed
    model         the same, d_s wide: the student, an ordinary model, whose weights are made here
    projections   module name -> (d_t, d_s), where the projections start
    gains         norm name -> (d_s,), where the gains start
    fold_gains    True: what follows a norm has the teacher's gains in it, W @ diag(gain) @ P"""

    def __init__(self, teacher: nn.Module, model, projections: dict, gains: dict, fold_gains=False):
        self.teacher, self.model, self.fold_gains = teacher, model, fold_gains
        # What learns is kept in float32, where small steps add up; a merge rounds it.
        precise = torch.promote_types(teacher.dtype, torch.float32)
        options = {"device": teacher.device, "dtype": precise, "copy": True}
        options["memory_format"] = torch.contiguous_format
        self.projections = {n: nn.Parameter(p.to(**options)) for n, p in projections.items()}
        self.gains = {n: nn.Parameter(g.to(**options)) for n, g in gains.items()}
        self.merge()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.merged[name].requires_grad)
            # Gradients of many micro-batches then add up in float32, not in bfloat16.
            parameter.grad_dtype = precise

    def parameters(self) -> list[nn.Parameter]:
        """Everything that learns: the projections, then the gains."""
        return [*self.projections.values(), *self.gains.values()]

    def project(self, name: str) -> Tensor:
        """The student's weight or bias of this name, as a function of what learns (App. C)."""
        weight, module = self.teacher.get_parameter(name).detach(), name.rpartition(".")[0]
        if module in self.gains:
            return self.gains[module].to(weight.dtype)
        if module not in self.projections:  # q_norm and k_norm are in head space [reading]
            return weight.clone()
        projection = self.projections[module]
        if module.endswith(WRITERS):  # their biases, too, are in the stream [reading]
            return projection.to(weight.dtype).T @ weight  # (d_s, in)
        if name.endswith("bias"):  # of q, k, v, gate, up: in head or FFN space [reading]
            return weight.clone()
        if self.fold_gains and module != "model.embed_tokens":  # which follows no norm
            norm = "model.norm"
            if module != "lm_head":
                layer, part, _ = module.rsplit(".", 2)  # model.layers.N, self_attn, q_proj
                norm = f"{layer}.{NORM_BEFORE[part]}"
            gain = self.teacher.get_submodule(norm).weight.detach()  # (d_t,)
            projection = gain[:, None] * projection
        return weight @ projection.to(weight.dtype)  # (out, d_s)

    def weights(self) -> dict[str, Tensor]:
        """All the student's weights by name, through which gradients reach what learns."""
        return {name: self.project(name) for name, _ in self.model.named_parameters()}

    def merge(self):
        """Set the model's weights, detached; `self.merged` keeps their graph for `carry_back`."""
        self.merged = self.weights()
        for name, parameter in self.model.named_parameters():
            parameter.data = self.merged[name].detach()

    def carry_back(self):
        """Move the gradients of the model's weights on to the projections and gains."""
        gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        torch.autograd.backward([self.merged[name] for name in gradients], list(gradients.values()))
        self.model.zero_grad()
        self.merged = None  # frees the graph


def choose_width(ratio: float, teacher_config) -> int:
    """The student's width: the multiple of the number of heads nearest to ratio * d_t."""
    unit = teacher_config.num_attention_heads  # a Llama's config refuses any other width
    nearest = math.floor(ratio * teacher_config.hidden_size / unit + 0.5)
    return unit * max(1, min(nearest, teacher_config.hidden_size // unit))


def student_config(teacher_config, student_width: int, untie: bool = False):
    """The teacher's config at another width, with `head_dim` pinned; untie: with its own head."""
    left_out = ("quantization_config", "auto_map")  # untrue of a student
    values = {k: v for k, v in teacher_config.to_dict().items() if k not in left_out}
    if not values.get("head_dim"):
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    tied = values["tie_word_embeddings"] and not untie
    values |= {"hidden_size": student_width, "tie_word_embeddings": tied}
    return type(teacher_config)(**values)


def narrow_model(teacher: nn.Module, narrow_config) -> nn.Module:
    """A model of this config on the teacher's device; its weights are still to be made."""
    options = {"dtype": teacher.dtype, "attn_implementation": teacher.config._attn_implementation}
    with torch.device("meta"):  # no memory, and no random numbers
        model = transformers.AutoModelForCausalLM.from_config(narrow_config, **options)
    model.to_empty(device=teacher.device).eval().tie_weights()
    # Rotary tables are in head space, the same in both, and in no checkpoint.
    model.model.rotary_emb = copy.deepcopy(teacher.model.rotary_emb)
    # torch would give the padding token's row no gradient, but its projection needs one.
    model.model.embed_tokens.padding_idx = None
    return model


def initial_projection(
    method: str, calibration: Calibration, student_width: int, generator: torch.Generator
) -> Tensor:
    """Where a projection starts, (d_t, d_s) float32 (§5, §6). ValueError: no such method."""
    teacher_width = len(calibration.importance)
    if method == "red":
        channels = select_channels(calibration.importance, student_width)
        return selection_matrix(channels, teacher_width)
    if method == "random-selection":
        shuffled = torch.randperm(teacher_width, generator=generator)
        return selection_matrix(shuffled[:student_width].sort().values, teacher_width)
    if method == "pca":  # leading eigenvectors of the stream's second moment, summed over norms
        moment = sum(calibration.moments.values()).double()  # (d_t, d_t)
        return torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :student_width].float().cpu()
    gaussian = torch.randn(teacher_width, student_width, generator=generator)
    if method == "lrc":
        # At LRC-1.5B's d_t, 3,072, P.T @ P has 1.2 on its diagonal; here, at any d_t [differs].
        return 0.02 * (3072 / teacher_width) ** 0.5 * gaussian
    if method not in ("orthogonal", "shared-orthogonal"):
        raise ValueError(f"no method is called {method}")
    q, r = torch.linalg.qr(gaussian.double())
    return (q * r.diagonal().sign()).float()  # uniform over all orthonormal bases


def initial_gains(teacher: nn.Module, basis: Tensor, calibration: Calibration, fold: bool) -> dict:
    """Where the gains start if all P start as `basis`: norm -> (d_s,) [differs; LRC's are 1].

    The student's norm divides by the RMS of d_s kept numbers, and the teacher's by that of all d_t.
    So the teacher's gain (1, where folded) is scaled by their ratio, sqrt(share * d_t / d_s), where
    share is the part of a token's squared norm that the basis keeps, averaged over tokens."""
    teacher_width, student_width = basis.shape
    gains = {}
    for norm, moment in calibration.moments.items():  # (d_t, d_t)
        gain = torch.ones(student_width)
        if not fold:  # of a selection: its channels' gains
            gain = teacher.get_submodule(norm).weight.detach().float().cpu() @ basis
        share = (moment.cpu() @ basis * basis).sum().clamp_min(1e-12)  # tr(basis.T moment basis)
        gains[norm] = gain * (share * teacher_width / student_width).sqrt()
    return gains


def new_student(
    method: str, teacher: nn.Module, student_width: int, calibration: Calibration, seed: int = 0
) -> ProjectedStudent:
    """A student at the start of its training, by any of METHODS (§3, §5).

    A rotation cannot carry the teacher's gains along: what follows a norm absorbs them [reading].
    The head follows one and the embedding does not, so a tied head is untied [reading]."""
    fold = method in ("pca", "orthogonal", "shared-orthogonal")
    model = narrow_model(teacher, student_config(teacher.config, student_width, untie=fold))
    readers = READERS[:-1] if model.config.tie_word_embeddings else READERS
    names = modules_of(model, readers + WRITERS)
    generator = torch.Generator().manual_seed(seed)
    if method in ("orthogonal", "lrc"):  # a start for each matrix; gains of 1: LRC's, or folded
        options = (method, calibration, student_width, generator)
        projections = {name: initial_projection(*options) for name in names}
        gains = {norm: torch.ones(student_width) for norm in modules_of(model, NORMS)}
    else:
        basis = initial_projection(method, calibration, student_width, generator)
        projections = dict.fromkeys(names, basis)
        gains = initial_gains(teacher, basis, calibration, fold)
    return ProjectedStudent(teacher, model, projections, gains, fold)


# ==== Losses (App. B) =========================================================================
# The student learns from three things: the teacher's predictions (KL), the text (cross-entropy of
# the next token), and the teacher's activations (alignment). `reference_step` defines a training
# step as the formulas read. To copy it: torch, F, Tensor and the sections above.


def kl_and_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) and next-token cross-entropy: sums over tokens, in nats (App. B).

    logits: (tokens, vocabulary); targets: (tokens,). KL is of distributions softened by the
    temperature T. That divides its gradient by about T^2, so it is multiplied by T^2 [reading; LRC
    has no such factor, and at RED's T = 1 it is 1]."""
    precise = torch.promote_types(student_logits.dtype, torch.float32)
    log_q = torch.log_softmax(student_logits, -1, dtype=precise)  # (tokens, vocabulary)
    cross_entropy = F.nll_loss(log_q, targets, reduction="sum")
    if temperature != 1:
        log_q = torch.log_softmax(log_q / temperature, -1)
        teacher_logits = teacher_logits.to(precise) / temperature
    log_p = torch.log_softmax(teacher_logits, -1, dtype=precise)
    kl = torch.linalg.vecdot(log_p.exp(), log_p - log_q).sum()  # sum of p (log p - log q)
    return temperature**2 * kl, cross_entropy


def reference_step(
    teacher: nn.Module,
    student: ProjectedStudent,
    batch: dict,
    config: "Config",
    teacher_mean_squares: dict,
) -> Tensor:
    """The loss of one batch, a scalar, and its gradients, as the formulas read (§3, App. B).

    The gradients are left in the student's projections and gains. teacher_mean_squares: as in
    Calibration; ones give LRC's alignment. `training_step` is faster, and sums in float32."""
    names, ids, temperature = modules_of(teacher, ALIGNED), batch["input_ids"], config.temperature
    teacher_hidden, teacher_seen = look_inside(teacher, ids, names)
    weights, seen = student.weights(), {}  # W_t @ P and P.T @ W_t
    with watch(student.model, names, lambda name, _, inputs, output: seen.update({name: output})):
        output = torch.func.functional_call(student.model, weights, ids.to(teacher.device))
    alignment = 0.0
    for name in names:
        target = teacher_seen[name]  # (batch, tokens, n)
        if name.endswith(WRITERS):  # P is not detached here: as LRC's paper has it
            target = target @ student.projections[name].to(target.dtype)
        alignment += F.mse_loss(seen[name], target) / teacher_mean_squares[name]  # [differs]

    labelled = batch["labels"][:, 1:] != -100
    q_logits = output.logits[:, :-1][labelled]  # (targets, vocabulary)
    p_logits = teacher.lm_head(teacher_hidden)[:, :-1][labelled]
    log_q, log_p = [F.log_softmax(logits / temperature, -1) for logits in (q_logits, p_logits)]
    kl = temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    cross_entropy = F.cross_entropy(q_logits, batch["labels"][:, 1:][labelled].to(teacher.device))
    loss = kl + cross_entropy + config.alpha * alignment
    loss.backward()
    return loss.detach()


# ==== The fast step, and the loop (App. F.1) ==================================================
# Warm-up and linear decay are the paper's, clipping is LRC's. The step below computes for a batch
# what `reference_step` does, but it merges once per step (each further micro-batch: 16 s, not 20),
# makes the logits of a few tokens at a time (2.7 GiB, not 4.3), and overwrites each error with its
# gradient (then 2.5 GiB; SmolLM2, 2 x 512 tokens, one CPU thread). The backward pass stops at W_s,
# and goes on to P once per step; the targets of o and down pass gradients to P directly:
#     forward     P  --merge, once-->       W_s  --model, per micro-batch-->     loss
#     backward    P  <--carry_back, once--  W_s  <--backward, per micro-batch--  loss
# `config` is a Config or has its fields. N processes together take one step on all their batches.
# To copy it: torch, nn, Tensor, Iterator, math, LEARNING_RATES, the sections above, Faster.
LOGITS_AT_ONCE = 2**24  # 64 MiB of float32; eight times as many keep a GPU busy


def student_forward(
    student: ProjectedStudent, ids: Tensor, teacher_seen: dict, teacher_mean_squares: dict
) -> tuple[Tensor, list, list]:
    """Run the student: its last hidden states, and each module's error with its factor (App. B).

    Alignment is the sum of factor * |error|^2: mean squared errors, each over the mean square of
    the teacher's output before P, lest a few massive activations dominate it [differs: LRC has no
    such divisor, the paper only the number of tokens]. teacher_seen is emptied on the way."""
    errors, factors = [], []

    def compare(name, module, inputs, output):
        target = teacher_seen.pop(name)  # (batch, tokens, n), or d_t where it is projected
        if name.endswith(WRITERS):
            target = target @ student.projections[name].to(target.dtype)
        errors.append(output - target)
        factors.append(1 / (output.numel() * teacher_mean_squares[name]))

    with watch(student.model, modules_of(student.model, ALIGNED), compare):
        hidden = last_hidden(student.model, ids)  # (batch, tokens, d_s)
    return hidden, errors, factors


def alignment_loss(errors: list, factors: list, weight: float) -> tuple[Tensor, list]:
    """The alignment of a micro-batch (App. B), a scalar, and the gradients of weight * alignment
    with respect to errors, (batch, tokens, n) each: 2 * weight * factor * error. They overwrite the
    errors in memory; only the errors' graph is still of use, for the backward pass."""
    gradients = [error.detach() for error in errors]  # shares memory: so far these are the errors
    precise = torch.promote_types(errors[0].dtype, torch.float32)
    squares = torch.stack([error.square().sum(dtype=precise) for error in gradients])
    torch._foreach_mul_(gradients, [2 * weight * factor for factor in factors])
    return squares @ squares.new_tensor(factors), gradients


def token_losses(
    hidden: Tensor, teacher_hidden: Tensor, heads: tuple, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """KL and cross-entropy of a micro-batch, (2,); their sum's gradient with respect to `hidden`.

    hidden: (batch, tokens, d_s or d_t); heads: (vocabulary, d_s) and (vocabulary, d_t), of which
    the student's gets its gradient here, added to its grad. labels: (batch, tokens). The losses are
    sums over labels (App. B). Logits are large: only those of a few tokens exist at a time."""
    head, teacher_head = heads
    labelled = labels[:, 1:] != -100
    targets = labels[:, 1:][labelled].to(hidden.device)  # (targets,)
    states = hidden.detach()[:, :-1][labelled]  # (targets, d_s)
    teacher_states = teacher_hidden[:, :-1][labelled]  # (targets, d_t)
    size = max(1, LOGITS_AT_ONCE * (8 if head.is_cuda else 1) // len(head))
    losses, gradients = torch.zeros(2, device=hidden.device), []
    parts = [tensor.split(size) for tensor in (states, teacher_states, targets)]
    for part, teacher_part, wanted in zip(*parts):
        part.requires_grad_()  # a leaf: backward stops here, and the logits are freed
        logits, teacher_logits = part @ head.T, teacher_part @ teacher_head.T
        both = torch.stack(kl_and_cross_entropy(logits, teacher_logits, wanted, temperature))
        both.sum().backward()
        gradients.append(part.grad)
        losses = losses + both.detach()
    gradient = torch.zeros_like(hidden)
    gradient[:, :-1][labelled] = torch.cat(gradients)
    return losses, gradient


def training_step(
    teacher: nn.Module,
    student: ProjectedStudent,
    batches: Iterator[dict],
    config: "Config",
    teacher_mean_squares: dict,
) -> dict:
    """The gradients of one optimiser step, left in the student's projections and gains.

    Takes config.grad_accum batches; ValueError: they have ended. Returns scalars: "loss" (App. B),
    its terms "kl" (mean over labels [differs]), "cross_entropy" (same), "alignment"; "tokens"."""
    student.merge()
    heads = (student.model.lm_head.weight, teacher.lm_head.weight)
    sums, label_count, tokens = torch.zeros(3, device=teacher.device), 0, 0
    for _ in range(config.grad_accum):
        batch = next(batches, None)
        if batch is None:
            raise ValueError("the batches have ended")
        ids, labels = batch["input_ids"], batch["labels"]
        count = int((labels[:, 1:] != -100).sum())  # on the CPU: waits for no GPU
        teacher_hidden, teacher_seen = look_inside(teacher, ids, modules_of(teacher, ALIGNED))
        hidden, errors, factors = student_forward(student, ids, teacher_seen, teacher_mean_squares)
        # Alignment is a mean over tokens; times the labels, it adds up over batches as sums do.
        alignment, error_gradients = alignment_loss(errors, factors, config.alpha * count)
        losses, gradient = token_losses(hidden, teacher_hidden, heads, labels, config.temperature)
        torch.autograd.backward([hidden, *errors], [gradient, *error_gradients])
        del errors, error_gradients  # they share memory, which the next micro-batch needs
        sums += torch.cat([losses, count * alignment[None]])
        label_count, tokens = label_count + count, tokens + ids.numel()

    student.carry_back()
    # Everything is a sum over labels so far. Divided by how many there are, it is a mean.
    gradients = [parameter.grad for parameter in student.parameters()]
    counts = torch.tensor([label_count, tokens], device=teacher.device)
    add_over_processes([*gradients, sums, counts])
    all_labels, all_tokens = counts.clamp_min(1)
    torch._foreach_div_(gradients, all_labels)
    kl, cross_entropy, alignment = sums / all_labels
    terms = {"kl": kl, "cross_entropy": cross_entropy, "alignment": alignment, "tokens": all_tokens}
    return {"loss": kl + cross_entropy + config.alpha * alignment} | terms


def learning_rate_at(step: int, config: "Config") -> float:
    """The schedule: warm-up over half a percent of the steps, and linear decay to 0 (App. F.1)."""
    warm_up = max(1, round(0.005 * config.steps))
    peak = config.learning_rate or LEARNING_RATES[config.optimizer]
    return peak * (1 - step / config.steps) * min(1.0, (step + 1) / warm_up)


def distill(
    teacher: nn.Module,
    student: ProjectedStudent,
    batches: Iterator[dict],
    config: "Config",
    teacher_mean_squares: dict,
    optimizers: list | None = None,
    done: int = 0,
) -> Iterator[dict]:
    """Train the student in place (App. F.1). A generator: each iteration is one step, a dict.

    A step that is not finite is skipped. FloatingPointError: ten in a row, or all that remain, are.
    done: steps already taken. In the loop, call student.merge() before you use student.model."""
    optimizers = optimizers or make_optimizers(student, config)
    failures = 0
    for step in range(done, config.steps):
        record = training_step(teacher, student, batches, config, teacher_mean_squares)
        record["gradient_norm"] = nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        record["learning_rate"] = learning_rate_at(step, config)
        finite = math.isfinite(record["loss"] + record["gradient_norm"])
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = record["learning_rate"]
            if finite:
                optimizer.step()
            optimizer.zero_grad()
        failures = 0 if finite else failures + 1
        if failures == min(10, config.steps - done):
            raise FloatingPointError(f"{failures} steps in a row are not finite")
        record = {k: float(v) if math.isfinite(v) else None for k, v in record.items()}  # for JSON
        yield record | {"step": step + 1, "skipped": not finite}
    with torch.no_grad():
        student.merge()


# ==== Effective rank and evaluation (§4, §6) ==================================================
# The paper's account: hidden states of low effective rank are hard to tell apart, so a chain of
# reasoning, which must keep its steps apart, breaks first. Its general benchmarks choose answers by
# likelihood and its reasoning benchmarks generate them; the tiny world below does both. On real
# text, single results of worked solutions are scored. To copy `effective_rank`: torch, Tensor.


def effective_rank(hidden: Tensor) -> float:
    """eRank = exp(-sum r ln r), with r = eigenvalues of the covariance / their sum (§4).

    hidden: (..., d); each vector is a token: centred, then scaled to length 1. The result is from 1
    to min(tokens - 1, d), or 0.0 where tokens are equal up to the rounding of hidden's type. Roy
    and Vetterli's own takes singular values, uncentred: another scale. ValueError: not finite."""
    states = hidden.detach().reshape(-1, hidden.shape[-1]).double()  # (tokens, d)
    if not torch.isfinite(states).all():
        raise ValueError("effective_rank needs finite values")
    centred = states - states.mean(0)
    lengths = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    # What rounding leaves of a token at the mean must not be scaled up to length 1.
    rounding = torch.finfo(hidden.dtype).eps * torch.linalg.vector_norm(states, dim=-1)
    unit = torch.where(lengths > 2 * rounding[:, None], centred / lengths, 0.0)
    values = torch.linalg.eigvalsh(unit.T @ unit).clamp_min(0)  # (d,)
    if values.sum() == 0:
        return 0.0
    r = values / values.sum()
    return torch.special.entr(r).sum().exp().item()  # entr(r) = -r ln r, and 0 at 0


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[dict], tokens: int = 4096) -> dict:
    """Held-out `loss`, nats a label; each block's `erank` [reading], of the first `tokens` tokens.
    FloatingPointError: the loss is not finite. ValueError: there is no label (§4, §6)."""
    streams = {f"model.layers.{i}": [] for i in range(len(model.model.layers))}
    losses, looked_at = [], 0
    for batch in batches:
        names = streams if looked_at < tokens else []
        hidden, seen = look_inside(model, batch["input_ids"], names)
        looked_at += batch["labels"].numel()
        for name, stream in seen.items():
            streams[name].append(stream.flatten(0, 1))
        labelled = batch["labels"][:, 1:] != -100
        targets = batch["labels"][:, 1:][labelled].to(hidden.device)
        # A few tokens at a time, because logits are large.
        for states, wanted in zip(hidden[:, :-1][labelled].split(512), targets.split(512)):
            logits = model.lm_head(states).float()
            losses += F.cross_entropy(logits, wanted, reduction="none").tolist()
    loss = fmean(losses)
    if not math.isfinite(loss):
        raise FloatingPointError("the held-out loss is not finite")
    eranks = [effective_rank(torch.cat(parts)[:tokens]) for parts in streams.values()]
    return {"loss": loss, "erank": eranks}


def encode_answer(prompt: str, answer: str, tokenizer) -> dict:
    """A prompt and its answer in tokens: `ids`; `answer_at`, where the answer starts in them; and
    `results`, (start, end) of each result with the `>` after it, such as `24>` in `<<48/2=24>>`."""
    encoded = tokenizer(prompt + answer, return_offsets_mapping=True, verbose=False)
    ids, offsets, results = encoded["input_ids"], encoded["offset_mapping"], []
    starts = [i for i, (_, end) in enumerate(offsets) if end > len(prompt)]
    for match in re.compile(r"=([^<>=]+>)>").finditer(prompt + answer, len(prompt)):
        start, end = match.span(1)
        inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
        if inside:
            results.append((inside[0], inside[-1] + 1))
    return {"ids": ids, "answer_at": min(starts, default=len(ids)), "results": results}


@torch.no_grad()
def result_scores(model: nn.Module, groups: Iterable[list[dict]]) -> dict:
    """Shares of `results` and of `other_tokens` that the model would write in encoded answers, each
    token given all the true text before it [new]. groups: lists of `encode_answer`."""
    results, others = [], []
    for group in groups:
        # Padded on the right, where a causal model does not look: no mask is needed.
        sequences = [torch.tensor(problem["ids"]) for problem in group]
        padded = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        for problem, states in zip(group, last_hidden(model, padded)):
            ids, start = problem["ids"], problem["answer_at"]
            written = model.lm_head(states[start - 1 : len(ids) - 1]).argmax(-1).tolist()
            right = [a == b for a, b in zip(ids[start:], written, strict=True)]
            for begin, end in reversed(problem["results"]):
                results.append(all(right[begin - start : end - start]))
                del right[begin - start : end - start]
            others += right
    return {"results": fmean(results), "other_tokens": fmean(others)}


def measure_model(model: nn.Module, task: "Task", finished: bool = False) -> dict:
    """All that is measured on a model; finished: the tiny world's questions, too (§4, §6)."""
    result = evaluate(model, progress(task.held_out, "measuring"))
    if task.problems:
        result |= result_scores(model, progress(task.problems, "problems"))
    if finished and task.text is None:
        result |= tiny_scores(model, task.tokenizer)
    return result | {"parameters": model.num_parameters()}


# ==== The tiny world [new] ====================================================================
# A teacher in half a minute, with the paper's contrast in it: arithmetic modulo 10 that needs a
# chain of operations (reasoning), `7+5-3=?7+5=2;2-3=9#9`, and 24 fixed pairs that need none
# (knowledge), `abcd:wxyz`. Characters are tokens, and only answers are labels.
TINY_DEFAULTS = dict(methods=["red", "lrc"], steps=70, batch_size=64, seq_len=48, save_every=10)
TINY_CONFIG = Path(__file__).with_name("tiny_config.json")
TINY_ALPHABET = "0123456789+-*=?;#:abcdefghijklmnopqrstuvwxyz\n"
TINY_WORDS = ["".join(random.Random(i).choices(TINY_ALPHABET[18:44], k=4)) for i in range(48)]
TINY_PAIRS = [(f"{a}:", f"{b}\n") for a, b in zip(TINY_WORDS[::2], TINY_WORDS[1::2])]
TINY_LENGTHS = (1, 2, 3, 3, 4, 4, 5, 5)  # the end of a row cuts long ones off more often


def random_chain(length: int, generator: random.Random) -> tuple[str, str]:
    """A chain of `length` operations as (prompt, answer): `7+5-3=?` and `7+5=2;2-3=9#9`."""
    value = generator.randrange(10)
    prompt, results = str(value), []
    for _ in range(length):
        sign, operand = generator.choice("+-*"), generator.randrange(10)
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[sign] % 10
        prompt += f"{sign}{operand}"
        results.append(f"{value}{sign}{operand}={result}")
        value = result
    return f"{prompt}=?", f"{';'.join(results)}#{value}\n"


def tiny_batches(batch_size: int, seq_len: int, seed) -> Iterator[dict]:
    """Endless batches of tiny-world lines, a third of them pairs; only answers are labels."""
    generator = random.Random(seed)
    while True:
        sequences = []
        while len(sequences) < batch_size:
            ids, labels = [], []
            while len(ids) < seq_len:
                line = random_chain(generator.choice(TINY_LENGTHS), generator)
                prompt, answer = generator.choice([line, line, generator.choice(TINY_PAIRS)])
                ids += [TINY_ALPHABET.index(character) for character in prompt + answer]
                labels += [-100] * len(prompt) + ids[-len(answer) :]
            sequences.append((ids[:seq_len], labels[:seq_len]))
        both = torch.tensor(sequences)  # (batch, 2, tokens)
        yield {"input_ids": both[:, 0], "labels": both[:, 1]}


def tiny_tokenizer():
    """The tiny world's characters as an ordinary transformers tokenizer, which saves and loads."""
    vocabulary = {character: i for i, character in enumerate(TINY_ALPHABET)}
    model = tokenizers.models.BPE(vocabulary, merges=[])  # without merges, characters are tokens
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="\n")


def tiny_teacher(model_config, seed: int, steps: int = 2000) -> nn.Module:
    """Train the tiny world's teacher, of a transformers config. Returns it frozen."""
    torch.manual_seed(seed)
    teacher = AutoModelForCausalLM.from_config(model_config).float()
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3, fused=True)
    options = {"total_steps": steps, "pct_start": 0.1, "cycle_momentum": False}
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, **options)
    batches = itertools.islice(tiny_batches(16, 48, seed), steps)  # 48 characters hold any line
    for batch in progress(batches, "teacher", steps):
        teacher(**batch, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    return teacher.eval().requires_grad_(False)


def tiny_teacher_folder(config: Config) -> str:
    """The folder of the tiny world's teacher, shared by all runs beside it; trained if missing."""
    recipe = f"{TINY_CONFIG.read_text('utf-8')} {TINY_PAIRS} {TINY_LENGTHS}"
    name = f"tiny-{config.seed}-{random.Random(recipe).getrandbits(32):08x}"
    folder = Path(config.out).parent / name
    if rank() == 0 and not folder.is_dir():
        partial = f"{folder}-{os.getpid()}.partial"
        with as_user_error(f"{TINY_CONFIG.name} makes no teacher in {partial} ({{}})."):
            model_config = AutoConfig.from_pretrained(TINY_CONFIG, trust_remote_code=False)
            tiny_teacher(model_config, config.seed).save_pretrained(partial)
            tiny_tokenizer().save_pretrained(partial)
        with contextlib.suppress(OSError):  # another command was faster, with the same teacher
            os.rename(partial, folder)
    barrier()
    return str(folder)


@torch.no_grad()
def share_chosen(model: nn.Module, tokenizer) -> float:
    """Share of the pairs whose own answer the model finds the likeliest of four (§6)."""
    lines = []
    for i, (prompt, _) in enumerate(TINY_PAIRS):  # its own answer, then those of three others
        lines += [prompt + TINY_PAIRS[i - k][1] for k in range(4)]
    ids = torch.tensor(tokenizer(lines)["input_ids"], device=model.device)
    logits = model(ids).logits[:, :-1].float().mT
    losses = F.cross_entropy(logits, ids[:, 1:], reduction="none")
    nats = losses.sum(1).view(-1, 4)  # of each line; its prompt adds the same to all four
    return fmean((nats[:, 0] < nats[:, 1:].amin(1)).tolist())


@torch.no_grad()
def tiny_scores(model: nn.Module, tokenizer, count: int = 200) -> dict:
    """Shares of `pairs` chosen and written, and of `chains` written, by length (§6)."""
    generator = random.Random(12345)  # for every model the same
    written = []
    groups = [[random_chain(n, generator) for _ in range(count)] for n in (1, 2, 3, 4, 5)]
    options = dict.fromkeys(("eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    for lines in progress([TINY_PAIRS, *groups], "measuring"):
        prompts, truths = zip(*lines)  # the prompts are equally long
        ids = torch.tensor(tokenizer(list(prompts))["input_ids"], device=model.device)
        longest = max(map(len, truths))
        output = model.generate(ids, do_sample=False, max_new_tokens=longest, **options)
        answers = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        # Only a whole correct line counts, not its last digit alone.
        written.append(fmean(a.strip() == truth.strip() for a, truth in zip(answers, truths)))
    pairs = {"chosen": share_chosen(model, tokenizer), "written": written[0]}
    return {"pairs": pairs, "chains": written[1:], "example": prompts[0] + answers[0].strip()}


# ==== Faster [new] ============================================================================
# Many processes, fused norms and Muon: a reader of the paper needs only Adam, in make_optimizers.
# To copy it: torch, F, nn, Tensor, Iterable, functools, os and the section of the student.


def rank() -> int:
    """This process's number, from 0; the first one writes files and speaks."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """How many processes torchrun has started."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def barrier():
    """Wait until all processes are here."""
    if world_size() > 1:
        torch.distributed.barrier()


def join_processes():
    """Join the other processes, where torchrun has started this one."""
    if torch.distributed.is_torchelastic_launched():
        torch.distributed.init_process_group()  # nccl for GPUs, gloo for CPUs
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def add_over_processes(tensors: Iterable[Tensor]):
    """Replace each tensor by its sum over all processes, in place."""
    if world_size() > 1:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def gather(value) -> list:
    """Every process's value, by rank."""
    values = [value] * world_size()
    if world_size() > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def fuse_norms(model: nn.Module):
    """Let each norm of a model run as one kernel, not as eight; it rounds once, not twice."""

    def fused(norm, hidden):
        return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)

    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = functools.partial(fused, module)


def make_optimizers(student: ProjectedStudent, config: "Config") -> list:
    """Adam, the paper's (App. F.1); or Muon (Jordan et al., 2024) for the projections: it steps
    along the orthogonal matrix nearest to the momentum, so in all directions alike."""
    if config.optimizer == "adam":
        return [torch.optim.Adam(student.parameters(), fused=True)]
    options = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    muon = torch.optim.Muon(student.projections.values(), **options)
    return [muon, torch.optim.Adam(student.gains.values(), fused=True)]


# ==== Teachers and text (App. F) ==============================================================
# A frozen teacher comes from a folder or the hub, and a finished student goes back the same way.
# Text is streamed. Its first documents are held out, and the place in it can be saved.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
NO_TEXT = re.compile(r"\..*|(readme|licen[cs]e)(\..*)?", re.IGNORECASE)  # files' names
BLOCK = 2000  # documents that are shuffled together


@dataclasses.dataclass
class Task:
    """What a distillation needs besides a method; without text it is in the tiny world."""

    teacher: nn.Module
    tokenizer: object
    text: object = None  # a TrainingText
    samples: list = None  # batches to calibrate on
    held_out: list = None  # batches
    problems: list = None  # groups of `encode_answer`


def choose_dtype(config: Config) -> torch.dtype:
    """--dtype; auto is bfloat16 for a real teacher where the processor multiplies in it."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    amx = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16")
    able = torch.cuda.is_bf16_supported(False) if torch.cuda.is_available() else amx
    return torch.bfloat16 if config.model and able else torch.float32


def load_teacher(name: str, dtype: torch.dtype = torch.float32) -> tuple:
    """A frozen teacher and its tokenizer, from a folder or the hub (§3)."""
    with as_user_error(f"cannot load {name} ({{}}); is a file missing, or sentencepiece?"):
        model_config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        kind = model_config.model_type
        require(kind in FAMILIES, f"{name} is {kind}; known are {', '.join(FAMILIES)}.")
        require(not hasattr(model_config, "quantization_config"), f"{name} is quantised.")
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # which a bot on the hub makes
        teacher, loading = AutoModelForCausalLM.from_pretrained(
            name,
            config=model_config,
            dtype=dtype,
            attn_implementation="sdpa",
            trust_remote_code=False,
            use_safetensors=True,  # no pickle, which could run code
            output_loading_info=True,
        )
        teacher.generation_config.validate(strict=True)  # or a student could not be saved
    keys = sorted(map(str, [*loading["missing_keys"], *loading["unexpected_keys"]]))
    require(not keys, f"{name} does not fit its config: missing or not known: {keys[:3]}.")
    largest = max(tokenizer.eos_token_id or 0, tokenizer.vocab_size - 1)
    usable = tokenizer.is_fast and 0 < largest < teacher.config.vocab_size
    require(usable, f"{name} lacks its tokenizer's files, or has another model's.")
    # A file may hold two different matrices where its config calls them tied: believe the file.
    teacher.config.tie_word_embeddings = teacher.lm_head.weight is teacher.model.embed_tokens.weight
    if torch.cuda.is_available():
        fuse_norms(teacher.to("cuda"))
    return teacher.eval().requires_grad_(False), tokenizer


def export_student(student: ProjectedStudent, task: Task, folder: Path):
    """Save the merged student as an ordinary checkpoint. UserError: it does not open (App. C)."""
    announce("exporting", str(folder))
    model, weights = student.model, student.model.state_dict()
    model.generation_config = task.teacher.generation_config
    # Other programs derive a Qwen2's head size from its width: save a Llama with biases [differs].
    windows = "sliding_attention" in getattr(model.config, "layer_types", [])
    as_llama = model.config.model_type == "qwen2" and not windows
    with as_user_error(f"cannot write {folder} ({{}}); the same command resumes."):
        if as_llama:
            for name in modules_of(model, ("o_proj",)):
                weights[f"{name}.bias"] = torch.zeros(model.config.hidden_size, dtype=model.dtype)
        model.save_pretrained(folder, state_dict=weights)
        task.tokenizer.save_pretrained(folder)
        adapt_to_others(folder, as_llama)
    exported, _ = load_teacher(str(folder), task.teacher.dtype)
    one, other = [last_hidden(m, task.held_out[0]["input_ids"]) for m in (exported, model)]
    limit = torch.finfo(model.dtype).eps ** 0.5 * other.norm()  # another class may round otherwise
    require((one - other).norm() <= limit, f"{folder} differs from what was trained.")


def adapt_to_others(folder: Path, as_llama: bool):
    """Edit an exported student's files for transformers 4, MLX, llama.cpp and vLLM."""
    values = json.loads((folder / "config.json").read_bytes())
    rope = values["rope_parameters"]
    values["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        values["rope_scaling"] = rope
    if as_llama:
        values |= dict(model_type="llama", architectures=["LlamaForCausalLM"], attention_bias=True)
    write(folder / "config.json", values)
    text = (folder / "tokenizer_config.json").read_text("utf-8")
    text = text.replace("TokenizersBackend", "PreTrainedTokenizerFast")
    text = text.replace('"extra_special_tokens": [', '"additional_special_tokens": [')
    write(folder / "tokenizer_config.json", text)


def files_of(source: str | None) -> list[Path]:
    """The files that `source` names: a file, a folder's, a pattern's, each once; or none."""
    source, visited = source or "", set()
    if os.path.isfile(source):
        return [Path(source)]
    names = glob.glob(source, recursive=True)
    for folder, folders, inside in os.walk(source, followlinks=True):
        names += [os.path.join(folder, name) for name in inside if not NO_TEXT.fullmatch(name)]
        new = os.path.realpath(folder) not in visited  # links may lead in a circle
        visited.add(os.path.realpath(folder))
        folders[:] = [name for name in folders if new and not name.startswith(".")]
    files = {os.path.realpath(name): Path(name) for name in sorted(names, reverse=True)}
    return sorted(filter(Path.is_file, files.values()))


def rows_of(path: Path) -> Iterator[dict]:
    """The rows of a file. A .txt has blank lines between documents, a .json an array or lines."""
    if path.suffix == ".parquet":
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000):
            yield from batch.to_pylist()
        return
    with open(path, encoding="utf-8-sig") as file:  # a byte order mark is no text
        start = file.read(1000).lstrip()
        file.seek(0)
        if path.suffix == ".txt":
            for _, lines in itertools.groupby(file, str.isspace):
                yield {"text": "".join(lines).strip("\n")}
        elif path.suffix == ".json" and start.startswith("["):
            yield from json.load(file)
        else:
            yield from (json.loads(line) for line in file if line.strip())


def document_of(row: dict, where: str) -> dict:
    """A row as {"prompt", "answer"}; plain `text` has the prompt "". UserError: it has neither."""
    require(isinstance(row, dict), f"{where} is no object with names.")
    asked = row.get("question") not in (None, "") and row.get("answer") not in (None, "")
    known = "text" in row or {"question", "answer"} <= row.keys()
    require(known, f"{where} lacks a `text`, or `question` and `answer`; it has {', '.join(row)}.")
    names = ("question", "answer") if asked else ("text",)  # others may be of any type
    values = ["" if row.get(name) is None else row[name] for name in names]
    usable = all(isinstance(value, str | int | float) for value in values)
    require(usable, f"{where} has no string as its {' or '.join(names)}.")
    values = [str(v).encode("utf-8", "replace").decode() for v in values]  # half an emoji becomes ?
    prompt = f"Question: {values[0]}\nAnswer: " if asked else ""
    return {"prompt": prompt, "answer": values[-1]}


def documents_of(path: str) -> Iterator[dict]:
    """Yield `document_of` each row of a file, leaving out rows without text."""
    with as_user_error(f"cannot read {path} ({{}})."):
        for number, row in enumerate(rows_of(Path(path)), 1):
            document = document_of(row, f"row {number:,} of {path}")
            if document["answer"].strip():
                yield document


def interleaved(paths: tuple[str, ...]) -> Iterator[dict]:
    """Yield the documents of files in turns, of 16 files at once, so that sources are mixed."""
    groups = math.ceil(len(paths) / 16)
    for group in range(groups):
        readers = [documents_of(path) for path in paths[group::groups]]
        for documents in itertools.zip_longest(*readers):
            yield from filter(None, documents)


def open_documents(source: str, flag: str):
    """A streaming dataset of `document_of` each row, of files or the hub. UserError: neither."""
    import datasets  # takes seconds; the tiny world needs none of it

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(50)  # its errors become our one sentence
    paths = tuple(map(str, files_of(source)))  # as a list they would be shards
    if paths:
        for path in paths:
            require(path.endswith(SUFFIXES), f"cannot read {path}; {flag} takes {SUFFIXES} files.")
        announce("reading", f"{len(paths):,} files of {source}")
        return datasets.IterableDataset.from_generator(interleaved, gen_kwargs={"paths": paths})
    announce("reading", f"{source} of the hub")
    name, _, rest = source.partition(":")
    require("/" in name, f"{flag} {source} is no file, nor a hub dataset's OWNER/NAME.")
    subset, _, split = rest.partition(":")
    with as_user_error(f"{flag} {source} is no file, nor a hub dataset in reach ({{}})."):
        rows = datasets.load_dataset(name, subset or None, split=split or "train", streaming=True)
    rows = rows.map(document_of, fn_kwargs={"where": f"a row of {source}"})
    return rows.filter(lambda row: bool(row["answer"].strip())).select_columns(["prompt", "answer"])


def tokens_of(document: dict, task: Task) -> list[int]:
    """A document's tokens, closed by the end token. UserError: the embedding has no row for one."""
    text, end = document["prompt"] + document["answer"], task.tokenizer.eos_token_id
    ids = task.tokenizer(text, verbose=False)["input_ids"]
    if end is not None and ids[-1:] != [end]:
        ids.append(end)
    most, size = max(ids, default=0), task.teacher.config.vocab_size
    require(most < size, f"the teacher's embedding has no row for token {most} of the text.")
    return ids


def packed(documents: Iterable, task: Task, batch_size: int, seq_len: int, tokens: list):
    """Batches cut from documents, across their borders. tokens: those left over, kept in place."""
    for document in documents:
        tokens += tokens_of(document, task)
        while len(tokens) >= batch_size * seq_len:
            ids = torch.tensor(tokens[: batch_size * seq_len]).view(batch_size, seq_len)
            del tokens[: batch_size * seq_len]
            yield {"input_ids": ids, "labels": ids}


class TrainingText:
    """Text to train on, shuffled in blocks of documents, from any place (App. F.2). A place is the
    rest of a block, the tokens that no batch has had yet, and where the stream goes on."""

    def __init__(self, config: Config, task: Task):
        """Read up to 2,000 documents; the first tenth of them (at most 200) is held out."""
        self.config, self.task = config, task
        stream = open_documents(config.data, "--data")
        documents = list(progress(itertools.islice(stream, BLOCK), "reading", BLOCK))
        count = max(1, min(200, len(documents) // 10))
        self.held_out, self.rest = documents[:count], documents[count:]
        require(len(self.rest) >= world_size(), f"{config.data} has too few documents.")
        self.stream = stream.skip(count)
        self.beginning = self.stream.state_dict()

    def batches_from(self, place: dict | None) -> Iterator[dict]:
        """Endless batches for this process from a place; None: from the beginning."""
        start = {"documents": [], "tokens": [], "block": 0, "stream": self.beginning}
        self.place = place or start
        batch_size, seq_len = self.config.batch_size, self.config.seq_len
        return packed(self.read(), self.task, batch_size, seq_len, self.place["tokens"])

    def read(self) -> Iterator[dict]:
        """Documents without an end, in shuffled blocks; of each this process has its share."""
        place, rows, count = self.place, None, BLOCK * world_size()
        while True:
            while place["documents"]:
                yield place["documents"].pop()
            if rows is None:
                self.stream.load_state_dict(place["stream"])
                rows = iter(self.stream)
            block = list(itertools.islice(rows, count))
            place["stream"] = self.stream.state_dict()
            if len(block) < count:  # the text has ended, and begins again
                place["stream"], rows = self.beginning, None
            place["block"] += 1
            random.Random(f"{self.config.seed} {place['block']}").shuffle(block)
            place["documents"] = block[rank() :: world_size()]


def training_batches(config: Config, task: Task, done: int, place: dict | None) -> Iterator[dict]:
    """This process's batches after `done` steps, from a place in the text."""
    if task.text is not None:
        return task.text.batches_from(place)
    lines = tiny_batches(config.batch_size, config.seq_len, f"training {config.seed}")
    taken = done * config.grad_accum * world_size()  # made too fast to need a place
    return itertools.islice(lines, taken + rank(), None, world_size())


def read_problems(config: Config, task: Task) -> list[list[dict]]:
    """Worked problems to score results of, in groups. UserError: there are none."""
    rows = open_documents(config.eval_data, "--eval-data").filter(lambda row: row["prompt"])
    rows, problems = rows.take(config.eval_problems), []
    longest = task.teacher.config.max_position_embeddings
    for row in progress(rows, "reading", config.eval_problems):
        tokens_of(row, task)  # all of them are known to the teacher
        problem = encode_answer(row["prompt"], row["answer"], task.tokenizer)
        if problem["answer_at"] < len(problem["ids"]) <= longest:
            problems.append(problem)
    annotated = any(problem["results"] for problem in problems)
    require(annotated, f"--eval-data {config.eval_data} has no results as in <<48/2=24>>.")
    size = config.batch_size
    return [problems[i : i + size] for i in range(0, len(problems), size)]


def open_task(config: Config) -> Task:
    """The Task of a teacher and of its text (App. F). UserError: they cannot be used."""
    name, length = config.model or tiny_teacher_folder(config), config.seq_len
    announce("loading", name)
    task = Task(*load_teacher(name, choose_dtype(config)))
    positions = task.teacher.config.max_position_embeddings
    require(length <= positions, f"--seq-len is beyond the {positions:,} positions of {name}.")
    if config.model is None:
        samples = tiny_batches(1, length, f"calibration {config.seed}")
        task.held_out = [next(tiny_batches(128, length, f"held out {config.seed}"))]
    else:
        task.text = TrainingText(config, task)
        samples = packed(task.text.rest, task, 1, length, [])  # the paper's: Nemotron [differs]
        held_out = packed(task.text.held_out, task, 1, length, [])
        task.held_out = list(itertools.islice(held_out, 32))  # more would take long
    task.samples = list(itertools.islice(samples, config.calibration_samples))
    require(task.held_out and task.samples, "too little text: give more, or a lower --seq-len.")
    if config.eval_data not in (None, "none"):
        task.problems = read_problems(config, task)
    return task


# ==== A run, its folders and the command line =================================================
# OUT holds students of one teacher, made under one set of settings: only their starts differ.
# Only the first process writes files; its own .json and step-*.pt whole or not at all.
# A fault is one sentence on stderr. Exit code 2: you can mend it, 1: it broke off, 130: stopped.
NOT_IDENTITY = ("out", "save_every", "methods")
SIGNALS = {"wait": False, "came": False}  # wait: a first signal is only noted, in "came"


class UserError(Exception):
    """An error the user can mend: one sentence for stderr, exit code 2, no traceback."""


def require(condition, sentence: str):
    """UserError with the sentence, unless the condition holds."""
    if not condition:
        raise UserError(sentence)


@contextlib.contextmanager
def as_user_error(sentence: str):
    """Re-raise errors in the block as UserError: `sentence`, with the error's text for {}."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:250].rstrip(".") or type(error).__name__
        raise UserError(sentence.replace("{}", text)) from error


def announce(what: str, text: str):
    """One line of what is being done, from the first process."""
    if rank() == 0:
        tqdm.write(f"{what:<12} {text}")


def progress(items: Iterable, what: str, total: int | None = None, done: int = 0) -> Iterator:
    """Yield the items under a bar; where stderr is no terminal, announce tenths, 3 s apart."""
    total = len(items) if total is None else total
    said, terminal = time.monotonic(), rank() == 0 and sys.stderr.isatty()
    for item in tqdm(items, what, total, initial=done, leave=False, disable=not terminal):
        yield item
        done += 1
        tenth = done % max(1, total // 10) == 0
        if tenth and not terminal and time.monotonic() - said > 3:
            said = time.monotonic()
            announce(what, f"{done:,} of {total:,}")


def write(path: Path, value):
    """Write text, tensors (a .pt file), or any other value as JSON: whole, or not at all."""
    if rank() > 0:
        return
    partial = path.with_name(f"{path.name}.partial")
    with as_user_error(f"cannot write {path} ({{}}): disk full? The same command resumes."):
        if path.suffix == ".pt":
            torch.save(value, partial)
        else:
            text = value if isinstance(value, str) else json.dumps(value, indent=1)
            partial.write_text(text, "utf-8", "replace")
        os.replace(partial, path)


def settings_of(config: Config) -> dict:
    """What identifies a run: settings, processes, names and sizes of local files."""
    settings = {k: v for k, v in vars(config).items() if k not in NOT_IDENTITY}
    settings |= {"processes": world_size(), "dtype": str(choose_dtype(config))}
    settings["model"] = config.model or TINY_CONFIG.read_text("utf-8")
    model = glob.escape(config.model or os.devnull)
    for source in (f"{model}/*.json", f"{model}/*.safetensors", config.data, config.eval_data):
        for path in files_of(source):
            settings[f"size of {path}"] = path.stat().st_size
    return settings


def open_folder(folder: Path, settings: dict):
    """Make a folder. UserError: it holds anything but a run with these settings."""
    with as_user_error(f"--out {folder} cannot be made ({{}}); name another."):
        folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        return
    with as_user_error(f"{folder} holds files of no run of RED; name another --out."):
        stored = dict(json.loads((folder / "settings.json").read_bytes()))
    for name in sorted(stored | settings):
        there, here = stored.get(name, "nothing"), settings.get(name, "nothing")
        require(there == here, f"{folder} has {name} {there}, not {here}; name another --out.")


def save_checkpoint(folder: Path, records: list, student: ProjectedStudent, optimizers, task):
    """Save what going on needs: all records, what learns, and every process's place in the text."""
    state = {
        "records": records,
        "student": student.parameters(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "places": gather(task.text and task.text.place),
    }
    write(folder / f"step-{records[-1]['step']:07}.pt", state)
    if rank() == 0:
        for path in sorted(folder.glob("step-*.pt"))[:-2]:
            path.unlink()
    barrier()  # nobody leaves before the first process has written


def load_checkpoint(folder: Path, student: ProjectedStudent, optimizers: list) -> tuple:
    """Load the newest checkpoint: its records and place in the text. UserError: it is damaged."""
    paths = gather(sorted(folder.glob("step-*.pt")))[0]  # the first process chooses for all
    if not paths:
        return [], None
    sentence = f"{paths[-1]} is damaged; move it away, to go on from the one before."
    with as_user_error(sentence):
        require(zipfile.ZipFile(paths[-1]).testzip() is None, sentence)
        state = torch.load(paths[-1], "cpu", weights_only=True, mmap=True)  # runs no code from it
        for parameter, saved in zip(student.parameters(), state["student"], strict=True):
            parameter.data.copy_(saved)
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    announce("checkpoint", f"going on from {paths[-1]}")
    return state["records"], state["places"][rank()]


def train_student(
    method: str, config: Config, student, task: Task, teacher_mean_squares: dict
) -> list:
    """Train one student, from its start or last checkpoint. Returns records of steps 0, 1, ..."""
    if student.teacher.device.type == "cuda":
        fuse_norms(student.model)
    if world_size() > 1:
        for parameter in student.parameters():  # GPUs may differ in the last digit
            torch.distributed.broadcast(parameter.data, 0)
    folder, optimizers = Path(config.out) / method, make_optimizers(student, config)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    records, place = load_checkpoint(folder / "checkpoints", student, optimizers)
    if not records:
        measures = measure_model(student.model, task, finished=config.steps == 0)
        records = [{"step": 0, "tokens_seen": 0, "held_out": measures}]
    # Cut the file back to the checkpoint: the steps after it will be taken again.
    write(folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    done = records[-1]["step"]
    batches = training_batches(config, task, done, place)
    steps = distill(task.teacher, student, batches, config, teacher_mean_squares, optimizers, done)
    SIGNALS["wait"] = True
    for record in progress(steps, method, config.steps, done):
        step, last = record["step"], record["step"] == config.steps
        record["tokens_seen"] = records[-1]["tokens_seen"] + record["tokens"]
        saving = last or config.save_every > 0 and step % config.save_every == 0
        if saving:
            student.merge()
            record["held_out"] = measure_model(student.model, task, finished=last)
        records.append(record)
        if rank() == 0:
            with open(folder / "metrics.jsonl", "a") as file:
                print(json.dumps(record), file=file)
        stopping = any(gather(SIGNALS["came"]))  # all processes stop together
        if saving or stopping:
            save_checkpoint(folder / "checkpoints", records, student, optimizers, task)
        if stopping:
            raise KeyboardInterrupt
    SIGNALS["wait"] = False
    return records


def run(config: Config):
    """Make the missing students of a command, export them into OUT, and print the table."""
    out, rows = Path(config.out), {}
    if rank() == 0:
        open_folder(out, settings_of(config))
        if (out / "summary.json").is_file():  # what earlier commands finished
            with as_user_error(f"{out}/summary.json is damaged ({{}}); move it away."):
                rows = dict(json.loads((out / "summary.json").read_bytes()))
    rows = gather(rows)[0]
    finished = [name for name in rows if (out / name / "student/tokenizer.json").is_file()]
    missing = [method for method in dict.fromkeys(config.methods) if method not in finished]
    if missing:
        task = open_task(config)
        teacher, width = task.teacher, choose_width(config.ratio, task.teacher.config)
        where = f"{world_size()} x {teacher.device}, {teacher.dtype}"
        announce("students", f"width {width} of {teacher.config.hidden_size}, on {where}")
        with as_user_error(f"{teacher.name_or_path} cannot run ({{}})."):
            calibration = calibrate(teacher, progress(task.samples, "calibrating"))
        if "teacher" not in rows:
            rows["teacher"] = measure_model(teacher, task, finished=True)
        write(out / "settings.json", settings_of(config))  # the input is good
        write(out / "summary.json", rows)
    for method in missing:
        student = new_student(method, teacher, width, calibration, config.seed)
        records = train_student(method, config, student, task, calibration.teacher_mean_squares)
        if rank() == 0:
            export_student(student, task, out / method / "student")
        curve = [record for record in records if "held_out" in record]
        rows[method] = records[-1]["held_out"] | {"curve": curve}
        write(out / "summary.json", rows)
        barrier()
    if rank() == 0:
        print(f"\n{table(rows)}\n\nstudents in {out}")


def table(rows: dict) -> str:
    """Label -> summary, as text: general ability, reasoning, the rest; and eRank over the steps."""
    lines, wide = [], max(map(len, ["eRank, step", *rows]))
    for label, row in rows.items():
        shares = {}
        if "pairs" in row:
            shares["pairs chosen"] = row["pairs"]["chosen"]
            shares |= dict(zip(("chains of 1", "of 2", "of 3", "of 4", "of 5"), row["chains"]))
            shares["pairs written"] = row["pairs"]["written"]
        if "results" in row:
            shares["other tokens right"] = row["other_tokens"]
            shares["results right"] = row["results"]
        cells = {name: f"{share:.0%}" for name, share in shares.items()}
        cells[" loss"] = f"{row['loss']:.3f}"
        cells["eRank"] = f"{fmean(row['erank']):.1f}"
        cells["  size"] = f"{row['parameters'] / 1e6:,.2f}M"
        if not lines:
            lines = ["  ".join([" " * wide, *cells])]
        padded = [text.rjust(len(heading)) for heading, text in cells.items()]
        lines.append("  ".join([label.ljust(wide), *padded]))
    for label, row in rows.items():
        if "curve" not in row:
            continue
        few = row["curve"][:: math.ceil(len(row["curve"]) / 11)]  # eleven points at most
        steps = "eRank, step".ljust(wide) + "".join(f"{record['step']:>7,}" for record in few)
        if steps not in lines:
            lines += ["", steps]
        values = [fmean(record["held_out"]["erank"]) for record in few]
        lines.append(label.ljust(wide) + "".join(f"{value:7.1f}" for value in values))
    lines.append("")
    for label, row in rows.items():
        if "example" in row:
            lines.append(f"{label:<{wide}}  {row['example']}")
    return "\n".join(lines)


def parse_arguments(arguments: list[str] | None = None) -> Config:
    """Command line (list of words; None: sys.argv) -> Config. A mistake raises UserError."""
    after = f"tiny world: {TINY_DEFAULTS}, learning_rate {TINY_LEARNING_RATES}"
    after += "".join(f"\n  {name:<17}  {start}" for name, start in METHODS.items())
    parser = transformers.HfArgumentParser(
        Config,
        usage="python red.py [flags]",
        description=__doc__,
        epilog=after,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    with as_user_error("{}; python red.py --help lists every flag."):
        config, rest = parser.parse_known_args(arguments)
        if config.model is None:
            parser.set_defaults(**TINY_DEFAULTS)
            config, rest = parser.parse_known_args(arguments)
        require(not rest, f"{' '.join(rest)} is not understood; see --help.")
    config = Config(**vars(config))
    if config.out is None:  # where two names meet, open_folder refuses
        config.out = f"runs/{os.path.basename(os.path.abspath(config.model or 'tiny'))}"
        for name, value in vars(config).items():
            if value != parser.get_default(name) and name not in ("model", *NOT_IDENTITY):
                config.out += re.sub("[_/]", "-", f"-{name}-{value}")
        config.out = config.out[:200]
    if config.learning_rate is None:
        rates = LEARNING_RATES if config.model else TINY_LEARNING_RATES
        config.learning_rate = rates[config.optimizer]
    check(config)
    if config.model is not None and config.data is None:
        config.data = "HuggingFaceFW/fineweb-edu:sample-10BT"  # one source [differs]
        config.eval_data = config.eval_data or "openai/gsm8k:main:test"
    return config


def check(config: Config):
    """Reject impossible settings (UserError). Loads nothing."""
    least = dict(steps=0, alpha=0, seed=0, save_every=0, seq_len=8)
    least |= dict(ratio=1e-9, temperature=1e-9, learning_rate=1e-9)
    for name, value in vars(config).items():
        flag, lowest = "--" + name.replace("_", "-"), least.get(name, 1)
        most = 1 if name == "ratio" else 10**9
        require(value != "", f"{flag} is empty; leave it out.")
        if isinstance(value, int | float):
            require(lowest <= value <= most, f"{flag} must be from {lowest} to {most}.")
    given = [source for source in (config.data, config.eval_data) if source]
    require(config.model or not given, "--data and --eval-data need --model.")
    if len(given) == 2:
        train, test = [{path.resolve() for path in files_of(source)} for source in given]
        shared = train & test or config.data == config.eval_data
        require(not shared, "--eval-data is part of --data.")
    for source in given:
        inside = Path(config.out).resolve().is_relative_to(Path(source).resolve())
        require(not inside, f"--out lies inside {source}; name another.")


def on_signal(number, frame):
    """In training, a first signal waits until the step is saved; one 2 s later ends the run."""
    now = time.monotonic()
    if now - (SIGNALS["came"] or now) > 2 or not SIGNALS["wait"]:
        raise KeyboardInterrupt
    SIGNALS["came"] = SIGNALS["came"] or now  # torchrun and Slurm may pass one signal on twice


def main(arguments: list[str] | None = None) -> int:
    """Run one command line (a list of words; None: sys.argv) and return its exit code."""
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        transformers.logging.disable_progress_bar()
    SIGNALS.update(wait=False, came=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    try:
        config = parse_arguments(arguments)
        join_processes()
        run(config)
        if torch.distributed.is_initialized():  # its threads must not outlive Python
            torch.distributed.destroy_process_group()
        return 0
    except KeyboardInterrupt:
        code, text = 130, "interrupted; the same command resumes."
    except UserError as error:
        code, text = 2, str(error)
    except FloatingPointError as error:
        code, text = 1, f"{error}; try a lower --learning-rate, and another --out."
    except Exception as error:
        memory = re.search(r"^\w*Memory|allocate memory|out of memory|ALLOC_FAILED", repr(error))
        lost = re.search("^Dist|onnection |CUDA error", repr(error))
        # Any error that comes through the library of texts is one of the network or of a file.
        reading = "-packages/datasets/" in str(traceback.format_tb(error.__traceback__))
        if not (memory or lost or reading or isinstance(error, OSError)):
            raise
        code, text = 1, f"{type(error).__name__}: {error}; once mended, the same command resumes."
        if memory:
            text = "out of memory; try a smaller --batch-size or --seq-len."
    if os.environ.get("RANK", "0") != "0":  # the first one speaks first
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    print(f"red.py: {' '.join(text.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()  # it would report each retry
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # for any terminal or pipe
    sys.exit(main())
