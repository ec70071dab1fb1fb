"""A study: arms on data sets, each tuned with as many tries as the others, over the same seeds.

An arm is a config and some `key=value` changes, so every row of a study is one command that anybody
can give by hand. It must not know how a run is trained, nor what the page looks like.
"""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from fellray.platform import config as configs
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.section import Section
from fellray.platform.study_values import refuse_metrics
from fellray.platform.words import HEADLINE

Grid = dict[str, tuple[Any, ...]]
"""Key -> values that are tried."""


class DataSet(Section):
    """Data, and the config that all arms begin with on them."""

    config: Path
    """A run's config, as `fellray train` takes it."""
    set: tuple[str, ...] = ()
    """`key=value` changes for all arms: a smaller budget, say."""
    tune: Grid | None = None
    """What arms try on this set instead of the study's `tune`; {}: nothing."""
    note: str = ""
    """What it is, and how settings that are not tuned here were chosen: for the page."""
    prepare: str = ""
    """The command that prepares its data, for the page."""


class Part(Section):
    """A table: arms set against the first of them."""

    title: str
    sets: tuple[str, ...] = Field(min_length=1)
    """The data sets on which it is run."""
    arms: dict[str, tuple[str, ...]] = Field(min_length=1)
    """Name -> what it changes, `key=value`."""
    champion: str | None = None
    """The arm whose place the page's first lines tell; by default the first."""
    metric: str = HEADLINE
    """What arms are ranked, tuned and tested by: more must be better. `auc`, `gauc` or `precision`
    where sets are on attributes."""
    columns: tuple[str, ...] = ("recall@10",)
    """More metrics to show, where runs have them."""
    note: str = ""
    """Words of the one who ran it, below the table."""

    @property
    def first(self) -> str:
        """The arm that the others are tested against."""
        return self.champion or next(iter(self.arms))

    @model_validator(mode="after")
    def _has_its_champion(self) -> Self:
        if self.champion is not None and self.champion not in self.arms:
            raise ValueError(f"champion {self.champion!r} is none of its arms")
        return self


class Study(Section):
    """What `fellray compare` reads where a file has the key `study`."""

    study: str
    """Its name; runs are named STUDY-SET-ARM-sSEED."""
    storage: str = "runs"
    """Where runs and `STUDY-study/` go."""
    results: Path
    """The Markdown page; plots lie beside it, named after it."""
    budget: str = ""
    """How long it may take and on what, in words, for the page."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    tune: Grid = Field(default_factory=dict)
    """Key -> values. Every arm tries every combination with the first seed, and keeps the one with
    the best validation."""
    tune_arms: dict[str, Grid] = Field(default_factory=dict)
    """Arm -> what it tries instead, on every set: as many combinations as the others."""
    orientation: bool = False
    """Also item-kNN, BPR-MF and SASRec on every set, trained on everybody's data in one place, with
    as many tries as an arm has at most: rows for orientation, no arms."""
    sets: dict[str, DataSet] = Field(min_length=1)
    parts: tuple[Part, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        arms: dict[str, tuple[str, ...]] = {}
        for part in self.parts:
            for name in part.sets:
                if name not in self.sets:
                    known = ", ".join(self.sets)
                    raise ValueError(f"part {part.title!r}: no set {name!r}; there are {known}")
            for arm, changes in part.arms.items():
                if arms.setdefault(_slug(arm), changes) != changes:
                    raise ValueError(f"arm {arm!r} means two things; give one another name")
        for arm, grid in self.tune_arms.items():
            if _slug(arm) not in arms:
                raise ValueError(f"tune_arms names {arm!r}, which is no arm")
            if (tries := _count(grid)) != (others := _count(self.tune)):
                raise ValueError(f"arm {arm!r} would have {tries} tries, the others {others}")
        return self


@dataclass(frozen=True)
class Trial:
    """One run of a study."""

    study: str
    storage: str
    set: str
    arm: str
    seed: int
    config: Path
    changes: tuple[str, ...]
    """Of the set, then of the arm."""
    tuned: tuple[str, ...]
    """What tuning found, or tries."""

    @property
    def name(self) -> str:
        """Of the run; tries of one arm differ by what they try."""
        tries = "".join(f"-{change.rpartition('=')[2]}" for change in self.tuned)
        return f"{self.study}-{self.set}-{_slug(self.arm)}{tries}-s{self.seed}"

    @property
    def overrides(self) -> list[str]:
        """What the run changes in its config."""
        own = (f"seed={self.seed}", f"name={self.name}", f"storage={self.storage}")
        return [*self.changes, *self.tuned, *own]

    @property
    def command(self) -> str:
        """The same run by hand."""
        return shlex.join(["fellray", "train", str(self.config), *self.overrides])

    def settle(self) -> RunConfig:
        """Its config.

        Raises:
            FellrayError: as `config.load`; the arm is named.
        """
        try:
            return configs.load(self.config, self.overrides)
        except FellrayError as error:
            raise FellrayError(f"arm {self.arm!r} on {self.set}: {error}") from None


def is_study(path: Path) -> bool:
    """Whether a file is one. What cannot be read is not: a config's reader says what is wrong."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(tree, dict) and "study" in tree


