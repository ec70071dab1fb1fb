"""Everything a run can be told: one frozen tree, read once, checked at the edge.

A sub-config is passed whole to the one class that owns it; nobody looks a key up by a string.
Each section has a file of its own, and the tree knows the methods only as their own configs (one
file per method beside this one). What must fit together across sections is checked here.
"""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from fellray.platform.attributes import AttributeConfig
from fellray.platform.data_config import DataConfig
from fellray.platform.errors import FellrayError
from fellray.platform.fedpa import Fedpa
from fellray.platform.fellrec import Fellrec
from fellray.platform.methods import AnyMethod
from fellray.platform.model_config import ModelConfig
from fellray.platform.plant_config import ClientsConfig, ClusterConfig, ServerConfig, WireConfig
from fellray.platform.privacy_config import GaussianNoise, NoPrivacy, PaperLikeNoise
from fellray.platform.section import Section, assume_kind
from fellray.platform.train_config import EvaluationConfig, SamplingConfig, TrainConfig


class RunConfig(Section):
    """One training run."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9._-]+$")
    """The run's folder is `storage`/`name`."""
    storage: str = "runs"
    """A path, or a URI of any pyarrow filesystem (s3://, gs://, hdfs://, file://)."""
    seed: int = Field(default=0, ge=0)
    """Seed of the adapters' start and of the order in which clients read their data."""
    keep_last: int = Field(default=2, ge=1)
    """How many committed rounds stay on storage besides the best one."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    attributes: AttributeConfig | None = None
    """Instead of `model`: attribute embeddings and an MLP, which `method.kind=fedpa` adapts."""
    wire: WireConfig = WireConfig()
    method: Annotated[AnyMethod, assume_kind("fellrec")] = Field(default=Fellrec())
    train: TrainConfig = TrainConfig()
    sampling: SamplingConfig = SamplingConfig()
    clients: ClientsConfig = ClientsConfig()
    server: ServerConfig = ServerConfig()
    cluster: ClusterConfig = ClusterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    privacy: Annotated[
        Annotated[NoPrivacy | GaussianNoise | PaperLikeNoise, Field(discriminator="kind")],
        assume_kind("gaussian"),
    ] = NoPrivacy()
    """What a client's upload goes through before it leaves."""

    @model_validator(mode="after")
    def _privacy_fits(self) -> Self:
        privacy = self.privacy
        if isinstance(privacy, NoPrivacy):
            return self
        if self.train.share != "all":
            raise ValueError(
                f"privacy works on the adapters that clients send, train.share={self.train.share} "
                "sends none; set train.share=all, or leave privacy out"
            )
        if self.method.local().kinds:
            raise ValueError(
                f"method {self.method.kind} keeps more of a client than what it sends, and privacy "
                "knows the sent weights only; take another method, or leave privacy out"
            )
        if (
            isinstance(privacy, GaussianNoise)
            and privacy.loss_clip is None
            and self.method.reads_losses()
        ):
            raise ValueError(
                f"method {self.method.kind} looks at the clients' losses, and a bare loss would "
                "undo the privacy of the update; set privacy.loss_clip and privacy.loss_sigma to "
                "send it noised, or take a method without losses, method.kind=fedavg"
            )
        return self

    @model_validator(mode="after")
    def _backbone_and_method(self) -> Self:
        of_clicks = self.evaluation.select in ("auc", "gauc")
        if self.attributes is None:
            if isinstance(self.method, Fedpa):
                raise ValueError("method.kind=fedpa needs the section attributes (jobs/fedpa.yaml)")
            if of_clicks:
                raise ValueError(f"evaluation.select={self.evaluation.select} is for attributes")
            return self
        if not isinstance(self.method, Fedpa):
            raise ValueError(f"a run on attributes takes method.kind=fedpa, not {self.method.kind}")
        if not of_clicks:
            raise ValueError(
                "a run on attributes is chosen by evaluation.select=auc or gauc, not "
                f"{self.evaluation.select}"
            )
        if strangers := sorted(set(self.method.groups) - set(self.attributes.users)):
            raise ValueError(
                f"method.groups names {strangers[0]!r}, which attributes.users does not have"
            )
        given = {
            "clients.own": self.clients.own is not None,
            "clients.per_actor=auto": self.clients.per_actor == "auto",
            "sampling.deadline_s": self.sampling.deadline_s is not None,
            "sampling.over_select": self.sampling.over_select > 1,
            "train.share": self.train.share != "all",
            "train.moments=keep": self.train.moments == "keep",
        }
        if unfit := [name for name, is_given in given.items() if is_given]:
            raise ValueError(f"a run on attributes has no {unfit[0]}: leave it out")
        return self

    @model_validator(mode="after")
    def _levels_fit(self) -> Self:
        if self.method.levels() is None:
            return self
        if self.train.share != "all":
            raise ValueError(
                f"method.kind={self.method.kind} says itself which adapters are sent, and "
                f"train.share={self.train.share} would hold back the groups'; set train.share=all"
            )
        if self.server.shared_adapter:
            raise ValueError(
                f"method.kind={self.method.kind} has one adapter of the server's for each group; "
                "set server.shared_adapter=false"
            )
        return self

    @model_validator(mode="after")
    def _top_looks_at_means(self) -> Self:
        if self.wire.pooled and self.model.top:
            raise ValueError(
                f"wire.pooled sends means only, and model.top={self.model.top} has blocks that "
                "attend to every token; set model.top=0, or wire.pooled=false"
            )
        return self


