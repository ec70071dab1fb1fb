"""The forward loop: a run's questions answered in this process, batch after batch, by bare calls.

The same model, adapters, token lengths and rankings as the service's, without a request, a queue or
a second process: what a service is measured against.
"""

import asyncio
from collections.abc import Sequence

import torch

from fellray.platform.device import choose_device
from fellray.platform.encoder import load_backbone, load_tokenizer
from fellray.platform.middle import Middle
from fellray.platform.origin import event_folder, find_first
from fellray.platform.run import read_run
from fellray.platform.shards import Dataset
from fellray.platform.split import plan_cut
from fellray.serve.args import Args
from fellray.serve.blends import Blends, find_private
from fellray.serve.catalogue import Catalogue
from fellray.serve.ends import Ends, Question
from fellray.serve.items import Items
from fellray.serve.lookup import Lookup
from fellray.serve.schema import ByUser
from fellray.serve.served import Watch
from fellray.serve.trunk import make_host, plain_config


class ForwardLoop:
    """Both sides of the cut, called one after the other."""

    def __init__(self, args: Args, users: Sequence[tuple[str, int]]):
        """Args: users: client and user id of each question; `args.threads` threads for all.

        Raises:
            FellrayError: as `Recommender`.
        """
        run = read_run(args.run)
        config = plain_config(run.config)
        data = Dataset(config.data.path)
        items = Items(data, load_tokenizer(config.model.name), config.model)
        made_with = data.manifest["encoder"]["sha256"]
        catalogue = Catalogue(
            find_first(run.storage), items, config.model, made_with, args.threads, args.poll_s
        )
        folder = event_folder(run.storage, args.events)
        lookup = Lookup(config, data, catalogue, folder, args.shards, args.timeout_s)
        served = Watch(args, lookup.seats, data.sha256).served
        backbone = load_backbone(config.model.name)
        own, cut = run.own(), plan_cut(backbone, config.model)
        middle, private_p = Middle(cut.outer, config.model.lora.r), find_private(config, cut.outer)
        rounds = Blends(run.storage, lookup.seats, own, middle, private_p)
        device = choose_device(args.recommender_gpus > 0)
        self._ends = Ends(config, backbone, items, rounds, own, args.adapters, args.rows, device)
        self._host = make_host(run, args, Blends(run.storage, lookup.seats))
        torch.set_num_threads(args.threads)

        async def ask() -> list[Question]:
            questions = []
            for client, user in users:
                one = await lookup.look_up(ByUser(client=client, user_id=user), served)
                if one.reading is not None:
                    prior_T = one.prior_T if config.model.prior else None
                    ids_L = one.reading.ids_L
                    among = (one.items, one.width, one.choice)
                    questions.append(Question(served.round, one.learner, ids_L, prior_T, *among))
            return questions

        self.questions = asyncio.run(ask())
        """Those that a model answers."""
        catalogue.close()
        self.lengths = [len(question.ids_L) for question in self.questions]
        """Tokens of each, without the special ones."""

    def answer(self, which: Sequence[int]) -> int:
        """Rank for these questions, in one batch; how many were ranked."""
        ranked = 0
        found = self._ends.rise([self.questions[at] for at in which])
        crossings = {id(one[0]): one[0] for one in found if not isinstance(one, Exception)}
        for crossing in crossings.values():
            (output,) = self._host.forward([crossing.activation])
            assert not isinstance(output, Exception), output
            ranked += len(self._ends.finish(crossing, output))
        return ranked
