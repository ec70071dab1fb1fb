"""Everything a run can be told: one frozen tree, read once, checked at the edge.

A sub-config is passed whole to the one class that owns it; nobody looks a key up by a string.
The tree knows the methods only as their own configs (one file per method beside this one).
"""

import difflib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from fellray.platform.attributes import AttributeConfig
from fellray.platform.errors import FellrayError
from fellray.platform.fedpa import Fedpa
from fellray.platform.fellrec import Fellrec
from fellray.platform.methods import AnyMethod


class Config(BaseModel):
    """Frozen, and deaf to misspelt keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _kind(default: str) -> BeforeValidator:
    """A section that names no `kind` means the default one."""
    return BeforeValidator(
        lambda value: {"kind": default, **value} if isinstance(value, dict) else value
    )


class LeaveOneOut(Config):
    """Each user's last interaction is the test item, the one before it the validation item."""

    kind: Literal["leave_one_out"] = "leave_one_out"


class Temporal(Config):
    """One clock for everybody: the newest interactions are the test set, those before validation.

    Needs real timestamps (unix seconds); a set whose order is only per user is refused.
    """

    kind: Literal["temporal"] = "temporal"
    valid: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of all interactions, by time, that go to validation."""
    test: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of all interactions, by time, that go to test."""


class KMeansPartition(Config):
    """KMeans on matrix-factorisation user embeddings of the training split, as FELLRec does."""

    kind: Literal["kmeans"] = "kmeans"
    num_clients: int = Field(default=5, ge=1)
    """How many clusters, that is clients."""
    dim: int = Field(default=64, ge=1)
    """Width of the user embeddings."""
    epochs: int = Field(default=20, ge=1)
    """Passes of BPR over the training split."""


class PerUser(Config):
    """One client per user: the cross-device setting."""

    kind: Literal["per_user"] = "per_user"


class ByAttribute(Config):
    """Users with the same value of one attribute are a client."""

    kind: Literal["by_attribute"] = "by_attribute"
    attribute: str
    """A column of the source's users, `gender` for example."""
    min_users: int = Field(default=10, ge=1)
    """A smaller group joins `other`, as do users without a value; where `other` is itself too
    small, the smallest groups join it as well."""


class DirichletPartition(Config):
    """Clients of equal size whose users differ in the category they met most (label skew).

    After Hsu, Qi, Brown (arXiv 1909.06335): a client's mix of labels is drawn from
    Dirichlet(alpha * p), where p is everybody's mix. Here a label belongs to a user.
    """

    kind: Literal["dirichlet"] = "dirichlet"
    num_clients: int = Field(default=5, ge=1)
    """How many clients."""
    alpha: float = Field(default=0.5, gt=0, le=1e6)
    """Small: a client has users of one category or few. Large: every client has everybody's mix."""
    min_users: int = Field(default=2, ge=1)
    """Refuse to make clients of fewer users than this."""


AnyPartition = KMeansPartition | PerUser | ByAttribute | DirichletPartition


class DataConfig(Config):
    """Where interactions come from and how they are dealt to clients."""

    path: Path = Path("data/demo")
    """The prepared folder: `fellray prepare` writes it, everything else reads it."""
    source: str = "demo"
    """`demo` (made by fellray), a folder in fellray's schema, a MovieLens folder (`ml-100k`,
    `ml-1m`, `ml-32m` and others of their forms), RecBole's atomic files (the folder or the `.inter`
    file), Amazon reviews of 2018 or 2023 (the folder or the file of JSON lines, also `.gz`), or a
    Parquet or CSV file of interactions."""
    items: Path | None = None
    """A Parquet or CSV file of items, where `source` is a file that has no titles; of Amazon
    reviews the metadata, where they do not lie beside them."""
    users: Path | None = None
    """A Parquet or CSV file of users, where `source` is a table: `user_id`, and a column for each
    attribute. The other forms have their users' attributes beside them."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Column map of a Parquet, CSV or RecBole source: fellray's name -> the file's name, for
    `user_id`, `item_id`, `title`, `timestamp`, `rating`, `categories`."""
    min_rating: float | None = None
    """Drop interactions rated below this."""
    k_core: int = Field(default=5, ge=1)
    """Repeatedly drop users and items with fewer interactions than this (1: keep all)."""
    max_users: int | None = Field(default=None, ge=1)
    """Keep a seeded sample of this many users (before the k-core): a stated subsample."""
    split: Annotated[
        Annotated[LeaveOneOut | Temporal, Field(discriminator="kind")], _kind("leave_one_out")
    ] = LeaveOneOut()
    """How each history is divided into training, validation and test."""
    partition: Annotated[Annotated[AnyPartition, Field(discriminator="kind")], _kind("kmeans")] = (
        KMeansPartition()
    )
    """Which users belong to which client."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything `prepare` draws."""