def load(path: Path | str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The config in a YAML file, changed by `key.key=value` overrides.

    Raises:
        FellrayError: the file is missing or no YAML, a key is unknown (the nearest known one is
            named) or a value does not fit.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise FellrayError(
                f"{path}: cannot be read ({error.strerror}); `fellray init` writes a first config"
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise FellrayError(f"{path}: is not YAML: {error}") from None
        if not isinstance(tree, dict):
            raise FellrayError(f"{path}: must be a mapping of keys to values")
    for override in overrides:
        _set(tree, override)
    return parse(tree, str(path or "command line"))


def parse(tree: dict[str, Any], source: str) -> RunConfig:
    """A checked config from plain data; `source` is named in the error."""
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise FellrayError(_explain(error, source)) from None
    levels = config.method.levels()
    model = config.model.model_copy(update={"levels": levels})
    config, train = config.model_copy(update={"model": model}), config.train
    if why := config.method.local().refuse(train.optimizer, train.moments, train.share):
        raise FellrayError(f"{source}: method.kind={config.method.kind} {why}")
    return config


def dump(config: RunConfig) -> str:
    """The resolved config as JSON: machine-written, nothing left to a default."""
    return json.dumps(config.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"


def _set(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise FellrayError(f"override {override!r}: write key=value, for example train.rounds=3")
    *parents, last = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:  # a section whose lines are all commented out
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise FellrayError(f"override {override!r}: {parent} is a value, not a section")
    try:
        tree[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise FellrayError(
            f"override {override!r}: {key}: the value is not YAML: {error}"
        ) from None


def _explain(error: ValidationError, source: str) -> str:
    lines = []
    for e in error.errors():
        where = [str(part) for part in e["loc"]]
        name = ".".join(where)
        if e["type"] == "extra_forbidden":
            known = _known_keys(where[:-1])
            near = difflib.get_close_matches(where[-1], known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
            lines.append(f"{source}: unknown key {name!r}; {hint}")
        else:
            lines.append(f"{source}: {name}: {e['msg']} (got {e['input']!r})")
    return "\n".join(lines)


def _known_keys(path: Sequence[str]) -> list[str]:
    """Field names at a place in the tree, by the JSON schema, which knows the unions."""
    schema = RunConfig.model_json_schema()
    nodes = [schema]
    for part in path:
        found = []
        for node in nodes:
            if part in node.get("properties", {}):
                found += _targets(schema, node["properties"][part])
            elif node.get("properties", {}).get("kind", {}).get("const") == part:
                found.append(node)
        nodes = found
    return sorted({key for node in nodes for key in node.get("properties", {})})


def _targets(schema: dict[str, Any], node: dict[str, Any]) -> list[dict[str, Any]]:
    if "$ref" in node:
        return [schema["$defs"][node["$ref"].rsplit("/", 1)[1]]]
    options = [*node.get("oneOf", ()), *node.get("anyOf", ()), *node.get("allOf", ())]
    return [target for option in options for target in _targets(schema, option)] or [node]
