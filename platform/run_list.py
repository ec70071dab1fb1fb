"""The list of all runs on a storage, in words. It must not know how a run is trained."""

from fellray.platform.errors import FellrayError
from fellray.platform.outcome import BALANCED
from fellray.platform.rounds import Rounds
from fellray.platform.run import ran_out, read_tree
from fellray.platform.storage import Storage


def list_runs(storage: str) -> list[tuple[str, ...]]:
    """Every run below a storage, in words: name, method, seed, rounds, best, test, worst, state."""
    place = Storage(storage)
    folders = {name: place.sub(name) for name in place.list()}
    return [
        (name, *_list_run(folder))
        for name, folder in folders.items()
        if folder.exists("config.json")
    ]


def _list_run(folder: Storage) -> list[str]:
    """One line of the list; a damaged run must not hide the others."""
    try:
        config = read_tree(folder, "config.json")
        latest = Rounds(folder).latest()
        done, wanted = latest or 0, config["train"]["rounds"]
        row = [config["method"]["kind"], str(config["seed"]), f"{done}/{wanted}"]
        if folder.is_locked("train"):
            return [*row, "", "", "", "running"]
        summary = read_tree(folder, "summary.json") if folder.exists("summary.json") else {}
        if summary and (done >= wanted or ran_out(summary)):
            test = summary["test"]
            if BALANCED in test:
                told = [f"{test[BALANCED]:.4f}", f"{summary['balance']['min']:.4f}"]
            else:
                told = [f"AUC {test['auc']:.4f}", ""]
            return [*row, str(summary["best_round"]), *told, "finished"]
    except (FellrayError, KeyError, TypeError):
        return [""] * 6 + ["damaged"]
    return [*row, "", "", "", "interrupted" if latest is not None else "empty"]