class LoraSpec(Config):
    """Low-rank adapters, by the field names of peft's `LoraConfig`."""

    r: int = Field(default=8, ge=1)
    """Rank."""
    lora_alpha: float = Field(default=16, gt=0)
    """Scale: the adapter's output is multiplied by lora_alpha / r (or / sqrt(r) with rslora)."""
    target_modules: tuple[str, ...] = ("query", "value")
    """Names of the projections that get an adapter, in every block of bottom, trunk and top."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r)."""

    @property
    def scaling(self) -> float:
        """What the adapter's output is multiplied by."""
        return self.scaling_of(self.r)

    def scaling_of(self, rank: int) -> float:
        """The same for an adapter of another rank."""
        return self.lora_alpha / (rank**0.5 if self.use_rslora else rank)


class GenerationConfig(Config):
    """How a decoder-only model (`llama`, `qwen2`, `qwen3`) is asked for the next title.

    The answer is the title in quotes, and the model's end of text. The title's embedding, and that
    of every item's title, are the last hidden state at the last token, of the model without
    adapters; items are ranked by L2 distance (BIGRec's grounding, Bao et al., 2023). The count
    prior and the temperature are not used.
    """

    template: str = (
        "### Instruction:\nHere is what somebody chose so far, the oldest first. Name one more "
        "title that this person will like.\n\n### Input:\n{history}\n\n### Response:\n"
    )
    """The prompt, the same in training and inference. `{history}` stands for the titles, each in
    quotes, with commas between them. The oldest are left out where prompt and answer together would
    be longer than `model.max_tokens`."""
    max_new_tokens: int = Field(default=32, ge=1)
    """Most tokens of an answer, its end included; a longer title is cut off."""
    beams: int = Field(default=4, ge=1)
    """Beams of the search (transformers' `num_beams`); 1: the likeliest token each time."""
    at_once: int = Field(default=16, ge=1)
    """Texts of an evaluation that are written side by side. Each has as many rows in the caches as
    there are beams."""
    train_on_inputs: bool = False
    """The prompt's tokens are in the loss too, as in the published code."""
    published_whitespace: bool = False
    """A defect of the published code: in training every line of the prompt, and the answer's,
    begins with 16 spaces that inference does not have, and an answer's quotes are taken off only
    where nothing stands before them."""

    @model_validator(mode="after")
    def _one_history(self) -> Self:
        if self.template.count("{history}") != 1:
            raise ValueError("template must hold {history} once")
        return self


class ModelConfig(Config):
    """The language model, where it is cut, and how a history becomes a score."""

    name: str = "all-MiniLM-L6-v2"
    """`all-MiniLM-L6-v2` (comes with the installation), or any BERT-family encoder by Hugging
    Face name or by path; or a decoder of the families of Llama, Qwen2 and Qwen3, which then writes
    titles (`model.generation`)."""
    cut: int = Field(default=1, ge=0)
    """k: blocks 0..k-1 stay on the client with the embeddings (the bottom)."""
    cuts: tuple[int, int] | None = None
    """The smallest and the largest cut of any client. The run enters it where `clients.own` gives
    cuts; what is written here does not count."""
    top: int = Field(default=1, ge=0)
    """How many of the last blocks stay on the client with the pooling (the top)."""
    lora: LoraSpec = LoraSpec()
    """The trained adapters."""
    max_history: int = Field(default=8, ge=1)
    """How many of a user's last items are read."""
    max_tokens: int = Field(default=96, ge=16)
    """Longest input in tokens, special tokens included; the oldest items are cut off."""
    pad_multiple: int = Field(default=16, ge=8, multiple_of=8)
    """A row is padded to a multiple of this, at least 16 tokens, by its own length alone: whoever
    shares its batch never changes its bits."""
    temperature: float = Field(default=0.5, gt=0)
    """Cosine scores are divided by this. Beside the prior 0.5 ranks better than RecFormer's 0.05
    (docs/results.md); without it try 0.05."""
    generation: GenerationConfig = GenerationConfig()
    """Prompt and answer of a model that writes."""
    prior: bool = True
    """Add log(1 + the item's count in this client's own training split) to the scores."""
    freeze_bottom: bool = False
    """The bottom has no adapters: a history's hidden states at the lower cut never change, no
    gradient is sent down there, and with `wire.keep_rows_mib` a history is sent once. Not with cuts
    in `clients.own`."""

    @property
    def span(self) -> tuple[int, int]:
        """The smallest and the largest cut."""
        return self.cuts or (self.cut, self.cut)

    @model_validator(mode="after")
    def _room_for_a_padded_row(self) -> Self:
        if self.max_tokens % self.pad_multiple:
            raise ValueError(
                f"max_tokens ({self.max_tokens}) must be a multiple of pad_multiple "
                f"({self.pad_multiple})"
            )
        return self


