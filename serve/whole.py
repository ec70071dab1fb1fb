"""Both sides of the cut in one process: the recommender without Ray, for a command or a test."""

from fellray.platform.run import read_run
from fellray.platform.shards import Dataset
from fellray.serve.args import Args
from fellray.serve.recommender import Recommender
from fellray.serve.trunk import Trunk


def open_whole(args: Args) -> Recommender:
    """The recommender of a run; its trunk is in this process.

    Raises:
        FellrayError: there is no run, the round is not committed, the prepared data or the encoder
            are missing or not those that the run was trained with.
    """
    run = read_run(args.run)
    learners = run.config.method.seat(Dataset(run.config.data.path).clients)
    return Recommender(args, Trunk(args, learners))
