"""The demo set: real film titles, and interactions drawn from a stated model of taste.

It must not know readers, splits, clients or methods: it returns two plain tables in the schema
that every source has. The titles and genres in `catalogue.tsv` are facts; the people are invented.

The model. Each user belongs to a taste community; both have a distribution over genres. A user
picks films one after another, without repeats, from a softmax over

    popularity + taste . genres + sequence . (likeness to the last films)

where popularity follows Zipf's law over a random order of the films; now and then the pick is any
film at all. Letters: U users, I items, G genres, K communities, T steps.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class _Model:
    """The stated numbers. None was chosen by looking at what any method scores."""

    users: int = 800
    """People."""
    shortest: int = 15
    """Fewest films of one person."""
    longest: int = 40
    """Most films of one person."""
    mean: float = 25.0
    """Expected films of one person: shortest plus a binomial draw."""
    zipf: float = 1.0
    """The film of popularity rank r is chosen in proportion to r ** -zipf, other things equal."""
    communities: int = 6
    """Taste communities; every user belongs to one, with equal chance."""
    concentration: float = 0.3
    """Dirichlet concentration of a taste over genres; below 1, a few genres dominate."""
    own: float = 0.3
    """Share of a user's taste that is their own; the rest is their community's."""
    taste: float = 6.0
    """Logit between a film whose genres are all of the taste and one with none of it."""
    sequence: float = 1.5
    """Logit between a film with the genres of the last films and one that shares none."""
    memory: int = 3
    """How many last films the sequential part looks at."""
    noise: float = 0.1
    """Chance that a pick ignores everything and is any unseen film."""
    start: int = 1_577_836_800
    """Earliest first interaction, unix seconds (1 January 2020)."""
    span: int = 31_536_000
    """First interactions are spread evenly over this many seconds (a year)."""
    gap: float = 259_200.0
    """Mean seconds between two interactions of a user (three days), exponential."""


_MODEL = _Model()
_CATALOGUE = Path(__file__).with_name("catalogue.tsv")


def make(seed: int, users: int | None = None) -> tuple[pa.Table, pa.Table]:
    """(interactions, items): user_id, item_id, timestamp, seq; and item_id, title, categories.

    Timestamps are unix seconds and never decrease along a user's history. The same seed gives
    the same bytes.

    Args:
        users: how many people, where it is not the model's number; they are others then.
    """
    model = _MODEL if users is None else replace(_MODEL, users=users)
    lines = [line.split("\t") for line in _CATALOGUE.read_text(encoding="utf-8").splitlines()]
    titles, categories = [title for title, _ in lines], [genres for _, genres in lines]
    genres_IG = _genre_rows(categories)
    rng = np.random.default_rng(seed)

    lengths_U = model.shortest + rng.binomial(
        model.longest - model.shortest,
        (model.mean - model.shortest) / (model.longest - model.shortest),
        size=model.users,
    )
    popularity_I = -model.zipf * np.log1p(rng.permutation(len(titles)))
    taste_UG = _draw_tastes(model, genres_IG.shape[1], rng)
    logits_UI = popularity_I + model.taste * taste_UG @ genres_IG.T
    picks_UT = _draw_picks(model, logits_UI, genres_IG, int(lengths_U.max()), rng)

    first_U1 = model.start + rng.integers(model.span, size=(model.users, 1))
    gaps_UT = rng.exponential(model.gap, size=picks_UT.shape).astype(np.int64)
    timestamp_UT = first_U1 + np.cumsum(gaps_UT, axis=1)
    steps = picks_UT.shape[1]
    user_UT = np.repeat(np.arange(model.users)[:, None], steps, axis=1)
    seq_UT = np.repeat(np.arange(steps)[None, :], model.users, axis=0)
    kept_UT = seq_UT < lengths_U[:, None]
    interactions = pa.table(
        {
            "user_id": user_UT[kept_UT].astype(np.int64),
            "item_id": picks_UT[kept_UT].astype(np.int64),
            "timestamp": timestamp_UT[kept_UT],
            "seq": seq_UT[kept_UT].astype(np.int32),
        }
    )
    items = pa.table({"item_id": np.arange(len(titles)), "title": titles, "categories": categories})
    return interactions, items


def _genre_rows(categories: list[str]) -> np.ndarray:
    """float64 [I, G]: each film's genres as equal shares of 1."""
    split = [genres.split("|") for genres in categories]
    names = sorted({genre for genres in split for genre in genres})
    rows_IG = np.array([[name in genres for name in names] for genres in split], np.float64)
    rows_IG /= rows_IG.sum(axis=1, keepdims=True)
    return rows_IG


def _draw_tastes(model: _Model, num_genres: int, rng: np.random.Generator) -> np.ndarray:
    """float64 [U, G]: shares of the community's taste and of the user's own."""
    concentration_G = np.full(num_genres, model.concentration)
    shared_KG = rng.dirichlet(concentration_G, size=model.communities)
    own_UG = rng.dirichlet(concentration_G, size=model.users)
    community_U = rng.integers(model.communities, size=model.users)
    return (1 - model.own) * shared_KG[community_U] + model.own * own_UG


def _draw_picks(
    model: _Model,
    logits_UI: np.ndarray,
    genres_IG: np.ndarray,
    steps: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """int64 [U, T]: films without repeats; Gumbel noise makes an argmax a draw from the softmax."""
    users_U = np.arange(len(logits_UI))
    likeness_II = _cosines(genres_IG)
    unseen_UI = np.ones(logits_UI.shape, bool)
    picks_UT = np.zeros((len(logits_UI), steps), np.int64)
    for t in range(steps):
        scores_UI = logits_UI
        if t:
            last_UM = picks_UT[:, max(0, t - model.memory) : t]
            scores_UI = logits_UI + model.sequence * likeness_II[last_UM].mean(axis=1)
        random_U1 = rng.random((len(logits_UI), 1)) < model.noise
        scores_UI = np.where(random_U1, 0.0, scores_UI) + rng.gumbel(size=logits_UI.shape)
        picks_UT[:, t] = np.where(unseen_UI, scores_UI, -np.inf).argmax(axis=1)
        unseen_UI[users_U, picks_UT[:, t]] = False
    return picks_UT


def _cosines(genres_IG: np.ndarray) -> np.ndarray:
    unit_IG = genres_IG / np.linalg.norm(genres_IG, axis=1, keepdims=True)
    likeness_II: np.ndarray = unit_IG @ unit_IG.T
    return likeness_II