class WireConfig(Config):
    """In what form hidden states and gradients cross the cut (docs/performance.md, Bytes)."""

    activation: Literal["float32", "int8", "int4"] = "float32"
    """Hidden states, both ways. int8: 8 bits a number, a scale for each token; int4: 4 bits, a
    scale for 64 numbers. Evaluation and serving see the same rounded numbers."""
    gradient: Literal["float32", "int8", "int4"] = "float32"
    """Their gradients, both ways; rounded up or down at random, so that they are right on average.
    The draws follow from seed, client, round and step alone."""
    pooled: bool = False
    """Only with `model.top=0`: the server takes the mean over a history's tokens, all that the top
    looks at; one vector comes back and one gradient goes up, in int8 where tokens cross in fewer
    bits. In float32 the same bits as without."""
    keep_rows_mib: int = Field(default=0, ge=0)
    """Memory in one server for clients' hidden states at the lower cut. What is held is not sent
    again: not for the backward pass, and with `model.freeze_bottom` in no later step, round or
    evaluation. Beyond it the longest unused go, and are sent again. It decides no bit. With a
    frozen bottom the server keeps, while the run lasts, what may be inverted to texts. 0: none."""


class TrainConfig(Config):
    """Local training and the rounds."""

    rounds: int = Field(default=10, ge=0)
    """How many times the loop in jobs/train.py turns."""
    local_samples: int = Field(default=96, ge=1)
    """Training histories one client reads in one round."""
    batch_size: int = Field(default=16, ge=1)
    """Histories in one local step of one client."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """What takes a client's steps. `sgd` is theta - learning_rate * gradient, without momentum: for
    methods that are stated for it (scaffold needs it). It wants a larger learning rate than AdamW.
    """
    learning_rate: float = Field(default=3e-3, gt=0)
    """The optimizer's learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's first decay."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """AdamW's second decay."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    clip: float | None = Field(default=None, gt=0)
    """L2 bound on one client's gradient in a step, client and trunk side each; none by default. It
    bounds the loss's gradient; what a method corrects it by is added after."""
    moments: Literal["reset", "keep"] = "reset"
    """What AdamW's moments do when a round ends: start anew (default) or stay with the client."""
    share: Literal["all", "trunk_only", "none"] = "all"
    """What a client gives to the mixture: all its adapters; only the trunk's, which the server
    holds anyway; or none (then only the loss is sent)."""

    @model_validator(mode="after")
    def _keeps_what_there_is(self) -> Self:
        if self.moments == "keep" and self.optimizer != "adamw":
            raise ValueError(
                f"moments keep is for optimizer adamw, {self.optimizer} has none: use reset"
            )
        return self


