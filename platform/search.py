"""Which tokens a text goes on with: the likeliest each time, or a search with beams.

The rules are those of transformers' `generate` with `do_sample=False` and otherwise its defaults
(length penalty 1, a text's search ends when no beam can become better than its worst finished one);
texts that are done leave the batch. It does not know where logits come from.

Shapes: P texts, B beams, R rows in writing, V tokens of the vocabulary, t tokens so far.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fellray.platform.span import Trip

Step = Callable[[Tensor, Tensor], Trip[Tensor]]
"""New tokens [R] and the rows of the last call that they follow [R], both on the CPU, to logits
[R, V]."""

NEVER = -1e9


def take_likeliest(logits_PV: Tensor, step: Step, end: int, limit: int) -> Trip[list[list[int]]]:
    """Each text's tokens, the end of text included where it came within `limit`."""
    found: list[list[int]] = [[] for _ in range(len(logits_PV))]
    open_R = torch.arange(len(logits_PV))
    for length in range(1, limit + 1):
        token_R = logits_PV.float().argmax(1).cpu()
        for text, token in zip(open_R.tolist(), token_R.tolist(), strict=True):
            found[text].append(token)
        goes_on = (token_R != end).nonzero().squeeze(1)
        if length == limit or not len(goes_on):
            break
        open_R = open_R[goes_on]
        logits_PV = yield from step(token_R[goes_on], goes_on)
    return found


@dataclass
class _Finished:
    """The best B finished texts of each prompt."""

    tokens_PBt: Tensor
    length_PB: Tensor
    score_PB: Tensor
    done_PB: Tensor


def search_beams(
    logits_PV: Tensor, step: Step, end: int, limit: int, beams: int
) -> Trip[list[list[int]]]:
    """Each text's tokens by the best beam, the end of text included where it has one."""
    texts, vocabulary = logits_PV.shape
    found: list[list[int]] = [[] for _ in range(texts)]
    text_P = torch.arange(texts)
    log_PBV = logits_PV.float().log_softmax(1).cpu()[:, None].expand(-1, beams, -1)
    running_PB = torch.full((texts, beams), NEVER)
    running_PB[:, 0] = 0.0
    tokens_PBt = torch.full((texts, beams, limit), end)
    done = _Finished(
        tokens_PBt.clone(),
        torch.zeros(texts, beams, dtype=torch.int64),
        torch.full((texts, beams), NEVER),
        torch.zeros(texts, beams, dtype=torch.bool),
    )
    first_P = torch.arange(texts)  # the one row that each prompt has so far
    for length in range(1, limit + 1):
        total = (log_PBV + running_PB[:, :, None]).flatten(1)
        score_PK, at_PK = total.topk(2 * beams)
        beam_PK, token_PK = at_PK // vocabulary, at_PK % vocabulary
        grown = tokens_PBt.gather(1, beam_PK[:, :, None].expand(-1, -1, limit))
        grown[:, :, length - 1] = token_PK
        ends_PK = (token_PK == end) | (length == limit)
        # the better half only may finish; the other is there so that enough can go on
        _finish(done, grown, score_PK / length, ends_PK & (torch.arange(2 * beams) < beams), length)
        running_PB, kept_PB = (score_PK + ends_PK * NEVER).topk(beams)
        open_P = _can_improve(running_PB, done, length)
        if length == limit:
            open_P = torch.zeros_like(open_P)
        for place in (~open_P).nonzero().squeeze(1).tolist():
            best = int(done.length_PB[place, 0])
            found[int(text_P[place])] = done.tokens_PBt[place, 0, :best].tolist()
        if not open_P.any():
            break
        rows = first_P[:, None].expand(-1, beams) if length == 1 else _rows(len(text_P), beams)
        parent_PB = rows.gather(1, beam_PK.gather(1, kept_PB))
        tokens_PBt = grown.gather(1, kept_PB[:, :, None].expand(-1, -1, limit))[open_P]
        text_P, running_PB, parent_PB = text_P[open_P], running_PB[open_P], parent_PB[open_P]
        done = _Finished(*(part[open_P] for part in vars(done).values()))
        logits_RV = yield from step(tokens_PBt[:, :, length - 1].flatten(), parent_PB.flatten())
        log_PBV = logits_RV.float().log_softmax(1).cpu().unflatten(0, (-1, beams))
    return found


def _rows(texts: int, beams: int) -> Tensor:
    return torch.arange(texts * beams).view(texts, beams)


def _finish(
    done: _Finished, grown_PKt: Tensor, score_PK: Tensor, ends_PK: Tensor, length: int
) -> None:
    """Put texts that end among the best finished ones."""
    beams = done.score_PB.shape[1]
    score = torch.cat([done.score_PB, score_PK + ~ends_PK * NEVER], 1)
    done.score_PB, at_PB = score.topk(beams)
    lengths = torch.full_like(ends_PK, length, dtype=torch.int64)
    done.length_PB = torch.cat([done.length_PB, lengths], 1).gather(1, at_PB)
    done.done_PB = torch.cat([done.done_PB, ends_PK], 1).gather(1, at_PB)
    wide = at_PB[:, :, None].expand(-1, -1, grown_PKt.shape[2])
    done.tokens_PBt = torch.cat([done.tokens_PBt, grown_PKt], 1).gather(1, wide)


def _can_improve(running_PB: Tensor, done: _Finished, length: int) -> Tensor:
    """Whether the best beam, were it to end here, would be better than the worst finished text."""
    worst_P1 = done.score_PB.min(1, keepdim=True).values
    worst_PB = torch.where(done.done_PB, worst_P1, NEVER)
    return (running_PB[:, :1] / length > worst_PB).any(1)
