"""Mistakes in the head."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from golden_mistakes.subject import Subject, mistake


@mistake("head: the embedding in place of its own matrix", lambda config: not config["tie_word_embeddings"])
def _(subject: Subject) -> None:
    subject.model.lm_head.weight.copy_(subject.model.model.embed_tokens.weight)


@mistake("head: bias ignored", lambda config: config.get("lm_head_bias", False))
def _(subject: Subject) -> None:
    subject.model.lm_head.bias.zero_()


@mistake("head: a matrix of its own in place of the embedding", lambda config: config["tie_word_embeddings"])
def _(subject: Subject) -> None:
    embedding = subject.model.model.embed_tokens.weight
    noise = np.random.default_rng(list(b"head")).standard_normal(tuple(embedding.shape))
    subject.model.lm_head.weight = nn.Parameter(torch.from_numpy(noise).float() * embedding.std())
