"""What actors are made of: who trains on whose data, the frozen model, the public catalogue."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fellray.platform.aggregation import Method
from fellray.platform.client_groups import group_learners
from fellray.platform.config import RunConfig
from fellray.platform.encoder import Backbone, Tokens, load_backbone, load_tokenizer, tokenize
from fellray.platform.errors import FellrayError
from fellray.platform.own import ALIKE, Own, check_cuts, read_own
from fellray.platform.script import Script, Wording, load_wording
from fellray.platform.shards import Dataset
from fellray.platform.split import plan_cut


@dataclass(frozen=True)
class Catalogue:
    """What is public about the items, one copy per node."""

    tokens: Tokens
    """Token ids of every title; none of them where the model writes."""
    vectors_Id: np.ndarray
    """Unit vectors of the frozen encoder, or embeddings of titles (`grounding`), fp32."""
    popularity_I: np.ndarray
    """Count in everybody's training split, int64: for the baseline row only."""
    wording: Wording | None = None
    """The tokenizer of a model that writes."""


@dataclass(frozen=True)
class World:
    """The run's fixed surroundings."""

    seats: dict[str, tuple[str, ...]]
    """Learner -> the clients whose shards it reads."""
    backbone: Backbone
    catalogue: Catalogue
    data_sha256: str
    """Identity of the prepared data."""
    counts: dict[str, int]
    """Users, items, interactions and splits of the prepared data."""
    sizes: dict[str, int]
    """Learner -> interactions in its training split."""
    own: Own = ALIKE
    """What clients have of their own."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """Learner -> its group, where the method has groups of clients."""

    def key(self, config: RunConfig) -> str:
        """Tells what is frozen and public here from that of another run."""
        model = config.model
        cut = (model.span, model.top, model.max_tokens, *model.lora.target_modules)
        return f"{self.backbone.sha256} {self.data_sha256} {cut}"

    def client_side(self, config: RunConfig) -> Backbone:
        """The frozen bottom and top."""
        cut = plan_cut(self.backbone, config.model)
        return self.backbone.select(cut.prefixes("bottom") + cut.prefixes("top"))

    def trunk_side(self, config: RunConfig) -> Backbone:
        """The frozen trunk."""
        return self.backbone.select(plan_cut(self.backbone, config.model).prefixes("trunk"))


def survey(config: RunConfig, own: Own | None = None) -> World:
    """Read what every actor needs, and refuse what cannot work before any actor exists.

    Args:
        own: what a run that exists was trained with; otherwise `clients.own` is read.

    Raises:
        FellrayError: the run is on attributes, the data is not prepared, was prepared with another
            encoder, the cut does not fit the model, a model that writes has no end of text or no
            room for it, or as `read_own`, `check_cuts` and `group_learners`.
    """
    if config.attributes is not None:
        raise FellrayError(
            f"{config.name}: is on attributes, not on a language model: `fellray prepare`, "
            "`train`, `runs` and, in a study, `compare` know it, the other commands do not"
        )
    data = Dataset(config.data.path)
    backbone = load_backbone(config.model.name)
    plan_cut(backbone, config.model)
    made_with = data.manifest["encoder"]["sha256"]
    if made_with != backbone.sha256:
        raise FellrayError(
            f"{config.data.path}: item vectors were made with another encoder "
            f"({data.manifest['encoder']['name']}, weights {made_with[:12]}) than model.name "
            f"{config.model.name} ({backbone.sha256[:12]}): run `fellray prepare` again"
        )
    wording = None
    if backbone.generative and config.method.moves_base():
        raise FellrayError(
            f"method.kind={config.method.kind} changes frozen weights, and what {backbone.name} "
            "writes is compared with titles by the weights as they were; take another method"
        )
    if backbone.generative and config.wire.pooled:
        raise FellrayError(
            f"wire.pooled sends means of texts, and {backbone.name} writes them token by token; "
            "set wire.pooled=false"
        )
    if backbone.generative:
        wording = load_wording(backbone)
        Script(wording, config.model, data.titles)  # refuses what has no room
        none = np.empty(0, np.int64)
        tokens = Tokens(none, np.zeros(1, np.int64), wording.end, wording.end, wording.pad)
    else:
        tokens = tokenize(load_tokenizer(config.model.name), data.titles, config.model.max_tokens)
    catalogue = Catalogue(tokens, data.vectors.numpy(), data.popularity, wording)
    method: Method = config.method
    seats = method.seat(data.clients)
    entries = data.manifest["clients"]
    sizes = {learner: sum(entries[c]["train"] for c in own) for learner, own in seats.items()}
    own = read_own(config) if own is None else own
    check_cuts(config, own, backbone.num_blocks)
    if own.cuts and backbone.generative:
        raise FellrayError(
            f"{config.clients.own}: cuts of clients' own go with encoders only; {backbone.name} "
            "writes titles: leave the column `cut` out"
        )
    groups = group_learners(config, data)
    counts = data.manifest["counts"]
    return World(seats, backbone, catalogue, data.sha256, counts, sizes, own, groups)