class SamplingConfig(Config):
    """Which of the registered clients take part in a round."""

    per_round: int | None = Field(default=None, ge=1)
    """How many clients' answers a round needs. None: everybody takes part (with a trace, everybody
    who is available)."""
    kind: Literal["uniform", "by_size", "round_robin", "trace"] = "uniform"
    """Everybody alike; in proportion to the size of a client's training data; everybody in turn; or
    uniformly among those whom a trace calls available."""
    over_select: float = Field(default=1.0, ge=1, allow_inf_nan=False)
    """More clients are asked than needed: ceil(per_round * over_select). The first per_round
    answers within the deadline count, so above 1 a replay may count other answers."""
    deadline_s: float | None = Field(default=None, gt=0)
    """Seconds after which an answer no longer counts. None: everybody asked is waited for."""
    trace: Path | None = None
    """A Parquet file with the columns client (text), start, end (whole numbers): a client is
    available in the rounds start <= round < end. A client may have several rows."""

    @property
    def asked(self) -> int | None:
        """How many clients a round asks; None: all."""
        if self.per_round is None:
            return None
        # 10 * 1.1 is a little more than 11 in binary fractions
        return math.ceil(round(self.per_round * self.over_select, 6))

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if self.kind == "trace" and self.trace is None:
            raise ValueError("kind trace needs sampling.trace=<Parquet file>")
        if self.kind != "trace" and self.trace is not None:
            raise ValueError(f"trace is read by kind trace only, kind is {self.kind}")
        if self.per_round is None and self.kind in ("by_size", "round_robin"):
            raise ValueError(f"kind {self.kind} needs sampling.per_round=<number of clients>")
        if self.per_round is None and self.over_select > 1:
            raise ValueError(
                f"over_select {self.over_select:g} needs sampling.per_round=<number of clients>"
            )
        return self


def _count_or_auto(value: Any) -> Any:
    """One message for what is neither."""
    try:
        if value == "auto" or int(value) == float(value) >= 1:
            return value
    except (TypeError, ValueError):
        pass
    raise ValueError("write a number of clients, 1 or more, or auto")


class ClientsConfig(Config):
    """Client actors: how many clients each holds and what it may use of a node."""

    per_actor: Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)] = 1
    """Clients in one actor. 1: every client is a process of its own (about 600 MiB). `auto`: a
    probe measures memory and time before the run, as `fellray plan` does; the run records the
    number."""
    slots: int = Field(default=64, ge=1)
    """How many of an actor's clients train side by side; the others who take part follow."""
    crews: int = Field(default=2, ge=1)
    """Those who train side by side do so in as many crews, turn about: while one crew's rows are in
    the trunk, another works in the actor. Decides no bit. 1: the actor waits for the trunk."""
    cpus: float = Field(default=0.5, ge=0)
    """CPUs Ray reserves for one client actor."""
    gpu_denominator: int = Field(default=0, ge=0)
    """n: one client actor takes 1/n of a GPU. 0: none."""
    threads: int = Field(default=1, ge=1)
    """Threads torch uses in a client actor. Recorded, because it decides the bits."""
    own: Path | None = None
    """A Parquet or CSV file of clients that differ, with the columns client (text) and some of
    `rank`, `local_samples`, `cut`: whole numbers of 1 or more (a cut may be 0), empty for the
    run's. `model.lora.r` is the largest rank. A learner who reads several clients' data has that
    rank and the run's cut, and reads what all of them together do. Blocks that some hold themselves
    and others at the server are mixed by their name, wherever they are held; so cuts go with
    `train.share` all, or none."""

    @property
    def together(self) -> int:
        """`per_actor` as a number; whoever starts actors has settled `auto` before."""
        assert self.per_actor != "auto", "per_actor is not settled"
        return self.per_actor