def load_study(path: Path) -> Study:
    """The study in a YAML file, every config in it read once.

    Raises:
        FellrayError: a key is unknown, a value does not fit, or an arm's config does not.
    """
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        study = Study.model_validate(tree)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise FellrayError(f"{path}: {told}") from None
    for part in study.parts:
        for name in part.sets:
            for arm in part.arms:
                for trial in list_tries(study, name, arm):
                    clicks = trial.settle().attributes is not None
                    chosen = part.columns if "columns" in part.model_fields_set else ()
                    if why := refuse_metrics(part.metric, chosen, clicks):
                        raise FellrayError(f"{path}: part {part.title!r} on {name}: {why}")
    return study


def list_arms(study: Study) -> Iterator[tuple[str, str, Part]]:
    """Set, arm, and the first part that asks for them; each pair once."""
    met: set[tuple[str, str]] = set()
    for part in study.parts:
        for pair in product(part.sets, part.arms):
            if pair not in met:
                met.add(pair)
                yield *pair, part


def list_tries(study: Study, name: str, arm: str) -> list[Trial]:
    """What tuning tries for an arm; one run where there is nothing to tune."""
    changes = next(part.arms[arm] for part in study.parts if arm in part.arms)
    own = study.sets[name]
    # what an arm fixes itself is the arm
    fixed = {change.partition("=")[0] for change in changes}
    tune = study.tune if own.tune is None else own.tune
    grid = {k: v for k, v in study.tune_arms.get(arm, tune).items() if k not in fixed}
    return [
        Trial(
            study=study.study,
            storage=study.storage,
            set=name,
            arm=arm,
            seed=study.seeds[0],
            config=own.config,
            changes=(*own.set, *changes),
            tuned=tuple(f"{key}={value}" for key, value in zip(grid, values, strict=True)),
        )
        for values in product(*grid.values())
    ]


def count_tries(study: Study) -> int:
    """How many settings an arm tries that fixes nothing itself."""
    return prod(len(values) for values in study.tune.values())


def list_seeds(study: Study, best: Trial) -> list[Trial]:
    """The best try with every seed; with the first seed it is that try."""
    return [replace(best, seed=seed) for seed in study.seeds]


def choose(tries: Mapping[Trial, Mapping[str, Any]], metric: str) -> Trial:
    """The try with the best validation; among equals the first."""
    return max(tries, key=lambda trial: float(tries[trial]["validation"][metric]))


def _count(grid: Grid) -> int:
    return prod(len(values) for values in grid.values())


def _slug(arm: str) -> str:
    """An arm's name as part of a folder's."""
    return "-".join(re.findall(r"[\w.]+", arm))