class ServerConfig(Config):
    """The server actors that run the trunk."""

    count: int = Field(default=1, ge=1)
    """How many. Each serves the clients of some actors; when one is lost, the others take over its
    actors until it is back. Decides no bit of a personal adapter."""
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """Who backpropagates through the trunk."""
    zero_stage: Literal[1] = 1
    """DeepSpeed's ZeRO stage (world size 1)."""
    shared_adapter: bool = False
    """Also train one trunk adapter shared by all clients, under DeepSpeed's optimizer."""
    shared_learning_rate: float = Field(default=1e-3, gt=0)
    """Learning rate of the shared trunk adapter, stepped once per round."""
    max_tokens: int = Field(default=16384, ge=16)
    """Most tokens in one merged batch; rows of one client and step always stay together."""
    keep_graphs_mib: int = Field(default=512, ge=0)
    """Memory for what forward passes leave for their backward; beyond it the oldest are dropped and
    made again, with the same bits. 0: every forward is computed twice, nothing is kept."""
    cache_mib: int = Field(default=256, ge=0)
    """Memory for keys and values of texts that a generative model is writing; beyond it the longest
    unused are dropped, and their clients send them again whole. 0: every token costs its whole
    text."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """In what the trunk computes. Messages, adapters, their gradients and moments stay float32.
    bfloat16 is for GPUs (and CPUs with bfloat16 products); elsewhere it is slower."""
    cpus: float = Field(default=1, ge=0)
    """CPUs Ray reserves for one server."""
    gpus: float = Field(default=0, ge=0)
    """GPUs Ray reserves for one server."""
    threads: int = Field(default=2, ge=1)
    """Threads torch uses in one server."""


class ClusterConfig(Config):
    """Which Ray the actors run on."""

    address: str = "local"
    """`local` starts a Ray of its own on this machine; `auto` joins the one that runs here, as a
    job under `ray job submit` does anyway."""
    wait_for_nodes_s: float = Field(default=0.0, ge=0)
    """Seconds that an autoscaler has to bring nodes for actors that find no place, and for one that
    was lost with its node. 0: a layout that does not fit on the nodes there are is refused."""


class EvaluationConfig(Config):
    """Full ranking over all items, seen items masked."""

    every: int = Field(default=1, ge=1)
    """Validate after every this many rounds (and after the last)."""
    select: Literal["ndcg@10", "worst_ndcg@10", "auc", "gauc"] = "ndcg@10"
    """The best round: highest pooled validation NDCG@10, or highest of the worst client; of a run
    on attributes the highest AUC of all samples (`auc`), or of users, averaged (`gauc`)."""
    clients: int | None = Field(default=None, ge=1)
    """Evaluate (and export) at most this many clients, a seeded sample, the same in every round."""
    max_users: int | None = Field(default=None, ge=1)
    """Validate on at most this many users of each client; the test is always whole."""


class NoPrivacy(Config):
    """What a client sends, it sends as it is."""

    kind: Literal["none"] = "none"


class PaperLikeNoise(Config):
    """Laplace noise on every number of the upload, nothing clipped: no formal epsilon.

    What the code of FedPA's authors does elsewhere (GPFedRec, `--dp`); for comparison only.
    """

    kind: Literal["paper_like"] = "paper_like"
    scale: float = Field(gt=0, allow_inf_nan=False)
    """b of Laplace(0, b)."""
    key: Path | None = None
    """As of `gaussian`."""


class GaussianNoise(Config):
    """Local differential privacy: each client's round, sent minus start, is clipped and noised."""

    kind: Literal["gaussian"] = "gaussian"
    clip: float = Field(gt=0, allow_inf_nan=False)
    """C: L2 bound on what a client's round may change, over all it sends together."""
    sigma: float = Field(gt=0, allow_inf_nan=False)
    """Every number sent gets noise of standard deviation sigma * clip. Against `replace` the noise
    multiplier is half of sigma, as a replaced upload may be 2 * clip away."""
    delta: float = Field(default=1e-5, ge=1e-12, lt=0.5)
    """The delta that epsilon belongs to; below 1 / (number of clients)."""
    neighbours: Literal["replace", "add_or_remove"] = "replace"
    """What must look alike: any two sets of data of the client (sensitivity 2 * clip, what local
    differential privacy means), or the client's upload and an upload of zeros (clip)."""
    epsilon: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Budget of a client over all rounds it is asked in. The run ends before the round in which a
    client would exceed it. None: no bound."""
    loss_clip: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """The mean training loss is sent clipped to [0, loss_clip] and noised, for methods that look at
    it. None: it is not sent at all."""
    loss_sigma: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """The loss's noise has standard deviation loss_sigma * loss_clip; it counts in epsilon."""
    key: Path | None = None
    """A file of 32 bytes or more on every client's machine, from which the noise is drawn and which
    nobody else has. It must stay the same while the run lasts. None: the noise follows from `seed`,
    for research: whoever knows the config can take it off again."""

    @model_validator(mode="after")
    def _loss_is_whole(self) -> Self:
        if (self.loss_clip is None) != (self.loss_sigma is None):
            raise ValueError("loss_clip and loss_sigma go together: set both, or neither")
        return self


class RunConfig(Config):
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
    method: Annotated[AnyMethod, _kind("fellrec")] = Field(default=Fellrec())
    train: TrainConfig = TrainConfig()
    sampling: SamplingConfig = SamplingConfig()
    clients: ClientsConfig = ClientsConfig()
    server: ServerConfig = ServerConfig()
    cluster: ClusterConfig = ClusterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    privacy: Annotated[
        Annotated[NoPrivacy | GaussianNoise | PaperLikeNoise, Field(discriminator="kind")],
        _kind("gaussian"),
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
    train = config.train
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
